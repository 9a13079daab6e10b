"""What two ranks that were started differently make of each other; they are processes of ``start_program.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.system.command_line import CommandLine
from grpo_fast.config import Config, ConfigError
from grpo_fast.train.distributed import ALONE
from grpo_fast.train.handshake import check_ranks, shake_hands
from tests.train.distributed.launches import COMMON, forked_ranks, torchrun

PROGRAM = "tests.train.distributed.start_program"


@pytest.fixture(scope="module")
def output(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, forks: CommandLine) -> Path:
    """What two ranks of one launch were told, and the run that they made in the end."""
    directory = tmp_path_factory.mktemp("starts")
    output = directory / "runs"
    output.mkdir()
    (directory / "settings.json").write_text(json.dumps(COMMON | {"model": str(tiny_model), "max_steps": 1}), encoding="utf-8")
    forked_ranks(forks, 2, PROGRAM, directory / "settings.json", output)
    return output


@pytest.fixture
def found(output: Path) -> list[dict[str, Any]]:
    """What each rank was told, by the way in which they differed."""
    return [json.loads((output / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "told"),
    {
        "settings": ["learning_rate (0.001 on rank 0; 1e-05 on rank 1)", "seed (7 on rank 0; 8 on rank 1)"],
        "generations": ["num_generations (4 on rank 0; 2 on rank 1)"],
        "shards": ["fsdp ('full_shard' on rank 0; 'no_shard' on rank 1)"],
        "resume": ["resume (False on rank 0; True on rank 1)"],
        "directories": ["apart 0 of rank 0 is another directory than that of rank 1", "apart 1 on host", "nodes share"],
        "new directories": ["new 0 of rank 0 is another directory than that of rank 1"],
        "unwritable": ["run cannot be written to by rank 1", "Too many open files", "fsdp='full_shard'"],
        "prompts": ["training prompts ('24 of sha256", "on rank 0; '24 of sha256", "same command, configuration, packages"],
        "one rank's data": ["prompt"],
        "weights": ["the weights of the model ('sha256", "on rank 0; 'sha256", "same command, configuration, packages"],
        "sharded weights": ["the weights of the model ('sha256", "on rank 0; 'sha256"],
        "servers": ["rollout='vllm-http': nobody answers"],
        "uneven nodes": ["as many ranks on each node; of 2 there are 1 on the node of rank 0, 2 on the node of rank 1"],
        "untold nodes": ["LOCAL_WORLD_SIZE", "fsdp='full_shard'"],
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ranks_that_were_started_differently_are_all_told(case: str, told: list[str], found: list[dict[str, Any]]) -> None:
    assert found[0][case] == found[1][case], "each has the same error"
    assert found[0][case].startswith("ConfigError: ")
    for part in told:
        assert part in found[0][case]


@pytest.mark.slow
def test_servers_are_asked_by_rank_0_alone(found: list[dict[str, Any]]) -> None:
    assert [rank["asked"] for rank in found] == [["http://127.0.0.1:8000"], []]


@pytest.mark.slow
def test_ranks_that_were_started_alike_train_and_a_refusal_leaves_nothing_behind(found: list[dict[str, Any]]) -> None:
    assert [rank["alike"] for rank in found] == [None, None]
    assert [rank["left"] for rank in found] == [["apart 0", "apart 1"]] * 2


@pytest.mark.slow
def test_a_run_is_resumed_by_whatever_path_each_rank_has_to_it(found: list[dict[str, Any]], output: Path) -> None:
    assert [rank["other path"] for rank in found] == [None, None]
    assert (output / "alike" / "checkpoint-2" / "manifest.json").is_file()


@pytest.mark.slow
def test_ranks_that_have_nothing_to_sample_are_told(output: Path) -> None:
    events = [json.loads(line) for line in (output / "alike" / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    told = [row["message"] for row in events if row["event"] == "warn"]
    assert any("prompts_per_step=1 with 2 ranks: in each step 1 sample nothing" in message for message in told)


@pytest.mark.slow
def test_what_all_ranks_would_say_is_said_once(tiny_model: Path, tmp_path: Path) -> None:
    flags = ["--model", tiny_model, "--dataset", "none.jsonl", "--max-completion-length", "8", "--output-dir", "run"]
    done = torchrun(2, "grpo_fast", "train", *flags, cwd=tmp_path, options=("--module",))
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "none.jsonl" in done.stderr
    assert not (tmp_path / "run").exists()


def test_one_process_has_nobody_to_compare_with(tmp_path: Path) -> None:
    assert not shake_hands(Config(output_dir=tmp_path / "new" / "run", fsdp="hybrid_shard"), ALONE, resume=False)
    assert shake_hands(Config(output_dir=tmp_path / "new" / "run"), ALONE, resume=True)
    assert not list(tmp_path.iterdir())


def test_what_one_process_alone_can_do_is_refused_to_several() -> None:
    servers = {"rollout": "vllm-http", "vllm_server_urls": ["http://127.0.0.1:8000"], "max_staleness": 1}
    with pytest.raises(ConfigError, match=r"vllm_transport='ipc' with 4 processes: .* choose 'shared_memory', or 'nccl'"):
        check_ranks(Config.parse(servers | {"vllm_transport": "ipc"}), 4)
    check_ranks(Config.parse(servers), 4)
    check_ranks(Config(), 4)
    check_ranks(Config(rollout="vllm"), 4)
