"""Changes alone, between the trainer's end and a stand-in for a worker, then in an engine; processes: test_vllm_adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from grpo_fast.assets import embedded_model_dir
from grpo_fast.config import Config
from grpo_fast.ops.weight_delta import apply_delta
from grpo_fast.rollout import SamplingParams
from grpo_fast.rollout.vllm_engine import VLLMEngine, VLLMSettings
from grpo_fast.train.plan_memory import MemoryInputs, MemoryPlanner

# vLLM and what it imports use deprecated parts of torch.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

PROMPTS = [[1] + [3 + (7 * position) % 50 for position in range(75)], [1, 4, 5, 6]]
SAMPLING = SamplingParams(max_tokens=8, temperature=0.7)


class Copies:
    """A client that keeps copies as a worker does, and has of the file only what was brought, as on another machine."""

    def __init__(self) -> None:
        self.held: dict[int, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.whole: list[bool] = []
        self.broken = False

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.mapped = torch.from_file(init_info["path"], shared=True, size=init_info["num_bytes"], dtype=torch.uint8)
        self.own = torch.full_like(self.mapped, 255)

    def bring(self, place: int, num_bytes: int) -> None:
        self.own[place : place + num_bytes] = self.mapped[place : place + num_bytes]

    def start_weight_update(self) -> None:
        self.whole = []

    def update_weights(self, info: dict[str, Any]) -> None:
        from grpo_fast.rollout.vllm_sparse import SparseUpdate

        if self.broken:
            raise ConnectionError("the wire broke")
        update = SparseUpdate(**info)
        delta = update.delta(self.own[update.place : update.place + update.num_bytes])
        held = self.held.setdefault(update.number, torch.zeros(update.num_bytes, dtype=torch.uint8))
        apply_delta(held.view(delta.values.dtype), delta)
        self.weights |= {name: view.clone() for name, view in update.views(held)}
        self.whole.append(update.num_changed is None)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Nothing is loaded here."""


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 300), torch.nn.Linear(300, 3))


def build_sender(model: torch.nn.Module, client: Copies, dtype: torch.dtype) -> Any:
    from grpo_fast.rollout.vllm_layerwise import PolicyWeights
    from grpo_fast.rollout.vllm_sparse import SparseInit, SparseSender

    return SparseSender.trainer_init(
        SparseInit(rank=0, bucket_bytes=2 * 2000), client=client, source=PolicyWeights(model, dtype)
    )


