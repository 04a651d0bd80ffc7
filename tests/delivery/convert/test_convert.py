"""`evomerge convert`: the published configs of other projects, rebuilt, become run configs that are valid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import evomerge
from evomerge.cli import app
from evomerge.config import RunConfig, load_suite
from evomerge.delivery.convert.writer import Converted
from evomerge.errors import ConfigError, DiskError, UserError
from evomerge.prepare import prepare
from evomerge.schema import preset_folder
from evomerge.search.spaces.preset import SpaceSpec
from evomerge.search.spaces.resolve import resolve

EXAMPLES = Path(__file__).parent / "examples"
TASKS = preset_folder("benchmarks/suites").parent / "tasks" / "demo"
REFUSED = ("merge_two_documents.yml", "genetic_own_data.yaml")
READ = sorted(path.name for path in EXAMPLES.iterdir() if path.name not in REFUSED)

Convert = Callable[..., tuple[dict[str, Any], Converted]]


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """Convert an example, or data as a file; return the written config and what was said."""

    def convert(file: str | dict[str, Any], **options: Any) -> tuple[dict[str, Any], Converted]:
        place = EXAMPLES / file if isinstance(file, str) else tmp_path / "theirs.yml"
        if not isinstance(file, str):
            place.write_text(yaml.safe_dump(file, sort_keys=False))
        out = tmp_path / "ours.yaml"
        done = evomerge.convert(place, out=out, **options)
        return yaml.safe_load(out.read_text()), done

    return convert


def evolve(**changes: Any) -> dict[str, Any]:
    genome = {"models": ["forge/a", "forge/b"], "merge_method": "ties", "base_model": "forge/root"}
    return {"genome": genome | changes.pop("genome", {}), "tasks": [{"name": "my_task"}], **changes}


def genetic(**changes: Any) -> dict[str, Any]:
    data = yaml.safe_load((EXAMPLES / "genetic_languages.yaml").read_text())
    return {key: value for key, value in {**data, **changes}.items() if value is not None}


def merge(**changes: Any) -> dict[str, Any]:
    data = yaml.safe_load((EXAMPLES / "merge_plain_ties.yml").read_text())
    return {key: value for key, value in {**data, **changes}.items() if value is not None}


@pytest.mark.parametrize("name", READ)
def test_every_published_example_becomes_a_valid_config(name: str, convert: Convert, tmp_path: Path) -> None:
    given = {"suite": "math"} if name.startswith("merge") else {}
    _, done = convert(name, **given)
    config = RunConfig.load(tmp_path / "ours.yaml")
    assert name != "merge_stacked.yml" or not isinstance(config.space, SpaceSpec)
    if isinstance(config.space, SpaceSpec):
        resolve(config.space)
    assert load_suite(config.suite).tasks
    assert all("forge/" in place for place in config.locations.values())
    comments = " ".join(line[2:].strip() for line in (tmp_path / "ours.yaml").read_text().splitlines())
    assert done.notes
    assert all(" ".join(note.split()) in comments for note in done.notes)
    assert "next:    evomerge check" in done.text


def test_a_genome_becomes_a_search_space(convert: Convert) -> None:
    data, done = convert("evolve_documented.yml")
    assert data["models"] == {
        "base": "forge/root-7b",
        "sources": {f"{name}-7b": f"forge/{name}-7b" for name in ("alpha", "beta", "gamma")},
    }
    space = data["space"]
    assert (space["method"], space["layers"], space["fixed"]) == ("dare_ties", 4, {"normalize": False})
    assert space["modules"] == {"self_attn": ["self_attn"], "mlp": ["mlp"], "rest": []}
    assert space["genes"] == {"weight": {"low": 0.0, "high": 1.5}, "density": {"low": 0.1, "high": 1.0}}
    assert data["budget"] == {"evaluations": 100}
    assert data["suite"]["chat_template"] in ("off", False)
    easy, own = data["suite"]["tasks"]
    assert (easy["metric"], easy["weight"], easy["splits"]["search"]["from"]) == ("acc_norm", 0.5, "train")
    assert (own["metric"], own["splits"]) == ("acc", {"search": 100, "select": 100, "test": 200})
    assert any("my_own_task: other items" in note for note in done.notes)


def test_every_key_of_mergekit_evolve_is_carried_over_or_said(convert: Convert) -> None:
    data, done = convert("evolve_all_keys.yml", evaluations=30)
    assert data["models"]["sources"]["beta-adapter"] == "forge/beta-7b+forge/beta-adapter"
    assert data["tokenizer"] == "union"
    assert data["space"]["layers"] == 1
    curve = {"points": 4, "kind": "linear"}
    assert data["space"]["genes"] == {"weight": {"low": -0.5, "high": 1.5, "curve": curve}}
    assert data["budget"] == {"evaluations": 30}
    suite = data["suite"]
    assert (suite["chat_template"], suite["num_fewshot"], suite["fewshot_as_multiturn"]) == ("auto", 3, True)
    strict, flexible, text = suite["tasks"]
    assert (strict["of"], strict["task"]) == ("gsm8k", "gsm8k_exact_match_strict_match")
    assert (strict["metric"], strict["weight"]) == ("exact_match,strict-match", 2)
    assert strict["splits"] == {
        "search": {"from": "train", "items": 60},
        "select": {"from": "train", "items": 300},
        "test": "test",
    }
    assert flexible["metric"] == "exact_match,flexible-extract"
    assert (text["role"], text["metric"]) == ("retention", "loglikelihood")
    for word in ("smooth", "shuffle", "random_init", "retention"):
        assert any(word in note for note in done.notes), word
    assert not any("int8_mask" in note for note in done.notes)


def test_a_curve_has_a_point_for_each_of_mergekits_groups(tiny_zoo: Path, convert: Convert) -> None:
    genome = {"models": [str(tiny_zoo / "upper")], "base_model": str(tiny_zoo / "base")}
    data, _ = convert(evolve(genome=genome | {"smooth": True, "layer_granularity": 1}))
    assert data["space"]["genes"]["weight"]["curve"]["points"] == 2
    assert not Path(data["models"]["base"]).is_absolute()


def test_slerp_from_the_base_is_a_line_and_between_two_others_an_arc(
    convert: Convert, tmp_path: Path
) -> None:
    data, done = convert("evolve_slerp.yml")
    assert data["models"] == {"base": "forge/root-7b", "sources": {"alpha-7b": "forge/alpha-7b"}}
    assert (data["space"]["method"], data["space"]["layers"]) == ("task_arithmetic", 16)
    assert data["space"]["genes"] == {"weight": {"low": 0.0, "high": 1.0}}
    assert any("--base MODEL" in note for note in done.notes)
    assert data["suite"]["tasks"][0]["splits"]["test"]["from"] == "validation"
    (tmp_path / "ours.yaml").unlink()
    data, _ = convert("evolve_slerp.yml", base="forge/origin-7b")
    assert list(data["models"]["sources"]) == ["root-7b", "alpha-7b"]
    assert (data["space"]["method"], list(data["space"]["genes"])) == ("slerp", ["t"])


def test_shares_of_models_without_a_base_are_measured_from_the_first(
    convert: Convert, tmp_path: Path
) -> None:
    data, _ = convert("evolve_linear.yml")
    assert data["models"] == {"base": "forge/alpha-7b", "sources": {"beta-7b": "forge/beta-7b"}}
    assert data["space"]["method"] == "task_arithmetic"
    (tmp_path / "ours.yaml").unlink()
    data, _ = convert("evolve_linear.yml", base="forge/root-7b")
    assert (data["space"]["method"], data["space"]["fixed"]) == ("linear", {"normalize": True})
    assert list(data["models"]["sources"]) == ["alpha-7b", "beta-7b"]


def test_stacked_layers_are_searched_as_a_layer_path(convert: Convert) -> None:
    data, _ = convert("merge_stacked.yml", suite="math")
    assert (data["space"]["kind"], data["space"]["base"]) == ("layer_path", True)


def test_a_group_of_tasks_weighs_as_much_as_the_group(convert: Convert) -> None:
    data, _ = convert("evolve_ties_group.yml")
    assert list(data["models"]["sources"]) == ["alpha-7b", "beta-7b"]  # the base was listed, too
    assert data["suite"]["tasks"][0]["weight"] == pytest.approx(0.1)


def test_a_misspelt_key_is_said_with_the_nearest_one(convert: Convert) -> None:
    _, done = convert(evolve(genome={"layer_granularty": 4}))
    assert any("layer_granularty" in note and "layer_granularity" in note for note in done.notes)


def test_one_model_of_mergenetic_is_merged_by_slerp(convert: Convert) -> None:
    data, done = convert("genetic_one_model.yaml")
    assert data["models"] == {"base": "forge/sums-7b", "sources": {"xx": "forge/speaks-xx-7b"}}
    assert data["space"]["genes"]["weight"]["curve"]["points"] == 5
    assert (data["optimizer"], data["budget"]) == ({"population": 8}, {"generations": 6})
    assert (data["seed"], data["out"], data["dtype"]) == (7, "runs/sums-xx", "float16")
    assert data["executor"] == {"batch_size": 32}
    (task,) = data["suite"]["tasks"]
    assert (task["task"], task["specialist"]) == ("sums-xx", "xx")
    assert task["splits"] == {"search": 12, "select": 12, "test": 200}
    assert any("--tasks-dir" in note for note in done.notes)


def test_several_models_of_mergenetic_have_several_objectives(convert: Convert) -> None:
    data, _ = convert("genetic_languages.yaml")
    assert list(data["models"]["sources"]) == ["xx", "yy", "zz"]
    assert data["space"]["method"] == "dare_ties"
    assert data["objective"] == {"several": ["quiz_xx", "quiz_yy", "quiz_zz", "quiz_en"]}


def test_tasks_of_mergenetic_that_only_test_are_reported(convert: Convert) -> None:
    data, _ = convert("genetic_numbered.yaml")
    assert data["suite"]["tasks"][-1] == {
        "task": "quiz_yy_full",
        "metric": "exact_match",
        "weight": 0,
        "splits": {"test": 200},
    }


def test_the_language_no_is_a_name(convert: Convert) -> None:
    data, _ = convert(genetic(models={False: "forge/no", "xx": "forge/xx"}, datasets=None))
    assert list(data["models"]["sources"]) == ["no", "xx"]


def test_mergenetics_own_data_files_become_tasks(
    convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    rows = "\n".join(f"What is {n} + 1?,{n + 1}" for n in range(40))
    (tmp_path / "data" / "sums_xx.csv").write_text(f"question,answer\n{rows}\n")
    data, _ = convert("genetic_own_data.yaml")
    (task,) = data["suite"]["tasks"]
    assert (task["task"], task["data"], task["metric"]) == ("xx", "data/sums_xx.csv", "number")
    assert data["budget"] == {"evaluations": 1}


def test_a_merge_becomes_a_warm_start_in_a_space_that_holds_it(convert: Convert, tmp_path: Path) -> None:
    data, _ = convert("merge_ties.yml", suite="math")
    (recipe,) = data["warm_start"]["recipes"]
    assert (tmp_path / recipe).resolve() == (EXAMPLES / "merge_ties.yml").resolve()
    space = data["space"]
    assert (space["method"], space["layers"], space["fixed"]) == ("ties", 1, {"normalize": True})
    assert list(space["modules"]) == ["mlp", "rest"]
    assert set(space["genes"]) == {"weight", "density"}
    assert (data["dtype"], data["suite"]) == ("float16", "math")


def test_ranges_hold_what_a_merge_sets(convert: Convert) -> None:
    models = [{"model": "forge/a", "parameters": {"weight": -0.9, "density": 0.05}}]
    models.append({"model": "forge/b", "parameters": {"weight": 2.5, "density": 1}})
    data, _ = convert(merge(models=models, parameters={"lambda": 0.3}), suite="math")
    assert data["space"]["genes"] == {
        "weight": {"low": -0.9, "high": 2.5},
        "density": {"low": 0.05, "high": 1.0},
        "lambda": {"low": 0.3, "high": 1.5},
    }


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (evolve(genome={"merge_method": "tie"}), {}, ["'ties'"]),
        (evolve(genome={"base_model": None}), {}, ["base model", "--base MODEL"]),
        (evolve(genome={"merge_method": "slerp"}), {}, ["slerp merges two models"]),
        (evolve(genome={"merge_method": "model_stock"}), {}, ["model_stock has no weight"]),
        (evolve(genome={"models": []}), {}, ["models"]),
        (evolve(genome={"models": [3]}), {}, ["expected: a folder or a hub id"]),
        (evolve(genome={"layer_granularity": "many"}), {}, ["layer_granularity"]),
        (evolve(tasks=[{"name": "mine", "weight": -1}]), {}, ["a lower acc is better"]),
        (evolve(tasks=[]), {}, ["--suite NAME"]),
        (evolve(tasks=[{"name": "mine", "weight": 0}]), {}, ["weight above 0"]),
        (evolve(limit=-1), {}, ["limit"]),
        (evolve(), {"method": "ties"}, ["--method is for configs of mergenetic"]),
        (genetic(models={}), {}, ["models"]),
        (genetic(base_model=None), {}, ["base_model"]),
        (genetic(tasks={"find": {}}), {}, ["{search: {NAME: TASK}"]),
        (genetic(tasks=None, datasets=None), {}, ["--data FILE"]),
        (genetic(), {"method": "slerp"}, ["slerp merges two models"]),
        (merge(), {}, ["does not say what to score on", "--suite NAME"]),
        (merge(merge_method="tiess"), {"suite": "math"}, ["'ties'"]),
        (merge(base_model=None), {"suite": "math"}, ["base_model"]),
        (merge(), {"suite": "maths"}, ["'math'"]),
        ({"experts": [], "gate_mode": "hidden"}, {}, ["mergekit-moe"]),
        ({"models": {}, "space": "x", "budget": {}}, {}, ["a run config of evomerge already"]),
        ({"foo": 1}, {}, ["nothing that can be converted", "the keys foo"]),
    ],
)
def test_what_has_no_counterpart_is_one_message(
    data: dict[str, Any], options: dict[str, Any], words: list[str], convert: Convert, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        convert(data, **options)
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert not (tmp_path / "ours.yaml").exists()


def test_files_that_are_there_already_or_hold_two_merges_are_refused(
    convert: Convert, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="2 documents"):
        convert("merge_two_documents.yml", suite="math")
    with pytest.raises(ConfigError, match="is not here"):
        convert("genetic_own_data.yaml")
    (tmp_path / "ours.yaml").write_text("mine")
    with pytest.raises(DiskError, match="exists already"):
        convert("merge_ties.yml", suite="math")


def zoo_file(zoo: Path, method: str, **genome: Any) -> dict[str, Any]:
    models = [str(zoo / "upper"), str(zoo / "reverse")]
    if method == "slerp":
        models = [str(zoo / "base"), str(zoo / "upper")]
    tasks = [{"name": "demo_upper", "weight": 2.0, "metric": "acc,none"}, {"name": "demo_reverse"}]
    given = {"models": models, "merge_method": method, "base_model": str(zoo / "base"), **genome}
    return {"genome": given, "tasks": tasks, "limit": 8, "num_fewshot": 0}


def begun(path: Path) -> evomerge.Run:
    """Run one generation of a written config in this process."""
    data = yaml.safe_load(path.read_text())
    data["executor"] = {"name": "inline", "threads": 1}
    data |= {
        "weak_specialists": "allow",
        "finalists": 1,
        "baselines": ["uniform average"],
        "out": str(path.parent / "run"),
    }
    data["warm_start"] = {**data.get("warm_start", {}), "gradients": "off"}
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return evomerge.optimize(path, generations=1)


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("method", "genome"),
    [
        ("ties", {"layer_granularity": 1, "filters": ["self_attn", "mlp"], "normalize": True}),
        pytest.param("slerp", {"layer_granularity": 1, "smooth": True}, marks=pytest.mark.slow),
        pytest.param("linear", {"base_model": None, "normalize": True}, marks=pytest.mark.slow),
    ],
)
def test_a_converted_config_runs(
    method: str, genome: dict[str, Any], tiny_zoo: Path, convert: Convert, tmp_path: Path
) -> None:
    convert(zoo_file(tiny_zoo, method, **genome), tasks_dir=TASKS)
    run = begun(tmp_path / "ours.yaml")
    assert run.winner is not None
    assert set(run.winner.tasks) == {"demo_upper", "demo_reverse"}


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("changes", "expressed"),
    [
        ({"merge_method": "ties"}, True),
        ({"merge_method": "linear", "base_model": None}, False),  # shares, where the search has weights
    ],
)
def test_the_merge_of_a_file_is_scored_and_seeds_the_search(
    changes: dict[str, Any], expressed: bool, tiny_zoo: Path, convert: Convert, tmp_path: Path
) -> None:
    (tmp_path / "suite.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "small",
                "tasks_dir": str(TASKS),
                "tasks": [
                    {"task": "demo_upper", "metric": "acc", "splits": {"search": 8, "select": 8, "test": 8}}
                ],
            }
        )
    )
    models = [
        {"model": str(tiny_zoo / "upper"), "parameters": {"weight": [0.2, 0.9]}},
        {"model": str(tiny_zoo / "reverse"), "parameters": {"weight": 0.4, "density": 0.5}},
    ]
    file = {"base_model": str(tiny_zoo / "base"), "models": models, "dtype": "bfloat16"} | changes
    convert(file, suite=str(tmp_path / "suite.yaml"))
    run = begun(tmp_path / "ours.yaml")
    with run.opened() as summary:
        recipe = next(named.recipe for named in summary.named if "theirs.yml" in named.name)
        space = prepare(summary.run.config()).space
    assert (space.encode(recipe) is not None) == expressed


def test_the_command_says_what_changed(tmp_path: Path) -> None:
    out = tmp_path / "ours.yaml"
    words = ["convert", str(EXAMPLES / "evolve_linear.yml"), "--out", str(out), "--base", "forge/root-7b"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "changed: genes have bounds" in result.output
    assert yaml.safe_load(out.read_text())["models"]["base"] == "forge/root-7b"
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2
    assert again.stderr.startswith("error: ")
