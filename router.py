"""
router.py: which experts does a token visit, and with what weight?

A mixture-of-experts layer owns E small feed-forward networks and sends each token to K of them. The router is the part
that decides. It sees one row of E logits for a token and must answer three questions:

    which K experts?      say, those of the largest logits, the lowest index first among equals
    with what weight?     say, their softmax probabilities, renormalised to sum to 1 or left as they are
    in what order?        rows sorted by expert, so that each expert multiplies one contiguous block

Everything downstream reads the answer from one object, `Routing`. A routing idea is one function that fills it in and
one decorator that names it: see `softmax` and the six others, then write your own below them.

The file reads in six parts: the contract; the pieces in plain PyTorch, which runs anywhere; what keeps experts evenly
busy; the policies; the commonest of them again as Triton kernels, which is what a GPU runs; and a self-check.
The kernels are tested against the definition, forward and every gradient.

    python router.py                    every policy checked and compared, and what the kernels save
    python router.py --list             the policies, one line each
    python router.py --policy NAME      the load one gives its experts: text, out/router_NAME.png and its data, .json

Axes, everywhere in this file:
    N tokens    E experts    K experts a token visits (top-k)    R = N * K routed rows (known without asking the GPU)
    D width of a token's vector    T tiles of tokens, one tile a kernel program
"""

import argparse
import difflib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
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

    weights  (N, K) float32   how much each chosen expert's output counts; carries gradient; 0 for a choice that was
                              dropped and for a slot the policy left unused (top_p, expert_choice): its row is idle
    experts  (N, K) int32     the chosen experts, distinct within a token
    counts   (E,)   int32     rows each expert received
    offsets  (E,)   int32     running sum of counts, inclusive: expert e owns rows offsets[e] - counts[e] : offsets[e]
    slot     (N, K) int32     the row of each choice once rows stand in expert order, ties in token order
    token    (R,)   int32     the inverse of slot: row r holds choice token[r], that is token number token[r] // K
    demand   (E,)   int32     choices of each expert, dropped ones too, unused slots not: what balance is measured by
    losses   name -> scalar   "balance" and "z", with gradient to the logits
    stats    name -> float32  "load" (E,), "entropy", "dropped", "nonfinite": detached, never copied to the host here
    """

    weights: Tensor
    experts: Tensor
    counts: Tensor
    offsets: Tensor
    slot: Tensor
    token: Tensor
    demand: Tensor
    losses: dict[str, Tensor]
    stats: dict[str, Tensor]


@dataclass(frozen=True)
class Context:
    """What a policy may look at beside the logits."""

    ids: Tensor | None = None     # (N,) integers, the tokens themselves
    seq_len: int = 0              # the N rows are sequences of this length, one behind another; 0: one sequence
    training: bool = False
    bias: Tensor | None = None    # (E,) float32, added to the scores the experts are chosen by, never to the weights
    load: Tensor | None = None    # (E,) summed demand of this optimizer step's earlier micro-batches, on this rank


@dataclass
class Policy:
    """A routing idea and what it promises. `causal`: no later token, and no other row, can change a token's output."""

    route: Callable[..., Routing]
    causal: bool
    fused: bool                   # the Triton kernels below compute the same


POLICIES: dict[str, Policy] = {}


def policy(name: str, causal: bool, fused: bool = False):
    """Register `f(logits, config, context) -> Routing` under the name that `router = "name"` in a config asks for."""

    def register(function):
        POLICIES[name] = Policy(function, causal, fused)
        return function

    return register


def route(logits: Tensor, config, context: Context | None = None) -> Routing:
    """Route logits (N, E) float32 by the policy config.router. The config is a ModelConfig or whatever `settings` has.

    A policy the kernels know runs by them on a GPU, and by its definition elsewhere; the plan is the same.
    """
    assert logits.dtype == torch.float32, "router logits are float32 whatever the precision around them"
    assert 1 <= config.top_k <= logits.shape[-1], "a token visits between 1 and E experts"
    context = context or Context()
    entry = POLICIES[config.router]
    function = topk_kernels if entry.fused and kernels_serve(logits, config, context) else entry.route
    routing, factor = function(logits, config, context), capacity_factor(config, context.training)
    return routing if factor is None else drop(routing, factor)


def settings(router: str, top_k: int, **fields) -> SimpleNamespace:
    """Every field `route` reads of a config, as ModelConfig sets them unless told otherwise."""
    off = dict(renormalize=True, top_p=0.6, router_noise=0.0, capacity_factor=None, eval_capacity_factor=None,
               balance_scope="micro_batch")
    return SimpleNamespace(router=router, top_k=top_k, **off | fields)


