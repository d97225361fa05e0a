"""README.md: what it says about files, fields, sizes and messages is what the code does."""

import csv
import dataclasses
import json
import re
import statistics
from pathlib import Path

import pytest
import torch

import router
import train
from model import Model, ModelConfig, count, validate
from router import FUSED, POLICIES, Context, RouterConfig, check, check_causal, route

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_config_table_is_the_dataclasses_field_by_field():
    found = re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.*) \|$", README, re.M)
    rows = {name: (default, text) for name, default, text in found}
    meaning = train.field_help()
    assert list(rows) == [f.name for f in dataclasses.fields(train.Config)]
    for f in dataclasses.fields(train.Config):
        assert rows[f.name] == (repr(f.default), meaning[f.name].replace("|", r"\|")), f.name


def test_the_file_map_names_every_script_and_its_length_within_a_twentieth():
    lengths = dict(re.findall(r"^\| `(\w+\.py)` \| ([\d,]+) \|", README, re.M))
    assert set(lengths) == {path.name for path in ROOT.glob("*.py")}
    for name, claimed in lengths.items():
        length = len((ROOT / name).read_text().splitlines())
        assert int(claimed.replace(",", "")) == pytest.approx(length, rel=0.05), name


def test_every_picture_and_result_it_shows_is_in_the_repository():
    for path in re.findall(r"\]\((results/[^)]+)\)", README):
        assert (ROOT / path).is_file(), path


def test_the_losses_it_quotes_are_those_of_the_committed_runs():
    for name in ("tiny", "tiny_dense"):
        result = json.loads((ROOT / "results" / name / "result.json").read_text())
        row = re.search(rf"^\| `configs/{name}\.py` \|.*$", README, re.M)[0]
        assert f"{result['loss']:.4f}" in row and f"{result['bits_per_byte']:.4f}" in row
        assert f"{result['n_total'] / 1e6:.2f}M" in row and f"{result['n_active'] / 1e6:.2f}M" in row


def rows_of(name: str) -> list[dict]:
    """The rows of a benchmark's tables, each table's in a dict by name."""
    benchmarks = json.loads((ROOT / "results" / f"{name}.json").read_text())["benchmarks"]
    return [{r["name"]: r for r in part["rows"]}
            for data in benchmarks.values() for part in data.get("results", [data])]


def test_the_speeds_it_quotes_are_those_of_the_committed_benchmarks():
    cells = {}
    for file in ("step_cpu", "step_keep_memory_cpu"):
        kept = ", freed memory kept" if "keep" in file else ""
        for name, table in zip(("16 experts of 192, top-4", "128 experts of 96, top-8"), rows_of(file)):
            cells[f"training step, {name}{kept}"] = table
    for batch in (1, 16):
        cells[f"decoding, greedy, batch {batch}"] = {
            name.removesuffix(f", batch {batch}"): r for name, r in rows_of("decode_cpu")[0].items()
            if name.endswith(f"batch {batch}")}
    for label, table in cells.items():
        speed = {name: r["tokens_per_s"] for name, r in table.items()}
        three = {name: s for name, s in speed.items() if name.startswith("transformers") and "compiled" not in name}
        best = max(three, key=three.get)
        compiled = speed.get("transformers grouped_mm, compiled")
        expected = [f"{speed['ours']:,.0f}", f"{speed['ours, compiled']:,.0f}",
                    f"{three[best]:,.0f} ({best.split()[1]})", f"{compiled:,.0f}" if compiled else "-",
                    f"{speed['ours'] / three[best]:.2f}", f"{speed['ours, compiled'] / three[best]:.2f}",
                    f"{speed['ours, compiled'] / compiled:.2f}" if compiled else "-"]
        assert f"| {label} | {' | '.join(expected)} |" in README, (label, expected)
    for name, r in rows_of("layer_keep_memory_cpu")[0].items():
        if name[:2] in ("E=", "de"):
            assert f"| {name} | {r['rows_per_s']:,.0f} | {r['share_of_floor']:.0%} |" in README, name
    kept, not_kept = (rows["E=128 balanced"]["rows_per_s"] / rows["E=8 balanced"]["rows_per_s"]
                      for file in ("layer_keep_memory_cpu", "layer_cpu") for rows in rows_of(file))
    assert f"at 128 experts it has {kept:.0%} of its speed at 8 (aim: 60%), else {not_kept:.0%}" in README
    for name, r in rows_of("product_cpu")[0].items():
        if name.endswith("oneDNN"):
            shape, mm = name.removesuffix(", oneDNN"), rows_of("product_cpu")[0][name.replace("oneDNN", "torch.mm")]
            assert f"| {shape} | {mm['gflops']:.0f} | {r['gflops']:.0f} | {r['speedup_over_mm']:.2f} |" in README, name


