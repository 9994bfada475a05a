"""Sentences that name nothing or several things: drawn, written, read, trained on."""
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ris_nb import Grounded, create_model, evaluate
from ris_nb.cli.main import main
from ris_nb.contract import RISError
from ris_nb.data.batches import ReferralDataset, collate
from ris_nb.data.check import check_data
from ris_nb.data.refer import ReferData
from ris_nb.data.scenes import open_scenes
from ris_nb.data.shapes import HELD_OUT, ROUND, SPLITS, is_minimal, make_scene
from ris_nb.data.sources import open_data
from ris_nb.data.speaker import KINDS, MANY_KINDS, denote_several, refer
from ris_nb.data.writer import make_refshapes
from ris_nb.evaluation.floors import FLOORS, Floor
from ris_nb.evaluation.listening import judge, listen
from ris_nb.evaluation.probes import Change, find_changes
from ris_nb.evaluation.report import Record, Report, make_report
from ris_nb.metrics import SegmentationMetrics
from ris_nb.models.mask_grounding import TINY_PREDICTOR


def spoken(count=60, seed=0, splits=SPLITS):
    return [(scene, e) for split in splits for i in range(count) for scene in [make_scene(seed, split=split, index=i)]
            for e in refer(scene, "refshapes_plural")]


def test_the_same_words_everywhere():
    """If this changes, scores on refshapes_plural refer to other data: raise the generator's version and say so in the changelog."""
    digest = hashlib.sha256(json.dumps([(e.text, e.referents, e.kind) for _, e in spoken(20)]).encode())
    assert digest.hexdigest()[:16] == "d22e43a567dc570c"


def test_a_sentence_means_what_it_should():
    kinds = set()
    for scene, e in spoken():
        meant = denote_several(e.phrase, scene.things)
        assert meant == [scene.things[i] for i in e.referents], e
        assert {"none": len(meant) == 0, "plural": len(meant) > 1, "pair": len(meant) == 2}.get(e.kind, len(meant) == 1), e
        assert (e.referent == -1) == (e.kind in MANY_KINDS) and (e.kind in MANY_KINDS or is_minimal(e.phrase, scene.things)), e
        assert len(e.text.split()) <= 18
        kinds.add(e.kind)
    assert kinds == {*KINDS, *MANY_KINDS} - {"nested"}
    for scene in {id(scene): scene for scene, _ in spoken(20)}.values():
        texts = [e.text for e in refer(scene, "refshapes_plural")]
        assert len(texts) == len(set(texts))


def test_splits_speak_of_what_they_should():
    for scene, e in spoken():
        pairs = [(scene.things[i].colour, scene.things[i].shape) for i in e.referents] or [(e.phrase.colour, e.phrase.shape)]
        for pair in pairs:
            assert (pair in HELD_OUT) == (scene.split == "testC"), e
            assert scene.split not in ("testA", "testB") or (pair[1] in ROUND) == (scene.split == "testA"), e


@pytest.fixture(scope="module")
def root(shared):
    return shared("none_many", lambda folder: make_refshapes(folder, "refshapes_plural", {"train": 12, "testC": 6}, seed=9))


