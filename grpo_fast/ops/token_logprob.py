"""Log-probability of the chosen token, and entropy, from hidden states; logits of all rows never live at once.

For row t of ``hidden`` [T, H] with target ``y_t`` and head ``W`` [V, H]:

    u = (h_t W^T + b)·scale                    logits of the model
    z = cap·tanh(u / cap) / temperature        (without a cap: z = u / temperature)
    logp_t = z_y - log Σ_v e^{z_v}             nats
    H_t    = -Σ_v p_v log p_v,  p = softmax(z)

    dL/dz_v = g_t·(1[v = y] - p_v) - e_t·p_v·(log p_v + H_t),   g = dL/dlogp, e = dL/dH

Rows are processed in blocks of ``LMHead.chunk_bytes`` of logits; backward makes each block's logits again (8 T·H·V FLOP in
all, memory of two or three blocks). Logits, softmax, ``d weight`` and ``d bias`` are float32 (float64 for float64 inputs)
whatever the type of hidden states and weight, also under autocast: bfloat16 logits are wrong by 0.02 nat in the mean at a
vocabulary of 151,936. The order of every sum is fixed by the sizes, so a repeated call is bitwise the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from grpo_fast.ops.dispatch import Impl, Implementation, resolve

CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class LMHead:
    """How hidden states become the logits that are sampled from.

    Raises:
        ValueError: a value outside its range, with the field named.
    """

    weight: torch.Tensor
    """[V, H]."""
    bias: torch.Tensor | None = None
    """[V]; minus infinity takes a token out of the vocabulary."""
    temperature: float = 1.0
    """Divides the logits last; the one that completions are sampled at."""
    softcap: float | None = None
    """Bound of the logits through ``cap·tanh(u / cap)``, before the temperature (Gemma 2's ``final_logit_softcapping``)."""
    logit_scale: float = 1.0
    """Multiplies the logits first (Cohere's ``logit_scale``)."""
    chunk_bytes: int = CHUNK_BYTES
    """Size of the largest block of logits that lives at once; two or three such blocks do."""

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ValueError(f"weight has shape {tuple(self.weight.shape)}; it must be (V, H)")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"bias has shape {tuple(self.bias.shape)} for a weight of {tuple(self.weight.shape)}; it must be (V,)"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}; it must be positive (greedy sampling has no log-probabilities)")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap={self.softcap}; it must be positive, or None for no cap")
        if self.chunk_bytes < 1:
            raise ValueError(f"chunk_bytes={self.chunk_bytes}; it must be at least 1")


