"""SaG: the released network's numbers, its invariants, no mask in training, and what is refused."""
import math
import os
import socket
import zipfile
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

os.environ["ACCELERATE_USE_CPU"] = "true"

import numpy as np
import pytest
import torch
from parity import find_case, load_case, released_state
from plain_sag import sag_inputs
from safetensors.torch import save_file

from ris_nb.cli.main import main
from ris_nb.contract import Batch, RISError
from ris_nb.data.batches import ReferralDataset
from ris_nb.data.refer import Referral
from ris_nb.data.sources import open_data
from ris_nb.data.tokenizer import SPECIAL, build_vocabulary
from ris_nb.data.writer import make_refshapes
from ris_nb.evaluation.evaluate import evaluate
from ris_nb.models import sag
from ris_nb.models.modality_fusion import SCHEMES
from ris_nb.models.released_sag import released_sag_key
from ris_nb.models.sag import DotFusion, PatchEntities, SaG, relevance_masks
from ris_nb.registry import create_model, list_models, load_model, register_model
from ris_nb.settings import nested
from ris_nb.studies.sag import SAG_STUDY, floor_scores, sag_scores, sag_study
from ris_nb.training.config import TrainConfig
from ris_nb.training.launch import make_accelerator
from ris_nb.training.loop import LossStep, accumulate_gradients, fit

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SERVER = get_context("forkserver")
VOCABULARY = [*SPECIAL, *"the red blue green ball box left right of".split()]
CASES = ("sag_tiny", "sag_tiny_nointer", "sag_tiny_query", "sag_tiny_random", "sag_tiny_transformer", "sag_full")


@register_model
def sag_speck(pretrained=False, **overrides):
    sizes = dict(image_size=32, vision=dict(patch=8, image_size=32, width=32, depth=1, heads=2), text=dict(width=32, layers=1, heads=2, ffn=32),
                 slots=dict(width=16, gaussians=3, per_gaussian=2, iterations=2, head_width=8, self_head_width=8, ffn=32),
                 fusion=dict(head_width=8, ffn=32), decoder=dict(width=16))
    return create_model("sag_tiny", pretrained, **nested(sizes, overrides))


def small(**overrides):
    """A SaG that runs in milliseconds."""
    torch.manual_seed(0)
    return create_model("sag_speck", vocabulary=VOCABULARY, **overrides).eval()


def some_batch(sentences=3, which=None, seed=1):
    r = torch.Generator().manual_seed(seed)
    words = torch.arange(6) < torch.tensor([2 + i % 4 for i in range(sentences)])[:, None]
    images = sentences if which is None else max(which) + 1
    return Batch(torch.randn(images, 3, 32, 32, generator=r), torch.randint(5, 14, words.shape, generator=r) * words, words,
                 None if which is None else torch.tensor(which), image_id=list(range(images)))


def some_noise(model, images=3, seed=2):
    return torch.randn(images, *model.seeded_noise.shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# The released network

def arguments(case):
    """What a released state dict doesn't tell, for `from_released`."""
    options = case.spec["options"]
    if not options:
        return {}
    per_gaussian = options["cascade_factor"]
    slots = dict(iterations=options["agg_depth"], per_gaussian=per_gaussian, gaussians=options["img_num_embeds"] // per_gaussian,
                 competition="pixels" if options.get("agg_cross_attn_type") == "transformer" else "slots")
    return dict(slots=slots, image_size=options["crop_size"], text=dict(heads=case.spec["bert"]["num_attention_heads"]))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name == "sag_full" else []) for name in CASES])
