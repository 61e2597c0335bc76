// What is on the page, for others: a link, a file that opens here again, a picture, and the report that needs no server.
import { h } from "../study/dom.js";
import { hash, read, written } from "./state.js";
import { Refusal, request } from "./wire.js";

const LONGEST = 8000; // pixels a side; twice as many as on the screen, if they are fewer than these

function save(blob, name) {
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** An element as a PNG: its copy, with all style sheets, inside an SVG that is drawn on a canvas. */
async function png(element) {
  const { width, height } = element.getBoundingClientRect(), copy = element.cloneNode(true), drawn = element.querySelectorAll("canvas");
  copy.querySelectorAll("canvas").forEach((canvas, i) => { canvas.style.background = `url("${drawn[i].toDataURL()}") 0 0 / 100% 100% no-repeat`; });
  const fields = element.querySelectorAll("input, select"), copies = copy.querySelectorAll("input, select");
  fields.forEach((field, i) => {
    if (field.type === "radio" || field.type === "checkbox") copies[i].toggleAttribute("checked", field.checked);
    else if (field.options) [...copies[i].options].forEach((option, n) => option.toggleAttribute("selected", n === field.selectedIndex));
    else if (field.type !== "file") copies[i].setAttribute("value", field.value);
  });
  const style = h("style"), page = h("body", { class: "live" }, style, copy), root = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  style.textContent = [...document.styleSheets].flatMap((sheet) => [...sheet.cssRules].map((rule) => rule.cssText)).join("\n");
  const frame = root.appendChild(document.createElementNS(root.namespaceURI, "foreignObject"));
  for (const part of [root, frame]) for (const [name, side] of [["width", width], ["height", height]]) part.setAttribute(name, side);
  root.dataset.theme = document.documentElement.dataset.theme;
  frame.append(page);
  const xml = new XMLSerializer().serializeToString(root).replace(/[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\u{10000}-\u{10FFFF}]/gu, "\uFFFD"); // what tokens hold and XML may not
  const picture = h("img", { src: `data:image/svg+xml;charset=utf-8,${encodeURIComponent(xml)}` });
  await picture.decode();
  const scale = Math.min(2, LONGEST / Math.max(width, height)), canvas = h("canvas", { width: Math.round(width * scale), height: Math.round(height * scale) });
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  return new Promise((made) => canvas.toBlob(made, "image/png"));
}

export function share(app, box, open) {
  const part = (name) => box.querySelector(`.${name}`), said = part("shared");
  const action = (name, work) => part(name).addEventListener("click", async () => {
    try {
      said.textContent = (await work()) ?? "Saved.";
      app.tell("shared");
    } catch (error) {
      said.textContent = error.message;
    }
  });
  action("copy", async () => {
    const after = hash(app.state), field = part("link");
    if (after === null) throw new Refusal("This state holds a picture of your own, too large for a link: save it as a file.");
    field.value = location.href.split("#")[0] + after;
    field.select();
    return navigator.clipboard.writeText(field.value).then(() => "Copied.", () => "Copy the selected address.");
  });
  action("file", () => save(new Blob([written(app.state)], { type: "application/json" }), "look-inside.json"));
  action("png", async () => save(await png(document.querySelector(".page")), "look-inside.png"));
  action("report", async () => save(await (await request("report", app.body(0))).blob(), "report.html"));
  part("open").addEventListener("change", async ({ target }) => {
    if (target.files[0]) open(read(await target.files[0].text(), "file"));
    target.value = "";
  });
}
