// The tokens that are read: which word each patch already stands for, layer by layer (the logit lens of the image's tokens); and
// all of them in the order that the model has them in, coloured by where each is from.
import { row, unpack } from "./arrays.js";
import { badge } from "./certificate.js";
import { onPage, shade } from "./colors.js";
import { clamp, explain, h, number, percent, range, roving, section, shown, sum, tabTo } from "./dom.js";
import { legend, patchImage, square } from "./picture.js";

/** `words` of a study: {kind, layers, sources, labels, ids (L, n, 3), scores (L, n, 3)}, of n source tokens. */
export class PatchesView {
  constructor(study) {
    this.study = study;
    const { words, image, size, pixelated } = study.data, source = study.picture;
    this.ids = unpack(words.ids);
    this.scores = unpack(words.scores);
    this.keyOf = new Map(words.sources.map((s, i) => [s - source.start - study.before, i]));
    this.slider = h("input", { type: "range", min: 0, max: words.layers.length - 1, oninput: (e) => study.set({ depth: Number(e.target.value) }) });
    this.depth = h("output");
    this.cells = range(source.grid[0] * source.grid[1]).map((patch) => {
      const [left, top, width, height] = square(source, size, patch, 1).map((x, i) => `${(100 * x) / size[i % 2]}%`), say = () => this.say(patch);
      return h("button", { type: "button", class: "patchword", style: `left:${left};top:${top};width:${width};height:${height}`, onclick: say, onfocus: say, onpointerenter: say });
    });
    const overlay = roving(h("div", { class: "overlay", role: "group", "aria-label": "the word of each patch", style: `--columns:${source.grid[1]}` }, this.cells), this.cells, source.grid[1]);
    this.lead = h("p", { class: "lead" });
    this.common = h("div", { class: "keys" });
    this.about = h("div", { class: "about" });
    const picture = h("div", { class: "picture lensed" }, h("img", { src: image, width: size[0], height: size[1], alt: "", class: pixelated ? "pixels" : null }), overlay);
    this.element = section("patchwords", "What each patch stands for", badge(study), this.lead,
      h("div", { class: "stage" }, h("div", {}, picture, h("div", { class: "under" }, h("label", {}, "layer ", this.slider), this.depth)), h("div", {}, this.common, this.about)));
  }

  draw() {
    const { study } = this, { words } = study.data, depth = study.view.depth < 0 ? words.layers.length - 1 : clamp(study.view.depth, words.layers.length);
    explain(this.lead, words.kind === "states"
      ? "The model's last step, applied to the state of each patch after a layer (logit lens): the word that it would say there."
      : "What a layer's cross-attention would write if it read that patch alone, its values through all heads, and the model's last step made of that: the word that the patch stands for.");
    this.slider.value = depth;
    this.slider.setAttribute("aria-valuetext", words.layers[depth]);
    this.depth.textContent = words.layers[depth];
    const first = this.cells.map((_, patch) => row(this.ids, depth, this.keyOf.get(patch))[0]);
    const strength = this.cells.map((_, patch) => row(this.scores, depth, this.keyOf.get(patch))[0]), counts = new Map();
    for (const id of first) counts.set(id, (counts.get(id) ?? 0) + 1);
    const common = [...counts].sort((a, b) => b[1] - a[1]);
    this.cells.forEach((cell, patch) => {
      const label = shown(words.labels[first[patch]]), word = h("span", {}, label);
      shade(word, strength[patch], 0);
      cell.setAttribute("aria-label", `${study.picture.labels[study.before + patch]}: ${label}`);
      cell.replaceChildren(word);
    });
    tabTo(this.cells, this.pointed ?? 0);
    this.common.replaceChildren(legend(onPage(), "0", "1, the probability of the word"), ...common.slice(0, 8).map(([id, n]) => h("span", {}, `“${shown(words.labels[id])}” ${n} of ${first.length}`)));
    this.say(this.pointed ?? strength.indexOf(Math.max(...strength)));
  }

  /** The words of one patch, layer by layer. */
  say(patch) {
    const { study } = this, { words } = study.data, key = this.keyOf.get(patch);
    this.pointed = patch;
    const lines = words.layers.map((name, layer) => h("li", {}, h("b", {}, `${name}: `), [...row(this.ids, layer, key)].map((id, i) =>
      `${shown(words.labels[id])} ${number(row(this.scores, layer, key)[i], 2)}`).join(", ")));
    this.about.replaceChildren(h("h3", {}, `${study.picture.labels[study.before + patch]} (row, column), layer by layer`), h("ul", {}, lines),
      h("p", { class: "note" }, "Numbers are probabilities."));
  }
}

