"""A slow listener for sentences about photos. It reads a sentence's structure, looks at pixels and masks at full size by itself, with margins
of its own; it shares the table of names with the speaker, and no code."""
from __future__ import annotations

import numpy as np
from PIL import Image

from ris_nb.data.photo_speaker import _NAMES

WAYS = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}
HUES = {"red": (-15, 18), "orange": (15, 45), "yellow": (40, 75), "green": (70, 180), "blue": (180, 265), "purple": (265, 325),
        "pink": (315, 380), "brown": (5, 50)}


class Look:
    """What the listener sees of one instance: middle, box and points in fractions of the longer side, and its pixels' colours."""
    def __init__(self, instance, image: np.ndarray):
        self.category, self.crowd = instance.category, instance.crowd
        mask = instance.mask(*image.shape[:2])
        rows, columns = np.nonzero(mask)
        self.size, self.area = max(image.shape), len(rows)
        self.points = np.stack([columns, rows], -1)[::max(1, len(rows) // 600)]
        self.frame = np.array(image.shape[1::-1])
        self.middle = np.array([columns.mean(), rows.mean()]) / self.frame
        self.low, self.high = self.points.min(0) / self.frame, (self.points.max(0) + 1) / self.frame
        if instance.category == "person":   # clothes are looked for between head and hips
            part = (rows > rows.min() + 0.2 * np.ptp(rows)) & (rows < rows.min() + 0.52 * np.ptp(rows))
            rows, columns = rows[part], columns[part]
        self.hsv = np.asarray(Image.fromarray(image).convert("HSV"))[rows, columns].astype(float) * (360 / 255, 1 / 255, 1 / 255)

    def share(self, colour: str) -> float:
        """The share of its pixels that have a colour in hue, saturation and value."""
        hue, saturation, value = self.hsv.T
        if colour in HUES:
            low, high = HUES[colour]
            shade = {"brown": value < 0.75, "pink": (value > 0.6) & (saturation < 0.75)}.get(colour, True)
            return float(np.mean(((hue - low) % 360 <= high - low) & (saturation > 0.2) & (saturation * value > 0.12) & shade))
        grey = saturation < 0.32
        return float(np.mean({"black": (value < 0.36) & (saturation * value < 0.2), "white": grey & (value > 0.6), "grey": grey & (value > 0.25) & (value < 0.85)}[colour]))

    def gap(self, other: Look) -> float:
        return float(np.sqrt(((self.points[:, None] - other.points[None]) ** 2).sum(-1).min())) / self.size


def named(noun: str, looks: list[Look], names: dict) -> list[int]:
    return [i for i, t in enumerate(looks) if not noun or noun in names.get(t.category, (t.category,))]


def first(found: list[int], looks: list[Look], which: str) -> list[int]:
    """All that may be the leftmost, largest, ... of those found: everything within the listener's margin of the best."""
    if which in WAYS:
        axis, sign = WAYS[which]
        place = {i: sign * (looks[i].middle[axis] if not looks[i].crowd else (looks[i].low if sign > 0 else looks[i].high)[axis]) for i in found}
        return [i for i in found if place[i] < min(place.values()) + 0.015]
    if any(looks[i].crowd for i in found):
        return found
    if which in ("large", "small"):
        areas = {i: looks[i].area ** (1 if which == "large" else -1) for i in found}
        return [i for i in found if areas[i] > max(areas.values()) / 1.4]
    if which in ("front", "back"):
        feet = {i: looks[i].high[1] * (1 if which == "front" else -1) for i in found}
        return [i for i in found if feet[i] > max(feet.values()) - 0.03]
    row = sorted(found, key=lambda i: looks[i].low[0] + looks[i].high[0])
    number, _, side = which.partition(" ")
    return [row[len(row) // 2] if which == "middle" else row[int(number) - 1] if side == "left" else row[-int(number)]]


def relates(name: str, t: Look, a: Look) -> bool:
    if t is a:
        return False
    (t0, t1), (a0, a1) = [(z.low, z.high) if z.crowd else (z.middle, z.middle) for z in (t, a)]     # where the centre may be
    (left, up), (right, down), gap = t0 < a1, t1 > a0, t.gap(a)
    return {"next": gap < 0.07, "on": gap < 0.03, "with": gap < 0.05, "left": left, "right": right, "above": up, "below": down}[name]


def lies(t: Look, place: str) -> bool:
    low, high = (t.low, t.high) if t.crowd else (t.middle, t.middle)
    if place == "middle":
        return low[0] < 0.68 and high[0] > 0.32
    return all((low if sign > 0 else 1 - high)[axis] < 0.49 for axis, sign in (WAYS[word] for word in place.split()))


def listen(p, instances, image, names=None) -> set[int]:
    """The numbers of all instances that the structure of a sentence may speak of."""
    looks = [Look(t, np.asarray(image)) for t in instances]
    return meant(p, looks, {**_NAMES, **(names or {})})


def meant(p, looks: list[Look], names: dict) -> set[int]:
    found = named(p.noun, looks, names)
    if p.colour:
        found = [i for i in found if looks[i].crowd or looks[i].share(p.colour) >= 0.35]
    if p.relation:
        anchors = meant(p.relation[1], looks, names)
        found = [i for i in found if any(relates(p.relation[0], looks[i], looks[a]) for a in anchors)]
    if p.place:
        found = [i for i in found if lies(looks[i], p.place)]
    if p.which and found:
        found = first(found, looks, p.which)
    return set(found) | (meant(p.other, looks, names) if p.other else set())
