"""Photos, sentences and tables of every kind for `ris-nb predict`: each ends with an answer, or with one line on standard error that says what to do."""
import csv
import os
import re
import struct
import zlib
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import numpy as np
import pytest
import torch
from PIL import Image

from ris_nb.cli.main import main
from ris_nb.cli.predict import find_questions, name_files
from ris_nb.contract import Output, RISError
from ris_nb.data.batches import make_batch
from ris_nb.data.tokenizer import read_vocabulary
from ris_nb.models.photo import PhotoLAVT
from ris_nb.registry import DEFAULT_CHECKPOINT, load_model

BERT = dict(model_type="bert", vocab_size=10_000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A PhotoLAVT of random weights; no package with an encoder is asked for."""
    torch.manual_seed(0)
    model = PhotoLAVT(image_size=64, vocabulary=read_vocabulary("bert-base-uncased")[:10_000], max_words=24,
                      vision=dict(timm="tf_efficientnet_lite0", pretrained=False, stages=None, drop_path=None),
                      text=dict(hf="small", pretrained=False, layers=None, config=BERT),
                      stages=dict(width=16, heads=2, ffn=16, looking=1, reading=1), decoder=dict(detail=8, affinity=8)).eval()
    folder = tmp_path_factory.mktemp("run")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo("photo.jpg")
    return tmp_path


def photo(path, mode="RGB", size=(60, 40), **options):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    image.save(path, **options)
    return image


def predict(*words):
    """Exit code, standard output, and the lines on standard error but progress bars."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["predict", *map(str, words)])
    return code, out.getvalue(), [line for line in re.split(r"[\r\n]+", err.getvalue()) if line.strip() and "%|" not in line]


def refused(words, *needles):
    """One line that says why, and nothing written."""
    before = sorted(os.listdir("."))
    code, out, lines = predict(*words)
    assert (code, out) == (2, "") and len(lines) == 1 and len(lines[0]) < 1100, (code, out, lines)
    assert lines[0].startswith("ris-nb: ") and all(needle in lines[0] for needle in needles), lines
    assert sorted(os.listdir(".")) == before


# Photos

def deep_png(path):
    """A PNG of 16 bits a channel in colour, which PIL reads and can't write."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = b"".join(b"\0" + os.urandom(30 * 6) for _ in range(20))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30, 20, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("name, make, size", [
    ("dot.png", lambda path: photo(path, size=(1, 1)), (1, 1)),
    ("strip.png", lambda path: photo(path, size=(3000, 1)), (3000, 1)),
    ("print.jpg", lambda path: photo(path, "CMYK"), (60, 40)),
    ("grey.jpg", lambda path: photo(path, "L"), (60, 40)),
    ("fax.png", lambda path: photo(path, "1"), (60, 40)),
    ("palette.png", lambda path: photo(path, "P"), (60, 40)),
    ("clear.png", lambda path: photo(path, "P", transparency=3), (60, 40)),
    ("glass.png", lambda path: photo(path, "RGBA"), (60, 40)),
    ("deep.png", deep_png, (30, 20)),
    ("moving.gif", lambda path: photo(path, save_all=True, append_images=[Image.new("RGB", (60, 40))]), (60, 40)),
    ("a photo of ours, ünïcode 🐶.jpg", photo, (60, 40)),
    ("no_suffix", lambda path: photo(path, format="PNG"), (60, 40))])
def test_odd_photos_are_answered(run, place, name, make, size):
    make(place / name)
    code, out, lines = predict(name, "the dog on the left", "--checkpoint", run, "--out", "new")
    assert (code, lines) == (0, []) and "of the photo; written" in out
    stem = os.path.splitext(name)[0]
    mask = Image.open(place / "new" / f"{stem}_mask.png")
    assert mask.mode == "L" and mask.size == size == Image.open(place / "new" / f"{stem}_overlay.png").size
    answer = load_model(run).predict([name], ["the dog on the left"])[0]
    assert np.array_equal(answer, np.asarray(mask) == 255)


def test_a_turned_photo_is_answered_as_a_person_sees_it(run, place):
    """The command turns a photo as its EXIF note asks; from Python it stays as it is stored, for annotations refer to stored pixels."""
    image = photo("stored.png")
    image.getexif()[0x0112] = 6
    image.save("turned.jpg", exif=image.getexif())
    assert predict("turned.jpg", "the dog", "--checkpoint", run)[0] == 0
    assert Image.open("turned_mask.png").size == (40, 60)
    assert load_model(run).predict(["turned.jpg"], ["the dog"])[0].shape == (40, 60)


@pytest.mark.parametrize("name, make, needles", [
    ("none.jpg", lambda path: path.write_text("no picture"), ["can't be read as an image", "replace it"]),
    ("empty.jpg", lambda path: path.write_bytes(b""), ["can't be read as an image"]),
    ("half.jpg", lambda path: path.write_bytes((path.parent / "photo.jpg").read_bytes()[:700]), ["the data ends early"]),
    ("huge.png", lambda path: Image.new("1", (12_000, 9_000)).save(path), ["over 89,478,485 pixels", "scale it down"]),
    ("deep.png", lambda path: Image.fromarray(np.full((20, 30), 40_000, np.uint16)).save(path), ["more than 8 bits", "save it as 8-bit RGB"]),
    ("float.tiff", lambda path: Image.new("F", (30, 20)).save(path), ["more than 8 bits"]),
    ("gone.jpg", lambda path: None, ["no such image", "check the path"]),
    ("folder", lambda path: path.mkdir(), ["no photo lies in this folder"])])
def test_what_is_no_photo_is_refused(run, place, name, make, needles):
    make(place / name)
    refused([name, "the dog", "--checkpoint", run, "--out", "new"], name, *needles)


# Sentences

@pytest.mark.parametrize("expression, code, warnings", [
    ("", 2, 0), ("   ", 2, 0), ("\n\t", 2, 0), ("\u200b", 2, 0), ("\x00", 2, 0),  # nothing is left of them
    ("word " * 500, 0, 1), ("the dog on the left of the man " * 80, 0, 1), ("x" * 100_000, 0, 1),
    ("🐶", 0, 1), ("the 🐶 on the left", 0, 1), ("...", 0, 0), ("12 + 30", 0, 0),
    ("der Hund links neben dem Mann", 0, 0), ("左边的狗", 0, 0), ("الكلب على اليسار", 0, 0), ("le chien à gauche", 0, 0),
    ("the dog'; DROP TABLE dogs; --", 0, 0), ("$\\frac{", 0, 0), ("THE DOG", 0, 0), ("the\ndog", 0, 0)])
def test_odd_sentences(run, place, expression, code, warnings):
    words = ["photo.jpg", expression, "--checkpoint", run, "--out", "new"]
    if code:
        refused(words, "says nothing", "describe one object")
        with pytest.raises(RISError, match="says nothing"):
            load_model(run).predict(["photo.jpg"], [expression])
        return
    code, out, lines = predict(*words)
    assert code == 0 and "of the photo; written" in out and len(out) < 1000
    assert all(line.startswith("warning: ") and len(line) < 400 for line in lines) and warnings <= len(lines) <= 2, lines


def test_words_that_make_no_question(run, place):
    own = ["--checkpoint", run]
    refused(["photo.jpg", *own], "EXPRESSION is missing")
    refused(["photo.jpg", "photo.jpg", *own], "EXPRESSION is missing")
    refused(["photo.jpg", "the", "man", "on", "the", "left", *own], "put in quotes", '"the man on the left"')
    refused(["", "the dog", *own], "PHOTO is empty")
    refused(["photo.jpg", "gone.jpg", "the dog", *own], "gone.jpg", "no such image")
    refused(["photo.jpg", "the dog", "", *own], "says nothing")
    refused(["photo.jpg", "the dog", *own, "--released", "magnet_refcoco"], "choose one")
    assert predict("photo.jpg", "左边的狗", "红色的车", *own)[0] == 0  # not every language has spaces


# Tables

@pytest.mark.parametrize("text, needles", [
    ("", ["no column 'expression' and no column 'image'", "first line"]), ("\n", ["no column"]), ("image,sentence\nphoto.jpg,the dog\n", ["no column 'expression'", "image,sentence"]),
    ("expression\nthe dog\n", ["no column 'image'"]), ("photo.jpg,the dog\n", ["no column"]), ("image,expression\n", ["nothing stands below its first line"]),
    ("image,expression\nphoto.jpg,the dog\ngone.jpg,the dog\n", ["line 3", "gone.jpg", "no such image"]),
    ("image,expression\ngone.jpg,the dog\ngone.jpg,the cat\n", ["line 2", "and 1 more"]),
    ("image,expression\nphoto.jpg,\n", ["line 2", "no expression"]), ("image,expression\nphoto.jpg\n", ["line 2", "no expression"]),
    ("image,expression\n,the dog\n", ["line 2", "no image"]), ("image,expression\n.,the dog\n", ["line 2", "no image"]),
    ("image,expression\nphoto.jpg,\u200b\n", ["says nothing"]), (b"image,expression\n\xff\xfe,\n", ["no CSV in UTF-8"]),
    ("image,expression\n" + "x" * 200_000 + ",the dog\n", [])])
def test_bad_tables(run, place, text, needles):
    (place / "questions.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    refused(["questions.csv", "--checkpoint", run, "--out", "new"], "questions.csv" if "says nothing" not in needles else "expression", *needles)


def test_other_mistakes_with_tables(run, place):
    own = ["--checkpoint", run]
    refused(["gone.csv", *own], "gone.csv", "No such file")
    (place / "answers.csv").write_text("image,expression\nphoto.jpg,the dog\n")
    refused(["answers.csv", "the dog", *own], "a table has its own expressions", "'the dog'")
    refused(["answers.csv", *own], "would replace it", "--out")
    assert predict("answers.csv", *own, "--out", "new")[0] == 0
    photo("picture.png")
    os.rename("picture.png", "picture.csv")
    refused(["picture.csv", *own], "no CSV in UTF-8")


@pytest.mark.parametrize("text", ["image,expression\na/photo.jpg,the dog\nphoto.jpg,the cat\na/photo.jpg,\"the man, left\"\n",
                                  "\ufefftype;expression;image\r\nx;the dog;a/photo.jpg\r\nx;the cat;photo.jpg\r\nx;the man, left;a/photo.jpg\r\n"])
def test_a_table_is_answered(run, place, text, monkeypatch):
    """Its paths are relative to its own folder; each photo is encoded once, and two photos of one name keep their answers."""
    (place / "a").mkdir()
    photo("a/photo.jpg", size=(50, 30))
    (place / "questions.csv").write_text(text, encoding="utf-8")
    encoded, encode = [], PhotoLAVT.encode_image
    monkeypatch.setattr(PhotoLAVT, "encode_image", lambda self, image: encoded.append(len(image)) or encode(self, image))
    monkeypatch.chdir(place / "a")
    code, out, lines = predict("../questions.csv", "--checkpoint", run, "--out", "../new")
    assert (code, lines) == (0, []) and "3 answers, 0 left out" in out and encoded == [1, 1]
    rows = list(csv.DictReader((place / "new/answers.csv").open(encoding="utf-8", newline="")))
    assert [row["expression"] for row in rows] == ["the dog", "the man, left", "the cat"]
    assert [row["mask"] for row in rows] == ["photo_1_mask.png", "photo_2_mask.png", "photo_mask.png"]
    for row in rows:
        mask = np.asarray(Image.open(place / "new" / row["mask"])) == 255
        assert np.array_equal(mask, load_model(run).predict([row["image"]], [row["expression"]])[0])
        assert float(row["share"]) == pytest.approx(mask.mean(), abs=1e-4) and (place / "new" / row["overlay"]).exists()


# Several photos

def test_a_folder_is_answered_but_for_what_is_no_photo(run, place):
    folder = place / "album"
    folder.mkdir()
    for name in ("a.jpg", "b.PNG", "c.webp"):
        photo(folder / name)
    (folder / "notes.txt").write_text("no photo")
    for out in ("album", "new"):  # what a first call writes is no photo for the second
        code, out, lines = predict("album", "the dog", "the man on the left", "--checkpoint", run, "--out", out)
        assert (code, lines) == (0, []) and "6 answers, 0 left out" in out
    assert len(list((place / "new").iterdir())) == 13
    (folder / "broken.jpg").write_text("no picture")
    code, out, (line,) = predict("album", "photo.jpg", "the dog", "--checkpoint", run, "--out", "more")
    assert code == 1 and "4 answers, 1 left out" in out and line.startswith("left out: album") and "broken.jpg" in line
    code, out, lines = predict("album/broken.jpg", "album/notes.txt", "the dog", "--checkpoint", run, "--out", "none")
    assert code == 2 and out == "" and len(lines) == 3 and "none of the photos can be read" in lines[-1] and not (place / "none").exists()


def test_many_sentences_about_one_photo(run, place):
    code, out, lines = predict("photo.jpg", *(f"the dog {k}" for k in range(40)), "--checkpoint", run, "--out", "new")
    assert (code, lines) == (0, []) and "40 answers" in out and len(list((place / "new").iterdir())) == 81
    mask = np.asarray(Image.open("new/photo_40_mask.png")) == 255
    assert np.mean(mask != load_model(run).predict(["photo.jpg"], ["the dog 39"])[0]) < 0.01  # among others sums round differently


def test_photos_come_before_expressions(place):
    photo("dog", format="PNG")
    one = place / "photo.jpg"
    def asked(*words):
        return {str(path): words for path, words in find_questions(*words[:1], words[1:]).items()}
    assert asked("photo.jpg", "dog") == {"photo.jpg": ["dog"]}  # the last word is an expression, even if a file has its name
    assert asked("photo.jpg", "dog", "the cat") == {"photo.jpg": ["the cat"], "dog": ["the cat"]}
    assert asked("photo.jpg", "./photo.jpg", "the cat") == {"photo.jpg": ["the cat"]}
    assert asked("photo.jpg", "x" * 10_000) == {"photo.jpg": ["x" * 10_000]}
    assert name_files({one: ["a"], place / "a/Photo.png": ["b"], place / "b/photo.jpg": ["c", "d"]}) == {
        one: ["photo"], place / "a/Photo.png": ["Photo-2"], place / "b/photo.jpg": ["photo_1", "photo_2"]}


def test_who_answers_where_no_model_is_named(run, place, monkeypatch):
    """One constant for the command and for `load_model`; its --help names it."""
    from ris_nb import registry
    asked = []
    monkeypatch.setattr(registry, "load_model", lambda source: asked.append(source) or load_model(run))
    code, out, lines = predict("photo.jpg", "the dog")
    assert code == 0 and asked == [DEFAULT_CHECKPOINT] == list(load_model.__defaults__)
    assert f"Where no model is named, {DEFAULT_CHECKPOINT} answers" in " ".join(predict("--help")[1].split())


# The same model in half the space

def test_a_model_saved_in_half_precision_answers_alike(run, place):
    """`half()` before `save_pretrained`, as for timm and transformers; what is loaded computes in float32 again."""
    model = load_model(run)
    model.half().save_pretrained("half")
    whole, small = load_model(run), load_model("half")
    assert all(parameter.dtype == torch.float32 for parameter in small.parameters())
    sizes = [os.path.getsize(os.path.join(folder, "model.safetensors")) for folder in (run, "half")]
    assert sizes[1] < 0.52 * sizes[0]
    scores = []
    for one in (whole, small):
        batch = make_batch(["photo.jpg"] * 2, ["the dog on the left", "a red car"], one.tokenizer, one.transform)
        with torch.no_grad():
            scores.append(one(batch).score)
    cut = float(scores[0].sigmoid().median())  # random weights mark everything or nothing at 0.5
    first, second = (torch.stack(one.masks(Output(score), [(40, 60)] * 2, cut)) for one, score in zip((whole, small), scores))
    assert 0.2 < first.float().mean() < 0.8 and (first != second).float().mean() < 0.02