def capacity_factor(config, training: bool) -> float | None:
    return config.capacity_factor if training else config.eval_capacity_factor


def is_causal(config, training: bool) -> bool:
    """Whether no later token, and no other row, can change a token's output: a causal policy that drops nothing.

    Who is dropped goes by token order, so no later token evicts an earlier one. But an earlier sequence of the batch
    does, and how many an expert serves depends on N, which every other token is part of.
    """
    return POLICIES[config.router].causal and capacity_factor(config, training) is None


# --- the definition: the pieces every policy is built from -----------------------------------------------------------


def finite_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Replace each row that holds a NaN or an infinity by zeros: its token is undecided between all experts.

    The rest of the batch is then routed as ever, and the row is counted in stats["nonfinite"] instead of spreading.
    """
    finite = logits.abs().amax(-1, keepdim=True) < torch.inf                         # False for NaN too
    return logits.where(finite, 0.0), (~finite).sum().float()


def noisy(logits: Tensor, config, context: Context) -> Tensor:
    """The logits to choose by: with Gaussian noise while training, so that all experts are tried.

    As in Shazeer 2017 (eq. 4), but its std is a setting, not learnt, and the weights do not see it.
    """
    if context.training and config.router_noise > 0:
        return logits + config.router_noise * torch.randn_like(logits)
    return logits


def preference(logits: Tensor, score: Callable, config, context: Context) -> Tensor:
    """What the K largest of are chosen (N, E), never what they weigh: the noisy logits; score(those) + a bias if any.

    A score keeps the order of the logits, but its rounding can make two of them equal: without a bias it is left out.
    """
    logits = noisy(logits, config, context)
    return logits if context.bias is None else score(logits) + context.bias


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
    token = experts.flatten().argsort(stable=True).int()                             # (R,) row -> choice
    counts = tally(experts, n_expert)[0]
    return counts, counts.cumsum(0, dtype=torch.int32), invert(token).view(experts.shape), token


def tally(experts: Tensor, n_expert: int, used: Tensor | None = None, groups: int = 1) -> Tensor:
    """Choices of each expert (groups, E) int32 in each of so many equal parts of the tokens; `used` (N, K) or all."""
    index, ones = experts.flatten().long(), torch.ones_like(experts) if used is None else used.int()
    if groups > 1:
        index = (index.view(groups, -1) + n_expert * torch.arange(groups, device=index.device)[:, None]).flatten()
    counts = torch.zeros(groups * n_expert, dtype=torch.int32, device=index.device)
    return counts.scatter_add_(0, index, ones.flatten()).view(groups, n_expert)      # bincount would wait for the GPU


def mean_over_tokens(x: Tensor) -> Tensor:
    """Mean over the first axis; 0, not NaN, when there is no token at all."""
    return x.sum(0) / max(x.shape[0], 1)


def finish(logits: Tensor, probs: Tensor, weights: Tensor, experts: Tensor, nonfinite: Tensor,
           config, context: Context, used: Tensor | None = None) -> Routing:
    """Everything that follows once a policy has chosen: rows in expert order, the losses, the statistics.

    probs (N, E) is what the balance loss evens out; used (N, K) bool marks the slots that are choices, None: all. In
    inference mode, while text is written, nobody asks for losses and statistics: both are empty there.
    """
    n_expert = logits.shape[-1]
    counts, offsets, slot, token = place(experts, n_expert)
    demand = counts if used is None else tally(experts, n_expert, used)[0]
    plan = Routing(weights, experts, counts, offsets, slot, token, demand, {}, {})
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():      # compiled: left out if unused
        return plan
    plan.losses = {"balance": scoped_balance_loss(probs, plan, used, config, context), "z": z_loss(logits)}
    with torch.no_grad():
        none = (weights == 0) if used is None else (weights == 0) & used
        plan.stats = {
            "load": demand / max(experts.numel(), 1),                                # (E,) share of rows
            "entropy": mean_over_tokens(-(probs * probs.clamp(min=1e-38).log()).sum(-1)),  # nats; ln E when undecided
            "dropped": none.sum() / demand.sum().clamp(min=1),                       # share of choices of weight 0
            "nonfinite": nonfinite,                                                  # tokens
        }
    return plan


# --- the definition: keeping the experts evenly busy -----------------------------------------------------------------
# Four ways, in any combination: a loss that pulls the logits towards even load (aux_coef), over one of three scopes; a
# loss that keeps them small (z_coef); a bias on the choice, moved by the load itself (bias_rate); and a capacity.


def balance_loss(probs: Tensor, counts: Tensor) -> Tensor:
    """Switch balance loss: E * sum_e f_e P_e, f_e the share of rows, P_e the mean probability (Fedus 2021, eq. 4-6).

    f_e is a share of all R rows, so perfect balance costs exactly 1 for any K (transformers counts per token: K there).
    Only P_e carries gradient; f_e is a count. All tokens on the same K experts with all their mass cost E / K.
    probs (..., N, E) and counts (..., E): the mean over any axes in front.
    """
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)                       # f_e
    mean = probs.sum(-2) / max(probs.shape[-2], 1)                                   # P_e
    return probs.shape[-1] * (share * mean).sum(-1).mean()


def scoped_balance_loss(probs: Tensor, plan: Routing, used: Tensor | None, config, context: Context) -> Tensor:
    """The balance loss over config.balance_scope: the tokens among which the load is to be even.

    micro_batch   f_e and P_e of these N tokens
    sequence      of each sequence by itself, then the mean over sequences (DeepSeek-V3, eq. 17-20): the strictest
    global        f_e of the optimizer step's whole batch, P_e of these tokens: experts may specialise within it
                  (Qiu 2025, "Demons in the detail"). f_e counts what has been seen so far: exact in the step's last
                  micro-batch, less than the whole in those before. Outside training it is the micro-batch's
    """
    (n, n_expert), demand = probs.shape, plan.demand
    if config.balance_scope == "sequence" and context.seq_len and n:
        assert n % context.seq_len == 0, f"{n} tokens are no whole number of sequences of {context.seq_len}"
        groups = n // context.seq_len
        return balance_loss(probs.view(groups, -1, n_expert), tally(plan.experts, n_expert, used, groups))
    if config.balance_scope == "global" and context.training:
        demand = global_demand(demand, context)
    return balance_loss(probs, demand)


def global_demand(demand: Tensor, context: Context) -> Tensor:
    """Choices of each expert (E,) in this optimizer step so far, this micro-batch with it, over all ranks."""
    return sum_over_ranks(demand if context.load is None else demand + context.load)


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of x over all processes of a distributed run; x itself in a single one."""
    if dist.is_available() and dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


