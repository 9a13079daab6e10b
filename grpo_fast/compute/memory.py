"""Memory of a device over a step: what each phase holds, by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def cached_values(text_config: Any) -> int:
    """Numbers that an engine keeps of one token: keys and values of all layers of a transformers text configuration."""
    query_heads = getattr(text_config, "num_attention_heads", None) or 1  # of a model without attention nothing better is known
    heads = getattr(text_config, "num_key_value_heads", None) or query_heads
    size = getattr(text_config, "head_dim", None) or text_config.hidden_size // query_heads
    return int(2 * text_config.num_hidden_layers * heads * size)


@dataclass(frozen=True)
class MemoryPlan:
    """Memory that a run needs on one device.

    Attributes:
        lasting: bytes by part that are held from load to end.
        phases: bytes by part that each phase of a step holds in addition.
        room_bytes: memory of the device.
        host: bytes by part that are in the host's memory instead.
    """

    lasting: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]
    room_bytes: int
    host: Mapping[str, int]

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part in that phase."""
        return {name: size for name, size in {**self.lasting, **self.phases[self.peak_phase]}.items() if size}

    @property
    def peak_bytes(self) -> int:
        """The most that is needed at once."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the device has that much."""
        return self.peak_bytes <= self.room_bytes
