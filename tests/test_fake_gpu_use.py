"""Evaluation, listening, studies and panels on a GPU that isn't there; and how often they wait for it.

`PretendGPU` runs what is on the CPU as it is, and what is on `cuda` on torch's fake tensors, which know shapes, types
and devices, and no numbers. What comes back to the host is zeros. A tensor left on the wrong side fails at its line,
as on a real GPU.
"""
from __future__ import annotations

import sys
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import (DataDependentOutputException, DynamicOutputShapeException, FakeTensor,
                                           FakeTensorMode, unset_fake_temporarily)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import ris_nb
from ris_nb.data.batches import ReferralDataset
from ris_nb.data.scenes import open_scenes
from ris_nb.data.shapes import make_scene
from ris_nb.data.sources import open_data
from ris_nb.data.writer import make_refshapes
from ris_nb.evaluation.cases import show_answers
from ris_nb.evaluation.evaluate import evaluate
from ris_nb.evaluation.listening import listen
from ris_nb.evaluation.probes import find_changes
from ris_nb.explore.answers import Viewer
from ris_nb.explore.ask import ask_panel
from ris_nb.explore.fill import fill_panel, shipped_game
from ris_nb.explore.shatter import ShatterPanel
from ris_nb.registry import load_model
from ris_nb.studies import law, magnet, rivals, sag

WHERE = Path(ris_nb.__file__).parent
# what fakes can't answer, and a GPU answers by a wait
VALUES = (DataDependentOutputException, DynamicOutputShapeException)


class PretendGPU(TorchDispatchMode):
    """While it is entered, `cuda` is there. `waits` counts the lines of the library at which the host waits for it:
    values that are read, and copies that aren't `non_blocking`."""

    def __init__(self):
        super().__init__()
        self.fakes, self.waits = FakeTensorMode(allow_non_fake_inputs=True), Counter()

    def __enter__(self):
        FakeTensor.tolist = lambda tensor: tensor.cpu().tolist()  # one copy, as on a GPU
        self.fakes.__enter__()  # the outer one: with it torch doesn't look for a real GPU
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.fakes.__exit__(*error)
        del FakeTensor.tolist

    def waited(self):
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(WHERE))]
        self.waits[f"{Path(frames[-1].filename).name}: {frames[-1].line}" if frames else "elsewhere"] += 1

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        if not any(isinstance(x, FakeTensor) or is_cuda(x) for x in tree_leaves((arguments, options))):
            with unset_fake_temporarily():
                return function(*arguments, **options)
        try:
            out = function(*arguments, **options)
        except VALUES:
            self.waited()
            with unset_fake_temporarily():
                real = function(*tree_map(real_zeros, arguments), **tree_map(real_zeros, options))
            return tree_map(lambda x: self.fake(x) if isinstance(x, torch.Tensor) else x, real)
        copies = "copy" in str(function)
        tensors = [x for x in tree_leaves((arguments, out)) if isinstance(x, torch.Tensor)]
        kinds = {x.device.type for x in tensors if x.ndim or copies}
        if len(kinds) > 1 and not options.get("non_blocking"):
            self.waited()
        with unset_fake_temporarily():
            return real_zeros(out) if isinstance(out, torch.Tensor) and out.device.type == "cpu" else out

    def fake(self, x):
        return torch.ops.aten._to_copy(x, device=torch.device("cuda"))


def is_cuda(x):
    return isinstance(x, torch.device) and x.type == "cuda"


def real_zeros(x):
    """A real tensor in place of a fake one."""
    if is_cuda(x):
        return torch.device("cpu")
    return torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, FakeTensor) else x


def on_gpu(model: nn.Module) -> nn.Module:
    """The model with fake weights on the GPU that isn't there, in place."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is not None:
                    moved = value.detach().to("cuda", non_blocking=True)
                    table[name] = nn.Parameter(moved, value.requires_grad) if isinstance(value, nn.Parameter) else moved
    return model


def clear_tables():
    """Empty the library's caches: a table on one device, or without numbers, must not serve another test."""
    for name in [name for name in sys.modules if name.startswith("ris_nb.")]:
        for thing in list(vars(sys.modules[name]).values()):
            if hasattr(thing, "cache_clear") and getattr(thing, "__module__", "").startswith("ris_nb."):
                thing.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "a GPU that isn't there")
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda tensor: id(tensor), raising=False)  # for `fingerprint`
    clear_tables()
    yield PretendGPU()
    clear_tables()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The roots of RefShapes: 8 scenes to train on, 12 to answer; also its two other flavours."""
    folder = tmp_path_factory.mktemp("shapes")
    for flavour in ("refshapes", "refshapesg", "refshapes+"):
        make_refshapes(folder, flavour, counts={"train": 8, "val": 12})
    return folder


def of_the_library(waits):
    """The waits that the models themselves don't cause; those are counted in test_fake_gpu.py."""
    models = {path.name for path in (WHERE / "models").iterdir()} - {"base.py"}
    return {line: count for line, count in waits.items() if line.partition(":")[0] not in models}


