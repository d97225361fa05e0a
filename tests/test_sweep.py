"""Sweeps in train.py. Where an ending matters (killed, diverged, out of memory, interrupted) the processes are real."""

import csv
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import model as m
import train as t
from router import BadInput

ROOT = Path(t.__file__).parent
SHARED = dict(n_layer=2, d_model=32, n_head=2, n_kv_head=1, d_head=16, n_expert=4, top_k=2, d_expert=16, vocab_size=264,
              seq_len=32, dataset="corpus", micro_batch=4, max_steps=20, eval_interval=1000, eval_tokens=256,
              log_interval=1, checkpoint_interval=1000)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder with a corpus; signal handlers come back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path("corpus").mkdir()
    draw, words = random.Random(0), "def return self x y = ( ) : + 1 2".split()
    for i in range(40):
        Path(f"corpus/{i:02d}.txt").write_text(" ".join(draw.choices(words, k=60)))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def no_figure(monkeypatch):
    monkeypatch.setattr(t, "draw_summary", lambda *_: None)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `python train.py sweep.py *arguments` in this process: (exit code, standard output, standard error)."""

    def run(*arguments: str, config: str = "sweep.py") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", str(config), *arguments])
        capsys.readouterr()
        try:
            m.run_script(t.main)
            code = 0
        except SystemExit as leave:
            code = leave.code
        return code, *capsys.readouterr()

    return run


def write(*runs: dict, **shared) -> None:
    lines = [f"{name} = {value!r}\n" for name, value in (SHARED | shared).items()]
    Path("sweep.py").write_text("".join([*lines, f"runs = {list(runs)!r}\n"]))


def finish(run: t.Trial, loss: float) -> None:
    """What a finished run leaves, without training it."""
    out = Path(run.config.out_dir)
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(asdict(run.config)))
    (out / "result.json").write_text(json.dumps({"loss": loss, "bits_per_byte": loss / math.log(2), "seconds": 2.0,
                                                 "tokens_per_s": 1280.0, "peak_memory": 2**29}))


def summary(name: str = "out/sweep") -> dict[str, dict]:
    with open(f"{name}/summary.csv") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


# --- how runs end ---------------------------------------------------------------------------------------------------


def test_a_sweep_goes_on_after_a_run_too_big_one_that_diverges_and_one_that_is_killed(command, monkeypatch):
    write(dict(name="fine"), dict(name="too-big", n_expert=2**16, d_model=4096, d_expert=4096),
          dict(name="diverges", learning_rate=1e30), dict(name="killed", seed=2))
    started, start = [], t.start

    def start_and_kill(run, slot, parallel):
        one = start(run, slot, parallel)
        started.append(run.name)
        if run.name == "killed" and len(started) == 4:
            one.process.kill()
        return one

    monkeypatch.setattr(t, "start", start_and_kill)
    code, out, _ = command("--parallel=2")
    rows = summary()
    assert {name: row["status"] for name, row in rows.items()} == {
        "fine": "done", "too-big": "out of memory", "diverges": "diverged", "killed": "failed"}
    assert code == 1, "one has no result"
    assert "GiB" in rows["too-big"]["reason"] and "not finite" in rows["diverges"]["reason"]
    assert rows["killed"]["reason"] == "killed by signal 9"
    assert float(rows["fine"]["loss"]) == json.loads(Path("out/sweep/fine/result.json").read_text())["loss"]
    assert "done: " in Path("out/sweep/fine/train.log").read_text() and Path("out/sweep/summary.png").is_file()
    assert re.search(r"^4 of 4: .*; 0 running, 0 waiting, about 0 minutes left$", out, re.M)
    assert "| 1 | fine |" in out and "| out of memory |" in out

    code, out, _ = command()
    assert code == 0 and started[4:] == ["killed"], "results are kept, failures are tried again"
    assert summary()["killed"]["status"] == "done" and "4 runs, 3 of them have a result" in out


def test_an_interrupted_sweep_saves_its_run_and_the_same_command_continues_it(command, monkeypatch):
    write(dict(name="long", max_steps=300), dict(name="next"))
    start, log = t.start, Path("out/sweep/long/train.log")

    def interrupt():
        while not log.is_file() or "step      5" not in log.read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(t, "start", lambda *args: (start(*args), threading.Thread(target=interrupt).start())[0])
        code, out, _ = command()
    assert code == 1 and "stopped by SIGTERM: the same command continues" in out
    assert {row["name"]: row["status"] for row in summary().values()} == {"long": "interrupted", "next": "skipped"}
    assert command("--only=long")[0] == 0
    assert {row["name"]: row["status"] for row in summary().values()} == {"long": "done", "next": "skipped"}
    lines = Path("out/sweep/long/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "lr" in line] == list(range(300))
    assert "continuing at step" in log.read_text()


@pytest.mark.parametrize("error, code", [
    (lambda: torch.empty(2**52), t.OUT_OF_MEMORY),                                  # the CPU allocator's own words
    (lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")), t.OUT_OF_MEMORY),
    (lambda: (_ for _ in ()).throw(MemoryError()), t.OUT_OF_MEMORY),
    (lambda: t.check_memory(t.Config(d_model=2**14, n_expert=2**12, d_expert=2**14)), t.OUT_OF_MEMORY),
    (lambda: t.DIVERGED, t.DIVERGED),
    (lambda: 0, 0),
])
def test_every_way_to_run_out_of_memory_is_one_exit_code(monkeypatch, capsys, error, code):
    monkeypatch.setattr(t, "run", lambda config: error())
    assert t.train_alone(t.Config(device="cpu")) == code
    assert capsys.readouterr().err.count("\n") == (code == t.OUT_OF_MEMORY)


def test_any_other_error_stays_an_error(monkeypatch):
    monkeypatch.setattr(t, "run", lambda config: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        t.train_alone(t.Config(device="cpu"))


@pytest.mark.parametrize("before, after, status", [
    (4, 4, "failed"), (4, 5, "out of memory"), (None, None, "out of memory"),
])
def test_a_kill_by_the_system_counts_as_out_of_memory(monkeypatch, before, after, status):
    write(dict(name="a"))
    run = t.read_runs("sweep.py")[0]
    log = Path(run.config.out_dir) / "train.log"
    log.parent.mkdir(parents=True)
    log.write_text("step 1\n")
    monkeypatch.setattr(t, "oom_kills", lambda: after)
    t.record(t.Started(run, 0, SimpleNamespace(returncode=-9), log, 0, before, 0.0), stopping=False)
    assert t.outcome(run)[0] == status


def test_the_kernels_count_of_such_kills_can_be_read_here():
    assert t.oom_kills() is None or t.oom_kills() >= 0
    assert Path("/proc/vmstat").is_file() <= (t.oom_kills() is not None)


def test_a_loss_worse_than_guessing_or_not_finite_has_diverged():
    write(*(dict(name=name) for name in ("good", "guess", "worse", "nan")))
    runs = t.read_runs("sweep.py")
    for run, loss in zip(runs, (2.0, math.log(264) + 0.2, 9.0, math.nan)):
        finish(run, loss)
    assert [t.outcome(run)[0] for run in runs] == ["done", "done", "diverged", "diverged"]


def test_a_changed_config_of_a_finished_run_fails_with_what_changed_and_a_changed_failure_is_tried_again():
    write(dict(name="a"))
    run = t.read_runs("sweep.py")[0]
    finish(run, 2.0)
    changed = replace(run, config=replace(run.config, top_k=1, log_interval=7))
    assert t.outcome(run)[0] == "done" and t.outcome(changed)[:2] == (
        "failed", "out/sweep/a holds a run with another config (top_k 2 -> 1)")
    record = {"status": "out of memory", "reason": "", "config": asdict(run.config)}
    Path("out/sweep/a/outcome.json").write_text(json.dumps(record))
    assert t.outcome(run)[0] == "out of memory" and t.outcome(changed)[0] == "failed"


def test_each_of_several_runs_gets_its_gpu_or_its_share_of_the_threads(monkeypatch):
    write(dict(name="a"))
    run, seen = t.read_runs("sweep.py")[0], []
    monkeypatch.setattr(t.subprocess, "Popen", lambda command, env, **_: seen.append((command, env)))
    monkeypatch.setattr(t.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    t.start(run, 1, 2)
    assert seen[-1][1]["OMP_NUM_THREADS"] == str(max(1, torch.get_num_threads() // 2))
    assert t.Config(**json.loads(seen[-1][0][-1])) == run.config, "the process is told exactly what was checked"
    on_gpu = replace(run, config=replace(run.config, device="cuda"))
    for visible, gpus in ((None, ["0", "1", "0"]), ("5,7", ["5", "7", "5"])):
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        [t.start(on_gpu, slot, 3) for slot in range(3)]
        assert [env["CUDA_VISIBLE_DEVICES"] for _, env in seen[-3:]] == gpus
        assert "OMP_NUM_THREADS" not in seen[-1][1]


# --- what a sweep file says -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("says, runs, arguments", [
    ("run b: n_layers is no config field, did you mean n_layer?", "[dict(name='a'), dict(name='b', n_layers=3)]", ""),
    ("run b: top_k = 5 must be", "[dict(name='a'), dict(name='b', top_k=5)]", ""),
    ("two runs named a", "[dict(name='a'), dict(name='a', top_k=1)]", ""),
    ("not '../a'", "[dict(name='../a')]", ""),
    ("not ''", "[dict(name='')]", ""),
    ("not None", "[dict(n_layer=2)]", ""),
    ("not 7", "[dict(name=7)]", ""),
    ("runs must be a list of dict", "[]", ""),
    ("runs must be a list of dict", "dict(name='a')", ""),
    ("group = 3 must be a text", "[dict(name='a', group=3)]", ""),
    ("run a: out_dir is the whole sweep's", "[dict(name='a', out_dir='b')]", ""),
    ("run a sets seed, and the sweep seeds", "[dict(name='a', seed=1)]", "--seeds=1,2"),
    ("--only=betta is no run of this sweep, did you mean beta?", "[dict(name='a'), dict(name='beta')]", "--only=betta"),
    ("--seed would make", "[dict(name='a')]", "--seeds=1,2 --seed=3"),
    ("must be different whole numbers", "[dict(name='a')]", "--seeds=1,1"),
    ("must be different whole numbers", "[dict(name='a')]", "--seeds=one"),
    ("--parallel=two must be", "[dict(name='a')]", "--parallel=two"),
    ("--parallel=-1 must be", "[dict(name='a')]", "--parallel=-1"),
    ("--parallel=0 must be", "[dict(name='a')]", "--parallel=0"),
    ("--scale=-2 must be a positive number", "[dict(name='a')]", "--scale=-2"),
    ("unknown argument --paralel=2, did you mean parallel?", "[dict(name='a')]", "--paralel=2"),
    ("sweep.py sets scale", "[dict(name='a')]\nscale = 3", ""),
    ("run a: run is no config field, did you mean runs?", "[dict(name='a')]\nrun = 3", ""),
    ("holds no run of sweep.py yet", "[dict(name='a')]", "--report"),
])
def test_a_mistake_in_a_sweep_is_one_line_before_anything_is_run(command, says, runs, arguments):
    write()
    Path("sweep.py").write_text(re.sub(r"runs = .*", "runs = " + runs, Path("sweep.py").read_text()))
    code, _, err = command(*arguments.split())
    assert code == 2 and says in err and err.count("\n") == 1, err
    assert not Path("out").exists()


def test_a_sweeps_options_are_refused_for_a_single_run_and_a_sweep_where_one_run_is_wanted(command):
    write(dict(name="a"))
    with pytest.raises(m.BadInput, match="is a sweep of several runs"):
        t.read_config("sweep.py")
    for option in ("--only=a", "--parallel=2", "--report", "--seeds=1,2"):
        code, _, err = command(option, config=ROOT / "configs" / "tiny.py")
        assert code == 2 and "one run" in err


def test_load_runs_gives_a_config_a_run_and_one_for_a_plain_file():
    write(dict(name="a"), dict(name="b", top_k=1), learning_rate=1e-2)
    assert [(c.out_dir, c.top_k, c.learning_rate) for c in t.load_runs("sweep.py", {"learning_rate": 0.5})] == [
        ("out/sweep/a", 2, 0.5), ("out/sweep/b", 1, 0.5)]
    assert [c.out_dir for c in t.load_runs(str(ROOT / "configs" / "tiny.py"))] == ["out/tiny"]


def test_a_field_on_the_command_line_is_every_runs_and_scale_is_a_name_the_file_may_use():
    write(dict(name="a"), dict(name="b", max_steps=3))
    Path("sweep.py").write_text(Path("sweep.py").read_text() + "d_model = 32 * scale\nd_head = 2 * d_model\n")
    args, given = t.parse_command_line(["sweep.py", "--max_steps=9", "--scale=4", "--out_dir=here"])
    configs = [run.config for run in t.read_runs(args.config, given, args.seeds, args.scale)]
    assert [(c.out_dir, c.max_steps, c.d_model) for c in configs] == [("here/a", 9, 128), ("here/b", 9, 128)]
    assert t.load_runs("sweep.py")[0].d_head == 64


def test_seeds_repeat_each_run_and_only_takes_one_or_all_of_them():
    write(dict(name="a"), dict(name="b"), seeds=[1, 2, 3])
    runs = t.read_runs("sweep.py")
    assert [(r.name, r.model, r.config.seed) for r in runs] == [
        (f"{name}-s{seed}", name, seed) for name in "ab" for seed in (1, 2, 3)]
    assert [r.name for r in t.select(runs, [["b"], ["a-s2"]])] == ["a-s2", "b-s1", "b-s2", "b-s3"]
    assert [(r.name, r.config.seed) for r in t.read_runs("sweep.py", seeds=[5])] == [("a", 5), ("b", 5)]


def test_only_the_named_runs_are_started(command, monkeypatch, no_figure):
    write(dict(name="a"), dict(name="b"), dict(name="c"))
    chosen = []
    monkeypatch.setattr(t, "run_all", lambda runs, parallel: chosen.extend(run.name for run in runs))
    assert command("--only=a", "--only=c")[0] == 1 and chosen == ["a", "c"]
    for run in t.read_runs("sweep.py")[:2]:
        finish(run, 2.0)
    assert command("--only=a,b")[0] == 0, "both named runs have a result"
    assert summary()["c"]["status"] == "skipped"


# --- the summary ----------------------------------------------------------------------------------------------------


def test_the_summary_ranks_by_validation_loss_with_mean_and_spread_over_seeds(command, no_figure):
    write(dict(name="worse", group="g", top_k=1), dict(name="better", group="g"),
          dict(name="absent", group="g", top_k=3), seeds=[1, 2])
    for run in t.read_runs("sweep.py"):
        if run.model != "absent":
            finish(run, {"worse": 3.0, "better": 2.0}[run.model] + 0.1 * run.config.seed)
    code, out, _ = command("--report")
    table = [line for line in out.splitlines() if line.startswith("| ")][1:]
    assert code == 1 and [re.split(r" *\| *", line)[1:4] for line in table] == [
        ["1", "better", "2.1500 ± 0.0707 (2)"], ["2", "worse", "3.1500 ± 0.0707 (2)"], ["", "absent", ""]]
    assert "1,280 | 0.50 GiB | 2 done |" in table[0] and "2 skipped" in table[2]
    assert "\n## g\n" in out and Path("out/sweep/summary.md").read_text().count("| better |") == 1
    assert list(summary()["better-s1"]) == [
        "name", "model", "group", "seed", "status", "reason", "loss", "bits_per_byte", "total", "active",
        "active_ratio", "tokens", "steps", "flops", "seconds", "tokens_per_s", "peak_memory", "top_k"]
    config = t.read_runs("sweep.py")[2].config
    assert int(summary()["better-s1"]["total"]) == m.count(config)["total"]
    assert int(summary()["better-s1"]["tokens"]) == 20 * 4 * 32 and summary()["absent-s2"]["loss"] == ""


def test_a_sweep_trained_on_another_device_can_be_reported_here(command, no_figure):
    write(dict(name="a"))
    run = t.read_runs("sweep.py")[0]
    finish(replace(run, config=replace(run.config, device="cuda", dtype="bfloat16")), 2.0)
    assert command("--report")[0] == 0 and summary()["a"]["status"] == "done"


@pytest.mark.parametrize("tokens, flops, steps, says", [
    ((512, 512), (10, 20), (4, 4), "Compared at equal tokens (512), equal steps (4); FLOPs differ by a factor 2.00."),
    ((512, 900), (1000, 1010), (4, 7), "Compared at equal FLOPs (1.01e+03, within 1.00%); tokens differ by a factor "
                                       "1.76; steps differ by a factor 1.75."),
    ((512, 512), (10, 10), (4, 4), "Compared at equal tokens (512), equal FLOPs (10), equal steps (4)."),
    ((1, 2), (1, 2), (1, 2), "Compared at neither equal tokens nor FLOPs nor steps; tokens differ by a factor 2.00; "
                             "FLOPs differ by a factor 2.00; steps differ by a factor 2.00."),
])
def test_the_line_above_a_ranking_says_what_the_finished_runs_have_in_common(tokens, flops, steps, says):
    rows = [dict(status="done", tokens=a, flops=b, steps=c) for a, b, c in zip(tokens, flops, steps)]
    assert t.comparison([*rows, dict(status="failed", tokens=99, flops=99, steps=99)]) == says
    assert "nothing to compare" in t.comparison(rows[:1])


@pytest.mark.parametrize("field", ["d_expert", None])
def test_runs_are_drawn_against_the_field_that_the_file_goes_along_or_in_rows(field, folder, monkeypatch):
    write(dict(name="a", d_expert=32), dict(name="b", d_expert=16), dict(name="c"), seeds=[1, 2], along=field)
    found, drawn = t.read_runs("sweep.py"), []
    for i, run in enumerate(found):
        if i != 1:
            finish(run, 2.0 + 0.1 * i)
    for name in ("draw_curves", "draw_rows"):
        draw = getattr(t, name)
        monkeypatch.setattr(t, name, lambda *args, name=name, draw=draw: drawn.append(name) or draw(*args))
    assert [run.along for run in found] == [field] * 6
    t.summarise(Path("out/sweep"), found)
    assert Path("out/sweep/summary.png").stat().st_size > 5000
    assert drawn == ["draw_curves" if field else "draw_rows"]


# --- the architecture search ----------------------------------------------------------------------------------------


SEARCH = ROOT / "configs" / "search"


def plans(command, path: str) -> dict[str, tuple[str, str, int]]:
    """name -> (total, active in millions, tokens), from what --dry_run prints."""
    code, out, _ = command("--dry_run", config=SEARCH / path)
    found = re.findall(r"^(\S+) +([\d,.]+)M +([\d,.]+)M +([\d,]+) +[\d.e+]+ +[\d.]+ GiB  (?:yes|no, cpu has .* free)$",
                       out, re.MULTILINE)
    assert code == 0 and not Path("out").exists() and f"\n{len(found)} runs, " in out
    return {name: (total, active, int(tokens.replace(",", ""))) for name, total, active, tokens in found}


def test_the_five_architectures_have_the_sizes_of_the_sources_table(command):
    tokens = 2000 * 4 * 1024
    assert {name: (*(round(float(n.replace(",", ""))) for n in sizes), n) for name, (*sizes, n)
            in plans(command, "architecture.py").items()} == {
        "large-moe-1b": (1003, 399, tokens), "large-moe-1.3b": (1083, 781, tokens),
        "large-moe-1.3b-top2": (1083, 555, tokens), "large-deep-1.5b": (1687, 781, tokens),
        "large-wide-1.5b": (1423, 668, tokens)}


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
    large, small = (t.read_runs(str(SEARCH / folder / f"{name}.py")) for folder in ("", "small"))
    assert len(small) == runs
    large, small = ({run.model: run.config for run in found} for found in (large, small))
    assert len(large) == len([model for model in small if not model.endswith("-flops")])
    for a, b in zip(large.values(), small.values()):
        assert (a.d_model, a.d_expert, a.seq_len, a.n_layer) == (*(16 * n for n in (b.d_model, b.d_expert, b.seq_len)),
                                                                 2 * b.n_layer)
        assert (a.n_expert, a.top_k, a.n_head // a.n_kv_head) == (b.n_expert, b.top_k, b.n_head // b.n_kv_head)
        assert a.n_head * a.d_head * b.d_model == b.n_head * b.d_head * a.d_model and a.micro_batch == b.micro_batch


@pytest.mark.parametrize("path", ["small/architecture.py", "batch_context.py", "small/batch_context.py"])
def test_a_group_is_as_equal_as_its_name_says(path):
    rows = [t.table_row(run, []) | {"status": "done"} for run in t.read_runs(str(SEARCH / path), seeds=[1])]
    assert len(Counter(row["group"] for row in rows)) == 2
    for group in {row["group"] for row in rows}:
        assert group in t.comparison([row for row in rows if row["group"] == group])


@pytest.mark.parametrize("field", ["d_experts", "router", "capacity_factor", 3])
def test_a_sweep_along_something_that_is_no_number_is_refused(field):
    write(dict(name="a"), along=field)
    with pytest.raises(BadInput, match="along"):
        t.read_runs("sweep.py")
