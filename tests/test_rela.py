"""ReLA: the same numbers as the released network, losses and gradients included; its quirks; and clear errors."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.utils import convert_to_fp32
from parity import find_case, load_case, make_inputs, released_state

from ris_nb.contract import Batch, RISError
from ris_nb.data.tokenizer import SPECIAL
from ris_nb.encoders.pretraining import pretrained_namer
from ris_nb.models.rela import ReLA, minimap_target
from ris_nb.registry import create_model, list_models, load_model
from ris_nb.settings import nested

VOCABULARY = [*SPECIAL, "the", "red", "ball", "left"]


@pytest.fixture(scope="module")
def case():
    return load_case("rela_tiny")


@pytest.fixture(scope="module")
def state(case):
    return released_state(case)


def label(spec):
    """The label that the reference's loss was computed with."""
    S = spec["img"]
    mask = torch.zeros(spec["batch"], S, S, dtype=torch.bool)
    for i, empty in enumerate(spec["empty"]):
        if not empty:
            mask[i, S // 8 + 4 * i:S // 2 + 4 * i, S // 6:S - S // 5 - 6 * i] = True
    return mask


def computed(model, batch, full):
    """Everything that the reference stores, as our model computes it, cut as the reference was cut; and the output."""
    caught = []
    hook = model.encoder.register_forward_hook(lambda module, args, output: caught.extend(output))
    output = model(batch)
    hook.remove()
    thin = (lambda s: s[..., ::8, ::8] if s.shape[-1] > 30 else s[..., ::3, ::3]) if full else lambda s: s
    maps = {f"res{k + 2}": thin(m.permute(0, 3, 1, 2)) for k, m in enumerate(caught)}
    step = 8 if full else 4
    whole = torch.nn.functional.interpolate(output.extra["logits"], batch.image.shape[-2:], mode="bilinear", align_corners=False)
    return output, {**maps, "lang": output.word_features.mT[:, ::4 if full else 1], "mask_features": output.pixel_features[..., ::step, ::step],
                    "pred_masks": output.extra["logits"], "minimap": output.extra["minimap"], "nt_label": output.extra["no_target"],
                    "all_masks": model.region_masks(output)[:, ::10, ::4 if full else 2, ::4 if full else 2],
                    "prob": whole.sigmoid()[..., ::8, ::8]}


def assert_parity(case, model, full=False):
    image, ids, words = make_inputs(case)
    batch = Batch(image, ids, words, mask=label(case.spec))
    output, ours = computed(model, batch, full)
    assert set(ours) == set(case.arrays) - {"image", "ids", "mask"}
    for name, value in ours.items():
        assert value.shape == case[name].shape, name
        # a probability is steepest at one half, where a score's rounding, a millionth of some 900, moves it by a quarter of that
        within = 1e-4 * case[name].abs().max() if name != "prob" else 1e-5 * case["pred_masks"].abs().max() / 4
        assert (value - case[name]).abs().max() < within, name
    loss = sum(model.losses(output, batch).values())
    assert loss.item() == pytest.approx(case.spec["loss"], rel=1e-4)
    loss.backward()
    ours = gradient_norms(model, case.spec["keys"])
    assert set(ours) == set(case.spec["grad_norms"])
    largest = max(ours.values())
    wrong = {key: (norm, ours[key]) for key, norm in case.spec["grad_norms"].items() if ours[key] != pytest.approx(norm, rel=1e-3, abs=1e-6 * largest)}
    assert not wrong


def gradient_norms(model, keys):
    from ris_nb.models.released_rela import released_rela_key
    own = dict(model.named_parameters())
    return {key: own[name].grad.norm().item() for key in keys if (name := released_rela_key(key)) in own}


def test_tiny_parity(case, state):
    model = ReLA.from_released(state, bert_heads=12, decoder_heads=4)
    assert sum(p.numel() for p in model.parameters()) == case.spec["parameters"]
    assert_parity(case, model)


@pytest.mark.slow
@pytest.mark.skipif(find_case("rela_swin_base") is None, reason="the 480-pixel reference does not ship with the repository")
@pytest.mark.timeout(600)
def test_full_parity():
    case = load_case("rela_swin_base")
    model = ReLA.from_released(released_state(case))
    assert sum(p.numel() for p in model.parameters()) == case.spec["parameters"] == 225_521_469
    assert_parity(case, model, full=True)
