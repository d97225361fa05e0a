"""
bench.py: how fast, how large, against whom, and how far from the floor?

    python bench.py [route|layer|product|loss|step|decode|memory|hardware|all] [FILE] [--peers] [--json results/X.json]

Every table names its conditions. Every time is a median over rounds in which the candidates take turns (A B C A B C),
so that a machine that slows down slows all of them; the spread is the range of the middle half. Every ratio compares
two numbers of one run. Before anything is timed, the candidates' outputs are compared. The floor of a task is the least
it could cost: its bytes through a plain copy, or its matrix products and attention alone, timed in the same run.

    route    router logits to a Routing, forward and backward          floor: the bytes moved, by a plain copy
    layer    the expert layer: balanced, skewed, all to the same K;     floor: its matrix products
             8, 32 and 128 experts at one active size; the dense twin;
             the whole layer, with its router
    product  one matrix product by torch.mm and by oneDNN
    loss     the head and cross-entropy, without the logits             floor: its three matrix products
    step     a whole optimizer step, tokens/s                           floor: its matrix products and attention
    decode   load time and tokens/s, batch 1 and 16                     floor: reading the active weights once a token
    memory   the peak of a training step against model.memory's estimate, a process a cell (--estimate: runs nothing)
    hardware what fits cards of 8 to 192 GB, and the least time a step takes there: data sheets, nothing is run
             (--batch_tokens N; --card "name,GB,GB/s,TFLOP/s" adds a card or replaces one)

FILE is a config (also --config FILE), for step, decode, memory and hardware. Of a sweep file, decode ranks every
architecture and memory takes every cell.
--peers adds, with the same weights, transformers' Qwen3-MoE in each of its expert implementations (step, decode), and,
on a GPU, torchtitan's MoE (layer) and liger-kernel's experts and loss (layer, loss); one that is missing is named.
--keep_memory times everything under train.py's way with freed memory (a CPU's; see keep_freed_memory there).
Figures are drawn from the JSON alone: `python bench.py draw results/NAME.json`.
"""

import contextlib
import copy
import gc
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from model import (
    CARDS,
    COMPILED,
    FAST,
    Card,
    Decoder,
    Dense,
    Experts,
    Model,
    ModelConfig,
    MoE,
    Ops,
    count,
    fast_linear,
    fast_loss,
    generate,
    has_onednn,
    memory,
    next_logits,
    onednn,
    to_hf,
    using,
    weight_gradient,
)
from router import BadInput, Parser, fast_route, place, require, run_script, triton
from train import (
    Config,
    free_memory,
    keep_freed_memory,
    load_runs,
    parameter_groups,
    peak_memory,
    ramp,
    read_config,
)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32

# --- what the architecture search reports (Thakkar 2026), to stand beside our columns --------------------------------

SOURCE_TOKENS_PER_S = {  # decoding on an A100 40GB, by millions of total and active parameters, tied
    (1423, 668): "25.2", (1083, 555): "23.0", (1083, 781): "17.0 to 18.7", (1003, 399): "13.2", (1687, 781): "11.7",
}
SOURCE_LOAD = "17 to 72 s"        # over all five
SOURCE_MODEL = (1083, 781)        # the model of its two tables below
SOURCE_CELLS = {  # its third phase, on 40 GB: (batch, context). It gives 55 GB for a cell that it says ran there.
    (1, 1024): "done", (1, 2048): "done, 35 GB", (2, 1024): "done", (2, 2048): "done, 55 GB", (4, 1024): "done, 38 GB",
    **dict.fromkeys([(1, 4096), (1, 8192), (2, 4096), (2, 8192), (4, 2048), (4, 4096), (8, 1024), (8, 2048)],
                    "out of memory"),
}
SOURCE_HARDWARE = {  # its recommendation for a card: (batch, context, accumulation)
    "3090": (1, 1024, 8), "4090": (1, 2048, 4), "A100-40": (1, 2048, 8), "A100-80": (2, 2048, 4), "H100": (2, 4096, 4),
}


