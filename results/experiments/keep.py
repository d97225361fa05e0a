"""Keep of finished runs what the pages of results/ quote, as JSON on standard output.

    python results/experiments/keep.py configs/tiny.py out/hash-s1 out/hash-s2 > results/experiments/X.json
    python results/experiments/keep.py SWEEP.py NAME NAME SWEEP.py NAME       runs of sweeps, by their names there

A run's command is worked out from its config.json, so that it cannot be another's. Of log.jsonl remain the validation
losses, and of each number about the steps the last one and the mean over the last half of the steps. "gate_moved" is
how far the routers' weights are from where weight decay alone would have brought them, over their initial length: 0 if
no gradient reached them. "code" is the last commit that changed the code of the tree that this file lies in: keep runs
with the tree that made them.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import torch

from train import Config, Model, read_runs

STEP = ("ce", "balance", "z", "load_max_over_mean", "dead_experts", "entropy", "dropped")
RESULT = ("loss", "n_total", "n_active", "steps", "tokens", "flops", "seconds", "device", "torch", "python")


def kept(name: str, config: dict, command: str, out: Path) -> dict:
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    result = json.loads((out / "result.json").read_text())
    steps = [line for line in log if "ce" in line]
    row = {"name": name, "seed": config["seed"], "command": command}
    row |= {key: result[key] for key in RESULT}
    row["gate_moved"] = float(f"{gate_moved(out, config, steps):.3g}")
    row["validation"] = [[line["tokens"], round(line["val_ce"], 5)] for line in log if "val_ce" in line]
    columns = {key: [line[key] for line in steps] for key in STEP if key in steps[0]}
    row["end"] = {key: round(column[-1], 5) for key, column in columns.items()}
    row["last_half"] = {key: round(fmean(column[len(column) // 2:]), 5) for key, column in columns.items()}
    return row


def gate_moved(out: Path, config: dict, steps: list[dict]) -> float:
    config = Config(**{key: value for key, value in config.items() if key in Config.__dataclass_fields__})
    first = Model(config).init_weights(config.seed).state_dict()
    last = torch.load(out / "ckpt.pt", "cpu")["model"]
    left = 1.0                                            # of an initial weight, after the decay of all steps
    for line in steps:
        left *= 1 - line["lr"] * config.weight_decay
    gates = [name for name in first if name.endswith(".gate")]
    moved = torch.cat([(last[name] - left * first[name]).flatten() for name in gates])
    return float(moved.norm() / torch.cat([first[name].flatten() for name in gates]).norm())


def rows(path: str, words: list[str]) -> list[dict]:
    """The runs of one file: for a sweep the words are its runs' or models' names, else folders."""
    runs = read_runs(path)
    if runs[0].name:
        return [kept(run.name, vars(run.config), f"python train.py {path} --only={run.name}", Path(run.config.out_dir))
                for run in runs if run.name in words or run.model in words]
    file = json.loads(json.dumps(vars(runs[0].config)))   # tuples as lists, as config.json has them
    found = []
    for out in words:
        config = json.loads(Path(out, "config.json").read_text())
        flags = [f"--{key}={config[key]}" for key in file if config[key] != file[key] and key != "out_dir"]
        command = shlex.join(["python", "train.py", path, *flags, f"--out_dir={out}"])
        found.append(kept(Path(out).name, config, command, Path(out)))
    return found


def main(*words: str) -> None:
    files = [i for i, word in enumerate(words) if word.endswith(".py")]
    runs = []
    for start, end in zip(files, [*files[1:], len(words)]):
        runs += rows(words[start], list(words[start + 1:end]))
    git = ["git", "log", "-1", "--format=%h", "--", "router.py", "model.py", "train.py"]
    code = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    head = {"command": shlex.join(["python", "results/experiments/keep.py", *words]), "code": code}
    print(json.dumps(head)[:-1] + ', "runs": [\n' + ",\n".join(map(json.dumps, runs)) + "\n]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
