"""Every objective against TRL's own loss."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.system.arguments import checkpointing
from grpo_fast.config import Config
from grpo_fast.objective import OBJECTIVES, decoupled_advantages
from grpo_fast.ops.loss_spec import LossBatch
from grpo_fast.ops.policy_loss import policy_loss
from grpo_fast.ops.sequence_weights import gamma_weights, off_policy_mask, sampler_log_ratios
from grpo_fast.train.entropy_control import EntropyControl
from grpo_fast.train.entropy_mask import entropy_threshold
from tests.objective.settings import LIMIT, settings

TRL_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    name: (name, {"loss_type": name}, {}) for name in ("grpo", "dr_grpo", "bnpo", "dapo", "cispo", "sapo", "vespo")
}
TRL_CASES["gspo"] = ("gspo", {"loss_type": "grpo", "importance_sampling_level": "sequence"}, {})
TRL_CASES["luspo"] = ("luspo", {"loss_type": "luspo", "importance_sampling_level": "sequence"}, {})
TRL_CASES |= {
    f"{key} with {what}": (name, trl, extra | more)
    for key, (name, trl, extra) in list(TRL_CASES.items())
    for what, more in {
        "kl": {"beta": 0.1},
        "entropy": {"entropy_coef": 0.05},
        "off-policy mask": {"off_policy_mask_threshold": 0.06},
    }.items()
}
TRL_CASES |= {f"{n} with delta": (n, TRL_CASES[n][1], {"delta": 1.5}) for n in ("grpo", "dapo", "gspo", "luspo")}


def _no_reward(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


class TrlRig:
    """TRL's trainers around one tiny random Llama, and hand-made inputs for their loss."""

    def __init__(self, directory: str) -> None:
        import trl
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        self.trl, self.directory = trl, directory
        words = {f"w{i}": i for i in range(29)} | {"<pad>": 29, "<eos>": 30, "<unk>": 31}
        splitter = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        splitter.pre_tokenizer = pre_tokenizers.Whitespace()
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=splitter, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
        )
        self.dataset = Dataset.from_list([{"prompt": "w1 w2"}, {"prompt": "w3 w4"}])
        torch.manual_seed(3)
        shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
        special = {"pad_token_id": 29, "eos_token_id": 30, "bos_token_id": None, "initializer_range": 0.4}
        # TRL loads the reference of beta > 0 from where the model came from.
        LlamaForCausalLM(LlamaConfig(**shape, **heads, **special)).save_pretrained(directory)
        self.model = LlamaForCausalLM.from_pretrained(directory).train()
        self.lengths = torch.tensor([7, 1, 4, 5, 3, 6])
        self.mask = (torch.arange(7)[None] < self.lengths[:, None]).long()
        self.advantages = torch.tensor([1.2, -0.4, 0.7, -1.1, 0.3, -0.6])
        self.prompt, self.completion = torch.randint(0, 29, (6, 3)), torch.randint(0, 29, (6, 7))
        with torch.no_grad():
            logprobs, _ = self.own_logprobs()
            self.old = self._spread(logprobs + 0.25 * torch.randn_like(logprobs))
            self.ref = self._spread(logprobs + 0.25 * torch.randn_like(logprobs))
            self.sampler = self._spread(logprobs + 0.25 * torch.randn_like(logprobs))

    def _spread(self, packed: torch.Tensor) -> torch.Tensor:
        return torch.zeros(6, 7).masked_scatter(self.mask.bool(), packed)

    def own_logprobs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies of the scored tokens, packed, at temperature 0.8, from the model's plain logits."""
        ids = torch.cat([self.prompt, self.completion], 1)
        attention = torch.cat([torch.ones_like(self.prompt), self.mask], 1)
        hidden = self.model.model(input_ids=ids, attention_mask=attention).last_hidden_state
        log_softmax = torch.log_softmax(self.model.lm_head(hidden).float() / 0.8, -1)[:, 2:-1]
        rows = log_softmax[self.mask.bool()]
        targets = self.completion[self.mask.bool()]
        return rows.gather(1, targets[:, None])[:, 0], -(rows.exp() * rows).sum(-1)

    def batch(self, config: Config) -> LossBatch:
        scored = self.mask.bool()
        return LossBatch(
            torch.repeat_interleave(torch.arange(6), self.lengths),
            self.advantages,
            OBJECTIVES[config.loss_type].loss_weights(self.lengths, max_completion_length=LIMIT),
            old_logprobs=self.old[scored],
            ref_logprobs=self.ref[scored],
            num_items_in_batch=float(self.lengths.sum()),
            sampling_logprobs=self.sampler[scored],
        )

    def inputs(self) -> dict[str, torch.Tensor]:
        return {
            "prompt_ids": self.prompt,
            "prompt_mask": torch.ones_like(self.prompt),
            "completion_ids": self.completion,
            "completion_mask": self.mask,
            "advantages": self.advantages,
            "old_per_token_logps": self.old,
            "ref_per_token_logps": self.ref,
            "sampling_per_token_logps": self.sampler,
            "old_logps": (self.old * self.mask).sum(1),
            "num_items_in_batch": self.lengths.sum().float(),
        }

    def trainer(self, kind: str, *, reward_funcs: Any = _no_reward, **arguments: Any) -> Any:
        config_type = getattr(self.trl, f"{kind}Config")
        arguments = {"per_device_train_batch_size": 6, "num_generations": 3, "temperature": 0.8, "beta": 0.0} | arguments
        trainer = getattr(self.trl, f"{kind}Trainer")(
            model=self.model,
            reward_funcs=reward_funcs,
            args=config_type(
                output_dir=self.directory,
                max_completion_length=LIMIT,
                report_to=[],
                use_cpu=True,
                bf16=False,
                **checkpointing(on=False),
                **arguments,
            ),
            train_dataset=self.dataset,
            processing_class=self.tokenizer,
        )
        trainer.current_gradient_accumulation_steps = 1
        return trainer


