"""
bench.py: how fast, how large, against whom, and how far from the floor?

    python bench.py [route|layer|step|decode|memory|all] [--config FILE] [--peers] [--json results/NAME.json]

Every table names its conditions. Every time is a median over rounds in which the candidates take turns (A B C A B C),
so that a machine that slows down slows all of them; the spread is the range of the middle half. Every ratio compares
two numbers of one run. Before anything is timed, the candidates' outputs are compared. The floor of a task is the least
it could cost: its bytes through a plain copy, or its matrix products and attention alone, timed in the same run.

    route    router logits to a Routing, forward and backward          floor: the bytes moved, by a plain copy
    layer    the expert layer: balanced, skewed, all to the same K;     floor: its matrix products
             8, 32 and 128 experts at one active size; the dense twin
    step     a whole optimizer step, tokens/s                           floor: its matrix products and attention
    decode   load time and tokens/s, batch 1 and 16                     floor: reading the active weights once a token
    memory   the peak of a training step against model.memory's estimate, a process a cell

--peers adds transformers' Qwen3-MoE with the same weights, in each of its expert implementations. Figures are drawn
from the JSON alone: `python bench.py draw results/NAME.json`.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from model import (
    BadInput,
    Dense,
    Experts,
    Model,
    ModelConfig,
    count,
    generate,
    memory,
    parameter_groups,
    require,
    run_script,
    to_hf,
)
from router import finish, route, triton
from train import load_config, peak_memory

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32

# --- measuring ------------------------------------------------------------------------------------------------------


def conditions() -> dict:
    """What a reader needs to judge or repeat a number."""
    return {
        "device": torch.cuda.get_device_name() if GPU else f"{cpu_name()}, {torch.get_num_threads()} threads",
        "dtype": str(DTYPE).removeprefix("torch."), "torch": torch.__version__,
        "triton": triton.__version__ if triton else None, "python": platform.python_version(),
        "command": " ".join(["python", *sys.argv]),
    }


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def clock(run: Callable) -> float:
    """Seconds of one call: CUDA events on a GPU, so that only the GPU's own time counts."""
    if not GPU:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def take_turns(candidates: dict[str, Callable], seconds: float = 4.0) -> dict[str, list[float]]:
    """Times of each candidate over as many rounds as fit the seconds (at least 5), after an unmeasured round."""
    spent = sum(clock(run) for run in candidates.values())
    rounds = min(200, max(5, int(seconds * len(candidates) / spent)))
    times = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name].append(clock(run))
    return times


def row(label: str, times: list[float], **more) -> dict:
    low, middle, high = statistics.quantiles(times, n=4)
    return {"name": label, "seconds": middle, "spread": (high - low) / middle, "rounds": len(times), **more}


def print_rows(title: str, rows: list[dict], columns: list[str]) -> None:
    print(f"\n{title}")
    print("  ".join(f"{c:>{30 if c == 'name' else 14}s}" for c in ["name", *columns]))
    for r in rows:
        print("  ".join(f"{r['name']:>30s}" if c == "name" else f"{show(r.get(c)):>14s}" for c in ["name", *columns]))


