"""Sentences that name nothing or several things: drawn, written, read, trained on."""
import hashlib
import json

import pytest
import torch

from ris_nb import Grounded, create_model
from ris_nb.contract import RISError
from ris_nb.data.batches import ReferralDataset, collate
from ris_nb.data.check import check_data
from ris_nb.data.refer import ReferData
from ris_nb.data.shapes import HELD_OUT, ROUND, SPLITS, is_minimal, make_scene
from ris_nb.data.sources import open_data
from ris_nb.data.speaker import KINDS, MANY_KINDS, denote_several, refer
from ris_nb.data.writer import make_refshapes
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
def root(tmp_path_factory):
    return make_refshapes(tmp_path_factory.mktemp("data"), "refshapes_plural", {"train": 12, "testC": 6}, seed=9)


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
