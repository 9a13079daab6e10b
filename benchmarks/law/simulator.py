"""Simulated GRPO runs with a known mean: a pool of prompts whose success logits are pushed by the objective's own drift.

A prompt with success probability ``p`` and ``G`` completions gets no gradient where all of them agree, so its logit moves by
``lr * (p * (1 - p)) ** a * (1 - p**G - (1 - p)**G)``, where ``a`` is 1/2 for advantages divided by their standard deviation
and 1 for centred ones. Part of every prompt's push is shared with all others through momentum, a pull towards the first policy
stands for the KL term, and some prompts cannot be learnt. The observed reward is the mean of ``P`` prompts drawn without
replacement, epoch after epoch, with ``G`` Bernoulli completions each.

None of the forms in ``grpo_fast.law`` is a solution of this, which is the point: a forecaster is judged on curves that it
cannot hold, with the truth known. Five stories are told: plain learning, a format that must be learnt before anything counts,
hard prompts that open up in the middle of the run, a run that breaks, and one that learns nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from benchmarks.law.curves import Array, Curve

STORIES = {"plain": 0.52, "format first": 0.14, "hard part later": 0.1, "breaks": 0.08, "flat": 0.16}
LITTLE = 0.01  # a gain that is not worth having, as the package's default has it
_POOL = 512


@dataclass(frozen=True)
class Run:
    """Constants of one simulated run.

    Attributes:
        story: one of STORIES.
        steps: T.
        num_prompts: P.
        num_generations: G.
        schedule: "constant", "linear" or "cosine".
        warmup: share of the steps.
        rate: summed learning rate of the budget in logits of an undamped push.
        exponent: of ``p * (1 - p)`` in the drift.
        shared: share of a push that goes to all prompts alike.
        momentum: of the shared push.
        anchor: pull of the KL term per unit of learning rate.
        impossible: share of prompts that cannot be learnt.
    """

    story: str
    steps: int
    num_prompts: int
    num_generations: int
    schedule: str
    warmup: float
    rate: float
    exponent: float
    shared: float
    momentum: float
    anchor: float
    impossible: float


def drawn(rng: np.random.Generator) -> Run:
    """Constants as they differ between published runs: 2 to 64 prompts, 4 to 16 completions, 60 to 400 steps."""
    return Run(
        story=str(rng.choice(list(STORIES), p=list(STORIES.values()))),
        steps=int(rng.integers(60, 401)),
        num_prompts=int(2 ** rng.integers(1, 7)),
        num_generations=int(2 ** rng.integers(2, 5)),
        schedule=str(rng.choice(["constant", "linear", "cosine"])),
        warmup=float(rng.choice([0.0, 0.03, 0.1])),
        rate=float(np.exp(rng.normal(2.9, 0.9))),
        exponent=float(rng.choice([0.5, 1.0])),
        shared=float(rng.uniform(0.2, 0.9)),
        momentum=float(rng.uniform(0.0, 0.9)),
        anchor=float(rng.choice([0.0, 0.0, 0.02, 0.1])),
        impossible=float(rng.beta(1.5, 5.0)),
    )


def learning_rates(run: Run) -> Array:
    """(T,) learning rate of each step, 1 at its peak."""
    done = np.arange(run.steps) / run.steps
    decay = {"constant": np.ones_like(done), "linear": 1.0 - done, "cosine": 0.5 * (1.0 + np.cos(np.pi * done))}[run.schedule]
    return np.asarray(decay * (np.minimum(1.0, (done + 1.0 / run.steps) / run.warmup) if run.warmup > 0 else 1.0))


def simulate(seed: int, run: Run | None = None) -> Curve:
    """One run: its observed rewards, their known mean, and its learning-rate clock.

    Args:
        seed: of everything that is random, the constants included where they are not given.
        run: the constants.
    """
    rng = np.random.default_rng(seed)
    run = run or drawn(rng)
    rates = learning_rates(run)
    mean, observed = _mean_and_observed(run, rates / rates.sum() * run.rate, rng)
    return Curve(
        name=f"simulated {seed}",
        repository=f"simulated {seed}",
        steps=np.arange(1.0, run.steps + 1),
        rewards=observed,
        label="flat" if np.ptp(mean) < 2 * LITTLE else "",
        group_size=run.num_generations,
        rollouts=run.num_prompts * run.num_generations,
        task=run.story,
        clock=np.cumsum(rates) / rates.sum(),
        mean=mean,
    )


def _mean_and_observed(run: Run, rates: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    logit, learnable, hard = _pool(run, rng)
    first, form = logit.copy(), rng.normal(-2.5, 0.6) if run.story == "format first" else np.inf
    breaks = int(rng.uniform(0.3, 0.85) * run.steps) if run.story == "breaks" else run.steps
    fall = rng.uniform(0.15, 0.6)
    opens = rng.uniform(0.3, 0.7) * run.steps
    push, mean, observed = 0.0, np.empty(run.steps), np.empty(run.steps)
    order = np.empty(0, dtype=int)
    for step, rate in enumerate(rates):
        given = float(expit(form))
        p = expit(logit) * given
        if order.size < run.num_prompts:
            order = np.concatenate([order, rng.permutation(_POOL)])
        asked, order = order[: run.num_prompts], order[run.num_prompts :]
        mean[step] = p.mean()
        observed[step] = rng.binomial(run.num_generations, p[asked]).mean() / run.num_generations
        if step >= breaks:
            logit = logit - fall * rng.exponential()
            continue
        drive = (p * (1 - p)) ** run.exponent * (1 - p**run.num_generations - (1 - p) ** run.num_generations)
        # What P prompts of G completions say of the mean push is itself noisy.
        noise = rng.standard_normal() * drive.std() / np.sqrt(run.num_prompts)
        push = run.momentum * push + (1 - run.momentum) * (float((drive * learnable).mean()) + noise)
        opened = np.where(hard & (step < opens), 0.01, 1.0)
        logit = logit + rate * opened * learnable * ((1 - run.shared) * drive + run.shared * push)
        logit = logit - rate * run.anchor * (logit - first)
        form += 4.0 * rate * np.sqrt(given * (1 - given)) if np.isfinite(form) else 0.0
    return mean, observed


def _pool(run: Run, rng: np.random.Generator) -> tuple[Array, Array, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """First logits, learnability and which prompts are the hard ones."""
    centre, spread = rng.normal(-0.5, 1.4), rng.uniform(0.6, 2.2)
    logit = centre + spread * rng.standard_normal(_POOL)
    learnable = rng.lognormal(0.0, 0.5, _POOL)
    impossible = rng.random(_POOL) < run.impossible
    logit[impossible], learnable[impossible] = np.minimum(logit[impossible], 0.0) - 4.0, 0.0
    if run.story == "flat":
        learnable *= 0.01
    hard = (rng.random(_POOL) < rng.uniform(0.25, 0.5)) & ~impossible & (run.story == "hard part later")
    logit[hard] -= 4.0
    learnable[hard] *= 6.0
    return logit, learnable, hard
