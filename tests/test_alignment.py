"""The alignment module and loss: the released arithmetic, edges, mixed precision, gradients, and what seeds decide."""
import re

import pytest
import torch
import torch.nn.functional as F
from parity import find_case, load_case, make_inputs, released_state
from torch import nn

from ris_nb.contract import RISError
from ris_nb.encoders.language import TextEncoder
from ris_nb.encoders.vision import Swin
from ris_nb.models.alignment import ImageAlignment, LanguageAlignment, _sample_pixels, alignment_loss, alignment_terms
from ris_nb.models.fast_maps import _enlarging_matrix, _pooling_matrix, enlarge_grids, pool_grids
from ris_nb.models.released import released_swin_key
from ris_nb.models.released_alignment import ReleasedLanguageAlignment
from ris_nb.models.released_magnet import released_image_alignment_key, released_language_alignment_key

WORDS = torch.arange(20) < torch.tensor([[6], [20]])


def data(size=(5, 7), width=16, language_width=24):
    torch.manual_seed(0)
    return torch.randn(2, *size, width), torch.randn(2, 20, language_width)


def opened(side):
    """Random gates, so that what the module computes shows."""
    for layer in (0, 2):
        nn.init.normal_(side.gate.layers[layer].weight, std=0.3)
    return side


def part(state, prefix, rename):
    """The entries under `prefix` that `rename` knows, by our names; kernels of 1x1 convolutions as matrices."""
    return {name: value.flatten(1) if value.ndim > 2 else value for key, value in state.items()
            if key.startswith(prefix) and (name := rename(key.removeprefix(prefix)))}


@pytest.mark.skipif(find_case("magnet_tiny") is None, reason="the small MagNet reference is not here")
@torch.no_grad()
def test_released_parity():
    """Both encoders of the released network, stage by stage, with our alignment between them."""
    case = load_case("magnet_tiny")
    state, config = released_state(case), case.spec["config"]
    bert, alignment = config["bert"], r"(pwams|res_gates|norms)\."
    text = TextEncoder(bert["vocab_size"], 768, bert["num_hidden_layers"], 12, bert["intermediate_size"]).eval()
    text.load_released({key.removeprefix("language_model."): value for key, value in state.items()
                        if key.startswith("language_model.") and not re.match("language_model." + alignment, key)})
    swin = Swin(config["embed_dim"], config["depths"], config["num_heads"], config["window"], drop_path=0.0).eval()
    ours = re.compile(r"layers\.\d\.(fusion|res_gate|pyramids|mixer)|norm\d")
    names = {key: key.removeprefix("image_model.") for key in state if key.startswith("image_model.")}
    swin.load_state_dict({released_swin_key(name): state[key] for key, name in names.items() if not ours.match(name) and released_swin_key(name)})
    sides = [ImageAlignment(width, 768).eval() for width in swin.widths]
    others = nn.ModuleList(ReleasedLanguageAlignment(768, width) for width in swin.widths).eval()
    for k, side in enumerate(sides):
        side.load_state_dict(part(state, f"image_model.layers.{k}.", released_image_alignment_key))
    others.load_state_dict(part(state, "language_model.", released_language_alignment_key))

    image, ids, words = make_inputs(case)
    x, l, step = swin.embed(image), text.embed(ids), text.depth // len(sides)
    for k, (side, other) in enumerate(zip(sides, others)):
        x, l = swin.stages[k](x), text.run(l, words, k * step, (k + 1) * step)
        (s, onward), l = side(x, l, words), other(l, words, x)
        assert (s.permute(0, 3, 1, 2) - case[f"s{k + 1}"]).abs().max() < 1e-4
        assert (l - case[f"l{k + 1}"]).abs().max() < 1e-4
        if k < len(sides) - 1:
            x = swin.merges[k](onward)


@pytest.mark.parametrize("size", [(5, 7), (2, 3), (1, 1), (3, 40)])
def test_released_arithmetic_written_out(size):
    x, l = data(size)
    m = opened(ReleasedLanguageAlignment(24, 16))
    with torch.no_grad():
        pixels = x.flatten(1, 2)
        K, V = (F.instance_norm(layer(pixels).mT, eps=1e-5).mT if pixels.shape[1] > 1 else torch.zeros(2, 1, 24)
                for layer in (m.key, m.value))
        additive = torch.where(WORDS, 0.0, -10000.0)[..., None]
        scores = (24 ** -0.5 * ((m.query(l) * additive) @ K.mT)) + (1e4 * additive - 1e4)
        out = F.instance_norm(m.mix(scores.softmax(-1) @ V).mT).mT
        r = F.gelu(m.project(F.gelu(m.visual(l)) * out))
        expected = l + m.gate(r) * r
        torch.testing.assert_close(m(l, WORDS, x), expected, atol=1e-4, rtol=1e-4)


