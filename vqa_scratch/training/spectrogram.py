"""The loss of text to speech: frames, stop, and attention held to the diagonal, as SpeechT5 was trained with.

Frames: L1 before and after the post-net. Stop: a cross-entropy in which a last frame counts five times. Guided
attention (Tachibana et al. 2018, arXiv 1710.08969, equation 6): a text is spoken in order, so a weight far from the
diagonal costs. Equal to `SpeechT5SpectrogramLoss` of `transformers`.

Shapes: B batch, N text tokens, T steps of the decoder, r frames a step, F = r T frames, M mel bins, H heads.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqa_scratch.models.speecht5 import PADDING, SpeechT5
from vqa_scratch.nn import taps

LAST_FRAME = 5.0  # its weight in the loss of the stop


class SpectrogramLoss(NamedTuple):
    """Means over what is real in the batch; their sum is the loss."""

    frames: Tensor
    stop: Tensor
    attention: Tensor  # 0 if the config has none


class CrossWeights(list[Tensor]):
    """A handler for `taps.activate`: the weights of cross-attention (B, H, T, N) of each layer, with gradients."""

    def wants(self, name: str) -> bool:
        return name.endswith(".cross.pattern")

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        self.append(tensor)
        return tensor


def spectrogram_loss(
    model: SpeechT5, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, speaker: Tensor | None = None
) -> SpectrogramLoss:
    """For ids (B, N) with their mask and frames `labels` (B, F, M), -100 where a row has ended, in whole steps."""
    weights, config = CrossWeights(), model.config
    with taps.activate(weights) if config.guided else nullcontext():
        made = model(input_ids, attention_mask, labels, speaker)
    known, real = labels != PADDING, labels[..., 0] != PADDING  # (B, F, M), (B, F)
    frames = F.l1_loss(made.after[known], labels[known]) + F.l1_loss(made.before[known], labels[known])
    last = F.pad(~real, (0, 1), value=True)[:, 1:]  # before padding, or at the end
    more = made.stop.new_tensor(LAST_FRAME)
    stop = F.binary_cross_entropy_with_logits(made.stop[real], last[real].to(made.stop), pos_weight=more)
    if not config.guided:
        return SpectrogramLoss(frames, stop, stop.new_zeros(()))
    shown = torch.cat([layer[:, : config.guided_heads] for layer in weights], 1)
    steps = real[:, config.reduction - 1 :: config.reduction]
    cost = guided_attention(shown, steps, attention_mask.bool(), config.guided_sigma)
    return SpectrogramLoss(frames, stop, config.guided_scale * cost)


def guided_attention(weights: Tensor, steps: Tensor, tokens: Tensor, sigma: float) -> Tensor:
    """The mean of A_tn (1 - exp(-(n/N - t/T)^2 / (2 sigma^2))) over real steps and tokens and all heads.

    weights (B, H, T, N); steps (B, T) and tokens (B, N), True = real; N and T are the numbers of real ones of a row.
    """
    t, n = (torch.arange(x.shape[1], device=x.device) / x.sum(1, keepdim=True) for x in (steps, tokens))
    cost = 1 - torch.exp(-((n[:, None, :] - t[:, :, None]) ** 2) / (2 * sigma**2))  # (B, T, N)
    both = (steps[:, :, None] & tokens[:, None, :])[:, None]  # (B, 1, T, N)
    return (weights * cost[:, None])[both.expand_as(weights)].mean()
