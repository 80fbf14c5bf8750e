"""Which of a teacher's tensors each tensor of its student starts from: the only place that knows the names of both."""

from collections.abc import Callable, Mapping

from torch import Tensor

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def teacher_tensor(teacher: Mapping[str, Tensor]) -> Callable[[str], Tensor | None]:
    """Student's name -> the teacher's tensor, on the CPU, or None where the teacher has none.

    A KDA layer's projections are its teacher's attention's; all other tensors bear their teacher's name. Qwen3's
    q_norm and k_norm are folded into the rows of q_proj and k_proj, since KDA normalises q and k itself:
    L2norm(RMSnorm(q) * w) = L2norm(q * w).
    """

    def find(name: str) -> Tensor | None:
        layer, mark, part = name.partition(".kda.")
        if not mark:
            return _cpu(teacher.get(name))
        projection = part.partition(".")[0]
        if projection not in PROJECTIONS:
            return None
        tensor = _cpu(teacher.get(f"{layer}.self_attn.{part}"))
        norm = _cpu(teacher.get(f"{layer}.self_attn.{projection[0]}_norm.weight"))
        return tensor if tensor is None or norm is None else _folded(tensor, norm)

    return find


def _cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().cpu()


def _folded(tensor: Tensor, norm: Tensor) -> Tensor:
    """Rows (weight [heads * K, hidden] or bias [heads * K]) times the norm's weight [K] of their channel."""
    heads = tensor.float().unflatten(0, (-1, len(norm)))
    scale = norm.float().view(1, -1, *[1] * (tensor.ndim - 1))
    return (heads * scale).flatten(0, 1).to(tensor.dtype)
