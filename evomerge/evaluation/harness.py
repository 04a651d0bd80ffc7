"""Harness: build the items of a suite's splits, and score a live model on them.

    harness = Harness(Suite.load("demo"), tokenizer=tokenizer, batch_size=256, max_length=64)
    items = harness.items("search")
    scores = harness.evaluate(model, items)

Tasks, prompts and metrics are lm-eval's. Work that it would repeat for every model (rendering, tokenising,
batching) is done once. `simple_evaluate`, lm-eval's request cache and its result cache are not used: they
reseed global generators, or could return the answers of an earlier candidate.
"""

from __future__ import annotations

import itertools
import logging
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.models.utils import normalize_gen_kwargs

from evomerge import steps
from evomerge.errors import ConfigError
from evomerge.evaluation import activations, contamination, gradient, prefix_trees
from evomerge.evaluation.agreement import read_off
from evomerge.evaluation.companion import with_companion
from evomerge.evaluation.distributions import Distributions
from evomerge.evaluation.engine import CANARY, Engine, Mirror, refuse_sampling
from evomerge.evaluation.examples import RenderedItem, example
from evomerge.evaluation.generation import Generated
from evomerge.evaluation.items import (
    BatchLayout,
    Items,
    TaskItems,
    build_items,
    cut_into_blocks,
    lay_out,
    merged,
    questions,
    refuse_few,
    refuse_glued,
    refuse_long,
    refuse_long_answers,
)
from evomerge.evaluation.likelihood import trims
from evomerge.evaluation.live_lm import LiveLM, Pair
from evomerge.evaluation.permissions import NOTHING, Permissions
from evomerge.evaluation.scores import (
    SPLITS,
    NonFiniteScores,
    Question,
    Scores,
    Split,
    joined,
)
from evomerge.evaluation.scoring import repeated_requests, score
from evomerge.evaluation.sharing import Sharing
from evomerge.evaluation.smooth_loss import SmoothLoss
from evomerge.evaluation.suite import Suite
from evomerge.evaluation.tasks import TaskBuilder, build

_log = logging.getLogger(__name__)
_PROMPT = 2000
"""Characters of a task's text by which tokenizers are compared."""


