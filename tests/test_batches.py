"""Faults and promises of batches, checkpoints and models' names that a notebook should not carry."""
from __future__ import annotations

import json
import os
import pickle
import random
import signal
import struct
import sys
import traceback
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ris_nb import registry
from ris_nb.checkpoint import replacing
from ris_nb.contract import Batch, Output, RISError
from ris_nb.data import tokenizer
from ris_nb.data.batches import IMAGENET_MEAN, IMAGENET_STD, DrawSampler, ReferralDataset, Transform, make_loader
from ris_nb.data.images import read_image
from ris_nb.data.refer import Referral, Sentence
from ris_nb.data.tokenizer import SPECIAL, Tokenizer, build_vocabulary, read_vocabulary
from ris_nb.models.base import RISModel, evaluating
from ris_nb.registry import _CLASSES, create_model, list_models, load_model

SHARED = Path(__file__).resolve().parents[2] / "shared"
BERT = SHARED / "data" / "bert-base-uncased-vocab.txt"
COCO = SHARED / "data" / "mini_refcoco"
WORDS = [*SPECIAL, "the", "red", "ring", "left", "##most"]


class Mean(RISModel):
    """The smallest model with weights: score = mean of the sentence's table rows + mean of the pixel's channels."""

    def __init__(self, width: int = 2, **shared):
        super().__init__(**shared)
        self.word = nn.Embedding(len(self.vocabulary), width)
        self.drop = nn.Dropout(0.5)

    def forward(self, batch):
        pixels = batch.image.mean(1)
        pixels = pixels if batch.which is None else pixels[batch.which]
        return Output(score=self.drop(pixels) + self.word(batch.ids).mean((1, 2))[:, None, None])

    def masks(self, output, sizes):
        return [nn.functional.interpolate(s[None, None], size=tuple(size))[0, 0] > 0 for s, size in zip(output.score, sizes)]


def one_line(call) -> str:
    with pytest.raises(RISError) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def referrals(tmp_path):
    """Six objects on four images, with one to three sentences and an outline each."""
    found = []
    for i in range(6):
        path = tmp_path / f"{i % 4}.png"
        if not path.exists():
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
        sentences = tuple(Sentence(f"the red ring {'left ' * k}".strip(), kind="toy", sent_id=k) for k in range(1 + i % 3))
        box = [2.0 * i, 3.0, 2.0 * i + 20, 3.0, 2.0 * i + 20, 30.0, 2.0 * i, 30.0]
        found.append(Referral(i, i % 4, path, (40, 50), "thing", "train", sentences, None, [box]))
    return found


# -- images ---------------------------------------------------------------------------------------------------------------

def test_broken_files_are_named_in_one_line(tmp_path, photo):
    for suffix, options in ((".jpg", {"quality": 90}), (".png", {}), (".webp", {})):
        whole = tmp_path / f"whole{suffix}"
        Image.open(photo).save(whole, **options)
        half = tmp_path / f"half{suffix}"
        half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        assert half.name in one_line(lambda: read_image(half))
    for name, content in (("text.jpg", b"not a picture"), ("empty.png", b""), ("zeros.bmp", bytes(500))):
        (tmp_path / name).write_bytes(content)
        assert name in one_line(lambda: read_image(tmp_path / name))
    assert "gone.jpg" in one_line(lambda: read_image(tmp_path / "gone.jpg"))
    assert "is a folder" in one_line(lambda: read_image(tmp_path))
    one_line(lambda: read_image(np.zeros((3, 8, 8), np.uint8)))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_corrupt_bytes_never_escape_as_another_error(tmp_path, photo):
    dice = random.Random(0)
    for suffix in (".jpg", ".png", ".gif", ".tif"):
        good = tmp_path / f"good{suffix}"
        Image.open(photo).save(good)
        for _ in range(40):
            data = bytearray(good.read_bytes())
            for _ in range(dice.randrange(1, 30)):
                data[dice.randrange(len(data))] = dice.randrange(256)
            (tmp_path / f"bad{suffix}").write_bytes(data)
            try:
                assert read_image(tmp_path / f"bad{suffix}").mode == "RGB"
            except RISError as error:
                assert "\n" not in str(error)


def test_decompression_bombs_are_refused(tmp_path):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    for side in (10_000, 30_000):  # PIL warns of the first and refuses the second
        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b""))
        assert "bomb" in one_line(lambda: read_image(tmp_path / "bomb.png"))


