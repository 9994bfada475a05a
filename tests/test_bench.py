"""The benchmark runs, at a tiny size, and what it writes makes sense: not how fast anything is, which a test can't say."""
import json
import math
from types import SimpleNamespace

import bench
import bench_data
import bench_scale
import bench_summary
import pytest
import torch
from benching import flops_of, peak_memory, peak_of, saved_bytes, times_faster
from test_fake_gpu_use import PretendGPU, on_gpu

from ris_nb.registry import create_model


def test_memory_is_counted():
    a, b = torch.ones(1000, 1000), torch.ones(1000, 1000, requires_grad=True)
    kept, (square, product) = saved_bytes(lambda: ((a * b).square(), a @ b), [b])
    assert kept == {"": 2 * 4e6}  # a, which the products need, and a * b, which the square does; b is a weight
    before, peak = peak_memory(lambda: torch.ones(50_000_000))
    assert 190e6 < peak - before < 230e6  # pages that were held and free may be used again


def test_flops_and_ratios():
    a = torch.ones(30, 40)
    assert flops_of(lambda: a @ a.T) == 2 * 30 * 40 * 30
    assert times_faster({"plain": [4, 6], "ris_nb": [2, 1]}, {"plain": [4, 6], "ris_nb": [2, 1]}) == {
        "clock, least": 4, "clock, median of rounds": 4, "cpu, least": 4, "cpu, median of rounds": 4}


def test_photos_are_as_heavy_as_those_of_coco(tmp_path):
    referrals = bench.photos(tmp_path, 2)
    sizes = [referral.image_path.stat().st_size for referral in referrals]
    assert all(80_000 < size < 300_000 for size in sizes), sizes
    assert all(10_000 < referral.mask().sum() < 110_000 for referral in referrals)


