"""What lies on the Hugging Face Hub, fetched from a small server that answers as the Hub does: encoders, models, released weights, faults."""
from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from parity import load_case, released_state
from PIL import Image
from safetensors.torch import save_file
from test_magnet_sizes import config as magnet_sizes, released as magnet_state
from test_rivals import SMALL, small_network
from timm.models import _registry
from transformers import BertConfig, BertModel

from ris_nb.contract import RISError
from ris_nb.data.tokenizer import build_vocabulary, read_vocabulary
from ris_nb.data.writer import make_refshapes
from ris_nb.encoders.language import TextEncoder
from ris_nb.encoders.vision import Swin, ViT
from ris_nb.models.base import RISModel
from ris_nb.models.lavt import LAVT
from ris_nb.models.magnet import MagNet
from ris_nb.models.released_magnet import fetch_released
from ris_nb.models.sag import VIT_S
from ris_nb.recipes.released import RELEASED, released_model
from ris_nb.registry import _MODELS, create_model, load_model
from ris_nb.settings import BERT_BASE, SWIN_B, nested

WORDS = build_vocabulary(["the red ring", "the blue star"], 40)
COMMIT = "a" * 40
ROOT = Path(__file__).resolve().parents[1]


class Hub(BaseHTTPRequestHandler):
    """Two routes of the Hub: the files of a repository, and the list of them."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): pass

    def answer(self, status: int, content: bytes = b"", torn: bool = False, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:len(content) // 2] if torn else content)
            self.close_connection = torn

    def do_GET(self):
        files, torn = self.server.files, self.server.torn
        self.server.asked.append((self.command, self.path))
        if match := re.match(r"/api/models/([^/]+/[^/]+)/tree/", self.path):
            listed = [name.removeprefix(match[1] + "/") for name in files if name.startswith(match[1] + "/")]
            tree = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in listed]
            return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json") if tree else self.answer(404, X_Error_Code="RepoNotFound")
        match = re.match(r"/(.+)/resolve/[^/]+/(.+)", self.path)
        name = unquote(f"{match[1]}/{match[2]}") if match else ""  # a plus is %2B there
        if name not in files:
            there = match and any(file.startswith(match[1] + "/") for file in files)
            return self.answer(404, X_Error_Code="EntryNotFound" if there else "RepoNotFound")
        content, start = files[name], int((re.search(r"bytes=(\d+)-", self.headers.get("Range", "")) or "00")[1])
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        if self.command == "GET" and torn.get(name, 0) > 0:
            torn[name] -= 1
            return self.answer(200, content, torn=True, ETag=tag)
        where = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self.answer(206 if start else 200, content[start:], ETag=tag, **where)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server; `hub.put("owner/name", folder)` gives it files. All of the Hub's clients in this process ask it, with an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.torn, server.asked = {}, {}, []
    server.put = lambda repo, folder: server.files.update(
        {f"{repo}/{file.relative_to(folder).as_posix()}": file.read_bytes() for file in folder.rglob("*") if file.is_file()})
    endpoint, cache = f"http://127.0.0.1:{server.server_port}", tmp_path / "cache"
    for name, value in {"ENDPOINT": endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
                        "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    from huggingface_hub import hf_api
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def one_line(call) -> str:
    with pytest.raises(RISError) as caught:
        call()
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)


def small_bert(folder, **sizes):
    torch.manual_seed(1)
    bert = BertModel(BertConfig(**{**dict(vocab_size=30522, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24,
                                          max_position_embeddings=40), **sizes})).eval()
    bert.save_pretrained(folder)
    return bert


def small_timm(monkeypatch, hub, name: str, repo: str, folder, **sizes):
    """Let timm's `name` be of other sizes, its weights in `repo`: all of timm's own way to them is walked."""
    make, arch = _registry._model_entrypoints[name.partition(".")[0]], name.partition(".")[0]
    monkeypatch.setitem(_registry._model_entrypoints, arch, lambda pretrained=False, **given: make(pretrained, **{**sizes, **given}))
    config = _registry._model_pretrained_cfgs[name]
    torch.manual_seed(2)
    model = timm.create_model(arch, num_classes=config.num_classes)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    hub.put(config.hf_hub_id or repo, folder)
    return model


def same(ours, theirs):
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


SWIN = "swin_base_patch4_window12_384.ms_in22k"
VIT = "vit_small_patch16_384.augreg_in21k_ft_in1k"
SMALL_SWIN = dict(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), window_size=4, img_size=128)
SMALL_VIT = dict(embed_dim=24, depth=2, num_heads=2)


def test_bert(hub, tmp_path):
    bert = small_bert(tmp_path / "bert")
    hub.put("somebody/bert", tmp_path / "bert")
    encoder = TextEncoder.from_pretrained("somebody/bert").eval()
    ids = torch.randint(0, 90, (2, 6))
    torch.testing.assert_close(encoder(ids, torch.ones_like(ids).bool()), bert(ids).last_hidden_state, atol=1e-6, rtol=0)
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    hub.put("somebody/gpt", tmp_path / "gpt")
    assert "type gpt2" in one_line(lambda: TextEncoder.from_pretrained("somebody/gpt"))
    assert "no pretrained BERT at 'nobody/bert'" in one_line(lambda: TextEncoder.from_pretrained("nobody/bert"))


def test_swin_and_vit_through_timm(hub, tmp_path, monkeypatch):
    swin = small_timm(monkeypatch, hub, SWIN, "timm/swin", tmp_path / "swin", **SMALL_SWIN)
    vit = small_timm(monkeypatch, hub, VIT, "timm/vit", tmp_path / "vit", **SMALL_VIT)
    same(Swin.from_pretrained(SWIN), Swin.from_timm(swin))
    same(ViT.from_pretrained(VIT), ViT.from_timm(vit))
    assert ViT.from_pretrained(VIT, image_size=96).patch_embed.grid_size == (6, 6)


PARTS = {"lavt_swin_base": ("encoder.vision", "text"), "magnet_swin_base": ("encoder.vision", "encoder.text"), "sag_vit_small": ("vision", "text"),
         "sag_vit_small_scripts": ("vision", "text")}
_ATTENTION = dict(heads=1, head_width=8, ffn=16)
LITTLE = {"lavt_swin_base": dict(decoder=dict(width=8)),
          "magnet_swin_base": dict(decoder=dict(width=8, heads=1, points=1, pixel_layers=1, pixel_ffn=8, layers=1, ffn=8)),
          "sag_vit_small_scripts": dict(slots=dict(_ATTENTION, width=16, iterations=1, self_heads=1, self_head_width=8), fusion=_ATTENTION,
                                        decoder=dict(width=8, table=30))}
LITTLE["sag_vit_small"] = nested(LITTLE["sag_vit_small_scripts"], {"slots.gaussians": 2, "slots.per_gaussian": 2})


@pytest.mark.parametrize("name", PARTS)
def test_pretrained_presets_honour_what_they_are_asked(name, hub, tmp_path, monkeypatch):
    """Encoders of test size stand in for Swin-B, ViT-S and BERT-base; all else is the presets' own way."""
    small_bert(tmp_path / "bert")
    hub.put("bert-base-uncased", tmp_path / "bert")
    for size, value in dict(width=16, layers=4, heads=2, ffn=24, max_positions=40).items():
        monkeypatch.setitem(BERT_BASE, size, value)
    for size, value in dict(width=8, depths=(1, 1, 2, 1), heads=(1, 2, 2, 4), window=4).items():
        monkeypatch.setitem(SWIN_B, size, value)
    for size, value in dict(width=24, depth=2, heads=2).items():
        monkeypatch.setitem(VIT_S, size, value)
    small_timm(monkeypatch, hub, SWIN, "timm/swin", tmp_path / "swin", **SMALL_SWIN)
    small_timm(monkeypatch, hub, VIT, "timm/vit", tmp_path / "vit", **SMALL_VIT)
    asked = nested(LITTLE[name], {"vision.drop_path": 0.05, "text.dropout": 0.2, "image_size": 64, "max_words": 9})
    model = create_model(name, pretrained=True, **asked)
    vision, text = (model.get_submodule(part) for part in PARTS[name])
    same(text, TextEncoder.from_pretrained("bert-base-uncased"))
    same(vision, ViT.from_pretrained(VIT, image_size=480) if name.startswith("sag") else Swin.from_pretrained(SWIN))
    rates = [part.drop_prob for part in vision.modules() if type(part).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.05) and text.bert.embeddings.dropout.p == 0.2
    model.eval().save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert nested(config, asked) == config and config["vocabulary"] == "bert-base-uncased"
    again = load_model(tmp_path / "saved")
    same(again, model)
    photo = np.zeros((40, 50, 3), np.uint8)
    assert (model.predict([photo], ["the red ring"])[0] == again.predict([photo], ["the red ring"])[0]).all()
    before = len(hub.asked)
    for wrong in ({"text.layers": 8}, {"vocabulary": WORDS}, {"vision.width": 30} if name.startswith("sag") else {"vision.depths": (1, 1, 4, 1)}):
        assert f"{next(iter(wrong))}=" in one_line(lambda: create_model(name, pretrained=True, **nested(asked, wrong)))
    assert len(hub.asked) == before  # refused before anything is fetched


