"""
bench.py: how fast, how large, against whom, and how far from the floor?

    python bench.py [route|layer|loss|step|decode|memory|hardware|all] [FILE] [--peers] [--json results/X.json]
    python bench.py gpu [--budget 560] [--out DIR] [--only env,tests,...]

Every table names its conditions. Every time is a median over rounds in which the candidates take turns (A B C A B C),
so that a machine that slows down slows all of them; the spread is the range of the middle half. Every ratio compares
two numbers of one run. Before anything is timed, the candidates' outputs are compared. The floor of a task is the least
it could cost: its bytes through a plain copy, or its matrix products and attention alone, timed in the same run.

    route     router logits to a Routing: definition, a GPU's kernels, naive; floor: the kernels' bytes, by a plain copy
    layer     the expert layer by load and number of experts, its dense twin, with its router; floor: matrix products
    loss      the head and cross-entropy, without the logits; floor: its three matrix products
    step      a whole optimizer step, tokens/s; floor: its matrix products and attention
    decode    load time and tokens/s, batch 1 and 16; floor: reading the active weights once a token
    memory    the peak of a training step against model.memory's estimate, a process a cell (--estimate: runs nothing)
    hardware  what fits cards of 8 to 192 GB, and the least time a step takes there: data sheets, nothing is run
    gpu       all that a GPU has to tell, tests included, part by part into DIR/gpu.json; on a CPU every part small

FILE (or --config FILE) is a config for step, decode, memory, hardware; of a sweep, decode ranks every architecture and
memory takes every cell. --peers adds, with the same weights, transformers' Qwen3-MoE in its expert implementations
(step, decode) and, on a GPU, liger-kernel's experts and loss (layer, loss); one that is missing is named. --keep_memory
times everything under train.py's way with freed memory. `python results/draw.py X.json` draws what --json wrote.

Sizes:  n tokens    d d_model    e experts    k experts a token visits    f expert width    v vocabulary
"""

import argparse
import contextlib
import copy
import gc
import itertools
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import fields, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import (
    CARDS,
    COMPILED,
    FAST,
    PLAIN,
    Card,
    Decoder,
    Dense,
    Model,
    ModelConfig,
    MoE,
    count,
    from_hf,
    generate,
    memory,
    swiglu,
    swiglu_backward,
    to_hf,
    using,
    weight_gradient,
)
from router import (
    Parser,
    balance_loss,
    combine,
    gather,
    place,
    require,
    route,
    run_script,
    tiling,
    triton,
    use_kernels,
    z_loss,
)
from train import (
    Config,
    free_memory,
    keep_freed_memory,
    load_runs,
    parameter_groups,
    peak_flops,
    peak_memory,
    ramp,
    read_config,
)

ROOT = Path(__file__).parent
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
LARGE = "configs/large_moe_1p3b.py"
noise = partial(torch.randn, device=DEVICE, dtype=DTYPE)
autocast = partial(torch.autocast, DEVICE, dtype=torch.bfloat16, enabled=GPU)
ROUNDS = 200                      # at most, of a comparison
Calls = dict[str, Callable]       # the candidates of a benchmark by name; calling one runs it once


# --- measuring ------------------------------------------------------------------------------------

def conditions() -> dict:
    """What a reader needs to judge or repeat a number."""
    info = Path("/proc/cpuinfo")
    found = info.is_file() and re.search(r"model name\s*: (.*)", info.read_text())
    cpu = found[1] if found else platform.processor() or platform.machine()
    return {"device": torch.cuda.get_device_name() if GPU else f"{cpu}, {torch.get_num_threads()} threads",
            "dtype": str(DTYPE).removeprefix("torch."), "torch": torch.__version__,
            "triton": triton.__version__ if triton else None, "python": platform.python_version(),
            "command": " ".join(["python", *sys.argv])}


def clock(run: Callable) -> float:
    """Seconds of one call; on a GPU by its own events. The GPU sleeps a millisecond first: launches queue up behind
    that, and only what they launch is timed, up to a hundred or two of them."""
    if not GPU:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def replayed(calls: list[Callable]) -> float:
    """Seconds of one of the calls, launches left out: on a GPU they are replayed as one graph. Several, on inputs of
    their own, find less of them in the cache. For work under a millisecond, where starting it takes as long."""
    if not GPU:
        return statistics.median(clock(run) for run in calls * 3)

    def each():
        for run in calls:
            run()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        each()                                                    # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        each()
    return statistics.median(clock(graph.replay) for _ in range(20)) / len(calls)


def timed(calls: Calls, seconds=4.0, **amounts) -> list[dict]:
    """A row a candidate: its median seconds, their spread, each amount (of tokens, say) a second, its share of the
    candidate named "floor...", and how many times faster the faster of those named "ours..." is."""
    print(f"timing {', '.join(calls)}", file=sys.stderr, flush=True)
    for run in calls.values():                                    # a first round, which may compile, does not count
        run()
    spent = sum(map(clock, calls.values()))                       # nor does the second: it says how many there can be
    rounds = min(ROUNDS, max(5, int(seconds * len(calls) / spent)))
    turns = [[clock(run) for run in calls.values()] for _ in range(rounds)]
    rows = []
    for name, times in zip(calls, zip(*turns)):
        low, middle, high = statistics.quantiles(times, n=4)
        r = {"name": name, "seconds": middle, "spread": (high - low) / middle, "rounds": rounds}
        rows.append(r | {f"{what}_per_s": amount / middle for what, amount in amounts.items()})
    floor, ours = (min((r["seconds"] for r in rows if r["name"].startswith(word)), default=None)
                   for word in ("floor", "ours"))
    return [r | {"share_of_floor": floor and floor / r["seconds"], "ours_is_faster_by": ours and r["seconds"] / ours}
            for r in rows]


