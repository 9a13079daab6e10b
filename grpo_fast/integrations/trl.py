"""The fused loss for people who train with TRL: :class:`FusedGRPOTrainer` in place of ``trl.GRPOTrainer``, no other change.

TRL's trainer keeps everything it does. What this module replaces is how a micro-batch's hidden states become a loss: TRL makes
log-probabilities, then the loss, and makes every logit again in backward; here :func:`~grpo_fast.ops.fused_grpo` does it in one
pass. Log-probabilities of the old and of the reference policy come from :func:`~grpo_fast.ops.token_logprob`, so that both
sides of a ratio are rounded alike. The loss formula and all metrics of TRL still run, on the log-probabilities that the fused
pass found: the metrics are TRL's own, and while the first micro-batches are trained on its loss has to equal the fused one.

Source: TRL 1.16 ``GRPOTrainer._compute_loss`` and ``add_fused_lm_head``.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grpo_fast.ops import LMHead, LossBatch, LossSpec, fused_grpo, token_logprob
from grpo_fast.ops.loss_spec import RatioLevel, Surrogate
from grpo_fast.ops.sequence_weights import sampler_log_ratios

try:
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import FusedCausalLMOutput
except ImportError as error:
    raise ImportError("FusedGRPOTrainer needs TRL 1.16 or later: pip install 'grpo-fast[trl]'") from error

_SURROGATES: dict[str, Surrogate] = {
    "grpo": "clip",
    "bnpo": "clip",
    "dr_grpo": "clip",
    "dapo": "clip",
    "luspo": "clip",
    "cispo": "cispo",
    "sapo": "sapo",
    "vespo": "vespo",
}
_LEVELS: dict[str, RatioLevel] = {"token": "token", "sequence": "sequence"}
_NUM_CHECKED = 16
"""Micro-batches whose loss is held against TRL's formula: enough to meet an off-policy one where there are any."""
_LOSS_TOLERANCE = 1e-4
_LEAST_DECAY = 1e-4
"""Of VESPO's lambda, in TRL."""
_PROBE_TOLERANCE = 1e-3
_PROBE_TOLERANCE_HALF = 0.2  # nats; a half-precision model rounds its logits, the head here does not


class FusedGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's ``GRPOTrainer`` with the loss and its gradients made in one pass over the logits.

    One line changes::

        from grpo_fast.integrations import FusedGRPOTrainer as GRPOTrainer

    All arguments, logged metrics and checkpoints are TRL's. Full fine-tuning and PEFT adapters (outside the head) work, on one
    process or several with data parallelism; tool masks, images and the importance ratio against vLLM too.

    Raises:
        ValueError: a setting that the fused loss does not know (each is named with what to set instead), or a model whose
        logits are not its head times its hidden states.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("args", args[2] if len(args) > 2 else None)
        if config is not None:
            check_settings(config)
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("FSDP and DeepSpeed shard the head, which the fused loss reads whole; use data parallelism")
        if self.aux_loss_enabled:
            raise ValueError(
                f"router_aux_loss_coef={self.router_aux_loss_coef}: the load-balancing loss of a mixture of experts is not in "
                "the fused pass; set router_aux_loss_coef=0, or use trl.GRPOTrainer"
            )
        add_fused_loss(_base_model(self.model), temperature=self.temperature)
        if self.ref_model is not None:
            add_fused_loss(self.accelerator.unwrap_model(self.ref_model), temperature=self.temperature)
        self._num_checked = 0

    def _compute_loss(self, model: Callable[..., Any], inputs: dict[str, Any]) -> torch.Tensor:
        scorer = _Scorer(model, self._loss_request(inputs))
        theirs: torch.Tensor = super()._compute_loss(scorer, inputs)
        ours = scorer.loss
        if self._num_checked < _NUM_CHECKED:
            self._num_checked += 1
            self._hold_against_trl(ours.detach(), theirs.detach(), scorer.request)
        return ours

    def _loss_request(self, inputs: dict[str, Any]) -> _LossRequest:
        mask = inputs["completion_mask"]
        mask = (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).bool()
        advantages = inputs["advantages"]
        if advantages.ndim != 1:
            raise ValueError(f"advantages have shape {tuple(advantages.shape)}; the fused loss takes one a sequence, (B,)")
        corrected, vespo = self.use_vllm and self.vllm_importance_sampling_correction, self.loss_type == "vespo"
        training = self.model.training
        parts = float(self.current_gradient_accumulation_steps) if training else 1.0
        entropy_coef = self._entropy_weight()
        return _LossRequest(
            mask=mask,
            advantages=advantages,
            loss_weights=self._loss_weights(mask, inputs["num_items_in_batch"], parts=parts),
            old_logprobs=inputs.get("old_per_token_logps"),
            ref_logprobs=inputs["ref_per_token_logps"] if self.beta != 0 else None,
            importance_weights=inputs["importance_sampling_ratio"].expand(mask.shape) if corrected and not vespo else None,
            sampling_logprobs=inputs.get("sampling_per_token_logps"),
            sampler_ratios=inputs.get("importance_sampling_ratio") if vespo else None,
            parts=parts,
            high_entropy=functools.partial(self.get_high_entropy_mask, mask=mask, threshold=1 - self.top_entropy_quantile)
            if self.top_entropy_quantile < 1
            else None,
            spec=self._spec(entropy_coef),
        )

    def _entropy_weight(self) -> float:
        """Coefficient in force for this micro-batch; the adaptive one is moved by TRL's own code, after it."""
        if not self._entropy_bonus_enabled or (
            self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target
        ):
            return 0.0
        return float(self.entropy_coef)

    def _spec(self, entropy_coef: float) -> LossSpec:
        return LossSpec(
            surrogate=_SURROGATES[self.loss_type],
            importance_sampling_level=_LEVELS[self.importance_sampling_level],
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=self.args.delta if _SURROGATES[self.loss_type] == "clip" else None,
            beta=self.beta,
            use_bias_correction_kl=self.args.use_bias_correction_kl,
            entropy_coef=entropy_coef,
            sapo_temperature_pos=self.args.sapo_temperature_pos,
            sapo_temperature_neg=self.args.sapo_temperature_neg,
            vespo_k_pos=self.args.vespo_k_pos,
            vespo_lambda_pos=max(self.args.vespo_lambda_pos, _LEAST_DECAY),
            vespo_k_neg=self.args.vespo_k_neg,
            vespo_lambda_neg=max(self.args.vespo_lambda_neg, _LEAST_DECAY),
            off_policy_mask_threshold=self.off_policy_mask_threshold,
        )

    def _loss_weights(self, mask: torch.Tensor, num_items_in_batch: torch.Tensor, *, parts: float) -> torch.Tensor:
        """TRL's normaliser of this loss type, as a weight of each token of a sequence: float32 [B]."""
        lengths = mask.sum(-1).float()
        num_sequences = mask.shape[0]
        if self.loss_type in ("grpo", "sapo"):
            return 1.0 / (num_sequences * parts * lengths.clamp(min=1.0))
        if self.loss_type == "bnpo":
            return torch.ones_like(lengths) / (lengths.sum().clamp(min=1.0) * parts)
        if self.loss_type == "dr_grpo":
            return torch.full_like(lengths, 1.0 / (num_sequences * self.max_completion_length * parts))
        if self.loss_type == "luspo":
            return torch.full_like(lengths, 1.0 / (num_sequences * parts))
        parts = parts / self.args.steps_per_generation if self.model.training else 1.0
        normalizer: torch.Tensor = num_items_in_batch.clamp(min=1.0) / self.accelerator.num_processes
        return torch.ones_like(lengths) / (normalizer * parts)

    def _hold_against_trl(self, ours: torch.Tensor, theirs: torch.Tensor, request: _LossRequest) -> None:
        terms = request.loss_weights * request.advantages.abs() * request.mask.sum(-1)
        scale = terms.sum() + theirs.abs() + request.spec.entropy_coef
        if (ours - theirs).abs() > _LOSS_TOLERANCE * scale:
            raise RuntimeError(
                f"the fused loss is {ours.item():.7g} where this version of TRL computes {theirs.item():.7g} for "
                f"loss_type={self.loss_type!r}: its formula has changed; use trl.GRPOTrainer and report the version"
            )


