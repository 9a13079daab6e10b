"""The weight of the entropy bonus: fixed, or moved after each update so that the policy's entropy stays at a target.

With ``H`` the mean entropy, in nats, of the tokens that the bonus is of, over all processes and a whole update:

    c <- min(c + delta, c_max)  where H <= target,  else max(c - delta, c_min)

and the next update has the bonus ``c·H`` where ``H <= target``, else none.

Source: Skywork-OR1, arXiv 2505.22312; TRL 1.16 ``use_adaptive_entropy``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_fast.config import Config


class EntropyControl:
    """The weight of the bonus as a run goes on, by the settings of ``config``."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.coefficient = config.entropy_coef
        """Weight, if the bonus is on."""
        self._entropy = math.inf

    @property
    def in_force(self) -> float:
        """Weight of the bonus in the next update."""
        is_on = not self._config.use_adaptive_entropy or self._entropy <= self._config.entropy_target
        return self.coefficient if is_on else 0.0

    def observe(self, total: float, count: float) -> None:
        """Takes what an update saw.

        Args:
            total: entropies of all tokens that the bonus is of, added up.
            count: of those tokens; after an update without any, nothing changes.
        """
        if count == 0:
            return
        config, self._entropy = self._config, total / count
        if self._entropy <= config.entropy_target:
            self.coefficient = min(self.coefficient + config.entropy_coef_delta, config.entropy_coef_max)
        else:
            self.coefficient = max(self.coefficient - config.entropy_coef_delta, config.entropy_coef_min)

    def state_dict(self) -> dict[str, Any]:
        """All that has changed since the start, as JSON values."""
        return {"coefficient": self.coefficient, "entropy": None if math.isinf(self._entropy) else self._entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` gave."""
        self.coefficient = state["coefficient"]
        self._entropy = math.inf if state["entropy"] is None else state["entropy"]
