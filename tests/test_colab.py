"""A chapter alone, as Colab opens it: an empty folder, an environment without the library, and the chapter's own first cell."""
from __future__ import annotations

import io
import os
import subprocess
import sysconfig
import venv
from configparser import ConfigParser
from pathlib import Path

import pytest
from test_course import CHAPTERS, code
from test_notebooks import skip_flags
from test_wheel import built, wheel  # noqa: F401, fixtures

from ris_nb.course.editions import COLAB, REPOSITORY, SITE, SOURCE, read_notebook, student_edition, text_of, with_first_cell, write_notebook

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"

RUN = """
import os, sys
from pathlib import Path
from nbdev.test import test_nb
import google.colab  # as Colab's kernel does; later than nbdev, which would run the notebook beside a kernel that isn't there
well = test_nb(Path(sys.argv[1]), skip_flags=sys.argv[2].split(), basepath=Path.cwd())[0]
import ris_nb
print(ris_nb.__file__, flush=True)
os._exit(not well)
"""


def test_every_chapter_begins_with_the_cell_for_colab():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    assert (REPOSITORY, SITE) == (ini["DEFAULT"]["git_url"], ini["DEFAULT"]["doc_host"] + ini["DEFAULT"]["doc_baseurl"]) and SOURCE.endswith(f"git+{REPOSITORY}")
    cell = COLAB.format(source=SOURCE, folder="nbs")
    assert [path.name for path in CHAPTERS if not code(path)[0]["text"].endswith(cell)] == []


def test_a_students_notebook_has_the_cell_once(tmp_path):
    out = student_edition(NBS, tmp_path / "out", source="./a.whl[colab]")
    for path in out.rglob("*.ipynb"):
        first = [text_of(cell) for cell in read_notebook(path)["cells"] if '"google.colab" in sys.modules' in text_of(cell)]
        folder = path.parent.relative_to(out).as_posix()
        assert first == ([] if path.stem == "syllabus" else [COLAB.format(source="./a.whl[colab]", folder=folder)]), path


def test_an_upload_is_read_as_either_ipywidgets_gives_it():
    pytest.importorskip("anywidget", reason="the panels need the extra ris_nb[explore]")
    from PIL import Image

    from ris_nb.explore.ask import read_upload
    file = io.BytesIO()
    Image.new("RGB", (5, 4), "red").save(file, "png")
    for files in (({"name": "a.png", "content": file.getvalue()},), {"a.png": {"metadata": {}, "content": file.getvalue()}}):  # 8; 7, which Colab has
        assert read_upload(files)[1].size == (5, 4)


@pytest.fixture(scope="module")
def bare(shared) -> Path:
    """The Python of an environment that has what this one has, but for the library; and a package google.colab that notes what is asked of it."""
    return shared("bare", make_bare) / "env" / "bin" / "python"


def make_bare(folder: Path) -> None:
    borrowed, fake = folder / "borrowed", folder / "fake"
    borrowed.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.lower().startswith(("ris_nb", "ris-nb", "__editable__")):
            (borrowed / path.name).symlink_to(path)
    (fake / "google" / "colab").mkdir(parents=True)
    (fake / "google" / "colab" / "__init__.py").write_text("")
    (fake / "google" / "colab" / "output.py").write_text("def enable_custom_widget_manager():\n    open('widgets', 'w').close()\n")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    site = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True, text=True).stdout.strip()
    Path(site, "borrowed.pth").write_text(f"{borrowed}\n{fake}\n")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [path.stem for path in CHAPTERS])
def test_a_chapter_runs_alone(name, bare, wheel, tmp_path):  # noqa: F811
    alone = tmp_path / "content"
    write_notebook(alone / f"{name}.ipynb", with_first_cell(read_notebook(NBS / f"{name}.ipynb"), f"{wheel}[colab]"))
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environ.update(PIP_NO_INDEX="1", PIP_DISABLE_PIP_VERSION_CHECK="1", IPYTHONDIR=str(tmp_path / "ipython"))  # pip finds all else installed, or fails
    done = subprocess.run([bare, "-c", RUN, str(alone / f"{name}.ipynb"), " ".join(skip_flags())], cwd=alone, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert str(bare.parent.parent) in done.stdout.splitlines()[-1]
    home = alone / "course"
    assert (home / "nbs" / "widgets").exists() and (home / "data" / "results" / "law.json").is_file() and (home / "course.json").is_file()
