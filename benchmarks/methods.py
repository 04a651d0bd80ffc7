"""All merge methods on a zoo: each at the best of a small grid, beside task arithmetic at its best.

    python benchmarks/methods.py                    # the demo's models
    python benchmarks/methods.py --zoo FOLDER       # a folder that `evomerge zoo build` wrote
    python benchmarks/methods.py --zoo CONFIG.yaml  # a run config: its models and its suite

Every source has the same weight. The grid's best is chosen on `search` and compared on `test`, item by item,
with task arithmetic chosen in the same way. Prints a Markdown table; those of docs/methods.md are kept in
benchmarks/methods.md.

`fisher` and `regmean` measure each specialist of a zoo on 200 training questions of its own skill, answers
included; a run config names such files itself (models.fisher, models.gram), or the two are left out.
`core_space` merges LoRA adapters of rank 32 that are cut out of the specialists, embeddings and norms stored
whole. Not covered: methods for one or two models only, and weights per source or layer.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import yaml

from evomerge.config import DEMO_CONFIG, RunConfig
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Failure, Scores, Split
from evomerge.evaluation.statistics import PairedTest
from evomerge.merging import methods
from evomerge.merging.analysis import fisher, gram
from evomerge.merging.export.adapter import write_adapter
from evomerge.merging.recipe import Recipe, Setting, TensorGroup
from evomerge.prepare import prepare
from evomerge.running.worker import Job, Worker
from evomerge.schema import preset_folder
from evomerge.search import baselines
from evomerge.zoo import ZooCard
from evomerge.zoo.skills import Skill, draw_item

WEIGHTS = (0.2, 0.35, 0.6, 1.0)
SMALL = (0.1, 0.2, 0.35, 0.6)
FACTORS = (0.5, 1.0, 1.5, 2.0)
GRID: dict[str, Sequence[dict[str, Setting]]] = {
    "linear": ({},),
    "task_arithmetic": [{"weight": w} for w in WEIGHTS],
    "ties": [{"weight": w, "density": p, "normalize": False} for w in (0.4, 0.8) for p in (0.2, 0.5)],
    "dare_linear": [{"weight": w, "density": 0.5} for w in WEIGHTS],
    "dare_ties": [{"weight": w, "density": 0.5} for w in WEIGHTS],
    "breadcrumbs": [{"weight": w, "density": 0.9, "gamma": 0.01} for w in WEIGHTS],
    "breadcrumbs_ties": [{"weight": w, "density": 0.9, "gamma": 0.01} for w in WEIGHTS],
    "della": [{"weight": w, "density": 0.5, "epsilon": 0.2, "normalize": False} for w in WEIGHTS],
    "della_linear": [{"weight": w, "density": 0.5, "epsilon": 0.2} for w in WEIGHTS],
    "sce": [{"select_topk": share} for share in (0.1, 0.3, 0.6, 1.0)],
    "model_stock": ({}, {"filter_wise": True}),
    "karcher": ({},),
    "multislerp": ({},),
    "chained_slerp": ({},),
    "ram": [{"lambda": f} for f in FACTORS],
    "ramplus_tl": [{"lambda": f} for f in FACTORS],
    "tsv": [{"lambda": f} for f in SMALL],
    "iso_c": [{"weight": w} for w in WEIGHTS],
    "iso_cts": [{"weight": w} for w in WEIGHTS],
    "wudi": [{"lambda": f} for f in SMALL],
    "core_space": [{"weight": w, "density": p, "normalize": False} for w in (0.4, 0.8) for p in (0.2, 0.5)],
    "regmean": [{"alpha": a} for a in (0.1, 0.5, 0.9, 1.0)],
    "fisher": [{"floor": f} for f in (1e-6, 1e-4, 1e-2, 1.0)],
}
RIVAL = "task_arithmetic"
LINES = 200
"""Training questions on which a specialist is measured."""
RANK = 32
"""Of the adapters that are cut out of the specialists."""


class Bench:
    """A zoo with its references on both splits."""

    def __init__(self, config: RunConfig, scratch: Path) -> None:
        self._prepared = prepare(config)
        self._worker = Worker(self._prepared.worker)
        self.sources = self._prepared.space.sources
        self.usable = [name for name in GRID if self._has_files(name)]
        self._adapted = _Adapted(config, scratch)
        parents = baselines.parents(self._prepared.template, self.sources)
        self._scales: dict[Split, Normaliser] = {}
        for split in ("search", "test"):
            base, *others = [self.scores(parent.recipe, split) for parent in parents]
            self._scales[split] = Normaliser(
                self._prepared.suite, base=base, parents=dict(zip(self.sources, others, strict=True))
            )

    def _has_files(self, method: str) -> bool:
        kind = methods.get(method).file
        return kind is None or self._prepared.template.files(kind).keys() >= set(self.sources)

    def recipe(self, method: str, parameters: dict[str, Setting]) -> Recipe:
        group = TensorGroup(method=method, sources=self.sources, parameters=parameters)
        factored = methods.get(method).factored
        template = self._adapted.template if factored else self._prepared.template
        return template.with_groups([group])

    def scores(self, recipe: Recipe, split: Split) -> Scores:
        factored = any(methods.get(group.method).factored for group in recipe.groups)
        worker = self._adapted.worker if factored else self._worker
        blocks = self._prepared.worker.blocks_of(split)
        outcome = worker.run(Job(recipe=recipe, split=split, blocks=blocks)).outcome
        assert not isinstance(outcome, Failure), outcome
        assert isinstance(outcome, Scores)
        return outcome

    def mean(self, recipe: Recipe, split: Split) -> float:
        return 100 * self._scales[split].mean(self.scores(recipe, split))

    def compare(self, first: Recipe, second: Recipe) -> PairedTest:
        both = [self.scores(recipe, "test") for recipe in (first, second)]
        return self._scales["test"].compare(*both, seed=0)


class _Adapted:
    """The same zoo with every specialist as a LoRA adapter on the base, scored on the same items."""

    def __init__(self, config: RunConfig, scratch: Path) -> None:
        base = config.models.base
        sources = {}
        for name, location in config.models.sources.items():
            copy = TensorGroup(method="passthrough", sources=(name,))
            recipe = Recipe(
                models={"base": base, name: location}, groups=(copy,), base="base", dtype="float32"
            )
            write_adapter(recipe, scratch / f"{name}-adapter", rank=RANK, keep_rest=True)
            sources[name] = f"{base}+{scratch / f'{name}-adapter'}"
        models = config.models.model_copy(update={"sources": sources, "fisher": {}, "gram": {}})
        prepared = prepare(config.model_copy(update={"models": models}))
        self.template = prepared.template
        self.worker = Worker(prepared.worker)


def config_of(zoo: str, scratch: Path) -> RunConfig:
    """Return the run config of a zoo, with Fisher and Gram files where its training questions are known."""
    out = str(scratch / "run")  # never made, so no earlier run is continued
    if Path(zoo).is_file():
        return RunConfig.load(Path(zoo), out=out)
    if zoo == "demo":
        config = RunConfig.load(DEMO_CONFIG, out=out)
    else:
        folder = Path(zoo).resolve()
        path = scratch / "config.yaml"
        path.write_text(yaml.safe_dump(_config_data(folder, scratch)), encoding="utf-8")
        config = RunConfig.load(path, out=out)
    files: dict[str, dict[str, str]] = {"fisher": {}, "gram": {}}
    for number, (name, location) in enumerate(config.models.sources.items()):
        text = scratch / f"{name}.txt"
        text.write_text("\n".join(_questions(name, number)), encoding="utf-8")
        for kind, measure in (("fisher", fisher.estimate), ("gram", gram.measure)):
            files[kind][name] = str(scratch / f"{name}.{kind}.safetensors")
            measure(location, text, Path(files[kind][name]))
    return config.model_copy(update={"models": config.models.model_copy(update=files)})


def _config_data(folder: Path, scratch: Path) -> dict[str, Any]:
    """Return a run config for a zoo's folder as data; its suite is the demo's tasks of the zoo's skills."""
    models = ZooCard.load(folder).models
    sources = {
        name: f"{folder / 'base'}+{folder / name}" if card.kind == "lora" else str(folder / name)
        for name, card in models.items()
        if card.skill is not None
    }
    presets = preset_folder("benchmarks/suites")
    suite = yaml.safe_load((presets / "demo.yaml").read_text(encoding="utf-8"))
    suite["tasks"] = [task for task in suite["tasks"] if task.get("specialist") in (None, *sources)]
    suite["tasks_dir"] = str((presets / suite["tasks_dir"]).resolve())
    (scratch / "suite.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    return {
        "models": {"base": str(folder / "base"), "sources": sources},
        "space": "task_arithmetic_layers",
        "suite": str(scratch / "suite.yaml"),
        "dtype": "bfloat16",
        "budget": {"evaluations": 1},
    }


