"""Export a merge as a LoRA adapter: exactly if the merge adds up adapters, else truncated.

Exact: in every group the merge is base + sum(c_i B_i A_i) for adapters on one base (task_arithmetic,
linear, passthrough). Then the factors are stacked, A = [A_1; A_2; ...] and B = [c_1 B_1, c_2 B_2, ...],
and nothing is lost. Tensors that an adapter stores whole are stored whole again.

Truncated: all other merges. Each linear layer's change is cut to a chosen rank by the singular value
decomposition, which is the best approximation of that rank in the Frobenius norm (Eckart and Young 1936).
The captured share of the change is measured on the written factors. Changes that a LoRA can't hold (norms,
embeddings, biases) are reported as lost, or stored whole if requested.

An adapter holds the merge before it is rounded to the recipe's dtype, so its bits differ from the exported
model's. Not covered: adapters on adapters, and DoRA.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from evomerge.errors import ConfigError, ModelError
from evomerge.files import drafted_folder
from evomerge.merging import methods
from evomerge.merging.compatibility import check, with_fingerprints
from evomerge.merging.export import writer
from evomerge.merging.export.adapter_base import base_of
from evomerge.merging.export.folder import asked, copy_beside
from evomerge.merging.methods.reduction import norm
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.sources import chat, model_files
from evomerge.merging.sources.adapter import CONFIG, PREFIX, WEIGHTS, AdaptedCheckpoint
from evomerge.merging.sources.arrays import of_tensor
from evomerge.merging.sources.beside import tokenizer_files
from evomerge.merging.sources.checkpoint import HEADS, Checkpoint
from evomerge.merging.sources.experts import Matched
from evomerge.merging.sources.hub import known_id
from evomerge.merging.sources.live_names import LiveNames
from evomerge.merging.sources.model_config import model_class
from evomerge.merging.sources.opening import open_used
from evomerge.merging.sources.source import Source, copied_place, same_base
from evomerge.merging.sources.tensorfile import CODES, Header, ShardWriter
from evomerge.merging.tensors.application import apply
from evomerge.merging.tensors.inputs import FileInputs
from evomerge.merging.tensors.merge_tensor import checked, merge_tensor

if TYPE_CHECKING:
    from torch import Tensor

ADDING = ("task_arithmetic", "linear", "passthrough")
"""Methods that are sums of their sources; `coefficients` checks that the base's share stays 1."""
ROUNDING = 1e-6
"""Change, as a share of a tensor's norm, up to which it is attributed to float32 rounding."""
WHOLE_SVD = 2048
"""Shorter side up to which a full decomposition is computed; beyond it, for small ranks, a random one."""
OVERSAMPLING, ITERATIONS = 16, 4

Finish = Callable[[Path, "AdapterReport"], Mapping[str, str]]
Term = tuple[float, AdaptedCheckpoint]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReport:
    """How much of a merge an adapter holds.

    exact: whether the adapter is the merge up to rounding.
    base: location of the model that the adapter is for.
    ranks: layer -> rank.
    shares: changed tensor -> captured share of its change's squared Frobenius norm, in [0, 1].
    energy: the same over all tensors together.
    whole: tensors that are stored whole.
    lost: changed tensors that the adapter does not hold.
    """

    exact: bool
    base: str
    ranks: Mapping[str, int]
    shares: Mapping[str, float]
    energy: float
    whole: tuple[str, ...]
    lost: tuple[str, ...]

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.ranks.values())

    def summary(self) -> str:
        """Return a summary in one sentence.

        >>> AdapterReport(exact=False, base="b", ranks={"q": 8}, shares={"q": 0.5, "norm": 0.0},
        ...               energy=0.4, whole=(), lost=("norm",)).summary()
        'rank 8, captures 40.00 % of the change (squared norm); not held: norm'
        """
        if self.exact:
            text = f"rank {self.rank}, exact: the adapters' factors, concatenated"
        else:
            percent = math.floor(10_000 * self.energy) / 100  # never 100 if something is missing
            text = f"rank {self.rank}, captures {percent:.2f} % of the change (squared norm)"
        for label, names in (("stored whole", self.whole), ("not held", self.lost)):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                text += f"; {label}: {', '.join(names[:3])}{more}"
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layers:
    """The live model's modules: all names, those that peft can adapt, and tied head -> its source.

    live: tensor of the base's files -> its name in the live model.
    """

    live: Mapping[str, str]
    names: tuple[str, ...]
    linear: frozenset[str]
    transposed: frozenset[str]
    embeddings: frozenset[str]
    tied: Mapping[str, str]

    def module(self, tensor: str) -> str:
        """Return the live module of a tensor of the files."""
        return self.live[tensor].rpartition(".")[0]

    def can_be_whole(self, module: str) -> bool:
        """Say whether peft can store a module whole: one without linear layers below, which it adapts."""
        return module in self.names and not any(name.startswith(f"{module}.") for name in self.linear)

    def weighted(self, tensor: str) -> str:
        """Return the live module whose weight is a tensor of the files; its own name if it is no weight."""
        return self.live[tensor].removesuffix(".weight")


