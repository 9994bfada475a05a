"""Pretraining on a world: the same functions for both, and a training that was killed goes on as if nothing had happened."""
import numpy as np
import pytest
import torch
from torch import nn

from ris_nb.contract import RISError
from ris_nb.encoders.pretraining import (WORLDS, _descend, learn_names, learn_tags, name_map, new_namer, new_tagger, pretrain, pretrained_namer,
                                          pretrained_tagger, tags)


def test_a_killed_training_goes_on_where_it_was(tmp_path):
    def train(state, stop=None):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)

        def loss_at(step):
            if step == stop:
                raise KeyboardInterrupt
            return (model(torch.randn(8, 3, generator=torch.Generator().manual_seed(step))) - 1).square().mean()

        return _descend(model, loss_at, 230, 1e-2, 50, state), model.weight

    whole, weight = train(None)
    state = tmp_path / "a.training"
    with pytest.raises(KeyboardInterrupt):
        train(state, stop=155)
    resumed, same = train(state)
    assert resumed == whole and torch.equal(weight, same) and len(whole) == 230


@pytest.mark.parametrize("name", WORLDS)
def test_maps_and_tags_name_what_is_there(name):
    world = WORLDS[name]
    for index in range(5):
        scene = world.make(3, world.size, "val", index)
        shown = np.unique(name_map(scene, name))
        assert {world.names[n - 1] for n in shown if n} == {world.words(t)[-1] for t in scene.things} and shown[0] == 0
        whole = tags(scene, world=name)
        assert {tag for tag, there in zip(world.tags, whole) if there} == {tag for t in scene.things for tag in world.words(t)}
        assert not (tags(scene, 0, 0, world.size // 2, world=name) & ~whole).any()


@pytest.mark.parametrize("name", WORLDS)
def test_a_step_on_each_world(name):
    torch.manual_seed(0)
    assert np.isfinite(learn_names(new_namer(name), 2, batch_size=2, world=name)).all()
    assert np.isfinite(learn_tags(new_tagger(name), 2, scenes=2, windows=2, world=name)).all()


def test_what_does_not_exist_is_named(tmp_path):
    with pytest.raises(RISError, match="no encoders were pretrained on 'photos'"):
        pretrain("swin", "photos", tmp_path)
    with pytest.raises(RISError, match="no encoder 'bert'"):
        pretrain("bert", "toys", tmp_path)


@pytest.mark.parametrize("name, encoder", [(name, encoder) for name in WORLDS for encoder in ("swin", "vit")])
def test_shipped_weights_are_small_and_know_something(name, encoder):
    world = WORLDS[name]
    model = pretrained_namer(name) if encoder == "swin" else pretrained_tagger(name)
    assert sum(p.numel() for p in model.parameters()) * 4 < 3e6
    scenes = [world.make(0, world.size, "val", i) for i in range(20)]
    image = torch.stack([torch.from_numpy(s.image).permute(2, 0, 1) / 255 for s in scenes])
    with torch.no_grad():
        if encoder == "swin":
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
            scores = nn.functional.interpolate(model((image - mean) / std), size=world.size, mode="bilinear")
            truth = torch.from_numpy(np.stack([name_map(s, name) for s in scenes])).long()
            assert (scores[:, 1:].argmax(1) + 1 == truth)[truth > 0].float().mean() > 0.8
        else:
            shown = torch.from_numpy(np.stack([tags(s, world=name) for s in scenes]))
            logits = model(2 * image - 1)
            assert logits[shown].mean() > logits[~shown].mean() + 0.5
