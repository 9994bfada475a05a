"""What the chapter on reading referrals should not carry: hostile pickles, broken roots, and the table of real RefCOCO samples."""
import io
import json
import os
import pickle
import random
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from ris_nb.contract import RISError
from ris_nb.data import pack as pack_module, refer
from ris_nb.data.batches import Transform
from ris_nb.data.check import check_data
from ris_nb.data.folder import FolderData
from ris_nb.data.pack import Pack, write_pack
from ris_nb.data.phrasecut import PhraseCutData
from ris_nb.data.pickles import load_plain_pickle
from ris_nb.data.refer import ReferData, Referral, Sentence
from ris_nb.data.sources import open_data

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_samples = pytest.mark.skipif(not (SHARED / "mini_refcoco").is_dir(), reason="needs ../shared/data/mini_refcoco (real COCO photos, not shipped)")


def one_line(info) -> str:
    message = str(info.value)
    assert "\n" not in message and len(message) < 700
    return message


# ---- pickles

PLAIN = [{"ref_id": 1, "text": "caf\xe9 \u2603 'quoted' \\ \n\t", "empty": "", "n": [0, -1, 255, 256, 65536, 2**31, -2**70, 1.5, -0.0, 1e300],
          "b": [True, False, None], "t": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), 7: {}, "long": "x" * 300, "nested": [[[]], {"a": [1]}]}]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_load_as_pickle_loads_them(tmp_path, protocol):
    shared = ["a", "b"]
    value = PLAIN + [shared, shared] + [{"raw": f"expression {i}", "sent_id": i} for i in range(2000)]
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    found = load_plain_pickle(path)
    assert found == value and found[1] is found[2]


def test_sets_and_bytes_of_new_protocols(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps({"s": {1, 2}, "f": frozenset("ab"), "b": b"\0\xff" * 300}, protocol=4))
    assert load_plain_pickle(path) == {"s": {1, 2}, "f": frozenset("ab"), "b": b"\0\xff" * 300}


@pytest.mark.parametrize("program, value", [
    (b"(lp1\n(dp2\nS'sent'\np3\nS'the caf\\xe9'\np4\nsS'ref_id'\np5\nI42\nsS'big'\nL7L\nsS'w'\nF1.5\nsa.", [{"sent": "the caf\xe9", "ref_id": 42, "big": 7, "w": 1.5}]),
    (b"(lp1\nS\"it's\"\naVcaf\\u00e9\naI01\naI00\naNa(I1\nI2\ntp2\nag2\na.", ["it's", "caf\xe9", True, False, None, (1, 2), (1, 2)]),
    (b"\x80\x02]q\x01(U\x04caf\xe9q\x02T\x03\0\0\0abcX\x05\0\0\0caf\xc3\xa9e.", ["caf\xe9", "abc", "caf\xe9"]),
    (b"S'raw \xe9 byte'\n.", "raw \xe9 byte"),
])
def test_pickles_of_python_2(tmp_path, program, value):
    path = tmp_path / "refs.p"
    path.write_bytes(program)
    assert load_plain_pickle(path) == value == pickle.loads(program, encoding="latin1")


class Evil:
    def __init__(self, call, *arguments): self.reduced = (call, arguments)
    def __reduce__(self): return self.reduced


class PersistentPickler(pickle.Pickler):
    def persistent_id(self, thing): return "anything" if isinstance(thing, Evil) else None


def persistent(protocol):
    buffer = io.BytesIO()
    PersistentPickler(buffer, protocol).dump([Evil(len)])
    return buffer.getvalue()


