"""How products are cut, where the choice is arithmetic alone."""

from __future__ import annotations

import pytest

from engine.kernels.tiles import ONE_TURN, GatedTile, choose_gated, one_turn
from engine.runner import WARM_UP_ROWS


@pytest.mark.parametrize(
    ("rows", "width", "groups"),
    [
        (8192, 6144, 3),  # 2,064 tiles for 132 SMs: 15.6 of 16 turns
        (2304, 6144, 2),  # 864 tiles, 6.5 of 7 turns; with three groups 576, 4.4 of 5
        (2048, 3072, 3),  # both waste as much: three fetch less
        (1024, 6144, 2),
        (768, 12288, 3),
        (8192, 12288, 3),  # two groups would waste less, by 2 %
        (1024, 3072, 0),  # 192 tiles: a turn and a half
        (272, 6144, 0),
        (1, 6144, 0),
    ],
)
def test_groups_of_a_gated_product_leave_little_of_132_sms_unused(rows: int, width: int, groups: int) -> None:
    assert choose_gated(rows, width, 132) == (GatedTile(groups, 128) if groups else None)


@pytest.mark.parametrize(
    ("rows", "width", "tile"),
    [
        (256, 6144, GatedTile(2, 64, 32)),  # 128 tiles for 132 SMs
        (192, 6144, GatedTile(3, 64)),  # 96 tiles fetch no more than 128 of two groups, which have empty rows
        (128, 6144, GatedTile(2, 32, 16)),
        (256, 9728, GatedTile(2, 128, 32)),
        (256, 12288, GatedTile(2, 128, 64)),
        (256, 1024, None),  # 64 tiles of the narrowest
        (256, 18944, None),  # more than one for each SM
    ],
)
def test_each_sm_gets_one_tile_of_a_gated_product_of_few_rows(rows: int, width: int, tile: GatedTile | None) -> None:
    assert one_turn(rows, width, 132) == tile


@pytest.mark.parametrize("width", [3072, 6144, 8960, 9728, 12288, 18944])
def test_what_is_warmed_up_is_what_is_taken(width: int) -> None:
    """A tile is chosen for the last row of 64, and `runner.WARM_UP_ROWS` has the first."""
    chosen = [one_turn(rows, width, 132) for rows in range(65, 257)]
    assert {*chosen} == {one_turn(rows, width, 132) for rows in WARM_UP_ROWS if 65 <= rows <= 256}
    assert {*chosen} <= {*ONE_TURN, None}
