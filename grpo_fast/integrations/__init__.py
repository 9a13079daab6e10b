"""For people who train with other tools: TRL's trainer with the fused loss, a callback that stops at the plateau, forecasts.

Each name is imported when it is first used: the trainer needs TRL, the callback transformers, the logs neither that nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_fast.integrations.forecast import forecast_log as forecast_log
    from grpo_fast.integrations.log_forecast import LogForecast as LogForecast
    from grpo_fast.integrations.logs import LogError as LogError
    from grpo_fast.integrations.logs import RewardLog as RewardLog
    from grpo_fast.integrations.logs import read_log as read_log
    from grpo_fast.integrations.transformers_callback import PlateauStopCallback as PlateauStopCallback
    from grpo_fast.integrations.trl import FusedGRPOTrainer as FusedGRPOTrainer

_HOMES = {
    "FusedGRPOTrainer": "trl",
    "LogError": "logs",
    "LogForecast": "log_forecast",
    "PlateauStopCallback": "transformers_callback",
    "RewardLog": "logs",
    "forecast_log": "forecast",
    "read_log": "logs",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605 (the names are strings)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'grpo_fast.integrations' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"grpo_fast.integrations.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
