"""results/**/README.md: every number on these pages is recomputed from the files beside them."""

import csv
import json
import re
import runpy
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean, median, stdev

import numpy as np
import pytest
from conftest import ROOT

import bench
import scaling
import train
from model import ModelConfig, count, memory

RESULTS = ROOT / "results"
README = ROOT / "README.md"
PAGES = [README, *sorted(RESULTS.glob("**/*.md"))]
PAGE = {path.parent.name: path.read_text() for path in RESULTS.glob("**/README.md")}
SPEED = PAGE["results"]
SEARCH = PAGE["search"]
SLICING = PAGE["slicing"]


def tables(page: str) -> list[list[list[str]]]:
    """The page's tables, each a list of rows of cells, the first of them its head."""
    found = []
    for part in re.findall(r"^(\|[^\n]*\n)\|[-|:]+\n((?:\|[^\n]*(?:\n|$))+)", page, re.M):
        found.append([[cell.strip() for cell in row[1:-1].split("|")] for row in "".join(part).splitlines()])
    return found


def table(page: str, *head: str) -> list[list[str]]:
    """The rows of the page's one table whose head begins with these words."""
    (found,) = (rows for rows in tables(page) if tuple(rows[0][:len(head)]) == head)
    return found[1:]


def number(cell: str) -> int:
    return int(re.sub(r"\D", "", cell))


def signed(x: float, digits: int = 3) -> str:
    return f"{x:+.{digits}f}".replace("-", "−")


def spread(values: list[float], digits: int) -> str:
    return f"{fmean(values):.{digits}f} ± {stdev(values) / len(values) ** 0.5:.{digits}f}"


def read(path: str | Path) -> dict:
    return json.loads((RESULTS / path).read_text())


def kept(folder: str) -> list[dict]:
    """The runs of this folder that keep.py kept, a dict a run."""
    found = []
    for path in sorted(RESULTS.glob(f"{folder}/*.json")):
        found += [row | {"model": row["name"].rpartition("-s")[0], "group": ""} for row in read(path).get("runs", [])]
    return sorted(found, key=lambda row: row["seed"])


def runs(folder: str) -> list[dict]:
    """The finished runs of a sweep, a dict a run."""
    with open(RESULTS / folder / "summary.csv", newline="") as file:
        return [row | {"loss": float(row["loss"])} for row in csv.DictReader(file) if row["status"] == "done"]


def losses(rows: list[dict]) -> dict[str, list[float]]:
    """The losses of each model, one a seed."""
    return {row["model"]: [other["loss"] for other in rows if other["model"] == row["model"]] for row in rows}


def says(page: str, *claims: str) -> None:
    for claim in claims:
        assert claim in " ".join(page.split()), claim


@cache
def meaning(command: str) -> train.Config:
    """The config of a command's first run, whatever its folder and seed."""
    args, given = train.parse_command_line(command.split()[2:])
    return replace(train.load_runs(str(ROOT / args.config), given)[0], out_dir="", seed=1, overwrite=False)


# --- pages as pages -------------------------------------------------------------------------------------------------

