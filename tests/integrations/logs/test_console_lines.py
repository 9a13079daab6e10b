from __future__ import annotations

import math

from grpo_fast.integrations.logs.console_lines import planned_steps, read_console

VERL = [
    "{'actor_rollout_ref': {'actor': {'ppo_mini_batch_size': 64}}}",
    "\x1b[36m(TaskRunner pid=77)\x1b[0m Total training steps: 435",
    "(TaskRunner pid=77) step:0 - val-core/gsm8k/acc/mean@1:0.508",
    "(TaskRunner pid=77) Training Progress:   0%|          | 1/435 [01:02<7:29:17, 62.11s/it]",
    "\x1b[36m(TaskRunner pid=77)\x1b[0m step:1 - actor/lr:1e-06 - training/epoch:0 - critic/rewards/mean:-0.25 - kl/max:1.0",
    "step:2 - actor/lr:1e-06 - critic/rewards/mean:np.float64(0.5) - actor/grad_norm:nan",
]


def test_verl() -> None:
    rows, source = read_console(VERL)
    assert source == "verl console log"
    assert rows[0] == {"step": 0, "val-core/gsm8k/acc/mean@1": 0.508}
    assert rows[1] == {"step": 1, "actor/lr": 1e-6, "training/epoch": 0, "critic/rewards/mean": -0.25, "kl/max": 1.0}
    assert rows[2]["critic/rewards/mean"] == 0.5
    assert math.isnan(rows[2]["actor/grad_norm"])
    assert len(rows) == 3
    assert planned_steps(VERL) == 435
    assert planned_steps(VERL[3:4]) == 435, "from the bar alone"


def test_dicts() -> None:
    rows, source = read_console(
        [
            "(PPOTrainer pid=3) ppo_trainer.py:547] ✨ Global step 12: {'reward': 0.31, 'actor_lr': 5.0e-07, 'kl': None}",
            "{'loss': '0.0031', 'reward': '0.4', 'epoch': '0.1'}",
            '{"reward": 1e-3, "step": 14}  100%|##| 3/3',
            "{'name': 'model', 'kind': 'x'}",
            "nothing of note",
        ]
    )
    assert source == "console log of Python dicts"
    assert rows[0]["step"] == 12
    assert rows[0]["actor_lr"] == 5e-7
    assert math.isnan(rows[0]["kl"])
    assert rows[1] == {"loss": 0.0031, "reward": 0.4, "epoch": 0.1}
    assert rows[2] == {"reward": 0.001, "step": 14}
    assert len(rows) == 3


def test_what_is_no_log() -> None:
    assert read_console(["step: 3 of the recipe - stir:well", "a { b } c", ""])[0] == []
    assert planned_steps(["nothing", "total_training_steps: 0"]) is None
    assert planned_steps(["'total_training_steps': 20", "total_training_steps=30"]) == 30
