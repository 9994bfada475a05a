"""Deformable attention and the mask decoder: a slow loop, gradients, rectangular maps, half precision, released weights."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from parity import find_case, load_case, released_state
from torch import nn

from ris_nb.contract import RISError
from ris_nb.models import mask_decoder
from ris_nb.models.deformable import _bordered, _plan, gathered_sample
from ris_nb.models.mask_decoder import (DeformableAttention, MaskDecoder, PixelDecoder, QueryAttention, _centres, deformable_sample,
                                        grid_sampled, sine_positions)
from ris_nb.models.released_magnet import released_mask_decoder_key

SHAPES = [(2, 3), (7, 5), (1, 1), (1, 6)]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU"))])


def some_case(shapes=SHAPES, B=2, Q=9, heads=3, d=16, points=2, dtype=torch.float64, reach=1.0, seed=0):
    """Places in [0.5 - reach, 0.5 + reach] of maps that are 0 to 1."""
    rng = torch.Generator().manual_seed(seed)
    value = torch.randn(B, sum(h * w for h, w in shapes), heads, d, generator=rng, dtype=dtype)
    places = 0.5 + reach * (2 * torch.rand(B, Q, heads, len(shapes), points, 2, generator=rng, dtype=dtype) - 1)
    return value, shapes, places, torch.randn(B, Q, heads, len(shapes), points, generator=rng, dtype=dtype)


def slow(value, shapes, places, weights):
    """Cell by cell: each cell of a map counts max(0, 1 - |dx|) * max(0, 1 - |dy|), as bilinear reading is defined."""
    out, start = 0, 0
    for level, (h, w) in enumerate(shapes):
        x = (places[:, :, :, level, :, 0] * w - 0.5)[..., None] - torch.arange(w)  # (B, Q, heads, points, w)
        y = (places[:, :, :, level, :, 1] * h - 0.5)[..., None] - torch.arange(h)
        share = (1 - y.abs()).clamp(min=0)[..., :, None] * (1 - x.abs()).clamp(min=0)[..., None, :]  # (B, Q, heads, points, h, w)
        share = (share * weights[:, :, :, level, :, None, None]).sum(3).flatten(3)  # (B, Q, heads, h * w)
        out = out + torch.einsum("bqht,bthd->bqhd", share, value[:, start:start + h * w])
        start += h * w
    return out.flatten(2)


@devices
@pytest.mark.parametrize("reach", [0.4, 1.0, 30.0])
def test_sample_is_the_slow_loop(reach, device):
    case = some_case(reach=reach)
    moved = [x.to(device) if isinstance(x, torch.Tensor) else x for x in case]
    for f in (deformable_sample, grid_sampled):  # on a CPU the first gathers
        torch.testing.assert_close(f(*moved).cpu(), slow(*case))


def test_sample_on_cell_centres_and_edges():
    value, shapes = torch.arange(1.0, 7).view(1, 6, 1, 1), [(2, 3)]
    places = torch.tensor([[0.5 / 3, 0.25], [2.5 / 3, 0.75], [0.0, 0.25], [1.0, 0.75], [0.5 / 3, 1.0], [-0.5 / 3, 0.25], [9.0, 9.0], [-9.0, 0.25]])
    read = deformable_sample(value, shapes, places.view(1, 8, 1, 1, 1, 2), torch.ones(1, 8, 1, 1, 1))
    torch.testing.assert_close(read.flatten(), torch.tensor([1.0, 6, 0.5, 3, 2, 0, 0, 0]), atol=1e-5, rtol=0)


def test_gradients():
    value, shapes, places, weights = some_case(B=2, Q=3, heads=2, d=2)
    inputs = [x.requires_grad_() for x in (value, places, weights)]
    for f in (gathered_sample, partial(gathered_sample, size=4), grid_sampled):
        assert torch.autograd.gradcheck(lambda v, p, w: f(v, shapes, p, w), inputs)


def test_gradients_are_those_of_grid_sample():
    """As one vector, with more queries than are worked on at once, and places outside."""
    value, shapes, places, weights = some_case([(20, 30), (40, 60)], Q=5000, heads=2, points=1, dtype=torch.float32)
    inputs = [x.requires_grad_() for x in (value, places, weights)]
    found, wanted = (torch.cat([g.flatten() for g in torch.autograd.grad(f(value, shapes, places, weights).square().sum(), inputs)])
                     for f in (gathered_sample, grid_sampled))
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("wanted", range(3))
def test_whatever_asks_for_a_gradient_gets_one(wanted):
    value, shapes, places, weights = some_case()
    asking = (value, places, weights)[wanted].requires_grad_()
    deformable_sample(value, shapes, places, weights).sum().backward()
    expected, = torch.autograd.grad(slow(value, shapes, places, weights).sum(), asking)
    torch.testing.assert_close(asking.grad, expected)


def test_many_images_are_as_one():
    """Every image's rows are its own."""
    value, shapes, places, weights = some_case([(20, 30), (40, 60)], B=3, Q=3000, heads=2, d=8, points=1, dtype=torch.float32)
    out = gathered_sample(value, shapes, places, weights)
    for b in range(3):
        alone = gathered_sample(value[b:b + 1], shapes, places[b:b + 1], weights[b:b + 1])
        torch.testing.assert_close(alone[0], out[b])


