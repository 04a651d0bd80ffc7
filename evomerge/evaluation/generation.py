"""Generation: continue prompts token by token with a batch that stays full.

Prompts are computed in prefix trees, so what they have in common is computed once. A row leaves the batch
when its answer ends, and the next prompts, longest first, take the free places. An answer that is drawn at
random has a generator of its own, so it doesn't depend on its neighbours' draws. Which rows meet in a batch
depends on the requests and the weights only, so the same weights give the same answers in every process.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from evomerge import heap
from evomerge.evaluation import gold_tokens, prefix_trees
from evomerge.evaluation.scores import NonFiniteScores

_SPARE = 32
"""Tokens by which a cache grows at a time."""
_REFILL = 4
"""A batch takes new prompts when this part of it is free: one in four rows."""

_COMPACT = 8
"""Rows that ended leave the cache when they are this part of it: one in eight; to copy it takes time, too."""

_OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "use_cache"}
"""Generation options that are carried out here."""
_WITHOUT = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"} | {
    *("max_length", "max_new_tokens", "output_attentions", "output_hidden_states", "output_scores"),
    *("output_logits", "return_dict_in_generate", "cache_implementation", "disable_compile"),
}
"""Entries of a model's generation config that change no answer here."""

Decode = Callable[[list[int]], str]
_Prompt = tuple[Any, torch.Tensor]
"""The cache of a prefix tree, and the places of a prompt's tokens there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn: temperature above 0, then the `top_k` likeliest, then `top_p` of probability."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt to continue.

    prompt: token ids, at least one. limit: most new tokens. stops: strings that end the answer. sampling:
    None takes the likeliest token. seed: of the draws; equal prompts and seeds draw equal answers.
    companion: token ids of a text whose last `scored` tokens are scored in the pass that reads the prompt.
    """

    prompt: tuple[int, ...]
    limit: int
    stops: tuple[str, ...] = ()
    sampling: Sampling | None = None
    seed: tuple[int, ...] = ()
    companion: tuple[int, ...] = ()
    scored: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldAnswer:
    """What a model says of a request's companion: the sum of its tokens' log-likelihoods, and their smallest
    lead over the best other token, in nats."""

    ll: float
    lead: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """A request's new tokens, with the one that ended the answer; ended: whether before the limit.
    companion: of a request that has one."""

    tokens: tuple[int, ...]
    ended: bool
    companion: GoldAnswer | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """A finished answer.

    text: as it is scored. ids: the new tokens, with thoughts. ended: whether before the length limit.
    companion: of a request that has one.
    """

    text: str
    ids: tuple[int, ...]
    ended: bool
    companion: GoldAnswer | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens that were generated."""
        return len(self.ids)


@dataclass(slots=True, kw_only=True, eq=False)
class _Row:
    """A request in the making. number: its place among the requests. tokens: the answer so far."""

    number: int
    request: Request
    tokens: list[int] = field(default_factory=list)
    generator: torch.Generator | None = None

    @property
    def length(self) -> int:
        """Number of tokens whose keys and values are known: all but the newest."""
        return len(self.request.prompt) + len(self.tokens) - 1


class Generator:
    """Continue prompts with one model.

    Args:
        model: a causal LM of which `agrees` says that it takes prefix trees.
        decode: token ids -> text, special tokens included.
        ends: ids of the tokens that end every answer.
        batch_size: rows per forward pass.

    Attributes:
        forward_seconds: seconds spent inside the model.
    """

    def __init__(self, model: Any, decode: Decode, *, ends: frozenset[int], batch_size: int) -> None:
        self._model, self._decode, self._ends, self._batch_size = model, decode, ends, batch_size
        self._trims = prefix_trees.accepts(model, "logits_to_keep")
        self._endings: dict[tuple[str, ...], _Ending] = {}
        self._companions: dict[int, GoldAnswer] = {}
        self.forward_seconds = 0.0

    def answer(self, requests: Sequence[Request]) -> list[Continuation]:
        """Return the continuation of every request, in their order.

        Raises:
            NonFiniteScores: the model's logits are not finite.
        """
        waiting = [_Row(number=number, request=request) for number, request in enumerate(requests)]
        waiting.sort(key=lambda row: (-len(row.request.prompt), row.request.prompt, row.number))
        found: dict[int, Continuation] = {}
        rows: list[_Row] = []
        cache = _Cache()
        with torch.no_grad():
            while rows or waiting:
                free = self._batch_size - len(rows)
                if waiting and (not rows or free * _REFILL >= self._batch_size):
                    new, waiting = waiting[:free], waiting[free:]
                    heap.give_back(self._model)
                    logits, prompts = self._start(new)
                    self._extend(new, logits, found)
                    going_on = [index for index, row in enumerate(new) if row.number not in found]
                    cache.add([prompts[index] for index in going_on])
                    del logits, prompts
                    heap.give_back(self._model)
                    rows += [new[index] for index in going_on]
                    continue
                self._extend(rows, self._step(rows, cache), found)
                kept = [index for index, row in enumerate(rows) if row.number not in found]
                if not kept or (len(rows) - len(kept)) * _COMPACT >= len(rows):
                    rows = [rows[index] for index in kept]
                    cache.keep(kept, max((row.length for row in rows), default=0))
        return [
            replace(found[number], companion=self._companions.get(number)) for number in range(len(requests))
        ]

    def _call(self, **inputs: Any) -> Any:
        start = time.perf_counter()
        found = self._model(use_cache=True, **inputs)
        if found.logits.is_cuda:
            torch.cuda.synchronize(found.logits.device)
        self.forward_seconds += time.perf_counter() - start
        return found

    def _start(self, new: Sequence[_Row]) -> tuple[torch.Tensor, list[_Prompt]]:
        """Compute the prompts of new rows; return (rows, vocabulary) logits, and the prompts' states."""
        model = self._model
        asking: dict[tuple[int, ...], list[int]] = {}
        companions: dict[tuple[int, ...], list[_Row]] = {}
        for index, row in enumerate(new):
            asking.setdefault(row.request.prompt, []).append(index)
            if row.request.companion:
                companions.setdefault(row.request.companion[:-1], []).append(row)
        order: list[int] = []
        logits: list[torch.Tensor] = []
        prompts: dict[int, _Prompt] = {}
        for sequences in prefix_trees.in_rows(sorted({*asking, *companions}), 2 * len(new)):
            tree = prefix_trees.row(sequences)
            lasts = [path[-1:] for path, each in zip(tree.paths, sequences, strict=True) if each in asking]
            scored = [
                (row, path[len(path) - row.request.scored :])
                for path, each in zip(tree.paths, sequences, strict=True)
                for row in companions.get(each, ())
            ]
            wanted = {place for places in (*lasts, *(own for _, own in scored)) for place in places.tolist()}
            columns = torch.tensor(sorted(wanted), device=model.device)
            inputs = tree.inputs(model.device, model.dtype)
            filled = DynamicCache()
            if self._trims:
                scores = self._call(**inputs, past_key_values=filled, logits_to_keep=columns).logits[0]
            else:
                scores = self._call(**inputs, past_key_values=filled).logits[0, columns]
            for path, sequence in zip(tree.paths, sequences, strict=True):
                for index in asking.get(sequence, ()):
                    order.append(index)
                    logits.append(scores[torch.searchsorted(columns, path[-1].to(columns))])
                    prompts[index] = filled, path
            for row, places in scored:
                chosen = scores[torch.searchsorted(columns, places.to(columns))]
                self._companions[row.number] = _companion(chosen, row.request)
        back = torch.tensor(order).argsort().to(model.device)
        return torch.stack(logits)[back], [prompts[index] for index in range(len(new))]

    def _step(self, rows: Sequence[_Row], cache: _Cache) -> torch.Tensor:
        """Compute the newest token of every row; return (rows, vocabulary) logits of the next."""
        device = self._model.device
        lengths = torch.tensor([row.length for row in rows], device=device)
        width = cache.width + 1
        place = torch.arange(width, device=device)
        inputs = {
            "input_ids": torch.tensor([[row.tokens[-1]] for row in rows], device=device),
            "attention_mask": (place[None] >= (width - 1 - lengths)[:, None]).long(),
            "position_ids": lengths[:, None],
        }
        logits: torch.Tensor = self._call(**inputs, past_key_values=cache.cache).logits[:, -1]
        return logits

    def _extend(self, rows: Sequence[_Row], logits: torch.Tensor, found: dict[int, Continuation]) -> None:
        """Append each row's next token; note in `found` which answers are finished."""
        if bool(torch.isnan(logits).any()):
            raise NonFiniteScores("the model's logits are not finite", got="NaN while generating")
        best = logits.argmax(-1).tolist()
        for row, token, scores in zip(rows, best, logits, strict=True):
            row.tokens.append(token if row.request.sampling is None else _drawn(row, scores))
            if row.number in found:
                continue
            if (end := self._ended(row)) or len(row.tokens) == row.request.limit:
                found[row.number] = Continuation(tokens=tuple(row.tokens), ended=end)

    def _ended(self, row: _Row) -> bool:
        if row.tokens[-1] in self._ends:
            return True
        stops = row.request.stops
        if stops not in self._endings:
            self._endings[stops] = _Ending(stops, self._decode)
        return self._endings[stops].reached(row.tokens)


