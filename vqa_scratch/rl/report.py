"""Reports a run of rlhf.py: learning curves, the reward-KL frontier, and the same prompts before and after."""

import difflib
import html
from pathlib import Path
from typing import Any

from vqa_scratch.report.curves import moving_average
from vqa_scratch.rl.evaluate import Figures, Frontier
from vqa_scratch.storage import write_whole

SMOOTH = 4  # iterations that a smooth line averages: few enough to show a spike


def panels(history: list[dict[str, Any]], parts: list[str]) -> list[dict[str, Any]]:
    """For curves.png: reward, KL, each reward model, finished share, entropy and value fit, over the iterations."""
    titles = {
        "reward": {"reward": "env/reward_mean"},
        "KL a response (nats)": {"exact": "objective/kl_exact", "k1, of samples": "objective/kl"},
        **{name: {name: f"env/{name}"} for name in parts},
        "finished": {"finished": "finish"},
        "entropy a token (nats)": {"entropy": "ppo/policy/entropy"},
        "clipped share": {"clipped": "ppo/policy/clipfrac"},
        "variance explained by values": {"explained": "ppo/val/var_explained"},
    }
    steps, result = [row["step"] for row in history], []
    for title, names in titles.items():
        values = {label: [row[name] for row in history] for label, name in names.items()}
        lines = {label: (steps, moving_average(ys, SMOOTH)) for label, ys in values.items()}
        faint = [(steps, ys) for ys in values.values()]
        result.append({"title": title, "xlabel": "iteration", "ylabel": "", "lines": lines, "faint": faint})
    return result


def frontier(curve: Frontier, history: list[dict[str, Any]], before: Figures, after: Figures, path: Path) -> None:
    """Reward against KL: the run, its result on new prompts, best-of-n, and the best possible."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4))
    axis = figure.subplots()
    axis.plot(curve.kl, curve.reward, color="black", label="best possible (reference reweighted)")
    axis.axvline(curve.limit, color="black", linestyle=":", linewidth=1, label="limit of the estimate: log n")
    if curve.best_of_n:
        _, kl, reward = zip(*curve.best_of_n, strict=True)
        axis.plot(kl, reward, "s", color="C2", markersize=5, label="best of n")
        for n, *place in curve.best_of_n:
            axis.annotate(str(n), (place[0], place[1]), textcoords="offset points", xytext=(4, -10), fontsize=8)
    x = moving_average([row["objective/kl_exact"] for row in history], SMOOTH)
    y = moving_average([row["env/reward_mean"] for row in history], SMOOTH)
    axis.plot(x, y, color="C0", alpha=0.7, label="this run (training prompts)")
    axis.plot([before.kl], [float(before.rewards.mean())], "o", color="C7", label="before")
    axis.plot([after.kl], [float(after.rewards.mean())], "*", color="C3", markersize=14, label="after (new prompts)")
    axis.set_xlabel("exact KL from the reference, nats a response")
    axis.set_ylabel("reward")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    write_whole(path, lambda unfinished: figure.savefig(unfinished, dpi=110, format="png"))


def marked(before: str, after: str) -> tuple[str, str]:
    """Both texts as escaped HTML; words that the other text lacks are marked."""
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
