"""What the chapter on full scale should not carry of fetching data: a server with every fault we know, hostile archives, kills."""
import hashlib
import io
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ris_nb.cli.main import main
from ris_nb.contract import RISError
from ris_nb.data import download as downloading
from ris_nb.data import prepare as preparing
from ris_nb.data.check import check_data
from ris_nb.data.download import Patience, read_mirrors, unpack
from ris_nb.data.prepare import Prepared, prepare
from ris_nb.data.sources import open_data

QUICK = Patience(timeout=0.4, pace=0, tries=3, wait=0.01, longest=0.2)


# ---- a server that does as it is told

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): pass

    def reply(self, status, body=b"", length=None, sent=None, **headers):
        self.send_response(status)
        for name, value in headers.items(): self.send_header(name.replace("_", "-"), value)
        if length != "none": self.send_header("Content-Length", len(body) if length is None else length)
        if length is not None or sent is not None: self.send_header("Connection", "close")
        self.end_headers()
        sent = body if sent is None else sent
        self.wfile.write(sent)
        self.wfile.flush()
        self.server.served[self.path] = self.server.served.get(self.path, 0) + len(sent)
        self.close_connection = length is not None or sent is not body

    def do_GET(self):
        server = self.server
        with server.lock:
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
            server.requests.append((self.path, self.headers.get("Range")))
            queue = server.faults.get(self.path, [])
            fault = queue if isinstance(queue, str) else queue.pop(0) if queue else None   # a string: always
        try:
            time.sleep(server.delay)
            self.answer(fault)
        except OSError:
            pass   # the client went away
        finally:
            with server.lock: server.busy -= 1

    def answer(self, fault):
        body = self.server.files.get(self.path)
        if fault and fault[:3].isdigit():
            status, _, wait = fault.partition(" after ")
            return self.reply(int(status), b"go away", **({"Retry_After": wait} if wait else {}))
        if fault and fault.startswith("to "): return self.reply(302, Location=fault[3:])
        if body is None: return self.reply(404, b"not here")
        status, headers, whole = 200, {}, body
        ask = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if ask and fault != "no range":
            start = int(ask[1])
            if start >= len(body): return self.reply(416, Content_Range=f"bytes */{len(body)}")
            said = start if fault != "wrong range" else 0
            status, headers, body = 206, {"Content_Range": f"bytes {said}-{len(body) - 1}/{len(body)}"}, body[start:]
        half = body[:(len(body) + 1) // 2]
        if fault == "stall": self.reply(status, body, sent=half, **headers); self.server.closing.wait(10)
        elif fault == "silence": self.server.closing.wait(10)
        elif fault == "hang up": self.close_connection = True
        elif fault == "cut": self.reply(status, body, sent=half, **headers)
        elif fault == "cut without a length": self.reply(status, body, length="none", sent=half, **headers)
        elif fault == "says more": self.reply(status, body, length=len(body) + 100, sent=body, **headers)
        elif fault == "says less": self.reply(status, half, **headers)
        elif fault == "corrupt": self.reply(status, bytes(b ^ 85 for b in body[:50]) + body[50:-50] + bytes(b ^ 85 for b in body[-50:]), **headers)
        elif fault == "page": self.reply(200, b"<!DOCTYPE html><html><body>Welcome to our hotel's network</body></html>")
        elif fault == "empty": self.reply(200)
        elif fault == "gzip": self.reply(200, __import__("gzip").compress(whole), Content_Encoding="gzip")
        elif fault == "no headers": self.wfile.write(b"what?\r\n\r\n"); self.close_connection = True
        elif fault == "endless":
            self.reply(200, b"", length="none", sent=b"x")
            for _ in range(2000): self.wfile.write(bytes(65536))
        elif fault == "drip":
            self.reply(status, body, sent=b"", **headers)
            for n in range(len(body)): self.wfile.write(body[n:n + 1]); self.wfile.flush(); time.sleep(0.02)
        else: self.reply(status, body, **headers)


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests, self.served = {}, {}, [], {}
        self.lock, self.closing, self.delay, self.busy, self.busiest = threading.Lock(), threading.Event(), 0.0, 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle_error(self, *args): pass

    def asked(self, path): return [ask for asked, ask in self.requests if asked == path]


@pytest.fixture
def server():
    running = Server()
    yield running
    running.closing.set()
    running.shutdown()
    running.server_close()


# ---- fake data sets

def jpeg(seed, size=(48, 64)):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)).save(buffer, "jpeg", quality=60)
    return buffer.getvalue()


def name_of(number): return f"COCO_train2014_{number:012d}.jpg"


