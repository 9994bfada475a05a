"""MagNet: the same numbers as the released network, its two quirks and their repair, and clear errors."""
import copy
import re
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.utils import convert_to_fp32
from parity import find_case, load_case, make_inputs, released_state
from safetensors.torch import save_file

from ris_nb.contract import Batch, RISError
from ris_nb.data.batches import collate
from ris_nb.data.tokenizer import SPECIAL
from ris_nb.encoders.pretraining import pretrained_namer
from ris_nb.models import released_magnet
from ris_nb.models.layers import upsample
from ris_nb.models.magnet import MagNet, shrink_mask, supervise
from ris_nb.models.mask_grounding import Grounded
from ris_nb.models.released_magnet import fetch_released
from ris_nb.registry import create_model, list_models, load_model
from ris_nb.settings import nested
from ris_nb.training.config import TrainConfig
from ris_nb.training.loop import fit

VOCABULARY = [*SPECIAL, "the", "red", "ball", "left"]


@pytest.fixture(scope="module")
def case():
    return load_case("magnet_tiny")


@pytest.fixture(scope="module")
def state(case):
    return released_state(case)


def small(**overrides):
    """A MagNet that runs in milliseconds."""
    torch.manual_seed(0)
    sizes = dict(vocabulary=VOCABULARY, vision=dict(width=16, depths=(1, 2, 1), heads=(1, 2, 4)), text=dict(width=32, heads=2, ffn=32),
                 decoder=dict(width=32, heads=2, points=2, pixel_layers=1, pixel_ffn=32, layers=2, ffn=32), alignment=dict(pixels=1024))
    return create_model("magnet_tiny", **nested(sizes, overrides)).eval()


def some_batch(lens=(4, 9, 20), images=None, size=64):
    torch.manual_seed(1)
    words = torch.arange(20) < torch.tensor(lens)[:, None]
    image = torch.randn(images or len(lens), 3, size, size)
    return Batch(image, torch.randint(5, 9, words.shape) * words, words, mask=torch.rand(len(lens), size, size) > 0.8)


def open_gates(model):
    """As training may open them: language gates away from zero."""
    for read in model.encoder.language_alignments:
        for p in read.gate.parameters():
            torch.nn.init.normal_(p, std=0.2)
    return model


def total(model, batch):
    return sum(model.losses(model(batch), batch).values())


@torch.no_grad()
def computed(model, image, ids, words, thin):
    """Everything the references store, as our model computes it; `thin` cuts a map as the reference was cut."""
    caught = []
    hook = model.encoder.register_forward_hook(lambda module, inputs, output: caught.extend(output))
    output = model(Batch(image, ids, words))
    hook.remove()
    maps = {f"s{k + 1}": thin(s.permute(0, 3, 1, 2)) for k, s in enumerate(caught[0])}
    texts = {f"l{k + 1}": l for k, l in enumerate(caught[1])}
    score = output.score[:, None]
    return {**maps, **texts, "mask_features": output.pixel_features[..., ::4, ::4], "pred_masks": score,
            "aux_masks": output.extra["aux_masks"][:, :, None], "pred_logits": output.extra["class_logits"][-1][:, None],
            "prob": upsample(output.score, image.shape[-2:])[:, None, ::4, ::4].sigmoid()}


def assert_parity(case, model, thin):
    ours = computed(model, *make_inputs(case), thin)
    assert set(ours) == set(case.arrays) - {"image", "ids", "mask"}
    for name, value in ours.items():
        assert value.shape == case[name].shape, name
        assert (value - case[name]).abs().max() < 1e-4, name


def test_tiny_parity(case, state):
    model = MagNet.from_released(state, text=dict(heads=12))
    assert sum(p.numel() for p in model.parameters()) == case.spec["n_params"]
    assert_parity(case, model, thin=lambda s: s)


@pytest.mark.slow
@pytest.mark.skipif(find_case("magnet_full") is None, reason="the 480-pixel reference does not ship with the repository")
@pytest.mark.timeout(600)
def test_full_parity():
    case = load_case("magnet_full")
    model = MagNet.from_released(released_state(case))
    assert sum(p.numel() for p in model.parameters()) == case.spec["n_params"] == 296_984_954
    assert_parity(case, model, thin=lambda s: s[..., ::8, ::8] if s.shape[-1] > 30 else s[..., ::3, ::3])


