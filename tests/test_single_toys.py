"""Pictures of single toys: the same everywhere, never a pair that testC asks for; the encoder that learns from them, and its place in SaG."""
import hashlib

import numpy as np
import pytest
import torch

from ris_nb.contract import RISError
from ris_nb.data.toys import UNSEEN
from ris_nb.encoders.single_toys import LABELS, ConvPatches, LabelReader, centre_patches, draw_single_toys, learn_single_toys, make_single_toy
from ris_nb.registry import create_model, load_model


def test_the_same_pictures_everywhere():
    digest = hashlib.sha256()
    for index in range(20):
        image, toy = make_single_toy(0, index)
        assert image.shape == (40, 40, 3) and image.dtype == np.uint8 and (toy.colour, toy.kind) not in UNSEEN
        digest.update(image.tobytes() + repr(toy).encode())
    assert digest.hexdigest()[:16] == "04127533d1f17924"  # if it changes, an encoder that was taught before saw other pictures


def test_a_toy_lies_in_its_picture():
    images, truth = draw_single_toys(3, 60)
    assert images.shape == (60, 3, 40, 40) and set(truth) == set(LABELS)
    for index in range(60):
        toy = make_single_toy(3, index)[1]
        assert toy.x - toy.width // 2 >= -2 and toy.x - toy.width // 2 + toy.width <= 42
        assert {label: LABELS[label][int(truth[label][index])] for label in LABELS} == {label: getattr(toy, label) for label in LABELS}


@pytest.mark.parametrize("labels", [tuple(LABELS), ("kind",)])
def test_an_encoder_learns_the_labels_that_it_is_given(labels):
    torch.manual_seed(0)
    encoder = ConvPatches(16, 1)
    reader, losses = learn_single_toys(encoder, labels, steps=4, batch_size=16, pictures=32)
    assert reader.labels == labels and reader.encoder is encoder and len(losses) == 4 and np.isfinite(losses).all()
    centre_patches(encoder, 4)
    with torch.no_grad():
        tokens = encoder(torch.rand(2, 3, 48, 64))
    assert tokens.shape == (2, 1 + 12 * 16, 16) and not encoder.training


def test_bad_input_ends_in_one_line():
    with pytest.raises(RISError, match="labels are one or more of kind, colour, texture, size, not weight"):
        LabelReader(ConvPatches(8), ("weight",))
    with pytest.raises(RISError, match="50 x 48 pixels does not divide into patches of 4"):
        ConvPatches(8)(torch.zeros(1, 3, 50, 48))
    with pytest.raises(RISError, match="vision has no setting 'width'; it takes conv, depth"):
        create_model("sag_tiny", vision={"conv": 8, "width": 3})
    with pytest.raises(RISError, match="vision has no setting 'conv'"):
        create_model("lavt_tiny", vision={"conv": 8})
    with pytest.raises(RISError, match="names another encoder"):
        create_model("sag_tiny", pretrained=True, vision={"conv": 64})


def test_sag_takes_it_as_its_encoder(tmp_path):
    torch.manual_seed(0)
    model = create_model("sag_tiny", vocabulary="bert-base-uncased", vision={"conv": 16}, slots={"scale": 0.3}).eval()
    assert model.vision.width == 16 and len(model.vision.blocks) == 3 and model.entities.scale == 0.3
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    mask = model.predict([image], ["the red boat"])[0]
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert (again.predict([image], ["the red boat"])[0] == mask).all() and type(again.vision) is ConvPatches


def test_frozen_slots_stand_still_in_training():
    torch.manual_seed(0)
    model = create_model("sag_tiny", vocabulary="bert-base-uncased", vision={"conv": 16}).train()
    assert not torch.equal(model.sample(2), model.sample(2))
    model.freeze(["entities"])
    model.train()
    assert torch.equal(model.sample(2), model.seeded_noise.expand(2, -1, -1))
