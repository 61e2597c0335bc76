// Reads the packed arrays of a study.
import { range } from "./dom.js";

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

/** {kind, shape, data} -> {shape, values: Float32Array} */
export function unpack(packed) {
  const raw = bytes(packed.data), { kind, shape } = packed;
  if (kind === "f32") return { shape, values: new Float32Array(raw.buffer) };
  const scales = new Float32Array(bytes(packed.scale).buffer), width = shape.at(-1);
  return { shape, values: Float32Array.from(raw, (b, i) => b * scales[Math.floor(i / width)]) };
}

/** One row along the last axis. */
export function row(array, ...index) {
  let at = 0;
  index.forEach((i, axis) => { at = at * array.shape[axis] + i; });
  const width = array.shape.at(-1);
  return array.values.subarray(at * width, (at + 1) * width);
}

export function mean(rows) {
  const result = new Float32Array(rows[0].length);
  for (const values of rows) values.forEach((v, i) => { result[i] += v / rows.length; });
  return result;
}

/** The places of the largest values, largest first; `by` says what is compared. */
export const strongest = (values, many = values.length, by = (v) => v) =>
  range(values.length).sort((a, b) => by(values[b]) - by(values[a])).slice(0, many);
