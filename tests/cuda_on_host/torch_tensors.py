"""The tensors of :mod:`tests.cuda_on_host.torch_device`, and what each operation does on them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as no_mode

__all__ = ["Mode", "OnDevice", "no_mode", "on_host", "on_wait", "pinned", "varlen_calls"]

_DEVICE = torch.device("cuda", 0)
_BETWEEN_DEVICES = {"aten::copy_", "aten::_to_copy"}
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
"""Where indices may lie on the host."""
_OF_ONE_DEVICE = {"aten::cat", "aten::stack"}
"""Where numbers of the host are not taken either."""
_WAITS = {
    "aten::_local_scalar_dense", "aten::bincount", "aten::equal", "aten::histc", "aten::masked_select", "aten::nonzero",
    "aten::_unique2", "aten::unique_consecutive",
}  # fmt: skip
"""What gives a number, or a size that depends on numbers."""
_SDPA_IN_PLAIN_OPERATIONS = 0
on_wait: Callable[[str], None] = lambda operation: None  # noqa: E731
pinned: set[int] = set()
"""Where memory of the host begins that has been pinned."""
varlen_calls: list[tuple[int, ...]] = []
"""Shapes of the queries of ``varlen_attn``."""


class OnDevice(torch.Tensor):
    """A tensor of the device; ``inner`` holds its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=_DEVICE,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})
        if func == torch.Tensor.data.__set__:  # no operation that would come back here
            args[0].inner = args[1].inner
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.inner!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """torch's own takes apart the storage, which is not this tensor's but its numbers'."""
        if id(self) not in memo:
            copied = self.detach().clone()
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        return memo[id(self)]

    def numpy(self, **_: Any) -> Any:
        raise TypeError("a tensor on cuda:0 has no numpy array; copy it to the host first")

    __array__ = numpy

    def tolist(self) -> Any:
        on_wait("tolist")
        return self.inner.detach().tolist()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()


