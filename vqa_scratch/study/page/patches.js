// Which word each token that is read already stands for, layer by layer: the logit lens of the image's tokens.
import { row, unpack } from "./arrays.js";
import { badge } from "./certificate.js";
import { onPage, shade } from "./colors.js";
import { clamp, explain, h, number, range, roving, section, shown, tabTo } from "./dom.js";
import { legend, square } from "./picture.js";

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
      const cell = h("button", { type: "button", class: "patchword", onclick: () => this.say(patch), onfocus: () => this.say(patch), onpointerenter: () => this.say(patch) });
      const [left, upper, width, height] = square(source, size, patch, 1), share = (x, i) => `${(100 * x) / size[i]}%`;
      cell.style.cssText = `left:${share(left, 0)};top:${share(upper, 1)};width:${share(width, 0)};height:${share(height, 1)}`;
      return cell;
    });
    const overlay = h("div", { class: "overlay", role: "group", "aria-label": "the word of each patch" }, this.cells);
    overlay.style.setProperty("--columns", source.grid[1]);
    roving(overlay, this.cells, source.grid[1]);
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
    const strength = this.cells.map((_, patch) => row(this.scores, depth, this.keyOf.get(patch))[0]);
    const counts = new Map();
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
