"""The reward pool: reward functions in worker processes, each call under a deadline, nothing that can hang the run."""

from __future__ import annotations

import itertools
import math
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

from grpo_fast.async_code import AsyncCode
from grpo_fast.rewards.batch import call_arguments, check_names, column_names, pickled
from grpo_fast.rewards.call import (
    HeldHere,
    RewardFunction,
    await_reward,
    call_reward,
    check_columns,
    describe_failure,
    resolve_reward,
    reward_name,
)
from grpo_fast.rewards.judged import Judged
from grpo_fast.rewards.process import WorkerDiedError, WorkerProcess
from grpo_fast.rewards.report import RewardReport, Tally
from grpo_fast.rewards.worker import Reply
from grpo_fast.types import Group, TrainerState, TrainingError
from grpo_fast.user_code import is_async, pickled_function

OnError: TypeAlias = Literal["raise", "none"]

_MAX_ATTEMPTS = 3


class RewardError(TrainingError):
    """A reward call that failed: it raised, hung, ended its process or broke the contract.

    Attributes:
        function: name of the reward function.
        worker_traceback: the traceback in the worker; empty where there is none.
    """

    def __init__(self, function: str, message: str, *, worker_traceback: str = "") -> None:
        super().__init__(f"reward function {function!r} {message}")
        self.function = function
        self.worker_traceback = worker_traceback


@dataclass(slots=True)
class _Call:
    """One function, or all async ones together, on one slice of the groups."""

    functions: list[int]
    """Those that have not answered yet."""
    first: int
    """First completion of the slice."""
    count: int
    arguments: bytes
    attempts: int = 0
    """How often it was handed to a worker that turned out to have ended before."""


