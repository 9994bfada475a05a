"""One table of what the other benchmarks found: work, before, after, floor, memory, machine. Measures nothing; `make bench` ends with it:

    python tests/bench/bench_summary.py [--folder data/results/bench]      # writes summary.md there

"before" is the released arithmetic written out plainly, files read as floats, or float32, as "against" says; both sides took turns
in one run. The floor is what the matrix products alone would take at the rate of a lone product, of the same type, in the same run.
"""
import argparse
import json
from pathlib import Path

from benching import RESULTS

HEAD = ("work", "against", "before", "after", "times faster", "floor", "times the floor", "memory, error", "machine")


def seconds(value):
    return f"{value:.3g} s"


def line(work, against, before, after, floor, memory, machine):
    """Cells of a row whose figures are seconds; None where something doesn't exist."""
    return (work, against, seconds(before) if before else "", seconds(after), f"{before / after:.1f}" if before else "",
            seconds(floor), f"{after / floor:.1f}", memory, machine)


def against_plain(report, work, floor, memory=""):
    plain, ours = (report["seconds"][side]["clock, least"] for side in ("plain", "ris_nb"))
    return line(work, "released arithmetic", plain, ours, floor["clock"], memory, report["machine"])


def data_path(report):
    for size, rows in report["sizes"].items():
        rate = {row["way"]: row["pictures a second"] for row in rows if row["workers"] == 0}
        before, after = rate["files, floats"], rate["pack, bytes"]
        yield (f"read pictures of {size} px, one process", "files, floats", f"{before:,.0f} a second", f"{after:,.0f} a second",
               f"{after / before:.1f}", "", "", "", report["machine"])


def by_model(report):
    """Forward and step of each model, in float32 and in bfloat16. Seconds of CPU there, on a CPU: other work may have run beside it."""
    clock = "seconds" if "NVIDIA" in report["device"] else "cpu_seconds"
    for name, entry in report["models"].items():
        for part in ("forward", "training step"):
            rows = {"bfloat16" if row["variant"].startswith(("bf16", "+ bf16")) else "float32": row
                    for row in reversed(entry["rows"]) if row["part"] == part and "floor" in row and row["variant"] != "checkpointed"}
            for kind, row in sorted(rows.items(), reverse=True):
                before = rows["float32"][clock] if kind == "bfloat16" and "float32" in rows else None
                error = f"; {row['flipped']:.2%} of the mask's pixels differ" if "flipped" in row else ""
                unit = "" if clock == "seconds" else ", seconds of CPU"
                yield line(f"{name}, {entry['image_size']} px, batch of {row['batch']}: {part}, {kind}{unit}", "float32" if before else "",
                           before, row[clock], row["floor"], f"{row['peak_gib']:.1f} GiB{error}", entry["machine"])


def summary(folder):
    """The rows, from what lies in `folder`."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    rows = list(data_path(found["data_path"])) if "data_path" in found else []
    if "magnet_forward" in found:
        rows.append(against_plain(found["magnet_forward"], "MagNet, 480 px: forward", found["magnet_forward"]["matrix floor of ris_nb, seconds"]))
    if "sag_step" in found:
        report = found["sag_step"]
        memory = " to ".join(f"{report['activation MB'][side]['peak']:,.0f}" for side in ("plain", "ris_nb")) + " MB of activations"
        rows.append(against_plain(report, f"SaG, 384 px, batch of {report['batch']}: training step", report["matrix floor, seconds"]["ris_nb"], memory))
    return rows + [row for report in found.values() if "models" in report for row in by_model(report)]


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=RESULTS)
    folder = parser.parse_args(words).folder
    lines = [HEAD, ("---",) * len(HEAD), *summary(folder)]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
    (folder / "summary.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
