from __future__ import annotations

import pytest

from grpo_fast.integrations.logs.log_columns import choose_columns, plain


@pytest.mark.parametrize(
    ("names", "reward", "step"),
    [
        (["loss", "reward", "reward_std", "step", "eval_reward"], "reward", "step"),
        (["train/reward", "train/global_step", "_step", "eval/reward"], "train/reward", "train/global_step"),
        (["step", "critic/score/mean", "critic/rewards/mean", "critic/rewards/max"], "critic/rewards/mean", "step"),
        (["step", "critic/score/mean", "val-core/gsm8k/reward/mean@1"], "critic/score/mean", "step"),
        (["Step", "brave-sun-3 - train/reward", "brave-sun-3 - train/reward__MIN"], "brave-sun-3 - train/reward", "Step"),
        (["rewards/accuracy/mean", "rewards/accuracy/std", "step"], "rewards/accuracy/mean", "step"),
        (["Reward", "Iteration"], "Reward", "Iteration"),
        (["Global Step", "Mean Reward", "Reward Std", "Learning Rate"], "Mean Reward", "Global Step"),
        (["Step", "Training Reward", "Eval Reward", "Reward Max"], "Training Reward", "Step"),
        (["reward"], "reward", None),
        (["training/global_step", "training/reward", "validation/reward"], "training/reward", "training/global_step"),
        (["step", "progress/batch", "env/all/correct", "env/all/reward/total"], "env/all/reward/total", "step"),
        (
            ["_step", "reward/avg_raw_reward", "reward/avg_pass_at_5", "trainer/global_step"],
            "reward/avg_raw_reward",
            "trainer/global_step",
        ),
    ],
)
def test_guesses(names: list[str], reward: str, step: str | None) -> None:
    found = choose_columns(names)
    assert (found.reward, found.step) == (reward, step)


def test_columns_beside_the_reward() -> None:
    found = choose_columns(["step", "reward", "reward_std", "actor/lr", "accuracy"])
    assert (found.reward_std, found.learning_rate, found.others) == ("reward_std", "actor/lr", ("accuracy",))
    assert choose_columns(["step", "rewards/mean", "reward_std"]).reward_std is None, "the spread of another column"
    spaced = choose_columns(["Global Step", "Reward", "Reward Std", "Learning Rate"])
    assert (spaced.reward_std, spaced.learning_rate) == ("Reward Std", "Learning Rate")
    runs = ["Step", "a - reward", "b - learning_rate", "a - learning_rate"]
    assert choose_columns(runs).learning_rate == "a - learning_rate"


@pytest.mark.parametrize(
    ("names", "wanted", "message"),
    [
        (
            ["Step", "a - reward", "b - reward"],
            None,
            "more than one column may be the reward; .*--reward-column: a - reward, b - r",
        ),
        (
            ["step", "rewards/format/mean", "rewards/accuracy/mean"],
            None,
            "parts of a reward but no whole.*rewards/format/mean, ",
        ),
        (["step", "loss", "eval_reward"], None, "no column is known to be a reward.*It has step, loss, eval_reward"),
        ([], None, "no columns of numbers"),
        (["step", "rewards"], "reward", "no column 'reward'; did you mean 'rewards'"),
        (["Step", "a - reward", "b - reward"], "reward", "'reward' is the name of 2 columns"),
        ([f"column{i}" for i in range(20)], "x", "and 8 more"),
    ],
)
def test_doubt_is_an_error_that_lists_the_candidates(names: list[str], wanted: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_columns(names, reward_column=wanted)


def test_columns_of_sums() -> None:
    found = choose_columns(["step", "train/reward", "tokens", "train/num_tokens", "wall_s", "gpu_seconds"])
    assert (found.tokens, found.seconds) == ("train/num_tokens", "gpu_seconds"), "the surest name wins"
    spaced = choose_columns(["Global Step", "Reward", "Reward Std", "Learning Rate"])
    assert (spaced.reward_std, spaced.learning_rate) == ("Reward Std", "Learning Rate")
    runs = ["Step", "a - reward", "b - num_tokens", "a - _runtime"]
    found = choose_columns(runs, reward_column="reward")
    assert (found.tokens, found.seconds) == (None, "a - _runtime"), "another run's column says nothing"
    found = choose_columns(["step", "reward", "perf/total_num_tokens", "timing_s/step", "step_time"])
    assert (found.tokens, found.seconds) == (None, None), "those of one step"


def test_a_column_that_is_named() -> None:
    assert choose_columns(["step", "reward", "loss"], reward_column="loss").reward == "loss"
    assert choose_columns(["Step", "a - loss", "a - reward"], reward_column="loss").reward == "a - loss"
    found = choose_columns(["step", "learning_rate"], reward_column="step")
    assert (found.reward, found.step) == ("step", None)


def test_plain_names() -> None:
    assert [plain(name) for name in ("my run - train/Reward", "metrics/reward", "train_reward")] == ["reward"] * 3
    assert plain("critic/rewards/mean") == "critic/rewards/mean"
