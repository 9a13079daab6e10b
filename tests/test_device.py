from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grpo_fast import device
from grpo_fast.device import (
    GPU_TABLE,
    CountedEnergy,
    EstimatedEnergy,
    IntegratedPower,
    device_facts,
    energy_source,
    gpu_spec,
    package_version,
    similar_gpus,
    versions,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch can use no GPU here")


def test_cpu_facts_are_those_of_this_machine() -> None:
    facts = device_facts("cpu")
    assert facts.kind == "cpu"
    assert facts.num_cores == len(os.sched_getaffinity(0))
    assert facts.arch == platform.machine()
    assert facts.name
    assert 2**28 < facts.memory_bytes < 2**46
    assert facts.peak_bf16_flops is None
    assert facts.power_watts == pytest.approx(3.5 * facts.num_cores)
    assert device_facts("cpu") is facts, "facts are read once"


def test_facts_are_json() -> None:
    facts = device_facts()
    assert json.loads(json.dumps(facts.as_dict())) == dataclasses.asdict(facts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
def test_a_missing_gpu_is_an_error_only_when_asked_for() -> None:
    assert device_facts("auto").kind == "cpu"
    with pytest.raises(ValueError, match="device 'cuda' was asked for"):
        device_facts("cuda")


@pytest.mark.gpu
@needs_gpu
def test_gpu_facts_are_those_of_this_machine() -> None:
    facts = device_facts("cuda")
    major, minor = torch.cuda.get_device_capability(0)
    assert facts.arch == f"sm_{major}{minor}"
    assert facts.num_cores == torch.cuda.get_device_properties(0).multi_processor_count
    assert facts.num_devices == torch.cuda.device_count()
    spec = gpu_spec(facts.name)
    assert facts.peak_bytes_per_s == (spec.gb_per_s * 1e9 if spec else None)


@pytest.mark.gpu
@needs_gpu
def test_nvml_counts_energy_under_load() -> None:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    source = energy_source(device_facts("cuda"))
    assert source.name.startswith("nvml")
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(200):
        x = torch.nn.functional.normalize(x @ x)
    torch.cuda.synchronize()
    assert source.read(1.0) > 0


@pytest.mark.parametrize(
    ("name", "tflops", "gb_per_s"),
    [
        ("NVIDIA H200", 989.4, 4800),
        ("NVIDIA H100 80GB HBM3", 989.4, 3350),
        ("NVIDIA H100 PCIe", 756.5, 2000),
        ("NVIDIA A100-SXM4-40GB", 312, 1555),
        ("NVIDIA A100-SXM4-80GB", 312, 2039),
        ("NVIDIA A100 80GB PCIe", 312, 1935),
        ("NVIDIA B200", 2250, 8000),
        ("NVIDIA L4", 121, 300),
        ("NVIDIA L40", 181.05, 864),
        ("NVIDIA L40S", 362.05, 864),
        ("NVIDIA A10", 125, 600),
        ("Tesla T4", None, 320),
        ("Tesla V100-SXM2-16GB", None, 900),
        ("NVIDIA GeForce RTX 3060", 25.5, 360),
        ("NVIDIA GeForce RTX 4060", 30.2, 272),
        ("NVIDIA GeForce RTX 2080 Ti", None, 616),
        ("rtx 3070 ti", 43.5, 608),
        ("NVIDIA GeForce RTX 3090", 71, 936),
        ("NVIDIA GeForce RTX 4090", 165.2, 1008),
        ("NVIDIA GeForce RTX 5090", 209.5, 1792),
    ],
)
def test_boards_are_found_by_their_cuda_names(name: str, tflops: float | None, gb_per_s: float) -> None:
    spec = gpu_spec(name)
    assert spec is not None
    assert (spec.bf16_tflops, spec.gb_per_s) == (tflops, gb_per_s)


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA H200 MIG 1g.18gb", "AMD Instinct MI300X", ""],
)
def test_slower_namesakes_and_strangers_get_no_peak(name: str) -> None:
    assert gpu_spec(name) is None


def test_the_name_of_a_row_is_one_that_it_matches() -> None:
    for row in GPU_TABLE:
        assert gpu_spec(row.name) is row, row.name


@pytest.mark.parametrize(
    ("name", "similar"),
    [
        ("A100", ["A100-SXM4-80GB", "A100-SXM4-40GB", "A100 80GB PCIe", "A100-PCIE-40GB"]),
        ("NVIDIA h100", ["H100 80GB HBM3", "H100 PCIe", "H100 NVL"]),
        ("4080", ["RTX 4080 SUPER", "RTX 4080"]),
        ("RTX4090", ["RTX 4090"]),
        ("RTX 4060 Laptop", []),
        ("", []),
    ],
)
def test_names_that_were_meant(name: str, similar: list[str]) -> None:
    assert gpu_spec(name) is None
    found = similar_gpus(name)
    assert found[: len(similar)] == similar
    assert bool(found) == bool(similar)


def test_gpu_facts_follow_from_its_properties() -> None:
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=150_000_000_000)
    facts = device._gpu_facts(properties, 8, "13.0")
    assert (facts.kind, facts.arch, facts.num_devices, facts.num_cores) == ("cuda", "sm_90", 8, 132)
    assert (facts.peak_bf16_flops, facts.peak_bytes_per_s, facts.power_watts) == (pytest.approx(989.4e12), 4.8e12, 700)
    assert facts.has_bfloat16
    older = device._gpu_facts(SimpleNamespace(**vars(properties) | {"major": 7, "minor": 5}), 1, None)
    assert not older.has_bfloat16
    assert not device_facts("cpu").has_bfloat16
    properties.name = "Unheard-of Board"
    facts = device._gpu_facts(properties, 1, None)
    assert (facts.peak_bf16_flops, facts.peak_bytes_per_s, facts.power_watts) == (None, None, 350)


