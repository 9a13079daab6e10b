"""Facts of this machine, read once: the device with its peaks and power, and the versions of installed packages.

torch is imported only where it is needed, so that the doctor can run, and report versions, even if torch is broken.

Peaks are vendor figures for dense bfloat16 with float32 accumulation, without structured sparsity, at the board's stock
power limit. A name that the table does not hold gives ``None``, never a guess: laptop and cut-down variants share the
names of faster boards, and a laptop's maker chooses the power of its GPU. A CPU has no peak here, as it depends on clocks and
vector units that no data sheet states alike.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import logging
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from grpo_fast import __version__

logger = logging.getLogger(__name__)

CPU_WATTS_PER_CORE = 3.5
"""Full-load power of one logical CPU, memory apart. Source: Cloud Carbon Footprint's average over AWS machines (SPECpower)."""
_BF16_ARCH = 80
UNKNOWN_GPU_WATTS = 350.0
"""Assumed for a GPU that the table does not hold; the middle of its data-centre boards."""

TRACKED_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "vllm",
    "flash-attn",
    "bitsandbytes",
    "liger-kernel",
    "peft",
    "trl",
)


class GpuSpec(NamedTuple):
    """A row of the table: what a data sheet says of a board."""

    pattern: str
    """Regular expression that the whole device name, without its ``NVIDIA`` and ``Tesla``/``GeForce``, must match."""
    bf16_tflops: float | None
    """Dense bf16 tensor-core TFLOP/s; ``None`` where the hardware has no bf16."""
    gb_per_s: float
    """Memory bandwidth in GB/s."""
    watts: float
    """Board power limit."""
    gib: float
    """Memory; of variants that share a row the least. CUDA leaves a few percent less."""

    @property
    def name(self) -> str:
        """One name that the pattern matches."""
        plain = re.sub(r"\([^()]*\)\?", "", self.pattern)
        return re.sub(r"\[(.)[^]]*\]|\(([^|()]*)[^()]*\)", r"\1\2", plain)


