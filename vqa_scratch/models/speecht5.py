"""SpeechT5 for text to speech (Ao et al. 2022, arXiv 2110.07205): letters to log-mel frames, which a vocoder sounds.

The decoder reads its own last frame through the pre-net of Tacotron 2 (Shen et al. 2018, 1712.05884, section 2.2),
whose dropout is on in use too: without it the decoder goes on from what it said instead of reading the text. Each step
gives `reduction` frames and the probabilities that they are the last; a post-net refines the whole.

Shapes: B batch, N text tokens, T steps of the decoder, r frames a step, F = r T frames, M mel bins, D width, S size of
a speaker embedding.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.models.hifigan import HifiGAN
from vqa_scratch.models.speecht5_parts import SpeechT5Base, SpeechT5Config, SpeechT5Encoder, decoder_blocks
from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.nn.memory import Memory
from vqa_scratch.weights import maps_speech

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
    """Target frames (B, F, M) -> the decoder's inputs (B, T, M): the last frame of the step before, zeros first.

    Raises ValueError unless the frames make whole steps.
    """
    if frames.shape[1] % reduction:
        raise ValueError(f"{frames.shape[1]} frames are no whole steps of {reduction}; pad them with {PADDING:g}")
    last = frames[:, reduction - 1 :: reduction][:, :-1]
    return F.pad(last.masked_fill(last == PADDING, 0.0), (0, 0, 1, 0))


class ScaledPositions(nn.Module):
    """x + alpha * sines and cosines in turn, with alpha learned (Li et al. 2019, arXiv 1809.08895, section 3.2)."""

    table: Tensor

    def __init__(self, dim: int, most: int, dropout: float) -> None:
        super().__init__()
        self.alpha, self.dropout = nn.Parameter(torch.tensor(1.0)), nn.Dropout(dropout)
        angles = torch.arange(most)[:, None] * torch.exp(torch.arange(0, dim, 2) * -(math.log(10_000.0) / dim))
        self.register_buffer("table", torch.stack([angles.sin(), angles.cos()], -1).flatten(1), persistent=False)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """(B, T, D) at the positions from `first` on. Raises ValueError beyond the table."""
        if (end := first + x.shape[1]) > len(self.table):
            raise ValueError(f"{end} positions, but the table serves {len(self.table)}")
        return self.dropout(x + self.alpha * self.table[first:end])


class SpeechPrenet(nn.Module):
    """Frames and speaker to the decoder's embeddings."""

    def __init__(self, config: SpeechT5Config) -> None:
        super().__init__()
        widths = [config.mels] + [config.prenet_units] * config.prenet_layers
        self.layers = nn.ModuleList(map(nn.Linear, widths, widths[1:]))
        self.out = nn.Linear(widths[-1], config.dim)
        self.positions = ScaledPositions(config.dim, config.max_speech, config.position_dropout)
        self.speaker = nn.Linear(config.dim + config.speaker_dim, config.dim)
        self.keep = 1 - config.prenet_dropout

    def forward(
        self, frames: Tensor, speaker: Tensor | None = None, generator: torch.Generator | None = None, first: int = 0
    ) -> Tensor:
        """Frames (B, T, M) of the steps from `first` on, speaker (B, S) -> (B, T, D).

        As in the release, all rows share a dropout mask. It is drawn for the steps before `first` too, so that the
        generator, or torch's own, gives the masks of a pass over the whole.
        """
        x = frames
        for layer in self.layers:
            x = layer(x).relu()
            mask = torch.empty(first + x.shape[1], x.shape[2], device=generator.device if generator else x.device)
            x = x * mask.bernoulli_(self.keep, generator=generator)[first:].to(x) / self.keep
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
        pairs = zip(widths, widths[1:], strict=False)
        self.convs = nn.ModuleList(nn.Conv1d(*pair, kernel, padding=(kernel - 1) // 2, bias=False) for pair in pairs)
        norms = [nn.BatchNorm1d(width) for width in widths[1:]]
        for norm in norms:
            norm.num_batches_tracked = None  # only a momentum that changes would need the count
        self.norms, self.dropout = nn.ModuleList(norms), nn.Dropout(config.postnet_dropout)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames.transpose(1, 2)
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True), 1):
            x = norm(conv(x))
            x = self.dropout(x.tanh() if number < len(self.convs) else x)
        return frames + x.transpose(1, 2)


