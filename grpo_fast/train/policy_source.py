"""Loads a policy: tokeniser and sizes first, weights once everything else is checked."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grpo_fast.assets import embedded_model_dir
from grpo_fast.config import Config, ConfigError
from grpo_fast.device import device_facts
from grpo_fast.hub import READ_ERRORS, WHERE_MODELS_ARE, Place, why_unread
from grpo_fast.ops.products import use_products
from grpo_fast.run_dir import CONFIG_FILE
from grpo_fast.train.adapter_start import AdapterStart, find_start, reader
from grpo_fast.train.adapters import SETTINGS_FILE, Adapters
from grpo_fast.train.bars import bars_for_a_terminal
from grpo_fast.train.checkpointing import checkpoint_layers
from grpo_fast.train.compiled import compile_layers, require_compiler
from grpo_fast.train.liger import require_liger, use_liger_kernels
from grpo_fast.train.policy import Policy
from grpo_fast.train.quantised import (
    keep_as_loaded,
    loading_arguments,
    refuse_ragged_blocks,
    require_bitsandbytes,
    tell_what_is_left,
)
from grpo_fast.train.stored_weights import NotInPartsError, StoredWeights, hollow_model
from grpo_fast.train.text_part import freeze_beside_text

_log = logging.getLogger(__name__)
_DEFAULT_CONTEXT = 4096
_HUB_ID = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?")
_RANDOM = ("dropout", "pdrop", "layerdrop")
"""Parts of the names under which modules keep their dropout rates."""
_NOT_ON_A_CPU = (
    ("gradient_checkpointing_mode", "offload", ", where activations are in host memory already; use 'full'"),
    ("use_liger_kernel", True, ": Liger's kernels are for GPUs; leave it out"),
    ("fsdp_offload_params", True, ": shards are in host memory already; leave it out"),
)
"""Fields, their values that need a GPU, and why, with the fix."""


class PolicySource:
    """The source of a policy: tokeniser and sizes are read at once, weights when asked for.

    Args:
        config: of the run.
        planned_for: a device that need not be here, with what a run on it needs; the run's own where nothing is named.

    Raises:
        ConfigError: the model cannot be found, no device of the wanted kind is there, or a setting cannot work with them.
    """

    def __init__(self, config: Config, *, planned_for: torch.device | None = None) -> None:
        self._device = planned_for or pick_device(config.device)
        self._is_here = planned_for is None
        path = _find(config.model, config.revision)
        self._place = Place.of(path, config.revision)
        self._start = find_start(config, path, local_files_only=self._place.unreached is not None)
        self.config = config if self._start is None else self._start.applied(config)
        """The run's, with rank, scale and modules of adapters that it begins from, and the revision of their base."""
        config = self.config
        if self._start is not None:
            self._place = self._place_of_base(self._start)
        self._arguments = {"trust_remote_code": config.trust_remote_code, **self._place.arguments}
        self.directory = self._place.name
        """Directory or hub id of the model; of the base, where the run begins from adapters."""
        beside = self._start.directory if self._start is not None and self._start.has_tokenizer else None
        place = {} if beside is None else {"pretrained_model_name_or_path": str(beside), "revision": None}
        self.tokenizer: PreTrainedTokenizerBase = self._read(AutoTokenizer, **place)
        self.model_config: PreTrainedConfig = self._read(AutoConfig)
        """Sizes and kind of the model, as transformers reads them."""
        text_config = self.model_config.get_text_config()
        self.context_length = int(getattr(text_config, "max_position_embeddings", None) or _DEFAULT_CONTEXT)
        """Longest sequence the model was made for, in tokens."""
        self.stored_dtype: torch.dtype = getattr(text_config, "dtype", None) or torch.float32
        """Type of the weights in the model's own files."""
        room = self.context_length - config.max_completion_length
        if room < 1:
            raise ConfigError(
                f"max_completion_length={config.max_completion_length} leaves no room for a prompt in {config.model}'s "
                f"context of {self.context_length} tokens; lower it"
                + ("" if "model" in config.model_fields_set else ", or name another model")
            )
        self.max_prompt_length = min(room, config.max_prompt_length or room)
        """Longest prompt that leaves room for a completion."""
        self._refuse_what_cannot_work()

    def _place_of_base(self, start: AdapterStart) -> Place:
        """Where the base of adapters is; a hub that was out of reach for them is not tried again."""
        path = _find(start.base, start.base_revision, field="base_model")
        if self._place.unreached is None:
            return Place.of(path, start.base_revision)
        return Place(path, start.base_revision, self._place.unreached)

    def _refuse_what_cannot_work(self) -> None:
        """Names settings that this device, what is installed, or the model's kind and sizes rule out."""
        config, device = self.config, self._device
        for field, value, reason in _NOT_ON_A_CPU if device.type == "cpu" else ():
            if getattr(config, field) == value:
                raise ConfigError(f"{field}={value!r} on a CPU{reason}")
        if config.weights_dtype == "bfloat16" and not self._computes_in_bfloat16:
            on, fix = ("CPU", "set dtype='bfloat16' too") if device.type == "cpu" else ("GPU", "leave it at 'float32'")
            raise ConfigError(f"weights_dtype='bfloat16' on this {on}, where dtype='auto' is float32; {fix}")
        if self._is_here:
            self._refuse_what_is_missing()
        if config.use_peft:
            outline = self.outline()
            if config.load_in_4bit:
                refuse_ragged_blocks(outline, device)

    def _refuse_what_is_missing(self) -> None:
        if self.config.use_liger_kernel:
            require_liger(self.model_config.model_type)
        if self.config.torch_compile:
            require_compiler(self._device)
        if self.config.load_in_4bit:
            require_bitsandbytes("load_in_4bit")

    @property
    def _computes_in_bfloat16(self) -> bool:
        return computes_in_bfloat16(self.config, self._device.type)

    @property
    def chat(self) -> bool:
        """Whether the tokeniser brings a chat template."""
        return self.tokenizer.chat_template is not None

    @property
    def begins_from_adapters(self) -> bool:
        """Whether ``model`` names saved adapters."""
        return self._start is not None

    def at(self, checkpoint: Path) -> Self:
        """The same policy with the weights of a checkpoint that holds all of them; tokeniser and settings stay."""
        source = copy.copy(self)
        source._place = Place(str(checkpoint))
        source._arguments = self._arguments | source._place.arguments
        source.directory = str(checkpoint)
        source.config = self.config.model_copy(update={"model": source.directory})
        return source

    def outline(self) -> PreTrainedModel:
        """The model without its weights: modules and sizes alone, adapters included, in no memory.

        Raises:
            ConfigError: see :func:`outline_of`.
        """
        return outline_of(self.model_config, self.config, start=None if self._start is None else self._start.directory)

    def load(self, *, trained: bool = True) -> Policy:
        """Reads the weights.

        Args:
            trained: whether the policy will be; one that is not has weights of the type that it computes in.

        Raises:
            ConfigError: they cannot be read, or the model computes its logits in a way the head does not describe.
        """
        config, dtype = self.config, self._dtype(trained=trained)
        quantised = loading_arguments(config, dtype=dtype, device=self._device) if config.load_in_4bit else {}
        attention = attention_arguments(config, self.model_config)
        cached = self._place.unreached is not None
        kept = {"adapter_kwargs": {"local_files_only": True}} if cached else {}  # else they are asked for
        told = {
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
        }  # it would draw these too, or raise what names none
        model, found = self._read(AutoModelForCausalLM, dtype=dtype, **attention, **quantised, **kept, **told)
        problem = _lacking(found)
        if problem is not None:
            raise ConfigError(f"cannot load {self._named}: {problem}")
        if quantised:
            keep_as_loaded(model)
            tell_what_is_left(model)
        return self._policy(model)

    def load_hollow(self, *, trained: bool = True) -> tuple[Policy, StoredWeights]:
        """The policy without its weights, and where each rank finds its part of them; adapters are there.

        Args:
            trained: as of :meth:`load`.

        Raises:
            NotInPartsError: weights have to be read as a whole.
            ConfigError: as :meth:`load`.
        """
        if self.config.load_in_4bit:
            raise NotInPartsError("load_in_4bit makes four bits of whole weights")
        told = {"dtype": self._dtype(trained=trained), "trust_remote_code": self.config.trust_remote_code}
        get = reader(self.directory, self._arguments["revision"], local_files_only=self._place.unreached is not None)
        try:
            model = hollow_model(
                self.model_config,
                self._device,
                arguments=told | attention_arguments(self.config, self.model_config),
                place={name: value for name, value in self._arguments.items() if name != "trust_remote_code"},
            )
            stored = StoredWeights(model, get)
        except READ_ERRORS as error:  # transformers' own way tells it better
            raise NotInPartsError(f"it cannot be read ({error})") from error
        return self._policy(model), stored

    def _dtype(self, *, trained: bool) -> torch.dtype:
        # a frozen weight has no update that bfloat16 could lose
        short = not trained or self.config.use_peft or self.config.weights_dtype == "bfloat16"
        return torch.bfloat16 if self._computes_in_bfloat16 and short else torch.float32

    def _policy(self, model: Any) -> Policy:
        """The policy of a model as transformers gives it."""
        config = self.config
        if config.use_liger_kernel:
            use_liger_kernels(model)
        _disable_dropout(model)
        freeze_beside_text(model)
        if self._device.type == "cpu":
            use_products(model)
        else:  # cuDNN's plans are made for one shape, tens of milliseconds each, and lengths are others every time
            torch.backends.cuda.enable_cudnn_sdp(False)
        adapters = Adapters(model, config) if config.use_peft else None
        if adapters is not None and self._start is not None:
            adapters.begin_from(self._start.directory)
        if config.gradient_checkpointing:
            checkpoint_layers(model, config.gradient_checkpointing_mode)
        policy = Policy(
            model.to(self._device),
            self.tokenizer,
            autocast_dtype=torch.bfloat16 if self._computes_in_bfloat16 else None,
            checkpointing=config.gradient_checkpointing_mode if config.gradient_checkpointing else None,
            adapters=adapters,
            padding_free=config.padding_free,
        )
        if config.torch_compile:
            compile_layers(model)
        return policy

    def _read(self, auto_class: Any, **arguments: Any) -> Any:
        try:
            with bars_for_a_terminal():
                return auto_class.from_pretrained(**self._arguments | arguments)
        except READ_ERRORS as error:
            reason = why_unread(error, self._place.unreached)
            fix = f"{WHERE_MODELS_ARE}."
            if "attn_implementation" in arguments and re.search("attn|attention", reason, re.IGNORECASE):
                fix = f"Set attn_implementation='auto' in place of {arguments['attn_implementation']!r}."
            raise ConfigError(f"cannot load {self._named}: {reason} {fix}") from error

    @property
    def _named(self) -> str:
        """The model, for errors."""
        if self._start is None:
            return f"model {self.config.model!r}"
        return f"model {self._start.base!r}, the base of the adapters in {self.config.model!r}"


