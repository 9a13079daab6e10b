from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import psutil
import pytest
import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from grpo_fast.assets import embedded_model_dir
from grpo_fast.mistakes import SET_BY_SERVE
from grpo_fast.rollout import RolloutError, SamplingParams, shared_memory, vllm_environment, vllm_server
from grpo_fast.rollout.vllm_engine import VLLMServerEngine, VLLMSettings
from grpo_fast.rollout.vllm_environment import NO_WORKER, held_port
from grpo_fast.rollout.vllm_server import ServerCommand, become, server_command

MODEL = str(embedded_model_dir())
PROMPTS = [[1] + [3 + (7 * position) % 50 for position in range(75)], [1, 4, 5, 6]]
SAMPLING = SamplingParams(max_tokens=3, temperature=0.7)  # on two cores three processes that spin take long over each


@pytest.mark.vllm
def test_the_server_listens_on_the_loopback_interface_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    command = server_command(MODEL, port=8123, on_cpu=True, max_model_len=64)
    options = dict(zip(command.arguments[3::2], command.arguments[4::2], strict=False))
    assert (options["--host"], options["--port"], options["--model"]) == ("127.0.0.1", "8123", MODEL)
    assert json.loads(options["--weight-transfer-config"]) == {"backend": "grpo_fast_shm"}
    assert {"--dtype", "float32", "--block-size", "--max-model-len", "64"} <= set(command.arguments)
    assert command.environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert command.environment["GRPO_FAST_VLLM_OWNER"] == str(os.getpid()), "whose place the server takes"
    assert command.environment["VLLM_API_KEY"] == "secret"
    assert "secret" not in repr(command)


@pytest.mark.vllm
def test_a_length_beyond_the_models_context_is_refused_before_vllm_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = AutoConfig.from_pretrained(MODEL).max_position_embeddings
    assert str(context) in server_command(MODEL, port=1, on_cpu=True, max_model_len=context).arguments
    with pytest.raises(ValueError, match=f"max_model_len={context + 1} is more than the model's context of {context} tokens"):
        server_command(MODEL, port=1, on_cpu=True, max_model_len=context + 1)
    scaling = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": context}
    LlamaConfig(vocab_size=64, max_position_embeddings=context, rope_parameters=scaling).save_pretrained(tmp_path)
    server_command(str(tmp_path), port=1, on_cpu=True, max_model_len=context + 1)
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    server_command(MODEL, port=1, on_cpu=True, max_model_len=context + 1)


@pytest.mark.vllm
def test_on_a_gpu_it_computes_as_the_trainer_does() -> None:
    arguments = server_command(MODEL, port=1, on_cpu=False).arguments
    assert arguments[arguments.index("--dtype") + 1] == "bfloat16"
    assert "--enforce-eager" not in arguments


@pytest.mark.vllm
def test_in_float32_triton_multiplies_whole_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    command = server_command(MODEL, port=1, on_cpu=False, dtype="float32")
    assert command.environment["TRITON_F32_DEFAULT"] == "ieee"
    assert "TRITON_F32_DEFAULT" not in server_command(MODEL, port=1, on_cpu=False).environment
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32x3")
    command = server_command(MODEL, port=1, on_cpu=False, dtype="float32")
    assert command.environment["TRITON_F32_DEFAULT"] == "tf32x3"


@pytest.mark.vllm
def test_it_can_sleep_on_a_gpu_where_it_is_told_to() -> None:
    assert "--enable-sleep-mode" in server_command(MODEL, port=1, on_cpu=False, enable_sleep_mode=True).arguments
    assert "--enable-sleep-mode" not in server_command(MODEL, port=1, on_cpu=False).arguments
    with pytest.raises(ValueError, match="sleep mode works on GPUs only"):
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
        with pytest.raises(ValueError, match=f"port {port} is in use, perhaps by another server; choose another with --port"):
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
def test_options_of_vllms_own_go_to_it_and_workers_take_the_place_of_none() -> None:
    options = ["--tensor-parallel-size", "2", "--kv-cache-dtype=auto"]
    arguments = server_command(MODEL, port=1, on_cpu=True, vllm_options=options).arguments
    assert arguments[-3:] == options
    assert NO_WORKER not in arguments
    assert NO_WORKER in server_command(MODEL, port=1, on_cpu=True, vllm_options=options[2:]).arguments


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(([f"--{name.replace('_', '-')}=1"], "is set by `grpo-fast serve` itself; leave it out") for name in SET_BY_SERVE),
        (["--port", "1"], "--port is set by `grpo-fast serve` itself; give serve's own option before --"),
        (["--load_format", "auto"], "--load_format is set by"),
        (["--enable-chunked-prefill"], "--enable-chunked-prefill is set by"),
        (["--hos=0.0.0.0"], "--hos=0.0.0.0 is set by"),
        (["--api_key", "secret"], "--api-key is refused: all users of this machine could read it; set VLLM_API_KEY"),
        (["-dp", "2"], "-dp is refused: a weight sync checks one engine per server; start one server per replica"),
        (["more"], "'more' is not an option; give vLLM's own options after --"),
    ],
)
def test_options_that_a_sync_does_not_leave_open_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        server_command(MODEL, port=1, on_cpu=True, vllm_options=options)


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


