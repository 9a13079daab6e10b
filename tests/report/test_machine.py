from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from grpo_fast.ops import native
from grpo_fast.report import machine as machine_module
from grpo_fast.report.machine import FEATURES, read_machine


def test_this_machine_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub" / "models--a--b").mkdir(parents=True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    machine = read_machine(tmp_path)
    assert machine.versions["torch"] == metadata.version("torch")
    assert machine.required["torch"].contains("2.13.0")
    assert "hypothesis" not in machine.required
    assert (machine.import_errors, machine.device_error) == ({}, "")
    assert (machine.hub_models, machine.hub_datasets, machine.hub_offline) == (1, 0, True)
    assert machine.hub_unwritable == ""
    assert machine.memory_free_bytes > 0
    assert machine.native == native.status()


def test_a_hub_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    assert read_machine(tmp_path).hub_unwritable == f"{tmp_path / 'cache'} is a file"


def test_the_extras_are_those_of_the_package() -> None:
    path = Path(__file__).parents[2] / "pyproject.toml"
    declared = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for feature in FEATURES:
        packages = {line.split(">=")[0] for line in declared[feature.extra]}
        assert packages == set(feature.packages)


def test_packages_that_do_not_import_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("raise OSError('libfoo.so: no such file')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert machine_module._import_error("broken-package") == "OSError: libfoo.so: no such file"
    assert machine_module._import_error("torch") == ""


def test_conflicts_are_read_from_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "vllm-0.28.0.dist-info"
    info.mkdir()
    requires = "Requires-Dist: torch==2.12.0\nRequires-Dist: transformers>=4\nRequires-Dist: torch<1; extra == 'old'\n"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: 0.28.0\n{requires}", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    versions = {"vllm": "0.28.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"}
    assert machine_module._conflicts(versions) == ("vllm 0.28.0 needs torch==2.12.0, not 2.13.0+cpu",)


def test_memory_is_unknown_where_the_kernel_does_not_say(tmp_path: Path) -> None:
    assert machine_module._memory_free_bytes(tmp_path / "meminfo") == 0
