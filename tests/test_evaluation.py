"""Evaluation: many processes give the figures of one, and reports survive faults."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import nn

from ris_nb.contract import Output, RISError
from ris_nb.data.batches import ReferralDataset
from ris_nb.data.refer import Referral, Sentence
from ris_nb.data.sources import open_data
from ris_nb.data.tokenizer import SPECIAL
from ris_nb.distributed import shares
from ris_nb.evaluation.cases import show_cases
from ris_nb.evaluation.evaluate import evaluate, pairs_at_once, shuffle_expressions
from ris_nb.evaluation.floors import Floor
from ris_nb.evaluation.report import Report
from ris_nb.models.base import RISModel

WORDS = ["red", "green", "blue", "left", "right", "square"]


class Toy(RISModel):
    """Each word weighs the colours: looks, listens, and answers with a mask that depends on every pixel."""

    def __init__(self, resolution="model"):
        super().__init__(16, [*SPECIAL, *WORDS], resolution=resolution)
        self.weigh = nn.Embedding(len(SPECIAL) + len(WORDS), 3)
        nn.init.normal_(self.weigh.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, batch):
        weights = (self.weigh(batch.ids) * batch.words[..., None]).sum(1)  # (B, 3)
        image = batch.image if batch.which is None else batch.image[batch.which]
        return Output(score=torch.einsum("bc,bchw->bhw", weights, image))

    def losses(self, output, batch):
        return {}

    def masks(self, output, sizes):
        return [nn.functional.interpolate(s[None, None], size=tuple(size))[0, 0] > 0 for s, size in zip(output.score, sizes)]


def make_referrals(root: Path, images: int) -> list[Referral]:
    """Noise photos of differing sizes with 1 to 3 rectangles, each with 1 to 3 sentences: an uneven load."""
    rng, referrals = np.random.default_rng(3), []
    for i in range(images):
        height, width = int(rng.integers(12, 30)), int(rng.integers(12, 30))
        path = root / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        for _ in range(1 + i % 3):
            x, y = (int(v) for v in rng.integers(0, 6, 2))
            w, h = (int(v) for v in rng.integers(3, 7, 2))
            texts = [" ".join(rng.choice(WORDS, 1 + j)) for j in range(1 + len(referrals) % 3)]
            referrals.append(Referral(
                ref_id=len(referrals), image_id=i, image_path=path, size=(height, width), category="", split="val",
                sentences=tuple(Sentence(text, kind=str(len(text.split()))) for text in texts), bbox=(x, y, w, h),
                segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]]))
    return referrals


def make_data(root: Path, images: int, model) -> ReferralDataset:
    return ReferralDataset(make_referrals(root, images), model.tokenizer, model.transform, every=True)


CASES = [(7, 2, None, "model"), (7, 2, 5, "model"), (5, 2, None, "original"), (1, 4, None, "model")]


def run_case(root, images, batch_size, shuffle_seed, resolution) -> dict:
    model = Toy(resolution)
    report = evaluate(model, make_data(root, images, model), batch_size, shuffle_seed=shuffle_seed, progress=False)
    return {**vars(report), "records": [vars(r) for r in report.records]}


def work(rank, world, root):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=world)
    results = []
    for k, case in enumerate(CASES):
        (Path(root) / f"{rank}-{k}").mkdir()
        results.append(run_case(Path(root) / f"{rank}-{k}", *case))
    (Path(root) / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def test_two_processes_give_the_figures_of_one(tmp_path):
    mp.start_processes(work, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    several = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for k, case in enumerate(CASES):
        (tmp_path / f"one-{k}").mkdir()
        alone = json.loads(json.dumps(run_case(tmp_path / f"one-{k}", *case)))
        assert several[0][k]["machine"]["processes"] == 2
        for result in (alone, several[0][k], several[1][k]):
            del result["machine"], result["seconds"]
        assert several[0][k] == several[1][k] == alone
        pairs = [(r["image"], r["sentence"]) for r in alone["records"]]
        assert len(set(pairs)) == len(pairs) == alone["expressions"]


def test_every_expression_is_scored_once(tmp_path):
    model = Toy()
    data = make_data(tmp_path, 7, model)
    report = evaluate(model, data, batch_size=3, progress=False)
    told = sorted(s.text for r in data.referrals for s in r.sentences)
    assert sorted(r.expression for r in report.records) == told and report.expressions == len(told)
    assert report.images == 7 and sum(g["expressions"] for g in report.by_kind.values()) == len(told)


def test_a_forward_pass_has_a_bounded_number_of_pairs(tmp_path):
    """An image of RefCOCO brings ten sentences and more: memory must not follow their number, nor may the figures."""
    model = Toy()
    data = make_data(tmp_path, 7, model)
    seen, whole = [], model.forward
    model.forward = lambda batch: seen.append((len(batch), len(batch.image), batch.which.max().item())) or whole(batch)
    reference = evaluate(model, data, progress=False)
    assert [pairs for pairs, *_ in seen] == [reference.expressions]  # small images: all at once
    for pairs in (1, 2, 3):
        seen.clear()
        assert evaluate(model, data, pairs=pairs, progress=False).records == reference.records
        assert max(n for n, *_ in seen) == pairs and sum(n for n, *_ in seen) == reference.expressions
        assert all(images <= n and last == images - 1 for n, images, last in seen)  # no image that nobody asks about
    assert [pairs_at_once(nn.Linear(1, 1), size) for size in (64, 384, 480, 3000)] == [900, 25, 16, 1]
    assert pairs_at_once(Floor("random object"), 480) > 10**6  # it needs all expressions of an image, and no memory


@pytest.mark.parametrize("resolution", ["model", "original"])
def test_batch_size_and_workers_change_nothing(tmp_path, resolution):
    model = Toy(resolution)
    data = make_data(tmp_path, 7, model)
    one = evaluate(model, data, batch_size=1, progress=False)
    assert evaluate(model, data, batch_size=32, progress=False).records == one.records
    assert evaluate(model, data, batch_size=2, workers=1, progress=False).records == one.records


def test_original_resolution_counts_original_pixels(tmp_path):
    model = Floor("whole image", image_size=16, resolution="original")
    data = make_data(tmp_path, 5, Toy())
    pixels = {r.image_id: r.size[0] * r.size[1] for r in data.referrals}
    report = evaluate(model, data, progress=False)
    assert all(r.union == pixels[r.image_id] for r in report.records)
    assert {r.union for r in evaluate(Floor("whole image", 16), data, progress=False).records} == {16 * 16}


def test_the_mode_of_the_model_is_restored_even_after_a_fault(tmp_path):
    model = Toy().train()
    data = make_data(tmp_path, 3, model)
    evaluate(model, data, progress=False)
    assert model.training
    (tmp_path / "1.png").write_bytes(b"not an image")
    with pytest.raises(RISError, match="1.png"):
        evaluate(model, data, progress=False)
    assert model.training


def test_data_without_truth_is_refused(tmp_path):
    model = Toy()
    referrals = make_referrals(tmp_path, 2)
    for options in ({"every": False}, {"every": True, "masks": False}):
        with pytest.raises(RISError, match="every=True"):
            evaluate(model, ReferralDataset(referrals, model.tokenizer, model.transform, **options), progress=False)


def test_shuffling_leaves_no_sentence_at_home(tmp_path):
    referrals = make_referrals(tmp_path, 9)
    home = {id(s): r.image_id for r in referrals for s in r.sentences}
    for seed in range(20):
        moved = shuffle_expressions(referrals, seed)
        assert [len(r.sentences) for r in moved] == [len(r.sentences) for r in referrals]
        seen = [(home[id(s)], r.image_id) for r in moved for s in r.sentences]
        assert all(a != b for a, b in seen) and sorted(id(s) for r in moved for s in r.sentences) == sorted(home)
    with pytest.raises(RISError, match="more images"):
        shuffle_expressions(referrals[:1], 0)


def test_a_report_survives_a_full_disk(tmp_path, monkeypatch):
    model = Toy()
    report = evaluate(model, make_data(tmp_path, 3, model), progress=False, data="toy", split="val")
    path = report.save(tmp_path / "out" / "report.json", records=tmp_path / "out" / "records.jsonl")
    again = Report.load(path)
    assert again.markdown() == report.markdown() and again.records == []
    lines = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert lines == [vars(r) for r in report.records]

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    report.oIoU = 0.0
    with pytest.raises(RISError, match="report.json.*No space left"):
        report.save(path)
    assert Report.load(path) == again and sorted(p.name for p in path.parent.iterdir()) == ["records.jsonl", "report.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"oIoU": 1}'])
def test_what_is_no_report_is_named(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(RISError, match="report.json"):
        Report.load(tmp_path / "report.json")


def test_one_process_has_every_batch():
    assert shares(5, 2) == [[0, 1], [2, 3], [4]]


def test_cases_are_drawn_and_saved(tmp_path):
    model = Toy()
    data = make_data(tmp_path, 4, model)
    report = evaluate(model, data, progress=False)
    figure = show_cases(model, data, report, count=20, path=tmp_path / "cases.png")
    assert (tmp_path / "cases.png").stat().st_size > 1000
    titles = {ax.get_title().split("\n")[0] for ax in figure.axes}
    assert {r.expression for r in report.records} <= titles
    with pytest.raises(RISError, match="no record of kind"):
        show_cases(model, data, report, kind="nested")


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.mark.skipif(not (SHARED / "mini_refcoco").is_dir(), reason="needs the photos of mini_refcoco")
def test_real_photos_are_measured_at_their_own_size():
    referrals = open_data(SHARED / "mini_refcoco", "refcoco").referrals("val")
    model = Toy("original")
    data = ReferralDataset(referrals, model.tokenizer, model.transform, every=True)
    report = evaluate(Floor("whole image", 16, resolution="original"), data, progress=False)
    assert report.expressions == 45
    assert sum(r.intersection for r in report.records) == sum(int(r.mask().sum()) * len(r.sentences) for r in referrals)
    assert evaluate(model, data, progress=False, shuffle_seed=0).expressions == 45