@dataclass(slots=True, kw_only=True)
class _Plan:
    """The contents of the file: tensor -> rank and factors B (out, r), A (r, in), and tensors stored whole.

    squares: changed tensor -> squared norm of its change: captured, and in all.
    """

    factors: dict[str, tuple[int, Callable[[], tuple[Tensor, Tensor]]]]
    whole: list[str]
    squares: dict[str, tuple[float, float]]
    lost: list[str]


def write_adapter(
    recipe: Recipe,
    out: str | Path,
    *,
    rank: int | None = None,
    base: str | None = None,
    keep_rest: bool = False,
    base_id: str | None = None,
    sources: Mapping[str, Source] | None = None,
    finish: Finish | None = None,
) -> AdapterReport:
    """Write a merge as a PEFT LoRA adapter folder, with its recipe, and report how much of it is captured.

    Merged tensors are computed one at a time; the factors stay in memory.

    Args:
        recipe: the merge.
        out: the folder to write, new or empty.
        rank: of each layer, for a truncated adapter. An exact adapter is written if its ranks are not
            larger; None allows only an exact one.
        base: location of the adapter's base model. By default the recipe's base, else the one base of all
            its adapters.
        keep_rest: store changed tensors that a LoRA can't hold whole, instead of losing them.
        base_id: the base's hub id, which the adapter names; by default it is the base's location, or the
            folder's place in the hub's cache. An unknown one: the adapter names the location.
        sources: already opened models by name.
        finish: called with the complete temporary folder; returns additional text files (name -> content).

    Raises:
        ModelError, ConfigError: the models don't fit, or the merge can't be an adapter, or files of the
            models changed while they were read.
        NonFiniteWeights: a merged tensor has NaN or infinite elements.
        DiskError: `out` has files in it, or there is not enough room.
    """
    _check_request(recipe, rank)
    out = writer.new_folder(out)
    opened = dict(open_used(recipe) if sources is None else sources)
    read = model_files.stats(opened.values())
    check(recipe, opened)
    asking = asked(recipe, opened)
    location, below = base_of(recipe, opened, base)
    layers = _layers(below)
    plan, exact = _plan(recipe, opened, below, layers, rank, keep_rest)
    plan.lost += _other_numbers(recipe, opened, below)
    report = _report(plan, exact, location, layers)
    stored = _whole_modules(plan.whole, below, layers)
    writer.check_space(out, {WEIGHTS: _headers(plan, stored, below, recipe.dtype, layers)})
    with drafted_folder(out) as folder:
        _write_weights(folder / WEIGHTS, plan, stored, recipe, opened, below, layers)
        model_files.refuse_changed(read)
        found = base_id or known_id(location) or known_id(str(below.folder)) or ""
        _write_config(folder, plan, stored, report, layers, below, found)
        if asking is not None:
            copy_beside(tokenizer_files(opened[recipe.pattern]), folder, None)
            chat.write(asking, folder)
        (folder / "recipe.yaml").write_text(with_fingerprints(recipe, opened).to_yaml(), encoding="utf-8")
        for name, text in (finish(folder, report) if finish else {}).items():
            (folder / name).write_text(text, encoding="utf-8")
    return report


