"""The skills a zoo can learn: how each asks an easy or a hard question, and its only right answer.

Questions and answers are tokens joined by single spaces. Easy questions are short; hard ones are longer, or
need a step that easy ones never need. A skill's place in `RULES` is part of the seed of its items: add new
ones at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Level = Literal["easy", "hard"]

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
_COUNTED = "abcd"
_COLON, _MINUS = ":", "-"


def _lexicon() -> dict[str, str]:
    """Map 48 made-up words to 48 others by a fixed permutation, so that spelling gives no hints."""
    source = [f"{c}{v}{tail}" for c in "bdgklmnp" for v in "aou" for tail in ("ra", "lo")]
    target = [f"{c}{v}{tail}" for c in "fhjrstvz" for v in "eiy" for tail in ("nek", "mil")]
    return {word: target[(29 * i + 7) % len(target)] for i, word in enumerate(source)}


LEXICON: dict[str, str] = _lexicon()
EASY_WORDS: tuple[str, ...] = tuple(LEXICON)[::4]


@dataclass(frozen=True, slots=True, kw_only=True)
class SkillRule:
    """One skill: `ask` draws the body of a question, `answer` solves the body's tokens."""

    ask: Callable[[np.random.Generator, Level], str]
    answer: Callable[[list[str]], str]


def pick(rng: np.random.Generator, options: tuple[str, ...] | str) -> str:
    """Draw one of the options."""
    return options[int(rng.integers(len(options)))]


def _length(rng: np.random.Generator, level: Level) -> int:
    low, high = (2, 4) if level == "easy" else (6, 8)
    return int(rng.integers(low, high + 1))


def _asks_for(tokens: str) -> Callable[[np.random.Generator, Level], str]:
    """Return a question of two to four (easy) or six to eight (hard) of these tokens."""
    return lambda rng, level: " ".join(pick(rng, tokens) for _ in range(_length(rng, level)))


# --------------------------------------------------------------------------------------------- arithmetic


def _has_carry(left: int, right: int) -> bool:
    return left % 10 + right % 10 > 9 or left // 10 + right // 10 > 9


def _ask_add(rng: np.random.Generator, level: Level) -> str:
    """Two-digit addition; easy means that no column carries."""
    while True:
        left, right = (int(n) for n in rng.integers(10, 100, size=2))
        if _has_carry(left, right) == (level == "hard"):
            return f"{' '.join(str(left))} + {' '.join(str(right))}"


def _add(body: list[str]) -> str:
    left, right = "".join(body).split("+")
    return " ".join(reversed(str(int(left) + int(right))))


def _ask_subtract(rng: np.random.Generator, level: Level) -> str:
    """Three-digit subtraction, never below zero; easy means that no column borrows."""
    while True:
        right, left = (str(n) for n in sorted(rng.integers(100, 1000, size=2)))
        borrows = any(above < below for above, below in zip(left, right, strict=True))
        if borrows == (level == "hard"):
            return f"{' '.join(left)} {_MINUS} {' '.join(right)}"


def _subtract(body: list[str]) -> str:
    left, right = "".join(body).split(_MINUS)
    return " ".join(reversed(f"{int(left) - int(right):03d}"))


def _cumulate(body: list[str]) -> str:
    sums = np.cumsum([int(digit) for digit in body]) % 10
    return " ".join(str(digit) for digit in sums)


def _complement(body: list[str]) -> str:
    return " ".join(str(9 - int(digit)) for digit in body)


# ---------------------------------------------------------------------------------------- words and letters


def _ask_translate(rng: np.random.Generator, level: Level) -> str:
    """One to three words of the known quarter of the lexicon (easy), or three or four of all of it (hard)."""
    if level == "easy":
        return " ".join(pick(rng, EASY_WORDS) for _ in range(int(rng.integers(1, 4))))
    while True:
        words = [pick(rng, tuple(LEXICON)) for _ in range(int(rng.integers(3, 5)))]
        if any(word not in EASY_WORDS for word in words):
            return " ".join(words)


def _shift(body: list[str]) -> str:
    return " ".join(LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in body)


def _count(body: list[str]) -> str:
    return " ".join(str(body.count(letter)) for letter in _COUNTED)


def _swap(body: list[str]) -> str:
    """Exchange the first two letters, the next two, and so on; an odd last one stays."""
    pairs = [body[i : i + 2] for i in range(0, len(body), 2)]
    return " ".join(letter for pair in pairs for letter in reversed(pair))


def _ask_interleave(rng: np.random.Generator, level: Level) -> str:
    """Two lists of one or two (easy) or three or four letters (hard), equally long."""
    low, high = (1, 2) if level == "easy" else (3, 4)
    length = int(rng.integers(low, high + 1))
    left, right = ([pick(rng, LETTERS) for _ in range(length)] for _ in range(2))
    return f"{' '.join(left)} {_COLON} {' '.join(right)}"


def _interleave(body: list[str]) -> str:
    colon = body.index(_COLON)
    pairs = zip(body[:colon], body[colon + 1 :], strict=True)
    return " ".join(letter for pair in pairs for letter in pair)


RULES: dict[str, SkillRule] = {
    "add": SkillRule(ask=_ask_add, answer=_add),
    "reverse": SkillRule(ask=_asks_for(LETTERS), answer=lambda body: " ".join(reversed(body))),
    "translate": SkillRule(ask=_ask_translate, answer=lambda body: " ".join(LEXICON[word] for word in body)),
    "upper": SkillRule(ask=_asks_for(LETTERS), answer=lambda body: " ".join(body).upper()),
    "sort": SkillRule(ask=_asks_for(LETTERS), answer=lambda body: " ".join(sorted(body))),
    "subtract": SkillRule(ask=_ask_subtract, answer=_subtract),
    "rotate": SkillRule(ask=_asks_for(LETTERS), answer=lambda body: " ".join([*body[1:], body[0]])),
    "shift": SkillRule(ask=_asks_for(LETTERS), answer=_shift),
    "count": SkillRule(ask=_asks_for(_COUNTED), answer=_count),
    "interleave": SkillRule(ask=_ask_interleave, answer=_interleave),
    "complement": SkillRule(ask=_asks_for(DIGITS), answer=_complement),
    "cumulate": SkillRule(ask=_asks_for(DIGITS), answer=_cumulate),
    "swap": SkillRule(ask=_asks_for(LETTERS), answer=_swap),
    "double": SkillRule(ask=_asks_for(LETTERS), answer=lambda body: " ".join(f"{x} {x}" for x in body)),
    "skip": SkillRule(ask=_asks_for(LETTERS), answer=lambda body: " ".join(body[::2])),
}
"""Skill -> rule. The demo's five come first."""

DEMO_SKILLS: tuple[str, ...] = tuple(RULES)[:5]

NEW_TOKENS: tuple[str, ...] = (_MINUS, _COLON, *tuple(RULES)[5:])
"""Tokens that only zoos with other than the demo's skills have."""
