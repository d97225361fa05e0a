"""What an idea is worth: the arithmetic of equal loss, the verdict of `train.py judge`, and results/judge/README.md.

Runs are made up (`leave` writes what a finished run leaves), except in the test marked slow.
"""

import csv
import json
import math
import random
import re
from pathlib import Path
from statistics import fmean, stdev

import pytest
from conftest import ROOT, SHARED, finish, write_config, write_corpus

import router
import train as t

FIELDS = SHARED | dict(eval_interval=1000, log_interval=5, checkpoint_interval=1000)
LADDER = "[dict(name=f'base-{steps}', group='base', max_steps=steps) for steps in (10, 20, 40)]"
ROUTING = {"step": 1, "tokens": 1, "seconds": 1, "load_max_over_mean": 1.5, "dead_experts": 3, "entropy": 1.25}
pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def judge(run_train):
    """Run `python train.py judge sweep.py *words --report` in this process: (exit code, output)."""
    return lambda *words: run_train("judge", "sweep.py", *words, "--report")[:2]


def write(runs: str = LADDER, baseline: str | None = "base", **shared) -> None:
    write_config("sweep.py", **FIELDS | shared | ({} if baseline is None else {"baseline": baseline}))
    with open("sweep.py", "a") as file:
        file.write(f"runs = {runs}\n")


def leave(run: t.Trial, loss: float, seconds: float = 2.0, alone: bool = True) -> None:
    """What a finished run leaves, without training it."""
    out = finish(run.config, loss, seconds)
    (out / "log.jsonl").write_text(20 * (json.dumps(ROUTING) + "\n"))
    if alone:
        (out / "alone").touch()


def climb(given: dict, base: list[list[float]], idea: list[list[float]], **how) -> None:
    """Finish a ladder of two, a list a rung, a loss a seed; a run of n steps takes n seconds, the idea's half of it."""
    runs = t.read_judged("sweep.py", given, None, 1)
    for run, loss in zip(runs, [loss for rung in [*base, *idea] for loss in rung]):
        leave(run, loss, run.config.max_steps / (1 if run.group == "base" else 2), **how)


def judged() -> dict:
    return json.loads(Path("out/sweep/judge.json").read_text())


# --- the arithmetic --------------------------------------------------------------------------------------------------

LINE = [(100, 4.0), (400, 2.0), (1600, 1.0)]


@pytest.mark.parametrize("loss, ladder, cost", [
    (4.0, LINE, 100), (2.0, LINE, 400), (1.0, LINE, 1600),              # the rungs
    (math.sqrt(8), LINE, 200), (math.sqrt(2), LINE, 800),     # halfway in logarithms, between the first and last two
    (4.1, LINE, None), (0.9, LINE, None),                               # beyond either end
    (2.0, [(1, 4.0), (2, 2.0), (4, 3.0), (8, 1.0)], 2),                 # up and down again: the first that reaches it
    (2.0, [(1, 2.0), (2, 2.0), (4, 1.0)], 1),
    (2.2, [(1, 2.0), (2, 2.5), (4, 1.0)], None),                        # the cheapest rung has less already
])
def test_the_cost_of_a_loss_is_a_straight_line_in_logarithms_and_nothing_beyond_the_ladder(loss, ladder, cost):
    assert t.cost_of(loss, ladder) == (cost and pytest.approx(cost))


def test_an_interval_is_students_on_the_seeds_and_says_how_many_more_would_leave_out_zero():
    mean, half = t.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / math.sqrt(3), rel=1e-3))   # t(2) = 4.303, deviation 1
    for n, point in ((2, 12.706), (6, 2.571), (11, 2.228), (12, 2.201), (21, 2.086), (61, 2.000)):
        assert t.student(n) == pytest.approx(point, abs=0.01), n
    half = t.student(4) * 0.02 / 2                    # four seeds of deviation 0.02
    assert half > 0.02 and t.more_seeds(0.02, half, 4) == "3"       # t(6) 0.02 / sqrt 7 = 0.0185; six: 0.0210
    assert t.more_seeds(-0.02, half, 4) == "3" and t.more_seeds(1e-9, half, 4) == "over 1,000"


# --- the summary of a sweep with a baseline --------------------------------------------------------------------------