def _questions(skill: str, seed: int) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    known = next(name for name in get_args(Skill) if name == skill)
    for _ in range(LINES):
        item = draw_item(rng, known, "hard", "train")
        yield f"{item.prompt} {item.answer}"


def table(bench: Bench) -> Iterator[str]:
    """Yield the lines of the Markdown table, best method first."""
    best: dict[str, tuple[Recipe, dict[str, Setting]]] = {}
    for method in bench.usable:
        made = [(bench.recipe(method, parameters), parameters) for parameters in GRID[method]]
        best[method] = max(made, key=lambda one: bench.mean(one[0], "search"))
    yield "| method | best of its grid | `test` | beside task arithmetic [95 % interval] |"
    yield "|---|---|---|---|"
    rows = {method: bench.mean(recipe, "test") for method, (recipe, _) in best.items()}
    for method in sorted(rows, key=lambda method: -rows[method]):
        recipe, parameters = best[method]
        shown = ", ".join(f"{name} {str(value).lower()}" for name, value in parameters.items()) or "-"
        test = bench.compare(recipe, best[RIVAL][0])
        beside = f"{100 * test.estimate:+.1f} [{100 * test.low:.1f}, {100 * test.high:.1f}]"
        yield f"| `{method}` | {shown} | {rows[method]:.1f} | {'-' if method == RIVAL else beside} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--zoo", default="demo", help="demo, a zoo's folder, or a run config")
    zoo: str = parser.parse_args().zoo
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        bench = Bench(config_of(zoo, scratch), scratch)
        print("\n".join(table(bench)))


if __name__ == "__main__":
    main()