def test_the_server_runs_in_the_process_that_has_checked_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another one torch would be imported again."""
    (tmp_path / "told_server.py").write_text(
        "import os, sys\n"
        "from huggingface_hub import is_offline_mode\n"
        "sys.modules['torch'].told = [__name__, os.getpid(), sys.argv[1:], os.environ['TOLD'], is_offline_mode()]",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["grpo-fast", "serve"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch, "told", None, raising=False)
    for name in ("TOLD", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "0")
    before = sys.modules["__main__"]
    become(ServerCommand([sys.executable, "-m", "told_server", "--port", "1"], {"TOLD": "1", "HF_HUB_OFFLINE": "1"}))
    assert torch.told == ["__main__", os.getpid(), ["--port", "1"], "1", True]
    assert sys.modules["__main__"] is before, "what vLLM starts would import it again"


@pytest.fixture(scope="module")
def split_server(serve: Callable[..., Any]) -> Iterator[Any]:
    with serve("--transport", "sparse", "--max-lora-rank", "4", "--", "--tensor-parallel-size", "2") as process:
        yield process


@pytest.fixture(scope="module")
def build(split_server: Any) -> Callable[[PreTrainedModel], VLLMServerEngine]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    settings = VLLMSettings(sync_deadline_s=60, request_deadline_s=60, transport="sparse", bucket_bytes=1_500_000)
    return lambda model: VLLMServerEngine(model, tokenizer, urls=[split_server.url], settings=settings)


def exchanged_by(server: Any) -> set[Path]:
    """What a server's workers exchange tensors through, under the name that it had."""
    maps = (each.path for process in server.processes() for each in process.memory_maps())
    return {Path(path.removesuffix(" (deleted)")) for path in maps if path.startswith("/dev/shm/vllm_dist_")}


def embedded_model() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return model


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of vLLM, torch and peft
def test_workers_that_split_the_model_get_whole_weights_and_what_changed(
    build: Callable[..., VLLMServerEngine], split_server: Any, perturb: Callable[..., None], measure_errors: Callable[..., Any]
) -> None:
    model = embedded_model()
    whole = sum(weight.nbytes for weight in model.parameters())
    engine = build(model)

    def check(version: int, num_bytes: int) -> None:
        assert engine.sync_weights(model, version)["sync/bytes"] == num_bytes
        answers = engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=version)
        assert measure_errors(model, PROMPTS, answers, SAMPLING.temperature).agrees
        assert {completion.weight_version for group in answers for completion in group} == {version}

    perturb(model, seed=1, scale=5e-3)
    check(1, whole)
    with torch.no_grad():
        row = model.lm_head.weight[2].mul_(1.5)
    check(2, 8 * row.numel())
    engine.close()
    # pages that are not there would be taken when they are written to, and what fills shared memory up would end the engine
    sizes = [path.stat() for path in split_server.queues()]
    assert sum(size.st_size for size in sizes) > 2**28
    assert all(size.st_blocks * 512 >= size.st_size for size in sizes)
    assert exchanged_by(split_server), "by name it would stay there when the server has ended"
    assert not any(path.exists() for path in exchanged_by(split_server))


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of vLLM, torch and peft
def test_workers_that_split_the_model_get_adapters(
    build: Callable[..., VLLMServerEngine], perturb: Callable[..., None], measure_errors: Callable[..., Any]
) -> None:
    model = embedded_model()
    peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapters = torch.nn.ParameterList(weight for name, weight in model.named_parameters() if ".lora_" in name)
    engine = build(model)
    perturb(adapters, seed=1, scale=0.02)
    assert engine.sync_weights(model, 1)["sync/bytes"] == sum(weight.nbytes for weight in adapters)
    answers = engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=1)
    assert measure_errors(model, PROMPTS, answers, SAMPLING.temperature).agrees
    engine.close()


@pytest.mark.vllm
@pytest.mark.slow
def test_engine_and_workers_do_not_outlive_a_server_that_is_killed(split_server: Any) -> None:
    """As by the kernel, where memory is short; they would keep theirs, and no server could take its place."""
    processes = split_server.processes()
    split_server.kill_alone()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert len(processes) > 2
    assert not alive


def test_a_missing_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_environment.util, "find_spec", lambda name: None)
    with pytest.raises(RolloutError, match="vLLM is not installed"):
        server_command(MODEL, port=8000, on_cpu=True)
