"""Saves time and memory in large linear layers, and in the gradients of an embedding and a head over many tokens."""

from torch import Tensor, nn

from vqa_scratch.nn.summing_linear import SummingLinear
from vqa_scratch.training.ranks import in_parts

LARGE_TABLE = 2**20  # numbers
LARGE_WEIGHT = 2**17  # numbers of a linear layer: its products take more time than what calls them


def _large(table: Tensor, size: int) -> bool:
    """Whether a table has at least this size, and is whole here."""
    return table.numel() >= size and not in_parts(table)


def look_up_sparsely(model: nn.Module) -> list[Tensor]:
    """Make lookups in large tables give sparse gradients: the rows they read, instead of a whole table of zeros.

    Returns the tables, whose `.grad` then lists rows until it is made dense. A table in parts (FSDP) stays unchanged.
    """
    tables = []
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad and _large(module.weight, LARGE_TABLE):
            module.sparse = True
            tables.append(module.weight)
    return tables


def speed_up_linears(model: nn.Module) -> None:
    """Make large linear layers faster in fp32, and those that learn add their gradients to `.grad` in place, without a
    second table of that size.

    A table in parts (FSDP) stays unchanged.
    """
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None and _large(module.weight, LARGE_WEIGHT):
            module.__class__ = SummingLinear  # the same parameters under the same names
