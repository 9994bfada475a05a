"""Settings in groups, and the names of version 0.1, which had none."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from ris_nb.cli.main import main
from ris_nb.contract import Batch, RISError
from ris_nb.models.base import RISModel
from ris_nb.models.lavt import LAVT
from ris_nb.recipes.recipe import read_recipe
from ris_nb.registry import create_model, load_model, shipped_checkpoint
from ris_nb.settings import VERSION_0_1, defaults, flat, nested

BEFORE = Path(__file__).with_name("version_0_1")  # config.json of the shipped checkpoints, as version 0.1 wrote them
NAMES = sorted(path.stem for path in BEFORE.glob("*.json"))


def score(model):
    r = torch.Generator().manual_seed(0)
    words = torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        return model(Batch(torch.randn(2, 3, 64, 64, generator=r), torch.randint(5, 40, (2, 5), generator=r), words)).score


def same(a, b):
    assert a.state_dict().keys() == b.state_dict().keys() and all(torch.equal(v, b.state_dict()[n]) for n, v in a.state_dict().items())
    assert {n for n, p in a.named_parameters() if p.requires_grad} == {n for n, p in b.named_parameters() if p.requires_grad}
    assert json.dumps(a._hub_mixin_config, sort_keys=True) == json.dumps(b._hub_mixin_config, sort_keys=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_version_0_1_loads(name, tmp_path):
    shutil.copy(shipped_checkpoint(name) / "model.safetensors", tmp_path)
    shutil.copy(BEFORE / f"{name}.json", tmp_path / "config.json")
    before, now = load_model(tmp_path), load_model(name)
    same(before, now)
    assert torch.equal(score(before), score(now)) and type(before.for_training()) is type(now.for_training())
    before.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again/config.json").read_text())
    assert nested(again, json.loads((shipped_checkpoint(name) / "config.json").read_text())) == again  # what ships is written as today
    assert before.from_pretrained(tmp_path, threshold=0.4).threshold == 0.4 if name == "sag_tiny" else before.from_pretrained(tmp_path, dice=0.5).dice == 0.5


def test_every_argument_of_version_0_1_has_a_place():
    for name in NAMES:
        config = json.loads((BEFORE / f"{name}.json").read_text())
        kind = type(load_model(name))
        today = flat(defaults(kind))
        for old in config.keys() - {"class"}:
            assert old in VERSION_0_1[kind.__name__] or old in today, old
        assert all(path in today or path == "grounding" for paths in VERSION_0_1[kind.__name__].values() for path in paths.split())


@pytest.mark.parametrize("name, before, now", [
    ("lavt_tiny", dict(width=16, bert_heads=2, decoder_width=8), {"vision.width": 16, "text.heads": 2, "decoder.width": 8}),
    ("magnet_tiny", dict(decoder="simple", alignment=0.0, grounding=0.0), {"decoder.kind": "simple", "alignment.weight": 0.0, "grounding.weight": 0.0}),
    ("magnet_tiny", dict(encoder_layers=2, grids=[1], predictor=dict(width=32)), dict(decoder=dict(pixel_layers=2), alignment=dict(grids=[1]), grounding=dict(width=32))),
    ("magnet_tiny", {"predictor": None, "predictor.heads": 2}, {"grounding.heads": 2}),
    ("sag_tiny", dict(slots="query", heads=2, ffn=32), dict(slots=dict(kind="query", heads=2, ffn=32), fusion=dict(heads=2, ffn=32))),
    ("sag_tiny", dict(fusion=False, discovery=False, reconstruction=0.0), {"fusion.attention": False, "slots.discovery": False, "loss.reconstruction": 0.0}),
    ("sag_vit_small_scripts", dict(vit_width=48, bert_width=48, per_gaussian=4), {"vision.width": 48, "text.width": 48, "slots.per_gaussian": 4})])
def test_overrides_of_version_0_1(name, before, now):
    models = []
    for overrides in (before, now):
        torch.manual_seed(0)
        models.append(create_model(name, **overrides))
    same(*models)


def test_names_of_version_0_1_are_translated_before_sizes_are_compared():
    with pytest.raises(RISError, match="lavt_tiny's pretrained Swin has vision.width=32"):
        create_model("lavt_tiny", pretrained=True, width=48)


def test_config_holds_every_setting(tmp_path):
    for name, group in (("lavt_tiny", dict(vision=dict(drop_path=0.1))), ("magnet_tiny", {"decoder.width": 16, "decoder.heads": 2}), ("sag_tiny", {})):
        model = create_model(name, **group)
        model.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        groups = {argument: default for argument, default in defaults(type(model)).items() if isinstance(default, dict) and default}
        assert {argument: set(config[argument]) for argument in groups} == {argument: set(default) for argument, default in groups.items()}
        assert nested(config, group) == config and not any("." in key for key in config)
    assert LAVT.from_pretrained(tmp_path / "lavt_tiny", **{"vision.drop_path": 0.3})._hub_mixin_config["vision"]["drop_path"] == 0.3
    assert LAVT.from_pretrained(tmp_path / "lavt_tiny", vision=dict(drop_path=0.2))._hub_mixin_config["vision"]["depths"] == [2, 2, 2]


@pytest.mark.parametrize("wrong, told", [
    ({"vision.widht": 8}, "LAVT's vision has no setting 'widht'; it takes width, depths, heads, window, patch, drop_path"),
    (dict(decoder=dict(layers=2)), "LAVT's decoder has no setting 'layers'; it takes width"), (dict(vision=3), "LAVT's vision is a group of settings"),
    (dict(decoder="simple"), "LAVT's decoder is a group of settings"), ({"vison.width": 8}, "lavt_tiny has no argument 'vison'; it takes vision")])
def test_what_a_group_does_not_have(wrong, told):
    with pytest.raises(RISError) as caught:
        create_model("lavt_tiny", **wrong)
    assert told in str(caught.value) and "\n" not in str(caught.value)


class Own(RISModel):
    def __init__(self, image_size=64, vocabulary="bert-base-uncased", *, body: dict = dict(width=8, deep=False), **shared):
        super().__init__(image_size, vocabulary, **shared)
        self.width = torch.nn.Parameter(torch.zeros(body["width"]))


class Heir(Own):
    """What is not its own it hands on."""

    def __init__(self, width: int = 3, **shared):
        super().__init__(**shared)
        self.own = width


def test_models_of_ones_own_have_groups(tmp_path):
    for model in (Own(body=dict(width=4)), Heir(5, **{"body.width": 4}), Heir(width=5, body=dict(width=4))):
        assert model._hub_mixin_config["body"] == dict(width=4, deep=False) and getattr(model, "own", 5) == 5
        model.save_pretrained(tmp_path)
        assert len(type(model).from_pretrained(tmp_path).width) == 4
    with pytest.raises(RISError, match="Own's body has no setting 'depth'; it takes width, deep"):
        Heir(body=dict(depth=4))


def test_a_recipe_reaches_into_groups(tmp_path):
    """As a table, by a path, with a source or without."""
    text = """