def report(title, columns, rows, **about) -> dict:
    """Print these columns of the rows; return what goes into the JSON."""
    names = ["name", *columns.split()]
    lines = [names, *([show(r.get(name)) for name in names] for r in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{title}")
    for line in lines:
        print("   ".join(word.rjust(width) for word, width in zip(line, widths)))
    return about | {"rows": rows}


def show(value) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def compare(name, ours: Tensor, theirs: Tensor, tolerance) -> None:
    """Refuse to time two things that do not compute the same."""
    worst = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
    assert worst <= tolerance, f"{name}: outputs differ by {worst:.2g} of their norm, more than {tolerance:g}"


def agree(calls: Calls, x: Tensor, tolerance) -> None:
    """Compare each call's output, and its gradient to x, with the first's."""
    expected = None
    for name, call in calls.items():
        y = call()
        dx, = torch.autograd.grad(y.square().mean(), x)
        expected = expected or (y.detach(), dx)
        compare(name, expected[0], y, tolerance)
        compare(f"{name}, gradient", expected[1], dx, 2e-2)       # peers round to bfloat16 elsewhere


def forward_backward(call: Callable, *leaves: Tensor) -> None:
    torch.autograd.grad(call().square().mean(), leaves)


def liger(build: Callable, *args) -> Calls:
    """liger-kernel's version as one more candidate; where it cannot run a line says why."""
    try:
        if not GPU:
            raise ImportError("its Triton kernels need a GPU")
        return {"liger-kernel": build(*args)}
    except ImportError as error:
        print(f"liger-kernel is left out: {error}" + (" (pip install liger-kernel)" if GPU else ""))
        return {}


def filled(module: nn.Module) -> nn.Module:
    """The module with random weights that keep the size of what they multiply."""
    for p in module.parameters():
        nn.init.normal_(p, 0, p.shape[-1] ** -0.5)
    return module.to(DEVICE)


def products(shapes, n, rows=0) -> Callable:
    """The three products, forward and both gradients, of each weight (o, i) with n tokens, and of each of the experts
    (e, o, i) with `rows` rows each, by the faster library."""
    linears = []
    for *experts, o, i in shapes:
        m = rows if experts else n
        linears += [(noise(m, i), noise(o, i), noise(m, o), noise(o, i))] * math.prod(experts)

    def run():
        for x, w, dy, dw in linears:
            FAST.linear(x, w)
            FAST.linear(dy, w.t())
            weight_gradient(dy, x, dw)

    return run


def memory_rates() -> tuple[float, float]:
    """Bytes/s that a copy reads and writes, and that a sum reads, of more than a cache holds."""
    a = torch.ones(2**28 if GPU else 2**27, device=DEVICE)
    b = torch.empty_like(a)
    copied, summed = timed({"copy": lambda: b.copy_(a), "sum": a.sum}, 1.0)
    return 2 * a.nbytes / copied["seconds"], a.nbytes / summed["seconds"]


# --- route ----------------------------------------------------------------------------------------

def bench_route(args) -> dict:
    n = 16_384 if GPU else 4096
    rate, _ = memory_rates()
    rows = route_rows(n, 16, 4, rate) + route_rows(n, 128, 8, rate)
    return report(f"route, N = {n}, a copy moves {rate / 1e9:.1f} GB/s",
                  "seconds spread speedup_over_naive floor_megabytes share_of_floor", rows,
                  n_token=n, copy_bytes_per_s=rate)


def route_rows(n, e, k, rate) -> list[dict]:
    """Each router on logits (n, e), forward and with backward. Floor: the kernels' bytes at a copy's rate, bytes/s."""
    config = ModelConfig(top_k=k)
    logits = torch.randn(n, e, device=DEVICE, requires_grad=True)
    routers = {"naive": naive_route, "definition": route}
    routers |= {"kernels": FAST.route} if use_kernels(logits) else {}
    for name, router in routers.items():
        compare(name, route(logits, config).weights, router(logits, config).weights, 1e-5)
    rows = []
    for passes, moved in bytes_moved(n, e, k).items():
        group = timed({f"E={e} K={k} {name}, {passes}": partial(run_route, router, logits, config, "backward" in passes)
                       for name, router in routers.items()})
        rows += [r | {"speedup_over_naive": group[0]["seconds"] / r["seconds"], "floor_megabytes": moved / 1e6,
                      "share_of_floor": moved / rate / r["seconds"]} for r in group]
    return rows


def naive_route(logits: Tensor, config: ModelConfig) -> SimpleNamespace:
    """What one writes without thinking: softmax, topk, a sort by expert, a count, and the two losses."""
    probs = logits.softmax(-1)
    weights, experts = probs.topk(config.top_k)
    token = experts.flatten().argsort(stable=True) // config.top_k
    counts = torch.bincount(experts.flatten(), minlength=logits.shape[1])
    losses = {"balance": balance_loss(probs, counts), "z": z_loss(logits)}
    return SimpleNamespace(weights=weights / weights.sum(-1, keepdim=True), experts=experts, token=token,
                           offsets=counts.cumsum(0), losses=losses)


def run_route(router: Callable, logits: Tensor, config: ModelConfig, backward) -> None:
    r = router(logits if backward else logits.detach(), config)
    if backward:
        torch.autograd.grad(r.weights.square().sum() + sum(r.losses.values()), logits)


def kernel_bytes(n, e, k) -> dict[str, int]:
    """What each kernel of a routing reads and writes, by its docstring in router.py, 4 bytes a number."""
    tiles = -(-n // tiling(e)["TILE"])
    return {"route_fwd": 4 * n * (e + 2 * k + 1) + 4 * tiles * (2 * e + 4), "cumsum": 8 * tiles * e,
            "totals": 4 * tiles * (e + 4), "place_rows": 12 * n * k + 4 * tiles * e,
            "route_bwd": 4 * n * (2 * e + 3 * k + 1)}


def bytes_moved(n, e, k) -> dict[str, int]:
    each = kernel_bytes(n, e, k)
    return {"forward": sum(each.values()) - each["route_bwd"], "forward + backward": sum(each.values())}


# --- layer ----------------------------------------------------------------------------------------

LAYER = (16_384, 2048, 768, 8) if GPU else (4096, 256, 192, 4)       # n, d, f, k; a GPU's are the recommended model's


def bench_layer(args) -> dict:
    n, d, f, k = LAYER
    x = noise(n, d).requires_grad_()
    layers = {e: filled(MoE(ModelConfig(d_model=d, d_expert=f, n_expert=e, top_k=k))) for e in (8, 32, 128)}
    calls = {}
    for e, kind in ((8, "balanced"), (32, "balanced"), (128, "balanced"), (32, "skewed"), (32, "all to one")):
        alone = experts_alone(x, layers[e], choices(kind, n, e, k))
        calls |= {f"E={e} {kind}": alone[1], f"E={e} {kind}, forward": alone[0]}
    dense = filled(Dense(d, k * f)).to(DTYPE)
    calls["dense, same active size"] = partial(forward_backward, partial(dense, x), x, *dense.parameters())
    calls |= whole_layers(x[None], layers[32], args.peers)
    calls["floor: matrix products"] = products([(8, 2 * f, d), (8, d, f)], n, n * k // 8)
    rows = timed(calls, rows=n * k, flops=18 * n * k * d * f)
    return report(f"layer, forward + backward, N = {n}, D = {d}, F = {f}, K = {k}",
                  "seconds spread rows_per_s share_of_floor", rows, shape={"N": n, "D": d, "F": f, "K": k})


def choices(kind, n, e, k) -> Tensor:
    """Experts (n, k): in turn, by chance, with odds 1 / (1 + rank), or the same k for all."""
    if kind == "skewed":
        odds = (1 / (1 + torch.arange(e))).expand(n, e)
        return torch.multinomial(odds, k, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    turn = torch.arange(n * k, device=DEVICE).view(n, k)
    return turn % (e if kind == "balanced" else k)


def experts_alone(x: Tensor, layer: MoE, experts: Tensor) -> tuple[Callable, Callable]:
    """Forward, and forward and backward, of a layer on x (n, d) without its router: experts (n, k) are chosen."""
    weights = torch.full(experts.shape, 1 / experts.shape[1], device=DEVICE, requires_grad=True)
    counts, offsets, token, slot = place(experts, len(layer.gate))
    routing = SimpleNamespace(weights=weights, counts=counts, offsets=offsets, token=token, slot=slot)
    call = partial(FAST.experts, x, routing, layer)
    return torch.no_grad()(call), partial(forward_backward, call, x, weights, *layer.w_in, *layer.w_out)


def whole_layers(x: Tensor, ours: MoE, peers) -> Calls:
    """A layer with its router on x (1, n, d), forward + backward, and with the same weights liger-kernel's."""
    ids = torch.zeros(x.shape[:2], dtype=torch.int64, device=DEVICE)
    layers = {"ours": lambda: ours(x, ids)[0]}
    layers |= liger(liger_layer, ours, x) if peers else {}
    agree(layers, x, 2e-2)
    return {f"whole layer, E=32, {name}": partial(forward_backward, layer, x, *ours.parameters())
            for name, layer in layers.items()}


def liger_layer(ours: MoE, x: Tensor) -> Callable:
    """liger-kernel's fused experts (written for 0.8) behind softmax and topk, as transformers' router calls them."""
    from liger_kernel.ops import LigerFusedMoEFunction

    def layer():
        scores, experts = F.linear(x[0].float(), ours.gate).softmax(-1).topk(ours.config.top_k)     # (n, k) each
        scores = scores / scores.sum(-1, keepdim=True)
        weights = (w[0].to(x.dtype) for w in (ours.w_in, ours.w_out))
        return LigerFusedMoEFunction.apply(x[0], *weights, experts.int(), scores)[None]

    return layer


# --- loss -----------------------------------------------------------------------------------------

LOSS = (8192, 2048, 151_936) if GPU else (4096, 256, 32_768)       # n, d, v; on a CPU still several pieces of logits


def bench_loss(args) -> dict:
    """The head (v, d) and cross-entropy of n tokens, forward + backward; on a GPU also what it holds meanwhile."""
    n, d, v = LOSS
    x = noise(n, d).requires_grad_()
    weight = filled(nn.Linear(d, v, bias=False)).weight
    targets = torch.randint(0, v, (n,), device=DEVICE)
    losses = {"ours": partial(FAST.loss, x, weight, targets),
              "plain PyTorch": lambda: F.cross_entropy((x @ weight.to(DTYPE).t()).float(), targets)}
    losses |= liger(liger_loss, x, weight, targets) if args.peers else {}
    agree(losses, x, 1e-3)
    steps = {name: partial(forward_backward, loss, x, weight) for name, loss in losses.items()}
    extra = {name: extra_memory(step) for name, step in steps.items()} if GPU else {}
    head, dy = noise(v, d), noise(n, v)

    def floor():
        FAST.linear(x.detach(), head)
        FAST.linear(dy, head.t())
        torch.mm(dy.t(), x.detach())        # not `weight_gradient`: for a head oneDNN's way is the slower one

    rows = timed(steps | {"floor: matrix products": floor}, tokens=n)
    rows = [r | {"extra_gib": extra.get(r["name"])} for r in rows]
    return report(f"loss, forward + backward, N = {n}, D = {d}, V = {v}",
                  "seconds spread tokens_per_s share_of_floor extra_gib", rows, shape={"N": n, "D": d, "V": v})


def liger_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Callable:
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


# --- step -----------------------------------------------------------------------------------------

BATCH = 8        # sequences a step
STEP = {         # two sizes on a CPU; a GPU takes the recommended model
    "16 experts of 192, top-4": ModelConfig(vocab_size=256),
    "128 experts of 96, top-8": ModelConfig(vocab_size=256, n_expert=128, d_expert=96, top_k=8),
}


def bench_step(args) -> dict:
    path = args.config or (LARGE if GPU else None)
    sizes = {path: read_config(path)} if path else STEP
    return {"results": [step_of(name, config, args.peers) for name, config in sizes.items()]}


def step_of(name, config: ModelConfig, peers) -> dict:
    torch.manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (BATCH, config.seq_len + 1), device=DEVICE)
    ours, twin = (Model(config).init_weights(0).to(DEVICE) for _ in range(2))
    steps = {"ours": ours_step(ours, ours, tokens),
             "ours, compiled": ours_step(twin, torch.compile(twin, dynamic=False), tokens, COMPILED)}
    steps["floor: products + attention"] = model_products(config, BATCH)
    theirs = transformers_steps(ours, tokens) if peers else ()
    if GPU:                                                       # one peer after the other: 80 GB hold no more
        first = list(itertools.islice(theirs, 1))                 # compared with our weights as they are now
        rows = timed(steps | dict(first), 20.0, tokens=BATCH * config.seq_len)
        steps = {"ours": steps["ours"]}
        del twin, first
        for name, peer in theirs:
            rows += timed(steps | {name: peer}, 10.0, tokens=BATCH * config.seq_len)[1:]
            del peer
    else:
        rows = timed(steps | dict(theirs), 20.0, tokens=BATCH * config.seq_len)
    flops = count(config)["flops_per_token"]
    peak = peak_flops(SimpleNamespace(device=DEVICE, dtype="bfloat16"))
    rows = [r | {"mfu": flops * r["tokens_per_s"] / peak if peak else None} for r in rows]
    return report(f"step, {name}, {BATCH} x {config.seq_len}",
                  "seconds spread tokens_per_s ours_is_faster_by share_of_floor mfu", rows, name=name, batch=BATCH,
                  seq_len=config.seq_len, flops_per_token=flops)


def ours_step(model: Model, call: Callable, tokens: Tensor, ops=FAST) -> Callable:
    """One optimizer step of the model on tokens (B, T + 1), called as itself or as torch.compile made it."""

    def loss():
        out = call(tokens[:, :-1], tokens[:, 1:])
        return out.ce + model.config.aux_coef * out.balance + model.config.z_coef * out.z

    return optimizer_step(model, loss, parameter_groups(model, 0.1), ops)


def optimizer_step(model: nn.Module, loss: Callable, groups, ops=FAST) -> Callable:
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.1, fused=True)

    def step():
        with using(ops), autocast():
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def transformers_model(ours: Model):
    """transformers' Qwen3-MoE with our weights, on the CPU in float32; None, and a line, where it is not installed."""
    try:
        import transformers
    except ImportError:
        print("transformers is left out: not installed (pip install -r requirements-dev.txt)")
        return None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        to_hf(ours, folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def transformers_steps(ours: Model, tokens: Tensor) -> Iterator[tuple[str, Callable]]:
    """Its optimizer step by each implementation, its balance loss included; each compared to our logits first."""
    loaded = transformers_model(ours)
    c = ours.config
    some = tokens[:1]                               # in float32, and before a step changes our weights
    with torch.no_grad():
        fast = ours(some).logits
        with using(PLAIN):
            plain = ours(some).logits
    gathered = 12 * tokens.numel() * c.top_k * c.d_expert * c.d_model * c.n_layer / 2**30
    for name in ("eager", "batched_mm", "grouped_mm", "grouped_mm, compiled") if loaded else ():
        if name == "batched_mm" and gathered > 8:
            print(f"transformers {name}: skipped, it keeps a weight a row for backward: {gathered:.0f} GiB")
            continue
        theirs = copy.deepcopy(loaded).to(DEVICE).train()
        theirs.set_experts_implementation(name.split(",")[0])
        with torch.no_grad():
            logits = theirs(some).logits
        compare(name, fast, logits, 2e-2)           # a token whose experts nearly tie may visit another
        compare(f"{name}, the plain table", plain, logits, 1e-4)
        call = torch.compile(theirs, dynamic=False) if "compiled" in name else theirs
        output = partial(call, tokens, labels=tokens, output_router_logits=True)
        step = optimizer_step(theirs, lambda output=output: output().loss, theirs.parameters())
        del theirs, call, output
        yield f"transformers {name}", step
        del step


def model_products(config: ModelConfig, batch) -> Callable:
    """Every matrix product and attention of a training step, forward and backward, by the faster library."""
    c = config
    n = batch * c.seq_len
    with torch.device("meta"):
        model = Model(c)
    shapes = [p.shape for p in (*model.blocks.parameters(), model.head_weight) if p.dim() > 1]
    linears = products(shapes, n, n * c.top_k // c.n_expert)
    q, k, v, dy = (noise(batch, h, c.seq_len, c.d_head) for h in (c.n_head, c.n_kv_head, c.n_kv_head, c.n_head))
    qkv = [x.requires_grad_() for x in (q, k, v)]

    def run():
        linears()
        for _ in range(c.n_layer):
            y = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
            torch.autograd.grad(y, qkv, dy)

    return run


# --- decode ---------------------------------------------------------------------------------------

PROMPT = 128        # tokens that each architecture of a sweep reads
WRITTEN = 100       # tokens written


def bench_decode(args) -> dict:
    """One model at batch 1 and 16, eager and compiled; of a sweep every architecture at batch 1, by tokens/s."""
    config, *more = load_runs(args.config) if args.config else [ModelConfig(vocab_size=256)]
    _, rate = memory_rates()
    if more:
        runs = distinct([config, *more], shape)
        rows = sorted((decode_row(run, rate) for run in runs), key=lambda r: -r["tokens_per_s"])
        columns = "total_millions active_millions load_seconds first_token_seconds tokens_per_s spread share_of_floor"
        return report(f"decode, {args.config}: greedy, batch 1, {PROMPT} tokens read, {WRITTEN} written", columns, rows,
                      name=args.config, read_bytes_per_s=rate, prompt_tokens=PROMPT, tokens=WRITTEN)
    ours, load = ready(config, 1024)
    loaded = transformers_model(ours) if args.peers else None
    theirs = loaded and loaded.to(DEVICE, DTYPE).eval()
    active = count(config)["active"] * DTYPE.itemsize
    rows = []
    for batch in (1, 16):
        prompt = torch.randint(0, config.vocab_size, (batch, 16), device=DEVICE)
        calls = {"ours": partial(our_tokens, ours, prompt, WRITTEN),
                 "ours, compiled": partial(our_tokens, ours, prompt, WRITTEN, step=Decoder())}
        for kind in ("eager", "batched_mm", "grouped_mm") if theirs else ():
            calls[f"transformers {kind}"] = partial(their_tokens, theirs, kind, prompt)
        greedy = calls["ours"]()
        for name, call in calls.items():
            compare(name, greedy, call(), math.inf if GPU else 0)       # bfloat16 may turn a tie around
        for r in timed(calls, 10.0, tokens=batch * WRITTEN):
            share = r["tokens_per_s"] * active / rate if batch == 1 else None
            rows.append(r | {"name": f"{r['name']}, batch {batch}", "share_of_floor": share})
    print(f"load time: {load:.3f} s")
    return report(f"decode, {WRITTEN} tokens, greedy",
                  "seconds spread tokens_per_s ours_is_faster_by share_of_floor", rows,
                  load_seconds={"ours": load}, read_bytes_per_s=rate, active_bytes=active)


def ready(config: ModelConfig, length) -> tuple[Model, float]:
    """A model with random weights for texts of this length, and the seconds to load it from a Hugging Face folder."""
    config = replace(config, max_seq_len=max(config.max_seq_len, length))
    model = Model(config).init_weights(0).to(DEVICE, DTYPE).eval()
    with tempfile.TemporaryDirectory() as folder:
        to_hf(model, folder)
        load, = timed({"load": lambda: from_hf(folder).to(DEVICE, DTYPE)}, 1.0)
    return model, load["seconds"]


def our_tokens(model: Model, prompt: Tensor, n_token, **step) -> Tensor:
    """The tokens (B, n_token) that the model writes after a prompt (B, T)."""
    return torch.stack(list(generate(model, prompt, n_token, temperature=0, **step)), 1)


def their_tokens(theirs, kind, prompt: Tensor) -> Tensor:
    theirs.set_experts_implementation(kind)
    everywhere = torch.ones_like(prompt)              # without a mask it hides every token 0
    text = theirs.generate(prompt, attention_mask=everywhere, max_new_tokens=WRITTEN, min_new_tokens=WRITTEN,
                           do_sample=False, pad_token_id=0)
    return text[:, prompt.shape[1]:]


def decode_row(run: Config, rate) -> dict:
    """Load time, time to the first token, tokens/s after it. Floor: the active weights read once a token, at rate."""
    total, active = (count(run)[name] for name in ("total", "active"))
    model, load = ready(run, PROMPT + WRITTEN + 1)
    prompt = torch.randint(0, run.vocab_size, (1, PROMPT), device=DEVICE)
    first, whole = timed({str(n): partial(our_tokens, model, prompt, n) for n in (1, 1 + WRITTEN)})
    per_s = WRITTEN / (whole["seconds"] - first["seconds"])
    return whole | {"name": model_name(run), "tokens_per_s": per_s, "first_token_seconds": first["seconds"],
                    "load_seconds": load, "total_millions": total / 1e6, "active_millions": active / 1e6,
                    "share_of_floor": per_s * active * DTYPE.itemsize / rate}


def distinct(runs: list[Config], key: Callable) -> list[Config]:
    """The first run of each key: a sweep may repeat a model for other seeds or another training."""
    return [run for i, run in enumerate(runs) if key(run) not in map(key, runs[:i])]


def shape(run: Config) -> str:
    """What makes two runs the same model: every field of it but the training context."""
    return repr([getattr(run, f.name) for f in fields(ModelConfig) if f.name != "seq_len"])


def model_name(run: Config) -> str:
    """The name a run has in its sweep file, without the seed that train.py appends."""
    return Path(run.out_dir).name.removesuffix(f"-s{run.seed}")


# --- memory ---------------------------------------------------------------------------------------

def bench_memory(args) -> dict:
    """Each cell (micro-batch x context): our estimate, and the peak measured here."""
    path = args.config or (LARGE if GPU else "configs/tiny.py")
    cells = memory_cells(load_runs(path), args.cell)
    rows = [memory_row(config, args.estimate) for config in cells]
    if len(distinct(cells, shape)) > 1:
        rows = [r | {"name": f"{r['name']}, {model_name(config)}"} for config, r in zip(cells, rows)]
    dtype = "bfloat16, estimates alone" if args.estimate else str(DTYPE).removeprefix("torch.")
    return report(f"memory of a training step, {path}, {dtype}, GiB", "estimate measured measured_over_estimate status",
                  rows, config=path, dtype=dtype, estimated=args.estimate)


def memory_cells(runs: list[Config], cell) -> list[Config]:
    """The one cell asked for, else the runs of a sweep, else a grid around a config's context."""
    config = runs[0]
    if len(runs) > 1 and not cell:
        return distinct(runs, lambda run: (shape(run), run.micro_batch, run.seq_len))
    grid = [(b, t) for b in (1, 2, 4, 8) for t in (config.seq_len // 2, config.seq_len)][:-1]
    if cell:
        numbers = re.fullmatch(r"0*([1-9]\d*),0*([1-9]\d*)", cell)
        require(numbers is not None, f"--cell {cell!r} must be batch,context, such as 1,512")
        grid = [map(int, numbers.groups())]
    return [replace(config, micro_batch=b, seq_len=t) for b, t in grid]


def memory_row(config: Config, estimate_only) -> dict:
    estimate = memory(config, config.micro_batch, "bfloat16" if estimate_only else config.dtype)["total"]
    peak, status = (None, "not run") if estimate_only else measured_peak(config, estimate)
    return {"name": f"{config.micro_batch} x {config.seq_len}", "estimate": estimate / 2**30,
            "measured": peak and peak / 2**30, "measured_over_estimate": peak and peak / estimate, "status": status}


def measured_peak(config: Config, estimate) -> tuple[int | None, str]:
    """(bytes, what happened) of two training steps in a process of their own, unless they cannot fit this machine."""
    if estimate > free_memory(DEVICE):
        return None, f"not run here: {estimate / 2**30:.1f} GiB"
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        try:
            return process.submit(peak_of_steps, config).result(), "done"
        except Exception as error:                                # the system kills a process without a word
            oom = isinstance(error, (BrokenExecutor, torch.OutOfMemoryError)) or "not enough memory" in str(error)
            return None, "out of memory" if oom else f"failed: {type(error).__name__}: {error}".splitlines()[0][:88]


def peak_of_steps(config: Config) -> int:
    """Bytes at the peak of training steps, less what Python and torch took before the model."""
    keep_freed_memory()
    tokens = torch.randint(0, config.vocab_size, (config.micro_batch, config.seq_len + 1), device=DEVICE)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))              # a library's own memory is not the model's
    before = 0 if GPU else int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    model = Model(config).init_weights(0).to(DEVICE)
    step = ours_step(model, model, tokens)
    step()
    step()
    return peak_memory(DEVICE) - before


# --- hardware -------------------------------------------------------------------------------------

RESERVE = 1e9        # bytes of a card that CUDA, its libraries and the allocator's gaps take beside what we estimate
CONTEXTS = [2**i for i in range(9, 16)]       # 512 to 32,768
BATCHES = [2**i for i in range(11)]           # 1 to 1,024


def bench_hardware(args) -> dict:
    """What fits each card, by the memory estimate in bfloat16, and the least time one optimizer step takes there."""
    path = args.config or LARGE
    config = read_config(path)
    batch_tokens = ramp(config)[-1][1] if args.batch_tokens is None else args.batch_tokens
    require(batch_tokens > 0 and batch_tokens % config.seq_len == 0,
            f"--batch_tokens {batch_tokens} must be a multiple of {path}'s seq_len = {config.seq_len}")
    cards = CARDS | dict(map(read_card, args.card or []))
    need = {(t, b): memory(replace(config, seq_len=t), b, "bfloat16")
            for t in {*CONTEXTS, config.seq_len} for b in BATCHES}
    rows = [card_row(name, cards[name], config, batch_tokens, need) for name in sorted(cards, key=cards.get)]
    kept = f"of each card {RESERVE / 1e9:g} GB is kept"
    result = report(f"hardware, {path}, bfloat16, {batch_tokens:,} tokens a step; {kept}",
                    "gb longest_context largest tokens run estimate_gb compute_s traffic_s floor_s", rows,
                    config=path, batch_tokens=batch_tokens, reserve_bytes=RESERVE, estimated=True)
    print("longest_context: at batch 1. largest: batch x context, the context first (up to seq_len), then the batch.\n"
          "run: batch x context x accumulation to the step's tokens. floor: the larger of products and memory traffic.")
    return result


def read_card(text) -> tuple[str, Card]:
    """A card from the command line, "name,GB,GB/s,TFLOP/s", as CARDS has it."""
    name, *numbers = text.split(",")
    try:
        values = [float(n) for n in numbers]
    except ValueError:
        values = []
    require(bool(name.strip()) and len(values) == 3 and all(0 < value < 1e6 for value in values),
            f"--card {text!r} must be name,GB,GB/s,TFLOP/s with positive numbers, such as H100,80,3350,989")
    room, bandwidth, rate = values
    return name.strip(), Card(room * 1e9, bandwidth * 1e9, rate * 1e12, math.nan)


def card_row(name, card: Card, config: Config, batch_tokens, need: dict) -> dict:
    """One card's line. need: {(context, batch): model.memory of that micro-batch}."""
    fits = [cell for cell, parts in need.items() if parts["total"] + RESERVE <= card.memory]
    found = {"name": name, "gb": card.memory / 1e9, "longest_context": max(fits)[0] if fits else None}
    useful = [(t, b) for t, b in fits if t <= config.seq_len and batch_tokens % t == 0]
    if not useful:
        return found | {"tokens": 0, "largest": "nothing fits", "estimate_gb": need[min(need)]["total"] / 1e9}
    context, largest = max(useful)
    batch = max(b for b in BATCHES if b <= largest and batch_tokens % (b * context) == 0)
    accumulation = batch_tokens // (batch * context)
    parts = need[context, batch]
    compute = batch_tokens * count(replace(config, seq_len=context))["flops_per_token"] / card.bfloat16
    # The least a step moves: a micro-batch reads the weights forward and backward, and reads and writes the gradients
    # (the first only writes them); the optimizer reads gradients, and reads and writes weights and its own state.
    moved = 2 * ((accumulation + 1) * parts["weights"] + accumulation * parts["gradients"] + parts["optimizer"])
    traffic = moved / card.bandwidth
    return found | {
        "context": context, "batch": largest, "tokens": largest * context, "largest": f"{largest} x {context}",
        "micro_batch": batch, "accumulation": accumulation, "run": f"{batch} x {context} x {accumulation}",
        "estimate_gb": parts["total"] / 1e9, "compute_s": compute, "traffic_s": traffic,
        "floor_s": max(compute, traffic)}


# --- gpu: one command, part by part ---------------------------------------------------------------
# Each part is a process with a time cap: one that fails or is too slow loses its own numbers alone. Within a part each
# number is printed as soon as it is known, as a line of JSON. A call that raises leaves its error in its place; where
# what the calls share cannot be made, the part ends there.

Numbers = Iterator[tuple[str, Callable]]          # of each number or group of numbers: its name, what finds it
SHRUNK = {"n_layer": 1, "d_model": 64, "n_head": 2, "n_kv_head": 1, "d_head": 32, "d_expert": 32, "vocab_size": 512,
          "seq_len": 64}                          # off a GPU every part runs small: it is the plumbing that is tried


def milliseconds(run: Callable) -> float:
    return 1e3 * timed({"": run}, 1.0)[0]["seconds"]


def large(**changes) -> tuple[Config, Model]:
    config = read_config(LARGE, ({} if GPU else SHRUNK) | {"device": DEVICE} | changes)
    return config, Model(config).init_weights(0).to(DEVICE)


def part_env() -> Numbers:
    """The machine: versions, rates of memory and products, torch's attention and others, the price of a launch."""
    yield "conditions", lambda: conditions() | {"cpus": os.cpu_count(), "cudnn": torch.backends.cudnn.version()}
    yield "copy, read GB/s", lambda: [rate / 1e9 for rate in memory_rates()]
    side = 8192 if GPU else 256
    x = noise(side, side)
    yield "product TFLOP/s", lambda: 2 * side**3 / milliseconds(lambda: x @ x) / 1e9
    q, k = (noise(8, h, 2048 if GPU else 64, 128).requires_grad_() for h in (32, 8))
    attention = partial(forward_backward, partial(F.scaled_dot_product_attention, q, k, k, None, 0.0, True,
                                                  enable_gqa=True), q, k)
    yield "attention, forward + backward, ms", partial(milliseconds, attention)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if GPU else ():
        yield f"by {backend.name}", partial(milliseconds, sdpa_kernel(backend)(attention))
    small = torch.zeros(8, device=DEVICE)
    yield "launch us", lambda: host_ms(lambda: [small.add_(1) for _ in range(1000)])


def part_tests() -> Numbers:
    yield "pytest -m gpu", partial(run_here, "-m", "pytest", "-m", "gpu", "-o", "filterwarnings=default")


def run_here(*words) -> list:
    """[exit code, last line] of Python with these words; all of its output goes into log.txt."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-200:]
    return [done.returncode, done.stdout.splitlines()[-1]]


def part_kernels() -> Numbers:
    """Routing by replays over eight inputs, each kernel by the profiler beside its bytes, and those that move rows."""
    n, d, f, k = LAYER
    for e in (128, 16):
        config, inputs = ModelConfig(top_k=k), [torch.randn(n, e, device=DEVICE, requires_grad=True) for _ in range(8)]
        for name, router, backward in (("forward", FAST.route, False), ("forward + backward", FAST.route, True),
                                       ("definition, forward", route, False)):
            calls = [partial(run_route, router, x, config, backward) for x in inputs]
            yield f"E={e} {name}, us", lambda calls=calls: 1e6 * replayed(calls)
            yield f"E={e} {name}, each kernel's ms", partial(profiled, calls)
        yield f"E={e} bytes", partial(kernel_bytes, n, e, k)
    slot, x, rows = route(inputs[0], config).slot.int(), noise(n, d), noise(n * k, d)
    h, a, weight = noise(n * k, 2 * f), noise(n * k, f), torch.rand(n * k, 1, device=DEVICE)
    for name, moved, call in (("gather", (n + n * k) * d, partial(gather, x, slot)),
                              ("combine", (n + n * k) * d, partial(combine, rows, slot)),
                              ("swiglu", 3 * n * k * f, partial(swiglu, h, weight)),
                              ("swiglu_backward", 6 * n * k * f, partial(swiglu_backward, h, a, weight))):
        yield f"{name}: us, bytes", lambda call=call, moved=moved: [1e6 * replayed([call]), moved * DTYPE.itemsize]


def profiled(calls: list[Callable], top=25) -> list:
    """[name, count, ms each] of the kernels, on a CPU operators, that take longest together."""
    with torch.profiler.profile() as profile:
        for run in calls:
            run()
        wait()
    spent = [(r.self_device_time_total if GPU else r.self_cpu_time_total, r) for r in profile.key_averages()]
    longest = sorted(spent, key=lambda pair: -pair[0])[:top]
    return [[r.key[:80], r.count, us / r.count / 1e3] for us, r in longest]


def part_layer() -> Numbers:
    n, d, f, k = LAYER
    x = noise(n, d).requires_grad_()
    for e, dtype in ((16, torch.float32), (16, DTYPE), (128, DTYPE), (128, torch.float32)):
        layer = filled(MoE(ModelConfig(d_model=d, d_expert=f, n_expert=e, top_k=k))).to(dtype)
        name = f"E={e}, weights {str(dtype).removeprefix('torch.')}"
        for what, call in zip(("forward", "forward + backward"), experts_alone(x, layer, choices("balanced", n, e, k))):
            yield f"{name}: {what}, ms", partial(milliseconds, call)
        if e == 16:
            yield f"{name}: errors of y and gradients, an expert empty", partial(layer_errors, x, layer, k)


def layer_errors(x: Tensor, layer: MoE, k) -> list[float]:
    """Of y, dx, dweights, each dW: norm of the difference from the definition in float32, over the norm."""
    e = len(layer.gate)
    experts = choices("skewed", len(x), e - 1, k)                 # the last expert gets nothing
    counts, offsets, token, slot = place(experts, e)
    dy = torch.randn_like(x)
    found = []
    for table, w, row in ((FAST, layer, x), (PLAIN, copy.deepcopy(layer).float(), x.detach().float().requires_grad_())):
        weights = torch.full(experts.shape, 1 / k, device=DEVICE, requires_grad=True)
        routing = SimpleNamespace(weights=weights, counts=counts, offsets=offsets, token=token, slot=slot)
        y = table.experts(row, routing, w)
        found.append([y, *torch.autograd.grad(y, (row, weights, *w.w_in, *w.w_out), dy.to(y.dtype))])
    return [((ours.float() - exact).norm() / exact.norm()).item() for ours, exact in zip(*found)]


def part_loss() -> Numbers:
    n, d, v = LOSS
    x, weight = noise(n, d).requires_grad_(), torch.randn(v, d, device=DEVICE).requires_grad_()
    run = partial(forward_backward, partial(FAST.loss, x, weight, torch.randint(0, v, (n,), device=DEVICE)), x, weight)
    for mib in (256, 1024, 2048):
        pieces = mock.patch("model.logit_bytes", lambda device, mib=mib: mib * 2**20)
        yield f"pieces of {mib} MiB: ms", pieces(partial(milliseconds, run))
        yield f"pieces of {mib} MiB: extra GiB", pieces(partial(extra_memory, run) if GPU else type(None))


def part_step(compiled=False) -> Numbers:
    """Optimizer steps of the recommended model by the host's clock, from the least batch to the largest."""
    config, ours = large()
    call, ops = (torch.compile(ours, dynamic=False), COMPILED) if compiled else (ours, FAST)
    for batch in ((8,) if compiled else (1, 2, 4, 8)) if GPU else (1,):
        run = ours_step(ours, call, torch.randint(0, 512, (batch, config.seq_len + 1), device=DEVICE), ops)
        yield f"{batch} x {config.seq_len}", partial(step_numbers, run, config, batch)
        if batch in (1, 8) and not compiled:
            yield f"{batch} x {config.seq_len}, each kernel's ms", partial(profiled, [run])


def part_cells() -> Numbers:
    """A step in each cell of the search, its peak beside the estimate: one model, other batches."""
    _, ours = large()
    for run in memory_cells(load_runs("configs/search/batch_context.py", {"device": DEVICE}), None):
        config = replace(run, **{} if GPU else SHRUNK)
        tokens = torch.randint(0, 512, (run.micro_batch, config.seq_len + 1), device=DEVICE)
        yield f"{run.micro_batch} x {run.seq_len}", partial(step_numbers, ours_step(ours, ours, tokens), config,
                                                            run.micro_batch)


def step_numbers(run: Callable, config: Config, batch) -> dict:
    run()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    ms = statistics.median(host_ms(run) for _ in range(5))
    per_s = batch * config.seq_len / ms * 1e3
    peak = peak_flops(SimpleNamespace(device=DEVICE, dtype="bfloat16"))
    return {"ms": ms, "tokens_per_s": per_s, "mfu": peak and count(config)["flops_per_token"] * per_s / peak,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if GPU else None,
            "estimate_gib": memory(config, batch, "bfloat16")["total"] / 2**30}


def host_ms(run: Callable) -> float:
    """By the host's clock, launches included, as in training."""
    wait()
    start = time.perf_counter()
    run()
    wait()
    return 1e3 * (time.perf_counter() - start)


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def part_decode() -> Numbers:
    _, ours = large()
    ours = ours.to(DTYPE).eval()
    prompt, n, step = torch.randint(0, 256, (1, 16), device=DEVICE), 200 if GPU else 4, Decoder()
    for name, kind in (("uncompiled", {}), ("compiled", {"step": step})):
        for time_of in ("first", "second"):
            yield f"{name}, {time_of} call, tokens/s", lambda k=kind: 1e3 * n / host_ms(
                partial(our_tokens, ours, prompt, n, **k))
    if GPU:
        yield "a replay alone, tokens/s", lambda: 1 / statistics.median(clock(step.graph.replay) for _ in range(30))
    small = Model(ModelConfig(vocab_size=256)).init_weights(0).to(DEVICE).eval()             # in float32 no tie turns
    calls = [partial(our_tokens, small, prompt, n, **kind) for kind in ({}, {"step": Decoder()})]
    yield "float32: the same tokens compiled and not", lambda: torch.equal(*(call() for call in calls))


def part_train() -> Numbers:
    """configs/tiny.py, stopped after its first step and continued; and once more, which finds it finished."""
    with tempfile.TemporaryDirectory() as out:
        command = ["train.py", "configs/tiny.py", f"--out_dir={out}/run", "--eval_tokens=4096",
                   f"--max_steps={60 if GPU else 6}"]
        stopped = f"import sys, train; sys.argv = {command}; train.catch_signals = lambda: ['a test']; " \
                  "train.run_script(train.main)"
        yield "stopped", partial(run_here, "-c", stopped)
        yield "continued", partial(run_here, *command)
        yield "again", partial(run_here, *command)


def part_peers() -> Numbers:
    for name in ("layer", "loss", "step", "decode"):
        yield name, partial(BENCHMARKS[name], SimpleNamespace(peers=True, config=None))


PARTS = {  # name: (what finds its numbers, seconds it may take at most), the most worth a second first
    "env": (part_env, 60), "tests": (part_tests, 170), "kernels": (part_kernels, 70), "layer": (part_layer, 90),
    "loss": (part_loss, 50), "step": (part_step, 110), "decode": (part_decode, 150), "train": (part_train, 70),
    "step_compiled": (partial(part_step, True), 130), "cells": (part_cells, 120), "peers": (part_peers, 240)}


def bench_gpu(args) -> None:
    names = args.only.split(",") if args.only else [*PARTS]
    for name in names:
        require(name in PARTS, f"--only {name} is no part: {', '.join(PARTS)}")
    if args.part:
        return find_numbers(args.only)
    require(0 < args.budget < 1e6, f"--budget {args.budget} must be a positive number of seconds")
    require(not args.config, f"gpu has sizes of its own and takes no file {args.config}")
    require(not args.json and not args.peers, "gpu writes gpu.json into --out, and its part peers times the others: "
            "--json and --peers are for single benchmarks")
    if not GPU:
        print("no CUDA GPU here: every part runs small, to try the plumbing, and its numbers say nothing", flush=True)
    out, end = Path(args.out), time.monotonic() + args.budget
    out.mkdir(parents=True, exist_ok=True)
    path = out / "gpu.json"
    result = json.loads(path.read_text()) if path.is_file() else {}               # other parts' numbers stay
    for name in names:
        left = end - time.monotonic() - 2
        result[name] = run_part(name, min(left, PARTS[name][1]), out) if left > 5 else {"status": "no time left"}
        path.write_text(json.dumps(result, indent=1))
        print(f"{name}: {result[name]['status']}", flush=True)
    sys.exit(any(result[name]["status"] != "done" for name in names))


def find_numbers(name) -> None:
    global LAYER, LOSS, STEP, WRITTEN, ROUNDS
    if not GPU:
        LAYER, LOSS, WRITTEN, ROUNDS = (256, 64, 32, 4), (256, 64, 512), 4, 5
        STEP = {"small": ModelConfig(n_layer=1, d_model=64, vocab_size=256, seq_len=32)}
    for what, find in PARTS[name][0]():
        try:
            found = find()
        except Exception as error:                                # this number is lost, and no other
            found = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps({what: found}), flush=True)
        gc.collect()


def run_part(name, seconds, out: Path) -> dict:
    """{"status": "done" or why not, "seconds": ..., number: ...} of a part in a process of its own."""
    start, status = time.monotonic(), "done"
    process = subprocess.Popen([sys.executable, "-u", __file__, "gpu", "--part", "--only", name], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        text, _ = process.communicate(timeout=seconds)
    except BaseException as stop:                                 # also Ctrl-C: whatever the part started goes, too
        os.killpg(process.pid, signal.SIGKILL)
        text, status = process.communicate()[0], f"stopped after {seconds:.0f} s"
        if not isinstance(stop, subprocess.TimeoutExpired):
            raise
    with open(out / "log.txt", "a") as log:
        log.write(f"===== {name}\n{text}\n")
    numbers = {}
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            numbers |= json.loads(line) if line.startswith("{") else {}
    lost = [what for what, found in numbers.items() if isinstance(found, dict) and "failed" in found]
    if status == "done" and (process.returncode or lost):
        status = f"failed: {', '.join(lost) or text.strip().splitlines()[-1:]}"
    return {"status": status, "seconds": round(time.monotonic() - start, 1), **numbers}


# --- command line ---------------------------------------------------------------------------------

BENCHMARKS = {"route": bench_route, "layer": bench_layer, "loss": bench_loss, "step": bench_step,
              "decode": bench_decode, "memory": bench_memory, "hardware": bench_hardware}
TAKE_FILE = ("step", "decode", "memory", "hardware", "all")


def main(argv: list[str]) -> None:
    parser = Parser(allow_abbrev=False, description="throughput and memory, against peers and floors, in one run")
    add = parser.add_argument
    add("what", choices=[*BENCHMARKS, "gpu", "all"], help="what is measured; see the head of this file")
    add("file", nargs="?", help="a config or sweep file instead of the built-in sizes")
    add("--config", help="the same file, by name")
    add("--peers", action="store_true", help="also time transformers and liger-kernel")
    add("--json", help="write the results here; results/draw.py draws them")
    add("--keep_memory", action="store_true", help="as train.py does on a CPU; the peers gain, too")
    add("--cell", help="memory: only this batch,context, such as 1,512")
    add("--estimate", action="store_true", help="memory: run nothing, estimate in bfloat16")
    add("--batch_tokens", type=int, help="hardware: tokens a step (default: the config's)")
    add("--card", action="append", help='hardware: also this card, "name,GB,GB/s,TFLOP/s"')
    add("--budget", type=float, default=560, help="gpu: seconds in all (default %(default)s)")
    add("--out", default="out/gpu", help="gpu: the folder of gpu.json and log.txt (default %(default)s)")
    add("--only", help=f"gpu: these parts, of {','.join(PARTS)}")
    add("--part", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)
    if args.what == "gpu":
        return bench_gpu(args)
    if args.keep_memory:
        keep_freed_memory()
    args.config = args.config or args.file
    require(not args.config or args.what in TAKE_FILE,
            f"{args.what} has sizes of its own and takes no file {args.config}: {', '.join(TAKE_FILE)} do")
    require(not args.json or args.json.endswith(".json"), f"--json {args.json} must end in .json: results/NAME.json")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)         # before anything is measured
    result = {"conditions": conditions(), "benchmarks": {}}
    print(", ".join(f"{name} {value}" for name, value in result["conditions"].items()))
    for name in BENCHMARKS if args.what == "all" else [args.what]:
        result["benchmarks"][name] = BENCHMARKS[name](args)
        gc.collect()
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
        print(f"\n{args.json} is written; `python results/draw.py {args.json}` draws it")


if __name__ == "__main__":
    run_script(main)
