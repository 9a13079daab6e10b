from __future__ import annotations

import importlib
import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_fast.ops import native
from grpo_fast.ops.group_advantage import GroupAdvantage, _group_advantage_fwd, _launch_shape, group_advantage

module = importlib.import_module("grpo_fast.ops.group_advantage")  # the package has the function under that name
NAN = float("nan")
REWARDS = [
    [1.0, 0.0, 0.0, 1.0],
    [0.1, 0.1, 0.1, 0.1],
    [NAN, 2.0, -1.0, 0.5],
    [NAN, NAN, 3.0, NAN],
    [NAN, NAN, NAN, NAN],
    [0.3, 0.30000004172325134, 0.3, 0.3],
]


def expected(rewards: list[list[float]], scale: str, leave_one_out: bool) -> list[list[float]]:
    every = [Fraction(r) for row in rewards for r in row if not math.isnan(r)]
    spread = float(statistics.stdev(every)) if scale == "batch" and len(every) > 1 else 0.0
    result = []
    for row in rewards:
        known = [Fraction(r) for r in row if not math.isnan(r)]
        if len(known) < 2:
            result.append([0.0] * len(row))
            continue
        total, divisor = sum(known), 1.0
        if scale != "none":
            divisor = (float(statistics.stdev(known)) if scale == "group" else spread) + 1e-4
        values = []
        for r in row:
            if math.isnan(r):
                values.append(0.0)
                continue
            baseline = (total - Fraction(r)) / (len(known) - 1) if leave_one_out else total / len(known)
            values.append(float(Fraction(r) - baseline) / divisor)
        result.append(values)
    return result


