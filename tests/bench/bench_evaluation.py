"""How much memory an answer takes at full size, beside the weights: one image at the model's own size with 1 and with 3 sentences.

    python tests/bench/bench_evaluation.py [--out data/results/bench/evaluation_memory.json]

Each measurement has a process of its own, whose resident memory is looked at every 5 ms. The weights are random.
"""
import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

from benching import RESULTS, machine

MODELS, PAIRS, WORDS = ("lavt_swin_base", "magnet_swin_base", "sag_vit_small"), (1, 3), 20


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(name, pairs):
    """GiB that one forward pass adds to a process that holds the model; the size of its image."""
    import torch

    from ris_nb.contract import Batch
    from ris_nb.data.tokenizer import SPECIAL
    from ris_nb.registry import create_model
    torch.set_num_threads(1)
    model = create_model(name, vocabulary=SPECIAL).eval()
    size = model.image_size
    batch = Batch(image=torch.randn(1, 3, size, size), ids=torch.randint(5, 1000, (pairs, WORDS)), words=torch.ones(pairs, WORDS, dtype=torch.bool),
                  which=torch.zeros(pairs, dtype=torch.int64))
    before, seen, done = resident(), [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with torch.no_grad():
        model.masks(model(batch), [(size, size)] * pairs)
    done.set()
    watcher.join()
    return {"model": name, "image_size": size, "pairs": pairs, "gib": round((max(seen) - before) / 2**30, 3)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "evaluation_memory.json")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "PAIRS"))
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        sys.exit()
    rows = []
    for name in MODELS:
        for pairs in PAIRS:
            done = subprocess.run([sys.executable, __file__, "--one", name, str(pairs)], capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            time.sleep(1)
    options.out.write_text(json.dumps({"machine": machine(1), "rows": rows}, indent=1) + "\n")
    print(options.out.read_text())
