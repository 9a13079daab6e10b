"""Compiles every kernel ahead of time, for GPUs that are not there, and holds what comes out against their limits.

A kernel module of ``grpo_fast.ops`` registers with a function ``aot_calls() -> dict[str, Callable[[], object]]``: by name,
calls of its own launchers on tensors of the ``meta`` device, in the sizes, types and alignments that matter. Each call runs
once per architecture, with a driver that names the architecture and starts nothing, so what is compiled is what the launcher
would run: the same launch shape, the same specialisation of its arguments.

For each kernel: registers, stack, spills, shared memory, tensor-core instructions, programs that fit one multiprocessor. A
kernel with stack or spills, one with a matrix product and no tensor-core instruction, or one that asks for more shared memory
than a program may have fails. ``python -m benchmarks.aot`` prints the table; ``--write`` stores it in ``results/aot.json``
under the version of Triton, ``--check`` compares with what is stored there. Another version than the installed one is tried
from a folder of its own: ``pip install --no-deps --target DIR triton==3.6.0``, then ``PYTHONPATH=DIR:. python -m
benchmarks.aot --write``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import grpo_fast.ops

RESULTS = Path(__file__).parent / "results" / "aot.json"


class Limits(NamedTuple):
    """What a streaming multiprocessor has, in bytes and threads. Source: CUDA programming guide, compute capabilities."""

    shared_per_program: int
    shared_per_sm: int
    threads_per_sm: int = 2048
    registers_per_sm: int = 65536
    stack_bytes: int = 0
    """What a program may spill: for the sake of occupancy the assembler leaves some two registers short on consumer cards."""


LIMITS = {
    80: Limits(163 * 1024, 164 * 1024),
    89: Limits(99 * 1024, 100 * 1024, threads_per_sm=1536, stack_bytes=8),  # as 86: RTX 30, RTX 40, A10, L4, L40S
    90: Limits(227 * 1024, 228 * 1024),
    100: Limits(227 * 1024, 228 * 1024),
    120: Limits(99 * 1024, 100 * 1024, threads_per_sm=1536, stack_bytes=8),  # RTX 50
}
TENSOR_CORE = {80: r"\bHMMA\b", 89: r"\bHMMA\b", 90: r"\bHGMMA\b", 100: r"\bUTC\w*MMA\b", 120: r"\bHMMA\b"}
RESERVED_SHARED = 1024
"""Bytes of shared memory that the system takes of each resident program."""


@dataclass(frozen=True, order=True)
class Build:
    """One kernel, compiled for one kind of call and one architecture."""

    op: str
    case: str
    arch: int
    kernel: str
    num_warps: int
    num_stages: int
    registers: int
    stack_bytes: int
    spills: int
    """Loads from and stores to local memory in the machine code."""
    shared_bytes: int
    tensor_core: int
    """Tensor-core instructions in the machine code."""
    programs_per_sm: int
    has_dot: bool

    def faults(self) -> list[str]:
        """What is wrong with it, in words."""
        found = []
        if self.stack_bytes > LIMITS[self.arch].stack_bytes or (self.spills and not self.stack_bytes):
            found.append(f"{self.spills} spills and {self.stack_bytes} bytes of stack")
        if self.has_dot and not self.tensor_core:
            found.append("a matrix product without tensor cores")
        if self.shared_bytes > LIMITS[self.arch].shared_per_program:
            found.append(f"{self.shared_bytes} bytes of shared memory of {LIMITS[self.arch].shared_per_program}")
        return found


class NoDevice:
    """A driver that says what to compile for and has nothing to run it on."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0


class Case(NamedTuple):
    module: str
    name: str
    arch: int


def cases(modules: list[str], archs: Sequence[int], *, first: bool) -> Iterator[Case]:
    """Every call for every architecture, or only the ``first`` of each module."""
    for module in modules:
        for name in list(importlib.import_module(module).aot_calls())[: 1 if first else None]:
            for arch in archs:
                yield Case(module, name, arch)


def kernel_modules() -> list[str]:
    """Modules of ``grpo_fast.ops`` that register calls."""
    found = (module.name for module in pkgutil.iter_modules(grpo_fast.ops.__path__))
    names = [f"grpo_fast.ops.{name}" for name in found if not name.startswith("_")]  # the native library is no module
    return [name for name in names if hasattr(importlib.import_module(name), "aot_calls")]


