"""Engine: free generation by a second, faster program that holds the same weights as the live model.

Log-likelihoods stay with the live model; an engine only continues prompts, which is what takes long. It has
a copy of the weights, so what can go wrong is that the copy is not the candidate: weights that were not taken
over, or answers remembered from an earlier candidate. A `Mirror` sees to it: after every change it has the
engine load the weights, forget what it computed before, and score a canary, a prompt whose log-probabilities
must be the live model's. If they are not, it loads once more; then the candidate has failed.

The two programs never agree in every bit, so a canary tells weights apart only where they differ by more than
the tolerance on it. Generated answers therefore can't be expected to be those of transformers where two
tokens are nearly equally likely, and a run names its engine as part of what it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from evomerge.errors import ConfigError, UserError
from evomerge.evaluation.scores import NonFiniteScores

TOLERANCE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}
"""Nats per canary token, on average, by which two programs may differ that compute in a type.

From the types' rounding (2^-24, 2^-11, 2^-8) of logits of a few tens, not measured on a GPU.
"""
CANARY = 64
"""Tokens of a canary, at most."""
_GREEDY = {"attention_mask", "do_sample", "temperature", "use_cache"}
"""Options of generation that an engine understands, as long as they mean greedy."""


class Engine(Protocol):
    """What is needed of a program that generates."""

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights in place; names are the live model's."""
        ...

    def forget(self) -> None:
        """Drop all that was computed with earlier weights, such as cached prefixes."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], *, limit: int, stop: Sequence[str]
    ) -> list[list[int]]:
        """Continue each prompt greedily; return the new tokens, with the one that ends it.

        It ends after `limit` tokens, with the end-of-text token, or where a string of `stop` is complete.
        """
        ...

    def logprobs(self, tokens: Sequence[int]) -> list[float]:
        """Return the log-probability, in nats, of every token but the first given those before it."""
        ...


class EngineMismatch(UserError):  # noqa: N818  # names what was found, as a Failure's kind does
    """An engine that does not hold the weights of the live model."""


class Mirror:
    """An engine that is kept like a live model. canary: token ids, two or more. tolerance: in nats."""

    def __init__(self, engine: Engine, canary: Sequence[int], *, tolerance: float) -> None:
        assert len(canary) > 1, "a canary of one token has no log-probabilities"
        self._engine, self._canary, self._tolerance = engine, list(canary), tolerance
        self._current = False
        self._names: frozenset[str] | None = None

    def weights_changed(self) -> None:
        """Note that the live model has other weights from now on."""
        self._current = False

    def sync(self, model: Any) -> None:
        """Make the engine hold the model's weights, and make sure of it.

        Raises:
            NonFiniteScores: the model's logits are not finite.
            EngineMismatch: the engine computes something else, also after loading again.
            ConfigError: the model has other tensors than the first one.
        """
        expected = canary_logprobs(model, self._canary)
        if not self._current:
            self._load(model)
        if self._difference(expected) > self._tolerance:
            self._load(model)
            if (difference := self._difference(expected)) > self._tolerance:
                self._current = False
                raise EngineMismatch(
                    "the generation engine does not hold the candidate's weights",
                    expected=f"a canary's log-probabilities within {self._tolerance:g} nats of the model's",
                    got=f"{difference:.3g} nats apart, also after loading the weights again",
                    fix="set executor.generation: transformers",
                )

    def generate(
        self, prompts: Sequence[Sequence[int]], *, limit: int, stop: Sequence[str]
    ) -> list[list[int]]:
        """Continue prompts with the weights of the last `sync`."""
        return self._engine.generate(prompts, limit=limit, stop=stop)

    def _load(self, model: Any) -> None:
        pairs = list(weights(model))
        names = frozenset(name for name, _ in pairs)
        if self._names is None:
            self._names = names
        if names != self._names:
            raise ConfigError(
                "a model of other layers can't be generated from by an engine made for the base's",
                fix="set executor.generation: transformers",
            )
        self._current = False
        self._engine.load(pairs)
        self._engine.forget()
        self._current = True

    def _difference(self, expected: np.ndarray[Any, np.dtype[np.float64]]) -> float:
        logprobs = np.array(self._engine.logprobs(self._canary))
        assert logprobs.shape == expected.shape, "one log-probability for each token but the first"
        difference = float(np.abs(logprobs - expected).mean())
        return difference if np.isfinite(difference) else np.inf


def weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of a live model by name, each tied one once."""
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, tensor in model.state_dict().items():
        if name not in tied:
            yield name, tensor


def canary_logprobs(model: Any, tokens: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the live model's log-probabilities, in nats, of every token but the first."""
    ids = torch.tensor([list(tokens)], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    token_logprobs = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    logprobs: np.ndarray[Any, np.dtype[np.float64]] = token_logprobs.cpu().double().numpy()
    if not np.isfinite(logprobs).all():
        raise NonFiniteScores("the model's logits are not finite", got="NaN or infinite on a canary prompt")
    return logprobs


def refuse_sampling(task: str, options: dict[str, Any]) -> None:
    """Raise ConfigError for options of generation that mean anything but greedy."""
    other = sorted(set(options) - _GREEDY)
    if options.get("do_sample") or options.get("temperature"):
        other.append("sampling")
    if other:
        raise ConfigError(
            f"task {task!r} generates with {', '.join(other)}, which the generation engine is not asked for",
            expected="greedy generation",
            fix="set executor.generation: transformers, or change generation_kwargs in the task's YAML",
        )
