"""Every notebook runs from top to bottom by the rules of nbdev: cells flagged in settings.ini's `tst_flags` are skipped."""
from __future__ import annotations

import multiprocessing
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def skip_flags() -> list[str]:
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]["tst_flags"].split()


def run(path: Path, flags: list[str]) -> bool:
    from nbdev.test import test_nb
    return test_nb(path, skip_flags=flags, basepath=ROOT)[0]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_notebook_runs(path):
    # A process of its own, so that no notebook passes on what another one left behind.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(run, (path, skip_flags())), f"{path.name} failed; its traceback stands above"
