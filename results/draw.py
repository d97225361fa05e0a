"""The benchmarks' figures, from their JSON alone: a PNG beside each.

    python results/draw.py                             of every JSON in this folder
    python results/draw.py results/step_cpu.json ...   of these, which bench.py wrote with --json

A table is a panel, a row a bar: tokens that a card holds, tokens/s, rows/s, GFLOP/s, GiB beside their
estimate, or seconds, whichever comes first and is there. Ours is blue; peers and floors are grey.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN = {  # what a bar can be, the first that a table has: what the title calls it
    "tokens": "tokens a micro-batch can hold", "tokens_per_s": "tokens/s", "rows_per_s": "rows/s", "gflops": "gflops",
    "measured": "GiB measured", "estimate": "GiB estimated", "seconds": "seconds"}
THEIRS = ("transformers", "liger", "torchtitan", "plain", "naive", "floor")
START = 256                       # tokens, where the logarithmic axis of what cards hold begins


def draw(path: Path) -> Path:
    """Draw a JSON's tables one below another; returns the PNG."""
    result = json.loads(path.read_text())
    tables = [(name, part) for name, data in result["benchmarks"].items() for part in data.get("results", [data])]
    sizes = [len(part["rows"]) for _, part in tables]
    figure, axes = plt.subplots(len(tables), 1, figsize=(8, sum(0.9 + 0.28 * n for n in sizes)), squeeze=False,
                                height_ratios=[n + 2 for n in sizes], layout="constrained")
    for axis, (name, part) in zip(axes.flat, tables):
        draw_table(axis, name, part)
    estimated = all(part.get("estimated") for _, part in tables)
    figure.suptitle("estimates: nothing was run" if estimated else result["conditions"]["device"], fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    plt.close(figure)
    return path.with_suffix(".png")


def draw_table(axis, benchmark: str, part: dict) -> None:
    rows = part["rows"]
    names = [r["name"] + (f", {r['gb']:g} GB" if "gb" in r else "") for r in rows]
    key = next(key for key in SHOWN if any(r.get(key) is not None for r in rows))
    start = START if key == "tokens" else 0
    colours = ["lightgray" if any(peer in name for peer in THEIRS) else "tab:blue" for name in names]
    bars = axis.barh(names, [r.get(key) or start for r in rows], color=colours)
    axis.bar_label(bars, [bar_text(r, key) for r in rows], padding=3, fontsize=8,
                   bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axis.margins(x=0.1)
    if key == "tokens":
        axis.set_xscale("log", base=2)
        widest = max(r["tokens"] for r in rows) / start + 1
        axis.set_xlim(start, start * widest**1.6)                      # room for the words
    if key == "measured":
        axis.plot([r["estimate"] for r in rows], names, "k|", markersize=14, label="estimate")
        axis.legend(frameon=False, fontsize=8)
    axis.invert_yaxis()
    of = ", ".join(filter(None, [part.get("name") or part.get("config"), SHOWN[key]]))
    axis.set_title(f"{benchmark}: {of}", fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def bar_text(r: dict, key: str) -> str:
    """What stands behind a bar: its value; of a card what it holds, and what to run."""
    if key == "tokens":
        return f"{r['largest']}, floor {r['floor_s']:.4g} s as {r['run']}" if r["tokens"] else r["largest"]
    value = r.get(key)
    if value is None:
        return r.get("status", "-")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="*", type=Path, help="what bench.py wrote; without one, every JSON here")
    for path in parser.parse_args(argv).json or sorted(Path(__file__).parent.glob("*.json")):
        try:
            print(draw(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"error: {path} is no JSON that bench.py wrote: {type(error).__name__}: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
