"""The documentation: references are fresh, every page is reachable, links and quoted messages are real."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    *sorted(DOCS.glob("*.md")),
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "runs/README.md")
    ),
]
NAMED = [f"{page.parent.name}/{page.name}" if page.parent != ROOT else page.name for page in PAGES]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["config.md", "commands.md", "methods.md"])
def test_generated_pages_are_fresh(page: str) -> None:
    stale = f"{page} is stale: python docs/generate.py"
    assert (DOCS / page).read_text() == generator().pages()[page], stale


def test_the_config_reference_has_every_model_of_a_user_s_file() -> None:
    from evomerge.schema import Strict

    tool = generator()
    for page in (tool.config_page, tool.commands_page):
        page()  # imports all that are listed
    listed = {
        tool.place(model)
        for part in (tool.RUN_CONFIG, tool.SUITE, tool.SPACE, tool.GATE)
        for _, model, _ in part
    }

    def subclasses(model: type[Any]) -> Iterator[type[Any]]:
        for each in model.__subclasses__():
            yield each
            yield from subclasses(each)

    ours = {model for model in subclasses(Strict) if model.__module__.startswith("evomerge.")}
    ours = {model for model in ours if not model.__module__.startswith("evomerge.delivery.convert.")}
    assert ours - listed == set()


def site() -> dict[str, Any]:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert isinstance(config, dict)
    return config


def outside() -> dict[str, str]:
    """The pages from other folders, as docs/hooks.py adds them; read without MkDocs."""
    tree = ast.parse((DOCS / "hooks.py").read_text())
    (found,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "OUTSIDE"
    )
    value = ast.literal_eval(found)
    assert isinstance(value, dict)
    return value


def in_nav(part: Any) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    for each in part if isinstance(part, list) else part.values() if isinstance(part, dict) else ():
        yield from in_nav(each)


def test_every_page_is_in_the_navigation() -> None:
    there = {page.name for page in DOCS.glob("*.md")} | set(outside())
    assert sorted(in_nav(site()["nav"])) == sorted(there)
    assert all((ROOT / place).is_file() for place in outside().values())


def test_every_page_is_linked_from_the_index() -> None:
    linked = set(re.findall(r"\]\(([^)#]+\.md)", (DOCS / "index.md").read_text()))
    there = {page.name for page in DOCS.glob("*.md")} - {"index.md"}
    assert there | {f"../{place}" for place in outside().values()} == linked


@pytest.mark.parametrize("page", PAGES, ids=NAMED)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_site_loads_nothing_from_other_servers() -> None:
    assert site()["theme"]["font"] is False
    assert not {"extra_css", "extra_javascript"} & site().keys()


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="MkDocs is not installed")
def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "troubleshooting.html").exists()


def texts_of_the_code() -> list[str]:
    """Every string of the package; what an f-string fills in is a line feed."""
    found: list[str] = []
    for path in (ROOT / "evomerge").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\n" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def messages() -> list[str]:
    """What the troubleshooting page quotes: code that starts a row or a paragraph."""
    text = (DOCS / "troubleshooting.md").read_text()
    quoted = re.findall(r"(?:\n\| |\n\n)`([^`]+)`", text)
    return [message for message in quoted if "evomerge " not in message]


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    texts = texts_of_the_code()
    assert len(messages()) > 35
    for message in messages():
        parts = [part.strip(" :") for part in message.split("...") if len(part.strip(" :")) > 3]
        assert parts, message
        for part in parts:
            assert any(part in text for text in texts), f"{message!r}: no text of the code has {part!r}"


def test_every_command_of_the_pages_exists() -> None:
    known = {name for name, _ in generator().commands(generator().place(generator().CLI))}
    for page in PAGES:
        for words in re.findall(r"`evomerge ([a-z]+(?: [a-z]+)?)", page.read_text()):
            first, *second = words.split()
            assert f"evomerge {first}" in known or f"evomerge {words}" in known, (
                f"{page.name}: {words} {second}"
            )


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_make_docs_is_a_target() -> None:
    done = subprocess.run(shlex.split("make -n docs"), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mkdocs build" in done.stdout


def test_the_floors_of_the_architecture_page_are_the_contracts() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    page = (DOCS / "architecture.md").read_text()
    for contract in contracts:
        if contract["type"] == "layers":
            room = contract["containers"][0].replace(".", "/")
            floors = " / ".join(floor.replace(" |", ",") for floor in contract["layers"])
            assert f"{room}:  {floors}" in page
