"""A text classifier: a RoBERTa encoder, a dense layer on the first token, tanh, a linear head. Liu et al. 2019.

Loads RobertaForSequenceClassification checkpoints, the usual reward models of small RLHF experiments.

Shapes: B batch, T text tokens, D width.
"""

from os import PathLike
from typing import Any, Self

import torch
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.models.bert import Bert, BertConfig
from vqa_scratch.nn.layers import init_weights
from vqa_scratch.weights import maps
from vqa_scratch.weights.convert import load_into, to_hf
from vqa_scratch.weights.files import read_checkpoint, write_checkpoint


def _labels(hf: dict[str, Any]) -> tuple[str, ...]:
    """Class names in order; config.json leaves them out when there are two without names."""
    names = hf.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    if sorted(names, key=int) != [str(i) for i in range(len(names))]:
        raise UserError(f"config.json numbers its labels {', '.join(names)}; expected 0 to {len(names) - 1}")
    return tuple(names[str(i)] for i in range(len(names)))


class TextClassifier(nn.Module):
    """Encoder and head; `labels` names the classes in the order of the logits."""

    def __init__(self, config: BertConfig, labels: tuple[str, ...]) -> None:
        super().__init__()
        if config.layout != "roberta":
            raise UserError(f"this classifier is RoBERTa's, its encoder cannot be {config.layout}")
        self.labels = labels
        self.encoder = Bert(config)
        self.dense = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, len(labels))
        self.dropout = nn.Dropout(config.dropout)
        for layer in (self.dense, self.out):
            init_weights(layer, config.init_std)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> logits (B, classes). attention_mask (B, T), True = may attend; the first token is `<s>`."""
        first = self.encoder(input_ids, attention_mask)[:, 0]  # (B, D)
        return self.out(self.dropout(torch.tanh(self.dense(self.dropout(first)))))

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str]) -> Self:
        """From a checkpoint folder or Hub id, in eval mode. Raises UserError when something does not fit."""
        hf, tensors = read_checkpoint(source)
        model = cls(BertConfig.from_hf(hf), _labels(hf))
        load_into(model, tensors, maps.ROBERTA_CLASSIFIER, source=str(source))
        return model.eval()

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """config.json and model.safetensors that `from_pretrained` and `transformers` read."""
        config = self.encoder.config.to_hf() | {
            "architectures": ["RobertaForSequenceClassification"],
            "id2label": {str(i): label for i, label in enumerate(self.labels)},
            "label2id": {label: i for i, label in enumerate(self.labels)},
        }
        write_checkpoint(folder, config, to_hf(self, maps.ROBERTA_CLASSIFIER))