def show(value) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def compare(name: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Refuse to time two things that do not compute the same."""
    worst = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
    assert worst <= tolerance, f"{name}: outputs differ by {worst:.2g} of their norm, more than {tolerance:g}"


def copy_rate() -> float:
    """Bytes read and written a second by a copy far larger than any cache."""
    a = torch.empty(2**28 if GPU else 2**25)
    a = a.to(DEVICE)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / statistics.median(take_turns({"copy": lambda: b.copy_(a)}, 1.0)["copy"])


# --- route ----------------------------------------------------------------------------------------------------------


def bench_route(args) -> dict:
    n_token, rows, rate = 16_384 if GPU else 4096, [], copy_rate()
    for n_expert, k in ((16, 4), (128, 8)):
        config = SimpleNamespace(router="softmax", top_k=k, renormalize=True)
        logits = torch.randn(n_token, n_expert, device=DEVICE, requires_grad=True)
        r, composite = route(logits, config), plain_routing(logits, k)
        compare("route", r.weights, composite[0], 1e-5)
        forward_bytes = 4 * n_token * (n_expert + 4 * k)              # logits in; weights, experts, slot, token out
        candidates = {"route, forward": lambda c=config, x=logits: route(x.detach(), c),
                      "plain PyTorch, forward": lambda x=logits, k=k: plain_routing(x.detach(), k),
                      "route, forward + backward": lambda c=config, x=logits: gradient(route(x, c), x)}
        times = take_turns(candidates)
        plain = statistics.median(times["plain PyTorch, forward"])
        for name, t in times.items():
            floor = forward_bytes * (2 if "backward" in name else 1) / rate
            rows.append(row(f"E={n_expert} K={k} {name}", t, share_of_floor=floor / statistics.median(t),
                            speedup_over_plain=plain / statistics.median(t) if "backward" not in name else None))
    print_rows(f"route, N = {n_token}", rows, ["seconds", "spread", "speedup_over_plain", "share_of_floor"])
    return {"n_token": n_token, "copy_bytes_per_s": rate, "rows": rows}


def plain_routing(logits, k):
    """What one writes without thinking: softmax, topk, sort by expert, count."""
    weights, experts = logits.softmax(-1).topk(k, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    token = experts.flatten().argsort(stable=True)
    return weights, experts, token, torch.bincount(experts.flatten(), minlength=logits.shape[1]).cumsum(0)


def gradient(r, logits):
    return torch.autograd.grad(r.weights.square().sum() + r.losses["balance"] + r.losses["z"], logits)


# --- layer ----------------------------------------------------------------------------------------------------------


def layer_shape() -> tuple[int, int, int, int]:
    """N, D, F, K of the layer benchmark: the recommended model's on a GPU, a small one's on a CPU."""
    return (16_384, 2048, 768, 8) if GPU else (4096, 256, 192, 4)


def choices(kind: str, n: int, e: int, k: int) -> torch.Tensor:
    """Experts (N, K): in turn, drawn with probability 1 / (1 + rank), or the same K for all."""
    if kind == "balanced":
        return ((torch.arange(n)[:, None] * k + torch.arange(k)) % e).int().to(DEVICE)
    if kind == "all to one":
        return torch.arange(k).expand(n, k).int().contiguous().to(DEVICE)
    odds = (1 / (1 + torch.arange(e))).expand(n, e)
    return torch.multinomial(odds, k, generator=torch.Generator().manual_seed(0)).int().to(DEVICE)


def bench_layer(args) -> dict:
    n, d, width, k = layer_shape()
    x = torch.randn(n, d, device=DEVICE, dtype=DTYPE, requires_grad=True)
    candidates, rows = {}, []
    for e, kind in ((8, "balanced"), (32, "balanced"), (128, "balanced"), (32, "skewed"), (32, "all to one")):
        logits = torch.zeros(n, e, device=DEVICE)
        weights = torch.full((n, k), 1 / k, device=DEVICE, requires_grad=True)
        r = finish(logits, logits.softmax(-1), weights, choices(kind, n, e, k), torch.zeros((), device=DEVICE))
        w_in = (torch.randn(e, 2 * width, d, device=DEVICE) / d**0.5).requires_grad_()
        w_out = (torch.randn(e, d, width, device=DEVICE) / width**0.5).requires_grad_()
        call = lambda r=r, w=weights, a=w_in, b=w_out: Experts.apply(x, w, a, b, r.token, r.slot, r.offsets, True)
        candidates[f"E={e} {kind}"] = lambda call=call, w=(weights, w_in, w_out): forward_backward(call, x, *w)
    dense = Dense(ModelConfig(d_model=d, d_expert=k * width, n_expert=1, top_k=1)).to(DEVICE, DTYPE)
    for p in dense.parameters():
        torch.nn.init.normal_(p, 0, d**-0.5)
    candidates["dense, same active size"] = lambda: forward_backward(lambda: dense(x)[0], x, *dense.parameters())
    candidates["floor: matrix products"] = expert_products(n * k, d, width, 8)
    times = take_turns(candidates)
    floor, flops = statistics.median(times["floor: matrix products"]), 18 * n * k * d * width
    for name, t in times.items():
        s = statistics.median(t)
        rows.append(row(name, t, rows_per_s=n * k / s, share_of_floor=floor / s, flops_per_s=flops / s))
    print_rows(f"layer, forward + backward, N = {n}, D = {d}, F = {width}, K = {k}", rows,
               ["seconds", "spread", "rows_per_s", "share_of_floor"])
    return {"shape": {"N": n, "D": d, "F": width, "K": k}, "rows": rows}


def forward_backward(call, *leaves) -> None:
    torch.autograd.grad(call().square().mean(), leaves)


def expert_products(rows: int, d: int, width: int, e: int) -> Callable:
    """The nine products of an expert layer, three forward, six backward, on balanced experts and ready buffers."""
    n = rows // e
    x, h, a = (torch.randn(n, size, device=DEVICE, dtype=DTYPE) for size in (d, 2 * width, width))
    w1, w2 = (torch.randn(*s, device=DEVICE, dtype=DTYPE) for s in ((2 * width, d), (d, width)))
    products = [(x, w1.t()), (a, w2.t()), (x, w2), (x.t(), a), (h, w1), (h.t(), x)]
    outs = [p @ q for p, q in products]

    def run():
        for _ in range(e):
            for (p, q), out in zip(products, outs):
                torch.mm(p, q, out=out)

    return run


# --- step -----------------------------------------------------------------------------------------------------------


STEP = {  # two sizes on a CPU; a GPU takes the recommended model
    "16 experts of 192, top-4": ModelConfig(vocab_size=256),
    "128 experts of 96, top-8": ModelConfig(vocab_size=256, n_expert=128, d_expert=96, top_k=8),
}


def bench_step(args) -> dict:
    sizes, batch = STEP, 8
    if args.config or GPU:
        path = args.config or "configs/large_moe_1p3b.py"
        sizes, batch = {path: load_config(path)}, 8
    return {"results": [step_of(name, config, batch, args.peers) for name, config in sizes.items()]}


def step_of(name: str, config: ModelConfig, batch: int, peers: bool) -> dict:
    torch.manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (batch, config.seq_len + 1), device=DEVICE)
    x, y, n = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), batch * config.seq_len
    ours = Model(config).init_weights(0).to(DEVICE)
    steps = {"ours": ours_step(ours, config, x, y)}
    if peers:
        steps |= transformers_steps(ours, tokens, config)
    steps["floor: products + attention"] = model_products(config, batch)
    times = take_turns(steps, 20.0)
    floor, mine = (statistics.median(times[k]) for k in ("floor: products + attention", "ours"))
    rows = [row(k, t, tokens_per_s=n / statistics.median(t), ours_is_faster_by=statistics.median(t) / mine,
                share_of_floor=floor / statistics.median(t)) for k, t in times.items()]
    print_rows(f"step, {name}, {batch} x {config.seq_len}", rows,
               ["seconds", "spread", "tokens_per_s", "ours_is_faster_by", "share_of_floor"])
    return {"name": name, "batch": batch, "seq_len": config.seq_len, "rows": rows,
            "flops_per_token": count(config)["flops_per_token"]}


def ours_step(model: Model, config: ModelConfig, x, y) -> Callable:
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-4, fused=True)

    def step():
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=GPU):
            o = model(x, y)
        (o.ce + config.aux_coef * o.balance + config.z_coef * o.z).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


EXPERT_KINDS = ("eager", "batched_mm", "grouped_mm")


def transformers_model(ours: Model, kind: str):
    """transformers' Qwen3-MoE with our weights and one of its expert implementations; BadInput if not installed."""
    try:
        import transformers
    except ImportError:
        raise BadInput("transformers is not installed: pip install transformers") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        to_hf(ours, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.set_experts_implementation(kind)
    return theirs.to(DEVICE)


def transformers_steps(ours: Model, tokens, config: ModelConfig) -> dict[str, Callable]:
    """One optimizer step of each implementation, its balance loss included; each compared to our loss first."""
    steps, n_rows = {}, tokens.shape[0] * config.seq_len * config.top_k
    for kind in EXPERT_KINDS:
        gathered = 4 * n_rows * 3 * config.d_expert * config.d_model * config.n_layer
        if kind == "batched_mm" and gathered > 8 * 2**30:
            print(f"transformers {kind}: skipped, it keeps a weight a row for backward: {gathered / 2**30:.0f} GiB")
            continue
        theirs = transformers_model(ours, kind).train()
        optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

        def step(theirs=theirs, optimizer=optimizer):
            with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=GPU):
                loss = theirs(tokens, labels=tokens, output_router_logits=True).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=GPU):
            compare(kind, ours(tokens).logits, theirs(tokens).logits, 2e-2 if GPU else 1e-4)
        steps[f"transformers {kind}"] = step
    return steps