@pytest.mark.parametrize("layout", ["parts", "wrapped", "safetensors"])
def test_from_released_reads_files(state, tmp_path, layout):
    path = tmp_path / ("w.safetensors" if layout == "safetensors" else "w.pth")
    extra = {"epoch": 1, "args": Namespace(lr=5e-5), "optimizer": {"state": {}, "param_groups": [{"lr": 5e-5}]}}
    if layout == "parts":
        pooler = {"language_model.pooler.dense.bias": torch.zeros(768), "language_model.embeddings.position_ids": torch.arange(512)}
        torch.save({"model": state | pooler, **extra}, path)
    elif layout == "wrapped":
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
    else:
        save_file(state, path)
    model, direct = MagNet.from_released(str(path)), MagNet.from_released(state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), direct.state_dict().values(), strict=True))


def test_from_released_names_what_does_not_fit(state):
    key = "image_model.layers.0.res_gate.0.weight"
    with pytest.raises(RISError, match="1 unknown: language_model.head.weight"):
        MagNet.from_released(state | {"language_model.head.weight": torch.zeros(1)})
    with pytest.raises(RISError, match="1 missing: encoder.image_alignments.0.gate.layers.0.weight"):
        MagNet.from_released({k: v for k, v in state.items() if k != key})
    with pytest.raises(RISError, match=r"1 misshapen: .*res_gate.0.weight is \(32, 31\), not \(32, 32\)"):
        MagNet.from_released(state | {key: torch.zeros(32, 31)})
    with pytest.raises(RISError, match="not a released MagNet: it has no entry image_model.patch_embed"):
        MagNet.from_released(released_state(load_case("lavt_tiny")))
    with pytest.raises(RISError, match="heads"):
        MagNet.from_released(state, text=dict(heads=7))


def test_fetching_from_the_hub(state, tmp_path, monkeypatch):
    asked = []
    def download(repository, name):
        asked.append((repository, name))
        return str(tmp_path / "w.pth")
    torch.save(state, tmp_path / "w.pth")
    monkeypatch.setattr(released_magnet, "hf_hub_download", download)
    monkeypatch.setattr(released_magnet, "list_repo_files", lambda repository: ["README.md", "best.pth"])
    MagNet.from_released("owner/weights")
    MagNet.from_released("owner/weights/folder/other.pth")
    assert asked == [("owner/weights", "best.pth"), ("owner/weights", "folder/other.pth")]
    monkeypatch.setattr(released_magnet, "list_repo_files", lambda repository: ["a.pth", "b.pth"])
    with pytest.raises(RISError, match=r"holds 2 files of weights \(a.pth, b.pth\); name one: owner/weights/FILE"):
        fetch_released("owner/weights")


def test_hub_out_of_reach(monkeypatch, tmp_path):
    def fail(*arguments):
        raise OSError("no network")
    monkeypatch.setattr(released_magnet, "list_repo_files", fail)
    with pytest.raises(RISError, match="owner/weights: it is no such file and can't be fetched from the Hugging Face Hub"):
        MagNet.from_released("owner/weights")
    for path in ("runs/absent.pth", tmp_path / "absent.pth", "absent"):
        with pytest.raises(RISError, match="no such checkpoint"):
            MagNet.from_released(path)


def test_released_model_saves_and_loads(state, case, tmp_path):
    model = MagNet.from_released(state, text=dict(heads=12))
    model.save_pretrained(tmp_path)
    image, ids, words = make_inputs(case)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(Batch(image, ids, words)).score, model(Batch(image, ids, words)).score)
    with pytest.raises(RISError, match="knows no words"):
        model.predict([image[0].clamp(0, 1).mul(255).byte().permute(1, 2, 0).numpy()], ["a ball"])


def test_first_stage_runs_once_an_image():
    model, batch = small(), some_batch(lens=(4, 9, 20, 5), images=2)
    seen = []
    for stage in model.encoder.vision.stages:
        stage[0].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with torch.no_grad():
        model(replace(batch, which=torch.tensor([0, 0, 1, 1])))
    assert seen == [2, 4, 4]


