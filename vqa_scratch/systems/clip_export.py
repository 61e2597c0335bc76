"""Writes a contrastive run in the layout of CLIPModel or SiglipModel, with a program that compares texts with an image.

A test runs the program of the README unchanged.
"""

from pathlib import Path
from typing import Any

from vqa_scratch.models.clip import CLIP
from vqa_scratch.systems.export import LOAD_OWN_WHOLE, export_whole, has_stem
from vqa_scratch.systems.splits import SplitSystem

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


def export_clip(system: SplitSystem[Any, CLIP, Any], folder: Path) -> list[str]:
    """Export as CLIPModel or SiglipModel."""
    model = system.model
    alone = model.logit_bias is not None  # each text is judged alone, and texts are padded to one length
    page = README.format(
        title=f"A {'SigLIP' if alone else 'CLIP'}, which compares images with texts",
        load=LOAD_OWN_WHOLE.format(module="clip_models") if has_stem(system) else LOAD,
        limit=model.text.longest,
        padding='"max_length"' if alone else True,
        shares="sigmoid()" if alone else "softmax(0)",
    )
    return export_whole(system, folder, model.config.family.architecture, page)
