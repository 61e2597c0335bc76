// Every head as a small picture, and in numbers; where a model can be changed, also knocked out or scaled.
import { row } from "./arrays.js";
import { badge } from "./certificate.js";
import { color, css, isDark, onPage } from "./colors.js";
import { canvas, choice, explain, h, number, percent, plain, range, roving, section, tabTo, table } from "./dom.js";
import { squares } from "./picture.js";
import { GLOSSARY } from "./words.js";

export class HeadsView {
  constructor(study) {
    this.study = study;
    const kinds = Object.keys(study.attentions).map((kind) => [kind, study.name(kind)]);
    this.kinds = choice("which attention", kinds, (kind) => study.set({ kind, mode: kind === "cross" ? study.mode : study.mode === "head" ? "head" : "mean" }));
    this.gridBox = h("div", { class: "scroll" });
    this.lead = h("p", { class: "lead" });
    this.cutting = plain("✂ knock out by clicking", () => study.set({ knocking: !study.view.knocking }), { title: "Then a click on a head, a layer, a patch or a word takes it out, or puts it back. The Delete key does so at any time." });
    this.numbers = h("details", {}, h("summary", {}, "All heads in numbers"), this.statistics());
    this.element = section("heads", "Every head", badge(study), this.lead,
      h("div", { class: "bar" }, this.kinds, study.shared.hooks.knock ? this.cutting : null), this.gridBox, this.numbers);
    this.stats = new Map(study.data.heads.map((s) => [`${s[0]}.${s[1]}`, s]));
  }

  statistics() {
    const columns = ["attention", "head", "entropy", "image", "text", "sinks", "distance"], box = h("div");
    const fill = (order, down) => {
      const rows = [...this.study.data.heads];
      if (order) rows.sort((a, b) => (down ? -1 : 1) * ((a[order] ?? -1) - (b[order] ?? -1)));
      const sort = (i) => { fill(i, order === i ? !down : i > 1); box.querySelectorAll("th button")[i].focus(); };
      const heads = columns.map((name, i) => h("th", { scope: "col", "aria-sort": order === i ? (down ? "descending" : "ascending") : null },
        h("button", { type: "button", title: GLOSSARY[name], onclick: () => sort(i) }, name)));
      box.replaceChildren(table("statistics of every head", heads, rows.map(([name, head, entropy, image, text, sink, distance]) =>
        [name, head, number(entropy, 2), percent(image), percent(text), percent(sink), distance === null ? "–" : number(distance, 1)])));
    };
    fill(0, false);
    return box;
  }

  build(kind) {
    const { study } = this, { shared } = study, [layers, heads] = study.attentions[kind].pattern.shape;
    this.thumbs = [];
    const grid = h("div", { class: "grid", role: "group", "aria-label": `${study.name(kind)}: layers by heads` });
    this.size = this.thumbSize(kind);
    grid.style.gridTemplateColumns = `auto repeat(${heads}, minmax(44px, ${this.size.wide}px))`;
    grid.append(h("span"), ...range(heads).map((i) => h("span", { class: "axis" }, `head ${i}`)));
    for (const layer of range(layers)) {
      const name = `layer ${study.block(kind, layer)}`, part = { kind: "layer", name: study.attentions[kind].names[layer] };
      grid.append(shared.hooks.knock
        ? h("button", { class: `axis${study.edited(part) ? " off" : ""}`, type: "button", title: `knock out all heads of ${part.name}`, onclick: () => shared.cut(part, true) }, name)
        : h("span", { class: "axis" }, name));
      for (const head of range(heads)) {
        const picture = canvas(this.size.width, this.size.height), mark = h("span", { class: "mark" });
        const on = shared.cuts(study.headPart(kind, layer, head), () => study.set({ mode: "head", layer, head, kind }));
        const button = h("button", { class: "thumb", type: "button", "data-layer": layer, "data-head": head, ...on }, picture, mark);
        this.thumbs.push({ layer, head, picture, button, mark });
        grid.append(button);
      }
    }
    this.gridBox.replaceChildren(roving(grid, this.thumbs.map((t) => t.button), heads));
    explain(this.lead, `${this.whole(kind)} Choose one to see it large${kind === "cross" ? " and open it below" : ""}.`);
  }

  /** What the pictures are, in words. */
  whole(kind) {
    const { study } = this, { data, pair, picture } = study;
    const cross = pair ? "Each picture is one head, as the token reads whose state becomes the image’s: the class token, or a probe."
      : data.way === "stream" ? "Each picture is one head, as the first token reads: patches above, question words below."
        : picture ? `Each picture is one head of the decoder for the chosen token${study.texts.length ? ": patches above, question words below" : ""}.`
          : `Each picture is one head of the decoder: answer tokens downwards, ${data.sound ? "the time" : "text tokens"} across; the chosen token is outlined.`;
    return { cross, image: "Each picture is one head of the image encoder for the chosen patch.", text: "Each picture is one head of the text encoder: queries downwards, keys across.",
      decoder: "Each picture is one head of the decoder’s self-attention: queries downwards, keys across.",
      stream: "Each picture is one head for the chosen word or patch: patches above, question words below." }[kind] ?? "Each picture is one head of the encoder.";
  }

