"""Speed and memory of one and two processes on this machine, from the log of real runs: writes measured.json beside it.

    python results/distributed/measure.py          from the repository's root; nothing else may run meanwhile

Every process has one thread. "silent" are two runs at once, each on a half of the batch, which exchange nothing: what a
step takes beyond theirs is communication, and the wait for it.
"""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ALONE, TWO = "{python} train.py", "{python} -m torch.distributed.run --standalone --nproc_per_node=2 train.py"
SPEED = "configs/tiny.py --micro_batch=4 --max_steps=45 --log_interval=15 --eval_interval=1000 --eval_tokens=4096"
BATCH = {"whole": "--batch_tokens=4096", "half": "--batch_tokens=2048"}       # 2 micro-batches, or 1
LARGE = ("configs/tiny.py --n_expert=64 --d_expert=512 --d_model=256 --d_head=32 --seq_len=128 --micro_batch=1 "
         "--max_steps=4 --log_interval=1 --eval_interval=1000 --eval_tokens=128")
MODES = {"ddp": "", "fsdp": "--data_parallel=fsdp", "experts / 2": "--expert_parallel=2"}


def logs(commands: list[str]) -> list[list[dict]]:
    """The logs of these commands, run at once, each in a folder of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / str(i) for i in range(len(commands))]
        words = [shlex.split(command.format(python=sys.executable)) + [f"--out_dir={out}"]
                 for command, out in zip(commands, outs)]
        started = [subprocess.Popen(one, env=environment, stdout=subprocess.DEVNULL) for one in words]
        assert all(process.wait() == 0 for process in started)
        return [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in outs]


def speed(log: list[dict]) -> float:
    """Tokens a second after the first fifteen steps, in which memory is first touched."""
    steps = [line for line in log if "tokens_per_s" in line and line["step"] >= 15]
    return statistics.median(line["tokens_per_s"] for line in steps)


def main() -> None:
    alone = f"{ALONE} {SPEED} {BATCH['whole']}"
    silent = f"{ALONE} {SPEED} {BATCH['half']}"
    modes = {mode: f"{TWO} {SPEED} {BATCH['whole']} {flags}" for mode, flags in MODES.items()}
    found = {"one process": [], "silent": [], **{mode: [] for mode in modes}}
    for _ in range(2):                                                    # in turns: the machine wanders
        found["one process"].append(speed(logs([alone])[0]))
        found["silent"].append(sum(map(speed, logs([silent, silent]))))
        for mode, command in modes.items():
            found[mode].append(speed(logs([command])[0]))
    memory = {}
    for mode, flags in MODES.items():
        memory[mode] = max(line.get("memory", 0) for line in logs([f"{TWO} {LARGE} {flags}"])[0])
    cpu = next((line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())
    result = {"command": "python results/distributed/measure.py", "processor": cpu, "cores": os.cpu_count(),
              "torch": torch.__version__, "python": platform.python_version(), "speed": SPEED, "large": LARGE,
              "tokens_per_s": found, "peak_memory_of_a_rank": memory}
    Path(__file__).with_name("measured.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
