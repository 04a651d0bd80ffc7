"""Models with different vocabularies: embedding rows are matched by token string before merging.

    aligned = align(opened, tokenizer="union", base="base", asked=True)
    aligned["chat"].tensor("model.embed_tokens.weight")   # rows in the order of the union's ids

`row_maps` is the pure part: for every model, the row from which each row of the result comes. `align` wraps
models in an `Aligned` source where necessary, which returns embeddings and heads with the new rows. So the
rest of the code only sees models with the same vocabulary.

A row that a model lacks is the base's, so its task vector is zero there. If the base lacks it too, the base
and every model without it get the mean of the models that have it, in the recipe's order, in float32. A
padding row that no model has is zero. A recipe can choose the row of a token (`tokens`). Tokens of a union
that its base lacks become added tokens, also those that are plain pieces in their own tokenizer: the
tokenizer then matches them literally in a text, before it splits the rest into pieces.

Not covered: per-layer embeddings and other tables of tokens with a row count of their own (refused), and
tokenizers without tokenizer.json, whose models must have the rows of the model that gives the tokenizer.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge.errors import ConfigError, ModelError, nearest
from evomerge.files import passing_folder, temporary_parent
from evomerge.merging.modules import TEXT, layer_of, module_of
from evomerge.merging.recipe_data import TokenRow
from evomerge.merging.sources.arrays import WeightArray, of_tensor
from evomerge.merging.sources.beside import folders_of, tokenizer_files, tokenizer_folder
from evomerge.merging.sources.checkpoint import HEADS, LARGEST_TOKENIZER
from evomerge.merging.sources.model_config import text_part, with_rows
from evomerge.merging.sources.source import Source, Wrapped
from evomerge.merging.sources.tensorfile import Header
from evomerge.merging.sources.tokenizer_check import check_tokenizer
from evomerge.schema import load_json

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

LACKS = -1
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""Properties of an added token in tokenizer.json, beside its text."""
_HEAD_PARTS = (*HEADS, *(name.removesuffix("weight") + "bias" for name in HEADS))
_EMBEDDING = re.compile(r"embed|wte")
_NO_TOKENS = re.compile(r"pos|wpe|type|patch|class")
"""Parts of the names of embeddings that are not of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A model's embedding rows: token -> id (None: unknown), and their number with padding."""

    tokens: Mapping[str, int] | None
    count: int


def row_maps(models: Mapping[str, Rows], target: Rows) -> dict[str, NDArray[np.int64]]:
    """Return for every model the row from which each row of the target comes, shape (target.count,).

    -1 means that the model lacks the row's token. A row without a token is padding and comes from the
    model's padding at the same index. Ids beyond a model's rows count as missing.

    >>> maps = row_maps({"m": Rows(tokens={"b": 0, "a": 1}, count=4)}, Rows(tokens={"a": 0, "c": 1}, count=3))
    >>> maps["m"].tolist()
    [1, -1, 2]
    """
    assert target.tokens is not None
    token_of_row = {row: token for token, row in target.tokens.items() if row < target.count}
    padding = np.array([row for row in range(target.count) if row not in token_of_row], dtype=np.int64)
    maps = {}
    for name, model in models.items():
        assert model.tokens is not None
        rows = np.full(target.count, LACKS, dtype=np.int64)
        for row, token in token_of_row.items():
            model_row = model.tokens.get(token, LACKS)
            rows[row] = model_row if model_row < model.count else LACKS
        named = np.fromiter(model.tokens.values(), dtype=np.int64, count=len(model.tokens))
        free = padding[padding < model.count]
        free = free[~np.isin(free, named)]
        rows[free] = free
        maps[name] = rows
    return maps


def row_tensors(source: Source) -> tuple[str, ...]:
    """Return the names of the tensors with one row per token: embeddings, and head and its bias if untied.

    They are recognised by name and shape: outside the layers, with as many rows as the config's vocabulary.
    """
    row_counts = {
        name: header.shape[0]
        for name, header in source.headers.items()
        if layer_of(name) is None
        and module_of(name) == TEXT
        and (
            (name.endswith(_HEAD_PARTS) and header.shape)
            or (len(header.shape) == 2 and _EMBEDDING.search(name) and not _NO_TOKENS.search(name))
        )
    }
    declared = text_part(source.config).get("vocab_size", source.config.get("vocab_size"))
    count = declared if declared in row_counts.values() else next(iter(row_counts.values()), None)
    return tuple(name for name, rows in row_counts.items() if rows == count)