@pytest.fixture(scope="module")
def trl_rig(tmp_path_factory: pytest.TempPathFactory) -> TrlRig:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed; pip install 'grpo-fast[trl]' compares the losses with it")
    return TrlRig(str(tmp_path_factory.mktemp("trl")))


def of_trl(test: Any) -> Any:
    """Marks a test that builds TRL's trainers, whose own deprecation warnings are not ours."""
    for category in ("FutureWarning", "DeprecationWarning", "UserWarning"):
        test = pytest.mark.filterwarnings(f"ignore::{category}")(test)
    return pytest.mark.slow(test)


def gradient_of(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@of_trl
@pytest.mark.parametrize("case", sorted(TRL_CASES))
def test_loss_gradient_and_metrics_equal_trl(trl_rig: TrlRig, case: str) -> None:
    name, trl_arguments, extra = TRL_CASES[case]
    config = settings(name, **extra)
    clip = {"epsilon": config.epsilon, "epsilon_high": config.epsilon_high}
    trainer = trl_rig.trainer("GRPO", **trl_arguments, **clip, **extra)
    theirs = trainer.compute_loss(trainer.model, trl_rig.inputs())
    their_gradient = gradient_of(trl_rig.model, theirs)
    logprobs, entropy = trl_rig.own_logprobs()
    ours = policy_loss(logprobs, trl_rig.batch(config), spec=OBJECTIVES[name].spec(config), entropy=entropy)
    our_gradient = gradient_of(trl_rig.model, ours.loss)
    assert ours.loss.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-6)
    assert their_gradient.abs().max() > 1e-3
    reported = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    m = ours.metrics
    assert float(m.entropy_sum / m.num_tokens) == pytest.approx(reported["entropy"], rel=1e-5)
    assert ("kl" in reported) == ("beta" in extra)
    if "kl" in reported:
        assert float(m.kl_sum / m.num_tokens) == pytest.approx(reported["kl"], rel=1e-4)
    if name == "cispo":
        assert float(m.clip_high / m.num_ratios) == pytest.approx(reported["cispo_clip_ratio"])
    elif name == "vespo":
        phi = gamma_weights(logprobs, trl_rig.batch(config), OBJECTIVES[name].spec(config))
        assert phi.mean().item() == pytest.approx(reported["vespo/phi_seq_mean"], rel=1e-5)
        assert phi.std() > 0.05
    elif name != "sapo":
        for side in ("low", "high", "region"):
            found = float(getattr(m, f"clip_{side}") / m.num_ratios)
            assert found == pytest.approx(reported[f"clip_ratio/{side}_mean"])


