"""Slots, language and mask rule measured apart: by loops over pixels, and for images of several sizes."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ris_nb.contract import RISError
from ris_nb.data.batches import ReferralDataset
from ris_nb.data.refer import Referral, Sentence
from ris_nb.evaluation.evaluate import evaluate
from ris_nb.evaluation.floors import Floor
from ris_nb.evaluation.gathering import gathering_means, measure_gathering
from ris_nb.registry import create_model
from test_sag import VOCABULARY, sag_speck  # noqa: F401 (registers sag_speck)


@pytest.fixture
def data(tmp_path):
    from PIL import Image
    rng, referrals = np.random.default_rng(0), []
    for n, (height, width) in enumerate(((20, 30), (24, 16), (32, 32))):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{n}.png")
        for x in (2, 9):
            box = [[x, 3, x + 5, 3, x + 5, 12, x, 12]]
            referrals.append(Referral(len(referrals), n, tmp_path / f"{n}.png", (height, width), "box", "val",
                                      (Sentence("the red box", "colour"), Sentence("left of the ball", "place")), segmentation=box))
    torch.manual_seed(0)
    model = create_model("sag_speck", vocabulary=VOCABULARY).eval()
    return model, ReferralDataset(referrals, model.tokenizer, model.transform, every=True)


def test_against_loops(data):
    model, dataset = data
    rows = measure_gathering(model, dataset)
    alone = measure_gathering(model, dataset, batch_size=1)
    assert [row.iou for row in rows] == pytest.approx([row.iou for row in alone]) and len({row.kind for row in alone}) == 2
    assert [row.iou for row in rows] == pytest.approx([record.iou for record in evaluate(model, dataset, progress=False).records])
    item = dataset[1]
    with torch.no_grad():
        output = model(item)
    up = F.interpolate(model.slot_maps(output), size=item.size[0], mode="bilinear")[0]
    winner, A_fuse = up.argmax(0), output.extra["A_fuse"]
    for b, row in enumerate(rows[4:8]):
        truth = torch.as_tensor(item.truth[b])
        order = A_fuse[b].argsort(descending=True).tolist()
        def iou(slots):
            mask = sum(winner == k for k in slots) > 0
            return ((mask & truth).sum() / (mask | truth).sum()).item()
        assert row.best_slot == pytest.approx(max(iou([k]) for k in range(6)), abs=1e-6)
        assert row.in_order == pytest.approx(max(iou(order[:n]) for n in range(1, 7)), abs=1e-6)
        lands = sum(A_fuse[b, k] * up[k] / up[k].sum() for k in range(6))
        assert row.on_referent == pytest.approx(lands[truth].sum().item(), abs=1e-5)
        assert row.on_referent + row.on_others + row.on_ground == pytest.approx(1)
        assert max(row.best_slot, row.in_order) <= row.best_union + 1e-9


def test_means_by_kind(data):
    means = gathering_means(measure_gathering(*data))
    assert list(means) == ["all", "colour", "place"] and means["all"]["expressions"] == 12
    for name in ("iou", "best_union", "on_ground", "over half"):
        assert means["all"][name] == pytest.approx((means["colour"][name] + means["place"][name]) / 2)


def test_models_without_slots_are_refused(data):
    with pytest.raises(RISError, match="models with slots"):
        measure_gathering(Floor("whole image", 32, "original"), data[1])


def test_every_object_is_the_union_of_an_images_expressions(data):
    model, dataset = data
    floor = Floor("every object", 32)
    square = ReferralDataset(dataset.referrals, model.tokenizer, floor.transform, every=True)
    records = evaluate(floor, square, progress=False).records
    for record in records:
        masks = square[record.image].mask
        assert (record.intersection, record.union) == (int(masks[record.sentence].sum()), int(masks.any(0).sum()))
