// The live page: holds what is shown in one state, and asks again when it changes.
import { themed } from "../study/colors.js";
import { h } from "../study/dom.js";
import { Scene } from "./scene.js";
import { share } from "./share.js";
import { Side } from "./side.js";
import { record, url, wav } from "./sound.js";
import { followed, hash } from "./state.js";
import { tour } from "./tour.js";
import { watch } from "./training.js";
import { json, server } from "./wire.js";

const $ = (id) => document.getElementById(id);
const say = (text) => { $("notice").textContent = text; $("notice").hidden = !text; };
const blank = (model) => ({ model, edits: [], start: [] });

const app = {
  models: [], sides: [], state: null, scene: null,
  carried: null, // {picture, question} of what is being dragged
  typed: false, // whether the question is the visitor's own, not the scene's
  model: (id) => app.models.find((model) => model.id === id),
  tell: (name, detail = {}) => document.dispatchEvent(new CustomEvent(`live-${name}`, { detail })), // the tour listens, and the tests

  /** The model whose scenes are on the page: the first that is asked something. */
  lead() {
    const models = app.state.sides.map(({ model }) => app.model(model));
    return models.find(({ asked }) => asked !== "nothing") ?? models[0];
  },

  /** What the server is asked for one side: only what its model takes; and of a scene the picture, since another run numbers its own. */
  body(index) {
    const { sides, view, ...state } = app.state, side = sides[index], model = app.model(side.model);
    const taken = ({ picture, question }) => ({ picture: model.scenes === app.lead().scenes ? picture : app.scene.shown(picture), question: model.asked === "nothing" ? null : question });
    const edits = side.edits.map((edit) => (edit.from ? { ...edit, from: taken(edit.from) } : edit));
    return { ...state, ...side, ...taken(state), edits, temperature: model.writes ? state.temperature : 0 };
  },

  /** A question of the visitor's own. */
  ask(question) { app.typed = true; app.changed("asked", false, { question }); },

  /** Something of the state is new, and all runs are asked again. `dragged`: more of it will come at once. */
  changed(what, dragged = false, fields = {}) {
    Object.assign(app.state, fields);
    if ("picture" in fields || "question" in fields) app.state.sides.forEach((side) => { side.start = []; });
    if (fields.question !== undefined) $("question").value = fields.question;
    app.write();
    app.tell(what);
    if (app.state.picture) app.sides.forEach((side) => side.ask(dragged));
  },

  /** Another part of the studies is looked at, in all of them. */
  look(view, from) {
    app.state.view = { ...app.state.view, ...view };
    app.sides.filter((side) => side !== from).forEach((side) => side.handle?.select(view));
    app.write();
    app.tell("viewed", view);
  },

  write() {
    clearTimeout(app.writing);
    app.writing = app.state.picture && setTimeout(() => history.replaceState(null, "", hash(app.state) ?? location.pathname + location.search), 300);
  },
};

/** Puts a state on the page, or says why not. */
async function restore({ state, problem }) {
  const strange = state?.sides.find(({ model }) => !app.model(model));
  if (state && !strange) Object.assign(app, { state, typed: true });
  await sides();
  if (strange) say(`It is about the run “${strange.model}”, which is not open here.`);
  if (problem) say(problem);
}

/** As many sides as the state has, and the controls as it says. */
async function arrange() {
  say("");
  app.sides.forEach((side) => side.close());
  app.sides = app.state.sides.map((_, i) => new Side(app, i));
  $("sides").replaceChildren(...app.sides.map((side) => side.element));
  $("sides").classList.toggle("two", app.sides.length > 1);
  app.scene.known.clear();
  await app.scene.load();
  app.state.question ||= app.lead().questions[0] ?? "";
  const { sides: [first, second], question, temperature, seed } = app.state, models = app.sides.map((side) => side.model), { asked } = app.lead(), aloud = asked === "sound";
  [$("model").value, $("beside").value] = [first.model, second?.model ?? ""];
  [...$("beside").options].forEach((option) => { option.disabled = Boolean(option.value) && (app.model(option.value).asked === "sound") !== aloud; });
  [$("question").value, $("temperature").value, $("heat").textContent, $("seed").value] = [question, temperature, temperature, seed];
  $("question-label").textContent = { text: "Text", sound: "Sound", nothing: "Chance" }[asked] ?? "Question";
  $("scene-part").hidden = aloud; // then the sound stands where a picture does
  $("words").hidden = aloud || asked === "nothing";
  $("voice").hidden = !aloud && (!models[0].voice || asked === "nothing");
  $("heat-row").hidden = !models.some((model) => model.writes);
  app.watching?.abort();
  app.watching = new AbortController();
  $("training").hidden = true;
  app.changed("opened");
  const training = models.find((model) => model.training);
  if (training) watch(app, training, $("training"), app.watching.signal);
}

