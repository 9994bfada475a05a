"""C3: the reference, edges, gradients, false negatives, and the same loss on two processes as on one."""
from math import log

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from parity import find_case, load_case
from torch import nn

from ris_nb.contract import RISError
from ris_nb.distributed import gather_images
from ris_nb.models.c3_loss import c3_loss, c3_similarity, image_codes, same_image
from ris_nb.models.modality_fusion import ModalityFusion


def data(sentences=5, images=5, width=8):
    torch.manual_seed(0)
    return 3 * torch.randn(sentences, width), F.normalize(torch.randn(images, sentences, width), dim=-1)


@pytest.mark.skipif(find_case("sag_tiny") is None, reason="the small SaG reference is not here")
def test_released_parity():
    case = load_case("sag_tiny")
    text, z = case["txt_emb"][:, 0], case["cm_feat"]
    assert (c3_similarity(text, z) - case["c3_sim"]).abs().max() < 1e-5
    assert abs(c3_loss(text, z).item() - case["c3"].item()) < 1e-5


def test_written_out():
    text, z = data(sentences=4, images=6)
    which = torch.tensor([5, 0, 0, 3])
    for temperature in (0.1, 1.0, 2.5):
        rows = []
        for b in range(4):
            scores = [(text[b] @ z[n, b]).item() / temperature for n in range(6)]
            rows.append(torch.tensor(scores).logsumexp(0).item() - scores[which[b]])
        assert abs(c3_loss(text, z, which, temperature).item() - sum(rows) / 4) < 1e-4


def test_starts_at_log_b():
    text, z = data()
    z = z[:1].expand(5, -1, -1)
    assert abs(c3_loss(text, z).item() - log(5)) < 1e-6
    target = z.clone().requires_grad_()
    c3_loss(text, target).backward()
    assert (target.grad[0, 0] * text[0]).sum() < 0 < (target.grad[1, 0] * text[0]).sum()  # and yet it knows where to go


def test_order_of_pairs_does_not_matter():
    text, z = data()
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(c3_loss(text[order], z[order][:, order]), c3_loss(text, z))


def test_large_scores_stay_finite():
    text, z = data()
    text = (1e4 * text).requires_grad_()
    z = z.requires_grad_()
    loss = c3_loss(text, z, temperature=0.01)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


def test_stop_gradient_concerns_the_target_alone():
    torch.manual_seed(0)
    words, layer, said, slots = nn.Linear(6, 16), ModalityFusion(16, 2, 8, 32, dropout=0.0), torch.randn(4, 6), torch.randn(4, 5, 16)

    def gradients(detach):
        text = words(said)
        seen = slots.clone().requires_grad_()
        loss = c3_loss(text, layer.all_pairs(text, *layer.project(seen))[0], detach=detach)
        return loss, torch.autograd.grad(loss, [words.weight, seen, *layer.parameters()])

    (cut, with_stop), (full, without) = gradients(True), gradients(False)
    assert torch.equal(cut, full) and not torch.allclose(with_stop[0], without[0])
    assert all(torch.equal(a, b) for a, b in zip(with_stop[1:], without[1:]))
    text, z = data()
    assert not c3_loss(text.requires_grad_(), z).requires_grad and c3_loss(text, z, detach=False).requires_grad


def test_false_negatives_are_left_out():
    text, z = data()
    codes = image_codes(["a", "b", "a", "c", "b"])
    same = same_image(codes, codes)
    rows = []
    for b in range(5):
        s = c3_similarity(text, z)[b]
        others = [n for n in range(5) if n == b or not same[b, n]]
        rows.append(s[others].logsumexp(0) - s[b])
    torch.testing.assert_close(c3_loss(text, z, same=same), torch.stack(rows).mean())
    assert torch.equal(c3_loss(text, z, same=torch.eye(5, dtype=torch.bool)), c3_loss(text, z))  # the own image always counts
    z.requires_grad_()
    c3_loss(text, z, same=same).backward()
    assert (z.grad[2, 0] == 0).all() and (z.grad[0, 2] == 0).all() and (z.grad[1, 0] != 0).all()


def test_codes():
    codes = image_codes(["1", 1, "COCO_train2014_000000000009.jpg", 10**12, ""])
    assert codes.dtype == torch.int64 and codes[0] == codes[1] and len(codes.unique()) == 4
    assert codes[0] == image_codes([1])[0] == -649571662916077706  # in every process, on every day
    assert image_codes([]).shape == (0,)


def test_computed_in_float32():
    text, z = data()
    exact = c3_loss(text.bfloat16().float(), z.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        loss = c3_loss(text.bfloat16(), z.bfloat16())
    assert loss.dtype == torch.float32 and torch.equal(loss, exact)


def test_misfits_are_named():
    text, z = data()
    with pytest.raises(RISError, match=r"\(B, D\) and \(N, B, D\)"):
        c3_loss(text, z[0])
    with pytest.raises(RISError, match="5 sentences cannot be matched with 4 images"):
        c3_loss(text, z[:4])
    for temperature in (0, -1.0, float("nan")):
        with pytest.raises(RISError, match="temperature must be greater than 0"):
            c3_loss(text, z, temperature=temperature)
    with pytest.raises(RISError, match=r"same must be \(B, N\) = \(5, 5\)"):
        c3_loss(text, z, same=torch.ones(5, 4, dtype=torch.bool))


class Pairs(nn.Module):
    """Images and sentences through their own layers, and C3 over the images of all processes."""

    def __init__(self):
        super().__init__()
        self.words, self.slots, self.fusion = nn.Linear(6, 16), nn.Linear(7, 16), ModalityFusion(16, 2, 8, 32, dropout=0.0)

    def forward(self, said, seen, codes):
        text, slots, own = self.words(said), gather_images(self.slots(seen)), torch.arange(len(said))
        if dist.is_initialized():
            own = own + dist.get_rank() * len(seen)
        same = same_image(codes, gather_images(codes))
        return c3_loss(text, self.fusion.all_pairs(text, *self.fusion.project(slots))[0], own, same=same)


def inputs():
    torch.manual_seed(1)
    return torch.randn(6, 6), torch.randn(6, 5, 7), image_codes([1, 2, 3, 4, 1, 6])  # images 0 and 4: copies on two processes


def half(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Pairs())
    loss = model(*(x[3 * rank:3 * rank + 3] for x in inputs()))
    loss.backward()
    dist.all_reduce(loss.detach_())
    torch.save([loss / 2, *(p.grad for p in model.parameters())], f"{folder}/{rank}.pt")
    with torch.no_grad():
        assert gather_images(torch.full((2, 1), rank)).flatten().tolist() == [0, 0, 1, 1]
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    torch.manual_seed(0)
    model = Pairs()
    loss = model(*inputs())
    loss.backward()
    mp.start_processes(half, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    for rank in range(2):
        for mine, theirs in zip([loss.detach(), *(p.grad for p in model.parameters())], torch.load(tmp_path / f"{rank}.pt")):
            torch.testing.assert_close(theirs, mine, atol=1e-6, rtol=1e-5)


def test_one_process_gathers_nothing():
    x = torch.randn(2, 3)
    assert gather_images(x) is x
