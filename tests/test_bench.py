"""bench.py, results/draw.py and results/search/source.md: what is measured, drawn and quoted is what it is named."""

import json
import subprocess
import sys
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
import model
import train
from model import BadInput, run_script

ROOT = Path(bench.__file__).parent
SMALL = dict(n_layer=1, d_model=16, n_head=2, n_kv_head=1, d_head=8, n_expert=4, top_k=2, d_expert=16, vocab_size=64,
             seq_len=16)


@pytest.fixture
def briefly(monkeypatch):
    """The fewest rounds there can be, whatever seconds a benchmark asks for: here it matters what is timed, not how."""
    real = bench.timed
    monkeypatch.setattr(bench, "timed", lambda calls, seconds=0.0, **amounts: real(calls, 0.0, **amounts))
    monkeypatch.setattr(bench, "memory_rates", lambda: (1e9, 1e9))


def write_config(path: Path, **names) -> str:
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in names.items()))
    return str(path)


def run(tmp_path: Path, *argv: str) -> dict:
    """The part of the JSON that belongs to the verb argv[0]."""
    bench.main([*argv, "--json", str(tmp_path / "result.json")])
    return json.loads((tmp_path / "result.json").read_text())["benchmarks"][argv[0]]


def test_candidates_take_turns_and_their_ratios_are_of_that_run(monkeypatch):
    order = []
    names = ["floor: least", "ours", "ours, compiled", "theirs"]
    seconds = dict(zip(names, (1.0, 4.0, 2.0, 8.0)))
    monkeypatch.setattr(bench, "clock", lambda run: run())
    rows = bench.timed({name: lambda name=name: order.append(name) or seconds[name] for name in names}, 0.0, tokens=16)
    assert order == names * 7 and all(r["rounds"] == 5 for r in rows)
    assert [(r["name"], r["seconds"], r["spread"], r["tokens_per_s"], r["share_of_floor"], r["ours_is_faster_by"])
            for r in rows] == [(name, s, 0, 16 / s, 1 / s, s / 2) for name, s in seconds.items()]


def test_outputs_or_gradients_that_differ_are_not_timed():
    bench.compare("same", torch.ones(3), torch.ones(3) + 1e-7, 1e-5)
    with pytest.raises(AssertionError, match="other: outputs differ"):
        bench.compare("other", torch.ones(3), torch.ones(3) + 0.1, 1e-5)
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(AssertionError, match="other, gradient: outputs differ"):
        bench.agree({"one": lambda: x + 1, "other": lambda: x.detach() / 2 + x / 2 + 1}, x, 1e-5)


def test_the_naive_router_computes_what_route_computes():
    logits = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    config = bench.ModelConfig(n_expert=16, top_k=4)
    ours = bench.route(logits, config)
    naive = bench.naive_route(logits, config)
    for name in ("weights", "experts", "token", "offsets"):
        torch.testing.assert_close(getattr(naive, name), getattr(ours, name), check_dtype=False)
    torch.testing.assert_close(naive.losses, ours.losses)


def test_the_bytes_of_the_kernels_add_up_kernel_by_kernel():
    """100 tokens, 16 experts, top-4, four tiles: route_fwd, cumsum, place_rows and totals; then route_bwd."""
    forward = (1600 + 900 + 4 * 36) + 4 * 32 + (1200 + 64) + 4 * 20
    assert bench.bytes_moved(100, 16, 4) == {"forward": 4 * forward, "forward + backward": 4 * (forward + 3200 + 1300)}


def test_every_candidate_and_its_floor_are_timed_in_one_run(tmp_path, monkeypatch, briefly):
    monkeypatch.setattr(bench, "LAYER", (64, 16, 8, 2))
    monkeypatch.setattr(bench, "LOSS", (64, 16, 32))
    for verb, names in (("route", {"E=16 K=4 naive, forward", "E=128 K=8 definition, forward + backward"}),
                        ("layer", {"E=32 skewed", "dense, same active size", "whole layer, E=32, ours",
                                   "floor: matrix products"}),
                        ("loss", {"ours", "plain PyTorch", "floor: matrix products"})):
        rows = run(tmp_path, verb)["rows"]
        assert names <= {r["name"] for r in rows}
        assert all(r["seconds"] > 0 and r["share_of_floor"] > 0 for r in rows)


