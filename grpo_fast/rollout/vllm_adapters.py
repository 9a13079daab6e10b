"""LoRA adapters as what a weight sync sends to vLLM: the base once, from then on a few megabytes a version.

Every version has a directory, a name and a number of its own. vLLM keeps an adapter by its number and cached keys and values by
its name and directory, so nothing of an older version can be taken for the new one, and the prefix cache needs no reset. Old
versions are removed. The base is untouched, which is why an engine with adapters sleeps at level 1 only: deeper, it is gone.

Nothing here imports vLLM or peft: an adapter is what peft left in the policy's module.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import save_file

from grpo_fast.rollout.held_directory import HeldDirectory
from grpo_fast.rollout.shared_memory import check_room
from grpo_fast.rollout.weight_sync import SyncTarget
from grpo_fast.rollout.whole_weights import whole_weights

_BESIDE = 64 * 2**10
"""Bytes of a version beside its tensors: names, settings, a page each for files and directories."""
_ADAPTER = "default"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM supports."""


def policy_options(policy: torch.nn.Module) -> dict[str, Any] | None:
    """Options of vLLM for a policy's adapters; ``None`` for a policy without adapters."""
    settings: Any = getattr(policy, "peft_config", None)
    return None if settings is None else lora_options(settings[_ADAPTER].r, sorted(settings[_ADAPTER].target_modules))


def lora_options(rank: int, targets: Sequence[str]) -> dict[str, Any]:
    """Options of vLLM for adapters of a rank, with room for the next version beside the last.

    Args:
        rank: the largest.
        targets: ends of the names of layers that can have one. Without them vLLM would prepare the head too, and could then not
            tell log-probabilities of a prompt any more (0.32 on a CPU).

    Raises:
        ValueError: vLLM has no room for such a rank.
    """
    room = next((size for size in _RANKS if size >= rank), None)
    if room is None:
        raise ValueError(f"vLLM supports adapters up to rank {_RANKS[-1]}, not {rank}; lower lora_r")
    return {
        "enable_lora": True,
        "max_lora_rank": room,
        "max_loras": 1,
        "max_cpu_loras": 2,
        "lora_target_modules": list(targets),
    }


class AdapterVersion(NamedTuple):
    """One version of the adapters on disk, in peft's format."""

    name: str
    number: int
    path: Path
    num_bytes: int


class AdapterVersions:
    """Writes the adapters of a policy, each time to a new directory, in shared memory where there is one.

    Args:
        policy: a transformers model with peft's layers inside.
    """

    def __init__(self, policy: torch.nn.Module) -> None:
        self._policy: Any = policy
        self._directory = HeldDirectory()
        self._number = 0

    def write(self) -> AdapterVersion:
        """Writes what the adapters are now; sharded ones are gathered.

        Raises:
            OSError: there is no room for them.
        """
        home = self._directory.path
        names = [name for name, _ in self._policy.named_parameters() if ".lora_" in name]
        tensors = {
            f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": weight.cpu().contiguous()
            for name, weight in whole_weights(self._policy, names)
        }
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        check_room(num_bytes + _BESIDE, "the next version of the adapters", place=home)
        self._number += 1
        path = home / str(self._number)
        try:
            path.mkdir()
            save_file(tensors, path / "adapter_model.safetensors")
            self._policy.peft_config[_ADAPTER].save_pretrained(str(path))
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)  # what is there of it is memory
            raise
        return AdapterVersion(f"{home.name}-{self._number}", self._number, path, num_bytes)

    def remove(self, version: AdapterVersion) -> None:
        """Removes a version's directory."""
        shutil.rmtree(version.path, ignore_errors=True)

    def close(self) -> None:
        """Removes all; calling it twice is harmless."""
        self._directory.close()


class AdapterHost(SyncTarget, Protocol):
    """An engine that also takes adapters."""

    def load_adapter(self, adapter: AdapterVersion) -> None:
        """Reads an adapter; requests are answered with it from then on."""
        ...

    def unload_adapter(self, adapter: AdapterVersion) -> None:
        """Forgets one; that it was gone already is no error."""
        ...

    def announce(self, version: int) -> None:
        """Gives what is in force a version's number."""
        ...

    def close(self, adapter: AdapterVersion | None = None) -> None:
        """Ends the engine's part; what runs on forgets the adapter in force, where it can at once."""
        ...


class AdapterTarget:
    """Implements :class:`~grpo_fast.rollout.weight_sync.SyncTarget` over an engine that, with the base, needs adapters alone.

    The base goes over, by the engine's own transport, in the first sync, after one that failed, and where the engine does not
    say that it holds the last version, as a server that was started again.

    Args:
        host: the engine; what is not said here is its own.
        versions: where adapters come from.
    """

    def __init__(self, host: AdapterHost, versions: AdapterVersions) -> None:
        self._host = host
        self._versions = versions
        self._in_force: int | None = None
        self._base_goes = True
        self._current: AdapterVersion | None = None
        self._next: AdapterVersion | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def send(self) -> int:
        """Writes the adapters where the engine can read them, and sends the base where it is missing."""
        self._base_goes = self._in_force is None or self._host.weight_version() != self._in_force
        num_bytes = self._host.send() if self._base_goes else 0
        self._next = self._versions.write()
        return num_bytes + self._next.num_bytes

    def finish(self, version: int) -> None:
        """Puts them in force; the version before is removed."""
        assert self._next is not None
        if self._base_goes:
            self._host.finish(version)  # vLLM drops every adapter here
        self._host.load_adapter(self._next)
        if not self._base_goes:
            self._host.announce(version)
        previous, self._current, self._next = self._current, self._next, None
        self._in_force = version
        if previous is not None:
            self._host.unload_adapter(previous)
            self._versions.remove(previous)

    def undo(self) -> None:
        """Leaves an update that began; the next one brings the base too."""
        if self._base_goes:
            self._host.undo()
        if self._next is not None:
            self._versions.remove(self._next)
        self._in_force, self._next = None, None

    def reset_prefix_cache(self) -> bool:
        """Forgets cached keys and values where the base changed; those of an older adapter are never read again."""
        return not self._base_goes or self._host.reset_prefix_cache()

    def close(self) -> None:
        """Ends the engine's part and removes what is on disk."""
        try:
            self._host.close(self._current)
        finally:
            self._versions.close()
