"""Write the pages of the site into a folder for Sphinx: notebooks as readers need them, and the pages that list what there is.

    python nbs/site/pages.py build/site

Names, addresses and the reading order are read from settings.ini and README.md; nothing is told twice here.
"""
from __future__ import annotations

import ast
import base64
import json
import posixpath
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE, NBS, LIBRARY = Path(__file__).parent, ROOT / "nbs", ROOT / "ris_nb"
sys.path.insert(0, str(ROOT))

from autodoc2.render.myst_ import MystRenderer
from autodoc2.sphinx import autodoc

import ris_nb
from ris_nb.course.editions import FOR_TEACHERS, exercises_of, student_exercises, text_of
from ris_nb.recipes.published import find_results, our_results, read_published, results_markdown

_ini = ConfigParser(delimiters=["="])
_ini.read(ROOT / "settings.ini", encoding="utf-8")
CFG = _ini["DEFAULT"]
GITHUB = f"{CFG['git_url']}/%s/{CFG['branch']}/"
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\(([^)\s]+)\)")
DIRECTIVE = re.compile(r"^#\|\s*([\w-]+):?[ \t]*(.*)\n?", re.M)
TEACHING = ["syllabus", "self_test", "project_photos", "project_host", "project_negatives", "midterm", "final", "instructor"]  # as they are read
# The panels of chapter 25 need Python behind them; the site shows what they look like (screenshots of `ris-nb explore`).
PANELS = {
    "AskPanel": "The panel Ask: fields for the photo and the expressions, a button to upload a photo, a threshold, and two answers of lavt_photo with each word's share.",
    "FillPanel": "The panel Fill in the word: an expression with one word hidden, a scene with a mask on one thing, and three bar charts of the likeliest words.",
    "ShatterPanel": "The panel Shatter and gather: a scene coloured by slots, a button for each slot, the share read of each, and the mask with the maps behind it.",
    "LossPanel": "The panel Loss lab: sliders for angles and temperature, vectors on two circles, a table of the softmax of C3, and bars for the terms of alignment.",
}


def on_site() -> dict[str, str]:
    """Notebook in the repository -> its page."""
    paths = [*NBS.glob("[0-9][0-9]_*.ipynb"), *(path for room in ("workshop", "exercises", "teaching") for path in (NBS / room).glob("*.ipynb"))]
    return {path.relative_to(ROOT).as_posix(): path.relative_to(NBS).as_posix() for path in sorted(paths)}


def relink(text: str, source: str, page: str) -> str:
    """Point the links of a file of the repository to pages of the site or, where the site hasn't got it, to the repository on the web."""
    pages = on_site()

    def link(found: re.Match) -> str:
        picture, words, (target, mark, anchor) = found[1], LINK.sub(link, found[2]), found[3].partition("#")
        if re.match(r"\w+:", target) or not target:
            return f"{picture}[{words}]({found[3]})"
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in pages:
            target = posixpath.relpath(pages[path], posixpath.dirname(page) or ".")
        elif not (ROOT / path).exists():
            raise SystemExit(f"{source}: a link leads to {path}, which is not there")
        elif picture:
            target = posixpath.relpath(f"pictures/{Path(path).name}", posixpath.dirname(page) or ".")
        else:
            target = GITHUB % ("tree" if (ROOT / path).is_dir() else "blob") + path
        return f"{picture}[{words}]({target}{mark}{anchor})"

    return LINK.sub(link, text)


def _only_imports(text: str) -> bool:
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(text).body)


def _outputs(cell: dict, alts: list[str], where: tuple[str, str]) -> list[dict]:
    """The outputs of a cell, each picture as a cell's output of its own with its text for those who can't see it."""
    kept = []
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "application/vnd.jupyter.widget-view+json" in data:
            panel = "".join(data["text/plain"]).partition("(")[0]
            if panel not in PANELS:
                continue
            output = {"output_type": "display_data", "metadata": {}, "data": {"image/png": base64.b64encode((HERE / "panels" / f"{panel}.png").read_bytes()).decode()}}
            alts.append(PANELS[panel])
        if "text/markdown" in data:  # MyST-NB leaves links of outputs as they are
            text = relink("".join(data["text/markdown"]), *where).replace(".ipynb)", ".html)")
            output = {**output, "data": {"text/markdown": text}}
        if output.get("name") != "stderr":  # bars of progress
            kept.append(output)
    pictures = sum(any(kind.startswith("image/") for kind in output.get("data", {})) for output in kept)
    if cell["outputs"] and pictures != len(alts):
        raise SystemExit(f"{where[0]}, cell {cell['id']} shows {pictures} figures and has {len(alts)} lines `#| fig-alt: ...`: say in one for each what it shows")
    return kept


