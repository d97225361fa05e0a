"""Which way the verdicts of phase 1 go as models grow: sizes.json, .md, .png, from runs at 1, 2 and 4 times the size.

    python train.py configs/search/small/architecture.py --parallel=2
    python train.py configs/search/small/sizes.py --parallel=2
    python results/search/sizes.py [--csv out/small_architecture/summary.csv out/small_sizes/summary.csv]

sizes/first.csv is of the first command by the code of today, so that all sizes begin with weights of one kind; the runs
in architecture/, which the audit reads, are of an older one.

A verdict is a difference of two models' losses, seed by seed. Its trend is the slope of a line through all of them
against the logarithm of the size, with Student's 95% interval: nats for each doubling.
"""

import argparse
import csv
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PAIRS = (("1.3b", "1.3b-top2", "top-8 less top-2"), ("1.3b", "1b", "1.3b less 1b"),
         ("wide-1.5b", "deep-1.5b", "wide less deep"))
GROUPS = ("equal tokens", "equal FLOPs")
SIZES = (1, 2, 4)
T_95 = {5: 2.571}                        # Student's 97.5% point of 3 + 2 + 2 seeds less a line's two numbers


def read(paths: list[Path]) -> list[dict]:
    return [row for path in paths for row in csv.DictReader(path.read_text().splitlines())]


def losses(rows: list[dict]) -> dict[tuple[str, str, int], dict[str, float]]:
    """(model, group, size) -> {seed: loss}. At its own FLOPs the cheapest model, 1b, is the run at equal tokens."""
    found = {}
    for row in rows:
        name, _, size = row["model"].removesuffix("-flops").partition("-x")
        for group in GROUPS if name == "1b" and size else (GROUPS["FLOPs" in row["group"]],):
            found.setdefault((name, group, int(size or 1)), {})[row["seed"]] = float(row["loss"])
    return found


def differences(found: dict, a: str, b: str, group: str) -> dict[int, list[float]]:
    """size -> the loss of a less that of b, a seed each."""
    return {size: [loss - found[b, group, size][seed] for seed, loss in sorted(found[a, group, size].items())]
            for size in SIZES}


def trend(by_size: dict[int, list[float]]) -> tuple[float, float]:
    """(nats for each doubling, half of its 95% interval)."""
    x, y = np.array([(np.log2(size), one) for size, some in by_size.items() for one in some]).T
    (slope, start), free = np.polyfit(x, y, 1), len(x) - 2
    deviation = np.sqrt(((y - slope * x - start) ** 2).sum() / free / ((x - x.mean()) ** 2).sum())
    return float(slope), float(T_95[free] * deviation)


def rank_correlation(found: dict, rows: list[dict], group: str, size: int) -> float:
    """Of active ratio and quality over the five models of a size."""
    def ranks(x: list[float]) -> np.ndarray:
        return np.argsort(np.argsort(x))

    names = [name for name, *rest in found if rest == [group, size]]
    own = {row["model"]: float(row["active_ratio"]) for row in rows}
    ratios = [own[name if size == 1 else f"{name}-x{size}"] for name in names]
    quality = [-np.mean(list(found[name, group, size].values())) for name in names]
    return float(np.corrcoef(ranks(ratios), ranks(quality))[0, 1])


def draw(result: dict, path: Path) -> None:
    figure, panels = plt.subplots(1, len(PAIRS), figsize=(11, 3.4), layout="constrained")
    for axes, (*_, title) in zip(panels, PAIRS):
        for i, group in enumerate(GROUPS):
            one = result["differences"][f"{title}, {group}"]
            for j, some in enumerate(one["seeds"]):
                axes.plot([j] * len(some), some, "o", color=f"C{i}", alpha=0.4, ms=4)
            axes.plot(range(len(SIZES)), one["means"], color=f"C{i}", label=group)
        axes.axhline(0, color="0.5", lw=0.8)
        axes.set_xticks(range(len(SIZES)), [f"{size}x" for size in SIZES])
        axes.set(title=title, xlabel="size")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("nats a byte; below zero the first is better")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--csv", type=Path, nargs=2,
                        default=[HERE / "sizes" / "first.csv", HERE / "sizes" / "summary.csv"])
    rows = read(parser.parse_args().csv)
    found = losses(rows)
    result = {"differences": {}, "rank_correlations": {
        group: [rank_correlation(found, rows, group, size) for size in SIZES] for group in GROUPS}}
    sizes = " | ".join(f"{size}x" for size in SIZES)
    lines = [f"| difference (error) | {sizes} | each doubling (95%) | trend |", "|-|-|-|-|-|-|"]
    for a, b, title in PAIRS:
        for group in GROUPS:
            by_size = differences(found, a, b, group)
            slope, half = trend(by_size)
            verdict = "not resolved" if abs(slope) <= half else "rises" if slope > 0 else "falls"
            result["differences"][f"{title}, {group}"] = {
                "seeds": list(by_size.values()), "means": [float(np.mean(some)) for some in by_size.values()],
                "slope": slope, "half": half, "verdict": verdict}
            cells = [f"{np.mean(some):+.3f} ({np.std(some, ddof=1) / len(some) ** 0.5:.3f})"
                     for some in by_size.values()]
            lines.append(f"| {title}, {group} | {' | '.join(cells)} | {slope:+.3f} ({half:.3f}) | {verdict} |")
    for group, values in result["rank_correlations"].items():
        lines.append(f"| rank correlation of active ratio, {group} | "
                     + " | ".join(f"{value:+.1f}" for value in values) + " | | |")
    (HERE / "sizes.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE / "sizes.md").write_text("\n".join(lines).replace("-0", "−0").replace("-1.", "−1.") + "\n")
    draw(result, HERE / "sizes.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
