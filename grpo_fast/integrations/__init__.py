"""For people who train with other tools: TRL's trainer with the fused loss, a callback that stops at the plateau, forecasts.

Each name is imported when it is first used: the trainer needs TRL, the callback transformers, the logs neither that nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fast.lazy import lazy_names

if TYPE_CHECKING:
    from grpo_fast.integrations.forecast import forecast_log as forecast_log
    from grpo_fast.integrations.log_forecast import LogForecast as LogForecast
    from grpo_fast.integrations.logs import LogError as LogError
    from grpo_fast.integrations.logs import RewardLog as RewardLog
    from grpo_fast.integrations.logs import read_log as read_log
    from grpo_fast.integrations.transformers_callback import PlateauStopCallback as PlateauStopCallback
    from grpo_fast.integrations.trl import FusedGRPOTrainer as FusedGRPOTrainer

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "FusedGRPOTrainer": "trl",
        "LogError": "logs",
        "LogForecast": "log_forecast",
        "PlateauStopCallback": "transformers_callback",
        "RewardLog": "logs",
        "forecast_log": "forecast",
        "read_log": "logs",
    },
)
