"""A text classifier: an encoder of the BERT family, a dense layer on the first token, tanh or ReLU, a linear head.

The layouts are those of RobertaForSequenceClassification (Liu et al. 2019) and its BERT and DistilBERT relatives; an
unused pooler and a buffer of position ids in their files are ignored. A reward model has one output. The config holds
the names of the classes, so that a class can be chosen by name.

Shapes: B batch, T text tokens, D width, C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.models.bert import Bert, BertConfig
from vqa_scratch.models.hf_config import Released, labels_from_hf, labels_to_hf
from vqa_scratch.nn.layers import init_weights
from vqa_scratch.storage import typed
from vqa_scratch.weights import maps
from vqa_scratch.weights.convert import find, load_into
from vqa_scratch.weights.files import map_tensor, resolve_folder


def _leave_in_file(table: nn.Embedding, source: str, tensors: dict[str, Tensor]) -> None:
    """Map `table` to its tensor in a safetensors file, if that has the same type, so that loading copies no row."""
    key = next((key for key in tensors if key.endswith("word_embeddings.weight")), "")
    held = map_tensor(resolve_folder(source), key)  # `load_into` reports what is missing or misshapen
    if held is not None and held.dtype == table.weight.dtype and held.shape == table.weight.shape:
        table.weight = nn.Parameter(held)
        tensors[key] = table.weight  # copying it to itself does nothing


class ClassifierLayout(NamedTuple):
    """What differs between the layouts of classifiers."""

    key_map: maps.KeyMap
    activation: Callable[[Tensor], Tensor]  # between the dense layer and the last
    architecture: str


LAYOUTS = {
    "bert": ClassifierLayout(maps.BERT_CLASSIFIER, torch.tanh, "BertForSequenceClassification"),
    "distilbert": ClassifierLayout(maps.DISTILBERT_CLASSIFIER, torch.relu, "DistilBertForSequenceClassification"),
    "roberta": ClassifierLayout(maps.ROBERTA_CLASSIFIER, torch.tanh, "RobertaForSequenceClassification"),
}


def check_label(labels: Sequence[str], label: str) -> None:
    """Raise UserError, listing the labels, unless `label` is one of them."""
    if label not in labels:
        raise UserError(f"the classifier has no class {label!r}; its classes are {', '.join(labels)}")


class TextClassifier(Released[BertConfig]):
    """Encoder and head; `labels` names the classes in the order of the logits."""

    def __init__(self, config: BertConfig, labels: tuple[str, ...]) -> None:
        super().__init__()
        if not labels or len(set(labels)) != len(labels):
            raise UserError(f"a classifier needs different labels, not {', '.join(labels) or 'none'}")
        self.layout = LAYOUTS[config.layout]
        self.config, self.labels = config, tuple(labels)
        self.encoder = Bert(config)
        self.dense = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, len(labels))
        self.dropout = nn.Dropout(config.dropout)
        for layer in (self.dense, self.out):
            init_weights(layer, config.init_std)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(B, T) -> logits (B, C). attention_mask (B, T), True = may attend; the first token is `<s>` or `[CLS]`.

        token_type_ids (B, T) say which of two texts a token belongs to, for models that know types.
        """
        first = self.encoder(input_ids, attention_mask, token_type_ids)[:, 0]  # (B, D)
        return self.out(self.dropout(self.layout.activation(self.dense(self.dropout(first)))))

    @property
    def key_map(self) -> maps.KeyMap:
        return self.layout.key_map

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], tensors: dict[str, Tensor], source: str) -> Self:
        """As in `Released`. The word table, a third of the weights, stays in the file: rows are read on first use."""
        layout = LAYOUTS.get(typed(source, config, {"model_type": str | None})[0])
        if layout is None:
            kinds = ", ".join(LAYOUTS)
            raise UserError(f"{source} holds a {config.get('model_type')} model; a classifier is one of {kinds}")
        (head,) = (key for entry in layout.key_map.head if entry.ours == "out.bias" for key in entry.theirs)
        bias = find(tensors, head)
        if bias is None:
            raise UserError(f"{source} has no {head}: it is not a sequence classifier")
        labels = labels_from_hf(config, bias.numel(), source)
        with torch.device("meta"):  # no memory, no random start
            model = cls(BertConfig.from_hf(config), labels)
        model.to_empty(device="cpu")
        _leave_in_file(model.encoder.tokens, source, tensors)
        load_into(model, tensors, model.key_map, source=source)
        return model.eval()

    def to_hf(self) -> dict[str, Any]:
        head = {"architectures": [self.layout.architecture], **labels_to_hf(self.labels)}
        return self.config.to_hf() | head
