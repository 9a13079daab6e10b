"""Inputs like a trained model's: peaked logits, frequent tokens at low ids, targets sampled from the distribution itself.

Random hidden states give flat distributions, on which a kernel that filters small probabilities has nothing to do and a
confident token never occurs. Here a row of hidden states is a sum of

- one unit in a direction along which the head holds a Zipf prior over the vocabulary, ``log p_v = -log(v + 10) + const``, and
- one to five rows of the head, scaled so that their tokens stand a chosen number of nats over everything else together.

56 % of rows have one candidate 8 to 25 nats above the rest, 24 % one at 3 to 8 nats, 20 % are forks of two to five. What comes
out is what is published for a reasoning model: over half of all tokens have an entropy below 0.01 nat, a fifth above 0.672
(arXiv 2506.01939, Qwen3-8B). Ratios to the old policy stay a tenth of a nat away from the bounds of the clip range (means over
sequences 0.015), so that an implementation with rounded logits clips the same tokens as the truth does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch

from benchmarks.ops.cases import GROUP, AdvantageCase, HeadCase, LossCase
from grpo_fast.ops import LossBatch, LossSpec, live_sequences

_WEIGHT_STD = 0.02
_PRIOR_SCALE, _PRIOR_HIDDEN = 0.05, 20.0
_BLOCK_ELEMENTS = 2**25
ENTROPY_COEF = 0.01
TOKEN_SPEC = LossSpec(epsilon_low=0.2, epsilon_high=0.28)
SEQUENCE_SPEC = LossSpec(importance_sampling_level="sequence", epsilon_low=0.02, epsilon_high=0.02)
CROSS_ENTROPY_SPEC = LossSpec(surrogate="cispo", epsilon_high=5.0)
"""On-policy with advantages of 1, ``-stop_grad(ratio)·A·logp`` is the negative log-probability and its gradient."""


@dataclass
class HeadRows:
    """Hidden rows, a head and sampled targets, with their exact log-probabilities; shared by the cases of the same sizes."""

    hidden: torch.Tensor
    """[T, H] in the case's type."""
    weight: torch.Tensor
    """[V, H] in the case's type."""
    targets: torch.Tensor
    """int64 [T]."""
    logprobs: torch.Tensor
    """float64 [T], nats, of the rounded ``hidden`` and ``weight``."""
    entropy: torch.Tensor
    """float64 [T], nats."""
    log_total: torch.Tensor
    """float64 [T]: log-sum-exp of the logits."""

    def blocks(self) -> Iterator[slice]:
        """Rows in pieces whose logits fit into memory in float64."""
        step = max(1, _BLOCK_ELEMENTS // self.weight.shape[0])
        for start in range(0, len(self.targets), step):
            yield slice(start, min(start + step, len(self.targets)))


def head_rows(case: HeadCase, device: torch.device, *, seed: int = 0) -> HeadRows:
    """Makes the rows of a case. ``seed`` and the sizes fix them on a given kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    num_tokens, hidden_size, vocab_size = case.num_tokens, case.model.hidden_size, case.model.vocab_size
    dtype = getattr(torch, case.dtype)
    prior = -torch.log(torch.arange(vocab_size, device=device) + 10.0)
    prior -= torch.logsumexp(prior, 0)
    weight = torch.randn(vocab_size, hidden_size, generator=generator, device=device).mul_(_WEIGHT_STD)
    weight[:, 0] = _PRIOR_SCALE * prior
    hidden = _candidate_rows(weight, prior, num_tokens, generator)
    hidden[:, 0] = 1 / _PRIOR_SCALE
    weight, hidden = weight.to(dtype), hidden.to(dtype)
    empty = torch.empty(num_tokens, dtype=torch.float64, device=device)
    rows = HeadRows(hidden, weight, empty.long(), empty, empty.clone(), empty.clone())
    _sample(rows, generator)
    return rows


def _candidate_rows(weight: torch.Tensor, prior: torch.Tensor, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Sums of rows of the head whose tokens are to stand out."""
    device, hidden_size = weight.device, weight.shape[1]
    kind = torch.rand(num_tokens, generator=generator, device=device)
    uniform = torch.rand(num_tokens, 5, generator=generator, device=device)
    num_candidates = torch.where(kind < 0.8, 1, 2 + (4 * torch.rand(num_tokens, generator=generator, device=device)).long())
    low, width = torch.full_like(kind, 2.0), torch.full_like(kind, 2.0)
    low[kind < 0.8], width[kind < 0.8] = 3.0, 5.0
    low[kind < 0.56], width[kind < 0.56] = 8.0, 17.0
    margins = low[:, None] + width[:, None] * uniform
    tokens = torch.multinomial(prior.exp(), 5 * num_tokens, replacement=True, generator=generator).view(num_tokens, 5)
    lift = margins - prior[tokens]
    # A scaled row of the head also shakes every other logit, which raises their sum by half the variance.
    lift = lift + lift.square() / (2 * hidden_size)
    lift = lift * (torch.arange(5, device=device) < num_candidates[:, None])
    hidden = torch.zeros(num_tokens, hidden_size, device=device)
    for column in range(5):
        chosen = weight[tokens[:, column]]
        hidden += chosen * (lift[:, column] / chosen[:, 1:].square().sum(1))[:, None]
    return hidden


def _sample(rows: HeadRows, generator: torch.Generator) -> None:
    """Draws targets from the softmax by its inverse, and notes the exact statistics; one pass in float64."""
    weight = rows.weight.double()
    for block in rows.blocks():
        logits = rows.hidden[block].double() @ weight.T
        log_total = torch.logsumexp(logits, 1)
        shares = (logits - log_total[:, None]).exp_()
        rows.entropy[block] = log_total - (shares * logits).sum(1)
        cumulated = shares.cumsum(1)
        draw = torch.rand(len(logits), 1, generator=generator, device=weight.device, dtype=torch.float64)
        targets = torch.searchsorted(cumulated, draw * cumulated[:, -1:])[:, 0].clamp_(max=weight.shape[0] - 1)
        rows.targets[block], rows.log_total[block] = targets, log_total
        rows.logprobs[block] = logits.gather(1, targets[:, None])[:, 0] - log_total


@dataclass
class HeadProblem:
    """Everything that a contender is given."""

    case: HeadCase
    rows: HeadRows
    hidden: torch.Tensor
    """[T, H]; requires a gradient unless the case is forward only."""
    weight: torch.Tensor
    """[V, H]; requires a gradient where the head is trained."""
    batch: LossBatch
    spec: LossSpec

    @property
    def targets(self) -> torch.Tensor:
        """int64 [T]."""
        return self.rows.targets

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What gradients are wanted of."""
        return tuple(x for x in (self.hidden, self.weight) if x.requires_grad)

    @cached_property
    def live(self) -> torch.Tensor | None:
        """Rows of sequences that carry gradient, int64; ``None`` where all do. Known before the head, from advantages."""
        length = self.case.num_tokens // self.case.num_sequences
        alive = live_sequences(
            [length] * self.case.num_sequences, self.batch.advantages.tolist(), entropy_coef=self.spec.entropy_coef
        )
        if all(alive):
            return None
        return torch.tensor(alive, device=self.hidden.device).repeat_interleave(length).nonzero()[:, 0]

    def padded(self, per_token: torch.Tensor) -> torch.Tensor:
        """[T, ...] as [B, L, ...]; sequences have the same length, so nothing is padding."""
        return per_token.view(self.case.num_sequences, -1, *per_token.shape[1:])


def head_problem(case: HeadCase, rows: HeadRows) -> HeadProblem:
    """A case's batch and loss on rows of its sizes."""
    device, count = rows.hidden.device, case.num_sequences
    length = case.num_tokens // count
    if case.num_tokens != count * length or count % GROUP:
        raise ValueError(f"{case.num_tokens} rows are not {count} sequences in groups of {GROUP}")
    wanted = case.objective != "forward"
    index = torch.arange(count, device=device, dtype=torch.int32).repeat_interleave(length)
    spec, batch = _loss(case, rows, index)
    return HeadProblem(
        case,
        rows,
        rows.hidden.detach().requires_grad_(wanted),
        rows.weight.detach().requires_grad_(wanted and not case.frozen_head),
        batch,
        spec,
    )


def _loss(case: HeadCase, rows: HeadRows, index: torch.Tensor) -> tuple[LossSpec, LossBatch]:
    device, count = index.device, case.num_sequences
    weights = torch.full((count,), 1.0 / case.num_tokens, device=device)
    if case.objective in ("cross_entropy", "forward"):
        return CROSS_ENTROPY_SPEC, LossBatch(index, torch.ones(count, device=device), weights)
    generator = torch.Generator().manual_seed(1)
    advantages = group_advantages(count, case.dead_share, generator).to(device)
    log_ratio = log_ratios(case.num_tokens, count, generator, by_token=case.objective == "token").to(device)
    old = (rows.logprobs - log_ratio).float()
    spec = TOKEN_SPEC if case.objective == "token" else SEQUENCE_SPEC
    if case.entropy:
        spec = LossSpec(epsilon_low=spec.epsilon_low, epsilon_high=spec.epsilon_high, entropy_coef=ENTROPY_COEF)
    return spec, LossBatch(index, advantages, weights, old, num_items_in_batch=float(case.num_tokens))


def group_advantages(num_sequences: int, dead_share: float, generator: torch.Generator) -> torch.Tensor:
    """Centred advantages of groups of ``GROUP``, [B]; the first groups have none."""
    rewards = torch.randn(num_sequences // GROUP, GROUP, generator=generator)
    centred = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    centred[: round(dead_share * len(centred))] = 0.0
    return centred.flatten()


def log_ratios(num_tokens: int, num_sequences: int, generator: torch.Generator, *, by_token: bool) -> torch.Tensor:
    """Log-ratios to the old policy, float64 [T]: most within 0.05, some clipped above or below, none near a bound."""
    small = 0.1 * (torch.rand(num_tokens, generator=generator, dtype=torch.float64) - 0.5)
    kind = torch.rand(num_tokens, generator=generator)
    far = 0.45 + 0.25 * torch.rand(num_tokens, generator=generator, dtype=torch.float64)
    if by_token:
        return torch.where(kind < 0.03, far, torch.where(kind > 0.97, -far, small))
    length = num_tokens // num_sequences
    centred = (small.view(num_sequences, length) - small.view(num_sequences, length).mean(1, keepdim=True)) * 0.4
    shift = torch.tensor([0.0, 0.05, 0.0, -0.05], dtype=torch.float64).repeat(math.ceil(num_sequences / 4))[:num_sequences]
    return (centred + shift[:, None]).flatten()


@dataclass
class AdvantageProblem:
    """Rewards of a step."""

    case: AdvantageCase
    rewards: torch.Tensor
    """float32 [P, G]; a tenth of the groups have no variance."""


def advantage_problem(case: AdvantageCase, device: torch.device) -> AdvantageProblem:
    """Rewards between 0 and 1."""
    generator = torch.Generator(device).manual_seed(0)
    rewards = torch.rand(case.num_prompts, case.group_size, generator=generator, device=device)
    rewards[::10] = 1.0
    return AdvantageProblem(case, rewards)


@dataclass
class LossProblem:
    """Log-probabilities of packed tokens."""

    case: LossCase
    logprobs: torch.Tensor
    """float32 [T], requires a gradient."""
    batch: LossBatch
    spec: LossSpec
    mask: torch.Tensor = field(repr=False)
    """float32 [B, L] of ones: what padded implementations ask for."""


def loss_problem(case: LossCase, device: torch.device) -> LossProblem:
    """Tokens of sequences of the same length, some ratios clipped."""
    generator = torch.Generator().manual_seed(0)
    count, length = case.num_sequences, case.num_tokens // case.num_sequences
    logprobs = torch.empty(case.num_tokens).exponential_(2.0, generator=generator).neg_()
    ratio = log_ratios(case.num_tokens, count, generator, by_token=case.objective == "token")
    index = torch.arange(count, dtype=torch.int32).repeat_interleave(length)
    batch = LossBatch(
        index.to(device),
        group_advantages(count, 0.25, generator).to(device),
        torch.full((count,), 1.0 / case.num_tokens, device=device),
        (logprobs.double() - ratio).float().to(device),
    )
    spec = TOKEN_SPEC if case.objective == "token" else SEQUENCE_SPEC
    return LossProblem(case, logprobs.to(device).requires_grad_(), batch, spec, torch.ones(count, length, device=device))
