// One head that reads the sources, step by step: all keys from q·k to the weight.
import { row, strongest, unpack } from "./arrays.js";
import { badge } from "./certificate.js";
import { clamp, explain, h, meter, number, plain, section, sum, table } from "./dom.js";
import { patchImage } from "./picture.js";

/** The chosen head of the attention that reads the sources: its number, and its figures if the page has them. */
export function chosenHead(study) {
  const { pattern } = study.attentions.cross, layer = clamp(study.view.layer, pattern.shape[0]), head = clamp(study.view.head, pattern.shape[1]);
  const opened = study.opened.get(`${layer}.${head}`), title = `${study.name("cross")}${study.data.way === "cross" ? " " : ", "}layer ${study.block("cross", layer)}, head ${head}`;
  if (!opened) return { layer, head, title, opened: null };
  opened.unpacked ??= Object.fromEntries(Object.entries(opened).filter(([, x]) => x?.kind).map(([name, x]) => [name, unpack(x)]));
  const a = opened.unpacked, t = study.token, dots = row(a.dots, t), mask = row(a.mask, t), lse = a.lse.values[t];
  const scores = dots.map((d, i) => (mask[i] < -1e29 ? -Infinity : d * opened.scale + mask[i]));
  const weights = scores.map((s) => Math.exp(s - lse));
  const z = row(a.z, t), read = new Float32Array(z.length);
  weights.forEach((w, k) => row(a.v, k).forEach((v, i) => { read[i] += w * v; }));
  const off = Math.max(...read.map((v, i) => Math.abs(v - z[i]))), changed = off > 2e-2 * Math.max(1, ...z.map(Math.abs)) ? " (it was changed: what goes on is not what was read)" : "";
  return { layer, head, title, opened, a, t, dots, mask, lse, scores, weights, q: row(a.q, t), z, off, changed };
}

/** A key of that attention, with its patch if it is one. */
export function keyCell(study, k) {
  const { text, patch } = study.keyName(k);
  return h("td", { class: "key" }, patch === undefined ? null : patchImage(study, patch), text);
}

export class StepsView {
  constructor(study) {
    this.study = study;
    this.title = h("h2");
    this.box = h("div");
    this.element = section("stepwise", this.title, badge(study), this.box);
    this.element.setAttribute("aria-label", "one head, step by step");
  }

  draw() {
    const { study } = this, chosen = chosenHead(study), { layer, head, opened } = chosen;
    explain(this.title, `${chosen.title}, step by step`);
    if (!opened) { this.box.replaceChildren(...this.missing(layer, head)); return; }
    const { dots, mask, lse, scores, weights, off, changed } = chosen, order = strongest(weights), token = study.label, best = order[0];
    const rows = (study.view.all ? order : order.slice(0, 8)).map((k) => [keyCell(study, k), number(dots[k]), number(dots[k] * opened.scale), number(mask[k], 0),
      number(scores[k] - lse), h("span", { class: "weight" }, meter(weights[k] / weights[best]), weights[k].toFixed(4))]);
    const formula = h("div", { class: "formula" }, "weight = exp( q·k × ", h("b", {}, number(opened.scale, 4)), " + mask − LSE ),   LSE = log Σ exp(score) = ", h("b", {}, number(lse, 4)), "\nz      = Σ weight · v");
    const who = study.pair ? "the image was read" : study.data.way === "stream" ? `“${token}” was read off the first token` : `the decoder wrote “${token}”`;
    this.box.replaceChildren(
      h("p", { class: "lead" }, `What this head did when ${who}, strongest keys first${study.picture && study.data.keys ? "; a patch by its row and column" : ""}.`), formula,
      table(`keys read by layer ${study.block("cross", layer)} head ${head}`, ["key", "q·k", "× scale", "+ mask", "− LSE", "exp: weight"], rows),
      order.length > 8 ? plain(study.view.all ? "Only the strongest 8" : `All ${order.length} keys`, () => study.set({ all: !study.view.all })) : "",
      h("p", { class: "explain check" }, `Worked out here, in your browser: the ${weights.length} weights sum to ${sum(weights).toFixed(6)}, and z differs from the one that ran by at most ${off.toExponential(1)}${changed}.`));
  }

  /** What stands here for a head whose figures the page lacks: they are asked for, or others are offered. */
  missing(layer, head) {
    const { study } = this, { needs } = study.shared.hooks, key = `${layer}.${head}`;
    if (needs) {
      this.asked ??= new Set();
      if (!this.asked.has(key)) {
        this.asked.add(key);
        needs({ kind: "number", name: study.attentions.cross.names[layer], head }).then((opened) => { study.opened.set(key, opened); study.shared.refresh(); }, () => this.asked.delete(key));
      }
      return [h("p", { class: "lead" }, "The numbers of this head are on their way.")];
    }
    const others = [...study.opened.values()].slice(0, 12).map((o) => plain(`layer ${study.block("cross", o.layer)} head ${o.head}`, () => study.set({ mode: "head", kind: "cross", layer: o.layer, head: o.head })));
    return [h("p", { class: "lead" }, "The numbers of this head are not in the page, to keep it small; trace.safetensors has them. The heads that did most for the answer are here:"), h("div", { class: "pickers" }, others)];
  }
}
