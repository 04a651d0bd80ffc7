"""LiveLM: lm-eval's model class around the live model, and settings that keep lm-eval fast and quiet.

One LiveLM serves a whole run: candidates are attached to it, scored and detached. Free generation gives the
answers of lm-eval's `generate_until`, which is used itself where `evomerge.evaluation.generation` can't be.
Log-likelihoods are tokenised by lm-eval's rules and scored by `evomerge.evaluation.likelihood`.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.utils
import torch
import tqdm
import transformers
from jinja2.runtime import Context
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from evomerge.errors import ConfigError
from evomerge.evaluation import prefix_trees
from evomerge.evaluation.engine import Mirror
from evomerge.evaluation.generation import (
    Generated,
    Generator,
    Options,
    Request,
    agrees,
    ending_tokens,
    options_of,
)
from evomerge.evaluation.scores import NonFiniteScores

_log = logging.getLogger(__name__)

tqdm.tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process leaves

Pair = tuple[list[int], list[int]]
"""Token ids of a context and of the continuation to score."""


class _Sandbox(SandboxedEnvironment):
    """The environment of task templates: without access to Python's internals, so that they run no code."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise _unsafe(f"reads {attribute!r} of a {type(obj).__name__}")

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if not self.is_safe_callable(obj):
            raise _unsafe(f"calls {getattr(obj, '__name__', type(obj).__name__)!r}")
        return super().call(context, obj, *args, **kwargs)


def _unsafe(what: str) -> ConfigError:
    return ConfigError(
        f"a template {what}, which could run code",
        expected="templates over a document's fields, with filters and methods of text and lists",
        fix="remove it from the task's YAML",
    )


def _sandboxed(environment: Any) -> _Sandbox:
    """Return a sandboxed environment with the settings of another one."""
    sandbox = _Sandbox(
        loader=environment.loader,
        undefined=environment.undefined,
        keep_trailing_newline=environment.keep_trailing_newline,
    )
    sandbox.filters.update(environment.filters)
    return sandbox


lm_eval.utils.env = _sandboxed(lm_eval.utils.env)


