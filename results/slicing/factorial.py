"""The cells of configs/slicing/factorial.py to factorial.json, .md and .png: main effects and two-way interactions.

    python train.py configs/slicing/factorial.py --parallel=2
    python results/slicing/factorial.py [--csv out/factorial/summary.csv]

An effect is the mean loss of the eight cells at one sign less that of the eight at the other; seeds are paired, so what
a seed adds to all cells drops out. The interval is Student's at 95%, of the effects' own scatter from seed to seed,
pooled over the seven effects that compare shapes and over the eight others: cells of one shape (A, B and C alike) begin
with the same weights and scatter together, so what compares shapes is known less well. Main effects share their column
with interactions of four choices, and those of two with those of three, which are taken for nothing.

compute_saved: the ladder of cell E at half, once and twice the tokens says how many times the FLOPs the change of loss
is worth; that, over how many times the FLOPs the choice takes (routers of more experts are larger). Above 1 a saving.
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
OF_SHAPES = {"A", "B", "C", "AB", "AC", "BC", "DE"}      # what compares shapes; DE, since its column is that of ABC
T = {14: 2.145, 16: 2.120}           # Student's 97.5% points: two degrees of freedom each of seven and of eight effects


def signs(cells: list[str]) -> dict[str, np.ndarray]:
    """For each choice and pair of choices: +1 or -1 for each cell."""
    sign = {letter: np.array([1 if letter in cell else -1 for cell in cells]) for letter in MEANING}
    return sign | {one + two: sign[one] * sign[two] for one, two in combinations(MEANING, 2)}


def effects(losses: dict[str, list[float]]) -> tuple[dict[str, float], dict[str, float]]:
    """({effect: nats}, {effect: half of its 95% interval}) from the loss of each cell, one a seed, in one order."""
    L = np.array(list(losses.values()))                                           # (16, 3)
    assert L.shape == (16, 3), "the degrees of freedom are of 16 cells and three seeds"
    by_seed = {name: 2 * sign @ L / len(L) for name, sign in signs(list(losses)).items()}
    half = {}
    for shapes in (True, False):
        names = [name for name in by_seed if (name in OF_SHAPES) == shapes]
        variance = np.mean([by_seed[name].var(ddof=1) for name in names])
        half |= dict.fromkeys(names, float(T[2 * len(names)] * (variance / 3) ** 0.5))
    return {name: float(some.mean()) for name, some in by_seed.items()}, half


def compute_saved(losses: dict[str, list[float]], flops: dict[str, float], ladder: list) -> dict[str, float]:
    """{effect: times}; ladder: (FLOPs, loss) of three budgets."""
    spent, reached = np.log(ladder).T[0], np.array(ladder).T[1]

    def worth(loss: float) -> float:
        """ln FLOPs at which the ladder has this loss: it falls along straight lines in them."""
        return np.interp(-loss, -reached, spent)

    found, _ = effects(losses)
    middle, cost = np.mean(list(losses.values())), np.log([flops[cell] for cell in losses])
    return {name: float(np.exp(worth(middle + found[name] / 2) - worth(middle - found[name] / 2)
                               - 2 * sign @ cost / len(cost))) for name, sign in signs(list(losses)).items()}


def draw(found: dict[str, float], half: dict[str, float], path: Path) -> None:
    """Every effect with its interval, the largest on top; grey: not resolved."""
    names = sorted(found, key=lambda name: abs(found[name]))
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for y, name in enumerate(names):
        clear = abs(found[name]) > half[name]
        axes.errorbar(found[name], y, xerr=half[name], fmt="o", color="C0" if clear else "0.6", capsize=3, ms=4)
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
    found, half = effects(losses)
    saved = compute_saved(losses, flops, ladder)
    result = {"effects": found, "half_interval": half, "compute_saved": saved, "ladder": ladder, "losses": losses}
    (HERE / "factorial.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(found, half, HERE / "factorial.png")
    lines = ["| effect | nats | 95% | compute saved | verdict |", "|-|-:|-:|-:|-|"]
    for name, effect in sorted(found.items(), key=lambda pair: -abs(pair[1])):
        verdict = "not resolved" if abs(effect) <= half[name] else "helps" if effect < 0 else "hurts"
        if len(name) > 1 and verdict != "not resolved":
            verdict = "they help each other" if effect < 0 else "they get in each other's way"
        meaning = f"{name}: {MEANING[name]}" if len(name) == 1 else f"{name[0]} x {name[1]}"
        lines.append(f"| {meaning} | {effect:+.4f} | ± {half[name]:.4f} | {saved[name]:.2f}x | {verdict} |")
    (HERE / "factorial.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
