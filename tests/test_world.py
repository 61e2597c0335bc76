"""A world of ranks without a training run: places, messages, devices, random numbers, weights that begin alike."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from vqa_scratch.errors import UserError
from vqa_scratch.models.resnet import FrozenBatchNorm
from vqa_scratch.rl import ranks as rl_ranks
from vqa_scratch.rl.ranks import Copies, gather_rows
from vqa_scratch.training.checkpoint import restore_streams, separate_streams, streams
from vqa_scratch.training.launch import _backend, start
from vqa_scratch.training.precision import Precision
from vqa_scratch.training.ranks import World, in_parts, whole
from vqa_scratch.training.sharing import Replicas, check_sharing, share_model


def test_shares_are_whole_and_even():
    for size in (1, 2, 3, 8):
        for count in range(20):
            shares = [World(rank, size).share(list(range(count))) for rank in range(size)]
            assert [i for share in shares for i in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def messages() -> None:
    """What each rank hears, checked on both."""
    with start("cpu") as world:
        assert world.totals([world.rank, 2.0**52, 0.5]) == [1, 2.0**53, 1.0]
        assert world.gather({"rank": world.rank}) == [{"rank": 0}, {"rank": 1}]
        assert world.of_main(f"from {world.rank}") == "from 0"
        world.check_same("x", "this")
        with pytest.raises(UserError, match="the step on rank 0 is 0, on rank 1 1; all ranks must see the same"):
            world.check_same(world.rank, "the step")


def alike(kind: str) -> None:
    """A model seeded by rank is rank 0's after it is shared, in whole copies and in parts, buffers as well.

    Parts become whole where that is asked for, and only there.
    """
    with start("cpu") as world:
        precision = Precision("fp32", torch.device("cpu"))
        for replicas in (Replicas, Copies) if kind == "ddp" else (Replicas,):
            models = []
            for seed in (world.rank, 0):
                torch.manual_seed(seed)
                models.append(torch.nn.Sequential(torch.nn.Linear(3, 2), FrozenBatchNorm(2)))
                models[-1][1].running_mean.normal_()
                models[-1].blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
            mine, of_main = models
            ranks = share_model(kind, mine, world, precision, replicas)
            assert ranks.with_whole_model(lambda m=mine: not any(in_parts(p) for p in m.parameters()))
            assert all(in_parts(p) == (kind == "fsdp") for p in mine.parameters()), "in parts again afterwards"
            for name, tensor in of_main.state_dict().items():
                assert torch.equal(whole(mine.state_dict()[name]), tensor), (replicas, name)
            del ranks


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_all_ranks_begin_with_the_weights_of_the_main_one(kind):
    for ended in run_ranks(2, alike, kind):
        assert ended.code == 0, ended.err


def test_messages_reach_every_rank():
    for ended in run_ranks(2, messages):
        assert ended.code == 0, ended.err


def in_a_cycle() -> None:
    """A DDP that only the garbage collector finds, as one held by a closure that holds itself."""
    made, ended = [], []

    def work(world: World) -> None:
        ranks = Replicas(torch.nn.Linear(2, 2), world)
        ranks.itself = ranks
        made.append(weakref.ref(ranks.module))

    gc.disable()
    destroy = dist.destroy_process_group
    dist.destroy_process_group = lambda: ended.append(made[0]()) or destroy()
    with start("cpu") as world:
        work(world)
    assert ended == [None], "still there when its process group goes"


def test_what_shares_a_model_is_freed_before_its_process_group():
    (ended,) = run_ranks(1, in_a_cycle)
    assert ended.code == 0, ended.err


def test_without_torchrun_there_is_one_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with start("cpu") as world:
        assert world == World() and world.main
        assert world.totals([1, 2]) == [1, 2] and world.gather("x") == ["x"] and world.of_main("y") == "y"
        with world.first_one_then_all():
            pass
    precision = Precision("fp32", torch.device("cpu"))
    with pytest.raises(UserError, match="--parallel fsdp cuts the model over processes: start the run with torchrun"):
        share_model("fsdp", torch.nn.Linear(2, 2), World(), precision)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="RANK is set, but .*MASTER_ADDR.* not: start several processes with torchrun"):
        start("cpu").__enter__()
    for name, value in {"LOCAL_RANK": "first", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="LOCAL_RANK is 'first', no number: start several processes with torchrun"):
        start("cpu").__enter__()


def test_a_process_takes_its_own_gpu(monkeypatch):
    """Gradients go by NCCL between GPUs, small messages by gloo between CPUs; one process too many is one line."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert _backend("auto", World(5, 8, local_rank=1)) == _backend("cuda", World(4, 8)) == "cpu:gloo,cuda:nccl"
    assert taken == [1, 0]
    assert _backend("cpu", World(5, 8, local_rank=7)) == "gloo"
    with pytest.raises(UserError, match="no GPU for process 2 of this machine, which has 2: give torchrun --nproc-per"):
        _backend("cuda", World(2, 8, local_rank=2))
    with pytest.raises(UserError, match="--device mps computes in one process"):
        _backend("mps", World(0, 2))
    assert taken == [1, 0]


