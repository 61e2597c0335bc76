// What the page shows, as a link or a file that another can open. Everything read from one is checked field by field.

const VERSION = 1;
const LONGEST_LINK = 8000; // characters; some programs cut longer ones

class Wrong extends Error {}
/** The value, if it is good. */
function checked(good, value, where, what) {
  if (!good) throw new Wrong(`${where} must be ${what}`);
  return value;
}

const text = (most) => (value, where) => checked(typeof value === "string" && value.length <= most, value, where, `a text of at most ${most} characters`);
const number = (low, high) => (value, where) => checked(typeof value === "number" && value >= low && value <= high, value, where, `a number from ${low} to ${high}`);
const whole = (low, high) => (value, where) => checked(Number.isInteger(value) && value >= low && value <= high, value, where, `a whole number from ${low} to ${high}`);
const list = (item, least, most) => (value, where) =>
  checked(Array.isArray(value) && value.length >= least && value.length <= most, value, where, `a list of ${least} to ${most}`).map((each, i) => item(each, `${where} ${i + 1}`));
/** An object of exactly these fields. */
const fields = (checks) => (value, where) => {
  checked(value !== null && typeof value === "object" && !Array.isArray(value), value, where, "an object");
  const strange = Object.keys(value).find((key) => !Object.hasOwn(checks, key));
  checked(strange === undefined, value, where, `without “${String(strange).slice(0, 40)}”`);
  return Object.fromEntries(Object.entries(checks).map(([name, check]) => [name, check(value[name], `${where}, ${name}`)]));
};
/** One of several objects, told apart by the value of `key`, or by which keys they have. */
const either = (choices, key) => (value, where) => {
  const found = Object.keys(choices).find((name) => value && typeof value === "object" && (key ? value[key] === name : Object.hasOwn(value, name)));
  return choices[checked(found !== undefined, found, where, `one of ${Object.keys(choices).join(", ")}`)](value, where);
};

const data = (kinds, what) => (value, where) => checked(typeof value === "string" && new RegExp(`^data:${kinds};base64,[A-Za-z0-9+/=]*$`).test(value), value, where, `${what} as a data URL`);
const PICTURE = either({
  scene: fields({ scene: text(200) }),
  objects: fields({ objects: list(fields({ shape: text(20), color: text(20), size: text(20), x: number(-4096, 4096), y: number(-4096, 4096) }), 0, 64) }),
  data: fields({ data: data("image/(png|jpeg|webp|gif|bmp)", "a picture") }),
  sound: fields({ sound: data("audio/(wav|x-wav)", "a sound") }),
});
const KIND = text(9), NAME = text(80), HEAD = whole(0, 4095), QUESTION = text(4000);
const EDIT = either({
  head: fields({ kind: KIND, name: NAME, head: HEAD, scale: number(-10, 10) }),
  layer: fields({ kind: KIND, name: NAME }),
  source: fields({ kind: KIND, source: NAME, token: whole(0, 1e6) }),
  key: fields({ kind: KIND, key: whole(0, 1e6) }),
  patch: fields({ kind: KIND, name: NAME, head: (value, where) => (value === null ? null : HEAD(value, where)), from: fields({ picture: PICTURE, question: QUESTION }) }),
}, "kind");
const SIDE = fields({ model: text(200), edits: list(EDIT, 0, 64), start: list(whole(0, 1e7), 0, 500) });
const VIEW = (value, where) => checked(typeof value === "object" && JSON.stringify(value).length < 2000, value, where, "a small object"); // the study knows what fits
const STATE = fields({ picture: PICTURE, question: QUESTION, temperature: number(0, 5), seed: whole(0, 2 ** 31 - 1), sides: list(SIDE, 1, 2), view: VIEW });

/** {state} or {problem: one line} of a JSON text. `from` names what is read: "link", "file". */
export function read(json, from) {
  try {
    const made = JSON.parse(json), { version, ...state } = made && typeof made === "object" ? made : {};
    if (version === undefined) throw new Wrong("it holds no state of this page");
    if (version !== VERSION) throw new Wrong(`it is of version ${String(version).slice(0, 20)}, and this page reads version ${VERSION}`);
    return { state: STATE(state, "its state") };
  } catch (error) {
    return { problem: `The ${from} was not followed: ${error instanceof Wrong ? error.message : "it is no JSON"}.` };
  }
}

export const written = (state) => JSON.stringify({ version: VERSION, ...state });

/** The part of the address after #, or null if the state is too large for one, as with a picture of one's own. */
export function hash(state) {
  const bytes = new TextEncoder().encode(written(state));
  if (bytes.length > LONGEST_LINK) return null;
  return `#${btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "")}`;
}

/** As `read`, of the part of an address after #. */
export function followed(hashed) {
  try {
    const bytes = Uint8Array.from(atob(hashed.slice(1).replaceAll("-", "+").replaceAll("_", "/")), (c) => c.charCodeAt(0));
    return read(new TextDecoder("utf-8", { fatal: true }).decode(bytes), "link");
  } catch {
    return { problem: "The link was not followed: it is cut short, or none of this page." };
  }
}
