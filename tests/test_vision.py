"""Swin and ViT against slow references, timm and the released networks."""
import json
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from ris_nb.contract import RISError
from ris_nb.encoders.vision import (Swin, SwinBlock, ViT, attend_windows, from_windows, pretrained_timm, resize_positions,
                                    shift_mask, to_windows, window_order)
from ris_nb.models.released import released_swin_key

HERE = Path(__file__).resolve().parent


def redraw(module, seed=0):
    """Weights large enough that every part matters."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.5 if p.ndim == 1 else p.shape[-1] ** -0.5))


@torch.no_grad()
def slow_attend(block, x):
    """The attention step of one block for one map (H, W, C), by loops over windows, heads and pairs of cells.

    Padding comes first, then the shift: the cell that stands at (r, c) after the shift is the padded map's cell
    ((r + s) mod H, (c + s) mod W). Cells of a window attend to each other where no edge lies between them.
    """
    H, W, C = x.shape
    w, s, attn = block.window_size[0], block.shift_size[0], block.attn
    Hp, Wp = -(-H // w) * w, -(-W // w) * w
    padded = torch.zeros(Hp, Wp, C)
    padded[:H, :W] = x
    q, k, v = attn.qkv(padded).chunk(3, -1)
    heads, out = attn.num_heads, torch.zeros(Hp, Wp, C)
    d = C // heads
    for top in range(0, Hp, w):
        for left in range(0, Wp, w):
            cells = [((top + i + s) % Hp, (left + j + s) % Wp, i, j) for i in range(w) for j in range(w)]
            for r, c, i, j in cells:
                for h in range(heads):
                    part = slice(h * d, (h + 1) * d)
                    scores = []
                    for r2, c2, i2, j2 in cells:
                        bias = attn.relative_position_bias_table[(i - i2 + w - 1) * (2 * w - 1) + (j - j2 + w - 1), h]
                        # a cell came round an edge if its true row is not the row the window counts to
                        wrapped = (r - i == r2 - i2) and (c - j == c2 - j2)
                        scores.append(q[r, c, part] @ k[r2, c2, part] / d**0.5 + bias + (0.0 if wrapped or not s else -100.0))
                    weights = torch.stack(scores).softmax(0)
                    out[r, c, part] = sum(a * v[r2, c2, part] for a, (r2, c2, _, _) in zip(weights, cells))
    return attn.proj(out)[:H, :W]


@pytest.mark.parametrize("size", [(8, 8), (4, 4), (5, 5), (2, 2), (3, 7), (10, 5), (1, 9)])
@pytest.mark.parametrize("shift", [0, 2])
def test_block_matches_the_loop_over_windows(size, shift):
    block = SwinBlock(8, 2, 4, shift).eval()
    redraw(block, 3)
    x = torch.randn(2, *size, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = block.attend(x)
    for i in range(2):
        torch.testing.assert_close(got[i], slow_attend(block, x[i]), atol=2e-5, rtol=0)


@pytest.mark.parametrize("size, shift", [((8, 8), 2), ((8, 12), 0), ((12, 12), 2)])
def test_block_equals_timm_on_whole_windows(size, shift):
    from timm.models.swin_transformer import SwinTransformerBlock

    ours = SwinBlock(8, 2, 4, shift).eval()
    redraw(ours)
    theirs = SwinTransformerBlock(8, size, 2, window_size=4, shift_size=shift, always_partition=True).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, *size, 8)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)


def test_block_and_timm_on_padded_maps():
    """The two orders part where a map is padded, except where padding and shift are equal (6 = 4 + 2)."""
    from timm.models.swin_transformer import SwinTransformerBlock

    ours = SwinBlock(8, 2, 4, 2).eval()
    redraw(ours)
    for size, same in [(4, True), (5, False), (6, True), (7, False), (8, True), (9, False), (10, True)]:
        theirs = SwinTransformerBlock(8, (size, size), 2, window_size=4, shift_size=2, always_partition=True).eval()
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(1, size, size, 8)
        difference = (ours(x) - theirs(x)).abs().max()
        assert difference < 1e-5 if same else difference > 0.01, size


def test_windows_and_masks():
    x = torch.arange(2 * 4 * 6 * 3.0).view(2, 4, 6, 3)
    assert torch.equal(from_windows(to_windows(x, 2), 2, 4, 6), x)
    assert torch.equal(to_windows(x, 2)[1], x[0, :2, 2:4].reshape(4, 3))
    mask = shift_mask(8, 8, 4, 2)
    assert mask.shape == (4, 16, 16) and set(mask.unique().tolist()) == {-100.0, 0.0}
    assert (mask[0] == 0).all() and (mask[3] == 0).sum() == 4 * 4 * 4
    assert shift_mask(8, 8, 4, 2) is mask
    with torch.inference_mode():
        born = shift_mask(24, 24, 4, 2)
    (born * torch.ones(1, requires_grad=True)).sum().backward()


def test_attention_backpropagates_to_the_bias_table():
    block = SwinBlock(8, 2, 4, 2)
    block(torch.randn(1, 6, 5, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())


@pytest.mark.parametrize("size", [(64, 64), (37, 50)])
def test_swin_in_low_precision(size):
    swin = Swin(16, (2, 2, 2, 2), (1, 1, 2, 2), window=4, drop_path=0.0)
    image = torch.randn(1, 3, *size)
    exact = swin(image)[-1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = swin(image)[-1]
        near.float().square().mean().backward()
    assert (near - exact).abs().max() < 0.1 * exact.abs().max()
    assert swin.bfloat16()(image.bfloat16())[-1].dtype == torch.bfloat16


@pytest.mark.parametrize("size", [(64, 64), (37, 50), (16, 130), (4, 4), (1, 1)])
def test_swin_takes_any_size(size):
    swin = Swin(8, (1, 2, 1, 2), (1, 1, 2, 2), window=4).eval()
    with torch.no_grad():
        maps = swin(torch.randn(1, 3, *size))
    h, w = -(-size[0] // 4), -(-size[1] // 4)
    for k, m in enumerate(maps):
        assert m.shape == (1, h, w, 8 * 2**k) and m.isfinite().all()
        h, w = -(-h // 2), -(-w // 2)


def test_swin_batch_is_independent_and_mode_matters():
    swin = Swin(8, (2, 2, 2, 2), (1, 1, 2, 2), window=4, drop_path=0.5)
    image = torch.randn(4, 3, 40, 40)
    swin.eval()
    with torch.no_grad():
        for whole, single in zip(swin(image), swin(image[2:3])):
            torch.testing.assert_close(whole[2:3], single, atol=1e-5, rtol=0)
        swin.train()
        torch.manual_seed(0)
        assert not torch.allclose(swin(image)[-1], swin(image)[-1])
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for s in swin.stages for b in s]
    assert rates == pytest.approx([0.5 * i / 7 for i in range(8)])


def test_swin_initialisation():
    swin = Swin(32, (2, 2, 2, 2), (1, 2, 4, 8), window=4)
    for module in swin.modules():
        if isinstance(module, nn.Linear):
            assert abs(module.weight.std() - 0.02) < 0.004
            assert module.bias is None or not module.bias.any()


def test_swin_from_timm():
    """Sizes that keep every map a whole number of windows, larger than one, where the order of padding is moot."""
    theirs = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, img_size=128, window_size=2,
                               embed_dim=8, depths=(2, 2, 4, 2), num_heads=(1, 1, 2, 2), num_classes=0).eval()
    redraw(theirs)
    ours = Swin.from_timm(theirs).eval()
    image = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        for a, b in zip(ours(image), theirs.forward_intermediates(image, intermediates_only=True)):
            torch.testing.assert_close(a, b.permute(0, 2, 3, 1), atol=2e-4, rtol=2e-4)


def test_released_names_cover_the_whole_swin():
    swin = Swin(8, (2, 2, 2, 2), (1, 1, 2, 2), window=4)
    released = {}
    for key, value in swin.state_dict().items():
        key = key.replace("merges.", "layers.") if key.startswith("merges") else key
        parts = key.split(".")
        if parts[0] == "layers":
            parts.insert(2, "downsample")
        if parts[0] == "stages":
            parts[:3] = ["layers", parts[1], "blocks", parts[2]]
        released[".".join(parts)] = value
    extra = {"norm0.weight": torch.zeros(1), "layers.0.fusion.W.weight": torch.zeros(1), "head.weight": torch.zeros(1),
             "layers.0.blocks.0.attn.relative_position_index": torch.zeros(1), "layers.1.blocks.1.attn_mask": torch.zeros(1)}
    assert set(released) != set(swin.state_dict())
    swin.load_state_dict({ours: value for key, value in (released | extra).items() if (ours := released_swin_key(key))})
    assert all(released_swin_key(k) is None for k in extra)


def weight_rule(key, shape, seed):
    """The deterministic weights the numerical references were made with."""
    x = np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode())).standard_normal(shape).astype(np.float32)
    if len(shape) >= 2:
        return x / np.sqrt(np.prod(shape[1:]), dtype=np.float32)
    return 1 + 0.1 * x if key.endswith("weight") else 0.1 * x


def test_vit_matches_the_released_network():
    """SaG's image encoder: a table for 480 pixels, resized to 112 pixels at each call."""
    case = json.loads((HERE / "parity" / "sag_tiny.json").read_text())
    data = np.load(HERE / "parity" / "sag_tiny.npz")
    prefix = "encoders.img_enc.img_backbone."
    state = {k[len(prefix):]: torch.from_numpy(np.asarray(weight_rule(k, shape, case["weight_seed"]), np.float32))
             for k, shape in case["keys"].items() if k.startswith(prefix)}
    state = {k: v for k, v in state.items() if not k.startswith("head.")}
    vit = ViT(width=192, depth=2, heads=3, patch=16, image_size=480).eval()
    vit.load_state_dict(state)
    with torch.no_grad():
        tokens = vit(torch.from_numpy(data["image"]))
    np.testing.assert_allclose(tokens.numpy(), data["vit_tokens"], atol=1e-4, rtol=0)


