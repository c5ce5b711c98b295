"""Copies blocks within the pools of all layers, keys and values, in one launch."""

import torch
import triton
import triton.language as tl

WORD = 8  # bytes
BLOCK = 1024  # words a program copies


@triton.jit
def _copy_blocks_kernel(tensors, copies, BLOCK: tl.constexpr):
    """Block copies[i, 1] = block copies[i, 0], in each tensor.

    tensors int64 (T, 3): a tensor's address, and its words from one block to the next and in a block; copies int64
    (n, 2). Grid (n, T, words of the largest block / BLOCK): BLOCK words of one block of one tensor.
    """
    copy = tl.program_id(0).to(tl.int64)
    tensor = tl.program_id(1)
    address = tl.load(tensors + 3 * tensor)
    stride = tl.load(tensors + 3 * tensor + 1)
    words = tl.load(tensors + 3 * tensor + 2)
    source = tl.load(copies + 2 * copy)
    target = tl.load(copies + 2 * copy + 1)
    offs = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    base = address.to(tl.pointer_type(tl.int64))
    mask = offs < words
    tl.store(base + target * stride + offs, tl.load(base + source * stride + offs, mask=mask), mask=mask)


def copy_blocks(caches: list[torch.Tensor], copies: torch.Tensor) -> None:
    """Launches `_copy_blocks_kernel`; arguments as in `hf_paged_flash.ops.reference.copy_blocks`."""
    if not caches or not copies.numel():
        return
    sizes = []
    for cache in caches:
        block_bytes, stride_bytes = cache[0].numel() * cache.element_size(), cache.stride(0) * cache.element_size()
        sizes.append((cache.data_ptr(), stride_bytes // WORD, block_bytes // WORD))
    tensors = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    if copies.is_cuda:  # through pinned memory, so that the host does not wait
        tensors = tensors.pin_memory().to(copies.device, non_blocking=True)
    largest = max(words for _, _, words in sizes)
    with torch.cuda.device_of(copies):
        _copy_blocks_kernel[(copies.shape[0], len(sizes), triton.cdiv(largest, BLOCK))](
            tensors=tensors,
            copies=copies.contiguous(),
            BLOCK=BLOCK,
            num_warps=4,
        )
