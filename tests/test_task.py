"""What the chapter on the task should not carry: many random masks, wrong input, hostile input for the pictures."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from ris_nb.contract import RISError
from ris_nb.metrics import SegmentationMetrics, intersection_union, iou
from ris_nb.show import draw_mask, overlay, show_referral


def random_masks(n: int, size=(13, 9), seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng.random((n, *size)) < rng.random((n, 1, 1)), rng.random((n, *size)) < rng.random((n, 1, 1))


def test_parts_add_up_to_the_whole():
    predictions, truths = random_masks(11)
    whole, first, second = SegmentationMetrics(), SegmentationMetrics(), SegmentationMetrics()
    whole.update(predictions, truths)
    first.update(predictions[:3], truths[:3])
    second.update(predictions[3:], truths[3:])
    first.totals += second.totals
    assert torch.equal(first.totals[:3], whole.totals[:3]) and torch.equal(first.totals[4:], whole.totals[4:])  # counts: exact
    torch.testing.assert_close(first.totals, whole.totals, rtol=1e-14, atol=0)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(RISError, match="no expression"):
        SegmentationMetrics().compute()
    with pytest.raises(RISError, match="1 predictions for 2 truths"):
        SegmentationMetrics().update([np.eye(4, dtype=bool)], [np.eye(4, dtype=bool)] * 2)


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


def test_overlay_keeps_the_rest_and_refuses_what_does_not_fit():
    image = np.random.default_rng(0).integers(1, 255, (96, 128, 3), dtype=np.uint8)
    mask = np.zeros((96, 128), bool)
    mask[40:, 30:90] = True  # down to the frame
    near = np.zeros_like(mask)
    near[39:, 29:91] = True
    for kind in ("truth", "prediction"):
        changed = (overlay(image, mask, kind) != image).any(-1)
        assert (changed <= near).all() and changed[-1, 30:90].all()
    assert changed[mask].mean() < 0.5  # the colours below stay to be seen
    for bad in (np.zeros((7, 6), bool), np.zeros((96, 128, 3), bool), mask.astype(np.uint8)):
        with pytest.raises(RISError):
            overlay(image, bad)
    with pytest.raises(RISError, match="'truth' or as 'prediction'"):
        overlay(image, mask, "answer")


@pytest.mark.parametrize("ground", [0, 70, 128, 200, 255])
def test_masks_are_seen_on_any_ground_and_told_apart(ground):
    """Drawn pixels differ much in brightness from any ground, and truth, prediction and nothing give three different pictures."""
    import matplotlib.pyplot as plt
    mask = np.zeros((64, 64), bool)
    mask[20:34, 50:] = True  # touches the frame, 14 pixels as a small thing
    pictures = []
    for kind in ("truth", "prediction"):
        figure = plt.figure(figsize=(1.5, 1.5), dpi=100)
        ax = figure.add_axes((0, 0, 1, 1))
        ax.imshow(np.full((64, 64, 3), ground, np.uint8))
        ax.axis("off")
        draw_mask(ax, mask, kind)
        figure.canvas.draw()
        pictures.append(np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int))
        plt.close(figure)
    far = [(abs(picture - ground).max(-1) > 100) for picture in pictures]
    at_frame = [drawn[60:70, -4:].any() for drawn in far]
    assert all(drawn.sum() > 60 for drawn in far) and all(at_frame)
    inside = np.s_[54:72, 124:142]
    assert not far[0][inside].any() and far[1][inside].any()  # a truth leaves its inside alone, a prediction is hatched


@pytest.mark.parametrize("mask", [np.zeros((4, 5)), np.zeros((2, 4, 5), bool), np.zeros(5, bool), np.zeros((4, 5), np.uint8)])
def test_what_is_no_mask_is_not_drawn(mask):
    import matplotlib.pyplot as plt
    figure, ax = plt.subplots()
    with pytest.raises(RISError, match="bool"):
        draw_mask(ax, mask, "truth")
    plt.close(figure)


@pytest.mark.parametrize("fill", [1, 4096])
def test_the_smallest_and_the_largest_mask_can_be_drawn(fill):
    import matplotlib.pyplot as plt
    mask = np.arange(4096).reshape(64, 64) < fill
    figure, ax = plt.subplots()
    ax.imshow(np.zeros((16, 16)))
    draw_mask(ax, mask, "prediction", size=(16, 16))
    figure.canvas.draw()
    assert ax.patches and ax.get_xlim() == (-0.5, 15.5)
    for patch in ax.patches[:2]:
        assert (patch.get_path().vertices >= -0.5).all() and (patch.get_path().vertices <= 15.5).all()
    plt.close(figure)


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
