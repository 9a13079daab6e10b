from __future__ import annotations

import math

import pytest
import torch

from grpo_fast.ops.loss_spec import TOKEN_FIELDS, LossBatch, LossSpec, PolicyMetrics, check_constants, check_needs, check_shapes

BATCH = LossBatch(
    torch.tensor([0, 0, 1, 3]),
    torch.ones(4),
    torch.ones(4),
    old_logprobs=torch.arange(4.0),
    ref_logprobs=torch.arange(4.0) + 10,
    num_items_in_batch=4.0,
    importance_weights=torch.arange(4.0) + 20,
    token_mask=torch.tensor([True, False, True, True]),
    sampling_logprobs=torch.arange(4.0) + 30,
    sampler_log_ratios=torch.zeros(4),
    entropy_weights=torch.arange(4.0) + 40,
)


def test_a_part_has_its_own_tokens_and_every_sequence() -> None:
    part = BATCH.tokens(1, 3)
    assert part.sequence_index.tolist() == [0, 1]
    assert part.old_logprobs.tolist() == [1.0, 2.0]
    assert part.ref_logprobs.tolist() == [11.0, 12.0]
    assert part.importance_weights.tolist() == [21.0, 22.0]
    assert part.token_mask.tolist() == [False, True]
    assert part.sampling_logprobs.tolist() == [31.0, 32.0]
    assert part.entropy_weights.tolist() == [41.0, 42.0]
    assert part.advantages is BATCH.advantages
    assert part.num_items_in_batch == 4.0
    bare = LossBatch(BATCH.sequence_index, BATCH.advantages, BATCH.loss_weights).tokens(0, 1)
    assert [getattr(bare, name) for name in TOKEN_FIELDS[1:]] == [None] * 6


def test_metrics_combine() -> None:
    parts = [
        PolicyMetrics(torch.tensor([2.0, 2, 1, 0, 0.5, 3, 2.5, 0.5, 2.0])),
        PolicyMetrics(torch.tensor([0.0, 0, 0, 0, 0, 0, 0, math.inf, -math.inf])),
        PolicyMetrics(torch.tensor([1.0, 1, 0, 1, 0.25, 1, 0.25, 0.25, 0.25])),
    ]
    whole = parts[0].combine(*parts[1:])
    assert {name: value.item() for name, value in whole.named().items()} == {
        "num_tokens": 3.0,
        "num_ratios": 3.0,
        "clip_low": 1.0,
        "clip_high": 1.0,
        "clip_region": 2.0,
        "kl_sum": 0.75,
        "entropy_sum": 4.0,
        "ratio_sum": 2.75,
        "ratio_min": 0.25,
        "ratio_max": 2.0,
    }
    assert all(torch.equal(getattr(whole, name), value) for name, value in whole.named().items())
    assert torch.equal(parts[0].combine().values, parts[0].values)


@pytest.mark.parametrize("name", TOKEN_FIELDS)
def test_a_token_field_of_another_length_is_named(name: str) -> None:
    check_shapes(torch.zeros(4, 7), BATCH)
    with pytest.raises(ValueError, match=rf"{name} has shape \(3,\); it must be \(4,\)"):
        check_shapes(torch.zeros(4), BATCH._replace(**{name: getattr(BATCH, name)[1:]}))


def test_shapes_of_sequences_and_type_of_the_mask() -> None:
    with pytest.raises(ValueError, match=r"advantages \(3,\) and loss_weights \(4,\)"):
        check_shapes(torch.zeros(4), BATCH._replace(advantages=torch.ones(3)))
    with pytest.raises(ValueError, match=r"advantages \(4, 1\)"):
        check_shapes(torch.zeros(4), BATCH._replace(advantages=torch.ones(4, 1)))
    with pytest.raises(ValueError, match=r"sampler_log_ratios has shape \(3,\); it must be \(4,\)"):
        check_shapes(torch.zeros(4), BATCH._replace(sampler_log_ratios=torch.zeros(3)))
    with pytest.raises(TypeError, match=r"torch\.int64"):
        check_shapes(torch.zeros(4), BATCH._replace(token_mask=BATCH.token_mask.long()))
    with pytest.raises(TypeError, match=r"sequence_index is torch\.float32; give int64 or int32"):
        check_shapes(torch.zeros(4), BATCH._replace(sequence_index=BATCH.sequence_index.float()))


