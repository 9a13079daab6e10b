"""Losses and small batches that the tests of the policy loss share."""

from __future__ import annotations

import torch

from grpo_fast.ops.loss_spec import LossBatch, LossSpec

SPECS = {
    "clip": LossSpec(epsilon_high=0.28),
    "two-sided": LossSpec(delta=1.5),
    "cispo": LossSpec(surrogate="cispo", epsilon_high=1.3),
    "sapo": LossSpec(surrogate="sapo"),
    "gspo": LossSpec(importance_sampling_level="sequence", epsilon_low=0.05, epsilon_high=0.05),
    "rloo": LossSpec(importance_sampling_level="sequence_sum"),
    "vespo": LossSpec(surrogate="vespo"),
    "vespo kl": LossSpec(surrogate="vespo", vespo_k_pos=1.5, vespo_lambda_neg=2.5, beta=0.1),
    "off-policy mask": LossSpec(off_policy_mask_threshold=0.0, beta=0.1),
    "gspo off-policy mask": LossSpec(importance_sampling_level="sequence", off_policy_mask_threshold=0.0),
    "kl": LossSpec(beta=0.1),
    "raw kl": LossSpec(beta=0.1, use_bias_correction_kl=False),
    "gspo kl": LossSpec(importance_sampling_level="sequence", beta=0.1),
    "entropy": LossSpec(entropy_coef=0.01),
    "everything": LossSpec(
        importance_sampling_level="sequence", epsilon_low=0.05, epsilon_high=0.05, delta=1.2, beta=0.1, entropy_coef=0.02
    ),
}
EXTRAS = ("plain", "weighted", "masked", "weighted and masked", "on-policy")


def case(
    dtype: torch.dtype = torch.float64, *, lengths: tuple[int, ...] = (4, 1, 0, 6, 3, 0), seed: int = 0, spread: float = 0.4
) -> tuple[torch.Tensor, torch.Tensor, LossBatch]:
    """Log-probabilities, entropy and the rest of B sequences; advantages of both signs and 0, ratios on both sides of 1."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_sequences = sum(lengths), len(lengths)

    def draw(n: int) -> torch.Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)

    old = -draw(num_tokens).abs() - 0.2
    per_sequence = torch.arange(num_sequences)
    batch = LossBatch(
        torch.repeat_interleave(per_sequence, torch.tensor(lengths, dtype=torch.long)),
        torch.tensor([1.3, -0.7, 0.4, -1.1, 0.0, 2.0], dtype=dtype)[per_sequence % 6],
        torch.tensor([0.25, 0.5, 1.0, 0.125, 0.3, 1.0], dtype=dtype)[per_sequence % 6],
        old_logprobs=old,
        ref_logprobs=old + 0.3 * draw(num_tokens),
        num_items_in_batch=num_tokens + 6.0,
    )
    return old + spread * draw(num_tokens), draw(num_tokens).abs(), batch


def extended(batch: LossBatch, extra: str) -> LossBatch:
    """The same tokens with weights (some 0) of ratios and of entropies, with a mask (one sequence wholly), or on-policy."""
    tokens = len(batch.sequence_index)
    if "weighted" in extra:
        weights = torch.linspace(0, 2, tokens, dtype=batch.advantages.dtype)
        batch = batch._replace(
            importance_weights=torch.where(torch.arange(tokens) % 5 == 2, 0.0, weights),
            entropy_weights=torch.where(torch.arange(tokens) % 3 == 0, 0.0, weights.flip(0)),
        )
    if "masked" in extra:
        present = torch.arange(tokens) % 4 != 1
        batch = batch._replace(token_mask=present & (batch.sequence_index != 1))
    return batch._replace(old_logprobs=None) if extra == "on-policy" else batch
