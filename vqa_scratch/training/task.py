"""What the loop trains, for how long, and where it stands."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from vqa_scratch.training.distributed import World


class Task(Protocol):
    """What the loop needs to know about the thing it trains."""

    model: nn.Module

    def epoch(self, number: int) -> list[Any]:
        """What `batch` takes for each step of an epoch; a function of `number` alone."""

    def share(self, key: Any, world: World) -> tuple[Any, bool]:
        """This rank's part of a step, as a key, and True; or, if there is none, some small key and False."""

    def batch(self, key: Any) -> Any:
        """The batch of that key, on the CPU; has `to(device)`, `pin()`, `parts(number)` and `silent()`."""

    def size(self, batch: Any) -> tuple[int, int]:
        """(samples, tokens that carry a loss) of a batch or part."""

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """(sum of the loss over tokens, number of tokens predicted right); runs inside autocast."""

    def ids(self, batch: Any) -> list[int]:
        """Names of the samples, for the report on a batch that broke the loss."""

    def evaluate(self) -> dict[str, float]:
        """Figures on the validation split; `accuracy` picks the best checkpoint."""


@dataclass(frozen=True)
class Plan:
    """How long and how to train. Exactly one of `steps` and `seconds` bounds the run."""

    steps: int | None
    seconds: float | None
    warmup_steps: int
    decay_from: float
    accumulate: int
    max_grad_norm: float
    log_every: int
    eval_every: int
    save_every: int

    def progress(self, step: int, seconds: float) -> float:
        """The share of the run that is over, 0 to 1."""
        return min(1.0, step / self.steps if self.steps is not None else seconds / max(self.seconds, 1e-9))


@dataclass
class State:
    """Where a run stands; part of every checkpoint."""

    step: int = 0
    epoch: int = 0
    position: int = 0  # batches of the epoch that are done
    samples: int = 0
    seconds: float = 0.0
    best: float = -1.0
    best_step: int = 0
