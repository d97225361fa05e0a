"""Keep of finished runs what the pages of results/ quote, as JSON on standard output.

    python results/experiments/keep.py configs/tiny.py out/no-balance-s1 out/no-balance-s2 > results/experiments/X.json
    python results/experiments/keep.py SWEEP.py NAME NAME SWEEP.py NAME       runs of sweeps, by their names there

A run is named after the config file it was made from. Its command is worked out from its config.json, so that it
cannot be another's. Of log.jsonl remain the validation losses, and of each number about the steps the last one and the
mean over the last half of the steps. "gate_moved" is how far the router's weights are from where weight decay alone
would have brought them, over their initial length: 0 if no gradient reached them.
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

STEP = "ce", "balance", "z", "load_max_over_mean", "dead_experts", "entropy", "dropped"
RESULT = "loss", "n_total", "n_active", "steps", "tokens", "flops", "seconds", "device", "torch", "python"
WEIGHTS = "uniform numbers through erfinv; those of commit aeed8ff and before were torch's truncated normal"


def kept(name: str, seed: int, command: str, out: Path) -> dict:
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    result = json.loads((out / "result.json").read_text())
    steps = [line for line in log if "ce" in line]
    columns = {key: [line[key] for line in steps] for key in STEP if key in steps[0]}
    return {"name": name, "seed": seed, "command": command, **{key: result[key] for key in RESULT},
            "gate_moved": float(f"{gate_moved(out, steps):.3g}"),
            "validation": [[line["tokens"], round(line["val_ce"], 5)] for line in log if "val_ce" in line],
            "end": {key: round(column[-1], 5) for key, column in columns.items()},
            "last_half": {key: round(fmean(column[len(column) // 2:]), 5) for key, column in columns.items()}}


def gate_moved(out: Path, steps: list[dict]) -> float:
    values = json.loads((out / "config.json").read_text())
    config = Config(**{key: value for key, value in values.items() if key in Config.__dataclass_fields__})
    first, last = Model(config).init_weights(config.seed).state_dict(), torch.load(out / "ckpt.pt", "cpu")["model"]
    kept, gates = 1.0, [name for name in first if name.endswith(".gate")]
    for line in steps:
        kept *= 1 - line["lr"] * config.weight_decay
    lengths = [torch.cat([w.flatten() for w in weights]).norm() for weights in (
        [last[name] - kept * first[name] for name in gates], [first[name] for name in gates])]
    return float(lengths[0] / lengths[1])


def of_sweep(path: str, names: list[str]) -> list[dict]:
    return [kept(run.name, run.config.seed, f"python train.py {path} --only={run.name}", Path(run.config.out_dir))
            for run in read_runs(path) if run.name in names or run.model in names]


def of_file(path: str, folders: list[str]) -> list[dict]:
    file, rows = json.loads(json.dumps(vars(read_runs(path)[0].config))), []
    for out in folders:
        now = json.loads(Path(out, "config.json").read_text())
        flags = [f"--{key}={now[key]}" for key in file if now[key] != file[key] and key != "out_dir"]
        command = shlex.join(["python", "train.py", path, *flags, f"--out_dir={out}"])
        rows.append(kept(Path(out).name, now["seed"], command, Path(out)))
    return rows


def main(*words: str) -> None:
    files = [i for i, word in enumerate(words) if word.endswith(".py")]
    rows = []
    for start, end in zip(files, [*files[1:], len(words)]):
        path, names = words[start], list(words[start + 1:end])
        rows += of_sweep(path, names) if read_runs(path)[0].name else of_file(path, names)
    commit = subprocess.run(["git", "log", "-1", "--format=%h", "--", "router.py", "model.py", "train.py"],
                            cwd=ROOT, capture_output=True, text=True).stdout.strip()
    head = {"command": shlex.join(["python", "results/experiments/keep.py", *words]), "code": commit,
            "initial_weights": WEIGHTS}
    print(json.dumps(head)[:-1] + ', "runs": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}")


main(*sys.argv[1:])