# Sources: NVIDIA data sheets of each board (B200, B300: HGX; GB200: NVL72; sparse figures halved), for GeForce and RTX boards
# the GA102, Ada and Blackwell architecture whitepapers, row "BF16 tensor with FP32 accumulate"; of GeForce boards that those
# leave out, twice the float32 rate of CUDA cores and boost clock on the product page, as it is of all that they list. Turing,
# Volta: the product pages; they have no bf16. Variants of unlike memory are told apart by their names; CUDA gives some GeForce
# variants the same name: a size can be added to it, and without one the usual board, else the smallest, is meant.
GPU_TABLE: tuple[GpuSpec, ...] = (
    GpuSpec(r"GB200", 2500, 8000, 1200, 186),
    GpuSpec(r"B300( SXM6 AC)?", 2250, 8000, 1100, 268),
    GpuSpec(r"B200", 2250, 8000, 1000, 180),
    GpuSpec(r"GH200 480GB", 989.4, 4000, 900, 96),
    GpuSpec(r"GH200 144G HBM3e", 989.4, 4900, 900, 144),
    GpuSpec(r"H200", 989.4, 4800, 700, 141),
    GpuSpec(r"H200 NVL", 835.5, 4800, 600, 141),
    GpuSpec(r"H[18]00 80GB HBM3", 989.4, 3350, 700, 80),
    GpuSpec(r"H100 PCIe", 756.5, 2000, 350, 80),
    GpuSpec(r"H100 NVL", 835.5, 3900, 400, 94),
    GpuSpec(r"H20", 148, 4000, 400, 96),
    GpuSpec(r"A[18]00-SXM4-80GB", 312, 2039, 400, 80),
    GpuSpec(r"A100-SXM4-40GB", 312, 1555, 400, 40),
    GpuSpec(r"A[18]00 80GB PCIe", 312, 1935, 300, 80),
    GpuSpec(r"A100-PCIE-40GB", 312, 1555, 250, 40),
    GpuSpec(r"A30", 165, 933, 165, 24),
    GpuSpec(r"A40", 149.7, 696, 300, 48),
    GpuSpec(r"A10", 125, 600, 150, 24),
    GpuSpec(r"L40S", 362.05, 864, 350, 48),
    GpuSpec(r"L40", 181.05, 864, 300, 48),
    GpuSpec(r"L4", 121, 300, 72, 24),
    GpuSpec(r"RTX 6000 Ada Generation", 364.2, 960, 300, 48),
    GpuSpec(r"RTX A6000", 154.8, 768, 300, 48),
    GpuSpec(r"RTX PRO 6000 Blackwell Workstation Edition", 503.8, 1792, 600, 96),
    GpuSpec(r"RTX 5090", 209.5, 1792, 575, 32),
    GpuSpec(r"RTX 5080", 112.6, 960, 360, 16),
    GpuSpec(r"RTX 5070 Ti", 87.9, 896, 300, 16),
    GpuSpec(r"RTX 5070", 61.7, 672, 250, 12),
    GpuSpec(r"RTX 5060 Ti( 8GB)?", 47.4, 448, 180, 8),
    GpuSpec(r"RTX 5060 Ti 16GB", 47.4, 448, 180, 16),
    GpuSpec(r"RTX 5060", 38.4, 448, 145, 8),
    GpuSpec(r"RTX 4090", 165.2, 1008, 450, 24),
    GpuSpec(r"RTX 4080 SUPER", 104.4, 736, 320, 16),
    GpuSpec(r"RTX 4080", 97.5, 716.8, 320, 16),
    GpuSpec(r"RTX 4070 Ti SUPER", 88.2, 672, 285, 16),
    GpuSpec(r"RTX 4070 Ti", 80.2, 504, 285, 12),
    GpuSpec(r"RTX 4070 SUPER", 71, 504, 220, 12),
    GpuSpec(r"RTX 4070", 58.3, 504, 200, 12),
    GpuSpec(r"RTX 4060 Ti( 8GB)?", 44.1, 288, 160, 8),
    GpuSpec(r"RTX 4060 Ti 16GB", 44.1, 288, 165, 16),
    GpuSpec(r"RTX 4060", 30.2, 272, 115, 8),
    GpuSpec(r"RTX 3090 Ti", 80, 1008, 450, 24),
    GpuSpec(r"RTX 3090", 71, 936, 350, 24),
    GpuSpec(r"RTX 3080 Ti", 68.2, 912, 350, 12),
    GpuSpec(r"RTX 3080( 10GB)?", 59.5, 760, 320, 10),
    GpuSpec(r"RTX 3070 Ti", 43.5, 608, 290, 8),
    GpuSpec(r"RTX 3070", 40.6, 448, 220, 8),
    GpuSpec(r"RTX 3060 Ti", 32.4, 448, 200, 8),
    GpuSpec(r"RTX 3060( 12GB)?", 25.5, 360, 170, 12),
    GpuSpec(r"RTX 3060 8GB", 25.5, 240, 170, 8),
    GpuSpec(r"RTX 2080 Ti", None, 616, 250, 11),
    GpuSpec(r"RTX 2080 SUPER", None, 496, 250, 8),
    GpuSpec(r"RTX 2080", None, 448, 215, 8),
    GpuSpec(r"RTX 2070 SUPER", None, 448, 215, 8),
    GpuSpec(r"RTX 2070", None, 448, 175, 8),
    GpuSpec(r"RTX 2060 SUPER", None, 448, 175, 8),
    GpuSpec(r"RTX 2060", None, 336, 160, 6),
    GpuSpec(r"T4", None, 320, 70, 16),
    GpuSpec(r"V100-SXM2-(16|32)GB", None, 900, 300, 16),
    GpuSpec(r"V100-PCIE-(16|32)GB", None, 900, 250, 16),
)


def gpu_spec(name: str) -> GpuSpec | None:
    """The table's row for a device name as CUDA gives it, in small or capital letters, or ``None``."""
    short = _short(name)
    return next((row for row in GPU_TABLE if re.fullmatch(row.pattern, short, re.IGNORECASE)), None)


