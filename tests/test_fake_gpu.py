"""Every model on a GPU that isn't there: no tensor is left on the CPU, and no step makes host and GPU wait for each other.

`FakeTensorMode` computes shapes, types and devices, and no numbers. It refuses by itself what needs a number on the host (`.item()`,
`nonzero`, a boolean index) and operands on two devices; `Watch` refuses the copies between host and device that wait. torch's autograd
engine asks for the driver of a fake GPU, so the backward pass runs on the `meta` device, which has no numbers to wait for either.
"""
from __future__ import annotations

import sys
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ris_nb.models.mask_grounding import TINY_PREDICTOR, Grounded
from ris_nb.registry import _FUNCTION, _MODELS, _look_up, _written, create_model
from ris_nb.testing import toy_batch
from ris_nb.training.compute import compute_output, use_checkpointing
from ris_nb.training.config import TrainConfig
from ris_nb.training.ema import EMA
from ris_nb.training.loop import LossStep, Run, finish_step, take_step
from ris_nb.training.optim import param_groups

TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
VISION = {**TEXT, "num_hidden_layers": 3, "patch_size": 16, "image_size": 64}
CLIP = dict(text_config=TEXT, vision_config=VISION, projection_dim=32)
SMALL = {  # models whose class has no `*_tiny`
    "maskclip": dict(network=CLIP, image_size=64),
    "clipseg": dict(network=dict(CLIP, reduce_dim=16, decoder_num_attention_heads=2, decoder_intermediate_size=32, extract_layers=[0, 1, 2]),
                    image_size=64),
    "groupvit": dict(network=dict(CLIP, projection_intermediate_dim=64, vision_config={
        **VISION, "depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 0]})),
}
TINY = {"lavt_toys": "lavt_tiny", "lavt_swin_base": "lavt_tiny", "magnet_toys": "magnet_tiny", "magnet_swin_base": "magnet_tiny",
        "cris_r50": "cris_tiny", "cris_r101": "cris_tiny", "rela_swin_base": "rela_tiny", "rela_swin_tiny": "rela_tiny",
        "sag_vit_small": "sag_tiny", "sag_vit_small_scripts": "sag_tiny"}  # the same class at other sizes: the tiny one stands for it


def build(name, **settings):
    return create_model(name, **{"vocabulary": "bert-base-uncased", **SMALL.get(name, {}), **settings}).train()


def grounded(name, **settings):
    return Grounded(build(name, **settings), **TINY_PREDICTOR).train()


GAMES = {"lavt_tiny, game": lambda: grounded("lavt_tiny"), "magnet_tiny, game": lambda: build("magnet_tiny").for_training(),
         "rela_tiny, game": lambda: grounded("rela_tiny"),
         "cris_tiny, full sentence": lambda: Grounded(build("cris_tiny"), segment="full", mask_encoder="pooled", **TINY_PREDICTOR).train()}
SAG = {"mirrored": dict(mirrored=True), "drop": dict(false_negatives="drop"), "both": dict(mirrored=True, false_negatives="drop")}
# the library's own names: other tests register models, too
MODELS = {name: lambda name=name: build(name) for name in sorted(_written(_FUNCTION)) if name not in TINY} | GAMES | {
    f"sag_tiny, {name}": lambda loss=loss: build("sag_tiny", **{f"loss.{key}": value for key, value in loss.items()})
    for name, loss in SAG.items()} | {
    "sag_tiny, rows without parts": lambda: build("sag_tiny", **{"slots.discovery": False, "fusion.attention": False, "loss.reconstruction": 0}),
    "magnet_tiny, simple decoder": lambda: build("magnet_tiny", **{"decoder.kind": "simple"}),
    "lavt_tiny, instance norm": lambda: build("lavt_tiny", norm="instance"),
    "maskclip_tiny, smooth": lambda: build("maskclip_tiny", smooth=True)}


def cases(quick, *others):
    """Names as parameters, with each of `others` behind them; those that aren't in `quick` are of the slow tier."""
    return [pytest.param(name, *more, marks=[] if name in quick and more == others[0] else [pytest.mark.slow]) for name in MODELS for more in others]


NAMES = {name for name in MODELS if "," not in name} | {"magnet_tiny, game", "sag_tiny, both"}  # the quick tier has each model once


class Watch(TorchDispatchMode):
    """Refuses, at its line, a copy between host and GPU for which one waits for the other. A number from the CPU may be an operand."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        out = function(*arguments, **options)
        if isinstance(out, torch.Tensor) and not options.get("non_blocking"):
            parts = [part for argument in arguments for part in (argument if isinstance(argument, (list, tuple)) else [argument])]
            copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
            devices = {part.device.type for part in parts if isinstance(part, torch.Tensor) and (part.ndim or copies)}
            if len(devices | {out.device.type}) > 1 and devices:
                raise AssertionError(f"{function} from {' and '.join(devices)} to {out.device.type}: the host waits")
        return out


WAITS = (DataDependentOutputException, DynamicOutputShapeException, AssertionError)


def clear_tables():
    """Empty the caches of the library: a table that was made as a fake, or for a fake device, must not serve another test."""
    for module in [module for name, module in sys.modules.items() if name.startswith("ris_nb.")]:
        for thing in list(vars(module).values()):
            if hasattr(thing, "cache_clear") and thing.__module__ == module.__name__:
                thing.cache_clear()


@pytest.fixture
def gpu():
    """A GPU that has everything but numbers."""
    clear_tables()
    with ExitStack() as stack:
        for thing, name, found in ((torch.cuda.amp.common, "amp_definitely_not_available", False), (torch.cuda, "is_bf16_supported", True)):
            stack.enter_context(patch.object(thing, name, lambda *_, found=found: found))
        stack.enter_context(patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
    clear_tables()


def on_gpu(model):
    """The model with fake parameters on the fake GPU, in place."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is not None:
                    moved = value.detach().to("cuda")
                    table[name] = nn.Parameter(moved, value.requires_grad) if isinstance(value, nn.Parameter) else moved
    return model


def some(name, shared=True):
    """A model in training, and a batch for it on the CPU; `shared`: an image with two sentences, as never in training."""
    model = MODELS[name]()
    batch = toy_batch(getattr(model, "host", model))
    if not shared:
        batch = replace(batch, image=batch.image[[0, 1, 0]], which=None, image_id=[0, 1, 0])
    batch.expression[0] = "the left one"
    vars(getattr(model, "host", model)).pop("transform", None)  # which has tensors, and is made anew where it is needed
    batch.counted = batch.words, batch.longest  # fake tensors have no length to count
    return model, batch


@pytest.mark.parametrize("name, precision", cases(NAMES, ("bf16",), ("no",)))
def test_forward_and_losses(name, precision, request):
    """All on one device and without waiting, once what is made once (tables of positions and windows) is there."""
    model, batch = some(name)
    request.getfixturevalue("gpu")
    model, batch, kinds = on_gpu(model), batch.to("cuda", non_blocking=True), set()
    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(lambda part, arguments, out: kinds.add(out.dtype))
    for watch in (nullcontext(), Watch()):
        with watch:
            losses = model.losses(compute_output(model, batch, precision), batch)
    assert losses and all(value.device.type == "cuda" and value.shape == () for value in losses.values())
    assert (torch.bfloat16 if precision == "bf16" else torch.float32) in kinds  # autocast was on


@pytest.mark.parametrize("name, checkpointing", cases(NAMES, (True,), (False,)))
def test_backward(name, checkpointing):
    model, batch = some(name)
    if checkpointing:
        try:
            use_checkpointing(model)
        except ValueError as refusal:
            assert "offers none" in str(refusal)
            return
    clear_tables()
    model, batch = model.to("meta"), batch.to("meta")
    nothing = patch.object(torch, "autocast", lambda *_, **__: nullcontext()), patch.object(torch, "is_autocast_enabled", lambda *_: False)
    with nothing[0], nothing[1]:  # the meta device has no autocast
        for watch in (nullcontext(), Watch()):
            with watch:
                sum(model.losses(model(batch), batch).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    clear_tables()


def a_run(model, precision):
    """A run on the fake GPU, as `fit` makes it, on one process and without a folder."""
    config = TrainConfig(steps=100, batch_size=3, log_every=50, save_every=100, clip=1.0, warmup=0, precision=precision, ema=0.9)
    accelerator = SimpleNamespace(device=torch.device("cuda"), process_index=0, is_main_process=True, reduce=lambda x, _: x, gather=lambda x: x)
    optimizer = torch.optim.AdamW(param_groups(model, 0.01), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    return Run(Path("nowhere"), config, accelerator, model, optimizer, 3, scaler, EMA(model, 0.9)), LossStep(model, precision)


def invent_gradients(model):
    """In place of `loss.backward()`, which asks for the driver."""
    def backward(loss, *_, **__):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
    return patch.object(torch.Tensor, "backward", backward)


@pytest.mark.parametrize("name, precision", [*cases({"magnet_tiny, game", "sag_tiny, both", "tseg_tiny"}, ("no",)), ("lavt_tiny", "fp16")])
def test_step(name, precision, request):
    """A step of the loop, with clipping, the average of the weights and what is logged of it, waits for nothing until a log line is due."""
    model, batch = some(name, shared=False)
    request.getfixturevalue("gpu")
    run, loss_step = a_run(on_gpu(model), precision)
    batches, bar = iter([batch] * 3), SimpleNamespace(update=lambda: None)
    with invent_gradients(model):
        for watch in (nullcontext(), Watch()):
            with watch:
                finish_step(run, take_step(run, loss_step, batches), None, bar)
        run.step = 49
        with pytest.raises(WAITS), Watch():  # here one is due: the watch sees it
            finish_step(run, take_step(run, loss_step, batches), None, bar)


@pytest.mark.parametrize("careless", [
    lambda x: x.sum().item(), lambda x: bool((x > 0).any()), lambda x: x.tolist(), lambda x: x.nonzero(), lambda x: x[x > 0],
    lambda x: x.masked_select(x > 0), lambda x: x.unique(), lambda x: x.new_tensor([1.0]), lambda x: torch.tensor([1.0], device="cuda"),
    lambda x: torch.tensor(1.0, device="cuda"), lambda x: torch.tensor(1.0).to("cuda"), lambda x: x[[0, 1]], lambda x: x[torch.arange(2)],
    lambda x: x.cpu(), lambda x: torch.zeros(3, 4).copy_(x), lambda x: torch.zeros(3).to("cuda"), lambda x: x.sum().cpu()])
def test_watch(gpu, careless):
    x = torch.ones(3, 4, device="cuda")
    with pytest.raises(WAITS), Watch():
        careless(x)


def test_watch_lets_pass(gpu):
    x = torch.ones(3, 4, device="cuda")
    with Watch():
        x = x * torch.tensor(2.0) + x.new_full((4,), 3) + torch.arange(4, device="cuda")
        x[torch.arange(3, device="cuda")].masked_fill(x > 0, 1.0).sum()
        torch.zeros(3).pin_memory().to("cuda", non_blocking=True)
    with pytest.raises(Exception, match="two devices"):
        x + torch.ones(3, 4)


def test_all_models():
    """Each name is here, or has the class of one that is."""
    assert set(MODELS) >= set(_written(_FUNCTION)) - set(TINY)
    for large, tiny in TINY.items():
        kinds = [_look_up(name, _MODELS, _FUNCTION).__annotations__["return"] for name in (large, tiny)]
        assert kinds[0] == kinds[1], (large, tiny)
