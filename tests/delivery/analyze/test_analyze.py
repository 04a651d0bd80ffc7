"""What `evomerge analyze` takes and shows: three kinds of files, any width, a page without a network."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from evomerge.delivery.analyze import terminal as delivery
from evomerge.delivery.analyze.heat_map import (
    BAD,
    GOOD,
    MEASURES,
    STRONG,
    HeatMapMeasure,
    grid,
    labels,
    measures,
)
from evomerge.delivery.analyze.page import write_html
from evomerge.delivery.analyze.terminal import read_models
from evomerge.errors import ConfigError
from evomerge.merging.analysis.advice import Advised, advise
from evomerge.merging.analysis.interference import Interference, measure


@pytest.fixture(scope="module")
def measured(tiny_zoo: Path) -> tuple[Interference, Advised]:
    named = {name: str(tiny_zoo / name) for name in ("base", "upper", "reverse")}
    interference = measure(named | {"add": f"{tiny_zoo / 'base'}+{tiny_zoo / 'add'}"}, "base")
    return interference, advise(interference)


def shown(measured: tuple[Interference, Advised], width: int, map_: str = "conflict") -> str:
    console = Console(
        width=width, record=True, file=io.StringIO(), color_system="truecolor", force_terminal=True
    )
    console.print(delivery.terminal(*measured, measure=map_, width=width))
    return console.export_text()


# Which models ------------------------------------------------------------------------------------------


def test_the_models_of_a_run_config(config: Callable[..., Path], tiny_zoo: Path) -> None:
    models, base = read_models(config())
    assert base == "base"
    assert models == {name: str(tiny_zoo / name) for name in ("base", "upper", "reverse")}


def test_the_models_of_a_recipe_and_of_a_mergekit_file(tmp_path: Path) -> None:
    for name in "xyz":
        (tmp_path / name).mkdir()
    recipe = {
        "models": {"x": "x", "y": "y", "z": "z", "unused": "nowhere"},
        "base": "y",
        "groups": [{"method": "ties", "sources": ["z", "x"]}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    models, base = read_models(tmp_path / "recipe.yaml")
    assert (list(models), base) == (["y", "x", "z"], "y")
    assert models["x"] == str(tmp_path / "x")
    kit = {
        "merge_method": "linear",
        "models": [{"model": "x", "parameters": {"weight": 1}}, {"model": "z", "parameters": {"weight": 1}}],
        "dtype": "float32",
    }
    (tmp_path / "kit.yaml").write_text(yaml.safe_dump(kit))
    with pytest.raises(ConfigError, match=r"names no base model[^$]*--base"):
        read_models(tmp_path / "kit.yaml")
    models, base = read_models(tmp_path / "kit.yaml", str(tmp_path / "y"))
    assert (list(models), base, models["base"]) == (["base", "x", "z"], "base", str(tmp_path / "y"))
    assert read_models(tmp_path / "recipe.yaml", "z")[1] == "z"


# The terminal ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("map_", MEASURES)
@pytest.mark.parametrize("width", [70, 120])
def test_everything_fits_and_reads_without_colour(
    measured: tuple[Interference, Advised], width: int, map_: str
) -> None:
    text = shown(measured, width, map_)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    interference, advised = measured
    for word in ("upper - reverse", "outside the layers", advised.verdict, advised.preset, "evomerge run"):
        assert word in text
    kinds, short, cells = grid(interference)
    shown_measure = measures(interference)[map_]
    rows = [line.split() for line in text.splitlines() if re.match(r"^ [01] ", line)]
    numbers = [shown_measure.text(shown_measure.of(cells[layer, kind])) for layer in (0, 1) for kind in kinds]
    assert sorted(n for row in rows for n in row[1:-1]) == sorted(numbers)
    assert len(short) == len(set(short))


def test_colours_end_where_chance_is(measured: tuple[Interference, Advised]) -> None:
    by_name = measures(measured[0])
    assert by_name["conflict"].colour(0.5) == (255, 255, 255) == by_name["cosine"].colour(0.0)
    assert by_name["conflict"].colour(0.9) == BAD == by_name["cosine"].colour(-0.9)
    assert by_name["conflict"].colour(0.1) == GOOD == by_name["cosine"].colour(0.9)
    assert by_name["norm"].colour(by_name["norm"].high) == STRONG
    for measure_ in by_name.values():
        assert isinstance(measure_, HeatMapMeasure)
        assert measure_.colour(math.nan) == (255, 255, 255)
        assert measure_.text(math.nan) == "-"
        assert "-0" not in measure_.text(-1e-9)


def test_labels_stay_apart() -> None:
    assert labels(["self_attn.q_proj", "self_attn.q_proj.bias", "mlp.down_proj"]) == ["q", "bias", "down"]
    assert labels(["a.norm", "b.norm", "norm"]) == ["a.norm", "b.norm", "norm"]


def test_as_data_is_json_and_complete(measured: tuple[Interference, Advised]) -> None:
    data = json.loads(json.dumps(delivery.as_data(*measured), allow_nan=False))
    interference = measured[0]
    assert set(data["tensors"]) == set(interference.tensors)
    assert set(data["layers"]) == {"outside", "0", "1"}
    for part in (data["total"], *data["tensors"].values()):
        assert sum(part["shares"].values()) == pytest.approx(1.0)
        assert len(part["pairs"]) == 3
    assert data["total"]["pairs"][0]["relation"] == measured[1].relations[0, 1]
    assert data["total"]["pairs"][0]["cosine"] == pytest.approx(interference.total.cosine[0, 1])
    assert {advice["rule"] for advice in data["advice"]} <= {rule["name"] for rule in data["rules"]}


# The page ----------------------------------------------------------------------------------------------


def test_the_page_is_self_contained_and_drawn(measured: tuple[Interference, Advised], tmp_path: Path) -> None:
    page = write_html(*measured, tmp_path / "new" / "page.html")
    assert [p.name for p in page.parent.iterdir()] == ["page.html"]
    text = page.read_text()
    outside = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(src|href)=[\"'](?!data:)", outside)
    for advice in measured[1].advice:
        assert advice.text.split(" (")[0][1:] in outside.replace("&#39;", "'")
    for figure in ("pairs_cosine", "map_conflict", "norms", "shares"):
        assert f'<figure id="{figure}">' in text
