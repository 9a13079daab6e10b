"""Weight sync to an engine: one sequence of phases for every transport, each with a deadline, and a proof at the end.

====================== ==============================================================================
Phase                  What it does
====================== ==============================================================================
``pause``              no request runs while weights change
``wake_weights``       the engine's memory for weights comes back, where it slept
``send``               all weights go over
``finish``             the engine puts them in force, under the version's number
``reset_prefix_cache`` keys and values of older weights are forgotten; refused is failed
``wake_kv_cache``      the engine's memory for keys and values comes back, where it slept
``resume``             requests run again: vLLM answers none while it is paused, not even the next
``probe``              engine and policy score the same tokens (:mod:`~grpo_fast.rollout.sync_probe`); the policy does so
                       beside all other phases, unless its weights are sharded: both would gather at once
====================== ==============================================================================

A phase that fails before requests run again is undone and the whole sequence begun anew. What fails again or takes too long
ends in :class:`~grpo_fast.rollout.engine.WeightSyncError`. So does what does not pass the probe; requests are then held up.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from grpo_fast.rollout.engine import WeightSyncError
from grpo_fast.rollout.sync_probe import Choices, Mismatch, Scores, SyncProbe, compare

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class SyncTarget(Protocol):
    """Operations that the sync needs of an engine; each method returns when its work is done."""

    def pause(self) -> None:
        """Pauses all requests."""
        ...

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Brings a part of the engine's memory back, where it slept."""
        ...

    def send(self) -> int:
        """Sends all weights of the policy.

        Returns:
            How many bytes went over.
        """
        ...

    def finish(self, version: int) -> None:
        """Puts what was sent in force."""
        ...

    def weight_version(self) -> int | None:
        """The version in force, as the engine itself says; ``None`` where it has none yet."""
        ...

    def undo(self) -> None:
        """Leaves an update that began, so that another can begin; does nothing where none did."""
        ...

    def reset_prefix_cache(self) -> bool:
        """Forgets cached keys and values; false where the engine refused."""
        ...

    def answer(self, prompts: Sequence[Sequence[int]]) -> list[list[Choices]]:
        """Every engine's log-probabilities of the next token, for one prompt after the other, with the prefix cache."""
        ...

    def score(self, prompt: Sequence[int]) -> list[list[Choices]]:
        """The same for a prompt and for the prompt without its last token, computed without the prefix cache."""
        ...

    def resume(self) -> None:
        """Lets requests run again."""
        ...

    def waits_for(self) -> str:
        """Names what has not answered yet, where the engine is several; else empty."""
        ...


