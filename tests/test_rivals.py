"""SaG's rivals and the models of transformers: numbers against transformers' own modules, corner cases, saving, and errors in one line."""
from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from tokenizers import Tokenizer as FastTokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPSegConfig, CLIPSegForImageSegmentation, GroupViTConfig, GroupViTModel
from transformers.models.groupvit.modeling_groupvit import get_grouping_from_attentions

from ris_nb.contract import Batch, Output, RISError
from ris_nb.data.batches import make_batch
from ris_nb.data.tokenizer import Tokenizer, build_vocabulary
from ris_nb.models.rivals import (GroupingBlock, GroupViT, MaskCLIP, TSEG, attend_to_itself, masks_above, pair_loss)
from ris_nb.registry import create_model, load_model
from ris_nb.testing import check_model

WORDS = build_vocabulary(["the red ring", "the blue star left of it"], 60)
RIVALS = ("maskclip_tiny", "groupvit_tiny", "tseg_tiny")
TEXT = dict(vocab_size=90, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=77,
            bos_token_id=0, eos_token_id=1, pad_token_id=1)
VISION = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8)
SMALL = {  # preset -> network and config of test size
    "maskclip": (CLIPModel, CLIPConfig, dict(text_config=TEXT, vision_config=VISION, projection_dim=12)),
    "groupvit": (GroupViTModel, GroupViTConfig, dict(
        text_config=TEXT, projection_dim=12, projection_intermediate_dim=20,
        vision_config=dict(VISION, intermediate_size=96, num_hidden_layers=4, depths=[2, 1, 1], num_group_tokens=[6, 3, 0], num_output_groups=[6, 3, 0]))),
    "clipseg": (CLIPSegForImageSegmentation, CLIPSegConfig, dict(
        text_config=TEXT, vision_config=VISION, projection_dim=12, extract_layers=[0, 1, 2], reduce_dim=8, decoder_num_attention_heads=2,
        decoder_intermediate_size=16)),
}


def stir(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random numbers for every parameter: what transformers starts at zero or one would hide a mistake."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


def small_tokenizer(file) -> None:
    """A tokenizer in CLIP's manner: byte pairs, the end of a text for padding and for the unknown."""
    core = FastTokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    core.train_from_iterator(["the red ring left of the blue star"] * 4, trainers.BpeTrainer(
        vocab_size=90, special_tokens=["<|startoftext|>", "<|endoftext|>"], end_of_word_suffix="</w>", show_progress=False))
    core.post_processor = processors.TemplateProcessing(single="<|startoftext|> $A <|endoftext|>",
                                                        special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)])
    core.save(str(file))


def small_network(name: str, folder) -> nn.Module:
    """A network of transformers with random weights, saved with its tokenizer as a repository on the Hub has them."""
    kind, config, sizes = SMALL[name]
    torch.manual_seed(0)
    network = stir(kind(config(**sizes)))
    network.save_pretrained(folder)
    small_tokenizer(folder / "tokenizer.json")
    return network


def one_line(call) -> str:
    with pytest.raises(RISError) as caught:
        call()
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)


# --- the course's rivals ---

@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("pretrained", (False, True))
def test_contract(name, pretrained):
    check_model(create_model(name, pretrained=pretrained, vocabulary=WORDS))


@pytest.mark.parametrize("name", RIVALS)
def test_a_sentence_is_answered_as_if_alone(name):
    """Whoever else is asked about, and whatever other images are there."""
    model = stir(create_model(name, vocabulary=WORDS))
    photos = [np.random.default_rng(i).integers(0, 255, (64, 64, 3)).astype(np.uint8) for i in range(2)]
    alone = model.predict(photos[:1], ["the red ring"])[0]
    among = model.predict([photos[1], photos[0], photos[0]], ["the blue star", "the red ring", "the blue ring"])[1]
    assert (alone == among).all()