def source_to_resume(config: Config, checkpoint: Path | None) -> PolicySource:
    """The source of a run's policy; where the model's directory is gone, the run's own checkpoint stands in for it if it can.

    Args:
        config: of the run.
        checkpoint: the one that the run is resumed from, if any.

    Raises:
        ConfigError: the directory is gone, and the run needs it; else as of :class:`PolicySource`.
    """
    model = Path(config.model).expanduser()
    if checkpoint is None or not model.is_absolute() or model.is_dir():
        return PolicySource(config)
    needs = "adapters are all that its checkpoints hold" if config.use_peft else None
    if needs is None and config.beta > 0:
        needs = f"with beta={config.beta:g} it is the reference policy"
    if needs is not None:
        raise ConfigError(f"model {config.model!r}, with which this run began, is gone, and {needs}; put it back there")
    _log.warning("model %r is gone: tokeniser and sizes are read from %s", config.model, checkpoint)
    return PolicySource(config.replace(model=str(checkpoint)))


def _lacking(found: Mapping[str, Any]) -> str | None:
    """What transformers did not find in a model's files and has drawn at random, on each rank anew; ``None``: it found all."""
    missing = sorted(found["missing_keys"])
    if missing:
        return (
            f"its files have no weights for {', '.join(missing[:3])}{' and others' * (len(missing) > 3)}, which would be drawn "
            "at random; name a causal language model whose files are complete"
        )
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        return f"{name} has the shape {tuple(stored)} in its files, and {tuple(wanted)} by its config.json; mend one of the two"
    return None


