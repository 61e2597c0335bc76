"""The same multimodal model assembled from `transformers`, the alternative to this project.

ViT, DistilBERT and GPT-2 with cross-attention, two projections, both sides averaged into one key (the system of
Ozdemir's "Quick Start Guide to LLMs", chapter 7). Its forward pass takes one image a question, so an image with several
questions is encoded several times.

Shapes: B questions, T question tokens, A decoder tokens, D width.
"""

from pathlib import Path
from typing import Self

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tests.torchvision_shim  # noqa: F401  (before the first model class of transformers is looked up)

TOWERS = {
    "image": transformers.ViTModel,
    "text": transformers.DistilBertModel,
    "decoder": transformers.GPT2LMHeadModel,
}
OPTIONS = {"image": {"add_pooling_layer": False}, "text": {}, "decoder": {}}
PROJECTIONS = ("image_projection", "text_projection")


class TransformersVQA(nn.Module):
    """Two encoders and a decoder of `transformers`, and two projections to the decoder's width."""

    def __init__(self, image: nn.Module, text: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.image, self.text, self.decoder = image, text, decoder
        self.image_projection = nn.Linear(image.config.hidden_size, decoder.config.hidden_size)
        self.text_projection = nn.Linear(text.config.hidden_size, decoder.config.hidden_size)

    @classmethod
    def random(cls, **sizes: dict) -> Self:
        """Random weights and no dropout; `sizes` holds fields of each model's config under its name."""
        fields = {
            "image": {},
            "text": {"dropout": 0.0, "attention_dropout": 0.0},
            "decoder": {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "add_cross_attention": True},
        }
        models = {}
        for name, model in TOWERS.items():
            config = model.config_class(**fields[name] | sizes.get(name, {}))
            config._attn_implementation = "sdpa"
            models[name] = model(config, **OPTIONS[name])
        return cls(**models)

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        """From what `save_pretrained` wrote."""
        models = {
            name: model.from_pretrained(folder / name, attn_implementation="sdpa", **OPTIONS[name])
            for name, model in TOWERS.items()
        }
        peer = cls(**models)
        tensors = load_file(folder / "projections.safetensors")
        for name in PROJECTIONS:
            getattr(peer, name).load_state_dict({key: tensors[f"{name}.{key}"] for key in ("weight", "bias")})
        return peer

    def save_pretrained(self, folder: Path) -> None:
        """One folder a model, and the projections in a file beside them."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in TOWERS:
            getattr(self, name).save_pretrained(folder / name)
        tensors = {f"{n}.{key}": value for n in PROJECTIONS for key, value in getattr(self, n).state_dict().items()}
        save_file(tensors, folder / "projections.safetensors")

    def memory(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the decoder reads, (B, N, D), and which of it, (B, N); here one key, the mean of both sides."""
        image = self.image_projection(self.image(pixel_values=pixel_values).last_hidden_state.mean(1))  # (B, D)
        text = self.text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (B, T, D)
        keep = attention_mask.to(text.dtype)[..., None]
        text = self.text_projection((text * keep).sum(1) / keep.sum(1))  # (B, D)
        return ((image + text) / 2)[:, None], None

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        labels: Tensor,
    ) -> Tensor:
        """The mean loss over the labels (B, A), which hold the next token, and are negative where there is no loss.

        pixel_values are (B, C, H, W).
        """
        states, mask = self.memory(pixel_values, input_ids, attention_mask)
        return self.decoder(
            input_ids=decoder_input_ids,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            labels=labels,
            shift_labels=labels,  # already the next token: nothing left to shift
            use_cache=False,
        ).loss


class TokensVQA(TransformersVQA):
    """The same, but the decoder reads every state of both encoders."""

    def memory(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        image = self.image_projection(self.image(pixel_values=pixel_values).last_hidden_state)  # (B, N, D)
        text = self.text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        seen = attention_mask.new_ones(image.shape[:2])
        return torch.cat([image, self.text_projection(text)], 1), torch.cat([seen, attention_mask], 1)


def adamw(model: nn.Module, learning_rate: float = 5e-5) -> torch.optim.AdamW:
    """The optimizer that the Trainer of `transformers` builds for "adamw_torch", with its defaults for the rest."""
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
