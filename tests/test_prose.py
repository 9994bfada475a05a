"""A number in a chapter's prose comes from that chapter: a code cell, a printed output, or a file of results that a cell reads.

Not looked at: equations, code spans, links, what numbers a chapter, section, figure or exercise, years, and integers up to TRIVIAL.
Anything else that no cell can know (a paper's figure, a specification's constant) is named in ALLOWED, with its reason.
"""
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
TRIVIAL = 12
ALLOWED: dict[str, dict[str, str]] = {  # notebook -> number as the prose has it -> why no cell has it
    "03_refer.ipynb": dict.fromkeys(("142,209", "54,822", "104,560", "26,711"), "what the papers of RefCOCO and RefCOCOg say; the files hold others"),
    **{f"teaching/project_{name}.ipynb": dict.fromkeys(minutes.split(), "minutes that a step of the project is planned to take") for name, minutes in (
        ("photos", "45 60 180 30 90"), ("host", "30 120 150 60 90"), ("negatives", "60 90 30 150"))},
}

NOT_PROSE = re.compile(
    r"```.*?```|~~~.*?~~~|\$\$.*?\$\$|\$[^$\n]+\$|\\\(.*?\\\)|`[^`]*`"  # code and equations
    r"|!?\[[^\]]*\]\([^)]*\)|https?://\S+|<[^>]+>"  # links, pictures, tags
    r"|\b(?:notebooks?|chapters?|sections?|parts?|figures?|tables?|equations?|eq\.|exercises?|solutions?|steps?|stages?|layers?|levels?|cells?|pages?|seeds?|issues?)"
    r"\s+\d+(?:\.\d+)*(?:(?:,| and| to| or|–|-)\s*\d+(?:\.\d+)*)*"  # what is numbered
    r"|(?m:^#+\s.*$)|(?m:^\s*\d+\.\s)"  # headings, numbered lists
    r"|\b(?:19|20)\d\d\b", re.S | re.I)  # years
NUMBER = re.compile(r"(?<![\w.,^_/-])(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.\d+|\d+)(e-?\d+)?(\s?%)?(?![\w/^_]|-[a-zA-Z0-9]|\.\d|,\d)", re.I)
ANY = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d.])|(?:\d+\.\d*|\.\d+|\d[\d_]*)(?:e[-+]?\d+)?", re.I)


def cells(path: Path, kind: str) -> list[dict]:
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def known_text(path: Path) -> str:
    """All that the code cells of a notebook say, print, and read from data/results and the library's tables."""
    texts = []
    for cell in cells(path, "code"):
        source = "".join(cell["source"])
        texts.append(source)
        for output in cell.get("outputs", []):
            texts += ["".join(output.get("text", "")), *("".join(output.get("data", {}).get(form, "")) for form in ("text/plain", "text/html", "text/markdown"))]
        for name in re.findall(r"[\w/]+\.json\b", source):
            texts += [found.read_text(encoding="utf-8") for found in (ROOT / "data" / "results", ROOT / "ris_nb") for found in found.rglob(Path(name).name)]
    return "\n".join(texts)


def known_numbers(text: str) -> set[float]:
    """The numbers of a text; `1_000`, `1,000`, `1e-3` and `.5` are read."""
    return {float(match.replace(",", "").replace("_", "")) for match in ANY.findall(text)}


def is_known(number: str, percent: bool, known: set[float]) -> bool:
    """Is the number, to as many digits as it has, among the known ones; as a percentage, among the known fractions, too?"""
    value = float(number.replace(",", ""))
    mantissa = re.split("e", number, flags=re.I)[0]
    digits = len(mantissa.split(".")[1]) if "." in mantissa else 0
    half = 0.5 * 10.0 ** -digits * 1.0001
    if "e" in number.lower():
        return any(abs(x - value) <= 0.051 * value for x in known)
    return any(abs(x - value) <= half or (percent and abs(100 * x - value) <= half) for x in known)


def unknown_numbers(path: Path) -> list[str]:
    """The numbers in the prose of a notebook that its cells don't have; exercises may also lean on their solutions."""
    known = known_numbers(known_text(path))
    solutions = path.parent / "solutions" / path.name
    more = known | (known_numbers(known_text(solutions)) if solutions.exists() else set())
    allowed = ALLOWED.get(str(path.relative_to(ROOT / "nbs")), {})
    found, exercises = [], False
    for cell in cells(path, "markdown"):
        text = "".join(cell["source"])
        exercises |= bool(re.search(r"(?m)^##\s+Exercises", text))
        prose = NOT_PROSE.sub(" ", text)
        for match in NUMBER.finditer(prose):
            whole, percent = match[1] + (match[2] or ""), match[3] or ""
            if not percent and whole.isdigit() and int(whole) <= TRIVIAL or whole in allowed:
                continue
            if not is_known(whole, bool(percent), more if exercises else known):
                around = prose[max(0, match.start() - 50):match.end() + 40]
                found.append(f"cell {cell['id']}: {whole}{percent} in «{' '.join(around.split())}»")
    return found


def test_finds_what_no_cell_says(tmp_path, monkeypatch):
    def notebook(prose):
        path = tmp_path / "nbs" / "made.ipynb"
        path.parent.mkdir(exist_ok=True)
        code = {"cell_type": "code", "id": "a", "source": ["x = 1_000 * 0.25"], "outputs": [{"output_type": "stream", "text": ["IoU 0.8749, 1,234 pixels"]}]}
        path.write_text(json.dumps({"cells": [code, {"cell_type": "markdown", "id": "b", "source": [prose]}]}))
        return path
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for fine in ("an IoU of 0.87, that is 87 %", "1,000 times 0.25", "of 1234 pixels", "chapter 77 and section 3.14", "$x = 99$ and `88`", "in 2017", "5 things"):
        assert unknown_numbers(notebook(fine)) == [], fine
    for wrong in ("an IoU of 0.88", "86 % of it", "1,001 times", "some 55 s", "a loss of 3e-4"):
        assert len(unknown_numbers(notebook(wrong))) == 1, wrong


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_numbers_in_prose_come_from_the_notebook(path):
    unknown = unknown_numbers(path)
    assert not unknown, f"{path.name}: print or assert these in a cell, or take them out of the prose:\n" + "\n".join(unknown)


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_allowed_numbers_still_stand(name):
    prose = " ".join("".join(c["source"]) for c in cells(ROOT / "nbs" / name, "markdown"))
    assert not [number for number in ALLOWED[name] if number not in prose], f"{name}: no longer in its prose, take it out of ALLOWED"
