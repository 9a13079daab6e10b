"""Replayed stops: what is saved and lost by hand, and no rule but the oracle sees the future."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.law.baselines import BASELINES
from benchmarks.law.curves import Curve
from benchmarks.law.models import Law
from benchmarks.law.stopping import (
    Fixed,
    LawStop,
    Oracle,
    Patience,
    PlugIn,
    first_point,
    judge,
    replay,
    summary,
)

EXPONENTIAL = next(fit for fit in BASELINES if fit.name == "exponential + R0")


def risen(name: str = "a", *, noise: float = 0.0, seed: int = 0, size: int = 100) -> Curve:
    """Rises in a straight line to 0.8 at 40 % of the run and stays."""
    steps = np.arange(1.0, size + 1)
    mean = 0.2 + 0.6 * np.minimum(steps / (0.4 * size), 1.0)
    rewards = np.clip(mean + noise * np.random.default_rng(seed).standard_normal(size), 0, 1)
    return Curve(name=name, repository=name, steps=steps, rewards=rewards, mean=mean)


def test_saved_and_lost_by_hand():
    curve = risen()
    stop = judge("x", curve, 30, oracle=40)
    assert stop.saved == pytest.approx(0.7)
    assert stop.lost == pytest.approx(0.8 - 0.65)
    assert (stop.false, stop.bad, stop.stopped) == (1.0, 1.0, True)
    assert stop.utility == pytest.approx(0.05 * 0.7 - 0.15)
    assert judge("x", curve, None, oracle=40).missed == 1.0
    late = judge("x", curve, 39)
    assert late.lost == pytest.approx(0.015)
    assert (late.false, late.bad) == (0.0, 0.0)


def test_a_fall_after_the_stop_is_no_loss_but_its_sign_is_kept():
    mean = np.concatenate([np.full(50, 0.6), np.full(50, 0.3)])
    stop = judge("x", replace(risen(), mean=mean), 50)
    assert stop.lost == 0.0
    assert stop.change == pytest.approx(-0.3)
    assert stop.lost_at_best == 0.0


def test_the_oracle_stops_at_the_first_point_that_loses_little_enough():
    # 0.015 a point: one point before the top 0.015 are lost, at it none.
    assert Oracle().stop(risen()) == 40
    assert Oracle().stop(replace(risen(), mean=np.full(100, 0.5))) == first_point(100) == 10


def test_fixed_and_patience_by_hand():
    assert Fixed(0.4).stop(risen()) == 40
    # The mean of the last 10 points is best to within 0.005 of its top at 48 points, 20 % later the run is stopped.
    assert 66 <= Patience(0.2).stop(risen()) <= 70
    rising = replace(risen(), rewards=np.linspace(0.1, 0.9, 100))
    assert Patience(0.2).stop(rising) is None


RULES = [Fixed(0.6), Patience(0.1), PlugIn(EXPONENTIAL)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_no_rule_looks_ahead(rule):
    curve = risen(noise=0.02)
    at = rule.stop(curve)
    assert at is not None
    other = curve.rewards.copy()
    other[at:] = 0.0
    assert rule.stop(replace(curve, rewards=other)) == at


def test_the_law_stops_behind_the_rise_and_does_not_look_ahead():
    curve = risen(noise=0.02)
    at = LawStop(Law(), 0.8).stop(curve)
    assert at is not None
    assert at >= 40
    other = curve.rewards.copy()
    other[at:] = 0.0
    assert LawStop(Law(), 0.8).stop(replace(curve, rewards=other)) == at


def test_a_replay_weighs_repositories_and_leaves_unknown_scales_out():
    curves = [risen("a"), risen("b"), replace(risen("c"), unit_interval=False)]
    stops = replay([Fixed(0.2), Fixed(0.8), Oracle()], curves)
    assert len(stops) == 6
    early, late = (summary([stop for stop in stops if stop.rule == name]) for name in ("fixed 20%", "fixed 80%"))
    assert early["saved"] == pytest.approx(0.8)
    assert early["false"] == 1.0
    assert late["lost"] == 0.0
    assert late["share_of_oracle"] == pytest.approx(0.2 / 0.6)
    oracle = summary([stop for stop in stops if stop.rule == "hindsight oracle"])
    assert oracle["share_of_oracle"] == 1.0
    assert oracle["missed"] == 0.0
