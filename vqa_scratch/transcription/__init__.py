"""Speech to text with a released Whisper: windows, long audio, times of words, files.

`vocabulary` has the special tokens, `window` what is heard in one window, `transcriber` goes through a whole recording,
`words` says when each word was spoken, `formats` writes it down.
"""

from vqa_scratch.transcription.transcriber import Segment, Transcriber, open_transcriber

__all__ = ["Segment", "Transcriber", "open_transcriber"]