@of_trl
def test_vespo_corrected_against_the_sampler_equals_trl(trl_rig: TrlRig) -> None:
    config = settings("vespo", vespo_k_pos=1.0, vespo_lambda_pos=1.5, vespo_k_neg=0.5, vespo_lambda_neg=2.5)
    kinds = {name: getattr(config, name) for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")}
    ratios = (0.4 * torch.randn(6, 7, generator=torch.Generator().manual_seed(2))).exp().masked_fill(trl_rig.mask == 0, 1.0)
    ratios[2, 1] = 0.0  # as token_mask leaves it
    trainer = trl_rig.trainer("GRPO", loss_type="vespo", **kinds)
    theirs = trainer.compute_loss(trainer.model, trl_rig.inputs() | {"importance_sampling_ratio": ratios})
    their_gradient = gradient_of(trl_rig.model, theirs)
    logprobs, _ = trl_rig.own_logprobs()
    batch, spec = trl_rig.batch(config), OBJECTIVES["vespo"].spec(config)
    corrections = sampler_log_ratios(ratios[trl_rig.mask.bool()], batch.sequence_index, num_sequences=6)
    corrected = batch._replace(sampler_log_ratios=corrections)
    ours = policy_loss(logprobs, corrected, spec=spec).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    torch.testing.assert_close(gradient_of(trl_rig.model, ours), their_gradient, rtol=1e-4, atol=1e-6)
    assert gamma_weights(logprobs, corrected, spec)[2] < 1e-3
    without = policy_loss(trl_rig.own_logprobs()[0], batch, spec=spec).loss
    assert not math.isclose(ours.item(), without.item(), rel_tol=1e-2)


@of_trl
@pytest.mark.parametrize("case", ["dapo with kl", "grpo with entropy", "gspo", "luspo with entropy", "cispo", "vespo with kl"])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.6])
def test_the_mask_by_entropy_equals_trl(trl_rig: TrlRig, case: str, share: float) -> None:
    name, trl_arguments, extra = TRL_CASES[case]
    config = settings(name, **extra)
    clip = {"epsilon": config.epsilon, "epsilon_high": config.epsilon_high}
    trainer = trl_rig.trainer("GRPO", top_entropy_quantile=share, **trl_arguments, **clip, **extra)
    theirs = trainer.compute_loss(trainer.model, trl_rig.inputs())
    their_gradient = gradient_of(trl_rig.model, theirs)
    logprobs, entropy = trl_rig.own_logprobs()
    keep = (entropy >= entropy_threshold([entropy.detach().numpy()], share)).float()
    batch = trl_rig.batch(config)._replace(importance_weights=keep, entropy_weights=keep, num_items_in_batch=float(keep.sum()))
    ours = policy_loss(logprobs, batch, spec=OBJECTIVES[name].spec(config), entropy=entropy).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(gradient_of(trl_rig.model, ours), their_gradient, rtol=1e-4, atol=1e-6)
    assert 0 < keep.sum() < 0.7 * len(keep)


@of_trl
def test_the_off_policy_mask_of_the_comparison_leaves_some_out(trl_rig: TrlRig) -> None:
    config = settings("dapo", off_policy_mask_threshold=0.06)
    kept = off_policy_mask(trl_rig.own_logprobs()[0], trl_rig.batch(config), OBJECTIVES["dapo"].spec(config))
    assert 0 < (~kept).sum() < (trl_rig.advantages < 0).sum()


