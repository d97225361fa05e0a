"""router.py, the kernels: each against the readable definition, forward and every gradient.

Without a GPU the kernels run under Triton's interpreter. It has to be switched on before triton is first imported, so
it lives in a process of its own (fixture `interpreter`), and this one stays free to compile the kernels ahead of time.
"""

import itertools
import math
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from conftest import no_wait_for_the_gpu, on_a_gpu

import model
import router

triton = pytest.importorskip("triton", reason="triton is not installed: the definition does all the work")
compiles = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 leaves nothing to compile")
INTEGERS = ("experts", "counts", "offsets", "slot", "token", "demand")
HARD = ("random", "one expert", "ties", "nan")


# --- what both sides compute ----------------------------------------------------------------------------------------

def make_logits(n, e, kind):
    """Logits (n, e): random, with one expert taking all (the others empty at K = 1), full of ties, or with bad rows."""
    logits = 2 * torch.randn(n, e, generator=torch.Generator().manual_seed(n + e))
    if kind == "one expert":
        logits[:, e // 2] += 50
    if kind == "ties":
        logits = logits.round() * torch.tensor([0.0, 1.0]).repeat(n)[:n, None]       # 0.0 and -0.0 in every other row
    if kind == "nan" and n:
        logits[::3, e // 2], logits[::5, 0], logits[::7] = math.nan, -math.inf, math.inf
    return logits


def routed(n, e, k, kind="random", renormalize=True, device="cpu", name="softmax", biased=False, **fields):
    """Route, and take the gradient of the logits through weights, balance and z, apart and together: name -> array.

    fields set the config: with a balance_scope, in training behind other micro-batches of the step.
    """
    logits, seed = make_logits(n, e, kind).to(device).requires_grad_(), torch.Generator().manual_seed(e)
    bias = torch.randn(e, generator=seed).mul(0.2).to(device) if biased else None
    context = router.Context(None, n, "balance_scope" in fields, bias, torch.arange(e, device=device))
    routing = router.fast_route(logits, router.RouterConfig(name, k, renormalize=renormalize, **fields), context)
    router.check(routing, n, e)
    mix = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(device)
    parts = {"weights": (routing.weights * mix).sum()} | routing.losses
    parts["all"] = parts["weights"] + 3 * parts["balance"] - 0.5 * parts["z"]
    out = {name: getattr(routing, name).int() for name in INTEGERS}
    out |= {"weights": routing.weights} | routing.losses | routing.stats
    out |= {f"d {name}": torch.autograd.grad(part, logits, retain_graph=True)[0] for name, part in parts.items()}
    return {name: value.detach().cpu().numpy() for name, value in out.items()}


def moved(n, k, d, dtype, device="cpu"):
    """Gather and combine with their gradients: name -> array. Values are small integers: exact in every dtype."""
    slot = router.place(torch.randn(n, 8, generator=torch.Generator().manual_seed(0)).topk(k).indices, 8)[3].to(device)

    def number(*shape):
        return (torch.arange(math.prod(shape)) * 7 % 11 - 5).view(shape).to(device, getattr(torch, dtype))

    x, rows = number(n, d).requires_grad_(), number(n * k, d).requires_grad_()
    out = {"gather": router.gather(x, slot), "combine": router.combine(rows, slot)}
    (out["d x"],) = torch.autograd.grad(out["gather"], x, rows)
    (out["d rows"],) = torch.autograd.grad(out["combine"], rows, x)
    return {name: value.detach().float().cpu().numpy() for name, value in out.items()}


def activated(rows, width, dtype, device="cpu"):
    """SwiGLU with the combine weight folded in, and its gradients: name -> array."""
    h, weight, da = (torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, getattr(torch, dtype))
                     for shape in ((rows, 2 * width), (rows, 1), (rows, width)))
    out = (model.swiglu(h, weight), *model.swiglu_backward(h, da, weight))
    return [value.detach().float().cpu().numpy() for value in out]


def same(kernel, definition):
    """Integers equal bit for bit; weights, losses and gradients to float32 rounding of the terms they are sums of.

    Where terms cancel, a rounding of them is left: terms of 1, or of 1/N in the gradient of a mean over tokens.
    """
    assert kernel.keys() == definition.keys()
    for name, expected in definition.items():
        assert kernel[name].shape == expected.shape and kernel[name].dtype == expected.dtype, name
        if name in INTEGERS or name in ("nonfinite", "gather", "combine", "d x", "d rows"):
            np.testing.assert_array_equal(kernel[name], expected, err_msg=name)
        else:
            term = 1 / max(len(expected), 1) if name in ("d balance", "d z") else 1
            np.testing.assert_allclose(kernel[name], expected, rtol=1e-5, atol=2e-6 * term, err_msg=name)


def start_interpreter():
    """Runs first in the child: the kernels take every tensor there, and say so if the interpreter is not on."""
    torch.set_num_threads(1)
    np.seterr(all="ignore")                                                          # NaN rows are part of the test
    assert triton.knobs.runtime.interpret
    router.use_kernels = model.use_kernels = lambda x: True


@pytest.fixture(scope="module")
def interpreter():
    """A process in which triton.jit interprets: `interpreter(function, *args)` runs the function there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")                                        # the child reads it as it starts
        pool = ProcessPoolExecutor(1, get_context("spawn"), start_interpreter)
        pool.submit(int).result()
    with pool:
        yield lambda function, *args, **fields: pool.submit(function, *args, **fields).result()


# --- under the interpreter ------------------------------------------------------------------------------------------

SOFTMAX = [(1, 1, 1), (7, 1, 1), (64, 2, 1), (7, 2, 2), (1, 7, 3), (257, 7, 7), (0, 16, 2), (64, 16, 8), (257, 16, 2),
           (64, 16, 16), (7, 60, 8), (64, 60, 3), (257, 60, 1), (64, 128, 1), (257, 128, 8), (7, 128, 32),
           (64, 256, 8), (7, 256, 2), (9, 1000, 8), (7, 40, 33)]                     # K > 32: the definition serves it
SIGMOID = [(n, e, k) for n in (0, 1, 7, 64) for e, k in ((1, 1), (7, 1), (7, 2), (16, 2), (16, 8), (60, 1), (60, 8))]
CASES = ([(shape, dict()) for shape in SOFTMAX]
         + [(shape, dict(name="sigmoid", biased=True)) for shape in SIGMOID]
         + [(shape, dict(kind=kind)) for shape in ((257, 16, 1), (64, 60, 8), (64, 7, 7)) for kind in HARD[1:]]
         + [((64, 60, 8), dict(kind=kind, biased=True)) for kind in HARD]
         + [((64, 60, 8), dict(kind=kind, name="sigmoid")) for kind in HARD]
         + [((33, 16, 1), dict(name="switch"))])


@pytest.mark.parametrize(("shape", "how"), CASES, ids=str)
def test_route_kernels_equal_the_definition_forward_and_every_gradient(interpreter, shape, how):
    for renormalize in (True, False):
        fields = how | dict(renormalize=renormalize)
        same(interpreter(routed, *shape, **fields), routed(*shape, **fields))


@pytest.mark.parametrize("fields", [dict(balance_scope="global"), dict(eval_capacity_factor=0.7),
                                    dict(balance_scope="global", capacity_factor=0.7, name="sigmoid", biased=True)])
def test_route_kernels_serve_the_global_balance_loss_and_a_capacity(interpreter, fields):
    kernel, definition = interpreter(routed, 70, 16, 4, **fields), routed(70, 16, 4, **fields)
    same(kernel, definition)
    assert (definition["dropped"] > 0) == ("capacity_factor" in str(fields))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("n", "k", "d"), [(0, 2, 8), (1, 1, 1), (7, 8, 60), (33, 3, 2500)])
def test_gather_and_combine_kernels_equal_the_definition_in_every_dtype(interpreter, n, k, d, dtype):
    same(interpreter(moved, n, k, d, dtype), moved(n, k, d, dtype))


def near(kernel, definition, tolerance):
    for ours, theirs in zip(kernel, definition, strict=True):
        scale = max(1, np.abs(theirs).max(initial=0))
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2), ("float16", 3e-3)])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (7, 60), (33, 768)])
def test_swiglu_kernels_equal_the_definition_in_every_dtype(interpreter, rows, width, dtype, tolerance):
    near(interpreter(activated, rows, width, dtype), activated(rows, width, "float32"), tolerance)


def fills():
    """How many tensors are filled with zeros for the backward pass of a routing whose weights are all that is used."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Count.n += "zero" in str(function)
            return function(*args, **(kwargs or {}))

    logits = make_logits(64, 16, "random").requires_grad_()
    routing = router.fast_route(logits, router.RouterConfig("softmax", 4))
    total = routing.weights.square().sum() + routing.losses["balance"] + routing.losses["z"]
    with Count():
        total.backward()
    return Count.n


def test_backward_makes_no_zeros_for_what_has_no_gradient(interpreter):
    """Two for the pair of losses that are picked out of one tensor; six more where torch fills in gradients."""
    assert interpreter(fills) <= 4


def test_kernels_give_the_same_bits_every_time(interpreter):
    first, second = (interpreter(routed, 257, 16, 2) for _ in range(2))
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


# --- on a GPU -------------------------------------------------------------------------------------------------------

@on_a_gpu
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize(("n", "e", "k"), [(0, 16, 4), (1, 16, 4), (16384, 16, 4), (16384, 128, 8), (16001, 60, 8),
                                           (16384, 256, 8), (4099, 1000, 32), (4099, 64, 64)])
def test_on_a_gpu_routing_equals_the_definition_on_the_cpu_and_gives_the_same_bits_every_time(n, e, k, kind):
    for renormalize in (True, False):
        found, again = (routed(n, e, k, kind, renormalize, "cuda") for _ in range(2))
        same(found, routed(n, e, k, kind, renormalize))
        assert all(found[name].tobytes() == again[name].tobytes() for name in found)


@on_a_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 5e-2), ("float16", 5e-3)])
def test_on_a_gpu_swiglu_gather_and_combine_equal_the_definition_on_the_cpu(dtype, tolerance):
    near(activated(512, 768, dtype, "cuda"), activated(512, 768, dtype), tolerance)
    for d in (60, 256, 2048, 5120):
        same(moved(2048, 8, d, dtype, "cuda"), moved(2048, 8, d, dtype))


