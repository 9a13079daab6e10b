"""TRL's trainer with the fused loss beside TRL's own: the same losses, gradients, weights and metrics."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.system.arguments import checkpointing
from grpo_fast.assets import embedded_model_dir
from grpo_fast.tasks.arithmetic import arithmetic_task

trl = pytest.importorskip("trl", reason="TRL is not installed; the comparison needs it")
pytestmark = pytest.mark.filterwarnings(  # TRL 1.16's own, with transformers 5.23 and on a CPU
    "ignore:`(is_)?gradient_checkpointing:FutureWarning", "ignore:.*pin_memory:UserWarning", "ignore:.*luspo:UserWarning"
)

B, L, PROMPT, V = 6, 40, 5, 3001
LOSSES: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "grpo": {"loss_type": "grpo", "beta": 0.1},
    "grpo two-sided": {"loss_type": "grpo", "delta": 1.3, "beta": 0.1, "use_bias_correction_kl": False},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo", "entropy_coef": 0.05},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo", "beta": 0.1},
    "off-policy mask": {"loss_type": "dapo", "off_policy_mask_threshold": 0.01, "beta": 0.1},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01, "beta": 0.1},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.01},
    "luspo token": {"loss_type": "luspo"},
    "high entropy": {"loss_type": "dapo", "top_entropy_quantile": 0.3, "beta": 0.1},
    "gspo high entropy": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 0.01,
        "top_entropy_quantile": 0.3,
    },
    "bonus of high entropy": {"loss_type": "grpo", "top_entropy_quantile": 0.3, "entropy_coef": 0.05},
    "adaptive entropy": {"loss_type": "dapo", "use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef": 0.01},
}


def unlike_rewards(completions: list[str], **_: Any) -> list[float]:
    """A reward that hardly any two completions share, so that every group has an advantage."""
    return [sum(map(ord, text)) % 17 / 17 + 0.1 * len(text) for text in completions]


def trainer(cls: Any, folder: Path, *, model: Any = None, **options: Any) -> Any:
    task = arithmetic_task(size=16, eval_size=4, seed=0)
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        **checkpointing(on=False),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 8,
        "temperature": 1.5,
        "learning_rate": 0.1,
        "optim": "sgd",  # Adam would turn the rounding of a gradient near 0 into a whole step
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    return cls(
        model=model or AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(embedded_model_dir()),
        reward_funcs=unlike_rewards,
        args=trl.GRPOConfig(**settings | options),
        train_dataset=Dataset.from_list([dict(task.train[i]) for i in range(len(task.train))]),
    )


def fused_class() -> Any:
    from grpo_fast.integrations import FusedGRPOTrainer

    return FusedGRPOTrainer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose vocabulary is large enough for the chunked pass."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=V, max_position_embeddings=64, **sizes, eos_token_id=1)).save_pretrained(folder)
    return folder


def micro_batch(model: Any, *, temperature: float = 1.0, tools: bool = False) -> dict[str, Any]:
    """Completions of unlike lengths, one without tokens, one without advantage; the policy has moved since they were made."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.zeros(B, L, dtype=torch.long)
    for row, length in enumerate([L, 11, 0, 30, 1, 25]):
        mask[row, :length] = 1
    inputs = {
        "prompt_ids": torch.randint(2, V, (B, PROMPT), generator=generator),
        "prompt_mask": torch.ones(B, PROMPT, dtype=torch.long),
        "completion_ids": torch.randint(2, V, (B, L), generator=generator),
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -0.7, 0.9, 0.0, 0.4, -1.3]),
        "num_items_in_batch": mask.sum() * 2.0,
    }
    with torch.no_grad():
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        logits = (model(input_ids=ids).logits[:, PROMPT - 1 : -1] / temperature).log_softmax(-1)
        now = logits.gather(2, inputs["completion_ids"][..., None])[..., 0]
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        inputs[name] = now + 0.3 * torch.randn(B, L, generator=generator)
    inputs["old_per_token_logps"][:2] -= 0.1  # a whole sequence is clipped too
    if tools:
        inputs["tool_mask"] = (torch.rand(B, L, generator=generator) > 0.3).long()
    return inputs


def loss_and_gradients(made: Any, inputs: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor], dict[str, list[float]]]:
    made.model.train()
    made.current_gradient_accumulation_steps = 3
    made.model.zero_grad()
    loss = made._compute_loss(made.model, dict(inputs))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, copy.deepcopy(dict(made._metrics["train"]))


