"""The language-model head, which turns hidden rows into the logits that are sampled from, and how rows are cut into chunks.

    u = h W^T + b                              of ``operand_dtype``, rounded to ``logits_dtype``, [T, V]
    z = cap·tanh(u·scale / cap) / temperature  (without a cap: z = u·scale / temperature)

Logits of all rows never live at once: ops walk the rows in chunks of ``chunk_bytes``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

ROW_MULTIPLE = 8
"""Chunks are padded to a multiple of so many rows: below 4 rows a thread, matrix products on a CPU take another order of sums
(MKL, measured), and a row's result would depend on what shares its batch."""
TILE_ROWS = 128
"""Rows of a tile of cuBLAS's products: a chunk with some rows more pays for a whole tile."""

_CPU_CHUNK_BYTES = 64 * 2**20
_SHARE_OF_DEVICE = 32


class HeadNumbers(NamedTuple):
    """The way from ``u = h W^T + b`` to logits: ``z = inner·u``, or under a softcap ``z = outer·tanh(inner·u)``."""

    inner: float
    outer: float
    softcap: bool
    rounds: bool
    """Whether u is rounded first."""


@dataclass(frozen=True, slots=True, eq=False)
class LMHead:
    """The head: its weight, and the settings by which hidden states become the logits that are sampled from.

    Raises:
        TypeError: ``weight`` is no tensor.
        ValueError: a value outside its range, with the field named.
    """

    weight: torch.Tensor
    """[V, H]."""
    bias: torch.Tensor | None = None
    """[V]; minus infinity takes a token out of the vocabulary."""
    temperature: float = 1.0
    """The sampling temperature; it divides the logits last."""
    softcap: float | None = None
    """Bound of the logits through ``cap·tanh(u / cap)``, before the temperature (Gemma 2's ``final_logit_softcapping``)."""
    logit_scale: float = 1.0
    """Multiplies the logits first (Cohere's ``logit_scale``)."""
    logits_dtype: torch.dtype | None = None
    """Type that ``h W^T + b`` is rounded to before anything else: ``torch.bfloat16`` if the rollout engine does so, at a price
    of about 0.02 nat in the mean at a vocabulary of 151,936; ``None`` keeps float32."""
    operand_dtype: torch.dtype | None = None
    """Type that hidden rows and weight are rounded to before their product, as by autocast in a layer: ``torch.bfloat16``
    goes to a GPU's tensor cores, float32 does not. Products are summed in float32 all the same, and so is the gradient of a
    float32 weight. ``None`` takes them as they are."""
    chunk_bytes: int | None = None
    """Size of the block of logits that lives at once; ``None`` takes 64 MiB on a CPU and 1/32 of a GPU's memory."""

    def __post_init__(self) -> None:
        if not isinstance(self.weight, torch.Tensor):
            raise TypeError(f"weight is a {type(self.weight).__name__}; give tensors: LMHead(layer.weight, layer.bias)")
        if self.weight.ndim != 2:
            raise ValueError(f"weight has shape {tuple(self.weight.shape)}; it must be (V, H)")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"bias has shape {tuple(self.bias.shape)} for a weight of {tuple(self.weight.shape)}; it must be (V,)"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature}; it must be positive and finite (greedy has no log-probabilities)"
            )
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap={self.softcap}; it must be positive and finite, or None for no cap")
        if self.logits_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"logits_dtype={self.logits_dtype}; choose float32, bfloat16 or None")
        if self.operand_dtype not in (None, torch.float16, torch.bfloat16):
            raise ValueError(f"operand_dtype={self.operand_dtype}; choose bfloat16, float16 or None")
        if self.chunk_bytes is not None and (not isinstance(self.chunk_bytes, int) or self.chunk_bytes < 1):
            raise ValueError(
                f"chunk_bytes={self.chunk_bytes}; it must be a whole number from 1, or None for the device's default"
            )

    @property
    def slope(self) -> float:
        """Derivative of z by u, where there is no softcap."""
        return self.logit_scale / self.temperature

    @property
    def bound(self) -> float | None:
        """The largest z that a softcap lets through; ``None`` without one."""
        return None if self.softcap is None else self.softcap / self.temperature

    @property
    def rounds_logits(self) -> bool:
        """Whether logits are made coarser than float32 on purpose."""
        return self.logits_dtype not in (None, torch.float32)

    @property
    def numbers(self) -> HeadNumbers:
        """How z follows from u, as kernels take it."""
        if self.softcap is None or self.bound is None:
            return HeadNumbers(self.slope, 1.0, softcap=False, rounds=self.rounds_logits)
        return HeadNumbers(self.logit_scale / self.softcap, self.bound, softcap=True, rounds=self.rounds_logits)

    def finite_bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The bias in another type; a finite floor, which scaling keeps finite, for -inf: 0·(-inf) in the entropy is NaN."""
        return None if self.bias is None else self.bias.to(dtype).clamp(min=torch.finfo(dtype).min / 1e6)

    def operand(self, values: torch.Tensor) -> torch.Tensor:
        """Hidden rows or weight as they are multiplied, in a type of their own; rounding lets gradients through."""
        if self.operand_dtype is None or values.dtype == self.operand_dtype:
            return values
        return _rounded(values, self.operand_dtype)

    def logits_of(self, products: torch.Tensor) -> torch.Tensor:
        """Logits z of ``h W^T + b``, in any shape and the type of ``products``; rounding lets gradients through."""
        if self.logits_dtype is not None and self.rounds_logits:
            products = _rounded(products, self.logits_dtype)
        products = products * self.logit_scale
        if self.softcap is not None:
            products = self.softcap * torch.tanh(products / self.softcap)
        return products / self.temperature


def _rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values as a coarser type has them, in their own; gradients go through.

    Exactly those: a value and what it is rounded to are within a factor of two, or the latter is 0, so that their difference is
    a number of the finer type (Sterbenz), and the sum is one too.
    """
    plain = values.detach()
    return values + (plain.to(dtype).to(values.dtype) - plain)


