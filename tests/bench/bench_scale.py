"""What several processes exchange, counted on gloo, and what a step would take on 1 to 64 GPUs, on paper.

    python tests/bench/bench_scale.py [--worlds 2 4] [--steps 4] [--out data/results/bench/scale.json]

Counted, for one step of each tiny model: the gradient's buckets and bytes as DistributedDataParallel exchanges them, the share of them
that is ready before the backward pass ends (only that much can be hidden behind it), and every other collective: of synchronised batch
norms, of SaG's images for its loss, of an evaluation. Their number doesn't depend on the machine; nothing is timed here.

On paper, for the models of the papers' size: a step's FLOPs were counted (data/results/bench/amd-epyc.json), the rest are ASSUMED.
"""
import json
import os
import tempfile
from collections import Counter
from math import log2
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from benching import RESULTS, options
from torch import nn

from ris_nb.data.batches import ReferralDataset, collate
from ris_nb.data.sources import open_data
from ris_nb.data.tokenizer import build_vocabulary
from ris_nb.data.writer import make_refshapes
from ris_nb.distributed import sync_batchnorm
from ris_nb.evaluation.evaluate import evaluate
from ris_nb.recipes.recipes import find_recipe
from ris_nb.registry import create_model
from ris_nb.training.loop import LossStep

ASSUMED = {  # one H100 SXM in servers of eight; each is a choice, to be replaced by what a machine measures
    "FLOP/s of a GPU": 0.4 * 989e12,      # 40 % of the data sheet's bfloat16 rate
    "bytes/s inside a server": 200e9,     # of a ring over NVLink, a GPU each way
    "bytes/s between servers": 40e9,      # 400 Gbit/s a GPU, four fifths of it
    "seconds of a collective": 20e-6,     # times log2 of the GPUs: launching it and the way
    "share of a step that can hide the exchange": 2 / 3,   # the backward pass is two thirds of the products
}
TINY, PAPER = ("lavt_tiny", "magnet_tiny", "sag_tiny"), {"lavt_refcoco": "lavt_swin_base", "magnet_refcoco": "magnet_swin_base", "sag_refcoco": "sag_vit_small"}
GPUS = (1, 2, 4, 8, 16, 32, 64)


def counting(counts):
    """Let every collective that Python asks for add itself and its bytes to `counts`."""
    def counted(name, original):
        def call(*args, **kwargs):
            counts[name] += 1
            counts[f"{name} bytes"] += sum(x.numel() * x.element_size() for x in args if isinstance(x, torch.Tensor))
            return original(*args, **kwargs)
        return call

    for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast"):
        setattr(dist, name, counted(name, getattr(dist, name)))


def member(rank, world, name, root, folder):
    """One process: a step forward and back, then an evaluation, both counted; the first process writes what it saw."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    data = open_data(root, "refshapes")
    vocabulary = build_vocabulary(s.text for r in data.referrals("train") for s in r.sentences)
    torch.manual_seed(0)
    model = create_model(name, vocabulary=vocabulary)
    pupil = sync_batchnorm(model.for_training())
    train = ReferralDataset(data.referrals("train"), model.tokenizer, model.transform, masks=model.needs_masks)
    batch = collate([train[i] for i in range(8 * rank, 8 * rank + 8)])
    step = nn.parallel.DistributedDataParallel(LossStep(pupil), find_unused_parameters=False, bucket_cap_mb=1)  # small models, small buckets
    buckets = []

    def exchange(state, bucket):
        buckets.append(bucket.buffer().numel() * 4)
        return dist.all_reduce(bucket.buffer() / world, async_op=True).get_future().then(lambda done: done.value()[0])

    sum(step(batch).values()).backward()  # after it the buckets are in the order in which gradients come
    step.register_comm_hook(None, exchange)
    counts = Counter()
    counting(counts)
    sum(step(batch).values()).backward()
    found = {"gradient bytes": sum(buckets), "buckets": len(buckets), "ready before the end": 1 - buckets[-1] / sum(buckets),
             "other collectives": counts["all_reduce"] - len(buckets), "their bytes": counts["all_reduce bytes"] - sum(buckets)}
    counts.clear()
    evaluate(model, ReferralDataset(data.referrals("val"), model.tokenizer, model.transform, every=True), batch_size=8, progress=False)
    found["collectives of an evaluation"] = sum(count for kind, count in counts.items() if "bytes" not in kind)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def count(name, world, root):
    """What `member` finds for a model on so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(member, (world, name, root, folder), nprocs=world, start_method="spawn")
        return {"model": name, "processes": world, **json.loads(Path(folder, "found.json").read_text())}


def seconds_of_exchange(size, gpus, assumed):
    """A ring's all-reduce of `size` bytes: each GPU sends and takes 2 (n - 1) / n of it, over the slowest link."""
    if gpus == 1:
        return 0.0
    rate = assumed["bytes/s inside a server" if gpus <= 8 else "bytes/s between servers"]
    return 2 * (gpus - 1) / gpus * size / rate + assumed["seconds of a collective"] * log2(gpus)


def on_paper(model, batch, parameters, flops, others, assumed=ASSUMED):
    """For each number of GPUs: the step's parts in milliseconds, and the share of a GPU's time that computes.

    batch: (image, sentence) pairs of a step, all GPUs together. flops: of one pair. others: collectives that nothing hides.
    """
    rows = []
    for gpus in GPUS:
        if batch % gpus:
            break  # a pair can't be cut
        compute = flops * batch / gpus / assumed["FLOP/s of a GPU"]
        exchange = seconds_of_exchange(4 * parameters, gpus, assumed)
        shown = max(0.0, exchange - compute * assumed["share of a step that can hide the exchange"])
        waiting = others * seconds_of_exchange(0, gpus, assumed)
        step = compute + shown + waiting
        rows.append({"model": model, "GPUs": gpus, "pairs a GPU": batch // gpus, "compute ms": 1e3 * compute, "exchange ms": 1e3 * exchange,
                     "not hidden ms": 1e3 * shown, "other collectives ms": 1e3 * waiting, "efficiency": compute / step, "pairs a second": batch / step})
    return rows


def norms(name):
    """The batch norms of a model, each of which asks for as many collectives."""
    with torch.device("meta"):
        return sum(isinstance(module, nn.BatchNorm2d) for module in create_model(name).modules())


def main(words=None):
    parser = options(__doc__)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--models", nargs="+", default=TINY, choices=TINY)
    args = parser.parse_args(words)
    os.environ.update(OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as folder:
        root = make_refshapes(folder, counts={"train": 40, "val": 16})
        counted = [count(name, world, root) for name in args.models for world in args.worlds]
    measured, paper = json.loads((RESULTS / "amd-epyc.json").read_text())["models"], []
    for recipe, name in PAPER.items():
        step = next(row for row in measured[name]["rows"] if row["part"] == "training step")
        tiny = next((row for row in counted if row["model"].split("_")[0] == name.split("_")[0]), {"model": name, "other collectives": 0})
        others = tiny["other collectives"] * max(1, norms(name)) // max(1, norms(tiny["model"]))
        paper += on_paper(name, find_recipe(recipe).settings["batch_size"].value, measured[name]["parameters"], 1e9 * step["gflop"] / step["batch"], others)
    report = {"counted": counted, "assumed": ASSUMED, "on paper": paper}
    path = args.out or RESULTS / "scale.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    for row in counted + paper:
        print(*(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()), sep=", ")


if __name__ == "__main__":
    main()
