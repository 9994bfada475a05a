"""Bad command lines of every kind: each ends with the exit code 2 and one line on standard error, and changes nothing on the disk."""
import json
import os
import shlex
import shutil
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import pytest

from ris_nb.cli.main import COMMANDS, main
from ris_nb.registry import create_model, register_model
from ris_nb.settings import nested

HUGE = "9" * 20
RUN = "train --root data --out run --force"  # a good run lies there, and must still lie there afterwards
LINES = f"""
tarin
''
' '
--hlep
-x
ünïcode
{'x' * 5000}
data shape x
data chekc data
data ''

data shapes
data shapes ''
data shapes new other
data shapes photo.png
data shapes new --size
data shapes new --size ''
data shapes new --size 8
data shapes new --size 100000
data shapes new --size 1e2
data shapes new --size {HUGE}
data shapes new --flavour refshapez
data shapes new --counts
data shapes new --counts train
data shapes new --counts train many
data shapes new --counts train -5
data shapes new --counts trian 5
data shapes new --counts train {HUGE}
data shapes new --seed -1
data shapes new --seed nan
data shapes new --seed {HUGE}
data shapes data --counts train 9
data shapes data --size 96
data toys new --size 64
data toys new --flavour refshapes
data toys new --counts testD 5
data toys new --counts train -5
data toys new --seed -1

data check
data check ''
data check nowhere
data check /proc
data check photo.png
data check data/images
data check data/refshapes
data check data --jsno
data check data data
data check {'x/' * 3000}

data check data --trained-on nowhere
data check data --trained-on text.jpg
data check data --trained-on ''

data import
data import coco
data import coco data/refshapes/instances.json
data import coco data/refshapes/instances.json --root ''
data import coco data/refshapes/instances.json --root new
data import coco data/refshapes/instances.json --root data --force
data import coco data/refshapes/instances.json --root data/new --label-expressions --photos data/refshapes
data import coco data/refshapes/instances.json --root run --label-expressions --photos data/images --force
data import coco data/refshapes/instances.json --root data --label-expressions --photos data/images
data import coco data/refshapes/instances.json --root new --label-expressions --photos nowhere
data import coco data/refshapes/instances.json --root new --label-expressions --photos photo.png
data import coco data/refshapes/instances.json --root new --splits train
data import coco data/refshapes/instances.json --root new --splits trian 1
data import coco data/refshapes/instances.json --root new --splits train nan
data import coco data/refshapes/instances.json --root new --columns sentence x
data import coco data/refshapes/instances.json --root new --box corners
data import coco data/refshapes/instances.json --root new --seed -1
data import coco data/refshapes/instances.json --root text.jpg/new --label-expressions --photos data/images
data import coco text.jpg --root new
data import coco run/config.json --root new
data import coco nowhere --root new
data import labelme data --root new
data import labelme text.jpg --root new
data import cvat data --root new
data import cvat text.jpg --root new
data import csv vocab.txt --root new
data import csv photo.png --root new
data import csv data --root new
data import voc data --root new
data import huggingface nobody/nothing --root new
data import huggingface data --root new

data describe
data describe ''
data describe nowhere
data describe data
data describe data --style loud
data describe data --val 2
data describe data --most 0
data describe data --seed -1
data views
data views new
data views new --photos data
data views new --coco nowhere
data views new --coco data
data views new --coco data --instances data/refshapes/instances.json --photos data
data views new --instances text.jpg --photos data
data views new --instances data/refshapes/instances.json --photos nowhere --people none
data views new --instances data/refshapes/instances.json --photos data/images/refshapes --people nowhere
data views new --instances data/refshapes/instances.json --photos data/images/refshapes --refer nowhere
data views new --instances data/refshapes/instances.json --photos data/images/refshapes --refer data --refer-splits trian
data views new --instances data/refshapes/instances.json --photos data/images/refshapes --exclude nowhere
data views new --instances data/refshapes/instances.json --photos data/images/refshapes --exclude data
data views data --instances data/refshapes/instances.json --photos data/images/refshapes --people none
data views new --coco data --passes 0
data views new --coco data --mosaics nan
data views new --coco data --smallest 2
data views new --coco data --seed -1

data pack
data pack data
data pack data --image-size 64
data pack nowhere --image-size 64 --out new.pack
data pack data --image-size 4 --out new.pack
data pack data --image-size 64 --out new.pack --workers 1000
data pack data --image-size 64 --out new.pack --splits nowhere
data pack broken --image-size 64 --out new.pack
train --root data --pack text.jpg --out new
evaluate --checkpoint run --root data --pack nowhere.pack
data pack data --image-size 64 --out photo.png/new.pack
data prepare
data prepare refcoco
data prepare coco --root new
data prepare refcoco --root ''
data prepare refcoco --root photo.png
data prepare refcoco --root new --parallel 0
data prepare refcoco --root new --parallel 1000
data prepare refcoco --root new --parallel many
data prepare refcoco --root new --mirrors nothing.json
data prepare refcoco --root new --mirrors text.jpg
data prepare refcoco --root new --coco nowhere
data prepare phrasecut --root new
data prepare phrasecut --root new --coco data

train --root nowhere --out new
train --root '' --out new
train --root= --out new
train --root photo.png --out new
train --root data --out ''
train --root data --out photo.png
train --root data --out photo.png/run
train --root data --out run
train --root data --out new --dataset refcoco
train --root data --out new --split-by unc
train --root data --out run --resume --lr 1
train --root data --out run --resume --model speck --steps 3 --batch-size 4 --val none --image-size 32
train --root data --out run --resume --model speck --steps 3 --batch-size 4 --val none --from run
{RUN} --resume
{RUN} more
{RUN} --stesp 3
{RUN} --model huge
{RUN} --model ''
{RUN} --model {'m' * 5000}
{RUN} --model speck --freeze text encoder decoder
{RUN} --model speck --freeze txt
{RUN} --model speck --freeze ''
{RUN} --model speck --image-size 0
{RUN} --model speck --image-size -5
{RUN} --model speck --image-size 1000000
{RUN} --model speck --image-size big
{RUN} --model speck --pretrained
{RUN} --model speck --batch-size 0
{RUN} --model speck --batch-size 10000000
{RUN} --model speck --batch-size 6 --accumulate 4
{RUN} --model speck --accumulate 0
{RUN} --model speck --val vall
{RUN} --model speck --split trian
{RUN} --model speck --split ''
{RUN} --model speck --vocabulary nothing.txt
{RUN} --model speck --vocabulary photo.png
{RUN} --model speck --vocabulary text.jpg
{RUN} --model speck --vocabulary ''
{RUN} --model speck --vocabulary nobody/nothing
{RUN} --model sag_tiny --validate-every 5
{RUN} --recipe ''
{RUN} --recipe nothing.toml
{RUN} --recipe bad.toml
{RUN} --recipe text.jpg
{RUN} --set width
{RUN} --set =8
{RUN} --set widht=8
{RUN} --set vision.depths=[1,
{RUN} --set vision.depths=none
{RUN} --set vision=3
{RUN} --set vision.widht=8
{RUN} --set vision.=8
{RUN} --set vison.width=8
{RUN} --set decoder.width.more=8
{RUN} --set dice=True
{RUN} --set image_size=32
{RUN} --set dice=1 --set dice=2
{RUN} --from run --set dice=1
{RUN} --import nothing.py
{RUN} --import text.jpg
{RUN} --import ''
{RUN} --import bad.py
{RUN} --recipe
{RUN} --recipe magnet_refcoo
{RUN} --recipe magnet_refcoco
{RUN} --recipe lavt_tiny --model sag_tiny
{RUN} --recipe lavt_tiny --batch-size 0
train --root data --out run --resume --model speck --steps 3 --batch-size 4 --val none --set dice=1
{RUN} --from nowhere
{RUN} --from ''
{RUN} --from photo.png
{RUN} --from data
{RUN} --from released:
{RUN} --from released:magnet_refcocog
{RUN} --from released:magnet_refcoco
{RUN} --from nothing.pth
{RUN} --from cut_run
{RUN} --from run --model lavt_tiny
{RUN} --from run --pretrained
{RUN} --from run --image-size 32
{RUN} --from run --vocabulary vocab.txt
{RUN} --seed -1
{RUN} --seed 1.5
{RUN} --seed {HUGE}
{RUN} --steps 0
{RUN} --steps ''
{RUN} --steps 1e3
{RUN} --steps three
{RUN} --steps {HUGE}
{RUN} --steps 10000000000
{RUN} --steps 60 --warmup 60
{RUN} --warmup -1
{RUN} --lr nan
{RUN} --lr inf
{RUN} --lr -1
{RUN} --lr 0
{RUN} --lr fast
{RUN} --lr 1e30
{RUN} --weight-decay -1
{RUN} --weight-decay inf
{RUN} --power nan
{RUN} --clip 0
{RUN} --clip nan
{RUN} --clip tight
{RUN} --schedule linear
{RUN} --warmup-kind slow
{RUN} --precision fp8
{RUN} --best mAP
{RUN} --each word
{RUN} --workers -1
{RUN} --workers 100000
{RUN} --workers {HUGE}
{RUN} --save-every 0
{RUN} --log-every 0
{RUN} --validate-every -1
{RUN} --dry-run=yes
train --root broken --out run --force --model speck --batch-size 8
train --root data --out new --model speck --lr 1e18 --batch-size 4 --val none --clip None --warmup 0
RANK=abc train --root data --out new
RANK=abc train --recipe lavt_tiny --root data --out new
RANK=5 train --root data --out new
WORLD_SIZE=zwei train --root data --out new
WORLD_SIZE=0 train --root data --out new
WORLD_SIZE=2 train --root data --out new --model speck
WORLD_SIZE=6 train --recipe magnet_refcoco --root data --out new

recipes nothing
recipes ''
recipes lavt_tiny sag_tiny
recipes nothing.toml
recipes bad.toml
models all
models --import bad.py
models --json

evaluate
evaluate --root data --checkpoint ''
evaluate --root data --checkpoint nowhere
evaluate --root data --checkpoint data
evaluate --root data --checkpoint photo.png
evaluate --root data --checkpoint cut_run
evaluate --root data --checkpoint odd_run
evaluate --root data --checkpoint nobody/nothing
evaluate --root data --checkpoint {'m' * 5000}
evaluate --root data --checkpoint run --released magnet_refcoco
evaluate --root data --released ''
evaluate --root data --released magnet_refcoco
evaluate --root data --released nothing.pth
evaluate --root data --released text.jpg
evaluate --root data --released photo.png
evaluate --root data --released data
evaluate --root data --released nobody/nothing/weights.pth
evaluate --root nowhere --checkpoint run
evaluate --root data --checkpoint run --split testD
evaluate --root data --checkpoint run --batch-size 0
evaluate --root data --checkpoint run --batch-size {HUGE}
evaluate --root data --checkpoint run --workers -1
evaluate --root data --checkpoint run --workers 100000
evaluate --root data --checkpoint run --shuffle-seed -1
evaluate --root data --checkpoint run --shuffle-seed {HUGE}
evaluate --root data --checkpoint run --out photo.png
evaluate --root data --checkpoint run --import bad.py
evaluate --root data --checkpoint run --out ''
evaluate --root broken --checkpoint run --split train
RANK=abc evaluate --root data --checkpoint run
WORLD_SIZE=2 evaluate --root data --checkpoint run

listen
listen --root data --checkpoint ''
listen --root data --checkpoint nowhere
listen --root data --checkpoint cut_run
listen --root data --checkpoint run --released magnet_refcoco
listen --root data --released text.jpg
listen --root nowhere --checkpoint run
listen --root data --checkpoint run --split testD
listen --root data --checkpoint run --images 0
listen --root data --checkpoint run --images {HUGE}
listen --root data --checkpoint run --batch-size 0
listen --root data --checkpoint run --workers -1
listen --root data --checkpoint run --seed -1
listen --root data --checkpoint run --out ''
listen --root data --checkpoint run --import bad.py
listen --root broken --checkpoint run --split train
WORLD_SIZE=2 listen --root data --checkpoint run

predict
predict photo.png
predict photo.png '' --checkpoint run
predict photo.png '   ' --checkpoint run
predict '' red
predict data red
predict nothing.png red
predict cut.png red
predict text.jpg red
predict run/config.json red
predict photo.png red triangle
predict photo.png photo.png
predict photo.png nothing.png 'the red triangle'
predict vocab.txt red
predict none.csv
predict none.csv red
predict photo.png red --checkpoint ''
predict photo.png red --checkpoint gpt
predict photo.png red --checkpoint nobody/nothing
predict photo.png red --checkpoint data
predict photo.png red --checkpoint cut_run
predict photo.png red --checkpoint run --released magnet_refcoco
predict photo.png red --released ''
predict photo.png red --released magnet_refcoco
predict photo.png red --released magnet_refcocoo
predict photo.png red --released magnet_refcocog
predict photo.png red --checkpoint released:magnet_refcocog
predict photo.png red --released text.jpg
predict photo.png red --checkpoint run --out ''
predict photo.png red --checkpoint run --out text.jpg
predict photo.png red --checkpoint run --out text.jpg/deeper
RANK=abc predict photo.png red --checkpoint run

compare
compare photo.png red --models
compare photo.png red --models ''
compare photo.png red --models run ''
compare photo.png red --models run gpt
compare photo.png red --models run --import nothing.py
predict photo.png red --checkpoint run --import bad.py
explore --import bad.py
compare photo.png red --models data
compare photo.png red --models odd_run
compare photo.png red --released magnet_refcoco
compare nothing.png red --models run --out new
compare cut.png red --models run --out new
compare photo.png '' --models run --out new
compare photo.png red --models run --out ''
compare photo.png red --models run --out text.jpg

explore now
explore --port 0
explore --port 99999
explore --port http
explore --prot 9000
explore --models
explore --models ''
explore --models nowhere
explore --released magnet_refcoco

course
course parents --out new
course student
course student --out data
course student --out new --chapters 99
course student --out new --chapters

results ''
results text.jpg
results photo.png
results study_text.json
results study_rows.json
results report_text
results --figure r.xyz
results --figure ''
results --figure data
results --figure text.jpg/r.png
results --markdown ''
results --markdown data
results --markdown text.jpg/r.md

study
study lavt
study magnet --only
study magnet --only ''
study magnet --only LAVTT
study sag --only LAVT --folder new
study magnet --seeds
study magnet --seeds -1
study magnet --seeds {HUGE}
study magnet --seeds one
study magnet --steps 0
study magnet --steps {HUGE}
study magnet --folder ''
study magnet --folder text.jpg
""".split("\n")
LINES = [line for line in LINES if line]


