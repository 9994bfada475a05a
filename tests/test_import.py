"""Exports of every annotation tool, made by hand here: what comes of them, and what is said of each thing that is wrong in one."""
import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

os.environ["ACCELERATE_USE_CPU"] = "true"

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from ris_nb.cli.main import main
from ris_nb.contract import RISError
from ris_nb.data.batches import ReferralDataset, Transform, make_loader
from ris_nb.data.check import check_data
from ris_nb.data.importing import READERS, import_data
from ris_nb.data.sources import open_data
from ris_nb.data.tokenizer import Tokenizer

H, W = 48, 64
MUG, BOOK = (8, 20, 22, 38), (34, 26, 58, 40)   # x0, y0, x1, y1


def scene(turn=0, shape=(H, W)):
    """A desk with a mug and a book; `turn` makes each desk another picture."""
    pixels = np.full((*shape, 3), (225, 205, 170 + turn), np.uint8)
    for (x0, y0, x1, y1), colour in ((MUG, (0, 158, 115)), (BOOK, (204, 121, 167))): pixels[y0:y1, x0:x1] = colour
    return Image.fromarray(pixels)


def truth(*boxes):
    mask = np.zeros((H, W), bool)
    for x0, y0, x1, y1 in boxes: mask[y0:y1, x0:x1] = True
    return mask


def corners(box):
    x0, y0, x1, y1 = box
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def photos(folder, *names):
    for turn, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        scene(turn).save(folder / name)
    return folder


def coco(folder, annotations, images=None, name="coco.json"):
    images = images or [{"id": 1, "file_name": "a.png", "height": H, "width": W}, {"id": 2, "file_name": "b.png", "height": H, "width": W}]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "mug"}, {"id": 2, "name": "book"}]}))
    return folder / name


def thing(number, image=1, box=MUG, text="the mug", **more):
    return {"id": number, "image_id": image, "category_id": 1, "segmentation": [corners(box)], "caption": text, **more}


def everything(root):
    """{(photo, sentence): mask} of a folder."""
    data = open_data(root)
    return {(r.image_path.name, s.text): r.mask() if r.has_mask else None for split in data.splits for r in data.referrals(split) for s in r.sentences}


def refused(*args, **options):
    with pytest.raises(RISError) as info: import_data(*args, **options)
    assert "\n" not in str(info.value)
    return str(info.value)


def lines_of(done):
    assert all("\n" not in line for line in done.left_out + done.notes)
    return "\n".join(done.left_out + done.notes)


# ---- one export of each format: the same two desks, the same things

def make_coco(place):
    rle = coco_mask.encode(np.asfortranarray(truth(BOOK).astype(np.uint8)))
    flat = truth(BOOK).T.ravel()
    runs = [len(run) for run in np.split(flat, np.flatnonzero(np.diff(flat)) + 1)]
    return coco(place, [thing(1), thing(2, box=BOOK, text=["the book", "the pink thing"], segmentation={"size": [H, W], "counts": rle["counts"].decode()}),
                        thing(3, image=2), thing(4, image=2, text="the book", segmentation={"size": [H, W], "counts": runs})])


def make_labelme(place):
    for name in ("a", "b"):
        shapes = [{"label": "mug", "points": np.reshape(corners(MUG), (-1, 2)).tolist(), "shape_type": "polygon", "group_id": None, "description": "the mug"},
                  {"label": "book", "points": [BOOK[2:], BOOK[:2]], "shape_type": "rectangle", "group_id": None,
                   "description": "the book\nthe pink thing" if name == "a" else "the book"}]
        (place / f"{name}.json").write_text(json.dumps({"version": "5.5.0", "imagePath": f"..\\img\\{name}.png", "imageData": None,
                                                        "imageHeight": H, "imageWidth": W, "shapes": shapes}))
    return place