def test_models_by_their_name_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = create_model("lavt_tiny", vocabulary=WORDS, freeze=["text"]).eval()
    model.save_pretrained(tmp_path / "saved")
    hub.put("somebody/lavt", tmp_path / "saved")
    hub.files["somebody/strange/config.json"] = b'{"hidden_size": 3}'
    hub.files["somebody/half/config.json"] = (tmp_path / "saved" / "config.json").read_bytes()
    for loaded in (load_model("somebody/lavt"), LAVT.from_pretrained("somebody/lavt")):
        same(loaded, model)
        assert loaded.frozen == ("text",) and not loaded.training
    assert "RISModel was asked for" in one_line(lambda: RISModel.from_pretrained("somebody/lavt"))
    assert "the model LAVT, but MagNet" in one_line(lambda: MagNet.from_pretrained("somebody/lavt"))
    assert "another library" in one_line(lambda: load_model("somebody/strange"))
    assert "no such file" in one_line(lambda: load_model("somebody/half"))
    missing = one_line(lambda: load_model("nobody/nothing"))
    assert "no folder here" in missing and "magnet_tiny" in missing and "no such repository" in missing
    (tmp_path / "somebody" / "lavt").mkdir(parents=True)  # a folder comes before the Hub
    assert "no config.json" in one_line(lambda: load_model("somebody/lavt"))


