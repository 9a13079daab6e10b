"""A LoRA run as one plain model: the adapters of a checkpoint added to the weights that they were trained over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from grpo_fast.config import Config, ConfigError
from grpo_fast.run_dir import CONFIG_FILE, SUMMARY_FILE, naming, run_of, why_unwritable
from grpo_fast.train.checkpoint import CheckpointError, check_checkpoint, list_checkpoints, write_failure
from grpo_fast.train.policy import Policy
from grpo_fast.train.policy_source import PolicySource
from grpo_fast.train.quantised import dequantised

ExportType = Literal["auto", "float32", "bfloat16", "float16"]
PLAIN = {
    "gradient_checkpointing": False,
    "gradient_checkpointing_mode": "full",
    "use_liger_kernel": False,
    "torch_compile": False,
}
"""Settings that save time or memory in training, and may need a GPU or a compiler."""


def export_merged(source: Path, output: Path, *, dtype: ExportType = "auto") -> Path:
    """Writes base and adapters as one model, which ``from_pretrained`` and every engine reads without peft.

    The sum is made in float32 and rounded once. A base that was held in four bits is first restored from those: the adapters
    were trained over it, not over the original model.

    Args:
        source: a run, of which the checkpoint is taken that its summary names, or else the newest; or one of its checkpoints.
        output: a new or empty directory.
        dtype: type of the weights; ``auto`` is that of the base's own files.

    Returns:
        The checkpoint that was read.

    Raises:
        ConfigError: no such run, one that did not train adapters, or an output that is in use or cannot be written.
        CheckpointError: the checkpoint is damaged, or there is none; or the disk is full.
        OSError: the output cannot be written; it is named.
    """
    run = run_of(source)
    if run is None:
        raise ConfigError(f"{source} is neither a run nor a checkpoint of one: there is no {CONFIG_FILE} in it or beside it")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is in use; name a new or empty directory")
    why = why_unwritable(output)
    if why is not None:
        raise ConfigError(f"{output} cannot be written ({why}); name another directory")
    config = Config.from_toml(run / CONFIG_FILE)
    checkpoint = checkpoint_meant(source, run)
    if not config.use_peft:
        raise ConfigError(f"{run} trained no adapters: {checkpoint} holds the whole model already")
    config = config.replace(device="cpu", dtype="float32", **PLAIN)
    whole = PolicySource(config.replace(load_in_4bit=False, bnb_4bit_quant_type="nf4", use_bnb_nested_quant=False))
    policy = whole.load()
    assert policy.adapters is not None
    if config.load_in_4bit:
        _take_over(PolicySource(config).load(), policy)
    policy.load_weights(checkpoint)
    merged: Any = policy.adapters.merge()
    merged.to(whole.stored_dtype if dtype == "auto" else getattr(torch, dtype))
    policy.adapters = None
    try:
        with naming(output):
            policy.save(output)
    except BaseException as error:
        cause = "" if isinstance(error, OSError) or not isinstance(error, Exception) else write_failure(error, output)
        shutil.rmtree(output, ignore_errors=True)  # it was new or empty, and half a model would be taken for one
        if not cause:
            raise
        raise CheckpointError(f"cannot write {output}: {cause}; make room there, or name another --output") from error
    return checkpoint


@torch.no_grad()
def _take_over(quantised: Policy, policy: Policy) -> None:
    """Replaces the base's weights by those that its four bits stand for: the adapters were trained over these."""
    for name, weight in dequantised(quantised.model):
        policy.model.get_parameter(f"{name}.weight").copy_(weight)


def checkpoint_meant(source: Path, run: Path) -> Path:
    """The checkpoint that ``source`` is, or, where it is the run, the one to use of it; whole by its manifest.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    checkpoint = checkpoint_to_use(run) if source == run else source
    check_checkpoint(checkpoint)
    return checkpoint


def checkpoint_to_use(run: Path) -> Path:
    """The checkpoint that the summary of a finished run recommends, or the newest of one that goes on.

    Raises:
        CheckpointError: there is none.
    """
    found = list_checkpoints(run)
    if not found:
        raise CheckpointError(f"{run} has no checkpoint yet")
    if (run / SUMMARY_FILE).is_file():
        summary = json.loads((run / SUMMARY_FILE).read_text(encoding="utf-8"))
        advice, resumed_since = summary.get("use"), found[-1].name != f"checkpoint-{summary.get('step')}"
        if advice is not None and not resumed_since and (run / advice["checkpoint"]).is_dir():
            return run / str(advice["checkpoint"])
    return found[-1]