def millions(config: ModelConfig) -> tuple[int, int]:
    sizes = count(config)
    return round(sizes["total"] / 1e6), round(sizes["active"] / 1e6)


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
    lines = [["name", *columns], *([r["name"], *(show(r.get(c)) for c in columns)] for r in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("   ".join(f"{word:>{width}s}" for word, width in zip(line, widths)))


def show(value) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def compare(name: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Refuse to time two things that do not compute the same."""
    worst = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
    assert worst <= tolerance, f"{name}: outputs differ by {worst:.2g} of their norm, more than {tolerance:g}"


def present(peers: dict[str, tuple[Callable, str]], *args) -> dict[str, Callable]:
    """{name: build(*args)} of the peers {name: (build, why it needs a GPU)}; one that is missing is named with why."""
    found = {}
    for name, (build, needs_gpu) in peers.items():
        try:
            if not GPU:
                raise ImportError(needs_gpu)
            found[name] = build(*args)
        except ImportError as error:
            print(f"{name} is left out: {error}" + (f" (pip install {name})" if GPU else ""))
    return found


def copy_rate() -> float:
    """Bytes read and written a second by a copy far larger than any cache."""
    a = torch.ones(2**28 if GPU else 2**25, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / statistics.median(take_turns({"copy": lambda: b.copy_(a)}, 1.0)["copy"])


def read_rate() -> float:
    """Bytes read a second by a sum over more than a cache holds."""
    a = torch.ones(2**28 if GPU else 2**27, device=DEVICE)
    return a.numel() * 4 / statistics.median(take_turns({"sum": a.sum}, 1.0)["sum"])


# --- route ----------------------------------------------------------------------------------------------------------


def bench_route(args) -> dict:
    n_token, rows, rate = 16_384 if GPU else 4096, [], copy_rate()
    for n_expert, k in ((16, 4), (128, 8)):
        config = ModelConfig(n_expert=n_expert, top_k=k)
        logits = torch.randn(n_token, n_expert, device=DEVICE, requires_grad=True)
        r, composite = fast_route(logits, config), plain_routing(logits, k)
        compare("route", r.weights, composite[0], 1e-5)
        forward_bytes = 4 * n_token * (n_expert + 4 * k)              # logits in; weights, experts, slot, token out
        candidates = {"route, forward": lambda c=config, x=logits: fast_route(x.detach(), c),
                      "plain PyTorch, forward": lambda x=logits, k=k: plain_routing(x.detach(), k),
                      "route, forward + backward": lambda c=config, x=logits: gradient(fast_route(x, c), x)}
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
        return ((torch.arange(n)[:, None] * k + torch.arange(k)) % e).to(DEVICE)
    if kind == "all to one":
        return torch.arange(k).expand(n, k).contiguous().to(DEVICE)
    odds = (1 / (1 + torch.arange(e))).expand(n, e)
    return torch.multinomial(odds, k, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def bench_layer(args) -> dict:
    n, d, width, k = layer_shape()
    x = torch.randn(n, d, device=DEVICE, dtype=DTYPE, requires_grad=True)
    candidates, rows = {}, []
    for e, kind in ((8, "balanced"), (32, "balanced"), (128, "balanced"), (32, "skewed"), (32, "all to one")):
        weights = torch.full((n, k), 1 / k, device=DEVICE, requires_grad=True)
        _, offsets, token, slot = place(choices(kind, n, e, k), e)
        w_in = (torch.randn(e, 2 * width, d, device=DEVICE) / d**0.5).requires_grad_()
        w_out = (torch.randn(e, d, width, device=DEVICE) / width**0.5).requires_grad_()
        call = lambda where=(token, slot, offsets), w=weights, a=w_in, b=w_out: Experts.apply(x, w, *where, False, a, b)
        candidates[f"E={e} {kind}"] = lambda call=call, w=(weights, w_in, w_out): forward_backward(call, x, *w)
    dense = Dense(d, k * width).to(DEVICE, DTYPE)
    for p in dense.parameters():
        torch.nn.init.normal_(p, 0, d**-0.5)
    candidates["dense, same active size"] = lambda: forward_backward(lambda: dense(x), x, *dense.parameters())
    candidates |= whole_layers(x[None], width, k, args.peers)
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


def whole_layers(x: torch.Tensor, width: int, k: int, peers: bool) -> dict[str, Callable]:
    """Router and 32 experts on x (1, N, D), forward + backward: ours and, with the same weights, the peers' layers."""
    ours = MoE(ModelConfig(d_model=x.shape[-1], d_expert=width, n_expert=32, top_k=k)).to(DEVICE)
    for p in ours.parameters():
        torch.nn.init.normal_(p, 0, p.shape[-1] ** -0.5)
    ids = torch.zeros(x.shape[:2], dtype=torch.int64, device=DEVICE)
    layers = {"ours": (lambda x: ours(x, ids)[0], list(ours.parameters()))}
    layers |= present(PEER_LAYERS, ours) if peers else {}
    y = ours(x, ids)[0]
    dx, = torch.autograd.grad(y.square().mean(), x)
    for name, (layer, _) in layers.items():
        theirs = layer(x)
        compare(name, y, theirs, 2e-2)                                      # bf16 in the peers, and its roundings
        compare(f"{name}, gradient", dx, torch.autograd.grad(theirs.square().mean(), x)[0], 2e-2)
    return {f"whole layer, E=32, {name}": lambda layer=layer, w=w: forward_backward(lambda: layer(x), x, *w)
            for name, (layer, w) in layers.items()}


def liger_layer(ours: MoE) -> tuple[Callable, list]:
    """liger-kernel's fused experts (written for 0.8) behind softmax and topk, as transformers' router calls them."""
    from liger_kernel.ops import LigerFusedMoEFunction

    def layer(x):
        scores, experts = F.linear(x[0].float(), ours.gate).softmax(-1).topk(ours.config.top_k)        # (N, K) each
        scores = scores / scores.sum(-1, keepdim=True)
        w_in, w_out = ours.w_in[0].to(x.dtype), ours.w_out[0].to(x.dtype)
        return LigerFusedMoEFunction.apply(x[0], w_in, w_out, experts.int(), scores)[None]

    return layer, list(ours.parameters())


def titan_layer(ours: MoE) -> tuple[Callable, list]:
    """torchtitan's mixture of experts (written for 0.3), its router included, without expert parallelism."""
    from torchtitan.models.common import moe
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher
    c = ours.config
    gate = Linear.Config(in_features=c.d_model, out_features=c.n_expert)
    router = moe.TokenChoiceTopKRouter.Config(num_experts=c.n_expert, gate=gate, top_k=c.top_k, score_func="softmax",
                                              route_norm=True)
    experts = moe.RoutedExperts.Config(
        inner_experts=moe.GroupedExperts.Config(dim=c.d_model, hidden_dim=c.d_expert, num_experts=c.n_expert),
        token_dispatcher=LocalTokenDispatcher.Config(num_experts=c.n_expert, top_k=c.top_k))
    theirs = moe.MoE.Config(num_experts=c.n_expert, load_balance_coeff=None, router=router,
                            routed_experts=experts).build().to(DEVICE)
    inner = theirs.routed_experts.inner_experts
    with torch.no_grad():
        theirs.router.gate.weight.copy_(ours.gate)
        for weight, mine in zip((inner.w1_EFD, inner.w3_EFD, inner.w2_EDF), (*ours.w_in[0].chunk(2, 1), ours.w_out[0])):
            weight.copy_(mine)
    return theirs, list(theirs.parameters())


PEER_LAYERS = {"liger-kernel": (liger_layer, "its Triton kernels need a GPU"),
               "torchtitan": (titan_layer, "its experts compute in bfloat16 alone, ours on a CPU in float32")}


def expert_products(rows: int, d: int, width: int, e: int) -> Callable:
    """The nine products of an expert layer, three forward, six backward, on balanced experts, by the faster library."""
    n = rows // e
    x, h, a = (torch.randn(n, size, device=DEVICE, dtype=DTYPE) for size in (d, 2 * width, width))
    w1, w2 = (torch.randn(*s, device=DEVICE, dtype=DTYPE) for s in ((2 * width, d), (d, width)))
    of_weights = [torch.empty(d, width, device=DEVICE, dtype=DTYPE), torch.empty_like(w1)]

    def run():
        for _ in range(e):
            for p, w in ((x, w1), (a, w2), (x, w2.t()), (h, w1.t())):
                fast_linear(p, w)
            for p, q, out in zip((x, h), (a, x), of_weights):
                weight_gradient(p, q, out)

    return run


# --- product --------------------------------------------------------------------------------------------------------


PRODUCTS = {  # (n, i) @ (o, i).T: the products of the two CPU steps below
    "queries, keys, values": (4096, 256, 512), "first of an expert of 16": (1024, 256, 384),
    "second of an expert of 16": (1024, 192, 256), "first of an expert of 128": (256, 256, 192),
    "second of an expert of 128": (256, 96, 256),
}


def bench_product(args) -> dict:
    """The two libraries a CPU's products can go to, on the shapes of a training step: see model.has_onednn."""
    rows = []
    for name, (n, i, o) in PRODUCTS.items():
        x, w = torch.randn(n, i, device=DEVICE, dtype=DTYPE), torch.randn(o, i, device=DEVICE, dtype=DTYPE)
        candidates = {"torch.mm": lambda x=x, w=w: torch.mm(x, w.t())}
        if has_onednn(x, w):
            candidates["oneDNN"] = lambda x=x, w=w: onednn(x, w)
            compare(name, candidates["torch.mm"](), candidates["oneDNN"](), 1e-5)
        times = take_turns(candidates, 1.0)
        plain = statistics.median(times["torch.mm"])
        rows += [row(f"{name}, {library}", t, gflops=2 * n * i * o / statistics.median(t) / 1e9,
                     speedup_over_mm=plain / statistics.median(t)) for library, t in times.items()]
    print_rows("product", rows, ["seconds", "spread", "gflops", "speedup_over_mm"])
    return {"rows": rows}


# --- loss -----------------------------------------------------------------------------------------------------------


def loss_shape() -> tuple[int, int, int]:
    """N, D, V of the loss benchmark: the recommended model's on a GPU; on a CPU still several pieces of logits."""
    return (8192, 2048, 151_936) if GPU else (4096, 256, 32_768)


def bench_loss(args) -> dict:
    """The head (V, D) and cross-entropy of N tokens, forward + backward; on a GPU also what it holds meanwhile."""
    n, d, v = loss_shape()
    x = torch.randn(n, d, device=DEVICE, dtype=DTYPE, requires_grad=True)
    weight = (torch.randn(v, d, device=DEVICE) / d**0.5).requires_grad_()
    targets = torch.randint(0, v, (n,), device=DEVICE)
    losses = {"ours": lambda: fast_loss(x, weight, targets),
              "plain PyTorch": lambda: F.cross_entropy((x @ weight.to(DTYPE).t()).float(), targets)}
    losses |= present({"liger-kernel": (liger_loss, "its Triton kernels need a GPU")}, x, weight, targets) \
        if args.peers else {}
    plain = losses["plain PyTorch"]()
    dx, = torch.autograd.grad(plain, x)
    for name, loss in losses.items():
        value = loss()
        compare(name, plain, value, 1e-3)
        compare(f"{name}, gradient", dx, torch.autograd.grad(value, x)[0], 2e-2)
    steps = {name: lambda loss=loss: torch.autograd.grad(loss(), (x, weight)) for name, loss in losses.items()}
    w, p = weight.detach().to(DTYPE), torch.randn(n, v, device=DEVICE, dtype=DTYPE)
    extra = {name: extra_memory(step) for name, step in steps.items()} if GPU else {}
    steps["floor: matrix products"] = lambda: (fast_linear(x.detach(), w), fast_linear(p, w.t()), p.t() @ x.detach())
    times = take_turns(steps)
    floor = statistics.median(times["floor: matrix products"])
    rows = [row(name, t, tokens_per_s=n / statistics.median(t), share_of_floor=floor / statistics.median(t),
                extra_gib=extra.get(name)) for name, t in times.items()]
    print_rows(f"loss, forward + backward, N = {n}, D = {d}, V = {v}", rows,
               ["seconds", "spread", "tokens_per_s", "share_of_floor", "extra_gib"])
    return {"shape": {"N": n, "D": d, "V": v}, "rows": rows}


def liger_loss(x, weight, targets) -> Callable:
    """liger-kernel's fused linear cross-entropy (written for 0.8); the weight's gradient summed in float32, as ours."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    return lambda: loss(weight.to(x.dtype), x, targets)


def extra_memory(run: Callable) -> float:
    """GiB that a call holds at its peak beyond what was there before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


# --- step -----------------------------------------------------------------------------------------------------------


STEP = {  # two sizes on a CPU; a GPU takes the recommended model
    "16 experts of 192, top-4": ModelConfig(vocab_size=256),
    "128 experts of 96, top-8": ModelConfig(vocab_size=256, n_expert=128, d_expert=96, top_k=8),
}


def bench_step(args) -> dict:
    sizes, batch = STEP, 8
    if args.config or GPU:
        path = args.config or "configs/large_moe_1p3b.py"
        sizes, batch = {path: read_config(path)}, 8
    return {"results": [step_of(name, config, batch, args.peers) for name, config in sizes.items()]}


def step_of(name: str, config: ModelConfig, batch: int, peers: bool) -> dict:
    torch.manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (batch, config.seq_len + 1), device=DEVICE)
    x, y, n = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), batch * config.seq_len
    ours = Model(config).init_weights(0).to(DEVICE)
    steps = {"ours": ours_step(ours, config, x, y)}
    twin = Model(config).init_weights(0).to(DEVICE)
    steps["ours, compiled"] = ours_step(twin, config, x, y, torch.compile(twin, dynamic=False), COMPILED)
    if peers and has_transformers():
        steps |= transformers_steps(ours, tokens, config)
    steps["floor: products + attention"] = model_products(config, batch)
    times = take_turns(steps, 20.0)
    floor = statistics.median(times["floor: products + attention"])
    mine = min(statistics.median(times[k]) for k in ("ours", "ours, compiled"))
    rows = [row(k, t, tokens_per_s=n / statistics.median(t), ours_is_faster_by=statistics.median(t) / mine,
                share_of_floor=floor / statistics.median(t)) for k, t in times.items()]
    print_rows(f"step, {name}, {batch} x {config.seq_len}", rows,
               ["seconds", "spread", "tokens_per_s", "ours_is_faster_by", "share_of_floor"])
    return {"name": name, "batch": batch, "seq_len": config.seq_len, "rows": rows,
            "flops_per_token": count(config)["flops_per_token"]}


def ours_step(model: Model, config: ModelConfig, x, y, call: Callable | None = None, ops: Ops = FAST) -> Callable:
    """One optimizer step of the model, called as itself or as torch.compile made it."""
    call = model if call is None else call
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-4, fused=True)

    def step():
        with using(ops), torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=GPU):
            o = call(x, y)
        (o.ce + config.aux_coef * o.balance + config.z_coef * o.z).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


