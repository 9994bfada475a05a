"""The command line as a user meets it: one clear line for every bad input, and nothing good lost by it.

Commands run in this process through `main`, with a LAVT of almost nothing. What is killed, interrupted, out of disk or
one of several processes runs in a process of its own, forked from a server that has imported torch once.
"""
import json
import multiprocessing
import os
import pickle
import pty
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from unittest import mock

os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import numpy as np
import pytest
import torch
from PIL import Image
from parity import load_case, released_state
from safetensors.torch import load_file

from ris_nb.cli.flags import Answering, answering_model
from ris_nb.cli.explore import Explore, write_page
from ris_nb.cli.main import COMMANDS, first_page, main, parse
from ris_nb.recipes.recipes import list_recipes
from ris_nb.recipes.run import RUN_FILES
from ris_nb.data.shapes import make_scene
from ris_nb.data.sources import open_data
from ris_nb.data.speaker import refer
from ris_nb.data.tokenizer import build_vocabulary
from ris_nb.evaluation.cases import show_answers
from ris_nb.evaluation.floors import Floor
from ris_nb.models.magnet import MagNet
from ris_nb.registry import _shipped, create_model, load_model, register_model
from ris_nb.settings import nested
from ris_nb.training.state import read_log

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
SERVER = multiprocessing.get_context("forkserver")
TRAIN = ("--model", "lavt_speck", "--warmup", 0, "--batch-size", 4, "--val", "none")


@register_model
def lavt_speck(pretrained=False, **overrides):
    sizes = dict(image_size=16, vision=dict(patch=2, width=8, depths=(1, 1, 1, 1), heads=(1, 1, 2, 2)),
                 text=dict(width=16, layers=1, heads=2, ffn=16), decoder=dict(width=8))
    return create_model("lavt_tiny", pretrained, **nested(sizes, overrides))


def without_bars(text):
    return "".join(line + "\n" for line in re.split(r"[\r\n]+", text) if line.strip() and "%|" not in line)


def ris(*words):
    """Exit code, standard output, and standard error without progress bars."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, out.getvalue(), without_bars(err.getvalue())


def check_refusal(code, out, err, *needles):
    assert code == 2, (code, out, err)
    assert err.startswith("ris-nb: ") and err.count("\n") == 1 and len(err) < 700, err
    assert "Traceback" not in err and "\x1b" not in err
    for needle in needles:
        assert str(needle) in err, err


def refused(words, *needles):
    code, out, err = ris(*words)
    check_refusal(code, out, err, *needles)
    assert out == ""


def child(words, folder, before):
    """In a process of its own: one command, its output in files, its exit code."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers; a server of this process's own would outlive it
    sys.stdout, sys.stderr = (open(folder / name, "w") for name in ("stdout", "stderr"))
    if before:
        before()
    code = main([str(word) for word in words])
    sys.stdout.close(), sys.stderr.close()
    os._exit(code)


def start(words, folder, before=None):
    folder.mkdir(parents=True, exist_ok=True)
    process = SERVER.Process(target=child, args=(words, folder, before))
    process.start()
    return process


def finish(process, folder, signum=None, when=None):
    """Wait for the end, or send a signal once the file `when` is there; exit code, stdout, stderr."""
    deadline = time.monotonic() + 120
    while signum and not when.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    if signum and process.is_alive():
        os.kill(process.pid, signum)
    process.join(120)
    return process.exitcode, (folder / "stdout").read_text(), without_bars((folder / "stderr").read_text())


