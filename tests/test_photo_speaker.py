"""Sentences for annotated photos: a listener with its own geometry and colours arrives at the same things; crowds, mirrors, seeds, folders."""
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from ris_nb.contract import RISError
from ris_nb.data.check import check_data
from ris_nb.data.folder import FolderData
from ris_nb.data.photo_phrases import Instance
from ris_nb.data.photo_speaker import STYLES, describe_folder, describe_instances, mirror_sentence
from ris_nb.data.sources import find_root

sys.path.append(str(Path(__file__).parent / "reference"))
from photo_listener import listen  # noqa: E402

PAINTS = {"red": (200, 30, 30), "blue": (30, 60, 200), "white": (240, 240, 240), "green": (30, 150, 50), "black": (20, 20, 22), "grey": (120, 120, 120)}
KINDS = ("person", "car", "dog", "couch", "cup", "bottle", "bicycle", "motorcycle", "horse", "dining table", "widget")


def photo(*boxes, crowds=()):
    """A picture of 160 x 100 with boxes (category, paint, left, top, width, height), and its instances."""
    image, things = np.full((100, 160, 3), 125, np.uint8), []
    for number, (category, paint, x, y, w, h) in enumerate(boxes):
        mask = np.zeros((100, 160), bool)
        mask[y:y + h, x:x + w] = True
        image[mask] = PAINTS[paint]
        things.append(Instance(category, mask, number in crowds))
    return things, image


def random_photo(seed, crowd=False):
    rng = np.random.default_rng(seed)
    kinds = rng.choice(KINDS, 3, replace=False).tolist()
    boxes = [(kinds[rng.integers(3)], list(PAINTS)[rng.integers(6)], *rng.integers(0, (120, 50)).tolist(), *rng.integers(10, (40, 50)).tolist())
             for _ in range(rng.integers(2, 8))]
    return photo(*boxes, crowds=(0,) if crowd else ())


def checked(things, image, seed, **more):
    found = describe_instances(things, image, seed, several=2, none=2, **more)
    for d in found:
        assert listen(d.phrase, things, image) == set(d.referents), d
        assert len(d.referents) == {"none": 0, "several": max(2, len(d.referents))}.get(d.kind, 1), d
        assert len(d.text.split()) <= 18 and d.text == d.text.strip() and "  " not in d.text
    return found


@pytest.mark.parametrize("crowd", [False, True])
def test_a_second_listener_finds_the_same_things(crowd):
    kinds = {d.kind for seed in range(50) for d in checked(*random_photo(seed, crowd), seed)}
    assert kinds >= {"name", "colour", "place", "order", "size", "relation", "mixed", "bare", "several", "none"}


@pytest.mark.slow
def test_a_second_listener_finds_the_same_things_in_photographs():
    root = find_root("refphotos")
    content = json.loads((root / "annotations.json").read_text(encoding="utf-8"))
    names, count = {c["id"]: c["name"] for c in content["categories"]}, 0
    for image in content["images"]:
        marks = [a for a in content["annotations"] if a["image_id"] == image["id"] and names[a["category_id"]] not in ("part", "other")]
        things = [Instance(names[a["category_id"]], a["segmentation"]) for a in marks]
        if len(things) < 25:
            count += len(checked(things, np.asarray(Image.open(root / image["file_name"]).convert("RGB")), image["id"]))
    assert count > 600


def test_near_ties_are_never_said():
    for gap in range(0, 40, 4):     # two cups side by side, ever further apart
        things, image = photo(("cup", "grey", 40, 40, 14, 14), ("cup", "grey", 54 + gap, 40, 14, 14))
        said = [d for seed in range(3) for d in checked(things, image, seed)]
        assert {d.kind for d in said} & {"size", "depth", "colour", "name"} == set()
    one, other = (photo(("car", "grey", 5, 10, 30, 20), ("car", "grey", 100, 10, 30, h)) for h in (24, 60))
    assert not [d for s in range(9) for d in checked(*one, s) if d.kind == "size"] and [d for s in range(9) for d in checked(*other, s) if d.kind == "size"]


def test_crowds_silence_what_they_might_be():
    boxes = [("person", "grey", 5, 20, 15, 50), ("person", "grey", 70, 20, 15, 50), ("person", "grey", 0, 10, 50, 80)]
    free, crowded = (photo(*boxes[:2]), photo(*boxes, crowds=(2,)))
    left = [{d.referents for s in range(12) for d in checked(things, image, s) if "left" in d.text.split()[:2]} for things, image in (free, crowded)]
    assert (0,) in left[0] and (0,) not in left[1]
    for s in range(12):
        assert not any(2 in d.referents or d.kind == "name" or "two" in d.text or "both" in d.text for d in checked(*crowded, s) if d.kind != "none")


def test_a_tiny_thing_is_a_rival_and_gets_no_sentence():
    things, image = photo(("dog", "white", 20, 20, 50, 50), ("dog", "grey", 150, 5, 3, 3))
    said = [d for s in range(12) for d in checked(things, image, s)]
    assert {d.referents for d in said if d.kind != "none"} == {(0,)} and "the dog" not in {d.text for d in said}


def test_words_that_mean_two_categories():
    things, image = photo(("bicycle", "grey", 10, 30, 40, 40), ("motorcycle", "grey", 100, 30, 40, 40))
    texts = {d.text for s in range(30) for d in checked(things, image, s)}
    assert "the bicycle" in texts and not texts & {"bike", "the bike"}
    assert any("widget" in d.text for s in range(9) for d in describe_instances(*photo(("Widget", "red", 10, 10, 30, 30)), s))
    named = {d.text for s in range(9) for d in describe_instances(*photo(("widget", "red", 10, 10, 30, 30)), s, names={"widget": ("gadget",)})}
    assert "the gadget" in named and not any("widget" in text for text in named)