def test_the_table_is_plausible() -> None:
    assert len({row.pattern for row in GPU_TABLE}) == len(GPU_TABLE)
    for row in GPU_TABLE:
        assert row.bf16_tflops is None or 20 <= row.bf16_tflops <= 5000
        assert 200 <= row.gb_per_s <= 10_000
        assert 50 <= row.watts <= 1500
        # A board's balance point lies between 50 and 400 FLOP a byte; a factor of two from sparsity would leave it.
        assert row.bf16_tflops is None or 30 <= row.bf16_tflops * 1e3 / row.gb_per_s <= 450


def test_versions_are_those_installed_and_json() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # builds for CUDA are named without it
    assert None not in found.values()
    assert package_version("no-such-distribution") is None
    assert json.loads(json.dumps(found)) == found


def test_this_package_has_a_version_where_only_its_tree_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    installed = package_version("grpo-fast")
    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    assert package_version("grpo-fast") == versions()["grpo-fast"] == installed
    assert package_version("torch") is None


def test_versions_import_nothing_heavy(imported_by: Callable[[str], set[str]]) -> None:
    found = imported_by("from grpo_fast.device import versions; versions()")
    assert not {"torch", "transformers", "trl", "peft", "vllm"} & found


def test_cpu_names_of_other_machines(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Fast Chip 9000\nflags\t: a b\n", encoding="utf-8")
    assert device._cpu_name(cpuinfo) == "Fast Chip 9000"
    cpuinfo.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n", encoding="utf-8")
    assert device._cpu_name(cpuinfo)
    assert device._cpu_name(tmp_path / "missing")


def test_memory_respects_the_container(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    whole = device._memory_bytes(limit)
    limit.write_text("max\n", encoding="ascii")
    assert device._memory_bytes(limit) == whole
    limit.write_text("1048576\n", encoding="ascii")
    assert device._memory_bytes(limit) == 1048576


def test_energy_of_a_cpu_is_flagged_estimated() -> None:
    facts = device_facts("cpu")
    source = energy_source(facts)
    assert source.name == "estimated"
    assert source.read(10.0) == pytest.approx(10 * facts.power_watts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here, so NVML can be read")
def test_a_gpu_that_nvml_cannot_read_is_estimated_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    facts = dataclasses.replace(device_facts("cpu"), kind="cuda", power_watts=700.0)
    with caplog.at_level(logging.WARNING):
        source = energy_source(facts)
    assert isinstance(source, EstimatedEnergy)
    assert source.read(2.0) == 1400.0
    assert "NVML cannot be read" in caplog.text


def test_without_nvidia_ml_py_a_gpu_is_estimated_and_said_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    facts = dataclasses.replace(device_facts("cpu"), kind="cuda", power_watts=700.0)
    with caplog.at_level(logging.WARNING):
        assert energy_source(facts).name == "estimated"
    assert "pip install nvidia-ml-py" in caplog.text


def test_counters_are_read_as_differences() -> None:
    readings: Iterator[float] = iter([1000.0, 1030.0, 1030.0, 1100.0])
    source = CountedEnergy(lambda: next(readings), scale=2.0)
    assert [source.read(1.0), source.read(1.0), source.read(1.0)] == [60.0, 0.0, 140.0]
    assert source.name == "nvml"


def test_power_is_integrated_over_its_own_clock() -> None:
    watts, times = iter([100.0, 300.0, 300.0]), iter([0.0, 2.0, 5.0])
    source = IntegratedPower(lambda: next(watts), scale=2.0, clock=lambda: next(times))
    assert [source.read(99.0), source.read(99.0)] == [2 * 400.0, 2 * 900.0]
    assert source.name == "nvml-power"
