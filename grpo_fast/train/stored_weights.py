"""A model's weights as they lie in safetensors files, of which each rank of a sharded run reads its own rows alone.

A model is made without its weights first: every parameter is one number that stands for all. Whoever shards it gives a
unit at a time its memory. Then the rows that this rank keeps are read, weight by weight.

That is done where files hold the very tensors of the model, under its own names. Where transformers has more to do than to copy
(keys that it converts, quantised files, adapters beside them, a tied head that is stored twice), it has to load all of it.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from grpo_fast.train.adapters import SETTINGS_FILE

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class NotInPartsError(Exception):
    """Files that cannot be read in parts; the message says why."""


class StoredWeights:
    """Weights of one model in its files.

    Args:
        model: it, with or without weights, and without adapters.
        get: gives one of its files by name, or ``None`` where it is not there.

    Raises:
        NotInPartsError: they are not the model's own tensors, one for one.
    """

    def __init__(self, model: PreTrainedModel, get: Callable[[str], Path | None]) -> None:
        self._files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in _files(get):
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
                self._files |= dict.fromkeys(names, file)
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in names}
        problem = _more_than_a_copy(model, get) or _other_weights(model, shapes)
        if problem is not None:
            raise NotInPartsError(problem)

    def beginnings(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The first row of each weight, with its name."""
        for file in dict.fromkeys(self._files.values()):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    part = opened.get_slice(name)
                    yield name, part[:1] if part.get_shape() else opened.get_tensor(name)

    @torch.no_grad()
    def fill(self, model: torch.nn.Module) -> None:
        """Reads what this rank holds of each weight, in place; adapters stay as they are.

        Args:
            model: the same, sharded; or with whole weights.
        """
        for name, tensor in model.state_dict(keep_vars=True).items():
            stored = name.replace(".base_layer.", ".")  # peft's
            if stored in self._files:
                self._read(stored, tensor.detach())

    def _read(self, name: str, tensor: torch.Tensor) -> None:
        first, own = 0, tensor
        if isinstance(tensor, DTensor):
            own = tensor.to_local()
            mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
            assert mesh.mesh_dim_names is not None
            assert coordinate is not None
            dimension = mesh.mesh_dim_names.index("shard")
            first = coordinate[dimension] * -(-tensor.shape[0] // mesh.size(dimension))  # as FSDP cuts rows
        if own.numel():
            with safe_open(self._files[name], framework="pt") as opened:
                part = opened.get_slice(name)
                own.copy_(part[first : first + own.shape[0]] if own.ndim else opened.get_tensor(name))


def _files(get: Callable[[str], Path | None]) -> list[Path]:
    single = get(_FILE)
    if single is not None:
        return [single]
    index = get(_INDEX)
    if index is None:
        raise NotInPartsError(f"it has neither {_FILE} nor {_INDEX}")
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found = [file for file in map(get, names) if file is not None]
    if len(found) < len(names):
        raise NotInPartsError(f"a file that {_INDEX} names is missing")
    return found


def _more_than_a_copy(model: PreTrainedModel, get: Callable[[str], Path | None]) -> str | None:
    """Why transformers has more to do than to copy what is stored, or ``None``."""
    if getattr(model.config, "quantization_config", None) is not None:
        return "its files are quantised"
    if getattr(model.config, "transformers_weights", None) is not None:
        return "its configuration names another file of weights"
    if get(SETTINGS_FILE) is not None:
        return f"{SETTINGS_FILE} lies beside it"
    if model.dtype != torch.float32 and (model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict):
        return "some of its weights stay in float32"
    return None


def _other_weights(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why what is stored is not the model's weights, one for one, or ``None``."""
    tensors = model.state_dict(keep_vars=True)
    aliases: dict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        aliases[id(tensor)].append(name)
    for names in aliases.values():
        stored = [name for name in names if name in shapes]
        if not stored:
            return f"{names[0]} is not stored under this name"
        if len(stored) > 1:
            return f"{' and '.join(stored)} are one weight, and both are stored"
        if shapes[stored[0]] != tuple(tensors[stored[0]].shape):
            return f"{stored[0]} has the shape {shapes[stored[0]]} there, and {tuple(tensors[stored[0]].shape)} in the model"
    unknown = sorted(shapes.keys() - tensors.keys())
    if unknown:
        return f"{unknown[0]} is stored, which the model does not have"
    transforms = get_model_conversion_mapping(model)
    changed = next((name for name in shapes for one in transforms if one.rename_source_key(name) != (name, None)), None)
    return None if changed is None else f"{changed} is converted"


def hollow_model(
    model_config: PreTrainedConfig, device: torch.device, *, arguments: Mapping[str, Any], place: Mapping[str, Any]
) -> PreTrainedModel:
    """A model as ``from_pretrained`` makes it, but for its weights: each is one number that stands for all.

    Args:
        model_config: of the model.
        device: where it will be.
        arguments: to ``from_config``, such as ``dtype``.
        place: arguments by which transformers finds its generation config.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(model_config), **arguments)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    model.init_weights()  # gives buffers that no file holds, such as rotary tables, their values; on "meta" it does nothing
    hollow = {weight: torch.nn.Parameter(_hollow(weight, device), weight.requires_grad) for weight in model.parameters()}
    for module in model.modules():  # tied weights stay tied
        module._parameters.update({name: hollow[weight] for name, weight in module._parameters.items() if weight is not None})
    with contextlib.suppress(OSError):  # it has none of its own
        named = dict(place)
        model.generation_config = GenerationConfig.from_pretrained(named.pop("pretrained_model_name_or_path"), **named)
    for module in model.modules():
        module._buffers.update({name: buffer.to(device) for name, buffer in module._buffers.items() if buffer is not None})
    whole: PreTrainedModel = model.eval()
    return whole


def _hollow(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.zeros((), dtype=weight.dtype, device=device).expand(weight.shape)


def is_hollow(weight: torch.Tensor) -> bool:
    """Whether it is one number that stands for all."""
    return not any(weight.stride()) and weight.numel() > 1


def give_memory(weights: Iterable[torch.nn.Parameter]) -> None:
    """Lets each parameter of :func:`hollow_model` have numbers of its own, whatever they are; others stay as they are."""
    for weight in weights:
        if is_hollow(weight):
            weight.data = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
