// The answer as it is decoded: a column a word, with its probability and what else could have stood there.
import { amount, h, meter, plain, shown } from "../study/dom.js";

export class Typed {
  /** `choose(position, id)` goes on from an alternative, or with null lets the model choose again; `select(position)` looks at a word. */
  constructor(box, choose, select) { Object.assign(this, { box, choose, select, columns: [], tokens: [], at: 0 }); }

  begin({ measure, writes }) { Object.assign(this, { tokens: [], measure, writes }); }

  /** The next word; a column that is there already is filled anew, so that dragging does not flicker. */
  token(token, forced) {
    const i = this.tokens.push(token) - 1;
    if (!this.columns[i]) this.columns.push(this.column(i));
    const { element, word, unpin, list, others } = this.columns[i];
    element.classList.toggle("forced", forced);
    element.classList.toggle("whole", token.label.trim().includes(" ")); // a text that is compared as one
    unpin.hidden = !forced;
    this.fill(word, token, forced ? ", chosen by you" : "");
    token.alternatives.forEach((other, n) => {
      if (!others[n]) {
        others.push(h("button", { class: "other", type: "button", onclick: () => this.choose(i, this.tokens[i].alternatives[n].id) }));
        list.append(h("li", {}, others[n]));
      }
      others[n].disabled = !this.writes; // what chooses its answer goes on from none
      this.fill(others[n], other, this.writes ? ": go on from it" : "");
      others[n].setAttribute("aria-pressed", String(other.id === token.id));
    });
    others.splice(token.alternatives.length).forEach((button) => button.parentElement.remove());
  }

  /** After the last word; `ended`: it is the one that ends the answer. */
  end(ended) {
    this.columns.forEach(({ element, word }, i) => {
      if (element.classList.toggle("ending", ended && i === this.tokens.length - 1)) this.fill(word, { ...this.tokens[i], label: "(end)" }, "");
    });
    this.columns.splice(this.tokens.length).forEach(({ element }) => element.remove());
    this.box.classList.toggle("many", this.tokens.length > 4); // then only the chosen word shows its alternatives
    this.mark(Math.min(this.at, this.tokens.length - 1));
  }

  mark(at) {
    this.at = Math.max(0, at);
    this.columns.forEach(({ word }, i) => word.setAttribute("aria-pressed", String(i === this.at)));
  }

  column(i) {
    const word = h("button", { class: "live-word", type: "button", onclick: () => { this.mark(i); this.select(i); } });
    const unpin = plain("×", () => this.choose(i, null), { class: "unpin", "aria-label": "let the model choose this word again" });
    const list = h("ol", { "aria-label": "what else could stand here" });
    const element = h("div", { class: "column" }, h("div", { class: "first" }, word, unpin), list);
    this.box.append(element);
    return { element, word, unpin, list, others: [] };
  }

  fill(button, { label, probability }, what) {
    const share = amount(probability, this.measure);
    button.replaceChildren(h("b", {}, shown(label)), meter(probability), h("small", {}, share));
    button.setAttribute("aria-label", `${shown(label)}, ${share}${what}`);
  }
}