EXPERT_KINDS = ("eager", "batched_mm", "grouped_mm")


def has_transformers() -> bool:
    """Whether it is installed; if not, says so."""
    found = importlib.util.find_spec("transformers") is not None
    if not found:
        print("transformers is left out: not installed (pip install -r requirements-dev.txt)")
    return found


def transformers_model(ours: Model, kind: str):
    """transformers' Qwen3-MoE with our weights and one of its expert implementations."""
    import transformers
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
        with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=GPU):
            compare(kind, ours(tokens).logits, theirs(tokens).logits, 2e-2 if GPU else 1e-4)
        steps[f"transformers {kind}"] = their_step(theirs, theirs, tokens)
        if kind == "grouped_mm":
            twin = copy.deepcopy(theirs)
            steps["transformers grouped_mm, compiled"] = their_step(twin, torch.compile(twin, dynamic=False), tokens)
    return steps


def their_step(theirs, call: Callable, tokens) -> Callable:
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def step():
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=GPU):
            loss = call(tokens, labels=tokens, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def model_products(config: ModelConfig, batch: int) -> Callable:
    """Every matrix product and attention of a training step, forward and backward, by the faster library."""
    c, n = config, batch * config.seq_len
    make = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=DTYPE)
    linears = [(c.d_model, (c.n_head + 2 * c.n_kv_head) * c.d_head), (c.n_head * c.d_head, c.d_model),
               (c.d_model, c.n_expert)]
    products = []
    for i, o in [*linears * c.n_layer, (c.d_model, c.vocab_size)]:
        a, w, b = make(n, i), make(o, i), make(n, o)
        products.append((a, w, b, torch.empty_like(w)))
    experts = expert_products(n * c.top_k, c.d_model, c.d_expert, c.n_expert)
    heads = (c.n_head, c.n_kv_head, c.n_kv_head)
    q, k, v = (make(batch, h, c.seq_len, c.d_head).requires_grad_() for h in heads)
    dy = make(batch, c.n_head, c.seq_len, c.d_head)

    def run():
        for a, w, b, dw in products:
            fast_linear(a, w), fast_linear(b, w.t()), weight_gradient(b, a, dw)
        for _ in range(c.n_layer):
            experts()
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            torch.autograd.grad(y, (q, k, v), dy)

    return run


