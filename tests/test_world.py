"""What `--dry_run --world` says about several processes, and results/distributed.md."""

import json
import re
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "results/distributed.md").read_text()
MODES = {"ddp": {}, "fsdp": {"data_parallel": "fsdp"}, "experts / 8": {"expert_parallel": 8}}


def test_the_page_s_table_is_what_dry_run_says(run_train):
    rows = re.findall(r"^\| ([56])\.[06]B \| (\d+) \| (\d+) \| ([^|]+) \| (.*) \|$", PAGE, re.M)
    assert len(rows) == 18
    said = {}
    for size, world, micro, mode, numbers in rows:
        name = {"5": "moe_5p0b", "6": "moe_6p6b"}[size]
        if (name, world) not in said:
            code, out, _ = run_train(str(ROOT / f"configs/{name}.py"), "--dry_run", f"--world={world}", "--json",
                                     "--dtype=bfloat16", f"--micro_batch={micro}")
            assert code == 0
            said[name, world] = json.loads(out)
        one = said[name, world][mode]
        assert numbers == (f"{one['held']['total'] / 2**30:.1f} | {sum(one['sent'].values()) / 2**30:.1f} | "
                           f"{one['seconds']['computing']:.3f} | {one['seconds']['sending']:.3f}")


def test_a_batch_that_does_not_divide_is_refused(run_train):
    code, _, err = run_train(str(ROOT / "configs/moe_5p0b.py"), "--dry_run", "--world=1024")
    assert code == 2 and err.startswith("error: ") and "1024" in err and err.count("\n") == 1


def test_under_torchrun_a_batch_of_one_micro_batch_a_rank_is_a_number_in_the_runs_config(monkeypatch):
    """So that a run continued on another number of ranks is refused, rather than at other tokens."""
    monkeypatch.setattr(train, "UNDER_TORCHRUN", True)
    monkeypatch.setattr(train, "WORLD", 2)
    assert train.make_config(dict(micro_batch=3, seq_len=32, device="cpu"), "out/x", {}).batch_tokens == 2 * 3 * 32


def test_another_rank_than_the_first_overwrites_nothing_and_a_restart_goes_on(monkeypatch, tmp_path):
    config = train.make_config(dict(micro_batch=3, seq_len=32, device="cpu", overwrite=True), str(tmp_path), {})
    train.open_run(config, 0)
    train.lock.file.close()
    monkeypatch.setattr(train, "RANK", 1)
    train.open_run(config, 0)
    assert config.overwrite and json.loads((tmp_path / "config.json").read_text())["micro_batch"] == 3
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not train.make_config(dict(device="cpu", overwrite=True), "out/x", {}).overwrite


def test_bytes_by_hand():
    """Four experts of 3 * 8 * 16 weights a layer in two layers, halved; float32 rows of K = 2 copies."""
    c = train.make_config(dict(n_layer=2, d_model=8, n_head=2, n_kv_head=2, d_head=4, n_expert=4, d_expert=16, top_k=2,
                               seq_len=32, micro_batch=2, batch_tokens=256, dtype="float32", device="cpu"), "out/x", {})
    whole, split = train.count(c)["total"], 2 * 4 * 3 * 8 * 16
    held, sent = train.on_one_rank(train.replace(c, expert_parallel=2), 2)
    assert held["weights"] == 4 * (whole - split / 2) and held["total"] == sum(held.values()) - held["total"]
    assert sent["all-reduce"] == pytest.approx(2 * 4 * (whole - split) / 2)         # 2 (W - 1) / W; one replica: 0
    assert sent["all-to-all"] == 2 * 4 * (2 * 32 * 2 * 8 * 4 * 2) / 2                # micro-batches, ways, rows, 1 of 2
    held, sent = train.on_one_rank(train.replace(c, data_parallel="fsdp"), 4)
    assert held["optimizer"] == 8 * whole / 4 and sent["reduce-scatter"] == 4 * whole * 3 / 4
    assert sent["all-gather"] == 2 * sent["reduce-scatter"] and sent["all-reduce"] == 0


def test_the_page_s_measurements_are_those_of_its_json():
    found = json.loads((ROOT / "results/distributed/measured.json").read_text())
    mean = {mode: sum(runs) / len(runs) for mode, runs in found["tokens_per_s"].items()}
    peak = found["peak_memory_of_a_rank"]
    for mode, speed in mean.items():
        row = f"| {mode} | {speed:,.0f} | {speed / mean['one process']:.2f} | "
        if mode in peak:
            row += (f"{1 - speed / mean['silent']:.0%} | {peak[mode] / 2**30:.2f} | {peak[mode] / peak['ddp']:.2f} |")
        assert row in PAGE
    assert peak["experts / 2"] <= 0.65 * peak["ddp"] and peak["fsdp"] <= 0.75 * peak["ddp"]
