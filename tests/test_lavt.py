"""LAVT: the same numbers as the released network, and clear errors for what is not its checkpoint."""
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import find_case, load_case, make_inputs, released_state
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from ris_nb.contract import Batch, RISError
from ris_nb.data.tokenizer import SPECIAL
from ris_nb.encoders.pretraining import pretrained_namer
from ris_nb.models.lavt import LAVT, PWAM, InstanceNorm, LanguageGate
from ris_nb.models.layers import mask_loss
from ris_nb.models.released import load_released, read_released
from ris_nb.registry import create_model, list_models, load_model
from ris_nb.settings import nested

VOCABULARY = [*SPECIAL, "the", "red", "ball", "left"]


@pytest.fixture(scope="module")
def case():
    return load_case("lavt_tiny")


@pytest.fixture(scope="module")
def state(case):
    return released_state(case)


def small(**overrides):
    """A LAVT that runs in milliseconds."""
    torch.manual_seed(0)
    sizes = dict(vocabulary=VOCABULARY, vision=dict(width=16, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8)),
                 text=dict(width=32, heads=2, ffn=32), decoder=dict(width=16), norm="instance", dice=0.0)
    return create_model("lavt_tiny", **nested(sizes, overrides)).eval()


def some_batch(lens=(4, 9, 20), images=None, size=64):
    torch.manual_seed(1)
    words = torch.arange(20) < torch.tensor(lens)[:, None]
    image = torch.randn(images or len(lens), 3, size, size)
    return Batch(image, torch.randint(5, 9, words.shape) * words, words, mask=torch.rand(len(lens), size, size) > 0.8)


@torch.no_grad()
def computed(model, image, ids, words):
    """Everything the references store, as our model computes it."""
    caught = []
    hook = model.decoder.register_forward_pre_hook(lambda module, inputs: caught.extend(inputs[0]))
    output = model(Batch(image, ids, words))
    hook.remove()
    logits = output.extra["logits"]
    large = F.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=True)
    maps = {f"c{k + 1}": c.permute(0, 3, 1, 2) for k, c in enumerate(caught)}
    return {"text": output.word_features, **maps, "logits_lowres": logits, "logits": large}


def test_tiny_parity(case, state):
    model = LAVT.from_released(state, text=dict(heads=12))
    assert sum(p.numel() for p in model.parameters()) == case.spec["n_params"]
    for name, value in computed(model, *make_inputs(case)).items():
        # Instance norm magnifies float32's rounding in c1..c4: the stored maps are 3e-4 from a float64 run themselves.
        limit = 1e-4 * max(1, case[name].abs().max())
        assert (value - case[name]).abs().max() < limit, name


@pytest.mark.slow
@pytest.mark.skipif(find_case("lavt_full") is None, reason="the 480-pixel reference does not ship with the repository")
@pytest.mark.timeout(400)
def test_full_parity():
    case = load_case("lavt_full")
    model = LAVT.from_released(released_state(case))
    assert sum(p.numel() for p in model.parameters()) == case.spec["n_params"] == 227_739_514
    ours = computed(model, *make_inputs(case))
    assert (ours["text"] - case["text"]).abs().max() < 1e-4
    # With these weights pixels read words almost evenly (the gathered text varies by 1e-4), so float32 leaves 9e-4 of doubt
    # in logits of up to 0.9: both the stored ones and ours are that far from a float64 run.
    for name, value in (("logits_lowres", ours["logits_lowres"]), ("logits", ours["logits"][..., ::4, ::4])):
        error = (value - case[name]).abs()
        assert error.max() < 2e-3 and error.mean() < 2e-4, name
        assert ((value[:, 1] > value[:, 0]) == (case[name][:, 1] > case[name][:, 0])).float().mean() > 0.999


@pytest.mark.parametrize("layout", ["parts", "one", "safetensors"])
def test_from_released_reads_files(state, tmp_path, layout):
    backbone = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    bert = {k.removeprefix("bert_model."): v for k, v in state.items() if k.startswith("bert_model.")}
    rest = {"epoch": 1, "args": Namespace(lr=5e-5), "optimizer": {"state": {}, "param_groups": [{"lr": 5e-5}]}}
    path = tmp_path / ("w.safetensors" if layout == "safetensors" else "w.pth")
    if layout == "parts":
        torch.save({"model": backbone, "bert_model": bert | {"pooler.dense.bias": torch.zeros(768)}, **rest}, path)
    elif layout == "one":
        torch.save({"model": backbone | {f"text_encoder.{k}": v for k, v in bert.items()}, **rest}, path)
    else:
        save_file(state, path)
    model, direct = LAVT.from_released(path), LAVT.from_released(state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), direct.state_dict().values(), strict=True))


def test_from_released_names_what_does_not_fit(state):
    key = "model.backbone.layers.0.res_gate.0.weight"
    with pytest.raises(RISError, match="1 unknown: model.backbone.head.weight"):
        LAVT.from_released(state | {"model.backbone.head.weight": torch.zeros(1)})
    with pytest.raises(RISError, match="1 missing: encoder.gates.0.layers.0.weight"):
        LAVT.from_released({k: v for k, v in state.items() if k != key})
    with pytest.raises(RISError, match=r"1 misshapen: .*res_gate.0.weight is \(32, 31\), not \(32, 32\)"):
        LAVT.from_released(state | {key: torch.zeros(32, 31)})
    with pytest.raises(RISError, match="no entry model.backbone.patch_embed"):
        LAVT.from_released({"weight": torch.zeros(1)})
    with pytest.raises(RISError, match="heads"):
        LAVT.from_released(state, text=dict(heads=7))