HOSTILE = {
    "os.system, protocol 0": (b"cos\nsystem\n(S'touch {flag}'\ntR.", "os.system"),
    "os.system as INST": (b"(S'touch {flag}'\nios\nsystem\n.", "os.system"),
    "os.system, by reduce": (pickle.dumps(Evil(os.system, "touch {flag}")), "system"),
    "os.system, by reduce, protocol 2": (pickle.dumps(Evil(os.system, "touch {flag}"), 2), "system"),
    "eval": (pickle.dumps([Evil(eval, "open('{flag}', 'w')")]), "builtins.eval"),
    "eval of Python 2": (b"c__builtin__\neval\n(S'1'\ntR.", "__builtin__.eval"),
    "getattr chain": (pickle.dumps(Evil(getattr, [], "append")), "builtins.getattr"),
    "numpy array": (pickle.dumps(np.zeros(3)), "multiarray._reconstruct"),
    "numpy scalar": (pickle.dumps({"ref_id": np.int64(3)}, 2), "multiarray.scalar"),
    "copyreg": (pickle.dumps(random.Random(), 2), "random.Random"),
    "copyreg._reconstructor": (b"ccopy_reg\n_reconstructor\n(c__main__\nX\nc__builtin__\nobject\nNtR.", "copy_reg._reconstructor"),
    "ordered dict": (pickle.dumps(OrderedDict(a=1)), "collections.OrderedDict"),
    "a class of ours": (pickle.dumps(Sentence("x")), "Sentence"),
    "a path": (pickle.dumps(Path("/etc/passwd")), "pathlib"),
    "persistent id, protocol 0": (persistent(0), "PERSID"),
    "persistent id, protocol 2": (persistent(2), "BINPERSID"),
    "extension code": (b"\x80\x02\x82\x01.", "EXT1"),
    "build": (b"}}b.", "BUILD"),
    "reduce": (b"])R.", "REDUCE"),
    "buffer": (b"\x97.", "NEXT_BUFFER"),
    "bytearray": (pickle.dumps(bytearray(b"x"), 5), "BYTEARRAY8"),
    "global with an escape sequence in its name": (b"c\x1b[31mos\nsys\rtem\n.", "os.sys\\rtem"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_by_name_and_run_nothing(tmp_path, name):
    program, named = HOSTILE[name]
    flag, path = tmp_path / "flag", tmp_path / "refs(x).p"
    path.write_bytes(program.replace(b"{flag}", str(flag).encode()) if b"\x8c" not in program else program)
    with pytest.raises(RISError) as info: load_plain_pickle(path)
    assert named in one_line(info) and str(path) in str(info.value) and "refused" in str(info.value)
    assert not flag.exists()


BROKEN = {
    "empty file": b"", "text": b"this is no pickle", "html": b"<!DOCTYPE html><html>404</html>",
    "no stop": b"\x80\x02]", "stop on an empty stack": b".", "pop from nothing": b"e.", "no mark": b"]e.", "unknown memo": b"h\x05.",
    "string longer than the file": b"X\xff\xff\xff\x7fabc.", "8-byte length": b"\x8d" + b"\xff" * 8 + b"abc.", "number cut off": b"J\x01.",
    "negative length": b"T\xff\xff\xff\xffabc.", "negative long": b"\x8b\xff\xff\xff\xff.", "digits without end": b"I" + b"9" * 10_000 + b"\n.",
    "append to a string": b"U\x01aU\x01ba.", "dict with an odd item": b"(U\x01ad.", "bad utf-8": b"\x8c\x02\xff\xff.", "unquoted string": b"Sabc\n.",
    "unhashable key": b"}]Ns.", "not a number": b"Iabc\n.", "line cut off": b"I12",
    "stack global out of odd things": b"\x8c\x03a\nb]\x93.",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pickles_are_one_clear_line(tmp_path, name):
    path = tmp_path / "refs.p"
    path.write_bytes(BROKEN[name])
    with pytest.raises(RISError) as info: load_plain_pickle(path)
    assert str(path) in one_line(info)


def test_every_truncation_is_one_clear_line(tmp_path):
    whole = pickle.dumps(PLAIN, 2)
    path = tmp_path / "refs.p"
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(RISError): load_plain_pickle(path)


def test_random_bytes_never_escape_as_anything_else(tmp_path):
    rng, whole = random.Random(0), bytearray(pickle.dumps(PLAIN, 2))
    path = tmp_path / "refs.p"
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 2, 8))): damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try: load_plain_pickle(path)
        except RISError: pass


@pytest.mark.parametrize("program", [b"]r\xff\xff\xff\x7f.", b"]p9999999999999\n.", b"]q\x05."])
def test_a_huge_memo_index_costs_nothing(tmp_path, program):
    path = tmp_path / "refs.p"   # the interpreter's own machine would ask for some 32 gigabytes for the first of these
    path.write_bytes(program)
    tracemalloc.start()
    try:
        with pytest.raises(RISError, match="asks for memo slot .* and is refused"): load_plain_pickle(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_many_flat_tuples_are_fine_and_too_many_are_refused(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps([(i, i + 1) for i in range(10_000)]))
    assert load_plain_pickle(path)[-1] == (9_999, 10_000)
    path.write_bytes(pickle.dumps([(i, i + 1) for i in range(10_001)]))
    with pytest.raises(RISError, match="more than 10,000 tuples") as info: load_plain_pickle(path)
    one_line(info)
    path.write_bytes(b"}" + b")" + b"\x85" * 9_999 + b"Ns.")   # the deepest key that is let through is hashed without harm
    assert len(load_plain_pickle(path)) == 1


def test_nesting_without_end_neither_crashes_nor_hashes(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(b"}" + b")" + b"\x85" * 1_000_000 + b"Ns.")   # a dict key that would overflow the C stack
    with pytest.raises(RISError): load_plain_pickle(path)
    path.write_bytes(b"]" * 500_000 + b"a" * 499_999 + b".")
    with pytest.raises(RISError): ReferData(root_with(tmp_path / "deep", raw_refs=path.read_bytes()), "refcoco")


# ---- REFER roots

def square(x, y, side): return [x, y, x + side, y, x + side, y + side, x, y + side]


def ref(number, split="train", image=1, annotation=None, sentences=("the square",)):
    return {"ref_id": number, "ann_id": annotation or number, "image_id": image, "category_id": 3, "split": split, "file_name": "ignored_1.jpg",
            "sentences": [{"raw": text, "sent": text.lower(), "sent_id": 10 * number + i} for i, text in enumerate(sentences)]}


def root_with(root, refs=None, segmentations=None, raw_refs=None, dataset="refcoco", split_by="unc", images=None, **instances):
    """A tiny root: one 48 x 64 photo (rows x columns), one annotation for each segmentation."""
    refs = [ref(1)] if refs is None else refs
    segmentations = [[square(10, 8, 20)]] if segmentations is None else segmentations
    folder, photos = root / dataset, root / "images/mscoco/images/train2014"
    folder.mkdir(parents=True)
    photos.mkdir(parents=True, exist_ok=True)
    (folder / f"refs({split_by}).p").write_bytes(raw_refs or pickle.dumps(refs, 2))
    images = images or [{"id": 1, "file_name": "a.jpg", "height": 48, "width": 64}]
    annotations = [{"id": i, "image_id": 1, "category_id": 3, "bbox": [10, 8, 20, 20], "segmentation": s} for i, s in enumerate(segmentations, 1)]
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "box"}]} | instances))
    Image.new("RGB", (64, 48)).save(photos / "a.jpg")
    return root


