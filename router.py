"""
router.py: which experts does a token visit, and with what weight?

A mixture-of-experts layer owns E small feed-forward networks and sends each token to K of them. The router is the part
that decides. It sees one row of E logits for a token and must answer three questions:

    which K experts?      the largest scores, the lowest index first among equals
    with what weight?     their softmax probabilities, renormalised to sum to 1 or left as they are
    in what order?        rows sorted by expert, so that each expert multiplies one contiguous block

Everything downstream reads the answer from one object, `Routing`. A new routing idea is one function that fills it
in and one decorator that names it: see `softmax_topk`, and then write your own below it.

Axes, everywhere in this file:
    N tokens    E experts    K experts a token visits (top-k)    R = N * K routed rows (known without asking the GPU)

`python router.py` checks every policy against the contract and draws where the tokens of a random batch go.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

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
    stats    name -> tensor   "load" (E,), "entropy", "dropped", "nonfinite": detached, never copied to the host here
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
    """Route logits (N, E) float32 by the policy config.router; config also holds top_k and whatever that policy reads."""
    assert logits.dtype == torch.float32, "router logits are float32 whatever the precision around them"
    return POLICIES[config.router].route(logits, config)


# --- the pieces every policy is built from --------------------------------------------------------------------------


def finite_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Replace each row that holds a NaN or an infinity by zeros: the token goes to experts 0 ... K-1, equally weighted.

    The rest of the batch is then routed as ever, and the row is counted in stats["nonfinite"] instead of spreading.
    """
    finite = logits.isfinite().all(-1, keepdim=True)
    return logits.where(finite, 0.0), (~finite).sum()


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of scores (N, E), largest first, the lowest index first among equals.

    torch.topk leaves the order among equals open; a stable sort does not, and the kernels must agree with it.
    """
    experts = scores.detach().argsort(stable=True, dim=-1, descending=True)[:, :k]
    return scores.gather(-1, experts), experts.int()


def place(experts: Tensor, n_expert: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stable counting sort of the choices (N, K) by expert: returns counts, offsets, slot, token (see Routing)."""
    flat = experts.flatten().long()                                                  # (R,)
    token = flat.argsort(stable=True)                                                # (R,) row -> choice
    slot = torch.empty_like(token)
    slot[token] = torch.arange(len(flat), device=flat.device)                        # (R,) choice -> row
    counts = torch.zeros(n_expert, dtype=torch.int32, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))           # bincount would wait for the GPU
    return counts, counts.cumsum(0, dtype=torch.int32), slot.view(experts.shape).int(), token.int()


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
    """Everything that follows once a policy has chosen: rows in expert order, the losses, the statistics."""
    counts, offsets, slot, token = place(experts, logits.shape[-1])
    with torch.no_grad():
        stats = {
            "load": counts / max(experts.numel(), 1),                                # (E,) share of rows
            "entropy": mean_over_tokens(-torch.special.xlogy(probs, probs).sum(-1)),  # nats; ln E when undecided
            "dropped": (weights == 0).sum() / max(weights.numel(), 1),
            "nonfinite": nonfinite,
        }
    losses = {"balance": balance_loss(probs, counts), "z": z_loss(logits)}
    return Routing(weights, experts, counts, offsets, slot, token, losses, stats)


# --- policies -------------------------------------------------------------------------------------------------------


@policy("softmax", causal=True)
def softmax_topk(logits: Tensor, config) -> Routing:
    """Dropless top-k of a softmax: p = softmax(logits), the K largest p, divided by their sum if config.renormalize.

    Qwen3-MoE and Mixtral renormalise; OLMoE does not. Renormalised, softmax and top-k may be done in either order; left
    as they are, the weights say how much mass the token gives to the experts it did not visit.
    """
    logits, nonfinite = finite_rows(logits)
    probs = logits.softmax(-1)                                                       # (N, E)
    weights, experts = top_k(probs, config.top_k)                                    # (N, K) each
    if config.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return finish(logits, probs, weights, experts, nonfinite)


# --- moving rows ----------------------------------------------------------------------------------------------------


def gather(x: Tensor, token: Tensor, k: int) -> Tensor:
    """Copy tokens into expert order: x (N, D), token (R,) -> (R, D). Its gradient is `combine`."""
    return x.index_select(0, token.long() // k)


def combine(rows: Tensor, slot: Tensor) -> Tensor:
    """Sum the K rows of each token, in the order of k: rows (R, D), slot (N, K) -> (N, D). Its gradient: `gather`."""
    return rows.index_select(0, slot.flatten()).view(*slot.shape, -1).sum(1)


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
    assert set(routing.losses) == {"balance", "z"} and {"load", "entropy", "dropped"} <= set(routing.stats)


def check_causal(name: str, logits: Tensor, config) -> bool:
    """Whether an earlier token keeps its experts and weights when every later token changes."""
    half = len(logits) // 2
    changed = torch.cat([logits[:half], -logits[half:]])
    a, b = POLICIES[name].route(logits, config), POLICIES[name].route(changed, config)
    return torch.equal(a.experts[:half], b.experts[:half]) and torch.equal(a.weights[:half], b.weights[:half])


def main(n_token: int = 512, n_expert: int = 16, k: int = 4) -> None:
    logits = torch.randn(n_token, n_expert, generator=torch.Generator().manual_seed(0))
    logits += torch.linspace(1, -1, n_expert)                                        # a router with favourites
    print(f"{n_token} tokens, {n_expert} experts, top-{k}; balance loss: 1 is perfect, {n_expert / k:g} the worst\n")
    for name, entry in POLICIES.items():
        config = SimpleNamespace(router=name, top_k=k, renormalize=True)
        routing = route(logits, config)
        check(routing, n_token, n_expert, k)
        assert not entry.causal or check_causal(name, logits, config), f"{name} says it is causal and is not"
        s, loss = routing.stats, routing.losses
        print(f"{name}: contract ok, causal {'yes' if entry.causal else 'no'}, balance {loss['balance']:.3f}, "
              f"z {loss['z']:.2f}, entropy {s['entropy']:.2f} nats, dropped {s['dropped']:.1%}")
        for e, share in enumerate(s["load"].tolist()):
            print(f"  expert {e:3d} {share:6.2%} {'#' * round(share * n_expert * 20)}")
        print(f"  {'even load':10s} {1 / n_expert:6.2%} {'#' * 20}")


if __name__ == "__main__":
    main()
