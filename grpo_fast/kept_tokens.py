"""The tokens that a sampler restricted by ``top_k``, ``top_p`` or ``min_p`` could draw from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class KeptTokens:
    """The kept support of n positions, one after the other; of each, the token that was drawn stands first."""

    token_ids: NDArray[np.int32]
    """[M], none twice within a position."""
    sizes: NDArray[np.int32]
    """[n], at least 1 each, M together."""

    @classmethod
    def of(cls, drawn: Sequence[int], supports: Sequence[Sequence[int] | NDArray[np.int32]]) -> KeptTokens:
        """Puts the supports of n positions together.

        Args:
            drawn: n tokens.
            supports: n sets of tokens, in any order.

        Raises:
            ValueError: a token that is not in its support, or is in it twice; or not as many supports as tokens.
        """
        if len(drawn) != len(supports):
            raise ValueError(f"{len(supports)} supports for {len(drawn)} tokens; there must be one each")
        sizes = np.array([len(support) for support in supports], dtype=np.int32)
        token_ids = np.concatenate([np.asarray(support, dtype=np.int32) for support in supports] or [np.zeros(0, np.int32)])
        first = np.cumsum(sizes) - sizes
        owner = np.repeat(np.arange(len(sizes)), sizes)
        chosen = np.array(drawn, dtype=np.int32)
        place = np.flatnonzero(token_ids == chosen[owner])
        found = np.bincount(owner[place], minlength=len(sizes))
        if (found != 1).any():
            position = int(np.flatnonzero(found != 1)[0])
            raise ValueError(f"token {chosen[position]} at position {position} is {found[position]} times in its kept support")
        token_ids[place], token_ids[first] = token_ids[first], chosen
        return cls(token_ids, sizes)

    @classmethod
    def joined(cls, parts: Sequence[KeptTokens]) -> KeptTokens:
        """The positions of several, one after the other."""
        return cls(np.concatenate([part.token_ids for part in parts]), np.concatenate([part.sizes for part in parts]))

    @classmethod
    def from_lists(cls, supports: Sequence[Sequence[int]]) -> KeptTokens:
        """The inverse of :meth:`to_lists`."""
        return cls.of([support[0] for support in supports], supports)

    def to_lists(self) -> list[list[int]]:
        """The tokens of each position, in a list of its own."""
        return [part.tolist() for part in np.split(self.token_ids, np.cumsum(self.sizes)[:-1])] if len(self) else []

    @property
    def drawn(self) -> NDArray[np.int32]:
        """[n], the tokens that were drawn."""
        result: NDArray[np.int32] = self.token_ids[np.cumsum(self.sizes) - self.sizes]
        return result

    def __len__(self) -> int:
        return len(self.sizes)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, KeptTokens)
            and np.array_equal(self.sizes, other.sizes)
            and np.array_equal(self.token_ids, other.token_ids)
        )

    def __hash__(self) -> int:
        return hash((self.token_ids.tobytes(), self.sizes.tobytes()))
