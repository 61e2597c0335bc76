"""Writes a voice run in the layout of WhisperForConditionalGeneration, with a program that hears one recording.

A test runs the program of the README unchanged.
"""

from pathlib import Path
from typing import Any

from vqa_scratch.data.spoken import ALPHABET
from vqa_scratch.models.whisper import WhisperCTC
from vqa_scratch.storage import write_text
from vqa_scratch.systems.base import System
from vqa_scratch.systems.export import tensors_of
from vqa_scratch.systems.model_card import metadata
from vqa_scratch.weights.files import write_safetensors

README = """\
# A small Whisper

It hears {seconds} s of speech at once. Run this in the folder to hear one recording.

```python
from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

from vqa_scratch.audio import read_audio

model = WhisperForConditionalGeneration.from_pretrained(".").eval()
words = AutoTokenizer.from_pretrained(".")
wave = read_audio("recording.wav").numpy()
sound = WhisperFeatureExtractor.from_pretrained(".")(wave, sampling_rate=16_000, return_tensors="pt")
ids = model.generate(sound.input_features, max_new_tokens={most})
print(words.decode(ids[0], skip_special_tokens=True).strip() or "(nothing)")
```
"""


def export_voice(system: System[Any, WhisperCTC], folder: Path) -> list[str]:
    """Export as WhisperForConditionalGeneration; CTC's head lies beside it."""
    system.transcriber().save(folder)
    write_safetensors(folder / "ctc.safetensors", tensors_of(system.model.ctc), {"alphabet": ALPHABET})
    most, seconds = system.tokenizers.max_answer_tokens, system.model.whisper.config.frames // 100
    write_text(folder / "README.md", metadata(system, "transformers") + README.format(most=most, seconds=seconds))
    return [
        f"a Whisper has no CTC head: {folder / 'ctc.safetensors'} holds the linear map of the encoder's states to the "
        f"blank and the letters {ALPHABET!r}"
    ]
