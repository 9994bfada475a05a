"""What every model promises: LAVT, MagNet, SaG and CRIS alike, each at a size that runs in milliseconds."""
from copy import deepcopy
from dataclasses import replace

import pytest
import test_cris
import test_lavt
import test_magnet
import test_sag
import torch

from ris_nb.contract import Batch, RISError
from ris_nb.registry import _shipped, load_model
from ris_nb.testing import check_model
from ris_nb.training.optim import param_groups

MODELS = {"lavt": test_lavt.small, "magnet": lambda **sizes: test_magnet.open_gates(test_magnet.small(**sizes)), "sag": test_sag.small, "cris": test_cris.small}
SUPERVISED = [("lavt", {}), ("cris", {}), ("magnet", {}), ("magnet", dict(decoder=dict(kind="simple")))]
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def some_batch(model, lens=(4, 9, 15), images=None):
    """Sentences of these lengths about as many images as there are sentences, or fewer; every id is a word that all of them know."""
    torch.manual_seed(1)
    words = torch.arange(20) < torch.tensor(lens)[:, None]
    side = model.image_size
    return Batch(torch.randn(images or len(lens), 3, side, side), torch.randint(5, 9, words.shape) * words, words,
                 mask=torch.rand(len(lens), side, side) > 0.8, image_id=list(range(images or len(lens))))


@pytest.mark.parametrize("name, sizes", [("lavt", {}), ("magnet", {}), ("magnet", dict(decoder=dict(kind="simple"))), ("sag", {}), ("sag", dict(slots=dict(kind="query"))),
                                         ("cris", {}), ("cris", dict(drop_zero=False, dice=1.0, vision=dict(layers=(2, 1, 1, 1))))])
