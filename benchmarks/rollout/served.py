"""A vLLM server of a model for as long as it is measured, and rivals that ask it."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from benchmarks.rollout.models import CONTEXT, any_tokenizer
from grpo_fast.rollout import SamplingParams
from grpo_fast.rollout.transports import Transport
from grpo_fast.rollout.vllm_engine import VLLMServerEngine
from grpo_fast.rollout.vllm_environment import held_port
from grpo_fast.rollout.vllm_server import server_command

WEIGHTS = "model.safetensors"
OWN_MEMORY = ("unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "sh")
"""Before a command: gives it shared memory of its own, as on another machine or in another container."""
Rival = Callable[[int], int]
"""Samples with a seed and returns how many tokens it sampled."""


def save_weights(model: PreTrainedModel, directory: Path, dtype: torch.dtype) -> None:
    save_file({name: weight.detach().to(dtype) for name, weight in model.named_parameters()}, directory / WEIGHTS)


@contextmanager
def served(
    model: PreTrainedModel, *, dtype: torch.dtype, transport: Transport = "auto", inside: Sequence[str] = ()
) -> Iterator[tuple[str, int]]:
    """A server of the model, started by the words ``inside``; yields its address and the number of its process."""
    with tempfile.TemporaryDirectory() as directory, held_port() as port:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        any_tokenizer().save_pretrained(directory)
        save_weights(model, Path(directory), dtype)
        length = min(CONTEXT, model.config.max_position_embeddings)
        name = str(dtype).removeprefix("torch.")
        command = server_command(directory, port=port, on_cpu=True, dtype=name, max_model_len=length, transport=transport)
        # A rival reads files, which a server that began with dummy weights refuses.
        arguments = ["auto" if argument == "dummy" else argument for argument in command.arguments]
        process = subprocess.Popen([*inside, *arguments], env=command.environment)
        try:
            for _ in range(600):
                if process.poll() is not None:
                    raise SystemExit("the server ended")
                with socket.socket() as knock:
                    if knock.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()
            process.wait(30)


def processor_clock(server: int) -> Callable[[], float]:
    """Seconds of processor time of this process, a server's and its children's."""
    found = [server, *(child.pid for child in psutil.Process(server).children(recursive=True))]
    # Linux names the clock of another process so (clock_getcpuclockid), which is finer than the ticks that it tells of one.
    clocks = [(~number << 3) | 2 for number in (os.getpid(), *found)]
    return lambda: sum(map(time.clock_gettime, clocks))


def plain_rival(engine: VLLMServerEngine, prompts: list[list[int]], sampling: SamplingParams, generations: int) -> Rival:
    """The very requests that the engine makes, by the client library of vLLM's own benchmark, with connections that stay."""
    aiohttp: Any = import_module("aiohttp")
    [server] = engine._vllm.servers

    runner = asyncio.Runner()

    async def open_session() -> Any:
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    session = runner.run(open_session())

    async def ask(body: dict[str, Any]) -> int:
        async with session.post(f"{server.url}/inference/v1/generate", json=body) as answer:
            return sum(len(choice["token_ids"]) for choice in (await answer.json())["choices"])

    async def ask_all(seed: int) -> int:
        params = engine._params(sampling, generations, seed, 0, [sampling.max_tokens] * len(prompts))
        sent = [{"logprobs": 0} | each for each in params]
        bodies = [{"token_ids": prompt, "sampling_params": each} for prompt, each in zip(prompts, sent, strict=True)]
        return sum(await asyncio.gather(*map(ask, bodies)))

    return lambda seed: runner.run(ask_all(seed))


def trl_rival(engine: VLLMServerEngine, prompts: list[list[int]], sampling: SamplingParams, generations: int) -> Rival:
    """TRL's client, which asks for all in one request, without seeds."""
    [server] = engine._vllm.servers
    client: Any = import_module("trl.generation.vllm_client").VLLMClient(base_url=server.url)
    ending = {"ignore_eos": True, "stop_token_ids": engine._end_tokens}

    def run(seed: int) -> int:
        found = client.generate(
            prompts,
            n=generations,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            generation_kwargs=ending,
        )
        return sum(map(len, found["completion_ids"]))

    return run
