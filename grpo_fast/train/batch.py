"""Micro-batches: a step's sequences as the model and the loss read them.

Padded, every sequence stands in a row of its own, as long as the longest. Packed, they lie one after the other in a single row,
their positions begin anew at each border, and no sequence sees another; nothing is computed for padding, but for the few
tokens behind the last sequence that make the length one of :func:`~grpo_fast.ops.products.rounded_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress, groupby
from typing import Any

import numpy as np
import torch

from grpo_fast.kept_tokens import KeptTokens
from grpo_fast.ops import Kept, Layout, Piece, SharedPrompts, packed_layout, scored_rows
from grpo_fast.ops.products import rounded_rows
from grpo_fast.types import Group, TokenBatch


@dataclass(frozen=True, slots=True)
class TrainingSequence:
    """One prompt with one completion, as the update reads it."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    sampling_logprobs: tuple[float, ...]
    advantage: float
    in_loss: bool
    """Whether its tokens count: false for a truncated completion when those are masked."""
    kept: KeptTokens | None = None
    """Tokens that each sampled token was drawn from; ``None``: the whole vocabulary."""
    sampled: tuple[bool, ...] = ()
    """For each token of the completion, whether the policy sampled it; empty if it sampled all."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def scored(self) -> Sequence[bool]:
        """For each token of the completion, whether it is in the loss if the sequence is."""
        return self.sampled or [True] * len(self.completion_ids)

    @property
    def num_scored(self) -> int:
        """Number of scored tokens."""
        return sum(self.sampled) if self.sampled else len(self.completion_ids)

    @property
    def num_in_loss(self) -> int:
        """Number of tokens that count in the loss."""
        return self.num_scored if self.in_loss else 0


def shared_prompts(sequences: Sequence[TrainingSequence]) -> SharedPrompts:
    """Which sequences have the same prompt."""
    number: dict[tuple[int, ...], int] = {}
    prompt_of = [number.setdefault(sequence.prompt_ids, len(number)) for sequence in sequences]
    return SharedPrompts([len(prompt_ids) for prompt_ids in number], prompt_of)


def flatten_groups(groups: Sequence[Group], *, mask_truncated: bool) -> list[TrainingSequence]:
    """The N sequences of a step, in order, as the update reads them; without advantages yet, those are 0."""
    return [
        TrainingSequence(
            prompt_ids=group.prompt.token_ids,
            completion_ids=completion.token_ids,
            sampling_logprobs=completion.logprobs,
            advantage=advantage,
            in_loss=not (mask_truncated and completion.truncated),
            kept=completion.kept,
            sampled=() if completion.episode is None else completion.episode.sampled,
        )
        for group in groups
        for completion, advantage in zip(group.completions, group.advantages or [0.0] * len(group.completions), strict=True)
    ]


def build_batch(
    sequences: Sequence[TrainingSequence],
    loss_weights: Sequence[float],
    device: torch.device,
    *,
    layout: Layout = "padded",
    shares_prompts: bool = False,
) -> TokenBatch:
    """Makes one micro-batch of sequences.

    Args:
        sequences: B of them.
        loss_weights: [B] what each token's loss is multiplied with.
        device: where the batch goes.
        layout: ``padded`` on the right, or ``packed``.
        shares_prompts: whether neighbours with the same prompt lie behind one copy of it; packed only.
    """
    rows = scored_rows([len(s.prompt_ids) for s in sequences], [s.scored for s in sequences], layout=layout)
    row_index = rows.row_index
    if layout == "padded":
        inputs = _padded_inputs(sequences, device)
    elif shares_prompts:
        inputs, row_index = _shared_inputs(sequences, device)
    else:
        inputs = _packed_inputs(sequences, device)
    targets = [token for sequence in sequences for token in compress(sequence.completion_ids, sequence.scored)]
    sampled = [logprob for sequence in sequences for logprob in compress(sequence.sampling_logprobs, sequence.scored)]
    return TokenBatch(
        **inputs,
        row_index=torch.tensor(row_index, dtype=torch.int64, device=device),
        targets=torch.tensor(targets, dtype=torch.int64, device=device),
        sequence_index=torch.tensor(rows.sequence_index, dtype=torch.int64, device=device),
        advantages=torch.tensor([s.advantage for s in sequences], dtype=torch.float32, device=device),
        loss_weights=torch.tensor(loss_weights, dtype=torch.float32, device=device),
        sampling_logprobs=torch.tensor(sampled, dtype=torch.float32, device=device),
        kept=_kept(sequences, targets, device),
    )


def _kept(sequences: Sequence[TrainingSequence], targets: list[int], device: torch.device) -> Kept | None:
    found = [sequence.kept for sequence in sequences if sequence.kept is not None]
    if not found:
        return None
    drawn = [token for kept in found for token in kept.drawn.tolist()]
    if len(found) < len(sequences) or drawn != targets:
        raise ValueError("Completion.kept must be given for every completion of a micro-batch, and match its tokens")
    token_ids = torch.from_numpy(np.concatenate([kept.token_ids for kept in found]).astype(np.int64))
    sizes = torch.from_numpy(np.concatenate([kept.sizes for kept in found]).astype(np.int64))
    return Kept(token_ids.to(device), sizes)


def _padded_inputs(sequences: Sequence[TrainingSequence], device: torch.device) -> dict[str, Any]:
    width = max(len(sequence) for sequence in sequences)
    ids: list[list[int]] = []
    mask: list[list[int]] = []
    for sequence in sequences:
        tokens = [*sequence.prompt_ids, *sequence.completion_ids]
        padding = [0] * (width - len(tokens))
        ids.append(tokens + padding)
        mask.append([1] * len(tokens) + padding)
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def _packed_inputs(sequences: Sequence[TrainingSequence], device: torch.device) -> dict[str, Any]:
    ids: list[int] = []
    positions: list[int] = []
    pieces: list[Piece] = []
    for sequence in sequences:
        pieces.append(Piece(len(ids), len(sequence)))
        ids.extend((*sequence.prompt_ids, *sequence.completion_ids))
        positions.extend(range(len(sequence)))
    return _one_row(ids, positions, pieces, device)


def _shared_inputs(sequences: Sequence[TrainingSequence], device: torch.device) -> tuple[dict[str, Any], list[int]]:
    """Inputs, and [T] positions of each scored token's hidden state; the first one's is the last of the shared prompt."""
    ids: list[int] = []
    positions: list[int] = []
    pieces: list[Piece] = []
    row_index: list[int] = []
    for prompt_ids, group in groupby(sequences, key=lambda sequence: sequence.prompt_ids):
        prompt = Piece(len(ids), len(prompt_ids))
        pieces.append(prompt)
        ids.extend(prompt_ids)
        positions.extend(range(prompt.length))
        for completion_ids, scored in ((each.completion_ids, each.scored) for each in group if each.completion_ids):
            start, length = len(ids), len(completion_ids)
            row_index.extend(compress([prompt.start + prompt.length - 1, *range(start, start + length - 1)], scored))
            pieces.append(Piece(start, length, prompt.start, prompt.length))
            ids.extend(completion_ids)
            positions.extend(range(prompt.length, prompt.length + length))
    return _one_row(ids, positions, pieces, device), row_index


def _one_row(ids: list[int], positions: list[int], pieces: list[Piece], device: torch.device) -> dict[str, Any]:
    """Inputs of one row; what fills it up is a sequence of its own, which nobody reads."""
    missing = rounded_rows(len(ids), device) - len(ids)
    filler = [Piece(len(ids), missing)] if missing else []
    return {
        "input_ids": torch.tensor([ids + [0] * missing], device=device),
        "position_ids": torch.tensor([positions + [0] * missing], device=device),
        "packed_layout": packed_layout(pieces + filler, device=device),
    }
