// A sound along its time: when each word was said, where each token of the answer listens, and the spectrogram.
import { row, strongest, unpack } from "./arrays.js";
import { badge } from "./certificate.js";
import { color, css, isDark, onPage } from "./colors.js";
import { canvas, h, number, percent, range, section, shown, sum } from "./dom.js";

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
    this.map = canvas(this.heard, tokens.length, { role: "img", onclick: (e) => {
      const box = this.map.getBoundingClientRect();
      study.set({ token: Math.floor(((e.clientY - box.top) / box.height) * tokens.length) });
    } });
    this.map.style.height = `${tokens.length * 1.4}rem`;
    this.spectrogram = canvas(this.mel.shape[1], this.mel.shape[0], { class: "tones", role: "img", "aria-label": `spectrogram of ${number(sound.seconds, 1)} seconds` });
    const words = sound.words.map(([text, start, end, p]) => {
      const word = h("span", { class: "said", title: `${number(start, 2)} to ${number(end, 2)} s, ${percent(p)}` }, text);
      word.style.cssText = `left:${(100 * start) / sound.seconds}%;width:${(100 * (end - start)) / sound.seconds}%`;
      return word;
    });
    this.labels = tokens.map((t) => h("span", {}, shown(t.label)));
    this.says = h("p", { class: "note", role: "status" });
    this.chances = sound.posteriors ? unpack(sound.posteriors) : null;
    this.letters = this.chances ? canvas(this.chances.shape[1], this.chances.shape[0], { role: "img", "aria-label": "how likely CTC finds each symbol at each time" }) : null;
    if (this.letters) this.letters.style.height = `${sound.symbols.length * 1.4}rem`;
    const lane = (title, ...inside) => h("div", { class: "lane" }, h("div", { class: "names" }, title), h("div", {}, inside));
    const ticks = range(Math.floor(sound.seconds) + 1).map((second) => { const t = h("span", {}, `${second} s`); t.style.left = `${(100 * second) / sound.seconds}%`; return t; });
    this.element = section("lanes", "What it hears, along the time", badge(study), h("p", { class: "lead" }, `Words where they were said; below, each token of the answer by the map that is chosen; then the sound as the encoder reads it, high tones above${this.letters ? "; then how likely CTC finds each symbol" : ""}.`),
      lane("words", h("div", { class: "saids" }, words)), lane(this.labels, this.map), lane("sound", this.spectrogram),
      this.letters && lane(sound.symbols.map((symbol) => h("span", {}, shown(symbol))), this.letters), lane("", h("div", { class: "ticks" }, ticks)), this.says);
  }

  draw() {
    const { study } = this, context = this.map.getContext("2d"), stops = onPage(), { step } = study.data.sound;
    context.clearRect(0, 0, this.map.width, this.map.height);
    study.data.tokens.forEach((_, token) => {
      const values = study.of(this.source, study.shares({ token })).subarray(0, this.heard), top = Math.max(1e-9, ...values);
      values.forEach((v, i) => { context.fillStyle = css(color(stops, v / top)); context.fillRect(i, token, 1, 1); });
    });
    this.labels.forEach((label, i) => label.classList.toggle("query", i === study.token));
    const shares = study.shares(), values = study.of(this.source, shares), total = sum(shares.sources) || 1;
    this.says.textContent = `“${study.label}” listens most at ${strongest(values, 3).map((i) => `${number(i * step, 2)} s (${percent(values[i] / total)})`).join(", ")}`;
    this.map.setAttribute("aria-label", this.says.textContent);
    const [mels, frames] = this.mel.shape, painted = this.spectrogram.getContext("2d"), most = this.mel.values.reduce((a, b) => Math.max(a, b), 1e-9), pixels = painted.createImageData(frames, mels);
    range(mels).forEach((m) => row(this.mel, m).forEach((v, f) => {
      const at = 4 * ((mels - 1 - m) * frames + f), grey = Math.round((255 * v) / most);
      pixels.data.set([...Array(3).fill(isDark() ? grey : 255 - grey), 255], at);
    }));
    painted.putImageData(pixels, 0, 0);
    if (!this.letters) return;
    const spelled = this.letters.getContext("2d");
    spelled.clearRect(0, 0, this.letters.width, this.letters.height);
    range(this.letters.height).forEach((p) => row(this.chances, p).forEach((v, i) => { spelled.fillStyle = css(color(stops, v)); spelled.fillRect(i, p, 1, 1); }));
  }
}
