"""A model of one's own, twenty lines in a file outside the repository, through every command, each by one line.

The same model through a package with an entry point, as `pip install` would leave it.
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_cli import Slow, check_refusal, finish, refused, ris, start

from ris_nb.cli.explore import Explore, write_page
from ris_nb.cli.main import parse
from ris_nb.models.mask_grounding import Grounded
from ris_nb.registry import import_file, load_model
from ris_nb.training.state import read_log

BAG = '''
import torch
from torch import nn
from ris_nb import Grounded, Output, RISModel, mask_loss, register_model, score_masks

class BagRIS(RISModel):
    """Pixels that agree with the sum of the words."""
    def __init__(self, image_size=32, vocabulary="bert-base-uncased", max_words=20, width=16, grounded=False, freeze=()):
        super().__init__(image_size, vocabulary, max_words, freeze=freeze)
        self.words, self.grounded = nn.Embedding(len(self.vocabulary), width), grounded
        self.pixels = nn.Sequential(nn.Conv2d(3, width, 4, stride=4), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, batch):
        words = self.words(batch.ids) * batch.words[..., None]
        pixels = self.pixels(batch.image)
        pixels = pixels if batch.which is None else pixels[batch.which]
        return Output(torch.einsum("bld,bdhw->bhw", words, pixels), words, pixels)

    def losses(self, output, batch):
        return {"mask": mask_loss(nn.functional.interpolate(output.score[:, None], batch.mask.shape[1:])[:, 0], batch.mask)}

    def masks(self, output, sizes, threshold=None):
        return score_masks(output.score, (self.image_size, self.image_size), sizes, threshold)

    def for_training(self):
        return Grounded(self, width=16, layers=1, heads=2, ffn=32) if self.grounded else self

@register_model
def bag_ris(pretrained=False, **settings):
    return BagRIS(**settings)
'''


@pytest.fixture(scope="module")
def place(shared):
    """A folder outside the repository, with data, the model's file and one trained run; one, as a process takes the name of a model from one file alone."""
    return shared("own_model", make_place)


def make_place(place):
    (place / "bag.py").write_text(BAG)
    assert ris("data", "shapes", place / "data", "--counts", "train", 4, "val", 3)[0] == 0
    code, out, err = alone([*training(place), "--out", place / "run"], place / "trained")  # with as many threads as the run that is stopped
    assert code == 0, err


def training(place, *flags):
    return ["train", "--root", place / "data", "--import", place / "bag.py", "--model", "bag_ris", "--set", "width=8", "--steps", 6,
            "--warmup", 0, "--batch-size", 4, "--val", "none", "--save-every", 2, *flags]


def alone(words, folder, before=None):
    """A command in a process that has imported no model of ours."""
    return finish(start(words, folder, before), folder)


def test_a_stopped_run_goes_on_with_the_same_file(place, tmp_path):
    words = training(place, "--out", tmp_path / "run")
    ended, out, err = finish(start(words, tmp_path / "first", Slow()), tmp_path / "first", signal.SIGKILL, tmp_path / "run/state.pt")
    assert ended == -signal.SIGKILL
    cut, digest = words.index("--import"), hashlib.sha256((place / "bag.py").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "run/command.json").read_text())["import"] == {str((place / "bag.py").resolve()): digest}
    check_refusal(*alone([*words[:cut], *words[cut + 2:], "--resume"], tmp_path / "none"), f"bag.py (sha256 {digest[:16]})", "--import bag.py")
    other, moved = tmp_path / "other/bag.py", tmp_path / "moved.py"
    other.parent.mkdir()
    other.write_text((place / "bag.py").read_text() + "\nchanged = True\n")
    words[cut + 1] = other
    check_refusal(*alone([*words, "--resume"], tmp_path / "changed"), f"bag.py (sha256 {digest[:16]}), and this bag.py has ")
    shutil.copy(place / "bag.py", moved)  # another path is fine
    words[cut + 1] = moved
    code, out, err = alone([*words, "--resume"], tmp_path / "second")
    assert code == 0, err
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", place / "run"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    settings = json.loads((tmp_path / "run/config.json").read_text())
    assert settings["class"] == "BagRIS" and settings["width"] == 8
    assert json.loads((tmp_path / "run/command.json").read_text())["set"] == {"width": 8}
    words[cut + 1] = place / "bag.py"
    refused([*words, "--resume", "--set", "grounded=true"], "--set was", "resume with the old values")


