"""results/**/README.md: every number on these pages is recomputed from the files beside them."""

import csv
import json
import re
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bench
import scaling
import train
from model import ModelConfig, count, memory

RESULTS = Path(__file__).parent.parent / "results"
PAGES = sorted(RESULTS.glob("**/*.md"))
SPEED, SEARCH, SLICING = ((RESULTS / name / "README.md").read_text() for name in ("", "search", "slicing"))


def table(page: str, *head: str) -> list[list[str]]:
    """The rows of the page's one table whose head begins with these words."""
    parts = re.findall(rf"^\| {re.escape(' | '.join(head))}[^\n]*\n\|[-|:]+\n((?:\|[^\n]*\n)+)", page, re.M)
    assert len(parts) == 1, f"{len(parts)} tables begin with {head}"
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in parts[0].splitlines()]


def read(path: str) -> dict:
    return json.loads((RESULTS / path).read_text())


def runs(*folders: str) -> list[dict]:
    """The finished runs of these sweeps, a dict a run."""
    rows = []
    for folder in folders:
        with open(RESULTS / folder / "summary.csv", newline="") as file:
            rows += [
                row | {"loss": float(row["loss"])} for row in csv.DictReader(file) if row["status"] == "done"
            ]
    return rows


def mean_loss(rows: list[dict], model: str) -> float:
    return statistics.fmean(row["loss"] for row in rows if row["model"] == model)


# --- pages as pages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(RESULTS)))
def test_every_link_and_picture_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, part = target.partition("#")
        there = page.parent / path if path else page
        assert there.is_file(), target
        heads = (
            [
                re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")
                for head in re.findall(r"^#+ (.*)$", there.read_text(), re.M)
            ]
            if part
            else [""]
        )
        assert part in heads, target


def test_the_index_names_every_file_and_the_command_each_benchmark_came_from():
    index = "\n".join(" | ".join(row) for row in table(SPEED, "file", "made by"))
    for path in RESULTS.iterdir():
        if path.name != "README.md":
            assert f"`{path.stem if path.suffix in ('.json', '.png') else path.name}" in index, path.name
        if path.suffix == ".json":
            command = read(path.name)["conditions"]["command"].replace(f" --json results/{path.name}", "")
            assert f"| `{command}`" in index, command


def test_each_command_shown_is_accepted_and_is_that_of_runs_that_were_kept(monkeypatch):
    monkeypatch.chdir(RESULTS.parent)

    def meaning(command: str) -> train.Config:
        args, given = train.parse_command_line(command.split()[2:])
        return replace(train.load_runs(args.config, given)[0], out_dir="", seed=1)

    for folder, page in (("search", SEARCH),):
        kept = [
            row for path in (RESULTS / folder).glob("*.json") for row in json.loads(path.read_text())["runs"]
        ]
        shown = re.findall(r"^(python train\.py .*)$", page, re.M)
        assert len(shown) >= 3
        for command in shown:
            names = re.findall(r"--only=(\S+)", command)
            if names:  # of a sweep: every run it names
                assert all(
                    any(row["name"].startswith(name + "-s") for row in kept) for name in names[0].split(",")
                )
            else:
                assert any(meaning(row["command"]) == meaning(command) for row in kept), command


# --- differences between models -------------------------------------------------------------------------------------

NUMBER = r"[+−]\d\.\d{3}"
CLAIM = re.compile(rf"`([^`\s]+)` − `([^`\s]+)`[^:`|]*:((?: (?:equal \w+ )?{NUMBER} ± \d\.\d{{3}};?)+)")


def claims() -> list[tuple]:
    """(folder, A, B, group, difference, standard error) of each `A` − `B`: group difference ± error; ..."""
    return [
        (folder, a, b, *part)
        for folder, page in (("search", SEARCH), ("slicing", SLICING))
        for a, b, parts in CLAIM.findall(page)
        for part in re.findall(rf"(equal \w+)? ?({NUMBER}) ± (\d\.\d{{3}})", parts)
    ]


