// Elements and numbers in words. All text goes in as text; nothing is ever parsed as markup.
import { GLOSSARY } from "./words.js";

export const sum = (values) => values.reduce((a, b) => a + b, 0);
export const range = (n) => Array.from({ length: n }, (_, i) => i);
export const percent = (share) => (share >= 0.0995 ? Math.round(100 * share) : (100 * share).toFixed(1).replace("-", "−")) + " %";
export const number = (x, digits = 3) => (Math.abs(x) > 1e20 ? "−∞" : x.toFixed(digits).replace("-", "−"));
/** A probability, or a similarity, in words. */
export const amount = (x, measure) => (measure === "similarity" ? number(x, 2) : percent(x));
export const clamp = (i, n) => Math.max(0, Math.min(n - 1, i));
/** A token as it is shown: one that is only a space has a sign. */
export const shown = (label) => label.trim() || "␣";

const TERMS = new RegExp(`(?<![\\w-])((?:${Object.keys(GLOSSARY).sort((a, b) => b.length - a.length).join("|")})(?:e?s)?)(?![\\w-])`, "i");

/** A text in parts, with each word of the glossary explained where it first stands. */
function gloss(text, known = new Set()) {
  const [before, term] = text.split(TERMS);
  if (term === undefined) return [text];
  const word = term.toLowerCase(), one = GLOSSARY[word] ? word : word.replace(/e?s$/, ""), meaning = known.has(one) ? null : GLOSSARY[one];
  known.add(one);
  const after = text.slice(before.length + term.length);
  return [before, meaning ? h("abbr", { title: meaning }, term) : term, ...gloss(after, known)];
}
export const explain = (element, text) => element.replaceChildren(...gloss(text));
const GLOSSED = /^(h2|h3|th|summary|p lead|p explain.*)$/;

/** An element: h("button", {class: "plain", onclick: f}, "text", child, ...). */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
  const glossed = GLOSSED.test(attributes.class && tag === "p" ? `p ${attributes.class}` : tag);
  const inside = children.flat().filter((child) => child !== null && child !== undefined && child !== false);
  element.append(...inside.flatMap((child) => (glossed && typeof child === "string" ? gloss(child) : child)));
  return element;
}

/** A table with a caption for those who hear it; `columns` are headers, rows lists of cells. */
export function table(caption, columns, rows, attributes = {}) {
  const head = columns.length ? h("thead", {}, h("tr", {}, columns.map((c) => (c.nodeName === "TH" ? c : h("th", { scope: "col" }, c))))) : null;
  const cell = (c) => (c?.nodeName === "TD" ? c : h("td", {}, c));
  const body = h("tbody", {}, rows.map((r) => (r.nodeName === "TR" ? r : h("tr", {}, r.map(cell)))));
  return h("div", { class: "scroll" }, h("table", attributes, h("caption", { class: "hidden" }, caption), head, body));
}

/** A share of `most` as a bar. */
export const meter = (share) => h("span", { class: "meter" }, h("i", { style: `width:${100 * Math.max(0, Math.min(1, share || 0))}%` }));

/** A section with a title, what it says, and `badges` beside the title. */
export function section(name, title, badges, ...children) {
  return h("section", { class: name, "aria-label": typeof title === "string" ? title : name }, h("div", { class: "title" }, typeof title === "string" ? h("h2", {}, title) : title, badges), ...children);
}

/** Arrow keys move among the `buttons` of a container, which is returned; one of them is in the tab order. */
export function roving(container, buttons, columns = 1) {
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -Infinity, End: Infinity };
  container.addEventListener("keydown", (event) => {
    const at = buttons.indexOf(document.activeElement), step = steps[event.key];
    if (at < 0 || step === undefined) return;
    event.preventDefault();
    const next = Math.abs(step) === Infinity ? clamp(step, buttons.length) : at + step;
    if (buttons[next]) buttons[next].focus();
  });
  return container;
}
export const tabTo = (buttons, chosen) => buttons.forEach((b, i) => { b.tabIndex = i === chosen ? 0 : -1; });

/** Buttons of which one is chosen: options are [value, text, title]; element.choose(value) marks one. */
export function choice(label, options, choose) {
  const buttons = options.map(([value, text, title]) =>
    h("button", { role: "radio", type: "button", "data-value": value, title, onclick: () => choose(value) }, text));
  const element = roving(h("div", { class: "segmented", role: "radiogroup", "aria-label": label }, buttons), buttons);
  element.choose = (value) => {
    buttons.forEach((b) => b.setAttribute("aria-checked", String(b.dataset.value === value)));
    tabTo(buttons, Math.max(0, options.findIndex(([v]) => v === value)));
  };
  return element;
}

export const canvas = (width, height, attributes = {}) => h("canvas", { width, height, ...attributes });
export const plain = (text, onclick, attributes = {}) => h("button", { class: "plain", type: "button", onclick, ...attributes }, text);