def test_sides_read_what_the_other_was_before():
    model = open_gates(small())
    caught = {}
    for name, parts in (("image", model.encoder.image_alignments), ("language", model.encoder.language_alignments)):
        for k, part in enumerate(parts):
            part.register_forward_pre_hook(lambda module, inputs, key=(name, k): caught.update({key: inputs}))
    with torch.no_grad():
        model(some_batch())
    for k in range(3):
        (x, l, _), (l_read, _, x_read) = caught["image", k], caught["language", k]
        assert x is x_read and l is l_read


def test_words_see_the_image_only_when_repaired():
    batch = some_batch(lens=(6, 20))
    same = replace(batch, ids=batch.ids[[1, 1]], words=batch.words[[1, 1]])  # one sentence of two images
    for released in (False, True):
        with torch.no_grad():
            l = open_gates(small(released=released))(same).word_features
        assert ((l[0] - l[1]).abs().max() < 1e-4) == released


def test_released_padding_leaks_once_gates_open():
    batch = some_batch()
    other = replace(batch, ids=torch.where(batch.words, batch.ids, 7))
    with torch.no_grad():
        shut, ajar = small(released=True), open_gates(small(released=True))
        assert torch.equal(shut(batch).score, shut(other).score)
        moved = (ajar(batch).score - ajar(other).score).abs().amax((1, 2))
    assert moved[0] > 1e-6 and moved[1] > 1e-6 and moved[2] == 0  # the third sentence has no padding


def test_released_language_side_never_learns():
    model, batch = small(released=True).double().train(), some_batch()
    batch = replace(batch, image=batch.image.double())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        total(model, batch).backward()
        optimizer.step()
        for name, p in model.encoder.language_alignments.named_parameters():
            assert not p.requires_grad or p.grad.abs().max() == 0, name
            assert "gate" not in name or not p.any()


def test_repaired_language_side_learns():
    model, batch = small().train(), some_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gates = [read.gate.layers for read in model.encoder.language_alignments]
    total(model, batch).backward()
    assert all(second.weight.grad.any() and not first.weight.grad.any() for first, _, second in gates)
    optimizer.step()
    optimizer.zero_grad()
    total(model, batch).backward()
    assert all(first.weight.grad.any() for first, _, second in gates)


@pytest.mark.parametrize("decoder", ["mask", "simple"])
def test_every_trainable_parameter_gets_a_gradient(decoder):
    model, batch = small(decoder=dict(kind=decoder)).train(), some_batch()
    total(model, batch).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert {re.sub(r"\d", "*", n) for n in frozen} <= {
        "encoder.image_alignments.*.gate.layers.*.weight", "mask_decoder.class_embed.weight", "mask_decoder.class_embed.bias"}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_supervise_averages_over_predictions_and_images():
    mask = torch.tensor([[[True, False], [False, False]]])
    right, even = torch.where(mask, 99.0, -99.0)[None], torch.zeros(1, 1, 2, 2)
    cross_entropy, dice = supervise(torch.cat([right, even]), mask)
    torch.testing.assert_close(cross_entropy, torch.tensor(2.0).log() / 2)
    torch.testing.assert_close(dice, torch.tensor((1 - 2 / 4) / 2))  # (2 * 0.5 + 1) / (2 + 1 + 1)
    assert shrink_mask(mask, (1, 1)).tolist() == [[[False]]] and shrink_mask(mask[:, :1], (1, 1)).tolist() == [[[True]]]


def test_empty_and_full_masks_train():
    model, batch = small().train(), some_batch()
    batch.mask[0], batch.mask[1] = False, True
    total(model, batch).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("decoder", ["mask", "simple"])
def test_checkpointing_changes_nothing_but_memory(decoder):
    batch, gradients = some_batch(), []
    for enable in (False, True):
        model = small(decoder=dict(kind=decoder), vision=dict(drop_path=0.3), text=dict(dropout=0.1)).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(5)
        total(copy.deepcopy(model), batch)  # a copy runs, too
        torch.manual_seed(5)
        total(model, batch).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    assert list(model.state_dict()) == list(small(decoder=dict(kind=decoder)).state_dict())
    model.set_grad_checkpointing(False)


