from __future__ import annotations

import pytest
import torch

from grpo_fast.metrics import MetricSums
from grpo_fast.ops import LossBatch, LossSpec, PolicyMetrics
from grpo_fast.ops.sequence_weights import gamma_weights
from grpo_fast.train.policy_metrics import add_policy_metrics, add_sequence_metrics

LOGPROBS = torch.tensor([-1.0, -2.0, -0.5, -0.7, -3.0])
BATCH = LossBatch(
    torch.tensor([0, 0, 2, 2, 3]), torch.tensor([1.0, -1.0, -0.5, 0.3]), torch.ones(4), old_logprobs=LOGPROBS + 0.3
)


@pytest.mark.parametrize(
    ("surrogate", "names"),
    [
        ("clip", {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}),
        ("cispo", {"cispo_clip_ratio"}),
        ("vespo", set()),
    ],
)
def test_parts_add_up_to_means(surrogate: str, names: set[str]) -> None:
    sums = MetricSums()
    add_policy_metrics(sums, PolicyMetrics(torch.tensor([2.0, 2, 1, 0, 0.5, 3, 2.5, 0.5, 2.0])), surrogate=surrogate)
    add_policy_metrics(sums, PolicyMetrics(torch.tensor([2.0, 2, 0, 1, 0.25, 1, 0.5, 0.25, 0.25])), surrogate=surrogate)
    found = {name: value for name, value in sums.compute().items() if not name.startswith("_")}
    assert found.keys() == {"entropy", "kl"} | names
    assert (found["entropy"], found["kl"]) == (1.0, 0.1875)
    assert all(found[name] == (0.5 if "region" in name else 0.25) for name in names)


def test_weights_of_sequences_are_means_over_those_with_tokens() -> None:
    sums, spec = MetricSums(), LossSpec(surrogate="vespo", off_policy_mask_threshold=0.2)
    for start, stop in ((0, 2), (2, 5)):
        add_sequence_metrics(sums, LOGPROBS[start:stop], BATCH.tokens(start, stop), spec)
    found = sums.compute()
    weights = gamma_weights(LOGPROBS, BATCH, spec)
    assert found["vespo/phi_seq_mean"] == pytest.approx(weights[[0, 2, 3]].mean().item(), rel=1e-6)
    assert found["sampling/off_policy_mask/masked_fraction"] == pytest.approx(1 / 3)


def test_a_loss_that_weighs_no_sequences_reports_none() -> None:
    sums = MetricSums()
    add_sequence_metrics(sums, LOGPROBS, BATCH, LossSpec())
    assert sums.compute() == {}