def assert_same(ours: Any, theirs: Any, inputs: dict[str, Any]) -> None:
    found, expected = loss_and_gradients(ours, inputs), loss_and_gradients(theirs, inputs)
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name)
        assert gradient.abs().max() > 0, "the comparison says something"
    assert found[2].keys() == expected[2].keys()
    for name, values in expected[2].items():
        assert found[2][name] == pytest.approx(values, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("name", LOSSES)
def test_losses_gradients_and_metrics_are_trls(name: str, model_dir: Path, tmp_path: Path) -> None:
    options = LOSSES[name]
    ours, theirs = (
        trainer(cls, tmp_path, model=LlamaForCausalLM.from_pretrained(model_dir), **({"temperature": 0.8} | options))
        for cls in (fused_class(), trl.GRPOTrainer)
    )
    inputs = micro_batch(theirs.model, temperature=0.8)
    assert_same(ours, theirs, inputs)
    clipped = ours._metrics["train"].get("clip_ratio/region_mean", ours._metrics["train"].get("cispo_clip_ratio"))
    assert clipped is None or 0 < clipped[0] < 1, "some ratios are clipped"
    del inputs["old_per_token_logps"]
    assert_same(ours, theirs, inputs)
    assert_same(ours, theirs, micro_batch(theirs.model, tools=True))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("loss_type", ["dapo", "sapo"])
def test_the_ratio_to_the_rollout_engine(loss_type: str, per_token: bool, model_dir: Path, tmp_path: Path) -> None:
    ours, theirs = (
        trainer(cls, tmp_path, model=LlamaForCausalLM.from_pretrained(model_dir), loss_type=loss_type, beta=0.1)
        for cls in (fused_class(), trl.GRPOTrainer)
    )
    ours.use_vllm = theirs.use_vllm = True  # what TRL's loss reads; no engine is asked for anything
    ratio = torch.tensor([[0.5], [1.3], [1.0], [0.9], [0.0], [2.0]])
    if per_token:
        ratio = ratio * (torch.arange(L) % 3)
    assert_same(ours, theirs, micro_batch(theirs.model) | {"importance_sampling_ratio": ratio})


def test_vespo_and_the_mask_against_the_rollout_engine(model_dir: Path, tmp_path: Path) -> None:
    options = {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_mask", "off_policy_mask_threshold": 0.01}
    ours, theirs = (
        trainer(cls, tmp_path, model=LlamaForCausalLM.from_pretrained(model_dir), **options)
        for cls in (fused_class(), trl.GRPOTrainer)
    )
    ours.use_vllm = theirs.use_vllm = True
    inputs = micro_batch(theirs.model)
    inputs["sampling_per_token_logps"] = inputs["old_per_token_logps"] + torch.tensor([0.3, -0.3, 0.0, 0.0, 0.3, 0.3])[:, None]
    ratio = torch.linspace(0.8, 1.2, L).expand(B, L).masked_fill(inputs["completion_mask"] == 0, 1.0)
    assert_same(ours, theirs, inputs | {"importance_sampling_ratio": ratio})


def test_evaluation_and_a_batch_of_nothing_are_trls(model_dir: Path, tmp_path: Path) -> None:
    ours, theirs = (
        trainer(cls, tmp_path, model=LlamaForCausalLM.from_pretrained(model_dir), beta=0.1)
        for cls in (fused_class(), trl.GRPOTrainer)
    )
    inputs = micro_batch(theirs.model)
    for made in (ours, theirs):
        made.model.eval()
    with torch.no_grad():
        found, expected = (made._compute_loss(made.model, dict(inputs)).item() for made in (ours, theirs))
    assert found == pytest.approx(expected, rel=1e-5)
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    loss, gradients, _ = loss_and_gradients(ours, inputs)
    assert loss == 0
    assert gradients
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_scoring_passes_agree_with_the_loss_bit_for_bit(model_dir: Path, tmp_path: Path) -> None:
    ours = trainer(fused_class(), tmp_path, model=LlamaForCausalLM.from_pretrained(model_dir))
    inputs = micro_batch(ours.model)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with torch.no_grad():
        old, entropy, _ = ours._get_per_token_logps_and_entropies(ours.model, ids, mask, L, compute_entropy=True)
    assert (old[inputs["completion_mask"] == 0] == 0).all()
    assert (entropy[inputs["completion_mask"] == 1] > 1).all()
    loss, _, metrics = loss_and_gradients(ours, inputs | {"old_per_token_logps": old})
    on_policy = {name: value for name, value in inputs.items() if name != "old_per_token_logps"}
    assert loss_and_gradients(ours, on_policy)[0] == pytest.approx(loss, abs=1e-7)
    assert metrics["clip_ratio/region_mean"][-1] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dapo", "num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 2},
        {"loss_type": "grpo", "beta": 0.2, "mask_truncated_completions": True, "epsilon": 0.01, "num_iterations": 2},
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "steps_per_generation": 2},
        {"top_entropy_quantile": 0.3, "entropy_coef": 0.01, "gradient_accumulation_steps": 2},
    ],
    ids=["dapo in parts", "kl, truncated masked", "luspo off-policy", "tokens of high entropy"],
)
def test_whole_runs_move_the_weights_as_trl_does(options: dict[str, Any], tmp_path: Path) -> None:
    weights, logs = [], []
    for cls in (fused_class(), trl.GRPOTrainer):
        made = trainer(cls, tmp_path, max_steps=6, **options)
        before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
        made.train()
        weights.append({name: p.detach() - before[name] for name, p in made.model.named_parameters()})
        logs.append(made.state.log_history[:-1])
    timings = {"epoch", "step_time", "num_tokens"}
    assert any(0 < row.get("completions/clipped_ratio", 0) < 1 for row in logs[1]), "some completions are truncated"
    for mine, theirs in zip(*logs, strict=True):
        assert mine.keys() == theirs.keys()
        for name in theirs.keys() - timings:
            same = mine[name] is None if theirs[name] is None else mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5)
            assert same, name
    for name, step in weights[1].items():
        torch.testing.assert_close(weights[0][name], step, rtol=0, atol=1e-5, msg=name)
    assert max(step.abs().max() for step in weights[1].values()) > 1e-3, "the weights have moved"