def make_cvat(place):
    x0, y0, x1, y1 = BOOK
    said = lambda text: f'<attribute name="expression">{text}</attribute>'
    points = ";".join(f"{x:.2f},{y:.2f}" for x, y in np.reshape(corners(MUG), (-1, 2)))
    body = "".join(f'<image id="{i}" name="{name}.png" width="{W}" height="{H}"><polygon label="mug" points="{points}" z_order="0">{said("the mug")}</polygon>'
                   f'<mask label="book" rle="0, {(x1 - x0) * (y1 - y0)}" left="{x0}" top="{y0}" width="{x1 - x0}" height="{y1 - y0}">'
                   f'{said("the book&#10;the pink thing" if name == "a" else "the book")}</mask></image>' for i, name in enumerate("ab"))
    (place / "annotations.xml").write_text(f'<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>{body}</annotations>')
    return place / "annotations.xml"


def make_csv(place):
    (place / "masks").mkdir()
    Image.fromarray(truth(BOOK).astype(np.uint8) * 255).save(place / "masks/book.png")
    rows = [("a.png", "the mug", "", " ".join(map(str, corners(MUG)))), ("a.png", "the book", r"masks\book.png", ""), ("a.png", "the pink thing", "masks/book.png", ""),
            ("b.png", "the mug", "", ", ".join(map(str, corners(MUG)))), ("b.png", "the book", "book.png", "")]
    (place / "table.csv").write_text("\r\n".join(";".join(row) for row in [("image", "expression", "mask", "polygon"), *rows]), encoding="utf-8-sig")
    return place / "table.csv"


def make_huggingface(place):
    datasets = pytest.importorskip("datasets")
    rows = [("a.png", ["the mug"], MUG), ("a.png", ["the book", "the pink thing"], BOOK), ("b.png", ["the mug"], MUG), ("b.png", ["the book"], BOOK)]
    made = datasets.Dataset.from_dict({"image": [Image.open(place / name) for name, _, _ in rows], "sentences": [texts for _, texts, _ in rows],
                                       "mask": [Image.fromarray(truth(box).astype(np.uint8) * 255) for _, _, box in rows]})
    made.save_to_disk(str(place / "saved"))
    return place / "saved"


MAKERS = {"coco": make_coco, "labelme": make_labelme, "cvat": make_cvat, "csv": make_csv, "huggingface": make_huggingface}


def test_every_format_has_an_export_here():
    assert set(MAKERS) == set(READERS)


@pytest.fixture(params=list(MAKERS))
def exported(request, tmp_path):
    return request.param, MAKERS[request.param](photos(tmp_path / "tool", "a.png", "b.png"))


def test_an_export_becomes_a_folder(exported, tmp_path):
    format, source = exported
    done = import_data(source, tmp_path / "own", format, splits={"train": 1, "val": 1})
    assert done.left_out == [] and sum(np.array(list(done.counts.values()))).tolist() == [2, 4, 5]
    found = {text: mask for (name, text), mask in everything(done.root).items() if "a" in name or format == "huggingface"}
    assert set(found) == {"the mug", "the book", "the pink thing"}
    for text, box in (("the mug", MUG), ("the book", BOOK), ("the pink thing", BOOK)): assert (found[text] == truth(box)).all(), text
    assert sorted(path.read_bytes() for path in (done.root / "photos").iterdir()) == sorted((tmp_path / "tool" / n).read_bytes() for n in ("a.png", "b.png")) or format == "huggingface"
    assert not any(row["problems"] or row["warnings"] for row in check_data(done.root))
    assert json.loads((done.root / "import.json").read_text())["format"] == format
    assert str(tmp_path) not in (done.root / "import.json").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own", "tool"]


def test_from_the_tool_to_two_steps_of_training(exported, tmp_path):
    format, source = exported
    root = import_data(source, tmp_path / "own", format, splits={"train": 1, "val": 1}).root
    batch = next(iter(make_loader(ReferralDataset(open_data(root).referrals("train"), Tokenizer("bert-base-uncased"), Transform(32)), 2)))
    assert batch.image.shape == (2, 3, 32, 32) and batch.mask.any((1, 2)).all() and batch.words.any(1).all()
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = main(["train", "--root", str(root), "--out", str(tmp_path / "run"), "--steps", "2", "--batch-size", "2", "--set", "vision.width=8", "--image-size", "32"])
    assert code == 0, err.getvalue()
    assert "2 steps" in out.getvalue()


# ---- photos

