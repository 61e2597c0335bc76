"""PPO on a problem whose optimum is known: the shipped code path reaches it, and classic mistakes do not."""

import pytest
import torch
from rl_tiny import before_the_update
from rl_toy import (
    EOS,
    LONGEST,
    PREFIXES,
    SEQUENCES,
    Table,
    logprob_of_sequences,
    objective,
    optimum,
    share_of_gain,
    tables,
    toy_ppo,
)

from rlhf import iterate
from vqa_scratch.rl import ppo as ppo_module
from vqa_scratch.rl.policy import SamplingRules
from vqa_scratch.rl.rollout import Responses, sample


def test_the_toy_is_the_published_one():
    reference, rewards = tables()
    assert len(PREFIXES) == 13 and len(SEQUENCES) == 40
    assert objective(reference, reference, rewards, 0.5) == (pytest.approx(0.6756, abs=5e-5), 0.0)
    assert optimum(reference, rewards, 0.5) == pytest.approx(1.8653, abs=5e-5)


def test_ppo_reaches_the_optimum():
    ppo = toy_ppo()
    for _ in range(ppo.options.iterations):
        log = iterate(ppo)
        assert log["ppo/policy/first_ratio_error"] <= 1e-5
        assert log["objective/kl_exact"] >= 0 and log["objective/kl_k3"] >= 0
    share, kl = share_of_gain(ppo)
    assert share >= 0.999
    assert kl == pytest.approx(1.0174, abs=0.02)  # KL of the optimum
    assert log["objective/kl_exact"] == pytest.approx(kl, abs=0.2)  # 128 samples


class FirstTokenDropped(Responses):
    """What a mask shifted by one does: no reward, KL or gradient at t1 (one-token answers keep it)."""

    def lists(self):
        lengths = self.mask.sum(1) + (~self.mask[:, 0]).long() - self.finished.long()
        return [row[:n] for row, n in zip(self.ids.tolist(), lengths.tolist(), strict=True)]


def drop_first_token(*args):
    ids, mask, finished = sample(*args)
    mask = mask.clone()
    mask[:, 0] = mask.sum(1) == 1
    return FirstTokenDropped(ids, mask, finished)


def bar_eos_in_the_sampler_alone(backbone, context, rules, chance):
    return sample(backbone, context, SamplingRules(EOS, LONGEST, min_new_tokens=2), chance)


@pytest.mark.parametrize("mistake", [drop_first_token, bar_eos_in_the_sampler_alone])
def test_classic_mistakes_fall_short(mistake, monkeypatch):
    monkeypatch.setattr(ppo_module, "sample", mistake)
    ppo = toy_ppo(iterations=200, critic="shared", lam=0.95)
    for _ in range(ppo.options.iterations):
        iterate(ppo)
    share, _ = share_of_gain(ppo)
    assert 0.5 < share < 0.95


def test_min_length_in_the_rules_is_fine_because_all_share_it():
    """The same restriction, in the policy itself: the KL is that of the restricted policies and cannot be negative."""
    ppo = toy_ppo(iterations=20, min_new_tokens=2, learning_rate=0.1)
    for _ in range(20):
        log = iterate(ppo)
        assert log["objective/kl_exact"] >= 0
        assert log["tokens/responses_len_mean"] >= 2
        assert log["ppo/policy/first_ratio_error"] <= 1e-5
    assert log["env/reward_mean"] > 0.9


@pytest.mark.parametrize(("algorithm", "floor"), [("rloo", 0.99), ("grpo", 0.95)])
def test_group_algorithms_share_the_loop(algorithm, floor):
    """RLOO is unbiased and gets there; GRPO divides by the spread of each group, which bends the objective a little."""
    ppo = toy_ppo(algorithm=algorithm, prompts=32, samples=4, iterations=200)
    for _ in range(ppo.options.iterations):
        iterate(ppo)
    assert share_of_gain(ppo)[0] >= floor


def test_best_of_n_imitates_the_best():
    ppo = toy_ppo(algorithm="best-of-n", prompts=32, samples=4, iterations=30, kl_coef=0.0)
    logs = [iterate(ppo) for _ in range(30)]
    assert logs[-1]["env/reward_mean"] > logs[0]["env/reward_mean"] + 1