@pytest.mark.parametrize("claim", claims(), ids=lambda claim: f"{claim[1]} - {claim[2]} {claim[3]}".strip())
def test_each_difference_is_that_of_the_committed_runs_seed_by_seed(claim):
    folder, a, b, group, difference, error = claim
    found = []
    for sweep in sorted(path.parent.name for path in RESULTS.glob(f"{folder}/*/summary.csv")):
        rows = [row for row in runs(f"{folder}/{sweep}") if group in ("", row["group"])]
        one, other = (
            {
                row["seed"]: row["loss"]
                for row in rows
                if re.fullmatch(rf"{re.escape(name)}(-flops|-tokens)?", row["model"])
            }
            for name in (a, b)
        )
        if one and other:
            x = [one[seed] - other[seed] for seed in one]
            found.append((statistics.fmean(x), statistics.stdev(x) / len(x) ** 0.5))
    assert len(found) == 1
    assert (difference, error) == (f"{found[0][0]:+.3f}".replace("-", "−"), f"{found[0][1]:.3f}")


def test_no_difference_with_an_error_escapes_the_check():
    for page, folder in ((SEARCH, "search"), (SLICING, "slicing")):
        assert len(re.findall(rf"{NUMBER} ± ", page)) == sum(claim[0] == folder for claim in claims()) >= 10


# --- the architecture search ----------------------------------------------------------------------------------------


def test_the_sizes_of_the_five_architectures_are_what_count_counts():
    rows = table(SEARCH, "model", "layers")
    assert len(rows) == 5
    fields = "n_layer d_model n_head d_head n_kv_head n_expert top_k d_expert".split()
    for _, *cells in rows:
        shape, claimed = (
            re.findall(r"\d+", " ".join(cells[:4])),
            [int(re.sub(r"\D", "", cell)) for cell in cells[4:]],
        )
        sizes = count(ModelConfig(**dict(zip(fields, map(int, shape))), vocab_size=151_936))
        assert claimed == [round(sizes[k] / 1e6) for k in ("total", "active", "total_untied")]
    totals = {round(int(re.sub(r"\D", "", row[-1])) / 3) for row in rows}
    assert {
        int(n) for n in re.findall(r"(\d+)M", re.search(r"section 4\.3 \(([^)]*)\)", SEARCH)[1])
    } <= totals


def test_the_losses_beside_the_articles_are_the_means_of_the_runs():
    rows = runs("search/architecture")
    for model, _, tokens, flops in table(SEARCH, "model", "article's loss"):
        assert (
            tokens == f"{mean_loss(rows, model):.3f}" and flops == f"{mean_loss(rows, model + '-flops'):.3f}"
        )
    rates = runs("search/learning_rate")
    for rate, loss in re.findall(r"`(lr[\w-]+)`[^`]*?(\d\.\d{3})", SEARCH):
        assert loss == f"{mean_loss(rates, rate):.3f}", rate
    best = min({row["model"] for row in rates}, key=lambda model: mean_loss(rates, model))
    assert best == "lr5e-3"


def test_ratios_and_rank_correlations_of_the_claims():
    rows = {row["model"]: row for row in runs("search/architecture")}
    def ratio(field, a, b):
        return float(rows[a][field]) / float(rows[b][field])
    for phrase in (
        f"{ratio('flops', '1.3b', '1.3b-top2'):.1f} times the FLOPs",
        f"{ratio('active', '1.3b', '1b'):.1f} times the active parameters",
        f"{ratio('active', 'deep-1.5b', 'wide-1.5b'):.1f} times the active parameters (here)",
    ):
        assert phrase in SEARCH, phrase
    ranks, names = (
        lambda x: np.argsort(np.argsort(x)),
        [row[0] for row in table(SEARCH, "model", "article's loss")],
    )
    for group, suffix in (("equal tokens", ""), ("equal FLOPs", "-flops")):
        quality = [-mean_loss(runs("search/architecture"), name + suffix) for name in names]
        rho = np.corrcoef(ranks([float(rows[name]["active_ratio"]) for name in names]), ranks(quality))[0, 1]
        assert f"{group} {rho:+.1f}".replace("-", "−") in re.search(r"rank correlation[^|]*", SEARCH)[0]
    law = scaling.Law()  # of one active size between ours and the whole, E = 1 ... 2
    assert f"irreducible part alone is {law.c:.2f}" in SEARCH
    for n in (0.781e9, 1.083e9):
        assert f"about {law.loss(n, 2000 * 16_384, 2):.0f} nats" in SEARCH