REFUSED: dict[str, dict[str, Any]] = {
    "loss_type='gmpo'": {"loss_type": "gmpo"},
    "use_liger_kernel=True": {"use_liger_kernel": True},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_fused_is_refused_by_name(message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message + r".*use trl\.GRPOTrainer"):
        trainer(fused_class(), tmp_path, **REFUSED[message])


def test_a_change_of_trls_formula_is_noticed(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = trainer(fused_class(), tmp_path, model=LlamaForCausalLM.from_pretrained(model_dir))
    own = trl.GRPOTrainer._compute_loss
    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", lambda *given: own(*given) * 1.01)
    with pytest.raises(RuntimeError, match="where this version of TRL computes"):
        loss_and_gradients(ours, micro_batch(ours.model))


def test_models_with_another_head_are_refused(model_dir: Path) -> None:
    from grpo_fast.integrations.trl import add_fused_loss

    model = LlamaForCausalLM.from_pretrained(model_dir)
    model.config.logit_scale = 0.5  # Llama does not read it
    with pytest.raises(ValueError, match="makes logits in a way"):
        add_fused_loss(model, temperature=1.0)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="the head is a Sequential"):
        add_fused_loss(model, temperature=1.0)


@pytest.fixture
def cohere() -> Any:
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CohereForCausalLM(CohereConfig(vocab_size=97, logit_scale=0.25, pad_token_id=0, **sizes))


def test_a_models_own_logit_scale_is_read(cohere: Any) -> None:
    from grpo_fast.integrations.trl import add_fused_loss

    ids = torch.arange(1, 9)[None]
    expected = (cohere(input_ids=ids).logits[0, :-1] / 0.7).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    add_fused_loss(cohere, temperature=0.7)
    found = cohere(input_ids=ids, labels=ids, fused_lm_head=True).log_probs[0]
    torch.testing.assert_close(found, expected)
    assert cohere(input_ids=ids).logits.shape == (1, 8, 97), "other calls are the model's own"


def test_adapters_outside_the_head_train(model_dir: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    made = []
    for cls in (fused_class(), trl.GRPOTrainer):
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        made.append(trainer(cls, tmp_path, model=peft.get_peft_model(LlamaForCausalLM.from_pretrained(model_dir), config)))
    assert_same(*made, micro_batch(made[1].model))


def test_without_trl_the_module_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['trl'] = None\n"
        "import grpo_fast.integrations as i\n"
        "try: i.FusedGRPOTrainer\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'grpo-fast[trl]'" in done.stdout