class LiveLM(HFLM):  # type: ignore[misc]  # lm_eval ships no type information
    """lm-eval's model class around the live model.

    Args:
        tokenizer: any fast or slow transformers tokenizer. A copy is used, because lm-eval adds a padding
            token.
        batch_size: rows per forward pass.
        max_length: longest input in tokens; None takes it from the attached model's config, as lm-eval does.

    Attributes:
        forward_seconds: time spent inside the model so far (forward and generate calls).
        mirror: the engine that generates instead of the live model, if there is one.
        continues: whether `generation` continues the models' prompts; None: it was not tried yet.
    """

    def __init__(self, tokenizer: Any, *, batch_size: int, max_length: int | None) -> None:
        placeholder = SimpleNamespace(device=torch.device("cpu"), config=transformers.PretrainedConfig())
        with quiet():
            super().__init__(
                pretrained=placeholder,
                backend="causal",
                tokenizer=copy.deepcopy(tokenizer),
                batch_size=batch_size,
                max_length=max_length,
            )
        self.forward_seconds = 0.0
        self.mirror: Mirror | None = None
        self.continues: bool | None = None
        self._prompts: dict[tuple[str, int], tuple[int, ...]] = {}
        self._ended: list[tuple[tuple[int, ...], bool]] | None = None

    def attach(self, model: Any) -> None:
        """Make `model` the live one, in evaluation mode."""
        if getattr(model, "training", False):
            model.eval()
        self._model, self._config, self._device = model, model.config, model.device

    def detach(self) -> None:
        """Drop the live model, so that a harness never keeps weights in memory."""
        self._model = SimpleNamespace(device=torch.device("cpu"), config=transformers.PretrainedConfig())
        self._config, self._device = self._model.config, self._model.device

    def renderer(self, template: str, *, thinking: bool | None) -> Callable[..., str]:
        """Return lm-eval's function that makes a prompt of a conversation, with a certain chat template.

        transformers renders it in a sandbox. thinking: the template's argument `enable_thinking`.
        """
        arguments: dict[str, Any] = {"chat_template": template}
        if thinking is not None:
            arguments["enable_thinking"] = thinking

        def render(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            with _swapped(self, "chat_template_args", arguments):
                return str(self.apply_chat_template(history, add_generation_prompt))

        return render

    @contextlib.contextmanager
    def dropping_thoughts(self, end: int | str | None) -> Iterator[None]:
        """Drop from generated answers everything up to a token or text; lm-eval's `think_end_token`."""
        with _swapped(self, "think_end_token", end):
            yield

    def pairs(self, instances: Sequence[Any]) -> list[Pair]:
        """Return loglikelihood requests tokenised exactly as lm-eval does."""
        tokenised = self.loglikelihood(list(instances), disable_tqdm=True)
        return [(context, continuation) for _, context, continuation in tokenised]

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
        # lm-eval tokenises in `loglikelihood` and calls this to score. Many candidates are scored on the
        # same tokens, so the tokens are returned instead.
        return requests

    def generate(
        self, instances: Sequence[Any], *, seed: int, companions: Sequence[Pair | None] = ()
    ) -> list[Generated]:
        """Generate answers, the same as lm-eval's loop does.

        seed: of answers that are drawn at random. companions: for each request a right answer that is scored
        in the same pass, or None; only such requests that `carries`.

        Raises:
            ConfigError: the answer's length limit leaves no room for the prompt.
            NonFiniteScores: logits were not finite.
        """
        for instance in instances:
            budget = normalize_gen_kwargs(instance.args[1], self.max_gen_toks)["max_gen_toks"]
            if budget >= self.max_length:
                raise no_room(str(instance.task_name), budget, self.max_length)
        requests = self._requests(instances, seed, companions)
        own = [number for number, request in enumerate(requests) if request is not None]
        others = [number for number, request in enumerate(requests) if request is None]
        found: dict[int, Generated] = {}
        if own:
            chosen = [request for request in requests if request is not None]
            found |= zip(own, self._continued(chosen), strict=True)
        if others:
            asked = [instances[number] for number in others]
            found |= zip(others, self._by_transformers(asked, seed), strict=True)
        return [found[number] for number in range(len(instances))]

    def carries(self, instances: Sequence[Any], companions: Sequence[Pair | None]) -> bool:
        """Say whether answers can be generated, and right ones scored in the passes that read the prompts."""
        return None not in self._requests(instances, 0, companions)

    def try_out(self, instances: Sequence[Any], *, seed: int) -> None:
        """Find out whether `generation` continues the attached model's prompts, where it is not known yet."""
        if self.continues is None:
            self._requests(instances, seed)

    def _requests(
        self, instances: Sequence[Any], seed: int, companions: Sequence[Pair | None] = ()
    ) -> list[Request | None]:
        """Return the requests that `generation` can carry out, None for others."""
        requests: list[Request | None] = [None] * len(instances)
        if self.mirror is not None:
            return requests
        known: dict[str, Options | None] = {}  # most requests have their task's options
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        met: dict[str, int] = {}
        reached = prefix_trees.reach(self._model)
        for number, (instance, pair) in enumerate(itertools.zip_longest(instances, companions)):
            prompt, options = instance.args
            if (key := repr(options)) not in known:
                known[key] = options_of(self._model, options, self.max_gen_toks)
            wanted = known[key]
            met[prompt] = met.get(prompt, 0) + 1
            if wanted is None:
                continue
            request = Request(
                prompt=self._prompt(prompt, self.max_length - wanted.limit),
                limit=wanted.limit,
                stops=tuple(handle_stop_sequences(list(wanted.until), eos=eos)),
                sampling=wanted.sampling,
                seed=(seed, met[prompt]),
                companion=() if pair is None else tuple((pair[0] + pair[1])[-(self.max_length + 1) :]),
                scored=0 if pair is None else len(pair[1]),
            )
            longest = max(len(request.prompt) + request.limit, len(request.companion))
            if request.prompt and (reached is None or longest <= reached):
                requests[number] = request
        if self.continues is None:
            prompts = sorted((request.prompt for request in requests if request is not None), key=len)
            if prompts:
                chosen = {prompts[(len(prompts) - 1) * third // 3] for third in range(4)}
                self.continues = agrees(self._model, sorted(chosen))
                if not self.continues:
                    _log.info("the model does not take shared prompts: transformers generates its answers")
        return requests if self.continues else [None] * len(instances)

    def written(self, instance: Any, answer: Sequence[int]) -> Pair:
        """Return the tokens of a request's prompt, and those of an answer that was generated to it.

        An answer of no tokens becomes the token that ends a text.
        """
        limit = normalize_gen_kwargs(instance.args[1], self.max_gen_toks)["max_gen_toks"]
        prompt = self._prompt(instance.args[0], self.max_length - limit)
        return list(prompt), list(answer) or [self.eot_token_id]

    def _prompt(self, text: str, most: int) -> tuple[int, ...]:
        """Return the last `most` tokens of a prompt, tokenised as lm-eval does."""
        key = text, most
        if key not in self._prompts:
            ids, _ = self.tok_batch_encode([text], left_truncate_len=most, truncation=self.truncation)
            self._prompts[key] = tuple(ids[0].tolist())
        return self._prompts[key]

    def _continued(self, requests: Sequence[Request]) -> list[Generated]:
        def decode(tokens: list[int]) -> str:
            text: str = self.tok_decode(tokens, skip_special_tokens=False)
            return text

        ends = frozenset({self.eot_token_id, *ending_tokens(self._model)})
        generator = Generator(self._model, decode, ends=ends, batch_size=self.batch_size_per_gpu)
        try:
            answers = generator.answer(requests)
        finally:
            self.forward_seconds += generator.forward_seconds
        return [
            Generated(
                text=self._text(list(answer.tokens), request.stops),
                ids=answer.tokens,
                ended=answer.ended,
                companion=answer.companion,
            )
            for request, answer in zip(requests, answers, strict=True)
        ]

    def _text(self, tokens: list[int], stops: Sequence[str]) -> str:
        """Return an answer's text as lm-eval makes it: without what was thought, up to the first stop."""
        thinking = self.think_end_token
        last = len(tokens) - 1
        if isinstance(thinking, int):
            last = next((at for at in range(last, -1, -1) if tokens[at] == thinking), -1)
            tokens = tokens[last + 1 :]
        text = self.tok_decode(tokens)
        text = text.lstrip() if isinstance(thinking, int) else text
        answer: str = postprocess_generated_text(
            generation=text, stop=list(stops), think_end_token=thinking if isinstance(thinking, str) else None
        )
        return answer

    def as_generated(self, instance: Any, tokens: Sequence[int]) -> str:
        """Return the text of an answer to a request if the model generated these tokens."""
        prompt, options = instance.args
        limits = normalize_gen_kwargs(options, self.max_gen_toks)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stops = handle_stop_sequences(list(limits["until"]), eos=eos)
        tokens = list(tokens)
        # `pairs` moves spaces at the end of a prompt into the answer, also a chat template's line break.
        moved, first = prompt[len(prompt.rstrip()) :], 0
        while first < len(tokens) and moved.startswith(self.tok_decode(tokens[: first + 1])):
            first += 1
        text = self._text(tokens[first : first + limits["max_gen_toks"]], stops)
        return text if first or not moved else text.removeprefix(moved)

    def _by_transformers(self, instances: Sequence[Any], seed: int) -> list[Generated]:
        """Generate with lm-eval's loop around transformers' `generate`, or around the engine."""
        order: list[tuple[str, str]] = []  # (prompt, answer) in the order in which lm-eval decodes them
        ends: list[tuple[tuple[int, ...], bool]] = []
        hook: Any = self.cache_hook  # type: ignore[has-type]
        size = self.batch_size_per_gpu
        if self.mirror is not None:
            self.mirror.sync(self._model)
            size = len(instances)  # the engine batches by itself
        self._ended = ends
        self.cache_hook = SimpleNamespace(
            add_partial=lambda _, request, answer: order.append((request[0], answer))
        )
        try:
            with quiet(), _swapped(self, "batch_size_per_gpu", size), _private_rng(seed, self.device):
                answers: list[str] = self.generate_until(list(instances), disable_tqdm=True)
        finally:
            self.cache_hook, self._ended = hook, None
        by_answer: dict[tuple[str, str], list[tuple[tuple[int, ...], bool]]] = {}
        for key, end in zip(order, ends, strict=True):
            by_answer.setdefault(key, []).append(end)
        found = []
        for instance, answer in zip(instances, answers, strict=True):
            ids, ended = by_answer[instance.args[0], answer].pop(0)
            found.append(Generated(text=answer, ids=ids, ended=ended))
        return found

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
        check = _FiniteLogits()
        start = time.perf_counter()
        if self.mirror is not None:
            tokens = self._mirrored(self.mirror, context, max_length, stop, options)
        else:
            tokens = super()._model_generate(
                context,
                max_length,
                stop,
                logits_processor=transformers.LogitsProcessorList([check]),
                **options,
            )
        self.forward_seconds += time.perf_counter() - start
        if check.broken is not None and bool(check.broken):
            raise NonFiniteScores("the model's logits are not finite", got="NaN while generating")
        if self._ended is not None:
            for row in tokens[:, context.shape[1] :].tolist():
                ended = self.eot_token_id in row or any(s in self.tok_decode(row) for s in stop)
                padding = self.tokenizer.pad_token_id
                self._ended.append((tuple(token for token in row if token != padding), ended))
        return tokens

    def _mirrored(
        self, mirror: Mirror, context: Any, max_length: int, stop: list[str], options: dict[str, Any]
    ) -> Any:
        """Generate with the engine; return (rows, tokens) like the live model, padded on both sides."""
        shown = options["attention_mask"].bool()
        prompts = [row[seen].tolist() for row, seen in zip(context, shown, strict=True)]
        answers = mirror.generate(prompts, limit=max_length - context.shape[1], stop=stop)
        longest = max(map(len, answers))
        padded = [answer + [self.tokenizer.pad_token_id] * (longest - len(answer)) for answer in answers]
        return torch.cat([context.cpu(), torch.tensor(padded, dtype=context.dtype)], dim=1)


def no_room(task: str, budget: int, context: int) -> ConfigError:
    """Return the error of a task whose longest answer fills the context; both in tokens."""
    return ConfigError(
        f"task {task!r} generates up to {budget} tokens, which leaves no room for the prompt",
        expected=f"fewer than the model's {context} tokens of context",
        fix="set gen_kwargs: {max_gen_toks: ...} in the suite",
    )


class _FiniteLogits(transformers.LogitsProcessor):
    """Records NaN logits, which the arg-max would turn into an ordinary token."""

    def __init__(self) -> None:
        self.broken: torch.Tensor | None = None

    def __call__(self, _input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        has_nan = torch.isnan(scores).any()
        self.broken = has_nan if self.broken is None else self.broken | has_nan
        return scores


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars, and lm-eval's warnings about usage that is intended here."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with _swapped(lm_eval.api.task, "tqdm", lambda items, **_: items):
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def compiled_templates() -> Iterator[None]:
    """Make lm-eval compile each jinja template once.

    Otherwise it compiles them again for every field of every document, which takes 1 ms each.
    """
    compiled: dict[str, Any] = {}
    compile_ = lm_eval.utils.env.from_string

    def from_string(source: str) -> Any:
        if source not in compiled:
            compiled[source] = compile_(source)
        return compiled[source]

    with _swapped(lm_eval.utils.env, "from_string", from_string):
        yield


@contextlib.contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def _private_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generator, from which transformers samples, and restore it afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