def _companion(logits: torch.Tensor, request: Request) -> GoldAnswer:
    """Read a request's companion from the (scored, vocabulary) logits before its tokens."""
    gold = torch.tensor(request.companion[len(request.companion) - request.scored :], device=logits.device)
    likelihood, _, leads = gold_tokens.read(logits, (torch.arange(len(gold), device=gold.device),), gold)
    found = GoldAnswer(ll=float(likelihood.cpu().double().sum()), lead=float(leads.min()))
    if not math.isfinite(found.ll):
        raise NonFiniteScores(
            "the model's logits are not finite", got=f"{found.ll} for an answer of {request.scored} tokens"
        )
    return found


class _Ending:
    """Finds stop strings in growing answers, looking at their last tokens only."""

    def __init__(self, stops: Sequence[str], decode: Decode) -> None:
        self._stops = [stop for stop in stops if stop]
        self._decode = decode
        # A token has at least one byte, so a stop string has at most this number of tokens.
        self._window = max((len(stop.encode()) for stop in self._stops), default=0) + 2
        self._lasts = {stop[-1] for stop in self._stops}
        self._spaces = any(last.isspace() for last in self._lasts)  # which a token alone may not show
        self._may_end: dict[int, bool] = {}

    def reached(self, tokens: list[int]) -> bool:
        """Say whether the answer contains a stop string, asked after every token."""
        if not self._stops or not self._may_complete(tokens[-1]):
            return False
        tail = self._decode(tokens[-self._window :])
        return any(stop in tail for stop in self._stops) and any(
            stop in self._decode(tokens) for stop in self._stops
        )

    def _may_complete(self, token: int) -> bool:
        """Say whether a token can be the last of a stop string: it has, or may have, its last character."""
        if self._spaces:
            return True
        if token not in self._may_end:
            text = self._decode([token])
            self._may_end[token] = not text or "\ufffd" in text or not self._lasts.isdisjoint(text)
        return self._may_end[token]


