"""Control characters and secrets in text, and the console through which all of it is printed."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from evomerge.cli.terminal import SafeConsole
from evomerge.errors import ConfigError, UserError
from evomerge.text import holds_secret, one_line, printable, redacted

PLAIN = "Größe, 漢字, 😀, 👨\u200d👩, a\tb\nc"
SECRETS = [
    "https://ann:s3cret@host/path",
    "https://s3cret@host",
    "redis://:s3cret@host:6379/0",
    "https://ann:s3c@ret@host",
    "https://ann:s3c/ret@host",
    "postgresql+psycopg2://ann:s3cret@host:5432/db?sslmode=require",
    "https://host/?token=s3cret",
    "https://host/x?page=1&api_key=s3cret&size=2",
    "https://host/x?X-Amz-Signature=s3cret",
    "https://host/x?access_token=s3cret#end",
    "mysql://host/db?user=a;password=s3cret",
]
HARMLESS = [
    "models/llama",
    "org/model",
    "sqlite:////runs/demo/mlflow.db",
    "http://localhost:5000",
    "http://localhost:5000/#/a@b",
    "someone@example.org",
    "https://host/x?page=2&tokens=512",
    "https://ann:${PASSWORD}@host",
    "https://${TOKEN}@host/?key=${KEY}",
    "https://***@host/?key=***",
]


@given(st.text(st.characters(exclude_categories=())))
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    shown = printable(text)
    shown.encode()
    kinds = {unicodedata.category(each) for each in shown} - {"Cf"}
    assert not kinds & {"Cs", "Zl", "Zp"}
    assert not any(unicodedata.category(each) == "Cc" and each not in "\n\t" for each in shown)
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\ufeff")
    assert "\n" not in one_line(text)
    assert printable(shown) == shown


def test_ordinary_text_stays() -> None:
    assert printable(PLAIN) == PLAIN


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_recognised_and_hidden(text: str) -> None:
    assert holds_secret(text)
    hidden = redacted(f"can't reach {text}, tried twice")
    assert redacted(hidden) == hidden
    assert "s3c" not in hidden
    assert "ret@" not in hidden
    assert hidden.startswith("can't reach ")


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_addresses_hold_none(text: str) -> None:
    assert not holds_secret(text)


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_text_is_not_changed(text: str) -> None:
    assert redacted(text) == text


def test_errors_hold_no_secrets() -> None:
    error = ConfigError("x https://a:s3cret@h", expected="y", got="https://a:s3cret@h", fix="?token=s3cret")
    assert isinstance(error, UserError)
    assert "s3cret" not in repr(vars(error)) + str(error)


def printed(*things: object) -> str:
    file = io.StringIO()
    console = SafeConsole(file=file, width=100, force_terminal=True, color_system="standard")
    for thing in things:
        console.print(thing, style="red")
    return file.getvalue()


def test_names_are_printed_without_their_control_codes_and_markup() -> None:
    name = "\x1b]0;title\x07[bold]na\x9b1mme[/bold] :warning: \udc80 \u202e"
    table = Table(name, title=name, caption=name)
    table.add_row(name)
    text = printed(name, Text(name), table)
    assert text.count("[bold]") == 6
    assert text.count(":warning:") == 6
    assert "\x1b[31m" in text  # the console's own colours
    for forbidden in ("\x1b]", "\x07", "\x9b", "\u202e", "\udc80"):
        assert forbidden not in text
    text.encode()


def test_addresses_are_printed_without_secrets() -> None:
    assert "s3cret" not in printed("https://ann:s3cret@host", Text("https://ann:s3cret@host"))