def similar_gpus(name: str) -> list[str]:
    """Names in the table that hold every word of ``name``, else the most similar ones; none for a laptop's GPU."""
    wanted, known = _words(name), [row.name for row in GPU_TABLE]
    if "laptop" in wanted:
        return []
    return [each for each in known if wanted and wanted <= _words(each)] or difflib.get_close_matches(_short(name), known)


def _short(name: str) -> str:
    return re.sub(r"^(NVIDIA |Tesla |GeForce )*", "", name.strip(), flags=re.IGNORECASE)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", _short(name).lower()))


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """The device that a run computes on."""

    kind: Literal["cpu", "cuda"]
    name: str
    """As CUDA or ``/proc/cpuinfo`` gives it."""
    arch: str
    """``sm_90`` and the like; of a CPU its instruction set, ``x86_64``."""
    num_devices: int
    """Visible GPUs; 1 for a CPU."""
    num_cores: int
    """Streaming multiprocessors of one GPU, or logical CPUs that this process may use."""
    memory_bytes: int
    """Memory of one GPU, or the machine's main memory within its container's limit."""
    peak_bf16_flops: float | None
    """Dense bf16 FLOP/s of one device; ``None`` where unknown."""
    peak_bytes_per_s: float | None
    """Memory bandwidth of one device; ``None`` where unknown."""
    power_watts: float
    """Board power limit of one GPU, or a rough figure for the CPU; what energy is estimated from."""
    cuda_version: str | None
    """CUDA version that torch was built with."""

    @property
    def has_bfloat16(self) -> bool:
        """Whether it is a GPU that computes in bfloat16, which takes compute capability 8.0; torch emulates it on others."""
        return self.kind == "cuda" and int(self.arch.removeprefix("sm_")) >= _BF16_ARCH

    def as_dict(self) -> dict[str, Any]:
        """Plain values for ``summary.json``."""
        return asdict(self)


@functools.cache
def device_facts(kind: Literal["auto", "cpu", "cuda"] = "auto") -> DeviceFacts:
    """Facts of the first visible GPU, or of the CPU; read once.

    Args:
        kind: ``auto`` takes the GPU where torch can use one.

    Raises:
        ValueError: a GPU is asked for and torch can use none.
    """
    import torch  # noqa: PLC0415 (see the module's docstring)

    has_gpu = torch.cuda.is_available()
    if kind == "cuda" and not has_gpu:
        raise ValueError("device 'cuda' was asked for and torch can use no GPU; run `grpo-fast doctor` for the reason")
    if has_gpu and kind != "cpu":
        return _gpu_facts(torch.cuda.get_device_properties(0), torch.cuda.device_count(), torch.version.cuda)
    return _cpu_facts(torch.version.cuda)


def _gpu_facts(properties: Any, num_devices: int, cuda_version: str | None) -> DeviceFacts:
    spec = gpu_spec(properties.name)
    return DeviceFacts(
        kind="cuda",
        name=properties.name,
        arch=f"sm_{properties.major}{properties.minor}",
        num_devices=num_devices,
        num_cores=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        peak_bf16_flops=spec.bf16_tflops * 1e12 if spec and spec.bf16_tflops else None,
        peak_bytes_per_s=spec.gb_per_s * 1e9 if spec else None,
        power_watts=spec.watts if spec else UNKNOWN_GPU_WATTS,
        cuda_version=cuda_version,
    )


def _cpu_facts(cuda_version: str | None) -> DeviceFacts:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return DeviceFacts(
        kind="cpu",
        name=_cpu_name(Path("/proc/cpuinfo")),
        arch=platform.machine(),
        num_devices=1,
        num_cores=cores,
        memory_bytes=_memory_bytes(Path("/sys/fs/cgroup/memory.max")),
        peak_bf16_flops=None,
        peak_bytes_per_s=None,
        power_watts=CPU_WATTS_PER_CORE * cores,
        cuda_version=cuda_version,
    )


def _cpu_name(cpuinfo: Path) -> str:
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    match = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _memory_bytes(cgroup_limit: Path) -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = cgroup_limit.read_text(encoding="ascii").strip() if cgroup_limit.exists() else "max"
    return min(total, int(limit)) if limit.isdigit() else total


