"""bench.py: it measures the same things it names, and its figures need only its JSON."""

import io
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
import model
import train
from model import BadInput, run_script

SMALL = dict(n_layer=1, d_model=16, n_head=2, n_kv_head=1, d_head=8, n_expert=4, top_k=2, d_expert=16, vocab_size=64,
             seq_len=16)


@pytest.fixture
def briefly(monkeypatch):
    """The fewest rounds there can be, whatever seconds a benchmark asks for: here it matters what is timed, not how."""
    real = bench.take_turns
    monkeypatch.setattr(bench, "take_turns", lambda candidates, seconds=0.0: real(candidates, 0.0))


def write_config(path: Path, **names) -> str:
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in names.items()))
    return str(path)


def run(tmp_path: Path, *argv: str) -> dict:
    """The part of the JSON that belongs to the verb argv[0]; its figure must be there as well."""
    bench.main([*argv, "--json", str(tmp_path / "result.json")])
    assert (tmp_path / "result.png").stat().st_size > 5000
    return json.loads((tmp_path / "result.json").read_text())["benchmarks"][argv[0]]


def test_candidates_take_turns():
    order = []
    times = bench.take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.0)
    assert order == ["a", "b"] * 6 and set(times) == {"a", "b"} and all(len(t) == 5 for t in times.values())


def test_outputs_that_differ_are_not_timed():
    bench.compare("same", torch.ones(3), torch.ones(3) + 1e-7, 1e-5)
    with pytest.raises(AssertionError, match="differ"):
        bench.compare("other", torch.ones(3), torch.ones(3) + 0.1, 1e-5)


def test_plain_routing_is_what_route_computes():
    logits = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    config = bench.ModelConfig(n_expert=16, top_k=4)
    ours, (weights, experts, token, offsets) = bench.fast_route(logits, config), bench.plain_routing(logits, 4)
    torch.testing.assert_close(ours.weights, weights)
    assert torch.equal(ours.experts, experts) and torch.equal(ours.token, token // 4)
    assert torch.equal(ours.offsets.long(), offsets)


def test_the_floor_of_a_step_counts_every_matrix_product_of_the_model(monkeypatch):
    config = bench.ModelConfig(n_layer=2, d_model=32, n_head=2, n_kv_head=1, d_head=16, n_expert=4, top_k=2,
                               d_expert=24, vocab_size=64, seq_len=16)
    flops, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **out: flops.append(2 * a.numel() * b.shape[1]) or mm(a, b, **out))
    monkeypatch.setattr(bench, "fast_linear", lambda a, w: torch.mm(a, w.t()))
    monkeypatch.setattr(bench, "GPU", False)
    bench.model_products(config, 2)()
    tokens, sizes = 2 * 16, bench.count(config)
    norms = 2 * (2 * 32 + 2 * 16) + 32
    assert sum(flops) == 6 * tokens * (sizes["active"] - norms)


def test_a_figure_is_drawn_from_the_json_alone(tmp_path):
    rows = [{"name": name, "seconds": 1.0, "tokens_per_s": 10.0} for name in ("ours", "floor")]
    grid = [{"name": "1 x 8", "estimate": 1.0, "measured": None, "status": "out of memory"}]
    result = {"conditions": {"device": "a CPU"}, "benchmarks": {"step": {"results": [{"name": "small", "rows": rows}]},
                                                              "memory": {"rows": grid}}}
    (tmp_path / "x.json").write_text(json.dumps(result))
    bench.main(["draw", str(tmp_path / "x.json")])
    assert (tmp_path / "x.png").stat().st_size > 5000


# --- layer and loss: whole layers, peers ----------------------------------------------------------------------------


def test_layer_and_loss_time_every_candidate_and_its_floor_in_one_run(tmp_path, monkeypatch, briefly):
    monkeypatch.setattr(bench, "layer_shape", lambda: (64, 16, 8, 2))
    monkeypatch.setattr(bench, "loss_shape", lambda: (64, 16, 32))
    for verb, others in (("layer", {"E=32 skewed", "dense, same active size", "whole layer, E=32, ours"}),
                         ("loss", {"ours", "plain PyTorch"})):
        rows = run(tmp_path, verb)["rows"]
        assert others | {"floor: matrix products"} <= {r["name"] for r in rows}
        assert all(r["seconds"] > 0 and r["share_of_floor"] > 0 for r in rows)


