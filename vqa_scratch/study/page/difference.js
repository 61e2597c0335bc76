// A changed run beside the unchanged one; and the heads that matter, as they are tried one by one.
import { badge } from "./certificate.js";
import { DIFFERENCE, OVER_IMAGE, diverging } from "./colors.js";
import { h, meter, number, percent, plain, section, shown, sum, table } from "./dom.js";
import { strongest } from "./arrays.js";
import { unpackFlows } from "./figures.js";
import { Picture, legend } from "./picture.js";

const points = (share) => `${share >= 0.0005 ? "+" : ""}${number(Math.round(1000 * share) / 10 || 0, 1)}`; // never −0.0
/** How much a probability or a similarity changed. */
const by = (study, change) => (study.pair ? number(change) : points(change));
const placeOf = (study, name) => Object.entries(study.attentions).map(([kind, a]) => [kind, a.names.indexOf(name)]).find(([, layer]) => layer >= 0);

export class DifferenceView {
  constructor(study) {
    this.study = study;
    this.flows = unpackFlows(study.data.plain.flows);
    this.answers = h("div");
    const maps = !study.picture ? [] : [["unchanged", "before"], ["changed", "after"], ["changed − unchanged", "between"]].map(([title, name]) => {
      this[name] = new Picture(study);
      return h("figure", {}, h("figcaption", {}, title), this[name].element);
    });
    this.scales = h("div", { class: "under" });
    this.words = study.texts.map((source) => ({ source, words: source.labels.map((label) => h("span", { class: "word" }, shown(label), h("small"))) }));
    this.says = h("p", { class: "note", role: "status" });
    this.element = section("difference", "Changed beside unchanged", badge(study), this.answers,
      maps.length ? h("div", { class: "three" }, maps) : null, this.scales, this.words.map(({ words }) => h("div", { class: "words" }, words)), this.says);
  }

  /** Shares before and after, each of a whole, for the same word; of the mean weights where a head or a layer is chosen. */
  shares() {
    const { study } = this, mode = this.flows[study.mode] ? study.mode : "mean";
    const [before, after] = [this.flows, study.flows].map((flows) => study.flowShares(flows, mode, study.token).sources);
    return [...[before, after].map((sources) => sources.map((v) => v / (sum(sources) || 1))), mode];
  }

  draw() {
    const { study } = this, { plain: was, tokens, answer } = study.data, [before, after, mode] = this.shares(), change = after.map((v, i) => v - before[i]);
    const cell = (t) => (t ? h("span", {}, h("b", {}, shown(t.label)), ` ${study.amount(t.probability)} `, meter(t.probability)) : "–");
    const rows = Array.from({ length: Math.max(tokens.length, was.tokens.length) }, (_, i) => {
      const [old, now] = [was.tokens[i], tokens[i]], same = old && now && old.id === now.id;
      return [`token ${i + 1}`, cell(old), cell(now), same ? by(study, now.probability - old.probability) : "another word"];
    });
    const total = (text, p) => h("span", {}, h("b", {}, `“${text || "(nothing)"}”`), ` ${study.amount(p)}`);
    this.answers.replaceChildren(table("answers, unchanged and changed", ["", "unchanged", "changed", study.pair ? "difference" : "points"],
      [["answer", total(was.answer, was.probability), total(answer.text, answer.probability), was.answer === answer.text ? by(study, answer.probability - was.probability) : "another answer"], ...rows], { class: "versus" }));
    const largest = Math.max(1e-9, ...change.map(Math.abs));
    if (study.picture) {
      const [a, b, d] = [before, after, change].map((sources) => study.patches({ sources })), top = Math.max(study.top(study.picture, { sources: before }), study.top(study.picture, { sources: after }));
      const most = Math.max(1e-9, ...d.map(Math.abs));
      this.before.paint(a, OVER_IMAGE, top);
      this.after.paint(b, OVER_IMAGE, top);
      this.between.paint(d, DIFFERENCE, most, { share: (v) => 0.5 + v / most / 2 });
      this.scales.replaceChildren(legend(OVER_IMAGE, "0 %", `${percent(top)} or more, in both`), legend(DIFFERENCE, `${points(-most)}`, `${points(most)} points`));
      const columns = study.picture.grid[1], place = (i) => `row ${Math.floor(i / columns) + 1} column ${(i % columns) + 1} (${points(d[i])} points)`;
      const said = `most changed: ${strongest(d, 3, Math.abs).map(place).join(", ")}`;
      this.says.textContent = `${mode} for token ${study.label}; ${said}`;
      for (const [picture, name] of [[this.before, "unchanged map"], [this.after, "changed map"], [this.between, `difference; ${said}`]]) picture.map.setAttribute("aria-label", name);
    }
    for (const { source, words } of this.words) {
      words.forEach((word, i) => { const v = change[source.start + i]; diverging(word, v, largest); word.lastChild.textContent = ` ${points(v)}`; });
    }
  }
}

const LEAST = 0.05; // a head matters if the answer's probability falls by so much

/** `matter` of a study: {rows: [{name, head, answer, probability, changed}], total, done}. */
export class MatterView {
  constructor(study) {
    this.study = study;
    this.box = h("div");
    this.element = section("matter", "Heads that matter", badge(study), this.box);
  }

  draw() {
    const { study } = this, { matter, answer } = study.data, { hooks } = study.shared, loss = (r) => answer.probability - r.probability + (r.changed ? 1 : 0);
    const counted = matter.rows.filter((r) => r.changed || answer.probability - r.probability >= LEAST).length, { total, done } = matter;
    const rows = [...matter.rows].sort((a, b) => loss(b) - loss(a)).slice(0, 10).map((r) => {
      const [kind, layer] = placeOf(study, r.name) ?? [], part = { kind: "head", name: r.name, head: r.head, scale: 0 };
      const name = kind ? plain(`${r.name} head ${r.head}`, () => study.set({ mode: "head", kind, layer, head: r.head })) : `${r.name} head ${r.head}`;
      return [name, h("b", {}, r.answer || "(nothing)"), study.amount(r.probability), r.changed ? "another answer" : by(study, r.probability - answer.probability),
        hooks.knock ? plain("✂", () => study.shared.cut(part, true), { "aria-label": `knock out ${r.name} head ${r.head}` }) : ""];
    });
    this.box.replaceChildren(
      h("p", { class: "lead", role: "status" }, h("b", { class: "count" }, `${counted} of ${total ?? "all"} heads matter for this answer${done ? "" : " so far"}`),
        `: without one of them it is another, or ${study.pair ? `${LEAST} less similar` : `${100 * LEAST} points less probable`}. ${done ? "All were tried." : `${matter.rows.length} were tried.`}`),
      done ? "" : h("progress", { max: total, value: total && matter.rows.length, "aria-label": "heads tried" }),
      table("effect of each head", ["without", study.pair ? "text" : "answer", study.data.measure, study.pair ? "difference" : "points", h("th", { "aria-label": "knock out" })], rows));
  }
}
