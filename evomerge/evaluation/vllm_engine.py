"""vLLM as a generation engine: one per worker process, with weights that are replaced in place.

Written from vLLM's documentation (0.12 and later) and tested with a fake: it has not been run with vLLM
itself. It runs in the worker's process (VLLM_ENABLE_V1_MULTIPROCESSING=0), so that weights are passed as
tensors on the device, and shares the device's memory with the live model, see `SHARE`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import ConfigError

SHARE = 0.5
"""Part of the device's memory for the engine's weights and caches; the live model needs the rest."""


class VllmEngine:
    """Generate with vLLM.

    Args:
        folder: of the base model, for config and tokenizer; its weights are not read.
        dtype: of the forward pass.
        max_length: longest prompt with answer, in tokens; None takes the model's limit.
        device: "cuda" or "cuda:0", the first GPU that the process sees ("cpu" is for tests).

    Raises:
        ConfigError: another device.
    """

    def __init__(self, folder: Path, *, dtype: str, max_length: int | None, device: str) -> None:
        if device not in ("cpu", "cuda", "cuda:0"):
            raise ConfigError(
                f"executor.generation: vllm can't use {device}",
                expected="the first GPU that the worker sees",
                fix="start one run per GPU with CUDA_VISIBLE_DEVICES, or use Ray, which sets it",
            )
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vllm is imported
        import vllm

        self._vllm: Any = vllm
        self._llm: Any = vllm.LLM(
            model=str(folder),
            dtype=dtype,
            max_model_len=max_length,
            load_format="dummy",
            enable_prefix_caching=True,
            gpu_memory_utilization=SHARE,
            seed=0,
        )

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights in place, with the same call as vLLM's loader of checkpoints."""
        pairs = list(weights)
        self._llm.apply_model(lambda model: model.load_weights(iter(pairs)))

    def forget(self) -> None:
        """Reset the prefix cache, which would return the results of earlier weights."""
        if self._llm.reset_prefix_cache() is False:
            raise RuntimeError("vLLM did not reset its prefix cache")

    def generate(
        self, prompts: Sequence[Sequence[int]], *, limit: int, stop: Sequence[str]
    ) -> list[list[int]]:
        """Continue all prompts in one call; vLLM chooses the batches."""
        greedy = self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=limit,
            stop=list(stop),
            include_stop_str_in_output=True,
            skip_special_tokens=False,
        )
        outputs = self._llm.generate(_tokens(prompts), sampling_params=greedy, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def logprobs(self, tokens: Sequence[int]) -> list[float]:
        """Return the prompt's log-probabilities, see `Engine.logprobs`."""
        asking = self._vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        (output,) = self._llm.generate(_tokens([tokens]), sampling_params=asking, use_tqdm=False)
        entries = output.prompt_logprobs[1:]  # the first token has none
        return [float(entry[token].logprob) for entry, token in zip(entries, tokens[1:], strict=True)]


def _tokens(prompts: Sequence[Sequence[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": list(prompt)} for prompt in prompts]
