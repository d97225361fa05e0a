"""
router.py: which experts does a token visit, and with what weight?

A mixture-of-experts layer owns E small feed-forward networks and sends each token to K of them. The router is the part
that decides. It sees one row of E logits for a token and must answer three questions:

    which K experts?      the largest logits, the lowest index first among equals
    with what weight?     their softmax probabilities, renormalised to sum to 1 or left as they are
    in what order?        rows sorted by expert, so that each expert multiplies one contiguous block

Everything downstream reads the answer from one object, `Routing`. A new routing idea is one function that fills it
in and one decorator that names it: see `softmax_topk`, and then write your own below it.

The file reads in five parts: the contract; its definition in plain PyTorch, which runs anywhere; the policies; the same
thing again as Triton kernels, which is what a GPU runs; and a self-check, `python router.py`, that sets one against
the other. The kernels are tested against the definition, forward and every gradient.

Axes, everywhere in this file:
    N tokens    E experts    K experts a token visits (top-k)    R = N * K routed rows (known without asking the GPU)
    D width of a token's vector    T tiles of tokens, one tile a kernel program
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
    jit, constexpr = triton.jit, tl.constexpr
except ImportError:                                   # macOS, for one: the definition does all the work
    triton, tl, jit, constexpr = None, None, lambda kernel: kernel, None

# --- the contract ---------------------------------------------------------------------------------------------------


@dataclass
class Routing:
    """The plan a policy makes for N tokens. A choice is one (token, k) pair; its flat number is token * K + k.

    weights  (N, K) float32   how much each chosen expert's output counts; 0 for a dropped choice; carries gradient
    experts  (N, K) int32     the chosen experts, distinct within a token
    counts   (E,)   int32     rows each expert received
    offsets  (E,)   int32     running sum of counts, inclusive: expert e owns rows offsets[e] - counts[e] : offsets[e]
    slot     (N, K) int32     the row of each choice once rows stand in expert order, ties in token order
    token    (R,)   int32     the inverse of slot: row r holds choice token[r], that is token number token[r] // K
    losses   name -> scalar   "balance" and "z", with gradient to the logits
    stats    name -> float32  "load" (E,), "entropy", "dropped", "nonfinite": detached, never copied to the host here
    """

    weights: Tensor
    experts: Tensor
    counts: Tensor
    offsets: Tensor
    slot: Tensor
    token: Tensor
    losses: dict[str, Tensor]
    stats: dict[str, Tensor]


@dataclass
class Policy:
    """A routing idea and what it promises. `causal`: no later token, and no other row, can change a token's output."""

    route: Callable[[Tensor, SimpleNamespace], Routing]
    causal: bool


POLICIES: dict[str, Policy] = {}


def policy(name: str, causal: bool):
    """Register `route(logits, config) -> Routing` under the name that `router = "name"` in a config file asks for."""

    def register(function):
        POLICIES[name] = Policy(function, causal)
        return function

    return register


def route(logits: Tensor, config) -> Routing:
    """Route logits (N, E) float32 by the policy config.router; config holds top_k too, and what that policy reads."""
    assert logits.dtype == torch.float32, "router logits are float32 whatever the precision around them"
    assert 1 <= config.top_k <= logits.shape[-1], "a token visits between 1 and E experts"
    return POLICIES[config.router].route(logits, config)


# --- the definition: the pieces every policy is built from -----------------------------------------------------------


def finite_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Replace each row that holds a NaN or an infinity by zeros: the token goes to experts 0 ... K-1, equally weighted.

    The rest of the batch is then routed as ever, and the row is counted in stats["nonfinite"] instead of spreading.
    """
    finite = logits.abs().amax(-1, keepdim=True) < torch.inf                         # False for NaN too
    return logits.where(finite, 0.0), (~finite).sum().float()


def top_k(scores: Tensor, k: int) -> Tensor:
    """Experts (N, k) int32 with the largest finite scores (N, E), largest first, the lowest index first among equals.

    k rounds of "take the maximum, strike it out". torch.max promises the first of equals; torch.topk promises nothing,
    and a stable sort of all E, which does, costs three times as much at E = 128.
    """
    left = scores.detach().clone()
    rounds = []
    for _ in range(k):
        rounds.append(left.max(-1, keepdim=True).indices)                            # (N, 1)
        left.scatter_(-1, rounds[-1], -torch.inf)
    return torch.cat(rounds, -1).int()


def invert(permutation: Tensor) -> Tensor:
    """The inverse of a permutation (R,) of 0 ... R-1. A scatter, not a sort: every index is written exactly once."""
    index = torch.arange(len(permutation), dtype=permutation.dtype, device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation.long(), index)


def place(experts: Tensor, n_expert: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stable counting sort of the choices (N, K) by expert: returns counts, offsets, slot, token (see Routing)."""
    flat = experts.flatten()                                                         # (R,)
    token = flat.argsort(stable=True).int()                                          # (R,) row -> choice
    counts = torch.zeros(n_expert, dtype=torch.int32, device=flat.device)
    counts.scatter_add_(0, flat.long(), torch.ones_like(flat))                       # bincount would wait for the GPU
    return counts, counts.cumsum(0, dtype=torch.int32), invert(token).view(experts.shape), token


