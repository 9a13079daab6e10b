from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Before anything imports Triton, which reads it once: see tests/ops/conftest.py.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """Data beside the checkout, which the project may read but never needs."""
    if not SHARED.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return SHARED