def test_fp16_is_not_cut_in_parts(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    check_sharing("fsdp", SimpleNamespace(kind="bf16"))
    check_sharing("ddp", SimpleNamespace(kind="fp16"))
    with pytest.raises(UserError, match="--parallel fsdp takes bf16 or fp32"):
        check_sharing("fsdp", SimpleNamespace(kind="fp16"))


def drawn() -> list[float]:
    return torch.rand(3).tolist()


def random_numbers() -> None:
    """Each rank has its own, and gets them back; a rank that the saved run did not have begins new ones."""
    with start("cpu") as world:
        torch.manual_seed(0)
        separate_streams(world)
        saved, mine = streams(world), drawn()
        ours = world.gather(mine)
        assert ours[0] != ours[1]
        drawn()
        restore_streams(saved, world, 7)
        assert drawn() == mine, "with as many ranks as before"
        restore_streams(saved, World(), 7)
        assert drawn() == ours[0], "one process goes on as the main rank"
        others = []
        for rank, step in ((2, 7), (3, 7), (2, 8)):
            torch.manual_seed(0)
            restore_streams(saved, World(rank, 4), step)
            others.append(tuple(drawn()))
        assert len({*map(tuple, ours), *others}) == 5


def test_ranks_draw_their_own_random_numbers():
    for ended in run_ranks(2, random_numbers):
        assert ended.code == 0, ended.err


def test_rows_of_three_ranks_stand_in_their_order():
    class Three:
        size = 3

        def gather(self, value):
            return pieces

    pieces = [[torch.full((rows,), rank), torch.full((rows, rank), rank)] for rank, rows in ((1, 2), (3, 1), (2, 3))]
    places, padded = gather_rows(Three(), *pieces[0])
    assert places.tolist() == [1, 1, 3, 2, 2, 2]
    assert padded.tolist() == [[1, 0, 0], [1, 0, 0], [3, 3, 3], [2, 2, 0], [2, 2, 0], [2, 2, 0]]


def gradients() -> None:
    """Sums over the ranks, several tensors at a time; one that a rank lacks counts as zero there."""
    with start("cpu") as world:
        rl_ranks.BUCKET = 5  # numbers, so that there are several buckets
        model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Linear(1, 3), torch.nn.Linear(3, 1))
        parameters, ranks = list(model.parameters()), Copies(model, world)
        for number, p in enumerate(parameters):
            if number > 1 or (number == 0 and not world.main):
                p.grad = torch.full_like(p, (number + 1) * (world.rank + 1))
        ranks.collect(parameters)
        assert parameters[1].grad is None, "nobody has one"
        wanted = [2.0, None, 9.0, 12.0, 15.0, 18.0]
        for p, value in zip(parameters, wanted, strict=True):
            assert value is None or (p.grad == value).all()


def test_gradients_are_summed_over_ranks():
    for ended in run_ranks(2, gradients):
        assert ended.code == 0, ended.err
