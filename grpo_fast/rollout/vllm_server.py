"""vLLM's own server, started so that a trainer can give it weights.

The routes that do so are vLLM's development routes, which no API key guards. So the server listens on the loopback interface
and nowhere else, where a trainer on another machine reaches it by ssh; for requests it demands the key in ``VLLM_API_KEY``,
where that is set.
"""

from __future__ import annotations

import errno
import os
import re
import runpy
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from grpo_fast.hub import out_of_reach, why_unread
from grpo_fast.rollout.shared_memory import check_room
from grpo_fast.rollout.transports import BACKENDS, Transport, choose_transport
from grpo_fast.rollout.vllm_adapters import lora_options
from grpo_fast.rollout.vllm_addresses import api_key
from grpo_fast.rollout.vllm_environment import (
    BINDING,
    CPU_BLOCK_SIZE,
    FLOAT32_PRODUCTS,
    LOCK_BYTES,
    NO_WORKER,
    OWNER,
    SERVER,
    UNBOUND,
    require_vllm,
)
from grpo_fast.rollout.vllm_mirror import MIDDLEWARE
from grpo_fast.rollout.vllm_needs import ONE_REPLICA
from grpo_fast.rollout.vllm_sleep import check_segments, sleep_level

HOST = "127.0.0.1"
_WORKERS = re.compile(r"-tp|-pp|--(tensor|pipeline)[-_]parallel[-_]size|--distributed[-_]executor[-_]backend")
"""Options that ask for workers."""
_OWN = {"--port", "--dtype", "--max-model-len", "--max-lora-rank", "--enable-sleep-mode"}
_KEY = re.compile(r"--api[-_]k")
_REPLICAS = re.compile(r"-dp|--data[-_]parallel")


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """How a server is started."""

    arguments: list[str]
    """Program and arguments."""
    environment: dict[str, str] = field(repr=False)
    """The whole environment; not shown, as it holds the API key."""


