"""Float32 matrix products on a CPU, by the faster of the two libraries that torch is built with.

torch hands dense float32 products to MKL, which leaves AVX-512 unused on AMD's processors. oneDNN, in the same build of torch,
uses it: 240 GFLOP/s against 110 on one core of an AMD EPYC (Zen 5, torch 2.13, November 2026; 572 rows, 576 to 1,536 features).
On Zen 4, whose units are half as wide, it is 104 against 97 there, 1.4 times as fast with 8 rows, and gradients of weights take
up to a third longer with so few.
Where that is so, products of some size go to oneDNN; everywhere else all of this is torch's own.

Its entry is an operator that torch keeps for its compiler, ``mkldnn::_linear_pointwise``, x W^T + b. A weight must lie in order
or be the transpose of one that does: at other strides oneDNN falls back to code a thousand times slower. Rows of a result do
not depend on the rows beside them, but for a single row, whose sums take another order. That holds of oneDNN 3.12, with which
torch 2.13 is built; 3.10, of torch 2.11, takes another order up to some 90 rows, and nothing is left to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own custom)

from grpo_fast.ops.first_derivative import once_differentiable

ONEDNN_OPS = frozenset({torch.ops.mkldnn._linear_pointwise.default} if torch.backends.mkldnn.is_available() else ())
"""The operator that multiplies, in a torch that has it."""
ROWS_STAND_ALONE = torch.__version__ >= "2.13"
"""Whether a row of oneDNN's product is the same whatever the number of rows: a sequence's bits must not depend on its batch."""
_LEAST_WORK = 2**20
"""Multiplications under which oneDNN's longer way in, 10 µs, costs more than it saves."""
_ANY = 1
"""Fewest rows for which oneDNN computes a head's products: 1, as a row's library must not depend on the number of rows."""
_USES_TO_PACK = 16
"""A weight is laid out anew in the time that six products with 8 rows save, or some twenty with many."""
_SLICE = 1024
"""Rows of a large weight that are multiplied at a time, so that what is made on the way stays in cache."""
_NUMBERS_TO_A_DOUBLING = 8
"""Numbers of rows that :func:`rounded_rows` gives."""