# --- decode ---------------------------------------------------------------------------------------------------------


def bench_decode(args) -> dict:
    config, *more = load_runs(args.config) if args.config else [ModelConfig(vocab_size=256)]
    if more:
        return decode_sweep(args.config, [config, *more])
    config = replace(config, max_seq_len=max(config.max_seq_len, 1024))
    n_token, rows = 100, []
    ours = Model(config).init_weights(0).to(DEVICE, DTYPE).eval()
    with tempfile.TemporaryDirectory() as folder:
        to_hf(ours, folder)
        load = {"ours": statistics.median(take_turns({"load": lambda: load_ours(folder)}, 1.0)["load"])}
    theirs = transformers_model(ours, "eager").to(DTYPE).eval() if args.peers and has_transformers() else None
    rate, active = read_rate(), count(config)["active"] * DTYPE.itemsize
    for batch in (1, 16):
        prompt = torch.randint(0, config.vocab_size, (batch, 16), device=DEVICE)
        runs = {name: lambda p=prompt, s=step: list(generate(ours, p, n_token, temperature=0, step=s))
                for name, step in (("ours", next_logits), ("ours, compiled", Decoder()))}
        if theirs is not None:
            for kind in EXPERT_KINDS:
                runs[f"transformers {kind}"] = lambda p=prompt, kind=kind: their_tokens(theirs, kind, p, n_token)
        texts = [torch.stack(runs[name](), 1) for name in ("ours", "ours, compiled")]               # compiles, too
        texts += [runs["transformers eager"]()[:, 16:]] if theirs is not None else []
        assert GPU or all(torch.equal(text, texts[0]) for text in texts), "greedy tokens differ"  # bf16 may turn a tie
        times = take_turns(runs, 10.0)
        mine = min(statistics.median(times[name]) for name in ("ours", "ours, compiled"))
        for name, t in times.items():
            per_s = batch * n_token / statistics.median(t)
            rows.append(row(f"{name}, batch {batch}", t, tokens_per_s=per_s,
                            ours_is_faster_by=statistics.median(t) / mine,
                            share_of_floor=per_s * active / rate if batch == 1 else None))
    print(f"load time: {load['ours']:.3f} s")
    print_rows(f"decode, {n_token} tokens, greedy", rows, ["seconds", "spread", "tokens_per_s", "ours_is_faster_by",
                                                           "share_of_floor"])
    return {"load_seconds": load, "read_bytes_per_s": rate, "active_bytes": active, "rows": rows}


