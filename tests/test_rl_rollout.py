"""Sampling, scoring and the update on a tiny T5: one distribution everywhere, and results that no batching changes."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch

from kernels import chosen_logprobs
from vqa_scratch.errors import UserError
from vqa_scratch.models.t5 import T5, T5Config
from vqa_scratch.rl.config import RLHFConfig
from vqa_scratch.rl.functional import kl_estimates
from vqa_scratch.rl.metrics import UpdateStats
from vqa_scratch.rl.policy import (
    BARRED,
    ActorCritic,
    Context,
    SamplingRules,
    T5Policy,
    attend_alike,
    freeze,
    policy_logits,
    token_logits,
    token_states,
)
from vqa_scratch.rl.ppo import PPO
from vqa_scratch.rl.rewards import RewardPart, RewardSum
from vqa_scratch.rl.rollout import PromptStream, chances, pick, sample, score
from vqa_scratch.rl.types import Prompt

VOCAB, EOS = 23, 1


def tiny(seed=0):
    torch.manual_seed(seed)
    size = T5Config(
        vocab_size=VOCAB, dim=16, head_dim=8, hidden=24, encoder_layers=2, decoder_layers=2, heads=2, dropout=0.3
    )
    return T5Policy(T5(size))


def ragged_prompts(count=8):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [Prompt("", tuple(torch.randint(2, VOCAB, (n,), generator=generator).tolist())) for n in lengths]


def rules(**options):
    barred = torch.zeros(VOCAB, dtype=torch.bool)
    barred[0] = True
    return SamplingRules(**{"eos_id": EOS, "max_new_tokens": 9, "barred": barred} | options)


def tiny_ppo(policy=None, sampling=None, autocast=nullcontext, **options):
    config = RLHFConfig(
        **{"prompts": 8, "samples": 2, "micro_prompts": 8, "max_new_tokens": 9, "iterations": 10, "critic_warmup": 0}
        | {"scale_reward": False, "learning_rate": 1e-2, "warmup_steps": 0}
        | options
    )
    reward = RewardSum([RewardPart("sevens", 1.0, lambda s: torch.tensor([float(x.count(7)) for x in s.ids]))])
    actor = ActorCritic(policy or tiny())
    return PPO(config, actor, freeze(tiny()), reward, ragged_prompts(), sampling or rules(), str, autocast)


# --------------------------------------------------------------------------------------------------------- rules


def test_rules_by_hand():
    logits, ids = torch.zeros(3, 6), torch.tensor([[2, 3, 2, 3], [2, 3, 2, 9], [4, 4, 4, 4]])
    barred = torch.tensor([True, False, False, False, False, True])
    out = policy_logits(logits, ids, torch.tensor([0, 3, 2]), SamplingRules(1, 9, min_new_tokens=2, barred=barred))
    assert (out[:, [0, 5]] == BARRED).all()
    assert (out[:, 1] == torch.tensor([BARRED, 0, 0])).all()  # the end is barred before two tokens
    out = policy_logits(logits, ids, torch.tensor([3, 3, 1]), SamplingRules(1, 9, no_repeat_ngram=2))
    # 2 3 2 _ : 3 would repeat (2, 3). 4 _ : nothing has been said twice yet.
    assert [row.nonzero().flatten().tolist() for row in out] == [[3], [3], []]
    out = policy_logits(logits, ids, torch.tensor([3, 3, 3]), SamplingRules(1, 9, no_repeat_ngram=1))
    assert [row.nonzero().flatten().tolist() for row in out] == [[2, 3], [2, 3], [4]]
    raw = torch.randn(3, 6, dtype=torch.bfloat16)
    out = policy_logits(raw, ids, torch.tensor([0, 0, 0]), SamplingRules(1, 9, temperature=0.5))
    assert out.dtype == torch.float32 and torch.equal(out, 2 * raw.float())


def test_ngram_rule_against_a_plain_loop():
    ids = torch.randint(2, 5, (40, 12))
    positions = torch.randint(0, 12, (40,))
    out = policy_logits(torch.zeros(40, 6), ids, positions, SamplingRules(1, 12, no_repeat_ngram=3))
    for row, position, logits in zip(ids.tolist(), positions.tolist(), out, strict=True):
        past = row[:position]
        seen = {tuple(past[i : i + 3]) for i in range(len(past) - 2)}
        expected = {t for t in range(6) if position >= 2 and (*past[-2:], t) in seen}
        assert set((logits == BARRED).nonzero().flatten().tolist()) == expected


ALL_RULES = [
    {},
    {"temperature": 0.7},
    {"min_new_tokens": 4},
    {"no_repeat_ngram": 2},
    {"temperature": 1.3, "min_new_tokens": 3, "no_repeat_ngram": 3},
]


@pytest.mark.parametrize("options", ALL_RULES)
def test_scored_distribution_is_the_sampled_one(options):
    """Frequencies of the second token, sampled with the cache, against the re-forward under the same rules."""
    policy, some = tiny().eval(), rules(**options)
    count = 4000
    with torch.no_grad():
        one = policy.encode(ragged_prompts(1))
        many = one.shared_by(count)
        ids, mask, finished = sample(
            policy, many, some, chances(count, some, torch.Generator().manual_seed(1), many.states[0].device)
        )
        assert not (ids[mask] == 0).any() and torch.equal(finished, ((ids == EOS) & mask).any(1))
        first = ids[:, 0].mode().values  # look at the successors of the most frequent first token
        rows = ids[:, 0] == first
        successors = ids[rows, 1]
        states = token_states(policy, one, ids[rows][:1, :2], torch.ones(1, 2, dtype=torch.bool))
        logits = token_logits(policy, states, ids[rows][:1, :2], torch.ones(1, 2, dtype=torch.bool), some)
        expected = logits[1].softmax(-1)
    observed = torch.bincount(successors, minlength=VOCAB) / len(successors)
    # Five standard deviations of a frequency estimated from so many draws.
    assert ((observed - expected).abs() <= 5 * (expected * (1 - expected) / len(successors)).sqrt() + 1e-6).all()


def test_the_scorer_bars_what_the_sampler_bars():
    """Of policy and reference alike: no probability of an early end, none of what would repeat an n-gram."""
    policy, some = tiny().eval(), rules(min_new_tokens=4, no_repeat_ngram=1, temperature=0.5)
    ids, mask = torch.tensor([[5, 6, 7, 8, 9]]), torch.ones(1, 5, dtype=torch.bool)
    with torch.no_grad():
        states = token_states(policy, policy.encode(ragged_prompts(1)), ids, mask)
        scored, raw = token_logits(policy, states, ids, mask, some), policy.logits(states)
    for t, row in enumerate(scored):
        barred = {0, *ids[0, :t].tolist()} | ({EOS} if t < 4 else set())
        assert set((row == BARRED).nonzero().flatten().tolist()) == barred
        free = row != BARRED
        torch.testing.assert_close(row[free], raw[t][free] / 0.5)


def test_value_clip_is_in_units_of_the_spread_of_returns():
    """Rewards a hundred times as large move the clip a hundredfold: the same share of values is clipped."""
    shares = []
    for factor in (1.0, 100.0):
        ppo = tiny_ppo(value_clip=0.2)
        prompts = ppo.stream.next()
        t, context, _ = ppo.rollout(prompts)
        larger = t.with_(returns=t.returns * factor, values=t.values * factor)
        with torch.no_grad():
            ppo.actor.value_head.weight.copy_(factor * torch.linspace(-0.2, 0.2, 16))
        stats = UpdateStats()
        ppo.update.accumulate(list(range(8)), prompts, larger, context, stats)
        shares.append(float(stats.minibatches[0]["value_clipped"]))
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
            fall = ppo.config.learning_rate * (1 - ppo.iteration / ppo.config.iterations)
            rates.append([group["lr"] / fall for group in ppo.update.optimizer.param_groups])

        ppo.update.optimizer.register_step_pre_hook(note)
        return ppo

    ppo = watched()
    for _ in range(3):
        log = ppo.step()
    assert log["ppo/learning_rate"] == pytest.approx(0.01 * 0.75 * 0.8)  # of the policy's third step
    resumed = watched()
    resumed.load_state_dict(ppo.state_dict())
    resumed.step()
    head, body = zip(*rates, strict=True)
    assert head == pytest.approx([0.75, 1.5, 2.25, 3, 3, 3, 3, 3])
    assert body[4:] == pytest.approx([0.25, 0.5, 0.75, 1])
    older = {name: value for name, value in ppo.state_dict().items() if name != "policy_steps"}
    resumed.load_state_dict(older)
    assert resumed.update.policy_steps == 6


@pytest.mark.parametrize("options", ALL_RULES)
def test_first_ratio_is_one_and_kl_starts_at_zero(options):
    ppo = tiny_ppo(sampling=rules(**options), epochs=1)
    log = ppo.step()
    assert log["ppo/policy/first_ratio_error"] <= 1e-5
    assert log["objective/kl_exact"] <= 1e-6 and abs(log["objective/kl"]) <= 1e-5
    log = ppo.step()  # the policy has moved
    assert log["ppo/policy/first_ratio_error"] <= 1e-5
    assert log["objective/kl_exact"] > 0 and log["objective/kl_k3"] > 0


@pytest.mark.parametrize("frozen", ["none", "encoder"])
@pytest.mark.parametrize("micro", [8, 3])
def test_first_ratio_is_one_in_bf16(micro, frozen):
    """Exactly: the update computes what scoring computed. Two ways of attention, or prompts padded to another length,
    would be apart by bf16's rounding."""
    options = {"micro_prompts": micro, "freeze": frozen, "epochs": 1}
    ppo = tiny_ppo(autocast=lambda: torch.autocast("cpu", torch.bfloat16), policy=wide(), **options)
    ppo.reference = freeze(wide())
    attend_alike(ppo.reference)
    ppo.stream = PromptStream(long_prompts(8), 8, seed=0)
    for i in range(2):
        log = ppo.step()
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
    ppo.step()
    assert not any(module.training for module in ppo.actor.modules())


