"""Experts in the decoder of a system that writes: how they are made, and what spreads tokens over them in training.

Shapes: B rows, A decoder tokens, D width, E experts, L layers.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vqa_scratch.data.batches import Batch
from vqa_scratch.data.text import Tokenizer
from vqa_scratch.models.gpt2 import GPT2, GPT2Config
from vqa_scratch.models.gpt2_experts import GPT2Experts, GPT2ExpertsConfig
from vqa_scratch.models.llama_experts import Mixture
from vqa_scratch.models.vqa import VQAModel, labelled_loss
from vqa_scratch.nn.experts import Router, Routing, balance_loss, loads, move_biases, routings, z_loss
from vqa_scratch.nn.states import States
from vqa_scratch.systems.base import System
from vqa_scratch.training.optimizers import Optimizers

BALANCE, Z = 0.01, 0.001  # weights of the losses of routers, those of OLMoE (arXiv 2409.02060)


def small_decoder(options: Any, words: Tokenizer, positions: int, *, cross_attention: bool) -> GPT2:
    """A GPT-2 with random weights that writes the tokens of `words`, without dropout; with `options.experts` it has so
    many in place of each MLP.

    Without `options.decoder_hidden` those that a token reads are together as wide as the MLP they replace. Raises
    UserError for more experts a token than experts.
    """
    ids: dict[str, Any] = {"bos_id": words.bos_id, "eos_id": words.eos_id, "pad_id": words.pad_id}
    config = GPT2Config(
        vocab_size=len(words),
        max_positions=positions,
        dim=options.width,
        layers=options.decoder_layers,
        heads=options.heads,
        activation="relu",
        embedding_dropout=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        add_cross_attention=cross_attention,
        **ids,
    )
    if options.experts is None:
        return GPT2(replace(config, hidden=options.decoder_hidden))
    hidden = options.decoder_hidden or max(1, 4 * config.dim // options.experts_per_token)
    mixture = Mixture(options.experts, options.experts_per_token, hidden, biased=options.balance == "bias")
    return GPT2Experts(GPT2ExpertsConfig(**vars(config) | {"layout": "gpt2_experts"}, experts=mixture))


def real_tokens(labels: Tensor) -> Tensor:
    """(B, A) bool: False for padding, which is what follows the last label of a row; labels (B, A), negative: none."""
    return (labels >= 0).flip(1).cumsum(1).flip(1) > 0


def by_layer(found: Sequence[Routing], layers: int) -> list[Routing]:
    """What the router of each layer decided, as one: a prefix may go through all layers before the tokens do."""
    flat = [Routing(*(part.flatten(0, -2) for part in one)) for one in found]
    return [Routing(*map(torch.cat, zip(*flat[layer::layers], strict=True))) for layer in range(layers)]


def routed_states(model: VQAModel, image: States, text: States | None, batch: Batch) -> tuple[Tensor, list[Routing]]:
    """(the decoder's states before the head (B, A, D), what its routers decided by layer); no padding is routed."""
    with routings(model.decoder) as found:
        real = real_tokens(batch.labels)
        hidden = model.hidden(image, text, batch.decoder_input_ids, batch.image_index, real)
    return hidden, by_layer(found, sum(isinstance(module, Router) for module in model.decoder.modules()))


class ExpertTraining:
    """The loss of a system while its experts train, and what happens after a step.

    `balance` is the option of that name. A loss spreads tokens by its gradient. Biases do so without one: after each
    step they move by the loads of all its parts and ranks.
    """

    def __init__(self, system: System[Any, VQAModel], optimizers: Optimizers, balance: str) -> None:
        self.model, self.world, self.balance = system.model, system.world, balance
        self.loads: list[Tensor] = []  # (L, E) of each part of the step so far
        if balance == "bias":
            optimizers.optimizers[-1].register_step_post_hook(lambda *_: self.move_biases())

    def loss(self, image: States, text: States | None, batch: Batch) -> tuple[Tensor, Tensor]:
        """As `System.loss`. The losses of the routers count as often as there are labelled tokens, by whose number of
        all parts and ranks the step divides."""
        hidden, found = routed_states(self.model, image, text, batch)
        loss, right = labelled_loss(hidden, self.model.decoder.head, batch.labels)
        if self.balance == "loss":
            loss = loss + (batch.labels >= 0).sum() * (BALANCE * balance_loss(found) + Z * z_loss(found))
        elif self.balance == "bias":
            self.loads.append(loads(found))
        return loss, right

    def move_biases(self) -> None:
        """Move them by the loads since the last time."""
        move_biases(self.model.decoder, self.world.sum_(sum(self.loads[1:], start=self.loads[0])))
        self.loads.clear()


def expert_training(system: System[Any, VQAModel], optimizers: Optimizers) -> ExpertTraining | None:
    """How the experts that `--experts` made are trained; None without, or if the decoder is frozen."""
    options = system.options
    if options.experts is None or options.freeze in ("decoder", "all"):
        return None
    return ExpertTraining(system, optimizers, options.balance)