PROMPT, WRITTEN = 128, 100        # tokens read and written by each architecture of a sweep


def decode_sweep(path: str, runs: list[Config]) -> dict:
    """Every architecture of a sweep file, batch 1, ranked by tokens/s."""
    rate = read_rate()
    rows = sorted((decode_row(run, rate) for run in distinct(runs, shape)), key=lambda r: -r["tokens_per_s"])
    print_rows(f"decode, {path}: greedy, batch 1, {PROMPT} tokens read, {WRITTEN} written", rows,
               ["total_millions", "active_millions", "load_seconds", "first_token_seconds", "tokens_per_s", "spread",
                "share_of_floor", "source"])
    if any(r["source"] for r in rows):
        print(f"source: tokens/s on an A100 40GB; its load times are {SOURCE_LOAD}")
    return {"name": path, "read_bytes_per_s": rate, "prompt_tokens": PROMPT, "tokens": WRITTEN, "rows": rows}


def distinct(runs: list[Config], key: Callable) -> list[Config]:
    """The first run of each key: a sweep may repeat a model for other seeds or another training."""
    first = {}
    for run in runs:
        first.setdefault(key(run), run)
    return list(first.values())


def shape(run: Config) -> str:
    """What makes two runs the same model: every field of it but the training context."""
    return repr([getattr(run, f.name) for f in fields(ModelConfig) if f.name != "seq_len"])


def model_name(run: Config) -> str:
    """The name a run has in its sweep file, without the seed that train.py appends."""
    return Path(run.out_dir).name.removesuffix(f"-s{run.seed}")


