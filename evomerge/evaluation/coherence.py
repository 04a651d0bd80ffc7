"""Coherence: a score of free generations that end, don't repeat themselves and keep the question's language.

Failed merges often still answer short questions, but repeat themselves, don't stop or change the language in
longer texts. All of it shows in the generated text, so no judge model is needed. `Normaliser.coherence`
divides by the coherence of the base model, so what the base does, too, costs a merge nothing.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

N = 4
"""Length of the n-grams that are compared (Welleck et al. 2019 report the same, seq-rep-4)."""

RAMBLING = 0.5
"""Factor of the score of a generation that was cut off at its length limit."""

LOOPING = 0.5
"""Factor of the score of a generation that loops."""

ROUNDS, LOOP, LONGEST_PHRASE = 3, 24, 256
"""A loop is a phrase of at most LONGEST_PHRASE tokens, at least ROUNDS times in a row, at least LOOP tokens
together."""

OPEN = 0.5
"""Factor of the score of a generation whose thoughts begin but don't end: there is no answer."""

THOUGHTS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
"""Texts that begin and end the thoughts of common models."""

_KANA = frozenset({"HIRAGANA", "KATAKANA"})


def repetition(tokens: Sequence[int], n: int = N) -> float:
    """Return seq-rep-n in [0, 1): the share of a text's n-grams that are repetitions.

    1 - |unique n-grams| / |n-grams| (Welleck et al. 2019, arXiv:1908.04319, section 6); 0 for texts
    shorter than n tokens.

    >>> repetition([1, 2, 3, 4, 5]), repetition([1, 1, 1, 1, 1, 1])
    (0.0, 0.6666666666666667)
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(tokens: Sequence[int]) -> bool:
    """Say whether a phrase is repeated exactly, several times in a row.

    >>> loops([1, 2, 3] * 10), loops([*range(30), *range(30)])
    (True, False)
    """
    array = np.asarray(tokens)
    for period in range(1, min(len(tokens) // ROUNDS, LONGEST_PHRASE) + 1):
        needed = max((ROUNDS - 1) * period, LOOP - period)
        different = np.flatnonzero(array[period:] != array[:-period])
        edges = np.concatenate([[-1], different, [len(tokens) - period]])
        if np.diff(edges).max() - 1 >= needed:
            return True
    return False


def scripts(text: str) -> frozenset[str]:
    """Return the scripts of a text's letters, by the first words of their names in Unicode.

    >>> sorted(scripts("ab 12 \N{CYRILLIC SMALL LETTER BE}"))
    ['CYRILLIC', 'LATIN']
    """
    return frozenset(name for char in text if (name := _script(char)))


def drift(text: str, question: str) -> float:
    """Return the share of a text's letters in scripts that the question has no letter of, in [0, 1].

    0 where one of the two has no letters. Chinese characters belong to Japanese, too.

    >>> drift("ab \N{CYRILLIC SMALL LETTER BE}\N{CYRILLIC SMALL LETTER VE}", "what?")
    0.5
    """
    known, letters = scripts(question), [name for char in text if (name := _script(char))]
    if not known or not letters:
        return 0.0
    if known & _KANA:
        known |= _KANA | {"CJK"}
    return sum(name not in known for name in letters) / len(letters)


@lru_cache(maxsize=1 << 16)
def _script(char: str) -> str | None:
    """Return a letter's script, None for other characters."""
    plain = unicodedata.normalize("NFKC", char)[:1]  # full-width, superscript and mathematical letters
    if not plain.isalpha():
        return None
    first = unicodedata.name(plain, "").partition(" ")[0]
    return first.partition("-")[0] or None


def thoughts_open(text: str, end: str | None = None) -> bool:
    """Say whether thoughts begin in a text, but don't end. end: a text that also ends them.

    >>> thoughts_open("<think> well"), thoughts_open("<think> well </think> 3")
    (True, False)
    """
    last = text.rfind(end) if end else -1
    return any(text.rfind(start) > max(text.rfind(stop), last) for start, stop in THOUGHTS)


def coherence(tokens: Sequence[int], *, ended: bool, drifted: float = 0.0, thinking: bool = False) -> float:
    """Return the coherence of one generation, in [0, 1].

    That is 1 - seq-rep-4, times the share of letters in the question's scripts, times RAMBLING if it did not
    end before its length limit, LOOPING if it loops, and OPEN if its thoughts don't end; 0 for no tokens.

    Args:
        tokens: of the answer.
        ended: whether it ended before its length limit.
        drifted: see `drift`.
        thinking: see `thoughts_open`.

    >>> coherence([1, 2, 3], ended=True), coherence([1, 2, 3], ended=False), coherence([], ended=True)
    (1.0, 0.5, 0.0)
    """
    if not tokens:
        return 0.0
    score = (1 - repetition(tokens)) * (1 - drifted)
    for factor, applies in ((RAMBLING, not ended), (LOOPING, loops(tokens)), (OPEN, thinking)):
        score *= factor if applies else 1.0
    return score
