"""Questions that are heard, not read: the encoder that hears, the connector, and a run from two others."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from run_helpers import command, make_run, picture
from voice_helpers import make_voice_run
from vqa_helpers import CPU

from train import train_step
from vqa_scratch import systems
from vqa_scratch.audio.reading import write_wav
from vqa_scratch.data.voices import Speaker, is_unseen, speak
from vqa_scratch.errors import UserError
from vqa_scratch.models.hearing import POOLED, Hearing
from vqa_scratch.models.whisper import WhisperConfig
from vqa_scratch.systems.options import read_command_line
from vqa_scratch.systems.run_folder import save_weights
from vqa_scratch.systems.splits import ANY_SAMPLE
from vqa_scratch.systems.spoken import sayable
from vqa_scratch.training.optimizers import Optimizers
from vqa_scratch.training.precision import Precision


@pytest.fixture(scope="module")
def begun(data, tmp_path_factory):
    """The system as it begins, and the runs that it begins from."""
    folder = tmp_path_factory.mktemp("runs")
    typed, voice = make_run(data, folder / "vqa", width=16), make_voice_run(folder / "voice")
    flags = {"preset": "spoken", "start-from": typed, "voice-model": voice, "data": data, "out": folder / "spoken"}
    flags |= {"spoken-texts": 12, "device": "cpu", "precision": "fp32", "steps": 2, "questions-per-step": 16}
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    options = read_command_line([*argv, "--no-image-cache"])
    kind = systems.find("spoken")
    kind.check(options)
    samples = kind.read(options)
    system = kind.build(options, samples, Precision("fp32", CPU))
    system.train_on(samples)
    return system, typed, voice


def test_states_are_the_mean_of_eight_that_hold_sound():
    encoder = Hearing(WhisperConfig(mels=4, source_positions=20, dim=8, encoder_layers=1, encoder_heads=2)).eval()
    features, mask = torch.randn(2, 4, 40), torch.arange(20) < torch.tensor([[20], [11]])
    with torch.no_grad():
        whole, states = encoder.encoder(features), encoder.states(features, mask)
    assert states.mask.tolist() == [[True] * 3, [True, True, False]] and encoder.longest == 3
    assert torch.allclose(states.tokens[0, 2], whole[0, 2 * POOLED :].mean(0), atol=1e-6)
    assert torch.allclose(states.tokens[1, 1], whole[1, POOLED:11].mean(0), atol=1e-6)


def test_it_begins_with_the_weights_of_both(begun):
    system, typed, voice = begun
    old, ears = systems.load(typed).model, systems.load(voice).model.whisper.encoder
    model = system.model
    for ours, theirs in ((model.image, old.image), (model.decoder, old.decoder), (model.text.encoder, ears)):
        assert all(
            torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        )
    assert torch.equal(model.connector.places, old.connector.places + old.connector.modality[0])
    assert not any(p.requires_grad for p in model.text.parameters())
    seen = {name: {is_unseen(s.question) for s in some} for name, some in system.data.samples.items()}
    assert seen == {"train": {False}, "val": {True}, "test": {True}, "holdout": {True}}


def test_a_run_that_hears_learns_and_answers(begun, data, tmp_path, capsys):
    """What it hears matters; its own folder opens it again, and it answers a recording alone."""
    system, _, voice = begun
    rates = {"kind": "adamw", "learning_rate": 3e-3, "matrix_learning_rate": 0.0, "weight_decay": 0.0}
    optimizers, batch = Optimizers(system.model, **rates), system.batch(system.epoch(0)[0])
    losses = [train_step(system.loss, batch, optimizers, system.precision)[0].item() for _ in range(6)]
    assert losses[-1] < 0.9 * losses[0]
    swapped = system.batch(system.epoch(0)[0])
    swapped.question = swapped.question.flip(0)
    assert system.loss(swapped)[0].item() != pytest.approx(system.loss(batch)[0].item(), rel=1e-5)
    assert system.batch(system.epoch(0)[0]).decoder_input_ids[:, 0].unique().numel() == 1, "no prompt"
    system.save(tmp_path)
    save_weights(tmp_path / "model.safetensors", system.model)
    opened, rng = systems.load(tmp_path), np.random.default_rng(1)
    samples = system.data.samples["test"][:2]
    with system.evaluating():
        assert opened.answer(samples) == system.answer(samples)
    write_wav(tmp_path / "q.wav", torch.from_numpy(speak("where is the circle?", Speaker.draw(rng), rng).wave))
    command("ask", tmp_path, "--image", picture(data), "--voice", tmp_path / "q.wav")
    (answer,) = opened.ask_aloud(picture(data), tmp_path / "q.wav")
    assert capsys.readouterr().out == f"{answer.text or '(nothing)'}  (probability {answer.probability:.3f})\n"
    write_wav(tmp_path / "long.wav", torch.zeros(16_000 * 5))
    for argv, fault in (
        (("ask", tmp_path, "--image", picture(data), "--question", "what?"), "hears its questions: give it --voice"),
        (("ask", tmp_path, "--image", picture(data), "--voice", tmp_path / "long.wav"), "5.0 s; .* hears 4 s at once"),
        (
            ("ask", voice, "--image", picture(data), "--voice", tmp_path / "q.wav"),
            "hears no questions: give --voice-model",
        ),
        (("export", tmp_path, tmp_path / "out"), "to be exported in"),
    ):
        with pytest.raises(UserError, match=fault):
            command(*argv)


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ([], "--preset spoken needs --start-from"),
        (
            ["--start-from", "a", "--voice-model", "b", "--freeze", "nothing"],
            "--freeze nothing: what hears is not trained",
        ),
        (
            ["--start-from", "a", "--voice-model", "b", "--question-prompt"],
            "--question-prompt is about typed questions",
        ),
    ],
)
def test_what_cannot_be_is_one_line(flags, fault):
    options = read_command_line(["--preset", "spoken", *flags])
    with pytest.raises(UserError, match=fault):
        systems.find("spoken").check(options)


def test_questions_that_no_voice_can_ask():
    known = replace(ANY_SAMPLE, question="where is the circle?")
    assert sayable([ANY_SAMPLE, known], is_unseen(known.question), 5, "val")[-1] == known
    with pytest.raises(UserError, match="no question of split train can be asked aloud: drawn voices know"):
        sayable([replace(ANY_SAMPLE, question="why?")], False, 5, "train")
