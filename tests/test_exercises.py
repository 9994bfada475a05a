"""Exercises: solutions pass every check, stubs fail every check, students get no solution, and nbgrader's own commands grade three submissions."""
from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from test_course import imports, MODULES, name_of

from ris_nb.cli.main import COMMANDS
from ris_nb.course.check import verdict
from ris_nb.course.editions import (NOTICE, PUBLISHED, RELATIVE, REPOSITORY, SITE, exercises_of, is_check, is_hidden_test, nbgrader_edition, read_notebook, student_edition,
                                    student_exercises, text_of)

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
SOURCES = sorted((NBS / "exercises").glob("*.ipynb"))
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
each_student = pytest.mark.parametrize("student", ["", pytest.param("ada", marks=pytest.mark.slow)], ids=["nobody", "ada"])  # ada's constants are her own


def run(notebook: dict, monkeypatch, hidden: bool = False) -> dict:
    """The names that a notebook's code cells define, whatever else they raise."""
    monkeypatch.chdir(NBS / "exercises")
    monkeypatch.setattr("ris_nb.cli.main.COMMANDS", dict(COMMANDS))  # a solution adds one
    names = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and not is_check(cell) and (hidden or not is_hidden_test(cell)):
            try:
                with redirect_stdout(StringIO()):
                    exec(compile(text_of(cell), cell["id"], "exec", dont_inherit=True), names)  # a notebook has no `from __future__`
            except Exception:
                if hidden:
                    raise
    return names


@each_student
@each_source
def test_solutions_pass_their_checks_and_the_hidden_ones(path, student, monkeypatch):
    notebook = read_notebook(path)
    monkeypatch.setenv("RIS_NB_STUDENT", student)
    names = run(notebook, monkeypatch, hidden=True)
    found = [verdict(exercise.number, names) for exercise in exercises_of(notebook)]
    assert [one for one in found if not one] == []


@pytest.mark.slow
@each_source
def test_stubs_fail_their_checks(path, monkeypatch):
    notebook = read_notebook(path)
    names = run(student_exercises(notebook), monkeypatch)
    assert [exercise.number for exercise in exercises_of(notebook) if verdict(exercise.number, names)] == []


@each_source
def test_exercises_are_complete(path):
    notebook, number = read_notebook(path), path.name[:2]
    found = exercises_of(notebook)
    assert [exercise.number for exercise in found] == [f"{number}.{k + 1}" for k in range(len(found))] and 4 <= len(found) <= 6
    assert len({exercise.kind for exercise in found}) > 1
    texts = [text_of(cell) for cell in notebook["cells"]]
    for exercise in found:
        assert f'check("{exercise.number}")' in texts and f'@exercise("{exercise.number}")' in "\n".join(texts)
    assert "<details><summary>Hint</summary>" in "\n".join(texts)
    for text in texts:  # what asks for a written answer says what it is worth
        assert ("<!-- BEGIN SOLUTION -->" in text) == ("<!-- BEGIN RUBRIC -->" in text) == bool(re.search(r"Rubric \(\d+ points?\)", text))


def chapters_needed(module: str) -> set[str]:
    """The numbers of the chapters whose modules a module of the library imports, directly or by way of others."""
    homes = {name_of(path): re.search(r"^# %% (\S+\.ipynb)", path.read_text(encoding="utf-8"), re.M)[1] for path in MODULES}
    paths, seen, todo = {name_of(path): path for path in MODULES}, set(), [module]
    while todo:
        name = todo.pop()
        if name in paths and name not in seen:
            seen.add(name)
            todo += imports(paths[name])
    return {Path(homes[name]).name[:2] for name in seen if "exercises" not in homes[name]} & {path.name[:2] for path in NBS.glob("[0-9]*.ipynb")}


@each_source
def test_exercises_need_no_later_chapter(path):
    text = "\n".join(text_of(cell) for cell in read_notebook(path)["cells"] if cell["cell_type"] == "code")
    for module in {*re.findall(r"(?:from|import)\s+(ris_nb(?:\.\w+)+)", text)}:
        assert {number for number in chapters_needed(module) if number > path.name[:2]} == set(), module


def test_the_students_edition_holds_no_solution(tmp_path):
    out = student_edition(NBS, tmp_path / "out")
    for path in out.rglob("*"):
        if path.suffix in (".ipynb", ".json") and "results" not in path.parts:
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(BEGIN|END) (SOLUTION|HIDDEN TESTS|RUBRIC)|@exercise", text), path
    for source in SOURCES:
        handed_out = json.dumps(read_notebook(out / "nbs" / "exercises" / source.name))
        for cell in read_notebook(source)["cells"]:
            for region in re.findall(r"BEGIN (?:SOLUTION|HIDDEN TESTS|RUBRIC).*?\n(.*?)\n[^\n]*END ", text_of(cell), re.S):
                for line in region.splitlines():
                    assert len(line.strip()) < 20 or json.dumps(line.strip())[1:-1] not in handed_out, line