def anchors(page: Path) -> list[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_picture_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, part = target.partition("#")
        there = page.parent / path if path else page
        assert there.is_file(), target
        assert not part or part in anchors(there), target


def test_the_index_names_every_file_and_the_command_each_benchmark_came_from():
    index = "\n".join(" | ".join(row) for row in table(SPEED, "file", "made by"))
    for path in RESULTS.iterdir():
        if path.name != "README.md":
            assert f"`{path.stem if path.suffix in ('.json', '.png') else path.name}" in index, path.name
        if path.suffix == ".json":
            command = read(path.name)["conditions"]["command"].replace(f" --json results/{path.name}", "")
            assert f"| `{command}`" in index, command


@pytest.mark.parametrize("folder, least", [("search", 3), ("experiments", 2)])
def test_each_command_shown_is_accepted_and_is_that_of_runs_that_were_kept(folder, least):
    rows = kept(folder)
    shown = re.findall(r"^(python train\.py .*)$", PAGE[folder], re.M)
    assert len(shown) >= least
    for command in shown:
        names = re.findall(r"--only=(\S+)", command)
        if names:                                         # of a sweep: every run it names
            assert {row["model"] for row in rows} >= set(names[0].split(","))
        else:
            assert any(meaning(row["command"]) == meaning(command) for row in rows), command


def test_the_effects_of_the_factorial_are_those_of_its_runs():
    script = runpy.run_path(str(RESULTS / "slicing/factorial.py"))
    rows, saved = runs("slicing/factorial"), read("slicing/factorial.json")
    cells = losses([row for row in rows if "-" not in row["model"]])
    assert len(cells) == 16 and all(len(values) == 3 for values in cells.values())
    effects, half = script["effects"](cells)
    assert saved["effects"] == pytest.approx(effects) and saved["half_interval"] == pytest.approx(half)
    L = np.array([*cells.values()])                          # the two scatters as those of a split plot, by hand
    L = L - L.mean(0)
    shapes = np.array([cell.rstrip("DE") for cell in cells])
    plots = np.array([L[shapes == one].mean(0) for one in np.unique(shapes)])
    assert plots.shape == (8, 3)                             # eight shapes of two cells each
    between = ((plots - plots.mean(1, keepdims=True)) ** 2).sum() / 14
    within = ((L - L.mean(1, keepdims=True)) ** 2).sum() - 2 * 14 * between
    assert half["A"] == pytest.approx(2.145 * (4 * between / 8 / 3) ** 0.5)
    assert half["D"] == pytest.approx(2.120 * (4 * within / 16 / 16 / 3) ** 0.5)
    flops = {row["model"]: float(row["flops"]) for row in rows}
    assert saved["compute_saved"] == pytest.approx(script["compute_saved"](cells, flops, saved["ladder"]))
    assert [flops[name] for name in ("E-244", "E", "E-976")] == [cost for cost, _ in saved["ladder"]]
    # A: on the ladder's second half 0.055 nats are worth so much, and its cells take so much more
    (_, _), (low, high), (top, bottom) = saved["ladder"]
    worth = abs(effects["A"]) / ((high - bottom) / np.log(top / low))
    extra = np.mean([np.log(flops[cell]) * (1 if "A" in cell else -1) for cell in cells]) * 2
    assert saved["compute_saved"]["A"] == pytest.approx(np.exp(worth - extra), rel=0.1)
    for name, effect in effects.items():                   # the definition, cell by cell
        sign = {cell: np.prod([1 if letter in cell else -1 for letter in name]) for cell in cells}
        assert effect == pytest.approx(sum(sign[cell] * fmean(cells[cell]) for cell in cells) / 8)
    for choice, effect, interval, saving, verdict in table(SLICING, "choice", "effect, nats"):
        name, _, meaning = choice.partition(": ")
        assert script["MEANING"][name].split()[0] in meaning
        assert (effect, interval) == (signed(effects[name]), f"± {half[name]:.3f}")
        assert saving == f"{saved['compute_saved'][name]:.2f}x"
        assert verdict == ("not resolved" if abs(effects[name]) <= half[name] else
                           "helps" if effects[name] < 0 else "hurts")
    pairs = {name: effect for name, effect in effects.items() if len(name) == 2}
    assert [name for name in pairs if abs(pairs[name]) > half[name]] == ["AE"]
    assert max(map(abs, pairs.values())) < min(0.0125, abs(effects["A"]) / 4)
    says(README.read_text(), f"of ten interactions of five choices one is resolved, {abs(pairs['AE']):.3f}")
    few, many = effects["E"] - effects["AE"], effects["E"] + effects["AE"]
    error = 2 ** 0.5 * half["E"]
    says(SLICING, f"A x E {signed(effects['AE'])} (± {half['AE']:.3f}): dropping costs {-few:.3f} ± {error:.3f} nats",
         f"with 4 experts for each visited and {-many:.3f} ± {error:.3f} with 16",
         f"A x B {signed(pairs['AB'])} and B x C {signed(pairs['BC'])} are as large as B itself (± {half['B']:.3f})")
    helpful = [name for name in "ABCDE" if abs(effects[name]) > half[name]]
    assert helpful == ["A", "D", "E"]
    assert all(abs(pairs[pair]) < abs(effects[name]) for name in helpful for pair in pairs if name in pair)


def test_the_best_widths_and_their_shifts_are_those_of_the_runs():
    script, saved = runpy.run_path(str(RESULTS / "slicing/widths.py")), read("slicing/widths.json")
    rows, bottom = runs("slicing/widths"), {}

    def shown(found: dict, form: str) -> str:
        low, value, high = (found[end] and format(found[end], form) for end in ("low", "value", "high"))
        return f"{value} [{low}, {high}]" if low else f"{value}, no interval"

    for active, total, best, *cells in table(SLICING, "active", "total", "best width, 95%"):
        group = f"active {active}, total {total}"
        found = np.array([[float(row[name]) for name in ("d_expert", "seed", "loss", "top_k", "n_expert")]
                          for row in rows if row["group"] == group])
        width, _, loss, top_k, n_expert = found.T
        assert len(found) == 3 * len({*width}) >= 9
        assert ({*(width * top_k)}, {*(width * n_expert)}) == ({float(active)}, {float(total)})
        bottom[group] = saved["best"][group]["value"]
        widest = width.max()
        assert best == (f"beyond {widest:.0f}" if bottom[group] > widest else shown(saved["best"][group], ".0f"))
        assert [cell for cell in cells if cell] == [f"{w:.0f}: {loss[width == w].mean():.3f}" for w in np.unique(width)]
        a, b, _ = np.polyfit(np.log(width), loss, 2)         # every seed has every width: its offset moves no bottom
        assert bottom[group] == pytest.approx(np.exp(-b / (2 * a)), rel=1e-3)
    shifts = table(SLICING, "what changes", "best width, times")
    for name, shift, verdict in shifts:
        of, to = script["SHIFTS"][name]
        none = saved["shifts"][name]["value"] < 0.01
        assert shift == ("no estimate" if none else shown(saved["shifts"][name], ".1f"))
        assert verdict == saved["shifts"][name]["verdict"]
        assert saved["shifts"][name]["value"] == pytest.approx(bottom[to] / bottom[of])
    assert len(bottom) == len(shifts) == 4
    assert saved["at_rates"] == script["at_rates"](runs("slicing/width_rates"))
    for active, *cells in table(SLICING, "active", "half", "4e-3 N^-0.51"):
        losses_at = saved["at_rates"][f"active {active}"]
        assert cells == [f"{loss:.3f}" for loss in losses_at.values()] and [*losses_at] == ["1", "2", "4", "8", "16"]
    at = saved["at_rates"]["active 128"]                   # 4e-3 and four times that
    says(SLICING, f"at four times it came out {at['2'] - at['8']:.1f} nats lower")
    tried = {row["group"]: [] for row in runs("slicing/width_rates")}
    for row in runs("slicing/width_rates"):
        tried[row["group"]].append((float(row["learning_rate"]), row["loss"]))
    for group, points in tried.items():                      # the rate of widths.py: the bottom through the best three
        rate, loss = np.array(sorted(points)).T
        near = slice(loss.argmin() - 1, loss.argmin() + 2)
        a, b, _ = np.polyfit(np.log(rate[near]), loss[near], 2)
        (used,) = {float(row["learning_rate"]) for row in rows if row["group"].startswith(group + ",")}
        assert used == pytest.approx(np.exp(-b / (2 * a)), rel=0.01)
    loss = {(row["group"], int(row["d_expert"]), row["seed"]): row["loss"] for row in rows}
    by_total = [np.array([loss[f"active 128, total {total}", 64, seed] - loss[f"active 128, total {total}", 32, seed]
                          for seed in "123"]) for total in (512, 2048)]
    differ = by_total[1] - by_total[0]
    assert by_total[0].mean() < 0 < by_total[1].mean()
    scatter = 0.0                                    # of both totals' cells, without what a width or a seed adds
    for total in (512, 2048):
        group = f"active 128, total {total}"
        L = np.array([[loss[group, width, seed] for seed in "123"] for width in (8, 16, 32, 64)])
        scatter += ((L - L.mean(0) - L.mean(1, keepdims=True) + L.mean()) ** 2).sum()
    half = 2.179 * (4 * scatter / 12 / 3) ** 0.5
    says(SLICING, f"{differ.mean():.3f} nats, ± {half:.3f} by the scatter of all cells "
         f"(± {4.303 * differ.std(ddof=1) / 3 ** 0.5:.3f} by its own three seeds)")
    of = losses(runs("slicing/expert_count"))
    buys = [fmean(of[f"d32-ratio{n}"]) - fmean(of[f"d32-ratio{2 * n}"]) for n in (1, 2, 4, 8, 16, 32, 64)]
    says(SLICING, f"the first four buy {min(buys[:4]):.3f} to {max(buys[:4]):.3f} nats each, the last three "
         f"{min(buys[4:]):.3f} to {max(buys[4:]):.3f}")


def test_the_tokens_that_the_later_runs_took_are_told():
    def millions(name: str) -> str:
        return f"{sum(float(row['tokens']) for row in runs(name)) / 1e6:.1f}M"

    says(SLICING, f"({millions('slicing/factorial')} tokens in all)",
         f"({millions('slicing/widths')}, and {millions('slicing/width_rates')} for the rates;")
    says(SEARCH, f"two seeds ({millions('search/sizes')} tokens)")
    joint = {name: csv.DictReader((RESULTS / f"joint_law/{name}.csv").read_text().splitlines())
             for name in ("rates", "pair")}
    rates, pair = (sum(float(row["tokens"]) for row in rows) / 1e6 for rows in joint.values())
    says((RESULTS / "joint_law/README.md").read_text(), f"with {rates:.1f}M more for the rates and {pair:.1f}M for the")


# --- differences between models -------------------------------------------------------------------------------------

NUMBER = r"[+−]\d\.\d{3}"
CLAIM = re.compile(rf"`([^`\s]+)` − `([^`\s]+)`[^:`|]*:((?: (?:equal \w+ )?{NUMBER} ± \d\.\d{{3}};?)+)")
CLAIMS = [(folder, a, b, *part)                           # `A` − `B`: group difference ± standard error; group ...
          for folder in ("search", "slicing", "experiments")
          for a, b, parts in CLAIM.findall(PAGE[folder])
          for part in re.findall(rf"(equal \w+)? ?({NUMBER} ± \d\.\d{{3}})", parts)]


def by_seed(rows: list[dict], model: str, group: str) -> dict[str, float]:
    named = re.compile(rf"{re.escape(model)}(-flops|-tokens)?")
    return {row["seed"]: row["loss"] for row in rows if group in ("", row["group"]) and named.fullmatch(row["model"])}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim[1]} - {claim[2]} {claim[3]}".strip())
