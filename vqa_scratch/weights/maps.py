"""Checkpoint key maps as data: what each parameter of ours is called in the files that others share.

A template holds at most one layer slot `{}`. A map is read in both directions by `convert`: loading and exporting.
The foreign names are those that files on the Hub carry, which for ViT differ from the module names of `transformers`.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple


class Entry(NamedTuple):
    """One parameter of ours and the key, or keys joined along the first axis, it has in a file."""

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False  # the file holds (in, out), as GPT-2's Conv1D does


@dataclass(frozen=True)
class KeyMap:
    """How one kind of checkpoint is laid out."""

    body: tuple[Entry, ...]  # keys that may carry the prefix
    prefix: str = ""  # "bert." and the like: present when the file was saved with a head on top
    write_prefix: bool = False  # whether an export carries it
    head: tuple[Entry, ...] = ()  # keys that never carry the prefix
    dropped: tuple[str, ...] = ()  # known buffers and the like, prefix removed, that the model has no use for
    tied: dict[str, str] = field(default_factory=dict)  # key -> the key it must equal: the model shares that tensor
    older: dict[str, str] = field(default_factory=dict)  # endings of keys in old files -> the endings they have now

    @property
    def ignored(self) -> tuple[str, ...]:
        """Keys, prefix removed, that a file may hold beside those of the model."""
        return (*HEADS, *self.dropped)

    def bare(self, key: str) -> str:
        """A file's key without prefix and in today's spelling."""
        key = key.removeprefix(self.prefix)
        for old, new in self.older.items():
            if key.endswith(old):
                key = key.removesuffix(old) + new
        return key


def weight(ours: str, *theirs: str, transposed: bool = False) -> tuple[Entry, ...]:
    """A module with a weight only."""
    return (Entry(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), transposed),)


def linear(ours: str, *theirs: str, transposed: bool = False) -> tuple[Entry, ...]:
    """A module with weight and bias; several foreign names are joined in the order given. A bias is never turned."""
    return (
        *weight(ours, *theirs, transposed=transposed),
        Entry(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs)),
    )


# Heads that released files carry on top of these models. They are known, and ignored, in every layout; a model that has
# one of them as a part of its own reads it all the same.
_HEADS = {
    "ViT, DeiT, DINOv2": "classifier cls_classifier distillation_classifier pooler.dense",
    "BERT": """qa_outputs cls.seq_relationship cls.predictions.decoder
        cls.predictions.transform.dense cls.predictions.transform.LayerNorm""",
    "DistilBERT": "vocab_transform vocab_layer_norm vocab_projector pre_classifier",
    "RoBERTa": "classifier.dense classifier.out_proj lm_head.dense lm_head.layer_norm lm_head.decoder",
    "ViLT": """classifier.0 classifier.1 classifier.3 rank_output mlm_score.decoder
        mlm_score.transform.dense mlm_score.transform.LayerNorm""",
    "ResNet": "fc",
}
HEADS = (
    *(f"{module}.{part}" for names in _HEADS.values() for module in names.split() for part in ("weight", "bias")),
    *("cls.predictions.bias", "lm_head.bias", "mlm_score.bias"),
)

_VIT_LAYER = "encoder.layer.{}"
_VIT_SHARED = (  # by all of its relatives
    Entry("cls_token", ("embeddings.cls_token",)),
    Entry("positions", ("embeddings.position_embeddings",)),
    *linear("patch_embed", "embeddings.patch_embeddings.projection"),
    *linear("blocks.{}.attn.qkv", *(f"{_VIT_LAYER}.attention.attention.{name}" for name in ("query", "key", "value"))),
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
DEIT = KeyMap(
    prefix="deit.",
    body=(*VIT.body, Entry("distillation_token", ("embeddings.distillation_token",))),
)
DINOV2 = KeyMap(
    prefix="dinov2.",
    body=(
        *_VIT_SHARED,
        Entry("registers", ("embeddings.register_tokens",)),
        *(
            entry
            for i in (1, 2)
            for entry in (
                *linear(f"blocks.{{}}.norm{i}", f"{_VIT_LAYER}.norm{i}"),
                Entry(f"blocks.{{}}.scale{i}.weight", (f"{_VIT_LAYER}.layer_scale{i}.lambda1",)),
            )
        ),
        *linear("blocks.{}.mlp.up", f"{_VIT_LAYER}.mlp.fc1"),
        *linear("blocks.{}.mlp.down", f"{_VIT_LAYER}.mlp.fc2"),
        *linear("blocks.{}.mlp.gate_up", f"{_VIT_LAYER}.mlp.weights_in"),
        *linear("blocks.{}.mlp.out", f"{_VIT_LAYER}.mlp.weights_out"),
    ),
    dropped=("embeddings.mask_token",),
)
DINOV2_WITH_REGISTERS = replace(DINOV2, prefix="dinov2_with_registers.")

_BERT_LAYER = "encoder.layer.{}"
_BERT_BODY = (
    *weight("tokens", "embeddings.word_embeddings"),
    *weight("positions", "embeddings.position_embeddings"),
    *weight("token_types", "embeddings.token_type_embeddings"),
    *linear("norm", "embeddings.LayerNorm"),
    *linear("blocks.{}.attn.qkv", *(f"{_BERT_LAYER}.attention.self.{name}" for name in ("query", "key", "value"))),
    *linear("blocks.{}.attn.out", f"{_BERT_LAYER}.attention.output.dense"),
    *linear("blocks.{}.norm1", f"{_BERT_LAYER}.attention.output.LayerNorm"),
    *linear("blocks.{}.mlp.up", f"{_BERT_LAYER}.intermediate.dense"),
    *linear("blocks.{}.mlp.down", f"{_BERT_LAYER}.output.dense"),
    *linear("blocks.{}.norm2", f"{_BERT_LAYER}.output.LayerNorm"),
)
BERT = KeyMap(
    prefix="bert.",
    body=_BERT_BODY,
    dropped=("embeddings.position_ids",),
    older={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
)
ROBERTA = KeyMap(
    prefix="roberta.",
    body=_BERT_BODY,
    dropped=("embeddings.position_ids",),
)
ROBERTA_CLASSIFIER = KeyMap(
    prefix="roberta.",
    write_prefix=True,
    body=tuple(Entry(f"encoder.{entry.ours}", *entry[1:]) for entry in _BERT_BODY),
    head=(*linear("dense", "classifier.dense"), *linear("out", "classifier.out_proj")),
    dropped=("embeddings.position_ids",),
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
        # Causal masks that old releases saved beside the weights.
        "h.{}.attn.bias",
        "h.{}.attn.masked_bias",
        "h.{}.crossattention.bias",
        "h.{}.crossattention.masked_bias",
    ),
    tied={"lm_head.weight": "wte.weight"},
)

# The two towers of T5 differ in where the feed-forward layer stands: a decoder block has cross-attention before it.
_T5_DECODER = "decoder.block.{}.layer"
_T5_SHARED = (
    *weight("embedding", "shared"),
    *(
        entry
        for tower, mlp in (("encoder", 1), ("decoder", 2))
        for entry in (
            *weight(f"{tower}.bias.table", f"{tower}.block.0.layer.0.SelfAttention.relative_attention_bias"),
            *weight(f"{tower}.blocks.{{}}.attn.qkv", *(f"{tower}.block.{{}}.layer.0.SelfAttention.{x}" for x in "qkv")),
            *weight(f"{tower}.blocks.{{}}.attn.out", f"{tower}.block.{{}}.layer.0.SelfAttention.o"),
            *weight(f"{tower}.blocks.{{}}.attn_norm", f"{tower}.block.{{}}.layer.0.layer_norm"),
            *weight(f"{tower}.blocks.{{}}.mlp.down", f"{tower}.block.{{}}.layer.{mlp}.DenseReluDense.wo"),
            *weight(f"{tower}.blocks.{{}}.mlp_norm", f"{tower}.block.{{}}.layer.{mlp}.layer_norm"),
            *weight(f"{tower}.norm", f"{tower}.final_layer_norm"),
        )
    ),
    *weight("decoder.blocks.{}.cross.q", f"{_T5_DECODER}.1.EncDecAttention.q"),
    *weight("decoder.blocks.{}.cross.kv", *(f"{_T5_DECODER}.1.EncDecAttention.{x}" for x in "kv")),
    *weight("decoder.blocks.{}.cross.out", f"{_T5_DECODER}.1.EncDecAttention.o"),
    *weight("decoder.blocks.{}.cross_norm", f"{_T5_DECODER}.1.layer_norm"),
)


def _t5(**mlp: str) -> KeyMap:
    return KeyMap(
        body=(
            *_T5_SHARED,
            *(
                entry
                for tower, layer in (("encoder", 1), ("decoder", 2))
                for ours, theirs in mlp.items()
                for entry in weight(
                    f"{tower}.blocks.{{}}.mlp.{ours}", f"{tower}.block.{{}}.layer.{layer}.DenseReluDense.{theirs}"
                )
            ),
        ),
        head=weight("lm_head", "lm_head"),
        # The first release saved a bias table in cross-attention, which never had positions.
        dropped=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
        tied={"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"},
    )


T5 = _t5(up="wi")
T5_GATED = _t5(gate="wi_0", up="wi_1")


def _batch_norm(ours: str, theirs: str) -> tuple[Entry, ...]:
    parts = ("weight", "bias", "running_mean", "running_var")
    return tuple(Entry(f"{ours}.{part}", (f"{theirs}.{part}",)) for part in parts)


_RESNET_STAGES = tuple(f"layer{stage}.{{}}" for stage in (1, 2, 3, 4))
# torchvision's ResNets of every depth; basic blocks have no third convolution.
RESNET = KeyMap(
    body=(
        *weight("conv1", "conv1"),
        *_batch_norm("norm1", "bn1"),
        *(
            entry
            for stage in _RESNET_STAGES
            for i in (1, 2, 3)
            for entry in (
                *weight(f"{stage}.conv{i}", f"{stage}.conv{i}"),
                *_batch_norm(f"{stage}.norm{i}", f"{stage}.bn{i}"),
            )
        ),
        *(entry for stage in _RESNET_STAGES for entry in weight(f"{stage}.shortcut.conv", f"{stage}.downsample.0")),
        *(
            entry
            for stage in _RESNET_STAGES
            for entry in _batch_norm(f"{stage}.shortcut.norm", f"{stage}.downsample.1")
        ),
    ),
    dropped=(
        "bn1.num_batches_tracked",
        *(f"{stage}.bn{i}.num_batches_tracked" for stage in _RESNET_STAGES for i in (1, 2, 3)),
        *(f"{stage}.downsample.1.num_batches_tracked" for stage in _RESNET_STAGES),
    ),
)
