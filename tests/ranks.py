"""Functions run as the ranks of one world: processes of their own that talk through gloo."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from vqa_helpers import Ended, Started


def placed(environment: dict[str, str], function: Callable[..., None], args: tuple) -> None:
    os.environ.update(environment)
    function(*args)


def run_ranks(size: int, function: Callable[..., None], *args: Any) -> list[Ended]:
    """`function(*args)` as each of `size` ranks, with the environment that torchrun gives them; how each ended.

    As torchrun's agent does, this process keeps the store, so that its port is free for certain.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    shared = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [Started(placed, shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, function, args) for r in range(size)]
    return [rank.end() for rank in ranks]
