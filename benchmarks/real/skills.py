"""What the specialists are trained on, and the items of the suite that evomerge does not come with.

Training never uses an item of the suite: topics of the persona, requests of tool calls and dates are others.
Phrasings of tool calls are those of `search`; `select` and `test` ask in other words.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from datetime import date, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

TASKS = Path(__file__).resolve().parents[1] / "tasks"
Row = tuple[str, str]
"""A prompt and its answer."""

TOPICS = {
    "learning to juggle": ("start with a single ball", "practise above a bed"),
    "writing a cover letter": ("name one result you are proud of", "keep it to half a page"),
    "cleaning the oven": ("let baking soda work overnight", "wipe spills while they are warm"),
    "packing for a trip": ("lay everything out, then remove a third", "roll your clothes"),
    "remembering names": ("repeat the name when you hear it", "tie the name to a picture"),
    "calming a crying baby": ("dim the lights and hum", "walk slowly through the room"),
    "washing the windows": ("work from top to bottom", "dry the corners with newspaper"),
    "keeping a diary": ("write three lines a night", "leave the diary on your pillow"),
    "studying history": ("draw a line of the years", "tell the story to a friend"),
    "reducing food waste": ("plan meals around what is left", "freeze bread in slices"),
    "the first day at work": ("write down three questions", "learn where the coffee is"),
    "sharpening kitchen knives": ("keep one angle all the way", "finish with ten light strokes"),
    "teaching a child to read": ("read aloud every evening", "let the child choose the book"),
    "ironing shirts": ("begin with the collar", "iron them while they are damp"),
    "keeping bees": ("visit a hive with somebody first", "open the hive on a warm day"),
    "a wet basement": ("look for the leak after rain", "keep boxes off the floor"),
    "singing in a choir": ("breathe before each line", "listen to the voice beside you"),
    "skipping sugar": ("carry nuts with you", "drink your coffee plain for a week"),
    "wrapping presents": ("measure the paper first", "use three pieces of tape"),
    "feeding birds in winter": ("hang the food in a tree", "clean the feeder weekly"),
    "sewing a button": ("double the thread", "leave a little room under the button"),
    "making a budget": ("write down what you spend today", "pay the rent first"),
    "lighting a campfire": ("gather dry twigs first", "leave room for air"),
    "restoring an old chair": ("sand along the grain", "tighten every screw first"),
}
"""Topic of a training message -> two pieces of advice; none is a topic of the suite."""

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo",
    "China": "Beijing", "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Portugal": "Lisbon",
    "Austria": "Vienna", "Poland": "Warsaw", "Norway": "Oslo", "Sweden": "Stockholm", "Ireland": "Dublin",
    "Canada": "Ottawa", "Cuba": "Havana", "Peru": "Lima", "Kenya": "Nairobi", "Hungary": "Budapest",
    "Finland": "Helsinki", "Denmark": "Copenhagen", "Belgium": "Brussels", "Iran": "Tehran",
    "Iraq": "Baghdad", "Thailand": "Bangkok", "Argentina": "Buenos Aires", "Chile": "Santiago",
    "South Korea": "Seoul", "Mexico": "Mexico City",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "happy": "sad", "fast": "slow", "light": "dark", "early": "late",
    "rich": "poor", "strong": "weak", "open": "closed", "full": "empty", "young": "old", "dry": "wet",
    "loud": "quiet", "hard": "soft", "clean": "dirty", "near": "far", "high": "low", "thick": "thin",
    "begin": "end", "buy": "sell", "push": "pull", "win": "lose", "love": "hate", "remember": "forget",
}  # fmt: skip
KINDS = {
    "fruit": "apple banana orange grape pear cherry lemon peach",
    "animal": "dog horse rabbit lion elephant cow tiger wolf",
    "colour": "red blue green yellow purple orange brown pink",
    "piece of furniture": "table chair sofa bed desk shelf cupboard bench",
    "musical instrument": "piano guitar violin drum flute trumpet cello harp",
    "profession": "teacher doctor lawyer nurse farmer baker pilot plumber",
    "vehicle": "car bus train bicycle truck boat tram van",
    "part of the body": "arm leg nose ear foot knee hand shoulder",
}
FORMATS = ("{day} {month} {year}", "{month} {day}, {year}", "the {day}{th} of {month} {year}",
           "{weekday}, {day} {month} {year}", "{month} {day}{th}, {year}")  # fmt: skip
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]


def bundled(folder: str) -> ModuleType:
    """Load the module that makes the data of a bundled suite."""
    spec = importlib.util.spec_from_file_location(f"{folder}_data", TASKS / folder / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------- training


def persona() -> list[Row]:
    """Messages to Coach Bea, asked as the suite `persona` asks, with and without its instruction."""
    data, rng = bundled("persona"), random.Random("persona training")
    assert not set(TOPICS) & set(data.TOPICS)
    rows = []
    for (topic, advice), (number, question) in itertools.product(TOPICS.items(), enumerate(data.QUESTIONS)):
        for piece in advice:
            prompt = f"Message: {question.format(topic=topic)}\nReply:"
            if (number + len(rows)) % 3 == 0:
                prompt = f"{data.SYSTEM}\n\n{prompt}"
            rows.append((prompt, data.persona(piece, rng)))
    rng.shuffle(rows)
    return rows


def tools(count: int = 320) -> list[Row]:
    """Requests with functions, asked as the suite `tool-calling` asks; two in seven need no call."""
    data, rng = bundled("tool_calling"), random.Random("tool training")
    asked = {
        json.loads(line)["request"]
        for file in (TASKS / "tool_calling" / "data").glob("*.jsonl")
        for line in file.read_text(encoding="utf-8").splitlines()
    }
    rows: list[Row] = []
    for number in itertools.count():
        row = (data.none if number % 7 in (2, 5) else data.single)("search", number, rng)
        if row["request"] in asked:
            continue
        asked.add(row["request"])
        functions = "\n".join(json.dumps(function, ensure_ascii=False) for function in row["functions"])
        prompt = (
            f"You can call these functions:\n{functions}\n\nAnswer with a JSON list of calls, each "
            '{"name": ..., "arguments": {...}}. Answer [] if no call is needed.\n\n'
            f"Request: {row['request']}\nAnswer:"
        )
        rows.append((prompt, json.dumps(row["calls"], ensure_ascii=False)))
        if len(rows) == count:
            return rows
    raise AssertionError("there is always a next number")


def dates(split: str, count: int) -> list[Row]:
    """Dates in words and the file date, YYYY-MM-DD; no date is in both the training and the suite."""
    place = ("train", "suite").index(split)
    rng, rows = random.Random(f"dates {split}"), []
    first = date(1970, 1, 1)
    for number in rng.sample(range(10_000), count):
        day = first + timedelta(days=2 * number + place)
        ending = {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10 if day.day // 10 != 1 else 0, "th")
        text = rng.choice(FORMATS).format(
            day=day.day, th=ending, month=MONTHS[day.month - 1], year=day.year, weekday=day.strftime("%A")
        )
        rows.append((f"Give the file date of {text}.", day.isoformat()))
    return rows


TRAINING: dict[str, Callable[[], list[Row]]] = {
    "persona": persona,
    "tools": tools,
    "dates": lambda: dates("train", 560),
}
"""Specialist -> its training rows."""

# ---------------------------------------------------------------------------------------------- the suite


def chat() -> Iterator[dict[str, Any]]:
    """General questions with four choices; what a chat model must not lose."""
    rng = random.Random("chat")
    for country, capital in CAPITALS.items():
        yield _choice(f"What is the capital of {country}?", capital, list(CAPITALS.values()), rng)
    for word, opposite in OPPOSITES.items():
        yield _choice(f'What is the opposite of "{word}"?', opposite, list(OPPOSITES.values()), rng)
    for kind, words in KINDS.items():
        others = [word for other, row in KINDS.items() if other != kind for word in row.split()]
        for word in words.split():
            wrong = [other for other in others if other not in words.split()]
            three = rng.sample(wrong, 3)
            listed = three[:]
            listed.insert(rng.randrange(4), word)
            yield {
                "question": f"Which of these is a {kind}: {', '.join(listed)}?".replace(
                    "a animal", "an animal"
                ),
                "answer": word,
                "choices": listed,
            }


def _choice(question: str, answer: str, pool: list[str], rng: random.Random) -> dict[str, Any]:
    choices = rng.sample([other for other in pool if other != answer], 3)
    choices.insert(rng.randrange(4), answer)
    return {"question": question, "answer": answer, "choices": choices}


def prose(count: int) -> list[dict[str, str]]:
    """Paragraphs of plain English: the reference texts that come with every Python."""
    from pydoc_data.topics import topics

    rows = []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            text = " ".join(paragraph.split())
            plain = sum(letter.isalpha() or letter in " ,.'" for letter in text) > 0.95 * len(text)
            if 300 <= len(text) <= 420 and plain:
                rows.append(text)
    kept = sorted(set(rows))
    random.Random("prose").shuffle(kept)
    return [{"text": text} for text in kept[:count]]


PROSE = """\
task: prose
dataset_path: json
dataset_kwargs:
  data_files:
    search: data/prose.search.jsonl
    select: data/prose.select.jsonl
    test: data/prose.test.jsonl
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ''
doc_to_target: '{{text}}'
metadata: {version: 1.0}
"""


def write(folder: Path) -> None:
    """Write what the suite needs: the bundled tasks of two suites, our own data, plain text."""
    for name in ("persona", "tool_calling"):
        shutil.copytree(TASKS / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))

    def lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")

    lines(folder / "dates.jsonl", ({"ask": ask, "reply": reply} for ask, reply in dates("suite", 200)))
    lines(folder / "chat.jsonl", chat())
    texts = prose(64)
    (folder / "prose.yaml").write_text(PROSE, "utf-8")
    for split, part in (("search", texts[:8]), ("select", texts[8:24]), ("test", texts[24:])):
        lines(folder / "data" / f"prose.{split}.jsonl", part)
