"""Mixture of experts against closed forms, brute force, invariants, and the routers of the reference."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersTop1Router,
    router_z_loss_func,
)

from vqa_scratch.errors import UserError
from vqa_scratch.models import Llama, LlamaConfig
from vqa_scratch.models.llama_experts import Mixture
from vqa_scratch.nn.experts import (
    Choice,
    MixtureOfExperts,
    Router,
    Routing,
    SharedExpert,
    balance_loss,
    dispatch,
    loads,
    move_biases,
    routings,
    softmax,
    z_loss,
)
from vqa_scratch.nn.gated import GatedMLP
from vqa_scratch.nn.layers import MLP
from vqa_scratch.study import trace
from vqa_scratch.training.recompute import recompute_blocks

no_grad = torch.no_grad()
DIM, HIDDEN = 12, 10
ROUNDING = 2e-6  # fp32, sums of some ten products of size 1


def mixture(experts=5, per_token=2, *, shared=False, plain=False, biased=False, **choice) -> MixtureOfExperts:
    """With weights of size 1 / sqrt(inputs), so that states, scores and outputs are of size 1."""

    def mlp(_=0) -> nn.Module:
        return MLP(DIM, HIDDEN, F.gelu) if plain else GatedMLP(DIM, HIDDEN, F.silu)

    router = Router(DIM, Choice(experts, per_token, **choice), biased=biased)
    made = MixtureOfExperts(router, map(mlp, range(experts)), SharedExpert(DIM, mlp()) if shared else None)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=DIM**-0.5)
    nn.init.normal_(router.gate.weight)
    return made


def states(rows=3, tokens=7) -> torch.Tensor:
    return torch.randn(rows, tokens, DIM)


def written_out(model: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """Every expert of every token, times a weight that is 0 for those not chosen."""
    scores = model.router.choice.score(x @ model.router.gate.weight.t())
    kept = scores * (scores >= scores.topk(model.router.choice.per_token).values[..., -1:])
    if model.router.choice.renormalise:
        kept = kept / kept.sum(-1, keepdim=True)
    total = sum(kept[..., i, None] * expert(x) for i, expert in enumerate(model.experts.values()))
    return total if model.shared is None else total + torch.sigmoid(model.shared.share(x)) * model.shared.mlp(x)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("kind", [{}, {"shared": True}, {"plain": True}, {"score": torch.sigmoid}])
@pytest.mark.parametrize("per_token", [1, 2, 5])
def test_outputs_and_gradients_are_those_of_all_experts_weighed(per_token, kind, renormalise):
    """With k = E this is the mixture of all by the softmax."""
    model, x = mixture(per_token=per_token, renormalise=renormalise, **kind), states().requires_grad_()
    towards, given = torch.randn(x.shape), (x, *model.parameters())
    wanted = written_out(model, x)
    found = model(x)
    assert (found - wanted).abs().max() < ROUNDING * wanted.abs().max()
    wanted_by, found_by = (torch.autograd.grad(out, given, towards, allow_unused=True) for out in (wanted, found))
    for ours, theirs in zip(found_by, wanted_by, strict=True):
        assert ours is not None, "an expert that no token chose has a gradient too, of 0"
        assert (ours - theirs).abs().max() < 10 * ROUNDING * max(1.0, float(theirs.abs().max()))


@no_grad
def test_one_expert_is_an_mlp_and_so_are_equal_ones():
    x = states()
    one = mixture(1, 1, renormalise=True)
    assert (one(x) - one.experts["0"](x)).abs().max() < ROUNDING
    alike = mixture(4, 3, renormalise=True)
    for expert in alike.experts.values():
        expert.load_state_dict(alike.experts["0"].state_dict())
    assert (alike(x) - alike.experts["0"](x)).abs().max() < ROUNDING


@no_grad
def test_permuted_tokens_and_experts():
    model, x = mixture(renormalise=True), states()
    out, order = model(x), torch.randperm(21)
    permuted = model(x.flatten(0, 1)[order].view(x.shape))
    assert (permuted.flatten(0, 1) - out.flatten(0, 1)[order]).abs().max() < ROUNDING
    other, order = mixture(renormalise=True), torch.randperm(5).tolist()
    for place, number in enumerate(order):
        other.experts[str(place)] = model.experts[str(number)]
    other.router.gate.weight.copy_(model.router.gate.weight[order])
    assert (other(x) - out).abs().max() < ROUNDING


@no_grad
def test_a_token_does_not_depend_on_its_neighbours():
    """What experts say is summed in the order of the token's own weights: with equal addends, the bits are equal."""
    experts = [lambda own, factor=factor: own * factor for factor in torch.randn(6).tolist()]
    x, router = torch.randn(40, DIM), Router(DIM, Choice(6, 4))
    nn.init.normal_(router.gate.weight)
    routing = router(x)
    whole = dispatch(x, routing, experts)
    for order in (torch.arange(39, -1, -1), torch.randperm(40), torch.arange(17, 20)):
        assert torch.equal(dispatch(x[order], Routing(*(part[order] for part in routing)), experts), whole[order])


