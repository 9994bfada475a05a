"""What the benchmarks share: times, memory, FLOPs, a lone matrix product to hold them against, and where the figures go."""
import argparse
import ctypes
import json
import platform
import re
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

TESTS = Path(__file__).resolve().parents[1]
RESULTS = TESTS.parent / "data" / "results" / "bench"
sys.path += [str(TESTS), str(TESTS / "reference")]  # what some benchmarks compare the library with; import `benching` first


def processor():
    """The name of this machine's CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


# TFLOP/s that NVIDIA names, without sparsity: (bfloat16 in tensor cores, TF32, float32). T4 has neither of the first two.
# H100, H200, A100, L4, T4: the data sheets at nvidia.com/data-center; RTX 4090: whitepaper of the Ada architecture, appendix A.
PEAKS = {"H100 PCIe": (756, 378, 51), "H100 NVL": (835, 417, 60), "H100": (989, 495, 67), "H200": (989, 495, 67),
         "A100": (312, 156, 19.5), "L4": (121, 60, 30.3), "T4": (None, None, 8.1), "RTX 4090": (165.2, 82.6, 82.6)}


def peak_of(device, precision):
    """The FLOP/s on the data sheet of a GPU, by its name and "bf16", "tf32" or "float32"; None for what isn't listed."""
    found = next((peaks for name, peaks in PEAKS.items() if re.search(rf"\b{name}\b(?! (D|Laptop)\b)", device)), (None,) * 3)
    flops = found[("bf16", "tf32", "float32").index(precision)]
    return flops and flops * 1e12


def machine(threads, device="cpu"):
    """One line: what computes, with how many threads, under which torch."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return f"{name}, {threads} threads, torch {torch.__version__}"


def finish():
    """Wait until a GPU, if one is in use, has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed(call):
    """Seconds on the clock, seconds of CPU (all threads), and the result."""
    finish()
    clock, cpu = time.perf_counter(), time.process_time()
    result = call()
    finish()
    return time.perf_counter() - clock, time.process_time() - cpu, result


def rounds(sides, repeats):
    """Calls the `sides`, functions by name, in turns; the seconds of each, clock and CPU, as two dicts of lists."""
    clock, cpu = defaultdict(list), defaultdict(list)
    for _ in range(repeats):
        for name, call in sides.items():
            wall, busy, _ = timed(call)
            clock[name].append(wall)
            cpu[name].append(busy)
    return clock, cpu


def spread(clock, cpu):
    """Least and median of one side's seconds."""
    return {"clock, least": min(clock), "clock, median": median(clock), "cpu, least": min(cpu), "cpu, median": median(cpu)}


def times_faster(clock, cpu, slow="plain", fast="ris_nb"):
    """How many times as long one side takes as the other: of the least seconds, and the median of the rounds."""
    return {f"{kind}, {how}": value for kind, seconds in (("clock", clock), ("cpu", cpu))
            for how, value in (("least", min(seconds[slow]) / min(seconds[fast])),
                               ("median of rounds", median(a / b for a, b in zip(seconds[slow], seconds[fast]))))}


def flops_of(call):
    """Floating point operations of the matrix products and attentions in `call`."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def resident(field):
    """VmRSS, or VmHWM: the most since it was last set back, in bytes."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def peak_memory(call, device="cpu"):
    """Bytes: held before `call`, and the most held during it. Of the process, weights and all; on a GPU, of its tensors."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timed(call)
        return before, torch.cuda.max_memory_allocated()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = resident("VmRSS")
    call()
    return before, resident("VmHWM")


def saved_bytes(call, weights, model=None):
    """Bytes of the distinct storages that autograd saves during `call`, without those of the weights, and its result. The bytes are a
    Counter: by the block of `model` that saves them first, "" for what none does, or without a model for everything."""
    known, kept, inside, handles = {w.untyped_storage().data_ptr() for w in weights}, Counter(), [""], []

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())  # autograd holds it until the end of the call: no other gets this address
            kept[inside[-1]] += storage.nbytes()
        return x.detach()  # x itself, where it is a step's result, would hold the step that holds it, for ever

    for path, module in model.named_modules() if model else ():
        if path:
            block = re.sub(r"(\.\d+)\..*", r"\1", path)  # a list's member, all parts of it together
            handles += [module.register_forward_pre_hook(lambda *_, block=block: inside.append(block)),
                        module.register_forward_hook(lambda *_: inside.pop() and None, always_call=True)]
    try:
        with saved_tensors_hooks(pack, lambda x: x):
            result = call()
    finally:
        for handle in handles:
            handle.remove()
    return kept, result


def options(doc, result=None, **defaults):
    """A parser with --threads, --repeats, --out, which names a file in data/results/bench, and an integer for each default."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    for name, value in {"threads": 2, **defaults}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, default=result and RESULTS / result)
    return parser


def keep(report, path):
    """Write the report as JSON and print it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
