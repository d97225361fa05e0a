"""
router.py: which experts does a token visit, and with what weight?

A mixture-of-experts layer owns E small feed-forward networks and sends each token to K of them. The router
sees one row of E logits a token. A *policy* answers two questions about it:

    which K experts?      say, those of the largest logits, the lowest index first among equals
    with what weight?     say, their softmax probabilities, renormalised to sum to 1 or left as they are

`route` does everything that follows: it puts the rows in expert order, so that each expert multiplies one
contiguous block, and makes the losses that keep the experts evenly busy. Everything downstream reads one
object, `Routing`. A new routing idea is one function of a few lines: see `softmax`, then the six others.

Part 1 is the lesson, plain PyTorch: what one must know, then its variations. Part 2 has the commonest policies
as Triton kernels for a GPU, tested against Part 1. Part 3 is the self-check and the command line:

    python router.py                    every policy checked and compared on the same skewed logits
    python router.py --list             the policies, one line each
    python router.py --policy NAME      the load that one policy gives its experts

Axes, everywhere in this file:
    N tokens    E experts    K experts a token visits (top-k)    R = N * K routed rows
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# === Part 1: the lesson ===========================================================================================


@dataclass
class RouterConfig:
    """What of a config routing reads. The comment behind a field is its help text."""

    router: str = "softmax"       # routing policy, a name in router.POLICIES
    top_k: int = 4                # K, experts a token visits
    renormalize: bool = True      # the K combine weights sum to 1
    top_p: float = 0.6            # router "top_p": experts are taken, likeliest first, until they hold this probability
    router_noise: float = 0.0     # std of Gaussian noise on the logits the experts are chosen by, in training only
    capacity_factor: float | None = None       # in training an expert takes at most this times an even share; None: all
    eval_capacity_factor: float | None = None  # the same outside training
    balance_scope: str = "micro_batch"  # the balance loss counts a "micro_batch", each "sequence" or the "global" batch
    bias_rate: float = 0.0        # step of the selection bias that evens the load without a loss; 0: no bias
    aux_coef: float = 0.01        # weight of the load-balancing loss
    z_coef: float = 0.001         # weight of the router z-loss


class Choice(NamedTuple):
    """What a policy decides about N tokens."""

    experts: Tensor               # (N, K) int64, distinct within a token; expert_choice has up to 2K places a token
    weights: Tensor               # (N, K) float32 >= 0, what each expert's output counts; carries gradient
    probs: Tensor                 # (N, E) float32, what the balance loss evens out
    used: Tensor | None = None    # (N, K) bool, which places are choices at all, the others weigh 0; None: every one
    lost: Tensor | int = 0        # choices that found no place (expert_choice)


@dataclass
class Routing:
    """What the expert layer needs. A choice is one (token, k) pair; a row is one vector that one expert multiplies.
    Integers are int64, or int32 where a kernel made them."""

    weights: Tensor               # (N, K) float32; 0 for a choice that was dropped and for a place that is unused
    experts: Tensor               # (N, K) the chosen experts
    counts: Tensor                # (E,) rows of each expert, unused places too
    offsets: Tensor               # (E,) where each expert's rows end, once rows stand in expert order
    token: Tensor                 # (R,) the token that each row is a copy of
    slot: Tensor                  # (N, K) the row of each choice: `token` read the other way round
    demand: Tensor                # (E,) choices of each expert, dropped ones too, unused places not
    losses: dict[str, Tensor]     # "balance" and "z", scalars with gradient to the logits
    stats: dict[str, Tensor]      # "load" (E,), "entropy", "dropped", "nonfinite": detached, not copied to the host


@dataclass(frozen=True)
class Context:
    """What a policy may look at beside the logits."""

    ids: Tensor | None = None     # (N,) integers, the tokens themselves
    seq_len: int = 0              # the N rows are sequences of this length, one behind another; 0: one sequence
    training: bool = False
    bias: Tensor | None = None    # (E,) float32, added to the scores the experts are chosen by, never to the weights
    load: Tensor | None = None    # (E,) demand of this optimizer step's earlier micro-batches, in this process


Policy = Callable[[Tensor, RouterConfig, Context], Choice]
POLICIES: dict[str, Policy] = {}


def policy(name: str, causal: bool = True):
    """Register `f(logits, config, context) -> Choice` under the name that `router = "name"` in a config asks for.
    causal: a promise that the choice looks at no later token and no other sequence; Part 3's check_causal tries it."""

    def register(function: Policy) -> Policy:
        function.causal = causal
        POLICIES[name] = function
        return function

    return register


def route(logits: Tensor, config: RouterConfig, context: Context | None = None) -> Routing:
    """Logits (N, E) float32 -> who goes where, by the policy config.router.

    A row that holds a NaN or an infinity becomes zeros, a token undecided between all experts, and is counted.
    """
    context, n_expert = context or Context(), logits.shape[1]
    assert logits.dtype == torch.float32, "router logits are float32 whatever the precision around them"
    assert 1 <= config.top_k <= n_expert, "a token visits between 1 and E experts"
    finite = logits.isfinite().all(-1, keepdim=True)
    logits = logits.where(finite, 0.0)
    choice = POLICIES[config.router](logits, config, context)
    counts, offsets, token, slot = place(choice.experts, n_expert)
    demand = counts if choice.used is None else tally(choice.experts, n_expert, choice.used)
    losses = {"balance": scoped_balance_loss(choice, demand, config, context), "z": z_loss(logits)}
    stats = statistics(choice, demand) | {"nonfinite": (~finite).sum().float()}
    routing = Routing(choice.weights, choice.experts, counts, offsets, token, slot, demand, losses, stats)
    return drop(routing, config, context.training)


