"""Append the finished runs of a sweep to a table that `scaling.py fit` reads: runs.csv beside this file, or another.

    python results/joint_law/collect.py [out/small] [--table results/joint_law/runs.csv]

n_active and n_total are counted as the paper counts: embedding and head included, norms and routers left out. The runs
of LATE tokens or more are written once more, beside the table: late.csv, what the law is fitted to.
"""

import argparse
import csv
import json
from pathlib import Path

COLUMNS = ("name", "n_active", "n_total", "tokens", "n_expert", "loss", "bits_per_byte", "seed", "d_model", "n_layer",
           "learning_rate", "steps", "flops")
LATE = 800_000


def row_of(folder: Path) -> dict:
    """What a run's folder says, a value for each of COLUMNS."""
    result, config = (json.loads((folder / name).read_text()) for name in ("result.json", "config.json"))
    d, E = config["d_model"], config["n_expert"]
    tables, block = 2 * d * config["vocab_size"], config["n_layer"] * d**2
    said = result | config | {"name": folder.name, "n_active": tables + 13 * block,
                              "n_total": tables + (4 + 9 * E) * block}
    return {name: said[name] for name in COLUMNS}


def write(path: Path, rows: list[dict]) -> None:
    with path.with_suffix(".tmp").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".tmp").replace(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sweep", nargs="?", type=Path, default=Path("out/small"))
    parser.add_argument("--table", type=Path, default=Path(__file__).with_name("runs.csv"))
    args = parser.parse_args()
    rows = list(csv.DictReader(args.table.read_text().splitlines())) if args.table.is_file() else []
    there = {row["name"] for row in rows}
    done = sorted(args.sweep.glob("*/result.json"), key=lambda path: path.stat().st_mtime)
    new = [row_of(path.parent) for path in done if path.parent.name not in there]
    write(args.table, rows + new)
    if args.table.name == "runs.csv":
        write(args.table.with_name("late.csv"), [row for row in rows + new if int(row["tokens"]) >= LATE])
    print(f"{args.table}: {len(new)} new runs, {len(rows) + len(new)} in all")


if __name__ == "__main__":
    main()
