"""What several test files share. Plain functions are imported from here; a test file has its own small sizes."""

import contextlib
import json
import os
import random
import signal
import sys
import warnings
from dataclasses import asdict
from functools import reduce
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import train
from router import run_script

ROOT = Path(train.__file__).parent
WORDS = "def return self value for in range print if not else class import of the a x y = ( ) : + 1 2".split()
SHARED = dict(n_layer=2, d_model=32, n_head=2, n_kv_head=1, d_head=16, n_expert=4, top_k=2, d_expert=16, vocab_size=264,
              seq_len=32, dataset="corpus", device="cpu", micro_batch=4, max_steps=20, eval_tokens=256)


ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")]


def on_a_gpu(test):
    return reduce(lambda marked, mark: mark(marked), ON_A_GPU, test)


@pytest.fixture
def run_train(monkeypatch, capsys):
    """Run `python train.py *words` in this process: (exit code, standard output, standard error)."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            run_script(train.main)
        except SystemExit as leave:
            code = leave.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to be in, on a disk that nobody waits for; signal handlers come back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def quiet(folder, monkeypatch):
    """An empty folder to be in; figures are not saved, which takes longest; a thread a process."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def texts(n: int) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=60)) + "\n" for _ in range(n)]


def write_corpus(n: int, folder: Path = Path()) -> None:
    """A folder `corpus` of n small documents."""
    (folder / "corpus").mkdir()
    for i, text in enumerate(texts(n)):
        (folder / f"corpus/{i:02d}.txt").write_text(text)


def write_config(path: Path | str, **fields) -> str:
    Path(path).write_text("".join(f"{name} = {value!r}\n" for name, value in fields.items()))
    return str(path)


def finish(config: train.Config, loss: float, seconds: float = 2.0) -> Path:
    """The folder of a finished run, with what it leaves, without training it."""
    out = Path(config.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(asdict(config)))
    (out / "result.json").write_text(json.dumps({"loss": loss, "bits_per_byte": loss, "seconds": seconds,
                                                 "tokens_per_s": 1280.0, "peak_memory": 2**29}))
    return out


def random_logits(n=64, e=7, seed=0):
    return torch.randn(n, e, generator=torch.Generator().manual_seed(seed))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@contextlib.contextmanager
def no_wait_for_the_gpu():
    """What waits for the GPU in here raises an error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                 # "a prototype feature"
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
