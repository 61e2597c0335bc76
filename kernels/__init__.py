"""Kernels and their plain-torch definitions: attention, linear + cross-entropy, log-probability + entropy, CTC.

The first three run on a GPU of capability 8.0 or newer with Triton installed; everything else runs in torch, with the
same results. Inputs that a kernel does not support run in torch, with one warning. `backend()` returns which ran.
"""

from vqa_scratch.kernels.attention import flash_attention, takes_attention
from vqa_scratch.kernels.choice import DEVICES, backend
from vqa_scratch.kernels.cross_entropy import linear_cross_entropy
from vqa_scratch.kernels.ctc import check_alignable, ctc_align, ctc_loss, ctc_posteriors, frames_needed
from vqa_scratch.kernels.logprob import chosen_logprobs
from vqa_scratch.kernels.reference import DistanceBias, distance_buckets, merge

__all__ = [
    "DEVICES",
    "DistanceBias",
    "backend",
    "check_alignable",
    "chosen_logprobs",
    "ctc_align",
    "ctc_loss",
    "ctc_posteriors",
    "distance_buckets",
    "flash_attention",
    "frames_needed",
    "linear_cross_entropy",
    "merge",
    "takes_attention",
]
