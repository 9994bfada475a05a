"""CRIS: the numbers of the released network, at its sizes and at others; its tokenizer; what it makes of photos that are no squares."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import find_case, load_case, make_weight, released_state
from PIL import Image
from plain_cris import PlainCRIS, released_shapes
from safetensors.torch import save_file

from ris_nb.contract import Batch, RISError
from ris_nb.data.tokenizer import SPECIAL, Tokenizer
from ris_nb.encoders import clip
from ris_nb.models import cris
from ris_nb.models.cris import CRIS, Letterbox, photo_masks
from ris_nb.models.released_cris import released_cris_key
from ris_nb.registry import create_model, list_models, load_model
from ris_nb.settings import nested
from ris_nb.training.optim import param_groups

SMALL = dict(image_size=64, vocabulary=[*SPECIAL, "the", "red", "ball", "left"], max_words=20, vision=dict(layers=(1, 1, 2, 1), width=8, embed=24, size=2),
             text=dict(vocab_size=None, width=16, layers=2, heads=2, max_positions=20), neck=dict(widths=(8, 16, 24)),
             decoder=dict(layers=2, heads=4, ffn=24, dropout=0.0), lr_factors={})


def small(**overrides):
    """A CRIS that runs in milliseconds."""
    torch.manual_seed(0)
    return CRIS(**nested(SMALL, overrides)).eval()


def make_batch(case):
    """The input rule of CRIS, and the label that the json file names."""
    spec, r = case.spec, np.random.RandomState(case.spec["input_seed"])
    B, S, vocab = spec["batch"], spec["img"], spec["vocab"]
    image, ids = r.standard_normal((B, 3, S, S)).astype(np.float32), np.zeros((B, spec["words"]), np.int64)
    for row, n in zip(ids, spec["lens"]):
        row[:n] = [vocab - 2, *r.randint(1, vocab - 2, n - 2), vocab - 1]
    mask = torch.zeros(B, S, S, dtype=torch.bool)
    for i in range(B):
        mask[i, S // 8 + 4 * i:S // 2 + 4 * i, S // 6:S - S // 5 - 6 * i] = True
    words = torch.arange(spec["words"]) < torch.tensor(spec["lens"])[:, None]
    return Batch(torch.from_numpy(image), torch.from_numpy(ids), words, mask=mask)


def parts_of(key):
    """The released name of what is one tensor there and three here."""
    if key.startswith("backbone.transformer") and ".in_proj_" in key:
        return [key.replace("in_proj_", f"{part}_proj.") for part in "qkv"]
    return [key]


def check(case, step=1, pred=1, tolerance=1e-4):
    """Everything that the reference stores, within 1e-4, gradient norms within `tolerance`; maps and score by these steps."""
    spec = case.spec
    model = CRIS.from_released(released_state(case), text=dict(heads=spec["text_width"] // 64 if spec["text_width"] > 64 else spec["text_heads"]),
                               decoder=dict(heads=spec["num_head"]), image_size=spec["img"])
    assert sum(p.numel() for p in model.parameters()) == spec["parameters"] - 1  # CLIP's temperature has no part in it
    batch, caught = make_batch(case), {}
    assert torch.equal(batch.ids, case["ids"].long())
    hooks = [model.encoder.register_forward_hook(lambda module, inputs, maps: caught.update(zip(("c3", "c4", "c5"), maps))),
             model.neck.register_forward_hook(lambda module, inputs, f: caught.update(fq=f))]
    output = model(batch)
    for hook in hooks:
        hook.remove()
    maps = {name: value[..., ::step, ::step] for name, value in {**caught, "dec": output.extra["decoded"]}.items()}
    for name, value in {"word": output.word_features, "state": output.extra["sentence"], **maps, "pred": output.score[:, ::pred, ::pred]}.items():
        assert (value.detach() - case[name]).abs().max() < 1e-4 * max(1, case[name].abs().max()), name
    loss = model.losses(output, batch)["mask"]
    loss.backward()
    assert abs(loss.item() - spec["loss"]) < 1e-4 * max(1, spec["loss"])
    gradients, seen = {name: p.grad for name, p in model.named_parameters()}, set()
    for key, norm in spec["grad_norms"].items():
        names = [released_cris_key(part) for part in parts_of(key)]
        seen |= {*names}
        ours = sum(gradients[name].double().square().sum() for name in names).sqrt().item()
        assert abs(ours - norm) < tolerance * max(1, norm), key
    assert seen == {*gradients}
    return model, batch


def test_tiny_parity():
    model, batch = check(load_case("cris_tiny"))
    torch.testing.assert_close(batch.image, load_case("cris_tiny")["image"])


@pytest.mark.slow
@pytest.mark.skipif(find_case("cris_r50") is None, reason="the 416-pixel reference does not ship with the repository")
@pytest.mark.timeout(600)
def test_r50_parity(monkeypatch):
    """With one image at 13 x 13, PyTorch's gradients of `relu_(y + BN(x))` are wrong where y is a transposed view and the ReLU works in place:
    the biases of `c_proj` and of `connect` are added at one place, and still their stored gradients differ (1.584 and 0.168). Ours, not in
    place, agree with each other, in float64 too. To compare all else we make the reference's mistake. Three more of its 448 norms are 2e-4
    from a float64 run."""
    def in_place(self, x):
        tokens = self.tokens(x)
        y = self.attend(tokens, tokens).transpose(0, 1).contiguous().permute(1, 2, 0).reshape(len(x), -1, *x.shape[-2:])
        return F.relu(y + self.connect(x), inplace=True)

    case = load_case("cris_r50")
    norms = [case.spec["grad_norms"][f"backbone.visual.attnpool.{name}.bias"] for name in ("c_proj", "connect.1")]
    assert norms[0] > 9 * norms[1]
    monkeypatch.setattr(clip.DensePool, "forward", in_place)
    check(case, step=4, pred=2, tolerance=3e-4)


BASE = dict(layers=(1, 1, 1, 1), width=8, embed=24, grid=2, vocab=40, text_width=16, text_layers=2, context=12, fpn=(8, 16, 24), decoder_layers=1, ffn=20)
SIZES = {"small": ({}, (64, 64)), "wide image": ({}, (64, 160)), "the table's own size": (dict(grid=3), (96, 96)), "other depths": (dict(layers=(2, 1, 3, 2), text_layers=1), (32, 64)),
         "other widths": (dict(width=16, embed=16, text_width=32, fpn=(16, 32, 8), ffn=12), (64, 96)), "deep decoder": (dict(decoder_layers=4), (64, 64))}


@pytest.mark.parametrize("changes, size", SIZES.values(), ids=SIZES)
def test_other_sizes_agree_with_a_plain_one(changes, size):
    sizes = {**BASE, **changes}
    state = {key: torch.zeros((), dtype=torch.int64) if key.endswith("tracked") else make_weight(3, key, shape) for key, shape in released_shapes(**sizes).items()}
    model = CRIS.from_released(state, text=dict(heads=2), decoder=dict(heads=4), max_words=9)
    r = torch.Generator().manual_seed(1)
    image, which = torch.randn(2, 3, *size, generator=r), torch.tensor([1, 0, 0, 1, 1])
    lens = torch.tensor([9, 3, 5, 7, 4])
    words = torch.arange(9) < lens[:, None]
    ids = torch.randint(1, 38, (5, 9), generator=r) * words
    ids[:, 0], ids[torch.arange(5), lens - 1] = 38, 39
    ids[0, 4] = 0  # the first piece of CLIP's vocabulary inside a sentence
    batch = Batch(image, ids, words, which=which, mask=torch.rand(5, *size, generator=r) > 0.7)
    plain = PlainCRIS(state, 2, sizes["width"] // 2, 4)
    with torch.no_grad():
        output, expected = model(batch), plain(image[which], ids)
        assert (output.score - expected).abs().max() < 1e-4 * max(1, expected.abs().max())
        assert abs(model.losses(output, batch)["mask"] - plain.loss(expected, batch.mask)) < 1e-4
        assert model(replace(batch, encoded=model.encode_image(image), image=torch.zeros_like(image))).score.equal(output.score)
    model.drop_zero = False
    with torch.no_grad():
        changed = (model(batch).score - output.score).abs().amax((1, 2))
    assert changed[0] > 1e-4 and changed[1:].max() < 1e-5


def test_training_agrees_with_a_plain_one_in_its_gradients():
    state = {key: torch.zeros((), dtype=torch.int64) if key.endswith("tracked") else make_weight(4, key, shape).requires_grad_("running" not in key)
             for key, shape in released_shapes(**BASE).items()}
    model = CRIS.from_released({key: value.detach() for key, value in state.items()}, text=dict(heads=2), decoder=dict(heads=4), max_words=9)
    ids = torch.tensor([[38, 5, 6, 7, 39, 0, 0, 0, 0], [38, 5, 9, 39, 0, 0, 0, 0, 0]])
    batch = Batch(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)), ids, ids != 0, mask=torch.zeros(2, 64, 64, dtype=torch.bool))
    batch.mask[:, 10:40, 20:30] = True
    model.losses(model(batch), batch)["mask"].backward()
    plain = PlainCRIS(state, 2, 4, 4)
    plain.loss(plain(batch.image, ids), batch.mask).backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    for key, value in state.items():
        if value.requires_grad and key != "backbone.logit_scale":
            found = torch.cat([ours[released_cris_key(part)] for part in parts_of(key)])
            found = found.T if key.endswith("text_projection") else found
            assert (found - value.grad).abs().max() < 1e-4 * max(1, value.grad.abs().max()), key


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {f"module.{k}": v for k, v in s.items()},
                                  lambda s: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in s.items()}, "optimizer": {"state": {}}}])
def test_from_released_reads_what_the_authors_save(wrap, tmp_path):
    case = load_case("cris_tiny")
    state = released_state(case)
    torch.save(wrap(state), tmp_path / "best_model.pth")
    model, direct = (CRIS.from_released(s, text=dict(heads=4), decoder=dict(heads=4), image_size=96) for s in (tmp_path / "best_model.pth", state))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), direct.state_dict().values(), strict=True))
    with pytest.raises(RISError, match="knows no words"):
        model.predict([np.zeros((30, 30, 3), np.uint8)], ["a ball"])


def test_from_released_names_what_does_not_fit():
    state = released_state(load_case("cris_tiny"))
    options = dict(text=dict(heads=4), decoder=dict(heads=4))
    with pytest.raises(RISError, match="1 unknown: neck.extra"):
        CRIS.from_released(state | {"neck.extra": torch.zeros(1)}, **options)
    with pytest.raises(RISError, match="1 missing: encoder.pool.connect.0.weight"):
        CRIS.from_released({k: v for k, v in state.items() if "connect.0" not in k}, **options)
    with pytest.raises(RISError, match="1 misshapen: proj.txt.bias"):
        CRIS.from_released(state | {"proj.txt.bias": torch.zeros(3)}, **options)
    with pytest.raises(RISError, match="no entry backbone"):
        CRIS.from_released({"weight": torch.zeros(1)})


def openai_clip():
    """A small CLIP under OpenAI's names, and the settings that fit it."""
    shapes = {key.removeprefix("backbone."): shape for key, shape in released_shapes(**BASE).items() if key.startswith("backbone.") and "connect" not in key}
    state = {key: torch.zeros((), dtype=torch.int64) if key.endswith("tracked") else make_weight(5, key, shape) for key, shape in shapes.items()}
    return state, dict(layers=(1, 1, 1, 1), width=8, embed=24, heads=None, size=2), dict(vocab_size=40, width=16, layers=2, heads=2, max_positions=12)


