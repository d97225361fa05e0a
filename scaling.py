"""The joint scaling law of mixture-of-experts language models: what loss to expect, and which model to train.

    python scaling.py tables                                      the paper's Tables 1 and 3 recomputed, its errata
    python scaling.py optimum --flops 1e21 --memory 5B            the best size, tokens and loss for each expert count
    python scaling.py fit out/                                    fit the law to your own runs, with intervals
    python scaling.py simulate                                    how well such a fit recovers a law we know
    python scaling.py plan --flops 1e21 --gpu H100 --gpus 8       a model to train: shape, steps, learning rate, days
    python scaling.py figures                                     the paper's figures, redrawn into results/law/
    python scaling.py speed                                       how long the fit takes, against torch's L-BFGS

"The paper" is Ludziejewski et al., "Joint MoE Scaling Laws: Mixture of Experts Can Be Memory Efficient" (2025), and
equation numbers are its own. Symbols: N active parameters, embeddings and head included; D training tokens; E experts,
1 for a dense model; L cross-entropy in nats per token; F floating point operations. Batches: S laws or starts at
once, R runs, P free parameters. Everything is float64 numpy; torch is imported by `plan` and `speed` alone.
"""

import argparse
import csv
import itertools
import json
import math
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).parent
RUN_LIST = HERE / "results" / "law" / "runs.csv"
EXPERTS = np.array([1, 2, 4, 8, 16, 32])
NOISE = 0.0062                                      # the paper's RMSE on its own runs, nats


class BadInput(Exception):
    """One line for the user; main() prints it and leaves with exit code 2."""


# -- 1. The law --------------------------------------------------------------------------------------------------------

class Law(NamedTuple):
    """L(N, D, E) = a Ê^-delta N^-(alpha + gamma ln Ê) + b Ê^-omega D^-(beta + zeta ln Ê) + c        (eq. 5, 6; Table 2)

    The defaults are the paper's Table 2. A field may be an array of shape (S, 1): then one object is S laws, and every
    method broadcasts over them. `offset` is added to E - 1 in eq. 6; 0.01 reproduces the printed Table 3 (erratum 2).
    """
    a: float = 35.91
    alpha: float = 0.1889
    delta: float = 0.2285
    gamma: float = -0.0098
    b: float = 35.98
    beta: float = 0.1775
    omega: float = -0.5529
    zeta: float = 0.0259
    c: float = 1.3637
    e_start: float = 2.0732
    e_max: float = 290.4521
    offset: float = 0.0

    def ehat(self, E: np.ndarray) -> np.ndarray:
        """Effective experts Ê (eq. 6): e_start for a dense model, about E in the middle, at most e_max."""
        rest = np.asarray(E, float) - 1 + self.offset + 1 / (1 / self.e_start - 1 / self.e_max)
        return 1 / (1 / rest + 1 / self.e_max)

    def terms(self, E: np.ndarray) -> tuple:
        """(m, mu, n, nu): with E held fixed the law is Chinchilla's, L = m N^-mu + n D^-nu + c (Table 3)."""
        x = np.log(self.ehat(E))
        return (self.a * np.exp(-self.delta * x), self.alpha + self.gamma * x,
                self.b * np.exp(-self.omega * x), self.beta + self.zeta * x)

    def loss(self, N: np.ndarray, D: np.ndarray, E: np.ndarray) -> np.ndarray:
        """Expected loss in nats per token; N, D, E broadcast against each other and against the fields."""
        m, mu, n, nu = self.terms(E)
        return m * np.exp(-mu * np.log(np.asarray(N, float))) + n * np.exp(-nu * np.log(np.asarray(D, float))) + self.c


COEFFICIENTS = Law._fields[:11]


def many(theta: np.ndarray) -> Law:
    """S laws from coefficients (S, 11), fields shaped (S, 1) so that they broadcast against runs (R,)."""
    return Law(*np.asarray(theta, float).T[:, :, None])


def law_size(d_model: np.ndarray, n_layer: np.ndarray, n_expert: np.ndarray, vocab_size: int = 50257) -> tuple:
    """(N_total, N_active) as the paper counts: embedding and head 2dV, attention 4d² and SwiGLU of width 3d 9d² a block;
    norms and router left out. One expert of E is active (Switch), so E changes the total alone."""
    embedding, block = 2 * d_model * vocab_size, n_layer * d_model**2
    return embedding + (4 + 9 * n_expert) * block, embedding + 13 * block


def learning_rate(n_active: float, n_expert: int) -> float:
    """Peak learning rate (eq. 7); the text's N leaves embeddings out, see plan() for the other reading."""
    return math.exp(8.39 - 0.81 * math.log(n_active) - 0.25 * math.log(n_expert))


# -- 2. The optimum under budgets --------------------------------------------------------------------------------------
# Training costs 6 N D and inference 2 N D_inf operations. With E fixed the loss along a budget is a sum of two convex
# functions of ln N, so it has one minimum, and a memory limit cuts it: the answer is min(unconstrained N, largest N).

def bisect(increasing, low, high, steps: int = 90):
    """Root of an increasing function between arrays low and high, elementwise; 90 halvings exhaust float64."""
    low, high = np.broadcast_arrays(np.asarray(low, float), np.asarray(high, float))
    for _ in range(steps):
        middle = (low + high) / 2
        above = increasing(middle) > 0
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2


def width(cubic, target, kv_tokens: float = 0):
    """d_model, as a real number, at which 2dV + 2Td²/64 + cubic d³/64 = target; the paper's models have d/64 blocks."""
    d = lambda x: np.exp(x)
    size = lambda x: 2 * 50257 * d(x) + (2 * kv_tokens * d(x) ** 2 + cubic * d(x) ** 3) / 64
    return np.exp(bisect(lambda x: size(x) - target, 0 * np.asarray(target, float), np.log(target)))


def compute_optimum(law: Law, E, flops):
    """N minimising L at 6ND = F: m mu N^-mu = n nu D^-nu gives N = G (F/6)^(nu/(mu+nu)) (eq. 10, exponent of G repaired)."""
    m, mu, n, nu = law.terms(E)
    return (mu * m / (nu * n)) ** (1 / (mu + nu)) * (np.asarray(flops, float) / 6) ** (nu / (mu + nu))


def inference_optimum(law: Law, E, flops, inference_tokens):
    """N minimising L at 6ND + 2 N D_inf = F, that is D = F/(6N) - D_inf/3. dL/dlnN rises in ln N: its root is the answer."""
    m, mu, n, nu = law.terms(E)
    flops = np.asarray(flops, float) + 0 * m

    def slope(x):
        D = np.maximum(flops / 6 * np.exp(-x) - inference_tokens / 3, 1e-300)
        return np.log(nu * n * flops / 6) - x - (nu + 1) * np.log(D) - np.log(mu * m) + mu * x
    return np.exp(bisect(slope, 0 * flops, np.log(flops / (2 * inference_tokens))))


def optimum(law: Law, E, flops, memory=None, kv_tokens: float = 0, inference_tokens: float = 0) -> tuple:
    """(N, D, L) of the best model with E experts under the budgets; arguments broadcast, L is inf where nothing fits.

    memory, in parameters, holds the whole model and 2 T n d values of key-value cache for T = kv_tokens tokens.
    """
    unconstrained = inference_optimum(law, E, flops, inference_tokens) if inference_tokens else compute_optimum(law, E, flops)
    N, smallest = unconstrained, law_size(64, 1, 1)[1]
    if memory is not None:
        d = width(4 + 9 * np.asarray(E), memory + 0.0 * np.asarray(E), kv_tokens)
        N = np.minimum(N, np.where(d >= 64, law_size(d, d / 64, E)[1], 0))
    fits = N >= smallest
    N = np.where(fits, N, smallest)
    D = np.asarray(flops, float) / (6 * N) - inference_tokens / 3
    fits = fits & (D >= 1)
    D = np.where(fits, D, 1.0)
    return N, D, np.where(fits, law.loss(N, D, E), np.inf)


