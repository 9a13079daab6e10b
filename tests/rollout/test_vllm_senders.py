"""What is handed to vLLM's own transports, against vLLM's own classes; sending by them needs a GPU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

# vLLM and what it imports use deprecated parts of torch.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


@pytest.fixture
def source() -> Any:
    from grpo_fast.rollout.vllm_layerwise import PolicyWeights

    return PolicyWeights(torch.nn.Linear(1000, 300), torch.bfloat16)


@pytest.mark.parametrize("name", ["shared_memory", "ipc", "nccl"])
def test_each_transport_is_known_to_vllm_on_both_sides(name: str, source: Any) -> None:
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory, WeightTransferTrainerFactory

    from grpo_fast.rollout.transports import BACKENDS
    from grpo_fast.rollout.vllm_senders import init_info
    from grpo_fast.rollout.vllm_transport import register

    register()
    info = init_info(name, source, bucket_bytes=1 << 20, num_workers=1, meeting=("192.0.2.7", 5005))
    assert info.backend == BACKENDS[name]
    assert info.is_sender
    sender = WeightTransferTrainerFactory._registry[info.backend]()
    assert isinstance(info, sender.init_info_cls)
    assert info.backend in WeightTransferEngineFactory._registry


def test_the_direct_way_is_known_to_vllms_workers() -> None:
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from grpo_fast.rollout.transports import BACKENDS
    from grpo_fast.rollout.vllm_direct import BACKEND, DirectReceiver
    from grpo_fast.rollout.vllm_transport import register

    register()
    assert BACKENDS["direct"] == BACKEND
    assert WeightTransferEngineFactory._registry[BACKEND]() is DirectReceiver


def test_vllms_own_transports_read_the_policy(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the part of a second rank, which only gathers: the first's needs a GPU. What they ask of a source changed in 0.33."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    from grpo_fast.rollout import vllm_senders
    from grpo_fast.rollout.vllm_layerwise import PolicyWeights

    read: list[str] = []
    whole = PolicyWeights.__iter__

    def watched(weights: PolicyWeights) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in whole(weights):
            read.append(name)
            yield name, weight

    second = NCCLTrainerInitInfo(rank=1, master_address="192.0.2.7", master_port=5005, world_size=2)
    monkeypatch.setattr(PolicyWeights, "__iter__", watched)
    monkeypatch.setattr(vllm_senders, "init_info", lambda *arguments, **settings: second)
    sender = vllm_senders.WeightSender("nccl", client=None, source=source, bucket_bytes=1 << 20)
    assert sender.send_weights() == source.num_bytes == 2 * (1000 * 300 + 300)
    assert read == ["weight", "bias"]


def test_buckets_are_packed_and_all_workers_are_counted(source: Any) -> None:
    from grpo_fast.rollout.vllm_senders import init_info

    ipc = dataclasses.asdict(init_info("ipc", source, bucket_bytes=1 << 20, num_workers=1, meeting=("127.0.0.1", 5)))
    assert ipc == {"rank": 0, "packed": True, "packed_buffer_size_bytes": 1 << 20}
    nccl = dataclasses.asdict(init_info("nccl", source, bucket_bytes=1 << 20, num_workers=4, meeting=("192.0.2.7", 5005)))
    assert nccl == {
        "rank": 0,
        "master_address": "192.0.2.7",
        "master_port": 5005,
        "world_size": 5,
        "packed": True,
        "packed_buffer_size_bytes": 1 << 19,
        "packed_num_buffers": 1,
    }


def test_a_weight_that_is_larger_than_the_buckets_of_cuda_ipc_has_room(source: Any) -> None:
    """vLLM refuses it otherwise, and every real model has one: the embedding of Qwen2.5-0.5B takes 272 MB."""
    from grpo_fast.rollout.vllm_senders import init_info

    info = init_info("ipc", source, bucket_bytes=1 << 16, num_workers=1, meeting=("127.0.0.1", 5))
    assert info.packed_buffer_size_bytes == 1000 * 300 * 2


def test_handles_of_cuda_go_over_http_as_vllms_server_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo

    from grpo_fast.rollout.vllm_senders import json_safe

    handles = {"GPU-uuid": (torch.float32, (3, 2), b"handle", 0)}
    info = {"names": ["a"], "dtype_names": ["bfloat16"], "shapes": [[3, 2]], "tensor_sizes": [12], "ipc_handles": handles}
    body = json.loads(json.dumps(json_safe(info)))
    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)
    with pytest.raises(ValueError, match="Refusing to deserialize"):
        IPCWeightTransferUpdateInfo(**body)
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    assert IPCWeightTransferUpdateInfo(**body).ipc_handles == handles
    assert json_safe({"names": []}) == {"names": []}


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("max_split_size_mb:64", []),
        ("expandable_segments:True", ["expandable_segments:False", "expandable_segments:True"]),
        (
            "max_split_size_mb:64,expandable_segments:True",
            ["max_split_size_mb:64,expandable_segments:False", "max_split_size_mb:64,expandable_segments:True"],
        ),
    ],
)
def test_expandable_segments_alone_are_off_while_handles_are_made(
    variable: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from grpo_fast.rollout.vllm_senders import plain_segments

    said: list[str] = []
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", said.append)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", variable)
    with plain_segments():
        assert said == expected[:1]
    assert said == expected


@pytest.mark.gpu
@pytest.mark.slow
def test_weights_go_to_a_process_on_the_same_gpu_by_cuda_ipc(
    perturb: Callable[..., None], measure_errors: Callable[..., Any]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grpo_fast.assets import embedded_model_dir
    from grpo_fast.rollout import SamplingParams
    from grpo_fast.rollout.vllm_engine import VLLMEngine, VLLMSettings

    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32).cuda()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    bucket_bytes = 100_000
    assert max(weight.nbytes for weight in model.parameters()) > bucket_bytes
    settings = VLLMSettings(own_process=True, transport="ipc", bucket_bytes=bucket_bytes, sync_deadline_s=60)
    engine = VLLMEngine(model, tokenizer, settings=settings)
    try:
        for version in range(1, 21):
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(2e-3 * torch.randn_like(weight))
            assert engine.sync_weights(model, version)["sync/probe_kl"] < 1e-8
        assert engine.generate([[1, 4, 5]], SamplingParams(max_tokens=4), num_generations=2, seed=0)
    finally:
        engine.close()