@policy("softmax")
def softmax(logits: Tensor, config: RouterConfig, context: Context) -> Choice:
    """Top-k of a softmax, weights renormalised or not (Shazeer 2017; Mixtral, Qwen3-MoE, OLMoE).

        p = softmax(x)    S = the K largest p (+ bias)    w_e = p_e, or p_e / sum_S p if config.renormalize

    Renormalised (Mixtral, Qwen3; not OLMoE) w is the softmax of the chosen logits: nothing can make 0 / 0 there.
    """
    probs = logits.softmax(-1)                                                    # (N, E)
    experts = top_k(preference(logits, torch.softmax, config, context), config.top_k)
    chosen = logits.gather(1, experts)                                            # (N, K)
    weights = chosen.softmax(-1) if config.renormalize else probs.gather(1, experts)
    return Choice(experts, weights, probs)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Experts (N, k) of the largest scores (N, E), largest first, the lowest index first among equals.

    k rounds of "take the maximum, strike it out": torch.max promises the first of equals, torch.topk does not.
    """
    left = scores.detach().clone()
    rounds = []
    for _ in range(k):
        rounds.append(left.max(-1, keepdim=True).indices)                         # (N, 1)
        left.scatter_(1, rounds[-1], -torch.inf)
    return torch.cat(rounds, 1)


def place(experts: Tensor, n_expert: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows in expert order, tokens in order within an expert: counts, offsets, token, slot (see Routing)."""
    order = experts.flatten().argsort(stable=True)                                # (R,) row -> choice
    row = torch.arange(len(order), device=order.device)
    slot = torch.empty_like(order).scatter_(0, order, row)                        # (R,) choice -> row
    counts = tally(experts, n_expert)
    return counts, counts.cumsum(0), order // experts.shape[1], slot.view_as(experts)


def tally(index: Tensor, size: int, used: Tensor | None = None) -> Tensor:
    """How often each of 0 ... size - 1 occurs in index, (size,); used (bool) or all. bincount would wait for a GPU."""
    ones = torch.ones_like(index) if used is None else used.to(index.dtype)
    counts = torch.zeros(size, dtype=index.dtype, device=index.device)
    return counts.scatter_add_(0, index.flatten(), ones.flatten())


def balance_loss(probs: Tensor, demand: Tensor) -> Tensor:
    """E * sum_e f_e P_e, f_e the share of choices and P_e the mean probability of expert e (Fedus 2021, eq. 4-6).

    Perfect balance costs exactly 1 whatever K is (transformers counts f_e per token: K there); all tokens on the
    same K experts with all their mass cost E / K. f_e is a count: only P_e carries gradient.
    probs (..., N, E), demand (..., E): the mean over any axes in front.
    """
    share = demand / demand.sum(-1, keepdim=True).clamp(min=1)                    # f_e
    mean = probs.sum(-2) / max(probs.shape[-2], 1)                                # P_e; 0, not NaN, without a token
    return probs.shape[-1] * (share * mean).sum(-1).mean()


def z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, which keeps the logits small (Zoph 2022, eq. 5)."""
    return logits.logsumexp(-1).square().sum() / max(len(logits), 1)


@torch.no_grad()
def statistics(choice: Choice, demand: Tensor) -> dict[str, Tensor]:
    """For the log: load, choices of each expert / all rows; entropy, nats a token; dropped, share of choices that weigh
    nothing."""
    unweighted = choice.weights == 0 if choice.used is None else (choice.weights == 0) & choice.used
    entropy = -(choice.probs * choice.probs.clamp(min=1e-38).log()).sum(-1)       # (N,) nats; ln E when undecided
    return {"load": demand / max(choice.experts.numel(), 1),                      # share of all rows
            "entropy": entropy.sum() / max(len(entropy), 1),
            "dropped": (unweighted.sum() + choice.lost) / (demand.sum() + choice.lost).clamp(min=1)}


# --- variations: how to keep the experts evenly busy ---
# The balance loss over one of three scopes; a bias on the choice, moved by the load itself; noise on the choice; a
# capacity. Bias and noise are for policies that choose by `preference`.


def scoped_balance_loss(choice: Choice, demand: Tensor, config: RouterConfig, context: Context) -> Tensor:
    """The balance loss over config.balance_scope: the tokens among which the load is to be even.

    micro_batch   f_e and P_e of these N tokens
    sequence      of each sequence by itself, then the mean over sequences (DeepSeek-V3, eq. 17-20): the strictest
    global        f_e of the optimizer step's whole batch, P_e of these tokens: experts may specialise within it
                  (Qiu 2025, "Demons in the detail"). f_e counts what has been seen so far: exact in the step's
                  last micro-batch, less than the whole before. Outside training it is the micro-batch's
    """
    n, n_expert = choice.probs.shape
    if config.balance_scope == "sequence" and context.seq_len and n:
        assert n % context.seq_len == 0, f"{n} tokens are no whole number of sequences of {context.seq_len}"
        groups = n // context.seq_len
        sequence = torch.arange(n, device=demand.device)[:, None] // context.seq_len
        demand = tally(choice.experts + n_expert * sequence, groups * n_expert, choice.used)
        return balance_loss(choice.probs.view(groups, -1, n_expert), demand.view(groups, n_expert))
    if config.balance_scope == "global" and context.training:
        demand = global_demand(demand, context)
    return balance_loss(choice.probs, demand)


def global_demand(demand: Tensor, context: Context) -> Tensor:
    """Choices of each expert (E,) in this optimizer step so far, this micro-batch with it, over all ranks."""
    return sum_over_ranks(demand if context.load is None else demand + context.load)


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of x over all processes of a distributed run; x itself in a single one."""
    if dist.is_available() and dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def preference(logits: Tensor, score: Callable, config: RouterConfig, context: Context) -> Tensor:
    """The numbers (N, E) whose K largest are chosen; the weights do not see them. They are the logits, in training with
    Gaussian noise so that all experts are tried (Shazeer 2017, eq. 4, where its std is learnt; here it is a setting).
    With a selection bias: score(logits, -1) + bias. (Without one the score is left out: rounding would make ties.)"""
    if context.training and config.router_noise > 0:
        logits = logits + config.router_noise * torch.randn_like(logits)
    return logits if context.bias is None else score(logits, -1) + context.bias


