"""SaG's released checkpoints of any size: `SaG.from_released` against the arithmetic written out in `plain_sag`, gradients too."""
from functools import partial
from math import isqrt

import pytest
import torch
from parity import find_case, load_case, make_weight, released_state
from plain_sag import plain_masks, plain_sag, released_shapes, sag_inputs, sizes

from ris_nb.contract import Batch
from ris_nb.models.entity_slots import RandomSlots
from ris_nb.models.released_sag import released_sag_key
from ris_nb.models.repainting import SlotDecoder, reconstruct
from ris_nb.models.sag import SaG

CASES = "sag_tiny", "sag_tiny_nointer", "sag_tiny_query", "sag_tiny_random", "sag_tiny_transformer"  # bench_sag.py computes the full size
SMALL = dict(num_layers=2, vit_width=32, vit_heads=2, patch=8, vit_table=5, decoder_table=8, crop_size=32, embed_dim=24, img_num_embeds=6,
             cascade_factor=3, agg_depth=2, agg_cross_dim=6, agg_latent_dim=8, cma_head_dim=6, words=7)
BERT = dict(vocab_size=50, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, hidden_size=24, max_position_embeddings=24)


def spec(bert={}, **options):
    return {"options": {**SMALL, **options}, "bert": {**BERT, **bert}}


SIZES = {
    "small": spec(),
    "one slot a Gaussian": spec(img_num_embeds=5, cascade_factor=1),
    "one Gaussian": spec(img_num_embeds=5, cascade_factor=5, agg_query_type="random"),
    "7 x 2": spec(img_num_embeds=14, cascade_factor=2),
    "once": spec(agg_depth=1),
    "seven times": spec(agg_depth=7),
    "queries without interaction": spec(agg_query_type="query", agg_self_per_cross_attn=0),
    "a transformer's attention": spec(agg_cross_attn_type="transformer"),
    "other heads": spec(agg_cross_head=2, agg_cross_dim=10, cma_heads=2, cma_head_dim=10, agg_latent_head=3, agg_latent_dim=5,
                        vit_heads=4, bert=dict(num_attention_heads=2)),
    "other widths": spec(embed_dim=40, vit_width=48, vit_heads=3, bert=dict(hidden_size=36, num_attention_heads=6, intermediate_size=20)),
    "native positions": spec(crop_size=40),
    "beyond the table of positions": spec(crop_size=64),
    "wide image": spec(crop_size=(24, 64)),
    "one patch": spec(crop_size=8),
    "patches of 4": spec(patch=4, vit_table=8),
    "deep, long sentences": spec(num_layers=4, words=20, bert=dict(num_hidden_layers=4)),
}


def released_model(state, spec):
    """The model of a released state dict, told what weights don't tell."""
    config = sizes(spec)
    side = config["crop_size"]
    return SaG.from_released(
        state, vision=dict(heads=config["vit_heads"]), text=dict(heads=config["bert"]["num_attention_heads"]),
        slots=dict(heads=config["agg_cross_head"], self_heads=config["agg_latent_head"], per_gaussian=config["cascade_factor"],
                   gaussians=config["img_num_embeds"] // config["cascade_factor"], iterations=config["agg_depth"],
                   competition="slots" if config["agg_cross_attn_type"] == "slot" else "pixels"),
        fusion=dict(heads=config["cma_heads"]), image_size=side if isinstance(side, int) else max(side))


def computed(model, image, ids, eps, which=None):
    """What the references store, as `model` computes it."""
    caught, batch = {}, Batch(image, ids, ids != 0, which)
    hooks = [module.register_forward_hook(lambda module, args, output, name=name: caught.update({name: output}))
             for name, module in (("vit_tokens", model.vision), ("slots_init", model.entities.slots))]
    output = model(batch, noise=eps)
    for hook in hooks:
        hook.remove()
    extra, losses = output.extra, model.losses(output, batch)
    z, (_, V_hat, alpha) = model.compare(output, batch)[0], model.repaint(output)
    return caught | {
        "slots": extra["slots"], "A_slot": extra["A_slot"], "A_fuse": extra["A_fuse"], "txt_emb": extra["text"][:, None],
        "cm_feat": z, "recon": V_hat, "alpha": alpha, "maps": output.score.flatten(1), "c3": losses["c3"],
        "c3_sim": torch.einsum("jd,ijd->ji", extra["text"], z).detach(), "recon_loss": losses["reconstruction"]}


def inputs(spec):
    config, generator = sizes(spec), torch.Generator().manual_seed(5)
    size, L = config["crop_size"] if isinstance(config["crop_size"], tuple) else (config["crop_size"],) * 2, config["words"]
    words = torch.arange(L) < torch.tensor([L, 1, 4])[:, None]
    ids = torch.randint(5, config["bert"]["vocab_size"], (3, L), generator=generator) * words
    eps = torch.randn(3, config["img_num_embeds"], config["embed_dim"], generator=generator)
    return torch.randn(3, 3, *size, generator=generator), ids, eps