def test_a_source_says_where_it_is_without_solutions():
    for path in [*SOURCES, NBS / "teaching" / "self_test.ipynb"]:
        notice, = [text_of(cell) for cell in read_notebook(path)["cells"] if text_of(cell).startswith(NOTICE)]
        assert f"({PUBLISHED.replace('https://github.com', 'https://colab.research.google.com/github')}/{path.relative_to(NBS.parent).as_posix()})" in notice, path


def test_links_of_an_edition_lead_somewhere(tmp_path):
    """To a file of the edition, to a page that the site has of a notebook, or to a file of the repository; never to a notebook with solutions."""
    student, part, grader = student_edition(NBS, tmp_path / "student"), student_edition(NBS, tmp_path / "part", ("07",)), nbgrader_edition(NBS, tmp_path / "nbgrader")
    seen = set()
    for path in [path for out in (student, part, grader) for path in out.rglob("*.ipynb")]:
        text = "\n".join(text_of(cell) for cell in read_notebook(path)["cells"] if cell["cell_type"] == "markdown")
        assert NOTICE not in text
        for target, _ in RELATIVE.findall(text):
            assert (path.parent / target).exists(), (path, target)
        for page in re.findall(rf"\]\({SITE}/([^)#]+)\.html", text):
            seen.add(page)
            assert (NBS / f"{page}.ipynb").is_file(), (path, page)
        for page in re.findall(rf"\]\({REPOSITORY}/blob/main/([^)#]+)", text):
            assert (NBS.parent / page).is_file() and not page.endswith(".ipynb"), (path, page)
    assert {"workshop/course_check", "06_vision", "07_lavt"} <= seen


# --- nbgrader ---

def nbgrader(*words: str, folder: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython"), "JUPYTER_NO_CONFIG": "1"}
    done = subprocess.run([sys.executable, "-m", "nbgrader", *words], cwd=folder, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


ASSIGNMENTS = {"ch07": NBS / "exercises" / "07_lavt.ipynb", **{name: NBS / "teaching" / f"{name}.ipynb" for name in ("midterm", "final")}}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_nbgrader_grades_three_submissions(assignment, tmp_path, monkeypatch):
    """Right, wrong in the first exercise, empty. What is graded by hand has no points yet, unless the place for it is untouched: then it has none."""
    pytest.importorskip("nbgrader", reason='nbgrader comes with pip install -e ".[dev]"')
    from nbgrader.api import Gradebook
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # nbgrader calls the program alembic
    exercises = exercises_of(read_notebook(ASSIGNMENTS[assignment]))
    checks = {f"check-{exercise.number.replace('.', '-')}": exercise.points for exercise in exercises}
    course, name = tmp_path / "course", ASSIGNMENTS[assignment].name
    nbgrader_edition(NBS, course, ("07",) if assignment == "ch07" else ())
    nbgrader("generate_assignment", assignment, "--create", folder=course)
    released = read_notebook(course / "release" / assignment / name)
    assert not re.search(r"BEGIN (SOLUTION|HIDDEN TESTS|RUBRIC)", json.dumps(released))
    answers = {cell["metadata"]["nbgrader"]["grade_id"]: text_of(cell) for cell in read_notebook(course / "source" / assignment / name)["cells"]
               if cell["metadata"].get("nbgrader", {}).get("solution")}
    first = next(iter(checks)).replace("check", "answer")

    def submit(student: str, change) -> None:
        notebook = copy.deepcopy(released)
        for cell in notebook["cells"]:
            grade_id = cell["metadata"].get("nbgrader", {}).get("grade_id")
            if grade_id in answers:
                cell["source"] = change(grade_id, text_of(cell))
        path = course / "submitted" / student / assignment / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(notebook), encoding="utf-8")

    submit("right", lambda grade_id, stub: answers[grade_id])
    submit("wrong", lambda grade_id, stub: answers[grade_id].replace("return ", "return 2 * ") if grade_id.startswith(f"{first}-") else answers[grade_id])
    submit("empty", lambda grade_id, stub: stub)
    nbgrader("autograde", assignment, "--create", folder=course)
    nbgrader("generate_feedback", assignment, folder=course)
    with Gradebook(f"sqlite:///{course}/gradebook.db") as book:
        for student, lost in (("right", 0), ("wrong", next(iter(checks.values()))), ("empty", sum(checks.values()))):
            found = book.find_submission_notebook(name.removesuffix(".ipynb"), assignment, student)
            grades = {grade.name: grade.auto_score for grade in found.grades}
            assert sum(grades[check] for check in checks) == sum(checks.values()) - lost, (student, grades)
            assert found.max_score == sum(exercise.points + exercise.written for exercise in exercises)
            assert sum(grade.needs_manual_grade for grade in found.grades) == (0 if student == "empty" else sum(exercise.written > 0 for exercise in exercises))
            assert (course / "feedback" / student / assignment / f"{name.removesuffix('.ipynb')}.html").is_file()
