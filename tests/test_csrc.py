"""The native extension as a whole: device code compiles without spills, wheel and sdist hold what they should."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("80", "90a", "100")
KERNELS = {"weight_pack": 3, "weight_delta": 10}
"""Kernels of each device file, instances of templates counted singly."""
ON_HOST = ROOT / "tests" / "cuda_on_host"
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ is installed")


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env=os.environ | environment, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def kernel_facts(text: str) -> tuple[str, str, int, int, int, int, int]:
    """Mangled name, architecture, then bytes of stack, of spill stores and loads, registers and bytes of shared memory."""

    def figure(pattern: str) -> int:
        found = re.search(pattern, text)
        return int(found[1]) if found else 0

    names = re.match(r" '(\w+)' for 'sm_(\w+)'", text)
    assert names is not None, text
    assert "bytes stack frame" in text
    spills = figure(r"(\d+) bytes spill stores"), figure(r"(\d+) bytes spill loads")
    registers, shared = figure(r"Used (\d+) registers"), figure(r"(\d+) bytes smem")
    return names[1], names[2], figure(r"(\d+) bytes stack frame"), *spills, registers, shared


def test_every_device_file_is_compiled_here() -> None:
    assert {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")} == set(KERNELS)
    for source in (ROOT / "csrc").rglob("*.cuh"):
        assert "torch/" not in source.read_text(encoding="utf-8"), f"{source.name} is for plain pointers"


@pytest.mark.slow
@pytest.mark.parametrize("source", KERNELS)
def test_device_code_compiles_without_spills(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed, so device code is not compiled")
    include = Path(torch.__path__[0]) / "include"
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    flags = ["-c", "-O3", "-std=c++20", "--fmad=false", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]
    output = tmp_path / "out.o"
    code = ROOT / "csrc" / "cuda" / f"{source}.cu"
    said = run(nvcc, *flags, "-Xptxas=-v", "--threads=2", f"-I{include}", *targets, code, "-o", output)
    found = [kernel_facts(text) for text in said.split("Compiling entry function")[1:]]
    assert sorted(arch for _, arch, *_ in found) == sorted(KERNELS[source] * list(ARCHITECTURES))
    with capsys.disabled():
        print(f"\n{'kernel':26} {'arch':5} registers shared stack spills")
        for kernel, arch, stack, stores, loads, registers, shared in found:
            name = re.sub(r"^_ZN9grpo_fast\d+|EEv.*|ENS_.*|EP.*", "", kernel)
            print(f"{name:26} {arch:5} {registers:>9} {shared:>6} {stack:>5} {stores + loads:>6}")
    for kernel, arch, stack, stores, loads, registers, _ in found:
        assert stack == stores == loads == 0, f"{kernel} spills on sm_{arch}"
        assert 0 < registers <= 128


@pytest.mark.slow
def test_the_sdist_holds_all_that_a_build_needs(tmp_path: Path) -> None:
    run(sys.executable, "-c", "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])", tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.split("/", 1)[1] for name in content.getnames() if "/" in name}
    wanted = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert {str(path.relative_to(ROOT)) for path in wanted} <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "grpo_fast/ops/native.py"} <= names
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.slow
@pytest.mark.parametrize("build", ["none", "cpu"])
def test_a_wheel_imports_apart_from_the_checkout(build: str, tmp_path: Path) -> None:
    """Unpacked into an empty folder and imported from there, with torch and the rest from this environment."""
    if build == "cpu" and shutil.which("c++") is None:
        pytest.skip("no C++ compiler is installed")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("csrc", "grpo_fast"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, checkout)
    code = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    run(sys.executable, "-c", code, tmp_path, cwd=checkout, GRPO_FAST_BUILD=build)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.search(r"-py3-none-any\.whl$" if build == "none" else r"-cp311-abi3-linux_\w+\.whl$", wheel.name)
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as content:
        content.extractall(site)
    asked = "from grpo_fast.ops import native, pack_sequences; print(native.__file__); print(native.status())"
    asked += "; print(pack_sequences([3, 2, 1], 3).bins())"
    said = run(sys.executable, "-c", asked, cwd=tmp_path, PYTHONPATH=str(site)).splitlines()
    assert said[0].startswith(str(site))
    assert said[1].startswith("built: " if build == "cpu" else "missing: ")
    assert said[2] == "[[0], [1, 2]]"


@pytest.mark.slow
@needs_gxx
def test_device_code_gives_the_references_bits_on_the_host(tmp_path: Path) -> None:
    """What CI can run of it without a device: the ops' own tests, over kernels whose threads are fibers."""
    library = tmp_path / "on_host.so"
    run(sys.executable, ON_HOST / "build.py", library)
    # Rows of one element each take a block for every eight, which is slow here.
    tests = ("tests/ops/test_weight_pack.py", "tests/ops/test_weight_delta.py", "--deselect")
    tests += ("tests/ops/test_weight_pack.py::test_every_rounding_is_the_references",)
    said = run(sys.executable, "-m", "pytest", "-q", "--native-library", library, "-m", "not slow and not gpu", *tests)
    found = re.search(r"(\d+) passed", said)
    assert found is not None
    assert int(found[1]) >= 50
    assert "skipped" not in said


@pytest.mark.slow
@needs_gxx
@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_device_code_on_the_host_is_clean_under_sanitizers(sanitizers: str, tmp_path: Path) -> None:
    flags = ["-std=c++20", "-O1", "-g1", "-w", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    headers = [f"-I{ON_HOST}", f"-I{ROOT / 'csrc' / 'cuda'}"]
    run("g++", *flags, *headers, ON_HOST / "kernels.cpp", "-o", tmp_path / "kernels")
    run(tmp_path / "kernels")
    if sanitizers == "thread":
        racing = subprocess.run([tmp_path / "kernels", "race"], capture_output=True, text=True, check=False)
        assert racing.returncode != 0
        assert "data race" in racing.stderr
        assert "neighbours_without_a_barrier" in racing.stderr


def test_an_unknown_build_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | {"GRPO_FAST_BUILD": "gpu"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "GRPO_FAST_BUILD='gpu'; choose one of none, cpu, cuda" in done.stderr


@pytest.mark.gpu
@pytest.mark.slow
def test_device_code_is_clean_under_compute_sanitizer() -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    tests = ("tests/ops/test_weight_pack.py", "tests/ops/test_weight_delta.py")
    run(sanitizer, "--error-exitcode=9", sys.executable, "-m", "pytest", "-q", "-m", "gpu", *tests)
