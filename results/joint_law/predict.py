"""The pairs of configs/joint_law/pair.py: prediction.json from the law, before; outcome.json from their runs, after.

    python results/joint_law/predict.py
    python train.py configs/joint_law/pair.py --parallel=2
    python results/joint_law/collect.py out/pair --table results/joint_law/pair.csv
    python results/joint_law/predict.py --outcome
"""

import argparse
import csv
import json
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import scaling
import train

HERE = Path(__file__).parent
T_2 = 4.303                          # Student's 97.5% point of two degrees of freedom


def rows_of(name: str) -> list[dict]:
    return list(csv.DictReader((HERE / name).read_text().splitlines()))


def noise(rows: list[dict]) -> float:
    """Deviation of one run from seed to seed, of the points that several seeds share."""
    points = {}
    for row in rows:
        points.setdefault((row["n_active"], row["n_expert"], row["tokens"]), []).append(float(row["loss"]))
    repeated = [np.array(losses) for losses in points.values() if len(losses) > 1]
    return float(np.sqrt(sum(((x - x.mean()) ** 2).sum() for x in repeated) / sum(len(x) - 1 for x in repeated)))


def predict() -> dict:
    """Loss of each model and what the experts gain, with 90% intervals of the law and of three seeds' noise."""
    laws, _ = scaling.chosen_law(HERE / "fit.json")
    rng, deviation, losses, result = np.random.default_rng(0), noise(rows_of("runs.csv")), {}, {}
    for config in train.load_runs(str(HERE.parents[1] / "configs" / "joint_law" / "pair.py")):
        if config.seed > 4:
            continue                                                              # one of the three seeds
        d, E, name = config.d_model, config.n_expert, Path(config.out_dir).name.removesuffix("-s4")
        tables, block = 2 * d * config.vocab_size, config.n_layer * d**2
        N, D = tables + 13 * block, train.budget(config)["tokens"]
        losses[name] = scaling.many(laws).loss(N, D, E)[:, 0]
        losses[name][1:] += rng.normal(0, deviation / 3**0.5, len(laws) - 1)
        result[name] = {"n_active": N, "n_total": tables + (4 + 9 * E) * block, "tokens": D, "flops": 6 * N * D,
                        "loss": losses[name][0], "interval": np.quantile(losses[name][1:], [0.05, 0.95]).tolist()}
    pairs = {}
    for pair in ("wins", "loses"):
        dense, experts = (losses[name] for name in losses if name.startswith(pair))
        gain = dense - experts
        pairs[pair] = {"gain": gain[0], "interval": np.quantile(gain[1:], [0.05, 0.95]).tolist(),
                       "chance_that_experts_win": float((gain[1:] > 0).mean())}
    return {"noise_of_a_run": deviation, "models": result, "pairs": pairs}


def outcome() -> dict:
    """What three seeds measured, beside what was predicted."""
    prediction, measured = json.loads((HERE / "prediction.json").read_text()), {}
    for row in sorted(rows_of("pair.csv"), key=lambda row: row["seed"]):
        measured.setdefault(row["name"].rpartition("-s")[0], []).append(float(row["loss"]))
    result = {}
    for pair, said in prediction["pairs"].items():
        dense, experts = (np.array(measured[name]) for name in prediction["models"] if name.startswith(pair))
        gain = dense - experts
        half = T_2 * gain.std(ddof=1) / len(gain) ** 0.5
        low, high = said["interval"]
        result[pair] = {"dense": dense.tolist(), "experts": experts.tolist(), "gain": float(gain.mean()), "half": half,
                        "predicted": said["gain"], "inside": bool(low <= gain.mean() <= high),
                        "sign_right": bool(gain.mean() * said["gain"] > 0)}
    models = {name: {"measured": float(np.mean(measured[name])), "predicted": said["loss"],
                     "inside": bool(said["interval"][0] <= np.mean(measured[name]) <= said["interval"][1])}
              for name, said in prediction["models"].items()}
    return {"pairs": result, "models": models}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--outcome", action="store_true", help="after the runs: write outcome.json")
    after = parser.parse_args().outcome
    os.chdir(HERE.parents[1])
    result = scaling.clean(outcome() if after else predict(), 6)
    (HERE / ("outcome.json" if after else "prediction.json")).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
