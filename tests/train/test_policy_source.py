from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2PreTrainedModel,
    GPT2Config,
    Llama4TextConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
)

from grpo_fast.config import Config, ConfigError
from grpo_fast.run_dir import CONFIG_FILE
from grpo_fast.train.policy_source import PolicySource, outline_of, pick_device


def test_the_embedded_model_loads() -> None:
    source = PolicySource(Config(max_completion_length=16))
    assert not source.chat
    assert source.max_prompt_length == source.context_length - 16
    policy = source.load()
    assert policy.autocast_dtype is None
    assert policy.device.type == "cpu"
    assert all(parameter.dtype == torch.float32 for parameter in policy.model.parameters())


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot load model '.*/nowhere'.*Give a directory with config\.json"):
        PolicySource(Config(model=str(tmp_path / "nowhere")))


def test_a_run_is_no_model_and_its_checkpoints_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / CONFIG_FILE).touch()
    with pytest.raises(ConfigError, match=r"is the directory of a run, which has no checkpoint yet$"):
        PolicySource(Config(model=str(tmp_path)))
    for step in (10, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(ConfigError, match=r"of a run, whose checkpoints are checkpoint-8, checkpoint-10; name one$"):
        PolicySource(Config(model=str(tmp_path)))
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(
        ConfigError, match=r"/checkpoint-9': no such checkpoint is in that run, whose checkpoints are checkpoint-8, "
    ):
        PolicySource(Config(model=f"{tmp_path.name}/checkpoint-9"))  # and no hub is asked for it


def test_directory_without_weights_is_named(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    source = PolicySource(Config(model=str(tmp_path), max_completion_length=8))
    with pytest.raises(ConfigError, match="cannot load model"):
        source.load()


def test_damaged_weights_are_named(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    source = PolicySource(Config(model=str(tmp_path), max_completion_length=8))
    with pytest.raises(ConfigError, match="cannot load model"):
        source.load()


def test_weights_that_the_files_lack_are_named(tiny_model: Path, tmp_path: Path) -> None:
    """Drawn at random, they would be others on each rank, and others in the reference than in the policy."""
    whole = load_file(tiny_model / "model.safetensors")
    name, up = "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
    kinds = {
        f"no weights for {name}, {up}, which would": {key: weight for key, weight in whole.items() if key not in {name, up}},
        rf"{name} has the shape \(30, 32\) in its files, and \(28, 32\) by": whole | {name: torch.ones(30, 32)},
    }
    for told, weights in kinds.items():
        shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=f"cannot load model .*{told}"):
            PolicySource(Config(model=str(tmp_path), max_completion_length=8)).load()


def test_sizes_that_do_not_go_together_are_named(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    sizes = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"hidden_size": 33}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cannot load model .* \(33\) is not a multiple of"):
        PolicySource(Config(model=str(tmp_path), max_completion_length=8))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match=r"device='cuda' but torch sees no GPU; run `grpo-fast doctor`"):
        PolicySource(Config(device="cuda"))
    assert pick_device("auto") == torch.device("cpu")


def test_completion_that_leaves_no_room_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_completion_length=64 leaves no room .* context of 64 tokens; lower it$"):
        PolicySource(Config(model=str(tiny_model), max_completion_length=64))
    with pytest.raises(ConfigError, match=r"in embedded's context of 128 tokens; lower it, or name another model$"):
        PolicySource(Config())
    source = PolicySource(Config(model=str(tiny_model), max_completion_length=60, max_prompt_length=10))
    assert source.max_prompt_length == 4
    assert PolicySource(Config(model=str(tiny_model), max_completion_length=60, max_prompt_length=2)).max_prompt_length == 2


def test_an_outline_has_the_model_s_sizes_and_no_weights(tiny_config: Callable[..., Config]) -> None:
    source = PolicySource(tiny_config())
    outline, model = source.outline(), source.load().model
    assert {name: weight.shape for name, weight in outline.named_parameters()} == {
        name: weight.shape for name, weight in model.named_parameters()
    }
    assert all(weight.is_meta for weight in outline.parameters())


@pytest.mark.parametrize("said", [None, True])
def test_attention_is_torchs_own_where_the_model_has_it(
    tiny_model: Path,
    tmp_path: Path,
    sizes: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    said: bool | None,
) -> None:
    if said:  # as transformers 5.17 says of Gemma 2, whose softcap its sdpa leaves out
        monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    Gemma2ForCausalLM(Gemma2Config(**sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = [
        PolicySource(Config(model=str(model), max_completion_length=8, padding_free=False)).load().model
        for model in (tiny_model, tmp_path)
    ]
    assert [model.config._attn_implementation for model in found] == ["sdpa", "eager"]
    source = PolicySource(Config(model=str(tmp_path), max_completion_length=8))
    assert source.outline().config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match=r"'sdpa': Gemma2ForCausalLM has no such attention; leave it at 'auto'"):
        PolicySource(Config(model=str(tmp_path), max_completion_length=8, attn_implementation="sdpa")).outline()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            Qwen2_5_VLConfig(),
            r"model 'seen' is of type 'qwen2_5_vl', for which transformers has no causal language model; name one",
        ),
        (GPT2Config(n_embd=33, n_head=2), "model 'seen' cannot be made: .*33"),
        (Llama4TextConfig(num_hidden_layers=1), r"Llama4ForCausalLM has no separate part that computes hidden states"),
    ],
    ids=["sees", "no such sizes", "no body"],
)
def test_a_model_that_is_no_plain_decoder_is_refused(kind: PreTrainedConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        outline_of(kind, Config(model="seen"))
    assert len(str(refusal.value)) < 250, "not the names of all models that there are"