def test_clips_weights_come_from_the_hub(tmp_path, monkeypatch):
    state, vision, text = openai_clip()
    save_file(state, tmp_path / "open_clip_model.safetensors")
    asked = []
    monkeypatch.setattr(clip, "hf_hub_download", lambda *names: asked.append(names) or str(tmp_path / names[1]))
    made = clip.pretrained_clip("resnet50_clip.openai", vision, text)
    assert asked == [("timm/resnet50_clip.openai", "open_clip_model.safetensors")]
    plain = PlainCRIS({f"backbone.{key}": value for key, value in state.items()}, 2, 4, 4)
    ids, image = torch.tensor([[38, 5, 6, 39]]), torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    made.eval()
    with torch.no_grad():
        for ours, expected in zip(made.text(ids, ids > 0), plain.text(ids)):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(made.vision.trunk(image)[0], _stage(plain, image), atol=1e-5, rtol=1e-4)
    with pytest.raises(RISError, match="is not this CLIP: .* the first is"):
        clip.pretrained_clip("resnet50_clip.openai", {**vision, "width": 16}, text)


def _stage(plain, image):
    plain.pool = lambda x: x
    return plain.image(image)[0]


def test_paper_presets_start_from_one_clip(monkeypatch):
    calls = []

    def small_clip(name, vision, text):
        calls.append((name, vision["layers"], text["vocab_size"]))
        return clip.CLIP(vision, text)

    monkeypatch.setattr(cris, "pretrained_clip", small_clip)
    with torch.device("meta"):
        create_model("cris_r101", pretrained=True, decoder=dict(layers=1))
    assert calls == [("resnet101_clip.openai", (3, 4, 23, 3), 49408)]
    with pytest.raises(RISError, match="cris_r50's pretrained CLIP has vision.width=64"):
        create_model("cris_r50", pretrained=True, vision=dict(width=32))