class FileLimit:
    """Stands for a full disk: no file of this process may grow beyond `size` bytes."""

    def __init__(self, size):
        self.size = size

    def __call__(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli") / "data"
    code, out, err = ris("data", "shapes", root, "--seed", 1, "--counts", "train", 6, "val", 5, "testA", 2)  # its words include red and circle
    assert (code, err) == (0, "") and "train" in out
    return root


@pytest.fixture(scope="module")
def run(root):
    """A trained checkpoint."""
    run = root.parent / "run"
    code, out, err = ris("train", "--root", root, "--out", run, "--steps", 3, *TRAIN)
    assert (code, err) == (0, ""), err
    assert f"{run}: 3 steps" in out and f"next: ris-nb evaluate --checkpoint {run} --root {root} --split val" in out
    return run


@pytest.fixture
def photo(root):
    return sorted((root / "images" / "refshapes").iterdir())[0]


@pytest.fixture
def copy(root, tmp_path):
    """A data root to be broken."""
    return shutil.copytree(root, tmp_path / "data")


# What works

def test_the_chain(root, run, photo, tmp_path):
    assert set(RUN_FILES[:6]) == {path.name for path in run.iterdir() if path.is_file()}  # the others come with trackers and keep_last
    code, out, err = ris("evaluate", "--checkpoint", run, "--root", root)
    assert (code, err) == (0, "") and "| oIoU |" in out and f"written to {run / 'val'}" in out
    assert {path.name for path in (run / "val").iterdir()} == {"report.json", "table.md", "records.jsonl", "cases.png"}
    report = json.loads((run / "val" / "report.json").read_text())
    sentences = sum(len(r.sentences) for r in open_data(root).referrals("val"))
    assert report["expressions"] == sentences == len((run / "val" / "records.jsonl").read_text().splitlines())
    assert report["data"] == "refshapes (generated)" and report["split"] == "val" and report["checkpoint"] == str(run)
    assert set(report["precision"]) == {"0.5", "0.6", "0.7", "0.8", "0.9"} and report["seconds"] > 0
    assert 0 <= report["oIoU"] <= 1 and 0 <= report["mIoU"] <= 1 and {"by_kind", "by_size"} <= set(report)

    code, out, err = ris("predict", photo, "the red circle", "--checkpoint", run, "--out", tmp_path / "answers")
    assert code == 0 and err == ""
    mask = np.asarray(Image.open(tmp_path / "answers" / f"{photo.stem}_mask.png"))
    assert np.array_equal(mask == 255, load_model(run).predict([photo], ["the red circle"])[0])
    assert Image.open(tmp_path / "answers" / f"{photo.stem}_overlay.png").size == Image.open(photo).size


def test_a_validated_run_keeps_its_best_and_a_shuffled_report_its_own_folder(root, tmp_path):
    code, out, err = ris("train", "--root", root, "--out", tmp_path, "--steps", 2, *TRAIN[:-2], "--validate-every", 1)
    assert code == 0 and "val_oIoU" in out
    code, out, err = ris("evaluate", "--checkpoint", tmp_path, "--root", root, "--shuffle-seed", 0)
    assert code == 0 and {path.name for path in (tmp_path / "val_shuffled").iterdir()} == {"report.json", "table.md", "records.jsonl"}
    assert json.loads((tmp_path / "val_shuffled" / "report.json").read_text())["shuffled"] == 0 and not (tmp_path / "val").exists()


def test_check_counts(root):
    code, out, err = ris("data", "check", root, "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "") and [row["split"] for row in rows] == ["train", "val", "testA"]
    data = open_data(root)
    for row in rows:
        referrals = data.referrals(row["split"])
        assert row["problems"] == [] and row["dataset"] == "refshapes" and row["split_by"] == "generated"
        assert row["refs"] == len(referrals) and row["sentences"] == sum(len(r.sentences) for r in referrals)
        assert row["images"] == len({r.image_path for r in referrals}) and row["mask_pixels"] == sum(int(r.mask().sum()) for r in referrals)
    assert ris("data", "check", root)[0] == 0


@pytest.mark.skipif(not (SHARED / "data" / "mini_refcoco").is_dir(), reason="needs the photos of ../shared/data")
def test_real_photos(tmp_path):
    mini, text = SHARED / "data" / "mini_refcoco", SHARED / "data" / "mini_refcoco_text"
    rows = json.loads(ris("data", "check", mini, "--json")[1])
    counts = {(r["dataset"], r["split_by"], r["split"]): (r["refs"], r["sentences"], r["mask_pixels"]) for r in rows}
    assert counts["refcoco", "unc", "train"] == (27, 36, 588984) and counts["refcocog", "google", "val"] == (22, 22, 592791)
    data = ("--root", mini, "--dataset", "refcoco", "--split-by", "unc")
    code, out, err = ris("train", *data, "--out", tmp_path, "--steps", 2, "--warmup", 0, "--batch-size", 4, "--val", "none")
    assert (code, err) == (0, "") and "--dataset refcoco --split-by unc --split val" in out
    assert load_model(tmp_path).image_size == create_model("lavt_tiny").image_size  # lavt_tiny, with its own settings
    code, out, err = ris("evaluate", *data, "--checkpoint", tmp_path, "--split", "testA")
    assert (code, err) == (0, "") and json.loads((tmp_path / "testA" / "report.json").read_text())["expressions"] == 18
    refused(["evaluate", "--root", text, "--dataset", "refcoco", "--checkpoint", tmp_path], "has no mask", "use data with masks")
    refused(["train", "--root", mini], "refcoco, refcoco+, refcocog", "dataset")


def test_help(monkeypatch):
    for words in ([], ["--help"], ["-h"], ["data"], ["data", "--help"]):
        assert ris(*words) == (0, first_page() + "\n", "")
    assert ris("--version")[1].strip() == version("ris_nb")
    commands = re.findall(r"^  ((?:data )?[a-z]+)  +[a-z]", first_page(), re.M)
    assert sorted(commands) == sorted(COMMANDS)
    monkeypatch.setenv("COLUMNS", "100")
    for command in commands:
        code, out, err = ris(*command.split(), "--help")
        assert (code, err) == (0, "") and f"usage: ris-nb {command}" in out
        flags = re.split(r"\n[ │] (?=--[a-z]|[A-Z]{3,}|\{)", out)[1:]
        assert len(flags) >= {"models": 0, "recipes": 1}.get(command, 2), command
        for flag in flags:  # every flag has words of its own, not only a default
            said = re.sub(r"\(default: .*?\)|\(required\)|--[a-z-]+|\{.*?\}+|[A-Z]{2,}|\W", " ", flag, flags=re.S).split()
            assert len(said) >= 3, (command, flag)


def test_help_and_typos_do_not_wait_for_torch():
    code = "import sys; from ris_nb.cli.main import main; print(main(['data', 'check', '--help']), main(['predict', 'x']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "0 2 False", done.stderr


def test_in_a_terminal_a_typo_is_one_line_too():
    """tyro draws its errors with boxes and colours where it talks to a terminal."""
    parent, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen([sys.executable, "-m", "ris_nb.cli", "data", "shapes", "x", "--size", "abc"],
                               stdin=terminal, stdout=terminal, stderr=terminal, env=environment, cwd=ROOT)
    assert process.wait(60) == 2
    os.close(terminal)
    said = os.read(parent, 10_000).decode()
    os.close(parent)
    check_refusal(2, "", said.replace("\r\n", "\n"), "--size", "abc", "see `ris-nb data shapes --help`")


# Flags

@pytest.mark.parametrize("line, needles", [
    ("tarin", ["no command 'tarin'", "evaluate"]), ("data shape x", ["no command 'data shape'"]),
    ("train", ["no folder data", "ris-nb data shapes"]), ("evaluate --root x", ["--checkpoint"]), ("predict a.png --checkpoint x", ["EXPRESSION"]),
    ("train --root x --stesp 3", ["--stesp", "perhaps --steps"]), ("train --root x more", ["more"]),
    ("train --root x --steps three", ["--steps", "three"]), ("train --root x --steps", ["--steps"]),
    ("train --root x --steps 0", ["steps must be greater than 0, not 0"]), ("train --root x --lr nan", ["lr must be"]),
    ("train --root x --schedule linear", ["linear", "cosine"]), ("train --root x --clip 0", ["clip", "None"]),
    ("train --root x --warmup 9 --steps 9", ["warmup", "less than steps (9)"]), ("train --root x --workers -1", ["workers", "-1"]),
    ("train --root x --force --resume", ["--force", "--resume", "choose one"]),
    ("data shapes new --size 8", ["64 to 4096 pixels", "8"]), ("data shapes new --size 100000", ["64 to 4096 pixels", "100000"]), ("data shapes new --flavour refshapez", ["refshapez", "refshapesg"]),
    ("data shapes new --counts trian 5", ["'trian'", "train"]), ("data shapes new --counts train many", ["--counts"]),
    ("data shapes new --seed -1", ["seed"]),
])
def test_flags(line, needles, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(line.split(), *needles)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, needles", [
    (["--seed", -1], ["seed must not be negative", "-1"]), (["--image-size", 0], ["--image-size", "from 1 to"]),
    (["--batch-size", 6, "--accumulate", 4], ["batch_size 6", "multiple of 4"]), (["--model", "lavt_huge"], ["'lavt_huge'", "lavt_tiny"]),
    (["--pretrained"], ["lavt_tiny's pretrained Swin", "pretrained=False"]), (["--vocabulary", "nothing.txt"], ["nothing.txt", "vocab.txt"]),
    (["--split", "trian"], ["'trian'", "train, val, testA"]), (["--val", "vall"], ["'vall'", "train, val, testA"]),
    (["--dataset", "refcoco"], ["refcoco", "found refshapes"]), (["--split-by", "unc"], ["'unc'", "generated"]),
])
def test_training_flags(root, tmp_path, flags, needles):
    refused(["train", "--root", root, "--out", tmp_path / "run", "--steps", 2, *TRAIN, *flags], *needles)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, needles", [
    (["--batch-size", 0], ["--batch-size", "from 1 to"]), (["--workers", -1], ["--workers"]), (["--shuffle-seed", -1], ["--shuffle-seed"]),
    (["--split", "testD"], ["'testD'", "train, val, testA"]), (["--root", "nowhere"], ["no folder nowhere", "ris-nb data shapes"]),
])
def test_evaluation_flags(root, run, tmp_path, flags, needles):
    refused(["evaluate", "--checkpoint", run, "--root", root, "--out", tmp_path / "report", *flags], *needles)
    assert not (tmp_path / "report").exists()


