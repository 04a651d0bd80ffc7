"""Malformed YAML: run configs, suites, search spaces, recipes, mergekit files and tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tests.malformed.workspace import (
    ADAPTER_OUT,
    ANALYZE,
    CHECK,
    CONFIG,
    CONVERT,
    CONVERT_ALONE,
    EVALUATE,
    EVOLVE,
    GENETIC,
    MERGE,
    MERGEKIT,
    MERGEKIT_OUT,
    PATH_SPACE,
    RECIPE,
    RUN,
    SHOW_SPACE,
    SPACE,
    SPECIAL,
    SUITE,
    Case,
    as_yaml,
    changed,
    special,
    text,
)

NAN, INF = float("nan"), float("inf")
LONG = "x" * 5000
SYNTAX = {
    "tab": "\tname: x",
    "unclosed list": "name: [1, 2",
    "unclosed quote": 'name: "x',
    "two documents": "name: x\n---\nname: y",
    "list": "- name",
    "number": "17",
    "only a comment": "# nothing",
    "duplicate key": "name: x\nname: y",
    "key is a list": "[1, 2]: x",
    "key is a mapping": "{{ name }}: x",
    "number as key": "1: x",
    "null as key": "null: x",
    "unknown tag": "name: !thing x",
    "python tag": "name: !!python/object/apply:os.getcwd []",
    "unknown alias": "name: *x",
    "alias of itself": "name: &a [*a]",
    "explosion of aliases": "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "deep list": "name: " + "[" * 100_000,
    "deep mapping": "{a: " * 20_000,
    "deep indentation": "".join(" " * i + "a:\n" for i in range(400)),
    "deep dashes": "- " * 50_000 + "a",
    "impossible date": "name: 2001-99-99",
    "long integer": "name: " + "9" * 5000,
    "long hexadecimal": "name: 0x" + "f" * 5000,
    "NUL": "name: a\0b",
    "escaped NUL": 'name: "a\\0b"',
    "control character": "name: a\x07b",
    "lone surrogate": 'name: "\\ud800"',
    "UTF-16": "name: x".encode("utf-16"),
    "Latin-1": "name: caf\xe9".encode("latin-1"),
    "binary": bytes(range(256)),
    "merge of a text": "<<: text\nname: x",
    "directive": "%YAML 9.9\n---\nname: x",
    "5 MB": "name: " + "x" * 5_000_000,
}
NUMBERS = {
    "nan": NAN,
    "infinite": INF,
    "negative": -1,
    "huge": 10**19 - 1,
    "text": "many",
    "list": [1],
    "flag": True,
}


def _syntax(kind: str, file: str, commands: Sequence[tuple[str, ...]]) -> Iterator[Case]:
    for name, content in SYNTAX.items():
        yield Case(kind=kind, name=name, make=text(file, content), commands=commands, message=file)
    for what in SPECIAL:
        yield Case(kind=kind, name=what, make=special(file, what), commands=commands, message=file)


def _values(
    kind: str, file: str, valid: Any, table: dict[str, Sequence[Any]], commands: Sequence[tuple[str, ...]]
) -> Iterator[Case]:
    """Yield a case for every place of a valid file and every wrong value; the message names the key."""
    for place, values in table.items():
        for value in values:
            shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}..."
            yield Case(
                kind=kind,
                name=f"{place}: {shown}",
                make=as_yaml(file, changed(valid, place, value)),
                commands=commands,
                message="|".join(
                    (
                        *(part for part in place.split(".") if not part.isdigit()),
                        file,
                        "no such",
                        "has no task",
                    )
                ),
            )


def config() -> Iterator[Case]:
    """Run configs."""
    commands = (CHECK, RUN, ("analyze", "config.yaml"), ("spaces", "--models", "config.yaml"))
    yield from _syntax("config", "config.yaml", commands)
    table: dict[str, Sequence[Any]] = {
        "models": (None, [], "base", {}, {"base": "base"}, {"base": "base", "sources": {}}),
        "models.base": (None, 7, [], True),
        "models.sources": (None, [], "add", {"base": "add"}, {"add": None}, {"add": {"path": "add"}}),
        "space": (None, 3, [], "no_such_space", {}, "~nosuchuser/space.yaml"),
        "suite": (None, 3, [], "no_such_suite", "", "~nosuchuser/suite.yaml"),
        "optimizer": (None, "cma", [], 3),
        "optimizer.name": (None, "cmaes", 1),
        "optimizer.sigma": (NAN, INF, 0, -1, "wide", 2),
        "optimizer.population": (0, 3, 10**9, 1.5, "many", -4, NAN),
        "optimizer.restarts": (None, 3, "often"),
        "objective.smooth": (NAN, -0.1, 1.1, None),
        "objective.retention": (NAN, -1, 1e300, "much"),
        "objective.weights": ({"demo_add": -1}, {"demo_add": 1e300}, {"demo_add": INF}, [], {"demo_none": 1}),
        "objective.several": ("mean", [1], ["mean"], ["mean", "mean"], ["no_task", "mean"]),
        "objective.constraints": (
            {"tasks": INF},
            {"retention": -1},
            {"retention": 1e9},
            {"tasks": {"x": 0.5}},
            3,
        ),
        "budget": (None, {}, [], 100, {"evaluation": 5}),
        "budget.evaluations": (0, -1, 1.5, 10**12, 1e300, "all", True, NAN, [4]),
        "budget.items": (0, INF, 10**18),
        "budget.generations": (0, 2.5, 10**10),
        "budget.hours": (0, -2, NAN, INF, 1e300, "long"),
        "budget.until": (
            "25:99",
            "tomorrow",
            18,
            "0001-01-01T00:00",
            "9999-12-31T23:59+99:99",
            "",
            "1" * 400,
        ),
        "budget.cost": (
            {"per_hour": 0},
            {"per_hour": NAN},
            {"per_hour": 1e-300, "max": 30},
            {"max": 3},
            12,
            {"per_hour": 1e-6, "max": 1e12},
        ),
        "budget.patience": (0, 10**15, -3),
        "budget.failures": (0, NAN, 10**11),
        "executor": (None, "local", {"name": "cloud"}, []),
        "executor.workers": (0, -1, 10**9, 1.5, "all", NAN),
        "executor.threads": (0, 10**6),
        "executor.timeout": (0, -5, NAN, INF, 1e300, "long"),
        "executor.batch_size": (0, 10**12, "big", 2.5),
        "executor.max_length": (0, 7, 10**18, INF),
        "executor.device": (None, 3, "gpu", "cuda:x", "", "cuda:-1"),
        "executor.dtype": ("int8", None),
        "executor.attention": (3, "../../x", "no_such_attention"),
        "executor.generation": ("vvlm", None),
        "executor.address": ("somewhere", None),
        "executor.resources": ({"GPU": 1}, {"GPU": -1}, 3),
        "racing": (None, 7, {"blocks": 0}, {"blocks": 1000}, {"blocks_min": 9}, {"keep": NAN}, {"error": 1}),
        "surrogate": (None, 7, {"share": 2}, {"oversample": 0}, {"oversample": 10**9}, {"blocks": 10**6}),
        "warm_start": (
            None,
            7,
            {"recipes": "no.yaml"},
            {"recipes": ["no.yaml"]},
            {"recipes": ["~nosuchuser/x"]},
        ),
        "warm_start.run": (7, "no_such_run", "~nosuchuser/run"),
        "warm_start.gradients": ({"steps": 0}, {"steps": 10**9}, {"rate": INF}, {"softness": 1e300}, 7),
        "finalists": (0, 10**9, "all", -1),
        "dtype": ("float64", None, 16),
        "tokenizer": (None, 7, "no_such_model", "union+"),
        "tracking": ("wandb", ["no_tracker"], [{"name": "wandb", "uri": "x"}], ["wandb", "wandb"], [None]),
        "seed": (-1, 10**19 - 1, 1.5, NAN, "x", None),
        "out": (None, "", 7, [], "~nosuchuser/run", "add/config.json/run"),
        "unknown": (1,),
        "modles": ({},),
    }
    yield from _values("config", "config.yaml", CONFIG, table, (CHECK, RUN))
    places: dict[str, Sequence[Any]] = {
        "models.base": (
            "",
            "no/such/folder",
            "~nosuchuser/base",
            "base\nbase",
            LONG,
            "a/" * 3000,
            "/dev/zero",
            "add+",
        ),
        "models.sources.add": (
            "",
            "+",
            "add+add",
            "no_such",
            "base+add",
            "~nosuchuser/a",
            "base+~nosuchuser/a",
            LONG,
        ),
        "out": (LONG, "x/" * 3000, "/dev/null/run", "/proc/run", "add"),
        "suite": (LONG, "suite\n.yaml", "/dev/zero", "base"),
        "space": (LONG, "/dev/zero", "base", {"kind": "path"}, {"name": "x"}),
    }
    for place, values in places.items():
        for value in values:
            yield Case(
                kind="config",
                name=f"location {place}: {str(value)[:30]!r}",
                make=as_yaml("config.yaml", changed(CONFIG, place, value)),
                commands=(RUN,) if value == "/proc/run" else (CHECK, RUN),
                message="",
            )


def suite() -> Iterator[Case]:
    """Suites."""
    commands = (CHECK, EVALUATE)
    yield from _syntax("suite", "suite.yaml", commands)
    table: dict[str, Sequence[Any]] = {
        "name": (None, "", 7, []),
        "about": (None, 7),
        "tasks_dir": (None, 7, "nowhere", "~nosuchuser/tasks", LONG, "suite.yaml"),
        "tasks": (None, [], {}, "demo_add", [None], ["demo_add"], SUITE["tasks"] * 2),
        "tasks.0.task": (None, "", 7, "no_such_task", ["demo_add"], LONG, "demo\nadd"),
        "tasks.0.metric": (None, "", 7, "no_such_metric", "acc,no_filter", ["acc"], "coherence"),
        "tasks.0.role": (None, "talent", "retention", "coherence", 7),
        "tasks.0.weight": (-1, NAN, INF, 1e300, "heavy", None, 0),
        "tasks.0.specialist": (7, "absent", ""),
        "tasks.0.splits": (
            None,
            {},
            [],
            10,
            {"search": 1},
            {"search": 4, "select": "select", "test": "test"},
        ),
        "tasks.0.splits.search": (0, -1, 1.5, 10**12, True, [], "no_such_split", "test", ""),
        "tasks.0.splits.test": (None, 0, NAN),
        "tasks.0.num_fewshot": (3,),
    }
    for case in _values("suite", "suite.yaml", SUITE, table, commands):
        yield Case(
            kind=case.kind,
            name=case.name,
            make=case.make,
            commands=commands[:1]
            if "specialist: 'absent'" in case.name or "specialist: ''" in case.name
            else commands,
            message="",
        )
    for name, splits in (("too many items", 10**8), ("more than there are", 5000)):
        data = changed(SUITE, "tasks.0.splits", dict.fromkeys(("search", "select", "test"), splits))
        yield Case(
            kind="suite", name=name, make=as_yaml("suite.yaml", data), commands=commands, message="demo_add"
        )


def space() -> Iterator[Case]:
    """Search spaces."""
    commands = (CHECK, SHOW_SPACE)
    yield from _syntax("space", "space.yaml", commands)
    gene = {"low": 0.0, "high": 1.0}
    table: dict[str, Sequence[Any]] = {
        "name": (None, 7),
        "about": (None, []),
        "method": (None, 7, "tiess", [], {"choices": []}, {"choices": ["ties", "ties"]}, {"choices": "ties"}),
        "layers": (
            0,
            -1,
            "some",
            [[0]],
            [[3, 1]],
            [[0, 10**12]],
            [[0, 2], [1, 3]],
            1.5,
            [[0, 1.5]],
            True,
            [],
        ),
        "modules": (
            {},
            [],
            {"a": [], "b": []},
            {"a": "mlp"},
            {"a": [1]},
            {f"m{i}": ["x"] for i in range(1001)},
        ),
        "outside": ({}, {"a": [], "b": []}),
        "genes": ({}, [], {"weight": 1}, {"weigth": gene}, {"normalize": gene}, {"ties.weight": gene}),
        "genes.weight": (
            {"low": 1},
            {"low": 2, "high": 1},
            {"low": NAN, "high": 1},
            {"low": 0, "high": INF},
            {"low": -1e308, "high": 1e308},
            {"low": "a", "high": "b"},
            {"low": 0, "high": 1, "scale": "log"},
            {"choices": [1]},
            {"choices": [1, 1]},
            {"choices": [1, INF]},
            {"choices": ["a", "b"]},
            {"choices": [1, 2], "low": 0},
            {**gene, "per": ["rows"]},
            {**gene, "per": "source"},
            {**gene, "curve": {"points": 1}},
            {**gene, "curve": {"points": 10**9}},
            {**gene, "curve": {"points": 3, "kind": "cubic"}},
            {**gene, "curve": 3},
        ),
        "fixed": ([], {"weight": 1}, {"lambda": INF}, {"lambda": "x"}, {"nothing": 1}, {"lambda": None}),
        "subset": (7, {"per": ["source"]}, {"per": "all"}),
        "gene": ({},),
    }
    for case in _values("space", "space.yaml", SPACE, table, commands):
        yield Case(kind=case.kind, name=case.name, make=case.make, commands=commands, message="")
    table = {
        "kind": ("path", None, 7),
        "base": (7, None),
        "block": (0, 1.5, 10**12, "two"),
        "shortest": (0, -1, NAN, INF, 3, 1e300),
        "longest": (0, 9, INF, 0.5),
        "reach": (-1, 10**12, "far"),
        "scale": (
            {"low": 0.5},
            {"low": 2, "high": 3},
            {"low": 1, "high": 1},
            {"low": 0, "high": INF},
            2,
            {"low": -1e308, "high": 1e308},
        ),
        "genes": ({},),
    }
    for case in _values("space", "space.yaml", PATH_SPACE, table, commands):
        yield Case(kind=case.kind, name=f"path {case.name}", make=case.make, commands=commands, message="")
    many = {
        "models": {"base": "base", "sources": {f"s{i}": "add" for i in range(5001)}},
        "space": SPACE,
        **{key: CONFIG[key] for key in ("suite", "budget", "executor", "out")},
    }
    yield Case(
        kind="space",
        name="5,001 genes",
        make=as_yaml("config.yaml", many),
        commands=(CHECK,),
        message="too many genes",
    )


def recipe() -> Iterator[Case]:
    """Recipes."""
    commands = (MERGE, MERGEKIT_OUT, ADAPTER_OUT, ANALYZE)
    yield from _syntax("recipe", "recipe.yaml", commands)
    group = RECIPE["groups"][0]
    table: dict[str, Sequence[Any]] = {
        "format": (2, None, "1", 0),
        "models": (None, {}, [], "base", {"base": "base"}, {"base": None}, {"": "base"}, {"base": 7}),
        "base": ("absent", 7, []),
        "dtype": ("float64", None, 7, []),
        "tokenizer": ("absent", 7),
        "seed": (-1, 1.5, 10**19 - 1, True, NAN, "x"),
        "num_layers": (0, -1, 1.5, 10**9, True, "all"),
        "fisher": ({"absent": "x"}, [], {"add": None}),
        "gram": ({"absent": "x"}, [], {"add": None}),
        "fingerprints": ({"absent": "x"}, {"add": "x" * 64}, {"add": 7}),
        "groups": (None, [], {}, [None], "all", [{}], [{"method": "ties"}]),
        "groups.0.method": ("tiess", None, 7, []),
        "groups.0.sources": ([], None, ["absent"], [7], "absent", {"a": 1}),
        "groups.0.parameters": (
            [],
            {"density": NAN},
            {"density": 2},
            {"density": [0.5]},
            {"density": "x"},
            {"nothing": 1},
            {"weight": INF},
            {"weight": {"add": 1}},
            {"lambda": [1, 2]},
            {"normalize": 1},
            {"weight": None},
            {"weight": 1e300},
        ),
        "groups.0.layers": ("all", [-1], [1.5], [10**12], [True], 3, [[0, 1]], [99]),
        "groups.0.match": (7, [7], ["no_such_tensor"], {"a": 1}),
        "groups.0.shift": (7, [1], {"absent": 1}, [10**12, 0], {"add": 1.5}, [1, 1], {"add": 10**9}),
        "groups.0.base": ("absent", 7),
        "groups.0.base_shift": (1.5, 10**12, "x"),
        "groups.0.unknown": (1,),
        "unknown": (1,),
    }
    for case in _values("recipe", "recipe.yaml", RECIPE, table, (MERGE, MERGEKIT_OUT)):
        only = (
            (MERGE,)
            if any(
                p in case.name
                for p in (
                    "fingerprints",
                    "seed",
                    "num_layers",
                    "[99]",
                    "match",
                    "shift",
                    "base",
                    "e+300",
                    "'absent'",
                    "lambda",
                )
            )
            else case.commands
        )
        yield Case(kind=case.kind, name=case.name, make=case.make, commands=only, message="")
    for name, data in {
        "no group for all tensors": changed(RECIPE, "groups.0.layers", [0]),
        "one source for slerp": changed(RECIPE, "groups", [{"method": "slerp", "sources": ["add"]}]),
        "ties without base": {key: value for key, value in RECIPE.items() if key != "base"},
        "fisher without files": changed(
            RECIPE, "groups", [{"method": "fisher", "sources": ["add", "reverse"]}]
        ),
        "a shift out of the model": changed(RECIPE, "groups", [{**group, "shift": [3, 0]}]),
        "10,000 layers": changed(RECIPE, "num_layers", 10_000),
    }.items():
        yield Case(kind="recipe", name=name, make=as_yaml("recipe.yaml", data), commands=(MERGE,), message="")


def mergekit() -> Iterator[Case]:
    """mergekit files."""
    commands = (MERGE, MERGEKIT_OUT, ANALYZE)
    source = MERGEKIT["slices"][0]["sources"][0]
    table: dict[str, Sequence[Any]] = {
        "merge_method": (None, "tiess", 7, [], {}, "fisher"),
        "base_model": (
            "",
            {"path": ""},
            {"path": 7},
            7,
            [],
            {"path": "base", "x": 1},
            {"lora": "x"},
            "~nosuchuser/x",
            LONG,
            "no/such/model",
        ),
        "dtype": ("int8", 7, ["bfloat16"], {}),
        "out_dtype": ("float64",),
        "slices": ([], {}, "all", [None], [{}], [{"sources": []}], [{"sources": {}}], 7),
        "slices.0.sources.0.layer_range": (
            None,
            [0],
            [4, 0],
            [0, 0],
            [0, 10**12],
            [0, 1.5],
            ["a", "b"],
            [0, 3],
            [False, True],
            [-1, 3],
            [0, 99],
        ),
        "slices.0.sources.0.model": (
            None,
            7,
            [],
            {},
            "nowhere",
            {"model": 7},
            {"model": "add", "lora": "nowhere"},
        ),
        "slices.0.sources.0.parameters": (
            [],
            7,
            {"wieght": 1},
            {"weight": "x"},
            {"weight": []},
            {"weight": NAN},
            {"weight": [{"filter": "mlp"}]},
            {"weight": [{"value": {}}]},
            {"weight": {"a": 1}},
            {"density": 7},
            {"weight": [1, True]},
            {"t": 0.5},
        ),
        "slices.0.parameters": ({"weight": INF}, {"nothing": 1}, 7),
        "slices.0.base_model": (7, []),
        "slices.0.unknown": (1,),
        "parameters": ([], {"normalize": "x"}, {"normalize": 7}, {"lambda": NAN}, {"int8": True}),
        "modules": ({"a": {}, "b": {}}, {"a": 7}, 7),
        "models": ([{"model": "add"}], 7),
        "tokenizer_source": (7, [], "absent", "~nosuchuser/x"),
        "tokenizer": (7, {"tokens": {}}, {"source": 7}),
        "chat_template": ("chatml", 7),
        "unknown": (1,),
    }
    for case in _values("mergekit", "recipe.yaml", MERGEKIT, table, commands):
        yield Case(kind=case.kind, name=case.name, make=case.make, commands=(MERGE,), message="")
    for name, data in {
        "deep filters": changed(MERGEKIT, "parameters", {"weight": [{"value": [[[[1]]]]}]}),
        "slices and models": {**MERGEKIT, "models": [{"model": "add"}]},
        "nothing to merge": {"merge_method": "ties", "base_model": "base"},
        "too many layers": changed(
            MERGEKIT, "slices", [{"sources": [{**source, "layer_range": [0, 9000]}]}] * 2
        ),
        "different lengths": changed(MERGEKIT, "slices.0.sources.1.layer_range", [0, 2]),
        "3,000 slices out of the model": changed(
            MERGEKIT, "slices", [{"sources": [{**source, "layer_range": [i, i + 1]}]} for i in range(3000)]
        ),
        "3,000 models": {
            "merge_method": "linear",
            "models": [{"model": f"m{i}"} for i in range(3000)],
            "dtype": "float32",
        },
        "a gradient of 30,000 texts": changed(MERGEKIT, "parameters", {"weight": ["x"] * 30_000}),
        "1,000 filters without a default": changed(
            MERGEKIT,
            "slices.0.sources.0.parameters",
            {"weight": [{"filter": f"f{i}", "value": "x"} for i in range(1000)]},
        ),
    }.items():
        yield Case(
            kind="mergekit", name=name, make=as_yaml("recipe.yaml", data), commands=commands[:1], message=""
        )


def converted() -> Iterator[Case]:
    """Configs of mergekit-evolve and mergenetic."""
    of_genome: dict[str, Sequence[Any]] = {
        "genome": (None, [], 7, {}),
        "genome.models": (None, [], {}, "add", [7], [[]], [{"model": 7}], [{}], [""], ["base"]),
        "genome.base_model": (None, 7, [], "", {"model": None}),
        "genome.merge_method": (None, "tiess", 7, [], "model_stock", "passthrough", "slerp", LONG),
        "genome.layer_granularity": (-1, 1.5, "all", [], NAN, 10**12),
        "genome.tokenizer_source": (7, []),
        "genome.filters": (7, "mlp", [7], [[]], {}),
        "genome.normalize": ("x", 7, []),
        "genome.smooth": ("x", [], 7),
        "tasks": (None, [], {}, 7, [7], [None], [{}], [{"name": ""}], [{"name": "x", "weight": NAN}]),
        "tasks.0.weight": (-1, "x", [], INF),
        "tasks.0.metric": (7, [], {}),
        "limit": (0, -1, "x", [], 1.5, 10**12),
        "num_fewshot": (-1, "x", [], 10**12),
        "apply_chat_template": (7, []),
    }
    of_config: dict[str, Sequence[Any]] = {
        "base_model": (None, 7, [], ""),
        "models": (None, [], {}, 7, [7], {"x": 7}, {"base": "base"}, [{}]),
        "tasks": (7, {}, {"search": 7}, {"search": {}}),
        "pop_size": (0, -1, "x", [], 10**12),
        "n_iter": (0, "x", [], 10**12),
        "n_samples": (-1, "x", [], 10**12),
        "seed": (-1, "x", [], 10**30),
        "dtype": ("int8", 7, []),
        "eval_batch_size": (0, "x", 10**12),
        "metric": (7, []),
        "run_id": ([], {}),
        "datasets": (7, []),
    }
    for kind, valid, table in (
        ("mergekit-evolve", EVOLVE, of_genome),
        ("mergenetic", GENETIC, of_config),
        ("mergekit as a start", MERGEKIT, {"merge_method": ("tiess", 7), "models": ([{}], 7)}),
    ):
        command = CONVERT if valid is MERGEKIT else CONVERT_ALONE
        yield from _values(kind, "recipe.yaml", valid, table, (command,))


TASK: dict[str, Any] = {
    "task": "demo_add",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {s: f"data/demo_add.{s}.jsonl" for s in ("search", "select", "test")}},
    "test_split": "test",
    "target_delimiter": "",
    "output_type": "loglikelihood",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": " {{answer}} <eos>",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def task() -> Iterator[Case]:
    """Task files of lm-eval."""
    file = "tasks/demo_add.yaml"
    commands = (CHECK, EVALUATE)
    for case in _syntax("task", file, commands):
        message = "tasks"  # a file that reads as something else leaves its folder without the task
        yield Case(kind="task", name=case.name, make=case.make, commands=commands, message=message)
    table: dict[str, Sequence[Any]] = {
        "task": (None, 7, [], {"a": 1}, ""),
        "dataset_path": ("no_such_builder", 7, None, [], "/dev/zero", LONG),
        "dataset_kwargs": (
            {"data_files": "no_such.jsonl"},
            {"data_files": 7},
            {"data_files": {}},
            7,
            {"data_files": {"search": "~nosuchuser/x"}},
            {"data_files": ["data/\0x"[:5]]},
        ),
        "output_type": (None, "sorcery", 7, []),
        "doc_to_text": ("{{ prompt", "{{ no_such }}{{ 1/0 }}", 7, [], "{% for i in range(10) %}"),
        "doc_to_target": ("{{ 1/0 }}", "{{ answer | no_filter }}", {}, 7),
        "metric_list": ("acc", [{}], ["acc"], [{"metric": "no_such_metric"}], 7),
        "num_fewshot": (-1, "x", 1.5, 10**9),
        "filter_list": ([{"name": "x", "filter": [{"function": "no_filter"}]}], 7),
        "fewshot_split": ("no_such_split",),
        "process_docs": ("no_function",),
        "repeats": ("x",),
        "include": ("no_such.yaml", 7, "/dev/zero", "~nosuchuser/x.yaml", [7], {"a": 1}),
    }
    for case in _values("task", file, TASK, table, commands):
        yield Case(kind=case.kind, name=case.name, make=case.make, commands=commands, message="")