def rows_of(source: Source) -> int | None:
    """Return the number of rows of a model's embeddings, or None if there is no such tensor."""
    names = row_tensors(source)
    return source.headers[names[0]].shape[0] if names else None


def differ(sources: Mapping[str, Source], pattern: str) -> bool:
    """Say whether any model differs from the model `pattern` in its tokens or its number of rows."""
    first = sources[pattern]
    return any(
        rows_of(source) != rows_of(first) or not _same_tokens(source.vocabulary, first.vocabulary)
        for source in sources.values()
    )


def align(
    sources: Mapping[str, Source],
    *,
    tokenizer: str,
    base: str | None,
    asked: bool,
    pad_rows: int = 0,
    tokens: Mapping[str, TokenRow] | None = None,
) -> dict[str, Source]:
    """Return the models with their embedding rows in the order of one vocabulary.

    Args:
        sources: all models of a recipe, in its order.
        tokenizer: the model whose vocabulary the result gets, or `union`: the base's tokens (without a base,
            the first model's), then additional ones in the order of the models.
        base: the name of the base model.
        asked: whether the user set `tokenizer`. If not, only models that differ in padding alone are
            aligned. Others stay unchanged, and `compatibility.check` refuses them.
        pad_rows: round the number of rows up to a multiple of this; new rows are zeros. 0: don't.
        tokens: token -> where its row comes from, see `TokenRow`.

    Raises:
        ModelError: rows can't be matched: a model without tokenizer.json has another number of rows,
            embeddings are unknown, or ids have gaps under `union`.
    """
    tokens = tokens or {}
    pattern = tokenizer if tokenizer in sources else base or next(iter(sources))
    first = sources[pattern]
    names = row_tensors(first)
    unlike = any(row_tensors(source) != names for source in sources.values())  # `check` refuses them
    if pattern != tokenizer and first.vocabulary is None and any(s.vocabulary for s in sources.values()):
        raise _no_tokens(pattern, first)
    _check_padding(pad_rows or len(tokens), pattern, first, names)
    moved = pad_rows or tokens or differ(sources, pattern)
    same = all(_same_tokens(source.vocabulary, first.vocabulary) for source in sources.values())
    if unlike or not names or first.vocabulary is None or not moved or not (same or asked):
        return dict(sources)
    rows = {name: _rows(name, source, pattern, first) for name, source in sources.items()}
    additions = () if tokenizer in sources else _additions(sources, pattern)
    target = _padded(_target(rows[pattern], additions), pad_rows)
    _check_tables(sources, names)
    if additions:
        _check_ids(first, target, additions)
    table = Table(
        sources=dict(sources),
        base=base,
        tensors=names,
        rows=rows,
        target=target,
        maps=row_maps(rows, target),
        chosen=_chosen(tokens, rows, target),
    )
    forced = any(row.force for row in tokens.values())
    return {
        name: Aligned(name, source, table, additions if name == pattern else ())
        if forced or rows[name] != target
        else source
        for name, source in sources.items()
    }


