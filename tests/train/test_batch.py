from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from grpo_fast.kept_tokens import KeptTokens
from grpo_fast.ops import Layout, Piece, products
from grpo_fast.ops.products import rounded_rows
from grpo_fast.train.batch import TrainingSequence, build_batch, flatten_groups
from grpo_fast.types import Group

MakeGroup = Callable[..., Group]


def test_flattening_keeps_order_and_marks_what_was_cut(make_group: MakeGroup) -> None:
    groups = [make_group(0, [1.0, 0.0], truncated=True), make_group(1, [0.0, 1.0], prompt_length=2)]
    for group in groups:
        group.advantages = [0.25, -0.5]
    found = flatten_groups(groups, mask_truncated=True)
    assert [(s.advantage, s.in_loss, len(s.prompt_ids)) for s in found] == [
        (0.25, True, 3),
        (-0.5, False, 3),
        (0.25, True, 2),
        (-0.5, True, 2),
    ]
    assert [s.completion_ids for s in found] == [c.token_ids for group in groups for c in group.completions]
    assert all(s.in_loss for s in flatten_groups(groups, mask_truncated=False))


def test_a_batch_is_padded_right_and_scores_completions_only() -> None:
    sequences = [
        TrainingSequence((5,), (6, 7, 8), (-0.1, -0.2, -0.3), 1.5, in_loss=True),
        TrainingSequence((9, 10), (11,), (-0.4,), -0.5, in_loss=True),
    ]
    batch = build_batch(sequences, [0.25, 0.75], torch.device("cpu"))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 10, 11, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.row_index.tolist() == [0, 1, 2, 5]
    assert batch.targets.tolist() == [6, 7, 8, 11]
    assert batch.sequence_index.tolist() == [0, 0, 0, 1]
    assert batch.advantages.tolist() == [1.5, -0.5]
    assert batch.loss_weights.tolist() == [0.25, 0.75]
    assert batch.sampling_logprobs.tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4])
    assert (batch.num_sequences, batch.num_scored_tokens) == (2, 4)


def test_a_packed_batch_is_one_row_without_padding() -> None:
    sequences = [
        TrainingSequence((9, 10), (11,), (-0.4,), -0.5, in_loss=True),
        TrainingSequence((5,), (6, 7, 8), (-0.1, -0.2, -0.3), 1.5, in_loss=True),
    ]
    batch = build_batch(sequences, [0.75, 0.25], torch.device("cpu"), layout="packed")
    assert batch.input_ids.tolist() == [[9, 10, 11, 5, 6, 7, 8]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch.attention_mask is None
    assert batch.row_index.tolist() == [1, 3, 4, 5]
    assert batch.targets.tolist() == [11, 6, 7, 8]
    assert batch.sequence_index.tolist() == [0, 1, 1, 1]
    assert batch.packed_layout is not None
    assert [(piece.start, piece.length) for piece in batch.packed_layout.pieces] == [(0, 3), (3, 4)]
    assert (batch.num_sequences, batch.num_scored_tokens) == (2, 4)


@pytest.mark.parametrize("shares", [False, True])
def test_a_long_row_is_filled_up_by_a_sequence_that_nobody_reads(shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [TrainingSequence((5, 6), tuple(range(length)), (-0.1,) * length, 1.0, in_loss=True) for length in (90, 60, 45)]
    batches = []
    for uses_onednn in (False, True):
        monkeypatch.setattr(products, "USES_ONEDNN", uses_onednn)
        batches.append(build_batch(sequences, [1.0] * 3, torch.device("cpu"), layout="packed", shares_prompts=shares))
    exact, filled = batches
    num_tokens = 195 + (2 if shares else 6)
    assert exact.input_ids.shape == exact.position_ids.shape == (1, num_tokens)
    width = rounded_rows(num_tokens, torch.device("cpu"))
    assert width > num_tokens
    assert filled.input_ids.shape == filled.position_ids.shape == (1, width)
    assert torch.equal(filled.input_ids[:, :num_tokens], exact.input_ids)
    assert torch.equal(filled.position_ids[:, :num_tokens], exact.position_ids)
    assert filled.packed_layout.pieces == (*exact.packed_layout.pieces, Piece(num_tokens, width - num_tokens))
    for name in ("row_index", "targets", "sequence_index", "sampling_logprobs"):
        assert torch.equal(getattr(filled, name), getattr(exact, name)), name


@pytest.mark.parametrize(("layout", "shares"), [("padded", False), ("packed", False), ("packed", True)])
def test_kept_tokens_stand_beside_their_targets(layout: Layout, shares: bool) -> None:
    kept = [KeptTokens.of([6, 7], [[3, 6], [7]]), KeptTokens.of([11], [[4, 11, 2]])]
    sequences = [
        TrainingSequence((5,), (6, 7), (-0.1, -0.2), 1.5, in_loss=True, kept=kept[0]),
        TrainingSequence((5,), (11,), (-0.4,), -0.5, in_loss=True, kept=kept[1]),
    ]
    batch = build_batch(sequences, [0.25, 0.75], torch.device("cpu"), layout=layout, shares_prompts=shares)
    assert batch.kept is not None
    assert batch.kept.token_ids.tolist() == [6, 3, 7, 11, 4, 2]
    assert batch.kept.sizes.tolist() == [2, 1, 3]
    for wrong in (replace(sequences[1], kept=None), replace(sequences[1], kept=kept[0])):
        with pytest.raises(ValueError, match="must be given for every completion of a micro-batch"):
            build_batch([sequences[0], wrong], [0.25, 0.75], torch.device("cpu"), layout=layout, shares_prompts=shares)


@pytest.mark.parametrize(("layout", "shares"), [("padded", False), ("packed", False), ("packed", True)])
def test_a_completion_of_no_token_scores_nothing(layout: Layout, shares: bool) -> None:
    empty = TrainingSequence((5, 6), (), (), 1.0, in_loss=True)
    alone = build_batch([empty], [1.0], torch.device("cpu"), layout=layout, shares_prompts=shares)
    for name in ("row_index", "targets", "sequence_index"):
        assert (getattr(alone, name).dtype, len(getattr(alone, name))) == (torch.int64, 0), name
    other = TrainingSequence((5, 6), (7, 8), (-0.1, -0.2), 1.0, in_loss=True)
    both = build_batch([empty, other], [1.0, 1.0], torch.device("cpu"), layout=layout, shares_prompts=shares)
    assert both.targets.tolist() == [7, 8]
    assert both.sequence_index.tolist() == [1, 1]
    assert both.input_ids.flatten()[both.row_index].tolist() == [6, 7], "each target is predicted at the token before it"


def test_tokens_that_are_scored_and_that_count_in_the_loss() -> None:
    whole, played = ((), (True, False, True))
    for sampled, scored in ((whole, 3), (played, 2)):
        for in_loss in (True, False):
            one = TrainingSequence((5,), (6, 7, 8), (-0.1,) * 3, 1.0, in_loss=in_loss, sampled=sampled)
            assert (one.num_scored, one.num_in_loss) == (scored, scored * in_loss)
