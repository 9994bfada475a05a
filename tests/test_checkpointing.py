"""`checkpointing` keeps less for the backward pass and changes no gradient, or is refused by the model's name."""
from __future__ import annotations

import pytest
import torch
from test_fake_gpu import TINY, build

from ris_nb.contract import RISError
from ris_nb.registry import list_models
from ris_nb.testing import toy_batch
from ris_nb.training.compute import use_checkpointing

REFUSED = ("sag_toys", "cris_tiny", "clipseg", "groupvit", "maskclip")  # batch norm would count a batch twice; networks of transformers' own
DROPPING = {"lavt_tiny": {"vision.drop_path": 0.3}, "sag_tiny": {"vision.drop_path": 0.3}}  # what is drawn is drawn again


def gradients(model, batch):
    """Of all parameters, and the bytes that the forward pass kept for them, without the parameters themselves."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = sum(model.losses(model(batch), batch).values())
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found, sum(kept.values())


@pytest.mark.parametrize("name", [name for name in list_models() if name not in (*TINY, *REFUSED)])
def test_same_gradients_for_less(name):
    model = build(name, **DROPPING.get(name, {}))
    batch = toy_batch(model)
    plain, everything = gradients(model, batch)
    use_checkpointing(model)
    again, kept = gradients(model, batch)
    assert plain.keys() == again.keys() and len(plain) > 10
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, rtol=1e-4, atol=1e-6)
    assert kept < 0.9 * everything


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    model = build(name)
    with pytest.raises(RISError, match=f"checkpointing: {type(model).__name__} offers none"):
        use_checkpointing(model)