class SpeechT5(SpeechT5Base):
    """Text encoder, speech decoder, post-net."""

    architecture, layout = "SpeechT5ForTextToSpeech", maps_speech.TEXT_TO_SPEECH

    def __init__(self, config: SpeechT5Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.dim, config.pad_id)
        self.text_positions = ScaledPositions(config.dim, config.max_text, config.position_dropout)
        self.encoder, self.blocks = SpeechT5Encoder(config), decoder_blocks(config)
        self.prenet, self.postnet = SpeechPrenet(config), Postnet(config)
        self.to_frames = nn.Linear(config.dim, config.mels * config.reduction)
        self.to_stop = nn.Linear(config.dim, config.reduction)
        self.reset_parameters()

    def encode(self, input_ids: Tensor, mask: Tensor | None = None) -> list[Memory]:
        """(B, N), mask (B, N), True = a real token -> what the decoder reads. Raises ValueError on too many tokens."""
        states = self.encoder(self.text_positions(self.tokens(input_ids)), mask)
        return [Memory(states, None if mask is None else mask.bool())]

    def decode(
        self, x: Tensor, memory: list[Memory], mask: Tensor | None = None, cache: DecoderCache | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); mask (B, T), True = may attend."""
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, memory, None if cache is None else cache[layer])
        return x

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
        """Ids (B, N) with their mask, target frames (B, F, M), speaker (B, S) -> what the decoder makes of them.

        frame_mask (B, F), True = a real frame, hides the others. `generator` draws the pre-net's dropout.
        """
        each = self.config.reduction
        x = self.prenet(shifted_right(frames, each), speaker, generator)
        steps = None if frame_mask is None else frame_mask[:, each - 1 :: each]
        states = self.decode(x, self.encode(input_ids, attention_mask), steps)
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
        """Say each text of ids (B, N) in the voice of speaker (1 or B, S); without a mask, padding tokens are padding.

        A row ends where the probabilities of a step sum to `threshold`, after `least` and at `most` frames for each of
        the N tokens. With one seed the frames are those of `generate` in `transformers`. `progress` is called with the
        number of frames so far. Raises ValueError for a speaker of another shape.
        """
        config, rows, each = self.config, len(input_ids), self.config.reduction
        if speaker.ndim != 2 or speaker.shape[1] != config.speaker_dim or len(speaker) not in (1, rows):
            raise ValueError(f"speaker must be (1 or {rows}, {config.speaker_dim}), got {tuple(speaker.shape)}")
        mask = input_ids != config.pad_id if attention_mask is None else attention_mask
        memory, cache = self.encode(input_ids, mask), DecoderCache(config.decoder_layers)
        fewest, limit = (int(input_ids.shape[1] * ratio / each) for ratio in (least, most))
        limit, speaker = max(1, min(limit, config.max_speech)), speaker.expand(rows, -1)
        frame, steps = speaker.new_zeros(rows, 1, config.mels), list[Tensor]()
        ends, stopped = [0] * rows, [False] * rows
        while not all(ends):
            x = self.prenet(frame, speaker, generator, len(steps))
            states = self.decode(x, memory, cache=cache)[:, 0]
            steps.append(self.to_frames(states).unflatten(-1, (each, -1)))  # (B, r, M)
            frame, last = steps[-1][:, -1:], len(steps) >= limit
            enough = (self.to_stop(states).sigmoid().sum(-1) >= threshold).tolist()
            for row, end in enumerate(ends):
                if not end and (last or (enough[row] and len(steps) >= fewest)):
                    ends[row], stopped[row] = len(steps), enough[row]
            progress(len(steps) * each)
        whole = torch.cat(steps, 1)  # (B, F, M)
        mels = [self.postnet(frames[None, : end * each]) for frames, end in zip(whole, ends, strict=True)]
        waves = [None if vocoder is None else vocoder(mel)[0] for mel in mels]
        return [Spoken(mel[0], wave, how) for mel, wave, how in zip(mels, waves, stopped, strict=True)]