@torch.no_grad()
def update_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """Once an optimizer step, in place: bias += rate * sign(mean load - load), then its mean is taken off.

    bias (..., E) float32; load (..., E), the demand summed over the step in this process. An expert with too few tokens
    becomes easier to choose, with no gradient of its own to disturb the model (Wang 2024, "Auxiliary-loss-free load
    balancing"; DeepSeek-V3, sec. 2.1.2). Only differences of the bias matter: mean 0 keeps it from drifting.
    """
    load = sum_over_ranks(load).float()
    bias += rate * (load.mean(-1, keepdim=True) - load).sign()
    bias -= bias.mean(-1, keepdim=True)
    return bias


def drop(routing: Routing, config: RouterConfig, training: bool) -> Routing:
    """An expert serves its first C = ceil(factor * N K / E) choices in token order, others weigh 0 (Fedus 2021, eq. 3).

    The weights that stay are not renormalised, and a token dropped by all its experts passes on the residual alone.
    No later token evicts an earlier one, but another sequence of the batch can. Dropping saves no time here: the rows
    of dropped choices are computed all the same, so that their number R stays fixed.
    """
    factor = config.capacity_factor if training else config.eval_capacity_factor
    if factor is None:
        return routing
    n, k = routing.experts.shape
    capacity = math.ceil(factor * n * k / len(routing.counts))
    weights = routing.weights.detach()
    live = torch.empty(n * k, dtype=torch.bool, device=weights.device)            # (R,); unused places are not
    live[routing.slot.flatten()] = weights.flatten() > 0
    served = F.pad(live.cumsum(0), (1, 0))                                        # (R + 1,) live rows before row r
    start = served[routing.offsets - routing.counts]                              # (E,)
    ahead = served[routing.slot] - start[routing.experts]                         # (N, K) live rows before it
    late = (weights > 0) & (ahead >= capacity)
    dropped = routing.stats["dropped"] + late.sum() / routing.demand.sum().clamp(min=1)
    return replace(routing, weights=routing.weights.where(~late, 0.0), stats=routing.stats | {"dropped": dropped})


# --- variations: six other policies ---
# x are the logits of a token, S the experts it chooses, w_e their weights. `--list` shows each docstring's first line.


@policy("switch")
def switch(logits: Tensor, config: RouterConfig, context: Context) -> Choice:
    """The one likeliest expert, weighed by its probability (Fedus 2021, eq. 1-2).

        p = softmax(x)    S = argmax p    w = p

    The weight must not be renormalised: it would be 1, whatever x, and the router would never learn.
    """
    assert config.top_k == 1, "the switch router visits one expert: top_k = 1"
    probs = logits.softmax(-1)
    experts = top_k(preference(logits, torch.softmax, config, context), 1)        # (N, 1)
    return Choice(experts, probs.gather(1, experts), probs)


@policy("sigmoid")
def sigmoid(logits: Tensor, config: RouterConfig, context: Context) -> Choice:
    """Top-k of independent sigmoid scores, usually with a selection bias (DeepSeek-V3, eq. 12-16).

        s = sigmoid(x)    S = the K largest s + bias    w_e = s_e / sum_S s, or s_e unless config.renormalize

    The balance loss sees s / sum s. Both quotients are a softmax of log s, where no underflow can make them 0 / 0.
    """
    experts = top_k(preference(logits, lambda x, _: x.sigmoid(), config, context), config.top_k)
    log_s = F.logsigmoid(logits)                                                  # (N, E)
    chosen = log_s.gather(1, experts)                                             # (N, K)
    weights = chosen.softmax(-1) if config.renormalize else chosen.exp()
    return Choice(experts, weights, log_s.softmax(-1))


@policy("top_p")
def top_p(logits: Tensor, config: RouterConfig, context: Context) -> Choice:
    """As many experts as it takes to reach probability top_p, K at most (Huang 2024, "Harder tasks").

        p = softmax(x), descending    S = the first m with p_1 + ... + p_m >= top_p, m <= K    w as for softmax

    A sure token weighs one expert, an unsure one several. Places behind the m-th are unused: computed, at weight 0.
    Experts a token, on average: K times the sum of stats["load"].
    """
    noisy = preference(logits, torch.softmax, config, replace(context, bias=None))
    experts = top_k(noisy, config.top_k)
    p = noisy.softmax(-1).gather(1, experts)                                      # (N, K), descending
    probs = logits.softmax(-1)
    used = p.cumsum(-1) - p < config.top_p                                        # not reached before this one
    chosen = logits.gather(1, experts).where(used, -torch.inf)
    weights = chosen.softmax(-1) if config.renormalize else probs.gather(1, experts).where(used, 0.0)
    return Choice(experts, weights, probs, used)


