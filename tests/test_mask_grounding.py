"""Mask Grounding: what the notebook has no room for. Training and resuming, processes, precision, hosts of other kinds."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ris_nb.contract import Batch, Output, RISError
from ris_nb.data.tokenizer import SPECIAL
from ris_nb.models.base import RISModel
from ris_nb.models.lavt import LAVT
from ris_nb.models.layers import mask_loss, score_masks, upsample
from ris_nb.models.mask_grounding import (IGNORE, MASK_ENCODERS, MASK_TOKENS, SOURCES, TINY_PREDICTOR, Grounded, MaskGrounding,
                                          WordPredictor, mask_centre, mask_grounding_loss, mask_words, masked_word_accuracy,
                                          masked_word_guesses)
from ris_nb.registry import create_model, load_model
from ris_nb.training.config import TrainConfig
from ris_nb.training.loop import LossStep, fit
from ris_nb.training.optim import param_groups
from ris_nb.training.sampling import seed_step

VOCABULARY = [*SPECIAL, "red", "green", "blue", "ball", "box"]
PREDICTOR = dict(width=16, layers=1, heads=2, ffn=16)
CONFIG = TrainConfig(steps=6, batch_size=4, lr=1e-2, save_every=3, log_every=2)


class GroundedToy(RISModel):
    """Somebody else's model: word vectors, a convolution, dropout, BatchNorm."""

    def __init__(self, vocabulary=VOCABULARY, width: int = 8):
        super().__init__(image_size=8, vocabulary=vocabulary, max_words=5)
        self.words = nn.Embedding(len(self.vocabulary), width)
        self.pixels = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.Dropout(0.1))

    def forward(self, batch):
        self.seen = batch.ids
        l, x = self.words(batch.ids), self.pixels(batch.image)
        x = x if batch.which is None else x[batch.which]
        return Output((x * (l * batch.words[..., None]).mean(1)[..., None, None]).sum(1), l, x, {"own": x})

    def losses(self, output, batch):
        assert output.extra["own"].dtype == torch.float32
        return {"mask": mask_loss(upsample(output.score, batch.mask.shape[-2:]), batch.mask)}

    def masks(self, output, sizes):
        return score_masks(output.score, (8, 8), sizes)


