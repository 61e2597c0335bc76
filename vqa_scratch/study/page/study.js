// Draws one study, or two side by side, into an element. The static report and the live page both use it.
import { AnswerView } from "./answer.js";
import { certificateView } from "./certificate.js";
import { DifferenceView, MatterView } from "./difference.js";
import { h } from "./dom.js";
import { Study, result } from "./figures.js";
import { HeadsView } from "./heads.js";
import { LanesView } from "./lanes.js";
import { LensView, expertsView } from "./lens.js";
import { NumberView, StepsView } from "./steps.js";
import { PatchesView, SequenceView, hasPatchWords } from "./tokens.js";

// What of a view travels in a link: each field with what it must be.
const whole = (least) => (x) => Number.isInteger(x) && x >= least && x < 1e6, word = (x) => typeof x === "string" && x.length < 20;
const FIELDS = { mode: word, kind: word, layer: whole(0), head: whole(0), token: whole(0), key: whole(-1), depth: whole(-1) };

/** The fields of `given` that are what they must be. */
const valid = (given) => Object.fromEntries(Object.entries(given ?? {}).filter(([name, x]) => Object.hasOwn(FIELDS, name) && FIELDS[name](x)));

/** The views of one study, in the order of reading; each is an element, or {element, draw()}. */
function viewsOf(study) {
  const { data } = study;
  return [
    new AnswerView(study),
    data.sound && new LanesView(study),
    data.plain && new DifferenceView(study),
    data.matter && new MatterView(study),
    hasPatchWords(study) && new PatchesView(study),
    data.keys && !data.sound && new SequenceView(study),
    new HeadsView(study),
    new StepsView(study),
    new NumberView(study),
    data.lens.length > 0 && new LensView(study),
    data.experts.length > 0 && expertsView(study),
    certificateView(study),
  ].filter(Boolean);
}

/**
 * Draws `data`, a study or an array of two that are compared. Hooks, all optional:
 *   view           what is chosen at first, as `select` gave it; fields that do not fit are ignored
 *   select(view)   called with the FIELDS when the user chooses
 *   edits()        the changes in force; knock(edit) adds one, or takes it back
 *   needs(what)    asks for {kind: "number", name, head}: a promise of an opened head, as in `opened` of a study
 * Returns {update, select, destroy}: `update` takes another study, or fields to put into the first, and keeps the view.
 */
export function renderStudy(element, data, hooks = {}) {
  const first = [data].flat()[0];
  const view = { mode: first.flows.parts ? "parts" : "relevancy", kind: "cross", layer: first.best[0], head: first.best[1], token: 0, key: -1, depth: -1,
    place: {}, opacity: 0.9, all: false, knocking: false, ...valid(hooks.view) };
  let views = [], studies = [];
  const shared = {
    view, hooks,
    refresh: () => views.forEach((v) => v.draw?.()),
    set(changes) {
      Object.assign(view, changes);
      shared.refresh();
      hooks.select?.(Object.fromEntries(Object.keys(FIELDS).map((name) => [name, view[name]])));
    },
    /** Knocks a part out, or back in, if that is what a click means now or if it is `forced`; whether it did. */
    cut(part, forced = false) {
      if (!hooks.knock || !(forced || view.knocking)) return false;
      hooks.knock(part);
      return true;
    },
    /** What a button for a part does: a click, if it knocks nothing out, what it does `otherwise`; Delete knocks out. */
    cuts: (part, otherwise) => ({
      onclick: () => { if (!shared.cut(part)) otherwise?.(); }, onkeydown: (e) => { if (e.key === "Delete") shared.cut(part, true); },
    }),
  };

  function build(given) {
    const all = [given].flat(), at = pathOf(element);
    shared.compared = all.length > 1;
    studies = all.map((one) => new Study(one, shared));
    const columns = studies.map((study) => {
      const made = viewsOf(study), title = shared.compared ? h("p", { class: "run" }, h("b", {}, study.data.run), ` ${result(study.data)}`) : null;
      return { made, element: h("div", { class: "study" }, title, made.map((v) => v.element ?? v)) };
    });
    views = columns.flatMap(({ made }) => made);
    element.replaceChildren(h("div", { class: `columns${shared.compared ? " two" : ""}` }, columns.map((c) => c.element)));
    shared.refresh();
    at?.reduce((node, i) => node?.children[i], element)?.focus({ preventScroll: true });
  }

  build(data);
  return {
    update(changes) {
      if (Array.isArray(changes) || changes.tokens) { build(changes); return; }
      Object.assign(studies[0].data, changes);
      if (changes.plain || (changes.matter && !views.some((v) => v instanceof MatterView))) build(studies.map((study) => study.data));
      else views.filter((v) => !changes.matter || v instanceof MatterView || v instanceof HeadsView).forEach((v) => v.draw?.());
    },
    select(changes) { Object.assign(view, valid(changes)); shared.refresh(); },
    destroy() { views = []; element.replaceChildren(); },
  };
}

/** Where the focus is inside an element, as a list of child numbers; null if it is elsewhere. */
function pathOf(element) {
  const path = [];
  for (let at = document.activeElement; at !== element; at = at.parentElement) {
    if (!at?.parentElement) return null;
    path.unshift([...at.parentElement.children].indexOf(at));
  }
  return path;
}
