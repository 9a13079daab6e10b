"""The numbers that the kernels of the policy loss make, on a GPU or through Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from grpo_fast.ops import policy_loss_triton
from grpo_fast.ops.loss_spec import LossBatch, LossSpec, PolicyCoefficients, PolicyMetrics
from grpo_fast.ops.policy_loss import policy_coefficients
from tests.ops.loss_cases import EXTRAS, SPECS, case, extended

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

EVERYTHING = "weighted and masked"
LENGTHS = (700, 1, 0, 1024, 37, 300, 0, 2)
"""2,064 tokens: two whole tiles and a third of one sixteen; sequences under, at and over one tile."""


def moved(values: Any, device: torch.device) -> Any:
    if isinstance(values, LossBatch):
        return LossBatch(*(moved(value, device) for value in values))
    return values.to(device) if isinstance(values, torch.Tensor) else values


def on_kernels(
    logprobs: torch.Tensor, entropy: torch.Tensor | None, batch: LossBatch, spec: LossSpec, device: torch.device
) -> PolicyCoefficients:
    found = policy_coefficients(
        moved(logprobs, device), moved(batch, device), spec=spec, entropy=moved(entropy, device), impl="triton"
    )
    return PolicyCoefficients(found.loss.cpu(), found.logprobs.cpu(), moved(found.entropy, torch.device("cpu")), found.metrics)


def exactly(batch: LossBatch) -> LossBatch:
    """In float64, where it is floating point."""
    raised = (v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in batch)
    return LossBatch(*raised)


@pytest.mark.parametrize(
    "extra", [pytest.param(extra, marks=[pytest.mark.slow] * (extra not in ("plain", EVERYTHING))) for extra in EXTRAS]
)
@pytest.mark.parametrize("name", SPECS)
def test_errors_keep_to_the_budget(name: str, extra: str, device: torch.device) -> None:
    spec = SPECS[name]
    errors: dict[str, list[torch.Tensor]] = {"found": [], "reference": []}
    allowance = []
    for seed in range(3):
        spread = 0.02 if spec.importance_sampling_level == "sequence_sum" else 0.4
        logprobs, entropy, batch = case(torch.float32, lengths=LENGTHS, seed=seed, spread=spread)
        batch = extended(batch, extra)
        truth = policy_coefficients(logprobs.double(), exactly(batch), spec=spec, entropy=entropy.double())
        results = {
            "found": on_kernels(logprobs, entropy, batch, spec, device),
            "reference": policy_coefficients(logprobs, batch, spec=spec, entropy=entropy, impl="torch"),
        }
        for which, result in results.items():
            assert result.loss.dtype == result.logprobs.dtype == torch.float32
            each = [result.loss - truth.loss, (result.logprobs - truth.logprobs).abs().max()]
            each += (result.metrics.values.cpu() - truth.metrics.values).unbind()
            errors[which].append(torch.stack(each).abs())
        half_ulp = torch.stack([truth.loss, truth.logprobs.abs().max(), *truth.metrics.values]).abs() * 2**-24
        allowance.append(half_ulp)
        if spec.entropy_coef:
            torch.testing.assert_close(results["found"].entropy, truth.entropy.float(), rtol=2**-23, atol=0)
    found, reference = (torch.stack(errors[which]).amax(0) for which in ("found", "reference"))
    budget = 4 * reference + torch.stack(allowance).amax(0)
    assert (found <= budget).all(), (name, extra, found / budget)


def test_the_inputs_are_telling() -> None:
    for name, spec in SPECS.items():
        logprobs, entropy, batch = case(torch.float32, lengths=LENGTHS)
        metrics = policy_coefficients(logprobs, batch, spec=spec, entropy=entropy).metrics
        assert (batch.advantages == 0).any()
        assert metrics.ratio_min < 1 < metrics.ratio_max
        if spec.surrogate == "clip" and spec.importance_sampling_level == "token":
            assert metrics.clip_low > 100
            assert 100 < metrics.clip_high < metrics.num_ratios - 1000, name


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 1023, 1024, 1025, 2047, 2049])
@pytest.mark.parametrize("name", ["kl", "gspo kl"])
def test_every_length_is_covered(name: str, num_tokens: int, device: torch.device) -> None:
    logprobs, entropy, batch = case(torch.float32, lengths=(num_tokens,))
    found = on_kernels(logprobs, entropy, batch, SPECS[name], device)
    expected = policy_coefficients(logprobs, batch, spec=SPECS[name], entropy=entropy, impl="torch")
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.metrics.values.cpu(), expected.metrics.values, rtol=1e-5, atol=1e-6)


def test_programs_that_walk_several_tiles_change_no_coefficient(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    logprobs, entropy, batch = case(torch.float32, lengths=(3000, 2077))
    one = on_kernels(logprobs, entropy, batch, SPECS["kl"], device)
    monkeypatch.setattr(policy_loss_triton, "_MAX_PROGRAMS", 2)
    assert policy_loss_triton._launch_shape(5077) == (2, 3)
    several = on_kernels(logprobs, entropy, batch, SPECS["kl"], device)
    assert torch.equal(one.logprobs, several.logprobs)
    torch.testing.assert_close(one.loss, several.loss, rtol=2**-23, atol=0)
    torch.testing.assert_close(one.metrics.values, several.metrics.values, rtol=2**-23, atol=0)


@pytest.mark.parametrize("name", SPECS)
def test_nothing_or_only_masked_tokens(name: str, device: torch.device) -> None:
    nothing = PolicyMetrics(torch.tensor([0.0] * 7 + [math.inf, -math.inf]))
    for lengths in ((0, 0, 0), (), (5, 0, 20)):
        logprobs, entropy, batch = case(torch.float32, lengths=lengths)
        batch = batch._replace(token_mask=torch.zeros(len(logprobs), dtype=torch.bool))
        found = on_kernels(logprobs * math.nan, entropy * math.nan, batch, SPECS[name], device)
        assert found.loss == 0
        assert (found.logprobs == 0).all()
        assert found.logprobs.shape == logprobs.shape
        assert torch.equal(found.metrics.values.cpu(), nothing.values)


@pytest.mark.parametrize("name", SPECS)
def test_a_repeated_call_is_bitwise_the_same(name: str, device: torch.device) -> None:
    logprobs, entropy, batch = case(torch.float32, lengths=LENGTHS)
    first, second = (on_kernels(logprobs, entropy, batch, SPECS[name], device) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.logprobs, second.logprobs)
    assert torch.equal(first.metrics.values, second.metrics.values)


@pytest.mark.parametrize("name", SPECS)
def test_a_coefficient_does_not_depend_on_the_rest_of_the_batch(name: str, device: torch.device) -> None:
    logprobs, entropy, batch = case(torch.float32, lengths=(1, 2049, 40))
    whole = on_kernels(logprobs, entropy, batch, SPECS[name], device)
    alone = batch.tokens(1, 2050)._replace(
        sequence_index=torch.zeros(2049, dtype=torch.long),
        advantages=batch.advantages[1:2],
        loss_weights=batch.loss_weights[1:2],
    )
    found = on_kernels(logprobs[1:2050], entropy[1:2050], alone, SPECS[name], device)
    assert torch.equal(found.logprobs, whole.logprobs[1:2050])


@pytest.mark.parametrize("name", SPECS)
def test_on_policy_the_ratio_is_one_bit_for_bit(name: str, device: torch.device) -> None:
    logprobs, entropy, batch = case(torch.float32, lengths=LENGTHS)
    results = [
        on_kernels(logprobs, entropy, batch._replace(old_logprobs=old), SPECS[name], device) for old in (None, logprobs.clone())
    ]
    for result in results:
        assert result.metrics.ratio_min == result.metrics.ratio_max == 1.0
        assert result.metrics.ratio_sum == result.metrics.num_ratios
    assert torch.equal(results[0].loss, results[1].loss)
    assert torch.equal(results[0].logprobs, results[1].logprobs)


EXTREMES = torch.tensor([-200.0, -104.0, -89.0, -80.0, -30.0, -1e-6, 0.0, 1e-6, 30.0, 80.0, 88.0, 89.0, 104.0, 200.0])


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("name", SPECS)
def test_extreme_ratios_are_those_of_the_reference(name: str, sign: float, device: torch.device) -> None:
    spec = SPECS[name]
    tokens = len(EXTREMES)
    old = torch.full((tokens,), -2.0)
    batch = LossBatch(
        torch.arange(tokens),
        torch.full((tokens,), sign),
        torch.full((tokens,), 0.5),
        old_logprobs=old,
        ref_logprobs=old + 0.25,
        num_items_in_batch=1.0,
    )
    logprobs, entropy = old + EXTREMES, torch.zeros(tokens)
    found = on_kernels(logprobs, entropy, batch, spec, device).logprobs
    reference = policy_coefficients(logprobs, batch, spec=spec, entropy=entropy, impl="torch").logprobs
    truth = policy_coefficients(logprobs.double(), exactly(batch), spec=spec, entropy=entropy.double()).logprobs
    assert torch.equal(found.isnan(), reference.isnan())
    assert torch.equal(found.isinf(), reference.isinf())
    finite = found.isfinite()
    assert finite[3:10].all()
    # An exponent of 80 is rounded by half an ulp, 4e-6, whoever does it; 1 - e^0.25 quadruples what exp is off by.
    budget = 4 * (reference - truth).abs() + truth.abs() * (2 + EXTREMES.abs()) * 2**-22 + 2**-126
    error = (found - truth).abs()
    assert (error <= budget)[finite].all(), (error / budget)[finite]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_an_overflowing_ratio_is_not_hidden_by_the_clip(device: torch.device) -> None:
    batch = LossBatch(torch.zeros(2, dtype=torch.long), torch.ones(1), torch.ones(1), old_logprobs=torch.zeros(2))
    found = on_kernels(torch.tensor([100.0, 0.1]), None, batch, LossSpec(), device)
    assert found.logprobs[0].isnan()
    assert found.logprobs[1].isfinite()
    assert found.metrics.ratio_max == math.inf
    assert found.metrics.clip_high == 1


@pytest.mark.parametrize("place", ["logprobs", "old_logprobs", "advantages"])
@pytest.mark.parametrize("name", SPECS)
def test_a_nan_is_seen(name: str, place: str, device: torch.device) -> None:
    logprobs, entropy, batch = case(torch.float32)
    if place == "logprobs":
        logprobs[3] = math.nan
    else:
        values = getattr(batch, place).clone()
        values[0 if place == "advantages" else 3] = math.nan
        batch = batch._replace(**{place: values})
    found = on_kernels(logprobs, entropy, batch, SPECS[name], device)
    expected = policy_coefficients(logprobs, batch, spec=SPECS[name], entropy=entropy, impl="torch")
    assert found.loss.isnan()
    assert torch.equal(found.logprobs.isnan(), expected.logprobs.isnan())
    assert torch.equal(found.metrics.values.isnan().cpu(), expected.metrics.values.isnan())


@pytest.mark.parametrize("name", ["kl", "gspo kl"])
def test_other_types_and_layouts_of_the_inputs(name: str, device: torch.device) -> None:
    logprobs, entropy, batch = case(torch.float32, lengths=LENGTHS)
    logprobs = logprobs.half().float()
    expected = on_kernels(logprobs, entropy, batch, SPECS[name], device)
    strided = {
        key: torch.stack([value, value], 1)[:, 0] for key, value in batch._asdict().items() if isinstance(value, torch.Tensor)
    }
    variants = [
        (logprobs.half(), batch._replace(sequence_index=batch.sequence_index.int())),
        (logprobs, batch._replace(**strided)),
    ]
    for variant, other in variants:
        found = on_kernels(variant, entropy, other, SPECS[name], device)
        assert torch.equal(found.logprobs, expected.logprobs)
        assert torch.equal(found.loss, expected.loss)
    assert not strided["old_logprobs"].is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_sizes(name: str, dtype: torch.dtype, device: torch.device) -> None:
    lengths = tuple(1 + 977 * i % 8191 for i in range(64))
    spread = 0.005 if SPECS[name].importance_sampling_level == "sequence_sum" else 0.4
    logprobs, entropy, batch = case(torch.float32, lengths=lengths, spread=spread)
    batch, logprobs = extended(batch, "weighted and masked"), logprobs.to(dtype)
    found = on_kernels(logprobs, entropy, batch, SPECS[name], device)
    reference = policy_coefficients(logprobs, batch, spec=SPECS[name], entropy=entropy, impl="torch")
    truth = policy_coefficients(logprobs.double(), exactly(batch), spec=SPECS[name], entropy=entropy.double())
    for ours, base, true in zip(found[:2], reference[:2], truth[:2], strict=True):
        assert (ours - true).abs().max() <= 4 * (base - true).abs().max() + true.abs().max() * 2**-24
