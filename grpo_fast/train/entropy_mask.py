"""Which tokens of a step carry the policy loss, where only those of the highest entropy do.

Source: arXiv 2506.01939; TRL 1.16 ``top_entropy_quantile``, which takes the quantile of a micro-batch on all ranks, where it is
of the whole step here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def entropy_threshold(entropies: Sequence[npt.NDArray[np.float64]], share: float) -> float:
    """The least entropy, in nats, of a token that carries the policy loss.

    Args:
        entropies: of all tokens in the loss, a part from each rank; each rank gets the same answer.
        share: of the tokens, those of the highest entropy, that carry it.

    Returns:
        The ``1 - share`` quantile, interpolated between neighbours as ``torch.quantile`` does; infinity without tokens.
    """
    values = np.concatenate(entropies) if entropies else np.empty(0)
    if not len(values):
        return math.inf
    place = round((1 - share) * (len(values) - 1), 6)  # which rounding may have put a hair beside a whole number
    below, above = math.floor(place), math.ceil(place)
    ranked = np.partition(values, (below, above))
    return float(ranked[below] + (place - below) * (ranked[above] - ranked[below]))
