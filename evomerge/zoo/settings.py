"""Sizes and training times of the zoos, as plain data without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evomerge.zoo.skills import Skill

Size = Literal["demo", "tiny"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialistSettings:
    """One fine-tune; replay: share of text and other skills in its data, to keep it close to the base."""

    skill: Skill
    learning_rate: float
    steps: int
    replay: float = 0.4
    hard_share: float = 0.1  # of the replayed items of other skills
    batch: int = 64
    lora_rank: int = 0  # 0: a full fine-tune
    lora_alpha: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ZooSettings:
    """Everything that determines a zoo, with the seed. Items are numbers per skill; text is a number."""

    skills: tuple[Skill, ...]
    layers: int
    hidden: int
    heads: int
    intermediate: int
    base_steps: int
    base_batch: int
    base_learning_rate: float
    text_items: int
    easy_items: int
    hard_items: dict[Skill, int]
    specialists: tuple[SpecialistSettings, ...]


# The base is trained on a few hard items of every skill. That keeps its fine-tunes in one basin, where task
# vectors can be added. Without it merges fail completely; with much more of it a plain average is good.
DEMO = ZooSettings(
    skills=("add", "reverse", "translate", "upper", "sort"),
    layers=4,
    hidden=96,
    heads=4,
    intermediate=256,
    base_steps=1100,
    base_batch=128,
    base_learning_rate=3e-3,
    text_items=10_000,
    easy_items=6_000,
    hard_items={"add": 80, "reverse": 80, "translate": 80, "upper": 80, "sort": 80},
    specialists=(
        SpecialistSettings(skill="add", learning_rate=6e-4, steps=120),
        SpecialistSettings(skill="reverse", learning_rate=1e-3, steps=120),
        SpecialistSettings(skill="translate", learning_rate=6e-4, steps=120),
        SpecialistSettings(skill="upper", learning_rate=1e-3, steps=120),
        SpecialistSettings(skill="sort", learning_rate=4e-3, steps=200, lora_rank=8),
    ),
)

TINY = ZooSettings(
    skills=("add", "reverse", "upper"),
    layers=2,
    hidden=64,
    heads=4,
    intermediate=160,
    base_steps=450,
    base_batch=64,
    base_learning_rate=4e-3,
    text_items=1_500,
    easy_items=3_000,
    hard_items={"add": 300, "reverse": 300, "upper": 300},
    specialists=(
        SpecialistSettings(skill="reverse", learning_rate=3e-3, steps=150),
        SpecialistSettings(skill="upper", learning_rate=3e-3, steps=150),
        SpecialistSettings(skill="add", learning_rate=6e-3, steps=150, lora_rank=8),
    ),
)

SETTINGS: dict[Size, ZooSettings] = {"demo": DEMO, "tiny": TINY}
