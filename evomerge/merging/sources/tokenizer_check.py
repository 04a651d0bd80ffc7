"""Whether the tokenizer that transformers opens splits text as the model's tokenizer.json does.

transformers chooses a class by tokenizer_config.json and the model's type, and many classes build their own
tokenizer of the file's vocabulary, with their own rules for white space and words. A model that was trained
with other rules then reads noise: it opens without an error, and every score is near 0.

Not compared: special tokens that are added at the ends, additional tokens, and the beginning of a text, where
settings such as `add_prefix_space` and transformers' versions legitimately differ.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import ModelError
from evomerge.files import passing_folder, temporary_parent
from evomerge.merging.sources.beside import tokenizer_files, tokenizer_folder
from evomerge.merging.sources.source import Source
from evomerge.schema import load_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONFIG = "tokenizer_config.json"
_TEXTS = (
    "A quick brown fox, two lazy dogs: it's 12 o'clock (or 345,678.9), isn't it?",
    "Question: What is 25 + 317?\nAnswer: 342\n\nQuestion:  two spaces,\ta tab,\r\n   and lines. ",
    "def f(x_1, y):\n    return [x_1 * 2, y != 0]  # DON'T {a}/<b>\n",
    "Ein naïver Größenvergleich: e\u0301t\u00e9, Привет мир, 你好世界。こんにちは 안녕 مرحبا नमस्ते 😀 ﬁ ＡＢ",
)
_PIECES = 100
"""How many of the vocabulary's tokens are put into a text, evenly spaced."""
_BEGINNING = 3
"""Tokens at the beginning of a text that may differ."""
_SHOWN = 12
"""Token ids of an error's example, the last ones."""
_AS_IT_IS = "PreTrainedTokenizerFast"
"""The class by which transformers reads tokenizer.json as it is, for most models."""


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, source: Source, texts: Iterable[str] = ()) -> None:
    """Raise ModelError where an opened tokenizer and the model's tokenizer.json give other token ids.

    A model without tokenizer.json passes.

    texts: what the model will be asked. Without it texts of several kinds are compared, one of them made of
    the vocabulary's own tokens.
    """
    path = tokenizer_folder(source) / "tokenizer.json"
    if not path.is_file():
        return
    additional = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    plain = tuple(_without(text, additional) for text in texts)
    for text, expected in _read(str(path), _identity(path), plain):
        if not _same(_ids(tokenizer, text), expected):
            raise _differs(tokenizer, source, path, text)


@functools.lru_cache(maxsize=8)
def _read(
    path: str, identity: tuple[int, ...], texts: tuple[str, ...]
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return texts with their token ids by a tokenizer.json; `identity` makes a changed file another one."""
    own = _open(path)
    if not texts:
        size = own.get_vocab_size()
        pieces = own.decode(range(0, size, max(1, size // _PIECES)), skip_special_tokens=True)
        texts = (*_TEXTS, pieces)
    return tuple((text, tuple(own.encode(text, add_special_tokens=False).ids)) for text in texts)


def _identity(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _open(path: str) -> Any:
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(path)
    own.no_truncation()
    own.no_padding()
    return own


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _without(text: str, additional: Sequence[str]) -> str:
    for token in additional:
        text = text.replace(token, " ")
    return text


def _same(ids: Sequence[int], expected: Sequence[int]) -> bool:
    """Say whether two lists of token ids are equal, but for their first few."""
    longest = max(len(ids), len(expected))
    equal = 0
    while equal < min(len(ids), len(expected)) and ids[-1 - equal] == expected[-1 - equal]:
        equal += 1
    return longest - equal <= _BEGINNING


def _differs(tokenizer: Any, source: Source, path: Path, text: str) -> ModelError:
    own = _open(str(path))

    def both(part: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(own.encode(part, add_special_tokens=False).ids), _ids(tokenizer, part)

    words = text.split(" ")
    parts = (" ".join(words[:count]) for count in range(1, len(words) + 1))
    example = next(part for part in parts if not _same(*both(part)))
    expected, got = both(example)
    files = tokenizer_files(source).files
    said = load_json(files[_CONFIG]).get("tokenizer_class") if _CONFIG in files else None
    config = f"tokenizer_class: {said}" if said else "no tokenizer_class"
    kind = source.config.get("model_type")
    return ModelError(
        f"{source.location}: the tokenizer that transformers opens splits text in another way than "
        "tokenizer.json, so the model would read noise",
        expected=f"{example!r} as {_listed(expected)}, by tokenizer.json",
        got=f"{_listed(got)}, by transformers' class {type(tokenizer).__name__} ({_CONFIG} has {config}, "
        f"config.json model_type: {kind})",
        fix=_fix(source, path, kind),
    )


def _fix(source: Source, path: Path, kind: object) -> str:
    """Say what makes transformers read tokenizer.json as it is; that is tried out first."""
    import transformers

    files = tokenizer_files(source).files
    with passing_folder(temporary_parent(), "evomerge-tokenizer") as folder:
        shutil.copyfile(path, folder / path.name)
        data = load_json(files[_CONFIG]) if _CONFIG in files else {}
        (folder / _CONFIG).write_text(json.dumps(data | {"tokenizer_class": _AS_IT_IS}), encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(source.config), encoding="utf-8")
        tried: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if all(_same(_ids(tried, text), expected) for text, expected in _read(str(path), _identity(path), ())):
        first = f'write "tokenizer_class": "{_AS_IT_IS}" into {path.parent / _CONFIG}'
    else:
        first = (
            f"install a version of transformers that reads it as it is, because {transformers.__version__} "
            f"reads that of every {kind} model by a class of its own"
        )
    return f"{first}; or, if the model was trained with another tokenizer.json, put that one in its place"


def _listed(ids: Sequence[int]) -> str:
    return f"token ids [{'..., ' if len(ids) > _SHOWN else ''}{', '.join(map(str, ids[-_SHOWN:]))}]"