def test_the_written_root_is_read_back(root):
    data = open_data(root, "refshapes_plural")
    assert data.splits == ["train", "testC"] and data.split_by == "generated" and not list(root.rglob("*.p"))
    for split, count in (("train", 12), ("testC", 6)):
        scenes = [make_scene(9, split=split, index=i) for i in range(count)]
        made = {(f"{split}_{i:06d}.png", e.referents): scenes[i].masks[list(e.referents)].any(0)
                for i in range(count) for e in refer(scenes[i], "refshapes_plural")}
        referrals = data.referrals(split)
        assert len(referrals) == len(made)
        for referral, ((name, referents), mask) in zip(referrals, made.items()):
            assert referral.image_path.name == name and (referral.mask() == mask).all() and referral.area() == mask.sum()
            assert referral.absent == (referents == ()) and referral.has_mask and (referral.bbox is None) == referral.absent
            if not referral.absent:
                x, y, w, h = map(int, referral.bbox)
                assert mask[y:y + h, x:x + w].sum() == mask.sum() and mask[y].any() and mask[:, x].any()
    assert [row["problems"] for row in check_data(root)] == [[], []]
    assert make_refshapes(root, "refshapes_plural", {"train": 12, "testC": 6}, seed=9) == root
    with pytest.raises(RISError, match="seed 9 instead of 1"):
        make_refshapes(root, "refshapes_plural", {"train": 12, "testC": 6}, seed=1)
    with pytest.raises(RISError, match="data shapes .* --flavour refshapesg"):
        ReferData(root, "refshapesg")


@pytest.mark.parametrize("name", ["lavt_tiny", "magnet_tiny", "sag_tiny"])
@pytest.mark.parametrize("kinds", [{"none"}, {"none", "plural"}])
def test_empty_masks_are_trained_on(root, name, kinds):
    """A batch of empty masks, and one of empty masks and unions: every loss and every gradient is finite."""
    torch.manual_seed(0)
    model = create_model(name, vocabulary="bert-base-uncased")
    harness = (Grounded(model, **TINY_PREDICTOR) if name == "lavt_tiny" else model.for_training()).train()
    referrals = [r for r in ReferData(root, "refshapes_plural").referrals("train") if {s.kind for s in r.sentences} <= kinds][:6]
    dataset = ReferralDataset(referrals, model.tokenizer, model.transform)
    batch = collate([dataset[i] for i in range(len(dataset))])
    assert batch.mask.flatten(1).any(1).tolist() == [not r.absent for r in referrals]
    losses = harness.losses(harness(batch), batch)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    gradients = [p.grad for p in harness.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)


# ---- scores: ten sentences by hand, every corner case

def strip(*pixels):
    mask = np.zeros((2, 10), bool)
    mask.flat[list(pixels)] = True
    return mask


#       truth              answer                   fits nothing  I   U  score
TEN = [(strip(*range(10)), strip(*range(10)),       False,       10, 10, 1.0),    # found to the pixel
       (strip(*range(10)), strip(*range(9)),        False,        9, 10, 0.9),    # exactly 0.9: reaches Prec@0.9
       (strip(*range(10)), strip(*range(7)),        False,        7, 10, 0.7),    # exactly 0.7
       (strip(0, 1, 8, 9), strip(0, 1),             False,        2,  4, 0.5),    # two things, of which one is found
       (strip(0, 1, 8, 9), strip(0, 1, 7, 8, 9),    False,        4,  5, 0.8),    # two things, both found, a pixel too much
       (strip(3, 4),       strip(13, 14, 15),       False,        0,  5, 0.0),    # the wrong thing
       (strip(3, 4, 5, 6), strip(),                 False,        0,  4, 0.0),    # "there is none", and there is
       (strip(),           strip(),                 True,         0,  0, 1.0),    # "there is none", rightly
       (strip(),           strip(5, 6, 7),          True,         0,  3, 0.0),    # there is none, and 3 pixels are marked
       (strip(),           strip(*range(20)),       True,         0, 20, 0.0)]    # there is none, and everything is marked
BY_HAND = {"expressions": 10, "without target": 3,
           "cIoU": 32 / 71,                                      # (10+9+7+2+4) / (10+10+10+4+5+5+4+0+3+20)
           "gIoU": (1 + 0.9 + 0.7 + 0.5 + 0.8 + 1) / 10,         # 0.49
           "N-acc": 1 / 3, "T-acc": 6 / 7,
           "Prec@0.5": 5 / 7, "Prec@0.6": 4 / 7, "Prec@0.7": 4 / 7, "Prec@0.8": 3 / 7, "Prec@0.9": 2 / 7}


