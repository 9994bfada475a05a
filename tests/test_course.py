"""The form of the course and of the library: what a chapter looks like, where links lead, and which room imports which."""
from __future__ import annotations

import ast
import json
import re
from functools import lru_cache
from pathlib import Path

import pytest

import ris_nb

ROOT = Path(__file__).resolve().parents[1]
NBS, LIBRARY = ROOT / "nbs", ROOT / "ris_nb"
CHAPTERS = sorted(NBS.glob("[0-9][0-9]_*.ipynb"))
NOTEBOOKS = sorted(path for path in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
MODULES = sorted(path for path in LIBRARY.rglob("*.py") if path.name not in ("__init__.py", "_modidx.py"))
CELLS, LINES, MODULE_LINES = 70, 25, 400

# Classes that a chapter exports in one long cell, and why they stay whole
LONG = {
    "ReferralDataset": "the constructor groups the referrals, and one method picks from the groups",
    "TextEncoder": "three methods of a few lines and the constructors that read weights into them",
    "SwinBlock": "timm's block with one method replaced; both methods are read together",
    "Swin": "constructor, two methods and two ways to pretrained weights",
    "ViT": "constructor, two methods and two ways to pretrained weights",
    "PWAM": "the constructor names the matrices that the two methods use",
    "LanguageSwin": "the constructor names the parts that one loop chains",
    "SegmentationMetrics": "the sums and three short methods with what their arguments mean",
    "LAVT": "the whole contract of a model",
    "WordPredictor": "the constructor names the parts that one short method chains",
    "MaskGrounding": "three short methods; the constructor checks the host",
    "Grounded": "five short methods around a host and its game",
    "ImageAlignment": "constructor, the regions, and one product in a cheaper order",
    "LanguageAlignment": "short methods, three of which its released version overrides",
    "DeformableAttention": "constructor, its initial values, the places and the reading",
    "PixelDecoder": "the constructor names the parts that one loop chains",
    "QueryAttention": "the constructor and the two halves of attention",
    "MaskDecoder": "the constructor names the parts that one loop chains",
    "LockStep": "two encoders in one loop",
    "MagNet": "the whole contract of a model",
    "CRIS": "the whole contract of a model",
    "Neck": "the constructor names the parts that the two methods chain",
    "DecoderLayer": "a layer and the loop over its layers",
    "SaG": "the whole contract of a model",
    "Referral": "its fields with what they mean, and three short methods",
    "Run": "its fields with what they mean",
    "Recipe": "its fields with what they mean, and two short methods",
    "EntityDiscovery": "the constructor names the parts that one loop chains",
    "ModalityFusion": "the constructor and the two halves of attention",
    "RegionDecoder": "the constructor names the parts that one loop chains",
    "ReLA": "the whole contract of a model",
    "PairModel": "the constructor and three short methods that the rivals share",
    "MaskCLIP": "the whole contract of a model",
    "GroupingBlock": "the constructor names the parts that short methods chain",
    "GroupViT": "the whole contract of a model",
    "TSEG": "the whole contract of a model",
}


@lru_cache(maxsize=None)
def cells(path: Path) -> list[dict]:
    return [{**cell, "text": "".join(cell["source"])} for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def code(path: Path) -> list[dict]:
    return [cell for cell in cells(path) if cell["cell_type"] == "code"]


def prose(path: Path) -> list[str]:
    """The Markdown of a notebook, or of a Markdown file, without what is set as code."""
    texts = [cell["text"] for cell in cells(path) if cell["cell_type"] == "markdown"] if path.suffix == ".ipynb" else [path.read_text(encoding="utf-8")]
    return [re.sub(r"```.*?```|~~~.*?~~~|`[^`\n]*`", "code", text, flags=re.S) for text in texts]


def flagged(cell: dict, flag: str) -> bool:
    return re.search(rf"^#\|\s*{flag}\b", cell["text"], re.M) is not None


def parse(cell: dict) -> ast.Module:
    return ast.parse("\n".join("" if re.match(r"#\||\s*[%!]", line) else line for line in cell["text"].splitlines()))


each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.name)


def long_cells(path: Path) -> list[str]:
    """The visible code cells of more than LINES lines, but for imports, the classes in LONG, and a file that a cell writes (LINES + 5)."""
    found = []
    for cell in code(path):
        lines = len(cell["text"].splitlines())
        imports = isinstance((parse(cell).body or [None])[0], (ast.Import, ast.ImportFrom)) and all(
            isinstance(node, (ast.Import, ast.ImportFrom, ast.If)) for node in parse(cell).body)
        if lines > LINES + 5 * cell["text"].startswith("%%writefile") and not imports and not flagged(cell, "hide_input"):
            whole = flagged(cell, "exporti?") and any(isinstance(node, ast.ClassDef) and node.name in LONG for node in parse(cell).body)
            found += [] if whole else [f"{cell['id']}: {lines}"]
    return found


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.parent.name in ("nbs", "workshop")], ids=lambda path: path.stem)
def test_every_figure_has_a_text_for_those_who_cannot_see_it(path):
    """A line `#| fig-alt: ...` for each, which the site shows to screen readers."""
    for cell in code(path):
        figures = sum(any(kind.startswith("image/") for kind in output.get("data", {})) for output in cell["outputs"])
        assert len(re.findall(r"^#\| fig-alt: \S.{20}", cell["text"], re.M)) == figures, f"cell {cell['id']}: say in a line `#| fig-alt: ...` what each of its {figures} figures shows"


