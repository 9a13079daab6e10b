"""Ragged sequences packed into few bins of a token budget, and the index arrays of what was packed.

Sequences are taken from the longest to the shortest, ties by index. Each goes where it first fits, or where it fits best,
whichever needs fewer bins: at most 11/9 of the fewest possible. One longer than the budget stands alone. The fullest bins come
first. The compiled twin gives the same plan, in time for a million sequences; it leaves out best-fit where first-fit is known
to be optimal, as that changes nothing.

With shared prompts, the completions of a prompt lie behind one copy of it: a group that fits a bin is packed whole, and one
that does not is cut into as few parts as it takes, each with its own copy.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from grpo_fast.ops import native
from grpo_fast.ops.dispatch import Impl, Implementation, resolve


class PackedSequences(NamedTuple):
    """Which sequence lies in which bin."""

    order: torch.Tensor
    """int64 [N] sequences, bin by bin."""
    bin_starts: torch.Tensor
    """int64 [bins + 1]: bin k holds ``order[bin_starts[k]:bin_starts[k + 1]]``."""

    def bins(self) -> list[list[int]]:
        """The sequences of each bin."""
        order, starts = self.order.tolist(), self.bin_starts.tolist()
        return [order[low:high] for low, high in pairwise(starts)]


class PackedGroups(NamedTuple):
    """Completions behind their prompts: one copy of a prompt and some of its completions is a segment."""

    completions: torch.Tensor
    """int64 [N], segment by segment."""
    segment_starts: torch.Tensor
    """int64 [S + 1]: where each segment's completions begin in ``completions``."""
    segment_prompt: torch.Tensor
    """int64 [S] the prompt of each segment."""
    bin_starts: torch.Tensor
    """int64 [bins + 1]: where each bin's segments begin."""


class PackedIndex(NamedTuple):
    """Positions in a row of tokens that contains segments one after the other."""

    cu_seqlens: torch.Tensor
    """int32 [S + 1]: where each segment begins; attention stays inside a segment."""
    positions: torch.Tensor
    """int64 [tokens] position of each token: a completion goes on from the end of its prompt."""
    row_index: torch.Tensor
    """int64 [T] of each completion token, where the hidden state is that predicts it."""
    sequence_index: torch.Tensor
    """int64 [T] the completion that it belongs to."""


def pack_sequences_reference(lengths: torch.Tensor, token_budget: int) -> PackedSequences:
    """The specification of :func:`pack_sequences`, in plain Python."""
    sizes = lengths.tolist()
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    first, best = _first_fit(order, sizes, token_budget), _best_fit(order, sizes, token_budget)
    bins = sorted(best if len(best) < len(first) else first, key=lambda rows: -sum(sizes[i] for i in rows))
    starts = torch.tensor([0, *(len(rows) for rows in bins)]).cumsum(0)
    return PackedSequences(torch.tensor([i for rows in bins for i in rows], dtype=torch.int64), starts)


