"""The protocol of every law, and the checks that they share."""

from __future__ import annotations

from typing import Protocol

from numpy.typing import ArrayLike

from grpo_fast.law.forms.rises import Array


class Law(Protocol):
    """A reward curve with a plateau."""

    @property
    def plateau(self) -> float:
        """Level it tends to."""
        ...

    def __call__(self, t: ArrayLike) -> Array:
        """Rewards at times of any shape."""
        ...

    def time_to(self, share: float) -> float:
        """Time at which a share in [0, 1) of the rise is done.

        Raises:
            ValueError: the share is not in [0, 1).
        """
        ...


def checked_share(share: float) -> float:
    """The share itself.

    Raises:
        ValueError: it is not in [0, 1).
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"share={share} must lie in [0, 1): the whole rise is never reached in finite time")
    return share


def check_positive(law: object, *names: str) -> None:
    """Looks at parameters without which a law has no meaning.

    Raises:
        ValueError: one of them is not positive.
    """
    for name in names:
        if not getattr(law, name) > 0:
            raise ValueError(f"{name}={getattr(law, name)} must be positive in {type(law).__name__}")
