"""A prior in plain numbers: the probabilities of rises by size, and of shapes."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtr, softmax

from grpo_fast.law.fitting import Witness
from grpo_fast.law.forms import Array
from grpo_fast.law.prior import PARTS, Prior, features
from grpo_fast.law.shapes import CLASSES

RISES = {
    "falls": -0.02,
    "hardly moves": 0.02,
    "rises by 0.02 to 0.1": 0.1,
    "by 0.1 to 0.3": 0.3,
    "by 0.3 to 0.6": 0.6,
    "by more than 0.6": math.inf,
}
"""Rises over a whole budget in units of the reward's range: the upper edge of each kind."""

_FLAT = CLASSES.index("none")
_STILL = list(RISES).index("hardly moves")


def typical(witnesses: list[Witness]) -> Array:
    """(7,) features in which a prior is linear, of a typical run."""
    return np.asarray(np.mean([features(one.facts, one.scale, horizon=one.horizon) for one in witnesses], axis=0))


def rise_shares(prior: Prior, known: Array) -> dict[str, float]:
    """Probability of each of :data:`RISES`; they sum to 1.

    Args:
        prior: whose.
        known: (7,) of the run, as :func:`~grpo_fast.law.prior.features` makes it.
    """
    mean, deviation = np.array(PARTS).T
    edges = np.array([-math.inf, *RISES.values()])
    below = ndtr((edges[:, None] - mean) / deviation) @ softmax(prior.part_logits @ known)
    flat = shape_shares(prior, known)[CLASSES[_FLAT]]
    shares = (1.0 - flat) * np.diff(below)
    shares[_STILL] += flat
    return dict(zip(RISES, shares.tolist(), strict=True))


def shape_shares(prior: Prior, known: Array) -> dict[str, float]:
    """Probability of each class of shapes; arguments as for :func:`rise_shares`."""
    return dict(zip(CLASSES, softmax(prior.class_logits @ known).tolist(), strict=True))


def witnessed_shape(one: Witness, prior: Prior) -> tuple[str, float]:
    """The class of shapes that a run speaks for most, and its probability."""
    known = features(one.facts, one.scale, horizon=one.horizon)
    log_parts, log_classes = (np.log(softmax(logits @ known)) for logits in (prior.part_logits, prior.class_logits))
    shapes = softmax(one.evidence + log_parts[:, None] + log_classes).sum(axis=0)
    best = int(shapes.argmax())
    return CLASSES[best], float(shapes[best])