# Data

def referrals_of(copy):
    path = copy / "refshapes" / "refs(generated).p"
    return path, pickle.loads(path.read_bytes())


def annotate(copy, segmentation):
    """Give the first training object another mask."""
    path = copy / "refshapes" / "instances.json"
    instances, ref = json.loads(path.read_text()), referrals_of(copy)[1][0]
    next(a for a in instances["annotations"] if a["id"] == ref["ann_id"])["segmentation"] = segmentation
    path.write_text(json.dumps(instances))
    return ref


def train_words(data, out):
    return ["train", "--root", data, "--out", out, "--steps", 40, *TRAIN]


def test_missing_files(copy, tmp_path):
    refused(["data", "check", tmp_path / "gone"], "gone", "ris-nb data shapes")
    shutil.rmtree(copy / "images")
    refused(train_words(copy, tmp_path / "run"), "images", "ris-nb data shapes")
    code, out, err = ris("data", "check", copy)
    assert code == 1 and "images" in err
    (copy / "refshapes" / "instances.json").unlink()
    refused(train_words(copy, tmp_path / "run"), "instances.json is missing", "ris-nb data shapes")
    shutil.rmtree(copy / "refshapes")
    refused(train_words(copy, tmp_path / "run"), "no data set", copy)
    assert not (tmp_path / "run").exists()


