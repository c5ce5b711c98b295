"""Memory of a GPU that is in use, by whatever: pages of a PagedCache are none of torch's allocator."""

import gc

import torch


def release_unused(device: torch.device | str) -> None:
    """Gives a GPU back what torch's allocator holds and nobody uses."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def in_use(device: torch.device | str) -> int:
    """Bytes of the device."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def in_use_before(device: torch.device | str) -> int:
    """The same without what torch's allocator holds unused, which whatever runs next grows into."""
    return in_use(device) - (torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
