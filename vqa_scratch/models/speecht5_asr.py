"""SpeechT5 for speech to text (Ao et al. 2022, arXiv 2110.07205): samples at 16 kHz to letters.

The samples go through the convolutions of wav2vec 2.0 (Baevski et al. 2020, 2006.11477): 50 states a second in the
released model. Places are told twice, by a convolution over the states and by sines.

Shapes: B batch, N samples, L states, T text tokens, D width, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from vqa_scratch.models.block_decoder import PositionTableDecoder
from vqa_scratch.models.gpt2 import GPT2Config
from vqa_scratch.models.hf_config import check_heads
from vqa_scratch.models.speecht5_parts import SpeechT5Base, SpeechT5Config, SpeechT5Encoder, decoder_blocks
from vqa_scratch.nn.layers import activation, sinusoids
from vqa_scratch.nn.memory import Memory
from vqa_scratch.weights import maps_speech


class WavePrenet(nn.Module):
    """Samples to the encoder's embeddings."""

    sines: Tensor

    def __init__(self, config: SpeechT5Config) -> None:
        super().__init__()
        self.kernels, self.strides, self.first = config.wave_kernels, config.wave_strides, config.pad_id + 1
        dims, self.activation = (1, *config.wave_dims), activation(config.wave_activation)
        sizes = zip(dims, dims[1:], self.kernels, self.strides, strict=False)
        self.convs = nn.ModuleList(nn.Conv1d(*each, bias=config.wave_bias) for each in sizes)
        self.first_norm = nn.GroupNorm(dims[1], dims[1])  # of each channel, over time
        self.norm = nn.LayerNorm(dims[-1], eps=config.norm_eps)
        self.out = nn.Linear(dims[-1], config.dim)
        kernel, dim = config.place_kernel, config.dim
        check_heads(dim, config.place_groups)
        places = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=config.place_groups)
        nn.init.normal_(places.weight, std=2 * (kernel * dim) ** -0.5)
        self.places = weight_norm(places, dim=2)
        self.register_buffer("sines", sinusoids(config.max_speech + self.first, dim), persistent=False)

    def lengths(self, samples: Tensor) -> Tensor:
        """How many states so many samples give, (B,) -> (B,)."""
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples

    def forward(self, waves: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, N), mask (B, N), True = a sample, padding on the right -> states (B, L, D) and their mask (B, L).

        The first norm is over time, padding included, so in a batch of longer waves one gives other states than alone,
        in the release too. Raises ValueError for a row too short for a state, or with more states than positions.
        """
        counts = torch.full((len(waves),), waves.shape[1]) if mask is None else mask.sum(-1)
        lengths, most = self.lengths(counts), len(self.sines) - self.first
        if int(lengths.min()) < 1 or int(lengths.max()) > most:
            raise ValueError(f"{int(lengths.min())} to {int(lengths.max())} states of a wave, not from 1 to {most:,}")
        x = waves[:, None]
        for number, conv in enumerate(self.convs):
            x = self.activation(self.first_norm(conv(x)) if number == 0 else conv(x))
        x = self.out(self.norm(x.transpose(1, 2)))
        places = self.places(x.transpose(1, 2))[..., : x.shape[1]]  # an even kernel gives one too many
        x = x + self.activation(places).transpose(1, 2)
        real = None if mask is None else torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        return x + self.sines[self.first : self.first + x.shape[1]].to(x), real


class TextDecoder(PositionTableDecoder[GPT2Config]):
    """Tokens and sines, post-LN blocks that read the encoder's states, and a head that is the token embedding."""

    sines: Tensor

    def __init__(self, config: SpeechT5Config) -> None:
        super().__init__()
        self.config, self.reads_memory, self.table_size = config.decoder, True, config.max_text
        self.tokens = nn.Embedding(config.vocab_size, config.dim, config.pad_id)
        self.blocks, self.norm = decoder_blocks(config), nn.Identity()
        self.dropout, self.first = nn.Dropout(config.position_dropout), config.pad_id + 1
        self.register_buffer("sines", sinusoids(config.max_text + self.first, config.dim), persistent=False)

    def before_blocks(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        return self.dropout(embeddings + self.sines[positions + self.first])

    @property
    def direct_head(self) -> None:
        """The states end in a norm: they are no plain sum."""
        return None


class SpeechT5Recognizer(SpeechT5Base):
    """Speech encoder, and a text decoder for `generate`, which reads what `encode` gives."""

    architecture, layout = "SpeechT5ForSpeechToText", maps_speech.SPEECH_TO_TEXT

    def __init__(self, config: SpeechT5Config) -> None:
        super().__init__()
        self.config = config
        self.wave, self.encoder, self.decoder = WavePrenet(config), SpeechT5Encoder(config), TextDecoder(config)
        self.reset_parameters()

    def encode(self, waves: Tensor, mask: Tensor | None = None) -> list[Memory]:
        """Samples (B, N), mask (B, N), True = a sample -> what the decoder reads. Errors as in `WavePrenet`."""
        x, real = self.wave(waves, mask)
        return [Memory(self.encoder(x, real), real)]

    def forward(self, waves: Tensor, decoder_input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, N), (B, T) -> logits (B, T, V); attention_mask (B, N) is that of the samples."""
        return self.decoder(decoder_input_ids, memory=self.encode(waves, attention_mask))