def test_every_promise_is_kept(name, sizes):
    model = MODELS[name](**sizes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert len(check_model(model)) == 9
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def total(model, batch):
    return sum(model.losses(model(batch), batch).values())


@pytest.mark.parametrize("name, sizes", [
    ("lavt", {}), ("lavt", dict(image_size=48, vision=dict(window=7, patch=2, depths=(1, 2, 1, 1)), decoder=dict(width=8))),
    ("lavt", dict(text=dict(heads=4, layers=1), max_words=9)), ("magnet", {}), ("magnet", dict(image_size=48, vision=dict(window=7, patch=2), decoder=dict(points=3))),
    ("magnet", dict(decoder=dict(kind="simple", width=16), max_words=9)),
    ("magnet", dict(vision=dict(depths=(1, 1, 1, 1), heads=(1, 2, 4, 8)), text=dict(layers=4), released=True)), ("sag", {}), ("sag", dict(slots=dict(kind="query"), image_size=48)),
    ("cris", {}), ("cris", dict(image_size=96, max_words=9, threshold=0.5, neck=dict(widths=(16, 16, 8)), decoder=dict(layers=1)))])
def test_save_and_load(name, sizes, tmp_path):
    model = MODELS[name](**sizes)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    image = torch.randint(0, 255, (50, 70, 3), dtype=torch.uint8).numpy()
    masks = [m.predict([image, image], ["the red ball", "left"]) for m in (model, again)]
    assert all((a == b).all() and a.shape == (50, 70) and a.dtype == bool for a, b in zip(*masks))
    torch.testing.assert_close(model.state_dict(), again.state_dict(), rtol=0, atol=0)


@models
def test_which_equals_repetition(make):
    model = make()
    batch = some_batch(model, lens=(4, 9, 15, 5, 6), images=2)
    which = torch.tensor([1, 0, 0, 1, 1])
    with torch.no_grad():
        once, repeated = model(replace(batch, which=which)), model(replace(batch, image=batch.image[which]))
    torch.testing.assert_close(once.score, repeated.score, atol=1e-4, rtol=1e-4)


@models
def test_padding_ids_do_not_matter(make):
    model = make()
    batch = some_batch(model)
    with torch.no_grad():
        score = model(batch).score
        assert torch.equal(model(replace(batch, ids=torch.where(batch.words, batch.ids, 7))).score, score)
        changed = batch.ids.clone()
        changed[0, 1] = 5 + (changed[0, 1] - 4) % 4  # a real word does
        assert not torch.allclose(model(replace(batch, ids=changed)).score[0], score[0], atol=1e-7)


@models
def test_distributed_training_waits_for_no_parameter(make, tmp_path):
    """DDP refuses the second step when a trainable parameter got no gradient in the first."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = make().train()
        batch, parallel = some_batch(model), torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(3):
            sum(model.losses(parallel(batch), batch).values()).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name, sizes", SUPERVISED)
def test_loss_does_not_depend_on_the_split(name, sizes):
    """Of models that learn from masks. SaG's loss does: it compares the sentences of a batch with all of its images."""
    model = MODELS[name](**sizes)
    batch = some_batch(model, lens=(4, 9, 15, 5))
    whole = model.losses(model(batch), batch)
    parts = [replace(batch, image=batch.image[i], ids=batch.ids[i], words=batch.words[i], mask=batch.mask[i])
             for i in (slice(0, 2), slice(2, 4))]
    halves = [model.losses(model(p), p) for p in parts]
    for term in whole:
        torch.testing.assert_close(whole[term], (halves[0][term] + halves[1][term]) / 2, msg=term)
    with pytest.raises(RISError, match="masks=True"):
        model.losses(model(batch), replace(batch, mask=None))


@pytest.mark.parametrize("name, part, inner", [("lavt", "encoder.vision", "encoder.vision.merges"), ("magnet", "encoder.text", "encoder.text.bert.encoder"),
                                               ("sag", "vision", "vision.blocks"), ("cris", "encoder", "encoder.pool")])
def test_settings_travel(name, part, inner, tmp_path):
    """What is frozen and what learns slowly comes back with a checkpoint and a copy, and is found through a wrapper."""
    model = MODELS[name](freeze=[part], lr_factors={part: 0.5, "sentence" if name in ("magnet", "sag") else "decoder": 0.1})

    def rates(model):
        return sorted((group["lr_factor"], len(group["params"])) for group in param_groups(model, 0.1))

    model.freeze([inner])  # a part of a frozen part
    with pytest.raises(RISError, match="no part 'nowhere' to freeze"):
        model.freeze(["decoder" if name != "magnet" else "mask_decoder", "nowhere"])
    with pytest.raises(RISError, match="nothing of .* is left to train"):
        model.freeze([child for child, _ in model.named_children()])
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.frozen == model.frozen == (part, inner) and loaded.lr_factors == model.lr_factors
    assert 0.1 in dict(rates(model)) and 0.5 not in dict(rates(model))
    for other in (loaded, deepcopy(model), torch.nn.ModuleList([model])):
        assert rates(other) == rates(model)
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]
    thawed = type(model).from_pretrained(tmp_path, freeze=[], lr_factors={part: 0.5, inner: 0.2})
    assert {0.5, 0.2, 1.0} == set(dict(rates(thawed)))


# ---- check_model and the models that ship

@pytest.mark.parametrize("name", ["lavt_tiny", "magnet_tiny", "cris_tiny", "sag_tiny", "sag_toys", "rela_tiny"])
def test_a_shipped_model_keeps_the_contract(name):
    """Only ReLA reads its padding, and declares it; without the declaration it is refused."""
    model = load_model(name)
    promises = check_model(model)
    assert any("ids under padding may" in promise for promise in promises) == model.reads_padding == (name == "rela_tiny")
    if model.reads_padding:
        model.reads_padding = False
        with pytest.raises(RISError, match="ReLA: .* mask the padding"): check_model(model)


def test_every_shipped_model_is_checked():
    assert set(_shipped()) == {"lavt_photo", "lavt_tiny", "magnet_tiny", "cris_tiny", "sag_tiny", "sag_toys", "rela_tiny"}


def test_a_declaration_of_padding_hides_no_neighbour():
    """A model that declares reads_padding and lets neighbours change its answer is still refused."""
    class Neighbours(type(load_model("rela_tiny"))):
        def forward(self, batch):
            output = super().forward(batch)
            return replace(output, score=output.score - output.score.mean(0))
    model = load_model("rela_tiny")
    model.__class__ = Neighbours
    with pytest.raises(RISError, match="otherwise alone than in a batch"): check_model(model)
