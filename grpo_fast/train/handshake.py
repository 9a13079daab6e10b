"""What ranks tell each other as they start: that they were started alike, see one directory, and read the same data and model.

A rank that was started otherwise would not fail, but train something else, or hang in an exchange that the others do not make.
What may differ is the path of ``output_dir``, as long as it leads to the same directory; everything else that is compared must
be the same on all. Not compared are columns of the data beside the prompt, and Python functions that are handed in.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import socket
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from grpo_fast.config import Config, ConfigError
from grpo_fast.device import package_version
from grpo_fast.run_dir import CUT_SHORT, nearest_place
from grpo_fast.tasks.encoded import EncodedPrompts
from grpo_fast.train.distributed import World
from grpo_fast.train.launch import in_words, launcher
from grpo_fast.train.resumable import takes_up_run

_SHOWN_CHARACTERS = 60
_COMPARED_NUMBERS = 64


def shake_hands(config: Config, world: World, *, resume: bool) -> bool:
    """Checks, once the ranks have met, that they can train together.

    Args:
        config: of this rank.
        world: the ranks.
        resume: whether this rank was told to go on with the run.

    Returns:
        Whether the run in ``output_dir`` is gone on with: as told, or because it is to be taken up.

    Raises:
        ConfigError: the ranks were started differently, or do not see one directory; the same error on all of them.
    """
    if world.size > 1:
        check_alike(_start(config, resume=resume), world)
        world.once(lambda: check_ranks(config, world.size))
        check_nodes(config, world)
        check_directory(config, world)
    launchers = world.gather(launcher)
    return resume or world.once(lambda: takes_up_run(config, launchers))


def check_alike(own: Mapping[str, Any], world: World) -> None:
    """Compares what must be the same on all ranks.

    Args:
        own: values of this rank by what they are called in the error; they can be pickled and compared.
        world: the ranks.

    Raises:
        ConfigError: some differ; values and ranks are named.
    """
    told = world.gather(lambda: dict(own))
    world.once(lambda: _compare(told))


def _compare(told: Sequence[Mapping[str, Any]]) -> None:
    differences = []
    for name in dict.fromkeys(name for each in told for name in each):
        shown = _by_ranks([_shown(each.get(name)) for each in told])
        if len(shown) > 1:
            differences.append(f"{name} ({'; '.join(f'{value} on {ranks}' for value, ranks in shown.items())})")
    if differences:
        raise ConfigError(
            f"the ranks of this run differ in {', '.join(differences)}; start all of them with the same command, "
            "configuration, packages and data"
        )


def _shown(value: Any) -> str:
    """Long values are told apart by their digest."""
    text = repr(value)
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[:_SHOWN_CHARACTERS]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _by_ranks(values: Sequence[str]) -> dict[str, str]:
    """Each value, with the ranks that have it in words."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return {value: in_words(those) for value, those in ranks.items()}


def _start(config: Config, *, resume: bool) -> dict[str, Any]:
    """What a rank was started with."""
    versions = {f"the version of {name}": package_version(name) for name in ("grpo-fast", "torch", "transformers")}
    versions["the version of Python"] = ".".join(platform.python_version_tuple()[:2])
    return {**config.model_dump(mode="json", exclude={"output_dir"}), "resume": resume, **versions}


def check_prompts(prompts: EncodedPrompts, eval_prompts: EncodedPrompts, world: World) -> None:
    """Compares prompts by their tokens: another table or another tokeniser has others.

    Raises:
        ConfigError: the ranks do not have the same; numbers of prompts and ranks are named.
    """
    if world.size > 1:
        check_alike({"training prompts": _digest(prompts), "held-out prompts": _digest(eval_prompts)}, world)


def _digest(prompts: EncodedPrompts) -> str:
    digest = hashlib.sha256()
    for token_ids in prompts.token_ids():
        digest.update(array("q", [len(token_ids)]).tobytes() + token_ids.tobytes())
    return f"{len(prompts)} of sha256 {digest.hexdigest()[:8]}"


def check_weights(weights: Iterable[tuple[str, torch.Tensor]], world: World) -> None:
    """Compares models by what each of their weights begins with: a copy of another checkpoint begins otherwise.

    Args:
        weights: with their names, at least the first row of each.
        world: the ranks.

    Raises:
        ConfigError: the ranks have not read the same model.
    """
    if world.size > 1:
        check_alike({"the weights of the model": world.each(lambda: _beginnings(weights))}, world)


