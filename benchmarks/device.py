"""Measures the ops of a whole device: ``python -m benchmarks.device``.

First the device's own tests run where it is a GPU; then the ceilings are measured, and the cases one after the other, the most
important first, each checked before it is timed. ``benchmarks/results/<device>/ops.json`` is rewritten after every case. What
the time budget does not reach is listed; ``--resume`` measures that later. ``--output DIRECTORY/ops.json`` writes to another
place, as on a machine where nothing of the tree is kept; the other commands take it too. It needs of this project's
dependencies torch and numpy (and Triton on a GPU), matplotlib for the picture, pytest for the tests.

``python -m benchmarks.device steps`` measures whole training steps instead; see :mod:`benchmarks.system.device_steps`.

Rivals that are installed take part, the others are listed as missing. ``pip install --no-deps`` of trl, liger-kernel,
unsloth_zoo, verl, cut-cross-entropy and quack-kernels fetches less than 10 MiB; modules are imported past what their packages
would pull in. Liger's path for sm_90 and quack want nvidia-cutlass-dsl too, 92 MiB more, and say so where it is missing.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops import report, store
from benchmarks.ops.cases import Case, HeadCase, cpu_cases, gpu_cases, smoke_cases
from benchmarks.ops.checks import run_gpu_tests
from benchmarks.ops.contenders.table import CONTENDERS, contenders_of, refusal
from benchmarks.ops.measure import Clock, ceilings
from benchmarks.ops.suite import Bench, DeadDeviceError, run_case
from benchmarks.ops.supervise import DEAD_DEVICE, marker, note, sign, supervise
from grpo_fast.device import DeviceFacts, device_facts

_SHARE_OF_TESTS = 0.25
_SECONDS_OF_SETUP = 2.0


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where tests fail, one of this project's ops fails or is wrong, or a case breaks; 0 otherwise."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["steps"]:
        from benchmarks.system import device_steps  # noqa: PLC0415 (the ops need less than what it imports)

        return device_steps.main(given[1:])
    options = _parser().parse_args(given)
    cuda = options.device == "cuda" or (options.device == "auto" and not options.smoke and torch.cuda.is_available())
    facts = device_facts("cuda" if cuda else "cpu")
    path = options.output or (None if options.smoke else store.default_path(facts))
    cases = smoke_cases() if options.smoke else gpu_cases() if cuda else cpu_cases()
    cases = [case for case in cases if options.only in case.name and case.name not in options.skip]
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    if path is None or options.smoke or options.worker:
        return _measure(options, facts, cases, path)
    command = [sys.executable, "-m", "benchmarks.device", *given]
    code = supervise(command, path=path, deadline=time.monotonic() + options.budget, stall_s=options.stall)
    if path.exists():
        _publish(path)
    return code


def _measure(options: argparse.Namespace, facts: DeviceFacts, cases: list[Case], path: Path | None) -> int:
    deadline = time.perf_counter() + options.budget
    device, limit = torch.device(facts.kind), _SHARE_OF_TESTS * options.budget
    torch.set_num_threads(options.threads or torch.get_num_threads())
    if options.smoke:
        torch.compiler.set_stance("force_eager")
    before = store.read(path) if options.resume and path is not None and path.exists() else None
    tests = before["tests"] if before else None
    if facts.kind == "cuda" and not options.no_tests:
        tests = run_gpu_tests(limit, alive=functools.partial(sign, path) if path is not None else lambda: None)
        print("\n    ".join([f"GPU tests: {tests['summary']}", *tests["failed"]]), flush=True)
    clock = Clock(device)
    limits = ceilings(clock, device, small=options.smoke)
    header = {
        "device": facts.as_dict(),
        "ceilings": asdict(limits),
        "torch_threads": torch.get_num_threads(),
        "machine": options.machine,
        "tests": tests,
        "contenders": _contenders(),
    }
    rounds = (2, 2) if options.smoke else (3, 30)
    bench = Bench(device, clock, limits, options.case_seconds, *rounds, tidy=not options.smoke)
    bench.banned = dict(entry.split("=", 1) for entry in options.ban)
    if path is None:
        return int(_run(bench, cases, None, deadline))
    kept = store.Store(path, header, keep=before["cases"] if before else [])
    kept.write()  # what the tests said outlives a worker that dies in its first case
    bench.trying = functools.partial(note, path)
    try:
        failed = _run(bench, cases, kept, deadline)
    except DeadDeviceError as error:
        print(f"the device is gone: {error}", flush=True)
        return DEAD_DEVICE
    kept.write()
    marker(path).unlink(missing_ok=True)
    return int(failed or bool(tests and tests["failed"]))


def _run(bench: Bench, cases: list[Case], kept: store.Store | None, deadline: float) -> bool:
    """Runs the cases that fit; says whether anything of this project's is broken."""
    failed = False
    for number, case in enumerate(cases, 1):
        if kept is not None and case.name in kept.done:
            continue
        left = deadline - time.perf_counter()
        if left <= 0 or (number > 1 and estimate(bench, case) > left):
            print(f"[{number}/{len(cases)}] {case.name}: left out, {left:.0f} s left", flush=True)
            if kept is not None:
                kept.leave_out(case.name, f"about {estimate(bench, case):.0f} s, {left:.0f} s of the budget were left")
            continue
        try:
            record = run_case(bench, case)
        except Exception as error:
            failed = True
            print(f"[{number}/{len(cases)}] {case.name}: {type(error).__name__}: {error}", flush=True)
            if kept is not None:
                kept.leave_out(case.name, f"{type(error).__name__}: {error}"[:300])
            continue
        broken = [row for row in record["rows"] if row["role"] == "ours" and row["status"] in ("failed", "wrong", "missing")]
        failed = failed or bool(broken)
        print(f"[{number}/{len(cases)}] {report.one_line(record)}", flush=True)
        for row in broken:
            print(f"    {row['contender']}: {row['status']}, {row['reason']}", flush=True)
        if kept is not None:
            kept.add(record, of={"commit": store.commit(), "date": store.today(), "ceilings": asdict(bench.ceilings)})
    return failed


