"""What the test files share: a server to fork processes from, what is made once for all workers, and what each test costs."""
from __future__ import annotations

import json
import multiprocessing
import os
import pkgutil
import resource
import time
from collections import Counter
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

import pytest
from filelock import FileLock

import ris_nb

ROOT = Path(__file__).resolve().parents[1]
COSTS = ROOT / "build" / "test_seconds.json"

# A process that a test needs for itself is forked from a server that has imported everything once; it runs nothing, so it has no threads.
multiprocessing.set_forkserver_preload([
    "pytest", "nbdev.test", "torch._dynamo", "transformers.models.bert.modeling_bert",
    *(module.name for module in pkgutil.walk_packages(ris_nb.__path__, "ris_nb.") if "._" not in module.name)])


def pytest_collection_modifyitems(items):
    """What takes longest comes first, so that several processes end together."""
    first = ["test_site.py", "test_browser.py", "test_colab.py", "test_notebooks.py", "test_exercises.py"]
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """`shared(name, make)`: the folder that `make(folder)` fills, once for all workers of a run. Nobody writes into it afterwards."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name: str, make) -> Path:
        folder, done = base / "shared" / name, base / "shared" / f"{name}.done"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(base / "shared" / f"{name}.lock"):
            if not done.exists():
                make(folder)
                done.touch()
        return folder
    return once


# What each test costs: seconds by the clock, and seconds of the processor, which count on a machine that others use as well.

def processor_seconds() -> float:
    """Of this process, of the children that it has waited for, and of the server's, which no other process waits for."""
    used = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    if server := forkserver._forkserver._forkserver_pid:
        with suppress(OSError):  # there is no /proc on a Mac
            fields = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
            used += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return used


_now = {"clock": time.perf_counter(), "processor": 0.0}  # when the test before ended; the first one of a process pays for imports and collecting
_costs = {"clock": Counter(), "processor": Counter()}


def pytest_collection_finish():
    _now.update(clock=time.perf_counter(), processor=processor_seconds(), collecting=processor_seconds())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    clock, processor = time.perf_counter(), processor_seconds()
    report.costs = {"clock": clock - _now["clock"], "processor": max(0.0, processor - _now["processor"]), "collecting": _now.pop("collecting", 0.0)}
    _now.update(clock=clock, processor=processor)
    return report


def pytest_runtest_logreport(report):
    costs = getattr(report, "costs", {})  # a worker that crashed has left none
    for kind in _costs:
        _costs[kind][report.nodeid] += costs.get(kind, 0.0)
    _costs["processor"]["collecting"] += costs.get("collecting", 0.0)


def pytest_terminal_summary(terminalreporter, config):
    """All tests of the last run with these markers into a file, the dearest files into the terminal."""
    if not (total := sum(_costs["processor"].values())):
        return
    files = {kind: Counter() for kind in _costs}
    for kind, costs in _costs.items():
        for test, seconds in costs.items():
            files[kind][test.partition("::")[0]] += seconds
    kept = json.loads(COSTS.read_text()) if COSTS.exists() else {}
    kept[config.option.markexpr or "all"] = {"processor seconds": round(total, 1), **{
        name: {key: [round(which["processor"][key], 2), round(which["clock"][key], 2)] for key, _ in which["processor"].most_common()}
        for name, which in (("files", files), ("tests", _costs))}}
    COSTS.parent.mkdir(exist_ok=True)
    COSTS.write_text(json.dumps(kept, indent=1) + "\n")
    terminalreporter.section(f"{total:.0f} seconds of the processor; all tests in {COSTS.relative_to(ROOT)}")
    for name, seconds in files["processor"].most_common(15):
        terminalreporter.line(f"{seconds:8.1f} s  {files['clock'][name]:8.1f} s by the clock  {name}")
