"""Reports a run of rlhf.py: learning curves, the reward-KL frontier, and the same prompts before and after."""

import difflib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from vqa_scratch.data.news import broken_facts
from vqa_scratch.report.curves import moving_average
from vqa_scratch.report.gallery import write_page
from vqa_scratch.rl.evaluate import Figures, Frontier
from vqa_scratch.rl.types import Prompt
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
    if history and all("facts_kept" in row for row in history):  # where the corpus knows them
        titles |= {"all facts kept": {"kept": "facts_kept"}}
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
            text = escape(" ".join(chosen))
            if text:
                side.append(text if kind == "equal" else f"<{tag}>{text}</{tag}>")
    return " ".join(sides[0]), " ".join(sides[1])


FILTERS = {"facts broken (after)": "broken", "reward fell": "fell"}  # and the class of what they look for


def lost(text: str, prompt: Prompt, kind: str) -> str:
    """HTML: which facts of the prompt a response breaks, and what it says instead; empty if none is known to be."""
    broken = broken_facts(text, prompt.facts)
    said = ""
    for name, instead in broken.items():
        stands = f"<b>{escape(instead)}</b> instead of" if instead else "missing:"
        said += f"<li>{escape(name)}: {stands} {escape(prompt.facts[name])}"
    return f'<ul class="lost {kind}">{said}</ul>' if broken else ""


def pair_card(before: Figures, after: Figures, number: int, each: int) -> str:
    """HTML: the prompt of this number with the first of `each` responses from the reference and from the trained
    policy, and their likeliest ones where they are known."""
    i, sides = number * each, list[str]()
    prompt = before.samples.prompts[i]
    fell = float(before.rewards[i] - after.rewards[i])
    texts = marked(before.samples.texts[i], after.samples.texts[i])
    for name, figures, text in (("before", before, texts[0]), ("after", after, texts[1])):
        parts = ", ".join(f"{escape(part)} {float(values[i]):+.2f}" for part, values in figures.parts.items())
        down = f', <span class="fell">fell by {fell:.2f}</span>' if name == "after" and fell > 0 else ""
        cut = "" if figures.samples.finished[i] else ", cut off"
        broken = lost(figures.samples.texts[i], prompt, "broken" if name == "after" else "")
        likeliest = ""
        if figures.greedy:
            said, reward = figures.greedy[number]
            likeliest = f"<p class=people>greedy, reward {reward:+.2f}: {escape(said) or '(nothing)'}</p>"
        sides.append(
            f"<div><h3>{name}{cut}</h3><p>{text or '(nothing)'}</p>{broken}"
            f"<p class=people>reward {float(figures.rewards[i]):+.2f}{down} ({parts})</p>{likeliest}</div>"
        )
    reference = f"<h3>reference text</h3><p class=people>{escape(prompt.reference)}</p>" if prompt.reference else ""
    return (
        f"<article><div class=text><p class=prompt>{escape(prompt.text)}</p>{reference}"
        f"<div class=pair>{''.join(sides)}</div></div></article>"
    )


def in_words(s: dict[str, Any], parts: Sequence[str]) -> str:
    """The run in one paragraph, from its summary."""
    rise = (s["reward_after"] - s["reward_before"]) / max(s["reward_std_before"], 1e-9)
    facts = ""
    if "facts_kept_before" in s:
        facts = (
            f" All facts of the prompt are kept by {s['facts_kept_after']:.1%} ({s['facts_kept_before']:.1%} before)."
        )
    return (
        f"In {s['iterations']} iterations of {s['algorithm'].upper()} the model learned to write what scores higher: "
        f"{', '.join(parts)}. On {s['prompts_held_out']:,} prompts that it was never trained on, its mean reward went "
        f"from {s['reward_before']:+.2f} to {s['reward_after']:+.2f}, {rise:+.1f} times the spread of its rewards at "
        f"the start. It now writes otherwise than at the start by {s['kl']:.1f} nats a response, and has "
        f"{s['frontier_share']:.0%} of the gain that is possible at this distance. {s['finish_after']:.0%} of its "
        f"responses end by themselves ({s['finish_before']:.0%} before).{facts} Below, one response of before and one "
        "of after to each prompt; words that one has and the other has not are marked."
    )


def write_samples(path: Path, summary: dict[str, Any], before: Figures, after: Figures, samples_a_prompt: int) -> None:
    """samples.html: the run in plain words, and the first response to each prompt before and after, with filters."""
    each = samples_a_prompt
    cards = [pair_card(before, after, number, each) for number in range(len(before.samples.texts) // each)]
    lead = in_words(summary, list(before.parts))
    write_page(path, "The same prompts before and after", lead, [("prompts", cards)], FILTERS)
