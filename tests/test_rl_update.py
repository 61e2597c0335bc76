"""Iterations of PPO on a tiny T5: what a step moves, what stops it, and results that no batching or kill changes."""

import dataclasses

import pytest
import torch
from rl_tiny import ALL_RULES, EOS, VOCAB, add_gradients, before_the_update, rolled_out, rules, tiny, tiny_ppo

from rlhf import iterate
from vqa_scratch.errors import UserError
from vqa_scratch.models.t5 import T5, T5Config
from vqa_scratch.rl.policy import T5Policy, freeze
from vqa_scratch.rl.rollout import PromptStream
from vqa_scratch.rl.types import Prompt


def test_value_clip_is_in_units_of_the_spread_of_returns():
    """Rewards a hundred times as large move the clip a hundredfold: the same share of values is clipped."""
    shares = []
    for factor in (1.0, 100.0):
        ppo = tiny_ppo(value_clip=0.2)
        prompts, t, context = rolled_out(ppo)
        larger = dataclasses.replace(t, returns=t.returns * factor, values=t.values * factor)
        with torch.no_grad():
            ppo.actor.value_head.weight.copy_(factor * torch.linspace(-0.2, 0.2, 16))
        shares.append(float(add_gradients(ppo, prompts, larger, context)["ppo/val/clipfrac"]))
    assert 0 < shares[0] < 1 and shares[0] == pytest.approx(shares[1], abs=1e-6)


def test_what_the_optimizer_and_the_value_head_begin_with():
    ppo = tiny_ppo(value_lr_scale=3.0)
    assert not any(p.any() for p in ppo.actor.value_head.parameters())
    assert (ppo.update.optimizer.defaults["eps"], ppo.update.optimizer.defaults["weight_decay"]) == (1e-5, 0.0)
    ppo.update.set_learning_rate()
    head, body = (group["lr"] for group in ppo.update.optimizer.param_groups)
    assert head == pytest.approx(3 * body) and body == ppo.update.learning_rate


def test_the_policy_has_a_warm_up_of_its_own():
    """By hand, in shares of the peak before the fall over the run: two steps an iteration, two iterations of the head
    alone, a warm-up of four steps; over a checkpoint in the middle, and with one from before the two were counted."""
    options = {"critic_warmup": 2, "warmup_steps": 4, "epochs": 2, "early_stop_kl": 0.0, "value_lr_scale": 3.0}
    rates = []

    def watched():
        ppo = tiny_ppo(**options)

        def note(*_):
            fall = ppo.options.learning_rate * (1 - ppo.iteration / ppo.options.iterations)
            rates.append([group["lr"] / fall for group in ppo.update.optimizer.param_groups])

        ppo.update.optimizer.register_step_pre_hook(note)
        return ppo

    ppo = watched()
    for _ in range(3):
        log = iterate(ppo)
    assert log["ppo/learning_rate"] == pytest.approx(0.01 * 0.75 * 0.8)  # of the policy's third step
    resumed = watched()
    resumed.load_state_dict(ppo.state_dict())
    iterate(resumed)
    head, body = zip(*rates, strict=True)
    assert head == pytest.approx([0.75, 1.5, 2.25, 3, 3, 3, 3, 3])
    assert body[4:] == pytest.approx([0.25, 0.5, 0.75, 1])
    older = {name: value for name, value in ppo.state_dict().items() if name != "policy_steps"}
    resumed.load_state_dict(older)
    assert resumed.update.policy_steps == 6


def test_a_checkpoint_from_before_the_head_had_its_new_name():
    ppo, other = tiny_ppo(), tiny_ppo(policy=tiny(seed=4))
    state = ppo.state_dict()
    state["actor"] = {name.replace("lm_head", "head"): value for name, value in state["actor"].items()}
    assert "backbone.model.head.weight" in state["actor"]
    other.load_state_dict(state)
    saved, loaded = ppo.actor.state_dict(), other.actor.state_dict()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


@pytest.mark.parametrize("options", ALL_RULES)
def test_first_ratio_is_one_and_kl_starts_at_zero(options):
    ppo = tiny_ppo(sampling=rules(**options), epochs=1)
    log = iterate(ppo)
    assert log["ppo/policy/first_ratio_error"] <= 1e-5
    assert log["objective/kl_exact"] <= 1e-6 and abs(log["objective/kl"]) <= 1e-5
    log = iterate(ppo)  # the policy has moved
    assert log["ppo/policy/first_ratio_error"] <= 1e-5
    assert log["objective/kl_exact"] > 0 and log["objective/kl_k3"] > 0


@pytest.mark.parametrize("frozen", ["nothing", "encoder"])
@pytest.mark.parametrize("micro", [8, 3])
def test_first_ratio_is_one_in_bf16(micro, frozen):
    """Exactly: the update computes what scoring computed. Two ways of attention, or prompts padded to another length,
    would be apart by bf16's rounding."""
    options = {"micro_prompts": micro, "freeze": frozen, "epochs": 1}
    ppo = tiny_ppo(autocast=lambda: torch.autocast("cpu", torch.bfloat16), policy=wide(), **options)
    ppo.reference = freeze(wide())
    ppo.stream = PromptStream(long_prompts(8), 8, seed=0)
    for i in range(2):
        log = iterate(ppo)
        assert log["ppo/policy/first_ratio_error"] <= 1e-6
        assert (log["objective/kl_exact"] == 0) is (i == 0), "the reference reads the same padding"


