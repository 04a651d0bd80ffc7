"""Coherence: a score of free generations that don't repeat themselves and come to an end.

Failed merges often still answer short questions, but repeat themselves or don't stop in longer texts. Both
show in the generated tokens, so no judge model is needed. `Normaliser.coherence` divides by the coherence of
the base model.
"""

from __future__ import annotations

from collections.abc import Sequence

N = 4
"""Length of the n-grams that are compared (Welleck et al. 2019 report the same, seq-rep-4)."""

RAMBLING = 0.5
"""Factor of the score of a generation that was cut off at its length limit."""


def repetition(tokens: Sequence[int], n: int = N) -> float:
    """Return seq-rep-n in [0, 1): the share of a text's n-grams that are repetitions.

    1 - |unique n-grams| / |n-grams| (Welleck et al. 2019, arXiv:1908.04319, section 6); 0 for texts
    shorter than n tokens.

    >>> repetition([1, 2, 3, 4, 5]), repetition([1, 1, 1, 1, 1, 1])
    (0.0, 0.6666666666666667)
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def coherence(tokens: Sequence[int], *, ended: bool) -> float:
    """Return the coherence of one generation, in [0, 1].

    That is 1 - seq-rep-4, times RAMBLING if it did not end before its length limit; 0 for no tokens.

    >>> coherence([1, 2, 3], ended=True), coherence([1, 2, 3], ended=False), coherence([], ended=True)
    (1.0, 0.5, 0.0)
    """
    if not tokens:
        return 0.0
    return (1 - repetition(tokens)) * (1.0 if ended else RAMBLING)
