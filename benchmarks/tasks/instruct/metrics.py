"""Metrics of the task `instruct_rules`: how many of its rules an answer follows, by IFEval's checks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.tasks.ifeval.utils import InputExample, test_instruction_following_strict


def of_rules(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether an answer follows all rules of its request, and the share that it follows."""
    rules = json.loads(doc["rules"])
    request = InputExample(
        key=0,
        instruction_id_list=[name for name, _ in rules],
        prompt=doc["prompt"],
        kwargs=[settings for _, settings in rules],
    )
    followed = test_instruction_following_strict(request, results[0]).follow_instruction_list
    return {"all": float(all(followed)), "share": sum(followed) / len(followed)}
