"""Keys and values for a PagedCache, fed to it as a model would."""

from collections.abc import Sequence

import torch

from hf_paged_flash import PagedCache


class Feed:
    """Random keys and values (rows, heads, columns, dim) for a cache, and what it must hold then; no model.

    Args:
        shapes: (heads, key's dim, value's dim) of each layer.
    """

    def __init__(
        self,
        rows: int = 3,
        shapes: Sequence[tuple[int, int, int]] = ((2, 16, 16),) * 3,
        dtypes: Sequence[torch.dtype] = (torch.float32,) * 3,
        device: str = "cpu",
    ) -> None:
        self.rows, self.shapes, self.dtypes, self.device = rows, shapes, dtypes, device
        self.generator = torch.Generator().manual_seed(0)
        self.fed = [
            [torch.zeros(rows, heads, 0, dim, dtype=dtype, device=device) for dim in dims]
            for (heads, *dims), dtype in zip(shapes, dtypes, strict=True)
        ]

    def columns(self, count: int) -> list[list[torch.Tensor]]:
        return [
            [
                torch.randn(self.rows, heads, count, dim, generator=self.generator).to(self.device, dtype)
                for dim in dims
            ]
            for (heads, *dims), dtype in zip(self.shapes, self.dtypes, strict=True)
        ]

    def update(self, cache: PagedCache, new: list[list[torch.Tensor]]) -> None:
        for layer, (key, value) in enumerate(new):
            cache.update(key, value, layer)
        for held, added in zip(self.fed, new, strict=True):
            held[:] = [torch.cat(pair, 2) for pair in zip(held, added, strict=True)]

    def select(self, rows: list[int]) -> None:
        self.fed = [[x[rows] for x in held] for held in self.fed]
        self.rows = len(rows)

    def crop(self, columns: int) -> None:
        self.fed = [[x[:, :, :columns] for x in held] for held in self.fed]

    def check(self, cache: PagedCache) -> None:
        for layer, held in zip(cache.layers, self.fed, strict=True):
            for stored, expected in zip((layer.keys, layer.values), held, strict=True):
                assert torch.equal(torch.clone(stored), expected)


def pointers(cache: PagedCache) -> list[int]:
    return [x.data_ptr() for layer in cache.layers for x in (layer.pool.key, layer.pool.value)]
