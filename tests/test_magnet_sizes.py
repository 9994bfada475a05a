"""MagNet's released checkpoints of any size: `MagNet.from_released` against the arithmetic written out in `plain_magnet`."""
import pytest
import torch
from parity import find_case, load_case, make_inputs, make_weight, released_state
from plain_magnet import plain_magnet, released_shapes

from ris_nb.contract import Batch
from ris_nb.models.layers import upsample
from ris_nb.models.magnet import MagNet

# Released group norms have 32 groups; they are 8 channels wide there and, at other widths, in `PixelDecoder`.
SMALL = dict(embed_dim=16, depths=[1, 2, 2, 1], num_heads=[1, 2, 2, 4], window=4, img=64, pwam_idx=[1, 2, 3, 4], enc_layers=1,
             dec_layers=4, decoder_width=32, decoder_heads=4, decoder_groups=4, encoder_ffn=48, decoder_ffn=40,
             bert=dict(vocab_size=50, num_hidden_layers=4, num_attention_heads=3, intermediate_size=40, hidden_size=24,
                       max_position_embeddings=24))


def config(**changes):
    return {**SMALL, **changes, "bert": {**SMALL["bert"], **changes.get("bert", {})}}


SIZES = {
    "small": config(),
    "odd image": config(img=107),
    "wide image": config(img=(52, 120)),
    "map smaller than a window": config(window=7, img=40),
    "odd window": config(window=5, img=90),
    "three stages": config(depths=[2, 1, 3], num_heads=[2, 4, 8], pwam_idx=[2, 4, 6], bert=dict(num_hidden_layers=6), dec_layers=6),
    "two stages": config(depths=[1, 2], num_heads=[2, 2], pwam_idx=[1, 2], bert=dict(num_hidden_layers=2)),
    "patches of 2": config(patch=2, img=48),
    "other decoder": config(decoder_width=64, decoder_heads=8, decoder_groups=8, points=2, enc_layers=3, dec_layers=8),
    "long sentences": config(bert=dict(max_position_embeddings=40), words=33),
}


def inputs(spec):
    size = spec["img"] if isinstance(spec["img"], tuple) else (spec["img"],) * 2
    generator, L = torch.Generator().manual_seed(5), spec.get("words", 20)
    lens = torch.tensor([L, 3, 11])
    words = torch.arange(L) < lens[:, None]
    ids = torch.randint(5, spec["bert"]["vocab_size"], (3, L), generator=generator) * words
    return torch.randn(3, 3, *size, generator=generator), ids, words


def computed(model, batch):
    """What the references store, whole, as `model` computes it."""
    caught = []
    hook = model.encoder.register_forward_hook(lambda module, args, output: caught.extend(output))
    with torch.inference_mode():
        output = model(batch)
    hook.remove()
    found = {f"s{k + 1}": s.permute(0, 3, 1, 2) for k, s in enumerate(caught[0])} | {f"l{k + 1}": l for k, l in enumerate(caught[1])}
    return found | {"mask_features": output.pixel_features, "pred_masks": output.score[:, None],
                    "aux_masks": output.extra["aux_masks"][:, :, None], "pred_logits": output.extra["class_logits"][-1][:, None],
                    "prob": upsample(output.score, batch.image.shape[-2:])[:, None].sigmoid()}


def released(spec):
    """A state dict of these sizes by the weight rule."""
    whole = "relative_position_index"
    return {key: torch.zeros(shape, dtype=torch.int64) if key.endswith(whole) else make_weight(11, key, shape)
            for key, shape in released_shapes(spec).items()}


@pytest.mark.parametrize("name", ["magnet_tiny", "magnet_full"])
def test_plain_keys(name):
    if find_case(name) is None:
        pytest.skip(f"the reference {name} is not at hand")
    spec = load_case(name).spec
    assert released_shapes(spec["config"]) == {key: tuple(shape) for key, shape in spec["keys"].items()}


def test_plain_arithmetic():
    """The yardstick itself gives the released network's numbers (`bench_magnet.py` checks the full size)."""
    case = load_case("magnet_tiny")
    with torch.inference_mode():
        found = plain_magnet(released_state(case), case.spec, *make_inputs(case))
    assert set(found) == set(case.arrays) - {"image", "ids", "mask"}
    for key, value in found.items():
        value = value[..., ::4, ::4] if key in ("mask_features", "prob") else value
        torch.testing.assert_close(value, case[key], rtol=0, atol=1e-4, msg=lambda text: f"{key}: {text}")


@pytest.mark.parametrize("name", SIZES)
def test_any_size(name):
    spec = SIZES[name]
    state, (image, ids, words) = released(spec), inputs(spec)
    exact = {key: value.double() if value.is_floating_point() else value for key, value in state.items()}  # no processor's rounding
    with torch.inference_mode():
        expected = plain_magnet(exact, {"config": spec}, image.double(), ids, words)
    model = MagNet.from_released(state, text=dict(heads=spec["bert"]["num_attention_heads"]), decoder=dict(heads=spec["decoder_heads"])).double()
    for key, value in computed(model, Batch(image.double(), ids, words)).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5, msg=lambda text: f"{key}: {text}")
