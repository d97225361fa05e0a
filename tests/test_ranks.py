"""More than one process: real ones, started by torchrun on this CPU, against a single one."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train

sys.path.insert(0, str(Path(__file__).parent))
import on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="gloo and signals of a Unix")]

ROOT = Path(__file__).parents[1]
TINY = """
n_layer, d_model, n_head, n_kv_head, d_head, n_expert, d_expert, top_k = 2, 32, 4, 2, 8, 8, 16, 2
seq_len, micro_batch, batch_tokens, grad_clip = 32, 4, [(0, 512), (8192, 1024)], 0.5
max_steps, eval_interval, log_interval, checkpoint_interval, eval_tokens, warmup = 20, 10, 5, 100, 1000, 0.2
"""
ONE_BATCH = ["--micro_batch=8", "--batch_tokens=256"]            # the whole batch in one micro-batch, and on two ranks:
HALVES = ["--micro_batch=4", "--batch_tokens=256"]
KINDS = {  # of training: the flags, what part of the suite asks the most of
    "plain": [],
    "all": ["--tie_embeddings=False", "--d_shared=16", "--shared_gate=True", "--first_dense_layers=1",
            "--recompute=True", "--capacity_factor=1.0", "--router=switch", "--top_k=1"],
    "global": ["--balance_scope=global", "--router=sigmoid", "--bias_rate=0.01", "--aux_coef=0.1"],
}
MODES = {"ddp": [], "fsdp": ["--data_parallel=fsdp"], "experts": ["--expert_parallel=2"]}
BAD = {  # what is said of the flags
    "data_parallel": ["--data_parallel=fsdp", "--expert_parallel=2"],
    "expert_parallel = 3": ["--expert_parallel=3"],
    "one width": ["--expert_parallel=2", "--expert_groups=[(4, 16), (4, 8)]"],
    "* 2 ranks = 256, say 512": ["--batch_tokens=384"],
}
POISON = 3                                                               # hits some of the micro-batches of TINY


class Folder:
    """A config, a corpus, and the runs made from them."""

    def __init__(self, path: Path):
        self.path = path
        (path / "text").mkdir()
        words, draw = ["router", "expert", "token", "layer", "row", "loss", "norm", "head"], random.Random(1)
        for i in range(40):
            (path / "text" / f"{i}.txt").write_text(" ".join(draw.choices(words, range(1, 9), k=400)))
        (path / "tiny.py").write_text(f"dataset = {str(path / 'text')!r}\n{TINY}")

    def words(self, out: str, *more: str) -> list[str]:
        return [str(self.path / "tiny.py"), f"--out_dir={self.path / out}", *more]

    def log(self, out: str) -> list[dict]:
        return [json.loads(line) for line in (self.path / out / "log.jsonl").read_text().splitlines()]

    def weights(self, out: str) -> dict:
        return torch.load(self.path / out / "ckpt.pt", weights_only=True)

    def torchrun(self, n: int, *words: str, script: Path = ROOT / "train.py", restarts: int = 0) -> list[str]:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
                f"--max-restarts={restarts}", str(script), *words]

    def on(self, n: int, runs: list) -> list:
        """What each of these runs, (words, stop, poison), ended in on each of n ranks."""
        command = self.torchrun(n, json.dumps(runs), script=ROOT / "tests" / "on_ranks.py")
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.path, env=ENVIRONMENT, timeout=400)
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("ended ")]


LONG = ["--batch_tokens=256", "--max_steps=80", "--checkpoint_interval=20", "--eval_interval=1000"]
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1")


def worst(folder: Folder, one: str, other: str, n_step: int = 20) -> float:
    """The largest difference between the logged numbers of two runs."""
    logs = [[line for line in folder.log(out) if line["step"] < n_step or "val_ce" in line] for out in (one, other)]
    assert len(logs[0]) == len(logs[1])
    keys = ("ce", "balance", "z", "grad_norm", "bits_per_byte", "val_ce", "val_bits_per_byte", "entropy", "dropped",
            "skipped", "lr", "tokens")
    pairs = [(a[key], b[key]) for a, b in zip(*logs) for key in keys if key in a]
    assert all((a is None) == (b is None) for a, b in pairs)
    return max(abs(a - b) for a, b in pairs if a is not None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Folder:
    """All runs: alone, then on two ranks, then on four; some are stopped after ten steps and continued elsewhere."""
    folder = Folder(tmp_path_factory.mktemp("ranks"))
    os.chdir(folder.path)
    for kind, flags in KINDS.items():
        on_ranks.run(folder.words(f"one-{kind}", *flags, *(ONE_BATCH if kind == "global" else [])))
    on_ranks.run(folder.words("one-poison"), poison=POISON)
    on_ranks.run(folder.words("one-to-2"), stop=10)
    on_ranks.run(folder.words("one-first", "--max_steps=1"))
    runs = [(folder.words("one-to-2"), None, None)]
    for mode, more in MODES.items():
        runs += [(folder.words(f"2-{mode}-{kind}", *flags, *more, *(HALVES if kind == "global" else [])), None, None)
                 for kind, flags in KINDS.items() if (kind, mode) != ("all", "experts")]
        runs += [(folder.words(f"2-{mode}-poison", *more), None, POISON),
                 (folder.words(f"2-{mode}-first", *more, "--max_steps=1"), None, None)]
        runs += [(folder.words(f"2-{mode}-to-{n}", *more), stop, None) for n, stop in ((2, 10), (2, None), (4, 10))]
    runs += [(folder.words("bad", *words), None, None) for words in BAD.values()]
    runs += [(folder.words("2-long", *LONG), None, None),
             (folder.words("2-diverged", "--learning_rate=1e30", "--warmup=0"), None, None)]
    folder.ended = list(zip([Path(words[1]).name for words, *_ in runs], folder.on(2, runs)))
    for mode in MODES:
        shutil.copytree(folder.path / f"2-{mode}-to-4", folder.path / f"2-{mode}-to-1")
    folder.on(4, [(folder.words(f"4-{mode}-plain", *more), None, None) for mode, more in MODES.items()]
              + [(folder.words(f"2-{mode}-to-4", *more), None, None) for mode, more in MODES.items()])
    for mode in MODES:
        on_ranks.run(folder.words(f"2-{mode}-to-1"))
    return folder


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_is_the_training_of_one_process(folder, mode, n):
    assert worst(folder, "one-plain", f"{n}-{mode}-plain") < (1e-5 if mode != "experts" else 5e-3)
    assert worst(folder, "one-plain", f"{n}-{mode}-plain", 5) < (1e-5 if mode != "experts" else 1e-4)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_untied_shared_dense_first_capacity_recompute(folder, mode):
    assert worst(folder, "one-all", f"2-{mode}-all") < 1e-5
    assert max(line.get("dropped", 0) for line in folder.log("one-all")) > 0


@pytest.mark.parametrize("mode", MODES)
def test_global_balance_and_bias_are_of_the_whole_batch(folder, mode):
    assert worst(folder, "one-global", f"2-{mode}-global") < 1e-4
    bias = [folder.weights(out)["model"]["blocks.0.ffn.bias"] for out in ("one-global", f"2-{mode}-global")]
    assert bias[0].abs().max() > 0 and torch.allclose(*bias, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_skipped_on_one_rank_is_skipped_on_all(folder, mode):
    skipped = folder.log("one-poison")[-2]["skipped"]
    assert 0 < skipped < 10 and worst(folder, "one-poison", f"2-{mode}-poison") < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_first_gradients(folder, mode):
    """Adam's mean after one step is (1 - beta1) times the clipped gradient."""
    one, other = (folder.weights(out)["optimizer"]["state"] for out in ("one-first", f"2-{mode}-first"))
    norm = math.sqrt(sum(float(one[i]["exp_avg"].square().sum()) for i in one))
    off = math.sqrt(sum(float((one[i]["exp_avg"] - other[i]["exp_avg"]).square().sum()) for i in one))
    assert off < 1e-6 * norm


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_does_not_know_how_many_wrote_it(folder, mode):
    whole, again = (folder.weights(out) for out in (f"2-{mode}-plain", f"2-{mode}-to-2"))
    assert all(torch.equal(whole["model"][name], again["model"][name]) for name in whole["model"])
    for n in (1, 4):
        assert worst(folder, f"2-{mode}-plain", f"2-{mode}-to-{n}") < (1e-4 if mode != "experts" else 5e-3)
    assert worst(folder, "one-plain", "one-to-2") < 1e-5
    assert {name: t.shape for name, t in whole["model"].items()} == \
        {name: t.shape for name, t in folder.weights("one-plain")["model"].items()}