def estimate(bench: Bench, case: Case) -> float:
    """Seconds that a case will take, roughly.

    A call costs about twice the bare products, in checks, trials and turns; a trial costs beyond that what the contender's last
    one did, which compiled as much.
    """
    if not isinstance(case, HeadCase):
        return _SECONDS_OF_SETUP
    one = case.num_flops / bench.ceilings.gemm_flops[case.dtype]
    here = [x for x in contenders_of(case) if x.version() is not None and refusal(x, case, bench.device) is None]
    trials = sum(bench.trial_s(case, contender) + bench.overheads_s.get(contender.name, 0.0) for contender in here)
    turns = max(2.0 * one * len(here) * (1 + bench.min_rounds), bench.allowance_s)  # one more round, which is not read
    return _SECONDS_OF_SETUP + trials + turns


def _contenders() -> list[dict[str, Any]]:
    """Packages of every contender, installed or not."""
    packages = {contender.package: contender.version() for contender in CONTENDERS}
    return [{"package": name, "version": version} for name, version in packages.items()]


def _publish(path: Path) -> None:
    try:
        from benchmarks.ops.pictures import draw  # noqa: PLC0415 (a machine with a GPU may have no matplotlib)
    except ImportError as error:
        print(f"no picture: {error}; on a machine with matplotlib run `python -m benchmarks.ops.pictures {path}`")
    else:
        print(f"{path}\n{draw(path)}")
    print("Tables: python benchmarks/tables.py")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--smoke", action="store_true", help="every case in miniature on the CPU, nothing written without --output"
    )
    parser.add_argument("--budget", type=float, default=450.0, help="seconds for everything")
    parser.add_argument("--case-seconds", type=float, default=6.0, help="seconds for the timed turns of one case")
    parser.add_argument(
        "--output", type=Path, help="instead of benchmarks/results/<device>/ops.json, as where the tree is not kept"
    )
    parser.add_argument("--resume", action="store_true", help="keep the cases of an earlier run")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--no-tests", action="store_true", help="leave out the GPU tests")
    parser.add_argument("--threads", type=int, help="of PyTorch on a CPU")
    parser.add_argument("--machine", default="", help="what else to say of the machine: shared, clocks locked, ...")
    parser.add_argument("--stall", type=float, default=180.0, help="seconds without a sign of life before a worker is stopped")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ban", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="a case to leave out")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    return parser


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