def test_a_peer_that_is_missing_is_named_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(bench, "GPU", False)
    assert bench.present(bench.PEER_LAYERS, None) == {}
    said = capsys.readouterr().out.splitlines()
    assert said == ["liger-kernel is left out: its Triton kernels need a GPU",
                    "torchtitan is left out: its experts compute in bfloat16 alone, ours on a CPU in float32"]
    monkeypatch.setattr(bench, "GPU", True)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    assert bench.present({"liger-kernel": bench.PEER_LAYERS["liger-kernel"], "ready": (lambda _: 7, "")}, None) == {
        "ready": 7}
    said, = capsys.readouterr().out.splitlines()
    assert said.startswith("liger-kernel is left out: ") and said.endswith("(pip install liger-kernel)")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_on_a_gpu_the_peers_that_are_installed_compute_what_our_layer_computes():
    x = torch.randn(1, 512, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for step in bench.whole_layers(x, 128, 4, peers=True).values():                # compares before it returns
        step()


# --- decode ---------------------------------------------------------------------------------------------------------


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
        assert r["load_seconds"] > 0 and 0 < r["first_token_seconds"] < r["seconds"] and r["source"] is None


FIELDS = "n_layer d_model n_head d_head n_kv_head n_expert top_k d_expert".split()
SHAPES = {speed: dict(zip(FIELDS, shape), vocab_size=151_936) for speed, shape in {
    "13.2": (16, 1024, 16, 64, 4, 8, 2, 2048), "23.0": (8, 2048, 32, 128, 8, 16, 2, 768),
    "17.0 to 18.7": (8, 2048, 32, 128, 8, 16, 8, 768), "11.7": (16, 1536, 24, 64, 6, 12, 4, 1536),
    "25.2": (10, 2048, 32, 64, 8, 8, 2, 2048)}.items()}
SOURCE = SHAPES["17.0 to 18.7"]        # the model it recommends


@pytest.mark.parametrize("tokens_per_s", SHAPES)
def test_the_speeds_of_the_source_stand_beside_its_five_architectures_by_size(tokens_per_s):
    config = bench.ModelConfig(**SHAPES[tokens_per_s])
    assert bench.SOURCE_TOKENS_PER_S[bench.millions(config)] == tokens_per_s


# --- memory ---------------------------------------------------------------------------------------------------------


def test_a_cell_of_the_memory_grid_prints_its_peak(monkeypatch, capsys):
    config = train.Config(**SMALL, micro_batch=2, device="cpu", dtype="float32")
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(asdict(config))))
    bench.main(["cell"])
    assert json.loads(capsys.readouterr().out)["peak"] > 0


def test_memory_measures_a_cell_in_a_process_of_its_own(tmp_path):
    path = write_config(tmp_path / "small.py", **SMALL)
    row, = run(tmp_path, "memory", path, "--cell", "2,8")["rows"]
    assert (row["name"], row["status"]) == ("2 x 8", "done") and row["measured"] > 0


def test_a_cell_that_fails_says_why(monkeypatch):
    failing = SimpleNamespace(returncode=1, stderr="Traceback\nValueError: no such thing\n", stdout="")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failing)
    config = train.Config(**SMALL)
    assert bench.measured_peak(config, 0) == (None, "failed: ValueError: no such thing")
    failing.stderr = "torch.OutOfMemoryError: CUDA out of memory\n"
    assert bench.measured_peak(config, 0) == (None, "out of memory")


def test_a_cell_larger_than_this_machine_is_not_started(monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda device: 2 * 2**30)
    monkeypatch.setattr(subprocess, "run", None)
    assert bench.measured_peak(train.Config(**SMALL), 3 * 2**30) == (None, "not run here: 3.0 GiB")


