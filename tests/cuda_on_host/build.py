"""Builds for the host what is made for CUDA.

    python tests/cuda_on_host/build.py LIBRARY

builds the device code of ``csrc/cuda``: the extension's ops then run its kernels on tensors in host memory, and ``pytest
--native-library LIBRARY`` runs with it. Three things in the sources change: a launch's chevrons become a call, the ops
are registered for the CPU, and no device is chosen. What else they need of CUDA stands in ``cuda_runtime.h``.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
_SOURCES = ("bindings.cpp", "cpu/packing.cpp")
_FLAGS = ("-O1", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-unknown-pragmas")
_TORCH_2_11 = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"


def translate(source: str) -> str:
    """Source text of CUDA as one of C++."""
    source, launches = re.subn(r"(\w+(?:<\w+>)?)<<<(.+?)>>>\(", r"cuda_on_host::launch(\1, \2)(", source, flags=re.DOTALL)
    source, ops = re.subn(r"\bSTABLE_TORCH_LIBRARY_IMPL\(grpo_fast, CUDA,", "STABLE_TORCH_LIBRARY_IMPL(grpo_fast, CPU,", source)
    assert launches > 0, "no kernel is launched"
    assert ops == 1, "no ops are registered"
    return source.replace("torch::stable::accelerator::DeviceGuard", "cuda_on_host::DeviceGuard")


def _compile(library: Path, *arguments: str | Path) -> None:
    headers = [f"-I{path}" for path in include_paths()]
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", "-shared", "-std=c++20", "-fPIC", *arguments, *headers, *libraries, "-o", library], check=True)


def build_torch_device(library: Path) -> Path:
    """What :mod:`tests.cuda_on_host.torch_device` loads before PyTorch, whose libraries it finds by itself."""
    _compile(library, HERE / "torch_device.cpp", *(f"-Wl,-rpath,{path}" for path in library_paths()))
    return library


def build(library: Path) -> None:
    """Compiles and links the extension's device code."""
    with tempfile.TemporaryDirectory() as scratch:
        sources, translated = [CSRC / name for name in _SOURCES], Path(scratch) / "cuda"
        translated.mkdir()
        for path in sorted((CSRC / "cuda").glob("*.cu")):
            sources.append(translated / f"{path.stem}.cpp")
            sources[-1].write_text(f'#line 1 "{path}"\n{translate(path.read_text(encoding="utf-8"))}', encoding="utf-8")
        _compile(library, *_FLAGS, _TORCH_2_11, f"-I{HERE}", f"-I{CSRC / 'cuda'}", *sources)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
