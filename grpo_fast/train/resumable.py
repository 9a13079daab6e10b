"""Resuming: which settings of a run may change, and whether there is a run to resume."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from grpo_fast.config import Config, ConfigError
from grpo_fast.run_dir import CONFIG_FILE, SUMMARY_FILE, no_run
from grpo_fast.train.launch import is_restart

LIMITS = tuple(f"max_{name}" for name in ("steps", "tokens", "flops", "gpu_hours", "wall_hours", "money", "energy_kwh"))
"""Settings that limit a run."""
_CHANGEABLE = {
    *LIMITS,
    "price_per_gpu_hour",
    *(f"forecast{name}" for name in ("", "_epsilon", "_confidence", "_patience", "_min_steps", "_reward_value", "_prior")),
    *("baseline_probe", "collapse_action"),
    "reward_range",
    *(
        "output_dir",
        "overwrite",
        "resume_if_exists",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "sinks",
        "log_completions",
        "report",
    ),
    *("reward_timeout_s", "reward_workers", "reward_on_error", "tokens_per_microbatch", "device", "dtype"),
    *("vllm_gpu_memory_utilization", "vllm_kv_cache_gib", "vllm_server_urls", "vllm_own_process", "vllm_transport"),
    *("vllm_engine_args", "vllm_enable_sleep_mode", "vllm_server_timeout"),
    *("environment_timeout_s", "environment_workers"),
    *("sync_deadline_s", "request_deadline_s", "ddp_timeout_s", "fsdp", "fsdp_offload_params", "fsdp_parallel_head"),
}


_ENDING = {
    *LIMITS,
    *("price_per_gpu_hour", "reward_range", "collapse_action"),
    *(name for name in _CHANGEABLE if name.startswith("forecast")),
}
"""Settings that decide whether a run has ended."""


def ending_settings(config: Config) -> dict[str, Any]:
    """The settings that decided a run's end, as JSON values: while they stay the same, a resumed run ends again."""
    return config.model_dump(mode="json", include=_ENDING)


def has_ended(config: Config, newest: Path) -> bool:
    """Whether a run that is resumed ends at once, as it had with the same settings, so that it writes no checkpoint.

    Args:
        config: of the run, as it is resumed.
        newest: its newest checkpoint.
    """
    try:
        summary = json.loads((config.output_dir / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # it is written at the end, and a damaged one is written anew
        return False
    saved = config_of(config.output_dir)
    if config.reward_range is None:  # it is the task's, which the run's own configuration has
        config = config.model_copy(update={"reward_range": saved.reward_range})
    over = newest.name == f"checkpoint-{summary['step']}" and summary["stopped_by"] not in {"interrupt", "user"}
    return over and ending_settings(saved) == ending_settings(config)


def config_of(run_dir: str | Path) -> Config:
    """The configuration in a run's directory.

    Raises:
        ConfigError: there is no run, or its configuration cannot be read.
    """
    file = Path(run_dir) / CONFIG_FILE
    if not file.exists():
        raise ConfigError(no_run(Path(run_dir)))
    return Config.from_toml(file)


def check_resumable(saved: Config, wanted: Config) -> None:
    """Refuses changes that would make a resumed run another run.

    Raises:
        ConfigError: such a change; fields and both values are named.
    """
    before, after = saved.model_dump(), wanted.model_dump()
    changed = [name for name in before if before[name] != after[name] and name not in _CHANGEABLE]
    if changed:
        listed = ", ".join(f"{name} ({before[name]!r} -> {after[name]!r})" for name in changed)
        raise ConfigError(
            f"a resumed run cannot change {listed}; start a new run with another --output-dir; with "
            f"--model {saved.output_dir}/checkpoint-N it begins from a checkpoint's weights"
        )


def takes_up_run(config: Config, launchers: Collection[str] = ()) -> bool:
    """Whether the run in ``output_dir`` is to be resumed without being named.

    It is if ``resume_if_exists`` is set, or if the run's own ``torchrun`` has restarted its processes.

    Args:
        config: of the run.
        launchers: each rank's :func:`~grpo_fast.train.launch.launcher`.

    Raises:
        ConfigError: there is one, but ``config`` changes settings that a resumed run cannot change.
    """
    if not os.path.exists(config.output_dir / CONFIG_FILE):  # noqa: PTH110 (Path.exists raises where the directory is closed)
        return False
    if not config.resume_if_exists and not is_restart(config.output_dir, launchers):
        return False
    check_resumable(config_of(config.output_dir), config)
    return True
