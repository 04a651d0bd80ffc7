"""Upload of an exported model folder to the Hugging Face hub, by huggingface_hub and with its own login.

The endpoint is that of huggingface_hub (`HF_ENDPOINT`). No token is taken from a config or an option.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError, DiskError, UserError
from evomerge.merging.sources.hub import split_id
from evomerge.version import __version__

WEIGHTS = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """What is or would be uploaded. target: ORG/NAME. files: name -> bytes. url: None before the upload."""

    folder: Path
    target: str
    endpoint: str
    private: bool
    files: dict[str, int]
    url: str | None = None

    @property
    def text(self) -> str:
        """Return the files with their sizes, and the place."""
        width = max(map(len, self.files))
        lines = [f"  {name:<{width}}  {size:>15,} bytes" for name, size in self.files.items()]
        place = f"{self.endpoint}/{self.target}{' (private)' if self.private else ''}"
        total = f"{len(self.files)} files, {sum(self.files.values()):,} bytes"
        if self.url is None:
            return "\n".join([*lines, f"would upload {total}, to {place}; nothing was uploaded"])
        return f"uploaded {total}: {self.url}{' (private)' if self.private else ''}"

    def as_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "target": self.target,
            "endpoint": self.endpoint,
            "private": self.private,
            "files": self.files,
            "url": self.url,
        }


def check_target(target: str) -> None:
    """Raise ConfigError unless a target has the form ORG/NAME."""
    found = split_id(target)
    if found is None or found[1] is not None:
        raise ConfigError(f"--push {target}: no name of a model on the hub", expected="ORG/NAME")


def check_login(target: str) -> None:
    """Raise UserError unless huggingface_hub is logged in and the hub knows who it is."""
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise UserError(
            f"{target}: not logged in to the Hugging Face hub",
            fix="hf auth login, with a token that may write",
        )
    with _hub_errors(target, "hf auth login, with a token that is valid"):
        huggingface_hub.HfApi().whoami()


def plan(folder: Path, target: str, *, private: bool) -> Upload:
    """Return what an upload of a folder would be; nothing is asked of the network.

    Raises:
        DiskError: the folder is none, or empty.
    """
    from huggingface_hub import constants

    paths = (path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder)))
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(paths)}
    if not files:
        raise DiskError(f"{folder}: no files to upload", expected="the folder of an exported model")
    return Upload(folder=folder, target=target, endpoint=constants.ENDPOINT, private=private, files=files)


def upload(planned: Upload, *, message: str) -> Upload:
    """Create the repository where there is none, upload the folder in one commit, and return its address.

    What a stopped upload has sent is not sent again. On a terminal, huggingface_hub shows its progress.

    Raises:
        UserError: the hub refuses it or is out of reach; or the repository there is public and should be
            private, or holds other weights.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(library_name="evomerge", library_version=__version__)
    target = planned.target
    with _hub_errors(
        target, f"the folder {planned.folder} is whole; the same command goes on with the upload"
    ):
        made = api.create_repo(target, private=planned.private or None, exist_ok=True)
        there = api.model_info(target)
        _check_repository(there, planned)
        api.upload_folder(
            repo_id=target,
            folder_path=planned.folder,
            allow_patterns=[_literal(name) for name in planned.files],
            commit_message=message,
        )
    return Upload(
        folder=planned.folder,
        target=target,
        endpoint=planned.endpoint,
        private=bool(there.private),
        files=planned.files,
        url=str(made),
    )


def _check_repository(there: Any, planned: Upload) -> None:
    """Raise UserError where the repository is not what the upload needs."""
    if planned.private and there.private is False:
        raise UserError(
            f"{planned.target}: exists already, and everyone can read it",
            expected="a private repository, or none",
            fix="choose another name, make it private on its page, or leave --private out",
        )
    names = [file.rfilename for file in there.siblings or ()]
    if others := [name for name in names if name.endswith(WEIGHTS) and name not in planned.files]:
        raise UserError(
            f"{planned.target}: holds other weights already",
            got=", ".join(others[:4]),
            fix="choose another name, or delete these files on its page",
        )


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _literal(name: str) -> str:
    """Return a file's name as a pattern that matches nothing else."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


@contextmanager
def _hub_errors(target: str, fix: str) -> Iterator[None]:
    """Turn what the hub's client raises into one message of ours."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the client raises errors of its own, of its HTTP library and of the OS
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        text = " ".join(str(getattr(error, "server_message", None) or error).split())[:300]
        if error.__cause__ is not None:
            text += f" ({type(error.__cause__).__name__}: {' '.join(str(error.__cause__).split())[:200]})"
        if status in (401, 403):
            fix = "hf auth login, with a token that may write there"
        raise UserError(
            f"{target}: the hub refused, or is out of reach", got=text or type(error).__name__, fix=fix
        ) from None
