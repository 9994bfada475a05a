"""SaG's released arithmetic, written out once more as plainly as it goes, for comparison with `ris_nb.models.sag`.

`plain_sag` reads a released state dict directly: no modules, no caches, no fused attention. Keys and values are computed in every
iteration, as released, and the slot decoder's layers see every slot at every patch; so it is also what the library's speed and
memory are measured against. It computes what the released network does in evaluation mode (no dropout), and gradients flow.
`released_shapes` lists the entries of a released state dict of any size, which the weight rule of `parity` can fill.
"""
from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from parity import Case
from plain_magnet import bert_layer, conv2d, count, heads_apart, layer_norm, linear
from torch import Tensor

# The sizes of the released scripts, under the names that the references use; `vit_width` and what follows is ours.
RELEASED = dict(img_backbone="vit_small_patch16_384", num_layers=12, crop_size=384, embed_dim=512, img_num_embeds=36, cascade_factor=3,
                agg_depth=6, agg_cross_head=4, agg_cross_dim=256, agg_latent_head=4, agg_latent_dim=128, agg_self_per_cross_attn=1,
                agg_cross_attn_type="slot", agg_query_type="slot", cma_heads=4, cma_head_dim=256, patch=16, vit_table=30, decoder_table=50)
WIDTHS = {"vit_tiny_patch16_384": (192, 3), "vit_small_patch16_384": (384, 6)}  # width and heads
BERT = dict(vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
            max_position_embeddings=512)
VIT, TEXT, AGG = "encoders.img_enc.img_backbone", "encoders.txt_enc", "encoders.img_enc.set_pred_module.agg"


def sizes(spec: dict) -> dict:
    """All sizes of a reference: its `options` and `bert` over those of the release."""
    found = {**RELEASED, **spec.get("options", {})}
    width, heads = WIDTHS[found["img_backbone"]]
    return {"vit_width": width, "vit_heads": heads, **found, "bert": {**BERT, **spec.get("bert", {})}}