def as_read(notebook: dict, source: str, page: str) -> dict:
    """A notebook without what only nbdev needs: directives, hidden cells, the library's imports; sources of drawings folded."""
    cells = []
    for cell in notebook["cells"]:
        text = text_of(cell)
        if cell["cell_type"] == "markdown":
            cells.append({**cell, "source": relink(text, source, page)})
            continue
        directives, text = DIRECTIVE.findall(text), DIRECTIVE.sub("", text)
        names = {name for name, _ in directives}
        if names & {"hide", "default_exp"} or names & {"export", "exporti"} and _only_imports(text):
            continue
        alts = [value for name, value in directives if name == "fig-alt"]
        outputs = _outputs(cell, alts, (source, page))
        metadata = {"tags": ["hide-input"]} if "hide_input" in names or ("echo", "false") in directives else {}
        for k in range(max(1, len(alts))):  # MyST-NB takes one alternative text a cell: further figures follow in cells without a source
            first = k == 0
            mine, seen = [], -1
            for output in outputs:
                seen += any(kind.startswith("image/") for kind in output.get("data", {}))
                if max(seen, 0) == k:
                    mine.append(output)
            image = {"mystnb": {"image": {"alt": alts[k]}}} if alts else {}
            cells.append({**cell, "id": cell["id"] if first else f"{cell['id']}-{k}", "source": text if first else "", "outputs": mine,
                          "metadata": {**image, **(metadata if first else {"tags": ["remove-input"]})}})
    return {**notebook, "cells": cells}


def jupyter_slug(title: str) -> str:
    """The anchor that Jupyter gives a heading, which links in the notebooks use."""
    return title.replace(" ", "-")


def summary(path: Path) -> tuple[str, str]:
    """Title of a notebook, and the line below it."""
    cell = text_of(json.loads(path.read_text(encoding="utf-8"))["cells"][0])
    line = re.search(r"^> (.+)$", cell, re.M)
    return cell.splitlines()[0].lstrip("# "), line[1] if line else ""


