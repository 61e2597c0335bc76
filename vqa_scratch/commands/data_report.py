"""What `data` says about a data set: counts, lengths, images that are missing, damaged or twice, likely mistakes."""

import difflib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from html import escape
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vqa_scratch.data.images import load_image
from vqa_scratch.data.vqa_v2 import VQAData, VQASample, read_vqa, spread, summary
from vqa_scratch.errors import UserError, some
from vqa_scratch.metrics import normalize_answer
from vqa_scratch.report.gallery import card, write_page
from vqa_scratch.systems.scoring import blind_baselines, rules_of
from vqa_scratch.systems.vqa_models import own_tokenizers

SHOWN = 24  # samples on the page
SIMILAR = 0.84  # least similarity (difflib) of two spellings of one answer


def read_splits(source: Path, splits: tuple[str, ...], cache: Path) -> dict[str, VQAData]:
    """The named splits; without names those of train, val and test that the source has.

    Raises UserError if a named split cannot be read, or if there is none.
    """
    read: dict[str, VQAData] = {}
    problem: UserError | None = None
    for split in splits or ("train", "val", "test"):
        try:
            read[split] = read_vqa(source, split, verify_images=True, cache=cache)
        except UserError as error:
            if splits:
                raise
            problem = problem or error
    if problem is not None and not read:
        raise problem
    return read


def lines(source: Path, read: dict[str, VQAData]) -> Iterator[str]:
    """The report, a line at a time."""
    samples = [sample for data in read.values() for sample in data.samples]
    yield f"{source}: {summary(samples)}"
    for data in read.values():
        yield str(data.report)
    answers = Counter(sample.answer for sample in samples if sample.answers)
    if answers:
        frequent = (f"{text} {n:,} ({n / answers.total():.0%})" for text, n in answers.most_common())
        yield f"answers       {some(frequent, 10)}"
        yield f"scored by     {rules_of([sample for sample in samples if sample.answers])}"
    question, answer = own_tokenizers(samples)
    for what, texts, tokenizer in (
        ("questions", [s.question for s in samples], question),
        ("answers", list(answers.elements()), answer),
    ):
        if texts:
            lengths = np.array([len(tokenizer.backend.encode(text).ids) for text in texts])
            yield (
                f"{what:13s} {np.median(lengths):.0f} tokens, 95 % have at most {np.percentile(lengths, 95):.0f}, "
                f"the longest {lengths.max()}"
            )
    if "train" in read and "test" in read and read["test"].annotated:
        blind = blind_baselines(read["test"].samples, read["train"].samples)
        yield f"without the image a guess reaches {max(blind.values()):.3f} on the test split"
    yield from (f"look at       {note}" for note in (*same_pictures(read), *likely_mistakes(samples)))
    if "train" in read:
        known = {normalize_answer(a) for s in read["train"].samples for a in s.answers}
        for name in read.keys() - {"train"}:
            new = {s.answer for s in read[name].samples if s.answers and normalize_answer(s.answer) not in known}
            if new:
                yield f"look at       {len(new)} answers of {name} that never occur in train: {some(sorted(new))}"


def same_pictures(read: dict[str, VQAData]) -> Iterator[str]:
    """Images with the same content under several names, and those in two splits, where test figures mean little."""
    places: dict[bytes, dict[Path, str]] = defaultdict(dict)
    paths = {sample.image_path: name for name, data in read.items() for sample in data.samples}
    for path, name in tqdm(paths.items(), "comparing images", unit="image", leave=False):
        places[hashlib.blake2b(path.read_bytes(), digest_size=16).digest()][path] = name
    twice = [found for found in places.values() if len(found) > 1]
    if twice:
        pairs = (" = ".join(path.name for path in list(found)[:2]) for found in twice)
        yield f"{len(twice):,} pictures that have several names: {some(pairs, 3)}"
    leaks = [found for found in twice if len(set(found.values())) > 1]
    if leaks:
        pairs = (" = ".join(f"{path.name} ({name})" for path, name in list(found.items())[:2]) for found in leaks)
        yield f"{len(leaks):,} pictures that are in two splits: {some(pairs, 3)}"


def likely_mistakes(samples: list[VQASample]) -> Iterator[str]:
    """Answers spelled in two ways, rare answers that resemble a frequent one, and questions answered in two ways."""
    answers = Counter(answer for sample in samples for answer in sample.answers)
    spellings = defaultdict(list)
    for answer, _ in answers.most_common():
        spellings[normalize_answer(answer)].append(answer)
    several = [" / ".join(map(repr, found[:3])) for found in spellings.values() if len(found) > 1]
    if several:
        yield f"{len(several):,} answers in several spellings, which are scored as one: {some(several, 3)}"
    plain = Counter(normalize_answer(sample.answer) for sample in samples if sample.answers)
    frequent = [text for text, n in plain.most_common(200) if n >= 5 and len(text) >= 4]
    rare = [text for text, n in plain.items() if n <= 2 and len(text) >= 4][:2000]
    near = ((text, difflib.get_close_matches(text, frequent, 1, SIMILAR)) for text in rare)
    typos = [f"{text!r} (is it {found[0]!r}?)" for text, found in near if found]
    if typos:
        yield f"{len(typos):,} rare answers that resemble a frequent one: {some(typos, 3)}"
    asked = defaultdict(set)
    for sample in samples:
        if sample.answers:
            asked[sample.image_path, sample.question.lower()].add(normalize_answer(sample.answer))
    both = [f"{q!r}: {' and '.join(sorted(a)[:2])}" for (_, q), a in asked.items() if len(a) > 1]
    if both:
        yield f"{len(both):,} questions asked twice of an image with different answers: {some(both, 3)}"
    long = [sample.answer for sample in samples if len(sample.answer.split()) > 7]
    if long:
        yield f"{len(long):,} answers of more than seven words: {long[0][:60]!r}"


def write_samples(path: Path, source: Path, read: dict[str, VQAData]) -> None:
    """A page with samples of every split."""
    sections = []
    for name, data in read.items():
        some_of_it = spread(data.samples, SHOWN // len(read))
        cards = [
            card(
                load_image(s.image_path, upright=s.upright),
                s.question,
                s.answer,
                "",
                s.answer_type,
                ", ".join(f"{n}&times; {escape(text)}" for text, n in Counter(s.answers).most_common()),
            )
            for s in some_of_it
        ]
        sections.append((f"{name}: {summary(data.samples)}", cards))
    write_page(path, f"What {source.name} holds", "Samples of each split, evenly spaced.", sections)