def package_version(name: str) -> str | None:
    """Version of an installed distribution, or ``None``; it is not imported. This package may run from its tree alone."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return __version__ if name == "grpo-fast" else None


def versions() -> dict[str, str]:
    """Versions of Python, grpo-fast and every tracked package that is installed, for ``summary.json``."""
    found = {name: package_version(name) for name in ("grpo-fast", *TRACKED_PACKAGES)}
    return {"python": platform.python_version()} | {name: version for name, version in found.items() if version is not None}


class EstimatedEnergy:
    """Board power times time: an upper bound for a GPU that waits, and a rough guess for a CPU."""

    name = "estimated"

    def __init__(self, watts: float) -> None:
        self._watts = watts

    def read(self, device_seconds: float) -> float:
        """Joules of ``device_seconds`` at a steady draw."""
        return self._watts * device_seconds


class CountedEnergy:
    """Differences of a counter that only rises, such as NVML's energy since the driver was loaded."""

    name = "nvml"

    def __init__(self, joules: Callable[[], float], *, scale: float = 1.0) -> None:
        """Takes the first reading.

        Args:
            joules: the counter.
            scale: devices of the run over devices that the counter sees.
        """
        self._joules = joules
        self._scale = scale
        self._last = joules()

    def read(self, device_seconds: float) -> float:
        """Joules since the last call; ``device_seconds`` is not needed, as they were measured."""
        last, self._last = self._last, self._joules()
        return (self._last - last) * self._scale


class IntegratedPower:
    """Power readings integrated by the trapezoid rule, one reading a step, for boards without an energy counter."""

    name = "nvml-power"

    def __init__(
        self, watts: Callable[[], float], *, scale: float = 1.0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Takes the first reading.

        Args:
            watts: present draw.
            scale: devices of the run over devices that ``watts`` sees.
            clock: seconds.
        """
        self._watts = watts
        self._scale = scale
        self._clock = clock
        self._last = (clock(), watts())

    def read(self, device_seconds: float) -> float:
        """Joules since the last call; ``device_seconds`` is not needed, as they were measured."""
        (then, before), self._last = self._last, (self._clock(), self._watts())
        now, after = self._last
        return (now - then) * (before + after) / 2 * self._scale


EnergyReader: TypeAlias = EstimatedEnergy | CountedEnergy | IntegratedPower
"""Gives joules since the last reading, by ``read(device_seconds)``, and says by its ``name`` how they are known."""


def energy_source(facts: DeviceFacts, *, num_devices: int = 1) -> EnergyReader:
    """The best source of joules here: NVML's energy counter, NVML's power, else an estimate from the power limit.

    NVML is read through ``nvidia-ml-py``. Where a run spans machines, this one's GPUs stand for all. A CPU is always estimated.

    Args:
        facts: the device.
        num_devices: devices that the run holds.
    """
    if facts.kind == "cpu":
        return EstimatedEnergy(facts.power_watts)
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        logger.warning("energy is estimated from the power limit; `pip install nvidia-ml-py` to measure it")
        return EstimatedEnergy(facts.power_watts)
    try:
        nvml.nvmlInit()
        return _nvml_reader(nvml, num_devices)
    except nvml.NVMLError as error:
        logger.warning("energy is estimated from the power limit, as NVML cannot be read: %s", error)
        return EstimatedEnergy(facts.power_watts)


def _nvml_reader(nvml: Any, num_devices: int) -> EnergyReader:
    import torch  # noqa: PLC0415 (see the module's docstring)

    seen = min(num_devices, torch.cuda.device_count())
    # By UUID, as NVML numbers all boards of the machine and CUDA_VISIBLE_DEVICES renumbers torch's.
    handles = [nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(i).uuid}") for i in range(seen)]
    scale = num_devices / seen

    def joules() -> float:
        return sum(int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) for handle in handles) / 1e3

    def watts() -> float:
        return sum(int(nvml.nvmlDeviceGetPowerUsage(handle)) for handle in handles) / 1e3

    try:
        return CountedEnergy(joules, scale=scale)
    except nvml.NVMLError_NotSupported:  # boards before Volta count no energy
        return IntegratedPower(watts, scale=scale)