def _first_fit(order: Iterable[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    plan: list[list[int]] = []
    room: list[int] = []
    for index in order:
        fitting = (place for place, free in enumerate(room) if free >= lengths[index])
        place = next(fitting, len(plan))
        if place == len(plan):
            plan.append([])
            room.append(budget)
        plan[place].append(index)
        room[place] -= lengths[index]
    return plan


def _best_fit(order: Iterable[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    plan: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is free and where, ascending
    for index in order:
        position = bisect.bisect_left(room, (lengths[index], -1))
        if position < len(room):
            free, place = room.pop(position)
        else:
            free, place = budget, len(plan)
            plan.append([])
        plan[place].append(index)
        bisect.insort(room, (free - lengths[index], place))
    return plan


def _pack_native(lengths: torch.Tensor, token_budget: int) -> PackedSequences:
    return PackedSequences(*native.call("pack_sequences", lengths, token_budget))


_PACK = {"native": native.native_kernels(_pack_native), "torch": Implementation(pack_sequences_reference)}


def pack_sequences(lengths: torch.Tensor | Sequence[int], token_budget: int, *, impl: Impl = "auto") -> PackedSequences:
    """Packs sequences into bins.

    Args:
        lengths: [N] tokens of each, on the host; each at least 1.
        token_budget: most tokens of a bin. A longer sequence stands alone.
        impl: ``native``, ``torch`` (plain Python, quadratic in the number of bins) or ``auto``.

    Raises:
        TypeError: the lengths are not integers.
        ValueError: they are not a vector on the host, one is below 1 or does not fit int32, or the budget is not positive.
    """
    sizes = _lengths("lengths", lengths, minimum=1)
    if token_budget < 1:
        raise ValueError(f"token_budget={token_budget}; it must be at least 1")
    return resolve("pack_sequences", _PACK, impl=impl, like=sizes)(sizes, token_budget)


def pack_shared_prompts(
    prompt_lengths: torch.Tensor | Sequence[int],
    completion_lengths: torch.Tensor | Sequence[int],
    prompt_of: torch.Tensor | Sequence[int],
    *,
    token_budget: int,
    impl: Impl = "auto",
) -> PackedGroups:
    """Packs completions behind shared prompts; never into more bins than with a copy of the prompt for each.

    Args:
        prompt_lengths: [P] tokens of each prompt, on the host.
        completion_lengths: [N] tokens of each completion.
        prompt_of: [N] the prompt of each completion.
        token_budget: most tokens of a bin. A completion that does not fit with its prompt stands alone.
        impl: as for :func:`pack_sequences`.

    Raises:
        TypeError: something is not integers.
        ValueError: lengths are below 1, shapes differ, ``prompt_of`` names a prompt that is not there, or the budget is not
            positive.
    """
    prompts = _lengths("prompt_lengths", prompt_lengths, minimum=1)
    sizes, owner = _lengths("completion_lengths", completion_lengths, minimum=1), _lengths("prompt_of", prompt_of, minimum=0)
    if len(sizes) != len(owner):
        raise ValueError(f"{len(sizes)} completion_lengths and {len(owner)} prompt_of; give one each a completion")
    if len(owner) and int(owner.max()) >= len(prompts):
        raise ValueError(f"prompt_of names prompt {int(owner.max())}, but there are {len(prompts)}")
    apart = pack_sequences(prompts[owner] + sizes, token_budget, impl=impl)
    segment_of, segment_prompt = _segments(prompts, sizes, owner, token_budget, impl)
    tokens = prompts[segment_prompt].index_add(0, segment_of, sizes)
    packed = pack_sequences(tokens, token_budget, impl=impl)
    if len(packed.bin_starts) > len(apart.bin_starts):
        alone = torch.arange(len(owner) + 1)
        return PackedGroups(apart.order, alone, owner[apart.order], apart.bin_starts)
    place = torch.empty_like(packed.order)
    place[packed.order] = torch.arange(len(place))
    counts = segment_of.bincount(minlength=len(tokens))[packed.order]
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return PackedGroups(place[segment_of].argsort(stable=True), starts, segment_prompt[packed.order], packed.bin_starts)


def _segments(
    prompts: torch.Tensor, sizes: torch.Tensor, owner: torch.Tensor, budget: int, impl: Impl
) -> tuple[torch.Tensor, torch.Tensor]:
    """The segment of each completion, and the prompt of each segment: a whole group, or as few parts of it as fit bins."""
    counts = owner.bincount(minlength=len(prompts))
    totals = prompts.index_add(0, owner, sizes)
    used = counts > 0
    segment_prompt = used.nonzero()[:, 0]
    segment_of = (used.cumsum(0) - 1)[owner]
    extra: list[int] = []
    large = (used & (totals > budget)).nonzero()[:, 0].tolist()
    members = owner.argsort(stable=True).split(counts.tolist()) if large else ()
    for prompt in large:
        parts = pack_sequences(sizes[members[prompt]], max(1, budget - int(prompts[prompt])), impl=impl).bins()
        for part in parts[1:]:
            segment_of[members[prompt][part]] = len(segment_prompt) + len(extra)
            extra.append(prompt)
    return segment_of, torch.cat((segment_prompt, torch.tensor(extra, dtype=torch.int64)))


def packed_index_reference(
    prompts: torch.Tensor, sizes: torch.Tensor, completions: torch.Tensor, segment_starts: torch.Tensor
) -> PackedIndex:
    """The specification of :func:`packed_index`, in plain Python."""
    ends, positions, rows, owners = [0], list[int](), list[int](), list[int]()
    starts = segment_starts.tolist()
    for segment, prompt in enumerate(prompts.tolist()):
        positions.extend(range(prompt))
        last = len(positions) - 1
        for place in range(starts[segment], starts[segment + 1]):
            size = int(sizes[place])
            rows.extend([last, *range(len(positions), len(positions) + size - 1)])
            owners.extend([int(completions[place])] * size)
            positions.extend(range(prompt, prompt + size))
        ends.append(len(positions))
    return PackedIndex(
        torch.tensor(ends, dtype=torch.int32), *(torch.tensor(x, dtype=torch.int64) for x in (positions, rows, owners))
    )


def _index_native(
    prompts: torch.Tensor, sizes: torch.Tensor, completions: torch.Tensor, segment_starts: torch.Tensor
) -> PackedIndex:
    return PackedIndex(*native.call("packed_index", prompts, sizes, completions, segment_starts))


_INDEX = {"native": native.native_kernels(_index_native), "torch": Implementation(packed_index_reference)}


def packed_index(
    groups: PackedGroups,
    prompt_lengths: torch.Tensor | Sequence[int],
    completion_lengths: torch.Tensor | Sequence[int],
    *,
    bin_index: int,
    impl: Impl = "auto",
) -> PackedIndex:
    """The index arrays of one bin: what attention, position embeddings and the loss read.

    Args:
        groups: from :func:`pack_shared_prompts`.
        prompt_lengths: [P] as it was packed.
        completion_lengths: [N] as it was packed.
        bin_index: which bin.
        impl: ``native``, ``torch`` (plain Python) or ``auto``.

    Returns:
        Arrays over the bin's tokens: each segment's prompt, then its completions. Completions of a segment must not attend to
        each other; ``positions`` tells where one begins, by falling back to the end of the prompt.

    Raises:
        ValueError: there is no such bin, or lengths are not those that were packed.
    """
    prompts = _lengths("prompt_lengths", prompt_lengths, minimum=1)
    sizes = _lengths("completion_lengths", completion_lengths, minimum=1)
    if not 0 <= bin_index < len(groups.bin_starts) - 1:
        raise ValueError(f"bin_index={bin_index}; there are {len(groups.bin_starts) - 1} bins")
    if len(sizes) != len(groups.completions):
        raise ValueError(f"{len(sizes)} completion_lengths, but {len(groups.completions)} were packed")
    low, high = groups.bin_starts[bin_index : bin_index + 2].tolist()
    starts = groups.segment_starts[low : high + 1]
    completions = groups.completions[int(starts[0]) : int(starts[-1])]
    run = resolve("packed_index", _INDEX, impl=impl, like=sizes)
    return run(prompts[groups.segment_prompt[low:high]], sizes[completions], completions, starts - starts[0])


def _lengths(name: str, values: torch.Tensor | Sequence[int], *, minimum: int) -> torch.Tensor:
    tensor = torch.as_tensor(values, dtype=None if len(values) else torch.int64)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} is {tensor.dtype}; give integers")
    if tensor.dim() != 1 or tensor.device.type != "cpu":
        raise ValueError(f"{name} has shape {tuple(tensor.shape)} on {tensor.device}; give a vector on the host")
    tensor = tensor.to(torch.int64).contiguous()
    if len(tensor) and not minimum <= int(tensor.min()) <= int(tensor.max()) < 2**31:
        at = int(((tensor < minimum) | (tensor >= 2**31)).nonzero()[0])
        raise ValueError(f"{name}[{at}]={int(tensor[at])}; it must be at least {minimum} and below 2^31")
    return tensor
