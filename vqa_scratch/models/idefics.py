"""Idefics (Laurençon et al. 2023, arXiv 2306.16527), the public Flamingo: a Llama with gated layers that read images.

The states of a CLIP's image tower, class token included and without a last norm, go through a resampler, if there is
one, and are a memory. Gated layers before every so manieth block read it, each token its last image.

Shapes: B rows, T tokens, I images a row, N states of an image, C their width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vqa_scratch.errors import UserError, naming
from vqa_scratch.generation_options import end_ids
from vqa_scratch.models.hf_config import HFConfig, Layout, fields_from_hf
from vqa_scratch.models.image_text import JoinedModel, check_place
from vqa_scratch.models.llama import Llama, LlamaConfig
from vqa_scratch.models.resampler import Resampler, ResamplerConfig
from vqa_scratch.models.vit import ViT, ViTConfig
from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.nn.gated import GatedMLP
from vqa_scratch.nn.gated_cross import GatedCrossAttention
from vqa_scratch.nn.layers import activation, init_weights
from vqa_scratch.nn.memory import Memory
from vqa_scratch.nn.memory_parts import last_images
from vqa_scratch.nn.rms_norm import RMSNorm
from vqa_scratch.storage import typed
from vqa_scratch.weights import maps_joined
from vqa_scratch.weights.maps import KeyMap

_FIELDS = {
    "added": "additional_vocab_size",
    "every": "cross_layer_interval",
    "head_norm": "qk_layer_norms",
    "gates": "alpha_type",
    "gate_start": "alpha_initializer",
    "gate_std": "alphas_initializer_range",
}
_TOWER: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
}
_TOWER |= {"patch_size": 14, "image_size": 224, "num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-5}
_RESAMPLER = {"latents": "resampler_n_latents", "layers": "resampler_depth", "heads": "resampler_n_heads"}
_RESAMPLER |= {"head_dim": "resampler_head_dim"}
_USUAL_RESAMPLER: dict[str, Any] = {"latents": 64, "layers": 6, "heads": 16, "head_dim": 96}
_NOT_ITS_OWN = ("head_dim", "num_key_value_heads", "attention_bias", "mlp_bias")  # fields of a Llama it does not have
_RANDOM = ("normal", "gaussian", "random")


@dataclass(frozen=True)
class IdeficsConfig(HFConfig[Layout]):
    """Sizes. The language model's vocabulary includes the `added` words, which are tables of their own in a file."""

    LAYOUTS: ClassVar[Mapping[str, Layout]] = {
        "idefics": Layout("IdeficsForVisionText2Text", _FIELDS, fixed={"dropout": 0.0})
    }

    vision: ViTConfig
    language: LlamaConfig
    resampler: ResamplerConfig | None = None
    added: int = 0  # words that Idefics adds to those of Llama
    every: int = 1  # a gated layer is before every so manieth block, from the first on
    head_norm: bool = False  # norms of the queries and keys of each head in gated layers
    gates: str = "float"  # one gate a sublayer, or "vector": one for each number of a state
    gate_start: str = "zeros"  # how gates begin: zeros, ones, or at random
    gate_std: float = 0.0
    layout: str = "idefics"

    def __post_init__(self) -> None:
        if self.gates not in ("float", "vector"):
            raise UserError(f'alpha_type must be "float" or "vector", not {self.gates!r}')
        if self.gate_start not in ("zeros", "ones", *_RANDOM):
            raise UserError(f"alpha_initializer must be zeros, ones or one of {_RANDOM}, not {self.gate_start!r}")
        if self.language.layers % self.every:
            blocks = f"{self.language.layers} blocks"
            raise UserError(f"{blocks} do not divide into groups of cross_layer_interval {self.every}")

    @property
    def read_before(self) -> range:
        """The blocks with a gated layer before them."""
        return range(0, self.language.layers, self.every)

    @property
    def key_map(self) -> KeyMap:
        sizes, vector = (self.language.vocab_size - self.added, self.added), self.gates == "vector"
        parts = self.vision.key_map, self.language.key_map
        return maps_joined.idefics(*parts, vocabulary=sizes, before=self.read_before, vector=vector)

    @classmethod
    def further_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The parts; the sizes of the language model are in the file itself."""
        kinds: dict[str, Any] = {"vision_config": dict | None, "perceiver_config": dict | None}
        kinds |= {"use_resampler": bool | None, "vocab_size": int, "additional_vocab_size": int | None}
        tower, resampler, resamples, words, added = typed("config.json", config, kinds)
        tower = dict(tower or {})
        if "embed_dim" in tower:
            tower["hidden_size"] = tower["embed_dim"]
        with naming("vision_config"):
            vision = ViTConfig.from_hf(_TOWER | tower | {"model_type": "clip_vision_model"})
        own = {"model_type": "llama", "vocab_size": words + (added or 0)} | dict.fromkeys(_NOT_ITS_OWN)
        parts: dict[str, Any] = {"vision": vision, "language": LlamaConfig.from_hf(dict(config) | own)}
        if resamples:
            (norms,) = typed("perceiver_config", resampler or {}, {"qk_layer_norms_perceiver": bool | None})
            with naming("perceiver_config"):
                sizes = _USUAL_RESAMPLER | fields_from_hf(resampler or {}, _RESAMPLER, ResamplerConfig)
            parts["resampler"] = ResamplerConfig(vision.dim, head_norm=bool(norms), activation="relu", **sizes)
        return parts

    def to_hf(self) -> dict[str, Any]:
        tower = self.vision.to_hf()
        tower |= {"architectures": None, "model_type": "idefics_vision", "embed_dim": tower.pop("hidden_size")}
        own = {name: value for name, value in self.language.to_hf().items() if name not in _NOT_ITS_OWN}
        sizes = self.resampler
        perceiver = None
        if sizes is not None:
            perceiver = {theirs: getattr(sizes, ours) for ours, theirs in _RESAMPLER.items()}
            perceiver |= {"qk_layer_norms_perceiver": sizes.head_norm, "use_resampler": True}
        whole = {
            "vision_config": tower,
            "use_resampler": sizes is not None,
            "perceiver_config": perceiver,
            "dropout": 0.0,
        }
        return own | super().to_hf() | whole | {"vocab_size": self.language.vocab_size - self.added}


class Idefics(JoinedModel):
    """Image encoder, resampler or None, and a Llama with gated layers.

    Files it saves lack the encoder's last norm, which nothing reads.

    To generate, give the language model the images of the prompt:
    `given = Conditioning([model.memory(model.encode_image(pixel_values), image_mask)])`,
    `generate(model.language, ids, mask, given, options=...)`.
    """

    config_class = IdeficsConfig
    config: IdeficsConfig

    def __init__(self, config: IdeficsConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = ViT(config.vision)
        self.resampler = None if config.resampler is None else Resampler(config.resampler)
        self.language = Llama(config.language)
        self.language.add_gated({block: self._layer() for block in config.read_before})

    def _layer(self) -> GatedCrossAttention:
        """A gated layer built like a block of the language model."""
        config, sizes = self.config, self.config.language
        norm, size = partial(RMSNorm, eps=sizes.norm_eps), sizes.dim // sizes.heads
        layer = GatedCrossAttention(
            norm(sizes.dim),
            MultiHeadAttention(
                sizes.dim,
                sizes.heads,
                context_dim=config.vision.dim,
                bias=False,
                out_bias=False,
                before=(norm(size), norm(size), nn.Identity()) if config.head_norm else (),
            ),
            norm(sizes.dim),
            GatedMLP(sizes.dim, sizes.hidden, activation(sizes.activation)),
            gates=sizes.dim if config.gates == "vector" else 1,
        )
        layer.apply(partial(init_weights, std=sizes.init_std))
        for gate in (layer.cross_gate, layer.mlp_gate):
            if config.gate_start == "ones":
                nn.init.ones_(gate)
            elif config.gate_start != "zeros":
                nn.init.normal_(gate, std=config.gate_std)
        return layer

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(B, I, channels, H, W) -> (B, I, N, C). Raises UserError unless patches and channels fit.

        Positions are resized to images of another size than the file's; the reference, which refuses these unless asked
        to, stretches them by a tenth of a patch more.
        """
        channels = self.config.vision.channels
        if pixel_values.ndim != 5 or pixel_values.shape[2] != channels:
            given = tuple(pixel_values.shape)
            raise UserError(f"pixel_values must be (rows, images, {channels} channels, height, width), not {given}")
        states = self.vision(pixel_values.flatten(0, 1).to(self.vision.positions.dtype))
        if self.resampler is not None:
            states = self.resampler(states)
        return states.unflatten(0, pixel_values.shape[:2])

    def image_mask(self, input_ids: Tensor, image_token: int, images: Sequence[int]) -> Tensor:
        """(B, T) -> (B, T, I) bool, the `image_attention_mask`: each token sees the last image up to it, and none from
        an end token on until the next image.

        `image_token` is the place of an image, `images` how many each row has; rows with fewer than I are padded with
        images that no token sees. Raises UserError unless a row has as many places.
        """
        check_place(image_token, self.config.language.vocab_size)
        for row, (there, given) in enumerate(zip((input_ids == image_token).sum(1).tolist(), images, strict=True)):
            if there != given:
                places = f"{there} tokens {image_token}, each the place of an image"
                raise UserError(f"row {row} of the prompts has {places}, but {given} images are given")
        last = last_images(input_ids, image_token)
        ended = torch.isin(input_ids, torch.tensor(end_ids(self.config.language.eos_id), device=last.device))
        ends = ended.cumsum(1) - ended.long()  # before each token
        since = ends - ends.masked_fill(input_ids != image_token, 0).cummax(1).values  # and since the last image
        last = last.masked_fill(since > 0, -1)
        return last[..., None] == torch.arange(max(1, *images), device=last.device)

    def memory(self, states: Tensor, image_attention_mask: Tensor) -> Memory:
        """States (B, I, N, C) and which images each token sees (B, T, I) -> what the language model reads."""
        rows, images, tokens, _ = states.shape
        if image_attention_mask.ndim != 3 or image_attention_mask.shape[::2] != (rows, images):
            given = tuple(image_attention_mask.shape)
            raise UserError(f"image_attention_mask must be ({rows} rows, tokens, {images} images), not {given}")
        return Memory(states.flatten(1, 2), seen=image_attention_mask.bool().repeat_interleave(tokens, -1))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        *,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """(B, T), images (B, I, channels, H, W) and which of them each token sees (B, T, I) -> logits (B, T, V).

        attention_mask (B, cached + T), True = a real token. Texts without images are read as those that see none. After
        a cached chunk, without images, each token sees what the last one before it did. Raises UserError on images
        without a mask, and on what does not fit.
        """
        memory = None
        if pixel_values is not None:
            if image_attention_mask is None:
                raise UserError("images need image_attention_mask, which `image_mask` makes of the ids")
            memory = [self.memory(self.encode_image(pixel_values), image_attention_mask)]
        elif cache is None or cache[0].cross is None:
            nothing = self.vision.positions.new_zeros(len(input_ids), 1, self.config.vision.dim)
            memory = [Memory(nothing, torch.zeros(len(input_ids), 1, dtype=torch.bool, device=nothing.device))]
        language = self.language
        return language.logits(language.hidden(language.embed(input_ids), attention_mask, memory=memory, cache=cache))
