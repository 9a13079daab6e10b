"""A CUDA device for PyTorch's build for CPUs: its tensors say ``cuda:0`` and lie in host memory.

What is tested with it is what an interpreter of kernels cannot tell: that no operation mixes tensors of the device and of the
host, that kernels get tensors of the device alone, which paths a run on a GPU takes, and where the host waits for the device.
Nothing is timed here, no kernel is compiled, and numbers are the host's.

    load(LIBRARY)               # of build_torch_device, before anything imports torch
    device = Device()           # in the main thread, for all
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import sys
import threading
import traceback
import types
from collections import Counter
from pathlib import Path
from typing import Any

_MIB = 2**20


def load(library: Path) -> None:
    """PyTorch asks once whether there is a device, while it is imported."""
    assert "torch" not in sys.modules
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


class Device:
    """Makes the device known to this process, and tells what was done on it."""

    def __init__(self) -> None:
        import torch

        from tests.cuda_on_host import torch_tensors

        self._tensors = torch_tensors
        self.launched: Counter[str] = Counter()
        """Kernels of Triton by name."""
        self.varlen = torch_tensors.varlen_calls
        self.pinned = torch_tensors.pinned
        self.waits: Counter[str] = Counter()
        """How often the host waited for the device, by the package's functions that led there."""
        torch_tensors.on_wait = self._count
        torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter stays the same object on another device
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # its import looks for CUDA's own libraries
        self._stand_in_for_runtime()
        self._interpret_kernels()
        self._mask_in_plain_tensors()
        self._reach_all_threads()

    def be_of(self, major: int, minor: int) -> None:
        """Takes a compute capability, by which kernels and arithmetic are chosen; name and sizes stay."""
        import torch

        from grpo_fast.device import device_facts

        properties = types.SimpleNamespace(
            name="NVIDIA H100 80GB HBM3", total_memory=80 * 2**30, multi_processor_count=132, major=major, minor=minor, uuid="0"
        )
        torch.cuda.get_device_properties = lambda *_: properties  # type: ignore[assignment, misc]
        torch.cuda.get_device_capability = lambda *_: (major, minor)  # type: ignore[assignment]
        device_facts.cache_clear()

    def _count(self, operation: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/grpo_fast/" in frame.filename]
        self.waits["/".join([*(frame.name for frame in frames), operation])] += 1

    def _stand_in_for_runtime(self) -> None:
        import torch

        class Event:
            def __init__(self, *_: Any, **__: Any) -> None: ...

            def record(self, *_: Any) -> None: ...

            def synchronize(self) -> None: ...

        class Stream:
            def __init__(self, *_: Any, **__: Any) -> None: ...

            def wait_stream(self, other: Stream) -> None: ...

            def wait_event(self, event: Event) -> None: ...

            def record_event(self) -> Event:
                return Event()

        self.be_of(9, 0)
        state = torch.zeros(16, dtype=torch.uint8)
        answers: dict[str, Any] = {
            "_lazy_init": None, "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
            "is_bf16_supported": True,
            "synchronize": None, "empty_cache": None, "set_device": None, "current_stream": Stream(),
            "manual_seed": None, "manual_seed_all": None, "get_rng_state_all": [state], "set_rng_state_all": None,
            "memory_allocated": _MIB, "max_memory_allocated": _MIB, "memory_reserved": _MIB, "max_memory_reserved": _MIB,
            "reset_peak_memory_stats": None, "mem_get_info": (70 * 2**30, 80 * 2**30),
        }  # fmt: skip
        for name, answer in answers.items():
            setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
        torch.cuda.Stream, torch.cuda.Event = Stream, Event  # type: ignore[misc, assignment]
        torch.cuda.stream = lambda _: contextlib.nullcontext()  # type: ignore[assignment, misc]

    def _interpret_kernels(self) -> None:
        """A launch takes the device's path, and then Triton's interpreter on what lies in host memory."""
        import torch
        from triton.runtime import interpreter

        from grpo_fast.ops import jit
        from tests import quick_interpreter

        jit._INTERPRETED = False
        quick_interpreter.install()
        run = interpreter.GridExecutor.__call__

        def given(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(given, value))
            if isinstance(value, jit.TensorDescriptor):
                return jit.TensorDescriptor(given(value.base), value.shape, value.strides, value.block_shape)
            if isinstance(value, torch.Tensor) and not isinstance(value, self._tensors.OnDevice):
                raise TypeError(f"a kernel was given a tensor of the host, {tuple(value.shape)}")
            return self._tensors.on_host(value)

        def launch(executor: Any, *arguments: Any, **options: Any) -> None:
            self.launched[executor.fn.__name__] += 1
            with self._tensors.no_mode():
                run(executor, *map(given, arguments), **{name: given(value) for name, value in options.items()})

        interpreter.GridExecutor.__call__ = launch  # type: ignore[method-assign]

    def _mask_in_plain_tensors(self) -> None:
        """The mask that CUDA's attention takes by its kind alone is a tensor that modes of dispatch refuse."""
        import torch

        def mask(queries: int, keys: int) -> torch.Tensor:
            return torch.ones(queries, keys, dtype=torch.bool, device="cuda").tril(keys - queries)

        importlib.import_module("grpo_fast.ops.packed_attention").causal_lower_right = mask  # type: ignore[attr-defined]

    def _reach_all_threads(self) -> None:
        """Modes of dispatch belong to a thread."""
        import torch

        run = threading.Thread.run

        def enter() -> None:
            torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor asks the mode, too
            self._tensors.Mode().__enter__()

        def run_in_mode(thread: threading.Thread) -> None:
            enter()
            run(thread)

        enter()

        threading.Thread.run = run_in_mode  # type: ignore[method-assign]