def test_the_first_page_holds_a_gpu_against_its_data_sheet():
    assert peak_of("NVIDIA H100 80GB HBM3", "bf16") == 989e12 and peak_of("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_of("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16") is None and peak_of("NVIDIA GeForce RTX 4090", "bf16") == 165.2e12
    assert peak_of("NVIDIA L40S", "bf16") is None and peak_of("Tesla T4", "bf16") is None and peak_of("Tesla T4", "float32") == 8.1e12
    row = {"part": "training step", "batch": 8, "items_per_second": 80, "peak_gib": 10.0, "gflop": 9890, "matrix_share": 0.2}
    rows = [{**row, "variant": "float32, nothing fused", "seconds": 0.4}, {**row, "variant": "+ bf16", "seconds": 0.2},
            {**row, "variant": "+ compile", "seconds": 0.1}, {"part": "fit", "variant": "", "batch": 8}]
    title, _, _, _, *lines = bench.first_page({"device": "NVIDIA H200", "models": {"lavt_swin_base": {"rows": rows}}}).splitlines()
    assert title.startswith("NVIDIA H200") and [line.split(" | ")[2] for line in lines] == ["float32", "bf16"]
    assert lines[1].endswith("| 98.9 | 10% | 20% |") and lines[0].endswith("| 24.7 | 37% | 20% |")
    other = bench.first_page({"device": "a new one", "models": {"lavt_swin_base": {"rows": rows}}}).splitlines()
    assert other[-1].endswith("| 98.9 |  | 20% |")  # unknown: the lone product's rate is the peak


def sane(entry, parts):
    rows = entry["rows"]
    assert {row["part"] for row in rows} == parts
    for row in rows:
        assert all(math.isfinite(value) and value >= 0 for value in row.values() if not isinstance(value, (str, dict))), row
        assert row["items_per_second"] > 0 and row["cpu_seconds"] > 0
        assert 0 <= row.get("waiting", 0) <= 1 and 0 < row.get("matrix_share", 1) <= 1.2, row
        assert 0.1 < row.get("peak_gib", 1) < 20, row
    forward, step = (next(row for row in rows if row["part"] == part) for part in ("forward", "training step"))
    assert step["gflop"] > 2 * forward["gflop"] > 0 and 0 < step["kept_gib"] < step["peak_gib"]


@pytest.mark.slow
def test_the_command_writes_figures_and_prints_them_as_a_table(tmp_path, capsys):
    out = tmp_path / "cpu.json"
    out.write_text(json.dumps({"device": "cpu", "models": {"another": {"rows": []}}}))
    bench.main(["--models", "sag", "--sizes", "tiny", "--device", "cpu", "--threads", "1", "--batch", "4", "--repeats", "1", "--workers", "1", "--out", str(out)])
    report = json.loads(out.read_text())
    assert set(report["models"]) == {"another", "sag_tiny"}  # what was not measured stays
    sane(report["models"]["sag_tiny"], {"forward", "evaluation", "training step", "data path", "fit"})
    lines = bench.table(report).splitlines()
    assert len(lines) == 2 + len(report["models"]["sag_tiny"]["rows"]) and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| sag_tiny | forward | as in fit | 4 |") and lines[2] in capsys.readouterr().out
    half = next(row for row in report["models"]["sag_tiny"]["rows"] if (row["part"], row["variant"]) == ("forward", "bf16"))
    assert 0 < half["error"] < 0.1 and half["flipped"] < 0.05
    bench.main(["--models", "sag", "--sizes", "tiny", "--device", "cpu", "--threads", "1", "--batch", "2", "--repeats", "1", "--parts", "forward", "--out", str(out)])
    again = json.loads(out.read_text())["models"]["sag_tiny"]["rows"]
    assert {row["batch"] for row in again if row["part"] == "forward"} == {2} and {row["batch"] for row in again if row["part"] != "forward"} == {4}
    rows = bench_summary.summary(tmp_path)
    assert [cells[0].partition(": ")[2] for cells in rows] == ["forward, float32, seconds of CPU", "forward, bfloat16, seconds of CPU",
                                                              "training step, float32, seconds of CPU", "training step, bfloat16, seconds of CPU"]
    assert all(len(cells) == len(bench_summary.HEAD) for cells in rows)


def test_what_begins_too_late_is_left_out(capsys):
    args = SimpleNamespace(device="cpu", batch=2, repeats=1, workers=0, threads=1, root=None, ladder=False, parts=["forward"], minutes=1)
    assert bench.measure("sag_tiny", "tiny", args, begun=-math.inf)["rows"] == []
    assert "sag_tiny: 1 minutes are over, forward is left out" in capsys.readouterr().out


@pytest.fixture
def small(tmp_path):
    args = SimpleNamespace(device="cpu", batch=2, repeats=1, workers=0, threads=1, root=None, ladder=True)
    return bench.Bench("magnet_tiny", "tiny", args, tmp_path)


@pytest.mark.slow
def test_switch_by_switch(small, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module: module)  # needs a compiler, and minutes
    names = ["float32, nothing fused", "+ bf16", "+ fused attention", "+ fused adamw", "+ channels last", "+ compile"]
    assert [row["variant"] for row in bench.forward_rows(small)] == names
    rows = list(bench.step_rows(small))
    assert [row["variant"] for row in rows] == [*names, "checkpointed"]
    plain, *_, last, checkpointed = rows
    assert checkpointed["kept_gib"] < 0.8 * plain["kept_gib"]
    assert sum(plain["kept_mib"].values()) == pytest.approx(1024 * plain["kept_gib"])
    stages = [sum(mib for block, mib in row["kept_mib"].items() if "vision.stages" in block) for row in (plain, checkpointed)]
    assert 5 * stages[1] < stages[0]  # what is computed again isn't kept
    assert len({row["gflop"] for row in rows}) == 1  # of the work there is to do, however it is done


def test_full_size_figures_of_the_data_path(small):
    small.full, small.step_flops = True, 2 * 0.9e12
    row, = bench.data_rows(small)
    assert row["needed"] == pytest.approx(4 * 0.4 * 989e12 / 0.9e12)
    assert row["processes"] == math.ceil(row["needed"] * row["cpu_seconds"] / 2)


def test_the_data_path_is_measured_in_every_way(tmp_path):
    bench_data.main(["--sizes", "64", "--items", "96", "--repeats", "1", "--threads", "1", "--out", str(tmp_path / "data.json")])
    rows = json.loads((tmp_path / "data.json").read_text())["sizes"]["64"]
    assert {(row["way"], row["workers"]) for row in rows} == {(way, w) for way in ("files, floats", "files, bytes", "pack, bytes") for w in (0, 1, 2)}
    assert all(0 < row["pictures a second"] < math.inf for row in rows)


@pytest.mark.slow
def test_what_two_processes_exchange_is_counted(tmp_path):
    bench_scale.main(["--worlds", "2", "--models", "sag_tiny", "--out", str(tmp_path / "scale.json")])
    report = json.loads((tmp_path / "scale.json").read_text())
    (found,) = report["counted"]
    pupil = create_model("sag_tiny").for_training()
    assert found["gradient bytes"] == pytest.approx(4 * sum(p.numel() for p in pupil.parameters() if p.requires_grad), rel=0.1)  # but for the words
    assert 0 < found["ready before the end"] < 1 and found["other collectives"] > 0 < found["collectives of an evaluation"]


def test_a_step_on_paper():
    lone, *_, last = bench_scale.on_paper("m", batch=64, parameters=10**8, flops=1e12, others=10)
    assert (lone["GPUs"], lone["efficiency"], last["GPUs"], last["pairs a GPU"]) == (1, 1.0, 64, 1)
    assert lone["compute ms"] == pytest.approx(1e3 * 64e12 / (0.4 * 989e12))
    assert last["exchange ms"] == pytest.approx(1e3 * (2 * 63 / 64 * 4e8 / 40e9 + 6 * 20e-6)) and last["efficiency"] < 0.5
    assert [row["GPUs"] for row in bench_scale.on_paper("m", 48, 10**8, 1e12, 0)] == [1, 2, 4, 8, 16]


def test_the_bench_of_a_gpu_comes_as_far_as_its_first_products(tmp_path, monkeypatch):
    """On a GPU that isn't there: model, batch and lone product lie on it, and the forward pass runs through its shapes."""
    gpu, args = PretendGPU(), SimpleNamespace(device="cuda", batch=2, repeats=1, workers=0, threads=1, root=None, ladder=False)
    monkeypatch.setattr(torch.nn.Module, "to", lambda model, device: on_gpu(model))
    with gpu:
        found = bench.Bench("lavt_tiny", "tiny", args, tmp_path)
        assert found.batch.image.device.type == "cuda" and found.host(found.batch).score.device.type == "cuda"
        product, flops = found.product(torch.bfloat16)
        assert product()[0].device.type == "cuda" and flops == 2 * 8192**3
