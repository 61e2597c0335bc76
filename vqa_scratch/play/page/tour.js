// Eight steps for a first visitor, each with one thing to do; the page sees when it was done.
const STEPS = [
  ["picked", "#scene-part", "A picture", "The model has never seen these scenes. Click one of the small pictures."],
  ["asked", "#question-part", "A question", "Click one of the questions, or write your own and press Enter. The answer appears word by word."],
  ["answered", "#stage", "Change the picture", "Drag an object, or give it another colour, until the answer changes.", (detail) => detail.changed],
  ["chosen", ".answer", "What it nearly said", "Below each word stand the other words it could have written, with their probabilities. Click one, and the model goes on from it."],
  ["viewed", ".studied", "Where it looked", "The overlay shows what the chosen word took from the picture. Choose “Rollout”, or click one head, and compare."],
  ["answered", ".changes", "Knock something out", "Press “Change a part”, or scroll down to the heads, turn on “✂ knock out by clicking” and click one. The unchanged answer stays beside the new one.", (detail) => detail.edits > 0],
  ["undone", ".changes", "Take it back", "Nothing is lost: click × at the change, or “Undo all”."],
  ["shared", "#share-part", "Pass it on", "Open “Share” and copy the link: whoever opens it with this run sees what you see."],
];

export function tour(box) {
  const part = (name) => box.querySelector(`.${name}`);
  const done = new Set();
  let at = 0;
  const marked = () => document.querySelector(STEPS[at][1]);
  function show() {
    const [, , title, text] = STEPS[at], over = done.has(at);
    part("step").textContent = `Step ${at + 1} of ${STEPS.length}`;
    part("title").textContent = title;
    part("text").textContent = text;
    part("done").textContent = over ? (at + 1 < STEPS.length ? "Done." : "Done. That was the tour; all of it stays open to you.") : "";
    part("back").disabled = at === 0;
    part("next").textContent = at + 1 === STEPS.length ? "Finish" : over ? "Next" : "Skip";
    part("next").classList.toggle("go", over);
  }
  function go(to) {
    marked()?.classList.remove("toured");
    box.hidden = to < 0 || to >= STEPS.length;
    if (box.hidden) return;
    at = to;
    marked()?.classList.add("toured");
    marked()?.scrollIntoView({ block: "nearest" });
    show();
  }
  STEPS.forEach(([event, , , , test], step) => document.addEventListener(`live-${event}`, ({ detail }) => {
    if (box.hidden || step !== at || (test && !test(detail))) return;
    done.add(step);
    show();
  }));
  part("back").addEventListener("click", () => go(at - 1));
  part("next").addEventListener("click", () => go(at + 1));
  part("close").addEventListener("click", () => go(-1));
  return () => { done.clear(); go(0); part("next").focus(); };
}
