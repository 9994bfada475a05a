"""A slow listener for the expressions of RefToys. It reads the words alone, tries every way to put them together into a sentence, and looks
at each thing by itself; it shares tables of words with the speaker, and no code."""
from __future__ import annotations

from functools import lru_cache

from ris_nb.data.shapes import _SUPERLATIVES
from ris_nb.data.toy_phrases import (_ACCENTS, _LOOKS, _NAMES, _NUMBERS, _PLACES, _SEEN_AS, _TEXTURE_WORDS, _TOY_RELATIONS,
                                     _TOY_SIZE_WORDS)
from ris_nb.data.toys import TOY_COLOURS, TOY_KINDS

PLURALS = {"fish": "fish", "snowman": "snowmen"}
PARTS = {part for table in (_ACCENTS, _SEEN_AS) for parts in table.values() for part in parts}


@lru_cache(maxsize=None)
def lexicon() -> dict[tuple[str, ...], tuple[str, str]]:
    """Each wording, split into words -> (what it is, what it means)."""
    words = {"thing": ("noun", ""), "one": ("noun", ""), "things": ("nouns", ""), "ones": ("nouns", ""), "both": ("number", "two"), "all": ("all", "")}
    for kind in TOY_KINDS:
        for name in _NAMES.get(kind, (kind,)):
            words |= {PLURALS.get(name, name + "s"): ("nouns", kind)} | {name: ("noun", kind)}     # "fish" is both: read as one
    for role, table in (("sup", _SUPERLATIVES), ("size", _TOY_SIZE_WORDS), ("texture", _TEXTURE_WORDS), ("place", _PLACES), ("rel", _TOY_RELATIONS)):
        words |= {wording: (role, name) for name, wordings in table.items() for wording in wordings}
    words |= {colour: ("colour", colour) for colour in TOY_COLOURS} | {part: ("part", part) for part in PARTS}
    words |= {word: (word, "") for word in ("the", "a", "an", "with", "and")} | {number: ("number", number) for number in _NUMBERS[2:]}
    return {tuple(wording.split()): token for wording, token in words.items()}


def tokens(text: str) -> list[tuple[str, str]]:
    """The longest known wordings, one after the other."""
    words, found = text.split(), []
    while words:
        length = next(n for n in (5, 4, 3, 2, 1) if tuple(words[:n]) in lexicon())
        found.append(lexicon()[tuple(words[:length])])
        words = words[length:]
    return found


def tails(said: list, some: bool = False):
    """All ways to read what may follow a noun: (list of modifiers, what is left over)."""
    yield [], said
    again = said[1:] if some and said[:1] == [("and", "")] and said[1:2] and said[1][0] == "rel" else said
    if again and again[0][0] == "place":
        first = [(again[0], again[1:])]
    elif again and again[0][0] == "rel":
        first = [((*again[0], thing), rest) for thing, rest in noun_phrases(again[1:])]
    elif again and again[0][0] == "with":
        rest = again[2:] if again[1][0] in ("the", "a", "an") else again[1:]
        first = [(("with", rest[0][1], rest[1][1]), rest[2:])]
    else:
        return
    for modifier, rest in first:
        for more, left in tails(rest, True):
            yield [modifier, *more], left


def noun_phrases(said: list):
    """All ways to read a noun phrase at the start: (its modifiers, what is left over)."""
    own = []
    while said and said[0][0] in ("the", "all", "number", "sup", "size", "texture", "colour"):
        own, said = [*own, said[0]], said[1:]
    if said and said[0][0] in ("noun", "nouns"):
        for more, left in tails(said[1:]):
            yield [*own, said[0], *more], left


def sentences(said: list):
    """All ways to read everything: lists of one or two noun phrases."""
    for phrase, left in noun_phrases(said):
        if not left:
            yield [phrase]
        elif left[0][0] == "and":
            yield from ([phrase, *more] for more in sentences(left[1:]))


def beats(name: str, a, b) -> bool:
    if name in ("large", "small"):
        a, b = (a, b) if name == "large" else (b, a)
        return 4 * max(a.width, a.height) >= 5 * max(b.width, b.height) and 4 * a.width * a.height >= 5 * b.width * b.height
    return {"left": b.x - a.x, "right": a.x - b.x, "top": b.y - a.y, "bottom": a.y - b.y}[name] >= 8


def may_stand(name: str, a, b) -> bool:
    if a is b:
        return False
    if name == "next":
        return abs(a.x - b.x) - (a.width + b.width) / 2 <= 16 and abs(a.y - b.y) - (a.height + b.height) / 2 <= 16
    along, across = {"left": (b.x - a.x, b.y - a.y), "right": (a.x - b.x, b.y - a.y), "above": (b.y - a.y, b.x - a.x), "below": (a.y - b.y, b.x - a.x)}[name]
    return 2 * along > abs(across)


def may_lie(place: str, t, reach: int) -> bool:
    left, right, top, bottom = t.x < reach, 96 - t.x < reach, t.y < reach, 96 - t.y < reach
    sides = {"left": left, "right": right, "top": top, "bottom": bottom, "corner": (left or right) and (top or bottom)}
    return all(sides[word] for word in place.split())


def fits(modifier: tuple, t, things: list, sure: bool = False) -> bool:
    """Whether a modifier may be true of a thing; or is, for sure."""
    what, word = modifier[:2]
    if what in ("noun", "nouns"):
        return word in ("", t.kind)
    if what == "colour":
        return word == t.colour or word == t.accent and not sure
    if what == "texture":
        looks = _LOOKS.get(t.kind)
        return (word == t.texture and not (word == "plain" and looks)) if sure else word in (t.texture, looks)
    if what == "size":
        return word == t.size
    if what == "place":
        return may_lie(word, t, 32 if sure else 52)
    if what == "with":
        parts = _ACCENTS.get(t.kind, ()) if sure else _ACCENTS.get(t.kind, ()) + _SEEN_AS.get(t.kind, ())
        return modifier[2] in parts and (word == t.accent or word == t.colour and not sure)
    if what == "rel":
        return any(may_stand(word, t, a) for a in meant(modifier[2], things))
    return True


def meant(phrase: list, things: list, sure: bool = False) -> list:
    """All things that one reading of a noun phrase may speak of."""
    found = [t for t in things if all(fits(m, t, things, sure) for m in phrase if m[0] not in ("sup", "rel"))]
    for _, name in [m for m in phrase if m[0] == "sup"]:
        found = [t for t in found if not any(beats(name, other, t) for other in found)]
    return [t for t in found if all(fits(m, t, things) for m in phrase if m[0] == "rel")]


def listen(text: str, things: list, sure: bool = False) -> set[int]:
    """The numbers of all things that the words may speak of, in any reading."""
    readings = list(sentences(tokens(text)))
    assert readings, text
    found = [t for reading in readings for phrase in reading for t in meant(phrase, things, sure)]
    return {i for i, t in enumerate(things) if any(t is other for other in found)}


def shorter_texts(text: str) -> list[str]:
    """The text without one of its modifiers: an adjective or a superlative, or all from a "with", a place or a relation on."""
    spans, words, start = [], text.split(), 0
    for what, _ in tokens(text):
        length = next(n for n in (5, 4, 3, 2, 1) if tuple(words[start:start + n]) in lexicon())
        if what in ("sup", "size", "texture", "colour") and not any(w == "with" for w in words[max(0, start - 2):start]):
            spans.append((start, start + length))
        elif what in ("with", "place", "rel"):
            spans.append((start, len(words)))
        start += length
    return [" ".join(words[:a] + words[b:]) for a, b in spans]
