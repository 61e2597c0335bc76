"""Answering many questions with a classifier: the scores of a closed list, and the best of them.

Shapes: B questions, L answers in the list.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vqa_scratch.data.batches import prefetch
from vqa_scratch.data.classes import ClassBatch, ClassQuestions
from vqa_scratch.data.image_store import Images
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.models.vilt import ViLTClassifier
from vqa_scratch.training.evaluation import Answer
from vqa_scratch.training.precision import Precision


def logits_of(model: ViLTClassifier, processor: ImageProcessor, batch: ClassBatch) -> Tensor:
    """(B, L) for a batch on the model's device."""
    return model(
        processor.normalize(batch.pixels),
        batch.input_ids,
        batch.attention_mask,
        pixel_mask=batch.pixel_mask,
        image_index=batch.image_index,
    )


@torch.no_grad()
def classify_questions(
    model: ViLTClassifier,
    questions: ClassQuestions,
    images: Images,
    precision: Precision,
    batches: Sequence[np.ndarray],
    *,
    image_map: np.ndarray | None = None,
    progress: str | None = None,
    top: int = 1,
) -> dict[int, list[Answer]]:
    """{question_id: the `top` answers, the best first} for the rows in `batches`; arguments as in `answer_questions`.

    The probability of an answer is the sigmoid of its logit: what share of the full score it can expect. The model is
    left in the mode it came in.
    """
    was_training = model.training
    model.eval()
    result = {}
    ready = ((rows, questions.batch(rows, images, image_map=image_map)) for rows in batches)
    try:
        bar = tqdm(prefetch(ready), progress, len(batches), unit="batch", disable=progress is None, leave=False)
        for rows, batch in bar:
            with precision.autocast():
                logits = logits_of(model, images.processor, batch.to(precision.device))
            best = logits.float().sigmoid().topk(top)
            for row, scores, places in zip(rows, best.values.tolist(), best.indices.tolist(), strict=True):
                answers = [Answer(model.labels[i], score) for i, score in zip(places, scores, strict=True)]
                result[questions.samples[row].question_id] = answers
    finally:
        model.train(was_training)
    return result
