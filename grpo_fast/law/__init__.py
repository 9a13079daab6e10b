"""The law: what a reward curve will come to, from numpy and scipy alone.

``OnlinePredictor`` turns observed rewards into forecasts, ``StoppingRule`` turns forecasts into a decision, ``CollapseAlarm``
tells a policy that comes apart; ``forms`` holds the curves themselves.
"""

from __future__ import annotations

from grpo_fast.law.alarm import AlarmState, CollapseAlarm
from grpo_fast.law.posterior import Settings
from grpo_fast.law.predictor import Band, Forecast, OnlinePredictor
from grpo_fast.law.stopping import StopDecision, StoppingRule

__all__ = [
    "AlarmState",
    "Band",
    "CollapseAlarm",
    "Forecast",
    "OnlinePredictor",
    "Settings",
    "StopDecision",
    "StoppingRule",
]
