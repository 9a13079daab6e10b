from __future__ import annotations

import logging

import pytest
import torch

from grpo_fast.ops import dispatch
from grpo_fast.ops.dispatch import Implementation, resolve

CPU, META = torch.device("cpu"), torch.device("meta")


def double(x: int) -> int:
    return 2 * x


def shift(x: int) -> int:
    return x << 1


def needs_meta(device: torch.device) -> str | None:
    return None if device.type == "meta" else "it runs on meta tensors only"


TABLE = {"fast": Implementation(shift, needs_meta), "torch": Implementation(double)}


def test_auto_takes_the_first_that_can_run() -> None:
    assert resolve("op", TABLE, impl="auto", device=CPU) is double
    assert resolve("op", TABLE, impl="auto", device=META) is shift


def test_a_name_gets_that_one() -> None:
    assert resolve("op", TABLE, impl="torch", device=META) is double
    assert resolve("op", TABLE, impl="fast", device=META) is shift


def test_an_unknown_name_is_an_error_that_names_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"op: no implementation 'cuda'; .* one of \['torch'\]"):
        resolve("op", TABLE, impl="cuda", device=CPU)


def test_one_that_cannot_run_is_an_error_with_its_reason() -> None:
    with pytest.raises(ValueError, match=r"'fast' cannot run on cpu: it runs on meta .* \['torch'\]"):
        resolve("op", TABLE, impl="fast", device=CPU)
    with pytest.raises(ValueError, match=r"no implementation runs on cpu \(fast: it runs on meta"):
        resolve("op", {"fast": TABLE["fast"]}, impl="auto", device=CPU)


def test_auto_says_once_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._announced.discard(("logged op", "torch", "cpu"))
    with caplog.at_level(logging.INFO, logger="grpo_fast.ops.dispatch"):
        resolve("logged op", TABLE, impl="torch", device=CPU)
        assert not caplog.records
        for _ in range(3):
            resolve("logged op", TABLE, impl="auto", device=CPU)
    assert [record.message for record in caplog.records] == ["logged op: impl='auto' runs 'torch' on cpu"]
