// The proof that the weights shown are those that ran, whole and as a mark for every view.
import { h, number, section } from "./dom.js";

const MOST = 1e-5;
const power = (value) => value.toExponential(1).replace("-", "−");
// fp32 rounds in proportion: outputs of size 30 may differ by 30 times what outputs of size 1 may.
const differences = (c) => [[c.mass, 1], [c.output, Math.max(1, c.size)], [c.softmax, 1]];

/** Shown against ran, beside the title of a view: red above 1e-5. */
export function badge(study) {
  const worst = Math.max(...differences(study.data.certificate).map(([value, size]) => value / size)), good = worst <= MOST;
  return h("span", { class: `badge ${good ? "good" : "bad"}`, title: "The largest difference between the weights shown and those that ran; see the certificate." },
    `${good ? "✓" : "✗"} shown = ran ${good ? "to" : "only to"} ${power(worst)}`);
}

export function certificateView(study) {
  const c = study.data.certificate;
  const item = ([value, size], name, meaning) => h("div", {},
    h("b", { class: value <= MOST * size ? "good" : "bad" }, power(value)), h("span", {}, h("span", {}, name), h("br"), meaning));
  const [mass, output, softmax] = differences(c);
  return section("certificate", "Certificate", badge(study),
    h("p", { class: "lead" }, `The weights on this page were rebuilt from q, k and each row’s log-sum-exp while the model ran its own attention. These are the largest differences over ${c.rows.toLocaleString("en")} rows of ${c.attentions} attentions.`),
    h("div", { class: "proofs" },
      item(mass, "max |ΣP − 1|", "each row of weights is whole"),
      item(output, "max |P V − O|", `they give what the kernel returned, numbers up to ${number(c.size, 1)}`),
      item(softmax, "max |P − softmax|", "they are the explicit softmax")),
    h("p", { class: "note" }, "In the pictures of this page a weight has 8 bits, relative to its row; the numbers of an opened head have 32."));
}