def test_paths_of_other_computers(tmp_path):
    photos(tmp_path / "img", "a.png", "deep/B.PNG")
    images = [{"id": 1, "file_name": r"C:\Users\ann\a.png", "height": H, "width": W}, {"id": 2, "file_name": "/data/old/deep/b.png", "height": H, "width": W},
              {"id": 3, "file_name": "../../../etc/passwd", "height": H, "width": W}, {"id": 4, "file_name": "", "height": H, "width": W}]
    done = import_data(coco(tmp_path / "ann", [thing(i, image=i) for i in (1, 2, 3, 4)], images), tmp_path / "own", "coco", photos=tmp_path / "img")
    assert {name for name, _ in everything(done.root)} == {"a.png", "B.PNG"}
    assert len(done.left_out) == 1 and done.left_out[0].startswith("left out, its photo is not found: 2; the first: annotation 3 of ../../../etc/passwd: no file")


def test_a_doubtful_match_is_told_and_an_ambiguous_one_refused(tmp_path):
    photos(tmp_path / "img", "val/a.png", "val/b.png", "train/b.png")
    images = [{"id": 1, "file_name": "train/a.png", "height": H, "width": W}, {"id": 2, "file_name": "b.png", "height": H, "width": W}]
    done = import_data(coco(tmp_path, [thing(1), thing(2, image=2)], images), tmp_path / "own", "coco", photos=tmp_path / "img")
    assert "2 files below" in done.left_out[0] and "another folder than the source says: 1; the first: train/a.png" in done.notes[0]


def test_one_name_twice(tmp_path):
    photos(tmp_path, "x/a.png", "y/a.png", "z/A.PNG")
    images = [{"id": i, "file_name": f"{name}", "height": H, "width": W} for i, name in enumerate(("x/a.png", "y/a.png", "z/A.PNG"), 1)]
    done = import_data(coco(tmp_path, [thing(i, image=i) for i in (1, 2, 3)], images), tmp_path / "own", "coco")
    assert len({name.casefold() for name, _ in everything(done.root)}) == 3 and "photos renamed, another has the same name: 2" in lines_of(done)


def cut(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:4000])


@pytest.mark.parametrize("spoil, said", [
    (cut, "broken off"), (lambda path: path.write_text("text"), "no readable image"), (Path.unlink, "no file 'a.png'"),
    (lambda path: Image.fromarray(np.zeros((H, W), np.uint16)).save(path), "8 bits"), (lambda path: scene(shape=(W, H)).save(path), "its mask is 64 x 48, the photo 48 x 64")])
def test_bad_photos(tmp_path, spoil, said):
    source = coco(photos(tmp_path / "tool", "a.png", "b.png"), [thing(1), thing(2, box=BOOK), thing(3, image=2)])
    spoil(tmp_path / "tool/a.png")
    done = import_data(source, tmp_path / "own", "coco")
    assert len(done.left_out) == 1 and ": 2; the first: annotation 1 of a.png: " in done.left_out[0] and said in done.left_out[0]
    assert list(everything(done.root)) == [("b.png", "the mug")] and [p.name for p in (done.root / "photos").iterdir()] == ["b.png"]


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("drawn", ["upright", "stored"])
def test_a_phone_photo(tmp_path, tag, drawn):
    exif = Image.Exif()
    exif[0x0112] = tag
    (tmp_path / "tool").mkdir()
    scene().save(tmp_path / "tool/a.jpg", exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "tool/a.jpg"))
    marked = Image.fromarray(truth(MUG).astype(np.uint8) * 255)
    marked.save(tmp_path / "mark.png", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "mark.png"))) > 0
    mask = expected if drawn == "upright" else truth(MUG)
    if drawn == "stored" and tag < 5: expected = mask   # the sizes can't tell: taken to be drawn on the upright photo
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    images = [{"id": 1, "file_name": "a.jpg", "height": mask.shape[0], "width": mask.shape[1]}]
    done = import_data(coco(tmp_path / "tool", [thing(1, segmentation={"size": list(mask.shape), "counts": rle["counts"].decode()})], images), tmp_path / "own", "coco")
    (_, found), = everything(done.root).items()
    assert (found == expected).all() and ("turned upright" in lines_of(done)) == (tag > 1) and ("masks turned" in lines_of(done)) == (tag > 4 and drawn == "stored")
    with Image.open(done.root / "photos/a.jpg") as image:
        assert image.getexif().get(0x0112, 1) == 1 and image.size == upright.size
        if tag > 4 or drawn == "upright": assert np.abs(np.asarray(image, int)[expected] - (0, 158, 115)).mean() < 12   # the mug lies below its mask