@pytest.mark.parametrize("baseline", ["base", None])
def test_a_sweep_with_a_baseline_says_what_each_variant_saves_to_equal_loss(run_train, baseline):
    write(LADDER + " + [dict(name='half', group='other', max_steps=20), dict(name='far', group='other', max_steps=20)]",
          baseline, seeds=[1, 2])
    losses = {"base-10": 4.0, "base-20": 2.0, "base-40": 1.0, "half": math.sqrt(2), "far": 0.5}
    runs = t.read_runs("sweep.py")
    for run in runs:
        leave(run, losses[run.model], seconds=run.config.max_steps / (1 if run.group == "base" else 2))
    code, out, _ = run_train("sweep.py", "--report")
    assert code == 0 and ("To equal loss: what the baseline base takes" in out) == bool(baseline)
    if baseline is None:
        return
    cells = {line.split(" | ")[1]: line.split(" | ")[-2:] for line in out.splitlines() if line.startswith("| ")}
    root = math.sqrt(2)                               # the loss halfway between 20 and 40 steps, by a run of 20
    assert cells["half"] == [f"{root:.2f}x (1.41 to 1.41)", f"{2 * root:.2f}x (2.83 to 2.83) |"]
    assert cells["far"] == ["beyond the ladder in 2 of 2 seeds", "beyond the ladder in 2 of 2 seeds |"]
    assert cells["base-20"] == ["1.00x (1.00 to 1.00)", "1.00x (1.00 to 1.00) |"]
    Path(runs[0].config.out_dir, "alone").unlink()    # one of the baseline's: no seconds for either
    assert "2.83x" not in run_train("sweep.py", "--report")[1]


def test_a_run_is_alone_if_nothing_ran_beside_it_from_its_first_step_on(monkeypatch):
    write(seeds=[1])
    run = t.read_runs("sweep.py")[0]
    monkeypatch.setattr(t.subprocess, "Popen", lambda *_, **__: None)
    alone = Path(run.config.out_dir) / "alone"

    def started(parallel: int) -> bool:
        t.start(run, 0, parallel)
        return alone.exists()

    assert started(1) and not started(2) and started(1)
    (alone.parent / "config.json").write_text("{}")   # it has begun
    assert started(1) and not started(2) and not started(1), "its first steps shared the machine"
    run.config.overwrite = True
    assert started(1)


# --- the verdict -----------------------------------------------------------------------------------------------------

BASE = [[4.0, 4.2], [2.0, 2.1], [1.0, 1.1]]


def test_a_better_idea_is_judged_by_its_paired_differences(judge):
    write(seeds=[1, 2])
    climb({"router": "top_p"}, BASE, [[2.0, 2.1], [1.0, 1.1], [0.8, 0.89]])
    code, out = judge("--router=top_p")
    found = judged()
    small, middle, last = found["rungs"]
    assert code == 0 and (found["idea"], found["baseline"]) == ("router=top_p", "base")
    half = 12.71 * 0.01 / math.sqrt(2) / math.sqrt(2)                   # of -0.2 and -0.21: deviation 0.01 / sqrt 2
    assert last["difference"] == [pytest.approx(-0.205), pytest.approx(half)]
    assert small["flops_to_equal_loss"] == middle["flops_to_equal_loss"] == [pytest.approx(2)] * 2
    assert small["seconds_to_equal_loss"] == [pytest.approx(4)] * 2 and last["flops_to_equal_loss"] == [None] * 2
    assert "router=top_p is better at this scale: -0.2050 ± 0.0636 nats a token after 40 steps, 2 seeds." in out
    assert "2.00x (2.00 to 2.00)" in out and "4.00x (4.00 to 4.00)" in out and "equal steps (40)" in out
    assert "router=top_p    0.50           3.0    1.250  yes     none, torch alone" in out


@pytest.mark.parametrize("flag, last, says", [
    ("aux_coef=0", [1.2, 1.3], "is worse at this scale: +0.2000 ± 0.0000"),
    ("aux_coef=0", [1.1, 1.0], "is not resolved at this scale: +0.0000 ± 1.2710 nats a token after 40 steps, 2 seeds; "
                               "over 1,000"),
    ("aux_coef=0", [1.1, 1.3], "is not resolved at this scale: +0.1500 ± 0.6355 nats a token after 40 steps, 2 seeds; "
                               "2 more seeds"),
    ("router=expert_choice", [0.5, 0.6], "2 seeds; but it is not causal, and its loss may come from looking ahead."),
    ("top_k=1+n_expert=1", [1.0, 1.1], "top_k=1+n_expert=1  no experts"),
])
def test_the_other_verdicts_and_an_idea_that_looks_ahead_or_has_no_experts(judge, flag, last, says):
    write(seeds=[1, 2])
    given = dict(word.split("=") for word in flag.split("+"))
    climb({name: int(value) if value.isdigit() else value for name, value in given.items()}, BASE, [*BASE[:2], last])
    if "n_expert" in given:
        for log in Path("out/sweep").glob("top_k*/log.jsonl"):
            log.write_text('{"step": 1, "ce": 2.0}\n')
    assert says in judge(*(f"--{word}" for word in flag.split("+")))[1].replace("-0.0000 ±", "+0.0000 ±")


