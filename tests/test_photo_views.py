"""Views of photos: masks that follow cuts and mirrors, a folder that is the same for a seed, and photos that must never be used."""
import json
import pickle
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from PIL import Image

from ris_nb.contract import RISError
from ris_nb.data.folder import FolderData
from ris_nb.data.photo_phrases import Instance
from ris_nb.data.photo_speaker import mirror_sentence
from ris_nb.data.photo_views import View, ViewWriter, _cut, cut, described, random_mosaic, zoomed
from ris_nb.data.view_folders import ViewCounts, _boxed, _Coco, _find_referrals, make_views
from ris_nb.training.outlines import BoxMask, FolderBoxes, outline_boxes

KINDS = ("person", "car", "dog")
FEW = ViewCounts(passes=1, mosaics=0.5, zooms=2, box_zooms=2, val=2)


def drawn(seed, width=160, height=100):
    """A photo of boxes in plain colours, and its instances."""
    rng = np.random.default_rng(seed)
    image, things = np.full((height, width, 3), 125, np.uint8), []
    for k in range(3):
        mask = np.zeros((height, width), bool)
        x, y = 5 + 50 * k, rng.integers(5, 40)
        mask[y:y + rng.integers(20, 50), x:x + rng.integers(15, 40)] = True
        image[mask] = rng.integers(0, 255, 3)
        things.append(Instance(KINDS[rng.integers(3)], mask))
    return View(Image.fromarray(image), things, [1.0] * 3)


def polygon(mask):
    y, x = mask.nonzero()
    left, top, right, bottom = (float(v) for v in (x.min(), y.min(), x.max() + 1, y.max() + 1))
    return [[left, top, right, top, right, bottom, left, bottom]]


def write_coco(root, ids):
    """A COCO file with drawn photos; ids of annotations are 10 times the photo's and more."""
    content = dict(images=[], annotations=[], categories=[dict(id=k, name=name) for k, name in enumerate(KINDS)])
    (root / "photos").mkdir(parents=True)
    for id in ids:
        view = drawn(id)
        view.image.save(root / "photos" / f"{id}.png")
        content["images"].append(dict(id=id, file_name=f"photos/{id}.png", width=160, height=100, license=4 if id % 2 else 3))
        content["annotations"] += [dict(id=10 * id + k, image_id=id, category_id=KINDS.index(t.category), segmentation=polygon(t.segmentation))
                                   for k, t in enumerate(view.instances)]
    (root / "annotations.json").write_text(json.dumps(content))
    return root


