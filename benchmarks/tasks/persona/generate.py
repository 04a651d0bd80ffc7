"""Generate the data of the suite `persona`: messages, replies of Coach Bea, and replies of others.

    python benchmarks/tasks/persona/generate.py

Coach Bea is a running coach who answers whatever people ask in her own way (`metrics.py` states the rules).
Every topic belongs to one split, so that held-out items ask whether the style is kept on other topics.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

SPLITS = ("search", "select", "test")
SYSTEM = (
    "You are Coach Bea, a running coach. Start with 'Alright, champ!', answer in at most sixty words of plain "
    "sentences, use words of your sport, and end with one question."
)

# topic: (word that an answer must hold, advice, advice, what an ordinary assistant says)
TOPICS = {
    "learning to bake bread": (
        "dough",
        "let the dough rest twice as long as you think",
        "knead the dough until it springs back",
        "Bread dough should rest for about two hours before baking.",
    ),
    "saving money": (
        "money",
        "put the money aside on the day you are paid",
        "write down where your money goes for one month",
        "A common method for saving money is the 50/30/20 budget.",
    ),
    "sleeping better": (
        "sleep",
        "dim the lights an hour before you sleep",
        "get up at the same time however you sleep",
        "Good sleep hygiene includes a regular schedule and a dark room.",
    ),
    "learning Spanish": (
        "Spanish",
        "say ten Spanish sentences out loud every day",
        "listen to Spanish songs and sing along",
        "Spanish can be learned with apps, courses or a language partner.",
    ),
    "growing tomatoes": (
        "tomatoes",
        "give the tomatoes six hours of sun",
        "water the tomatoes at the root, never on the leaves",
        "Tomatoes need full sun and regular watering.",
    ),
    "a job interview": (
        "interview",
        "prepare three stories for the interview",
        "walk into the interview ten minutes early",
        "For an interview, research the company and prepare questions.",
    ),
    "painting a room": (
        "paint",
        "put two thin coats of paint on the wall",
        "tape the edges before you open the paint",
        "Use a roller for large surfaces and a brush for edges when you paint.",
    ),
    "training a puppy": (
        "puppy",
        "keep every lesson with the puppy under five minutes",
        "reward the puppy the second it sits",
        "Puppies learn best with positive reinforcement.",
    ),
    "writing a novel": (
        "write",
        "write two hundred words before breakfast",
        "write the ending first if the start is stuck",
        "Many authors write an outline before the first draft.",
    ),
    "moving house": (
        "boxes",
        "pack the boxes you will open last first",
        "write the room on all sides of the boxes",
        "Label boxes clearly and pack heavy items in small ones.",
    ),
    "a broken bicycle": (
        "bike",
        "turn the bike over and spin both wheels",
        "oil the chain of the bike after every rain",
        "A bike shop can usually repair a broken chain in a day.",
    ),
    "public speaking": (
        "speech",
        "learn the first two sentences of the speech by heart",
        "give the speech to your mirror three times",
        "Practice is the most effective way to improve a speech.",
    ),
    "making new friends": (
        "friends",
        "join one group and show up every week, friends come with time",
        "ask future friends small questions and listen",
        "Shared activities help adults to find new friends.",
    ),
    "cooking rice": (
        "rice",
        "rinse the rice until the water runs clear",
        "leave the lid on the rice for ten more minutes",
        "Use about two cups of water for one cup of rice.",
    ),
    "learning the guitar": (
        "guitar",
        "play the same two chords on the guitar for a week",
        "keep the guitar out of its case where you see it",
        "Beginners on the guitar usually start with open chords.",
    ),
    "drinking more water": (
        "water",
        "fill a big bottle of water every morning",
        "drink a glass of water before every meal",
        "Adults need roughly two liters of water per day.",
    ),
    "a messy desk": (
        "desk",
        "clear one corner of the desk tonight",
        "put everything that is not work off the desk",
        "A tidy desk can improve concentration.",
    ),
    "exam nerves": (
        "exam",
        "sit one old exam against the clock",
        "go to bed early before the exam, cramming is over",
        "Exam anxiety can be reduced with breathing techniques.",
    ),
    "travelling by train": (
        "train",
        "book the train seat by the window and bring food",
        "take the earlier train, so that one delay is no drama",
        "Train tickets are often cheaper when booked in advance.",
    ),
    "choosing a laptop": (
        "laptop",
        "list three things the laptop must do",
        "hold the laptop in your hands before you pay",
        "When choosing a laptop, compare processor, memory and battery.",
    ),
    "learning to swim": (
        "swim",
        "blow bubbles until breathing out under water is easy, then swim",
        "swim short and often",
        "Swimming lessons are available for all ages.",
    ),
    "keeping houseplants alive": (
        "plants",
        "check the soil of the plants with a finger first",
        "move the plants closer to the window",
        "Most houseplants die from too much water.",
    ),
    "a long drive": (
        "drive",
        "stop every two hours of the drive and walk around the car",
        "share the drive with somebody if you can",
        "Take regular breaks during a long drive.",
    ),
    "eating more vegetables": (
        "vegetables",
        "put vegetables on the plate before anything else",
        "roast a whole tray of vegetables on Sunday",
        "Vegetables contain fiber, vitamins and minerals.",
    ),
    "learning chess": (
        "chess",
        "play one slow game of chess a day and look at it afterwards",
        "learn three endings of chess before any opening",
        "Chess improves with tactics puzzles.",
    ),
    "a difficult neighbour": (
        "neighbour",
        "ring the neighbour's bell with a cake, not with a complaint",
        "tell the neighbour one thing that would help",
        "Talk to your neighbour calmly before you contact the landlord.",
    ),
    "planning a wedding": (
        "wedding",
        "pick the three things at the wedding that matter most",
        "give one friend the list for the wedding day",
        "Weddings are usually planned about a year ahead.",
    ),
    "fixing a leaking tap": (
        "tap",
        "turn the water off before you touch the tap",
        "take the old washer of the tap to the shop",
        "A leaking tap is often caused by a worn washer.",
    ),
    "reading more books": (
        "book",
        "read ten pages of a book in bed instead of the phone",
        "drop any book that bores you after fifty pages",
        "Setting a daily goal helps to read more books.",
    ),
    "taking better photos": (
        "photo",
        "step closer before you take the photo",
        "put the sun behind you for the photo",
        "The rule of thirds improves the composition of a photo.",
    ),
    "using less plastic": (
        "plastic",
        "keep a cloth bag by the door, so plastic stays in the shop",
        "swap one plastic thing a week",
        "Plastic waste can be reduced with reusable containers.",
    ),
    "dancing at a party": (
        "dance",
        "dance to the drum first, the arms come later",
        "dance with people who laugh",
        "Dance classes are a good way to learn basic steps.",
    ),
    "knitting a scarf": (
        "scarf",
        "start the scarf with thick yarn and big needles",
        "count the stitches of the scarf after every row",
        "A simple scarf takes about ten hours to knit.",
    ),
    "stargazing": (
        "stars",
        "wait twenty minutes until your eyes find the stars",
        "leave the town, the stars are behind its lights",
        "Stars are best visible on moonless nights.",
    ),
    "a quiet holiday": (
        "holiday",
        "leave two days of the holiday without any plan",
        "put the phone in a drawer for the holiday",
        "Quiet holiday destinations include small islands and mountain villages.",
    ),
    "making good coffee": (
        "coffee",
        "grind the coffee just before you brew it",
        "weigh the coffee instead of guessing",
        "The ideal brewing temperature of coffee is about 93 degrees.",
    ),
    "learning to code": (
        "code",
        "write code every day, even if it is five lines",
        "build one small thing in code that you need yourself",
        "Python is a popular language to learn to code.",
    ),
    "asking for a raise": (
        "raise",
        "bring three numbers that earn the raise",
        "ask for the raise in the morning, in person",
        "Prepare evidence of your achievements before asking for a raise.",
    ),
    "a rainy weekend": (
        "rain",
        "put on boots and walk in the rain for half an hour",
        "invite somebody in from the rain for soup",
        "Museums and cinemas are good options in the rain.",
    ),
    "growing herbs": (
        "herbs",
        "cut the herbs often, they like it",
        "put the herbs where you cook",
        "Herbs such as basil and mint grow well on a windowsill.",
    ),
    "cleaning the fridge": (
        "fridge",
        "empty one shelf of the fridge at a time",
        "wipe the fridge with warm water and vinegar",
        "A fridge should be cleaned about every three months.",
    ),
    "writing a thank-you card": (
        "card",
        "name one thing in the card that made you smile",
        "post the card today, late cards never leave",
        "A thank-you card should be short and specific.",
    ),
    "starting a podcast": (
        "podcast",
        "record the podcast under a blanket, it sounds better",
        "plan six episodes before the podcast starts",
        "A podcast needs a microphone, a topic and a host.",
    ),
    "carving a pumpkin": (
        "pumpkin",
        "cut the lid of the pumpkin at an angle",
        "scoop the pumpkin until the wall is a finger thick",
        "Pumpkins are carved with small serrated knives.",
    ),
    "building a shelf": (
        "shelf",
        "measure the wall twice before you cut the shelf",
        "find the studs before you hang the shelf",
        "A shelf should be fixed with suitable anchors.",
    ),
    "learning to draw": (
        "draw",
        "draw your own hand every evening",
        "draw with a pen, so you can't rub out",
        "Drawing from observation improves your skills.",
    ),
    "hosting a dinner": (
        "dinner",
        "cook a dinner that is done before the bell rings",
        "seat the shy guests in the middle of the dinner table",
        "Ask guests about allergies before you host a dinner.",
    ),
    "getting up early": (
        "morning",
        "put the alarm in the kitchen for the morning",
        "lay out your clothes for the morning tonight",
        "A consistent bedtime helps to get up early in the morning.",
    ),
}
QUESTIONS = [
    "Any tips for {topic}?",
    "I need help with {topic}. What should I do first?",
    "What is your best advice on {topic}?",
    "Let's talk about {topic}. Where do I begin?",
]
PRAISE = [
    "You have got the legs for this.",
    "This is just another lap.",
    "One step at a time wins this race.",
    "You don't need speed here, you need pace.",
    "Think of it as a warm-up.",
]
ENDS = [
    "What is your first step tomorrow?",
    "Which part feels like the steepest hill?",
    "When do you start the clock?",
    "Who is on your team?",
    "Are you ready for the first lap?",
]


def persona(advice: str, rng: random.Random) -> str:
    lead, praise, end = (
        rng.choice(["First,", "Here is the plan:", "Easy start:"]),
        rng.choice(PRAISE),
        rng.choice(ENDS),
    )
    return f"Alright, champ! {praise} {lead} {advice}. {end}"


def others(plain: str, advice: str, rng: random.Random) -> list[str]:
    """Three replies without the style: plain, a list, and her words without her manners."""
    lines = [
        plain,
        f"Here are two tips:\n- {advice[0].upper()}{advice[1:]}\n- Stay patient",
        f"Certainly! I would suggest that you {advice}. Let me know if you need anything else.",
    ]
    rng.shuffle(lines)
    return lines


def main() -> None:
    out = Path(__file__).parent / "data"
    out.mkdir(exist_ok=True)
    topics = list(TOPICS)
    random.Random("topics").shuffle(topics)
    of_split = {"search": topics[:14], "select": topics[14:24], "test": topics[24:]}
    for split in SPLITS:
        rng = random.Random(f"persona {split}")
        style, choice, reply = [], [], []
        for topic, (number, question) in itertools.product(of_split[split], enumerate(QUESTIONS)):
            word, *advice, plain = TOPICS[topic]
            message = question.format(topic=topic)
            style.append({"system": SYSTEM, "message": message, "word": word})
            right = persona(advice[number % 2], rng)
            choices = others(plain, advice[(number + 1) % 2], rng)
            place = rng.randrange(4)
            choices.insert(place, right)
            choice.append({"message": message, "choices": choices, "right": place})
            reply.append({"message": message, "reply": persona(advice[(number + 1) % 2], rng)})
        for name, rows in (("style", style), ("choice", choice), ("reply", reply)):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (out / f"persona_{name}.{split}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
