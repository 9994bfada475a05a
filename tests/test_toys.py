"""The world of toys: the same everywhere, everything visible, rare words rare, unseen pairs unseen."""
import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ris_nb.contract import RISError
from ris_nb.data.shapes import Dice
from ris_nb.data.toys import (_PARTS, _TWO_FACED, GROUNDS, LIVING, RARE, TEXTURES, TOY_COLOURS, TOY_KINDS, TOY_SIZES, TOY_SPLITS, UNSEEN, _draw_toys,
                              _inside, _placed, _stencil, make_toys)

# If one of these changes, every score on toys refers to other data: say so in the changelog.
FINGERPRINTS = {("train", 96): "7128eec7248821a2", ("testC", 96): "d5f17ab4f467ca46", ("testR", 150): "4aca8945692faf06"}


def fingerprint(split, size, count=12):
    digest = hashlib.sha256()
    for index in range(count):
        scene = make_toys(0, size, split, index)
        digest.update(scene.image.tobytes() + np.packbits(scene.masks).tobytes() + repr((scene.ground, scene.things)).encode())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("split, size", FINGERPRINTS)
def test_pixels_masks_and_things_are_the_same_everywhere(split, size):
    assert fingerprint(split, size) == FINGERPRINTS[split, size]


def test_a_scene_depends_on_nothing_but_its_key():
    alone = make_toys(5, index=7)
    with ThreadPoolExecutor(4) as pool:
        crowd = list(pool.map(lambda i: make_toys(5, index=i), range(12)))
    assert (crowd[7].image == alone.image).all() and crowd[7].things == alone.things
    for other in (dict(seed=6), dict(split="val"), dict(index=8)):
        assert make_toys(**{"seed": 5, "index": 7, **other}).things != alone.things


def test_everything_is_visible_and_inside_the_frame():
    for index in range(60):
        scene = make_toys(4, index=index)
        assert 3 <= len(scene.things) <= 7 and scene.ground in GROUNDS and scene.image.dtype == np.uint8
        assert scene.masks.shape == (len(scene.things), 96, 96) and scene.masks.sum(0).max() == 1
        for toy, mask in zip(scene.things, scene.masks):
            full = _placed(toy, 96)[0].mask
            assert 5 * mask.sum() >= 3 * full.sum() and full.shape == (toy.height, toy.width)
            assert TOY_SIZES[toy.size][0] <= max(toy.width, toy.height) <= TOY_SIZES[toy.size][1]
            assert toy.colour != toy.accent and (toy.kind in _TWO_FACED or not toy.mirrored)
            assert toy.width // 2 <= toy.x <= 96 - toy.width // 2 and toy.height // 2 <= toy.y <= 96 - toy.height // 2
        feet = [toy.y - toy.height // 2 + toy.height for toy in scene.things]
        assert feet == sorted(feet)      # what is nearer is painted later


def test_nothing_is_of_two_sizes():
    limits = list(TOY_SIZES.values())
    assert list(TOY_SIZES) == ["small", "medium", "large"] and all(4 * low[0] >= 5 * high[1] for high, low in zip(limits, limits[1:]))


def test_each_split_shows_what_it_asks_for():
    for split in TOY_SPLITS:
        for index in range(150):
            things = _draw_toys(Dice(0, TOY_SPLITS.index(split), index, 2), split)
            assert {(t.colour, t.kind) for t in things}.isdisjoint(UNSEEN) == (split != "testC")
            assert split != "testA" or any(t.kind in LIVING for t in things)
            assert split != "testB" or any(t.kind not in LIVING for t in things)
            assert split != "testR" or any({t.kind, t.colour} & set(RARE) for t in things)
    assert {c for c, _ in UNSEEN} < set(TOY_COLOURS) and {k for _, k in UNSEEN} < set(TOY_KINDS) and set(LIVING) < set(TOY_KINDS)


def test_frequencies_fall_as_in_zipfs_law():
    toys = [t for index in range(2500) for t in _draw_toys(Dice(9, index), "train")]
    for of, names in (("kind", TOY_KINDS), ("colour", tuple(TOY_COLOURS)), ("texture", TEXTURES)):
        counts = Counter(getattr(t, of) for t in toys)
        law = 1 / np.arange(1, len(names) + 1)
        assert np.allclose([counts[name] / len(toys) for name in names], law / law.sum(), rtol=0.25), of
        assert set(RARE) & set(names) <= {name for name, _ in counts.most_common()[-len(names) // 3:]}


@pytest.mark.parametrize("kind", TOY_KINDS)
def test_a_kind_has_parts_in_two_colours_and_a_texture_on_the_main_one(kind):
    weights = {texture: _stencil(kind, 33, 96, texture).weights.astype(int) for texture in TEXTURES}
    shares = {texture: w.sum((0, 1)) / w.sum() for texture, w in weights.items()}       # tones: M T m A L a W K
    for share in shares.values():
        assert share[:3].sum() > 0.25 and share[3:6].sum() > 0.04
    assert shares["plain"][1] == 0 and all(0.03 < shares[texture][1] < 0.6 for texture in TEXTURES[1:])
    plain = _stencil(kind, 33, 96)
    turned = _stencil(kind, 33, 96, "plain", True)
    assert (turned.weights == plain.weights[:, ::-1]).all()
    if kind in _TWO_FACED:
        assert (turned.weights != plain.weights).any()
    wide, high, _ = _PARTS[kind]
    assert max(wide, high) == 100 and min(plain.mask.any(0).sum(), plain.mask.any(1).sum()) > 0.5 * 33 * min(wide, high) / 100


def test_forms_against_their_definitions():
    y, x = np.mgrid[-60:61, -60:61]
    oval = _inside("oval", [0, 0, 50, 30], x, y)
    assert (oval == ((x / 50) ** 2 + (y / 30) ** 2 <= 1 + 1e-12)).all()
    assert (_inside("dome", [0, 0, 50, 30], x, y) == oval & (y < 0)).all() and (_inside("bowl", [0, 0, 50, 30], x, y) == oval & (y > 0)).all()
    assert _inside("rect", [-10, -20, 10, 20], x, y).sum() == 20 * 40 == _inside("poly", [-10, -20, 10, -20, 10, 20, -10, 20], x, y).sum()


@pytest.mark.parametrize("size", [97, 150, 192, 240])
def test_any_size_draws_the_same_scene(size):
    for index in range(6):
        small, scene = make_toys(2, index=index), make_toys(2, size, index=index)
        assert (scene.things, scene.ground) == (small.things, small.ground) and scene.image.shape == (size, size, 3)
        assert scene.masks.shape == (len(scene.things), size, size) and scene.masks.sum(0).max() == 1
        assert np.allclose(scene.masks.mean((1, 2)), small.masks.mean((1, 2)), rtol=0.2, atol=1e-3)
        rows, columns = (np.arange(96) * 2 + 1) * size // 192, (np.arange(96) * 2 + 1) * size // 192
        assert np.abs(scene.image[rows][:, columns].astype(int) - small.image).mean() < 16


@pytest.mark.parametrize("arguments", [dict(size=95), dict(size=1025), dict(split="dev"), dict(seed=-1), dict(seed=2 ** 32), dict(index=-1)])
def test_bad_arguments_are_named(arguments):
    with pytest.raises(RISError):
        make_toys(**{"seed": 0, **arguments})
