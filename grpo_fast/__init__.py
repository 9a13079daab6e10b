"""grpo_fast: GRPO training that meters its compute and stops when its forecast says that more training no longer pays.

The library API; each name is imported when it is first used, so that ``import grpo_fast`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fast.lazy import lazy_names

if TYPE_CHECKING:
    from grpo_fast.compute import Budget as Budget
    from grpo_fast.compute import ComputeMeter as ComputeMeter
    from grpo_fast.compute import ModelShape as ModelShape
    from grpo_fast.config import Config as Config
    from grpo_fast.config import ConfigError as ConfigError
    from grpo_fast.integrations import PlateauStopCallback as PlateauStopCallback
    from grpo_fast.law import Forecast as Forecast
    from grpo_fast.law import OnlinePredictor as OnlinePredictor
    from grpo_fast.law import Prior as Prior
    from grpo_fast.law import RunFacts as RunFacts
    from grpo_fast.law import Spending as Spending
    from grpo_fast.law import StoppingRule as StoppingRule
    from grpo_fast.recipes import recipe as recipe
    from grpo_fast.report import write_report as write_report
    from grpo_fast.rollout import RolloutEngine as RolloutEngine
    from grpo_fast.rollout import SamplingParams as SamplingParams
    from grpo_fast.train import GRPOTrainer as GRPOTrainer
    from grpo_fast.train import RewardModel as RewardModel

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Budget": "compute",
        "ComputeMeter": "compute",
        "Config": "config",
        "ConfigError": "config",
        "Forecast": "law",
        "GRPOTrainer": "train",
        "ModelShape": "compute",
        "OnlinePredictor": "law",
        "PlateauStopCallback": "integrations",
        "Prior": "law",
        "RewardModel": "train",
        "RolloutEngine": "rollout",
        "RunFacts": "law",
        "SamplingParams": "rollout",
        "Spending": "law",
        "StoppingRule": "law",
        "recipe": "recipes",
        "write_report": "report",
    },
)