def by_chance(n: int, k: int, n_expert: int = 16, n_layer: int = 4, times: int = 100) -> float:
    """The busiest expert's load over an even share, when every token chooses K of E experts at random."""
    random, most = np.random.default_rng(0), []
    for _ in range(times):
        choice = random.random((n_layer, n, n_expert)).argpartition(k - 1, -1)[..., :k].reshape(n_layer, -1)
        most.append(max(np.bincount(layer).max() for layer in choice) * n_expert / (n * k))
    return statistics.fmean(most)


def test_load_by_top_k_and_by_context_is_that_of_the_kept_runs():
    kept = read("search/load.json")["runs"]
    for name, tokens, busiest, chance, most, without, entropy in table(SEARCH, "run", "tokens a step"):
        name = name.strip("`")
        half = [row["last_half"] for row in kept if row["name"].rpartition("-s")[0] == name]
        row = next(row for row in kept if row["name"].startswith(name + "-s"))
        assert int(tokens.replace(",", "")) == row["tokens"] // row["steps"]
        for cell, field, digits in (
            (busiest, "load_max_over_mean", 2),
            (without, "dead_experts", 2),
            (entropy, "entropy", 2),
        ):
            values = [h[field] for h in half]
            error = statistics.stdev(values) / len(values) ** 0.5
            assert cell == f"{statistics.fmean(values):.{digits}f} ± {error:.{digits}f}", (name, field)
        k = 2 if "top2" in name else 8
        assert float(most) == 16 / k and float(chance) == pytest.approx(
            by_chance(int(tokens.replace(",", "")), k), abs=0.01
        )


def test_the_claims_about_load_are_the_tables_to_one_decimal():
    busiest, without = {}, {}
    for name, _, most, _, _, dead, _ in table(SEARCH, "run", "tokens a step"):
        busiest[name.strip("`")], without[name.strip("`")] = float(most.split()[0]), float(dead.split()[0])
    top8, top2, *dead = re.search(
        r"`1.3b` ([\d.]+), `1.3b-top2` ([\d.]+); .*? ([\d.]+) and ([\d.]+) \|", SEARCH
    ).groups()
    assert (top8, top2) == (f"{busiest['1.3b']:.1f}", f"{busiest['1.3b-top2']:.1f}")
    assert dead == [f"{without[name]:.1f}" for name in ("1.3b", "1.3b-top2")]
    rows = re.search(
        r"at contexts of [\d, ]+: one sequence a step (.*?); 512 tokens a step (.*?); 1,024 tokens a step (.*?) \|",
        SEARCH,
    )
    for cells, cell in zip(rows.groups(), ("bs1ctx{}", "bs{1}ctx{0}", "bs1ctx{}-tokens")):
        assert cells == ", ".join(f"{busiest[cell.format(T, 512 // T)]:.1f}" for T in (64, 128, 256, 512)), (
            cell
        )


def test_inference_in_small_is_the_committed_benchmark():
    speed = {
        row["name"]: row["tokens_per_s"]
        for row in read("decode_search_small_cpu.json")["benchmarks"]["decode"]["rows"]
    }
    rows = table(SEARCH, "model", "article, tokens/s")
    assert {row[0] for row in rows} == set(speed)
    for name, _, here in rows:
        assert here == f"{speed[name]:.0f}"
    source = {name: float(cell.split()[0]) for name, cell, _ in rows}
    assert f"tokens/s of `1.3b-top2` over `1.3b`: {speed['1.3b-top2'] / speed['1.3b']:.2f} here" in SEARCH
    assert (
        f"{source['1.3b-top2']:.1f} over {source['1.3b']:.1f}, which is {source['1.3b-top2'] / source['1.3b']:.2f}"
        in SEARCH
    )


