"""Does it listen? Models whose behaviour is known get the scores that follow by hand, on drawn scenes and on photos of which little is known."""
from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ris_nb.contract import Output, RISError
from ris_nb.data.refer import Referral, Sentence
from ris_nb.data.scenes import Scenes, open_scenes
from ris_nb.data.sources import open_data
from ris_nb.data.tokenizer import SPECIAL
from ris_nb.data.writer import make_refshapes, make_reftoys
from ris_nb.evaluation.floors import Floor
from ris_nb.evaluation.listening import LEAST, Oracle, Trial, contrast, listen, listen_floors, listening_number, sum_up
from ris_nb.evaluation.probes import PROBES, Sentences, find_changes, opposites
from ris_nb.evaluation.rewording import HOWS, ask_rewordings, find_rewordings, rewording_table, sum_rewordings
from ris_nb.models.base import RISModel


@pytest.fixture(scope="module")
def drawn(shared):
    data = open_data(shared("listening", lambda root: make_refshapes(root, counts={"val": 40})))
    scenes, val = open_scenes(data), data.referrals("val")
    return val, scenes, find_changes(val, scenes)


class Bag(RISModel):
    """Answers by the words alone, in whatever order: a mask that depends on the set of words and not on the picture."""

    def __init__(self):
        super().__init__(64, [*SPECIAL])

    def forward(self, batch):
        seeds = [sum(ord(letter) ** 2 for letter in "".join(sorted(text.split()))) for text in batch.expression]
        return Output(torch.stack([torch.rand(8, 8, generator=torch.Generator().manual_seed(seed)) - 0.7 for seed in seeds]))

    def masks(self, output, sizes):
        return [nn.functional.interpolate(score[None, None], size=tuple(size))[0, 0] > 0 for score, size in zip(output.score, sizes)]


def test_every_change_means_what_its_probe_says(drawn):
    val, scenes, changes = drawn
    assert {c.probe for c in changes} == set(PROBES)
    for c in changes:
        assert c.before != c.after and scenes.means(c.referral, c.before) == [c.referral]
        found = scenes.means(c.referral, c.after)
        if c.probe in ("opposite", "wrong word", "order"):
            assert found == [c.names] != [c.referral] and not (c.names.mask() & c.referral.mask()).any() and c.asks == "moves"
        else:
            assert c.names is None and {"absent": found == [], "paraphrase": found == [c.referral], "shuffled": c.referral not in found}[c.probe]
        words = c.before.split(), c.after.split()
        if c.probe in ("wrong word", "absent"):
            assert len(words[0]) == len(words[1]) and sum(a != b for a, b in zip(*words)) == 1 and c.after not in opposites(c.before)
        if c.probe == "order":
            assert sorted(words[0]) == sorted(words[1])
    assert find_changes(val, scenes) == changes != find_changes(val, scenes, seed=1)
    keys = [(c.probe, c.referral.image_path, c.referral.ref_id, c.before) for c in changes]
    assert len(set(keys)) == len(keys)  # one of a kind for each expression


@pytest.mark.parametrize("resolution", ["model", "original"])
def test_floors_get_zero_and_who_knows_the_scene_gets_one(drawn, resolution):
    val, scenes, changes = drawn
    for rule in ("whole image", "centre box", "every object"):
        report = listen(Floor(rule, resolution=resolution), changes, progress=False)
        assert (report.listens, report.interval, report.steadiness) == (0, [0, 0], 1)
        assert all(p["score"] == 0 for name, p in report.probes.items() if name != "paraphrase")
    report = listen(Oracle(scenes, val, resolution=resolution), changes, progress=False)
    assert (report.listens, report.interval, report.sensitivity) == (1, [1, 1], 1) and {p["score"] for p in report.probes.values()} == {1}
    assert report.probes["absent"]["empty"] == 1 and report.images == 40


def test_a_blind_guess_gets_zero_on_average(drawn):
    report = listen(Floor("random object"), drawn[2], progress=False)
    assert abs(report.listens) < 0.05 and report.interval[0] < 0.01 and report.interval[1] > -0.01
    assert report.steadiness < 0.5 and abs(report.probes["wrong word"]["score"]) < 0.15


def test_a_bag_of_words_does_not_notice_the_order(drawn):
    trials = listen(Bag(), drawn[2], progress=False).trials
    order = [t for t in trials if t.probe == "order"]
    assert order and all(t.same == 1 and t.score == 0 for t in order)
    assert any(t.same < 1 for t in trials if t.probe == "wrong word")


def test_batches_change_nothing(drawn):
    changes = drawn[2]
    one, other = (listen(Floor("random object"), changes, batch_size=n, progress=False) for n in (1, 32))
    assert one.trials == other.trials and one.interval == other.interval


