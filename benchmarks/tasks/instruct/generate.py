"""Generate the data of the task `instruct_rules`: requests with one to three rules that a program can check.

    python benchmarks/tasks/instruct/generate.py

The rules are IFEval's, with the same names and settings. Every topic belongs to one split.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

COUNTS = {"search": 100, "select": 80, "test": 160}
TOPICS = {
    "search": [
        "how rain forms",
        "why people keep pets",
        "a walk in the forest",
        "learning to ride a bicycle",
        "the history of bread",
        "saving water at home",
        "a perfect breakfast",
        "life on a small island",
    ],
    "select": [
        "why leaves change colour",
        "moving to a new city",
        "the first day at school",
        "planting a garden",
        "how bridges carry loads",
        "a day without a phone",
    ],
    "test": [
        "how volcanoes erupt",
        "packing for a long trip",
        "why we sleep",
        "a visit to the market",
        "learning a new language",
        "how bees make honey",
        "a train ride at night",
        "repairing old furniture",
        "the sounds of a city",
        "cooking for friends",
    ],
}
STARTS = [
    "Write a short text about {topic}.",
    "Tell me about {topic}.",
    "Explain {topic} to a child.",
    "Write a blog post about {topic}.",
]
WORDS = ["morning", "river", "careful", "simple", "colour", "reason", "friend", "window", "summer", "stone"]
ENDINGS = ["That is all for today.", "Let me know what you think.", "I hope this helps."]

Rule = tuple[str, dict[str, Any], str]
"""IFEval's name of a rule, its settings, and the sentence that asks for it."""


def rules(rng: random.Random) -> list[Rule]:
    """Return one rule of each kind; no two of them contradict each other."""
    wanted, forbidden = rng.sample(WORDS, 2)
    least, most, bullets = rng.choice([20, 30, 40]), rng.choice([80, 100, 120]), rng.choice([2, 3, 4])
    length: list[Rule] = [
        (
            "length_constraints:number_words",
            {"num_words": least, "relation": "at least"},
            f"Use at least {least} words.",
        ),
        (
            "length_constraints:number_words",
            {"num_words": most, "relation": "less than"},
            f"Use less than {most} words.",
        ),
    ]
    form: list[Rule] = [
        (
            "detectable_format:number_bullet_lists",
            {"num_bullets": bullets},
            f"Your answer must contain exactly {bullets} bullet points, each starting with '* '.",
        ),
        (
            "detectable_format:title",
            {},
            "Give your answer a title, wrapped in double angular brackets: <<title>>.",
        ),
        (
            "detectable_format:number_highlighted_sections",
            {"num_highlights": bullets},
            f"Highlight at least {bullets} parts of your answer with asterisks, like *this*.",
        ),
    ]
    ending = rng.choice(ENDINGS)
    end: list[Rule] = [
        ("startend:end_checker", {"end_phrase": ending}, f"End with exactly this sentence: {ending}"),
        ("startend:quotation", {}, "Wrap your whole answer in double quotation marks."),
    ]
    return [
        rng.choice(length),
        rng.choice(form),
        rng.choice(end),
        ("keywords:existence", {"keywords": [wanted]}, f"Use the word '{wanted}'."),
        ("keywords:forbidden_words", {"forbidden_words": [forbidden]}, f"Do not use the word '{forbidden}'."),
        ("punctuation:no_comma", {}, "Do not use any commas."),
    ]


def main() -> None:
    out = Path(__file__).parent / "data"
    out.mkdir(exist_ok=True)
    for split, count in COUNTS.items():
        rng = random.Random(f"instruct {split}")
        rows: dict[str, dict[str, str]] = {}
        for number in itertools.count():
            topic = TOPICS[split][number % len(TOPICS[split])]
            chosen = rng.sample(rules(rng), 1 + number % 3)
            prompt = " ".join(
                [rng.choice(STARTS).format(topic=topic), *(sentence for *_, sentence in chosen)]
            )
            rows[prompt] = {"prompt": prompt, "rules": json.dumps([rule[:2] for rule in chosen])}
            if len(rows) == count:
                break
        lines = "".join(json.dumps(row) + "\n" for row in rows.values())
        (out / f"instruct_rules.{split}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