# ---- outlines

def test_parts_holes_and_scales(tmp_path):
    ring = truth(MUG)
    ring[25:30, 12:18] = False
    rle = coco_mask.encode(np.asfortranarray(ring.astype(np.uint8)))
    images = [{"id": 1, "file_name": "a.png", "height": H, "width": W}, {"id": 2, "file_name": "b.png", "height": 2 * H, "width": 2 * W}]
    source = coco(photos(tmp_path / "tool", "a.png", "b.png"), [
        thing(1, segmentation=[corners(MUG), corners(BOOK)], text="both"), thing(2, segmentation={"size": [H, W], "counts": rle["counts"].decode()}, text="ring"),
        thing(3, image=2, segmentation=[[2 * x for x in corners(BOOK)]], text="large"), thing(4, segmentation=[], bbox=[8, 20, 14, 18], text="box"),
        thing(5, segmentation=[corners((50, 40, 90, 60))], text="out"), thing(6, segmentation=None, bbox=None, text="bare")], images)
    done = import_data(source, tmp_path / "own", "coco", splits={"train": 1})
    found = {text: mask for (_, text), mask in everything(done.root).items()}
    assert (found["both"] == truth(MUG, BOOK)).all() and (found["ring"] == ring).all() and (found["large"] == truth(BOOK)).all() and (found["box"] == truth(MUG)).all()
    assert (found["out"] == truth((50, 40, 64, 48))).all() and found["bare"] is None and done.left_out == []
    for what in ("masks scaled to fit their photo: 1", "full boxes, since only a box was drawn: 1", "cut at the edge of their photo: 1", "without an outline"):
        assert what in lines_of(done), what


@pytest.mark.parametrize("segmentation, said", [
    ([[1, 2, 3]], "odd number"), ([[0, 0, 5, 0, 5, 5, 7]], "odd number"), ([[90, 90, 99, 90, 99, 99]], "covers no pixel"), ([[1e9, 0, 5, 0, 5, 5]], "far out"),
    ({"size": [H, W], "counts": [1, 2]}, "its runs cover 3 pixels of 3072"), ({"size": [W, H], "counts": [0, H * W]}, "its mask is 48 x 64, the photo 64 x 48"),
    ({"size": [H, W], "counts": [H * W]}, "covers no pixel"), ([["a", "b", "c", "d", "e", "f"]], "could not convert"), ({"counts": "x"}, "size")])
def test_bad_outlines(tmp_path, segmentation, said):
    done = import_data(coco(photos(tmp_path / "tool", "a.png", "b.png"), [thing(1, segmentation=segmentation), thing(2, image=2)]), tmp_path / "own", "coco")
    assert len(done.left_out) == 1 and "outline can't be used: 1; the first: annotation 1 of a.png" in done.left_out[0] and said in done.left_out[0]


# ---- sentences, splits

def test_labels_speak_if_asked(tmp_path):
    source = coco(photos(tmp_path / "tool", "a.png", "b.png"), [thing(1, text=None), thing(2, text="  ", box=BOOK, category_id=2), thing(3, image=2)])
    done = import_data(source, tmp_path / "own", "coco")
    assert done.left_out == ['left out, no expression: 2; the first: annotation 1 of a.png; --label-expressions makes "the LABEL" of its label']
    done = import_data(source, tmp_path / "own", "coco", label_expressions=True, force=True)
    assert set(everything(done.root)) == {("a.png", "the mug"), ("a.png", "the book"), ("b.png", "the mug")} and done.left_out == []
    assert {r.category for r in open_data(done.root).referrals("train")} <= {"mug", "book"}


