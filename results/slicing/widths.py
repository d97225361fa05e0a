"""The runs of configs/slicing/widths.py to widths.json: the best width of each active and total size, and its shifts.

    python train.py configs/slicing/widths.py --parallel=2
    python train.py configs/slicing/width_rates.py --parallel=2
    python results/slicing/widths.py [--csv out/widths/summary.csv] [--rates out/width_rates/summary.csv]

A parabola in the logarithm of the width, with an offset for each seed, is fitted to a group by least squares; its
bottom's interval is that of 20,000 draws from the coefficients' distribution. Without a bottom in 95% of them: None.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SHIFTS = {"total 512 to 2048 at active 128": ("active 128, total 512", "active 128, total 2048"),
          "active 64 to 128 at total 2048": ("active 64, total 2048", "active 128, total 2048"),
          "active 128 to 256 at total 2048": ("active 128, total 2048", "active 256, total 2048"),
          "active 64 to 256 at total 2048": ("active 64, total 2048", "active 256, total 2048")}


def bottoms(width: np.ndarray, seed: np.ndarray, loss: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws (20,000,) of the logarithm of the best width, the fit's first; nan where the parabola has no bottom."""
    x = np.log(width)
    seeds = (seed[:, None] == np.unique(seed)).astype(float)
    A = np.column_stack((x**2, x, seeds))
    fitted, free = np.linalg.lstsq(A, loss, rcond=None)[0], len(x) - A.shape[1]
    variance = ((loss - A @ fitted) ** 2).sum() / free
    scale = np.sqrt(free / rng.chisquare(free, 20_000))
    noise = rng.multivariate_normal(np.zeros(2), variance * np.linalg.inv(A.T @ A)[:2, :2], 20_000)
    curve, slope = (fitted[:2] + scale[:, None] * noise).T
    curve[0], slope[0] = fitted[:2]
    return np.where(curve > 0, -slope / (2 * np.where(curve > 0, curve, 1)), np.nan)


def summed_up(draws: np.ndarray) -> dict:
    """e to the fit's value and to the ends of the 95% interval, as far as the draws have them."""
    low, high = np.nanquantile(draws, [0.025, 0.975]) if np.isfinite(draws).mean() >= 0.95 else (np.nan, np.nan)
    return {name: None if np.isnan(value) else float(np.exp(value))
            for name, value in (("value", draws[0]), ("low", low), ("high", high))}


def at_rates(rows: list[dict]) -> dict[str, dict[str, float]]:
    """group -> {times its first rate: loss}."""
    found = {}
    for row in sorted(rows, key=lambda row: float(row["learning_rate"])):
        own = found.setdefault(row["group"], [])
        own.append((float(row["learning_rate"]), float(row["loss"])))
    return {group: {f"{rate / own[0][0]:.3g}": loss for rate, loss in own} for group, own in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--csv", type=Path, default=HERE / "widths" / "summary.csv")
    parser.add_argument("--rates", type=Path, default=HERE / "width_rates" / "summary.csv")
    args = parser.parse_args()
    rows, tried = (list(csv.DictReader(path.read_text().splitlines())) for path in (args.csv, args.rates))
    rng, draws = np.random.default_rng(0), {}
    for group in dict.fromkeys(row["group"] for row in rows):
        some = [[float(row[name]) for name in ("d_expert", "seed", "loss")] for row in rows if row["group"] == group]
        draws[group] = bottoms(*np.array(some).T, rng)
    result = {"best": {group: summed_up(some) for group, some in draws.items()},
              "shifts": {name: summed_up(draws[to] - draws[of]) for name, (of, to) in SHIFTS.items()}}
    result["at_rates"] = at_rates(tried)
    for shift in result["shifts"].values():
        shift["verdict"] = ("not resolved" if shift["low"] is None or shift["low"] <= 1 <= shift["high"] else
                            "wider" if shift["value"] > 1 else "narrower")
    (HERE / "widths.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
