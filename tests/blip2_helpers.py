"""Tiny random BLIP-2 checkpoints, saved by the reference in shards, and prompts for them."""

import json
from pathlib import Path

import torch
import transformers as hf
from helpers import STD, saved

VISION = {"hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 2, "num_attention_heads": 3}
QFORMER = {"hidden_size": 18, "intermediate_size": 22, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT = {"vocab_size": 60, "hidden_size": 16, "ffn_dim": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"max_position_embeddings": 64, "init_std": STD}
IMAGE_TOKEN, QUERIES = 59, 4


def reference(folder: Path, *, vision=(), qformer=(), text=(), **changes) -> hf.Blip2ForConditionalGeneration:
    """A random BLIP-2, saved in shards."""
    config = hf.Blip2Config(
        vision_config=VISION | {"image_size": 28, "patch_size": 14, "initializer_range": STD} | dict(vision),
        qformer_config=QFORMER | {"initializer_range": STD} | dict(qformer),
        text_config={"model_type": "opt"} | TEXT | dict(text),
        **{"num_query_tokens": QUERIES, "image_token_index": IMAGE_TOKEN, "initializer_range": STD} | changes,
    )
    model = hf.Blip2ForConditionalGeneration(config)
    with torch.no_grad():
        model.query_tokens.normal_(std=1.0)  # zero, until trained
    model = saved(model, folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return model


def prompts(lengths=(40, 12), vocab=50):
    """Ids (B, T) padded on the left, start token first, with their mask."""
    ids, mask = torch.ones(len(lengths), max(lengths)).long(), torch.zeros(len(lengths), max(lengths)).long()
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.cat([torch.tensor([2]), torch.randint(5, vocab, (length - 1,))])
        mask[row, -length:] = 1
    return ids, mask


def with_image_tokens(ids, mask, queries=QUERIES):
    """As the reference's processor makes them: the places of the image before everything."""
    places = torch.full((len(ids), queries), IMAGE_TOKEN)
    return torch.cat([places, ids], 1), torch.cat([torch.ones_like(places), mask], 1)


def change_config(folder: Path, part: str | None, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part]).update(values)
    (folder / "config.json").write_text(json.dumps(config))
