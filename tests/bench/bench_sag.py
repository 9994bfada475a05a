"""How fast SaG makes one training step and how much it keeps for it, against the released arithmetic written out plainly. Run by hand:

    python tests/bench/bench_sag.py [--threads 2] [--repeats 3] [--batch 4] [--double] [--out data/results/bench/sag_step.json]

A step is the forward pass, both losses and the backward pass at the released size (384 pixels, ViT-S/16, BERT-base, 12 x 3 slots),
without dropout, so that both sides compute the same numbers, and without an optimizer, which would be the same. Both sides have the
same weights and inputs and take turns within one run, since other work on the machine changes from minute to minute. "clock" is
what a user waits; it means little on a machine that others use too, where "cpu", the seconds of all threads together, still does.

Activation memory: "saved" is the bytes of all storages that autograd keeps between forward and backward, weights aside; "peak" is
by how much the process's resident memory grows at most during a step, the memory of the weights' gradients being there before.

Differences: the largest of a tensor over its largest entry; the worst of all tensors. In single precision the text encoder's
gradients, what is left of numbers that nearly cancel, are uncertain in their third digit on either side, and a ReLU whose input is
zero but for rounding passes a gradient on one side and none on the other. So `--double` also compares two images' step in double
precision (some 12 GB), and tells how far single precision is from that on either side.
"""
import re
from collections import defaultdict

import torch
import torch.nn.functional as F
from benching import flops_of, keep, machine, options, peak_memory, saved_bytes, spread, timed, times_faster
from parity import Case, make_weight
from plain_sag import plain_sag, released_shapes, sag_inputs
from test_sag_sizes import computed

from ris_nb.contract import Batch
from ris_nb.models.released_sag import UNUSED, released_sag_key
from ris_nb.models.sag import SaG

PRODUCT = 2304, 512, 512  # patches of 4 images, channels in, channels out: keys, values, the slot decoder's layers
LENS = 9, 7, 12, 5, 8, 16, 4, 10
NOISE = 1e-6  # gradients this small beside the largest are zero but for rounding, as of a bias that a softmax takes no notice of


class Side:
    """One way to compute a step: `forward() -> tensors`, among them c3 and recon_loss, and the weights by our names; `everything`:
    a forward that also gives what isn't needed for a step, to be compared."""

    def __init__(self, forward, weights, everything=None):
        self.forward, self.weights, self.everything = forward, weights, everything or forward

    def step(self, everything=False):
        found = self.everything() if everything else self.forward()
        (found["c3"] + found["recon_loss"]).backward()
        return {key: value.detach() for key, value in found.items()}

    def clear(self):
        for weight in self.weights.values():
            weight.grad = None


def make_sides(state, image, ids, eps):
    model = SaG.from_released(state)
    state = {key: value.clone().requires_grad_() for key, value in state.items()}
    model.to(image.dtype)
    batch = Batch(image, ids, ids != 0)

    def losses():  # as in training: all that `answers` compares besides would be computed twice
        found = model.losses(model(batch, noise=eps), batch)
        return {"c3": found["c3"], "recon_loss": found["reconstruction"]}

    return {"plain": Side(lambda: plain_sag(state, {}, image, ids, eps), {released_sag_key(key): value for key, value in state.items()}),
            "ris_nb": Side(losses, dict(model.named_parameters()), lambda: computed(model, image, ids, eps))}


def worst(found, expected, floor=0.0):
    """The largest difference relative to the largest entry of its tensor, and whose it is."""
    scale = {key: value.abs().max().item() for key, value in expected.items()}
    least = floor * max(scale.values())
    return max(((found[key] - value).abs().max().item() / scale[key], key) for key, value in expected.items() if scale[key] > least)


def answers(side):
    """Outputs and gradients of one step."""
    side.clear()
    return side.step(everything=True), {key: weight.grad for key, weight in side.weights.items() if weight.grad is not None}


