"""`magnet_tiny` on four processes, which `torchrun`'s own launcher starts: the weights of one process; a rank killed; two that go on.

All random numbers of the training are turned off by settings of its own: no dropout, every word hidden, every pixel compared. What
is left depends on the batch alone, and the batch doesn't depend on the number of processes.
"""
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from test_training import SERVER, in_processes
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ris_nb.contract import RISError
from ris_nb.data.batches import ReferralDataset, collate
from ris_nb.data.sources import open_data
from ris_nb.data.tokenizer import build_vocabulary
from ris_nb.data.writer import make_refshapes
from ris_nb.registry import create_model
from ris_nb.training import loop as training
from ris_nb.training.config import TrainConfig
from ris_nb.training.loop import fit
from ris_nb.training.state import read_log

STEPS, DIES_AT = 20, 13
CONFIG = TrainConfig(steps=STEPS, batch_size=4, lr=5e-5, save_every=5, log_every=1, ema=0.9, layer_decay=0.75, checkpointing=True, keep_last=1)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def setting(root):
    """The model in its harness, and the objects it trains on."""
    referrals = open_data(root, "refshapes").referrals("train")
    vocabulary = build_vocabulary(s.text for r in referrals for s in r.sentences)
    torch.manual_seed(0)
    model = create_model("magnet_tiny", vocabulary=vocabulary, image_size=32, alignment=dict(pixels=32**2),
                         grounding=dict(at_least_one=True, dropout=0.0, rate=1.0, replace=1.0))
    return model.for_training(), ReferralDataset(referrals, model.tokenizer, model.transform)


def train(rank, root, folder, dies_at=-1):
    """What each process runs. The third dies by SIGKILL as step `dies_at` begins; a `RISError` is one line and exit code 2."""
    original = training.seed_step

    def deadly(seed, step, rank):
        if step == dies_at and rank == 2:
            folder.with_suffix(".died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        original(seed, step, rank)

    training.seed_step = deadly
    try:
        fit(*setting(root), CONFIG, folder, resume=True, progress=False)
    except RISError as error:
        Path(folder, f"{rank}.error").write_text(str(error))
        raise SystemExit(2) from None


def launch(processes, root, folder, dies_at):
    """What `torchrun` calls, in a process forked with all imports done; so are those it starts. It speaks into `folder`.stderr."""
    with open(folder.with_suffix(".stderr"), "w") as file:
        os.dup2(file.fileno(), 2)
    os.environ.update(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=folder.name,
                          max_restarts=0, start_method="fork")
    elastic_launch(config, member)(root, folder, dies_at)


def member(root, folder, dies_at):
    train(int(os.environ["RANK"]), root, folder, dies_at)


def torchrun(processes, root, folder, dies_at):
    """Exit code and stderr of a training of several processes that `torchrun` has started."""
    process = SERVER.Process(target=launch, args=(processes, root, folder, dies_at))
    process.start()
    process.join(500)
    assert process.exitcode is not None, "torchrun doesn't end"
    return process.exitcode, folder.with_suffix(".stderr").read_text()


def heard(name, value):
    """The numbers of an entry that have a say. A softmax takes no notice of the biases of its keys: it is the same for all keys
    of a query. Their gradients are zero but for rounding, which AdamW makes whole steps of."""
    if name.endswith("key.bias"):
        return value[:0]
    return torch.cat(value.chunk(3)[::2]) if name.endswith("in_proj_bias") else value


def distance(a, b):
    """The largest difference of two states of weights, and where it is."""
    return max(((heard(name, a[name]) - heard(name, b[name])).abs().max().item(), name) for name in a if heard(name, a[name]).numel())


def test_four_processes_train_the_weights_of_one_lose_a_rank_and_two_go_on(tmp_path):
    root = make_refshapes(tmp_path / "data", counts={"train": 12})
    one, four = tmp_path / "one", tmp_path / "four"
    in_processes(1, train, root, one)

    code, errors = torchrun(4, root, four, DIES_AT)
    died = four.with_suffix(".died").stat().st_mtime
    assert code != 0 and time.time() - died < 60, errors  # some seconds, but on a busy machine
    told = [path.read_text() for path in four.glob("*.error")]  # of those that torchrun had not stopped by then
    assert len(told) + errors.count("via signal SIGTERM") >= 3, errors  # each of the other three was told or stopped
    assert all(re.fullmatch(r"step 14: another process of this training is gone, .* to resume", line) for line in told), told
    state = torch.load(four / "state.pt", weights_only=True)
    assert state["step"] == 10  # the last that was saved
    log = read_log(one)
    for line, other in zip(log, read_log(four)):
        assert line["step"] == other["step"] and abs(line["loss"] - other["loss"]) < 1e-5

    in_processes(2, train, root, four)
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in (one, four)]
    assert [s["step"] for s in states] == [STEPS, STEPS]
    largest, where = distance(*(s["model"] for s in states))
    print(f"1 process, and 4 then 2: {largest:.2g} ({where})")
    assert largest < 1e-5, where
    averaged, where = distance(*({name.removeprefix("module."): value for name, value in s["ema"].items()} for s in states))
    assert averaged < 1e-5, where
    assert distance(states[0]["model"], {name.removeprefix("module."): value for name, value in states[0]["ema"].items()})[0] > 1e-5  # and is another
    resumed = read_log(four)
    assert [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    assert all(abs(a[term] - b[term]) < 1e-5 for a, b in zip(log, resumed) for term in ("loss", "mask", "dice", "alignment", "grounding"))
    answers = []
    for s in states:  # the key biases, too, are heard by nobody
        model, dataset = setting(root)
        model.load_state_dict(s["model"])
        batch = collate([dataset[i, 0] for i in range(4)])
        with torch.no_grad():
            answers.append(model.eval()(batch).score)
    assert (answers[0] - answers[1]).abs().max() < 1e-4