def _find(name: str, revision: str | None, *, field: str = "model") -> str:
    """The directory or hub id that is meant by what ``field`` says, or adapters say of their base."""
    path = embedded_model_dir() if name == "embedded" else Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ConfigError(f"revision={revision!r} with {field}={name!r}: only hub models have revisions; leave it out")
        if not any((path / file).exists() for file in ("config.json", SETTINGS_FILE)):
            _refuse_run(path)
        return str(path)
    if (path.parent / CONFIG_FILE).is_file():
        names = _checkpoints(path.parent)
        raise ConfigError(f"cannot load {field.replace('_', ' ')} {name!r}: no such checkpoint is in that run, {names}")
    if _HUB_ID.fullmatch(name) is None:
        told = "" if field == "model" else f"; {field} says where it is now, if adapters name a place that it has left"
        raise ConfigError(
            f"cannot load {field.replace('_', ' ')} {name!r}: there is no such directory. Give a directory with config.json, "
            f"safetensors and tokenizer, or a hub id, which is NAME or OWNER/NAME{told}"
        )
    return name


def _refuse_run(path: Path) -> None:
    """Names what to take in place of a directory that holds no model, but a run."""
    if (path / CONFIG_FILE).exists():
        raise ConfigError(f"cannot load model {str(path)!r}: it is the directory of a run, {_checkpoints(path)}")


