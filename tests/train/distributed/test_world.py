"""One process: it is alone, or does not find the others."""

from __future__ import annotations

import errno
import json
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.system.command_line import CommandLine
from grpo_fast.config import ConfigError
from grpo_fast.rollout.vllm_environment import held_port
from grpo_fast.train.distributed import ALONE, RankLostError, World, _packed
from tests.train.distributed.launches import forked_pair


def test_an_error_of_the_system_arrives_whole() -> None:
    failure = _packed(OSError(errno.ENOSPC, "No space left on device", "file"))
    assert failure is not None
    copy = failure.rebuild()
    assert isinstance(copy, OSError)
    assert (copy.errno, copy.filename) == (errno.ENOSPC, None)  # a file's name is not among the arguments
    assert "No space left" in str(copy)


def test_alone_there_is_nothing_to_exchange() -> None:
    values = [torch.ones(2)]
    ALONE.sum(values)
    assert values[0].tolist() == [1.0, 1.0]
    assert ALONE.gather(lambda: 7) == [7]
    assert ALONE.once(lambda: "x") == "x"
    assert ALONE.patiently(lambda: "y") == "y"
    assert ALONE.each(lambda: values) is values
    with ALONE.beside()():
        assert ALONE.gather(lambda: 8) == [8]
    assert ALONE.share(5) == slice(0, 5)
    assert ALONE.is_main
    with pytest.raises(RuntimeError, match="somebody"), ALONE.watched():
        raise RuntimeError("gloo is somebody else's here")


def test_what_ends_several_ranks_is_told_by_the_first(caplog: pytest.LogCaptureFixture) -> None:
    for world in (ALONE, World(1, 2)):
        world.tell(ValueError("no"))
    for error in (SystemExit(1), None):
        World(0, 2).tell(error)
    assert caplog.messages == []
    World(0, 2).tell(ValueError("no such thing"))
    assert caplog.messages == ["ValueError: no such thing"]


def test_a_process_that_nobody_launched_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert World.join(torch.device("cpu"), timeout_s=1.0).size == 1
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert World.join(torch.device("cpu"), timeout_s=1.0).size == 1


def test_a_task_of_srun_is_not_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ConfigError, match="srun has started 2 tasks"):
        World.join(torch.device("cpu"), timeout_s=1.0)


@pytest.fixture
def rank_1_of_4(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    return monkeypatch


def test_ranks_that_do_not_come_are_named_long_before_an_exchange_would_time_out(rank_1_of_4: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rank_1_of_4.setenv("MASTER_PORT", str(store.port))
    dist.PrefixStore("restart 0/group 1", store).set("rank 2", "here")
    with pytest.raises(RankLostError, match=r"rank 1 of 4 waited 2 s for the others to start, but ranks 0, 3 did not: they"):
        World.join(torch.device("cpu"), timeout_s=1800, join_timeout_s=2.0)
    assert not dist.is_initialized()


def test_addresses_that_nobody_keeps_are_told(rank_1_of_4: pytest.MonkeyPatch) -> None:
    with held_port() as port:
        rank_1_of_4.setenv("MASTER_PORT", str(port))
        with pytest.raises(RankLostError, match=r"waited 1 s for the others to start, but rank 0 or torchrun, which keeps"):
            World.join(torch.device("cpu"), timeout_s=1800, join_timeout_s=1.0)


def test_a_port_that_another_process_listens_at_is_told_at_once(rank_1_of_4: pytest.MonkeyPatch) -> None:
    rank_1_of_4.setenv("RANK", "0")
    rank_1_of_4.delenv("TORCHELASTIC_USE_AGENT_STORE")
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        rank_1_of_4.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConfigError, match=rf"rank 0 cannot listen at MASTER_PORT={port}, .*in use.*MASTER_PORT to a free"):
            World.join(torch.device("cpu"), timeout_s=1800)
    assert not dist.is_initialized()


def test_ranks_that_are_there_and_cannot_be_reached_are_not_called_dead(rank_1_of_4: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rank_1_of_4.setenv("MASTER_PORT", str(store.port))
    rank_1_of_4.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    for rank in (0, 2, 3):
        dist.PrefixStore("restart 0/group 1", store).set(f"rank {rank}", "here")
    told = r"rank 1 of 4 could not connect to the others \(.*nowhere0\); .* in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    with pytest.raises(RankLostError, match=told):
        World.join(torch.device("cpu"), timeout_s=60)
    assert not dist.is_initialized()


@pytest.mark.slow
def test_a_rank_waits_long_for_rank_0_and_hears_at_once_of_a_thread_that_fails(tmp_path: Path, forks: CommandLine) -> None:
    codes, told = forked_pair(forks, tmp_path, "tests.train.distributed.patience_program")
    assert codes == [0, 0], told
    first, second = (json.loads(printed.splitlines()[-1]) for printed in told)
    for each in (first, second):
        assert each["waited"] > 1.5 * each["timeout"]
        assert each["answers"] == [7, "RolloutError: the server is gone", "quick"]
        assert each["again"] == [0, 1], "ranks that have left a process group join the next one"
    for rank, each in enumerate((first, second)):
        out_of_memory, exits = each["failed beside"][:2], each["failed beside"][2]
        assert out_of_memory == [["MemoryError: no room"] * 4] * 2, "also where another rank's thread is out of memory"
        assert exits == ["SystemExit: 3" if rank else "TrainingError: SystemExit: 3", "nothing"]
        assert each["heard within"] < each["timeout"]
    assert second["left alone"].startswith("rank 1 of 2 lost another rank")
    ended = ("closed by peer", "reset by peer")  # the latter where something was still on its way to it
    assert any(how in second["left alone"] for how in ended), "connections end with the group, and not only with its process"
