"""The arithmetic of one decoding step: plain functions of a decoder's weights that are fast for few rows.

The fastest way depends on the dtype, the size of the weight and the number of rows. It is chosen when the function is
made, or at the call if it depends on the rows. There are no gradients.

Shapes: R rows (one token each), D and D' widths, H heads, J heads of keys and values, S = rows times
heads of keys, d head size, T queries, n keys.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.fastest import fastest, timed
from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.decoding import FastBlock, FastMLP
from vqa_scratch.nn.experts import MixtureOfExperts, SharedExpert, dispatch
from vqa_scratch.nn.gated import GatedMLP
from vqa_scratch.nn.layers import MLP
from vqa_scratch.nn.rms_norm import RMSNorm
from vqa_scratch.nn.rotary import Rotation
from vqa_scratch.nn.summing_linear import HAS_ONE_DNN, one_dnn

Function = Callable[[Tensor], Tensor]
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of x (R, D), a weight (D', D) and a bias (D',)
Addition = Callable[[Tensor, Tensor], object]  # adds a function of its second argument to the first, in place
Turning = Callable[[Tensor, Rotation | None], None]

# From 4 to 64 rows oneDNN is faster than MKL: 50,257 x 768 with 4, 8, 12, 16, 32, 64 rows takes 0.83, 0.61, 0.46, 0.88,
# 0.83, 0.86 of the time (torch 2.13 on two cores with AVX-512). With fewer, it depends on the CPU (`in_halves`).
BY_ONE_DNN = range(4, 65)  # rows
LARGE_WEIGHT = 1 << 20  # bytes
CACHES = 1 << 25  # bytes that the caches of a machine hold, or more
FASTEST: dict[tuple[object, ...], Product] = {}  # of the ways to multiply a row or few, as measured


def suits_one_dnn(weight: Tensor) -> bool:
    """Whether oneDNN may be faster for this weight with up to 64 rows, and this torch has it."""
    large = weight.dtype == torch.float32 and weight.nbytes >= LARGE_WEIGHT and weight.device.type == "cpu"
    return large and HAS_ONE_DNN


def by_vector(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One row x (1, D), as a matrix-vector product."""
    return (torch.mv(weight, x[0]) if bias is None else torch.addmv(bias, weight, x[0]))[None]