def onednn_is_faster(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this is an AMD processor with AVX-512, by what Linux says of it, and torch 2.13 or newer with both libraries."""
    if not (ROWS_STAND_ALONE and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not cpuinfo.exists():
        return False
    text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    return "AuthenticAMD" in text and re.search(r"^flags\s*:.*\bavx512f\b", text, flags=re.MULTILINE) is not None


USES_ONEDNN = onednn_is_faster()
"""Of this machine, read once."""


def rounded_rows(num_rows: int, device: torch.device) -> int:
    """So many rows, up to the next of a few numbers: what to pad to where the number is another one every time.

    oneDNN compiles a kernel for every shape that it meets and keeps it: a millisecond (one core of an AMD EPYC, November 2026)
    and 0.6 MiB of small blocks, between which the heap can no longer join what tensors leave.

    Args:
        num_rows: as they are.
        device: where they lie.

    Returns:
        At most an eighth more, one of eight numbers to a doubling; ``num_rows`` itself up to 16, or where oneDNN does not
        multiply.
    """
    if not USES_ONEDNN or device.type != "cpu" or num_rows < 1:
        return num_rows
    step = max(1, (1 << (num_rows - 1).bit_length()) // (2 * _NUMBERS_TO_A_DOUBLING))
    return -(-num_rows // step) * step


def _is_plain(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    plain = type(weight) in {torch.Tensor, torch.nn.Parameter} and rows.device.type == weight.device.type == "cpu"
    return plain and rows.dtype == weight.dtype == torch.float32


def _goes_to_onednn(rows: torch.Tensor, weight: torch.Tensor, num_rows: int) -> bool:
    return USES_ONEDNN and _is_plain(rows, weight) and num_rows * weight.numel() >= _LEAST_WORK


@torch.library.custom_op("grpo_fast::product", mutates_args=())
def _product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A product by oneDNN that torch's compiler takes; the operator itself it knows only with weights that never change."""
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return result


@_product.register_fake
def _(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return rows.new_empty(*rows.shape[:-1], weight.shape[0])


def _onednn(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    if torch.compiler.is_compiling():
        result: torch.Tensor = _product(rows, weight, bias)
    else:
        result = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        return _onednn(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad
        flat = gradient.flatten(0, -2)
        return (
            _onednn(gradient, weight.t()) if wants_rows else None,
            _onednn(flat.t(), rows.flatten(0, -2).contiguous().t()) if wants_weight else None,
            flat.sum(0) if wants_bias else None,
        )


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``rows`` times the transpose of ``weight``; differentiable.

    Args:
        rows: [..., in], at least two dimensions for oneDNN.
        weight: [out, in].
        bias: [out].

    Returns:
        [..., out].
    """
    taken = rows.ndim > 1 and _goes_to_onednn(rows, weight, rows.shape[:-1].numel())
    if not taken or torch.is_autocast_enabled("cpu"):
        return F.linear(rows, weight, bias)
    result: torch.Tensor = _Linear.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    return result


class ProductLinear(torch.nn.Linear):
    """A linear layer by :func:`linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's own name, which callers may use)
        """[..., in] to [..., out]."""
        return linear(input, self.weight, self.bias)


def use_products(model: torch.nn.Module) -> None:
    """Makes every plain linear layer of a model multiply by :func:`linear`, where that may be faster.

    Layers stay the objects that they are, with their parameters, names and hooks; only their class changes.
    """
    for module in model.modules() if USES_ONEDNN else ():
        if type(module) is torch.nn.Linear and module.weight.dtype == torch.float32:
            module.__class__ = ProductLinear


def pays_to_pack(layer: torch.nn.Module, *, num_rows: int, num_uses: int) -> bool:
    """Whether laying a layer's weight out anew (:class:`PackedWeight`) is paid back.

    Args:
        layer: a typical one.
        num_rows: of each product.
        num_uses: products before the weight changes.
    """
    if not isinstance(layer, ProductLinear) or num_uses < _USES_TO_PACK:
        return False
    return _goes_to_onednn(layer.weight, layer.weight, num_rows)


class PackedWeight:
    """Weights of linear layers of one input, as one, laid out for products with few rows; a copy, for use without gradients.

    Reading a weight as it lies bounds a product with a few rows; oneDNN's own layout takes 0.6 of the time with 8 of them.

    Args:
        layers: with the same input; all or none with a bias.
    """

    def __init__(self, layers: Sequence[torch.nn.Linear]) -> None:
        self.sizes = [layer.out_features for layer in layers]
        """Outputs of each layer."""
        biases = tuple(layer.bias for layer in layers if layer.bias is not None)
        if biases and len(biases) < len(layers):
            raise ValueError(f"{len(biases)} of {len(layers)} layers have a bias; pack them separately")
        self._bias = torch.cat(biases) if biases else None
        weight = torch.cat(tuple(layer.weight for layer in layers)) if len(layers) > 1 else layers[0].weight
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 8)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, in] to [n, outputs of all layers]."""
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return result


def mm(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``rows`` [M, K] times ``weight`` [K, N]; for heads, no gradient is kept."""
    return _onednn(rows, weight.t()) if _goes_to_onednn(rows, weight, _ANY) else torch.mm(rows, weight)


def as_operand(values: torch.Tensor, short: torch.dtype | None, work: torch.dtype) -> torch.Tensor:
    """A matrix as it is multiplied: rounded to ``short``, and of it where a GPU multiplies that, else of ``work``."""
    values = values if short is None else values.to(short)
    return values if short is not None and values.device.type == "cuda" else values.to(work)


def with_gradient(gradient: torch.Tensor, operand: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A gradient of float32 (or float64) and an operand, of one type: the operand's if that is bfloat16.

    float16 lacks the range of a gradient, whose small numbers would be 0 there: such an operand is widened.
    """
    if operand.dtype == torch.bfloat16:
        return gradient.to(operand.dtype), operand
    return gradient, operand.to(gradient.dtype)


def mm_of(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left`` [M, K] times ``right`` [K, N] of the same type, summed in float32 and of that (float64 of float64)."""
    if left.dtype.itemsize > 2:
        return mm(left, right)
    product = torch.empty(left.shape[0], right.shape[1], dtype=torch.float32, device=left.device)
    mm_into(left, right, out=product)
    return product


def mm_into(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor, add: bool = False) -> None:
    """Writes a product into ``out``, or adds it there; no gradient is kept.

    Args:
        left: [M, K].
        right: [K, N] of the same type.
        out: [M, N] of that type; or float32 for operands of 16 bits, which a GPU multiplies as they are and sums in float32.
        add: whether to add.
    """
    if left.dtype != out.dtype and left.device.type != "cuda":
        left, right = left.to(out.dtype), right.to(out.dtype)
    if left.dtype == out.dtype:
        _ = torch.addmm(out, left, right, out=out) if add else torch.mm(left, right, out=out)
    elif add:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def rows_at_once(rows: int, work: int) -> int:
    """How many rows of a head, or of its gradient, are multiplied at a time on this machine's CPU; 0 for all without a copy.

    Args:
        rows: V.
        work: multiplications that decide: one row's, or for a gradient those of all.
    """
    return min(rows, _SLICE) if USES_ONEDNN and work >= _LEAST_WORK else 0


def linear_into(rows: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor) -> None:
    """Writes ``rows`` [M, K] times the transpose of ``weight`` [N, K] into ``out`` [M, N]."""
    if not _goes_to_onednn(rows, weight, _ANY):
        torch.mm(rows, weight.T, out=out)
        return
    for start in range(0, len(weight), _SLICE):
        part = slice(start, start + _SLICE)
        out[:, part] = _onednn(rows, weight[part])


def add_outer(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Adds the transpose of ``left`` [M, N] times ``right`` [M, K] to ``total`` [N, K], in place; ``None`` begins one."""
    num_rows, num_columns = left.shape[1], right.shape[1]
    if not _goes_to_onednn(left, right, num_rows * num_columns):
        return torch.mm(left.T, right) if total is None else total.addmm_(left.T, right)
    if total is None:
        total = left.new_zeros(num_rows, num_columns)
    right = right.contiguous()
    for start in range(0, num_rows, _SLICE):
        part = slice(start, start + _SLICE)
        total[part] += _onednn(left[:, part].contiguous().t(), right.t())
    return total
