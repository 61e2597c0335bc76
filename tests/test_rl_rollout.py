"""Sampling and scoring on a tiny T5: one distribution everywhere, and results that no batching changes."""

import dataclasses

import pytest
import torch
from rl_tiny import ALL_RULES, EOS, VOCAB, ragged_prompts, rolled_out, rules, tiny, tiny_ppo

from rlhf import iterate
from vqa_scratch.errors import UserError
from vqa_scratch.kernels import chosen_logprobs
from vqa_scratch.rl.functional import kl_estimates
from vqa_scratch.rl.metrics import rollout_metrics
from vqa_scratch.rl.policy import (
    BARRED,
    Context,
    Part,
    SamplingRules,
    freeze,
    policy_logits,
    token_logits,
    token_states,
)
from vqa_scratch.rl.rollout import PromptStream, chances, pick, sample, score
from vqa_scratch.rl.types import Prompt


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


@pytest.mark.parametrize("options", ALL_RULES)
def test_scored_distribution_is_the_sampled_one(options):
    """Frequencies of the second token, sampled with the cache, against the re-forward under the same rules."""
    policy, some = tiny().eval(), rules(**options)
    count = 4000
    with torch.no_grad():
        one = policy.encode(ragged_prompts(1))
        many = one.shared_by(count)
        ids, mask, finished = sample(
            policy, many, some, chances(count, some, torch.Generator().manual_seed(1), many.parts[0].states.device)
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


def test_shared_encoding_equals_one_encoding_a_response():
    policy = tiny().eval()
    with torch.no_grad():
        encoded = policy.encode(ragged_prompts(3))
        shared = encoded.shared_by(4)
        (part,) = encoded.parts
        repeated = Context((Part(*(x.repeat_interleave(4, 0) for x in (part.states, part.mask))),))
        ids, mask = torch.randint(2, VOCAB, (12, 6)), torch.ones(12, 6, dtype=torch.bool)
        torch.testing.assert_close(
            token_states(policy, shared, ids, mask), token_states(policy, repeated, ids, mask), rtol=0, atol=1e-6
        )


def test_responses_of_one_token():
    ppo = tiny_ppo(sampling=rules(max_new_tokens=1), max_new_tokens=1)
    for _ in range(2):
        log = iterate(ppo)
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
    _, trajectory, _ = rolled_out(ppo)
    with pytest.raises(AssertionError, match="values has shape"):
        dataclasses.replace(trajectory, values=trajectory.values[:, :1])
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
    rollout = ppo.rollout(ppo.stream.next())
    t = ppo.advantages(rollout)
    log = rollout_metrics(t, rollout.samples, rollout.raw, rollout.parts)
    by_hand = sum(float((t.logprobs[b] - t.ref_logprobs[b])[t.mask[b]].sum()) for b in range(16)) / 16
    assert log["objective/kl"] == pytest.approx(by_hand, rel=1e-5)
    k3 = kl_estimates(t.logprobs, t.ref_logprobs).k3
    assert log["objective/kl_k3"] == pytest.approx(float(k3[t.mask].sum()) / 16, rel=1e-5)
    assert log["objective/rlhf_reward"] == pytest.approx(float(t.scores.mean()) - ppo.kl.coef * by_hand, rel=1e-4)