@no_grad
@pytest.mark.parametrize("shared", [False, True])
def test_padding_is_not_routed(shared):
    model, x = mixture(shared=shared), states()
    real = torch.rand(3, 7) < 0.6
    seen = []
    for expert in model.experts.values():
        expert.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    with routings(model) as (found):
        out = model(x, real)
    assert sum(seen) == 2 * int(real.sum()) == int(found[0].load.sum()) and torch.equal(found[0].real, real)
    assert (out - model(x))[real].abs().max() < ROUNDING
    rest = torch.zeros(DIM) if model.shared is None else model.shared(x)[~real]
    assert torch.equal(out[~real], rest.expand(int((~real).sum()), -1))
    changed = torch.where(real[..., None], x, torch.randn(x.shape))
    assert torch.equal(model(changed, real)[real], out[real])
    nothing = model(x, torch.zeros_like(real))
    assert torch.equal(nothing, torch.zeros_like(x) if model.shared is None else model.shared(x))


# ---------------------------------------------------------------------------------------------------- routers


@no_grad
@pytest.mark.parametrize("kept", [1, 2, 4])
def test_the_router_of_deepseek_v3(kept):
    config = {"num_experts_per_tok": 3, "num_local_experts": 16, "hidden_size": DIM, "routed_scaling_factor": 2.5}
    theirs = DeepseekV3TopkRouter(SimpleNamespace(**config, n_group=4, topk_group=kept, norm_topk_prob=True))
    theirs.weight.normal_(), theirs.e_score_correction_bias.normal_(std=0.3)
    choice = Choice(16, 3, True, torch.sigmoid, groups=4, groups_kept=kept, scale=2.5)
    ours = Router(DIM, choice, biased=True)
    ours.gate.weight.copy_(theirs.weight), ours.bias.copy_(theirs.e_score_correction_bias)
    x = torch.randn(300, DIM)
    (_, weights, chosen), routing = theirs(x), ours(x)
    (chosen, order), (found, own) = chosen.sort(), routing.chosen.sort()  # theirs come in any order
    assert torch.equal(found, chosen)
    assert (routing.weights.gather(1, own) - weights.gather(1, order)).abs().max() < ROUNDING
    assert (ours(x, None).chosen != Router.forward(plain_copy(ours), x).chosen).any(), "the bias should choose"


def plain_copy(router: Router) -> Router:
    """Without the bias."""
    copy = Router(DIM, router.choice)
    copy.gate.weight.copy_(router.gate.weight)
    return copy


@no_grad
@pytest.mark.parametrize("per_token", [1, 2])
def test_the_router_of_llama_4(per_token):
    theirs = Llama4Router(SimpleNamespace(hidden_size=DIM, num_local_experts=6, num_experts_per_tok=per_token))
    ours = Router(DIM, Choice(6, per_token, score=torch.sigmoid))
    ours.gate.weight.copy_(theirs.weight)
    x = torch.randn(100, DIM)
    scores, logits = theirs(x)
    routing = ours(x)
    spread = torch.zeros_like(scores).scatter(1, routing.chosen, routing.weights)
    assert (spread - scores).abs().max() < ROUNDING and (routing.logits - logits).abs().max() < ROUNDING


