"""`ask`: one question about one image file."""

import sys
from pathlib import Path

import click
import numpy as np

from vqa_scratch.commands.line import FOLDER, open_run, where_to_compute
from vqa_scratch.data.batches import Images, Questions
from vqa_scratch.data.text import check_question
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.engine.evaluation import Answer, answer_questions
from vqa_scratch.run import Run


def answer(run: Run, image: Path, question: str) -> Answer:
    """The answer and its probability. Raises UserError on an empty question or an image that cannot be read."""
    sample = VQASample(0, image, 0, check_question(question), "", "", (), "")
    questions, images = Questions([sample], run.encoder), Images([image], run.processor)
    return answer_questions(run.model, questions, images, run.precision, [np.array([0])])[0]


@click.command("ask")
@click.argument("run", type=FOLDER)
@click.option("--image", type=FOLDER, required=True, help="Image file of any size that Pillow reads.")
@click.option("--question", required=True, help="What to ask.")
@where_to_compute
def ask(run: Path, image: Path, question: str, device: str, precision: str) -> None:
    """Ask the trained system in the folder RUN about one image."""
    question = check_question(question)
    opened = open_run(run, device, precision)
    cut_before = opened.encoder.cut["questions"]
    said = answer(opened, image, question)
    if opened.encoder.cut["questions"] > cut_before:
        limit = opened.encoder.max_question_tokens
        print(f"note: the question is longer than {limit} tokens; only its beginning was read", file=sys.stderr)
    print(f"{said.text or '(nothing)'}  (probability {said.probability:.3f})")
