"""What Python's fork server imports once for all processes of :mod:`~tests.rollout.warm`: vLLM and the trainer."""

import gc
from importlib import import_module

gc.disable()
for name in (
    "torch.distributed.launcher.api",
    "vllm.entrypoints.openai.api_server",
    "grpo_fast.cli",
    "grpo_fast.rollout.vllm_in_process",
    "grpo_fast.rollout.vllm_server",
    "grpo_fast.train.evaluate_model",
):
    import_module(name)
gc.freeze()  # else each process looks through all of it as it ends, and copies the pages
gc.enable()
