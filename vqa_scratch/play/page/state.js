// What the page shows, as a link or a file that another can open. Everything read from one is checked field by field.

export const VERSION = 1;
const LONGEST_LINK = 8000; // characters; some programs cut longer ones

class Wrong extends Error {}
function want(good, where, what) {
  if (!good) throw new Wrong(`${where} must be ${what}`);
}

const text = (most) => (value, where) => {
  want(typeof value === "string" && value.length <= most, where, `a text of at most ${most} characters`);
  return value;
};
const number = (low, high, whole = true) => (value, where) => {
  const good = typeof value === "number" && value >= low && value <= high && (!whole || Number.isInteger(value));
  want(good, where, `${whole ? "a whole number" : "a number"} from ${low} to ${high}`);
  return value;
};
const list = (item, most) => (value, where) => {
  want(Array.isArray(value) && value.length <= most, where, `a list of at most ${most}`);
  return value.map((each, i) => item(each, `${where} ${i + 1}`));
};
/** An object of exactly these fields; one that ends in "?" may be missing. */
const fields = (checks) => (value, where) => {
  want(value !== null && typeof value === "object" && !Array.isArray(value), where, "an object");
  const entries = Object.entries(checks).map(([name, check]) => [name.replace("?", ""), check, name.endsWith("?")]);
  const strange = Object.keys(value).find((key) => !entries.some(([name]) => name === key));
  want(strange === undefined, where, `without “${String(strange).slice(0, 40)}”`);
  const here = entries.filter(([name, , optional]) => !optional || value[name] !== undefined);
  return Object.fromEntries(here.map(([name, check]) => [name, check(value[name], `${where}, ${name}`)]));
};
/** One of several objects, told apart by the value of `key`, or by which keys they have. */
const either = (choices, key) => (value, where) => {
  const found = Object.keys(choices).find((name) => (key ? value?.[key] === name : typeof value === "object" && value && name in value));
  want(found !== undefined, where, `one of ${Object.keys(choices).join(", ")}`);
  return choices[found](value, where);
};

const ID = (value, where) => (typeof value === "number" ? number(-1, 1e15)(value, where) : text(200)(value, where));
const drawn = (value, where) => {
  want(typeof value === "string" && /^data:image\/(png|jpeg|webp|gif|bmp);base64,[A-Za-z0-9+/=]*$/.test(value), where, "a picture as a data URL");
  return value;
};
const place = number(-4096, 4096, false);
const PICTURE = either({
  scene: fields({ scene: ID }),
  objects: fields({ objects: list(fields({ shape: text(20), color: text(20), size: text(20), x: place, y: place }), 64) }),
  data: fields({ data: drawn }),
});
const NAME = text(80), HEAD = number(0, 4095), QUESTION = text(4000);
const EDIT = either({
  key: fields({ kind: text(9), key: number(0, 1e6) }),
  head: fields({ kind: text(9), name: NAME, head: HEAD, scale: number(-10, 10, false) }),
  layer: fields({ kind: text(9), name: NAME }),
  source: fields({ kind: text(9), source: NAME, token: number(0, 1e6) }),
  patch: fields({
    kind: text(9), name: NAME, head: (value, where) => (value === null ? null : HEAD(value, where)),
    from: fields({ picture: PICTURE, question: QUESTION }),
  }),
}, "kind");
const SIDE = fields({ model: text(200), edits: list(EDIT, 200), start: list(number(0, 1e7), 500) });
const VIEW = (value, where) => {
  want(value === null || (typeof value === "object" && JSON.stringify(value).length < 2000), where, "a small object");
  return value; // which values fit is for the study to judge, which knows its layers
};
const STATE = fields({
  picture: PICTURE, question: QUESTION, temperature: number(0, 5, false), seed: number(0, 2 ** 31 - 1),
  sides: (value, where) => { want(value?.length > 0, where, "one or two runs"); return list(SIDE, 2)(value, where); },
  "view?": VIEW,
});

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
