"""Sweeps in train.py, from the command line: `command(...)` is `python train.py sweep.py ...` inside this process.

The runs of a sweep are processes: real ones in the tests marked slow, elsewhere `endings` stands in for them.
"""

import csv
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, SHARED, finish, write_config, write_corpus
from matplotlib.figure import Figure

import model as m
import train as t

SEARCH = ROOT / "configs" / "search"
FIELDS = SHARED | dict(eval_interval=1000, log_interval=1, checkpoint_interval=1000)
SAVE = Figure.savefig
pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def command(run_train):
    """Run `python train.py sweep.py *arguments` in this process: (exit code, standard output, standard error)."""
    return lambda *arguments, config="sweep.py": run_train(config, *arguments)


@pytest.fixture
def endings(monkeypatch):
    """Exit codes by the name of a run (0 unless it is set) of processes that have ended as soon as they are started;
    `endings.started` holds (name, config, environment) of each."""

    class Endings(dict):
        def __init__(self):
            self.started = []

    class Process:
        def __init__(self, command, env, **_):
            config = t.Config(**json.loads(command[-1]))
            name = Path(config.out_dir).name
            endings.started.append((name, config, env))
            self.stdin, self.returncode = io.BytesIO(), endings.get(name, 0)
            if not self.returncode:
                finish(config, 2.0)

        def poll(self):
            return self.returncode

    endings = Endings()
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    return endings


def write(*runs: dict, **shared) -> None:
    write_config("sweep.py", **FIELDS | shared, runs=list(runs))


def summary() -> dict[str, dict]:
    with open("out/sweep/summary.csv") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def statuses() -> dict[str, str]:
    return {name: row["status"] for name, row in summary().items()}


# --- how runs end ---------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_sweep_goes_on_after_a_run_too_big_one_that_diverges_and_one_that_is_killed(command, monkeypatch):
    write_corpus(40)
    write(dict(name="fine"), dict(name="too-big", n_expert=2**16, d_model=4096, d_expert=4096),
          dict(name="diverges", learning_rate=1e30), dict(name="killed", seed=2))
    popen = subprocess.Popen

    def start_and_kill(command, *args, **more):
        process = popen(command, *args, **more)
        if "out/sweep/killed" in command[-1]:
            process.kill()
        return process

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", start_and_kill)
        code, out, _ = command("--parallel=2")
    rows = summary()
    assert statuses() == {"fine": "done", "too-big": "out of memory", "diverges": "diverged", "killed": "failed"}
    assert code == 1, "one has no result"
    assert "GiB" in rows["too-big"]["reason"] and "not finite" in rows["diverges"]["reason"]
    assert rows["killed"]["reason"] == "killed by signal 9"
    assert float(rows["fine"]["loss"]) == json.loads(Path("out/sweep/fine/result.json").read_text())["loss"]
    assert "done: " in Path("out/sweep/fine/train.log").read_text()
    assert re.search(r"^4 of 4: .*; 0 running, 0 waiting, about 0 min left$", out, re.M)
    code, out, _ = command()
    assert code == 0 and statuses()["killed"] == "done"
    assert "4 runs, 3 of them have a result" in out, "results are kept, failures are tried again"


