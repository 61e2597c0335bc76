"""A checkpoint.pt of OpenFlamingo, made by hand in its format, against its arithmetic written out."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vqa_scratch.errors import UserError
from vqa_scratch.models import GPT2, OPT, GPT2Config, Llama, LlamaConfig, OPTConfig
from vqa_scratch.models.open_flamingo import load_open_flamingo
from vqa_scratch.nn.memory_parts import images_of_texts, last_images

no_grad = torch.no_grad()
WORDS, WIDTH, VISION, LATENTS, IMAGE = 24, 16, 12, 5, 25  # <|endofchunk|> and <image> are 24 and 25
SIZES = {"vocab_size": WORDS, "max_positions": 40, "dim": WIDTH, "layers": 4, "heads": 2}
# The decoder, and where its blocks and its words are in the reference; all get 26 words.
DECODERS = {
    "opt": (lambda: OPT(OPTConfig(hidden=20, **SIZES)), "model.decoder.layers", "model.decoder.embed_tokens"),
    "gpt2": (lambda: GPT2(GPT2Config(**SIZES)), "transformer.h", "transformer.wte"),
    "llama": (
        lambda: Llama(LlamaConfig(hidden=20, **SIZES | {"vocab_size": 26})),
        "model.layers",
        "model.embed_tokens",
    ),
}
PREFIX = "lang_encoder.gated_cross_attn_layers"


def decoder_of(kind: str):
    torch.manual_seed(0)
    decoder = DECODERS[kind][0]()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return decoder


def checkpoint(kind: str, every: int = 2) -> dict[str, Tensor]:
    """Two resampler blocks, gated layers before every other block from the second on, and the words."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.4

    def norm(name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + drawn(width), f"{name}.bias": drawn(width)}

    def mlp(name: str, width: int) -> dict[str, Tensor]:
        both = {f"{name}.1.weight": drawn(4 * width, width), f"{name}.3.weight": drawn(width, 4 * width)}
        return norm(f"{name}.0", width) | both

    def attention(name: str, width: int) -> dict[str, Tensor]:
        shapes = {"to_q": (512, width), "to_kv": (1024, VISION), "to_out": (width, 512)}
        return {f"{name}.{part}.weight": drawn(*shape) for part, shape in shapes.items()}

    made = {"perceiver.latents": drawn(LATENTS, VISION), **norm("perceiver.norm", VISION)}
    for n in range(2):
        name = f"perceiver.layers.{n}"
        made |= attention(f"{name}.0", VISION) | mlp(f"{name}.1", VISION)
        made |= norm(f"{name}.0.norm_media", VISION) | norm(f"{name}.0.norm_latents", VISION)
    for n in range(every - 1, 4, every):
        made |= {f"{PREFIX}.{n}.attn_gate": drawn(1) + 1, f"{PREFIX}.{n}.ff_gate": drawn(1) - 1}
        made |= attention(f"{PREFIX}.{n}.attn", WIDTH) | norm(f"{PREFIX}.{n}.attn.norm", WIDTH)
        made |= mlp(f"{PREFIX}.{n}.ff", WIDTH)
    return made | {f"lang_encoder.{DECODERS[kind][2]}.weight": drawn(26, WIDTH)}


def spelled(tensors: dict[str, Tensor], kind: str, how: str) -> dict[str, Tensor]:
    """As versions of OpenFlamingo write them: the gated layers in a list of their own, among the blocks, or in both."""
    blocks = DECODERS[kind][1]
    among = {
        f"lang_encoder.{blocks}.{key.split('.')[2]}.gated_cross_attn_layer.{key.split('.', 3)[3]}": tensor
        for key, tensor in tensors.items()
        if key.startswith(PREFIX)
    }
    frozen = {"lang_encoder.old_decoder_blocks.0.norm.weight": torch.ones(3), "vision_encoder.proj": torch.ones(2)}
    if how == "own list":
        return tensors
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(PREFIX)}
    return rest | among if how == "among the blocks" else tensors | among | frozen