def balance_loss(probs: Tensor, counts: Tensor) -> Tensor:
    """Switch balance loss: E * sum_e f_e P_e, f_e the share of rows, P_e the mean probability (Fedus 2021, eq. 4-6).

    f_e is a share of all R rows, so perfect balance costs exactly 1 for any K (transformers counts per token: K there).
    Only P_e carries gradient; f_e is a count. All tokens on the same K experts with all their mass cost E / K.
    """
    n_rows = counts.sum().clamp(min=1)
    return probs.shape[-1] * (counts / n_rows * mean_over_tokens(probs)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Router z-loss: mean over tokens of logsumexp(logits)^2, which keeps the logits small (Zoph 2022, eq. 5)."""
    return mean_over_tokens(logits.logsumexp(-1).square())


def mean_over_tokens(x: Tensor) -> Tensor:
    """Mean over the first axis; 0, not NaN, when there is no token at all."""
    return x.sum(0) / max(x.shape[0], 1)


def finish(logits: Tensor, probs: Tensor, weights: Tensor, experts: Tensor, nonfinite: Tensor) -> Routing:
    """Everything that follows once a policy has chosen: rows in expert order, the losses, the statistics.

    In inference mode, while text is written, nobody asks for losses and statistics: both are empty there.
    """
    counts, offsets, slot, token = place(experts, logits.shape[-1])
    if torch.is_inference_mode_enabled():
        return Routing(weights, experts, counts, offsets, slot, token, {}, {})
    with torch.no_grad():
        stats = {
            "load": counts / max(experts.numel(), 1),                                # (E,) share of rows
            "entropy": mean_over_tokens(-(probs * probs.clamp(min=1e-38).log()).sum(-1)),  # nats; ln E when undecided
            "dropped": (weights == 0).sum() / max(weights.numel(), 1),               # share of choices of weight 0
            "nonfinite": nonfinite,                                                  # tokens
        }
    losses = {"balance": balance_loss(probs, counts), "z": z_loss(logits)}
    return Routing(weights, experts, counts, offsets, slot, token, losses, stats)


# --- policies -------------------------------------------------------------------------------------------------------


def softmax_topk(logits: Tensor, config) -> Routing:
    """Dropless top-k of a softmax: p = softmax(logits), the K largest p, divided by their sum if config.renormalize.

    Qwen3-MoE and Mixtral renormalise; OLMoE does not. Renormalised, softmax and top-k may be done in either order; left
    as they are, the weights say how much mass the token gives to the experts it did not visit. The choice is made
    on the logits: softmax keeps their order, but its rounding can make two of them equal.
    """
    logits, nonfinite = finite_rows(logits)
    experts = top_k(logits, config.top_k)                                            # (N, K)
    probs = logits.softmax(-1)                                                       # (N, E)
    weights = probs.gather(-1, experts.long())                                       # (N, K)
    if config.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return finish(logits, probs, weights, experts, nonfinite)


@policy("softmax", causal=True)
def softmax(logits: Tensor, config) -> Routing:
    """`softmax_topk`, by its kernels on a GPU. K <= 32 and E <= 1024 there: a tile of tokens must fit in registers."""
    fits = len(logits) > 0 and config.top_k <= 32 and logits.shape[-1] <= 1024
    return (softmax_kernels if fits and use_kernels(logits) else softmax_topk)(logits, config)


def use_kernels(x: Tensor) -> bool:
    """Whether the Triton kernels below take this tensor: the one place that decides."""
    return triton is not None and x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


# --- moving rows ----------------------------------------------------------------------------------------------------
# Into expert order and back. Each is the other's gradient, and both read the same index, slot (N, K): where the copies
# of a token stand. Going by slot, a token is read once and written K times; going by row, it would be read K times.


def gather(x: Tensor, slot: Tensor) -> Tensor:
    """Copy tokens into expert order: x (N, D), slot (N, K) -> (R, D). Its gradient is `combine`."""
    return Gather.apply(x, slot)


def combine(rows: Tensor, slot: Tensor) -> Tensor:
    """Sum the K rows of each token in float32, in the order of k: rows (R, D), slot (N, K) -> (N, D).

    No atomics and one fixed order: the same bits every time. Its gradient is `gather`.
    """
    return Combine.apply(rows, slot)


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slot):
        ctx.save_for_backward(slot)
        if use_kernels(x) and len(slot):
            return run_rows(gather_rows, x.contiguous(), slot, slot.numel())
        return x.index_select(0, invert(slot.flatten()) // slot.shape[1])

    @staticmethod
    def backward(ctx, d_rows):
        return Combine.apply(d_rows, *ctx.saved_tensors), None


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, slot):
        ctx.save_for_backward(slot)
        if use_kernels(rows) and len(slot):
            return run_rows(combine_rows, rows.contiguous(), slot, len(slot))
        return F.embedding_bag(slot, rows, mode="sum")                               # a CPU: 6 to 11 times index + sum

    @staticmethod
    def backward(ctx, d_x):
        return Gather.apply(d_x, *ctx.saved_tensors), None


# --- the kernels ----------------------------------------------------------------------------------------------------
# The definition passes over the (N, E) logits 20 + K times forward and 21 times back, in some ninety launches, and
# sorts R integers between. At N = 16,384, E = 128, K = 8 one pass is 8.4 MB, a few microseconds of memory; a launch
# costs about as much. So: read the logits once, keep the tile in registers, write only what the contract asks for.
#
#   route_fwd    a tile of tokens: scores, top-k, weights, and the tile's own sums: rows per expert, probability, losses
#   cumsum       over those rows per expert, tile after tile, expert after expert: where each tile's rows begin (torch)
#   place_rows   a tile of choices: its rows begin there, and its own order is a running sum down the tile. No sort
#   totals       adds up the tiles: counts, losses, statistics
#   route_bwd    the gradients of weights, balance and z, in one pass over the logits
#
# Nothing is added atomically, so nothing depends on which program runs first: the same bits every time. A tile is a
# power of two each way (Triton's rule) and is masked down to N and E. N * E may pass 2^31: such offsets are int64.


def tiling(n_expert: int) -> dict:
    """Launch shape: a program takes TILE tokens, ROWS at a time: 16 logits a thread in registers, 32 at E = 1024.

    At N = 16,384 that is 256 programs for E < 128 and 512 above, for the 132 multiprocessors of an H200.
    """
    block_e = max(16, 1 << (n_expert - 1).bit_length())                              # the next power of two
    tile = 32 if block_e >= 128 else 64
    rows = min(tile, max(8, 4096 // block_e))                                        # 8: a row to a warp, at least
    return {"TILE": tile, "ROWS": rows, "BLOCK_E": block_e, "num_warps": 8 if rows * block_e >= 4096 else 4}


@jit
def route_fwd(logits, weights, experts, lse, hist, sums, N, T, E: constexpr, K: constexpr, RENORMALIZE: constexpr,
              TILE: constexpr, ROWS: constexpr, BLOCK_E: constexpr, BLOCK_K: constexpr):
    """Reads the logits once, 4 N E bytes; writes weights, experts, lse, 4 N (2K + 1), and the tile sums, 4 T (2E + 4).

    A warp holds whole rows, so a maximum over experts never leaves it. K rounds of maximum need no sort and no memory:
    floats become integers of the same order, because a warp reduces an int32 in one instruction (redux.sync, 8.0 on).
    """
    LOWEST: constexpr = -0x80000000                                                  # below every float: struck out
    tile = tl.program_id(0)
    e, kk, s = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)[None, :], tl.arange(0, 4)
    real = (e < E)[None, :]
    load, mass = tl.zeros((BLOCK_E,), tl.int32), tl.zeros((BLOCK_E,), tl.float32)
    rest = tl.zeros((ROWS, 4), tl.float32)                                           # z, entropy, dropped, nonfinite
    for step in range(TILE // ROWS):
        base = tile.to(tl.int64) * TILE + step * ROWS
        n = tl.arange(0, ROWS)
        live = n < N - base
        x = tl.load(logits + base * E + (n[:, None] * E + e[None, :]), live[:, None] & real, other=0.0)
        finite = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1) < 0x7F800000   # (ROWS,): no exponent of all ones
        x = tl.where(finite[:, None], x, 0.0) + 0.0                                  # -0.0 + 0.0 = 0.0: they are equal
        bits = x.to(tl.int32, bitcast=True)
        key = tl.where(real, bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST)             # integers in the order of floats
        top = tl.max(key, 1)
        top = (top ^ ((top >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)        # and back
        shifted = tl.maximum(x - top[:, None], -200.0)                               # never -inf; exp is 0 long before
        p = tl.where(real, tl.exp(shifted), 0.0)
        total = tl.sum(p, 1)
        log_z = top + tl.log(total)

        choice = tl.zeros((ROWS, BLOCK_K), tl.int32)
        value = tl.zeros((ROWS, BLOCK_K), tl.int32)
        for k in range(K):
            best = tl.max(key, 1)
            winner = tl.min(tl.where(key == best[:, None], e[None, :], BLOCK_E), 1)  # the lowest index among equals
            key = tl.where(e[None, :] == winner[:, None], LOWEST, key)
            choice = tl.where(kk == k, winner[:, None], choice)
            value = tl.where(kk == k, best[:, None], value)

        value = (value ^ ((value >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        w = tl.where(kk < K, tl.exp(value - top[:, None]), 0.0)
        w *= (1.0 / (tl.sum(w, 1) if RENORMALIZE else total))[:, None]
        at, kept = base * K + (n[:, None] * K + kk), live[:, None] & (kk < K)
        tl.store(weights + at, w, kept)
        tl.store(experts + at, choice, kept)
        tl.store(lse + base + n, tl.where(finite, log_z, float("inf")), live)        # inf: a row without gradient

        p *= tl.where(live, 1.0 / total, 0.0)[:, None]
        load += tl.sum(((key == LOWEST) & real & live[:, None]).to(tl.int32), 0)
        mass += tl.sum(p, 0)
        entropy = tl.log(total) - tl.sum(p * shifted, 1)                             # -sum p log p
        dropped = tl.sum((kept & (w == 0.0)).to(tl.float32), 1)
        two = tl.where(s[None, :] == 0, (log_z * log_z)[:, None], entropy[:, None])
        more = tl.where(s[None, :] == 2, dropped[:, None], (finite == 0).to(tl.float32)[:, None])
        rest += tl.where(live[:, None], tl.where(s[None, :] < 2, two, more), 0.0)

    tl.store(hist + e * T + tile, load, e < E)
    tl.store(sums + e * T + tile, mass, e < E)
    tl.store(sums + (E + s) * T + tile, tl.sum(rest, 0))


@jit
def place_rows(experts, ends, slot, token, N, T, E: constexpr, K: constexpr,
               TILE: constexpr, ROWS: constexpr, BLOCK_E: constexpr):
    """The stable counting sort of one tile. Reads experts, 4 N K bytes, writes slot and token, 8 N K.

    ends[e, t] counts the rows of experts before e, and of e in tiles up to t: the entry before it is where tile t's
    rows of e begin. From there the rank of a choice is the number of earlier tokens in the tile with the same expert:
    the exclusive running sum down the tile's multi-hot mask. Stable by construction, and every row has one writer.
    """
    tile = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    flat = e * T + tile
    begin = tl.load(ends + flat - 1, (e < E) & (flat > 0), other=0)
    for step in range(TILE // ROWS):
        base = tile * TILE + step * ROWS                                             # R fits an int32: so does this
        n = tl.arange(0, ROWS)
        rank = tl.full((ROWS, BLOCK_E), K, tl.int32)
        for k in range(K):
            expert = tl.load(experts + (base + n) * K + k, base + n < N, other=-1)
            rank = tl.where(e[None, :] == expert[:, None], k, rank)
        hot = (rank < K).to(tl.int32)
        row = begin[None, :] + tl.cumsum(hot, 0) - hot                               # (ROWS, BLOCK_E)
        choice = (base + n)[:, None] * K + rank
        tl.store(slot + choice, row, rank < K)
        tl.store(token + row, choice, rank < K)
        begin += tl.sum(hot, 0)


@jit
def totals(ends, sums, counts, offsets, load, scalars, N, T,
           E: constexpr, K: constexpr, BLOCK_E: constexpr, BLOCK_T: constexpr):
    """One program adds up the tiles: reads 4 T (E + 4) bytes. scalars: balance, z, entropy, dropped, nonfinite."""
    e, s, t = tl.arange(0, BLOCK_E), tl.arange(0, 4), tl.arange(0, BLOCK_T)
    real = e < E
    end = tl.load(ends + e * T + T - 1, real, other=0)
    count = end - tl.load(ends + e * T - 1, real & (e > 0), other=0)
    share = count.to(tl.float32) / (N * K)                                           # f_e
    tl.store(counts + e, count, real)
    tl.store(offsets + e, end, real)
    tl.store(load + e, share, real)
    mass = tl.zeros((BLOCK_E, BLOCK_T), tl.float32)                                  # N P_e, a column a tile
    rest = tl.zeros((4, BLOCK_T), tl.float32)
    for first in range(0, T, BLOCK_T):
        inside = first + t < T
        mass += tl.load(sums + e[:, None] * T + first + t[None, :], real[:, None] & inside[None, :], other=0.0)
        rest += tl.load(sums + (E + s)[:, None] * T + first + t[None, :], inside[None, :], other=0.0)
    tl.store(scalars, E * tl.sum(share * tl.sum(mass, 1), 0) / N)
    scale = tl.where(s == 2, 1.0 / (N * K), tl.where(s == 3, 1.0, 1.0 / N))          # a share, a count, two means
    tl.store(scalars + 1 + s, tl.sum(rest, 1) * scale)


@jit
def route_bwd(logits, lse, weights, experts, load, d_weights, d_scalars, d_logits, N,
              E: constexpr, K: constexpr, RENORMALIZE: constexpr, ROWS: constexpr, BLOCK_E: constexpr):
    """Reads the logits once more and writes their gradient: 8 N E bytes, and 4 N (3K + 1) for weights, experts and lse.

    The definition keeps probs, weights and the top-k's scores for autograd. Here p comes back as exp(x - lse), and:
        weights as they are    dx_e = p_e ([e chosen] dw_e - sum_j w_j dw_j)
        renormalised           dx_e = w_e (dw_e - sum_j w_j dw_j) for chosen e: w is a softmax of the chosen logits
        balance                dx_e = p_e (g_e - sum_i p_i g_i), g_e = E f_e / N
        z                      dx_e = p_e 2 lse / N
    """
    base = tl.program_id(0).to(tl.int64) * ROWS
    n, e = tl.arange(0, ROWS), tl.arange(0, BLOCK_E)
    live, real = n < N - base, e < E
    at = base * E + n[:, None] * E + e[None, :]
    x = tl.load(logits + at, live[:, None] & real[None, :], other=float("-inf"))
    log_z = tl.load(lse + base + n, live, other=0.0)
    p = tl.exp(x - log_z[:, None])

    w_dw = tl.zeros((ROWS, BLOCK_E), tl.float32)                                     # w_e dw_e, 0 where not chosen
    w_chosen = tl.zeros((ROWS, BLOCK_E), tl.float32)
    for k in range(K):
        choice = base * K + n * K + k
        hit = e[None, :] == tl.load(experts + choice, live, other=-1)[:, None]
        w = tl.load(weights + choice, live, other=0.0)
        dw = tl.load(d_weights + choice, live, other=0.0)
        w_dw = tl.where(hit, (w * dw)[:, None], w_dw)
        w_chosen = tl.where(hit, w[:, None], w_chosen)
    spread = w_chosen if RENORMALIZE else p
    dx = w_dw - spread * tl.sum(w_dw, 1)[:, None]

    g = tl.load(d_scalars) * E / N * tl.load(load + e, real, other=0.0)              # (BLOCK_E,)
    z = tl.load(d_scalars + 1) * 2.0 / N * log_z                                     # (ROWS,)
    dx += p * (g[None, :] - tl.sum(p * g[None, :], 1)[:, None] + z[:, None])
    dx = tl.where((log_z < float("inf"))[:, None], dx, 0.0)                          # a row replaced by zeros
    tl.store(d_logits + at, dx, live[:, None] & real[None, :])


@jit
def gather_rows(x, slot, rows, D, K: constexpr, BLOCK_D: constexpr):
    """A token's vector to its K rows: moves D (N + R) elements. Row by row it would be 2 D R: 1.8 times, K = 8."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    vector = tl.load(x + n * D + d, d < D)
    for k in tl.static_range(K):
        row = tl.load(slot + n * K + k).to(tl.int64)
        tl.store(rows + row * D + d, vector, d < D)


@jit
def combine_rows(rows, slot, x, D, K: constexpr, BLOCK_D: constexpr):
    """K rows to their token: D (R + N) elements. index_add_ would add atomically, in another order every run."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for k in tl.static_range(K):                                                     # unrolled: K loads in flight
        row = tl.load(slot + n * K + k).to(tl.int64)
        total += tl.load(rows + row * D + d, d < D, other=0.0).to(tl.float32)
    tl.store(x + n * D + d, total.to(x.dtype.element_ty), d < D)


# --- the kernels: launching them ------------------------------------------------------------------------------------


def run_route_fwd(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, ...]:
    """Returns weights and experts (N, K), lse (N,), ends (E, T) int32 and sums (E + 4, T): see route_fwd."""
    (n, n_expert), shape = logits.shape, tiling(logits.shape[1])
    n_tile = triton.cdiv(n, shape["TILE"])
    weights, lse, sums = logits.new_empty(n, k), logits.new_empty(n), logits.new_empty(n_expert + 4, n_tile)
    experts = logits.new_empty(n, k, dtype=torch.int32)
    hist = logits.new_empty(n_expert, n_tile, dtype=torch.int32)
    route_fwd[(n_tile,)](logits, weights, experts, lse, hist, sums, n, n_tile, n_expert, k, renormalize,
                         BLOCK_K=triton.next_power_of_2(k), **shape)
    return weights, experts, lse, hist.view(-1).cumsum(0, dtype=torch.int32).view_as(hist), sums


def run_place(experts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Returns slot (N, K) and token (R,), both int32."""
    (n, k), (n_expert, n_tile) = experts.shape, ends.shape
    slot, token = torch.empty_like(experts), experts.new_empty(n * k)
    place_rows[(n_tile,)](experts, ends, slot, token, n, n_tile, n_expert, k, **tiling(n_expert))
    return slot, token


def run_totals(ends: Tensor, sums: Tensor, n: int, k: int) -> tuple[Tensor, ...]:
    """Returns counts and offsets (E,) int32, load (E,) and the five scalars."""
    n_expert, n_tile = ends.shape
    block_e = tiling(n_expert)["BLOCK_E"]
    counts, offsets = ends.new_empty(n_expert), ends.new_empty(n_expert)
    load, scalars = sums.new_empty(n_expert), sums.new_empty(5)
    totals[(1,)](ends, sums, counts, offsets, load, scalars, n, n_tile, n_expert, k,
                 BLOCK_E=block_e, BLOCK_T=max(8192 // block_e, 1), num_warps=8)
    return counts, offsets, load, scalars


def run_route_bwd(saved: tuple[Tensor, ...], d_weights: Tensor, d_scalars: Tensor, renormalize: bool) -> Tensor:
    """Returns the gradient of the logits (N, E); saved is what `SoftmaxTopK` kept."""
    logits, weights, d_logits = saved[0], saved[2], torch.empty_like(saved[0])
    (n, n_expert), shape = logits.shape, tiling(logits.shape[1])
    del shape["TILE"]
    route_bwd[(triton.cdiv(n, shape["ROWS"]),)](*saved, d_weights.contiguous(), d_scalars.contiguous(), d_logits, n,
                                                n_expert, weights.shape[1], renormalize, **shape)
    return d_logits


def run_rows(kernel, source: Tensor, slot: Tensor, n_row: int) -> Tensor:
    """Launch gather_rows or combine_rows: one program a token and 2048 columns, 16 bytes a thread in bfloat16."""
    (n, k), d = slot.shape, source.shape[1]
    out = source.new_empty(n_row, d)
    block = min(2048, triton.next_power_of_2(d))
    kernel[(n, triton.cdiv(d, block))](source, slot.contiguous(), out, d, k, block, num_warps=max(1, block // 256))
    return out


class SoftmaxTopK(torch.autograd.Function):
    """The kernels behind `softmax_topk`. Keeps the logits for the backward pass, and 2K + 1 numbers a token."""

    @staticmethod
    def forward(ctx, logits, k, renormalize):
        logits = logits.contiguous()
        weights, experts, lse, ends, sums = run_route_fwd(logits, k, renormalize)
        counts, offsets, load, scalars = run_totals(ends, sums, len(logits), k)
        slot, token = run_place(experts, ends)
        ctx.save_for_backward(logits, lse, weights, experts, load)
        ctx.renormalize = renormalize
        ctx.mark_non_differentiable(experts, counts, offsets, slot, token, load)
        return weights, experts, counts, offsets, slot, token, load, scalars

    @staticmethod
    @once_differentiable
    def backward(ctx, d_weights, *others):
        return run_route_bwd(ctx.saved_tensors, d_weights, others[-1], ctx.renormalize), None, None


def softmax_kernels(logits: Tensor, config) -> Routing:
    """`softmax_topk` through the kernels: the same Routing, weights and losses to rounding, everything else exactly."""
    *plan, load, scalars = SoftmaxTopK.apply(logits, config.top_k, bool(config.renormalize))
    names = ("entropy", "dropped", "nonfinite")
    stats = {"load": load} | dict(zip(names, scalars.detach()[2:].unbind()))
    return Routing(*plan, {"balance": scalars[0], "z": scalars[1]}, stats)


# --- the self-check -------------------------------------------------------------------------------------------------


def check(routing: Routing, n_token: int, n_expert: int, k: int) -> None:
    """Assert every line of the contract that can be read off one Routing."""
    rows = n_token * k
    flat = routing.experts.flatten().long()
    assert routing.weights.shape == routing.experts.shape == routing.slot.shape == (n_token, k)
    assert routing.weights.dtype == torch.float32 and routing.weights.isfinite().all() and (routing.weights >= 0).all()
    for name in ("experts", "counts", "offsets", "slot", "token"):
        assert getattr(routing, name).dtype == torch.int32, name
    assert ((flat >= 0) & (flat < n_expert)).all(), "an expert that does not exist"
    assert all(len(set(row)) == k for row in routing.experts.tolist()), "a token visits the same expert twice"
    assert torch.equal(routing.counts.long(), torch.bincount(flat, minlength=n_expert)), "counts"
    assert torch.equal(routing.offsets, routing.counts.cumsum(0, dtype=torch.int32)), "offsets"
    row = torch.arange(rows, device=flat.device)
    order = (flat * rows + row).argsort()                                            # expert first, then token order
    assert torch.equal(routing.token.long(), order), "rows are not in expert order, ties in token order"
    assert torch.equal(routing.slot.flatten().long()[order], row), "slot is not the inverse of token"
    assert set(routing.losses) == {"balance", "z"} and {"load", "entropy", "dropped", "nonfinite"} <= set(routing.stats)


def check_causal(name: str, logits: Tensor, config) -> bool:
    """Whether an earlier token keeps its experts and weights when every later token changes."""
    half = len(logits) // 2
    changed = torch.cat([logits[:half], -logits[half:]])
    a, b = POLICIES[name].route(logits, config), POLICIES[name].route(changed, config)
    return torch.equal(a.experts[:half], b.experts[:half]) and torch.equal(a.weights[:half], b.weights[:half])


# The lesson in numbers: what the definition and the kernels move, and on a GPU how long they take for it.


def bytes_moved(n: int, e: int, k: int, d: int) -> dict[str, tuple[int, int]]:
    """Bytes through main memory, (definition, kernels): rows of D in bfloat16, everything else 4 bytes a number.

    The definition's are its operators' inputs and outputs, added up: 20 + K passes over the logits forward, 21 back.
    Its gather reads a token K times; its combine copies the rows into token order and then reads them again to add.
    """
    logits, r = 4 * n * e, n * k
    tiles = 4 * -(-n // tiling(e)["TILE"])
    score, sort = logits + 4 * n * (2 * k + 1) + tiles * (2 * e + 4), 12 * r + tiles * e
    return {
        "route, forward": ((20 + k) * logits + 192 * r, score + sort + tiles * (3 * e + 4)),
        "  of it route_fwd": ((20 + k) * logits + 88 * r, score),
        "  of it place": (104 * r, sort),
        "route, backward": (21 * logits, 2 * logits + 4 * n * (3 * k + 1)),
        "gather": (4 * d * r, 2 * d * (n + r)),
        "combine": (2 * d * (3 * r + n), 2 * d * (n + r)),
    }


def functions_timed(n: int, e: int, k: int, d: int) -> dict[str, tuple[Callable, Callable]]:
    """The same rows as `bytes_moved`, as (definition, kernels) to call on a GPU."""
    config = SimpleNamespace(router="softmax", top_k=k, renormalize=True)
    logits = torch.randn(n, e, device="cuda", requires_grad=True)
    plan, fused = softmax_topk(logits, config), softmax_kernels(logits, config)
    x, d_weights = torch.randn(n, d, device="cuda", dtype=torch.bfloat16), torch.randn_like(plan.weights)
    rows, ends = gather(x, plan.slot), run_route_fwd(logits.detach(), k, True)[3]

    def backward(routing):
        loss = (routing.weights * d_weights).sum() + routing.losses["balance"] + routing.losses["z"]
        return lambda: torch.autograd.grad(loss, logits, retain_graph=True)

    return {
        "route, forward": (lambda: softmax_topk(logits, config), lambda: softmax_kernels(logits, config)),
        "  of it route_fwd": (lambda: top_k(logits.softmax(-1), k), lambda: run_route_fwd(logits.detach(), k, True)),
        "  of it place": (lambda: place(plan.experts, e), lambda: run_place(plan.experts, ends)),
        "route, backward": (backward(plan), backward(fused)),
        "gather": (lambda: x.index_select(0, plan.token // k), lambda: run_rows(gather_rows, x, plan.slot, n * k)),
        "combine": (lambda: rows.index_select(0, plan.slot.flatten()).view(n, k, d).sum(1),
                    lambda: run_rows(combine_rows, rows, plan.slot, n)),
    }


def lesson(n: int = 16384, e: int = 128, k: int = 8, d: int = 2048) -> None:
    """Print definition against kernels: megabytes moved and, on a GPU, microseconds and share of the copy floor."""
    print(f"\ndefinition -> kernels at N = {n}, E = {e}, K = {k}, D = {d}")
    moved, gpu = bytes_moved(n, e, k, d), triton is not None and torch.cuda.is_available()
    timed = functions_timed(n, e, k, d) if gpu else {}
    if gpu:
        clock = lambda function: 1e3 * triton.testing.do_bench(function, return_mode="median")   # microseconds
        block = torch.empty(2**30, dtype=torch.uint8, device="cuda")
        rate = 2 * block.numel() / clock(block.clone)                                # bytes a microsecond, both ways
    for name, (naive, fast) in moved.items():
        line = f"  {name:18s} {naive / 1e6:8.1f} -> {fast / 1e6:6.1f} MB ({naive / fast:4.1f} times less)"
        if gpu:
            slow, quick = map(clock, timed[name])
            line += f"   {slow:8.1f} -> {quick:6.1f} us, {fast / rate / quick:4.0%} of the copy rate"
        print(line)
    print(f"  copy rate measured: {rate / 1e6:.2f} TB/s" if gpu else "  no GPU here: nothing to time")


def main(n_token: int = 512, n_expert: int = 16, k: int = 4) -> None:
    logits = torch.randn(n_token, n_expert, generator=torch.Generator().manual_seed(0))
    logits += torch.linspace(1, -1, n_expert)                                        # a router with favourites
    print(f"{n_token} tokens, {n_expert} experts, top-{k}; balance loss: 1 is perfect, {n_expert / k:g} the worst\n")
    print(f"  {'policy':12s} contract  causal  balance      z  entropy  dropped")
    for name, entry in POLICIES.items():
        config = SimpleNamespace(router=name, top_k=k, renormalize=True)
        routing = route(logits, config)
        check(routing, n_token, n_expert, k)
        assert not entry.causal or check_causal(name, logits, config), f"{name} says it is causal and is not"
        s, loss = routing.stats, routing.losses
        print(f"  {name:12s} ok        {'yes' if entry.causal else 'no':6s} {loss['balance']:8.3f} {loss['z']:6.2f} "
              f"{s['entropy']:8.2f} {s['dropped']:8.1%}")
        for e, share in enumerate(s["load"].tolist()):
            print(f"    expert {e:3d} {share:6.2%} {'#' * round(share * n_expert * 20)}")
        print(f"    {'even load':10s} {1 / n_expert:6.2%} {'#' * 20}")
    lesson()


if __name__ == "__main__":
    main()
