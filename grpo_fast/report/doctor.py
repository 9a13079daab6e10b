"""``grpo-fast doctor``: what is installed, what is missing for which feature, and the command that fixes it.

Every check is a function of a :class:`~grpo_fast.report.machine.Machine`, and :data:`CHECKS` lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo_fast.report.machine import FEATURES, Feature, Machine, read_machine

Status: TypeAlias = Literal["ok", "note", "warn", "FAIL"]
STYLES: dict[Status, str] = {"ok": "green", "note": "dim", "warn": "bold yellow", "FAIL": "bold red"}
GIB = 2**30
LOW_DISK_GIB = 5.0
LOW_MEMORY_GIB = 2.0


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check."""

    status: Status
    found: str
    meaning: str = ""
    """Its use, or the problem."""
    fix: str = ""
    """Command to run."""


def _own_metadata(machine: Machine) -> Finding:
    if "grpo-fast" not in machine.versions:
        return Finding("FAIL", "no metadata", "version ranges are unknown; install the checkout", "pip install -e .")
    return Finding("ok", machine.versions["grpo-fast"])


def _required(name: str) -> Callable[[Machine], Finding]:
    def look(machine: Machine) -> Finding:
        problem = _problem(machine, name)
        return Finding("FAIL", *problem, _install(machine, [name])) if problem else Finding("ok", machine.versions[name])

    return look


def _problem(machine: Machine, name: str) -> tuple[str, str] | None:
    version = machine.versions.get(name)
    if version is None:
        return "missing", "training needs it"
    if name in machine.import_errors:
        return version, f"does not import: {machine.import_errors[name]}"
    wanted = machine.required.get(name, SpecifierSet())
    return None if wanted.contains(version, prereleases=True) else (version, f"{wanted} is needed")


def _install(machine: Machine, names: list[str]) -> str:
    again = "--force-reinstall " if machine.import_errors.keys() & set(names) else ""
    return f"pip install {again}" + " ".join(f'"{name}{machine.required.get(name, "")}"' for name in names)


def _others_required(machine: Machine) -> Finding:
    names = [name for name in machine.required if name not in {"torch", "transformers"}]
    problems = {name: problem for name in names if (problem := _problem(machine, name))}
    if not problems:
        return Finding("ok", f"all {len(names)} installed")
    meaning = "; ".join(f"{name} {found}: {text}" for name, (found, text) in problems.items())
    return Finding("FAIL", f"{len(problems)} of {len(names)} broken", meaning, _install(machine, list(problems)))


def _compatible(machine: Machine) -> Finding:
    if machine.conflicts:
        return Finding("warn", "conflicts", "; ".join(machine.conflicts), "pip check")
    return Finding("ok", "no conflicts")


def _device(machine: Machine) -> Finding:
    facts = machine.device
    if facts is None:
        return Finding("FAIL", "none usable", machine.device_error)
    memory = f"{facts.memory_bytes / GIB:.0f} GiB"
    if facts.kind == "cpu":
        found = f"{facts.name}, {facts.num_cores} core{'s' * (facts.num_cores > 1)}, {memory}"
        return Finding("ok", found, "no GPU: enough for the embedded model and for first experiments")
    count = f"{facts.num_devices} x " if facts.num_devices > 1 else ""
    found = f"{count}{facts.name}, {facts.arch}, {facts.num_cores} SMs, {memory}"
    if facts.peak_bf16_flops is None or facts.peak_bytes_per_s is None:
        no_peak, no_bf16 = "its bf16 peak is not known: no MFU will be shown", "no bfloat16: runs compute in float32"
        return Finding("note", found, no_peak if facts.has_bfloat16 else no_bf16)
    peaks = f"peaks: {facts.peak_bf16_flops / 1e12:.0f} TFLOP/s bf16, {facts.peak_bytes_per_s / 1e12:.2f} TB/s"
    return Finding("ok", found, peaks)


def _arithmetic(machine: Machine) -> Finding:
    if machine.device_error:
        return Finding("FAIL", "failed", machine.device_error)
    return Finding("ok", "correct")