def test_released_numbers(name):
    if find_case(name) is None:
        pytest.skip("the full-size reference does not ship")
    case = load_case(name)
    model = SaG.from_released(released_state(case), **arguments(case))
    image, ids, eps = sag_inputs(case)
    batch, tokens = Batch(image, ids, ids != 0), []
    model.vision.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    output = model(batch, eps)
    losses, extra = model.losses(output, batch), output.extra
    z, (_, V_hat, alpha) = model.compare(output, batch)[0], model.repaint(output)
    similarity = torch.einsum("bd,nbd->bn", extra["text"], z)
    found = {"txt_emb": extra["text"][:, None], "slots_init": model.entities.slots(len(image), eps), "slots": extra["slots"],
             "A_slot": extra["A_slot"], "A_fuse": extra["A_fuse"], "cm_feat": z, "c3_sim": similarity, "c3": losses["c3"],
             "recon_loss": losses["reconstruction"], "alpha": alpha, "maps": output.score.flatten(1),
             "vit_tokens": tokens[0][:, ::16] if name == "sag_full" else tokens[0],
             "recon": V_hat[:, ::16] if name == "sag_full" else V_hat}
    stored = set(case.arrays) - {"token_ids", "lengths", "image", "eps", "I_U"}
    assert stored <= set(found)
    for key in stored:
        close(found[key].detach(), case[key].float(), 2e-5)

    for i, (mask, shape) in enumerate(zip(model.masks(output, case.spec["label_shapes"]), case.spec["label_shapes"])):
        label = torch.zeros(shape, dtype=torch.bool)
        label[20 + 5 * i:70 + 5 * i, 30:110 - 10 * i] = True
        close(torch.tensor([(mask & label).sum(), (mask | label).sum()]).double(), case["I_U"][i].double(), 2)

    sum(losses.values()).backward()
    weights = dict(model.named_parameters())
    for key, norm in case.spec["grad_norms"].items():
        grad = weights[released_sag_key(key, "random" if name == "sag_tiny_random" else "entity")].grad
        assert abs((0 if grad is None else grad.norm().item()) - norm) < 1e-5 * max(1, norm), key


def test_matching_pairs_are_those_of_all_pairs():
    """A mask asks each sentence's own image alone, and gets what the loss gets for it among all pairs."""
    model, noise = small(), some_noise(small(), 2)
    batch = some_batch(3, [1, 0, 1])
    with torch.no_grad():
        output = model(batch, noise)
        _, A_fuse = model.fusion.all_pairs(output.extra["text"], *model.fusion.project(output.extra["slots"]))
    close(output.extra["A_fuse"], A_fuse[batch.which, torch.arange(3)], 1e-6)
    assert set(output.extra) == {"V", "slots", "A_slot", "A_fuse", "text", "autocast"}


@pytest.mark.parametrize("changes", [{}, dict(fusion=dict(attention=False)), dict(loss=dict(false_negatives="drop")), SAG_STUDY["attention over patches"]])
def test_losses_without_gradients(changes):
    """`forward` answers the same and `losses` gives the same values where no gradient is recorded."""
    model, batch = small(**changes), some_batch(3, [1, 0, 1])
    noise = some_noise(model, 2)
    recorded = model(batch, noise)
    expected = model.losses(recorded, batch)
    with torch.no_grad():
        output = model(batch, noise)
        losses = model.losses(output, batch)
    assert set(losses) == set(expected) and not any(value.requires_grad for value in losses.values())
    assert torch.equal(output.score, recorded.score)
    for name, value in losses.items():
        close(value, expected[name].detach(), 1e-6)