def compile_case(case: Case) -> list[Build]:
    """Runs one call, every launch of which compiles and stops there."""
    compiled: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if "enable_fp_fusion" not in kwargs:
            raise TypeError(f"{self.__name__} is launched without enable_fp_fusion, whose default changes in Triton 3.10")
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[kernel.hash] = kernel
        return kernel

    triton.runtime.driver.set_active(NoDevice(case.arch))
    JITFunction.run = compile_only
    try:
        importlib.import_module(case.module).aot_calls()[case.name]()
    finally:
        JITFunction.run = run
    return [build(case, kernel) for kernel in compiled.values()]


def build(case: Case, kernel: Any) -> Build:
    """Reads what the assembler made."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage, machine_code = (
            subprocess.run(
                [triton.knobs.nvidia.cuobjdump.path, option, cubin.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK"))
    limits, metadata = LIMITS[case.arch], kernel.metadata
    threads = 32 * metadata.num_warps
    return Build(
        op=case.module.rpartition(".")[2],
        case=case.name,
        arch=case.arch,
        kernel=metadata.name,
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        registers=registers,
        stack_bytes=stack,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", machine_code)),
        shared_bytes=metadata.shared,
        tensor_core=len(re.findall(TENSOR_CORE[case.arch], machine_code)),
        programs_per_sm=min(
            limits.threads_per_sm // threads,
            limits.registers_per_sm // (-(-registers // 8) * 8 * threads),
            limits.shared_per_sm // (metadata.shared + RESERVED_SHARED),
        ),
        has_dot="tt.dot" in kernel.asm["ttir"],
    )


def compile_all(wanted: Iterable[Case], *, num_processes: int) -> list[Build]:
    """Compiles cases; Triton keeps what it has compiled in its own cache."""
    # An executor: a pool whose call fails may wait forever for the lock of a worker that it ended. A fork is safe, as torch has
    # been imported and has not run.
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("fork")) as pool:
        return sorted(build for found in pool.map(compile_case, wanted) for build in found)


def table(builds: list[Build]) -> str:
    """Rows for people, without the columns that a good kernel leaves at zero."""
    heads = (
        "op",
        "case",
        "arch",
        "kernel",
        "num_warps",
        "registers",
        "spills",
        "shared_bytes",
        "tensor_core",
        "programs_per_sm",
    )
    rows = [heads, *(tuple(str(getattr(row, head)) for head in heads) for row in builds)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def stored() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def written(known: dict[str, Any]) -> str:
    """Tables by version as JSON, a build a line."""
    rows_of = {version: ",\n".join(map(json.dumps, rows)) for version, rows in sorted(known.items())}
    tables = ",\n".join(f'"{version}": [\n{rows}\n]' for version, rows in rows_of.items())
    return f"{{\n{tables}\n}}\n"


def differences(builds: list[Build], known: dict[str, Any]) -> list[str]:
    """Where builds are not what is stored of their cases for this version of Triton; nothing where none is stored."""
    if triton.__version__ not in known:
        return []
    now = [asdict(row) for row in builds]
    made = {(row.op, row.case, row.arch) for row in builds}
    then = [row for row in known[triton.__version__] if (row["op"], row["case"], row["arch"]) in made]
    return [
        *(f"stored, not found now: {row}" for row in then if row not in now),
        *(f"found now, not stored: {row}" for row in now if row not in then),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="store the table under this version of Triton")
    parser.add_argument("--check", action="store_true", help="fail where the table differs from the one that is stored")
    parser.add_argument("--modules", nargs="*", help="instead of every kernel module of grpo_fast.ops")
    parser.add_argument("--archs", nargs="*", type=int, choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--first", action="store_true", help="the first call of each module alone")
    parser.add_argument("--num-processes", type=int, default=2)
    options = parser.parse_args()
    if options.write and (options.first or options.modules or set(options.archs) != set(LIMITS)):
        parser.error("--write stores a whole table; leave out --first, --modules and --archs")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set; the interpreter compiles nothing, unset it")
    wanted = cases(options.modules or kernel_modules(), options.archs, first=options.first)
    builds = compile_all(wanted, num_processes=options.num_processes)
    print(f"triton {triton.__version__}, ptxas {triton.knobs.nvidia.ptxas.version}\n{table(builds)}")
    faults = [f"{row.op} {row.case} sm_{row.arch} {row.kernel}: {fault}" for row in builds for fault in row.faults()]
    known = stored()
    if options.check:
        faults += differences(builds, known)
    if options.write:
        known[triton.__version__] = [asdict(row) for row in builds]
        RESULTS.write_text(written(known), encoding="utf-8")
    print("\n".join(faults), file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
