"""The long test: kill -9 at random instants, and nothing is lost. Writes results/faults.json.

    python tests/kill.py --kills=100                  forks of a process that has torch loaded, and some real processes
    python tests/kill.py --kills=10 --torchrun=2      under torchrun, two ranks, all of them killed at once
    python tests/kill.py --kills=0                    the parents of sweeps alone
    python tests/kill.py --others                     signals, full disks, damaged checkpoints, Ctrl-C while torch loads

A run is killed at instants drawn evenly from its whole life, with all that belongs to it: tokenisation, evaluation, a
checkpoint and a log line every step. Killed up to four times, it is given the same command once more; its weights,
AdamW's means and its log must then be those of a run that nobody disturbed, bit for bit, a line a step. Last, sweeps
lose their parent: no process may be left after five seconds, and the same command must end them in the same weights.
A fault passes when the same command ends in the reference's weights, or when it is refused in one line.
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

import train as t
from router import run_script

TINY = dict(n_layer=2, d_model=32, n_head=2, n_kv_head=1, d_head=16, n_expert=4, top_k=2, d_expert=16, vocab_size=264,
            seq_len=32, dataset="corpus", device="cpu", micro_batch=4, max_steps=40, learning_rate=3e-3,
            eval_interval=10, eval_tokens=512, log_interval=1, checkpoint_interval=1)


def prepare(folder: Path) -> None:
    """A config, a sweep of two such runs, and a corpus of 400 files."""
    text = "".join(f"{name} = {value!r}\n" for name, value in TINY.items())
    (folder / "tiny.py").write_text(text)
    (folder / "sweep.py").write_text(text + "runs = [dict(name='a'), dict(name='b', n_expert=8)]\n")
    (folder / "corpus").mkdir()
    draw, words = random.Random(0), "def return self value for in if not class import a x y = ( ) : + 1".split()
    for i in range(400):
        (folder / f"corpus/{i:03d}.txt").write_text(" ".join(draw.choices(words, k=400)) + "\n")


class Fork:
    """`python train.py ...` in a fork of this process, without figures and a sample of text."""

    def __init__(self, words: list[str], folder: Path, most: int = resource.RLIM_INFINITY):
        self.pid = os.fork()
        if not self.pid:
            os.chdir(folder)
            out = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1), os.dup2(out, 2)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))       # bytes a file may have
            t.draw_figures, t.write_text = (lambda out: None), (lambda *_, **__: [])
            sys.argv = ["train.py", *words]
            code = 1
            try:
                run_script(t.main)
                code = 0
            except SystemExit as leave:
                code = leave.code or 0
            finally:
                os._exit(code)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()


class Process:
    """The same as a process of its own, behind a launcher if there is one; a kill reaches all of its ranks, which
    torchrun starts in sessions of their own."""

    def __init__(self, words: list[str], folder: Path, launcher: tuple[str, ...] = ()):
        with open(folder / "said.txt", "ab") as said:
            self.folder = folder.resolve()
            self.process = subprocess.Popen([sys.executable, *launcher, str(ROOT / "train.py"), *words], cwd=folder,
                                            stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)

    def wait(self) -> int:
        return self.process.wait()

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()
        for pid in left(self.folder):
            os.kill(int(pid), signal.SIGKILL)


def state(out: Path) -> dict:
    """What must be the same to the last bit: the checkpoint but for its seconds, and the log but for its clocks."""
    kept = torch.load(out / "ckpt.pt", weights_only=True)
    clocks = {"tokens_per_s", "mfu", "memory", "seconds", "load"}
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {"model": kept["model"], "optimizer": kept["optimizer"]["state"], "step": kept["step"],
            "log": [{name: value for name, value in line.items() if name not in clocks} for line in lines]}


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def where(folder: Path, since: float) -> str:
    """What the kill fell into, read off what has been written since then."""
    out = folder / "out/tiny"
    log = (out / "log.jsonl").read_bytes() if (out / "log.jsonl").exists() else b""
    if any(path.stat().st_mtime >= since for path in folder.glob("data/*.tmp")):
        return "tokenisation"
    if any(path.stat().st_mtime >= since for path in out.glob("*.tmp")):
        return "a checkpoint or another file being written"
    if log and not log.endswith(b"\n"):
        return "a line of the log being written"
    if (out / "result.json").exists():
        return "after its result"
    return "training, after a checkpoint" if (out / "ckpt.pt").exists() else "before the first checkpoint"


def disturb(start, kills: int, draw: random.Random, reference: dict, life: float) -> tuple[Counter, list[str]]:
    """Runs that are killed up to four times each, then left alone; where the kills fell, and what went wrong."""
    fell, wrong = Counter(), []
    while fell.total() < kills:
        with tempfile.TemporaryDirectory() as name:
            folder, most = Path(name), min(draw.randint(1, 4), kills - fell.total())
            prepare(folder)
            for _ in range(most):
                since, run = time.time(), start(["tiny.py"], folder)
                time.sleep(draw.uniform(0, life))
                run.kill()
                fell[where(folder, since)] += 1
            code = start(["tiny.py"], folder).wait()
            if code or not same(state(folder / "out/tiny"), reference):
                wrong.append(f"exit code {code}: " + (folder / "said.txt").read_text()[-300:])
    return fell, wrong


def undisturbed(start, words: list[str], outs: list[str]) -> tuple[list[dict], float]:
    """What these runs end with, and the seconds it takes."""
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        begin = time.monotonic()
        if start(words, Path(name)).wait():
            sys.exit("the undisturbed run failed: " + (Path(name) / "said.txt").read_text()[-2000:])
        return [state(Path(name, out)) for out in outs], time.monotonic() - begin


def left(folder: Path) -> list[str]:
    """The processes at work in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            alive = "\nState:\tZ" not in (path / "status").read_text()
            if alive and Path(os.readlink(path / "cwd")) == folder:
                found.append(path.name)
        except OSError:
            continue
    return found