def test_a_torn_download_is_taken_up_again(hub, tmp_path):
    create_model("lavt_tiny", vocabulary=WORDS).save_pretrained(tmp_path / "saved")
    hub.put("somebody/lavt", tmp_path / "saved")
    hub.torn["somebody/lavt/model.safetensors"] = 1
    same(load_model("somebody/lavt"), load_model(tmp_path / "saved"))
    assert hub.torn["somebody/lavt/model.safetensors"] == 0


def test_released_weights(hub, tmp_path):
    torch.save({"model": released_state(load_case("magnet_tiny")), "epoch": 3}, tmp_path / "magnet.pth")
    hub.files["yxchng/one/weights.pth"] = hub.files["yxchng/two/a.pth"] = hub.files["yxchng/two/b.pth"] = (tmp_path / "magnet.pth").read_bytes()
    assert fetch_released("yxchng/one").read_bytes() == (tmp_path / "magnet.pth").read_bytes()
    same(MagNet.from_released("yxchng/two/b.pth", image_size=64), MagNet.from_released(tmp_path / "magnet.pth", image_size=64))
    assert "a.pth, b.pth" in one_line(lambda: fetch_released("yxchng/two"))
    missing = one_line(lambda: fetch_released("yxchng/one/other.pth"))
    assert "no such file" in missing and "name one of those that it has: weights.pth" in missing
    assert "no such repository" in one_line(lambda: fetch_released("yxchng/three"))