def test_every_way_of_storing_colours_becomes_rgb(tmp_path, photo):
    for mode, name in (("L", "l.png"), ("LA", "la.png"), ("RGBA", "rgba.png"), ("P", "p.gif"), ("CMYK", "cmyk.jpg"), ("1", "one.png")):
        Image.open(photo).convert(mode).save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert (image.mode, image.size) == ("RGB", (80, 60))
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    assert "8 bits" in one_line(lambda: read_image(tmp_path / "deep.png"))
    image = read_image(photo)
    assert read_image(image) is image  # no needless copy


def test_stored_pixels_stay_unless_asked_upright(tmp_path):
    image, exif = Image.new("RGB", (30, 20)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "phone.jpg", exif=exif)
    assert read_image(tmp_path / "phone.jpg").size == (30, 20)
    assert read_image(tmp_path / "phone.jpg", upright=True).size == (20, 30)


# -- words ----------------------------------------------------------------------------------------------------------------

def test_empty_endless_and_odd_expressions():
    tokenizer = Tokenizer(WORDS)
    for nothing in ("", "  ", "\n", "\x00"):
        one_line(lambda: tokenizer([nothing]))
    one_line(lambda: tokenizer([None]))
    for endless in ("x" * 10_000, "ring " * 2_000, "leftmost" * 2_000, "é" * 10_000):
        ids, words = tokenizer([endless])
        assert ids.shape == words.shape == (1, 20)
    assert tokenizer.pieces("[MASK] the ring") == ["[CLS]", "[UNK]", "[UNK]", "[UNK]", "the", "ring", "[SEP]"]
    assert tokenizer.unknown("the dog, leftmost") == ["dog", ","]


def test_ids_equal_those_of_transformers():
    if not BERT.is_file():
        pytest.skip(f"needs {BERT.name}")
    from transformers import BertTokenizer

    theirs, ours = BertTokenizer(str(BERT)), Tokenizer(BERT, length=20)
    texts = ["The man on the left", "woman w/ unbelievably reddish hair!", "naïve café Ångström", "中文 and ½ pizza", "a" * 200,
             "  spaces\tand\nlines ", "left-most one, isn't it?", " ".join(["zebra"] * 40), "e\u0301lan \u200b vital", "#@!"]
    if COCO.is_dir():
        from ris_nb.data.sources import open_data

        texts += [s.text for r in open_data(COCO, "refcocog", "umd").referrals("val") for s in r.sentences]
    for text in texts:
        expected = theirs(text)["input_ids"][:20]
        ids, words = ours([text])
        assert ids[0, : len(expected)].tolist() == expected and words.sum() == len(expected), text
    assert len(ours.vocabulary) == 30522


def test_vocabularies_that_cannot_be_had(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(tokenizer, "hf_hub_download", offline)
    assert "vocab.txt" in one_line(lambda: read_vocabulary("roberta-base"))
    one_line(lambda: read_vocabulary(tmp_path / "gone.txt"))
    (tmp_path / "words.txt").write_text("the\nred\n")
    assert "lacks [PAD]" in one_line(lambda: read_vocabulary(tmp_path / "words.txt"))
    (tmp_path / "weights.bin").write_bytes(b"\x80\x02\xff\n")
    assert "no UTF-8 text" in one_line(lambda: read_vocabulary(tmp_path / "weights.bin"))


def test_vocabulary_is_the_same_on_every_run():
    texts = [f"the {word} ring {i}" for i in range(60) for word in ("red", "green", "leftmost")]
    built = [build_vocabulary(random.Random(i).sample(texts, len(texts)), 60) for i in range(20)]
    assert all(pieces == built[0] for pieces in built) and len(built[0]) <= 60 and any("##" in p for p in built[0])


# -- batches --------------------------------------------------------------------------------------------------------------

def same(a: Batch, b: Batch) -> bool:
    tensors = all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("image", "ids", "words", "mask"))
    which = a.which is b.which if a.which is None else torch.equal(a.which, b.which)
    truth = a.truth is b.truth if a.truth is None else all(map(np.array_equal, a.truth, b.truth))
    return tensors and which and truth and (a.expression, a.image_id, a.size, a.kind) == (b.expression, b.image_id, b.size, b.kind)