class _Cache:
    """Keys and values of the rows of a batch, padded on the left."""

    def __init__(self) -> None:
        self.cache: Any = DynamicCache()

    @property
    def width(self) -> int:
        """Number of tokens of the longest row."""
        return int(self.cache.get_seq_length())

    def add(self, prompts: Sequence[_Prompt]) -> None:
        """Add rows for some prompts, whose own states are freed on the way: never all stand twice."""
        if not prompts:
            return
        layers = self.cache.layers
        width = max(self.width, *(len(path) for _, path in prompts))
        trees = {id(filled): filled for filled, _ in prompts}
        chosen = []
        for key, filled in trees.items():
            mine = [number for number, (other, _) in enumerate(prompts) if id(other) == key]
            places = torch.zeros(len(mine), width, dtype=torch.long)  # padding takes the states of any token
            for index, number in enumerate(mine):
                path = prompts[number][1]
                places[index, width - len(path) :] = path
            device = filled.layers[0].keys.device
            chosen.append((filled, torch.tensor(mine, device=device), places.to(device)))
        for number in range(len(chosen[0][0].layers)):
            held = layers[number] if len(layers) > number else None
            room = [
                _gathered(
                    held and getattr(held, name),
                    width,
                    len(prompts),
                    [(getattr(filled.layers[number], name), mine, places) for filled, mine, places in chosen],
                )
                for name in ("keys", "values")
            ]
            layers[number : number + 1] = [_layer(room[0], room[1], width)]
            for filled, _, _ in chosen:
                filled.layers[number].keys = filled.layers[number].values = None

    def keep(self, rows: Sequence[int], width: int) -> None:
        """Drop all other rows, and the padding that no row needs any more."""
        if not rows:
            self.cache = DynamicCache()
            return
        cut, layers = self.width - width, self.cache.layers
        chosen = torch.tensor(rows, device=layers[0].keys.device)
        for number, layer in enumerate(layers):
            keys, values = (states[chosen, :, cut:] for states in layer.room)
            layers[number] = _layer(keys, values, width)


