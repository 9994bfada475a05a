"""RefShapes: the same everywhere, nothing said in vain, nothing of testC in train, no half data set that looks whole."""
import errno
import hashlib
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ris_nb.contract import RISError
from ris_nb.data import writer
from ris_nb.data.shapes import (COLOURS, FLAVOURS, HELD_OUT, ROUND, SHAPES, SIZES, SPLITS, Thing, beats, denote, is_minimal, make_scene,
                                referent, say, shorter, stencil)
from ris_nb.data.speaker import KINDS, refer
from ris_nb.data.writer import make_refshapes

# If one of these changes, every score on RefShapes refers to other data: raise _VERSION and say so in the changelog.
FINGERPRINTS = {("train", 64): "f13985963e07bc58", ("testC", 64): "00101290778b1b31", ("val", 100): "60635f59cd41f593"}


def fingerprint(split, size, count=20):
    digest = hashlib.sha256()
    for index in range(count):
        scene = make_scene(0, size, split, index)
        digest.update(scene.image.tobytes() + np.packbits(scene.masks).tobytes())
        for flavour in FLAVOURS:
            digest.update(json.dumps([(e.text, e.referent, e.kind) for e in refer(scene, flavour)]).encode())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("split, size", FINGERPRINTS)
def test_pixels_masks_and_words_are_the_same_everywhere(split, size):
    assert fingerprint(split, size) == FINGERPRINTS[split, size]


def test_a_scene_depends_on_nothing_but_its_key():
    alone = make_scene(5, index=17)
    with ThreadPoolExecutor(4) as pool:
        crowd = list(pool.map(lambda i: make_scene(5, index=i), range(40)))
    assert (crowd[17].image == alone.image).all() and crowd[17].things == alone.things
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    refer(make_scene(5, index=18))
    assert (np.random.get_state()[1] == state).all()      # the global generator is left alone
    for other in (dict(seed=6), dict(split="val"), dict(index=18)):
        assert make_scene(**{"seed": 5, "index": 17, **other}).things != alone.things


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_each_expression_has_one_referent_and_no_idle_word(flavour):
    kinds = set()
    for index in range(120):
        scene = make_scene(11, index=index)
        expressions = refer(scene, flavour)
        for e in expressions:
            assert referent(e.phrase, scene.things) is scene.things[e.referent], e
            assert is_minimal(e.phrase, scene.things), e
            assert len(e.text.split()) <= 18
        assert len({(e.text, e.referent) for e in expressions}) == len(expressions)
        assert all(sum(e.referent == t for e in expressions) <= 3 for t in range(len(scene.things)))
        kinds |= {e.kind for e in expressions}
    assert kinds == {"refshapes": {*KINDS} - {"nested"}, "refshapes+": {*KINDS} - {"nested"}, "refshapesg": {*KINDS} - {"superlative"}}[flavour]


def test_no_subset_of_modifiers_can_be_dropped():
    def all_shorter(phrase):
        for less in shorter(phrase):
            yield less
            yield from all_shorter(less)
    for index in range(30):
        scene = make_scene(12, index=index)
        for e in refer(scene, FLAVOURS[index % 3]):
            assert all(denote(less, scene.things) != [scene.things[e.referent]] for less in all_shorter(e.phrase)), e


def test_the_text_says_what_the_phrase_means():
    scene = make_scene(0, index=3)
    for e in refer(scene):
        same = {say(e.phrase, lambda sides, bits=bits: next(bits)) for bits in map(iter, np.ndindex(*[2] * 6))}
        assert e.text in same


def test_kinds_come_in_the_shares_of_the_flavour():
    found = [e.kind for index in range(300) for e in refer(make_scene(0, index=index))]
    assert np.allclose([found.count(kind) / len(found) for kind in KINDS], (0.45, 0.35, 0.20, 0), atol=0.06)
    long = [e.kind for index in range(300) for e in refer(make_scene(0, index=index), "refshapesg")]
    assert long.count("relation") + long.count("nested") > 0.85 * len(long) and long.count("nested") > 0.2 * len(long)


def test_held_out_pairs_are_seen_in_testc_only():
    for split in SPLITS:
        for index in range(200):
            scene = make_scene(0, split=split, index=index)
            pairs = [(t.colour, t.shape) for t in scene.things]
            if split == "testC":
                assert set(pairs) & set(HELD_OUT)
                assert all(pairs[e.referent] in HELD_OUT for e in refer(scene))
            else:
                assert not set(pairs) & set(HELD_OUT)
    assert {c for c, _ in HELD_OUT} < set(COLOURS) and {s for _, s in HELD_OUT} == set(SHAPES)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_round_referents_in_testa_and_angular_ones_in_testb(flavour):
    for split, wanted in (("testA", True), ("testB", False)):
        for index in range(60):
            scene = make_scene(0, split=split, index=index)
            assert all((scene.things[e.referent].shape in ROUND) == wanted for e in refer(scene, flavour))


@pytest.mark.parametrize("size", [64, 65, 97, 224, 480])
def test_any_size_draws_the_same_scene(size):
    for index in range(8):
        small, scene = make_scene(2, index=index), make_scene(2, size, index=index)
        assert scene.things == small.things and scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
        assert scene.masks.shape == (len(scene.things), size, size) and scene.masks.sum(0).max() == 1
        assert [e.text for e in refer(scene)] == [e.text for e in refer(small)]
        shares, small_shares = scene.masks.mean((1, 2)), small.masks.mean((1, 2))
        assert np.allclose(shares, small_shares, rtol=0.3) and (scene.masks.sum((1, 2)) > 0).all()


