"""The feature cache of the first system: its frozen encoders run once, and training and evaluation read what they said.

Features are those of a tower in eval mode: a frozen tower with dropout is left out of its randomness. They are kept in
fp32 under fp32, and under bf16 or fp16 in that type, which is what the projection after them computes in anyway.
"""

import math
from typing import Any

import torch
from torch import Tensor

from vqa_scratch.data.feature_store import ImageFeatures, TextFeatures
from vqa_scratch.errors import UserError
from vqa_scratch.models.vqa import FROZEN_PARTS, VQAModel
from vqa_scratch.training.precision import DTYPES


def keep_features(task: Any) -> list[ImageFeatures | TextFeatures]:
    """Let the batches of a task (`systems.vqa.VQATask`) hold the states of its frozen encoders instead of their inputs.

    Nothing is computed yet: a file is made by `ready` of what this returns, or else when its split's first batch is,
    with the weights then in place. Raises UserError if the images are not of the size that the image tower was made
    for.
    """
    model: VQAModel = task.model
    precision, folder, dtype = task.precision, task.config.cache, DTYPES[task.precision.kind]
    frozen, kept = FROZEN_PARTS[task.config.freeze], []

    @torch.no_grad()
    def image_states(pixels: Tensor) -> Tensor:
        model.image.eval()
        values = task.processor.normalize(pixels.to(precision.device))
        with precision.autocast():
            return model.image_states(values)

    @torch.no_grad()
    def text_states(ids: Tensor, mask: Tensor) -> Tensor:
        model.text.eval()
        with precision.autocast():
            return model.text(ids.to(precision.device), mask.to(precision.device)).cpu()

    if "image" in frozen:
        side, size = model.image.config.image_size, task.processor.output_size
        if size != (side, side):
            raise UserError(f"--feature-cache needs images of the tower's own size, {side} x {side}, not {size}")
        tokens = 1 if model.fusion == "mean" else model.image.prefix_tokens + math.prod(model.image.config.grid)
        sizes = (tokens, model.image.config.dim)
        task.images = {
            split: ImageFeatures(images, model.image, image_states, folder, sizes, dtype)
            for split, images in task.images.items()
        }
        kept += task.images.values()
    if "text" in frozen:
        for questions in task.questions.values():
            states = TextFeatures(questions, model.text, text_states, folder, model.text.config.dim, dtype)
            questions.states = states.batch
            kept.append(states)
    return kept
