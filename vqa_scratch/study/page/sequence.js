// The sequence as the model has it: what is read, in its order, coloured by where each token is from.
import { row, unpack } from "./arrays.js";
import { badge } from "./certificate.js";
import { shade } from "./colors.js";
import { h, percent, roving, section, shown, sum, tabTo } from "./dom.js";
import { patchImage } from "./picture.js";

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
    const dots = [...origins].map(([name, meaning]) => { const dot = h("i"); dot.style.background = `var(--${name})`; return h("span", {}, dot, meaning); });
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
