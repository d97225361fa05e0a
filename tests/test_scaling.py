"""scaling.py: the law, its tables, the optimum, the fit, the planner, the figures, and every kind of bad input."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import scaling
from scaling import EXPERTS, FORMS, Law, Runs, Surface, fit, many, optimum, paper_runs

ROOT = Path(scaling.__file__).parent


def run(*args):
    return scaling.main([str(a) for a in args])


def result(tmp_path, *args) -> dict:
    """What a verb writes under --json."""
    path = tmp_path / "result_of_verb.json"
    assert run(*args, "--json", path) == 0
    return json.loads(path.read_text())


def fails(capsys, *args) -> str:
    """The one line of an input error, with exit code 2."""
    assert run(*args) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def noisy(seed=0, noise=0.006, outliers=0.0) -> Runs:
    return scaling.with_noise(paper_runs(), seed, noise, outliers)


def save(path, runs, **extra) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["n_active", "tokens", "n_expert", "loss", *extra])
        writer.writerows(zip(*runs[:4], *extra.values()))
    return path


def chinchilla(n=240, seed=0) -> Runs:
    """Dense points of Chinchilla's published law; synthetic, for no public table travels with this project."""
    rng = np.random.default_rng(seed)
    N, D = 10 ** rng.uniform(7.6, 10.2, n), 10 ** rng.uniform(9, 11.5, n)
    return Runs(N, D, np.ones(n), 406.4 * N**-0.34 + 410.7 * D**-0.28 + 1.69 + rng.normal(0, 0.01, n), np.ones(n))


# --- the law and its tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("N, D, E, loss", [(1e9, 2e10, 1, 2.5776000430), (1e9, 2e10, 8, 2.5087772821),
                                           (7e9, 1e12, 1, 2.0942866025), (7e9, 1e12, 8, 2.0400730375)])
def test_the_law_gives_the_unit_points(N, D, E, loss):
    assert Law().loss(N, D, E) == pytest.approx(loss, abs=1e-9)


TABLE_3 = {                          # E: Ê, m, mu, n, nu
    1: (2.073200, 30.399252, 0.181755, 53.843351, 0.196384), 2: (3.055617, 27.820844, 0.177954, 66.722507, 0.206430),
    4: (5.000506, 24.859404, 0.173127, 87.608448, 0.219187), 8: (8.812370, 21.840457, 0.167574, 119.840309, 0.233862),
    16: (16.138624, 19.020324, 0.161644, 167.452083, 0.249533),
    32: (29.704220, 16.545369, 0.155665, 234.629339, 0.265334)}


@pytest.mark.parametrize("E", TABLE_3)
def test_table_3_follows_from_table_2_to_the_last_digit_computed(E):
    assert np.allclose([Law().ehat(E), *Law().terms(E)], TABLE_3[E], rtol=0, atol=6e-7)


def test_an_e_start_of_2_083_puts_all_24_cells_of_table_3_inside_the_rounding():
    assert scaling.within_print(Law()) < 24
    assert scaling.within_print(Law(e_start=2.083)) == 24


TABLE_1 = [(1, 1e20, 1.726907e9, 9.651166e9, 2.589698), (1, 1e21, 5.709682e9, 2.919018e10, 2.350199),
           (2, 5e20, 3.485395e9, 2.390929e10, 2.401908), (4, 1e20, 1.212659e9, 1.374391e10, 2.554046),
           (8, 5e20, 2.528308e9, 3.296012e10, 2.359681), (8, 1e21, 3.786164e9, 4.401993e10, 2.294516),
           (16, 1e20, 8.112890e8, 2.054344e10, 2.501335), (16, 1e21, 3.281337e9, 5.079231e10, 2.271322)]


@pytest.mark.parametrize("E, flops, N, D, loss", TABLE_1)
def test_table_1_follows_from_the_closed_form(E, flops, N, D, loss):
    assert np.allclose(optimum(Law(), E, flops), (N, D, loss), rtol=4e-7)


def test_the_printed_cells_of_table_1_are_met_within_the_stated_deviations():
    off = np.array([[N / n / 1e9 - 1, D / d / 1e9 - 1] for E, row in scaling.TABLE_1.items()
                    for F, (n, d) in zip((1e20, 5e20, 1e21), row) for N, D, _ in [optimum(Law(), E, F)]])
    assert np.abs(off).max(0) == pytest.approx([0.0260, 0.0112], abs=1e-4)


