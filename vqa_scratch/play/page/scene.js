// What the model looks at: a scene of the test set, a picture of the visitor's, or one that is drawn here; and examples of questions.
import { h } from "../study/dom.js";
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
    const { state } = this.app, { asked, id } = this.app.lead(), of = (which) => json(`scenes?model=${encodeURIComponent(id)}&${which}`);
    const scenes = await of(`n=12&seed=${this.seed}`);
    if (this.app.lead().id !== id) return; // another run was chosen meanwhile
    (this.scenes = scenes).forEach((scene) => this.known.set(scene.id, scene));
    const { scene: linked } = state.picture ?? {}; // by a link, it may be any
    if (linked && !this.known.has(linked)) (await of(`id=${encodeURIComponent(linked)}`).catch(() => [])).forEach((scene) => this.known.set(scene.id, scene));
    this.list("scenes", (asked === "sound" ? [] : this.scenes).map((scene) => [
      h("img", { src: scene.image, alt: this.name({ scene: scene.id }), draggable: "false" }), () => this.choose(this.of(scene)), () => ({ picture: { scene: scene.id }, question: this.app.state.question }), "scene"]));
    $("more").hidden = !this.scenes.length;
    const fullest = [...this.scenes].sort((a, b) => b.objects?.length - a.objects?.length)[0];
    if (!state.picture) Object.assign(state, fullest ? this.of(fullest) : { picture: asked === "sound" ? null : { objects: [] } });
    this.show();
  }

  /** Buttons, each [inside, what a click does, what a run borrows on which it is dropped, class]. */
  list(id, items) {
    $(id).replaceChildren(...items.map(([inside, onclick, input, kind = "plain"]) => h("li", {}, h("button", { class: kind, type: "button", draggable: "true", onclick, ondragstart: (event) => {
      event.dataTransfer.setData("text/plain", "");
      this.app.carried = input();
      document.body.classList.add("carrying");
    } }, inside))));
  }

  /** A scene or a sound and, unless the visitor has one already, a question about it. */
  of({ id, sound, questions }) {
    const { typed, state } = this.app;
    return { picture: sound ? { sound } : { scene: id }, question: typed ? state.question : (questions[0]?.question ?? state.question) };
  }

  /** The same for a run that numbers other scenes. */
  shown(picture) { return picture.scene ? { data: this.known.get(picture.scene)?.image } : picture; }

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
    const { picture } = this.app.state, model = this.app.lead();
    $("examples").hidden = model.asked === "nothing";
    if (model.asked === "sound") { this.hear(picture); return; }
    const scene = this.known.get(picture.scene), objects = picture.objects ?? scene?.objects ?? [];
    const drawn = Boolean(picture.objects || objects.length) && this.editor.knows(objects);
    $("canvas").toggleAttribute("hidden", !drawn);
    $("tools").hidden = !drawn;
    $("picture").hidden = drawn;
    if (drawn) this.editor.show(objects);
    else $("picture").src = picture.data ?? scene?.image ?? "";
    this.note(drawn ? "Drag an object, or choose one and use the arrow keys." : "");
    this.press();
    const asked = scene?.questions.map(({ question }) => question).filter(Boolean) ?? [];
    this.questions = (asked.length ? asked : model.questions).slice(0, 6);
    this.list("examples", this.questions.map((question) => [question, () => this.app.ask(question), () => ({ picture: this.app.state.picture, question })]));
  }

  /** A sound, and others of voices that training never heard. */
  hear(picture) {
    this.questions = [];
    this.list("examples", this.scenes.map((scene) => [this.name(this.of(scene).picture), () => this.choose(this.of(scene)), () => this.of(scene)]));
    $("examples").querySelectorAll("button").forEach((button, i) => button.setAttribute("aria-pressed", String(this.scenes[i].sound === picture?.sound)));
    $("player").hidden = $("sides").hidden = !picture;
    if (picture) $("player").src = picture.sound;
    else $("heard").textContent = "Nothing is heard yet: speak, or choose a sound file.";
  }

  /** Which of the small pictures is shown large. */
  press() { $("scenes").querySelectorAll("button").forEach((button, i) => button.setAttribute("aria-pressed", String(this.scenes[i].id === this.app.state.picture.scene))); }

  /** The annotated answer, where the question is one of the scene's own; else null. */
  truth() {
    const { picture, question } = this.app.state, scene = this.known.get(picture.scene) ?? this.scenes.find(({ sound }) => sound && sound === picture.sound);
    return scene?.questions.find((asked) => scene.sound || asked.question === question)?.answer ?? null;
  }

  /** [what it is called, {picture, question}] of everything that a run can borrow from. */
  inputs() {
    const { picture, question } = this.app.state;
    const scenes = this.scenes.map((scene) => this.of(scene)).map((made) => [this.name(made.picture), { ...made, question }]);
    return [...scenes, ...this.questions.map((other) => [`“${other}”`, { picture, question: other }])];
  }

  name({ scene, sound }) {
    const voice = this.scenes.findIndex((one) => sound && one.sound === sound);
    if (scene === undefined) return voice < 0 ? `this ${sound ? "sound" : "picture"}` : `unseen voice ${voice + 1}`;
    const things = this.known.get(scene)?.objects.map(({ size, color, shape }) => `${size} ${color} ${shape}`) ?? [], at = this.scenes.findIndex(({ id }) => id === scene);
    return `scene ${at < 0 ? scene : at + 1}${things.length ? `: ${things.join(", ")}` : ""}`;
  }
}