def sag_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The input rule of SaG: image (B, 3, S, S), ids (B, L) padded with 0, eps (B, K, D)."""
    config, lens, B = sizes(case.spec), case.spec["lens"], case.spec["batch"]
    r = np.random.RandomState(case.spec["input_seed"])
    image = r.standard_normal((B, 3, config["crop_size"], config["crop_size"])).astype(np.float32)
    ids = np.zeros((B, max(lens)), np.int64)
    for i, n in enumerate(lens):
        ids[i, :n] = r.randint(5, config["bert"]["vocab_size"], n)
    eps = r.standard_normal((B, config["img_num_embeds"], config["embed_dim"])).astype(np.float32)
    return torch.from_numpy(image), torch.from_numpy(ids), torch.from_numpy(eps)


# ViT and BERT

def vit(state, image, config):
    """(B, 3, H, W) -> all tokens after the last norm (B, 1 + P, d), [CLS] first."""
    x = conv2d(state, f"{VIT}.patch_embed.proj", image, stride=config["patch"])
    grid, x = x.shape[-2:], x.flatten(2).transpose(1, 2)
    table, n = state[f"{VIT}.pos_embed"], config["vit_table"]
    cells = table[:, 1:].view(1, n, n, -1).permute(0, 3, 1, 2)
    cells = F.interpolate(cells, size=grid, mode="bilinear", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    x = torch.cat([state[f"{VIT}.cls_token"].expand(len(x), -1, -1), x], 1) + torch.cat([table[:, :1], cells], 1)
    for i in range(count(state, VIT + ".blocks.{}.norm1.weight")):
        block = f"{VIT}.blocks.{i}"
        q, k, v = (heads_apart(part, config["vit_heads"])
                   for part in linear(state, f"{block}.attn.qkv", layer_norm(state, f"{block}.norm1", x)).chunk(3, -1))
        A = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + linear(state, f"{block}.attn.proj", (A @ v).transpose(1, 2).reshape(x.shape))
        y = F.gelu(linear(state, f"{block}.mlp.fc1", layer_norm(state, f"{block}.norm2", x)))
        x = x + linear(state, f"{block}.mlp.fc2", y)
    return layer_norm(state, f"{VIT}.norm", x), grid


def sentence(state, ids, config):
    """ids (B, L), 0 where there is no word -> t (B, 1, D)."""
    name = f"{TEXT}.bert.embeddings"
    l = state[f"{name}.word_embeddings.weight"][ids] + state[f"{name}.token_type_embeddings.weight"][0]
    l = layer_norm(state, f"{name}.LayerNorm", l + state[f"{name}.position_embeddings.weight"][:ids.shape[1]], 1e-12)
    added = (1 - (ids != 0).float())[:, None, None] * -10000.0
    for i in range(config["bert"]["num_hidden_layers"]):
        l = bert_layer(state, f"{TEXT}.bert.encoder.layer.{i}", l, added, config["bert"]["num_attention_heads"])
    return linear(state, f"{TEXT}.linear", l)[:, :1]


# Shatter

def sine_positions(H, W, D):
    """(H * W, D): the first half tells the row, the second the column."""
    i = torch.arange(D // 2, dtype=torch.float32)
    period = 10000 ** (2 * (i // 2) / (D // 2))
    y = torch.arange(1, H + 1)[:, None].expand(H, W) / (H + 1e-6) * 2 * math.pi
    x = torch.arange(1, W + 1)[None].expand(H, W) / (W + 1e-6) * 2 * math.pi
    waves = [torch.stack([(c[..., None] / period)[..., 0::2].sin(), (c[..., None] / period)[..., 1::2].cos()], -1).flatten(2)
             for c in (y, x)]
    return torch.cat(waves, 2).flatten(0, 1)


def first_slots(state, eps, config):
    """Noise (B, K, D) -> S0 (B, K, D), one Gaussian after the other."""
    name, kind = f"{AGG}.queries", config["agg_query_type"]
    if kind == "query":
        return state[f"{name}.params"].expand(len(eps), -1, -1)
    mu, spread = state[f"{name}.slots_mu"], state[f"{name}.slots_log_sigma"]
    if kind == "random":  # one Gaussian for all slots, its second parameter the logarithm of sigma
        return mu + spread.exp() * eps
    n = config["cascade_factor"]  # and here that of sigma squared
    return mu.repeat_interleave(n, 1) + (spread / 2).exp().repeat_interleave(n, 1) * eps


def attend(state, name, x, source, heads, competition="pixels"):
    """x (B, Q, D) asks source (B, P, D): what it hears (B, Q, D) and its attention (B, heads, Q, P).

    "pixels": softmax over P, as usual; "slots": softmax over Q, then weights that sum to one over P.
    """
    q, k, v = (heads_apart(linear(state, f"{name}.fn.to_{part}", y), heads) for part, y in (("q", x), ("k", source), ("v", source)))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    A = scores.softmax(-2 if competition == "slots" else -1)
    W = A / (A.sum(-1, keepdim=True) + 1e-7) if competition == "slots" else A
    return linear(state, f"{name}.fn.to_out.0", (W @ v).transpose(1, 2).flatten(2)), A


def feed_forward(state, name, x):
    return linear(state, f"{name}.fn.net.3", F.gelu(linear(state, f"{name}.fn.net.0", layer_norm(state, f"{name}.norm", x))))


def shatter(state, S, X, config):
    """Slots (B, K, D) compete for the pixels X (B, P, D): slots (B, K, D) and A_slot (B, K, P) of the last iteration."""
    B, K, D = S.shape
    competition = "slots" if config["agg_cross_attn_type"] == "slot" else "pixels"
    for _ in range(config["agg_depth"]):
        name = f"{AGG}.agg_blocks.0.0"
        y, A = attend(state, name, layer_norm(state, f"{name}.norm", S), layer_norm(state, f"{name}.norm_context", X),
                      config["agg_cross_head"], competition)
        S = S + y
        S = S + feed_forward(state, f"{AGG}.agg_blocks.0.2", S)
        if config["agg_self_per_cross_attn"]:
            name = f"{AGG}.agg_blocks.0.4.0.0"
            S = S.view(-1, config["cascade_factor"], D)
            y = layer_norm(state, f"{name}.norm", S)
            S = S + attend(state, name, y, y, config["agg_latent_head"])[0]
            S = (S + feed_forward(state, f"{AGG}.agg_blocks.0.4.0.2", S)).view(B, K, D)
    S = linear(state, f"{AGG}.last_layer.1", S)
    return layer_norm(state, "encoders.img_enc.set_pred_module.residual_norm", S), A.mean(1)


def decode(state, S, grid):
    """Slots (B, K, D) -> V_hat (B, P, d) and alpha (B, K, P): a small network sees every slot at every patch."""
    H, W = grid
    column, row = state["decoder.pos_emb.col_embed.weight"][:W], state["decoder.pos_emb.row_embed.weight"][:H]
    place = torch.cat([column[None].expand(H, -1, -1), row[:, None].expand(-1, W, -1)], -1).flatten(0, 1)
    x = S[:, :, None] + place  # (B, K, P, D)
    for i in (0, 2, 4):
        x = F.relu(linear(state, f"decoder.mlp.{i}", x))
    x = linear(state, "decoder.mlp.6", x)  # (B, K, P, d + 1)
    features, alpha = x[..., :-1], x[..., -1:].softmax(1)
    return (features * alpha).sum(1), alpha[..., 0]


# Gather

def gather(state, t, S, config):
    """Every sentence t (B, 1, D) asks the slots (B, K, D) of every image: z (image, text, D), normalised, and A_fuse of the
    matching pairs (B, K)."""
    every = t[None, :, 0].expand(len(S), -1, -1)
    y, A = attend(state, "cma.attn", layer_norm(state, "cma.attn.norm", every), layer_norm(state, "cma.attn.norm_context", S),
                  config["cma_heads"])
    c = every + y
    c = c + feed_forward(state, "cma.ff", c)
    return c / c.norm(dim=-1, keepdim=True), A.mean(1).diagonal(0, 0, 1).T


# All of it

def plain_sag(state: dict[str, Tensor], spec: dict, image: Tensor, ids: Tensor, eps: Tensor) -> dict[str, Tensor]:
    """What the released SaG computes in evaluation mode, and its two losses, under the names of the references in `parity`.

    `state`: a released state dict, tied weights once or repeated; `spec`: as the references have it, for the sizes that shapes don't
    tell. image (B, 3, H, W), ids (B, L) int64, 0 where there is no word, eps (B, K, D): the noise of the slots.
    """
    config = sizes(spec)
    tokens, grid = vit(state, image, config)
    V = tokens[:, 1:]
    X = linear(state, "encoders.img_enc.spm_1x1", V) + sine_positions(*grid, config["embed_dim"])
    S0 = first_slots(state, eps, config)
    S, A_slot = shatter(state, S0, X, config)
    t = sentence(state, ids, config)
    z, A_fuse = gather(state, t, S, config)
    V_hat, alpha = decode(state, S, grid)
    similarity = torch.einsum("jd,ijd->ji", t[:, 0].detach(), z)  # (text, image)
    return {"vit_tokens": tokens, "slots_init": S0, "slots": S, "A_slot": A_slot, "A_fuse": A_fuse, "txt_emb": t, "cm_feat": z,
            "recon": V_hat, "alpha": alpha, "c3_sim": similarity, "c3": F.cross_entropy(similarity, torch.arange(len(t))),
            "recon_loss": (V_hat - V.detach()).square().mean(), "maps": torch.einsum("bk,bkp->bp", A_fuse, A_slot)}


def plain_masks(maps: Tensor, grid, shapes, threshold: float = 0.5) -> list[Tensor]:
    """maps (B, P) -> a bool mask of each shape (H, W): enlarge, stretch to [0, 1], cut."""
    masks = []
    for m, shape in zip(maps, shapes):
        m = F.interpolate(m.view(1, 1, *grid), size=tuple(shape), mode="bilinear", align_corners=False)[0, 0]
        masks.append((m - m.min()) / (m.max() - m.min() + 1e-9) >= threshold)
    return masks


def released_shapes(spec: dict) -> dict[str, tuple[int, ...]]:
    """Every entry of a released state dict of these sizes with its shape, tied weights once."""
    config, shapes = sizes(spec), {}

    def add(name, *shape, bias=True):
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    def attention(name, width, source=True):
        for part in ("q", "k", "v"):
            add(f"{name}.fn.to_{part}", width, D, bias=False)
        add(f"{name}.fn.to_out.0", D, width)
        add(f"{name}.norm", D)
        if source:
            add(f"{name}.norm_context", D)

    def mlp(name):
        add(f"{name}.fn.net.0", 4 * D, D)
        add(f"{name}.fn.net.3", D, 4 * D)
        add(f"{name}.norm", D)

    d, D, K, patch = config["vit_width"], config["embed_dim"], config["img_num_embeds"], config["patch"]
    shapes[f"{VIT}.cls_token"], shapes[f"{VIT}.pos_embed"] = (1, 1, d), (1, config["vit_table"] ** 2 + 1, d)
    add(f"{VIT}.patch_embed.proj", d, 3, patch, patch)
    for i in range(config["num_layers"]):
        block = f"{VIT}.blocks.{i}"
        add(f"{block}.norm1", d)
        add(f"{block}.norm2", d)
        add(f"{block}.attn.qkv", 3 * d, d)
        add(f"{block}.attn.proj", d, d)
        add(f"{block}.mlp.fc1", 4 * d, d)
        add(f"{block}.mlp.fc2", d, 4 * d)
    add(f"{VIT}.norm", d)
    add(f"{VIT}.head", 1000, d)

    add("encoders.img_enc.spm_1x1", D, d)
    module = "encoders.img_enc.set_pred_module"
    add(f"{module}.residual_norm", D)
    add(f"{module}.fc", 1024, D)
    if config["agg_query_type"] == "query":
        shapes[f"{AGG}.queries.params"] = (K, D)
    else:
        rows = 1 if config["agg_query_type"] == "random" else K // config["cascade_factor"]
        shapes[f"{AGG}.queries.slots_mu"] = shapes[f"{AGG}.queries.slots_log_sigma"] = (1, rows, D)
    attention(f"{AGG}.agg_blocks.0.0", config["agg_cross_head"] * config["agg_cross_dim"])
    mlp(f"{AGG}.agg_blocks.0.2")
    if config["agg_self_per_cross_attn"]:
        attention(f"{AGG}.agg_blocks.0.4.0.0", config["agg_latent_head"] * config["agg_latent_dim"], source=False)
        mlp(f"{AGG}.agg_blocks.0.4.0.2")
    add(f"{AGG}.last_layer.1", D, D)
    add("encoders.img_enc.residual_fc", D, d)

    bert, name = config["bert"], f"{TEXT}.bert.embeddings"
    E, ffn = bert["hidden_size"], bert["intermediate_size"]
    add(f"{name}.word_embeddings", bert["vocab_size"], E, bias=False)
    add(f"{name}.position_embeddings", bert["max_position_embeddings"], E, bias=False)
    add(f"{name}.token_type_embeddings", 2, E, bias=False)
    add(f"{name}.LayerNorm", E)
    for i in range(bert["num_hidden_layers"]):
        name = f"{TEXT}.bert.encoder.layer.{i}"
        for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            add(f"{name}.{part}", E, E)
        add(f"{name}.attention.output.LayerNorm", E)
        add(f"{name}.intermediate.dense", ffn, E)
        add(f"{name}.output.dense", E, ffn)
        add(f"{name}.output.LayerNorm", E)
    add(f"{TEXT}.bert.pooler.dense", E, E)
    add(f"{TEXT}.linear", D, E)

    attention("cma.attn", config["cma_heads"] * config["cma_head_dim"])
    mlp("cma.ff")
    add("decoder.pos_emb.row_embed", config["decoder_table"], D // 2, bias=False)
    add("decoder.pos_emb.col_embed", config["decoder_table"], D // 2, bias=False)
    for i in (0, 2, 4):
        add(f"decoder.mlp.{i}", D, D)
    add("decoder.mlp.6", d + 1, D)
    return shapes