app.attempt = (work) => work().catch((error) => say(error.message));
const sides = () => app.attempt(arrange);

/** Other runs on the sides. If another one leads, its scenes have other numbers, or it hears. */
function runs(chosen) {
  const before = app.lead(), { picture } = app.state;
  app.state.sides = chosen;
  if (app.lead() !== before && (picture?.scene || Boolean(picture?.sound) !== (app.lead().asked === "sound"))) app.state.picture = null;
  sides();
}

/** Asks what was said, or of a model that hears, what it hears; what is wrong stands beside it. */
async function hear(blob) {
  const aloud = app.lead().asked === "sound", send = async (sound) => (aloud ? { sound: await url(sound) } : json("voice", sound));
  $("heard").textContent = "Listening …";
  const { text, sound, problem } = await wav(blob).then(send).catch(({ message }) => ({ problem: message }));
  $("heard").textContent = problem ?? (sound ? "" : `Heard: “${text}”`);
  if (sound) app.scene.choose({ picture: { sound } });
  else if (!problem) app.ask(text);
}

function controls() {
  $("asked").addEventListener("submit", (event) => { event.preventDefault(); app.ask($("question").value); });
  $("temperature").addEventListener("input", () => { $("heat").textContent = $("temperature").value; app.changed("heated", true, { temperature: Number($("temperature").value) }); });
  $("seed").addEventListener("change", () => app.changed("seeded", false, { seed: Math.abs(Math.trunc(Number($("seed").value))) % 2 ** 31 }));
  $("model").addEventListener("change", () => {
    const hears = (model) => app.model(model).asked === "sound", made = $("model").value;
    runs([blank(made), ...app.state.sides.slice(1).filter(({ model }) => hears(model) === hears(made))]);
  });
  $("beside").addEventListener("change", () => runs([app.state.sides[0], ...($("beside").value ? [blank($("beside").value)] : [])]));
  let stop = null;
  $("record").addEventListener("click", async () => {
    const ending = stop;
    stop = ending ? null : await record().catch((error) => { $("heard").textContent = error.message; return null; });
    $("record").textContent = stop ? "Stop" : "Speak";
    $("record").setAttribute("aria-pressed", String(Boolean(stop)));
    if (ending) hear(await ending());
  });
  $("sound").addEventListener("change", () => { if ($("sound").files[0]) hear($("sound").files[0]); $("sound").value = ""; });
  themed($("theme"), () => app.sides.forEach((side) => side.handle?.update({})));
  server.addEventListener("lost", () => say("The server does not answer. This page asks again every second."));
  server.addEventListener("found", () => (app.state ? sides() : app.attempt(start)));
  addEventListener("hashchange", () => restore(followed(location.hash)));
  $("start-tour").addEventListener("click", tour($("tour"), () => app.sides[0].model));
  share(app, $("share-part"), restore);
}

async function start() {
  const [models, shapes] = await Promise.all([json("models"), json("shapes")]);
  app.models = models;
  for (const name of ["model", "beside"]) $(name).append(...models.map(({ id }) => h("option", { value: id }, id)));
  app.scene = new Scene(app, shapes);
  app.state = { picture: null, question: models[0].questions[0] ?? "", temperature: 0, seed: 0, sides: [blank(models[0].id)], view: null };
  await (location.hash.length > 1 ? restore(followed(location.hash)) : sides());
  document.querySelectorAll("[inert]").forEach((part) => { part.inert = false; }); // no control has a state to change before
}

controls();
app.attempt(start);