def test_memory_of_a_sweep_stands_beside_what_the_source_reports(tmp_path):
    cells = [(1, 2048), (2, 2048), (8, 2048), (3, 100)]
    runs = [dict(name=f"b{b}-t{t}", micro_batch=b, seq_len=t) for b, t in cells]
    path = write_config(tmp_path / "sweep.py", **SOURCE, runs=runs)
    result = run(tmp_path, "memory", path, "--estimate")
    rows = {r["name"]: r for r in result["rows"]}
    assert [rows[f"{b} x {t}"]["source"] for b, t in cells] == ["done, 35 GB", "done, 55 GB", "out of memory", None]
    for b, t in cells:
        config = bench.ModelConfig(**SOURCE, seq_len=t)
        estimate = bench.memory(config, b, "bfloat16")["total"]
        assert rows[f"{b} x {t}"]["estimate"] == estimate / 2**30
        assert rows[f"{b} x {t}"]["on_40_gb"] == ("fits" if estimate + 1e9 <= 40e9 else "too large")
    assert {r["status"] for r in rows.values()} == {"not run"} and all(r["measured"] is None for r in rows.values())


def test_memory_of_a_sweep_of_models_takes_each_cell_once_and_names_its_model(tmp_path):
    runs = [dict(name="shallow"), dict(name="deep", n_layer=2)]
    path = write_config(tmp_path / "sweep.py", **SMALL, micro_batch=3, runs=runs, seeds=[1, 2])
    rows = run(tmp_path, "memory", path, "--estimate")["rows"]
    assert [(r["name"], r["source"]) for r in rows] == [("3 x 16, shallow", None), ("3 x 16, deep", None)]


def test_the_source_has_thirteen_cells_of_which_eight_ran_out_of_memory():
    assert len(bench.SOURCE_CELLS) == 13 and list(bench.SOURCE_CELLS.values()).count("out of memory") == 8


# --- hardware -------------------------------------------------------------------------------------------------------


def gb_needed(base: float = 16.0) -> dict:
    """A made-up memory table in which a cell takes 16 GB and one more for every 1,024 tokens."""
    return {(b, t): {"weights": 4e9, "gradients": 4e9, "optimizer": 8e9, "total": (base + b * t / 1024) * 1e9}
            for t in bench.CONTEXTS for b in bench.BATCHES}


def test_a_card_takes_the_longest_context_and_then_the_largest_batch_that_fit(monkeypatch):
    """By hand: a card of 24 GB, 1 of it kept, has room for 7,168 tokens beside the 16 GB.

    The context is 2,048, as the config's; 2 of these fit, 4 do not. 12,288 tokens a step are three such micro-batches.
    Traffic: weights 3 x 2 x 4 GB, gradients (2 x 3 - 1) x 4, then the optimizer: 4, 2 x 4 and 2 x 8. In all 72 GB.
    """
    monkeypatch.setattr(bench, "count", lambda config: {"flops_per_token": 1e9})
    config = train.Config(**SMALL | {"seq_len": 2048})
    row = bench.card_row("made up", model.Card(24e9, 100e9, 10e12, 1e12), config, 12_288, gb_needed(), None)
    assert (row["longest_context"], row["largest"], row["tokens"]) == (4096, "2 x 2048", 4096)
    assert (row["run"], row["estimate_gb"]) == ("2 x 2048 x 3", 20.0)
    assert row["traffic_s"] == pytest.approx(0.72) and row["compute_s"] == pytest.approx(12_288 * 1e9 / 10e12)
    assert row["floor_s"] == row["compute_s"]


