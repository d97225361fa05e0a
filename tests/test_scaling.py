"""scaling.py and results/law: the law, its lesson, the errata, the optimum, the fit, the planner, figures, bad input"""

import csv
import itertools
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import model
import scaling
from scaling import EXPERTS, FORMS, Law, Runs, Surface, fit, law_size, many, optimum, paper_runs

ROOT = Path(scaling.__file__).parent
ERRATA, PAGE = (" ".join((ROOT / f"results/law/{name}.md").read_text().split()) for name in ("errata", "README"))
ALL = np.ones(11, bool)                                     # every coefficient is free


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
        writer.writerow([*scaling.COLUMNS, *extra])
        writer.writerows(zip(*runs[:4], *extra.values()))
    return path


@pytest.fixture(scope="module")
def runs_csv(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("runs") / "runs.csv", noisy())


# --- the law and its lesson -----------------------------------------------------------------------------------------

POINTS = [(1e9, 2e10, 1, 2.5776000430), (1e9, 2e10, 8, 2.5087772821),
          (7e9, 1e12, 1, 2.0942866025), (7e9, 1e12, 8, 2.0400730375)]


def test_the_law_gives_the_unit_points_and_is_finite_up_to_1e30():
    for N, D, E, loss in POINTS:
        assert Law().loss(N, D, E) == pytest.approx(loss, abs=1e-9)
    N = np.geomspace(1, 1e30, 1_000_000)
    assert np.isfinite(Law().loss(N, N[::-1], 32)).all()
    assert Law().loss(10**30, 10**30, 1) == pytest.approx(Law().c, abs=1e-3)


def test_the_lesson_is_a_program_of_at_most_150_lines_that_stands_alone(tmp_path):
    lesson, mark, _ = (ROOT / "scaling.py").read_text().partition("\n# === Part 2: ")
    assert mark and lesson.count("\n") <= 150
    path = tmp_path / "lesson.py"
    path.write_text(lesson)
    names = runpy.run_path(str(path))
    for N, D, E, loss in POINTS:
        assert names["Law"]().loss(N, D, E) == pytest.approx(loss, abs=1e-9)
    budget = {"flops": 1e21, "memory": 5e9, "kv_tokens": 32768, "inference_tokens": 1e9}
    assert np.array_equal(names["optimum"](names["Law"](), EXPERTS, **budget), optimum(Law(), EXPERTS, **budget))


def test_the_law_needs_no_torch():
    code = "import sys, scaling; scaling.main(['optimum', '--flops', '1e21']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


# --- the paper's tables, run list and errata ------------------------------------------------------------------------

TABLE_3 = {                          # E: Ê, m, mu, n, nu from Table 2; then m, mu, n, nu as printed
    1: (2.073200, 30.399252, 0.181755, 53.843351, 0.196384, 30.3640, 0.1817, 53.9838, 0.1965),
    2: (3.055617, 27.820844, 0.177954, 66.722507, 0.206430, 27.7982, 0.1780, 66.8401, 0.2065),
    4: (5.000506, 24.859404, 0.173127, 87.608448, 0.219187, 24.8462, 0.1731, 87.7022, 0.2192),
    8: (8.812370, 21.840457, 0.167574, 119.840309, 0.233862, 21.8330, 0.1676, 119.9126, 0.2338),
    16: (16.138624, 19.020324, 0.161644, 167.452083, 0.249533, 19.0159, 0.1617, 167.5073, 0.2494),
    32: (29.704220, 16.545369, 0.155665, 234.629339, 0.265334, 16.5424, 0.1557, 234.6726, 0.2652)}
TABLE_1 = {                          # N and D as printed at 1e20, 5e20 and 1e21 FLOPs, in units of 1e9
    1: ((1.7, 9.7), (4, 21), (5.7, 29.3)), 2: ((1.5, 11.4), (3.5, 24), (5, 33)),
    4: ((1.2, 13.9), (3, 28), (4.4, 38)), 8: ((0.99, 17), (2.5, 33.2), (3.8, 44.3)),
    16: ((0.81, 20.7), (2.1, 39), (3.3, 51.2))}
OPTIMA = [(1, 1e20, 1.726907e9, 9.651166e9, 2.589698), (1, 1e21, 5.709682e9, 2.919018e10, 2.350199),
          (2, 5e20, 3.485395e9, 2.390929e10, 2.401908), (4, 1e20, 1.212659e9, 1.374391e10, 2.554046),
          (8, 5e20, 2.528308e9, 3.296012e10, 2.359681), (8, 1e21, 3.786164e9, 4.401993e10, 2.294516),
          (16, 1e20, 8.112890e8, 2.054344e10, 2.501335), (16, 1e21, 3.281337e9, 5.079231e10, 2.271322)]
PRINTED = np.array(list(TABLE_3.values()))[:, 5:].T                                              # (4, E)
LAST_DIGIT = np.array([1e-2, *[1e-4] * 3, 1e-2, *[1e-4] * 6])                   # of Table 2 as printed


@pytest.mark.parametrize("E", TABLE_3)
def test_table_3_follows_from_table_2_to_the_last_digit_computed(E):
    computed = [Law().ehat(E), *Law().terms(E)[:4]]
    assert np.allclose(computed, TABLE_3[E][:5], rtol=0, atol=6e-7)
    pairs = (f"{ours:.4f} | {theirs:.4f}" for ours, theirs in zip(computed[1:], TABLE_3[E][5:]))
    assert f"| {E} | {computed[0]:.4f} | {' | '.join(pairs)} |" in ERRATA


def test_table_1_follows_from_the_closed_form_and_meets_print_within_the_stated_deviations():
    for E, flops, *computed in OPTIMA:
        assert np.allclose(optimum(Law(), E, flops), computed, rtol=4e-7)
    off = []
    for E, row in TABLE_1.items():
        for flops, (n, d) in zip((1e20, 5e20, 1e21), row):
            N, D, L = optimum(Law(), E, flops)
            off.append([N / n / 1e9 - 1, D / d / 1e9 - 1])
            line = f"| {E} | {flops:.0e} | {N / 1e9:.3f}B | {n:g}B | {D / 1e9:.2f}B | {d:g}B | {L:.4f} |"
            assert line.replace("e+", "e") in ERRATA
    sizes, tokens = np.abs(off).max(0)
    assert f"sizes are met within {sizes:.2%}, the printed tokens within {tokens:.2%}" in ERRATA


