"""What PPO subtracts from its returns: no worse than the prompt's own samples, and better where a critic can tell."""

import math

import pytest
import torch
from rl_tiny import rolled_out, tiny_ppo
from rl_walk import best_objective, objective, walk_ppo
from torch.testing import assert_close

from rlhf import iterate
from vqa_scratch.rl import functional as F
from vqa_scratch.rl.options import PRESETS

PROMPTS, SAMPLES, TOKENS = 6, 3, 5


def ragged(seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, TOKENS + 1, (PROMPTS * SAMPLES, 1), generator=generator)
    known = torch.randn(2, PROMPTS * SAMPLES, TOKENS, generator=generator)
    returns = 0.5 * known[0] + torch.randn(PROMPTS * SAMPLES, TOKENS, generator=generator) + 3
    return list(known), returns, torch.arange(TOKENS) < lengths


def test_the_fit_is_that_of_least_squares_over_the_other_prompts():
    known, returns, mask = ragged()
    fitted = F.fitted_baseline(known, returns, mask, PROMPTS)
    x = torch.stack([torch.ones_like(returns), mask.cumsum(1), *known], -1).double()
    own = torch.arange(PROMPTS).repeat_interleave(SAMPLES)
    for prompt in range(PROMPTS):
        others = mask & (own != prompt)[:, None]
        weights = torch.linalg.lstsq(x[others], returns.double()[others]).solution
        mine = mask & (own == prompt)[:, None]
        assert_close(fitted[mine], (x[mine] @ weights).float(), rtol=0, atol=1e-4)  # the ridge is 1e-6 of the squares


def test_no_response_has_a_say_in_its_own_baseline():
    """The condition under which a baseline leaves the gradient's mean alone; and padding has no say at all."""
    known, returns, mask = ragged()
    before = F.fitted_baseline(known, returns, mask, PROMPTS)
    moved = returns.clone()
    moved[:SAMPLES] += torch.randn(SAMPLES, TOKENS)  # of the first prompt
    after = F.fitted_baseline(known, moved, mask, PROMPTS)
    assert torch.equal(before[:SAMPLES], after[:SAMPLES])
    assert not torch.equal(before[SAMPLES:], after[SAMPLES:])
    junk = [x.masked_fill(~mask, math.nan) for x in (*known, returns)]
    assert torch.equal(F.fitted_baseline(junk[:2], junk[2], mask, PROMPTS), before)
    assert not before[~mask].any()


@pytest.mark.parametrize("known", [[], [torch.zeros(4, 2)], [torch.full((4, 2), 0.7)]])
def test_what_tells_nothing_leaves_the_mean_of_the_other_prompts(known):
    """At each of the two tokens, of which the second returns 4 less."""
    returns, mask = torch.tensor([[1.0, -3.0], [3.0, -1.0], [5.0, 1.0], [7.0, 3.0]]), torch.ones(4, 2, dtype=torch.bool)
    fitted = F.fitted_baseline(known, returns, mask, 2)
    assert_close(fitted, torch.tensor([[6.0, 2.0], [6.0, 2.0], [2.0, -2.0], [2.0, -2.0]]), rtol=1e-4, atol=1e-4)
    assert not F.fitted_baseline(known, returns, mask, 1).any()  # no other prompt, nothing to fit


@pytest.mark.parametrize("between", [0.0, 0.1, 0.3, 0.7])
def test_it_loses_neither_to_the_others_mean_nor_to_that_of_the_batch(between):
    """`between`: the prompts' share of the variance. The noise of three fitted weights is about 3 / 400 of it."""
    generator = torch.Generator().manual_seed(1)
    prompts, samples = 100, 4
    mask = torch.ones(prompts * samples, 1, dtype=torch.bool)
    errors = []
    for _ in range(20):
        of_prompt = math.sqrt(between) * torch.randn(prompts, 1, generator=generator)
        own = math.sqrt(1 - between) * torch.randn(prompts, samples, generator=generator)
        returns = (of_prompt + own).view(-1, 1)
        others = F.others_mean(returns[:, 0], samples)[:, None]
        useless = torch.randn(returns.shape, generator=generator)
        fitted = F.fitted_baseline([useless, others], returns, mask, prompts)
        errors.append([float((returns - known).square().mean()) for known in (fitted, others, returns.mean())])
    fitted, others, mean = torch.tensor(errors).mean(0).tolist()
    assert fitted <= min(others, mean) + 0.02
    if 0.1 <= between <= 0.3:
        assert fitted < others - 0.02  # four samples are few


