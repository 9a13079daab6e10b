"""Bytes of what a run keeps of a model: weights, the optimiser's numbers, copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from grpo_fast.compute.memory import cached_values
from grpo_fast.config import Config, ConfigError
from grpo_fast.ops.head_torch import CACHE_BYTES, block_rows
from grpo_fast.ops.kept_logprob import kept_chunk_bytes
from grpo_fast.ops.lm_head import LMHead, chunk_bytes_of, rows_per_chunk
from grpo_fast.ops.products import rows_at_once
from grpo_fast.train.activations import HeadBytes
from grpo_fast.train.host_memory import HostBlocks

_VLLM_BATCH = {"cuda": ((70, (16_384, 1024)), (0, (8192, 256))), "cpu": ((0, (4096, 256)),)}
"""Tokens and sequences of a batch where none are given (vLLM 0.32), by GiB of the device; an A100 of 80 GB has the lesser."""
_NF4_BYTES, _NESTED_NF4_BYTES = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / (64 * 256)


class DeviceMemory(NamedTuple):
    """A device that need not be here."""

    kind: str
    """"cuda" or "cpu"."""
    memory_bytes: int
    """Its memory."""


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of weights, and bytes of those that no optimiser sees.

    Attributes:
        trained: numbers that are trained.
        shapes: of the weights that are.
        total: all numbers, adapters included.
        frozen_bytes: of weights that are not trained.
        largest: numbers of the largest trained weight.
        widest: numbers of the largest frozen linear layer.
        head_trained: whether the head is trained.
        head_biased: whether it has a bias.
        head_itemsize: bytes of a number of the head as it is kept.
        operand_itemsize: the same as it is multiplied.
        layers: how many.
        hidden: H.
        inner: width inside a layer's MLP.
        vocab: V.
        cached_values: numbers that an engine keeps of a token.
    """

    trained: int
    shapes: tuple[torch.Size, ...]
    total: int
    frozen_bytes: int
    largest: int
    widest: int
    head_trained: bool
    head_biased: bool
    head_itemsize: int
    operand_itemsize: int
    layers: int
    hidden: int
    inner: int
    vocab: int
    cached_values: int

    @classmethod
    def of(cls, outline: PreTrainedModel, config: Config, *, dtype: torch.dtype) -> ModelSizes:
        """The sizes of a model.

        Args:
            outline: its modules, adapters included.
            config: the run's; read are the types of weights.
            dtype: type of computation.

        Raises:
            ConfigError: it has no head.
        """
        layer = outline.get_output_embeddings()
        if layer is None:
            raise ConfigError(f"{type(outline).__name__} has no output embeddings; a causal language model is needed")
        head: torch.Tensor = layer.weight
        weights = list(outline.parameters())
        shapes = tuple(weight.shape for weight in weights if weight.requires_grad)
        trained = [shape.numel() for shape in shapes]
        linear = {id(module.weight) for module in outline.modules() if isinstance(module, torch.nn.Linear)} - {id(head)}
        nf4 = _NESTED_NF4_BYTES if config.use_bnb_nested_quant else _NF4_BYTES
        short = {id(weight) for weight in weights if config.load_in_4bit and id(weight) in linear}
        frozen = [(weight.numel(), id(weight) in short) for weight in weights if not weight.requires_grad]
        model = outline.config.get_text_config()
        return cls(
            trained=sum(trained),
            shapes=shapes,
            total=sum(weight.numel() for weight in weights),
            frozen_bytes=round(sum(count * (nf4 if packed else dtype.itemsize) for count, packed in frozen)),
            largest=max(trained, default=0),
            widest=max((count for count, packed in frozen if packed), default=0),
            head_trained=head.requires_grad,
            head_biased=getattr(layer, "bias", None) is not None,
            head_itemsize=weight_bytes(config) if head.requires_grad else dtype.itemsize,
            operand_itemsize=dtype.itemsize,
            layers=int(model.num_hidden_layers),
            hidden=int(model.hidden_size),
            inner=_inner_width(model),
            vocab=head.shape[0],
            cached_values=cached_values(model),
        )

    def base(self, config: Config) -> int:
        """Weights that go to vLLM as they are, not as adapters."""
        return self.total - self.trained if config.use_peft else self.total

    def reference_bytes(self, config: Config, *, of_adapters: bool, in_parts: bool) -> int:
        """A reference policy of its own: none without KL, nor where adapters are switched off or put back for it.

        Args:
            config: the run's.
            of_adapters: whether the run begins from adapters that are sharded, which cannot be put back.
            in_parts: whether devices share it.
        """
        if config.beta == 0 or (config.use_peft and not of_adapters):
            return 0
        is_short = in_parts and not config.sync_ref_model and not self.head_biased
        return self.frozen_copy_bytes(config) if config.use_peft or is_short else self.total * weight_bytes(config)

    @property
    def multiplies_as_float32(self) -> bool:
        """Whether the head is multiplied as it is where products are float32's."""
        return self.head_itemsize == self.operand_itemsize == 4

    @property
    def head(self) -> int:
        """Numbers of the head."""
        return self.vocab * self.hidden

    def whole_bytes(self, config: Config) -> int:
        """All weights, of the types that they are kept in."""
        return self.frozen_bytes + weight_bytes(config) * self.trained

    def gathered_bytes(self, config: Config, *, backward: bool) -> int:
        """Whole weights beside shards: two layers, of which one is fetched ahead, or with ``shard_grad_op`` all, and the head.

        Args:
            config: the run's.
            backward: whether gradients are computed: a layer's, and its copy in float32, which is summed over the ranks.
        """
        whole = self.frozen_bytes + self.trained * self.operand_itemsize
        weights = whole if config.fsdp == "shard_grad_op" else 2 * whole // self.layers
        gradient = self.trained * (self.operand_itemsize + 4) // self.layers if backward else 0
        return weights + gradient + (0 if config.fsdp_parallel_head else weight_bytes(config) * self.head)

    def frozen_copy_bytes(self, config: Config) -> int:
        """All weights of a copy beside shards that is not trained: of the type of computation, adapters in float32."""
        return self.whole_bytes(config) if config.use_peft else self.total * self.operand_itemsize


