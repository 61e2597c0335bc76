// One run: its answer to the question on the page, what was changed in it, and the study of that answer.
import { amount, h } from "../study/dom.js";
import { renderStudy } from "../study/study.js";
import { Changes } from "./changes.js";
import { Typed } from "./typed.js";
import { Refusal, json, lines, newest } from "./wire.js";

const REST = 150; // milliseconds without another question before the answer is studied
const SHOW = 200; // between two looks at the heads that were tried

export class Side {
  constructor(app, index) {
    Object.assign(this, { app, index, handle: null, answer: null, model: app.model(app.state.sides[index].model) });
    this.element = document.getElementById("side").content.firstElementChild.cloneNode(true);
    const part = (name) => this.element.querySelector(`.${name}`);
    this.parts = Object.fromEntries(["trouble", "truth", "unchanged", "said", "took", "studied"].map((name) => [name, part(name)]));
    part("name").textContent = this.model.id;
    part("lacks").textContent = this.model.lacks.length ? `This model: ${this.model.lacks.join("; ")}.` : "";
    this.element.dataset.index = index;
    this.element.setAttribute("aria-label", this.model.id);
    this.typed = new Typed(part("typed"), (position, id) => this.choose(position, id), (token) => { this.handle?.select({ token }); app.look({ token }, this); });
    this.changes = new Changes(app, this, part("changes"));
    this.asking = newest((signal) => this.work(signal));
    this.background = new AbortController();
  }

  get own() { return this.app.state.sides[this.index]; }

  /** Ask what the page asks now. A click ends what runs; while something is dragged, what runs may finish. */
  ask(dragged) {
    this.rest();
    if (!dragged) this.asking.stop();
    this.asking.start();
  }

  /** Stop what is done while nothing else is asked. */
  rest() { this.background.abort(); clearTimeout(this.later); }

  async attempt(work) {
    try {
      this.trouble("");
      await work();
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof Refusal)) throw error;
      this.trouble(error.message);
    }
  }

  trouble(text) { Object.assign(this.parts.trouble, { textContent: text, hidden: !text }); }

  work(signal) {
    return this.attempt(async () => {
      const body = this.app.body(this.index), began = performance.now();
      this.changes.list();
      this.typed.begin(this.model);
      let at = 0;
      for await (const line of lines("ask", body, signal)) {
        if (line.token) this.typed.token(line.token, at++ < body.start.length);
        else this.finish(line, body, performance.now() - began, at);
      }
      this.later = setTimeout(() => this.study(body), REST);
    });
  }

  finish(line, body, took, typed) {
    line.tokens.slice(typed).forEach((token) => this.typed.token(token, false)); // of a model that writes nothing word by word
    this.typed.end(line.ended);
    const { truth, unchanged, took: clock } = this.parts, right = this.model.asked === this.app.lead().asked && this.app.scene.truth(), answer = line.answer || "(nothing)", pair = this.model.measure === "similarity", sure = amount(line.probability, this.model.measure);
    clock.textContent = `Answered in ${Math.round(took)} ms.`;
    truth.textContent = [right ? `The data set says “${right}”` : null, ...line.notes].filter(Boolean).map((note) => `${note}. `).join("");
    unchanged.hidden = !line.plain;
    if (line.plain) {
      const other = line.plain.answer !== line.answer, before = amount(line.plain.probability, this.model.measure);
      unchanged.classList.toggle("differs", other);
      if (pair) unchanged.textContent = `Unchanged, the similarity is ${before}; with your changes ${sure}.`;
      else unchanged.replaceChildren(h("b", {}, other ? "Another answer. " : "The same answer. "), `Unchanged, the model says “${line.plain.answer || "(nothing)"}”, ${before}; with your changes “${answer}”, ${sure}.`);
    }
    this.saying = pair ? `The similarity is ${sure}.` : `The answer is ${answer}, ${sure}.${line.plain ? ` Unchanged: ${line.plain.answer}.` : ""}`;
    const found = pair ? sure : answer;
    this.app.tell("answered", { changed: this.answer !== null && found !== this.answer, edits: body.edits.length });
    this.answer = found;
  }

  study(body) {
    const { signal } = (this.background = new AbortController());
    this.parts.said.textContent = this.saying; // not while something is dragged
    return this.attempt(async () => {
      this.show(await json("study", body, signal));
      const rows = [];
      let total = 1, shown = performance.now();
      for await (const row of lines("heads", body, signal)) {
        if (row.name) rows.push(row);
        else ({ total } = row);
        if (performance.now() - shown < SHOW && rows.length < total) continue;
        shown = performance.now();
        this.handle.update({ matter: { rows, total, done: rows.length === total } });
      }
      this.app.tell("counted");
    });
  }

  show(data) {
    data.matter = { rows: [], total: null, done: false }; // they are tried at once
    this.changes.offer(this.model, data.sources);
    if (this.handle) this.handle.update(data);
    else this.handle = renderStudy(this.parts.studied, data, {
      view: this.app.state.view,
      select: (view) => this.app.look(view, this),
      edits: () => this.own.edits,
      knock: (edit) => this.changes.toggle(edit),
      needs: ({ name, head }) => json("number", { ...this.app.body(this.index), name, head }),
    });
    this.app.tell("studied");
  }

  /** Go on from this word at a position, or with null let the model choose there again. */
  choose(position, id) {
    const before = this.typed.tokens.slice(0, position).map((token) => token.id);
    this.own.start = id === null ? this.own.start.slice(0, position) : [...before, id];
    this.app.changed("chosen");
  }

  close() { this.rest(); this.asking.stop(); this.handle?.destroy(); }
}
