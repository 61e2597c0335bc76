"""Texts for a CLIP or SigLIP: padded as in its training, and a list of labels as a classifier without training.

Labels: Radford et al. 2021 (2103.00020), section 3.1.4. Each is put into several templates, "a photo of a {}."; the
embeddings of its texts are averaged, and the average is brought back to length 1.

Shapes: I images, B texts, L labels, P width of the embeddings.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vqa_scratch.data.text import Tokenizer, check_text
from vqa_scratch.errors import UserError, some
from vqa_scratch.models.clip import CLIP

TEMPLATES = ("a photo of a {}.",)
TEXTS_AT_ONCE = 256


def text_ids(model: CLIP, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """(B, T) ids on the model's device, without a mask: CLIP never sees its padding, and SigLIP expects to see it, up
    to its longest text. What is too long is cut before its end token; `tokenizer.truncated` counts such texts."""
    longest, whole = model.text.longest, not model.text.layout.causal
    ids, _ = tokenizer.encode_batch(texts, max_length=longest)
    if whole:
        ids = F.pad(ids, (0, longest - ids.shape[1]), value=tokenizer.pad_id or 0)
    return ids.to(model.logit_scale.device)


@torch.no_grad()
def embed_texts(model: CLIP, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """(B, P): the embeddings of any number of texts."""
    parts = [texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE)]
    return torch.cat([model.embed_texts(text_ids(model, tokenizer, part)) for part in parts])


def embed_labels(
    model: CLIP, tokenizer: Tokenizer, labels: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """(L, P), of length 1: each label in every template, averaged.

    Raises UserError for no labels or templates, labels that are empty or repeat, a template without {}, and no text.
    """
    labels = [label.strip() for label in labels]
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    if not labels or not all(labels):
        raise UserError(f"labels must be texts, at least one and none empty; got {len(labels)}: {some(labels)}")
    if repeated:
        raise UserError(f"labels must differ; given more than once: {some(repeated)}")
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise UserError(
            f"a template has {{}} once, where the label goes; got {some(map(repr, wrong)) or 'no template'}"
        )
    texts = [check_text(template.replace("{}", label), "") for label in labels for template in templates]
    embeds = embed_texts(model, tokenizer, texts).unflatten(0, (len(labels), len(templates)))
    return F.normalize(embeds.mean(1), dim=-1)


@torch.no_grad()
def classify(model: CLIP, pixel_values: Tensor, labels: Tensor) -> Tensor:
    """Images (I, C, H, W) and `embed_labels` (L, P) -> the probability of each label, (I, L).

    A CLIP's share one each image: rows sum to 1. A SigLIP's are one yes or no each.
    """
    logits = model.logits(model.embed_images(pixel_values), labels)
    return logits.softmax(1) if model.logit_bias is None else logits.sigmoid()
