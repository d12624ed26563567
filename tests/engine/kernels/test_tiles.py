"""How products are cut, where the choice is arithmetic alone."""

from __future__ import annotations

import pytest

from engine.kernels.tiles import choose_groups


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
    assert choose_groups(rows, width, 132) == groups