@of_trl
@pytest.mark.parametrize("lengths", [[7, 1, 4, 5, 0, 2], [7, 1, 4, 0, 0, 0]], ids=["one masked", "a micro-batch masked"])
@pytest.mark.parametrize("case", ["dapo", "grpo", "gspo", "luspo", "dr_grpo", "cispo", "sapo", "vespo", "bnpo", "grpo with kl"])
def test_a_step_is_the_sum_of_trls_micro_batches(trl_rig: TrlRig, case: str, lengths: list[int]) -> None:
    name, trl_arguments, extra = TRL_CASES[case]
    config = settings(name, **extra)
    clip = {"epsilon": config.epsilon, "epsilon_high": config.epsilon_high}
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    trainer = trl_rig.trainer("GRPO", **trl_arguments, **clip, **extra, **sizes)
    trainer.current_gradient_accumulation_steps = 2
    counts = torch.tensor(lengths)
    mask = (torch.arange(7)[None] < counts[:, None]).long()
    inputs = trl_rig.inputs() | {"completion_mask": mask, "num_items_in_batch": counts.sum().float()}
    parts = [
        {key: value if value.ndim == 0 else value[rows] for key, value in inputs.items()} for rows in ([0, 1, 2], [3, 4, 5])
    ]
    each = [trainer.compute_loss(trainer.model, part) for part in parts]
    theirs, their_gradient = sum(loss.item() for loss in each), gradient_of(trl_rig.model, sum(each))
    scored, own = mask.bool(), mask[trl_rig.mask.bool()].bool()
    logprobs, _ = trl_rig.own_logprobs()
    batch = trl_rig.batch(config)._replace(
        sequence_index=torch.repeat_interleave(torch.arange(6), counts),
        loss_weights=OBJECTIVES[name].loss_weights(counts, max_completion_length=LIMIT),
        old_logprobs=trl_rig.old[scored],
        ref_logprobs=trl_rig.ref[scored],
        sampling_logprobs=trl_rig.sampler[scored],
    )
    ours = policy_loss(logprobs[own], batch, spec=OBJECTIVES[name].spec(config)).loss
    gradient = gradient_of(trl_rig.model, ours)
    if case == "bnpo":  # TRL's is a mean of each micro-batch's own mean
        assert not torch.allclose(gradient, their_gradient, rtol=1e-2)
        return
    assert ours.item() == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-4, atol=1e-6)


@of_trl
def test_rloo_equals_trl(trl_rig: TrlRig) -> None:
    config = settings("rloo")
    trainer = trl_rig.trainer("RLOO", epsilon=config.epsilon, epsilon_high=config.epsilon_high)
    theirs = trainer.compute_loss(trainer.model, trl_rig.inputs())
    their_gradient = gradient_of(trl_rig.model, theirs)
    logprobs, entropy = trl_rig.own_logprobs()
    ours = policy_loss(logprobs, trl_rig.batch(config), spec=OBJECTIVES["rloo"].spec(config), entropy=entropy)
    assert ours.loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    torch.testing.assert_close(gradient_of(trl_rig.model, ours.loss), their_gradient, rtol=1e-4, atol=1e-6)
    assert ours.metrics.clip_region > 0


