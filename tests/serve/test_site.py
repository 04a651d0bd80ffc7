"""The served pages: addresses, headers, refusals, and events while a run goes on."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from evomerge import compose
from evomerge.api import live
from evomerge.config import RunConfig
from evomerge.errors import ConfigError
from evomerge.running.observers import Observer
from evomerge.serve import pages, server, site
from evomerge.serve.guard import Guard
from tests.serve.conftest import Serve

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDTHS = (1280, 768, 390)


@pytest.fixture(scope="module")
def folder(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs and one whose store is damaged."""
    place = tmp_path_factory.mktemp("served")
    for name in ("first", "deep/second"):
        shutil.copytree(finished_run, place / name)
    (place / "broken").mkdir()
    (place / "broken" / "run.sqlite").write_bytes(b"not a store" * 20)
    return place


def numbers(client: httpx.Client) -> dict[str, int]:
    """Return the name of each run that the index links, with its number."""
    found = re.findall(r'href="/run/(\d+)">([^<]*)<', client.get("/").text)
    return {name: int(number) for number, name in found}


@pytest.mark.end_to_end
def test_all_pages_of_a_folder(folder: Path, serve: Serve) -> None:
    client, _ = serve(folder)
    index = client.get("/")
    assert index.status_code == 200
    assert "the file is" in index.text or "not an SQLite database" in index.text
    found = numbers(client)
    assert sorted(found) == ["deep/second", "first"]
    run = f"/run/{found['first']}"
    report = client.get(run)
    assert report.status_code == 200
    linked = set(re.findall(rf'href="({run}/candidate/[0-9a-f]{{12}})"', report.text))
    assert len(linked) >= 5
    listed = client.get(f"{run}/candidates")
    linked |= set(re.findall(rf'href="({run}/candidate/[0-9a-f]{{12}})"', listed.text))
    for address in linked:
        page = client.get(address)
        assert page.status_code == 200
        assert "recipe.yaml" in page.text
    items = client.get(f"{run}/candidate/winner?task=demo_upper")
    assert "40 of 40 items" in items.text


@pytest.mark.parametrize(
    "address",
    [
        "/run/99",
        "/run/-1",
        "/run/0/candidate/nothing",
        "/run/0/candidate/winner?task=nothing",
        "/run/0/candidate/..%2f..%2f..%2fetc%2fpasswd",
        "/run/..%2f..%2fetc",
        "/..%2f..%2fetc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/run.sqlite",
        "/run/99/events",
        "/run/99/candidates",
        f"/run/{10**30}",
    ],
)
def test_what_is_not_there_is_not_found(folder: Path, serve: Serve, address: str) -> None:
    client, _ = serve(folder / "first")
    answer = client.get(address)
    assert answer.status_code == 404, answer.text
    assert "Traceback" not in answer.text


def test_a_run_that_cannot_be_read_says_why(folder: Path, serve: Serve) -> None:
    client, _ = serve(folder / "broken")
    answer = client.get("/run/0")
    assert answer.status_code == 503
    assert "not an SQLite database" in answer.text


def test_without_the_token_nothing_is_answered(folder: Path, serve: Serve) -> None:
    _, guard = serve(folder / "first")
    with httpx.Client(base_url=f"http://127.0.0.1:{guard.port}") as stranger:
        for address in ("/", "/run/0", "/events", "/run/0/events", "/nothing", "/?token=wrong"):
            answer = stranger.get(address)
            assert answer.status_code == 403
            assert "set-cookie" not in answer.headers
            assert answer.headers["x-frame-options"] == "DENY"
        foreign = stranger.get(f"/?token={guard.token}", headers={"Host": "example.com"})
        assert foreign.status_code == 403
        assert "set-cookie" not in foreign.headers
        known = stranger.get(f"/?token={guard.token}")
        assert known.status_code == 200
        assert stranger.get("/run/0").status_code == 200  # with the cookie
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert stranger.request(method, "/").status_code == 405


def test_every_response_has_the_headers_that_protect_it(folder: Path, serve: Serve) -> None:
    client, _ = serve(folder / "first")
    for address in ("/", "/run/0", "/nothing", "/run/0/candidates"):
        headers = client.get(address).headers
        assert headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert "server" not in headers


def test_only_this_machine_can_connect(folder: Path) -> None:
    with server.listening(0) as bound:
        assert bound.getsockname()[0] == "127.0.0.1"
        with pytest.raises(ConfigError, match="can't listen there"):
            live.serve([folder], port=bound.getsockname()[1])


def test_a_run_that_begins_later_appears(
    finished_run: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "PAUSE", 0.0)
    client, _ = serve(tmp_path)
    assert "No runs yet" in client.get("/").text
    shutil.copytree(finished_run, tmp_path / "later")
    assert list(numbers(client)) == ["later"]
    shutil.rmtree(tmp_path / "later")
    assert "No runs yet" in client.get("/").text
    assert client.get("/run/0").status_code == 404