def wide():
    torch.manual_seed(0)
    size = {"encoder_layers": 1, "decoder_layers": 1, "hidden": 512}
    return T5Policy(T5(T5Config(vocab_size=VOCAB, **size)))


def long_prompts(count):
    """So ragged that what is summed over them in bf16 depends on the padding."""
    generator = torch.Generator().manual_seed(4)
    return [
        Prompt("", tuple(torch.randint(2, VOCAB, (7 + 11 * i,), generator=generator).tolist())) for i in range(count)
    ]


def test_dropout_stays_off_while_training():
    ppo = tiny_ppo()
    iterate(ppo)
    assert not any(module.training for module in ppo.actor.modules())


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_gradients_do_not_depend_on_the_micro_batch(algorithm, monkeypatch):
    """Nor on whether lookups pass on rows or whole tables. Ragged prompts and responses; 2e-6 of the largest gradient
    is 17 roundings in fp32 (2^-23 each): sums over some 100 tokens in another order, and softmax over other padding."""
    gradients = []
    for micro, large in ((1, 1), (2, 1), (4, 10**9), (4, 1), (8, 10**9)):
        monkeypatch.setattr("vqa_scratch.rl.large_tables.LARGE_TABLE", large)
        ppo = tiny_ppo(micro_prompts=micro, algorithm=algorithm, entropy_coef=0.01)
        ppo.update.keeps_encoding = False  # it would be that of the policy before it moves
        prompts, trajectory, context = rolled_out(ppo)
        torch.manual_seed(9)
        with torch.no_grad():  # a policy that has moved: ratios and clips are at work
            for parameter in ppo.actor.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        assert [ppo.actor.backbone.model.embedding.sparse] == [large == 1]
        add_gradients(ppo, prompts, trajectory, context)
        gradients.append(torch.cat([p.grad.flatten() for p in ppo.update.parameters if p.grad is not None]))
    scale = gradients[-1].abs().max()
    assert scale > 1e-3
    for gradient in gradients[:-1]:
        torch.testing.assert_close(gradient / scale, gradients[-1] / scale, rtol=0, atol=2e-6)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_first_pass_goes_back_through_the_encoding_of_the_rollout(precision, monkeypatch):
    """All prompts at once: of three passes two encode, and the weights become those of three that do."""
    weights, encoded = [], []
    monkeypatch.setattr(T5Policy, "encode", lambda self, *a, f=T5Policy.encode: (encoded.append(self), f(self, *a))[1])
    for keeps in (True, False):
        ppo = tiny_ppo(epochs=3, early_stop_kl=0.0, autocast=lambda: torch.autocast("cpu", precision))
        assert ppo.update.keeps_encoding
        ppo.update.keeps_encoding = keeps
        for _ in range(2):
            encoded.clear()
            iterate(ppo)
            assert encoded.count(ppo.actor.backbone) == (3 if keeps else 4)
        weights.append(torch.cat([p.detach().flatten() for p in ppo.update.parameters]))
    # The prompts lie in another order, so sums over them are rounded otherwise; the weights moved by about 6e-2.
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5 if precision is torch.float32 else 1e-3)


@pytest.mark.parametrize("kept", [{"minibatches": 2}, {"micro_prompts": 4}, {"freeze": "encoder"}])
def test_only_a_first_pass_over_all_prompts_at_once_keeps_the_encoding(kept):
    ppo = tiny_ppo(**kept)
    assert not ppo.update.keeps_encoding
    assert not any(part.states.requires_grad for part in ppo.rollout(ppo.stream.next()).context.parts)


def test_each_minibatch_is_a_step():
    ppo = tiny_ppo(minibatches=4, epochs=2, early_stop_kl=0.0)
    assert iterate(ppo)["ppo/steps"] == 8


def test_value_loss_can_be_kept_out_of_the_policy():
    for critic, moved in (("shared", True), ("detached", False)):
        ppo = tiny_ppo(critic=critic)
        prompts, trajectory, context = rolled_out(ppo)
        torch.nn.init.normal_(ppo.actor.value_head.weight)
        flat = dataclasses.replace(trajectory, advantages=torch.zeros_like(trajectory.advantages))
        add_gradients(ppo, prompts, flat, context)
        touched = ppo.actor.backbone.model.embedding.weight.grad
        assert (touched is not None and bool(touched.any())) is moved
        assert ppo.actor.value_head.weight.grad.abs().sum() > 0


