"""Every command in README and CONTRIBUTING is run, its example files are valid, and its file tree is true."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from evomerge.cli import app
from evomerge.config import RunConfig
from evomerge.evaluation.suite import Suite
from evomerge.merging.methods.declaration import markdown

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALLER = {
    "evomerge run evomerge/zoo/demo.yaml": "evomerge run evomerge/zoo/demo.yaml --evaluations 4",
    "evomerge resume runs/demo --evaluations 150": "evomerge resume runs/demo --evaluations 6",
}
"""Commands that are run with a smaller budget than a reader would."""
SLOW = ("evomerge zoo build", "evomerge demo", "make")
"""Commands with tests of their own: the slow tests (tests/zoo, and below), and make's targets."""


def commands(text: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def run(command: str) -> str:
    words = shlex.split(command)
    assert words[0] == "evomerge"
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, f"{command}\n{result.output}"
    return result.output


def demo_on_few_items(folder: Path) -> None:
    """Write the demo's run config, on its models, with a suite of a tenth of its items."""
    folder.mkdir(parents=True)
    (folder / "demo").symlink_to(ROOT / "evomerge" / "zoo" / "demo")
    config = (ROOT / "evomerge" / "zoo" / "demo.yaml").read_text()
    assert "\nsuite: demo " in config
    (folder / "demo.yaml").write_text(config.replace("\nsuite: demo ", "\nsuite: few.yaml "))
    suite = yaml.safe_load((ROOT / "benchmarks" / "suites" / "demo.yaml").read_text())
    few = {"search": 32, "select": 24, "test": 48}
    for task in suite["tasks"]:
        task["splits"] = {split: few[split] for split in task["splits"]}
    suite["tasks_dir"] = str(ROOT / "benchmarks" / "tasks" / "demo")
    (folder / "few.yaml").write_text(yaml.safe_dump(suite))


def test_the_commands_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    demo_on_few_items(tmp_path / "evomerge" / "zoo")
    listed = [c for c in commands(README) if not c.startswith(SLOW)]
    assert len(listed) == 18
    (tmp_path / "text.txt").write_text("the cat is old .\nthe dog is here .\n")
    output = {command: run(SMALLER.get(command, command)) for command in listed}
    assert "search" in output["evomerge run evomerge/zoo/demo.yaml"]
    assert (tmp_path / "merged" / "README.md").exists()
    shown = README[README.index("```\n pair ") :][4:]
    shown = shown[: shown.index("\n```")].replace("...\n", "").splitlines()
    said = [line.rstrip() for line in output["evomerge analyze evomerge/zoo/demo.yaml"].splitlines()]
    assert [line for line in shown if line not in said] == []
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "again")]
    assert same[0] == same[1]
    assert "rank 16, captures" in output["evomerge export runs/demo small --as adapter --rank 16"]
    assert (tmp_path / "small" / "adapter_model.safetensors").exists()
    assert (tmp_path / "merge.yaml").exists()


@pytest.mark.slow
def test_the_demo_and_the_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "it scores the same on every test item" in " ".join(run("evomerge demo --evaluations 45").split())
    assert "evomerge zoo build my-zoo --seed 3" in commands(README)
    run("evomerge zoo build my-zoo --seed 3 --tiny")
    assert (tmp_path / "my-zoo" / "zoo.json").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_make_has_the_targets_that_are_named() -> None:
    named = {c for c in commands(README + (ROOT / "CONTRIBUTING.md").read_text()) if c.startswith("make")}
    assert {"make demo", "make test", "make lint"} <= named
    for command in named:
        done = subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_example_config_and_suite_are_valid(tmp_path: Path) -> None:
    config, suite = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "maths-code-med.yaml").write_text(config)
    (tmp_path / "suite.yaml").write_text(suite)
    loaded = RunConfig.load(tmp_path / "maths-code-med.yaml")
    assert loaded.models.base == "mistralai/Mistral-7B-v0.1"
    assert loaded.models.sources["chat"] == str(tmp_path / "checkpoints" / "chat")
    found = Suite.load(tmp_path / "suite.yaml")
    named = {task.specialist for task in found.tasks if task.specialist}
    assert named <= set(yaml.safe_load(config)["models"]["sources"])


def test_the_file_tree_names_every_file_of_the_package() -> None:
    tree = README[README.index("```\nevomerge/\n") :]
    tree = tree[: tree.index("\n```\n")]
    listed = set(re.findall(r"^\s+([\w.]+\.(?:py|c|jinja|yaml))\s+\S", tree, flags=re.MULTILINE))
    there = {
        path.name
        for path in (ROOT / "evomerge").rglob("*")
        if path.suffix in (".py", ".c", ".jinja") and not path.name.startswith("__")
    }
    assert listed - {"demo.yaml"} == there


def test_the_methods_page_is_what_the_declarations_say() -> None:
    assert (ROOT / "docs" / "methods.md").read_text() == markdown()