@pytest.fixture
def released_files(hub, tmp_path):
    """A small MagNet with random weights and BERT's words under each name of the authors' files."""
    spec = magnet_sizes(decoder_width=64, decoder_heads=8, decoder_groups=8, bert=dict(vocab_size=30_522, hidden_size=64, num_attention_heads=1))
    torch.save({"model": magnet_state(spec)}, tmp_path / "weights.pth")
    for name in ("magnet_refcoco", "magnet_refcoco+", "magnet_refcocog_umd", "magnet_refcocog_google", "magnet_all"):
        hub.files[f"yxchng/magnet_weights/{name}.pth"] = (tmp_path / "weights.pth").read_bytes()
    return tmp_path / "weights.pth"


def test_released_weights_by_their_names(hub, released_files, monkeypatch):
    assert len(RELEASED) == 5 and {f"yxchng/magnet_weights/{name}.pth" for name in RELEASED} == set(hub.files)
    for name in RELEASED:
        model = released_model(name)
        assert hub.asked[-1][1].startswith("/yxchng/magnet_weights/resolve/main/") and not model.training
        assert model.image_size == (448 if name == "magnet_all" else 480) and len(model.vocabulary) == 30_522
    same(load_model("released:magnet_all"), model)
    same(load_model(str(released_files)), model)
    assert load_model("released:magnet_all").image_size == 448 and load_model(released_files).image_size == 480
    asked = len(hub.asked)
    assert "divided twice; name magnet_refcocog_umd or magnet_refcocog_google" in one_line(lambda: load_model("released:magnet_refcocog"))
    assert "there are magnet_refcoco, magnet_refcoco+, " in one_line(lambda: released_model("magnet_refcocoo"))
    assert "no such checkpoint" in one_line(lambda: load_model(released_files.with_name("other.pth")))
    assert len(hub.asked) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert released_model("magnet_refcoco").image_size == 480  # fetched once, it is there without a network


def test_a_name_whose_file_is_gone_lists_those_that_are_there(hub, released_files):
    del hub.files["yxchng/magnet_weights/magnet_refcoco.pth"]
    missing = one_line(lambda: released_model("magnet_refcoco"))
    assert "yxchng/magnet_weights/magnet_refcoco.pth" in missing and "name one of those that it has: magnet_refcoco+.pth, magnet_refcocog_umd.pth" in missing


def test_released_weights_train_on(hub, released_files, tmp_path, monkeypatch):
    """From the authors' weights to a run of one's own: BERT's vocabulary, a new word predictor, and a folder that loads and resumes."""
    from ris_nb.cli.main import main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RELEASED, "magnet_refcoco", {"image_size": 64, "grounding": {"width": 32, "layers": 1, "heads": 2, "ffn": 32}})
    make_refshapes(tmp_path / "shapes", counts={"train": 6}, seed=0)
    command = "train --root shapes --from released:magnet_refcoco --batch-size 2 --val none --lr 1e-4 --steps"
    assert main(f"{command} 1".split()) == 0
    first, start = load_model("runs/magnet_refcoco_tuned"), load_model("released:magnet_refcoco")
    assert first.image_size == 64 and len(first.vocabulary) == 30_522 and first.vocabulary == start.vocabulary
    moved = [name for (name, a), b in zip(first.named_parameters(), start.parameters(), strict=True) if not torch.equal(a, b)]
    assert any(name.startswith("encoder.vision") for name in moved)
    assert max((a - b).abs().max() for a, b in zip(first.parameters(), start.parameters(), strict=True)) < 1e-2  # a step away
    log = (tmp_path / "runs/magnet_refcoco_tuned/log.jsonl").read_text()
    assert "grounding" in log  # the word predictor, which the authors' file doesn't have
    assert first.predict([np.zeros((40, 50, 3), np.uint8)], ["the dog"])[0].shape == (40, 50)
    assert main(f"{command} 1 --out again".split()) == 0
    same(load_model("again"), first)  # also the word predictor begins as the seed says
    assert main(["train", "--root", "shapes", "--from", str(released_files), "--dry-run"]) == 0


