"""Kills, resumes, several processes, full disks: what the training notebook has no room for.

Everything that is killed or runs in several processes does so in processes of its own, forked from a server that has
imported torch once. The model and the data are as small as they can be while they still have BatchNorm, dropout, a
parameter that no loss uses, and sentences to draw from.
"""
import json
import multiprocessing
import os
import re
import resource
import signal
import shutil
import socket
import sys
import time
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from accelerate.commands.launch import launch_command, launch_command_parser
from timm.layers import BatchNormAct2d, DropPath
from torch import nn
from torch.utils.checkpoint import checkpoint

from ris_nb.contract import Batch, Output, RISError
from ris_nb.data.batches import make_batch
from ris_nb.data.tokenizer import SPECIAL
from ris_nb.distributed import sync_batchnorm
from ris_nb.models.base import RISModel, evaluating
from ris_nb.models.mask_grounding import Grounded
from ris_nb.registry import create_model, load_model
from ris_nb.training import loop as training, trackers
from ris_nb.training.config import TrainConfig
from ris_nb.training.ema import EMA
from ris_nb.training.launch import check_launch, check_reached, make_accelerator
from ris_nb.training.loop import LossStep, accumulate_gradients, fit
from ris_nb.training.sampling import GlobalBatches, training_loader
from ris_nb.training.state import holding, kept_weights, read_log

os.environ["ACCELERATE_USE_CPU"] = "true"  # bit for bit is a promise for the CPU
SERVER = multiprocessing.get_context("forkserver")
CONFIG = TrainConfig(steps=12, batch_size=8, lr=1e-2, save_every=5, log_every=4, validate_every=6)
SWITCHES = dict(ema=0.9, layer_decay=0.5, checkpointing=True, keep_last=2, patience=3, trackers=("csv",))


class TrainedToy(RISModel):
    """A word says which colour channel matters; two convolutions with BatchNorm and dropout between them."""

    def __init__(self, width: int = 8, dropout: float = 0.1, vocabulary=SPECIAL, broken_at: int = -1):
        super().__init__(image_size=8, vocabulary=vocabulary, max_words=3)
        self.words = nn.Embedding(16, width)
        # no bias before BatchNorm: its gradient is rounding noise, which AdamW would blow up to whole steps
        self.first = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Conv2d(width, 1, 1)
        self.idle = nn.Linear(2, 2).requires_grad_(False)  # like LAVT's last gate
        self.scale = nn.Parameter(torch.ones(()))  # used by the loss alone
        self.broken_at, self.calls, self.checkpointing = broken_at, 0, False

    def set_grad_checkpointing(self, enable=True):
        self.checkpointing = enable

    def group_matcher(self, coarse=False):
        return dict(stem="^(?:words|first)", blocks=[("^bn", (0,)), ("^last", (1,))])

    def score(self, x):
        return self.last(self.dropout(x.relu()))[:, 0]

    def forward(self, batch):
        x = self.bn(self.first(batch.image)) + self.words(batch.ids).mean(1)[:, :, None, None]
        score = checkpoint(self.score, x, use_reentrant=False) if self.checkpointing and self.training else self.score(x)
        return Output(score, extra={"nested": [x]})

    def losses(self, output, batch):
        assert output.score.dtype == output.extra["nested"][0].dtype == torch.float32
        self.calls += 1
        ruin = float("nan") if self.calls == self.broken_at else 1
        mask = nn.functional.binary_cross_entropy_with_logits(output.score * self.scale, batch.mask.float())
        return {"mask": mask * ruin, "size": 0.1 * output.score.square().mean()}

    def masks(self, output, sizes):
        return [score > 0 for score in output.score]


class Colours(torch.utils.data.Dataset):
    """Objects with three sentences each: item (i, draw) is image i with word draw % 3."""

    def __init__(self, size=8):
        self.size = size

    def __len__(self):
        return 21

    def __getitem__(self, index):
        i, draw = index
        image = torch.randn(1, 3, self.size, self.size, generator=torch.Generator().manual_seed(i))
        word = draw % 3
        return Batch(image=image, ids=torch.tensor([[word + 1, 4, 0]]), words=torch.tensor([[True, True, False]]),
                     mask=image[:, word] > 0, image_id=[i])


def toy(**settings):
    torch.manual_seed(7)
    return TrainedToy(**settings)


def noisy_validate(model):
    """Uses up random numbers and leaves the model in another mode, as a careless validation might."""
    model.train()
    torch.rand(5)
    return {"oIoU": float(model.scale.detach()), "mIoU": 0.5}


def run(folder, config, kill=None, validate=noisy_validate, model=None, before=None):
    """One training in a process of its own; `kill=(name, n)` dies by SIGKILL as the n-th call of that function begins."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers; this process would hand down its own
    if before:
        before()
    if "wandb" in config.trackers:
        sys.modules["wandb"] = fake_wandb(folder.with_suffix(".wandb"))
    if kill:
        name, n = kill
        owner = os if hasattr(os, name) else torch if name == "save" else training
        original, seen = getattr(owner, name), []

        def deadly(*args, **kwargs):
            seen.append(1)
            if len(seen) == n:
                if name == "save":  # half of the file is there
                    Path(args[1]).write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        setattr(owner, name, deadly)
    try:
        fit(model or toy(), Colours(), config, folder, validate=validate, resume=True, progress=False)
    except RISError as error:
        folder.with_suffix(".error").write_text(str(error))
        raise SystemExit(2)


def fake_wandb(path):
    """Stands for the package, which tests don't install: what is asked of it goes to a file, a line each."""
    def say(**line):
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def init(**settings):
        say(id=settings["id"], resume=settings["resume"], lr=settings["config"]["lr"])
        return SimpleNamespace(log=lambda values, step: say(step=step, loss=values.get("loss")), finish=lambda: say(finished=True))
    module = ModuleType("wandb")
    module.init, module.Error, module.__spec__ = init, RuntimeError, ModuleSpec("wandb", None)
    return module