def orphans(parents: int, draw: random.Random) -> dict:
    """Sweeps of two runs at once whose parent is killed; then the same command."""
    words, outs = ["sweep.py", "--parallel=2"], ["out/sweep/a", "out/sweep/b"]
    references, life = undisturbed(Process, words, outs)
    lingering, different = 0, 0
    for _ in range(parents):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name).resolve()
            prepare(folder)
            run = Process(words, folder)
            time.sleep(draw.uniform(0.2, 0.9) * life)
            os.kill(run.process.pid, signal.SIGKILL)                             # the parent alone
            run.wait()
            time.sleep(5)
            lingering += len(left(folder))
            ended = Process(words, folder).wait()
            different += ended or not all(same(state(folder / out), b) for out, b in zip(outs, references))
    return {"parents_killed": parents, "processes_left_after_5_s": lingering, "sweeps_that_differ": int(different)}


def one_line(run: Fork | Process, folder: Path) -> bool:
    """Whether the run ended with exit code 2 and one line that says why; begins a new page for what is said next."""
    code, said = run.wait(), (folder / "said.txt").read_text().splitlines()
    (folder / "said.txt").unlink()
    return code == 2 and sum(line.startswith("error: ") for line in said) == 1 and not any(
        line.startswith("Traceback") for line in said)