def check_settings(config: GRPOConfig) -> None:
    """Refuses what the fused loss does not know, before a model is loaded.

    Raises:
        ValueError: the setting, its value and what to do.
    """
    if config.loss_type not in _SURROGATES:
        raise ValueError(
            f"loss_type={config.loss_type!r} is not fused; choose one of {sorted(_SURROGATES)}, or use trl.GRPOTrainer"
        )
    refused = {
        "use_liger_kernel": (
            config.use_liger_kernel,
            "set it to False: Liger would replace the forward pass that is fused here",
        ),
        "fsdp": (bool(config.fsdp), "leave it empty: a sharded head cannot be read whole; use data parallelism"),
        "deepspeed": (bool(config.deepspeed), "leave it empty: a sharded head cannot be read whole; use data parallelism"),
    }
    for name, (is_set, advice) in refused.items():
        if is_set:
            raise ValueError(
                f"{name}={getattr(config, name)!r} does not go with the fused loss; {advice}, or use trl.GRPOTrainer"
            )


@dataclass(frozen=True, slots=True)
class _LossRequest:
    """Inputs of a micro-batch's loss other than hidden states, padded to the completions, [B, L]."""

    mask: torch.Tensor
    """bool [B, L]: tokens in the loss."""
    advantages: torch.Tensor
    loss_weights: torch.Tensor
    old_logprobs: torch.Tensor | None
    ref_logprobs: torch.Tensor | None
    importance_weights: torch.Tensor | None
    sampling_logprobs: torch.Tensor | None
    sampler_ratios: torch.Tensor | None
    """Importance ratios of tokens that VESPO multiplies to one of the sequence."""
    parts: float
    """Micro-batches of an update."""
    high_entropy: Callable[[torch.Tensor], torch.Tensor] | None
    """Which tokens carry the policy loss, by the entropies of all, both [B, L]; ``None``: all."""
    spec: LossSpec

    def batch(self, scored: torch.Tensor, keep: torch.Tensor | None) -> LossBatch:
        """Packed to the T tokens where ``scored`` [B, L] is true; ``keep`` [T] are those that carry the policy loss."""
        index, ratios = scored.nonzero()[:, 0], self.sampler_ratios
        weights = None if self.importance_weights is None else self.importance_weights[scored]
        if keep is not None:
            weights = keep if weights is None else weights * keep
        counted = None
        if self.spec.entropy_coef != 0:
            counted = self.parts * float(self.mask.sum() if keep is None else keep.sum())
        return LossBatch(
            sequence_index=index,
            advantages=self.advantages,
            loss_weights=self.loss_weights,
            old_logprobs=None if self.old_logprobs is None else self.old_logprobs[scored],
            ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs[scored],
            importance_weights=weights,
            num_items_in_batch=counted,
            entropy_weights=keep,
            sampling_logprobs=None if self.sampling_logprobs is None else self.sampling_logprobs[scored],
            sampler_log_ratios=None
            if ratios is None
            else sampler_log_ratios(ratios[scored], index, num_sequences=len(self.advantages)),
        )


class _Scorer:
    """Stands where TRL expects a model, sends the request along, and keeps the loss that comes back."""

    def __init__(self, model: Callable[..., Any], request: _LossRequest) -> None:
        self._model = model
        self.request = request
        self.loss: torch.Tensor

    def __call__(self, **inputs: Any) -> Any:
        output = self._model(**inputs, loss_request=self.request)
        self.loss = output.loss
        return output


