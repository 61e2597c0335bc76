"""`train.py --experts`: what a step routes and adds to its loss, on parts and ranks, and what a run can do then."""

import functools
import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from run_helpers import command, picture
from test_resume import at_step, die
from test_systems import QUESTION, same
from vqa_helpers import CPU, Started, small_flags, small_options, train_program

from train import train_step
from vqa_scratch import systems
from vqa_scratch.connectors import CONNECTORS
from vqa_scratch.errors import UserError
from vqa_scratch.generate import GenerationOptions, generate
from vqa_scratch.models.gpt2_experts import GPT2Experts, GPT2ExpertsConfig
from vqa_scratch.models.llama_experts import Mixture
from vqa_scratch.models.released import decoder_of
from vqa_scratch.models.vqa import labelled_loss
from vqa_scratch.nn import taps
from vqa_scratch.nn.experts import Router, balance_loss, move_biases, z_loss
from vqa_scratch.systems import experts
from vqa_scratch.systems.experts import BALANCE, Z, real_tokens, routed_states
from vqa_scratch.systems.options import read_command_line
from vqa_scratch.systems.vqa import VQASystem
from vqa_scratch.training.launch import start
from vqa_scratch.training.optimizers import Optimizers
from vqa_scratch.training.precision import Precision
from vqa_scratch.training.ranks import ALONE, World
from vqa_scratch.training.sharing import Replicas

EXPERTS = {"experts": 4, "decoder_layers": 2, "question_prompt": True}
FP32 = Precision("fp32", CPU)


def training(data: Path, folder: Path, world: World = ALONE, **changes) -> tuple[VQASystem, Optimizers]:
    """A system in float64, where sums in another order leave no trace, as `train.py` has it before the first step."""
    options = small_options(data, folder / "run", **EXPERTS | changes)
    samples = VQASystem.read(options)
    system = VQASystem.build(options, samples, FP32)
    system.world = world
    system.train_on(samples)
    system.model.double().train()
    encoder, normalize = system.model.image, system.processor.normalize
    system.encode_image = lambda images: encoder.states(normalize(images).double())
    optimizers = Optimizers(system.model, kind="adamw", learning_rate=1e-3, matrix_learning_rate=0.0, weight_decay=0.0)
    system.trained_by(optimizers)
    optimizers.zero_grad = lambda: None  # a step leaves its gradients
    return system, optimizers


def routers(system: VQASystem) -> list[Router]:
    return [module for module in system.model.decoder.modules() if isinstance(module, Router)]


# ------------------------------------------------------------------------------------------------ one step


@pytest.mark.parametrize("connector", CONNECTORS)
def test_no_padding_is_routed_and_the_loss_is_that_of_all_tokens(data, tmp_path, connector):
    """With every connector: each layer routes the tokens of questions and answers and the prefix, and nothing else."""
    system, _ = training(data, tmp_path, connector=connector, balance="bias")
    key = system.epoch(0)[0]
    batch = system.batch(key)
    real = system.splits["train"].questions.decoder_ids.lengths[key.rows]
    assert torch.equal(real_tokens(batch.labels).sum(1), torch.from_numpy(real)) and len(set(real)) > 1
    loss, right = system.loss(batch)
    (loads,) = system.experts.loads
    with torch.no_grad(), system.evaluating():
        prefix = system.condition(batch).prefix
        plain = system.loss(batch)
    read = real.sum() + (0 if prefix is None else prefix.shape[0] * prefix.shape[1])
    assert loads.sum(1).tolist() == [2 * read] * 2 and (prefix is None) == (
        connector in ("tokens", "mean", "resampler")
    )
    torch.testing.assert_close((loss, right), plain, rtol=1e-9, atol=0)
    assert len(system.experts.loads) == 1, "an evaluation counts for nothing"
    loss.backward()
    assert all(parameter.grad is not None for parameter in system.model.decoder.parameters())


