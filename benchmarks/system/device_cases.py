"""Whole training steps that are worth measuring on a GPU: models, sizes, and what is asked of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.system.smollm2 import export_smollm2, find_smollm2
from grpo_fast.assets import embedded_model_dir

_QWEN: dict[str, Any] = {"model_type": "qwen2", "max_position_embeddings": 32_768}
_LLAMA: dict[str, Any] = {"model_type": "llama", "max_position_embeddings": 131_072}
LAYOUTS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "max_position_embeddings": 8192,
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": _QWEN
    | {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": _QWEN
    | {
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": _QWEN
    | {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": _LLAMA
    | {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
"""Sizes of the models' own configurations."""
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@dataclass(frozen=True)
class StepCase:
    """A step of N = prompts x generations sequences."""

    name: str
    layout: str
    prompts: int
    generations: int
    completion_tokens: int
    sequences_per_microbatch: int
    """The same for every trainer."""
    prompt_tokens: int = 64
    weights: Literal["full", "lora", "qlora"] = "full"
    checkpointing: bool = False
    samples: bool = False
    """Whether each trainer samples by its own default engine; otherwise both are given the same completions."""
    num_steps: int = 4
    """Of which the first is left out."""
    seconds: float = 90.0
    """What it takes on an H100, about, model and both trainers included; a guess, to fill a budget with."""

    @property
    def tokens(self) -> int:
        """Of a step, prompts included."""
        return self.prompts * self.generations * (self.prompt_tokens + self.completion_tokens)

    def smoke(self) -> StepCase:
        """The same in miniature."""
        return dataclasses.replace(
            self, prompts=2, generations=2, prompt_tokens=4, completion_tokens=6, sequences_per_microbatch=2, num_steps=2
        )


CASES = (
    StepCase("1.5b-update", "qwen2.5-1.5b", 2, 8, 960, 16, checkpointing=True, seconds=110),
    StepCase("8b-qlora", "llama-3.1-8b", 1, 8, 4096, 1, weights="qlora", checkpointing=True, num_steps=3, seconds=220),
    StepCase("smollm2-step", "smollm2-135m", 8, 8, 256, 32, samples=True, seconds=110),
    StepCase("0.5b-update", "qwen2.5-0.5b", 2, 8, 960, 8, seconds=80),
    StepCase("7b-lora", "qwen2.5-7b", 2, 8, 960, 2, weights="lora", checkpointing=True, num_steps=3, seconds=180),
    StepCase("8b-lora", "llama-3.1-8b", 2, 8, 960, 2, weights="lora", checkpointing=True, num_steps=3, seconds=180),
)
"""The most important first."""


def targets(case: StepCase, rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is asked of a case, what was measured of it, and whether it is met; ``None`` where a trainer has no number.

    Args:
        case: which.
        rows: of each trainer.
    """
    ours, trl = rows.get("grpo_fast", {}), rows.get("trl", {})

    def ratio(name: str, above: Mapping[str, Any], below: Mapping[str, Any]) -> float | None:
        return above[name] / below[name] if name in above and name in below else None

    found: list[tuple[str, float | None, float, bool]] = []
    if case.name == "1.5b-update":
        found.append(("TRL's training phase over ours is at least", ratio("train_s", trl, ours), 1.8, True))
        found.append(("our peak memory over TRL's is at most", ratio("peak_gib", ours, trl), 0.5, False))
    if case.name == "8b-qlora":
        found.append(("our peak memory in GiB is under", ours.get("peak_gib"), 40.0, False))
    rows_of_targets = []
    for text, value, bound, least in found:
        met = None if value is None else value >= bound if least else value <= bound
        rows_of_targets.append({"target": text, "bound": bound, "value": value, "met": met})
    return rows_of_targets


def model_directory(layout: str, folder: Path, *, smoke: bool) -> tuple[Path, str]:
    """A model of a layout on the disk, made where it is missing.

    Returns:
        The directory, and what its weights are.
    """
    real = layout == "smollm2-135m" and not smoke and find_smollm2() is not None
    directory = folder / (f"{layout}-small" if smoke else layout)
    if not (directory / "config.json").exists():
        if real:
            export_smollm2(directory)
        else:
            _write_random(layout, directory, smoke=smoke)
    return directory, "SmolLM2-135M-Instruct, from a 4-bit GGUF file" if real else "random"


def _write_random(layout: str, directory: Path, *, smoke: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    sizes = LAYOUTS[layout] | (_SMALL | {"vocab_size": len(tokenizer)} if smoke else {})
    ends = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    settings = {name: value for name, value in sizes.items() if name != "model_type"} | ends
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() and not smoke else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(sizes["model_type"], **settings), dtype=torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