def in_halves(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As a batch of two products, the first and the second half of what is asked for.

    On an AMD EPYC MKL multiplies one to three rows on one core, and slowly: 50,257 x 768 in fp32 takes 11.5, 26 and 39
    ms, by oneDNN on two cores 5.0, 7.2 and 7.3 ms, and this way 4.3, 4.4 and 5.8 ms.
    """
    half = len(weight) // 2
    # x stays one view for both: copied for each half, it takes a kernel that is seven times as slow.
    parts = torch.bmm(weight[: 2 * half].unflatten(0, (2, half)), x.t().expand(2, -1, -1))  # (2, D' / 2, R)
    y = parts.permute(2, 0, 1).flatten(1)
    if len(weight) % 2:
        y = torch.cat([y, x @ weight[-1:].t()], 1)
    return y if bias is None else y + bias


BF16_ROW = (F.linear, by_vector)  # 50,257 x 768 by the second: 0.4 of the time on an Intel CPU with AMX, 1.3 on an AMD
FP32_ROWS = (F.linear, one_dnn, in_halves)


def few_rows(ways: Sequence[Product], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (R, D) weight^T + bias for up to 3 rows, the way that was fastest when first timed on this CPU.

    It is timed for each size of a weight and number of threads, for one row and for more; with as many weights in turn
    as the caches do not hold, since a step reads all others before it reads one again.
    """
    key = (ways, *weight.shape, len(x) > 1, torch.get_num_threads())
    if key not in FASTEST:
        copies = CACHES // max(weight.nbytes, LARGE_WEIGHT)
        weights = weight.new_ones(copies, *weight.shape) if copies > 1 else weight[None]

        def multiply(way: Product) -> None:
            for one in weights:
                way(x, one, bias)

        multiply(ways[0])  # the first time takes longer
        FASTEST[key] = fastest(ways, lambda way: timed(multiply, way))[0]
    return FASTEST[key](x, weight, bias)


def _by_matrix(weight: Tensor) -> bool:
    """Whether to use torch's own matrix product for this weight."""
    autocast = torch.is_autocast_enabled(weight.device.type)  # it caches its copy of a weight, not of a view
    return not autocast and not (weight.dtype == torch.bfloat16 and weight.device.type == "cpu")


def product(weight: Tensor, bias: Tensor | None) -> Function:
    """x (R, D) -> x weight^T + bias, (R, D')."""
    if torch.is_autocast_enabled(weight.device.type):
        return lambda x: F.linear(x, weight, bias)
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if not _by_matrix(weight):
        return lambda x: few_rows(BF16_ROW, x, weight, bias) if len(x) == 1 else F.linear(x, weight, bias)
    turned = weight.t()
    plain = (lambda x: torch.mm(x, turned)) if bias is None else (lambda x: torch.addmm(bias, x, turned))
    if not suits_one_dnn(weight):
        return plain

    def large(x: Tensor) -> Tensor:
        if len(x) < BY_ONE_DNN.start:
            return few_rows(FP32_ROWS, x, weight, bias)
        return one_dnn(x, weight, bias) if len(x) in BY_ONE_DNN else plain(x)

    return large


def linear(module: nn.Linear) -> Function:
    """(R, D) -> (R, D') through the weights of `module`; quantised ones have a product of their own."""
    return product(module.weight, module.bias) if isinstance(module, nn.Linear) else module.forward


def linear_into(module: nn.Linear) -> Addition:
    """(place, x): the same for one row x (1, D), written to `place` (1, D')."""
    if not isinstance(module, nn.Linear) or not _by_matrix(module.weight) or suits_one_dnn(module.weight):
        apply = linear(module)
        return lambda place, x: place.copy_(apply(x))
    turned = module.weight.detach().t()
    if module.bias is None:
        return lambda place, x: torch.mm(x, turned, out=place)
    bias = module.bias.detach()
    return lambda place, x: torch.addmm(bias, x, turned, out=place)


def adding(weight: Tensor, bias: Tensor | None, factor: Tensor | None = None) -> Addition:
    """A residual connection: x (R, D') += factor * (z (R, D) weight^T + bias); factor (1,) or (D',), None: 1."""
    if factor is None and bias is None and _by_matrix(weight) and not suits_one_dnn(weight):
        turned = weight.detach().t()
        return lambda x, z: x.addmm_(z, turned)
    return _adding(product(weight, bias), factor)


def _adding(apply: Function, factor: Tensor | None) -> Addition:
    return (lambda x, z: x.add_(apply(z))) if factor is None else (lambda x, z: x.add_(apply(z) * factor))


def linear_adding(module: nn.Linear, factor: Tensor | None = None) -> Addition:
    """The same through the weights of `module`, quantised ones too."""
    if isinstance(module, nn.Linear):
        return adding(module.weight, module.bias, factor)
    return _adding(linear(module), factor)


def rms_norm(weight: Tensor, eps: float) -> Function:
    """An RMSNorm in the dtype of its weight by five operations in fp32: torch's own is a dozen on a CPU."""
    exact, least, share = weight.float(), torch.tensor(eps, device=weight.device), 1 / len(weight)

    def apply(x: Tensor) -> Tensor:
        x = x.float()
        size = torch.linalg.vector_norm(x, 2, -1, True)
        scale = torch.addcmul(least, size, size, value=share).rsqrt_()
        return torch.mul(x, scale).mul_(exact).to(weight.dtype)

    return apply


def norm(module: Callable[[Tensor], Tensor]) -> Function:
    """The norm `module`: a LayerNorm or RMSNorm as a plain function, any other unchanged."""
    if isinstance(module, RMSNorm) and not torch.is_autocast_enabled(module.weight.device.type):
        return rms_norm(module.weight.detach(), module.eps)
    if not isinstance(module, nn.LayerNorm):
        return module
    shape, weight, bias, eps = module.normalized_shape, module.weight, module.bias, module.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


def turnings(blocks: list[FastBlock], rotates: bool) -> list[Turning]:
    """What changes and turns queries and keys in each block; empty if nothing is done to them."""
    plain = all(isinstance(block.attn.q_norm, nn.Identity) for block in blocks)
    return [] if plain and not rotates else [turning(block.attn) for block in blocks]


def turning(attn: MultiHeadAttention) -> Turning:
    """What changes the queries, keys and values of a step (R, H + 2 J, d) in place, and turns the first two."""
    before, pieces = (attn.q_norm, attn.k_norm, attn.v_norm), (attn.heads, attn.kv_heads, attn.kv_heads)
    steps = [None if isinstance(module, nn.Identity) else norm(module) for module in before]
    changed, turned = any(steps), attn.heads + attn.kv_heads

    def turn(heads: Tensor, rotation: Rotation | None) -> None:
        if changed:
            for piece, step in zip(heads.transpose(0, 1).split(pieces), steps, strict=True):  # (heads, R, d)
                if step is not None:
                    piece.copy_(step(piece))
        if rotation is not None:
            rotation.in_place(heads[:, :turned])

    return turn


def inner(mlp: MLP | GatedMLP) -> Function:
    """(R, D) -> (R, hidden), what the last layer of an MLP reads."""
    rise, active = linear(mlp.up), mlp.activation
    if isinstance(mlp, MLP):
        return lambda h: active(rise(h))
    gate = linear(mlp.gate)
    return lambda h: active(gate(h)) * rise(h)


def expert(module: nn.Module) -> Function:
    """(R, D) -> (R, D): an expert, which is an MLP, or a shared one times its sigmoid."""
    if isinstance(module, SharedExpert):
        share, shared = linear(module.share), expert(module.mlp)
        return lambda h: torch.sigmoid(share(h)) * shared(h)
    assert isinstance(module, (MLP, GatedMLP)), "a fast step is written for these MLPs"
    before, fall = inner(module), linear(module.down)
    return lambda h: fall(before(h))


def mixture(module: MixtureOfExperts) -> Addition:
    """x (R, D) += mixture(h). Of the experts only those that some row chose are read."""
    experts, router = [expert(own) for own in module.experts.values()], module.router
    shared = None if module.shared is None else expert(module.shared)

    def add(x: Tensor, h: Tensor) -> None:
        routing = router(h)
        if len(h) > 1:
            x.add_(dispatch(h, routing, experts))
        else:
            for number, weight in zip(routing.chosen[0].tolist(), routing.weights[0].tolist(), strict=True):
                x.add_(experts[number](h), alpha=weight)
        if shared is not None:
            x.add_(shared(h))

    return add


def feed_forward(mlp: FastMLP) -> Callable[[Tensor], object]:
    """x (R, D) += what the MLP says of its norm, times its factor."""
    before, module = norm(mlp.norm), mlp.module
    if isinstance(module, MixtureOfExperts):
        assert mlp.factor is None, "a fast step has no factor of experts"
        add = mixture(module)
        return lambda x: add(x, before(x))
    assert isinstance(module, (MLP, GatedMLP)), "a fast step is written for these MLPs"
    hidden, fall = inner(module), linear_adding(module.down, mlp.factor)
    return lambda x: fall(x, hidden(before(x)))


def attend(q: Tensor, keys: Tensor, v: Tensor, bias: Tensor | None, scale: float = 1.0) -> Tensor:
    """Attention of queries q (S, T, d) to keys (S, d, n) and values (S, n, d); no query may be fully masked.

    bias, broadcastable to (S, T, n), is added to the scaled scores. For few queries plain products take a third of the
    fused operator's set-up time; in half precision the fused one is more exact, and on a GPU it is faster.
    """
    if q.is_cuda or q.dtype in (torch.float16, torch.bfloat16):
        mask = None if bias is None else bias[None]
        k = keys.transpose(1, 2)
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale)[0]
    if bias is not None:
        scores = torch.baddbmm(bias, q, keys, alpha=scale)
    elif scale != 1.0:  # beta 0: the first argument only has to fit
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, keys, beta=0, alpha=scale)
    else:
        scores = torch.bmm(q, keys)
    return torch.bmm(torch.softmax(scores, -1), v)
