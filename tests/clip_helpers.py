"""What the tests of CLIP share: a small model and captions for it. Ranks import it: without the reference."""

import torch

from vqa_scratch.models import CLIP, CLIPConfig, CLIPTextConfig, ViTConfig

END = 58  # the end token; the start token is the one before it


def captions(lengths=(20, 13, 4, 2), pad=1):
    """Ids (4, 20) of a start token, words, the end token and padding, and their mask."""
    ids = torch.full((len(lengths), max(lengths)), pad)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, END - 1, (length,))
        ids[row, 0], ids[row, length - 1] = END - 1, END
    return ids, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def small(kind="clip", **changes):
    dim = {"dim": 24, "layers": 2, "heads": 2, "hidden": 48}
    images = ViTConfig(image_size=12, patch_size=4, layout=f"{kind}_vision_model", **dim)
    texts = CLIPTextConfig(60, 20, eos_id=END, layout=f"{kind}_text_model", **dim)
    return CLIP(CLIPConfig(images, texts, changes.pop("projection_dim", 24), kind)).eval()