def test_all_ranks_end_alike(folder):
    bad = [both for name, both in folder.ended if name == "bad"]
    assert all(said in one for said, both in zip(BAD, bad) for one in both) and not (folder.path / "bad").exists()
    for name, codes in folder.ended:
        assert name == "bad" or codes == [train.DIVERGED if name == "2-diverged" else 0] * 2


def wait_for(step: int, log: Path) -> None:
    deadline = time.time() + 120
    while not (log.is_file() and f'"step": {step},' in log.read_text()):
        assert time.time() < deadline
        time.sleep(0.05)


def ranks_of(parent: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


def test_a_killed_rank_ends_the_run_and_torchrun_restarts_it(folder):
    for restarts, code in ((0, 1), (1, 0)):                       # one restart is enough
        command = folder.torchrun(2, *folder.words("killed", *LONG), restarts=restarts)
        process = subprocess.Popen(command, cwd=folder.path, env=ENVIRONMENT, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        wait_for(49 if restarts else 24, folder.path / "killed" / "log.jsonl")
        os.kill(ranks_of(process.pid)[-1], signal.SIGKILL)
        process.communicate(timeout=200 if restarts else 60)
        assert process.returncode == code
    assert [line["step"] for line in folder.log("killed") if "ce" in line] == list(range(80))
    one, other = (folder.weights(out)["model"] for out in ("2-long", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_sigterm_saves_once_and_the_same_command_continues(folder):
    process = subprocess.Popen(folder.torchrun(2, *folder.words("told", *LONG)), cwd=folder.path, env=ENVIRONMENT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(24, folder.path / "told" / "log.jsonl")
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert out.count("saved; the same command continues") == 1 and folder.weights("told")["step"] > 25


def test_bad_input_is_one_line_and_writes_nothing(folder):
    (folder.path / "unlike.py").write_text((folder.path / "tiny.py").read_text() + "\nimport os\nlearning_rate = "
                                           "1e-3 * (1 + int(os.environ['RANK']))\n")
    command = folder.torchrun(2, str(folder.path / "unlike.py"), f"--out_dir={folder.path / 'bad'}")
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.path, env=ENVIRONMENT, timeout=100)
    assert done.stderr.count("error: rank 1 is about to train something else than rank 0: learning_rate") == 1
    assert done.stderr.count("error: ") == 1 and not (folder.path / "bad").exists()
    assert "exitcode  : 2" in done.stderr


@pytest.mark.parametrize("flag", ["--data_parallel=fsdp", "--expert_parallel=2"])
def test_several_processes_need_torchrun(folder, flag):
    assert "torchrun" in on_ranks.run(folder.words("alone", flag)) and not (folder.path / "alone").exists()


def test_a_run_of_several_is_read_by_one(folder):
    """As model.py does to write text, and to_hf."""
    model, _ = train.load_run(folder.path / "2-experts-plain")
    whole = folder.weights("2-experts-plain")["model"]
    assert all(torch.equal(p, whole[name]) for name, p in model.state_dict().items())