def switches(law: Law, axis: str, values: np.ndarray, draws: Law | None = None, **budget) -> list[dict]:
    """Where the best E changes along `axis` ("memory" or "flops"), with the 90% range of each change over `draws`."""
    column = EXPERTS[:, None]
    along = lambda law, v: optimum(law, column, **{**budget, axis: v})[2]
    loss = along(law, values)
    best = np.where(np.isfinite(loss).any(0), loss.argmin(0), -1)
    stacked = along(Law(*(np.asarray(f)[..., None] if np.ndim(f) else f for f in draws)), values) if draws else None
    found = []
    for i in np.flatnonzero((best[1:] != best[:-1]) & (best[:-1] >= 0)):
        j, k = best[i], best[i + 1]
        gap = lambda x, j=j, k=k: np.subtract(*along(law, np.exp(x))[[j, k]])      # rises through zero at the switch
        at = np.exp(bisect(gap, np.log(values[i:i + 1]), np.log(values[i + 1:i + 2]), 50)).item()
        row = {axis: at, "from": int(EXPERTS[j]), "to": int(EXPERTS[k])}
        if draws:
            row["low"], row["high"], row["share"] = crossing_range(stacked[:, j] - stacked[:, k], values, at)
        found.append(row)
    return found


def crossing_range(gap: np.ndarray, values: np.ndarray, nominal: float) -> tuple:
    """5% and 95% of where each row of `gap` (S, G) passes zero nearest the nominal value, and the share that does."""
    x, found = np.log(values), []
    for row in gap:
        i = np.flatnonzero((row[:-1] <= 0) & (row[1:] > 0) & np.isfinite(row[:-1]) & np.isfinite(row[1:]))
        roots = x[i] - row[i] * (x[i + 1] - x[i]) / (row[i + 1] - row[i])
        if len(roots):
            found.append(roots[np.abs(roots - math.log(nominal)).argmin()])
    low, high = np.exp(np.quantile(found, [0.05, 0.95])) if found else (math.nan, math.nan)
    return float(low), float(high), len(found) / len(gap)


def rule_of_thumb(law: Law, E, flops) -> dict:
    """The paper's rule: at equal total parameters, E <= 8 experts on E times the tokens beat the compute-optimal dense
    model. Returns, per E (rows) and dense budget (columns), the gain in nats and the cost in dense FLOPs."""
    N, D, dense = optimum(law, 1, flops)
    total = law_size(width(13, N), width(13, N) / 64, 1)[0]
    d = width(4 + 9 * np.asarray(E)[:, None], total + 0.0 * np.asarray(E)[:, None])
    active = law_size(d, d / 64, 1)[1]
    return {"gain": dense - law.loss(active, D * np.asarray(E)[:, None], np.asarray(E)[:, None]),
            "cost": 6 * active * D * np.asarray(E)[:, None] / flops}


# -- 3. The fit, and why it is fast ------------------------------------------------------------------------------------
# The paper minimises Huber(ln L_predicted - ln L_observed) with L-BFGS from 19,683 starts, one after the other. Here:
#   Variable projection. For given exponents a, b, c enter linearly, so each start begins at its best a, b, c, by a 3x3
#     solve; the 27 starts that differ in a, b, c alone become one, and 19,683 become 729.
#   Centring. Written in x = ln N - mean, y = ln D - mean, z = ln Ê - mean, a change of one parameter no longer calls for
#     a change of all others. The map is one to one: it loses nothing, and most random starts reach the optimum.
#   All at once. Levenberg-Marquardt, second order, with an analytic Jacobian (S, P, R) for all S starts in one batch.
#     The Huber width shrinks 10 -> 0.1 -> target, so that a bad start is first pulled in by ordinary least squares.
# The bootstrap, cross-validation and leave-one-out are the same call: a replica is a row of weights.

FORMS = {                                           # the parameters that each form leaves free; the others are pinned
    "joint": COEFFICIENTS,
    "chinchilla": ("a", "alpha", "b", "beta", "c"),                         # one law per E, nothing shared
    "clark": ("a", "alpha", "delta", "gamma", "e_start", "e_max"),          # Clark et al. (2022): no tokens, no floor
    "no_interaction": tuple(k for k in COEFFICIENTS if k not in ("gamma", "zeta")),
    "expert_count": tuple(k for k in COEFFICIENTS if k not in ("e_start", "e_max")),      # E itself for Ê
}
FLAT = {"delta": 0.0, "gamma": 0.0, "omega": 0.0, "zeta": 0.0}              # no influence of E
PINNED = {"joint": {}, "chinchilla": FLAT, "clark": {"b": 0.0, "beta": 0.0, "omega": 0.0, "zeta": 0.0, "c": 0.0},
          "no_interaction": {"gamma": 0.0, "zeta": 0.0}, "expert_count": {"e_start": 1.0, "e_max": math.inf}}


