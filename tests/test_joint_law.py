"""results/joint_law: the page's numbers are those of the files beside it, and the files those of the runs."""

import csv
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

import scaling
import train
from model import peak_rates

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "results" / "joint_law"
PAGE = (FOLDER / "README.md").read_text()
TEXT = " ".join(PAGE.split()).replace("−", "-")


def read(name: str):
    text = (FOLDER / name).read_text()
    return json.loads(text) if name.endswith(".json") else list(csv.DictReader(text.splitlines()))


def says(*claims: str) -> None:
    for claim in claims:
        assert claim in TEXT, claim


def table(head: str) -> list[list[str]]:
    """The rows of the page's one table whose head begins so."""
    (body,) = re.findall(rf"^\| {re.escape(head)} [^\n]*\n\|[-|:]+\n((?:\|[^\n]*\n)+)", PAGE, re.M)
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in body.splitlines()]


def ladder(monkeypatch) -> list[train.Trial]:
    monkeypatch.setenv("LADDER", "all")
    return train.read_runs(str(ROOT / "configs/joint_law/small.py"))


def test_the_table_of_runs_is_the_ladder_with_the_papers_counting(monkeypatch):
    runs, rows = {run.name: run for run in ladder(monkeypatch)}, read("runs.csv")
    assert runs.keys() == {row["name"] for row in rows} and len(rows) == len(runs)
    paid = 0
    for row in rows:
        run, d, E = runs[row["name"]], int(row["d_model"]), int(row["n_expert"])
        cost = train.budget(run.config)
        assert (run.config.d_model, run.config.n_expert, run.config.seed) == (d, E, int(row["seed"]))
        assert (cost["tokens"], cost["steps"]) == (int(row["tokens"]), int(row["steps"]))
        assert float(row["learning_rate"]) == pytest.approx(run.config.learning_rate)
        active, total = 2 * 264 * d + 13 * d**3 // 16, 2 * 264 * d + (4 + 9 * E) * d**3 // 16
        assert (int(row["n_active"]), int(row["n_total"])) == (active, total)
        paid += cost["tokens"] * train.paid_flops(run) / cost["flops"]
    assert read("late.csv") == [row for row in rows if int(row["tokens"]) >= 800_000]
    models = {(row["d_model"], row["n_expert"]) for row in rows}
    tokens = [int(row["tokens"]) for row in rows]
    says(f"{len(rows)} runs of {len(models)} models with 12,000 to 247,000", f"the {len(read('late.csv'))} runs",
         f"{min(tokens) / 11_551_501:.2f} to {max(tokens) / 11_551_501:.2f} epochs",
         f"{paid / 1e6:.1f}M tokens were paid for {sum(tokens) / 1e6:.1f}M")
    first = {row["name"]: float(row["loss"]) for row in rows if row["tokens"] == "204800"}
    assert 0.31 < max(first.values()) - min(first.values()) < 0.32
    of_16 = [first[f"e16-d{d}-204800"] for d in (16, 32, 48, 64)]
    assert of_16 == sorted(of_16), "the smallest is the best"


