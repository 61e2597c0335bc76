"""A Whisper's encoder as the text side of a model that answers: what is heard stands where words would.

Shapes: B sounds, M mels, F frames, N = F / 2 states of the encoder, K = N / POOLED tokens, D width.
"""

import torch.nn.functional as F
from torch import Tensor

from vqa_scratch.models.whisper import AudioEncoder, WhisperConfig
from vqa_scratch.nn.states import States, TextEncoder

POOLED = 8  # states, 160 ms: about half a word


class Hearing(TextEncoder):
    """The states of the encoder, the mean of every eight: so many tokens as a question has words, or twice so many."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.config, self.dim, self.longest = config, config.dim, -(-config.source_positions // POOLED)
        self.encoder = AudioEncoder(config)

    def states(self, inputs: Tensor, mask: Tensor | None = None) -> States:
        """Log-mels (B, M, F), and which of the N states hold sound (B, N), True = sound -> states (B, K, D)."""
        x = self.encoder(inputs)
        real = x.new_ones(x.shape[:2]) if mask is None else mask.to(x)
        real = F.pad(real, (0, -real.shape[1] % POOLED)).unflatten(1, (-1, POOLED))  # (B, K, POOLED)
        x = F.pad(x, (0, 0, 0, -x.shape[1] % POOLED)).unflatten(1, (-1, POOLED))  # (B, K, POOLED, D)
        count = real.sum(2, keepdim=True)
        return States((x * real[..., None]).sum(2) / count.clamp(min=1), count[..., 0] > 0)
