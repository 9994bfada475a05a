"""How many pictures a second reach the training loop: from the files as floats, as bytes, and from a pack; read here, by one process and by two.

    python tests/bench/bench_data.py [--sizes 64 480] [--repeats 5] [--out data/results/bench/data_path.json]

64 pixels: RefShapes; larger: generated JPEG photos, 640 x 480. All ways are measured in turns, each to the end of an epoch that the
loader's processes have warmed up for: the clock is what the loop waits for, batches as floats on the CPU.
"""
import json
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from bench import photos
from benching import RESULTS, machine, options
from torch.utils.data import DataLoader

from ris_nb.data.batches import AsBytes, ReferralDataset, Transform, collate
from ris_nb.data.pack import Pack, write_pack
from ris_nb.data.sources import open_data
from ris_nb.data.tokenizer import Tokenizer, build_vocabulary
from ris_nb.data.writer import make_refshapes
from ris_nb.training.compute import keep_freed_memory


def loaders(folder, size, items, batch):
    """name -> a loader of `items` items."""
    if size < 128:
        root = make_refshapes(folder, counts={"train": 200})
        referrals = open_data(root, "refshapes").referrals("train")
    else:
        root, referrals = folder, photos(folder, 32)
    referrals = (referrals * (1 + items // len(referrals)))[:items]
    tokenizer, transform = Tokenizer(build_vocabulary(s.text for r in referrals for s in r.sentences)), Transform(size)
    pack = Pack(write_pack(referrals, root, size, folder / "pack"), root)
    plain, packed = (ReferralDataset(referrals, tokenizer, transform, pack=p) for p in (None, pack))
    ways = {"files, floats": plain, "files, bytes": AsBytes(plain), "pack, bytes": AsBytes(packed)}
    return {(way, workers): DataLoader(dataset, batch, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0, drop_last=True,
                                       multiprocessing_context="fork" if workers else None)
            for way, dataset in ways.items() for workers in (0, 1, 2)}


def epoch(loader):
    """Seconds for a picture, after the first batch of the epoch."""
    batches, count = iter(loader), 0
    next(batches).to("cpu")
    start = perf_counter()
    for batch in batches:
        count += len(batch.to("cpu").image)
    return (perf_counter() - start) / count


def main(words=None):
    parser = options(__doc__, repeats=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 480])
    parser.add_argument("--items", type=int, help="pictures of an epoch; default 4,000 small or 320 large ones")
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as every training does
    report = {"machine": machine(args.threads), "repeats": args.repeats, "sizes": {}}
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            sides = loaders(Path(folder), size, args.items or (4000 if size < 128 else 320), 32 if size < 128 else 8)
            seconds = {side: [] for side in sides}
            for _ in range(args.repeats):
                for side, loader in sides.items():
                    seconds[side].append(epoch(loader))
        rows = [{"way": way, "workers": workers, "pictures a second": 1 / median(found), "most": 1 / min(found)} for (way, workers), found in seconds.items()]
        for row in rows:
            print(size, *row.values(), flush=True)
        report["sizes"][size] = rows
    path = args.out or RESULTS / "data_path.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
