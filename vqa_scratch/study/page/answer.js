// The picture with the map over it, the words, the answer token by token, and how the map is made.
import { ON_LIGHT, OVER_IMAGE, shade } from "./colors.js";
import { choice, clamp, explain, h, meter, number, percent, range, roving, section, shown, sum, tabTo } from "./dom.js";
import { row } from "./arrays.js";
import { badge } from "./certificate.js";
import { Picture, legend } from "./picture.js";
import { METHODS } from "./words.js";

const block = (title, ...children) => h("div", { class: "block" }, h("h3", {}, title), children);

/** The view of one study: {element, draw()}. */
export class AnswerView {
  constructor(study) {
    this.study = study;
    const { data } = study, right = h("div");
    this.words = study.texts.map((source) => this.wordsOf(source));
    right.append(...this.words.map(({ source, box }) =>
      block(study.pair ? "Text, as the text tower reads it" : source.name === "text" ? "Question, as the model reads it" : "Text, as the encoder reads it", box)));
    right.append(this.buildAnswer(), this.buildControls());
    this.bar = h("div", { class: "shares", "aria-hidden": "true" });
    this.barKeys = h("div", { class: "keys" });
    right.append(block("Where it goes", this.bar, this.barKeys));
    this.readWords = data.read.map((label) => h("span", { class: `word${label.startsWith(" ") ? " starts" : ""}` }, label.trim() || label));
    if (data.read.length > 1 && !study.pair) right.append(block("What the decoder itself had read", h("div", { class: "words flowing" }, this.readWords)));
    this.live = h("p", { class: "hidden", role: "status", "aria-live": "polite" });
    right.append(this.live);
    const left = study.picture ? this.buildPicture() : null;
    this.element = section("answer", "Where it looks", badge(study), h("div", { class: `stage${left ? "" : " wordy"}` }, left, right));
  }

  buildPicture() {
    const { study } = this, { data } = study, [width, height] = data.size;
    const at = (e) => this.picture.at(e), mouse = { onpointermove: (e) => this.say(at(e)), onpointerleave: () => this.say(null), onclick: (e) => { this.say(at(e)); if (!study.shared.cut(this.part(at(e)))) study.ask(at(e)); } };
    this.picture = new Picture(study, { tabindex: 0, ...mouse, onkeydown: (e) => this.walk(e) }, () => study.shared.refresh());
    study.image = this.picture.image;
    const seen = `The image as the model saw it, ${width} by ${height} pixels`;
    const asked = study.pair ? `Compared with “${data.text}”.` : `${data.text ? `“${data.text}” was answered` : "It was described as"} “${data.answer.text || "(nothing)"}”.`;
    this.slider = h("input", { type: "range", min: 0, max: 100, oninput: (e) => study.set({ opacity: e.target.value / 100 }) });
    this.note = h("p", { class: "note" });
    return h("div", {},
      h("figure", { class: "untouched" }, h("img", { src: data.image, width, height, alt: `${seen}. ${asked}`, class: data.pixelated ? "pixels" : null }), h("figcaption", {}, seen)),
      this.picture.element,
      h("div", { class: "under" }, legend(ON_LIGHT, "none", "strongest"), h("label", {}, "overlay ", this.slider)),
      this.note);
  }

  wordsOf(source) {
    const { study } = this, long = source.labels.length > 40, feeds = (i) => () => this.showFed(source.start + i);
    const words = source.labels.map((label, i) => h("button", {
      type: "button", class: `word${source.sinks.includes(i) ? " sink" : ""}${label.startsWith(" ") ? " starts" : ""}`,
      ...study.shared.cuts(study.sourcePart(source, i), () => {
        if (study.kind === source.name) study.set({ place: { ...study.view.place, [source.name]: i } });
        if (study.kind === "stream") study.set({ place: { ...study.view.place, stream: source.start + i } });
      }),
      onpointerenter: feeds(i), onfocus: feeds(i), onpointerleave: () => this.showFed(null), onblur: () => this.showFed(null),
    }, label.trim() || label));
    return { source, words, box: roving(h("div", { class: `words${long ? " flowing" : ""}` }, words), words) };
  }