def others(draw: random.Random) -> dict:
    """Other faults, and of each kind how many of how many tries passed."""
    (reference,), life = undisturbed(Fork, ["tiny.py"], ["out/tiny"])
    found = {name: Counter(tried=0, passed=0) for name in (
        "storms of signals", "files that may not grow", "a checkpoint cut short", "a bit of it flipped",
        "of those, harmless", "Ctrl-C while torch loads")}

    def count(name: str, passed: bool) -> None:
        found[name].update(tried=1, passed=int(passed))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        out = folder / "out/tiny"

        def ends_the_same() -> bool:
            return Fork(["tiny.py"], folder).wait() == 0 and same(state(out), reference)

        for _ in range(20):
            shutil.rmtree(out, ignore_errors=True)
            run = Fork(["tiny.py"], folder)
            time.sleep(draw.uniform(0.1, 0.9) * life)
            for _ in range(draw.choice([1, 2, 12])):
                os.kill(run.pid, draw.choice([signal.SIGINT, signal.SIGTERM]))
                time.sleep(draw.choice([0, 0.005, 0.05]))
            run.wait()
            count("storms of signals", ends_the_same())
        size = (out / "ckpt.pt").stat().st_size
        for most in [draw.randint(100, size - 1) for _ in range(20)]:
            shutil.rmtree(out)
            (folder / "said.txt").unlink(missing_ok=True)
            count("files that may not grow", one_line(Fork(["tiny.py"], folder, most), folder) and ends_the_same())
        whole = (out / "ckpt.pt").read_bytes()
        for i in range(20):
            (out / "ckpt.pt").write_bytes(whole[:i * len(whole) // 20])
            (folder / "said.txt").unlink(missing_ok=True)
            count("a checkpoint cut short", one_line(Fork(["tiny.py"], folder), folder))
        for _ in range(100):
            at, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
            (out / "ckpt.pt").write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1:])
            (folder / "said.txt").unlink(missing_ok=True)
            harmless = not (refused := one_line(Fork(["tiny.py"], folder), folder)) and same(state(out), reference)
            count("a bit of it flipped", refused or harmless)
            if not refused:
                count("of those, harmless", harmless)
        for _ in range(8):
            (folder / "said.txt").unlink(missing_ok=True)
            run = Process(["tiny.py"], folder)
            time.sleep(draw.uniform(0.1, 1.5))
            run.process.send_signal(signal.SIGINT)
            run.wait()
            count("Ctrl-C while torch loads", "Traceback" not in (folder / "said.txt").read_text())
    return {name: dict(counts) for name, counts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--real", type=int, default=5, help="as many of them in real processes, not forks")
    parser.add_argument("--parents", type=int, default=10, help="sweeps whose parent is killed")
    parser.add_argument("--torchrun", type=int, default=0, metavar="RANKS", help="all of them under torchrun")
    parser.add_argument("--others", action="store_true", help="no kills: the other faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results/faults.json")
    args = parser.parse_args()
    args.real = min(args.real, args.kills)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)        # also where it was ignored: children inherit that
    os.environ["OMP_NUM_THREADS"] = "1"
    draw, begin, found = random.Random(args.seed), time.monotonic(), {}
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.torchrun}")
    ways = ([(f"torchrun, {args.torchrun} ranks", lambda *a: Process(*a, launcher), args.kills)] if args.torchrun else
            [("forks", Fork, args.kills - args.real), ("processes", Process, args.real)])
    for name, start, kills in [way for way in ways if way[2] and not args.others]:
        (reference,), life = undisturbed(start, ["tiny.py"], ["out/tiny"])
        fell, wrong = disturb(start, kills, draw, reference, life)
        found[name] = {"kills": fell.total(), "life_s": round(life, 2), "fell_into": dict(fell.most_common()),
                       "runs_that_differ": len(wrong), "said": wrong}
        print(name, found[name], flush=True)
    sweeps = orphans(args.parents, draw) if args.parents and not args.torchrun and not args.others else {}
    tries = others(draw) if args.others else {}
    kept = json.loads(args.out.read_text()) if args.out.is_file() else {}
    conditions = {"command": " ".join(["python tests/kill.py", *sys.argv[1:]]), "seed": args.seed,
                  "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread",
                  "torch": torch.__version__, "seconds": round(time.monotonic() - begin)}
    if args.torchrun:
        kept["torchrun"] = found | {"conditions": conditions}
    elif args.others:
        kept["others"] = tries | {"conditions": conditions}
    elif args.kills:
        kept |= {"conditions": conditions, "kill_9": found, "sweeps": sweeps}
    else:
        kept["sweeps"] = sweeps | {"conditions": conditions}
    args.out.write_text(json.dumps(kept, indent=1) + "\n")
    print(sweeps or tries)
    bad = sweeps.get("processes_left_after_5_s") or sweeps.get("sweeps_that_differ")
    sys.exit(1 if bad or any(one["runs_that_differ"] for one in found.values()) else 0)


if __name__ == "__main__":
    main()
