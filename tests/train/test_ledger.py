"""Memory is counted when it comes and when it goes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from grpo_fast.train.ledger import OTHER, Ledger
from tests.train.real_update import most_held


def test_views_are_no_memory_and_keep_what_they_see() -> None:
    with Ledger() as ledger:
        whole = torch.empty(1000)
        part = whole[:10]
        del whole
        grown = part + 1
        del part
        del grown
    assert ledger.held([OTHER]).tolist() == [[4000, 4040, 40, 0]]


def test_what_was_there_before_is_not_counted() -> None:
    before = torch.zeros(1000)
    with Ledger() as ledger:
        before.add_(1.0)
        made = before * 2
    assert ledger.held([OTHER]).tolist() == [[4000]]
    assert made.numel() == 1000


def test_kinds_are_told_apart() -> None:
    with Ledger() as ledger:
        with ledger.making("inner"):
            inner = torch.empty(10)
        outer = torch.empty(20)
        moved = torch.empty(30)
    ledger.rename([moved], "moved")
    assert ledger.now == 3
    assert ledger.held(["inner", OTHER, "moved"]).tolist() == [[40, 40, 40], [0, 80, 80], [0, 0, 120]]
    assert inner.numel() + outer.numel() == 30


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_forward_and_backward_hold_what_the_allocator_gives_out(fake: bool) -> None:
    def passes(scale: int) -> None:
        weights = [torch.ones(scale, scale, requires_grad=True) for _ in range(3)]
        rows = torch.ones(4 * scale, scale)
        for weight in weights:
            rows = torch.nn.functional.silu(rows @ weight)
        rows.sum().backward()

    real = most_held(lambda: passes(256))
    ledger = Ledger()
    if fake:
        with FakeTensorMode(), ledger:
            passes(256)
    else:
        with ledger:
            passes(256)
    [held] = ledger.held([OTHER])
    assert held.max() == pytest.approx(real, rel=0.01)
    assert held[-1] == 0
