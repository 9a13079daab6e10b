from __future__ import annotations

import pytest

from grpo_fast.ops import head_shapes
from grpo_fast.ops.head_shapes import Key, Tile, choose, copies_tiles, default_tile

KEY = Key(90, "bfloat16", hidden=2048, vocab=151936, rows=8192, plain=True)
TILE = Tile(128, 128, 64, splits=1, num_stages=4, num_warps=8, persistent=True)


def entry(key: Key, tier: int, tile: Tile = TILE) -> dict[str, object]:
    return {**key._asdict(), "tier": tier, "tile": list(tile)}


def test_without_a_measurement_tier_1_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_shapes, "_measured", lambda: (entry(KEY, 2),))
    for key in (KEY._replace(arch=100), KEY._replace(dtype="float16"), KEY._replace(vocab=151937), KEY._replace(plain=False)):
        found = choose(key)
        assert (found.tier, found.measured) == (1, False)
        wide = key.plain and key.dtype == "bfloat16"
        assert found.tile == default_tile(key.arch, wide=wide, aligned=True)


def test_the_measurement_of_the_nearest_chunk_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = KEY._replace(rows=1024), KEY._replace(rows=8192)
    monkeypatch.setattr(head_shapes, "_measured", lambda: (entry(large, 2), entry(small, 1, TILE._replace(columns=64))))
    assert choose(large) == (2, TILE, True)
    assert choose(KEY._replace(rows=100_000)) == (2, TILE, True)
    assert choose(KEY._replace(rows=2000)) == (1, TILE._replace(columns=64), True)
    assert choose(KEY._replace(rows=0)).tier == 1


def test_the_table_of_the_package_can_be_read() -> None:
    head_shapes._measured.cache_clear()
    for row in head_shapes._measured():
        found = choose(head_shapes.key_of(row))
        assert found == (row["tier"], Tile(*row["tile"]), True)
        assert row["tier"] in (1, 2)
        assert row["device"]


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_default_tiles_fit_shared_memory(arch: int, wide: bool, aligned: bool) -> None:
    tile = default_tile(arch, wide=wide, aligned=aligned)
    operands = (tile.rows + tile.columns) * tile.hidden * 2 * tile.num_stages
    assert operands <= (227 if copies_tiles(arch) else 99) * 1024
    assert tile.columns >> tile.splits >= 16
    assert tile.persistent == (copies_tiles(arch) and aligned)


def test_consumer_cards_do_not_copy_tiles() -> None:
    assert [arch for arch in (80, 86, 89, 90, 100, 103, 120, 121) if copies_tiles(arch)] == [90, 100, 103]