@no_grad
def test_the_router_of_switch():
    config = {"num_experts": 6, "expert_capacity": 100, "hidden_size": DIM, "router_bias": False}
    config |= {"router_jitter_noise": 0.0, "router_ignore_padding_tokens": False, "router_dtype": "float32"}
    theirs, ours = SwitchTransformersTop1Router(SimpleNamespace(**config)), Router(DIM, Choice(6, 1))
    ours.gate.weight.copy_(theirs.classifier.weight)
    x = states(2, 50)
    (one_hot, probability, logits), routing = theirs(x), ours(x)
    assert torch.equal(routing.chosen, one_hot.argmax(-1, keepdim=True))
    assert (routing.weights - probability).abs().max() < ROUNDING
    assert abs(float(z_loss([routing]) - router_z_loss_func(logits))) < 1e-5


@no_grad
def test_a_bias_chooses_and_does_not_weigh():
    model, x = mixture(per_token=1, biased=True), states()
    scores = torch.softmax(x @ model.router.gate.weight.t(), -1)
    model.router.bias[3] = 100.0
    routing = model.router(x)
    assert (routing.chosen == 3).all() and (routing.weights[..., 0] - scores[..., 3]).abs().max() < ROUNDING


@no_grad
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_router_computes_in_fp32(dtype):
    model, x = mixture().eval(), states()
    exact = model.router(x)
    with torch.autocast("cpu", dtype):
        routing, out = model.router(x), model(x)
    assert routing.logits.dtype == torch.float32 and torch.equal(routing.logits, exact.logits) and out.dtype == dtype
    low = model.to(dtype)
    routing = low.router(x.to(dtype))
    assert routing.weights.dtype == torch.float32 and low(x.to(dtype)).dtype == dtype
    assert torch.equal(routing.logits, F.linear(x.to(dtype).float(), low.router.gate.weight.float()))


# ----------------------------------------------------------------------------------------- spreading tokens


def decided(logits: torch.Tensor, per_token: int, score) -> Routing:
    scores = score(logits)
    chosen, weights = Choice(logits.shape[-1], per_token)(scores, None)
    return Routing(logits, scores, chosen, weights)


@pytest.mark.parametrize("score", [softmax, torch.sigmoid])
@pytest.mark.parametrize(("experts", "per_token"), [(4, 1), (4, 2), (8, 2)])
def test_balance_loss_of_balanced_and_collapsed_routers(experts, per_token, score):
    """k where tokens spread evenly, E where all choose the same k; the mean over layers, not that of pooled layers."""
    one_hot = torch.eye(experts).repeat(3, 1)
    spread = decided(sum(one_hot.roll(i, 1) for i in range(per_token)) * 100 - 50.0, per_token, score)
    assert torch.equal(spread.load, torch.full((experts,), 3 * per_token))
    assert abs(float(balance_loss([spread])) - per_token) < 1e-5
    first = torch.full((12, experts), -50.0)
    first[:, :per_token] = 50.0
    collapsed = [decided(first, per_token, score), decided(first.flip(1), per_token, score)]
    assert abs(float(balance_loss(collapsed)) - experts) < 1e-5
    if experts == 2 * per_token:  # two layers that complement each other: pooled, they look balanced
        pooled = load_balancing_loss_func((first, first.flip(1)), experts, per_token)
        assert abs(float(pooled) - per_token) < 1e-5