def saved(tensors: dict[str, Tensor], folder: Path) -> Path:
    torch.save(tensors, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


class Written:
    """The forward pass with plain tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.t = tensors

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.t[f"{name}.weight"], self.t[f"{name}.bias"])

    def mlp(self, name: str, x: Tensor) -> Tensor:
        h = F.gelu(self.norm(f"{name}.0", x) @ self.t[f"{name}.1.weight"].T)
        return h @ self.t[f"{name}.3.weight"].T

    def attention(self, name: str, x: Tensor, read: Tensor, keep: Tensor) -> Tensor:
        q, (k, v) = x @ self.t[f"{name}.to_q.weight"].T, (read @ self.t[f"{name}.to_kv.weight"].T).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (8, 64)).transpose(-2, -3) for part in (q, k, v))
        scores = (q * 64**-0.5 @ k.transpose(-1, -2)).masked_fill(~keep, -torch.finfo().max)
        weights = scores.softmax(-1).masked_fill(~keep.any(-1, True), 0.0)  # text before the first image
        return (weights @ v).transpose(-2, -3).flatten(-2) @ self.t[f"{name}.to_out.weight"].T

    def resampled(self, image: Tensor) -> Tensor:
        latents = self.t["perceiver.latents"].expand(*image.shape[:-2], -1, -1)
        for n in range(2):
            name, x = f"perceiver.layers.{n}", self.norm(f"perceiver.layers.{n}.0.norm_media", image)
            normed = self.norm(f"{name}.0.norm_latents", latents)
            both, all_seen = torch.cat([x, normed], -2), torch.ones(1, dtype=torch.bool)
            latents = latents + self.attention(f"{name}.0", normed, both, all_seen)
            latents = latents + self.mlp(f"{name}.1", latents)
        return self.norm("perceiver.norm", latents)

    def gated(self, n: int, x: Tensor, media: Tensor, places: Tensor) -> Tensor:
        times = torch.arange(1, media.shape[1] + 1).repeat_interleave(media.shape[2])
        keep = (places.cumsum(-1)[..., None] == times)[:, None]  # (B, 1, T, images * latents)
        read = self.attention(f"{PREFIX}.{n}.attn", self.norm(f"{PREFIX}.{n}.attn.norm", x), media.flatten(1, 2), keep)
        x = x + read * self.t[f"{PREFIX}.{n}.attn_gate"].tanh()
        return x + self.mlp(f"{PREFIX}.{n}.ff", x) * self.t[f"{PREFIX}.{n}.ff_gate"].tanh()


def written_out(kind: str, tensors: dict[str, Tensor], ids: Tensor, image: Tensor) -> Tensor:
    """The decoder's own blocks, called one by one with the gated layers between them."""
    decoder, written = decoder_of(kind).eval(), Written(tensors)
    (words,) = (tensor for key, tensor in tensors.items() if key.endswith(f"{DECODERS[kind][2]}.weight"))
    decoder.tokens = torch.nn.Embedding.from_pretrained(words)
    media, positions = written.resampled(image), torch.arange(ids.shape[1])[None]
    x, rotation = decoder.before_blocks(decoder.embed(ids), positions), decoder.rotation(positions[:, None])
    for n, block in enumerate(decoder.blocks):
        if f"{PREFIX}.{n}.attn_gate" in tensors:
            x = written.gated(n, x, media, ids == IMAGE)
        x = block(x, None, None, None, rotation)
    return decoder.logits(decoder.after_blocks(x))


@no_grad
@pytest.mark.parametrize("how", ["own list", "among the blocks", "both"])
@pytest.mark.parametrize("kind", DECODERS)
def test_it_says_what_the_formulas_say(tmp_path, kind, how):
    """Two images a text, words before the first; every spelling of the file means the same."""
    tensors = checkpoint(kind)
    decoder = decoder_of(kind)
    resampler = load_open_flamingo(saved(spelled(tensors, kind, how), tmp_path), decoder)
    assert [n for n, block in enumerate(decoder.blocks) if block.gated is not None] == [1, 3]
    assert decoder.config.vocab_size == len(decoder.tokens.weight) == 26
    ids, image = torch.randint(0, WORDS, (2, 9)), torch.randn(2, 2, 7, VISION)
    ids[0, [2, 5]] = ids[1, [0, 7]] = IMAGE
    states = resampler(image.flatten(0, 1)).unflatten(0, (2, 2))
    # fp32: sums of up to 64 products in another order, in states of size 10.
    torch.testing.assert_close(states, Written(tensors).resampled(image), atol=2e-5, rtol=1e-5)
    memory = [images_of_texts(states, last_images(ids, IMAGE))]
    ours = decoder.logits(decoder.hidden(decoder.embed(ids), memory=memory))
    wanted = written_out(kind, tensors, ids, image)
    torch.testing.assert_close(ours, wanted, atol=2e-4, rtol=1e-5)
    other = written_out(kind, tensors, ids, image.flip(1))
    assert (ours - other).abs().max() > 0.1, "nothing depends on the images"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("perceiver.latents"), "no checkpoint.pt of an OpenFlamingo"),
        (lambda t: t.pop("perceiver.norm.bias"), "missing: perceiver.norm.bias"),
        (lambda t: t.pop(f"{PREFIX}.3.ff.1.weight"), r"missing: .*gated_cross_attn_layers.3.ff.1.weight"),
        (lambda t: t.update({f"{PREFIX}.7.attn_gate": torch.ones(1)}), "layer before block 7, the decoder 4 blocks"),
        (lambda t: t.update({"perceiver.frame_embs": torch.ones(3, VISION)}), "unexpected: perceiver.frame_embs"),
        (lambda t: t.update({f"{PREFIX}.1.attn.to_kv.weight": torch.ones(4, 4)}), "to_kv.weight is .4, 4., should be"),
        (lambda t: t.update({"perceiver.norm.bias": torch.full((VISION,), torch.nan)}), "NaN or infinite"),
        (
            lambda t: t.update({"lang_encoder.model.decoder.layers.1.gated_cross_attn_layer.ff_gate": torch.ones(1)}),
            "layers.1.gated_cross_attn_layer.ff_gate differs from .*, of which it is a copy",
        ),
        (
            lambda t: t.update({"lang_encoder.model.decoder.embed_tokens.weight": torch.ones(23, WIDTH)}),
            r"its words are \(23, 16\), the decoder's \(24, 16\): it needs at least 24 rows",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_in_a_line(tmp_path, change, message):
    tensors = checkpoint("opt")
    change(tensors)
    with pytest.raises(UserError, match=message) as error:
        load_open_flamingo(saved(tensors, tmp_path), decoder_of("opt"))
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300


def test_words_need_a_head_of_as_many(tmp_path):
    tensors = checkpoint("llama") | {"lang_encoder.model.embed_tokens.weight": torch.ones(28, WIDTH)}
    with pytest.raises(UserError, match=r"the decoder's \(26, 16\): it needs the same rows"):
        load_open_flamingo(saved(tensors, tmp_path), decoder_of("llama"))
