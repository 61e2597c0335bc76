// What was changed in a run: a list to take things back from, and a form that makes every change by keyboard.
import { h, plain, range, shown } from "../study/dom.js";

const PARTS = { cross: "cross-attention", self: "self-attention", mlp: "MLP", gated: "gated MLP", z: "", resid_post: "state after it" };
const same = (a, b) => a.kind !== "patch" && ["kind", "name", "head", "source", "token", "key"].every((field) => a[field] === b[field]);

/** "decoder.3.cross" -> "decoder layer 3, cross-attention" */
function spoken(name) {
  const [room, layer, ...parts] = name.split(".");
  return [`${room} layer ${layer}`, ...parts.map((part) => PARTS[part] ?? part).filter(Boolean)].join(", ");
}

export class Changes {
  constructor(app, side, box) {
    Object.assign(this, { app, side, sources: [], offered: "" });
    [this.shown, this.none, this.undo, this.form, this.which, this.head, this.how] = ["list", "none", "undo", "make", "which", "head", "how"].map((name) => box.querySelector(`.${name}`));
    this.undo.addEventListener("click", () => this.set([], "undone"));
    this.form.addEventListener("submit", (event) => { event.preventDefault(); this.add(this.made()); });
    this.form.addEventListener("change", () => this.fit());
  }

  get edits() { return this.side.own.edits; }

  set(edits, what) { this.side.own.edits = edits; this.app.changed(what); }

  add(edit, what = "changed") { if (edit) this.set([...this.edits.filter((other) => !same(other, edit)), edit], what); }

  /** Make a change, or take it back if it is made; a head that is scaled anew stays changed. */
  toggle(edit) {
    const made = this.edits.find((other) => same(other, edit));
    if (made && (edit.scale === undefined || edit.scale === 1 || edit.scale === made.scale)) this.set(this.edits.filter((other) => other !== made), "undone");
    else if (edit.scale !== 1) this.add(edit);
  }

  list() {
    const { edits } = this;
    this.none.hidden = edits.length > 0;
    this.undo.hidden = !edits.length;
    const now = JSON.stringify([edits.map(({ scale, ...rest }) => rest), this.offered]); // a slider in use stays where it is
    if (now === this.listed) return;
    this.listed = now;
    this.shown.replaceChildren(...edits.map((edit, i) => {
      const text = this.describe(edit), back = plain("×", () => this.set(this.edits.filter((_, n) => n !== i), "undone"), { "aria-label": `take back: ${text}` });
      return h("li", {}, h("span", {}, text), edit.kind === "head" ? this.slider(edit, i) : null, back);
    }));
  }

  slider(edit, i) {
    const value = h("output", {}, `× ${edit.scale}`);
    const oninput = ({ target }) => {
      value.textContent = `× ${target.value}`;
      this.side.own.edits = this.edits.map((other, n) => (n === i ? { ...other, scale: Number(target.value) } : other));
      this.app.changed("scaled", true);
    };
    return h("label", { class: "scale" }, h("input", { type: "range", min: 0, max: 2, step: 0.1, value: edit.scale, "aria-label": `scale of ${this.describe(edit)}`, oninput }), value);
  }

  describe(edit) {
    const head = edit.head === null || edit.head === undefined ? "" : `, head ${edit.head}`;
    if (edit.kind === "head") return `${spoken(edit.name)}${head}`;
    if (edit.kind === "layer") return `${spoken(edit.name)}: knocked out`;
    if (edit.kind === "patch") return `${spoken(edit.name)}${head}: as in ${this.app.scene.name(edit.from.picture)}${edit.from.question ? `, “${edit.from.question}”` : ""}`;
    const label = this.sources.find(({ name }) => name === edit.source)?.labels[edit.token];
    return edit.kind === "key" ? `key ${edit.key}: knocked out` : `${edit.source} ${label === undefined ? edit.token : `“${shown(label)}”`}: knocked out`;
  }

  /** What this model has to be changed, and this study. */
  offer(model, sources) {
    const offered = JSON.stringify([model.id, sources.map(({ name, labels }) => [name, labels])]);
    if (offered === this.offered) return;
    Object.assign(this, { offered, sources, heads: Object.fromEntries(model.attentions.map(({ name, heads }) => [name, heads])) });
    const group = (label, items) => h("optgroup", { label }, items.map(([value, text]) => h("option", { value: JSON.stringify(value) }, text)));
    const layers = [...new Set(model.mlps.map((name) => name.split(".").slice(0, 2).join(".")))];
    const reading = [...model.attentions].sort((a, b) => Number(b.reads) - Number(a.reads));
    this.which.replaceChildren(
      group("Attention", reading.map(({ name }) => [{ kind: "layer", name }, spoken(name)])),
      group("MLP", model.mlps.map((name) => [{ kind: "layer", name }, spoken(name)])),
      group("State, to be borrowed", layers.map((layer) => [{ kind: "patch", name: `${layer}.resid_post` }, spoken(`${layer}.resid_post`)])),
      ...sources.map(({ name, labels }) => group(`Token of the ${name}`, labels.map((label, token) => [{ kind: "source", source: name, token }, `${shown(label)} (${token})`]))));
    this.fit();
    this.list();
  }

  /** The choices that go with the part that is chosen. */
  fit() {
    if (!this.which.value) return;
    const { kind, name } = JSON.parse(this.which.value), heads = this.heads[name] ?? 0, { head, how } = this, before = how.value;
    head.hidden = !heads;
    if (head.length !== heads + 1) head.replaceChildren(h("option", { value: "" }, "all heads"), ...range(heads).map((n) => h("option", { value: n }, `head ${n}`)));
    this.inputs = this.app.scene.inputs(); // as they are numbered in the list
    const borrowed = this.inputs.map(([label], i) => h("option", { value: i, disabled: kind !== "patch" && !heads }, `borrow from ${label}`));
    how.replaceChildren(h("option", { value: "", disabled: kind === "patch" }, "knock out"), ...borrowed);
    how.value = [...how.options].find((option) => option.value === before && !option.disabled)?.value ?? (kind === "patch" ? "0" : "");
  }

  /** The change that the form describes; with `from`, one that borrows from that input. */
  made(from) {
    if (!this.which.value) return null;
    const part = JSON.parse(this.which.value), head = this.head.hidden || this.head.value === "" ? null : Number(this.head.value);
    const given = from ?? (this.how.value === "" ? null : this.inputs[Number(this.how.value)][1]);
    if (!given) return head === null ? part : { kind: "head", name: part.name, head, scale: 0 };
    if (part.kind === "patch") return { ...part, head: null, from: given };
    const attention = this.heads[part.name] ? part.name : Object.keys(this.heads).at(-1); // of a word nothing is borrowed
    return { kind: "patch", name: `${attention}.z`, head, from: given };
  }
}
