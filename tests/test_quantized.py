"""Formats against their formulas, products against unpacked weights, and every decoding state against the modules."""

import math

import pytest
import torch
from torch import nn

from vqa_scratch.errors import UserError
from vqa_scratch.generate import GenerationOptions, begin, generate, rank
from vqa_scratch.generate.fast import FastState, cross_attention
from vqa_scratch.models import (
    GPT2,
    OPT,
    T5,
    GPT2Config,
    Llama,
    LlamaConfig,
    Llava,
    LlavaConfig,
    OPTConfig,
    T5Config,
    ViTConfig,
)
from vqa_scratch.models.llama_experts import Mixture
from vqa_scratch.nn import quantized, taps
from vqa_scratch.nn.connecting import Conditioning
from vqa_scratch.nn.gated_cross import flamingo_layer
from vqa_scratch.nn.gptq import gptq, recorded, relative_error
from vqa_scratch.nn.memory import Memory
from vqa_scratch.nn.quantized import (
    FORMATS,
    NORMAL_FLOATS,
    Codes,
    QuantizedLinear,
    matrices,
    pack,
    quantize,
    take,
    unpack,
)

PRODUCTS = [name for name, kind in FORMATS.items() if kind.multiplies]
WIDE = {"int8": 96, "int4": 96, "int4-g64": 128, "int4-g128": 256, "int4-g256": 512, "nf4": 128}  # inputs


def weights(name: str, rows: int = 48) -> torch.Tensor:
    return torch.randn(rows, WIDE[name]) * torch.rand(rows, 1)


