"""Sizes and training times of the zoos, as plain data without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from evomerge.errors import UserError, nearest
from evomerge.zoo.rules import RULES

Size = Literal["demo", "tiny"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialistSettings:
    """One fine-tune; replay: share of text and other skills in its data, to keep it close to the base."""

    skill: str
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

    skills: tuple[str, ...]
    layers: int
    hidden: int
    heads: int
    intermediate: int
    base_steps: int
    base_batch: int
    base_learning_rate: float
    text_items: int
    easy_items: int
    hard_items: dict[str, int]
    specialists: tuple[SpecialistSettings, ...]
    architecture: str = "llama"


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

SETTINGS: dict[str, ZooSettings] = {"demo": DEMO, "tiny": TINY}

ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "llama": (),
    "qwen3": ("head_dim",),
    "mistral": (),
    "gemma2": ("head_dim", "query_pre_attn_scalar"),
}
"""Model type -> the keys of its config that must be told the width of a head. Not qwen2, whose tokenizers
transformers 5.23 opens by a class of its own, whatever their files say."""

MOST_SKILLS = 8

_SPECIALISTS: dict[str, tuple[SpecialistSettings, ...]] = {
    "demo": (
        *(specialist for specialist in DEMO.specialists if specialist.skill not in ("reverse", "upper")),
        SpecialistSettings(skill="subtract", learning_rate=1e-3, steps=160),
        *(
            SpecialistSettings(skill=skill, learning_rate=1e-3, steps=120)
            for skill in ("count", "interleave", "swap", "double")
        ),
        SpecialistSettings(skill="complement", learning_rate=2e-3, steps=200),
        SpecialistSettings(skill="cumulate", learning_rate=2e-3, steps=200),
    ),
    "tiny": TINY.specialists,
}
"""Fine-tunes with other settings than the default of their size."""

# Long enough for a base that knows nothing of the hard version; the demo's base needs half of it.
_LEARNING_RATE = {"demo": 1e-3, "tiny": 3e-3}
_STEPS = {"demo": 240, "tiny": 150}


def zoo_settings(
    size: str = "demo", skills: Sequence[str] | None = None, architecture: str = "llama"
) -> ZooSettings:
    """Return the settings of a zoo of these skills; without skills, those of the demo or of the tests' zoo.

    Raises UserError for an unknown size, skill or architecture, and for a number of skills outside 2 to 8.
    """
    if size not in SETTINGS:
        raise UserError(f"unknown zoo size {size!r}", fix=nearest(size, SETTINGS))
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"unknown architecture of a zoo {architecture!r}", fix=nearest(architecture, ARCHITECTURES)
        )
    settings = replace(SETTINGS[size], architecture=architecture)
    if skills is None or tuple(skills) == settings.skills:
        return settings
    for skill in skills:
        if skill not in RULES:
            raise UserError(f"unknown skill {skill!r}", fix=nearest(skill, RULES))
    if not 2 <= len(set(skills)) == len(skills) <= MOST_SKILLS:
        raise UserError(
            "the skills of a zoo do not fit",
            expected=f"2 to {MOST_SKILLS} different skills",
            got=", ".join(skills) or "none",
        )
    few = min(settings.hard_items.values())
    return replace(
        settings,
        skills=tuple(skills),
        hard_items={skill: settings.hard_items.get(skill, few) for skill in skills},
        specialists=tuple(_specialist(size, skill) for skill in skills),
    )


def _specialist(size: str, skill: str) -> SpecialistSettings:
    default = SpecialistSettings(skill=skill, learning_rate=_LEARNING_RATE[size], steps=_STEPS[size])
    return next((settings for settings in _SPECIALISTS[size] if settings.skill == skill), default)
