"""Files that can be read in parts, and those that cannot. Several ranks: ``tests/train/distributed/test_loading.py``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.core_model_loading import Transpose, WeightConverter

from grpo_fast.config import Config
from grpo_fast.train import stored_weights
from grpo_fast.train.adapter_start import reader
from grpo_fast.train.policy_source import PolicySource
from grpo_fast.train.stored_weights import NotInPartsError, StoredWeights, give_memory, hollow_model, is_hollow

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"


def hollow(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    place = {"pretrained_model_name_or_path": str(directory)}
    return hollow_model(AutoConfig.from_pretrained(directory), CPU, arguments={"dtype": dtype}, place=place)


def stored(directory: Path, model: PreTrainedModel | None = None) -> StoredWeights:
    return StoredWeights(model or hollow(directory), reader(str(directory), None, local_files_only=True))


@pytest.fixture(params=["1GB", "20KB"])
def tied(request: pytest.FixtureRequest, sizes: dict[str, Any], tmp_path: Path) -> Path:
    """Directory of a model whose head is its embedding, in one file or in several."""
    torch.manual_seed(3)
    config = AutoConfig.for_model("llama", **sizes, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size=request.param)
    assert (tmp_path / INDEX).exists() == (request.param == "20KB")
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_filled_model_is_the_loaded_one(tied: Path, dtype: torch.dtype) -> None:
    model, true = hollow(tied, dtype), AutoModelForCausalLM.from_pretrained(tied, dtype=dtype)
    assert all(is_hollow(weight) and weight.untyped_storage().nbytes() < 8 for weight in model.parameters())
    files = stored(tied, model)
    give_memory(model.parameters())
    files.fill(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected, found = true.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == dtype for name, value in expected.items())
    buffers = dict(true.named_buffers())
    assert len(buffers) > 0
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    tokens = torch.arange(8)[None]
    assert torch.equal(model(tokens).logits, true(tokens).logits)


def store_twice(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1


def rename(weights: dict[str, torch.Tensor]) -> None:
    for name in list(weights):
        weights[name.removeprefix("model.")] = weights.pop(name)


def add(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def cut(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = weights["model.norm.weight"][:7].clone()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (store_twice, "model.embed_tokens.weight and lm_head.weight are one weight, and both are stored"),
        (rename, "model.embed_tokens.weight is not stored under this name"),
        (add, "model.layers.0.self_attn.rotary_emb.inv_freq is stored, which the model does not have"),
        (cut, r"model.norm.weight has the shape \(7,\) there, and \(32,\) in the model"),
    ],
)
@pytest.mark.parametrize("tied", ["1GB"], indirect=True)
def test_files_of_other_weights_are_not_read_in_parts(
    change: Callable[[dict[str, torch.Tensor]], None], told: str, tied: Path
) -> None:
    weights = load_file(tied / "model.safetensors")
    change(weights)
    save_file(weights, tied / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotInPartsError, match=told):
        stored(tied)


@pytest.mark.parametrize("tied", ["20KB"], indirect=True)
def test_a_file_that_is_missing_is_told(tied: Path) -> None:
    names = sorted(set(json.loads((tied / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    (tied / names[1]).unlink()
    with pytest.raises(NotInPartsError, match=r"a file that .* names is missing"):
        stored(tied)
    (tied / INDEX).unlink()
    with pytest.raises(NotInPartsError, match="it has neither"):
        stored(tied)


@pytest.mark.parametrize("tied", ["1GB"], indirect=True)
def test_where_transformers_does_more_than_to_copy_it_loads_all(tied: Path) -> None:
    for field, value, told in (
        ("quantization_config", {"quant_method": "fp8"}, "quantised"),
        ("transformers_weights", "other.safetensors", "names another file"),
    ):
        model = hollow(tied)
        setattr(model.config, field, value)
        with pytest.raises(NotInPartsError, match=told):
            stored(tied, model)
    short = hollow(tied, torch.bfloat16)
    stored(tied, short)
    short._keep_in_fp32_modules_strict = {"norm"}
    with pytest.raises(NotInPartsError, match="stay in float32"):
        stored(tied, short)
    (tied / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(NotInPartsError, match="lies beside it"):
        stored(tied)


def test_converted_weights_are_not_read_in_parts(sizes: dict[str, Any], tmp_path: Path) -> None:
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2, tie_word_embeddings=False))
    model.save_pretrained(tmp_path)
    with pytest.raises(NotInPartsError, match="is not stored under this name"):
        stored(tmp_path)


@pytest.mark.parametrize("tied", ["1GB"], indirect=True)
def test_nor_are_those_that_are_converted_under_their_own_names(tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turned = WeightConverter("q_proj.weight", "q_proj.weight", [Transpose(0, 1)])
    monkeypatch.setattr(stored_weights, "get_model_conversion_mapping", lambda _: [turned])
    with pytest.raises(NotInPartsError, match=r"q_proj\.weight is converted"):
        stored(tied)


def test_four_bits_are_made_of_whole_weights(wide_config: Callable[..., Config]) -> None:
    source = PolicySource(wide_config(use_peft=True, load_in_4bit=True, device="cpu"))
    with pytest.raises(NotInPartsError, match="load_in_4bit"):
        source.load_hollow()