class Harness:
    """Score live models on a suite.

    Args:
        suite: the tasks to score on.
        tokenizer: the tokenizer that the models share.
        batch_size: rows per forward pass, by default. It changes the last bits of scores, so compared models
            need the same one.
        max_length: longest input in tokens; None takes each model's own limit.
        seed: of the items that are drawn if a suite gives splits as numbers of items.
        blocks: number of item blocks of the `search` split. Every block has an equal part of every task's
            items and its own batches, so its scores don't depend on what else is scored.
        block_seed: of the random assignment of items to blocks.
        permissions: which code of the tasks may run.
        stored_text: how many characters of a generated answer or a prompt are returned; 0 returns none.
        answers: task -> for each `search` item the right answer that its companion follows, None for gold.
        distributions: task -> for each `search` item what its specialist wrote and expected, for gradients.
        sharing: whether requests share rows; None finds it out with the first model, best in `try_out`.

    Attributes:
        forward_seconds: seconds spent inside the model during the last evaluation.

    Raises:
        ConfigError: the suite names unknown tasks, metrics or dataset splits, splits share items, a task
            has fewer items than there are blocks, or would run code without permission.
    """

    def __init__(
        self,
        suite: Suite,
        *,
        tokenizer: Any,
        batch_size: int,
        max_length: int | None,
        seed: int = 0,
        blocks: int = 1,
        block_seed: int = 0,
        permissions: Permissions = NOTHING,
        stored_text: int = 0,
        answers: Mapping[str, Sequence[str | None]] = types.MappingProxyType({}),
        sharing: Sharing | None = None,
        distributions: Mapping[str, Sequence[Distributions]] = types.MappingProxyType({}),
    ) -> None:
        if batch_size < 1:
            raise ConfigError("the batch size must be 1 or more", got=str(batch_size))
        self.suite = suite
        self.batch_size = batch_size
        self.forward_seconds = 0.0
        self._seed, self._stored_text, self._answers = seed, stored_text, answers
        self._distributions = distributions
        self._lm = LiveLM(tokenizer, batch_size=batch_size, max_length=max_length)
        self._builders = build(suite, lm=self._lm, seed=seed, permissions=permissions)
        for builder in self._builders:
            refuse_glued(builder, self._lm)
        self._blocks, self._block_seed = blocks, block_seed
        for builder in self._builders:
            refuse_few(builder, blocks)
        self._items: dict[Split, tuple[Items, ...]] = {}
        # Whether models take prefix trees; None: not tried yet.
        self._shares = None if sharing is None else sharing.scored
        self._lm.continues = None if sharing is None else sharing.generated
        self._companions = None if sharing is None else sharing.companions
        self._room: activations.Room | None = None  # for batches of `backward`; None: not measured yet

    def blocks(self, split: Split) -> int:
        """Return the number of item blocks of a split."""
        return self._blocks if split == "search" else 1

    def items(self, split: Split, block: int = 0) -> Items:
        """Return the items of a block of a split, rendered and tokenised, in a fixed order.

        They are built at the first call.

        Args:
            split: "search", "select" or "test".
            block: number of the block, from 0; only `search` can have more than one.

        Raises:
            ConfigError: an item can't be scored, e.g. a text is empty.
        """
        if split not in self._items:
            asked = [builder for builder in self._builders if split in builder.documents]
            whole = []
            for number, builder in enumerate(asked, start=1):
                steps.say(f"tokenising {number}/{len(asked)} tasks for {split}")
                built = build_items(builder, split, self._lm)
                if split != "test":  # where nothing is decided by a companion
                    built = with_companion(built, self._lm, self._own(builder, split))
                whole.append(self._with_distributions(built, split))
            self._items[split] = tuple(
                Items(split=split, tasks=tasks, block=number)
                for number, tasks in enumerate(cut_into_blocks(whole, self.blocks(split), self._block_seed))
            )
        return self._items[split][block]

    def _own(self, builder: TaskBuilder, split: Split) -> Sequence[str | None]:
        return self._answers.get(builder.spec.task, ()) if split == "search" else ()

    def _with_distributions(self, task: TaskItems, split: Split) -> TaskItems:
        rows = self._distributions.get(task.name, ()) if split == "search" else ()
        if not rows:
            return task
        pairs = (
            (self._lm.written(group[0], row.answer), row)
            for group, row in zip(task.groups, rows, strict=True)
        )
        return replace(task, taught=tuple(pairs))

    def distributions(self, model: Any, names: Collection[str]) -> dict[str, list[Distributions]]:
        """Let a model answer all `search` items of some tasks; return what it expects at its answers' tokens.

        names: of tasks; those that don't generate are left out. Raises what `evaluate` does.
        """
        lm, whole = self._lm, self._whole("search")
        tasks = tuple(task for task in whole.tasks if task.name in names and task.generates)
        lm.attach(model)
        lm.batch_size_per_gpu = self.batch_size
        try:
            written: dict[str, list[Generated]] = {}
            for task in tasks:  # one after the other: twins are answered together
                written |= self._write(Items(split="search", tasks=(task,)))
            found = {}
            for task in tasks:
                answers, repeats = iter(written[task.name]), task.groups[0][0].repeats or 1
                first = itertools.islice(answers, 0, None, repeats)
                pairs = [lm.written(g[0], a.ids) for g, a in zip(task.groups, first, strict=True)]
                options: Any = {"batch_size": self.batch_size, "max_length": lm.max_length}
                found[task.name] = read_off(model, pairs, name=task.name, **options)
            return found
        finally:
            lm.detach()

    def written(self, split: Split, block: int = 0) -> int:
        """Return how many answers the model writes on a block of a split."""
        return sum(len(requests) for _, _, requests in _asked(self.items(split, block)))

    @property
    def fewest(self) -> int:
        """The number of `search` items of the smallest task that has any."""
        return min(len(task.groups) for task in self._whole("search").tasks)

    def questions(self, split: Split, block: int = 0) -> dict[str, list[Question]]:
        """Return what is asked in the items of a block by task, in item order, cut to `stored_text`."""
        if not self._stored_text:
            return {}
        tasks = self.items(split, block).tasks
        return {task.name: questions(task, self._stored_text) for task in tasks}

    def prepare(self, config: Any) -> None:
        """Build the items of all splits and check that they fit into the model's context.

        config: the transformers config of the models. Raises ConfigError.
        """
        self._lm.attach(SimpleNamespace(config=config, device=torch.device("cpu")))
        try:
            for split in SPLITS:
                for block in range(self.blocks(split)):
                    items = self.items(split, block)
                    refuse_long(items, self._lm)
                    refuse_long_answers(items, self._lm.max_length)
        finally:
            self._lm.detach()

    @property
    def sharing(self) -> Sharing:
        """Whether requests share rows, after `try_out`."""
        generated = bool(self._lm.continues)
        companions = generated and self._companions is not False
        return Sharing(scored=bool(self._shares), generated=generated, companions=companions)

    def try_out(self, model: Any) -> None:
        """Find out what the model can't do (see `prefix_trees`), where it is not known.

        It is done without from then on, and so is what no request of the suite needs.

        model: with the weights of the base, so that the decision holds whatever weights are scored.
        """
        self._lm.attach(model)
        try:
            for split in SPLITS:
                for block in range(self.blocks(split)):
                    items = self.items(split, block)
                    try:
                        self._lm.try_out([i for _, _, asked in _asked(items) for i in asked], seed=self._seed)
                        self._layout(items, self._lm.max_length, self.batch_size)
                    except NonFiniteScores:
                        self._shares = self._lm.continues = False
                        self._forget_layouts()
                        self._layout(items, self._lm.max_length, self.batch_size)
            self._shares, self._lm.continues = bool(self._shares), bool(self._lm.continues)
        finally:
            self._lm.detach()

    def prompts(self) -> list[str]:
        """Return the beginning of the first text of each task that models see."""
        return [str(task.groups[0][0].args[0])[:_PROMPT] for task in self.items("search").tasks]

    def examples(self) -> list[RenderedItem]:
        """Return an item of each task as the model sees it, of the first split that the task has."""
        first: dict[str, TaskItems] = {}
        for split in SPLITS:
            for task in self.items(split).tasks:
                first.setdefault(task.name, task)
        return [example(first[spec.task], self._lm) for spec in self.suite.tasks]

    @property
    def notes(self) -> list[str]:
        """What a reader should know about the items: near duplicates that were left out, repeated ids."""
        found = [item for builder in self._builders for item in builder.near_duplicates]
        repeated = [note for builder in self._builders for note in builder.notes]
        return [*contamination.summary(found), *repeated]

    def mirror(
        self,
        engine: Engine,
        *,
        tolerance: float,
        weights: Callable[[Any], Iterable[tuple[str, torch.Tensor]]],
    ) -> None:
        """Make an engine generate instead of the live model from now on.

        Its canary is the longest prompt of the tasks that generate. tolerance, weights: as in Mirror.
        Raises ConfigError if a task does not generate greedily.
        """
        prompts = []
        everything = (self.items(split, block) for split in SPLITS for block in range(self.blocks(split)))
        for task in (task for items in everything for task in items.tasks):
            for instance in (request for group in task.groups for request in group):
                if instance.request_type == "generate_until":
                    options = normalize_gen_kwargs(instance.args[1], self._lm.max_gen_toks)
                    sampling = {k: v for k, v in options.items() if k not in ("until", "max_gen_toks")}
                    refuse_sampling(task.name, sampling)
                    prompts.append(self._lm.tok_encode(instance.args[0]))
        if prompts:
            canary = [self._lm.prefix_token_id, *max(prompts, key=len)][:CANARY]
            self._lm.mirror = Mirror(engine, canary, tolerance=tolerance, weights=weights)
            self._forget_layouts()

    def judged_in(self, folder: Path) -> None:
        """Keep the verdicts of the tasks' judges in a run folder, as soon as there is one."""
        everything = (self.items(split, block) for split in SPLITS for block in range(self.blocks(split)))
        for task in (task for items in everything for task in items.tasks):
            if (judge := getattr(task.task, "judge", None)) is not None:
                judge.keep_in(folder)

    def weights_changed(self) -> None:
        """Record that the live model's weights have changed."""
        if self._lm.mirror is not None:
            self._lm.mirror.weights_changed()

    def evaluate(self, model: Any, items: Items, *, batch_size: int | None = None) -> Scores:
        """Score a model on every item; `forward_seconds` then holds the seconds spent inside it.

        Args:
            model: a transformers causal LM, or an object that is called like one. It is set to evaluation
                mode, and no reference to it is kept.
            items: from `items` of this harness.
            batch_size: rows per forward pass; None takes the harness's default.

        Raises:
            NonFiniteScores: the model's logits are not finite.
            ConfigError: an answer does not fit into the model's context.
        """
        assert self._items[items.split][items.block] is items, "items of another harness"
        lm = self._lm
        lm.attach(model)
        lm.forward_seconds = 0.0
        size = self.batch_size if batch_size is None else batch_size
        lm.batch_size_per_gpu = size
        try:
            layout = self._layout(items, lm.max_length, size)
            likelihoods = layout.plan.score(model) if layout.plan is not None else None
            written = self._write(items, layout.beside)
            options: Any = {"lm": lm, "stored_text": self._stored_text}
            scores = [
                score(task, layout, likelihoods, written, twin=task.twin(items.tasks[:number]), **options)
                for number, task in enumerate(items.tasks)
            ]
        finally:
            lm.detach()
        self.forward_seconds = lm.forward_seconds
        if likelihoods is not None:
            self.forward_seconds += likelihoods.forward_seconds
        return Scores(split=items.split, tasks=tuple(scores), blocks=(items.block,))

    def evaluate_split(self, model: Any, split: Split, *, batch_sizes: Sequence[int] = ()) -> Scores:
        """Score a model on all items of a split, block by block. Raises what `evaluate` does.

        batch_sizes: one per block; () takes the harness's default.
        """
        parts, seconds = [], 0.0
        for block, size in enumerate(batch_sizes or [self.batch_size] * self.blocks(split)):
            parts.append(self.evaluate(model, self.items(split, block), batch_size=size))
            seconds += self.forward_seconds
        self.forward_seconds = seconds
        return joined(parts)

    def measure(self, model: Any) -> None:
        """Measure what a backward pass keeps, once, if it isn't known; `backward` sizes its batches by it.

        model: inside `gradient.differentiable`, with the weights of the base, so that all processes find the
        same.
        """
        if self._room is None:
            self._room = activations.measured(model, trims(model), self._lm.max_length)

    @property
    def measured(self) -> bool:
        """Whether it is known what a backward pass keeps."""
        return self._room is not None

    def backward(
        self, model: Any, split: Split, loss: SmoothLoss, *, batch_size: int | None = None
    ) -> tuple[float, dict[str, float]]:
        """Return a loss on some of a split's items, and the skill tasks' soft accuracies there.

        The gradient of the loss is added to the weights' gradients.

        Args:
            model: a causal LM, inside `gradient.differentiable`.
            split: "search", "select" or "test".
            loss: the loss, and its items' numbers as in `scores.joined`: per task, block after block.
            batch_size: pairs per forward pass; None takes the harness's default.

        Raises:
            NonFiniteScores: the loss is not finite.
        """
        items, lm = self._whole(split), self._lm
        self.measure(model)
        assert self._room is not None
        lm.attach(model)
        try:
            return gradient.backward(
                model,
                items,
                loss,
                batch_size=self.batch_size if batch_size is None else batch_size,
                max_length=lm.max_length,
                prefix=lm.prefix_token_id,
                room=self._room,
                share=self._sharing_up_to(lm.max_length) if self._shares else 0,
            )
        finally:
            lm.detach()

    def _forget_layouts(self) -> None:
        """Let batches be laid out anew, after what requests share has changed."""
        for items in itertools.chain(*self._items.values()):
            items.plans.clear()

    def _whole(self, split: Split) -> Items:
        """Return all blocks of a split as one block."""
        parts = [self.items(split, block) for block in range(self.blocks(split))]
        return merged(parts)

    def _layout(self, items: Items, max_length: int, batch_size: int) -> BatchLayout:
        """Return the batches of a block, for the attached model."""
        key = max_length, batch_size
        if key not in items.plans:
            model = self._lm.model
            share = 0 if self._shares is False else self._sharing_up_to(max_length)
            beside = self._beside(items)
            layout = lay_out(items, self._lm, batch_size, max_length, share, beside)
            if self._shares is None and layout.plan is not None and (sample := layout.plan.sample()):
                self._shares = prefix_trees.agree(model, sample)
                if not self._shares:
                    _log.info("the model scores shared prefixes differently: every request has its own row")
                    layout = lay_out(items, self._lm, batch_size, max_length, 0, beside)
            items.plans[key] = layout
        return items.plans[key]

    def _sharing_up_to(self, max_length: int) -> int:
        """Return how long inputs that share a row may be, for the attached model; 0 where none may."""
        if not prefix_trees.takes(self._lm.model):
            return 0
        reached = prefix_trees.reach(self._lm.model)
        return max_length if reached is None else min(max_length, reached)

    def _beside(self, items: Items) -> frozenset[str]:
        """Return the tasks whose right answers are scored in the passes that read their prompts."""
        if self._companions is False:
            return frozenset()
        return frozenset(
            task.name
            for task, _, asked in _asked(items)
            if task.pairs and self._lm.carries(asked, _companions(task))
        )

    def _write(self, items: Items, beside: Collection[str] = ()) -> dict[str, list[Generated]]:
        """Let the attached model write the answers of all tasks, as many together as can be.

        beside: tasks whose right answers are scored, too.
        """
        together: dict[int | str | None, list[tuple[TaskItems, int]]] = {}
        requests: dict[int | str | None, list[Any]] = {}
        companions: dict[int | str | None, list[Pair | None]] = {}
        for task, end, asked in _asked(items):
            together.setdefault(end, []).append((task, len(asked)))
            requests.setdefault(end, []).extend(asked)
            pairs = _companions(task) if task.name in beside else [None] * len(asked)
            companions.setdefault(end, []).extend(pairs)
        written: dict[str, list[Generated]] = {}
        for end, tasks in together.items():
            with self._lm.dropping_thoughts(end):
                found = self._lm.generate(requests[end], seed=self._seed, companions=companions[end])
            answers = iter(found)
            written |= {task.name: list(itertools.islice(answers, count)) for task, count in tasks}
        return written


def _asked(items: Items) -> list[tuple[TaskItems, int | str | None, list[Any]]]:
    """Return each task that generates, what ends its thoughts, and its requests; of twins only the first."""
    return [
        (task, task.builder.asked.think_end_token, repeated_requests(task))
        for number, task in enumerate(items.tasks)
        if task.generates and task.twin(items.tasks[:number]) is None
    ]


def _companions(task: TaskItems) -> list[Any]:
    """Return for each of a task's requests the right answer to score beside it; None where it is repeated."""
    return [
        pair if number == 0 else None
        for group, pair in zip(task.groups, task.pairs, strict=True)
        for number in range(group[0].repeats or 1)
    ]