class Balls(torch.utils.data.Dataset):
    """Item (i, draw): a red, green or blue rectangle in a noisy image."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        i, draw = index
        rng = np.random.default_rng(i)
        image, mask, colour = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(i)) / 9, torch.zeros(1, 8, 8).bool(), i % 3
        x, y = rng.integers(0, 5, 2)
        mask[:, y : y + 3, x : x + 3] = True
        image[:, colour] += mask
        ids = torch.tensor([[2, 5 + colour, 8 + draw % 2, 3, 0]])
        return Batch(image, ids, ids > 0, mask=mask, image_id=[i])


def toy(**settings):
    torch.manual_seed(0)
    return Grounded(GroundedToy(), **{**PREDICTOR, **settings})


def some_batch(n=4):
    items = [Balls()[i, i] for i in range(n)]
    return Batch(*(torch.cat([getattr(item, name) for item in items]) for name in ("image", "ids", "words")),
                 mask=torch.cat([item.mask for item in items]))


def test_words_are_hidden_evenly():
    torch.manual_seed(0)
    ids = torch.arange(5, 9).repeat(40_000, 1)  # four words
    _, targets = mask_words(ids, ids > 0, [0], 4)
    count = (targets != IGNORE).sum(1)
    assert count.min() == 1
    expected = 0.15 * 4 + 0.85**4
    assert abs(count.float().mean() - expected) < 0.01
    share = (targets != IGNORE).float().mean(0)
    assert (share - expected / 4).abs().max() < 0.01  # no place is preferred
    exactly_one = mask_words(ids, ids > 0, [0], 4, rate=1e-9)[1] != IGNORE
    assert (exactly_one.sum(1) == 1).all() and (exactly_one.float().mean(0) - 0.25).abs().max() < 0.01


def test_switches_of_hiding():
    ids, words = torch.tensor([[2, 5, 8, 3, 0], [2, 6, 7, 9, 3]]), torch.tensor([[1, 1, 1, 1, 0], [1] * 5]).bool()
    special = list(range(5))
    same, none = mask_words(ids, words, special, 4, rate=0)  # off, "at least one" included
    assert torch.equal(same, ids) and (none == IGNORE).all()
    same, every = mask_words(ids, words, special, 4, rate=1, replace=0)  # all asked, none hidden
    assert torch.equal(same, ids) and (every != IGNORE).sum(1).tolist() == [2, 3]
    a, b = (mask_words(ids, words, special, 4, rate=0.5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    unknown = torch.full((1, 5), 1)  # nothing but [UNK]: there is nothing to ask
    assert (mask_words(unknown, unknown > 0, special, 4)[1] == IGNORE).all()


def test_loss_where_nothing_is_asked():
    logits = torch.randn(3, 4, 9, requires_grad=True)
    targets = torch.randint(9, (3, 4)).where(torch.rand(3, 4) < 0.5, torch.tensor(IGNORE))
    targets[0, 0], targets[0, 1] = 3, IGNORE
    zero = mask_grounding_loss(logits, torch.full((3, 4), IGNORE))
    assert zero == 0 and zero.requires_grad  # with a graph: every parameter gets a gradient
    mask_grounding_loss(logits, targets).backward()
    assert (logits.grad[targets == IGNORE] == 0).all() and (logits.grad[targets != IGNORE].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("options", [dict(rate=-0.1), dict(rate=1.1), dict(replace=2), dict(rate=float("nan"))])
def test_bad_rates(options):
    ids = torch.ones(1, 2, dtype=torch.int64)
    with pytest.raises(RISError, match="from 0 to 1"):
        mask_words(ids, ids > 0, [0], 4, **options)


def test_centre_of_a_rectangle_of_pixels():
    mask = torch.zeros(2, 10, 20).bool()
    mask[0, 2:4, 5:15] = True
    torch.testing.assert_close(mask_centre(mask), torch.tensor([[0.5, 0.3], [0.0, 0.0]]))
    mask[1, 0, 0] = True  # as near to the corner as a mask gets, and yet not where an empty one is
    torch.testing.assert_close(mask_centre(mask)[1], torch.tensor([0.025, 0.05]))


@pytest.mark.parametrize("encoder", MASK_ENCODERS)
@pytest.mark.parametrize("size", [(8, 8), (30, 50)])
def test_mask_encoders_take_any_size(encoder, size):
    token = MASK_ENCODERS[encoder](12)(torch.rand(3, *size) > 0.5)
    assert token.shape == (3, 1, 12) and token.isfinite().all()


def test_predictor_in_training_and_evaluation_agree():
    torch.manual_seed(0)
    predictor = WordPredictor(8, 6, 11, **PREDICTOR, dropout=0.0, length=7)
    inputs = torch.randn(3, 7, 8), torch.arange(7) < torch.tensor([[2], [5], [7]]), torch.randn(3, 6, 5, 9), torch.rand(3, 20, 20) > 0.5
    slow = predictor.train()(*inputs)
    with torch.no_grad():
        fast = predictor.eval()(*inputs)  # torch takes another path here
    torch.testing.assert_close(slow[inputs[1]], fast[inputs[1]], atol=1e-5, rtol=1e-5)


def test_loss_does_not_depend_on_the_split():
    torch.manual_seed(0)
    logits, targets = torch.randn(8, 5, 9), torch.randint(9, (8, 5))
    targets[torch.rand(8, 5) < 0.6] = IGNORE
    targets[3] = IGNORE
    parts = [mask_grounding_loss(logits[i : i + 2], targets[i : i + 2]) for i in range(0, 8, 2)]
    torch.testing.assert_close(mask_grounding_loss(logits, targets), torch.stack(parts).mean())


@pytest.mark.parametrize("segment", ["masked", "full"])
def test_a_loop_of_ones_own_gets_what_grounded_gets(segment):
    grounded, batch = toy(segment=segment, mask_encoder="pooled").train(), some_batch()
    torch.manual_seed(3)
    theirs = grounded.losses(grounded(batch), batch)
    torch.manual_seed(3)
    host, game = grounded.host, grounded.game
    hidden, targets = game.hide(batch)
    output = host(hidden)
    grounding = game.loss(output, batch, targets)
    ours = {**host.losses(output if segment == "masked" else host(batch), batch), "grounding": grounding}
    assert list(ours) == list(theirs) and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert not any(name.startswith("host") for name, _ in game.named_parameters())  # the host is looked at, not kept


def test_two_passes_segment_the_full_sentence_and_play_on_the_masked_one():
    grounded, batch, seen = toy(segment="full").train(), some_batch(), []
    grounded.host.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].ids))
    output = grounded(batch)
    asked = output.extra["word_targets"] != IGNORE
    assert len(seen) == 2 and not torch.equal(seen[0], batch.ids) and torch.equal(seen[1], batch.ids)
    assert torch.equal(seen[0][~asked], batch.ids[~asked])
    sum(grounded.losses(output, batch).values()).backward()
    assert all(p.grad is not None for p in grounded.parameters())
    with pytest.raises(RISError, match="gives the same word_features"):
        MaskGrounding(Reader(), **PREDICTOR)


def test_one_pass_of_the_host_on_the_masked_sentence():
    grounded, batch, calls = toy().train(), some_batch(), []
    grounded.host.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(3)
    output = grounded(batch)
    torch.manual_seed(3)
    ids, targets = mask_words(batch.ids, batch.words, grounded.special, grounded.mask_id)
    assert calls == [1] and torch.equal(grounded.host.seen, ids) and not torch.equal(ids, batch.ids)
    assert torch.equal(output.extra["word_targets"], targets) and "own" in output.extra
    assert list(grounded.losses(output, batch)) == ["mask", "grounding"]


@pytest.mark.parametrize("see, encoder", [(see, encoder) for see in [(), ("image",), ("mask",), SOURCES] for encoder in MASK_TOKENS
                                          if see != ("mask",) or encoder != "pooled"])
def test_every_parameter_learns(see, encoder):
    grounded, batch = toy(see=see, mask_encoder=encoder).train(), some_batch()
    sum(grounded.losses(grounded(batch), batch).values()).backward()
    assert all(p.grad is not None for p in grounded.parameters())
    quiet = toy(see=see, rate=0.0).train()
    losses = quiet.losses(quiet(batch), batch)
    assert losses["grounding"] == 0
    sum(losses.values()).backward()  # nothing asked, but no process may wait for a gradient
    assert all(p.grad is not None for p in quiet.parameters())
    assert sum(len(group["params"]) for group in param_groups(grounded, 0.01)) == len(list(grounded.parameters()))


def test_weight_scales_the_term():
    batch, losses = some_batch(), {}
    for weight in (0.0, 1.0, 2.5):
        grounded = toy(weight=weight).train()
        torch.manual_seed(1)
        losses[weight] = grounded.losses(grounded(batch), batch)["grounding"].item()
    assert losses[0.0] == 0 and losses[2.5] == pytest.approx(2.5 * losses[1.0])


def test_without_masks():
    batch = replace(some_batch(), mask=None)
    with pytest.raises(RISError, match="masks=True"):
        toy().train()(batch)
    assert "word_logits" in toy(see=("image",)).train()(batch).extra


@pytest.mark.parametrize("options, message", [(dict(see=("sound",)), "image, mask"), (dict(weight=-1), "at least 0"),
                                              (dict(heads=3), "heads must divide"), (dict(mask_encoder="box"), "centre, grid, pooled"),
                                              (dict(see=("mask",), mask_encoder="pooled"), "sees no image"),
                                              (dict(segment="both"), "'masked' or 'full'")])
def test_bad_arguments(options, message):
    with pytest.raises(RISError, match=message):
        toy(**options)


def test_hosts_that_say_too_little():
    class NoPixels(GroundedToy):
        def forward(self, batch):
            return replace(super().forward(batch), pixel_features=None)

    with pytest.raises(RISError, match="NoPixels gives no pixel_features"):
        Grounded(NoPixels(), **PREDICTOR)
    Grounded(NoPixels(), see=("mask",), **PREDICTOR)
    with pytest.raises(RISError, match="knows no words"):
        Grounded(create_model("lavt_tiny"), **TINY_PREDICTOR)


class Reader(GroundedToy):
    """A host that tokenises the expressions itself, for its words (`where` "words") or for its score alone."""

    where = "words"

    def forward(self, batch):
        ids, words = self.tokenizer(batch.expression)
        told = super().forward(replace(batch, ids=ids, words=words))
        return told if self.where == "words" else replace(super().forward(batch), score=told.score)


def test_hosts_that_read_the_words_elsewhere():
    with pytest.raises(RISError, match="Reader gives the same word_features when a word is hidden in batch.ids"):
        Grounded(Reader(), **PREDICTOR)
    sly = Reader()
    sly.where = "score"
    grounded, batch = Grounded(sly, **PREDICTOR).train(), replace(some_batch(), expression=["red ball"] * 4)
    with pytest.raises(TypeError):  # in training there is nothing to read: loud, not silently without a hidden word
        grounded(batch)
    assert "word_logits" not in grounded.eval()(batch).extra


def test_the_host_gets_no_expressions_in_training():
    grounded, seen = toy(), []
    grounded.host.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].expression))
    batch = replace(some_batch(), expression=["red ball"] * 4)
    grounded.train()(batch)
    grounded.eval()(batch)
    assert seen == [None, ["red ball"] * 4] and batch.expression == ["red ball"] * 4


def test_a_vocabulary_without_a_mask():
    host = GroundedToy()
    host.vocabulary = [piece for piece in VOCABULARY if piece != "[MASK]"]
    with pytest.raises(RISError, match=r"vocabulary of GroundedToy lacks \[MASK\]") as raised:
        Grounded(host, **PREDICTOR)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("see", [("mask",), SOURCES, ()])
def test_empty_masks_are_left_out_of_the_game(see):
    batch = some_batch(4)
    batch.mask[1] = batch.mask[3] = False
    grounded = toy(see=see, rate=1.0, replace=1.0).train()
    output = grounded(batch)
    targets = output.extra["word_targets"]
    assert torch.equal((targets != IGNORE).any(1), torch.tensor([True, False, True, False]))
    assert torch.equal(grounded.host.seen[1::2], batch.ids[1::2]) and (grounded.host.seen[::2] == grounded.mask_id).any(1).all()
    losses = grounded.losses(output, batch)
    logits = output.extra["word_logits"]
    torch.testing.assert_close(losses["grounding"], mask_grounding_loss(logits[::2], targets[::2]) / 2)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in grounded.parameters() if p.grad is not None)
    asked = len(masked_word_guesses(grounded, [batch], rate=1.0)["target"])
    assert asked == int((targets != IGNORE).sum())
    batch.mask[:] = False
    assert len(masked_word_guesses(grounded, [batch])["target"]) == 0


def test_the_start_is_the_demos_at_full_size_and_xaviers_in_the_tiny_models():
    torch.manual_seed(0)
    demo, tiny = WordPredictor(64, 32, 50, layers=1), WordPredictor(64, 32, 50, **{**TINY_PREDICTOR, "layers": 1})
    for name, p in demo.named_parameters():
        if p.ndim > 1 and not name.startswith("mask_in"):
            assert abs(p.std() / 0.02 - 1) < 0.1, name
    weight = tiny.layers.layers[0].linear1.weight  # (192, 96)
    assert abs(weight.std() / (2 / (192 + 96)) ** 0.5 - 1) < 0.1


def test_finding_the_widths_leaves_the_host_alone():
    torch.manual_seed(0)
    host = GroundedToy().train()
    before, random = {k: v.clone() for k, v in host.state_dict().items()}, torch.random.get_rng_state()
    Grounded(host, see=(), **PREDICTOR)
    assert host.training and host.pixels[1].training
    assert all(torch.equal(v, before[k]) for k, v in host.state_dict().items())
    assert not torch.equal(random, torch.random.get_rng_state())  # the predictor's weights are drawn


def test_evaluation_is_the_host():
    grounded, batch = toy().eval(), some_batch()
    with torch.no_grad():
        ours, theirs = grounded(batch), grounded.host(batch)
    assert torch.equal(ours.score, theirs.score) and "word_logits" not in ours.extra
    assert list(grounded.losses(ours, batch)) == ["mask"]
    for name in ("tokenizer", "transform", "vocabulary", "image_size", "max_words", "resolution", "mean", "std"):
        assert getattr(grounded, name) is getattr(grounded.host, name)
    with pytest.raises(AttributeError):
        grounded.no_such_thing
    image = np.zeros((9, 7, 3), np.uint8)
    grounded.train()
    assert np.array_equal(grounded.predict([image], ["red ball"])[0], grounded.host.predict([image], ["red ball"])[0])
    assert grounded.training


def test_fit_resumes_to_the_bit_and_leaves_the_host_alone(tmp_path):
    whole, parted = toy(), toy()
    fit(whole, Balls(), CONFIG, tmp_path / "whole", progress=False)
    history = []

    class Stop(Exception):
        pass

    def stop_at(model):
        history.append(1)
        raise Stop

    with pytest.raises(Stop):
        fit(parted, Balls(), replace(CONFIG, validate_every=4), tmp_path / "parted", validate=stop_at, progress=False)
    again = toy()
    log = fit(again, Balls(), CONFIG, tmp_path / "parted", resume=True, progress=False)
    assert log[-1]["step"] == 6 and log[-1]["grounding"] > 0
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name
    model = load_model(tmp_path / "parted")
    assert type(model) is GroundedToy and set(model.state_dict()) == set(whole.host.state_dict())
    assert all(torch.equal(v, whole.host.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_loss_term_without_gradients_is_logged_and_trains_nothing(tmp_path):
    class Watched(GroundedToy):
        def losses(self, output, batch):
            return {**super().losses(output, batch), "watched": output.score.detach().abs().mean()}

    logs = []
    for host in (GroundedToy, Watched):
        torch.manual_seed(0)
        model = Grounded(host(), **PREDICTOR)
        logs.append((fit(model, Balls(), CONFIG, tmp_path / host.__name__, progress=False)[-1], model.state_dict()))
    (plain, weights), (watched, same) = logs
    assert watched["watched"] > 0 and "watched" not in plain
    assert all(torch.equal(value, same[name]) for name, value in weights.items())


def test_bf16():
    grounded, batch = toy().train(), some_batch()
    seed_step(0, 0)
    terms = LossStep(grounded, "bf16")(batch)
    assert terms["grounding"].dtype == torch.float32
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in grounded.parameters())
    seed_step(0, 0)
    assert abs(LossStep(grounded)(batch)["grounding"] - terms["grounding"]) < 0.1


def test_lavt_with_several_sentences_an_image():
    torch.manual_seed(0)
    host = create_model("lavt_tiny", vocabulary=VOCABULARY, image_size=32, vision=dict(width=16, depths=(1, 1), heads=(1, 2)),
                        text=dict(width=32, layers=1, heads=2, ffn=32), decoder=dict(width=16))
    grounded = Grounded(host, **PREDICTOR).train()
    ids = torch.randint(5, 10, (5, 20))
    batch = Batch(torch.randn(2, 3, 32, 32), ids, ids > 0, torch.tensor([0, 0, 0, 1, 1]), torch.rand(5, 32, 32) > 0.5)
    output = grounded(batch)
    assert output.extra["word_logits"].shape == (5, 20, len(VOCABULARY)) and type(grounded.host) is LAVT
    sum(grounded.losses(output, batch).values()).backward()
    assert all(p.grad is not None for p in grounded.parameters() if p.requires_grad)


def test_accuracy_counts_what_it_should():
    grounded, batch = toy(), some_batch(6)
    guesses = masked_word_guesses(grounded, [batch, batch], seed=5)
    assert list(guesses) == ["target", "words", "words + image", "words + image + mask"]
    assert len(guesses["target"]) >= 12 and all(len(g) == len(guesses["target"]) for g in guesses.values())
    assert set(guesses["target"].tolist()) <= set(range(5, 10))
    with torch.no_grad():  # a predictor that says "box", come what may
        head = grounded.predictor.head[-1]
        head.weight.zero_()
        head.bias.copy_(torch.arange(10) == 9)
    share = (guesses["target"] == 9).float().mean().item()
    assert masked_word_accuracy(grounded, [batch, batch], seed=5) == dict.fromkeys(list(guesses)[1:], share)
    assert list(masked_word_accuracy(grounded, [batch], sees=[("mask",)])) == ["words + mask"]


def test_no_predictor_in_a_checkpoint(tmp_path):
    grounded = toy()
    grounded.save_pretrained(tmp_path)
    assert type(load_model(tmp_path)) is GroundedToy
    assert {p.name for p in Path(tmp_path).iterdir()} == {"config.json", "model.safetensors"}