@each_chapter
def test_a_chapter_is_short(path):
    assert len(cells(path)) <= CELLS


@each_chapter
def test_code_cells_are_short(path):
    assert long_cells(path) == []


@each_chapter
def test_a_chapter_begins_with_goals_prerequisites_and_minutes(path):
    texts = prose(path)
    start = "\n".join(texts[:1 + next(i for i, text in enumerate(texts) if re.search(r"^## ", text, re.M))])
    for what in (r"\bgoals?\b|after this chapter", r"\bprerequisites?\b|read first", r"\b(\d+|an|one|two|three|four|five)\b[\w\s]{0,12}\b(minutes|hours?)\b"):
        assert re.search(what, start, re.I), what


@each_chapter
def test_a_chapter_ends_with_a_link_to_the_next(path):
    after = CHAPTERS[CHAPTERS.index(path) + 1:]
    if after:
        assert f"({after[0].name}" in "\n".join(prose(path)[-2:])


@each_chapter
def test_the_reader_predicts_and_a_cell_answers(path):
    """Three to seven places ask the reader to **Predict**; code comes next, and one of the next cells has an output, before the next section begins."""
    notebook, places = cells(path), 0
    for at, cell in enumerate(notebook):
        asked = [match.start() for match in re.finditer(r"\*\*Predict\b", cell["text"])] if cell["cell_type"] == "markdown" else []
        for start in asked:
            places += 1
            after = notebook[at + 1:at + 6]
            sections = [k for k, other in enumerate(after) if other["cell_type"] == "markdown" and re.search(r"^## ", other["text"], re.M)]
            assert not re.search(r"^## ", cell["text"][start:], re.M), f"{cell['id']}: another section begins before the answer"
            assert after and after[0]["cell_type"] == "code", f"{cell['id']}: no code comes next"
            assert any(other.get("outputs") for other in after[:sections[0] + 1 if sections else 5]), f"{cell['id']}: no output answers"
    assert 3 <= places <= 7


