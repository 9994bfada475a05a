"""Pages for teaching: the table of minutes is in step with the notebooks, projects add up, self-test and exams are exercises."""
from __future__ import annotations

import json
import re
import shutil

import pytest
from test_course import CHAPTERS, each_chapter
from test_exercises import each_student, NBS, run

from ris_nb.course.check import verdict
from ris_nb.course.editions import RELATIVE, exercises_of, instructor_edition, nbgrader_edition, read_notebook, student_edition, student_exercises, text_of
from ris_nb.course.slides import slides_notebook, slides_of, slides_page
from ris_nb.course.syllabus import ROUTES, chapter_minutes, minutes_table, route_table, running_seconds

TEACHING = NBS / "teaching"
TESTS = [path for path in sorted(TEACHING.glob("*.ipynb")) if path.stem in ("self_test", "midterm", "final")]
each_test = pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)


def rows(table: str) -> dict[str, list[str]]:
    """The rows of Markdown tables: first cell -> the others."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|") and "---" not in line]
    return {line[0]: line[1:] for line in lines}


def shown(name: str) -> str:
    """All that the cells of a page show as Markdown."""
    outputs = [output for cell in read_notebook(TEACHING / name)["cells"] for output in cell.get("outputs", [])]
    return "\n\n".join("".join(output["data"]["text/markdown"]) for output in outputs if "text/markdown" in output.get("data", {}))


def test_the_syllabus_is_in_step_with_the_notebooks():
    kept = rows(shown("syllabus.ipynb"))
    now = rows("\n".join([minutes_table(NBS), *(route_table(NBS, route) for route in ROUTES)]))
    assert list(kept) == list(now), "run nbs/teaching/syllabus.ipynb again"
    for row in now:
        for old, new in zip(kept[row], now[row]):
            numbers = [float(re.match(r"[\d.]+", cell)[0]) if re.fullmatch(r"[\d.]+( h)?", cell) else None for cell in (old, new)]
            if None in numbers:
                assert old == new, f"{row}: run nbs/teaching/syllabus.ipynb again"
            else:  # a sentence more in a chapter is no reason to run the page again
                assert abs(numbers[0] - numbers[1]) <= max(6, 0.05 * numbers[1]), f"{row}: {old} is {new} now; run nbs/teaching/syllabus.ipynb again"


def test_what_the_table_counts():
    chapters = {chapter.number: chapter for chapter in chapter_minutes(NBS)}
    for path in sorted((NBS / "exercises").glob("*.ipynb")):
        assert chapters[path.name[:2]].practice() == sum(exercise.minutes for exercise in exercises_of(read_notebook(path)))
    assert all(20 <= chapter.reading <= 150 and 0 < chapter.running <= 5 for chapter in chapters.values())
    measured = json.loads((NBS.parent / "data" / "results" / "chapter_minutes.json").read_text())
    assert sorted(measured["seconds"]) == sorted(chapters) and measured["machine"] and measured["command"]


@pytest.mark.slow
def test_running_is_measured():
    pytest.importorskip("nbdev", reason='nbdev comes with pip install -e ".[dev]"')
    kept = json.loads((NBS.parent / "data" / "results" / "chapter_minutes.json").read_text())["seconds"]["03"]
    assert kept / 5 < running_seconds(NBS / "03_refer.ipynb") < 5 * kept + 10  # another machine, another load


def test_a_route_asks_for_a_bearable_week():
    for route, most in zip(ROUTES, (11, 12, 5)):  # hours of a sitting
        hours = [float(cells[-1]) for name, cells in rows(route_table(NBS, route)).items() if name in route.sittings]
        assert len(hours) == len(route.sittings) and max(hours) <= most, (route.name, hours)


@pytest.mark.parametrize("path", sorted(TEACHING.glob("project_*.ipynb")), ids=lambda path: path.stem)
def test_a_project_has_steps_and_a_rubric_that_add_up(path):
    text = "\n\n".join(text_of(cell) for cell in read_notebook(path)["cells"] if cell["cell_type"] == "markdown")
    tables = [rows(part) for part in re.findall(r"(?:^\|.*\n?)+", text, re.M)]
    minutes, points = ([int(cells[0]) for name, cells in table.items() if name not in ("step", "what")] for table in tables)
    assert 540 <= sum(minutes) <= 660 and sum(points) == 30
    assert all(word in text for word in ("**Question.**", "**You need**", "**Hand in**", "## Start here", "## Rubric"))


@each_student
@each_test
def test_solutions_pass(path, student, monkeypatch):
    notebook = read_notebook(path)
    monkeypatch.setenv("RIS_NB_STUDENT", student)
    names = run(notebook, monkeypatch, hidden=True)
    found = [verdict(exercise.number, names) for exercise in exercises_of(notebook)]
    assert [one for one in found if not one] == []


@pytest.mark.slow
@each_test
def test_stubs_fail(path, monkeypatch):
    notebook = read_notebook(path)
    names = run(student_exercises(notebook), monkeypatch)
    assert [exercise.number for exercise in exercises_of(notebook) if verdict(exercise.number, names)] == []


@each_test
def test_tests_are_complete(path):
    notebook, subject = read_notebook(path), path.stem.replace("_", "")
    found = exercises_of(notebook)
    assert [exercise.number for exercise in found] == [f"{subject}.{k + 1}" for k in range(len(found))]
    texts = [text_of(cell) for cell in notebook["cells"]]
    for exercise in found:
        assert f'check("{exercise.number}")' in texts and f'@exercise("{exercise.number}")' in "\n".join(texts)
    assert sum("### BEGIN HIDDEN TESTS" in text for text in texts) >= len(found) / 2
    for text in texts:
        assert ("<!-- BEGIN SOLUTION -->" in text) == ("<!-- BEGIN RUBRIC -->" in text) == bool(re.search(r"Rubric \(\d+ points?\)", text))


@pytest.fixture(scope="module")
def editions(shared):
    """The whole course, in three editions: name -> folder."""
    makers = {"student": student_edition, "instructor": instructor_edition, "nbgrader": nbgrader_edition}
    return {name: shared(f"{name}s_edition", lambda folder: make(NBS, folder / "out")) / "out" for name, make in makers.items()}


@pytest.mark.parametrize("edition", ["student", "instructor", "nbgrader"])
def test_links_of_an_edition_lead_somewhere(editions, edition):
    pages = [*editions[edition].rglob("*.ipynb")]
    links = [(page, link[1]) for page in pages for cell in read_notebook(page)["cells"] if cell["cell_type"] == "markdown"
             for link in RELATIVE.finditer(re.sub(r"\$[^$]+\$", "", text_of(cell)))]
    assert pages and (links or edition == "nbgrader")
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []


def test_exams_are_not_for_students(editions):
    there = {kind: sorted(path.stem for path in (editions[kind] / folder).rglob("*.ipynb") if path.stem in ("midterm", "final", "instructor", "self_test"))
             for kind, folder in (("student", "nbs/teaching"), ("instructor", "nbs/teaching"), ("nbgrader", "source"))}
    assert there["student"] == ["self_test"] and {"final", "midterm", "self_test"} <= {*there["instructor"]} and there["nbgrader"] == ["final", "midterm"]
    for exam, facts in {"midterm": (90, 32, "**ninety minutes**, thirty-two points"), "final": (120, 37, "**two hours**, thirty-seven points")}.items():
        marks = [cell["metadata"]["nbgrader"] for cell in read_notebook(editions["nbgrader"] / "source" / exam / f"{exam}.ipynb")["cells"] if cell["metadata"]]
        exercises = exercises_of(read_notebook(TEACHING / f"{exam}.ipynb"))
        points = sum(exercise.points + exercise.written for exercise in exercises)
        assert sum(mark.get("points", 0) for mark in marks) == points and len({mark["grade_id"] for mark in marks}) == len(marks)
        text = "".join(text_of(cell) for cell in read_notebook(TEACHING / f"{exam}.ipynb")["cells"])
        assert (sum(exercise.minutes for exercise in exercises), points) == facts[:2] and facts[2] in text
    stub = json.dumps(read_notebook(editions["student"] / "nbs" / "teaching" / "self_test.ipynb"))
    assert "BEGIN SOLUTION" not in stub and "NotImplementedError" in stub


# --- slides ---

@each_chapter
def test_slides_of_a_chapter(path):
    notebook = read_notebook(path)
    slides = slides_of(notebook)
    headings = [heading for cell in notebook["cells"] if cell["cell_type"] == "markdown" for heading in re.findall(r"(?m)^#{1,3} (.+)$", text_of(cell))]
    assert [slide.title for slide in slides if slide.title in headings] == [heading for heading in headings if heading != "Exercises"]
    assert slides[0].text and sum(bool(slide.figure) for slide in slides) >= 1
    page = slides_page(slides)
    assert page.count("<section") == len(slides) and page.count("<img") == sum(bool(slide.figure) for slide in slides)
    assert not re.search(r"(?:src|href)=[^d]?(?!data:)\w+:|@import|url\(", page)  # it loads nothing
    assert "**" not in page and not re.search(r"\$[^$<]*\\\\[a-z]+", page) and "\0" not in page


def test_slides_are_a_notebook_that_nbconvert_takes():
    nbconvert, nbformat = pytest.importorskip("nbconvert"), pytest.importorskip("nbformat")
    notebook = nbformat.reads(json.dumps(slides_notebook(slides_of(read_notebook(CHAPTERS[6])))), as_version=4)
    nbformat.validate(notebook)
    page, _ = nbconvert.SlidesExporter().from_notebook_node(notebook)
    assert page.count("<section") >= len(notebook["cells"]) and "reveal" in page and "data:image/png;base64" in page


@pytest.mark.slow
def test_slides_fit_their_page():
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright: pip install playwright")
    if chromium is None:
        pytest.skip("no Chromium here: make chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, asked = browser.new_page(viewport={"width": 1280, "height": 720}), []
        page.on("request", lambda request: asked.append(request.url))
        for path in CHAPTERS:
            page.set_content(slides_page(slides_of(read_notebook(path))))
            over = page.evaluate("[...document.querySelectorAll('section')].filter(s => s.scrollHeight > s.clientHeight || s.scrollWidth > s.clientWidth).map(s => s.innerText.slice(0, 60))")
            flat = page.evaluate("[...document.querySelectorAll('img')].filter(i => i.clientHeight < 100).map(i => i.alt)")
            assert over == [] and flat == [], path.name
        page.keyboard.press("ArrowRight")
        page.wait_for_function("scrollY > innerHeight / 2")
        assert [url for url in asked if not url.startswith("data:")] == []
        browser.close()