HeadOptions: TypeAlias = tuple[float, float | None, float, torch.dtype | None, torch.dtype | None, int | None]


def head_options(head: LMHead) -> HeadOptions:
    """The non-tensor fields of a head, in the constructor order of :class:`LMHead`, as plain values for custom operators."""
    return head.temperature, head.softcap, head.logit_scale, head.logits_dtype, head.operand_dtype, head.chunk_bytes


def check_rows(hidden: torch.Tensor, head: LMHead, targets: torch.Tensor, *, name: str = "targets") -> None:
    """Checks rows, and targets or another number of each, against the head.

    Raises:
        ValueError: a tensor that does not fit, with its shape or device.
        TypeError: ``head`` is no LMHead, rows or weight are not floats, or targets are not int64; kernels multiply them by the
            weight's stride.
    """
    if not isinstance(head, LMHead):
        raise TypeError(
            f"head is a {type(head).__name__}; give LMHead(weight, bias), of a layer LMHead(layer.weight, layer.bias)"
        )
    if hidden.ndim != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; for a head of {tuple(head.weight.shape)} it must be (T, H)")
    for what, values in (("hidden", hidden), ("the head's weight", head.weight)):
        if not values.is_floating_point():
            raise TypeError(f"{what} is {values.dtype}; give floats")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"{name} has shape {tuple(targets.shape)}; hidden has {hidden.shape[0]} rows, so it must be (T,)")
    if targets.dtype != torch.int64:
        raise TypeError(f"{name} is {targets.dtype}; give int64")
    check_device(hidden, {"the head's weight": head.weight, "the head's bias": head.bias})


