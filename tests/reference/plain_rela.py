"""ReLA's released arithmetic, written out once more as plainly as it goes, for comparison with `ris_nb.models.rela`.

`plain_rela` reads a released state dict directly: no modules, no caches, no fused attention; Swin, BERT and deformable attention
are those of `plain_magnet`. Every mask is made at full size and then reduced, as in the released network.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from plain_magnet import (attention, bert_embed, bert_layer, conv1d, conv2d, count, deformable_attention, layer_norm, linear, merge,
                          sine_positions, swin_stage)
from torch import Tensor

POINTS = 4  # places that deformable attention reads on each map, as released


def fusion(state, name, x, l, m):
    """LAVT's: pixels (B, P, D) ask words (B, L, E), m (B, 1, L) is 1 for words: (B, P, D)."""
    x, l = x.permute(0, 2, 1), l.permute(0, 2, 1)
    att = f"{name}.image_lang_att"
    q = F.instance_norm(conv1d(state, f"{att}.f_query.0", x))  # (B, D, P)
    k, v = conv1d(state, f"{att}.f_key.0", l) * m, conv1d(state, f"{att}.f_value.0", l) * m
    scores = q.shape[1] ** -0.5 * (q.permute(0, 2, 1) @ k) + (1e4 * m - 1e4)
    t = F.instance_norm(conv1d(state, f"{att}.W.0", (scores.softmax(-1) @ v.permute(0, 2, 1)).permute(0, 2, 1)))
    v = F.gelu(conv1d(state, f"{name}.vis_project.0", x))
    return F.gelu(conv1d(state, f"{name}.project_mm.0", v * t)).permute(0, 2, 1)


def group_norm(state, name, x, groups):
    return F.group_norm(x, groups, state[f"{name}.weight"], state[f"{name}.bias"])


def pixel_decoder(state, maps, groups):
    """Maps (B, C_k, H_k, W_k), finest first -> mask features (B, D, H_0, W_0) and the other maps, coarsest first."""
    name, sources, positions, references = "sem_seg_head.pixel_decoder", [], [], []
    shapes = [m.shape[-2:] for m in reversed(maps[1:])]
    for i, (s, (H, W)) in enumerate(zip(reversed(maps[1:]), shapes)):
        s = group_norm(state, f"{name}.input_proj.{i}.1", conv2d(state, f"{name}.input_proj.{i}.0", s), groups)
        sources.append(s.flatten(2).transpose(1, 2))
        level = state[f"{name}.transformer.level_embed"][i]
        positions.append(sine_positions(len(s), H, W, s.shape[1]).flatten(2).transpose(1, 2) + level)
        y, z = torch.meshgrid((torch.arange(H) + 0.5) / H, (torch.arange(W) + 0.5) / W, indexing="ij")
        references.append(torch.stack([z.flatten(), y.flatten()], -1))
    x, positions, references = torch.cat(sources, 1), torch.cat(positions, 1), torch.cat(references)
    for i in range(count(state, name + ".transformer.encoder.layers.{}.norm1.weight")):
        layer = f"{name}.transformer.encoder.layers.{i}"
        heads = len(state[f"{layer}.self_attn.sampling_offsets.bias"]) // (2 * POINTS * len(shapes))
        x = layer_norm(state, f"{layer}.norm1", x + deformable_attention(state, f"{layer}.self_attn", x + positions, references, x, shapes, heads))
        y = linear(state, f"{layer}.linear2", F.relu(linear(state, f"{layer}.linear1", x)))
        x = layer_norm(state, f"{layer}.norm2", x + y)
    levels = [part.transpose(1, 2).view(len(x), -1, H, W) for part, (H, W) in zip(x.split([H * W for H, W in shapes], 1), shapes)]
    fine = group_norm(state, f"{name}.adapter_1.norm", conv2d(state, f"{name}.adapter_1", maps[0]), groups)
    fine = fine + F.interpolate(levels[-1], size=fine.shape[-2:], mode="bilinear", align_corners=False)
    fine = F.conv2d(fine, state[f"{name}.layer_1.weight"], padding=1)
    return conv2d(state, f"{name}.mask_features", F.relu(group_norm(state, f"{name}.layer_1.norm", fine, groups))), levels