def test_a_hostile_pickle(copy, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'hacked'}",)
    path, refs = referrals_of(copy)
    path.write_bytes(pickle.dumps([*refs, Hostile()]))
    refused(train_words(copy, tmp_path / "run"), path, "system", "refused")
    code, out, err = ris("data", "check", copy)
    assert code == 1 and "system" in err and "Traceback" not in err
    assert not (tmp_path / "hacked").exists()
    path.write_bytes(pickle.dumps(refs)[:-50])
    refused(train_words(copy, tmp_path / "run"), path, "no readable pickle", "get it again")


@pytest.mark.parametrize("fault", ["truncated", "corrupt", "text", "missing"])
def test_broken_images(copy, run, tmp_path, fault):
    path = sorted((copy / "images" / "refshapes").glob("train*"))[0]
    data = bytearray(path.read_bytes())
    if fault == "corrupt":
        data[400:420] = bytes(20)
    path.write_bytes({"truncated": data[:700], "corrupt": data, "text": b"no picture"}.get(fault, b""))
    if fault == "missing":
        path.unlink()
    code, out, err = ris("data", "check", copy)
    assert code == 1 and str(path) in err and err.count("\n") == 1 and "Traceback" not in err
    code, out, err = ris("data", "check", copy, "--json")
    assert code == 1 and err == "" and str(path) in json.loads(out)[0]["problems"][0]
    refused(train_words(copy, tmp_path / "run"), path)
    refused(["evaluate", "--root", copy, "--split", "train", "--checkpoint", run, "--out", tmp_path / "report"], path)
    assert not (tmp_path / "report").exists()
    refused(["predict", path, "the red circle", "--checkpoint", run, "--out", tmp_path / "answers"], path)
    assert not (tmp_path / "answers").exists()


def test_an_image_that_a_worker_cannot_read(copy, tmp_path):
    path = sorted((copy / "images" / "refshapes").glob("val*"))[0]
    path.write_bytes(path.read_bytes()[:500])
    code, out, err = finish(start(["evaluate", "--root", copy, "--checkpoint", copy.parent / "run", "--workers", 1], tmp_path / "a"), tmp_path / "a")
    check_refusal(code, out, err, copy.parent / "run")
    ris("train", "--root", copy, "--out", tmp_path / "run", "--steps", 1, *TRAIN)
    words = ["evaluate", "--root", copy, "--checkpoint", tmp_path / "run", "--workers", 1]
    code, out, err = finish(start(words, tmp_path / "b"), tmp_path / "b")
    check_refusal(code, out, err, path, "the data ends early")


def test_masks(copy, tmp_path):
    ref = annotate(copy, [[-30.0, 10, 50, 10, 50, 90, -30, 90]])
    code, out, err = ris("data", "check", copy)
    assert code == 1 and f"referral {ref['ref_id']}" in err and "reach out of their images" in err
    for segmentation, words in (([[1.0, 1, 1, 1, 1, 1]], "no pixel"), ([[-9e9, 0, 9e9, 0, 9, 9]], "far out of the frame"),
                                ([[1.0, 2, 3, 4, 5]], "odd number")):
        annotate(copy, segmentation)
        code, out, err = ris("data", "check", copy)
        assert code == 1 and f"referral {ref['ref_id']}" in err and words in err
        refused(train_words(copy, tmp_path / "run"), f"referral {ref['ref_id']}", words, "ris-nb data check")
        assert not (tmp_path / "run").exists()
    annotate(copy, [])
    refused(train_words(copy, tmp_path / "run"), f"referral {ref['ref_id']}", "has no mask")


def test_an_empty_expression_in_the_data(copy, tmp_path):
    path, refs = referrals_of(copy)
    refs[0]["sentences"][0].update(raw=" ", sent=" ")
    path.write_bytes(pickle.dumps(refs))
    refused(train_words(copy, tmp_path / "run"), f"referral {refs[0]['ref_id']}", "empty")
    code, out, err = ris("data", "check", copy)
    assert code == 1 and f"referral {refs[0]['ref_id']}" in err


# Questions

@pytest.mark.parametrize("expression", ["", "   ", "\n", "\x00"])
def test_empty_questions(run, photo, tmp_path, expression):
    refused(["predict", photo, expression, "--checkpoint", run, "--out", tmp_path / "a"], "says nothing", "describe one object")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("expression, warnings", [
    ("the red zebra", ["doesn't know 'zebra'"]), ("zebra " * 2000, ["doesn't know 'zebra'", "is longer"]), ("x" * 10_000, ["doesn't know"]),
    ("the red circle " * 667, ["is longer"]), (" ".join(f"word{i}q" for i in range(1200)), ["and 1195 more", "is longer"]), ("le café rouge ☕", ["☕"])])
def test_unknown_and_endless_questions(run, photo, tmp_path, expression, warnings):
    begin = time.monotonic()
    code, out, err = ris("predict", photo, expression, "--checkpoint", run, "--out", tmp_path)
    assert code == 0 and err.count("\n") == len(warnings) and len(err) < 500 and "of the photo; written" in out
    assert all(warning in err for warning in warnings), err
    assert time.monotonic() - begin < 10


