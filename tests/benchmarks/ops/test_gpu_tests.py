"""What is run on a GPU before its timings: breadth first (see test_checks.py), and tests that a GPU can pass at all."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda_on_host.build import build_torch_device

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ is installed")
@pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch is built for CUDA, and takes its own word for devices")
def test_tests_of_the_ops_pass_on_a_device(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; there are no kernels to test")
    library = str(build_torch_device(tmp_path / "device.so"))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.cuda_on_host.ops", library]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.findall(r"(\d+) passed", run.stdout)[0]) > 50