def token_logprob_reference(
    hidden: torch.Tensor, head: LMHead, *, targets: torch.Tensor, want_entropy: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The specification of :func:`token_logprob`, in plain differentiable PyTorch, all rows at once."""
    work = working_dtype(hidden)
    with full_precision(hidden):
        logits = hidden.to(work) @ head.weight.to(work).T
        if head.bias is not None:
            logits = _add_bias(logits, head.bias)
        logits = logits * head.logit_scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        log_softmax = torch.log_softmax(logits / head.temperature, dim=-1)
        logprobs = log_softmax.gather(1, targets[:, None])[:, 0]
        entropy = -(log_softmax.exp() * log_softmax).sum(-1) if want_entropy else None
    return logprobs, entropy


def working_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The type that logits are made in: float64 for float64 rows, float32 for every other."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def full_precision(hidden: torch.Tensor) -> torch.autocast:
    """A context in which autocast leaves float32 matrix products alone."""
    return torch.autocast(hidden.device.type, enabled=False)


def _add_bias(logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    # A finite floor for -inf: 0·(-inf) in the entropy would be NaN. Division by a temperature keeps it finite.
    floor = torch.finfo(logits.dtype).min / 1e6
    return logits + bias.to(logits.dtype).clamp(min=floor)


class LogitBlock(NamedTuple):
    """What is kept of one block of C rows: never more than two [C, V] tensors without a softcap."""

    log_softmax: torch.Tensor
    """[C, V]."""
    probabilities: torch.Tensor
    """[C, V]."""
    gate: torch.Tensor | None
    """[C, V]: derivative of the softcap."""


class HeadTensors(NamedTuple):
    """The head's tensors in the working type, cast once a call."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def head_tensors(hidden: torch.Tensor, head: LMHead) -> HeadTensors:
    """Casts a head for the rows of ``hidden``; nothing is copied where the type fits already."""
    work = working_dtype(hidden)
    return HeadTensors(head.weight.detach().to(work), None if head.bias is None else head.bias.detach().to(work))


def logit_block(rows: torch.Tensor, head: LMHead, tensors: HeadTensors) -> LogitBlock:
    """Makes the logits of C rows [C, H] and everything that both passes need of them; not differentiable."""
    logits = rows.to(tensors.weight.dtype) @ tensors.weight.T
    if tensors.bias is not None:
        logits = _add_bias(logits, tensors.bias)
    gate = None
    if head.softcap is not None:
        gate = logits.mul_(head.logit_scale / head.softcap).tanh_()
        logits = gate * (head.softcap / head.temperature)
        gate.square_().neg_().add_(1.0)
    elif head.logit_scale != head.temperature:
        logits.mul_(head.logit_scale / head.temperature)
    log_softmax = torch.log_softmax(logits, dim=-1)
    return LogitBlock(log_softmax, torch.exp(log_softmax, out=logits), gate)


def block_statistics(block: LogitBlock, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of the targets and entropy, both [C], in nats."""
    logprobs = block.log_softmax.gather(1, targets[:, None])[:, 0]
    return logprobs, -torch.linalg.vecdot(block.probabilities, block.log_softmax)


class RowGradient(NamedTuple):
    """What reaches a block's rows from the loss."""

    logprobs: torch.Tensor
    """[C]: g."""
    entropy: torch.Tensor | None = None
    """[C]: e."""


def logit_gradient(
    block: LogitBlock, gradient: RowGradient, *, targets: torch.Tensor, entropy: torch.Tensor, head: LMHead
) -> torch.Tensor:
    """Gradient [C, V] of what the head's linear map puts out. Overwrites ``block``."""
    g = gradient.logprobs[:, None]
    if gradient.entropy is None:
        result = block.probabilities.mul_(-g)
    else:
        inner = block.log_softmax.add_(entropy[:, None]).mul_(gradient.entropy[:, None]).add_(g)
        result = block.probabilities.mul_(inner).neg_()
    result.scatter_add_(1, targets[:, None], g)
    if block.gate is not None:
        result.mul_(block.gate)
    if head.logit_scale != head.temperature:
        result.mul_(head.logit_scale / head.temperature)
    return result


class HeadGradient:
    """Gradients of hidden rows, weight and bias, gathered block by block.

    Args:
        hidden: [T, H].
        tensors: the head in the working type.
        wanted: which of hidden, weight and bias need one.
    """

    def __init__(self, hidden: torch.Tensor, tensors: HeadTensors, *, wanted: tuple[bool, bool, bool]) -> None:
        self._tensors = tensors
        self._wanted = wanted
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(tensors.weight) if wanted[1] else None
        self.bias = torch.zeros_like(tensors.bias) if wanted[2] and tensors.bias is not None else None

    @property
    def wanted(self) -> bool:
        """Whether anything is."""
        return any(self._wanted)

    def add(self, rows: slice, hidden_rows: torch.Tensor, logit_gradient: torch.Tensor) -> None:
        """Adds the part of one block."""
        if self.hidden is not None:
            self.hidden[rows] = (logit_gradient @ self._tensors.weight).to(self.hidden.dtype)
        if self.weight is not None:
            self.weight.addmm_(logit_gradient.T, hidden_rows.to(self.weight.dtype))
        if self.bias is not None:
            self.bias.add_(logit_gradient.sum(0))


def row_chunks(start: int, stop: int, *, max_rows: int) -> Iterator[slice]:
    """Cuts rows into the fewest pieces of at most ``max_rows``, as even as can be."""
    count = -(-(stop - start) // max_rows)
    for index in range(count):
        yield slice(start + (stop - start) * index // count, start + (stop - start) * (index + 1) // count)


def rows_per_chunk(hidden: torch.Tensor, head: LMHead) -> int:
    """How many rows of logits fit into the head's ``chunk_bytes``; at least 1."""
    return max(1, head.chunk_bytes // max(1, head.weight.shape[0] * working_dtype(hidden).itemsize))


class _ChunkedTokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, head: LMHead
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = head_tensors(hidden, head)
        logprobs = torch.empty(hidden.shape[0], dtype=tensors.weight.dtype, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        with full_precision(hidden):
            for rows in row_chunks(0, hidden.shape[0], max_rows=rows_per_chunk(hidden, head)):
                block = logit_block(hidden[rows], head, tensors)
                logprobs[rows], entropy[rows] = block_statistics(block, targets[rows])
        ctx.save_for_backward(hidden, weight, bias, targets, entropy)
        ctx.head = head
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor, grad_entropy: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None, None]:
        hidden, weight, bias, targets, entropy = ctx.saved_tensors
        head = ctx.head
        tensors = head_tensors(hidden, head)
        sums = HeadGradient(hidden, tensors, wanted=ctx.needs_input_grad[:3])
        with full_precision(hidden):
            for rows in row_chunks(0, hidden.shape[0], max_rows=rows_per_chunk(hidden, head)):
                block = logit_block(hidden[rows], head, tensors)
                gradient = RowGradient(grad_logprobs[rows], grad_entropy[rows])
                sums.add(
                    rows, hidden[rows], logit_gradient(block, gradient, targets=targets[rows], entropy=entropy[rows], head=head)
                )
        return (
            sums.hidden,
            None if sums.weight is None else sums.weight.to(weight.dtype),
            None if sums.bias is None else sums.bias.to(bias.dtype),
            None,
            None,
        )


def _token_logprob_torch(
    hidden: torch.Tensor, head: LMHead, *, targets: torch.Tensor, want_entropy: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if hidden.shape[0] <= rows_per_chunk(hidden, head):
        return token_logprob_reference(hidden, head, targets=targets, want_entropy=want_entropy)
    outputs: tuple[torch.Tensor, torch.Tensor] = _ChunkedTokenLogprob.apply(hidden, head.weight, head.bias, targets, head)  # type: ignore[no-untyped-call]
    return outputs[0], outputs[1] if want_entropy else None


_IMPLEMENTATIONS = {"torch": Implementation(_token_logprob_torch)}


def token_logprob(
    hidden: torch.Tensor, head: LMHead, *, targets: torch.Tensor, want_entropy: bool = True, impl: Impl = "auto"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of each row's target, and entropy, without logits of all rows.

    Args:
        hidden: float [T, H], final hidden states of the rows that predict the targets.
        head: how they become logits.
        targets: int64 [T].
        want_entropy: also return the entropy.
        impl: how it is computed.

    Returns:
        float32 (float64 for float64 rows) log-probabilities [T] and entropy [T] or ``None``, in nats, both differentiable with
        respect to ``hidden``, ``head.weight`` and ``head.bias``.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_rows(hidden, head, targets)
    run = resolve("token_logprob", _IMPLEMENTATIONS, impl=impl, like=hidden)
    return run(hidden, head, targets=targets, want_entropy=want_entropy)


def check_rows(hidden: torch.Tensor, head: LMHead, targets: torch.Tensor) -> None:
    """Holds rows and targets against the head.

    Raises:
        ValueError: a tensor that does not fit, with its shape.
    """
    if hidden.ndim != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; for a head of {tuple(head.weight.shape)} it must be (T, H)")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets has shape {tuple(targets.shape)}; hidden has {hidden.shape[0]} rows, so it must be (T,)")
