"""Builds the models of the contrastive system: two small towers of random weights."""

from collections.abc import Sequence
from typing import Any

from vqa_scratch.data.text import Tokenizer, train_wordpiece
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.models.clip import CLIP, CLIPConfig
from vqa_scratch.models.clip_text import CLIPTextConfig
from vqa_scratch.models.vit import ViTConfig
from vqa_scratch.storage import typed
from vqa_scratch.systems.assembly import start_from_places, stem_for
from vqa_scratch.systems.clip_options import CLIPOptions
from vqa_scratch.systems.vqa_models import IMAGE_SIZE

LAYOUTS = {"softmax": "clip", "sigmoid": "siglip"}  # by loss


def model_of(sizes: dict[str, Any], source: str) -> CLIP:
    """A model of random weights; the inverse of `CLIPSystem.sizes`. `source` is named in errors."""
    config, (stem,) = CLIPConfig.from_hf(sizes), typed(source, sizes, {"stem": str})
    return CLIP(config, stem_for(config.image, stem))


def small_model(options: CLIPOptions, train: Sequence[VQASample]) -> tuple[CLIP, Tokenizer]:
    """A small model of random weights, with a tokenizer learned from the captions."""
    text = train_wordpiece(sorted({sample.answer for sample in train}), options.vocabulary)
    kind, width = LAYOUTS[options.loss], options.width
    layout = CLIPConfig.LAYOUTS[kind]
    shared: dict[str, Any] = {
        "dim": width,
        "heads": options.heads,
        "hidden": 4 * width,
        "activation": "relu",
        "norm_eps": 1e-5,
    }
    config = CLIPConfig(
        image=ViTConfig(
            image_size=IMAGE_SIZE,
            patch_size=options.patch_size,
            layers=options.image_layers,
            layout=layout.image,
            **shared,
        ),
        text=CLIPTextConfig(
            vocab_size=len(text),
            max_positions=options.max_caption_tokens,
            layers=options.text_layers,
            eos_id=text.encode("")[-1],
            layout=layout.text,
            **shared,
        ),
        projection_dim=options.projection if kind == "clip" else width,
        layout=kind,
    )
    model = CLIP(config, stem_for(config.image, options.stem))
    start_from_places(model.image)
    return model, text