def test_a_critic_of_noise_costs_next_to_nothing():
    """Its weight is near 0, and the advantages are nearly those without it; alone it would make up half of them."""
    ppo = tiny_ppo(prompts=8, samples=2, whiten_advantages=False)
    rollout = ppo.rollout(ppo.stream.next())
    noise = torch.randn(rollout.scored.values.shape).masked_fill(~rollout.responses.mask, 0)
    noisy = rollout._replace(scored=rollout.scored._replace(values=3 * noise))
    without, fitted = (ppo.advantages(x) for x in (rollout, noisy))
    assert float((fitted.advantages - without.advantages).square().mean()) < 0.5


def test_the_baseline_is_what_is_subtracted():
    """With lambda 1 advantages and baseline make up the returns, which are then those from each token to the end."""
    for options in ({}, {"critic": "shared"}, {"algorithm": "rloo"}):
        _, t, _ = rolled_out(tiny_ppo(whiten_advantages=False, kl_coef=0.0, **options))
        assert_close(t.advantages + t.baseline, t.returns, rtol=0, atol=1e-5)
        assert_close(t.returns, t.scores[:, None] * t.mask, rtol=0, atol=1e-5)


def test_where_a_critic_can_tell_ppo_beats_rloo(monkeypatch):
    """Equal rollouts and steps around the ring. Without a critic what is left is the reward to go and its trend."""
    gains = {}
    for name, options in {"ppo": {}, "no critic": {"value_lr_scale": 1e-9}, "rloo": {"algorithm": "rloo"}}.items():
        with monkeypatch.context() as patched:
            ppo = walk_ppo(patched, **options)
            logs = [iterate(ppo) for _ in range(ppo.options.iterations)]
        table, beta = ppo.actor.backbone.table, ppo.options.kl_coef
        start = objective(torch.zeros_like(table), beta)
        gains[name] = (objective(table, beta) - start) / (best_objective(beta) - start)
        if name == "ppo":
            assert logs[-1]["ppo/val/critic_explained"] > 0.3
    assert gains["rloo"] + 0.1 < gains["no critic"] < gains["ppo"] - 0.1 and gains["ppo"] > 0.65, gains


# ----------------------------------------------------------------------------------------------------- price of KL


def kl_under(price, iterations, responses, lag=4.0):
    """The KL of a policy that in each iteration closes a `lag`th of its way to where the price would leave it.

    For a normal reward of deviation 1 that is 1 / (2 price^2).
    """
    kl, path = 0.0, []
    for _ in range(iterations):
        kl += (1 / (2 * price.coef**2) - kl) / lag
        path.append(kl)
        price.update(kl, responses)
    return path


def test_the_price_of_the_preset_does_not_overshoot():
    preset = PRESETS["mini-news"]
    target, iterations, responses = preset["kl_target"], preset["iterations"], 32 * preset["samples"]
    horizon = preset["kl_horizon"] * iterations * responses
    path = kl_under(F.AdaptiveKL(preset["kl_coef"], target, horizon), iterations, responses)
    assert max(path) <= 1.5 * target and path[-1] == pytest.approx(target, rel=0.1)
    steep = kl_under(F.AdaptiveKL(preset["kl_coef"] / 10, target, horizon), iterations, responses)
    assert max(steep) > 1.5 * target  # a price that begins far too low