def test_liger_kernel_missing_is_named_with_its_reason(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    for gpu, reason in ((False, ": its Triton kernels need a GPU\n"), (True, "(pip install liger-kernel)\n")):
        monkeypatch.setattr(bench, "GPU", gpu)
        assert bench.liger(bench.liger_layer, None, None) == {}
        said = capsys.readouterr().out
        assert said.startswith("liger-kernel is left out: ") and said.endswith(reason)
    assert bench.liger(lambda x: x + 1, 6) == {"liger-kernel": 7}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_on_a_gpu_the_peers_that_are_installed_compute_what_our_layer_computes():
    x = torch.randn(1, 512, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ours = bench.filled(bench.MoE(bench.ModelConfig(d_model=256, d_expert=128, n_expert=32, top_k=4)))
    for step in bench.whole_layers(x, ours, peers=True).values():                # compares before it returns
        step()


def test_the_floor_of_a_step_counts_every_matrix_product_of_the_model(monkeypatch):
    config = bench.ModelConfig(**SMALL | {"n_layer": 2})
    flops, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **out: flops.append(2 * a.numel() * b.shape[1]) or mm(a, b, **out))
    monkeypatch.setattr(bench, "FAST", bench.FAST._replace(linear=lambda a, w: torch.mm(a, w.t())))
    bench.model_products(config, 2)()
    norms = 2 * (2 * 16 + 2 * 8) + 16
    assert sum(flops) == 6 * (2 * 16) * (bench.count(config)["active"] - norms)


def test_a_compiled_step_runs_by_the_table_for_compiling(monkeypatch, briefly):
    seen = []

    def compile(module, **how):
        return lambda *tokens: seen.append(model.OPS) or module(*tokens)

    monkeypatch.setattr(torch, "compile", compile)
    rows = bench.step_of("small", bench.ModelConfig(**SMALL), peers=False)["rows"]
    assert [r["name"] for r in rows] == ["ours", "ours, compiled", "floor: products + attention"]
    assert set(seen) == {model.COMPILED} and model.OPS is model.FAST


def test_decode_ranks_the_architectures_of_a_sweep_once_each_whatever_their_seeds(tmp_path, monkeypatch, briefly):
    monkeypatch.setattr(bench, "WRITTEN", 16)
    runs = [dict(name="shallow"), dict(name="deep", n_layer=6)]
    path = write_config(tmp_path / "sweep.py", **SMALL, runs=runs, seeds=[1, 2])
    rows = run(tmp_path, "decode", path)["rows"]
    assert len(rows) == 2 and {r["name"] for r in rows} == {"shallow", "deep"}
    assert rows == sorted(rows, key=lambda r: -r["tokens_per_s"])
    for r in rows:
        sizes = bench.count(bench.ModelConfig(**SMALL | ({"n_layer": 6} if r["name"] == "deep" else {})))
        assert (r["total_millions"], r["active_millions"]) == (sizes["total"] / 1e6, sizes["active"] / 1e6)
        assert r["load_seconds"] > 0 and 0 < r["first_token_seconds"] < r["seconds"]


def test_memory_measures_a_cell_in_a_process_of_its_own(tmp_path):
    path = write_config(tmp_path / "small.py", **SMALL)
    row, = run(tmp_path, "memory", path, "--cell", "2,8")["rows"]
    assert (row["name"], row["status"]) == ("2 x 8", "done") and row["measured"] > 0


@pytest.mark.parametrize(("error", "says"), [
    (ValueError("no such thing"), "failed: ValueError: no such thing"),
    (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"), (BrokenExecutor("killed"), "out of memory"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), "out of memory")])
def test_a_cell_that_fails_says_why_and_one_larger_than_this_machine_is_not_started(error, says, monkeypatch):
    def fail(config):
        raise error

    monkeypatch.setattr(bench, "free_memory", lambda device: 2 * 2**30)
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda *how: ThreadPoolExecutor(1))
    monkeypatch.setattr(bench, "peak_of_steps", fail)
    assert bench.measured_peak(train.Config(**SMALL), 2 * 2**30) == (None, says)
    assert bench.measured_peak(train.Config(**SMALL), 3 * 2**30) == (None, "not run here: 3.0 GiB")


def test_memory_of_a_sweep_takes_each_cell_once_names_its_model_and_may_only_estimate(tmp_path):
    runs = [dict(name="shallow"), dict(name="deep", n_layer=2), dict(name="long", seq_len=32)]
    path = write_config(tmp_path / "sweep.py", **SMALL, micro_batch=3, runs=runs, seeds=[1, 2])
    rows = run(tmp_path, "memory", path, "--estimate")["rows"]
    configs = [bench.ModelConfig(**SMALL), bench.ModelConfig(**SMALL | {"n_layer": 2}),
               bench.ModelConfig(**SMALL | {"seq_len": 32})]
    assert [(r["name"], r["estimate"], r["measured"], r["status"]) for r in rows] == [
        (name, bench.memory(config, 3, "bfloat16")["total"] / 2**30, None, "not run")
        for name, config in zip(("3 x 16, shallow", "3 x 16, deep", "3 x 32, long"), configs)]


def card_row(gb: float, batch_tokens: int, bandwidth: float = 1e9, rate: float = 1e12) -> dict:
    """The line of a made-up card, by a made-up memory: a cell takes 16 GB and one more for every 1,024 tokens."""
    need = {(t, b): {"weights": 4e9, "gradients": 4e9, "optimizer": 8e9, "total": (16 + b * t / 1024) * 1e9}
            for t in bench.CONTEXTS for b in bench.BATCHES}
    card = model.Card(gb * 1e9, bandwidth, rate, 1e12)
    return bench.card_row("made up", card, train.Config(**SMALL | {"seq_len": 2048}), batch_tokens, need)


def test_a_card_takes_the_longest_context_and_then_the_largest_batch_that_fit(monkeypatch):
    """By hand: a card of 24 GB, 1 of it kept, has room for 7,168 tokens beside the 16 GB.

    The context is 2,048, as the config's; 2 of these fit, 4 do not. 12,288 tokens a step are three such micro-batches.
    Traffic: weights 3 x 2 x 4 GB, gradients (2 x 3 - 1) x 4, then the optimizer: 4, 2 x 4 and 2 x 8. In all 72 GB.
    """
    monkeypatch.setattr(bench, "count", lambda config: {"flops_per_token": 1e9})
    row = card_row(24, 12_288, bandwidth=100e9, rate=10e12)
    assert (row["longest_context"], row["largest"], row["tokens"]) == (4096, "2 x 2048", 4096)
    assert (row["run"], row["estimate_gb"]) == ("2 x 2048 x 3", 20.0)
    assert row["traffic_s"] == pytest.approx(0.72) and row["compute_s"] == pytest.approx(12_288 * 1e9 / 10e12)
    assert row["floor_s"] == row["compute_s"]


def test_a_card_fits_to_the_byte_and_a_small_batch_is_one_micro_batch():
    kept = bench.RESERVE / 1e9
    assert card_row(16 + 8 + kept, 8192)["largest"] == "4 x 2048"
    assert card_row(16 + 8 + kept - 1e-9, 8192)["largest"] == "2 x 2048"
    assert card_row(16 + 1 + kept, 8192)["run"] == "1 x 1024 x 8"
    nothing = card_row(16 + kept, 8192)
    assert nothing["largest"] == "nothing fits" and nothing["longest_context"] is None and "run" not in nothing
    row = card_row(100, 4096)
    assert (row["largest"], row["run"], row["estimate_gb"]) == ("32 x 2048", "2 x 2048 x 1", 20)


def test_hardware_lists_every_card_and_those_of_the_command_line(tmp_path):
    cards = ["--card", "mine,30,500,50", "--card", "H100,79,1,1"]
    rows = run(tmp_path, "hardware", "configs/large_moe_1p3b.py", "--batch_tokens", "16384", *cards)["rows"]
    gb = {name: card.memory / 1e9 for name, card in model.CARDS.items()} | {"mine": 30, "H100": 79}
    assert {r["name"]: r["gb"] for r in rows} == gb and [r["gb"] for r in rows] == sorted(gb.values())
    for r in rows:
        if r["tokens"]:
            assert r["micro_batch"] * r["context"] * r["accumulation"] == 16_384
            assert r["estimate_gb"] + 1 <= r["gb"] and r["floor_s"] == max(r["compute_s"], r["traffic_s"])


@pytest.mark.parametrize(("device", "rate"), [
    ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12), ("NVIDIA GeForce RTX 4080", 97e12),
    ("NVIDIA GeForce RTX 4080 SUPER", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("Some other card", None)])
def test_the_table_of_cards_gives_a_run_its_peak_rate(device, rate, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    assert train.peak_flops(SimpleNamespace(device="cuda", dtype="bfloat16")) == rate


CARD = ("mine", "mine,24", "mine,24,1000,fast", "mine,24,0,100", ",24,1000,100", "mine,1,2,nan", "mine,24,1000,100,1")


@pytest.mark.parametrize(("argv", "says"), [
    *((["hardware", "--card", card], f"--card '{card}' must be name,GB,GB/s,TFLOP/s") for card in CARD),
    (["hardware", "--batch_tokens", "1000"], "--batch_tokens 1000 must be a multiple of"),
    (["memory", "--cell", "1,x"], "--cell '1,x' must be batch,context"),
    (["memory", "--cell", "1,0"], "--cell '1,0' must be batch,context"),
    (["stepp"], "invalid choice: 'stepp'"), (["step", "--peer"], "--peer"),
    (["loss", "configs/tiny.py"], "loss has sizes of its own and takes no file configs/tiny.py"),
    (["loss", "--json", "results"], "--json results must end in .json")])
def test_bad_input_is_one_line_and_exit_code_2_before_anything_is_measured(argv, says, monkeypatch, capsys):
    monkeypatch.setattr(bench, "clock", None)
    monkeypatch.setattr(sys, "argv", ["bench.py", *argv])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    with pytest.raises(SystemExit) as exit:
        run_script(bench.main)
    assert exit.value.code == 2
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and says in error


def draw(*paths) -> subprocess.CompletedProcess:
    """results/draw.py with nothing of the project in reach."""
    return subprocess.run([sys.executable, "-I", ROOT / "results/draw.py", *paths], cwd=ROOT / "tests",
                          capture_output=True, text=True)


def test_a_figure_is_drawn_from_the_json_alone_and_bench_says_how(tmp_path, capsys):
    path = tmp_path / "result.json"
    run(tmp_path, "memory", write_config(tmp_path / "small.py", **SMALL), "--estimate")
    assert f"{path} is written; `python results/draw.py {path}` draws it" in capsys.readouterr().out
    assert not path.with_suffix(".png").exists()
    rows = [{"name": name, "seconds": 1.0, "tokens_per_s": 10.0} for name in ("ours", "floor")]
    grid = [{"name": "1 x 8", "estimate": 1.0, "measured": None, "status": "out of memory"},
            {"name": "1 x 4", "estimate": 1.0, "measured": 2.0, "status": "done"}]
    parts = {"step": {"results": [{"name": "small", "rows": rows}]}, "memory": {"rows": grid}}
    (tmp_path / "two.json").write_text(json.dumps({"conditions": {"device": "a CPU"}, "benchmarks": parts}))
    for name in ("product_cpu", "hardware", "memory_large_cpu"):       # product: a benchmark that is no more
        (tmp_path / f"{name}.json").write_bytes((ROOT / f"results/{name}.json").read_bytes())
    figures = [path.with_suffix(".png") for path in sorted(tmp_path.glob("*.json"))]
    done = draw(*sorted(tmp_path.glob("*.json")))
    assert done.stdout.splitlines() == list(map(str, figures)), done.stderr
    assert all(figure.stat().st_size > 5000 for figure in figures)


@pytest.mark.parametrize("path", ["README.md", "results/law/fit_speed.json"])
def test_what_bench_did_not_write_is_not_drawn_and_named(path):
    done = draw(ROOT / path)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {ROOT / path} is no JSON that bench.py wrote")


def test_the_models_and_estimates_beside_what_the_article_publishes_are_those_of_this_code():
    parts = (ROOT / "results/search/source.md").read_text().split("\n## ")[1:]
    models, speeds, cells, cards = (
        [line.strip("| ").split(" | ") for line in part.splitlines() if line[:2] == "| "][1:] for part in parts)
    runs = {Path(run.out_dir).name: run for run in train.load_runs("configs/search/architecture.py")}
    assert [name for name, *_ in models] == list(runs) and {name for name, _ in speeds} == set(runs)
    for name, *claimed in models:
        assert claimed == [str(round(bench.count(runs[name])[size] / 1e6)) for size in ("total", "active")]
    assert [there for _, there, *_ in cells].count("out of memory") == 8 and len(cells) == 13
    committed = json.loads((ROOT / "results/memory_search.json").read_text())["benchmarks"]["memory"]["rows"]
    gib = {r["name"]: r["estimate"] for r in committed}
    assert list(gib) == [name for name, *_ in cells]
    for name, *_, gb in [*cells, *([cell, gb] for _, _, cell, _, gb in cards)]:
        batch, context = map(int, name.split(" x "))
        config = train.read_config("configs/large_moe_1p3b.py", {"seq_len": context})
        assert gib[name] == bench.memory(config, batch, "bfloat16")["total"] / 2**30
        assert gb == f"{gib[name] * 2**30 / 1e9:.1f}"
    for card, room, _, _, gb in cards:
        assert model.CARDS[card].memory == float(room) * 1e9 and float(gb) + 1 <= float(room)


# --- gpu: one command ---


@pytest.mark.slow
def test_the_gpu_command_runs_its_parts_small_where_there_is_no_gpu_and_says_so(tmp_path, capsys):
    (tmp_path / "gpu.json").write_text('{"step": {"status": "done"}}')                     # of an earlier command
    with pytest.raises(SystemExit) as ended:
        bench.main(["gpu", "--only", "env,layer,loss", "--budget", "100", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert not ended.value.code and capsys.readouterr().out.startswith("no CUDA GPU here: every part runs small")
    assert [*found] == ["step", "env", "layer", "loss"] and all(part["status"] == "done" for part in found.values())
    assert found["env"]["conditions"]["torch"] and found["loss"]["pieces of 256 MiB: ms"] > 0
    assert max(found["layer"]["E=16, weights float32: errors of y and gradients, an expert empty"]) < 1e-5


@pytest.mark.parametrize(("script", "status", "number"), [
    ("print('{\"a\": 1}')", "done", 1),
    ("print('{\"a\": 1}'); import time; time.sleep(60)", "stopped after 2 s", 1),
    ("print('{\"a\": 1}', flush=True); raise SystemExit('no more')", "failed: ['no more']", 1),
    ("print('{\"a\": {\"failed\": \"too large\"}}')", "failed: a", {"failed": "too large"})])
def test_a_part_that_fails_or_is_too_slow_keeps_the_numbers_it_had(script, status, number, tmp_path, monkeypatch):
    (tmp_path / "part.py").write_text(script)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "part.py"))
    found = bench.run_part("env", 2, tmp_path)
    assert (found["status"], found["a"]) == (status, number)


def test_a_number_that_raises_is_lost_alone(monkeypatch, capsys):
    monkeypatch.setattr(bench, "PARTS", {"two": (lambda: iter([("one", lambda: 1 / 0), ("two", lambda: 2)]), 1)})
    for name in ("LAYER", "LOSS", "STEP", "WRITTEN", "ROUNDS"):
        monkeypatch.setattr(bench, name, getattr(bench, name))               # find_numbers makes them small
    bench.find_numbers("two")
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"one": {"failed": "ZeroDivisionError: division by zero"}}, {"two": 2}]


def test_the_gpu_command_names_a_part_that_is_none():
    with pytest.raises(BadInput, match="--only kernel is no part: env, tests, kernels"):
        bench.main(["gpu", "--only", "env,kernel"])
    with pytest.raises(BadInput, match=r"--budget 0\.0 must be a positive number"):
        bench.main(["gpu", "--budget", "0"])
    with pytest.raises(BadInput, match="--json and --peers are for single benchmarks"):
        bench.main(["gpu", "--peers"])
