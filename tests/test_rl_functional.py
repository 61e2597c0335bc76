"""The pure maths of PPO against hand-worked numbers, published test cases of other codebases, and closed forms."""

import math

import pytest
import torch

from vqa_scratch.rl import functional as F

EXACT = {"rtol": 1e-6, "atol": 1e-6}  # fp32 sums of a handful of terms
PRINTED = {"rtol": 0, "atol": 6e-5}  # expected values quoted to four decimals


def close(actual, expected, **tolerance):
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), **(tolerance or EXACT))


def ones(*shape):
    return torch.ones(*shape, dtype=torch.bool)


# ------------------------------------------------------------------------------------------------------ statistics


def test_masked_mean_ignores_junk():
    x = torch.tensor([[1.0, 2.0, float("nan")], [3.0, float("inf"), 7.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    close(F.masked_mean(x, mask), 2.0)
    close(F.masked_mean(x, torch.zeros_like(mask)), 0.0)


def test_whiten_without_shift_matches_the_published_case():
    x = torch.arange(1.2, 2.05, 0.1)
    white = F.masked_whiten(x, torch.ones_like(x, dtype=torch.bool), shift_mean=False)
    published = (white - x.mean()) * math.sqrt(len(x) / (len(x) - 1)) + x.mean()  # it has no Bessel correction
    close(published[[0, -1]], torch.tensor([0.0508, 3.1492]), **PRINTED)


def test_whiten_gives_zero_mean_and_unit_bessel_variance_of_the_real_tokens_only():
    x, mask = torch.randn(5, 7) * 3 + 2, torch.rand(5, 7) > 0.4
    white = F.masked_whiten(x, mask)
    close(white[mask].mean(), 0.0, rtol=0, atol=1e-6)
    close(white[mask].var(unbiased=True), 1.0)
    assert (white[~mask] == 0).all()
    close(F.masked_whiten(x.masked_fill(~mask, 1e9), mask), white)


def test_moments_of_parts_add_up_to_the_moments_of_the_whole():
    x, mask = torch.randn(6, 4) + 100, torch.rand(6, 4) > 0.3
    parts = F.masked_moments(x[:2], mask[:2]) + F.masked_moments(x[2:], mask[2:])
    mean, var = F.mean_and_var(parts)
    close(mean.float(), x[mask].mean())
    close(var.float(), x[mask].double().var().float())
    white = ((x - mean) / var.sqrt()).float().masked_fill(~mask, 0)
    close(F.masked_whiten(x, mask), white, rtol=1e-5, atol=1e-5)


def test_whitening_one_single_token_is_finite():
    assert F.masked_whiten(torch.tensor([[3.0]]), ones(1, 1)).item() == 0


# ------------------------------------------------------------------------------------------------------------ GAE


def test_gae_discounts_a_terminal_reward_by_lambda():
    rewards, values = torch.tensor([[0.0, 0, 0, 1]]), torch.zeros(1, 4)
    advantages, returns = F.gae(rewards, values, ones(1, 4), gamma=1.0, lam=0.95)
    close(advantages, torch.tensor([[0.857375, 0.9025, 0.95, 1.0]]))
    close(returns, advantages)


def test_gae_with_lambda_one_gives_monte_carlo_returns_for_any_values():
    rewards, values = torch.tensor([[0.0, 0, 0, 1]]).expand(8, 4), torch.randn(8, 4)
    _, returns = F.gae(rewards, values, ones(8, 4), gamma=1.0, lam=1.0)
    close(returns, torch.ones(8, 4), rtol=1e-5, atol=1e-5)


def test_gae_with_lambda_zero_is_the_temporal_difference():
    rewards, values = torch.tensor([[0.0, 0, 0, 1]]), torch.tensor([[0.3, -0.2, 0.5, 0.1]])
    advantages, _ = F.gae(rewards, values, ones(1, 4), gamma=1.0, lam=0.0)
    close(advantages, torch.tensor([[-0.5, 0.7, -0.4, 0.9]]))


def test_gae_discounted_published_case():
    rewards = values = torch.tensor([[0.0, 0, 0, 1]])
    _, returns = F.gae(rewards, values, ones(1, 4), gamma=0.9, lam=0.95)
    close(returns, torch.tensor([[0.657922, 0.7695, 0.9, 1.0]]))


def test_gae_is_blind_to_padding():
    rewards, values = torch.randn(3, 6), torch.randn(3, 6)
    mask = torch.arange(6) < torch.tensor([[2], [6], [1]])
    clean = F.gae(rewards, values, mask)
    dirty = F.gae(rewards.masked_fill(~mask, 99.0), values.masked_fill(~mask, float("nan")), mask)
    for a, b in zip(clean, dirty, strict=True):
        close(a, b)
        assert (a[~mask] == 0).all()
    alone, _ = F.gae(rewards[:1, :2], values[:1, :2], ones(1, 2))
    close(clean[0][:1, :2], alone)


# ------------------------------------------------------------------------------------------------------------- KL


def test_kl_estimates_of_the_published_case():
    logp = torch.tensor([[0.5, 0.2, 0.1], [0.6, 0.2, 0.1]])
    ref = torch.tensor([[0.4, 0.3, 0.0], [0.7, 0.1, 0.3]])
    kl = F.kl_estimates(logp, ref)
    close(kl.k1, torch.tensor([[0.1, -0.1, 0.1], [-0.1, 0.1, -0.2]]))
    close(kl.k2, torch.tensor([[0.005, 0.005, 0.005], [0.005, 0.005, 0.02]]))


def test_exact_kl_of_the_published_cases():
    p = torch.tensor([[0.98, 0.01, 0.01], [0.49, 0.02, 0.49]])
    q = torch.tensor([[0.01, 0.01, 0.98], [0.01, 0.98, 0.01]])
    close(F.exact_kl(p.log(), q.log()), torch.tensor([4.4474, 3.7361]), **PRINTED)
    close(F.exact_kl(p.log() + 5, q.log() - 3), F.exact_kl(p.log(), q.log()))  # logits need no normalisation


P = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
UNIFORM = torch.full((4,), 0.25, dtype=torch.float64)


def test_expectation_and_spread_of_each_estimator():
    kl = F.kl_estimates(P.log(), UNIFORM.log())
    means = [float((P * k).sum()) for k in kl]
    spreads = [math.sqrt(float((P * (k - (P * k).sum()) ** 2).sum())) for k in kl]
    close(torch.tensor(means), torch.tensor([0.244174, 0.209427, 0.244174]), rtol=0, atol=1e-6)
    close(torch.tensor(spreads), torch.tensor([0.599, 0.267, 0.498]), rtol=0, atol=6e-4)
    close(F.exact_kl(P.log(), UNIFORM.log()), torch.tensor(0.244174), rtol=0, atol=1e-6)


def test_gradient_of_each_estimator_used_as_a_loss():
    """Sampling is from a frozen copy of p: k1 has no gradient, k2 that of the reverse KL, k3 that of the forward KL."""
    true = [0.224486, -0.018556, -0.113250, -0.092681]
    for name, expected in {"k1": [0.0] * 4, "k2": true, "k3": [0.25, 0.05, -0.1, -0.2]}.items():
        logits = P.log().requires_grad_()
        estimate = getattr(F.kl_estimates(logits.log_softmax(-1), UNIFORM.log()), name)
        (gradient,) = torch.autograd.grad((P * estimate).sum(), logits)
        close(gradient, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    logits = P.log().float().requires_grad_()
    (gradient,) = torch.autograd.grad(F.exact_kl(logits, UNIFORM.log()), logits)
    close(gradient, torch.tensor(true), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kl", "factor"), [(0, 0.99488), (6, 1.0), (7, 1.0042667), (12, 1.00512)])
def test_adaptive_kl(kl, factor):
    controller = F.AdaptiveKL(0.2, target=6.0, horizon=10_000)
    assert controller.update(kl, n=256) == pytest.approx(0.2 * factor, abs=1e-7)


def test_fixed_kl_stays_and_nonsense_is_refused():
    assert F.AdaptiveKL(0.05).update(100.0, 256) == 0.05
    with pytest.raises(ValueError, match="must be positive"):
        F.AdaptiveKL(0.1, target=-1.0)


# ------------------------------------------------------------------------------------------------------ rewards


def test_reward_is_kl_everywhere_and_score_at_the_last_real_token():
    d = torch.tensor([[-0.1], [-0.2], [-0.3]]).expand(3, 4)
    rewards = F.get_rewards(torch.tensor([1.0, 2.0, 3.0]), d, torch.zeros(3, 4), ones(3, 4), kl_coef=0.5)
    close(rewards[:, -1], torch.tensor([1.05, 2.1, 3.15]))
    close(rewards[:, 0], torch.tensor([0.05, 0.1, 0.15]))
    mask = torch.arange(4) < torch.tensor([[1], [4], [2]])
    rewards = F.get_rewards(torch.tensor([1.0, 2.0, 3.0]), d, torch.zeros(3, 4), mask, kl_coef=0.5)
    close(rewards, torch.tensor([[1.05, 0, 0, 0], [0.1, 0.1, 0.1, 2.1], [0.15, 3.15, 0, 0]]))
    with pytest.raises(ValueError, match="without a single real token"):
        F.get_rewards(torch.ones(1), d[:1], d[:1], torch.zeros(1, 4, dtype=torch.bool), 0.5)


def test_group_advantages():
    r = torch.tensor([1.0, 2.0, 5.0, 8.0])
    close(F.rloo_advantages(r, 4), torch.tensor([-4.0, -2.6667, 1.3333, 5.3333]), **PRINTED)
    two = torch.cat([r, r + 100])
    close(F.grpo_advantages(two, 4)[:4], (r - 4) / (r.std() + 1e-4))
    close(F.grpo_advantages(two, 4)[4:], F.grpo_advantages(r, 4), rtol=1e-4, atol=1e-4)
    close(F.grpo_advantages(torch.ones(4), 4), torch.zeros(4))
    close(F.best_of_n_advantages(two, 4), torch.tensor([0.0, 0, 0, 1, 0, 0, 0, 1]))
    with pytest.raises(ValueError, match="groups of 3"):
        F.rloo_advantages(r, 3)


# ------------------------------------------------------------------------------------------------------- losses


def test_policy_loss_clips_from_above_only_where_it_should():
    def loss(log_ratio, advantage, **options):
        x = torch.tensor([[float(log_ratio)]])
        return F.ppo_policy_loss(x, torch.zeros(1, 1), torch.full((1, 1), float(advantage)), ones(1, 1), **options)

    close(loss(1, 1)[0], -1.2)
    close(loss(-1, 1)[0], -math.exp(-1))
    close(loss(1, -1)[0], math.e)
    close(loss(-1, -1)[0], 0.8)
    close(loss(1, 1, clip_high=0.28)[0], -1.28)
    close(loss(2, -1)[0], 3.0)  # dual clip
    close(loss(2, -1, dual_clip=None)[0], math.e**2)
    close(loss(1000, -1, dual_clip=None)[0], math.exp(20.0))  # the log-ratio is clamped
    assert [float(loss(x, a)[1]) for x, a in ((1, 1), (-1, 1), (1, -1), (-1, -1))] == [1, 0, 0, 1]


def test_gradient_at_ratio_one_is_reinforce():
    logits = torch.tensor([1.0, 2.0, 1.0, 1.0], requires_grad=True)
    logp = logits.log_softmax(-1)[1].view(1, 1)
    loss, _ = F.ppo_policy_loss(logp, logp.detach(), torch.ones(1, 1), ones(1, 1))
    (gradient,) = torch.autograd.grad(-loss, logits)
    close(gradient, torch.tensor([-0.1749, 0.5246, -0.1749, -0.1749]), **PRINTED)


def test_gradient_vanishes_where_a_clip_is_active():
    for log_ratio, advantage, alive in ((0.5, 1, False), (-0.5, -1, False), (-0.5, 1, True), (2.0, -1, False)):
        x = torch.full((1, 1), log_ratio, requires_grad=True)
        loss, _ = F.ppo_policy_loss(x, torch.zeros(1, 1), torch.full((1, 1), float(advantage)), ones(1, 1))
        (gradient,) = torch.autograd.grad(loss, x)
        assert bool(gradient.abs() > 0) is alive, (log_ratio, advantage)


def test_value_loss_by_hand():
    values, old, returns = torch.tensor([[1.0, 0.1]]), torch.zeros(1, 2), torch.tensor([[2.0, 0.1]])
    loss, clipped = F.ppo_value_loss(values, old, returns, ones(1, 2), clip=0.2)
    close(loss, 0.5 * (1.8**2 + 0.0) / 2)
    close(clipped, 0.5)


def test_losses_of_parts_add_up_and_ignore_padding():
    logp, old, adv = torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 5)
    mask = torch.arange(5) < torch.tensor([[1], [5], [2], [3]])
    whole, _ = F.ppo_policy_loss(logp, old, adv, mask)
    parts = sum(F.ppo_policy_loss(logp[r], old[r], adv[r], mask[r], tokens=mask.sum())[0] for r in ([0, 1], [2], [3]))
    close(parts, whole)
    dirty = [x.masked_fill(~mask, float("nan")) for x in (logp, old, adv)]
    close(F.ppo_policy_loss(*dirty, mask)[0], whole)
    whole, _ = F.ppo_value_loss(logp, old, adv, mask)
    parts = sum(F.ppo_value_loss(logp[r], old[r], adv[r], mask[r], tokens=mask.sum())[0] for r in ([0, 1], [2], [3]))
    close(parts, whole)


# -------------------------------------------------------------------------------------------------------- frontier


def test_best_of_n_kl():
    expected = {2: 0.193, 4: 0.636, 8: 1.204, 16: 1.835, 64: 3.175}
    for n, kl in expected.items():
        assert F.best_of_n_kl(n) == pytest.approx(kl, abs=6e-4)


def test_frontier_of_gaussian_rewards_follows_sigma_sqrt_two_kl():
    """For rewards ~ N(0, sigma^2) the optimum gains sigma^2 / beta at KL = (sigma / beta)^2 / 2."""
    rewards = 2.0 * torch.randn(4000, 256)
    for beta in (8.0, 4.0, 2.5):  # KL .03, .125, .32: there 256 samples are within 3 %
        kl, gain = F.frontier_point(rewards, beta)
        assert gain == pytest.approx(4.0 / beta, rel=0.03)
        assert kl == pytest.approx((2.0 / beta) ** 2 / 2, rel=0.05)


def test_bandit_optimum():
    """Reweighting by exp(r / beta) gives the optimum of reward - beta * KL: four arms, uniform reference."""
    rewards = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    for beta, kl_best, j_best in ((0.5, 0.9309, 1.3794), (1.0, 0.4388, 1.0539), (2.0, 0.1412, 0.8021)):
        kl, reward = F.frontier_point(rewards, beta)
        assert kl == pytest.approx(kl_best, abs=6e-5)
        assert reward - beta * kl == pytest.approx(j_best, abs=6e-5)


# -------------------------------------------------------------------------------------------------------------- DPO


def test_dpo_loss_and_gradient_are_those_of_the_paper():
    """Rafailov et al. 2023: equation 7, and its gradient -beta * sigmoid(-margin) * (d chosen - d rejected); TRL's
    `sigmoid` loss is the same mean over pairs. A response may be the preferred one in either place."""
    ratios = torch.tensor([0.3, -0.5, -2.0, 1.0, 0.1, 0.1], requires_grad=True)
    chosen, rejected, beta = ratios[[0, 3, 4]], ratios[[1, 2, 5]], 0.7
    loss, right = F.dpo_loss(ratios, torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]), beta)
    paper = -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()
    close(loss, paper)
    (ours,) = torch.autograd.grad(loss, ratios)
    (theirs,) = torch.autograd.grad(paper, ratios)
    close(ours, theirs)
    slope = -beta * torch.sigmoid(-beta * (chosen - rejected)) / 3
    close(ours[[0, 3, 4]], slope)
    close(ours[[1, 2, 5]], -slope)
    assert float(right) == pytest.approx(2 / 3)  # a tie is no order
    halves = sum(F.dpo_loss(ratios[i : i + 2], torch.tensor([0.2, 0.8]), beta, pairs=3)[0] for i in (0, 2, 4))
    close(halves, F.dpo_loss(ratios, torch.tensor([0.2, 0.8] * 3), beta)[0])


def test_preferences_are_those_of_bradley_and_terry():
    close(F.preferences(torch.tensor([1.0, 3.0, 2.0, 2.0])), [1 / (1 + math.e**2), 1 / (1 + math.e**-2), 0.5, 0.5])


def test_dpo_of_all_pairs_has_its_least_loss_at_the_closed_form():
    """Nine arms: pi ~ reference * exp(reward / beta), of every pair at once, whatever the reference."""
    beta, rewards, reference = 0.5, torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    pairs = torch.combinations(torch.arange(9)).flatten()
    told, policy = F.preferences(rewards[pairs]), reference.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [policy], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-15
    )

    def closure():
        optimizer.zero_grad()
        loss, _ = F.dpo_loss((policy.log_softmax(0) - reference.log_softmax(0))[pairs], told, beta)
        loss.backward()
        return loss

    optimizer.step(closure)
    best = (reference.log_softmax(0) + rewards / beta).softmax(0)
    torch.testing.assert_close(policy.detach().softmax(0), best, rtol=0, atol=1e-6)
