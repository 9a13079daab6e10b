from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

import grpo_fast


def test_importing_the_library_costs_nothing() -> None:
    code = (
        "import sys, grpo_fast; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_there_are_about_ten_names() -> None:
    assert 8 <= len(grpo_fast.__all__) <= 13
    assert sorted(grpo_fast.__all__) == sorted(set(grpo_fast.__all__))
    assert set(dir(grpo_fast)) == set(grpo_fast.__all__)


@pytest.mark.parametrize("name", grpo_fast.__all__)
def test_every_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(grpo_fast, name)
    assert getattr(grpo_fast, name) is value
    if name != "__version__":
        assert value.__name__ == name
        assert value.__doc__
        assert value.__module__.startswith("grpo_fast.")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'grpo_fast' has no attribute 'Trainer'"):
        _ = grpo_fast.Trainer
    assert not hasattr(grpo_fast, "nothing")


def test_version_is_that_of_the_package() -> None:
    assert grpo_fast.__version__ == importlib.metadata.version("grpo-fast")
