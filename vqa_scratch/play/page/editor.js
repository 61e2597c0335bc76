// A drawn scene under the hand: objects are dragged, or moved by the arrow keys; what the chosen one is, is chosen below it.
import { clamp, h, plain, range } from "../study/dom.js";

const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A group of radio buttons with a picture each. */
function radios(name, values, draw, choose) {
  const inputs = values.map((value) => h("input", { type: "radio", name, value, class: "hidden", onchange: () => choose(value) }));
  const labels = values.map((value, i) => h("label", { title: value }, inputs[i], draw(value), h("span", { class: "hidden" }, value)));
  const element = h("fieldset", { class: "radios" }, h("legend", { class: "hidden" }, name), labels);
  element.choose = (value) => inputs.forEach((input) => { input.checked = input.value === value; });
  return element;
}

export class Editor {
  /** `shapes` is what the server draws; `changed(objects)` is called with every pixel that one is moved. */
  constructor(canvas, tools, shapes, changed) {
    Object.assign(this, { canvas, shapes, changed, objects: [], items: [], at: -1 });
    canvas.style.background = shapes.background;
    canvas.setAttribute("viewBox", `0 0 ${shapes.width} ${shapes.height}`);
    const large = Object.keys(shapes.sizes).reduce((a, b) => (shapes.sizes[a] > shapes.sizes[b] ? a : b));
    const r = shapes.sizes[large], icon = (thing) => svg("svg", { viewBox: `${-r} ${-r} ${2 * r} ${2 * r}`, "aria-hidden": "true" }, this.figure(thing));
    this.next = { shape: Object.keys(shapes.shapes)[0], color: Object.keys(shapes.colors)[0], size: large };
    const field = (name, values, draw) => radios(name, values, draw, (value) => this.dress({ [name]: value }));
    this.fields = {
      shape: field("shape", Object.keys(shapes.shapes), (shape) => icon({ shape, color: null, size: large })),
      color: field("color", Object.keys(shapes.colors), (color) => icon({ shape: "circle", color, size: large })),
      size: field("size", Object.keys(shapes.sizes), (size) => icon({ shape: "circle", color: null, size })),
    };
    this.more = plain("Add", () => this.add(), { id: "add-object" });
    this.less = plain("Remove", () => this.remove(this.at), { id: "remove-object" });
    tools.append(...Object.values(this.fields), this.more, this.less);
    canvas.addEventListener("pointerdown", (event) => { if (event.target === canvas) this.choose(-1); });
  }

  /** An object around (0, 0), as the data set draws it. */
  figure({ shape, color, size }) {
    const { circle, points, inset = 0 } = this.shapes.shapes[shape], r = this.shapes.sizes[size], fill = this.shapes.colors[color] ?? "currentColor";
    if (circle) return svg("circle", { r, fill });
    return svg("polygon", { points: points.map((corner) => corner.map((side) => side * (r - inset))).join(" "), fill });
  }

  /** Whether all of these can be drawn. */
  knows(objects) {
    return objects.every((thing) => Object.keys(this.fields).every((field) => Object.hasOwn(this.shapes[`${field}s`], thing[field])));
  }

  /** Objects from elsewhere: a scene that was picked, a link. */
  show(objects) {
    this.objects = objects.map(({ shape, color, size, x, y }) => ({ shape, color, size, x, y }));
    this.choose(-1);
    this.items = this.objects.map((_, i) => this.item(i));
    this.canvas.replaceChildren(...this.items);
    this.objects.forEach((_, i) => this.draw(i));
  }

  item(i) {
    const item = svg("g", { tabindex: "0", role: "button", class: "object" });
    let grip = null;
    const at = (event) => {
      const box = this.canvas.getBoundingClientRect();
      return [((event.clientX - box.left) * this.shapes.width) / box.width, ((event.clientY - box.top) * this.shapes.height) / box.height];
    };
    item.addEventListener("pointerdown", (event) => {
      const [x, y] = at(event), thing = this.objects[i];
      grip = [x - thing.x, y - thing.y];
      item.setPointerCapture(event.pointerId);
      this.choose(i);
    });
    item.addEventListener("pointermove", (event) => {
      if (!grip) return;
      const [x, y] = at(event);
      this.move(i, x - grip[0], y - grip[1]);
    });
    ["pointerup", "pointercancel"].forEach((end) => item.addEventListener(end, () => { grip = null; }));
    item.addEventListener("focus", () => this.choose(i));
    item.addEventListener("keydown", (event) => {
      const step = KEYS[event.key], far = event.shiftKey ? 8 : 1, { x, y } = this.objects[i];
      if (step) this.move(i, x + far * step[0], y + far * step[1]);
      else if (event.key === "Delete" || event.key === "Backspace") this.remove(i);
      else return;
      event.preventDefault();
    });
    return item;
  }

  draw(i) {
    const { shape, color, size, x, y } = this.objects[i];
    this.items[i].setAttribute("transform", `translate(${x} ${y})`);
    this.items[i].setAttribute("aria-label", `${size} ${color} ${shape}, ${x} across, ${y} down`);
    this.items[i].setAttribute("aria-pressed", String(i === this.at));
    this.items[i].replaceChildren(this.figure(this.objects[i]));
  }

  /** The chosen object, or -1: then shape, colour and size are those of the next one. */
  choose(i) {
    const before = this.at;
    this.at = i;
    [before, i].filter((n) => this.items[n] && this.objects[n]).forEach((n) => this.draw(n));
    const shown = this.objects[i] ?? this.next;
    for (const [name, field] of Object.entries(this.fields)) field.choose(shown[name]);
    this.less.disabled = i < 0;
    this.more.disabled = this.objects.length >= this.shapes.most;
  }

  /** Its centre at most so far out that all of it stays inside. */
  inside(size, x, y) {
    const r = this.shapes.sizes[size], { width, height } = this.shapes;
    return { x: r + clamp(Math.round(x) - r, width - 2 * r + 1), y: r + clamp(Math.round(y) - r, height - 2 * r + 1) };
  }

  move(i, x, y) {
    const thing = this.objects[i], to = this.inside(thing.size, x, y);
    if (to.x === thing.x && to.y === thing.y) return;
    Object.assign(thing, to);
    this.draw(i);
    this.changed(this.objects);
  }

  dress(change) {
    const thing = this.objects[this.at];
    Object.assign(thing ?? this.next, change);
    if (!thing) return;
    Object.assign(thing, this.inside(thing.size, thing.x, thing.y));
    this.draw(this.at);
    this.changed(this.objects);
  }

  /** One more, where it is farthest from all others. */
  add() {
    const { width, height } = this.shapes, looks = this.objects[this.at] ?? this.next;
    const spots = range(16).map((i) => [(((i % 4) + 0.5) * width) / 4, ((Math.floor(i / 4) + 0.5) * height) / 4]);
    const room = ([x, y]) => Math.min(1e9, ...this.objects.map((o) => Math.hypot(o.x - x, o.y - y)));
    const [x, y] = spots.reduce((a, b) => (room(b) > room(a) ? b : a));
    this.show([...this.objects, { ...looks, ...this.inside(looks.size, x, y) }]);
    this.items.at(-1).focus();
    this.changed(this.objects);
  }

  remove(i) {
    this.show(this.objects.filter((_, n) => n !== i));
    (this.items[Math.max(0, i - 1)] ?? this.more).focus();
    this.changed(this.objects);
  }
}
