from __future__ import annotations

import math

from grpo_fast.integrations.logs.console_lines import read_console
from grpo_fast.integrations.logs.raw_log import Names, RawLog


class AllNames(Names):
    """Keeps every column."""

    def keeps(self, name: str) -> bool:
        super().keeps(name)
        return True


def read(*lines: str) -> RawLog:
    found = read_console("\n".join(lines), AllNames())
    assert found is not None
    return found


VERL = [
    "{'actor_rollout_ref': {'actor': {'ppo_mini_batch_size': 64}}}",
    "\x1b[36m(TaskRunner pid=77)\x1b[0m Total training steps: 435",
    "(TaskRunner pid=77) step:0 - val-core/gsm8k/acc/mean@1:0.508",
    "(TaskRunner pid=77) Training Progress:   0%|          | 1/435 [01:02<7:29:17, 62.11s/it]",
    "\x1b[36m(TaskRunner pid=77)\x1b[0m step:1 - actor/lr:1e-06 - training/epoch:0 - critic/rewards/mean:-0.25 - kl/max:1.0",
    "step:2 - actor/lr:1e-06 - critic/rewards/mean:np.float64(0.5) - actor/grad_norm:nan",
]


def test_verl() -> None:
    found = read(*VERL)
    assert (found.source, found.max_steps) == ("verl console log", 435)
    assert found.rows[0] == {"step": 0, "val-core/gsm8k/acc/mean@1": 0.508}
    assert found.rows[1] == {"step": 1, "actor/lr": 1e-6, "training/epoch": 0, "critic/rewards/mean": -0.25, "kl/max": 1.0}
    assert found.rows[2]["critic/rewards/mean"] == 0.5
    assert math.isnan(found.rows[2]["actor/grad_norm"])
    assert len(found.rows) == 3
    assert read(VERL[3], VERL[4]).max_steps == 435, "from the bar alone"


def test_verl_behind_a_progress_bar() -> None:
    bar = "Training Progress:  3%|#| 3/435 [00:45<1:00, 31.2s/it]"
    found = read(
        f"{bar}(TaskRunner pid=1) step:3 - critic/rewards/mean:0.5\r{bar}\x1b[36m(TaskRunner)\x1b[0m step:4 - reward:1"
    )
    assert [row["step"] for row in found.rows] == [3, 4]


def test_dicts() -> None:
    found = read(
        "(PPOTrainer pid=3) ppo_trainer.py:547] ✨ Global step 12: {'reward': 0.31, 'actor_lr': 5.0e-07, 'kl': None}",
        "{'loss': '0.0031', 'reward': '0.4', 'epoch': '0.1'}",
        '{"reward": 1e-3, "step": 14}  100%|##| 3/3',
        "{'name': 'model', 'kind': 'x'}",
        "nothing of note",
    )
    assert found.source == "console log of Python dicts"
    assert found.rows[0]["step"] == 12
    assert found.rows[0]["actor_lr"] == 5e-7
    assert math.isnan(found.rows[0]["kl"])
    assert found.rows[1] == {"loss": 0.0031, "reward": 0.4, "epoch": 0.1}
    assert found.rows[2] == {"reward": 0.001, "step": 14}
    assert len(found.rows) == 3


def bar(count: int, total: int, reward: float) -> str:
    return f"Episode [1/1]: 9%|█▏ | {count}/{total} [01:23<10:11, 6.95s/it, act_loss=-.0123, reward={reward}, actor_lr=5e-7]"


def test_progress_bars() -> None:
    found = read(*(bar(count, 300, count / 10) for count in (1, 2, 2, 3)), "Loading: 3/4 [00:01<00:02, 2.0s/it]")
    assert (found.source, found.max_steps) == ("progress bars", 300)
    assert found.rows[0] == {"step": 1, "act_loss": -0.0123, "reward": 0.1, "actor_lr": 5e-7}
    assert [row["step"] for row in found.rows] == [1, 2, 2, 3]
    assert found.notes == ["steps are read from a progress bar"]
    anew = read(bar(1, 2, 0.1), bar(2, 2, 0.2), bar(1, 2, 0.3), bar(2, 2, 0.4))
    assert [row["step"] for row in anew.rows] == [1, 2, 3, 4]
    assert (anew.max_steps, anew.notes[1]) == (None, "1 time the bar started again; its counts are added up")
    better = read(bar(1, 300, 0.5), "{'reward': 0.3}")
    assert better.rows == [{"reward": 0.3}], "a bar's three digits are the last resort"


def trl(reward: float) -> str:
    return f"{{'loss': '0.01', 'reward': '{reward}', 'epoch': '0.1'}}"


def bare_bar(count: int, total: int = 200) -> str:
    return f"  {100 * count // total}%|##   | {count}/{total} [00:45<10:11,  8.31s/it]"


def test_a_bar_beside_rows_without_steps() -> None:
    named = "Map: 100%|####| 7473/7473 [00:01<00:00, 900 examples/s]"
    found = read(named, bare_bar(10), trl(0.1), bare_bar(3, 5), bare_bar(5, 5), f"{bare_bar(11)}{bare_bar(20)}{trl(0.2)}")
    assert [row["step"] for row in found.rows] == [10, 20]
    assert found.max_steps == 200
    assert found.notes == ["the rows contain no step; the steps of the progress bar between them, of 200, are used"]
    own = read(bare_bar(10), "{'reward': 0.1, 'step': 7}")
    assert (own.rows, own.max_steps, own.notes) == ([{"reward": 0.1, "step": 7}], None, []), "rows that tell a step keep it"


def test_a_bar_before_rows_that_were_written_at_once() -> None:
    bars = [bare_bar(count) for count in range(41)]
    found = read(*bars[:31], trl(0.1), trl(0.2), *bars[31:], trl(0.3), trl(0.4))
    assert [row["step"] for row in found.rows] == [10, 20, 30, 40]
    assert found.max_steps == 200
    assert found.notes == ["the rows contain no step; 4 rows on 40 steps of a progress bar are taken as one every 10"]
    for unclear in (
        read(*bars, *map(trl, range(27))),  # 40 steps for 27 rows
        read("  0%| | 0/9 [0<0, 1s/it]", trl(0.1), trl(0.2)),
        read(bare_bar(40), trl(0.1), trl(0.2)),  # one bar drawn, at its end
    ):
        assert all("step" not in row for row in unclear.rows)
        assert (unclear.max_steps, unclear.notes) == (None, [])


def test_a_step_beside_all_that_are_planned() -> None:
    found = read("{'reward': 0.5, 'global_step/max_steps': '5/3766', 'percentage': '0.13%'}")
    assert (found.rows[0]["step"], found.rows[0]["reward"], found.max_steps) == (5, 0.5, 3766)
    assert read("***** Running training *****", "  Total optimization steps = 1,250", trl(0.1)).max_steps == 1250


def test_what_is_no_log() -> None:
    assert read_console("step: 3 of the recipe - stir:well\na { b } c\n\n", Names()) is None
    assert read("total_training_steps: 0", "step:1 - reward:1").max_steps is None
    assert read("'total_training_steps': 20", "total_training_steps=30", "step:1 - reward:1").max_steps == 30
