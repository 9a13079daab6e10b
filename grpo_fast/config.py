"""The whole configuration of a run: one flat, typed record, each field documented where it stands.

Names follow TRL's ``GRPOConfig`` where it has one. The same record is read from TOML, from the command line and in
Python, and is written back, resolved, into every run. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import tomli_w
from pydantic import AfterValidator, Field, ValidationError, model_validator

from grpo_fast.config_file import ConfigError, read_toml
from grpo_fast.config_model import ModelSettings, group
from grpo_fast.consistency import check_consistency
from grpo_fast.explain import explain
from grpo_fast.given_values import ONE_OR_SEVERAL, SchedulerType, dataset_anywhere, expanded, refuse_misread
from grpo_fast.json_object import JsonObject

__all__ = ["Config", "ConfigError", "read_toml"]

LossType = Literal["grpo", "dr_grpo", "bnpo", "dapo", "cispo", "gspo", "rloo", "luspo", "sapo", "vespo"]
ImportanceMode = Literal[
    "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_truncate", "geometric_mask"
]

_MICROBATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
_DATA, _REWARD, _ROLLOUT, _OBJECTIVE = map(group, ("Data", "Reward", "Rollout", "Objective"))
_OPTIM, _BUDGET, _FORECAST, _RUN = map(group, ("Optimiser", "Budget", "Forecast", "Run"))


class Config(ModelSettings):
    """Everything that decides a run. Frozen; make a changed copy with :meth:`replace`.

    Raises:
        ConfigError: an unknown field (the nearest known one is named), a bad type, a value out of range, or fields that do not
            go together.
    """

    dataset: Annotated[str, AfterValidator(dataset_anywhere), _DATA] = "arithmetic"
    """``arithmetic``, ``gsm8k``, ``countdown``, ``reasoning_gym:TASK``, a hub id, or a directory, parquet, JSONL or
    CSV file with a ``prompt`` column."""
    dataset_config: Annotated[str | None, _DATA] = None
    """Named configuration of a hub dataset."""
    dataset_split: Annotated[str, _DATA] = "train"
    """Split to train on."""
    eval_split: Annotated[str | None, _DATA] = None
    """Split to evaluate on. Default: ``eval_size`` rows held out of the training split."""
    prompt_column: Annotated[str, _DATA] = "prompt"
    """Name of the prompt column in your own dataset; reward functions see it as ``prompt``."""
    answer_column: Annotated[str, _DATA] = "answer"
    """Name of the column of right answers, which the built-in rewards compare with; reward functions see it as ``answer``."""
    dataset_size: Annotated[int, _DATA] = Field(2048, ge=1, le=10_000_000)
    """Number of rows that generated tasks make (``arithmetic``, ``countdown``, ``reasoning_gym``)."""
    system_prompt: Annotated[str | None, _DATA] = None
    """System message put before every prompt; it turns plain prompts into chat messages."""
    chat_template_kwargs: Annotated[JsonObject, _DATA] = Field(default_factory=dict)
    """Variables for the chat template, such as ``{"enable_thinking": false}`` for Qwen3; JSON on the command line."""
    max_prompt_length: Annotated[int | None, _DATA] = Field(None, ge=1)
    """Longest prompt, in tokens. Default: what the model's context leaves beside the completion."""
    overlong_prompts: Annotated[Literal["error", "drop"], _DATA] = "error"
    """Treatment of longer prompts. ``error``: refuse to start. ``drop``: leave them out and log how many."""
    shuffle: Annotated[bool, _DATA] = True
    """Visit the prompts in a new random order each epoch."""

    reward_funcs: Annotated[tuple[str, ...], ONE_OR_SEVERAL, _REWARD] = ()
    """Reward functions: built-in names (``accuracy``, ``format``, ...) or ``module:function``; reward models: a hub id or a
    directory. Default: the task's own."""
    reward_weights: Annotated[tuple[float, ...], _REWARD] = ()
    """One weight per reward function. Default: 1 each."""
    reward_range: Annotated[tuple[float, float] | None, _REWARD] = None
    """Lowest and highest possible mean reward; it sharpens the forecast. Default: known for built-in rewards, else unknown."""
    reward_timeout_s: Annotated[float, _REWARD] = Field(30.0, gt=0)
    """Deadline of one reward call, in seconds; a worker that misses it is killed."""
    reward_workers: Annotated[int, _REWARD] = Field(1, ge=0)
    """Processes that run reward functions; 0 runs them in the trainer's process, without a deadline."""
    reward_on_error: Annotated[Literal["raise", "none"], _REWARD] = "raise"
    """A reward call that raises, hangs or returns the wrong length: end the run (``raise``), or count it as ``None``."""

    rollout: Annotated[Literal["transformers", "vllm", "vllm-http"], _ROLLOUT] = "transformers"
    """Engine that samples completions: the policy itself (``transformers``), vLLM in the trainer's process (``vllm``), or vLLM
    servers (``vllm-http``)."""
    vllm_server_urls: Annotated[tuple[str, ...], ONE_OR_SEVERAL, _ROLLOUT] = ()
    """Servers of ``vllm-http``: ``http://127.0.0.1:8000``, as ``grpo-fast serve`` starts one, or ``ssh://node2:8000``."""
    vllm_server_timeout: Annotated[float, _ROLLOUT] = Field(240.0, ge=0)
    """Longest wait, in seconds, for those servers to be up when a run starts or resumes."""
    vllm_gpu_memory_utilization: Annotated[float, _ROLLOUT] = Field(0.3, gt=0, le=1)
    """Share of GPU memory that vLLM takes for its weights and its KV cache."""
    vllm_kv_cache_gib: Annotated[float | None, _ROLLOUT] = Field(None, gt=0)
    """Size of vLLM's KV cache, in GiB. Default: what ``vllm_gpu_memory_utilization`` leaves."""
    vllm_engine_args: Annotated[JsonObject, _ROLLOUT] = Field(default_factory=dict)
    """Other arguments of the engine of ``rollout="vllm"``, such as ``{"enforce_eager": true}``; servers take their own."""
    vllm_enable_sleep_mode: Annotated[bool, _ROLLOUT] = False
    """Let vLLM sleep while the policy trains, which frees its GPU memory for the trainer (with adapters, its weights move to
    host memory). Servers need ``grpo-fast serve --enable-sleep-mode``."""
    vllm_own_process: Annotated[bool, _ROLLOUT] = False
    """Run the engine of ``rollout='vllm'`` in a separate process, as several ranks do; ``max_staleness`` overlaps better so."""
    vllm_transport: Annotated[Literal["auto", "shared_memory", "sparse", "ipc", "nccl"], _ROLLOUT] = "auto"
    """How weights reach vLLM. ``auto``: directly within the trainer's process, else through shared memory. ``sparse``: only the
    weights that changed, at the price of a copy of them in host memory at either end. ``ipc`` (a process on the same GPU) and
    ``nccl`` (a server on other GPUs): vLLM's own. Start servers with the same ``grpo-fast serve --transport``."""
    sync_deadline_s: Annotated[float, _ROLLOUT] = Field(300.0, gt=0)
    """Time limit of each phase of a weight sync, in seconds; a phase that takes longer ends the run with a checkpoint."""
    request_deadline_s: Annotated[float, _ROLLOUT] = Field(1800.0, gt=0)
    """Time limit, in seconds, for a vLLM server to complete one prompt (queueing included), and for vLLM in its own process to
    do one step; anything slower ends the run with a checkpoint."""
    prompts_per_step: Annotated[int, _ROLLOUT] = Field(16, ge=1)
    """Prompts per step (P)."""
    num_generations: Annotated[int, _ROLLOUT] = Field(8, ge=2)
    """Completions per prompt (G): the size of a group."""
    max_completion_length: Annotated[int, _ROLLOUT] = Field(256, ge=1)
    """Longest completion, in tokens; with an environment, all turns and the environment's messages between them together."""
    temperature: Annotated[float, _ROLLOUT] = Field(1.0, gt=0)
    """Sampling temperature; the trainer computes log-probabilities at the same temperature."""
    top_p: Annotated[float, _ROLLOUT] = Field(1.0, gt=0, le=1)
    """Nucleus sampling. With ``top_p``, ``top_k`` or ``min_p``, policy and reference are renormalised over the tokens that are
    left, in ratio, KL, entropy and gradient. With vLLM this is cheapest if ``top_k`` is set too."""
    top_k: Annotated[int, _ROLLOUT] = Field(0, ge=0)
    """Keep the k most probable tokens; 0 keeps all."""
    min_p: Annotated[float, _ROLLOUT] = Field(0.0, ge=0, lt=1)
    """Drop tokens whose probability is below this share of the highest one; 0 drops none."""
    repetition_penalty: Annotated[float, _ROLLOUT] = Field(1.0, gt=0)
    """Make tokens that the prompt or the completion holds already less likely: their logits are divided by this, or multiplied
    where they are negative. The policy is trained without it, so that the sampler is corrected for."""
    generation_kwargs: Annotated[JsonObject, _ROLLOUT] = Field(default_factory=dict)
    """Other sampling parameters of vLLM, such as ``{"presence_penalty": 0.5}``; the sampler is corrected for too."""
    stop: Annotated[tuple[str, ...], ONE_OR_SEVERAL, _ROLLOUT] = ()
    """Strings that end a completion; with an environment, they end a turn."""
    environment_factory: Annotated[str | None, _ROLLOUT] = None
    """Class whose instances answer the policy between its turns, as ``module:Class``: a game, a sandbox, a search. It has a
    method ``step``, or, as in TRL, methods that are tools."""
    tools: Annotated[tuple[str, ...], ONE_OR_SEVERAL, _ROLLOUT] = ()
    """Functions that the policy may call, as ``module:function``, described by their type hints and docstrings."""
    max_turns: Annotated[int, _ROLLOUT] = Field(8, ge=1)
    """Most turns of the policy in one completion, with an environment or tools."""
    environment_timeout_s: Annotated[float, _ROLLOUT] = Field(60.0, gt=0)
    """Time limit of one call of an environment, in seconds; a call that takes longer ends the run with a checkpoint."""
    environment_workers: Annotated[int, _ROLLOUT] = Field(16, ge=1)
    """Number of environments called at the same time."""
    max_staleness: Annotated[int, _ROLLOUT] = Field(0, ge=0)
    """Sample up to this many steps ahead, with weights that are up to this many updates old. 0: sampling and training take
    turns. 1: they run at the same time, so that a step takes as long as the slower of the two."""
    vllm_pause_mode: Annotated[Literal["wait", "keep"], _ROLLOUT] = "wait"
    """Treatment of running rollouts at a weight update, with ``max_staleness``. ``wait``: let them finish first. ``keep``:
    continue them on the new weights; which weights sample a token then depends on timing, but is recorded for each token."""
    refill_rounds: Annotated[int, _ROLLOUT] = Field(0, ge=0)
    """How many times a step may sample more prompts to replace groups without reward variance; 0: never."""

    loss_type: Annotated[LossType, _OBJECTIVE] = "dapo"
    """Variant of the GRPO loss."""
    beta: Annotated[float, _OBJECTIVE] = Field(0.0, ge=0)
    """Weight of the KL penalty towards the reference policy; 0 loads no reference."""
    use_bias_correction_kl: Annotated[bool, _OBJECTIVE] = True
    """Multiply the KL penalty by the ratio, so that its gradient is right off policy too (DeepSeek-V3.2)."""
    sync_ref_model: Annotated[bool, _OBJECTIVE] = False
    """Move the reference policy towards the trained one every ``ref_model_sync_steps`` steps. Not with adapters."""
    ref_model_mixup_alpha: Annotated[float, _OBJECTIVE] = Field(0.6, gt=0, le=1)
    """Share of the way that such a move takes; 1 makes the reference the trained policy."""
    ref_model_sync_steps: Annotated[int, _OBJECTIVE] = Field(512, ge=1)
    """Steps from one such move to the next."""
    epsilon: Annotated[float, _OBJECTIVE] = Field(0.2, gt=0)
    """Lower (and, without ``epsilon_high``, upper) clip range of the ratio."""
    epsilon_high: Annotated[float | None, _OBJECTIVE] = Field(None, gt=0)
    """Upper clip range; for ``cispo`` the absolute cap of the ratio."""
    delta: Annotated[float | None, _OBJECTIVE] = Field(None, gt=1)
    """Upper bound of the ratio for negative advantages too (two-sided clipping)."""
    entropy_coef: Annotated[float, _OBJECTIVE] = Field(0.0, ge=0)
    """Weight of an entropy bonus; with ``use_adaptive_entropy`` the weight to begin with."""
    use_adaptive_entropy: Annotated[bool, _OBJECTIVE] = False
    """Move ``entropy_coef`` after each update: up where the entropy is at ``entropy_target`` or below, which is also where the
    bonus counts, else down (Skywork-OR1)."""
    entropy_target: Annotated[float, _OBJECTIVE] = Field(0.2, ge=0)
    """Mean entropy of a token, in nats, that is aimed at."""
    entropy_coef_delta: Annotated[float, _OBJECTIVE] = Field(0.005, gt=0)
    """Step of ``entropy_coef``."""
    entropy_coef_min: Annotated[float, _OBJECTIVE] = Field(0.0, ge=0)
    """Least weight that the steps lead to."""
    entropy_coef_max: Annotated[float, _OBJECTIVE] = Field(1.0, gt=0)
    """Greatest weight that the steps lead to."""
    sapo_temperature_pos: Annotated[float, _OBJECTIVE] = Field(1.0, gt=0)
    """SAPO's gate temperature for positive advantages."""
    sapo_temperature_neg: Annotated[float, _OBJECTIVE] = Field(1.05, gt=0)
    """SAPO's gate temperature for negative advantages."""
    vespo_k_pos: Annotated[float, _OBJECTIVE] = Field(2.0, ge=0)
    """VESPO's power for advantages from 0 up: how much less a completion counts that has become less likely."""
    vespo_lambda_pos: Annotated[float, _OBJECTIVE] = Field(3.0, ge=1e-4)
    """VESPO's decay for advantages from 0 up: how much less a completion counts that has become more likely."""
    vespo_k_neg: Annotated[float, _OBJECTIVE] = Field(3.0, ge=0)
    """VESPO's power for negative advantages."""
    vespo_lambda_neg: Annotated[float, _OBJECTIVE] = Field(2.0, ge=1e-4)
    """VESPO's decay for negative advantages."""
    scale_rewards: Annotated[Literal["group", "batch", "none"], _OBJECTIVE] = "group"
    """Divide centred rewards by the group's standard deviation, the batch's, or not at all."""
    multi_objective_aggregation: Annotated[Literal["sum_then_normalize", "normalize_then_sum"], _OBJECTIVE] = (
        "sum_then_normalize"
    )
    """How several rewards become one advantage. ``sum_then_normalize``: add the rewards, then scale. ``normalize_then_sum``:
    scale each in its group, add them, and scale the sum over the batch (GDPO), so that none drowns in another."""
    mask_truncated_completions: Annotated[bool, _OBJECTIVE] = False
    """Exclude completions from the loss that were cut at the length limit."""
    top_entropy_quantile: Annotated[float, _OBJECTIVE] = Field(1.0, ge=0, le=1)
    """Share of a step's tokens that carry the policy loss: those of the highest entropy (0.2 in the paper). Below 1 it costs a
    forward pass over every completion, unless the sampler is corrected for, which shares it."""
    off_policy_mask_threshold: Annotated[float | None, _OBJECTIVE] = Field(None, gt=0)
    """Take completions of negative advantage out of the policy loss where the policy has moved from their sampler by more than
    this, in nats a token (DeepSeek-V3.2). Default: keep all."""
    vllm_importance_sampling_correction: Annotated[bool | None, _OBJECTIVE] = None
    """Correct the mismatch between sampler and trainer by importance weights, which costs one more forward pass. Default: on
    with vLLM, ``max_staleness`` above 0 or a ``repetition_penalty``."""
    vllm_importance_sampling_mode: Annotated[ImportanceMode, _OBJECTIVE] = "sequence_mask"
    """Importance ratio per token, per sequence, or geometric mean over the sequence; ``truncate`` clips it to the bounds,
    ``mask`` sets it to 0 beyond them."""
    vllm_importance_sampling_clip_max: Annotated[float | None, _OBJECTIVE] = Field(3.0, gt=0)
    """Upper bound of the importance ratio."""
    vllm_importance_sampling_clip_min: Annotated[float | None, _OBJECTIVE] = Field(None, ge=0)
    """Lower bound of the importance ratio."""
    bypass_old_logprobs: Annotated[bool, _OBJECTIVE] = False
    """Use the sampler's log-probabilities as the old policy's: the ratio to the sampler is clipped rather than corrected."""
    keep_dead_rows_for_metrics: Annotated[bool, _OBJECTIVE] = False
    """Also score completions that give no gradient (groups without reward variance), so that ``entropy``, ``kl`` and
    ``clip_ratio`` are means over all tokens in the loss, as in TRL; it costs a forward pass over each."""
    num_iterations: Annotated[int, _OBJECTIVE] = Field(1, ge=1)
    """Optimiser updates on the completions of one step."""

    optim: Annotated[Literal["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"], _OPTIM] = (
        "adamw_torch_fused"
    )
    """AdamW of torch, or of bitsandbytes: with 8-bit moments (2 bytes per weight, not 8), or ``paged`` out to host memory."""
    offload_optimizer: Annotated[bool, _OPTIM] = False
    """Keep the moments and a float32 copy of the weights in host memory, and update them there."""
    weights_dtype: Annotated[Literal["float32", "bfloat16"], _OPTIM] = "float32"
    """Type of trained weights and their gradients. ``bfloat16`` halves their memory; stochastic rounding keeps small updates
    from being lost, and with ``offload_optimizer`` the float32 copy is updated instead."""
    learning_rate: Annotated[float, _OPTIM] = Field(1e-6, gt=0)
    """Peak learning rate."""
    lr_scheduler_type: Annotated[SchedulerType, _OPTIM] = "constant"
    """Shape of the learning rate after warm-up, over ``max_steps``; one of transformers' schedules."""
    lr_scheduler_kwargs: Annotated[JsonObject, _OPTIM] = Field(default_factory=dict)
    """Other arguments of the schedule, such as ``{"min_lr_rate": 0.1}`` for ``cosine_with_min_lr``."""
    warmup_steps: Annotated[float, _OPTIM] = Field(0, ge=0)
    """Steps over which the learning rate rises from 0, by every schedule; below 1, a share of ``max_steps``."""
    weight_decay: Annotated[float, _OPTIM] = Field(0.0, ge=0)
    """Decoupled weight decay."""
    adam_beta1: Annotated[float, _OPTIM] = Field(0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    adam_beta2: Annotated[float, _OPTIM] = Field(0.999, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    adam_epsilon: Annotated[float, _OPTIM] = Field(1e-8, gt=0)
    """AdamW's denominator floor."""
    max_grad_norm: Annotated[float, _OPTIM] = Field(1.0, ge=0)
    """Clip the global gradient norm to this; 0 never clips."""
    tokens_per_microbatch: Annotated[int | None, _OPTIM] = Field(None, ge=1)
    """Most tokens, padding included, in one forward and backward pass; changes memory, not results. Default: 2,048 on a CPU,
    where more is no faster, and 16,384 on a GPU."""

    max_steps: Annotated[int, _BUDGET] = Field(500, ge=1, le=1_000_000)
    """Limit in steps; also the horizon of schedules and forecasts."""
    max_tokens: Annotated[float | None, _BUDGET] = Field(None, gt=0)
    """Limit in tokens, prompts and completions together."""
    max_flops: Annotated[float | None, _BUDGET] = Field(None, gt=0)
    """Limit in model FLOPs, over all phases."""
    max_gpu_hours: Annotated[float | None, _BUDGET] = Field(None, gt=0)
    """Limit in device hours (on a machine without a GPU, the CPU counts as one device)."""
    max_wall_hours: Annotated[float | None, _BUDGET] = Field(None, gt=0)
    """Limit in hours of wall-clock time."""
    max_money: Annotated[float | None, _BUDGET] = Field(None, gt=0)
    """Limit in money, in the currency of ``price_per_gpu_hour``."""
    max_energy_kwh: Annotated[float | None, _BUDGET] = Field(None, gt=0)
    """Limit in energy, in kWh."""
    price_per_gpu_hour: Annotated[float, _BUDGET] = Field(0.0, ge=0)
    """Price of a device hour."""

    forecast: Annotated[Literal["off", "warn", "ask", "stop"], _FORECAST] = "stop"
    """Action when a plateau is forecast. ``off``: no forecast. ``warn``: log it once. ``ask``: ask on the terminal. ``stop``:
    end the run."""
    forecast_epsilon: Annotated[float, _FORECAST] = Field(0.01, gt=0)
    """Remaining reward gain below which training on is not worth it."""
    forecast_confidence: Annotated[float, _FORECAST] = Field(0.78, gt=0.5, lt=1)
    """Stop only if the remaining gain is below ``forecast_epsilon`` with this probability, and in expectation."""
    forecast_patience: Annotated[float, _FORECAST] = Field(0.07, gt=0)
    """How long the forecast must say so without a break: below 1, a share of ``max_steps``; from 1 on, a number of steps."""
    forecast_reward_value: Annotated[float | None, _FORECAST] = Field(None, gt=0)
    """Money that one unit of reward is worth: a run also stops when further training is expected to cost more than the gain is
    worth. Needs ``price_per_gpu_hour``."""
    forecast_prior: Annotated[Path | None, _FORECAST, AfterValidator(lambda path: path and expanded(path).absolute())] = None
    """Prior of the forecast, as written by ``grpo-fast law fit``. Default: the prior in the package."""
    forecast_min_steps: Annotated[int, _FORECAST] = Field(20, ge=5)
    """No forecast stops a run before this step, nor before the warm-up of the learning rate ends."""
    baseline_probe: Annotated[int, _FORECAST] = Field(64, ge=0)
    """Training prompts that the untrained policy answers before step 1, to give the forecast its starting reward; 0: none."""
    collapse_action: Annotated[Literal["off", "warn", "stop"], _FORECAST] = "stop"
    """Action when the policy collapses. ``off``: none. ``warn``: log it. ``stop``: end the run; the best checkpoint from before
    the collapse is kept."""

    output_dir: Annotated[Path, AfterValidator(expanded), _RUN] = Path("runs/grpo")
    """Directory for metrics, checkpoints and the report of the run."""
    overwrite: Annotated[bool, _RUN] = False
    """Delete a run that is already in ``output_dir``; without this, training refuses to start (or resume the run instead)."""
    resume_if_exists: Annotated[bool, _RUN] = False
    """Resume the run in ``output_dir`` if there is one, else start a new one, so that a scheduler can repeat the same command
    after a crash."""
    seed: Annotated[int, _RUN] = Field(0, ge=0)
    """Random seed of data order, sampling and every other random draw."""
    eval_steps: Annotated[int, _RUN] = Field(0, ge=0)
    """Evaluate on held-out prompts every this many steps and at the end, unless a signal ends the run; 0: never."""
    eval_size: Annotated[int, _RUN] = Field(256, ge=0)
    """Number of held-out prompts in an evaluation. 0: none, so that all rows are trained on."""
    eval_temperature: Annotated[float, _RUN] = Field(0.0, ge=0)
    """Sampling temperature of evaluation. 0: greedy, with which reasoning models may repeat themselves (use about 0.6)."""
    num_generations_eval: Annotated[int, _RUN] = Field(1, ge=1)
    """Answers per held-out prompt; their rewards are averaged."""
    save_steps: Annotated[int, _RUN] = Field(50, ge=1)
    """Save a checkpoint every this many steps, after each best evaluation so far, and at the end."""
    save_total_limit: Annotated[int, _RUN] = Field(2, ge=1)
    """Number of newest checkpoints to keep. The best one, and the best before a suspected collapse, are always kept."""
    sinks: Annotated[tuple[Literal["console", "tensorboard", "wandb", "trackio"], ...], ONE_OR_SEVERAL, _RUN] = ("console",)
    """Where metrics go in addition to the JSONL files."""
    fsdp: Annotated[Literal["no_shard", "full_shard", "shard_grad_op", "hybrid_shard"], _RUN] = "no_shard"
    """Sharding over processes. ``no_shard``: replicate. ``full_shard``: ZeRO-3. ``shard_grad_op``: ZeRO-2, whole weights from
    forward to backward. ``hybrid_shard``: ``full_shard`` within a node, replicas across nodes."""
    fsdp_offload_params: Annotated[bool, _RUN] = False
    """Keep the shards in host memory."""
    fsdp_parallel_head: Annotated[bool, _RUN] = False
    """Shard the output head by vocabulary and gather hidden states instead of the head: less memory for large vocabularies."""
    ddp_timeout_s: Annotated[float, _RUN] = Field(1800.0, gt=0)
    """Time limit of a wait for another process under ``torchrun``, in seconds; a process that hangs longer ends the run."""
    log_completions: Annotated[int, _RUN] = Field(4, ge=0)
    """Sample completions written to ``completions.jsonl`` each step."""
    report: Annotated[bool, _RUN] = True
    """Write ``report.html`` and its plots at the end."""

    if not TYPE_CHECKING:  # type checkers and editors shall see the fields

        def __init__(self, *unnamed: Any, **values: Any) -> None:
            if unnamed:
                raise ConfigError(
                    f"Config takes settings by name, and got {unnamed[0]!r:.80}; as in Config(output_dir='runs/mine')"
                )
            try:
                super().__init__(**values)
            except ValidationError as error:
                told = (explain(item, known=type(self).model_fields) for item in error.errors())
                raise ConfigError("\n".join(told)) from None

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, values: Any) -> Any:
        return refuse_misread(values, cls.model_fields)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_consistency(self)
        return self

    @property
    def num_warmup_steps(self) -> int:
        """Steps of warm-up, a share turned into steps (rounded up, as transformers does)."""
        return math.ceil(self.warmup_steps * self.max_steps) if self.warmup_steps < 1 else int(self.warmup_steps)

    @property
    def truncates_support(self) -> bool:
        """Whether ``top_p``, ``top_k`` or ``min_p`` restrict sampling to some tokens."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def support_text(self) -> str:
        """The settings that restrict sampling to some tokens, for error messages."""
        return f"top_p={self.top_p:g}, top_k={self.top_k}, min_p={self.min_p:g}"

    @property
    def rewards_entropy(self) -> bool:
        """Whether there is an entropy bonus, or may come to be one."""
        return self.entropy_coef > 0 or self.use_adaptive_entropy

    @property
    def corrects_sampler(self) -> bool:
        """Whether importance weights correct the mismatch between sampler and trainer."""
        wanted = self.vllm_importance_sampling_correction
        if wanted is None:
            wanted = self.rollout != "transformers" or self.max_staleness > 0 or self.repetition_penalty != 1
        return wanted and not self.bypass_old_logprobs

    def microbatch_tokens(self, kind: str) -> int:
        """``tokens_per_microbatch`` on a device ("cuda" or "cpu")."""
        return self.tokens_per_microbatch or _MICROBATCH_TOKENS[kind]

    @property
    def recomputes_products(self) -> bool:
        """Whether the backward pass computes a layer's matrix products a second time."""
        return self.gradient_checkpointing and self.gradient_checkpointing_mode != "selective"

    @property
    def scoring_passes(self) -> tuple[bool, ...]:
        """Extra forward passes over the trained tokens, and whether adapters are on in them: not for the reference."""
        return (False,) * (self.beta > 0) + (True,) * (self.corrects_sampler or self.top_entropy_quantile < 1)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Config:
        """Builds a configuration from plain values; raises the same errors as the constructor."""
        return cls(**values)

    @classmethod
    def from_toml(cls, path: str | Path) -> Config:
        """Reads a TOML file.

        Raises:
            ConfigError: the file is missing, is not TOML or does not fit.
        """
        return cls.parse(read_toml(path))

    def to_toml(self) -> str:
        """The resolved configuration as TOML; fields that are ``None`` are left out, as TOML has no null."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def replace(self, **changes: Any) -> Config:
        """A changed copy, validated; raises the same errors as :meth:`parse`. What nobody set stays known as unset."""
        return self.parse(self.model_dump(exclude_unset=True) | changes)
