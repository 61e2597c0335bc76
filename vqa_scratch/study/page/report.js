// The static report: the page that holds its data.
import { themed } from "./colors.js";
import { h, plain } from "./dom.js";
import { result } from "./figures.js";
import { renderStudy } from "./study.js";

const data = JSON.parse(document.getElementById("data").textContent), main = document.getElementById("studies"), box = h("div");
const toggle = h("button", { class: "plain", type: "button", "aria-label": "switch between light and dark" });
let drawn = null;
themed(toggle, () => drawn?.update({}));

const text = data[0].text || "Describe the image", title = text.length > 140 ? `${text.slice(0, 140)}…` : text;
const banner = data.length > 1 ? "Two runs, one input" : `${data[0].run} ${result(data[0])}`;
main.classList.toggle("wide", data.length > 1);
main.append(h("header", { class: "top" }, h("div", {}, h("p", { class: "eyebrow" }, banner), h("h1", { class: text.length > 90 ? "long" : null }, title)), toggle), box);
drawn = renderStudy(box, data);