def _torch_build(machine: Machine) -> Finding:
    facts = machine.device
    if facts is None:
        return Finding("note", "unknown", "torch does not work")
    built = f"CUDA {facts.cuda_version}" if facts.cuda_version else "CPU only"
    if facts.kind == "cuda" or (facts.cuda_version is None and not machine.has_driver):
        return Finding("ok", built)
    if facts.cuda_version is None:
        fix = "pip install --force-reinstall torch"
        return Finding("warn", built, "this build of torch cannot use the GPU; the default Linux wheel can", fix)
    if machine.has_driver:
        reason = machine.gpu_reason or "the driver is too old, or CUDA_VISIBLE_DEVICES hides the GPU"
        return Finding("warn", built, f"torch sees no GPU though its driver is loaded: {reason}", "nvidia-smi")
    return Finding("note", built, "works, but without a GPU the CPU build of torch is enough, and gigabytes smaller")


def _triton(machine: Machine) -> Finding:
    version = machine.versions.get("triton")
    if version:
        return Finding("ok", version, "fused kernels")
    if machine.has_gpu:
        return Finding("warn", "missing", "without it, the slower PyTorch implementations run", "pip install triton")
    return Finding("note", "missing", "fused kernels; not needed without a GPU")


def _native(machine: Machine) -> Finding:
    return Finding("ok" if machine.native.startswith("built") else "note", *machine.native.split(": ", 1))


def _energy(machine: Machine) -> Finding:
    if machine.energy.startswith("nvml"):
        return Finding("ok", "measured", "by NVML")
    if machine.device is None or machine.device.kind == "cpu":
        return Finding("note", machine.energy, "from the number of cores; measured on NVIDIA GPUs only")
    fix = "" if "nvidia-ml-py" in machine.versions else "pip install nvidia-ml-py"
    return Finding("note", machine.energy, "from the board's power limit; NVML would measure it", fix)


def _feature(feature: Feature) -> Callable[[Machine], Finding]:
    def look(machine: Machine) -> Finding:
        replaced = bool(feature.cpu_package) and not machine.has_gpu
        packages = (feature.cpu_package,) if replaced else feature.packages
        have = {name: machine.versions[name] for name in packages if name in machine.versions}
        single = len(packages) == 1
        found = ", ".join(version if single else f"{name} {version}" for name, version in have.items())
        fix = f"pip install {feature.cpu_package}" if replaced else f'pip install "grpo-fast[{feature.extra}]"'
        old = [n for n, v in have.items() if not machine.optional.get(n, SpecifierSet()).contains(v, prereleases=True)]
        if old:
            return Finding("warn", found, "; ".join(f"{name}{machine.optional[name]} is needed" for name in old), fix)
        if feature.needs_gpu and not machine.has_gpu:
            return Finding("note", found or "missing", f"{feature.purpose}; needs a GPU")
        if not (lacking := [name for name in packages if name not in have]):
            return Finding("ok", found, feature.purpose)
        meaning = feature.purpose if single else f"{feature.purpose}; missing: {', '.join(lacking)}"
        return Finding("note", found or "missing", meaning, fix)

    return look


def _compiler(machine: Machine) -> Finding:
    if path := machine.tools.get("c++"):
        return Finding("ok", "found", path)
    fix = "apt-get install build-essential"
    if machine.has_gpu:
        return Finding("warn", "missing", "Triton compiles its launchers with it", fix)
    return Finding("note", "missing", "needed only to build the native extension", fix)


def _tool(name: str, meaning: str) -> Callable[[Machine], Finding]:
    def look(machine: Machine) -> Finding:
        path = machine.tools.get(name)
        return Finding("ok", "found", path) if path else Finding("note", "missing", meaning)

    return look


def _disk(machine: Machine) -> Finding:
    free = machine.disk_free_bytes / GIB
    if free < LOW_DISK_GIB:
        return Finding("warn", f"{free:.1f} GiB free", "a checkpoint takes 12 bytes per parameter; use another output_dir")
    return Finding("ok", f"{free:.0f} GiB free")


