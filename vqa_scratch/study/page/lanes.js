// A sound along its time: when each word was said, where each token of the answer listens, and the spectrogram.
import { row, strongest, unpack } from "./arrays.js";
import { badge } from "./certificate.js";
import { color, isDark, onPage } from "./colors.js";
import { canvas, h, number, percent, range, section, shown, sum } from "./dom.js";

/** One pixel for each value of the rows; `colored` says which, as [red, green, blue, opacity]. */
function paintRows(picture, rows, colored) {
  const context = picture.getContext("2d"), pixels = context.createImageData(picture.width, picture.height);
  rows.forEach((values, y) => values.forEach((v, x) => { const [r, g, b, a] = colored(v); pixels.data.set([r, g, b, 255 * a], 4 * (y * picture.width + x)); }));
  context.putImageData(pixels, 0, 0);
}

/**
 * `sound` of a study: {source, step, seconds: of the sound, words: [text, start, end, probability], mel (M, F)}, and of a model
 * with a CTC head {symbols, posteriors (P, N)}.
 */
export class LanesView {
  constructor(study) {
    this.study = study;
    const { sound, tokens } = study.data;
    this.source = study.slices.find((s) => s.name === sound.source);
    this.heard = Math.min(this.source.labels.length, Math.ceil(sound.seconds / sound.step));
    this.mel = unpack(sound.mel);
    const choose = (e) => study.set({ token: Math.floor((e.offsetY / this.map.clientHeight) * tokens.length) });
    this.map = canvas(this.heard, tokens.length, { role: "img", style: `height:${tokens.length * 1.4}rem`, onclick: choose });
    this.spectrogram = canvas(this.mel.shape[1], this.mel.shape[0], { class: "tones", role: "img", "aria-label": `spectrogram of ${number(sound.seconds, 1)} seconds` });
    const at = (second) => `${(100 * second) / sound.seconds}%`, words = sound.words.map(([text, start, end, p]) =>
      h("span", { class: "said", title: `${number(start, 2)} to ${number(end, 2)} s, ${percent(p)}`, style: `left:${at(start)};width:${at(end - start)}` }, text));
    this.labels = tokens.map((t) => h("span", {}, shown(t.label)));
    this.says = h("p", { class: "note", role: "status" });
    this.chances = sound.posteriors ? unpack(sound.posteriors) : null;
    this.letters = this.chances && canvas(this.chances.shape[1], this.chances.shape[0], { role: "img", "aria-label": "how likely CTC finds each symbol at each time", style: `height:${sound.symbols.length * 1.4}rem` });
    const lane = (title, ...inside) => h("div", { class: "lane" }, h("div", { class: "names" }, title), h("div", {}, inside));
    const ticks = range(Math.floor(sound.seconds) + 1).map((second) => h("span", { style: `left:${at(second)}` }, `${second} s`));
    this.element = section("lanes", "What it hears, along the time", badge(study), h("p", { class: "lead" }, `Words where they were said; below, each token of the answer by the map that is chosen; then the sound as the encoder reads it, high tones above${this.letters ? "; then how likely CTC finds each symbol" : ""}.`),
      lane("words", h("div", { class: "saids" }, words)), lane(this.labels, this.map), lane("sound", this.spectrogram),
      this.letters && lane(sound.symbols.map((symbol) => h("span", {}, shown(symbol))), this.letters), lane("", h("div", { class: "ticks" }, ticks)), this.says);
  }

  draw() {
    const { study } = this, stops = onPage(), { step } = study.data.sound, ramp = (v) => color(stops, v);
    paintRows(this.map, study.data.tokens.map((_, token) => {
      const values = study.of(this.source, study.shares({ token })).subarray(0, this.heard), top = Math.max(1e-9, ...values);
      return values.map((v) => v / top);
    }), ramp);
    this.labels.forEach((label, i) => label.classList.toggle("query", i === study.token));
    const shares = study.shares(), values = study.of(this.source, shares), total = sum(shares.sources) || 1;
    this.says.textContent = `“${study.label}” listens most at ${strongest(values, 3).map((i) => `${number(i * step, 2)} s (${percent(values[i] / total)})`).join(", ")}`;
    this.map.setAttribute("aria-label", this.says.textContent);
    const [mels] = this.mel.shape, most = this.mel.values.reduce((a, b) => Math.max(a, b), 1e-9);
    const grey = (v) => { const g = 255 * (isDark() ? v / most : 1 - v / most); return [g, g, g, 1]; };
    paintRows(this.spectrogram, range(mels).reverse().map((m) => row(this.mel, m)), grey);
    if (this.letters) paintRows(this.letters, range(this.letters.height).map((p) => row(this.chances, p)), ramp);
  }
}