settings: {model: lavt_tiny, batch_size: 4, steps: 2}
network:
  dice: {value: 1.0, source: a guess}
  vision: {drop_path: 0.1, window: {value: 8, source: another}}
  decoder.width: 8
  lr_factors: {text: 0.5}"""
    (tmp_path / "mine.yaml").write_text(text)
    network = read_recipe(tmp_path / "mine.yaml").network
    assert {path: (setting.value, setting.source) for path, setting in network.items()} == {
        "dice": (1.0, "a guess"), "vision.drop_path": (0.1, "mine.yaml"), "vision.window": (8, "another"), "decoder.width": (8, "mine.yaml"),
        "lr_factors": ({"text": 0.5}, "mine.yaml")}


def test_a_run_started_with_names_of_version_0_1_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    root = tmp_path / "data"
    assert main(["data", "shapes", str(root), "--counts", "train", "8", "val", "2"]) == 0
    words = ["train", "--root", str(root), "--image-size", "32", "--batch-size", "2", "--steps", "4", "--warmup", "0", "--val", "none", "--save-every", "2"]
    old = ["--set", "patch=2", "--set", "width=8", "--set", "decoder_width=8", "--set", "heads=[1, 1, 2]"]
    new = ["--set", 'vision={"patch": 2, "width": 8}', "--set", "decoder.width=8", "--set", "vision.heads=[1, 1, 2]"]
    assert main([*words, *old, "--out", str(tmp_path / "old")]) == main([*words, *new, "--out", str(tmp_path / "new")]) == 0
    same(load_model(tmp_path / "old"), load_model(tmp_path / "new"))
    assert main([*words, *old, "--out", str(tmp_path / "old"), "--resume"]) == 0
    assert main([*words, *new, "--out", str(tmp_path / "old"), "--resume"]) == 2 and "--set was" in capsys.readouterr().err


