"""The rules that a winner, or a model, must pass."""

from __future__ import annotations

from evomerge.api.view import View
from evomerge.delivery import gate


class Gate(View):
    """The results of a gate's rules; `passed` says whether all hold."""

    def __init__(self, results: list[gate.RuleResult], suite: str) -> None:
        super().__init__(gate.as_data(results), lambda width: gate.table(results, suite))
        self.results = results

    @property
    def passed(self) -> bool:
        """Whether every rule holds."""
        return gate.passed(self.results)