def test_the_pretended_gpu_counts_what_a_real_one_waits_for(gpu):
    with gpu:
        x = torch.ones(3, 4).to("cuda", non_blocking=True)
        y = x + torch.zeros(4, device="cuda")
        assert y.device.type == "cuda" and not gpu.waits
        reads = (y.cpu, y.tolist, y.sum().item, y.any().__bool__, y.nonzero, lambda: y[y > 0])
        for n, read in enumerate((*reads, lambda: torch.ones(3).to("cuda")), 1):
            read()
            assert gpu.waits.total() == n
        with pytest.raises(RuntimeError, match="same device"):
            y + torch.ones(3, 4)
        assert torch.ones(3).sum().item() == 3  # the CPU has its numbers


@pytest.mark.parametrize("name, resolution", [
    ("lavt_tiny", "model"), ("lavt_tiny", "original"),
    *(pytest.param(f"{name}_tiny", "original", marks=pytest.mark.slow) for name in ("cris", "magnet", "rela", "sag"))])
def test_an_evaluation_waits_once_a_batch(gpu, data, name, resolution):
    model = load_model(name)
    model.resolution = resolution
    referrals = open_data(data, "refshapes").referrals("val")
    dataset = ReferralDataset(referrals, model.tokenizer, model.transform, every=True)
    with gpu:
        on_gpu(model)
        gpu.waits.clear()
        report = evaluate(model, dataset, batch_size=5, pairs=30, progress=False)
    assert report.machine["device"] == "cuda" and report.expressions > 60
    assert sum(of_the_library(gpu.waits).values()) == 3, gpu.waits  # 12 images, 5 at a time


def test_listening_waits_once_a_batch(gpu, data):
    model, shapes = load_model("lavt_tiny"), open_data(data, "refshapes")
    changes = find_changes(shapes.referrals("val"), open_scenes(shapes), 0)
    with gpu:
        on_gpu(model)
        gpu.waits.clear()
        report = listen(model, changes, batch_size=6, progress=False)
    assert len(report.trials) > 100 and sum(of_the_library(gpu.waits).values()) == 2, gpu.waits


def test_answers_to_photos_come_back_together(gpu):
    model, picture = load_model("lavt_tiny"), make_scene(0, split="val", index=0).image
    with gpu:
        on_gpu(model)
        gpu.waits.clear()
        masks = model.predict([picture] * 3, ["the star", "the ring", "the red thing"])
    assert [mask.shape for mask in masks] == [(64, 64)] * 3 and sum(of_the_library(gpu.waits).values()) == 1


STUDIES = [(law, "law_study", "one way out: pooled"), (rivals, "rivals_study", "MaskCLIP"),
           (rivals, "rivals_study", "GroupViT"), (rivals, "rivals_study", "TSEG"), (sag, "sag_study", "SaG"),
           (magnet, "magnet_study", "MagNet"), (magnet, "parts_study", "relations: MagNet")]


@pytest.mark.slow
@pytest.mark.parametrize("module, study, row", STUDIES, ids=[row for *_, row in STUDIES])
def test_a_study_goes_on_after_a_training_on_a_gpu(gpu, data, tmp_path, monkeypatch, module, study, row):

    def trained(model, dataset, config, folder, **options):
        Path(folder).mkdir(parents=True, exist_ok=True)
        on_gpu(model)
        return [{"loss": 0.0}]

    monkeypatch.setattr(module, "fit", trained)
    monkeypatch.setattr(module, "save_weights", lambda *arguments: None, raising=False)  # a fake has no numbers to save
    monkeypatch.setattr(magnet, "masked_word_accuracy", lambda *arguments: {})  # a mask of zeros picks no word
    monkeypatch.setattr(magnet, "PARTS_COUNTS", {"train": 4, "val": 4})
    root = tmp_path / "data" if study in ("law_study", "parts_study") else data
    variants = getattr(module, study)(root, steps=1, **({"scenes": 4} if module is law else {}))
    with gpu:
        figures = variants[row](0, tmp_path / "run")
    assert figures["steps"] == 1


def test_panels_ask_a_model_on_a_gpu(gpu):
    with gpu:
        asked = {name: on_gpu(load_model(name)).eval() for name in ("lavt_tiny", "cris_tiny", "sag_tiny")}
        panel = ask_panel(asked)
        panel["expression"].value = "the red star"
        panel["words"].value = 1
        assert panel.figure() and set(panel.said) == set(asked)
        shattered = ShatterPanel(Viewer(asked["sag_tiny"]))
        for kind in ("random", "query"):
            shattered["kind"].value, shattered["draw"].value = kind, 1
        assert shattered.figure()
        game = fill_panel(on_gpu(shipped_game()))
        game["right"].value = 5
        assert game.figure()
        assert show_answers(asked, make_scene(0, split="val", index=0).image, "the red star")
