"""The cells of configs/slicing/factorial.py to factorial.json, .md and .png: main effects and two-way interactions.

    python train.py configs/slicing/factorial.py --parallel=2
    python results/slicing/factorial.py [--csv out/factorial/summary.csv]

compute_saved: what the ladder of cell E would take to the same loss, over what was taken; above 1 a saving.
An effect is the mean loss of the eight cells at one sign less that of the eight at the other; seeds are paired, so what
a seed adds to all cells drops out. The interval is Student's at 95%, of the scatter of cells from seed to seed.
"""

import argparse
import csv
import json
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
MEANING = {"A": "16 experts for each visited, not 4", "B": "width 16, not 32", "C": "a quarter of them shared",
           "D": "a bias, not the loss", "E": "dropless, not capacity 1.25"}
T_30 = 2.042                         # Student's 97.5% point of (16 - 1) (3 - 1) degrees of freedom


def effects(losses: dict[str, list[float]]) -> tuple[dict[str, float], float]:
    """({effect: nats}, half of every effect's 95% interval) from the loss of each cell, one a seed, in one order."""
    cells = list(losses)
    L = np.array([losses[cell] for cell in cells])                                # (16, seeds)
    L = L - L.mean(0)
    sign = {letter: np.array([1 if letter in cell else -1 for cell in cells]) for letter in MEANING}
    for first, second in combinations(MEANING, 2):
        sign[first + second] = sign[first] * sign[second]
    deviation = np.sqrt(((L - L.mean(1, keepdims=True)) ** 2).sum() / (len(L) - 1) / (L.shape[1] - 1))
    return {name: float(2 * (s @ L.mean(1)) / len(L)) for name, s in sign.items()}, T_30 * deviation * 2 / L.size**0.5


def draw(found: dict[str, float], half: float, path: Path) -> None:
    """Every effect with its interval, the largest on top; grey: not resolved."""
    names = sorted(found, key=lambda name: abs(found[name]))
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for y, name in enumerate(names):
        clear = abs(found[name]) > half
        axes.errorbar(found[name], y, xerr=half, fmt="o", color="C0" if clear else "0.6", capsize=3, ms=4)
    axes.axvline(0, color="0.5", lw=0.8)
    axes.set_yticks(range(len(names)), [f"{name}: {MEANING[name]}" if name in MEANING else f"{name[0]} x {name[1]}"
                                        for name in names], fontsize=8)
    axes.set_xlabel("effect on the validation loss, nats a byte, 95%; below zero it helps")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--csv", type=Path, default=HERE / "factorial" / "summary.csv")
    rows = sorted(csv.DictReader(parser.parse_args().csv.read_text().splitlines()), key=lambda row: int(row["seed"]))
    losses, flops = {}, {}
    for row in rows:
        losses.setdefault(row["model"], []).append(float(row["loss"]))
        flops[row["model"]] = float(row["flops"])
    ladder = sorted((flops[name], np.mean(losses.pop(name) if "-" in name else losses[name]))
                    for name in list(losses) if name.split("-")[0] == "E")
    (low, high), _, (top, bottom) = ladder
    slope = (bottom - high) / np.log(top / low)                                   # nats for each e-fold of compute
    found, half = effects(losses)
    result = {"effects": found, "half_interval": half, "nats_an_e_fold_of_compute": slope,
              "compute_saved": {name: float(np.exp(effect / slope)) for name, effect in found.items()},
              "losses": losses}
    (HERE / "factorial.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(found, half, HERE / "factorial.png")
    lines = ["| effect | nats | 95% | compute saved | verdict |", "|-|-:|-:|-:|-|"]
    for name, effect in sorted(found.items(), key=lambda pair: -abs(pair[1])):
        verdict = "not resolved" if abs(effect) <= half else "helps" if effect < 0 else "hurts"
        if len(name) > 1 and verdict != "not resolved":
            verdict = "they help each other" if effect < 0 else "they get in each other's way"
        meaning = f"{name}: {MEANING[name]}" if len(name) == 1 else f"{name[0]} x {name[1]}"
        lines.append(f"| {meaning} | {effect:+.4f} | ± {half:.4f} | {np.exp(effect / slope):.2f}x | {verdict} |")
    (HERE / "factorial.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