def add_fused_loss(model: Any, *, temperature: float) -> None:
    """Lets ``model(..., labels=..., fused_lm_head=True)`` score with this package's ops, as TRL asks it to.

    With ``loss_request=`` the output's ``loss`` is the policy loss, differentiable, and its log-probabilities are detached.
    Every other call, generation among them, is the model's own as before. The head's tensors are looked up on each call.

    Args:
        model: a causal language model with a plain linear head.
        temperature: what completions are sampled at.

    Raises:
        ValueError: no plain linear head, or logits that are not the head times the hidden states.
    """
    own_forward = model.forward
    scale, softcap = _logit_scale(model.config.get_text_config()), model.config.get_text_config()
    softcap = getattr(softcap, "final_logit_softcapping", None)

    def rows_and_head(hidden: torch.Tensor) -> tuple[torch.Tensor, LMHead]:
        linear = _linear_head(model)
        weight, bias = linear.weight, linear.bias
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else weight.dtype
        head = LMHead(
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            temperature=temperature,
            softcap=softcap,
            logit_scale=scale,
        )
        return hidden.to(dtype), head

    @functools.wraps(type(model).forward)  # `generate` holds its arguments against the signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return own_forward(*args, **kwargs)
        labels, request = kwargs.pop("labels")[:, 1:], kwargs.pop("loss_request", None)
        hidden = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state[:, :-1]
        scored = labels != -100
        if request is not None:
            width = request.mask.shape[1]
            scored = scored & nn.functional.pad(request.mask, (scored.shape[1] - width, 0))
        rows, head = rows_and_head(hidden[scored])
        if request is None:
            loss = None
            logprobs, entropy = token_logprob(rows, head, targets=labels[scored])
        else:
            first = keep = None
            if request.high_entropy is not None:
                with torch.no_grad():
                    _, first = token_logprob(rows, head, targets=labels[scored])
                assert first is not None
                keep = request.high_entropy(_padded(first, scored[:, -width:]))[scored[:, -width:]].to(first.dtype)
            batch = request.batch(scored[:, -width:], keep)
            result = fused_grpo(rows, head, targets=labels[scored], batch=batch, spec=request.spec)
            loss, logprobs = result.loss, result.logprobs
            entropy = result.entropy if first is None else first  # of which TRL takes the same quantile
        assert entropy is not None
        return FusedCausalLMOutput(
            loss=loss, log_probs=_padded(logprobs, scored), entropy=_padded(entropy, scored), label_mask=scored
        )

    _check_head(model, LMHead(_linear_head(model).weight, _linear_head(model).bias, softcap=softcap, logit_scale=scale))
    model.forward = types.MethodType(forward, model)


def _padded(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _base_model(model: Any) -> Any:
    """Below a PEFT wrapper, which changes modules in place and calls this one's forward."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _linear_head(model: Any) -> nn.Linear:
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear:
        raise ValueError(
            f"the head is a {type(linear).__name__}; the fused loss reads a plain nn.Linear, so keep adapters and quantisation "
            "off it (leave lm_head out of target_modules and modules_to_save), or use trl.GRPOTrainer"
        )
    return linear


def _logit_scale(config: Any) -> float:
    """The factor of a model's logits, by the names that it has in transformers' configurations."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


@torch.no_grad()
def _check_head(model: Any, head: LMHead) -> None:
    tokens = torch.arange(min(8, head.weight.shape[0]), device=head.weight.device)[None]
    was_training = model.training
    model.eval()
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0, :-1]
    model.train(was_training)
    expected = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    found = token_logprob(hidden.to(head.weight.dtype), head, targets=tokens[0, 1:], want_entropy=False)[0]
    difference = (expected - found).abs().max().item()
    if not difference <= (_PROBE_TOLERANCE if head.weight.dtype == torch.float32 else _PROBE_TOLERANCE_HALF):
        raise ValueError(
            f"{type(model).__name__} makes logits in a way the fused loss does not know (log-probabilities differ by "
            f"{difference:.3g} nats from head(hidden states)); use trl.GRPOTrainer and report the model's name"
        )