def test_other_image_sizes_and_shapes():
    model, batch = small(), some_batch()
    for H, W in ((64, 96), (50, 34), (20, 64)):
        with torch.no_grad():
            output = model(replace(batch, image=torch.randn(3, 3, H, W)))
        assert output.score.shape == (3, -(-H // 4), -(-W // 4)) and output.score.isfinite().all()
        assert [m.shape for m in model.masks(output, [(31, 90)] * 3)] == [(31, 90)] * 3


def test_bf16_autocast_stays_close():
    model, batch = small().train(), some_batch()
    exact = model.losses(model(batch), batch)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch)
    losses = model.losses(replace(output, **convert_to_fp32(vars(output))), batch)
    sum(losses.values()).backward()
    for name, value in losses.items():
        assert value.dtype == torch.float32 and abs(value - exact[name]) < 0.1, name
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


class Scenes(torch.utils.data.Dataset):
    """Eight objects, as the loop wants them."""

    def __init__(self, tokenizer):
        r = np.random.default_rng(0)
        ids, words = tokenizer(["the red ball", "left", "the ball", "red", "the left ball", "ball", "red left", "the red"])
        self.items = [Batch(torch.from_numpy(r.standard_normal((1, 3, 64, 64), np.float32)), i[None], w[None],
                            torch.zeros(1, dtype=torch.int64), torch.from_numpy(r.random((1, 64, 64)) > 0.8), [0])
                      for i, w in zip(ids, words)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index[0] if isinstance(index, tuple) else index]


def test_fit_trains_it_grounded_and_resumes(tmp_path):
    def run(folder, steps, resume=False):
        model = small().for_training().train()
        config = TrainConfig(steps=steps, batch_size=4, lr=1e-3, schedule="constant", log_every=1, save_every=2, precision="bf16")
        return model, fit(model, Scenes(model.tokenizer), config, folder, resume=resume, progress=False)

    whole, history = run(tmp_path / "a", 4)
    assert {"mask", "dice", "alignment", "grounding"} <= set(history[0]) and np.isfinite([h["loss"] for h in history]).all()
    run(tmp_path / "b", 2)
    resumed, again = run(tmp_path / "b", 4, resume=True)
    torch.testing.assert_close(whole.host.state_dict(), resumed.host.state_dict(), rtol=0, atol=0)
    assert type(load_model(tmp_path / "a")) is MagNet


@pytest.mark.parametrize("preset, world", [("magnet_tiny", "refshapes"), ("magnet_toys", "toys")])
def test_pretrained_tiny_starts_from_the_namer(preset, world):
    model = create_model(preset, pretrained=True)
    for name, weight in pretrained_namer(world).swin.state_dict().items():
        assert torch.equal(model.encoder.vision.state_dict()[name], weight), name
    assert model.lr_factors == {"encoder.vision": 0.2} and not create_model(preset).lr_factors
    with pytest.raises(RISError, match=f"{preset}'s pretrained Swin has vision.width=32: .*pretrained=False"):
        create_model(preset, pretrained=True, vision=dict(width=48))


def test_registered_names_and_refusals():
    assert {"magnet_tiny", "magnet_swin_base"} <= set(list_models())
    for wrong, line in ((dict(text=dict(vocab_size=3)), "does not fit"), (dict(text=dict(layers=4)), "shared out evenly over 3 stages"),
                        (dict(decoder=dict(kind="none")), "decoder.kind must be"), (dict(dice=-1.0), "no loss weight below 0"),
                        (dict(alignment=dict(weight=float("nan"))), "no loss weight below 0")):
        with pytest.raises(RISError, match=line):
            small(**wrong)


def test_switches():
    batch = some_batch()
    assert set(small().losses(small()(batch), batch)) == {"mask", "dice", "alignment"}
    off = small(alignment=dict(weight=0.0))
    assert set(off.losses(off(batch), batch)) == {"mask", "dice"} and not off.sentence.weight.requires_grad
    harness, alone = small(grounding=dict(weight=0.3, see=["mask"])).for_training(), small(grounding=dict(weight=0.0))
    assert type(harness) is Grounded and harness.weight == 0.3 and harness.see == ("mask",) and alone.for_training() is alone
    # with the simple decoder and LAVT's weights the mask losses are LAVT's
    simple = small(decoder=dict(kind="simple"), bce=1.0, dice=3.0)
    output = simple(batch)
    lavt = create_model("lavt_tiny", vocabulary=VOCABULARY).losses(output, batch)
    assert all(torch.equal(simple.losses(output, batch)[name], lavt[name]) for name in ("mask", "dice"))


def test_batches_of_the_loader_reach_it():
    model = small()
    batch = collate([Scenes(model.tokenizer)[i] for i in range(3)])
    assert len(model(batch).score) == 3