def test_a_batch_is_one_of_tensors_in_one_place() -> None:
    with pytest.raises(TypeError, match="batch is a dict; give a LossBatch"):
        check_shapes(torch.zeros(4), BATCH._asdict())  # type: ignore[arg-type]
    for name in set(BATCH._fields) - {"num_items_in_batch"}:
        with pytest.raises(TypeError, match=f"{name} is a list; give a tensor"):
            check_shapes(torch.zeros(4), BATCH._replace(**{name: [1.0]}))
        with pytest.raises(ValueError, match=f"{name} is on meta and the rows are on cpu; move it there"):
            check_shapes(torch.zeros(4), BATCH._replace(**{name: getattr(BATCH, name).to("meta")}))
    with pytest.raises(TypeError, match="spec is 'dapo'; give a LossSpec, or that of an objective: OBJECTIVES"):
        check_needs(BATCH, "dapo", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("index", [[0, 1, 0, 3], [0, 0, 1, 4], [-1, 0, 1, 3]], ids=str)
def test_an_index_that_is_none_is_refused(index: list[int]) -> None:
    with pytest.raises(ValueError, match=r"must ascend and stay under B, here 4"):
        check_shapes(torch.zeros(4), BATCH._replace(sequence_index=torch.tensor(index)))
    none = {name: None if values is None else values[:0] for name, values in BATCH._asdict().items() if name in TOKEN_FIELDS}
    check_shapes(torch.zeros(0), BATCH._replace(**none))


def test_a_batch_has_no_gradients() -> None:
    for name in ("advantages", "loss_weights", "old_logprobs", "ref_logprobs", "importance_weights", "entropy_weights"):
        asked = BATCH._replace(**{name: getattr(BATCH, name).clone().requires_grad_()})
        with pytest.raises(
            ValueError, match=rf"^{name} requires a gradient, .* all of a batch is constant; give {name}\.detach"
        ):
            check_constants(asked)
        with torch.no_grad():
            check_constants(asked)
    check_constants(BATCH)


def test_what_a_loss_reads_must_be_there() -> None:
    bare, entropy = LossBatch(BATCH.sequence_index, BATCH.advantages, BATCH.loss_weights), torch.zeros(4)
    check_needs(bare, LossSpec(), None)
    with pytest.raises(ValueError, match="ref_logprobs are needed"):
        check_needs(bare, LossSpec(beta=0.1), entropy)
    with pytest.raises(ValueError, match="entropy="):
        check_needs(BATCH, LossSpec(entropy_coef=0.1), None)
    with pytest.raises(ValueError, match="num_items_in_batch"):
        check_needs(bare, LossSpec(entropy_coef=0.1), entropy)


def test_impossible_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="importance_sampling_level='sequence'"):
        LossSpec(surrogate="cispo", importance_sampling_level="sequence")
    with pytest.raises(ValueError, match=r"delta=2\.0"):
        LossSpec(surrogate="sapo", delta=2.0)
    with pytest.raises(ValueError, match=r"surrogate='grpo'; choose one of clip, cispo, sapo"):
        LossSpec(surrogate="grpo")
    with pytest.raises(ValueError, match=r"importance_sampling_level='seq'; choose one of token, sequence, sequence_sum"):
        LossSpec(importance_sampling_level="seq")
    with pytest.raises(ValueError, match="epsilon_high=None; give a finite number"):
        LossSpec(epsilon_high=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"epsilon_low=-0\.1; a clip range is 0 or more"):
        LossSpec(epsilon_low=-0.1)
    with pytest.raises(ValueError, match="beta=nan; give a finite number"):
        LossSpec(beta=math.nan)
