// The figures of one study: what is chosen in it, and the weights, shares and sentences that follow.
import { mean, row, strongest, unpack } from "./arrays.js";
import { amount, clamp, number, percent, range, shown, sum } from "./dom.js";
import { KINDS, WAYS } from "./words.js";

export const unpackFlows = (flows) => Object.fromEntries(Object.entries(flows).map(([name, f]) => [name, { sources: unpack(f.sources), decoder: unpack(f.decoder) }]));
const positive = (values) => values.map((v) => Math.max(0, v));

export function result(data) {
  const { text, probability } = data.answer, said = amount(probability, data.measure);
  return data.measure === "similarity" ? `gives the text and the image a similarity of ${said}` : `answered “${text || "(nothing)"}”, probability ${said}`;
}

/** `shared` is what all studies of a page have: view (what is chosen), set(changes), hooks, compared. */
export class Study {
  constructor(data, shared) {
    Object.assign(this, { data, shared, hover: null });
    this.pair = data.measure === "similarity"; // an image and a text are compared; nothing is written
    this.attentions = {};
    for (const [kind, a] of Object.entries(data.attentions)) this.attentions[kind] = { ...a, pattern: unpack(a.pattern) };
    this.flows = unpackFlows(data.flows);
    this.mixing = data.mixing ? unpack(data.mixing) : null;
    this.opened = new Map(data.opened.map((o) => [`${o.layer}.${o.head}`, o]));
    this.slices = [];
    for (const source of data.sources) { const start = this.slices.at(-1)?.stop ?? 0; this.slices.push({ ...source, start, stop: start + source.labels.length }); }
    this.picture = this.slices.find((s) => s.grid) || null;
    // How many tokens of the picture stand before its patches: class token, registers.
    this.before = this.picture ? this.picture.labels.length - this.picture.grid[0] * this.picture.grid[1] : 0;
    this.texts = this.slices.filter((s) => !s.image && s.name !== data.sound?.source);
  }

  get view() { return this.shared.view; }
  set(changes) { this.shared.set(changes); }
  amount(x) { return amount(x, this.data.measure); }
  get token() { return this.hover === null ? clamp(this.view.token, this.data.tokens.length) : this.hover; }
  get row() { return this.data.tokens[this.token].row; }
  get label() { return shown(this.data.tokens[this.token].label); }
  get kind() { return this.attentions[this.view.kind] ? this.view.kind : "cross"; }
  get layer() { return clamp(this.view.layer, this.attentions[this.kind].pattern.shape[0]); }
  get head() { return clamp(this.view.head, this.attentions[this.kind].pattern.shape[1]); }
  get mode() { return this.flows[this.view.mode] || ["mean", "layer", "head"].includes(this.view.mode) ? this.view.mode : "relevancy"; }
  /** The number of the block in which a layer of an attention stands: maybe not every block of the writer reads sources. */
  block(kind, layer) { return this.attentions[kind].names[layer].split(".")[1]; }
  /** What a kind of attention is called. */
  name(kind) { return kind === "cross" ? WAYS[this.data.way] : this.pair && kind === "text" ? "Inside the text" : KINDS[kind] ?? `Inside the ${kind}`; }
  /** The token that is asked first inside a source. */
  first(kind) { return (this.slices.find((s) => s.name === kind) || { asked: 0 }).asked; }
  place(kind) { return this.view.place[kind] ?? this.first(kind); }

  /** Which row of an attention's pattern is asked for. */
  query(kind, token = this.token) {
    const a = this.attentions[kind];
    if (kind === "cross") return token; // one row an answer token
    if (kind === "decoder") return a.rows ? 1 : this.data.tokens[token].row;
    return a.rows ? (this.place(kind) === this.first(kind) ? 0 : 1) : clamp(this.place(kind), a.pattern.shape[2]);
  }

  /** Which patch is asked inside the image or the stream; below 0 for none. */
  get asked() {
    if (!this.picture || (this.kind !== "image" && this.kind !== "stream")) return -1;
    const from = this.kind === "stream" ? this.picture.start : 0;
    return clamp(this.place(this.kind), from + this.picture.labels.length) - from - this.before;
  }

  ask(patch) {
    if (this.kind !== "image" && this.kind !== "stream") return;
    const from = this.kind === "stream" ? this.picture.start : 0;
    this.set({ place: { ...this.view.place, [this.kind]: from + this.before + patch } });
  }

  /** Weights of one head, of a layer's mean or of all, over that attention's keys. */
  weights(kind, mode, layer, head, query = this.query(kind)) {
    const { pattern } = this.attentions[kind], [layers, heads] = pattern.shape;
    if (mode === "head") return row(pattern, layer, head, query);
    const chosen = mode === "layer" ? [layer] : range(layers);
    return mean(chosen.flatMap((l) => range(heads).map((i) => row(pattern, l, i, query))));
  }

  /** Shares of the tokens of every source, and of the answer so far, for what is chosen. */
  shares({ kind = this.kind, mode = this.mode, layer = this.layer, head = this.head, token = this.token } = {}) {
    const total = this.slices.at(-1).stop;
    if (kind === "cross" && this.flows[mode === "mean" ? "cross" : mode]) return this.flowShares(this.flows, mode, token);
    const values = this.weights(kind, mode, layer, head, this.query(kind, token));
    if (kind === "decoder") return { sources: new Float32Array(total), own: values };
    const sources = new Float32Array(total), { keys } = this.data;
    if (kind === "stream") sources.set(values);
    else if (kind !== "cross") sources.set(values, this.slices.find((s) => s.name === kind).start);
    else if (this.mixing) range(this.mixing.shape[0]).forEach((k) => row(this.mixing, k).forEach((m, s) => { sources[s] += values[k] * m; }));
    else keys.forEach((s, k) => { sources[s] += values[k]; });
    return { sources, own: kind === "cross" && keys ? values.subarray(keys.length) : new Float32Array(0) };
  }