@pytest.mark.slow
def test_an_interrupted_sweep_saves_its_run_and_the_same_command_continues_it(command, monkeypatch):
    write_corpus(40)
    write(dict(name="long", max_steps=300), dict(name="next"))
    log = Path("out/sweep/long/train.log")

    def interrupt():
        while not log.is_file() or "step      5" not in log.read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    code, out, _ = command()
    assert code == 1 and "stopped by SIGTERM: the same command continues" in out
    assert statuses() == {"long": "interrupted", "next": "skipped"}
    assert command("--only=long")[0] == 0 and statuses() == {"long": "done", "next": "skipped"}
    lines = Path("out/sweep/long/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "lr" in line] == list(range(300))
    assert "continuing at step" in log.read_text()
    assert command("--previous", "--only=long", "--parallel=0")[0] == 2, "refused before anything is thrown away"
    assert (log.parent / "result.json").is_file() and command("--previous", "--only=long")[0] == 0
    assert statuses()["long"] == "done" and log.read_text().count("continuing at step") == 2


@pytest.mark.parametrize("error, code", [
    (torch.OutOfMemoryError("CUDA out of memory"), t.OUT_OF_MEMORY), (MemoryError(), t.OUT_OF_MEMORY),
    (t.DoesNotFit("too large"), t.OUT_OF_MEMORY), (lambda: torch.empty(2**52), t.OUT_OF_MEMORY),
    (lambda: t.DIVERGED, t.DIVERGED), (lambda: 0, 0), (RuntimeError("size mismatch"), None),
])
def test_every_way_to_run_out_of_memory_is_one_exit_code_and_no_other_error_is(monkeypatch, capsys, error, code):
    """An empty tensor of 2**52 numbers: the CPU allocator's own words."""
    monkeypatch.setattr(t, "run", Mock(side_effect=error if isinstance(error, Exception) else lambda *_: error()))
    monkeypatch.setattr(sys, "argv", ["train.py", "--run", json.dumps(asdict(t.Config(device="cpu")))])
    with pytest.raises(RuntimeError if code is None else SystemExit) as leave:
        m.run_script(t.main)
    assert getattr(leave.value, "code", None) == code
    assert capsys.readouterr().err.count("\n") == (code == t.OUT_OF_MEMORY)


@pytest.mark.parametrize("kills, status", [([4, 4], "failed"), ([4, 5], "out of memory"),
                                           ([None] * 2, "out of memory")])
def test_a_kill_by_the_system_counts_as_out_of_memory(command, endings, monkeypatch, kills, status):
    assert t.oom_kills() is None or t.oom_kills() >= 0, "the kernel's count can be read here"
    write(dict(name="a"))
    endings["a"] = -signal.SIGKILL
    counts = iter(kills)
    monkeypatch.setattr(t, "oom_kills", lambda: next(counts))
    command()
    assert statuses() == {"a": status}


def test_a_loss_worse_than_guessing_or_not_finite_has_diverged(command):
    write(*(dict(name=name) for name in ("good", "guess", "worse", "nan")))
    for config, loss in zip(t.load_runs("sweep.py"), (2.0, math.log(264) + 0.2, 9.0, math.nan)):
        finish(config, loss)
    assert command("--report")[0] == 0
    assert statuses() == {"good": "done", "guess": "done", "worse": "diverged", "nan": "diverged"}


def test_a_changed_config_of_a_finished_run_fails_with_what_changed_and_a_changed_failure_is_tried_again(
        command, endings):
    endings["b"] = t.OUT_OF_MEMORY
    runs = dict(name="a"), dict(name="b")
    write(*runs)
    assert command()[0] == 0 and statuses() == {"a": "done", "b": "out of memory"}
    write(*runs, log_interval=7)
    assert command()[0] == 0 and [name for name, *_ in endings.started] == ["a", "b"], "both have a result"
    write(*runs, top_k=1)
    command("--report")
    assert summary()["a"]["reason"] == "out/sweep/a holds a run with another config (top_k 2 -> 1)"
    assert statuses()["a"] == "failed"
    command()
    assert endings.started[-1][0] == "b" and endings.started[-1][1].top_k == 1


def test_each_of_several_runs_gets_its_gpu_or_its_share_of_the_threads(command, endings, monkeypatch):
    write(*(dict(name=name) for name in "abc"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(t, "free_memory", lambda device: 2**40)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    command("--parallel=3", "--device=cpu")
    assert [config for _, config, _ in endings.started] == t.load_runs("sweep.py", {"device": "cpu"}), "as checked"
    threads = str(max(1, torch.get_num_threads() // 3))
    assert [env["OMP_NUM_THREADS"] for *_, env in endings.started] == [threads] * 3
    for visible, gpus in ((None, ["0", "1", "0"]), ("5,7", ["5", "7", "5"])):
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        endings.started.clear()
        command("--parallel=3", "--device=cuda", "--overwrite")
        assert [env["CUDA_VISIBLE_DEVICES"] for *_, env in endings.started] == gpus
        assert not any("OMP_NUM_THREADS" in env for *_, env in endings.started)


# --- what a sweep file says -----------------------------------------------------------------------------------------

ONE = "[dict(name='a')]"


@pytest.mark.parametrize("says, runs, arguments", [
    ("run b: n_layers is no config field, did you mean n_layer?", "[dict(name='a'), dict(name='b', n_layers=3)]", ""),
    ("run b: top_k = 5 must be", "[dict(name='a'), dict(name='b', top_k=5)]", ""),
    ("two runs named a", "[dict(name='a'), dict(name='a', top_k=1)]", ""),
    ("not '../a'", "[dict(name='../a')]", ""), ("not ''", "[dict(name='')]", ""),
    ("not None", "[dict(n_layer=2)]", ""), ("not 7", "[dict(name=7)]", ""),
    ("runs must be a list of dict", "[{1: 2, 'name': 'a'}]", ""),
    ("runs must be a list of dict", "[]", ""), ("runs must be a list of dict", "dict(name='a')", ""),
    ("group = 3 must be a text", "[dict(name='a', group=3)]", ""),
    ("run a: out_dir is the whole sweep's", "[dict(name='a', out_dir='b')]", ""),
    ("run a sets seed, and the sweep seeds", "[dict(name='a', seed=1)]", "--seeds=1,2"),
    ("--only=betta is no run of this sweep, did you mean beta?", "[dict(name='a'), dict(name='beta')]", "--only=betta"),
    ("--seed would make", ONE, "--seeds=1,2 --seed=3"),
    ("different whole numbers", ONE, "--seeds=1,1"), ("different whole numbers", ONE, "--seeds=one"),
    ("--parallel=two must be", ONE, "--parallel=two"), ("--parallel=0 must be", ONE, "--parallel=0"),
    ("--scale=-2 must be a positive number", ONE, "--scale=-2"),
    ("unknown argument --paralel=2, did you mean parallel?", ONE, "--paralel=2"),
    ("sweep.py sets scale", ONE + "\nscale = 3", ""),
    ("run a: run is no config field, did you mean runs?", ONE + "\nrun = 3", ""),
    ("along = 'd_experts' must be", ONE + "\nalong = 'd_experts'", ""),
    ("along = 'router' must be", ONE + "\nalong = 'router'", ""), ("along = 3 must be", ONE + "\nalong = 3", ""),
    ("along = 'capacity_factor' must be", ONE + "\nalong = 'capacity_factor'", ""),
    ("holds no run of sweep.py yet", ONE, "--report"), ("one run", None, "--report"), ("one run", None, "--only=a"),
    ("one run", None, "--parallel=2"), ("one run", None, "--seeds=1,2"),
    *((says, f"[dict(name='a', branches={ends})]\n{more}", "") for says, ends, more in (
        ("run a: branches = [2, 1] must be rising", [2, 1], ""), ("run a: branches = 5 must be rising", 5, ""),
        ("run a: branches need a constant rate", [9], ""),
        ("run a: another max_tokens", [9999], "schedule = 'constant'"),
        ("run a-999: branches share their warmup", [999], "schedule = 'constant'\nwarmup = 0.1"),
        ("over before a decay begins; not 998", [999], "schedule = 'constant'\nwarmup = 998"))),
    ("run a: branch is no config field, did you mean branches?", ONE + "\nbranch = 3", ""),
])
def test_a_mistake_in_a_sweep_is_one_line_before_anything_is_run(command, says, runs, arguments):
    write()
    Path("sweep.py").write_text(Path("sweep.py").read_text().replace("runs = []", f"runs = {runs}" * bool(runs)))
    code, _, err = command(*arguments.split())
    assert code == 2 and says in err and err.count("\n") == 1, err
    assert not Path("out").exists()


def test_the_command_line_wins_over_a_run_over_the_shared_fields_and_scale_is_a_name_the_file_may_use(command, endings):
    write(dict(name="a"), dict(name="b", max_steps=3, top_k=1))
    Path("sweep.py").write_text(Path("sweep.py").read_text() + "d_model = 32 * scale\nd_head = 2 * d_model\n")
    assert [(c.out_dir, c.max_steps, c.top_k, c.d_head) for c in t.load_runs("sweep.py")] == [
        ("out/sweep/a", 20, 2, 64), ("out/sweep/b", 3, 1, 64)]
    assert command("--max_steps=9", "--scale=4", "--out_dir=here")[0] == 0
    assert [(c.out_dir, c.max_steps, c.top_k, c.d_model) for _, c, _ in endings.started] == [
        ("here/a", 9, 2, 128), ("here/b", 9, 1, 128)]
    with pytest.raises(m.BadInput, match="is a sweep of several runs"):
        t.read_config("sweep.py")


def test_seeds_repeat_each_run_and_only_starts_one_or_all_of_them(command, endings):
    write(dict(name="a"), dict(name="b"), seeds=[1, 2, 3])
    assert command("--only=b", "--only=a-s2")[0] == 0, "all named runs have a result"
    assert [(name, config.seed) for name, config, _ in endings.started] == [
        ("a-s2", 2), ("b-s1", 1), ("b-s2", 2), ("b-s3", 3)]
    assert [name for name, status in statuses().items() if status == "skipped"] == ["a-s1", "a-s3"]
    command("--seeds=5", "--only=a,b")
    assert [(name, config.seed) for name, config, _ in endings.started[4:]] == [("a-s5", 5), ("b-s5", 5)]


# --- the summary ----------------------------------------------------------------------------------------------------

def test_the_summary_ranks_by_validation_loss_with_mean_and_spread_over_seeds(command):
    write(dict(name="worse", group="g", top_k=1), dict(name="better", group="g"),
          dict(name="absent", group="g", top_k=3), seeds=[1, 2])
    configs = t.load_runs("sweep.py")
    for config in configs[:4]:
        finish(config, (3.0 if config.top_k == 1 else 2.0) + 0.1 * config.seed)
    code, out, _ = command("--report")
    table = [line for line in out.splitlines() if line.startswith("| ")][1:]
    assert code == 1 and [re.split(r" *\| *", line)[1:4] for line in table] == [
        ["1", "better", "2.1500 ± 0.0707 (2)"], ["2", "worse", "3.1500 ± 0.0707 (2)"], ["", "absent", ""]]
    assert "1,280 | 0.50 GiB | 2 done |" in table[0] and "2 skipped" in table[2]
    assert "\n## g\n" in out and Path("out/sweep/summary.md").read_text().count("| better |") == 1
    assert list(summary()["better-s1"]) == [
        "name", "model", "group", "seed", "status", "reason", "loss", "bits_per_byte", "total", "active",
        "active_ratio", "tokens", "steps", "flops", "seconds", "tokens_per_s", "peak_memory", "top_k"]
    assert int(summary()["better-s1"]["total"]) == m.count(configs[2])["total"]
    assert int(summary()["better-s1"]["tokens"]) == 20 * 4 * 32 and summary()["absent-s2"]["loss"] == ""


def said_of_groups(command, config: str) -> dict[str, str]:
    """group -> the line above its ranking, once every run was trained, on another machine."""
    for run in t.load_runs(str(config)):
        finish(replace(run, device="cuda", dtype="bfloat16"), 2.0)
    return dict(re.findall(r"^## (.*)\n\n(.*)$", command("--report", config=config)[1], re.M))


def test_the_line_above_a_ranking_says_what_the_finished_runs_have_in_common(command):
    write(dict(name="a1", group="a", top_k=1), dict(name="a2", group="a"), dict(name="b1", group="b"),
          dict(name="b2", group="b", max_steps=40), dict(name="c", group="c"))
    one, two = (m.count(t.Config(**SHARED | dict(top_k=k)))["flops_per_token"] for k in (1, 2))
    assert said_of_groups(command, "sweep.py") == {
        "a": f"Compared at equal tokens (2,560), equal steps (20); FLOPs differ by a factor {two / one:.2f}.",
        "b": "Compared at neither equal tokens nor FLOPs nor steps; tokens differ by a factor 2.00; FLOPs differ by a "
             "factor 2.00; steps differ by a factor 2.00.",
        "c": "Fewer than two runs are done: nothing to compare yet."}


@pytest.mark.parametrize("path, flops", [("small/architecture.py", True), ("batch_context.py", False),
                                         ("small/batch_context.py", False)])
def test_a_group_is_as_equal_as_its_name_says(command, path, flops):
    said = said_of_groups(command, SEARCH / path)
    assert len(said) == 2 and all(group in line for group, line in said.items())
    assert flops == any(re.search(r"equal FLOPs \([\d.e+]+, within 0\.\d\d%\)", line) for line in said.values())


@pytest.mark.parametrize("field", ["d_expert", None])
def test_runs_are_drawn_against_the_field_that_the_file_goes_along_or_in_rows(field, command, monkeypatch):
    write(dict(name="a", d_expert=32), dict(name="b", d_expert=16), dict(name="c", d_expert=8), along=field)
    for i, config in enumerate(t.load_runs("sweep.py")[:2]):
        finish(config, 2.0 - 0.1 * i)
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **more: drawn.append(self) or SAVE(self, *_, **more))
    command("--report")
    (axis,) = drawn[0].axes
    assert axis.get_xlabel() == (field or "validation cross-entropy, nats per token")
    points = [tuple(map(tuple, line.get_xydata())) for line in axis.lines if line.get_marker() == "o"]
    if field:
        assert points == [((16, 1.9), (32, 2.0))]
    else:
        assert points[:2] == [((1.9, 0),), ((2.0, 1),)]
        assert [label.get_text() for label in axis.get_yticklabels()] == ["b", "a", "c"]
    assert Path("out/sweep/summary.png").read_bytes().startswith(b"\x89PNG")


# --- the architecture search ----------------------------------------------------------------------------------------

def plans(command, path: str) -> dict[str, tuple[str, str, int]]:
    """name -> (total, active in millions, tokens), from what --dry_run prints."""
    code, out, _ = command("--dry_run", config=SEARCH / path)
    found = re.findall(r"^(\S+) +([\d,.]+)M +([\d,.]+)M +([\d,]+) +[\d.e+]+ +[\d.]+ GiB  (?:yes|no, cpu has .* free)$",
                       out, re.MULTILINE)
    assert code == 0 and not Path("out").exists() and f"\n{len(found)} runs, " in out
    return {name: (total, active, int(tokens.replace(",", ""))) for name, total, active, tokens in found}


def test_the_learning_rates_and_the_cells_are_the_sources(command):
    rates = plans(command, "learning_rate.py")
    assert len(rates) == 9 and {"lr5e-6", "lr1e-4", "lr3e-4", "lr5e-4", "lr1e-3"} <= set(rates)
    cells = plans(command, "batch_context.py")
    assert {sizes[:2] for sizes in (*rates.values(), *cells.values())} == {("1,083.22", "781.23")}
    contexts = {1: (1024, 2048, 4096, 8192), 2: (1024, 2048, 4096, 8192), 4: (1024, 2048, 4096), 8: (1024, 2048)}
    assert {name: n for name, (_, _, n) in cells.items() if "-" not in name} == {
        f"bs{b}ctx{c}": 2000 * b * c for b in contexts for c in contexts[b]}
    assert {n for name, (_, _, n) in cells.items() if "-" in name} == {8_192_000} and len(cells) == 26


@pytest.mark.parametrize("name, runs", [("architecture", 30), ("learning_rate", 18), ("batch_context", 52)])
def test_the_small_search_has_the_runs_of_the_large_one_and_keeps_its_ratios(name, runs):
    large, small = (t.load_runs(str(SEARCH / folder / f"{name}.py")) for folder in ("", "small"))
    assert len(small) == runs
    large = {Path(c.out_dir).name: c for c in large}
    small = {re.sub(r"-s\d+$", "", Path(c.out_dir).name): c for c in small}
    assert len(large) == len([model for model in small if not model.endswith("-flops")])
    for a, b in zip(large.values(), small.values()):
        assert (a.d_model, a.d_expert, a.seq_len, a.n_layer) == (*(16 * n for n in (b.d_model, b.d_expert, b.seq_len)),
                                                                 2 * b.n_layer)
        assert (a.n_expert, a.top_k, a.n_head // a.n_kv_head) == (b.n_expert, b.top_k, b.n_head // b.n_kv_head)
        assert a.n_head * a.d_head * b.d_model == b.n_head * b.d_head * a.d_model and a.micro_batch == b.micro_batch


# --- branches -------------------------------------------------------------------------------------------------------


BRANCHES = dict(max_steps=1000, schedule="constant", decay=0.5, warmup=256, batch_tokens=[[0, 128], [512, 256]],
                router="switch", top_k=1, capacity_factor=1.0, max_seq_len=32)


@pytest.fixture
def corpus():
    write_corpus(40)


@pytest.fixture
def in_process(monkeypatch):
    """The runs of a sweep train in this process, one behind the other; `in_process` lists their names."""

    class Process:
        def __init__(self, command, stdout, **_):
            config = t.Config(**json.loads(command[-1]))
            started.append(Path(config.out_dir).name)
            print(f"{started[-1]}: ", end="")
            self.returncode, self.stdin = t.train_alone(config), Mock()

        def poll(self):
            return self.returncode

    started = []
    monkeypatch.setattr(subprocess, "Popen", Process)
    return started


def kept_run(name: str, out: str = "out/sweep") -> tuple[dict, list]:
    """The checkpoint of a run, and the loss and rate of each step in its log."""
    lines = map(json.loads, Path(f"{out}/{name}/log.jsonl").read_text().splitlines())
    return (torch.load(f"{out}/{name}/ckpt.pt", weights_only=True),
            [(line["step"], line["ce"], line["lr"]) for line in lines if "lr" in line])


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"]) and all(
        torch.equal(a["optimizer"]["state"][i][name], b["optimizer"]["state"][i][name])
        for i in a["optimizer"]["state"] for name in ("exp_avg", "exp_avg_sq"))


def test_branches_equal_separate_runs_to_the_last_bit_and_pay_their_trunk_once(command, corpus, in_process):
    """1024 tokens: trunk of 4 steps of 128; 2048: its decay begins in the ramp's second stage; killed in its decay."""
    write(dict(name="a", branches=[1024, 2048]), **BRANCHES)
    step = t.Run.step

    def die(self, n, *rest):
        step(self, n, *rest)
        if self.out.name == "a-2048" and n == 8:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Run, "step", die)
        assert command("--checkpoint_interval=1")[0] == 130
    _, out, _ = command("--checkpoint_interval=1")
    assert in_process == ["a-1024", "a-2048", "a-2048"] and "continuing at step 9 of 10" in out
    write(dict(name="b-1024", max_tokens=1024), dict(name="b-2048", max_tokens=2048), **BRANCHES)
    command("--out_dir=out/alone")
    for end in (1024, 2048):
        (branch, log), (alone, alone_log) = kept_run(f"a-{end}"), kept_run(f"b-{end}", "out/alone")
        assert same(branch, alone) and log == alone_log
        result = [json.loads(Path(f"{name}-{end}/result.json").read_text()) for name in ("out/sweep/a", "out/alone/b")]
        assert result[0]["loss"] == result[1]["loss"] and result[0]["tokens"] == end
    trunk = torch.load("out/sweep/a-1024/trunk.pt", weights_only=True)
    assert trunk["step"] == next(n for n, _, rate in kept_run("a-1024")[1] if n > 1 and rate < 1e-3)
    assert not same(trunk, kept_run("a-1024")[0])


def test_a_branch_waits_for_the_shorter_one_and_takes_no_trunk_of_another_config(command, corpus, in_process):
    write(dict(name="a", branches=[512, 1024]), dict(name="b", branches=[512]), **BRANCHES)
    _, out, _ = command("--parallel=2")
    assert in_process == ["a-512", "b-512", "a-1024"] and out.count("continuing at step") == 1
    row = json.loads(command("--dry_run", "--json")[1])[1]
    assert row["tokens"] == 1024 and row["flops_paid"] == row["flops"] * 640 // 1024
    Path("out/sweep/a-1024/trunk.pt").write_bytes(b"damaged")
    write(dict(name="a", branches=[512, 1024, 2048]), **BRANCHES)
    code, out, _ = command("--only=a-2048")
    assert code == 0 and "trunk.pt is damaged: a-2048 begins at its first step" in out and "continuing" not in out
    write(dict(name="a", branches=[512, 1024, 4096]), learning_rate=2e-3, **BRANCHES)
    _, out, _ = command("--only=a-4096")
    assert in_process[3:] == ["a-2048", "a-4096"] and "continuing" not in out


def test_the_papers_own_runs_are_listed_with_its_sizes_tokens_and_rates(command, monkeypatch):
    """Sizes as the paper counts them: without norms and routers. Tokens: to the end of a step."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LADDER", "all")
    with open("results/law/runs.csv") as file:
        wanted = sorted(tuple(int(row[key]) for key in ("n_expert", "n_active", "n_total", "tokens"))
                        for row in csv.DictReader(file))
    runs, found, sizes = t.read_runs("configs/joint_law/paper.py"), [], {}
    for run in runs:
        c = run.config
        if run.shorter is None:
            sizes = m.count(c)
            outside = c.n_layer * c.d_model * (2 + c.n_expert * (c.n_expert > 1)) + c.d_model
        end = int(run.name.rpartition("-")[2])
        assert 0 <= t.position(c, t.total_steps(c))[0] - end < 262_144
        found.append((c.n_expert, sizes["active_untied"] - outside, sizes["total_untied"] - outside, end))
    assert sorted(found) == wanted and len(wanted) == 270
    assert sum(run.shorter is None for run in runs) == 51, "models, each with one trunk"
    norms, router = 48 * (2 * 3 + 1), 3 * 48 * 4                            # they are in both of eq. 7's N here
    body, tables = 13 * 3 * 48**2 + norms + router, 2 * 264 * 48
    for reading, rate in zip(t.PEAK_RATES, m.peak_rates(body, body + tables, 4)):
        (found,) = {run.learning_rate for run in t.load_runs("configs/joint_law/small.py", {"learning_rate": reading})
                    if (run.n_expert, run.d_model) == (4, 48)}
        assert found == rate