@register_model
def speck(pretrained=False, **overrides):
    sizes = dict(image_size=16, vision=dict(patch=2, width=8, depths=(1, 1, 1, 1), heads=(1, 1, 2, 2)),
                 text=dict(width=16, layers=1, heads=2, ffn=16), decoder=dict(width=8))
    return create_model("lavt_tiny", pretrained, **nested(sizes, overrides))


def said(words):
    """Exit code and the lines on standard error, progress bars and warnings aside."""
    err = StringIO()
    with redirect_stdout(StringIO()), redirect_stderr(err):
        code = main(words)
    lines = err.getvalue().replace("\r", "\n").split("\n")
    return code, [line for line in lines if line.strip() and "%|" not in line and not line.startswith("warning: ")]


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a data set, a run, and things that are none."""
    place = tmp_path_factory.mktemp("bad")
    make = [f"data shapes {place / name} --counts train 4 val 3 testA 2" for name in ("data", "broken")]
    train = f"train --root {place / 'data'} --model speck --out {place / 'run'} --steps 3 --batch-size 4 --val none"
    assert [said(line.split()) for line in [*make, train]] == [(0, [])] * 3
    for image in (place / "broken/images/refshapes").glob("train*"):
        image.write_bytes(image.read_bytes()[:500])
    photo = (place / "data/images/refshapes/val_000000.png").read_bytes()
    (place / "photo.png").write_bytes(photo)
    (place / "cut.png").write_bytes(photo[:300])
    (place / "text.jpg").write_text("no picture")
    (place / "vocab.txt").write_text("a\nb\n")
    (place / "bad.py").write_text("import nothing_of_that_name\n")
    (place / "bad.toml").write_text("[settings]\nmodel = 5\n")
    for name, file, text in (("cut_run", "model.safetensors", "no weights"), ("odd_run", "config.json", '{"class": "os.system"}')):
        shutil.copytree(place / "run", place / name)
        (place / name / file).write_text(text)
    (place / "study_text.json").write_text('[{"variant": "LAVT", "seed": 0, "refshapes oIoU": "much"}]')
    (place / "study_rows.json").write_text('[{"variant": "LAVT", "seed": 0, "refshapes oIoU": 0.5}, 7]')
    report = dict(data="d", split="val", checkpoint="c", expressions=1, images=1, oIoU="much", mIoU=0.5, precision={}, interval={}, by_kind={},
                  by_size={}, by_length={}, resolution="model")
    (place / "report_text").mkdir()
    (place / "report_text/report.json").write_text(json.dumps(report))
    return place


def test_there_are_enough_and_every_command_is_among_them():
    assert len(set(LINES)) == len(LINES) >= 120
    words = [[word for word in shlex.split(line) if "=" not in word or word.startswith("-")] for line in LINES]
    assert set(COMMANDS) <= {" ".join(line[:1 + (line[:1] == ["data"])]) for line in words}


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:80])
def test_a_bad_line_is_refused_in_one_line_and_changes_nothing(line, place, monkeypatch):
    monkeypatch.chdir(place)
    words = shlex.split(line)
    while words and words[0].partition("=")[0] in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(*words.pop(0).split("="))
    before = contents(place)
    code, lines = said(words)
    assert code == 2 and len(lines) == 1, (code, lines)
    assert lines[0].startswith("ris-nb: ") and len(lines[0]) <= 1010 and "Traceback" not in lines[0] and "\x1b" not in lines[0]
    assert contents(place) == before