def many_rewards(num_prompts: int, group_size: int, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small numbers that repeat, so that groups without variance occur, and every seventh missing."""
    generator = torch.Generator().manual_seed(group_size)
    rewards = torch.randint(0, 3, (num_prompts, group_size), generator=generator).to(dtype) / 3
    rewards += torch.randn(num_prompts, group_size, generator=generator, dtype=torch.float64).to(dtype) * (rewards > 0.5)
    rewards.view(-1)[3::7] = math.nan
    return rewards


NATIVE = pytest.param("native", marks=pytest.mark.skipif(native.load() != "", reason=native.load()))
HOST = pytest.mark.parametrize("impl", ["torch", NATIVE])


@HOST
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_the_formula(scale: str, leave_one_out: bool, dtype: torch.dtype, impl: str) -> None:
    rewards = torch.tensor(REWARDS, dtype=dtype)
    result = group_advantage(rewards, scale_rewards=scale, leave_one_out=leave_one_out, impl=impl)
    assert result.advantages.dtype == dtype
    truth = torch.tensor(expected(rewards.double().tolist(), scale, leave_one_out), dtype=torch.float64)
    torch.testing.assert_close(result.advantages.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-12)


@HOST
def test_group_statistics(impl: str) -> None:
    result = group_advantage(torch.tensor(REWARDS), impl=impl)
    assert result.zero_variance.tolist() == [False, True, False, True, True, False]
    torch.testing.assert_close(result.mean, torch.tensor([0.5, 0.1, 0.5, 3.0, NAN, 0.3]), equal_nan=True)
    torch.testing.assert_close(
        result.std, torch.tensor([3**-0.5, 0.0, 1.5, NAN, NAN, 1.4901e-08]), equal_nan=True, rtol=1e-4, atol=1e-9
    )


@HOST
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exact_zeros(scale: str, leave_one_out: bool, dtype: torch.dtype, impl: str) -> None:
    rewards = torch.tensor([[0.1] * 7, [1 / 3] * 7, [1e6 + 0.1] * 7, [0.0, 1.0] * 3 + [0.5]], dtype=dtype)
    result = group_advantage(rewards, scale_rewards=scale, leave_one_out=leave_one_out, impl=impl)
    assert (result.advantages[:3] == 0).all()
    assert not result.advantages[:3].signbit().any()
    assert (result.advantages[3] != 0).sum() == 6
    assert result.zero_variance.tolist() == [True, True, True, False]


@HOST
def test_a_padded_group_equals_the_group_itself(impl: str) -> None:
    short = group_advantage(torch.tensor([[1.0, 0.0, 0.5]]), impl=impl).advantages
    padded = group_advantage(torch.tensor([[1.0, 0.0, 0.5, NAN, NAN], [1.0, 2.0, 3.0, 4.0, 5.0]]), impl=impl).advantages
    assert torch.equal(padded[:1, :3], short)
    assert (padded[0, 3:] == 0).all()


@HOST
def test_a_large_offset_costs_no_precision(impl: str) -> None:
    rewards = torch.tensor([[0.0, 1.0, 2.0, 5.0]])
    near, far = (group_advantage(rewards + offset, impl=impl).advantages for offset in (0, 2**20))
    assert torch.equal(near, far)


@given(
    st.lists(st.lists(st.one_of(st.just(NAN), st.floats(-1e6, 1e6, width=32)), min_size=3, max_size=3), min_size=1, max_size=5),
    st.sampled_from(["group", "batch", "none"]),
    st.booleans(),
)
@settings(max_examples=60)
def test_advantages_are_always_finite_and_centred(rewards: list[list[float]], scale: str, leave_one_out: bool) -> None:
    result = group_advantage(torch.tensor(rewards, dtype=torch.float64), scale_rewards=scale, leave_one_out=leave_one_out)
    assert result.advantages.isfinite().all()
    size = result.advantages.abs().sum(1).clamp(min=1.0)
    assert (result.advantages.sum(1).abs() <= 1e-4 * size).all()


def test_a_step_without_prompts() -> None:
    result = group_advantage(torch.zeros(0, 4), scale_rewards="batch")
    assert result.advantages.shape == (0, 4)
    assert result.zero_variance.shape == (0,)


def test_unusable_rewards_are_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.int64"):
        group_advantage(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        group_advantage(torch.zeros(3))
    with pytest.raises(TypeError, match=r"rewards are \[1\.0, 0\.0\]; give a tensor \(P, G\), or a list of groups"):
        group_advantage([1.0, 0.0])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"rewards are array\("):
        group_advantage(np.ones((2, 2)))
    with pytest.raises(ValueError, match="scale_rewards='std'"):
        group_advantage(torch.zeros(1, 3), scale_rewards="std")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompt 1, completion 0 is -inf"):
        group_advantage(torch.tensor([[0.0, 1.0], [-math.inf, 2.0]]))


def test_lists_of_groups_of_any_size_with_none() -> None:
    found = group_advantage([[1.0, None, 0.0], [2.0], [0.5, 0.25, NAN, 1.0]])
    padded = torch.tensor([[1.0, NAN, 0.0, NAN], [2.0, NAN, NAN, NAN], [0.5, 0.25, NAN, 1.0]], dtype=torch.float64)
    expected = group_advantage(padded)
    assert all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(found, expected, strict=True))
    assert found.advantages.dtype == torch.float64
    assert found.advantages[0, 0] > 0 > found.advantages[0, 2]
    assert group_advantage([]).advantages.shape == (0, 1)
    with pytest.raises(ValueError, match=r"\(2, 0\)"):
        group_advantage([[], []])


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_the_extension_equals_the_reference(scale: str, leave_one_out: bool, dtype: torch.dtype) -> None:
    flat = 0
    for shape in [(0, 4), (6, 4), (37, 7), (300, 8), (515, 16), (9, 1), (3, 1500), (1, 5000), (2049, 2)]:
        for holes in (True, False):
            rewards = many_rewards(*shape, dtype=dtype)
            rewards = rewards if holes else rewards.nan_to_num(0.5)
            options = {"scale_rewards": scale, "leave_one_out": leave_one_out}
            found = group_advantage(rewards, **options, impl="native")
            truth = group_advantage(rewards.double(), **options, impl="torch")
            for ours, exact in zip(found, truth, strict=True):
                assert ours.dtype == (torch.bool if exact.dtype == torch.bool else dtype)
                torch.testing.assert_close(
                    ours, exact.to(ours.dtype), rtol=4 * torch.finfo(dtype).eps, atol=1e-12, equal_nan=True
                )
            assert (found.advantages[found.zero_variance] == 0).all()
            flat += int(found.zero_variance.sum())
    assert flat > 100


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("scale", ["group", "batch"])
def test_threads_and_other_groups_change_no_bit(scale: str) -> None:
    rewards = many_rewards(5000, 16).nan_to_num(0.25)
    rewards[4000, 3] = NAN
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3, 3):
            torch.set_num_threads(count)
            found.append(group_advantage(rewards, scale_rewards=scale, impl="native").advantages)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
    if scale == "group":
        assert torch.equal(found[0][123:200], group_advantage(rewards[123:200], impl="native").advantages)
        strided = rewards.T.contiguous().T
        assert torch.equal(found[0], group_advantage(strided, impl="native").advantages)


@pytest.mark.usefixtures("native_library")
def test_the_extension_takes_what_it_can_compute() -> None:
    with pytest.raises(ValueError, match="float32 or float64, here they are bfloat16"):
        group_advantage(torch.zeros(2, 4, dtype=torch.bfloat16), impl="native")
    for arguments, reason in (
        ((torch.zeros(2, 4, dtype=torch.int32), "group"), "float32 or float64"),
        ((torch.zeros(2, 0), "group"), "G at least 1"),
        ((torch.zeros(2, 4), "std"), "scale_rewards=std"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            native.call("group_advantage", *arguments, False, 1e-4)


SHAPES = [(6, 4), (37, 7), (300, 8), (515, 16), (9, 1), (3, 1500), (1, 4096), (2049, 2)]


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_kernels_keep_to_the_error_budget(scale: str, leave_one_out: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Against rational numbers; float64 inside makes the error of the float32 reference that of one rounding."""
    flat = 0
    for shape in SHAPES:
        rewards = many_rewards(*shape, dtype=dtype)
        options = {"scale_rewards": scale, "leave_one_out": leave_one_out}
        found = GroupAdvantage(*(value.cpu() for value in group_advantage(rewards.to(device), **options, impl="triton")))
        reference = group_advantage(rewards, **options, impl="torch")
        truth = torch.tensor(expected(rewards.double().tolist(), scale, leave_one_out), dtype=torch.float64)
        assert found.advantages.dtype == found.mean.dtype == found.std.dtype == dtype
        half_ulp = torch.finfo(dtype).eps / 2 * truth.abs().amax()
        error, base = ((result.advantages.double() - truth).abs().amax() for result in (found, reference))
        assert error <= 4 * base + half_ulp, shape
        assert torch.equal(found.zero_variance, reference.zero_variance)
        assert (found.advantages[found.zero_variance] == 0).all()
        for name in ("mean", "std"):
            ours, theirs = getattr(found, name), getattr(reference, name)
            torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=1e-15, equal_nan=True)
        flat += int(found.zero_variance.sum())
    assert flat > 100


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_many_parts_of_many_tiles_give_the_same(scale: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    rewards = many_rewards(2100, 5).to(device)
    usual = group_advantage(rewards, scale_rewards=scale, impl="triton")
    monkeypatch.setattr(module, "_MAX_PARTS", 4)
    fewer = group_advantage(rewards, scale_rewards=scale, impl="triton")
    assert _launch_shape(2100, 5, "batch").num_parts == 4
    torch.testing.assert_close(usual.advantages, fewer.advantages, rtol=2e-7, atol=0)
    if scale != "batch":
        assert torch.equal(usual.advantages, fewer.advantages)


def test_a_group_does_not_depend_on_the_others_and_a_repeat_is_bitwise_the_same(device: torch.device) -> None:
    for size in (7, 8):
        rewards = many_rewards(400, size).to(device)
        whole, again = (group_advantage(rewards, impl="triton") for _ in range(2))
        part = group_advantage(rewards[123:200], impl="triton")
        assert torch.equal(whole.advantages, again.advantages)
        assert torch.equal(whole.advantages[123:200], part.advantages)
    every = [group_advantage(rewards, scale_rewards="batch", impl="triton").advantages for _ in range(2)]
    assert torch.equal(*every)


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_kernels_of_nothing(scale: str, leave_one_out: bool, device: torch.device) -> None:
    options = {"scale_rewards": scale, "leave_one_out": leave_one_out, "impl": "triton"}
    assert group_advantage(torch.zeros(0, 4, device=device), **options).advantages.shape == (0, 4)
    nothing = group_advantage(torch.full((3, 4), NAN, device=device), **options)
    assert (nothing.advantages == 0).all()
    assert nothing.zero_variance.all()
    assert nothing.mean.isnan().all()
    assert nothing.std.isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_an_infinite_reward_that_nothing_checked_is_seen_in_its_group(device: torch.device) -> None:
    rewards = torch.tensor([[0.0, 1.0, math.inf, 2.0], [0.0, 1.0, 0.0, 2.0]], device=device)
    advantages = _group_advantage_fwd(rewards, "group", False)[0]
    assert advantages[0].isnan().all()
    assert torch.equal(advantages[1], group_advantage(rewards[1:], impl="triton").advantages[0])


def test_strided_rewards(device: torch.device) -> None:
    rewards = many_rewards(20, 8).to(device)
    expected = group_advantage(rewards, impl="triton").advantages
    assert torch.equal(group_advantage(rewards.T.contiguous().T, impl="triton").advantages, expected)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_the_operator_is_well_registered(scale: str, device: torch.device) -> None:
    torch.library.opcheck(_group_advantage_fwd, (many_rewards(5, 3).to(device), scale, True))
    torch.library.opcheck(_group_advantage_fwd, (many_rewards(1100, 4).to(device), scale, False))


@pytest.mark.parametrize("impl", ["triton", NATIVE, "torch", "auto"])
def test_it_compiles_without_a_graph_break(impl: str, device: torch.device) -> None:
    rewards = many_rewards(30, 8).to(device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda r: group_advantage(r, impl=impl), backend="aot_eager", fullgraph=True)
    for found, plain in zip(compiled(rewards), group_advantage(rewards, impl=impl), strict=True):
        assert torch.equal(found.nan_to_num(9.0), plain.nan_to_num(9.0))


def test_launch_shapes() -> None:
    assert _launch_shape(64, 8, "group") == (128, 8, 0)
    assert _launch_shape(64, 8, "batch") == (64, 8, 0)
    assert _launch_shape(300, 12, "batch") == (64, 16, 4)
    assert _launch_shape(10**6, 8, "batch") == (128, 8, 256)
    assert _launch_shape(10, 3000, "none") == (1, 4096, 0)
    assert _launch_shape(0, 1, "batch") == (1, 1, 0)


def test_a_group_too_large_for_a_program_is_named(device: torch.device) -> None:
    with pytest.raises(ValueError, match="groups of at most 4096, here they have 4097"):
        group_advantage(torch.zeros(1, 4097, device=device), impl="triton")


def test_calls_to_compile_ahead_launch_on_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[object, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *values, **flags: launched.append((flags.get("SCALE"), flags.get("PADDED"), flags.get("DOUBLE")))

    monkeypatch.setattr(module, "_group_advantage_kernel", Recorder())
    monkeypatch.setattr(module, "_reward_moments_kernel", Recorder())
    for call in module.aot_calls().values():
        assert call()[0].device.type == "meta"
    assert {("group", True, False), ("group", False, False), ("batch", False, True), (None, None, None)} <= set(launched)


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [8, 12, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_real_sizes(scale: str, dtype: torch.dtype, group_size: int, device: torch.device) -> None:
    rewards = many_rewards(2**17, group_size).to(dtype)
    found = group_advantage(rewards.to(device), scale_rewards=scale, impl="triton")
    expected = group_advantage(rewards, scale_rewards=scale, impl="torch")
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.advantages.cpu(), expected.advantages, rtol=eps, atol=1e-12)
    assert torch.equal(found.zero_variance.cpu(), expected.zero_variance)