def differences(found, expected):
    """Between two sides' `answers`, in the precision of the second."""
    (outputs, gradients), (outputs_, gradients_) = found, expected
    assert set(gradients) == set(gradients_), set(gradients) ^ set(gradients_)
    square, length = (sum(x.double().square().sum().item() for x in many) for many in
                      ([gradients[key] - gradient for key, gradient in gradients_.items()], gradients_.values()))
    return {"outputs": worst(outputs, outputs_), "gradients": worst(gradients, gradients_, NOISE),
            "all gradients, as one vector": (square / length) ** 0.5}


def rounding(state, case):
    """Both sides in double precision, and how far each is from that in single precision."""
    image, ids, eps = sag_inputs(case)
    exact = {name: answers(side) for name, side in make_sides({k: v.double() for k, v in state.items()}, image.double(), ids, eps.double()).items()}
    report = {"float64, ris_nb to plain": differences(exact.pop("ris_nb"), exact["plain"])}
    for name, side in make_sides(state, image, ids, eps).items():
        report[f"{name} in float32 to plain in float64"] = differences(answers(side), exact["plain"])
    return report


def main():
    parser = options(__doc__, "sag_step.json", repeats=3, batch=4)
    parser.add_argument("--double", action="store_true", help="compare in double precision, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def make_case(batch):
        return Case("sag_step", dict(batch=batch, input_seed=1005, lens=[LENS[i % len(LENS)] for i in range(batch)]), {})

    state = {key: make_weight(5, key, shape) for key, shape in released_shapes({}).items() if not re.search(UNUSED, key)}
    image, ids, eps = sag_inputs(make_case(args.batch))
    difference = rounding(state, make_case(2)) if args.double else {}
    sides = make_sides(state, image, ids, eps)
    report = {"machine": machine(args.threads), "batch": args.batch,
              "parameters": sum(w.numel() for w in sides["ris_nb"].weights.values()), "repeats": args.repeats}
    difference["float32, ris_nb to plain"] = differences(*(answers(sides[name]) for name in ("ris_nb", "plain")))  # warms everything, too

    memory, flops = defaultdict(dict), {}
    for name, side in sides.items():
        kept, found = saved_bytes(side.forward, side.weights.values())
        memory[name]["saved"] = kept.total()
        del found
        before, most = peak_memory(side.step)
        memory[name]["peak"] = most - before
        flops[name] = flops_of(side.step)

    matrix, weight = torch.randn(PRODUCT[:2]), torch.randn(PRODUCT[2], PRODUCT[1])
    clock, cpu = defaultdict(list), defaultdict(list)
    for _ in range(args.repeats):
        for name, call in (*((name, side.step) for name, side in sides.items()), *[("product", lambda: F.linear(matrix, weight))] * 20):
            if name in sides:
                sides[name].clear()  # as an optimizer's zero_grad does
            wall, busy, _ = timed(call)
            clock[name].append(wall)
            cpu[name].append(busy)
    work = 2 * PRODUCT[0] * PRODUCT[1] * PRODUCT[2]

    report |= {
        "seconds": {name: spread(clock[name], cpu[name]) for name in ("plain", "ris_nb")}, "times faster": times_faster(clock, cpu),
        "activation MB": {name: {kind: n / 1e6 for kind, n in kinds.items()} for name, kinds in memory.items()},
        "part of the plain memory": {kind: memory["ris_nb"][kind] / memory["plain"][kind] for kind in ("saved", "peak")},
        "GFLOP": {name: n / 1e9 for name, n in flops.items()},
        "GFLOP/s of a lone product": {"clock": work / min(clock["product"]) / 1e9, "cpu": work / min(cpu["product"]) / 1e9},
        "matrix floor, seconds": {name: {"clock": n / work * min(clock["product"]), "cpu": n / work * min(cpu["product"])}
                                  for name, n in flops.items()},
        "differences": difference}
    keep(report, args.out)


if __name__ == "__main__":
    main()