def test_inference_computes_nothing_for_the_loss(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("part of the loss was computed")
    model, batch = small(), some_batch()
    for part, name in ((model.fusion, "all_pairs"), (model.fusion, "read"), (model.fusion.value, "forward"), (model.decoder, "forward")):
        monkeypatch.setattr(part, name, fail)
    monkeypatch.setattr(sag, "reconstruct", fail)
    assert len(model.masks(model(batch), [(9, 7)] * 3)) == 3


def test_sizes_are_read_off_the_weights(tmp_path):
    case = load_case("sag_tiny")
    state = released_state(case)
    known = dict(slots=dict(per_gaussian=3), text=dict(heads=4), image_size=112)
    tied = {key.replace("agg_blocks.0.", f"agg_blocks.{t}."): value for key, value in state.items() for t in range(3)}
    assert len(tied) > len(state)
    wrapped = {f"module.{key}": value.clone() for key, value in tied.items()}
    torch.save({"model": wrapped, "epoch": 49}, tmp_path / "best.pth")
    save_file({key: value.clone() for key, value in tied.items()}, tmp_path / "best.safetensors")
    first = SaG.from_released(state, **known | {"slots.iterations": 3})
    for source in (tied, wrapped, tmp_path / "best.pth", str(tmp_path / "best.safetensors")):
        model = SaG.from_released(source, **known)  # a checkpoint that repeats them tells the number of iterations
        assert model.entities.iterations == 3 and all((a == b).all() for a, b in zip(first.parameters(), model.parameters()))
    assert SaG.from_released(state, **known).entities.iterations == 6
    assert (model.vision.depth, model.vision.width, model.vision.patch_embed.img_size) == (2, 192, (480, 480))
    assert model.seeded_noise.shape == (6, 32) and not model.training


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_a_checkpoint_of_the_training_script_is_read(core, tmp_path):
    """SaG's script keeps its arguments and a numpy.float64 beside the weights; numpy 1 and 2 name what makes it otherwise."""
    state = released_state(load_case("sag_tiny"))
    torch.save({"args": Namespace(lr=5e-5), "iou": np.float64(0.34), "best": np.int64(7), "epoch": 49, "model": state}, tmp_path / "saved.pth")
    with zipfile.ZipFile(tmp_path / "saved.pth") as saved, zipfile.ZipFile(tmp_path / "best.pth", "w") as renamed:
        ours = f"c{np.float64(0).__reduce__()[0].__module__}\nscalar".encode()
        for name in saved.namelist():
            part = saved.read(name)
            assert not name.endswith("data.pkl") or ours in part
            renamed.writestr(name, part.replace(ours, f"c{core}.multiarray\nscalar".encode()))
    known = dict(slots=dict(per_gaussian=3), text=dict(heads=4), image_size=112)
    model, direct = SaG.from_released(tmp_path / "best.pth", **known), SaG.from_released(state, **known)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), direct.state_dict().values(), strict=True))