def test_a_referral_in_full(tmp_path):
    data = ReferData(root_with(tmp_path, [ref(1, sentences=("The Square!", "it"))]))
    assert data.splits == ["train"] and data.split_by == "unc" and data.dataset == "refcoco" and data.root == tmp_path
    referral, = data.referrals("train")
    assert referral == Referral(1, 1, tmp_path / "images/mscoco/images/train2014/a.jpg", (48, 64), "box", "train",
                                (Sentence("The Square!", "", 10), Sentence("it", "", 11)), (10, 8, 20, 20))
    mask = referral.mask()
    assert mask.dtype == bool and mask.shape == (48, 64) and mask.flags.c_contiguous and mask[8:28, 10:30].all() and mask.sum() == 400 == referral.area()
    assert pickle.loads(pickle.dumps(referral)).mask().sum() == 400 and referral in {referral}


SPLITS = ["train", "val", "test", "testA", "testB", "testC", "testAB", "testBC", "testAC"]


@pytest.mark.parametrize("asked, counted", [
    ("train", ["train"]), ("val", ["val"]), ("test", ["test", "testA", "testB", "testC", "testAB", "testBC", "testAC"]),
    ("testA", ["testA", "testAB", "testAC"]), ("testB", ["testB", "testAB", "testBC"]), ("testC", ["testC", "testBC", "testAC"]),
    ("testAB", ["testAB"]), ("testBC", ["testBC"]), ("testAC", ["testAC"])])
def test_split_rules_of_the_toolbox(tmp_path, asked, counted):
    data = ReferData(root_with(tmp_path, [ref(i, split, annotation=1) for i, split in enumerate(SPLITS)]))
    assert [r.split for r in data.referrals(asked)] == counted and data.splits == SPLITS


@pytest.mark.parametrize("asked", ["", "Train", "testD", "tes", "validation", "A", None, "val "])
def test_wrong_splits_name_the_right_ones(tmp_path, asked):
    data = ReferData(root_with(tmp_path, [ref(1, "train"), ref(2, "testA", annotation=1)]))
    with pytest.raises(RISError, match="it has train, testA") as info: data.referrals(asked)
    one_line(info)
    with pytest.raises(RISError, match="it has train, testA"): data.referrals("val")   # a rule of the toolbox, but none there


def masks_of(tmp_path, *segmentations):
    root = root_with(tmp_path, [ref(i) for i in range(1, len(segmentations) + 1)], list(segmentations))
    return ReferData(root).referrals("train")


def test_every_encoding_of_one_mask(tmp_path):
    truth = np.zeros((48, 64), bool)
    truth[8:28, 10:30] = truth[40:, 60:] = True
    text = coco_mask.encode(np.asfortranarray(truth.astype(np.uint8)))["counts"].decode()
    flat = truth.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat, [not flat[-1]]]).astype(int)))
    counts = np.diff(np.concatenate([[0], edges])).tolist()
    rle = [{"size": [48, 64], "counts": c} for c in (text, counts)]
    polygons = [square(10, 8, 20), [60, 40, 64, 40, 64, 48, 60, 48]]
    for referral in masks_of(tmp_path, polygons, *rle, [rle[0]], rle):
        assert np.array_equal(referral.mask(), truth)
    assert masks_of(tmp_path / "bytes", {"size": [48, 64], "counts": counts})[0].area() == truth.sum()
    in_bytes = Referral(1, 1, Path("a"), (48, 64), "", "train", (), None, {"size": [48, 64], "counts": text.encode()})
    assert np.array_equal(in_bytes.mask(), truth)


def test_parts_are_united_and_counted_as_the_toolbox_counts(tmp_path):
    referral, = masks_of(tmp_path, [square(10, 8, 20), square(20, 8, 20)])
    assert referral.mask().sum() == 600 and referral.area() == 800


def test_polygons_out_of_the_frame(tmp_path):
    left, around, degenerate, *bad = masks_of(tmp_path, [square(-10, 8, 20)], [square(-100, -100, 400)], [[1, 2, 3, 4], square(10, 8, 20)],
                                              [square(100, 100, 20)], [[1e9, 0, 1e9, 5, 0, 5]], [[float("nan"), 0, 1, 5, 0, 5]], [[1, 2, 3, 4]],
                                              [[1, 2, 3, 4, 5, 6, 7]], ["abc"], [[["x"]]], [[]], [3])
    assert left.mask()[8:28, :10].all() and left.mask().sum() == 200
    assert around.mask().all() and degenerate.mask().sum() == 400
    for referral in bad:
        with pytest.raises(RISError, match=f"referral {referral.ref_id} in a.jpg") as info: referral.mask()
        one_line(info)


