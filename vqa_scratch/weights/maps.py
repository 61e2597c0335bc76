"""Key maps of checkpoints as data: the name of each of our parameters in released files.

A name holds a `{}` for the number of the layer, and one for that of an expert. `convert.py` uses a map to load and to
save. Their names are those in the files on the Hub; for ViT these differ from the module names of `transformers`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

ABSENT = ""  # in place of a key, for a part of a joined tensor that files do not have: zeros, which are not written
OLDER = {"gamma": "weight", "beta": "bias"}  # the parameters of a LayerNorm in files that came from TensorFlow


class Order(NamedTuple):
    """How a file lays out a tensor: from theirs to ours, and back."""

    read: Callable[[Tensor], Tensor] = lambda tensor: tensor
    write: Callable[[Tensor], Tensor] = lambda tensor: tensor


TRANSPOSED = Order(Tensor.t, Tensor.t)  # (in, out), as in GPT-2's Conv1D
SQUEEZED = Order(lambda tensor: tensor[None], lambda tensor: tensor[0])  # without our first axis, of length 1
SQUEEZED_TWICE = Order(lambda tensor: tensor[None, None], lambda tensor: tensor[0, 0])


class Entry(NamedTuple):
    """One of our parameters and its key in a file, or several keys to join along the first axis."""

    ours: str
    theirs: tuple[str, ...]
    order: Order = Order()
    shares: tuple[int, ...] = ()  # how several keys divide the rows; (): evenly


@dataclass(frozen=True)
class KeyMap:
    """The layout of one kind of checkpoint."""

    body: tuple[Entry, ...]  # keys that may carry the prefix
    prefix: str = ""  # "bert." and the like: present when the file was saved with a head on top
    write_prefix: bool = False  # whether an export carries it
    head: tuple[Entry, ...] = ()  # keys that never carry the prefix
    dropped: tuple[str, ...] = ()  # keys, with `{}` for any number, that the model does not need, such as buffers
    tied: dict[str, str] = field(default_factory=dict)  # key -> the key it must equal: the model shares that tensor
    spellings: tuple[tuple[str, str], ...] = ()  # how else keys may begin, as patterns, and how here

    def bare(self, key: str) -> str:
        """A key of a file without its prefix, and spelled as here."""
        key, old = key.removeprefix(self.prefix), key.rpartition(".")[2]
        for pattern, spelling in self.spellings:
            key = re.sub(f"^{pattern}", spelling, key)
        return key.removesuffix(old) + OLDER[old] if old in OLDER else key


def weight(ours: str, *theirs: str, transposed: bool = False) -> tuple[Entry, ...]:
    """A module with a weight only."""
    return (Entry(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), TRANSPOSED if transposed else Order()),)


def linear(ours: str, *theirs: str, transposed: bool = False) -> tuple[Entry, ...]:
    """A module with weight and bias; several keys are joined in the given order. A bias is never transposed."""
    return (
        *weight(ours, *theirs, transposed=transposed),
        Entry(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs)),
    )


def nested(ours: str, entries: tuple[Entry, ...], theirs: str = "") -> tuple[Entry, ...]:
    """The entries of a part of a model: `ours` and `theirs` are put before its names and keys."""
    return tuple(e._replace(ours=ours + e.ours, theirs=tuple(theirs + key for key in e.theirs)) for e in entries)


# Heads in released files. Every layout ignores them, except where the head is part of the model.
_HEADS = {
    "ViT, DeiT, DINOv2": "classifier cls_classifier distillation_classifier pooler.dense",
    "BERT": """qa_outputs cls.seq_relationship cls.predictions.decoder
        cls.predictions.transform.dense cls.predictions.transform.LayerNorm""",
    "DistilBERT": "vocab_transform vocab_layer_norm vocab_projector pre_classifier",
    "RoBERTa": "classifier.dense classifier.out_proj lm_head.dense lm_head.layer_norm lm_head.decoder",
    "ViLT": """classifier.0 classifier.1 classifier.3 rank_output mlm_score.decoder
        mlm_score.transform.dense mlm_score.transform.LayerNorm""",
    "ResNet": "fc",
    "masked images": "decoder.0",
    "sequence classifiers, value heads": "score v_head.summary value_head v_head",
}
HEADS = (
    *(f"{module}.{part}" for names in _HEADS.values() for module in names.split() for part in ("weight", "bias")),
    *("cls.predictions.bias", "lm_head.bias", "mlm_score.bias", "embeddings.mask_token"),
)

_QKV = ("query", "key", "value")
_VIT_LAYER = "encoder.layer.{}"
_VIT_SHARED = (  # by ViT, DeiT and DINOv2
    Entry("cls_token", ("embeddings.cls_token",)),
    Entry("positions", ("embeddings.position_embeddings",)),
    *linear("patch_embed", "embeddings.patch_embeddings.projection"),
    *linear("blocks.{}.attn.qkv", *(f"{_VIT_LAYER}.attention.attention.{name}" for name in _QKV)),
    *linear("blocks.{}.attn.out", f"{_VIT_LAYER}.attention.output.dense"),
    *linear("norm", "layernorm"),
)
VIT = KeyMap(
    prefix="vit.",
    body=(
        *_VIT_SHARED,
        *linear("blocks.{}.norm1", f"{_VIT_LAYER}.layernorm_before"),
        *linear("blocks.{}.norm2", f"{_VIT_LAYER}.layernorm_after"),
        *linear("blocks.{}.mlp.up", f"{_VIT_LAYER}.intermediate.dense"),
        *linear("blocks.{}.mlp.down", f"{_VIT_LAYER}.output.dense"),
    ),
)
DEIT = KeyMap(prefix="deit.", body=(*VIT.body, Entry("distillation_token", ("embeddings.distillation_token",))))
DINOV2 = KeyMap(
    prefix="dinov2.",
    body=(
        *_VIT_SHARED,
        Entry("registers", ("embeddings.register_tokens",)),
        *linear("blocks.{}.norm1", f"{_VIT_LAYER}.norm1"),
        *linear("blocks.{}.norm2", f"{_VIT_LAYER}.norm2"),
        Entry("blocks.{}.scale1.weight", (f"{_VIT_LAYER}.layer_scale1.lambda1",)),
        Entry("blocks.{}.scale2.weight", (f"{_VIT_LAYER}.layer_scale2.lambda1",)),
        *linear("blocks.{}.mlp.up", f"{_VIT_LAYER}.mlp.fc1"),
        *linear("blocks.{}.mlp.down", f"{_VIT_LAYER}.mlp.fc2"),
        *linear("blocks.{}.mlp.gate_up", f"{_VIT_LAYER}.mlp.weights_in"),
        *linear("blocks.{}.mlp.out", f"{_VIT_LAYER}.mlp.weights_out"),
    ),
)
DINOV2_WITH_REGISTERS = replace(DINOV2, prefix="dinov2_with_registers.")

_BERT_EMBEDDINGS = (
    *weight("tokens", "word_embeddings"),
    *weight("positions", "position_embeddings"),
    *weight("token_types", "token_type_embeddings"),
    *linear("norm", "LayerNorm"),
)


def bert_block(attention: str, mlp: str) -> tuple[Entry, ...]:
    """A block of BERT or of a Q-Former, which differ in a name in their attention and in their MLP."""
    layer = "encoder.layer.{}"
    return (
        *linear("blocks.{}.attn.qkv", *(f"{layer}.attention.{attention}.{name}" for name in _QKV)),
        *linear("blocks.{}.attn.out", f"{layer}.attention.output.dense"),
        *linear("blocks.{}.norm1", f"{layer}.attention.output.LayerNorm"),
        *linear("blocks.{}.mlp.up", f"{layer}.intermediate{mlp}.dense"),
        *linear("blocks.{}.mlp.down", f"{layer}.output{mlp}.dense"),
        *linear("blocks.{}.norm2", f"{layer}.output{mlp}.LayerNorm"),
    )


BERT = KeyMap(
    prefix="bert.",
    body=(*nested("", _BERT_EMBEDDINGS, "embeddings."), *bert_block("self", "")),
    dropped=("embeddings.position_ids",),
)
ROBERTA = replace(BERT, prefix="roberta.")
ROBERTA_CLASSIFIER = replace(
    ROBERTA,
    write_prefix=True,
    body=nested("encoder.", ROBERTA.body),
    head=(*linear("dense", "classifier.dense"), *linear("out", "classifier.out_proj")),
)
BERT_CLASSIFIER = replace(
    BERT,
    write_prefix=True,
    body=(*nested("encoder.", BERT.body), *linear("dense", "pooler.dense")),
    head=linear("out", "classifier"),
)

# The word embeddings of ViLT have BERT's names, all else has ViT's.
VILT = KeyMap(
    prefix="vilt.",
    body=(
        *nested("words.", _BERT_EMBEDDINGS, "embeddings.text_embeddings."),
        *nested("tower.", VIT.body),
        *weight("modality", "embeddings.token_type_embeddings"),
        *linear("pooler", "pooler.dense"),
    ),
    dropped=("embeddings.text_embeddings.position_ids", "embeddings.text_embeddings.token_type_ids"),
)
VILT_CLASSIFIER = replace(
    VILT,
    write_prefix=True,
    body=nested("vilt.", VILT.body),
    head=(*linear("up", "classifier.0"), *linear("norm", "classifier.1"), *linear("out", "classifier.3")),
)

_DISTILBERT_LAYER = "transformer.layer.{}"
DISTILBERT = KeyMap(
    prefix="distilbert.",
    body=(
        *weight("tokens", "embeddings.word_embeddings"),
        *weight("positions", "embeddings.position_embeddings"),
        *linear("norm", "embeddings.LayerNorm"),
        *linear("blocks.{}.attn.qkv", *(f"{_DISTILBERT_LAYER}.attention.{name}_lin" for name in "qkv")),
        *linear("blocks.{}.attn.out", f"{_DISTILBERT_LAYER}.attention.out_lin"),
        *linear("blocks.{}.norm1", f"{_DISTILBERT_LAYER}.sa_layer_norm"),
        *linear("blocks.{}.mlp.up", f"{_DISTILBERT_LAYER}.ffn.lin1"),
        *linear("blocks.{}.mlp.down", f"{_DISTILBERT_LAYER}.ffn.lin2"),
        *linear("blocks.{}.norm2", f"{_DISTILBERT_LAYER}.output_layer_norm"),
    ),
    dropped=("embeddings.position_ids",),
)
DISTILBERT_CLASSIFIER = replace(
    DISTILBERT,
    write_prefix=True,
    body=nested("encoder.", DISTILBERT.body),
    head=(*linear("dense", "pre_classifier"), *linear("out", "classifier")),
)

GPT2_CROSS = (
    *linear("blocks.{}.norm_cross", "h.{}.ln_cross_attn"),
    *linear("blocks.{}.cross.q", "h.{}.crossattention.q_attn", transposed=True),
    *linear("blocks.{}.cross.kv", "h.{}.crossattention.c_attn", transposed=True),
    *linear("blocks.{}.cross.out", "h.{}.crossattention.c_proj", transposed=True),
)
GPT2 = KeyMap(
    prefix="transformer.",
    write_prefix=True,
    body=(
        *weight("tokens", "wte"),
        *weight("positions", "wpe"),
        *linear("blocks.{}.norm1", "h.{}.ln_1"),
        *linear("blocks.{}.attn.qkv", "h.{}.attn.c_attn", transposed=True),
        *linear("blocks.{}.attn.out", "h.{}.attn.c_proj", transposed=True),
        *GPT2_CROSS,
        *linear("blocks.{}.norm2", "h.{}.ln_2"),
        *linear("blocks.{}.mlp.up", "h.{}.mlp.c_fc", transposed=True),
        *linear("blocks.{}.mlp.down", "h.{}.mlp.c_proj", transposed=True),
        *linear("norm", "ln_f"),
    ),
    dropped=(
        # Causal masks that old releases saved with the weights.
        "h.{}.attn.bias",
        "h.{}.attn.masked_bias",
        "h.{}.crossattention.bias",
        "h.{}.crossattention.masked_bias",
    ),
    tied={"lm_head.weight": "wte.weight"},
)

_OPT_LAYER = "decoder.layers.{}"
OPT = KeyMap(
    prefix="model.",
    write_prefix=True,
    body=(
        *weight("tokens", "decoder.embed_tokens"),
        *weight("positions", "decoder.embed_positions"),
        *weight("project_in", "decoder.project_in"),
        *weight("project_out", "decoder.project_out"),
        *linear("blocks.{}.attn.qkv", *(f"{_OPT_LAYER}.self_attn.{name}_proj" for name in "qkv")),
        *linear("blocks.{}.attn.out", f"{_OPT_LAYER}.self_attn.out_proj"),
        *linear("blocks.{}.norm1", f"{_OPT_LAYER}.self_attn_layer_norm"),
        *linear("blocks.{}.norm2", f"{_OPT_LAYER}.final_layer_norm"),
        *linear("blocks.{}.mlp.up", f"{_OPT_LAYER}.fc1"),
        *linear("blocks.{}.mlp.down", f"{_OPT_LAYER}.fc2"),
        *linear("norm", "decoder.final_layer_norm"),
    ),
    tied={"lm_head.weight": "decoder.embed_tokens.weight"},
)


def _t5(**gates: str) -> KeyMap:
    """`gates` are the layers of the MLP before its last, which differ between plain and gated models."""
    body = [*weight("embedding", "shared")]
    for part, mlp in (("encoder", 1), ("decoder", 2)):  # a decoder block has cross-attention before the MLP
        ours, theirs = f"{part}.blocks.{{}}", f"{part}.block.{{}}.layer"
        body += weight(f"{part}.bias.table", f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias")
        body += weight(f"{ours}.attn.qkv", *(f"{theirs}.0.SelfAttention.{x}" for x in "qkv"))
        body += weight(f"{ours}.attn.out", f"{theirs}.0.SelfAttention.o")
        body += weight(f"{ours}.attn_norm", f"{theirs}.0.layer_norm")
        for name, key in {**gates, "down": "wo"}.items():
            body += weight(f"{ours}.mlp.{name}", f"{theirs}.{mlp}.DenseReluDense.{key}")
        body += weight(f"{ours}.mlp_norm", f"{theirs}.{mlp}.layer_norm")
        body += weight(f"{part}.norm", f"{part}.final_layer_norm")
    cross = "decoder.block.{}.layer.1.EncDecAttention"
    body += weight("decoder.blocks.{}.cross.q", f"{cross}.q")
    body += weight("decoder.blocks.{}.cross.kv", f"{cross}.k", f"{cross}.v")
    body += weight("decoder.blocks.{}.cross.out", f"{cross}.o")
    body += weight("decoder.blocks.{}.cross_norm", "decoder.block.{}.layer.1.layer_norm")
    return KeyMap(
        body=tuple(body),
        head=weight("lm_head", "lm_head"),
        # The first release has a bias table in cross-attention, which never had positions.
        dropped=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
        tied={"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"},
    )


T5 = _t5(up="wi")
T5_GATED = _t5(gate="wi_0", up="wi_1")


def batch_norm(ours: str, theirs: str) -> tuple[Entry, ...]:
    """A batch norm with its statistics."""
    parts = ("weight", "bias", "running_mean", "running_var")
    return tuple(Entry(f"{ours}.{part}", (f"{theirs}.{part}",)) for part in parts)


def _resnet() -> KeyMap:
    """torchvision's ResNets of every depth; basic blocks have no third convolution."""
    body = [*weight("conv1", "conv1"), *batch_norm("norm1", "bn1")]
    for stage in (f"layer{i}.{{}}" for i in (1, 2, 3, 4)):
        for i in (1, 2, 3):
            body += weight(f"{stage}.conv{i}", f"{stage}.conv{i}")
            body += batch_norm(f"{stage}.norm{i}", f"{stage}.bn{i}")
        body += weight(f"{stage}.shortcut.conv", f"{stage}.downsample.0")
        body += batch_norm(f"{stage}.shortcut.norm", f"{stage}.downsample.1")
    norms = ("bn1", "layer{}.{}.bn{}", "layer{}.{}.downsample.1")
    return KeyMap(body=tuple(body), dropped=tuple(f"{norm}.num_batches_tracked" for norm in norms))


RESNET = _resnet()
