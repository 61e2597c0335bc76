"""SpeechT5 for text to speech (Ao et al. 2022, arXiv 2110.07205): letters to log-mel frames, which a vocoder sounds.

The decoder's input is its own last frame, through the pre-net of Tacotron 2 (Shen et al. 2018, 1712.05884, section
2.2), whose dropout is on in use too: without it the decoder copies what it said instead of reading the text. Each step
gives `reduction` frames and the probability that they are the last; a post-net refines the whole.

Shapes: B batch, N text tokens, T steps of the decoder, r frames a step, F = r T frames, M mel bins, D width, S size of a
speaker embedding.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.models.hf_config import Released
from vqa_scratch.models.hifigan import HifiGAN
from vqa_scratch.models.speecht5_parts import (
    ScaledPositions,
    SpeechT5Config,
    SpeechT5Encoder,
    check_architecture,
    decoder_blocks,
)
from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.nn.layers import init_weights
from vqa_scratch.nn.memory import Memory
from vqa_scratch.weights import maps_speech
from vqa_scratch.weights.convert import load_into
from vqa_scratch.weights.maps import KeyMap

ARCHITECTURE = "SpeechT5ForTextToSpeech"
PADDING = -100.0  # of frames in a batch of targets


class Spectrogram(NamedTuple):
    """What a pass over known frames gives."""

    before: Tensor  # (B, F, M), before the post-net
    after: Tensor  # (B, F, M)
    stop: Tensor  # (B, F) logits: is this frame the last?


class Spoken(NamedTuple):
    """What was said of one text."""

    mel: Tensor  # (F, M)
    wave: Tensor | None  # (samples,); None without a vocoder
    stopped: bool  # of itself, not because no more steps were allowed


def shifted_right(frames: Tensor, reduction: int) -> Tensor:
    """Target frames (B, F, M) -> the decoder's inputs (B, T, M): the last frame of each step before, zeros first.

    Raises ValueError unless the frames make whole steps.
    """
    if frames.shape[1] % reduction:
        raise ValueError(f"{frames.shape[1]} frames are no whole steps of {reduction}; pad them with {PADDING:g}")
    last = frames[:, reduction - 1 :: reduction][:, :-1]
    return F.pad(last.masked_fill(last == PADDING, 0.0), (0, 0, 1, 0))


class SpeechPrenet(nn.Module):
    """Frames and speaker to the decoder's embeddings."""

    def __init__(self, config: SpeechT5Config) -> None:
        super().__init__()
        widths = [config.mels] + [config.prenet_units] * config.prenet_layers
        self.layers = nn.ModuleList(map(nn.Linear, widths, widths[1:]))
        self.out = nn.Linear(widths[-1], config.dim)
        self.positions = ScaledPositions(config.dim, config.max_speech, config.position_dropout)
        self.speaker = nn.Linear(config.dim + config.speaker_dim, config.dim)
        self.rate = config.prenet_dropout

    def forward(
        self, frames: Tensor, speaker: Tensor | None = None, generator: torch.Generator | None = None, first: int = 0
    ) -> Tensor:
        """Frames (B, T, M) of the steps from `first` on, speaker (B, S) -> (B, T, D).

        All rows share a dropout mask, as in the release. It is drawn for the steps before `first` too, and not used:
        one generator then gives the masks of a pass over the whole sequence.
        """
        x = frames
        for layer in self.layers:
            x = layer(x).relu()
            mask = torch.empty(first + x.shape[1], x.shape[2], device=generator.device if generator else x.device)
            mask.bernoulli_(1 - self.rate, generator=generator)
            x = x * mask[first:].to(x) / (1 - self.rate)
        x = self.positions(self.out(x), first)
        if speaker is None:
            return x
        speaker = F.normalize(speaker)[:, None].expand(-1, x.shape[1], -1)
        return self.speaker(torch.cat([x, speaker], -1)).relu()


class Postnet(nn.Module):
    """frames + convolutions of them with batch norm. (B, F, M) -> (B, F, M)."""

    def __init__(self, config: SpeechT5Config) -> None:
        super().__init__()
        widths = [config.mels] + [config.postnet_units] * (config.postnet_layers - 1) + [config.mels]
        kernel = config.postnet_kernel
        self.convs = nn.ModuleList(
            nn.Conv1d(before, after, kernel, padding=(kernel - 1) // 2, bias=False)
            for before, after in zip(widths, widths[1:], strict=False)
        )
        norms = [nn.BatchNorm1d(width) for width in widths[1:]]
        for norm in norms:
            norm.num_batches_tracked = None  # only a momentum that changes would need the count
        self.norms = nn.ModuleList(norms)
        self.dropout = nn.Dropout(config.postnet_dropout)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames.transpose(1, 2)
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True), 1):
            x = norm(conv(x))
            x = self.dropout(x.tanh() if number < len(self.convs) else x)
        return frames + x.transpose(1, 2)


class SpeechDecoder(nn.Module):
    """The blocks; their states need no norm after the last."""

    def __init__(self, config: SpeechT5Config) -> None:
        super().__init__()
        self.blocks = decoder_blocks(config)

    def forward(self, x: Tensor, mask: Tensor | None, memory: list[Memory], cache: DecoderCache | None) -> Tensor:
        """(B, T, D) -> (B, T, D); mask (B, T), True = may attend."""
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, memory, None if cache is None else cache[layer])
        return x