  buildAnswer() {
    const { study } = this, { data } = study;
    this.fed = data.tokens.map(() => h("span", { class: "fed" }));
    this.tokens = data.tokens.map((token, i) => h("button", {
      class: `token${data.answer.ends.includes(token.id) ? " end" : ""}`, role: "radio", type: "button",
      "aria-label": `token ${i + 1}: ${shown(token.label)}, ${data.measure} ${study.amount(token.probability)}`,
      onclick: () => { study.hover = null; study.set({ token: i }); }, onpointerenter: () => { study.hover = i; this.draw(); }, onpointerleave: () => { study.hover = null; this.draw(); },
    }, h("b", {}, shown(token.label)), h("span", {}, meter(token.probability), study.amount(token.probability)), this.fed[i]));
    const box = roving(h("div", { class: "answers", role: "radiogroup", "aria-label": "generated tokens" }, this.tokens), this.tokens);
    return block(study.pair ? "The text, and its words alone, with their similarity to the image" : "Answer, token by token, with probabilities", box);
  }

  buildControls() {
    const { study } = this, { flows } = study, modes = Object.keys(METHODS).filter((mode) => flows[mode] || ["mean", "layer", "head"].includes(mode));
    this.modes = choice("what to show", modes.map((mode) => [mode, mode[0].toUpperCase() + mode.slice(1), METHODS[mode]]), (mode) => study.set(flows[mode] ? { mode, kind: "cross" } : { mode }));
    this.pickers = ["layer", "head"].map((name) => [name, h("select", { "aria-label": name, onchange: (e) => study.set({ [name]: Number(e.target.value) }) })]);
    this.explain = h("p", { class: "explain" });
    return block("Show", this.modes, h("div", { class: "pickers" }, this.pickers.map(([name, select]) => h("label", {}, name, select))), this.explain);
  }

  draw() {
    const shares = this.study.shares();
    this.drawWords(shares);
    if (this.picture) this.drawPicture(shares);
    this.drawControls(shares);
    this.drawBar(shares);
  }

  drawPicture(shares) {
    const { study } = this, { view } = study, values = study.patches(shares), any = sum(shares.sources) > 1e-9 && sum(values) > 1e-9;
    this.picture.paint(any ? values : null, OVER_IMAGE, study.top(study.picture, shares), { opacity: Math.min(1, view.opacity / 0.9) });
    range(values.length).forEach((patch) => { if (study.edited(this.part(patch))) this.picture.mark(patch, true); });
    if (study.asked >= 0) this.picture.mark(study.asked);
    this.slider.value = Math.round(100 * view.opacity);
    this.picture.map.setAttribute("aria-label", study.inWords(shares));
  }

  drawWords(shares) {
    const { study } = this, stream = study.kind === "stream";
    for (const { source, words } of this.words) {
      const values = study.of(source, shares), top = study.top(source, shares);
      const asked = stream ? study.place("stream") - source.start : clamp(study.place(source.name), words.length);
      words.forEach((word, i) => {
        shade(word, sum(values) > 1e-9 ? values[i] / top : 0);
        word.title = `${percent(values[i])}`;
        word.classList.toggle("query", (study.kind === source.name || stream) && i === asked);
        word.classList.toggle("off", Boolean(study.edited(study.sourcePart(source, i))));
      });
      tabTo(words, clamp(study.place(source.name), words.length));
    }
    const flow = study.kind === "cross" && study.flows[study.mode];
    const own = Array.from(shares.own, (v, i) => (flow && i === study.row ? 0 : v)), top = Math.max(1e-9, ...own);
    this.readWords.forEach((word, i) => {
      shade(word, (own[i] || 0) / top);
      word.title = own[i] ? percent(own[i]) : "";
      word.classList.toggle("query", i === study.row);
    });
  }