# -------------------------------------------------------------------------------------------------- invariances


def responses(ppo, samples=2):
    return ppo.respond(ppo.stream.prompts, samples, ppo.actor.backbone, torch.Generator().manual_seed(8))


def test_a_response_depends_on_its_own_chances_alone():
    """Prompts together, one by one, and with others left out: the same tokens, whoever ends first."""
    policy, some = tiny().eval(), rules()
    prompts = ragged_prompts(8)
    chance = chances(16, some, None, torch.device("cpu"))
    with torch.no_grad():
        together = sample(policy, policy.encode(prompts).shared_by(2), some, chance)
        for i, prompt in enumerate(prompts):
            rows = slice(2 * i, 2 * i + 2)
            alone = sample(policy, policy.encode([prompt]).shared_by(2), some, chance[rows])
            assert alone.lists() == together.lists()[rows]
    assert len({len(x) for x in together.lists()}) > 2, "the lengths should be ragged"


def test_inverse_transform_against_its_definition():
    logits = torch.randn(2000, 7)
    logits[:, [0, 3, 6]] = BARRED
    chance = torch.rand(2000)
    chance[:2] = torch.tensor([0.0, 1 - 2**-24])  # the ends of what torch.rand gives
    token = pick(logits, chance)
    probability = logits.double().softmax(-1)
    above = probability.cumsum(-1).gather(1, token[:, None]).squeeze(1)
    below = above - probability.gather(1, token[:, None]).squeeze(1)
    # A running sum of seven fp32 numbers is off by a few times 2**-24.
    assert ((below - 1e-6 <= chance) & (chance <= above + 1e-6)).all()
    assert not torch.isin(token, torch.tensor([0, 3, 6])).any()