def test_seconds_of_runs_that_shared_the_machine_are_left_out(judge):
    write(seeds=[1, 2])
    climb({"aux_coef": 0}, BASE, BASE, alone=False)
    assert "left out" in judge("--aux_coef=0")[1]
    assert not any(one["seconds_to_equal_loss"] for one in judged()["rungs"])


def test_a_seed_without_a_result_is_named_and_fewer_than_two_are_no_verdict(judge):
    write(seeds=[1, 2, 3])
    runs = t.read_judged("sweep.py", {"top_k": 1}, None, 1)
    for run in runs[:-1]:
        leave(run, {"base": 2.0}.get(run.group, 2.1))
    leave(runs[-1], math.nan)
    code, out = judge("--top_k=1")
    assert code == 0 and "+0.1000 ± 0.0000 nats a token after 40 steps, 2 seeds (without top_k=1-40-s3 div" in out
    Path(runs[-2].config.out_dir, "result.json").unlink()
    code, out = judge("--top_k=1")
    assert code == 1 and "top_k=1 is not judged: fewer than two seeds are done (without top_k=1-40-s2 inter" in out


def test_the_idea_is_every_run_of_the_ladder_in_folders_of_its_own_and_overwrite_is_for_it_alone():
    write(seeds=[1, 2])
    runs = t.read_judged("sweep.py", {"aux_coef": 0, "router": "hash", "overwrite": True}, [3, 4], 1)
    assert [run.name for run in runs[:6]] == [f"base-{n}-s{seed}" for n in (10, 20, 40) for seed in (3, 4)]
    for base, idea in zip(runs[:6], runs[6:]):
        name = base.name.replace("base", "aux_coef=0+router=hash")
        assert (idea.name, idea.config.out_dir) == (name, f"out/sweep/{name}")
        assert t.differing([base, idea]) == ["router", "aux_coef", "overwrite"] and idea.config.overwrite
        assert (base.config.seed, base.config.max_steps) == (idea.config.seed, idea.config.max_steps)


@pytest.mark.parametrize("says, arguments, file", [
    ("baseline = 'bass' is no group of its runs, did you mean base?", "sweep.py", dict(baseline="bass")),
    ("baseline = 3 is no group", "sweep.py", dict(baseline=3)),
    ("baseline = ['base'] is no group", "sweep.py", dict(baseline=["base"])),
    ("the baseline 'base' needs a ladder, runs of three budgets (FLOPs) or more, and has 1", "sweep.py",
     dict(runs="[dict(name='a', group='base'), dict(name='b', group='base', router='hash')]")),
    ("sets no baseline", "judge sweep.py --router=hash", dict(baseline=None)),
    ("sets no baseline", "judge sweep.py --router=hash", dict(runs="", baseline=None)),
    ("run base-10: router = 'hsah'", "judge sweep.py --router=hsah", {}),
    ("unknown argument --ruoter=hash, did you mean router?", "judge sweep.py --ruoter=hash", {}),
    ("judge needs an idea", "judge sweep.py", {}), ("judge needs an idea", "judge sweep.py --overwrite", {}),
    ("the idea router=softmax equals the baseline 'base'", "judge sweep.py --router=softmax --overwrite", {}),
    ("a verdict needs two seeds", "judge sweep.py --router=hash --seeds=1", {}),
    ("needs a ladder, runs of three budgets (FLOPs) or more, and has 1", "judge sweep.py --max_steps=30", {}),
])
def test_a_mistake_is_one_line_before_anything_is_run(run_train, says, arguments, file):
    write(**dict(seeds=[1, 2]) | file)
    if file.get("runs") == "":
        Path("sweep.py").write_text("n_layer = 2\n")          # one run, no sweep
    code, _, err = run_train(*arguments.split())
    assert code == 2 and says in err and err.count("\n") == 1, err
    assert not Path("out").exists()


# --- results/judge ---------------------------------------------------------------------------------------------------

PAGE = (ROOT / "results/judge/README.md").read_text()
POLICIES = ("hash", "top_p", "sigmoid", "expert_choice", "random")
POOL = json.loads((ROOT / "results/judge/pool.json").read_text())
KEPT = {name: json.loads((ROOT / f"results/judge/{name}.json").read_text()) for name in POLICIES}


def rows(head: str) -> dict[str, list[str]]:
    """A table of the page: the first cell of each row -> the others."""
    lines = PAGE[PAGE.index(f"| {head} |"):].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    return {first: others for first, *others in cells}


def signed(mean: float, half: float, digits: int = 4) -> str:
    return f"{mean:+.{digits}f} ± {half:.{digits}f}".replace("-", "−")