def test_balance_and_z_loss_are_those_of_the_reference_and_of_the_definition():
    model, x = mixture(6, 2), states(4, 9)
    real = torch.rand(4, 9) < 0.7
    with routings(model) as found:
        model(x, real), model(x.flip(0), real)
    logits = [routing.logits.flatten(0, 1) for routing in found]
    theirs = [load_balancing_loss_func((one,), 6, 2, real) for one in logits]
    assert abs(float((balance_loss(found) - sum(theirs) / 2).detach())) < 1e-5
    pooled = Routing(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    difference = balance_loss([pooled]) - load_balancing_loss_func(tuple(logits), 6, 2, real)
    assert abs(float(difference.detach())) < 1e-5
    zs = [one.detach()[real.flatten()].double().exp().sum(1).log().square().mean() for one in logits]
    assert abs(float((z_loss(found) - sum(zs) / 2).detach())) < 1e-5
    assert torch.equal(loads(found).sum(1), torch.full((2,), 2 * int(real.sum())))


@pytest.mark.parametrize("loss", [balance_loss, z_loss])
@pytest.mark.parametrize("score", [torch.sigmoid, softmax])
def test_gradients_of_the_losses(loss, score):
    """By differences, f of the balance loss held fixed as its definition says."""
    logits = torch.randn(2, 8, 5, dtype=torch.float64, requires_grad=True)
    chosen, weights = Choice(5, 2)(score(logits), None)
    chosen = chosen.masked_fill(torch.arange(8)[:, None] < 2, 5)  # the first two tokens are padding
    assert torch.autograd.gradcheck(lambda free: loss([Routing(free, score(free), chosen, weights)]), logits)


def test_experts_without_a_token_have_gradients_too():
    """Of 0: ranks wait for the gradient of each parameter."""
    model = mixture(per_token=1, shared=True, biased=True)
    model.router.bias[3] = 100.0
    model(states()).sum().backward()
    for name, parameter in model.named_parameters():
        idle = name.startswith("experts.") and not name.startswith("experts.3.")
        assert (parameter.grad == 0).all() if idle else (parameter.grad != 0).any(), name


@no_grad
def test_no_token_is_no_loss():
    model = mixture()
    with routings(model) as found:
        model(states(), torch.zeros(3, 7, dtype=torch.bool))
    assert balance_loss(found).item() == z_loss(found).item() == 0.0


def test_biases_balance_the_loads():
    """Once a step, with the loads of both parts; the mean stays 0, the loads become even, the weights stay."""
    model, x = mixture(4, 1, biased=True), states(8, 50)
    assert list(dict(model.named_buffers())) == ["router.bias"] and "router.bias" in model.state_dict()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with routings(model) as found:
        model(x[:3]), model(x[3:])
    parts = [loads([one]) for one in found]
    move_biases(model, parts[0] + parts[1], rate=0.5)
    (total,) = loads([model_routing(mixture_like(model), x)])
    signs = (total.float().mean() - total).sign() * 0.5
    assert torch.allclose(model.router.bias, signs - signs.mean())
    uneven = float(total.max() / total.float().mean())
    for _ in range(200):
        move_biases(model, loads([model_routing(model, x)]), rate=0.01)
    total = model_routing(model, x).load
    assert abs(float(model.router.bias.mean())) < 1e-6 and model.router.bias.dtype == torch.float32
    assert float(total.max() / total.float().mean()) < 1.1 < uneven
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    with pytest.raises(ValueError, match="biases are those of a Router"):
        move_biases(mixture(), torch.ones(1, 5))


def model_routing(model: MixtureOfExperts, x: torch.Tensor) -> Routing:
    with torch.no_grad():
        return model.router(x)


def mixture_like(model: MixtureOfExperts) -> MixtureOfExperts:
    """The same router before its bias moved."""
    copy = mixture(4, 1, biased=True)
    copy.router.gate.load_state_dict(model.router.gate.state_dict())
    return copy


def decoder(**changes) -> Llama:
    sizes = {"vocab_size": 30, "dim": 16, "layers": 3, "heads": 2, "hidden": 20, "init_std": 0.3}
    return Llama(LlamaConfig(**sizes, **{"experts": Mixture(4, 2, 8), **changes}))


def test_a_loss_with_the_losses_of_routers():
    """Collected once from each layer, also where blocks are computed again, with the same gradients."""
    model, (ids, mask) = decoder(), (torch.randint(30, (3, 8)), torch.arange(8) >= torch.tensor([[0], [2], [5]]))
    gradients = []
    for _ in range(2):
        model.zero_grad()
        with routings(model) as found:
            loss = model(ids, mask).square().mean()
        (loss + 0.5 * balance_loss(found) + 0.1 * z_loss(found)).backward()
        assert len(found) == 3 and loads(found).shape == (3, 4) and (loads(found).sum(1) == 2 * mask.sum()).all()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        recompute_blocks(model)  # the second time
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))
    with routings(model) as found:
        model(ids, mask)
    balance_loss(found).backward()
    assert sum(float(block.mlp.router.gate.weight.grad.norm()) for block in model.blocks) > 0


