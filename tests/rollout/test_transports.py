from __future__ import annotations

import pytest

from grpo_fast.rollout.transports import BACKENDS, choose_transport, sync_attempts


@pytest.mark.parametrize(
    ("host", "chosen"), [("in process", "direct"), ("own process", "shared_memory"), ("server", "shared_memory")]
)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_auto_is_what_works_everywhere(host: str, chosen: str, on_gpu: bool) -> None:
    assert choose_transport("auto", host, on_gpu=on_gpu, num_engines=3) == chosen  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "host", "num_engines", "message"),
    [
        ("direct", "server", 1, "an engine behind a server; choose shared_memory or sparse or ipc or nccl"),
        ("direct", "own process", 1, "'direct' cannot reach an engine in its own process"),
        ("ipc", "server elsewhere", 1, "an engine behind a server on another machine; choose shared_memory or sparse or nccl"),
        ("ipc", "in process", 1, "an engine in the trainer's process; choose direct or shared_memory or sparse"),
        ("nccl", "own process", 1, "'nccl' cannot reach an engine in its own process on the trainer's GPU"),
        ("ipc", "server", 2, "'ipc' supports one server, not 2"),
        ("nccl", "server", 2, "'nccl' supports one server, not 2"),
    ],
)
def test_what_leads_nowhere_is_refused(name: str, host: str, num_engines: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_transport(name, host, on_gpu=True, num_engines=num_engines)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["ipc", "nccl"])
def test_without_a_gpu_vllms_own_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' moves weights between GPUs, but the policy is on a CPU"):
        choose_transport(name, "server", on_gpu=False)  # type: ignore[arg-type]
    assert choose_transport(name, "server", on_gpu=True) == name  # type: ignore[arg-type]


def test_only_our_own_receivers_begin_a_broken_update_anew() -> None:
    assert {name: sync_attempts(name) for name in BACKENDS} == {
        "direct": 2,
        "shared_memory": 2,
        "sparse": 2,
        "ipc": 1,
        "nccl": 1,
    }