def test_tables_prints_tables_1_and_3(tmp_path, capsys):
    saved = result(tmp_path, "tables")
    assert [[row[k] for k in scaling.TERMS[:4]] for row in saved["table_3"]] == [
        pytest.approx(row[1:5], abs=6e-7) for row in TABLE_3.values()]
    rows = {(row["E"], row["flops"]): (row["N"], row["D"], row["loss"]) for row in saved["table_1"]}
    assert len(rows) == 15
    for E, flops, *computed in OPTIMA:
        assert rows[E, flops] == pytest.approx(computed, rel=4e-7)
    shifted = result(tmp_path, "tables", "--e_start", "2.083")["table_3"][0]["n"]
    assert shifted == pytest.approx(53.9838, abs=1e-3)
    assert "30.399" in capsys.readouterr().out


def test_the_run_list_obeys_both_counting_rules_and_d_64_but_for_8_models():
    rows = scaling.read_table(scaling.RUN_LIST)
    d, n, E, active, total = (
        scaling.column(rows, k) for k in ("d_model", "n_layer", "n_expert", "n_active", "n_total"))
    assert (law_size(d, n, E) == total).all() and (law_size(d, n) == active).all()
    assert [(e == E).sum() for e in EXPERTS] == [73, 68, 61, 32, 18, 18]
    models = set(zip(d, n, E))
    assert sum(d != 64 * n for d, n, _ in models) == 8
    assert f"lists {len(rows)} runs of {len(models)} models" in ERRATA
    assert f"{len(rows)} runs of {len(models)} models" in PAGE
    assert [law_size(d, d // 64, E) for d, E in ((1664, 1), (1152, 4))] == [1103142144, 1071307008]    # Figure 1b


def test_erratum_1_the_printed_signs_miss_table_3_by_far():
    law, E = Law(), EXPERTS
    printed = (law.a * law.ehat(E)**law.delta, law.alpha + law.gamma * np.log(E),
               law.b * law.ehat(E)**law.omega, law.beta + law.zeta * np.log(E))
    worst, turned = (np.abs(np.array(terms) / PRINTED - 1).max() for terms in (printed, law.terms(E)[:4]))
    assert f"by up to {worst:.0%}. With" in ERRATA and f"it is within {turned:.2%}." in ERRATA


def within_print(law: Law) -> int:
    """Cells of Table 3, of 24, that its own rounding and that of Table 2 allow."""
    nudges = np.diag(LAST_DIGIT / 2)
    nudged = many(np.concatenate([np.array(law) + nudges, np.array(law) - nudges]))
    centre = np.array(law.terms(EXPERTS)[:4])
    reach = np.abs(np.array(nudged.terms(EXPERTS)[:4]) - centre[:, None]).sum(1) / 2 + 5e-5
    return (np.abs(centre - PRINTED) <= reach).sum()


def test_erratum_2_an_e_start_of_2_083_puts_all_24_cells_inside_the_rounding():
    law, shifted, runs = Law(), Law(e_start=2.083), paper_runs()
    assert f"it, {within_print(law)} of the 24 cells" in ERRATA and within_print(shifted) == 24
    assert shifted.ehat(1) == pytest.approx(law.ehat(1.01), abs=2e-4)           # E - 1 + 0.01 for E - 1
    assert f"by at most {np.abs(runs.L - shifted.loss(*runs[:3])).max():.1e} nats" in ERRATA


def test_errata_4_to_6_about_figures_and_the_optimal_size():
    law = Law()
    N, D, _ = optimum(law, 1, 1e21)
    assert f"{D:.2e} tokens for {N:.2e} parameters, is D/N = {D / N:.2f}." in ERRATA
    cache = [2 * 32768 * k * d / 1e9 for d, k in ((1664, 26), (1408, 22), (1152, 18))]
    assert "would add {:.1f}B, {:.1f}B and {:.1f}B values".format(*cache) in ERRATA
    m, mu, n, nu, _ = law.terms(EXPERTS)
    log_G, power = np.log(mu * m / (nu * n)) / (mu + nu), nu / (mu + nu)        # N = G (F/6)^power
    overtakes = 6 * np.exp(-np.diff(log_G) / np.diff(power))
    assert "at {:.1e}, {:.1e}, {:.1e}, {:.1e} and {:.1e} FLOPs".format(*overtakes) in ERRATA
    for E, flops in zip(EXPERTS, overtakes):
        for factor, more in ((0.9, False), (1.1, True)):
            N = optimum(law, np.array([E, 2 * E]), factor * flops)[0]
            assert (N[1] > N[0]) == more


def test_erratum_7_the_rule_of_thumb_holds_up_to_8_experts_at_a_price():
    rows = scaling.rule_of_thumb(Law(), np.array([2, 4, 8]), np.geomspace(1e19, 1e24, 51))
    for row in rows:
        assert row["holds"] == 1 and 1.1 < row["cost"][0] < row["cost"][1] < row["n_expert"]
    gains, costs = ([v for row in rows for v in row[key]] for key in ("gain", "cost"))
    said = f"the gain is {min(gains):.3f} to {max(gains):.3f} nats, for {min(costs):.1f} to {max(costs):.1f} times"
    assert said in ERRATA


def test_erratum_8_the_rounding_of_table_2_alone_moves_the_crossovers():
    rounding = np.array(Law()) + np.random.default_rng(0).uniform(-0.5, 0.5, (200, 11)) * LAST_DIGIT
    flops, laws = np.geomspace(1e18, 1e26, 161), np.vstack([Law(), rounding])
    crossed = [s for memory in (2e9, 5e9, 10e9)
               for s in scaling.switches(laws, "flops", flops, memory=memory)]
    widest = max(crossed, key=lambda s: s["interval"][1] / s["interval"][0])
    assert f"from {widest['from']} to {widest['to']} experts at {widest['flops']:.2e} FLOPs" in ERRATA
    assert "between {:.2e} and {:.2e} (90%)".format(*widest["interval"]) in ERRATA


def test_the_two_readings_of_equation_7_differ_as_stated_at_width_512():
    total = law_size(512, 8)
    by_text, by_code = model.peak_rates(total - 2 * 512 * 50257, total, 1)
    assert f"{by_text / by_code:.2f} times less at d = 512" in ERRATA
    assert model.peak_rates(1e9, 1e9, 16)[0] == pytest.approx(
        math.exp(8.39 - 0.81 * math.log(1e9) - 0.25 * math.log(16)))


# --- the optimum ----------------------------------------------------------------------------------------------------


def paper_laws(count) -> np.ndarray:
    return scaling.chosen_law(None)[0][:count + 1]


def test_the_best_number_of_experts_switches_where_two_losses_are_equal():
    found = scaling.switches(paper_laws(40), "flops", np.geomspace(1e18, 1e26, 401), memory=5e9)
    assert [(s["from"], s["to"]) for s in found] == [(32, 16), (16, 8), (8, 4), (4, 2), (2, 1)]
    for s in found:
        losses = optimum(Law(), np.array([s["from"], s["to"]]), s["flops"], 5e9)[2]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
        assert s["interval"][0] < s["flops"] < s["interval"][1]
        assert s["share_of_replicas"] == 1


def test_a_switch_is_found_where_the_next_model_only_just_begins_to_fit():
    memory, cache = np.geomspace(1e8, 1e10, 4001), 1e6                # that cache needs 128M values, and more a block
    found = scaling.switches(paper_laws(3), "memory", memory, flops=1e18, kv_tokens=cache)
    assert found and all(s["from"] != s["to"] for s in found)


def test_a_replica_that_switches_twice_is_read_at_the_nearer_place(monkeypatch):
    def wave(laws, E, flops, **budget):             # E = 1 and 2 take turns, in the replica 0.1 later
        x = np.log(flops) - 0.1 * np.arange(2)[:, None]
        loss = np.ones((2, 6, len(flops)))
        loss[:, 0], loss[:, 1] = np.sin(x), 0
        return None, None, loss
    monkeypatch.setattr(scaling, "optimum", wave)
    found = scaling.switches(paper_laws(1), "flops", np.geomspace(1e-4, 1e8, 4001))
    assert len(found) > 5
    assert np.allclose(np.diff([math.log(s["flops"]) for s in found]), math.pi, atol=0.01)
    for s in found:
        assert s["interval"] == pytest.approx([s["flops"] * math.exp(0.1)] * 2, rel=1e-3)


def test_optimum_writes_the_switches_and_the_rule_it_prints(tmp_path):
    saved = result(tmp_path, "optimum", "--flops", "1e21", "--memory", "5B", "--switches", "memory", "--rule_of_thumb")
    assert set(saved) == {"rows", "best", "switches", "rule_of_thumb"}
    assert list(saved["rows"][0]) == ["n_expert", "n_active", "n_total", "tokens", "loss"]


@pytest.mark.parametrize("E", EXPERTS)
@pytest.mark.parametrize("inference", [0, 1e11])
def test_the_optimum_is_no_worse_than_brute_force(E, inference):
    flops = np.geomspace(1e20, 1e24, 9)
    top = flops / (2 * inference) if inference else np.full(9, 1e13)       # above it no token is left to train on
    x = np.log(1e7) + np.linspace(0, 1, 100_001)[:, None] * np.log(top / 1e7)
    brute = Law().loss(np.exp(x), np.maximum(flops / 6 * np.exp(-x) - inference / 3, 1e-9), E).min(0)
    N, D, L = optimum(Law(), E, flops, inference_tokens=inference)
    assert np.allclose(L, brute, rtol=1e-8) and (brute >= L * (1 - 1e-14)).all()
    assert np.allclose(6 * N * D + 2 * N * inference, flops, rtol=1e-12)


@pytest.mark.parametrize("kv", [0, 32768])
def test_a_binding_memory_is_used_to_the_last_parameter_and_ample_memory_changes_nothing(kv):
    N, D, _ = optimum(Law(), EXPERTS, 1e22, 2e9, kv)
    d = scaling.width(N)
    assert np.allclose(law_size(d, d / 64, EXPERTS) + 2 * kv * d**2 / 64, 2e9, rtol=1e-10)
    assert np.allclose(6 * N * D, 1e22)
    assert np.allclose(optimum(Law(), EXPERTS, 1e21, 1e13, kv), optimum(Law(), EXPERTS, 1e21), rtol=1e-12)


def test_optimum_writes_the_rows_it_prints_and_memory_is_in_parameters_or_bytes(tmp_path, capsys):
    saved, *same = (result(tmp_path, "optimum", "--flops", "1e22", "--memory", memory, "--dtype", dtype)
                    for memory, dtype in (("5B", "bf16"), ("10GB", "bf16"), ("20 GB", "fp32")))
    assert saved == same[0] == same[1] and set(saved) == {"rows", "best"}
    assert list(saved["rows"][0]) == ["n_expert", "n_active", "n_total", "tokens", "loss"]
    assert saved["best"] == min(saved["rows"], key=lambda row: row["loss"])["n_expert"]
    out = capsys.readouterr().out
    assert all(f"{row['loss']:.5g}" in out and row["n_total"] <= 5e9 * (1 + 1e-9) for row in saved["rows"])


# --- the fit --------------------------------------------------------------------------------------------------------


def test_the_jacobian_is_the_derivative():
    runs, step = noisy(), 1e-6
    surface = Surface(runs)
    p = scaling.random_starts(surface, Law(), ALL)[:4]
    value, J = surface.jacobian(p)
    assert np.allclose(value, surface.parts(p)[0], rtol=1e-14)
    for i, h in enumerate(step * np.eye(11)):
        slope = (surface.parts(p + h)[0] - surface.parts(p - h)[0]) / (2 * step)
        assert np.allclose(J[:, i], slope, atol=1e-7)


def test_centring_is_invertible_and_a_fit_without_noise_returns_the_law():
    runs = paper_runs()
    surface = Surface(runs)
    p = surface.centred([Law()])
    assert np.allclose(surface.coefficients(p)[0], Law()[:11], rtol=1e-10)
    assert np.allclose(surface.parts(p)[0][0], np.log(runs.L), atol=1e-12)
    assert np.abs(fit(runs).law.loss(*runs[:3]) - runs.L).max() < 1e-4


def test_huber_is_half_the_square_up_to_its_width_and_linear_beyond():
    r, weight = np.array([[0.5, -0.5, 3.0, -3.0]]), np.array([[1.0, 2.0, 1.0, 2.0]])
    assert scaling.huber(r, weight, 1.0) == pytest.approx(0.125 * 3 + 2.5 * 3)


def paper_starts(surface, base, free, seed) -> np.ndarray:
    """The 729 choices of exponents in the paper's 3^9 starts; a, b and c such that each term is a third of the loss."""
    exponents = itertools.product(*[(0.05, 0.25, 0.5)] * 2, *[(-0.5, 0, 0.5)] * 4)
    p = surface.centred([(100, alpha, delta, gamma, 100, beta, omega, zeta, 1, base.e_start, base.e_max)
                         for alpha, beta, delta, gamma, omega, zeta in exponents])
    p[:, [0, 4, 8]] = surface.target.mean() - math.log(3)
    return p


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_default_starts_reach_what_the_papers_grid_reaches(seed, monkeypatch):
    usual = fit(noisy(seed))
    monkeypatch.setattr(scaling, "random_starts", paper_starts)
    monkeypatch.setattr(scaling, "ROUNDS", 1)
    grid = fit(noisy(seed), delta=usual.delta)
    assert usual.cost <= grid.cost * (1 + 1e-6)
    assert usual.agree > 0.9 and usual.agree >= grid.agree > 0


def test_the_published_optimizer_from_the_papers_starts_does_not_beat_our_fit():
    """torch.optim.LBFGS, uncentred, from a sample of the 19,683 starts; some leave the law's domain and end at nan."""
    import torch
    runs = noisy()
    fitted = fit(runs)
    x, y, E, target = (torch.tensor(v) for v in (np.log(runs.N), np.log(runs.D), runs.E, np.log(runs.L)))
    loss = torch.nn.HuberLoss(reduction="sum", delta=fitted.delta)

    def cost(p):
        z = -torch.log(1 / (E - 1 + 1 / (torch.exp(-p[9]) - p[10])) + p[10])
        first = p[0] - p[2] * z - (p[1] + p[3] * z) * x
        second = p[4] - p[6] * z - (p[5] + p[7] * z) * y
        return loss(torch.logsumexp(torch.stack([first, second, p[8] + 0 * z]), 0), target)

    def coordinates(theta):
        logs = np.log(np.take(theta, [0, 4, 8, 9]))
        return torch.tensor([logs[0], *theta[1:4], logs[1], *theta[5:8], logs[2], logs[3], 1 / theta[10]])
    assert cost(coordinates(fitted.law)).item() == pytest.approx(fitted.cost, rel=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(4):
        alpha, beta = rng.choice([0.05, 0.25, 0.5], 2)
        delta, gamma, omega, zeta = rng.choice([-0.5, 0, 0.5], 4)
        (a, b), c = rng.choice([30, 100, 300], 2), rng.choice([0.5, 1, 2])
        p = coordinates((a, alpha, delta, gamma, b, beta, omega, zeta, c, *Law()[9:])).requires_grad_()
        optimizer = torch.optim.LBFGS([p], max_iter=300, line_search_fn="strong_wolfe")

        def closure(p=p, optimizer=optimizer):
            optimizer.zero_grad()
            value = cost(p)
            value.backward()
            return value
        optimizer.step(closure)
        assert not cost(p).item() < fitted.cost * (1 - 1e-6)


def test_a_fit_at_noise_0_006_is_near_the_truth_and_outliers_at_most_double_its_error():
    truth, errors = paper_runs(), []
    for outliers in (0, 0.03):
        laws = [fit(noisy(seed, outliers=outliers)).law for seed in range(10)]
        errors.append(np.mean([scaling.rmse(law.loss(*truth[:3]) - truth.L) for law in laws]))
    assert errors[0] < 0.002 and errors[1] < 2 * errors[0]


def test_ninety_percent_intervals_cover_about_ninety_percent_and_the_committed_fits_come_out_again(tmp_path, capsys):
    saved = result(tmp_path, "simulate", "--draws", 12)
    assert 0.8 < saved["mean"]["cover"] < 0.97
    committed = json.loads((ROOT / "results/law/recovery.json").read_text())
    for ours, theirs in zip(saved["draws"], committed["draws"]):
        assert ours["rmse_train"] == pytest.approx(theirs["rmse_train"], rel=1e-3)
        assert ours["rmse_holdout"] == pytest.approx(theirs["rmse_holdout"], rel=1e-3)


def test_a_weight_of_two_is_the_run_twice_and_one_of_zero_does_not_touch_the_fit():
    runs = noisy()
    fitted = fit(runs)
    twice = Runs(*(np.concatenate([field, field[:50]]) for field in runs))
    weight = np.where(np.arange(270) < 50, 2.0, 1.0)
    one = many(scaling.refit(fitted, weight, fitted.surface.target))
    other = fit(twice, delta=fitted.delta).law
    assert np.allclose(one.loss(*runs[:3]), other.loss(*runs[:3]), atol=1e-5)
    held = scaling.hold_out(runs, "loss:30")
    spoilt = held._replace(L=np.where(held.weight == 0, 9.0, held.L))
    assert np.allclose(fit(held).law[:11], fit(spoilt).law[:11])


def test_leaving_runs_out_is_fitting_without_them_and_runs_of_one_point_share_a_fold():
    runs = noisy()
    fitted = fit(runs)
    parts, point = [(runs.E > 0, fitted)], scaling.points(runs)
    assert len(set(point)) == 270 and scaling.points(Runs(*np.tile(runs, 2)))[270:].tolist() == point.tolist()
    half, every = np.random.default_rng(0).permutation(270)[point] % 2, np.arange(270)
    one = scaling.predict(parts, runs, 1 - np.eye(270)[:1])[0]
    direct = fit(runs.take(every > 0), delta=fitted.delta).law.loss(*runs[:3])
    assert np.allclose(one, direct, atol=1e-6) and not np.allclose(one, scaling.predict(parts, runs), atol=1e-6)
    unseen = [fit(runs.take(half != k), delta=fitted.delta).law.loss(*runs[:3]) for k in (0, 1)]
    assert scaling.held_out_rmse(parts, runs, "kfold:2") == pytest.approx(
        scaling.rmse(np.where(half, unseen[1], unseen[0]) - runs.L), rel=1e-3)


def test_dense_runs_alone_give_the_chinchilla_law(tmp_path, capsys):
    rng = np.random.default_rng(0)
    N, D = 10 ** rng.uniform([[7.6], [9]], [[10.2], [11.5]], (2, 240))
    L = 406.4 * N**-0.34 + 410.7 * D**-0.28 + 1.69 + rng.normal(0, 0.01, 240)
    path = save(tmp_path / "dense.csv", Runs(N, D, np.ones(240, int), L, None))
    saved = result(tmp_path, "fit", path, "--bootstrap", 100)
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
    assert len(saved["draws"]) == 200 and len(saved["runs"]) == 270 and all(run["pull"] >= 0 for run in saved["runs"])
    assert "noise unknown" in saved["lack_of_fit"]
    assert run("optimum", "--flops", "1e21", "--law", law) == 0


def test_fit_reads_results_of_training_runs_from_a_folder(tmp_path):
    runs = noisy(2)
    for i in range(0, 270, 3):
        (tmp_path / f"r{i}").mkdir()
        row = dict(zip(scaling.COLUMNS, (float(v[i]) for v in runs)), name=f"r{i}")
        (tmp_path / f"r{i}" / "result.json").write_text(json.dumps(row))
    saved = result(tmp_path, "fit", tmp_path, "--bootstrap", 50, "--holdout", "compute:10", "--pin", "e_max=290")
    assert len(saved["runs"]) == 90 and saved["law"]["e_max"] == 290


def test_each_rule_holds_out_the_runs_it_names():
    runs = noisy(1)
    rows = [{"held": "1" if i % 9 == 0 else "False"} for i in range(270)]
    column = scaling.hold_out(runs, "column:held", rows)
    assert np.array_equal(column.weight == 0, np.arange(270) % 9 == 0)
    lowest, largest = (scaling.hold_out(runs, rule).weight == 0 for rule in ("loss:30", "compute:30"))
    assert lowest.sum() == 30 and runs.L[lowest].max() <= runs.L[~lowest].min()
    compute = runs.N * runs.D
    assert largest.sum() == 30 and compute[largest].min() >= compute[~largest].max()


# --- real runs ------------------------------------------------------------------------------------------------------


def clark(name="clark_2022") -> Path:
    """Runs of Clark et al. 2022; the column `largest` holds out those of 1.3B parameters."""
    return ROOT / f"results/law/{name}.csv"


def test_clarks_checkpoints_converge_and_the_floor_at_its_bound_is_named(tmp_path, capsys):
    saved = result(tmp_path, "fit", clark("clark_2022_checkpoints"), "--holdout", "column:largest", "--bootstrap", 200)
    assert "c = 0.001 lies at the bound of the search" in capsys.readouterr().out
    assert saved["starts_agree"] > 0.9 and saved["rmse_holdout"] == pytest.approx(0.0293, abs=2e-4)
    for E, row in saved["per_expert"].items():
        for name, value in (row | {"c": saved["c"]}).items():
            low, high = saved["intervals"][E][name]
            assert low <= value <= high


def test_no_interval_leaves_out_its_own_estimate_and_token_counts_within_two_percent_are_one():
    replicas = np.arange(101.0)
    assert scaling.band(replicas) == scaling.band(replicas, 50.0) == [5, 95]
    assert scaling.band(replicas, 97.0) == [5, 97] and scaling.band(replicas, -1.0) == [-1, 95]
    assert scaling.grouped(np.array([1.31, 1.0, 1.019, 1.021, 1.3]), 0.02).tolist() == [2, 0, 0, 1, 2]


def test_a_replica_that_leads_to_a_lower_cost_moves_the_fit():
    runs = noisy()
    fitted = fit(runs)
    stuck = fitted._replace(p=fitted.p + 0.05, cost=scaling.huber(
        fitted.surface.parts(fitted.p[None] + 0.05)[0] - fitted.surface.target, runs.weight, fitted.delta)[0])
    settled, usual = (scaling.bootstrap(start, runs, 30) for start in (stuck, fitted))
    assert settled.cost == pytest.approx(fitted.cost, rel=1e-6)
    assert np.allclose(settled.law.loss(*runs[:3]), fitted.law.loss(*runs[:3]), atol=1e-5)
    assert np.allclose(many(settled.replicas).loss(*runs[:3]), many(usual.replicas).loss(*runs[:3]), atol=1e-3)


def test_where_few_starts_agree_more_are_tried_and_the_share_is_a_warning(runs_csv, capsys, monkeypatch):
    usual = scaling.minimise

    def lazy(surface, p, target, weight, delta, free, steps=100, tol=1e-10):
        return usual(surface, p, target, weight, delta, free, 3, tol)
    monkeypatch.setattr(scaling, "minimise", lazy)
    assert run("fit", runs_csv, "--bootstrap", 20) == 0
    assert "of 96 starts reach the optimum: there may be a better one" in capsys.readouterr().out


@pytest.mark.parametrize("name, joint, clarks", [
    ("clark_2022", 0.029, 0.042), ("clark_2022_rl_r", 0.030, 0.045), ("clark_2022_hash", 0.027, 0.041)])
def test_without_its_term_in_d_the_joint_form_beats_clarks_on_the_largest_runs(tmp_path, capsys, name, joint, clarks):
    saved = result(tmp_path, "fit", clark(name), "--holdout", "column:largest", "--bootstrap", 50)
    assert "cannot tell b, beta, omega, zeta: held at 0 0 0 0" in capsys.readouterr().out
    assert saved["law"]["b"] == 0 and saved["c"] > 1.5
    assert saved["rmse_holdout"] == pytest.approx(joint, abs=0.003)
    of_clark = result(tmp_path, "fit", clark(name), "--holdout", "column:largest", "--bootstrap", 50, "--form", "clark")
    assert of_clark["rmse_holdout"] == pytest.approx(clarks, abs=0.003)


def isoflop(seed=0) -> Runs:
    """A dense law at nine budgets, each at D / N up to 30 times off its optimum, where the runs leave the law."""
    law = Law(482, 0.348, 0, 0, 2085, 0.366, 0, 0, 1.817)
    flops, off = np.repeat(np.geomspace(1e18, 1e22, 9), 11), np.tile(np.linspace(-3.4, 3.4, 11), 9)
    N = optimum(law, 1, flops)[0] * np.exp(off / 2)
    D = flops / (6 * N)
    noise = np.random.default_rng(seed).normal(0, 0.003, len(N))
    return Runs(N, D, np.ones(99), law.loss(N, D, 1) + 0.012 * off**2 + noise, np.ones(99))


def test_runs_far_from_their_budgets_optimum_are_told_from_noise_and_near_mends_the_prediction(tmp_path, capsys):
    runs = isoflop()
    path = save(tmp_path / "iso.csv", runs, last=(runs.N * runs.D > 1e21).astype(int))
    options = "--noise", 0.003, "--bootstrap", 50, "--holdout"
    every = result(tmp_path, "fit", path, *options, "column:last")
    assert "lack of fit along D / N" in every["lack_of_fit"] and "--near 0.06" in every["lack_of_fit"]
    assert "lack of fit along D / N" in capsys.readouterr().out
    near = result(tmp_path, "fit", path, *options, "column:last", "--near", 0.06)
    assert "--near 0.06 keeps 41 of 99 runs" in capsys.readouterr().out
    assert near["rmse_holdout"] < 0.015 < 0.05 < every["rmse_holdout"]
    low, high = every["intervals"]["1"]["c"]
    assert not low < 1.817 < high and near["c"] == pytest.approx(1.817, abs=0.01)
    past = [result(tmp_path, "fit", path, *options, "rolling", *more)["rolling"] for more in ((), ("--near", 0.06))]
    every, near = (np.mean([abs(row["error at its best run"]) for row in rows]) for rows in past)
    assert near < 0.02 < 0.06 < every                       # the past alone makes the choice


def test_near_is_measured_from_the_best_run_of_a_budget_and_a_number_of_experts():
    N, L = np.array([1.0, 1.05, 2, 9, 1]), np.array([2.0, 2.05, 2.07, 2.5, 3])
    runs = Runs(N, 1e9 / np.array([1, 1, 2, 1, 1.0]), np.array([1, 1, 1, 1, 4.0]), L, np.ones(5))
    assert scaling.near_best(runs, 0.06).tolist() == [True, True, False, True, True]


def test_rolling_predicts_a_budget_from_those_below_it_alone():
    runs = isoflop()
    rows, errors = scaling.roll(runs, "joint", {}, None)
    budget = np.repeat(np.arange(9), 11)
    parts, _ = scaling.fit_form(runs.take(budget < 8), "joint", {})
    last = runs.take(budget == 8)
    error = parts[0][1].law.loss(*last[:3]) - last.L
    assert np.allclose(errors[-11:], error, atol=1e-6) and rows[-1]["rmse"] == pytest.approx(scaling.rmse(error))
    assert rows[-1]["error at its best run"] == pytest.approx(error[last.L.argmin()]) and len(errors) == 11 * len(rows)
    with pytest.raises(scaling.BadInput, match="never suffice"):
        scaling.roll(runs.take(budget < 1), "joint", {}, None)


def test_five_far_runs_are_named_and_the_law_without_them_is_the_true_one(tmp_path, capsys):
    rng = np.random.default_rng(1)
    N, D = 10 ** rng.uniform([[7.6], [9]], [[10.2], [11.5]], (2, 245))
    L = (482 * N**-0.348 + 2085 * D**-0.366 + 1.817) * np.exp(rng.normal(0, 0.004, 245))
    worst = L.argsort()[-5:]
    L[worst] *= np.exp(rng.uniform(0.06, 0.12, 5))
    path = save(tmp_path / "runs.csv", Runs(N, D, np.ones(245), L, np.ones(245)))
    saved = result(tmp_path, "fit", path, "--bootstrap", 50, "--huber", 0.1)
    out = capsys.readouterr().out
    assert "5 runs lie over 5 robust deviations off" in out and "The law with them | without them" in out
    far = [i for i, row in enumerate(saved["runs"]) if abs(row["deviations"]) > 5]
    assert far == sorted(worst)
    without = saved["without_outliers"]["1"]
    for name, true in (("mu", 0.348), ("nu", 0.366), ("c", 1.817)):
        known = (saved["per_expert"]["1"] | {"c": saved["c"]})[name]
        assert abs(without[name] - true) < 0.01 and abs(without[name] - true) < abs(known - true)


@pytest.mark.parametrize("axis, advice", [
    ("N", "smallest N"), ("D", "smallest D"), ("D / N", "--near"), ("E", "--form"), (None, "along no axis")])
def test_lack_of_fit_names_the_axis_that_the_errors_lean_along(axis, advice):
    runs = paper_runs()
    along = {"N": runs.N, "D": runs.D, "D / N": runs.D / runs.N, "E": runs.E}
    noise = np.random.default_rng(0).normal(0, 0.003, 270)
    x = np.log(along[axis]) if axis else noise
    error = 0.01 * ((x - x.mean())**2 - x.var()) + noise * (1 if axis else 3)
    said = scaling.lack_of_fit(runs, error, 0.003)
    assert advice in said and (axis is None or f"lack of fit along {axis}, a parabola" in said)
    said = scaling.lack_of_fit(runs, noise, 0.003)
    assert said.endswith("1.0 times the noise of 0.003 nats: the form is not rejected")


def test_the_noise_is_the_spread_of_runs_that_repeat_a_point():
    runs = paper_runs()
    twice = Runs(*(np.concatenate([field, field]) for field in runs))
    error = np.random.default_rng(0).normal(0, 0.004, 540)
    noise = scaling.rmse(error[:270] - error[270:]) / math.sqrt(2)
    said = scaling.lack_of_fit(twice._replace(L=twice.L + error), error, None)
    assert f"1.0 times the noise of {noise:.2g} nats" in said and noise == pytest.approx(0.004, rel=0.1)
    assert "noise unknown" in scaling.lack_of_fit(runs, error[:270], None)


def test_any_coefficient_can_be_pinned_and_a_pin_stands_in_for_a_missing_size(runs_csv, tmp_path, capsys):
    runs, pins = noisy(), ("--pin", "c=1.6", "--pin", "gamma=0", "--e_max", 290)
    saved = result(tmp_path, "fit", runs_csv, "--bootstrap", 20, *pins)
    assert [saved["law"][name] for name in ("c", "gamma", "e_max")] == [1.6, 0, 290]
    no_D = result(tmp_path, "fit", runs_csv, "--bootstrap", 20, "--pin", "b=0")["law"]
    assert no_D["b"] == no_D["beta"] == no_D["omega"] == no_D["zeta"] == 0
    two_D = save(tmp_path / "two_D.csv", runs.take((runs.D == 2e9) | (runs.D == 4e9)))
    assert run("fit", two_D, "--bootstrap", 20, "--pin", "beta=0.18") == 0


def test_on_a_law_that_bends_the_intervals_cover_less_and_the_committed_coverage_comes_out_again(tmp_path, capsys):
    committed = json.loads((ROOT / "results/law/recovery_curved.json").read_text())
    curve = committed["command"].partition("--curve ")[2].split()[0]
    saved = result(tmp_path, "simulate", "--draws", 3, "--curve", curve)
    for ours, theirs in zip(saved["draws"], committed["draws"]):
        assert ours["rmse_holdout"] == pytest.approx(theirs["rmse_holdout"], rel=1e-3)
        assert ours["cover_prediction"] == pytest.approx(theirs["cover_prediction"], abs=0.1)
    straight = json.loads((ROOT / "results/law/recovery.json").read_text())["mean"]["cover_prediction"]
    assert f"cover {straight:.0%} of them" in PAGE and f"they cover {committed['mean']['cover']:.0%} (" in PAGE
    ratio = np.log(paper_runs().D / paper_runs().N)
    assert f"{curve} (ln D/N - mean)^2, {np.std(float(curve) * (ratio - ratio.mean())**2):.4f} nats RMS" in PAGE
    for row in json.loads((ROOT / "results/law/bootstrap_kinds.json").read_text())["rows"]:
        ours, *others = (kind["cover"] for kind in list(row.values())[2:])
        assert ours >= max(others)


def test_the_page_of_the_law_tells_what_the_figure_of_clarks_runs_shows():
    routers = json.loads((ROOT / "results/law/clark_2022.json").read_text())
    joint, clarks = ([routers[name][form]["rmse_holdout"] for name in ("S-Base", "RL-R", "Hash")]
                     for form in ("joint", "clark"))
    assert "RMSE of {:.3f} (S-Base), {:.3f} (RL-R) and {:.3f} nats (Hash)".format(*joint) in PAGE
    assert "which has no c, {:.3f}, {:.3f} and {:.3f}, too low".format(*clarks) in PAGE
    for name, count in (("clark_2022", 53), ("clark_2022_rl_r", 54), ("clark_2022_hash", 51)):
        assert len(scaling.read_table(clark(name))) == 5 + count and f"5 dense, {count}" in PAGE


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
    assert [best["learning_rate"], best["learning_rate_authors_code"]] == pytest.approx(
        model.peak_rates(lean, best["n_active"], E))
    assert loaded.learning_rate == pytest.approx(best["learning_rate"], rel=1e-3)
    assert sum(row["chance_best"] for row in best["rows"]) == pytest.approx(1)


def test_a_planned_shape_is_the_best_of_those_that_fit(tmp_path):
    from model import memory
    rows = result(tmp_path, "plan", "--flops", "1e21", "--gpu", "A100-40", "--context", 4096)["rows"]
    laws, least = many(scaling.chosen_law(None)[0]), []
    for row in rows:
        E, d = row["n_expert"], 64 * np.arange(1, row["d_model"] // 64 + 12)
        total, active = law_size(d, d // 64, E), law_size(d, d // 64)
        fits = 2 * (total + 2 * 4096 * d**2 / 64) <= 40e9
        fits &= [memory(scaling.model_config(int(v), E), 1, "bfloat16")["total"] <= 40e9 for v in d]
        loss = np.where(fits, laws.loss(active, 1e21 / (6 * active), E), np.inf)
        assert d[loss[0].argmin()] == row["d_model"] and loss[0].min() == pytest.approx(row["loss"])
        least.append(loss[1:].min(1))
    winner = np.argmin(least, axis=0)
    assert [row["chance_best"] for row in rows] == pytest.approx([np.mean(winner == k) for k in range(len(rows))])


def test_the_planned_steps_are_those_that_the_trainer_takes(tmp_path, capsys):
    from train import read_config, total_steps
    config = tmp_path / "planned.py"
    assert run("plan", "--flops", 6 * 1e8 * 7.3e9, "--gpu", "A100-80", "--write", config) == 0
    loaded = read_config(str(config), {"device": "cpu"})
    assert loaded.max_steps == total_steps(loaded)
    for tokens in (1e8, 3e8, 5.1e8, 10**9, 1.0002e9, 7.3e9):
        longer = read_config(str(config), {"device": "cpu", "max_steps": 10**6, "max_tokens": int(tokens)})
        assert scaling.ramp_steps(tokens) == total_steps(longer)


def test_a_law_of_small_models_becomes_a_config_for_their_vocabulary_and_heads(tmp_path, capsys, monkeypatch):
    """From fit to plan --law with 264 bytes and heads of 16: sizes are counted as those of the runs were."""
    from train import read_config
    monkeypatch.setattr(scaling, "VOCABULARY", 50257)                          # main changes it
    d, E, D = (v.ravel() for v in np.meshgrid([32, 48, 64, 80], [1, 4, 16], 2e5 * 2.0**np.arange(5)))
    N = 2 * 264 * d + 13 * (d // 16) * d**2
    L = Law().loss(N, D, E) + np.random.default_rng(0).normal(0, 0.006, 60)
    law, config = tmp_path / "fit.json", tmp_path / "small.py"
    assert run("fit", save(tmp_path / "runs.csv", Runs(N, D, E, L, None)), "--bootstrap", 30, "--json", law) == 0
    small = "--flops", 6 * N.max() * D.max(), "--law", law, "--vocab", 264
    saved = result(tmp_path, "optimum", *small)
    assert all(row["loss"] < 9 for row in saved["rows"])
    best = result(tmp_path, "plan", *small, "--gpu", "H100", "--dtype", "fp32", "--d_head", 16, "--batch", 2048,
                  "--learning_rate", 0.005, "--write", config)
    for row in best["rows"]:
        assert row["n_layer"] == row["d_model"] // 16
        assert row["n_active"] == 528 * row["d_model"] + 13 * row["n_layer"] * row["d_model"]**2
    loaded = read_config(str(config), {"device": "cpu"})
    assert (loaded.vocab_size, loaded.d_head, loaded.n_layer) == (264, 16, best["n_layer"])
    assert (loaded.learning_rate, loaded.max_steps) == (0.005, math.ceil(best["tokens"] / 2048))
    assert f"on the data of {law}" in config.read_text() and "0.0179" not in config.read_text()


def test_a_plan_says_how_far_it_goes_beyond_the_runs_of_its_own_law(tmp_path, capsys):
    runs, law = noisy().take(paper_runs().E < 4), tmp_path / "law.json"
    assert run("fit", save(tmp_path / "runs.csv", runs), "--bootstrap", 20, "--json", law) == 0
    best = result(tmp_path, "plan", "--flops", "1e20", "--gpu", "H100", "--law", law)
    beyond, same = best["beyond_the_runs"], runs.take(best["n_expert"] == runs.E)
    assert beyond["N"] == (pytest.approx(best["n_active"] / same.N.max()) if len(same.N) else None)
    assert beyond["flops"] == pytest.approx(1e20 / (6 * runs.N * runs.D).max(), rel=1e-6)


def close(ours, theirs) -> bool:
    """Equal shapes and names; numbers to 1%, and of those that jump (a best E) all but 1% of a list."""
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(close(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list):
        return np.mean(~np.isclose(ours, theirs, rtol=0.01)) <= 0.01 and np.shape(ours) == np.shape(theirs)
    return ours == theirs


def test_every_figure_comes_with_the_data_that_is_committed_beside_it(tmp_path):
    done = subprocess.run([sys.executable, "results/law/draw.py", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in (*(f"figure_{number}" for number in ("1a", "1b", "2", "3", "5", "6")), "clark_2022"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        ours, theirs = (json.loads((folder / f"{name}.json").read_text())
                        for folder in (tmp_path, ROOT / "results" / "law"))
        assert theirs["shows"] and close(ours, theirs), name


# --- bad input ------------------------------------------------------------------------------------------------------


def test_quantities_are_read_as_people_write_them_and_others_are_refused(capsys):
    for text, value in (("1e22", 1e22), ("20B", 2e10), ("1.5T", 1.5e12), ("512k", 512e3), ("32_768", 32768)):
        assert scaling.quantity(text) == ("number", value)
    assert scaling.quantity("80GB") == ("bytes", 8e10) and scaling.quantity("80 GiB") == ("bytes", 80 * 2**30)
    for bad in ("-1", "0", "nan", "inf", "abc", "", "80G", "1e400", "5 apples"):
        assert "--flops" in fails(capsys, "optimum", f"--flops={bad}")


@pytest.mark.parametrize("row, said", [
    ("1e9,2e10,1,two", "loss = 'two'"), ("1e9,2e10,1,nan", "loss = 'nan'"), ("1e9,2e10,1,1e9", "no loss in nats"),
    ("-1e9,2e10,1,2.5", "n_active = '-1e9'"), ("1e9,0,1,2.5", "tokens = '0'"), ("1e9,inf,1,2.5", "tokens = 'inf'"),
    ("1e9,2e10,0,2.5", "n_expert = '0'"), ("1e9,2e10,1.5,2.5", "whole number"), ("1e9,2e10,1", "has no loss")])
def test_a_bad_cell_is_named(tmp_path, capsys, row, said):
    (tmp_path / "bad.csv").write_text(f"n_active, tokens, n_expert, loss\n1e9,2e10,1,2.5\n{row}\n")
    line = fails(capsys, "fit", tmp_path / "bad.csv")
    assert said in line and "line 3" in line


@pytest.mark.parametrize("text, said", [
    ("n_active,tokens,loss\n1e9,2e10,2.5\n", "has no n_expert"), ("n_active,tokens,n_expert,loss\n", "no runs"),
    ("n_active,tokens,n_expert,loss\n\n\n1e9,2e10,1,x\n", "line 4"), ("\udcff", "cannot be read"), ("", "no runs"),
    (None, "No such file")])
def test_bad_tables_are_named(tmp_path, capsys, text, said):
    if text is not None:
        (tmp_path / "bad.csv").write_text(text, errors="surrogateescape")
    assert said in fails(capsys, "fit", tmp_path / "bad.csv")
    (tmp_path / "folder").mkdir()
    line = fails(capsys, "fit", tmp_path / "folder")
    assert "no result.json" in line and "fit results/law/clark_2022.csv" in line


def test_runs_that_cannot_fix_the_law_are_refused_with_the_way_out(tmp_path, capsys):
    runs = noisy()
    few = save(tmp_path / "few.csv", runs.take(np.arange(270) % 27 == 0))
    assert "runs cannot fix the 11 parameters" in fails(capsys, "fit", few)
    two_D = save(tmp_path / "two_D.csv", runs.take((runs.D == 2e9) | (runs.D == 4e9)))
    assert "of tokens cannot tell the law's b, beta, c" in fails(capsys, "fit", two_D)
    assert run("fit", two_D, "--form", "clark", "--bootstrap", 20) == 0
    capsys.readouterr()
    one_N = save(tmp_path / "one_N.csv", runs.take(runs.N[0] == runs.N))
    assert "of n_active cannot tell the law's a, alpha, c" in fails(capsys, "fit", one_N)
    one_16 = save(tmp_path / "e.csv", runs.take((runs.E != 16) | (runs.D > 9e9)))
    assert "E = 16: " in fails(capsys, "fit", one_16, "--form", "chinchilla")


PLAN = "plan --flops 1e21 --gpu H100 "


@pytest.mark.parametrize("line, said", [
    ("optimum --flops 1e10", "no model meets"), ("optimum --flops 1e21 --memory 1M", "no model meets"),
    ("optimum --flops 1e21 --inference_tokens 1e16", "no model meets"), (f"{PLAN}--memory 20MB", "no model meets"),
    ("optimum --flops 80GB", "not in bytes"), ("optimum", "--flops"), ("divine", "invalid choice"),
    ("optimum --flo 1e21", "--flops"), (f"{PLAN}--memory 80B", "in bytes"), (f"{PLAN}--gpu Abacus", "A100-80"),
    (f"{PLAN}--gpus 0", "'0' must be a whole number from 1"), (f"{PLAN}--mfu 0", "--mfu"),
    (f"{PLAN}--batch 1000", "no multiple of 512"), (f"{PLAN}--write plan.txt", "a Python file"),
    ("optimum --flops 1e21 --law nowhere.json", "No such file"),
    ("optimum --flops 1e21 --law results/law/recovery.json", "holds no law"),
    ("simulate --outliers 3", "share from 0 to 1"), ("simulate --draws 2.5", "whole number"),
    ("fit RUNS --bootstrap 1e12", "to 1,000,000"), ("fit RUNS --holdout best:3", "must be loss:30"),
    ("fit RUNS --holdout loss:\u00b2", "must be loss:30"), ("fit RUNS --holdout kfold:1", "must be loss:30"),
    ("fit RUNS --holdout column:absent", "holds out 0 of 270 runs"), ("fit RUNS --holdout loss:270", "270 of 270"),
    ("fit RUNS --pin c", "no value of c"), ("fit RUNS --pin d=1", "NAME=VALUE with one of a, alpha"),
    ("fit RUNS --pin c=-1", "no value of c"), ("fit RUNS --pin c=1e9", "not below the least loss"),
    ("fit RUNS --pin b=x", "no value of b"), ("fit RUNS --pin alpha=nan", "no value of alpha"),
    ("fit RUNS --pin alpha=50", "-9 to 9"), ("fit RUNS --pin e_start=60", "0.05 to 50"),
    ("fit RUNS --pin e_start=9 --pin e_max=3", "below e_max"), ("fit RUNS --pin e_max=20", "from 53"),
    ("fit RUNS --e_start 9 --e_max 3", "below e_max"),
    ("fit RUNS --pin e_max=90 --form expert_count", "sets e_max itself"),
    ("fit RUNS --pin gamma=0.1 --form no_interaction", "sets gamma itself"),
    (f"fit {clark()} --pin beta=0.2", "pin b, beta, omega, zeta, or none")])
def test_impossible_requests_end_in_one_line(line, said, runs_csv, capsys):
    assert said in fails(capsys, *line.replace("RUNS", str(runs_csv)).split())


def test_a_law_without_tokens_has_no_optimum_and_nothing_is_left_behind_by_bad_input(runs_csv, tmp_path, capsys):
    law, folder = tmp_path / "f.json", tmp_path / "folder"
    assert run("fit", runs_csv, "--form", "clark", "--bootstrap", 20, "--json", law) == 0
    capsys.readouterr()
    folder.mkdir()
    assert "without tokens" in fails(capsys, "optimum", "--flops", "1e21", "--law", law, "--json", folder / "o.json")
    fails(capsys, "tables", "--json", "/dev/null/o.json")
    fails(capsys, "tables", "--json", folder)
    assert sorted(tmp_path.iterdir()) == [law, folder] and not list(folder.iterdir())


def test_a_pipe_stays_a_pipe_a_closed_one_is_quiet_and_a_full_disk_is_one_line(tmp_path):
    def shell(line: str) -> tuple[int, str]:
        line = f"set -o pipefail; scaling() {{ {sys.executable} scaling.py \"$@\"; }}; P={tmp_path}/pipe; {line}"
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stderr
    os.mkfifo(tmp_path / "pipe")
    assert shell("cat $P > $P.txt & scaling tables --json $P") == (0, "") and (tmp_path / "pipe").is_fifo()
    assert shell("scaling tables | sleep 0") in ((130, ""), (0, ""))                       # (who is the faster)
    code, said = shell("ulimit -f 0; scaling tables > $P.txt")
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1
