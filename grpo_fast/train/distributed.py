"""Several processes as one run: their ranks, what they exchange, and how they end together.

Every rank runs the same loop over the same step. Completions and rewards are made in shares and then known to all, so that
advantages, normalisers and plans come out alike everywhere; forward and backward passes are split again, and gradients summed.
What must be one (files, the forecast, the decision to end) happens on rank 0, which tells the others.

A thread beside the main one exchanges in a process group of its own, so that the order of exchanges is the same on every rank:
see :meth:`World.beside`.

A failure inside :meth:`World.gather` or :meth:`World.once` is raised on every rank, so that all leave the loop at one place. A
rank that dies breaks the others' next exchange: they end with :class:`RankLostError` at once, or, where it hangs, after
``ddp_timeout_s``. What rank 0 waits for may take longer than that, as it does for servers: see :meth:`World.patiently`.

In a single process none of this does anything.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import NamedTuple, Self, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from grpo_fast.config import ConfigError
from grpo_fast.train.launch import check_devices, device_number, in_words, refuse_lone_tasks
from grpo_fast.types import TrainingError

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_BUCKET_BYTES = 64 * 2**20
JOIN_TIMEOUT_S = 300.0
"""Longest wait for all ranks to come: they load no model before, and one whose start failed never does."""
_BEAT_S = 30.0
_SIGNS = ("gloo", "nccl", "connection closed by peer", "process group")


class RankLostError(TrainingError):
    """Another rank of the run has died or hangs."""


class _Failure(NamedTuple):
    """An exception on its way to other ranks; its class may take other arguments than it keeps.

    Copies have the attribute ``told_elsewhere``, for whoever would tell one error once a rank. They and the original have
    ``known_to_all``.
    """

    kind: type[Exception]
    args: tuple[object, ...]
    state: dict[str, object]

    def rebuild(self) -> Exception:
        error = self.kind.__new__(self.kind, *self.args)
        error.args = self.args  # MemoryError does not keep its arguments
        error.__dict__.update(self.state | {"told_elsewhere": True, "known_to_all": True})
        return error


class _OfThread(threading.local):
    """The process group in which a thread exchanges: the run's, unless it was given its own."""

    group: dist.ProcessGroup | None = None

    @contextlib.contextmanager
    def exchanging_in(self, group: dist.ProcessGroup | None) -> Iterator[None]:
        before, self.group = self.group, group
        try:
            yield
        finally:
            self.group = before


