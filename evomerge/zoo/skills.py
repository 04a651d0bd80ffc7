"""The data of a zoo: a vocabulary, items of the skills in `rules.py`, and a little English.

Every string is tokens joined by single spaces. So the ids of a prompt followed by the ids of its answer are
the ids of the whole line, and all scorers agree on the start of the answer. A hash of a prompt's text
determines its split, so no prompt is ever in two splits, for any order of draws.

Nothing here imports torch. `train.py` trains models on these items; `tasks.py` writes task files of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from evomerge.zoo.rules import DEMO_SKILLS, DIGITS, LETTERS, LEXICON, NEW_TOKENS, RULES, Level, pick

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ZooSplit = Literal["train", "search", "select", "test"]

EVAL_SPLITS: tuple[ZooSplit, ...] = ("search", "select", "test")
END = "<eos>"
PAD = "<pad>"
UNKNOWN = "<unk>"
CONTEXT = 64

_SPLIT_OF_BUCKET: tuple[ZooSplit, ...] = ("search", "select", "test")
_BUCKETS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question and its only right answer, both tokens joined by single spaces."""

    skill: str
    prompt: str
    answer: str


# ------------------------------------------------------------------------------------------------- words


@dataclass(frozen=True, slots=True, kw_only=True)
class _Topic:
    """The words of one topic; nouns and verbs as (singular, plural)."""

    nouns: tuple[tuple[str, str], ...]
    verbs: tuple[tuple[str, str], ...]
    adjectives: tuple[str, ...]
    places: tuple[str, ...]


_TOPICS: tuple[_Topic, ...] = (
    _Topic(
        nouns=(("cow", "cows"), ("horse", "horses"), ("farmer", "farmers"), ("goat", "goats")),
        verbs=(("feeds", "feed"), ("chases", "chase"), ("follows", "follow")),
        adjectives=("brown", "hungry"),
        places=("barn", "meadow"),
    ),
    _Topic(
        nouns=(("sailor", "sailors"), ("whale", "whales"), ("ship", "ships"), ("gull", "gulls")),
        verbs=(("passes", "pass"), ("watches", "watch"), ("hears", "hear")),
        adjectives=("salty", "grey"),
        places=("harbour", "reef"),
    ),
    _Topic(
        nouns=(("teacher", "teachers"), ("pupil", "pupils"), ("writer", "writers"), ("judge", "judges")),
        verbs=(("asks", "ask"), ("answers", "answer"), ("praises", "praise")),
        adjectives=("clever", "quiet"),
        places=("school", "library"),
    ),
    _Topic(
        nouns=(("driver", "drivers"), ("tram", "trams"), ("cyclist", "cyclists"), ("guard", "guards")),
        verbs=(("stops", "stop"), ("meets", "meet"), ("overtakes", "overtake")),
        adjectives=("busy", "late"),
        places=("bridge", "station"),
    ),
)
_ONE = ("a", "every", "this")
_MANY = ("some", "many", "these")
_PRONOUN = ("it", "they")
_FUNCTION_WORDS = (*_ONE, *_MANY, *_PRONOUN, "the", "near", "in", "then", "also", ".")


def vocabulary(skills: Iterable[str] = RULES) -> dict[str, int]:
    """Return token -> id of a zoo with these skills, special tokens first: the demo's tokens, about 250.

    Tokens of other skills come after them, and only if a skill is not the demo's. So a token has one id in
    all zoos, and the vocabulary of all skills, the default, encodes the texts of every zoo.
    """
    tokens = [UNKNOWN, PAD, END, *DIGITS, "+", "=", *LETTERS, *LETTERS.upper(), *DEMO_SKILLS]
    tokens += [*LEXICON, *LEXICON.values()]
    for topic in _TOPICS:
        pairs = [word for pair in (*topic.nouns, *topic.verbs) for word in pair]
        tokens += [*pairs, *topic.adjectives, *topic.places]
    # "a" is a letter and an article: both are the same token.
    added = () if set(skills) <= set(DEMO_SKILLS) else NEW_TOKENS
    return {token: i for i, token in enumerate(dict.fromkeys([*tokens, *_FUNCTION_WORDS, *added]))}


def encode(text: str, vocab: dict[str, int]) -> list[int]:
    """Return the ids of a text; raise KeyError for an unknown token, which is a bug."""
    return [vocab[token] for token in text.split(" ")]


def make_tokenizer(skills: Iterable[str]) -> PreTrainedTokenizerFast:
    """Build the tokenizer of all models of a zoo with these skills: split at white space, one id per word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel(vocab=vocabulary(skills), unk_token=UNKNOWN))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        unk_token=UNKNOWN,
        pad_token=PAD,
        eos_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


# ------------------------------------------------------------------------------------------------ skills


def solve(prompt: str) -> str:
    """Return the right answer to a prompt such as ``reverse a b c =``.

    >>> solve("add 4 7 + 5 8 =")      # 105, last digit first
    '5 0 1'
    >>> solve("sort d a c b =")
    'a b c d'
    """
    skill, *body, equals = prompt.split(" ")
    assert equals == "=", prompt
    return RULES[skill].answer(body)


def split_of(text: str) -> ZooSplit:
    """Return the split of a prompt or text; search, select and test get a tenth of all texts each."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % _BUCKETS
    return _SPLIT_OF_BUCKET[bucket] if bucket < len(_SPLIT_OF_BUCKET) else "train"


def draw_item(rng: np.random.Generator, skill: str, level: Level, split: ZooSplit) -> Item:
    """Draw one item of a skill and level from a split (with replacement)."""
    while True:
        prompt = f"{skill} {RULES[skill].ask(rng, level)} ="
        if split_of(prompt) == split:
            return Item(skill=skill, prompt=prompt, answer=solve(prompt))


# -------------------------------------------------------------------------------------------------- text


def _noun_phrase(rng: np.random.Generator, topic: _Topic, plural: int) -> str:
    determiner = pick(rng, _MANY if plural else _ONE)
    noun = topic.nouns[int(rng.integers(len(topic.nouns)))][plural]
    adjective = f"{pick(rng, topic.adjectives)} " if rng.random() < 0.4 else ""
    return f"{determiner} {adjective}{noun}"


def _sentence(rng: np.random.Generator, topic: _Topic, subject: str, plural: int) -> str:
    verb = topic.verbs[int(rng.integers(len(topic.verbs)))][plural]
    thing = _noun_phrase(rng, topic, int(rng.integers(2)))
    place = f" {pick(rng, ('near', 'in'))} the {pick(rng, topic.places)}" if rng.random() < 0.5 else ""
    return f"{subject} {verb} {thing}{place} ."


def draw_text(rng: np.random.Generator, split: ZooSplit) -> str:
    """Draw a two-sentence text on one topic from a split; verbs and pronoun agree with the subject."""
    while True:
        topic = _TOPICS[int(rng.integers(len(_TOPICS)))]
        plural = int(rng.integers(2))
        first = _sentence(rng, topic, _noun_phrase(rng, topic, plural), plural)
        link = pick(rng, ("then", "also"))
        text = f"{first} {link} {_sentence(rng, topic, _PRONOUN[plural], plural)}"
        if split_of(text) == split:
            return text


def unique(draw: Callable[[], Item], *, tries: int = 1000) -> Iterator[Item]:
    """Yield drawn items whose prompt was not yielded before; stop after `tries` draws without a new one."""
    seen: set[str] = set()
    misses = 0
    while misses < tries:
        item = draw()
        misses += 1
        if item.prompt not in seen:
            seen.add(item.prompt)
            misses = 0
            yield item
