"""Steps on a CUDA device that is not there: which paths they take, and where the host waits for the device."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_fast import Config, GRPOTrainer
from tests.cuda_on_host.build import build_torch_device

ROOT = Path(__file__).parents[3]
RUNS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {},
    "everything that is measured": {
        "beta": 0.05,
        "entropy_coef": 0.01,
        "num_iterations": 2,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "geometric_truncate",
        "tokens_per_microbatch": 32,
    },
    "selective checkpoints": {"gradient_checkpointing": True, "gradient_checkpointing_mode": "selective"},
    "adapters, checkpoints": {"use_peft": True, "gradient_checkpointing": True},
    "adapters, checkpoints in host memory": {
        "use_peft": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_mode": "offload",
    },
    "short weights, moments in host memory": {"weights_dtype": "bfloat16", "offload_optimizer": True},
    "padded, of a sequence": {"padding_free": False, "loss_type": "gspo"},
    "shared prompts": {"share_prompts": True, "dtype": "float32"},
    "of what top_p keeps": {"top_p": 0.9},
    "one update late": {"max_staleness": 1},
}
OLDER = {"capability": (7, 5)}
LOSS = {"_head_rows_fwd_kernel", "_head_rows_bwd_kernel", "_policy_loss_sum_kernel"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ is installed"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch is built for CUDA, and takes its own word for devices"),
]


def settings(model: Path, output: Path, **changes: Any) -> dict[str, Any]:
    rows = [{"prompt": f"{a}{b}="} for a in "abcdefgh" for b in "abc"]
    data = output.with_suffix(".jsonl")
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {
        "model": str(model),
        "dataset": str(data),
        "reward_funcs": ["tests.cuda_on_host.train:share_of_vowels"],
        "output_dir": str(output),
        "prompts_per_step": 2,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "max_steps": 2,
        "save_steps": 2,
        "reward_workers": 0,
        "eval_size": 2,
        "baseline_probe": 0,
        "sinks": [],
        "forecast": "off",
        "report": False,
    } | changes


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("on_a_gpu")
    given = [settings(tiny_model, directory / str(at), device="cuda", **run) for at, run in enumerate([*RUNS.values(), OLDER])]
    library = build_torch_device(directory / "device.so")
    command = [sys.executable, "-m", "tests.cuda_on_host.train", library, json.dumps(given)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    told = [line for line in done.stderr.splitlines() if "registered at" not in line]  # PyTorch lists all its kernels
    assert done.returncode == 0, "\n".join(told[-60:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def runs(seen: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return dict(zip(RUNS, seen["runs"], strict=False))


def test_the_device_refuses_what_a_gpu_refuses(seen: dict[str, Any]) -> None:
    *told, of_an_older_one = seen["refused"]
    assert told == ["a sum of both", "a change from the host", "numbers of both in one", "an array", "a kernel"]
    assert of_an_older_one.startswith(
        "dtype='bfloat16': NVIDIA H100 80GB HBM3 does not support bfloat16 (that needs compute capability 8.0)"
    )


def test_it_makes_the_run_of_a_cpu(seen: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    with GRPOTrainer(Config.parse(settings(tiny_model, tmp_path / "cpu", dtype="float32", device="cpu"))) as trainer:
        expected = [dict(step.metrics) for step in trainer.steps()]
    for found in (seen["runs"][list(RUNS).index("float32")]["steps"], seen["runs"][-1]["steps"]):
        for name in ("reward", "loss", "grad_norm", "entropy", "sampling/kl"):
            assert [step[name] for step in found] == pytest.approx([step[name] for step in expected], rel=1e-4, abs=1e-7), name
        assert all(step["grad_norm"] > 0 for step in found)


def test_one_without_bfloat16_computes_in_float32_by_the_operations_of_torch(seen: dict[str, Any]) -> None:
    older = seen["runs"][-1]
    assert (older["kernels"], older["varlen"], older["layout"]) == ([], 0, "packed")


@pytest.mark.parametrize("name", RUNS)
def test_its_kernels_make_the_loss(runs: dict[str, dict[str, Any]], name: str) -> None:
    run = runs[name]
    assert len(run["steps"]) == 2
    assert all(step["grad_norm"] > 0 for step in run["steps"])
    kept = name == "of what top_p keeps"  # log-probabilities in there have no kernel
    assert set(run["kernels"]) >= ({"_policy_loss_sum_kernel"} if kept else LOSS)


def test_what_waits_in_host_memory_changes_no_bit(runs: dict[str, dict[str, Any]]) -> None:
    kept, waited = (runs[f"adapters, checkpoints{where}"] for where in ("", " in host memory"))
    assert waited["pinned"] > kept["pinned"] == 0
    for name in ("loss", "grad_norm", "reward"):
        assert [step[name] for step in waited["steps"]] == [step[name] for step in kept["steps"]], name


def test_sequences_are_packed_for_the_attention_kernel_of_sixteen_bits(runs: dict[str, dict[str, Any]]) -> None:
    for name, run in runs.items():
        packed = RUNS[name].get("padding_free", True)
        assert run["layout"] == ("packed" if packed else "padded"), name
        assert (run["varlen"] > 0) == (packed and RUNS[name].get("dtype") != "float32"), name


def test_heads_are_multiplied_in_the_type_of_the_run_and_attention_makes_no_plans(runs: dict[str, dict[str, Any]]) -> None:
    for name, run in runs.items():
        assert run["operands"] == ("None" if RUNS[name].get("dtype") == "float32" else "torch.bfloat16"), name
        assert not run["cudnn"], name


def test_what_is_updated_in_host_memory_lies_there_together(runs: dict[str, dict[str, Any]]) -> None:
    assert runs["short weights, moments in host memory"]["pinned"] == 1


def test_selective_checkpoints_compute_no_attention_again(runs: dict[str, dict[str, Any]]) -> None:
    plain, selective, full = (runs[name]["varlen"] for name in ("bfloat16", "selective checkpoints", "adapters, checkpoints"))
    assert selective == plain < full


@pytest.mark.parametrize("name", RUNS)
def test_between_micro_batches_nothing_waits_for_the_device(runs: dict[str, dict[str, Any]], name: str) -> None:
    """It would be without work until the host has launched more. What a step learns from is copied there beforehand."""
    told = runs[name]["waits"][-1]
    waits = [place.partition("/update/")[2] for place in told if "/update/" in place and "/build_batch/" not in place]
    if name == "of what top_p keeps":  # the host looks up which tokens were kept by any
        waits = [place for place in waits if "/kept_logprob/" not in place]
    if name == "padded, of a sequence":  # transformers asks whether anything is padded
        waits = [place for place in waits if "/_hidden_states/" not in place]
    assert sorted(waits) == ["_iterate/_apply_gradient/aten._local_scalar_dense.default", "compute/gather/_held/tolist"]
