"""The law: forecasts of reward curves, with numpy and scipy alone.

``OnlinePredictor`` turns observed rewards into forecasts, ``StoppingRule`` turns forecasts into a decision, ``CollapseAlarm``
detects a collapsing policy, ``Prior`` holds the expectations before the first reward and ``fit_prior`` learns one from finished
runs; ``forms`` holds the curves themselves.
"""

from __future__ import annotations

from grpo_fast.law.alarm import AlarmState, CollapseAlarm
from grpo_fast.law.fitting import RewardCurve, fit_prior
from grpo_fast.law.forecast import Band, Forecast, Spending
from grpo_fast.law.predictor import OnlinePredictor
from grpo_fast.law.prior import Prior, RunFacts
from grpo_fast.law.stopping import StopDecision, StoppingRule

__all__ = [
    "AlarmState",
    "Band",
    "CollapseAlarm",
    "Forecast",
    "OnlinePredictor",
    "Prior",
    "RewardCurve",
    "RunFacts",
    "Spending",
    "StopDecision",
    "StoppingRule",
    "fit_prior",
]