def model_products(config: ModelConfig, batch: int) -> Callable:
    """Every matrix product and attention of a training step, forward and backward, on ready-made buffers."""
    c, n = config, batch * config.seq_len
    make = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=DTYPE)
    linears = [(c.d_model, (c.n_head + 2 * c.n_kv_head) * c.d_head), (c.n_head * c.d_head, c.d_model),
               (c.d_model, c.n_expert)]
    products = []
    for i, o in [*linears * c.n_layer, (c.d_model, c.vocab_size)]:
        a, w, b = make(n, i), make(o, i), make(n, o)
        products += [(a, w.t()), (b, w), (b.t(), a)]
    outs = [p @ q for p, q in products]
    experts = expert_products(n * c.top_k, c.d_model, c.d_expert, c.n_expert)
    heads = (c.n_head, c.n_kv_head, c.n_kv_head)
    q, k, v = (make(batch, h, c.seq_len, c.d_head).requires_grad_() for h in heads)
    dy = make(batch, c.n_head, c.seq_len, c.d_head)

    def run():
        for (p, q_), out in zip(products, outs):
            torch.mm(p, q_, out=out)
        for _ in range(c.n_layer):
            experts()
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            torch.autograd.grad(y, (q, k, v), dy)

    return run


# --- decode ---------------------------------------------------------------------------------------------------------