def released(spec):
    """A state dict of these sizes by the weight rule, in double precision."""
    return {key: make_weight(13, key, shape).double() for key, shape in released_shapes(spec).items()}


def close(found, expected, name, tolerance):
    """Equal to `tolerance` times the largest entry expected."""
    worst, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    assert found.shape == expected.shape and worst <= tolerance * scale, f"{name}: {worst:.2e} of {scale:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_plain_arithmetic(name):
    """The yardstick itself gives the released network's numbers: entries, outputs, masks, losses and gradients."""
    case = load_case(name)
    assert released_shapes(case.spec) == {key: tuple(shape) for key, shape in case.spec["keys"].items()}
    state, (image, ids, eps) = {k: v.requires_grad_() for k, v in released_state(case).items()}, sag_inputs(case)
    found = plain_sag(state, case.spec, image, ids, eps)
    assert len(set(found) & set(case.arrays)) >= 10
    for key in set(found) & set(case.arrays):
        torch.testing.assert_close(found[key], case[key].float(), rtol=0, atol=2e-5, msg=lambda text: f"{key}: {text}")
    grid = (isqrt(found["maps"].shape[1]),) * 2
    for i, mask in enumerate(plain_masks(found["maps"].detach(), grid, case.spec["label_shapes"])):
        label = torch.zeros_like(mask)
        label[20 + 5 * i:70 + 5 * i, 30:110 - 10 * i] = True
        assert torch.tensor([(mask & label).sum(), (mask | label).sum()]).sub(case["I_U"][i]).abs().max() <= 2
    (found["c3"] + found["recon_loss"]).backward()
    assert {key for key, weight in state.items() if weight.grad is not None} == set(case.spec["grad_norms"])
    for key, norm in case.spec["grad_norms"].items():
        assert state[key].grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-7), key


def test_plain_keys_full():
    """The full size, without computing it."""
    if find_case("sag_full") is None:
        pytest.skip("the reference sag_full is not at hand")
    spec = load_case("sag_full").spec
    assert released_shapes(spec) == {key: tuple(shape) for key, shape in spec["keys"].items()}


@pytest.mark.parametrize("name", SIZES)
def test_any_size(name):
    spec = SIZES[name]
    state, (image, ids, eps) = released(spec), inputs(spec)
    model = released_model(state, spec).double()
    our_name = partial(released_sag_key, slots="random" if isinstance(model.entities.slots, RandomSlots) else "entity")
    model.load_state_dict({ours: value for key, value in state.items() if (ours := our_name(key)) in model.state_dict()})
    for weight in state.values():
        weight.requires_grad_()
    expected = plain_sag(state, spec, image.double(), ids, eps.double())
    found = computed(model, image.double(), ids, eps.double())
    assert set(found) == set(expected)
    for key, value in found.items():
        close(value, expected[key], key, 1e-5)
    (expected["c3"] + expected["recon_loss"]).backward()
    (found["c3"] + found["recon_loss"]).backward()
    weights = dict(model.named_parameters())
    ours = {our_name(key): value.grad for key, value in state.items() if value.grad is not None}
    assert set(ours) == {key for key, weight in weights.items() if weight.grad is not None}
    largest = max(gradient.abs().max().item() for gradient in ours.values())
    for key, gradient in ours.items():
        if gradient.abs().max() > 1e-7 * largest:  # some, as of a bias that softmax takes no notice of, are zero but for rounding
            close(weights[key].grad, gradient, f"gradient of {key}", 1e-5)


def test_sentences_of_one_image():
    """Sentences that share an image find there what each would find in an image of its own."""
    spec, which = SIZES["small"], torch.tensor([1, 0, 1])
    state, (image, ids, eps) = released(spec), inputs(spec)
    expected = plain_sag(state, spec, image[which].double(), ids, eps[which].double())
    found = computed(released_model(state, spec).double(), image[:2].double(), ids, eps[:2].double(), which)
    for key in ("A_fuse", "maps", "txt_emb"):
        close(found[key], expected[key], key, 1e-5)


def test_reconstruction_in_mixed_precision():
    """Under autocast the layers run in bfloat16, and the gradients that come with the loss are near those of full precision."""
    torch.manual_seed(0)
    decoder, slots, V = SlotDecoder(32, 24, hidden=48, table=6, chunk=2 * 5 * 48 * 7), torch.randn(2, 5, 32), torch.randn(2, 30, 24)
    found = []
    for half in (False, True):
        decoder.zero_grad()
        x = slots.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss, V_hat, alpha = reconstruct(decoder, x, (5, 6), V)
        (2 * loss).backward()
        assert V_hat.dtype == (torch.bfloat16 if half else torch.float32) and loss.dtype == alpha.dtype == torch.float32
        found.append([loss, V_hat.float(), alpha, x.grad, *(p.grad for p in decoder.parameters())])
    for full, half in zip(*found):
        assert half.dtype == torch.float32
        close(half, full, "half precision", 0.15)
    with torch.no_grad():
        painted, shares = decoder(slots, (5, 6))
    close(found[0][1], painted, "V_hat", 1e-6)
    close(found[0][2], shares, "alpha", 1e-6)
