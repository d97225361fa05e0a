"""The lesson is a program: router.py, model.py and train.py, cut at their Part 2 lines, train, write and continue."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch

import model as m
import train as t

ROOT = Path(t.__file__).parent
README = (ROOT / "README.md").read_text()
SHRUNK = ("--n_layer=2 --d_model=32 --n_head=2 --n_kv_head=1 --d_head=16 --top_k=2 "
          "--vocab_size=264 --seq_len=32 --dataset=corpus --micro_batch=4 --batch_tokens=256 --max_steps=12 "
          "--learning_rate=3e-3 --eval_interval=6 --eval_tokens=256 --log_interval=1 --checkpoint_interval=5").split()
VARIATIONS = [
    ["--tie_embeddings=False"], ["--renormalize=False"], ["--top_k=1"], ["--qk_norm=False"],
    ["--n_expert=1", "--top_k=1"],
    ["--d_shared=16", "--shared_gate=True"], ["--expert_groups=[(2, 8), (4, 16)]"], ["--first_dense_layers=1"],
    ["--capacity_factor=1.0", "--eval_capacity_factor=2.0"], ["--router_noise=0.5"], ["--router=switch", "--top_k=1"],
    ["--router=sigmoid", "--bias_rate=0.01", "--balance_scope=global"], ["--router=top_p", "--balance_scope=sequence"],
    ["--router=expert_choice"], ["--router=hash"], ["--router=random"], ["--schedule=constant", "--max_tokens=2000"],
    ["--dtype=bfloat16"],
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the lesson, cut as the README says, the configs, and a corpus of small documents."""
    place = tmp_path_factory.mktemp("place")
    cut = re.search(r"```\n(mkdir lesson\n.*?)python", README, re.S)[1]
    for name in ("router.py", "model.py", "train.py", "configs"):
        os.symlink(ROOT / name, place / name)
    subprocess.run(["bash", "-e", "-c", cut], cwd=place, check=True)
    (place / "corpus").mkdir()
    generator, words = random.Random(0), "def return self for value in if not class import a x y = ( ) : + 1".split()
    for i in range(80):
        (place / f"corpus/{i:02d}.txt").write_text(" ".join(generator.choices(words, k=60)) + "\n")
    return place


def lesson(place: Path, *words: str) -> subprocess.CompletedProcess:
    """`python lesson/train.py *words`, in the folder."""
    return subprocess.run([sys.executable, "lesson/train.py", *words], cwd=place, capture_output=True, text=True)


def printed(out: str) -> list[str]:
    """The cross-entropies of the steps, and of the evaluations, as they stand in the lines."""
    return re.findall(r"^step .*?(?:ce|validation) (\d+\.\d{4})", out, re.M)


