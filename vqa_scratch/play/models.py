"""A model that is played with: opened once, used by its own thread, and opened again when newer weights lie there."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from vqa_scratch.audio.reading import read_wav
from vqa_scratch.data.image_files import bytes_in
from vqa_scratch.errors import UserError, note
from vqa_scratch.play.pictures import Pictures
from vqa_scratch.play.worker import Worker
from vqa_scratch.storage import parse_json, typed
from vqa_scratch.study.activation import has_activations
from vqa_scratch.study.analysis import every_attention
from vqa_scratch.study.answer import Answered, answered
from vqa_scratch.study.edits import change_of
from vqa_scratch.study.names import attention_at, tapped_modules
from vqa_scratch.study.opened import Opened
from vqa_scratch.study.subject import WritingSubject
from vqa_scratch.systems.run_folder import log_of, stamps, still_trains
from vqa_scratch.transcription.studied import heard

MOST_EDITS, MOST_KEPT, COLDEST, HOTTEST = 64, 4, 0.01, 100.0
LOOK_EVERY = 1.0  # seconds between looks for newer weights
TYPES = {"picture": dict, "question": str | None, "edits": list | None, "temperature": int | float | None}
TYPES |= {"seed": int | None, "start": list | None}


class Played:
    """One model. `opens` opens it, and says of which step its weights are; `folder` is its run, None if released."""

    def __init__(self, name: str, opens: Callable[[], Any], folder: Path | None) -> None:
        self.name, self.opens, self.folder, self.loaded = name, opens, folder, 0
        self._open()
        self.asked = self.system.asked if self.system.example or self.system.asked != "question" else "nothing"
        self.asked = "sound" if self.ears else self.asked
        self.pictures = Pictures(getattr(self.system, "options", None), self.asked)
        self.about = self._about()
        self.worker = Worker()

    def _open(self) -> None:
        self.looked, self.stamps = time.monotonic(), stamps(self.folder)
        self.system, self.step = self.opens()
        self.ears = self.system.transcriber() if getattr(self.system, "hears", False) else None
        self.loaded += 1
        self.answers = lru_cache(MOST_KEPT)(lambda request: answered(self.opened(parse_json(request, "a request"))))

    def refresh(self) -> None:
        """From the model's thread: open the run again if it has newer weights. If they cannot be read, others stay."""
        if (now := time.monotonic()) - self.looked < LOOK_EVERY:
            return
        self.looked = now
        if stamps(self.folder) != self.stamps:
            try:
                self._open()
            except (UserError, OSError) as error:
                note(f"{self.name}: its newer weights cannot be read, so those at hand stay: {error}")

    def training(self, after: int) -> dict[str, Any]:
        """The rows of its log after so many, whether it still trains, and which weights are in use."""
        return log_of(self.folder, after) | {"step": self.step, "loaded": self.loaded}

    def described(self) -> dict[str, Any]:
        """What the page knows of it before anything is asked."""
        return self.about | {"step": self.step, "training": still_trains(self.folder)}

    def _about(self) -> dict[str, Any]:
        asked = [scene["questions"][0]["question"] for scene in self.pictures.scenes(3, 0) if scene["questions"]]
        examples = [text for text in asked if text] or list(filter(None, [self.system.example]))
        if self.ears is not None:
            subject = heard(self.ears, torch.full((1600,), 0.1), self.name).subject
        else:
            subject = self.subject({"objects": []}, (examples or [""])[0]).subject
        modules, names = tapped_modules(subject.model), dict.fromkeys(every_attention(subject))
        writes, maps = isinstance(subject, WritingSubject), has_activations(subject)
        lacks = {
            "it chooses its answer: no token after the other, no temperature, no way to go on from another": writes,
            "no maps without earlier words: there are none before its answer, or its logits are no sums": maps,
            "no lens: its states are compared, not read as words": subject.has_lens,
            "no parts of a logit: no linear head reads its states": subject.head is not None,
        }
        heads = [{"name": n, "heads": attention_at(modules, n).heads, "reads": n in subject.reading} for n in names]
        mlps = [name for name in modules if name.endswith((".mlp", ".gated"))]
        about = {"id": self.name, "asked": self.asked, "questions": examples, "scenes": self.pictures.name}
        about |= {"writes": writes, "measure": subject.measure, "attentions": heads, "mlps": mlps}
        about |= {"loss_unit": getattr(self.system, "loss_unit", None)}
        return about | {"lacks": [what for what, has in lacks.items() if not has]}

    # ---------------------------------------------------------------------------------------- a request

    def subject(self, picture: Any, question: str | None) -> Opened:
        """The model with a picture and a question about it, or with a sound. Raises UserError for what is missing."""
        if self.ears is not None:
            (sound,) = typed("the picture", picture, {"sound": str})
            wave = read_wav(bytes_in(sound, "audio"), "the recording")
            return replace(heard(self.ears, wave, "the recording"), run=self.name)
        question = (question or "").strip() or None
        if question is None and self.asked != "nothing":
            raise UserError(f"there is no {self.asked}: write one")
        return replace(self.system.subject(self.pictures.of(picture), question), run=self.name)

    def opened(self, state: Any) -> Opened:
        """A request with its edits, temperature, seed and beginning. Raises UserError for what is wrong in it."""
        picture, question, edits, temperature, seed, start = typed("the request", state, TYPES)
        opened = self.subject(picture, question)
        subject = opened.subject
        if len(edits or ()) > MOST_EDITS:
            raise UserError(f"at most {MOST_EDITS} edits at once, not {len(edits)}")
        if temperature and not COLDEST <= temperature <= HOTTEST:
            raise UserError(f"a temperature is 0 (the likeliest token) or {COLDEST} to {HOTTEST}, not {temperature}")
        if isinstance(subject, WritingSubject):
            if temperature:
                sampling = {"do_sample": True, "temperature": float(temperature), "seed": (seed or 0) % 2**32}
                subject.decide_by(subject.own_options | sampling)
            subject.begin_with(start or ())
        elif temperature or start:
            raise UserError(f"{self.name} chooses its answer: it has no temperature, and nothing to begin it with")

        def other(source: Any) -> Opened:
            theirs, asked = typed("the from of a patch", source, {"picture": dict, "question": str | None})
            return self.subject(theirs, asked)

        subject.changes = tuple(change_of(opened, edit, other) for edit in edits or ())
        return opened

    def unchanged(self, state: dict[str, Any]) -> Answered:
        """The answer without the edits of a request; kept, since one is changed again and again."""
        return self.answers(json.dumps({name: state.get(name) for name in TYPES} | {"edits": []}))