def test_an_rle_is_unpacked_once(tmp_path, monkeypatch):
    unpacked = []
    counts = refer._rle_counts
    monkeypatch.setattr(refer, "_rle_counts", lambda text: unpacked.append(text) or counts(text))
    mask = np.zeros((48, 64), np.uint8)
    mask[5:17, 11:29] = 1
    rle = {"size": [48, 64], "counts": coco_mask.encode(np.asfortranarray(mask))["counts"].decode()}
    for referral in masks_of(tmp_path, rle, [rle, rle]) * 2: assert np.array_equal(referral.mask(), mask)
    assert len(unpacked) == 1


@pytest.mark.parametrize("rle", [
    {"size": [64, 48], "counts": [3072]}, {"size": [48, 64], "counts": [10, 20]}, {"size": [48, 64], "counts": [10, 2**40]},
    {"size": [48, 64], "counts": [-1, 3073]}, {"size": [48, 64], "counts": "000"}, {"size": [48, 64], "counts": "oooo"},
    {"size": [48, 64], "counts": ""}, {"size": [48, 64], "counts": "\u2603"}, {"size": [48, 64], "counts": [3072]}, {"size": [48, 64]}, {"counts": [1]},
    {"size": [48, 64], "counts": "o" * 100_000 + "0"}, {"size": [48, 64], "counts": "PP3o"}, {"size": [48, 64], "counts": "PP3\0"},
    {"size": [48, 64], "counts": "oooooo0"}, {"size": 5, "counts": [1]}, {"size": [48, 64], "counts": None}])
def test_broken_or_empty_rle(tmp_path, rle):
    referral, = masks_of(tmp_path, rle)
    for read in (referral.mask, referral.area):
        with pytest.raises(RISError, match="referral 1 in a.jpg") as info: read()
        one_line(info)


def test_no_mask_is_weak_supervision(tmp_path):
    for referral in masks_of(tmp_path, [], None):
        assert not referral.has_mask
        with pytest.raises(RISError, match="has none"): referral.mask()


@pytest.mark.parametrize("change, said", [
    (dict(refs=[ref(1) | {"ann_id": 77}]), "77"), (dict(refs=[ref(1, image=5)]), "instances.json"), (dict(refs=[{"ann_id": 1}]), "entry 0"),
    (dict(refs={"a": 1}), "REFER toolbox"), (dict(refs=[3]), "REFER toolbox"), (dict(raw_refs=pickle.dumps(5)), "REFER toolbox"),
    (dict(refs=[ref(1) | {"sentences": 5}]), "entry 0"), (dict(refs=[ref(1) | {"sentences": [{"raw": 5}]}]), "entry 0"),
    (dict(refs=[ref(1) | {"ann_id": [[1]]}]), "REFER toolbox"), (dict(refs=[ref(1) | {"ann_id": []}]), "entry 0"),
    (dict(refs=[ref(1) | {"ann_id": [1, -1]}]), "fit nothing"), (dict(annotations=5), "REFER toolbox"), (dict(images=[{"id": 1}]), "file_name"),
    (dict(images=[{"id": 1, "file_name": "../../secret.jpg", "height": 4, "width": 4}]), "leads out of"),
    (dict(images=[{"id": 1, "file_name": "/etc/passwd", "height": 4, "width": 4}]), "leads out of"),
    (dict(images=[{"id": 1, "file_name": "a.jpg", "height": 10**6, "width": 10**6}]), "1000000"),
    (dict(images=[{"id": 1, "file_name": "a.jpg", "height": -4, "width": -4}]), "-4"), (dict(raw_refs=b"cos\nsystem\n."), "os.system")])
def test_contradictory_roots(tmp_path, change, said):
    with pytest.raises(RISError) as info: ReferData(root_with(tmp_path, **change))
    assert said in one_line(info)
    row, = check_data(tmp_path)
    assert row["problems"] == [str(info.value)] and row["split"] == ""


def test_corrupt_json(tmp_path):
    root = root_with(tmp_path)
    for text in ("{", "", "[]", "[" * 100_000, "\xff"):
        (root / "refcoco/instances.json").write_text(text, encoding="latin-1")
        with pytest.raises(RISError, match="instances.json") as info: ReferData(root)
        one_line(info)


def test_what_is_missing_is_said(tmp_path):
    def said(*args):
        with pytest.raises(RISError) as info: open_data(*args)
        return one_line(info)
    assert "no folder" in said(tmp_path / "nowhere")
    assert "expressions.jsonl" in said(tmp_path) and "ris-nb data shapes" in said(tmp_path)
    root = root_with(tmp_path / "r")
    assert "found refcoco" in said(root, "refcocog") and "ris-nb data prepare refcocog" in said(root, "refcocog")
    assert "ris-nb data shapes" in said(root, "refshapes") and "there is unc" in said(root, "refcoco", "google")
    assert f"the root is {root.resolve()}" in said(root / "refcoco")
    (root / "refcoco/refs(google).p").write_bytes((root / "refcoco/refs(unc).p").read_bytes())
    assert "google and by unc" in said(root)
    root_with(root, dataset="refcoco+")
    assert "refcoco, refcoco+" in said(root)
    (root / "images/mscoco").rename(root / "images/elsewhere")
    assert "images/mscoco/images/train2014" in said(root, "refcoco", "unc")
    (root / "refcoco/instances.json").unlink()
    assert "instances.json is missing" in said(root, "refcoco", "unc")


