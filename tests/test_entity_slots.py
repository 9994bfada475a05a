"""Entity discovery and slot decoder: the released numbers, mixed precision, chunks, edges, and what reaches whom."""
import pytest
import torch
import torch.nn.functional as F
from parity import find_case, load_case, released_state
from plain_sag import sag_inputs

from ris_nb.contract import RISError
from ris_nb.models.entity_slots import (SLOT_KINDS, Aggregation, EntityDiscovery, EntitySlots, compete, reconstruction_loss,
                                        start_as_kmeans)
from ris_nb.models.released_sag import released_decoder_key, released_slots_key
from ris_nb.models.repainting import SlotDecoder, reconstruct

CASES = ("sag_tiny", "sag_tiny_random", "sag_tiny_query", "sag_tiny_nointer", "sag_tiny_transformer")
SMALL = dict(gaussians=3, per_gaussian=2, iterations=3, heads=4, head_width=8, self_head_width=8, ffn=64)


def part(state, prefix, rename):
    """The entries under `prefix` that `rename` knows, by our names."""
    return {name: value for key, value in state.items() if key.startswith(prefix) and (name := rename(key.removeprefix(prefix)))}


def plain_decoder(m, slots, grid):
    """The slot decoder with every layer for each pair of slot and patch."""
    x = slots[:, :, None] + m.positions(grid)
    for layer in m.layers[:3]:
        x = F.relu(layer(x))
    x = m.layers[3](x)
    alpha = x[..., -1].softmax(1)
    return (alpha[..., None] * x[..., :-1]).sum(1), alpha


@pytest.mark.parametrize("name", CASES)
def test_released_parity(name):
    """Slots, attention, reconstruction and the decoder's gradients of the released network, from its ViT's tokens."""
    if find_case(name) is None:
        pytest.skip(f"the reference {name} is not here")
    case = load_case(name)
    state, options = released_state(case), case.spec["options"]
    image, width = "encoders.img_enc.", options["embed_dim"]
    discovery = EntityDiscovery(
        192, width, options["img_num_embeds"] // options["cascade_factor"], options["cascade_factor"], options["agg_depth"],
        options.get("agg_query_type", "entity"), options["agg_cross_head"], options["agg_cross_dim"], options["agg_latent_head"],
        options["agg_latent_dim"], 4 * width, interaction=name != "sag_tiny_nointer",
        competition=options.get("agg_cross_attn_type", "slots").replace("transformer", "pixels")).eval()
    decoder = SlotDecoder(width, 192, hidden=width)
    discovery.load_state_dict(part(state, image, lambda key: released_slots_key(key, options.get("agg_query_type", "entity"))))
    decoder.load_state_dict(part(state, "decoder.", released_decoder_key))

    V, (_, _, eps) = case["vit_tokens"][:, 1:], sag_inputs(case)
    slots, A_slot = discovery(V, (7, 7), eps)
    V_hat, alpha = decoder(slots, (7, 7))
    loss = reconstruction_loss(V_hat, V)
    for key, ours in {"slots_init": discovery.slots(len(V), eps), "slots": slots, "A_slot": A_slot, "recon": V_hat, "alpha": alpha}.items():
        assert (ours - case[key]).abs().max() < 1e-4, key
    assert abs(loss.item() - case["recon_loss"].item()) < 1e-4
    loss.backward()
    for key, norm in case.spec["grad_norms"].items():
        if key.startswith("decoder."):  # nothing else reaches the decoder
            grad = decoder.get_parameter(released_decoder_key(key.removeprefix("decoder."))).grad
            assert abs(grad.norm().item() - norm) < 1e-4 * max(1, norm), key


def test_every_released_entry_has_a_place():
    """All of a released SaG's entries for this part are known, except the duplicates and one layer that is never used."""
    if find_case("sag_tiny") is None:
        pytest.skip("the small SaG reference is not here")
    keys = load_case("sag_tiny").spec["keys"]
    image = [key.removeprefix("encoders.img_enc.") for key in keys if key.startswith("encoders.img_enc.")]
    unknown = {key for key in image if not key.startswith(("img_backbone.", "residual_fc.")) and released_slots_key(key) is None}
    assert unknown == {"set_pred_module.fc.weight", "set_pred_module.fc.bias"}
    assert all(released_decoder_key(key.removeprefix("decoder.")) for key in keys if key.startswith("decoder."))
    assert released_slots_key("set_pred_module.agg.agg_blocks.3.0.norm.weight") is None