class Surface:
    """ln L of R runs and its Jacobian, for S points (S, 11) in centred parameters p:

    L = exp(p0 - p1 x - p2 z - p3 xz) + exp(p4 - p5 y - p6 z - p7 yz) + exp(p8),   p9 = ln E_start,   p10 = 1/E_max
    """
    LOW = np.array([-25, -9, -9, -9, -25, -9, -9, -9, -25, math.log(0.05), 0.0])
    HIGH = np.array([25, 9, 9, 9, 25, 9, 9, 9, 3, math.log(50), 0.5])

    def __init__(self, N, D, E):
        self.E, self.target = E, None
        self.x0, self.y0, self.z0 = np.log(N).mean(), np.log(D).mean(), np.log(Law().ehat(E)).mean()
        self.x, self.y = np.log(N) - self.x0, np.log(D) - self.y0

    def bounds(self, p):
        """Box of the search; 1/E_max stays below 0.95/E_start, where eq. 6 has its pole."""
        high = np.repeat(self.HIGH[None], len(p), 0)
        high[:, 10] = np.minimum(high[:, 10], 0.95 * np.exp(-p[:, 9]))
        return self.LOW, high

    def experts(self, p):
        """z = ln Ê - z0 and its derivatives by p9 and p10, each (S, R)."""
        e_start, u = np.exp(p[:, 9:10]), p[:, 10:]
        q = 1 / e_start - u
        rest = self.E - 1 + 1 / q
        inverse, k = 1 / rest + u, (rest * q) ** -2
        return -np.log(inverse) - self.z0, k / (e_start * inverse), (k - 1) / inverse

    def exponents(self, p, z):
        """The two power laws without their scales, as logarithms (S, R)."""
        return -p[:, 1:2] * self.x - (p[:, 2:3] + p[:, 3:4] * self.x) * z, \
               -p[:, 5:6] * self.y - (p[:, 6:7] + p[:, 7:8] * self.y) * z

    def __call__(self, p):
        """ln L (S, R), and what the Jacobian needs: each term's share of L, and z with its derivatives."""
        z, *dz = self.experts(p)
        first, second = self.exponents(p, z)
        logs = np.stack([p[:, :1] + first, p[:, 4:5] + second, np.broadcast_to(p[:, 8:9], z.shape)])
        top = logs.max(0)                           # logsumexp: a wild start overflows otherwise
        share = np.exp(logs - top)
        total = share.sum(0)
        return top + np.log(total), np.concatenate([share / total, z[None], np.stack(dz)])

    def jacobian(self, p, parts):
        """d ln L / d p, (S, 11, R)."""
        s1, s2, s3, z, dz9, dz10 = parts
        by_z = -s1 * (p[:, 2:3] + p[:, 3:4] * self.x) - s2 * (p[:, 6:7] + p[:, 7:8] * self.y)
        return np.stack([s1, -s1 * self.x, -s1 * z, -s1 * self.x * z, s2, -s2 * self.y, -s2 * z, -s2 * self.y * z,
                         s3, by_z * dz9, by_z * dz10], axis=1)

    def project(self, p, target, weight, free):
        """Variable projection: for the exponents in p, the scales a, b, c of least relative error, floored above zero."""
        z = self.experts(p)[0]
        logs = np.stack([*self.exponents(p, z), np.zeros_like(z)], axis=1)
        top = logs.max(2, keepdims=True)
        basis = np.exp(logs - top - target) * np.sqrt(weight)
        gram = basis @ basis.transpose(0, 2, 1)
        gram += 1e-10 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(3)
        scale = np.linalg.solve(gram, basis @ np.sqrt(np.broadcast_to(weight, z.shape))[..., None])[..., 0]
        p, linear = p.copy(), np.array([i for i in (0, 4, 8) if i in free])
        p[:, linear] = (np.log(np.maximum(scale, 1e-3)) - top[..., 0])[:, linear // 4]
        return p

    def centred(self, law):
        """Coefficients (S, 11) of the law -> centred parameters; ln 0 becomes -25, which is nothing beside a loss of 1."""
        a, alpha, delta, gamma, b, beta, omega, zeta, c, e_start, e_max = np.asarray(law, float)[:, :11].T
        log = lambda v: np.log(np.maximum(v, 1e-11))
        x0, y0, z0 = self.x0, self.y0, self.z0
        return np.stack([log(a) - alpha * x0 - delta * z0 - gamma * x0 * z0, alpha + gamma * z0, delta + gamma * x0, gamma,
                         log(b) - beta * y0 - omega * z0 - zeta * y0 * z0, beta + zeta * z0, omega + zeta * y0, zeta,
                         log(c), np.log(e_start), 1 / e_max], axis=1)

    def laws(self, p):
        """The inverse of centred(): (S, 11) coefficients."""
        x0, y0, z0 = self.x0, self.y0, self.z0
        alpha, delta = p[:, 1] - p[:, 3] * z0, p[:, 2] - p[:, 3] * x0
        beta, omega = p[:, 5] - p[:, 7] * z0, p[:, 6] - p[:, 7] * y0
        with np.errstate(divide="ignore", over="ignore"):
            return np.stack([np.exp(p[:, 0] + alpha * x0 + delta * z0 + p[:, 3] * x0 * z0), alpha, delta, p[:, 3],
                             np.exp(p[:, 4] + beta * y0 + omega * z0 + p[:, 7] * y0 * z0), beta, omega, p[:, 7],
                             np.exp(p[:, 8]), np.exp(p[:, 9]), 1 / p[:, 10]], axis=1)


def huber(r, delta):
    """Quadratic to |r| = delta, linear beyond."""
    size = np.abs(r)
    return np.where(size <= delta, 0.5 * r * r, delta * (size - 0.5 * delta))


def levenberg_marquardt(surface, p, target, weight, delta, free, steps, tol):
    """Minimise sum_r weight Huber(ln L - target) from all S rows of p at once.

    Args: p (S, 11); target and weight (S, R); free, indices of the parameters that move.
    Returns: p (S, 11) and its cost (S,). Rows leave the batch when three steps in a row gain less than `tol`.
    """
    p, live = np.clip(p, *surface.bounds(p)), np.arange(len(p))
    value, parts = surface(p)
    cost = (weight * huber(value - target, delta)).sum(1)
    result, best = p.copy(), cost.copy()
    damping, idle = np.full(len(p), 1e-2), np.zeros(len(p), int)
    for _ in range(steps):
        J, r = surface.jacobian(p, parts)[:, free], value - target
        irls = weight * np.minimum(1, delta / np.maximum(np.abs(r), 1e-300))     # Huber as reweighted least squares
        slope = (J @ (irls * r)[..., None])[..., 0]
        low, high = (bound[..., free] for bound in surface.bounds(p))
        held = ((p[:, free] <= low) & (slope > 0)) | ((p[:, free] >= high) & (slope < 0))
        J[held], slope[held] = 0, 0                 # a parameter pushed against its bound rests there for this step
        H = (J * irls[:, None]) @ J.transpose(0, 2, 1)
        diagonal = np.einsum("sii->si", H)          # a view: what is added here is added to H
        diagonal += damping[:, None] * diagonal + 1e-12 * diagonal.max(1, keepdims=True) + 1e-300
        trial = p.copy()
        trial[:, free] -= np.clip(np.linalg.solve(H, slope[..., None])[..., 0], -2, 2)
        trial = np.clip(trial, *surface.bounds(trial))
        new_value, new_parts = surface(trial)
        new = (weight * huber(new_value - target, delta)).sum(1)
        better = new < cost
        idle = np.where(better & (cost - new > tol * cost), 0, idle + 1)
        damping *= np.where(better, 0.2, 4)
        p[better], value[better], cost[better], parts[:, better] = \
            trial[better], new_value[better], new[better], new_parts[:, better]
        result[live], best[live] = p, cost
        if (keep := idle < 3).all():
            continue
        p, value, cost, parts, live = p[keep], value[keep], cost[keep], parts[:, keep], live[keep]
        target, weight, damping, idle = target[keep], weight[keep], damping[keep], idle[keep]
        if not len(p):
            break
    return result, best


def minimise(surface, p, target, weight, delta, free, steps=100, tol=1e-10):
    """levenberg_marquardt() in pieces that stay near 100 MB; target and weight broadcast to (S, R)."""
    shape = len(p), len(surface.x)
    count = -(-shape[0] * shape[1] // 300_000)
    split = lambda a: np.array_split(np.broadcast_to(a, shape), count)
    done = [levenberg_marquardt(surface, *piece, delta, free, steps, tol)
            for piece in zip(np.array_split(p, count), split(target), split(weight))]
    return np.concatenate([p for p, _ in done]), np.concatenate([cost for _, cost in done])


class Runs(NamedTuple):
    """Training runs, each field (R,): active parameters, tokens, experts, loss in nats, weight (0: held out)."""
    N: np.ndarray
    D: np.ndarray
    E: np.ndarray
    L: np.ndarray
    weight: np.ndarray


class Fit(NamedTuple):
    """A fitted law: its coefficients, the optimum (11,) in the coordinates of `surface`, and how it was reached."""
    law: Law
    p: np.ndarray
    surface: Surface
    free: np.ndarray
    delta: float
    cost: float
    agree: float
    starts: int


def random_starts(surface, base, free, count=24):
    """Starts (count, 11), uniform over exponents that language models have shown; scales are left to project()."""
    low = np.array([0, 0.1, 0.0, -0.05, 0, 0.1, -0.3, -0.05, 0, 0.0, 0.0])
    high = np.array([0, 0.4, 0.3, 0.05, 0, 0.4, 0.3, 0.05, 0, math.log(3), 0.02])
    p = np.repeat(surface.centred([base]), count, 0)
    exponents = [i for i in free if i not in (0, 4, 8)]
    p[:, exponents] = np.random.default_rng(0).uniform(low, high, (count, 11))[:, exponents]
    return p


def paper_grid(surface, base, free, scales=((100, 100, 1),)):
    """The paper's starts in raw coordinates: 729 exponents for each (a, b, c); its 27 scales make 19,683."""
    exponents, linear = itertools.product([0.05, 0.25, 0.5], [0.05, 0.25, 0.5], *[[-0.5, 0, 0.5]] * 4), scales
    laws = np.array([(a, alpha, delta, gamma, b, beta, omega, zeta, c, base.e_start, base.e_max)
                     for (alpha, beta, delta, gamma, omega, zeta), (a, b, c) in itertools.product(exponents, linear)])
    p = np.repeat(surface.centred([base]), len(laws), 0)
    p[:, free] = surface.centred(laws)[:, free]
    return p


def fit(runs: Runs, form: str = "joint", pinned: dict | None = None, starts=random_starts, delta: float | None = None,
        project: bool = True) -> Fit:
    """Fit one form; `pinned` holds further coefficients at given values. delta None: 1.345 robust deviations of the
    residuals, where Huber keeps 95% efficiency; the paper's fixed 0.01 is about four deviations, nearly least squares."""
    pinned = {**PINNED[form], **(pinned or {})}
    base = Law()._replace(**pinned)
    free = np.array([i for i, k in enumerate(COEFFICIENTS) if k in FORMS[form] and k not in pinned])
    surface, target = Surface(runs.N, runs.D, runs.E), np.log(runs.L)
    p = starts(surface, base, free)
    if project:
        p = surface.project(p, target, runs.weight, free)
    for width, steps in ((10, 60), (0.1, 30)):
        p, cost = minimise(surface, p, target, runs.weight, width, free, steps, 1e-7)
    if delta is None:
        residual = (surface(p[[cost.argmin()]])[0][0] - target)[runs.weight > 0]
        delta = max(1.345 * 1.4826 * np.median(np.abs(residual)), 1e-6)
    p, cost = minimise(surface, p, target, runs.weight, delta, free)
    best = cost.argmin()
    coefficients = dict(zip(COEFFICIENTS, surface.laws(p[[best]])[0])) | pinned
    return Fit(Law(**coefficients), p[best], surface, free, float(delta), float(cost[best]),
               float((cost <= cost[best] * (1 + 1e-6)).mean()), len(p))


def refit(fitted: Fit, weight, target) -> np.ndarray:
    """Laws (S, 11) refitted from the optimum: one row of weights (S, R), or of targets (S, R), for each replica."""
    start = np.repeat(fitted.p[None], len(weight if np.ndim(weight) == 2 else target), 0)
    p, _ = minimise(fitted.surface, start, target, weight, fitted.delta, fitted.free, tol=1e-8)
    laws = fitted.surface.laws(p)
    fixed = [i for i in range(11) if i not in fitted.free]
    laws[:, fixed] = np.array(fitted.law[:11])[fixed]
    return laws


def bootstrap(fitted: Fit, runs: Runs, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """Laws (draws, 11) from resampled runs: a run drawn k times has k times its weight."""
    kept = runs.weight > 0
    times = np.random.default_rng(seed).multinomial(kept.sum(), kept / kept.sum(), draws)
    return refit(fitted, times * runs.weight, np.log(runs.L))


# -- 4. Runs in, laws out ----------------------------------------------------------------------------------------------

def read_table(path: Path) -> list[dict]:
    """Rows of a CSV, of one result.json, or of every result.json under a folder."""
    if path.is_dir():
        found = sorted(path.rglob("result.json"))
        if not found:
            raise BadInput(f"{path}: no result.json in this folder; train something first or give a CSV")
        return [row for file in found for row in read_table(file)]
    try:
        if path.suffix == ".json":
            return [{**json.loads(path.read_text()), "source": str(path)}]
        with path.open(newline="") as file:
            return [{**row, "source": f"{path}:{i}"} for i, row in enumerate(csv.DictReader(file), 2)]
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({error.__class__.__name__}); expected a CSV or train.py's result.json") from None


def column(rows: list[dict], name: str, low: float = 0.0) -> np.ndarray:
    """A column as positive finite float64, or one line naming the row that is not."""
    values = []
    for row in rows:
        if row.get(name) is None:
            raise BadInput(f"{row['source']}: no column {name}; a run needs n_active, tokens, n_expert and loss")
        try:
            value = float(row[name])
        except (TypeError, ValueError):
            raise BadInput(f"{row['source']}: {name} = {row[name]!r} is not a number") from None
        if not (math.isfinite(value) and value > low):
            raise BadInput(f"{row['source']}: {name} = {row[name]} must be finite and above {low:g}")
        values.append(value)
    return np.array(values)


def read_runs(sources: list[str], weights: str | None = None) -> tuple[Runs, list[dict]]:
    """Runs from CSV files, result.json files and folders, with the raw rows."""
    rows = [row for source in sources for row in read_table(Path(source))]
    if not rows:
        raise BadInput(f"{' '.join(sources)}: no runs in it")
    E = column(rows, "n_expert", 0.999)
    return Runs(column(rows, "n_active"), column(rows, "tokens"), E, column(rows, "loss"),
                column(rows, weights) if weights else np.ones(len(rows))), rows


def paper_runs() -> Runs:
    """The paper's 270 runs (Appendix H). It publishes no losses, so L is the law's own, without noise."""
    rows = read_table(RUN_LIST)
    N, D, E = (column(rows, name) for name in ("n_active", "tokens", "n_expert"))
    return Runs(N, D, E, Law().loss(N, D, E), np.ones(len(N)))


def hold_out(runs: Runs, rows: list[dict], rule: str) -> Runs:
    """Weight 0 for held-out runs: loss:30 (lowest loss, as in the paper), compute:30 (largest 6ND), column:NAME (not 0)."""
    kind, _, value = rule.partition(":")
    if kind == "column":
        out = np.array([str(row.get(value, "")).strip().lower() not in ("", "0", "0.0", "false") for row in rows])
    elif kind in ("loss", "compute") and value.isdigit():
        out = np.argsort(np.argsort(runs.L if kind == "loss" else -runs.N * runs.D, kind="stable")) < int(value)
    else:
        raise BadInput(f"--holdout {rule}: use loss:30, compute:30, column:NAME or kfold:10")
    if not out.any():
        raise BadInput(f"--holdout {rule} holds out no run; use loss:30, compute:30, column:NAME or kfold:10")
    return runs._replace(weight=np.where(out, 0.0, runs.weight))


def knowable(runs: Runs, form: str, pinned: dict) -> tuple[dict, list[str]]:
    """What such runs cannot tell: returns the coefficients to pin besides the user's, and a line about each."""
    used = runs.weight > 0
    sizes, tokens, experts = (len(np.unique(v[used])) for v in (runs.N, runs.D, runs.E))
    extra, notes = {}, []
    if form not in ("chinchilla", "expert_count"):
        if experts == 1:
            extra = {k: v for k, v in (FLAT | {"e_start": Law().e_start, "e_max": Law().e_max}).items() if k in FORMS[form]}
            notes.append("one value of n_expert: delta, gamma, omega, zeta, e_start, e_max cannot be known; "
                         "held fixed, which leaves the Chinchilla law")
        elif experts < 4:
            extra = {k: getattr(Law(), k) for k in (("e_start", "e_max") if experts == 2 else ("e_max",))}
            notes.append(f"{experts} values of n_expert: {', '.join(extra)} cannot be known; held at the paper's value")
    elif form == "expert_count" and experts == 1:
        extra, notes = FLAT, ["one value of n_expert: delta, gamma, omega, zeta cannot be known; held at 0"]
    extra = {k: v for k, v in extra.items() if k not in pinned}
    if sizes < 3:
        raise BadInput(f"{sizes} value(s) of n_active: a and alpha cannot be told from c; train at least 3 sizes")
    if tokens < 3 and form != "clark":
        raise BadInput(f"{tokens} value(s) of tokens: b, beta and zeta cannot be told from c; vary tokens, or use --form clark")
    count = sum(k not in PINNED[form] and k not in pinned and k not in extra for k in FORMS[form])
    if used.sum() <= count:
        raise BadInput(f"{used.sum()} runs cannot fix {count} parameters of form {form}; add runs, or use a form with fewer "
                       f"(--form chinchilla: 5)")
    return extra, notes


def fit_form(runs: Runs, form: str, pinned: dict | None = None, **options) -> tuple[list[tuple], list[str]]:
    """Fits of one form as [(mask of its runs, Fit)]: one part for all runs, or one per E for "chinchilla"."""
    pinned = {k: v for k, v in (pinned or {}).items() if k in FORMS[form]}
    masks = [runs.E == E for E in np.unique(runs.E)] if form == "chinchilla" else [np.ones(len(runs.E), bool)]
    parts, notes = [], []
    for mask in masks:
        some = Runs(*(field[mask] for field in runs))
        try:
            extra, lines = knowable(some, form, pinned)
        except BadInput as error:
            raise BadInput(f"E = {some.E[0]:g}: {error}" if form == "chinchilla" else str(error)) from None
        parts.append((mask, fit(some, form, pinned | extra, **options)))
        notes += lines
    return parts, notes


def predict(parts: list[tuple], runs: Runs) -> np.ndarray:
    """Expected loss (R,) of each run under the part that owns it."""
    out = np.empty(len(runs.L))
    for mask, fitted in parts:
        out[mask] = fitted.law.loss(runs.N[mask], runs.D[mask], runs.E[mask])
    return out


def replicas(parts: list[tuple], runs: Runs, weight: np.ndarray) -> np.ndarray:
    """Predictions (S, R) of the laws refitted under each row of `weight` (S, R)."""
    out = np.empty(weight.shape)
    for mask, fitted in parts:
        laws = many(refit(fitted, weight[:, mask] * runs.weight[mask], np.log(runs.L[mask])))
        out[:, mask] = laws.loss(runs.N[mask], runs.D[mask], runs.E[mask])
    return out


def rmse(error: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(error)))) if np.size(error) else math.nan


def cross_validate(parts, runs, folds: int) -> float:
    """RMSE of runs that their own fit never saw; folds are drawn at random."""
    fold = np.random.default_rng(0).permutation(len(runs.L)) % folds
    out = replicas(parts, runs, (fold != np.arange(folds)[:, None]).astype(float))
    return rmse(out[fold, np.arange(len(fold))] - runs.L)


def compare_forms(runs: Runs, delta: float, pinned: dict) -> list[dict]:
    """Every form on the same runs, with AIC = n ln(2 sum Huber / n) + 2 parameters at one Huber width: lower is better."""
    rows, used = [], runs.weight > 0
    for form in FORMS:
        try:
            parts, _ = fit_form(runs, form, pinned, delta=delta)
        except BadInput as error:
            rows.append({"form": form, "why_not": str(error)})
            continue
        count, error = sum(len(fitted.free) for _, fitted in parts), predict(parts, runs) - runs.L
        cost, n = sum(fitted.cost for _, fitted in parts), int(used.sum())
        rows.append({"form": form, "parameters": count, "rmse_train": rmse(error[used]), "rmse_holdout": rmse(error[~used]),
                     "aic": n * math.log(2 * cost / n) + 2 * count})
    return rows


# -- 5. The verbs: tables, fit, simulate, speed ------------------------------------------------------------------------

def show(header: str, rows: list) -> None:
    """Print rows of cells under a header, columns aligned right."""
    cells = [header.split("|")] + [[c if isinstance(c, str) else f"{c:.5g}" for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  ".join(c.rjust(w) for c, w in zip(row, widths)))
    print()


def band(draws: np.ndarray) -> tuple[float, float]:
    """90% interval: the 5% and 95% quantiles over the replicas."""
    low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    return float(low), float(high)


TABLE_3 = {1: (30.3640, 0.1817, 53.9838, 0.1965), 2: (27.7982, 0.1780, 66.8401, 0.2065), 4: (24.8462, 0.1731, 87.7022, 0.2192),
           8: (21.8330, 0.1676, 119.9126, 0.2338), 16: (19.0159, 0.1616, 167.5073, 0.2494),
           32: (16.5424, 0.1557, 234.6726, 0.2652)}                                             # printed m, mu, n, nu
TABLE_1 = {1: ((1.7e9, 9.7e9), (4e9, 21e9), (5.7e9, 29.3e9)), 2: ((1.5e9, 11.4e9), (3.5e9, 24e9), (5e9, 33e9)),
           4: ((1.2e9, 13.9e9), (3e9, 28e9), (4.4e9, 38e9)), 8: ((0.99e9, 17e9), (2.5e9, 33.2e9), (3.8e9, 44.3e9)),
           16: ((0.81e9, 20.7e9), (2.1e9, 39e9), (3.3e9, 51.2e9))}                # printed N, D at 1e20, 5e20, 1e21 FLOPs
LAST_DIGIT = np.array([1e-2, 1e-4, 1e-4, 1e-4, 1e-2, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4])      # of Table 2, as printed


def tables(args) -> dict:
    """Tables 1 and 3 beside the printed cells, the run list against the counting rules, and the errata."""
    law, flops = Law(offset=args.offset), (1e20, 5e20, 1e21)
    three = [{"n_expert": E, "ehat": float(law.ehat(E)), "computed": [float(t) for t in law.terms(E)], "printed": printed}
             for E, printed in TABLE_3.items()]
    print(f"Table 3: L = m N^-mu + n D^-nu + {law.c}, E_start offset {args.offset:g}; deviation from print in %")
    show("E|Ê|m|%|mu|%|n|%|nu|%", [
        [r["n_expert"], r["ehat"], *(f"{x:.6f}" if i == 0 else f"{100 * (x / p - 1):+.2f}"
                                     for x, p in zip(r["computed"], r["printed"]) for i in (0, 1))] for r in three])
    one = [{"n_expert": E, "flops": F, "n_active": float(N), "tokens": float(D), "loss": float(L), "printed": printed[i]}
           for E, printed in TABLE_1.items() for i, F in enumerate(flops) for N, D, L in [optimum(law, E, F)]]
    print("Table 1: the compute optimum; deviation from the printed cell in %")
    show("E|F|N|%|D|%|loss", [[r["n_expert"], f"{r['flops']:.0e}", f"{r['n_active'] / 1e9:.3f}B",
                               f"{100 * (r['n_active'] / r['printed'][0] - 1):+.2f}", f"{r['tokens'] / 1e9:.2f}B",
                               f"{100 * (r['tokens'] / r['printed'][1] - 1):+.2f}", f"{r['loss']:.6f}"] for r in one])
    counts = check_run_list()
    print("The run list:", ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in counts.items()), "\n\nErrata")
    found = errata()
    for i, (claim, number) in enumerate(found, 1):
        print(f"{i:2}. {claim}\n      {number}")
    return {"table_3": three, "table_1": one, "run_list": counts, "errata": [{"claim": c, "number": n} for c, n in found]}


def check_run_list() -> dict:
    """The paper's runs against both counting rules, and against its own shape rule of d/64 blocks."""
    rows = read_table(RUN_LIST)
    d, n, E, active, total = (column(rows, k) for k in ("d_model", "n_layer", "n_expert", "n_active", "n_total"))
    ours = law_size(d, n, E)
    models = np.unique(np.stack([d, n, E], 1), axis=0)
    return {"runs": len(rows), "models": len(models), "runs_per_E": [int((E == e).sum()) for e in EXPERTS],
            "largest_deviation_N_total": float(np.abs(ours[0] / total - 1).max()),
            "largest_deviation_N_active": float(np.abs(ours[1] / active - 1).max()),
            "models_not_d/64_blocks": int((models[:, 0] != 64 * models[:, 1]).sum())}


def errata() -> list[tuple[str, str]]:
    """What the paper prints and its own numbers contradict: (claim, the number that shows it)."""
    law, E = Law(), np.array(list(TABLE_3))
    printed = np.array(list(TABLE_3.values())).T
    off = lambda terms: np.abs(np.array(terms) / printed - 1).max()
    positive = (law.a * law.ehat(E)**law.delta, law.alpha + law.gamma * np.log(E),
                law.b * law.ehat(E)**law.omega, law.beta + law.zeta * np.log(E))
    half_digit = np.array([5e-5] * 4)[:, None]
    shifted = np.abs(np.array(law._replace(offset=0.01).terms(E)) - printed) <= half_digit + 1e-12
    m, mu, n, nu = law.terms(E)
    share, ln_G = nu / (mu + nu), np.log(mu * m / (nu * n)) / (mu + nu)
    cross = 6 * np.exp(-np.diff(ln_G) / np.diff(share))
    N, D, _ = optimum(law, 1, 1e21)
    dense = np.logspace(19, 24, 51)
    rule = rule_of_thumb(law, EXPERTS[1:4], dense)
    kv = [2 * 32768 * n_layer * d for d, n_layer in ((1664, 26), (1408, 22), (1152, 18))]
    rounding = np.random.default_rng(0).uniform(-0.5, 0.5, (200, 11)) * LAST_DIGIT + np.array(law[:11])
    moved = [s for M in (2e9, 5e9, 10e9) for s in switches(law, "flops", np.logspace(18, 26, 161), many(rounding), memory=M)]
    widest = max(moved, key=lambda s: s["high"] / s["low"])
    return [
        ("Eq. 5 is printed with positive exponents and ln E; Table 3 follows only with negative ones and ln Ê throughout.",
         f"as printed it misses Table 3 by up to {100 * off(positive):.0f}%, with the signs turned by {100 * off(law.terms(E)):.2f}%"),
        ("Table 3 was not made from the printed E_start: it needs E - 1 + 0.01 in eq. 6.",
         f"with the offset {shifted.sum()} of 24 cells agree to the printed digit; the loss moves by at most "
         f"{np.abs(paper_runs().L - law._replace(offset=0.01).loss(*paper_runs()[:3])).max():.1e} on the run list"),
        ("The text speaks of over 280 experiments.", f"Appendix H lists {check_run_list()['runs']} runs of "
         f"{check_run_list()['models']} models; no loss is published"),
        ("The text of Fig. 6 reads D/N < 1 as more tokens than parameters; it is the reverse.",
         f"dense optimum at 1e21 FLOPs: {D:.2e} tokens for {N:.2e} parameters is D/N = {D / N:.2f}"),
        ("Fig. 1(b) is cited where Fig. 3(b), the one with a key-value cache, is meant.",
         f"a cache of 32,768 tokens holds {kv[0] / 1e9:.1f}B, {kv[1] / 1e9:.1f}B and {kv[2] / 1e9:.1f}B values for the 1.1B models of "
         "Fig. 1(b), more than their weights"),
        ("Finding 1, more experts make the optimal N smaller, reverses under the law itself at large compute.",
         "N_opt of 2E experts overtakes that of E at " + ", ".join(f"{e}->{2 * e}: {F:.1e}" for e, F in zip(E, cross)) + " FLOPs"),
        ("The rule of thumb, E times the tokens at equal memory beats dense, is not free.",
         f"E = 2 to 8, dense budgets 1e19 to 1e24: gain {rule['gain'].min():.3f} to {rule['gain'].max():.3f} nats for "
         f"{rule['cost'].min():.2f} to {rule['cost'].max():.2f} times the dense FLOPs"),
        ("Crossovers between expert counts are quoted without error.",
         f"rounding of Table 2 alone moves the switch {widest['from']}->{widest['to']} from {widest['flops']:.2e} FLOPs to between "
         f"{widest['low']:.2e} and {widest['high']:.2e}"),
    ]


def fit_verb(args) -> dict:
    """Fit runs, and say how far to trust the result."""
    runs, rows = read_runs(args.sources, args.weights)
    folds = int(args.holdout[6:]) if re.fullmatch(r"kfold:[1-9]\d*", args.holdout) else 0
    if not folds:
        runs = hold_out(runs, rows, args.holdout)
    given = {k: v for k in ("e_start", "e_max") if (v := getattr(args, k)) is not None}
    if given.get("e_start", 1) >= given.get("e_max", math.inf):
        raise BadInput("--e_start must be below --e_max: dense models are where eq. 6 starts")
    starts = dict(starts=lambda *a: paper_grid(*a, scales=PAPER_SCALES), project=False) if args.init == "paper_grid" else {}
    parts, notes = fit_form(runs, args.form, given, delta=args.huber, **starts)
    error, used = predict(parts, runs) - runs.L, runs.weight > 0
    if not folds:
        held = rmse(error[~used])
    else:
        held = cross_validate(parts, runs, min(folds, len(runs.L)))
    draws = [bootstrap(f, Runs(*(v[mask] for v in runs)), args.bootstrap) for mask, f in parts]
    forms = compare_forms(runs, parts[0][1].delta, given)
    everyone = replicas(parts, runs, 1 - np.eye(len(runs.L)))
    pull = np.sqrt(((everyone - predict(parts, runs)) ** 2).mean(1))
    result = {"form": args.form, "per_expert": per_expert(parts, draws, runs), "c": parts[0][1].law.c if len(parts) == 1 else None,
              "rmse_train": rmse(error[used]), "rmse_holdout": held, "holdout": args.holdout, "notes": notes,
              "huber_delta": [f.delta for _, f in parts], "starts": sum(f.starts for _, f in parts),
              "starts_agree": float(np.mean([f.agree for _, f in parts])), "forms": forms,
              "coefficients": coefficient_table(parts[0][1], draws[0]) if len(parts) == 1 else None,
              "runs": [{"n_active": runs.N[i], "tokens": runs.D[i], "n_expert": runs.E[i], "loss": runs.L[i], "weight": runs.weight[i],
                        "predicted": runs.L[i] + error[i], "pull": pull[i], "source": rows[i]["source"]} for i in range(len(rows))],
              "law": parts[0][1].law._asdict() if len(parts) == 1 else None, "draws": draws[0].tolist() if len(parts) == 1 else None}
    print_fit(result)
    return result


def per_expert(parts, draws, runs) -> dict:
    """{E: m, mu, n, nu, c and their 90% intervals}: the form in which a fit is known well, whatever its coefficients do."""
    table = {}
    for (mask, fitted), laws in zip(parts, draws):
        for E in np.unique(runs.E[mask]):
            replica = many(laws)
            table[f"{E:g}"] = {
                **{k: float(v) for k, v in zip(("m", "mu", "n", "nu", "c"), (*fitted.law.terms(E), fitted.law.c))},
                "interval": {k: band(v[:, 0]) for k, v in zip(("m", "mu", "n", "nu", "c"), (*replica.terms(E), replica.c))}}
    return table


def coefficient_table(fitted: Fit, laws: np.ndarray) -> dict:
    """Raw coefficients with intervals; one is not identified when its interval is wider than twice its size."""
    table = {}
    for i, k in enumerate(COEFFICIENTS):
        value, free = float(fitted.law[i]), i in fitted.free
        low, high = band(laws[:, i]) if free else (value, value)
        table[k] = {"value": value, "low": low, "high": high, "free": free, "identified": not free or high - low < 2 * abs(value)}
    return table


def print_fit(r: dict) -> None:
    for note in r["notes"]:
        print("note:", note)
    print(f"form {r['form']}: {len(r['runs'])} runs; {100 * r['starts_agree']:.0f}% of {r['starts']} starts reach the optimum; "
          f"Huber width {r['huber_delta'][0]:.4g}\nRMSE train {r['rmse_train']:.5f}, held-out ({r['holdout']}) {r['rmse_holdout']:.5f} nats\n")
    span = lambda v, i: f"{v:.5g} [{i[0]:.4g}, {i[1]:.4g}]"
    show("E|m|mu|n|nu|c", [[E, *(span(t[k], t["interval"][k]) for k in ("m", "mu", "n", "nu", "c"))]
                           for E, t in r["per_expert"].items()])
    if r["coefficients"]:
        show("coefficient|value|5%|95%|", [[k, t["value"], t["low"], t["high"], "held fixed" if not t["free"] else
                                            "" if t["identified"] else "not identified"] for k, t in r["coefficients"].items()])
    known = [f for f in r["forms"] if "aic" in f]
    best = min(f["aic"] for f in known)
    show("form|parameters|RMSE train|RMSE held-out|AIC - best", [
        [f["form"], str(f["parameters"]), f["rmse_train"], f["rmse_holdout"], f"{f['aic'] - best:.1f}"] for f in known])
    for f in r["forms"]:
        if "why_not" in f:
            print(f"{f['form']}: not possible, {f['why_not']}")
    print("Runs that pull hardest (left out one at a time, change of all predictions, nats)")
    show("n_active|tokens|E|loss|predicted|pull", [[q["n_active"], q["tokens"], q["n_expert"], q["loss"], q["predicted"], q["pull"]]
                                                   for q in sorted(r["runs"], key=lambda q: -q["pull"])[:5]])


PAPER_SCALES = tuple(itertools.product([30, 100, 300], [30, 100, 300], [0.5, 1, 2]))


def simulate(args) -> dict:
    """Losses from Table 2 on the paper's run list plus noise, fitted; the 30 runs of lowest loss are held out, as in the paper."""
    truth, law = paper_runs(), Law()
    used = hold_out(truth, [], "loss:30").weight > 0
    held, rows, names = ~used, [], ("m", "mu", "n", "nu")
    for draw in range(args.draws):
        rng = np.random.default_rng(draw)
        noisy = truth.L + rng.normal(0, args.noise, len(truth.L)) + 0.05 * (rng.random(len(truth.L)) < args.outliers)
        runs = truth._replace(L=noisy, weight=used.astype(float))
        fitted = fit(runs)
        error, laws = fitted.law.loss(*truth[:3]) - truth.L, bootstrap(fitted, runs, 200, draw)
        replica = many(laws)
        inside = lambda sample, true: float(np.mean((np.quantile(sample, 0.05, 0) <= true) & (true <= np.quantile(sample, 0.95, 0))))
        rows.append({"rmse_train": rmse(error[used]), "rmse_holdout": rmse(error[held]), "agree": fitted.agree,
                     "law": [float(v) for v in fitted.law[:11]],
                     **{f"cover_{k}": inside(s, t) for k, s, t in zip(names, replica.terms(EXPERTS), law.terms(EXPERTS))},
                     "cover_c": inside(replica.c[:, 0], law.c),
                     "cover_prediction": inside(replica.loss(truth.N[held], truth.D[held], truth.E[held]), truth.L[held])})
    mean = {k: float(np.mean([r[k] for r in rows])) for k in rows[0] if k != "law"}
    mean["cover_all"] = float(np.mean([mean[k] for k in mean if k.startswith("cover_")]))
    laws = np.array([r["law"] for r in rows])
    print(f"{args.draws} draws, noise {args.noise:g}, {100 * args.outliers:g}% outliers of 0.05 nats; error against the noiseless truth")
    show("|mean", [[k.replace("_", " "), v] for k, v in mean.items()])
    with np.errstate(invalid="ignore"):
        spread = [[k, law[i], float(np.median(laws[:, i])), *map(float, np.quantile(laws[:, i], [0.05, 0.95], method="nearest"))]
                  for i, k in enumerate(COEFFICIENTS)]
    print("Raw coefficients over the draws: predictions and m, mu, n, nu are recovered, these hardly, and E_max not at all")
    show("coefficient|truth|median|5%|95%", spread)
    return {"noise": args.noise, "outliers": args.outliers, "mean": mean, "draws": rows,
            "coefficients": {k: {"truth": t, "median": m, "low": lo, "high": hi} for k, t, m, lo, hi in spread}}


def speed(args) -> dict:
    """Seconds for each stage of the fit on one synthetic draw, and for torch's L-BFGS from a sample of the paper's starts."""
    truth = paper_runs()
    noisy = lambda seed: truth._replace(L=truth.L + np.random.default_rng(seed).normal(0, 0.006, len(truth.L)))
    runs, rows = noisy(0), {}

    def timed(name, work):
        start = time.perf_counter()
        value = work()
        rows[name] = time.perf_counter() - start
        return value
    fitted = timed("default_fit", lambda: fit(runs))
    timed("bootstrap_1000", lambda: bootstrap(fitted, runs))
    timed("cross_validation_10", lambda: cross_validate([(np.ones(len(runs.L), bool), fitted)], runs, 10))
    projected = timed("paper_grid_projected_729", lambda: fit(runs, starts=paper_grid, delta=fitted.delta))
    whole = timed("paper_grid_19683", lambda: fit(runs, starts=lambda *a: paper_grid(*a, scales=PAPER_SCALES), project=False,
                                                  delta=fitted.delta))
    optima = []
    for seed in range(60):
        draw = noisy(seed)
        default = fit(draw)
        wide = fit(draw, starts=lambda *a: random_starts(*a, count=200), delta=default.delta)
        optima.append(default.cost <= wide.cost * (1 + 1e-6))
    torch_seconds, reached = lbfgs_sample(runs, args.sample, fitted)
    result = {"seconds": rows, "global_optimum_in": f"{sum(optima)} of {len(optima)} draws",
              "starts_agree": {"default": fitted.agree, "paper_grid_projected": projected.agree, "paper_grid": whole.agree},
              "torch_lbfgs": {"seconds_per_start": torch_seconds, "sample": args.sample, "reached_optimum": reached,
                              "ratio_to_our_grid": torch_seconds * 19683 / rows["paper_grid_19683"],
                              "ratio_per_fit": torch_seconds * 19683 / rows["default_fit"]},
              "command": "python scaling.py speed", "machine": f"{platform.machine()}, {os.cpu_count()} cores",
              "numpy": np.__version__, "python": platform.python_version()}
    print(json.dumps(result, indent=1))
    return result


def lbfgs_sample(runs: Runs, sample: int, fitted: Fit) -> tuple[float, str]:
    """The paper's way: torch.optim.LBFGS on raw coefficients, one start after another. Seconds a start, how many arrive."""
    import torch
    N, D, E, L = (torch.tensor(np.log(v) if i != 2 else v) for i, v in enumerate(runs[:4]))
    grid = np.array(list(itertools.product([0.05, 0.25, 0.5], [0.05, 0.25, 0.5], *[[-0.5, 0, 0.5]] * 4, PAPER_SCALES)), object)
    chosen, reached = np.random.default_rng(0).choice(len(grid), sample, replace=False), 0
    huber = torch.nn.HuberLoss(reduction="sum", delta=fitted.delta)
    start = time.perf_counter()
    for alpha, beta, delta, gamma, omega, zeta, (a, b, c) in grid[chosen]:
        p = torch.tensor([math.log(a), alpha, delta, gamma, math.log(b), beta, omega, zeta, math.log(c), math.log(2), 0.01],
                         dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([p], max_iter=1000, line_search_fn="strong_wolfe")

        def closure(p=p, optimizer=optimizer):
            optimizer.zero_grad()
            x = -torch.log(1 / (E - 1 + 1 / (torch.exp(-p[9]) - p[10])) + p[10])
            logs = [p[0] - p[2] * x - (p[1] + p[3] * x) * N, p[4] - p[6] * x - (p[5] + p[7] * x) * D, p[8].expand_as(x)]
            loss = huber(torch.logsumexp(torch.stack(logs), 0), L)
            loss.backward()
            return loss
        reached += float(optimizer.step(closure)) >= 0 and float(closure()) <= fitted.cost * (1 + 1e-6)
    return (time.perf_counter() - start) / sample, f"{reached} of {sample}"


# -- 6. The planner ----------------------------------------------------------------------------------------------------

BYTES = {"bf16": 2, "fp32": 4}
GPUS = {                                            # dense peak FLOP/s in bf16 and fp32, memory in bytes: data sheets
    "A100": (312e12, 19.5e12, 80e9), "H100": (989e12, 67e12, 80e9), "H200": (989e12, 67e12, 141e9),
    "B200": (2250e12, 80e12, 180e9), "MI300X": (1307e12, 163e12, 192e9), "L40S": (362e12, 92e12, 48e9),
    "RTX4090": (165e12, 83e12, 24e9)}
RAMP = ((0, 65_536), (500_000_000, 131_072), (1_000_000_000, 262_144))          # the paper's batch ramp: (from token, tokens)
SEQ_LEN = 512                                       # of the authors' public configs; the law's loss is at this length


def paper_draws(law: Law, count: int = 300) -> np.ndarray:
    """Parametric bootstrap: the paper's run list with the law's losses and its own RMSE as noise, refitted `count` times.

    The paper publishes no losses, so this is how well 270 such runs could know the law, not how well they did.
    """
    runs = paper_runs()
    surface = Surface(runs.N, runs.D, runs.E)
    L = law.loss(*runs[:3]) + np.random.default_rng(0).normal(0, NOISE, (count, len(runs.N)))
    start = np.repeat(surface.centred([law]), count, 0)
    return surface.laws(minimise(surface, start, np.log(L), 1.0, 0.01, np.arange(11), tol=1e-8)[0])


def chosen_law(path: str | None) -> tuple[Law, np.ndarray]:
    """The paper's law, or one that `fit --json` wrote, with replicas of it (S, 11)."""
    if path is None:
        return Law(), paper_draws(Law())
    try:
        saved = json.loads(Path(path).read_text())
        return Law(**saved["law"]), np.array(saved["draws"], float)
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"--law {path}: not a law; write one with python scaling.py fit RUNS.csv --json {path}") from None


def optimum_verb(args) -> dict:
    """The best model for each E under the budgets, with intervals, the chance that each E is the best, and the switches."""
    (law, draws), (unit, memory) = chosen_law(args.law), args.memory or (None, None)
    memory = memory / BYTES[args.dtype] if unit == "bytes" else memory
    budget = dict(flops=args.flops, memory=memory, kv_tokens=args.kv_tokens, inference_tokens=args.inference_tokens)
    N, D, L = optimum(law, EXPERTS, **budget)
    if not np.isfinite(L).any():
        raise BadInput("nothing meets these budgets: the smallest model has "
                       f"{law_size(64, 1, 1)[0] / 1e6:.1f}M parameters; raise --flops or --memory, or lower --kv_tokens or --inference_tokens")
    replica = optimum(many(draws), EXPERTS, **budget)[2]
    chance = (replica.argmin(1)[:, None] == np.arange(len(EXPERTS))).mean(0)
    rows = [{"n_expert": int(E), "n_active": float(n), "n_total": float(law_size(d, d / 64, E)[0]), "tokens": float(t),
             "loss": float(loss), "interval": band(replica[:, i]), "chance_best": float(chance[i])}
            for i, (E, n, t, loss, d) in enumerate(zip(EXPERTS, N, D, L, width(13, N))) if np.isfinite(loss)]
    show("E|N_active|N_total|tokens|loss|90% of loss|chance best", [
        [str(r["n_expert"]), *(f"{r[k] / 1e9:.4g}B" for k in ("n_active", "n_total", "tokens")), f"{r['loss']:.5f}",
         "{:.4f} to {:.4f}".format(*r["interval"]), f"{r['chance_best']:.2f}"] for r in rows])
    result = {"budget": budget, "rows": rows, "best": int(EXPERTS[L.argmin()])}
    print(f"best: E = {result['best']}")
    if args.switches:
        values = np.geomspace(1e8, 1e12, 241) if args.switches == "memory" else np.geomspace(1e18, 1e26, 241)
        result["switches"] = switches(law, args.switches, values, many(draws), **{k: v for k, v in budget.items() if k != args.switches})
        for s in result["switches"]:
            print(f"E {s['from']} -> {s['to']} at {args.switches} = {s[args.switches]:.3e}  "
                  f"(90%: {s['low']:.2e} to {s['high']:.2e}; in {100 * s['share']:.0f}% of replicas)")
    if args.rule_of_thumb:
        dense = np.geomspace(1e19, 1e24, 51)
        rule = rule_of_thumb(law, EXPERTS[1:], dense)
        result["rule_of_thumb"] = [{"n_expert": int(E), "dense_flops": (1e19, 1e24), "holds": float((g > 0).mean()), "gain": (g.min(), g.max()),
                                    "cost": (c.min(), c.max())} for E, g, c in zip(EXPERTS[1:], rule["gain"], rule["cost"])]
        show("E|holds|least gain|most gain|least cost|most cost", [
            [str(r["n_expert"]), f"{100 * r['holds']:.0f}%", *r["gain"], *r["cost"]] for r in result["rule_of_thumb"]])
    return result


def model_config(d: int, E: int, **other):
    """The paper's block in model.py's words: d/64 heads and blocks, SwiGLU experts of width 3d, Switch routing (top-1)."""
    from model import ModelConfig
    return ModelConfig(n_layer=d // 64, d_model=d, n_head=d // 64, n_kv_head=d // 64, d_head=64, n_expert=E, top_k=1, d_expert=3 * d,
                       vocab_size=50257, seq_len=SEQ_LEN, rope_base=1e4, qk_norm=False, tie_embeddings=False, router="softmax",
                       renormalize=False, aux_coef=0.01, z_coef=0.001, init_scale=0.1, **other)


def trainable_width(E: int, limit: float, dtype: str) -> int:
    """Largest d_model, a multiple of 64, whose training step with one sequence fits into `limit` bytes; 0 if none does."""
    from model import memory
    low, high = 0, 256
    while high - low > 1:
        middle = (low + high) // 2
        fits = memory(model_config(64 * middle, E), 1, dtype)["total"] <= limit
        low, high = (middle, high) if fits else (low, middle)
    return 64 * low


def steps_of(tokens: float) -> int:
    """Optimizer steps until `tokens` are seen, along the paper's batch ramp."""
    steps, edges = 0, [start for start, _ in RAMP[1:]] + [math.inf]
    for (start, batch), end in zip(RAMP, edges):
        steps += max(0, math.ceil((min(tokens, end) - start) / batch))
    return steps


def plan(args) -> dict:
    """From budgets to a model to train: every shape the paper's rule allows is tried, so the answer is exact in integers."""
    from model import count, memory
    law, draws = chosen_law(args.law)
    peak, card = GPUS[args.gpu][list(BYTES).index(args.dtype)], GPUS[args.gpu][2]
    if args.memory and args.memory[0] != "bytes":
        raise BadInput("plan --memory is the memory of one GPU and needs a unit of bytes, such as 80GB or 80GiB")
    limit, kind = args.memory[1] if args.memory else card, {"bf16": "bfloat16", "fp32": "float32"}[args.dtype]
    d, E = (v.ravel() for v in np.meshgrid(64 * np.arange(1, 257), EXPERTS))
    total, active = law_size(d, d // 64, E)
    deployed = (total + 2 * args.context * d**2 // 64) * BYTES[args.dtype]
    largest = {e: trainable_width(int(e), limit, kind) for e in EXPERTS}
    tokens = args.flops / (6 * active) - args.inference_tokens / 3
    fits = (deployed <= limit) & (d <= [largest[e] for e in E]) & (tokens >= RAMP[0][1])
    if not fits.any():
        raise BadInput(f"no model meets this: {args.flops:.3g} FLOPs, {limit / 1e9:.3g} GB for training and for {args.context:g} tokens of context; "
                       "raise --flops or --memory, or lower --context or --inference_tokens")
    d, E, total, active, tokens, deployed = (v[fits] for v in (d, E, total, active, tokens, deployed))
    loss, replica = law.loss(active, tokens, E), many(draws).loss(active, tokens, E)
    winner = E[replica.argmin(1)]
    rows = [{"n_expert": int(e), "d_model": int(d[i]), "n_layer": int(d[i] // 64), "n_active": int(active[i]), "n_total": int(total[i]),
             "tokens": float(tokens[i]), "loss": float(loss[i]), "interval": band(replica[:, i]), "deployed_bytes": int(deployed[i]),
             "chance_best": float((winner == e).mean())}
            for e in np.unique(E) for i in [np.flatnonzero(E == e)[loss[E == e].argmin()]]]
    best = min(rows, key=lambda r: r["loss"])
    config, e = model_config(best["d_model"], best["n_expert"]), best["n_expert"]
    sequences = RAMP[0][1] // SEQ_LEN // args.gpus
    micro = max(m for m in (1, 2, 4, 8, 16, 32, 64, 128) if m == 1 or m <= sequences and memory(config, m, kind)["total"] <= limit)
    sizes, runs, same = count(config), paper_runs(), paper_runs().E == e
    training = 6 * best["n_active"] * best["tokens"]
    lean = best["n_active"] - 2 * best["d_model"] * 50257
    result = {**best, "rows": rows, "n_active_without_embeddings": lean, "model_py_total": sizes["total_untied"],
              "steps": steps_of(best["tokens"]), "batch_ramp": RAMP, "micro_batch": micro,
              "learning_rate": learning_rate(lean, e), "learning_rate_authors_code": math.exp(
                  8.391640956234012 - 0.8121798244457074 * math.log(best["n_active"]) - 0.25 * math.log(e)),
              "training_bytes": memory(config, micro, kind), "gpu": args.gpu, "gpus": args.gpus, "mfu": args.mfu,
              "days": training / (args.gpus * peak * args.mfu) / 86400,
              "extrapolation": {"n_active": best["n_active"] / runs.N[same].max(), "tokens": best["tokens"] / runs.D[same].max(),
                                "flops": training / (6 * runs.N * runs.D).max()}}
    print_plan(result)
    if args.write:
        write_config(args.write, result, config, kind, " ".join(sys.argv[1:]))
    return result


def print_plan(r: dict) -> None:
    show("E|d_model|blocks|N_active|N_total|tokens|loss|90% of loss|GB deployed|chance best", [
        [str(q["n_expert"]), str(q["d_model"]), str(q["n_layer"]), *(f"{q[k] / 1e9:.4g}B" for k in ("n_active", "n_total", "tokens")),
         f"{q['loss']:.4f}", "{:.4f} to {:.4f}".format(*q["interval"]), f"{q['deployed_bytes'] / 1e9:.1f}",
         f"{q['chance_best']:.2f}"] for q in r["rows"]])
    memory = ", ".join(f"{k} {v / 1e9:.1f}" for k, v in r["training_bytes"].items())
    x = r["extrapolation"]
    print(f"""best: E = {r['n_expert']}, d_model = heads x 64 = {r['d_model']}, {r['n_layer']} blocks, experts of width {3 * r['d_model']}, top-1
parameters        {r['n_active']:,} active with embeddings, {r['n_active_without_embeddings']:,} without; {r['n_total']:,} in all
                  ({r['model_py_total']:,} in model.py, which also counts router and norms)
tokens            {r['tokens']:.4g} in {r['steps']:,} steps; batch {', '.join(f'{b:,} from {s:,}' for s, b in r['batch_ramp'])} tokens
learning rate     {r['learning_rate']:.3e} (eq. 7 as in the text: N without embeddings), {r['learning_rate_authors_code']:.3e} (authors' code: with)
training memory   {memory} GB on each GPU, micro-batch {r['micro_batch']}
time              {r['days']:.2f} days on {r['gpus']} {r['gpu']} if the model FLOPs utilisation is {r['mfu']:g} (assumed)
expected loss     {r['loss']:.4f}, 90% {r['interval'][0]:.4f} to {r['interval'][1]:.4f} for the law; a single run adds about {NOISE:g} nats
extrapolation     {x['n_active']:.2f} x the largest N, {x['tokens']:.2f} x the most tokens run at this E, {x['flops']:.2f} x the largest run's FLOPs""")
    if max(x.values()) > 10:
        print("warning: more than ten times beyond the fitted runs; the interval knows nothing of a law that bends")


def write_config(path: str, r: dict, config, dtype: str, command: str) -> None:
    """A flat config for train.py, one assignment a line."""
    from dataclasses import asdict
    shape = {k: v for k, v in asdict(config).items() if k not in ("max_seq_len", "norm_eps")}
    values = shape | {
        "dataset": "stdlib", "tokenizer": "bytes", "seed": 1, "max_steps": r["steps"], "max_tokens": int(r["tokens"]),
        "batch_tokens": [list(pair) for pair in RAMP], "micro_batch": r["micro_batch"], "learning_rate": float(f"{r['learning_rate']:.4g}"),
        "min_learning_rate": 0.0, "schedule": "constant", "warmup": 130_000_000 if r["tokens"] > 1.3e9 else 0.1, "decay": 0.2,
        "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.999, "grad_clip": 0.1, "dtype": dtype}
    head = (f"# Written by: python scaling.py {command}\n# Expected loss {r['loss']:.4f} nats (90%: {r['interval'][0]:.4f} to {r['interval'][1]:.4f}) "
            f"on FineWeb-Edu in GPT-2 tokens;\n# for that, set dataset to its files and tokenizer = \"gpt2\". Reading 2 of eq. 7: "
            f"learning_rate = {r['learning_rate_authors_code']:.4g}\n\n")
    write_text(Path(path), head + "".join(f"{k} = {v!r}\n" for k, v in values.items()))


def write_text(path: Path, text: str) -> None:
    """All or nothing: into a temporary file beside it, then renamed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror})") from None