@of_trl
def test_advantages_of_rewards_scaled_one_by_one_equal_trl(trl_rig: TrlRig) -> None:
    def last(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None if ids[0] % 4 == 0 else 100.0 * ids[-1] for ids in completion_ids]

    def first(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [0.01 * ids[0] for ids in completion_ids]

    trainer = trl_rig.trainer(
        "GRPO",
        reward_funcs=[last, first],
        multi_objective_aggregation="normalize_then_sum",
        reward_weights=[1.0, 0.3],
        max_steps=1,
        save_strategy="no",
    )
    trainer.train()
    logs = trainer._logs
    rewards = torch.tensor([logs["rewards"][name] for name in ("last", "first")]).T.reshape(2, 3, 2)
    assert 0 < rewards[..., 0].isnan().sum() < 6
    assert rewards[..., 0].nan_to_num(-1.0).unique().numel() > 3
    ours = decoupled_advantages(rewards, [1.0, 0.3])
    torch.testing.assert_close(ours.flatten(), torch.tensor(list(logs["advantages"])), rtol=1e-4, atol=1e-5)


@of_trl
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_every_scale_equal_trl(trl_rig: TrlRig, scale: Any) -> None:
    """One group has two rewards that are known, the other one."""

    def known(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        places = range(len(completion_ids))
        return [
            None if place in {1, 3, 4} else ids[-1] + 0.1 * place for place, ids in zip(places, completion_ids, strict=True)
        ]

    trainer = trl_rig.trainer("GRPO", reward_funcs=known, scale_rewards=scale, max_steps=1, save_strategy="no")
    trainer.train()
    rewards = torch.tensor(list(trainer._logs["rewards"]["known"]), dtype=torch.float64).view(2, 3)
    assert rewards.isnan().tolist() == [[False, True, False], [True, True, False]]
    ours = OBJECTIVES["dapo"].advantages(rewards, scale_rewards=scale).advantages
    theirs = torch.tensor(list(trainer._logs["advantages"]), dtype=torch.float64)
    torch.testing.assert_close(ours.flatten(), theirs, rtol=1e-4, atol=1e-5)
    assert theirs[0] != 0


@of_trl
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_a_bonus_that_follows_the_entropy_equals_trl(trl_rig: TrlRig, share: float) -> None:
    head = trl_rig.model.lm_head.weight
    kept = head.detach().clone()
    with torch.no_grad():
        middle = trl_rig.own_logprobs()[1].mean().item()
    adaptive = {"use_adaptive_entropy": True, "entropy_target": middle, "entropy_coef": 0.05, "entropy_coef_max": 0.058}
    config = settings("grpo", **adaptive)
    trainer = trl_rig.trainer("GRPO", loss_type="grpo", epsilon_high=0.28, top_entropy_quantile=share, **adaptive)
    ours, weights = EntropyControl(config), []
    try:
        for scale in (1.5, 1.5, 0.2, 3.0, 3.0, 0.1):
            with torch.no_grad():
                head.copy_(kept * scale)
            theirs = trainer.compute_loss(trainer.model, trl_rig.inputs()).item()
            logprobs, entropy = (values.detach() for values in trl_rig.own_logprobs())
            keep = (entropy >= entropy_threshold([entropy.double().numpy()], share)).float()
            batch = trl_rig.batch(config)._replace(
                importance_weights=keep, entropy_weights=keep, num_items_in_batch=float(keep.sum())
            )
            spec = replace(OBJECTIVES["grpo"].spec(config), entropy_coef=ours.in_force)
            assert policy_loss(logprobs, batch, spec=spec, entropy=entropy).loss.item() == pytest.approx(theirs, rel=1e-5)
            ours.observe(float((keep * entropy).sum()), float(keep.sum()))
            assert ours.coefficient == pytest.approx(trainer._metrics["train"]["entropy_coef"][-1])
            weights.append(ours.in_force)
    finally:
        with torch.no_grad():
            head.copy_(kept)
    assert len(set(weights)) > 2
    assert 0.0 in weights


@of_trl
def test_kl_without_bias_correction_equals_trl(trl_rig: TrlRig) -> None:
    config = settings("grpo", beta=0.3, use_bias_correction_kl=False)
    trainer = trl_rig.trainer("GRPO", loss_type="grpo", epsilon_high=0.28, beta=0.3, use_bias_correction_kl=False)
    theirs = trainer.compute_loss(trainer.model, trl_rig.inputs())
    logprobs, _ = trl_rig.own_logprobs()
    spec = OBJECTIVES["grpo"].spec(config)
    ours = policy_loss(logprobs, trl_rig.batch(config), spec=spec).loss
    corrected = policy_loss(logprobs, trl_rig.batch(config), spec=replace(spec, use_bias_correction_kl=True)).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert not math.isclose(ours.item(), corrected.item(), rel_tol=1e-4)