def _check_request(recipe: Recipe, rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise ConfigError("rank of an adapter", expected="at least 1", got=str(rank))
    if recipe.pad_rows or recipe.tokens:
        raise ConfigError(
            "this merge pads or chooses embedding rows, which an adapter can't do", fix="write a whole model"
        )
    if recipe.stacked:
        raise ConfigError(
            "this merge moves layers to other places, which an adapter can't do",
            expected="a recipe without num_layers, shift and base_shift",
            fix="write a whole model",
        )


def _other_numbers(recipe: Recipe, sources: Mapping[str, Source], base: Checkpoint) -> list[str]:
    """Return the whole numbers of a merge that are not the base's, since an adapter holds weights only."""
    places = {name: copied_place(recipe, name, sources) for name in base.copied}
    return [
        name
        for name, place in places.items()
        if place is not None and not numpy.array_equal(sources[place[0]].array(place[1]), base.array(name))
    ]


def _plan(
    recipe: Recipe,
    sources: Mapping[str, Source],
    base: Checkpoint,
    layers: _Layers,
    rank: int | None,
    keep_rest: bool,
) -> tuple[_Plan, bool]:
    """Return the plan of an adapter, and whether it is exact."""
    unrounded = dataclasses.replace(recipe, dtype="float32")
    plan, reason = _exact(unrounded, sources, base, layers)
    exact = plan is not None and (rank is None or max(_ranks(plan, layers).values(), default=0) <= rank)
    if plan is None or not exact:
        if rank is None:
            raise ConfigError(
                "this merge is not a sum of adapters on one base, so its adapter must be truncated",
                got=reason,
                fix="choose a rank (e.g. --rank 16), or write a whole model",
            )
        plan = _truncated(unrounded, sources, base, layers, rank, keep_rest)
    _check_targets(plan, recipe)
    return plan, exact


# -- which factors ----------------------------------------------------------------------------------------


def coefficients(group: TensorGroup, base: str | None) -> tuple[float, ...] | None:
    """Return c if a group's merge is base + sum(c_i * task vector i), else None.

    base: the name of the recipe's base. The coefficients are the method's result for unit vectors.

    >>> half = TensorGroup(method="linear", sources=("a", "b"), parameters={"weight": (1.0, 3.0)})
    >>> coefficients(half, None)
    (0.25, 0.75)
    """
    import torch

    if group.method not in ADDING:
        return None
    count = len(group.sources)
    sums = apply(group, torch.zeros(count), list(torch.eye(count)), seed=0, tensor="")
    on_models = not methods.get(group.method).uses_task_vectors(base)
    if on_models and abs(math.fsum(sums.tolist()) - 1.0) > ROUNDING:
        return None  # the base would be scaled too
    return tuple(sums.tolist())


def _exact(
    recipe: Recipe, sources: Mapping[str, Source], base: Checkpoint, layers: _Layers
) -> tuple[_Plan | None, str]:
    """Return the plan of an exact adapter, or None and the reason."""
    names = set(layers.names)
    sums = {id(group): coefficients(group, recipe.base) for group in recipe.groups}
    plan = _Plan(factors={}, whole=[], squares={}, lost=[])
    for name in base.headers:
        group = recipe.group_for(name)
        shares = sums[id(group)]
        if shares is None:
            return None, f"group {group.label()!r} ({group.method})"
        if recipe.base_of(group) not in (None, recipe.base):
            return None, f"group {group.label()!r}, whose base is another model"
        terms: list[Term] = []
        for share, source_name in zip(shares, group.sources, strict=True):
            source = sources[source_name]
            if not same_base(source, base) or isinstance(source, Matched):
                return None, f"source {source_name!r}, which is not an adapter on {base.location}"
            if share and isinstance(source, AdaptedCheckpoint) and name in source.computed:
                return None, f"the change of {name!r} by {source_name!r}, which is no low-rank update"
            if share and isinstance(source, AdaptedCheckpoint) and name in (source.updates | source.replaced):
                terms.append((share, source))
        if terms and layers.module(name) not in names:
            return None, f"a change of {name!r}, which is not a module of the live model"
        if any(name in s.replaced or s.updates[name].down is None for _, s in terms):
            plan.whole.append(name)
        elif terms:
            ranks = sum(s.factors(name)[1].shape[0] for _, s in terms)
            plan.factors[name] = ranks, _stack(name, terms)
        if terms:
            plan.squares[name] = 1.0, 1.0
    return plan, ""


def _stack(name: str, terms: Iterable[Term]) -> Callable[[], tuple[Tensor, Tensor]]:
    def stacked() -> tuple[Tensor, Tensor]:
        import torch

        pairs = [(share, *source.factors(name)) for share, source in terms]
        up = torch.cat([up * share for share, up, _ in pairs], dim=1)
        return up, torch.cat([down for _, _, down in pairs], dim=0)

    return stacked


def _truncated(
    recipe: Recipe,
    sources: Mapping[str, Source],
    base: Checkpoint,
    layers: _Layers,
    rank: int,
    keep_rest: bool,
) -> _Plan:
    plan = _Plan(factors={}, whole=[], squares={}, lost=[])
    inputs = FileInputs(sources)
    for name in base.headers:
        origin = base.tensor(name)
        change = merge_tensor(recipe, name, inputs) - origin
        size = norm(change)
        if size <= ROUNDING * norm(origin):
            continue
        module = layers.weighted(name)
        if module not in layers.linear:
            stored = keep_rest and layers.can_be_whole(layers.module(name))
            (plan.whole if stored else plan.lost).append(name)
            plan.squares[name] = size**2 if stored else 0.0, size**2
            continue
        change = change.T if module in layers.transposed else change
        up, down = low_rank(change, rank)
        plan.factors[name] = down.shape[0], _constant(up, down)
        plan.squares[name] = max(size**2 - norm(change - up @ down) ** 2, 0.0), size**2
    return plan


def _constant(up: Tensor, down: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (up, down)


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B (out, r) and A (r, in), the best approximation B A of a float32 matrix; r <= rank.

    Both are scaled by the square roots of the singular values. Matrices with more than 2048 rows and columns
    are decomposed at small ranks in a random subspace from power iteration (Halko, Martinsson and Tropp 2011,
    arXiv:0909.4061, algorithm 4.4, with a private generator), which may capture slightly less than the best
    approximation, so measure the result.

    >>> import torch
    >>> up, down = low_rank(torch.ones(3, 2), 1)
    >>> torch.allclose(up @ down, torch.ones(3, 2))
    True
    """
    import torch

    smaller = min(matrix.shape)
    if smaller > WHOLE_SVD and 4 * (rank + OVERSAMPLING) < smaller:
        random = torch.Generator().manual_seed(0)
        drawn = torch.randn(matrix.shape[1], rank + OVERSAMPLING, generator=random)
        span = torch.linalg.qr(matrix @ drawn).Q
        for _ in range(ITERATIONS):
            span = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ span).Q).Q
        inner, values, right = torch.linalg.svd(span.T @ matrix, full_matrices=False)
        left = span @ inner
    else:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    return (left[:, :rank] * roots).contiguous(), (right[:rank] * roots[:, None]).contiguous()


def _check_targets(plan: _Plan, recipe: Recipe) -> None:
    if plan.factors:
        return
    changed = [*plan.whole, *plan.lost]
    raise ConfigError(
        "this merge changes no linear layer of the model, so a LoRA adapter would hold nothing",
        got=f"changes in {', '.join(changed[:3])}" if changed else f"the base itself ({recipe.hash[:12]})",
        fix="write a whole model",
    )


def _ranks(plan: _Plan, layers: _Layers) -> dict[str, int]:
    return {layers.weighted(name): rank for name, (rank, _) in plan.factors.items()}


def _report(plan: _Plan, exact: bool, base: str, layers: _Layers) -> AdapterReport:
    total = math.fsum(square for _, square in plan.squares.values())
    return AdapterReport(
        exact=exact,
        base=base,
        ranks=_ranks(plan, layers),
        shares={name: held / square for name, (held, square) in plan.squares.items()},
        energy=math.fsum(held for held, _ in plan.squares.values()) / total,
        whole=tuple(plan.whole),
        lost=tuple(plan.lost),
    )


# -- the files --------------------------------------------------------------------------------------------


def _layers(base: Checkpoint) -> _Layers:
    """Return the live model's modules, from a model without weights: their classes are those peft adapts."""
    import torch
    from transformers import AutoConfig
    from transformers.pytorch_utils import Conv1D

    try:
        config = AutoConfig.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model: Any = model_class(config).from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers computes with the config before it checks it
        raise ModelError(
            f"{base.location}: transformers can't build this model", got=" ".join(str(error).split())[:300]
        ) from None
    modules: dict[type, set[str]] = {torch.nn.Linear: set(), Conv1D: set(), torch.nn.Embedding: set()}
    for name, module in model.named_modules():
        for kind, names in modules.items():
            if isinstance(module, kind):
                names.add(name)
    state = model.state_dict()
    by_file = LiveNames(base.folder, frozenset(base.headers))
    return _Layers(
        live={name: name if name in state else by_file.live_name(name) for name in base.headers},
        names=tuple(name for name, _ in model.named_modules()),
        linear=frozenset(modules[torch.nn.Linear] | modules[Conv1D]),
        transposed=frozenset(modules[Conv1D]),
        embeddings=frozenset(modules[torch.nn.Embedding]),
        tied={name: source for name, source in model.all_tied_weights_keys.items() if name.endswith(HEADS)},
    )


def _whole_modules(whole: Iterable[str], base: Checkpoint, layers: _Layers) -> list[str]:
    """Return the tensors to store whole: all tensors of a module, as peft requires, or single biases."""
    modules = {layers.module(name) for name in whole if not name.endswith(".bias")}
    names = set(layers.names)
    modules |= {name for name in names for module in modules if name.endswith(module)}  # as peft matches
    below = tuple(f"{module}." for module in modules)
    chosen = set(whole) | {name for name in base.headers if layers.live[name].startswith(below)}
    return [name for name in base.headers if name in chosen]


def _headers(
    plan: _Plan, stored: Iterable[str], base: Checkpoint, dtype: str, layers: _Layers
) -> dict[str, Header]:
    """Return the file's headers in order: factors in float32, whole tensors in `dtype`."""
    headers: dict[str, Header] = {}
    for name, (rank, _) in plan.factors.items():
        module = layers.weighted(name)
        rows, columns = base.headers[name].shape
        if module in layers.transposed | layers.embeddings:
            rows, columns = columns, rows
        down, up = _factor_names(module, layers)
        headers[down] = Header(shape=(rank, columns), dtype="F32")
        headers[up] = Header(shape=(rows, rank), dtype="F32")
    for name in stored:
        for key in _stored_names(name, plan, layers):
            headers[key] = Header(shape=base.headers[name].shape, dtype=CODES[dtype])
    return headers


def _factor_names(module: str, layers: _Layers) -> tuple[str, str]:
    if module in layers.embeddings:
        return f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B"
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def _stored_names(name: str, plan: _Plan, layers: _Layers) -> list[str]:
    """Return the names under which a whole tensor is stored; tied embeddings are stored for the head too."""
    live = layers.live[name]
    module, _, part = live.rpartition(".")
    if any(layers.live[other] == f"{module}.weight" for other in plan.factors):
        return [f"{PREFIX}{module}.base_layer.{part}"]
    return [PREFIX + live, *(PREFIX + head for head, source in layers.tied.items() if source == live)]


def _write_weights(
    path: Path,
    plan: _Plan,
    stored: Iterable[str],
    recipe: Recipe,
    sources: Mapping[str, Source],
    base: Checkpoint,
    layers: _Layers,
) -> None:
    inputs = FileInputs(sources)
    with ShardWriter(path, _headers(plan, stored, base, recipe.dtype, layers)) as writer:
        for name, (_, made) in plan.factors.items():
            up, down = (checked(factor, name, recipe, inputs) for factor in made())
            for key, factor in zip(_factor_names(layers.weighted(name), layers), (down, up), strict=True):
                writer.add(key, of_tensor(factor))
        for name in stored:
            merged = merge_tensor(recipe, name, inputs)
            for key in _stored_names(name, plan, layers):
                writer.add(key, of_tensor(merged))


def _write_config(
    folder: Path,
    plan: _Plan,
    stored: Iterable[str],
    report: AdapterReport,
    layers: _Layers,
    base: Checkpoint,
    base_id: str,
) -> None:
    """Write adapter_config.json with peft's class, with lists in a fixed order.

    base_id: the base's hub id, with its revision if known; "" for a folder of this machine.
    """
    from peft import LoraConfig

    usual = Counter(report.ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in report.ranks.items() if rank != usual}
    modules = {layers.module(name) for name in stored if not name.endswith(".bias")}
    if base.tied:  # stored under both names instead, because modules_to_save would untie them
        modules -= {source.rpartition(".")[0] for source in layers.tied.values()}
    modules -= {name for name in modules if any(name.startswith(f"{outer}.") for outer in modules)}
    biases = any(name.endswith(".bias") and layers.module(name) not in modules for name in stored)
    named, _, revision = base_id.partition("@")
    LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=named or report.base,
        revision=revision or None,
        inference_mode=True,
        r=usual,
        lora_alpha=usual,  # so that the factor of B A is 1
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=_targets(report.ranks, layers.names),
        modules_to_save=sorted(modules) or None,
        bias="all" if biases else "none",
        fan_in_fan_out=bool(layers.transposed.intersection(report.ranks)),
    ).save_pretrained(str(folder))
    path = folder / CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _targets(adapted: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the adapted modules by their last name if it fits no other module, else by their full name."""
    modules = set(adapted)
    targets = set()
    for module in modules:
        short = module.rpartition(".")[2]
        meant = {name for name in names if name == short or name.endswith(f".{short}")}
        targets.add(short if meant <= modules else module)
    return sorted(targets)