  /** The row of a map, of this study or of the unchanged one, that is about a token of the answer. */
  flowShares(flows, mode, token) {
    const flow = flows[mode === "mean" ? "cross" : mode], at = this.data.tokens[token].row;
    const sources = Float32Array.from(row(flow.sources, at)), own = row(flow.decoder, at);
    if (mode === "relevancy" && this.data.way === "stream") sources[0] -= 1; // the rules start from the identity
    if (this.pair) return { sources: positive(sources), own: new Float32Array(0) };
    const scores = mode === "activation" && sum(sources); // not shares
    return { sources: scores ? sources.map((v) => v / scores) : sources, own };
  }

  of(source, shares) { return shares.sources.subarray(source.start, source.stop); }
  patches(shares) { return this.of(this.picture, shares).subarray(this.before); }

  /** What gets full colour: the largest share among tokens with content, 3 times the mean at least; more for a source with less than a 20th. */
  top(source, shares) {
    const all = this.of(source, shares), values = Array.from(all).filter((_, i) => !source.sinks.includes(i));
    const presence = Math.max(1e-6, Math.min(1, (20 * sum(all)) / (sum(shares.sources) || 1)));
    return Math.max(1e-9, (3 * sum(values)) / (values.length || 1), ...values) / presence;
  }

  masses(shares) {
    const own = sum(shares.own), start = this.mode === "relevancy" && this.kind === "cross" ? 1 : 0; // as in flowShares()
    const groups = { image: 0, text: 0, sink: 0, own: Math.max(0, own - start) };
    for (const source of this.slices) this.of(source, shares).forEach((v, i) => { groups[source.sinks.includes(i) ? "sink" : source.image ? "image" : "text"] += v; });
    const total = sum(Object.values(groups)) || 1;
    return Object.fromEntries(Object.entries(groups).map(([name, share]) => [name, share / total]));
  }

  /** Which words a source token feeds: [label, share, index in the answer], largest first; in a stream also those that read it, index −1. */
  feeds(s) {
    const written = this.data.tokens.map((t, token) => {
      const { sources } = this.shares({ token });
      return [shown(t.label), sources[s] / (sum(sources) || 1), token];
    });
    const { stream } = this.attentions, words = !stream || stream.rows ? [] : this.texts.flatMap((source) => source.labels.flatMap((label, i) =>
      (source.sinks.includes(i) ? [] : [[shown(label), this.weights("stream", "mean", 0, 0, source.start + i)[s], -1]])));
    return [...written, ...words].sort((a, b) => b[1] - a[1]);
  }

  /** What the pictures show, as a sentence. */
  inWords(shares) {
    const parts = [], total = sum(shares.sources) || 1;
    if (this.picture) {
      const values = this.patches(shares), columns = this.picture.grid[1];
      parts.push("strongest patches " + strongest(values, 3).map((i) => `row ${Math.floor(i / columns) + 1} column ${(i % columns) + 1} (${percent(values[i] / total)})`).join(", "));
    }
    for (const source of this.texts) {
      const values = this.of(source, shares);
      if (this.pair && this.kind !== "text") continue;
      parts.push("strongest words " + strongest(values, 3).map((i) => `${source.labels[i].trim()} (${percent(values[i] / total)})`).join(", "));
    }
    const what = this.kind === "cross" ? `${this.mode} for token ${this.data.tokens[this.token].label.trim()}` : this.name(this.kind);
    const layer = this.block(this.kind, this.layer), which = this.mode === "head" ? `, layer ${layer} head ${this.head}` : this.mode === "layer" ? `, layer ${layer}` : "";
    return `${what}${which}: ${parts.join("; ")}`;
  }

  /** Who looks, inside a source. */
  whose() {
    const { kind, asked, picture } = this, image = kind === "image";
    if (kind === "decoder") return "Read by the chosen token, from the tokens before it.";
    if (this.attentions[kind].rows) {
      const first = { image: "the class token; click any patch", stream: "the first token; choose a word or a patch" }[kind] ?? "the outlined word; choose another";
      return this.place(kind) === this.first(kind) ? `Read by ${first} for the mean over all.` : "Mean over all tokens; single ones are in trace.safetensors.";
    }
    if (asked >= 0) return `Read by patch ${picture.labels[this.before + asked].slice(6)} (row, column). ${image ? "Escape goes back to the class token." : "Choose a word or another patch."}`;
    return image ? "Read by the class token. Click a patch to ask it instead." : `Read by the outlined word; choose another${kind === "stream" ? ", or a patch" : ""}.`;
  }

  /** The token behind a key of the attention that reads the sources: {text, source, patch}. */
  keyName(k) {
    if (!this.data.keys) return { text: "the one averaged key" };
    if (k >= this.data.keys.length) return { text: shown(this.data.read[k - this.data.keys.length]) };
    const at = this.data.keys[k], source = this.slices.find((s) => at < s.stop), i = at - source.start;
    const patch = source === this.picture && i >= this.before ? i - this.before : undefined;
    return { text: patch === undefined ? source.labels[i].trim() : source.labels[i], source, patch, index: i };
  }

  /** Whether an edit, or its like with another scale, is in force. */
  edited(part) {
    const same = (edit) => ["kind", "name", "head", "source", "token"].every((key) => edit[key] === part[key]);
    return (this.shared.hooks.edits?.() ?? []).find(same);
  }
  headPart(kind, layer, head, scale = 0) { return { kind: "head", name: this.attentions[kind].names[layer], head, scale }; }
  sourcePart(source, token) { return { kind: "source", source: source.name, token }; }
}