@each_chapter
def test_visible_code_of_a_chapter_imports_no_private_name(path):
    """What a chapter exports may share private names with other modules of its room."""
    for cell in code(path):
        if not flagged(cell, "hide_input") and not flagged(cell, "exporti?"):
            for node in ast.walk(parse(cell)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == LIBRARY.name:
                    assert [a.name for a in node.names if a.name.startswith("_")] == [], cell["id"]


def anchors(path: Path) -> set[str]:
    """The names by which headings can be linked: Jupyter's (blanks become hyphens) and GitHub's (in small letters, no punctuation, too)."""
    headings = [heading.strip() for text in ([c["text"] for c in cells(path) if c["cell_type"] == "markdown"] if path.suffix == ".ipynb"
                                             else [path.read_text(encoding="utf-8")])
                for heading in re.findall(r"^#{1,6}\s+(.+)$", text, re.M)]
    headings = [re.sub(r"\[([^\]]*)\]\([^)]*\)|[*`]", r"\1", heading) for heading in headings]
    return {h.replace(" ", "-") for h in headings} | {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def links(path: Path) -> list[str]:
    """What a page links to in the repository."""
    found = [link for text in prose(path) for link in re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)]
    return [link for link in found if not re.match(r"[a-z]+:|//", link, re.I)]


@pytest.mark.parametrize("path", [*NOTEBOOKS, *sorted(ROOT.glob("*.md"))], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    lost = []
    for link in links(path):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or anchor and target.suffix in (".ipynb", ".md") and anchor not in anchors(target):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("path", sorted((NBS / "workshop").glob("*.ipynb")), ids=lambda p: p.name)
def test_a_workshop_notebook_is_linked(path):
    pages = [page for page in NOTEBOOKS if page != path and "solutions" not in page.parts]
    assert any((page.parent / link.partition("#")[0]).resolve() == path for page in pages for link in links(page))


# --- the library ---

ROOMS = ["contract settings checkpoint registry metrics show distributed", "data", "encoders", "models", "training evaluation", "studies",
         "recipes explore course testing", "cli"]
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms.split()}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    """The modules of the library that a module imports, also inside functions (in the command line, at the top alone); not for type checkers."""
    tree, name = ast.parse(path.read_text(encoding="utf-8")), name_of(path)
    known, found = {name_of(module) for module in MODULES}, set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and name.startswith("ris_nb.cli."):
            return
        if isinstance(node, ast.ImportFrom):
            base = ".".join(name.split(".")[:-node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                if f"{module}.{alias.name}" in known or module in known:
                    found.add(f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module)
                elif module == "ris_nb":  # a public name, which comes from its own module
                    import ris_nb
                    found.update({f"ris_nb.{ris_nb._HOME[alias.name]}"} if alias.name in ris_nb._HOME else ())
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name in known)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found - {name}


def test_every_module_has_a_room():
    assert {name_of(path).split(".")[1] for path in MODULES} <= set(RANK)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_arrows_point_downwards(path):
    room = name_of(path).split(".")[1]
    assert [module for module in sorted(imports(path)) if RANK[module.split(".")[1]] > RANK[room]] == []


def test_no_module_imports_itself_by_way_of_others():
    graph = {name_of(path): imports(path) for path in MODULES}
    while free := [name for name, needs in graph.items() if not needs & set(graph)]:
        for name in free:
            del graph[name]
    assert graph == {}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_is_short_and_comes_from_one_notebook(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MODULE_LINES
    assert len({source for source in re.findall(r"^# %% (\.\.\S+\.ipynb)", text, re.M)}) == 1


def test_a_notebook_exports_one_module():
    exports = [re.findall(r"^#\|\s*default_exp\s+(\S+)", cell["text"], re.M) for path in NOTEBOOKS for cell in code(path)]
    modules = [name for names in exports for name in names]
    assert len(modules) == len(set(modules)) and {f"ris_nb.{name}" for name in modules} == {name_of(path) for path in MODULES}
    others = [(path.name, cell["id"]) for path in NOTEBOOKS for cell in code(path) if re.search(r"^#\|\s*exporti?[ \t]+\S", cell["text"], re.M)]
    assert others == []


def test_few_names_are_public():
    """`#| export` makes a name public, `#| exporti` does not: what `import ris_nb` gives, what chapters take by name, and little else."""
    public = {(module.relative_to(LIBRARY).as_posix(), name) for module in MODULES for node in ast.parse(module.read_text(encoding="utf-8")).body
              if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" for name in ast.literal_eval(node.value)}
    assert len(public) <= 230
    missing = {(module.replace(".", "/") + ".py", name) for module, names in ris_nb._ROOMS.items() for name in names.split()} - public
    assert missing == set()