def test_things_that_are_one(tmp_path):
    source = coco(photos(tmp_path / "tool", "a.png", "b.png"), [thing(1), thing(2, text=" the  mug "), thing(3, text="a cup"), thing(4, image=2)])
    done = import_data(source, tmp_path / "own", "coco", splits={"train": 1})
    assert done.counts == {"train": (2, 2, 3)} and "the same sentence again for the same thing, kept once: 1" in lines_of(done)


def test_splits_go_by_photo_and_seed(tmp_path):
    names = [f"{n}.png" for n in range(20)]
    photos(tmp_path / "tool", *names)
    shutil.copy(tmp_path / "tool/0.png", tmp_path / "tool/twin.png")
    images = [{"id": n, "file_name": name, "height": H, "width": W} for n, name in enumerate([*names, "twin.png"])]
    source = coco(tmp_path / "tool", [thing(2 * n + k, image=n, box=box, text=f"thing {k}") for n in range(21) for k, box in enumerate((MUG, BOOK))], images)
    def drawn(root, seed):
        done = import_data(source, tmp_path / root, "coco", splits={"train": 0.8, "val": 0.1, "test": 0.1}, seed=seed)
        data = open_data(done.root)
        return done, {split: {r.image_path.name for r in data.referrals(split)} for split in data.splits}
    done, first = drawn("one", 0)
    assert drawn("two", 0)[1] == first != drawn("three", 1)[1]
    assert sum(map(len, first.values())) == 21 and not first["train"] & first["val"] and not first["train"] & first["test"]
    assert any({"0.png", "twin.png"} <= names for names in first.values()) and "copies of another, byte by byte: 1" in lines_of(done)
    assert not any(row["warnings"] for row in check_data(tmp_path / "one"))


def test_the_sources_own_splits(tmp_path):
    place = tmp_path / "roboflow"
    for folder in ("train", "valid"):
        photos(place, f"{folder}/a.png")
        scene(9 if folder == "train" else 5).save(place / folder / "a.png")
        coco(place / folder, [thing(1)], [{"id": 1, "file_name": "a.png", "height": H, "width": W}], "_annotations.coco.json")
    done = import_data(place, tmp_path / "own", "coco")
    assert done.counts == {"train": (1, 1, 1), "val": (1, 1, 1)}
    assert import_data(place, tmp_path / "own", "coco", splits={"test": 1}, force=True).counts == {"test": (2, 2, 2)}
    (tmp_path / "t").mkdir()
    photos(tmp_path / "t", "a.png")
    (tmp_path / "t/t.csv").write_text("image,expression,box,split\na.png,the mug,8 20 14 18,train\na.png,the book,34 26 24 14,test\n")
    done = import_data(tmp_path / "t/t.csv", tmp_path / "own", "csv", force=True)
    assert done.counts == {"train": (1, 2, 2)} and "in another split than the first thing of the same photo" in lines_of(done)


# ---- broken files of each format

@pytest.mark.parametrize("format, name, text, said", [
    ("coco", "x.json", "{", "no readable JSON"), ("coco", "x.json", "[]", "expected an object"), ("coco", "x.json", '{"images": 3}', "not in COCO format"),
    ("coco", "x.json", '{"images": [], "annotations": []}', "it has no annotation"), ("coco", "x.json", '{"images": [], "annotations": [{"id": 1, "image_id": 4}]}', "its image is not in the file"),
    ("labelme", "x.json", '{"shapes": 3}', "no LabelMe file"), ("labelme", "x.json", '{"shapes": [3]}', "malformed: 1; the first: shape 0 of x.json"),
    ("labelme", "x.json", '{"shapes": [], "imagePath": "a.png"}', "photos without an annotation"), ("labelme", "x.json", '{"shapes": [{"points": [[1, 1]], "shape_type": "point"}]}', "points and lines"),
    ("labelme", "x.json", '{"imageData": "?", "imageHeight": "x", "imageWidth": 3, "shapes": [{"points": [[1, 1]]}]}', "malformed"),
    ("cvat", "x.xml", "<annotations><image", "no readable XML"), ("cvat", "x.xml", "<annotations><track/></annotations>", "CVAT for images 1.1"),
    ("cvat", "x.xml", "<!DOCTYPE a [<!ENTITY b 'c'>]><annotations/>", "entities"), ("cvat", "x.xml", "<annotations/>", "it has no annotation"),
    ("cvat", "x.xml", '<annotations><image name="a.png" width="4"/></annotations>', "malformed"),
    ("cvat", "x.xml", '<annotations><image name="a.png" width="64" height="48"><mask rle="1, 1" left="0" top="0" width="9" height="9"/></image></annotations>', "its runs cover 2 pixels of 9 x 9"),
    ("cvat", "x.xml", '<annotations><image name="a.png" width="64" height="48"><polygon points="1;2"/></image></annotations>', "no expression"),
    ("cvat", "x.zip", "PK", "is an archive: unpack it"), ("csv", "x.csv", "", "which column is the photo"), ("csv", "x.csv", "image,a\nb,c\n", "--columns expression NAME"), ("csv", "x.csv", "image,expression\n", "it has no annotation"),
    ("csv", "x.csv", "image,expression,box\na.png,x,1 2 3\n", "4 numbers, not 3"), ("csv", "x.csv", "image,expression,mask\na.png,x,gone.png\n", "no file 'gone.png'"),
    ("csv", "x.csv", "image,expression,mask\na.png,x,{\n", "malformed"), ("csv", "x.csv", "image,expression,split\na.png,x,holdout\n", "none of train"),
    ("csv", "x.csv", b"image,expression\na.png,caf\xe9\n", "CSV UTF-8"), ("csv", "x.csv", "image,expression,mask\na.png\n", "another number of cells")])
