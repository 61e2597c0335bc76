"""What `evaluate` computes: scores of a run on a data set, blind baselines, and the tables it prints."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vqa_scratch.data.vqa_v2 import VQAData, VQASample, read_vqa
from vqa_scratch.errors import UserError
from vqa_scratch.metrics import accuracy_by
from vqa_scratch.storage import read_json
from vqa_scratch.systems.base import System
from vqa_scratch.systems.scoring import blind_baselines, rules_of, score


def baselines_of(data: Path, samples: list[VQASample]) -> dict[str, float | None]:
    """Accuracy of `TypePrior` and `QuestionOnly`, learned from the train split of `data`.

    If that split cannot be read, None for both and a note on stderr.
    """
    try:
        train = read_vqa(data, "train").samples
    except UserError as error:
        print(f"note: no prior and question-only baselines, since there is no train split ({error})", file=sys.stderr)
        return {"prior": None, "question_only": None}
    return {**blind_baselines(samples, train)}


def evaluation(run: System, data: Path, split: str, samples: list[VQASample], limit: int | None) -> tuple[dict, dict]:
    """(figures of a split with annotations, answers by question id)."""
    answers = run.answer(samples, limit, progress="answering")
    shuffled = run.answer(samples, limit, shuffled=True, progress="shuffled images")
    scored = [s for s in samples if s.question_id in answers]
    texts = {i: a.text for i, a in answers.items()}
    breakdowns = {key: accuracy_by(scored, texts, key) for key in ("answer_type", "question_type")}
    counts = {key: {name: group.count for name, group in b.groups.items()} for key, b in breakdowns.items()}
    baselines = baselines_of(data, scored)
    baselines["shuffled_images"] = score(scored, shuffled).accuracy
    figures = {
        "data": str(data),
        "split": split,
        "questions": len(scored),
        "accuracy": breakdowns["answer_type"].overall.accuracy,
        "accuracy_lenient": accuracy_by(scored, texts, lenient=True).overall.accuracy,
        "scored_by": rules_of(scored),
        **{f"accuracy_by_{k}": {n: group.accuracy for n, group in b.groups.items()} for k, b in breakdowns.items()},
        "counts": counts,
        "baselines": baselines,
        **run.figures(answers),
    }
    ranked = run.answer(samples, limit, progress="ranking", ranked=True)
    if ranked:
        figures |= {"ranking_accuracy": score(samples, ranked).accuracy, "ranking_questions": len(ranked)}
    return figures, answers


def table(figures: dict[str, Any]) -> str:
    """The figures as text, the most frequent groups first."""

    def rows(values: Iterable[tuple[str, int | None, float | None]]) -> list[str]:
        return [
            f"  {name:38s} {'' if count is None else format(count, ','):>9s}"
            f"  {'not known' if accuracy is None else f'{accuracy:9.4f}'}"
            for name, count, accuracy in values
        ]

    lines = [f"{'':40s} questions   accuracy", *rows([("all", figures["questions"], figures["accuracy"])])]
    lines += rows([("all, both sides normalised", None, figures["accuracy_lenient"])])
    for key, title in (("answer_type", "answer type"), ("question_type", "question type")):
        groups = figures[f"accuracy_by_{key}"].items()
        lines += [f"by {title}", *rows((name or "(none)", figures["counts"][key][name], a) for name, a in groups)]
    lines += ["blind baselines", *rows((k.replace("_", " "), None, v) for k, v in figures["baselines"].items())]
    if "ranking_accuracy" in figures:
        count, accuracy = figures["ranking_questions"], figures["ranking_accuracy"]
        lines += ["chosen from the training answers", *rows([("first questions", count, accuracy)])]
    if "eos_rate" in figures:
        lines.append(
            f"answers that end by themselves {figures['eos_rate']:.4f}, "
            f"mean length {figures['mean_answer_tokens']:.2f} tokens"
        )
    return "\n".join(lines)


def caption_table(figures: dict[str, Any]) -> str:
    """The figures of captions as text, one a line, beside those of the blind baselines."""
    names = [name for name, value in figures.items() if isinstance(value, (float, type(None)))]
    columns = {"captions": figures, **figures["baselines"]}
    shown = [
        f"{name.replace('_', ' '):22s}"
        + "".join(f"{'' if c.get(name) is None else format(c[name], '.3f'):>20s}" for c in columns.values())
        for name in names
    ]
    head = f"{figures['images']:,} images".ljust(22) + "".join(f"{c.replace('_', ' '):>20s}" for c in columns)
    return "\n".join([head, *shown, f"BLEU is {figures['bleu_signature']}"])


def is_submission(path: Path) -> bool:
    """Whether a file may be overwritten by a submission: it is one itself, or empty."""
    try:
        content = read_json(path) if path.stat().st_size else []
    except UserError:
        return False
    return isinstance(content, list) and all(
        isinstance(entry, dict) and entry.keys() == {"question_id", "answer"} for entry in content
    )


def check_complete(data: VQAData) -> set[int | str]:
    """The ids that a submission must answer. Raises UserError if `data` lacks one of them."""
    path = next(iter(data.report.files.values()))
    expected = set(data.ids)
    left_out = expected - {sample.question_id for sample in data.samples}
    if left_out:
        reasons = "; ".join(f"{count:,}: {reason}" for reason, count in data.report.skipped.most_common())
        raise UserError(
            f"a submission answers every question of {path}, but {len(left_out):,} are left out ({reasons})"
        )
    return expected