def trial(image=0, probe="opposite", asks="moves", **values):
    """A trial of an answer that stays on the old thing."""
    return Trial(**{**dict(image=image, image_id=image, probe=probe, asks=asks, before="", after="", old_before=1.0, old_after=1.0, new_before=0.0,
                           new_after=0.0, same=1.0, area_before=0.1, area_after=0.1), **values})


def test_scores_by_hand():
    assert (contrast(0, 0), contrast(2, 1), contrast(1, 2), contrast(0.3, 0)) == (0, 0.5, -0.5, 1)
    assert trial().score == 0 and trial(old_after=0.0, new_after=0.4).score == 1     # ignores; moves, with poor outlines
    assert trial(old_after=0.0).score == 0.5                                         # leaves, and finds nothing
    assert trial(old_after=0.5, new_after=0.5).score == 0.5                          # marks both after the change
    assert trial(old_before=0.0, new_before=1.0, old_after=0.0, new_after=1.0).score == 0  # always on the new thing
    assert trial(asks="leaves", old_after=0.25).score == 0.75 and trial(asks="leaves", old_before=0.0, old_after=0.5).score == -1
    assert trial(asks="vanishes", area_after=0.0).score == 1 and trial(asks="vanishes", area_after=0.2).score == -0.5
    assert trial(asks="stays", same=0.7).score == 0.7


def test_the_number_weighs_probes_alike_and_draws_pictures():
    """Two probes and paraphrases: S = (0.5 + 1) / 2, V = 0.8; the many pairs of one probe don't outweigh the few of another."""
    trials = [trial(n % 20, old_after=0.0) for n in range(20 * LEAST)]
    trials += [trial(n, "absent", "vanishes", area_after=0.0) for n in range(LEAST)]
    trials += [trial(n, "paraphrase", "stays", same=0.8) for n in range(LEAST)]
    report = sum_up(trials)
    assert (report.sensitivity, report.steadiness) == (0.75, pytest.approx(0.8)) and report.listens == pytest.approx(0.6)
    assert set(report.left_out) == {"shuffled", "wrong word", "order"} and "0 pairs" in report.left_out["order"]
    assert report.interval[0] == pytest.approx(0.6) == report.interval[1]  # all pictures alike
    uneven = sum_up([*trials, *(trial(n, "absent", "vanishes") for n in range(10, 20))])  # ten pictures where the answer doesn't vanish
    low, high = uneven.probes["absent"]["interval"]
    assert uneven.probes["absent"]["score"] == 0.5 and low < 0.4 and high > 0.6
    number, sensitivity, steadiness = listening_number(np.array([0.4, np.nan, np.nan, np.nan, 0.0, np.nan]))
    assert (number, sensitivity, steadiness) == (0.2, 0.2, 1)


def test_too_little_is_said_in_one_line(drawn):
    changes = drawn[2]
    for few in ([], changes[:3], [c for c in changes if c.probe == "paraphrase"]):
        with pytest.raises(RISError, match="use more pictures"):
            listen(Floor("whole image"), few, progress=False)


NOTHING = {"size": [32, 32], "counts": [32 * 32]}


def photo(root, n, things):
    """A picture of 32 x 32 pixels with named boxes; things: (x, expressions)."""
    path = root / f"photo{n}.jpg"
    Image.new("RGB", (32, 32)).save(path)
    return [Referral(10 * n + i, n, path, (32, 32), "", "val", tuple(Sentence(text) for text in texts), (x, 4, 6, 6), [[x, 4, x + 6, 4, x + 6, 10, x, 10]])
            for i, (x, texts) in enumerate(things)]


def test_photos_are_judged_by_what_is_said_about_them(tmp_path):
    referrals = [r for n in range(12) for r in photo(tmp_path, n, [
        (2, ["Left man", "man in red", "dog behind cat"]), (12, ["right man", "man in blue"]), (22, ["cat  behind dog", "woman on the left"])])]
    found = {(c.probe, c.before): c for c in find_changes(referrals) if c.referral.image_id == 0}
    assert found["opposite", "Left man"].names == referrals[1] and found["opposite", "Left man"].asks == "moves"
    assert found["opposite", "woman on the left"].asks == "leaves"  # nobody said "woman on the right"
    assert found["wrong word", "man in red"].after == "man in blue" and found["order", "dog behind cat"].names == referrals[2]
    assert found["paraphrase", "right man"].after == "man in blue" and ("absent", "Left man") not in found
    assert not [key for key in found if key[0] == "shuffled"]  # all photos are described in the same words: they fit here, too
    report = listen(Oracle(Sentences(referrals), referrals, 32), find_changes(referrals), progress=False)
    assert report.listens == 1 and set(report.left_out) == {"absent", "shuffled"} and "know all that they hold" in report.left_out["absent"]
    assert "Left out: absent" in report.markdown()