def test_each_difference_is_that_of_the_committed_runs_seed_by_seed(claim):
    folder, a, b, group, shown = claim
    found = []
    for rows in [runs(path.parent) for path in sorted(RESULTS.glob(f"{folder}/*/summary.csv"))] or [kept(folder)]:
        one, other = (by_seed(rows, model, group) for model in (a, b))
        if one and other:
            found.append([one[seed] - other[seed] for seed in one])
    assert len(found) == 1
    difference, error = spread(found[0], 3).split(" ± ")
    assert shown == f"{signed(float(difference))} ± {error}"


@pytest.mark.parametrize("folder, least", [("search", 10), ("slicing", 10), ("experiments", 5)])
def test_no_difference_with_an_error_escapes_the_check(folder, least):
    assert len(re.findall(rf"{NUMBER} ± ", PAGE[folder])) == sum(claim[0] == folder for claim in CLAIMS) >= least


# --- the architecture search ----------------------------------------------------------------------------------------

def test_the_sizes_of_the_five_architectures_are_what_count_counts():
    rows = table(SEARCH, "model", "layers")
    assert len(rows) == 5
    fields = "n_layer d_model n_head d_head n_kv_head n_expert top_k d_expert".split()
    for _, *cells in rows:
        shape = map(int, re.findall(r"\d+", " ".join(cells[:4])))
        sizes = count(ModelConfig(**dict(zip(fields, shape)), vocab_size=151_936))
        claimed = [number(cell) for cell in cells[4:]]
        assert claimed == [round(sizes[key] / 1e6) for key in ("total", "active", "total_untied")]
    thirds = {round(number(row[-1]) / 3) for row in rows}
    listed = re.findall(r"(\d+)M", re.search(r"section 4\.3 \(([^)]*)\)", SEARCH)[1])
    assert len(listed) == 4 and set(map(int, listed)) <= thirds