def test_released_language_side_is_inert():
    x, l = data()
    m = ReleasedLanguageAlignment(24, 16)
    assert torch.equal(m(l, WORDS, x), l)
    m(l, WORDS, x).square().sum().backward()
    trained = [p for p in m.parameters() if p.requires_grad]
    assert all((p.grad == 0).all() for p in trained) and len(trained) == len(list(m.parameters())) - 4


def test_every_parameter_gets_a_gradient():  # as distributed training demands, in the very first step
    x, l = data()
    image, language = ImageAlignment(16, 24), LanguageAlignment(24, 16)
    s, onward = image(x, l, WORDS)
    (s.sum() + onward.sum() + language(l, WORDS, x).sum()).backward()
    assert all(p.grad is not None for module in (image, language) for p in module.parameters())


def test_what_each_output_of_the_image_side_teaches():
    x, l = data()
    image = ImageAlignment(16, 24)
    for k, parts in enumerate(({"fusion", "regions", "mixer"}, {"fusion", "gate"})):  # the decoder's map, the next stage's
        image.zero_grad()
        image(x, l, WORDS)[k].sum().backward()
        assert {name.split(".")[0] for name, p in image.named_parameters() if p.grad is not None} == parts


def test_gradients_of_the_short_way():
    """Folding the keys into the queries changes neither the result nor any gradient."""
    x, l = data()
    m = opened(LanguageAlignment(24, 16)).double()
    x, l = x.double().requires_grad_(), l.double().requires_grad_()

    def written_out():
        K, V = (F.instance_norm(layer(x.flatten(1, 2)).mT, eps=1e-5).mT for layer in (m.key, m.value))
        A = (m.query(l) @ K.mT / 24 ** 0.5).softmax(-1)
        r = F.gelu(m.project(F.gelu(m.visual(l)) * m.mix_norm(m.mix(A @ V))))
        return l + m.gate(r) * r * WORDS[..., None]

    wanted = [x, l, *m.parameters()]
    short, long = m(l, WORDS, x), written_out()
    torch.testing.assert_close(short, long)
    for a, b in zip(torch.autograd.grad(short.square().sum(), wanted), torch.autograd.grad(long.square().sum(), wanted)):
        torch.testing.assert_close(a, b)


def test_keys_have_a_home():
    assert released_image_alignment_key("pyramids.0.0.weight") is None  # the pooling has none
    assert released_image_alignment_key("mixer.3.weight") is None
    assert released_language_alignment_key("pwams.0.unknown.weight") is None
    assert released_language_alignment_key("res_gates.3.0.weight") == "3.gate.layers.0.weight"


def test_pooling_after_inference_can_be_trained_through():
    _pooling_matrix.cache_clear(), _enlarging_matrix.cache_clear()
    x, l = data((9, 8))
    m = ImageAlignment(16, 24)
    with torch.inference_mode():
        m(x, l, WORDS)
    m(x.requires_grad_(), l, WORDS)[0].sum().backward()
    assert x.grad.abs().max() > 0


def test_grids_other_than_the_papers():
    x = torch.randn(2, 7, 4, 6)
    for z, g in zip(pool_grids(x, (5, 2)), (5, 2)):
        torch.testing.assert_close(z, F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), g).permute(0, 2, 3, 1))
    one = torch.randn(2, 1, 1, 6)
    torch.testing.assert_close(enlarge_grids([one], (3, 4)), one.expand(2, 3, 4, 6))


@pytest.mark.parametrize("released", [True, False])
def test_bfloat16(released):
    x, l = data((12, 12))
    image, language = ImageAlignment(16, 24), opened((ReleasedLanguageAlignment if released else LanguageAlignment)(24, 16))
    with torch.autocast("cpu", torch.bfloat16):
        s, onward = image(x, l, WORDS)
        heard = language(l, WORDS, x)
        loss = s.float().square().mean() + onward.float().square().mean() + heard.float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for m in (image, language) for p in m.parameters() if p.grad is not None)
    if not released:  # the released scores need float32's last digits
        assert (heard - language(l, WORDS, x)).abs().max() < 0.1
    assert (s - image(x, l, WORDS)[0]).abs().max() < 0.1


