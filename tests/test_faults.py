"""Faults at moments that nobody chose: kills, full disks, folders that become read-only, files that end early.

Every command runs in a process of its own, forked from a server that has imported everything once. Its moments are
counted in calls of functions (`sys.setprofile`), not in seconds: a first run without a fault measures how many there
are and when each of them came, moments are drawn over its length, and the n-th call is the same moment everywhere.
"""
import ctypes
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from bisect import bisect
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from multiprocessing import connection

os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from PIL import Image
from test_import import make_coco, make_csv, make_labelme, photos
from test_training import same

from ris_nb.cli import main as program
from ris_nb.registry import create_model, load_model, register_model
from ris_nb.settings import nested
from ris_nb.training.state import read_log

SEED = 30
SERVER = multiprocessing.get_context("forkserver")
TRAIN = ("--model", "lavt_grain", "--steps", 6, "--warmup", 0, "--batch-size", 4, "--val", "none", "--save-every", 2,
         "--log-every", 1, "--keep-last", 1)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300),
              pytest.mark.skipif(sys.platform != "linux", reason="signals, limits and capabilities of Linux")]


@register_model
def lavt_grain(pretrained=False, **overrides):
    sizes = dict(image_size=16, vision=dict(patch=2, width=8, depths=(1, 1, 1, 1), heads=(1, 1, 2, 2)),
                 text=dict(width=16, layers=1, heads=2, ffn=16), decoder=dict(width=8))
    return create_model("lavt_tiny", pretrained, **nested(sizes, overrides))


# One command in a process of its own

FILE_CALLS = {"open", "write", "writelines", "flush", "close", "fsync", "replace", "rename", "unlink", "rmdir", "mkdir",
              "chmod", "serialize_file", "write_record", "write_end_of_file"}


def touches_files(event, call):
    """Whether a call from Python to C, or its return, is one that may change a file."""
    return (event.startswith("c_") and call.__name__ in FILE_CALLS
            and not isinstance(getattr(call, "__self__", None), (str, bytes, io.StringIO, io.BytesIO)))


class Clock:
    """Counts the calls of a command once its flags are read; at call number `moment` lets `strike` happen.

    Without a strike it notes when each call was.
    """

    def __init__(self, moment, strike):
        self.count, self.moment, self.strike, self.times, self.files = 0, moment, strike, [], []

    def __call__(self, frame, event, call):
        self.count += 1
        if not self.strike:
            self.times.append(time.perf_counter())
            if touches_files(event, call):
                self.files.append(self.count)
        elif self.count == self.moment:
            sys.setprofile(None)
            self.strike()


def without_bars(err):
    lines = [line for line in re.split(r"[\r\n]+", err.getvalue()) if line.strip()]
    return "".join(line + "\n" for line in lines if not re.search(r"%\||\d+it \[", line))


def child(words, moment, strike, pipe):
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers: a server would outlive this process
    os.register_at_fork(after_in_child=lambda: sys.setprofile(None))  # they are not counted
    clock, parse = Clock(moment, strike), program.parse

    def parse_and_count(*args):
        flags = parse(*args)
        sys.setprofile(clock if moment is not None else None)
        return flags
    program.parse = parse_and_count
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = program.main([str(word) for word in words])
        sys.setprofile(None)
    pipe.send((code, out.getvalue(), without_bars(err), clock.times, clock.files))


def run(words, moment=None, strike=None):
    """Exit code, stdout and stderr of a command, the times of its calls, and the numbers of those that touch files.

    The last two only with a moment and no strike.
    """
    ours, theirs = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=child, args=(words, moment, strike, theirs))
    process.start()
    theirs.close()
    connection.wait([ours, process.sentinel])  # workers of a loader that was killed hold the pipe open for some seconds
    try:
        said = ours.recv() if ours.poll() else None
    except EOFError:
        said = None
    process.join(100)
    return said or (process.exitcode, "", "", [], [])