def _memory(machine: Machine) -> Finding:
    free = machine.memory_free_bytes / GIB
    if not machine.memory_free_bytes:
        return Finding("note", "unknown", "this system does not report how much memory is free")
    if free < LOW_MEMORY_GIB:
        return Finding("warn", f"{free:.1f} GiB free", "even the embedded model with its reward workers needs 2 GiB")
    return Finding("ok", f"{free:.0f} GiB free")


def _hub(machine: Machine) -> Finding:
    found = f"{machine.hub_models} models, {machine.hub_datasets} datasets cached"
    if machine.hub_offline:
        return Finding("note", found, f"HF_HUB_OFFLINE is set: only what is in {machine.hub_cache} is found")
    if machine.hub_unwritable:
        meaning = f"nothing can be downloaded into {machine.hub_cache}: {machine.hub_unwritable}; name another directory"
        return Finding("warn", found, meaning, "export HF_HOME=DIRECTORY")
    return Finding("note", found, "hub ids are downloaded; without a network set HF_HUB_OFFLINE=1, or use directories")


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table."""

    section: str
    name: str
    examine: Callable[[Machine], Finding]


CHECKS: tuple[Check, ...] = (
    Check("Training needs", "python", lambda machine: Finding("ok", machine.python)),
    Check("Training needs", "grpo-fast", _own_metadata),
    Check("Training needs", "torch", _required("torch")),
    Check("Training needs", "transformers", _required("transformers")),
    Check("Training needs", "other packages", _others_required),
    Check("Training needs", "compatibility", _compatible),
    Check("Device", "device", _device),
    Check("Device", "arithmetic", _arithmetic),
    Check("Device", "torch build", _torch_build),
    Check("Device", "triton", _triton),
    Check("Device", "native ops", _native),
    Check("Device", "energy", _energy),
    *(Check("Extras", feature.extra, _feature(feature)) for feature in FEATURES),
    Check("Build tools", "c++", _compiler),
    Check("Build tools", "nvcc", _tool("nvcc", "needed only to build the CUDA extension")),
    Check("Build tools", "ninja", _tool("ninja", "builds the extension faster")),
    Check("Room", "disk", _disk),
    Check("Room", "memory", _memory),
    Check("Room", "model hub", _hub),
)


def examine(machine: Machine) -> list[tuple[Check, Finding]]:
    """Runs every check on a machine that was read."""
    return [(check, check.examine(machine)) for check in CHECKS]


def render(results: list[tuple[Check, Finding]], *, width: int) -> Table:
    """The findings as a table of ``width`` columns; 80 are enough."""
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=False, width=width)
    table.add_column(width=4)
    table.add_column(width=14, no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    table.add_column(ratio=2, overflow="fold")
    section = ""
    for check, finding in results:
        if check.section != section:
            if section:
                table.add_row()
            section = check.section
            table.add_row("", Text(section, style="bold"))
        meaning = Text(finding.meaning, style="dim" if finding.status in {"ok", "note"} else "")
        if finding.fix:
            meaning.append("\n" if finding.meaning else "").append(finding.fix, style="cyan not dim")
        style = STYLES[finding.status]
        table.add_row(Text(finding.status, style=style), Text(check.name), Text(finding.found), meaning)
    return table


def doctor(console: Console) -> int:
    """Prints the table and a verdict.

    Returns:
        0 if training works on this machine, 1 if something that it needs is broken.
    """
    with console.status("checking"):
        results = examine(read_machine())
    console.print(render(results, width=min(console.width, 120)))
    failed = [check.name for check, finding in results if finding.status == "FAIL"]
    warned = [check.name for check, finding in results if finding.status == "warn"]
    console.print()
    if warned:
        console.print(Text(f"Worth a look: {', '.join(warned)}.", style=STYLES["warn"]))
    if failed:
        console.print(Text(f"Training cannot run here: {', '.join(failed)}.", style=STYLES["FAIL"]))
        return 1
    console.print(Text("Training works here. Try: grpo-fast train", style="bold green"))
    return 0
