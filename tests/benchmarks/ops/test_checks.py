"""The tests that precede a GPU's timings: what failed and why, the most telling first, and an end when time is up."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ops import checks

CONFTEST = """
import pytest

@pytest.fixture(scope="session")
def device():
    return "cpu"

def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: real sizes")
    config.addinivalue_line("markers", "slow: left out")
"""


def run(root: Path, tests: str, *, limit_s: float = 60.0, **options: Any) -> dict[str, Any]:
    folder = root / "tests" / "ops"
    folder.mkdir(parents=True)
    (folder / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    (folder / "test_a.py").write_text(tests, encoding="utf-8")
    return checks.run_gpu_tests(limit_s, root=root, **options)


def test_counts_names_and_reasons(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        "import pytest\n"
        "def test_right(device): pass\n"
        "def test_wrong(device): raise ValueError('float32\\nand more')\n"
        "def test_skipped(device): pytest.skip('no room')\n"
        "@pytest.fixture\n"
        "def broken(device): raise RuntimeError('illegal access')\n"
        "def test_set_up(broken): pass\n",
    )
    assert found["summary"] == "2 failed, 1 passed, 1 skipped, of 4"
    assert found["failed"] == [
        "tests/ops/test_a.py::test_wrong: ValueError: float32",
        "tests/ops/test_a.py::test_set_up: RuntimeError: illegal access",
    ]


def test_every_function_has_its_turn_before_any_has_another(tmp_path: Path) -> None:
    run(
        tmp_path,
        "import pytest\n"
        "from pathlib import Path\n"
        "def note(name): Path('order').open('a').write(name + ' ')\n"
        "both = pytest.mark.parametrize('n', [1, 2])\n"
        "@both\ndef test_one(device, n): note(f'one{n}')\n"
        "@both\ndef test_other(device, n): note(f'other{n}')\n"
        "@pytest.mark.gpu\n@both\ndef test_real(n): note(f'real{n}')\n"
        "@pytest.mark.slow\ndef test_slow(device): note('slow')\n"
        "def test_of_any_cpu(): note('cpu')\n",
    )
    assert (tmp_path / "order").read_text(encoding="utf-8").split() == ["real1", "one1", "other1", "real2", "one2", "other2"]


def test_what_failed_is_told_though_time_is_up(tmp_path: Path) -> None:
    signs: list[None] = []
    found = run(
        tmp_path,
        "import time\n"
        "def test_wrong(device): assert 1 == 2\n"
        "def test_long(device): time.sleep(60)\n"
        "def test_never(device): pass\n",
        limit_s=8.0,
        alive=lambda: signs.append(None),
    )
    assert found["summary"] == "1 failed, of 3, stopped after 8 s in tests/ops/test_a.py::test_long"
    assert found["failed"] == ["tests/ops/test_a.py::test_wrong: assert 1 == 2"]
    assert (found["ran"], found["total"]) == (1, 3)
    assert len(signs) >= 8


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ("import os\ndef test_dies(device): os._exit(9)", r"tests/ops/test_a.py::test_dies: the tests ended with 9: .*"),
        ("import nothing_of_that_name", r"tests/ops/test_a.py: E *ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("", r"pytest: the tests ended with 5: no tests .*"),
    ],
    ids=["a process that dies", "a file that is not importable", "no tests"],
)
def test_tests_that_cannot_run_are_a_failure(tests: str, reason: str, tmp_path: Path) -> None:
    found = run(tmp_path, tests)
    assert any(re.fullmatch(reason, failed) for failed in found["failed"]), found


def test_no_time_for_any_test_is_a_failure(tmp_path: Path) -> None:
    assert run(tmp_path, "def test_right(device): pass", limit_s=0.01)["failed"] == ["pytest: no test was through after 0 s"]


def test_without_pytest_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    assert checks.run_gpu_tests(1.0)["summary"] == "not run: pytest is not installed"
