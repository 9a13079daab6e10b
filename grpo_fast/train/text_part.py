"""The part of a model that processes text: the decoder and head of a multimodal model such as Gemma 3.

The rest has no gradient. It stays frozen and gets no adapters: no moments are kept of it, and no weight decay reaches it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel


def freeze_beside_text(model: PreTrainedModel) -> None:
    """Takes what text does not pass out of training, in place."""
    for name in beside_text(model):
        model.get_submodule(name).requires_grad_(False)


def beside_text(model: PreTrainedModel) -> list[str]:
    """Names of the modules that text does not pass, the largest ones; none where there is only a decoder."""
    ends = [model.get_decoder(), model.get_output_embeddings()]
    return list(_beside(model, ends, ""))


def _beside(module: Any, ends: list[Any], path: str) -> Iterator[str]:
    for name, child in module.named_children():
        if any(child is end for end in ends):
            continue
        if any(part is end for part in child.modules() for end in ends):
            yield from _beside(child, ends, f"{path}{name}.")
        elif next(child.parameters(), None) is not None:
            yield path + name
