// Requests to the server. One that is gone is reported once, and asked again every second until it is back.

/** What the server had against a request, in its own line. */
export class Refusal extends Error {}

/** Sends "lost" and "found". */
export const server = new EventTarget();
let here = true;
const token = new URLSearchParams(location.search).get("token"); // of a server that others can reach

/** Where something is asked for, with the token if there is one. */
function api(path) {
  const address = new URL(`api/${path}`, location.origin);
  if (token !== null) address.searchParams.set("token", token);
  return address;
}

function heard(answered) {
  if (answered === here) return;
  here = answered;
  server.dispatchEvent(new Event(here ? "found" : "lost"));
  if (!here) knock();
}

async function knock() {
  while (!here) {
    await new Promise((go) => setTimeout(go, 1000));
    await fetch(api("models")).then(() => heard(true), () => {});
  }
}

function gone(error) {
  if (error.name === "AbortError") throw error;
  heard(false);
  throw new Refusal("The server does not answer.");
}

/** The response to a GET, or with a body to a POST: a Blob as it is, all else as JSON. Throws Refusal, or AbortError. */
export async function request(path, body, signal) {
  const raw = body instanceof Blob, headers = { "Content-Type": raw ? body.type : "application/json" };
  const post = body === undefined ? {} : { method: "POST", headers, body: raw ? body : JSON.stringify(body) };
  const response = await fetch(api(path), { ...post, signal }).catch(gone);
  heard(true);
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  throw new Refusal(said.error || `The server refused: ${response.status} ${response.statusText}`);
}

export const json = async (...what) => (await request(...what)).json().catch(gone);

/** The objects of an answer that comes line by line, each as soon as it is here. */
export async function* lines(path, body, signal) {
  const reader = (await request(path, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", ended = false; !ended;) {
    const { done, value } = await reader.read().catch(gone), parts = (rest + (value ?? "")).split("\n");
    ended = done;
    rest = done ? "" : parts.pop();
    for (const line of parts.filter(Boolean).map((part) => JSON.parse(part))) {
      if (line.error) throw new Refusal(line.error);
      yield line;
    }
  }
}

/** Runs `work(signal)` once at a time. Calls meanwhile become one more run after it; `stop` ends the one that runs. */
export function newest(work) {
  let running = null, again = false;
  return {
    async start() {
      again = running !== null;
      if (again) return;
      do {
        again = false;
        running = new AbortController();
        await work(running.signal).catch((error) => { if (error.name !== "AbortError") throw error; });
      } while (again);
      running = null;
    },
    stop() { again = false; running?.abort(); },
  };
}