class Hostile:
    """Unpickling one runs code: it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("wrap, named", [
    (lambda evil: evil, "holds .*mkdir, and what is no tensor"), (lambda evil: Namespace(lr=evil), "holds .*mkdir"),
    (lambda evil: np.array([evil], dtype=object), "holds numpy.*_reconstruct"), (lambda evil: np.float64(0.34), "")])
def test_a_checkpoint_that_would_run_code_is_refused(wrap, named, tmp_path):
    extra = {"iou": np.float64(0.34), "args": wrap(Hostile(tmp_path / "made"))}
    torch.save({"model": released_state(load_case("sag_tiny")), **extra}, tmp_path / "best.pth")
    if named:
        with pytest.raises(RISError, match=named) as caught:
            SaG.from_released(tmp_path / "best.pth")
        assert "\n" not in str(caught.value)
    else:
        SaG.from_released(tmp_path / "best.pth", slots=dict(per_gaussian=3), text=dict(heads=4), image_size=112)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("cma.ff.norm.bias"), r"1 missing: fusion\.feed_forward\.0\.bias"),
    (lambda s: s.update({"decoder.mlp.8.weight": torch.zeros(2)}), r"1 unknown: decoder\.mlp\.8\.weight"),
    (lambda s: s.update({"encoders.txt_enc.linear.bias": torch.zeros(7)}), r"1 misshapen: encoders\.txt_enc\.linear\.bias is \(7,\)"),
    (lambda s: s.pop("decoder.mlp.0.weight"), "not a released SaG: it has no entry decoder.mlp.0.weight"),
    (lambda s: s.clear(), "not a released SaG")])
def test_other_weights_are_refused(change, message):
    state = released_state(load_case("sag_tiny"))
    change(state)
    with pytest.raises(RISError, match=message) as caught:
        SaG.from_released(state, slots=dict(per_gaussian=3), text=dict(heads=4))
    assert "\n" not in str(caught.value)


# Invariants

def asked(model, batch, noise):
    output = model(batch, noise)
    return output.score.detach(), model.repaint(output)[1].detach(), model.losses(output, batch)["c3"].detach()


def test_sums_are_one():
    model, batch = small(), some_batch()
    output = model(batch, some_noise(model))
    extra = output.extra
    for shares in (extra["A_slot"], extra["A_fuse"], model.repaint(output)[2]):
        close(shares.sum(1).detach(), torch.ones_like(shares.sum(1)), 1e-6)
    close(extra["A_slot"].mean(1).detach(), torch.full((3, 16), 1 / 6), 1e-6)


def test_noise_within_and_across_gaussians():
    """Slots 0 and 1 are of one Gaussian, 2 of another: swapping the first two renames them, swapping 1 and 2 changes the answer."""
    model, batch = small(), some_batch()
    torch.nn.init.normal_(model.entities.slots.mu)  # at the start Gaussians are barely apart
    noise = some_noise(model)
    before, inside, across = (asked(model, batch, noise[:, order]) for order in ([0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5], [0, 2, 1, 3, 4, 5]))
    for a, b, c in zip(before, inside, across):
        close(a, b, 2e-6)
        assert (a - c).abs().max() > 1e-4 * a.abs().max()


def test_order_of_the_batch():
    model, batch, noise = small(), some_batch(), some_noise(small())
    order = [2, 0, 1]
    turned = Batch(batch.image[order], batch.ids[order], batch.words[order])
    (score, V_hat, c3), (score2, V_hat2, c3_2) = asked(model, batch, noise), asked(model, turned, noise[order])
    close(score[order], score2, 2e-6)
    close(V_hat[order], V_hat2, 2e-6)
    close(c3, c3_2, 2e-6)


def test_equal_images_give_log_b():
    model, batch, noise = small(), some_batch(), some_noise(small())
    batch.image, noise = batch.image[:1].expand(3, -1, -1, -1), noise[:1].expand(3, -1, -1)
    close(asked(model, batch, noise)[2], torch.tensor(math.log(3)), 1e-6)


def test_stop_gradient_concerns_the_text_alone(monkeypatch):
    """Without it the text encoder's gradient differs; everything else has the same one."""
    grads = []
    for detach in (True, False):
        model, batch = small(loss=dict(reconstruction=0.0)), some_batch()
        c3 = sag.c3_loss
        monkeypatch.setattr(sag, "c3_loss", lambda *args: c3(*args[:5], detach=detach))
        sum(model.losses(model(batch, some_noise(model)), batch).values()).backward()
        monkeypatch.undo()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    changed = {name for name in grads[0] if not torch.allclose(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-8)}
    assert changed and all(name.startswith(("text.", "sentence.")) for name in changed)


def test_images_get_no_gradient_from_their_reconstruction_as_target():
    model = small()
    V, slots = torch.randn(2, 16, model.vision.width, requires_grad=True), torch.randn(2, *model.seeded_noise.shape, requires_grad=True)
    sag.reconstruct(model.decoder, slots, (4, 4), V)[0].backward()
    assert V.grad is None and slots.grad.abs().sum() > 0


# Inference

def test_nothing_depends_on_the_company():
    """A sentence gets the same mask alone, among others, and beside other sentences about its image."""
    model, batch = small(), some_batch(5, [0, 0, 1, 2, 2])
    with torch.no_grad():
        together = model(batch)
        for b, n in enumerate(batch.which):
            alone = model(Batch(batch.image[n:n + 1], batch.ids[b:b + 1], batch.words[b:b + 1]))
            close(alone.score[0], together.score[b], 2e-6)


