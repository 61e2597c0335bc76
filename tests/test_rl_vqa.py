"""A VQA system as PPO's policy: its cached, prefixed decoding is the distribution that the update scores."""

import copy
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from vqa_helpers import small_config, small_data, small_task
from vqa_scratch.run import save_weights

import rlhf
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.rl.policy import ActorCritic, SamplingRules, freeze
from vqa_scratch.rl.ppo import PPO
from vqa_scratch.rl.rewards import RewardPart, RewardSum
from vqa_scratch.rl.rollout import chances, sample
from vqa_scratch.rl.types import Samples
from vqa_scratch.rl.vqa_policy import VQAPolicy, check_answers, official_accuracy, prompts_from
from vqa_scratch.systems.options import VQAOptions
from vqa_scratch.systems.vqa import embedded_system

SIZES = {"width": 32, "heads": 2, "image_layers": 1, "text_layers": 1, "decoder_layers": 2}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Eight questions of different length about eight pictures."""
    folder, rng, made = tmp_path_factory.mktemp("images"), np.random.default_rng(0), []
    for i in range(8):
        path = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
        question = "what color is the " + "big " * (i % 4) + "square"
        made.append(VQASample(i, path, 10 * i, question, "what color", "other", ("red",) * 10, "red"))
    return made


@pytest.fixture(params=[True, False], ids=["prompted", "bare"])
def system(request, samples):
    torch.manual_seed(0)
    config = VQAOptions(question_prompt=request.param, **SIZES)
    return embedded_system(config, samples)


def rules_for(policy, **options):
    barred = torch.zeros(policy.model.decoder.config.vocab_size, dtype=torch.bool)
    barred[policy.pad_id] = True
    return SamplingRules(policy.eos_id, barred=barred, **{"max_new_tokens": 6} | options)


def test_cached_decoding_equals_scoring(system, samples):
    policy = VQAPolicy(*system).eval()
    prompts = prompts_from(samples, policy.encoder)
    with torch.no_grad():
        context = policy.encode(prompts).shared_by(3)
        ids = torch.randint(3, 40, (24, 5))
        inputs = torch.cat([torch.full_like(ids[:, :1], policy.start_id), ids[:, :-1]], 1)
        whole = policy.decode_hidden(inputs, context)
        assert whole.shape == (24, 5, 32)
        logits, rows = policy.logits(whole), torch.arange(24)
        scores, state = policy.begin(context, 4)
        for t in range(5):
            torch.testing.assert_close(scores, logits[rows, t], rtol=1e-5, atol=1e-5)
            if t == 2:  # some rows are done
                keep = torch.tensor([0, 1, 5, 9, 10, 22])
                state.keep(keep)
                rows = rows[keep]
            if t < 4:
                scores = state.step(ids[rows, t])
        alone = policy.decode_hidden(inputs[9:12], policy.encode(prompts[3:4]).shared_by(3))
        torch.testing.assert_close(alone, whole[9:12], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fusion", ["tokens", "mean"])
def test_an_image_is_encoded_once_for_all_its_prompts(system, samples, fusion):
    """And all of them read the same entry, also where some of the prompts are taken out."""
    model, encoder, processor = system
    model = VQAModel.from_config(dataclasses.replace(model.config, fusion=fusion))
    policy = VQAPolicy(model, encoder, processor).eval()
    asked = [samples[i] for i in (2, 0, 2, 5, 0, 2)]
    asked = [dataclasses.replace(s, question=samples[i].question) for i, s in enumerate(asked)]
    prompts, encoded = prompts_from(asked, policy.encoder), []
    model.image.register_forward_hook(lambda module, args, out: encoded.append(len(out)))
    with torch.no_grad():
        together = policy.encode(prompts)
        assert encoded == [3] and together.prompts == 6
        chosen = [4, 0, 1]  # the first two ask about one image
        some = together.of(chosen)
        assert some.prompts == 3 and (fusion == "mean" or [len(x) for x in some.states] == [2, 3])
        for context, asking in ((together, prompts), (some, [prompts[i] for i in chosen])):
            keys = [m.states for m in context.shared_by(2).memories()]
            assert fusion == "mean" or len(keys[0]) < len(asking)  # an image's keys are projected once
            read = [m.per_row() for m in context.shared_by(2).memories()]
            for row, prompt in enumerate(asking):
                alone = policy.encode([prompt])
                for whole, own, mask in zip(read, alone.states, alone.masks, strict=True):
                    assert (mask is None or mask.all()) and len(whole) == 2 * len(asking)
                    for sample in (2 * row, 2 * row + 1):
                        torch.testing.assert_close(whole[sample, : own.shape[1]], own[0], rtol=1e-5, atol=1e-5)


def test_a_step_of_ppo(system, samples):
    policy = VQAPolicy(*system)
    config = RLHFOptions(
        prompts=8,
        samples=2,
        micro_prompts=3,
        max_new_tokens=6,
        iterations=4,
        critic_warmup=0,
        scale_reward=False,
        learning_rate=1e-3,
        warmup_steps=0,
    )
    reward = RewardSum([RewardPart("accuracy", 1.0, official_accuracy)])
    reference = freeze(copy.deepcopy(policy))
    assert reference._pixels is policy._pixels, "every image is decoded once for both"
    prompts = prompts_from(samples, policy.encoder)
    decoder = policy.encoder.decoder
    ppo = PPO(config, ActorCritic(policy), reference, reward, prompts, rules_for(policy), decoder.decode)
    before = copy.deepcopy(policy.model.state_dict())
    for _ in range(2):
        log = ppo.step()
        assert log["ppo/policy/first_ratio_error"] <= 1e-5
    assert 0 < log["objective/kl_exact"] < 5
    moved = [name for name, value in policy.model.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.startswith("image.") for name in moved) and any(name.startswith("decoder.") for name in moved)
    assert all(torch.equal(v, before[k]) for k, v in reference.model.state_dict().items())


def test_reward_is_the_official_accuracy(system, samples):
    prompts = prompts_from(samples, system[1])
    few = dataclasses.replace(samples[0], answers=("red",) * 2 + ("blue",) * 8)
    prompts[1] = dataclasses.replace(prompts[1], payload=few)
    seen = Samples(prompts[:3], [[1]] * 3, [" red", "red", "green"], [True] * 3)
    torch.testing.assert_close(official_accuracy(seen), torch.tensor([1.0, 0.6, 0.0]))
    with pytest.raises(UserError, match="question 0 of the test split has no answers"):
        check_answers([dataclasses.replace(samples[0], answers=())], "the test split")


def test_sampling_keeps_to_the_rules(system, samples):
    policy = VQAPolicy(*system).eval()
    with torch.no_grad():
        context = policy.encode(prompts_from(samples, policy.encoder)).shared_by(16)
        rules = rules_for(policy, min_new_tokens=3)
        chance = chances(16 * context.prompts, rules, None, torch.device("cpu"))
        ids, mask, finished = sample(policy, context, rules, chance)
    assert (mask.sum(1) >= 3).all() and not (ids[mask] == policy.pad_id).any()
    assert torch.equal(((ids == policy.eos_id) & mask).any(1), finished)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """The command line of a tiny run on an untrained system of train.py."""
    folder = tmp_path_factory.mktemp("trained")
    config = small_config(small_data(folder), folder / "run", question_prompt=True)
    trained = small_task(config)
    trained.save_parts(config.out)
    save_weights(config.out / "model.safetensors", trained.model)
    argv = f"--preset vqa --policy {config.out} --prompts 4 --samples 2 --iterations 1 --eval-prompts 6"
    argv += " --no-scale-reward --frontier-prompts 2 --frontier-samples 2 --precision fp32 --device cpu"
    return argv.split()


def test_a_run_reports_the_figures_that_answers_have(flags, tmp_path, capsys):
    summary = rlhf.run([*flags, "--out", str(tmp_path)])
    names = {name.removesuffix("_before") for name in summary if name.endswith("_before")}
    assert names == set("reward reward_std finish distinct_2 length accuracy shortness".split())
    assert "overlap" not in capsys.readouterr().out
    assert "<td>reference text</td>" in (tmp_path / "samples.html").read_text()


def test_answers_too_long_for_the_decoder_are_refused(flags, tmp_path):
    """Before anything is sampled; and the number that the error names is the most that works."""
    argv = [*flags, "--out", str(tmp_path / "run"), "--max-new-tokens"]
    with pytest.raises(UserError, match="max_new_tokens 64 is too much: the decoder has 64 positions") as caught:
        rlhf.run([*argv, "64"])
    most = int(re.search(r"leaves (\d+) behind", str(caught.value))[1])
    with pytest.raises(UserError, match=f"max_new_tokens {most + 1} is too much"):
        rlhf.run([*argv, str(most + 1)])
    rlhf.run([*argv, str(most)])


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"program": "rlhf.py"}))
    for folder, message in ((tmp_path, "is a run of rlhf.py, not of train.py"), (tmp_path / "none", "no run folder")):
        with pytest.raises(UserError, match=message):
            rlhf.run(["--preset", "vqa", "--policy", str(folder), "--out", str(tmp_path / "out")])
