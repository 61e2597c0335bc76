"""A GPT-2 with experts in place of its MLPs. No released model is one; `train.py --experts` makes them.

Each layer has experts, which are the MLPs of a GPT-2: two matrices with biases and an activation between them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from vqa_scratch.models.block_decoder import ExpertBlock
from vqa_scratch.models.gpt2 import GPT2, GPT2Block, GPT2Config
from vqa_scratch.models.hf_config import Layout
from vqa_scratch.models.llama_experts import Mixture, mixture_from_hf, mixture_to_hf
from vqa_scratch.weights import fields


@dataclass(frozen=True)
class GPT2ExpertsConfig(GPT2Config):
    """Sizes of a GPT-2, and of its experts; `hidden` means nothing here."""

    LAYOUTS: ClassVar[Mapping[str, Layout]] = {"gpt2_experts": Layout("", fields.GPT2)}

    experts: Mixture = Mixture()
    layout: str = "gpt2_experts"

    @classmethod
    def further_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"experts": mixture_from_hf(config)}

    def mlp(self, hidden: int | None = None) -> nn.Module:
        """The experts of a block, or one of them."""
        return self.experts.make(self.dim, super().mlp) if hidden is None else super().mlp(hidden)

    def to_hf(self) -> dict[str, Any]:
        return super().to_hf() | mixture_to_hf(self.experts, self.layout)


class GPT2ExpertBlock(ExpertBlock, GPT2Block):
    """With experts."""


class GPT2Experts(GPT2):
    """As `GPT2`."""

    config_class = GPT2ExpertsConfig
    block = GPT2ExpertBlock