def server_command(  # noqa: PLR0913 (what the command line offers)
    model: str,
    *,
    port: int,
    on_cpu: bool,
    dtype: str | None = None,
    max_model_len: int | None = None,
    max_lora_rank: int | None = None,
    transport: Transport = "auto",
    enable_sleep_mode: bool = False,
    vllm_options: Sequence[str] = (),
) -> ServerCommand:
    """The command that starts a server of ``model``'s architecture; its weights come from the trainer.

    Args:
        model: directory or hub id; only its configuration and its tokeniser are read.
        port: where it listens.
        on_cpu: whether it runs without a GPU.
        dtype: what it computes in, which must be what the trainer computes in; ``None`` is float32 on a CPU, bfloat16 on a GPU.
        max_model_len: longest sequence, in tokens; ``None`` takes the model's context.
        max_lora_rank: rank of the LoRA adapters that it must take; ``None`` takes none.
        transport: how the trainer will send weights.
        enable_sleep_mode: whether its memory can be taken back while the policy trains; on a GPU only.
        vllm_options: of vLLM's own server, as on its command line, such as ``["--tensor-parallel-size", "2"]``.

    Raises:
        RolloutError: vLLM is missing or too old.
        ValueError: a port out of range or taken, a key that no request can carry, a model that cannot be found, a length beyond
            its context, a transport or a sleep that needs a GPU, a rank that vLLM has no room for, or an option of vLLM's that
            a sync does not leave open.
        OSError: shared memory is full.
    """
    version = require_vllm()
    if not 0 < port < 2**16:
        raise ValueError(f"port must lie in 1 to 65535, got {port}")
    _check_free(port)
    api_key()
    check_room(LOCK_BYTES, "vLLM's locks")
    way = choose_transport(transport, "server", on_gpu=not on_cpu)
    unreached = None if Path(model).is_dir() else out_of_reach()
    config = _read_config(model, unreached)
    _check_length(max_model_len, config)
    # Not `vllm serve`: that command asks for a distribution named vllm, which vLLM's build for CPUs is not.
    arguments = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", HOST, "--port", str(port)]
    dtype = dtype or ("float32" if on_cpu else "bfloat16")
    arguments += ["--model", model, "--load-format", "dummy", "--dtype", dtype]
    arguments += ["--weight-transfer-config", f'{{"backend": "{BACKENDS[way]}"}}', "--enable-scale-out"]
    arguments += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1", "--disable-uvicorn-access-log"]
    if max_model_len is not None:
        arguments += ["--max-model-len", str(max_model_len)]
    if on_cpu:
        arguments += _cpu_options(vllm_options)
    if enable_sleep_mode:
        sleep_level(on_gpu=not on_cpu, has_adapters=max_lora_rank is not None)
        check_segments(version, os.environ)
        arguments += ["--enable-sleep-mode"]
    own = str(os.getpid())  # which stays when the command takes its place
    forced = {"VLLM_SERVER_DEV_MODE": "1", SERVER: own, OWNER: own}
    if unreached is not None:
        forced["HF_HUB_OFFLINE"] = "1"  # else vLLM would try every file for half a minute
    if way == "ipc":
        forced["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # its handles come pickled, from this machine only
    if max_lora_rank is not None:
        arguments += _adapter_options(max_lora_rank, config)
        forced["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    _check_options(vllm_options, taken=arguments)
    defaults = {"VLLM_LOGGING_LEVEL": "WARNING", BINDING: UNBOUND, "VLLM_CPU_KVCACHE_SPACE": "1"}
    if dtype in {"float32", "float"}:
        defaults |= FLOAT32_PRODUCTS
    return ServerCommand([*arguments, "--middleware", MIDDLEWARE, *vllm_options], defaults | dict(os.environ) | forced)


def become(command: ServerCommand) -> None:
    """Runs the server in this process until it ends: what vLLM imports too is there already, torch above all.

    It is not this process's ``__main__``, so the processes that vLLM starts do not import it again.
    """
    program, *options = command.arguments[2:]
    os.environ.update(command.environment)
    constants.HF_HUB_OFFLINE |= command.environment.get("HF_HUB_OFFLINE") == "1"  # else read once, when it was imported
    sys.argv = [program, *options]
    runpy.run_module(program, run_name="__main__")


def _cpu_options(vllm_options: Sequence[str]) -> list[str]:
    """Prompts are read whole: a seeded request whose prompt is read in parts ends vLLM's engine on a CPU."""
    options = ["--enforce-eager", "--block-size", str(CPU_BLOCK_SIZE), "--no-enable-chunked-prefill"]
    if os.environ.get(BINDING, UNBOUND) == UNBOUND and not any(map(_WORKERS.match, vllm_options)):
        options += ["--distributed-executor-backend", NO_WORKER]
    return options


def _adapter_options(max_rank: int, config: PreTrainedConfig) -> list[str]:
    options: list[str] = []
    for name, value in lora_options(max_rank, _linear_layers(config)).items():
        options += [f"--{name.replace('_', '-')}"]
        options += map(str, value) if isinstance(value, list) else [] if value is True else [str(value)]
    return options


def _check_options(options: Sequence[str], *, taken: Sequence[str]) -> None:
    """Options of vLLM's against those that are set already."""
    if options and not options[0].startswith("-"):
        raise ValueError(
            f"{options[0]!r} is not an option; give vLLM's own options after --, such as -- --tensor-parallel-size 2"
        )

    def name(option: str) -> str:
        return option.partition("=")[0].replace("_", "-").replace("--no-", "--", 1)

    names = {name(argument) for argument in taken if argument.startswith("--")}
    for option in options:
        if _KEY.match(option):
            raise ValueError("--api-key is refused: all users of this machine could read it; set VLLM_API_KEY, as for `train`")
        if option.startswith("--") and any(each.startswith(name(option)) for each in names):  # abbreviations count
            fix = "give serve's own option before --" if name(option) in _OWN else "leave it out"
            raise ValueError(f"{option} is set by `grpo-fast serve` itself; {fix}")
        if _REPLICAS.match(option):
            raise ValueError(f"{option} is refused: {ONE_REPLICA}")


def _check_free(port: int) -> None:
    """Before vLLM is loaded, which takes half a minute to find out."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was just left is free
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(f"port {port} is in use, perhaps by another server; choose another with --port") from error


def _read_config(model: str, unreached: str | None) -> PreTrainedConfig:
    """The model's configuration, before vLLM is loaded to miss it; from the cache where the hub is out of reach."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model, local_files_only=unreached is not None)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ValueError(
            f"cannot serve model {model!r}: {why_unread(error, unreached)} Give a directory with config.json and tokenizer, "
            "or a hub id that this machine can reach"
        ) from error
    return config


def _check_length(max_model_len: int | None, config: PreTrainedConfig) -> None:
    """Before vLLM is loaded; where positions are stretched it alone knows the limit, and its own switch lifts it."""
    text: Any = config.get_text_config(decoder=True)
    context = getattr(text, "max_position_embeddings", None)
    stretched = "factor" in repr(getattr(text, "rope_parameters", None))
    lifted = os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0") not in {"", "0"}
    if max_model_len is not None and context is not None and max_model_len > context and not (stretched or lifted):
        raise ValueError(f"max_model_len={max_model_len} is more than the model's context of {context} tokens; leave it out")


def _linear_layers(config: PreTrainedConfig) -> list[str]:
    """Ends of the names of all linear layers but the head."""
    with torch.device("meta"):
        outline: Any = AutoModelForCausalLM.from_config(config)
    head = outline.get_output_embeddings()
    layers = ((name, layer) for name, layer in outline.named_modules() if isinstance(layer, torch.nn.Linear))
    return sorted({name.rpartition(".")[2] for name, layer in layers if layer is not head})