@pytest.mark.parametrize("place", ["images/train2014", "train2014"])
def test_other_places_for_photos(tmp_path, place):
    root = root_with(tmp_path)
    (root / place).parent.mkdir(exist_ok=True)
    (root / "images/mscoco/images/train2014").rename(root / place)
    assert ReferData(root).referrals("train")[0].image_path == root / place / "a.jpg"


def test_check_finds_what_would_break_a_training(tmp_path):
    images = [{"id": i, "file_name": name, "height": 48, "width": 64} for i, name in enumerate(("a.jpg", "gone.jpg", "cut.jpg", "text.jpg", "turned.png"), 1)]
    refs = [ref(i, image=i) for i in range(1, 6)] + [ref(6, "val", sentences=("", "x")), ref(7, "val")]
    segmentations = [[square(10, 8, 20)]] * 5 + [[square(100, 100, 5)], [square(50, 8, 20)]]
    root = root_with(tmp_path, refs, segmentations, images=images)
    photos = root / "images/mscoco/images/train2014"
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photos / "cut.jpg")
    (photos / "cut.jpg").write_bytes((photos / "cut.jpg").read_bytes()[:-700])
    (photos / "text.jpg").write_text("no photo")
    Image.new("RGB", (48, 64)).save(photos / "turned.png")
    train, val = check_data(root)
    assert {k: v for k, v in train.items() if k not in ("problems", "warnings")} == dict(
        dataset="refcoco", split_by="unc", split="train", images=5, refs=5, sentences=5, mask_pixels=2000, published=dict(images=16_994, refs=42_404, sentences=120_624))
    assert len(train["problems"]) == 1 and "4 of 5 images" in train["problems"][0] and "gone.jpg is missing" in train["problems"][0]
    said = " | ".join(val["problems"])
    assert val["mask_pixels"] == 14 * 20 and "1 of 2 masks can't be used" in said and "reach out" in said and "empty sentence" in said
    json.dumps([train, val])


# ---- PhraseCut

def task(phrase="windows", image=12, polygons=(((4, 4), (12, 4), (12, 12), (4, 12)),), **changes):
    return {"task_id": f"{image}__0", "image_id": image, "instance_boxes": [[4, 4, 8, 8]] * len(polygons),
            "Polygons": [[list(map(list, p))] for p in polygons], "phrase": phrase, "phrase_structure": {"name": phrase}, **changes}


def phrasecut(root, photos=None, **splits):
    (root / "phrasecut").mkdir(parents=True, exist_ok=True)
    (root / "images/phrasecut").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48)).save(root / "images/phrasecut/12.jpg")
    photos = [{"image_id": 12, "height": 48, "width": 64, "url": "x"}] if photos is None else photos
    (root / "phrasecut/image_data_split.json").write_text(json.dumps(photos))
    for split, tasks in splits.items(): (root / f"phrasecut/refer_{split}.json").write_text(json.dumps(tasks))
    return root


def test_phrasecut_masks_are_the_union_of_instances(tmp_path):
    boxes = [((0, 0), (10, 0), (10, 10), (0, 10)), ((5, 5), (15, 5), (15, 15), (5, 15)), ((40, 40), (41, 41))]   # the last encloses nothing
    data = open_data(phrasecut(tmp_path, val=[task(polygons=boxes), task("door")], train=[task("roof")]))
    assert isinstance(data, PhraseCutData) and data.splits == ["train", "val"]
    both, door = data.referrals("val")
    expected = np.zeros((48, 64), bool); expected[:10, :10] = expected[5:15, 5:15] = True
    assert (both.mask() == expected).all() and both.mask().sum() == 175
    assert (both.sentences[0].kind, door.sentences[0].kind, door.sentences[0].text) == ("several instances", "one instance", "door")
    assert data.referrals("val") == [both, door] and open_data(tmp_path, "phrasecut", "authors").referrals("train")[0].category == "roof"
    rows = check_data(tmp_path)
    assert [(r["split"], r["refs"], r["sentences"], r["problems"]) for r in rows] == [("train", 1, 1, []), ("val", 2, 2, [])]
    assert rows[1]["published"] == dict(images=2_971, refs=20_316, sentences=20_316)


def test_phrasecut_reads_a_split_when_it_is_asked_for(tmp_path):
    root = phrasecut(tmp_path, val=[task()])
    (root / "phrasecut/refer_train.json").write_text("[broken")
    (root / "phrasecut/refer_val_ris.json").write_text("another tool's")
    data = open_data(root)
    assert data.splits == ["train", "val"] and len(data.referrals("val")) == 1
    with pytest.raises(RISError, match="refer_train.json is no readable JSON") as info: data.referrals("train")
    one_line(info)


@pytest.mark.parametrize("change, said", [
    (dict(image_id=13), "entry 1 is malformed"), (dict(image_id="../../etc/passwd"), "entry 1"), (dict(Polygons=[[[1, 2, 3]]]), "entry 1"),
    (dict(Polygons=None), "entry 1"), (dict(phrase=None), "entry 1"), (dict(instance_boxes=[]), "entry 1"), (dict(phrase_structure=7), "entry 1")])
