"""Weight updates of a vLLM in this process, see `vllm_engine`. vLLM imports this module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine
from vllm.model_executor.model_loader import reload


@dataclass
class Nothing:
    """What a connection needs: nothing."""


@dataclass
class Weights:
    """All weights of a checkpoint, by name."""

    weights: list[tuple[str, torch.Tensor]]


class WeightsAtHand(WeightTransferEngine[Nothing, Weights]):  # type: ignore[misc]
    """Take tensors of this process as a checkpoint's weights, as vLLM's other kinds of update take theirs."""

    init_info_cls = Nothing
    update_info_cls = Weights

    def init_transfer_engine(self, init_info: Nothing) -> None:
        """Connect to nothing."""

    def start_weight_update(self) -> None:
        """Bring the layers back to the form of a checkpoint."""
        reload.initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Weights) -> None:
        """Load the weights."""
        self.model.load_weights(iter(update_info.weights))

    def finish_weight_update(self) -> None:
        """Prepare the layers for the kernels, in the memory that they had before."""
        reload.finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Give back nothing."""