def test_scores_do_not_depend_on_the_batch():
    ppo = tiny_ppo()
    ppo.reference = freeze(tiny(seed=1))
    with torch.no_grad():
        torch.nn.init.normal_(ppo.actor.value_head.weight)
        (ids, mask, _), _, context = responses(ppo)
        ref = ppo.reference.encode(ppo.stream.prompts).shared_by(2)
        assert len(set(mask.sum(1).tolist())) > 2, "the lengths should be ragged"

        def scored(at_once):
            parts = [list(range(i, min(i + at_once, 8))) for i in range(0, 8, at_once)]
            read = ((part, context.of(part), ref.of(part)) for part in parts)
            return score(ppo.actor, ppo.reference, read, ids, mask, ppo.rules)

        whole = scored(8)
        for at_once in (1, 2, 3):
            part = scored(at_once)
            for a, b in zip(whole, part, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for i in range(8):  # each prompt alone, without any padding
            prompt = ppo.stream.prompts[i : i + 1]
            alone = ppo.actor.backbone.encode(prompt)
            row, length = ids[2 * i : 2 * i + 1], int(mask[2 * i].sum())
            logits, values = ppo.actor(alone, row[:, :length], mask[2 * i : 2 * i + 1, :length], ppo.rules)
            torch.testing.assert_close(chosen_logprobs(logits, row[0, :length])[0], whole.logprobs[2 * i, :length])
            torch.testing.assert_close(values, whole.values[2 * i, :length], rtol=1e-5, atol=1e-5)
    for field in whole:
        assert (field[~mask] == 0).all()


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_gradients_do_not_depend_on_the_micro_batch(algorithm, monkeypatch):
    """Nor on whether lookups hand on rows or whole tables. Ragged prompts and responses; 1e-6 of the largest gradient
    is fp32 rounding of the same sum in another order."""
    gradients = []
    for micro, large in ((1, 1), (2, 1), (4, 10**9), (4, 1), (8, 10**9)):
        monkeypatch.setattr("vqa_scratch.rl.policy.LARGE_TABLE", large)
        ppo = tiny_ppo(micro_prompts=micro, algorithm=algorithm, entropy_coef=0.01)
        prompts = ppo.stream.next()
        trajectory, context, _ = ppo.rollout(prompts)
        torch.manual_seed(9)
        with torch.no_grad():  # a policy that has moved: ratios and clips are at work
            for parameter in ppo.actor.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        assert [ppo.actor.backbone.model.embedding.sparse] == [large == 1]
        ppo.update.accumulate(list(range(8)), prompts, trajectory, context, UpdateStats())
        gradients.append(torch.cat([p.grad.flatten() for p in ppo.update.parameters if p.grad is not None]))
    scale = gradients[-1].abs().max()
    assert scale > 1e-3
    for gradient in gradients[:-1]:
        torch.testing.assert_close(gradient / scale, gradients[-1] / scale, rtol=0, atol=1e-6)


def test_each_minibatch_is_a_step():
    ppo = tiny_ppo(minibatches=4, epochs=2, early_stop_kl=0.0)
    assert ppo.step()["ppo/steps"] == 8


def test_value_loss_can_be_kept_out_of_the_policy():
    for critic, moved in (("shared", True), ("detached", False)):
        ppo = tiny_ppo(critic=critic)
        prompts = ppo.stream.next()
        trajectory, context, _ = ppo.rollout(prompts)
        torch.nn.init.normal_(ppo.actor.value_head.weight)
        flat = trajectory.with_(advantages=torch.zeros_like(trajectory.advantages))
        ppo.update.accumulate(list(range(8)), prompts, flat, context, UpdateStats())
        touched = ppo.actor.backbone.model.embedding.weight.grad
        assert (touched is not None and bool(touched.any())) is moved
        assert ppo.actor.value_head.weight.grad.abs().sum() > 0


def test_critic_warm_up_leaves_the_policy_alone():
    ppo = tiny_ppo(critic_warmup=1)
    before = [p.detach().clone() for p in ppo.actor.backbone.parameters()]
    ppo.step()
    assert all(torch.equal(a, b) for a, b in zip(before, ppo.actor.backbone.parameters(), strict=True))
    assert ppo.actor.value_head.weight.abs().sum() > 0
    ppo.step()
    assert not all(torch.equal(a, b) for a, b in zip(before, ppo.actor.backbone.parameters(), strict=True))


def test_frozen_encoder_gives_the_same_and_stays():
    """Frozen or not, the first rollout is the same; frozen, nothing that the encoder depends on moves."""
    logs, ppos = [], []
    for freeze_what in ("none", "encoder"):
        ppos.append(tiny_ppo(freeze=freeze_what))
        logs.append(ppos[-1].step())
    for name in ("objective/kl_exact", "env/reward_mean", "ppo/val/mean", "objective/entropy"):
        assert logs[0][name] == pytest.approx(logs[1][name], abs=1e-6)
    fixed = ppos[1]
    start = tiny().model
    for name, parameter in fixed.actor.backbone.model.named_parameters():
        same = torch.equal(parameter, dict(start.named_parameters())[name])
        assert same is (name.startswith("encoder.") or name == "embedding.weight"), name


def test_shared_encoding_equals_one_encoding_a_response():
    policy = tiny().eval()
    with torch.no_grad():
        encoded = policy.encode(ragged_prompts(3))
        shared = encoded.shared_by(4)
        repeated = Context(*((x[0].repeat_interleave(4, 0),) for x in (encoded.states, encoded.masks)))
        ids, mask = torch.randint(2, VOCAB, (12, 6)), torch.ones(12, 6, dtype=torch.bool)
        torch.testing.assert_close(
            token_states(policy, shared, ids, mask), token_states(policy, repeated, ids, mask), rtol=0, atol=1e-6
        )


# --------------------------------------------------------------------------------------------------- edge cases


def forced(eos_logit):
    """A policy that ends at once, or never."""
    policy = tiny()
    with torch.no_grad():
        policy.model.head.weight[EOS] = 0
        policy.model.head.weight *= 0.01
    original = policy.model.logits

    def logits(hidden):
        out = original(hidden).clone()
        out[..., EOS] += eos_logit
        return out

    policy.model.logits = logits
    return policy


@pytest.mark.parametrize("eos_logit", [60.0, -60.0])
def test_batches_that_all_end_at_once_or_never(eos_logit):
    ppo = tiny_ppo(policy=forced(eos_logit))
    ppo.reference = freeze(forced(eos_logit))
    for _ in range(2):
        log = ppo.step()
        assert all(torch.isfinite(torch.tensor(value)) for value in log.values()), log
    at_once = eos_logit > 0
    assert log["finish"] == (1.0 if at_once else 0.0)
    assert log["tokens/responses_len_mean"] == (1.0 if at_once else 9.0)
    # Cut responses pay the penalty for it.
    assert log["ppo/mean_scores"] == pytest.approx(log["env/reward_mean"] - (0.0 if at_once else 1.0), abs=1e-6)


def test_a_policy_that_breaks_down_stops_the_run():
    ppo = tiny_ppo()
    prompts = ppo.stream.next()
    trajectory, context, _ = ppo.rollout(prompts)
    with torch.no_grad():
        ppo.actor.backbone.model.decoder.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="became nan in iteration 1: lower --learning-rate"):
        ppo.update.run(prompts, trajectory, context, ppo.iteration)


