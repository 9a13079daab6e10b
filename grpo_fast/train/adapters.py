"""LoRA adapters inside the policy's own module, by peft: trained and saved alone, put back as they began for the reference.

peft puts its layers into the model in place, so whatever reads the model (rollout engine, FLOP model, head) goes on reading the
same module. This is the package's one door to peft.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from grpo_fast.config import Config, ConfigError
from grpo_fast.train.text_part import beside_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SETTINGS_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
"""peft's own name; with the settings it is all of an adapter."""
_ALL_LINEAR = ("all-linear",)
_EXPECTED = (r"The following \w+_pattern keys did not match", "fan_in_fan_out is set to False")
"""Warnings of peft about experts, or about layers as in GPT-2, which it then handles correctly."""


class Adapters:
    """Puts adapters into a model, in place; from then on nothing else of it is trained.

    They start as no change at all: B is 0, and A is drawn from the run's seed; by :meth:`begin_from`, as saved ones.

    Args:
        model: the base, with or without its weights.
        config: rank, scale and which modules.

    Raises:
        ConfigError: peft is missing, or ``lora_target_modules`` fit no module, or one that cannot have an adapter.
    """

    def __init__(self, model: PreTrainedModel, config: Config) -> None:
        if find_spec("peft") is None:
            raise ConfigError("use_peft=True needs peft; `pip install 'grpo-fast[lora]'`")
        import peft  # noqa: PLC0415 (an optional dependency, and slow to import)

        targets = config.lora_target_modules
        settings = peft.LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=0.0,
            exclude_modules="|".join(rf"{re.escape(name)}\..*" for name in beside_text(model)) or None,
            target_modules=targets[0] if targets == _ALL_LINEAR else list(targets),
            use_rslora=config.use_rslora,
            task_type="CAUSAL_LM",
            revision=config.revision,
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers under a name that is going
            for told in _EXPECTED:
                warnings.filterwarnings("ignore", told)
            torch.manual_seed(config.seed)  # peft draws on the CPU, wherever the base is
            try:
                self._wrapped: Any = peft.get_peft_model(model, settings)
            except ValueError as error:
                raise ConfigError(f"lora_target_modules={list(targets)}: {error} {_linear_layers(model)}") from error
        self._adapted, self._targets = model, targets
        self.begun = False
        """Whether they began from saved ones, not as no change."""
        self._refuse_ends()

    def refuse_unknown_targets(self) -> None:
        """Refuses names of ``lora_target_modules`` that fit no layer; peft passes over them where another one fits.

        Raises:
            ConfigError: there are such names.
        """
        if self._targets == _ALL_LINEAR or self._wrapped.peft_config["default"].target_parameters:  # experts have other names
            return
        adapted = [f".{name}" for name, module in self._adapted.named_modules() if hasattr(module, "base_layer")]
        unknown = [each for each in self._targets if not any(name.endswith(f".{each}") for name in adapted)]
        if unknown:
            raise ConfigError(
                f"lora_target_modules={list(self._targets)}: no layer is called {' or '.join(unknown)}. "
                f"{_linear_layers(self._adapted)}"
            )

    def _refuse_ends(self) -> None:
        """The loss reads the head as a plain weight, and a tied embedding is that weight."""
        model = self._adapted
        for name, end in (("head", model.get_output_embeddings()), ("embedding", model.get_input_embeddings())):
            if hasattr(end, "base_layer"):
                raise ConfigError(
                    f"lora_target_modules={list(self._wrapped.peft_config['default'].target_modules)} puts an adapter on the "
                    f"{name} of {type(model).__name__}; only layers between embedding and head can have one"
                )

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Switches the adapters off inside the context."""
        self._wrapped.base_model.disable_adapter_layers()
        for _, weight in self._weights():  # peft has marked them as frozen, and FSDP holds on to what its first pass finds
            weight.requires_grad_(True)
        try:
            yield
        finally:
            self._wrapped.base_model.enable_adapter_layers()

    def begin_from(self, directory: Path) -> None:
        """Takes over saved adapters as the run's start, which the reference policy is then too.

        Args:
            directory: where peft has written them.

        Raises:
            ValueError: as :meth:`check_fits`.
        """
        self.load(directory)
        self.begun = True

    def copies(self) -> dict[str, torch.Tensor]:
        """Their weights as they are now, for :meth:`holding`."""
        return {name: weight.detach().clone() for name, weight in self._weights()}

    @contextlib.contextmanager
    def holding(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Context in which the adapters have these weights, and after it their own again; for passes without gradient.

        Args:
            weights: all of them, as of :meth:`copies`.
        """
        now = self.copies()
        self._put(weights)
        try:
            yield
        finally:
            self._put(now)

    def _put(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, weight in self._weights():
            weight.data.copy_(weights[name])  # behind autograd's back: a backward pass to come finds them as they were

    def _weights(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, weight) for name, weight in self._adapted.named_parameters() if ".lora_" in name]

    def save(self, directory: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Writes the adapters in peft's format, a file of weights and one of settings.

        Args:
            directory: where to.
            weights: in place of the model's own, under the model's names.
        """
        named = None if weights is None else {f"base_model.model.{name}": weight for name, weight in weights.items()}
        # "auto" would ask the hub
        self._wrapped.save_pretrained(str(directory), state_dict=named, save_embedding_layers=False)

    def check_fits(self, directory: Path) -> None:
        """Sees that saved adapters are these, by names and shapes alone.

        Args:
            directory: where :meth:`save`, or peft, has written them.

        Raises:
            ValueError: they are those of another model or of other settings.
        """
        with safe_open(directory / WEIGHTS_FILE, framework="pt") as saved:
            shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118 (no mapping)
        own = self._own()
        missing, unknown = sorted(own.keys() - shapes.keys()), sorted(shapes.keys() - own.keys())
        if missing or unknown:
            raise ValueError(
                f"{directory / WEIGHTS_FILE} does not fit the model's adapters: {len(missing)} are missing and "
                f"{len(unknown)} unknown, such as {[*missing, *unknown][0]}"
            )
        for name, weight in own.items():
            if tuple(weight.shape) != shapes[name]:
                raise ValueError(
                    f"{directory / WEIGHTS_FILE} does not fit the model's adapters: {name} is {shapes[name]} there and "
                    f"{tuple(weight.shape)} here"
                )

    @torch.no_grad()
    def load(self, directory: Path, *, part: Callable[[Any, torch.Tensor], torch.Tensor] = lambda _, value: value) -> None:
        """Takes over saved adapters, in place, bit for bit.

        Args:
            directory: where :meth:`save`, or peft, has written them.
            part: gives of a weight's saved value what this process holds of it.

        Raises:
            ValueError: as :meth:`check_fits`.
        """
        self.check_fits(directory)
        saved = load_file(directory / WEIGHTS_FILE)
        for name, weight in self._own().items():
            weight.copy_(part(weight, saved[name]))

    def _own(self) -> dict[str, torch.Tensor]:
        """The adapters' weights, by the names they are saved under."""
        from peft import get_peft_model_state_dict  # noqa: PLC0415 (as above)

        found: dict[str, torch.Tensor] = get_peft_model_state_dict(self._wrapped, save_embedding_layers=False)
        return found

    def merge(self) -> PreTrainedModel:
        """Adds the adapters to the base's weights and takes their layers out; they are gone then.

        Returns:
            The model, which is a plain one again.
        """
        merged: PreTrainedModel = self._wrapped.merge_and_unload()
        return merged


def _linear_layers(model: PreTrainedModel) -> str:
    beside = tuple(f"{name}." for name in beside_text(model))
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    names = [name.removesuffix(".base_layer") for name in linear if not name.startswith(beside)]
    return f"Linear layers are {', '.join(sorted({name.rpartition('.')[2] for name in names if '.lora_' not in name}))}."