def test_the_losses_beside_the_articles_are_the_means_of_the_runs():
    found = losses(runs("search/architecture"))
    for model, _, *claimed in table(SEARCH, "model", "article's loss"):
        assert claimed == [f"{fmean(found[name]):.3f}" for name in (model, f"{model}-flops")]
    rates = {rate: f"{fmean(found):.3f}" for rate, found in losses(runs("search/learning_rate")).items()}
    claims = re.findall(r"`(lr[\w-]+)`[^`]*?(\d\.\d{3})", SEARCH)
    assert claims[0][0] == min(rates, key=rates.get)
    assert all(rates[rate] == loss for rate, loss in claims)


def test_the_trends_over_sizes_are_those_of_the_runs():
    script, saved = runpy.run_path(str(RESULTS / "search/sizes.py")), read("search/sizes.json")
    rows = script["read"]([RESULTS / f"search/sizes/{name}.csv" for name in ("first", "summary")])
    found = script["losses"](rows)
    assert saved["rank_correlations"] == {group: [script["rank_correlation"](found, rows, group, size) for size in
                                                  script["SIZES"]] for group in script["GROUPS"]}
    assert len(found) == 2 * 3 * 5 and all(len(some) == (3 if size == 1 else 2) for (*_, size), some in found.items())
    for a, b, title in script["PAIRS"]:
        for group in script["GROUPS"]:
            one = saved["differences"][f"{title}, {group}"]
            by_size = script["differences"](found, a, b, group)
            assert one["seeds"] == list(by_size.values())
            assert (one["slope"], one["half"]) == pytest.approx(script["trend"](by_size))
            x, y = np.repeat([0, 1, 2], [3, 2, 2]), np.concatenate(one["seeds"])     # a line, from first principles
            x = x - x.mean()
            slope = (x * y).sum() / (x**2).sum()
            error = (((y - y.mean() - slope * x) ** 2).sum() / 5 / (x**2).sum()) ** 0.5
            assert (one["slope"], one["half"]) == pytest.approx((slope, 2.571 * error))
    means = {name: one["means"] for name, one in saved["differences"].items()}
    says(SEARCH, f"over top-2 at equal tokens, {-means['top-8 less top-2, equal tokens'][-1]:.3f} nats",
         "`1b` does fade, from {:.3f} to {:.3f}".format(*(-mean for mean in means["1.3b less 1b, equal tokens"][::2])),
         f"further, to {means['1.3b less 1b, equal FLOPs'][-1]:.3f}")
    last = found["1.3b", "equal tokens", 4], found["1.3b-top2", "equal tokens", 4]
    error = np.std([last[0][seed] - last[1][seed] for seed in last[0]], ddof=1) / 2**0.5
    assert abs(means["top-8 less top-2, equal tokens"][-1]) < 1.1 * error
    assert all(some[0] * mean > 0 for some in means.values() for mean in some)
    for line in (RESULTS / "search/sizes.md").read_text().splitlines():
        assert line in SEARCH.splitlines(), line