@torch.no_grad()
def update_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """Once an optimizer step, in place: bias += rate * sign(mean load - load), then its mean is taken off.

    bias (..., E) float32 and load (..., E), the demand summed over the step on this rank. An expert with too few
    tokens becomes easier to choose, with no gradient of its own to disturb the model (Wang 2024, "Auxiliary-loss-free
    load balancing"; DeepSeek-V3, sec. 2.1.2). Only differences of the bias matter: mean 0 keeps it from drifting.
    """
    load = sum_over_ranks(load).float()
    bias += rate * (load.mean(-1, keepdim=True) - load).sign()
    bias -= bias.mean(-1, keepdim=True)
    return bias


def z_loss(logits: Tensor) -> Tensor:
    """Router z-loss: mean over tokens of logsumexp(logits)^2, which keeps the logits small (Zoph 2022, eq. 5)."""
    return mean_over_tokens(logits.logsumexp(-1).square())


def drop(routing: Routing, factor: float) -> Routing:
    """An expert serves its first C = ceil(factor * N K / E) choices in token order; others weigh 0 (Fedus 2021, eq. 3).

    The weights that stay are not renormalised, and a token dropped by all its experts passes on the residual alone.
    This studies what dropping does to the loss. It saves no time: the rows of dropped choices are computed all the
    same, since R must be known without asking the GPU.
    """
    (n, k), n_expert = routing.experts.shape, len(routing.counts)
    capacity = math.ceil(factor * n * k / n_expert)
    live = routing.weights.detach() > 0                                              # an unused slot takes no place
    served = F.pad(live.flatten()[routing.token.long()].cumsum(0), (1, 0))           # (R + 1,) live rows before row r
    start = served[(routing.offsets - routing.counts).long()]                        # (E,)
    rank = served[routing.slot.long()] - start[routing.experts.long()]               # (N, K) live ones before, same e
    routing = replace(routing, weights=routing.weights.where(rank < capacity, 0.0))
    if routing.stats:
        lost = (live & (rank >= capacity)).sum() / routing.demand.sum().clamp(min=1)
        routing.stats = routing.stats | {"dropped": routing.stats["dropped"] + lost}
    return routing


# --- policies -------------------------------------------------------------------------------------------------------
# x are the logits of a token, S the experts it chooses, w_e their weights. The first line of each is what --list shows.


