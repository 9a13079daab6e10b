"""The layers of a model, as it names them itself: each is compiled, gathered and sharded as one."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def layers_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Modules of the classes that a model says must not be split, in their order; none where it names no class."""
    names = model._no_split_modules or ()
    return [module for module in model.base_model.modules() if type(module).__name__ in names]