  drawControls(shares) {
    const { study } = this, { view, data, mode, kind } = study, chosen = clamp(view.token, this.tokens.length);
    this.tokens.forEach((b, i) => b.setAttribute("aria-checked", String(i === chosen)));
    tabTo(this.tokens, chosen);
    this.modes.choose(mode);
    const { names, pattern } = study.attentions[kind], choices = { layer: names.map((_, i) => study.block(kind, i)), head: range(pattern.shape[1]) };
    for (const [name, select] of this.pickers) {
      select.parentElement.hidden = mode !== "head" && mode !== name;
      select.replaceChildren(...choices[name].map((text, value) => h("option", { value }, text)));
      select.value = study[name];
    }
    let text = METHODS[mode];
    if (kind !== "cross") text = `${study.name(kind)}: ${mode === "head" ? "one head" : mode === "layer" ? "one layer, averaged over heads" : "averaged over layers and heads"}. ${study.whose()}`;
    else if (study.pair && mode === "parts") text += this.partsInWords();
    else if (data.way === "stream" && !study.pair && mode === "mean") text += " Here it is the words of the question that look, on average.";
    else if (!data.keys && !study.flows[mode]) text += " This run’s decoder reads one averaged key, so its cross-attention is the same everywhere by construction.";
    explain(this.explain, text);
    this.live.textContent = study.inWords(shares);
  }

  partsInWords() {
    const { study } = this, parts = row(study.flows.parts.sources, study.row), { start, stop } = study.picture, from = start + study.before;
    const places = sum(parts.subarray(from, stop)), before = sum(parts.subarray(start, from)), whole = study.data.tokens[study.token].probability;
    return ` Here: places ${number(places)}${study.before ? `, class token ${number(before)}` : ""}, the rest ${number(whole - places - before)}; in all ${number(whole)}. Places that take from it are not drawn.`;
  }

  drawBar(shares) {
    const { study } = this, masses = study.masses(shares);
    const names = { image: "image", text: study.pair ? "text" : study.picture ? "question" : study.data.sound ? "sound" : "article", sink: study.data.sound ? "the silence behind it" : "sinks (class token, separators)", own: "the decoder’s own tokens" };
    const seen = Object.keys(names).filter((name) => masses[name] > 0.0005 || (name === "text" && this.words.length && !study.pair) || (name === "image" && study.picture));
    this.bar.replaceChildren(...seen.map((name) => h("i", { style: `background:var(--${name});width:${100 * masses[name]}%` })));
    this.barKeys.replaceChildren(...seen.map((name) => h("span", {}, h("i", { style: `background:var(--${name})` }), `${names[name]} ${percent(masses[name])}`)));
  }

  part(patch) { return this.study.sourcePart(this.study.picture, this.study.before + patch); }

  /** How much of a source token is in the map of each word of the answer; none without one. */
  showFed(s) {
    const fed = s === null ? [] : this.study.feeds(s).filter(([, , token]) => token >= 0), most = Math.max(1e-9, ...fed.map(([, share]) => share));
    this.fed.forEach((box) => box.replaceChildren());
    for (const [, share, token] of fed) this.fed[token].replaceChildren(meter(share / most), percent(share));
  }

  /** A patch in words, and the words that it feeds. */
  say(patch) {
    const { study } = this;
    this.pointed = patch ?? this.pointed;
    this.showFed(patch === null ? null : study.picture.start + study.before + patch);
    if (patch === null) { this.note.textContent = ""; return; }
    const columns = study.picture.grid[1], shares = study.shares(), total = sum(shares.sources) || 1;
    const fed = study.feeds(study.picture.start + study.before + patch).filter(([, share]) => share > 0.0005).slice(0, 4);
    this.note.textContent = `patch in row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}: ${percent(study.patches(shares)[patch] / total)}`
      + (fed.length ? `; it feeds ${fed.map(([label, share]) => `“${label}” ${percent(share)}`).join(", ")}` : "");
  }

  walk(event) {
    const { study } = this, columns = study.picture.grid[1], count = columns * study.picture.grid[0];
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    if (event.key === "Escape") study.set({ place: { ...study.view.place, image: 0, stream: 0 } });
    if (event.key === "Delete" && this.pointed !== undefined) study.shared.cut(this.part(this.pointed), true);
    if (step === undefined) return;
    event.preventDefault();
    const next = clamp((this.pointed ?? 0) + step, count);
    this.say(next);
    study.ask(next);
  }
}