def region_decoder(state, levels, features, l, heads, language_weight):
    """Levels (B, D, H, W), coarsest first, features (B, D, h, w), words l (B, L, E) -> logits (B, 2, h, w), minimap, no-target, region masks."""
    name = "sem_seg_head.predictor"
    B = len(features)
    sources = [(s.flatten(2) + state[f"{name}.level_embed.weight"][i][None, :, None]).transpose(1, 2) for i, s in enumerate(levels)]
    positions = [sine_positions(B, *s.shape[-2:], s.shape[1]).flatten(2).transpose(1, 2) for s in levels]
    words = linear(state, f"{name}.lang_proj", l)
    place = state[f"{name}.query_embed.weight"].expand(B, -1, -1)
    x = state[f"{name}.query_feat.weight"].expand(B, -1, -1)

    def mlp(part, y, depth):
        for j in range(depth):
            y = linear(state, f"{name}.{part}.layers.{j}", F.relu(y) if j else y)
        return y

    def region_masks(x):
        r = layer_norm(state, f"{name}.decoder_norm", x)
        e = mlp("mask_embed", r, 3)
        return r, e, torch.einsum("brd,bdhw->brhw", e, features)

    for i in range(count(state, name + ".transformer_ffn_layers.{}.norm.weight")):
        k = i % len(levels)
        small = F.interpolate(region_masks(x)[2], size=levels[k].shape[-2:], mode="bilinear", align_corners=False)
        blocked = (small.sigmoid() < 0.5).flatten(2)  # (B, R, HW)
        blocked = blocked & ~blocked.all(-1, keepdim=True)
        y = attention(state, f"{name}.RIA_layers.{i}.multihead_attn", x + place, sources[k] + positions[k], sources[k], heads, blocked)
        x = layer_norm(state, f"{name}.RIA_layers.{i}.norm", x + y)
        if i == 0:
            y = attention(state, f"{name}.RLA_lang_att.multihead_attn", x, words, words, heads)
            x = x + 0.1 * torch.tensor(language_weight).sigmoid() * layer_norm(state, f"{name}.RLA_lang_att.norm", x + y)
        y = attention(state, f"{name}.RLA_vision.{i}.self_attn", x + place, x + place, x, heads)
        x = layer_norm(state, f"{name}.RLA_vision.{i}.norm", x + y)
        layer = f"{name}.transformer_ffn_layers.{i}"
        y = linear(state, f"{layer}.linear2", F.relu(linear(state, f"{layer}.linear1", x)))
        x = layer_norm(state, f"{layer}.norm", x + y)

    r, e, masks = region_masks(x)
    minimap = linear(state, f"{name}.minimap_embed", r)  # (B, R, 2)
    answer = sum(minimap[:, j, :, None] * e[:, j, None] for j in range(r.shape[1]))  # (B, 2, D), one region after the other
    return torch.einsum("bad,bdhw->bahw", answer, features), minimap, mlp("nt_embed", r, 2).mean(1), masks


def plain_rela(state: dict[str, Tensor], heads: int, bert_heads: int, image: Tensor, ids: Tensor, words: Tensor, groups: int = 32,
               language_weight: float = 0.0) -> dict[str, Tensor]:
    """What the released ReLA computes in evaluation mode, under the names of the references in `parity`, all cells of it.

    `state`: a released state dict; heads of the regions and of BERT and the groups of the group norms leave no trace in it.
    language_weight: 0, because the released network never loads its `lang_weight`, whatever the state dict says.
    image (B, 3, S, S), ids (B, L) int64, words (B, L) bool. Returns lang, res2.., mask_features, pred_masks, minimap, nt_label, all_masks, prob.
    """
    m = words.to(image.dtype)
    text = {key.replace("text_encoder.", "language_model.", 1): value for key, value in state.items()}
    l = bert_embed(text, ids)
    for i in range(count(state, "text_encoder.encoder.layer.{}.output.dense.weight")):
        l = bert_layer(text, f"language_model.encoder.layer.{i}", l, ((1 - m) * -10000.0)[:, None, None], bert_heads)
    size, patch = image.shape[-2:], state["backbone.patch_embed.proj.weight"].shape[-1]
    image = F.pad(image, (0, -size[1] % patch, 0, -size[0] % patch))
    x = conv2d(state, "backbone.patch_embed.proj", image, stride=patch)
    H, W = x.shape[-2:]
    x, maps = layer_norm(state, "backbone.patch_embed.norm", x.flatten(2).transpose(1, 2)), []
    for k in range(count(state, "backbone.norm{}.weight")):
        name = f"backbone.layers.{k}"
        x = swin_stage(state, name, x, H, W)
        f = fusion(state, f"{name}.fusion", x, l, m[:, None])
        maps.append(layer_norm(state, f"backbone.norm{k}", f).permute(0, 2, 1).view(len(x), -1, H, W))
        if f"{name}.downsample.reduction.weight" in state:
            gate = torch.tanh(linear(state, f"{name}.res_gate.2", F.relu(linear(state, f"{name}.res_gate.0", f))))
            x, H, W = merge(state, f"{name}.downsample", x + gate * f, H, W)
    features, levels = pixel_decoder(state, maps, groups)
    logits, minimap, no_target, masks = region_decoder(state, levels, features, l, heads, language_weight)
    found = {f"res{k + 2}": m for k, m in enumerate(maps)} | {"lang": l.mT, "mask_features": features, "pred_masks": logits, "minimap": minimap}
    prob = F.interpolate(logits, size=size, mode="bilinear", align_corners=False).sigmoid()
    return found | {"nt_label": no_target, "all_masks": masks, "prob": prob}
