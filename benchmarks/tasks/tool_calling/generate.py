"""Generate the data of the suite `tool-calling`: requests, the functions on offer, and the right calls.

    python benchmarks/tasks/tool_calling/generate.py

Every phrasing belongs to one split, so that the held-out items are also asked in other words.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

SPLITS = ("search", "select", "test")
COUNTS = {
    "single": {"search": 96, "select": 72, "test": 160},
    "parallel": {"search": 48, "select": 40, "test": 80},
    "none": {"search": 64, "select": 48, "test": 100},
}

CITIES = [
    "Rome",
    "Oslo",
    "Lisbon",
    "Kyoto",
    "Toronto",
    "Nairobi",
    "Vienna",
    "Dublin",
    "Lima",
    "Prague",
    "Boston",
    "Delhi",
    "Helsinki",
    "Quito",
]
PEOPLE = [
    "Anna",
    "Ben",
    "Carla",
    "Deniz",
    "Emil",
    "Farah",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Luis",
    "Mona",
    "Nils",
    "Olga",
    "Priya",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
HOURS = ["07:00", "08:30", "09:15", "10:00", "11:45", "13:00", "14:30", "16:00", "17:20", "19:00", "20:45"]
MINUTES = [3, 5, 8, 10, 12, 15, 20, 25, 30, 40, 45, 50, 90]
ROOMS = ["kitchen", "bedroom", "office", "garage", "hallway", "living room"]
ARTISTS = ["Adele", "Coldplay", "Rihanna", "Radiohead", "Shakira", "Björk", "Nina Simone"]
LANGUAGES = ["French", "Spanish", "Italian", "Swedish", "Turkish", "Polish", "Dutch", "Korean"]
PHRASES = [
    "good morning",
    "where is the station",
    "thank you very much",
    "see you tomorrow",
    "I am lost",
    "the bill, please",
    "happy birthday",
    "how much is this",
    "nice to meet you",
]
PRODUCTS = [
    "tennis racket",
    "desk lamp",
    "coffee grinder",
    "rain jacket",
    "phone case",
    "yoga mat",
    "tea kettle",
    "backpack",
    "garden chair",
]
TOPICS = [
    "solar panels",
    "black holes",
    "sourdough",
    "the Silk Road",
    "bee colonies",
    "electric cars",
    "the Dead Sea",
    "jazz history",
    "volcanoes",
]
TASKS = [
    "water the plants",
    "call the dentist",
    "pay the rent",
    "buy stamps",
    "send the invoice",
    "feed the cat",
    "book the flights",
    "return the library books",
]
SUBJECTS = [
    "the quarterly report",
    "our lunch on Friday",
    "the broken printer",
    "the new schedule",
    "your invoice",
    "the team photo",
    "the parking permit",
]
CURRENCIES = ["EUR", "USD", "GBP", "JPY", "CHF", "SEK", "CAD"]
DISHES = ["lentil soup", "pumpkin pie", "mushroom risotto", "banana bread", "chicken curry", "potato salad"]
UNITS = [("kilometers", "miles"), ("kilograms", "pounds"), ("liters", "gallons"), ("meters", "feet")]
STOCKS = ["AAPL", "MSFT", "TSLA", "NVDA", "AMZN", "SAP", "NKE"]
LEVELS = [10, 20, 25, 30, 40, 50, 60, 70, 75, 80, 90]
DEGREES = [17, 18, 19, 20, 21, 22, 23, 24]


def text(*values: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)} if values else {"type": "string"}


NUMBER, INTEGER = {"type": "number"}, {"type": "integer"}

# name, description, {argument: (schema, values)}, phrasings. Arguments are drawn from `values`.
FUNCTIONS: list[tuple[str, str, dict[str, tuple[dict[str, Any], list[Any]]], list[str]]] = [
    (
        "get_weather",
        "Current weather or forecast of a city.",
        {"city": (text(), CITIES), "day": (text("today", "tomorrow"), ["today", "tomorrow"])},
        [
            "What's the weather like in {city} {day}?",
            "Will it rain in {city} {day}?",
            "Do I need a coat in {city} {day}?",
            "I'm in {city} {day}. How warm will it get?",
            "Tell me the forecast for {city}, {day}.",
            "Is it going to be sunny in {city} {day}?",
        ],
    ),
    (
        "set_timer",
        "Start a countdown.",
        {"minutes": (INTEGER, MINUTES)},
        [
            "Set a timer for {minutes} minutes.",
            "Wake me from my nap in {minutes} minutes.",
            "Count down {minutes} minutes, please.",
            "The pasta needs {minutes} minutes; set a timer.",
            "Give me {minutes} minutes on the clock.",
            "Ping me once {minutes} minutes have gone by.",
        ],
    ),
    (
        "create_event",
        "Put an event into the calendar.",
        {
            "title": (
                text(),
                [
                    "dentist appointment",
                    "team lunch",
                    "piano lesson",
                    "haircut",
                    "book club",
                    "job interview",
                ],
            ),
            "day": (text(*DAYS), DAYS),
            "time": (text(), HOURS),
        },
        [
            "Put '{title}' in my calendar for {day} at {time}.",
            "I have a {title} on {day}, {time}. Save it.",
            "Block {time} on {day} for the {title}.",
            "Schedule my {title}: {day}, {time}.",
            "Add {title} to {day} at {time}, please.",
            "My {title} is on {day} at {time}; please note it down.",
        ],
    ),
    (
        "send_message",
        "Send a text message to a contact.",
        {
            "to": (text(), PEOPLE),
            "text": (
                text(),
                [
                    "I am running late",
                    "the meeting is moved",
                    "dinner is ready",
                    "call me back",
                    "the train was cancelled",
                    "I got the tickets",
                ],
            ),
        },
        [
            "Text {to}: {text}",
            "Let {to} know: {text}",
            "Send {to} this message: {text}",
            "Write to {to}, saying: {text}",
            "Tell {to} the following: {text}",
            "Message for {to}: {text}",
        ],
    ),
    (
        "send_email",
        "Send an email to a contact.",
        {"to": (text(), PEOPLE), "subject": (text(), SUBJECTS)},
        [
            "Email {to} about {subject}.",
            "Send {to} an email with the subject '{subject}'.",
            "Write {to} a mail regarding {subject}.",
            "Drop {to} an email: {subject}.",
            "I need to email {to}; the subject is {subject}.",
            "Mail {to}. Subject: {subject}.",
        ],
    ),
    (
        "set_light",
        "Switch or dim the lights of a room.",
        {"room": (text(*ROOMS), ROOMS), "percent": (INTEGER, [0, *LEVELS, 100])},
        [
            "Dim the {room} lights to {percent} percent.",
            "Set the light in the {room} to {percent}%.",
            "Make the {room} light {percent} percent bright.",
            "{room} lights at {percent}%, please.",
            "I'd like the lights in the {room} at {percent} percent.",
            "Put the {room} lamp on {percent} percent.",
        ],
    ),
    (
        "set_thermostat",
        "Set the target temperature of a room, in degrees Celsius.",
        {"room": (text(*ROOMS), ROOMS), "degrees": (NUMBER, DEGREES)},
        [
            "Heat the {room} to {degrees} degrees.",
            "Make it {degrees} degrees in the {room}.",
            "The {room} should be at {degrees} degrees.",
            "Set the {room} to {degrees} °C.",
            "Turn the heating in the {room} to {degrees}.",
            "I want {degrees} degrees in the {room}.",
        ],
    ),
    (
        "play_music",
        "Play songs of an artist.",
        {"artist": (text(), ARTISTS)},
        [
            "Play something by {artist}.",
            "Put on some {artist}.",
            "I'm in the mood for {artist}.",
            "Start a {artist} playlist.",
            "Let's hear {artist}.",
            "Can you play {artist} for me?",
        ],
    ),
    (
        "translate",
        "Translate a text.",
        {"text": (text(), PHRASES), "language": (text(), LANGUAGES)},
        [
            "How do you say '{text}' in {language}?",
            "Translate '{text}' into {language}.",
            "What is '{text}' in {language}?",
            "I need '{text}' in {language}.",
            "Give me the {language} for '{text}'.",
            "Put '{text}' into {language}, please.",
        ],
    ),
    (
        "search_products",
        "Search the shop.",
        {"query": (text(), PRODUCTS), "max_price": (NUMBER, [15, 20, 30, 40, 50, 75, 100])},
        [
            "Find me a {query} for under {max_price} euros.",
            "Show me a {query} for up to {max_price} euros.",
            "I want to buy a {query}; at most {max_price} euros.",
            "Look for a {query}, no more than {max_price} euros.",
            "Is there a {query} for less than {max_price} euros?",
            "Search the shop: {query}, maximum {max_price} euros.",
        ],
    ),
    (
        "search_wikipedia",
        "Search the encyclopedia.",
        {"query": (text(), TOPICS)},
        [
            "Look up {query} on Wikipedia.",
            "Find the Wikipedia article about {query}.",
            "Open Wikipedia and search for {query}.",
            "Get me the encyclopedia entry on {query}.",
            "Search Wikipedia for {query}.",
            "Pull up the Wikipedia page on {query}.",
        ],
    ),
    (
        "add_task",
        "Add a task to the to-do list.",
        {"task": (text(), TASKS), "day": (text(*DAYS), DAYS)},
        [
            "Remind me to {task} on {day}.",
            "Add '{task}' to my list for {day}.",
            "I have to {task} on {day}, note it.",
            "To-do for {day}: {task}.",
            "Don't let me forget to {task} on {day}.",
            "Put '{task}' on {day}'s to-do list.",
        ],
    ),
    (
        "convert_currency",
        "Convert an amount of money.",
        {
            "amount": (NUMBER, [5, 12, 20, 45, 80, 120, 250, 999]),
            "source": (text(*CURRENCIES), CURRENCIES),
            "target": (text(*CURRENCIES), CURRENCIES),
        },
        [
            "How much is {amount} {source} in {target}?",
            "Convert {amount} {source} to {target}.",
            "What do I get in {target} for {amount} {source}?",
            "{amount} {source} in {target}, please.",
            "Change {amount} {source} into {target}.",
            "Give me {amount} {source} as {target}.",
        ],
    ),
    (
        "find_route",
        "Find a route between two cities.",
        {
            "start": (text(), CITIES),
            "end": (text(), CITIES),
            "by": (text("car", "train", "bus"), ["car", "train", "bus"]),
        },
        [
            "How do I get from {start} to {end} by {by}?",
            "Find a route from {start} to {end} by {by}.",
            "I'm going from {start} to {end} by {by}. Plan it.",
            "Plan a {by} trip from {start} to {end}.",
            "What's the best {by} connection between {start} and {end}? I start in {start}.",
            "Take me from {start} to {end}, by {by}.",
        ],
    ),
    (
        "get_stock_price",
        "Latest price of a share.",
        {"symbol": (text(), STOCKS)},
        [
            "What's {symbol} trading at?",
            "Price of {symbol}, please.",
            "How is {symbol} doing on the stock market?",
            "Check the {symbol} share price.",
            "Look up the quote for {symbol}.",
            "Where does {symbol} stand right now?",
        ],
    ),
    (
        "find_recipe",
        "Find a recipe.",
        {"dish": (text(), DISHES), "servings": (INTEGER, [2, 3, 4, 6, 8])},
        [
            "Find a recipe for {dish}, {servings} servings.",
            "I want to cook {dish} for {servings} people.",
            "How do I make {dish} for {servings}? Find me a recipe.",
            "Look for {dish}, enough for {servings}.",
            "Recipe for {dish} that serves {servings}, please.",
            "We are {servings} tonight; get me a {dish} recipe.",
        ],
    ),
    (
        "call_contact",
        "Call a contact by phone.",
        {"name": (text(), PEOPLE)},
        [
            "Call {name}.",
            "Get {name} on the phone.",
            "I need to speak to {name}, dial now.",
            "Ring {name} for me.",
            "Phone {name}, please.",
            "Start a call with {name}.",
        ],
    ),
    (
        "book_table",
        "Book a table at a restaurant.",
        {
            "restaurant": (text(), ["Luigi's", "The Blue Door", "Sakura", "Café Central", "Old Mill"]),
            "people": (INTEGER, [2, 3, 4, 5, 6, 8]),
            "time": (text(), HOURS[7:]),
        },
        [
            "Book a table for {people} at {restaurant} at {time}.",
            "Reserve {restaurant} for {people} people, {time}.",
            "Get us a table at {restaurant}: {people} people, {time}.",
            "{people} of us want to eat at {restaurant} at {time}. Book it.",
            "Table for {people}, {restaurant}, {time}, please.",
            "Make a reservation at {restaurant} for {people} at {time}.",
        ],
    ),
    (
        "set_volume",
        "Set the speaker's volume.",
        {"percent": (INTEGER, [0, *LEVELS, 100])},
        [
            "Set the volume to {percent} percent.",
            "Volume {percent}, please.",
            "Turn the sound to {percent} percent.",
            "Make it {percent} percent loud.",
            "Put the speaker on {percent}%.",
            "I want the volume at {percent} percent.",
        ],
    ),
    (
        "convert_units",
        "Convert a quantity.",
        {
            "value": (NUMBER, [2, 3.5, 7, 10, 12, 26, 42, 150]),
            "source": (text(), [a for a, _ in UNITS]),
            "target": (text(), [b for _, b in UNITS]),
        },
        [
            "How many {target} are {value} {source}?",
            "Convert {value} {source} to {target}.",
            "{value} {source} is how many {target}?",
            "Express {value} {source} in {target}.",
            "What are {value} {source} in {target}?",
            "Turn {value} {source} into {target}.",
        ],
    ),
    (
        "track_package",
        "Where a package is.",
        {"number": (text(), ["PK4471", "PK9032", "ZX118", "ZX740", "AB2056", "AB3319", "QT677"])},
        [
            "Where is package {number}?",
            "Track my parcel {number}.",
            "Has {number} been delivered? Track it.",
            "Check the delivery status of {number}.",
            "Follow shipment {number} for me.",
            "When will parcel {number} arrive?",
        ],
    ),
    (
        "take_note",
        "Save a note.",
        {
            "text": (
                text(),
                [
                    "the wifi password is on the fridge",
                    "paint colour for the hall: sage green",
                    "Mona likes dark chocolate",
                    "the spare key is with Emil",
                    "shoe size 42",
                ],
            )
        },
        [
            "Take a note: {text}",
            "Write this down: {text}",
            "Note to self: {text}",
            "Save this for later: {text}",
            "Remember this: {text}",
            "Keep a note saying: {text}",
        ],
    ),
]

FACTS = [
    "What is the capital of {country}?",
    "Which language do people speak in {country}?",
    "Tell me one fun fact about the {animal}.",
    "How many legs does a {animal} have?",
    "Why is the sky blue?",
    "Who wrote {book}?",
    "What is {a} plus {b}?",
    "Is {a} larger than {b}?",
    "Give me a word that rhymes with '{word}'.",
    "What does the word '{word}' mean?",
    "Write one sentence about a {animal}.",
    "Thanks, that was all for today!",
    "Good evening! How are you?",
    "What do you think of {book}?",
    "Spell '{word}' backwards.",
    "Name three colours.",
    "Can you explain what a {thing} is?",
    "I feel a bit tired today.",
    "Tell me a joke about a {animal}.",
    "What's the opposite of '{opposite}'?",
    "How would you describe the taste of {food}?",
    "Is {food} healthy?",
    "Which is faster, a {animal} or a snail?",
    "You are very helpful, thank you.",
]
FILLINGS = {
    "country": [
        "Italy",
        "Norway",
        "Portugal",
        "Japan",
        "Canada",
        "Kenya",
        "Austria",
        "Ireland",
        "Peru",
        "Finland",
        "Spain",
        "Greece",
        "Chile",
    ],
    "animal": ["cat", "spider", "horse", "penguin", "dolphin", "rabbit", "falcon", "turtle", "fox"],
    "book": ["Hamlet", "Moby Dick", "Emma", "The Hobbit", "Frankenstein", "Dracula"],
    "a": [3, 7, 12, 18, 25, 31, 44],
    "b": [5, 9, 14, 16, 28, 33, 50],
    "word": ["light", "moon", "river", "stone", "bright", "candle", "garden", "winter"],
    "thing": ["volcano", "compass", "sonnet", "prime number", "glacier", "telescope"],
    "opposite": ["cold", "early", "heavy", "loud", "empty", "brave"],
    "food": ["spinach", "honey", "olive oil", "ginger", "cheese", "rye bread"],
}


def schema(function: tuple[Any, ...]) -> dict[str, Any]:
    name, about, arguments, _ = function
    return {
        "name": name,
        "description": about,
        "parameters": {
            "type": "object",
            "properties": {argument: kind for argument, (kind, _) in arguments.items()},
            "required": list(arguments),
            "additionalProperties": False,
        },
    }


def phrasings(templates: list[str], split: str) -> list[str]:
    """The templates of a split: every third one is for the search, every sixth for the selection."""
    numbers = {"search": (0, 3), "select": (1,), "test": (2, 4, 5)}[split]
    return [template for number, template in enumerate(templates) if number % 6 in numbers]


def call(function: tuple[Any, ...], rng: random.Random) -> dict[str, Any]:
    name, _, arguments, _ = function
    values = {argument: rng.choice(choices) for argument, (_, choices) in arguments.items()}
    if name == "convert_units":
        values["source"], values["target"] = rng.choice(UNITS)
    for first, second in (("source", "target"), ("start", "end")):
        if first in values and name != "convert_units":
            while values[first] == values[second]:
                values[second] = rng.choice(arguments[second][1])
    return {"name": name, "arguments": values}


def request(function: tuple[Any, ...], made: dict[str, Any], split: str, rng: random.Random) -> str:
    return rng.choice(phrasings(function[3], split)).format(**made["arguments"])


def offered(used: list[tuple[Any, ...]], rng: random.Random, least: int = 2) -> list[dict[str, Any]]:
    others = [function for function in FUNCTIONS if function not in used]
    chosen = [*used, *rng.sample(others, rng.randint(least, 3))]
    rng.shuffle(chosen)
    return [schema(function) for function in chosen]


def joined(first: str, second: str, rng: random.Random) -> str:
    lowered = (
        second[0].lower() + second[1:] if not second.startswith(("I ", "I'", *CITIES, *PEOPLE)) else second
    )
    middle = first.rstrip(".")
    if middle[-1] in "?!":
        return rng.choice([f"{middle} And {lowered}", f"{middle} Also, {lowered}"])
    return rng.choice(
        [f"{middle}. Also, {lowered}", f"{middle}, and then: {lowered}", f"{middle}. After that, {lowered}"]
    )


def single(split: str, number: int, rng: random.Random) -> dict[str, Any]:
    function = FUNCTIONS[number % len(FUNCTIONS)]
    made = call(function, rng)
    return {
        "request": request(function, made, split, rng),
        "functions": offered([function], rng),
        "calls": [made],
    }


def parallel(split: str, number: int, rng: random.Random) -> dict[str, Any]:
    first = FUNCTIONS[number % len(FUNCTIONS)]
    second = first if number % 4 == 0 else rng.choice([f for f in FUNCTIONS if f is not first])
    calls = [call(first, rng), call(second, rng)]
    while second is first and subject(calls[0]) == subject(calls[1]):
        calls[1] = call(second, rng)
    texts = [request(f, made, split, rng) for f, made in zip((first, second), calls, strict=True)]
    used = [first] if second is first else [first, second]
    return {"request": joined(*texts, rng), "functions": offered(used, rng, least=1), "calls": calls}


def subject(made: dict[str, Any]) -> Any:
    """What a call is about: its first argument."""
    return next(iter(made["arguments"].values()))


def none(split: str, number: int, rng: random.Random) -> dict[str, Any]:
    if number % 3 == 0:  # a request for a function that is not on offer
        function = rng.choice(FUNCTIONS)
        made = call(function, rng)
        others = rng.sample(
            [f for f in FUNCTIONS if f is not function and related(f, function)], rng.randint(2, 4)
        )
        return {
            "request": request(function, made, split, rng),
            "functions": [schema(f) for f in others],
            "calls": [],
        }
    template = rng.choice(phrasings(FACTS, split))
    values = {name: rng.choice(choices) for name, choices in FILLINGS.items()}
    return {"request": template.format(**values), "functions": offered([], rng), "calls": []}


CLOSE = [
    {"set_light", "set_thermostat", "set_volume"},
    {"send_message", "send_email", "call_contact"},
    {"add_task", "create_event", "take_note", "set_timer"},
    {"convert_currency", "convert_units"},
    {"search_products", "search_wikipedia", "find_recipe"},
]


def related(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two functions could both serve a request; such pairs are not used for requests without a call."""
    return not any({a[0], b[0]} <= group for group in CLOSE)


def main() -> None:
    out = Path(__file__).parent / "data"
    out.mkdir(exist_ok=True)
    for kind, make in (("single", single), ("parallel", parallel), ("none", none)):
        seen: set[str] = set()
        for split in SPLITS:
            rng = random.Random(f"tool calling {kind} {split}")
            rows: list[dict[str, Any]] = []
            for number in itertools.count():
                row = make(split, number, rng)
                if row["request"] in seen:
                    continue
                seen.add(row["request"])
                shown = "\n".join(json.dumps(function, ensure_ascii=False) for function in row["functions"])
                rows.append(
                    {
                        "request": row["request"],
                        "functions": shown,
                        "calls": json.dumps(row["calls"], ensure_ascii=False),
                    }
                )
                if len(rows) == COUNTS[kind][split]:
                    break
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (out / f"tool_{kind}.{split}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
