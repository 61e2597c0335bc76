"""The sizes of a T5, and how `transformers` writes them into a config.json."""

from dataclasses import dataclass
from typing import Any, Self

from vqa_scratch.weights import fields as names


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5. The defaults are flan-t5-small."""

    vocab_size: int = 32128
    dim: int = 512
    head_dim: int = 64  # heads * head_dim need not be dim
    hidden: int = 1024  # inner width of the feed-forward layers
    encoder_layers: int = 8
    decoder_layers: int = 8
    heads: int = 6
    buckets: int = 32  # of relative distances, in each tower
    max_distance: int = 128  # all greater distances share the last bucket
    activation: str = "gelu_new"
    gated: bool = True
    dropout: float = 0.1
    norm_eps: float = 1e-6
    tied: bool = False  # the head is the embedding
    scaled: bool = False  # the decoder's output is multiplied by dim**-0.5 before the head
    pad_id: int = 0
    eos_id: int = 1
    start_id: int = 0  # first input of the decoder

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """From a config.json. Whether the head is tied is a fact of the weights, not of this file."""
        known = {ours: config[theirs] for ours, theirs in names.T5.items() if config.get(theirs) is not None}
        feed_forward = config.get("feed_forward_proj", "relu")
        name = feed_forward.removeprefix("gated-")
        return cls(
            **{"decoder_layers": known["encoder_layers"], "start_id": known.get("pad_id", 0)} | known,
            gated=feed_forward.startswith("gated-"),
            # The released gated models were trained with the tanh approximation, whatever their file says.
            activation="gelu_new" if feed_forward == "gated-gelu" else name,
            scaled=config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False),
        )

    def to_hf(self) -> dict[str, Any]:
        """The inverse of `from_hf`."""
        name = "gelu" if self.gated and self.activation == "gelu_new" else self.activation
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "is_encoder_decoder": True,
            **{theirs: getattr(self, ours) for ours, theirs in names.T5.items()},
            "feed_forward_proj": f"gated-{name}" if self.gated else name,
            "tie_word_embeddings": self.scaled,
            "scale_decoder_outputs": self.scaled,
        }