def test_odd_photos(run, tmp_path):
    refused(["predict", tmp_path / "gone.jpg", "red", "--checkpoint", run], "gone.jpg", "check the path")
    refused(["predict", tmp_path, "red", "--checkpoint", run], tmp_path, "no photo lies in this folder")
    turned = Image.new("RGB", (30, 20), "red")
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    assert ris("predict", tmp_path / "turned.jpg", "the red one", "--checkpoint", run, "--out", tmp_path)[0] == 0
    assert Image.open(tmp_path / "turned_mask.png").size == (20, 30)  # as a person sees it


# Checkpoints

def test_checkpoints(root, run, photo, tmp_path):
    vocabulary = build_vocabulary(["the red circle"])

    def both(folder, *needles):
        refused(["predict", photo, "red", "--checkpoint", folder, "--out", tmp_path / "a"], *needles)
        refused(["evaluate", "--root", root, "--checkpoint", folder, "--out", tmp_path / "a"], *needles)

    both(tmp_path / "gone", "gone")
    both(photo, photo)
    for name, text, needles in (("broken", "{", ["config.json", "can't be read"]), ("other", '{"architectures": ["Bert"]}', ["another library", "LAVT"]),
                                ("strange", '{"class": "os.system"}', ["os.system", "LAVT"])):
        shutil.copytree(run, tmp_path / name)
        (tmp_path / name / "config.json").write_text(text)
        both(tmp_path / name, *needles)
    create_model("lavt_speck", vocabulary=vocabulary, vision=dict(width=16)).save_pretrained(tmp_path / "wider")
    shutil.copytree(run, tmp_path / "mixed")
    shutil.copy(tmp_path / "wider" / "model.safetensors", tmp_path / "mixed")
    both(tmp_path / "mixed", "model.safetensors", "misshapen")
    (tmp_path / "mixed" / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-100])
    both(tmp_path / "mixed", "model.safetensors", "no sound safetensors")
    (tmp_path / "mixed" / "model.safetensors").unlink()
    both(tmp_path / "mixed", "model.safetensors", "incomplete")
    Floor("whole image").save_pretrained(tmp_path / "floor")
    shutil.copy(tmp_path / "floor" / "model.safetensors", tmp_path / "mixed")
    both(tmp_path / "mixed", "missing")
    assert not (tmp_path / "a").exists()


# The run's folder