def test_photos_say_what_is_not_there_and_what_else_there_is(tmp_path):
    """A sentence of nothing serves as "absent", one of another thing as "wrong word", even if many words differ; things that touch don't count."""
    referrals = [r for n in range(12) for r in photo(tmp_path, n, [
        (2, [f"cup {n} on the left, below the clock"]), (12, [f"tall jug {n}"]), (14, [f"handle of jug {n}"]), (24, [f"cup {n} with a saucer"])])]
    referrals = [replace(r, absent=True, segmentation=NOTHING) if "saucer" in r.sentences[0].text else r for r in referrals]
    found = {(c.probe, c.before): c for c in find_changes(referrals) if c.referral.image_id == 0}
    assert found["opposite", "cup 0 on the left, below the clock"].after == "cup 0 on the right, below the clock"  # "above" may name the same cup
    assert found["wrong word", "tall jug 0"].names == referrals[0] and found["wrong word", "handle of jug 0"].names == referrals[0]
    assert found["absent", "tall jug 0"].after == "cup 0 with a saucer" and found["absent", "tall jug 0"].asks == "vanishes"
    assert not [before for _, before in found if "saucer" in before]
    report = listen(Oracle(Sentences(referrals), referrals, 32), find_changes(referrals), progress=False)
    assert report.listens == 1 and {"absent", "wrong word", "opposite", "shuffled"} == set(report.probes)
    assert {rule: row["listens"] for rule, row in listen_floors(find_changes(referrals), Floor("nothing", 32)).items() if rule != "random object"} == \
        {"whole image": 0, "centre box": 0, "every object": 0, "nothing": 0}


class Sides(RISModel):
    """Marks the darker half of the picture for "dark", the left or the right third where the sentence says so, else the middle row."""

    def __init__(self):
        super().__init__(32, [*SPECIAL])

    def forward(self, batch):
        score = torch.full((len(batch), 32, 32), -1.0)
        which = range(len(batch)) if batch.which is None else batch.which.tolist()
        for b, (n, text) in enumerate(zip(which, batch.expression)):
            if "dark" in text:
                score[b][batch.image[n].mean(0) < 0] = 1
            columns = slice(0, 10) if "left" in text else slice(22, 32) if "right" in text else None
            score[b][(slice(15, 17),) if columns is None and "dark" not in text else (slice(None), columns or slice(0, 0))] = 1
        return Output(score=score)

    def masks(self, output, sizes):
        return [nn.functional.interpolate(score[None, None], size=tuple(size))[0, 0] > 0 for score, size in zip(output.score, sizes)]


def test_a_model_that_knows_sides_follows_the_mirror(tmp_path):
    """Exchanged alone, a side costs it all; exchanged with the picture mirrored, nothing. What it finds by looking is found in the mirror, too."""
    referrals = [r for n in range(3) for r in photo(tmp_path, n, [(2, [f"the left cup, number {n}"]), (24, [f"dark thing {n}"])])]
    for r in referrals:
        pixels = np.full((32, 32, 3), 255, np.uint8)
        pixels[:, 24:] = 0
        Image.fromarray(pixels).save(r.image_path.with_suffix(".png"))
    referrals = [replace(r, image_path=r.image_path.with_suffix(".png")) for r in referrals]
    rewordings = find_rewordings(referrals)
    assert {r.how for r in rewordings} == set(HOWS) - {"category", "absent"} - ({"other picture"} - {r.how for r in rewordings})
    rows = sum_rewordings(ask_rewordings(Sides(), rewordings, batch_size=2, progress=False))
    assert rows["other side"]["after"] == rows["mirrored picture"]["after"] == 0 < rows["other side"]["before"] == rows["both mirrored"]["after"]
    assert rows["both mirrored"]["loss"] == rows["mirrored, no side"]["loss"] == 0 and rows["both mirrored"]["same"] == 1
    assert rows["other side"]["interval"] == pytest.approx([rows["other side"]["loss"]] * 2)  # all pictures alike
    assert (rows["first word"]["sentences"], rows["both mirrored"]["sentences"], rows["mirrored, no side"]["sentences"]) == (6, 3, 3)
    again = sum_rewordings(ask_rewordings(Sides(), rewordings, batch_size=32, progress=False))
    assert again == rows and "left and right exchanged, of the mirrored picture" in rewording_table(rows)


