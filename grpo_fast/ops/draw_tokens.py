"""Drawing a token a row from whole distributions, by the compiled extension on a CPU with AVX-512.

torch makes log-probabilities, probabilities and their cumulative sum in float64, each as large as the logits; the extension
looks at the logits two times and at one part of each row a third time.
"""

from __future__ import annotations

import torch

from grpo_fast.ops import native


def runs_on(logits: torch.Tensor) -> bool:
    """Whether :func:`draw_tokens` takes logits like these on this machine."""
    fits = logits.device.type == "cpu" and logits.dtype == torch.float32 and logits.is_contiguous()
    return fits and logits.numel() > 0 and native.has_kernel("draw_tokens", "CPU")


def draw_tokens(logits: torch.Tensor, draws: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws from the softmax of ``logits / temperature``: the first token whose cumulative probability exceeds the draw.

    Args:
        logits: float32 [n, V]; minus infinity is never drawn.
        draws: float64 [n], uniform in [0, 1).
        temperature: above 0.

    Returns:
        Tokens, int64 [n], and their log-probabilities in nats, float32 [n]: NaN where a logit of the row is NaN or infinite.

    Raises:
        RuntimeError: a shape or type that does not fit, or no extension.
    """
    tokens, logprobs = native.call("draw_tokens", logits, draws, temperature)
    return tokens, logprobs
