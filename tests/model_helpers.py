"""Tiny models of encoder, connector and decoder, with weights spread so that attention is uneven."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.connectors import connect, connector_class
from vqa_scratch.generate import Conditioning, GenerationOptions, generate
from vqa_scratch.models import GPT2, Bert, BertConfig, GPT2Config, ResNet, ResNetConfig, ViT, ViTConfig, VQAModel
from vqa_scratch.models.patches import PixelPatches, PixelPatchesConfig
from vqa_scratch.models.resnet import group_norm

SIDE, GRID = 24, (3, 3)  # pixels and patches a side
# The sizes of the connectors with any.
SIZES = {
    "tokens": {"grid": GRID},
    "patches": {"newlines": True},
    "qformer": {"queries": 5, "layers": 2, "heads": 4, "grid": GRID, "tiles": True},
    "resampler": {"queries": 5, "layers": 2, "heads": 4, "grid": GRID, "tiles": True},
}


def pooling_windows(grid: tuple[int, int], tiles: tuple[int, int]) -> Tensor:
    """(tiles, places) bool: which places adaptive pooling takes into each tile, found by an image of each place."""
    single = torch.eye(grid[0] * grid[1]).unflatten(1, (1, *grid))
    return F.adaptive_avg_pool2d(single, tiles).flatten(1).T > 0


def spread(model: nn.Module, std: float = 0.25) -> nn.Module:
    """Larger random weights, in eval mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return model.eval()


def greedy(decoder, ids, mask, memory=None, *, max_new_tokens: int, eos_id: int, fill: int = 0, prefix=None):
    """The most likely token at each step, until every row has ended or has `max_new_tokens`."""
    options = GenerationOptions(max_new_tokens, eos_id)
    return generate(decoder, ids, mask, Conditioning(memory, prefix), options=options, fill=fill)


def tiny_model(kind: str = "tokens", heads: int = 4, *, texts: bool = True) -> VQAModel:
    """A model with that connector; with `texts` there is a text encoder if the connector reads one."""
    connector = connector_class(kind)
    image = tiny_image(kind, heads)
    text = BertConfig(layout="distilbert", vocab_size=40, dim=16, layers=2, heads=heads, hidden=32, token_types=0)
    words = Bert(text) if texts and connector.reads_text else None
    return joined(
        kind,
        image,
        words,
        decoder(connector.needs_cross_attention(), heads=heads),
        **SIZES.get(kind, {}),
    )


def tiny_image(kind: str, heads: int = 4) -> ViT | PixelPatches:
    """The image encoder that a connector of this kind reads, for 3x3 patches of 8x8 pixels."""
    if connector_class(kind).reads_pixels:
        return PixelPatches(PixelPatchesConfig(8))
    return ViT(ViTConfig(image_size=SIDE, patch_size=8, dim=16, layers=2, heads=heads, hidden=32))


def tiny_captioner() -> VQAModel:
    """A ResNet that leaves 8x8 places of a 64-pixel image, and a decoder whose cross-attention reads them."""
    image = ResNet(ResNetConfig("basic", (1, 1), (16, 32)), group_norm)
    return joined("tokens", image, None, decoder(True, dim=32, heads=2), grid=(8, 8))


def decoder(add_cross_attention: bool, *, dim: int = 16, heads: int = 4) -> GPT2:
    none = {"dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0}
    sizes = {"vocab_size": 30, "max_positions": 32, "dim": dim, "layers": 2, "heads": heads, "bos_id": 1, "eos_id": 2}
    return GPT2(GPT2Config(**sizes, **none, add_cross_attention=add_cross_attention))


def joined(kind: str, image: nn.Module, text: nn.Module | None, writer: GPT2, **sizes) -> VQAModel:
    connector = connect({"kind": kind, **sizes}, image, text, writer)
    return spread(VQAModel(image, text, connector, writer))
