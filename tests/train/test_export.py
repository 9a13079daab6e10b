from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_fast.config import Config, ConfigError
from grpo_fast.run_dir import CONFIG_FILE
from grpo_fast.tasks.task import Task
from grpo_fast.train import CheckpointError, GRPOTrainer
from grpo_fast.train.export import export_merged

IDS = torch.tensor([[4, 5, 6, 7]])


@pytest.fixture
def trained(
    tiny_config: Callable[..., Config], letters: Task, share_of_vowels: Callable[..., list[float]]
) -> Callable[..., tuple[Path, torch.Tensor]]:
    """Makes a run, with the logits of its last policy."""

    def make(**changes: Any) -> tuple[Path, torch.Tensor]:
        config = tiny_config(learning_rate=1e-2, save_total_limit=5, **changes)
        with GRPOTrainer(config, task=letters, reward_funcs=[share_of_vowels]) as trainer, torch.no_grad():
            before = trainer.policy.model(IDS).logits
            trainer.train()
            after = trainer.policy.model(IDS).logits
        assert (after - before).abs().max() > 1e-2
        return config.output_dir, after

    return make


def logits(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def test_the_exported_model_is_the_trained_one(
    trained: Callable[..., tuple[Path, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, expected = trained(use_peft=True)
    with monkeypatch.context() as inside:
        inside.chdir(run / "checkpoint-6")
        export_merged(Path(), tmp_path / "from inside")
    assert torch.allclose(logits(tmp_path / "from inside"), expected, atol=1e-5)
    assert export_merged(run / "checkpoint-6", tmp_path / "model") == run / "checkpoint-6"
    assert torch.allclose(logits(tmp_path / "model"), expected, atol=1e-5)
    assert {file.name for file in (tmp_path / "model").iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("abc").input_ids
    export_merged(run / "checkpoint-6", tmp_path / "short", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "short", dtype="auto")
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert torch.allclose(model(IDS).logits.float(), expected, atol=0.2)


def test_what_a_gpu_trained_with_is_left_out(trained: Callable[..., tuple[Path, torch.Tensor]], tmp_path: Path) -> None:
    run, expected = trained(use_peft=True, gradient_checkpointing=True, gradient_checkpointing_mode="selective")
    config = Config.from_toml(run / CONFIG_FILE)
    on_a_gpu = config.replace(gradient_checkpointing_mode="offload", use_liger_kernel=True, torch_compile=True)
    for name, each in {"selective": config, "gpu": on_a_gpu}.items():
        (run / CONFIG_FILE).write_text(each.to_toml(), encoding="utf-8")
        export_merged(run, tmp_path / name)
        assert torch.allclose(logits(tmp_path / name), expected, atol=1e-5)


def test_of_a_run_the_checkpoint_is_taken_that_its_summary_names(
    trained: Callable[..., tuple[Path, torch.Tensor]], tmp_path: Path
) -> None:
    run, last = trained(use_peft=True)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    (run / "summary.json").write_text(json.dumps(summary | {"use": {"checkpoint": "checkpoint-3"}}), encoding="utf-8")
    assert export_merged(run, tmp_path / "best") == run / "checkpoint-3"
    assert not torch.allclose(logits(tmp_path / "best"), last, atol=1e-4)
    older = summary | {"step": 3, "use": {"checkpoint": "checkpoint-3"}}
    (run / "summary.json").write_text(json.dumps(older), encoding="utf-8")
    assert export_merged(run, tmp_path / "resumed") == run / "checkpoint-6", "the summary is from before it was resumed"
    (run / "summary.json").unlink()
    assert export_merged(run, tmp_path / "newest") == run / "checkpoint-6"


def test_what_cannot_be_exported_is_told(trained: Callable[..., tuple[Path, torch.Tensor]], tmp_path: Path) -> None:
    run, _ = trained()
    with pytest.raises(ConfigError, match=r"trained no adapters: .*checkpoint-\d holds the whole model already"):
        export_merged(run, tmp_path / "model")
    with pytest.raises(ConfigError, match=r"is neither a run nor a checkpoint of one"):
        export_merged(tmp_path / "nowhere", tmp_path / "model")
    with pytest.raises(ConfigError, match=r"is in use; name a new or empty directory"):
        export_merged(run, run)
    with pytest.raises(ConfigError, match=r"toml/model cannot be written \(\S*/config.toml is a file\); name another"):
        export_merged(run, run / CONFIG_FILE / "model")
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / CONFIG_FILE).write_text((run / CONFIG_FILE).read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(CheckpointError, match="young has no checkpoint yet"):
        export_merged(tmp_path / "young", tmp_path / "model")


@pytest.mark.parametrize("there", [True, False])
def test_half_a_model_is_not_left_where_it_finds_no_room(
    there: bool, trained: Callable[..., tuple[Path, torch.Tensor]], tmp_path: Path
) -> None:
    run, _ = trained(use_peft=True)
    if there:
        (tmp_path / "model").mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write \S*/model: .*[Ff]ile too large.*; make room there, or name"):
            export_merged(run, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "model").exists()
    export_merged(run, tmp_path / "model")