@pytest.mark.parametrize("N, K, grid, chunk", [(1, 1, (1, 1), 1), (2, 6, (5, 7), 1), (3, 4, (2, 9), 600), (2, 6, (4, 4), 2**20)])
def test_decoder_equals_the_plain_one_in_double_precision(N, K, grid, chunk):
    torch.manual_seed(0)
    m = SlotDecoder(16, 11, hidden=24, table=9, chunk=chunk).double()
    P = grid[0] * grid[1]
    slots, V = torch.randn(N, K, 16).double(), torch.randn(N, P, 11).double()
    weight = torch.randn(N, K, P).double()
    found = []
    for decode in (m, lambda *x: plain_decoder(m, *x)):
        s = slots.clone().requires_grad_(True)
        m.zero_grad()
        V_hat, alpha = decode(s, grid)
        (reconstruction_loss(V_hat, V) + (alpha * weight).sum()).backward()
        found.append([V_hat, alpha, s.grad, *(p.grad for p in m.parameters())])
    for mine, plain in zip(*found):
        torch.testing.assert_close(mine, plain, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("N, K, grid, chunk", [(1, 1, (1, 1), 1), (2, 6, (5, 7), 1), (3, 4, (2, 9), 600), (2, 6, (4, 4), 2**20)])
def test_reconstruct_equals_autograd_in_double_precision(N, K, grid, chunk):
    """The gradient made along with the loss, scaled by whatever comes after, against the plain decoder's."""
    torch.manual_seed(0)
    m = SlotDecoder(16, 11, hidden=24, table=9, chunk=chunk).double()
    slots, V = torch.randn(N, K, 16).double(), torch.randn(N, grid[0] * grid[1], 11).double().requires_grad_(True)
    found = []
    for plain in (False, True):
        s = slots.clone().requires_grad_(True)
        m.zero_grad()
        V_hat, alpha = plain_decoder(m, s, grid) if plain else (None, None)
        loss, V_hat, alpha = (reconstruction_loss(V_hat, V), V_hat, alpha) if plain else reconstruct(m, s, grid, V)
        (loss * 0.3 + s.sum()).backward()
        found.append([loss, V_hat, alpha, s.grad, *(p.grad for p in m.parameters())])
    for mine, plain in zip(*found):
        torch.testing.assert_close(mine, plain, atol=1e-10, rtol=1e-8)
    assert V.grad is None


def test_reconstruct_in_mixed_precision():
    torch.manual_seed(0)
    m, slots, V = SlotDecoder(32, 48, hidden=32, chunk=2000), torch.randn(2, 6, 32), torch.randn(2, 64, 48)
    grads = []
    for enabled in (False, True):
        s = slots.clone().requires_grad_(True)
        m.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, V_hat, alpha = reconstruct(m, s, (8, 8), V)
        assert loss.dtype == alpha.dtype == torch.float32
        loss.backward()
        grads.append([loss.detach(), s.grad, *(p.grad for p in m.parameters())])
    for half, full in zip(*reversed(grads)):
        assert half.dtype == torch.float32 and (half - full).norm() < 0.15 * full.norm() + 1e-6


def test_decoder_keeps_little_and_trains_frozen_slots():
    torch.manual_seed(0)
    m, slots = SlotDecoder(32, 24, hidden=64, chunk=2 * 8 * 64 * 4), torch.randn(2, 8, 32)  # no gradient to the slots
    kept = {}

    def note(x):
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        V_hat, _ = m(slots, (10, 10))
    pairs = 2 * 8 * 100 * 64  # numbers in one layer of all pairs
    assert sum(kept.values()) < pairs / 2
    V_hat.sum().backward()
    assert all(p.grad is not None for p in m.parameters())
    m.requires_grad_(False)
    moved = slots.clone().requires_grad_(True)
    m(moved, (10, 10))[0].sum().backward()
    assert moved.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype):
    """Half precision in the products, float32 where sums are taken: near the float32 answer, finite gradients."""
    torch.manual_seed(0)
    discovery, decoder = EntityDiscovery(48, 32, **SMALL, dropout=0.0), SlotDecoder(32, 48, hidden=32, chunk=2000)
    V, noise = torch.randn(2, 64, 48), torch.randn(2, 6, 32)
    exact, exact_A = discovery(V, (8, 8), noise)
    exact_V, _ = decoder(exact, (8, 8))
    with torch.autocast("cpu", dtype):
        slots, A_slot = discovery(V, (8, 8), noise)
        V_hat, alpha = decoder(slots, (8, 8))
        loss = reconstruction_loss(V_hat, V.to(dtype))
    assert A_slot.dtype == alpha.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(A_slot.sum(1), torch.ones(2, 64))
    torch.testing.assert_close(alpha.sum(1), torch.ones(2, 64))
    for half, full in ((slots, exact), (A_slot, exact_A), (V_hat, exact_V)):
        assert (half.float() - full).norm() < 0.05 * full.norm()
    loss.backward()
    for p in (*discovery.parameters(), *decoder.parameters()):
        assert p.grad is None or p.grad.isfinite().all()


