"""Sound: files as samples (`reading`), samples as features (`features`)."""

from vqa_scratch.audio.features import log_mel, mfcc, speecht5_mel
from vqa_scratch.audio.reading import read_audio, resample, write_wav

__all__ = ["log_mel", "mfcc", "read_audio", "resample", "speecht5_mel", "write_wav"]