def test_memory_and_cards_are_the_committed_estimates():
    cells = {row["name"]: row for row in read("memory_search.json")["benchmarks"]["memory"]["rows"]}
    estimates = [row["estimate"] for row in cells.values()]
    assert (
        f"our estimate is {cells['1 x 2048']['estimate']:.1f} GiB for that cell, {max(estimates):.1f} for the"
        in SEARCH
    )
    reported = table(SEARCH, "cell", "article's loss")
    assert {row[0] for row in reported} <= cells.keys()
    config = train.read_config(str(RESULTS.parent / "configs/large_moe_1p3b.py"), {"device": "cpu"})
    for name, source, estimate in table(SEARCH, "card"):
        batch, context, _ = map(int, source.split(" x "))
        need = memory(replace(config, seq_len=context), batch, "bfloat16")["total"]
        room = float(name.split(", ")[1].removesuffix(" GB")) * 1e9
        fits = "fits" if need + bench.RESERVE <= room else "too large"
        assert estimate == f"{need / 1e9:.1f} GB, {fits}", name


# --- the axes -------------------------------------------------------------------------------------------------------


def test_the_table_of_sweeps_counts_runs_seeds_and_tokens():
    rows, everything, minutes = table(SLICING, "sweep", "varies"), [], 0.0
    for path, _, tokens, seeds, n, link in rows:
        name = Path(path.strip("`")).stem
        done = runs(f"slicing/{name}")
        assert link == f"[{name}]({name}/summary.md)" and int(n) == len(done)
        assert {row["tokens"] for row in done} == {tokens.replace(",", "")} and int(seeds) == len(
            {row["seed"] for row in done}
        )
        everything += done
        minutes += sum(float(row["seconds"]) for row in done) / 60
    assert (
        f"{len(everything)} runs of models" in " ".join(SLICING.split())
        and f"{minutes:.0f}\nminutes" in SLICING
    )
    active = [int(row["active"]) for row in everything]
    assert f"{round(min(active), -3):,} to {round(max(active), -3):,} active" in SLICING
    spread = [
        statistics.stdev(row["loss"] for row in everything if row["model"] == model)
        for model in {row["model"] for row in everything}
    ]
    assert f"{statistics.median(spread):.3f} in the median and {max(spread):.3f} in the worst case" in SLICING


def test_the_best_widths_are_the_bottoms_of_their_parabolas():
    rows = runs("slicing/granularity")
    for width, best in re.findall(r"([\d.]+) at D = (\d+)", SLICING):
        means = {
            int(row["d_expert"]): mean_loss(rows, row["model"])
            for row in rows
            if row["group"] == f"d_model {best}"
        }
        x, loss = np.log(sorted(means)), [means[width] for width in sorted(means)]
        a, b, _ = np.polyfit(x, loss, 2)
        assert width == f"{np.exp(-b / (2 * a)):.2g}"


# --- speed and memory -----------------------------------------------------------------------------------------------


def benchmark(name: str) -> list[dict]:
    """The rows of a benchmark's tables, each table's in a dict by name."""
    return [
        {row["name"]: row for row in part["rows"]}
        for data in read(f"{name}.json")["benchmarks"].values()
        for part in data.get("results", [data])
    ]


def measured() -> dict[str, dict]:
    """Label of a row in the page -> {candidate: its row in the JSON}."""
    cells = {}
    for file in ("step_cpu", "step_keep_memory_cpu"):
        kept = ", freed memory kept" if "keep" in file else ""
        for name, rows in zip(("16 experts of 192, top-4", "128 experts of 96, top-8"), benchmark(file)):
            cells[f"training step, {name}{kept}"] = rows
    for batch in (1, 16):
        cells[f"decoding, greedy, batch {batch}"] = {
            name.removesuffix(f", batch {batch}"): row
            for name, row in benchmark("decode_cpu")[0].items()
            if name.endswith(f"batch {batch}")
        }
    return cells


def best_peer(rows: dict) -> str:
    """transformers' fastest expert implementation, uncompiled."""
    peers = [name for name in rows if name.startswith("transformers") and "compiled" not in name]
    return max(peers, key=lambda name: rows[name]["tokens_per_s"])


