"""Code in a model's folder: never imported, and never asked about in the middle of a run."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest

from evomerge.errors import ModelError
from evomerge.merging.live.stacked_models import build
from evomerge.merging.sources.opening import open_source
from evomerge.merging.sources.vocabulary import open_tokenizer

CODE = "from pathlib import Path\nPath(__file__).with_name('imported').touch()\nraise SystemExit\n"


@pytest.fixture
def folder(tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder with code, in a process whose user would answer yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    copy = Path(shutil.copytree(tiny_zoo / "base", tmp_path / "model"))
    (copy / "own.py").write_text(CODE)
    return copy


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_code_of_a_model_is_refused(folder: Path, tmp_path: Path) -> None:
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    change(folder / "config.json", auto_map=names, model_type="own_kind")
    source = open_source(str(folder))
    with pytest.raises(ModelError):
        build(source, source.config, "float32", None)
    assert not list(tmp_path.rglob("imported"))


def test_a_tokenizer_s_code_is_not_used(folder: Path, tmp_path: Path) -> None:
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]})
    with contextlib.suppress(ModelError):
        open_tokenizer(open_source(str(folder)))
    assert not list(tmp_path.rglob("imported"))