@pytest.mark.parametrize("every", [False, True])
def test_same_batches_with_any_number_of_workers(referrals, every):
    dataset = ReferralDataset(referrals, Tokenizer(WORDS), Transform(16), every=every)
    runs = []
    for workers in (0, 1, 2):
        loader = make_loader(dataset, 2, seed=5, workers=workers)
        state = torch.get_rng_state()
        epochs = []
        for epoch in range(2):
            if not every:
                loader.sampler.set_epoch(epoch)
            epochs += list(loader)
        assert torch.equal(state, torch.get_rng_state())  # loading leaves the global generator alone
        runs.append(epochs)
    for other in runs[1:]:
        assert len(other) == len(runs[0]) and all(map(same, runs[0], other))
    if every:
        batch = runs[0][0]
        assert batch.which.tolist() == [0] * 3 + [1] * 5  # objects 0 and 4 on the first image, 1 and 5 on the second
        assert all(t.shape == (40, 50) and t.dtype == bool for t in batch.truth)
    else:
        assert runs[0][0].which is None and runs[0][0].truth is None


def test_evaluation_sees_every_sentence_once(referrals):
    dataset = ReferralDataset(referrals, Tokenizer(WORDS), Transform(16), every=True)
    seen = []
    for batch in make_loader(dataset, 3):
        which = range(len(batch)) if batch.which is None else batch.which.tolist()
        seen += [(batch.image_id[n], expression) for n, expression in zip(which, batch.expression)]
    assert sorted(seen) == sorted((r.image_id, s.text) for r in referrals for s in r.sentences)


def test_masks_are_never_read_without_being_asked_for(referrals, monkeypatch):
    def explode(self):
        raise AssertionError("a mask was read")

    monkeypatch.setattr(Referral, "mask", explode)
    for every in (False, True):
        dataset = ReferralDataset(referrals, Tokenizer(WORDS), Transform(16), every=every, masks=False)
        for batch in make_loader(dataset, 2):
            assert batch.mask is None and batch.truth is None
    with pytest.raises(AssertionError):
        ReferralDataset(referrals, Tokenizer(WORDS), Transform(16))[0]


def test_referrals_without_what_they_need(referrals):
    def make(**changes):
        return lambda: ReferralDataset([*referrals, replace(referrals[0], **changes)], Tokenizer(WORDS), Transform(16))

    assert "referral 0 of 0.png" in one_line(make(segmentation=None))
    assert "referral 0 of 0.png" in one_line(make(sentences=()))
    assert "referral 0 of 0.png" in one_line(make(sentences=(Sentence("ring"), Sentence(" "))))
    one_line(lambda: ReferralDataset([], Tokenizer(WORDS), Transform(16)))
    assert "smaller batch" in one_line(lambda: make_loader(ReferralDataset(referrals, Tokenizer(WORDS), Transform(16)), 7))


def test_a_broken_image_is_named_from_inside_a_worker(referrals):
    referrals[2].image_path.write_bytes(b"gone")
    loader = make_loader(ReferralDataset(referrals, Tokenizer(WORDS), Transform(16), every=True), 2, workers=1)
    with pytest.raises(RISError, match="2.png"):
        list(loader)


def test_sampler_is_uniform_and_repeatable():
    sampler = DrawSampler(1000, seed=3)
    sampler.set_epoch(8)
    pairs = list(sampler)
    assert pairs == list(sampler) and sorted(i for i, _ in pairs) == list(range(1000))
    shares = np.bincount([draw % 3 for _, draw in pairs]) / 1000
    assert abs(shares - 1 / 3).max() < 0.05
    other = DrawSampler(1000, seed=8)
    other.set_epoch(3)
    assert list(other) != pairs  # seed and epoch are not merely added