def test_broken_sources(tmp_path, format, name, text, said):
    photos(tmp_path / "tool", "a.png")
    (tmp_path / "tool" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert said in refused(tmp_path / "tool" / name, tmp_path / "own", format)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tool"]


def test_a_photo_inside_a_labelme_file(tmp_path):
    (tmp_path / "tool").mkdir()
    content = io.BytesIO()
    scene().save(content, "jpeg")
    shape = {"label": "mug", "points": np.reshape(corners(MUG), (-1, 2)).tolist(), "shape_type": "polygon", "description": "the mug"}
    (tmp_path / "tool/a.json").write_text(json.dumps({"imagePath": "a.jpg", "imageData": base64.b64encode(content.getvalue()).decode(), "shapes": [shape],
                                                      "imageHeight": H, "imageWidth": W}))
    done = import_data(tmp_path / "tool", tmp_path / "own", "labelme")
    assert (done.root / "photos/a.jpg").read_bytes() == content.getvalue() and (everything(done.root)["a.jpg", "the mug"] == truth(MUG)).all()


def test_a_mask_file_that_things_share(tmp_path):
    photos(tmp_path / "tool", "a.png")
    Image.fromarray((truth(MUG) + 2 * truth(BOOK)).astype(np.uint8)).save(tmp_path / "tool/ids.png")
    (tmp_path / "tool/t.csv").write_text("image,expression,mask,value\na.png,the mug,ids.png,1\na.png,the book,ids.png,2\na.png,the pen,ids.png,3\n")
    done = import_data(tmp_path / "tool/t.csv", tmp_path / "own", "csv")
    assert (everything(done.root)["a.png", "the book"] == truth(BOOK)).all() and "ids.png has no pixel of value 3" in done.left_out[0]


@pytest.mark.parametrize("kind", ["parquet", "json", "split files", "dict", "metadata"])
def test_hugging_face_on_disk(tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    place = photos(tmp_path / "tool", "a.png", "b.png")
    rows = [{"image": f"{name}.png", "text": text, "bbox": [x0, y0, x1 - x0, y1 - y0]} for name in "ab" for text, (x0, y0, x1, y1) in (("the mug", MUG), ("the book", BOOK))]
    if kind == "parquet": datasets.Dataset.from_list(rows).to_parquet(place / "rows.parquet"); source = place / "rows.parquet"
    if kind == "json": (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows))); source = place / "rows.jsonl"
    if kind == "split files":
        for split, part in (("train-00000-of-00001", rows[:2]), ("validation-00000-of-00001", rows[2:])): datasets.Dataset.from_list(part).to_parquet(place / f"{split}.parquet")
        source = place
    if kind == "dict":
        datasets.DatasetDict(train=datasets.Dataset.from_list(rows[:2]), test=datasets.Dataset.from_list(rows[2:])).save_to_disk(str(place / "saved"))
        source = place / "saved"
    if kind == "metadata":
        (place / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": f"{name}.png", "text": "the mug", "bbox": [8, 20, 14, 18]}) for name in "ab"))
        source = place
    done = import_data(source, tmp_path / "own", "huggingface", photos=place, splits={"train": 1} if kind in ("parquet", "json", "metadata") else None)
    masks = [mask for (_, text), mask in everything(done.root).items() if text == "the mug"]
    assert done.left_out == [] and len(masks) == 2 and all((mask == truth(MUG)).all() for mask in masks)
    assert list(done.counts) == {"split files": ["train", "val"], "dict": ["train", "test"]}.get(kind, ["train"])


def test_hugging_face_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert 'pip install "ris_nb[import]"' in refused("some/name", tmp_path / "own", "huggingface")


# ---- the folder that is written

def test_never_overwrites_unasked(tmp_path):
    source = make_coco(photos(tmp_path / "tool", "a.png", "b.png"))
    (tmp_path / "own").mkdir()                                       # an empty folder is filled
    import_data(source, tmp_path / "own", "coco")
    (tmp_path / "own/note.txt").write_text("mine")
    assert "is there already" in refused(source, tmp_path / "own", "coco") and (tmp_path / "own/note.txt").exists()
    import_data(source, tmp_path / "own", "coco", force=True)
    assert not (tmp_path / "own/note.txt").exists()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("mine")
    assert "no data folder" in refused(source, tmp_path / "precious", "coco", force=True) and (tmp_path / "precious/thesis.txt").exists()
    assert "holds the source" in refused(source, tmp_path / "tool", "coco", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own", "precious", "tool"]


def test_killed_at_any_time(tmp_path):
    source = make_coco(photos(tmp_path / "tool", "a.png", "b.png"))
    slow = ("import sys, time; from pathlib import Path; from ris_nb.data import importing as i; write = i._write_folder\n"
            "def late(*a): write(*a); print('now', flush=True); time.sleep(60)\n"
            "i._write_folder = late; i.import_data(sys.argv[1], sys.argv[2], 'coco')")
    process = subprocess.Popen([sys.executable, "-c", slow, str(source), str(tmp_path / "own")], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "now\n"
        assert "another import is writing" in refused(source, tmp_path / "own", "coco")
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "own").exists() and (tmp_path / ".own.importing").exists()
    import_data(source, tmp_path / "own", "coco")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own", "tool"]


@pytest.mark.parametrize("options, said", [
    (dict(format="voc"), "no format 'voc': there are coco"), (dict(splits={"dev": 1}), "no split 'dev'"), (dict(splits={}), "shares"), (dict(splits={"train": -1}), "shares"),
    (dict(splits={"train": float("nan")}), "shares"), (dict(columns={"sentence": "x"}), "no field 'sentence'"), (dict(box="corners"), "xywh or xyxy"),
    (dict(photos="/nowhere"), "no folder /nowhere"), (dict(source="/nowhere.json"), "/nowhere.json is missing")])
def test_options_that_make_no_sense(tmp_path, options, said):
    source = make_coco(photos(tmp_path / "tool", "a.png", "b.png"))
    assert said in refused(options.pop("source", source), tmp_path / "own", options.pop("format", "coco"), **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tool"]


def test_the_command(tmp_path, capsys):
    source = make_csv(photos(tmp_path / "tool", "a.png", "b.png"))
    source.write_text(source.read_text(encoding="utf-8-sig").replace("the pink thing", " "))
    words = ["data", "import", "csv", str(source), "--root", str(tmp_path / "own"), "--splits", "train", "1", "val", "1"]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "ris-nb data check" in said.out and said.err.splitlines() == ["left out, no expression: 1; the first: line 4; write one, or name its column with --columns expression NAME"]
    assert main([*words, "--force", "--json"]) == 1
    assert set(json.loads(capsys.readouterr().out)) == {"root", "splits", "left_out", "notes"}
    assert main(words) == 2 and "is there already" in capsys.readouterr().err
    assert main([*words, "--force", "--columns", "label", "mask", "--label-expressions"]) == 0


# ---- the doctor

def test_warnings_do_not_fail_a_check_unless_strict(tmp_path, capsys):
    photos(tmp_path, "a.png", "b.png")
    Image.open(tmp_path / "a.png").save(tmp_path / "same.bmp")
    lines = [("a.png", "x", "train"), ("b.png", "y", "train"), ("same.bmp", "x", "val")]
    (tmp_path / "expressions.jsonl").write_text("\n".join(json.dumps({"image": i, "expression": e, "split": s}) for i, e, s in lines))
    assert main(["data", "check", str(tmp_path)]) == 0
    warning, = capsys.readouterr().err.splitlines()
    assert warning == (f"warning: {tmp_path.name} folder val: 1 of 1 photos are in another split, too; "
                       "the first: same.bmp is the same picture as a.png in train; keep each photo in one split")
    assert main(["data", "check", str(tmp_path), "--strict"]) == 1
    capsys.readouterr()
    assert main(["data", "check", str(tmp_path), "--json"]) == 0
    assert [len(row["warnings"]) for row in json.loads(capsys.readouterr().out)] == [0, 1]


def test_photos_of_coco_that_a_model_has_seen(tmp_path):
    names = ["COCO_train2014_000000000009.jpg", "COCO_train2014_000000000025.jpg"]
    photos(tmp_path, *names)
    (tmp_path / "expressions.jsonl").write_text("\n".join(json.dumps({"image": name, "expression": "x", "split": s}) for name, s in zip(names, ("train", "test"))))
    coco(tmp_path, [], [{"id": 25, "file_name": "000000000025.jpg"}], "instances_train2017.json")
    train, test = check_data(tmp_path, tmp_path / "instances_train2017.json")
    assert train["warnings"] == [] and test["warnings"] == ["1 of 1 photos of COCO are among those trained on; the first: COCO's 25; don't report scores of that model on this split"]
    with pytest.raises(RISError, match="lists no photo of COCO"): check_data(tmp_path, tmp_path / "expressions.jsonl")


# ---- sentences that fit nothing, and several mask files

def test_sentences_about_nothing_and_several_things(tmp_path):
    tool = photos(tmp_path / "tool", "a.png", "b.png")
    for name, box in (("mug", MUG), ("book", BOOK)): Image.fromarray(truth(box)).save(tool / f"{name}.png")
    (tool / "table.csv").write_text("photo,sentence,mask,no_target\na.png,both,mug.png|book.png,\na.png,the kite,,true\nb.png,the kite,,1\nb.png,who knows,,no\n"
                                    "b.png,the mug,mug.png,true\nb.png,the cup,,perhaps\nb.png,the pen,[],\n")
    source = coco(tool, [thing(1), {"id": 2, "image_id": 1, "caption": "the kite", "no_target": True}, {"id": 3, "image_id": 2, "attributes": {"expression": "the kite", "no_target": True}},
                         {"id": 4, "image_id": 2, "caption": "who knows"}])
    for source, format, masked in ((tool / "table.csv", "csv", "both"), (source, "coco", "the mug")):
        done = import_data(source, tmp_path / format, format, photos=tool, splits={"train": 1})
        data = {(r.image_path.name, r.sentences[0].text): r for r in open_data(done.root).referrals("train")}
        assert set(data) == {("a.png", masked), ("a.png", "the kite"), ("b.png", "the kite"), ("b.png", "who knows")}
        assert {name for name, r in data.items() if r.absent} == {("a.png", "the kite"), ("b.png", "the kite")} and not data["b.png", "who knows"].has_mask
        assert (data["a.png", masked].mask() == (truth(MUG, BOOK) if format == "csv" else truth(MUG))).all()
        assert [line for line in done.notes if "outline" in line] == ["without an outline, for training without masks only: 1; the first: "
                                                                      + ("line 5" if format == "csv" else "annotation 4 of b.png")]
        if format == "csv": assert done.left_out == ["left out, malformed: 3; the first: line 6 (ValueError, it has an outline, and its no_target says that there is nothing to outline)"]
        row, = check_data(done.root)
        assert row["problems"] == [] and len(row["warnings"]) == 1 and "1 of 4 referrals have no mask" in row["warnings"][0]
