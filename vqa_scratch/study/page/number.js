// One number on its way, with the figures that ran: q·k, score, weight, value, output projection, logit, probability.
import { row, strongest } from "./arrays.js";
import { badge } from "./certificate.js";
import { clamp, h, number, range, section, sum, table } from "./dom.js";
import { chosenHead, keyCell } from "./steps.js";

const SHOWN = 6;
const f = (x) => number(x, 4);

/** The largest products of two lists as a table, the others as one line, and their sum. `names` says what stands in a row,
 * `whole` is the sum if these are only the largest; `must` is a row that is always there. */
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

const dimension = (i) => String(i);
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
      step("1. The query meets the key", `q·k: ${q.length} products, the strongest first.`, products("products of query and key", ["dimension", "q", "k", "q × k"], dimension, q, row(a.k, key))),
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
      products("one dimension of the output projection", ["dimension", "z", "W", "z × W"], dimension, z, projection)));
    if (!out.worth) return found;
    const made = study.data.attributions[t], label = study.label;
    found.push(step("6. To the logit", `What one unit in each dimension is worth to the logit of “${label}”, above the mean of the vocabulary: the last norm as it stood, times the word’s row of the head.`,
      products("from the state to the logit", ["dimension", "added", "worth", "added × worth"], (i) => dimension(out.dims[i]), out.values, out.worth, out.total)));
    const p = study.data.tokens[t].probability, all = sum([...Object.values(made.heads).flat(2), ...made.mlps, made.embedding, made.biases]);
    found.push(step("7. To the probability", "All heads, MLPs, the embedding and the biases together are the logit; the softmax over the vocabulary makes it a probability.",
      line(`${f(out.total)} + ${f(all - out.total)} of everything else = ${f(all)}   the logit of “${label}”\nexp( ${f(all)} − ${f(all - Math.log(p))} ) = ${f(p)}   its probability`)));
    return found;
  }
}
