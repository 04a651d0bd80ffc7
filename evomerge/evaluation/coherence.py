"""Coherence: does a free generation repeat itself, and does it come to an end?

Merges that went wrong often still answer short questions but loop or ramble when they may write freely.
Both signs are read off the generated tokens, so no judge is needed; what is normal for the base model is
the base's own coherence, which `Normaliser.coherence` divides by.
"""

from __future__ import annotations

from collections.abc import Sequence

N = 4
"""Length of the n-grams that are compared (Welleck et al. 2019 report the same, seq-rep-4)."""

RAMBLING = 0.5
"""What is left of the score where a generation had to be cut off at its length limit."""


def repetition(tokens: Sequence[int], n: int = N) -> float:
    """Return seq-rep-n in [0, 1): the share of a text's n-grams that it holds already.

    1 - |unique n-grams| / |n-grams| (Welleck et al. 2019, arXiv:1908.04319, section 6); 0 for texts
    shorter than n tokens.

    >>> repetition([1, 2, 3, 4, 5]), repetition([1, 1, 1, 1, 1, 1])
    (0.0, 0.6666666666666667)
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def coherence(tokens: Sequence[int], *, ended: bool) -> float:
    """Return the coherence of one generation, in [0, 1].

    That is 1 - seq-rep-4, times RAMBLING if it did not end by itself; 0 where nothing was generated.

    >>> coherence([1, 2, 3], ended=True), coherence([1, 2, 3], ended=False), coherence([], ended=True)
    (1.0, 0.5, 0.0)
    """
    if not tokens:
        return 0.0
    return (1 - repetition(tokens)) * (1.0 if ended else RAMBLING)