def test_a_gradient_that_is_no_number_is_not_stepped_with():
    """The weights, and with them the next checkpoint, stay what they were."""
    ppo = tiny_ppo()
    prompts = ppo.stream.next()
    trajectory, context, _ = ppo.rollout(prompts)
    before = [p.detach().clone() for p in ppo.update.parameters]
    ppo.update.parameters[-1].register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(UserError, match="the gradient became (inf|nan) in iteration 1: lower --learning-rate"):
        ppo.update.run(prompts, trajectory, context, ppo.iteration)
    assert all(torch.equal(a, b) for a, b in zip(before, ppo.update.parameters, strict=True))


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_losses_and_weights_of_samples_in_the_log(algorithm):
    """The total is what the gradient is of; the effective sample size is 1 while all ratios are."""
    log = tiny_ppo(algorithm=algorithm, epochs=1, value_coef=0.25, entropy_coef=0.5).step()
    value = 0.25 * log["ppo/loss/value"] if algorithm == "ppo" else 0.0
    bonus = 0.5 * log["ppo/policy/entropy"]
    assert log["ppo/loss/total"] == pytest.approx(log["ppo/loss/policy"] + value - bonus, abs=1e-6)
    assert log["ppo/loss/value"] > 0 and log["ppo/policy/ess"] == pytest.approx(1.0, abs=1e-5)
    moved = tiny_ppo(algorithm=algorithm, epochs=4, early_stop_kl=0.0).step()
    assert 0 < moved["ppo/policy/ess"] < 1