def test_no_guess_about_people():
    words = {w for seed in range(150) for d in describe_instances(*random_photo(seed), seed, most=5, several=2, none=2) for w in d.text.split()}
    assert "person" in words and not words & set("man woman boy girl guy lady he she his her".split())


def test_styles_seeds_and_bad_input():
    things, image = random_photo(3)
    assert describe_instances(things, image, (1, 2)) == describe_instances(things, Image.fromarray(image), (1, 2))
    texts = {style: {d.text for s in range(8) for d in describe_instances(things, image, s, style=style)} for style in STYLES}
    assert all(text.startswith("the ") for text in texts["plain"] | texts["long"]) and not any(text.startswith("the ") for text in texts["short"])
    assert describe_instances([], image) == [] and {d.kind for d in describe_instances([], image, none=3)} == {"none"}
    with pytest.raises(RISError, match="no style 'loud'"):
        describe_instances(things, image, style="loud")
    with pytest.raises(RISError, match="does not fit its photo of 50 x 50"):
        describe_instances(things, image[:50, :50])


def test_masks_may_be_polygons_or_runs():
    things, image = random_photo(5)
    runs = [Instance(t.category, coco_mask.encode(np.asfortranarray(t.segmentation.astype(np.uint8)))) for t in things]
    assert describe_instances(runs, image, 4) == describe_instances(things, image, 4)


def mirrored(p):
    turn = lambda word: word and mirror_sentence(word)
    relation = p.relation and (turn(p.relation[0]), mirrored(p.relation[1]))
    return p._replace(place=turn(p.place), which=turn(p.which), relation=relation, other=p.other and mirrored(p.other))


def test_a_mirrored_sentence_fits_the_mirrored_photo():
    sides = 0
    for seed in range(20):
        things, image = random_photo(seed)
        flipped = [Instance(t.category, t.segmentation[:, ::-1]) for t in things], np.ascontiguousarray(image[:, ::-1])
        for d in checked(things, image, seed):
            assert listen(mirrored(d.phrase), *flipped) == set(d.referents), d
            assert mirror_sentence(mirror_sentence(d.text)) == d.text
            sides += mirror_sentence(d.text) != d.text
            assert bool(re.search(r"left|right", d.text)) == (mirror_sentence(d.text) != d.text)
    assert sides > 50


def make_folder(root, photos="photos/"):
    content = dict(images=[], annotations=[], categories=[dict(id=k, name=name) for k, name in enumerate(KINDS)])
    for i in range(8):
        things, image = random_photo(i, crowd=i == 0)
        (root / photos).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image + np.uint8(i)).resize((320, 200)).save(root / photos / f"{i}.png")    # stored twice as large as annotated
        content["images"].append(dict(id=100 + i, file_name=f"{i}.png", width=160, height=100))
        for k, t in enumerate(things):
            rle = coco_mask.encode(np.asfortranarray(t.segmentation.astype(np.uint8)))
            content["annotations"].append(dict(id=100 * i + k + 1, image_id=100 + i, category_id=KINDS.index(t.category), iscrowd=int(t.crowd),
                                               segmentation={**rle, "counts": rle["counts"].decode()}))
    (root / "annotations.json").write_text(json.dumps(content), encoding="utf-8")


def test_a_folder_with_masks_and_names_is_enough(tmp_path):
    make_folder(tmp_path)
    counts = describe_folder(tmp_path, several=2, none=2, val=0.25)
    lines = [json.loads(line) for line in (tmp_path / "expressions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum(counts.values()) == len(lines) > 50 and {line["kind"] for line in lines} == set(counts)
    assert len({line["image"] for line in lines if line["split"] == "val"}) == 2
    data = FolderData(tmp_path)
    referrals = [r for split in data.splits for r in data.referrals(split)]
    assert data.splits == ["train", "val"] and all(r.mask().any() != r.absent for r in referrals)
    assert not [problem for row in check_data(tmp_path) for problem in row["problems"]]
    assert not [w for row in check_data(tmp_path) for w in row["warnings"] if "two" in w], "a sentence stands for two things"


def test_a_folder_says_what_is_wrong(tmp_path):
    with pytest.raises(RISError, match="annotations.json"):
        describe_folder(tmp_path)
    make_folder(tmp_path)
    first = describe_folder(tmp_path)
    with pytest.raises(RISError, match="is there already"):
        describe_folder(tmp_path)
    kept = (tmp_path / "expressions.jsonl").read_bytes()
    assert describe_folder(tmp_path, force=True) == first and (tmp_path / "expressions.jsonl").read_bytes() == kept
    (tmp_path / "photos" / "3.png").unlink()
    with pytest.raises(RISError, match="names 3.png, which is not in"):
        describe_folder(tmp_path, force=True)
    (tmp_path / "annotations.json").write_text('{"images": [], "annotations": [{"id": 1}], "categories": []}', encoding="utf-8")
    (tmp_path / "annotations.json").write_text('{"images": [], "annotations": [{"id": 1, "segmentation": [[1]]}], "categories": []}', encoding="utf-8")
    with pytest.raises(RISError, match="is not in COCO format"):
        describe_folder(tmp_path, force=True)
    assert (tmp_path / "expressions.jsonl").read_bytes() == kept
