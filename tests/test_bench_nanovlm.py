"""The step against nanoVLM: a stand-in with its names and its interface, of torch alone, has our loss and gradients."""

import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from bench import nanovlm, processes
from vqa_scratch.errors import UserError

SIZES = {
    "vit_img_size": 16,
    "vit_patch_size": 4,
    "vit_hidden_dim": 24,
    "vit_inter_dim": 40,
    "vit_n_heads": 2,
    "vit_n_blocks": 2,
    "lm_hidden_dim": 32,
    "lm_inter_dim": 48,
    "lm_n_heads": 4,
    "lm_n_kv_heads": 2,
    "lm_n_blocks": 2,
    "lm_vocab_size": 61,
    "lm_re_base": 100,
    "mp_pixel_shuffle_factor": 2,
}
CONFIG = "from types import SimpleNamespace as VLMConfig\n"
MODEL = """
import torch
import torch.nn.functional as F
from data.processors import get_tokenizer
from torch import nn


class Parts(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def attend(q, k, v, heads, causal):
    q, k, v = (x.unflatten(2, (-1, q.shape[2] // heads)).transpose(1, 2) for x in (q, k, v))
    if causal:  # the decoder's: turned, and a key for several queries
        size, places = q.shape[3] // 2, torch.arange(q.shape[2])
        angles = places[:, None] * 100.0 ** (-torch.arange(size) / size)
        turn = torch.polar(torch.ones_like(angles), angles)
        def turned(x):
            made = torch.complex(x[..., :size].float(), x[..., size:].float()) * turn
            return torch.cat([made.real, made.imag], -1).to(x.dtype)
        q, k = turned(q), turned(k)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class VisionLanguageModel(nn.Module):
    def __init__(self, c, load_backbone):
        super().__init__()
        assert not load_backbone
        d, e, self.c = c.vit_hidden_dim, c.lm_hidden_dim, c
        kv = e * c.lm_n_kv_heads // c.lm_n_heads
        places = (c.vit_img_size // c.vit_patch_size) ** 2
        embedding = Parts(conv=nn.Conv2d(3, d, c.vit_patch_size, c.vit_patch_size))
        embedding.position_embedding = nn.Parameter(torch.rand(1, places, d))

        def seeing():
            return Parts(
                ln1=nn.LayerNorm(d, 1e-6),
                attn=Parts(qkv_proj=nn.Linear(d, 3 * d), out_proj=nn.Linear(d, d)),
                ln2=nn.LayerNorm(d, 1e-6),
                mlp=Parts(fc1=nn.Linear(d, c.vit_inter_dim), fc2=nn.Linear(c.vit_inter_dim, d)),
            )

        def plain(wide, narrow):
            return nn.Linear(wide, narrow, bias=False)

        def writing():
            h = c.lm_inter_dim
            return Parts(
                norm1=nn.RMSNorm(e, 1e-5),
                attn=Parts(q_proj=plain(e, e), k_proj=plain(e, kv), v_proj=plain(e, kv), out_proj=plain(e, e)),
                norm2=nn.RMSNorm(e, 1e-5),
                mlp=Parts(gate_proj=plain(e, h), up_proj=plain(e, h), down_proj=plain(h, e)),
            )

        blocks = nn.ModuleList(seeing() for _ in range(c.vit_n_blocks))
        self.vision_encoder = Parts(patch_embedding=embedding, blocks=blocks, layer_norm=nn.LayerNorm(d, 1e-6))
        blocks = nn.ModuleList(writing() for _ in range(c.lm_n_blocks))
        table, head = nn.Embedding(c.lm_vocab_size, e), plain(e, c.lm_vocab_size)
        head.weight = table.weight
        self.decoder = Parts(token_embedding=table, blocks=blocks, norm=nn.RMSNorm(e, 1e-5), head=head)
        self.MP = Parts(proj=plain(d * c.mp_pixel_shuffle_factor**2, e))
        self.image_token = get_tokenizer("a name").image_token_id

    def forward(self, input_ids, images, attention_mask=None, targets=None):
        see, write, c = self.vision_encoder, self.decoder, self.c
        x = see.patch_embedding.conv(images).flatten(2).transpose(1, 2) + see.patch_embedding.position_embedding
        for block in see.blocks:
            x = x + block.attn.out_proj(attend(*block.attn.qkv_proj(block.ln1(x)).chunk(3, 2), c.vit_n_heads, False))
            x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.ln2(x)), approximate="tanh"))
        side, s = c.vit_img_size // c.vit_patch_size, c.mp_pixel_shuffle_factor
        x = see.layer_norm(x).unflatten(1, (side, side)).unfold(1, s, s).unfold(2, s, s)  # (I, h, w, D, s, s)
        x = self.MP.proj(x.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2))
        y = write.token_embedding(input_ids).clone()
        y[input_ids == self.image_token] = x.flatten(0, 1).to(y.dtype)
        for block in write.blocks:
            a, z = block.attn, block.norm1(y)
            y = y + a.out_proj(attend(a.q_proj(z), a.k_proj(z), a.v_proj(z), c.lm_n_heads, True))
            z = block.norm2(y)
            y = y + block.mlp.down_proj(F.silu(block.mlp.gate_proj(z)) * block.mlp.up_proj(z))
        logits = write.head(write.norm(y))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
"""


