"""What `export` does with a model folder after it is written: to llama.cpp, to the Hugging Face hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.cli.terminal import output
from evomerge.errors import ConfigError

if TYPE_CHECKING:
    from evomerge.api.runs import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOff:
    """The options. push: ORG/NAME, None for no upload. llama_cpp: the folder of llama.cpp."""

    push: str | None
    private: bool
    dry_run: bool
    gguf: bool
    llama_cpp: Path | None

    @property
    def asked(self) -> bool:
        """Whether there is anything to do."""
        return self.push is not None or self.gguf

    def check(self, form: str, out: Path) -> None:
        """Raise a UserError where it can't be done, before anything is written.

        Raises:
            ConfigError: options that need another one, or another form than a model.
            UserError: no one is logged in, or the GGUF file exists.
        """
        needs = (
            ("--private", self.private, "--push", self.push),
            ("--dry-run", self.dry_run, "--push", self.push),
            ("--llama-cpp", self.llama_cpp, "--gguf", self.gguf),
        )
        for option, given, other, there in needs:
            if given and not there:
                raise ConfigError(f"{option} is for {other}", fix=f"leave {option} out, or add {other}")
        if not self.asked:
            return
        if form != "model":
            option = "--push" if self.push is not None else "--gguf"
            raise ConfigError(
                f"{option} is for models", got=f"--as {form}", fix=f"leave {option} or --as out"
            )
        _show_progress_of_hub()
        from evomerge.api import runs

        if self.gguf:
            runs.check_gguf(out, llama_cpp=self.llama_cpp)
        if self.push is not None:
            runs.check_push(self.push, dry_run=self.dry_run)

    def carry_out(self, run: Run, folder: Path, pick: str, accept_difference: bool) -> dict[str, Any]:
        """Do it, say what was done, and return that as plain data.

        The upload is first: where it stops, the same command goes on with it.
        """
        from evomerge.api.runs import to_gguf

        data: dict[str, Any] = {}
        if self.push is not None:
            done = run.push(
                folder,
                self.push,
                private=self.private,
                dry_run=self.dry_run,
                pick=pick,
                accept_difference=accept_difference,
            )
            output.say(done.text)
            data["upload"] = done.as_data()
        if self.gguf:
            made = to_gguf(folder, llama_cpp=self.llama_cpp)
            output.say(made.text)
            data["gguf"] = made.as_data()
        return data


def _show_progress_of_hub() -> None:
    """Let the hub's client draw its progress, on terminals only; it reads the variable at its import."""
    if output.console.is_terminal and not (output.quiet or output.json):
        os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