def test_steps_and_decoding_are_the_committed_benchmarks():
    shown, shares = table(SPEED, "tokens/s"), table(SPEED, "share of the floor")
    assert [row[0] for row in shown] == list(measured())
    for label, *cells in shown:
        rows = measured()[label]
        speed = {name: row["tokens_per_s"] for name, row in rows.items()}
        best, compiled = best_peer(rows), speed.get("transformers grouped_mm, compiled")
        assert cells == [
            f"{speed['ours']:,.0f}",
            f"{speed['ours, compiled']:,.0f}",
            f"{speed[best]:,.0f} ({best.split()[1]})",
            f"{compiled:,.0f}" if compiled else "-",
            f"{speed['ours'] / speed[best]:.2f}",
            f"{speed['ours, compiled'] / speed[best]:.2f}",
            f"{speed['ours, compiled'] / compiled:.2f}" if compiled else "-",
        ], label
    for label, *cells in shares:
        rows = measured()[label]
        assert cells == [
            f"{rows[name]['share_of_floor']:.0%}" for name in ("ours", "ours, compiled", best_peer(rows))
        ], label


def test_layer_products_loss_and_memory_are_the_committed_benchmarks():
    kept = benchmark("layer_keep_memory_cpu")[0]
    shown = table(SPEED, "routing", "rows/s")
    assert [row[0] for row in shown] == [name for name in kept if name[:2] in ("E=", "de")]
    for name, rows, share in shown:
        assert (rows, share) == (f"{kept[name]['rows_per_s']:,.0f}", f"{kept[name]['share_of_floor']:.0%}"), (
            name
        )
    one, other = (
        rows["E=128 balanced"]["rows_per_s"] / rows["E=8 balanced"]["rows_per_s"]
        for rows in (kept, benchmark("layer_cpu")[0])
    )
    assert f"at 128 experts it has {one:.0%} of its speed at 8 (aim: 60%), else {other:.0%}" in SPEED
    assert f"{128 * 3 * 256 * 192 * 4 / 1e6:.0f} MB of gradients" in SPEED
    products = benchmark("product_cpu")[0]
    for shape, mm, onednn, ratio in table(SPEED, "product, float32"):
        one, other = products[f"{shape}, oneDNN"], products[f"{shape}, torch.mm"]
        assert [mm, onednn, ratio] == [
            f"{other['gflops']:.0f}",
            f"{one['gflops']:.0f}",
            f"{one['speedup_over_mm']:.2f}",
        ]
    loss = benchmark("loss_cpu")[0]
    assert (
        f"reaches {loss['ours']['share_of_floor']:.0%} of its\n  three products, plain PyTorch "
        f"{loss['plain PyTorch']['share_of_floor']:.0%}"
    ) in SPEED
    (cell,) = benchmark("memory_large_cpu")[0].values()
    weights = (
        16 * count(train.read_config(str(RESULTS.parent / "configs/large_moe_1p3b.py")))["total"] / 2**30
    )
    assert all(
        f"{x:.1f}" in re.search(r"A training step of `configs/large_moe_1p3b.py`.*?\)\)", SPEED, re.S)[0]
        for x in (cell["measured"], cell["estimate"], weights)
    )
    assert (
        f"{read('tiny/result.json')['peak_memory'] / 2**30:.2f} GiB that `configs/tiny.py` peaks at" in SPEED
    )


# --- routing --------------------------------------------------------------------------------------------------------


def test_the_favourite_expert_of_each_kind_of_byte_is_that_of_the_committed_numbers():
    data = read("routing/routing.json")
    assert (
        len(data["tokens"]) == sum(data["tokens_of_kind"]) == len((RESULTS / "routing/text.txt").read_bytes())
    )
    shown = table((RESULTS / "routing/README.md").read_text(), "kind of byte")
    for i, (kind, n, *cells) in enumerate(shown):
        share = np.array(data["share"])[:, :, i]  # (layers, experts)
        assert (kind, int(n)) == (data["kinds"][i], data["tokens_of_kind"][i])
        assert cells == [f"{layer.max():.0%} to {layer.argmax()}" for layer in share]
