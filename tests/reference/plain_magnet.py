"""MagNet's released arithmetic, written out once more as plainly as it goes, for comparison with `ris_nb.models.magnet`.

`plain_magnet` reads a released state dict directly: no modules, no caches, no fused attention. Every mask, position and
concatenation is made where the released network makes it, so it is also what the library's speed is measured against.
`released_shapes` lists the entries of a released state dict of any size, which the weight rule of `parity` can fill.
"""
from __future__ import annotations

import math
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

GRIDS = (1, 2, 3, 6)


# Layers, by the name of their weights

def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def conv1d(state, name, x):  # (B, C, N) -> (B, D, N), kernel 1
    return F.conv1d(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def conv2d(state, name, x, stride=1):
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), stride=stride)


def layer_norm(state, name, x, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def heads_apart(x, heads):  # (B, N, D) -> (B, heads, N, D / heads)
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def count(state, pattern):
    """How many of pattern.format(0), pattern.format(1), ... are entries of the state dict."""
    n = 0
    while pattern.format(n) in state:
        n += 1
    return n


# Swin

def relative_index(window):
    """Which row of the bias table belongs to a pair of cells of one window: (window**2, window**2)."""
    cells = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
    dy, dx = cells[:, :, None] - cells[:, None, :] + window - 1
    return dy * (2 * window - 1) + dx


def cut(x, window):  # (B, H, W, C) -> (B * nW, window**2, C)
    B, H, W, C = x.shape
    x = x.view(B, H // window, window, W // window, window, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window**2, C)


def join(x, window, H, W):
    x = x.view(-1, H // window, W // window, window, window, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, H, W, x.shape[-1])


def shifted_mask(H, W, window, shift):
    """-100 between cells of a window that come from different regions of the map, else 0: (nW, N, N)."""
    H, W = math.ceil(H / window) * window, math.ceil(W / window) * window
    region, n = torch.zeros(1, H, W, 1), 0
    parts = slice(0, -window), slice(-window, -shift), slice(-shift, None)
    for rows in parts:
        for columns in parts:
            region[:, rows, columns] = n
            n += 1
    region = cut(region, window).squeeze(-1)
    return (region[:, None] != region[:, :, None]).float() * -100.0


def window_attention(state, name, x, mask):
    BW, N, C = x.shape
    table = state[f"{name}.relative_position_bias_table"]
    heads = table.shape[1]
    q, k, v = linear(state, f"{name}.qkv", x).reshape(BW, N, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    scores = (q * (C // heads) ** -0.5) @ k.transpose(-2, -1)
    bias = table[relative_index(isqrt(N)).view(-1)].view(N, N, heads).permute(2, 0, 1).contiguous()
    scores = scores + bias[None]
    if mask is not None:
        scores = scores.view(BW // len(mask), len(mask), heads, N, N) + mask[None, :, None]
        scores = scores.view(-1, heads, N, N)
    x = (scores.softmax(-1) @ v).transpose(1, 2).reshape(BW, N, C)
    return linear(state, f"{name}.proj", x)


def swin_block(state, name, x, H, W, window, shift, mask):
    B, _, C = x.shape
    y = layer_norm(state, f"{name}.norm1", x).view(B, H, W, C)
    y = F.pad(y, (0, 0, 0, -W % window, 0, -H % window))
    Hp, Wp = y.shape[1:3]
    y = torch.roll(y, (-shift, -shift), (1, 2)) if shift else y
    y = join(window_attention(state, f"{name}.attn", cut(y, window), mask if shift else None), window, Hp, Wp)
    y = torch.roll(y, (shift, shift), (1, 2)) if shift else y
    x = x + y[:, :H, :W].contiguous().view(B, H * W, C)
    y = F.gelu(linear(state, f"{name}.mlp.fc1", layer_norm(state, f"{name}.norm2", x)))
    return x + linear(state, f"{name}.mlp.fc2", y)


def swin_stage(state, name, x, H, W):
    first = state[f"{name}.blocks.0.attn.relative_position_bias_table"]
    window = (isqrt(len(first)) + 1) // 2
    mask = shifted_mask(H, W, window, window // 2)
    for j in range(count(state, name + ".blocks.{}.norm1.weight")):
        x = swin_block(state, f"{name}.blocks.{j}", x, H, W, window, window // 2 if j % 2 else 0, mask)
    return x


def merge(state, name, x, H, W):
    x = x.view(len(x), H, W, -1)
    x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
    x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
    x = x.view(len(x), -1, x.shape[-1])
    return linear(state, f"{name}.reduction", layer_norm(state, f"{name}.norm", x)), (H + 1) // 2, (W + 1) // 2


# BERT

def bert_embed(state, ids):
    name = "language_model.embeddings"
    x = state[f"{name}.word_embeddings.weight"][ids] + state[f"{name}.token_type_embeddings.weight"][0]
    return layer_norm(state, f"{name}.LayerNorm", x + state[f"{name}.position_embeddings.weight"][: ids.shape[1]], 1e-12)


def bert_layer(state, name, x, added, heads):
    q, k, v = (heads_apart(linear(state, f"{name}.attention.self.{part}", x), heads) for part in ("query", "key", "value"))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + added
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
    x = layer_norm(state, f"{name}.attention.output.LayerNorm", linear(state, f"{name}.attention.output.dense", y) + x, 1e-12)
    y = linear(state, f"{name}.output.dense", F.gelu(linear(state, f"{name}.intermediate.dense", x)))
    return layer_norm(state, f"{name}.output.LayerNorm", y + x, 1e-12)


# Alignment

def image_fusion(state, name, x, l, m):
    """Pixels (B, P, D) ask words (B, L, E), m (B, L, 1) is 1 for words: (B, P, D)."""
    v = F.gelu(conv1d(state, f"{name}.vis_project.0", x.permute(0, 2, 1)))  # (B, D, P)
    att, l, m = f"{name}.image_lang_att", l.permute(0, 2, 1), m.permute(0, 2, 1)
    q = layer_norm(state, f"{att}.f_query.1", linear(state, f"{att}.f_query.0", x))
    k = conv1d(state, f"{att}.f_key.0", l) * m  # (B, D, L)
    w = conv1d(state, f"{att}.f_value.0", l) * m
    scores = (q.shape[-1] ** -0.5 * torch.matmul(q, k)) + (1e4 * m - 1e4)
    t = torch.matmul(scores.softmax(-1), w.permute(0, 2, 1))
    t = layer_norm(state, f"{att}.W.1", linear(state, f"{att}.W.0", t)).permute(0, 2, 1)
    return F.gelu(conv1d(state, f"{name}.project_mm.0", v * t)).permute(0, 2, 1)


def image_alignment(state, name, x, H, W, l, m):
    """(B, HW, D) -> the map for the decoder (B, D, H, W) and what goes to the next stage (B, HW, D)."""
    B, _, D = x.shape
    image, parts = x.permute(0, 2, 1).view(B, D, H, W), []
    for i, grid in enumerate(GRIDS):
        z = conv2d(state, f"{name}.pyramids.{i}.1", F.adaptive_avg_pool2d(image, grid))
        z = layer_norm(state, f"{name}.pyramids.{i}.2", z.permute(0, 2, 3, 1), 1e-6).permute(0, 3, 1, 2)
        z = conv2d(state, f"{name}.pyramids.{i}.5", F.gelu(conv2d(state, f"{name}.pyramids.{i}.3", z)))
        z = image_fusion(state, f"{name}.fusions.{i}", z.flatten(2).permute(0, 2, 1), l, m)
        z = z.permute(0, 2, 1).view(B, -1, grid, grid)
        z = F.interpolate(z, size=(H, W), mode="bilinear", align_corners=True)
        parts.append(z.flatten(2).permute(0, 2, 1))
    f = image_fusion(state, f"{name}.fusion", x, l, m)
    s = linear(state, f"{name}.mixer.0", torch.cat([*parts, f], -1))
    s = F.gelu(linear(state, f"{name}.mixer.2", layer_norm(state, f"{name}.mixer.1", s)))
    gate = torch.tanh(linear(state, f"{name}.res_gate.2", F.gelu(linear(state, f"{name}.res_gate.0", f))))
    return s.permute(0, 2, 1).view(B, D, H, W), x + gate * f


def language_alignment(state, k, l, x, added):
    """Words (B, L, E) ask pixels (B, P, C), through BERT's added mask (B, L, 1) in the place of a mask of ones."""
    name = f"language_model.pwams.{k}"
    v = F.gelu(linear(state, f"{name}.vis_project.0", l)).permute(0, 2, 1)  # (B, E, L)
    att, image, m = f"{name}.image_lang_att", x.permute(0, 2, 1), added.permute(0, 2, 1)
    q = conv1d(state, f"{att}.f_query.0", l.permute(0, 2, 1)) * m
    key = F.instance_norm(conv1d(state, f"{att}.f_key.0", image))
    value = F.instance_norm(conv1d(state, f"{att}.f_value.0", image))
    scores = (q.shape[1] ** -0.5 * torch.matmul(q.permute(0, 2, 1), key)) + (1e4 * m - 1e4).permute(0, 2, 1)
    t = torch.matmul(scores.softmax(-1), value.permute(0, 2, 1)).permute(0, 2, 1)  # (B, E, L)
    t = F.instance_norm(conv1d(state, f"{att}.W.0", t))
    r = F.gelu(conv1d(state, f"{name}.project_mm.0", v * t)).permute(0, 2, 1)
    gate = f"language_model.res_gates.{k}"
    return l + torch.tanh(linear(state, f"{gate}.2", F.relu(linear(state, f"{gate}.0", r)))) * r


# Decoders

def sine_positions(B, H, W, width):
    """(B, width, H, W): the first half tells the row, the second the column."""
    ones = torch.ones(B, H, W)
    y, x = ones.cumsum(1), ones.cumsum(2)
    y, x = y / (y[:, -1:, :] + 1e-6) * 2 * math.pi, x / (x[:, :, -1:] + 1e-6) * 2 * math.pi
    i = torch.arange(width // 2, dtype=torch.float32)
    period = 10000 ** (2 * (i // 2) / (width // 2))
    waves = [torch.stack([(c[..., None] / period)[..., 0::2].sin(), (c[..., None] / period)[..., 1::2].cos()], 4).flatten(3)
             for c in (y, x)]
    return torch.cat(waves, 3).permute(0, 3, 1, 2)


def deformable_attention(state, name, query, references, source, shapes, heads):
    """query, source (B, N, D), references (N, 2) as (x, y) in [0, 1], shapes [(H, W)] of the levels: (B, N, D)."""
    B, N, D = query.shape
    levels = len(shapes)
    value = linear(state, f"{name}.value_proj", source).view(B, N, heads, D // heads)
    offsets = linear(state, f"{name}.sampling_offsets", query).view(B, N, heads, levels, -1, 2)
    points = offsets.shape[4]
    weights = linear(state, f"{name}.attention_weights", query).view(B, N, heads, levels * points).softmax(-1)
    sizes = torch.tensor([(W, H) for H, W in shapes], dtype=torch.float32)
    places = 2 * (references[None, :, None, None, None, :] + offsets / sizes[None, None, None, :, None, :]) - 1
    sampled = []
    for level, ((H, W), part) in enumerate(zip(shapes, value.split([H * W for H, W in shapes], 1))):
        part = part.flatten(2).transpose(1, 2).reshape(B * heads, D // heads, H, W)
        grid = places[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B * heads, N, points, 2)
        sampled.append(F.grid_sample(part, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).reshape(B * heads, 1, N, levels * points)
    out = (torch.stack(sampled, -2).flatten(-2) * weights).sum(-1).view(B, D, N).transpose(1, 2).contiguous()
    return linear(state, f"{name}.output_proj", out)


def pixel_decoder(state, maps, heads, groups):
    """Maps (B, C_k, H_k, W_k), finest first -> mask features (B, D, H_0, W_0) and the other maps, coarsest first."""
    name, sources, positions, shapes = "classifier.pixel_decoder", [], [], []
    for i, s in enumerate(reversed(maps)):
        s = conv2d(state, f"{name}.input_proj.{i}.0", s)
        s = F.group_norm(s, groups, state[f"{name}.input_proj.{i}.1.weight"], state[f"{name}.input_proj.{i}.1.bias"])
        B, D, H, W = s.shape
        shapes.append((H, W))
        sources.append(s.flatten(2).transpose(1, 2))
        level = state[f"{name}.transformer.level_embed"][i].view(1, 1, -1)
        positions.append(sine_positions(B, H, W, D).flatten(2).transpose(1, 2) + level)
    x, positions = torch.cat(sources, 1), torch.cat(positions, 1)
    references = []
    for H, W in shapes:
        y, z = torch.meshgrid((torch.arange(H) + 0.5) / H, (torch.arange(W) + 0.5) / W, indexing="ij")
        references.append(torch.stack([z.flatten(), y.flatten()], -1))
    references = torch.cat(references)
    for i in range(count(state, name + ".transformer.encoder.layers.{}.norm1.weight")):
        layer = f"{name}.transformer.encoder.layers.{i}"
        y = deformable_attention(state, f"{layer}.self_attn", x + positions, references, x, shapes, heads)
        x = layer_norm(state, f"{layer}.norm1", x + y)
        y = linear(state, f"{layer}.linear2", F.relu(linear(state, f"{layer}.linear1", x)))
        x = layer_norm(state, f"{layer}.norm2", x + y)
    *coarse, fine = (part.transpose(1, 2).view(len(x), -1, H, W)
                     for part, (H, W) in zip(x.split([H * W for H, W in shapes], 1), shapes))
    return conv2d(state, f"{name}.mask_features", fine), coarse


def attention(state, name, query, key, value, heads, blocked=None):
    """Multi-head attention with the joint projection of `nn.MultiheadAttention`; blocked (B, Q, K) bool."""
    parts = zip((query, key, value), state[f"{name}.in_proj_weight"].chunk(3), state[f"{name}.in_proj_bias"].chunk(3))
    q, k, v = (heads_apart(F.linear(x, weight, bias), heads) for x, weight, bias in parts)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if blocked is not None:
        scores = scores.masked_fill(blocked[:, None], -math.inf)
    return linear(state, f"{name}.out_proj", (scores.softmax(-1) @ v).transpose(1, 2).reshape(query.shape))


def mask_decoder(state, maps, features, heads):
    """Maps (B, D, H, W), coarsest first, features (B, D, h, w) -> mask logits [(B, 1, h, w)], class logits (B, 1, 2)."""
    name = "classifier.predictor"
    B = len(features)
    sources, positions = [], []
    for i, s in enumerate(maps):
        positions.append(sine_positions(B, *s.shape[-2:], s.shape[1]).flatten(2).transpose(1, 2))
        sources.append((s.flatten(2) + state[f"{name}.level_embed.weight"][i][None, :, None]).transpose(1, 2))
    place = state[f"{name}.query_embed.weight"].expand(B, -1, -1)
    x = state[f"{name}.query_feat.weight"].expand(B, -1, -1)

    def predict(x):
        x = layer_norm(state, f"{name}.decoder_norm", x)
        e = x
        for j in range(3):
            e = linear(state, f"{name}.mask_embed.layers.{j}", F.relu(e) if j else e)
        return torch.einsum("bqc,bchw->bqhw", e, features), linear(state, f"{name}.class_embed", x)

    logits, classes = predict(x)
    masks = [logits]
    for i in range(count(state, name + ".transformer_ffn_layers.{}.norm.weight")):
        k = i % len(maps)
        small = F.interpolate(masks[-1], size=maps[k].shape[-2:], mode="bilinear", align_corners=False)
        blocked = (small.sigmoid() < 0.5).flatten(2)  # (B, 1, HW)
        blocked = blocked & ~blocked.all(-1, keepdim=True)
        layer = f"{name}.transformer_cross_attention_layers.{i}"
        y = attention(state, f"{layer}.multihead_attn", x + place, sources[k] + positions[k], sources[k], heads, blocked)
        x = layer_norm(state, f"{layer}.norm", x + y)
        layer = f"{name}.transformer_self_attention_layers.{i}"
        y = attention(state, f"{layer}.self_attn", x + place, x + place, x, heads)
        x = layer_norm(state, f"{layer}.norm", x + y)
        layer = f"{name}.transformer_ffn_layers.{i}"
        y = linear(state, f"{layer}.linear2", F.relu(linear(state, f"{layer}.linear1", x)))
        x = layer_norm(state, f"{layer}.norm", x + y)
        logits, classes = predict(x)
        masks.append(logits)
    return masks, classes


# All of it

def plain_magnet(state: dict[str, Tensor], spec: dict, image: Tensor, ids: Tensor, words: Tensor) -> dict[str, Tensor]:
    """What the released MagNet computes in evaluation mode, under the names of the references in `parity`, all cells of it.

    `state`: a released state dict; the sizes that its shapes don't tell are read from `spec["config"]` as the references
    have it (`bert.num_attention_heads`, `pwam_idx`: after how many BERT layers each stage meets the words; the decoder's heads
    and groups of its norms are `decoder_heads` and `decoder_groups`, 8 and 32 as released where they are not given). image (B, 3, S, S), ids (B, L) int64, words (B, L) bool.
    Returns s1.., l1.., mask_features, pred_masks, aux_masks, pred_logits and prob.
    """
    config, found, maps = spec["config"], {}, []
    heads = config.get("decoder_heads", 8)
    m = words.float()[..., None]  # (B, L, 1)
    added = (1 - m) * -10000.0

    patch = state["image_model.patch_embed.proj.weight"].shape[-1]
    image_size = image.shape[-2:]
    image = F.pad(image, (0, -image_size[1] % patch, 0, -image_size[0] % patch))
    x = conv2d(state, "image_model.patch_embed.proj", image, stride=patch)
    H, W = x.shape[-2:]
    x = layer_norm(state, "image_model.patch_embed.norm", x.flatten(2).transpose(1, 2))
    l, done = bert_embed(state, ids), 0

    for k, stop in enumerate(config["pwam_idx"]):
        name = f"image_model.layers.{k}"
        x = swin_stage(state, name, x, H, W)
        for layer in range(done, stop):
            l = bert_layer(state, f"language_model.encoder.layer.{layer}", l, added.permute(0, 2, 1)[:, None],
                           config["bert"]["num_attention_heads"])
        done = stop
        aligned = language_alignment(state, k, l, x, added)  # both sides read the other as it was
        s, x = image_alignment(state, name, x, H, W, l, m)
        l = aligned
        maps.append(s)
        found |= {f"s{k + 1}": s, f"l{k + 1}": l}
        if f"{name}.downsample.reduction.weight" in state:
            x, H, W = merge(state, f"{name}.downsample", x, H, W)

    features, coarse = pixel_decoder(state, maps, heads, config.get("decoder_groups", 32))
    masks, classes = mask_decoder(state, coarse, features, heads)
    prob = F.interpolate(masks[-1], size=image_size, mode="bilinear", align_corners=True).sigmoid()
    return found | {"mask_features": features, "pred_masks": masks[-1], "aux_masks": torch.stack(masks[:-1]),
                    "pred_logits": classes, "prob": prob}


def released_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every entry of a released state dict of these sizes with its shape.

    `config` as in the references; further sizes, with those of the release where they are not given: `patch`, `decoder_width`,
    `points`, `encoder_ffn`, `decoder_ffn` and, within `bert`, `hidden_size` and `max_position_embeddings`.
    """
    shapes = {}

    def add(name, *shape, bias=True):
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    def fusion(name, D, E):  # an image-side fusion
        add(f"{name}.vis_project.0", D, D, 1)
        add(f"{name}.image_lang_att.f_key.0", D, E, 1)
        add(f"{name}.image_lang_att.f_query.0", D, D)
        add(f"{name}.image_lang_att.f_query.1", D)
        add(f"{name}.image_lang_att.f_value.0", D, E, 1)
        add(f"{name}.image_lang_att.W.0", D, D)
        add(f"{name}.image_lang_att.W.1", D)
        add(f"{name}.project_mm.0", D, D, 1)

    bert, window, patch = config["bert"], config["window"], config.get("patch", 4)
    E, ffn = bert.get("hidden_size", 768), bert["intermediate_size"]
    stages = len(config["depths"])
    widths = [config["embed_dim"] * 2**k for k in range(stages)]
    add("image_model.patch_embed.proj", widths[0], 3, patch, patch)
    add("image_model.patch_embed.norm", widths[0])
    for k, (D, depth, heads) in enumerate(zip(widths, config["depths"], config["num_heads"])):
        name = f"image_model.layers.{k}"
        for j in range(depth):
            block = f"{name}.blocks.{j}"
            add(f"{block}.norm1", D)
            shapes[f"{block}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads)
            shapes[f"{block}.attn.relative_position_index"] = (window**2, window**2)
            add(f"{block}.attn.qkv", 3 * D, D)
            add(f"{block}.attn.proj", D, D)
            add(f"{block}.norm2", D)
            add(f"{block}.mlp.fc1", 4 * D, D)
            add(f"{block}.mlp.fc2", D, 4 * D)
        fusion(f"{name}.fusion", D, E)
        add(f"{name}.res_gate.0", D, D, bias=False)
        add(f"{name}.res_gate.2", D, D, bias=False)
        for i in range(len(GRIDS)):
            add(f"{name}.pyramids.{i}.1", 4 * D, D, 1, 1, bias=False)
            add(f"{name}.pyramids.{i}.2", 4 * D)
            add(f"{name}.pyramids.{i}.3", D, 4 * D, 1, 1, bias=False)
            add(f"{name}.pyramids.{i}.5", D // 4, D, 1, 1, bias=False)
            fusion(f"{name}.fusions.{i}", D // 4, E)
        add(f"{name}.mixer.0", D, 2 * D)
        add(f"{name}.mixer.1", D)
        add(f"{name}.mixer.2", D, D)
        if k < stages - 1:
            add(f"{name}.downsample.reduction", 2 * D, 4 * D, bias=False)
            add(f"{name}.downsample.norm", 4 * D)
        add(f"image_model.norm{k}", D)

    name = "language_model.embeddings"
    add(f"{name}.word_embeddings", bert["vocab_size"], E, bias=False)
    add(f"{name}.position_embeddings", bert.get("max_position_embeddings", 512), E, bias=False)
    add(f"{name}.token_type_embeddings", 2, E, bias=False)
    add(f"{name}.LayerNorm", E)
    for i in range(bert["num_hidden_layers"]):
        name = f"language_model.encoder.layer.{i}"
        for part in ("query", "key", "value"):
            add(f"{name}.attention.self.{part}", E, E)
        add(f"{name}.attention.output.dense", E, E)
        add(f"{name}.attention.output.LayerNorm", E)
        add(f"{name}.intermediate.dense", ffn, E)
        add(f"{name}.output.dense", E, ffn)
        add(f"{name}.output.LayerNorm", E)
    for k, D in enumerate(widths):
        name = f"language_model.pwams.{k}"
        add(f"{name}.vis_project.0", E, E)
        add(f"{name}.image_lang_att.f_query.0", E, E, 1)
        add(f"{name}.image_lang_att.f_key.0", E, D, 1)
        add(f"{name}.image_lang_att.f_value.0", E, D, 1)
        add(f"{name}.image_lang_att.W.0", E, E, 1)
        add(f"{name}.project_mm.0", E, E, 1)
        add(f"language_model.res_gates.{k}.0", E, E, bias=False)
        add(f"language_model.res_gates.{k}.2", E, E, bias=False)
        add(f"language_model.norms.{k}", E)

    D, heads, points = config.get("decoder_width", 256), config.get("decoder_heads", 8), config.get("points", 4)
    name, ffn = "classifier.pixel_decoder", config.get("encoder_ffn", 1024)
    for i, width in enumerate(reversed(widths)):
        add(f"{name}.input_proj.{i}.0", D, width, 1, 1)
        add(f"{name}.input_proj.{i}.1", D)
    shapes[f"{name}.transformer.level_embed"] = (stages, D)
    for i in range(config["enc_layers"]):
        layer = f"{name}.transformer.encoder.layers.{i}"
        add(f"{layer}.self_attn.sampling_offsets", heads * stages * points * 2, D)
        add(f"{layer}.self_attn.attention_weights", heads * stages * points, D)
        add(f"{layer}.self_attn.value_proj", D, D)
        add(f"{layer}.self_attn.output_proj", D, D)
        add(f"{layer}.norm1", D)
        add(f"{layer}.linear1", ffn, D)
        add(f"{layer}.linear2", D, ffn)
        add(f"{layer}.norm2", D)
    add(f"{name}.mask_features", D, D, 1, 1)

    name, ffn = "classifier.predictor", config.get("decoder_ffn", 2048)
    for i in range(config["dec_layers"] - 1):
        for layer in (f"{name}.transformer_self_attention_layers.{i}.self_attn",
                      f"{name}.transformer_cross_attention_layers.{i}.multihead_attn"):
            shapes[f"{layer}.in_proj_weight"], shapes[f"{layer}.in_proj_bias"] = (3 * D, D), (3 * D,)
            add(f"{layer}.out_proj", D, D)
            add(f"{layer.rpartition('.')[0]}.norm", D)
        layer = f"{name}.transformer_ffn_layers.{i}"
        add(f"{layer}.linear1", ffn, D)
        add(f"{layer}.linear2", D, ffn)
        add(f"{layer}.norm", D)
    add(f"{name}.decoder_norm", D)
    for embedding, rows in (("query_feat", 1), ("query_embed", 1), ("level_embed", stages - 1)):
        add(f"{name}.{embedding}", rows, D, bias=False)
    add(f"{name}.class_embed", 2, D)
    for j in range(3):
        add(f"{name}.mask_embed.layers.{j}", D, D)
    add("lang_proj", D, E)
    return shapes