def test_a_run_is_not_lost_by_a_slip(root, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    before, words = contents(folder), ["train", "--root", root, "--out", folder, "--steps", 3, *TRAIN]
    refused(words, "already holds a run", "resume")
    refused([*words, "--resume", "--lr", 1], "lr was", "resume with the old values")
    refused([*words, "--resume", "--image-size", 32], "--image-size was None and is now 32")
    refused([*words, "--resume", "--split", "val"], "--split was train and is now val")
    refused([*words, "--force", "--accumulate", 3], "multiple of 3")
    refused([*words, "--force", "--split", "trian"], "'trian'")
    assert contents(folder) == before
    (folder / "command.json").write_text("{")
    refused([*words, "--resume"], "command.json", "can't be read")
    (folder / "notes.txt").write_text("mine")
    (folder / "events.out.tfevents.1").write_text("of the old run")
    code, out, err = ris(*words, "--force")
    assert code == 0 and (folder / "notes.txt").exists() and not (folder / "events.out.tfevents.1").exists()
    assert contents(folder)[folder / "model.safetensors"] == before[folder / "model.safetensors"]  # same seed, same weights
    (folder / "state.pt").write_bytes(b"half")
    refused([*words, "--resume"], "state.pt: cannot be read", "start a new run")
    refused([*words[:4], folder / "notes.txt", *words[5:]], "notes.txt")


def test_a_run_that_never_began_binds_nobody(root, tmp_path):
    (tmp_path / "command.json").write_text('{"image_size": 999}')
    assert ris("train", "--root", root, "--out", tmp_path, "--steps", 1, *TRAIN)[0] == 0


@pytest.fixture
def one_thread():
    """As many threads as `child` has: another number adds in another order, and the last bits differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("signum, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_stopped_and_resumed(root, tmp_path, one_thread, signum, code):
    words = ["train", "--root", root, "--steps", 12, *TRAIN, "--save-every", 2, "--log-every", 3]
    folder = tmp_path / "stopped"
    process = start([*words, "--out", folder], tmp_path / "first", Slow())
    ended, out, err = finish(process, tmp_path / "first", signum, folder / "state.pt")
    assert ended == code and out == ""
    steps = torch.load(folder / "state.pt", weights_only=True)["step"]
    assert 0 < steps < 12
    if signum == signal.SIGINT:
        advice = err.startswith("ris-nb: interrupted; go on with: ris-nb train ") and err.endswith("--resume\n") and err.count("\n") == 1
        assert advice, (tmp_path / "first" / "stderr").read_text()  # with its bars
    assert ris(*words, "--out", folder, "--resume")[0] == 0
    assert ris(*words, "--out", tmp_path / "unbroken")[0] == 0
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "unbroken"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "unbroken").iterdir()}


class Slow:
    """Lets a training sleep between its steps, so that it can be caught in the middle."""

    def __call__(self):
        from ris_nb.training import loop as training
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job that a script put in the background ignores Ctrl-C
        original = training.seed_step
        training.seed_step = lambda *args: (time.sleep(0.3), original(*args))


# A full disk

def test_a_full_disk_keeps_what_was_good(root, run, photo, tmp_path):
    def limited(size, *words):
        code, out, err = finish(start(words, tmp_path / "said", FileLimit(size)), tmp_path / "said")
        check_refusal(code, out, err)
        return err

    folder = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(folder / "val", ignore_errors=True)
    assert ris("evaluate", "--root", root, "--checkpoint", folder)[0] == 0
    assert ris("predict", photo, "red", "--checkpoint", folder, "--out", folder)[0] == 0
    before = contents(folder)
    assert f"can't write {folder / 'val' / 'report.json'}" in limited(1000, "evaluate", "--root", root, "--checkpoint", folder)
    assert f"{photo.stem}_overlay.png" in limited(1000, "predict", photo, "red", "--checkpoint", folder, "--out", folder)
    assert contents(folder) == before
    words = ["train", "--root", root, "--out", tmp_path / "new", "--steps", 3, *TRAIN, "--save-every", 1]
    said = limited(20_000, *words)
    assert str(tmp_path / "new") in said and "free some space" in said
    assert not (tmp_path / "new").exists()  # nothing was saved
    assert ris(*words)[0] == 0  # space has been made
    assert "make room" in limited(2000, "data", "shapes", tmp_path / "shapes", "--counts", "train", 3)
    assert not list(tmp_path.rglob("*.p"))


def test_a_path_that_cannot_be_a_folder(root, run, photo):
    refused(["evaluate", "--root", root, "--checkpoint", run, "--out", photo], photo, "choose another folder")
    refused(["predict", photo, "red", "--checkpoint", run, "--out", photo], photo, "choose another folder")
    refused(["data", "shapes", photo], photo, "choose another root")


# Several processes

def member(rank, port, words, folder):
    """One of two processes, with the environment that torchrun and accelerate launch give it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    child(words, folder, None)


def two(words, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = [folder / str(rank) for rank in range(2)]
    for each in folders:
        each.mkdir(parents=True)
    processes = [SERVER.Process(target=member, args=(rank, port, words, each)) for rank, each in enumerate(folders)]
    for process in processes:
        process.start()
    return [finish(process, each) for process, each in zip(processes, folders)]


def test_two_processes_write_one_report_and_train_one_model(root, run, tmp_path):
    words = ["evaluate", "--root", root, "--checkpoint", run, "--batch-size", 2]
    assert ris(*words, "--out", tmp_path / "one")[0] == 0
    ends = two([*words, "--out", tmp_path / "two"], tmp_path / "said")
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert "written to" in ends[0][1] and ends[1][1] == ""  # the main process alone speaks and writes
    one, both = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert both.pop("machine")["processes"] == 2 and one.pop("machine")["processes"] == 1
    one.pop("seconds"), both.pop("seconds")
    assert one == both
    assert (tmp_path / "one" / "records.jsonl").read_text() == (tmp_path / "two" / "records.jsonl").read_text()

    words = ["train", "--root", root, "--steps", 3, *TRAIN]
    ends = two([*words, "--out", tmp_path / "run"], tmp_path / "trained")
    assert [code for code, _, _ in ends] == [0, 0] and "3 steps" in ends[0][1] and ends[1][1] == "", ends
    ours, theirs = (read_log(path) for path in (tmp_path / "run", run))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] and ours[-1]["step"] == 3
    assert all(abs(a["loss"] - b["loss"]) < 1e-4 for a, b in zip(ours, theirs))  # the last losses depend on the steps before


@pytest.mark.parametrize("command", ["train", "force", "evaluate", "predict", "compare"])
def test_a_launch_that_asks_for_bfloat16_is_refused_where_the_command_computes_in_float32(root, run, photo, tmp_path, monkeypatch, command):
    """As `accelerate launch --mixed_precision bf16` asks; nothing is written, and a run that is there stays."""
    kept = contents(shutil.copytree(run, tmp_path / "run"))
    out = tmp_path / "out"
    words = {"train": ["train", "--root", root, "--steps", 1, *TRAIN, "--out", out],
             "force": ["train", "--root", root, "--steps", 3, *TRAIN, "--out", tmp_path / "run", "--force"],
             "evaluate": ["evaluate", "--root", root, "--checkpoint", run, "--out", out],
             "predict": ["predict", photo, "red", "--checkpoint", run, "--out", out],
             "compare": ["compare", photo, "red", "--models", run, "--out", out]}[command]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    refused(words, "mixed precision bf16", "launch without --mixed_precision")
    assert not out.exists() and contents(tmp_path / "run") == kept


def test_a_launch_in_bfloat16_may_train_in_bfloat16(root, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    code, _, err = ris("train", "--root", root, "--steps", 1, *TRAIN, "--precision", "bf16", "--out", tmp_path / "run")
    assert code == 0, err


def test_a_launch_in_bfloat16_may_answer_in_bfloat16(root, run, photo, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for words in (("evaluate", "--root", root), ("predict", photo, "red")):
        code, _, err = ris(*words, "--checkpoint", run, "--precision", "bf16", "--out", tmp_path / words[0])
        assert code == 0, err
    assert json.loads((tmp_path / "evaluate" / "report.json").read_text())["machine"]["precision"] == "bf16"


# Which model answers

@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A small MagNet under the names of the authors' code, as a file, and the vocabulary of its words."""
    folder = tmp_path_factory.mktemp("authors")
    torch.save({"model": released_state(load_case("magnet_tiny")), "epoch": 3}, folder / "magnet.pth")
    (folder / "vocab.txt").write_text("\n".join(build_vocabulary(["the red circle"])))
    return folder / "magnet.pth", folder / "vocab.txt"


@pytest.mark.parametrize("model", ["folder", "shipped", "released"])
def test_predict_compare_evaluate_and_explore_take_the_same_models(root, run, photo, released, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    init = MagNet.__init__
    monkeypatch.setattr(MagNet, "__init__", lambda self, image_size=64, **sizes: init(self, image_size, **sizes))  # 480 pixels would take long
    weights, vocabulary = released
    one = {"folder": ["--checkpoint", run], "shipped": ["--checkpoint", "sag_tiny"], "released": ["--released", weights, "--vocabulary", vocabulary]}[model]
    several = ["--models" if word == "--checkpoint" else word for word in one]
    assert ris("predict", photo, "the red circle", *one)[0] == 0 and (tmp_path / f"{photo.stem}_mask.png").exists()
    assert ris("compare", photo, "the red circle", *several)[0] == 0 and (tmp_path / f"{photo.stem}_answers.png").exists()
    code, out, err = ris("evaluate", "--root", root, "--split", "testA", *one)
    report = {"folder": run, "shipped": tmp_path / "runs/scored/sag_tiny", "released": tmp_path / "runs/released/magnet"}[model] / "testA/report.json"
    assert code == 0 and report.exists(), err
    flags = parse(Explore, "explore", list(map(str, several)))
    page = write_page(tmp_path, flags)
    cell, = json.loads(page.read_text())["cells"]
    monkeypatch.chdir(run)  # a server for pages runs elsewhere
    space = {}
    exec("".join(cell["source"]), space)
    names = list(space["answering_models"](flags))
    assert len(names) == 1 and Path(names[0]).name in ("run", "sag_tiny", "magnet.pth")


def test_compare_turns_a_photo_upright(run, tmp_path, monkeypatch):
    from ris_nb.evaluation import cases
    turned, seen = Image.new("RGB", (30, 20), "red"), []
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    draw = show_answers
    monkeypatch.setattr(cases, "show_answers", lambda models, photo, expression: seen.append(photo.size) or draw(models, photo, expression))
    assert ris("compare", tmp_path / "turned.jpg", "the red one", "--models", run, "--out", tmp_path)[0] == 0
    assert seen == [(20, 30)]


def test_a_dollar_sign_is_a_dollar_sign(run, photo, tmp_path):
    for expression in (r"the $\frac{$ red circle", "red $$", "$x$ ${"):
        code, out, err = ris("compare", photo, expression, "--models", run, "--out", tmp_path)
        assert code == 0 and " doesn't know" in err


def test_the_first_round_asks_for_something_that_is_there():
    name, question = re.search(r"ris-nb predict \S+/(val_\d+)\.png \"(.+?)\"", first_page()).groups()
    scene = make_scene(0, split="val", index=int(name[4:]))
    assert question in {expression.text for expression in refer(scene, "refshapes")}


def test_an_empty_answer_is_said(run, tmp_path, monkeypatch):
    Image.new("RGB", (32, 32)).save(tmp_path / "night.png")
    monkeypatch.setattr("ris_nb.models.lavt.LAVT.masks", lambda self, output, sizes: [torch.zeros(size, dtype=torch.bool) for size in sizes])
    code, out, err = ris("predict", tmp_path / "night.png", "the red circle", "--checkpoint", run, "--out", tmp_path)
    assert code == 0 and err == "" and out.startswith("there is none: ") and "0.0% of the photo" in out
    code, out, err = ris("compare", tmp_path / "night.png", "the red circle", "--models", run, "--out", tmp_path)
    assert code == 0 and err == "" and out.startswith("there is none: ") and out.count("\n") == 2


def test_all_shipped_models_are_compared_and_named(tmp_path, monkeypatch):
    """Without --models all of them answer; the picture, like the line printed, says where there is none. --help names them all."""
    from ris_nb.evaluation import cases
    names, said = _shipped(), {}
    scene = make_scene(0, split="val", index=3)
    nothing = next(e.text for e in refer(scene, "refshapes_plural") if e.kind == "none")
    Image.fromarray(scene.image).save(tmp_path / "scene.png")
    draw = show_answers

    def look(models, photo, expression):
        figure = draw(models, photo, expression)
        said.update({name: figure.axes[4 * row + 3].get_xlabel() for row, name in enumerate(models)})
        return figure
    monkeypatch.setattr(cases, "show_answers", look)
    code, out, err = ris("compare", tmp_path / "scene.png", nothing, "--out", tmp_path)
    assert err == "warning: sag_toys doesn't know 'ring'; try other words\n"  # it has learned toys' words alone
    assert code == 0 and list(said) == names and {"cris_tiny", "rela_tiny"} < set(names)
    assert said["rela_tiny"] == "there is none" and "there is none: rela_tiny finds nothing" in out and said["sag_tiny"].startswith("marks ")
    for command in ("compare", "explore", "predict", "evaluate", "listen", "train"):
        text = " ".join(ris(command, "--help")[1].split())
        assert all(name in text for name in names), command


# Fine-tuning, plans, and a run that fails

def test_fine_tuning_begins_with_the_weights_and_settings_of_another_run(root, run, tmp_path):
    words = ["train", "--root", root, "--split", "val", "--val", "none", "--steps", 2, "--batch-size", 4, "--from", run, "--out", tmp_path / "tuned"]
    code, out, err = ris(*words, "--freeze", "text")
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "tuned/command.json").read_text())["from"] == str(run)
    first, tuned = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "tuned"))
    kept = {name.partition(".")[0] for name in first if torch.equal(first[name], tuned[name])}
    moved = {name.partition(".")[0] for name in first if not torch.equal(first[name], tuned[name])}
    assert "text" in kept and "text" not in moved and "decoder" in moved
    assert load_model(tmp_path / "tuned").vocabulary == load_model(run).vocabulary
    assert ris(*words, "--freeze", "text", "--resume")[0] == 0
    refused([*words[:-4], *words[-2:], "--freeze", "text", "--resume"], "--from was", "resume with the old values")
    refused([*words, "--model", "lavt_tiny"], "--from", "leave out --model")
    code, out, err = ris(*words[:-1], tmp_path / "shipped", "--from", "lavt_tiny", "--recipe", "lavt_tiny")
    assert code == 0 and re.search(r"from +lavt_tiny +OVERRIDE", out)
    assert load_model(tmp_path / "shipped").vocabulary == answering_model(Answering(checkpoint="lavt_tiny")).vocabulary


