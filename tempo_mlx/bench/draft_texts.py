"""Prompts of four kinds for :mod:`.draft`, made from a seed: nothing is downloaded."""

import random
from collections.abc import Callable

_PEOPLE = ("the mayor", "the architect", "a gardener", "the new teacher", "her uncle", "the pilot")
_VERBS = ("promised", "explained", "doubted", "wrote in a letter", "told the committee", "denied")
_CLAIMS = (
    "that slate lasts longer than tile",
    "that the bridge would open before winter",
    "that nobody had paid for the roof",
    "that the river had been dredged twice",
    "that the old trees would stay where they are",
    "that the school needs a larger kitchen",
    "that the train no longer stops there on Sundays",
    "that the well behind the church is dry",
)
_SETTINGS = (
    "On Tuesday",
    "Two days later",
    "At the end of the meeting",
    "In the spring",
    "At noon",
)
_OPENINGS = (
    "In the {season} of {year} a young {who}",
    "The old {who} had not seen a ship for",
    "When the {season} rain stopped, the {who}",
    "Nobody in the village remembered why the {who}",
    "It was in {year} that my grandmother, a {who},",
)
_SEASONS = ("spring", "summer", "autumn", "winter")
_TRADES = ("doctor", "lighthouse keeper", "carpenter", "ferryman", "painter", "clockmaker", "nurse")
_OPERATIONS = (
    ("add", "Add", "+"),
    ("subtract", "Subtract", "-"),
    ("multiply", "Multiply", "*"),
    ("divide", "Divide", "/"),
    ("remainder", "Take the remainder of", "%"),
)
_COLOURS = ("green", "red", "white", "yellow", "black")
_TOWNS = ("Aberdeen", "Bergen", "Cork", "Dover", "Esbjerg", "Fowey", "Genoa", "Hull", "Izmir")


def _passage(rng: random.Random) -> str:
    """Five sentences, no two of which say the same or begin alike."""
    parts = (rng.sample(each, 5) for each in (_SETTINGS, _PEOPLE, _VERBS, _CLAIMS))
    return " ".join(
        f"{when} {who} {verb} {claim}." for when, who, verb, claim in zip(*parts, strict=True)
    )


def _prose(rng: random.Random) -> str:
    opening = rng.choice(_OPENINGS)
    year = rng.randint(1790, 1960)
    return opening.format(season=rng.choice(_SEASONS), year=year, who=rng.choice(_TRADES))


def _question(rng: random.Random) -> str:
    return f"{_passage(rng)}\nQuestion: What did {rng.choice(_PEOPLE)} say?\nAnswer:"


def _copy(rng: random.Random) -> str:
    passage = _passage(rng)
    if rng.random() < 0.5:
        return (
            f"Original: {passage}\nThe same text again, word for word: {passage}\n"
            "Once more, word for word:"
        )
    first, second = rng.sample(_PEOPLE, 2)
    example = f"Yesterday {first} came home late. We were glad that {first} was well."
    task = f"With {second} in place of {first}:"
    changed = example.replace(first, second)
    text = passage.replace(second, first)
    return f"Text: {example}\n{task} {changed}\n\nText: {text}\n{task}"


def _code(rng: random.Random) -> str:
    if rng.random() < 0.5:
        first, second = rng.sample("abcmnpqxyz", 2)
        functions = [
            f'def {name}({first}, {second}):\n    """{verb} two numbers."""\n'
            f"    return {first} {sign} {second}\n"
            for name, verb, sign in rng.sample(_OPERATIONS, 3)
        ]
        return "\n".join(functions) + "\ndef"
    rows = [
        f"{i},{rng.choice(_TOWNS)},{rng.choice(_COLOURS)},{rng.randint(10, 99)} tons,in harbour"
        for i in range(1, 7)
    ]
    return "\n".join(["number,town,colour,cargo,place", *rows, "7,"])


#: Kind of text -> what makes a prompt of it.
KINDS: dict[str, Callable[[random.Random], str]] = {
    "prose": _prose,
    "passage and question": _question,
    "copy or rewrite": _copy,
    "code or table": _code,
}


def prompts_of(kind: str, n: int) -> list[str]:
    """The first n prompts of a kind."""
    return [KINDS[kind](random.Random(f"{kind} {i}")) for i in range(n)]