def _no_tokens(name: str, source: Source) -> ModelError:
    return ModelError(
        f"model {name!r} has no tokenizer.json, so its tokens can't be matched",
        expected=f"tokens for the rows of {name} ({source.location})",
        fix=f"put the tokenizer.json {name} was trained with into its folder",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen:
    """A row of a model, or zeros (None), in place of a token's own. force: also for models with the token."""

    model: str | None
    row: int
    force: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """An alignment: the original models, and the row from which each row of the target comes.

    chosen: row of the target -> the row that a recipe chooses for it.
    """

    sources: Mapping[str, Source]
    base: str | None
    tensors: tuple[str, ...]
    rows: Mapping[str, Rows]
    target: Rows
    maps: Mapping[str, NDArray[np.int64]]
    chosen: Mapping[int, _Chosen]

    def gather(self, model: str, tensor: str) -> Tensor:
        """Return a model's tensor with the target's rows, in float32."""
        import torch

        rows, weights = self.maps[model], self.sources[model].tensor(tensor)
        if np.array_equal(rows, np.arange(len(rows))):
            whole = weights[: len(rows)]
            return self._with_chosen(whole.clone(), model, tensor) if self.chosen else whole
        result = weights.index_select(0, torch.from_numpy(np.maximum(rows, 0)))
        del weights
        lacking = rows == LACKS
        result[torch.from_numpy(lacking)] = 0
        if self.base is not None and self.base != model and lacking.any():
            theirs = self.maps[self.base]
            from_base = np.flatnonzero(lacking & (theirs != LACKS))
            if from_base.size:
                base_rows = self.sources[self.base].tensor(tensor)[torch.from_numpy(theirs[from_base])]
                result[torch.from_numpy(from_base)] = base_rows
                lacking[from_base] = False
        if lacking.any():
            self._add_means(result, np.flatnonzero(lacking), tensor)
        return self._with_chosen(result, model, tensor)

    def _with_chosen(self, result: Tensor, model: str, tensor: str) -> Tensor:
        """Write the chosen rows into a model's tensor, where they are forced or it lacks the token."""
        for place, chosen in self.chosen.items():
            if chosen.force or self.maps[model][place] == LACKS:
                theirs = None if chosen.model is None else self.sources[chosen.model].tensor(tensor)
                result[place] = 0.0 if theirs is None else theirs[chosen.row]
        return result

    def gather_copied(self, model: str, tensor: str) -> WeightArray:
        """Return whole numbers with the target's rows; a row that a model lacks is another model's."""
        order = dict.fromkeys((model, *((self.base,) if self.base else ()), *self.sources))
        own = self.sources[model].array(tensor)
        result = np.zeros((self.target.count, *own.shape[1:]), dtype=own.dtype)
        lacking = np.ones(self.target.count, dtype=bool)
        for name in order:
            header = self.sources[name].copied.get(tensor)
            if header is not None and header.shape == (self.rows[name].count, *own.shape[1:]):
                places = np.flatnonzero(lacking & (self.maps[name] != LACKS))
                result[places] = self.sources[name].array(tensor)[self.maps[name][places]]
                lacking[places] = False
        return result

    def _add_means(self, result: Tensor, places: NDArray[np.int64], tensor: str) -> None:
        """Fill rows with the mean over the models that have them; rows that no model has stay zero."""
        import torch

        total = torch.zeros((len(places), *result.shape[1:]), dtype=result.dtype)
        count = torch.zeros(len(places), dtype=result.dtype)
        for name, rows in self.maps.items():
            has = np.flatnonzero(rows[places] != LACKS)
            if has.size:
                model_rows = self.sources[name].tensor(tensor)[torch.from_numpy(rows[places][has])]
                total.index_add_(0, torch.from_numpy(has), model_rows)
                count[torch.from_numpy(has)] += 1
        shape = (-1, *(1,) * (result.dim() - 1))
        result[torch.from_numpy(places)] = total / count.clamp(min=1).reshape(shape)

    def mark(self) -> str:
        """Return a hash of everything that determines the rows."""
        digest = hashlib.sha256()
        tokens = sorted((self.target.tokens or {}).items())
        prints = [source.fingerprint for source in self.sources.values()]
        digest.update(json.dumps([tokens, self.target.count, prints, self.base, self.tensors]).encode())
        for rows in self.maps.values():
            digest.update(rows.tobytes())
        if self.chosen:
            digest.update(repr(sorted((place, astuple(row)) for place, row in self.chosen.items())).encode())
        return digest.hexdigest()


class Aligned(Wrapped):
    """A source with the rows of another vocabulary; everything else is the original source's.

    additions: tokens (with their flags, as in tokenizer.json) that the tokenizer in `folder` lacks.
    note: a remark for the user.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        table: Table,
        additions: Sequence[Mapping[str, Any]],
    ) -> None:
        super().__init__(source)
        self.name, self.additions = name, tuple(additions)
        self._table = table
        self.note = _note(name, table.rows[name], table.target, additions)
        self.config = with_rows(source.config, table.target.count)
        self.headers = {
            tensor: Header(shape=(table.target.count, *header.shape[1:]), dtype=header.dtype)
            if tensor in table.tensors
            else header
            for tensor, header in source.headers.items()
        }
        self._by_token = frozenset(
            tensor
            for tensor, header in source.copied.items()
            if header.shape and header.shape[0] == table.rows[name].count
        )
        self.copied = {
            tensor: Header(shape=(table.target.count, *header.shape[1:]), dtype=header.dtype)
            if tensor in self._by_token
            else header
            for tensor, header in source.copied.items()
        }

    @property
    def vocabulary(self) -> Mapping[str, int] | None:
        return self._table.target.tokens

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the source's fingerprint and everything that determines its rows."""
        return hashlib.sha256(f"{self.source.fingerprint} {self._table.mark()}".encode()).hexdigest()

    def array(self, name: str, *, mapped: bool = True) -> WeightArray:
        """Return the tensor in float32 if its rows move, else as the original source does."""
        if name in self._by_token:
            return self._table.gather_copied(self.name, name)
        moved = name in self._table.tensors
        return of_tensor(self.tensor(name)) if moved else self.source.array(name, mapped=mapped)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in float32, its rows in the target's order. Don't modify it."""
        return (
            self._table.gather(self.name, name) if name in self._table.tensors else self.source.tensor(name)
        )


def open_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Open a source's tokenizer, with the tokens that its alignment adds.

    Raises ModelError where it can't be opened, or is another one than the model's tokenizer.json.
    """
    from transformers import AutoTokenizer

    try:
        with _whole_folder(source) as folder:
            tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        check_tokenizer(tokenizer, source)
    except (KeyboardInterrupt, SystemExit, ModelError):
        raise
    except BaseException as error:  # a panic of the tokenizers library (in Rust) is no Exception
        raise ModelError(f"{source.location}: its tokenizer can't be opened", got=str(error)[:200]) from None
    additions = source.additions if isinstance(source, Aligned) else ()
    if additions:
        assert source.vocabulary is not None
        tokenizer.add_tokens(_added(additions))
        texts = [str(token["content"]) for token in additions]
        if tokenizer.convert_tokens_to_ids(texts) != [source.vocabulary[text] for text in texts]:
            raise _no_union(source)
    return tokenizer  # type: ignore[no-any-return]


@contextlib.contextmanager
def _whole_folder(source: Source) -> Iterator[Path]:
    """Yield a folder with a model's config and tokenizer; an adapter's own files replace the model's."""
    if len(folders_of(source)) == 1:
        yield source.folder
        return
    with passing_folder(temporary_parent(), "evomerge-tokenizer") as folder:
        for name, path in tokenizer_files(source).files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
        (folder / "config.json").write_text(json.dumps(source.config), encoding="utf-8")
        yield folder


def _same_tokens(tokens: Mapping[str, int] | None, others: Mapping[str, int] | None) -> bool:
    return tokens is None or others is None or tokens == others


def _rows(name: str, source: Source, pattern_name: str, pattern: Source) -> Rows:
    """Return a model's rows; without a tokenizer.json those of the pattern, if their number is equal."""
    count, expected = rows_of(source), rows_of(pattern)
    assert count is not None
    if source.vocabulary is not None:
        return Rows(tokens=source.vocabulary, count=count)
    if count != expected:
        raise ModelError(
            f"model {name!r} has no tokenizer.json, so its embedding rows can't be matched",
            expected=f"{expected} rows as in {pattern_name} ({pattern.location}), or a tokenizer.json",
            got=f"{count} rows in {name} ({source.location})",
            fix=f"put the tokenizer.json {name} was trained with into its folder",
        )
    return Rows(tokens=pattern.vocabulary, count=count)


def _additions(sources: Mapping[str, Source], pattern: str) -> tuple[dict[str, Any], ...]:
    """Return the tokens the pattern lacks, in the order of models and ids, with their flags."""
    have = set(sources[pattern].vocabulary or ())
    additions = []
    for source in sources.values():
        new = {token: row for token, row in (source.vocabulary or {}).items() if token not in have}
        if not new:
            continue
        flags = _flags(tokenizer_folder(source))
        plain = {"special": False, "normalized": True}
        additions += [
            {"content": token, **flags.get(token, plain)} for token in sorted(new, key=lambda t: new[t])
        ]
        have |= new.keys()
    return tuple(additions)


def _flags(folder: Path) -> dict[str, dict[str, bool]]:
    path = folder / "tokenizer.json"
    return {
        str(token["content"]): {flag: bool(token[flag]) for flag in FLAGS if flag in token}
        for token in load_json(path, limit=LARGEST_TOKENIZER).get("added_tokens") or ()
    }


def _chosen(tokens: Mapping[str, TokenRow], rows: Mapping[str, Rows], target: Rows) -> dict[int, _Chosen]:
    """Return row of the target -> the chosen row; raise ConfigError for tokens and rows that don't exist."""
    chosen = {}
    for token, choice in tokens.items():
        where = f"tokens: {token!r}"
        there = target.tokens or {}
        if there.get(token, target.count) >= target.count:
            raise ConfigError(
                f"{where} is no token with a row in the result", fix=nearest(token, tuple(there))
            )
        row = choice.row
        if choice.model is not None and row is None:
            theirs, name = rows[choice.model].tokens or {}, choice.token or token
            if name not in theirs:
                raise ConfigError(
                    f"{where} takes its row from {choice.model}, which has no token {name!r}",
                    fix=nearest(name, tuple(theirs)),
                )
            row = theirs[name]
        if choice.model is not None and row is not None and row >= rows[choice.model].count:
            raise ConfigError(
                f"{where} takes row {row} of {choice.model}",
                expected=f"a row from 0 to {rows[choice.model].count - 1}",
            )
        chosen[there[token]] = _Chosen(model=choice.model, row=row or 0, force=choice.force)
    return chosen


def _target(pattern: Rows, additions: Sequence[Mapping[str, Any]]) -> Rows:
    """Return the pattern's rows with the additions after its last token, in padding rows if there are any."""
    assert pattern.tokens is not None
    start = 1 + max(pattern.tokens.values(), default=-1)
    new = {str(token["content"]): start + index for index, token in enumerate(additions)}
    count = max(pattern.count, start + len(new)) if new else pattern.count
    return Rows(tokens={**pattern.tokens, **new}, count=count)


def _padded(rows: Rows, multiple: int) -> Rows:
    """Return rows whose number is rounded up to a multiple; 0 leaves them as they are."""
    return Rows(tokens=rows.tokens, count=-(-rows.count // multiple) * multiple) if multiple else rows


def _check_padding(multiple: int, name: str, pattern: Source, tensors: Sequence[str]) -> None:
    """Raise ModelError for a model whose rows can't be padded."""
    if multiple and (not tensors or pattern.vocabulary is None):
        lacking = "tokenizer.json" if tensors else "embeddings"
        raise ModelError(
            f"model {name!r} has no {lacking}, so its rows can't be padded or chosen",
            fix="leave pad_rows and tokens (mergekit: pad_to_multiple_of, tokens) out",
        )


def _added(additions: Sequence[Mapping[str, Any]]) -> list[Any]:
    from tokenizers import AddedToken

    return [AddedToken(token["content"], **{f: token[f] for f in FLAGS if f in token}) for token in additions]


def _check_ids(pattern: Source, target: Rows, additions: Sequence[Mapping[str, Any]]) -> None:
    """Raise if the tokenizer would give the new tokens of a union other ids than their rows."""
    from tokenizers import Tokenizer

    assert target.tokens is not None
    tokenizer = Tokenizer.from_file(str(tokenizer_folder(pattern) / "tokenizer.json"))
    tokenizer.add_tokens(_added(additions))
    if any(tokenizer.token_to_id(t["content"]) != target.tokens[t["content"]] for t in additions):
        raise _no_union(pattern)


def _no_union(pattern: Source) -> ModelError:
    return ModelError(
        f"{pattern.location}: its tokenizer can't be extended to a union of vocabularies",
        expected="token ids without gaps",
        got="new tokens would get ids that are in use or have no row",
        fix="choose one model's vocabulary: `tokenizer: base` or a model's name",
    )


def _check_tables(sources: Mapping[str, Source], names: Sequence[str]) -> None:
    """Raise for other tables of tokens, whose rows would silently be mixed up if they were not matched."""
    for name, source in sources.items():
        for tensor, header in source.headers.items():
            if tensor in names or layer_of(tensor) is not None or len(header.shape) != 2:
                continue
            table = re.search(r"embed\w*token|token\w*embed", tensor) and not _NO_TOKENS.search(tensor)
            if table or tensor.endswith(HEADS):
                raise ModelError(
                    f"model {name!r}: {tensor!r} has one row per token, and these rows can't be matched",
                    expected=f"as many rows as {', '.join(names)}",
                    got=f"shape {list(header.shape)}",
                    fix="merge models that share a tokenizer",
                )


def _note(name: str, rows: Rows, target: Rows, additions: Sequence[Mapping[str, Any]]) -> str:
    assert rows.tokens is not None
    assert target.tokens is not None
    if rows == target:
        return f"rows of single tokens are chosen for {name}"
    if rows.tokens == target.tokens:
        return f"padding differs: {name} has {rows.count} embedding rows, the result {target.count}"
    if additions:
        plain = sum(not token.get("special") for token in additions)
        return (
            f"the union adds {len(additions)} tokens to the {len(rows.tokens)} of {name}; {plain} of them "
            "are not special tokens, and the tokenizer matches those literally in any text"
        )
    lacks = sum(token not in rows.tokens for token in target.tokens)
    loses = sum(token not in target.tokens for token in rows.tokens)
    moved = sum(rows.tokens.get(token, row) != row for token, row in target.tokens.items())
    return (
        f"vocabularies differ: {name} lacks {lacks} of the result's tokens, loses {loses} of its own, and "
        f"{moved} move to other rows"
    )