def decode_row(run: Config, rate: float) -> dict:
    """Load time, time to the first token, and tokens/s after it; the floor reads the active weights once a token."""
    config = replace(run, max_seq_len=max(run.max_seq_len, PROMPT + WRITTEN + 1))
    sizes, prompt = count(config), torch.randint(0, config.vocab_size, (1, PROMPT), device=DEVICE)
    model = Model(config).init_weights(0).to(DEVICE, DTYPE).eval()
    with tempfile.TemporaryDirectory() as folder:
        to_hf(model, folder)
        load = take_turns({"load": lambda: load_ours(folder)}, 0.0)["load"]
    times = take_turns({"first": lambda: list(generate(model, prompt, 1, temperature=0)),
                        "all": lambda: list(generate(model, prompt, 1 + WRITTEN, temperature=0))})
    first = statistics.median(times["first"])
    per_s = WRITTEN / (statistics.median(times["all"]) - first)
    return row(model_name(run), times["all"], tokens_per_s=per_s, first_token_seconds=first,
               load_seconds=statistics.median(load), total_millions=sizes["total"] / 1e6,
               active_millions=sizes["active"] / 1e6, share_of_floor=per_s * sizes["active"] * DTYPE.itemsize / rate,
               source=SOURCE_TOKENS_PER_S.get(millions(config)))


def load_ours(folder: str) -> Model:
    from model import from_hf
    return from_hf(folder).to(DEVICE, DTYPE)


def their_tokens(theirs, kind: str, prompt, n_token: int):
    theirs.set_experts_implementation(kind)
    return theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n_token,
                           min_new_tokens=n_token, do_sample=False, pad_token_id=0)     # no mask: it hides every 0


# --- memory ---------------------------------------------------------------------------------------------------------


RESERVE = 1e9        # bytes of a card that CUDA, its libraries and the allocator's gaps take beside what we estimate


def bench_memory(args) -> dict:
    """Each cell (micro-batch x context): our estimate, what the source reports, and the peak measured here."""
    path = args.config or ("configs/large_moe_1p3b.py" if GPU else "configs/tiny.py")
    cells = memory_cells(load_runs(path), args.cell)
    models = len(distinct(cells, shape))
    rows = [memory_row(config, not args.estimate) for config in cells]
    for config, r in zip(cells, rows):
        r["name"] += f", {model_name(config)}" if models > 1 else ""
    told = ["source", "on_40_gb"] if any(r["source"] for r in rows) else []
    limit = CARDS["A100-40"].memory / 2**30 if told else None
    dtype = "bfloat16, estimates alone" if args.estimate else str(DTYPE).removeprefix("torch.")
    print_rows(f"memory of a training step, {path}, {dtype}, GiB", rows,
               ["estimate", "measured", "measured_over_estimate", "status", *told])
    return {"config": path, "dtype": dtype, "estimated": args.estimate, "limit_gib": limit, "rows": rows}


def memory_cells(runs: list[Config], cell: str | None) -> list[Config]:
    """The one cell asked for, else the runs of a sweep, else a grid around a config's context."""
    config = runs[0]
    if cell:
        numbers = [int(n) if n.isdigit() else 0 for n in cell.split(",")]
        require(len(numbers) == 2 and min(numbers) > 0, f"--cell {cell!r} must be batch,context, such as 1,512")
        return [replace(config, micro_batch=numbers[0], seq_len=numbers[1])]
    if len(runs) > 1:
        return distinct(runs, lambda run: (shape(run), run.micro_batch, run.seq_len))
    half, full = config.seq_len // 2, config.seq_len
    grid = [(1, half), (1, full), (2, half), (2, full), (4, half), (4, full), (8, half)]
    return [replace(config, micro_batch=b, seq_len=t) for b, t in grid]


def memory_row(config: Config, measure: bool) -> dict:
    b, t = config.micro_batch, config.seq_len
    estimate = memory(config, b, config.dtype if measure else "bfloat16")["total"]
    peak, status = measured_peak(config, estimate) if measure else (None, "not run")
    source = SOURCE_CELLS.get((b, t)) if millions(config) == SOURCE_MODEL else None
    fits = memory(config, b, "bfloat16")["total"] + RESERVE <= CARDS["A100-40"].memory
    return {"name": f"{b} x {t}", "estimate": estimate / 2**30, "measured": peak / 2**30 if peak else None,
            "measured_over_estimate": peak / estimate if peak else None, "status": status, "source": source,
            "on_40_gb": "fits" if fits else "too large"}


def measured_peak(config: Config, estimate: int) -> tuple[int | None, str]:
    """(bytes, what happened) of two training steps in a process of their own, unless they cannot fit this machine."""
    if estimate > free_memory(DEVICE):
        return None, f"not run here: {estimate / 2**30:.1f} GiB"
    done = subprocess.run([sys.executable, __file__, "cell"], input=json.dumps(asdict(config)), capture_output=True,
                          text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])["peak"], "done"
    return None, "out of memory" if is_oom(done) else "failed: " + done.stderr.strip().rpartition("\n")[2][:80]


def is_oom(done) -> bool:
    return done.returncode < 0 or "OutOfMemoryError" in done.stderr or "not enough memory" in done.stderr


def memory_cell() -> None:
    """Training steps of the config on stdin; prints the peak, less what Python and torch took before the model."""
    config = Config(**json.loads(sys.stdin.read()))
    keep_freed_memory()
    tokens = torch.randint(0, config.vocab_size, (config.micro_batch, config.seq_len + 1), device=DEVICE)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    base = 0 if GPU else resident()
    model = Model(config).init_weights(0).to(DEVICE)
    step = ours_step(model, config, tokens[:, :-1], tokens[:, 1:])
    step()
    step()
    print(json.dumps({"peak": peak_memory(DEVICE) - base}))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- hardware -------------------------------------------------------------------------------------------------------