@pytest.mark.parametrize("name", SMALL)
def test_models_that_others_trained(name, hub, tmp_path, monkeypatch):
    """Weights and tokenizer by the name of their repository, through the command line too."""
    from ris_nb.cli.main import main
    from ris_nb.models.pretrained import READY, ready_model
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    network = small_network(name, tmp_path / "there")
    hub.put(READY[name], tmp_path / "there")
    model = create_model(name, pretrained=True)
    same(model.network, network)
    assert not model.training and "ring</w>" in model.vocabulary
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3)).astype(np.uint8)).save("photo.png")
    assert main(["predict", "photo.png", "the red ring", "--model", name]) == 0
    mask, = ready_model(name).predict(["photo.png"], ["the red ring"])
    assert (np.asarray(Image.open("photo_mask.png")) == 255 * mask).all()
    if name == "groupvit":
        assert "of 32 pixels and no others" in one_line(lambda: create_model(name, pretrained=True, image_size=64))
    hub.files.clear()
    assert "no such repository" in one_line(lambda: type(model).from_hub("nobody/nothing"))


@pytest.mark.parametrize("call", [
    lambda: load_model("somebody/model"), lambda: LAVT.from_pretrained("somebody/model"), lambda: read_vocabulary("somebody/words"),
    lambda: fetch_released("somebody/weights/a.pth"), lambda: TextEncoder.from_pretrained("somebody/bert"),
    lambda: create_model("lavt_swin_base", pretrained=True)])
def test_out_of_reach(call, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "can't be fetched from the Hugging Face Hub" in one_line(call)


def test_every_model_is_built_without_a_network(monkeypatch):
    from ris_nb.data import tokenizer
    from ris_nb.registry import list_models

    def network(*_, **__):
        raise AssertionError("asked the network")

    monkeypatch.setattr(tokenizer, "hf_hub_download", network)
    for name in list_models():
        with torch.device("meta"):
            model = create_model(name)
        ours = _MODELS[name].__module__.startswith("ris_nb.")  # other tests register models of their own
        if ours and not name.endswith(("tiny", "toys")):
            if name == "lavt_photo":  # the first pieces of BERT's
                assert len(model.vocabulary) == 10_000
                continue
            vocabulary = (49408, "clip-bpe") if name.startswith("cris") else (30522, "bert-base-uncased")
            assert (len(model.vocabulary), model._hub_mixin_config["vocabulary"]) == vocabulary


def test_shapes_without_weights_in_a_fresh_process():
    """Here the module is imported while "meta" is set, as by `ris-nb train --pretrained`; PyTorch 2.8 can't import its compiler so."""
    program = "import torch; from ris_nb.registry import create_model\nwith torch.device('meta'): print(next(create_model('sag_tiny').parameters()).device.type)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout == "meta\n", done.stderr


@pytest.mark.parametrize("call, module", [
    (lambda: TextEncoder.from_pretrained("somebody/bert"), "transformers.AutoConfig.from_pretrained"), (lambda: Swin.from_pretrained(SWIN), "timm.create_model"),
    (lambda: fetch_released("a/b/c.pth"), "ris_nb.models.released_magnet.hf_hub_download"), (lambda: read_vocabulary("a/b"), "ris_nb.data.tokenizer.hf_hub_download")])
def test_a_bug_is_no_network_problem(call, module, monkeypatch):
    def bug(*_, **__):
        raise KeyError("a bug")

    monkeypatch.setattr(module, bug)
    with pytest.raises(KeyError):
        call()