  draw() {
    const { study } = this, { kind, view, attentions } = study;
    this.kinds.choose(kind);
    if (this.of !== kind) this.build(kind);
    this.of = kind;
    const effects = new Map((study.data.matter?.rows ?? []).map((r) => [`${r.name}.${r.head}`, r]));
    for (const { layer, head, picture, button, mark } of this.thumbs) {
      this.drawThumb(picture, kind, layer, head);
      const name = attentions[kind].names[layer], s = this.stats.get(`${name}.${head}`), effect = effects.get(`${name}.${head}`);
      const edit = study.edited(study.headPart(kind, layer, head)) || study.edited({ kind: "layer", name });
      button.setAttribute("aria-pressed", String(study.mode === "head" && layer === study.layer && head === study.head));
      button.classList.toggle("off", Boolean(edit));
      mark.textContent = edit ? (edit.scale ? `×${edit.scale}` : "off") : effect?.changed ? `→ ${effect.answer}` : "";
      const text = `layer ${study.block(kind, layer)} head ${head}: image ${percent(s[3])}, text ${percent(s[4])}, sinks ${percent(s[5])}, entropy ${number(s[2], 2)}`
        + (s[6] === null ? "" : `, distance ${number(s[6], 1)}`) + (edit ? `, ${edit.scale ? `scaled by ${edit.scale}` : "knocked out"}` : "")
        + (effect ? `, without it: ${effect.answer}, ${study.amount(effect.probability)}` : "");
      button.setAttribute("aria-label", text);
      button.title = text;
    }
    tabTo(this.thumbs.map((t) => t.button), Math.max(0, this.thumbs.findIndex((t) => t.layer === study.layer && t.head === study.head)));
    this.cutting.setAttribute("aria-pressed", String(Boolean(view.knocking)));
  }

  asMap(kind) { return this.study.picture && (kind === "image" || kind === "cross" || kind === "stream"); }

  thumbSize(kind) {
    const { study } = this, [, , rows, keys] = study.attentions[kind].pattern.shape;
    if (this.asMap(kind)) {
      const [width, height] = study.data.size, worded = kind !== "image" && !study.pair && study.texts.length, scale = 128 / width;
      const tall = Math.round(height * scale), strip = worded ? Math.max(8, Math.round(tall * 0.13)) + 3 : 0;
      return { width: 128, height: tall + strip, tall, scale, strip, wide: 150 };
    }
    const cell = Math.max(1, Math.floor(180 / keys)), low = Math.max(1, Math.min(16, Math.floor(96 / rows))), tall = rows === keys ? cell : low;
    return { width: keys * cell, height: rows * tall, cell, tall, wide: 190 };
  }

  drawThumb(picture, kind, layer, head) {
    const { study, size } = this, context = picture.getContext("2d"), stops = onPage();
    context.clearRect(0, 0, picture.width, picture.height);
    if (this.asMap(kind)) { this.drawMap(context, study.shares({ kind, mode: "head", layer, head }), stops); return; }
    const { pattern } = study.attentions[kind];
    for (const q of range(pattern.shape[2])) {
      const values = row(pattern, layer, head, q), top = Math.max(1e-9, ...values);
      values.forEach((v, k) => { context.fillStyle = css(color(stops, v / top)); context.fillRect(k * size.cell, q * size.tall, size.cell, size.tall); });
    }
    context.strokeStyle = isDark() ? "#ecebe6" : "#1d1d1b";
    context.strokeRect(0.5, study.query(kind) * size.tall + 0.5, picture.width - 1, Math.max(1, size.tall - 1));
  }

  /** The image, pale, with the head's patches over it and its words below. */
  drawMap(context, shares, stops) {
    const { study, size } = this, { width, height } = context.canvas, image = study.image;
    if (image.complete) {
      context.globalAlpha = isDark() ? 0.28 : 0.4;
      context.imageSmoothingEnabled = !study.data.pixelated;
      context.drawImage(image, 0, 0, width, size.tall);
      context.globalAlpha = 1;
    }
    squares(context, study.patches(shares), study.picture, study.data.size, size.scale, stops, study.top(study.picture, shares));
    if (!size.strip) return;
    const words = study.texts.flatMap((source) => { const top = study.top(source, shares); return Array.from(study.of(source, shares), (v) => v / top); }), wide = width / words.length;
    words.forEach((share, i) => {
      context.fillStyle = css(color(stops, share));
      context.fillRect(i * wide, height - size.strip + 3, Math.ceil(wide), size.strip - 3);
    });
    context.fillStyle = isDark() ? "#34342f" : "#e2e1d9";
    context.fillRect(0, height - size.strip, width, 1);
  }
}
