from __future__ import annotations

import copy
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_fast.rollout import SamplingParams

# vLLM and what it imports use deprecated parts of torch.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


class Recorder:
    """A client that keeps what it was told, and what the file held at each update."""

    def __init__(self) -> None:
        self.path = ""
        self.mapped = torch.empty(0)
        self.calls: list[str] = []
        self.received: dict[str, torch.Tensor] = {}
        self.brought: dict[int, torch.Tensor] = {}

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.path = init_info["path"]
        self.mapped = torch.from_file(self.path, shared=True, size=init_info["num_bytes"], dtype=torch.uint8)

    def bring(self, place: int, num_bytes: int) -> None:
        self.brought[place] = self.mapped[place : place + num_bytes].clone()

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, info: dict[str, Any]) -> None:
        self.calls.append("update")
        filled = self.brought.pop(info["place"])
        assert torch.equal(filled, self.mapped[info["place"] : info["place"] + info["num_filled"]])
        for name, kind, shape, offset in zip(
            *(info[key] for key in ("names", "dtype_names", "shapes", "offsets")), strict=True
        ):
            dtype = getattr(torch, kind)
            size, start = torch.Size(shape).numel() * dtype.itemsize, info["place"] + offset
            self.received[name] = self.mapped[start : start + size].view(dtype).view(shape).clone()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append("finish")


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 300), torch.nn.Linear(300, 3))


def build_sender(
    model: torch.nn.Module, client: Recorder, *, bucket_bytes: int = 1000, dtype: torch.dtype = torch.float32
) -> Any:
    from grpo_fast.rollout.vllm_layerwise import PolicyWeights
    from grpo_fast.rollout.vllm_transport import SharedMemoryInit, SharedMemorySender

    return SharedMemorySender.trainer_init(
        SharedMemoryInit(rank=0, bucket_bytes=2 * bucket_bytes), client=client, source=PolicyWeights(model, dtype)
    )


@pytest.mark.parametrize("bucket_bytes", [1, 1000, 10_000, 10**6])
def test_every_weight_arrives_bit_for_bit_whatever_the_bucket(model: torch.nn.Module, bucket_bytes: int) -> None:
    client = Recorder()
    sender = build_sender(model, client, bucket_bytes=bucket_bytes)
    for _ in range(2):
        with torch.no_grad():
            model[1].weight.add_(1.0)
        sender.send_weights()
        assert client.received.keys() == dict(model.named_parameters()).keys()
        assert all(torch.equal(client.received[name], weight) for name, weight in model.named_parameters())
    updates = client.calls.count("update") // 2
    assert client.calls == ["start", *["update"] * updates, "finish"] * 2
    assert updates == {1: 6, 1000: 5, 10_000: 2, 10**6: 1}[bucket_bytes]


def test_weights_go_over_in_the_engines_type(model: torch.nn.Module) -> None:
    client = Recorder()
    sender = build_sender(model, client, dtype=torch.bfloat16)
    sender.send_weights()
    assert all(torch.equal(client.received[name], weight.bfloat16()) for name, weight in model.named_parameters())


def test_the_file_is_gone_once_it_is_open(model: torch.nn.Module) -> None:
    client = Recorder()
    build_sender(model, client)
    assert client.path
    assert not Path(client.path).exists()


def test_what_a_trainer_leaves_that_is_killed_before_the_file_is_open_is_removed_by_the_next(model: torch.nn.Module) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    class Hanging(Recorder):
        def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
            theirs.send(init_info["path"])
            time.sleep(300)

    trainer = context.Process(target=build_sender, args=(model, Hanging()))
    trainer.start()
    left = Path(ours.recv())
    trainer.kill()
    trainer.join()
    assert left.exists()
    os.utime(left.parent, (0, 0))  # what is young may be another's that begins
    client = Recorder()
    build_sender(model, client)
    assert not left.exists()
    assert not Path(client.path).parent.exists()