def ranks(x: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(x))


def test_ratios_and_rank_correlations_of_the_claims():
    rows = {row["model"]: row for row in runs("search/architecture")}
    for field, a, b, words in (("flops", "1.3b", "1.3b-top2", "times the FLOPs"),
                               ("active", "1.3b", "1b", "times the active parameters"),
                               ("active", "deep-1.5b", "wide-1.5b", "times the active parameters (here)")):
        says(SEARCH, f"{float(rows[a][field]) / float(rows[b][field]):.1f} {words}")
    names = [row[0] for row in table(SEARCH, "model", "article's loss")]
    ratio = ranks([float(rows[name]["active_ratio"]) for name in names])
    found = losses(runs("search/architecture"))
    for group, suffix in (("equal tokens", ""), ("equal FLOPs", "-flops")):
        rho = np.corrcoef(ratio, ranks([-fmean(found[name + suffix]) for name in names]))[0, 1]
        says(re.search(r"rank correlation[^|]*", SEARCH)[0], f"{group} {signed(rho, 1)}")
    law = scaling.Law()                                   # of one active size between ours and the whole, E = 1 ... 2
    nats = [f"about {law.loss(n, 2000 * 16_384, 2):.0f} nats" for n in (0.781e9, 1.083e9)]
    says(SEARCH, f"irreducible part alone is {law.c:.2f}", *nats)


