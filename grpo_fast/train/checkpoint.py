"""Checkpoints that are whole or absent, whatever kills the process.

A checkpoint is written beside its final name, flushed to the disk, listed in a manifest with its sizes, and then renamed: a
directory named ``checkpoint-N`` is complete by construction. It holds the model in ``save_pretrained`` layout, the optimiser
(torch's file; of a sharded policy a directory of ``torch.distributed.checkpoint``), such a directory of a reference policy that
follows, and everything else the trainer needs to go on bit by bit in ``state.json``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from grpo_fast.config import ConfigError
from grpo_fast.train.distributed import ALONE, RankLostError, World
from grpo_fast.train.policy import Policy
from grpo_fast.train.shard_files import ShardsError, missing_shards
from grpo_fast.train.sharding import ShardedPolicy, load_sharded_optimizer, load_whole_optimizer, save_optimizer
from grpo_fast.types import TrainingError

_MANIFEST = "manifest.json"
_OPTIMIZER = "optimizer.pt"
_SHARDS = "optimizer"
_REFERENCE = "reference"
_STATE = "state.json"
_NAME = re.compile(r"checkpoint-(\d+)|\.checkpoint-(\d+)\.old")
_NO_ROOM_BYTES = 2**20


class CheckpointError(TrainingError):
    """A checkpoint cannot be written or read; the message names the file and what to do."""


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    world: World = ALONE,
) -> Path:
    """Writes ``run_dir/checkpoint-<step>`` atomically, replacing one of the same step.

    Rank 0 writes; of a sharded policy, every rank writes its part of the optimiser's state, and of a reference that follows.

    Raises:
        CheckpointError: the disk is full or not writable, for any rank; what was there before is untouched.
    """
    final = run_dir / f"checkpoint-{step}"
    partial = _hidden(final, "partial")
    follower = policy.follower

    def begin() -> None:
        for path in leftovers(run_dir):  # also of other steps: the room that they take may be missing
            shutil.rmtree(path, ignore_errors=True)
        partial.mkdir(parents=True)
        policy.save(partial)
        if not isinstance(policy, ShardedPolicy):
            torch.save(optimizer.state_dict(), partial / _OPTIMIZER)
        if follower is not None and not follower.is_sharded:
            follower.save(partial / _REFERENCE)
        (partial / _STATE).write_text(json.dumps(state), encoding="utf-8")

    try:
        policy.reading(world).once(begin)
        if isinstance(policy, ShardedPolicy):
            with world.watched():
                save_optimizer(policy, optimizer, partial / _SHARDS)
                if follower is not None:
                    follower.save(partial / _REFERENCE)
        world.once(lambda: _seal(partial, final, step=step))
    except Exception as error:
        failure, cause = error, write_failure(error, run_dir)  # asked before removing the partial one makes room

        def tell() -> None:
            raise CheckpointError(_why_unwritten(cause, final)) from failure

        try:
            if world.is_main:
                recover_checkpoints(run_dir)
            if cause:  # which is so on all ranks
                world.once(tell)
            raise
        finally:
            if world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
    return final


def _seal(partial: Path, final: Path, *, step: int) -> None:
    """Lists, flushes and renames what is complete."""
    old = _hidden(final, "old")
    for part, told in ((_SHARDS, "the optimiser's state"), (_REFERENCE, "the reference policy")):
        missing = missing_shards(partial / part)
        if missing:
            raise CheckpointError(
                f"cannot save {final}: of {told}, {', '.join(missing)} did not arrive; {_kept(final)}. All ranks "
                "must write to one directory: name an output_dir on a file system that all nodes share"
            )
    files = {str(path.relative_to(partial)): path.stat().st_size for path in sorted(partial.rglob("*")) if path.is_file()}
    (partial / _MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1), encoding="utf-8")
    for path in [*partial.rglob("*"), partial]:
        _flush(path)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    path: Path, *, policy: Policy, optimizer: torch.optim.Optimizer, world: World = ALONE, has_weights: bool = False
) -> dict[str, Any]:
    """Puts weights, a reference that follows, and optimiser back, in place, and returns the trainer's state.

    The optimiser's state may have been written by any number of ranks, and is read by any.

    Args:
        path: the checkpoint.
        policy: the run's.
        optimizer: of its weights.
        world: the ranks.
        has_weights: whether the policy has been made with the checkpoint's weights.

    Raises:
        CheckpointError: a file is missing, cut short or unreadable to any rank.
        RankLostError: another rank died on the way, which says nothing of the checkpoint.
        MemoryError, torch.OutOfMemoryError: there is too little memory, which says nothing of it either.
    """
    world.gather(lambda: check_checkpoint(path))
    state: dict[str, Any] = {}

    def read() -> None:
        if not has_weights:
            policy.load_weights(path)
        if (path / _OPTIMIZER).is_file():
            load_whole_optimizer(policy, optimizer, path / _OPTIMIZER)
        state.update(json.loads((path / _STATE).read_text(encoding="utf-8")))

    with reading(path), world.watched():
        world.gather(read)
        if not (path / _OPTIMIZER).is_file():
            load_sharded_optimizer(policy, optimizer, path / _SHARDS)
        if policy.follower is not None:
            policy.follower.load(path / _REFERENCE)
    return state


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Context in which a checkpoint is read, on all ranks.

    Raises:
        CheckpointError: what failed inside. Lost ranks, too little memory and closed files say nothing of it, and are raised as
            they are.
    """
    try:
        yield
    except (RankLostError, MemoryError, torch.OutOfMemoryError, PermissionError):
        raise
    except Exception as error:
        reason = error.__cause__ or error if isinstance(error, ConfigError) else error  # which tells where models may be
        raise CheckpointError(f"{path} cannot be read ({reason}); {_advice(path)}") from error