def _beginnings(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, weight in weights:
        numbers = weight.detach().reshape(-1)[:_COMPARED_NUMBERS].cpu().contiguous()
        digest.update(name.encode() + numbers.view(torch.uint8).numpy().tobytes())
    return f"sha256 {digest.hexdigest()[:8]}"


def check_ranks(config: Config, num_ranks: int) -> None:
    """Refuses what one process alone can do.

    Raises:
        ConfigError: such a setting; the message names it and the fix.
    """
    if config.vllm_transport == "ipc":
        raise ConfigError(
            f"vllm_transport='ipc' with {num_ranks} processes: vLLM's CUDA IPC needs all of them to send to one engine; choose "
            "'shared_memory', or 'nccl' for a server on other GPUs, here and with `serve`"
        )


def check_nodes(config: Config, world: World) -> None:
    """Checks that ``hybrid_shard`` finds as many ranks on each node.

    Raises:
        ConfigError: it does not, or what started the ranks does not say how many there are.
    """
    if config.fsdp != "hybrid_shard":
        return
    told = world.gather(lambda: os.environ.get("LOCAL_WORLD_SIZE", ""))

    def compare() -> None:
        if "" in told:
            raise ConfigError(
                "fsdp='hybrid_shard' shards within a node, and LOCAL_WORLD_SIZE, the number of ranks there, is not set: start "
                "them with torchrun, or choose fsdp='full_shard'"
            )
        counts = _by_ranks(told)
        if len(counts) > 1 or world.size % int(told[0]):
            listed = ", ".join(f"{count} on the node of {ranks}" for count, ranks in counts.items())
            raise ConfigError(
                f"fsdp='hybrid_shard' needs as many ranks on each node; of {world.size} there are {listed}; choose "
                "fsdp='full_shard', or start as many on each"
            )

    world.once(compare)


def check_directory(config: Config, world: World) -> None:
    """Checks that all ranks see what rank 0 writes to ``output_dir``, and can write there themselves where each has to.

    Nothing is left behind, nor is a directory made: where there is none yet, the nearest one above it is looked at.

    Raises:
        ConfigError: a rank does not see it, or cannot write; ranks, hosts and directories are named.
    """
    wanted = config.output_dir.absolute()
    with contextlib.ExitStack() as on_rank_0:

        def leave_mark() -> tuple[Path, str]:
            place = nearest_place(wanted)
            place = place if place.is_dir() else place.parent  # a file in the way is told by the run's claim
            try:
                mark = on_rank_0.enter_context(_temporary(place))
            except OSError as error:
                raise ConfigError(f"output_dir {wanted} cannot be written to ({error}); name another directory") from None
            return wanted.relative_to(place), Path(mark).name

        below, mark = world.once(leave_mark)

        def look() -> tuple[str, str]:
            """What this rank does not see, and why it cannot write."""
            place = Path(*wanted.parts[: max(1, len(wanted.parts) - len(below.parts))])
            if place / below != wanted or not (place / mark).is_file():
                return f"{wanted} on host {socket.gethostname()}", ""
            try:
                with _temporary(place) if config.fsdp != "no_shard" else contextlib.nullcontext():
                    return "", ""
            except OSError as error:
                return "", f"{error}, on host {socket.gethostname()}"

        found = world.gather(look)

    def compare() -> None:
        for problem, ranks in _by_ranks([unseen for unseen, _ in found]).items():
            if problem:
                raise ConfigError(
                    f"output_dir {wanted} of rank 0 is another directory than that of {ranks} ({problem}): what one writes "
                    "the other does not see; name a directory on a file system that all nodes share"
                )
        for problem, ranks in _by_ranks([unwritable for _, unwritable in found]).items():
            if problem:
                raise ConfigError(
                    f"output_dir {wanted} cannot be written to by {ranks} ({problem}): with fsdp={config.fsdp!r} each rank "
                    "writes its part of a checkpoint; mount it writable there"
                )

    world.once(compare)


@contextlib.contextmanager
def _temporary(directory: Path) -> Iterator[str]:
    """A file that stands in nobody's way, and is gone afterwards; its path."""
    with tempfile.NamedTemporaryFile(prefix=".handshake-", suffix=CUT_SHORT, dir=directory) as file:
        yield file.name
