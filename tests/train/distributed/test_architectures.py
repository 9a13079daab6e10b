"""Models of every common architecture, trained by two ranks, whole and in shards, and by one process: the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.system.command_line import CommandLine
from tests.train.distributed.launches import COMMON, forked_ranks, random_model, trace
from tests.train.distributed.rank_program import play

PROGRAM = "tests.train.distributed.architecture_program"
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 4, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 32},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 32},
    "phi3": {},
    "gpt_neox": {"head_dim": None},
}
WAYS = ("no_shard", "full_shard")


def settings(model: Path, directory: Path, *, fsdp: str) -> dict[str, Any]:
    return COMMON | {"model": str(model), "max_steps": 2, "fsdp": fsdp, "output_dir": str(directory)}


@pytest.fixture(scope="module")
def models(sizes: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of tiny models with random weights, by architecture."""
    directory = tmp_path_factory.mktemp("models")
    for kind, changes in KINDS.items():
        random_model(kind, sizes | changes).save_pretrained(directory / kind)
        tokenizer.save_pretrained(directory / kind)
    return directory


@pytest.fixture(scope="module")
def ranks(models: Path, tmp_path_factory: pytest.TempPathFactory, forks: CommandLine) -> tuple[Path, list[dict[str, Any]]]:
    """What two ranks of one launch made of all of them, and where their runs are."""
    directory = tmp_path_factory.mktemp("ranks")
    names = {f"{kind} {fsdp}": (kind, fsdp) for kind in KINDS for fsdp in WAYS}
    wanted = {name: settings(models / kind, directory / name, fsdp=fsdp) for name, (kind, fsdp) in names.items()}
    (directory / "cases.json").write_text(json.dumps(wanted), encoding="utf-8")
    return directory, forked_ranks(forks, 2, PROGRAM, directory / "cases.json", directory)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_make_the_run_of_one_process(
    kind: str, models: Path, ranks: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    alone = play(settings(models / kind, tmp_path / "run", fsdp="no_shard"))
    assert alone["error"] is None
    assert alone["at first"] != alone["at last"], "nothing was trained"
    expected = trace(tmp_path / "run")
    assert max(row["grad_norm"] for row in expected) > 0.01, "the guard"
    directory, found = ranks
    for fsdp in WAYS:
        name = f"{kind} {fsdp}"
        assert [rank[name]["error"] for rank in found] == [None, None]
        assert found[0][name]["weights"] == found[1][name]["weights"], "ranks hold different weights"
        assert (torch.tensor(found[0][name]["weights"]) - torch.tensor(alone["weights"])).abs().max() < 1e-6
        parts = 2 if fsdp == "full_shard" else 1
        assert found[0][name]["numbers held"] == pytest.approx(len(alone["weights"]) / parts, rel=0.05)
        for row, true in zip(trace(directory / name), expected, strict=True):
            assert row == pytest.approx(true, rel=1e-5, abs=1e-6, nan_ok=True)
            assert (row["reward"], row["num_tokens"]) == (true["reward"], true["num_tokens"]), "other completions were sampled"