def test_not_a_number_does_not_crash():
    value, shapes, places, weights = some_case()
    places[0, 0] = torch.nan
    places[0, 1] = torch.inf
    read = deformable_sample(value, shapes, places, weights)
    assert (read[0, :2] == 0).all() and read[0, 2:].isfinite().all()


def test_border():
    value = torch.randn(3, sum(h * w for h, w in SHAPES), 5)
    table = _bordered(value, SHAPES)
    assert table.shape == (3, sum((h + 4) * (w + 1) for h, w in SHAPES), 5) and torch.equal(table[table != 0], value[value != 0])


def test_first_use_in_inference_mode_does_not_spoil_training():
    _plan.cache_clear(), _centres.cache_clear(), sine_positions.cache_clear()
    torch.manual_seed(0)
    decoder, maps = PixelDecoder([8, 8], width=16, layers=1, heads=2), [torch.randn(1, 6, 4, 8), torch.randn(1, 3, 2, 8)]
    with torch.inference_mode():
        decoder(maps)
    decoder(maps)[0].sum().backward()


def full_decoder(layers=3):
    torch.manual_seed(0)
    net = nn.ModuleDict({"pixel": PixelDecoder([8, 12, 16], width=32, layers=2, heads=4, points=2, ffn=32),
                         "mask": MaskDecoder(2, width=32, layers=layers, heads=4, ffn=32)})
    for module in net.modules():  # let places and weights depend on content
        if isinstance(module, DeformableAttention):
            nn.init.normal_(module.sampling_offsets.weight, std=0.2)
            nn.init.normal_(module.attention_weights.weight, std=0.2)
    return net


def run(net, maps):
    features, coarse = net["pixel"](maps)
    return net["mask"](coarse, features)


@pytest.mark.parametrize("sizes", [[(8, 12), (4, 6), (2, 3)], [(7, 5), (4, 3), (2, 2)], [(4, 4), (2, 2), (1, 1)]])
def test_any_sizes_and_every_gradient(sizes):
    net = full_decoder()
    maps = [torch.randn(2, *size, c, requires_grad=True) for size, c in zip(sizes, (8, 12, 16))]
    masks, classes = run(net, maps)
    assert masks.shape == (4, 2, *sizes[0]) and classes.shape == (4, 2, 2)
    masks.square().mean().backward()
    assert all((p.grad is not None and p.grad.isfinite().all()) == p.requires_grad for p in net.parameters())
    assert all(m.grad.isfinite().all() and m.grad.abs().sum() > 0 for m in maps)


def test_images_of_a_batch_do_not_mix():
    net = full_decoder().eval()
    maps = [torch.randn(3, *size, c) for size, c in zip([(8, 12), (4, 6), (2, 3)], (8, 12, 16))]
    with torch.no_grad():
        together = run(net, maps)[0]
        for b in range(3):
            torch.testing.assert_close(run(net, [m[b:b + 1] for m in maps])[0], together[:, b:b + 1], atol=1e-4, rtol=1e-4)