class World:
    """The ranks of a run; on its own, the only one.

    Args:
        rank: number of this process.
        size: number of processes.
        owns_group: whether closing ends torch's process group.
        timeout_s: longest wait for another rank in one exchange, in seconds.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, owns_group: bool = False, timeout_s: float = 1800.0) -> None:
        self.rank = rank
        self.size = size
        self._owns_group = owns_group
        self._timeout = timedelta(seconds=timeout_s)
        self._beat_s = min(_BEAT_S, timeout_s / 4)
        self._here = _OfThread()
        self._beside: list[dist.ProcessGroup] = []

    @classmethod
    def join(cls, device: torch.device, *, timeout_s: float, join_timeout_s: float = JOIN_TIMEOUT_S) -> Self:
        """Joins the ranks that ``torchrun`` started, or those of a process group that is there already; else this one is alone.

        Args:
            device: where the policy lives; on GPUs each rank takes the one of its local number.
            timeout_s: longest wait for another rank, in seconds.
            join_timeout_s: longest wait for all to come, in seconds, where that is shorter.

        Raises:
            ConfigError: this is one of several tasks that nothing joins, there are fewer GPUs than ranks here, or the port at
                which ranks find each other is taken.
            RankLostError: not all ranks came, or this one cannot reach them.
        """
        if dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), timeout_s=timeout_s)
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1 or "RANK" not in os.environ:
            refuse_lone_tasks()
            return cls()
        world = cls(int(os.environ["RANK"]), size, owns_group=True, timeout_s=timeout_s)
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device_number(torch.cuda.device_count()))
            backend = "cpu:gloo,cuda:nccl"
        store, timeout = world._meet(min(timeout_s, join_timeout_s)), timedelta(seconds=timeout_s)
        try:
            dist.init_process_group(backend, store=store, rank=world.rank, world_size=size, timeout=timeout)
        except RuntimeError as error:
            raise RankLostError(
                f"rank {world.rank} of {size} could not connect to the others ({str(error).splitlines()[0]}); see their own "
                "output. On hosts with several networks, name the one that joins them in GLOO_SOCKET_IFNAME and "
                "NCCL_SOCKET_IFNAME, on every node"
            ) from error
        if device.type == "cuda":
            check_devices(world.gather(_own_device))
        return world

    def _meet(self, timeout_s: float) -> Store:
        """Waits until all ranks have come to where they find each other."""
        try:
            store = self._store(timedelta(seconds=timeout_s))
            store.set(f"rank {self.rank}", "here")
        except RuntimeError as error:
            if "failed to listen" in str(error):
                raise ConfigError(
                    f"rank 0 cannot listen at MASTER_PORT={os.environ['MASTER_PORT']}, where the others would find it "
                    f"({error}); set MASTER_PORT to a free port, or let torchrun choose one"
                ) from error
            raise self._alone(timeout_s, "rank 0 or torchrun, which keeps the addresses,") from error
        try:
            store.wait([f"rank {rank}" for rank in range(self.size)], timedelta(seconds=timeout_s))
        except RuntimeError as error:
            missing = [rank for rank in range(self.size) if not store.check([f"rank {rank}"])]
            raise self._alone(timeout_s, in_words(missing)) from error
        return store

    def _store(self, timeout: timedelta) -> Store:
        """The store through which ranks find each other; it lives on, with the addresses of groups that they have left."""
        store: Store = next(rendezvous("env://", timeout=timeout))[0]
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's own lives on through its restarts, with the addresses of ranks that have died
            store = PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        return PrefixStore(f"group {store.add(f'groups of rank {self.rank}', 1)}", store)

    def _alone(self, waited_s: float, missing: str) -> RankLostError:
        return RankLostError(
            f"rank {self.rank} of {self.size} waited {waited_s:g} s for the others to start, but {missing} did not: they "
            "failed, or cannot be reached from this host; see their own output"
        )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and decides."""
        return self.rank == 0

    @property
    def ranks_per_node(self) -> int:
        """Ranks of this node, as their launcher says; without a word from it, all are taken to be on one."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    def share(self, count: int) -> slice:
        """This rank's share of ``count`` things: neighbours, as many as any other rank's or one more or fewer."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def beside(self) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """Prepares a thread that exchanges while the main one does; every rank has to call it at one place.

        Returns:
            Makes the context in which that thread works: on the device of the calling one, with exchanges (all but :meth:`sum`)
            in a process group of their own. What one rank raises there between two exchanges, the others raise in their next
            one, or at the end of the context.

        Raises:
            RankLostError: a rank is gone.
        """
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # in a new thread it is the first
        if self.size > 1:
            with self.watched():
                self._beside.append(dist.new_group(backend="gloo", timeout=self._timeout))
        place = len(self._beside) - 1  # and not the group itself: its connections last as long as anyone holds it

        @contextlib.contextmanager
        def entered() -> Iterator[None]:
            if device is not None:
                torch.cuda.set_device(device)
            if self.size == 1:
                yield
                return
            with self._here.exchanging_in(self._beside[place]), self._telling():
                yield

        return entered

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Tells the others of an exception inside that no exchange has told: they would wait for this rank."""
        try:
            yield
        except RankLostError:
            raise
        except BaseException as error:
            if not hasattr(error, "known_to_all"):
                with contextlib.suppress(RankLostError):
                    self._exchange(None, error)
            raise
        self.gather(lambda: None)

    def gather(self, make: Callable[[], _T]) -> list[_T]:
        """Calls ``make`` on every rank.

        Args:
            make: gives something that can be pickled.

        Returns:
            What it gave, by rank, on every rank.

        Raises:
            Exception: what the first rank that failed raised, on every rank.
            RankLostError: a rank is gone.
        """
        if self.size == 1:
            return [make()]
        return self._exchange(*_attempt(make))  # type: ignore[return-value]

    def each(self, make: Callable[[], _T]) -> _T:
        """Calls ``make`` on every rank, for what each keeps to itself.

        Args:
            make: may give anything.

        Returns:
            What it gave on this rank.

        Raises:
            Exception: what the first rank that failed raised, on every rank.
            RankLostError: a rank is gone.
        """
        kept: list[_T] = []
        self.gather(lambda: kept.append(make()))
        return kept[0]

    def once(self, make: Callable[[], _T]) -> _T:
        """Calls ``make`` on rank 0 alone.

        Args:
            make: gives something that can be pickled.

        Returns:
            What it gave, on every rank.

        Raises:
            Exception: what it raised, on every rank.
            RankLostError: a rank is gone.
        """
        if self.size == 1:
            return make()
        value, error = _attempt(make) if self.is_main else (None, None)
        if self._here.group is not None:
            self._exchange(None, error)  # any rank may have failed before: see beside
        told: list[tuple[_T | None, _Failure | None]] = [(value, _packed(error))]
        with self.watched():
            dist.broadcast_object_list(told, src=0, group=self._here.group)
        [(found, failure)] = told
        self._raise_first([failure], error)
        return found  # type: ignore[return-value]

    def patiently(self, make: Callable[[], _T]) -> _T:
        """:meth:`once` for what may take longer than an exchange may: meanwhile rank 0 lets the others know that it is there.

        Args:
            make: gives something that can be pickled; in it nothing is exchanged.

        Returns:
            What it gave, on every rank.

        Raises:
            Exception: what it raised, on every rank.
            RankLostError: a rank is gone.
        """
        if self.size == 1:
            return make()
        if not self.is_main:
            told: tuple[_T, ...] = ()
            while not told:
                told = self.once(tuple)
            return told[0]
        over, group = threading.Event(), self._here.group

        def beat() -> None:
            with self._here.exchanging_in(group):
                while not over.wait(self._beat_s):
                    self.once(tuple)

        with ThreadPoolExecutor(1, thread_name_prefix="rank 0 is there") as aside:
            beating = aside.submit(beat)
            try:
                value, error = _attempt(make)
            finally:
                over.set()
        beating.result()

        def tell() -> tuple[_T]:
            if error is not None:
                raise error
            return (value,)  # type: ignore[return-value]

        return self.once(tell)[0]

    def sum(self, tensors: Iterable[torch.Tensor]) -> None:
        """Adds each tensor over the ranks, in place, a bucket of them at a time; short types are summed in float32."""
        if self.size == 1:
            return
        assert self._here.group is None, "other ranks' threads that fail would be heard of too late"
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
            with self.watched():
                dist.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)])

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Turns the failure of an exchange inside into a :class:`RankLostError` in plain words."""
        try:
            yield
        except RuntimeError as error:
            told = str(error).lower()
            lost = isinstance(error, dist.DistError) or any(sign in told for sign in _SIGNS)
            if self.size == 1 or isinstance(error, TrainingError) or not lost:
                raise
            raise RankLostError(
                f"rank {self.rank} of {self.size} lost another rank, which died or did not answer within ddp_timeout_s; see "
                "its last output for the cause. The newest checkpoint is valid: resume with --resume, or with torchrun's "
                f"--max-restarts ({str(error).splitlines()[0]})"
            ) from error

    def tell(self, error: BaseException | None) -> None:
        """Logs on rank 0 what ends the ranks: once another has left, torchrun ends this one, perhaps while it closes."""
        if self.size > 1 and self.is_main and isinstance(error, Exception):
            _log.error("%s: %s", type(error).__name__, error)

    def close(self) -> None:
        """Leaves the process groups; calling it twice is harmless."""
        while self._beside:
            group = self._beside.pop()
            if dist.is_initialized():
                dist.destroy_process_group(group)
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()

    def _exchange(self, value: _T | None, error: BaseException | None) -> list[_T | None]:
        """Every rank's value, or the first failure."""
        told: list[tuple[_T | None, _Failure | None]] = [(None, None)] * self.size
        with self.watched():
            dist.all_gather_object(told, (value, _packed(error)), group=self._here.group)
        self._raise_first([failure for _, failure in told], error)
        return [value for value, _ in told]

    def _raise_first(self, failures: Sequence[_Failure | None], own: BaseException | None) -> None:
        """Raises the first failure: as it is where it happened, a copy elsewhere."""
        for rank, failure in enumerate(failures):
            if failure is not None:
                if rank == self.rank and own is not None:
                    own.__dict__["known_to_all"] = True
                    raise own
                raise failure.rebuild() from own


ALONE = World()
"""The world of a run in one process."""


def _own_device() -> str:
    """Identifies the GPU of this process among those of all ranks."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{found.name} {found.uuid} of {socket.gethostname()}"


def _attempt(make: Callable[[], _T]) -> tuple[_T | None, Exception | None]:
    try:
        return make(), None
    except Exception as error:
        return None, error


def _packed(error: BaseException | None) -> _Failure | None:
    if error is None:
        return None
    told = _Failure(TrainingError, (f"{type(error).__name__}: {error}",), {})
    if not isinstance(error, Exception):  # an exit of one rank is a failure to the others
        return told
    failure = _Failure(type(error), error.args, dict(error.__dict__))
    try:
        pickle.dumps(failure)
    except Exception:
        return told
    return failure


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one type, up to the size of a bucket."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.nbytes > _BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
