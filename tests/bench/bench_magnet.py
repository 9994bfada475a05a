"""How fast MagNet reads one 480-pixel image, against the released arithmetic written out plainly. Run by hand:

    python tests/bench/bench_magnet.py [--threads 2] [--repeats 5] [--out data/results/bench/magnet_forward.json]

Both sides have the paper's sizes and the same weights, and take turns within one run, since other work on the machine changes
from minute to minute; every output is compared. The matrix floor is what the matrix products alone would take at the rate
that a lone product of the encoder's most frequent shape reaches, measured in the same rounds. "clock" is what a user waits; it
means little on a machine that others use too, where "cpu", the seconds of all threads together, still does.
"""
import time
from collections import defaultdict
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from benching import flops_of, keep, machine, options, spread, timed, times_faster
from parity import Case, find_case, load_case, make_inputs, make_weight
from plain_magnet import plain_magnet, released_shapes
from test_magnet_sizes import computed

from ris_nb.contract import Batch
from ris_nb.models.magnet import MagNet

FULL = dict(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window=12, img=480, pwam_idx=[3, 6, 9, 12], enc_layers=4,
            dec_layers=10, bert=dict(vocab_size=30522, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072))
PRODUCT = 900, 512, 2048  # cells, channels in, channels out of the first MLP layer in Swin's third stage


def full_case():
    """The full-size reference, or one like it without the stored outputs."""
    if find_case("magnet_full"):
        return load_case("magnet_full")
    return Case("magnet_full", dict(config=FULL, weight_seed=3, input_seed=1003, batch=1, lens=[7]), {})


@contextmanager
def parts_of(model):
    """Collects CPU seconds per part of the network over the calls made inside."""
    encoder, seconds, started, hooks = model.encoder, defaultdict(float), {}, []
    parts = {"Swin": [encoder.vision.patch_embed, *(block for stage in encoder.vision.stages for block in stage), *encoder.vision.merges],
             "BERT": [encoder.text.bert.embeddings, *encoder.text.bert.encoder.layer], "image alignment": encoder.image_alignments,
             "language alignment": encoder.language_alignments, "pixel decoder": [model.pixel_decoder],
             "of it deformable attention": [layer.attention for layer in model.pixel_decoder.layers], "mask decoder": [model.mask_decoder]}
    for name, modules in parts.items():
        for module in modules:
            def before(module, args):
                started[module] = time.process_time()

            def after(module, args, output, name=name):
                seconds[name] += time.process_time() - started[module]
            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    yield seconds
    for hook in hooks:
        hook.remove()


def check(found, case):
    """The largest distance to the stored reference, which keeps only some cells of each map; None without one."""
    if not case.arrays:
        return None
    worst = 0.0
    for key, value in found.items():
        step = 4 if key in ("mask_features", "prob") else (8 if value.shape[-1] > 30 else 3) if key[0] == "s" else 1
        worst = max(worst, (value[..., ::step, ::step] if step > 1 else value).sub(case[key]).abs().max().item())
    return worst


def main():
    args = options(__doc__, "magnet_forward.json", repeats=5).parse_args()
    torch.set_num_threads(args.threads)

    case = full_case()
    state = {key: make_weight(case.spec["weight_seed"], key, shape) for key, shape in released_shapes(case.spec["config"]).items()
             if not key.endswith("relative_position_index")}
    model = MagNet.from_released(state).requires_grad_(False)
    image, ids, words = make_inputs(case)
    batch = Batch(image, ids, words)
    matrix, weight = torch.randn(PRODUCT[:2]), torch.randn(PRODUCT[2], PRODUCT[1])
    sides = {"plain": lambda: plain_magnet(state, case.spec, image, ids, words), "ris_nb": lambda: model(batch),
             "product": lambda: F.linear(matrix, weight)}

    clock, cpu, shares = defaultdict(list), defaultdict(list), defaultdict(list)
    with torch.inference_mode():
        plain, ours = plain_magnet(state, case.spec, image, ids, words), computed(model, batch)  # these also warm the caches
        flops = {name: flops_of(sides[name]) for name in ("plain", "ris_nb")}
        for _ in range(args.repeats):
            for name, call in (*sides.items(), *[("product", sides["product"])] * 20):
                with parts_of(model) as seconds:
                    wall, busy, _ = timed(call)
                clock[name].append(wall)
                cpu[name].append(busy)
                for part, spent in seconds.items():
                    shares[part].append(spent)

    work = 2 * PRODUCT[0] * PRODUCT[1] * PRODUCT[2]
    floor = {kind: flops["ris_nb"] / work * min(seconds["product"]) for kind, seconds in (("clock", clock), ("cpu", cpu))}
    keep({
        "machine": machine(args.threads), "image": case.spec["config"]["img"],
        "parameters": sum(p.numel() for p in model.parameters()), "repeats": args.repeats,
        "seconds": {name: spread(clock[name], cpu[name]) for name in ("plain", "ris_nb")},
        "times faster": times_faster(clock, cpu), "GFLOP": {name: n / 1e9 for name, n in flops.items()},
        "GFLOP/s of a lone product": {"clock": work / min(clock["product"]) / 1e9, "cpu": work / min(cpu["product"]) / 1e9},
        "matrix floor of ris_nb, seconds": floor,
        "cpu seconds by part, least": {part: min(spent) for part, spent in shares.items()},
        "largest difference": {"ris_nb to plain": max((ours[key] - plain[key]).abs().max().item() for key in ours),
                               "plain to reference": check(plain, case), "ris_nb to reference": check(ours, case)}}, args.out)


if __name__ == "__main__":
    main()