class Held(Observer):
    """Stops a run after its first generation until `go` is set."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def generation_done(self, generation: int, evaluations: float, best: float) -> None:
        if generation == 0:
            self.begun.set()
            assert self.go.wait(300)


@pytest.fixture
def running(
    config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, Held, threading.Thread]]:
    """A run that goes on in a thread, held after its first generation."""
    for name in ("PAUSE", "SHARE"):
        monkeypatch.setattr(pages, name, 0.0)
    monkeypatch.setattr(site, "EVERY", 0.05)
    path, held = config(generate=False), Held()
    thread = threading.Thread(target=compose.start, args=(RunConfig.load(path), held))
    thread.start()
    assert held.begun.wait(300)
    yield path.parent / "run", held, thread
    held.go.set()
    thread.join(300)


@pytest.mark.end_to_end
def test_events_follow_a_run(running: tuple[Path, Held, threading.Thread], serve: Serve) -> None:
    folder, held, thread = running
    client, _ = serve(folder)
    before = client.get("/run/0").text
    assert "The run is going on" in before
    assert '<span class="tag running">' in client.get("/").text
    with client.stream("GET", "/run/0/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        stamps = (line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data"))
        first = next(stamps)
        assert f'data-stamp="{first}"' in before
        held.go.set()
        assert next(stamps) != first
    thread.join(300)
    after = client.get("/run/0").text
    assert "The run is going on" not in after
    assert '<span class="tag finished">' in after


@pytest.mark.end_to_end
def test_watch_ends_with_the_run(running: tuple[Path, Held, threading.Thread]) -> None:
    folder, held, thread = running
    states: list[str] = []

    def show(view: live.View) -> None:
        states.append(view.data["state"])
        held.go.set()

    view = live.watch(folder, show, sleep=lambda seconds: thread.join(seconds))
    assert states[0] == "running"
    assert states[-1] == view.data["state"] == "finished"
    assert "search" in view.text()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens served pages; at the end no script has failed, and nothing was asked of another server."""
    contexts, wrong, asked = [], [], []

    def open_page(guard: Guard, address: str, scheme: str = "light") -> Page:
        context = browser.new_context(color_scheme=scheme)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda sent: asked.append(sent.url))
        page.goto(f"http://127.0.0.1:{guard.port}{address}?token={guard.token}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:"))] == []


@pytest.mark.end_to_end
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_every_width_and_axe_finds_nothing(
    folder: Path, serve: Serve, opened: Callable[..., Page], scheme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    client, guard = serve(folder)
    run = f"/run/{numbers(client)['first']}"
    for address in ("/", run, f"{run}/candidates", f"{run}/candidate/winner"):
        page = opened(guard, address, scheme)
        assert "token" not in page.url
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()


@pytest.mark.end_to_end
def test_an_open_page_follows_the_run(
    running: tuple[Path, Held, threading.Thread], serve: Serve, opened: Callable[..., Page]
) -> None:
    folder, held, thread = running
    _, guard = serve(folder)
    page = opened(guard, "/run/0")
    assert "The run is going on" in page.locator(".verdict").inner_text()
    page.locator("summary", has_text="Run config").click()
    page.locator("#candidates .wide [data-i]").last.click(force=True)
    page.get_by_role("link", name="Recipe, scores and items").wait_for()
    page.evaluate("window.stays = true")
    held.go.set()
    thread.join(300)
    page.locator("section.verdict ul.tasks").wait_for(timeout=60_000)
    assert page.evaluate("window.stays")  # the page was not loaded again
    assert page.locator("dialog").is_visible()
    opened_parts = page.locator("details[open] > summary").all_inner_texts()
    assert opened_parts == ["Run config"]
    assert page.locator("#state").inner_text() == "finished"
    page.get_by_role("link", name="Recipe, scores and items").click()
    page.get_by_role("heading", name=re.compile("^Candidate ")).wait_for()


@pytest.mark.end_to_end
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_ends_the_command_with_a_stream_open(folder: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", "from evomerge.cli import main; main()", "serve", str(folder), "-q"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        with httpx.Client(timeout=60) as client:
            assert client.get(address).status_code == 200
            with client.stream("GET", address.replace("/?", "/events?")) as stream:
                assert next(stream.iter_lines()).startswith("data: ")
                process.send_signal(number)
                out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "", "")


def test_the_port_of_an_ended_server_is_free_again(folder: Path) -> None:
    with server.listening(0) as bound:
        port = bound.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            bound.accept()[0].close()
    server.listening(port).close()