def test_critic_warm_up_leaves_the_policy_alone():
    ppo = tiny_ppo(critic_warmup=1)
    before = [p.detach().clone() for p in ppo.actor.backbone.parameters()]
    iterate(ppo)
    assert all(torch.equal(a, b) for a, b in zip(before, ppo.actor.backbone.parameters(), strict=True))
    assert ppo.actor.value_head.weight.abs().sum() > 0
    iterate(ppo)
    assert not all(torch.equal(a, b) for a, b in zip(before, ppo.actor.backbone.parameters(), strict=True))


def test_frozen_encoder_gives_the_same_and_stays():
    """Frozen or not, the first rollout is the same; frozen, nothing that the encoder depends on moves."""
    logs, ppos = [], []
    for freeze_what in ("nothing", "encoder"):
        ppos.append(tiny_ppo(freeze=freeze_what))
        logs.append(iterate(ppos[-1]))
    for name in ("objective/kl_exact", "env/reward_mean", "ppo/val/mean", "objective/entropy"):
        assert logs[0][name] == pytest.approx(logs[1][name], abs=1e-6)
    fixed = ppos[1]
    start = tiny().model
    for name, parameter in fixed.actor.backbone.model.named_parameters():
        same = torch.equal(parameter, dict(start.named_parameters())[name])
        assert same is (name.startswith("encoder.") or name == "embedding.weight"), name


def forced(eos_logit):
    """A policy that ends at once, or never."""
    policy = tiny()
    with torch.no_grad():
        policy.model.lm_head.weight[EOS] = 0
        policy.model.lm_head.weight *= 0.01
    original = policy.model.logits

    def logits(hidden):
        out = original(hidden).clone()
        out[..., EOS] += eos_logit
        return out

    policy.model.logits = logits
    policy.model.fast_state = lambda: None  # steps ask the model too
    return policy


@pytest.mark.parametrize("eos_logit", [60.0, -60.0])
def test_batches_that_all_end_at_once_or_never(eos_logit):
    ppo = tiny_ppo(policy=forced(eos_logit))
    ppo.reference = freeze(forced(eos_logit))
    for _ in range(2):
        log = iterate(ppo)
        assert all(torch.isfinite(torch.tensor(value)) for value in log.values()), log
    at_once = eos_logit > 0
    assert log["finish"] == (1.0 if at_once else 0.0)
    assert log["tokens/responses_len_mean"] == (1.0 if at_once else 9.0)
    # Cut responses pay the penalty for it.
    assert log["ppo/mean_scores"] == pytest.approx(log["env/reward_mean"] - (0.0 if at_once else 1.0), abs=1e-6)


def test_a_policy_that_breaks_down_stops_the_run():
    ppo = tiny_ppo()
    norm = ppo.actor.backbone.model.decoder.norm.weight
    before_the_update(ppo, lambda: norm.data.fill_(float("nan")))
    with pytest.raises(UserError, match="log-probabilities became nan in iteration 1: lower --learning-rate"):
        iterate(ppo)


def test_a_gradient_that_is_no_number_is_not_stepped_with():
    """The weights, and with them the next checkpoint, stay what they were."""
    ppo = tiny_ppo()
    before = [p.detach().clone() for p in ppo.update.parameters]
    ppo.update.parameters[-1].register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(UserError, match="the gradient became (inf|nan) in iteration 1: lower --learning-rate"):
        iterate(ppo)
    assert all(torch.equal(a, b) for a, b in zip(before, ppo.update.parameters, strict=True))


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_losses_and_weights_of_samples_in_the_log(algorithm):
    """The total is what the gradient is of; the effective sample size is 1 while all ratios are."""
    log = iterate(tiny_ppo(algorithm=algorithm, epochs=1, value_coef=0.25, entropy_coef=0.5))
    value = 0.25 * log["ppo/loss/value"] if algorithm == "ppo" else 0.0
    bonus = 0.5 * log["ppo/policy/entropy"]
    assert log["ppo/loss/total"] == pytest.approx(log["ppo/loss/policy"] + value - bonus, abs=1e-6)
    assert log["ppo/loss/value"] > 0 and log["ppo/policy/ess"] == pytest.approx(1.0, abs=1e-5)
    moved = iterate(tiny_ppo(algorithm=algorithm, epochs=4, early_stop_kl=0.0))
    assert 0 < moved["ppo/policy/ess"] < 1


def test_resume_is_bit_equal():
    options = {"kl_target": 1.0, "scale_reward": True, "minibatches": 2, "critic_warmup": 1}
    whole = tiny_ppo(**options)
    whole.fit_reward_scale(whole.stream.prompts, 32)
    logs = []
    for i in range(6):
        if i == 3:
            saved = {k: v for k, v in torch.load(_through_disk(whole.state_dict()), weights_only=True).items()}
        logs.append(iterate(whole))
    again = tiny_ppo(**options)
    again.load_state_dict(saved)
    for i in range(3, 6):
        log = iterate(again)
        for name, value in log.items():
            if "time/" not in name and "per_second" not in name:
                assert value == logs[i][name], (i, name)
    for (name, a), (_, b) in zip(whole.actor.state_dict().items(), again.actor.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def _through_disk(state):
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer
