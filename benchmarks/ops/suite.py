"""One case from inputs to a record: everything is checked first, what is right is timed in turns, and nothing is left out.

A record lists every contender of the case with a status: ``ok`` with times; ``wrong`` with its error and no time; ``missing``,
``refused`` or ``failed`` with the reason.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.ops.cases import AdvantageCase, Case, HeadCase
from benchmarks.ops.contenders.contender import Call, Contender
from benchmarks.ops.contenders.table import contenders_of, refusal
from benchmarks.ops.inputs import HeadRows, advantage_problem, head_problem, head_rows, loss_problem
from benchmarks.ops.measure import Ceilings, Clock, peak_extra_bytes, quantiles, take_turns
from benchmarks.ops.truth import advantage_truth, complaints, head_truth, loss_truth, plain_errors, relative_error

TURNS = "(turns)"
_SLOW_S = 1.0
"""A first call on a CPU that takes so long is a fair trial as it is."""


class DeadDeviceError(BaseException):
    """The device is gone for this process; no handler of ordinary errors may swallow it."""


@dataclass
class Bench:
    """A device and what has been made on it for reuse."""

    device: torch.device
    clock: Clock
    ceilings: Ceilings
    allowance_s: float
    """For the timed turns of one case."""
    min_rounds: int = 3
    max_rounds: int = 30
    tidy: bool = True
    """Collect garbage between contenders; costs more than a case in miniature."""
    trying: Callable[[str, str], None] = lambda case, contender: None
    """Told before a contender first runs in a case, and with ``TURNS`` before each round of turns: what a crash was about."""
    banned: Mapping[str, str] = field(default_factory=dict)
    """Contenders that brought the process down before, with the reason."""
    overheads_s: dict[str, float] = field(default_factory=dict)
    """By contender, what its last trial took beyond its products: what it compiled, above all."""
    _rows: dict[tuple[object, ...], HeadRows] = field(default_factory=dict)

    def trial_s(self, case: HeadCase, contender: Contender) -> float:
        """Seconds of the products of a trial, roughly: twice the bare ones a call, one a setting and one for memory."""
        return 2.0 * (1 + len(contender.options)) * case.num_flops / self.ceilings.gemm_flops[case.dtype]

    def rows(self, case: HeadCase) -> HeadRows:
        """Rows of a case's sizes; the last ones are kept."""
        key = (case.model, case.num_tokens, case.dtype)
        if key not in self._rows:
            self._rows.clear()
            self._rows[key] = head_rows(case, self.device)
        return self._rows[key]


@dataclass
class Bound:
    """A problem of any kind, with the way to judge a result of it."""

    problem: Any
    errors: Callable[[Any], dict[str, float]]
    plain: dict[str, float]
    about: dict[str, Any] = field(default_factory=dict)


def bind(bench: Bench, case: Case) -> Bound:
    """Makes a case's inputs and its truth."""
    if isinstance(case, HeadCase):
        problem = head_problem(case, bench.rows(case))
        truth = head_truth(problem)
        rows = problem.rows
        about = {
            "mean_entropy_nat": rows.entropy.mean().item(),
            "mean_logprob_nat": rows.logprobs.mean().item(),
            "gradient_rows_checked": len(truth.rows),
            "gradient_tokens_checked": len(truth.tokens),
        }
        return Bound(problem, lambda found: truth.errors(found, problem), truth.plain_errors, about)
    if isinstance(case, AdvantageCase):
        expected, given = advantage_truth(made := advantage_problem(case, bench.device)), made
    else:
        expected, given = loss_truth(loss := loss_problem(case, bench.device)), loss
    return Bound(given, lambda found: {"relative": relative_error(found, expected)}, plain_errors(expected))


def run_case(bench: Bench, case: Case) -> dict[str, Any]:
    """Measures one case.

    Returns:
        A record of plain values.
    """
    begun = time.perf_counter()
    bound = bind(bench, case)
    rows, calls = [], {}
    for contender in contenders_of(case):
        tried = time.perf_counter()
        row, call = _try(bench, case, bound, contender)
        if isinstance(case, HeadCase):
            beyond = time.perf_counter() - tried - bench.trial_s(case, contender)
            bench.overheads_s[contender.name] = max(0.0, beyond)
        rows.append(row)
        if call is not None:
            calls[contender.name] = call
        _release(bench)
    readings, failures = take_turns(
        bench.clock,
        calls,
        allowance_s=bench.allowance_s / (1 if case.every_rival else 2),
        min_rounds=bench.min_rounds,
        max_rounds=bench.max_rounds,
        on_round=lambda: bench.trying(case.name, TURNS),
    )
    for row in rows:
        name = row["contender"]
        if name in readings:
            _note_times(row, readings[name], case, bench)
        elif name in failures:
            _check_alive(bench.device, failures[name])
            row |= {"status": "failed", "reason": f"after checks, {_named(failures[name])}"}
    _note_ratios(rows)
    return {
        "case": case.name,
        "kind": case.kind,
        "parameters": asdict(case),
        "inputs": bound.about,
        "plain_errors": bound.plain,
        "rows": rows,
        "seconds": round(time.perf_counter() - begun, 2),
    }


def _try(bench: Bench, case: Case, bound: Bound, contender: Contender) -> tuple[dict[str, Any], Call | None]:
    """Loads, runs, judges and weighs a contender; the call is there only where the result is right."""
    row: dict[str, Any] = {
        "contender": contender.name,
        "role": contender.role,
        "package": contender.package,
        "version": contender.version(),
        "settings": contender.settings,
    }
    reason = refusal(contender, case, bench.device)
    if reason is not None:
        return row | {"status": "refused", "reason": reason}, None
    if contender.name in bench.banned:
        return row | {"status": "failed", "reason": bench.banned[contender.name]}, None
    bench.trying(case.name, contender.name)
    try:
        call, option, errors = _best_option(bench, bound, contender)
    except ImportError as error:
        status = "missing" if contender.version() is None else "failed"
        return row | {"status": status, "reason": _named(error)}, None
    except Exception as error:
        _check_alive(bench.device, error)
        return row | {"status": "failed", "reason": _named(error)}, None
    row |= {"option": option, "errors": errors}
    wrong = complaints(errors, bound.plain)
    if wrong:
        return row | {"status": "wrong", "reason": "; ".join(wrong)}, None
    if bench.tidy:
        row["peak_extra_bytes"] = peak_extra_bytes(call, bench.device)
    return row | {"status": "ok"}, call


def _best_option(bench: Bench, bound: Bound, contender: Contender) -> tuple[Call, Any, dict[str, float]]:
    """The fastest of a contender's settings that gives a right result, else the last wrong one."""
    best: tuple[bool, float, Call, Any, dict[str, float]] | None = None
    failure: Exception | None = None
    for option in contender.options:
        try:
            call = contender.prepare(bound.problem, option)
            begun = time.perf_counter()
            result = call()
            seconds = time.perf_counter() - begun
            errors = {} if contender.role == "floor" else bound.errors(result)
            del result
            right = not complaints(errors, bound.plain)
            if right and len(contender.options) > 1 and (bench.device.type != "cpu" or seconds < _SLOW_S):
                seconds = bench.clock.seconds(call)  # the first call may have compiled something
        except ImportError:
            raise
        except Exception as error:
            _check_alive(bench.device, error)
            failure = error
            _release(bench)
            continue
        if best is None or (not right, seconds) < best[:2]:
            best = (not right, seconds, call, option, errors)
    if best is None:
        assert failure is not None
        raise failure
    return best[2:]


def _note_times(row: dict[str, Any], readings: list[float], case: Case, bench: Bench) -> None:
    row |= quantiles(readings)
    row["num_readings"] = len(readings)
    seconds = row["p50_ms"] / 1e3
    if isinstance(case, HeadCase):
        row["fraction_of_gemm"] = case.num_flops / seconds / bench.ceilings.gemm_flops[case.dtype]
    else:
        row["fraction_of_copy"] = case.num_bytes / seconds / bench.ceilings.copy_bytes_per_s


def _note_ratios(rows: list[dict[str, Any]]) -> None:
    """Times over those of the bare products of the same turns."""
    floor = next((row["p50_ms"] for row in rows if row["role"] == "floor" and row["status"] == "ok"), None)
    for row in rows:
        if floor is not None and "p50_ms" in row:
            row["times_floor"] = row["p50_ms"] / floor


def _release(bench: Bench) -> None:
    if bench.tidy:
        gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def _check_alive(device: torch.device, error: Exception) -> None:
    """After an illegal access a GPU's context answers nothing any more; only a new process helps."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            raise DeadDeviceError(_named(error)) from error


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
