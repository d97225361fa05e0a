"""bench.py: it measures the same things it names, and its figures need only its JSON."""

import json
from types import SimpleNamespace

import pytest
import torch

import bench


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
    config = SimpleNamespace(router="softmax", top_k=4, renormalize=True)
    ours, (weights, experts, token, offsets) = bench.route(logits, config), bench.plain_routing(logits, 4)
    torch.testing.assert_close(ours.weights, weights)
    assert torch.equal(ours.experts.long(), experts) and torch.equal(ours.token.long(), token)
    assert torch.equal(ours.offsets.long(), offsets)


def test_the_floor_of_a_step_counts_every_matrix_product_of_the_model(monkeypatch):
    config = bench.ModelConfig(n_layer=2, d_model=32, n_head=2, n_kv_head=1, d_head=16, n_expert=4, top_k=2,
                               d_expert=24, vocab_size=64, seq_len=16)
    flops, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **out: flops.append(2 * a.numel() * b.shape[1]) or mm(a, b, **out))
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


def test_a_cell_of_the_memory_grid_prints_its_peak(tmp_path, capsys):
    shape = dict(n_layer=1, d_model=16, n_head=2, n_kv_head=1, d_head=8, n_expert=4, top_k=2, d_expert=16, seq_len=16)
    (tmp_path / "small.py").write_text("".join(f"{name} = {value}\n" for name, value in shape.items()))
    bench.main(["cell", "--config", str(tmp_path / "small.py"), "--cell", "2,16"])
    assert json.loads(capsys.readouterr().out)["peak"] > 0
