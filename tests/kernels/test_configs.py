"""kernels/configs.py: what the decode kernel is launched with, by shapes alone."""

import pytest
import torch

from hf_paged_flash.kernels.configs import Device, Tile, decode_plan

H100 = Device(90, 232448, 132)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("rows", [1, 4, 16, 32, 64])
def test_one_round_of_splits_and_no_more(head_dim, rows):
    for row_heads in range(1, 1200):
        tile, splits = decode_plan(row_heads, head_dim, head_dim, rows, torch.bfloat16, H100)
        programs = row_heads * -(-rows // tile.block_m)
        one_round = (1 if tile.block_m == 64 else 2) * H100.num_sms
        assert splits == 1 or programs * splits <= one_round
        assert programs * splits > 0.4 * one_round or splits == 128


def test_rows_beyond_one_round_take_the_tile_that_fills_its_rounds():
    def plan(batch):
        return decode_plan(8 * batch, 128, 128, 4, torch.bfloat16, H100)

    most, small, deep = Tile(16, 64, 4, 3), Tile(16, 32, 2, 4), Tile(16, 64, 4, 4)
    assert plan(1) == (most, 33)
    assert plan(48) == (most, 1)  # 384 of 396 at once; 384 of 528 of the small tile
    assert plan(64) == (small, 1)  # 512 of 528; a second round of 396 with 116
    assert plan(160) == (deep, 1)  # 1280 of five rounds of 264; a fourth round of 396 with 92, a third of 528 with 224
    assert plan(200) == (most, 1)  # seven rounds of 264 with 16 in the last are hardly better than five of 396


@pytest.mark.parametrize(
    "rows, dtype, gpu",
    [
        (32, torch.bfloat16, H100),
        (4, torch.float32, H100),
        (4, torch.bfloat16, Device(80, 166912, 108)),
        (4, torch.bfloat16, Device(120, 101376, 170)),
    ],
)
def test_wide_tiles_are_for_what_was_measured(rows, dtype, gpu):
    tiles = {decode_plan(8 * batch, 128, 128, rows, dtype, gpu)[0] for batch in range(1, 200)}
    assert len(tiles) == 1
