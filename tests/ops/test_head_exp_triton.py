"""The one-pass product as operators of torch: registration, launch shapes, what is compiled ahead."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from grpo_fast.ops import head_exp_triton, jit
from grpo_fast.ops.head_exp_triton import (
    _launch_shape,
    aot_calls,
    head_exp_again,
    head_exp_fwd,
    head_target_logits,
)
from grpo_fast.ops.head_shapes import Tile
from grpo_fast.ops.jit import Target
from tests.ops.conftest import Launch
from tests.ops.test_head_exp import TILE, case

HEADS = {"qwen2.5-0.5b": (896, 151936), "qwen2.5-1.5b": (1536, 151936), "qwen2.5-7b": (3584, 152064), "llama-3": (4096, 128256)}


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logits_dtype": torch.bfloat16}])
def test_the_operators_are_well_registered(options: dict[str, object], device: torch.device) -> None:
    rows, head, targets = case(device, **options)
    numbers, exp = head.numbers, torch.zeros(3, 72, device=device)
    torch.library.opcheck(head_target_logits, (rows, head.weight, None, targets, *numbers))
    ref = head_target_logits(rows, head.weight, None, targets, *numbers)
    for store, entropy in ((exp, True), (None, False)):
        flags = (True, entropy, [int(number) for number in TILE])
        torch.library.opcheck(head_exp_fwd, (rows, head.weight, None, targets, ref, store, *numbers, *flags))
    sums = torch.full((2, 3), 1e30, device=device)
    torch.library.opcheck(head_exp_again, (rows, head.weight, None, targets, ref, sums, exp, *numbers, True))


def test_programs() -> None:
    walking, each = Tile(128, 256, 64, 3, 4, 8, persistent=True), Tile(128, 128, 64, 1, 3, 8, persistent=False)
    where = Target(90, num_sms=132)
    assert _launch_shape(where, walking, 8192, 151936, descriptors=True)[2:] == (132, 594)
    assert _launch_shape(where, walking, 128, 300, descriptors=True)[2:] == (2, 2)
    assert _launch_shape(where, each, 129, 257, descriptors=False)[2:] == (6, 3)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_calls_to_compile_ahead_launch_on_nothing(
    arch: int, launches_of: Callable[..., list[Launch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("_head_exp_again_kernel", "_head_exp_fwd_kernel", "_head_exp_sum_kernel", "_head_target_kernel")
    monkeypatch.setattr(head_exp_triton, "target", lambda device: Target(arch, 132))
    launches = launches_of(head_exp_triton, names)
    for call in aot_calls().values():
        sums = call()
        assert (sums.shape[1], sums.device.type) == (8192, "meta")
    assert {name for name, *_ in launches} == set(names)
    products = [(values, flags) for name, values, flags in launches if name == "_head_exp_fwd_kernel"]
    kinds = {(values[2] is None, values[7] is None, flags["SOFTCAP"], flags["DESCRIPTORS"]) for values, flags in products}
    assert {kind[:2] for kind in kinds} == {(False, False), (False, True), (True, False), (True, True)}
    assert {kind[2] for kind in kinds} == {False, True}
    assert {kind[3] for kind in kinds} == ({False} if arch == 80 else {False, True})


@pytest.mark.parametrize("name", HEADS)
def test_common_heads_are_what_is_compiled_ahead(name: str) -> None:
    # All a kernel is specialised for, beside its constants, is whether a number is a multiple of 16.
    assert all(size % 16 == 0 for size in HEADS[name])
    assert jit.INTERPRETED_ARCH == 90
