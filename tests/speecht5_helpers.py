"""Small SpeechT5 and HiFi-GAN checkpoints with random weights, written by `transformers`."""

from pathlib import Path

import torch
from helpers import STD, saved
from torch import nn
from transformers import (
    SpeechT5Config,
    SpeechT5ForSpeechToText,
    SpeechT5ForTextToSpeech,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

SIZES = {
    "vocab_size": 30,
    "hidden_size": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_layers": 3,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
    "initializer_range": STD,
    "encoder_max_relative_position": 6,  # less than the tokens of the tests
    "max_text_positions": 40,
    "max_speech_positions": 90,
    "num_mel_bins": 12,
    "speech_decoder_prenet_units": 20,
    "speech_decoder_postnet_units": 16,
    "speech_decoder_postnet_layers": 3,
    "speaker_embedding_dim": 8,
    "guided_attention_loss_num_heads": 1,
    "conv_dim": (16, 16, 20),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
}
VOCODER = {
    "model_in_dim": 12,
    "upsample_initial_channel": 32,
    "upsample_rates": (4, 2),
    "upsample_kernel_sizes": (8, 4),
    "resblock_kernel_sizes": (3, 7, 11),
    "resblock_dilation_sizes": ((1, 3), (1, 3), (2, 5)),
    "initializer_range": 0.1,
}


def scattered(model: nn.Module, folder: Path) -> nn.Module:
    """`saved`, with other scalars and statistics than those of a new model."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("alpha"):
                tensor.fill_(0.7)
            elif name.endswith(("running_mean", "mean")):
                tensor.normal_(std=STD)
            elif name.endswith(("running_var", "scale")):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("original0"):
                tensor.mul_(1.5)
    return saved(model, folder)


def voice(folder: Path, **changes) -> SpeechT5ForTextToSpeech:
    return scattered(SpeechT5ForTextToSpeech(SpeechT5Config(**{**SIZES, **changes})), folder)


def recognizer(folder: Path, **changes) -> SpeechT5ForSpeechToText:
    """With larger embeddings of tokens, so that what comes next depends on what was written."""
    model = SpeechT5ForSpeechToText(SpeechT5Config(**{**SIZES, **changes}))
    with torch.no_grad():
        model.speecht5.decoder.prenet.embed_tokens.weight.mul_(3)
    return scattered(model, folder)


def vocoder(folder: Path, **changes) -> SpeechT5HifiGan:
    return scattered(SpeechT5HifiGan(SpeechT5HifiGanConfig(**{**VOCODER, **changes})), folder)
