"""Saved LoRA adapters as the start of a run: where they are, over which model, and with which settings.

What ``model`` names may hold peft's two files in place of a whole model. They are read as they are: rank, scale and modules are
the adapters' own, and the base is the model that they were trained over.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from grpo_fast.config import Config, ConfigError
from grpo_fast.run_dir import CONFIG_FILE
from grpo_fast.train.adapters import SETTINGS_FILE, WEIGHTS_FILE
from grpo_fast.train.resumable import config_of

_log = logging.getLogger(__name__)
_TOKENIZER_FILE = "tokenizer_config.json"
_OF_NO_MATTER = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "lora_dropout", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "fan_in_fan_out"),
}
"""Settings of peft that say nothing of the weights, or what the base says too. There is no dropout in training."""
_KNOWN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the base too
}
"""Others, and the values of them that are understood."""
OWN_SETTINGS = {"lora_r": "r", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora", "lora_target_modules": "target_modules"}
"""Settings here, by the name that peft has for them."""


@dataclass(frozen=True, slots=True)
class AdapterStart:
    """Saved adapters."""

    directory: Path
    """Directory of their files; for the hub's, in the cache."""
    has_tokenizer: bool
    """Whether a tokeniser was saved with them."""
    base: str
    """Model under them: a directory or a hub id."""
    base_revision: str | None
    """Revision of the base, where they name one."""
    settings: dict[str, Any]
    """Rank, scale and modules, by the names of the configuration's fields."""

    def applied(self, config: Config) -> Config:
        """The configuration with the adapters' own settings, and the revision of their base.

        Raises:
            ConfigError: it says something else of them, or does not train adapters.
        """
        if not config.use_peft:
            ours = (self.directory.parent / CONFIG_FILE).exists()
            merge = f"`grpo-fast export {self.directory} --output DIRECTORY`" if ours else "peft's merge_and_unload"
            raise ConfigError(
                f"model {config.model!r} holds adapters alone: set use_peft to train them on, or merge them first, by {merge}"
            )
        other = {
            name: own
            for name, own in self.settings.items()
            if getattr(config, name) not in (type(config).model_fields[name].default, own)
            and not (name == "lora_target_modules" and sorted(getattr(config, name)) == sorted(own))
        }
        if other:
            told = ", ".join(f"{name}={getattr(config, name)!r} is {own!r} there" for name, own in other.items())
            raise ConfigError(
                f"the adapters that model={config.model!r} holds have settings of their own: {told}; leave it out"
            )
        self._tell_other_base(config)
        return config.replace(**self.settings, revision=self.base_revision)

    def _tell_other_base(self, config: Config) -> None:
        """Adapters do not say whether their base was in four bits, but the run that trained them does."""
        if not (self.directory.parent / CONFIG_FILE).is_file():
            return
        then = config_of(self.directory.parent).load_in_4bit
        if then != config.load_in_4bit:
            _log.warning(
                "the adapters in %s were trained with load_in_4bit=%s, and this run has load_in_4bit=%s: it begins over other "
                "base weights than they were made for",
                *(self.directory, then, config.load_in_4bit),
            )


def find_start(config: Config, source: str, *, local_files_only: bool) -> AdapterStart | None:
    """The adapters that ``model`` names; ``None`` where it names a whole model, or nothing that can be read.

    Args:
        config: of the run; ``base_model`` says what is under them, where they do not, or say it wrongly.
        source: the directory or hub id.
        local_files_only: whether only the hub's cache is read.

    Raises:
        ConfigError: adapters of a kind that is not trained here, damaged, or of an unknown base.
    """
    get = reader(source, config.revision, local_files_only=local_files_only)
    settings = None if get("config.json") else get(SETTINGS_FILE)
    if settings is None:
        if config.base_model is not None:
            raise ConfigError(
                f"base_model={config.base_model!r} with model={config.model!r}, which holds no adapters; leave it out, or name "
                f"what holds {SETTINGS_FILE} as model"
            )
        return None
    told = f"cannot begin from the adapters in {config.model!r}: "
    if get(WEIGHTS_FILE) is None:
        raise ConfigError(f"{told}there is no {WEIGHTS_FILE} beside {SETTINGS_FILE}")
    found = _read(settings, told)
    base = config.base_model or found.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{told}{SETTINGS_FILE} does not say over which model they were trained; set base_model")
    own: dict[str, Any] = {name: found.get(key, False) for name, key in OWN_SETTINGS.items()}  # use_rslora may be missing
    own["lora_target_modules"] = tuple(sorted(own["lora_target_modules"]))
    return AdapterStart(
        directory=settings.parent,
        has_tokenizer=get(_TOKENIZER_FILE) is not None,
        base=base,
        base_revision=None if config.base_model or Path(base).is_dir() else found.get("revision"),
        settings=own,
    )


def _read(file: Path, told: str) -> dict[str, Any]:
    """Peft's settings, all of which are understood."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kinds: dict[str, Any] = {"r": int, "lora_alpha": (int, float), "target_modules": list}
        wrong = [name for name, kind in kinds.items() if not isinstance(found.get(name), kind)]
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{told}{SETTINGS_FILE} cannot be read ({error})") from error
    for name, value in found.items():
        plain = value in _KNOWN[name] if name in _KNOWN else not value or name in {*_OF_NO_MATTER, *OWN_SETTINGS.values()}
        if not plain:
            raise ConfigError(
                f"{told}they have {name}={value!r}, and adapters are trained here that rank, scale and names of modules tell "
                "all of; merge them first, by peft's merge_and_unload, and begin from what that gives"
            )
    if wrong:
        raise ConfigError(
            f"{told}{SETTINGS_FILE} has {wrong[0]}={found.get(wrong[0])!r}, which is none of LoRA as trained here"
        )
    return found


def reader(source: str, revision: str | None, *, local_files_only: bool) -> Callable[[str], Path | None]:
    """What gives a file of a directory or of the hub, by its name; ``None`` where it is not there."""

    def get(name: str) -> Path | None:
        if Path(source).is_dir():
            return Path(source) / name if (Path(source) / name).is_file() else None
        try:
            return Path(hf_hub_download(source, name, revision=revision, local_files_only=local_files_only))
        except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError):  # what can be read of a model is told when it is read
            return None

    return get