CONTEXTS = [2**i for i in range(9, 16)]       # 512 to 32,768
BATCHES = [2**i for i in range(11)]           # 1 to 1,024


def bench_hardware(args) -> dict:
    """What fits each card, by the memory estimate in bfloat16, and the least time one optimizer step takes there."""
    path = args.config or "configs/large_moe_1p3b.py"
    config = read_config(path)
    batch_tokens = ramp(config)[-1][1] if args.batch_tokens is None else args.batch_tokens
    require(batch_tokens > 0 and batch_tokens % config.seq_len == 0,
            f"--batch_tokens {batch_tokens} must be a multiple of {path}'s seq_len = {config.seq_len}")
    cards = CARDS | dict(map(read_card, args.card or []))
    need = {(b, t): memory(replace(config, seq_len=t), b, "bfloat16")
            for t in sorted({*CONTEXTS, config.seq_len}) for b in BATCHES}
    told = SOURCE_HARDWARE if millions(config) == SOURCE_MODEL else {}
    rows = [card_row(name, cards[name], config, batch_tokens, need, told.get(name))
            for name in sorted(cards, key=lambda name: cards[name])]
    print_rows(f"hardware, {path}, bfloat16, {batch_tokens:,} tokens a step; of each card {RESERVE / 1e9:g} GB is kept",
               rows, ["gb", "longest_context", "largest", "tokens", "run", "estimate_gb", "compute_s", "traffic_s",
                      "floor_s", "source", "source_gb", "source_fits"])
    print("longest_context: at batch 1. largest: batch x context, the context first (up to seq_len), then the batch.\n"
          "run: batch x context x accumulation to the step's tokens. floor: the larger of products and memory traffic.")
    return {"config": path, "batch_tokens": batch_tokens, "reserve_bytes": RESERVE, "estimated": True, "rows": rows}


def read_card(text: str) -> tuple[str, Card]:
    """A card from the command line, "name,GB,GB/s,TFLOP/s", as CARDS has it."""
    name, *numbers = text.split(",")
    try:
        values = [float(n) for n in numbers]
    except ValueError:
        values = []
    require(bool(name.strip()) and len(values) == 3 and all(0 < value < 1e6 for value in values),
            f"--card {text!r} must be name,GB,GB/s,TFLOP/s with positive numbers, such as H100,80,3350,989")
    return name.strip(), Card(values[0] * 1e9, values[1] * 1e9, values[2] * 1e12, math.nan)


def card_row(name: str, card: Card, config: Config, batch_tokens: int, need: dict, told: tuple | None) -> dict:
    """One card's line. need: {(batch, context): model.memory of that micro-batch}; told: the source's own choice."""
    room, bandwidth, rate = card.memory, card.bandwidth, card.bfloat16
    fits = [cell for cell, parts in need.items() if parts["total"] + RESERVE <= room]
    found = {"name": name, "gb": room / 1e9, "longest_context": max((t for _, t in fits), default=None)}
    if told:
        parts = memory(replace(config, seq_len=told[1]), told[0], "bfloat16")
        found |= {"source": "{} x {} x {}".format(*told), "source_gb": parts["total"] / 1e9,
                  "source_fits": "fits" if parts["total"] + RESERVE <= room else "too large"}
    useful = [(b, t) for b, t in fits if t <= config.seq_len and batch_tokens % t == 0]
    if not useful:
        return found | {"tokens": 0, "largest": "nothing fits", "estimate_gb": need[min(need)]["total"] / 1e9}
    context = max(t for _, t in useful)
    largest = max(b for b, t in useful if t == context)
    batch = max(b for b in BATCHES if b <= largest and batch_tokens % (b * context) == 0)
    accumulation, parts = batch_tokens // (batch * context), need[batch, context]
    flops = batch_tokens * count(replace(config, seq_len=context))["flops_per_token"]
    compute, traffic = flops / rate, step_traffic(parts, accumulation) / bandwidth
    return found | {
        "context": context, "batch": largest, "tokens": largest * context, "largest": f"{largest} x {context}",
        "micro_batch": batch, "accumulation": accumulation, "run": f"{batch} x {context} x {accumulation}",
        "estimate_gb": parts["total"] / 1e9, "compute_s": compute, "traffic_s": traffic,
        "floor_s": max(compute, traffic)}


def step_traffic(parts: dict[str, int], accumulation: int) -> int:
    """Bytes of weights, gradients and optimizer state that a step moves at the least; activations come on top.

    Each micro-batch reads the weights forward and backward and adds to the gradients (a read and a write; the first
    only writes). The optimizer reads the gradients, and reads and writes the weights and its state.
    """
    weights, gradients, state = parts["weights"], parts["gradients"], parts["optimizer"]
    micro_batches = accumulation * 2 * weights + (2 * accumulation - 1) * gradients
    return micro_batches + gradients + 2 * weights + 2 * state


# --- figures, from the JSON alone -----------------------------------------------------------------------------------


