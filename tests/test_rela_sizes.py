"""ReLA's released checkpoints of any size: `ReLA.from_released` against the arithmetic written out in `plain_rela`."""
import pytest
import torch
from parity import load_case, make_inputs, make_weight, released_state
from plain_rela import plain_rela

from ris_nb.contract import Batch
from ris_nb.data.tokenizer import SPECIAL
from ris_nb.models.rela import ReLA
from ris_nb.models.released_rela import released_rela_key

SMALL = dict(vision=dict(width=16, depths=(1, 2, 1), heads=(1, 2, 4), window=4, drop_path=0.0),
             text=dict(vocab_size=50, width=24, layers=2, heads=3, ffn=40, max_positions=24),
             decoder=dict(width=32, groups=4, pixel_layers=1, pixel_heads=4, points=4, pixel_ffn=48, grid=3, layers=4, heads=4, ffn=40))


def sizes(image=64, **changes):
    return image, {group: {**values, **changes.get(group, {})} for group, values in SMALL.items()}


SIZES = {
    "small": sizes(),
    "odd image": sizes(image=107),
    "wide image": sizes(image=(52, 120)),
    "map smaller than a window": sizes(image=40, vision=dict(window=7)),
    "four stages": sizes(image=96, vision=dict(depths=(1, 1, 3, 1), heads=(2, 4, 8, 8))),
    "patches of 2": sizes(image=48, vision=dict(patch=2)),
    "other decoder": sizes(decoder=dict(width=64, groups=16, pixel_layers=3, pixel_heads=8, pixel_ffn=96, grid=5, layers=8, heads=8)),
    "one region": sizes(decoder=dict(grid=1)),
}


def released(image, settings):
    """A released state dict of these sizes by the weight rule, and our own model of them."""
    model = ReLA(vocabulary=SPECIAL, **settings)
    own = model.state_dict()
    names = dict(load_case("rela_tiny").spec["keys"])
    for layer in range(10):  # as many layers, blocks and stages as any of the sizes has
        for key in list(names):
            parts = key.split(".")
            names.update({".".join([*parts[:i], str(layer), *parts[i + 1:]]): None for i, part in enumerate(parts) if part == "0" and i > 1})
    found = {key: make_weight(11, key, own[name].shape) if own[name].ndim else torch.tensor(0.7)  # `lang_weight`
             for key in names if (name := released_rela_key(key)) in own}
    # its fusion has 1x1 convolutions where ours has matrices
    return model, {key: value[..., None] if ".fusion." in key and value.ndim == 2 else value for key, value in found.items()}


def inputs(image):
    size = image if isinstance(image, tuple) else (image, image)
    generator = torch.Generator().manual_seed(5)
    words = torch.arange(20) < torch.tensor([20, 3, 11])[:, None]
    return torch.randn(3, 3, *size, generator=generator), torch.randint(5, 50, (3, 20), generator=generator) * words, words


def computed(model, batch):
    """What the references store, whole, as `model` computes it."""
    caught = []
    hook = model.encoder.register_forward_hook(lambda module, args, output: caught.extend(output))
    with torch.inference_mode():
        output = model(batch)
        prob = torch.nn.functional.interpolate(output.extra["logits"], batch.image.shape[-2:], mode="bilinear", align_corners=False).sigmoid()
    hook.remove()
    return {f"res{k + 2}": m.permute(0, 3, 1, 2) for k, m in enumerate(caught)} | {
        "lang": output.word_features.mT, "mask_features": output.pixel_features, "pred_masks": output.extra["logits"],
        "minimap": output.extra["minimap"], "nt_label": output.extra["no_target"], "all_masks": model.region_masks(output), "prob": prob}


def assert_equal(ours, expected, limit=1e-5):
    assert set(ours) == set(expected)
    for key, value in ours.items():
        within = limit * max(1, expected[key].abs().max() if key != "prob" else expected["pred_masks"].abs().max())
        assert value.shape == expected[key].shape and (value - expected[key]).abs().max() <= within, key


def test_plain_arithmetic():
    """The yardstick itself gives the released network's numbers."""
    case = load_case("rela_tiny")
    with torch.inference_mode():
        found = plain_rela(released_state(case), 4, 12, *make_inputs(case))
    cut = {"mask_features": (..., slice(None, None, 4), slice(None, None, 4)), "prob": (..., slice(None, None, 8), slice(None, None, 8)),
           "all_masks": (slice(None), slice(None, None, 10), slice(None, None, 2), slice(None, None, 2))}
    assert_equal({key: value[cut[key]] if key in cut else value for key, value in found.items()},
                 {key: case[key] for key in case.arrays if key not in ("image", "ids", "mask")}, 1e-4)


@pytest.mark.parametrize("name, trained", [*((name, False) for name in SIZES), ("small", True)])
def test_any_size(name, trained):
    """Also with the trained `lang_weight`, which the released network never loads."""
    image, settings = SIZES[name]
    same, state = released(image, settings)
    state = {key: value.double() for key, value in state.items()}  # no processor's rounding
    image, ids, words = inputs(image)
    model = ReLA.from_released(state, text=dict(heads=3), decoder={name: settings["decoder"][name] for name in ("heads", "groups")},
                               trained_language_weight=trained).double()
    assert {key: value.shape for key, value in model.state_dict().items()} == {key: value.shape for key, value in same.state_dict().items()}
    with torch.inference_mode():
        expected = plain_rela(state, settings["decoder"]["heads"], 3, image.double(), ids, words, settings["decoder"]["groups"], 0.7 if trained else 0.0)
    ours = computed(model, Batch(image.double(), ids, words))
    assert_equal(ours, expected)


def test_several_sentences_an_image():
    image, settings = SIZES["small"]
    torch.manual_seed(0)
    model = ReLA(vocabulary=SPECIAL, **settings).eval().double()
    image, ids, words = inputs(image)
    which = torch.tensor([1, 0, 1])
    with torch.inference_mode():
        once = model(Batch(image[:2].double(), ids, words, which))
        repeated = model(Batch(image[which].double(), ids, words))
        alone = [model(Batch(image[[n]].double(), ids[[b]], words[[b]])) for b, n in enumerate(which.tolist())]
    torch.testing.assert_close(once.score, repeated.score)
    torch.testing.assert_close(once.extra["no_target"], repeated.extra["no_target"])
    torch.testing.assert_close(once.score, torch.cat([output.score for output in alone]))
