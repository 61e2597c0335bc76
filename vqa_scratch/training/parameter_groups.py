"""Which of a model's parameters an optimizer takes together, and which matrices one parameter holds."""

from torch import Tensor, nn

from vqa_scratch.nn.attention import MultiHeadAttention


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """(hidden matrices, weights of other layers, the rest); each trainable parameter is in exactly one group.

    Hidden matrices are those inside blocks. Projections, heads and filters are the second group. Biases, norms and
    tables are the third, without weight decay; a table is the weight of an embedding, or a parameter outside a layer
    (positions, a class token), which is not called `weight`. Checkpoints rely on the order, that of the model.
    """
    hidden, wide, rest = [], [], []
    for name, p in model.named_parameters():
        owner, _, own_name = name.rpartition(".")
        is_table = own_name != "weight" or isinstance(model.get_submodule(owner), nn.Embedding)
        if not p.requires_grad:
            continue
        if ".blocks." in f".{name}" and p.ndim == 2:
            hidden.append(p)
        elif p.ndim >= 2 and not is_table:
            wide.append(p)
        else:
            rest.append(p)
    assert len({id(p) for p in hidden + wide + rest}) == sum(p.requires_grad for p in model.parameters())
    return hidden, wide, rest


def stacked_matrices(model: nn.Module) -> dict[Tensor, tuple[int, ...]]:
    """The rows of each matrix in every parameter that is several: the fused projections of attentions."""
    attentions = [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
    return {weight: rows for attention in attentions for weight, rows in attention.stacked.items()}
