"""CRIS as its description says it, on a state dict with the released names: slow, plain, one sentence for each image."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F


class PlainCRIS:
    """`state`: released names; `heads` of text, pooling and decoder are not in it."""

    def __init__(self, state, text_heads, pool_heads, decoder_heads):
        self.s, self.text_heads, self.pool_heads, self.decoder_heads = state, text_heads, pool_heads, decoder_heads

    def conv(self, x, name, stride=1, padding=0):
        return F.conv2d(x, self.s[f"{name}.weight"], self.s.get(f"{name}.bias"), stride, padding)

    def bn(self, x, name):
        s = self.s
        shape = (1, -1) + (1,) * (x.dim() - 2)
        mean, var, w, b = (s[f"{name}.{k}"].view(shape) for k in ("running_mean", "running_var", "weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * w + b

    def ln(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.s[f"{name}.weight"], self.s[f"{name}.bias"])

    def linear(self, x, name):
        return F.linear(x, self.s[f"{name}.weight"], self.s.get(f"{name}.bias"))

    def conv_layer(self, x, name, padding):
        return self.bn(self.conv(x, f"{name}.0", padding=padding), f"{name}.1").relu()

    @staticmethod
    def attention(q, k, v, heads, blocked=None):
        """(B, Q, D), (B, K, D), (B, K, D); blocked (B, Q, K)."""
        out = []
        for q, k, v in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1)):
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            if blocked is not None:
                scores = scores.masked_fill(blocked, -math.inf)
            out.append(scores.softmax(-1) @ v)
        return torch.cat(out, -1)

    def image(self, x):
        p = "backbone.visual"
        for i, stride in ((1, 2), (2, 1), (3, 1)):
            x = self.bn(self.conv(x, f"{p}.conv{i}", stride, 1), f"{p}.bn{i}").relu()
        x, maps = F.avg_pool2d(x, 2), []
        for layer in range(1, 5):
            block = 0
            while f"{p}.layer{layer}.{block}.conv1.weight" in self.s:
                b, stride = f"{p}.layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
                y = self.bn(self.conv(x, f"{b}.conv1"), f"{b}.bn1").relu()
                y = self.bn(self.conv(y, f"{b}.conv2", padding=1), f"{b}.bn2").relu()
                y = self.bn(self.conv(F.avg_pool2d(y, stride), f"{b}.conv3"), f"{b}.bn3")
                if f"{b}.downsample.0.weight" in self.s:
                    x = self.bn(self.conv(F.avg_pool2d(x, stride), f"{b}.downsample.0"), f"{b}.downsample.1")
                x, block = (x + y).relu(), block + 1
            maps.append(x)
        return maps[1], maps[2], self.pool(x)

    def pool(self, x):
        p = "backbone.visual.attnpool"
        table = self.s[f"{p}.positional_embedding"][1:]
        side = math.isqrt(len(table))
        table = F.interpolate(table.T.reshape(1, -1, side, side), size=x.shape[-2:], mode="bicubic", align_corners=False)
        t = (x + table).flatten(2).mT
        y = self.attention(*(self.linear(t, f"{p}.{n}_proj") for n in "qkv"), self.pool_heads)
        y = self.linear(y, f"{p}.c_proj").mT.reshape(len(x), -1, *x.shape[-2:])
        return (y + self.bn(self.conv(x, f"{p}.connect.0"), f"{p}.connect.1")).relu()

    def text(self, ids):
        b, (B, L) = "backbone", ids.shape
        x = self.s[f"{b}.token_embedding.weight"][ids] + self.s[f"{b}.positional_embedding"][:L]
        later = torch.ones(L, L).triu(1).bool()
        i = 0
        while f"{b}.transformer.resblocks.{i}.ln_1.weight" in self.s:
            r = f"{b}.transformer.resblocks.{i}"
            y = F.linear(self.ln(x, f"{r}.ln_1"), self.s[f"{r}.attn.in_proj_weight"], self.s[f"{r}.attn.in_proj_bias"])
            x = x + self.linear(self.attention(*y.chunk(3, -1), self.text_heads, later), f"{r}.attn.out_proj")
            y = self.linear(self.ln(x, f"{r}.ln_2"), f"{r}.mlp.c_fc")
            x, i = x + self.linear(y * (1.702 * y).sigmoid(), f"{r}.mlp.c_proj"), i + 1
        x = self.ln(x, f"{b}.ln_final")
        return x, x[torch.arange(B), ids.argmax(1)] @ self.s[f"{b}.text_projection"]

    def neck(self, c3, c4, c5, sentence):
        t = self.bn(self.linear(sentence, "neck.txt_proj.0"), "neck.txt_proj.1").relu()
        up = lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)  # noqa: E731
        f5 = self.bn(self.conv_layer(c5, "neck.f1_v_proj", 0) * t[:, :, None, None], "neck.norm_layer.0").relu()
        f4 = self.conv_layer(torch.cat([self.conv_layer(c4, "neck.f2_v_proj", 1), up(f5)], 1), "neck.f2_cat", 0)
        f3 = self.conv_layer(torch.cat([F.avg_pool2d(self.conv_layer(c3, "neck.f3_v_proj", 1), 2), f4], 1), "neck.f3_cat", 0)
        levels = [self.conv_layer(f, f"neck.f4_proj{k}", 1) for f, k in ((f3, 3), (f4, 4), (f5, 5))]
        x = self.conv_layer(torch.cat([*levels[:2], up(levels[2])], 1), "neck.aggr", 0)
        B, _, h, w = x.shape
        xs = torch.stack([torch.linspace(-1, 1, w)] * h).expand(B, 1, h, w)
        ys = torch.stack([torch.linspace(-1, 1, h)] * w, 1).expand(B, 1, h, w)
        return self.conv_layer(self.conv_layer(torch.cat([x, xs, ys], 1), "neck.coordconv.0.conv1", 1), "neck.coordconv.1", 1)

    @staticmethod
    def sines(n, width):
        return torch.tensor([[(math.sin if c % 2 == 0 else math.cos)(p / 10000 ** (c // 2 * 2 / width)) for c in range(width)] for p in range(n)])

    def decode(self, x, l, ids):
        B, D, h, w = x.shape
        row, column, words = self.sines(h, D // 2), self.sines(w, D // 2), self.sines(ids.shape[1], D)
        cells = torch.stack([torch.cat([column[j], row[i]]) for i in range(h) for j in range(w)])
        x, i = x.flatten(2).mT, 0
        blocked = (ids == 0)[:, None].expand(-1, h * w, -1)
        while f"decoder.layers.{i}.norm1.weight" in self.s:
            p = f"decoder.layers.{i}"
            y = self.ln(x, f"{p}.norm1")
            x = x + self.ln(self.attend(f"{p}.self_attn", y + cells, y + cells, y), f"{p}.self_attn_norm")
            y = self.ln(x, f"{p}.norm2")
            x = x + self.ln(self.attend(f"{p}.multihead_attn", y + cells, l + words, l, blocked), f"{p}.cross_attn_norm")
            y = self.ln(self.linear(self.ln(x, f"{p}.norm3"), f"{p}.ffn.0").relu(), f"{p}.ffn.3")
            x, i = x + self.linear(y, f"{p}.ffn.4"), i + 1
        return self.ln(x, "decoder.norm").mT.reshape(B, D, h, w)

    def attend(self, name, q, k, v, blocked=None):
        weights, biases = self.s[f"{name}.in_proj_weight"].chunk(3), self.s[f"{name}.in_proj_bias"].chunk(3)
        q, k, v = (F.linear(x, m, b) for x, m, b in zip((q, k, v), weights, biases))
        return self.linear(self.attention(q, k, v, self.decoder_heads, blocked), f"{name}.out_proj")

    def __call__(self, image, ids):
        """image (B, 3, H, W) and ids (B, L) -> score (B, H / 4, W / 4)."""
        l, sentence = self.text(ids)
        x = self.decode(self.neck(*self.image(image), sentence), l, ids)
        for k in (1, 3):
            x = self.conv_layer(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False), f"proj.vis.{k}", 1)
        x = self.conv(x, "proj.vis.4")
        made = self.linear(sentence, "proj.txt")
        return torch.cat([F.conv2d(x[b:b + 1], made[b, :-1].reshape(1, -1, 3, 3), made[b, -1:], padding=1)[0] for b in range(len(x))])

    def loss(self, score, mask):
        small = F.interpolate(mask[:, None].float(), size=score.shape[-2:], mode="nearest")[:, 0]
        p = score.double().sigmoid()
        return -(small * p.log() + (1 - small) * (1 - p).log()).mean()


def released_shapes(layers, width, embed, grid, vocab, text_width, text_layers, context, fpn, decoder_layers, ffn):
    """The entries of a released state dict of these sizes, name -> shape."""
    shapes = {}

    def norm(name, n, batch=True):
        shapes.update({f"{name}.weight": [n], f"{name}.bias": [n]})
        if batch:
            shapes.update({f"{name}.running_mean": [n], f"{name}.running_var": [n], f"{name}.num_batches_tracked": []})

    def linear(name, n, m, bias=True):
        shapes[f"{name}.weight"] = [n, m]
        shapes.update({f"{name}.bias": [n]} if bias else {})

    def conv(name, n, m, k):
        shapes[f"{name}.0.weight"] = [n, m, k, k]
        norm(f"{name}.1", n)

    b, v = "backbone", "backbone.visual"
    shapes.update({f"{b}.positional_embedding": [context, text_width], f"{b}.text_projection": [text_width, embed], f"{b}.logit_scale": [],
                   f"{b}.token_embedding.weight": [vocab, text_width]})
    for i, (n, m) in enumerate(((width // 2, 3), (width // 2, width // 2), (width, width // 2)), 1):
        shapes[f"{v}.conv{i}.weight"] = [n, m, 3, 3]
        norm(f"{v}.bn{i}", n)
    inputs = width
    for k, depth in enumerate(layers):
        w = width * 2**k
        for j in range(depth):
            p = f"{v}.layer{k + 1}.{j}"
            for i, shape in enumerate(([w, inputs, 1, 1], [w, w, 3, 3], [4 * w, w, 1, 1]), 1):
                shapes[f"{p}.conv{i}.weight"] = shape
                norm(f"{p}.bn{i}", shape[0])
            if j == 0:
                conv(f"{p}.downsample", 4 * w, inputs, 1)
            inputs = 4 * w
    a = f"{v}.attnpool"
    shapes[f"{a}.positional_embedding"] = [grid**2 + 1, inputs]
    for name, n in (("q", inputs), ("k", inputs), ("v", inputs), ("c", embed)):
        linear(f"{a}.{name}_proj", n, inputs)
    conv(f"{a}.connect", embed, inputs, 1)
    t = text_width
    for i in range(text_layers):
        p = f"{b}.transformer.resblocks.{i}"
        shapes.update({f"{p}.attn.in_proj_weight": [3 * t, t], f"{p}.attn.in_proj_bias": [3 * t]})
        linear(f"{p}.attn.out_proj", t, t), linear(f"{p}.mlp.c_fc", 4 * t, t), linear(f"{p}.mlp.c_proj", t, 4 * t)
        norm(f"{p}.ln_1", t, False), norm(f"{p}.ln_2", t, False)
    norm(f"{b}.ln_final", t, False)
    fine, middle, coarse = fpn
    linear("neck.txt_proj.0", coarse, embed, False)
    norm("neck.txt_proj.1", coarse), norm("neck.norm_layer.0", coarse)
    for name, n, m, k in (("f1_v_proj", coarse, embed, 1), ("f2_v_proj", middle, 16 * width, 3), ("f2_cat", middle, middle + coarse, 1),
                          ("f3_v_proj", fine, 8 * width, 3), ("f3_cat", middle, fine + middle, 1), ("f4_proj5", middle, coarse, 3),
                          ("f4_proj4", middle, middle, 3), ("f4_proj3", middle, middle, 3), ("aggr", middle, 3 * middle, 1),
                          ("coordconv.0.conv1", middle, middle + 2, 3), ("coordconv.1", middle, middle, 3)):
        conv(f"neck.{name}", n, m, k)
    for i in range(decoder_layers):
        p = f"decoder.layers.{i}"
        for name in ("self_attn_norm", "cross_attn_norm", "norm1", "norm2", "norm3"):
            norm(f"{p}.{name}", t, False)
        for name in ("self_attn", "multihead_attn"):
            shapes.update({f"{p}.{name}.in_proj_weight": [3 * t, t], f"{p}.{name}.in_proj_bias": [3 * t]})
            linear(f"{p}.{name}.out_proj", t, t)
        linear(f"{p}.ffn.0", ffn, t), norm(f"{p}.ffn.3", ffn, False), linear(f"{p}.ffn.4", t, ffn)
    norm("decoder.norm", t, False)
    conv("proj.vis.1", t, t, 3), conv("proj.vis.3", t // 2, t, 3)
    shapes.update({"proj.vis.4.weight": [t // 2, t // 2, 1, 1], "proj.vis.4.bias": [t // 2]})
    linear("proj.txt", 9 * (t // 2) + 1, embed)
    return shapes