def test_the_ladder_leaves_out_what_stands_in_the_table(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LADDER", raising=False)
    with pytest.raises(train.BadInput, match="every run of the ladder stands in"):
        train.read_runs(str(ROOT / "configs/joint_law/small.py"))
    trunk = Path("out/small/e1-d32-6553600/trunk.pt")
    trunk.parent.mkdir(parents=True)
    trunk.touch()
    assert [run.name for run in train.read_runs(str(ROOT / "configs/joint_law/small.py"))] == ["e1-d32-6553600"]


def test_the_rates_are_the_grids_and_eq_7_is_their_least_squares():
    rates, script = read("rates.json"), runpy.run_path(str(FOLDER / "rates.py"))
    cells = script["cells"](read("rates.csv"))
    assert [cell["best"] for cell in cells] == pytest.approx([cell["best"] for cell in rates["cells"]])
    for name in ("with_experts", "without_experts"):
        fit = script["eq_7"](cells, name == "with_experts")
        assert fit["coefficients"] == pytest.approx(rates[name]["coefficients"])
        assert fit["miss"] == pytest.approx(rates[name]["miss"])
    a, b, c = rates["with_experts"]["coefficients"]
    best = {(cell["n_expert"], cell["d_model"]): cell["best"] for cell in rates["cells"]}
    says(f"ln lr = {a:.2f} - {-b:.2f} ln N - {-c:.2f} ln E",
         f"{best[16, 32] / best[1, 32]:.2f} times the dense rate at d = 32, {best[16, 64] / best[1, 64]:.2f} times",
         f"by {rates['with_experts']['rmse']:.2f} RMS with E and by {rates['without_experts']['rmse']:.2f} without",
         f"not seen, by {rates['with_experts']['miss']['E 4, d_model 48']:.2f}",
         f"dense d = 64 asks for {peak_rates(13 * 4 * 64**2, 1, 1)[0]:.2f}")


def test_the_law_is_that_of_the_runs_and_the_page_says_how_well_it_fits():
    saved, everything = read("fit.json"), read("fit_all.json")
    for name, file in (("late.csv", saved), ("runs.csv", everything)):
        runs = scaling.runs_of(scaling.read_table(FOLDER / name))
        parts, _ = scaling.fit_form(runs, "joint", {})
        assert scaling.predict(parts, runs) == pytest.approx([row["predicted"] for row in file["runs"]], abs=2e-3)
    for E, *cells, count, error in table("E | m | mu"):
        law, bounds = saved["per_expert"][E], saved["intervals"][E]
        for name, digits, cell in zip(("m", "mu", "n", "nu"), (",.0f", ".2f", ",.0f", ".2f"), cells):
            low, high = bounds[name]
            assert cell == f"{law[name]:{digits}} [{low:{digits}}, {high:{digits}}]"
        errors = [row["loss"] - row["predicted"] for row in saved["runs"] if f"{row['n_expert']:g}" == E]
        assert (int(count), error) == (len(errors), f"{np.sqrt(np.mean(np.square(errors))):.3f}")
    low, high = saved["intervals"]["1"]["c"]
    rolled = [row["error at its best run"] for row in saved["rolling"]]
    says(f"c = {saved['c']:.3f} [{low:.3f}, {high:.3f}]", f"by {min(rolled):.3f} to {max(rolled):.3f} nats",
         f"RMSE {saved['rmse_train']:.3f} nats; each budget predicted from those below it, {saved['rmse_holdout']:.3f}")
    assert "1.4 times the noise of 0.027" in saved["lack_of_fit"] and "2.9 times" in everything["lack_of_fit"]
    says("residuals are 2.9 times the noise", "residuals are 1.4 times the noise of 0.027")
    assert len(rolled) == 5 and min(rolled) > 0, "all five budgets came out better than predicted"
    error = np.array([row["loss"] - row["predicted"] for row in saved["runs"]])
    x, y = (np.log([row[name] for row in saved["runs"]]) for name in ("n_active", "tokens"))
    share = np.corrcoef((x - x.mean()) * (y - y.mean()), error)[0, 1] ** 2
    pairs = [[float(row["loss"]) for row in read("pair.csv") if row["name"].startswith(name)]
             for name in read("prediction.json")["models"]]
    scatter = np.sqrt(np.mean([np.var(some, ddof=1) for some in pairs]))
    says(f"scatter by {scatter:.3f} nats, against which it would be {saved['rmse_train'] / scatter:.1f} times",
         f"a product of ln N and ln D takes {share:.0%} of its variance")


def test_what_the_runs_themselves_say_of_experts_at_one_size_and_token_count():
    found = {}
    for row in read("late.csv"):
        found.setdefault((int(row["d_model"]), int(row["tokens"]), int(row["n_expert"])), []).append(float(row["loss"]))
    loss = {point: np.mean(some) for point, some in found.items()}
    less_dense = [[loss[d, tokens, 16] - loss[d, tokens, 1] for d in (16, 32, 48, 64)]
                  for tokens in (819_200, 1_638_400, 3_276_800)]
    at, twice, four_times = (f"{np.mean(some):+.3f}" for some in less_dense)
    says(f"is {at} nats at 819,200 bytes, {twice} at twice and {four_times} at four times that")
    long = [(d, tokens) for d, tokens, E in loss if E == 16 and tokens >= 3_276_800]
    gains = [loss[d, tokens, 1] - loss[d, tokens, 4] for d, tokens in long]
    assert len(long) == 6 and sum(loss[d, tokens, 16] < loss[d, tokens, 4] for d, tokens in long) == 3
    says(f"4 experts beat dense at all, by {min(gains):.3f} to {max(gains):.3f} nats, and 16 beat 4 at three")


def test_the_best_numbers_of_experts_are_those_of_the_law():
    rows = {(row["flops"], row["memory"]): row for row in read("best.json")}
    laws, _ = scaling.chosen_law(FOLDER / "fit.json")
    for flops, *cells, losses in table("6 N D"):
        some = [rows[float(flops), memory] for memory in (None, 3e5, 1e5)]
        assert cells == [f"{row['best']} ({row['share'][str(row['best'])]:.0%})" for row in some]
        assert losses == f"{some[0]['loss']:.2f}, {some[0]['dense']:.2f}"
        N, E = some[0]["n_active"], some[0]["best"]
        assert scaling.Law(*laws[0]).loss(N, float(flops) / (6 * N), E) == pytest.approx(some[0]["loss"])
        sizes = np.geomspace(1e4, 1e6, 1000)
        of_8 = scaling.Law(*laws[0]).loss(sizes, float(flops) / (6 * sizes), 8).min()
        assert 0 < of_8 - some[0]["loss"] < 0.004
    says("8 experts have 16's loss within 0.004", f"misses by {read('fit.json')['rmse_train']:.3f} nats")


def test_the_prediction_is_the_laws_and_its_outcome_that_of_the_runs():
    script = runpy.run_path(str(FOLDER / "predict.py"))
    saved, outcome = read("prediction.json"), read("outcome.json")
    assert scaling.clean(script["outcome"](), 6) == outcome
    again = script["predict"]()
    rows = read("pair.csv")
    assert sorted(row["seed"] for row in rows) == sorted(["4", "5", "6"] * 4)
    for name, model in saved["models"].items():
        some = [row for row in rows if row["name"].startswith(name)]
        assert {(int(row["n_active"]), int(row["tokens"])) for row in some} == {(model["n_active"], model["tokens"])}
        assert again["models"][name]["loss"] == pytest.approx(model["loss"], abs=1e-5)
    for (pair, said), cells in zip(saved["pairs"].items(), table("pair | what")):
        measured, (low, high) = outcome["pairs"][pair], said["interval"]
        assert cells[0].startswith(pair) and measured["inside"] == measured["sign_right"] == (cells[3] == "held")
        assert cells[1].replace("−", "-") == f"{said['gain']:+.3f} [{low:.3f}, {high:.3f}]"
        assert cells[2].replace("−", "-") == f"{measured['gain']:+.3f} ± {measured['half']:.3f}"
    for (name, said), cells in zip(saved["models"].items(), table("model | active |")):
        (low, high), measured = said["interval"], outcome["models"][name]
        assert cells == [name, f"{said['n_active']:,}", f"{said['tokens']:,}",
                         f"{said['loss']:.3f} [{low:.3f}, {high:.3f}]",
                         f"{measured['measured']:.3f}" + ", outside" * (not measured["inside"])]
    flops = {row["name"][:-3]: float(row["flops"]) for row in rows}
    assert 0.99 < flops["wins-e4"] / flops["wins-dense"] < 1.01
    less = flops["loses-e16"] / flops["loses-dense"]
    law, model = scaling.Law(*scaling.chosen_law(FOLDER / "fit.json")[0][0]), saved["models"]["loses-e16"]
    N, D = model["n_active"], model["tokens"]
    worth = law.loss(N, D, 16) - law.loss(N, D / less, 16)
    lead, half = -outcome["pairs"]["loses"]["gain"], outcome["pairs"]["loses"]["half"]
    says(f"experts had {1 - less:.0%} less, which by the law is worth {worth:.3f} of the {lead:.3f} nats",
         f"The rest, {lead - worth:.3f}, is inside the ± {half:.3f}")
    assert lead - worth < half
    totals = {row["name"][:-3]: int(row["n_total"]) for row in rows}
    assert max(totals["wins-e4"] / totals["wins-dense"], totals["loses-e16"] / totals["loses-dense"]) < 1.07


def test_the_plan_on_the_page_is_that_of_the_measured_law(tmp_path, monkeypatch, capsys):
    """And its config is one that train.py takes."""
    command = re.search(r"^python scaling.py (plan --law[^`]*)```", PAGE, re.M)[1].replace("\\\n", " ")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(scaling, "VOCABULARY", scaling.VOCABULARY)             # --vocab sets it
    words = command.replace("planned.py", str(tmp_path / "planned.py")).split()
    assert scaling.main([*words, "--json", str(tmp_path / "plan.json")]) in (0, None)
    plan, said = json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out
    assert (plan["n_expert"], plan["n_layer"], plan["d_model"]) == (32, 2, 32) and "no run has 32 experts" in said
    with_16 = next(row for row in plan["rows"] if row["n_expert"] == 16)
    says("32 experts in two blocks of width 32", f"{plan['loss']:.2f} nats; no run here has 32",
         f"16 cost {with_16['loss'] - plan['loss']:.3f} nats more")
    config = train.read_config(str(tmp_path / "planned.py"))
    assert (config.n_expert, config.vocab_size, config.dtype, config.learning_rate) == (32, 264, "float32", 0.006)


def test_the_readme_says_of_it_what_the_page_does():
    readme = " ".join((ROOT / "README.md").read_text().split())
    rows, fit = read("runs.csv"), read("fit.json")
    models = {(row["d_model"], row["n_expert"]) for row in rows}
    assert f"{len(rows)} runs of {len(models)} models" in readme
    assert re.search(r"[\d.]+ times the noise", fit["lack_of_fit"])[0] in readme
    assert {row["best"] for row in read("best.json") if row["memory"] is None} == {16}
