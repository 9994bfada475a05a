"""The wheel installs and imports with nothing but what it says it requires: no nbdev, no Jupyter, no test tools."""
from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Runs inside the clean environment: borrows the installed packages of this one, but only those the wheel's requirements lead to.
CHECK = """
import importlib, pkgutil, sys
from importlib.machinery import PathFinder
absent, site = set(sys.argv[2].split(",")), sys.argv[1]
class Absent:  # finds modules on the path, but for those
    find_distributions = staticmethod(PathFinder.find_distributions)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in absent else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Absent()
sys.path.append(site)
import ris_nb
for module in pkgutil.iter_modules(ris_nb.__path__):
    if not module.name.startswith("_") and module.name != "explore":  # whose widgets come with an extra
        importlib.import_module(f"ris_nb.{module.name}")
ris_nb.vision.pretrained_namer()  # its weights came along,
ris_nb.batches.load_model(ris_nb.batches.shipped_checkpoint("magnet_tiny"))  # and the trained model's
print(ris_nb.__file__)
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


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
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"  # a copy, since two test processes that build in one folder get into each other's way
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", "__pycache__", "screenshots"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)], check=True)
    return next(out.glob("ris_nb-*.whl"))


def test_wheel_holds_the_library_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "ris_nb/task.py" in names
    assert {"ris_nb/explore.ipynb", "ris_nb/checkpoints/magnet_tiny/predictor.safetensors"} <= set(names)
    assert not [n for n in names if n.startswith(("nbs/", "tests/", "data/", "runs/"))]


def test_wheel_imports_without_developer_tools(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                          check=True, capture_output=True, text=True).stdout.strip()
    zipfile.ZipFile(wheel).extractall(site)
    text = zipfile.ZipFile(wheel).read(next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA"))).decode()
    roots = [re.match(r"[\w.-]+", line)[0] for line in re.findall(r"^Requires-Dist: (.+)$", text, re.M) if "extra ==" not in line]
    assert "nbdev" not in roots and "torch" in roots
    keep = required(roots)
    foreign = {module for module, owners in metadata.packages_distributions().items() if not {normal(o) for o in owners} & (keep | {"ris-nb"})}
    assert {"nbdev", "fastcore", "pytest", "jupyterlab"} <= foreign
    done = subprocess.run([python, "-c", CHECK, sysconfig.get_path("purelib"), ",".join(sorted(foreign))], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(site)
