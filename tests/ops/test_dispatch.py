from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from grpo_fast.ops import dispatch, jit
from grpo_fast.ops.dispatch import Implementation, resolve, triton_kernels

CPU, META = torch.zeros(1), torch.zeros(1, device="meta")


def double(x: int) -> int:
    return 2 * x


def shift(x: int) -> int:
    return x << 1


def needs_meta(like: torch.Tensor) -> str | None:
    return None if like.device.type == "meta" else "it runs on meta tensors only"


def is_slow_on_few(like: torch.Tensor) -> str | None:
    return "slow on one number" if like.numel() == 1 else None


TABLE = {"fast": Implementation(shift, needs_meta), "torch": Implementation(double)}


def test_auto_takes_the_first_that_can_run() -> None:
    assert resolve("op", TABLE, impl="auto", like=CPU) is double
    assert resolve("op", TABLE, impl="auto", like=META) is shift


def test_a_name_gets_that_one() -> None:
    assert resolve("op", TABLE, impl="torch", like=META) is double
    assert resolve("op", TABLE, impl="fast", like=META) is shift


def test_an_unknown_name_is_an_error_that_names_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"op: no implementation 'cuda'; .* one of \['torch'\]"):
        resolve("op", TABLE, impl="cuda", like=CPU)


def test_one_that_cannot_run_is_an_error_with_its_reason() -> None:
    with pytest.raises(ValueError, match=r"'fast' cannot run on cpu float32: it runs on meta .* \['torch'\]"):
        resolve("op", TABLE, impl="fast", like=CPU)
    with pytest.raises(ValueError, match=r"no implementation runs on cpu float32 \(fast: it runs on meta"):
        resolve("op", {"fast": TABLE["fast"]}, impl="auto", like=CPU)


def test_auto_passes_over_what_has_a_drawback_and_a_name_does_not() -> None:
    table = {"fast": Implementation(shift, drawback=is_slow_on_few), "torch": Implementation(double)}
    assert resolve("op", table, impl="auto", like=CPU) is double
    assert resolve("op", table, impl="auto", like=torch.zeros(2)) is shift
    assert resolve("op", table, impl="fast", like=CPU) is shift
    with pytest.raises(ValueError, match=r"no implementation runs on cpu float32 \(fast: slow on one number\)"):
        resolve("op", {"fast": table["fast"]}, impl="auto", like=CPU)


def test_kernels_say_what_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def table() -> dict[str, Implementation[Callable[[int], int]]]:
        return {"triton": triton_kernels(shift), "torch": Implementation(double)}

    monkeypatch.setattr(jit, "obstacle", lambda like: "no device")
    with pytest.raises(ValueError, match=r"impl='triton' cannot run on cpu float32: no device; .*\['torch'\]"):
        resolve("op", table(), impl="triton", like=CPU)
    monkeypatch.setattr(jit, "obstacle", lambda like: None)
    monkeypatch.setattr(jit, "drawback", is_slow_on_few)
    assert resolve("op", table(), impl="auto", like=CPU) is double
    assert resolve("op", table(), impl="auto", like=torch.zeros(2)) is shift
    assert resolve("op", table(), impl="triton", like=CPU) is shift


def test_auto_says_once_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._announced.discard(("logged op", "torch", "cpu"))
    with caplog.at_level(logging.INFO, logger="grpo_fast.ops.dispatch"):
        resolve("logged op", TABLE, impl="torch", like=CPU)
        assert not caplog.records
        for _ in range(3):
            resolve("logged op", TABLE, impl="auto", like=CPU)
    assert [record.message for record in caplog.records] == ["logged op: impl='auto' runs 'torch' on cpu"]


def test_it_breaks_no_graph(caplog: pytest.LogCaptureFixture) -> None:
    table = {"triton": triton_kernels(torch.neg), "torch": Implementation(torch.square)}
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: resolve("quiet op", table, impl="auto", like=x)(x), backend="eager", fullgraph=True)
    with caplog.at_level(logging.INFO, logger="grpo_fast.ops.dispatch"):
        assert compiled(torch.full((), 3.0, dtype=torch.float64)) == 9.0
    assert ("quiet op", "torch", "cpu") not in dispatch._announced
