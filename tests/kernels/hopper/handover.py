"""Two warp groups, of which one hands a number to the other: a control for what compute-sanitizer makes of that."""

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def _hand_over(X, number, full):
    number.store(gl.load(X + gl.arange(0, 1, gl.BlockedLayout([1], [32], [1], [0]))))
    mbarrier.arrive(full, count=1)


@gluon.jit
def _take_over(Out, number, full):
    mbarrier.wait(full, 0)
    gl.store(Out, gl.max(number.load(gl.BlockedLayout([1], [32], [4], [0])), 0))


@gluon.jit
def handover_kernel(X, Out):
    number = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    gl.warp_specialize([(_take_over, (Out, number, full)), (_hand_over, (X, number, full))], [1], [24])


def handover(device: str) -> int:
    """7, through the shared memory of one block."""
    x = torch.tensor([7], dtype=torch.int32, device=device)
    out = torch.zeros_like(x)
    handover_kernel[(1,)](x, out, num_warps=4)
    return out.item()