class Mode(TorchDispatchMode):
    """Makes tensors of the device where one is asked for by its name alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def on_host(value: Any) -> Any:
    """A tensor of the device as one of the host, in the same memory; anything else as it is."""
    return value.inner if isinstance(value, OnDevice) else value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if any(isinstance(tensor, DTensor) for tensor in tensors):
        return NotImplemented  # comes back with what they hold
    here = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    name = func._schema.name
    stand_in = _OF_THE_HOST.get(name) or (here and (_STAND_INS.get(str(func)) or _own_op(name)))
    if stand_in:
        return stand_in(*args, **kwargs)
    asked = kwargs.get("device")
    to_device = bool(here) if asked is None else torch.device(asked).type == "cuda"
    if here:
        _refuse_mixtures(name, args, tensors)
    if (here or to_device) and _waits(name, args, kwargs, to_device=to_device):
        on_wait(str(func))
    options = kwargs | ({"device": torch.device("cpu")} if asked is not None else {})
    pins = bool(options.pop("pin_memory", False))
    found = func(*pytree.tree_map(on_host, args), **pytree.tree_map(on_host, options))
    if pins:
        return _pinned(found)
    if not to_device:
        return found.clone() if any(found is tensor.inner for tensor in here) else found
    known = {id(on_host(tensor)): tensor for tensor in tensors}  # what is written in place stays the same object
    return pytree.tree_map_only(torch.Tensor, lambda made: known[id(made)] if id(made) in known else OnDevice(made), found)


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    pinned.add(tensor.untyped_storage().data_ptr())
    return tensor


def _refuse_mixtures(name: str, args: Any, tensors: Sequence[torch.Tensor]) -> None:
    if name in _BETWEEN_DEVICES:
        return
    indexed = name in _INDEXED and isinstance(args[0], OnDevice)
    checked = [leaf for leaf in pytree.tree_leaves(args[2:]) if isinstance(leaf, torch.Tensor)] if indexed else tensors
    least = 0 if name in _OF_ONE_DEVICE else 1
    if any(tensor.dim() >= least and not isinstance(tensor, OnDevice) for tensor in checked):
        told = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise RuntimeError(f"{name} was given tensors of several devices: {told}")


def _waits(name: str, args: Any, kwargs: dict[str, Any], *, to_device: bool) -> bool:
    if name in _BETWEEN_DEVICES:
        source, target = (args[1], args[0]) if name == "aten::copy_" else (args[0], None)
        crosses = isinstance(source, OnDevice) != (to_device if target is None else isinstance(target, OnDevice))
        at_once = kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
        return crosses and not at_once
    if name in _INDEXED:
        return any(isinstance(leaf, OnDevice) and leaf.dtype == torch.bool for leaf in pytree.tree_leaves(args[1]))
    return name in _WAITS or (name == "aten::repeat_interleave" and kwargs.get("output_size") is None)


def _own_op(name: str) -> Callable[..., Any] | None:
    """The body of an op that is written in Python: it runs on tensors of the device."""
    definition = torch._library.custom_ops.OPDEFS.get(name)
    if definition is None or name.startswith("torch_attn::"):
        return None

    def run(*args: Any, **kwargs: Any) -> Any:
        with Mode():
            return (definition._backend_fns.get("cuda") or definition._init_fn)(*args, **kwargs)

    return run


def _product(name: str) -> Callable[..., Any]:
    """Products of 16-bit tensors with a float32 result, which CUDA alone has."""

    def run(*args: Any, out: OnDevice | None = None, **scales: float) -> OnDevice:
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        assert all(isinstance(tensor, OnDevice) for tensor in tensors)
        assert {tensor.dtype for tensor in tensors[-2:]} <= {torch.bfloat16, torch.float16}
        assert torch.float32 in args
        result = getattr(torch, name)(*(on_host(tensor).float() for tensor in tensors), **scales)
        if out is None:
            return OnDevice(result)
        out.inner.copy_(result)
        return out

    return run


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: tuple[list[int], list[int]],
    scale: float | None,
    window: Sequence[int],
) -> torch.Tensor:
    """Attention of packed sequences in float32, one after the other."""
    found, share = [], query.shape[1] // key.shape[1]
    left, right = (width if width >= 0 else query.shape[0] for width in window)
    for first, last, first_key, last_key in zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False):
        q = query[first:last].transpose(0, 1).float()
        k, v = (side[first_key:last_key].repeat_interleave(share, 1).transpose(0, 1).float() for side in (key, value))
        distance = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(k.shape[1])
        scores = q @ k.transpose(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores.masked_fill((distance > left) | (distance < -right), float("-inf"))
        found.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(found).to(query.dtype)


def _ends(query: OnDevice, key: OnDevice, tables: Sequence[OnDevice], most: Sequence[int]) -> tuple[list[int], list[int]]:
    """Checks what the kernel would not."""
    assert all(isinstance(tensor, OnDevice) for tensor in (query, key, *tables))
    assert query.dtype == key.dtype
    assert query.dtype in {torch.bfloat16, torch.float16}
    assert {table.dtype for table in tables} == {torch.int32}
    first, second = (table.inner.tolist() for table in tables)
    for ends, side, longest in zip((first, second), (query, key), most, strict=True):
        assert (ends[0], ends[-1]) == (0, len(side))
        assert max(end - start for start, end in pairwise(ends)) <= longest
    return first, second


def _varlen(*args: Any) -> tuple[OnDevice, ...]:
    query, key, value, table, key_table, most, most_keys, _, scale, window, *shares_keys = (
        args  # the last where it is no default
    )
    assert shares_keys[:1] == [True] or query.shape[1] == key.shape[1]
    if torch.cuda.get_device_capability() < (8, 0):
        raise RuntimeError("flash attention needs compute capability 8.0")
    ends = _ends(query, key, (table, key_table), (most, most_keys))
    varlen_calls.append(tuple(query.shape))
    with no_mode():
        out = _attention(query.inner, key.inner, value.inner, ends, scale, window)
    return OnDevice(out), OnDevice(torch.zeros(query.shape[1], len(query))), OnDevice(torch.zeros(2, dtype=torch.int64))


def _varlen_backward(*args: Any) -> tuple[OnDevice, ...]:
    grad, query, key, value, _, _, table, key_table, most, most_keys, _, _, scale, window = args
    ends = _ends(query, key, (table, key_table), (most, most_keys))
    found: list[torch.Tensor] = []

    def work() -> None:  # in a thread of its own, as autograd is off within a dispatch
        leaves = [side.inner.detach().requires_grad_() for side in (query, key, value)]
        found.extend(torch.autograd.grad(_attention(*leaves, ends, scale, window), leaves, grad.inner))

    thread = threading.Thread()
    thread.run = work  # type: ignore[method-assign]
    thread.start()
    thread.join()
    return tuple(map(OnDevice, found))


_OF_THE_HOST: dict[str, Callable[..., Any]] = {
    "aten::pin_memory": lambda tensor, *_, **__: _pinned(tensor.clone()),
    "aten::_pin_memory": lambda tensor, *_, **__: _pinned(tensor.clone()),
    "aten::is_pinned": lambda tensor, *_, **__: on_host(tensor).untyped_storage().data_ptr() in pinned,
}
_STAND_INS: dict[str, Callable[..., Any]] = {
    "aten._fused_sdp_choice.default": lambda *_, **__: _SDPA_IN_PLAIN_OPERATIONS,
    "torch_attn._varlen_attn.default": _varlen,
    "torch_attn._varlen_attn_backward.default": _varlen_backward,
} | {f"aten.{name}.{overload}": _product(name) for name in ("mm", "addmm", "bmm") for overload in ("dtype", "dtype_out")}
