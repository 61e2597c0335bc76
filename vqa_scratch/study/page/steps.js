// One head that reads the sources, with the figures that ran: all keys from q·k to the weight, and one number on its way from q·k
// over score, weight, value and output projection to the logit and the probability.
import { row, strongest, unpack } from "./arrays.js";
import { badge } from "./certificate.js";
import { clamp, explain, h, meter, number, plain, range, section, sum, table } from "./dom.js";
import { patchImage } from "./picture.js";

/** The chosen head of the attention that reads the sources: its number, and its figures if the page has them. */
function chosenHead(study) {
  const { pattern } = study.attentions.cross, layer = clamp(study.view.layer, pattern.shape[0]), head = clamp(study.view.head, pattern.shape[1]);
  const opened = study.opened.get(`${layer}.${head}`), title = `${study.name("cross")}${study.data.way === "cross" ? " " : ", "}layer ${study.block("cross", layer)}, head ${head}`;
  if (!opened) return { layer, head, title, opened: null };
  opened.unpacked ??= Object.fromEntries(Object.entries(opened).filter(([, x]) => x?.kind).map(([name, x]) => [name, unpack(x)]));
  const a = opened.unpacked, t = study.token, dots = row(a.dots, t), mask = row(a.mask, t), lse = a.lse.values[t];
  const scores = dots.map((d, i) => (mask[i] < -1e29 ? -Infinity : d * opened.scale + mask[i])), weights = scores.map((s) => Math.exp(s - lse));
  const z = row(a.z, t), read = new Float32Array(z.length);
  weights.forEach((w, k) => row(a.v, k).forEach((v, i) => { read[i] += w * v; }));
  const off = Math.max(...read.map((v, i) => Math.abs(v - z[i]))), changed = off > 2e-2 * Math.max(1, ...z.map(Math.abs)) ? " (it was changed: what goes on is not what was read)" : "";
  return { layer, head, title, opened, a, t, dots, mask, lse, scores, weights, q: row(a.q, t), z, off, changed };
}

