"""Models that ranks load in parts: bit for bit what they would load whole, in a fraction of the memory."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.system.command_line import CommandLine
from tests.train.distributed.launches import forked_ranks, random_model
from tests.train.distributed.loading_program import TRY_MEMORY

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "tied llama": {"tie_word_embeddings": True, "vocab_size": 37},  # which neither two nor four divide
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"sliding_window": 4, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 32},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 32},
    "gpt_neox": {"head_dim": None},  # whose head has another name in files: it is loaded whole
}
WAYS: dict[str, dict[str, Any]] = {
    "full": {"fsdp": "full_shard"},
    "lora": {"fsdp": "shard_grad_op", "use_peft": True, "lora_r": 4},
    "parallel head": {"fsdp": "full_shard", "fsdp_parallel_head": True},
    "bfloat16": {"fsdp": "full_shard", "dtype": "bfloat16"},
    "bfloat16 weights": {"fsdp": "full_shard", "dtype": "bfloat16", "weights_dtype": "bfloat16"},
    "bfloat16 lora": {"fsdp": "full_shard", "dtype": "bfloat16", "use_peft": True, "lora_r": 4},
    "checkpointing": {"fsdp": "full_shard", "gradient_checkpointing": True},
}
CASES = {f"{kind} full": (kind, "full") for kind in (*KINDS, "embedded")}
CASES |= {f"{kind} lora": (kind, "lora") for kind in ("llama", "gemma3_text", "gpt_neox", "embedded")}
UNEVEN = {f"tied llama {way}": ("tied llama", way) for way in WAYS}
CASES |= UNEVEN
NUM_RANKS = {2: CASES, 4: UNEVEN}
"""What is loaded by how many: other kinds of models are cut by four as they are by two."""
LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 14, "vocab_size": 8192}


@pytest.fixture(scope="module")
def models(sizes: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of models with random weights, in one file or in several."""
    directory = tmp_path_factory.mktemp("models")
    for kind, changes in KINDS.items():
        model = random_model(kind.rpartition(" ")[2], sizes | changes)
        model.generation_config.temperature = 0.75
        model.generation_config.do_sample = True
        model.save_pretrained(directory / kind, max_shard_size="20KB" if kind == "qwen2" else "1GB")
        tokenizer.save_pretrained(directory / kind)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": False}
    LlamaForCausalLM(LlamaConfig(**sizes | LARGE | heads)).save_pretrained(directory / TRY_MEMORY)
    tokenizer.save_pretrained(directory / TRY_MEMORY)
    return directory


@pytest.fixture(scope="module")
def launch(models: Path, tmp_path_factory: pytest.TempPathFactory, forks: CommandLine) -> Callable[[int], list[dict[str, Any]]]:
    """Tells what each of several ranks found; they are launched once."""
    common = {"device": "cpu", "max_completion_length": 8}

    @functools.cache
    def found(num_ranks: int) -> list[dict[str, Any]]:
        directory = tmp_path_factory.mktemp("ranks")
        cases = {
            name: common | WAYS[way] | {"model": kind if kind == "embedded" else str(models / kind)}
            for name, (kind, way) in (NUM_RANKS[num_ranks] | {TRY_MEMORY: (TRY_MEMORY, "full")}).items()
        }
        file = directory / "cases.json"
        file.write_text(json.dumps(cases), encoding="utf-8")
        return forked_ranks(forks, num_ranks, "tests.train.distributed.loading_program", file, directory)

    return found


@pytest.fixture(params=NUM_RANKS)
def found(request: pytest.FixtureRequest, launch: Callable[[int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What each of several ranks found."""
    return launch(request.param)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("found", "name"), [(number, name) for number, names in NUM_RANKS.items() for name in names], indirect=["found"]
)
def test_what_is_loaded_in_parts_is_what_is_loaded_whole(name: str, found: list[dict[str, Any]]) -> None:
    for rank in found:
        told = rank[name]
        assert told["in parts"] == (not name.startswith("gpt_neox"))
        assert told["differing"] == []
        assert told["same logits"]
        assert told["layout"][0] == told["layout"][1]
        assert told["model config"]
        assert told["generation config"]
        assert told["modes"][0] == told["modes"][1]
        assert told["told apart"]
        assert told["trained"] > 10
        assert told["not resumed"] == []
        assert told["not made"] == []


@pytest.mark.slow
def test_a_rank_that_loads_in_parts_holds_its_part_and_a_unit(found: list[dict[str, Any]]) -> None:
    for rank in found:
        told = rank[TRY_MEMORY]
        assert told["all"] > 200e6
        assert told["whole"] > told["all"], "the guard"
        assert told["in parts"] < told["all"] / len(found) + 4 * told["largest unit"] + 16e6