def draw(measured, count, random):
    """Numbers of calls: half of them over the seconds that the command took, half over its calls that touch files."""
    times, files = measured
    length = times[-1] - times[0]
    last = int(0.99 * len(times))  # with workers, a few calls more or less are made each time
    seconds = [min(last, bisect(times, times[0] + random.random() * length)) for _ in range(count // 2)]
    return seconds + [min(last, random.choice(files)) for _ in range(count - len(seconds))]


# What may happen

def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fill_the_disk():
    """No file of this process grows from here on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


class Capabilities(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


def lock(place):
    """Make a tree read-only. Root would write all the same; this process gives up that right."""
    libc, header, sets = ctypes.CDLL(None), Capabilities(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(ctypes.byref(header), sets)
    sets[0] &= ~0b1110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
    libc.capset(ctypes.byref(header), sets)
    for path in [place, *place.rglob("*")]:
        path.chmod(path.stat().st_mode & 0o555)


def unlock(place):
    for folder, _, files in os.walk(place):
        for path in (folder, *(os.path.join(folder, name) for name in files)):
            os.chmod(path, os.stat(path).st_mode | 0o200)


# What is done, each in a folder `place` that holds what was there before

def training(source, place, *more):
    return ["train", "--root", source / "data", "--out", place / "run", *TRAIN, "--resume", *more]


def packing(source, place, *more):
    return ["data", "pack", source / "data", "--image-size", 16, "--out", place / "data.pack", *more]


def shapes(source, place):
    return ["data", "shapes", place / "data", "--seed", 1, "--counts", "train", 8, "val", 2]


def importing(kind, export, *more):
    return lambda source, place: ["data", "import", kind, source / "desk" / export, "--root", place / "mine", *more]


OPERATIONS = {
    "train": training, "train on": training,
    "train with workers": lambda source, place: training(source, place, "--workers", 2),
    "shapes": shapes, "shapes after more": shapes,
    "toys": lambda source, place: ["data", "toys", place / "data", "--seed", 1, "--counts", "train", 4],
    "pack": packing, "pack with workers": lambda source, place: packing(source, place, "--workers", 2),
    "import coco": importing("coco", "coco.json"), "import labelme": importing("labelme", "."),
    "import csv over another": importing("csv", "table.csv", "--force"),
    "evaluate": lambda source, place: ["evaluate", "--checkpoint", source / "run", "--root", source / "data",
                                       "--out", place / "report"],
    "predict": lambda source, place: ["predict", source / "desk/a.png", "the red circle",
                                      "--checkpoint", source / "run", "--out", place],
}
KILLS = {"train": 8, "train with workers": 4, "train on": 4, "shapes": 4, "shapes after more": 1, "toys": 4, "pack": 4,
         "pack with workers": 4, "import coco": 4, "import labelme": 2, "import csv over another": 4}


def ends_well(words, moment=None):
    code, out, err, *measured = run(words, moment)
    assert code == 0, err
    return measured


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Data, a run and exports of annotation tools, which nobody changes; in `before` what operations find."""
    source = tmp_path_factory.mktemp("source")
    ends_well(["data", "shapes", source / "data", "--seed", 1, "--counts", "train", 8, "val", 2])
    ends_well(["train", "--root", source / "data", "--out", source / "run", *TRAIN])
    desk = photos(source / "desk", "a.png", "b.png")
    make_coco(desk), make_labelme(desk), make_csv(desk)
    before = source / "before"
    for name in OPERATIONS:
        (before / name).mkdir(parents=True)
    for name, more in (("train on", []), ("shapes after more", ["train", 30])):  # killed half-way
        files = ends_well([*OPERATIONS[name](source, source / "more"), *more], 0)[1]
        words = [*OPERATIONS[name](source, before / name), *more]
        assert run(words, files[len(files) // 2], kill)[0] == -signal.SIGKILL
    assert not list(before.rglob("refs*.p")) and list(before.rglob("train_000008.png"))  # a picture of the larger set
    for name in ("pack", "pack with workers"):
        ends_well([*OPERATIONS[name](source, before / name), "--image-size", 8])
    ends_well(OPERATIONS["import coco"](source, before / "import csv over another"))
    for name in ("evaluate", "predict"):
        ends_well(OPERATIONS[name](source, before / name))
    return source


@pytest.fixture(scope="module")
def whole(source):
    """What an operation leaves that nothing disturbs, the times of its calls, and those that touch files."""
    made = {}

    def get(name):
        if name not in made:
            place = shutil.copytree(source / "before" / name, source / "whole" / name)
            measured = ends_well(OPERATIONS[name](source, place), 0)
            made[name] = contents(place), measured
        return made[name]
    return get


def contents(place):
    """Every file and folder, without what the clock decides and the names that `torch.save` gives."""
    found, clock = {}, ("samples_per_second", "waiting")
    for path in place.rglob("*"):
        name = path.relative_to(place).as_posix()
        if path.is_dir():
            found[name] = None
        elif path.name == "log.jsonl":
            found[name] = [{k: v for k, v in line.items() if k not in clock} for line in read_log(path.parent)]
        elif path.name == "state.pt":
            found[name] = torch.load(path, weights_only=True)
        elif path.name == "report.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
        elif path.name == "table.md":
            found[name] = re.sub(r"[\d.]+ s\b", "", path.read_text())
        else:
            found[name] = path.read_bytes()
    return found


def refused(code, out, err):
    """Exit code 2 and one line."""
    assert code == 2 and err.startswith("ris-nb: ") and err.count("\n") == 1, (code, out, err)
    assert len(err) < 700 and "Traceback" not in err, err
    return err


def nothing_lost(place, before, after):
    """Every file is as it was before or as it will be; what a training had saved can still be read.

    An interrupted data set is none, and is drawn anew.
    """
    now = contents(place)
    for name in before:
        if not name.startswith(("run", "data")) and name in now:
            assert same(now[name], before[name]) or same(now[name], after[name]), name
        hidden = name.rpartition("/")[2].startswith(".")  # a lock, or what the kill before had left
        assert name in now or hidden or name.startswith(("mine", "run/checkpoints", "data")), name
    if (place / "run/model.safetensors").exists():
        load_model(place / "run")


def finishes(name, source, place, after):
    """Again, to the end. A folder that an import had finished is left alone."""
    code, out, err, *_ = run(OPERATIONS[name](source, place))
    assert code == 0 or "is there already" in refused(code, out, err)
    now = contents(place)
    assert sorted(now) == sorted(after)  # no temporary files, too
    assert not [key for key in now if not same(now[key], after[key])]


@pytest.mark.parametrize("name", KILLS)
def test_a_kill_at_any_moment_leaves_no_trace(source, whole, tmp_path, name):
    after, measured = whole(name)
    before, rng = contents(source / "before" / name), random.Random(f"{SEED} {name}")
    for number, moment in enumerate(draw(measured, KILLS[name], rng)):
        place = shutil.copytree(source / "before" / name, tmp_path / str(number))
        assert run(OPERATIONS[name](source, place), moment, kill)[0] == -signal.SIGKILL
        nothing_lost(place, before, after)
        if number % 2:  # once more, soon after the second start
            run(OPERATIONS[name](source, place), int(rng.random() * len(measured[0]) / 3), kill)
        finishes(name, source, place, after)


# The limit would hold for the shared memory of workers, too.
@pytest.mark.parametrize("name", [name for name in OPERATIONS if "with workers" not in name])
@pytest.mark.parametrize("fault", ["full", "locked"])
def test_a_disk_that_is_full_or_locked_from_some_moment_on_is_one_line(source, whole, tmp_path, name, fault):
    after, measured = whole(name)
    before, rng = contents(source / "before" / name), random.Random(f"{SEED} {name} {fault}")
    for number, moment in enumerate([1, *draw(measured, 1 if name == "evaluate" else 3, rng)]):
        place = shutil.copytree(source / "before" / name, tmp_path / str(number))
        strike = fill_the_disk if fault == "full" else partial(lock, place)
        code, out, err, *_ = run(OPERATIONS[name](source, place), moment, strike)
        unlock(place)
        if moment == 1 or code != 0:  # else the last byte had been written by then
            refused(code, out, err)
        nothing_lost(place, before, after)
        finishes(name, source, place, after)


def test_there_are_enough_kills():
    assert sum(KILLS.values()) >= 30


# Files that end early, and photos that are none: in this process

def ris(words):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = program.main([str(word) for word in words])
    return code, out.getvalue(), without_bars(err)


def raw(place):
    return {path: path.read_bytes() if path.is_file() else None for path in place.rglob("*")}


def commands(place):
    """What reads a run, a pack, a data root and a folder of one's own."""
    data, run = place / "data", place / "run"
    train, out, pack = ["train", "--root", data, *TRAIN], ["--out", place / "new"], ["--pack", place / "data.pack"]
    evaluate = ["evaluate", "--checkpoint", run, "--root", data, *out]
    return {
        "resume": [*train, "--out", run, "--resume"], "train": [*train, *out], "train packed": [*train, *out, *pack],
        "tune": ["train", "--root", data, "--from", run, "--steps", 1, "--batch-size", 4, "--val", "none", *out],
        "train own": ["train", "--root", place / "mine", *TRAIN, "--batch-size", 1, *out],
        "evaluate": evaluate, "evaluate packed": [*evaluate, *pack],
        "predict": ["predict", place / "desk/a.png", "the red circle", "--checkpoint", run, *out],
        "compare": ["compare", place / "desk/a.png", "the red circle", "--models", run, *out],
        "pack": ["data", "pack", data, "--image-size", 16, "--out", place / "data.pack"],
        "pack own": ["data", "pack", place / "mine", "--image-size", 16, "--out", place / "data.pack"],
        "shapes": ["data", "shapes", data, "--seed", 1, "--counts", "train", 8, "val", 2],
        "check": ["data", "check", data], "check own": ["data", "check", place / "mine"],
        "import coco": ["data", "import", "coco", place / "desk/coco.json", "--root", place / "new"],
        "import csv": ["data", "import", "csv", place / "desk/table.csv", "--root", place / "mine", "--force"],
        "import labelme": ["data", "import", "labelme", place / "desk", "--root", place / "new"],
    }


@pytest.fixture
def place(source, tmp_path):
    place = tmp_path / "place"
    for name in ("data", "run", "desk"):
        shutil.copytree(source / name, place / name)
    shutil.copytree(source / "before/import csv over another/mine", place / "mine")
    assert ris(commands(place)["pack"])[0] == 0
    return place


READERS = {
    "run/state.pt": ["resume"], "run/train.json": ["resume"], "run/command.json": ["resume"],
    "run/config.json": ["evaluate", "predict", "compare", "tune"],
    "run/model.safetensors": ["evaluate", "predict", "compare", "tune"],
    "data.pack": ["train packed", "evaluate packed"],
    "data/refshapes/refs(generated).p": ["train", "evaluate", "pack", "check"],
    "data/refshapes/instances.json": ["train", "evaluate", "pack", "shapes", "check"],
    "data/refshapes/generated.json": ["shapes"],
    "mine/expressions.jsonl": ["train own", "pack own", "check own"],
    "mine/annotations.json": ["train own", "pack own", "check own"],
    "desk/coco.json": ["import coco"],
}


@pytest.mark.parametrize("file", READERS)
def test_a_file_that_ends_early_is_named_in_one_line(place, file):
    whole, rng = (place / file).read_bytes(), random.Random(f"{SEED} {file}")
    for length in (0, 1, *rng.sample(range(2, len(whole) - 1), 3), len(whole) - 2):
        (place / file).write_bytes(whole[:length])
        before = raw(place)
        for name in READERS[file]:
            code, out, err = ris(commands(place)[name])
            assert code == 1 if name.startswith("check") and code != 2 else refused(code, out, err)
            assert err.count("\n") == 1 and "Traceback" not in err
            empty = length < 2 and file == "mine/expressions.jsonl"  # a folder without a line
            assert file.rpartition("/")[2] in err or empty
            assert raw(place) == before


def broken_photos(path):
    """What may stand in a photo's place, by name; the bombs have more pixels than PIL allows, a little or by far."""
    good = Image.open(path).convert("RGB")
    file, bombs = io.BytesIO(), {}
    good.save(file, "JPEG", quality=95)
    jpeg, png = file.getvalue(), path.read_bytes()
    for name, factor in (("bomb", 1.25), ("large bomb", 2)):
        file = io.BytesIO()
        good.resize([round(factor * side) for side in good.size]).save(file, "PNG")
        bombs[name] = file.getvalue()
    return {"text": b"no picture at all", "empty": b"", "head of a jpeg": jpeg[:20], "most of a jpeg": jpeg[:-40],
            "head of a png": png[:20], "half a png": png[:len(png) // 2], **bombs}


PHOTOS = {"data/images/refshapes/train_000000.png": ["train", "pack", "check"],
          "data/images/refshapes/val_000000.png": ["evaluate", "check"],
          "desk/a.png": ["predict", "compare", "import coco", "import csv", "import labelme"],
          "mine/photos/a.png": ["train own", "pack own", "check own"]}


@pytest.mark.parametrize("file", PHOTOS)
def test_a_photo_that_is_none_is_named_in_one_line(place, file, monkeypatch):
    path = place / file
    with Image.open(path) as image:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", image.width * image.height)
    for kind, content in broken_photos(path).items():
        path.write_bytes(content)
        for name in PHOTOS[file]:
            before = raw(place)
            code, out, err = ris(commands(place)[name])
            lines = [line for line in err.splitlines() if not line.startswith("note: ")]
            assert path.name in err and "Traceback" not in err and len(lines) == 1, err
            if name.startswith(("check", "import")):
                assert code == 1  # the rest of them is fine
                shutil.rmtree(place / "new", ignore_errors=True)
            else:
                refused(code, out, err)
            if name != "import csv":
                assert raw(place) == before