def test_malformed_phrases_are_named(tmp_path, change, said):
    root = phrasecut(tmp_path, val=[task(), task(**change)])
    with pytest.raises(RISError, match=said) as info: PhraseCutData(root).referrals("val")
    assert "refer_val.json" in one_line(info)


def test_phrasecut_says_what_is_missing(tmp_path):
    def said(*args):
        with pytest.raises(RISError) as info: open_data(*args)
        return one_line(info)
    root = phrasecut(tmp_path / "r", photos={}, val=[task()])
    assert "image_data_split.json" in said(root)
    assert "not split by 'unc'" in said(root, "phrasecut", "unc")
    (root / "images/phrasecut").rename(root / "images/elsewhere")
    assert "images of phrasecut are missing" in said(root) and "ris-nb data prepare phrasecut" in said(root)
    (tmp_path / "empty").mkdir()
    assert "refer_*.json" in said(tmp_path / "empty", "phrasecut")


def test_a_phrase_without_a_pixel_is_found_by_the_check(tmp_path):
    row, = check_data(phrasecut(tmp_path, val=[task(), task(polygons=[((70, 4), (90, 4), (90, 12))])]))
    assert "1 of 2 masks can't be used" in row["problems"][0]


# ---- a folder of one's own

@pytest.fixture
def own(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "masks").mkdir()
    for name in "ab": Image.new("RGB", (64, 48), "grey").save(tmp_path / f"photos/{name}.jpg")
    mask = np.zeros((48, 64), np.uint8)
    mask[8:28, 10:30] = 255
    Image.fromarray(mask).save(tmp_path / "masks/a.png")
    (tmp_path / "annotations.json").write_text(json.dumps({
        "images": [{"id": 5, "file_name": "b.jpg", "height": 48, "width": 64}], "categories": [{"id": 1, "name": "mug"}],
        "annotations": [{"id": 7, "image_id": 5, "category_id": 1, "bbox": [1, 2, 3, 4], "segmentation": [square(0, 0, 10)]}]}))
    return tmp_path


def write(root, *lines):
    (root / "expressions.jsonl").write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return root


def test_a_folder_of_ones_own(own):
    marked = {"image": "photos/a.jpg", "mask": "masks/a.png"}
    data = open_data(write(own, marked | {"expression": "the café"}, "", {"image": "photos/b.jpg", "expression": "two", "annotation": 7, "split": "val"},
                           marked | {"expression": "der Becher"}, {"image": "photos/a.jpg", "expression": "three"}, {"image": "photos/a.jpg", "expression": "four"}))
    assert isinstance(data, FolderData) and data.splits == ["train", "val"] and data.split_by == "folder" and data.dataset == own.name
    first, three, four = data.referrals("train")
    two, = data.referrals("val")
    assert first.sentences == (Sentence("the café", "one", 1), Sentence("der Becher", "one", 4)) and first.mask().sum() == first.area() == 400 and first.size == (48, 64)
    assert two.mask().sum() == 100 and two.category == "mug" and two.bbox == (1, 2, 3, 4)
    assert not three.has_mask and not four.has_mask and {first.image_id, three.image_id, four.image_id} == {0} and two.image_id == 1
    assert [(r["split"], r["images"], r["refs"], r["sentences"], r["mask_pixels"], r["problems"]) for r in check_data(own)] == [
        ("train", 1, 3, 4, 400, []), ("val", 1, 1, 1, 100, [])]


@pytest.mark.parametrize("line, said", [
    ("{", "JSON"), ("[1]", "expected an object"), ({"image": "photos/a.jpg"}, "no expression"), ({"image": "photos/a.jpg", "expression": "  "}, "no expression"),
    ({"expression": "x"}, "path"), ({"image": "photos/c.jpg", "expression": "x"}, "photos/c.jpg is missing"),
    ({"image": "../a.jpg", "expression": "x"}, "leads out of"), ({"image": "/etc/passwd", "expression": "x"}, "leads out of"),
    ({"image": "photos/../../a.jpg", "expression": "x"}, "leads out of"), ({"image": "C:\\a.jpg", "expression": "x"}, "leads out of"),
    ({"image": "photos/a.jpg", "expression": "x", "mask": "..\\m.png"}, "leads out of"), ({"image": "photos/a.jpg", "expression": "x", "mask": "masks/z.png"}, "z.png is missing"),
    ({"image": "photos/a.jpg", "expression": "x", "annotation": 8}, "no annotation 8"), ({"image": "photos/a.jpg", "expression": "x", "annotation": 7}, "is of b.jpg"),
    ({"image": "photos/a.jpg", "expression": "x", "annotation": [1]}, "annotation"), ({"image": "photos/a.jpg", "expression": "x", "split": "dev"}, "'dev' is none of train"),
    ({"image": "photos/a.jpg", "expression": "x", "annotation": 7, "mask": "masks/a.png"}, "keep one"), ({"image": "photos/a.jpg", "expresion": "x"}, "expresion"),
    ({"image": "photos/a.jpg", "expression": "x", "mask": "masks/turned.png"}, "48 x 64"), ({"image": "masks", "expression": "x"}, "masks"),
    ({"image": "annotations.json", "expression": "x"}, "no readable image"), ({"image": 5, "expression": "x"}, "path"), ({"image": "a\0b", "expression": "x"}, "leads out of"),
    ({"image": "photos/a.jpg", "expression": "x", "mask": "masks/a.png", "split": "val"}, "'train' above")])
