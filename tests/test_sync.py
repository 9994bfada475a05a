"""What is committed belongs together: library and notebooks are the same text, notebooks are clean and their figures small, no import is idle."""
from __future__ import annotations

import base64
import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
MAX_FIGURE = 150_000


def test_library_is_what_the_notebooks_export(tmp_path):
    for name in ("settings.ini", "setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    (tmp_path / "ris_nb").mkdir()
    shutil.copy(ROOT / "ris_nb" / "__init__.py", tmp_path / "ris_nb")  # the public names, written by hand
    subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"],
                   cwd=tmp_path, check=True)
    fresh, kept = ({str(p.relative_to(root / "ris_nb")): p.read_text() for p in (root / "ris_nb").rglob("*.py")} for root in (tmp_path, ROOT))
    assert sorted(fresh) == sorted(kept)
    differing = [name for name in kept if kept[name] != fresh[name]]
    assert not differing, f"{differing} differ from their notebooks: run `make export`"


def test_one_version_everywhere():
    version = re.search(r"^version = (\S+)$", (ROOT / "settings.ini").read_text(), re.M)[1]
    assert re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] in (version, "Unreleased")


def test_no_import_and_no_name_is_idle():
    pytest.importorskip("ruff", reason='the linter comes with pip install -e ".[dev]"')
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "ris_nb", "tests", "setup.py"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean(path):
    from nbdev.clean import clean_nb
    notebook = json.loads(path.read_text())
    cleaned = copy.deepcopy(notebook)
    clean_nb(cleaned)
    assert cleaned == notebook, f"{path.name} is not clean: run `make export`"
    assert "widgets" not in notebook["metadata"]
    outputs = [o for c in notebook["cells"] for o in c.get("outputs", [])]
    assert outputs, "committed without outputs: it should read on a page without running"
    assert not [o for o in outputs if o["output_type"] == "error"]
    for figure in (figure for o in outputs for kind, figure in o.get("data", {}).items() if kind in ("image/png", "image/jpeg")):
        assert len(base64.b64decode(figure)) <= MAX_FIGURE


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name == "nbs"], ids=lambda p: p.stem)
def test_chapter_has_exercises(path):
    text = path.read_text()
    assert "## Summary" in text and "## Where we differ" in text and "## Exercises" in text
    assert (path.parent / "exercises" / path.name).exists() or (path.parent / "solutions" / path.name).exists()