@pytest.mark.parametrize("noise", ["seeded", "mean"])
def test_predictions_repeat(noise):
    model, batch = small(noise=noise), some_batch()
    with torch.no_grad():
        a, b = model(batch).score, model(batch).score
        assert (a == b).all()
        means = model(batch, torch.zeros_like(some_noise(model))).score
    assert torch.allclose(a, means, atol=1e-6) == (noise == "mean")
    model.train()
    assert (model(batch).extra["slots"] != model(batch).extra["slots"]).any()  # training draws anew


def test_schemes():
    model, batch = small(), some_batch()
    with torch.no_grad():
        extra = model(batch).extra
        for model.scheme in SCHEMES:
            score = model(batch).score.flatten(1)
            best = {"max": extra["A_fuse"].argmax(1), "min": extra["A_fuse"].argmin(1)}.get(model.scheme)
            if best is not None:
                close(score, extra["A_slot"][torch.arange(3), best], 1e-6)
        assert model.scheme == "average" and np.ptp(score.numpy()) < 1e-6  # says nothing


def test_masks_are_stretched_after_upsampling():
    score = torch.tensor([[[0.2, 0.2], [0.2, 0.3]], [[0.5, 0.5], [0.5, 0.5]]])
    mask, empty = relevance_masks(score, [(4, 6), (3, 3)])
    assert mask.shape == (4, 6) and mask[3, 5] and not mask[0, 0] and not empty.any()
    fine = torch.nn.functional.interpolate(score[:1, None], size=(4, 6), mode="bilinear", align_corners=False)[0, 0]
    assert (mask == ((fine - 0.2) / (fine.max() - 0.2) >= 0.5)).all()
    low, = relevance_masks(score[:1], [(4, 6)], 0.1)
    assert low.sum() > mask.sum()
    half, = relevance_masks(score[:1].bfloat16(), [(64, 64)])
    assert half.dtype == torch.bool and half.any()
    with pytest.raises(ValueError):
        relevance_masks(score, [(4, 4)])


# Training without a mask

@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    make_refshapes(root, "refshapes", counts={"train": 16, "val": 8})
    return open_data(root, "refshapes")


def forbid(*_, **__):
    raise AssertionError("a mask was read")


def test_training_reads_no_mask(scenes, tmp_path, monkeypatch):
    """Not by the data set, not by the loop, not by the loss, and not by the command, which doesn't pick weights by masks either."""
    monkeypatch.setattr(Referral, "mask", forbid)
    out = StringIO()
    with redirect_stdout(out), redirect_stderr(StringIO()):
        code = main(["train", "--root", str(scenes.root), "--model", "sag_speck", "--steps", "3", "--warmup", "0", "--batch-size", "4",
                         "--out", str(tmp_path)])
    assert code == 0 and "val_" not in out.getvalue() and isinstance(load_model(tmp_path), SaG)
    with pytest.raises(AssertionError, match="a mask was read"), redirect_stdout(out), redirect_stderr(StringIO()):
        main(["evaluate", "--root", str(scenes.root), "--checkpoint", str(tmp_path)])


def test_masks_can_be_absent(scenes, tmp_path):
    referrals = [replace(r, segmentation=None) for r in scenes.referrals("train")]
    assert not any(r.has_mask for r in referrals)
    model = speaking(referrals)
    dataset = ReferralDataset(referrals, model.tokenizer, model.transform, masks=model.needs_masks)
    assert dataset[0].mask is None
    history = fit(model, dataset, TrainConfig(steps=3, batch_size=4, lr=1e-3, log_every=1), tmp_path, progress=False)
    assert abs(history[0]["c3"] - math.log(4)) < 0.3 and history[0]["reconstruction"] > 0
    assert history[0]["loss"] == pytest.approx(history[0]["c3"] + history[0]["reconstruction"], abs=1e-5)


def speaking(referrals, **overrides):
    torch.manual_seed(0)
    return create_model("sag_speck", vocabulary=build_vocabulary(s.text for r in referrals for s in r.sentences), **overrides)


