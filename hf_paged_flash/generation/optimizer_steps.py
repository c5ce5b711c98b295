"""How often optimizers have stepped weights: fused ones write to them without raising a tensor's `_version`."""

from collections import Counter
from collections.abc import Iterable

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

_steps: Counter[int] = Counter()  # by a weight's id: a later weight of that id begins with some, and no number falls
_is_counting = False


def steps_of(weights: Iterable[torch.Tensor]) -> int:
    """A number that grows with each step of `weights`; steps are counted from the first call of this on."""
    global _is_counting
    if not _is_counting:
        _is_counting = True
        register_optimizer_step_post_hook(_count)
    return sum(map(_steps.__getitem__, map(id, weights))) if _steps else 0


def _count(optimizer: Optimizer, *args) -> None:
    if torch.compiler.is_compiling():  # what is compiled raises versions
        return
    _steps.update(id(weight) for group in optimizer.param_groups for weight in group["params"])