def test_transform_equals_torchvision_on_pil_images():
    from torchvision.transforms import v2

    theirs = v2.Compose([v2.Resize((48, 48)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
                         v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (33, 90, 3), dtype=np.uint8))
    assert (theirs(image) - Transform(48).image(image)).abs().max() < 2e-6
    mask = np.random.default_rng(2).random((33, 90)) > 0.5
    exact = nn.functional.interpolate(torch.from_numpy(mask)[None, None].float(), size=(48, 48), mode="nearest-exact")[0, 0]
    assert torch.equal(Transform(48).mask(mask), exact.bool())
    assert torch.equal(Transform(48).mask(mask[::-1]), Transform(48).mask(mask[::-1].copy()))


# -- checkpoints ----------------------------------------------------------------------------------------------------------

def test_predict_answers_at_original_sizes_and_restores_modes(photo):
    model = Mean(image_size=16, vocabulary=WORDS).train()
    model.word.eval()
    array = np.zeros((7, 9, 3), np.uint8)
    answers = model.predict([photo, array, photo], ["red", "ring", "the ring"])
    assert [a.shape for a in answers] == [(60, 80), (7, 9), (60, 80)] and all(a.dtype == bool for a in answers)
    assert (model.training, model.word.training, model.drop.training) == (True, False, True)
    alone = model.predict([photo], ["the ring"])
    assert np.array_equal(alone[0], answers[2])
    for images, texts in ((photo, "ring"), ([photo], "ring"), ([photo], ["red", "ring"]), ([photo], [""]), ([], [])):
        one_line(lambda: model.predict(images, texts))
    with pytest.raises(RISError), evaluating(model):
        raise RISError("inside")
    assert model.training


def test_round_trip_is_complete_and_exact(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    model = Mean(3, image_size=16, vocabulary=tmp_path / "vocab.txt", mean=(0.5,) * 3, std=(0.5,) * 3, resolution="original")
    model.save_pretrained(tmp_path / "run")
    (tmp_path / "vocab.txt").unlink()
    for loaded in (load_model(tmp_path / "run"), Mean.from_pretrained(tmp_path / "run")):
        assert (loaded.vocabulary, loaded.mean, loaded.resolution, loaded.training) == (WORDS, (0.5,) * 3, "original", False)
        assert torch.equal(loaded.word.weight, model.word.weight)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json", "model.safetensors"]
    modes = {p.stat().st_mode for p in (tmp_path / "run").iterdir()}
    assert len(modes) == 1
    loaded.save_pretrained(tmp_path / "run")  # over itself
    assert json.loads((tmp_path / "run" / "config.json").read_text())["vocabulary"] == WORDS


def test_checkpoints_that_do_not_fit(tmp_path):
    run = tmp_path / "run"
    Mean(image_size=16, vocabulary=WORDS).save_pretrained(run)
    good, config = (run / "model.safetensors").read_bytes(), (run / "config.json").read_text()

    def refused(weights=good, settings=config):
        (run / "model.safetensors").write_bytes(weights)
        (run / "config.json").write_text(settings)
        return one_line(lambda: load_model(run))

    class Loud:
        def __reduce__(self):
            return print, ("a pickle was run",)

    assert "pickled" in refused(weights=pickle.dumps(Loud()))
    refused(weights=b"")
    refused(weights=good[:-3])
    refused(weights=struct.pack("<Q", 2**40) + good[8:])
    refused(weights=struct.pack("<Q", 2**64 - 1) + good[8:])
    assert "misshapen (word.weight is (10, 2) and should be (10, 5))" in refused(settings=config.replace('"width": 2', '"width": 5'))
    assert "holds the model Stranger" in refused(settings=config.replace("Mean", "Stranger"))
    assert "another library" in refused(settings='{"hidden_size": 768}')
    assert "fit" in refused(settings=config.replace('"width"', '"breadth"'))
    for broken in ("", "{", "[1]", "null", '"text"'):
        refused(settings=broken)
    (run / "config.json").write_text(config)
    (run / "model.safetensors").unlink()
    assert "incomplete" in one_line(lambda: load_model(run))
    one_line(lambda: load_model(tmp_path / "nowhere"))
    one_line(lambda: load_model(__file__))


def test_missing_and_unknown_weights_are_named(tmp_path):
    from safetensors.torch import save_file

    run = tmp_path / "run"
    Mean(image_size=16, vocabulary=WORDS).save_pretrained(run)
    save_file({f"layer.{i}": torch.ones(1) for i in range(9)}, run / "model.safetensors")
    message = one_line(lambda: load_model(run))
    assert "1 missing (word.weight)" in message and "9 unknown (layer.0, layer.1, layer.2, ...)" in message


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_unknown_names_and_chapters():
    pytest.importorskip("ris_nb.models.lavt")
    assert "lavt_tiny" in list_models()
    assert "lavt_tiny" in one_line(lambda: create_model("lavt_tinny"))
    assert in_child(find_in_a_chapter) == 0


def find_in_a_chapter():
    for name in [name for name in sys.modules if name.split(".")[0] == "ris_nb"]:
        del sys.modules[name]
    from ris_nb.registry import create_model
    assert "ris_nb.models.lavt" not in sys.modules
    assert type(create_model("lavt_tiny", vocabulary="[PAD] [UNK] [CLS] [SEP] [MASK] red".split())).__name__ == "LAVT"


def in_child(function) -> int:
    """Run `function` in a forked process, which shares nothing it writes; the exit status."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # a forked process can't start more: with two, it would wait for one that isn't there
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_full_disk_leaves_the_good_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")
    run, state = tmp_path / "run", tmp_path / "run" / "state.pt"
    model = Mean(20_000, image_size=8, vocabulary=WORDS)  # 800 kB of weights

    def save_state():
        with replacing(state) as path:
            torch.save(model.state_dict(), path)

    model.save_pretrained(run)
    save_state()
    before = model.word.weight.detach().clone()

    def fill_the_disk():  # files may not grow beyond 100 kB from here on
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        model.word.weight.data.zero_()
        assert f"can't write {run / 'model.safetensors'}" in one_line(lambda: model.save_pretrained(run))
        assert f"can't write {state}" in one_line(save_state)

    assert in_child(fill_the_disk) == 0
    assert torch.equal(load_model(run).word.weight, before) and torch.equal(torch.load(state)["word.weight"], before)
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "model.safetensors", "state.pt"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    one_line(lambda: Mean(image_size=8, vocabulary=WORDS).save_pretrained(tmp_path / "file" / "run"))
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_kill_while_saving_leaves_the_good_file(tmp_path):
    target = tmp_path / "state.txt"
    target.write_text("good")

    def killed():
        with replacing(target) as path:
            path.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == signal.SIGKILL
    assert target.read_text() == "good"
    with replacing(target) as path:  # what the kill left is no obstacle
        path.write_text("better")
    assert [p.name for p in tmp_path.iterdir()] == ["state.txt"] and target.read_text() == "better"


def test_a_name_belongs_to_one():
    with pytest.raises(RISError, match="the name belongs to"):
        type("Mean", (RISModel,), {"__module__": "elsewhere"})
    again = type("Mean", (RISModel,), {"__module__": Mean.__module__})  # the same definition, run again
    assert _CLASSES["Mean"] is again
    _CLASSES["Mean"] = Mean
    assert "no argument 'widht'; it takes image_size" in one_line(lambda: create_model("lavt_tiny", widht=3))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ris_nb.models.lavt", None)
    monkeypatch.setattr(registry, "_MODELS", {})
    monkeypatch.setattr(registry, "import_module", lambda name: exec("raise ModuleNotFoundError('', name='timm.models')"))
    assert "lavt_tiny needs the package timm" in one_line(lambda: create_model("lavt_tiny"))
    assert "lavt_tiny" in list_models()


# -- models from elsewhere ------------------------------------------------------------------------------------------------

GREY = """
from ris_nb import Output, RISModel, register_model
import torch

class Grey{name}(RISModel):
    def __init__(self, level=0.5, **shared):
        super().__init__(**shared)
        self.level = torch.nn.Parameter(torch.tensor(level))

    def forward(self, batch):
        return Output(self.level - batch.image.mean(1))

@register_model
def grey_{name}(pretrained=False, **overrides):
    return Grey{name}(**{{"image_size": 8, "vocabulary": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dark"], **overrides}})
"""


def test_a_file_of_ones_own(tmp_path):
    file = tmp_path / "my model.py"
    file.write_text(GREY.format(name="filed"))
    registry.import_file(file)
    registry.import_file(str(file))  # again is no conflict
    assert "grey_filed" in list_models()
    model = create_model("grey_filed", level=0.25)
    model.save_pretrained(tmp_path / "run")
    assert load_model(tmp_path / "run").level == 0.25
    assert "no argument 'levle'; it takes level" in one_line(lambda: create_model("grey_filed", levle=1))
    assert "no argument 'image_sise'; it takes image_size" in one_line(lambda: create_model("grey_filed", image_sise=1))
    other = tmp_path / "other.py"
    other.write_text(GREY.format(name="filed"))
    assert "the name belongs to" in one_line(lambda: registry.import_file(other))
    other.write_text("from ris_nb import register_model\n\n@register_model\ndef lavt_tiny(pretrained=False): pass\n")
    assert "the name belongs to" in one_line(lambda: registry.import_file(other))
    for text, fault in (("x = (", "line 1: SyntaxError"), ("\n\nimport no_such_package", "line 3: ModuleNotFoundError"), ("raise ValueError('a\\nb')", "ValueError: a;")):
        other.write_text(text)
        assert fault in one_line(lambda: registry.import_file(other))
    assert "no such file" in one_line(lambda: registry.import_file(tmp_path / "gone.py"))
    assert "no Python file" in one_line(lambda: registry.import_file(tmp_path))


def test_entry_points_of_installed_packages(tmp_path, monkeypatch):
    def install(name: str, text: str):
        (tmp_path / f"{name}.py").write_text(text)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[ris_nb.models]\n{name} = {name}\n")

    monkeypatch.syspath_prepend(tmp_path)
    install("packaged_grey", GREY.format(name="packaged"))
    assert type(create_model("grey_packaged")).__name__ == "Greypackaged" and "grey_packaged" in list_models()
    create_model("grey_packaged").save_pretrained(tmp_path / "run")
    assert load_model(tmp_path / "run").image_size == 8
    install("broken_grey", "1 / 0")
    assert "broken_grey = broken_grey can't be imported (ZeroDivisionError: division by zero)" in one_line(list_models)
    assert "broken_grey" in one_line(lambda: create_model("grey_nowhere"))
    assert type(create_model("grey_packaged")).__name__ == "Greypackaged"  # what is known needs no other package


def test_tokenizers_of_other_kinds(tmp_path, monkeypatch):
    from tokenizers import Tokenizer as Fast, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = ["the red ring", "the big blue star", "left of the ring"] * 4
    for kind, trainer in ((models.BPE(), trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>"], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())),
                          (models.Unigram(), trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>", "<pad>"], unk_token="<unk>", show_progress=False))):
        core = Fast(kind)
        core.pre_tokenizer = pre_tokenizers.ByteLevel() if isinstance(kind, models.BPE) else pre_tokenizers.Metaspace()
        core.train_from_iterator(texts, trainer)
        place = tmp_path / type(kind).__name__
        PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(place)
        for source in (place, str(place), place / "tokenizer.json"):
            ours = Tokenizer(source, 12)
            ids, words = ours(["the red ring"])
            assert ids[0, words[0]].tolist() == core.encode("the red ring").ids and ids.shape == (1, 12)
            assert ids[0, ~words[0]].tolist() == [core.token_to_id("<pad>")] * int((~words).sum())
            assert "says nothing" in one_line(lambda: ours([" "]))
        model = Mean(image_size=16, vocabulary=place, max_words=9)
        model.save_pretrained(tmp_path / "run")
        assert json.loads((tmp_path / "run" / "config.json").read_text())["vocabulary"] == "tokenizer.json"
        loaded = load_model(tmp_path / "run")
        assert loaded.tokenizer.pieces("the red ring") == model.tokenizer.pieces("the red ring") and torch.equal(loaded.word.weight, model.word.weight)
        assert Mean(image_size=16, vocabulary=loaded.vocabulary).tokenizer.pieces("left") == model.tokenizer.pieces("left")
    (tmp_path / "broken.json").write_text("{}")
    assert "no tokenizer.json" in one_line(lambda: Tokenizer(tmp_path / "broken.json"))
    (tmp_path / "empty").mkdir()
    assert "no fast tokenizer there" in one_line(lambda: Tokenizer(tmp_path / "empty"))


def test_a_model_that_lacks_a_method_says_so(photo):
    model = Mean(image_size=16, vocabulary=WORDS)
    assert "Mean has no losses: a model must define" in one_line(lambda: model.losses(None, None))
    empty = type("Empty", (RISModel,), {"__module__": __name__})(image_size=16, vocabulary=WORDS)
    assert "Empty has no forward" in one_line(lambda: empty.predict([photo], ["red"]))


def test_an_item_of_training_may_be_an_image_with_some_of_its_sentences(referrals):
    path = referrals[0].image_path
    group = [replace(r, ref_id=k, image_path=path, sentences=tuple(Sentence(f"{k} {n}") for n in range(3))) for k, r in enumerate(referrals[:3])]
    dataset = ReferralDataset(group, Tokenizer(WORDS), Transform(16), sentences=4)
    assert len(dataset) == 1
    drawn = [dataset[0, draw].expression for draw in range(40)]
    assert all(len(set(texts)) == 4 and {text[0] for text in texts[:3]} == set("012") for texts in drawn)  # each thing in turn
    assert {text for texts in drawn for text in texts} == {f"{k} {n}" for k in range(3) for n in range(3)}
    assert dataset[0, 7].expression == drawn[7] and len({tuple(texts) for texts in drawn}) > 20
    assert len(ReferralDataset(group, Tokenizer(WORDS), Transform(16), sentences=20)[0, 1]) == 9