def test_a_card_fits_to_the_byte():
    config = train.Config(**SMALL | {"seq_len": 2048})
    card = lambda room: model.Card(room, 1e9, 1e12, 1e12)
    of = lambda room: bench.card_row("made up", card(room), config, 8192, gb_needed(), (1, 2048, 4))
    need = (16 + 8) * 1e9 + bench.RESERVE
    assert of(need)["largest"] == "4 x 2048" and of(need - 1)["largest"] == "2 x 2048"
    assert of((16 + 1) * 1e9 + bench.RESERVE)["run"] == "1 x 1024 x 8"
    nothing = of(16 * 1e9 + bench.RESERVE)
    assert nothing["largest"] == "nothing fits" and nothing["longest_context"] is None and "run" not in nothing
    source = bench.memory(config, 1, "bfloat16")["total"] + bench.RESERVE
    assert of(source)["source_fits"] == "fits" and of(source - 1)["source_fits"] == "too large"


def test_a_batch_smaller_than_what_fits_is_one_micro_batch():
    config = train.Config(**SMALL | {"seq_len": 2048})
    row = bench.card_row("made up", model.Card(100e9, 1e9, 1e12, 1e12), config, 4096, gb_needed(), None)
    assert row["largest"] == "32 x 2048" and row["run"] == "2 x 2048 x 1" and row["estimate_gb"] == 20


def test_hardware_lists_every_card_and_the_choices_of_the_source(tmp_path):
    path = write_config(tmp_path / "large.py", **SOURCE, seq_len=2048, micro_batch=1)
    cards = ["--card", "mine,30,500,50", "--card", "H100,79,1,1"]
    result = run(tmp_path, "hardware", path, "--batch_tokens", "16384", *cards)
    rows = {r["name"]: r for r in result["rows"]}
    assert set(rows) == set(model.CARDS) | {"mine"} and rows["H100"]["gb"] == 79 and result["batch_tokens"] == 16_384
    assert sorted({r["gb"] for r in rows.values()}) == [8, 12, 16, 24, 30, 40, 48, 79, 80, 141, 192]
    assert {name: r["source"] for name, r in rows.items() if "source" in r} == {
        "3090": "1 x 1024 x 8", "4090": "1 x 2048 x 4", "A100-40": "1 x 2048 x 8", "A100-80": "2 x 2048 x 4",
        "H100": "2 x 4096 x 4"}
    for r in rows.values():
        if r["tokens"]:
            assert r["micro_batch"] * r["context"] * r["accumulation"] == 16_384
            assert r["estimate_gb"] + 1 <= r["gb"] and r["floor_s"] == max(r["compute_s"], r["traffic_s"])


@pytest.mark.parametrize("card", ["mine", "mine,24", "mine,24,1000,fast", "mine,24,0,100", ",24,1000,100",
                                  "mine,1,2,nan", "mine,24,1000,100,1"])
def test_a_card_that_cannot_be_read_is_one_line_and_exit_code_2(card, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "hardware", "--card", card])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    with pytest.raises(SystemExit) as exit:
        run_script(bench.main)
    assert exit.value.code == 2
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith("error: --card") and "name,GB,GB/s,TFLOP/s" in error and card in error


@pytest.mark.parametrize(("argv", "says"), [
    (["hardware", "--batch_tokens", "1000"], "--batch_tokens 1000 must be a multiple of"),
    (["memory", "--cell", "1,x"], "--cell '1,x' must be batch,context"),
    (["draw"], "draw needs the path of a JSON"), (["stepp"], "invalid choice: 'stepp'.*--help lists"),
    (["draw", "README.md"], "README.md is no JSON"), (["step", "--peer"], "--peer"),
    (["loss", "configs/tiny.py"], "loss has sizes of its own and takes no file configs/tiny.py"),
    (["loss", "--json", "results"], "--json results must end in .json")])
def test_bad_input_is_refused_before_anything_is_measured(argv, says):
    with pytest.raises(BadInput, match=says):
        bench.main(argv)


@pytest.mark.parametrize(("device", "rate"), [
    ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12), ("NVIDIA GeForce RTX 4080", 97e12),
    ("NVIDIA GeForce RTX 4080 SUPER", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("Some other card", None)])
def test_the_table_of_cards_gives_a_run_its_peak_rate(device, rate, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    assert train.peak_flops(SimpleNamespace(device="cuda", dtype="bfloat16")) == rate
