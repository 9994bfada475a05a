"""RefPhotos is what its card says: free photos, hand-written sentences with one target each, splits by photo, masks that fit."""
from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from PIL import Image

from ris_nb import open_data
from ris_nb.data.check import check_data
from ris_nb.data.sources import find_root
from ris_nb.evaluation.report import Record, make_report

ROOT = find_root("refphotos")
DATA = open_data("refphotos")
ROWS = [(referral, sentence) for split in DATA.splits for referral in DATA.referrals(split) for sentence in referral.sentences]


def kinds(sentence) -> list[str]:
    return sentence.kind.split("+")


def test_every_photo_is_free_small_and_attributed():
    annotations, attribution = json.loads((ROOT / "annotations.json").read_text()), (ROOT / "ATTRIBUTION.md").read_text()
    assert {image["license"] for image in annotations["images"]} == {4, 7} and len(annotations["images"]) == 97
    for image in annotations["images"]:
        assert Image.open(ROOT / image["file_name"]).size == (image["width"], image["height"]) and max(image["width"], image["height"]) <= 480
        assert image["flickr_url"] in attribution
    assert {path.name for path in (ROOT / "photos").iterdir()} == {Path(image["file_name"]).name for image in annotations["images"]}
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) <= 4_000_000


def test_sentences_are_many_of_each_kind_and_none_is_said_twice():
    count = Counter(kind for _, sentence in ROWS for kind in kinds(sentence))
    assert len(ROWS) >= 600 and count["ambiguous"] == 20
    assert 0.08 <= count["none"] / len(ROWS) <= 0.14 and 0.08 <= count["several"] / len(ROWS) <= 0.14
    assert min(count[kind] for kind in ("place", "appearance", "relation", "action", "number", "part")) >= 50
    assert max(Counter((referral.image_id, sentence.text.lower()) for referral, sentence in ROWS).values()) == 1


def test_a_mask_is_empty_where_nothing_fits_and_only_there():
    for referral, sentence in ROWS:
        assert referral.absent == ("none" in kinds(sentence))
        assert referral.absent or referral.mask().any()


def test_splits_share_no_photo_and_the_check_has_nothing_to_say():
    rows = check_data("refphotos")
    assert [row["split"] for row in rows] == ["train", "val", "test"] and not any(row["problems"] or row["warnings"] for row in rows)


def test_ambiguous_sentences_name_the_other_things():
    extra, known = json.loads((ROOT / "extra.json").read_text()), {a["id"]: a for a in json.loads((ROOT / "annotations.json").read_text())["annotations"]}
    assert sorted(entry["expression"] for entry in extra["ambiguous"]) == sorted(s.text for _, s in ROWS if "ambiguous" in kinds(s))
    for entry in extra["ambiguous"]:
        assert entry["also"] and all(known[number]["image_id"] == known[entry["annotation"]]["image_id"] for number in entry["also"])


def test_the_card_tells_the_counts():
    numbers = [int(n) for n in re.findall(r"\| sentences \| (\d+) \| (\d+) \| (\d+) \| (\d+)", (ROOT / "README.md").read_text())[0]]
    assert numbers == [*(sum(len(r.sentences) for r in DATA.referrals(split)) for split in DATA.splits), len(ROWS)]


def test_a_sentence_counts_in_each_of_its_kinds_and_several_things_are_many():
    records = [Record(0, 0, 7, "the red cup on the left", "place+appearance", 5, 10, 0.1), Record(1, 1, 8, "both cups", "several", 1, 4, 0.1)]
    report = make_report(records, "model")
    assert {name: row["expressions"] for name, row in report.by_kind.items()} == {"appearance": 1, "place": 1, "several": 1}
    assert set(report.by_number) == {"one", "many"}