class Here:
    """A side in this process."""

    def __init__(self, side, build, *arguments):
        self.side, self.built = side, build(*arguments)

    def ask(self, name, *arguments):
        began = time.perf_counter()
        value = 0.5 if name == "peak_memory_gb" else getattr(self.built, name)(*arguments)
        return time.perf_counter() - began, value


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A stand-in for nanoVLM's, and nothing of it left among the modules afterwards."""
    (tmp_path / "nanoVLM" / "models").mkdir(parents=True)
    (tmp_path / "nanoVLM" / "models" / "config.py").write_text(CONFIG)
    (tmp_path / "nanoVLM" / "models" / "vision_language_model.py").write_text(MODEL)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(
        processes,
        "contestants",
        lambda sides: nullcontext([Here(side, *built) for side, built in sides.items()]),
    )
    yield tmp_path / "nanoVLM"
    for name in ("data", "data.processors", "models", "models.config", "models.vision_language_model"):
        sys.modules.pop(name, None)


def test_both_sides_have_one_loss_and_the_same_gradients(checkout):
    """Asserted by `check` before a clock counts: with an image a question, and with eight questions an image."""
    text = nanovlm.run(checkout, 1, "the command", SIZES)
    rows = [line.split("|")[1:4] for line in text.splitlines() if line.startswith(("| fp32", "| bf16"))]
    assert [[cell.strip() for cell in row] for row in rows] == [
        [kind, "8", images] for kind in ("fp32", "bf16") for images in "81"
    ]
    assert text.count("gradients") == 4 and "sizes of a test" in text and text.endswith("`the command`")


@pytest.mark.parametrize(
    ("of_loss", "message"),
    [(1e-5, "^the losses differ: ours "), (1.0, "^the gradients differ, that of ")],
)
def test_another_model_is_found_out(checkout, monkeypatch, of_loss, message):
    def another(self, *given):
        built(self, *given)
        with torch.no_grad():
            self.model.connector.map.weight[3, 5] += 1.0

    built = nanovlm.Ours.__init__
    monkeypatch.setattr(nanovlm.Ours, "__init__", another)
    monkeypatch.setitem(nanovlm.TOLERANCES, "fp32", (of_loss, *nanovlm.TOLERANCES["fp32"][1:]))
    with pytest.raises(UserError, match=message):
        nanovlm.run(checkout, 1, "", SIZES)


def test_a_folder_that_is_no_checkout():
    with pytest.raises(UserError, match="no checkout of nanoVLM: there is no models/vision_language_model.py in it"):
        nanovlm.NanoVLM(Path("."), SIZES, nanovlm.CASES[0], Path("x"))