@policy("softmax", causal=True, fused=True)
def softmax(logits: Tensor, config, context: Context) -> Routing:
    """Top-k of a softmax, weights renormalised or not (Shazeer 2017; Mixtral, Qwen3-MoE, OLMoE).

        p = softmax(x)    S = the K largest p    w_e = p_e, or p_e / sum_S p if config.renormalize

    Mixtral and Qwen3-MoE renormalise; OLMoE does not. Renormalised, w is the softmax of the chosen logits, in which
    nothing can make 0 / 0; left as it is, it says how much mass the token gives to experts it did not visit.
    """
    logits, nonfinite = finite_rows(logits)
    scores = preference(logits, partial(torch.softmax, dim=-1), config, context)     # (N, E)
    experts = top_k(scores, config.top_k)                                            # (N, K)
    probs, index = logits.softmax(-1), experts.long()                                # (N, E), (N, K)
    weights = logits.gather(-1, index).softmax(-1) if config.renormalize else probs.gather(-1, index)
    return finish(logits, probs, weights, experts, nonfinite, config, context)


@policy("switch", causal=True, fused=True)
def switch(logits: Tensor, config, context: Context) -> Routing:
    """The one likeliest expert, weighed by its probability (Fedus 2021, eq. 1-2).

        p = softmax(x)    S = argmax p    w = p

    The weight must not be renormalised: it would be 1, whatever x, and the router would never learn.
    """
    assert config.top_k == 1, "the switch router visits one expert: top_k = 1"
    logits, nonfinite = finite_rows(logits)
    experts = top_k(preference(logits, partial(torch.softmax, dim=-1), config, context), 1)          # (N, 1)
    probs = logits.softmax(-1)                                                       # (N, E)
    return finish(logits, probs, probs.gather(-1, experts.long()), experts, nonfinite, config, context)


@policy("sigmoid", causal=True, fused=True)
def sigmoid(logits: Tensor, config, context: Context) -> Routing:
    """Top-k of independent sigmoid scores, usually with a selection bias (DeepSeek-V3, eq. 12-16).

        s = sigmoid(x)    S = the K largest s + bias    w_e = s_e / sum_S s, or s_e unless config.renormalize

    The balance loss sees s / sum s. Both quotients are a softmax of log s, where no underflow can make them 0 / 0.
    """
    logits, nonfinite = finite_rows(logits)
    experts = top_k(preference(logits, torch.sigmoid, config, context), config.top_k)
    log_s = F.logsigmoid(logits)                                                     # (N, E)
    chosen = log_s.gather(-1, experts.long())                                        # (N, K)
    weights = chosen.softmax(-1) if config.renormalize else chosen.exp()
    return finish(logits, log_s.softmax(-1), weights, experts, nonfinite, config, context)


@policy("top_p", causal=True)
def top_p(logits: Tensor, config, context: Context) -> Routing:
    """As many experts as it takes to reach probability top_p, K at most (Huang 2024, "Harder tasks").

        p = softmax(x), descending    S = the first m with p_1 + ... + p_m >= top_p, m <= K    w as for softmax

    A sure token visits one expert, an unsure one several. Slots behind the m-th stay unused: their experts are the next
    likeliest, of weight 0. Experts a token, on average: K times the sum of stats["load"].
    """
    logits, nonfinite = finite_rows(logits)
    chosen_by = noisy(logits, config, context)
    experts = top_k(chosen_by, config.top_k)
    probs, index = logits.softmax(-1), experts.long()                                # (N, E), (N, K)
    p = chosen_by.softmax(-1).gather(-1, index)
    used = p.cumsum(-1) - p < config.top_p                                           # not yet reached before this one
    chosen = logits.gather(-1, index).where(used, -torch.inf)
    weights = chosen.softmax(-1) if config.renormalize else probs.gather(-1, index).where(used, 0.0)
    return finish(logits, probs, weights, experts, nonfinite, config, context, used)


@policy("expert_choice", causal=False)
def expert_choice(logits: Tensor, config, context: Context) -> Routing:
    """Each expert takes its likeliest N K / E tokens; a token may get many or none (Zhou 2022, eq. 1-2).

        p = softmax(x)    expert e takes the C = ceil(N K / E) tokens of largest p_e    w_e = p_e, never renormalised

    Load is even by construction. Not causal: a later token can take an earlier one's place, so a language model trained
    like this has seen what it will not have when it writes. The plan's second axis is min(E, 2K) slots a token. One
    taken by more experts loses the least likely (stats["dropped"]); unused slots hold its next likeliest, of weight 0.
    """
    assert config.capacity_factor is config.eval_capacity_factor is None, "expert choice has a capacity of its own"
    logits, nonfinite = finite_rows(logits)
    (n, n_expert), probs = logits.shape, logits.softmax(-1)
    order = noisy(logits, config, context).softmax(-1).argsort(dim=0, descending=True, stable=True)  # (N, E)
    capacity = math.ceil(n * config.top_k / n_expert)
    taken = torch.zeros_like(probs).scatter_(0, order[:capacity], 1.0)               # (N, E) 1 where e takes the token
    experts = top_k(taken + probs, min(n_expert, 2 * config.top_k))                  # taken ones first
    used = taken.gather(-1, experts.long()) > 0
    weights = probs.gather(-1, experts.long()).where(used, 0.0)
    plan = finish(logits, probs, weights, experts, nonfinite, config, context, used)
    if plan.stats:
        plan.stats["dropped"] = (taken.sum() - used.sum()) / max(n_expert * capacity, 1)
    return plan