def test_memory_that_is_full_is_named_before_anything_is_written(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    client = Recorder()
    with pytest.raises(OSError, match=r"no room for buckets of weights: 0\.0 MiB are needed, .* are left; lower bucket_bytes"):
        build_sender(model, client)
    assert not client.path


def test_a_policy_whose_parameters_changed_is_refused(model: torch.nn.Sequential) -> None:
    client = Recorder()
    sender = build_sender(model, client)
    model[1] = torch.nn.Linear(7, 300, bias=False)
    with pytest.raises(RuntimeError, match=r"expected 1\.bias, got 2\.weight"):
        sender.send_weights()
    assert "finish" not in client.calls


def test_a_weight_that_does_not_come_is_named(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_fast.rollout.vllm_layerwise import PolicyWeights
    from grpo_fast.rollout.vllm_transport import SharedMemoryInit, SharedMemorySender

    class WithoutOne(PolicyWeights):
        @property
        def metadata(self) -> list[Any]:
            return [meta for meta in super().metadata if "layers.2.self_attn.o_proj" not in meta.name]

        def uncast(self) -> Iterator[tuple[str, torch.Tensor]]:
            return ((name, weight) for name, weight in super().uncast() if "layers.2.self_attn.o_proj" not in name)

    model, _, engine = embedded
    vllm = engine._vllm
    sender = SharedMemorySender.trainer_init(
        SharedMemoryInit(rank=0), client=vllm._sender.client, source=WithoutOne(model, torch.float32)
    )
    sender.send_weights()
    with pytest.raises(
        RuntimeError, match=r"1 parameters of the engine's model were not sent: model\.layers\.2\.self_attn\.o_proj"
    ):
        vllm.finish(9)
    assert vllm.weight_version() == 0
    vllm.undo()


def test_a_weight_for_which_there_is_no_place_is_named(embedded: Any) -> None:
    """As where a server has another model."""
    from grpo_fast.rollout.vllm_layerwise import PolicyWeights
    from grpo_fast.rollout.vllm_transport import SharedMemoryInit, SharedMemorySender

    embedded.engine.sync_weights(embedded.model, 7)
    wider = copy.deepcopy(embedded.model)
    wider.resize_token_embeddings(wider.config.vocab_size + 64, mean_resizing=False)
    vllm = embedded.engine._vllm
    sender = SharedMemorySender.trainer_init(
        SharedMemoryInit(rank=0), client=vllm._sender.client, source=PolicyWeights(wider, torch.float32)
    )
    shape = re.escape(str(list(wider.get_input_embeddings().weight.shape)))
    with pytest.raises(RuntimeError, match=rf"cannot load the policy's model\.embed_tokens\.weight of shape {shape}"):
        sender.send_weights()
    vllm.undo()
    assert embedded.engine.sync_weights(embedded.model, 8)["sync/probe_kl"] < 1e-8


def test_an_engine_that_another_trainer_took_since_is_taken_back_and_never_read_from_its_memory(
    embedded: Any, perturb: Callable[..., None], measure_errors: Callable[..., Any]
) -> None:
    from grpo_fast.rollout.vllm_layerwise import PolicyWeights
    from grpo_fast.rollout.vllm_transport import SharedMemoryInit, SharedMemorySender

    model, _, engine = embedded
    vllm = engine._vllm
    engine.sync_weights(model, 1)
    own = vllm._sender
    other = copy.deepcopy(model)
    perturb(other, seed=1, scale=0.1)
    stranger = SharedMemorySender.trainer_init(
        SharedMemoryInit(rank=0), client=own.client, source=PolicyWeights(other, torch.float32)
    )
    stranger.send_weights()
    vllm.finish(7)
    with pytest.raises(RuntimeError, match="another trainer has connected to this engine since the last sync"):
        own.send_weights()
    vllm.undo()
    engine.sync_weights(model, 2)
    prompts = [[1, 4, 5, 6], [1, 9]]
    answers = engine.generate(prompts, SamplingParams(max_tokens=8), num_generations=2, seed=0)
    assert measure_errors(model, prompts, answers, 1.0).agrees


OWNING = """
import multiprocessing, os, time
from grpo_fast.rollout.vllm_transport import register

def engine(owner, loads):
    if owner:
        os.environ["GRPO_FAST_VLLM_OWNER"] = str(owner)
    os.write(1, b"%d\\n" % os.getpid())  # at once: several do so
    while loads and os.getppid() == owner:
        time.sleep(0.1)
    register()
    time.sleep(300)

context = multiprocessing.get_context("fork")
for owner, loads in ((os.getpid(), False), (os.getpid(), True), (0, False)):
    context.Process(target=engine, args=(owner, loads)).start()
time.sleep(300)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("untraced")
def test_a_process_of_vllms_ends_with_the_trainer_that_is_killed_and_no_other_does() -> None:
    """As vLLM starts its engine; without it the engine would stay, with its memory. One is still loading at that moment."""
    psutil = pytest.importorskip("psutil")
    with subprocess.Popen([sys.executable, "-c", OWNING], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        engines = {int(trainer.stdout.readline()) for _ in range(3)}
        trainer.kill()
    ended, alive = psutil.wait_procs(map(psutil.Process, engines), timeout=5)
    for process in alive:
        process.kill()
    assert (len(ended), len(alive)) == (2, 1)


def test_registering_twice_is_harmless() -> None:
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from grpo_fast.rollout.vllm_transport import BACKEND, register

    register()
    register()
    assert BACKEND in WeightTransferEngineFactory._registry


def test_vllm_finds_the_backend_by_itself() -> None:
    from importlib.metadata import entry_points

    from grpo_fast.rollout.vllm_transport import register

    [entry] = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "grpo_fast"]
    assert entry.load() is register


def test_a_rank_that_does_not_send_gathers_every_weight_in_turn(model: torch.nn.Module) -> None:
    from grpo_fast.rollout.vllm_layerwise import PolicyWeights
    from grpo_fast.rollout.vllm_transport import SharedMemoryInit, SharedMemorySender

    gathered: list[str] = []

    class Counted(PolicyWeights):
        def uncast(self) -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in super().uncast():
                gathered.append(name)
                yield name, weight

    client = Recorder()
    sender = SharedMemorySender.trainer_init(SharedMemoryInit(rank=1), client=client, source=Counted(model, torch.float32))
    sender.send_weights()
    assert gathered == [name for name, _ in model.named_parameters()]
    assert not client.calls
    assert not client.path