def section(title: str) -> str:
    """A section of README.md, without its heading."""
    return re.search(rf"^## {re.escape(title)}\n+(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


def toctree(entries: list[str], caption: str = "") -> str:
    return "\n".join(["```{toctree}", *([f":caption: {caption}"] if caption else []), ":hidden:", ":maxdepth: 1", "", *entries, "```"])


def listing(title: str, about: str, room: str) -> str:
    """The page of a folder of notebooks: each with its summary."""
    rows = [(path, *summary(path)) for path in sorted((NBS / room).glob("*.ipynb"))]
    table = [f"| [{name}]({path.name}) | {line} |" for path, name, line in rows]
    return "\n".join([f"# {title}", "", about, "", "| notebook | what it holds |", "|---|---|", *table, "", toctree([path.stem for path, *_ in rows])])


def for_students(notebook: dict, page: str) -> dict:
    """A notebook without its solutions, if it has any; below its title, a link to the file that the student's edition has of it."""
    if not any("BEGIN SOLUTION" in text_of(cell) for cell in notebook["cells"]):
        return notebook
    notebook = student_exercises(notebook)
    if Path(page).stem not in FOR_TEACHERS:
        title, *others = notebook["cells"]
        link = f'\n\n<a href="../student/nbs/{page}" download>Download this notebook</a>'
        notebook["cells"] = [{**title, "source": text_of(title) + link}, *others]
    return notebook


def exercises_page() -> str:
    lines = [f"# Exercises\n\n{(HERE / 'exercises.md').read_text(encoding='utf-8')}", "| exercise | kind | level | minutes |", "|---|---|---|---|"]
    paths = sorted((NBS / "exercises").glob("*.ipynb"))
    for path in paths:
        lines += [f"| [{e.number} {e.title}]({path.name}) | {e.kind} | {e.level} | {e.minutes} |" for e in exercises_of(json.loads(path.read_text(encoding="utf-8")))]
    return "\n".join([*lines, "", toctree([f"{path.stem[:2]} {summary(path)[0].partition(': ')[2] or summary(path)[0]} <{path.stem}>" for path in paths])])


_set_parents = autodoc._set_parents
autodoc._set_parents = lambda env, module, of: _set_parents(env, module, None)  # a class is no part of itself: its anchor would repeat the name


class Renderer(MystRenderer):
    """autodoc2's, but for default values that Sphinx can't parse: `{**A, **B}`."""

    def format_args(self, *args, **flags) -> str:
        return re.sub(r"\{\*\*[^{}]*\}", "...", super().format_args(*args, **flags))


def modules() -> dict[str, dict[str, list[str]]]:
    """Room -> module -> its public names, for the modules that have some; exercises' solutions are not for readers."""
    rooms = {}
    for path in sorted(LIBRARY.rglob("*.py")):
        *above, name = path.relative_to(LIBRARY).with_suffix("").parts
        text = path.read_text(encoding="utf-8")
        names = re.search(r"^__all__ = (\[.*?\])$", text, re.M | re.S)
        if not names or re.match(r"_|ch\d\d$", name):
            continue
        if public := [name for name in ast.literal_eval(names[1]) if re.search(rf"^(class |def )?{name}(\(|:| =)", text, re.M)]:  # autodoc2 misses `A, B = ...`
            rooms.setdefault(above[0] if above else "ris_nb", {})[".".join(["ris_nb", *above, name])] = public
    return rooms


def api_pages() -> dict[str, str]:
    """A page for each room of the library, and one for what can be imported from `ris_nb` itself; signatures and docstrings come by autodoc2."""
    pages, home = {}, on_site()
    for room, found in modules().items():
        lines = [f"# {room}", ""]
        for module, names in found.items():
            source = re.search(r"^# AUTOGENERATED! .* File to edit: (?:\.\./)*(nbs/.*ipynb)\.", (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"), re.M)[1]
            lines += [f"## {module.removeprefix('ris_nb.')}", "", f"```{{autodoc2-docstring}} {module}", ":parser: myst", "```", "", f"Built in [{summary(ROOT / source)[0]}](../{home[source]}).", ""]
            lines += [line for name in names for line in (f"```{{autodoc2-object}} {module}.{name}", "```", "")]
        pages[room] = "\n".join(lines)
    public = [f"| `{module}` | {', '.join(f'{{py:obj}}`{name} <ris_nb.{module}.{name}>`' for name in names.split())} |" for module, names in ris_nb._ROOMS.items()]
    pages["index"] = "\n".join(["# The library", "", (HERE / "library.md").read_text(encoding="utf-8"), "| module | names in `ris_nb` |", "|---|---|", *public, "", toctree(sorted(pages))])
    return pages


def index_page() -> str:
    """The first page: what the project is, the chapters in their parts, and the order of everything in the margin."""
    lead = re.sub(r"^\[!\[.*\n", "", README.partition("```sh")[0], flags=re.M)  # without badges, which would have to be fetched
    course = section("The course")
    parts, trees = re.split(r"^\| \*\*(.+?)\*\* \| \|\n", course, flags=re.M), []
    for title, rows in zip(parts[1::2], parts[2::2]):
        chapters = re.findall(r"\[(\d\d [^]]+)\]\(nbs/([^)]+)\.ipynb\)", rows.partition("\n\n")[0])
        trees.append(toctree([f"{name} <{page}>" for name, page in chapters], title))
    trees += [toctree(["results", "exercises/index", "workshop/index", "library/index"], "Beside the chapters"),
              toctree([f"teaching/{name}" for name in TEACHING], "Teaching")]
    text = (HERE / "index.md").read_text(encoding="utf-8").format(
        lead=lead, course=course, models=section("The trained models that come with it"), github=CFG["git_url"], lib=CFG["lib_name"])
    return "\n\n".join([relink(text, "README.md", "index.md"), *trees])


def results_page() -> str:
    """What `ris-nb results data/results` knows, and the files it read."""
    reports, studies = our_results([ROOT / "data" / "results"])
    found = find_results(read_published(), reports.values(), {path.stem: rows for path, rows in studies.items()})
    return (HERE / "results.md").read_text(encoding="utf-8").format(tables=results_markdown(*found).partition("\n")[2], files=GITHUB % "tree" + "data/results")


def write(path: Path, content: str | bytes) -> None:
    """Write a file where it differs: Sphinx reads again what is new."""
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


def main(out: Path) -> None:
    for source, page in on_site().items():
        notebook = json.loads((ROOT / source).read_text(encoding="utf-8"))
        notebook = for_students(notebook, page) if page.startswith(("exercises/", "teaching/")) else notebook
        write(out / page, json.dumps(as_read(notebook, source, page), ensure_ascii=False))
    for picture in {found[3] for found in LINK.finditer(README) if found[1]}:
        write(out / "pictures" / Path(picture).name, (ROOT / picture).read_bytes())
    write(out / "index.md", index_page())
    write(out / "results.md", results_page())
    write(out / "exercises/index.md", exercises_page())
    write(out / "workshop/index.md", listing("The workshop", (HERE / "workshop.md").read_text(encoding="utf-8"), "workshop"))
    for name, text in api_pages().items():
        write(out / "library" / f"{name}.md", text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
