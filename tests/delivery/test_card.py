"""The model card's header is what the hub expects: ids, licence and scores; a card names no path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from evomerge import compose
from evomerge.config import RunConfig
from evomerge.delivery import export as delivery
from evomerge.delivery.origins import licence, origins
from evomerge.delivery.progress import Silent
from evomerge.delivery.summary import Summary
from evomerge.errors import ConfigError
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.running.store import RunStore
from evomerge.stored import StoredRun
from tests.conftest import config_data, write_suite

COMMIT = "0123abc"


@pytest.fixture(scope="module")
def places(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> folder of the zoo's models; the base lies in a cache of the hub."""
    folder = tmp_path_factory.mktemp("card")
    base = folder / "cache" / "models--Org--base.v1" / "snapshots" / COMMIT
    found = {"base": base, "upper": folder / "upper", "reverse": folder / "reverse"}
    for name, place in found.items():
        shutil.copytree(tiny_zoo / name, place)
    return found


@pytest.fixture(scope="module")
def summary(places: dict[str, Path]) -> Summary:
    """A finished run, whose config says what `upper` is on the hub."""
    folder = places["upper"].parent
    write_suite(folder, generate=False)
    base, *sources = places
    models = {
        "base": str(places[base]),
        "sources": {name: str(places[name]) for name in sources},
        "hub": {"upper": "some-org/upper"},
    }
    short = {"budget": {"generations": 1}, "surrogate": "off", "baselines": [], "finalists": 1}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config_data(places["base"], folder, models=models, **short)))
    compose.start(RunConfig.load(path), Silent())
    return Summary(StoredRun(RunStore.read(folder / "run")))


@pytest.fixture
def recipe(places: dict[str, Path]) -> Recipe:
    mean = TensorGroup(method="linear", sources=("base", "upper", "reverse"))
    return Recipe(models={name: str(place) for name, place in places.items()}, base="base", groups=(mean,))


def write_cards(places: dict[str, Path], **texts: str) -> None:
    for name, place in places.items():
        (place / "README.md").write_text(texts.get(name, "# A model"))


def card_of(folder: Path) -> ModelCardData:
    data = ModelCard.load(folder / "README.md").data
    assert isinstance(data, ModelCardData)
    return data


def scores_of(data: ModelCardData) -> dict[str, float]:
    assert data.eval_results is not None
    assert {result.metric_type for result in data.eval_results} == {"acc"}
    return {result.dataset_name: result.metric_value for result in data.eval_results}


def licensed(name: str, more: str = "") -> str:
    return f"---\nlicense: {name}\n{more}---\n# A model\n"


def test_the_header_is_valid_on_the_hub_and_names_no_path(
    summary: Summary, places: dict[str, Path], tmp_path: Path
) -> None:
    write_cards(places, base=licensed("mit"), upper=licensed("mit"), reverse=licensed("gemma"))
    done = delivery.export(summary, tmp_path / "out")
    data = card_of(done.folder)
    assert data.base_model == ["Org/base.v1", "some-org/upper"]
    for name in data.base_model:
        validate_repo_id(name)
    assert data["base_model_relation"] == "merge"
    assert (data.license, data.library_name, data.tags) == ("other", "transformers", ["merge", "evomerge"])
    assert "base mit, reverse gemma, upper mit" in done.notes[0]
    row = next(row for row in summary.rows() if row.role == "winner")
    assert scores_of(data) == {task: value.estimate for task, value in row.tasks.items()}
    text = (done.folder / "README.md").read_text()
    assert not any(str(place.parent) in text for place in places.values())
    assert f"| base (base) | `Org/base.v1@{COMMIT}` |" in text
    assert "| reverse | `reverse` |" in text


def test_recipes_that_leave_name_hub_ids_where_they_are_known(
    summary: Summary, places: dict[str, Path], tmp_path: Path
) -> None:
    expected = {
        "base": f"Org/base.v1@{COMMIT}",
        "upper": "some-org/upper",
        "reverse": str(places["reverse"]),
    }
    done = delivery.export(summary, tmp_path / "out")
    for path in (tmp_path / "out" / "recipe.yaml", tmp_path / "alone.yaml"):
        if not path.exists():
            delivery.export_text(summary, path)
        recipe = Recipe.from_yaml(path.read_text())
        assert dict(recipe.models) == expected
        assert recipe.hash == done.pick.recipe.hash
        assert recipe.fingerprints
    mergekit = (done.folder / "mergekit.yaml").read_text()
    assert all(place in mergekit for place in expected.values())
    assert not any(str(places[name]) in mergekit for name in ("base", "upper"))


def test_an_adapters_card_names_its_base(summary: Summary, places: dict[str, Path], tmp_path: Path) -> None:
    write_cards(places, **dict.fromkeys(places, licensed("other", "license_name: ours\n")))
    done = delivery.export_adapter(summary, tmp_path / "out", rank=2)
    data = card_of(tmp_path / "out")
    assert (data.base_model, data["base_model_relation"]) == (["Org/base.v1"], "adapter")
    assert (data.license, data.license_name, done.notes) == ("other", "ours", ())
    assert scores_of(data).items() <= {task: score for task, _, score in done.rows()}.items()
    assert str(places["upper"].parent) not in (tmp_path / "out" / "README.md").read_text()


def test_what_a_model_derives_from_comes_from_its_files(recipe: Recipe, places: dict[str, Path]) -> None:
    bases = "base_model:\n- Org/other\n- models/mine\n- /home/me/model\n"
    write_cards(places, upper=licensed("mit", bases), reverse=licensed("mit", bases))
    path = places["reverse"] / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"_name_or_path": "Org/older"}))
    found = origins(recipe, {})
    path.write_text(before)
    assert [model.ids for model in found.values()] == [("Org/base.v1",), ("Org/other",), ("Org/older",)]
    assert found["upper"].published is None  # what it derives from is not what it is


@pytest.mark.parametrize("where", ["/home/me/model", "./model", "outputs/sft", "model", 3, None])
def test_paths_in_a_config_are_no_ids(where: object, recipe: Recipe, places: dict[str, Path]) -> None:
    write_cards(places)
    path = places["reverse"] / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"_name_or_path": where}))
    found = origins(recipe, {})
    path.write_text(before)
    assert found["reverse"].ids == ()


@pytest.mark.parametrize("text", ["---\n: [\n---\n", licensed("[mit]"), "no header", "---\n- a\n---\n"])
def test_cards_without_a_licence_give_none(text: str, recipe: Recipe, places: dict[str, Path]) -> None:
    write_cards(places, base=text, upper=licensed("mit"), reverse=licensed("mit"))
    assert licence(origins(recipe, {}).values()) == ({}, None)


@pytest.mark.parametrize("hub", [{"uper": "org/upper"}, {"upper": "/home/me/upper"}, {"upper": "upper"}])
def test_ids_in_a_config_are_checked(
    hub: dict[str, str], config: Callable[..., Path], tiny_zoo: Path
) -> None:
    models = {"base": str(tiny_zoo / "base"), "sources": {"upper": str(tiny_zoo / "upper")}, "hub": hub}
    with pytest.raises(ConfigError, match=r"no model 'uper'|no hub id"):
        RunConfig.load(config(models=models))
