"""The demo zoo: a small base model and specialists trained from scratch, with the tasks that score them.

`build_zoo` trains a zoo, `write_tasks` writes its lm-eval tasks, and `demo_zoo` is the zoo in the package.
Importing this does not import torch; training does.
"""

from __future__ import annotations

from pathlib import Path

from evomerge.zoo.build import ModelCard, ZooCard, build_zoo
from evomerge.zoo.tasks import write_tasks

__all__ = ["ModelCard", "ZooCard", "build_zoo", "demo_zoo", "write_tasks"]


def demo_zoo() -> Path:
    """Return the folder of the packaged zoo: base, four specialists, the adapter ``sort``, zoo.json."""
    return Path(__file__).parent / "demo"