def test_the_sizes_of_the_five_architectures_are_what_count_counts():
    rows = re.findall(r"^\| (large-[\w.-]+) \| (\d+) \| (\d+) \| (\d+) x (\d+) \((\d+)\) \| (\d+), (\d+), (\d+) \| "
                      r"([\d,]+)M \| ([\d,]+)M \| ([\d,]+)M \|$", README, re.M)
    assert len(rows) == 5
    fields = "n_layer d_model n_head d_head n_kv_head n_expert top_k d_expert".split()
    for _, *shape, total, active, untied in rows:
        sizes = count(ModelConfig(**dict(zip(fields, map(int, shape))), vocab_size=151_936))
        claimed = tuple(int(n.replace(",", "")) for n in (total, active, untied))
        assert claimed == tuple(round(sizes[k] / 1e6) for k in ("total", "active", "total_untied"))


def test_the_message_it_shows_for_a_misspelt_name_is_the_real_one(capsys):
    with pytest.raises(train.BadInput) as error:
        train.parse_command_line(["configs/tiny.py", "--n_layers=3"])
    assert f"error: {error.value}" in README


@pytest.mark.parametrize("path", sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("configs/**/*.py")))
def test_every_config_is_accepted_as_it_stands(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    train.load_runs(path)


def test_the_router_of_ones_own_is_under_20_lines_keeps_its_promise_and_trains():
    block = re.search(r"```python\n(@policy\(\"my_idea\".*?)```", README, re.S)[1]
    assert len(block.splitlines()) < 20
    try:
        exec(block, vars(router))                             # as if pasted below the policies
        logits = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
        check(route(logits, RouterConfig("my_idea", 2)), 64, 16)
        assert check_causal(logits, RouterConfig("my_idea", 2), Context())
        config = ModelConfig(n_layer=2, d_model=32, n_head=2, n_kv_head=1, d_head=16, n_expert=8, top_k=2, d_expert=16,
                             seq_len=16, router="my_idea")
        validate(config)
        model, x = Model(config).init_weights(0), torch.arange(17)[None] % 7
        optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
        for _ in range(10):
            out = model(x[:, :-1], x[:, 1:])
            (out.ce + 0.01 * out.balance).backward()
            optimizer.step(), optimizer.zero_grad()
            losses.append(out.ce.item())
        assert losses[-1] < losses[0] / 2
    finally:
        POLICIES.pop("my_idea", None), vars(router).pop("my_idea", None)


def test_the_table_of_routers_names_every_policy_and_what_it_promises():
    rows = re.findall(r"^\| `(\w+)` \| .* \| (yes|no) \| (yes|no) \|$", README, re.M)
    expected = [(name, *("yes" if flag else "no" for flag in (choose.causal, name in FUSED)))
                for name, choose in POLICIES.items()]
    assert rows == expected


DIFFERENCES = [  # sweep, group, and the two models whose losses are compared
    ("search/architecture", "equal tokens", "1.3b", "1.3b-top2"),
    ("search/architecture", "equal FLOPs", "1.3b-flops", "1.3b-top2-flops"),
    ("search/architecture", "equal tokens", "wide-1.5b", "deep-1.5b"),
    ("search/architecture", "equal FLOPs", "wide-1.5b-flops", "deep-1.5b-flops"),
    ("search/batch_context", "equal steps", "bs1ctx128", "bs2ctx64"),
    ("search/batch_context", "equal tokens", "bs1ctx128-tokens", "bs2ctx64-tokens"),
    ("search/batch_context", "equal steps", "bs1ctx128", "bs4ctx64"),
    ("search/batch_context", "equal tokens", "bs1ctx128-tokens", "bs4ctx64-tokens"),
    ("slicing/expert_count", "d_model 32", "d32-ratio128", "d32-ratio1"),
    ("slicing/expert_count", "d_model 64", "d64-ratio128", "d64-ratio1"),
    ("slicing/shared", "", "shared-1", "routed-4"),
    ("slicing/shared", "", "shared-2", "routed-4"),
    ("slicing/shared", "", "shared-2-gated", "routed-4"),
    ("slicing/heterogeneous", "", "16x48+16x16", "32x32"),
    ("slicing/heterogeneous", "", "8x64+8x32+16x16", "32x32"),
    ("slicing/heterogeneous", "", "4x144+28x16", "32x32"),
    ("slicing/dropping", "", "capacity-0.75", "dropless"),
    ("slicing/dropping", "", "capacity-1.0", "dropless"),
    ("slicing/dropping", "", "capacity-1.25", "dropless"),
    ("slicing/dropping", "", "capacity-2.0", "dropless"),
    *[("slicing/balancing", "", name, "loss-0.01") for name in (
        "none", "loss-0.1", "sequence-0.01", "global-0.01", "bias-0.001", "sigmoid-none")],
]


@pytest.mark.parametrize("sweep, group, a, b", DIFFERENCES, ids=lambda word: word.replace("/", " "))
def test_each_difference_it_claims_is_that_of_the_committed_runs_seed_by_seed(sweep, group, a, b):
    with open(ROOT / "results" / sweep / "summary.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["group"] == group and row["status"] == "done"]
    loss = {(row["model"], row["seed"]): float(row["loss"]) for row in rows}
    differences = [value - loss[b, seed] for (model, seed), value in loss.items() if model == a]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    claim = f"{statistics.fmean(differences):+.3f} ± {error:.3f}".replace("-", "−")
    assert claim in README, f"{a} - {b} in {sweep} is {claim} over {len(differences)} seeds"
