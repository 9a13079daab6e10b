"""The grid: every shape is a rise, its inverse holds, and its class says what it looks like."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_fast.law.shapes import CLASSES, ShapeGrid

GRID = ShapeGrid()
X = np.linspace(0.0, 1.0, 2001)
TABLE = GRID.rise(X)
HUMP, STRAIGHT, NONE = (CLASSES.index(name) for name in ("rise and fall", "straight", "none"))
RISES = ~np.isin(GRID.classes, (HUMP, NONE))


def of_class(name: str) -> np.ndarray:
    return GRID.classes == CLASSES.index(name)


def test_rises_go_from_nothing_to_one_and_never_fall():
    np.testing.assert_allclose(TABLE[:, 0], 0.0, atol=1e-9)  # Hill shapes start behind 1e-12
    np.testing.assert_allclose(TABLE[RISES, -1], 1.0, rtol=1e-12)
    assert np.all(np.diff(TABLE[RISES], axis=1) >= 0)


def test_humps_have_their_peak_of_one_inside_the_budget():
    humps = GRID.classes == HUMP
    peak = GRID.time_to(1.0 - 1e-12)[humps]
    assert np.all((peak > 0.1) & (peak < 0.9))
    at_peak = GRID.rise(peak)[humps]
    np.testing.assert_allclose(np.diag(at_peak), 1.0, rtol=1e-9)
    assert np.all(TABLE[humps].max(axis=1) <= 1.0)
    assert np.all(TABLE[humps, -1] < 0.999)
    np.testing.assert_allclose(GRID.asymptote[humps], TABLE[humps, -1])


def test_the_last_two_are_the_straight_and_the_flat_shape():
    np.testing.assert_array_equal(TABLE[-2], X)
    np.testing.assert_array_equal(TABLE[-1], 0.0)
    assert [CLASSES[index] for index in GRID.classes[-2:]] == ["straight", "none"]
    assert list(GRID.asymptote[-2:]) == [1.0, 0.0]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.95])
def test_time_to_inverts_the_rise_to_the_asymptote(share):
    when = GRID.time_to(share)
    assert when.shape == (GRID.num_shapes,)
    assert np.isinf(when[-1])
    checked = np.flatnonzero(RISES & np.isfinite(when))
    reached = np.array([GRID.rise(when[index : index + 1])[index, 0] for index in checked])
    np.testing.assert_allclose(reached, share * GRID.asymptote[checked], rtol=1e-6)


def test_time_to_counts_the_way_up_to_a_peak():
    humps = GRID.classes == HUMP
    np.testing.assert_allclose(GRID.time_to(0.8)[humps], 0.8 * GRID.time_to(1.0 - 1e-12)[humps], rtol=1e-9)


def test_a_slow_shape_tends_to_more_than_the_budget_buys():
    bounded = RISES & (GRID.classes != STRAIGHT)
    far = GRID.rise(np.array([1e9]))[:, 0]
    np.testing.assert_allclose(GRID.asymptote[bounded], far[bounded], rtol=1e-3)
    assert np.all(GRID.asymptote[bounded] >= 1.0 - 1e-12)
    assert GRID.asymptote.max() > 2.0


def test_every_class_is_there_and_counted():
    assert set(GRID.classes.tolist()) == set(range(len(CLASSES)))
    assert GRID.num_in_class.sum() == GRID.num_shapes == TABLE.shape[0] == GRID.classes.size == GRID.asymptote.size
    for index in range(len(CLASSES)):
        assert GRID.num_in_class[index] == np.count_nonzero(GRID.classes == index)
    assert GRID.num_in_class[[STRAIGHT, NONE]].tolist() == [1, 1]


@pytest.mark.parametrize(("kind", "border"), [("stretched", 0.15), ("exponential", 0.15), ("S-shaped", 0.3)])
def test_early_and_late_part_where_half_is_done(kind, border):
    half = GRID.time_to(0.5)
    assert half[of_class(f"{kind}, early")].max() < border <= half[of_class(f"{kind}, late")].min()


def test_classes_tell_how_a_rise_starts():
    """Share of the rise that is done at a tenth of the way to its half."""
    half = GRID.time_to(0.5)

    def done_early(name: str) -> np.ndarray:
        chosen = np.flatnonzero(of_class(f"{name}, early") | of_class(f"{name}, late"))
        done = [GRID.rise(half[index : index + 1] / 10)[index, 0] for index in chosen]
        return np.array(done) / (0.5 * GRID.asymptote[chosen])

    # A rise as t^k has 0.1^k of its half by then: at least 0.18 for k up to 3/4, about 0.1 for 1, at most 0.06 from 1.3 on.
    assert np.median(done_early("stretched")) > np.median(done_early("exponential")) > np.median(done_early("S-shaped"))
    assert np.median(done_early("stretched")) > 0.18
    assert np.median(done_early("S-shaped")) < 0.04


def test_neighbours_on_the_grid_are_not_the_same():
    chosen = TABLE[RISES]
    gaps = np.abs(chosen[:, None, ::50] - chosen[None, :, ::50]).max(axis=2)
    np.fill_diagonal(gaps, np.inf)
    assert gaps.min() > 1e-4
