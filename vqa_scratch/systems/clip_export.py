"""Writes a contrastive run in the layout of CLIPModel or SiglipModel, with a program that compares texts with an image.

A test runs the program of the README unchanged.
"""

from pathlib import Path
from typing import Any

from vqa_scratch.models.clip import CLIP
from vqa_scratch.storage import write_json, write_text
from vqa_scratch.systems.base import System
from vqa_scratch.systems.export import STEM_HINT, tensors_of
from vqa_scratch.systems.model_card import metadata
from vqa_scratch.weights.files import write_safetensors

README = """\
# {title}

Run this in the folder to see how well some texts fit an image.

```python
import torch
from transformers import AutoTokenizer

from vqa_scratch.data.images import ImageProcessor, load_image

{load}
texts = ["a small red circle at the top left", "a large blue square at the bottom right"]
cut = {{"truncation": True, "max_length": {limit}, "padding": {padding}, "return_tensors": "pt"}}
words = AutoTokenizer.from_pretrained(".")(texts, **cut)
pixels = ImageProcessor.from_pretrained(".")([load_image("picture.png")])
with torch.no_grad():
    logits = model(pixel_values=pixels, input_ids=words["input_ids"]).logits_per_image[0]
for share, text in zip(logits.{shares}, texts):
    print(f"{{share:.3f}}  {{text}}")
```
"""
LOAD = """\
from transformers import AutoModel

model = AutoModel.from_pretrained(".").eval()
"""
LOAD_OWN = """\
# A convolutional stem has no place in the layouts of transformers: weights and sizes go by names of vqa_scratch.
from safetensors.torch import load_file

from vqa_scratch.storage import read_json
from vqa_scratch.systems.clip_models import model_of

model = model_of(read_json("model.json"), "model.json").eval()
model.load_state_dict(load_file("model.safetensors"))
"""


def export_clip(system: System[Any, CLIP], folder: Path) -> list[str]:
    """Export a CLIP or SigLIP; one with a convolutional stem keeps our names. Returns a line if it does."""
    model, has_stem = system.model, system.sizes["stem"] == "conv"
    system.tokenizers.by_name["text"].save(folder)
    system.processor.save_pretrained(folder)
    alone = model.logit_bias is not None  # each text is judged alone, and texts are padded to one length
    page = README.format(
        title=f"A {'SigLIP' if alone else 'CLIP'}, which compares images with texts",
        load=LOAD_OWN if has_stem else LOAD,
        limit=model.text.longest,
        padding='"max_length"' if alone else True,
        shares="sigmoid()" if alone else "softmax(0)",
    )
    write_text(folder / "README.md", metadata(system, "vqa-scratch" if has_stem else "transformers") + page)
    if not has_stem:
        model.save_pretrained(folder)
        return []
    write_safetensors(folder / "model.safetensors", tensors_of(model))
    write_json(folder / "model.json", system.sizes)
    return [
        f"the model has a convolutional stem, which {model.config.family.architecture} has no place for{STEM_HINT}: "
        f"{folder} holds it under names of our own, with its sizes in model.json"
    ]