def test_a_dry_run_reads_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = ris("train", "--recipe", "magnet_refcoco", "--dry-run", "--lr", 1e-4)
    assert (code, err) == (0, "") and re.search(r"steps +53005 ", out) and re.search(r"lr +0.0001 +OVERRIDE: the recipe says 5e-05", out)
    code, out, err = ris("train", "--dry-run", "--steps", 60)
    assert (code, err) == (0, "") and re.search(r"warmup +6 +\(default: 100\)", out) and re.search(r"model +lavt_tiny", out)
    assert ris("recipes")[1].count("\n") == 1 + len(list_recipes()) and ris("recipes", "magnet_refcoco")[1].startswith("recipe: MagNet on refcoco")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words, rate, why", [
    ((), "0.002", "lavt_tiny, a tiny model"), (("--from", "sag_tiny"), "0.002", "sag_tiny, a tiny model"),
    (("--model", "lavt_swin_base", "--pretrained"), "5e-05", "lavt_swin_base, full-size or pretrained"),
    (("--from", "owner/name"), "5e-05", "owner/name, full-size or pretrained"),
    (("--model", "lavt_swin_base", "--lr", "1e-3"), "0.001  (default: 5e-05)", "lavt_swin_base, full-size or pretrained")])
def test_without_a_recipe_the_rate_follows_the_model(words, rate, why):
    code, out, err = ris("train", *words, "--dry-run")
    assert (code, err) == (0, "") and f"by default of {why}" in out
    assert next(line for line in out.splitlines() if line.startswith("  lr ")).split(maxsplit=1)[1] == rate