def test_bandit_of_one_token_responses(beta=1.0):
    """Responses of one token, some of them all-EOS: four arms, uniform reference, optimum in closed form."""
    rewards = torch.tensor([0.0, 1.0, 2.0, -1.0])
    ppo = toy_ppo(kl_coef=beta, max_new_tokens=1, learning_rate=0.02, iterations=250, prompts=64, micro_prompts=64)
    ppo.rules = ppo.update.rules = SamplingRules(EOS, 1)
    for model in (ppo.actor.backbone, ppo.reference):
        torch.nn.init.zeros_(model.table)

    def reward(samples):
        return rewards[[ids[0] if ids else EOS for ids in samples.ids]]

    object.__setattr__(ppo.reward.parts[0], "function", reward)
    for _ in range(250):
        iterate(ppo)
    policy = ppo.actor.backbone.table[0].detach().double().log_softmax(-1)
    best = beta * torch.logsumexp(rewards.double() / beta + torch.tensor(0.25).log(), 0)
    reached = (policy.exp() * (rewards - beta * (policy - torch.tensor(0.25).log()))).sum()
    assert 0 <= float(best - reached) < 1e-4


def test_early_stop_comes_before_the_step():
    """A learning rate far too large: the first step is taken, the k3 it causes bars the second."""
    ppo = toy_ppo(iterations=5, learning_rate=3.0, early_stop_kl=0.01)
    log = iterate(ppo)
    assert log["ppo/steps"] == 1 and log["ppo/stopped_early"] == 1
    before = ppo.actor.backbone.table.detach().clone()
    ppo.options.__dict__["early_stop_kl"] = 1e-12  # now bars even what follows a tiny change
    ppo.actor.backbone.table.data += 1e-3 * torch.randn(13, 4)
    moved = ppo.actor.backbone.table.detach().clone()
    # The policy is then no longer the one that sampled.
    before_the_update(ppo, lambda: ppo.actor.backbone.table.data.copy_(before))
    log = iterate(ppo)
    assert log["ppo/steps"] == 0 and log["ppo/stopped_early"] == 1
    assert torch.equal(ppo.actor.backbone.table, before) and not torch.equal(before, moved)
    assert ppo.actor.backbone.table.grad is None


def test_adaptive_price_moves_towards_the_target():
    cheap = toy_ppo(iterations=60, kl_coef=0.05, kl_target=0.2)
    for _ in range(60):
        iterate(cheap)
    assert cheap.kl.coef > 0.05
    fixed = toy_ppo(iterations=3)
    for _ in range(3):
        assert iterate(fixed)["objective/kl_coef"] == 0.5


def test_table_reads_the_prefix():
    table = Table(torch.arange(52.0).view(13, 4))
    ids = torch.tensor([[0, 2, 1]])  # start, then the prefix (2, 1)
    states = table.decode_hidden(ids, None).argmax(-1)
    assert [PREFIXES[i] for i in states[0]] == [(), (2,), (2, 1)]


def test_dpo_reaches_the_closed_form(beta=0.5):
    """pi ~ reference * exp(reward / beta), each of the forty chances within 0.001: where the preferences are those of
    Bradley and Terry, every pair has its least loss there, so chance leaves no noise at the end."""
    reference, rewards = tables()
    ppo = toy_ppo(algorithm="dpo", prompts=64, samples=2, iterations=400, kl_coef=beta, learning_rate=0.1, epochs=2)
    logs = [iterate(ppo) for _ in range(ppo.options.iterations)]
    tilted = logprob_of_sequences(reference) + torch.tensor([rewards[s] for s in SEQUENCES]).double() / beta
    reached = logprob_of_sequences(ppo.actor.backbone.table).exp()
    assert float((reached - tilted.softmax(0)).abs().max()) < 1e-3
    assert share_of_gain(ppo)[0] > 0.999 and logs[-1]["dpo/accuracy"] > logs[0]["dpo/accuracy"] > 0.3
