"""Scores as what the surrogate learns from: columns of items per block, and their means per task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.special

from evomerge.evaluation import statistics
from evomerge.evaluation.scores import Array, Scores
from evomerge.search.surrogate.margins import CLIP, SOFTNESS, Outputs


class Observed:
    """Turns scores into what the surrogate learns: columns per block, and their means per task.

    tasks: as in MeanLoss. base: the base's scores on every block, for the number of items in each.
    """

    def __init__(self, tasks: Sequence[str], base: Sequence[Scores]) -> None:
        self._tasks = tuple(tasks)
        self._counts = [[len(part[task].metric) for task in tasks] for part in base]
        self._margins = [base[0][task].margin is not None for task in tasks]
        self.outputs = tuple(
            Outputs(
                task=np.repeat(np.arange(len(tasks)), counts),
                margins=np.repeat(np.array(self._margins), counts),
            )
            for counts in self._counts
        )

    def columns(self, scores: Scores) -> dict[int, Array]:
        """Return the outputs of each block that scores hold."""
        at = [0] * len(self._tasks)
        columns: dict[int, Array] = {}
        for block in scores.blocks:
            parts = []
            for index, (task, margins) in enumerate(zip(self._tasks, self._margins, strict=True)):
                values = scores[task].margin if margins else scores[task].metric
                assert values is not None
                stop = at[index] + self._counts[block][index]
                parts.append(values[at[index] : stop])
                at[index] = stop
            columns[block] = np.concatenate(parts)
        return columns

    def means(self, columns: dict[int, Array], blocks: Sequence[int]) -> Array:
        """Return (tasks,) means over blocks, right answers counted as softly as the surrogate does."""
        sums, counts = np.zeros(len(self._tasks)), np.zeros(len(self._tasks))
        for block in blocks:
            outputs, value = self.outputs[block], self._soft(columns, block)
            sums += np.bincount(outputs.task, weights=value, minlength=len(sums))
            counts += np.bincount(outputs.task, minlength=len(sums))
        means: Array = sums / np.maximum(counts, 1)
        return means

    def errors(
        self, columns: dict[int, Array], references: Sequence[dict[int, Array]], blocks: Sequence[int]
    ) -> Array:
        """Return (tasks,) standard errors of the means' differences to the references' mean, item by item."""
        found = np.zeros(len(self._tasks))
        tasks = np.concatenate([self.outputs[block].task for block in blocks])
        parts = [
            self._soft(columns, block) - np.mean([self._soft(each, block) for each in references], axis=0)
            for block in blocks
        ]
        differences = np.concatenate(parts)
        for task in range(len(found)):
            own = differences[tasks == task]
            found[task] = statistics.standard_error(own)
        return found

    def _soft(self, columns: dict[int, Array], block: int) -> Array:
        values = columns[block]
        soft = scipy.special.ndtr(np.clip(values, -CLIP, CLIP) / SOFTNESS)
        return np.where(self.outputs[block].margins, soft, values)
