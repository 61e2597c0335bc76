// What the model looks at: a scene of the test set, a picture of the visitor's, or one that is drawn here; and examples of questions.
import { h, plain } from "../study/dom.js";
import { Editor } from "./editor.js";
import { json } from "./wire.js";

const LARGEST = 1024; // pixels a side of a visitor's picture; models see fewer
const $ = (id) => document.getElementById(id);

export class Scene {
  constructor(app, shapes) {
    Object.assign(this, { app, scenes: [], questions: [], known: new Map(), seed: 0 });
    this.editor = new Editor($("canvas"), $("tools"), shapes, (objects) => {
      app.changed("moved", true, { picture: { objects: objects.map((thing) => ({ ...thing })) } });
      this.press();
    });
    $("more").addEventListener("click", () => { this.seed += 1; app.attempt(() => this.load()); });
    $("blank").addEventListener("click", () => { app.state.picture = { objects: [] }; this.show(); this.editor.add(); });
    $("file").addEventListener("change", ({ target }) => { this.upload(target.files[0]); target.value = ""; });
    addEventListener("paste", (event) => this.upload([...event.clipboardData.files].find((file) => file.type.startsWith("image/"))));
    addEventListener("dragover", (event) => { if (event.dataTransfer.types.includes("Files") || app.carried) event.preventDefault(); });
    addEventListener("drop", (event) => {
      const [file] = event.dataTransfer.files, on = event.target.closest?.(".changes, #stage, #asked");
      if (!file && !(app.carried && on)) return;
      event.preventDefault();
      const { changes } = app.sides[Number(on?.closest(".side")?.dataset.index ?? 0)];
      if (file) this.upload(file);
      else changes.add(changes.made(app.carried), "borrowed");
    });
    addEventListener("dragend", () => { app.carried = null; document.body.classList.remove("carrying"); });
  }

  /** Scenes of the run's own test set; if nothing is shown yet, the one with most objects, or an empty drawing. */
  async load() {
    const { state } = this.app;
    this.scenes = await json(`scenes?model=${encodeURIComponent(state.sides[0].model)}&n=12&seed=${this.seed}`);
    this.scenes.forEach((scene) => this.known.set(scene.id, scene));
    $("scenes").replaceChildren(...this.scenes.map((scene) => {
      const picture = h("img", { src: scene.image, alt: this.name({ scene: scene.id }), draggable: "false" });
      const pick = h("button", { type: "button", class: "scene", draggable: "true", onclick: () => this.choose(this.of(scene)) }, picture);
      this.carries(pick, () => ({ picture: { scene: scene.id }, question: this.app.state.question }));
      return h("li", {}, pick);
    }));
    $("more").hidden = !this.scenes.length;
    const fullest = [...this.scenes].sort((a, b) => b.objects.length - a.objects.length)[0];
    if (this.app.model(state.sides[0].model).asked === "sound") return;
    if (!state.picture || state.picture.sound) Object.assign(state, fullest ? this.of(fullest) : { picture: { objects: [] } });
    this.show();
  }

  /** What is dragged from here can be dropped on a run, which then borrows from it. */
  carries(element, input) {
    element.addEventListener("dragstart", (event) => {
      event.dataTransfer.setData("text/plain", "");
      this.app.carried = input();
      document.body.classList.add("carrying");
    });
  }

  /** A scene and, unless the visitor has one already, a question about it. */
  of({ id, questions }) {
    const { typed, state } = this.app;
    return { picture: { scene: id }, question: typed ? state.question : (questions[0]?.question ?? state.question) };
  }

  choose(fields) { this.app.changed("picked", false, fields); this.show(); }

  async upload(file) {
    if (!file) return;
    const name = file.name || "the pasted picture", bitmap = await createImageBitmap(file).catch(() => null);
    if (!bitmap) { this.note(`${name} is no picture that this browser reads.`); return; }
    const scale = Math.min(1, LARGEST / Math.max(bitmap.width, bitmap.height)), [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
    const canvas = h("canvas", { width, height });
    canvas.getContext("2d").drawImage(bitmap, 0, 0, width, height);
    this.choose({ picture: { data: width * height > 2 ** 18 ? canvas.toDataURL("image/jpeg", 0.92) : canvas.toDataURL("image/png") } });
    this.note(`${name}${scale < 1 ? `, scaled to ${width} × ${height} pixels` : ""}`);
  }

  note(text) { $("scene-note").textContent = text; }

  /** The picture of the state, in the editor if it is drawn. */
  show() {
    const { picture } = this.app.state, scene = this.known.get(picture.scene), objects = picture.objects ?? scene?.objects ?? [];
    const drawn = Boolean(picture.objects || objects.length) && this.editor.knows(objects);
    $("canvas").toggleAttribute("hidden", !drawn);
    $("tools").hidden = !drawn;
    $("picture").hidden = drawn;
    if (drawn) this.editor.show(objects);
    else $("picture").src = picture.data ?? scene?.image ?? "";
    this.note(drawn ? "Drag an object, or choose one and use the arrow keys." : "");
    this.press();
    const asked = scene?.questions.map(({ question }) => question).filter(Boolean) ?? [];
    this.questions = (asked.length ? asked : this.app.model(this.app.state.sides[0].model).questions).slice(0, 6);
    $("examples").replaceChildren(...this.questions.map((question) => {
      const ask = plain(question, () => this.app.ask(question), { draggable: "true" });
      this.carries(ask, () => ({ picture: this.app.state.picture, question }));
      return h("li", {}, ask);
    }));
  }

  /** Which of the small pictures is shown large. */
  press() { $("scenes").querySelectorAll("button").forEach((button, i) => button.setAttribute("aria-pressed", String(this.scenes[i].id === this.app.state.picture.scene))); }

  /** The picture as the server has it; for a link to a scene that is not among those here. */
  reveal(image) { if (!$("picture").hidden && !$("picture").getAttribute("src") && image) $("picture").src = image; }

  /** The annotated answer, where the question is one of the scene's own; else null. */
  truth() {
    const { picture, question } = this.app.state;
    return this.known.get(picture.scene)?.questions.find((asked) => asked.question === question)?.answer ?? null;
  }

  /** [what it is called, {picture, question}] of everything that a run can borrow from. */
  inputs() {
    const { picture, question } = this.app.state;
    const scenes = this.scenes.map(({ id }) => [this.name({ scene: id }), { picture: { scene: id }, question }]);
    return [...scenes, ...this.questions.map((other) => [`“${other}”`, { picture, question: other }])];
  }

  name({ scene }) {
    if (scene === undefined) return "this picture";
    const things = this.known.get(scene)?.objects.map(({ size, color, shape }) => `${size} ${color} ${shape}`) ?? [], at = this.scenes.findIndex(({ id }) => id === scene);
    return `scene ${at < 0 ? scene : at + 1}${things.length ? `: ${things.join(", ")}` : ""}`;
  }
}