def draw(path: str) -> None:
    """A bar a row, beside the JSON: what a card holds, tokens/s, bytes against their estimate, else seconds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    try:
        result = json.loads(Path(path).read_text())
    except ValueError:
        raise BadInput(f"{path} is no JSON: draw takes what bench.py wrote with --json") from None
    tables = [(kind, part) for kind, data in result["benchmarks"].items() for part in data.get("results", [data])]
    sizes = [len(part["rows"]) for _, part in tables]
    figure, axes = plt.subplots(len(tables), 1, figsize=(8, sum(0.9 + 0.28 * n for n in sizes)), squeeze=False,
                                height_ratios=[n + 2 for n in sizes], layout="constrained")
    for axis, (kind, part) in zip(axes.flat, tables):
        draw_table(axis, kind, part)
    estimated = all(part.get("estimated") for _, part in tables)
    figure.suptitle("estimates: nothing was run" if estimated else result["conditions"]["device"], fontsize=9)
    figure.savefig(Path(path).with_suffix(".png"), dpi=150)
    plt.close(figure)


def draw_table(axis, kind: str, part: dict) -> None:
    rows, names = part["rows"], [r["name"] + (f", {r['gb']:g} GB" if "gb" in r else "") for r in part["rows"]]
    key = next(key for key in ("tokens", "tokens_per_s", "rows_per_s", "gflops", "measured", "estimate", "seconds")
               if any(r.get(key) is not None for r in rows))
    peers = ("transformers", "liger", "torchtitan", "plain", "floor")
    left = 256 if key == "tokens" else 0                                      # a logarithmic axis starts somewhere
    bars = axis.barh(names, [r.get(key) or left for r in rows],
                     color=["lightgray" if any(peer in name for peer in peers) else "tab:blue" for name in names])
    axis.bar_label(bars, [bar_text(r, key) for r in rows], padding=3, fontsize=8,
                   bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axis.margins(x=0.3 if any(r.get("source") for r in rows) else 0.1)
    if key == "tokens":
        axis.set_xscale("log", base=2)
        axis.set_xlim(left, left * (max(r["tokens"] for r in rows) / left + 1) ** 1.6)     # room for the words
    if key == "measured":
        axis.plot([r["estimate"] for r in rows], names, "k|", markersize=14, label="estimate")
        axis.legend(frameon=False, fontsize=8)
    if part.get("limit_gib"):
        axis.axvline(part["limit_gib"], color="black", linestyle=":", zorder=0)
        axis.set_xlabel("dotted: the 40 GB of the source's card", fontsize=8)
    axis.invert_yaxis()
    what = {"tokens": "tokens a micro-batch can hold", "measured": "GiB measured", "estimate": "GiB estimated"}
    of = [part.get("name") or part.get("config"), what.get(key, key.replace("_per_s", "/s"))]
    axis.set_title(f"{kind}: " + ", ".join(filter(None, of)), fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def bar_text(r: dict, key: str) -> str:
    """What stands behind a bar: its value (of a card, what to run), and what the source says of the same thing."""
    text = show(r.get(key)) if r.get(key) is not None else r.get("status", "-")
    if key == "tokens":
        text = f"{r['largest']}, floor {show(r['floor_s'])} s as {r['run']}" if r["tokens"] else r["largest"]
    return text + (f"   (source: {r['source']})" if r.get("source") else "")


# --- command line ---------------------------------------------------------------------------------------------------


BENCHMARKS = {"route": bench_route, "layer": bench_layer, "product": bench_product, "loss": bench_loss,
              "step": bench_step, "decode": bench_decode, "memory": bench_memory, "hardware": bench_hardware}

TAKE_FILE = ("step", "decode", "memory", "hardware", "all")


def main(argv: list[str]) -> None:
    parser = Parser(allow_abbrev=False, description="throughput and memory, against peers and floors, in one run")
    parser.add_argument("what", choices=[*BENCHMARKS, "all", "draw", "cell"], help="draw redraws the figure of a JSON")
    parser.add_argument("file", nargs="?", help="a config or sweep file instead of the built-in sizes; draw: the JSON")
    parser.add_argument("--config", help="the same file, by name")
    parser.add_argument("--peers", action="store_true", help="also time transformers, liger-kernel and torchtitan")
    parser.add_argument("--json", help="write the results here, and a figure beside it")
    parser.add_argument("--keep_memory", action="store_true", help="as train.py does on a CPU; the peers gain, too")
    parser.add_argument("--cell", help="memory: only this batch,context, such as 1,512")
    parser.add_argument("--estimate", action="store_true", help="memory: run nothing, estimate in bfloat16")
    parser.add_argument("--batch_tokens", type=int, help="hardware: tokens a step (default: the config's)")
    parser.add_argument("--card", action="append", help='hardware: also this card, "name,GB,GB/s,TFLOP/s"')
    args = parser.parse_intermixed_args(argv)
    if args.keep_memory:
        keep_freed_memory()
    if args.what == "draw":
        require(bool(args.file) and Path(args.file).is_file(), "draw needs the path of a JSON that bench.py wrote")
        return draw(args.file)
    if args.what == "cell":                               # what `memory` starts, a process a cell
        return memory_cell()
    args.config = args.config or args.file
    require(not args.config or args.what in TAKE_FILE,
            f"{args.what} has sizes of its own and takes no file {args.config}: {', '.join(TAKE_FILE)} do")
    require(not args.json or args.json.endswith(".json"), f"--json {args.json} must end in .json: results/NAME.json")
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