@policy("hash", causal=True)
def hash_ids(logits: Tensor, config, context: Context) -> Routing:
    """Experts fixed for ever by a hash of the token's id, nothing learnt (Roller 2021, "Hash layers").

        S = the K experts e of largest hash(id, e)    w_e = 1 / K
    """
    assert context.ids is not None, "the hash router chooses by token ids: pass Context(ids=...)"
    n_expert = logits.shape[-1]
    bits = context.ids.long()[:, None] * n_expert + torch.arange(n_expert, device=logits.device)     # (N, E), all apart
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):                       # MurmurHash3's last steps, 32 bits
        bits = (bits ^ (bits >> shift)) * factor & 0xFFFFFFFF
    return unlearnt(logits, (bits >> 8).float(), config, context)                    # 24 bits: exact in a float32


@policy("random", causal=True)
def random(logits: Tensor, config, context: Context) -> Routing:
    """K experts at random, anew for every token, nothing learnt: the floor any router must beat.

        S = K of E uniformly    w_e = 1 / K
    """
    return unlearnt(logits, torch.rand_like(logits), config, context)


def unlearnt(logits: Tensor, scores: Tensor, config, context: Context) -> Routing:
    """The K largest scores at equal weight. The balance loss is a constant 1: there is no probability to pull."""
    logits, nonfinite = finite_rows(logits)
    experts = top_k(scores, config.top_k)
    weights, even = logits.new_full(experts.shape, 1 / config.top_k), torch.full_like(logits, 1 / logits.shape[-1])
    return finish(logits, even, weights, experts, nonfinite, config, context)