# ------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_moves_by_half_a_step_at_most(name):
    kind, matrix = FORMATS[name], weights(name)
    stored = kind.quantize(matrix)
    back, scale = kind.dequantize(stored), stored.grid[0].float()
    step = scale.repeat_interleave(matrix.shape[1] // scale.shape[1], 1)
    if name == "nf4":  # the widest gap of the table is between -1 and its neighbour; the scale is rounded to 8 bits
        step = step * (NORMAL_FLOATS[1] - NORMAL_FLOATS[0] + 2**-7)
    assert ((back - matrix).abs() <= step / 2 * (1 + 1e-6)).all()
    assert kind.fits(stored) and torch.equal(kind.dequantize(kind.quantize(back)), back)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_on_the_grid_come_back_exactly(name):
    """Built from the formulas: every code of the format, with scales of 8 bits."""
    kind, inputs = FORMATS[name], WIDE[name]
    group = kind.group or inputs
    scale = torch.rand(32, inputs // group).bfloat16().float() + 0.0078125
    scale = scale.bfloat16().float()
    if name == "int8":
        codes = torch.randint(-127, 128, (32, inputs))
        codes[:, 0] = 127
        matrix = codes * scale
    else:
        codes = torch.stack([torch.arange(group) % 16 for _ in range(inputs // group)]).flatten().expand(32, -1)
        spread = scale.repeat_interleave(group, 1)
        zero = (scale * 3).bfloat16().float()
        table = torch.tensor(NORMAL_FLOATS)
        matrix = table[codes] * spread if name == "nf4" else (codes - 8) * spread + zero.repeat_interleave(group, 1)
    assert torch.equal(kind.dequantize(kind.quantize(matrix)), matrix)


def test_a_row_of_zeros_and_one_of_equals():
    for name, kind in FORMATS.items():
        matrix = torch.zeros(16, WIDE[name])
        matrix[1] = 0.5
        back = kind.dequantize(kind.quantize(matrix))
        assert torch.equal(back[0], matrix[0]) and (back[1] - 0.5).abs().max() <= 2**-9, name  # scales of 8 bits


def test_all_sixteen_codes_pack_into_bytes():
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16))  # every byte
    packed = pack(pairs.flatten()[None])
    assert packed.tolist() == [[16 * first + second for first, second in pairs.tolist()]]
    assert torch.equal(unpack(packed), pairs.flatten()[None])


def test_the_table_of_nf4():
    assert list(NORMAL_FLOATS) == sorted(set(NORMAL_FLOATS)) and len(NORMAL_FLOATS) == 16
    assert NORMAL_FLOATS[7] == 0.0 and NORMAL_FLOATS[0] == -1.0 and NORMAL_FLOATS[15] == 1.0


# ------------------------------------------------------------------------------------------------------- products


@torch.no_grad()
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_is_that_of_the_unpacked_weights(name, biased):
    """To the rounding of the sum to bf16, and once more with the bias; with many rows of each weight too, by int4."""
    kind, matrix = FORMATS[name], weights(name)
    bias = torch.randn(len(matrix)).bfloat16().double() if biased else torch.zeros(len(matrix)).double()
    stored = kind.quantize(matrix)
    layer, exact = QuantizedLinear(kind, stored, bias if biased else None), kind.dequantize(stored).double()
    for rows in (0, 1, 3, 40, 2 * WIDE[name] + 1):
        x = torch.randn(rows, matrix.shape[1]).bfloat16()
        product = x.double() @ exact.t()
        inside = (x.double().abs() @ exact.abs().t()) / math.sqrt(matrix.shape[1])  # values are rounded to bf16 too
        error = (layer(x).double() - product - bias).abs()
        inside *= 3 if rows > 40 else 1  # 0.45 of it is a standard error of the weights' rounding
        assert (error <= 2**-8 * (inside + product.abs() + (product + bias).abs())).all()
        assert layer(x[None]).shape == (1, rows, len(matrix))


@torch.no_grad()
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("rows", [1, 7])
def test_any_address_will_do(name, rows):
    """Codes of a mapped file, and states that begin in the middle of one: torch's product crashes on these."""
    kind, matrix, x = FORMATS[name], weights(name), torch.randn(rows, WIDE[name]).bfloat16()

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.new_empty(tensor.numel() + 4)[4:].view(tensor.shape)
        return place.copy_(tensor)

    stored = kind.quantize(matrix)
    elsewhere = Codes(moved(stored.codes), tuple(moved(part) for part in stored.grid))
    expected = QuantizedLinear(kind, stored, None)(x)
    assert torch.equal(QuantizedLinear(kind, elsewhere, None)(moved(x)), expected)


def test_what_has_no_product_says_so():
    layer = QuantizedLinear(FORMATS["int8"], FORMATS["int8"].quantize(weights("int8")), None)
    with pytest.raises(UserError, match="are for bf16 on a CPU .*, not float32 on cpu"):
        layer(torch.randn(1, 96))
    with pytest.raises(UserError, match="not bfloat16 on meta"):
        layer(torch.randn(1, 96, dtype=torch.bfloat16, device="meta"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(1, 96)).dtype == torch.bfloat16
    with pytest.raises(UserError, match="no gradient and cannot be trained"):
        layer(torch.randn(1, 96, dtype=torch.bfloat16, requires_grad=True))
    with pytest.raises(UserError, match="no gradient and cannot be trained"):
        nn.Sequential(layer).train()
    assert not list(layer.parameters()) and layer.eval() is layer
    with pytest.raises(UserError, match="--precision fp32 unpacks them"):
        _ = layer.weight


# ------------------------------------------------------------------------------------------------------- decoders

SIZES = {"dim": 32, "layers": 2, "heads": 4}
READ = ("gpt2", "t5", "gated")  # a memory


def gated() -> Llama:
    model = Llama(LlamaConfig(50, hidden=64, **SIZES))
    model.add_gated({1: flamingo_layer(32, 32, heads=4, head_dim=8)})
    return model


MAKE = {
    "gpt2": lambda: GPT2(GPT2Config(50, 40, **SIZES, add_cross_attention=True)),
    "opt": lambda: OPT(OPTConfig(50, 40, hidden=64, **SIZES)),
    "llama": lambda: Llama(LlamaConfig(50, hidden=64, kv_heads=2, **SIZES)),
    "gated": gated,
    "experts": lambda: Llama(LlamaConfig(50, **SIZES, experts=Mixture(4, 2, 32, shared_hidden=32))),
    "t5": lambda: T5(T5Config(50, 32, 8, 64, encoder_layers=1, decoder_layers=2, heads=4, buckets=8)),
}


class Watcher:
    """A trace that wants nothing: the modules run."""

    def wants(self, name: str) -> bool:
        return False


def uneven(name: str) -> nn.Module:
    torch.manual_seed(3)
    model = MAKE[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    return model


class Exact(nn.Module):
    """A quantised matrix without the rounding of bf16, after which two tokens are often equally likely."""

    def __init__(self, kind, stored, bias) -> None:
        super().__init__()
        self.w, self.b = kind.dequantize(stored).double(), None if bias is None else bias.double()
        self.out_features = len(self.w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.w, self.b)


@torch.no_grad()
@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("name", MAKE)
def test_every_decoding_state_writes_the_same(name, form, monkeypatch):
    """Modules, one row, several rows, beams and the tree of a ranking; a prompt of several tokens and of one."""
    monkeypatch.setattr(quantized, "QuantizedLinear", Exact)
    monkeypatch.setattr(cross_attention, "ABSORB_BYTES", -(10**9))  # as in bf16
    model = uneven(name).double()
    quantize(model, FORMATS[form])
    states, steps = torch.randn(3, 5, 32).double(), []
    monkeypatch.setattr(FastState, "run", lambda self, tokens, run=FastState.run: steps.append(1) or run(self, tokens))

    def written(ids, rows=slice(None), **options):
        given = Conditioning([Memory(states[rows])]) if name in READ else None
        return generate(model, ids[rows], None, given, options=GenerationOptions(6, None, **options)).ids

    for length in (1, 4):
        ids = torch.randint(2, 50, (3, length))
        with taps.activate(Watcher()):
            modules, beams = written(ids), written(ids, num_beams=2)
        assert not steps and len(modules.unique()) > 1
        assert torch.equal(modules, written(ids)) and torch.equal(beams, written(ids, num_beams=2))
        assert torch.equal(modules, torch.cat([written(ids, slice(row, row + 1)) for row in range(3)]))
        assert steps
        steps.clear()
    given = Conditioning([Memory(states)]) if name in READ else None
    ranked = rank(model, ids, None, given, [[3, 4], [3, 5, 6], [7]])
    with taps.activate(Watcher()):
        assert (rank(model, ids, None, given, [[3, 4], [3, 5, 6], [7]]) - ranked).abs().max() < 1e-4  # of norms in fp32


@torch.no_grad()
@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("name", [name for name in MAKE if name != "t5"])  # whose scores are not divided
def test_in_bf16_every_state_gives_the_same_scores(name, form):
    """To some roundings of the largest, of the same tokens step by step."""
    model = uneven(name).bfloat16()
    quantize(model, FORMATS[form])
    ids, tokens = torch.randint(2, 50, (3, 4)), torch.randint(2, 50, (5, 3))
    states = torch.randn(3, 5, 32).bfloat16()

    def scores(rows=slice(None)):
        given = Conditioning([Memory(states[rows])]) if name in READ else None
        first, state = begin(model, ids[rows], None, given, steps=5)
        return torch.stack([first, *(state.step(token[rows]) for token in tokens)]).float()

    with taps.activate(Watcher()):
        modules = scores()
    alone = torch.cat([scores(slice(row, row + 1)) for row in range(3)], 1)
    for fast in (scores(), alone):
        assert (fast - modules).abs().max() <= 2**-4 * modules.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_in_bf16_every_state_writes_the_same(form):
    """A head that makes the token before it in the vocabulary follow each token leaves no doubt."""
    torch.manual_seed(0)
    model = MAKE["llama"]().eval()
    model.tokens.weight.normal_()
    model.lm_head.weight.add_(0.5 * model.tokens.weight.roll(-1, 0))
    model = model.bfloat16()
    quantize(model, FORMATS[form])
    assert [name for name, table in model.named_parameters() if len(table) == 50] == ["tokens.weight"]
    with pytest.raises(UserError, match="quantised here"):
        model.head  # noqa: B018  the copy is all there is
    for length in (1, 4):
        ids, options = torch.randint(10, 50, (3, length)), GenerationOptions(8, None)
        made = generate(model, ids, options=options).ids
        assert torch.equal(made, ids[:, -1:] - 1 - torch.arange(8))
        assert torch.equal(made, torch.cat([generate(model, row[None], options=options).ids for row in ids]))
        with taps.activate(Watcher()):
            assert torch.equal(made, generate(model, ids, options=options).ids)


@torch.no_grad()
def test_inside_autocast_weights_in_fp32_are_as_good():
    """As runs of train.py do it."""
    model = uneven("gpt2")
    quantize(model, FORMATS["int8"])
    ids, given, tokens = (
        torch.randint(2, 50, (2, 4)),
        Conditioning([Memory(torch.randn(2, 5, 32))]),
        torch.randint(2, 50, (2, 2)),
    )

    def scores():
        first, state = begin(model, ids, None, given, steps=2)
        return torch.stack([first, *(state.step(token) for token in tokens)]).float()

    with torch.autocast("cpu", torch.bfloat16):
        fast = scores()
        with taps.activate(Watcher()):
            modules = scores()
    assert (fast - modules).abs().max() <= 2**-4 * modules.abs().max()


MLP = ("gate", "up", "down")


def test_what_is_quantised_and_what_never():
    model = uneven("experts").bfloat16()
    quantize(model, FORMATS["int8"])
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    replaced = {name.split(".", 2)[-1] for name, kind in kinds.items() if kind == "QuantizedLinear"}
    experts = {f"mlp.experts.{e}.{part}" for e in range(4) for part in MLP}
    assert replaced == {"attn.qkv", "attn.out", *experts, *(f"mlp.shared.mlp.{part}" for part in MLP), "lm_head"}
    assert kinds["blocks.0.mlp.router.gate"] == kinds["blocks.0.mlp.shared.share"] == "Linear"
    with pytest.raises(UserError, match="there is nothing to quantise: .* only once"):
        quantize(model, FORMATS["int8"])
    with pytest.raises(UserError, match="there is nothing to quantise: only the weights of a decoder"):
        quantize(nn.Linear(3, 3), FORMATS["int8"])


@torch.no_grad()
def test_of_a_model_that_reads_images_only_the_decoder_is():
    """A LLaVA in bf16, as `ask --model --quantize` opens it."""
    vision = ViTConfig(16, 8, dim=16, layers=2, heads=2, hidden=32, layout="clip_vision_model")
    model = Llava(LlavaConfig(vision, LlamaConfig(50, hidden=64, **SIZES), image_token=7)).bfloat16().eval()
    ids, pixels = torch.tensor([[3, 7, 7, 7, 7, 4]]), torch.randn(1, 3, 16, 16).bfloat16()
    before = model(ids, pixel_values=pixels).float()
    quantize(model, FORMATS["int8"])
    names = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(names) == 2 * 5 + 1 and all(name.startswith("language.") for name in names)
    assert (model(ids, pixel_values=pixels).float() - before).abs().max() < 0.05 * before.abs().max()
    options = GenerationOptions(4, None)
    assert generate(model.language, ids, embeddings=model.embed(ids, pixels), options=options).ids.shape == (1, 4)


def test_the_head_is_a_copy_and_the_embedding_stays():
    """A head that is no embedding is not held twice."""
    torch.manual_seed(3)
    plain = MAKE["gpt2"]().bfloat16().eval()
    table = plain.tokens.weight.clone()
    quantize(plain, FORMATS["int8"])
    assert torch.equal(plain.tokens.weight, table)
    x = torch.randn(2, 32).bfloat16()
    with torch.no_grad():
        kind = FORMATS["int8"]
        should = x.double() @ kind.dequantize(kind.quantize(table)).double().t()
        assert (plain.logits(x).double() - should).abs().max() <= 2**-8 * should.abs().max()
    apart = MAKE["llama"]().bfloat16().eval()
    quantize(apart, FORMATS["int8"])
    assert apart.lm_head is apart.head_copy


@pytest.mark.parametrize(
    ("form", "sizes", "message"),
    [
        ("int4-g64", {}, "int4-g64 has groups of 64 weights, which do not divide the 32 of blocks.0.attn.qkv"),
        ("nf4", {}, "nf4 has groups of 64"),
        ("int8", {"dim": 48}, "the product of int8 needs inputs that 32 divides; blocks.0.attn.qkv has 48 and 144"),
        (
            "int4",
            {"hidden": 72},
            "needs inputs that 32 divides, and outputs that 16 does; blocks.0.mlp.up has 32 and 72",
        ),
    ],
)
def test_matrices_that_do_not_fit_a_format(form, sizes, message):
    model = GPT2(GPT2Config(50, 40, **SIZES | sizes))
    with pytest.raises(UserError, match=message):
        quantize(model, FORMATS[form])
    assert matrices(model)  # nothing was replaced


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value):
    model = MAKE["gpt2"]()
    with torch.no_grad():
        model.blocks[1].mlp.down.weight[3, 4] = value
    with pytest.raises(UserError, match=r"blocks.1.mlp.down in the model holds NaN or infinite numbers"):
        quantize(model, FORMATS["int8"])


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("a.zero"),
        lambda t: t.update({"a.codes": t["a.codes"].char()}),
        lambda t: t.update({"a.codes": t["a.codes"][0]}),
        lambda t: t.update({"a.codes": t["a.codes"][:, :7]}),
        lambda t: t.update({"a.scale": t["a.scale"][:3]}),
        lambda t: t.update({"a.zero": t["a.zero"][:, :1]}),
    ],
)
def test_tensors_of_a_file_that_are_no_matrix(change):
    kind = FORMATS["int4"]
    stored = kind.quantize(weights("int4"))
    tensors = dict(zip(("a.codes", "a.scale", "a.zero"), stored.tensors, strict=True))
    assert take(dict(tensors), kind, "the file").keys() == {"a"}
    change(tensors)
    with pytest.raises(UserError, match="a in the file is no matrix in the format int4"):
        take(tensors, kind, "the file")


# ------------------------------------------------------------------------------------------------------- GPTQ


@torch.no_grad()
@pytest.mark.parametrize("name", FORMATS)
def test_gptq_changes_less_of_what_a_layer_says(name):
    """Against round to nearest, on inputs that it has not seen, whose numbers depend on each other."""
    kind, matrix = FORMATS[name], weights(name)
    mix = torch.randn(matrix.shape[1], 12)
    seen, new = ((torch.randn(600, 12) @ mix.t() + 0.3 * torch.randn(600, matrix.shape[1])) for _ in range(2))
    chosen, nearest = gptq(kind, matrix, seen.t() @ seen), kind.quantize(matrix)
    assert isinstance(chosen, Codes) and kind.fits(chosen)
    said = [new @ (kind.dequantize(stored) - matrix).t() for stored in (chosen, nearest)]
    assert said[0].norm() < 0.7 * said[1].norm()
    by_gram = relative_error(matrix, kind.dequantize(chosen), new.t() @ new)
    assert by_gram == pytest.approx(float(said[0].norm() / (new @ matrix.t()).norm()), rel=1e-3)


def test_gptq_without_a_pattern_rounds_to_the_nearest():
    """Inputs that do not depend on each other leave no error to spread."""
    kind, matrix = FORMATS["int8"], weights("int8")
    assert torch.equal(gptq(kind, matrix, torch.eye(96)).codes, kind.quantize(matrix).codes)
    assert kind.fits(gptq(kind, matrix, torch.zeros(96, 96)))


@torch.no_grad()
def test_recorded_inputs():
    """Those of a gated MLP too, which has a product of its own."""
    model, ids = MAKE["llama"]().eval(), torch.randint(2, 50, (2, 5))
    read = []
    before = {name: id(linear) for name, linear in matrices(model).items()}
    hook = model.blocks[1].mlp.register_forward_pre_hook(lambda module, given: read.append(given[0].flatten(0, 1)))
    with recorded(model) as grams:
        model(ids), model(ids[:1])
    hook.remove()
    x = torch.cat(read)
    for name in ("gate", "up"):
        torch.testing.assert_close(grams[f"blocks.1.mlp.{name}"], x.t() @ x)
    assert {name: id(linear) for name, linear in matrices(model).items()} == before and grams.keys() == before.keys()