/** Whether a study has words for every patch of its picture. */
export function hasPatchWords({ data, picture, before }) {
  return Boolean(data.words && picture) && picture.labels.every((_, i) => i < before || data.words.sources.includes(picture.start + i));
}

/** Where a token is from, in words; the name of its colour. */
function origin(study, key, k) {
  if (!key.source) return k < study.data.keys.length + study.data.prompt ? ["text", "what the decoder starts from"] : ["own", "words it wrote"];
  if (key.source.sinks.includes(key.index)) return ["sink", "tokens without content"];
  return key.source.image ? ["image", key.source === study.picture ? "image" : "queries that read the image"] : ["text", study.picture ? "question" : "text"];
}

export class SequenceView {
  constructor(study) {
    this.study = study;
    const { data } = study, own = data.way === "cross" ? [] : data.read.map((_, i) => data.keys.length + i), keys = [...data.keys.keys(), ...(data.way === "prefix" ? own : [])];
    const origins = new Map();
    const ids = data.words && unpack(data.words.ids); // the words after the last layer
    this.said = new Map((data.words?.sources ?? []).map((s, i) => [s, shown(data.words.labels[row(ids, ids.shape[0] - 1, i)[0]])]));
    this.tokens = keys.map((k) => {
      const key = study.keyName(k), [name, meaning] = origin(study, key, k);
      origins.set(name, meaning);
      const inside = key.patch === undefined ? [key.text, h("small")] : patchImage(study, key.patch), attributes = { class: `seq ${name}${key.patch === undefined ? "" : " square"}` };
      const part = key.source ? study.sourcePart(key.source, key.index) : { kind: "source", source: data.writer, token: k - data.keys.length };
      const knock = study.shared.hooks.knock, on = knock ? { type: "button", ...study.shared.cuts(part) } : {};
      return { k, part, meaning, name: key.text, token: h(knock ? "button" : "span", { ...attributes, ...on }, inside) };
    });
    const what = { cross: "These tokens lie beside the decoder; its cross-attention reads them while it writes.", prefix: "This is the decoder’s own sequence: what stands before its words is all it knows of the image and the question.",
      stream: study.pair ? "This is what the image tower reads." : "This is the one sequence of the model: words and patches read each other in every layer." }[data.way];
    const dots = [...origins].map(([name, meaning]) => h("span", {}, h("i", { style: `background:var(--${name})` }), meaning));
    const buttons = this.tokens.map(({ token }) => token), box = h("div", { class: "seqs" }, buttons);
    if (study.shared.hooks.knock) { roving(box, buttons); tabTo(buttons, 0); }
    this.says = h("p", { class: "hidden" });
    this.element = section("sequence", "The sequence as it is", badge(study), h("p", { class: "lead" }, `${what} ${this.tokens.length} tokens in their order; the shade is what the chosen word takes from each${this.said.size ? ", and after an arrow the word that a token stands for" : ""}.`),
      box, h("div", { class: "keys" }, dots), this.says);
  }

  draw() {
    const { study } = this, { layer, head, mode } = study, plain = mode === "layer" || mode === "head" ? mode : "mean";
    const chosen = study.kind === "cross" ? [plain, layer, head] : ["mean", 0, 0], weights = study.weights("cross", ...chosen, study.token), top = Math.max(...weights);
    const groups = {};
    for (const { k, part, meaning, name, token } of this.tokens) {
      token.classList.toggle("off", Boolean(study.edited(part)));
      const inside = token.firstElementChild, share = weights[k] ?? 0, said = this.said.get(study.data.keys[k]);
      if (inside.nodeName === "SMALL") { shade(token, share / top); inside.textContent = said ? ` → ${said}` : ""; }
      else inside.style.boxShadow = `inset 0 0 0 99px rgb(190 20 80 / ${(0.75 * share) / top})`;
      token.title = `${name}: ${percent(share)}${said ? `, stands for “${said}”` : ""}`;
      token.setAttribute("aria-label", token.title);
      groups[meaning] = (groups[meaning] ?? 0) + share;
    }
    this.says.textContent = `Of “${study.label}”: ${Object.entries(groups).map(([name, share]) => `${name} ${percent(share / (sum(weights) || 1))}`).join(", ")}.`;
  }
}
