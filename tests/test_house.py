"""The house keeps its own rules: tests mirror modules, files stay readable, the README tells the truth."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "grpo_fast"
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
WITHOUT_OWN_TEST = {
    "types.py": "plain data, used by every test",
}
MAX_LINES = 450


def own_test(module: Path) -> Path:
    """A file, or a folder of the module's name with several."""
    folder = ROOT / "tests" / module.with_suffix("")
    return folder if folder.is_dir() else folder.with_name(f"test_{module.name}")


@pytest.mark.parametrize("module", [m for m in MODULES if m.name != "__init__.py"], ids=str)
def test_every_module_has_its_test(module: Path) -> None:
    if str(module) in WITHOUT_OWN_TEST:
        assert not own_test(module).exists(), f"{module} has a test now: take it off the list"
    else:
        assert own_test(module).exists(), f"{module} needs {own_test(module).relative_to(ROOT)}"


def test_every_test_belongs_to_a_module() -> None:
    house = {"test_csrc.py", "test_docs.py", "test_house.py", "test_library.py", "test_readme.py"}
    for test in (ROOT / "tests").rglob("test_*.py"):
        relative = test.relative_to(ROOT / "tests")
        if str(relative) in house or relative.parts[0] == "benchmarks":
            continue
        name = relative.name.removeprefix("test_").removesuffix(".py")
        module, package = PACKAGE / relative.parent / f"{name}.py", PACKAGE / relative.parent / name
        part_of = (PACKAGE / relative.parent).with_suffix(".py")
        assert module.exists() or package.is_dir() or part_of.exists(), f"{relative} mirrors no module"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_files_stay_readable(module: Path) -> None:
    assert len((PACKAGE / module).read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_no_file_names_a_machine() -> None:
    private = re.compile(r"(?<![\w.$}])/(work|farm|home|root|opt|tmp/v|mnt)/|/[.]library")
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *ROOT.glob("*.md"), ROOT / "Makefile"]:
        if path.name != Path(__file__).name:
            assert not private.search(path.read_text(encoding="utf-8")), path


def test_what_make_runs_keeps_bytecode_where_the_environment_wants_none() -> None:
    make = ["make", "--silent", "--eval", 'told:; @echo "[$$PYTHONDONTWRITEBYTECODE]"', "told"]
    told = subprocess.run(
        make, cwd=ROOT, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == "[]"


def test_constraints_pin_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {
        re.split(r"==", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints" / "cpu.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    extras = [
        name
        for extra in ("dev", "bench", "lora", "quant", "trl", "reasoning-gym")
        for name in project["optional-dependencies"][extra]
    ]
    for requirement in [*project["dependencies"], *extras]:
        name = re.split(r"[<>=\[; ]", requirement)[0].lower()
        assert name in pinned, f"{name} is asked for in pyproject.toml and not pinned in constraints/cpu.txt"