def bench_decode(args) -> dict:
    config = load_config(args.config) if args.config else ModelConfig(vocab_size=256)
    config = replace(config, max_seq_len=max(config.max_seq_len, 1024))
    n_token, rows = 100, []
    ours = Model(config).init_weights(0).to(DEVICE, DTYPE).eval()
    with tempfile.TemporaryDirectory() as folder:
        to_hf(ours, folder)
        load = {"ours": statistics.median(take_turns({"load": lambda: load_ours(folder)}, 1.0)["load"])}
    theirs = transformers_model(ours, "eager").to(DTYPE).eval() if args.peers else None
    rate, active = copy_rate(), count(config)["active"] * DTYPE.itemsize
    for batch in (1, 16):
        prompt = torch.randint(0, config.vocab_size, (batch, 16), device=DEVICE)
        runs = {"ours": lambda p=prompt: list(generate(ours, p, n_token, temperature=0))}
        if theirs is not None:
            for kind in EXPERT_KINDS:
                runs[f"transformers {kind}"] = lambda p=prompt, kind=kind: their_tokens(theirs, kind, p, n_token)
            same = torch.stack(runs["ours"](), 1) == runs["transformers eager"]()[:, 16:]
            assert GPU or same.all(), "greedy tokens differ from transformers'"     # bf16 may turn a near tie
        times = take_turns(runs, 10.0)
        mine = statistics.median(times["ours"])
        for name, t in times.items():
            per_s = batch * n_token / statistics.median(t)
            rows.append(row(f"{name}, batch {batch}", t, tokens_per_s=per_s,
                            ours_is_faster_by=statistics.median(t) / mine,
                            share_of_floor=per_s * active / (rate / 2) if batch == 1 else None))
    print(f"load time: {load['ours']:.3f} s")
    print_rows(f"decode, {n_token} tokens, greedy", rows, ["seconds", "spread", "tokens_per_s", "ours_is_faster_by",
                                                           "share_of_floor"])
    return {"load_seconds": load, "read_bytes_per_s": rate / 2, "active_bytes": active, "rows": rows}


def load_ours(folder: str) -> Model:
    from model import from_hf
    return from_hf(folder).to(DEVICE, DTYPE)


def their_tokens(theirs, kind: str, prompt, n_token: int):
    theirs.set_experts_implementation(kind)
    return theirs.generate(prompt, max_new_tokens=n_token, min_new_tokens=n_token, do_sample=False, pad_token_id=0)


# --- memory ---------------------------------------------------------------------------------------------------------


def bench_memory(args) -> dict:
    path = args.config or ("configs/large_moe_1p3b.py" if GPU else "configs/tiny.py")
    config, rows = load_config(path), []
    half, full = config.seq_len // 2, config.seq_len
    grid = [(1, half), (1, full), (2, half), (2, full), (4, half), (4, full), (8, half)]
    for micro_batch, seq_len in [tuple(map(int, args.cell.split(",")))] if args.cell else grid:
        command = [sys.executable, __file__, "cell", "--config", path, "--cell", f"{micro_batch},{seq_len}"]
        done = subprocess.run(command, capture_output=True, text=True)
        estimate = memory(replace(config, seq_len=seq_len), micro_batch, config.dtype)["total"]
        peak = json.loads(done.stdout.splitlines()[-1])["peak"] if done.returncode == 0 else None
        rows.append({"name": f"{micro_batch} x {seq_len}", "estimate": estimate / 2**30,
                     "measured": peak / 2**30 if peak else None,
                     "measured_over_estimate": peak / estimate if peak else None,
                     "status": "done" if peak else "out of memory" if is_oom(done) else "failed"})
    print_rows(f"memory of a training step, {path}, GiB", rows,
               ["estimate", "measured", "measured_over_estimate", "status"])
    return {"config": path, "rows": rows}


