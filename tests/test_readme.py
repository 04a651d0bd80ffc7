"""The commands of README and CONTRIBUTING work, the examples are valid, and the file tree is complete."""

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

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GETTING_STARTED = (ROOT / "docs" / "getting_started.md").read_text()
OWN_MODELS = (ROOT / "docs" / "your_models.md").read_text()
ANALYSIS = (ROOT / "docs" / "analyze.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
INSTALL = [
    "python3 -m venv .venv",
    ". .venv/bin/activate",
    "pip install -c constraints.txt .",
    "evomerge demo",
]
SMALLER = {
    "evomerge run evomerge/zoo/demo.yaml": "evomerge run evomerge/zoo/demo.yaml --evaluations 4",
    "evomerge resume runs/demo --evaluations 150": "evomerge resume runs/demo --evaluations 6",
    "evomerge evaluate merged --suite demo": "evomerge evaluate merged --suite evomerge/zoo/few.yaml",
}
"""Commands that are run with a smaller budget, or on fewer items, than a reader would."""
SLOW = ("evomerge zoo build", "evomerge demo", "make")
"""Commands with tests of their own: the slow tests (tests/zoo, and below), and make's targets."""


def commands(text: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def run(command: str) -> str:
    words = shlex.split(command)
    if words[0] == "printf":
        subprocess.run(["bash", "-c", command], check=True)
        return ""
    assert words[0] == "evomerge"
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, f"{command}\n{result.output}"
    return result.output


def demo_on_few_items(folder: Path) -> None:
    """Write the demo's run config, on its models, with few items and baselines, without worker processes."""
    folder.mkdir(parents=True)
    (folder / "demo").symlink_to(ROOT / "evomerge" / "zoo" / "demo")
    config = (ROOT / "evomerge" / "zoo" / "demo.yaml").read_text()
    assert "\nsuite: demo " in config
    config = config.replace("\nsuite: demo ", "\nsuite: few.yaml ")
    less = "baselines: [TIES]\nwarm_start: {gradients: false}\nexecutor: {name: inline, threads: 1}\n"
    (folder / "demo.yaml").write_text(config + less)
    suite = yaml.safe_load((ROOT / "benchmarks" / "suites" / "demo.yaml").read_text())
    few = {"search": 12, "select": 8, "test": 16}
    for task in suite["tasks"]:
        task["splits"] = {split: few[split] for split in task["splits"]}
    suite["tasks_dir"] = str(ROOT / "benchmarks" / "tasks" / "demo")
    (folder / "few.yaml").write_text(yaml.safe_dump(suite))


def test_the_readme_is_short_and_starts_with_the_installation() -> None:
    assert len(README.splitlines()) <= 200
    assert commands(README)[: len(INSTALL)] == INSTALL
    assert (ROOT / "constraints.txt").is_file()
    assert commands(GETTING_STARTED)[: len(INSTALL)] == INSTALL


@pytest.mark.end_to_end
def test_the_commands_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    demo_on_few_items(tmp_path / "evomerge" / "zoo")
    listed = [c for c in commands(README)[len(INSTALL) :] if not c.startswith(SLOW)]
    assert len(listed) == 21
    output = {command: run(SMALLER.get(command, command)) for command in listed}
    assert "search" in output["evomerge run evomerge/zoo/demo.yaml"]
    assert (tmp_path / "merged" / "README.md").exists()
    shown = ANALYSIS[ANALYSIS.index("```\n pair ") :][4:]
    shown = shown[: shown.index("\n```")].replace("...\n", "").splitlines()
    printed = [line.rstrip() for line in output["evomerge analyze evomerge/zoo/demo.yaml"].splitlines()]
    assert [line for line in shown if line not in printed] == []
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "again")]
    assert same[0] == same[1]
    assert "rank 16, captures" in output["evomerge export runs/demo small --as adapter --rank 16"]
    assert (tmp_path / "small" / "adapter_model.safetensors").exists()
    assert (tmp_path / "merge.yaml").exists()
    assert (tmp_path / "merged.fisher").exists()


@pytest.mark.slow
def test_the_demo_and_the_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "it scores the same on every test item" in " ".join(run("evomerge demo --evaluations 45").split())
    assert "evomerge zoo build my-zoo --seed 3" in commands(README)
    run("evomerge zoo build my-zoo --seed 3 --tiny")
    assert (tmp_path / "my-zoo" / "zoo.json").exists()


@pytest.mark.slow
def test_other_zoos_and_their_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    *zoos, merge = commands(GETTING_STARTED)[len(INSTALL) :]
    for build in zoos:
        run(f"{build} --tiny")
    assert merge == "evomerge run zoo-a/run.yaml"
    run(f"{merge} --evaluations 4")
    assert (tmp_path / "runs" / "zoo-llama-11").is_dir()
    run("evomerge check zoo-b/run.yaml")


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_make_has_the_targets_that_are_named() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    named = {c for c in commands(contributing) if c.startswith("make")}
    named |= set(re.findall(r"`(make [a-z-]+)`", README + contributing))
    assert {"make demo", "make test", "make lint", "make docs"} <= named
    for command in named:
        done = subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [README, OWN_MODELS], ids=["README", "your_models"])
def test_the_example_config_and_suite_are_valid(page: str, tmp_path: Path) -> None:
    config, suite, *_ = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "config.yaml").write_text(config)
    (tmp_path / "suite.yaml").write_text(suite)
    loaded = RunConfig.load(tmp_path / "config.yaml")
    assert loaded.models.base == "mistralai/Mistral-7B-v0.1"
    assert loaded.models.sources.get("chat", "") in ("", str(tmp_path / "checkpoints" / "chat"))
    found = Suite.load(tmp_path / "suite.yaml")
    named = {task.specialist for task in found.tasks if task.specialist}
    assert named <= set(yaml.safe_load(config)["models"]["sources"])
    lines = [line for line in config.splitlines() if line.strip() and not line.startswith("#")]
    assert page != README or len(lines) <= 10


def test_the_file_tree_names_every_file_of_the_package() -> None:
    tree = ARCHITECTURE[ARCHITECTURE.index("```text\nevomerge/\n") :]
    tree = tree[: tree.index("\nsearch_spaces/")]
    listed, rooms = set(), [""]
    for indent, name in re.findall(r"^((?:  )+)([\w.]+/?)\s+\S", tree, flags=re.MULTILINE):
        del rooms[len(indent) // 2 :]
        if name.endswith("/"):
            rooms.append(rooms[-1] + name)
        else:
            listed.add(rooms[-1] + name)
    package = ROOT / "evomerge"
    there = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*")
        if path.suffix in (".py", ".c", ".jinja", ".css", ".js") and not path.name.startswith("__")
    }
    assert listed - {"zoo/demo.yaml"} == there