@pytest.mark.parametrize("name", RIVALS)
def test_no_mask_is_needed_and_all_but_the_frozen_learns(name):
    torch.manual_seed(0)
    model = create_model(name, pretrained=True, vocabulary=WORDS).train()
    ids, words = model.tokenizer(["the red ring", "the blue star", "the red star"])
    batch = Batch(torch.randn(2, 3, 64, 64), ids, words, torch.tensor([0, 1, 0]))
    sum(model.losses(model(batch), batch).values()).backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert all(name.startswith("vision.") or "position" in name or "word_emb" in name or "attention.self.key.bias" in name or name.endswith("key.bias")
               for name in still), still


def test_pair_loss():
    torch.manual_seed(0)
    image, text = torch.randn(4, 6), torch.randn(4, 6)
    s = 3 * F.normalize(text, dim=1) @ F.normalize(image, dim=1).T
    expected = (F.cross_entropy(s, torch.arange(4)) + F.cross_entropy(s.T, torch.arange(4))) / 2
    torch.testing.assert_close(pair_loss(image, text, scale=3.0), expected)
    torch.testing.assert_close(pair_loss(torch.ones(4, 6), torch.ones(4, 6)), torch.tensor(math.log(4)))
    double = pair_loss(image[:2], text, torch.tensor([0, 1, 0, 1]), 3.0)  # two sentences an image: either will do
    one, two = s[:, 0].softmax(0), s[:, 1].softmax(0)
    to_text = -(torch.log(one[0] + one[2]) + torch.log(two[1] + two[3])) / 2
    torch.testing.assert_close(double, (F.cross_entropy(s[:, :2], torch.tensor([0, 1, 0, 1])) + to_text) / 2)


def test_threshold_moves_masks():
    score = torch.linspace(-1, 1, 16).view(1, 4, 4)
    for model, low, high in ((create_model("groupvit_tiny", vocabulary=WORDS), 0.1, 0.9), (create_model("tseg_tiny", vocabulary=WORDS), 0.3, 0.7),
                             (create_model("maskclip_tiny", vocabulary=WORDS), 0.1, 0.9)):
        sizes = [model.masks(Output(score), [(9, 7)], threshold)[0].sum() for threshold in (low, None, high)]
        assert sizes[0] > sizes[1] > sizes[2] and (model.masks(Output(score), [(9, 7)], 0.5)[0] == model.masks(Output(score), [(9, 7)])[0]).all()
    assert not masks_above(torch.full((1, 2, 2), -1.0), [(5, 5)], 0.0)[0].any()


def test_wrong_settings():
    assert "pool must be cls or mean" in one_line(lambda: create_model("maskclip_tiny", vocabulary=WORDS, pool="max"))
    assert "temperature must be greater" in one_line(lambda: create_model("tseg_tiny", vocabulary=WORDS, temperature=0))
    assert "groups has no setting 'layers'" in one_line(lambda: create_model("groupvit_tiny", vocabulary=WORDS, groups=dict(layers=3)))


# --- numbers, against transformers ---

def to_ours(linear: dict[str, nn.Linear], attention: nn.MultiheadAttention) -> None:
    attention.in_proj_weight.data = torch.cat([linear[name].weight for name in "qkv"])
    attention.in_proj_bias.data = torch.cat([linear[name].bias for name in "qkv"])


def copy_grouping(ours: GroupingBlock, theirs: nn.Module) -> None:
    pairs = [(ours.token_norm, theirs.norm_tokens), (ours.patch_norm, theirs.norm_x), (ours.mix.mlp, theirs.mlp_inter),
             (ours.mix_norm, theirs.norm_post_tokens), (ours.read_norm, theirs.pre_assign_attn.norm2), (ours.read_mlp, theirs.pre_assign_attn.mlp),
             (ours.group_norm, theirs.pre_assign_attn.norm_post), (ours.query, theirs.assign.q_proj), (ours.key, theirs.assign.k_proj),
             (ours.value, theirs.assign.v_proj), (ours.out, theirs.assign.proj), (ours.out_norm, theirs.norm_new_x), (ours.out_mlp, theirs.mlp_channels),
             (ours.read.out_proj, theirs.pre_assign_attn.attn.out_proj)]
    for mine, other in pairs:
        mine.load_state_dict(other.state_dict())
    attention = theirs.pre_assign_attn.attn
    to_ours({name: getattr(attention, f"{name}_proj") for name in "qkv"}, ours.read)


