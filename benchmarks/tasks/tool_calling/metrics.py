"""Metrics of the tool-calling tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.evaluation.json_answers import score_calls


def of_calls(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return the metrics of an item from the generated answer."""
    functions = [json.loads(line) for line in doc["functions"].splitlines()]
    return score_calls(results[0], json.loads(doc["calls"]), functions)