def test_the_tiny_one_starts_from_the_tiny_clip_and_knows_its_words():
    model = create_model("cris_tiny", pretrained=True, vocabulary=[*SPECIAL, "red", "ring", "zebra"])
    again = create_model("cris_tiny", pretrained=True, vocabulary=[*SPECIAL, "ring", "blue", "red"])
    words, others = (m.text.clip.embeddings.token_embedding.weight for m in (model, again))
    assert torch.equal(words[5], others[7]) and torch.equal(words[6], others[5])
    assert all(torch.equal(value, again.encoder.state_dict()[name]) for name, value in model.encoder.state_dict().items())
    assert model.lr_factors == {"encoder": 0.2, "encoder.pool.positions": 1.0} and not create_model("cris_tiny").lr_factors


# --- CLIP's tokenizer

EXPECTED = json.loads((Path(__file__).parent / "reference" / "clip_ids.json").read_text(encoding="utf-8"))  # of open_clip 3.3.0's SimpleTokenizer


def test_clip_tokens_are_openclips():
    tokenizer = Tokenizer("clip-bpe", 80, keep_end=True)
    assert len(EXPECTED) > 40
    for text, expected in EXPECTED.items():
        ids, words = tokenizer([text])
        assert ids[0][words[0]].tolist() == [49406, *expected, 49407], text