def zipped(members, method=zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, body in members: archive.writestr(name, body)
    return buffer.getvalue()


def refer_files(photos=6, splits=("train", "val")):
    """refs and instances of a data set with two refs a photo."""
    box = [4, 4, 24, 4, 24, 20, 4, 20]
    refs = [dict(ref_id=n, ann_id=n, image_id=n // 2, category_id=1, split=splits[n // 2 % len(splits)],
                 sentences=[dict(sent_id=n, raw=f"thing {n}", sent=f"thing {n}")] * (1 + n % 2)) for n in range(2 * photos)]
    instances = dict(images=[dict(id=n, file_name=name_of(n), height=48, width=64) for n in range(photos)],
                     annotations=[dict(id=n, image_id=n // 2, category_id=1, bbox=[4, 4, 20, 16], segmentation=[box]) for n in range(2 * photos)],
                     categories=[dict(id=1, name="thing")])
    return pickle.dumps(refs, 2), json.dumps(instances).encode()


def counted(photos=6, splits=("train", "val")):
    of = {split: len([n for n in range(photos) if n % len(splits) == k]) for k, split in enumerate(splits)}
    return {split: (n, 2 * n, 3 * n) for split, n in of.items()}


class World:
    """A server with a fake RefCOCO, a root, and a list of mirrors."""
    def __init__(self, server, folder, photos=6):
        self.server, self.outer, self.root = server, folder / "outer", folder / "outer/root"
        self.outer.mkdir()
        refs, instances = refer_files(photos)
        self.archive = zipped([("refcoco/", b""), ("refcoco/refs(unc).p", refs), ("refcoco/instances.json", instances), ("__MACOSX/refcoco/._instances.json", b"x"),
                               ("refcoco/refs(google).p", b"not asked for")])
        self.names = [name_of(n) for n in range(photos)]
        server.files |= {"/refcoco.zip": self.archive, "/again.zip": self.archive} | {f"/photos/{name}": jpeg(n) for n, name in enumerate(self.names)}
        self.published = {("refcoco", "unc"): counted(photos)}
        self.mirrors = {"refcoco": dict(files=["instances.json", "refs(unc).p"], annotations=[dict(url=f"{server.url}/refcoco.zip", sha256=None)],
                                        photos=[f"{server.url}/photos/{{name}}"], by_hand="ask around")}
        self.list = folder / "mirrors.json"

    def prepare(self, dataset="refcoco", **options) -> Prepared:
        self.list.write_text(json.dumps(self.mirrors))
        options = dict(mirrors=self.list, progress=False, patience=QUICK, published=self.published) | options
        return prepare(dataset, self.root, **options)

    def refused(self, **options) -> str:
        with pytest.raises(RISError) as info: self.prepare(**options)
        message = str(info.value)
        assert "\n" not in message and len(message) < 900, message
        self.nothing_half()
        return message

    def files(self): return sorted(str(p.relative_to(self.root)) for p in self.root.rglob("*") if not p.is_dir())

    def nothing_half(self):
        """Nothing outside of the root, and every file under its final name is whole."""
        assert [p.name for p in self.outer.iterdir()] in ([], ["root"])
        for path in (p for p in self.root.rglob("*.jpg") if not p.name.startswith(".")):
            Image.open(path).load()
        annotations = {p.name for p in (self.root / "refcoco").glob("*")}
        if annotations: assert {"instances.json", "refs(unc).p"} <= annotations

    def complete(self):
        self.nothing_half()
        folder = "images/mscoco/images/train2014"
        assert self.files() == sorted(["refcoco/instances.json", "refcoco/refs(unc).p", "refcoco/source.json", *(f"{folder}/{n}" for n in self.names)])
        rows = check_data(self.root)
        assert [r["split"] for r in rows] == ["train", "val"] and not any(r["problems"] for r in rows)
        for n, name in enumerate(self.names): assert (self.root / folder / name).read_bytes() == jpeg(n)


@pytest.fixture
def world(server, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    yield World(server, tmp_path)
    assert not list(elsewhere.iterdir())


# ---- the whole way

def test_a_calm_day(world):
    done = world.prepare()
    assert done == Prepared("refcoco", dict(url=f"{world.server.url}/refcoco.zip", bytes=len(world.archive), sha256=hashlib.sha256(world.archive).hexdigest()),
                            0, 0, 6, [])
    world.complete()
    assert json.loads((world.root / "refcoco/source.json").read_text()) == done.source
    assert len(world.server.requests) == 7
    again = world.prepare()
    assert (again.source, again.there, again.fetched, len(world.server.requests)) == (None, 6, 0, 7)
    assert not (world.root / ".prepare").exists()


SURVIVED = ["500", "503 after 0", "429 after 0", "408", "429 after Wed, 21 Oct 2015 07:28:00 GMT", "429 after soon", "stall", "silence", "hang up", "cut",
            "cut without a length", "says more", "says less", "corrupt", "page", "empty", "no range", "no headers"]


@pytest.mark.parametrize("fault", SURVIVED)
def test_a_fault_that_passes_is_survived(world, fault):
    for path in list(world.server.files): world.server.faults[path] = [fault]
    done = world.prepare()
    assert done.fetched == 6 and done.source["sha256"] == hashlib.sha256(world.archive).hexdigest()
    world.complete()


def test_one_fault_after_the_other(world):
    world.server.faults["/refcoco.zip"] = ["cut", "500", "cut", "stall", "429 after 0", "cut", "wrong range", "cut", "hang up", "no range"]
    world.prepare(patience=replace(QUICK, tries=5))
    world.complete()
    asked = world.server.asked("/refcoco.zip")
    assert asked[0] is None and asked[1].startswith("bytes=") and len(asked) == 10


FATAL = {"404": "answers 404 Not Found", "410": "answers 410", "403": "answers 403", "500": "answers 500", "429 after 9999": "answers 429",
         "silence": "stalls", "hang up": "breaks off", "says less": "sends a broken file, twice", "corrupt": "sends a broken file, twice",
         "page": "sends a broken file, twice", "cut without a length": "broken file, twice", "no headers": "breaks off", "gzip": "sends it encoded",
         "to ftp://127.0.0.1/x": "ftp", "endless": "sends more than", "empty": "broken file, twice"}


@pytest.mark.parametrize("fault", FATAL)
def test_a_fault_that_stays_is_one_line_and_the_next_call_goes_on(world, fault, monkeypatch):
    monkeypatch.setattr(preparing, "_MAX_ARCHIVE", 200_000)
    world.server.faults["/refcoco.zip"] = fault
    said = world.refused()
    assert FATAL[fault] in said and "/refcoco.zip" in said and "ask around" in said
    assert not (world.root / "refcoco/instances.json").exists()
    world.server.faults.clear()
    world.prepare()
    world.complete()


@pytest.mark.parametrize("fault", FATAL)
def test_a_photo_that_does_not_come_is_named_and_the_next_call_fetches_it_alone(world, fault, monkeypatch):
    monkeypatch.setattr(preparing, "_MAX_PHOTO", 200_000)
    path = f"/photos/{world.names[2]}"
    world.server.faults[path] = fault
    said = world.refused()
    assert "1 of 6 photos of refcoco are still missing" in said and world.names[2] in said and "call again" in said
    assert len([f for f in world.files() if f.endswith(".jpg")]) == 5
    del world.server.faults[path]
    before = len(world.server.requests)
    assert world.prepare().fetched == 1 and len(world.server.requests) == before + 1
    world.complete()


def test_a_server_that_always_breaks_off_half_way_is_survived(world):
    world.server.faults["/refcoco.zip"] = "cut"
    world.prepare()
    world.complete()
    assert len(world.server.asked("/refcoco.zip")) > 5   # half of what is missing each time; more attempts than patience, but none in vain


@pytest.mark.parametrize("fault, said", [("drip", "crawls"), ("stall", "stalls")])
def test_a_crawl_is_no_progress(world, fault, said):
    world.server.faults["/refcoco.zip"] = fault
    assert said in world.refused(patience=Patience(timeout=0.2, pace=1e6, tries=2, wait=0.01))
    assert len(world.server.requests) == 2
    world.server.faults.clear()
    world.prepare()
    world.complete()


def test_a_download_goes_on_where_it_broke_off(world):
    world.server.faults["/refcoco.zip"] = ["cut"] + ["hang up"] * 3
    world.refused()
    part, = (world.root / ".prepare").glob("*.part")
    half = part.stat().st_size
    assert half == (len(world.archive) + 1) // 2
    world.server.served.clear()
    world.prepare()
    assert world.server.asked("/refcoco.zip")[-1] == f"bytes={half}-"
    assert world.server.served["/refcoco.zip"] == len(world.archive) - half
    world.complete()


def test_a_whole_download_is_not_fetched_again(world):
    world.server.faults["/refcoco.zip"] = ["says more", "500", "500", "500"]
    world.refused()
    assert world.prepare().source["bytes"] == len(world.archive)
    assert world.server.served["/refcoco.zip"] < len(world.archive) + 100
    world.complete()


def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(world):
    world.server.faults["/refcoco.zip"] = ["cut"] + ["hang up"] * 3
    world.refused()
    refs, instances = refer_files()
    world.archive = zipped([("refs(unc).p", refs), ("instances.json", instances)], zipfile.ZIP_STORED)
    world.server.files["/refcoco.zip"] = world.archive
    assert world.prepare().source["sha256"] == hashlib.sha256(world.archive).hexdigest()
    world.complete()


def test_a_shorter_file_meanwhile(world):
    world.server.faults["/refcoco.zip"] = ["cut"] + ["hang up"] * 3
    world.refused()
    part, = (world.root / ".prepare").glob("*.part")
    part.write_bytes(bytes(len(world.archive) + 7))
    world.prepare()
    world.complete()


def test_waits_as_long_as_the_server_asks(world):
    world.server.faults["/refcoco.zip"] = ["429 after 1"]
    begun = time.monotonic()
    world.prepare(patience=Patience(timeout=5, tries=2, wait=0.01))
    assert 1 <= time.monotonic() - begun < 5
    world.complete()


# ---- mirrors and checks

def test_the_next_mirror_is_asked(world):
    world.mirrors["refcoco"]["annotations"].append(dict(url=f"{world.server.url}/again.zip", sha256=None))
    world.mirrors["refcoco"]["photos"].insert(0, f"{world.server.url}/nowhere/{{name}}")
    world.server.faults["/refcoco.zip"] = "404"
    assert world.prepare().source["url"].endswith("/again.zip")
    world.complete()


def test_counts_decide_where_no_hash_is_known(world):
    world.published = {("refcoco", "unc"): counted() | {"val": (3, 7, 9), "testA": (1, 1, 1)}}
    said = world.refused()
    assert "val has 6 refs instead of 7" in said and "testA has 0 images instead of 1" in said
    world.mirrors["refcoco"]["annotations"][0]["sha256"] = hashlib.sha256(world.archive).hexdigest()   # the list vouches for it
    assert world.prepare().differences == ["unc val has 6 refs instead of 7", "unc testA has 0 images instead of 1, 0 refs instead of 1, 0 sentences instead of 1"]
    world.complete()


def test_a_wrong_hash_is_refused(world):
    world.mirrors["refcoco"]["annotations"][0]["sha256"] = "0" * 64
    assert "SHA-256" in world.refused()


def test_annotations_put_there_by_hand_are_kept(world):
    refs, instances = refer_files()
    (world.root / "refcoco").mkdir(parents=True)
    (world.root / "refcoco/refs(unc).p").write_bytes(refs)
    (world.root / "refcoco/instances.json").write_bytes(instances)
    assert world.prepare().source is None
    assert not world.server.asked("/refcoco.zip")
    (world.root / "refcoco/instances.json").write_bytes(instances[:100])   # and broken ones replaced
    assert world.prepare().source is not None
    world.complete()


def test_broken_photos_are_replaced(world):
    world.prepare()
    photos = world.root / "images/mscoco/images/train2014"
    (photos / world.names[0]).write_bytes(jpeg(0)[:-300])
    (photos / world.names[1]).write_bytes(jpeg(1, (48, 48)))
    (photos / world.names[2]).unlink()
    (photos / f".{world.names[2]}.part").write_bytes(jpeg(2)[:100])   # as a kill leaves it
    done = world.prepare()
    assert (done.there, done.fetched) == (3, 3) and world.server.asked(f"/photos/{world.names[2]}")[-1] == "bytes=100-"
    world.complete()


def test_a_dead_server_of_photos_is_given_up_soon(world):
    world.mirrors["refcoco"]["photos"] = ["http://127.0.0.1:9/{name}"]
    begun = time.monotonic()
    said = world.refused()
    assert "can't be reached" in said and "6 of 6" in said and time.monotonic() - begun < 10


def test_giving_up_asks_no_server_twenty_thousand_times(server, tmp_path):
    world = World(server, tmp_path, photos=120)
    for name in world.names: server.faults[f"/photos/{name}"] = "404"
    assert "120 of 120 photos" in world.refused(parallel=2)
    assert len(server.requests) < 40


def test_requests_are_bounded(server, tmp_path):
    world = World(server, tmp_path, photos=30)
    server.delay = 0.02
    world.prepare(parallel=4)
    assert 2 <= server.busiest <= 4
    world.complete()


# ---- archives

def archive_with(tmp_path, *members, **options):
    path = tmp_path / "a.zip"
    path.write_bytes(zipped(members, **options))
    return path


def special(name, mode):
    member = zipfile.ZipInfo(name)
    member.external_attr = mode << 16
    return member


HOSTILE = ["../instances.json", "../../root/x", "/etc/instances.json", "a/../../instances.json", "..\\instances.json", "C:/instances.json",
           special("instances.json", 0o120777), special("dev", 0o020666), special("pipe", 0o010666)]


@pytest.mark.parametrize("member", HOSTILE, ids=lambda m: getattr(m, "filename", m))
def test_hostile_archives_are_refused_and_write_nothing(world, tmp_path, member):
    refs, instances = refer_files()
    path = archive_with(tmp_path, ("refcoco/refs(unc).p", refs), (member, b"/etc/passwd"), *([("refcoco/instances.json", instances)] if isinstance(member, str) else []))
    world.server.files["/refcoco.zip"] = path.read_bytes()
    said = world.refused()
    assert "leads out of the folder" in said or "is a link or a device" in said
    assert not world.files()


def test_bombs_go_off_in_a_bucket(tmp_path):
    path = archive_with(tmp_path, ("a", bytes(50_000_000)), ("b", b""))
    assert path.stat().st_size < 100_000
    with pytest.raises(RISError, match="unpacks to more than it may"): unpack(path, tmp_path / "out", ["a", "b"], room=1_000_000)
    assert (tmp_path / "out/a").stat().st_size <= 1_000_000
    lying = bytearray(path.read_bytes())
    size = (50_000_000).to_bytes(4, "little")
    assert lying.count(size) == 2
    path.write_bytes(lying.replace(size, (100).to_bytes(4, "little")))   # says 100 bytes in both places
    with pytest.raises(RISError): unpack(path, tmp_path / "out", ["a", "b"], room=1_000_000)
    assert (tmp_path / "out/a").stat().st_size <= 1_000_000


@pytest.mark.parametrize("members, said", [([("a", b"")], "0 members b"), ([("a", b""), ("x/a", b""), ("b", b"")], "2 members a"), ([("a/", b""), ("b", b"")], "0 members a")])
def test_what_an_archive_must_hold(tmp_path, members, said):
    with pytest.raises(RISError, match=said): unpack(archive_with(tmp_path, *members), tmp_path / "out", ["a", "b"])


def test_damaged_archives_are_never_anything_but_one_line(tmp_path):
    whole, rng, refused = zipped([("a", bytes(range(256)) * 20), ("b", b"hello" * 50)]), random.Random(0), 0
    path = tmp_path / "a.zip"
    for n in range(400):
        body = bytearray(whole[:rng.randrange(len(whole))] if n % 3 == 0 else whole)
        for _ in range(rng.randrange(1, 6) if n % 3 else 0): body[rng.randrange(len(body))] = rng.randrange(256)
        path.write_bytes(body)
        try:
            unpack(path, tmp_path / "out", ["a", "b"])
            assert (tmp_path / "out/a").read_bytes() == bytes(range(256)) * 20
        except RISError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 300
    assert refused > 300 and sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "out"]


# ---- linking, and staying inside

def coco_folder(world, folder, layout):
    for n, name in enumerate(world.names[:4]):
        path = folder / layout.format(name=name, short=name[15:])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(n))
    return folder


@pytest.mark.parametrize("layout", ["{name}", "train2014/{name}", "images/train2014/{name}", "train2017/{short}", "images/val2017/{short}"])
def test_photos_of_a_coco_folder_are_linked(world, tmp_path, layout):
    coco = coco_folder(world, tmp_path / "coco", layout)
    broken = coco / layout.format(name=world.names[1], short=world.names[1][15:])
    broken.write_bytes(jpeg(1)[:-300])
    done = world.prepare(coco=coco)
    assert (done.there, done.linked, done.fetched) == (0, 3, 3)
    world.complete()
    links = [p for p in world.root.rglob("*.jpg") if p.is_symlink()]
    assert len(links) == 3 and all(p.resolve().is_relative_to(coco.resolve()) for p in links)
    assert broken.read_bytes() == jpeg(1)[:-300]   # theirs is left as it was
    (coco / layout.format(name=world.names[0], short=world.names[0][15:])).unlink()   # a link that leads nowhere
    assert world.prepare().fetched == 1
    world.complete()


def test_wrong_folders_of_coco(world, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has none of 6 photos" in world.refused(coco=tmp_path / "empty")
    assert "no folder" in world.refused(coco=tmp_path / "nowhere")


@pytest.mark.parametrize("link", ["refcoco", "images", "images/mscoco/images/train2014", ".prepare"])
def test_links_out_of_the_root_are_not_followed(world, tmp_path, link):
    outside = tmp_path / "outside"
    outside.mkdir()
    (world.root / link).parent.mkdir(parents=True)
    (world.root / link).symlink_to(outside)
    assert "leads out of" in world.refused()
    assert not list(outside.iterdir()) and not [path for path, _ in world.server.requests if path.startswith("/photos")]


def test_reading_through_a_link_is_fine(world, tmp_path):
    world.prepare()
    (world.root / "images").rename(tmp_path / "everyones")
    (world.root / "images").symlink_to(tmp_path / "everyones")
    assert world.prepare().there == 6
    lost = tmp_path / "everyones/mscoco/images/train2014" / world.names[0]
    lost.unlink()
    assert "leads out of" in world.refused() and not lost.exists()


WRITTEN = None   # where the process writes, while it is a list


def audit(event, arguments):
    if WRITTEN is None or event not in ("open", "os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir", "os.truncate", "os.link"): return
    if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT): return
    paths = {"os.symlink": slice(1, 2), "os.rename": slice(0, 2), "os.link": slice(1, 2)}.get(event, slice(0, 1))
    fd = arguments[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1   # shutil.rmtree names files by their folder's descriptor
    folder = os.readlink(f"/proc/self/fd/{fd}") if fd >= 0 else os.getcwd()
    WRITTEN.extend((event, os.path.normpath(os.path.join(folder, os.fsdecode(path)))) for path in arguments[paths] if not isinstance(path, int))


sys.addaudithook(audit)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to learn which folder a descriptor stands for")
def test_not_a_byte_is_written_outside_of_the_root(world, tmp_path, monkeypatch):
    refs, instances = refer_files()
    world.server.files["/evil.zip"] = zipped([("refs(unc).p", refs), ("instances.json", instances), ("../../../x", b"evil")])
    world.mirrors["refcoco"]["annotations"].insert(0, dict(url=f"{world.server.url}/evil.zip", sha256=None))
    world.server.faults |= {"/refcoco.zip": ["cut", "500", "corrupt"], f"/photos/{world.names[4]}": ["cut", "page"]}
    coco = coco_folder(world, tmp_path / "coco", "train2014/{name}")
    world.list.write_text(json.dumps(world.mirrors))
    monkeypatch.setitem(globals(), "WRITTEN", [])
    prepare("refcoco", world.root, coco, world.list, progress=False, patience=QUICK, published=world.published)
    written = WRITTEN
    monkeypatch.setitem(globals(), "WRITTEN", None)
    assert len(written) > 20 and {event for event, _ in written} >= {"open", "os.rename", "os.symlink", "os.mkdir", "os.rmdir"}
    assert not [(event, path) for event, path in written if not Path(path).is_relative_to(world.root)]
    world.complete()


# ---- accidents

def test_a_full_disk_is_one_line(world, monkeypatch):
    def full(file, *args): file.write(b"PK"); raise OSError(28, "No space left on device")
    monkeypatch.setattr(downloading, "_write_chunks", full)
    assert "No space left on device" in world.refused()
    monkeypatch.undo()
    world.prepare()
    world.complete()


def test_one_at_a_time(world):
    world.server.faults["/refcoco.zip"] = ["stall"]
    with ThreadPoolExecutor() as pool:
        first = pool.submit(world.prepare)
        while not (world.server.requests or first.done()): time.sleep(0.01)
        with pytest.raises(RISError, match="another call prepares"): world.prepare()
        first.result()
    world.complete()


RUN = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job that a script put in the background ignores Ctrl-C
from ris_nb.data import prepare as preparing
preparing.PUBLISHED = {("refcoco", "unc"): {split: tuple(c) for split, c in json.loads(sys.argv[1]).items()}}
preparing.prepare.__defaults__ = (*preparing.prepare.__defaults__[:-1], preparing.PUBLISHED)
from ris_nb.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("end, where", [(signal.SIGKILL, "photos"), (signal.SIGKILL, "archive"), (signal.SIGINT, "photos")])
def test_a_second_call_finishes_what_a_killed_one_began(world, end, where):
    world.list.write_text(json.dumps(world.mirrors))
    stuck = f"/photos/{world.names[4]}" if where == "photos" else "/refcoco.zip"
    world.server.faults[stuck] = ["stall"]
    words = ["data", "prepare", "refcoco", "--root", str(world.root), "--mirrors", str(world.list), "--parallel", "2"]
    process = subprocess.Popen([sys.executable, "-c", RUN, json.dumps(counted()), *words], stderr=subprocess.PIPE, text=True)
    begun = time.monotonic()
    while not world.server.served.get(stuck) and process.poll() is None and time.monotonic() - begun < 120: time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(end)
    world.server.closing.set()   # lets the stalled answer end
    said = process.communicate(timeout=60)[1]
    assert process.returncode == (-9 if end == signal.SIGKILL else 130), said
    world.nothing_half()
    world.prepare()
    world.complete()


@pytest.fixture
def command(world, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "__defaults__", (*prepare.__defaults__[:-2], QUICK, world.published))
    def run(*words):
        world.list.write_text(json.dumps(world.mirrors))
        code = main(["data", "prepare", "refcoco", "--root", str(world.root), "--mirrors", str(world.list), *map(str, words)])
        said = capsys.readouterr()
        return code, said.out, [line for line in said.err.splitlines() if "|" not in line and "00:00" not in line]
    return run


def test_the_command(world, command, tmp_path):
    world.server.faults[f"/photos/{world.names[1]}"] = "404"
    code, out, err = command()
    assert code == 2 and out == "" and len([line for line in err if line.startswith("ris-nb: 1 of 6 photos")]) == 1
    world.server.faults.clear()
    code, out, err = command("--coco", coco_folder(world, tmp_path / "coco", "train2014/{name}"))
    assert code == 0 and "0 fetched, 1 linked, 5 were there" in out and f"ris-nb data check {world.root}" in out
    world.published["refcoco", "unc"]["val"] = (3, 7, 9)
    code, out, err = command()
    assert code == 1 and "refcoco unc val has 6 refs instead of 7" in err
    (world.root / "refcoco/refs(unc).p").unlink()
    assert command("--parallel", 2)[0] == 2   # and now no archive is right


def test_the_check_shows_published_counts(world, command, capsys):
    code, out, err = command()
    assert hashlib.sha256(world.archive).hexdigest() in out
    assert main(["data", "check", str(world.root)]) == 0
    head, train, val = capsys.readouterr().out.splitlines()
    assert head.endswith("published (images, refs, sentences)") and train.endswith("16,994  42,404  120,624") and val.endswith("1,500  3,811  10,834")
    assert main(["data", "check", str(world.root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1]["published"] == dict(images=1500, refs=3811, sentences=10834)


# ---- PhraseCut, mirrors as data, options

def test_phrasecut(world, tmp_path):
    photos = {n: jpeg(n) for n in (3, 5)}
    tasks = [dict(task_id=f"{n}__0", image_id=n, instance_boxes=[[1, 1, 9, 9]], Polygons=[[[[1, 1], [10, 1], [10, 10]]]], phrase="things") for n in photos]
    sizes = [dict(image_id=n, height=48, width=64) for n in photos]
    members = [("VGPhraseCut_v0/refer_val.json", json.dumps(tasks).encode()), ("VGPhraseCut_v0/image_data_split.json", json.dumps(sizes).encode())]
    world.server.files |= {"/cut.zip": zipped(members)} | {f"/b/{n}.jpg": body for n, body in photos.items()}
    entry = dict(files=["image_data_split.json", "refer_val.json"], annotations=[], photos=[f"{world.server.url}/{k}/{{name}}" for k in "ab"], by_hand="a script")
    world.mirrors["phrasecut"] = entry
    options = dict(dataset="phrasecut", published={("phrasecut", "authors"): {"val": (2, 2, 2)}})
    with pytest.raises(RISError, match="no mirror is known for the annotations of phrasecut: put image_data_split.json, refer_val.json into .*a script") as info: world.prepare(**options)
    assert "\n" not in str(info.value)
    entry["annotations"] = [dict(url=f"{world.server.url}/cut.zip", sha256=None)]
    assert world.prepare(**options).fetched == 2
    assert (world.root / "images/phrasecut/5.jpg").read_bytes() == photos[5]
    assert not check_data(world.root)[0]["problems"] and len(open_data(world.root, "phrasecut").referrals("val")) == 2


def grefer_files(photos=4, splits=("train", "val", "testA", "testB")):
    """A gRefCOCO in small: on each photo a sentence about one thing, one about two (a polygon and a run-length code), and one about none."""
    box, runs = [4, 4, 24, 4, 24, 20, 4, 20], {"size": [48, 64], "counts": [48 * 40, 48 * 10, 48 * 14]}   # 20 x 16 pixels; columns 40 to 49
    refs = [dict(ref_id=3 * n + k, image_id=n, split=splits[n], file_name=name_of(n), ann_id=ids, category_id=[1] * len(ids) if ids != [-1] else [-1],
                 sentences=[dict(sent_id=3 * n + k, raw=text, sent=text, tokens=text.split())])
            for n in range(photos) for k, (ids, text) in enumerate((([2 * n], "the left one"), ([2 * n, 2 * n + 1], "both things"), ([-1], "the dog")))]
    instances = dict(images=[dict(id=n, file_name=name_of(n), height=48, width=64) for n in range(photos)],
                     annotations=[dict(id=2 * n + k, image_id=n, category_id=1, iscrowd=k, bbox=[[4, 4, 20, 16], [40, 0, 10, 48]][k],
                                       segmentation=[[box], runs][k]) for n in range(photos) for k in (0, 1)],
                     categories=[dict(id=1, name="thing")])
    return {"grefs(unc).json": json.dumps(refs).encode(), "instances.json": json.dumps(instances).encode()}


def test_grefcoco_in_small(world):
    world.mirrors["grefcoco"] = dict(files=["instances.json", "grefs(unc).json"], annotations=[], photos=[f"{world.server.url}/photos/{{name}}"], by_hand="its page")
    with pytest.raises(RISError, match="no mirror is known for the annotations of grefcoco: put instances.json, grefs.unc..json into .*its page") as info:
        world.prepare(dataset="grefcoco")
    assert "\n" not in str(info.value)
    folder = world.root / "grefcoco"
    folder.mkdir(parents=True)
    for name, body in grefer_files().items(): (folder / name).write_bytes(body)
    done = world.prepare(dataset="grefcoco")
    assert (done.fetched, done.source, done.differences) == (4, None, [])
    assert (world.root / "images/mscoco/images/train2014" / name_of(3)).is_file()
    data = open_data(world.root)
    assert (data.dataset, data.split_by, data.splits) == ("grefcoco", "unc", ["train", "val", "testA", "testB"])
    for split in data.splits:
        one, two, none = data.referrals(split)
        assert [r.mask().sum() for r in (one, two, none)] == [mask_of(one), mask_of(one) + 480, 0] and 0 < mask_of(one) < 480
        assert not one.mask()[:, 40:].any() and two.mask()[:, 40:50].all() and (two.mask()[:, :40] == one.mask()[:, :40]).all()
        assert [r.absent for r in (one, two, none)] == [False, False, True] and all(r.has_mask for r in (one, two, none))
        assert [s.kind for r in (one, two, none) for s in r.sentences] == ["one", "many", "none"]
        assert (one.bbox, two.bbox, none.bbox) == ((4, 4, 20, 16), (4, 0, 46, 48), None) and (two.category, none.category) == ("thing", "")
        assert (two.area(), none.area()) == (two.mask().sum(), 0)
    assert len(data.referrals("test")) == 6
    rows = check_data(world.root)
    assert [row["problems"] for row in rows] == [[]] * 4 and all(row["published"] is None for row in rows)


def mask_of(referral): return int(referral.mask().sum())


@pytest.mark.parametrize("change, said", [
    (lambda refs: refs[1].update(ann_id=[]), "entry 1 is malformed"), (lambda refs: refs[2].update(ann_id=[0, -1]), "entry 2 is malformed"),
    (lambda refs: refs[0].update(ann_id=[99]), "entry 0 is malformed"), (lambda refs: refs[0].pop("ann_id"), "not as the REFER toolbox has it"),
    (lambda refs: refs.clear() or refs.append(5), "not as the REFER toolbox has it"), (lambda refs: refs[0].update(sentences=[{"raw": 3}]), "no string"), (None, "no readable JSON")])
def test_a_broken_grefcoco_is_told_in_one_line(tmp_path, change, said):
    folder = tmp_path / "grefcoco"
    (tmp_path / "images/train2014").mkdir(parents=True)
    folder.mkdir()
    for name, body in grefer_files().items(): (folder / name).write_bytes(body)
    refs = json.loads(grefer_files()["grefs(unc).json"])
    (folder / "grefs(unc).json").write_text("{" if change is None else (change(refs), json.dumps(refs))[1])
    with pytest.raises(RISError) as info: open_data(tmp_path, "grefcoco")
    assert "\n" not in str(info.value) and said in str(info.value) and "grefs(unc).json" in str(info.value)


def test_a_pickle_is_not_read_as_grefcoco(tmp_path):
    folder = tmp_path / "grefcoco"
    (tmp_path / "images/train2014").mkdir(parents=True)
    folder.mkdir()
    (folder / "grefs(unc).p").write_bytes(pickle.dumps([]))
    with pytest.raises(RISError, match="no grefcoco in .*grefs.*json.*data prepare grefcoco"): open_data(tmp_path, "grefcoco")


def test_the_list_that_ships():
    mirrors = read_mirrors()
    assert set(mirrors) == {"refcoco", "refcoco+", "refcocog", "grefcoco", "phrasecut"}
    for name, entry in mirrors.items():
        assert {by for dataset, by in preparing.PUBLISHED if dataset == name} == {f[5:-2 - 1] for f in entry["files"] if f.startswith("refs")} or name == "phrasecut"
        for archive in entry["annotations"]: assert archive["url"].endswith(f"/{name}.zip") and archive["sha256"] is None or len(archive["sha256"]) == 64


@pytest.mark.parametrize("change", [dict(files=["../x"]), dict(photos=["http://a/b"]), dict(photos=["file:///{name}"]), dict(annotations=[dict(url="/etc/x", sha256=None)]),
                                    dict(annotations=[dict(url="http://a")]), dict(files=7), dict(extra=1)])
def test_nonsense_in_a_list_of_mirrors(world, change):
    world.mirrors["refcoco"] |= change
    assert "no list of mirrors" in world.refused()
    assert not world.root.exists()


@pytest.mark.parametrize("options, said", [(dict(parallel=0), "from 1 to 64"), (dict(parallel=65), "from 1 to 64"), (dict(dataset="refclef"), "no mirrors for 'refclef'"),
                                           (dict(mirrors="/nowhere.json"), "no list of mirrors")])
def test_options_that_make_no_sense(world, options, said):
    assert said in world.refused(**options)