def start(*args, **kwargs):
    process = SERVER.Process(target=run, args=args, kwargs=kwargs)
    process.start()
    return process


def finish(*args, **kwargs):
    process = start(*args, **kwargs)
    process.join(240)
    return process.exitcode


def outcome(folder):
    """Everything a run leaves: the state, the kept weights, and the log without what the clock decides."""
    state = torch.load(folder / "state.pt", weights_only=True)
    log = [{k: v for k, v in line.items() if k not in ("samples_per_second", "waiting")} for line in read_log(folder)]
    return state, load_model(folder).state_dict(), log


def same(a, b):
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """What each config ends with when nothing disturbs it."""
    made = {}

    def get(config):
        key = json.dumps(asdict(config))
        if key not in made:
            folder = tmp_path_factory.mktemp("unbroken") / "run"
            assert finish(folder, config) == 0
            made[key] = outcome(folder)
        return made[key]
    return get


KILLS = {
    "before the first save": ("seed_step", 3),
    "between saves": ("seed_step", 9),
    "while the state is written": ("save", 2),
    "before the state takes its place": ("replace", 6),
    "between log and state": ("save_state", 3),
    "between kept weights and log": ("append_log", 2),
    "in the backward pass's step": ("optimizer_step", 11),
}


FAST_KILLS = "before the first save", "while the state is written", "between log and state"  # the others belong to the slow tier


@pytest.mark.parametrize("kill", [pytest.param(kill, id=name, marks=[] if name in FAST_KILLS else pytest.mark.slow) for name, kill in KILLS.items()])
def test_a_kill_at_any_moment_leaves_no_trace(tmp_path, unbroken, kill):
    folder = tmp_path / "run"
    assert finish(folder, CONFIG, kill) == -signal.SIGKILL
    if (folder / "state.pt").exists():
        torch.load(folder / "state.pt", weights_only=True)  # a good one, always
        load_model(folder)
    assert finish(folder, CONFIG) == 0
    assert same(outcome(folder), unbroken(CONFIG))
    assert [line["step"] for line in read_log(folder)] == [4, 6, 8, 12]
    assert not list(folder.glob("*.tmp")) + list(folder.glob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"workers": 2}, {"accumulate": 2, "clip": 0.1}, {"precision": "bf16"}],
                         ids=["workers", "accumulation", "bf16"])
def test_killed_thrice_with(tmp_path, unbroken, change):
    config, folder = replace(CONFIG, **change), tmp_path / "run"
    for kill in (("seed_step", 7), ("save", 2), ("append_log", 1)):
        assert finish(folder, config, kill) == -signal.SIGKILL
    assert finish(folder, config) == 0
    assert same(outcome(folder), unbroken(config))


