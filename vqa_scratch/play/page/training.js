// Curves of a run that is still training, as they grow.
import { h } from "../study/dom.js";
import { svg } from "./editor.js";
import { json } from "./wire.js";

const PAUSE = 2000; // milliseconds between two looks at its log
const [WIDTH, HEIGHT, LEFT, BELOW] = [480, 230, 52, 40];

/** Round numbers from `low` to `high`, about five of them. */
function ticks(low, high) {
  const rough = (high - low) / 5 || 1, power = 10 ** Math.floor(Math.log10(rough)), step = power * [1, 2, 5, 10].find((n) => n * power >= rough), found = [];
  for (let at = Math.ceil(low / step); at * step <= high + step / 1e6; at += 1) found.push(Number((at * step).toPrecision(12)));
  return found;
}

/** One panel: lines over the step, {label: [[step, value], ...]}, with the unit of both axes. */
function plot(title, unit, lines, range) {
  const points = Object.values(lines).flat(), last = Math.max(1, ...points.map(([x]) => x));
  const [low, high] = range ?? [0, Math.max(1e-9, ...points.map(([, y]) => y))];
  const x = (step) => LEFT + (step / last) * (WIDTH - LEFT - 12), y = (value) => HEIGHT - BELOW - ((value - low) / (high - low)) * (HEIGHT - BELOW - 12);
  const said = Object.entries(lines).map(([label, at]) => `${label} ${at.length ? at.at(-1)[1].toPrecision(3) : "none yet"}`).join(", ");
  const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title} over ${last} steps: ${said}` });
  const put = (tag, attributes, text = "") => root.append(svg(tag, attributes, text));
  for (const at of ticks(low, high)) {
    put("line", { x1: LEFT, x2: WIDTH - 12, y1: y(at), y2: y(at), class: "gridline" });
    put("text", { x: LEFT - 6, y: y(at) + 4, "text-anchor": "end" }, String(at));
  }
  for (const at of ticks(0, last)) put("text", { x: x(at), y: HEIGHT - BELOW + 17, "text-anchor": "middle" }, String(at));
  put("text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, "step");
  put("text", { transform: `translate(12 ${(HEIGHT - BELOW) / 2}) rotate(-90)`, "text-anchor": "middle" }, unit);
  Object.values(lines).forEach((at, n) => put("polyline", { points: at.map(([step, value]) => `${x(step)},${y(value)}`).join(" "), class: `line line-${n}` }));
  const legend = Object.keys(lines).map((label, n) => h("span", { class: `key key-${n}` }, label));
  return h("figure", {}, h("figcaption", {}, h("b", {}, title), legend), root);
}

/** Watches the run of a model as long as it trains; `stop` is a signal that ends it. */
export async function watch(app, { id, loss_unit: unit }, box, stop) {
  const rows = [], of = (value) => rows.filter((row) => Number.isFinite(value(row))).map((row) => [row.step, value(row)]);
  for (let loaded = null, running = true; running && !stop.aborted;) {
    try {
      const made = await json(`training?model=${encodeURIComponent(id)}&after=${rows.length}`, undefined, stop);
      rows.push(...made.rows);
      ({ running } = made);
      box.hidden = false;
      box.querySelector(".state").textContent = `${running ? "Training" : "Training has ended"}: step ${rows.at(-1)?.step ?? 0}. Answers come from the checkpoint of step ${made.step}.`;
      if (made.rows.length) {
        const accuracy = { "training, tokens": of((row) => row.token_accuracy), validation: of((row) => row.val?.accuracy) };
        box.querySelector(".plots").replaceChildren(plot("Loss", unit ?? "loss", { training: of((row) => row.loss) }), plot("Accuracy", "share right", accuracy, [0, 1]));
      }
      if (loaded !== null && made.loaded !== loaded) app.changed("trained");
      ({ loaded } = made);
    } catch (error) {
      if (error.name === "AbortError") return;
      box.querySelector(".state").textContent = error.message;
    }
    await new Promise((go) => setTimeout(go, PAUSE));
  }
}