@pytest.fixture
def whole(place, monkeypatch, capsys):
    """What the whole train.py prints for the same words, in this process: by the plain table, or by `ops`."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(t, "draw_figures", lambda out: None)
    monkeypatch.setattr(t, "write_text", lambda *_, **__: [])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(path: str, *words: str, ops: m.Ops | None = None) -> list[str]:
        _, given = t.parse_command_line([path, *words, "--out_dir=out/whole", "--overwrite"])
        monkeypatch.setattr(t, "FAST", ops or m.PLAIN)
        capsys.readouterr()
        assert t.run(t.read_config(path, given | {"plain": ops is None, "device": "cpu"})) == 0
        assert m.OPS is m.FAST, "a run leaves the table as it was"
        return printed(capsys.readouterr().out)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_the_lesson_trains_configs_tiny_to_the_digits_of_the_plain_table_and_near_those_of_the_fast_one(place, whole):
    words = ["configs/tiny.py", *"--max_steps=20 --log_interval=1 --eval_tokens=4096 --device=cpu".split()]
    done = lesson(place, *words, "--out_dir=out/lesson")
    assert done.returncode == 0, done.stderr
    losses, calls = printed(done.stdout), set()
    assert len(losses) == 22 and float(losses[-1]) < float(losses[0]) - 2
    assert losses == whole(*words)

    def spy(name):
        return lambda *args: calls.add(name) or getattr(m.FAST, name)(*args)

    fast = whole(*words, ops=m.Ops(*map(spy, m.Ops._fields)))
    assert [float(x) for x in fast[:11]] == pytest.approx([float(x) for x in losses[:11]], abs=5e-4)
    assert calls == set(m.Ops._fields) and all(getattr(m.FAST, name) is not getattr(m.PLAIN, name) for name in calls)


def each(place: Path, runs: list[list[str]]) -> list[str]:
    """What the lesson prints for each of these commands, in one process: it runs the cut train.py once for each."""
    driver = ("import json, runpy, sys\nsys.path.insert(0, 'lesson')\nsys.stderr = sys.stdout\n"
              "for words in json.loads(sys.argv[1]):\n    sys.argv = ['train.py', *words]\n    print('---')\n"
              "    try:\n        runpy.run_path('lesson/train.py')\n    except SystemExit as leave:\n"
              "        print('exit code', leave.code)\n")
    done = subprocess.run([sys.executable, "-c", driver, json.dumps(runs)], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout.split("---\n")[1:]


def test_every_variation_trains_in_the_lesson_to_the_digits_of_the_whole(place, whole):
    runs = []
    for variation in [[], *VARIATIONS]:
        width = [] if variation and "expert_groups" in variation[0] else ["--n_expert=4", "--d_expert=16"]
        runs.append(["configs/large_moe_1p3b.py", *SHRUNK, *width, "--device=cpu", "--dtype=float32", *variation])
    for out, run in zip(each(place, [[*run, f"--out_dir=out/{i}"] for i, run in enumerate(runs)]), runs, strict=True):
        assert len(printed(out)) >= 10 and printed(out) == whole(*run), run[-2:]


def test_what_the_lesson_does_not_know_is_one_line(place):
    unknown = ("--compile=True", "--plain=True", "--recompute=True", "--init_from=out/x", "--overwrite=True",
               "--tokenizer=gpt2", "--batch_tokens=[(0, 1024)]", "--n_layers=2")
    runs = [["configs/tiny.py", "--max_steps=1", "--eval_tokens=256", word] for word in unknown]
    for word, out in zip(unknown, each(place, runs), strict=True):
        assert re.fullmatch(r"error: [^\n]*\nexit code 2\n", out), word


def test_the_lesson_counts_and_writes_the_same_greedy_tokens(place):
    script = ("import json, sys, torch\nsys.path.insert(0, sys.argv[1])\nfrom model import *\n"
              "c = ModelConfig(n_layer=2, d_model=64, seq_len=24, d_shared=16, expert_groups=[(4, 16), (4, 8)])\n"
              "model = Model(c).init_weights(3).eval()\nprompt = torch.arange(10).view(2, 5)\n"
              "print(json.dumps([count(c), torch.stack(list(generate(model, prompt, 30, temperature=0))).tolist()]))")
    both = [subprocess.run([sys.executable, "-c", script, where], cwd=place, capture_output=True, text=True, check=True)
            for where in ("lesson", ".")]
    assert both[0].stdout == both[1].stdout and len(json.loads(both[0].stdout)[1]) == 30


@pytest.mark.slow
def test_the_lesson_killed_in_the_middle_and_started_again_ends_in_the_same_weights(place):
    words = ["configs/large_moe_1p3b.py", *SHRUNK, "--n_expert=4", "--d_expert=16", "--device=cpu",
             "--dtype=float32", "--max_steps=60", "--router_noise=0.1"]
    assert lesson(place, *words, "--out_dir=out/straight").returncode == 0
    command = [sys.executable, "lesson/train.py", *words, "--out_dir=out/killed"]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, text=True) as process:
        while "step     23 ce" not in process.stdout.readline():
            assert process.poll() is None
        process.kill()
    assert 0 < torch.load(place / "out/killed/ckpt.pt")["step"] < 60
    assert lesson(place, *words, "--out_dir=out/killed").returncode == 0
    a, b = (torch.load(place / f"out/{name}/ckpt.pt")["model"] for name in ("straight", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_cut_file_imports_only_what_it_uses(place):
    subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--select=F", place / "lesson"], check=True)


# --- the house ------------------------------------------------------------------------------------------------------

MAY_IMPORT = {"router": (), "model": ("router",), "train": ("router", "model"), "scaling": ("model",),
              "bench": ("router", "model", "train")}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_run_one_way_lazy_ones_too(name):
    found = re.findall(r"^ *(?:from|import) (\w+)", (ROOT / f"{name}.py").read_text(), re.M)
    assert set(found) & MAY_IMPORT.keys() <= set(MAY_IMPORT[name])


def test_names_that_comments_and_docstrings_mention_exist():
    words, mentioned = {"nanoGPT"}, {}
    for file in MAY_IMPORT:
        for token in tokenize.generate_tokens(io.StringIO((ROOT / f"{file}.py").read_text()).readline):
            if token.type == tokenize.NAME or (token.type == tokenize.STRING and "\n" not in token.string):
                words |= set(re.findall(r"\w+", token.string))
            prose = token.type == tokenize.COMMENT or (token.type == tokenize.STRING and '"""' in token.string)
            pattern = r"`([A-Za-z_][\w.]*)`|\b(?:see|in) ([a-z]\w*_\w+|[A-Z]\w+\.\w+)"
            for name in re.findall(pattern, token.string * prose):
                mentioned["".join(name)] = f"{file}.py:{token.start[0]}"
    lost = {name: where for name, where in mentioned.items() if not set(name.split(".")) - {"py"} <= words}
    assert not lost and len(mentioned) > 20
