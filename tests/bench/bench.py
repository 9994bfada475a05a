"""How fast each model reads, trains and answers on this machine, and with how much memory. `make bench` runs it:

    python tests/bench/bench.py [--models lavt magnet sag] [--sizes tiny full] [--device cpu|cuda] [--batch N] [--threads N] [--workers N]
                          [--repeats N] [--ladder] [--parts forward step ...] [--minutes N] [--root DATA --dataset refcoco]
                          [--out data/results/bench/DEVICE.json]
    python tests/bench/bench.py --table data/results/bench/DEVICE.json      # the first page, then all figures

Each model is measured in a process of its own. The parts: the data path, in the training process and in `--workers` others;
forward; a training step, as `fit` makes it, and switch by switch on a GPU (or with --ladder); evaluation; and a short training
through `fit`, with the share of its time in which it waits for data. Rows of models and parts that are not measured stay in the file.
With `--minutes 10` no part of a model begins later than that; what is left out is said.

In a row, seconds are medians, per batch: on the clock, which is what a user waits, and of CPU (all threads, and the data path's
workers), which still means something on a machine that others use, too. "peak" is the most memory that the process, or on a GPU
its tensors, took, weights and all; "kept" what autograd keeps for the way back, weights aside; "kept_mib" the same by block. "matrix share" holds the FLOPs
of the products and attentions in the plain call (what checkpointing computes twice counts once) against the rate of a lone
product of the same type, measured in turns with it: on a CPU by seconds of CPU, on a GPU by the clock. "floor" is what these FLOPs
would take at that rate. "error" is the largest change of a score by bfloat16, as a share of the largest score, "flipped" the share
of pixels that it moves in or out of a mask. For the data path, "needed"
is four times what one H100 takes in a step at 40 % of its 989 TFLOP/s, and "processes" how many loaders like this give that.
"""
import json
import multiprocessing
import os
import re
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from statistics import median

import numpy as np
import torch
from benching import RESULTS, flops_of, machine, options, peak_memory, peak_of, processor, rounds, saved_bytes, timed
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from ris_nb.data.batches import ReferralDataset, collate
from ris_nb.data.refer import Referral, Sentence
from ris_nb.data.sources import open_data
from ris_nb.data.tokenizer import build_vocabulary
from ris_nb.data.writer import make_refshapes
from ris_nb.evaluation.evaluate import evaluate
from ris_nb.registry import create_model
from ris_nb.training.compute import keep_freed_memory
from ris_nb.training.config import TrainConfig
from ris_nb.training.loop import LossStep, fit
from ris_nb.training.optim import optimizer_step, param_groups
from ris_nb.training.sampling import training_loader

MODELS = {"lavt": {"tiny": "lavt_tiny", "full": "lavt_swin_base"}, "magnet": {"tiny": "magnet_tiny", "full": "magnet_swin_base"},
          "sag": {"tiny": "sag_tiny", "full": "sag_vit_small"}}
BATCH = {"cpu": {"lavt_swin_base": 1, "magnet_swin_base": 1, "sag_vit_small": 4},
         "cuda": {"lavt_swin_base": 8, "magnet_swin_base": 4, "sag_vit_small": 32}}  # the tiny ones: 32
H100 = 0.4 * 989e12  # FLOP/s: a good share of what the chip's bfloat16 products reach


@dataclass(frozen=True)
class Variant:
    """How a step is computed; the defaults are what `fit` does."""

    name: str = "as in fit"
    bf16: bool = False
    fused_attention: bool = True
    fused_adamw: bool = True
    channels_last: bool = False
    compile: bool = False
    checkpointing: bool = False


def ladder():
    """From the plainest step on, one switch more at a time."""
    variant = Variant("float32, nothing fused", fused_attention=False, fused_adamw=False)
    yield variant
    for switch in ("bf16", "fused_attention", "fused_adamw", "channels_last", "compile"):
        variant = replace(variant, name="+ " + switch.replace("_", " "), **{switch: True})
        yield variant


# What is measured on

