"""HiFi-GAN against `transformers`, in all spellings of its weights; Griffin-Lim on a sound that is known."""

import json
import shutil

import pytest
import torch
from helpers import assert_close
from safetensors.torch import load_file, save_file
from speecht5_helpers import vocoder
from transformers import SpeechT5HifiGan

from vqa_scratch.audio import speecht5_mel
from vqa_scratch.audio.griffin_lim import griffin_lim
from vqa_scratch.errors import UserError
from vqa_scratch.models import HifiGAN, HifiGANConfig


@pytest.fixture(scope="module", params=[True, False])
def pair(request, tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("vocoder")
    return vocoder(folder, normalize_before=request.param), HifiGAN.from_pretrained(folder), folder


def test_wave(pair):
    theirs, ours, _ = pair
    frames = torch.randn(2, 30, 12)
    with torch.no_grad():
        wave = ours(frames)
        assert_close(wave, theirs(frames))
        assert wave.shape == (2, 30 * 8) and wave.abs().max() <= 1
        torch.testing.assert_close(ours(frames[:1]), theirs(frames[0])[None])


def test_export_loads_in_transformers(pair, tmp_path):
    theirs, ours, _ = pair
    ours.save_pretrained(tmp_path)
    again, report = SpeechT5HifiGan.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), theirs.state_dict().values(), strict=True)
    )
    assert HifiGAN.from_pretrained(tmp_path).config == ours.config


@pytest.mark.parametrize("names", [("parametrizations.weight.original0", "parametrizations.weight.original1"), None])
def test_weight_norm_is_multiplied_out(pair, tmp_path, names):
    """As torch spells it since 2.0, and as it did before."""
    _, ours, folder = pair
    shutil.copy(folder / "config.json", tmp_path)
    gain, direction = names or ("weight_g", "weight_v")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".weight")]:
        weight, stem = tensors.pop(name), name.removesuffix("weight")
        tensors[stem + direction] = 3 * weight
        tensors[stem + gain] = weight.flatten(1).norm(dim=1)[:, None, None]
    save_file(tensors, tmp_path / "model.safetensors")
    frames = torch.randn(1, 9, 12)
    torch.testing.assert_close(HifiGAN.from_pretrained(tmp_path)(frames), ours(frames))


def test_the_older_model_type_and_bad_sizes(pair, tmp_path):
    _, ours, folder = pair
    config = json.loads((folder / "config.json").read_text())
    assert HifiGANConfig.from_hf(config | {"model_type": "hifigan"}).stretch == ours.config.stretch
    for change, message in (
        ({"upsample_rates": [4]}, "a kernel for each of upsample_rates"),
        ({"upsample_initial_channel": 30}, "30 channels cannot be halved 2 times"),
        ({"resblock_dilation_sizes": 3}, "resblock_dilation_sizes must list whole numbers"),
        ({"upsample_rates": "4"}, "upsample_rates must list whole numbers"),
    ):
        with pytest.raises(UserError, match=message):
            HifiGANConfig.from_hf(config | change)


def test_griffin_lim_gives_the_mel_again():
    """A gliding tone with overtones: the error of its mel, where there is sound, against that of random phases."""
    seconds = torch.arange(16_000) / 16_000
    phase = 2 * torch.pi * (150 * seconds + 40 * seconds**2)
    wave = sum((phase * n).sin() / n for n in range(1, 20)) * 0.1
    mel = speecht5_mel(wave)
    loud = mel > mel.max() - 2

    def error(rounds: int) -> float:
        made = griffin_lim(mel, torch.Generator().manual_seed(0), rounds)
        assert made.shape == (256 * len(mel),) and made.isfinite().all()
        return float((speecht5_mel(made)[: len(mel)] - mel)[loud].abs().mean())

    assert error(60) < 0.075 < error(1) / 4  # 0.0775 without the momentum
    assert griffin_lim(mel[:1]).shape == (256,)