def test_bfloat16():
    """Under autocast the answer is near float32's: places are not rounded to bfloat16, where a map of 60 has steps of 1/4."""
    net = full_decoder()
    maps = [torch.randn(1, *size, c) for size, c in zip([(60, 80), (30, 40), (15, 20)], (8, 12, 16))]
    with torch.no_grad():
        exact = net["pixel"](maps)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rough = net["pixel"](maps)[0]
        masks, _ = run(net, maps)
    masks.float().square().mean().backward()
    assert (rough.float() - exact).abs().mean() < 0.03 * exact.abs().mean()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_checkpointing_computes_the_same():
    net = full_decoder().train()
    maps = [torch.randn(2, *size, c) for size, c in zip([(8, 12), (4, 6), (2, 3)], (8, 12, 16))]
    found = []
    for enable in (False, True):
        net["pixel"].set_grad_checkpointing(enable)
        net.zero_grad()
        masks, _ = run(net, maps)
        masks.square().mean().backward()
        found.append([masks, *(p.grad.clone() for p in net.parameters() if p.requires_grad)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_mask_decoder_is_mask2formers():
    """The same numbers as nn.MultiheadAttention layers that are given everything the paper gives them."""
    torch.manual_seed(0)
    ours = MaskDecoder(2, width=32, layers=3, heads=4, ffn=48).eval()
    maps, features = [torch.randn(2, 2, 3, 32), torch.randn(2, 4, 6, 32)], torch.randn(2, 32, 8, 12)

    def attention(module):
        theirs = nn.MultiheadAttention(32, 4, batch_first=True)
        theirs.load_state_dict(module.state_dict())
        return theirs

    with torch.no_grad():
        masks, _ = ours(maps, features)
        x, place, expected = ours.query_feat[:, None].expand(2, 1, -1), ours.query_embed[None], []
        for i in range(4):
            logits = torch.einsum("bc,bchw->bhw", ours.mask_embed(ours.norm(x[:, 0])), features)
            expected.append(logits)
            if i == 3:
                break
            layer, (h, w), k = ours.layers[i], maps[i % 2].shape[1:3], i % 2
            blocked = F.interpolate(logits[:, None], size=(h, w), mode="bilinear", align_corners=False).flatten(1).sigmoid() < 0.5
            blocked[blocked.all(1)] = False
            memory = maps[k].flatten(1, 2) + ours.level_embed[k]
            keys = memory + sine_positions(h, w, 32).flatten(0, 1)
            x = layer.cross_norm(x + attention(layer.cross)(x + place, keys, memory, key_padding_mask=blocked)[0])
            x = layer.self_norm(x + attention(layer.self)(x + place, x + place, x)[0])
            x = layer.ffn_norm(x + layer.ffn(x))
    torch.testing.assert_close(masks, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_query_attention_reads_only_what_is_not_blocked():
    torch.manual_seed(0)
    attention, query, memory, positions = QueryAttention(16, 4), torch.randn(3, 16), torch.randn(3, 6, 16), torch.randn(6, 16)
    blocked = torch.tensor([[0, 1, 1, 0, 0, 1], [1] * 6, [0] * 6]).bool()
    A = attention.attend(query, memory, positions, blocked)
    torch.testing.assert_close(A.sum(-1), torch.ones(3, 4))
    assert (A[0, :, blocked[0]] == 0).all() and (A[1] > 0).all() and (A[2] > 0).all()


def test_bad_sizes_are_named():
    for build in (lambda: PixelDecoder([8]), lambda: PixelDecoder([8, 8], width=20), lambda: DeformableAttention(32, heads=5),
                  lambda: MaskDecoder(2, width=32, heads=5), lambda: sine_positions(2, 2, 6)):
        with pytest.raises(RISError):
            build()


@pytest.mark.parametrize("name", ["magnet_tiny", "magnet_full"])
def test_released_decoders(name):
    """Every released entry has a place, and features, masks and classes are the released network's."""
    if find_case(name) is None:
        pytest.skip(f"the reference {name} does not ship with the repository")
    case = load_case(name)
    config, released = case.spec["config"], {k: v for k, v in case.spec["keys"].items() if k.startswith("classifier.")}
    case.spec["keys"] = released
    state = {released_mask_decoder_key(key): value for key, value in released_state(case).items()}
    assert len(state) == len(released) and None not in state
    width = config["embed_dim"]
    net = nn.ModuleDict({"pixel_decoder": PixelDecoder([width * 2**k for k in range(4)], layers=config["enc_layers"]),
                         "mask_decoder": MaskDecoder(3, layers=config["dec_layers"] - 1)})
    net.load_state_dict(state)
    if name == "magnet_full":
        sizes = [sum(p.numel() for p in part.parameters()) for part in net.values()]
        assert [round(n / 1e6, 2) for n in sizes] == [3.59, 14.41]
        return  # its maps are stored in part only
    with torch.no_grad():
        features, coarse = net["pixel_decoder"]([case[f"s{k}"].permute(0, 2, 3, 1) for k in (1, 2, 3, 4)])
        masks, classes = net["mask_decoder"](coarse, features)
    torch.testing.assert_close(features[..., ::4, ::4], case["mask_features"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(masks[-1][:, None], case["pred_masks"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(masks[:-1, :, None], case["aux_masks"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(classes[-1][:, None], case["pred_logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@torch.no_grad()
def test_torch_compile_leaves_out_nothing_but_the_sampling_on_a_cpu(monkeypatch):
    torch.manual_seed(0)
    decoder = PixelDecoder([8, 16, 32], width=32, layers=1, heads=2, points=2, ffn=32).eval()
    maps = [torch.randn(2, 8, 8, 8), torch.randn(2, 4, 4, 16), torch.randn(2, 2, 2, 32)]
    torch.testing.assert_close(torch.compile(decoder, backend="eager")(maps), decoder(maps))
    reasons = [found.reason for found in torch._dynamo.explain(decoder)(maps).break_reasons]
    assert reasons and all("function gathered_sample" in reason for reason in reasons)
    monkeypatch.setattr(mask_decoder, "deformable_sample", grid_sampled)  # as on a GPU
    assert torch._dynamo.explain(decoder)(maps).graph_break_count == 0