def assert_same_step(system: VQASystem, other: VQASystem) -> None:
    """Equal biases, and gradients to the rounding of routers, which compute in float32."""
    for one, two in zip(routers(system), routers(other), strict=True):
        assert one.bias is two.bias is None or torch.equal(one.bias, two.bias)
    for (name, ours), theirs in zip(system.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("balance", ["none", "bias"])
def test_a_step_does_not_depend_on_its_parts(data, tmp_path, balance, monkeypatch):
    """Biases move once, by the loads of both."""
    moved: list[torch.Tensor] = []
    monkeypatch.setattr(experts, "move_biases", lambda model, by: moved.append(by) or move_biases(model, by))
    (one, first), (two, second) = (training(data, tmp_path, connector="prefix", balance=balance) for _ in range(2))
    batch = one.batch(one.epoch(0)[0])
    loss, _, _ = train_step(one.loss, batch, first, FP32)
    other, _, _ = train_step(two.loss, batch, second, FP32, accumulate=2)
    assert loss.item() == pytest.approx(other.item(), rel=1e-6)
    assert_same_step(one, two)
    assert not two.experts.loads and len(moved) == (0 if balance == "none" else 2)
    assert all(torch.equal(by, moved[0]) for by in moved) and all(
        balance == "none" or r.bias.abs().max() > 5e-4 for r in routers(two)
    )


def test_the_losses_of_routers_count_by_labelled_tokens(data, tmp_path):
    """The loss of a step in two parts is the mean of all tokens' own, plus that of the parts' by their tokens."""
    system, optimizers = training(data, tmp_path, balance="loss")
    batch = system.batch(system.epoch(0)[0])
    own, added = 0.0, 0.0
    for part in batch.parts(2):
        with torch.no_grad():
            image, text = system.encode_image(part.images), system.encode_text(part.question, part.attention_mask)
            hidden, found = routed_states(system.model, image, text, part)
            own += float(labelled_loss(hidden, system.model.decoder.head, part.labels)[0])
            added += part.counts[1] * float(BALANCE * balance_loss(found) + Z * z_loss(found))
        assert len(found) == 2 and 2.0 - 0.1 < float(balance_loss(found)) < 4.0
    before = [router.gate.weight.clone() for router in routers(system)]
    loss, _, _ = train_step(system.loss, batch, optimizers, FP32, accumulate=2)
    assert float(loss) == pytest.approx((own + added) / batch.counts[1], rel=1e-6)
    assert all((router.gate.weight != gate).any() for router, gate in zip(routers(system), before, strict=True))


def a_rank(data: Path, folder: Path) -> None:
    with start("cpu") as world:
        compare(data, folder, world)  # a function: DDP must be gone before its group is


def compare(data: Path, folder: Path, world: World) -> None:
    """Two steps, of which the second is one image, so that the other rank is silent."""
    alone, its = training(data, folder / f"alone{world.rank}", balance="bias")
    system, ours = training(data, folder / f"rank{world.rank}", world, balance="bias")
    ranks = Replicas(system.model, world)
    loss_of, key = ranks.shared(system.loss), system.epoch(0)[0]
    for rows in (key.rows, key.rows[:8]):
        whole = key._replace(rows=rows)
        share, counts = system.share(whole, world)
        part = system.batch(share) if counts else system.batch(share).silent()
        counted = alone.batch(whole).counts[1]
        train_step(loss_of, part, ours, FP32, accumulate=2, counted=counted, ranks=ranks)
        train_step(alone.loss, alone.batch(whole), its, FP32)
        assert_same_step(system, alone)
        for optimizers in (ours, its):
            Optimizers.zero_grad(optimizers)
    assert all(router.bias.abs().max() > 0 for router in routers(system))


def test_two_ranks_move_biases_as_one(data, tmp_path):
    for ended in run_ranks(2, a_rank, data, tmp_path):
        assert ended.code == 0, ended.err


# ------------------------------------------------------------------------------------------------ a run


def flags(data: Path, out: Path) -> list[str]:
    more = ["--experts=4", "--balance=bias", "--decoder-hidden=32"]
    return [*small_flags(data, out, steps=4, save_every=2, eval_every=3, samples=2), *more]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("experts") / "run"
    ended = Started(train_program, flags(data, out)).end()
    assert ended.code == 0, ended.err
    return out


def test_a_killed_run_goes_on_to_the_same_bits(run, data, tmp_path):
    out = tmp_path / "run"
    assert Started(train_program, flags(data, out), functools.partial(at_step, 4, die)).end().code == -9
    ended = Started(train_program, [*flags(data, out), "--resume"]).end()
    assert ended.code == 0, ended.err
    same(out, run)
    biases = [router.bias for router in routers(systems.load(out))]
    assert len(biases) == 1 and biases[0].abs().max() > 0


class Watcher:
    """A trace that wants nothing: it makes decoding step through the modules."""

    def wants(self, name: str) -> bool:
        return False


@torch.no_grad()
def test_what_a_run_with_experts_can_do(run, data, tmp_path, capsys):
    """Opened with its sizes, every state emits the same tokens, study names its experts, int8 keeps them."""
    system = systems.load(run)
    config = json.loads((run / "config.json").read_text())["model"]["decoder"]
    assert config["model_type"] == "gpt2_experts" and system.sizes["decoder"] == config
    assert (config["num_experts"], config["num_experts_per_tok"], config["moe_intermediate_size"]) == (4, 2, 32)
    decoder = system.model.decoder
    assert isinstance(decoder, GPT2Experts) and isinstance(decoder_of(config), GPT2Experts)
    for parameter in decoder.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    samples = system.split(systems.find("shapes").read(system.options).samples["val"])
    asked = samples.questions.in_order(8, 8)[0]
    for rows in (1, 8):
        given = system.condition(samples.questions.batch(asked[:rows], samples.images))
        prompts = torch.full((rows, 1), system.tokenizers.start_id)
        for options in (GenerationOptions(7, None), GenerationOptions(7, system.tokenizers.end_id, num_beams=3)):
            with taps.activate(Watcher()):
                wanted = generate(decoder, prompts, None, given, options=options)
            assert torch.equal(generate(decoder, prompts, None, given, options=options).ids, wanted.ids)
    command("study", run, "--image", picture(data), "--question", QUESTION, "--out", tmp_path / "out")
    assert '"decoder.0.router"' in (tmp_path / "out" / "report.html").read_text()
    command("export", run, tmp_path / "small", "--quantize", "int8")
    assert isinstance(systems.load(tmp_path / "small").model.decoder, GPT2Experts)
    with pytest.raises(UserError, match="^.*run cannot be exported: no released layout is a GPT-2 with experts$"):
        command("export", run, tmp_path / "whole")
    assert not (tmp_path / "whole").exists() or not any((tmp_path / "whole").iterdir())


@torch.no_grad()
def test_experts_begin_like_the_mlps_of_a_gpt2():
    """The second matrix of each smaller by the root of the number of residual projections."""
    decoder = GPT2Experts(GPT2ExpertsConfig(60, 40, dim=64, layers=2, heads=2, experts=Mixture(4, 2, 100)))
    (first, *_), up, down = decoder.blocks[0].mlp.experts.values(), 0.02, 0.02 / 4**0.5
    assert first.up.weight.std() == pytest.approx(up, rel=0.02)
    assert first.down.weight.std() == pytest.approx(down, rel=0.02)
    assert decoder.blocks[1].mlp.router.gate.weight.std() == pytest.approx(0.02, rel=0.2)


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--experts-per-token 2", "--experts-per-token means nothing without --experts$"),
        ("--balance bias", "--balance means nothing without --experts$"),
        ("--experts 1", "--experts must be at least 2"),
        ("--experts 4 --experts-per-token 5", "^5 experts a token of 4: must be from 1 to 4$"),
        ("--experts 4 --freeze decoder", "--experts means nothing with --freeze decoder"),
        ("--experts 4 --compile", "--experts means nothing with --compile"),
        ("--experts 4 --balance luck", "'luck' is not one of 'loss', 'bias', 'none'"),
        ("--preset book --data x --experts 4", "--experts means nothing with --preset book"),
        ("--preset book --data x --decoder-hidden 4", "--decoder-hidden means nothing with --preset book"),
        ("--preset coco --data x --experts 4", "--experts means nothing with --(preset coco|init pretrained)"),
        ("--preset caption --experts 4 --experts-per-token 5", "^5 experts a token of 4: must be from 1 to 4$"),
        ("--preset vilt --experts 4", "--experts"),
    ],
)
def test_what_contradicts_is_said(argv, said):
    with pytest.raises(UserError, match=said) as caught:
        options = read_command_line(argv.split())
        systems.find(options.preset).check(options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "hidden"),
    [("", 256), ("--experts-per-token 1", 512), ("--experts-per-token 3", 170), ("--decoder-hidden 32", 32)],
)
@pytest.mark.parametrize("preset", ["shapes", "caption"])
def test_experts_of_a_token_are_as_wide_as_its_mlp(preset, argv, hidden, monkeypatch):
    """And `--decoder-hidden` sets another width, of each expert or of the MLP."""
    module = "vqa_scratch.systems." + ("vqa_models" if preset == "shapes" else "caption_models")
    made = []
    from vqa_scratch.systems.experts import small_decoder

    def kept(*given, **named):
        made.append(small_decoder(*given, **named))
        return made[-1]

    monkeypatch.setattr(f"{module}.small_decoder", kept)
    options = read_command_line(["--preset", preset, "--experts=4", *argv.split()])
    systems.find(preset).check(options)
    assert {expert.up.out_features for b in made[0].blocks for expert in b.mlp.experts.values()} == {hidden}
    dense = [] if "hidden" not in argv else argv.split()
    systems.find(preset).check(read_command_line(["--preset", preset, *dense]))
    assert {block.mlp.up.out_features for block in made[1].blocks} == {32 if dense else 512}
