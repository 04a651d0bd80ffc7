"""The guides: their commands and scripts are run, and the notebook is executed."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MAIN = "from evomerge.cli import main\nif __name__ == '__main__':\n    main()\n"


def checkout(folder: Path, zoo: Path | None = None) -> None:
    """Make a folder look like the repository's: examples and the demo's models, or those of another zoo."""
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "evomerge" / "zoo").mkdir(parents=True)
    (folder / "evomerge" / "zoo" / "demo").symlink_to(zoo or ROOT / "evomerge" / "zoo" / "demo")


def blocks(page: str, *languages: str) -> list[tuple[str, str]]:
    """Return the code blocks of a page in these languages, in their order: (language, text)."""
    found = re.findall(r"```(\w+)\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    return [(language, text) for language, text in found if language in languages]


def execute(command: list[str], folder: Path) -> str:
    """Run a command of a reader in a folder, with this Python and this evomerge; return what it prints."""
    paths = os.pathsep.join(map(str, (ROOT, folder)))
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "80"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def shell(line: str, folder: Path) -> str:
    """Run a line that calls python or evomerge."""
    (folder / "run_evomerge.py").write_text(MAIN)
    program, *words = shlex.split(line)
    if program == "evomerge":
        return execute([sys.executable, "run_evomerge.py", *words], folder)
    assert program == "python", line
    return execute([sys.executable, *words], folder)


def lines(text: str) -> list[str]:
    """Return the commands of a block; those that end in a backslash go on in the next line."""
    joined = text.replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in joined.splitlines() if line.strip()]


def saved(text: str, folder: Path) -> bool:
    """Save a block that begins with `# NAME.py`; return whether it does."""
    name = re.match(r"# (\w+\.py)\n", text)
    if name is not None:
        (folder / name[1]).write_text(text)
    return name is not None


def on_few_items(text: str) -> str:
    """Replace the numbers of items of a guide by small ones."""
    smaller, count = re.subn(
        r'"splits": \{"search": \d+, "select": \d+, "test": \d+\}',
        '"splits": {"search": 10, "select": 8, "test": 12}',
        text,
    )
    assert count == 1
    return smaller


@pytest.mark.end_to_end
def test_the_python_page(tiny_zoo: Path, tmp_path: Path) -> None:
    checkout(tmp_path, tiny_zoo)
    parts = [text for _, text in blocks("python.md", "python") if not saved(text, tmp_path)]
    (tmp_path / "page.py").write_text(on_few_items("\n".join(parts)))
    printed = execute([sys.executable, "page.py"], tmp_path)
    assert "same bits as scored: True" in printed
    assert "task_arithmetic" in printed  # the error names the nearest space
    assert (tmp_path / "merged" / "model.safetensors").exists()
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "again")]
    assert same[0] == same[1]


NOTEBOOK = """
import sys, nbclient, nbformat
book = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(book, timeout=600, kernel_name="python3").execute()
last = book.cells[-1].outputs[-1]
print(last["data"]["text/plain"])
"""


@pytest.mark.slow  # the calls of the Python page, run above; a kernel takes a while to start
def test_the_notebook(tiny_zoo: Path, tmp_path: Path) -> None:
    checkout(tmp_path, tiny_zoo)
    book = json.loads((DOCS / "notebook.ipynb").read_text())
    for cell in book["cells"]:
        if any('"splits"' in line for line in cell["source"]):
            cell["source"] = on_few_items("".join(cell["source"]))
    (tmp_path / "notebook.ipynb").write_text(json.dumps(book))
    printed = execute([sys.executable, "-c", NOTEBOOK, "notebook.ipynb"], tmp_path)
    assert "upper c a t s =" in printed
    assert (tmp_path / "runs" / "notebook-model" / "model.safetensors").exists()


def test_the_notebook_calls_what_the_python_page_calls() -> None:
    cells = json.loads((DOCS / "notebook.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    page = "\n".join(text for _, text in blocks("python.md", "python"))
    assert calls(code) - calls(page) == set()
    assert {name for name, _ in calls(code)} >= {"evomerge.optimize", "run.report", "run.export"}


def calls(code: str) -> set[tuple[str, frozenset[str]]]:
    """Return what some code calls of `evomerge` and of `run`, with the keywords."""
    return {
        (
            f"{called.value.id}.{called.attr}",
            frozenset(word.arg or "" for word in node.keywords) - {"callbacks"},
        )
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call)
        and isinstance(called := node.func, ast.Attribute)
        and isinstance(called.value, ast.Name)
        and called.value.id in ("evomerge", "run")
    }


def test_the_notebook_has_no_stored_outputs() -> None:
    cells = json.loads((DOCS / "notebook.ipynb").read_text())["cells"]
    assert [cell["outputs"] for cell in cells if cell.get("outputs")] == []


def test_the_python_page_names_every_function() -> None:
    import evomerge

    page = (DOCS / "python.md").read_text()
    missing = [name for name in evomerge.__all__ if name[0] != "_" and f"{name}" not in page]
    assert missing == []


# Tutorial and recording ------------------------------------------------------------------------------


FEWER = {
    r"--evaluations \d\d\b": "--evaluations 6",
    r"--evaluations \d\d\d": "--evaluations 8",
    r"^(evomerge run run.yaml)$": r"\1 --evaluations 6",
}
"""Budgets of the guides -> those of the tests."""


def follow(commands: list[str], folder: Path) -> str:
    """Run the commands of a guide one after the other, with small budgets; return what they print."""
    for pattern, smaller in FEWER.items():
        commands = [re.sub(pattern, smaller, command) for command in commands]
    return "\n".join(shell(command, folder) for command in commands)


@pytest.mark.slow
def test_the_tutorial(tmp_path: Path) -> None:
    checkout(tmp_path)
    text = (DOCS / "tutorial.md").read_text()
    scripts = re.findall(r"this as `(\w+\.py)`(?:(?!```).)*```python\n(.*?)```", text, flags=re.DOTALL)
    assert [name for name, _ in scripts] == ["data.py", "train.py", "ask.py"]
    for name, script in scripts:
        (tmp_path / name).write_text(script)
    printed = follow([line for _, block in blocks("tutorial.md", "bash") for line in lines(block)], tmp_path)
    assert "over the best baseline" in " ".join(printed.split())
    assert "upper k b d a q e = K B D A Q E" in printed
    assert (tmp_path / "merged" / "README.md").exists()


@pytest.mark.slow
def test_the_recording(tmp_path: Path) -> None:
    checkout(tmp_path)
    commands = [line for _, block in blocks("recording.md", "bash") for line in lines(block)]
    clone, install, *ours = commands
    assert clone.startswith("git clone ")
    assert install.endswith("pip install -q -c constraints.txt .")
    assert len(ours) == 3
    printed = follow(ours, tmp_path)
    assert "over the best baseline" in " ".join(printed.split())
    assert (tmp_path / "merged" / "model.safetensors").exists()


# Clusters -------------------------------------------------------------------------------------------


SCRIPTS = [text for _, text in blocks("clusters.md", "bash")]


@pytest.mark.parametrize("script", SCRIPTS, ids=["one node", "seeds", "ray"])
def test_the_syntax_of_cluster_scripts(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


STAND_INS = {
    "evomerge": 'trap "echo stored; exit 143" TERM; echo "$@" > started; while true; do sleep 0.05; done',
    "scontrol": 'echo "$@" >> requeued',
}


def test_the_slurm_script_passes_sigterm_on_and_queues_itself_again(tmp_path: Path) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f"PATH={tmp_path}:$PATH\n")
    for name, script in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "merge.sbatch").write_text(SCRIPTS[0])
    environment = {**os.environ, "SLURM_JOB_ID": "17"}
    command = ["bash", "merge.sbatch"]
    job = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        while not (tmp_path / "started").exists():
            assert job.poll() is None
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        output, _ = job.communicate(timeout=60)
    except BaseException:
        os.killpg(job.pid, signal.SIGKILL)
        job.communicate()
        raise
    assert job.returncode == 143
    assert output == b"stored\n"
    assert (tmp_path / "started").read_text() == "run run.yaml\n"
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"


def test_a_finished_slurm_job_is_not_queued_again(tmp_path: Path) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f"PATH={tmp_path}:$PATH\n")
    for name, script in {**STAND_INS, "evomerge": "exit 2"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(["bash", "-c", SCRIPTS[0]], cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert not (tmp_path / "requeued").exists()


# Comparison -----------------------------------------------------------------------------------------


def test_every_cell_of_the_comparison_has_a_source() -> None:
    page = (DOCS / "compare.md").read_text()
    rows = [line.strip("|").split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 12
    named = set(re.findall(r"^\[([\w-]+)\]: https://", page, flags=re.MULTILINE))
    for first, *cells in rows:
        assert len(cells) == 6, first
        for cell in cells:
            sources = re.findall(r"\]\[([\w-]+)\]", cell)
            assert sources or re.search(r"\]\(\w+\.md(#[\w-]+)?\)", cell), f"{first}: {cell}"
            assert set(sources) <= named, f"{first}: {cell}"
    used = set(re.findall(r"\]\[([\w-]+)\]", page))
    assert used == named


# The repository's page -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bug", "question"])
def test_issue_forms_have_what_github_demands(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert {"name", "description", "body"} <= form.keys()
    parts = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in parts}) == len(parts)
    assert all(part["attributes"]["label"] for part in parts)
    pages = re.findall(r"\b((?:docs/)?\w+\.md)\b", str(form))
    assert [page for page in pages if not (ROOT / page).is_file()] == []


def test_links_of_the_issue_chooser_are_those_of_the_project() -> None:
    links = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml").read_text())["contact_links"]
    assert all(link["url"].startswith(f"{repository()}/") for link in links)


def repository() -> str:
    """Return the address of the repository, without a slash at its end."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    return str(urls["Repository"])


def test_the_readme_works_on_a_package_s_page() -> None:
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert [target for target in targets if not target.startswith("https://")] == []
    raw = repository().replace("https://github.com", "https://raw.githubusercontent.com")
    for target in targets:
        place = target.split("#")[0].removeprefix(f"{repository()}/blob/main/").removeprefix(f"{raw}/main/")
        assert place.startswith("https://") or (ROOT / place).is_file(), target


def test_the_python_code_of_the_readme_is_python() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    names = {node.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)}
    assert names == {"optimize", "report", "export"}
