from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from grpo_fast.assets import embedded_model_dir
from grpo_fast.rollout import RolloutError, shared_memory, vllm_engine, vllm_server
from grpo_fast.rollout.vllm_environment import NO_WORKER, held_port
from grpo_fast.rollout.vllm_server import server_command

MODEL = str(embedded_model_dir())


@pytest.mark.vllm
def test_the_server_listens_on_the_loopback_interface_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    command = server_command(MODEL, port=8123, on_cpu=True, max_model_len=64)
    options = dict(zip(command.arguments[3::2], command.arguments[4::2], strict=False))
    assert (options["--host"], options["--port"], options["--model"]) == ("127.0.0.1", "8123", MODEL)
    assert json.loads(options["--weight-transfer-config"]) == {"backend": "grpo_fast_shm"}
    assert {"--dtype", "float32", "--block-size", "--max-model-len", "64"} <= set(command.arguments)
    assert command.environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert command.environment["VLLM_API_KEY"] == "secret"
    assert "secret" not in repr(command)


@pytest.mark.vllm
def test_on_a_gpu_it_computes_as_the_trainer_does() -> None:
    arguments = server_command(MODEL, port=1, on_cpu=False).arguments
    assert arguments[arguments.index("--dtype") + 1] == "bfloat16"
    assert "--enforce-eager" not in arguments


@pytest.mark.vllm
def test_it_can_sleep_on_a_gpu_where_it_is_told_to() -> None:
    assert "--enable-sleep-mode" in server_command(MODEL, port=1, on_cpu=False, enable_sleep_mode=True).arguments
    assert "--enable-sleep-mode" not in server_command(MODEL, port=1, on_cpu=False).arguments
    with pytest.raises(ValueError, match="vLLM sleeps on GPUs only"):
        server_command(MODEL, port=1, on_cpu=True, enable_sleep_mode=True)


@pytest.mark.vllm
def test_it_takes_adapters_where_it_is_told_to() -> None:
    command = server_command(MODEL, port=1, on_cpu=True, max_lora_rank=12)
    arguments = command.arguments
    assert "--enable-lora" in arguments
    assert arguments[arguments.index("--max-lora-rank") + 1] == "16"
    first = arguments.index("--lora-target-modules") + 1
    assert arguments[first : first + 7] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert command.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    plain = server_command(MODEL, port=1, on_cpu=True)
    assert "--enable-lora" not in plain.arguments
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in plain.environment


@pytest.mark.vllm
@pytest.mark.parametrize("port", [0, 65536, -1])
def test_a_port_out_of_range_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match=f"port must lie in 1 to 65535, got {port}"):
        server_command(MODEL, port=port, on_cpu=True)


@pytest.mark.vllm
def test_a_port_that_is_taken_is_refused_and_one_that_is_held_for_the_server_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} is taken, by another server perhaps; choose another with --port"):
            server_command(MODEL, port=port, on_cpu=True)
    with held_port() as port:
        assert str(port) in server_command(MODEL, port=port, on_cpu=True).arguments


@pytest.mark.vllm
def test_a_model_that_cannot_be_found_is_refused_before_vllm_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix = "Give a directory with config.json and tokenizer, or a hub id that this machine can reach"
    with pytest.raises(ValueError, match=f"cannot serve model '{tmp_path}': .*{fix}"):
        server_command(str(tmp_path), port=1, on_cpu=True)
    monkeypatch.setattr(vllm_server, "out_of_reach", lambda: "the hub cannot be reached (no route)")
    with pytest.raises(ValueError, match=rf"cannot serve model 'no/such': the hub .*\(no route\), and no copy .*cache\. {fix}"):
        server_command("no/such", port=1, on_cpu=True)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}', encoding="utf-8")
    with pytest.raises(ValueError, match=f"cannot serve model '{tmp_path}': .*no_such_type.*{fix}"):
        server_command(str(tmp_path), port=1, on_cpu=True)


@pytest.mark.vllm
def test_too_little_shared_memory_is_told_before_vllm_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "room", lambda place: 2**19)
    with pytest.raises(OSError, match=r"no room for vLLM's locks: 1\.0 MiB are needed, 0\.5 are left; give"):
        server_command(MODEL, port=1, on_cpu=True)


@pytest.mark.vllm
def test_vllm_has_a_worker_where_its_threads_are_to_be_bound_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    binding = "VLLM_CPU_OMP_THREADS_BIND"
    monkeypatch.delenv(binding, raising=False)
    alone = server_command(MODEL, port=1, on_cpu=True)
    assert (NO_WORKER in alone.arguments, alone.environment[binding]) == (True, "nobind")
    monkeypatch.setenv(binding, "0-1")
    bound = server_command(MODEL, port=1, on_cpu=True)
    assert (NO_WORKER in bound.arguments, bound.environment[binding]) == (False, "0-1")
    assert NO_WORKER not in server_command(MODEL, port=1, on_cpu=False).arguments, "on a GPU it is vLLM's own choice"


@pytest.mark.vllm
def test_without_a_network_vllm_reads_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123", encoding="utf-8")
    shutil.copytree(MODEL, cached / "snapshots" / "0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(vllm_server, "out_of_reach", lambda: "the hub cannot be reached (no route)")
    assert server_command("some/model", port=1, on_cpu=True).environment["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in server_command(MODEL, port=1, on_cpu=True).environment


def test_a_missing_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine.util, "find_spec", lambda name: None)
    with pytest.raises(RolloutError, match="vLLM is not installed"):
        server_command(MODEL, port=8000, on_cpu=True)
