"""Memory of a GPU that is in use, by whatever: pages of a PagedCache are none of torch's allocator."""

import torch


def in_use(device: torch.device | str) -> int:
    """Bytes of the device."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def in_use_before(device: torch.device | str) -> int:
    """The same without what torch's allocator holds unused, which whatever runs next grows into."""
    return in_use(device) - (torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