# ----------------------------------------------------------------------------------------- taps and bad input


@no_grad
def test_a_trace_reads_and_silences_experts():
    model = decoder(experts=Mixture(4, 2, 8, every=3)).eval()  # experts in the last layer alone
    ids = torch.randint(30, (2, 6))
    with trace(model, "decoder.2.router", "decoder.2.mlp.out") as t:
        logits = model(ids)
    scores, weights = t["decoder.2.router.probabilities"], t["decoder.2.router.weights"]
    assert scores.shape == weights.shape == (2, 6, 4) and ((weights > 0).sum(-1) == 2).all()
    assert (scores.sum(-1) - 1).abs().max() < 1e-6 and (weights.sum(-1) - 1).abs().max() < 1e-6
    silenced = int(weights.sum((0, 1)).argmax())
    experts = model.blocks[2].mlp.experts
    with trace(model, "decoder.2.router.weights", "decoder.2.mlp.out") as changed:
        changed.ablate("decoder.2.router", expert=silenced)
        assert (model(ids) - logits).abs().max() > 1e-3
    kept = changed["decoder.2.router.weights"]
    assert (kept[..., silenced] == 0).all()
    others = [number for number in range(4) if number != silenced]
    assert torch.equal(kept[..., others], weights[..., others])
    state = experts[str(silenced)].state_dict()
    experts[str(silenced)].load_state_dict({name: torch.zeros_like(tensor) for name, tensor in state.items()})
    with trace(model, "decoder.2.mlp.out") as zeroed:
        model(ids)
    assert (zeroed["decoder.2.mlp.out"] - changed["decoder.2.mlp.out"]).abs().max() < ROUNDING
    for name in ("decoder.2.router", "decoder.2.mlp"):
        with trace(model, "decoder.2.mlp.out") as t:
            t.ablate(name)
            model(ids)
        assert (t["decoder.2.mlp.out"] == 0).all()
    with trace(model, record=False) as t:  # a score that is replaced is one that chooses
        t.replace("decoder.2.router.probabilities", lambda scores, call: torch.eye(4)[0] + scores * 0)
        with routings(model) as found:
            model(ids)
        assert (found[0].chosen[..., 0] == 0).all()
        for name, number, said in (
            ("decoder.2.router", 4, "decoder.2.router has experts 0 to 3, not 4"),
            ("decoder.0.mlp", 1, "decoder.0.mlp has no experts; a router has, such as 'decoder.0.router'"),
        ):
            with pytest.raises(UserError, match=said):
                t.ablate(name, expert=number)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((4, 5), "^5 experts a token of 4: must be from 1 to 4$"),
        ((4, 0), "^0 experts a token of 4: must"),
        ((8, 5, False, torch.sigmoid, 4, 2), "^8 experts in 4 groups, 2 of them open: too few for 5 experts a token"),
        ((8, 2, False, torch.sigmoid, 3, 1), "^8 experts in 3 groups, 1 of them open: .* or not groups of at least 2$"),
    ],
)
def test_experts_that_cannot_be_chosen(numbers, said):
    with pytest.raises(UserError, match=said):
        Choice(*numbers)


def test_a_router_without_numbers_says_so():
    model = decoder().eval()
    with torch.no_grad():
        model.blocks[1].mlp.router.gate.weight[2, 3] = torch.nan
    with pytest.raises(UserError, match="^decoder.1.router: its logits are NaN or infinite, so no expert") as caught:
        model(torch.ones(1, 4).long())
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="^a router: its logits are NaN or infinite"):
        mixture()(states() * torch.inf)
    with pytest.raises(ValueError, match="2 experts, but the router chooses among 3"):
        MixtureOfExperts(Router(DIM, Choice(3, 1)), [nn.Identity(), nn.Identity()])