def test_a_bad_line_is_named(own, line, said):
    Image.new("L", (48, 64)).save(own / "masks/turned.png")
    write(own, {"image": "photos/a.jpg", "mask": "masks/a.png", "expression": "fine"}, "", line)
    with pytest.raises(RISError) as info: FolderData(own)
    message = one_line(info)
    assert message.startswith(f"{own / 'expressions.jsonl'}, line 3: ") and said in message


def test_bytes_that_are_no_text(own):
    (own / "expressions.jsonl").write_bytes(b'{"image": "photos/a.jpg", "expression": "\xff"}')
    with pytest.raises(RISError, match="line 1: not JSON in UTF-8"): FolderData(own)


@pytest.mark.parametrize("mode, value", [("1", 1), ("L", 1), ("L", 255), ("P", 1), ("RGB", (9, 0, 0)), ("RGBA", (0, 9, 0, 255)), ("LA", (200, 255)), ("I;16", 300)])
def test_masks_of_every_kind_of_png(own, mode, value):
    mask = Image.new(mode, (64, 48))
    if mode == "P": mask.putpalette([0, 0, 0, 128, 0, 0])
    mask.paste(value, (10, 8, 30, 28)) if mode != "I;16" else None
    if mode == "I;16":
        deep = np.zeros((48, 64), np.uint16)
        deep[8:28, 10:30] = value
        mask = Image.fromarray(deep)
    mask.save(own / "masks/a.png")
    referral, = FolderData(write(own, {"image": "photos/a.jpg", "expression": "x", "mask": "masks/a.png"})).referrals("train")
    assert referral.mask().sum() == 400 and referral.mask().dtype == bool and referral.mask()[8, 10]


def test_masks_that_say_nothing(own):
    line = {"image": "photos/a.jpg", "expression": "x", "mask": "masks/a.png"}
    Image.new("L", (64, 48)).save(own / "masks/a.png")
    referral, = FolderData(write(own, line)).referrals("train")
    with pytest.raises(RISError, match="black all over"): referral.mask()
    assert "black all over" in check_data(own)[0]["problems"][0]
    noise = np.random.default_rng(0).integers(0, 255, (48, 64), dtype=np.uint8)
    Image.fromarray(noise).save(own / "masks/a.png")
    whole = (own / "masks/a.png").read_bytes()
    (own / "masks/a.png").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(RISError, match="broken off"): referral.mask()


def test_bad_annotations_of_ones_own(own):
    line = {"image": "photos/b.jpg", "expression": "x", "annotation": 7}
    for text in ("{", '{"images": 5}', "[]", '{"images": [], "annotations": [{}]}'):
        (own / "annotations.json").write_text(text)
        with pytest.raises(RISError, match="annotations.json"): FolderData(write(own, line))
    (own / "annotations.json").unlink()
    with pytest.raises(RISError, match="line 1: .*annotations.json is missing"): FolderData(write(own, line))


# ---- real samples

TABLE = [("refcoco", "unc", "train", 27, 36, 588984), ("refcoco", "unc", "val", 16, 45, 486108), ("refcoco", "unc", "testA", 6, 18, 229898),
         ("refcoco", "unc", "testB", 12, 34, 357999), ("refcoco+", "unc", "val", 16, 46, 486108), ("refcoco+", "unc", "testA", 6, 15, 229898),
         ("refcoco+", "unc", "testB", 12, 35, 357999), ("refcocog", "google", "val", 22, 22, 592791), ("refcocog", "umd", "val", 14, 26, 356944),
         ("refcocog", "umd", "test", 1, 1, 10840)]


@needs_samples
def test_samples_match_the_refer_toolbox():
    rows = check_data(SHARED / "mini_refcoco")
    assert [tuple(r[k] for k in ("dataset", "split_by", "split", "refs", "sentences", "mask_pixels")) for r in rows] == TABLE
    assert not any(r["problems"] for r in rows)


@needs_samples
def test_samples_load_as_pickle_loads_them_and_test_means_testa_and_testb():
    for path in SHARED.glob("mini_refcoco*/*/refs(*).p"):
        assert load_plain_pickle(path) == pickle.loads(path.read_bytes(), encoding="latin1")
    assert len(open_data(SHARED / "mini_refcoco", "refcoco").referrals("test")) == 6 + 12


@needs_samples
def test_pairs_without_masks():
    rows = check_data(SHARED / "mini_refcoco_text")
    assert all(r["mask_pixels"] == 0 and not r["problems"] for r in rows)
    google, unc = (open_data(SHARED / "mini_refcoco_text", *which).referrals("val") for which in (("refcocog", "google"), ("refcoco", "unc")))
    referrals = google + unc
    assert not any(r.has_mask for r in referrals) and all(r.bbox is None for r in google) and any(r.bbox for r in unc)
    assert all(s.text for r in referrals for s in r.sentences)


# ---- a folder of one's own: several things, and none

