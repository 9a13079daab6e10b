"""Inputs look like a trained model's, and what is said of them is exact."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.ops.cases import HeadCase, LossCase, Model
from benchmarks.ops.inputs import SEQUENCE_SPEC, TOKEN_SPEC, head_problem, head_rows, loss_problem

CPU = torch.device("cpu")
MODEL = Model("a small head", 256, 20_011)


@pytest.fixture(scope="module")
def rows():
    return head_rows(HeadCase(MODEL, 2048, dtype="float32"), CPU)


def test_entropy_is_distributed_as_in_a_reasoning_model(rows) -> None:
    """arXiv 2506.01939: more than half of the tokens under 0.01 nat, a fifth above 0.672."""
    assert 0.45 < (rows.entropy < 0.01).double().mean() < 0.65
    assert 0.15 < (rows.entropy > 0.672).double().mean() < 0.27
    assert rows.entropy.max() > 1.5


def test_targets_are_samples_of_the_distribution(rows) -> None:
    """So their mean surprise is the mean entropy, within the noise of 2048 draws; some are confident beyond float32."""
    assert abs(rows.logprobs.mean() + rows.entropy.mean()) < 0.08
    assert (rows.logprobs > math.log(0.9)).double().mean() > 0.6
    assert (rows.logprobs > -1e-8).any()
    assert rows.logprobs.min() < -4


def test_frequent_tokens_have_low_ids(rows) -> None:
    assert rows.targets.double().median() < MODEL.vocab_size / 10
    assert rows.targets.max() > MODEL.vocab_size / 2


def test_statistics_are_those_of_the_rounded_inputs() -> None:
    rows = head_rows(HeadCase(Model("", 33, 501), 64), CPU)
    assert rows.hidden.dtype == torch.bfloat16
    log_shares = (rows.hidden.double() @ rows.weight.double().T).log_softmax(1)
    torch.testing.assert_close(rows.logprobs, log_shares.gather(1, rows.targets[:, None])[:, 0])
    torch.testing.assert_close(rows.entropy, -(log_shares.exp() * log_shares).sum(1))


def test_rows_are_the_same_again() -> None:
    case = HeadCase(Model("", 33, 501), 64)
    one, other = (head_rows(case, CPU) for _ in range(2))
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("hidden", "weight", "targets", "logprobs"))


@pytest.mark.parametrize("objective", ["token", "sequence"])
def test_some_ratios_are_clipped_and_none_is_near_a_bound(rows, objective) -> None:
    case = HeadCase(MODEL, 2048, objective, dtype="float32", dead_share=0.25)
    problem = head_problem(case, rows)
    log_ratio = rows.logprobs - problem.batch.old_logprobs.double()
    margin, spec = 0.1, TOKEN_SPEC
    if objective == "sequence":
        log_ratio, margin, spec = log_ratio.view(16, -1).mean(1), 0.015, SEQUENCE_SPEC
    low, high = math.log(1 - spec.epsilon_low), math.log(1 + spec.epsilon_high)
    assert (log_ratio < low).any()
    assert (log_ratio > high).any()
    assert torch.minimum((log_ratio - low).abs(), (log_ratio - high).abs()).min() > margin
    assert (problem.batch.advantages == 0).double().mean() == 0.25
    assert len(problem.live) == 0.75 * 2048
    assert (problem.batch.advantages[problem.batch.sequence_index[problem.live].long()] != 0).all()


def test_every_row_is_alive_where_the_entropy_is_in_the_loss(rows) -> None:
    assert head_problem(HeadCase(MODEL, 2048, entropy=True, dead_share=0.5), rows).live is None


def test_rows_have_to_be_whole_groups(rows) -> None:
    with pytest.raises(ValueError, match="16 sequences in groups of 4"):
        head_problem(HeadCase(MODEL, 2050), rows)


def test_log_probabilities_of_the_loss_alone() -> None:
    problem = loss_problem(LossCase(4096), CPU)
    assert problem.logprobs.max() <= 0
    ratio = (problem.logprobs.detach() - problem.batch.old_logprobs).exp()
    assert 0.01 < ((ratio < 0.8) | (ratio > 1.28)).double().mean() < 0.2
