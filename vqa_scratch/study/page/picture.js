// The image with its tokens, each in the square around the place where it is centred.
import { color, css } from "./colors.js";
import { canvas, clamp, h, range } from "./dom.js";

/** Where token `i` is drawn: [left, upper, width, height] of its square, clipped at the image, `scale` times as large. */
export function square({ grid, first, stride }, size, i, scale) {
  const [left, right, upper, lower] = [[i % grid[1], size[0]], [Math.floor(i / grid[1]), size[1]]].flatMap(([at, length]) =>
    [-0.5, 0.5].map((side) => Math.round(Math.max(0, Math.min(length, first + (at + side) * stride)) * scale)));
  return [left, upper, right - left, lower - upper];
}

/** The tokens of an image on a canvas, each in its square, by share of `top`; `share` says how a value is one. */
export function squares(context, values, source, size, scale, stops, top, share = (v) => v / (top || 1)) {
  values.forEach((value, i) => {
    context.fillStyle = css(color(stops, share(value)));
    context.fillRect(...square(source, size, i, scale));
  });
}

/** The colours from one end of a ramp to the other, between two texts. */
export function legend(stops, less, more) {
  const bar = canvas(64, 1), context = bar.getContext("2d");
  range(64).forEach((i) => { context.fillStyle = css(color(stops, i / 63)); context.fillRect(i, 0, 1, 1); });
  return h("span", { class: "legend" }, less, bar, more);
}

export class Picture {
  /** `attributes` are of the canvas over the image. */
  constructor(study, attributes = {}, onload = null) {
    const { data, picture } = study;
    this.size = data.size;
    this.source = picture;
    this.zoom = Math.max(1, Math.round(512 / Math.max(...data.size)));
    this.map = canvas(data.size[0] * this.zoom, data.size[1] * this.zoom, { role: "img", ...attributes });
    this.image = h("img", { src: data.image, width: data.size[0], height: data.size[1], alt: "", class: data.pixelated ? "pixels" : null, onload });
    this.element = h("div", { class: "picture" }, this.image, this.map);
  }

  /** The patch under the mouse. */
  at(event) {
    const box = this.map.getBoundingClientRect(), { grid: [rows, columns], first, stride } = this.source;
    const index = (share, length, count) => clamp(Math.floor((share * length - first) / stride + 0.5), count);
    const column = index((event.clientX - box.left) / box.width, this.size[0], columns);
    return index((event.clientY - box.top) / box.height, this.size[1], rows) * columns + column;
  }

  paint(values, stops, top, { opacity = 1, share } = {}) {
    const context = this.map.getContext("2d");
    context.clearRect(0, 0, this.map.width, this.map.height);
    context.globalAlpha = opacity;
    if (values) squares(context, values, this.source, this.size, this.zoom, stops, top, share);
    context.globalAlpha = 1;
  }

  /** Frames a patch, or blackens one that is `off`. */
  mark(patch, off = false) {
    const context = this.map.getContext("2d"), [left, upper, width, height] = square(this.source, this.size, patch, this.zoom), line = Math.max(2, this.zoom);
    Object.assign(context, { strokeStyle: "#1d1d1b", fillStyle: "rgb(29 29 27 / 0.75)", lineWidth: line });
    context.strokeRect(left + line / 2, upper + line / 2, width - line, height - line);
    if (off) context.fillRect(left, upper, width, height);
  }
}

/** A patch cut out of the image, as small as a letter. */
export function patchImage(study, patch) {
  const { first, stride, grid } = study.picture, { size, image } = study.data;
  const corner = [patch % grid[1], Math.floor(patch / grid[1])].map((at) => first + (at - 0.5) * stride);
  const place = corner.map((x, axis) => (size[axis] > stride ? (100 * x) / (size[axis] - stride) : 0));
  return h("span", { class: "patch", style: `background:url("${image}") ${place[0]}% ${place[1]}% / ${(100 * size[0]) / stride}% ${(100 * size[1]) / stride}% no-repeat` });
}