@torch.no_grad()
def change_some(model: torch.nn.Module, count: int, seed: int) -> None:
    """Other bits in ``count`` values of every weight, in bfloat16 too."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        places = torch.randperm(weight.numel(), generator=generator)[:count]
        weight.view(-1)[places] = torch.randn(len(places), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_changed_goes_over_and_every_weight_is_there_bit_for_bit(model: torch.nn.Module, dtype: torch.dtype) -> None:
    client = Copies()
    sender = build_sender(model, client, dtype)
    whole = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    for turn in range(6):
        if turn:
            change_some(model, 2, seed=turn)
        sender.send_weights()
        assert all(torch.equal(client.weights[name], weight.to(dtype)) for name, weight in model.named_parameters())
        if turn == 0:
            assert all(client.whole)
            assert sender.sent_bytes >= whole
        else:
            assert sender.sent_bytes <= 6 * 2 * (4 + dtype.itemsize)
    sender.send_weights()
    assert sender.sent_bytes == 0
    with torch.no_grad():
        model[1].weight[0, 0] = -0.0
        sender.send_weights()
        model[1].weight[0, 0] = 0.0
        sender.send_weights()
    assert sender.sent_bytes == 4 + dtype.itemsize, "bits are compared, not numbers"


def test_a_bucket_goes_whole_where_that_is_less(model: torch.nn.Module) -> None:
    client = Copies()
    sender = build_sender(model, client, torch.bfloat16)
    sender.send_weights()
    with torch.no_grad():
        model[1].weight.mul_(1.5)
    sender.send_weights()
    assert sorted(client.whole) == [False] * (len(client.whole) - client.whole.count(True)) + [True] * client.whole.count(True)
    assert 0 < client.whole.count(True) < len(client.whole)
    assert torch.equal(client.weights["1.weight"], model[1].weight.bfloat16())


def test_after_an_update_that_failed_everything_goes(model: torch.nn.Module) -> None:
    client = Copies()
    sender = build_sender(model, client, torch.bfloat16)
    sender.send_weights()
    change_some(model, 1, seed=1)
    client.broken = True
    with pytest.raises(ConnectionError):
        sender.send_weights()
    client.broken = False
    sender.send_weights()
    assert all(client.whole)
    assert all(torch.equal(client.weights[name], weight.bfloat16()) for name, weight in model.named_parameters())


def test_a_copy_that_is_not_what_the_trainer_takes_it_for_is_found(model: torch.nn.Module) -> None:
    client = Copies()
    sender = build_sender(model, client, torch.bfloat16)
    sender.send_weights()
    client.held[1][0] ^= 1
    change_some(model, 1, seed=1)
    with pytest.raises(ValueError, match="send the whole bucket"):
        sender.send_weights()


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLMEngine]:
    policy: PreTrainedModel = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    settings = VLLMSettings(transport="sparse", bucket_bytes=300_000, sync_deadline_s=60)
    engine = VLLMEngine(policy, tokenizer, settings=settings)
    yield engine
    engine.close()


def test_twenty_syncs_and_the_logprobs_are_the_policys_after_each(
    engine: VLLMEngine, perturb: Callable[..., None], measure_errors: Callable[..., Any]
) -> None:
    policy = engine._model
    whole = sum(weight.nbytes for weight in policy.parameters())
    answers = engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=0)
    for version in range(1, 21):
        before = [weight.clone() for weight in policy.parameters()]
        perturb(policy, seed=version, scale=5e-3)
        with torch.no_grad():
            for weight, old in zip(policy.parameters(), before, strict=True):
                weight.view(-1)[version % 2 :: 16] = old.view(-1)[version % 2 :: 16]
                if version > 2:  # until then nearly all of a bucket is other, and it goes whole
                    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(version)) < 0.9
                    weight.copy_(torch.where(kept, old, weight))
        assert measure_errors(policy, PROMPTS, answers, SAMPLING.temperature).engine > 1e-4
        sent = engine.sync_weights(policy, version)["sync/bytes"]
        changed = sum(
            int((weight.view(torch.int32) != old.view(torch.int32)).sum())
            for weight, old in zip(policy.parameters(), before, strict=True)
        )
        assert sent == (8 * changed if version > 2 else whole)
        answers = engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=version)
        assert measure_errors(policy, PROMPTS, answers, SAMPLING.temperature).agrees
    receiver = engine._vllm._llm.llm_engine.model_executor.driver_worker.worker.weight_transfer_engine
    plan = MemoryPlanner(policy.config, Config(rollout="vllm", vllm_transport="sparse"), MemoryInputs(2**30, "cpu", 8)).plan()
    for name, copies in (
        ("weights as last sent", engine._vllm._sender._engine._sent),
        ("weights as vLLM last got them", receiver._held),
    ):
        assert sum(copy.nbytes for copy in copies.values()) == plan.lasting[name] == whole


@pytest.mark.parametrize("loss", ["forgotten", "altered"])
def test_a_worker_that_lost_its_copy_gets_everything(
    engine: VLLMEngine, perturb: Callable[..., None], measure_errors: Callable[..., Any], loss: str
) -> None:
    policy, llm = engine._model, engine._vllm._llm
    whole = sum(weight.nbytes for weight in policy.parameters())
    engine.sync_weights(policy, 30)
    receiver = llm.llm_engine.model_executor.driver_worker.worker.weight_transfer_engine
    if loss == "forgotten":
        receiver._held.clear()
    else:
        receiver._held[1][4] ^= 1
    with torch.no_grad():
        for weight in policy.parameters():
            weight.view(-1)[::20] += 0.01
    assert engine.sync_weights(policy, 31)["sync/bytes"] == whole
    assert 0 < engine.sync_weights(policy, 32)["sync/bytes"] + 1 < whole
    answers = engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=1)
    assert measure_errors(policy, PROMPTS, answers, SAMPLING.temperature).agrees