@policy("expert_choice", causal=False)
def expert_choice(logits: Tensor, config: RouterConfig, context: Context) -> Choice:
    """Each expert takes its likeliest N K / E tokens; a token may get many or none (Zhou 2022, eq. 1-2).

        p = softmax(x)    expert e takes the C = ceil(N K / E) tokens of largest p_e    w_e = p_e, never renormalised

    Load is even by construction. Not causal: a later token can take an earlier one's place, which a model will not
    have when it writes. A token has min(E, 2K) places: one that more experts take loses the least likely.
    """
    assert config.capacity_factor is config.eval_capacity_factor is None, "expert choice has a capacity of its own"
    n, n_expert = logits.shape
    probs = logits.softmax(-1)
    noisy = preference(logits, torch.softmax, config, replace(context, bias=None))
    order = noisy.softmax(-1).argsort(dim=0, descending=True, stable=True)        # (N, E), each expert's tokens
    capacity = math.ceil(n * config.top_k / n_expert)
    taken = torch.zeros_like(probs).scatter_(0, order[:capacity], 1.0)            # (N, E) 1 where e takes the token
    experts = top_k(2 * taken + probs, min(n_expert, 2 * config.top_k))           # taken ones first
    used = taken.gather(1, experts) > 0
    return Choice(experts, probs.gather(1, experts).where(used, 0.0), probs, used, taken.sum() - used.sum())


@policy("hash")
def hash_ids(logits: Tensor, config: RouterConfig, context: Context) -> Choice:
    """Experts fixed for ever by a hash of the token's id, nothing learnt (Roller 2021, "Hash layers").

        S = the K experts e of largest hash(id, e)    w_e = 1 / K
    """
    assert context.ids is not None, "the hash router chooses by token ids: pass Context(ids=...)"
    expert = torch.arange(logits.shape[1], device=logits.device)
    bits = context.ids.long()[:, None] * len(expert) + expert                     # (N, E), all different
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):                    # MurmurHash3, two of its last steps
        bits = (bits ^ (bits >> shift)) * factor & 0xFFFFFFFF
    return unlearnt(logits, (bits >> 8).float(), config)                          # 24 bits: exact in a float32


@policy("random")
def random(logits: Tensor, config: RouterConfig, context: Context) -> Choice:
    """K experts at random, anew for every token, nothing learnt: the floor any router must beat.

        S = K of E uniformly    w_e = 1 / K
    """
    return unlearnt(logits, torch.rand_like(logits), config)


def unlearnt(logits: Tensor, scores: Tensor, config: RouterConfig) -> Choice:
    """The K largest scores at equal weight. The balance loss is a constant 1: there is no probability to pull."""
    experts = top_k(scores, config.top_k)
    weights = logits.new_full(experts.shape, 1 / config.top_k)
    return Choice(experts, weights, torch.full_like(logits, 1 / logits.shape[1]))

# === Part 2: the same, faster =====================================================================================
# Part 1's operators read and write 34 times the (N, E) logits' bytes forward and 20 times back, in ninety launches, at
# N = 16,384, E = 128, K = 8 (39, 22 and eighty at E = 16, K = 4), and sort R integers between. There the logits are
# 8.4 MB, a few microseconds of memory, and a launch costs about as much. So: read the logits once, keep the tile in
# registers, write only what the contract asks for.
#
#   route_fwd    a tile of tokens: scores, top-k, weights, and the tile's own sums: rows per expert, probability, losses
#   cumsum       over those rows per expert, tile after tile, expert after expert: where each tile's rows end (torch)
#   totals       adds up the tiles: counts, losses, statistics
#   place_rows   a tile of choices: from where its rows begin they are numbered by a running sum down the tile. No sort
#   route_bwd    the gradients of weights, balance and z, in one pass over the logits
#
# Nothing is added atomically, so nothing depends on which program runs first: the same bits every time. A tile is a
# power of two each way (Triton's rule) and is masked down to N and E. N * E may pass 2^31: such offsets are int64.

from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
    jit = triton.jit
    constexpr = tl.constexpr
except ImportError:                                   # macOS, for one: Part 1 does all the work
    triton = tl = constexpr = None

    def jit(kernel: Callable) -> Callable:
        return kernel


def use_kernels(x: Tensor) -> bool:
    """Whether the Triton kernels of this file and of model.py take this tensor: the one place that decides."""
    return triton is not None and x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


FUSED = ("softmax", "switch", "sigmoid")              # the policies that the kernels know


def fast_route(logits: Tensor, config: RouterConfig, context: Context | None = None) -> Routing:
    """`route`, by the kernels where they serve: the same weights and losses to rounding, everything else exactly.

    They need a tile of tokens in registers (K <= 32, E <= 1024); noise and the sequence scope stay with torch.
    """
    context = context or Context()
    fits = 0 < len(logits) * config.top_k < 2**31 and config.top_k <= 32 and logits.shape[1] <= 1024
    known = config.router in FUSED and config.balance_scope != "sequence"
    noise = context.training and config.router_noise > 0
    if not (fits and known and not noise and use_kernels(logits)):
        return route(logits, config, context)
    return drop(route_by_kernels(logits, config, context), config, context.training)


@torch.compiler.disable           # fused by hand already
def route_by_kernels(logits: Tensor, config: RouterConfig, context: Context) -> Routing:
    weights, experts, counts, offsets, token, slot, load, scalars = TopK.apply(logits, config, context)
    losses = {"balance": scalars[0], "z": scalars[1]}
    stats = {"load": load} | dict(zip(("entropy", "dropped", "nonfinite"), scalars.detach()[2:].unbind()))
    return Routing(weights, experts, counts, offsets, token, slot, counts, losses, stats)


