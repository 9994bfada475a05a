"""The fusion layer and the relevance map: the released arithmetic, invariants, gradients, mixed precision, misfits."""
import pytest
import torch
import torch.nn.functional as F
from parity import find_case, load_case, make_weight

from ris_nb.contract import RISError
from ris_nb.models.c3_loss import c3_loss
from ris_nb.models.modality_fusion import SCHEMES, ModalityFusion, relevance_map
from ris_nb.models.released_sag import RELEASED_PARTS, released_fusion_key


def layer(**options):
    torch.manual_seed(0)
    return ModalityFusion(16, heads=4, head_width=8, ffn=32, **options).eval()


def data(images=3, sentences=4, slots=5):
    torch.manual_seed(1)
    return torch.randn(sentences, 16), torch.randn(images, slots, 16)


CASES = [pytest.param(name, heads, marks=pytest.mark.skipif(find_case(name) is None, reason=f"the reference {name} is not here"))
         for name, heads in (("sag_tiny", (4, 8)), ("sag_tiny_query", (4, 8)), ("sag_tiny_transformer", (4, 8)), ("sag_full", (4, 256)))]


@pytest.mark.parametrize("name, heads", CASES)
def test_released_parity(name, heads):
    """z of all pairs, A_fuse, maps, and the gradients' norms: from the reference's own slots and sentences."""
    case = load_case(name)
    state = {key.removeprefix("cma."): make_weight(case.spec["weight_seed"], key, shape)
             for key, shape in case.spec["keys"].items() if key.startswith("cma.")}
    ffn, width = state["ff.fn.net.0.weight"].shape
    fusion = ModalityFusion(width, *heads, ffn).eval()
    fusion.load_state_dict({released_fusion_key(key): value for key, value in state.items()})
    text, slots, A_slot = case["txt_emb"][:, 0], case["slots"], case["A_slot"]
    k, v = fusion.project(slots)
    z, A = fusion.all_pairs(text, k, v)
    own, A_fuse = fusion(text, k, v)
    assert (z - case["cm_feat"]).abs().max() < 1e-5 and (A_fuse - case["A_fuse"]).abs().max() < 1e-5
    for pairs, matching in ((z, own), (A, A_fuse)):
        torch.testing.assert_close(torch.stack([pairs[i, i] for i in range(len(text))]), matching)
    assert (relevance_map(A_fuse, A_slot) - case["maps"]).abs().max() < 1e-5
    c3_loss(text, z).backward()
    named = dict(fusion.named_parameters())
    for key in state:
        expected = case.spec["grad_norms"][f"cma.{key}"]
        assert abs(named[released_fusion_key(key)].grad.norm().item() - expected) < 1e-4 * expected


def test_matching_pairs_are_entries_of_all_pairs():
    fusion, (text, slots) = layer(), data()
    k, v = fusion.project(slots)
    z, A = fusion.all_pairs(text, k, v)
    which = torch.tensor([2, 0, 2, 1])
    own, A_own = fusion(text, k, v, which)
    torch.testing.assert_close(own, z[which, torch.arange(4)])
    torch.testing.assert_close(A_own, A[which, torch.arange(4)])
    torch.testing.assert_close(A.sum(-1), torch.ones(3, 4))
    assert (A > 0).all()


def test_sentences_and_images_stand_alone():
    """A sentence's answer depends on no other sentence, and on no image but the one it asks."""
    fusion, (text, slots) = layer(), data()
    which = torch.tensor([2, 0, 2, 1])
    z, A = fusion(text, *fusion.project(slots), which)
    changed = slots.clone()
    changed[1:2] = 7 * torch.randn(1, 5, 16)
    other_z, other_A = fusion(text, *fusion.project(changed), which)
    assert torch.equal(z[:3], other_z[:3]) and torch.equal(A[:3], other_A[:3]) and not torch.equal(z[3], other_z[3])
    torch.testing.assert_close(fusion(text[1:2], *fusion.project(slots[:1]))[0], z[1:2])


