"""The guides: their commands and scripts are run, and the notebook is executed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "COLUMNS": "80"}
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


def test_the_python_page(tiny_zoo: Path, tmp_path: Path) -> None:
    checkout(tmp_path, tiny_zoo)
    parts = [text for _, text in blocks("python.md", "python") if not saved(text, tmp_path)]
    (tmp_path / "page.py").write_text("\n".join(parts))
    printed = execute([sys.executable, "page.py"], tmp_path)
    assert "same bits as scored: True" in printed
    assert "task_arithmetic" in printed  # the error names the nearest space
    assert (tmp_path / "merged" / "model.safetensors").exists()
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "again")]
    assert same[0] == same[1]


def test_the_python_page_names_every_function() -> None:
    import evomerge

    page = (DOCS / "python.md").read_text()
    missing = [name for name in evomerge.__all__ if name[0] != "_" and f"{name}" not in page]
    assert missing == []