def test_a_run_that_diverges_before_its_first_save_leaves_the_folder_free(root, tmp_path):
    words = ["train", "--root", root, "--out", tmp_path / "run", "--steps", 4, *TRAIN]
    refused([*words, "--lr", 1e18, "--clip", "None"], "is not finite", "nothing was saved yet")
    assert not (tmp_path / "run").exists()
    assert ris(*words)[0] == 0


def test_a_broken_pipe_is_quiet():
    for line in ("results", "recipes magnet_refcoco"):
        done = subprocess.run(f"{sys.executable} -m ris_nb.cli {line} | head -1; exit ${{PIPESTATUS[0]}}", shell=True, executable="/bin/bash",
                              capture_output=True, text=True, cwd=ROOT)
        assert done.stderr == "" and done.stdout.count("\n") == 1 and done.returncode in (0, 141)


def test_a_machine_without_enough_memory_is_told_in_one_line(monkeypatch):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")):
        monkeypatch.setattr("ris_nb.cli.models.run_models", mock.Mock(side_effect=error))
        refused(["models"], "not enough memory")


def test_what_computes_nothing_imports_nothing_heavy(tmp_path):
    code = """if True:
        import sys
        from ris_nb.cli.main import main
        for line in (["--help"], ["models"], ["recipes"], ["recipes", "magnet_refcoco"], ["results"], ["train", "--help"], ["train", "--dry-run"]):
            assert main(line) == 0
        print([name for name in ("transformers", "timm", "accelerate", "matplotlib.pyplot", "scipy.stats") if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout[-300:] + done.stderr[-2000:]
