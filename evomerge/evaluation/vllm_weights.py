"""Weight updates of a vLLM in this process, see `vllm_engine`. vLLM imports this module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
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
        """Bring the layers back to the form of a checkpoint.

        On a CPU vLLM 0.32 packs the weights of experts only when it makes their kernel, so this is made anew.
        """
        reload.initialize_layerwise_reload(self.model)
        if self.device.type == "cpu":
            for layer in self.model.modules():
                method: Any = getattr(layer, "quant_method", None)
                if getattr(method, "moe_kernel", None) is not None:
                    method.moe_kernel = None

    def receive_weights(self, update_info: Weights) -> None:
        """Load the weights."""
        self.model.load_weights(iter(update_info.weights))

    def finish_weight_update(self) -> None:
        """Prepare the layers for the kernels, in the memory that they had before.

        A head that is tied to the embedding has no weights of its own in a checkpoint. vLLM 0.32 then keeps
        what it had prepared of it for the CPU: the head of the weights before.
        """
        reload.finalize_layerwise_reload(self.model, self.model_config)
        owners: dict[int, list[Any]] = {}
        for layer in self.model.modules():
            if isinstance(getattr(layer, "quant_method", None), UnquantizedEmbeddingMethod):
                owners.setdefault(id(layer.weight), []).append(layer)
        for layer in (layer for layers in owners.values() if len(layers) > 1 for layer in layers):
            layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        """Give back nothing."""