def copy_block(ours: Block, theirs: nn.Module) -> None:
    for mine, other in ((ours.norm1, theirs.layer_norm1), (ours.norm2, theirs.layer_norm2), (ours.mlp, theirs.mlp),
                        (ours.attn.proj, theirs.self_attn.out_proj)):
        mine.load_state_dict(other.state_dict())
    ours.attn.qkv.weight.data = torch.cat([getattr(theirs.self_attn, f"{name}_proj").weight for name in "qkv"])
    ours.attn.qkv.bias.data = torch.cat([getattr(theirs.self_attn, f"{name}_proj").bias for name in "qkv"])


def test_grouping_is_transformers():
    """All stages of GroupViT's encoder with the same random weights: segments, and the product of the assignments."""
    _, config, sizes = SMALL["groupvit"]
    theirs = stir(GroupViTModel(config(**sizes))).vision_model
    model = GroupViT(32, WORDS, vision=dict(width=24, depth=0, heads=2, patch=8, image_size=32, drop_path=0.0), text=dict(width=8, layers=1, heads=1, ffn=8),
                     width=12, groups=dict(tokens=[6, 3], depths=[2, 1, 1], heads=2)).eval()
    for i, stage in enumerate(theirs.encoder.stages):
        for ours, layer in zip(model.layers[i], stage.layers, strict=True):
            copy_block(ours, layer)
        if i < 2:
            model.tokens[i].data = stage.group_token.data
            copy_grouping(model.grouping[i], stage.downsample)
    model.carry[0][0].load_state_dict(theirs.encoder.stages[1].group_projector[0].state_dict())
    model.carry[0][1].mlp.load_state_dict(theirs.encoder.stages[1].group_projector[1].state_dict())
    model.norm.load_state_dict(theirs.layernorm.state_dict())
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = theirs(image, output_attentions=True)
        segments, belongs = model.group(theirs.embeddings(image))
        torch.testing.assert_close(segments, found.last_hidden_state, atol=1e-5, rtol=1e-5)
        maps = get_grouping_from_attentions(found.attentions, (32, 32))
    torch.testing.assert_close(F.interpolate(belongs.unflatten(2, (4, 4)), size=(32, 32), mode="bilinear"), maps, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(belongs.sum(1), torch.ones(2, 16))


def test_shares_are_hard():
    torch.manual_seed(0)
    block = stir(GroupingBlock(16, 5, 4, 2))
    x, tokens = torch.randn(2, 9, 16), torch.randn(2, 5, 16)
    logits = torch.randn(2, 4, 9)
    A = logits.softmax(1)
    assert torch.equal(block.shares(logits, A).argmax(1), A.argmax(1)) and set(block.shares(logits, A).unique().tolist()) == {0.0, 1.0}
    block.train()
    share = block.shares(logits.requires_grad_(), A)
    torch.testing.assert_close(share.sum(1), torch.ones(2, 9))
    assert torch.allclose(share.max(1).values, torch.ones(2, 9), atol=1e-6)  # hard, up to rounding
    (share * torch.randn_like(share)).sum().backward()
    assert logits.grad.abs().sum() > 0  # straight through
    assert block(x, tokens)[1].shape == (2, 4, 9)


def test_identity_attention_is_clip_with_a_mask():
    """In transformers' CLIP block, a mask under which each patch sees itself alone gives what `attend_to_itself` computes."""
    _, config, sizes = SMALL["maskclip"]
    layer = stir(CLIPModel(config(**{**sizes, "vision_config": dict(VISION, hidden_act="gelu")}))).vision_model.encoder.layers[-1]
    block = Block(24, 2, mlp_ratio=2, qkv_bias=True, norm_layer=nn.LayerNorm).eval()
    copy_block(block, layer)
    x = torch.randn(2, 17, 24)
    alone = torch.full((1, 1, 17, 17), float("-inf")).masked_fill(torch.eye(17).bool(), 0.0)
    with torch.no_grad():
        expected = layer(x, alone)
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(attend_to_itself(block, x)[0], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(attend_to_itself(block, x)[1], layer.self_attn.k_proj(layer.layer_norm1(x)), atol=1e-5, rtol=1e-5)


# --- the networks of transformers ---

@pytest.mark.parametrize("name", SMALL)
def test_ready_models_keep_the_contract(name, tmp_path):
    small_network(name, tmp_path)
    model = create_model(name, pretrained=True, source=str(tmp_path), image_size=32)
    check_model(model)
    model.save_pretrained(tmp_path / "saved")
    again, photo = load_model(tmp_path / "saved"), np.random.default_rng(0).integers(0, 255, (40, 50, 3)).astype(np.uint8)
    assert (model.predict([photo], ["the red ring"])[0] == again.predict([photo], ["the red ring"])[0]).all()


def ask(model, texts: list[str]) -> Batch:
    ids, words = model.tokenizer(texts)
    return Batch(torch.randn(2, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(3)), ids, words, torch.tensor([1, 0, 1]))


TEXTS = ["the red ring", "the blue star left of the red ring", "star"]


@torch.no_grad()
def test_clipseg_is_transformers(tmp_path):
    network = small_network("clipseg", tmp_path)
    for size in (32, 48):  # also one that its positions must be interpolated for
        model = create_model("clipseg", pretrained=True, source=str(tmp_path), image_size=size)
        batch = ask(model, TEXTS)
        theirs = network(input_ids=batch.ids, pixel_values=batch.image[batch.which], attention_mask=batch.words.long()).logits
        torch.testing.assert_close(model(batch).score, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_groupvit_is_transformers(tmp_path):
    network = small_network("groupvit", tmp_path)
    model = create_model("groupvit", pretrained=True, source=str(tmp_path), image_size=32)
    batch = ask(model, TEXTS)
    out = model(batch)
    theirs = network(input_ids=batch.ids, pixel_values=batch.image, attention_mask=batch.words.long(), output_segmentation=True)
    ours = F.normalize(out.extra["segments"], dim=-1) @ out.extra["text"].T  # (N, G, B)
    maps = F.interpolate(out.extra["belongs"].unflatten(2, (4, 4)), size=(32, 32), mode="bilinear")
    scale = network.logit_scale.exp()
    torch.testing.assert_close(torch.einsum("ngb,nghw->nbhw", ours, maps) * scale**2, theirs.segmentation_logits, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_maskclip_is_clip_with_a_mask(tmp_path):
    network = small_network("maskclip", tmp_path)
    model = create_model("maskclip", pretrained=True, source=str(tmp_path), image_size=32)
    batch = ask(model, TEXTS)
    out = model(batch)
    theirs = network(input_ids=batch.ids, pixel_values=batch.image, attention_mask=batch.words.long())
    torch.testing.assert_close(F.normalize(out.extra["image"], dim=-1), theirs.image_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.extra["text"], theirs.text_embeds, atol=1e-5, rtol=1e-5)
    vision, alone = network.vision_model, torch.full((1, 1, 17, 17), float("-inf")).masked_fill(torch.eye(17).bool(), 0.0)
    x = vision(pixel_values=batch.image, output_hidden_states=True).hidden_states[-2]
    x = vision.encoder.layers[-1](x, alone)
    x = x[0] if isinstance(x, tuple) else x
    dense = F.normalize(network.visual_projection(vision.post_layernorm(x[:, 1:])), dim=-1)
    expected = torch.einsum("bpd,bd->bp", dense[batch.which], theirs.text_embeds)
    torch.testing.assert_close(out.score.flatten(1), expected, atol=1e-5, rtol=1e-5)
    assert model(ask(create_model("maskclip", pretrained=True, source=str(tmp_path), image_size=48), TEXTS)).score.shape == (3, 6, 6)


def test_a_cut_sentence_keeps_its_end(tmp_path):
    small_network("maskclip", tmp_path)
    model = create_model("maskclip", pretrained=True, source=str(tmp_path), image_size=32, max_words=5)
    batch = ask(model, ["the blue star left of the red ring"] * 3)
    assert batch.ids[0, -1] != model.end
    kept = Batch(batch.image, batch.ids.clone(), batch.words, batch.which)
    kept.ids[:, -1] = model.end
    torch.testing.assert_close(model(batch).score, model(kept).score)


def test_the_end_of_a_text_is_no_unknown_word(tmp_path):
    small_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", 77)
    assert tokenizer.unknown("the red ring") == [] and tokenizer.unknown("the red öäü") != []


def test_ready_models_name_what_is_wrong(tmp_path, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    small_network("clipseg", tmp_path)
    assert "type clipseg: PretrainedMaskCLIP needs one of type clip" in one_line(lambda: create_model("maskclip", pretrained=True, source=str(tmp_path)))
    for name in SMALL:
        told = one_line(lambda: create_model(name, pretrained=True))
        assert "can't be fetched from the Hugging Face Hub" in told and "go online once" in told


def test_maskclip_reads_values_and_ordinary_outputs():
    model = stir(create_model("maskclip_tiny", vocabulary=WORDS))
    assert isinstance(model, MaskCLIP)
    batch = Batch(torch.randn(1, 3, 64, 64), *model.tokenizer(["the red ring"]))
    maps = {}
    for name, attributes in {"values": {}, "ordinary": {"values": False}, "smooth": {"smooth": True}}.items():
        model.values, model.smooth = attributes.get("values", True), attributes.get("smooth", False)
        maps[name] = model(batch).score
    image, text = model(batch).extra["image"], model(batch).extra["text"]
    assert not torch.allclose(maps["values"], maps["ordinary"]) and not torch.allclose(maps["values"], maps["smooth"])
    whole = model.project(model.vision(batch.image))[:, 1:]
    torch.testing.assert_close(image, whole.mean(1))  # what is learned is the ordinary network's
    torch.testing.assert_close(maps["ordinary"].flatten(1), (F.normalize(whole, dim=-1) @ text[..., None])[..., 0])


def test_tseg_pools_by_assignment():
    model = create_model("tseg_tiny", vocabulary=WORDS)
    assert isinstance(model, TSEG)
    torch.manual_seed(0)
    patches, text = F.normalize(torch.randn(2, 5, 64), dim=-1), F.normalize(torch.randn(3, 64), dim=-1)
    ground = F.normalize(model.background, dim=0)
    for compete in (True, False):
        model.compete = compete
        found = model.pooled(patches, text)
        for n in range(2):
            for b in range(3):
                S = [[(model.scale * p @ t).item() for t in text] for p in patches[n]]
                G = [(model.scale * p @ ground).item() for p in patches[n]]
                A = [math.exp(s[b]) / (math.exp(g) + (sum(map(math.exp, s)) if compete else math.exp(s[b]))) for s, g in zip(S, G)]
                expected = sum(a * s[b] for a, s in zip(A, S)) / (sum(A) + 1e-6)
                assert found[n, b].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["maskclip_tiny", "groupvit_tiny", "tseg_tiny"])
def test_a_convolutional_encoder_serves_all_three(name):
    """With an encoder that has no attention MaskCLIP puts one block behind it; everything but the encoder learns."""
    torch.manual_seed(0)
    model = create_model(name, vocabulary=WORDS, image_size=32, vision={"conv": 32, "depth": 1}, freeze=["vision"]).for_training()
    batch = make_batch([np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 200, np.uint8)], ["the red one", "the blue one"], model.tokenizer, model.transform)
    output = model(batch)
    assert output.score.shape == (2, 8, 8)
    sum(model.losses(output, batch).values()).backward()
    learned = {key.partition(".")[0] for key, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert "vision" not in learned and {"text", "sentence", "project"} <= learned and ("last" in learned) == (name == "maskclip_tiny")


def test_a_groupvit_of_version_0_2_is_read(tmp_path):
    model = create_model("groupvit_tiny", vocabulary=WORDS)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["groups"]["soft"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(load_model(tmp_path).project.weight, model.project.weight)