def test_absent_sentences_and_categories_are_asked_as_they_are(tmp_path):
    referrals = photo(tmp_path, 0, [(2, ["the red one"]), (12, ["a blue one"]), (22, ["a green one"])])
    referrals = [replace(r, category=category, absent=absent, segmentation=NOTHING if absent else r.segmentation)
                 for r, category, absent in zip(referrals, ("Wine glass", "part", ""), (False, False, True))]
    asked = {(r.how, r.before): r.after for r in find_rewordings(referrals)}
    assert asked["category", "the red one"] == "wine glass" and ("category", "a blue one") not in asked
    assert asked["absent", "a green one"] == "a green one" and asked["first word", "a blue one"] == "blue"
    assert asked["other thing", "the red one"] == "a blue one" and [how for how, before in asked if "green" in before] == ["absent"]
    rows = sum_rewordings(ask_rewordings(Floor("nothing", 32), find_rewordings(referrals), progress=False))
    assert rows["absent"] == {"sentences": 1, "pictures": 1, "empty": 1}
    with pytest.raises(RISError, match="more pictures"):
        ask_rewordings(Floor("nothing", 32), [])


def test_one_picture_has_nobody_to_shuffle_with(tmp_path):
    assert {c.probe for c in find_changes(photo(tmp_path, 0, [(2, ["left man"]), (12, ["right man"])]))} == {"opposite"}


def test_any_generator_that_knows_what_a_phrase_names_will_do(tmp_path):
    """A world of its own: numbered cups on a shelf, which a phrase names by colour or by place."""
    class Say(NamedTuple):
        colour: str

    def scene(split, index):
        masks = np.zeros((2, 32, 32), bool)
        masks[0, 4:10, 2:8] = masks[1, 4:10, 12:18] = True
        return masks, lambda phrase: [i for i, colour in enumerate(("red", "blue")) if colour == phrase.colour]

    book = [SimpleNamespace(text=f"the {colour} {noun}", phrase=Say(colour)) for colour in ("red", "blue", "green") for noun in ("cup", "mug")]
    world = Scenes(scene, book)
    referrals = [r for n in range(12) for r in photo(tmp_path, n, [(2, ["the red cup"])])]
    for r in referrals:
        r.image_path.rename(tmp_path / f"val_{r.image_id:06d}.jpg")
    referrals = [Referral(r.ref_id, r.image_id, tmp_path / f"val_{r.image_id:06d}.jpg", r.size, "", "val", r.sentences, r.bbox,
                          {"size": [32, 32], "counts": [2 * 32 + 4, 6, *[26, 6] * 5, 32 * 32 - 2 * 32 - 4 - 6 - 5 * 32]}) for r in referrals]
    changes = find_changes(referrals, world)
    assert {(c.probe, c.after) for c in changes} == {("wrong word", "the blue cup"), ("absent", "the green cup"), ("paraphrase", "the red mug")}
    report = listen(Oracle(world, referrals, 32), changes, progress=False)
    assert report.listens == 1 and set(report.probes) == {"wrong word", "absent", "paraphrase"}


@pytest.mark.parametrize("flavour", ["reftoys_human", "reftoys_plural"])
def test_toys_are_asked_about_one_thing_at_a_time(tmp_path, flavour):
    """Expressions of several things or of none are left out; who knows the scene gets 1."""
    make_reftoys(tmp_path, flavour, counts={"val": 40})
    data = open_data(tmp_path)
    scenes, val = open_scenes(data, book=300), data.referrals("val")
    single = {(r.ref_id, s.text) for r in val for s in r.sentences if s.kind not in ("plural", "pair", "none")}
    assert all((scenes.means(r, s.text) == [r]) == ((r.ref_id, s.text) in single) for r in val for s in r.sentences)
    changes = find_changes(val, scenes)
    assert {(c.referral.ref_id, c.before) for c in changes} <= single and {"opposite", "wrong word", "absent", "paraphrase"} <= {c.probe for c in changes}
    report = listen(Oracle(scenes, val, 96), changes, progress=False)
    assert report.listens == 1 and {p["score"] for p in report.probes.values()} == {1}
    assert listen(Floor("every object", 96), changes, progress=False).listens == 0


def test_data_without_a_scene_have_no_scenes(drawn, tmp_path):
    make_refshapes(tmp_path, counts={"val": 1})
    note = tmp_path / "refshapes" / "generated.json"
    note.write_text("{}")
    assert open_scenes(open_data(tmp_path)) is None
    note.write_text("no json")
    with pytest.raises(RISError, match="generated.json"):
        open_scenes(open_data(tmp_path))


def test_a_report_is_written_as_it_is_printed(drawn, tmp_path):
    report = listen(Floor("random object"), drawn[2], progress=False, data="shapes", split="val", checkpoint="dice")
    report.save(tmp_path / "report.json", tmp_path / "trials.jsonl")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["listens"] == report.listens and f"shapes val, dice: listens {report.listens:.2f}" in report.markdown()
    trials = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    for name, probe in saved["probes"].items():
        assert probe["score"] == pytest.approx(np.mean([t["score"] for t in trials if t["probe"] == name]))