class RewardPool:
    """Runs reward functions over groups.

    With workers, functions run in processes that are started when first needed and then kept. A call (one function, one batch)
    that misses its deadline has its process killed; a process that ends by itself is noticed at once; both are replaced. With
    more than one worker a batch is cut between groups, so that a function sees whole groups, but not the whole batch. Async
    functions are called first and awaited together, on a loop that each process keeps; the deadline holds for each of them.

    What a function prints in a worker goes to standard error, where it does not tear the live console.
    A function defined in a script or a notebook is sent by value; one that lives in a module is imported from there.

    Args:
        reward_funcs: built-in names, ``module:function`` or callables.
        weights: one a function; ``None`` weighs all by 1.
        timeout_s: deadline of one call, in seconds; the import of the function's module is not part of it.
        workers: processes; 0 calls the functions in this process, where no deadline can be kept and a crash is everybody's.
            Those that are :class:`~grpo_fast.rewards.HeldHere` are always called in this one.
        on_error: what a failed call does: ``raise`` a :class:`RewardError`, or (``none``) be counted and leave its completions
            without a value from that function.

    Raises:
        ValueError: no functions, an unknown name, weights that do not fit, a deadline or a count out of range.
        TypeError: a reward that is neither a name nor a function, or one that cannot be sent to a process.
    """

    def __init__(
        self,
        reward_funcs: Sequence[str | Callable[..., Any]],
        *,
        weights: Sequence[float] | None = None,
        timeout_s: float = 30.0,
        workers: int = 1,
        on_error: OnError = "raise",
    ) -> None:
        if isinstance(reward_funcs, str) or not reward_funcs:
            raise ValueError(f"reward_funcs={reward_funcs!r} must be a list with at least one reward")
        self._specs = list(reward_funcs)
        self.names = _distinct([reward_name(spec) for spec in self._specs])
        """One a function, as in metrics; a repeated name gets a number."""
        self.weights = _checked_weights(weights, len(self._specs))
        if not timeout_s > 0 or math.isinf(timeout_s):
            raise ValueError(f"timeout_s={timeout_s} must be a positive number of seconds (workers=0 runs without a deadline)")
        if workers < 0:
            raise ValueError(f"workers={workers} must be 0 (run in this process) or more")
        if on_error not in ("raise", "none"):
            raise ValueError(f"on_error={on_error!r} must be 'raise' or 'none'")
        self.timeout_s = timeout_s
        self.workers = workers
        self.on_error = on_error
        self._judged = {place: spec for place, spec in enumerate(self._specs) if isinstance(spec, Judged)}
        """By place; all the others are called here, or in workers."""
        others = [place for place in range(len(self._specs)) if place not in self._judged]
        self._here = [place for place in others if not workers or isinstance(self._specs[place], HeldHere)]
        self._away = [place for place in others if place not in self._here]
        self._frozen = {place: _freeze(self.names[place], self._specs[place]) for place in self._away}
        self._local: dict[int, RewardFunction] | None = None
        self._slots: list[WorkerProcess | None] = [None] * workers
        self._columns: Sequence[str] | None = None
        self._are_async: dict[int, bool] | None = None
        """By place, known once they are loaded."""
        self._loop = AsyncCode()
        self._closed = False
        self._lock = threading.Lock()

    def start(self, columns: Sequence[str] | None = None) -> None:
        """Resolves the functions and starts every worker now, so that a wrong name is known before the first step.

        Args:
            columns: of the dataset, the prompt's left out; a function that needs another one is refused.

        Raises:
            ValueError: a function cannot be found, imported or loaded, or needs a column that is not there; a column has a
                reserved name; the pool is closed.
            RewardError: a worker ends or hangs while it loads the functions.
        """
        with self._lock:
            self._require_open()
            self._columns = columns
            check_names(columns or ())
            for reward in self._resolve_here().values():
                if columns is not None:
                    check_columns(reward, columns)
            if self._away:
                self._drive([], Tally(self.names, 0), start=self.workers)

    def score(self, groups: Sequence[Group], state: TrainerState | None = None) -> RewardReport:
        """Fills ``rewards``, ``reward`` and ``extra`` of every group in place.

        ``reward`` is the weighted sum over the functions that gave a value, NaN where none did.

        Args:
            groups: groups with their completions.
            state: how far the run is, for functions that ask for ``trainer_state``; without one, nothing is done yet.

        Returns:
            Statistics, what was logged, and counts of what failed.

        Raises:
            RewardError: a call failed and ``on_error`` is ``raise``. The groups are as they were; the pool can be used again.
            ValueError: a function cannot be found, imported or loaded; a column has a reserved name; the pool is closed.
            TypeError: a dataset column cannot be sent to a process.
        """
        tally = self.tally(groups, state or TrainerState())
        tally.fill(groups, self.weights)
        return tally.report()

    def tally(self, groups: Sequence[Group], state: TrainerState) -> Tally:
        """What the functions give the completions of some groups, as :meth:`score`, but nothing is filled."""
        with self._lock:
            self._require_open()
            tally = Tally(self.names, sum(len(group.completions) for group in groups))
            columns = column_names(groups)
            if not tally.num_completions:
                return tally
            for place, judged in self._judged.items():
                for first, scored in enumerate(judged(groups)):
                    tally.store(place, scored, first=first)
            if self._here:
                self._score_here(call_arguments(groups, columns, state), tally)
            if self._away:
                if self._are_async is None:
                    self._drive([], tally, start=1)
                self._drive(self._calls(groups, columns, state), tally, start=0)
            return tally

    def close(self) -> None:
        """Ends the workers; calling it twice is harmless."""
        with self._lock:
            self._closed = True
            for slot, worker in enumerate(self._slots):
                if worker is not None:
                    worker.close()
                self._slots[slot] = None
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def process_ids(self) -> list[int]:
        """Ids of the live worker processes."""
        return [worker.process_id for worker in self._slots if worker is not None]

    def _require_open(self) -> None:
        if self._closed:
            raise ValueError("the reward pool is closed; make a new one")

    def _resolve_here(self) -> dict[int, RewardFunction]:
        if self._local is None:
            found = {place: resolve_reward(self._specs[place]) for place in self._here}
            for reward in found.values():
                if isinstance(reward.function, HeldHere):
                    reward.function.load()
            self._local = {place: RewardFunction(self.names[place], reward.function) for place, reward in found.items()}
        return self._local

    def _score_here(self, arguments: dict[str, Any], tally: Tally) -> None:
        def failed(function: int, error: BaseException) -> None:
            self._fail(function, describe_failure(error), tally, cause=error)

        async def later(function: int, reward: RewardFunction) -> None:
            try:
                tally.store(function, await await_reward(reward, arguments))
            except (Exception, SystemExit) as error:
                failed(function, error)

        rewards = list(self._resolve_here().items())
        self._loop.together([later(function, reward) for function, reward in rewards if is_async(reward.function)])
        for function, reward in rewards:
            if is_async(reward.function):
                continue
            try:
                tally.store(function, call_reward(reward, arguments, self._loop))
            except (Exception, SystemExit) as error:
                failed(function, error)

    def _calls(self, groups: Sequence[Group], columns: Sequence[str], state: TrainerState) -> list[_Call]:
        """Those of async functions come first, so that all of them are under way at once."""
        assert self._are_async is not None
        together = [function for function, is_one in self._are_async.items() if is_one]
        alone = [[function] for function, is_one in self._are_async.items() if not is_one]
        parts = min(self.workers, len(groups))
        bounds = [len(groups) * part // parts for part in range(parts + 1)]
        first_of_all: list[_Call] = []
        others: list[_Call] = []
        first = 0
        for low, high in itertools.pairwise(bounds):
            arguments = call_arguments(groups[low:high], columns, state)
            count = len(arguments["completions"])
            if count:
                payload = pickled(arguments)
                if together:
                    first_of_all.append(_Call([*together], first, count, payload))
                others += [_Call([*functions], first, count, payload) for functions in alone]
            first += count
        return first_of_all + others

    def _drive(self, calls: Sequence[_Call], tally: Tally, *, start: int) -> None:
        """Runs calls on the workers until none is left, first starting workers so that at least ``start`` are ready."""
        waiting = deque(calls)
        running: dict[int, _Call] = {}
        try:
            while waiting or running or self._ready_workers() < start:
                self._ensure_workers(max(start, min(self.workers, len(waiting) + len(running))))
                self._hand_out(waiting, running, tally)
                for slot in self._wait():
                    self._take(slot, running, tally)
                self._expire(running, tally)
        except BaseException:
            # A worker left in mid-call would hand its answer to the next batch.
            for slot, worker in enumerate(self._slots):
                if worker is not None and worker.state != "idle":
                    self._drop(slot, tally)
            raise

    def _ready_workers(self) -> int:
        return sum(worker is not None and worker.state == "idle" for worker in self._slots)

    def _ensure_workers(self, wanted: int) -> None:
        alive = sum(worker is not None for worker in self._slots)
        for slot, worker in enumerate(self._slots):
            if worker is None and alive < wanted:
                self._slots[slot] = WorkerProcess(self._frozen, self._columns)
                alive += 1

    def _hand_out(self, waiting: deque[_Call], running: dict[int, _Call], tally: Tally) -> None:
        for slot, worker in enumerate(self._slots):
            if not waiting:
                return
            if worker is None or worker.state != "idle":
                continue
            call = waiting.popleft()
            try:
                worker.submit(call.functions, call.arguments, timeout_s=self.timeout_s)
            except TimeoutError:
                self._drop(slot, tally)
                self._fail_all(call, "could not be given its batch in time; its worker was killed", tally, timeout=True)
            except WorkerDiedError as death:
                self._drop(slot, tally)
                call.attempts += 1
                if call.attempts == _MAX_ATTEMPTS:
                    self._fail_all(call, f"{death}, before it was called, {_MAX_ATTEMPTS} times running", tally)
                else:  # lost between two calls, which is no function's fault: the call is still to be made
                    waiting.appendleft(call)
            else:
                running[slot] = call

    def _wait(self) -> list[int]:
        """Slots whose worker has something to say, as soon as there is one or a deadline has passed."""
        expected = {slot: worker for slot, worker in enumerate(self._slots) if worker is not None and worker.state != "idle"}
        if not expected:
            return []
        with selectors.DefaultSelector() as selector:
            for slot, worker in expected.items():
                selector.register(worker.channel, selectors.EVENT_READ, slot)
            nearest = min(worker.deadline for worker in expected.values())
            return [key.data for key, _ in selector.select(max(0.0, nearest - time.monotonic()))]

    def _take(self, slot: int, running: dict[int, _Call], tally: Tally) -> None:
        worker = self._slots[slot]
        assert worker is not None
        starting = worker.state == "starting"
        try:
            replies = worker.receive()
        except WorkerDiedError as death:
            self._drop(slot, tally)
            if starting:
                raise RewardError(", ".join(self.names), f"{death} while it was loaded") from None
            self._fail_all(running.pop(slot), str(death), tally)
            return
        for reply in replies:
            if starting:
                self._learn(slot, reply, tally)
            else:
                self._keep(running[slot], reply, tally)
        if worker.state == "idle":
            running.pop(slot, None)

    def _learn(self, slot: int, reply: Reply, tally: Tally) -> None:
        if reply.status != "ok":
            self._drop(slot, tally)
            raise ValueError(reply.value)
        self._are_async = reply.value

    def _keep(self, call: _Call, reply: Reply, tally: Tally) -> None:
        call.functions.remove(reply.function)
        if reply.status == "ok":
            tally.store(reply.function, reply.value, first=call.first)
        else:
            self._fail(reply.function, reply.value, tally, trace=reply.trace)

    def _expire(self, running: dict[int, _Call], tally: Tally) -> None:
        now = time.monotonic()
        for slot, worker in enumerate(self._slots):
            if worker is None or worker.state == "idle" or worker.deadline > now:
                continue
            starting = worker.state == "starting"
            self._drop(slot, tally)
            if starting:
                raise RewardError(", ".join(self.names), "could not be loaded in time: the import of a module hangs")
            call = running.pop(slot)
            message = (
                f"took longer than {self.timeout_s:g} s for {call.count} completions; its worker was killed (reward_timeout_s)"
            )
            self._fail_all(call, message, tally, timeout=True)

    def _drop(self, slot: int, tally: Tally) -> None:
        worker = self._slots[slot]
        assert worker is not None
        worker.kill()
        self._slots[slot] = None
        tally.restarts += 1

    def _fail_all(self, call: _Call, message: str, tally: Tally, *, timeout: bool = False) -> None:
        """Whichever of the functions it was that took the process along."""
        for function in call.functions:
            others = [repr(self.names[other]) for other in call.functions if other != function]
            beside = f"; it was awaited together with {', '.join(others)}, and any of them may be the cause" if others else ""
            self._fail(function, message + beside, tally, timeout=timeout)

    def _fail(
        self,
        function: int,
        message: str,
        tally: Tally,
        *,
        trace: str = "",
        timeout: bool = False,
        cause: BaseException | None = None,
    ) -> None:
        error = RewardError(self.names[function], message, worker_traceback=trace)
        if self.on_error == "raise":
            raise error from cause
        (tally.timeouts if timeout else tally.errors)[function] += 1
        tally.problems.append(str(error))


def _freeze(name: str, spec: str | Callable[..., Any]) -> str | bytes:
    if isinstance(spec, str):
        return spec
    try:
        return pickled_function(spec)
    except Exception as error:
        raise TypeError(
            f"reward function {name!r} cannot be sent to a worker process ({error}); create its objects inside the function, "
            "give it as 'module:function', or set reward_workers to 0"
        ) from error


def _distinct(names: Sequence[str]) -> list[str]:
    result: list[str] = []
    for name in names:
        number, candidate = 2, name
        while candidate in result:
            number, candidate = number + 1, f"{name}_{number}"
        result.append(candidate)
    return result


def _checked_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * count
    if len(weights) != count:
        raise ValueError(f"reward weights {list(weights)} are {len(weights)} for {count} reward functions; give one each")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"reward weights {list(weights)} must be finite")
    return tuple(float(weight) for weight in weights)