def photos(folder, count, seed=0):
    """Referrals to `count` JPEG files as heavy as COCO's: 640 x 480 pixels of noise as rough as a photo's, and a polygon each."""
    rng, referrals = np.random.default_rng(seed), []
    rough = 1 / np.maximum(np.hypot(np.fft.fftfreq(480)[:, None], np.fft.rfftfreq(640)[None]), 1 / 640) ** 1.1
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    for i in range(count):
        waves = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(3, 480, 640))) * rough)
        pixels = 128 + 50 * (waves - waves.mean()) / waves.std()
        path = Path(folder, f"{i}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(path, quality=95)
        outline = np.array([320, 240]) + rng.uniform(60, 180, (40, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
        sentences = tuple(Sentence(text) for text in (f"the grey cloud in the middle of number {i}", "the biggest blob"))
        referrals.append(Referral(i, i, path, (480, 640), "cloud", "train", sentences, None, [outline.flatten().tolist()]))
    return referrals


def material(folder, size, args):
    """Referrals to measure on and where they are from: of the data root that was given; else photos, or RefShapes for the tiny."""
    if args.root:
        data = open_data(args.root, args.dataset)
        return [referral for split in data.splits for referral in data.referrals(split)], f"{args.dataset}, all splits"
    if size == "full":
        return photos(folder, 32), "generated JPEG photos, 640 x 480"
    return open_data(make_refshapes(folder, counts={"train": 40}), "refshapes").referrals("train"), "RefShapes, 64 x 64"


def make(name, size, referrals):
    """The model, its first weights from one seed; at full size with a vocabulary as long as BERT's."""
    vocabulary = build_vocabulary(sentence.text for referral in referrals for sentence in referral.sentences)
    if size == "full":
        vocabulary += [f"[unused{i}]" for i in range(30522 - len(vocabulary))]
    torch.manual_seed(0)
    return create_model(name, vocabulary=vocabulary)


# The parts: each gives rows of figures

class Bench:
    """One model on one device, and what all parts need of it."""

    def __init__(self, name, size, args, folder):
        self.args, self.device, self.folder, self.name = args, args.device, Path(folder), name
        self.referrals, self.source = material(folder, size, args)
        self.host = make(name, size, self.referrals)
        self.pupil = self.host.for_training().to(self.device)
        self.size = args.batch or BATCH[args.device].get(name, 32)
        few = self.referrals * ceil(self.size / len(self.referrals))
        self.dataset = ReferralDataset(few, self.host.tokenizer, self.host.transform, masks=self.host.needs_masks)
        self.batch = collate([self.dataset[i, 0] for i in range(self.size)]).to(self.device)
        self.full, self.step_flops = size == "full", None

    def row(self, part, variant="", items=None, clock=(), cpu=(), **figures):
        seconds = {"seconds": median(clock), "cpu_seconds": median(cpu)} if clock else {}
        rate = {"items_per_second": (items or self.size) / seconds["seconds"]} if clock else {}
        return {"part": part, "variant": variant, "batch": self.size, **rate, **seconds, **figures}

    def product(self, dtype):
        """Products of two square matrices of that type, and their FLOPs: enough that a CPU's clock of its threads, which goes by
        milliseconds, can time them."""
        n, times = (8192, 1) if self.device == "cuda" else (2048, 4 if dtype == torch.bfloat16 else 1)
        a, b = torch.randn(2, n, n, device=self.device).to(dtype)
        return (lambda: [a @ b for _ in range(times)]), 2 * n**3 * times

    def against_product(self, call, flops, dtype, repeats):
        """Seconds of `call`, clock and CPU; its FLOPs; and its share of the rate of a lone product, timed in turns with it."""
        product, work = self.product(dtype)
        product()
        clock, cpu = rounds({"call": call, **{("product", i): product for i in range(5)}}, repeats)
        seconds = clock if self.device == "cuda" else cpu
        best = min(min(seconds["product", i]) for i in range(5))
        return dict(clock=clock["call"], cpu=cpu["call"], gflop=flops / 1e9, matrix_gflops=work / best / 1e9,
                    floor=flops / work * best, matrix_share=flops / work * best / median(seconds["call"]))


def variants(bench):
    if bench.device == "cuda" or bench.args.ladder:
        yield from ladder()
    else:
        yield Variant()
        yield Variant("bf16", bf16=True)
    if hasattr(bench.host, "set_grad_checkpointing"):
        yield Variant("checkpointed", checkpointing=True, bf16=bench.device == "cuda")


def attention(variant):
    """PyTorch's own choice of attention kernels, or the one that writes the whole table of weights out."""
    return nullcontext() if variant.fused_attention else sdpa_kernel(SDPBackend.MATH)


def laid_out(bench, variant):
    """The batch, and the network brought to the same order of channels."""
    order = torch.channels_last if variant.channels_last else torch.contiguous_format
    bench.pupil.to(memory_format=order)
    return replace(bench.batch, image=bench.batch.image.contiguous(memory_format=order))


def counted(model, call):
    """`flops_of` a call that records no gradients. The counter stumbles there over views of weights that could have some."""
    learning = [parameter.requires_grad_(False) for parameter in model.parameters() if parameter.requires_grad]
    try:
        return flops_of(call)
    finally:
        for parameter in learning:
            parameter.requires_grad_()


def forward_rows(bench):
    bench.pupil.eval()
    flops = exact = None
    for variant in variants(bench):
        if variant.checkpointing:
            continue
        batch, model = laid_out(bench, variant), torch.compile(bench.host) if variant.compile else bench.host

        def call():
            with torch.inference_mode(), attention(variant), torch.autocast(bench.device, torch.bfloat16, enabled=variant.bf16):
                return model(batch)

        flops = flops or counted(bench.host, call)
        score = call().score.float()
        exact = score if exact is None else exact
        _, peak = peak_memory(call, bench.device)
        found = bench.against_product(call, flops, torch.bfloat16 if variant.bf16 else torch.float32, bench.args.repeats)
        if variant.bf16:
            found.update(error=((score - exact).abs().max() / exact.abs().max()).item(), flipped=((score > 0) != (exact > 0)).float().mean().item())
        yield bench.row("forward", variant.name, peak_gib=peak / 2**30, **found)


def by_block(kept):
    """Mebibytes, most first: of each block that keeps a hundredth of the whole or more, and of the rest."""
    large = {block or "losses": count / 2**20 for block, count in kept.most_common() if count >= kept.total() / 100}
    return {**large, "the rest": kept.total() / 2**20 - sum(large.values())}


def step_rows(bench):
    keep_freed_memory()  # as `fit` does
    bench.pupil.train()
    for variant in variants(bench):
        batch, config = laid_out(bench, variant), TrainConfig(lr=1e-6)
        if hasattr(bench.host, "set_grad_checkpointing"):
            bench.host.set_grad_checkpointing(variant.checkpointing)
        loss_step = LossStep(bench.pupil, "bf16" if variant.bf16 else "no")
        call = torch.compile(loss_step) if variant.compile else loss_step
        optimizer = torch.optim.AdamW(param_groups(bench.pupil, 1e-2), lr=config.lr, fused=variant.fused_adamw,
                                      foreach=not variant.fused_adamw)

        def backward():
            with attention(variant):
                sum(call(batch).values()).backward()

        def step():
            backward()
            optimizer_step(optimizer, config, 0)

        bench.step_flops = bench.step_flops or flops_of(backward)
        step()  # AdamW's averages are there from now on
        with attention(variant):
            kept = saved_bytes(lambda: call(batch), bench.pupil.parameters(), bench.pupil)[0]  # what autograd kept is free again
        _, peak = peak_memory(step, bench.device)
        found = bench.against_product(step, bench.step_flops, torch.bfloat16 if variant.bf16 else torch.float32, bench.args.repeats)
        yield bench.row("training step", variant.name, peak_gib=peak / 2**30, kept_gib=kept.total() / 2**30, kept_mib=by_block(kept), **found)
        del optimizer
        bench.pupil.zero_grad()
    if hasattr(bench.host, "set_grad_checkpointing"):
        bench.host.set_grad_checkpointing(False)


def spent():
    """Seconds of CPU so far: of this process, and of those that it started and that have ended."""
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def loaders(workers):
    return f"{workers} workers" if workers else "same process"


def data_rows(bench):
    """Rows of the data path; after `step_rows`, which tells how much one H100 would take."""
    needed = 4 * H100 / (bench.step_flops / bench.size) if bench.full and bench.step_flops else None  # images a second
    steps = max(2, ceil(64 / bench.size))
    for workers in dict.fromkeys((0, bench.args.workers)):
        def read():
            for batch in training_loader(bench.dataset, TrainConfig(steps=steps, batch_size=bench.size, workers=workers)):
                pass

        read()
        found = []
        for _ in range(bench.args.repeats):
            busy = spent()
            clock, _, _ = timed(read)
            found.append((clock / steps, (spent() - busy) / steps))
        clock, cpu = zip(*found)
        demand = {"needed": needed, "processes": ceil(needed * min(cpu) / bench.size)} if needed else {}
        yield bench.row("data path", loaders(workers), clock=clock, cpu=cpu, **demand)


def evaluation_rows(bench):
    images = bench.referrals[:min(len(bench.referrals), 2 * bench.size if bench.size < 8 else 64)]
    dataset = ReferralDataset(images, bench.host.tokenizer, bench.host.transform, every=True)
    found = []

    def call():
        found.append(timed(lambda: evaluate(bench.host, dataset, batch_size=bench.size, progress=False)))

    _, peak = peak_memory(call, bench.device)
    (clock, cpu, report), = found
    yield bench.row("evaluation", "expressions", items=report.expressions, clock=[clock], cpu=[cpu], peak_gib=peak / 2**30)


def fit_rows(bench):
    steps = 20 if bench.size >= 8 else 3
    for workers in dict.fromkeys((0, bench.args.workers)):
        config = TrainConfig(steps=steps, batch_size=bench.size, lr=1e-6, workers=workers, log_every=steps,
                             precision="bf16" if bench.device == "cuda" else "no")
        found = []

        def call():
            found.extend(fit(bench.pupil, bench.dataset, config, bench.folder / f"fit{workers}", progress=False))

        began = time.process_time()
        _, peak = peak_memory(call, bench.device)
        last = found[-1]
        yield bench.row("fit", loaders(workers), clock=[bench.size / last["samples_per_second"]],
                        cpu=[(time.process_time() - began) / steps], waiting=last["waiting"], peak_gib=peak / 2**30)


PARTS = {"forward": forward_rows, "evaluation": evaluation_rows, "step": step_rows, "data": data_rows, "fit": fit_rows}


def measure(name, size, args, begun):
    """All rows of one model, and under what conditions they were measured; `begun`: when the whole of it did, on `time.monotonic`."""
    torch.set_num_threads(args.threads)
    multiprocessing.set_start_method("fork", force=True)  # of the loaders' processes: this one would hand down its own
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        bench, rows = Bench(name, size, args, folder), []
        for part in (part for part in PARTS if part in args.parts):
            if args.minutes and time.monotonic() - begun > 60 * args.minutes:
                print(f"{name}: {args.minutes} minutes are over, {part} is left out", flush=True)
                continue
            for row in PARTS[part](bench):
                print(name, *(f"{key} {value:.3g}" if isinstance(value, float) else value for key, value in row.items() if key != "kept_mib"), flush=True)
                rows.append(row)
    return {"machine": machine(args.threads, args.device), "data": bench.source, "image_size": bench.host.image_size,
            "parameters": sum(p.numel() for p in bench.pupil.parameters()), "repeats": args.repeats, "rows": rows}


# The table

COLUMNS = {"items/s": ("items_per_second", "{:,.3g}"), "s": ("seconds", "{:.3g}"), "CPU s": ("cpu_seconds", "{:.3g}"),
           "peak GiB": ("peak_gib", "{:.2f}"), "kept GiB": ("kept_gib", "{:.2f}"), "GFLOP": ("gflop", "{:,.3g}"),
           "floor": ("floor", "{:.3g}"), "matrix share": ("matrix_share", "{:.0%}"), "error": ("error", "{:.1%}"),
           "flipped": ("flipped", "{:.2%}"), "waiting": ("waiting", "{:.0%}"), "needed": ("needed", "{:,.0f}"),
           "processes": ("processes", "{}")}


def table(report):
    """The report of one device as Markdown."""
    lines = ["| model | part | | batch | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (4 + len(COLUMNS))]
    for name, entry in report["models"].items():
        for row in entry["rows"]:
            figures = [form.format(row[key]) if key in row else "" for key, form in COLUMNS.values()]
            lines.append("| " + " | ".join([name, row["part"], row["variant"], str(row["batch"]), *figures]) + " |")
    return "\n".join(lines)


PAGE = ("model", "part", "precision", "batch", "items/s", "peak GiB", "TFLOP/s", "of the data sheet", "of a lone product")


def first_page(report):
    """What a GPU's owner asks first, as Markdown: of each model's forward pass and training step the fastest way in each precision,
    and its share of the peak on the data sheet (`peak_of`; empty where that is unknown) and of the peak measured here."""
    lines = [f"{report['device']}: the fastest way in each precision", "", "| " + " | ".join(PAGE) + " |", "|" + "---|" * len(PAGE)]
    for name, entry in report["models"].items():
        fastest = {}
        for row in entry["rows"]:
            if "gflop" in row and row["variant"] != "checkpointed":
                # a switch stays on for the rest of the ladder, so all but its first rung and the plain row are bfloat16
                precision = "float32" if row["variant"] in ("as in fit", "float32, nothing fused") else "bf16"
                before = fastest.setdefault((row["part"], precision), row)
                fastest[row["part"], precision] = min(before, row, key=lambda row: row["seconds"])
        for (part, precision), row in fastest.items():
            rate, peak = 1e9 * row["gflop"] / row["seconds"], peak_of(report["device"], precision)
            figures = (f"{row['items_per_second']:,.3g}", f"{row['peak_gib']:.2f}", f"{rate / 1e12:.3g}",
                       f"{rate / peak:.0%}" if peak else "", f"{row['matrix_share']:.0%}")
            lines.append("| " + " | ".join([name, part, precision, str(row["batch"]), *figures]) + " |")
    return "\n".join(lines)


def main(words=None):
    parser = options(__doc__, repeats=3, batch=0, workers=2, minutes=0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sizes", nargs="+", choices=("tiny", "full"), default=["tiny", "full"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ladder", action="store_true", help="switch by switch on the CPU, too")
    parser.add_argument("--root", type=Path, help="a data root to measure on, in place of generated pictures")
    parser.add_argument("--dataset", default="refcoco")
    parser.add_argument("--table", type=Path, help="measure nothing: print the figures of that file")
    args = parser.parse_args(words)
    if args.table:
        report = json.loads(args.table.read_text())
        return print(first_page(report), table(report), sep="\n\n")
    device = torch.cuda.get_device_name() if args.device == "cuda" else processor()
    args.out = args.out or RESULTS / (re.sub(r"\W+", "-", device).strip("-").lower() + ".json")
    report, begun = json.loads(args.out.read_text()) if args.out.exists() else {"device": device, "models": {}}, time.monotonic()
    for size in args.sizes:
        for name in (MODELS[model][size] for model in args.models):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:  # memory is counted from nothing
                entry = alone.submit(measure, name, size, args, begun).result()
            before, new = report["models"].get(name, {}), {row["part"] for row in entry["rows"]}
            if before.get("machine") == entry["machine"]:
                entry["rows"] = [row for row in before["rows"] if row["part"] not in new] + entry["rows"]
            report["models"][name] = entry
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")  # after each: the next one may take all memory
    print(first_page(report), table(report), sep="\n\n")


if __name__ == "__main__":
    main()
