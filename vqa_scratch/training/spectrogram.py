"""The loss of text to speech: frames, stop, and attention held to the diagonal, as SpeechT5 was trained with.

Frames: L1 before and after the post-net. Stop: a cross-entropy in which the last frame counts five times. Guided
attention (Tachibana et al. 2018, arXiv 1710.08969, equation 6): a speech is read from its text in order, so a weight far
from the diagonal costs. Equal to `SpeechT5SpectrogramLoss` of `transformers`.

Shapes: B batch, N text tokens, T steps of the decoder, r frames a step, F = r T frames, M mel bins, H heads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqa_scratch.models.speecht5 import PADDING, SpeechT5
from vqa_scratch.nn import taps

LAST_FRAME = 5.0  # its weight in the loss of the stop


class SpectrogramLoss(NamedTuple):
    """Means over what is real in the batch; the sum is the loss."""

    frames: Tensor
    stop: Tensor
    attention: Tensor  # 0 if the config has none

    @property
    def total(self) -> Tensor:
        return self.frames + self.stop + self.attention


class CrossWeights:
    """Keeps the weights of cross-attention in a forward pass, with gradients; a handler for `taps.activate`."""

    def __init__(self) -> None:
        self.layers: list[Tensor] = []  # (B, H, T, N) each

    def wants(self, name: str) -> bool:
        return name.endswith(".cross.pattern")

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        self.layers.append(tensor)
        return tensor


def spectrogram_loss(
    model: SpeechT5,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    speaker: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> SpectrogramLoss:
    """For ids (B, N) with their mask and frames `labels` (B, F, M), -100 where a row has ended, in whole steps."""
    weights, config = CrossWeights(), model.config
    with taps.activate(weights) if config.guided else torch.enable_grad():
        made = model(input_ids, attention_mask, labels, speaker, generator=generator)
    known, real = labels != PADDING, labels[..., 0] != PADDING  # (B, F, M), (B, F)
    frames = sum(F.l1_loss(guess[known], labels[known]) for guess in (made.after, made.before))
    last = F.pad(~real, (0, 1), value=True)[:, 1:]  # the frame before padding or the end
    weight = made.stop.new_tensor(LAST_FRAME)
    stop = F.binary_cross_entropy_with_logits(made.stop[real], last[real].to(made.stop), pos_weight=weight)
    if not config.guided:
        return SpectrogramLoss(frames, stop, stop.new_zeros(()))
    shown = torch.cat([layer[:, : config.guided_heads] for layer in weights.layers], 1)
    steps = real[:, config.reduction - 1 :: config.reduction]
    return SpectrogramLoss(
        frames, stop, config.guided_scale * guided_attention(shown, steps, attention_mask.bool(), config.guided_sigma)
    )


def guided_attention(weights: Tensor, steps: Tensor, tokens: Tensor, sigma: float) -> Tensor:
    """The mean of A_tn (1 - exp(-(n/N - t/T)^2 / (2 sigma^2))) over real steps and tokens and all heads.

    weights (B, H, T, N); steps (B, T) and tokens (B, N), True = real; N and T are the numbers of real ones of a row.
    """
    along = [torch.arange(x.shape[1], device=x.device) / x.sum(1, keepdim=True) for x in (steps, tokens)]
    distance = along[1][:, None, :] - along[0][:, :, None]  # (B, T, N)
    cost = 1 - torch.exp(-(distance**2) / (2 * sigma**2))
    both = (steps[:, :, None] & tokens[:, None, :])[:, None]  # (B, 1, T, N)
    return (weights * cost[:, None])[both.expand_as(weights)].mean()
