"""Key maps of checkpoints as data: the name of each of our parameters in released files.

A name holds a `{}` for the number of the layer, and one for that of an expert. `convert.py` uses a map to load and to
save. Their names are those in the files on the Hub; for ViT these differ from the module names of `transformers`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
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


def each(make: Callable[..., tuple[Entry, ...]], ours: str, theirs: str, pairs: str) -> tuple[Entry, ...]:
    """`weight` or `linear` of many modules: `pairs` are our names, after `ours`, and their keys, after `theirs`, with
    a + between keys that are joined: "attn.qkv=query+key+value mlp.up=fc1"."""
    named = (pair.split("=") for pair in pairs.split())
    return tuple(e for name, keys in named for e in make(ours + name, *(theirs + key for key in keys.split("+"))))


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

BLOCK, _VIT_LAYER = "blocks.{}.", "encoder.layer.{}."  # before the names of what a layer has, ours and theirs
_VIT_ATTENTION = "attn.qkv=attention.query+attention.key+attention.value attn.out=output.dense"
_VIT_SHARED = (  # by ViT, DeiT and DINOv2
    Entry("cls_token", ("embeddings.cls_token",)),
    Entry("positions", ("embeddings.position_embeddings",)),
    *each(linear, "", "", "patch_embed=embeddings.patch_embeddings.projection norm=layernorm"),
    *each(linear, BLOCK, f"{_VIT_LAYER}attention.", _VIT_ATTENTION),
)
VIT = KeyMap(
    prefix="vit.",
    body=(
        *_VIT_SHARED,
        *each(linear, BLOCK, _VIT_LAYER, "norm1=layernorm_before norm2=layernorm_after"),
        *each(linear, BLOCK, _VIT_LAYER, "mlp.up=intermediate.dense mlp.down=output.dense"),
    ),
)
DEIT = KeyMap(prefix="deit.", body=(*VIT.body, Entry("distillation_token", ("embeddings.distillation_token",))))
DINOV2 = KeyMap(
    prefix="dinov2.",
    body=(
        *_VIT_SHARED,
        Entry("registers", ("embeddings.register_tokens",)),
        Entry("blocks.{}.scale1.weight", (f"{_VIT_LAYER}layer_scale1.lambda1",)),
        Entry("blocks.{}.scale2.weight", (f"{_VIT_LAYER}layer_scale2.lambda1",)),
        *each(linear, BLOCK, _VIT_LAYER, "norm1=norm1 norm2=norm2 mlp.up=mlp.fc1 mlp.down=mlp.fc2"),
        *each(linear, BLOCK, _VIT_LAYER, "mlp.gate_up=mlp.weights_in mlp.out=mlp.weights_out"),
    ),
)
DINOV2_WITH_REGISTERS = replace(DINOV2, prefix="dinov2_with_registers.")

_BERT_EMBEDDINGS = (
    *each(weight, "", "", "tokens=word_embeddings positions=position_embeddings token_types=token_type_embeddings"),
    *linear("norm", "LayerNorm"),
)


def bert_block(attention: str, mlp: str) -> tuple[Entry, ...]:
    """A block of BERT or of a Q-Former, which differ in a name in their attention and in their MLP."""
    inputs = (f"{attention}.{name}" for name in ("query", "key", "value"))
    parts = f"attn.qkv={'+'.join(inputs)} attn.out=output.dense norm1=output.LayerNorm"
    return (
        *each(linear, BLOCK, "encoder.layer.{}.attention.", parts),
        *each(linear, BLOCK, "encoder.layer.{}.", f"mlp.up=intermediate{mlp}.dense mlp.down=output{mlp}.dense"),
        *linear("blocks.{}.norm2", f"encoder.layer.{{}}.output{mlp}.LayerNorm"),
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

DISTILBERT = KeyMap(
    prefix="distilbert.",
    body=(
        *each(weight, "", "embeddings.", "tokens=word_embeddings positions=position_embeddings"),
        *linear("norm", "embeddings.LayerNorm"),
        *each(
            linear,
            BLOCK,
            "transformer.layer.{}.",
            """attn.qkv=attention.q_lin+attention.k_lin+attention.v_lin attn.out=attention.out_lin
            norm1=sa_layer_norm mlp.up=ffn.lin1 mlp.down=ffn.lin2 norm2=output_layer_norm""",
        ),
    ),
    dropped=("embeddings.position_ids",),
)
DISTILBERT_CLASSIFIER = replace(
    DISTILBERT,
    write_prefix=True,
    body=nested("encoder.", DISTILBERT.body),
    head=(*linear("dense", "pre_classifier"), *linear("out", "classifier")),
)

_TRANSPOSED = partial(linear, transposed=True)
GPT2_CROSS = (
    *linear("blocks.{}.norm_cross", "h.{}.ln_cross_attn"),
    *each(_TRANSPOSED, f"{BLOCK}cross.", "h.{}.crossattention.", "q=q_attn kv=c_attn out=c_proj"),
)
GPT2 = KeyMap(
    prefix="transformer.",
    write_prefix=True,
    body=(
        *each(weight, "", "", "tokens=wte positions=wpe"),
        *each(linear, "", "", "blocks.{}.norm1=h.{}.ln_1 blocks.{}.norm2=h.{}.ln_2 norm=ln_f"),
        *each(_TRANSPOSED, BLOCK, "h.{}.", "attn.qkv=attn.c_attn attn.out=attn.c_proj"),
        *each(_TRANSPOSED, f"{BLOCK}mlp.", "h.{}.mlp.", "up=c_fc down=c_proj"),
        *GPT2_CROSS,
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

SELF_ATTENTION = "attn.qkv=self_attn.q_proj+self_attn.k_proj+self_attn.v_proj attn.out=self_attn.out_proj"
OPT = KeyMap(
    prefix="model.",
    write_prefix=True,
    body=(
        *each(weight, "", "decoder.", "tokens=embed_tokens positions=embed_positions"),
        *each(weight, "", "decoder.", "project_in=project_in project_out=project_out"),
        *each(linear, BLOCK, "decoder.layers.{}.", f"{SELF_ATTENTION} mlp.up=fc1 mlp.down=fc2"),
        *each(linear, BLOCK, "decoder.layers.{}.", "norm1=self_attn_layer_norm norm2=final_layer_norm"),
        *linear("norm", "decoder.final_layer_norm"),
    ),
    tied={"lm_head.weight": "decoder.embed_tokens.weight"},
)


def _t5(gates: str) -> KeyMap:
    """`gates` are the layers of the MLP before its last, which differ between plain and gated models."""
    body = [*weight("embedding", "shared")]
    for part, mlp in (("encoder", 1), ("decoder", 2)):  # a decoder block has cross-attention before the MLP
        ours, theirs = f"{part}.{BLOCK}", f"{part}.block.{{}}.layer."
        body += weight(f"{part}.bias.table", f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias")
        body += each(weight, f"{ours}attn.", f"{theirs}0.SelfAttention.", "qkv=q+k+v out=o")
        body += each(weight, f"{ours}mlp.", f"{theirs}{mlp}.DenseReluDense.", f"{gates} down=wo")
        body += each(weight, ours, theirs, f"attn_norm=0.layer_norm mlp_norm={mlp}.layer_norm")
        body += weight(f"{part}.norm", f"{part}.final_layer_norm")
    cross = "decoder.block.{}.layer.1."
    body += each(weight, f"decoder.{BLOCK}cross.", f"{cross}EncDecAttention.", "q=q kv=k+v out=o")
    body += weight(f"decoder.{BLOCK}cross_norm", f"{cross}layer_norm")
    return KeyMap(
        body=tuple(body),
        head=weight("lm_head", "lm_head"),
        # The first release has a bias table in cross-attention, which never had positions.
        dropped=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
        tied={"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"},
    )


T5 = _t5("up=wi")
T5_GATED = _t5("gate=wi_0 up=wi_1")


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