def test_killed_thrice_with_all_that_a_run_can_carry(tmp_path, unbroken):
    """Average, loss scale, layer-wise rates, checkpoints, patience and trackers: none forgets, none says a step twice."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config, folder = replace(CONFIG, **SWITCHES | dict(precision="fp16", log_every=1, trackers=("csv", "tensorboard", "wandb"))), tmp_path / "run"
    for kill in (("seed_step", 7), ("save", 2), ("append_log", 2)):
        assert finish(folder, config, kill) == -signal.SIGKILL
    assert finish(folder, config) == 0
    state, kept, log = outcome(folder)
    assert same((state, kept, log), unbroken(config))
    assert state["scaler"]["_growth_tracker"] == 12 and state["ema"]["n_averaged"] == 12
    assert same(load_model(kept_weights(folder)[12]).state_dict(), {name.removeprefix("module."): value for name, value in state["ema"].items() if name != "n_averaged"})
    assert not same(dict(kept), state["model"])  # what is kept is the average
    assert list(kept_weights(folder)) == [10, 12]
    rows = (folder / "log.csv").read_text().splitlines()
    assert len(rows) == 13 and [int(row.partition(",")[0]) for row in rows[1:]] == list(range(1, 13))
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))
    told = [json.loads(line) for line in folder.with_suffix(".wandb").read_text().splitlines()]
    begun = [line for line in told if "id" in line]
    assert len(begun) == 4 and all(line == begun[0] for line in begun) and begun[0]["resume"] == "allow" and told[-1] == {"finished": True}
    by_step = {}
    for line in told:
        if "step" in line:
            assert by_step.setdefault(line["step"], line["loss"]) == line["loss"]  # a step that comes again is the same
    assert sorted(by_step) == list(range(1, 13))


@pytest.mark.slow
def test_killed_from_outside_at_moments_that_nobody_chose(tmp_path, unbroken):
    config, folder = replace(CONFIG, steps=150, save_every=1, log_every=1, validate_every=0), tmp_path / "run"
    kills = 0
    for wait in (0.3, 0.1, 0.2, 0.25, 0.15):
        process = start(folder, config)
        while not (folder / "state.pt").exists() and process.is_alive():
            time.sleep(0.01)
        time.sleep(wait)
        process.kill()  # no error where it has come to its end in the meantime
        process.join(240)
        kills += process.exitcode == -signal.SIGKILL
        assert not (folder / "state.pt").exists() or torch.load(folder / "state.pt", weights_only=True)
    assert kills >= 3
    assert finish(folder, config) == 0
    assert same(outcome(folder), unbroken(config))
    assert [line["step"] for line in read_log(folder)] == list(range(1, 151))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_training_into_a_folder_gets_one_line(tmp_path, unbroken, workers):
    config, folder = replace(CONFIG, steps=2000, schedule="constant", save_every=1, log_every=1, validate_every=0, workers=workers), tmp_path / "run"
    first = start(folder, config)
    while not (folder / "state.pt").exists():
        assert first.is_alive()
        time.sleep(0.01)
    assert finish(folder, config) == 2
    assert folder.with_suffix(".error").read_text() == f"{folder}: another training is writing there; wait until it ends, or choose another folder"
    assert first.is_alive()
    first.kill()
    first.join(240)
    (folder / ".state.pt.elsewhere-7.tmp").write_text("what a kill on another machine left")
    step = torch.load(folder / "state.pt", weights_only=True)["step"]
    assert finish(folder, replace(config, steps=step + 2)) == 0  # at once: the lock is gone, whatever loader workers do
    assert not list(folder.glob(".*"))


def locked_out(rank, folder):
    try:
        fit(toy(), Colours(), CONFIG, folder, progress=False)
    except RISError as error:
        (folder / f"{rank}.error").write_text(str(error))


def test_all_processes_hear_of_a_locked_folder(tmp_path):
    with holding(tmp_path):
        in_processes(2, locked_out, tmp_path)
        for rank in (0, 1):
            assert "another training is writing there" in (tmp_path / f"{rank}.error").read_text()
        assert not (tmp_path / "train.json").exists()


def test_an_error_closes_trackers_and_unlocks(tmp_path, monkeypatch):
    finished = []
    monkeypatch.setattr(trackers.CSVTracker, "finish", lambda self: finished.append(self))
    config = replace(CONFIG, trackers=("csv",))
    with pytest.raises(RISError, match="step 3 is not finite"):
        fit(toy(broken_at=3), Colours(), config, tmp_path / "run", progress=False)
    assert len(finished) == 1
    fit(toy(), Colours(), config, tmp_path / "run", resume=True, progress=False)
    assert len(finished) == 2 and not list((tmp_path / "run").glob(".*"))


def test_samples_per_second_leave_out_validation_and_saving(tmp_path, monkeypatch):
    def slow(model):
        time.sleep(1.0)
        return {"oIoU": 0.5}

    def slow_save(*args):
        time.sleep(0.5)
        return save(*args)

    save = training.save_state
    monkeypatch.setattr(training, "save_state", slow_save)
    begin = time.perf_counter()
    log = fit(toy(), Colours(), replace(CONFIG, log_every=1, save_every=2, validate_every=2), tmp_path, validate=slow, progress=False)
    seconds = CONFIG.steps * CONFIG.batch_size / log[-1]["samples_per_second"]
    assert seconds < time.perf_counter() - begin - 7  # six validations and five saves lay before the last line


def test_workers_and_validation_change_nothing(unbroken):
    plain = unbroken(CONFIG)[0]["model"]
    assert same(unbroken(replace(CONFIG, workers=2))[0]["model"], plain)
    assert same(unbroken(replace(CONFIG, validate_every=0))[0]["model"], plain)
    assert not same(unbroken(replace(CONFIG, accumulate=2, clip=0.1))[0]["model"], plain)


class FrozenToy(TrainedToy):
    """Its first part holds whatever moves without a gradient: running statistics, dropout, drop path."""

    def __init__(self, vocabulary=SPECIAL, **shared):
        super().__init__(vocabulary=vocabulary)
        self.frozen = tuple(shared.get("freeze", ()))
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5), DropPath(0.5))

    def forward(self, batch):
        return super().forward(replace(batch, image=self.stem(batch.image)))


@pytest.mark.parametrize("late", [False, True], ids=["at the start", "later"])
def test_a_frozen_part_stands_still(tmp_path, late):
    torch.manual_seed(7)
    model = FrozenToy(freeze=() if late else ["stem"])
    if late:
        model.train().freeze(["stem"])
    before = deepcopy(model.state_dict())
    drawn = []
    model.stem.register_forward_hook(lambda stem, images, out: drawn.append(not torch.equal(out, stem[1](stem[0](images[0])))))
    config = replace(CONFIG, ema=0.5, weight_decay=0.5)
    fit(model, Colours(), config, tmp_path, validate=noisy_validate, progress=False)
    state, kept = torch.load(tmp_path / "state.pt", weights_only=True), load_model(tmp_path)
    averaged = {name.removeprefix("module."): value for name, value in state["ema"].items()}
    for found in (model.state_dict(), kept.state_dict(), state["model"], averaged):
        moved = {name.partition(".")[0] for name, value in before.items() if not torch.equal(value, found[name])}
        assert moved == {"words", "first", "bn", "last", "scale"}
    assert drawn == [False] * config.steps


def test_frozen_parts_stand_still_in_the_harness_and_in_copies():
    harness = create_model("magnet_tiny", vocabulary=[*SPECIAL, "a", "b", "c"]).for_training()
    assert isinstance(harness, Grounded)
    with evaluating(harness.train()):  # which gives each part its mode back
        harness.host.freeze(["encoder.text"])
    for model in (harness, deepcopy(harness), EMA(harness, 0.9).module, deepcopy(harness).train()):
        assert model.training and model.host.encoder.vision.training
        assert not any(part.training for part in model.host.encoder.text.modules())


# Several processes

def in_processes(world, function, *args, expected=0):
    """Runs `function(rank, *args)` in `world` processes that accelerate takes for a launched group on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [SERVER.Process(target=member, args=(rank, world, port, function, *args)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == (expected if isinstance(expected, list) else [expected] * world)


def member(rank, world, port, function, *args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    function(rank, *args)
    if world > 1:
        torch.distributed.destroy_process_group()


def small_lavt():
    torch.manual_seed(7)
    return create_model("lavt_tiny", vocabulary=SPECIAL, image_size=32, decoder=dict(width=16),
                        vision=dict(width=16, depths=(1, 1, 1, 1), heads=(1, 2, 4, 8), patch=2), text=dict(width=32, layers=1, heads=2, ffn=32))


def gradients(rank, folder, config, kind):
    """The averaged gradient of the first step, the running statistics, and what was seen."""
    accelerator = make_accelerator()
    model = sync_batchnorm(toy(dropout=0.0) if kind == "toy" else small_lavt()).train()
    step = accelerator.prepare(LossStep(model))
    loader = training_loader(Colours(model.image_size), config, 0, rank, accelerator.num_processes)
    values = accumulate_gradients(accelerator, step, iter(loader), config.accumulate)
    values = accelerator.reduce(torch.stack(list(values.values())), "mean")
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found.update(values=values, **{name: buffer for name, buffer in model.named_buffers() if "running" in name})
    torch.save(found, folder / f"{accelerator.num_processes}-{rank}.pt")


@pytest.mark.parametrize("kind, accumulate", [("toy", 1), ("toy", 2), ("lavt", 1)])
def test_two_processes_have_the_gradient_of_one(tmp_path, kind, accumulate):
    config = TrainConfig(steps=2, batch_size=8, accumulate=accumulate)
    in_processes(1, gradients, tmp_path, config, kind)
    in_processes(2, gradients, tmp_path, config, kind)
    one, first, second = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert len(one) > 5 and any("running_var" in name for name in one)
    assert "scale" in one and "idle.weight" not in one or kind == "lavt"
    for name in one:
        for other in (first, second):
            assert (one[name] - other[name]).abs().max() < 1e-5, name
    print(kind, accumulate, max((one[name] - other[name]).abs().max().item() for name in one for other in (first, second)))


def unreached(rank, folder):
    model = toy()
    model.idle.requires_grad_(True)
    try:
        fit(model, Colours(), CONFIG, folder, progress=False)
    except RISError as error:
        (folder / f"{rank}.error").write_text(str(error))


def test_a_parameter_that_no_loss_reaches_is_named_before_the_first_step(tmp_path):
    alone = toy()
    alone.idle.requires_grad_(True)
    fit(alone, Colours(), CONFIG, tmp_path / "one", validate=noisy_validate, progress=False)
    assert read_log(tmp_path / "one")[-1]["step"] == CONFIG.steps  # alone, it harms nobody
    in_processes(2, unreached, tmp_path / "two")
    for rank in (0, 1):
        assert re.fullmatch("no loss reaches 2 of the model's parameters, the first is idle.weight, .*--freeze.*", (tmp_path / f"two/{rank}.error").read_text())
    assert not (tmp_path / "two/state.pt").exists()


REACHED = {"lavt": ("lavt_tiny", {}), "layer norms, dice": ("lavt_tiny", dict(norm="layer", dice=1.0)), "magnet": ("magnet_tiny", {}),
           "nothing hidden": ("magnet_tiny", {"grounding.weight": 0.0}), "no alignment": ("magnet_tiny", {"alignment.weight": 0.0}),
           "no extra loss": ("magnet_tiny", {"alignment.weight": 0.0, "grounding.weight": 0.0}),
           "simple decoder": ("magnet_tiny", {"decoder.kind": "simple", "alignment.weight": 0.0}), "released": ("magnet_tiny", dict(released=True)),
           "no word chosen": ("magnet_tiny", {"grounding.rate": 0.0}), "words alone": ("magnet_tiny", {"grounding.at_least_one": True, "grounding.see": ()}),
           "sag": ("sag_tiny", {}), "no slots": ("sag_tiny", {"slots.discovery": False, "loss.reconstruction": 0.0}),
           "no fusion": ("sag_tiny", {"fusion.attention": False}), "no C3": ("sag_tiny", {"loss.c3": 0.0}),
           "no reconstruction": ("sag_tiny", {"loss.reconstruction": 0.0}), "one Gaussian": ("sag_tiny", {"slots.gaussians": 1, "slots.per_gaussian": 12}),
           "random slots": ("sag_tiny", {"slots.kind": "random"})}


def magnet_alone(rank, folder):
    torch.manual_seed(7)
    model = create_model("magnet_tiny", image_size=32, vocabulary=[*SPECIAL, "a", "b", "c"], **{"alignment.weight": 0.0, "grounding.weight": 0.0})
    fit(model.for_training(), Colours(32), TrainConfig(steps=2, batch_size=4), folder, progress=False)


def test_magnet_without_its_extra_losses_trains_on_two_processes(tmp_path):
    in_processes(2, magnet_alone, tmp_path)
    assert read_log(tmp_path)[-1]["step"] == 2


@pytest.mark.parametrize("name, settings", REACHED.values(), ids=REACHED)
def test_a_step_reaches_every_parameter_that_learns(name, settings):
    """So that processes need not search each graph for what was left out (`find_unused_parameters`)."""
    torch.manual_seed(0)
    model = create_model(name, vocabulary=[*SPECIAL, "a", "b", "c"], **settings).for_training().train()
    ids = torch.tensor([[SPECIAL.index("[CLS]"), len(SPECIAL), len(SPECIAL) + 1, SPECIAL.index("[SEP]")]] * 3)
    batch = Batch(image=torch.randn(3, 3, 64, 64), ids=ids, words=torch.ones_like(ids, dtype=torch.bool), mask=torch.rand(3, 64, 64) > 0.5, image_id=[0, 1, 2])
    sum(LossStep(model)(batch).values()).backward()
    check_reached(model)


# What accelerate may ask for

ASKED = {"FSDP": ({"USE_FSDP": "true"}, "FSDP", "--accumulate"), "DeepSpeed": ({"USE_DEEPSPEED": "true"}, "DeepSpeed"), "Megatron": ({"USE_MEGATRON_LM": "true"}, "Megatron-LM"),
         "parallelism": ({"USE_PARALLELISM_CONFIG": "true"}, "parallelism"), "float16": ({"MIXED_PRECISION": "fp16"}, "mixed precision fp16", "--precision bf16"),
         "another precision": ({"MIXED_PRECISION": "bf16"}, "mixed precision bf16", "--precision bf16"), "pieces": ({"GRADIENT_ACCUMULATION_STEPS": "4"}, "--accumulate 4"),
         "a compiler": ({"DYNAMO_BACKEND": "INDUCTOR"}, "inductor", "--dynamo_backend")}


@pytest.mark.parametrize("environment, words", [(first, rest) for first, *rest in ASKED.values()], ids=ASKED)
def test_what_accelerate_asks_for_and_a_run_does_not_do_is_refused_in_a_line(environment, words, monkeypatch, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(RISError) as caught:
        fit(toy(), Colours(), CONFIG, tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words) and not (tmp_path / "run").exists()


def test_what_accelerate_asks_for_by_default_and_what_the_run_does_anyway_is_taken(monkeypatch):
    for name, value in {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "USE_FSDP": "false", "GRADIENT_ACCUMULATION_STEPS": "1"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    for precision in ("no", "bf16"):
        check_launch(precision)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_launch("bf16")


def launched(count, folder):
    """What the program does that `accelerate launch` starts, in the environment that it finds. `env` stands for the program: it needs no import."""
    with open(folder / "environment", "w") as file:
        os.dup2(file.fileno(), 1)
    arguments = ["--cpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", str(count), "--no_python", "env", "-0"]
    launch_command(launch_command_parser().parse_args(arguments))
    found = (folder / "environment").read_text().rstrip("\0").split("\0")
    assert sum(line.startswith("ACCELERATE_USE_CPU=") for line in found) == 1  # one process
    os.environ.clear()
    os.environ.update(line.split("=", 1) for line in found)
    try:
        make_accelerator()
        (folder / "answer").write_text("started")
    except RISError as error:
        (folder / "answer").write_text(str(error))


def test_accelerate_launch_on_a_processor_starts_one_process_and_that_is_told(tmp_path, monkeypatch):
    """It leaves several processes on CPUs to mpirun; torchrun starts them."""
    for name in ("MASTER_ADDR", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for count, answer in ((1, "started"), (2, "torchrun --nproc-per-node")):
        process = SERVER.Process(target=launched, args=(count, tmp_path))
        process.start()
        process.join(120)
        assert process.exitcode == 0 and answer in (tmp_path / "answer").read_text()


def whole_run(rank, folder, config):
    fit(toy(dropout=0.0), Colours(), config, folder, validate=noisy_validate, resume=True, progress=False)


def dropping_run(rank, folder, config):
    fit(toy(), Colours(), config, folder, validate=noisy_validate, resume=True, progress=False)


def killed_run(rank, folder, config):
    original = training.seed_step

    def deadly(seed, step, rank):
        if step == 9:
            torch.distributed.barrier()  # or the first to die takes the other down by an error
            os.kill(os.getpid(), signal.SIGKILL)
        original(seed, step, rank)
    training.seed_step = deadly
    dropping_run(rank, folder, config)


def test_two_processes_train_the_weights_of_one(tmp_path):
    config = replace(CONFIG, lr=1e-3, steps=12, **SWITCHES)
    for world in (1, 2):
        in_processes(world, whole_run, tmp_path / str(world), config)
    (one, kept, log), (two, kept2, log2) = outcome(tmp_path / "1"), outcome(tmp_path / "2")
    fresh = toy(dropout=0.0).state_dict()
    for name, value in one["model"].items():
        assert (value - two["model"][name]).abs().max() < 1e-5, name
        assert (kept[name] - kept2[name]).abs().max() < 1e-5, name
        assert (one["ema"]["module." + name] - two["ema"]["module." + name]).abs().max() < 1e-5, name
    assert max((value - fresh[name]).abs().max() for name, value in one["model"].items() if value.is_floating_point()) > 1e-3  # they learned
    assert [line["step"] for line in log] == [4, 6, 8, 12] and [line.keys() for line in log] == [line.keys() for line in log2]
    losses = [(a["loss"], b["loss"]) for a, b in zip(log, log2) if "loss" in a]
    assert len(losses) == 3 and all(abs(a - b) < 1e-5 for a, b in losses)


def test_two_processes_with_dropout_are_killed_and_go_on(tmp_path):
    config = replace(CONFIG, precision="fp16", **SWITCHES)
    for name in ("unbroken", "killed"):
        if name == "killed":
            in_processes(2, killed_run, tmp_path / name, config, expected=-signal.SIGKILL)
            assert torch.load(tmp_path / name / "state.pt", weights_only=True)["step"] == 6
        in_processes(2, dropping_run, tmp_path / name, config)
    assert same(outcome(tmp_path / "killed"), outcome(tmp_path / "unbroken"))


def losing_run(rank, folder):
    """Process 1 dies alone, and nobody tells the other."""
    original = training.seed_step

    def deadly(seed, step, rank):
        if step == 7 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        original(seed, step, rank)
    training.seed_step = deadly
    try:
        dropping_run(rank, folder, CONFIG)
    except RISError as error:
        (folder / "error").write_text(str(error))
        os._exit(2)


def test_the_death_of_one_process_ends_the_other_with_one_line(tmp_path):
    folder = tmp_path / "run"
    began = time.perf_counter()
    in_processes(2, losing_run, folder, expected=[2, -signal.SIGKILL])
    assert time.perf_counter() - began < 120  # it doesn't wait for the backend's patience, half an hour, to run out
    assert re.fullmatch("step 8: another process of this training is gone, .* start all processes again to resume", (folder / "error").read_text())
    in_processes(2, dropping_run, folder, CONFIG)
    assert [line["step"] for line in read_log(folder)] == [4, 6, 8, 12]


def test_the_global_batch_is_the_same_for_any_number_of_processes():
    for accumulate in (1, 2):
        config = TrainConfig(steps=7, batch_size=8, accumulate=accumulate)
        alone = list(GlobalBatches(21, config))
        shares = [list(GlobalBatches(21, config, rank=rank, world=4)) for rank in range(4)]
        assert [sum(parts, []) for parts in zip(*shares)] == alone
        assert alone[3 * accumulate:] == list(GlobalBatches(21, config, start=3))
    indices = [i for batch in GlobalBatches(21, TrainConfig(steps=21, batch_size=8)) for i, _ in batch]
    assert all(sorted(indices[k:k + 21]) == list(range(21)) for k in range(0, 168, 21))


def batchnorm(rank, folder, norm):
    accelerator = make_accelerator()
    world = accelerator.num_processes
    x = 3 + 5 * torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    target = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    # unequal shares: 4 images for one process, 2 for the other
    mine = slice(None) if world == 1 else slice(0, 4) if rank == 0 else slice(4, 6)
    bn = sync_batchnorm(norm(4)) if world > 1 else norm(4)
    part = x[mine].clone().requires_grad_()
    for _ in range(2):
        y = bn(part)
    (y * target[mine]).pow(3).sum().backward()
    torch.save((y.detach(), part.grad, bn.state_dict(), bn.eval()(part).detach()), folder / f"{world}-{rank}.pt")


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
def test_sync_batchnorm_is_batchnorm_of_the_whole_batch(tmp_path, norm):
    in_processes(1, batchnorm, tmp_path, norm)
    in_processes(2, batchnorm, tmp_path, norm)
    y, grad, state, frozen = torch.load(tmp_path / "1-0.pt")
    (y0, g0, s0, f0), (y1, g1, s1, f1) = (torch.load(tmp_path / f"2-{rank}.pt") for rank in (0, 1))
    assert torch.allclose(torch.cat([y0, y1]), y, atol=1e-5) and torch.allclose(torch.cat([f0, f1]), frozen, atol=1e-5)
    assert not torch.allclose(y, frozen, atol=1e-2)  # in evaluation it is the running statistics that count
    assert torch.allclose(torch.cat([g0, g1]), grad, atol=1e-4 * grad.abs().max())
    for name in state:
        assert torch.allclose(s0[name], state[name]) and torch.allclose(s1[name], s0[name])


# What can go wrong

def test_a_full_disk_keeps_the_last_good_state(tmp_path):
    folder = tmp_path / "run"
    assert finish(folder, replace(CONFIG, steps=8), validate=None, kill=("seed_step", 7)) == -signal.SIGKILL
    good = (folder / "state.pt").read_bytes()
    assert finish(folder, replace(CONFIG, steps=8), validate=None, before=FileLimit(4000)) == 2
    assert (folder / "state.pt").read_bytes() == good
    error = folder.with_suffix(".error").read_text()
    assert "state.pt: the disk is full" in error and "space" in error and "\n" not in error
    assert not list(folder.glob("*.tmp")) + list(folder.glob(".*.tmp"))
    assert finish(folder, replace(CONFIG, steps=8), validate=None) == 0


class FileLimit:
    """Stands for a full disk: no file of this process may grow beyond `size` bytes."""

    def __init__(self, size):
        self.size = size

    def __call__(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


def test_refusals(tmp_path):
    config = replace(CONFIG, steps=2)
    fit(toy(), Colours(), config, tmp_path, progress=False)
    with pytest.raises(RISError, match="already holds a run"):
        fit(toy(), Colours(), config, tmp_path, progress=False)
    for change, word in (({"lr": 1}, "lr was 0.01 and is now 1"), ({"steps": 9}, "steps was 2 and is now 9")):
        with pytest.raises(RISError, match=word):
            fit(toy(), Colours(), replace(config, **change), tmp_path, resume=True, progress=False)
    with pytest.raises(RISError, match="multiple of 3"):
        fit(toy(), Colours(), replace(config, accumulate=3), tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()
    longer = replace(config, log_every=1, workers=1)
    assert fit(toy(), Colours(), longer, tmp_path, resume=True, progress=False) == read_log(tmp_path)
    (tmp_path / "state.pt").write_bytes(b"half a file")
    with pytest.raises(RISError, match="state.pt: cannot be read"):
        fit(toy(), Colours(), config, tmp_path, resume=True, progress=False)


def test_another_model_or_other_data_is_refused(tmp_path):
    config = replace(CONFIG, steps=2)
    fit(toy(), Colours(), config, tmp_path, progress=False)
    with pytest.raises(RISError, match="another model"):
        fit(toy(width=4), Colours(), config, tmp_path, resume=True, progress=False)
    fewer = torch.utils.data.Subset(Colours(), range(5))
    with pytest.raises(RISError, match="21 objects, not 5"):
        fit(toy(), fewer, config, tmp_path, resume=True, progress=False)


def test_a_constant_schedule_may_go_on(tmp_path):
    config = replace(CONFIG, schedule="constant", steps=5)
    fit(toy(), Colours(), config, tmp_path / "a", progress=False)
    fit(toy(), Colours(), replace(config, steps=9), tmp_path / "a", resume=True, progress=False)
    fit(toy(), Colours(), replace(config, steps=9), tmp_path / "b", progress=False)
    assert same(outcome(tmp_path / "a")[0]["model"], outcome(tmp_path / "b")[0]["model"])


def test_not_finite_stops_before_anything_is_written(tmp_path):
    config = replace(CONFIG, save_every=4, validate_every=0)
    with pytest.raises(RISError, match=r"step 6 is not finite \(loss nan, mask nan, size 0\.\d+, grad_norm nan\)"):
        fit(toy(broken_at=6), Colours(), config, tmp_path, progress=False)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 4
    assert all(value.isfinite().all() for value in load_model(tmp_path).state_dict().values())
    assert [line["step"] for line in read_log(tmp_path)] == [4]


def test_the_best_weights_are_kept(tmp_path):
    seen = []

    def validate(model):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        assert not model.training
        return {"oIoU": (0.1, 0.9, 0.3)[len(seen) - 1], "mIoU": 0.0}
    model = toy()
    history = fit(model, Colours(), replace(CONFIG, validate_every=4), tmp_path, validate, progress=False)
    assert same(dict(load_model(tmp_path).state_dict()), seen[1]) and same(dict(model.state_dict()), seen[2])
    assert [line.get("val_oIoU") for line in history] == [0.1, 0.9, 0.3]
    assert torch.load(tmp_path / "state.pt", weights_only=True)["best"] == 0.9
    with pytest.raises(RISError, match="picked by mIoU"):
        fit(toy(), Colours(), replace(CONFIG, best="mIoU"), tmp_path / "b", lambda m: {"oIoU": 1.0}, progress=False)


def test_bf16_trains_and_keeps_float32_weights(tmp_path):
    history = fit(toy(), Colours(), replace(CONFIG, precision="bf16", steps=40), tmp_path, progress=False)
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(v.dtype in (torch.float32, torch.int64) for v in load_model(tmp_path).state_dict().values())


# Lengths, rates and what a machine offers

def test_patience_ends_a_run_and_more_of_it_goes_on(tmp_path):
    def scores():
        rest = iter((0.5, 0.6, 0.6, 0.4, 0.7, 0.1))
        return lambda model: {"oIoU": next(rest), "mIoU": 0.0}
    config = replace(CONFIG, validate_every=2, patience=2)
    history = fit(toy(), Colours(), config, tmp_path / "a", scores(), progress=False)
    assert history[-1]["step"] == 8 and torch.load(tmp_path / "a/state.pt", weights_only=True)["stale"] == 2
    assert fit(toy(), Colours(), config, tmp_path / "a", scores(), resume=True, progress=False) == history
    patient, rest = replace(config, patience=3), iter((0.7, 0.1))
    fit(toy(), Colours(), patient, tmp_path / "a", lambda model: {"oIoU": next(rest), "mIoU": 0.0}, resume=True, progress=False)
    fit(toy(), Colours(), patient, tmp_path / "b", scores(), progress=False)
    assert same(outcome(tmp_path / "a"), outcome(tmp_path / "b")) and read_log(tmp_path / "a")[-1]["step"] == 12
    with pytest.raises(RISError, match="patience 2 counts validations, and nothing validates"):
        fit(toy(), Colours(), config, tmp_path / "c", progress=False)


def test_epochs_become_steps_when_the_data_are_known(tmp_path):
    config = replace(CONFIG, steps=None, epochs=2, validate_every=0)
    history = fit(toy(), Colours(), config, tmp_path / "a", progress=False)
    assert history[-1]["step"] == 6 and json.loads((tmp_path / "a/train.json").read_text())["steps"] == 6
    assert fit(toy(), Colours(), config, tmp_path / "a", resume=True, progress=False) == history
    fit(toy(), Colours(), replace(CONFIG, steps=6, validate_every=0), tmp_path / "b", progress=False)
    assert same(outcome(tmp_path / "a"), outcome(tmp_path / "b"))


OLD_FIELDS = ("steps", "batch_size", "lr", "weight_decay", "schedule", "power", "warmup", "warmup_kind", "clip", "accumulate", "precision", "seed", "workers",
              "validate_every", "save_every", "log_every", "best")  # and tensorboard


def test_a_run_of_version_0_1_goes_on(tmp_path):
    """Its train.json had other fields, its state.pt fewer entries."""
    folder = tmp_path / "old"
    with pytest.raises(RISError, match="step 9 is not finite"):
        fit(toy(broken_at=9), Colours(), CONFIG, folder, noisy_validate, progress=False)
    state, config = torch.load(folder / "state.pt", weights_only=True), asdict(CONFIG)
    assert state["step"] == 6
    torch.save({name: state[name] for name in ("step", "best", "meter", "samples", "model", "optimizer")}, folder / "state.pt")
    (folder / "train.json").write_text(json.dumps({name: config[name] for name in OLD_FIELDS} | {"tensorboard": False}))
    fit(toy(), Colours(), CONFIG, folder, noisy_validate, resume=True, progress=False)
    fit(toy(), Colours(), CONFIG, tmp_path / "new", noisy_validate, progress=False)
    assert same(outcome(folder), outcome(tmp_path / "new"))
    with pytest.raises(RISError, match="ema was 0.0 and is now 0.5"):
        fit(toy(), Colours(), replace(CONFIG, ema=0.5), folder, noisy_validate, resume=True, progress=False)


def test_with_an_average_the_model_ends_as_what_was_validated(tmp_path):
    model, seen = toy(), []

    def validate(average):
        seen.append({name: value.clone() for name, value in average.state_dict().items()})
        return {"oIoU": len(seen), "mIoU": 0.0}
    fit(model, Colours(), replace(CONFIG, ema=0.5), tmp_path, validate, progress=False)
    assert same(dict(model.state_dict()), seen[-1]) and same(dict(load_model(tmp_path).state_dict()), seen[-1])
    assert not same(torch.load(tmp_path / "state.pt", weights_only=True)["model"], seen[-1])


def test_a_validation_computes_in_the_precision_of_the_training(tmp_path):
    batch = Colours()[0, 0]
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        seen = []

        def validate(model):
            hook = model.last.register_forward_hook(lambda layer, given, result: seen.append(result.dtype))
            assert model(batch).score.dtype == torch.float32 and not model.training
            hook.remove()
            return {"oIoU": 0.5}
        fit(toy(), Colours(), replace(CONFIG, steps=1, validate_every=0, precision=precision), tmp_path / precision, validate, progress=False)
        assert seen == [dtype]


def test_float16_that_overflows_at_every_scale_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "optimizer_step", lambda optimizer, config, step, scaler: scaler.update(0.25) or torch.tensor(float("inf")))
    with pytest.raises(RISError, match="step 4: gradients overflow float16 at every scale"):
        fit(toy(), Colours(), replace(CONFIG, precision="fp16"), tmp_path, progress=False)


def test_checkpointing_changes_no_bit(tmp_path):
    for name, checkpointing in (("a", False), ("b", True)):
        fit(toy(), Colours(), replace(CONFIG, steps=4, validate_every=0, checkpointing=checkpointing), tmp_path / name, progress=False)
    assert same(outcome(tmp_path / "a"), outcome(tmp_path / "b"))


def test_a_compiled_model_trains_as_the_plain_one(tmp_path, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    config = replace(CONFIG, steps=6, validate_every=3)
    fit(toy(dropout=0.0), Colours(), config, tmp_path / "plain", noisy_validate, progress=False)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    fit(toy(dropout=0.0), Colours(), replace(config, compile=True), tmp_path / "compiled", noisy_validate, progress=False)
    assert same(outcome(tmp_path / "plain"), outcome(tmp_path / "compiled"))
    assert 1 <= len(graphs) <= 3  # once, not at every step or validation


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="TorchInductor needs a C++ compiler on a CPU")
def test_what_inductor_compiles_computes_the_same():
    torch.manual_seed(0)
    model = create_model("lavt_tiny", vocabulary=[*SPECIAL, "red", "star"]).eval()
    batch = make_batch([Image.new("RGB", (64, 64), "red")], ["red star"], model.tokenizer, model.transform)
    with torch.no_grad():
        plain, compiled = (step(batch).score for step in (model, torch.compile(model.forward)))
    assert torch.allclose(plain, compiled, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))


REFUSED = {"no compiler": (dict(compile=True), "install g[+][+]"), "no GPU": (dict(precision="tf32"), "take precision no"),
           "no W&B": (dict(trackers=("wandb",)), "pip install wandb"), "no layers": (dict(layer_decay=0.5), "group_matcher"),
           "no checkpointing": (dict(checkpointing=True), "accumulate")}


@pytest.mark.parametrize("change, words", REFUSED.values(), ids=REFUSED)
def test_what_machine_or_model_does_not_offer_is_refused_before_anything_is_written(tmp_path, monkeypatch, change, words):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for name in ("set_grad_checkpointing", "group_matcher"):
        monkeypatch.delattr(TrainedToy, name)
    with pytest.raises(RISError, match=words) as caught:
        fit(toy(), Colours(), replace(CONFIG, **change), tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_losses_that_no_parameter_changes_are_told_in_one_line(tmp_path):
    model = toy()
    model.losses = lambda output, batch: {"mask": output.score.detach().mean()}
    with pytest.raises(RISError, match="no gradient comes from mask"):
        fit(model, Colours(), CONFIG, tmp_path / "run", progress=False)
