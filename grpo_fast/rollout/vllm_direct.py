"""Weights for an engine in the trainer's own process, as a backend of vLLM's own weight transfer: nothing is copied on the way.

The worker reads the policy's parameters themselves, each converted when its layer is loaded, on a CPU and on a GPU alike. CUDA
IPC is no way there: a process cannot open a handle of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from grpo_fast.rollout.vllm_layerwise import LayerwiseReceiver, PolicyWeights

BACKEND = "grpo_fast_direct"


@dataclass
class _InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing has to be agreed upon."""


@dataclass
class _UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    weights: PolicyWeights


class DirectReceiver(LayerwiseReceiver):
    """The worker's side, which has the policy at hand."""

    init_info_cls = _InitInfo
    update_info_cls = _UpdateInfo

    def init_transfer_engine(self, init_info: _InitInfo) -> None:
        """Does nothing."""

    def receive_weights(self, update_info: _UpdateInfo) -> None:
        """Loads the whole model; what is converted lives until its layer is complete."""
        self.load(update_info.weights)

    def shutdown(self) -> None:
        """Does nothing: nothing is held between two updates."""
