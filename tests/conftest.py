from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

# Before anything imports Triton, which reads it once: see tests/ops/conftest.py.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--native-library", type=Path, help="another build of the native extension, as one with sanitizers")


def pytest_configure(config: pytest.Config) -> None:
    if (path := config.getoption("--native-library")) is not None:
        from grpo_fast.ops import native

        assert native.load(path) == ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is marked ``gpu`` has sizes or types that Triton's interpreter cannot take; ``vllm`` is another environment."""
    if item.get_closest_marker("vllm") is not None and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed in this environment; `make test-vllm` makes one that has it")
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def shared_data() -> Path:
    """Data beside the checkout, which the project may read but never needs."""
    if not SHARED.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return SHARED
