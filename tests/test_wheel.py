"""The source distribution makes the wheel, which imports with nothing but what it says it requires: no nbdev, no Jupyter, no test tools."""
from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections import defaultdict
from email import message_from_bytes
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Runs inside the clean environment: borrows the installed packages of this one, but only those the wheel's requirements lead to.
CHECK = """
import importlib, pkgutil, re, sys
from importlib.machinery import PathFinder
site, absent, keep = sys.argv[1], set(sys.argv[2].split(",")), set(sys.argv[3].split(","))
class Absent:  # finds what is on the path, but for those modules and for all distributions that aren't kept: torch asks for optree's version
    @staticmethod
    def find_distributions(context):
        return [d for d in PathFinder.find_distributions(context) if re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower() in keep]
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in absent else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Absent()
sys.path.append(site)
import ris_nb
for module in pkgutil.walk_packages(ris_nb.__path__, "ris_nb."):
    if "._" not in module.name and not module.name.startswith(("ris_nb.explore", "ris_nb.course.ch25", "ris_nb.course.ch26")):  # whose widgets come with an extra
        importlib.import_module(module.name)
ris_nb.encoders.pretraining.pretrained_namer()  # its weights came along,
ris_nb.registry.load_model("magnet_tiny")  # and the trained model's
print(ris_nb.__file__)
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def owners_of_modules() -> dict[str, set[str]]:
    "The installed distributions that bring each module; Python 3.10's `packages_distributions` knows only some."
    owners = defaultdict(set)
    for distribution in metadata.distributions():
        files = [file for file in distribution.files or () if file.suffix in (".py", ".so")]
        for name in {file.parts[0].partition(".")[0] for file in files} | set((distribution.read_text("top_level.txt") or "").split()):
            owners[name].add(normal(distribution.metadata["Name"]))
    return owners


def required(roots: list[str]) -> set[str]:
    "Names of all distributions that `roots` lead to, extras left out."
    seen, todo = set(), [normal(r) for r in roots]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        todo += [normal(re.match(r"[\w.-]+", r)[0]) for r in needs if "extra ==" not in r]
    return seen


@pytest.fixture(scope="module")
def built(shared) -> Path:
    """A folder with the source distribution and the wheel that was made from it."""
    return shared("built", build)


def build(out: Path) -> None:
    source = out / "source"  # a copy, since two test processes that build in one folder get into each other's way
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", "__pycache__", "screenshots"))
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source], check=True, capture_output=True)


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return next(built.glob("ris_nb-*.whl"))


@pytest.fixture(scope="module")
def about(wheel):
    """The wheel's metadata."""
    archive = zipfile.ZipFile(wheel)
    return message_from_bytes(archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))))


def requirements(about, extra: str = "") -> list[str]:
    "Names of what the wheel requires, with the extra of this name."
    lines = [line for line in about.get_all("Requires-Dist") if "extra ==" not in line or extra and f'extra == "{extra}"' in line]
    return [re.match(r"[\w.-]+", line)[0] for line in lines]


def test_wheel_holds_the_library_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "ris_nb/models/lavt.py" in names
    assert {"ris_nb/explore/explore.ipynb", "ris_nb/explore/word_game/predictor.safetensors"} <= set(names)
    assert not [n for n in names if n.startswith(("nbs/", "tests/", "data/", "runs/"))]


def test_wheel_holds_every_file_of_the_library(wheel):
    kept = {str(p.relative_to(ROOT)) for p in (ROOT / "ris_nb").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert kept <= set(zipfile.ZipFile(wheel).namelist())


def test_source_distribution_holds_no_half_of_the_tests(built):
    names = {name.partition("/")[2] for name in tarfile.open(next(built.glob("ris_nb-*.tar.gz"))).getnames()}
    assert {"settings.ini", "LICENSE", "ris_nb/models/lavt.py"} <= names and "tests/test_wheel.py" not in names


def test_what_a_package_index_shows(about):
    assert "Development Status :: 4 - Beta" in about.get_all("Classifier") and "Programming Language :: Python :: 3.13" in about.get_all("Classifier")
    assert any(line.startswith("Source, https://") for line in about.get_all("Project-URL"))
    text = about.get_payload()
    links = re.findall(r"\]\((.+?)\)", text)
    assert len(links) > 20 and all(link.startswith("https://") for link in links), links
    for page in re.findall(r"/(?:blob|raw)/main/(.+?)\)", text):
        assert (ROOT / page).exists(), page


@pytest.mark.parametrize("extra, notebooks", [("lab", ["**/*"]), ("colab", ["*", "exercises/*", "teaching/*"])])
def test_an_extra_brings_what_notebooks_import(about, extra, notebooks):
    keep, owners = required(requirements(about, extra)), owners_of_modules()
    keep |= required(requirements(about, "import"))  # its one cell asks first whether it is there
    own = {"ris_nb", "google", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
    imported = set()  # google.colab is Colab itself
    for path in (path for pattern in notebooks for path in (ROOT / "nbs").glob(f"{pattern}.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                code = "".join(line for line in cell["source"] if not line.lstrip().startswith("%"))  # no magics
                for node in ast.walk(ast.parse(code)):
                    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
                    imported |= {name.partition(".")[0] for name in names}
    assert {"torch", "fastcore"} <= imported
    library = {*sys.stdlib_module_names, "tomllib"}  # the latter from 3.11 on; below, ris_nb does without
    missing = [name for name in imported - library - own if not owners.get(name, {normal(name)}) & keep]
    assert not missing, f"{missing}: not among what `pip install 'ris_nb[{extra}]'` installs"


@pytest.mark.slow
def test_wheel_imports_without_developer_tools(wheel, about, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                          check=True, capture_output=True, text=True).stdout.strip()
    zipfile.ZipFile(wheel).extractall(site)
    roots = requirements(about)
    assert "nbdev" not in roots and "torch" in roots
    keep = required(roots) | {"ris-nb"}
    foreign = {module for module, owners in owners_of_modules().items() if not owners & keep}
    assert {"nbdev", "fastcore", "pytest", "jupyterlab"} <= foreign
    done = subprocess.run([python, "-I", "-c", CHECK, sysconfig.get_path("purelib"), ",".join(sorted(foreign)), ",".join(sorted(keep))],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(site)
