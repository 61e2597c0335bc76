// Colours of shares and of differences, and ink that can be read on them.

export const OVER_IMAGE = [[0, [255, 236, 160, 0]], [0.25, [255, 205, 90, 0.45]], [0.55, [245, 130, 50, 0.68]], [1, [190, 20, 80, 0.86]]];
export const ON_LIGHT = [[0, [255, 236, 160, 0]], [0.2, [255, 214, 120, 0.55]], [0.55, [245, 130, 50, 0.85]], [1, [190, 20, 80, 1]]];
const ON_DARK = [[0, [130, 20, 90, 0]], [0.2, [140, 20, 90, 0.4]], [0.6, [240, 110, 50, 0.9]], [1, [255, 222, 130, 1]]];
// From less to more over an image: blue, nothing, orange; -1 is at 0, 1 at 1.
export const DIFFERENCE = [[0, [20, 60, 170, 0.9]], [0.25, [70, 130, 235, 0.6]], [0.5, [255, 255, 255, 0]], [0.75, [245, 140, 50, 0.6]], [1, [190, 60, 0, 0.9]]];
export const isDark = () => document.documentElement.dataset.theme === "dark";

/** Light or dark as the system is, until `button` is pressed, and light on paper; `redraw` follows each change. */
export function themed(button, redraw) {
  const preference = matchMedia("(prefers-color-scheme: dark)"), set = (dark) => {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    button.textContent = dark ? "Light" : "Dark";
    redraw();
  };
  let before = false; // whether it was dark before it was printed
  set(preference.matches);
  preference.addEventListener("change", (event) => set(event.matches));
  button.addEventListener("click", () => set(!isDark()));
  addEventListener("beforeprint", () => { before = isDark(); set(false); });
  addEventListener("afterprint", () => set(before));
}
export const onPage = () => (isDark() ? ON_DARK : ON_LIGHT);

/** The colour [red, green, blue, opacity] at a share from 0 to 1 of a ramp. */
export function color(stops, share) {
  const s = Math.max(0, Math.min(1, share));
  let i = 1;
  while (i < stops.length - 1 && stops[i][0] < s) i += 1;
  const [[a, from], [b, to]] = [stops[i - 1], stops[i]];
  return from.map((v, c) => v + ((to[c] - v) * (s - a)) / (b - a));
}
export const css = ([r, g, b, a]) => `rgb(${Math.round(r)} ${Math.round(g)} ${Math.round(b)} / ${a.toFixed(3)})`;

const CARD = { light: [255, 255, 255], dark: [31, 31, 29] }, SUNK = { light: [243, 242, 236], dark: [25, 25, 24] };

/** Relative luminance of an opaque colour, as WCAG 2 defines it. */
function luminance(rgb) {
  const [r, g, b] = rgb.map((v) => { const c = v / 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/** A colour over the card or another ground, and black or white ink on it, whichever has more contrast (4.5 at least). */
function paint(element, c, ground) {
  const below = ground[isDark() ? "dark" : "light"], mixed = [0, 1, 2].map((i) => c[i] * c[3] + below[i] * (1 - c[3]));
  element.style.background = css([...mixed, 1]);
  element.style.color = luminance(mixed) > 0.179 ? "#000000" : "#ffffff";
}

/** Background by share; ink as usual where there is hardly any. */
export function shade(element, share, least = 0.02) {
  paint(element, color(onPage(), share || 0), CARD);
  if (!(share >= least)) element.style.color = "";
}

/** Blue below zero, orange above. */
export function diverging(element, value, largest) {
  const share = Math.min(1, Math.abs(value) / (largest || 1));
  const base = value >= 0 ? (isDark() ? [255, 154, 92] : [214, 90, 24]) : (isDark() ? [127, 176, 255] : [43, 99, 184]);
  paint(element, [...base, 0.75 * share], SUNK);
  return element;
}