def test_several_things_and_none_in_a_folder(own):
    other = np.zeros((48, 64), np.uint8)
    other[0:8, 40:50] = 9
    Image.fromarray(other).save(own / "masks/b.png")
    coco = json.loads((own / "annotations.json").read_text())
    coco["annotations"].append({"id": "8", "image_id": 5, "category_id": 1, "bbox": [20, 2, 5, 6], "segmentation": [square(20, 2, 5)]})
    (own / "annotations.json").write_text(json.dumps(coco))
    a, b = {"image": "photos/a.jpg"}, {"image": "photos/b.jpg"}
    data = FolderData(write(own, a | {"expression": "both", "mask": ["masks/a.png", "masks/b.png"]}, a | {"expression": "the two", "mask": ["masks/b.png", "masks/a.png"]},
                            a | {"expression": "just one", "mask": ["masks/a.png"]}, a | {"expression": "it", "mask": "masks/a.png"},
                            b | {"expression": "the mugs", "annotation": [7, "8"]}, b | {"expression": "the kite", "annotation": []},
                            a | {"expression": "the kite", "mask": [], "split": "val"}, a | {"expression": "the bird", "mask": []}, a | {"expression": "who knows", "mask": None}))
    both, one, mugs, kite, bird, unknown = data.referrals("train")
    assert [[s.text for s in r.sentences] for r in (both, one)] == [["both", "the two"], ["just one", "it"]]
    assert both.mask().sum() == both.area() == 480 and one.mask().sum() == 400 and both.size == (48, 64)
    assert mugs.mask().sum() == mugs.area() > 100 and mugs.category == "mug" and mugs.bbox == (1, 2, 24, 6)
    none, = data.referrals("val")
    for r in (kite, bird, none):
        assert r.absent and r.has_mask and r.mask().shape == (48, 64) and not r.mask().any() and r.area() == 0 and r.bbox is None
    assert not unknown.has_mask and not unknown.absent
    assert [r.sentences[0].kind for r in (both, one, mugs, kite, unknown)] == ["many", "one", "many", "none", ""]
    row, _ = check_data(own)
    assert row["problems"] == [] and "referrals have no mask; the first: referral 6 in a.jpg" in row["warnings"][-1]


@pytest.mark.parametrize("more, said", [
    ({"mask": False}, "its mask is no path"), ({"mask": [[]]}, "its mask is no path"), ({"mask": 3}, "its mask is no path"), ({"annotation": [None]}, "its annotation is no id"),
    ({"mask": ["masks/a.png", "masks/a.png"]}, "lists the same thing twice"), ({"mask": ["masks/a.png", "masks/c.png"]}, "c.png is missing"),
    ({"mask": ["masks/a.png", "masks/half.png"]}, "the mask is 32 x 24, a.jpg is 64 x 48"), ({"mask": [], "annotation": []}, "keep one"), ({"annotation": [7, 7]}, "twice")])
def test_bad_lists_of_things(own, more, said):
    Image.new("L", (32, 24), 255).save(own / "masks/half.png")
    with pytest.raises(RISError) as info: FolderData(write(own, {"image": "photos/a.jpg", "expression": "x"} | more))
    assert one_line(info).startswith(f"{own / 'expressions.jsonl'}, line 1: ") and said in one_line(info)


def test_what_a_check_says_of_sentences_about_nothing(own):
    a = {"image": "photos/a.jpg"}
    write(own, a | {"expression": "the mug", "mask": "masks/a.png"}, a | {"expression": "The mug.", "mask": []}, a | {"expression": "the kite", "mask": []}, a | {"expression": "the kite", "mask": []})
    row, = check_data(own)
    assert row["problems"] == [] and row["warnings"] == [
        "1 of 4 expressions stand for a thing and for nothing in one photo; the first: 'The mug.' for referrals 0 and 1 in a.jpg; drop one of the two lines"]
    Image.new("L", (64, 48)).save(own / "masks/a.png")     # painted black where "mask": [] was meant
    assert '"mask": [] says that a sentence fits nothing' in check_data(own)[0]["problems"][0]


def test_a_pack_of_several_things_and_none(own, tmp_path, monkeypatch):
    other = np.zeros((48, 64), np.uint8)
    other[0:16, 40:56] = 9
    Image.fromarray(other).save(own / "masks/b.png")
    a = {"image": "photos/a.jpg"}
    lines = a | {"expression": "both", "mask": ["masks/a.png", "masks/b.png"]}, a | {"expression": "the kite", "mask": []}
    referrals, transform = FolderData(write(own, *lines)).referrals("train"), Transform(32)
    pack = Pack(write_pack(referrals, own, 32, tmp_path / "own.pack"), own)
    for referral in referrals: assert torch.equal(pack.mask(referral), transform.mask(referral.mask()))
    pack.check(referrals, transform)
    with monkeypatch.context() as patch:   # once checked, no mask's key is made again
        patch.setattr(pack_module, "mask_key", None)
        for referral in referrals: assert torch.equal(pack.mask(referral), transform.mask(referral.mask()))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64), dtype=np.uint8)).save(own / "masks/b.png")     # another file: the pack is stale
    with pytest.raises(RISError, match="lacks referral 0 of a.jpg"): pack.check(referrals, transform)
