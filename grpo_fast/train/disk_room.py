"""Room for checkpoints on a run's disk: what cannot hold one is found out before anything is loaded, not at the first save."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from grpo_fast.config import Config, ConfigError
from grpo_fast.run_dir import nearest_place
from grpo_fast.sinks.quantities import binary
from grpo_fast.train.plan_sizes import ModelSizes, weight_bytes
from grpo_fast.train.policy_source import computes_in_bfloat16, pick_device

_BESIDE_NEWEST = 2
"""Checkpoints beside the newest ones: the best, and the one that is being written."""


def checkpoint_bytes(outline: PreTrainedModel, config: Config) -> int:
    """Bytes of one checkpoint of a run: weights (or adapters), the optimiser's state, and a reference policy that follows.

    Small files and what quantised moments need besides are not counted.

    Args:
        outline: the model's modules, adapters included.
        config: the run's.
    """
    short = computes_in_bfloat16(config, pick_device(config.device).type)
    sizes = ModelSizes.of(outline, config, dtype=torch.bfloat16 if short else torch.float32)
    weights = sizes.trained * weight_bytes(config) if config.use_peft else sizes.whole_bytes(config)
    moments = 2 if "8bit" in config.optim else 8
    masters = 4 if config.offload_optimizer else 0
    follower = sizes.reference_bytes(config, of_adapters=False, in_parts=False) if config.sync_ref_model else 0
    return weights + sizes.trained * (moments + masters) + follower


def check_disk(config: Config, needed: int, *, freed: Iterable[Path] = ()) -> None:
    """Ends a run before anything is loaded where its disk cannot hold one checkpoint.

    Args:
        config: the run's.
        needed: bytes of a checkpoint.
        freed: files and directories that will be deleted before the first is written.

    Raises:
        ConfigError: it cannot; the message says how much is missing.
    """
    free = _free_bytes(config.output_dir)
    if free is None or free >= needed or free + sum(map(_bytes_of, freed)) >= needed:
        return
    raise ConfigError(
        f"output_dir {config.output_dir}: a checkpoint needs {binary(needed)} (weights and optimiser), and {binary(free)} are "
        "free on that disk; make room, or name an output_dir on another one"
    )


def few_checkpoints(config: Config, needed: int, *, step: int, existing: int) -> list[str]:
    """A warning where the disk would be full before the run has all the checkpoints that it keeps at once; else nothing.

    Args:
        config: the run's.
        needed: bytes of a checkpoint.
        step: the step that it begins after.
        existing: checkpoints that are there.
    """
    free = _free_bytes(config.output_dir)
    saves = existing + -(-(config.max_steps - step) // config.save_steps)
    at_once = min(saves, config.save_total_limit + _BESIDE_NEWEST)
    room = at_once if free is None else free // needed
    if existing + room >= at_once:
        return []
    fewer = existing + room - _BESIDE_NEWEST
    lower = f"set save_total_limit to {fewer} or less" if fewer >= 1 else "save less often (save_steps)"
    told = (
        f"the disk of {config.output_dir} has {binary(free or 0)} free, enough for {room} more of its checkpoints of "
        f"{binary(needed)}; there may be {at_once} at once, {existing} of which are there already: make room, {lower}, or name "
        "an output_dir on another disk"
    )
    return [told]


def _free_bytes(path: Path) -> int | None:
    """Bytes that this user may still write where a directory is or will be; ``None`` where the file system does not say."""
    found = os.statvfs(nearest_place(path))
    blocks = found.f_bavail if os.geteuid() else found.f_bfree
    return blocks * found.f_frsize if found.f_blocks else None


def _bytes_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.lstat().st_size for file in files if file.is_file())