def kernels_serve(logits: Tensor, config, context: Context) -> bool:
    """Whether `topk_kernels` takes this one: a tile of tokens must fit in registers, and noise is drawn in torch."""
    fits = len(logits) > 0 and config.top_k <= 32 and logits.shape[-1] <= 1024
    plain = config.balance_scope != "sequence" and not (context.training and config.router_noise > 0)
    return fits and plain and use_kernels(logits) and not torch.compiler.is_compiling()     # it fuses the definition


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
# The definition passes over the (N, E) logits 20 + K times forward and 20 times back, in some ninety launches, and
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
    choice = tl.zeros((key.shape[0], kk.shape[1]), tl.int32)
    value = choice
    for k in range(K):
        best = tl.max(key, 1)
        winner = tl.min(tl.where(key == best[:, None], e[None, :], key.shape[1]), 1)
        key = tl.where(e[None, :] == winner[:, None], LOWEST, key)
        choice = tl.where(kk == k, winner[:, None], choice)
        value = tl.where(kk == k, best[:, None], value)
    return choice, value, key


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

        choice, value, key = take_best(key, e, kk, K, LOWEST)
        at, kept = base * K + (n[:, None] * K + kk), live[:, None] & (kk < K)
        value = mirror(value).to(tl.float32, bitcast=True)                           # the chosen logits
        if bias is not None:                                                         # the key was not the logit
            value = tl.load(logits + base * E + (n[:, None] * E + choice), kept & finite[:, None], other=0.0)
        value = log_sigmoid(value) if SIGMOID else value
        if RENORMALIZE:
            w = tl.where(kk < K, tl.exp(value - tl.max(tl.where(kk < K, value, float("-inf")), 1)[:, None]), 0.0)
            w *= (1.0 / tl.sum(w, 1))[:, None]
        else:
            w = tl.exp(value if SIGMOID else value - log_z[:, None])
        tl.store(weights + at, w, kept)
        tl.store(experts + at, choice, kept)
        tl.store(lse + base + n, tl.where(finite, log_z, float("inf")), live)        # inf: a row without gradient

        load += tl.sum(((key == LOWEST) & real & live[:, None]).to(tl.int32), 0)
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
def route_bwd(logits, lse, weights, experts, share, d_weights, d_scalars, d_logits, N, E: constexpr, K: constexpr,
              SIGMOID: constexpr, RENORMALIZE: constexpr, ROWS: constexpr, BLOCK_E: constexpr):
    """Reads the logits once more and writes their gradient: 8 N E bytes, and 4 N (3K + 1) for weights, experts and lse.

    The definition keeps probs, weights and the top-k's scores for autograd. Here p comes back as exp(x - lse), and:
        weights as they are    dx_e = p_e ([e chosen] dw_e - sum_j w_j dw_j)
        renormalised           dx_e = w_e (dw_e - sum_j w_j dw_j) for chosen e: w is a softmax of the chosen logits
        balance                dx_e = p_e (g_e - sum_i p_i g_i), g_e = E f_e / N
        z                      dx_e = p_e 2 lse / N
    Sigmoid: the first three are gradients of log s, so p is s / sum s there, times d log s / dx = 1 - s; and weights as
    they are, w_e = s_e, depend on no other expert.
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


# --- the kernels: launching them ------------------------------------------------------------------------------------


def run_route_fwd(logits: Tensor, bias: Tensor | None, k: int, sigmoid: bool, renormalize: bool) -> tuple[Tensor, ...]:
    """Returns weights and experts (N, K), lse (N,), ends (E, T) int32 and sums (E + 4, T): see route_fwd."""
    (n, n_expert), shape = logits.shape, tiling(logits.shape[1])
    n_tile = triton.cdiv(n, shape["TILE"])
    weights, lse, sums = logits.new_empty(n, k), logits.new_empty(n), logits.new_empty(n_expert + 4, n_tile)
    experts = logits.new_empty(n, k, dtype=torch.int32)
    hist = logits.new_empty(n_expert, n_tile, dtype=torch.int32)
    route_fwd[(n_tile,)](logits, bias, weights, experts, lse, hist, sums, n, n_tile, n_expert, k, sigmoid, renormalize,
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


def run_route_bwd(saved: tuple[Tensor, ...], d_weights: Tensor, d_scalars: Tensor,
                  sigmoid: bool, renormalize: bool) -> Tensor:
    """Returns the gradient of the logits (N, E); saved is what `TopK` kept."""
    logits, weights, d_logits = saved[0], saved[2], torch.empty_like(saved[0])
    (n, n_expert), shape = logits.shape, tiling(logits.shape[1])
    del shape["TILE"]
    route_bwd[(triton.cdiv(n, shape["ROWS"]),)](*saved, d_weights.contiguous(), d_scalars.contiguous(), d_logits, n,
                                                n_expert, weights.shape[1], sigmoid, renormalize, **shape)
    return d_logits


def run_rows(kernel, source: Tensor, slot: Tensor, n_row: int) -> Tensor:
    """Launch gather_rows or combine_rows: one program a token and 2048 columns, 16 bytes a thread in bfloat16."""
    (n, k), d = slot.shape, source.shape[1]
    out = source.new_empty(n_row, d)
    block = min(2048, triton.next_power_of_2(d))
    kernel[(n, triton.cdiv(d, block))](source, slot.contiguous(), out, d, k, block, num_warps=max(1, block // 256))
    return out


class TopK(torch.autograd.Function):
    """The kernels behind softmax, switch and sigmoid. Keeps the logits and 2K + 1 numbers a token."""

    @staticmethod
    def forward(ctx, logits, config, context):
        logits, name = logits.contiguous(), config.router
        form = name == "sigmoid", bool(config.renormalize) and name != "switch"      # sigmoid, renormalize
        weights, experts, lse, ends, sums = run_route_fwd(logits, context.bias, config.top_k, *form)
        counts, offsets, load, scalars = run_totals(ends, sums, len(logits), config.top_k)
        slot, token = run_place(experts, ends)
        share = load
        if config.balance_scope == "global" and context.training:                    # f_e of more than these tokens
            demand = global_demand(counts, context)
            share = demand / demand.sum()
            scalars[0] = len(load) / len(logits) * (share * sums[:len(load)].sum(1)).sum()
        ctx.save_for_backward(logits, lse, weights, experts, share)
        ctx.form = form
        ctx.mark_non_differentiable(experts, counts, offsets, slot, token, load)
        return weights, experts, counts, offsets, slot, token, load, scalars

    @staticmethod
    @once_differentiable
    def backward(ctx, d_weights, *others):
        return run_route_bwd(ctx.saved_tensors, d_weights, others[-1], *ctx.form), None, None


def topk_kernels(logits: Tensor, config, context: Context) -> Routing:
    """A fused policy through the kernels: the same Routing, weights and losses to rounding, everything else exactly."""
    *plan, load, scalars = TopK.apply(logits, config, context)
    names = ("entropy", "dropped", "nonfinite")
    stats = {"load": load} | dict(zip(names, scalars.detach()[2:].unbind()))
    return Routing(*plan, plan[2], {"balance": scalars[0], "z": scalars[1]}, stats)


# --- the self-check -------------------------------------------------------------------------------------------------


def check(routing: Routing, n_token: int, n_expert: int) -> None:
    """Assert every line of the contract that can be read off one Routing."""
    k = routing.experts.shape[1]
    rows = n_token * k
    flat = routing.experts.flatten().long()
    assert routing.weights.shape == routing.experts.shape == routing.slot.shape == (n_token, k)
    assert routing.weights.dtype == torch.float32 and routing.weights.isfinite().all() and (routing.weights >= 0).all()
    for name in ("experts", "counts", "offsets", "slot", "token", "demand"):
        assert getattr(routing, name).dtype == torch.int32, name
    assert ((flat >= 0) & (flat < n_expert)).all(), "an expert that does not exist"
    assert all(len(set(row)) == k for row in routing.experts.tolist()), "a token visits the same expert twice"
    assert torch.equal(routing.counts.long(), torch.bincount(flat, minlength=n_expert)), "counts"
    assert routing.demand.shape == (n_expert,) and (routing.demand <= routing.counts).all(), "demand"
    assert torch.equal(routing.offsets, routing.counts.cumsum(0, dtype=torch.int32)), "offsets"
    row = torch.arange(rows, device=flat.device)
    order = (flat * rows + row).argsort()                                            # expert first, then token order
    assert torch.equal(routing.token.long(), order), "rows are not in expert order, ties in token order"
    assert torch.equal(routing.slot.flatten().long()[order], row), "slot is not the inverse of token"
    assert set(routing.losses) == {"balance", "z"} and {"load", "entropy", "dropped", "nonfinite"} <= set(routing.stats)


def check_causal(logits: Tensor, config, context: Context) -> bool:
    """Whether an earlier token keeps its experts and weights when every later token changes (and chance does not)."""
    half = len(logits) // 2
    changed = torch.cat([logits[:half], -logits[half:]])
    ids = None if context.ids is None else torch.cat([context.ids[:half], context.ids[half:] + 1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        a = route(logits, config, context)
        torch.manual_seed(0)
        b = route(changed, config, replace(context, ids=ids))
    return torch.equal(a.experts[:half], b.experts[:half]) and torch.equal(a.weights[:half], b.weights[:half])


# The lesson in numbers: what the definition and the kernels move, and on a GPU how long they take for it.


def bytes_moved(n: int, e: int, k: int, d: int) -> dict[str, tuple[int, int]]:
    """Bytes through main memory, (definition, kernels): rows of D in bfloat16, everything else 4 bytes a number.

    The definition's are its operators' inputs and outputs, added up: 20 + K passes over the logits forward, 20 back.
    Its gather reads a token K times; its combine copies the rows into token order and then reads them again to add.
    """
    logits, r = 4 * n * e, n * k
    tiles = 4 * -(-n // tiling(e)["TILE"])
    score, sort = logits + 4 * n * (2 * k + 1) + tiles * (2 * e + 4), 12 * r + tiles * e
    return {
        "route, forward": ((20 + k) * logits + 192 * r, score + sort + tiles * (3 * e + 4)),
        "  of it route_fwd": ((20 + k) * logits + 88 * r, score),
        "  of it place": (104 * r, sort),
        "route, backward": (20 * logits, 2 * logits + 4 * n * (3 * k + 1)),
        "gather": (4 * d * r, 2 * d * (n + r)),
        "combine": (2 * d * (3 * r + n), 2 * d * (n + r)),
    }


def functions_timed(n: int, e: int, k: int, d: int) -> dict[str, tuple[Callable, Callable]]:
    """The same rows as `bytes_moved`, as (definition, kernels) to call on a GPU."""
    config, here = settings("softmax", k), Context()
    logits = torch.randn(n, e, device="cuda", requires_grad=True)
    plan, fused = softmax(logits, config, here), topk_kernels(logits, config, here)
    score = lambda: run_route_fwd(logits.detach(), None, k, False, True)
    x, d_weights = torch.randn(n, d, device="cuda", dtype=torch.bfloat16), torch.randn_like(plan.weights)
    rows, ends = gather(x, plan.slot), score()[3]

    def backward(routing):
        loss = (routing.weights * d_weights).sum() + routing.losses["balance"] + routing.losses["z"]
        return lambda: torch.autograd.grad(loss, logits, retain_graph=True)

    return {
        "route, forward": (lambda: softmax(logits, config, here), lambda: topk_kernels(logits, config, here)),
        "  of it route_fwd": (lambda: top_k(logits.softmax(-1), k), score),
        "  of it place": (lambda: place(plan.experts, e), lambda: run_place(plan.experts, ends)),
        "route, backward": (backward(plan), backward(fused)),
        "gather": (lambda: x.index_select(0, plan.token // k), lambda: run_rows(gather_rows, x, plan.slot, n * k)),
        "combine": (lambda: rows.index_select(0, plan.slot.flatten()).view(n, k, d).sum(1),
                    lambda: run_rows(combine_rows, rows, plan.slot, n)),
    }


def print_kernels(n: int = 16384, e: int = 128, k: int = 8, d: int = 2048) -> None:
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


# The policies side by side, on the logits of a router with favourites.


def describe(name: str) -> str:
    """A policy on one line: name, whether it is causal, and the first line of its docstring."""
    what = (POLICIES[name].route.__doc__ or "").partition("\n")[0]
    return f"{name:14s}{'causal' if POLICIES[name].causal else 'not causal':12s}{what}"


def figures(name: str, n: int = 512, e: int = 16) -> dict:
    """Check a policy's promises on synthetic logits, and return what it does with them: numbers, ready for JSON."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(n, e, generator=draw) + torch.linspace(1, -1, e)
    ids = (256 * torch.rand(n, generator=draw) ** 3).long()                          # some tokens are frequent
    config, context = settings(name, 1 if name == "switch" else 4), Context(ids, training=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plan = route(logits, config, context)
    check(plan, n, e)
    assert not POLICIES[name].causal or check_causal(logits, config, context), f"{name} says it is causal and is not"
    about = {"policy": name, "n_token": n, "n_expert": e, "top_k": config.top_k}
    return about | {key: value.tolist() for key, value in (plan.losses | plan.stats).items()}


def print_policies(names) -> None:
    print("512 tokens, 16 experts, top-4 (switch: top-1); balance loss: 1 is even, 4 the worst (switch: 16)\n")
    print("  policy          balance      z  entropy  busiest expert  slots in use  dropped")
    for f in map(figures, names):
        busiest, used = 16 * max(f["load"]) / sum(f["load"]), sum(f["load"])
        print(f"  {f['policy']:14s} {f['balance']:8.3f} {f['z']:6.2f} {f['entropy']:8.2f} {busiest:8.2f} x even "
              f"{used:13.1%} {f['dropped']:8.1%}")
    print("\n" + "\n".join("  " + describe(name) for name in names))


def draw_policy(name: str, folder: Path = Path("out")) -> None:
    """The load of one policy in text, and in FOLDER/router_NAME.png with its data beside it in .json."""
    from matplotlib.figure import Figure

    f, path = figures(name), folder / f"router_{name}.json"
    even = sum(f["load"]) / f["n_expert"]
    print("\nshare of all rows that each expert is chosen for")
    for e, share in enumerate(f["load"]):
        print(f"  expert {e:3d} {share:6.2%} {'#' * round(20 * share / even)}")
    print(f"  {'even load':10s} {even:6.2%} {'#' * 20}")
    picture = Figure(figsize=(6, 3), layout="constrained")
    axes = picture.subplots()
    axes.bar(range(f["n_expert"]), f["load"])
    axes.axhline(even, color="black", linewidth=1, label="even load")
    axes.set(xlabel="expert", ylabel="share of rows", title=f"{name}: load on logits with favourites")
    axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(f, indent=1) + "\n")
    picture.savefig(path.with_suffix(".png"), dpi=150)
    print(f"\nwrote {path.with_suffix('.png')} and {path}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Check and compare the routing policies.")
    parser.add_argument("--list", action="store_true", help="name the policies, one line each")
    parser.add_argument("--policy", metavar="NAME", help="the load of one policy: text, out/router_NAME.png and .json")
    parser.error = lambda message: parser.exit(2, f"error: {message}; python router.py --help lists what there is\n")
    args = parser.parse_args(arguments)
    if args.policy is not None and args.policy not in POLICIES:
        near = difflib.get_close_matches(args.policy, POLICIES, 1)
        print(f"error: policy {args.policy!r} is not one of {', '.join(POLICIES)}"
              + (f", did you mean {near[0]}?" if near else ""), file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(map(describe, POLICIES)))
    elif args.policy:
        print_policies([args.policy])
        draw_policy(args.policy)
    else:
        print_policies(POLICIES)
        print_kernels()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