def test_the_page_has_the_verdicts_of_the_kept_runs():
    table = rows("idea | flags")
    assert [*table] == ["softmax", *POLICIES]
    for name, judged in KEPT.items():
        last, used = judged["rungs"][-1], judged["routing"][judged["idea"]]
        mean, half = t.interval([idea - base for base, idea in zip(last["losses"], last["idea_losses"])])
        assert [mean, half] == pytest.approx(last["difference"]) and len(last["seeds"]) == 6
        assert judged["idea"] == table[name][0].replace("--", "").replace(" ", "+")
        assert judged["verdict"].startswith(table[name][-1]) and judged["verdict"] == t.sentence(judged)
        assert table[name][1:7] == [
            f"{fmean(last['idea_losses']):.4f}", signed(mean, half), f"{used['max_violation']:.2f}",
            f"{used['dead_experts']:.1f}", f"{used['entropy']:.2f}", used["causal"]]
        assert table[name][7] == ("yes" if name in router.FUSED else "no")
        assert last["losses"] == KEPT["hash"]["rungs"][-1]["losses"] == [*POOL.values()][:6], "one baseline"
    assert table["softmax"][1] == f"{fmean(last['losses']):.4f}"


def test_the_page_has_the_differences_at_each_budget_and_the_compute_to_equal_loss():
    for name, cells in rows("idea | 100 steps").items():
        rungs = KEPT[name]["rungs"]
        assert cells[:3] == [signed(*rung["difference"]) for rung in rungs]
        for rung, cell in zip(rungs, cells[3:]):
            assert cell == t.ratio_text(rung["flops_to_equal_loss"])
            for seed, loss, ratio in zip(rung["seeds"], rung["idea_losses"], rung["flops_to_equal_loss"]):
                ladder = [(one["flops"], dict(zip(one["seeds"], one["losses"]))[seed]) for one in rungs]
                cost = t.cost_of(loss, ladder)
                assert ratio == (cost and pytest.approx(cost / rung["idea_flops"]))


def test_the_power_it_claims_is_that_of_the_pool():
    losses, draw = [*POOL.values()], random.Random(0)
    assert f"mean loss of {fmean(losses):.4f} and a standard deviation of\n{stdev(losses):.4f}" in PAGE
    draws = []
    for _ in range(10_000):
        drawn = draw.sample(losses, 12)
        draws.append(t.interval([a - b for a, b in zip(drawn[:6], drawn[6:])]))
    unresolved = [abs(mean) <= half for mean, half in draws]
    assert sum(unresolved[:20]) >= 19 and f"{sum(unresolved[:20])} of\nthe first 20 draws" in PAGE
    assert f"{fmean(unresolved):.1%} of 10,000" in PAGE
    shift = float(re.search(r"With (\S+) nats added", PAGE)[1])
    assert fmean(mean + shift > half for mean, half in draws) >= 0.8 > fmean(
        mean + shift - 0.001 > half for mean, half in draws)
    for name, half in re.findall(r"`(\w+)`(?: is measured)? to ± ([\d.]+\d)", PAGE):
        assert f"{KEPT[name]['rungs'][-1]['difference'][1]:.4f}" == half


def test_the_slicing_runs_are_judged_by_the_same_interval():
    for name, (base, *cells) in rows("sweep | baseline").items():
        losses: dict[str, dict[str, float]] = {}
        with open(ROOT / f"results/slicing/{name}/summary.csv") as file:
            for row in csv.DictReader(file):
                losses.setdefault(row["model"], {})[row["seed"]] = float(row["loss"])
        said = [re.findall(r"`?([\w.+-]+)`? ([+−][\d.]+ ± [\d.]+)", cell) for cell in cells]
        assert sum(map(len, said)) == sum(model[:3] == base[:3] or "d32" not in base for model in losses) - 1
        for kind, variants in zip(("better", "worse", "not resolved"), said):
            for variant, measured in variants:
                mean, half = t.interval([losses[variant][seed] - losses[base][seed] for seed in losses[base]])
                assert measured == signed(mean, half, 3)
                assert kind == ("not resolved" if abs(mean) <= half else "better" if mean < 0 else "worse")


@pytest.mark.slow
def test_real_runs_are_judged_and_the_same_command_judges_them_again(run_train):
    write_corpus(80)
    write(seeds=[1, 2])
    code, out, err = run_train("judge", "sweep.py", "--router=random", "--parallel=2")
    assert code == 0 and "12 runs, 0 of them have a result" in out and "router=random is " in out, err
    first = judged()
    assert all(one["seeds"] == [1, 2] for one in first["rungs"])
    assert first["routing"]["base"]["kernels"] == "Triton's on a GPU" and first["routing"]["router=random"]["entropy"]
    assert "12 of them have a result" in run_train("judge", "sweep.py", "--router=random")[1] and judged() == first
