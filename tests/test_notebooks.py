"""Every notebook runs from top to bottom by the rules of nbdev: cells flagged in settings.ini's `tst_flags` are skipped.

The slow tier has the exercises and exams, whose solutions test_exercises and test_teaching run with more tests than here,
and those pages of the workshop that take more than three seconds: they train, measure, or prove again what a test file proves.
"""
from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from configparser import ConfigParser
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
SLOW = ["exercises/*", "teaching/self_test", "teaching/midterm", "teaching/final", *(f"workshop/{name}" for name in (
    "cli_*", "course_slides", "deformable", "explore_fill", "fast_maps", "grounding_hosts", "listening", "pretraining", "probes", "repainting", "scenes",
    "speed", "study_*", "toy_speaker", "toys", "writer"))]


def skip_flags() -> list[str]:
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]["tst_flags"].split()


def run(path: Path, log: Path, environ: dict[str, str]) -> None:
    """Run a notebook in this process, just forked, as if it were a fresh one; the exit status tells whether it went well."""
    os.setsid()  # whatever it starts can be ended with it
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = [str(path)]
    multiprocessing.set_start_method(None, force=True)  # its own processes start as this Python starts them
    for name in [name for name in sys.modules if name.split(".")[0] == "ris_nb"]:
        del sys.modules[name]  # the notebook imports the library itself, and may define anew what the library registers
    from nbdev.test import test_nb
    sys.exit(not test_nb(path, skip_flags=skip_flags(), basepath=ROOT)[0])


def test_there_are_notebooks():
    assert NOTEBOOKS


def each(path: Path):
    name = path.relative_to(ROOT / "nbs").as_posix()
    slow = any(fnmatch(name, f"{pattern}.ipynb") for pattern in SLOW)
    return pytest.param(path, id=name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", [each(path) for path in NOTEBOOKS])
def test_notebook_runs(path, tmp_path):
    # A process of its own, so that no notebook passes on what another one left behind.
    process = multiprocessing.get_context("forkserver").Process(target=run, args=(path, tmp_path / "log", dict(os.environ)))
    process.start()
    try:
        process.join()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-6000:]