def _checkpoints(run: Path) -> str:
    """What a run has, to be put behind its name."""
    found = sorted(run.glob("checkpoint-*"), key=lambda checkpoint: (len(checkpoint.name), checkpoint.name))
    names = ", ".join(checkpoint.name for checkpoint in found)
    return f"whose checkpoints are {names}; name one" if names else "which has no checkpoint yet"


def attention_arguments(config: Config, model_config: PreTrainedConfig) -> dict[str, str]:
    """Arguments that tell transformers which attention a run's model is to have."""
    if config.attn_implementation == "auto":
        return _attention_of_choice(model_config)
    return {"attn_implementation": config.attn_implementation}


def _attention_of_choice(model_config: PreTrainedConfig) -> dict[str, str]:
    """The same under ``auto``: none, unless scores have a softcap.

    ``sdpa`` knows none. Some versions of transformers (5.17, but not 5.23) take it all the same, and leave the softcap out.
    """
    softcap = getattr(model_config.get_text_config(), "attn_logit_softcapping", None)
    return {} if softcap is None else {"attn_implementation": "eager"}


def outline_of(model_config: PreTrainedConfig, config: Config, *, start: Path | None = None) -> PreTrainedModel:
    """A model without weights: modules and sizes alone, adapters included, in no memory.

    Args:
        model_config: of the model.
        config: of the run.
        start: where the adapters are that it begins from.

    Raises:
        ConfigError: it is no causal language model, has another attention than is wanted, or the adapters do not fit it.
    """
    with torch.device("meta"):
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                model_config, trust_remote_code=config.trust_remote_code, **_attention_of_choice(model_config)
            )
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise ConfigError(f"model {config.model!r} cannot be made: {error}") from error
            raise ConfigError(  # transformers' own message names every model that there is
                f"model {config.model!r} is of type {model_config.model_type!r}, for which transformers has no causal language "
                "model; name one that continues text (encoders and most image or audio models cannot be trained here)"
            ) from error
        model.tie_weights()  # transformers 5.0 leaves that to the loading of weights
        if model.base_model is model:
            raise ConfigError(
                f"{type(model).__name__} has no separate part that computes hidden states (its base_model is the whole "
                "model), so it cannot be trained here; choose another model"
            )
        knows_sdpa = model._supports_sdpa and not _attention_of_choice(model_config)
        if config.attn_implementation == "sdpa" and not knows_sdpa:
            raise ConfigError(f"attn_implementation='sdpa': {type(model).__name__} has no such attention; leave it at 'auto'")
        freeze_beside_text(model)
        if config.use_peft:
            adapters = Adapters(model, config)
            if start is None:
                adapters.refuse_unknown_targets()
            else:
                _refuse_misfit(adapters, start)
    return model


def _refuse_misfit(adapters: Adapters, start: Path) -> None:
    try:
        adapters.check_fits(start)
    except (ValueError, OSError, SafetensorError) as error:
        raise ConfigError(f"cannot begin from the adapters in {str(start)!r}: {error}") from error


def computes_in_bfloat16(config: Config, kind: str) -> bool:
    """Whether forward and backward passes on a device ("cuda" or "cpu") are in bfloat16."""
    return config.dtype == "bfloat16" or (config.dtype == "auto" and kind == "cuda" and not _lacks_bfloat16())


def check_dtype(config: Config) -> None:
    """Says what a GPU of before 2020 cannot do: torch would emulate bfloat16 there, and attention kernels refuse it.

    Raises:
        ConfigError: bfloat16 is asked for on such a GPU.
    """
    if pick_device(config.device).type == "cpu" or not _lacks_bfloat16():
        return
    told = f"{device_facts('cuda').name} does not support bfloat16 (that needs compute capability 8.0)"
    if config.dtype == "bfloat16":
        raise ConfigError(f"dtype='bfloat16': {told}; leave dtype at 'auto', which is float32 there")
    if config.dtype == "auto":
        _log.warning("%s: the run computes in float32, without the package's kernels", told)


def _lacks_bfloat16() -> bool:
    return torch.cuda.is_available() and not device_facts("cuda").has_bfloat16


def pick_device(wanted: str) -> torch.device:
    """Turns ``auto``, ``cpu`` or ``cuda`` into a device.

    Raises:
        ConfigError: ``cuda`` is wanted, but torch sees no GPU.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda' but torch sees no GPU; run `grpo-fast doctor`, or set device='auto'")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def _disable_dropout(model: torch.nn.Module) -> None:
    """With dropout the ratio of an on-policy step would not be 1; many models keep its rates as plain numbers."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and any(word in name for word in _RANDOM):
                setattr(module, name, 0.0)
