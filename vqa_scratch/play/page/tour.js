// Eight steps for a first visitor, each with one thing to do; the page sees when it was done.
const CHANCE = ["heated", "#heat-row", "By chance", "At temperature 0 the likeliest word is written. Raise it, and words are drawn: another seed, another answer."];

/** The eight steps that a model can be taken through. */
const stepsOf = ({ asked, writes }) => [
  asked === "sound" ? ["picked", "#question-part", "A sound", "The model has never heard these voices. Click one of them, press “Speak”, or choose a file."]
    : ["picked", "#scenes", "A picture", "The model has never seen these scenes. Click one of the small pictures."],
  asked === "sound" || asked === "nothing" ? CHANCE
    : ["asked", "#question-part", asked === "text" ? "A text" : "A question", `Click one of the ${asked}s, or write your own and press Enter. ${writes ? "The answer appears word by word." : "The answer follows."}`],
  asked === "sound" ? ["answered", "#question-part", "Change the sound", "Click another voice, or say something yourself, until the answer changes.", (detail) => detail.changed]
    : ["answered", "#stage", "Change the picture", "Drag an object, give it another colour, or press “Empty scene” and draw one, until the answer changes.", (detail) => detail.changed],
  writes ? ["chosen", ".answer", "What it nearly said", "Below each word stand the other words it could have written, with their probabilities. Click one, and the model goes on from it."]
    : ["viewed", ".number", "Follow one number", "This model writes no words one by one. Choose another key here: each figure from q·k to what the head read is the one that ran.", (detail) => detail.key >= 0],
  ["viewed", ".studied", "Where it looked", `The map shows what the chosen word took from the ${asked === "sound" ? "sound" : "picture"}. Choose “Rollout”, or click one head, and compare.`],
  ["answered", ".changes", "Knock something out", "Press “Change a part”, or scroll down to the heads, turn on “✂ knock out by clicking” and click one. The unchanged answer stays beside the new one.", (detail) => detail.edits > 0],
  ["undone", ".changes", "Take it back", "Nothing is lost: click × at the change, or “Undo all”."],
  ["shared", "#share-part", "Pass it on", "Open “Share” and copy the link, or save the file, which also holds a picture or a sound of your own: whoever opens it with this run sees what you see."],
];

/** A tour in this box of a page whose first model `model()` says; the function it gives begins it. */
export function tour(box, model) {
  const part = (name) => box.querySelector(`.${name}`), done = new Set(), steps = () => stepsOf(model());
  let at = 0;
  const marked = () => document.querySelector(steps()[at][1]);
  function show() {
    const [, , title, text] = steps()[at], over = done.has(at);
    part("step").textContent = `Step ${at + 1} of ${steps().length}`;
    part("title").textContent = title;
    part("text").textContent = text;
    part("done").textContent = over ? (at + 1 < steps().length ? "Done." : "Done. That was the tour; all of it stays open to you.") : "";
    part("back").disabled = at === 0;
    part("next").textContent = at + 1 === steps().length ? "Finish" : over ? "Next" : "Skip";
    part("next").classList.toggle("go", over);
  }
  function go(to) {
    marked()?.classList.remove("toured");
    box.hidden = to < 0 || to >= steps().length;
    if (box.hidden) return;
    at = to;
    marked()?.classList.add("toured");
    marked()?.scrollIntoView({ block: "start" });
    show();
  }
  ["picked", "asked", "heated", "answered", "chosen", "viewed", "undone", "shared"].forEach((event) => document.addEventListener(`live-${event}`, ({ detail }) => {
    const [wanted, , , , test] = steps()[at];
    if (box.hidden || wanted !== event || (test && !test(detail))) return;
    done.add(at);
    show();
  }));
  document.addEventListener("live-studied", () => { if (!box.hidden) marked()?.classList.add("toured"); }); // it is drawn anew
  part("back").addEventListener("click", () => go(at - 1));
  part("next").addEventListener("click", () => go(at + 1));
  part("close").addEventListener("click", () => go(-1));
  return () => { done.clear(); go(0); part("next").focus(); };
}