/** A key of that attention, with its patch if it is one. */
function keyCell(study, k) {
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

const SHOWN = 6, f = (x) => number(x, 4);

/** The largest products of two lists, the others in a line, the sum; `whole` is it if these are not all; `must` is always there. */
function products(caption, columns, names, left, right, whole = null, must = -1) {
  const each = Array.from(left, (x, i) => x * right[i]), total = whole ?? sum(each);
  const order = strongest(each, SHOWN, Math.abs), chosen = must < 0 || order.includes(must) ? order : [...order.slice(0, -1), must];
  const rest = total - sum(chosen.map((i) => each[i])), others = whole === null ? `the other ${each.length - chosen.length}` : "others";
  const cell = (i) => (i === must ? h("b", {}, f(each[i])) : f(each[i]));
  return table(caption, columns, [
    ...chosen.map((i) => [names(i), f(left[i]), f(right[i]), cell(i)]),
    ...(each.length > chosen.length || whole !== null ? [[others, "", "", f(rest)]] : []),
    h("tr", { class: "total" }, h("td", {}, "sum"), h("td"), h("td"), h("td", {}, f(total))),
  ], { class: "products" });
}

const step = (title, text, ...children) => h("li", {}, h("h3", {}, title), h("p", { class: "explain" }, text), children);
const line = (text) => h("div", { class: "formula" }, text);

export class NumberView {
  constructor(study) {
    this.study = study;
    this.lead = h("p", { class: "lead" });
    this.picker = h("select", { "aria-label": "key", onchange: (e) => study.set({ key: Number(e.target.value) }) });
    this.steps = h("ol", { class: "chain" });
    this.element = section("number", "Follow one number", badge(study), this.lead, h("label", { class: "follow" }, "the key to follow ", this.picker), this.steps);
  }

  draw() {
    const { study } = this, chosen = chosenHead(study);
    this.element.hidden = !chosen.opened;
    if (!chosen.opened) return;
    const { weights, title } = chosen, order = strongest(weights), key = study.view.key < 0 ? order[0] : clamp(study.view.key, weights.length);
    const name = study.keyName(key).text;
    this.lead.textContent = `${title}: from “${study.label}” to ${name}, every figure as it ran. Take a calculator and check any line; only rounding to four digits is between.`;
    this.picker.replaceChildren(...order.map((k, i) => h("option", { value: k }, `${study.keyName(k).text}${i === 0 ? " (strongest)" : ""}`)));
    this.picker.value = key;
    this.steps.replaceChildren(...this.score(chosen, key, name), ...this.value(chosen, key, name));
  }

  /** From q and k to the weight. */
  score({ opened, a, dots, mask, lse, scores, weights, q }, key, name) {
    const others = strongest(scores, 4), rest = sum(weights) - sum(others.map((k) => weights[k])), scaled = dots[key] * opened.scale;
    return [
      step("1. The query meets the key", `q·k: ${q.length} products, the strongest first.`, products("products of query and key", ["dimension", "q", "k", "q × k"], String, q, row(a.k, key))),
      step("2. Scale and mask", "The sum is made small, and a mask of minus infinity would hide the key.", line(`${f(dots[key])} × ${f(opened.scale)} = ${f(scaled)}\n${f(scaled)} + ${number(mask[key], 0)} = ${f(scores[key])}   the score`)),
      step("3. Softmax", `LSE is the logarithm of the sum of exp(score) over all ${scores.length} keys; exp(score − LSE) are weights that sum to 1.`,
        line(`exp( ${f(scores[key])} − ${f(lse)} ) = ${weights[key].toFixed(6)}   the weight of ${name}`),
        table("the largest weights", ["key", "score", "weight"], [...others.map((k) => [keyCell(this.study, k), f(scores[k]), weights[k].toFixed(6)]),
          ...(scores.length > others.length ? [[`the other ${scores.length - others.length}`, "", rest.toFixed(6)]] : []),
          h("tr", { class: "total" }, h("td", {}, "sum"), h("td"), h("td", {}, sum(weights).toFixed(6)))])),
    ];
  }

  /** From the weight to the logit. */
  value({ opened, a, t, weights, z, changed }, key, name) {
    const { study } = this, out = opened.out?.[t], projection = a.projection && row(a.projection, t);
    const at = strongest(projection ? z.map((x, i) => x * projection[i]) : z, 1, Math.abs)[0];
    const column = range(weights.length).map((k) => row(a.v, k)[at]), keys = (k) => study.keyName(k).text;
    const found = [step("4. Weight times value", `What the head reads, z, is the values of all keys by their weights. Here is its dimension ${at}; ${name} is in bold.`,
      products(`dimension ${at} of what was read`, ["key", "weight", "v", "weight × v"], keys, weights, column, null, key))];
    if (!projection) return found;
    found.push(step("5. Output projection", `Each dimension of the state gets a product with z from this head. Here is dimension ${out.dims[0]}, where it does most${changed}.`,
      products("one dimension of the output projection", ["dimension", "z", "W", "z × W"], String, z, projection)));
    if (!out.worth) return found;
    const made = study.data.attributions[t], label = study.label;
    found.push(step("6. To the logit", `What one unit in each dimension is worth to the logit of “${label}”, above the mean of the vocabulary: the last norm as it stood, times the word’s row of the head.`,
      products("from the state to the logit", ["dimension", "added", "worth", "added × worth"], (i) => String(out.dims[i]), out.values, out.worth, out.total)));
    const p = study.data.tokens[t].probability, all = sum([...Object.values(made.heads).flat(2), ...made.mlps, made.embedding, made.biases]);
    found.push(step("7. To the probability", "All heads, MLPs, the embedding and the biases together are the logit; the softmax over the vocabulary makes it a probability.",
      line(`${f(out.total)} + ${f(all - out.total)} of everything else = ${f(all)}   the logit of “${label}”\nexp( ${f(all)} − ${f(all - Math.log(p))} ) = ${f(p)}   its probability`)));
    return found;
  }
}
