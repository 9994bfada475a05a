"""What the chapter on the task should not carry: two real processes, many random masks, hostile input for the pictures."""
from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pycocotools import mask as coco_mask

from ris_nb.task import RISError, SegmentationMetrics, intersection_union, iou, overlay, show_referral


def random_masks(n: int, size=(13, 9), seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng.random((n, *size)) < rng.random((n, 1, 1)), rng.random((n, *size)) < rng.random((n, 1, 1))


def count_part(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    predictions, truths = random_masks(11)
    part = slice(0, 3) if rank == 0 else slice(3, 11)  # unequal parts
    metrics = SegmentationMetrics()
    metrics.update(predictions[part], truths[part])
    torch.save(metrics.reduce().totals, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_two_processes_count_what_one_counts(tmp_path):
    mp.spawn(count_part, args=(str(tmp_path),), nprocs=2)
    alone = SegmentationMetrics()
    alone.update(*random_masks(11))
    for rank in range(2):
        totals = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(totals[:3], alone.totals[:3]) and torch.equal(totals[4:], alone.totals[4:])  # counts: exact
        torch.testing.assert_close(totals, alone.totals, rtol=1e-14, atol=0)


def test_iou_is_that_of_pycocotools():
    predictions, truths = random_masks(300, (31, 17), seed=1)
    encode = lambda mask: coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    coco = [coco_mask.iou([encode(p)], [encode(t)], [0])[0, 0] for p, t in zip(predictions, truths)]
    np.testing.assert_allclose(iou(predictions, truths), coco, rtol=0, atol=1e-15)


def test_empty_union_counts_as_an_expression_with_iou_zero():
    nothing, something = np.zeros((4, 4), bool), np.eye(4, dtype=bool)
    metrics = SegmentationMetrics()
    metrics.update([nothing, something], [nothing, something])
    assert metrics.compute() == {"expressions": 2, "oIoU": 1.0, "mIoU": 0.5} | {f"Prec@{x}": 0.5 for x in (0.5, 0.6, 0.7, 0.8, 0.9)}


def test_thresholds_include_equality():
    metrics = SegmentationMetrics()
    metrics.update_counts(torch.tensor([5, 6, 7, 8, 9]), torch.tensor([10] * 5))
    assert [metrics.compute()[f"Prec@{x}"] for x in (0.5, 0.6, 0.7, 0.8, 0.9)] == [1.0, 0.8, 0.6, 0.4, 0.2]


def test_counts_of_a_whole_split_stay_exact():
    metrics = SegmentationMetrics()
    for _ in range(100):
        metrics.update_counts(torch.full((100,), 230_399), torch.full((100,), 230_401))
    assert metrics.totals[:3].tolist() == [10_000, 10_000 * 230_399, 10_000 * 230_401]


def test_tensors_arrays_and_lists_count_alike():
    predictions, truths = random_masks(6)
    ways = (predictions, truths), (torch.tensor(predictions), torch.tensor(truths)), (list(predictions), list(truths)), (list(torch.tensor(predictions)), truths)
    totals = []
    for prediction, truth in ways:
        metrics = SegmentationMetrics()
        metrics.update(prediction, truth)
        totals.append(metrics.totals)
    assert all(torch.allclose(t, totals[0], rtol=1e-14, atol=0) for t in totals)


@pytest.mark.parametrize("prediction, truth", [
    (np.zeros((4, 5)), np.zeros((4, 5), bool)),
    (np.zeros((4, 5), bool), np.zeros((4, 5), np.uint8)),
    (np.zeros((4, 5), bool), np.zeros((5, 4), bool)),
    (np.zeros((2, 4, 5), bool), np.zeros((1, 4, 5), bool)),
    (np.zeros(5, bool), np.zeros(5, bool)),
])
def test_what_is_no_pair_of_masks_is_refused_in_one_line(prediction, truth):
    with pytest.raises(RISError) as error:
        intersection_union(prediction, truth)
    assert "\n" not in str(error.value)


def test_overlay_keeps_the_rest_and_refuses_other_sizes():
    image = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    mask = np.zeros((6, 7), bool)
    mask[2, 3] = True
    assert ((overlay(image, mask) != image).any(-1) <= mask).all()
    assert (overlay(image, mask, "#ffffff", 1.0)[2, 3] == 255).all()
    for bad in (np.zeros((7, 6), bool), np.zeros((6, 7, 3), bool)):
        with pytest.raises(RISError):
            overlay(image, bad)


@pytest.mark.parametrize("expression", ["$x$ and $y", "word " * 2000, "a" * 10_000, "", "line\nbreak", "日本語 \u200b"])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_expression_can_be_drawn(expression):
    import matplotlib.pyplot as plt
    image = np.zeros((6, 7, 3), np.uint8)
    full, none = np.ones((6, 7), bool), np.zeros((6, 7), bool)
    for truth, prediction in ((full, none), (none, full), (None, None), (full, None), (None, full)):
        ax = show_referral(image, expression, truth, prediction)
        ax.figure.canvas.draw()
        assert len(ax.get_title()) < 120 and ax.get_xlim() == (-0.5, 6.5)
        plt.close(ax.figure)
