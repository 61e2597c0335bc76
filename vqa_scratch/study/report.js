// Draws one study, or two side by side. All text goes in by textContent; nothing is ever parsed as markup.
"use strict";
(() => {
  // ---------------------------------------------------------------------------------------------- reading the data

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

  function half(bits) {
    const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  }

  /** {kind, shape, data} -> {shape, values: Float32Array} */
  function unpack(packed) {
    const raw = bytes(packed.data);
    let values;
    if (packed.kind === "u8") {
      const scale = new Float32Array(bytes(packed.scale).buffer), width = packed.shape.at(-1);
      values = Float32Array.from(raw, (b, i) => b * scale[Math.floor(i / width)]);
    } else if (packed.kind === "f16") {
      values = Float32Array.from(new Uint16Array(raw.buffer), half);
    } else {
      values = new Float32Array(raw.buffer);
    }
    return { shape: packed.shape, values };
  }

  /** One row along the last axis. */
  function row(array, ...index) {
    let at = 0;
    index.forEach((i, axis) => { at = at * array.shape[axis] + i; });
    const width = array.shape.at(-1);
    return array.values.subarray(at * width, (at + 1) * width);
  }

  function mean(rows) {
    const result = new Float32Array(rows[0].length);
    for (const values of rows) values.forEach((v, i) => { result[i] += v / rows.length; });
    return result;
  }

  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const range = (n) => Array.from({ length: n }, (_, i) => i);
  const percent = (share) => (share >= 0.0995 ? Math.round(100 * share) : (100 * share).toFixed(1)) + " %";
  const number = (x, digits = 3) => (Math.abs(x) > 1e20 ? "−∞" : x.toFixed(digits).replace("-", "−"));
  const clamp = (i, n) => Math.max(0, Math.min(n - 1, i));

  // ---------------------------------------------------------------------------------------------- colours

  const OVER_IMAGE = [[0, [255, 236, 160, 0]], [0.25, [255, 205, 90, 0.45]], [0.55, [245, 130, 50, 0.68]], [1, [190, 20, 80, 0.86]]];
  const ON_LIGHT = [[0, [255, 236, 160, 0]], [0.2, [255, 214, 120, 0.55]], [0.55, [245, 130, 50, 0.85]], [1, [190, 20, 80, 1]]];
  const ON_DARK = [[0, [130, 20, 90, 0]], [0.2, [140, 20, 90, 0.4]], [0.6, [240, 110, 50, 0.9]], [1, [255, 222, 130, 1]]];
  const isDark = () => document.documentElement.dataset.theme === "dark";
  const onPage = () => (isDark() ? ON_DARK : ON_LIGHT);

  function color(stops, share) {
    const s = Math.max(0, Math.min(1, share));
    let i = 1;
    while (i < stops.length - 1 && stops[i][0] < s) i += 1;
    const [[a, from], [b, to]] = [stops[i - 1], stops[i]];
    return from.map((v, c) => v + ((to[c] - v) * (s - a)) / (b - a));
  }
  const css = ([r, g, b, a]) => `rgb(${Math.round(r)} ${Math.round(g)} ${Math.round(b)} / ${a.toFixed(3)})`;

  const CARD = { light: [255, 255, 255], dark: [31, 31, 29] }, SUNK = { light: [243, 242, 236], dark: [25, 25, 24] };

  /** Relative luminance of an opaque colour, as WCAG 2 defines it. */
  function luminance(rgb) {
    const [r, g, b] = rgb.map((v) => { const c = v / 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }

  /** A colour over the card or another ground, and black or white ink on it, whichever has more contrast (4.5 at least). */
  function paint(element, c, ground) {
    const below = ground[isDark() ? "dark" : "light"];
    element.style.background = css(c);
    element.style.color = luminance([0, 1, 2].map((i) => c[i] * c[3] + below[i] * (1 - c[3]))) > 0.179 ? "#000000" : "#ffffff";
  }

  /** Background by share. */
  const shade = (element, share) => paint(element, color(onPage(), share), CARD);

  /** Blue below zero, orange above. */
  function diverging(element, value, largest) {
    const share = Math.min(1, Math.abs(value) / (largest || 1));
    const base = value >= 0 ? (isDark() ? [255, 154, 92] : [214, 90, 24]) : (isDark() ? [127, 176, 255] : [43, 99, 184]);
    paint(element, [...base, 0.75 * share], SUNK);
  }

  // ---------------------------------------------------------------------------------------------- small parts

  // What a word of the trade means; shown where it stands, when the mouse rests on it.
  const GLOSSARY = {
    attention: "How much a token takes from each other token: weights that sum to 1.",
    "cross-attention": "Attention from the text that is written to the image and the question.",
    "self-attention": "Attention among the tokens of one sequence.",
    certificate: "The measured difference between the weights shown here and those that ran.",
    decoder: "The part of the model that writes the answer, token by token.",
    distance: "How far from the asking token the attention lies on average, in tokens.",
    embedding: "The vector that a token starts as, before any layer.",
    expert: "One of several parts of a layer; each token goes through some of them.",
    experts: "Parts of a layer; each token goes through some of them.",
    entropy: "How widely attention is spread, in nats: 0 if it is all on one token.",
    head: "One of the parallel parts of an attention, each with its own weights.",
    heads: "The parallel parts of an attention, each with its own weights.",
    key: "What a token offers to be found by; a query that fits it reads that token.",
    keys: "What tokens offer to be found by; a query that fits one reads that token.",
    layer: "One step of the model; each reads the states that the one before left.",
    logit: "The score of a word before the softmax makes probabilities of all scores.",
    "logit lens": "The model's last step, applied to the states of an earlier layer.",
    "log-sum-exp": "The logarithm of the sum of exponentials: what softmax divides by.",
    lse: "Log-sum-exp: the logarithm of the sum of exp(score) over all keys, what softmax divides by.",
    mask: "Minus infinity where a token must not be read, else 0.",
    mlp: "The part of a layer that works on each token alone.",
    patch: "A square of the image, one token to the model.",
    patches: "Squares of the image, each one token to the model.",
    "q·k": "The product of query and key: how well they fit.",
    relevancy: "Attention weighted by what it did for the answer.",
    router: "The part of a layer that chooses experts for each token.",
    rollout: "Attention multiplied through all layers.",
    scale: "1 over the square root of a head's size; it keeps scores small.",
    sinks: "Tokens without content that take attention: class token, separators, first token.",
    softmax: "Turns scores into shares that sum to 1.",
    token: "A piece of text, or of an image, that the model handles as one.",
    tokens: "Pieces of text, or of an image, that the model handles one by one.",
    vocabulary: "All tokens that the model can write.",
  };
  const TERMS = new RegExp(`(?<![\\w-])(${Object.keys(GLOSSARY).sort((a, b) => b.length - a.length).join("|")})(?![\\w-])`, "i");

  /** A text in parts, with each word of the glossary explained where it first stands. */
  function gloss(text, known = new Set()) {
    const [before, term, ...rest] = text.split(TERMS);
    if (term === undefined) return [text];
    const meaning = known.has(term.toLowerCase()) ? null : GLOSSARY[term.toLowerCase()];
    known.add(term.toLowerCase());
    const after = text.slice(before.length + term.length);
    return [before, meaning ? h("abbr", { title: meaning }, term) : term, ...gloss(after, known)];
  }
  const explain = (element, text) => element.replaceChildren(...gloss(text));
  const GLOSSED = /^(h2|h3|th|summary|p lead|p explain.*)$/;

  /** An element: h("button", {class: "plain", onclick: f}, "text", child, ...). */
  function h(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else if (value === true) element.setAttribute(key, "");
      else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
    }
    const glossed = GLOSSED.test(attributes.class && tag === "p" ? `p ${attributes.class}` : tag);
    const shown = children.flat().filter((child) => child !== null && child !== undefined);
    element.append(...shown.flatMap((child) => (glossed && typeof child === "string" ? gloss(child) : child)));
    return element;
  }

  /** Arrow keys move among `buttons`; one of them is in the tab order. */
  function roving(container, buttons, columns = 1) {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -Infinity, End: Infinity };
    container.addEventListener("keydown", (event) => {
      const at = buttons.indexOf(document.activeElement), step = steps[event.key];
      if (at < 0 || step === undefined) return;
      event.preventDefault();
      const next = Math.abs(step) === Infinity ? clamp(step, buttons.length) : at + step;
      if (buttons[next]) buttons[next].focus();
    });
  }
  const tabTo = (buttons, chosen) => buttons.forEach((b, i) => { b.tabIndex = i === chosen ? 0 : -1; });

  function choice(label, options, choose) {
    const buttons = options.map(([value, text]) => h("button", { role: "radio", type: "button", "data-value": value, title: METHODS[value], onclick: () => choose(value) }, text));
    const element = h("div", { class: "segmented", role: "radiogroup", "aria-label": label }, buttons);
    roving(element, buttons);
    element.choose = (value) => {
      buttons.forEach((b) => b.setAttribute("aria-checked", String(b.dataset.value === value)));
      tabTo(buttons, Math.max(0, options.findIndex(([v]) => v === value)));
    };
    return element;
  }

  function canvas(width, height, attributes = {}) {
    return h("canvas", { width, height, ...attributes });
  }

  /** Where token `i` is drawn: [left, upper, width, height] of its square, clipped at the image, `scale` times as large. */
  function square({ grid, first, stride }, size, i, scale) {
    const [left, right, upper, lower] = [[i % grid[1], size[0]], [Math.floor(i / grid[1]), size[1]]].flatMap(([at, length]) =>
      [-0.5, 0.5].map((side) => Math.round(Math.max(0, Math.min(length, first + (at + side) * stride)) * scale)));
    return [left, upper, right - left, lower - upper];
  }

  /** The tokens of an image on a canvas, each in its square, by share of `top`. */
  function squares(context, values, source, size, scale, stops, top) {
    values.forEach((value, i) => {
      context.fillStyle = css(color(stops, value / (top || 1)));
      context.fillRect(...square(source, size, i, scale));
    });
  }

  const METHODS = {
    relevancy: "Relevancy: attention weighted by what it did for this token's logit (Chefer et al. 2021), carried from the answer back through the encoders.",
    rollout: "Rollout: attention multiplied through all layers, half of every state being its residual (Abnar and Zuidema 2020). Says where information could come from.",
    nearness: "Nearness: each image token through the last layer alone, as if it were all the image: how similar it then is to the text, above the mean place. What a token holds; it adds up to nothing.",
    parts: "Parts: what each image token adds to the similarity through the attention of the token that is pooled (Gandelsman et al. 2024). With the rest, which is of no place, they are the similarity exactly.",
    mean: "Mean: plain weights, averaged over all layers and heads. What was looked at, whether it was used or not.",
    layer: "Layer: the weights of one layer, averaged over its heads.",
    head: "Head: the weights of a single head, exactly as they ran.",
  };
  const KINDS = { image: "Inside the image", text: "Inside the question", encoder: "Inside the article", decoder: "Inside the answer", stream: "Inside the stream" };
  // The attention that reads the image and the words, by the way in which the model does it.
  const WAYS = { cross: "Cross-attention", prefix: "Self-attention to the prefix", stream: "Self-attention of the first token" };

  // What is shown; shared by both studies of a comparison.
  const state = { mode: "relevancy", kind: "cross", layer: 0, head: 0, token: 0, place: { image: 0, text: 0, encoder: 0, stream: 0 }, opacity: 0.9, all: false, detail: 0 };
  const studies = [];
  const refresh = () => studies.forEach((study) => study.draw());
  function set(changes) { Object.assign(state, changes); refresh(); }

  // ---------------------------------------------------------------------------------------------- one study

  class Study {
    constructor(data, compared) {
      this.data = data;
      this.compared = compared;
      this.pair = data.measure === "similarity"; // an image and a text are compared; nothing is written
      for (const source of data.sources) if (source.asked) state.place[source.name] = source.asked;
      this.hover = null;
      this.attentions = {};
      for (const [kind, a] of Object.entries(data.attentions)) this.attentions[kind] = { ...a, pattern: unpack(a.pattern) };
      this.flows = {};
      for (const [name, f] of Object.entries(data.flows)) this.flows[name] = { sources: unpack(f.sources), decoder: unpack(f.decoder) };
      this.mixing = data.mixing ? unpack(data.mixing) : null;
      this.opened = new Map(data.opened.map((o) => [`${o.layer}.${o.head}`, o]));
      this.slices = [];
      let start = 0;
      for (const source of data.sources) { this.slices.push({ ...source, start, stop: start + source.labels.length }); start += source.labels.length; }
      this.picture = this.slices.find((s) => s.grid) || null;
      // How many tokens of the picture stand before its patches: class token, registers.
      this.before = this.picture ? this.picture.labels.length - this.picture.grid[0] * this.picture.grid[1] : 0;
      this.element = h("div", { class: "study" });
      this.build();
    }

    // -------------------------------------------------------------------------------------------- numbers

    /** A probability or a similarity, in words. */
    amount(x) { return this.pair ? number(x, 2) : percent(x); }
    result() {
      const { text, probability } = this.data.answer;
      return this.pair ? `gives the text and the image a similarity of ${this.amount(probability)}` : `answered “${text || "(nothing)"}”, probability ${percent(probability)}`;
    }
    /** The token that is asked first inside a source. */
    first(kind) { return (this.slices.find((s) => s.name === kind) || { asked: 0 }).asked; }

    get token() { return this.hover === null ? clamp(state.token, this.data.tokens.length) : this.hover; }
    get row() { return this.data.tokens[this.token].row; }
    get kind() { return this.attentions[state.kind] ? state.kind : "cross"; }
    get layer() { return clamp(state.layer, this.attentions[this.kind].pattern.shape[0]); }
    /** The number of the block in which a layer of an attention stands: maybe not every block of the writer reads sources. */
    block(kind, layer) { return this.attentions[kind].names[layer].split(".")[1]; }
    get head() { return clamp(state.head, this.attentions[this.kind].pattern.shape[1]); }

    /** Which row of an attention's pattern is asked for. */
    query(kind) {
      const a = this.attentions[kind];
      if (kind === "cross") return this.token; // one row an answer token
      if (kind === "decoder") return a.rows ? 1 : this.row;
      return a.rows ? (state.place[kind] === this.first(kind) ? 0 : 1) : clamp(state.place[kind], a.pattern.shape[2]);
    }

    /** Weights of one head, of a layer's mean or of all, over that attention's keys. */
    weights(kind, mode, layer, head) {
      const { pattern } = this.attentions[kind], query = this.query(kind), [layers, heads] = pattern.shape;
      if (mode === "head") return row(pattern, layer, head, query);
      const chosen = mode === "layer" ? [layer] : range(layers);
      return mean(chosen.flatMap((l) => range(heads).map((i) => row(pattern, l, i, query))));
    }

    /** Shares of the tokens of every source (and of the answer so far) for what is chosen. */
    shares(kind = this.kind, mode = state.mode, layer = this.layer, head = this.head) {
      const total = this.slices.at(-1).stop;
      const flow = this.flows[mode === "mean" ? "cross" : mode];
      if (kind === "cross" && flow) {
        const sources = Float32Array.from(row(flow.sources, this.row));
        if (mode === "relevancy" && this.data.way === "stream") sources[0] -= 1; // the rules start from the identity
        if (this.pair) return { sources: sources.map((v) => Math.max(0, v)), own: new Float32Array(0) };
        return { sources, own: row(flow.decoder, this.row) };
      }
      const values = this.weights(kind, mode, layer, head);
      if (kind === "decoder") return { sources: new Float32Array(total), own: values };
      const sources = new Float32Array(total), { keys } = this.data;
      if (kind === "stream") sources.set(values);
      else if (kind !== "cross") sources.set(values, this.slices.find((s) => s.name === kind).start);
      else if (this.mixing) range(this.mixing.shape[0]).forEach((k) => row(this.mixing, k).forEach((m, s) => { sources[s] += values[k] * m; }));
      else keys.forEach((s, k) => { sources[s] += values[k]; });
      return { sources, own: kind === "cross" && keys ? values.subarray(keys.length) : new Float32Array(0) };
    }

    /** Which patch is asked inside the image or the stream; below 0 for none. */
    get asked() {
      if (this.kind !== "image" && this.kind !== "stream") return -1;
      const from = this.kind === "stream" ? this.picture.start : 0;
      return clamp(state.place[this.kind], from + this.picture.labels.length) - from - this.before;
    }

    ask(patch) {
      if (this.kind !== "image" && this.kind !== "stream") return;
      const from = this.kind === "stream" ? this.picture.start : 0;
      set({ place: { ...state.place, [this.kind]: from + this.before + patch } });
    }

    of(source, shares) { return shares.sources.subarray(source.start, source.stop); }

    patches(shares) {
      return this.of(this.picture, shares).subarray(this.before);
    }

    /** The share that gets full colour: the largest among tokens with content of their own, 3 times the mean at least. */
    top(source, shares) {
      const values = Array.from(this.of(source, shares)).filter((_, i) => !source.sinks.includes(i));
      return Math.max(1e-9, (3 * sum(values)) / (values.length || 1), ...values);
    }

    /** 1 for what gets a twentieth or more of all there is to source tokens; less is drawn paler. */
    presence(values, shares) { return Math.max(1e-6, Math.min(1, (20 * sum(values)) / (sum(shares.sources) || 1))); }

    masses(shares) {
      const groups = { image: 0, text: 0, sink: 0, own: 0 };
      for (const source of this.slices) {
        this.of(source, shares).forEach((v, i) => { groups[source.sinks.includes(i) ? "sink" : source.image ? "image" : "text"] += v; });
      }
      groups.own = sum(shares.own);
      if (state.mode === "relevancy" && this.kind === "cross") groups.own = Math.max(0, groups.own - 1); // as in shares()
      const total = sum(Object.values(groups)) || 1;
      for (const name of Object.keys(groups)) groups[name] /= total;
      return groups;
    }

    // -------------------------------------------------------------------------------------------- building

    build() {
      const { data } = this;
      if (this.compared) {
        this.element.append(h("p", { class: "run" }, h("b", {}, data.run), ` ${this.result()}`));
      }
      const lens = data.lens.length ? [this.buildLens()] : [];
      this.element.append(this.buildStage(), this.buildHeads(), this.buildSteps(), ...lens, ...this.buildExperts(), this.buildCertificate());
    }

    buildStage() {
      const { data } = this;
      const left = h("div");
      if (this.picture) {
        this.zoom = Math.max(1, Math.round(512 / Math.max(...data.size)));
        this.map = canvas(data.size[0] * this.zoom, data.size[1] * this.zoom, { tabindex: 0, role: "img" });
        this.map.addEventListener("pointermove", (e) => this.point(e));
        this.map.addEventListener("pointerleave", () => { this.note.textContent = ""; });
        this.map.addEventListener("click", (e) => { this.point(e); this.ask(this.pointed); });
        this.map.addEventListener("keydown", (e) => this.walk(e));
        this.image = h("img", { src: data.image, alt: "", class: data.pixelated ? "pixels" : null, onload: () => this.drawGrid() });
        const [width, height] = data.size, seen = `The image as the model saw it, ${width} by ${height} pixels`;
        const asked = this.pair ? `Compared with “${data.text}”.` : `${data.text ? `“${data.text}” was answered` : "It was described as"} “${data.answer.text || "(nothing)"}”.`;
        left.append(h("figure", { class: "untouched" },
          h("img", { src: data.image, alt: `${seen}. ${asked}`, class: data.pixelated ? "pixels" : null }), h("figcaption", {}, seen)));
        left.append(h("div", { class: "picture" }, this.image, this.map));
        this.slider = h("input", { type: "range", min: 0, max: 100, value: 90, id: `opacity-${studies.length}`, oninput: (e) => set({ opacity: e.target.value / 100 }) });
        this.scale = canvas(64, 1);
        left.append(h("div", { class: "under" },
          h("span", { class: "legend" }, "none", this.scale, "strongest"),
          h("label", { for: this.slider.id }, "overlay"), this.slider));
        this.note = h("p", { class: "note" });
        left.append(this.note);
      }
      const right = h("div");
      this.words = this.slices.filter((s) => !s.image).map((source) => {
        const long = source.labels.length > 40;
        const words = source.labels.map((label, i) => h("button", {
          type: "button", class: `word${source.sinks.includes(i) ? " sink" : ""}`,
          onclick: () => {
            if (this.kind === source.name) set({ place: { ...state.place, [source.name]: i } });
            if (this.kind === "stream") set({ place: { ...state.place, stream: source.start + i } });
          },
        }, label.trim() || label));
        source.labels.forEach((label, i) => words[i].classList.toggle("starts", label.startsWith(" ")));
        const box = h("div", { class: `words${long ? " flowing" : ""}` }, words);
        roving(box, words);
        right.append(h("div", { class: "block" }, h("h3", {}, this.pair ? "Text, as the text tower reads it" : source.name === "text" ? "Question, as the model reads it" : "Text, as the encoder reads it"), box));
        return { source, words };
      });
      this.answerButtons = data.tokens.map((token, i) => {
        const meter = h("span", { class: "meter" }, h("i"));
        meter.firstChild.style.width = `${100 * Math.max(0, token.probability)}%`;
        const label = token.label.trim() || "␣";
        return h("button", {
          class: `token${data.answer.ends.includes(token.id) ? " end" : ""}`, role: "radio", type: "button",
          "aria-label": `token ${i + 1}: ${label}, ${data.measure} ${this.amount(token.probability)}`,
          onclick: () => { this.hover = null; set({ token: i }); },
          onpointerenter: () => { this.hover = i; this.draw(); },
          onpointerleave: () => { this.hover = null; this.draw(); },
        }, h("b", {}, label), h("span", {}, meter, this.amount(token.probability)));
      });
      this.answers = h("div", { class: "answers", role: "radiogroup", "aria-label": "generated tokens" }, this.answerButtons);
      roving(this.answers, this.answerButtons);
      this.readWords = data.read.map((label) => h("span", { class: `word${label.startsWith(" ") ? " starts" : ""}` }, label.trim() || label));
      right.append(h("div", { class: "block" }, h("h3", {}, this.pair ? "The text, and its words alone, with their similarity to the image" : "Answer, token by token, with probabilities"), this.answers));

      const modes = ["parts", "nearness", "relevancy", "rollout", "mean", "layer", "head"].filter((mode) => data.flows[mode] || !["nearness", "parts"].includes(mode));
      this.modes = choice("what to show", modes.map((mode) => [mode, mode[0].toUpperCase() + mode.slice(1)]), (mode) => set(data.flows[mode] ? { mode, kind: "cross" } : { mode }));
      this.layerPicker = h("select", { "aria-label": "layer", onchange: (e) => set({ layer: Number(e.target.value) }) });
      this.headPicker = h("select", { "aria-label": "head", onchange: (e) => set({ head: Number(e.target.value) }) });
      this.layerLabel = h("label", {}, "layer", this.layerPicker);
      this.headLabel = h("label", {}, "head", this.headPicker);
      this.explain = h("p", { class: "explain" });
      right.append(h("div", { class: "block" }, h("h3", {}, "Show"), this.modes, h("div", { class: "pickers" }, this.layerLabel, this.headLabel), this.explain));
      this.bar = h("div", { class: "shares", "aria-hidden": "true" });
      this.barKeys = h("div", { class: "keys" });
      right.append(h("div", { class: "block" }, h("h3", {}, "Where it goes"), this.bar, this.barKeys));
      if (data.read.length > 1 && !this.pair) right.append(h("div", { class: "block" }, h("h3", {}, "What the decoder itself had read"), h("div", { class: "words flowing" }, this.readWords)));
      this.live = h("p", { class: "hidden", role: "status", "aria-live": "polite" });
      right.append(this.live);
      return h("section", { "aria-label": "answer" }, h("div", { class: `stage${this.picture ? "" : " wordy"}` }, this.picture ? left : null, right));
    }

    buildHeads() {
      this.kinds = choice("which attention", Object.keys(this.attentions).map((kind) => [kind, this.name(kind)]), (kind) => set({ kind, mode: kind === "cross" ? state.mode : state.mode === "head" ? "head" : "mean" }));
      this.gridBox = h("div", { class: "scroll" });
      this.gridLead = h("p", { class: "lead" });
      this.statistics = h("details", {}, h("summary", {}, "All heads in numbers"), h("div", { class: "scroll" }, this.table()));
      return h("section", { "aria-label": "heads" }, h("div", { class: "bar" }, h("div", {}, h("h2", {}, "Every head"), this.gridLead), this.kinds), this.gridBox, h("br"), this.statistics);
    }

    buildSteps() {
      this.stepTitle = h("h2");
      this.stepBox = h("div", { class: "steps" });
      return h("section", { class: "stepwise", "aria-label": "one head, step by step" }, this.stepTitle, this.stepBox);
    }

    buildLens() {
      this.lensBox = h("div", { class: "split" });
      return h("section", { "aria-label": "lenses" }, h("h2", {}, "How the answer grows"),
        h("p", { class: "lead" }, "Left: what the model would say if it stopped after a layer (logit lens). Right: what each head adds to the token's logit, above the mean logit of the vocabulary; the parts sum to the logit exactly."), this.lensBox);
    }

    /** Which experts took each token; nothing for a model without experts. */
    buildExperts() {
      const { experts, read } = this.data;
      if (!experts.length) return [];
      const lines = experts.map(({ name, weights }) => {
        const taken = unpack(weights);
        return h("tr", {}, h("td", {}, `layer ${name.split(".")[1]}`), read.map((_, i) => {
          const shares = [...row(taken, i)].map((share, expert) => [share, expert]).filter(([share]) => share > 0).sort((a, b) => b[0] - a[0]);
          return h("td", { class: "words" }, shares.map(([share, expert]) => `${expert}: ${number(share, 2)}`).join("\n"));
        }));
      });
      return [h("section", { "aria-label": "experts" }, h("h2", {}, "Which expert took each token"),
        h("p", { class: "lead" }, "In each layer with experts, a router chose some for each token that was read. These are their numbers, and the weights of what they said."),
        h("div", { class: "scroll" }, h("table", { class: "experts" }, h("caption", { class: "hidden" }, "experts by layer and token"), h("thead", {}, h("tr", {}, h("td"), read.map((label) => h("th", { scope: "col", class: "words" }, label.trim() || "␣")))), h("tbody", {}, lines))))];
    }

    buildCertificate() {
      const c = this.data.certificate;
      // fp32 rounds in proportion: outputs of size 30 may differ by 30 times what outputs of size 1 may.
      const item = (value, name, meaning, size = 1) => h("div", {}, h("b", { class: value <= 1e-5 * Math.max(1, size) ? "good" : "bad" }, value.toExponential(1).replace("-", "−")), h("span", {}, h("span", {}, name), h("br"), meaning));
      return h("section", { class: "certificate", "aria-label": "certificate" }, h("h2", {}, "Certificate"),
        h("p", { class: "lead" }, `The weights on this page were rebuilt from q, k and each row’s log-sum-exp while the model ran its own attention. These are the largest differences over ${c.rows.toLocaleString("en")} rows of ${c.attentions} attentions.`),
        h("div", { class: "proofs" },
          item(c.mass, "max |ΣP − 1|", "each row of weights is whole"),
          item(c.output, "max |P V − O|", `they give what the kernel returned, numbers up to ${number(c.size, 1)}`, c.size),
          item(c.softmax, "max |P − softmax|", "they are the explicit softmax")),
        h("p", { class: "note" }, "In the pictures of this page a weight has 8 bits, relative to its row; the numbers of an opened head have 16 or 32."));
    }

    table() {
      const columns = ["attention", "head", "entropy", "image", "text", "sinks", "distance"];
      let order = 0, down = false;
      const body = h("tbody");
      const fill = () => {
        const rows = this.data.heads.map((r) => r);
        if (order) rows.sort((a, b) => (down ? -1 : 1) * ((a[order] ?? -1) - (b[order] ?? -1)));
        body.replaceChildren(...rows.map(([name, head, entropy, image, text, sink, distance]) => h("tr", {}, h("td", {}, name), h("td", {}, head),
          h("td", {}, number(entropy, 2)), h("td", {}, percent(image)), h("td", {}, percent(text)), h("td", {}, percent(sink)), h("td", {}, distance === null ? "–" : number(distance, 1)))));
      };
      const heads = columns.map((name, i) => h("th", { scope: "col" }, h("button", { type: "button", title: GLOSSARY[name], onclick: () => { down = order === i ? !down : i > 1; order = i; fill(); } }, name)));
      fill();
      return h("table", {}, h("caption", { class: "hidden" }, "statistics of every head"), h("thead", {}, h("tr", {}, heads)), body);
    }

    // -------------------------------------------------------------------------------------------- drawing

    draw() {
      const shares = this.shares();
      this.drawWords(shares);
      if (this.picture) this.drawPicture(shares);
      this.drawControls(shares);
      this.drawGrid();
      if (this.hover === null) { this.drawSteps(); if (this.lensBox) this.drawLens(); }
    }

    drawPicture(shares) {
      const context = this.map.getContext("2d"), { size } = this.data;
      const values = this.patches(shares), top = this.top(this.picture, shares) / this.presence(values, shares), sumAll = sum(shares.sources);
      context.clearRect(0, 0, this.map.width, this.map.height);
      this.map.style.opacity = 1;
      context.globalAlpha = state.opacity / 0.9 > 1 ? 1 : state.opacity / 0.9;
      if (sumAll > 1e-9 && sum(values) > 1e-9) squares(context, values, this.picture, size, this.zoom, OVER_IMAGE, top);
      context.globalAlpha = 1;
      if (this.asked >= 0) {
        const [left, upper, width, height] = square(this.picture, size, this.asked, this.zoom), line = Math.max(2, this.zoom);
        context.strokeStyle = "#1d1d1b"; context.lineWidth = line;
        context.strokeRect(left + line / 2, upper + line / 2, width - line, height - line);
      }
      const bar = this.scale.getContext("2d");
      range(64).forEach((i) => { bar.fillStyle = css(color(ON_LIGHT, i / 63)); bar.fillRect(i, 0, 1, 1); });
      this.slider.value = Math.round(100 * state.opacity);
      this.map.setAttribute("aria-label", this.inWords(shares));
      this.lastShares = shares;
    }

    drawWords(shares) {
      for (const { source, words } of this.words) {
        const values = this.of(source, shares), top = this.top(source, shares) / this.presence(values, shares);
        words.forEach((word, i) => {
          shade(word, sum(values) > 1e-9 ? values[i] / top : 0);
          if (values[i] / top < 0.02) word.style.color = "";
          word.title = `${percent(values[i])}`;
          const asked = this.kind === "stream" ? state.place.stream - source.start : clamp(state.place[source.name] || 0, words.length);
          word.classList.toggle("query", (this.kind === source.name || this.kind === "stream") && i === asked);
        });
        tabTo(words, clamp(state.place[source.name] || 0, words.length));
      }
      const flow = this.kind === "cross" && this.data.flows[state.mode];
      const own = Array.from(shares.own, (v, i) => (flow && i === this.row ? 0 : v)), top = Math.max(1e-9, ...own);
      this.readWords.forEach((word, i) => {
        shade(word, (own[i] || 0) / top);
        if (!(own[i] / top > 0.02)) word.style.color = "";
        word.title = own[i] ? percent(own[i]) : "";
        word.classList.toggle("query", i === this.row);
      });
    }

    drawControls(shares) {
      this.answerButtons.forEach((b, i) => b.setAttribute("aria-checked", String(i === clamp(state.token, this.answerButtons.length))));
      tabTo(this.answerButtons, clamp(state.token, this.answerButtons.length));
      this.modes.choose(state.mode);
      this.kinds.choose(this.kind);
      this.layerLabel.hidden = !(state.mode === "layer" || state.mode === "head");
      this.headLabel.hidden = state.mode !== "head";
      const attention = this.attentions[this.kind], option = (value, text = value) => h("option", { value }, text);
      this.layerPicker.replaceChildren(...attention.names.map((_, i) => option(i, this.block(this.kind, i))));
      this.headPicker.replaceChildren(...range(attention.pattern.shape[1]).map((i) => option(i)));
      this.layerPicker.value = this.layer;
      this.headPicker.value = this.head;
      let text = METHODS[state.mode];
      if (this.kind !== "cross") text = `${this.name(this.kind)}: ${state.mode === "head" ? "one head" : state.mode === "layer" ? "one layer, averaged over heads" : "averaged over layers and heads"}. ${this.whose()}`;
      else if (this.pair && state.mode === "parts") {
        const parts = row(this.flows.parts.sources, this.row), { start, stop } = this.picture, from = start + this.before;
        const places = sum(parts.subarray(from, stop)), before = sum(parts.subarray(start, from)), whole = this.data.tokens[this.token].probability;
        text += ` Here: places ${number(places)}${this.before ? `, class token ${number(before)}` : ""}, the rest ${number(whole - places - before)}; in all ${number(whole)}. Places that take from it are not drawn.`;
      } else if (this.data.way === "stream" && !this.pair && state.mode === "mean") text += " Here it is the words of the question that look, on average.";
      else if (!this.data.keys && !this.data.flows[state.mode]) text += " This run’s decoder reads one averaged key, so its cross-attention is the same everywhere by construction.";
      explain(this.explain, text);
      const masses = this.masses(shares);
      const names = { image: "image", text: this.pair ? "text" : this.picture ? "question" : "article", sink: "sinks (class token, separators)", own: "the decoder’s own tokens" };
      const seen = Object.keys(names).filter((name) => masses[name] > 0.0005 || (name === "text" && this.words.length && !this.pair) || (name === "image" && this.picture));
      this.bar.replaceChildren(...seen.map((name) => { const i = h("i"); i.style.cssText = `width:${100 * masses[name]}%;background:var(--${name})`; return i; }));
      this.barKeys.replaceChildren(...seen.map((name) => { const dot = h("i"); dot.style.background = `var(--${name})`; return h("span", {}, dot, `${names[name]} ${percent(masses[name])}`); }));
      this.live.textContent = this.inWords(shares);
    }

    /** What the pictures show, as a sentence. */
    inWords(shares) {
      const parts = [];
      if (this.picture) {
        const values = Array.from(this.patches(shares)), columns = this.picture.grid[1], total = sum(shares.sources) || 1;
        const best = range(values.length).sort((a, b) => values[b] - values[a]).slice(0, 3);
        parts.push("strongest patches " + best.map((i) => `row ${Math.floor(i / columns) + 1} column ${(i % columns) + 1} (${percent(values[i] / total)})`).join(", "));
      }
      for (const { source } of this.words) {
        const values = Array.from(this.of(source, shares)), total = sum(shares.sources) || 1;
        if (this.pair && this.kind !== "text") continue;
        const best = range(values.length).sort((a, b) => values[b] - values[a]).slice(0, 3);
        parts.push("strongest words " + best.map((i) => `${source.labels[i].trim()} (${percent(values[i] / total)})`).join(", "));
      }
      const what = this.kind === "cross" ? `${state.mode} for token ${this.data.tokens[this.token].label.trim()}` : this.name(this.kind);
      const layer = this.block(this.kind, this.layer), which = state.mode === "head" ? `, layer ${layer} head ${this.head}` : state.mode === "layer" ? `, layer ${layer}` : "";
      return `${what}${which}: ${parts.join("; ")}`;
    }

    /** What a kind of attention is called. */
    name(kind) { return kind === "cross" ? WAYS[this.data.way] : this.pair && kind === "text" ? "Inside the text" : KINDS[kind]; }

    whose() {
      const reduced = this.attentions[this.kind].rows;
      if (this.kind === "decoder") return "Read by the chosen token, from the tokens before it.";
      if (this.kind === "stream") {
        if (reduced) return state.place.stream === 0 ? "Read by the first token; choose a word or a patch for the mean over all tokens." : "Mean over all tokens; single ones are in trace.safetensors.";
        return this.asked >= 0 ? `Read by patch ${this.picture.labels[this.before + this.asked].slice(6)} (row, column). Choose a word or another patch.` : "Read by the outlined word. Choose another, or a patch.";
      }
      if (this.kind === "image") {
        if (reduced) return state.place.image === 0 ? "Read by the class token; click any patch for the mean over all patches." : "Mean over all patches; single patches are in trace.safetensors.";
        return this.asked < 0 ? "Read by the class token. Click a patch to ask it instead." : `Read by patch ${this.picture.labels[this.before + this.asked].slice(6)} (row, column). Escape goes back to the class token.`;
      }
      if (reduced) return state.place[this.kind] === this.first(this.kind) ? "Read by the outlined word; choose another for the mean over all." : "Mean over all tokens; single ones are in trace.safetensors.";
      return "Read by the outlined word; choose another.";
    }

    drawGrid() {
      const kind = this.kind, { pattern } = this.attentions[kind], [layers, heads] = pattern.shape;
      const signature = `${kind}`;
      if (this.gridOf !== signature) {
        this.gridOf = signature;
        this.thumbs = [];
        const grid = h("div", { class: "grid", role: "group", "aria-label": `${this.name(kind)}: layers by heads` });
        const size = this.thumbSize(kind), wide = Math.max(44, Math.min(size.wide, Math.floor((this.compared ? 600 : 1080) / heads)));
        grid.style.gridTemplateColumns = `auto repeat(${heads}, ${wide}px)`;
        grid.append(h("span"), ...range(heads).map((i) => h("span", { class: "axis" }, `head ${i}`)));
        for (const layer of range(layers)) {
          grid.append(h("span", { class: "axis" }, `layer ${this.block(kind, layer)}`));
          for (const head of range(heads)) {
            const picture = canvas(size.width, size.height);
            const button = h("button", { class: "thumb", type: "button", "data-layer": layer, "data-head": head, onclick: () => set({ mode: "head", layer, head }) }, picture);
            this.thumbs.push({ layer, head, picture, button });
            grid.append(button);
          }
        }
        roving(grid, this.thumbs.map((t) => t.button), heads);
        this.gridBox.replaceChildren(grid);
        const whole = { cross: this.pair ? "Each picture is one head, as the token reads whose state becomes the image’s: the class token, or a probe." : this.data.way === "stream" ? "Each picture is one head, as the first token reads: patches above, question words below." : this.picture ? `Each picture is one head of the decoder for the chosen token${this.words.length ? ": patches above, question words below" : ""}.` : "Each picture is one head of the decoder: answer tokens downwards, text tokens across; the chosen token is outlined.",
          image: "Each picture is one head of the image encoder for the chosen patch.", text: "Each picture is one head of the text encoder: queries downwards, keys across.", encoder: "Each picture is one head of the encoder.", decoder: "Each picture is one head of the decoder’s self-attention: queries downwards, keys across.", stream: "Each picture is one head for the chosen word or patch: patches above, question words below." };
        explain(this.gridLead, `${whole[kind]} Choose one to see it large${kind === "cross" ? " and open it below" : ""}.`);
      }
      const stats = new Map(this.data.heads.map((s) => [`${s[0]}.${s[1]}`, s]));
      for (const { layer, head, picture, button } of this.thumbs) {
        this.drawThumb(picture, kind, layer, head);
        const chosen = state.mode === "head" && layer === this.layer && head === this.head;
        button.setAttribute("aria-pressed", String(chosen));
        const s = stats.get(`${this.attentions[kind].names[layer]}.${head}`);
        const text = `layer ${this.block(kind, layer)} head ${head}: image ${percent(s[3])}, text ${percent(s[4])}, sinks ${percent(s[5])}, entropy ${number(s[2], 2)}` + (s[6] === null ? "" : `, distance ${number(s[6], 1)}`);
        button.setAttribute("aria-label", text);
        button.title = text;
      }
      tabTo(this.thumbs.map((t) => t.button), Math.max(0, this.thumbs.findIndex((t) => t.layer === this.layer && t.head === this.head)));
    }

    asMap(kind) { return this.picture && (kind === "image" || kind === "cross" || kind === "stream"); }

    thumbSize(kind) {
      const { pattern } = this.attentions[kind], rows = pattern.shape[2], keys = pattern.shape[3];
      if (this.asMap(kind)) {
        const [width, height] = this.data.size, words = kind === "image" || this.pair ? 0 : this.wordCount(), scale = 128 / width;
        const tall = Math.round(height * scale), strip = words ? Math.max(8, Math.round(tall * 0.13)) + 3 : 0;
        return { width: 128, height: tall + strip, tall, scale, strip, wide: 150 };
      }
      const cell = Math.max(1, Math.floor(180 / keys));
      const tall = Math.max(1, Math.min(16, Math.floor(96 / rows)));
      return { width: keys * cell, height: rows * (rows === keys ? cell : tall), cell, tall: rows === keys ? cell : tall, wide: 190 };
    }

    wordCount() { return sum(this.words.map(({ source }) => source.labels.length)); }

    drawThumb(picture, kind, layer, head) {
      const context = picture.getContext("2d"), stops = onPage(), size = this.thumbSize(kind);
      context.clearRect(0, 0, picture.width, picture.height);
      if (this.asMap(kind)) {
        const shares = this.shares(kind, "head", layer, head);
        if (this.image.complete) {
          context.globalAlpha = isDark() ? 0.28 : 0.4;
          context.imageSmoothingEnabled = !this.data.pixelated;
          context.drawImage(this.image, 0, 0, picture.width, size.tall);
          context.globalAlpha = 1;
        }
        const patches = this.patches(shares);
        squares(context, patches, this.picture, this.data.size, size.scale, stops, this.top(this.picture, shares) / this.presence(patches, shares));
        if (!size.strip) return;
        let left = 0;
        for (const { source } of this.words) {
          const values = this.of(source, shares), wide = picture.width / this.wordCount(), top = Math.max(this.top(source, shares), 1e-6) / this.presence(values, shares);
          values.forEach((v, i) => {
            context.fillStyle = css(color(stops, Math.min(1, v / top)));
            context.fillRect(left + i * wide, picture.height - size.strip + 3, Math.ceil(wide), size.strip - 3);
          });
          left += values.length * wide;
        }
        context.fillStyle = isDark() ? "#34342f" : "#e2e1d9";
        context.fillRect(0, picture.height - size.strip, picture.width, 1);
        return;
      }
      const { pattern } = this.attentions[kind];
      for (const q of range(pattern.shape[2])) {
        const values = row(pattern, layer, head, q), top = Math.max(1e-9, ...values);
        values.forEach((v, k) => { context.fillStyle = css(color(stops, v / top)); context.fillRect(k * size.cell, q * size.tall, size.cell, size.tall); });
      }
      context.strokeStyle = isDark() ? "#ecebe6" : "#1d1d1b";
      context.strokeRect(0.5, this.query(kind) * size.tall + 0.5, picture.width - 1, Math.max(1, size.tall - 1));
    }

    // -------------------------------------------------------------------------------------------- one head, step by step

    keyName(k) {
      if (!this.data.keys) return { text: "the one averaged key" };
      if (k >= this.data.keys.length) return { text: this.data.read[k - this.data.keys.length].trim() || "␣" };
      const at = this.data.keys[k], source = this.slices.find((s) => at < s.stop), i = at - source.start;
      return source === this.picture && i >= this.before ? { text: source.labels[i], patch: i - this.before } : { text: source.labels[i].trim() };
    }

    drawSteps() {
      const layer = clamp(state.layer, this.attentions.cross.pattern.shape[0]), head = clamp(state.head, this.attentions.cross.pattern.shape[1]);
      const opened = this.opened.get(`${layer}.${head}`);
      explain(this.stepTitle, `${this.name("cross")}${this.data.way === "cross" ? " " : ", "}layer ${this.block("cross", layer)}, head ${head}, step by step`);
      if (!opened) {
        const others = [...this.opened.values()].slice(0, 12).map((o) => h("button", { class: "plain", type: "button", onclick: () => set({ mode: "head", kind: "cross", layer: o.layer, head: o.head }) }, `layer ${this.block("cross", o.layer)} head ${o.head}`));
        this.stepBox.className = "steps";
        this.stepBox.replaceChildren(h("p", { class: "lead" }, "The numbers of this head are not in the page, to keep it small; trace.safetensors has them. The heads that did most for the answer are here:"), h("div", { class: "pickers" }, others));
        return;
      }
      const a = this.numbers(opened), t = this.token, width = a.q.shape[1];
      const dots = row(a.dots, t), mask = row(a.mask, t), lse = a.lse.values[t];
      const scores = dots.map((d, i) => (mask[i] < -1e29 ? -Infinity : d * opened.scale + mask[i]));
      const weights = scores.map((s) => Math.exp(s - lse));
      const q = row(a.q, t), z = row(a.z, t), read = new Float32Array(width);
      weights.forEach((w, k) => row(a.v, k).forEach((v, i) => { read[i] += w * v; }));
      const off = Math.max(...read.map((v, i) => Math.abs(v - z[i])));
      const order = range(weights.length).sort((i, j) => weights[j] - weights[i]);
      const shown = state.all ? order : order.slice(0, 8);
      const largest = Math.max(...weights);
      const token = this.data.tokens[this.token].label.trim();
      const formula = h("div", { class: "formula" }, "weight = exp( q·k × ", h("b", {}, number(opened.scale, 4)), " + mask − LSE ),   LSE = log Σ exp(score) = ", h("b", {}, number(lse, 4)), "\nz      = Σ weight · v");
      const body = shown.map((k) => {
        const { text, patch } = this.keyName(k), meter = h("span", { class: "meter" }, h("i"));
        meter.firstChild.style.width = `${(100 * weights[k]) / largest}%`;
        return h("tr", {}, h("td", { class: "key" }, patch === undefined ? null : this.patchImage(patch), text), h("td", {}, number(dots[k])), h("td", {}, number(dots[k] * opened.scale)), h("td", {}, number(mask[k], 0)), h("td", {}, number(scores[k] - lse)), h("td", {}, h("span", { class: "weight" }, meter, weights[k].toFixed(4))));
      });
      const names = ["key", "q·k", "× scale", "+ mask", "− LSE", "exp: weight"];
      const table = h("table", {}, h("caption", { class: "hidden" }, `keys read by layer ${this.block("cross", layer)} head ${head}`), h("thead", {}, h("tr", {}, names.map((n) => h("th", { scope: "col" }, n)))), h("tbody", {}, body));
      const more = h("button", { class: "plain", type: "button", onclick: () => set({ all: !state.all }) }, state.all ? "Only the strongest 8" : `All ${order.length} keys`);
      const best = order[0];
      const strips = h("div", {}, this.strip(this.pair ? "q of the token that is pooled" : this.data.way === "stream" ? "q of the first token" : `q of “${token}”`, q), this.strip("k, strongest key", row(a.k, best)), this.strip("v, strongest key", row(a.v, best)), this.strip("z = Σ weight · v", read), this.strip("z that ran", z));
      const check = h("p", { class: "explain check" }, `Worked out here, in your browser: the ${weights.length} weights sum to ${sum(weights).toFixed(6)}, and z differs from the one that ran by at most ${off.toExponential(1)} (v travels in half precision).`);
      this.stepBox.className = "steps open";
      this.stepBox.replaceChildren(
        h("div", { class: "full" }, h("p", { class: "lead" }, `What this head did when ${this.pair ? "the image was read" : this.data.way === "stream" ? `“${token}” was read off the first token` : `the decoder wrote “${token}”`}, strongest keys first${this.picture && this.data.keys ? "; a patch by its row and column" : ""}.`), formula),
        h("div", {}, h("div", { class: "scroll" }, table), order.length > 8 ? h("div", { class: "pickers" }, more) : null),
        h("div", {}, strips, check));
    }

    numbers(opened) {
      if (!opened.unpacked) opened.unpacked = Object.fromEntries(["q", "k", "v", "z", "dots", "mask", "lse"].map((n) => [n, unpack(opened[n])]));
      return opened.unpacked;
    }

    strip(name, values) {
      const largest = Math.max(...values.map(Math.abs)) || 1, picture = canvas(values.length, 1, { role: "img" });
      const context = picture.getContext("2d"), swatch = h("i");
      values.forEach((v, i) => { diverging(swatch, v, largest); context.fillStyle = swatch.style.background; context.fillRect(i, 0, 1, 1); });
      const text = Array.from(values, (v) => number(v, 2)).join("  ");
      picture.title = text;
      picture.setAttribute("aria-label", `${name}: ${text}`);
      return h("div", { class: "strip" }, h("span", {}, name), picture);
    }

    patchImage(patch) {
      const { first, stride, grid } = this.picture, { size, image } = this.data, box = h("span", { class: "patch" });
      const corner = [patch % grid[1], Math.floor(patch / grid[1])].map((at) => first + (at - 0.5) * stride);
      const place = corner.map((x, axis) => (size[axis] > stride ? (100 * x) / (size[axis] - stride) : 0));
      box.style.cssText = `display:inline-block;vertical-align:middle;background:url("${image}") ${place[0]}% ${place[1]}% / ${(100 * size[0]) / stride}% ${(100 * size[1]) / stride}% no-repeat`;
      return box;
    }

    // -------------------------------------------------------------------------------------------- lenses

    drawLens() {
      const { lens, attributions, tokens } = this.data, i = this.token, final = tokens[i].label;
      const lines = lens.map((layer, l) => h("tr", {}, h("td", {}, l === 0 ? "embedding" : `after layer ${l - 1}`), layer[i].slice(0, this.compared ? 3 : 4).map(([label, p]) => {
        const guess = h("span", { class: `guess${label === final ? " final" : ""}` }, label.trim() || "␣", h("small", {}, percent(p)));
        shade(guess, p);
        if (p < 0.04) guess.style.color = "";
        return h("td", {}, guess);
      })));
      const left = h("div", {}, h("h3", {}, `What each layer would say for “${final.trim()}”`), h("div", { class: "scroll" }, h("table", { class: "lens" }, h("caption", { class: "hidden" }, "logit lens"), h("tbody", {}, lines))));
      const a = attributions[i];
      if (!a) {
        this.lensBox.replaceChildren(left, h("p", { class: "note" }, "What each head adds to the logit is not shown: the layers over the answers are not linear, so there is no one number for it."));
        return;
      }
      const kinds = Object.keys(a.heads).sort(); // cross before self
      const all = [...Object.values(a.heads).flat(2), ...a.mlps, a.embedding, a.biases], largest = Math.max(...all.map(Math.abs));
      const cell = (value, name) => { const c = h("span", { class: "cell", title: name }, number(value, 2)); diverging(c, value, largest); return h("td", {}, c); };
      const block = (kind, title) => [h("tr", {}, h("th", { scope: "col" }, title), a.heads[kind][0].map((_, n) => h("th", { scope: "col" }, `head ${n}`)), kind === kinds[0] ? h("th", { scope: "col" }, "MLP") : null),
        ...a.heads[kind].map((values, l) => h("tr", {}, h("td", {}, `layer ${l}`), values.map((v, n) => cell(v, `${kind} layer ${l} head ${n}`)), kind === kinds[0] ? cell(a.mlps[l], `MLP of layer ${l}`) : null))];
      const total = sum(all);
      const right = h("div", {}, h("h3", {}, `What wrote “${final.trim()}”: logit ${number(total, 2)} above the mean`), h("div", { class: "scroll" }, h("table", { class: "parts" }, h("caption", { class: "hidden" }, "direct logit attribution"), h("tbody", {}, kinds.flatMap((kind) => block(kind, kind))))), h("p", { class: "note" }, `embedding ${number(a.embedding, 2)}, biases ${number(a.biases, 2)}`));
      this.lensBox.replaceChildren(left, right);
    }

    // -------------------------------------------------------------------------------------------- pointing at patches

    point(event) {
      const box = this.map.getBoundingClientRect(), { grid: [rows, columns], first, stride } = this.picture, { size } = this.data;
      const at = (share, length, count) => clamp(Math.floor((share * length - first) / stride + 0.5), count);
      const column = at((event.clientX - box.left) / box.width, size[0], columns);
      const line = at((event.clientY - box.top) / box.height, size[1], rows);
      this.say(line * columns + column);
    }

    say(patch) {
      this.pointed = patch;
      const columns = this.picture.grid[1], total = sum(this.lastShares.sources) || 1;
      this.note.textContent = `patch in row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}: ${percent(this.patches(this.lastShares)[patch] / total)}`;
    }

    walk(event) {
      const columns = this.picture.grid[1], count = columns * this.picture.grid[0];
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
      if (event.key === "Escape") { set({ place: { ...state.place, image: 0, stream: 0 } }); return; }
      if (step === undefined) return;
      event.preventDefault();
      const next = clamp((this.pointed ?? 0) + step, count);
      this.say(next);
      this.ask(next);
    }
  }

  // ---------------------------------------------------------------------------------------------- the page

  const data = JSON.parse(document.getElementById("data").textContent), main = document.getElementById("studies");
  const preference = matchMedia("(prefers-color-scheme: dark)");
  const theme = (dark) => { document.documentElement.dataset.theme = dark ? "dark" : "light"; toggle.textContent = dark ? "Light" : "Dark"; if (studies.length) refresh(); };
  const toggle = h("button", { class: "plain", type: "button", "aria-label": "switch between light and dark", onclick: () => theme(!isDark()) });
  theme(preference.matches);
  preference.addEventListener("change", (e) => theme(e.matches));
  let before = false; // whether it was dark before it was printed; paper is light
  addEventListener("beforeprint", () => { before = isDark(); theme(false); });
  addEventListener("afterprint", () => theme(before));

  const compared = data.length > 1, text = data[0].text || "Describe the image";
  main.classList.toggle("two", compared);
  const banner = h("p", { class: "eyebrow" }, "Two runs, one input");
  const title = text.length > 140 ? `${text.slice(0, 140)}…` : text;
  main.append(h("header", { class: "top" }, h("div", {}, banner, h("h1", { class: text.length > 90 ? "long" : null }, title)), toggle));
  if (data[0].flows.parts) state.mode = "parts";
  [state.layer, state.head] = data[0].best; // the head that did most for the answer
  studies.push(...data.map((d) => new Study(d, compared)));
  if (!compared) banner.textContent = `${data[0].run} ${studies[0].result()}`;
  main.append(h("div", { class: "columns" }, studies.map((s) => s.element)));
  refresh();
})();
