"""One input ready for study: its subject, and readable labels for its tokens.

`systems/studied.py` makes it of a run of train.py, `zero_shot.py` of a released model that looks at images,
`language_model.py` of one that reads texts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vqa_scratch.data.text import Tokenizer
from vqa_scratch.storage import read_object
from vqa_scratch.study.base import Subject

POLICY = "policy"  # where a run of rlhf.py keeps its tuned model


@dataclass(frozen=True)
class Opened:
    """A subject, what it was made from, and how to read the ids of its answer."""

    run: str
    subject: Subject
    text: str  # the question or the article; "" for a caption
    image: Image.Image | None  # as the model saw it: resized and cropped
    prompt: tuple[str, ...]  # labels of the tokens that the writer starts from
    label: Callable[[int], str]  # the label of one id of the answer, with its leading space
    decode: Callable[[list[int]], str]  # the text of a whole answer
    notes: tuple[str, ...] = ()  # what the user should know about how the input was read
    more: Callable[[list[int]], dict[str, Any]] = lambda ids: {}  # what else the page shows, of the ids of an answer


def run_name(folder: Path) -> str:
    """What a page calls a run: the name of its folder, not where it lies; of a tuned policy, the run's name first."""
    folder = folder.absolute()
    return f"{folder.parent.name}/{folder.name}" if folder.name == POLICY else folder.name


def token_label(tokenizer: Tokenizer, index: int) -> str:
    """One id as readable text, with its leading space."""
    token = tokenizer.backend.id_to_token(index)
    if token is None:
        return f"[unused {index}]"  # checkpoints have more rows than their vocabulary
    if tokenizer.byte_level and token not in tokenizer.special.values():
        return tokenizer.decode([index], skip_special_tokens=False)
    return token.replace("▁", " ")


def text_labels(tokenizer: Tokenizer, text: str, ids: list[int]) -> tuple[str, ...]:
    """A label for each of `ids`, the beginning of `text`: the user's characters, even for unknown words."""
    encoding = tokenizer.backend.encode(text)
    labels = []
    for place, index in enumerate(ids):
        start, end = encoding.offsets[place] if encoding.ids[place : place + 1] == [index] else (0, 0)
        labels.append(text[start:end] if end > start else token_label(tokenizer, index))
    return tuple(labels)


def special_tokens(tokenizer: Tokenizer, ids: list[int]) -> tuple[int, ...]:
    """The indices of separators and other tokens without content among `ids`."""
    special = {tokenizer.cls_id, tokenizer.sep_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} - {None}
    return tuple(place for place, index in enumerate(ids) if index in special)


def written(tokenizer: Tokenizer, prompt: list[int]) -> dict[str, Any]:
    """The last fields of an `Opened` whose answer is written with `tokenizer`, after these ids."""
    return {
        "prompt": tuple(token_label(tokenizer, index) for index in prompt),
        "label": lambda index: token_label(tokenizer, index),
        "decode": lambda ids: tokenizer.decode(ids).strip(),
    }


def chosen(labels: Sequence[str], first: str) -> dict[str, Any]:
    """The last fields of an `Opened` whose answer is one of `labels`, read off the token that is called `first`."""
    return {"prompt": (first,), "label": lambda index: labels[index], "decode": lambda ids: labels[ids[0]]}


def config_of(folder: Path) -> dict:
    """The config.json of a folder; {} if there is none."""
    path = folder / "config.json"
    return read_object(path) if path.is_file() else {}