def test_responses_of_one_token():
    ppo = tiny_ppo(sampling=rules(max_new_tokens=1), max_new_tokens=1)
    for _ in range(2):
        log = ppo.step()
    assert log["tokens/responses_len_mean"] == 1 and log["ppo/policy/first_ratio_error"] <= 1e-5


def test_mask_follows_lengths_even_where_padding_is_a_real_token():
    policy = tiny().eval()
    policy.pad_id = 7  # ids are padded with a token that may be sampled
    with torch.no_grad():
        context = policy.encode(ragged_prompts(1)).shared_by(400)
        ids, mask, finished = sample(policy, context, rules(), chances(400, rules(), None, torch.device("cpu")))
    assert (ids[mask] == 7).any() and (ids[~mask] == 7).all()
    lengths = mask.sum(1)
    assert ((lengths == 9) | finished).all()
    assert (ids[torch.arange(400), lengths - 1] == EOS).eq(finished).all()


def test_prompts_come_in_fresh_order_and_from_where_they_stopped():
    prompts = [Prompt(str(i)) for i in range(7)]
    stream = PromptStream(prompts, 3, seed=0)
    drawn = [p.text for _ in range(7) for p in stream.next()]
    for epoch in range(3):
        assert sorted(drawn[7 * epoch : 7 * epoch + 7]) == [str(i) for i in range(7)]
    assert drawn[:7] != drawn[7:14]
    again = PromptStream(prompts, 3, seed=0)
    again.drawn = 12
    assert [p.text for _ in range(3) for p in again.next()] == drawn[12:]
    with pytest.raises(UserError, match="7 prompts do not fill one batch of 8: lower --prompts"):
        PromptStream(prompts, 8, seed=0)