def check_checkpoint(path: Path) -> None:
    """Compares a checkpoint with its manifest.

    Raises:
        CheckpointError: a file is missing or has another size.
        PermissionError: this user may not read them.
    """
    try:
        sizes: dict[str, int] = dict(json.loads((path / _MANIFEST).read_text(encoding="utf-8"))["files"])
    except PermissionError:  # which says nothing of the checkpoint
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} has no readable {_MANIFEST} ({error}); {_advice(path)}") from error
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; {_advice(path)}")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes instead of {size}; {_advice(path)}")


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; one that is being replaced, or was in a crash, by the name it has then."""
    found = {}
    for path in sorted(run_dir.glob("*checkpoint-*")):  # a hidden name before the final one
        if match := _NAME.fullmatch(path.name):
            found[int(match[1] or match[2])] = path
    return [path for _, path in sorted(found.items())]


def recover_checkpoints(run_dir: Path) -> list[Path]:
    """The same for the one process that writes them: what a crash caught in mid-replacement is put back."""
    for path in list_checkpoints(run_dir):
        if path.name.startswith("."):
            path.rename(run_dir / path.name.removeprefix(".").removesuffix(".old"))
    return list_checkpoints(run_dir)


def prune_checkpoints(run_dir: Path, *, keep: int, protect: Collection[str] = ()) -> list[Path]:
    """Deletes all but the newest ``keep`` checkpoints and those named in ``protect``, and leftovers of interrupted writes.

    Returns:
        Those that are left, oldest first.
    """
    for path in recover_checkpoints(run_dir)[:-keep]:
        if path.name not in protect:
            # The rename makes deletion atomic too: a half-deleted checkpoint never bears the name of a whole one.
            path.rename(_hidden(path, "deleted"))
    for path in (*leftovers(run_dir), *run_dir.glob(".checkpoint-*.old")):
        shutil.rmtree(path, ignore_errors=True)
    return list_checkpoints(run_dir)


def leftovers(run_dir: Path) -> list[Path]:
    """What interrupted writes and deletions have left."""
    return [path for suffix in ("deleted", "partial") for path in run_dir.glob(f".checkpoint-*.{suffix}")]


def write_failure(error: Exception, directory: Path) -> str:
    """The reason why files could not be written; empty for an error of another kind.

    Safetensors and torch wrap the system's error in their own types; torch's zip writer only says that its position is wrong.

    Args:
        error: what was raised.
        directory: on the disk that was written to.
    """
    text = str(error).lower()
    signs = ("no space left", "file too large", "i/o error", "iostream", "disk quota", "unexpected pos")
    if not isinstance(error, (OSError, ShardsError)) and not any(sign in text for sign in signs):
        return ""
    full = getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT} or "no space left" in text or "disk quota" in text
    if full or ("unexpected pos" in text and shutil.disk_usage(directory).free < _NO_ROOM_BYTES):
        return "the disk is full"
    return f"writing failed ({error})"


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # some file systems refuse to flush a directory; a file that cannot be flushed is not saved
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why_unwritten(cause: str, final: Path) -> str:
    return f"cannot save {final}: {cause}; {_kept(final)}. Make room, then `grpo-fast train --resume {final.parent}`."


def _kept(final: Path) -> str:
    previous = list_checkpoints(final.parent)
    return f"the newest whole checkpoint is {previous[-1]}" if previous else "no earlier checkpoint exists"


def _advice(path: Path) -> str:
    """How to go on without a damaged checkpoint and lose nothing of it: its weights may be whole."""
    others = [other for other in list_checkpoints(path.parent) if other != path]
    if others:
        aside = path.with_name(f"damaged-{path.name}")  # which counts as no checkpoint
        return f"`mv {path} {aside}` puts it aside, and the run is resumed from {others[-1].name}"
    return f"no other checkpoint is left; a new run in another output_dir begins from its weights, if whole, by --model {path}"
