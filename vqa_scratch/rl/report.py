"""What a run shows: learning curves, the reward-KL frontier, and the same prompts before and after.

Text from data and models is escaped before it goes into HTML.
"""

import difflib
import html
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from vqa_scratch.rl.evaluate import Figures, Frontier  # noqa: E402

LABELS = {"objective/kl_exact": "exact", "objective/kl": "k1, of samples"}  # where lines share a panel


def smooth(values: list[float], weight: float = 0.6) -> list[float]:
    """Exponential moving average without the pull towards 0 at the start; short enough to show a spike."""
    result, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + value, weight * mass + 1
        result.append(total / mass)
    return result


def curves(history: list[dict[str, Any]], parts: list[str], path: Path) -> None:
    """Reward, KL, each reward model apart, finish share, entropy and value fit, over the iterations."""
    panels = [
        ("reward", ["env/reward_mean"]),
        ("KL a response (nats)", ["objective/kl_exact", "objective/kl"]),
        *[(name, [f"env/{name}"]) for name in parts],
        ("finished", ["finish"]),
        ("entropy a token (nats)", ["ppo/policy/entropy"]),
        ("clipped share", ["ppo/policy/clipfrac"]),
        ("variance explained by values", ["ppo/val/var_explained"]),
    ]
    columns = 3
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.7 * rows), squeeze=False)
    x = [line["step"] for line in history]
    for axis, (title, names) in zip(axes.flat, panels, strict=False):
        for i, name in enumerate(names):
            values = [line[name] for line in history]
            axis.plot(x, values, color=f"C{i}", alpha=0.25, linewidth=1)
            axis.plot(x, smooth(values), color=f"C{i}", label=LABELS.get(name))
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("iteration")
    figure.tight_layout()
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def frontier(curve: Frontier, history: list[dict[str, Any]], before: Figures, after: Figures, path: Path) -> None:
    """Reward against KL: the run, where it ended on new prompts, best-of-n, and the best there is."""
    figure, axis = plt.subplots(figsize=(6.4, 4.4))
    axis.plot(curve.kl, curve.reward, color="black", label="best possible (reference reweighted)")
    axis.axvline(curve.limit, color="black", linestyle=":", linewidth=1, label="limit of the estimate: log n")
    if curve.best_of_n:
        _, kl, reward = zip(*curve.best_of_n, strict=True)
        axis.plot(kl, reward, "s", color="C2", markersize=5, label="best of n")
        for n, x, y in curve.best_of_n:
            axis.annotate(str(n), (x, y), textcoords="offset points", xytext=(4, -10), fontsize=8)
    x = smooth([line["objective/kl_exact"] for line in history])
    y = smooth([line["env/reward_mean"] for line in history])
    axis.plot(x, y, color="C0", alpha=0.7, label="this run (training prompts)")
    axis.plot([before.kl], [float(before.rewards.mean())], "o", color="C7", label="before")
    axis.plot([after.kl], [float(after.rewards.mean())], "*", color="C3", markersize=14, label="after (new prompts)")
    axis.set_xlabel("exact KL from the reference, nats a response")
    axis.set_ylabel("reward")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def marked(before: str, after: str) -> tuple[str, str]:
    """Both texts as escaped HTML, the words that are not in the other marked."""
    a, b = before.split(), after.split()
    sides: tuple[list[str], list[str]] = ([], [])
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for side, chosen, tag in ((sides[0], a[a0:a1], "del"), (sides[1], b[b0:b1], "ins")):
            text = html.escape(" ".join(chosen))
            if text:
                side.append(text if kind == "equal" else f"<{tag}>{text}</{tag}>")
    return " ".join(sides[0]), " ".join(sides[1])


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Samples before and after</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; margin-bottom: 1.6rem; }}
td {{ border-top: 1px solid #8884; padding: .35rem .6rem .35rem 0; vertical-align: top; }}
td:first-child {{ width: 6.5rem; opacity: .65; }} td:last-child {{ width: 9rem; text-align: right; opacity: .65; }}
del {{ background: #e5534b33; text-decoration: none; }} ins {{ background: #46954a44; text-decoration: none; }}
</style>
<h1>The same prompts before and after</h1>
<p>{caption}</p>
{tables}
</html>
"""


def samples_page(before: Figures, after: Figures, samples_a_prompt: int, count: int = 24) -> str:
    """HTML: the first response to each of `count` prompts from the reference and from the trained policy."""
    tables = []
    for i in range(0, min(len(before.samples.texts), count * samples_a_prompt), samples_a_prompt):
        prompt = before.samples.prompts[i]
        old, new = marked(before.samples.texts[i], after.samples.texts[i])
        rows = [("prompt", html.escape(prompt.text), "")]
        if prompt.reference:
            rows.append(("reference text", html.escape(prompt.reference), ""))
        for name, text, figures in (("before", old, before), ("after", new, after)):
            cut = "" if figures.samples.finished[i] else " (cut off)"
            scores = " ".join(f"{html.escape(k)} {float(v[i]):+.2f}" for k, v in figures.parts.items())
            rows.append((name + cut, text, f"reward {float(figures.rewards[i]):+.2f}<br><small>{scores}</small>"))
        cells = "\n".join(f"<tr><td>{a}</td><td>{b}</td><td>{c}</td></tr>" for a, b, c in rows)
        tables.append(f"<table>\n{cells}\n</table>")
    caption = (
        f"Mean reward {float(before.rewards.mean()):+.3f} before, {float(after.rewards.mean()):+.3f} after, over "
        f"{len(before.rewards)} responses to prompts never trained on; exact KL {after.kl:.2f} nats a response. "
        "Before is the reference model, after the trained policy. Words that one has and the other has not are marked. "
        "On the right the reward of the response, and below it each part before its weight."
    )
    return PAGE.format(caption=caption, tables="\n".join(tables))