@on_a_gpu
def test_on_a_gpu_nothing_waits_for_the_gpu():
    config = router.RouterConfig("softmax", 8)
    logits = torch.randn(4096, 128, device="cuda", requires_grad=True)
    x = torch.randn(4096, 64, device="cuda", requires_grad=True)

    def step():
        plan = router.fast_route(logits, config)
        y = router.combine(router.gather(x, plan.slot), plan.slot)
        (y.sum() + plan.weights.sum() + plan.losses["balance"] + plan.losses["z"]).backward()

    step()                                                                           # compiles
    with no_wait_for_the_gpu():
        step()


# --- compiled ahead of time -----------------------------------------------------------------------------------------

def source(kernel, dtypes, constants):
    """What triton.compile wants in place of tensors: a type for each argument, all in multiples of 16."""
    from triton.compiler import ASTSource

    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else dtypes.get(name, "*fp32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    return ASTSource(kernel, signature, constants, aligned)


def kernels(e, k, **tokens):
    """Every kernel of the file as (name, source, warps), with the launch shapes that router.py would give it.

    Triton compiles an argument that is 1 as a constant of its own: `tokens` says so, N=1, T=1.
    """
    ints = dict.fromkeys((*INTEGERS, "hist", "ends"), "*i32") | dict.fromkeys("NTD", "i32")
    shape = router.tiling(e)
    warps = shape.pop("num_warps")
    sizes = {"E": e, "K": k, "BLOCK_K": triton.next_power_of_2(k), "BLOCK_T": 8192 // shape["BLOCK_E"]} | shape | tokens
    yield "place_rows", source(router.place_rows, ints, sizes), 4
    yield "totals", source(router.totals, ints, sizes), 8
    for sigmoid, biased, renormalize in itertools.product((False, True), repeat=3):
        how = sizes | {"SIGMOID": sigmoid, "RENORMALIZE": renormalize} | ({} if biased else {"bias": None})
        form = f"sigmoid={sigmoid} renormalize={renormalize}" + ("" if renormalize else " rare")
        yield (f"route_fwd {form} biased={biased}" + ("" if sigmoid == biased else " rare"),
               source(router.route_fwd, ints, how), warps)
        if not biased:                                                               # the bias has no gradient
            yield f"route_bwd {form}", source(router.route_bwd, ints, how), warps
    for kind in ("*fp32", "*bf16", "*fp16"):
        types = {"width": "i32"} | dict.fromkeys(("h", "a", "da", "dh"), kind)       # weight and dweight are float32
        for kernel, width in itertools.product((model.swiglu_fwd, model.swiglu_bwd), (768, 8192)):
            shape = model.row_launch(width)
            warps = shape.pop("num_warps")
            yield f"{kernel.__name__} {kind} {width}", source(kernel, types, shape), warps
        for kernel in (router.gather_rows, router.combine_rows):
            types = ints | {"x": kind, "rows": kind}
            yield f"{kernel.__name__} {kind}", source(kernel, types, {"K": k, "BLOCK_D": 2048}), 8


def compile_for(capability, code, warps):
    from triton.backends.compiler import GPUTarget

    return triton.compile(code, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def registers_and_spills(compiled, capability):
    """Registers a thread and bytes spilt, as ptxas -v reports them for the kernel's PTX."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={sm_arch_from_capability(capability)}", file.name,
                   "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    return int(re.search(r"Used (\d+) registers", report)[1]), int(spills[1]) + int(spills[2])


@pytest.mark.slow
@compiles
@pytest.mark.parametrize(("capability", "e", "k"), [(80, 128, 8), (89, 128, 8), (90, 128, 8), (100, 128, 8),
                                                    (80, 16, 4), (90, 16, 4), (90, 60, 32), (90, 256, 8),
                                                    (80, 1024, 32), (90, 1024, 32), (100, 1024, 8)])
def test_every_kernel_compiles_for_four_generations_of_gpus_without_spilling(capability, e, k):
    for name, code, warps in kernels(e, k):
        if (capability, e) != (90, 128) and re.search("fp16|rare", name):
            continue                                                                 # once is enough
        compiled = compile_for(capability, code, warps)
        registers, spilt = registers_and_spills(compiled, capability)
        assert spilt == 0 and registers <= 65536 // (32 * warps), f"{name}: {registers} registers, {spilt} bytes spilt"


@pytest.mark.slow
@compiles
def test_the_backward_kernel_and_that_which_places_rows_sum_within_a_thread():
    """With sums that begin as tl.zeros, or with eight warps, they go through 4 and 16 KiB of shared memory."""
    for name, code, warps in kernels(128, 8):
        if name.startswith(("route_bwd", "place_rows")):
            assert compile_for(90, code, warps).metadata.shared == 0, name


def test_a_program_takes_32_tokens_whatever_the_number_of_experts():
    assert {router.tiling(e)["TILE"] for e in (2, 16, 128, 1000)} == {32}


@pytest.mark.slow
@compiles
def test_the_kernels_compile_for_a_single_token_too():
    assert all(compile_for(90, code, warps).asm["cubin"] for _, code, warps in kernels(16, 4, N=1, T=1))