def by_chance(n: int, k: int, n_expert: int = 16, n_layer: int = 4, times: int = 100) -> float:
    """The busiest expert's load over an even share, when every token chooses K of E experts at random."""
    random = np.random.default_rng(0)
    most = []
    for _ in range(times):
        choice = random.random((n_layer, n, n_expert)).argpartition(k - 1, -1)[..., :k].reshape(n_layer, -1)
        most.append(max(np.bincount(layer).max() for layer in choice) * n_expert / (n * k))
    return fmean(most)


def test_load_by_top_k_and_by_context_is_that_of_the_kept_runs():
    for name, tokens, busiest, chance, most, without, entropy in table(SEARCH, "run", "tokens a step"):
        rows = [row for row in kept("search") if row["model"] == name.strip("`")]
        assert number(tokens) == rows[0]["tokens"] // rows[0]["steps"]
        shown = {"load_max_over_mean": busiest, "dead_experts": without, "entropy": entropy}
        for field, cell in shown.items():
            assert cell == spread([row["last_half"][field] for row in rows], 2), (name, field)
        k = 2 if "top2" in name else 8
        assert float(most) == 16 / k
        assert float(chance) == pytest.approx(by_chance(number(tokens), k), abs=0.01)


def test_the_claims_about_load_are_the_tables_to_one_decimal():
    rows = table(SEARCH, "run", "tokens a step")
    busiest = {row[0].strip("`"): f"{float(row[2].split()[0]):.1f}" for row in rows}
    without = {row[0].strip("`"): f"{float(row[5].split()[0]):.1f}" for row in rows}
    claim = re.search(r"`1.3b` ([\d.]+), `1.3b-top2` ([\d.]+); .*? ([\d.]+) and ([\d.]+) \|", SEARCH)
    assert list(claim.groups()) == [of[name] for of in (busiest, without) for name in ("1.3b", "1.3b-top2")]
    claim = re.search(r"at contexts of [\d, ]+: one sequence a step (.*?); 512 tokens a step (.*?); "
                      r"1,024 tokens a step (.*?) \|", SEARCH)
    for cells, name in zip(claim.groups(), ("bs1ctx{}", "bs{1}ctx{0}", "bs1ctx{}-tokens")):
        assert cells == ", ".join(busiest[name.format(T, 512 // T)] for T in (64, 128, 256, 512)), name


def test_inference_in_small_is_the_committed_benchmark():
    speed = {name: row["tokens_per_s"] for name, row in benchmark("decode_search_small_cpu")[0].items()}
    rows = table(SEARCH, "model", "article, tokens/s")
    assert {name: here for name, _, here in rows} == {name: f"{x:.0f}" for name, x in speed.items()}
    source = {name: float(cell.split()[0]) for name, cell, _ in rows}
    top2, top8 = (source[name] for name in ("1.3b-top2", "1.3b"))
    says(SEARCH, f"tokens/s of `1.3b-top2` over `1.3b`: {speed['1.3b-top2'] / speed['1.3b']:.2f} here",
         f"{top2:.1f} over {top8:.1f}, which is {top2 / top8:.2f}")


def test_memory_and_cards_are_the_committed_estimates():
    cells = benchmark("memory_search")[0]
    estimate = {name: f"{row['estimate']:.1f}" for name, row in cells.items()}
    largest = max(estimate.values(), key=float)
    says(SEARCH, f"our estimate is {estimate['1 x 2048']} GiB for that cell, {largest} for the largest")
    assert {row[0] for row in table(SEARCH, "cell", "article's loss")} <= cells.keys()
    config = train.read_config(str(ROOT / "configs/large_moe_1p3b.py"), {"device": "cpu"})
    for name, source, estimate in table(SEARCH, "card"):
        batch, context, _ = map(int, source.split(" x "))
        need = memory(replace(config, seq_len=context), batch, "bfloat16")["total"]
        room = float(name.split(", ")[1].removesuffix(" GB")) * 1e9
        fits = "fits" if need + bench.RESERVE <= room else "too large"
        assert estimate == f"{need / 1e9:.1f} GB, {fits}", name


# --- the axes, and where bytes go -----------------------------------------------------------------------------------

def test_the_table_of_sweeps_counts_runs_seeds_and_tokens():
    everything = []
    for path, _, tokens, seeds, n, link in table(SLICING, "sweep", "varies"):
        name = Path(path.strip("`")).stem
        done = runs(f"slicing/{name}")
        assert link == f"[{name}]({name}/summary.md)"
        assert {int(row["tokens"]) for row in done} == {number(tokens)}
        assert (int(n), int(seeds)) == (len(done), len({row["seed"] for row in done}))
        everything += done
    active = [round(int(row["active"]), -3) for row in everything]
    errors = [stdev(found) for found in losses(everything).values()]
    says(SLICING, f"{len(everything)} runs of models", f"{min(active):,} to {max(active):,} active",
         f"{sum(float(row['seconds']) for row in everything) / 60:.0f} minutes",
         f"{median(errors):.3f} in the median and {max(errors):.3f} in the worst case")


def test_the_best_widths_are_the_bottoms_of_their_parabolas():
    rows = runs("slicing/granularity")
    found = losses(rows)
    for width, best in re.findall(r"([\d.]+) at D = (\d+)", SLICING):
        model = {int(row["d_expert"]): row["model"] for row in rows if row["group"] == f"d_model {best}"}
        a, b, _ = np.polyfit(np.log(list(model)), [fmean(found[name]) for name in model.values()], 2)
        assert width == f"{np.exp(-b / (2 * a)):.2g}"


def test_the_favourite_expert_of_each_kind_of_byte_is_that_of_the_committed_numbers():
    data = read("routing/routing.json")
    text = (RESULTS / "routing/text.txt").read_bytes()
    assert len(data["tokens"]) == sum(data["tokens_of_kind"]) == len(text)
    for i, (kind, n, *cells) in enumerate(table(PAGE["routing"], "kind of byte")):
        share = np.array(data["share"])[:, :, i]          # (layers, experts)
        assert (kind, int(n)) == (data["kinds"][i], data["tokens_of_kind"][i])
        assert cells == [f"{layer.max():.0%} to {layer.argmax()}" for layer in share]


# --- speed and memory -----------------------------------------------------------------------------------------------

def benchmark(name: str) -> list[dict]:
    """The rows of a benchmark's tables, each table's in a dict by name."""
    found = []
    for data in read(f"{name}.json")["benchmarks"].values():
        found += [{row["name"]: row for row in part["rows"]} for part in data.get("results", [data])]
    return found


def measured() -> dict[str, dict]:
    """Label of a row in the page -> {candidate: its row in the JSON}."""
    cells = {}
    for file, suffix in (("step_cpu", ""), ("step_keep_memory_cpu", ", freed memory kept")):
        for name, rows in zip(("16 experts of 192, top-4", "128 experts of 96, top-8"), benchmark(file)):
            cells[f"training step, {name}{suffix}"] = rows
    for name, row in benchmark("decode_cpu")[0].items():
        candidate, batch = name.rsplit(", ", 1)
        cells.setdefault(f"decoding, greedy, {batch}", {})[candidate] = row
    return cells


def best_peer(rows: dict) -> str:
    """transformers' fastest expert implementation, uncompiled."""
    peers = [name for name in rows if name.startswith("transformers") and "compiled" not in name]
    return max(peers, key=lambda name: rows[name]["tokens_per_s"])


def test_steps_and_decoding_are_the_committed_benchmarks():
    cells = measured()
    shown = table(SPEED, "tokens/s")
    assert [row[0] for row in shown] == list(cells)
    for label, *claimed in shown:
        speed = {name: row["tokens_per_s"] for name, row in cells[label].items()}
        ours, fast, name = speed["ours"], speed["ours, compiled"], best_peer(cells[label])
        compiled, best = speed.get("transformers grouped_mm, compiled"), speed[name]
        assert claimed == [
            f"{ours:,.0f}", f"{fast:,.0f}", f"{best:,.0f} ({name.split()[1]})", f"{compiled:,.0f}" if compiled else "-",
            f"{ours / best:.2f}", f"{fast / best:.2f}", f"{fast / compiled:.2f}" if compiled else "-"], label
    for label, *claimed in table(SPEED, "share of the floor"):
        names = ("ours", "ours, compiled", best_peer(cells[label]))
        assert claimed == [f"{cells[label][name]['share_of_floor']:.0%}" for name in names], label


def test_one_expert_layer_is_the_committed_benchmark():
    rows = benchmark("layer_keep_memory_cpu")[0]
    expected = [[name, f"{row['rows_per_s']:,.0f}", f"{row['share_of_floor']:.0%}"] for name, row in rows.items()
                if name.startswith(("E=", "dense"))]
    assert table(SPEED, "routing", "rows/s") == expected
    one, other = (layer["E=128 balanced"]["rows_per_s"] / layer["E=8 balanced"]["rows_per_s"]
                  for layer in (rows, benchmark("layer_cpu")[0]))
    says(SPEED, f"at 128 experts it has {one:.0%} of its speed at 8 (aim: 60%), else {other:.0%}",
         f"{128 * 3 * 256 * 192 * 4 / 1e6:.0f} MB of gradients")


def test_products_loss_and_memory_are_the_committed_benchmarks():
    products = benchmark("product_cpu")[0]
    for shape, *claimed in table(SPEED, "product, float32"):
        one = products[f"{shape}, oneDNN"]
        other = products[f"{shape}, torch.mm"]
        assert claimed == [f"{other['gflops']:.0f}", f"{one['gflops']:.0f}", f"{one['speedup_over_mm']:.2f}"]
    ours, plain = (f"{benchmark('loss_cpu')[0][name]['share_of_floor']:.0%}" for name in ("ours", "plain PyTorch"))
    says(SPEED, f"reaches {ours} of its three products, plain PyTorch {plain}",
         f"{read('tiny/result.json')['peak_memory'] / 2**30:.2f} GiB that `configs/tiny.py` peaks at")
    (cell,) = benchmark("memory_large_cpu")[0].values()
    weights = 16 * count(train.read_config(str(ROOT / "configs/large_moe_1p3b.py")))["total"] / 2**30
    says(SPEED, f"1 x 512 peaks at {cell['measured']:.1f} GiB on a CPU", f"it says {cell['estimate']:.1f} and weights",
         f"gradients and optimizer are {weights:.1f}")


# --- experiments to try ---------------------------------------------------------------------------------------------

TRY = "python train.py configs/tiny.py --max_steps=200"


def shown_of(rows: list[dict]) -> dict[str, str]:
    """What the two runs of a row are shown as, by the columns' names."""
    config = meaning(rows[0]["command"])
    half = {key: fmean(row["last_half"][key] for row in rows) for key in rows[0]["last_half"]}
    return {f"seed {row['seed']}": f"{row['loss']:.3f}" for row in rows} | {
        "loss": f"{fmean(row['loss'] for row in rows):.3f}", "load": f"{half['load_max_over_mean']:.1f}x",
        "dead": f"{half['dead_experts']:.1f} of {config.n_layer * config.n_expert}",
        "router moved": f"{fmean(row['gate_moved'] for row in rows):.2f}", "FLOPs": f"{rows[0]['flops']:.2e}"}


@pytest.mark.parametrize("page", [README, RESULTS / "experiments/README.md"], ids=["README", "experiments"])
def test_each_row_of_the_experiments_is_that_of_the_kept_runs(page):
    rows = [dict(zip(head, row)) for head, *rows in tables(page.read_text()) if "flags" in head for row in rows]
    assert len(rows) >= 11
    for shown in rows:
        config = meaning(f"{TRY} {shown['flags'].strip('`')}")
        same = [row for row in kept("experiments") if meaning(row["command"]) == config]
        assert [row["seed"] for row in same] == [1, 2]
        expected = shown_of(same)
        columns = shown.keys() & expected.keys()
        assert len(columns) >= 3
        assert {key: shown[key] for key in columns} == {key: expected[key] for key in columns}


def test_the_lead_of_the_hash_is_that_of_the_kept_validations_and_in_the_long_run_of_the_two_logs():
    rows = kept("experiments")
    one, other = ([row["validation"] for row in rows if row["model"] == name] for name in ("hash", "default"))
    for step in (100, 200):
        lead = fmean(a[step // 50][1] - b[step // 50][1] for a, b in zip(one, other))
        says(PAGE["experiments"], f"{signed(lead)} nats at step {step}")
    (row,) = (row for row in rows if row["steps"] == 600)
    log = [json.loads(line) for line in (RESULTS / "tiny/log.jsonl").read_text().splitlines()]
    tiny = {line["tokens"]: line["val_ce"] for line in log if "val_ce" in line}
    for step in (150, 600):
        lead = dict(row["validation"])[step * 4096] - tiny[step * 4096]
        says(PAGE["experiments"], f"by {signed(lead)} nats at step {step}")