def test_a_long_sentence_keeps_its_end():
    tokenizer = Tokenizer("clip-bpe", 17, keep_end=True)
    ids, words = tokenizer(["the " * 20, "a dog"])
    assert ids[0].tolist() == [49406, *[518] * 15, 49407] and words[0].all()
    assert ids[1][words[1]].tolist() == [49406, 320, 1929, 49407]
    assert tokenizer.cuts("the " * 20) and len(tokenizer.pieces("the " * 20)) == 17
    assert Tokenizer("clip-bpe", 17)(["the " * 20])[0][0, -1] == 518  # without keep_end


def test_an_exclamation_mark_has_id_0_only_before_other_marks():
    tokenizer = Tokenizer("clip-bpe", 17, keep_end=True)
    zero = {text: bool((tokenizer([text])[0] == 0)[tokenizer([text])[1]].any()) for text in ("zebra !", "the red one!!!", "wow!? that", "!(", "left!; right")}
    assert zero == {"zebra !": False, "the red one!!!": False, "wow!? that": False, "!(": True, "left!; right": True}


def test_the_vocabulary_is_saved_by_its_name(tmp_path):
    model = small(vocabulary="clip-bpe", max_words=17)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vocabulary"] == "clip-bpe" and not (tmp_path / "tokenizer.json").exists()
    again, photo = load_model(tmp_path), np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)
    assert np.array_equal(again.predict([photo], ["the dog!"])[0], model.predict([photo], ["the dog!"])[0])


