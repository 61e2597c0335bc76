// How the answer grows: the logit lens, what each part adds to a logit, and which expert took each token.
import { row, strongest, unpack } from "./arrays.js";
import { badge } from "./certificate.js";
import { diverging, shade } from "./colors.js";
import { h, number, percent, section, shown, sum, table } from "./dom.js";

export class LensView {
  constructor(study) {
    this.study = study;
    this.box = h("div", { class: "split" });
    this.element = section("lenses", "How the answer grows", badge(study),
      h("p", { class: "lead" }, "Left: what the model would say if it stopped after a layer (logit lens). Right: what each head adds to the token's logit, above the mean logit of the vocabulary; the parts sum to the logit exactly."), this.box);
  }

  draw() {
    const { study } = this, made = study.data.attributions[study.token];
    const right = made ? this.parts(made) : h("p", { class: "note" }, "What each head adds to the logit is not shown: the layers over the answers are not linear, so there is no one number for it.");
    this.box.replaceChildren(this.lens(), right);
  }

  lens() {
    const { data, token } = this.study, final = data.tokens[token].label;
    const lines = data.lens.map((layer, l) => [l === 0 ? "embedding" : `after layer ${l - 1}`, ...layer[token].slice(0, 4).map(([label, p]) => {
      const guess = h("span", { class: `guess${label === final ? " final" : ""}` }, shown(label), h("small", {}, percent(p)));
      shade(guess, p, 0.04);
      return guess;
    })]);
    return h("div", {}, h("h3", {}, `What each layer would say for “${final.trim()}”`), table("logit lens", [], lines, { class: "lens" }));
  }

  parts(a) {
    const { study } = this, final = study.data.tokens[study.token].label.trim(), writer = study.attentions.cross.names[0].split(".")[0];
    const kinds = Object.keys(a.heads).sort(); // cross before self
    const all = [...Object.values(a.heads).flat(2), ...a.mlps, a.embedding, a.biases], largest = Math.max(...all.map(Math.abs)), total = sum(all);
    const cell = (value, title, part) => h("td", {}, diverging(h(study.shared.hooks.knock ? "button" : "span", {
      class: `cell${study.edited(part) ? " off" : ""}`, title, type: study.shared.hooks.knock ? "button" : null, "aria-label": `${title}: ${number(value, 2)}`, ...study.shared.cuts(part),
    }, number(value, 2)), value, largest));
    const header = (kind) => h("tr", {}, h("th", { scope: "col" }, kind), a.heads[kind][0].map((_, n) => h("th", { scope: "col" }, `head ${n}`)), kind === kinds[0] ? h("th", { scope: "col" }, "MLP") : null);
    const rows = kinds.flatMap((kind) => [header(kind), ...a.heads[kind].map((values, l) => h("tr", {}, h("td", {}, `layer ${l}`),
      values.map((v, n) => cell(v, `${kind} layer ${l} head ${n}`, { kind: "head", name: `${writer}.${l}.${kind}`, head: n, scale: 0 })),
      kind === kinds[0] ? cell(a.mlps[l], `MLP of layer ${l}`, { kind: "layer", name: `${writer}.${l}.mlp` }) : null))]);
    return h("div", {}, h("h3", {}, `What wrote “${final}”: logit ${number(total, 2)} above the mean`), table("direct logit attribution", [], rows, { class: "parts" }),
      h("p", { class: "note" }, `embedding ${number(a.embedding, 2)}, biases ${number(a.biases, 2)}`));
  }
}

/** In each layer with experts, those that took each token. */
export function expertsView(study) {
  const { experts, read } = study.data;
  const chosen = (shares) => strongest(shares).filter((expert) => shares[expert] > 0).map((expert) => `${expert}: ${number(shares[expert], 2)}`).join("\n");
  const lines = experts.map(({ name, weights }) => {
    const taken = unpack(weights);
    return [`layer ${name.split(".")[1]}`, ...read.map((_, i) => h("td", { class: "words" }, chosen(row(taken, i))))];
  });
  const columns = [h("th", { "aria-label": "layer" }), ...read.map((label) => h("th", { scope: "col", class: "words" }, shown(label)))];
  return section("experts-of", "Which expert took each token", badge(study),
    h("p", { class: "lead" }, "In each layer with experts, a router chose some for each token that was read. These are their numbers, and the weights of what they said."),
    table("experts by layer and token", columns, lines, { class: "experts" }));
}
