"""The choice among checkpoints, before and after something goes wrong."""

from __future__ import annotations

import json
import math

from grpo_fast.train.best import BestCheckpoints, Saved


def filled(*rows: tuple[int, float, float | None]) -> BestCheckpoints:
    best = BestCheckpoints()
    for step, train, held_out in rows:
        best.add(step, train=train, held_out=held_out)
    return best


def test_training_reward_decides_where_nothing_was_evaluated():
    best = filled((10, 0.4, None), (20, 0.6, None), (30, 0.5, None), (40, 0.6, None))
    assert best.best() == Saved(20, 0.6), "of equals the older one"
    assert best.best(until=19) == Saved(10, 0.4)
    assert best.best(until=9) is None
    assert (best.best().name, best.best().by) == ("checkpoint-20", "training reward")


def test_held_out_reward_decides_where_there_is_one():
    best = filled((10, 0.9, 0.4), (20, 0.5, 0.6), (30, 0.95, None))
    assert best.best() == Saved(20, 0.5, 0.6)
    assert (best.best().metric, best.best().by) == (0.6, "held-out reward")
    assert best.is_better(0.61)
    assert not best.is_better(0.6)
    assert not best.is_better(math.nan)
    assert BestCheckpoints().is_better(-3.0)


def test_unknown_rewards_and_the_untrained_policy_are_no_best():
    best = filled((0, 0.9, 0.9), (10, math.nan, math.nan), (20, math.nan, None))
    assert best.best() is None
    assert best.protected(sound_until=100) == set()
    best.add(20, train=-1.0, held_out=None)
    assert best.best() == Saved(20, -1.0), "saved again, with a reward now"


def test_the_best_and_the_best_of_the_sound_are_protected():
    best = filled((10, 0.4, None), (20, 0.5, None), (30, 0.7, None))
    assert best.protected(sound_until=25) == {"checkpoint-20", "checkpoint-30"}
    assert best.protected(sound_until=30) == {"checkpoint-30"}
    assert best.protected(sound_until=5) == {"checkpoint-30"}
    best.forget_after(25)
    assert best.best() == Saved(20, 0.5)


def test_what_is_gone_is_forgotten_and_the_rest_survives_json():
    best = filled((10, 0.4, None), (20, 0.5, 0.3))
    again = BestCheckpoints.from_state_dict(json.loads(json.dumps(best.state_dict())))
    assert again.best() == best.best() == Saved(20, 0.5, 0.3)
    again.keep_only(["checkpoint-10", "checkpoint-30"])
    assert again.best() == Saved(10, 0.4)
