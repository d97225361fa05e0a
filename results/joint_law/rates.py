"""The grid of peak rates to rates.json: the best rate of each size, and eq. 7 fitted to them.

    python train.py configs/joint_law/rates.py --parallel=2
    python results/joint_law/rates.py [--csv out/rates/summary.csv]

The best rate is the bottom of a parabola, in the logarithm of the rate, through the lowest loss and its neighbours.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def best_rate(rates: np.ndarray, losses: np.ndarray) -> float:
    """ln of the rate at the bottom of the parabola through the best point and its two neighbours."""
    x, i = np.log(rates), int(np.clip(losses.argmin(), 1, len(losses) - 2))
    curve, slope, _ = np.polyfit(x[i - 1:i + 2], losses[i - 1:i + 2], 2)
    bottom = -slope / (2 * curve) if curve > 0 else x[losses.argmin()]
    return float(np.clip(bottom, x[0], x[-1]))


def cells(rows: list[dict]) -> list[dict]:
    """One for each group of the grid: N (active, without embeddings, norms and router), E, and its best rate."""
    found = []
    for group in dict.fromkeys(row["group"] for row in rows):
        some = sorted((row for row in rows if row["group"] == group), key=lambda row: float(row["learning_rate"]))
        rates, losses = (np.array([float(row[name]) for row in some]) for name in ("learning_rate", "loss"))
        d, E = int(some[0]["d_model"]), int(some[0]["n_expert"])
        found.append({"n_expert": E, "d_model": d, "n_body": 13 * (d // 16) * d**2, "rates": rates.tolist(),
                      "losses": losses.tolist(), "best": float(np.exp(best_rate(rates, losses)))})
    return found


def eq_7(found: list[dict], experts: bool) -> dict:
    """ln lr = a + b ln N (+ c ln E) by least squares, without the cells of 4 experts, which check it."""
    def terms(cell):
        return [1, np.log(cell["n_body"]), *[np.log(cell["n_expert"])] * experts]
    told = [cell for cell in found if cell["n_expert"] != 4]
    x, y = np.array([terms(cell) for cell in told]), np.log([cell["best"] for cell in told])
    coefficients = np.linalg.lstsq(x, y, rcond=None)[0]
    miss = {f"E {cell['n_expert']}, d_model {cell['d_model']}":
            float(np.log(cell["best"]) - terms(cell) @ coefficients) for cell in found}
    return {"coefficients": coefficients.tolist(), "miss": miss,
            "rmse": float(np.sqrt(np.mean((y - x @ coefficients) ** 2)))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--csv", type=Path, default=HERE / "rates.csv")
    args = parser.parse_args()
    found = cells(list(csv.DictReader(args.csv.read_text().splitlines())))
    result = {"cells": found, "with_experts": eq_7(found, True), "without_experts": eq_7(found, False)}
    (HERE / "rates.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("with_experts", "without_experts")}, indent=1))