def test_load_released_loads_all_or_nothing():
    layer = torch.nn.Linear(2, 2)
    before = layer.weight.clone()
    with pytest.raises(RISError, match="missing: bias"):
        load_released(layer, {"weight": torch.ones(2, 2)}, str)
    assert torch.equal(layer.weight, before)


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_read_released_refuses(tmp_path, capsys):
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    torch.save(torch.ones(2), tmp_path / "tensor.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "evil.pth").read_bytes()[:100])
    (tmp_path / "cut.safetensors").write_bytes(b"1234")
    for name, line in {"evil.pth": "may run code", "cut.pth": "cannot be read", "cut.safetensors": "cannot be read",
                       "tensor.pth": "not a state dict", "absent.pth": "no such checkpoint"}.items():
        with pytest.raises(RISError, match=line) as error:
            read_released(tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)
    assert "code ran" not in capsys.readouterr().out


def test_released_model_saves_and_loads(state, case, tmp_path):
    model = LAVT.from_released(state, text=dict(heads=12))
    model.save_pretrained(tmp_path)
    image, ids, words = make_inputs(case)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(Batch(image, ids, words)).score, model(Batch(image, ids, words)).score)
    with pytest.raises(RISError, match="knows no words"):
        model.predict([image[0].clamp(0, 1).mul(255).byte().permute(1, 2, 0).numpy()], ["a ball"])


def test_a_saved_model_answers_as_before(tmp_path):
    model, photo = small(), np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    first, second = again.predict([photo], ["red ball"])[0], model.predict([photo], ["red ball"])[0]
    assert type(again) is LAVT and np.array_equal(first, second) and first.shape == (50, 70)


def test_flops_are_the_released_networks_without_padding_and_the_last_gate():
    with torch.device("meta"):
        model = create_model("lavt_swin_base", vocabulary=SPECIAL).eval()
        one = torch.ones(1, 20, dtype=torch.int64)
        image, f = torch.empty(1, 3, 480, 480), torch.empty(1, 15, 15, 1024)
        with FlopCounterMode(display=False) as ours:
            model(Batch(image, one, one.bool()))
        with FlopCounterMode(display=False) as gate:
            model.encoder.gates[-1](f)
    # two projections, 4 C^2 multiplications a cell, in 18 blocks of stage 3 (30 -> 36 cells a side) and 2 of stage 4 (15 -> 24)
    padding = sum(blocks * 2 * 4 * width**2 * (padded**2 - cells**2)
                  for cells, padded, width, blocks in ((30, 36, 512, 18), (15, 24, 1024, 2)))
    assert (ours.get_total_flops() + gate.get_total_flops() + padding) / 1e9 == pytest.approx(398.0, abs=0.1)  # the released network's


def test_every_trainable_parameter_gets_a_gradient():
    model, batch = small().train(), some_batch()
    sum(model.losses(model(batch), batch).values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        "encoder.gates.3.layers.0.weight", "encoder.gates.3.layers.2.weight"]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_mask_loss_of_extreme_scores_is_finite():
    score = torch.tensor([[[1e4, -1e4]]], requires_grad=True)
    loss = mask_loss(score, torch.tensor([[[False, False]]]))
    loss.backward()
    assert loss.isfinite() and score.grad.isfinite().all()
    torch.testing.assert_close(mask_loss(torch.zeros(2, 3, 3), torch.zeros(2, 3, 3, dtype=torch.bool)), torch.tensor(2.0).log())


def test_masks_follow_the_argmax_and_the_sizes():
    model, batch = small(), some_batch()
    with torch.no_grad():
        output = model(batch)
        large = F.interpolate(output.extra["logits"], size=(64, 64), mode="bilinear", align_corners=True)
    assert torch.equal(torch.stack(model.masks(output, [(64, 64)] * 3)), large.argmax(1) == 1)
    assert [m.shape for m in model.masks(output, [(31, 90), (64, 64), (1, 1)])] == [(31, 90), (64, 64), (1, 1)]
    assert all(m.dtype == torch.bool for m in model.masks(output, [(8, 8)] * 3))


def test_sentence_of_padding_alone_stays_finite():
    pwam = PWAM(8, 4)
    f = pwam(torch.randn(1, 3, 3, 8), torch.randn(1, 5, 4), torch.zeros(1, 5, dtype=torch.bool))
    assert f.isfinite().all()


def test_layer_norm_and_gelu_fit_the_same_modules():
    pwam, gate = PWAM(8, 4, torch.nn.LayerNorm), LanguageGate(8, torch.nn.GELU)
    f = pwam(torch.randn(2, 3, 3, 8), torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.bool))
    assert gate(f).shape == f.shape and sum(p.numel() for p in pwam.query_norm.parameters()) == 16
    assert not list(InstanceNorm(8).parameters())


@pytest.mark.parametrize("preset, world", [("lavt_tiny", "refshapes"), ("lavt_toys", "toys")])
def test_pretrained_tiny_starts_from_the_namer(preset, world):
    model = create_model(preset, pretrained=True)
    for name, weight in pretrained_namer(world).swin.state_dict().items():
        assert torch.equal(model.encoder.vision.state_dict()[name], weight), name
    assert model.lr_factors == {"encoder.vision": 0.2} and not create_model(preset).lr_factors


def test_registered_names_and_refusals():
    assert {"lavt_tiny", "lavt_swin_base"} <= set(list_models())
    with pytest.raises(RISError, match="has vision.width=32: .*pretrained=False"):
        create_model("lavt_tiny", pretrained=True, vision=dict(width=48))
    with pytest.raises(RISError, match="does not fit"):
        small(text=dict(vocab_size=3))


def test_bf16_autocast_runs():
    model, batch = small().train(), some_batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.losses(model(batch), batch)["mask"]
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