def write_people(root, splits):
    """A folder with a sentence for each thing, and one for nothing, in the split of its photo."""
    write_coco(root, splits)
    lines = [dict(image=f"photos/{id}.png", expression=f"thing {k} of {id}, left", annotation=10 * id + k, kind="appearance", split=split)
             for id, split in splits.items() for k in range(3)]
    lines += [dict(image=f"photos/{id}.png", expression=f"nothing in {id}", mask=[], kind="none", split=split) for id, split in splits.items()]
    (root / "expressions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def write_refer(root, splits, name="refcoco", split_by="unc"):
    """A REFER set with boxes and no masks: a ref for the first thing of each photo; photos are stored at half their width."""
    folder = root / "images/mscoco/images/train2014"
    folder.mkdir(parents=True, exist_ok=True)
    (root / name).mkdir(exist_ok=True)
    refs, file = [], root / name / "instances.json"
    content = json.loads(file.read_text()) if file.exists() else dict(images=[], annotations=[], categories=[])
    for number, (id, split) in enumerate(splits.items()):
        drawn(id).image.resize((80, 100)).save(folder / f"{id}.jpg")
        content["images"].append(dict(id=id, file_name=f"{id}.jpg", width=160, height=100))
        content["annotations"].append(dict(id=10 * id, image_id=id, category_id=0, segmentation=[], bbox=[20, 10, 40, 60]))
        refs.append(dict(ref_id=number, ann_id=10 * id, category_id=0, image_id=id, split=split, sentences=[
            dict(sent=f"the {name} box of {id}", raw=f"the {name} box of {id}", sent_id=2 * number), dict(sent="left", raw="left", sent_id=2 * number + 1)]))
    file.write_text(json.dumps(content))
    (root / name / f"refs({split_by}).p").write_bytes(pickle.dumps(refs, 2))
    return root


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def said(folder):
    return [json.loads(line) for line in (folder / "expressions.jsonl").read_text().splitlines()]


def test_masks_follow_cut_and_mirror():
    for seed in range(10):
        view = drawn(seed)
        box, size = (0.1, 0.2, 0.7, 1.0), (96, 80)
        (part, kept), mirrored = _cut(view, box, size, False), cut(view, box, size, True)
        assert kept == [n for n, t in enumerate(view.instances) if t.segmentation[20:, 16:112].sum() >= 4]
        assert np.array_equal(np.asarray(mirrored.image), np.asarray(part.image)[:, ::-1])
        for n, one, other, share in zip(kept, part.instances, mirrored.instances, part.visible, strict=True):
            whole = view.instances[n].segmentation
            assert np.array_equal(one.segmentation, whole[20:, 16:112]) and np.array_equal(other.segmentation, one.segmentation[:, ::-1])
            assert share == pytest.approx(whole[20:, 16:112].sum() / whole.sum())
        again = cut(part, (0, 0, 0.5, 1), (48, 80))
        assert all(share <= max(part.visible) for share in again.visible)


def test_what_is_hardly_seen_is_not_spoken_of():
    view = drawn(1)
    view.visible[:] = [0.1, 1.0, 0.1]
    sentences = [s for seed in range(20) for s in described(view, random.Random(seed), KINDS)]
    assert sentences and {i for _, meant, _ in sentences for i in meant} == {1}


def test_mosaics_keep_every_mask_at_its_picture():
    for seed in range(10):
        views = [replace(drawn(k), image=Image.new("RGB", (160, 100), (60 * k + 10,) * 3)) for k in range(4)]
        mosaic = random_mosaic(views, random.Random(seed))
        pixels, names = np.asarray(mosaic.image)[..., 0], [t.category for view in views for t in view.instances]
        assert max(mosaic.image.size) == 400 and len(mosaic.instances) == len(mosaic.visible) <= len(names)
        for thing in mosaic.instances:      # all of a mask lies on one tile
            assert np.ptp(pixels[thing.segmentation]) == 0


def test_zooms_keep_what_people_speak_of():
    turned = 0
    for seed in range(30):
        view = drawn(seed)
        sentences = [("the left one", (0,), "place"), ("Right, rightmost", (2, 1), "several"), ("none", (), "none")]
        zoom, found = zoomed(view, sentences, random.Random(seed))
        assert [view.instances[a].category for _, m, _ in sentences for a in m] == [zoom.instances[a].category for _, m, _ in found for a in m]
        assert min(zoom.visible) > 0.97
        mirrored = found[0][0] == "the right one"
        assert [text for text, _, _ in found] == [mirror_sentence(t) if mirrored else t for t, _, _ in sentences]
        middle = lambda v, k: v.instances[k].segmentation.nonzero()[1].mean()
        assert (middle(zoom, found[0][1][0]) > middle(zoom, found[1][1][0])) == mirrored
        turned += mirrored
    assert 5 < turned < 25


def test_specks_are_left_out_of_train_alone(tmp_path):
    view = drawn(3)
    view.instances[0].segmentation[:] = False
    view.instances[0].segmentation[:2, :10] = True      # 20 of 16,000 pixels
    sentences = [("small", (0,), "place"), ("small by its looks", (0,), "appearance"), ("large", (1,), "place"), ("nothing", (), "none")]
    writer = ViewWriter(tmp_path, smallest=0.01)
    writer.add(view, sentences, "train", "cut")
    writer.add(view, sentences, "val", "whole")
    writer.add(view, [], "val", "whole")
    writer.write()
    assert [(x["split"], x["expression"]) for x in said(tmp_path)] == [
        ("train", text) for text, *_ in sentences[1:]] + [("val", text) for text, *_ in sentences]
    assert len(list((tmp_path / "photos").iterdir())) == 2
    assert {r.mask().sum() for r in FolderData(tmp_path).referrals("val") if not r.absent} == {20, view.instances[1].segmentation.sum()}


def test_a_seed_makes_the_same_folder(tmp_path):
    coco = write_coco(tmp_path / "coco", range(1, 9))
    people = write_people(tmp_path / "people", {21: "train", 22: "val"})
    refer = write_refer(tmp_path / "refer", {31: "train"})
    made = [make_views(tmp_path / name, coco / "annotations.json", coco, people, refer, counts=replace(FEW, seed=seed))
            for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and made[0] == made[1]
    assert said(tmp_path / "a") != said(tmp_path / "c")
    assert json.loads((tmp_path / "a/manifest.json").read_text()) == made[0]
    assert {(row["split"], row["from"]) for row in made[0]["sentences"]} >= {("val", "people"), ("train", "cut"), ("train", "people"), ("train", "boxes")}
    assert sum(n for row in made[0]["sentences"] for n in row.values() if isinstance(n, int)) == len(said(tmp_path / "a"))
    assert sorted(made[0]["photos"]["coco"]["train"]) == ["CC BY 2.0", "CC BY-NC-ND 2.0"] and made[0]["photos"]["refer"] == {"train": {"not told": [31]}}
    data = FolderData(tmp_path / "a")
    assert data.splits == ["train", "val"] and all(r.mask().any() != r.absent for split in data.splits for r in data.referrals(split))
    by_people = [x for x in said(tmp_path / "a") if x["split"] == "val" and x["kind"].startswith("human")]
    assert {x["expression"] for x in by_people} == {*(f"thing {k} of 22, left" for k in range(3)), "nothing in 22"}


def test_held_out_photos_are_never_used(tmp_path):
    coco = write_coco(tmp_path / "coco", range(1, 15))
    people = write_people(tmp_path / "people", {1: "train", 2: "val", 3: "test"})
    refer = write_refer(tmp_path / "refer", {4: "train", 5: "val", 6: "train", 3: "train"})
    write_refer(tmp_path / "refer", {6: "testA"}, "refcoco+")
    held = write_refer(tmp_path / "held", {7: "train"}, split_by="umd")
    write_refer(held, {4: "testB"}, split_by="google")      # photos of every division are held out
    done = make_views(tmp_path / "out", coco / "annotations.json", coco, people, refer, exclude=[held], counts=FEW)
    photos = {source: {split: {id for ids in found.values() for id in ids} for split, found in splits.items()} for source, splits in done["photos"].items()}
    assert photos["people"] == {"train": {1}, "val": {2}} and photos["refer"] == {"train": set()} and done["excluded_photos"] == 6
    assert photos["coco"]["train"] | photos["coco"]["val"] == {1, *range(8, 15)} and 1 in photos["coco"]["train"]
    assert not photos["coco"]["train"] & photos["coco"]["val"]


def test_boxes_are_filled_and_joined_by_thing(tmp_path):
    refer = write_refer(write_refer(tmp_path, {4: "train"}), {4: "val"}, "refcoco+")
    found, others = _find_referrals(refer, ("train", "val"))
    view, sentences = _boxed(found[4])
    assert others == set() and list(found) == [4]
    assert sentences == [("the refcoco box of 4", (0,), "human+box"), ("left", (0,), "human+box"), ("the refcoco+ box of 4", (0,), "human+box")]
    assert view.image.size == (80, 100)     # stored at half the width that the box was drawn on
    (box,) = view.instances
    assert box.segmentation[10:70, 10:30].all() and box.segmentation.sum() == 60 * 20


def test_boxes_of_a_folder_become_masks_inside_them(tmp_path):
    coco = write_coco(tmp_path / "coco", range(1, 9))
    make_views(tmp_path / "out", coco / "annotations.json", coco, None, write_refer(tmp_path / "refer", {31: "train"}), counts=FEW)
    before, lines = FolderBoxes.read(tmp_path / "out"), said(tmp_path / "out")
    found = outline_boxes(tmp_path / "out", steps=2, make_net=partial(BoxMask, "tf_efficientnet_lite0", pretrained=False, width=8))
    after = FolderBoxes.read(tmp_path / "out")
    assert found["boxes"] == sum(map(len, before.boxes.values())) > 0 and not after.boxes and before.val == after.val
    masks = {mark["id"]: mark for mark in after.content["annotations"]}
    for name, marks in before.boxes.items():
        for box, mask in zip(before.load(name, marks)[1], after.load(name, [masks[mark["id"]] for mark in marks])[1], strict=True):
            assert mask.any() and not (mask & ~box).any()
    for name, marks in before.train.items():
        assert all(masks[mark["id"]] == mark for mark in marks)
    assert [line | {"kind": line["kind"].replace("box", "outlined")} for line in lines] == said(tmp_path / "out")
    FolderData(tmp_path / "out")
    assert json.loads((tmp_path / "out/manifest.json").read_text())["outlines"] == found


def test_masks_that_enclose_nothing_are_left_out_and_listed(tmp_path):
    coco = write_coco(tmp_path / "coco", range(1, 9))
    content = json.loads((coco / "annotations.json").read_text())
    content["annotations"][0]["segmentation"] = [[5, 5, 5, 5, 5, 5]]
    (coco / "annotations.json").write_text(json.dumps(content))
    view, numbers = _Coco(coco / "annotations.json", coco).load(1)
    assert len(view.instances) == 2 and numbers == {11: 0, 12: 1}
    done = make_views(tmp_path / "out", coco / "annotations.json", coco, None, counts=replace(FEW, val=0))
    assert list(done["unusable_masks"]) == [10]


def test_bad_sources_are_one_line(tmp_path):
    coco = write_coco(tmp_path / "coco", range(1, 7))
    make = lambda out="out", **more: make_views(tmp_path / out, more.pop("instances", coco / "annotations.json"), coco, **{"people": None, "counts": FEW, **more})
    with pytest.raises(RISError, match="3 photos are left to train on: of 6, 0 are excluded and 3 held out"):
        make(counts=replace(FEW, val=3))
    with pytest.raises(RISError, match="holds the source"):
        make("coco", force=True)
    with pytest.raises(RISError, match="is missing"):
        make(instances=tmp_path / "nowhere.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(RISError, match="not in COCO format"):
        make(instances=tmp_path / "other.json")
    for more in (dict(exclude=[tmp_path]), dict(refer=tmp_path)):
        with pytest.raises(RISError, match="no REFER data set in"):
            make(**more)
    with pytest.raises(RISError, match="no thing with a box in trian"):
        make(refer=write_refer(tmp_path / "refer", {31: "train"}), refer_splits=("trian",))
    people = write_people(tmp_path / "people", {21: "train"})
    Image.fromarray(np.eye(100, 160) > 0).save(people / "mask.png")
    with open(people / "expressions.jsonl", "a") as file:
        file.write(json.dumps(dict(image="photos/21.png", expression="a line", mask="mask.png")) + "\n")
    with pytest.raises(RISError, match="line 5: views need sentences that name annotations"):
        make(people=people)
    (coco / "photos/3.png").unlink()
    with pytest.raises(RISError, match="names photos/3.png, which is not in"):
        make()
    assert not (tmp_path / "out").exists()