def tiling(n_expert: int) -> dict:
    """Launch shape: a program takes TILE tokens, ROWS at a time: 4 to 32 logits a thread in registers.

    At N = 16,384 that is 512 programs, for the 132 multiprocessors of an H200.
    """
    block_e = max(16, 1 << (n_expert - 1).bit_length())                              # the next power of two
    rows = min(32, max(8, 4096 // block_e))                                          # 8: a row to a warp, at least
    return {"TILE": 32, "ROWS": rows, "BLOCK_E": block_e, "num_warps": 8 if rows * block_e >= 4096 else 4}


@jit
def mirror(bits):
    """A float32's bits as an int32 of the same order, or back: of a negative number all bits but the sign flip."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@jit
def exponentials(x, top, real):
    """exp(x - top) of each row, x - top, and the sum of the first: what a softmax and its entropy are made of."""
    shifted = tl.maximum(x - top[:, None], -200.0)                                   # never -inf; exp is 0 long before
    p = tl.where(real, tl.exp(shifted), 0.0)
    return p, shifted, tl.sum(p, 1)


@jit
def take_best(key, e, kk, K: constexpr, LOWEST: constexpr):
    """The K largest keys of each row, the lowest index first among equals: their indices, themselves, the keys left.

    K rounds of maximum need no sort and no memory. Keys are integers in the order of the floats they stand for, because
    a warp, which holds whole rows, reduces an int32 in one instruction (redux.sync, 8.0 on).
    """
    expert = tl.zeros((key.shape[0], kk.shape[1]), tl.int32)
    value = expert
    for k in range(K):
        best = tl.max(key, 1)
        winner = tl.min(tl.where(key == best[:, None], e[None, :], key.shape[1]), 1)
        key = tl.where(e[None, :] == winner[:, None], LOWEST, key)
        expert = tl.where(kk == k, winner[:, None], expert)
        value = tl.where(kk == k, best[:, None], value)
    return expert, value, key


@jit
def route_fwd(logits, bias, weights, experts, lse, hist, sums, N, T,
              E: constexpr, K: constexpr, SIGMOID: constexpr, RENORMALIZE: constexpr,
              TILE: constexpr, ROWS: constexpr, BLOCK_E: constexpr, BLOCK_K: constexpr):
    """Reads the logits once, 4 N E bytes; writes weights, experts, lse, 4 N (2K + 1), and the tile sums, 4 T (2E + 4).

    Divided by their sum, sigmoid scores are the softmax of log s: log s takes the place of x, and little else changes.
    With a bias (E,), or None, the keys are scores: the chosen logits are read again, K of a row still in the cache.
    """
    LOWEST: constexpr = -0x80000000                                                  # below every float: struck out
    tile = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    kk = tl.arange(0, BLOCK_K)[None, :]
    s = tl.arange(0, 4)
    real = (e < E)[None, :]
    count = tl.zeros((BLOCK_E,), tl.int32)
    mass = tl.zeros((BLOCK_E,), tl.float32)
    rest = tl.zeros((ROWS, 4), tl.float32)                                           # z, entropy, dropped, nonfinite
    for step in range(TILE // ROWS):
        base = tile.to(tl.int64) * TILE + step * ROWS
        n = tl.arange(0, ROWS)
        live = n < N - base
        x = tl.load(logits + base * E + (n[:, None] * E + e[None, :]), live[:, None] & real, other=0.0)
        finite = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1) < 0x7F800000   # (ROWS,): no exponent of all ones
        x = tl.where(finite[:, None], x, 0.0) + 0.0                                  # -0.0 + 0.0 = 0.0: they are equal
        key = tl.where(real, mirror(x.to(tl.int32, bitcast=True)), LOWEST)
        top = mirror(tl.max(key, 1)).to(tl.float32, bitcast=True)
        p, shifted, total = exponentials(x, top, real)
        log_z = top + tl.log(total)
        if SIGMOID:                                                                  # from here p is s / sum s
            p, shifted, total = exponentials(log_sigmoid(x), log_sigmoid(top), real)
        p *= tl.where(live, 1.0 / total, 0.0)[:, None]
        mass += tl.sum(p, 0)
        entropy = tl.log(total) - tl.sum(p * shifted, 1)                             # -sum p log p
        if bias is not None:
            score = (tl.sigmoid(x) if SIGMOID else p) + tl.load(bias + e, e < E, other=0.0)[None, :]
            key = tl.where(real, mirror((score + 0.0).to(tl.int32, bitcast=True)), LOWEST)

        expert, value, key = take_best(key, e, kk, K, LOWEST)
        at = base * K + (n[:, None] * K + kk)
        kept = live[:, None] & (kk < K)
        value = mirror(value).to(tl.float32, bitcast=True)                           # the chosen logits
        if bias is not None:                                                         # the key was not the logit
            value = tl.load(logits + base * E + (n[:, None] * E + expert), kept & finite[:, None], other=0.0)
        value = log_sigmoid(value) if SIGMOID else value
        if RENORMALIZE:
            w = tl.where(kk < K, tl.exp(value - tl.max(tl.where(kk < K, value, float("-inf")), 1)[:, None]), 0.0)
            w *= (1.0 / tl.sum(w, 1))[:, None]
        else:
            w = tl.exp(value if SIGMOID else value - log_z[:, None])
        tl.store(weights + at, w, kept)
        tl.store(experts + at, expert, kept)
        tl.store(lse + base + n, tl.where(finite, log_z, float("inf")), live)        # inf: a row without gradient

        count += tl.sum(((key == LOWEST) & real & live[:, None]).to(tl.int32), 0)
        dropped = tl.sum((kept & (w == 0.0)).to(tl.float32), 1)
        two = tl.where(s[None, :] == 0, (log_z * log_z)[:, None], entropy[:, None])
        more = tl.where(s[None, :] == 2, dropped[:, None], (finite == 0).to(tl.float32)[:, None])
        rest += tl.where(live[:, None], tl.where(s[None, :] < 2, two, more), 0.0)

    tl.store(hist + e * T + tile, count, e < E)
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
        tl.store(token + row, (base + n)[:, None], rank < K)
        begin += tl.sum(hot, 0)


@jit
def totals(ends, sums, counts, offsets, load, scalars, N, T,
           E: constexpr, K: constexpr, BLOCK_E: constexpr, BLOCK_T: constexpr):
    """One program adds up the tiles: reads 4 T (E + 4) bytes. scalars: balance, z, entropy, dropped, nonfinite."""
    e = tl.arange(0, BLOCK_E)
    s = tl.arange(0, 4)
    t = tl.arange(0, BLOCK_T)
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
def route_bwd(logits, lse, weights, experts, share, d_weights, d_scalars, d_logits, N, E: constexpr, K: constexpr,
              SIGMOID: constexpr, RENORMALIZE: constexpr, ROWS: constexpr, BLOCK_E: constexpr):
    """Reads the logits once more and writes their gradient: 8 N E bytes, and 4 N (3K + 1) for weights, experts and lse.

    Part 1 keeps probs, weights and the top-k's scores for autograd. Here p comes back as exp(x - lse), and:
        weights as they are    dx_e = p_e ([e chosen] dw_e - sum_j w_j dw_j)
        renormalised           dx_e = w_e (dw_e - sum_j w_j dw_j) for chosen e: w is a softmax of the chosen logits
        balance                dx_e = p_e (g_e - sum_i p_i g_i), g_e = E f_e / N
        z                      dx_e = p_e 2 lse / N
    Sigmoid: the first three are gradients of log s, so p is s / sum s there, times d log s / dx = 1 - s; and weights as
    they are, w_e = s_e, depend on no other expert.
    """
    base = tl.program_id(0).to(tl.int64) * ROWS
    n = tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK_E)
    live = n < N - base
    real = e < E
    at = base * E + n[:, None] * E + e[None, :]
    x = tl.load(logits + at, live[:, None] & real[None, :], other=float("-inf"))
    log_z = tl.load(lse + base + n, live, other=0.0)
    p = tl.exp(x - log_z[:, None])

    w_dw = p * 0.0                                                                   # w_e dw_e, 0 where not chosen
    w_chosen = p * 0.0                  # (tl.zeros has a layout of its own: four times the loads, sums across warps)
    for k in range(K):
        choice = base * K + n * K + k
        hit = e[None, :] == tl.load(experts + choice, live, other=-1)[:, None]
        w = tl.load(weights + choice, live, other=0.0)
        dw = tl.load(d_weights + choice, live, other=0.0)
        w_dw = tl.where(hit, (w * dw)[:, None], w_dw)
        w_chosen = tl.where(hit, w[:, None], w_chosen)
    d_z = p * (tl.load(d_scalars + 1) * 2.0 / N * log_z)[:, None]
    if SIGMOID:
        y = log_sigmoid(x)
        p = tl.exp(y - tl.max(y, 1)[:, None])                                        # 0 beyond the E experts
        p /= tl.sum(p, 1)[:, None]
    dx = w_dw
    if RENORMALIZE or not SIGMOID:
        dx -= (w_chosen if RENORMALIZE else p) * tl.sum(w_dw, 1)[:, None]
    g = tl.load(d_scalars) * E / N * tl.load(share + e, real, other=0.0)             # (BLOCK_E,)
    dx += p * (g[None, :] - tl.sum(p * g[None, :], 1)[:, None])
    dx = dx * tl.sigmoid(-x) + d_z if SIGMOID else dx + d_z
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


# --- launching the kernels ---


class TopK(torch.autograd.Function):
    """The kernels behind softmax, switch and sigmoid. Keeps the logits and 2K + 1 numbers a token."""

    @staticmethod
    def forward(ctx, logits, config, context):
        logits = logits.contiguous()
        n, n_expert = logits.shape
        k = config.top_k
        shape = tiling(n_expert)
        n_tile = triton.cdiv(n, shape["TILE"])
        ctx.flags = config.router == "sigmoid", config.renormalize and config.router != "switch"  # SIGMOID, RENORMALIZE
        weights = logits.new_empty(n, k)
        experts = logits.new_empty(n, k, dtype=torch.int32)
        lse = logits.new_empty(n)
        hist = logits.new_empty(n_expert, n_tile, dtype=torch.int32)
        sums = logits.new_empty(n_expert + 4, n_tile)
        route_fwd[(n_tile,)](logits, context.bias, weights, experts, lse, hist, sums, n, n_tile, n_expert, k,
                             *ctx.flags, BLOCK_K=triton.next_power_of_2(k), **shape)

        ends = hist.view(-1).cumsum(0, dtype=torch.int32).view_as(hist)              # (E, T): see place_rows
        counts = ends.new_empty(n_expert)
        offsets = torch.empty_like(counts)
        load = sums.new_empty(n_expert)
        scalars = sums.new_empty(5)
        block_e = shape["BLOCK_E"]
        totals[(1,)](ends, sums, counts, offsets, load, scalars, n, n_tile, n_expert, k,
                     BLOCK_E=block_e, BLOCK_T=max(8192 // block_e, 1), num_warps=8)

        slot = torch.empty_like(experts)
        token = experts.new_empty(n * k)
        shape["num_warps"] = 4                              # the running sum down a tile then stays inside a thread
        place_rows[(n_tile,)](experts, ends, slot, token, n, n_tile, n_expert, k, **shape)

        share = load
        if config.balance_scope == "global" and context.training:                    # f_e of more than these tokens
            demand = global_demand(counts, context)
            share = demand / demand.sum()
            scalars[0] = n_expert / n * (share * sums[:n_expert].sum(1)).sum()
        ctx.save_for_backward(logits, lse, weights, experts, share)
        ctx.mark_non_differentiable(experts, counts, offsets, token, slot, load)
        ctx.set_materialize_grads(False)                    # else six fills with zeros for what has no gradient
        return weights, experts, counts, offsets, token, slot, load, scalars

    @staticmethod
    @once_differentiable
    def backward(ctx, d_weights, *others):
        logits, _, weights, *_ = ctx.saved_tensors
        d_weights = torch.zeros_like(weights) if d_weights is None else d_weights.contiguous()
        d_scalars = logits.new_zeros(5) if others[-1] is None else others[-1].contiguous()
        n, n_expert = logits.shape
        d_logits = torch.empty_like(logits)
        shape = tiling(n_expert)
        del shape["TILE"]
        route_bwd[(triton.cdiv(n, shape["ROWS"]),)](
            *ctx.saved_tensors, d_weights, d_scalars, d_logits, n, n_expert, weights.shape[1], *ctx.flags, **shape)
        return d_logits, None, None


# --- moving rows ---
# Into expert order, and back. Each is the other's gradient, and both read slot (N, K), where the copies of a token
# stand. Going by slot, a token is read once and written K times; going by row, it would be read K times.


def run_rows(kernel, source: Tensor, slot: Tensor, n_row: int) -> Tensor:
    """Launch gather_rows or combine_rows: one program a token and 2048 columns, 16 bytes a thread in bfloat16."""
    n, k = slot.shape
    d = source.shape[1]
    out = source.new_empty(n_row, d)
    block = min(2048, triton.next_power_of_2(d))
    kernel[(n, triton.cdiv(d, block))](source.contiguous(), slot.contiguous(), out, d, k, block,
                                       num_warps=max(1, block // 256))
    return out


class Gather(torch.autograd.Function):
    """Copy tokens into expert order: x (N, D), slot (N, K) -> (R, D)."""

    @staticmethod
    def forward(ctx, x, slot):
        ctx.save_for_backward(slot)
        if use_kernels(x) and len(slot):
            return run_rows(gather_rows, x, slot, slot.numel())
        row = slot.flatten().long()
        choice = torch.empty_like(row).scatter_(0, row, torch.arange(len(row), device=slot.device))    # of each row
        return x.index_select(0, choice // slot.shape[1])

    @staticmethod
    def backward(ctx, d_rows):
        return Combine.apply(d_rows, *ctx.saved_tensors), None


class Combine(torch.autograd.Function):
    """Sum the K rows of each token in float32, in the order of k: rows (R, D), slot (N, K) -> (N, D).

    No atomics and one fixed order: the same bits every time.
    """

    @staticmethod
    def forward(ctx, rows, slot):
        ctx.save_for_backward(slot)
        if use_kernels(rows) and len(slot):
            return run_rows(combine_rows, rows, slot, len(slot))
        return F.embedding_bag(slot, rows, mode="sum")                               # a CPU: 6 to 11 times index + sum

    @staticmethod
    def backward(ctx, d_x):
        return Gather.apply(d_x, *ctx.saved_tensors), None


gather = Gather.apply
combine = Combine.apply


# === Part 3: tools ================================================================================================

import argparse
import contextlib
import difflib
import os
import re
import sys
import traceback


class BadInput(Exception):
    """The user can mend this: one line saying what is wrong, what is allowed, and the fix. Scripts exit with code 2."""


def require(ok: bool, message: str) -> None:
    if not ok:
        raise BadInput(message)


def require_each(config, names: str, fits: Callable, must: str) -> None:
    """Each of these fields must fit; None is no limit."""
    for name in names.split():
        value = getattr(config, name)
        require(value is None or fits(value), f"{name} = {value!r} must {must}")


def require_one_of(name: str, value: str, allowed) -> None:
    require(value in allowed, f"{name} = {value!r} must be one of {', '.join(allowed)}{closest(value, allowed)}")


def closest(word: str, known) -> str:
    """', did you mean X?' when a known name is near, else ''."""
    near = difflib.get_close_matches(word, known, 1)
    return f", did you mean {near[0]}?" if near else ""


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise BadInput(f"{message}; python {self.prog} --help lists what there is")

    def parse_known_args(self, *arguments):
        args, rest = super().parse_known_args(*arguments)
        require([] not in vars(args).values(), "a value is missing: --name=--")      # which argparse takes for none
        return args, rest


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run a script's main. What the user can mend, and what the machine refuses (a file and the reason, or memory), is
    one line on stderr and exit code 2; a pipe that nobody reads and Ctrl-C are quiet."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (None: the shell has closed it)
    sys.stdout.reconfigure(errors="replace")             # a text may hold what the terminal cannot show
    try:
        try:
            main(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except (KeyboardInterrupt, BrokenPipeError):
        drop_output(sys.stdout)
        sys.exit(130)
    except (BadInput, OSError, MemoryError, RuntimeError) as error:
        lacking = out_of_memory(error)
        if isinstance(error, RuntimeError) and not lacking:
            raise
        text = f"out of memory: {error}" if lacking else str(error)
        print("error: " + " ".join(text.splitlines()), file=sys.stderr)
        drop_output(sys.stdout)
        sys.exit(2)


def drop_output(stream) -> None:
    """Send what is still to come nowhere: a closed pipe or a full disk would be met again at the exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, here or on the GPU: some of torch's ways to say so have no class of their own."""
    words = "DefaultCPUAllocator|CUDA error: out of memory|ALLOC_FAILED"
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(re.search(words, str(error)))


def check(routing: Routing, n_token: int, n_expert: int) -> None:
    """Assert every line of the contract that can be read off one Routing."""
    k = routing.experts.shape[1]
    flat = routing.experts.flatten().long()
    assert routing.weights.shape == routing.experts.shape == routing.slot.shape == (n_token, k)
    assert routing.weights.dtype == torch.float32 and routing.weights.isfinite().all() and (routing.weights >= 0).all()
    for name in ("experts", "counts", "offsets", "token", "slot", "demand"):
        assert getattr(routing, name).dtype in (torch.int64, torch.int32), name
    assert ((flat >= 0) & (flat < n_expert)).all(), "an expert that does not exist"
    assert all(len(set(row)) == k for row in routing.experts.tolist()), "a token visits the same expert twice"
    assert torch.equal(routing.counts.long(), torch.bincount(flat, minlength=n_expert)), "counts"
    assert routing.demand.shape == (n_expert,) and (routing.demand <= routing.counts).all(), "demand"
    assert torch.equal(routing.offsets.long(), routing.counts.cumsum(0)), "offsets"
    row = torch.arange(len(flat), device=flat.device)
    order = (flat * len(flat) + row).argsort()                                    # expert first, then token order
    assert torch.equal(routing.token.long(), order // k), "rows are not in expert order, ties in token order"
    assert torch.equal(routing.slot.flatten().long()[order], row), "slot does not lead to the row of each choice"
    assert routing.losses.keys() == {"balance", "z"}
    assert routing.stats.keys() == {"load", "entropy", "dropped", "nonfinite"}


def seeded_route(logits: Tensor, config: RouterConfig, context: Context) -> Routing:
    """`route` with the same random numbers every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return route(logits, config, context)


def check_causal(logits: Tensor, config: RouterConfig, context: Context) -> bool:
    """Whether an earlier token keeps its experts and weights when every later token changes (and chance does not)."""
    half = len(logits) // 2
    changed = torch.cat([logits[:half], -logits[half:]])
    ids = None if context.ids is None else torch.cat([context.ids[:half], context.ids[half:] + 1])
    a = seeded_route(logits, config, context)
    b = seeded_route(changed, config, replace(context, ids=ids))
    return torch.equal(a.experts[:half], b.experts[:half]) and torch.equal(a.weights[:half], b.weights[:half])


def describe(name: str) -> str:
    """A policy on one line: name, whether it is causal, and the first line of its docstring."""
    what = (POLICIES[name].__doc__ or "").partition("\n")[0]
    return f"{name:14s}{'causal' if POLICIES[name].causal else 'not causal':12s}{what}"


def try_policy(name: str) -> Routing:
    """Check a policy's promises on the logits of a router with favourites, and return what it does with them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(512, 16, generator=generator) + torch.linspace(1, -1, 16)
    ids = (256 * torch.rand(512, generator=generator) ** 3).long()                # some tokens are frequent
    config = RouterConfig(name, top_k=1 if name == "switch" else 4)
    context = Context(ids, training=True)
    try:
        routing = seeded_route(logits, config, context)
        check(routing, *logits.shape)
        assert not POLICIES[name].causal or check_causal(logits, config, context), "says it is causal and is not"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise BadInput(f"policy {name}: {str(error) or where.line} ({type(error).__name__} in {where.name}, "
                       f"{os.path.basename(where.filename)} line {where.lineno})") from None
    return routing


def compare_policies(names) -> None:
    """A line a policy on the same logits, then what each is."""
    print("512 tokens, 16 experts, top-4 (switch: top-1); balance loss: 1 is even, 4 the worst (switch: 16)\n")
    print("  policy          balance      z  entropy  busiest expert  slots in use  dropped")
    for name in names:
        routing = try_policy(name)
        numbers = {key: x.sum().item() for key, x in (routing.losses | routing.stats).items()}
        busiest = 16 * routing.stats["load"].max() / numbers["load"]
        print(f"  {name:14s} {numbers['balance']:8.3f} {numbers['z']:6.2f} {numbers['entropy']:8.2f} "
              f"{busiest:8.2f} x even {numbers['load']:13.1%} {numbers['dropped']:8.1%}")
    print("\n" + "\n".join("  " + describe(name) for name in names))


def show_load(name: str) -> None:
    """The share of the rows of each expert, as bars of text."""
    load = try_policy(name).stats["load"].tolist()
    even = sum(load) / len(load)
    print("\nshare of all rows that each expert is chosen for")
    for e, share in enumerate(load):
        print(f"  expert {e:3d} {share:6.2%} {'#' * round(20 * share / even)}")
    print(f"  even load  {even:6.2%} {'#' * 20}")


def main(argv: list[str]) -> None:
    parser = Parser(allow_abbrev=False, description="Check and compare the routing policies.")
    parser.add_argument("--list", action="store_true", help="name the policies, one line each")
    parser.add_argument("--policy", metavar="NAME", help="the load that one policy gives its experts")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(map(describe, POLICIES)))
    elif args.policy is None:
        compare_policies(POLICIES)
    else:
        require_one_of("policy", args.policy, POLICIES)
        compare_policies([args.policy])
        show_load(args.policy)


if __name__ == "__main__":
    run_script(main)