# --- photos

def test_letterbox_goes_and_comes_back():
    transform = Letterbox(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert Letterbox.place(30, 60, (64, 64)) == (16, 0, 32, 64) and Letterbox.place(100, 50, (64, 64)) == (0, 16, 64, 32)
    white = Image.fromarray(np.full((30, 60, 3), 255, np.uint8))
    image = transform.image(white)
    assert image.shape == (3, 64, 64) and (image[:, 16:48] == 1).all() and (image[:, :16] == 0).all() and (image[:, 48:] == 0).all()
    truth = np.zeros((30, 60), bool)
    truth[5:20, 10:40] = True
    square = transform.mask(truth)
    score = F.interpolate(20 * (square[None, None].float() - 0.5), size=(64, 64))[:, 0]
    back = photo_masks(score, (64, 64), [(30, 60)], 0.5)[0].numpy()
    assert (back & truth).sum() / (back | truth).sum() > 0.93 and back.shape == (30, 60)
    assert torch.equal(photo_masks(score, (64, 64), [(64, 64)], 0.35)[0], square)


def test_the_threshold_is_the_papers_or_the_persons():
    model = small()
    score = torch.full((1, 16, 16), torch.tensor(0.4).logit().item())
    output = model(Batch(torch.zeros(1, 3, 64, 64), torch.tensor([[2, 5, 3]]), torch.ones(1, 3, dtype=torch.bool)))
    output.score = score
    assert model.masks(output, [(64, 64)])[0].all() and not model.masks(output, [(64, 64)], 0.5)[0].any()
    assert small(threshold=0.5).masks(output, [(30, 40)])[0].sum() == 0


# --- settings

def test_the_position_tables_learn_at_the_full_rate():
    with torch.device("meta"):
        model = create_model("cris_r50")
    tables = {id(p) for name, p in model.named_parameters() if "position" in name}
    for group in param_groups(model, 0.0):
        assert {id(p) in tables for p in group["params"]} <= ({False} if group["lr_factor"] == 0.1 else {True, False})
    slow = {id(p) for group in param_groups(model, 0.0) for p in group["params"] if group["lr_factor"] == 0.1}
    assert slow == {id(p) for part in (model.encoder, model.text) for p in part.parameters()} - tables and len(tables) == 2


def test_presets_have_the_released_sizes():
    assert {"cris_tiny", "cris_r50", "cris_r101"} <= {*list_models()}
    with torch.device("meta"):
        r50, r101 = create_model("cris_r50"), create_model("cris_r101")
    assert sum(p.numel() for p in r50.parameters()) == 146_849_122 - 1
    assert r101.encoder.widths == [512, 1024, 512] and len(r101.encoder.stages[2]) == 23


@pytest.mark.parametrize("wrong, line", [(dict(image_size=100), "multiple of 32"), (dict(neck=dict(widths=(8, 8, 8))), "neck.widths"), (dict(threshold=1.0), "threshold"),
                                         (dict(text=dict(vocab_size=3)), "word table"), (dict(max_words=30), "positions"), (dict(vision=dict(width=12)), "multiple of 8"),
                                         (dict(text=dict(heads=3)), "heads")])
def test_settings_that_do_not_fit_are_told(wrong, line):
    with pytest.raises(RISError, match=line):
        small(**wrong)
    with pytest.raises(RISError, match="multiples of 32"):
        small()(Batch(torch.zeros(1, 3, 50, 64), torch.tensor([[2, 5, 3]]), torch.ones(1, 3, dtype=torch.bool)))


def test_every_trainable_parameter_gets_a_gradient():
    model = small(dice=1.0).train()
    words = torch.arange(6) < torch.tensor([[4], [6]])
    batch = Batch(torch.randn(2, 3, 64, 64), torch.randint(5, 9, (2, 6)) * words, words, mask=torch.rand(2, 64, 64) > 0.5)
    losses = model.losses(model(batch), batch)
    assert losses.keys() == {"mask", "dice"}
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    with torch.autocast("cpu", torch.bfloat16):
        assert model.losses(model(batch), batch)["mask"].dtype == torch.float32
