"""Checks that a server was started with the policy's model: weights of another one would arrive in part, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

_NAMES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_WINDOW = "sliding_window"


def model_sizes(config: PreTrainedConfig) -> dict[str, int]:
    """Numbers that decide the shapes of a model's weights, by their names in its configuration, as far as it has them.

    With them the window of its attention, 0 where it has none: the proof of a sync is shorter, and would not show another.
    """
    text = config.get_text_config(decoder=True)
    found = {name: getattr(text, name, None) for name in _NAMES} | {_WINDOW: getattr(text, _WINDOW, None) or 0}
    return {name: size for name, size in found.items() if isinstance(size, int)}


def served_sizes(settings: Mapping[str, Any]) -> dict[str, int]:
    """The same of the model that a server on this machine was started with.

    Args:
        settings: vLLM's ``model_config``, as the server tells it. vLLM (0.32) tells where the model's configuration is and not
            what is in it.

    Returns:
        Nothing where the configuration is out of this process's reach, or changed by ``--hf-overrides``.
    """
    if settings.get("hf_overrides"):
        return {}
    place = settings.get("hf_config_path") or settings["model"]
    try:
        config = AutoConfig.from_pretrained(
            place, revision=settings.get("revision"), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, StrictDataclassError):
        return {}
    return model_sizes(config)


def differences(served: Mapping[str, int], policy: Mapping[str, int]) -> str:
    """The sizes that both tell and that differ, as text; empty where none does."""
    both = [name for name in policy if name in served and served[name] != policy[name]]
    return ", ".join(f"{name} {served[name]} and not {policy[name]}" for name in both)