def check_targets(hidden: torch.Tensor, head: LMHead, targets: torch.Tensor) -> None:
    """Checks the targets of rows that :func:`check_rows` has passed.

    Raises:
        ValueError: they are on another device; or, seen on the CPU alone, as elsewhere nothing waits for the device: one is
            outside the vocabulary.
    """
    check_device(hidden, {"targets": targets})
    if not len(targets) or targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = (int(value) for value in targets.aminmax())
    if low < 0 or high >= len(head.weight):
        raise ValueError(
            f"targets go from {low} to {high}; they must be from 0 to {len(head.weight) - 1}. Leave out rows that are not "
            "scored: hidden[scored], targets[scored]"
        )


def check_device(like: torch.Tensor, others: Mapping[str, torch.Tensor | None]) -> None:
    """Checks that tensors are where another is.

    Raises:
        ValueError: one is elsewhere.
    """
    for name, values in others.items():
        if values is not None and values.device != like.device:
            raise ValueError(f"{name} is on {values.device} and the rows are on {like.device}; move it there")


def working_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The type that logits are made in: float64 for float64 rows, float32 for every other."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def short_operands(hidden: torch.Tensor, head: LMHead) -> torch.dtype | None:
    """The type of 16 bits that products with the head are made of, where rows and weight have or are rounded to one."""
    if head.operand_dtype is not None or hidden.dtype != head.weight.dtype or hidden.dtype.itemsize != 2:
        return head.operand_dtype
    return hidden.dtype


def full_precision(hidden: torch.Tensor) -> torch.autocast:
    """A context in which autocast leaves float32 matrix products alone."""
    return torch.autocast(hidden.device.type, enabled=False)


@functools.cache
def default_chunk_bytes(device: torch.device) -> int:
    """The default of ``chunk_bytes``.

    A share of the device's whole memory, not of what is free, so that sizes, and with them the order of sums, are the same in
    every step and after a resume.
    """
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return chunk_bytes_of(device.type, total)


def chunk_bytes_of(kind: str, memory_bytes: int) -> int:
    """The same of a device that need not be here: "cuda" with its memory in bytes, or "cpu", whose memory is not read."""
    return int(memory_bytes) // _SHARE_OF_DEVICE if kind == "cuda" else _CPU_CHUNK_BYTES


def rows_per_chunk(head: LMHead, device: torch.device, *, bytes_per_logit: float) -> int:
    """How many rows of logits fit into the head's ``chunk_bytes``: a multiple of ``ROW_MULTIPLE``, at least that.

    Many rows are a multiple of ``TILE_ROWS`` on a GPU.
    """
    budget = default_chunk_bytes(device) if head.chunk_bytes is None else head.chunk_bytes
    rows = int(budget / max(1, head.weight.shape[0] * bytes_per_logit))
    multiple = TILE_ROWS if device.type == "cuda" and rows >= 8 * TILE_ROWS else ROW_MULTIPLE
    return max(1, rows // multiple) * multiple


def row_chunks(start: int, stop: int, *, max_rows: int) -> Iterator[slice]:
    """Cuts rows into the fewest pieces of at most ``max_rows``, the first the largest, as even as their multiple allows.

    They are cut at multiples of ``TILE_ROWS`` if ``max_rows`` is one, otherwise at multiples of ``ROW_MULTIPLE``.
    """
    multiple = TILE_ROWS if max_rows % TILE_ROWS == 0 else ROW_MULTIPLE
    count = -(-(stop - start) // max_rows)
    groups = -(-(stop - start) // multiple)
    for index in range(count):
        first, last = (start - (-groups * i // count) * multiple for i in (index, index + 1))
        yield slice(first, min(last, stop))


def padded(num_rows: int) -> int:
    """So many rows, up to the next multiple of ``ROW_MULTIPLE``."""
    return -(-num_rows // ROW_MULTIPLE) * ROW_MULTIPLE


def pad_rows(rows: torch.Tensor, num_rows: int | None = None) -> torch.Tensor:
    """Rows [C, ...] with zeros below, up to so many; by default to a multiple of ``ROW_MULTIPLE``."""
    missing = (padded(len(rows)) if num_rows is None else num_rows) - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
