"""vLLM asleep: while the policy trains, the GPU's memory that vLLM held is the trainer's.

It falls asleep when a step's rollouts are made and wakes in parts, within the sync that follows: its weights before they are
sent, its keys and values when the buckets of the transfer are gone. At level 2 it drops its weights, which all come anew; with
adapters the base does not, so level 1 keeps weights in the host's memory. Nothing here imports vLLM. No GPU has run it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from packaging.version import Version

_READS_ALLOC_CONF = Version("0.32")
"""A version that reads PYTORCH_ALLOC_CONF; 0.28 does not."""

Part = Literal["weights", "kv_cache"]


def sleep_level(*, on_gpu: bool, has_adapters: bool) -> int:
    """How deep an engine may sleep that a sync wakes.

    Raises:
        ValueError: there is no GPU, where alone vLLM can sleep.
    """
    if not on_gpu:
        raise ValueError("vLLM's sleep mode works on GPUs only; set vllm_enable_sleep_mode=False")
    return 1 if has_adapters else 2


def check_segments(vllm: Version, environment: Mapping[str, str]) -> None:
    """Checks that vLLM will find out where torch's allocator makes expandable segments, of which its pool must have none.

    Args:
        vllm: its version; an older one looks into another variable than torch's new one.
        environment: that of its process.

    Raises:
        ValueError: it will not.
    """
    settings = environment.get("PYTORCH_ALLOC_CONF", "")
    if "expandable_segments:True" in settings and vllm.release < _READS_ALLOC_CONF.release:
        raise ValueError(
            f"PYTORCH_ALLOC_CONF={settings!r}: sleep mode cannot free memory in expandable segments. vLLM {vllm} disables them "
            f"only if PYTORCH_CUDA_ALLOC_CONF sets them; set that variable, or install vLLM {_READS_ALLOC_CONF} or newer"
        )


def free_unused() -> None:
    """Gives back what torch holds of this process's GPU without need."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


class Sleeper:
    """Knows which parts of an engine sleep.

    Args:
        sleep: puts the whole engine to sleep, at a level.
        wake_up: wakes one part.
    """

    def __init__(self, sleep: Callable[[int], object], wake_up: Callable[[Part], object]) -> None:
        self._sleep = sleep
        self._wake_up = wake_up
        self._asleep: set[Part] = set()

    def sleep(self, level: int) -> None:
        """Puts all of it to sleep, unless it sleeps."""
        if not self._asleep:
            self._asleep = {"weights", "kv_cache"}  # also where it fails: a part that is awake is woken without harm
            self._sleep(level)

    def found_asleep(self) -> None:
        """Takes all of it for asleep: someone else put it to sleep, and did not wake it."""
        self._asleep = {"weights", "kv_cache"}

    def wake(self, part: Part) -> None:
        """Wakes a part that sleeps; what torch holds of the GPU without need makes room for it."""
        if part not in self._asleep:
            return
        free_unused()
        self._wake_up(part)
        self._asleep.remove(part)