class WeightSync:
    """Brings policies' weights into one engine.

    Args:
        target: the engine.
        probe: the proof it must pass.
        deadline_s: longest time of each phase, in seconds.
        attempts: how often the whole sequence is tried.
    """

    def __init__(self, target: SyncTarget, probe: SyncProbe, *, deadline_s: float = 300.0, attempts: int = 2) -> None:
        self._target = target
        self._probe = probe
        self._deadline_s = deadline_s
        self._attempts = attempts
        self._phase = ""
        self._left: threading.Thread | None = None
        """The thread of a phase that hung and still runs."""

    def run(self, policy: torch.nn.Module, version: int) -> dict[str, float]:
        """Makes ``policy``'s weights those of the engine.

        Returns:
            ``sync/seconds``, of which ``sync/probe_seconds``; ``sync/bytes``, ``sync/gbps`` (of the whole sync),
            ``sync/probe_kl``, ``sync/probe_max`` and ``sync/version``.

        Raises:
            WeightSyncError: the phase is named, with its cause; the engine must not be sampled from.
        """
        if self._left is not None and self._left.is_alive():
            raise WeightSyncError(
                f"an earlier sync still hangs in {self._left.name!r}, and a new one could mix two weight versions; restart the "
                "engine"
            )
        own: Future[Scores] = Future()

        def work() -> None:
            try:
                own.set_result(self._probe.score(policy))
            except BaseException as error:
                own.set_exception(error)

        begin = time.perf_counter()
        beside = threading.Thread(target=work, name="weight sync: policy", daemon=True)
        beside.start()
        try:
            if any(hasattr(weight, "full_tensor") for weight in policy.parameters()):
                self._timed("probe", own.exception)
            num_bytes = self._transferred(version)
            sent = time.perf_counter()
            mismatch = self._probed(version, own)
        finally:
            beside.join(self._deadline_s)
        end = time.perf_counter()
        return {
            "sync/seconds": end - begin,
            "sync/probe_seconds": end - sent,
            "sync/bytes": float(num_bytes),
            "sync/gbps": num_bytes / (end - begin) / 1e9,
            "sync/probe_kl": mismatch.kl,
            "sync/probe_max": mismatch.largest,
            "sync/version": float(version),
        }

    def _transferred(self, version: int) -> int:
        for attempt in range(1, self._attempts + 1):
            try:
                return self._transfer(version)
            except WeightSyncError:
                raise  # too late or refused: no second try would be another
            except Exception as error:
                cause = f"the sync of version {version} failed in its phase {self._phase!r}: {error}"
                self._undo(cause)
                if attempt == self._attempts:
                    told = f"{cause} (attempt {attempt} of {self._attempts}); nothing was sampled from incomplete weights"
                    raise WeightSyncError(told) from error
                _log.warning("%s; it is begun anew", cause)
        raise AssertionError("the last attempt returns or raises")

    def _transfer(self, version: int) -> int:
        target = self._target
        self._timed("pause", target.pause)
        self._timed("wake_weights", lambda: target.wake("weights"))
        num_bytes = self._timed("send", target.send)
        self._timed("finish", lambda: target.finish(version))
        found = self._timed("finish", target.weight_version)
        if found != version:
            raise RuntimeError(f"the engine reports version {found} instead")
        if not self._timed("reset_prefix_cache", target.reset_prefix_cache):
            raise RuntimeError("the engine refused to reset its prefix cache, because unfinished requests still use it")
        self._timed("wake_kv_cache", lambda: target.wake("kv_cache"))
        self._timed("resume", target.resume)
        return num_bytes

    def _probed(self, version: int, own: Future[Scores]) -> Mismatch:
        try:
            return self._timed("probe", lambda: self._prove(version, own))
        except Exception as error:
            with contextlib.suppress(Exception):
                self._timed("pause", self._target.pause)
            if isinstance(error, WeightSyncError):
                raise
            raise WeightSyncError(f"the sync of version {version} failed in its phase 'probe': {error}") from error

    def _prove(self, version: int, own: Future[Scores]) -> Mismatch:
        probe = self._probe
        told = self._target.answer(probe.prompts)
        scores = own.result()
        allowed = probe.allowed(scores)

        def worst(engines: Sequence[Sequence[Choices]]) -> Mismatch:
            found = [compare(scores.logprobs, choices) for choices in engines]
            return next((each for each in found if not each.kl <= allowed), max(found))  # not so for NaN too

        mismatch = worst(told)
        if mismatch.kl <= allowed:
            return mismatch
        fresh = worst(self._target.score(probe.prompt))
        if fresh.kl <= allowed:
            cause = "they agree if its prefix cache is not used, so that cache still holds keys and values of older weights"
        else:
            cause = (
                f"they differ without its prefix cache too (by up to {fresh.largest:.3g}), so some weights did not "
                "arrive, or the engine computes the model in another way than transformers"
            )
        raise WeightSyncError(
            f"after the sync of version {version} the engine does not match the policy: over {len(probe.prompt)} fixed "
            f"prompt tokens its log-probabilities differ by up to {mismatch.largest:.3g} nats (divergence {mismatch.kl:.3g}, "
            f"allowed {allowed:.3g}); {cause}"
        )

    def _timed(self, phase: str, work: Callable[[], _T]) -> _T:
        """Runs ``work`` aside, so that one that hangs is left behind."""
        self._phase = phase
        outcome: list[_T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                outcome.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, name=f"weight sync: {phase}", daemon=True)
        thread.start()
        thread.join(self._deadline_s)
        if errors:
            raise errors[0]
        if not outcome:
            self._left = thread
            silent = self._target.waits_for()
            raise WeightSyncError(
                f"the weight sync hung in its phase {phase!r}, not done after {self._deadline_s:g} s (sync_deadline_s)"
                + (f": {silent} did not answer" if silent else "")
            )
        return outcome[0]

    def _undo(self, cause: str) -> None:
        try:
            self._timed("undo", self._target.undo)
        except Exception as error:
            raise WeightSyncError(f"{cause}; the unfinished update could not be cancelled either: {error}") from error