def test_vit_positions_and_steps():
    vit = ViT(32, 3, 4, 8, 64).eval()
    smaller = resize_positions(vit.pos_embed, (8, 8), (4, 6))
    assert smaller.shape == (1, 25, 32) and torch.equal(smaller[:, 0], vit.pos_embed[:, 0])
    image = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        x = vit.embed(image)
        for block in vit.blocks:
            x = block(x)
        assert torch.equal(vit.norm(x), vit(image)) and x.shape == (2, 1 + 4 * 6, 32)
    assert vit.norm.eps == 1e-5 and {b.norm1.eps for b in vit.blocks} == {1e-5}


def test_vit_from_timm():
    theirs = timm.create_model("vit_small_patch16_384", pretrained=False, img_size=64, embed_dim=24, depth=2,
                               num_heads=2, norm_layer=partial(nn.LayerNorm, eps=1e-5)).eval()
    ours = ViT.from_timm(theirs).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs.forward_features(image), atol=1e-5, rtol=0)


def test_errors_are_one_clear_line(monkeypatch):
    def offline(*args, **kw):
        raise OSError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", offline)
    for call, word in [
        (lambda: Swin.from_pretrained("swin_base_patch4_window12_384.ms_in22k"), "can't be fetched from the Hugging Face Hub"),
        (lambda: ViT.from_pretrained("vit_small_patch16_384.augreg_in21k_ft_in1k", 480), "can't be fetched from the Hugging Face Hub"),
        (lambda: Swin.from_pretrained("swin_enormous"), "swin_enormous"),
        (lambda: ViT.from_pretrained("resnet18"), "resnet18"),
        (lambda: pretrained_timm("vit_none", "vit_"), "vit_none"),
        (lambda: Swin(32, (2, 2), (3, 2)), "heads"),
        (lambda: ViT(32, 1, 3), "heads"),
        (lambda: ViT(32, 1, 4, 16, 64)(torch.zeros(1, 3, 30, 32)), "30 x 32"),
    ]:
        with pytest.raises(RISError) as error:
            call()
        assert word in str(error.value) and "\n" not in str(error.value)


def test_attention_without_mask_is_timms():
    attn = SwinBlock(8, 2, 4).attn
    x = torch.randn(6, 16, 8)
    torch.testing.assert_close(attn.proj(attend_windows(attn, attn.qkv(x))), attn(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(8, 8), (5, 5), (3, 9), (1, 1)])
@pytest.mark.parametrize("shift", [0, 2])
def test_one_table_pads_shifts_and_cuts(size, shift):
    H, W = size
    with torch.inference_mode():
        cell, place = window_order(H, W, 4, shift)
    x = torch.randn(2, H, W, 3, requires_grad=True)
    padded = torch.nn.functional.pad(x, (0, 0, 0, -W % 4, 0, -H % 4)).roll((-shift, -shift), (1, 2))
    fetched = torch.cat([x.flatten(1, 2), x.new_zeros(2, 1, 3)], 1)[:, cell]
    assert torch.equal(fetched.view(-1, 16, 3), to_windows(padded, 4))
    assert torch.equal(fetched[:, place].view(x.shape), x)
    fetched.sum().backward()  # a table made while predicting serves a later training step
    assert torch.equal(x.grad, torch.ones_like(x)) and window_order(H, W, 4, shift)[0] is cell