def test_the_run_list_obeys_both_counting_rules():
    found = scaling.check_run_list()
    assert (found["runs"], found["models"], found["models not d/64"]) == (270, 51, 8)
    assert found["runs for each E"] == [73, 68, 61, 32, 18, 18]
    assert found["worst N_total"] == found["worst N_active"] == 0


def test_the_counting_rules_give_the_flop_matched_models_of_figure_1b():
    assert [scaling.law_size(d, d // 64, E)[0] for d, E in ((1664, 1), (1152, 4))] == [1103142144, 1071307008]


def test_a_million_points_and_extremes_of_1e30_are_finite():
    N = np.geomspace(1, 1e30, 1_000_000)
    assert np.isfinite(Law().loss(N, N[::-1], 32)).all()
    assert Law().loss(10**30, 10**30, 1) == pytest.approx(Law().c, abs=1e-3)


def test_tables_prints_every_erratum_with_its_number(tmp_path, capsys):
    saved = result(tmp_path, "tables")
    assert len(saved["errata"]) == 8 and len(saved["table_1"]) == 15 and len(saved["table_3"]) == 6
    assert "up to 371%" in capsys.readouterr().out


# --- the optimum ----------------------------------------------------------------------------------------------------


def golden(loss, low, high):
    """Brute force: golden-section search over ln N, elementwise."""
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(100):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        left = loss(a) < loss(b)
        low, high = np.where(left, low, a), np.where(left, b, high)
    return loss((low + high) / 2)


@pytest.mark.parametrize("E", EXPERTS)
@pytest.mark.parametrize("inference", [0, 1e11])
def test_the_optimum_is_no_worse_than_brute_force(E, inference):
    flops = np.geomspace(1e20, 1e24, 9)
    top = flops / (2 * inference) if inference else np.full(9, 1e13)       # above it no token is left to train on
    brute = golden(lambda x: Law().loss(np.exp(x), np.maximum(flops / 6 * np.exp(-x) - inference / 3, 1e-9), E),
                   np.full(9, math.log(1e7)), np.log(top))
    N, D, L = optimum(Law(), E, flops, inference_tokens=inference)
    assert np.allclose(L, brute, rtol=1e-8)
    assert np.allclose(6 * N * D + 2 * N * inference, flops, rtol=1e-12)


@pytest.mark.parametrize("kv", [0, 32768])
def test_a_binding_memory_is_used_to_the_last_parameter(kv):
    N, D, _ = optimum(Law(), EXPERTS, 1e22, 2e9, kv)
    d = scaling.width(13, N)
    assert np.allclose(scaling.law_size(d, d / 64, EXPERTS)[0] + 2 * kv * d**2 / 64, 2e9, rtol=1e-10)
    assert np.allclose(6 * N * D, 1e22)


def test_ample_memory_changes_nothing():
    assert np.allclose(optimum(Law(), EXPERTS, 1e21, 1e13), optimum(Law(), EXPERTS, 1e21), rtol=1e-12)


def test_the_best_number_of_experts_switches_where_two_losses_are_equal():
    found = scaling.switches(Law(), scaling.paper_draws(40), "flops", np.geomspace(1e18, 1e26, 401), memory=5e9)
    assert [(s["from"], s["to"]) for s in found] == [(32, 16), (16, 8), (8, 4), (4, 2), (2, 1)]
    for s in found:
        losses = optimum(Law(), np.array([s["from"], s["to"]]), s["flops"], 5e9)[2]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
        assert s["interval"][0] < s["flops"] < s["interval"][1]


def test_the_rule_of_thumb_holds_up_to_8_experts_at_a_price():
    for row in scaling.rule_of_thumb(Law(), np.array([2, 4, 8]), np.geomspace(1e19, 1e24, 31)):
        assert row["holds"] == 1 and 1.1 < row["cost"][0] < row["cost"][1] < row["n_expert"]


def test_optimum_writes_the_rows_it_prints(tmp_path):
    saved = result(tmp_path, "optimum", "--flops", "1e21", "--memory", "5B", "--switches", "memory")
    assert set(saved) == {"rows", "best", "switches"}
    assert list(saved["rows"][0]) == ["n_expert", "n_active", "n_total", "tokens", "loss"]
    assert saved["best"] == min(saved["rows"], key=lambda row: row["loss"])["n_expert"]


def test_a_switch_is_found_where_the_next_model_only_just_begins_to_fit():
    memory, cache = np.geomspace(1e8, 1e10, 4001), 1e6                # that cache needs 128M values, and more a block
    found = scaling.switches(Law(), scaling.paper_draws(3), "memory", memory, flops=1e18, kv_tokens=cache)
    assert found and all(s["from"] != s["to"] for s in found)


def test_memory_in_bytes_is_memory_in_parameters_of_the_given_dtype(tmp_path):
    rows = [result(tmp_path, "optimum", "--flops", "1e22", "--memory", memory, "--dtype", dtype)["rows"]
            for memory, dtype in (("5B", "bf16"), ("10GB", "bf16"), ("20 GB", "fp32"))]
    assert rows[0] == rows[1] == rows[2]


# --- the fit --------------------------------------------------------------------------------------------------------


def test_the_jacobian_is_the_derivative():
    runs, step = noisy(), 1e-6
    surface = Surface(runs)
    p = surface.project(scaling.random_starts(surface, Law(), np.arange(11), 4), runs.weight, np.arange(11))
    J = surface(p, np.arange(11))[1]
    for i in range(11):
        h = step * np.eye(11)[i]
        assert np.allclose(J[:, i], (surface(p + h, [0])[0] - surface(p - h, [0])[0]) / (2 * step), atol=1e-7)


def test_centring_is_invertible_and_describes_the_same_law():
    surface = Surface(paper_runs())
    p = surface.centred([Law()])
    assert np.allclose(surface.coefficients(p)[0], Law()[:11], rtol=1e-10)
    assert np.allclose(surface(p, [0])[0][0], np.log(paper_runs().L), atol=1e-12)


def test_a_fit_without_noise_returns_the_law():
    fitted, runs = fit(paper_runs()), paper_runs()
    assert np.abs(fitted.law.loss(*runs[:3]) - runs.L).max() < 1e-4


@pytest.mark.parametrize("seed", range(5))
def test_the_default_starts_reach_what_the_papers_grid_reaches(seed):
    runs = noisy(seed)
    usual = fit(runs)
    grid = fit(runs, starts=lambda *a: scaling.paper_starts(*a, scales=False), delta=usual.delta)
    assert usual.cost <= grid.cost * (1 + 1e-6)
    assert usual.agree > 5 * grid.agree


def test_the_paper_grid_has_19683_starts_of_which_projection_leaves_729():
    surface = Surface(paper_runs())
    assert len(scaling.paper_starts(surface, Law(), np.arange(11))) == 19683
    assert len(scaling.paper_starts(surface, Law(), np.arange(11), scales=False)) == 729


def error(runs) -> float:
    truth = paper_runs()
    return scaling.rmse(fit(runs).law.loss(*truth[:3]) - truth.L)


def test_a_fit_at_noise_0_006_is_within_0_002_of_the_noiseless_truth_on_average():
    assert np.mean([error(noisy(seed)) for seed in range(20)]) < 0.002


def test_three_percent_of_outliers_at_most_double_the_error():
    clean, spoilt = (np.mean([error(noisy(seed, outliers=share)) for seed in range(10)]) for share in (0.0, 0.03))
    assert spoilt < 2 * clean


def test_ninety_percent_intervals_cover_about_ninety_percent(tmp_path, capsys):
    assert 0.8 < result(tmp_path, "simulate", "--draws", 12)["mean"]["cover"] < 0.97


def test_refitting_with_a_weight_of_two_is_refitting_with_the_run_twice():
    runs = noisy()
    fitted = fit(runs)
    twice = Runs(*(np.concatenate([field, field[:50]]) for field in runs))
    weight = np.ones((1, 270))
    weight[:, :50] = 2
    one = many(scaling.refit(fitted, weight, fitted.surface.target))
    other = fit(twice, delta=fitted.delta).law
    assert np.allclose(one.loss(*runs[:3]), other.loss(*runs[:3]), atol=1e-5)


def test_held_out_runs_do_not_touch_the_fit():
    runs = scaling.hold_out(noisy(), "loss:30")
    spoilt = runs._replace(L=np.where(runs.weight == 0, 9.0, runs.L))
    assert np.allclose(fit(runs).law[:11], fit(spoilt).law[:11])


def test_dense_runs_alone_give_the_chinchilla_law(tmp_path, capsys):
    saved = result(tmp_path, "fit", save(tmp_path / "dense.csv", chinchilla()), "--bootstrap", 100)
    row = saved["per_expert"]["1"] | {"c": saved["c"]}
    for name, true in (("m", 406.4), ("mu", 0.34), ("n", 410.7), ("nu", 0.28), ("c", 1.69)):
        low, high = saved["intervals"]["1"][name]
        assert low < row[name] < high and row[name] == pytest.approx(true, rel=0.15)
    assert "cannot tell delta, gamma, omega, zeta, e_start, e_max" in capsys.readouterr().out


@pytest.mark.parametrize("form", FORMS)
def test_every_form_recovers_data_of_its_own_kind(form):
    law, runs = Law(**Law()._asdict() | FORMS[form]), paper_runs()
    runs = runs._replace(L=law.loss(*runs[:3]))
    parts, _ = scaling.fit_form(runs, form, {})
    assert np.abs(scaling.predict(parts, runs) - runs.L).max() < 2e-4
    assert len(parts) == (6 if form == "chinchilla" else 1)


def test_fit_reports_intervals_forms_pulls_and_what_is_not_identified(tmp_path, capsys):
    path, law = save(tmp_path / "runs.csv", noisy(1), w=1 + np.arange(270) % 2), tmp_path / "f.json"
    assert run("fit", path, "--weights", "w", "--holdout", "loss:30", "--bootstrap", 200, "--json", law) == 0
    saved, out = json.loads(law.read_text()), capsys.readouterr().out
    assert list(saved)[:6] == ["form", "per_expert", "c", "rmse_train", "rmse_holdout", "runs"]
    assert set(saved["per_expert"]) == {"1", "2", "4", "8", "16", "32"}
    assert all(set(row) == {"m", "mu", "n", "nu"} for row in saved["per_expert"].values())
    assert {"n_active", "tokens", "n_expert", "loss", "predicted"} <= set(saved["runs"][0])
    assert "NOT IDENTIFIED" in next(line for line in out.splitlines() if line.split()[:1] == ["e_max"])
    assert {row["form"] for row in saved["forms"]} == set(FORMS)
    assert min(saved["forms"], key=lambda row: row["aic"])["form"] == "joint"
    assert len(saved["runs"]) == 270 and all(run["pull"] >= 0 for run in saved["runs"])
    assert run("optimum", "--flops", "1e21", "--law", law) == 0


def test_fit_reads_results_of_training_runs_from_a_folder(tmp_path):
    runs = noisy(2)
    for i in range(0, 270, 3):
        (tmp_path / f"r{i}").mkdir()
        row = dict(zip(("n_active", "tokens", "n_expert", "loss"), (float(v[i]) for v in runs)), name=f"r{i}")
        (tmp_path / f"r{i}" / "result.json").write_text(json.dumps(row))
    saved = result(tmp_path, "fit", tmp_path, "--bootstrap", 50, "--holdout", "compute:10", "--e_max", "290")
    assert len(saved["runs"]) == 90 and saved["law"]["e_max"] == 290


def test_a_held_out_column_is_honoured(tmp_path):
    path = save(tmp_path / "runs.csv", noisy(1), held=(np.arange(270) % 9 == 0).astype(int))
    runs, rows = scaling.read_runs([str(path)], None)
    assert (scaling.hold_out(runs, "column:held", rows).weight == 0).sum() == 30


# --- the planner and the figures ------------------------------------------------------------------------------------


def test_a_plan_becomes_a_config_that_the_trainer_accepts(tmp_path, capsys):
    from train import read_config
    config = tmp_path / "planned.py"
    best = result(tmp_path, "plan", "--flops", "1e20", "--gpu", "H100", "--gpus", 8, "--write", config)
    loaded = read_config(str(config), {"device": "cpu"})
    E, lean = best["n_expert"], best["n_active_without_embeddings"]
    assert (loaded.router, loaded.top_k, loaded.renormalize) == ("softmax", 1, False)    # see model_config
    assert (loaded.d_model, loaded.n_layer, loaded.n_expert) == (best["d_model"], best["d_model"] // 64, E)
    assert 6 * best["n_active"] * best["tokens"] == pytest.approx(1e20, rel=1e-6)
    assert best["training_bytes"]["total"] <= 80e9 and best["deployed_bytes"] <= 80e9
    assert best["n_total"] == pytest.approx(best["n_total_with_router_and_norms"], rel=1e-3)
    assert best["interval"][0] < best["loss"] < best["interval"][1]
    assert best["loss"] == pytest.approx(float(Law().loss(best["n_active"], best["tokens"], E)))
    assert best["learning_rate"] == pytest.approx(math.exp(8.39 - 0.81 * math.log(lean) - 0.25 * math.log(E)))
    assert sum(row["chance_best"] for row in best["rows"]) == pytest.approx(1)


def test_the_planned_steps_are_those_that_the_trainer_takes(tmp_path, capsys):
    from train import read_config, total_steps
    config = tmp_path / "planned.py"
    for tokens in (3e8, 5.1e8, 1e9, 1.0002e9, 7.3e9):
        assert run("plan", "--flops", 6 * 1e8 * tokens, "--gpu", "A100-80", "--write", config) == 0
        loaded = read_config(str(config), {"device": "cpu"})
        longer = read_config(str(config), {"device": "cpu", "max_steps": loaded.max_steps + 9})
        assert loaded.max_steps == total_steps(loaded) == total_steps(longer)


def test_a_plan_says_how_far_it_goes_beyond_the_runs_of_its_own_law(tmp_path, capsys):
    runs, law = noisy().take(paper_runs().E < 4), tmp_path / "law.json"
    assert run("fit", save(tmp_path / "runs.csv", runs), "--bootstrap", 20, "--json", law) == 0
    best = result(tmp_path, "plan", "--flops", "1e20", "--gpu", "H100", "--law", law)
    beyond, same = best["beyond_the_runs"], runs.take(best["n_expert"] == runs.E)
    assert beyond["N"] == (pytest.approx(best["n_active"] / same.N.max()) if len(same.N) else None)
    assert beyond["flops"] == pytest.approx(1e20 / (6 * runs.N * runs.D).max(), rel=1e-6)


def test_the_two_readings_of_equation_7_differ_by_about_2_4_at_width_512():
    total = scaling.law_size(512, 8, 1)[1]
    lean = total - 2 * 512 * 50257
    text, code = 8.39 - 0.81 * math.log(lean), 8.391640956 - 0.8121798245 * math.log(total)
    assert math.exp(text - code) == pytest.approx(2.4, abs=0.1)


def test_every_figure_comes_with_its_data(tmp_path):
    assert run("figures", "--out", tmp_path) == 0
    for name in ("1a", "1b", "2", "3", "5", "6"):
        assert (tmp_path / f"figure_{name}.png").stat().st_size > 10_000
        assert json.loads((tmp_path / f"figure_{name}.json").read_text())["shows"]


def test_the_law_needs_no_torch():
    code = "import sys, scaling; scaling.main(['optimum', '--flops', '1e21']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, value", [
    ("1e22", ("number", 1e22)), ("20B", ("number", 2e10)), ("1.5T", ("number", 1.5e12)), ("512k", ("number", 512e3)),
    ("32_768", ("number", 32768)), ("80GB", ("bytes", 8e10)), ("80 GiB", ("bytes", 80 * 2**30))])
def test_quantities_are_read_as_people_write_them(text, value):
    assert scaling.quantity(text) == value


@pytest.mark.parametrize("bad", ["-1", "0", "nan", "inf", "abc", "", "80G", "1e400", "5 apples"])
def test_what_is_no_quantity_is_refused(bad, capsys):
    fails(capsys, "optimum", f"--flops={bad}")


@pytest.mark.parametrize("row, said", [
    ("1e9,2e10,1,two", "is not a number"), ("1e9,2e10,1,nan", "must be positive"),
    ("-1e9,2e10,1,2.5", "n_active = -1e9"),
    ("1e9,0,1,2.5", "tokens = 0"), ("1e9,2e10,0,2.5", "n_expert = 0"),
    ("1e9,2e10,1.5,2.5", "whole number"), ("1e9,2e10,1", "has no loss")])
def test_a_bad_cell_is_named(tmp_path, capsys, row, said):
    (tmp_path / "bad.csv").write_text(f"n_active,tokens,n_expert,loss\n1e9,2e10,1,2.5\n{row}\n")
    line = fails(capsys, "fit", tmp_path / "bad.csv")
    assert said in line and "line 3" in line


def test_missing_columns_and_files_are_named(tmp_path, capsys):
    (tmp_path / "bad.csv").write_text("n_active,tokens,loss\n1e9,2e10,2.5\n")
    assert "has no n_expert" in fails(capsys, "fit", tmp_path / "bad.csv")
    (tmp_path / "gap.csv").write_text("n_active,tokens,n_expert,loss\n\n\n1e9,2e10,1,x\n")
    assert "line 4" in fails(capsys, "fit", tmp_path / "gap.csv")
    (tmp_path / "empty.csv").write_text("n_active,tokens,n_expert,loss\n")
    assert "no runs" in fails(capsys, "fit", tmp_path / "empty.csv")
    assert "cannot be read" in fails(capsys, "fit", tmp_path / "absent.csv")
    (tmp_path / "folder").mkdir()
    assert "no result.json" in fails(capsys, "fit", tmp_path / "folder")


def test_runs_that_cannot_fix_the_law_are_refused_with_the_way_out(tmp_path, capsys):
    runs = noisy()
    few = save(tmp_path / "few.csv", runs.take(np.arange(270) % 27 == 0))
    assert "runs cannot fix the 11 parameters" in fails(capsys, "fit", few)
    one_D = save(tmp_path / "one_D.csv", runs.take(runs.D == 2e9))
    assert "--form clark" in fails(capsys, "fit", one_D)
    assert run("fit", one_D, "--form", "clark", "--bootstrap", 20) == 0
    capsys.readouterr()
    one_N = save(tmp_path / "one_N.csv", runs.take(runs.N[0] == runs.N))
    assert "cannot tell a and alpha" in fails(capsys, "fit", one_N)
    one_16 = save(tmp_path / "e.csv", runs.take((runs.E != 16) | (runs.D > 9e9)))
    assert "E = 16: " in fails(capsys, "fit", one_16, "--form", "chinchilla")


@pytest.mark.parametrize("args, said", [
    (["optimum", "--flops", "1e10"], "no model meets"),
    (["optimum", "--flops", "1e21", "--memory", "1M"], "no model meets"),
    (["optimum", "--flops", "1e21", "--inference_tokens", "1e16"], "no model meets"),
    (["optimum", "--flops", "80GB"], "is in bytes"), (["optimum"], "--flops"), (["divine"], "invalid choice"),
    (["plan", "--flops", "1e21", "--gpu", "H100", "--memory", "80B"], "unit of bytes"),
    (["plan", "--flops", "1e21", "--gpu", "H100", "--memory", "20MB"], "no model meets"),
    (["plan", "--flops", "1e21", "--gpu", "Abacus"], "A100-80"),
    (["plan", "--flops", "1e21", "--gpu", "H100", "--mfu", "0"], "--mfu"),
    (["plan", "--flops", "1e21", "--gpu", "H100", "--write", "plan.txt"], "a Python file"),
    (["optimum", "--flops", "1e21", "--law", "nowhere.json"], "holds no law"),
    (["simulate", "--outliers", "3"], "share from 0 to 1"), (["simulate", "--draws", "2.5"], "whole number")])
def test_impossible_requests_end_in_one_line(args, said, capsys):
    assert said in fails(capsys, *args)


def test_bad_holdouts_and_fixed_values_are_refused(tmp_path, capsys):
    path = save(tmp_path / "runs.csv", noisy())
    assert "--holdout" in fails(capsys, "fit", path, "--holdout", "best:3")
    assert "holds out no run" in fails(capsys, "fit", path, "--holdout", "column:absent")
    assert "below --e_max" in fails(capsys, "fit", path, "--e_start", 9, "--e_max", 3)
    assert "0.05 to 50" in fails(capsys, "fit", path, "--e_start", 60)        # beyond the box the fit would move it
    assert "from 53" in fails(capsys, "fit", path, "--e_max", 20)
    assert "sets E_start" in fails(capsys, "fit", path, "--e_max", 90, "--form", "expert_count")


def test_a_law_without_tokens_has_no_optimum(tmp_path, capsys):
    path, law = save(tmp_path / "runs.csv", noisy()), tmp_path / "f.json"
    assert run("fit", path, "--form", "clark", "--bootstrap", 20, "--json", law) == 0
    capsys.readouterr()
    assert "without tokens" in fails(capsys, "optimum", "--flops", "1e21", "--law", law)


def test_nothing_is_left_behind_when_the_input_is_bad(tmp_path, capsys):
    fails(capsys, "optimum", "--flops", "1e10", "--json", tmp_path / "o.json")
    fails(capsys, "optimum", "--flops", "1e21", "--json", "/dev/null/o.json")
    (tmp_path / "folder").mkdir()
    fails(capsys, "optimum", "--flops", "1e21", "--json", tmp_path / "folder")
    (tmp_path / "folder").rmdir()
    assert list(tmp_path.iterdir()) == []