def test_what_reaches_whom():
    """Every parameter that can learns from the reconstruction, through the slots, but not the target."""
    torch.manual_seed(0)
    discovery, decoder = EntityDiscovery(48, 32, **SMALL).double(), SlotDecoder(32, 48, hidden=32).double()
    V = torch.randn(2, 64, 48, dtype=torch.float64, requires_grad=True)
    slots, _ = discovery(V, (8, 8), torch.randn(2, 6, 32))
    V_hat, _ = decoder(slots, (8, 8))
    assert torch.autograd.grad(reconstruction_loss(V_hat.detach().requires_grad_(), V), V, allow_unused=True)[0] is None
    reconstruction_loss(V_hat, V).backward()
    assert V.grad.abs().sum() > 0  # through the slots
    silent = {name for name, p in discovery.named_parameters() if p.grad.abs().max() < 1e-12}
    assert silent == {"aggregation.norm.bias"}  # adds the same to the scores of all slots that compete for a pixel


@pytest.mark.parametrize("kind", SLOT_KINDS)
@pytest.mark.parametrize("gaussians, per_gaussian, grid", [(1, 1, (1, 1)), (4, 1, (3, 2)), (1, 5, (2, 7)), (3, 4, (6, 5))])
def test_sizes_and_invariants(kind, gaussians, per_gaussian, grid):
    torch.manual_seed(0)
    K, P = gaussians * per_gaussian, grid[0] * grid[1]
    m = EntityDiscovery(20, 16, gaussians, per_gaussian, 2, kind, 2, 6, 1, 5, 24).eval()
    V, noise = torch.randn(3, P, 20), torch.randn(3, K, 16)
    slots, A, maps = m(V, grid, noise, history=True)
    assert slots.shape == (3, K, 16) and A.shape == (3, K, P) and len(maps) == 2
    for each in maps:
        torch.testing.assert_close(each.sum(1), torch.ones(3, P))
    order = torch.tensor([2, 0, 1])
    again, again_A = m(V[order], grid, noise[order])
    torch.testing.assert_close(again, slots[order], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again_A, A[order], atol=1e-5, rtol=1e-4)


def test_dropout_only_in_training():
    torch.manual_seed(0)
    m, V, noise = EntityDiscovery(20, 16, **SMALL), torch.randn(1, 12, 20), torch.randn(1, 6, 16)
    assert not torch.equal(m(V, (3, 4), noise)[0], m(V, (3, 4), noise)[0])
    m.eval()
    assert torch.equal(m(V, (3, 4), noise)[0], m(V, (3, 4), noise)[0])


def test_first_slots():
    """Statistics of entity slots, and that noise of K slots serves every image."""
    torch.manual_seed(0)
    slots = EntitySlots(18, 2, 512)
    S = slots(1, torch.randn(36, 512)) - slots(1)
    assert 0.97 < S.norm(dim=-1).mean() < 1.05
    assert slots.mu.abs().max() <= (6 / (512 * 19)) ** 0.5
    one = torch.randn(36, 512)
    assert torch.equal(slots(3, one)[0], slots(3, one)[2])


def test_half_precision_scores_are_summed_in_float32():
    scores = torch.randn(1, 36, 4096, dtype=torch.float16)
    A, W = compete(scores)
    assert A.dtype == W.dtype == torch.float32
    torch.testing.assert_close(W.sum(-1), torch.ones(1, 36))


def test_start_as_kmeans_groups_what_is_alike():
    """Four kinds of patches, four slots that begin at one of each: every kind goes to its own slot, before any training."""
    torch.manual_seed(0)
    kinds = 3 * torch.eye(16)[:4]
    V = kinds[torch.arange(36) % 4][None] + 0.1 * torch.randn(1, 36, 16)
    discovery = EntityDiscovery(16, 16, 4, 1, iterations=3, slots="query", heads=2, head_width=8, self_head_width=8, ffn=32).eval()
    start_as_kmeans(discovery)
    discovery.slots.params.data.copy_(kinds)
    with torch.no_grad():
        won = discovery(V, (6, 6))[1][0].argmax(0)
    assert won.tolist() == [i % 4 for i in range(36)]
    assert all(p.requires_grad for p in discovery.parameters())


@pytest.mark.parametrize("make, words", [
    (lambda: EntityDiscovery(20, 16, 3, 2, slots="entities"), "entity, random, query"),
    (lambda: EntityDiscovery(20, 18, 3, 2), "that 4 divides"),
    (lambda: Aggregation(16, competition="pixel"), "slots"),
    (lambda: SlotDecoder(16, 20, table=4).positions((4, 5)), "smaller image"),
    (lambda: start_as_kmeans(EntityDiscovery(48, 32, gaussians=3, per_gaussian=2)), "features of width 48, slots of 32 and heads of 1024 together"),
])
def test_bad_sizes_are_named(make, words):
    with pytest.raises(RISError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)