@pytest.mark.skipif(not (SHARED / "mini_refcoco_text").is_dir(), reason="needs the photos of ../shared/data")
def test_real_photos_without_masks(tmp_path):
    out, data = StringIO(), ["--dataset", "refcoco", "--split-by", "unc"]
    with redirect_stdout(out), redirect_stderr(StringIO()):
        codes = [main(["train", "--root", str(SHARED / "mini_refcoco_text"), *data, "--model", "sag_speck", "--steps", "2",
                           "--warmup", "0", "--batch-size", "4", "--out", str(tmp_path)]),
                 main(["evaluate", "--root", str(SHARED / "mini_refcoco"), *data, "--checkpoint", str(tmp_path)])]
    assert codes == [0, 0] and "mIoU" in out.getvalue()


def test_an_image_is_encoded_once_for_all_its_sentences(scenes):
    referrals = scenes.referrals("val")
    model, seen = speaking(referrals), []
    model.vision.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    report = evaluate(model, ReferralDataset(referrals, model.tokenizer, model.transform, every=True), progress=False)
    assert sum(seen) == len({r.image_path for r in referrals}) < report.expressions == sum(len(r.sentences) for r in referrals)


# Losses

def test_false_negatives_can_be_dropped():
    """Two copies of one image in a batch: by default each is the other's negative."""
    batch = some_batch(4)
    batch.image = batch.image[[0, 1, 2, 0]]
    batch.image_id = ["a", "b", "c", "a"]
    keep, drop = small(), small(loss=dict(false_negatives="drop"))
    noise = some_noise(keep, 4)
    losses = {}
    for name, model in (("keep", keep), ("drop", drop)):
        output = model(batch, noise)
        losses[name] = model.losses(output, batch)["c3"].item()
    s = torch.einsum("bd,nbd->bn", output.extra["text"], drop.compare(output, batch)[0]) / drop.temperature
    s[0, 3] = s[3, 0] = -math.inf
    assert losses["drop"] == pytest.approx(torch.nn.functional.cross_entropy(s, torch.arange(4)).item(), abs=1e-6)
    assert losses["drop"] < losses["keep"]


def test_weights_of_the_losses():
    batch = some_batch()
    noise = some_noise(small())
    plain, weighted = small(), small(loss=dict(c3=0.5, reconstruction=3.0))
    one, other = (model.losses(model(batch, noise), batch) for model in (plain, weighted))
    assert other["c3"].item() == pytest.approx(0.5 * one["c3"].item()) and other["reconstruction"].item() == pytest.approx(3 * one["reconstruction"].item())
    alone = small(loss=dict(reconstruction=0.0))
    output = alone(batch, noise)
    assert list(alone.losses(output, batch)) == ["c3"]
    assert not any(p.requires_grad for p in alone.decoder.parameters())


@pytest.mark.parametrize("row", SAG_STUDY)
def test_every_row_of_the_study_trains(row):
    """One step reaches every parameter but for those that can't change anything, and the answer has a shape.

    float64 tells a gradient that is zero, and at most rounding noise, from a small one.
    """
    changes = SAG_STUDY[row]
    torch.manual_seed(0)
    model = create_model("sag_speck", vocabulary=VOCABULARY, **changes).train().double()
    batch = some_batch(4, None)
    batch.expression = ["the box on the left"] * 4
    batch.image = batch.image.double()
    output = model(batch)
    losses = model.losses(output, batch)
    sum(losses.values()).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is not None and p.grad.abs().max() > 1e-12}
    idle = {"text.bert.encoder.layer.0.attention.self.key.bias"}  # adds the same to all scores of a query: softmax does not see it
    slots = changes.get("slots", {})
    if slots.get("discovery", True):
        if slots.get("competition") != "pixels":
            idle.add("entities.aggregation.norm.bias")  # likewise, to the scores of all slots that compete for a pixel
        if slots.get("per_gaussian") == 1:
            idle |= {"entities.interaction.query.weight", "entities.interaction.key.weight"}  # attention over one slot is always 1
    assert {name for name, p in model.named_parameters() if p.requires_grad} - trained == idle
    assert output.score.shape == (4, 4, 4) and len(model.masks(output, [(9, 7)] * 4)) == 4
    assert model.eval() is model and len(list(model.losses(model(batch), batch))) == len(losses)


