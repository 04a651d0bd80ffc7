"""Building a zoo: refusals at once; and, slowly, that the tiny one is deterministic and behaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from evomerge.cli import app
from evomerge.config import RunConfig
from evomerge.errors import UserError
from evomerge.prepare import prepare
from evomerge.zoo import ModelCard, ZooCard, build_zoo
from evomerge.zoo.rules import DEMO_SKILLS, RULES
from evomerge.zoo.settings import ARCHITECTURES, DEMO, zoo_settings
from evomerge.zoo.skills import vocabulary
from evomerge.zoo.train import new_model


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="not an empty folder"):
        build_zoo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "huge"}, "unknown zoo size"),
        ({"seed": -1}, "can't be negative"),
        ({"jobs": 0}, "the number of jobs must be positive"),
        ({"architecture": "gpt2"}, "unknown architecture"),
        ({"skills": ["add", "shif"]}, "unknown skill 'shif'"),
        ({"skills": ["add"]}, "2 to 8 different skills"),
        ({"skills": ["add", "upper", "add"]}, "2 to 8 different skills"),
        ({"skills": [*RULES][:9]}, "2 to 8 different skills"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        build_zoo(tmp_path / "zoo", **arguments)
    assert not (tmp_path / "zoo").exists()


def test_a_folder_without_a_card_is_no_zoo(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a finished zoo"):
        ZooCard.load(tmp_path)


def test_the_command_line_names_the_nearest_skill(tmp_path: Path) -> None:
    words = ["zoo", "build", str(tmp_path / "zoo"), "--skills", "add, shif"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "unknown skill 'shif'" in result.stderr
    assert "'shift'" in result.stderr
    assert not (tmp_path / "zoo").exists()


def test_naming_the_demos_skills_gives_the_demo() -> None:
    assert zoo_settings("demo", DEMO_SKILLS) == zoo_settings() == DEMO


def test_weak_specialists_and_a_strong_base_are_noted() -> None:
    def card(kind: str, skill: str | None, shift: float, count: float) -> ModelCard:
        return ModelCard(
            kind=kind, skill=skill, accuracy={"shift": shift, "count": count}, text_perplexity=7.0
        )

    models = {
        "base": card("base", None, 0.2, 0.6),
        "shift": card("full", "shift", 0.69, 0.1),
        "count": card("full", "count", 0.1, 0.95),
    }
    notes = ZooCard(seed=0, size="demo", settings={}, models=models, versions={}).notes()
    assert notes == [
        "shift is a weak specialist: 0.69 of its own items, under 0.7",
        "the base already knows count: 0.60 of its items, over 0.5",
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_one_that_trains(architecture: str) -> None:
    settings = zoo_settings("tiny", ["shift", "add"], architecture)
    model = new_model(settings)
    assert model.config.model_type == architecture
    ids = torch.arange(len(vocabulary(settings.skills)))[None, -12:]
    loss = model(input_ids=ids, labels=ids).loss
    torch.autograd.backward(loss)
    assert torch.isfinite(loss)
    shape = model.model.layers[0].self_attn.q_proj.weight.shape
    assert shape == (settings.hidden, settings.hidden), "heads are not as wide as their share"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_same_seed_builds_the_same_bytes_and_specialists_specialise(tmp_path: Path) -> None:
    lines: list[str] = []
    first = build_zoo(tmp_path / "first", seed=0, size="tiny", progress=lines.append)
    second = build_zoo(tmp_path / "second", seed=0, size="tiny", jobs=1)
    assert first == second == ZooCard.load(tmp_path / "first")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert str(tmp_path).encode() not in b"".join(contents(tmp_path / "first").values())
    assert {path.name for path in (tmp_path / "first").iterdir()} == {
        *first.models,
        "zoo.json",
        "run.yaml",
        "suite.yaml",
        "tasks",
    }
    assert lines[0].startswith("base: training")
    base = first.models["base"]
    for name in ("reverse", "upper", "add"):
        model = first.models[name]
        assert model.accuracy[name] >= base.accuracy[name] + 0.3
        assert model.text_perplexity <= 1.1 * base.text_perplexity


def test_a_zoo_brings_the_run_that_merges_it(tiny_zoo: Path) -> None:
    config = RunConfig.load(tiny_zoo / "run.yaml")
    assert config.models.base == str(tiny_zoo / "base")
    assert config.models.sources == {
        "reverse": str(tiny_zoo / "reverse"),
        "upper": str(tiny_zoo / "upper"),
        "add": f"{tiny_zoo / 'base'}+{tiny_zoo / 'add'}",
    }
    prepared = prepare(config)
    tasks = [task.task for task in prepared.suite.tasks]
    assert tasks == [
        "zoo_add",
        "zoo_reverse",
        "zoo_upper",
        "zoo_text",
        "zoo_reverse_generate",
        "zoo_upper_choice",
    ]
    assert all(path.is_relative_to(tiny_zoo) for path in prepared.suite.files().values())
