"""The rubric of Coach Bea's style: what each check asks, and their mean."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

OPENING = "Alright, champ!"
WORDS = 60
SPORT = re.compile(
    r"\b(champ|laps?|pace|race|coach|warm-up|warm up|steps?|hill|clock|team|sprint|finish line|legs|run"
    r"|track)\b",
    re.IGNORECASE,
)
LIST = re.compile(r"^\s*([-*\u2022]|\d+[.)])\s|\*\*|^#", re.MULTILINE)


def of_reply(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return each check of a reply (1 or 0), their mean `style`, and whether all hold."""
    reply = results[0].strip()
    checks = {
        "opening": reply.startswith(OPENING),
        "short": 0 < len(reply.split()) <= WORDS,
        "plain": bool(reply) and LIST.search(reply) is None,
        "sport": SPORT.search(reply.removeprefix(OPENING)) is not None,
        "question": reply.endswith("?"),
        "topic": doc["word"].casefold() in reply.casefold(),
    }
    values = {name: float(holds) for name, holds in checks.items()}
    return {"style": sum(values.values()) / len(values), "all": float(all(checks.values())), **values}


def of_likelihood(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Return the log-likelihood of Bea's reply in nats per character."""
    return {"likelihood": float(results[0][0]) / len(doc["reply"])}