def _inner_width(text_config: Any) -> int:
    """That of the widest layer; some models have one each, and what names none has four times H."""
    width = getattr(text_config, "intermediate_size", None) or 4 * text_config.hidden_size
    return int(max(width) if isinstance(width, list | tuple) else width)


def weight_bytes(config: Config) -> int:
    """Bytes of a number that is trained."""
    return 2 if config.weights_dtype == "bfloat16" else 4


def moments(config: Config, sizes: ModelSizes, *, parts: int) -> tuple[int, dict[str, int]]:
    """Bytes of the optimiser on the device, and in the host's memory.

    Args:
        config: the run's.
        sizes: of the model.
        parts: devices that share them.
    """
    trained = sizes.trained // parts
    if config.offload_optimizer:
        copies = HostBlocks(pinned=False, device="meta")
        for rows, *others in 2 * sizes.shapes:  # weights in float32, then gradients
            copies.empty(torch.Size((-(-rows // parts), *others)), torch.float32)
        return 0, {"optimiser and float32 weights": 8 * trained + copies.nbytes}
    if config.optim.startswith("paged_"):
        return 0, {"paged optimiser": (2 if "8bit" in config.optim else 8) * trained}
    return (2 if config.optim == "adamw_8bit" else 8) * trained, {}


def update_bytes(config: Config, sizes: ModelSizes) -> int:
    """Bytes that the optimiser makes while it updates a weight: torch's fused one none, stochastic rounding float32 copies."""
    rounds = config.weights_dtype == "bfloat16" and not config.offload_optimizer
    return 3 * 4 * sizes.largest if rounds else 0


def head_bytes(config: Config, sizes: ModelSizes, device: DeviceMemory, *, num_rows: int, parts: int) -> HeadBytes:
    """Memory of the loss on a device, gradients apart: a block of exponentials, values made of it, and copies.

    Args:
        config: the run's; read is how the support is cut.
        sizes: of the model.
        device: where it runs.
        num_rows: T, scored tokens of the micro-batch.
        parts: devices that share the head.
    """
    gathered = 2 * parts * num_rows * sizes.hidden * 4 if parts > 1 else 0
    vocab = -(-sizes.vocab // parts)
    on_cpu = device.kind == "cpu"
    if config.truncates_support:
        chunk = kept_chunk_bytes(
            sizes.vocab,
            sizes.hidden,
            num_kept=config.top_k or sizes.vocab,
            kind=device.kind,
            copied=not sizes.multiplies_as_float32 if on_cpu else sizes.operand_itemsize != sizes.head_itemsize,
            trained=sizes.head_trained,
            itemsize=4 if on_cpu else sizes.operand_itemsize,
        )
        return HeadBytes(vocab, gathered + chunk)
    itemsize = 4.0 if on_cpu else sizes.operand_itemsize + 4 / 8  # beside exponentials, an eighth as many float32 logits
    head = LMHead(torch.empty(vocab, 0, device="meta"), chunk_bytes=chunk_bytes_of(device.kind, device.memory_bytes))
    place = torch.device(device.kind)
    rows = block_rows(parts * num_rows, max_rows=rows_per_chunk(head, place, bytes_per_logit=itemsize), device=place)
    block = round(rows * vocab * itemsize)
    if not on_cpu:
        copied = vocab * sizes.hidden * sizes.operand_itemsize if sizes.operand_itemsize != sizes.head_itemsize else 0
        return HeadBytes(vocab, gathered + block + copied + 2 * rows * sizes.hidden * 4)
    copied = 0 if sizes.multiplies_as_float32 else vocab * sizes.hidden * 4
    products = rows_at_once(vocab, vocab * sizes.hidden) * rows * 4
    if sizes.head_trained:
        part = rows_at_once(vocab, rows * vocab * sizes.hidden)
        products = max(products, part * (2 * rows + sizes.hidden) * 4)  # a slice of exponentials twice, and what comes of it
    scratch = min(CACHE_BYTES, rows * vocab * 4)
    return HeadBytes(vocab, gathered + block + scratch + copied + products + rows * sizes.hidden * 4)


def vllm_pass_bytes(config: Config, sizes: ModelSizes, device: DeviceMemory, *, longest: int, itemsize: int) -> int:
    """Bytes of the largest pass of vLLM in this process or beside it, which it makes when it starts.

    An estimate, not measured on a GPU: input, residual and both halves of an MLP of as many tokens as a batch may have, or
    logits of as many sequences three times over in float32. CUDA graphs come on top.

    Args:
        config: the run's; read are arguments of vLLM that were given.
        sizes: of the model.
        device: where it runs.
        longest: longest sequence, in tokens.
        itemsize: bytes of a number that is computed.
    """
    tokens, sequences = next(most for least_gib, most in _VLLM_BATCH[device.kind] if device.memory_bytes >= least_gib * 2**30)
    sequences = int(config.vllm_engine_args.get("max_num_seqs") or sequences)
    tokens = min(int(config.vllm_engine_args.get("max_num_batched_tokens") or max(tokens, longest)), sequences * longest)
    return max(tokens * (2 * sizes.hidden + 3 * sizes.inner) * itemsize, 3 * min(sequences, tokens) * sizes.vocab * 4)


def sparse_copies(config: Config, sent_bytes: int) -> dict[str, int]:
    """Bytes of host memory in which both ends of the transport ``sparse`` keep the weights as they went over last."""
    if config.rollout == "transformers" or config.vllm_transport != "sparse":
        return {}
    receivers = len(config.vllm_server_urls) if config.rollout == "vllm-http" else 1
    return {"weights as last sent": sent_bytes, "weights as vLLM last got them": receivers * sent_bytes}