def as_by_hand(scores):
    assert {name: pytest.approx(scores[name], abs=1e-12) for name in BY_HAND} == BY_HAND
    assert scores["oIoU"] == scores["cIoU"] and scores["mIoU"] == scores["gIoU"]


def test_ten_sentences_by_hand():
    truths, answers, absent, I, U, single = zip(*TEN)
    ways = [SegmentationMetrics() for _ in range(4)]
    ways[0].update(list(answers), list(truths), list(absent))
    ways[1].update(np.stack(answers), np.stack(truths), torch.tensor(absent))
    ways[2].update_counts(torch.tensor(I), torch.tensor(U), torch.tensor(absent), torch.tensor([not a.any() for a in answers]))
    for truth, answer, none in zip(truths, answers, absent):
        ways[3].update(answer, truth, absent=none)
    for metrics in ways:
        as_by_hand(metrics.compute())
    records = [Record(n // 4, n % 4, n, "it", "none" if none else "one", i, u, t.mean(), none, not a.any())
               for n, (t, a, none, i, u, _) in enumerate(TEN)]
    assert [r.iou for r in records] == list(single)
    report = make_report(records, "model")
    as_by_hand({**report.scores(), "expressions": report.expressions, "without target": report.no_target["without target"]})
    assert report.by_number["none"]["mIoU"] == pytest.approx(1 / 3) and report.by_number["one"]["expressions"] == 7
    for name in ("oIoU", "mIoU", "N-acc", "T-acc"):
        low, high = report.interval[name]
        assert low <= report.scores()[name] <= high and low < high


def test_parts_add_up_with_sentences_about_nothing():
    whole, first, second = (SegmentationMetrics() for _ in range(3))
    for n, (truth, answer, none, *_) in enumerate(TEN):
        for metrics in (whole, first if n % 2 else second):
            metrics.update(answer, truth, none)
    first.totals += second.totals
    torch.testing.assert_close(first.totals, whole.totals, rtol=1e-14, atol=0)


def test_a_lost_mask_is_no_missing_thing():
    """Where resizing emptied the mask, the sentence still has a target: no answer is right, and no name of gRefCOCO appears."""
    metrics = SegmentationMetrics()
    metrics.update(strip(), strip())
    assert metrics.compute() == {"expressions": 1, "oIoU": 0, "mIoU": 0} | {f"Prec@{x}": 0 for x in (0.5, 0.6, 0.7, 0.8, 0.9)}


def test_data_without_such_sentences_are_scored_as_before():
    metrics, old = SegmentationMetrics(), [row for row in TEN if not row[2]]
    metrics.update([row[1] for row in old], [row[0] for row in old])
    scores = metrics.compute()
    assert list(scores) == ["expressions", "oIoU", "mIoU", *(f"Prec@{x}" for x in (0.5, 0.6, 0.7, 0.8, 0.9))]
    assert scores["oIoU"] == 32 / 48 and scores["mIoU"] == pytest.approx(3.9 / 7)
    report = make_report([Record(0, n, 0, "it", "attribute", i, u, 0.1) for n, (*_, i, u, _) in enumerate(old)], "model")
    assert report.no_target == {} and report.by_number == {} and set(report.interval) == {"oIoU", "mIoU"} and "N-acc" not in report.markdown()


def test_only_sentences_about_nothing():
    metrics = SegmentationMetrics()
    metrics.update([strip(), strip(3)], [strip(), strip()], absent=True)
    scores = metrics.compute()
    assert scores["N-acc"] == scores["gIoU"] == 0.5 and scores["cIoU"] == 0 and "T-acc" not in scores and scores["Prec@0.5"] == 0
    assert set(make_report([Record(0, 0, 0, "it", "none", 0, 0, 0.0, True, True)], "model").no_target) == {"without target", "cIoU", "gIoU", "N-acc"}


def test_floors_and_the_report(root, tmp_path):
    model = Floor("nothing")
    dataset = ReferralDataset(ReferData(root, "refshapes_plural").referrals("train"), model.tokenizer, model.transform, every=True)
    nothing = evaluate(model, dataset, progress=False)
    share = np.mean([e.kind == "none" for i in range(12) for e in refer(make_scene(9, index=i), "refshapes_plural")])
    scores = nothing.scores()
    assert (scores["N-acc"], scores["T-acc"], scores["cIoU"]) == (1, 0, 0) and scores["gIoU"] == pytest.approx(share)
    assert nothing.interval["N-acc"] == [1, 1] and nothing.interval["T-acc"] == [0, 0]
    everything = evaluate(Floor("whole image"), dataset, progress=False)
    assert (everything.scores()["N-acc"], everything.scores()["T-acc"]) == (0, 1) and everything.by_number["none"]["mIoU"] == 0
    assert set(nothing.by_number) == {"none", "one", "many"}
    assert sum(g["expressions"] for g in nothing.by_number.values()) == nothing.expressions
    again = Report.load(nothing.save(tmp_path / "report.json"))
    assert again.no_target == nothing.no_target and again.markdown() == nothing.markdown()
    head = nothing.markdown().splitlines()
    assert "fit nothing" in head[0] and "| N-acc | 100.0 | 100.0 to 100.0 |" in head and "| cIoU | 0.0 | 0.0 to 0.0 |" in head


# ---- the probe "absent" and N-acc

def test_the_probe_of_absent_things_agrees_with_n_acc(root):
    referral = next(r for r in ReferData(root, "refshapes_plural").referrals("train") if not r.absent)
    thing = torch.from_numpy(referral.mask())
    half = thing.clone()
    half[:, :int(thing.nonzero()[:, 1].float().mean())] = False
    change = Change("absent", referral, "the star", "the purple star", None)
    for after, score in ((torch.zeros_like(thing), 1.0), (thing, 0.0), (half, 1 - half.sum().item() / thing.sum().item())):
        trial, metrics = judge(change, 0, (thing, after), [thing]), SegmentationMetrics()
        metrics.update(after, torch.zeros_like(thing), absent=True)
        assert trial.score == pytest.approx(score) and (trial.score == 1) == (metrics.compute()["N-acc"] == 1)


def test_listening_in_the_flavour_of_none_and_many(root):
    """Only sentences about one thing are changed; a floor that marks nothing has no pixel after any change, and never follows the words."""
    data = ReferData(root, "refshapes_plural")
    changes = find_changes(data.referrals("train"), open_scenes(data, book=100))
    assert {s.kind for c in changes for s in c.referral.sentences if s.text == c.before} <= set(KINDS) and any(c.probe == "absent" for c in changes)
    report = listen(Floor("nothing"), changes, progress=False)
    assert report.probes["absent"]["empty"] == 1 and report.listens == 0


def test_the_results_that_ship():
    """data/results/none_many.json: all floors and both models, and figures that a floor must have."""
    found = json.loads((Path(__file__).parents[1] / "data/results/none_many.json").read_text())
    assert set(found["rows"]) == {"lavt_tiny", "magnet_tiny", *(f"floor: {rule}" for rule in FLOORS)}
    nothing, everything = found["rows"]["floor: nothing"], found["rows"]["floor: whole image"]
    assert nothing["gIoU"] == pytest.approx(found["without target"] / found["expressions"]) and (nothing["N-acc"], nothing["T-acc"]) == (1, 0)
    assert (everything["N-acc"], everything["T-acc"]) == (0, 1)
    for row in found["rows"].values():
        parts = row["by_number"]
        assert sum(p["expressions"] for p in parts.values()) == found["expressions"] and parts["none"]["mIoU"] == pytest.approx(row["N-acc"])
        assert sum(p["expressions"] * p["mIoU"] for p in parts.values()) == pytest.approx(row["gIoU"] * found["expressions"])


# ---- "there is none", said and shown

def test_there_is_none_is_said_in_pictures_and_panels():
    from ris_nb.explore.ask import ask_panel
    from ris_nb.explore.panel import scene_at
    from ris_nb.show import in_words, show_referral
    thing, none = np.eye(8, dtype=bool), np.zeros((8, 8), bool)
    assert [in_words(none), in_words(none, none), in_words(thing, none)] == ["there is none", "there is none, right", "marks 12.5%, wrong: there is none"]
    for truth, answer, title, below in ((none, none, "right", "truth: there is none; prediction: there is none"), (none, thing, "wrong", "truth: there is none; hatched: prediction"),
                                        (thing, none, "IoU 0.00", "solid: truth; prediction: there is none")):
        ax = show_referral(np.zeros((8, 8, 3)), "the star", truth, answer)
        assert ax.get_title().splitlines()[-1] == title and [text.get_text() for text in ax.texts] == [below]
    panel = ask_panel(("lavt_tiny",))
    said = []
    for number in range(6):
        panel["number"].value = number
        absent = [text for text, mask in scene_at("val", number)[2].items() if not mask.any()]
        assert list(scene_at("val", number)[2])[-len(absent):] == absent or not absent   # offered last
        for text in absent[:2]:
            panel["expression"].value = text
            said.append(panel["lavt_tiny caption"].value)
    assert any("there is none, right" in caption for caption in said) and not any("IoU" in caption for caption in said)


# ---- a folder of one's own whose sentences may fit nothing

@pytest.fixture(scope="module")
def desks(tmp_path_factory):
    """24 desks with a mug, a book, both or neither, and three sentences about each, whether they fit or not."""
    own, dice, lines = tmp_path_factory.mktemp("desks"), np.random.default_rng(0), []
    for k in range(24):
        photo, there = np.full((64, 64, 3), (225, 205, 150 + k), np.uint8), [("mug",), ("book",), ("mug", "book"), ()][k % 4]
        for n, (name, colour) in enumerate({"mug": (0, 158, 115), "book": (204, 121, 167)}.items()):
            mask, (x, y) = np.zeros((64, 64), np.uint8), dice.integers((2 + 32 * n, 2), (14 + 32 * n, 42))
            mask[y:y + 16, x:x + 16] = 255
            if name in there:
                photo[mask > 0] = colour
                Image.fromarray(mask).save(own / f"{name}{k}.png")
        Image.fromarray(photo).save(own / f"{k}.png")
        for text, asked in (("the mug", ["mug"]), ("the book", ["book"]), ("all things", ["mug", "book"])):
            lines.append({"image": f"{k}.png", "expression": text, "mask": [f"{name}{k}.png" for name in asked if name in there], "split": "train" if k < 16 else "val"})
    (own / "expressions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return own


@pytest.mark.slow
def test_rela_learns_there_is_none_from_a_folder(desks, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    out = str(tmp_path / "run")
    assert main(["data", "check", str(desks), "--strict"]) == 0
    assert main(["train", "--root", str(desks), "--model", "rela_tiny", "--pretrained", "--out", out, "--steps", "150", "--batch-size", "16", "--set", "loss.no_target=1"]) == 0
    assert main(["evaluate", "--root", str(desks), "--split", "val", "--checkpoint", out]) == 0
    assert "24 expressions (10 fit nothing)" in capsys.readouterr().out
    report = Report.load(tmp_path / "run/val/report.json")
    assert report.by_number["none"]["expressions"] == 10 and report.by_number["many"]["expressions"] == 2
    assert min(report.scores()[name] for name in ("N-acc", "T-acc", "gIoU")) > 0.6, report.scores()   # always or never "none": one of them is 0
    assert main(["predict", str(desks / "19.png"), "the mug", "--checkpoint", out, "--out", str(tmp_path)]) == 0   # an empty desk
    assert "there is none" in capsys.readouterr().out