def _gathered(
    old: torch.Tensor | None,
    width: int,
    rows: int,
    trees: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Return the states of old rows and of new ones, padded on the left to `width`, with room to grow.

    trees: for each its states, the numbers of its rows among the new ones, and (rows, width) their places.
    """
    kept = 0 if old is None else len(old)
    _, heads, _, size = trees[0][0].shape
    states = trees[0][0].new_zeros(kept + rows, heads, width + _SPARE, size)
    if old is not None:
        states[:kept, :, width - old.shape[2] : width] = old
    for tree, mine, places in trees:
        states[kept + mine, :, :width] = tree[0][:, places].transpose(0, 1)
    return states


def _layer(keys: torch.Tensor, values: torch.Tensor, width: int) -> Any:
    """Return a layer of a cache that holds `width` tokens and has room for more."""
    layer: Any = _Growing()  # type: ignore[no-untyped-call]
    layer.lazy_initialization(keys, values)
    layer.room = keys, values
    layer.show(width)
    return layer


class _Growing(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of a cache with spare room at its end, so that a new token doesn't copy the others."""

    keys: Any
    values: Any
    room: tuple[torch.Tensor, torch.Tensor]

    def show(self, width: int) -> None:
        """Make the first `width` tokens of the room those that the layer holds."""
        self.keys, self.values = (states[:, :, :width] for states in self.room)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states of new tokens; return all."""
        width, new = self.keys.shape[2], key_states.shape[2]
        if width + new > self.room[0].shape[2]:
            keys, values = (torch.nn.functional.pad(held, (0, 0, 0, _SPARE)) for held in self.room)
            self.room = keys, values
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, width : width + new] = states
        self.show(width + new)
        return self.keys, self.values


def _drawn(row: _Row, logits: torch.Tensor) -> int:
    """Draw a row's next token with its own generator."""
    sampling = row.request.sampling
    assert sampling is not None
    if row.generator is None:
        named = hashlib.sha256(repr((row.request.seed, row.request.prompt)).encode()).digest()
        row.generator = torch.Generator().manual_seed(int.from_bytes(named[:8], "big") % 2**63)
    scores, tokens = (logits.float().cpu() / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k:
        scores, tokens = scores[: sampling.top_k], tokens[: sampling.top_k]
    probabilities = scores.double().softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities[1:].masked_fill_(before[1:] >= sampling.top_p, 0.0)
    reached = probabilities.cumsum(-1)
    chosen = torch.rand(1, dtype=torch.float64, generator=row.generator) * reached[-1]
    return int(tokens[min(int(torch.searchsorted(reached, chosen, right=True)), len(tokens) - 1)])


def agrees(model: Any, prompts: Sequence[Sequence[int]]) -> bool:
    """Say whether a model continues prompts from prefix trees as from each alone, but for rounding.

    The model's weights matter only if they are not finite or huge: ask with a base model's. Its attention
    must see all tokens of the prompts.
    """
    if not (prefix_trees.takes(model) and prefix_trees.accepts(model, "past_key_values")):
        return False
    prompts = [list(prompt) for prompt in prompts if len(prompt) > 1]
    if not prompts:
        return False
    count = min(prefix_trees.COMPARED, *(len(prompt) - 1 for prompt in prompts))
    rows = [
        _Row(number=index, request=Request(prompt=tuple(prompt[:-count]), limit=count + 1), tokens=[])
        for index, prompt in enumerate(prompts)
    ]
    generator = Generator(model, lambda _: "", ends=frozenset(), batch_size=len(rows))
    expected = prefix_trees.alone(model, prompts, count)
    try:
        with torch.no_grad():
            cache = _Cache()
            cache.add(generator._start(rows)[1])
            found = []
            for place in range(-count, 0):
                for row, prompt in zip(rows, prompts, strict=True):
                    row.tokens.append(prompt[place])
                found.append(generator._step(rows, cache).float().log_softmax(-1))
    except Exception:  # whatever a model makes of a mask or a cache that it doesn't know
        return False
    return prefix_trees.same(torch.stack(found, 1).flatten(0, 1), expected, model, prompts, count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """A task's options: most new tokens, stop strings, and how tokens are drawn (None: greedily)."""

    limit: int
    until: tuple[str, ...]
    sampling: Sampling | None


def options_of(model: Any, options: dict[str, Any], limit: int) -> Options | None:
    """Read lm-eval's generation options together with the model's own; None if some are not supported here.

    limit: most new tokens where the options say nothing.
    """
    wanted = dict(normalize_gen_kwargs(options, limit))
    own = getattr(model, "generation_config", None)
    if own is None or set(wanted) - _OPTIONS:
        return None
    defaults = own._get_default_generation_params()
    stated = {name: value for name, value in own.to_dict().items() if value is not None}
    if any(value != defaults.get(name) for name, value in stated.items() if name not in _OPTIONS | _WITHOUT):
        return None
    sampling = None
    if wanted["do_sample"]:
        if not wanted.get("temperature"):
            return None
        drawing = defaults | stated | wanted
        sampling = Sampling(
            temperature=drawing["temperature"], top_k=drawing["top_k"], top_p=drawing["top_p"]
        )
    return Options(limit=wanted["max_gen_toks"], until=tuple(wanted["until"]), sampling=sampling)


def ending_tokens(model: Any) -> frozenset[int]:
    """Return the ids of the tokens with which a model ends its answers."""
    own = model.generation_config.eos_token_id
    return frozenset([] if own is None else [own] if isinstance(own, int) else own)