def test_slots_may_stand_in_any_order():
    fusion, (text, slots) = layer(), data()
    order = torch.tensor([4, 2, 0, 1, 3])
    (z, A), (other_z, other_A) = (fusion.all_pairs(text, *fusion.project(s)) for s in (slots, slots[:, order]))
    torch.testing.assert_close(other_z, z)
    torch.testing.assert_close(other_A, A[..., order])


def test_one_slot_gets_everything():
    fusion, (text, slots) = layer(), data(slots=1)
    assert (fusion.all_pairs(text, *fusion.project(slots))[1] == 1).all()


def test_dropout_falls_on_what_was_heard_alone():
    fusion, (text, slots) = layer(dropout=0.5), data()
    k, v = fusion.project(slots)
    silent = fusion.all_pairs(text, k, v)
    fusion.train()
    a, b = fusion.all_pairs(text, k, v), fusion.all_pairs(text, k, v)
    assert not torch.equal(a[0], b[0]) and torch.equal(a[1], silent[1])  # attention is not dropped
    torch.testing.assert_close(a[0].norm(dim=-1), torch.ones(3, 4))


def test_every_parameter_gets_a_gradient():
    fusion, (text, slots) = layer(), data(4, 4)
    c3_loss(text, fusion.all_pairs(text, *fusion.project(slots))[0]).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in fusion.parameters())


def test_gradients_against_finite_differences():
    fusion, (text, slots) = layer().double(), (x.double().requires_grad_() for x in data(2, 2, 3))
    assert torch.autograd.gradcheck(lambda t, s: fusion.all_pairs(t, *fusion.project(s)), (text, slots), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_keeps_stream_and_attention_in_float32(dtype):
    fusion, (text, slots) = layer(), data()
    exact = fusion.all_pairs(text, *fusion.project(slots))
    with torch.autocast("cpu", dtype):
        rough = fusion.all_pairs(text, *fusion.project(slots))
    for a, b in zip(exact, rough):
        assert b.dtype == torch.float32 and (a - b).abs().max() < 0.02
    torch.testing.assert_close(rough[1].sum(-1), torch.ones(3, 4))  # in half precision the sum would be off by thousandths
    rough[0][..., 0].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in fusion.parameters())


def test_schemes():
    torch.manual_seed(0)
    A_fuse, A_slot = torch.randn(3, 6).softmax(1), torch.randn(3, 6, 10).softmax(1)
    maps = {scheme: relevance_map(A_fuse, A_slot, scheme) for scheme in SCHEMES}
    torch.testing.assert_close(maps["weighted"], torch.einsum("bk,bkp->bp", A_fuse, A_slot))
    for b in range(3):
        assert torch.equal(maps["max"][b], A_slot[b, A_fuse[b].argmax()]) and torch.equal(maps["min"][b], A_slot[b, A_fuse[b].argmin()])
    torch.testing.assert_close(maps["average"], torch.full((3, 10), 1 / 6))  # whatever the image and the sentence
    torch.testing.assert_close(maps["area"], torch.einsum("bk,bkp->bp", A_fuse, A_slot / A_slot.sum(2, keepdim=True)))
    torch.testing.assert_close(maps["area"].sum(1), torch.ones(3))  # attention to patches
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(relevance_map(A_fuse, A_slot), maps["weighted"])
    certain = F.one_hot(torch.tensor([2, 0, 5]), 6).float()
    assert torch.equal(relevance_map(certain, A_slot), A_slot[torch.arange(3), torch.tensor([2, 0, 5])])


def test_misfits_are_named():
    fusion, (text, slots) = layer(), data()
    with pytest.raises(RISError, match="4 sentences cannot be matched with 3 images"):
        fusion(text, *fusion.project(slots))
    with pytest.raises(RISError, match="weighted, area, max, min, average, not 'avg'"):
        relevance_map(torch.ones(1, 2) / 2, torch.ones(1, 2, 3), "avg")


def test_keys_have_a_home():
    assert released_fusion_key("attn.fn.to_out.0.bias") == "out.bias"
    assert all(released_fusion_key(key) is None for key in ("attn.norm", "attn.norm.scale", "ff.fn.net.1.weight", "attn.fn.to_k"))
    ours = {released_fusion_key(f"{part}.weight") for part in RELEASED_PARTS}
    assert ours == {name for name in layer().state_dict() if name.endswith("weight")}
