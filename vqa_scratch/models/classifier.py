"""A text classifier: a RoBERTa encoder, a dense layer on the first token, tanh, a linear head. Liu et al. 2019.

The layout is that of RobertaForSequenceClassification; an unused pooler and a buffer of position ids in its files are
ignored. The config holds the names of the classes, so that a class can be chosen by name.

Shapes: B batch, T text tokens, D width, C classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.models.bert import Bert, BertConfig
from vqa_scratch.models.hf_config import Released, labels_from_hf, labels_to_hf
from vqa_scratch.nn.layers import init_weights
from vqa_scratch.weights import maps
from vqa_scratch.weights.convert import load_into
from vqa_scratch.weights.files import map_tensor, resolve_folder


def _leave_in_file(table: nn.Embedding, source: str, tensors: dict[str, Tensor]) -> None:
    """Map `table` to its tensor in a safetensors file, if that has the same type, so that loading copies no row."""
    key = next((key for key in tensors if key.endswith("word_embeddings.weight")), "")
    held = map_tensor(resolve_folder(source), key)  # `load_into` reports what is missing or misshapen
    if held is not None and held.dtype == table.weight.dtype and held.shape == table.weight.shape:
        table.weight = nn.Parameter(held)
        tensors[key] = table.weight  # copying it to itself does nothing


def check_label(labels: Sequence[str], label: str) -> None:
    """Raise UserError, listing the labels, unless `label` is one of them."""
    if label not in labels:
        raise UserError(f"the classifier has no class {label!r}; its classes are {', '.join(labels)}")


class TextClassifier(Released, nn.Module):
    """Encoder and head; `labels` names the classes in the order of the logits."""

    key_map = maps.ROBERTA_CLASSIFIER

    def __init__(self, config: BertConfig, labels: tuple[str, ...]) -> None:
        super().__init__()
        if config.layout != "roberta":
            raise UserError(f"a text classifier is a roberta, not a {config.layout}")
        if len(labels) < 2 or len(set(labels)) != len(labels):
            raise UserError(f"a classifier needs two or more different labels, not {', '.join(labels) or 'none'}")
        self.config, self.labels = config, tuple(labels)
        self.encoder = Bert(config)
        self.dense = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, len(labels))
        self.dropout = nn.Dropout(config.dropout)
        for layer in (self.dense, self.out):
            init_weights(layer, config.init_std)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> logits (B, C). attention_mask (B, T), True = may attend; the first token is `<s>`."""
        first = self.encoder(input_ids, attention_mask)[:, 0]  # (B, D)
        return self.out(self.dropout(torch.tanh(self.dense(self.dropout(first)))))

    def label_index(self, label: str) -> int:
        """The index of the logit of `label`. Raises UserError that lists the labels."""
        check_label(self.labels, label)
        return self.labels.index(label)

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], tensors: dict[str, Tensor], source: str) -> Self:
        """As in `Released`. The word table, a third of the weights, stays in the file: rows are read on first use."""
        if config.get("model_type") != "roberta":
            raise UserError(f"{source} holds a {config.get('model_type')} model, not a roberta classifier")
        classes = len(tensors.get("classifier.out_proj.bias", ()))
        if not classes:
            raise UserError(f"{source} has no classifier.out_proj: it is not a sequence classifier")
        labels = labels_from_hf(config, classes, source)
        with torch.device("meta"):  # no memory, no random start
            model = cls(BertConfig.from_hf(config), labels)
        model.to_empty(device="cpu")
        _leave_in_file(model.encoder.tokens, source, tensors)
        load_into(model, tensors, cls.key_map, source=source)
        return model.eval()

    def to_hf(self) -> dict[str, Any]:
        head = {"architectures": ["RobertaForSequenceClassification"], **labels_to_hf(self.labels)}
        return self.config.to_hf() | head