def is_oom(done) -> bool:
    return done.returncode < 0 or "OutOfMemoryError" in done.stderr or "not enough memory" in done.stderr


def memory_cell(args) -> None:
    """One training step in this process; prints its peak, less what the interpreter and torch took before the model."""
    micro_batch, seq_len = map(int, args.cell.split(","))
    config = replace(load_config(args.config), seq_len=seq_len)
    tokens = torch.randint(0, config.vocab_size, (micro_batch, seq_len + 1), device=DEVICE)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    base = 0 if GPU else resident()
    model = Model(config).init_weights(0).to(DEVICE)
    step = ours_step(model, config, tokens[:, :-1], tokens[:, 1:])
    step()
    step()
    print(json.dumps({"peak": peak_memory(DEVICE) - base}))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- figures, from the JSON alone -----------------------------------------------------------------------------------


def draw(path: str) -> None:
    """A bar a row, beside the JSON: tokens/s where there are some, else seconds; memory estimate against measured."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    result = json.loads(Path(path).read_text())
    tables = [(kind, part.get("name", kind), part["rows"]) for kind, data in result["benchmarks"].items()
              for part in data.get("results", [data])]
    figure, axes = plt.subplots(len(tables), 1, figsize=(8, sum(0.9 + 0.28 * len(t[2]) for t in tables)), squeeze=False,
                                height_ratios=[len(t[2]) + 2 for t in tables], layout="constrained")
    for axis, (kind, name, rows) in zip(axes.flat, tables):
        key = next(k for k in ("tokens_per_s", "rows_per_s", "measured", "seconds") if k in rows[0])
        names, values = [r["name"] for r in rows], [r.get(key) or 0 for r in rows]
        colours = ["tab:blue" if "transformers" not in n and "floor" not in n and "plain" not in n else "lightgray"
                   for n in names]
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, [show(v) for v in values], padding=3, fontsize=8)
        if kind == "memory":
            axis.plot([r["estimate"] for r in rows], names, "k|", markersize=14, label="estimate")
            axis.legend(frameon=False)
        axis.invert_yaxis()
        axis.set_title(f"{kind}: {name}, {key.replace('_per_s', '/s')}" if name != kind else
                       f"{kind}: {key.replace('_per_s', '/s')}", fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.suptitle(result["conditions"]["device"], fontsize=9)
    figure.savefig(Path(path).with_suffix(".png"), dpi=150)


# --- command line ---------------------------------------------------------------------------------------------------


BENCHMARKS = {"route": bench_route, "layer": bench_layer, "step": bench_step, "decode": bench_decode,
              "memory": bench_memory}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="throughput and memory, against peers and floors, in one run")
    parser.add_argument("what", choices=[*BENCHMARKS, "all", "draw", "cell"], help="draw redraws the figure of a JSON")
    parser.add_argument("file", nargs="?", help="the JSON to draw")
    parser.add_argument("--config", help="a config file instead of the built-in sizes")
    parser.add_argument("--peers", action="store_true", help="also time transformers' Qwen3-MoE")
    parser.add_argument("--json", help="write the results here, and a figure beside it")
    parser.add_argument("--cell", help="memory: only this batch,context, such as 1,512")
    args = parser.parse_args(argv)
    if args.what == "draw":
        require(bool(args.file) and Path(args.file).is_file(), "draw needs the path of a JSON that bench.py wrote")
        return draw(args.file)
    if args.what == "cell":                               # what `memory` starts, a process a cell
        return memory_cell(args)
    where = conditions()
    print(", ".join(f"{k} {v}" for k, v in where.items()))
    result = {"conditions": where, "benchmarks": {}}
    for name in BENCHMARKS if args.what == "all" else [args.what]:
        result["benchmarks"][name] = BENCHMARKS[name](args)
        gc.collect()
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result, indent=1))
        draw(args.json)


if __name__ == "__main__":
    run_script(main)