def test_alternatives():
    batch = some_batch(3, [0, 1, 1])
    patches = small(**SAG_STUDY["attention over patches"])
    with torch.no_grad():
        output = patches(batch)
    assert isinstance(patches.entities, PatchEntities)
    close(output.score.flatten(1), output.extra["A_fuse"])  # each patch is its own entity
    dots = small(fusion=dict(attention=False))
    with torch.no_grad():
        output = dots(batch)
    assert isinstance(dots.fusion, DotFusion)
    t, S = output.extra["text"], output.extra["slots"][batch.which]
    close(output.extra["A_fuse"], (torch.einsum("bd,bkd->bk", t, S) / 4).softmax(-1), 1e-6)


def test_bf16():
    batch = some_batch()
    model = small().train()
    full, half = (LossStep(model, precision) for precision in ("no", "bf16"))
    torch.manual_seed(0)
    a = full(batch)
    torch.manual_seed(0)
    b = half(batch)
    for name in a:
        assert b[name].dtype == torch.float32 and b[name].item() == pytest.approx(a[name].item(), rel=0.05)
    sum(b.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# Several processes

def member(rank, world, port, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    accelerator = make_accelerator()
    model = small(slots=dict(kind="query"), loss=dict(false_negatives="drop")).train()
    step = accelerator.prepare(LossStep(model))
    batch, share = some_batch(4), slice(4 // world * rank, 4 // world * (rank + 1))
    batch = Batch(batch.image[share], batch.ids[share], batch.words[share], image_id=["a", "b", "c", "a"][share])
    values = accumulate_gradients(accelerator, step, iter([batch]))
    values = accelerator.reduce(torch.stack(list(values.values())), "mean")
    torch.save({"values": values, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}, Path(folder) / f"{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_compare_with_the_whole_batch(tmp_path):
    """Each sentence meets the images of the other process, too: losses and gradients are those of one process."""
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [SERVER.Process(target=member, args=(rank, world, port, str(tmp_path))) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
        assert [process.exitcode for process in processes] == [0] * world
    one, first, second = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for name in one:
        for other in (first, second):
            close(one[name], other[name])


# What is refused

def test_registered_sizes():
    assert {"sag_tiny", "sag_vit_small", "sag_vit_small_scripts"} <= set(list_models())
    with torch.device("meta"):
        paper, scripts = (create_model(name, vocabulary=SPECIAL) for name in ("sag_vit_small", "sag_vit_small_scripts"))
    assert (paper.entities.slots.mu.shape, scripts.entities.slots.mu.shape) == ((1, 18, 512), (1, 12, 512))
    # 145,955,305 in the release, and of those what nothing reads: ViT's head, `residual_fc`, `set_pred_module.fc` and BERT's pooler
    assert sum(p.numel() for p in scripts.parameters()) == 145_955_305 - (384 * 1000 + 1000) - 197_120 - 525_312 - 590_592
    assert paper.lr_factors == {"vision": 0.1} and not SaG.needs_masks
    tiny = create_model("sag_tiny", vocabulary=VOCABULARY)
    assert sum(p.numel() for p in tiny.parameters()) < 2.5e6
    started = create_model("sag_tiny", pretrained=True)
    assert started.frozen == ("vision",) and {p.requires_grad for p in started.vision.parameters()} == {False}
    with pytest.raises(RISError, match="pretrained ViT has vision.heads=.*pretrained=False"):
        create_model("sag_tiny", pretrained=True, vision=dict(heads=1))
    with pytest.raises(RISError, match="knows no words"):
        create_model("sag_tiny").predict([np.zeros((9, 9, 3), np.uint8)], ["a ball"])


@pytest.mark.parametrize("options, message", [
    (dict(noise="loud"), "noise must be one of seeded, mean"), (dict(scheme="best"), "scheme must be one of weighted, area, max, min, average"),
    (dict(slots=dict(kind="none")), "slots are entity, random, query"), (dict(loss=dict(false_negatives="hide")), "keep, drop"),
    (dict(slots=dict(competition="words")), "competition"), (dict(loss=dict(reconstruction=-1.0)), "at least 0"), (dict(slots=dict(discovery=False)), "reconstruction must be 0"),
    (dict(loss=dict(temperature=0.0)), "temperature"), (dict(slots=dict(width=30)), "4 divides"),
    (dict(slots=dict(gaussian=3)), "SaG's slots has no setting 'gaussian'; it takes kind, width, gaussians"), (dict(loss=3), "loss is a group of settings \\(c3, ")])
def test_bad_arguments(options, message):
    with pytest.raises(RISError, match=message) as caught:
        model = small(**options)
        model.losses(model(some_batch()), some_batch())
    assert "\n" not in str(caught.value)


def test_mirrored_negatives():
    """The mirrored picture is one more image, for all sentences but those that stay true of it."""
    batch = some_batch(4, [0, 0, 1, 2])
    batch.expression = ["the left box", "the red box", "the ball", "far right"]
    plain, model = small().train(), small(loss=dict(mirrored=True)).train()
    noise = some_noise(model)
    output = model(batch, noise)
    with torch.no_grad():
        torch.manual_seed(0)
        z, own, same = model.compare(output, batch)
        assert own.tolist() == [0, 0, 1, 2] and z.shape[0] == 3 + 3
        assert same[:, :3].any().item() is False  # of image 1, which has no side, the mirrored one is no negative for anybody
        assert same[:, 3:].tolist() == [[False, True, False], [True, True, False], [False, True, False], [False, True, False]]
        torch.manual_seed(0)
        turned = model.encode_image(batch.image.flip(-1))[1]
        close(z[3:], model.fusion.all_pairs(output.extra["text"], *model.fusion.project(turned))[0])
        close(z[:3], plain.compare(plain(batch, noise), batch)[0])
        assert model.losses(output, batch)["c3"] > plain.losses(plain(batch, noise), batch)["c3"]
        assert model.eval().compare(output, batch)[2] is None  # in training alone
        batch = replace(batch, ids=batch.ids[1:], words=batch.words[1:], which=None, expression=["a box", "far right", "the left box"])
        output, model = model(batch, noise), model.train()
        torch.manual_seed(0)
        z, own, same = model.compare(output, batch)
        assert own.tolist() == [0, 1, 2] and same.shape == (3, 3 + 2) and not same.any()  # images 1 and 2 alone are mirrored
        torch.manual_seed(0)
        turned = model.encode_image(batch.image[1:].flip(-1))[1]
        close(z[3:], model.fusion.all_pairs(output.extra["text"], *model.fusion.project(turned))[0])
        batch.expression = ["a box"] * 3
        assert model.compare(output, batch)[0].shape[0] == 3


def test_study(scenes, tmp_path):
    train = scenes.referrals("val")
    figures = floor_scores(train, speaking(train).tokenizer)
    assert 0 < figures["refshapes mIoU, whole image"] < 0.2 and figures["refshapes mIoU"] == max(
        value for name, value in figures.items() if "mIoU" in name)
    scored = sag_scores(speaking(train), {"val": train, "testA": train})
    assert {"refshapes mIoU", "refshapes oIoU", "refshapes mIoU, shuffled", "refshapes mIoU, area", "refshapes testA oIoU, max"} <= set(scored)
    assert scored["gathering"]["all"]["iou"] == pytest.approx(scored["refshapes mIoU"])
    rows = sag_study(scenes.root, steps=2)
    assert "LAVT, with masks" not in sag_study(scenes.root, dataset="reftoys")
    assert {"SaG", "no interaction", "LAVT, with masks", "no model"} <= set(rows)
    found = rows["no model"](0, tmp_path)
    assert "refshapes mIoU" in found
