"""The cells of configs/slicing/factorial.py to factorial.json and factorial.md: main effects and two-way interactions.

    python train.py configs/slicing/factorial.py --parallel=2
    python results/slicing/factorial.py [--csv out/factorial/summary.csv]

An effect is the mean loss of the eight cells at one sign less that of the eight at the other; seeds are paired, so what
a seed adds to all cells drops out. The interval is Student's at 95%, of the scatter of cells from seed to seed.
"""

import argparse
import csv
import json
from itertools import combinations
from pathlib import Path

import numpy as np

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
              "compute_to_equal_loss": {name: float(np.exp(effect / slope)) for name, effect in found.items()},
              "losses": losses}
    (HERE / "factorial.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = ["| effect | nats | 95% | compute to equal loss | verdict |", "|-|-:|-:|-:|-|"]
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