def test_loss_in_bfloat16_is_computed_in_float32():
    torch.manual_seed(0)
    pixels, sentence, mask = torch.randn(2, 8, 6, 6), torch.randn(2, 8), torch.rand(2, 6, 6) > 0.6
    with torch.autocast("cpu", torch.bfloat16):
        inside = alignment_loss(pixels, sentence, mask)
    assert inside.dtype == torch.float32 and torch.equal(inside, alignment_loss(pixels, sentence, mask))


def test_loss_gradients():
    torch.manual_seed(0)
    mask = torch.rand(2, 3, 3) > 0.5
    mask[:, 0, 0], mask[:, 0, 1] = True, False
    pixels, sentence = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    alignment_loss(pixels, sentence, mask, temperatures=(1, 1, 1)).backward()
    step = 1e-2
    for tensor, index in ((pixels, (0, 1, 2, 2)), (pixels, (1, 3, 0, 1)), (sentence, (1, 2))):
        moved = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor[index] += sign * step
                moved.append(alignment_loss(pixels, sentence, mask, temperatures=(1, 1, 1)).item())
                tensor[index] -= sign * step
        assert abs((moved[0] - moved[1]) / (2 * step) - tensor.grad[index].item()) < 1e-3


@pytest.mark.parametrize("fill", [True, False])
def test_an_empty_or_full_mask_counts_zero(fill):
    pixels = torch.randn(2, 4, 3, 3, requires_grad=True)
    loss = alignment_loss(pixels, torch.randn(2, 4), torch.full((2, 3, 3), fill))
    loss.backward()
    assert loss == 0 and (pixels.grad == 0).all()


def test_a_dead_pixel_sends_no_exploding_gradient():
    torch.manual_seed(0)
    pixels, sentence, mask = torch.randn(4, 8, 5, 6), torch.randn(4, 8), torch.rand(4, 5, 6) > 0.7
    mask[1], mask[2] = False, True
    pixels[3, :, 0, 0] = 0  # no direction
    terms = alignment_terms(pixels.requires_grad_(), sentence, mask)
    assert (terms[1:3] == 0).all() and (terms[[0, 3]] > 0).all()
    terms.sum().backward()
    assert (pixels.grad[1:3] == 0).all() and pixels.grad.isfinite().all() and pixels.grad.abs().max() < 1000


def test_sampling():
    torch.manual_seed(0)
    e, inside = torch.randn(3, 400, 2), torch.zeros(3, 400, dtype=torch.bool)
    inside[0, :7], inside[1, :300] = True, True
    picked, real = _sample_pixels(e, inside, 50)
    assert picked.shape == (3, 50, 2) and real.sum(1).tolist() == [7, 50, 0]
    assert all((e[0, :7] == p).all(1).any() for p in picked[0, :7])
    pixels, sentence = torch.randn(2, 4, 20, 20), torch.randn(2, 4)
    mask = torch.rand(2, 20, 20) > 0.9
    torch.manual_seed(1)
    sampled = alignment_terms(pixels, sentence, mask, max_pixels=100)
    torch.manual_seed(1)
    assert torch.equal(sampled, alignment_terms(pixels, sentence, mask, max_pixels=100))  # the seed decides
    whole = alignment_terms(pixels, sentence, mask)
    assert (sampled < whole)[:, [0, 2]].all()  # fewer pixels to be told from; those inside are all there
    state = torch.get_rng_state()
    alignment_terms(pixels, sentence, mask)
    assert torch.equal(state, torch.get_rng_state())  # nothing is drawn where all fit


def test_misfits_are_named():
    with pytest.raises(RISError, match=r"\(B, D, h, w\)"):
        alignment_loss(torch.randn(2, 4, 3, 3), torch.randn(2, 5), torch.ones(2, 3, 3, dtype=torch.bool))
    with pytest.raises(RISError, match=r"mask \(2, 6, 6\)"):
        alignment_loss(torch.randn(2, 4, 3, 3), torch.randn(2, 4), torch.ones(2, 6, 6, dtype=torch.bool))
    with pytest.raises(RISError, match="4 grids"):
        ImageAlignment(10, 8)