class SpeechT5(Released[SpeechT5Config]):
    """Text encoder, speech decoder, post-net."""

    config_class = SpeechT5Config

    def __init__(self, config: SpeechT5Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.dim, config.pad_id)
        self.text_positions = ScaledPositions(config.dim, config.max_text, config.position_dropout)
        self.encoder, self.decoder = SpeechT5Encoder(config), SpeechDecoder(config)
        self.prenet, self.postnet = SpeechPrenet(config), Postnet(config)
        self.to_frames = nn.Linear(config.dim, config.mels * config.reduction)
        self.to_stop = nn.Linear(config.dim, config.reduction)
        self.apply(lambda module: init_weights(module, config.init_std))
        nn.init.zeros_(self.tokens.weight[config.pad_id].detach())
        for conv in self.postnet.convs:
            nn.init.kaiming_normal_(conv.weight)

    @property
    def key_map(self) -> KeyMap:
        return maps_speech.TEXT_TO_SPEECH

    def to_hf(self) -> dict[str, Any]:
        return self.config.to_hf() | {"architectures": [ARCHITECTURE]}

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], tensors: dict[str, Tensor], source: str) -> Self:
        check_architecture(config, ARCHITECTURE, source)
        model = cls(SpeechT5Config.from_hf(config))
        load_into(model, tensors, model.key_map, source=source)
        return model.eval()

    def encode(self, input_ids: Tensor, mask: Tensor | None = None) -> list[Memory]:
        """(B, N), mask (B, N), True = a real token -> what the decoder reads."""
        states = self.encoder(self.text_positions(self.tokens(input_ids)), mask)
        return [Memory(states, None if mask is None else mask.bool())]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        frames: Tensor,
        speaker: Tensor | None = None,
        *,
        frame_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Spectrogram:
        """Ids (B, N) with their mask, target frames (B, F, M), speaker (B, S) -> what the decoder says of them.

        frame_mask (B, F), True = a real frame, hides the others from all. `generator` draws the pre-net's dropout.
        """
        each = self.config.reduction
        x = self.prenet(shifted_right(frames, each), speaker, generator)
        steps = None if frame_mask is None else frame_mask[:, each - 1 :: each]
        states = self.decoder(x, steps, self.encode(input_ids, attention_mask), None)
        before = self.to_frames(states).unflatten(-1, (each, -1)).flatten(1, 2)
        return Spectrogram(before, self.postnet(before), self.to_stop(states).flatten(1))

    @torch.no_grad()
    def speak(
        self,
        input_ids: Tensor,
        speaker: Tensor,
        attention_mask: Tensor | None = None,
        *,
        vocoder: HifiGAN | None = None,
        threshold: float = 0.5,
        least: float = 0.0,
        most: float = 20.0,
        generator: torch.Generator | None = None,
        progress: Callable[[int], object] = lambda frames: None,
    ) -> list[Spoken]:
        """Say each text of ids (B, N), in the voice of speaker (1 or B, S).

        A row ends where the r probabilities of a step sum to `threshold`, after `least` and at `most` frames a token of
        the longest text. attention_mask None means that padding tokens are padding. With a CPU generator of the same
        seed, and without batches of several lengths, the result is that of `generate` in `transformers`. `progress`
        is called with the number of frames after each step. Raises ValueError for a speaker of another shape.
        """
        config, rows = self.config, len(input_ids)
        if speaker.shape[-1] != config.speaker_dim or speaker.ndim != 2 or len(speaker) not in (1, rows):
            raise ValueError(f"speaker must be (1 or {rows}, {config.speaker_dim}), got {tuple(speaker.shape)}")
        mask = input_ids != config.pad_id if attention_mask is None else attention_mask
        memory, cache = self.encode(input_ids, mask), DecoderCache(config.decoder_layers)
        fewest, limit = (int(input_ids.shape[1] * ratio / config.reduction) for ratio in (least, most))
        limit, speaker = max(1, min(limit, config.max_speech)), speaker.expand(rows, -1)
        frame, steps = speaker.new_zeros(rows, 1, config.mels), []
        ends, stopped = [0] * rows, [False] * rows
        while not all(ends):
            x = self.prenet(frame, speaker, generator, first=len(steps))
            states = self.decoder(x, None, memory, cache)[:, 0]  # (B, D)
            steps.append(self.to_frames(states).unflatten(-1, (config.reduction, -1)))  # (B, r, M)
            frame, last = steps[-1][:, -1:], len(steps) >= limit
            enough = (self.to_stop(states).sigmoid().sum(-1) >= threshold).tolist()
            for row in range(rows):
                if not ends[row] and (last or (enough[row] and len(steps) >= fewest)):
                    ends[row], stopped[row] = len(steps), enough[row]
            progress(len(steps) * config.reduction)
        whole = torch.cat(steps, 1)  # (B, F, M)
        mels = [self.postnet(whole[row : row + 1, : end * config.reduction]) for row, end in enumerate(ends)]
        waves = [None if vocoder is None else vocoder(mel)[0] for mel in mels]
        return [Spoken(mel[0], wave, how) for mel, wave, how in zip(mels, waves, stopped, strict=True)]