def test_low_precision_reference_agrees_with_autocast():
    """Storing linear layers in bf16 gives what autocast computes from fp32 weights, to the bit."""
    policy, frozen = tiny().eval(), freeze(tiny(), torch.bfloat16)
    ids, mask = torch.randint(2, VOCAB, (8, 5)), torch.ones(8, 5, dtype=torch.bool)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = [
            token_logits(p, token_states(p, p.encode(ragged_prompts()), ids, mask), ids, mask, rules())
            for p in (policy, frozen)
        ]
    assert torch.equal(*out)
    assert out[0].dtype == torch.float32


def test_trajectory_checks_its_shape_table():
    ppo = tiny_ppo()
    trajectory, _, _ = ppo.rollout(ppo.stream.next())
    with pytest.raises(AssertionError, match="values has shape"):
        trajectory.with_(values=trajectory.values[:, :1])
    part = trajectory.rows(torch.tensor([3, 1]))
    assert part.ids.shape == (2, int(trajectory.mask[[3, 1]].sum(1).max()))
    fields = {f.name for f in dataclasses.fields(trajectory)}
    table = {
        line.split()[0] for line in type(trajectory).__doc__.splitlines() if line.startswith("    ") and "(B" in line
    }
    assert table >= fields - {"ids"}, "the docstring is the shape table"


@pytest.mark.parametrize("whiten", [False, True])
def test_kl_in_the_log_is_the_mean_of_sums_over_responses(whiten):
    ppo = tiny_ppo(whiten_rewards=whiten)  # whitening changes the advantages, not what the log says of rewards
    ppo.reference = freeze(tiny(seed=1))
    prompts = ppo.stream.next()
    t, _, log = ppo.rollout(prompts)
    by_hand = sum(float((t.logprobs[b] - t.ref_logprobs[b])[t.mask[b]].sum()) for b in range(16)) / 16
    assert log["objective/kl"] == pytest.approx(by_hand, rel=1e-5)
    k3 = kl_estimates(t.logprobs, t.ref_logprobs).k3
    assert log["objective/kl_k3"] == pytest.approx(float(k3[t.mask].sum()) / 16, rel=1e-5)
    assert log["objective/rlhf_reward"] == pytest.approx(float(t.scores.mean()) - ppo.kl.coef * by_hand, rel=1e-4)


# ------------------------------------------------------------------------------------------------------- resume


def test_resume_is_bit_equal():
    options = {"kl_target": 1.0, "scale_reward": True, "minibatches": 2, "critic_warmup": 1}
    whole = tiny_ppo(**options)
    whole.fit_reward_scale(whole.stream.prompts, 32)
    logs = []
    for i in range(6):
        if i == 3:
            saved = {k: v for k, v in torch.load(_through_disk(whole.state_dict()), weights_only=True).items()}
        logs.append(whole.step())
    again = tiny_ppo(**options)
    again.load_state_dict(saved)
    for i in range(3, 6):
        log = again.step()
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
