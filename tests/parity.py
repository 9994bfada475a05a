"""Numerical references: what the released networks compute for weights and inputs that a rule makes.

`parity/NAME.json` lists sizes, seeds and every entry of the released network's state dict with its shape;
`parity/NAME.npz` holds inputs and outputs. A checkpoint is not needed: the rule below makes one.
"""
from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch

FOLDERS = (Path(__file__).resolve().with_suffix(""), Path(__file__).resolve().parents[2] / "shared" / "parity")


@dataclass
class Case:
    """One reference: `spec` is its json file, `arrays` its npz file."""
    name: str
    spec: dict
    arrays: dict[str, np.ndarray]

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key])


def find_case(name: str) -> Path | None:
    """The folder that holds the case, or None: the full-size cases do not ship with the repository."""
    return next((folder for folder in FOLDERS if (folder / f"{name}.npz").exists()), None)


def load_case(name: str) -> Case:
    folder = find_case(name)
    if folder is None:
        raise FileNotFoundError(f"no reference {name}.npz in {' or '.join(map(str, FOLDERS))}")
    with np.load(folder / f"{name}.npz") as arrays:
        return Case(name, json.loads((folder / f"{name}.json").read_text()), dict(arrays))


def make_weight(seed: int, key: str, shape) -> torch.Tensor:
    """The weight rule: normal numbers seeded by the entry's name, scaled so that signals keep their size."""
    x = np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode())).standard_normal(shape).astype(np.float32)
    if key.endswith("running_var"):
        x = 1 + 0.1 * np.abs(x)
    elif len(shape) >= 2:
        x /= np.sqrt(prod(shape[1:]))
    elif key.endswith("weight"):
        x = 1 + 0.1 * x
    else:
        x = 0.1 * x
    return torch.from_numpy(np.asarray(x, np.float32))


def released_state(case: Case) -> dict[str, torch.Tensor]:
    """A state dict with the released network's names, filled by the rule. Integer buffers are left at zero."""
    whole = ("relative_position_index", "num_batches_tracked")
    return {key: torch.zeros(shape, dtype=torch.int64) if key.endswith(whole)
            else make_weight(case.spec["weight_seed"], key, shape) for key, shape in case.spec["keys"].items()}


def make_inputs(case: Case, vocab_size: int = 30522, words: int = 20):
    """The input rule of LAVT, MagNet and ReLA: image (B, 3, S, S) float32, ids (B, L) int64, words (B, L) bool."""
    config = case.spec.get("config", case.spec)
    batch, size, lens = case.spec["batch"], config["img"], case.spec["lens"]
    vocab_size = config.get("vocab") or config["bert"].get("vocab_size", vocab_size)
    r = np.random.RandomState(case.spec["input_seed"])
    image = r.standard_normal((batch, 3, size, size)).astype(np.float32)
    ids = r.randint(5, vocab_size, (batch, words))
    mask = np.arange(words)[None] < np.asarray(lens)[:, None]
    return torch.from_numpy(image), torch.from_numpy(ids * mask).long(), torch.from_numpy(mask)