def test_a_folder_from_elsewhere_runs_no_code(tmp_path):
    run, trap = tmp_path / "run", tmp_path / "run/trap.py"
    run.mkdir()
    trap.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for kept in ([str(trap)], {str(trap): "ab" * 32}):  # as 0.2 kept it, and as it is now
        (run / "command.json").write_text(json.dumps({"import": kept}))
        refused(["train", "--root", tmp_path, "--out", run, "--resume"], "began with the file trap.py", "never asked for code")
    assert not (tmp_path / "ran").exists()


def test_every_command_takes_it(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own, photo = ["--import", place / "bag.py"], sorted((place / "data/images/refshapes").iterdir())[0]
    assert "bag_ris" in ris("models", *own)[1].split()
    code, out, err = ris("evaluate", "--checkpoint", place / "run", "--root", place / "data", *own, "--out", "report")
    assert (code, err) == (0, "") and json.loads(Path("report/report.json").read_text())["checkpoint"] == str(place / "run")
    assert ris("predict", *own, photo, "the red circle", "--checkpoint", place / "run")[0] == 0
    mask = np.asarray(Image.open(f"{photo.stem}_mask.png")) == 255
    assert np.array_equal(mask, load_model(place / "run").predict([photo], ["the red circle"])[0])
    assert ris("compare", photo, "the red circle", "--models", place / "run", "sag_tiny", *own)[0] == 0
    assert Path(f"{photo.stem}_answers.png").exists()


def test_the_page_of_explore_imports_it(place, tmp_path):
    flags = parse(Explore, "explore", ["--models", str(place / "run"), "--import", str(place / "bag.py")])
    cell, = json.loads(write_page(tmp_path, flags).read_text())["cells"]
    (tmp_path / "page.py").write_text("".join(cell["source"]))
    code, out, err = alone(["models", "--import", tmp_path / "page.py"], tmp_path / "said")  # a page runs in a process of its own
    assert code == 0 and "bag_ris" in out, err


def test_without_import_the_line_says_so(place, tmp_path):
    photo = next((place / "data/images/refshapes").iterdir())
    ended = alone(["predict", photo, "red", "--checkpoint", place / "run", "--out", tmp_path], tmp_path / "said")
    check_refusal(*ended, place / "run", "BagRIS", "--import")
    cut = training(place, "--out", tmp_path / "new")
    del cut[cut.index("--import"):cut.index("--import") + 2]
    check_refusal(*alone(cut, tmp_path / "more"), "'bag_ris'", "--import")
    assert not (tmp_path / "new").exists()


def test_grounded_is_an_argument_away(place, tmp_path):
    code, out, err = ris(*training(place, "--set", "grounded=true", "--out", tmp_path / "run"))
    assert (code, err) == (0, "")
    assert "grounding" in read_log(tmp_path / "run")[-1] and "grounding" not in read_log(place / "run")[-1]
    import_file(place / "bag.py")
    model = load_model(tmp_path / "run")
    assert type(model).__name__ == "BagRIS" and isinstance(model.for_training(), Grounded)


class OnPath:
    """Puts a folder on `sys.path`, as an installed package is."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __call__(self):
        sys.path.insert(0, self.folder)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    (site / "bagpack").mkdir()
    (site / "bagpack/__init__.py").write_text(BAG.replace("BagRIS", "PackedRIS").replace("bag_ris", "packed_ris"))
    (site / "bagpack-1.0.dist-info").mkdir()
    (site / "bagpack-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: bagpack\nVersion: 1.0\n")
    (site / "bagpack-1.0.dist-info/entry_points.txt").write_text("[ris_nb.models]\nbagpack = bagpack\n")
    return OnPath(site)


def test_an_installed_package_offers_its_models(place, package, tmp_path):
    words = [word for word in training(place, "--out", tmp_path / "run") if word not in ("--import", place / "bag.py")]
    words[words.index("bag_ris")] = "packed_ris"
    photo = next((place / "data/images/refshapes").iterdir())
    run = ["--checkpoint", tmp_path / "run"]
    for number, line in enumerate((["models"], words, [*words, "--resume"], ["evaluate", "--root", place / "data", *run],
                                   ["predict", photo, "red", *run, "--out", tmp_path],
                                   ["compare", photo, "red", "--models", tmp_path / "run", "--out", tmp_path])):
        code, out, err = alone(line, tmp_path / str(number), package)
        assert code == 0 and (line != ["models"] or "packed_ris" in out.split()), (line, err)
    assert json.loads((tmp_path / "run/config.json").read_text())["class"] == "PackedRIS"
    code, out, err = alone(["evaluate", "--root", place / "data", *run], tmp_path / "uninstalled")
    check_refusal(code, out, err, "PackedRIS")