def test_everything_is_visible_and_inside_the_frame():
    for index in range(200):
        scene = make_scene(4, index=index)
        for thing, mask in zip(scene.things, scene.masks):
            assert mask.sum() >= 0.6 * stencil(thing.shape, thing.radius).sum()
            assert thing.radius < min(thing.x, thing.y) and max(thing.x, thing.y) + thing.radius < 63
        assert 4 <= len(scene.things) <= 8


def test_nothing_is_large_to_some_and_small_to_others():
    radii = {size: range(least, greatest + 1) for size, (least, greatest) in SIZES.items()}
    things = [Thing("star", "red", size, 32, 32, r, (0, 0, 0)) for size in radii for r in radii[size]]
    for a in things:
        for b in things:
            assert beats("large", a, b) == ((a.size, b.size) == ("large", "small")) == beats("small", b, a)
    drawn = {(t.size, t.radius) for index in range(100) for t in make_scene(6, index=index).things}
    assert drawn == {(size, r) for size in radii for r in radii[size]}


def test_few_things_are_more_common_than_many():
    counts = np.bincount([len(make_scene(7, index=index).things) for index in range(400)], minlength=9)
    assert counts[:4].sum() == 0 and counts[4] > counts[5] > counts[6] > counts[7]


@pytest.mark.parametrize("arguments", [dict(size=63), dict(size=4097), dict(split="dev"), dict(seed=-1), dict(seed=2 ** 32), dict(index=-1)])
def test_bad_arguments_are_named(arguments):
    with pytest.raises(RISError):
        make_scene(**{"seed": 0, **arguments})


def test_the_written_root_holds_what_the_generator_makes(tmp_path):
    root = make_refshapes(tmp_path, "refshapesg", {"val": 4, "testC": 6}, seed=9)
    folder = root / "refshapesg"
    refs = pickle.loads((folder / "refs(generated).p").read_bytes())
    instances = json.loads((folder / "instances.json").read_text())
    assert len(instances["images"]) == 10 and [c["name"] for c in instances["categories"]] == list(SHAPES)
    annotations = {a["id"]: a for a in instances["annotations"]}
    assert len(annotations) == len(instances["annotations"])
    said = {(r["file_name"], s["raw"]) for r in refs for s in r["sentences"]}
    made = {(f"{split}_{i:06d}.png", e.text) for split, n in (("val", 4), ("testC", 6)) for i in range(n)
            for e in refer(make_scene(9, split=split, index=i), "refshapesg")}
    assert said == made
    ids = [s["sent_id"] for r in refs for s in r["sentences"]]
    assert len(set(ids)) == len(ids) == sum(len(r["sent_ids"]) for r in refs) and len({r["ref_id"] for r in refs}) == len(refs)
    for ref in refs:
        annotation = annotations[ref["ann_id"]]
        assert (annotation["image_id"], annotation["category_id"]) == (ref["image_id"], ref["category_id"])
    picture = np.asarray(Image.open(root / "images" / "refshapesg" / "testC_000005.png"))
    assert (picture == make_scene(9, split="testC", index=5).image).all()


def test_an_interrupted_set_is_no_set_and_is_made_anew(tmp_path, monkeypatch):
    whole, counts = make_refshapes(tmp_path / "whole", counts={"train": 8}), {"train": 8}
    root = tmp_path / "broken"

    def stop_at_five(seed, size, split, index):
        if index == 5:
            raise KeyboardInterrupt
        return make_scene(seed, size, split, index)

    monkeypatch.setattr(writer, "make_scene", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        make_refshapes(root, counts=counts)
    assert not (root / "refshapes" / "refs(generated).p").exists()
    monkeypatch.undo()
    make_refshapes(root, counts=counts)
    for name in ("refs(generated).p", "instances.json", "generated.json"):
        assert (root / "refshapes" / name).read_bytes() == (whole / "refshapes" / name).read_bytes()


@pytest.mark.parametrize("victim", ["instances.json", "generated.json", "refs(generated).p"])
def test_a_full_disk_is_one_line_and_leaves_no_set(tmp_path, monkeypatch, victim):
    write_bytes = Path.write_bytes

    def full(path, data):
        if victim in path.name:
            write_bytes(path, data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RISError, match="No space left") as caught:
        make_refshapes(tmp_path, counts={"val": 2})
    assert "\n" not in str(caught.value)
    assert {p.name for p in (tmp_path / "refshapes").iterdir()} <= {"instances.json", "generated.json"}
    monkeypatch.undo()
    make_refshapes(tmp_path, counts={"val": 2})
    assert (tmp_path / "refshapes" / "refs(generated).p").exists()


def test_another_set_is_never_overwritten(tmp_path):
    make_refshapes(tmp_path, counts={"val": 2}, seed=1)
    refs = tmp_path / "refshapes" / "refs(generated).p"
    content = refs.read_bytes()
    for other in (dict(seed=2), dict(seed=1, size=65)):
        with pytest.raises(RISError, match="another root or delete"):
            make_refshapes(tmp_path, counts={"val": 2}, **other)
    (tmp_path / "refshapes" / "generated.json").write_text("{")
    with pytest.raises(RISError, match="another root or delete"):
        make_refshapes(tmp_path, counts={"val": 2}, seed=1)
    assert refs.read_bytes() == content
    make_refshapes(tmp_path, "refshapes+", counts={"val": 2})      # another flavour in the same root is welcome
