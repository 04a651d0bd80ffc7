"""Building a zoo: refusals at once; and, slowly, that the tiny one is deterministic and behaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.errors import UserError
from evomerge.zoo import ZooCard, build_zoo


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
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    arguments: dict[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        build_zoo(tmp_path / "zoo", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "zoo").exists()


def test_a_folder_without_a_card_is_no_zoo(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a finished zoo"):
        ZooCard.load(tmp_path)


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
    assert {path.name for path in (tmp_path / "first").iterdir()} == {*first.models, "zoo.json"}
    assert lines[0].startswith("base: training")
    base = first.models["base"]
    for name in ("reverse", "upper", "add"):
        model = first.models[name]
        assert model.accuracy[name] >= base.accuracy[name] + 0.3
        assert model.text_perplexity <= 1.1 * base.text_perplexity
