"""
scaling.py: the joint scaling law of dense and mixture-of-experts models.
What loss to expect, and which model to train.

    python scaling.py                                    the paper's Tables 1 and 3, recomputed
    python scaling.py optimum --flops 1e21 --memory 5B   the best size and tokens for each E
    python scaling.py fit out/                           fit the law to your own runs
    python scaling.py simulate                           how well such a fit recovers a known law
    python scaling.py plan --flops 1e21 --gpu H100       a model to train: shape, steps, rate, days

"The paper" is Ludziejewski et al., "Joint MoE Scaling Laws: Mixture of Experts Can Be Memory
Efficient" (2025). Equation, table and figure numbers are its own; results/law/errata.md lists its
errata, results/law/draw.py redraws its figures. It publishes no losses: wherever losses of its 270
runs are needed, they are made from its law plus noise, and the text says so.

Symbols: N active parameters, embedding and head included; D training tokens; E experts, 1 for a
dense model; L cross-entropy in nats per token; F floating point operations; V vocabulary.
Axes: S laws or starts at once, R runs, G grid points. All is float64 numpy; only `plan` needs
torch, to count a model's memory.
"""

from typing import NamedTuple

import numpy as np
from numpy import ndarray as Array

EXPERTS = np.array([1, 2, 4, 8, 16, 32])        # the numbers that the paper trained
VOCABULARY = 50257                              # GPT-2's

# --- 1. the law ----------------------------------------------------------------------------------


class Law(NamedTuple):
    """L = a Ê^-delta N^-(alpha + gamma ln Ê)  +  b Ê^-omega D^-(beta + zeta ln Ê)  +  c

    The joint law; defaults: Table 2. A field may also be an array whose last axes are 1: then one
    object is S laws, and every method broadcasts over them.
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

    def ehat(self, E: Array) -> Array:
        """Effective experts Ê (eq. 6): E_start for a dense model, and never more than E_max.

        1/Ê = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max
        """
        rest = E - 1 + 1 / (1 / self.e_start - 1 / self.e_max)
        return 1 / (1 / rest + 1 / self.e_max)

    def terms(self, E: Array) -> tuple[Array, Array, Array, Array, Array]:
        """(m, mu, n, nu, c): at one E the law is Chinchilla's, L = m N^-mu + n D^-nu + c."""
        z = np.log(self.ehat(E))
        m = self.a * np.exp(-self.delta * z)
        n = self.b * np.exp(-self.omega * z)
        return m, self.alpha + self.gamma * z, n, self.beta + self.zeta * z, self.c

    def loss(self, N: Array, D: Array, E: Array) -> Array:
        """Expected loss, nats per token. N, D, E broadcast against each other and the fields."""
        m, mu, n, nu, c = self.terms(E)
        return m * N**-mu + n * D**-nu + c


def law_size(d_model: Array, n_layer: Array, E: Array = 1) -> Array:
    """Parameters as the paper counts them: all of a model, or with E = 1 those active in it.

    Embedding and head 2 V d; a block has attention 4 d^2 and E SwiGLU experts of width 3 d, 9 d^2
    each, of which a token visits one (Switch); norms and router are left out.
    """
    return 2 * VOCABULARY * d_model + (4 + 9 * E) * n_layer * d_model**2


# --- 2. the optimum under budgets ----------------------------------------------------------------
# Training costs 6 N D operations, inference 2 N D_inf. With E fixed, the loss along a compute
# budget is a sum of convex functions of ln N: one minimum, falling before it and rising after. A
# memory limit cuts N from above. So the answer under both is the smaller of two: the N of least
# loss without the limit, and the largest N that fits. No search over D is needed.


def root(rising, low: Array, high: Array) -> Array:
    """Root of a rising function between low and high, elementwise; 90 halvings exhaust float64."""
    for _ in range(90):
        middle = (low + high) / 2
        above = rising(middle) > 0
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2


def width(size: Array, E: Array = 1, kv_tokens: float = 0) -> Array:
    """The real d_model at which a model of E experts has `size` parameters and cached values.

    The paper's models have n = d/64 blocks; the keys and values of T tokens are 2 T n d numbers.
    """
    def excess(x):
        d = np.exp(x)
        return law_size(d, d / 64, E) + 2 * kv_tokens * d**2 / 64 - size
    return np.exp(root(excess, 0, np.log(64 * size) / 3))


def unconstrained(law: Law, E: Array, flops: Array, inference_tokens: float = 0) -> Array:
    """N of least loss at 6 N D + 2 N D_inf = F.

    Without inference dL/dN = 0 has a closed form, N = G (F/6)^(nu / (mu + nu)) with
    G = (mu m / (nu n))^(1 / (mu + nu)). With it D = F / (6 N) - D_inf / 3, and the log of the ratio
    of the two terms' slopes rises with x = ln N through its only root.
    """
    m, mu, n, nu, _ = law.terms(E)
    G = (mu * m / (nu * n)) ** (1 / (mu + nu))
    if not inference_tokens:
        return G * (flops / 6) ** (nu / (mu + nu))

    def log_ratio(x):                # ln of the slope of the term in D over that of the term in N
        D = np.maximum(flops / 6 * np.exp(-x) - inference_tokens / 3, 1e-300)
        return np.log(flops / 6) - x - (nu + 1) * np.log(D) + mu * x - (mu + nu) * np.log(G)
    return np.exp(root(log_ratio, 0, np.log(flops / (2 * inference_tokens))))


def optimum(law: Law, E: Array, flops: Array, memory: Array | None = None, kv_tokens: float = 0,
            inference_tokens: float = 0) -> tuple[Array, Array, Array]:
    """(N, D, L) of the best model with E experts; all broadcasts, L is inf where nothing fits.

    memory: a number of parameters; it holds the whole model and the cache of kv_tokens tokens.
    """
    N = unconstrained(law, E, flops, inference_tokens)
    smallest = law_size(64, 1)
    if memory is not None:
        d = width(memory, E, kv_tokens)
        N = np.minimum(N, np.where(d >= 64, law_size(d, d / 64), 0))
    fits = smallest <= N
    N = np.maximum(N, smallest)
    D = flops / (6 * N) - inference_tokens / 3
    loss = law.loss(N, np.maximum(D, 1), E)
    return N, np.maximum(D, 1), np.where(fits & (D >= 1), loss, np.inf)


# === Part 2: the fit, and why it is fast =========================================================
# The paper minimises Huber(ln L_predicted - ln L_observed) by L-BFGS from 19,683 starts, one after the other. Here:
#   centring              In x = ln N - mean, y = ln D - mean, z = ln Ê - mean, changing one parameter no longer calls
#                         for changing all others, and each term starts as a third of the mean loss. Nearly all random
#                         starts reach the optimum, so 24 are plenty.
#   all starts at once    Levenberg-Marquardt with the analytic Jacobian (S, 11, R) of all S starts in one batch,
#                         by least squares first: bad starts see far runs as well.
# Bootstrap, cross-validation and leave-one-out are one more such call: a replica of the runs is a row of weights.

import math
from itertools import compress

NAMES = Law._fields
NO_EXPERTS = dict.fromkeys(("delta", "gamma", "omega", "zeta"), 0.0)
NO_TOKENS = dict.fromkeys(("b", "beta", "omega", "zeta"), 0.0)
EHAT = {"e_start": Law().e_start, "e_max": Law().e_max}
FORMS = {                            # name: the coefficients it pins; the others are free
    "joint": {},
    "chinchilla": NO_EXPERTS | EHAT,                                        # one law for each E
    "clark": NO_TOKENS | {"c": 0.0},                                        # Clark 2022: no D
    "no_interaction": dict.fromkeys(["gamma", "zeta"], 0.0),
    "expert_count": {"e_start": 1.0, "e_max": math.inf},                    # Ê = E
}


class Runs(NamedTuple):              # training runs, each field (R,)
    N: Array
    D: Array
    E: Array
    L: Array
    weight: Array                    # 0: held out

    def take(self, mask: Array) -> "Runs":
        return Runs(*(field[mask] for field in self))


def many(theta: Array, axes: int = 1) -> Law:
    """S laws from coefficients (S, 11): fields (S, 1), or (S, 1, 1) with axes=2."""
    return Law(*theta.T.reshape(11, -1, *[1] * axes))


STARTS, ROUNDS = 24, 4               # random starts, and how often as many more if few agree
LOGS = 0, 4, 8, 9                    # where the points p of a Surface hold the logarithm of a coefficient
SIGN = np.array([1, -1, -1, -1] * 2 + [1, 1, 1])                        # and where its negative
LEAST = math.log(1e-3)                # the box of the search: no term below 0.001 nats
LOW = np.array([LEAST, -9, -9, -9] * 2 + [LEAST, math.log(0.05), 0])
HIGH = np.array([25, 9, 9, 9] * 2 + [3, math.log(50), 0.5])


class Surface:
    """ln L of R runs, and its Jacobian, at S points p (S, 11) in centred coordinates:
    L = exp(p0 + p1 x + p2 z + p3 x z) + exp(p4 + p5 y + p6 z + p7 y z) + exp(p8)
    x, y, z = ln N, ln D, ln Ê, less the runs' means; Ê has p9 = ln E_start, p10 = 1/E_max
    """

    def __init__(self, runs: Runs):
        self.E = runs.E
        self.target = np.log(runs.L)
        logs = np.log([runs.N, runs.D, Law().ehat(runs.E)])
        x, y, self.z = logs.mean(1)
        self.sizes = logs[0] - x, logs[1] - y
        self.shift = np.eye(11)      # p of coordinates that are not centred @ shift = p of centred
        for i, mean in ((0, x), (4, y)):
            self.shift[i:i + 4, i:i + 4] = np.kron([[1, 0], [self.z, 1]], [[1, 0], [mean, 1]])

    def centred(self, theta: Array) -> Array:
        """Coefficients (S, 11) -> p. ln 0 becomes -25, which is nothing beside a loss near 1."""
        p = np.array(theta, float)
        p[:, LOGS] = np.log(np.maximum(p[:, LOGS], 1e-11))
        p[:, 10] = 1 / p[:, 10]
        return p * SIGN @ self.shift

    def coefficients(self, p: Array) -> Array:
        """The inverse: p -> coefficients (S, 11)."""
        theta = p @ np.linalg.inv(self.shift) * SIGN
        with np.errstate(divide="ignore", over="ignore"):
            theta[:, LOGS] = np.exp(theta[:, LOGS])
            theta[:, 10] = 1 / theta[:, 10]
        return theta

    def bounds(self, p: Array, free: Array) -> tuple[Array, Array]:
        """The box of the free: 1/E_max stays below 0.95/E_start, short of the pole of eq. 6."""
        high = np.tile(np.where(free, HIGH, np.inf), (len(p), 1))
        high[:, 10] = np.minimum(high[:, 10], 0.95 * np.exp(-p[:, 9]))
        return np.where(free, LOW, -np.inf), high

    def parts(self, p: Array) -> tuple[Array, Array, Array, tuple]:
        """ln L (S, R); the shares of its three terms (3, S, R); the first two logs' slopes in z; z, dz/dp9, dz/dp10."""
        x, y = self.sizes
        p = p[..., None]
        q = np.exp(-p[:, 9]) - p[:, 10]
        rest = self.E - 1 + 1 / q
        inverse = 1 / rest + p[:, 10]                                   # 1/Ê
        k = (rest * q) ** -2
        z = -np.log(inverse) - self.z
        by_z = p[:, 2] + p[:, 3] * x, p[:, 6] + p[:, 7] * y
        logs = np.stack([p[:, 0] + p[:, 1] * x + by_z[0] * z, p[:, 4] + p[:, 5] * y + by_z[1] * z, p[:, 8] + 0 * z])
        top = logs.max(0)                                               # or a start overflows
        shares = np.exp(logs - top)
        total = shares.sum(0)
        ehat = z, k * np.exp(-p[:, 9]) / inverse, (k - 1) / inverse
        return top + np.log(total), shares / total, by_z, ehat

    def jacobian(self, p: Array) -> tuple[Array, Array]:
        """ln L (S, R) and d ln L / dp (S, 11, R): a coefficient acts by its term's share of L."""
        value, (first, second, floor), by_z, (z, z9, z10) = self.parts(p)
        slope = first * by_z[0] + second * by_z[1]
        x, y = self.sizes
        return value, np.stack([first, first * x, first * z, first * x * z, second, second * y, second * z,
                                second * y * z, floor, slope * z9, slope * z10], 1)


def huber(r: Array, weight: Array, delta: float) -> Array:
    """Sum over the runs of weight * (r^2/2 up to |r| = delta, linear beyond), (S,)."""
    size = np.minimum(abs(r), delta)
    return (weight * size * (abs(r) - size / 2)).sum(1)


def minimise(surface: Surface, p: Array, target: Array, weight: Array, delta: float, free: Array,
             steps: int = 100, tol: float = 1e-10) -> tuple[Array, Array]:
    """Minimise huber(ln L - target) from all rows of p (S, 11) at once; returns p and its cost (S,).

    target, weight (S, R) or broadcast to it; free (11,): which coefficients move. Six idle steps end a row.
    """
    target, weight = (np.broadcast_to(v, (len(p), len(surface.E))) for v in (target, weight))
    p = np.clip(p, *surface.bounds(p, free))
    cost = huber(surface.parts(p)[0] - target, weight, delta)
    damping = np.full(len(p), 1e-2)
    idle = np.zeros(len(p), int)
    live = np.arange(len(p))
    for _ in range(steps):
        here = p[live]
        value, J = surface.jacobian(here)
        r = value - target[live]
        w = np.sqrt(weight[live] * delta / np.maximum(abs(r), delta))
        J *= w[:, None]                                    # Huber as reweighted least squares
        slope = (J @ (w * r)[..., None])[..., 0]
        rests = ~free | (np.clip(here - slope, *surface.bounds(here, free)) == here)      # pushed against a bound
        J[rests] = slope[rests] = 0
        H = J @ J.transpose(0, 2, 1)
        diagonal = np.einsum("sii->si", H)                 # a view: adding to it damps H
        diagonal += damping[live, None] * diagonal + 1e-12 * diagonal.max(1, keepdims=True) + 1e-300
        trial = here - np.clip(np.linalg.solve(H, slope[..., None])[..., 0], -2, 2)
        trial = np.clip(trial, *surface.bounds(trial, free))
        new = huber(surface.parts(trial)[0] - target[live], weight[live], delta)
        gain = cost[live] - new
        better = gain > 0
        damping[live] *= np.where(better, 0.2, 10)
        idle[live] = np.where(gain > tol * cost[live], 0, idle[live] + 1)
        p[live[better]] = trial[better]
        cost[live[better]] = new[better]
        live = np.flatnonzero(idle < 6)
        if not len(live):
            break
    return p, cost


def random_starts(surface: Surface, base: Law, free: Array, seed: int = 0) -> Array:
    """Starts (24, 11), uniform over exponents that language models have shown; a term is a third of the mean loss."""
    low = [0, 0.1, 0.0, -0.05, 0, 0.1, -0.3, -0.05, 0, 0.0, 0.0]
    high = [0, 0.4, 0.3, 0.05, 0, 0.4, 0.3, 0.05, 0, math.log(3), 0.02]
    p = SIGN * np.random.default_rng(seed).uniform(low, high, (STARTS, 11))
    p[:, LOGS[:3]] = surface.target.mean() - math.log(3)
    return np.where(free, p, surface.centred([base]))


class Fit(NamedTuple):
    law: Law
    p: Array                         # (11,): the optimum on `surface`
    surface: Surface
    free: Array                      # (11,): which coefficients were fitted
    delta: float                     # Huber width on ln L
    cost: float
    starts: int
    agree: float                     # share of the starts that reach the optimum
    replicas: Array                  # (S, 11): laws refitted to resampled runs; before a bootstrap the law alone

    def moved(self, p: Array, cost: Array) -> "Fit":
        """The fit at the point of least cost, p (S, 11)."""
        best = cost.argmin()
        law = np.where(self.free, self.surface.coefficients(p[[best]]), self.law)
        return self._replace(law=Law(*law[0]), p=p[best], cost=cost[best], replicas=law)

    def at_bound(self) -> list[str]:
        """The free coefficients whose p lies on the box: the search would have gone on."""
        low, high = self.surface.bounds(self.p[None], self.free)
        on = self.free & ((self.p == low) | (self.p == high[0]))
        return [f"{name} = {value:.4g}" for name, value in compress(zip(NAMES, self.law), on)]


def robust_deviation(residual: Array) -> float:
    """1.4826 median |r|: the standard deviation of normal residuals, whatever a few outliers do."""
    return max(1.4826 * np.median(abs(residual)), 7.5e-5)


def fit(runs: Runs, pinned: dict = FORMS["joint"], delta: float | None = None) -> Fit:
    """Fit to all runs of positive weight the coefficients that are not `pinned`. delta None: 1.345 robust deviations
    of the residuals, at which Huber keeps 95% of the efficiency of least squares; the paper's 0.01 is about four."""
    free = ~np.isin(NAMES, list(pinned))
    base = Law()._replace(**pinned)
    surface = Surface(runs)
    points, costs = np.empty((0, 11)), np.empty(0)
    for seed in range(ROUNDS):
        p = random_starts(surface, base, free, seed)
        p, cost = minimise(surface, p, surface.target, runs.weight, 10, free, 60, 1e-7)
        if delta is None:
            residual = surface.parts(p[[cost.argmin()]])[0][0] - surface.target
            delta = 1.345 * robust_deviation(residual[runs.weight > 0])
        p, cost = minimise(surface, p, surface.target, runs.weight, delta, free, 1000)
        points, costs = np.vstack([points, p]), np.append(costs, cost)
        reached = costs <= costs.min() * (1 + 1e-6) + 1e-12 * runs.weight.sum()
        if reached.mean() >= 1 / 3:
            break
    unmoved = Fit(base, p[0], surface, free, delta, cost[0], len(costs), reached.mean(), p)
    return unmoved.moved(points, costs)                # to the best of all starts


def refit(fitted: Fit, weight: Array, target: Array) -> Array:
    """Coefficients (S, 11) refitted from the optimum, one replica a row of weight or target (S, R)."""
    weight, target = np.broadcast_arrays(np.atleast_2d(weight), target)
    count = -(-weight.size // 100_000)                 # pieces that fit a cache, whatever S is
    pieces = [minimise(fitted.surface, np.tile(fitted.p, (len(w), 1)), t, w, fitted.delta, fitted.free, tol=1e-8)[0]
              for t, w in zip(np.array_split(target, count), np.array_split(weight, count))]
    return np.where(fitted.free, fitted.surface.coefficients(np.vstack(pieces)), fitted.law)


def bootstrap(fitted: Fit, runs: Runs, count: int = 1000, seed: int = 0) -> Fit:
    """The fit with replicas (count, 11) from resampled runs: one taken k times has k times its weight. The
    first 24 are starts too: where one leads all runs to a lower cost, the fit moves there, and all are refitted."""
    kept = runs.weight > 0
    times = np.random.default_rng(seed).multinomial(kept.sum(), kept / kept.sum(), count)
    surface = fitted.surface
    while True:
        replicas = refit(fitted, times * runs.weight, surface.target)
        p = surface.centred(replicas[:STARTS])
        p, cost = minimise(surface, p, surface.target, runs.weight, fitted.delta, fitted.free, 1000)
        if not cost.min() < fitted.cost * (1 - 1e-6) - 1e-12 * runs.weight.sum():
            return fitted._replace(replicas=replicas)
        fitted = fitted.moved(p, cost)


def rmse(error: Array) -> Array:
    """Root mean square over the last axis."""
    return np.sqrt((error**2).mean(-1))


def band(values: Array, *estimate: float) -> list[float]:
    """90% interval: the 5% and 95% quantiles of replicas, stretched to the estimate; nan of none."""
    low, high = np.quantile([*values] or [math.nan], [0.05, 0.95], method="nearest").tolist()
    return [min(low, *estimate), max(high, *estimate)] if estimate else [low, high]


# === Part 3: tools ===============================================================================

import argparse
import csv
import json
import os
import re
import shlex
import sys
from bisect import bisect_right
from collections.abc import Callable
from functools import cache
from pathlib import Path

# --- 3a. runs in, tables out ---------------------------------------------------------------------

COLUMNS = "n_active", "tokens", "n_expert", "loss"
TERMS = "m", "mu", "n", "nu", "c"
NOISE = 0.0062                       # RMSE of the paper's fit on its own runs, nats
SAME_BUDGET = 0.1                    # FLOPs within 10% of each other are one compute budget
RUN_LIST = Path(__file__).parent / "results" / "law" / "runs.csv"


class BadInput(argparse.ArgumentTypeError):      # the user can mend it: one line on stderr, exit code 2
    pass


def require(ok: bool, message: str) -> None:
    if not ok:
        raise BadInput(message)


def read_table(path: Path) -> list[dict]:
    """Rows of a CSV, one result.json, or every result.json in a folder; each has its `source`."""
    if path.is_dir():
        found = sorted(path.rglob("result.json"))
        require(found, f"{path} holds no result.json, which a finished run leaves: train at least 3 sizes at 3 token "
                       "counts, or give a CSV, such as python scaling.py fit results/law/clark_2022.csv")
        return [row for file in found for row in read_table(file)]
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            if path.suffix == ".json":
                return [dict(json.load(file), source=str(path))]
            table = csv.DictReader(file, skipinitialspace=True)
            return [dict(row, source=f"{path} line {table.line_num}") for row in table]
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        kind = type(error).__name__
        raise BadInput(f"{path} cannot be read as a CSV or a result.json of train.py: {kind}") from None


def column(rows: list[dict], name: str) -> Array:
    """One column as float64; a value absent, not a number or not positive is named."""
    values = []
    for row in rows:
        text = row.get(name)
        require(text is not None, f"{row['source']} has no {name}: a run needs {', '.join(COLUMNS)}")
        try:
            values.append(float(text))
            require(0 < values[-1] < math.inf, "")
        except (TypeError, ValueError, BadInput):
            raise BadInput(f"{row['source']}: {name} = {text!r} is not a positive, finite number") from None
    return np.array(values)


def runs_of(rows: list[dict], weights: str | None = None) -> Runs:
    """Runs of rows that have COLUMNS; `weights` names a column, without it all weigh 1."""
    weight = column(rows, weights) if weights else np.ones(len(rows))
    runs = Runs(*(column(rows, name) for name in COLUMNS), weight)
    for row, E, L in zip(rows, runs.E, runs.L):
        require(E % 1 == 0, f"{row['source']}: n_expert = {E:g} must be a whole number, 1 for a dense model")
        require(L < 1000, f"{row['source']}: loss = {L:g} is no loss in nats per token")
    return runs


def hold_out(runs: Runs, rule: str, rows: list[dict] | None = None) -> Runs:
    """Weight 0 for loss:30 (lowest, as in the paper), compute:30 (largest 6 N D), column:NAME."""
    kind, _, value = rule.partition(":")
    if kind == "column":
        out = np.array([str(row.get(value) or "0").strip().lower() not in ("0", "0.0", "false") for row in rows])
    else:
        by = {"loss": runs.L, "compute": -runs.N * runs.D}[kind]
        out = by.argsort(kind="stable").argsort() < int(value)
    require(0 < out.sum() < len(out), f"--holdout {rule} holds out {out.sum()} of {len(out)} runs")
    return runs._replace(weight=np.where(out, 0.0, runs.weight))


def with_noise(runs: Runs, seed: int, noise: float = 0.006, outliers: float = 0.0) -> Runs:
    """The runs with normal noise on their losses, and a share of outliers 0.05 nats worse."""
    rng = np.random.default_rng(seed)
    L = runs.L + rng.normal(0, noise, len(runs.L))
    return runs._replace(L=L + 0.05 * (rng.random(len(L)) < outliers))


def paper_runs() -> Runs:
    """The paper's 270 runs (Appendix H), with the loss that its law gives them, free of noise."""
    runs = runs_of([row | {"loss": 1} for row in read_table(RUN_LIST)])
    return runs._replace(L=Law().loss(*runs[:3]))


def records(**columns: Array) -> list[dict]:
    """Rows of plain numbers from columns (R,) or, of intervals, (R, 2)."""
    lists = (np.asarray(values).tolist() for values in columns.values())
    return [dict(zip(columns, row)) for row in zip(*lists)]


def show(title: str, rows: list[dict]) -> None:
    """Print rows under their keys; a pair is an interval."""
    def cell(value):
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(map(cell, value))}]"
        return f"{value:.5g}" if isinstance(value, float) else str(value)
    lines = [list(rows[0]), *([cell(v) for v in row.values()] for row in rows)]
    sizes = [max(map(len, cells)) for cells in zip(*lines)]
    print(title)
    for line in lines:
        print("  ".join(text.rjust(size) for text, size in zip(line, sizes)))
    print()


def clean(value, digits: int = 12):
    """What JSON can say of a value: lists for arrays, null for infinity, so many digits."""
    text = json.dumps(value, default=lambda array: array.tolist())
    return json.loads(text, parse_constant=lambda name: None,
                      parse_float=lambda number: float(f"{float(number):.{digits}g}"))


def write(path: str | Path, text: str) -> None:
    """All or nothing: into a temporary file beside it, then renamed; a device such as /dev/stdout stays what it is."""
    path = Path(path)
    if path.exists() and not path.is_file():
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def run_tables(args) -> dict:
    """The paper's Tables 1 and 3, recomputed from its Table 2."""
    law = Law(e_start=args.e_start or Law().e_start)
    E, flops = np.repeat(EXPERTS[:5], 3), np.tile([1e20, 5e20, 1e21], 5)
    tables = {"table_3": records(E=EXPERTS, **dict(zip(TERMS[:4], law.terms(EXPERTS)))),
              "table_1": records(E=E, flops=flops, **dict(zip(("N", "D", "loss"), optimum(law, E, flops))))}
    show(f"Table 3: L = m N^-mu + n D^-nu + {law.c}, E_start = {law.e_start}", tables["table_3"])
    show("Table 1: the compute optimum", tables["table_1"])
    return tables


# --- 3b. fitting your own runs, and how far to trust it ------------------------------------------
# A fit of form "chinchilla" has one law for each E, so a fit is a list of parts: (mask (R,), Fit).


def grouped(values: Array, width: float) -> Array:
    """Numbers (R,) of groups in rising order: values within `width` of a group's least are one."""
    group = np.empty(len(values), int)
    number, start = -1, 0.0
    for i in values.argsort():
        if values[i] > start * (1 + width):
            number, start = number + 1, values[i]
        group[i] = number
    return group


def fit_form(runs: Runs, form: str, pinned: dict, delta: float | None = None) -> tuple[list, dict]:
    """The parts of a fit, and the coefficients that too few token counts (within 2% they are one) or numbers of
    experts cannot tell: held at 0, or E_start and E_max at the paper's. Runs that cannot tell the rest are refused."""
    parts, held = [], {}
    given = pinned | FORMS[form]
    for E in np.unique(runs.E) if form == "chinchilla" else [None]:
        where = f"E = {E:g}: " if E else ""
        mask = runs.E == E if E else runs.E > 0
        used = runs.take(mask & (runs.weight > 0))
        sizes, tokens, experts = len(np.unique(used.N)), len(set(grouped(used.D, 0.02))), len(np.unique(used.E))
        unknown = {1: NO_EXPERTS | EHAT, 2: EHAT, 3: {"e_max": Law().e_max}}.get(experts, {})
        if tokens == 1 and not NO_TOKENS.keys() <= given.keys():
            unknown = unknown | NO_TOKENS
            require(not NO_TOKENS.keys() & pinned.keys(),
                    f"{where}one token count cannot tell the term in D from c: pin {', '.join(NO_TOKENS)}, or none")
        fixed = unknown | given
        count = len(NAMES) - len(fixed)
        for name, number, term in ("n_active", sizes, "a alpha c"), ("tokens", tokens, "b beta c"):
            require(number >= 3 - len(given.keys() & term.split()) or (name == "tokens" and fixed.get("b") == 0),
                    f"{where}{number} value(s) of {name} cannot tell the law's {', '.join(term.split())}: train at "
                    "least 3, pin one of those, or use --form clark, which has no tokens in it")
        require(len(used.L) > count, f"{where}{len(used.L)} runs cannot fix the {count} parameters of form {form}: "
                "add runs, hold out fewer, or use a form with fewer (--form clark)")
        held |= {name: value for name, value in unknown.items() if name not in given}
        parts.append((mask, fit(runs.take(mask), fixed, delta)))
    return parts, held


def predict(parts: list[tuple], runs: Runs, weight: Array | None = None) -> Array:
    """Losses (R,) by the fits or, given weights (S, R), by replicas refitted under each (S, R)."""
    out = np.empty(runs.L.shape if weight is None else weight.shape)
    for mask, fitted in parts:
        some, law = runs.take(mask), fitted.law
        if weight is not None:
            law = many(refit(fitted, weight[:, mask] * some.weight, fitted.surface.target))
        out[..., mask] = law.loss(*some[:3])
    return out


def held_out_rmse(parts: list[tuple], runs: Runs, rule: str = "") -> float:
    """RMSE on runs of weight 0 or, with kfold:10, on each run by a fit without its fold: runs of one point share it."""
    if not rule.startswith("kfold"):
        return rmse((predict(parts, runs) - runs.L)[runs.weight == 0])
    folds = min(int(rule[6:]), len(runs.L))
    fold = np.random.default_rng(0).permutation(len(runs.L))[points(runs)] % folds
    unseen = predict(parts, runs, (fold != np.arange(folds)[:, None]).astype(float))
    return rmse(unseen[fold, np.arange(len(fold))] - runs.L)


def points(runs: Runs) -> Array:
    """The number (R,) of each run's point (N, D, E): equal for runs that repeat one."""
    return np.unique(runs[:3], axis=1, return_inverse=True)[1].ravel()


def roll(runs: Runs, form: str, pinned: dict, delta: float | None) -> tuple[list[dict], Array]:
    """Each compute budget (the ten largest at most) predicted by a fit of those below it; and all the errors."""
    flops = 6 * runs.N * runs.D
    budget = grouped(flops, SAME_BUDGET)
    rows, errors = [], []
    for k in range(max(1, budget.max() - 9), budget.max() + 1):
        known = runs._replace(weight=runs.weight * (budget < k)).take(budget <= k)
        try:
            parts, _ = fit_form(known, form, pinned, delta)
        except BadInput:
            continue
        unseen = known.weight == 0
        error = (predict(parts, known) - known.L)[unseen]
        errors.extend(error)
        rows.append({"budget": flops[budget == k].max(), "runs": len(error), "rmse": rmse(error),
                     "error at its best run": error[known.L[unseen].argmin()]})
    require(rows, "--holdout rolling: the runs below a compute budget never suffice for a fit that predicts it")
    return rows, np.array(errors)


def near_best(runs: Runs, nats: float) -> Array:
    """Runs (R,) within so many nats of the best of their compute budget and E."""
    _, place = np.unique([grouped(runs.N * runs.D, SAME_BUDGET), runs.E], axis=1, return_inverse=True)
    best = np.full(len(place), math.inf)
    np.minimum.at(best, place, runs.L)
    return best[place] + nats >= runs.L


def lack_of_fit(runs: Runs, error: Array, noise: float | None) -> str:
    """One line: how many times the noise the errors are, along what they lean, and what to do."""
    if noise is None:
        point = points(runs)
        count = np.bincount(point)
        spread = runs.L - (np.bincount(point, runs.L) / count)[point]
        noise = math.sqrt((spread**2).sum() / max(len(point) - len(count), 1))
    if noise < 1e-9:
        return "noise unknown: --noise NATS, or runs that repeat a point, would tell it from lack of fit"
    times = rmse(error) / noise
    said = f"residuals are {times:.1f} times the noise of {noise:.2g} nats: "
    if times < 1.5:
        return said + "the form is not rejected"
    lean = {"": 0.0}                                   # the share of the errors that a parabola along an axis explains
    for name, values in {"N": runs.N, "D": runs.D, "D / N": runs.D / runs.N, "E": runs.E}.items():
        x = np.log(values / values.mean())
        if len(set(grouped(values, 0.02))) > 2:        # rounded, as with one D the axes N and D / N are one: N
            lean[name] = round(1 - rmse(error - np.polyval(np.polyfit(x, error, 2), x))**2 / rmse(error)**2, 6)
    axis = max(lean, key=lean.get)
    if lean[axis] * (len(error) - 3) < 16 * (1 - lean[axis]):          # F(3, n - 3) below its 0.1% point
        return said + "lack of fit along no axis: look for a setting that differs between the runs"
    mend = {"D / N": "fit only runs near (or nearer) their budget's best, --near 0.06",
            "E": "try another --form, or fewer numbers of experts"}.get(axis, f"leave out the runs of smallest {axis}")
    return f"{said}lack of fit along {axis}, a parabola explains {lean[axis]:.0%}; {mend}"


def compare_forms(runs: Runs, pinned: dict, delta: float, unseen_rmse: Callable) -> list[dict]:
    """Every form at one Huber width; AIC = n ln(2 sum Huber / n) + 2 parameters, from the best."""
    rows = []
    used = runs.weight > 0
    n = used.sum()
    for form in FORMS:
        try:
            parts, _ = fit_form(runs, form, pinned, delta)
            unseen = unseen_rmse(parts, form)
        except BadInput as error:
            print(f"form {form} is left out: {error}")
            continue
        count = sum(fitted.free.sum() for _, fitted in parts)
        cost = max(sum(fitted.cost for _, fitted in parts), 1e-300)
        rows.append({"form": form, "parameters": count, "aic": n * np.log(2 * cost / n) + 2 * count,
                     "rmse_train": rmse((predict(parts, runs) - runs.L)[used]), "rmse_holdout": unseen})
    best = min(row["aic"] for row in rows)
    return [row | {"aic": row["aic"] - best} for row in rows]


def per_expert(parts: list[tuple], runs: Runs) -> tuple[dict, dict]:
    """{E: {m, mu, n, nu, c: value}}, known whatever single coefficients do, and the same of 90% intervals."""
    values, intervals = {}, {}
    for mask, fitted in parts:
        for E in np.unique(runs.E[mask]):
            row = values[f"{E:g}"] = dict(zip(TERMS, fitted.law.terms(E)))
            some = zip(row.items(), many(fitted.replicas).terms(E))
            intervals[f"{E:g}"] = {name: band(replicas[:, 0], value) for (name, value), replicas in some}
    return values, intervals


def fit_input(args) -> tuple[Runs, list[dict], dict]:
    """The runs that `fit` is asked to use, their rows, and the pinned coefficients."""
    rules = r"(loss|compute):\d{1,9}|kfold:([2-9]|[1-9]\d{1,8})|column:.+|rolling"
    require(re.fullmatch(rules, args.holdout, re.ASCII),
            f"--holdout {args.holdout} must be loss:30, compute:30, column:NAME, kfold:10 or rolling")
    pinned = dict(args.pin or []) | {name: getattr(args, name) for name in EHAT if getattr(args, name)}
    if pinned.get("b") == 0:                           # then nothing tells the exponents of its term
        pinned = NO_TOKENS | pinned
    start, top = pinned.get("e_start", 50), pinned.get("e_max", math.inf)       # 50: the search's bound
    require(0.05 <= start <= min(50, 0.95 * top) and top >= 2,
            "e_start must lie from 0.05 to 50 and 6% below e_max; e_max from 2, from 53 when e_start is free")
    both = pinned.keys() & FORMS[args.form]
    require(not both, f"--form {args.form} sets {', '.join(both)} itself")
    rows = [row for source in args.sources for row in read_table(source)]
    require(rows, f"{args.sources[0]}: no runs in it")
    runs = runs_of(rows, args.weights)
    require(pinned.get("c", 0) < runs.L.min(), f"--pin c={pinned.get('c')} is not below the least loss, {runs.L.min()}")
    if args.near:
        keep = near_best(runs, args.near)
        print(f"--near {args.near:g} keeps {keep.sum()} of {len(keep)} runs")
        rows, runs = list(compress(rows, keep)), runs.take(keep)
    if args.holdout.startswith(("loss", "compute", "column")):
        runs = hold_out(runs, args.holdout, rows)
    return runs, rows, pinned


def run_fit(args) -> dict:
    """Fit runs and say how far to trust the result."""
    runs, rows, pinned = fit_input(args)
    parts, held = fit_form(runs, args.form, pinned, args.huber)
    if held:
        told = " ".join(f"{value:g}" for value in held.values())
        print(f"note: such runs cannot tell {', '.join(held)}: held at {told} (what is 0 is left out)")
    parts = [(mask, bootstrap(fitted, runs.take(mask), args.bootstrap)) for mask, fitted in parts]
    for _, fitted in parts:
        if fitted.agree < 1 / 3:
            print(f"warning: {fitted.agree:.0%} of {fitted.starts} starts reach the optimum: there may be a better one")
        for said in fitted.at_bound():
            print(f"warning: {said} lies at the bound of the search: take it for a limit, not for a value")

    rolled = cache(lambda form: roll(runs, form, pinned, args.huber))

    def unseen_rmse(parts, form):
        return rmse(rolled(form)[1]) if args.holdout == "rolling" else held_out_rmse(parts, runs, args.holdout)
    values, intervals = per_expert(parts, runs)
    predicted = predict(parts, runs)
    used = runs.weight > 0
    deviations = np.log(runs.L / predicted)
    deviations /= robust_deviation(deviations[used])
    far = used & (abs(deviations) > 5)
    near = used & ~far
    pull = rmse(predict(parts, runs, 1 - np.eye(len(rows))) - predicted)
    table = records(**dict(zip(COLUMNS, runs)), predicted=predicted, pull=pull, deviations=deviations,
                    source=[row["source"] for row in rows])
    first = parts[0][1]
    result = {
        "form": args.form,
        "per_expert": {E: {name: row[name] for name in TERMS[:4]} for E, row in values.items()},
        "c": first.law.c if len(parts) == 1 else {E: row["c"] for E, row in values.items()},
        "rmse_train": rmse((predicted - runs.L)[used]), "rmse_holdout": unseen_rmse(parts, args.form), "runs": table,
        "intervals": intervals, "starts_agree": np.mean([fitted.agree for _, fitted in parts]),
        "lack_of_fit": lack_of_fit(runs.take(near), (runs.L - predicted)[near], args.noise),
        "forms": compare_forms(runs, pinned, first.delta, unseen_rmse)}
    print(f"form {args.form}: {result['starts_agree']:.0%} of {sum(fitted.starts for _, fitted in parts)} starts reach "
          f"the optimum; Huber width {first.delta:.4g}\nRMSE train {result['rmse_train']:.5f}, held-out "
          f"{result['rmse_holdout']:.5f} nats ({args.holdout})\n{result['lack_of_fit']}\n")
    show(f"The law at each E, with 90% intervals from {args.bootstrap} bootstrap refits",
         [{"E": E} | {name: f"{values[E][name]:.4g} [{low:.4g}, {high:.4g}]" for name, (low, high) in row.items()}
          for E, row in intervals.items()])
    if far.any():
        result["without_outliers"] = without(far, values, table, runs, pinned, args)
    if args.holdout == "rolling":
        result["rolling"], _ = rolled(args.form)
        show("Each compute budget predicted from those below it, nats", result["rolling"])
    if len(parts) == 1:                                # several laws share no coefficients to save
        result |= {"law": first.law._asdict(), "draws": first.replicas}
        show("Its coefficients; not identified where the interval is wider than twice the value", [
            {"coefficient": name, "value": value, "90%": (low, high), "": "held fixed" if not moves else
             "NOT IDENTIFIED" if high - low >= 2 * abs(value) else ""}
            for name, value, moves, (low, high) in zip(NAMES, first.law, first.free, map(
                band, first.replicas.T, first.law))])
    show("The forms side by side; AIC from the best", result["forms"])
    show("The runs that pull hardest: RMS change of all predictions when one is left out",
         sorted(table, key=lambda row: -row["pull"])[:5])
    return result


def without(far: Array, values: dict, table: list[dict], runs: Runs, pinned: dict, args) -> dict | None:
    """The law at each E without the runs `far` (R,) off, printed beside that with them, `values`."""
    furthest = sorted(compress(table, far), key=lambda row: -abs(row["deviations"]))
    show(f"{len(furthest)} runs lie over 5 robust deviations off; the furthest", furthest[:10])
    try:
        parts, _ = fit_form(runs._replace(weight=runs.weight * ~far), args.form, pinned, args.huber)
    except BadInput as error:
        print(f"no law without them: {error}\n")
        return None
    laws, _ = per_expert(parts, runs)
    show("The law with them | without them", [{"E": E} | {
        name: f"{values[E][name]:.4g} | {value:.4g}" for name, value in row.items()} for E, row in laws.items()])
    return laws


def run_simulate(args) -> dict:
    """Noisy losses from the paper's law on its runs, fitted with the 30 lowest held out."""
    truth = paper_runs()
    ratio = np.log(truth.D / truth.N)
    truth = hold_out(truth._replace(L=truth.L + args.curve * (ratio - ratio.mean())**2), "loss:30")
    held = truth.weight == 0
    known = {"prediction": truth.L[held]}
    if not args.curve:                                 # a curved law has other terms
        known = dict(zip(TERMS, Law().terms(EXPERTS))) | known
    rows = []
    for seed in range(args.draws):
        runs = with_noise(truth, seed, outliers=args.outliers)
        fitted = fit(runs)
        error = fitted.law.loss(*truth[:3]) - truth.L
        row = {"rmse_train": rmse(error[~held]), "rmse_holdout": rmse(error[held]), "starts_agree": fitted.agree}
        laws = many(bootstrap(fitted, runs, 200, seed).replicas)
        replicas = dict(zip(TERMS, laws.terms(EXPERTS)), prediction=laws.loss(*truth.take(held)[:3]))
        for name, true in known.items():
            low, high = np.quantile(replicas[name], [0.05, 0.95], axis=0)
            row[f"cover_{name}"] = np.mean((low <= true) & (true <= high))
        rows.append(row | {"law": fitted.law})
    mean = {key: np.mean([row[key] for row in rows]) for key in row}       # row: all but the law
    mean["cover"] = np.mean([mean[f"cover_{name}"] for name in known])
    spread = [{"coefficient": name, "truth": true, "90% of fits": band(fits)}
              for name, true, fits in zip(NAMES, Law(), zip(*(row["law"] for row in rows)))]
    show(f"{args.draws} draws, noise 0.006 nats, {100 * args.outliers:g}% outliers of +0.05; RMSE against the "
         "noiseless truth; coverage of 90% intervals", [{"": key, "mean": value} for key, value in mean.items()])
    show("Single coefficients are recovered poorly, E_max not at all; the predictions above do not need them", spread)
    return {"command": args.command, "mean": mean, "coefficients": spread, "draws": rows}


# --- 3c. the best model under budgets ------------------------------------------------------------

BYTES = {"bf16": 2, "fp32": 4}


def chosen_law(path: str | None) -> tuple[Array, Runs]:
    """A law that `fit --json` wrote over its replicas ("draws" in that file), coefficients (1 + S, 11), and its runs.
    Without a file the paper's, refitted to its runs plus its own RMSE as noise: what they can know."""
    if path is None:
        runs = paper_runs()
        noise = np.random.default_rng(0).normal(0, NOISE, (300, len(runs.L)))
        return np.vstack([Law(), refit(fit(runs, delta=0.01), 1.0, np.log(runs.L + noise))]), runs
    try:
        saved = json.loads(Path(path).read_text())
        laws = np.array([[saved["law"][name] for name in NAMES], *saved["draws"]], float)
        runs = runs_of(saved["runs"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{path} holds no law: write one with python scaling.py fit RUNS.csv --json {path}, in any "
                       "form but chinchilla") from None
    require(laws[0, 4] > 0, f"{path} is a law without tokens, b = 0: it has no optimum")
    return np.nan_to_num(laws, nan=math.inf), runs                # JSON's null: an infinite E_max


AXES = {"memory": (1e8, 1e12), "flops": (1e18, 1e26)}       # where `switches` looks: parameters, FLOPs


def switches(laws: Array, axis: str, values: Array, **budget) -> list[dict]:
    """Where the best E of laws[0] changes along `axis` ("memory" or "flops"), and the 90% range of it over the other
    laws (1 + S, 11). `values` (G,) are evenly spaced in their logarithms."""
    loss = np.minimum(optimum(many(laws, 2), EXPERTS[:, None], **budget | {axis: values})[2], 1e9)    # (1 + S, E, G)
    best = loss[0].argmin(0)
    found = []
    for i in np.flatnonzero((best[1:] != best[:-1]) & (loss[0].min(0)[:-1] < 1e9)):
        before, after = best[i], best[i + 1]
        places = []
        for gap in loss[:, before] - loss[:, after]:               # of a law, (G,): it rises through zero at a switch
            rises = np.flatnonzero((gap[:-1] < 0) & (gap[1:] >= 0))
            for k in rises[abs(rises - i).argsort()[:1]]:          # the nearest to i, if any
                places.append(values[k] * (values[1] / values[0]) ** (gap[k] / (gap[k] - gap[k + 1])))
        at, *moved = places
        found.append({axis: at, "from": EXPERTS[before], "to": EXPERTS[after], "interval": band(moved),
                      "share_of_replicas": len(moved) / (len(laws) - 1)})
    return found


def rule_of_thumb(law: Law, experts: Array, flops: Array) -> list[dict]:
    """The paper's rule: at equal total parameters, E <= 8 experts on E times the tokens beat the compute-optimal dense
    model. For each E, over dense budgets `flops` (G,): how often it holds, gain in nats, cost in dense FLOPs."""
    N, D, dense = optimum(law, 1, flops)
    rows = []
    for E in experts.tolist():
        d = width(N, E)                              # all N parameters of a dense model are active
        active = law_size(d, d / 64)
        gain, cost = dense - law.loss(active, E * D, E), 6 * active * E * D / flops
        rows.append({"n_expert": E, "holds": (gain > 0).mean(), "gain": (gain.min(), gain.max()),
                     "cost": (cost.min(), cost.max())})
    return rows


def winners(loss: Array) -> Array:
    """Share of the rows of loss (S, E) in which each E has the least loss, (E,)."""
    return (loss.argmin(1)[:, None] == np.arange(len(EXPERTS))).mean(0)


def run_optimum(args) -> dict:
    """The best model for each number of experts under the budgets, and where the best changes."""
    laws, _ = chosen_law(args.law)
    unit, memory = args.memory or ("number", None)
    budget = {"flops": args.flops, "kv_tokens": args.kv_tokens, "inference_tokens": args.inference_tokens,
              "memory": memory / BYTES[args.dtype] if unit == "bytes" else memory}
    N, D, loss = optimum(many(laws), EXPERTS, **budget)
    fits = np.isfinite(loss[0])
    require(fits.any(), f"no model meets these budgets, the smallest has {law_size(64, 1):,} parameters: raise --flops "
                        "or --memory, or lower --vocab, --kv_tokens or --inference_tokens")
    d = width(N[0])
    rows = records(n_expert=EXPERTS, n_active=N[0], n_total=law_size(d, d / 64, EXPERTS), tokens=D[0], loss=loss[0])
    table = [row | {"90%": band(losses), "best in": f"{part:.1%}"}
             for row, losses, part in zip(rows, loss[1:].T, winners(loss[1:]))]
    result = {"rows": list(compress(rows, fits)), "best": EXPERTS[loss[0].argmin()]}
    show(f"The best is E = {result['best']}; 90% intervals, and the share of the replicas in which an E is the best",
         list(compress(table, fits)))
    if args.switches:
        del budget[args.switches]
        values = np.geomspace(*AXES[args.switches], 401)
        result["switches"] = switches(laws, args.switches, values, **budget)
        show(f"Where the best E changes along {args.switches}", result["switches"] or [{"": "nowhere"}])
    if args.rule_of_thumb:
        flops = np.geomspace(1e19, 1e24, 51)
        result["rule_of_thumb"] = rule_of_thumb(Law(*laws[0]), EXPERTS[1:], flops)
        show("E times the tokens at equal memory, dense optima of 1e19 to 1e24 FLOPs: gain in nats, times the FLOPs",
             result["rule_of_thumb"])
    return result


# --- 3d. from the law to a model to train --------------------------------------------------------

# The paper's batch ramp: from this token on, so many tokens a step.
RAMP = [[0, 65_536], [500_000_000, 131_072], [1_000_000_000, 262_144]]


def model_config(d: int, E: int, d_head: int = 64):
    """The paper's model in model.py's words: d/64 blocks and heads, experts of width 3d, top-1 (Switch). The gate's
    probability weights its one expert as it is: renormalised to 1 it would get no gradient from the loss. 512 tokens
    of context, as in the authors' public configs: the law's loss is at that length."""
    from model import ModelConfig
    n = d // d_head
    return ModelConfig(
        n_layer=n, d_model=d, n_head=n, n_kv_head=n, d_head=d_head, n_expert=E, top_k=1, d_expert=3 * d,
        vocab_size=VOCABULARY, seq_len=512, rope_base=1e4, qk_norm=False, init_scale=0.1, tie_embeddings=False,
        renormalize=False, aux_coef=0.01, z_coef=0.001)


def candidates(args, laws: Array, limit: float, dtype: str) -> list[dict]:
    """The best of all shapes of the paper's rule for each E; limit: bytes of one GPU, to train and to serve."""
    from model import memory
    d = args.d_head * np.arange(1, 257)
    n, E = d // args.d_head, EXPERTS[:, None]
    active, total = law_size(d, n), law_size(d, n, E)
    tokens = args.flops / (6 * active) - args.inference_tokens / 3
    deployed = (total + 2 * args.context * n * d) * BYTES[args.dtype]
    trains = [bisect_right(d.tolist(), limit, key=lambda width, E=E: memory(
        model_config(width, E, args.d_head), 1, dtype)["total"]) for E in EXPERTS.tolist()]
    fits = (deployed <= limit) & (tokens >= (args.batch or RAMP[0][1])) & (n <= np.array(trains)[:, None])
    require(fits.any(), f"no model meets {args.flops:.3g} FLOPs with {limit / 1e9:.3g} GB for a training step and for "
            f"{args.context:g} tokens of context: raise --flops or --memory, or lower --vocab, --context, --batch or "
            "--inference_tokens")
    loss = np.where(fits, many(laws, 2).loss(active, np.maximum(tokens, 1), E), np.inf)
    best = loss[0].argmin(1)                                       # the best shape for each E
    each = range(len(best))
    losses = loss[:, each, best]
    rows = records(
        n_expert=EXPERTS, d_model=d[best], n_layer=n[best], n_active=active[best], n_total=total[each, best],
        tokens=tokens[best], loss=losses[0], interval=[band(some) for some in losses[1:].T],
        deployed_bytes=deployed[each, best].astype(int), chance_best=winners(loss[1:].min(2)))
    return list(compress(rows, fits.any(1)))


def ramp_steps(tokens: float, ramp: list = RAMP) -> int:
    """Steps to `tokens`; a stage of the ramp ends at the step that reaches the next one's start."""
    steps = seen = 0
    for (_, batch), (end, _) in zip(ramp, [*ramp[1:], (math.inf, 0)]):
        more = max(0, math.ceil((min(tokens, end) - seen) / batch))
        steps += more
        seen += more * batch
    return steps


def run_plan(args) -> dict:
    """A model to train, that fits one GPU twice: training, a whole copy on each, and serving --context tokens."""
    from model import CARDS, count, memory, peak_rates
    laws, runs = chosen_law(args.law)
    require(not args.memory or args.memory[0] == "bytes", "plan --memory is that of one GPU, in bytes: 80GB or 80GiB")
    require(not args.write or args.write.endswith(".py"), f"--write {args.write}: a config is a Python file, plan.py")
    require(args.mfu <= 1, f"--mfu {args.mfu} is a share of the GPU's peak: at most 1")
    require(args.gpu in CARDS, f"--gpu {args.gpu} must be one of {', '.join(CARDS)}")
    ramp = [[0, args.batch]] if args.batch else RAMP
    require(ramp[0][1] % 512 == 0, f"--batch {args.batch} is no multiple of 512, the context of the law")
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[args.dtype]
    limit = args.memory[1] if args.memory else CARDS[args.gpu].memory
    rows = candidates(args, laws, limit, dtype)
    best = min(rows, key=lambda row: row["loss"])
    E, N, D, d = (best[name] for name in ("n_expert", "n_active", "tokens", "d_model"))
    config = model_config(d, E, args.d_head)
    body = N - 2 * d * VOCABULARY
    by_text, by_code = peak_rates(body, N, E)
    micro, most = 1, ramp[0][1] // 512 // args.gpus       # sequences a GPU in the smallest batch
    while most % (2 * micro) == 0 < most and memory(config, 2 * micro, dtype)["total"] <= limit:
        micro *= 2
    train = memory(config, micro, dtype)
    rate = args.learning_rate or by_text
    days = 6 * N * D / (args.gpus * getattr(CARDS[args.gpu], dtype) * args.mfu) / 86400
    N_run, D_run = ((field * (runs.E == E)).max() or math.nan for field in runs[:2])
    beyond = {"N": N / N_run, "D": D / D_run, "flops": N * D / (runs.N * runs.D).max()}  # times the largest; nan: none
    result = best | {
        "n_active_without_embeddings": body, "n_total_with_router_and_norms": count(config)["total_untied"],
        "steps": ramp_steps(D, ramp), "batch_ramp": ramp, "micro_batch": micro, "learning_rate": rate, "days": days,
        "learning_rate_authors_code": by_code, "training_bytes": train, "beyond_the_runs": beyond}
    show("The best shape for each number of experts", rows)
    low, high = best["interval"]
    of_this_E = (f'{beyond["N"]:.3g} times N, {beyond["D"]:.3g} times D of this E' if N_run > 0 else
                 f"no run has {E} experts")
    print(f"""The best: {E} experts of width {3 * d} in {config.n_layer} blocks of width {d}, {config.n_head} heads
  parameters     {N:,} active, {body:,} of them not in embeddings, {best["n_total"]:,} in all
  loss           {best["loss"]:.4f} nats a token, 90% {low:.4f} to {high:.4f} for the law; a single run scatters more
  tokens         {D:,.0f} in {result["steps"]:,} steps of {" then ".join(f"{batch:,}" for _, batch in ramp)}
  micro-batch    {micro} sequences of {config.seq_len} on each of {args.gpus} x {args.gpu}
  peak rate      {rate:.4g}; eq. 7 says {by_text:.4g} by the text, {by_code:.4g} by the authors' code
  memory, GB     {train["total"] / 1e9:.3g} of {limit / 1e9:.3g} to train, {best["deployed_bytes"] / 1e9:.3g} to serve
  time           {days:.3g} days at {args.mfu:.0%} of the peak, on several GPUs if you split its batches
  beyond runs    {of_this_E}; {beyond["flops"]:.3g} times the FLOPs of the largest
No interval knows of a law that bends beyond its runs.""")
    if args.write:
        write_config(args, result, config, dtype)
        print(f"wrote {args.write}: give it a dataset and a tokenizer before you train it")
    return result | {"rows": rows}


def write_config(args, best: dict, config, dtype: str) -> None:
    """A flat config, one assignment a line, that `python train.py` accepts as it is."""
    tokens = int(best["tokens"])
    values = {k: v for k, v in vars(config).items() if k not in ("max_seq_len", "norm_eps")} | {
        "dataset": "stdlib", "tokenizer": "bytes", "max_steps": best["steps"], "max_tokens": tokens,
        "batch_tokens": best["batch_ramp"], "micro_batch": best["micro_batch"],
        "learning_rate": clean(best["learning_rate"], 4), "min_learning_rate": 0.0, "schedule": "constant",
        "warmup": min(130_000_000, tokens // 10), "decay": 0.2, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.999,
        "grad_clip": 0.1, "dtype": dtype}
    low, high = best["interval"]
    data = f"the data of {args.law}" if args.law else "FineWeb-Edu in GPT-2 tokens: set dataset and tokenizer"
    write(args.write, f"# {args.command}\n# Expected loss {best['loss']:.4f} nats a token (90%: {low:.4f} to "
          f"{high:.4f}) on {data}.\n# Learning rate by the other reading of eq. 7: "
          f"{best['learning_rate_authors_code']:.4g}\n\n" + "".join(f"{k} = {v!r}\n" for k, v in values.items()))


# --- 3e. the command line ------------------------------------------------------------------------


def quantity(text: str) -> tuple[str, float]:
    """("number" or "bytes", value) of 1e22, 20B (billion), 80GB, "80 GiB"."""
    form = r"((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?) *(?:([kmgtp])(i?)b|([kmbt]?))"
    match = re.fullmatch(form, text.strip().replace("_", "").lower())
    require(match, f"{text!r} is no quantity such as 1e22, 20B (billion), 80GB or 80GiB")
    number, prefix, binary, letter = match.groups()
    if prefix:
        return "bytes", float(number) * (1024 if binary else 1000)**("kmgtp".index(prefix) + 1)
    return "number", float(number) * 1000**"_kmbt".index(letter or "_")


def reader(must: str, fits: Callable, convert: Callable = float) -> Callable:
    """Reads an argument that `must` be a finite number, not of bytes, which `fits`."""
    def read(text: str):
        unit, value = quantity(text)
        require(unit == "number" and value < math.inf and fits(value), f"{text!r} must be {must}")
        return convert(value)
    return read


def pin(text: str) -> tuple[str, float]:
    """A coefficient and its value: c=1.6."""
    name, _, value = text.partition("=")
    require(name in NAMES, f"{text!r} is not NAME=VALUE with one of {', '.join(NAMES)}")
    low, high = (0, 1e99) if name in ("a", "b", "c", "e_start", "e_max") else (-9, 9)
    try:
        require(low <= float(value) <= high, "")
    except (ValueError, BadInput):
        raise BadInput(f"{text!r} is no value of {name}: {low} to {high}") from None
    return name, float(value)


VERBS = {"tables": run_tables, "optimum": run_optimum, "fit": run_fit, "simulate": run_simulate, "plan": run_plan}
KINDS = {
    "text": str, "memory": quantity, "pin": pin, "form": list(FORMS), "dtype": list(BYTES), "axis": list(AXES),
    "number": reader("a positive number such as 1e22 or 20B (billion), not in bytes", lambda value: value > 0),
    "from 0": reader("a number from 0", lambda value: value >= 0),
    "whole": reader("a whole number from 1 to 1,000,000", lambda value: value % 1 == 0 < value <= 1e6, int),
    "share": reader("a share from 0 to 1", lambda value: 0 <= value <= 1)}
# option, the verbs that take it, its kind, its default (-: none; !: it has to be given), what it says
OPTIONS = """
--form              fit           form      joint      expert_count is E itself for Ê
--pin               fit           pin       -          NAME=VALUE: hold a coefficient there, c=1.6; may be repeated
--near              fit           number    -          only runs within so many nats of the best of their budget and E
--noise             fit           number    -          spread of repeated runs in nats (-: of those that repeat a point)
--holdout           fit           text      kfold:10   loss:30 (lowest), compute:30, column:NAME, kfold:10 or rolling
--huber             fit           number    -          width on ln L (-: 1.345 robust deviations; the paper's is 0.01)
--bootstrap         fit           whole     1000       refits behind the intervals
--weights           fit           text      -          column of weights (-: equal)
--e_start           fit tables    number    -          hold E_start here (-: free; in tables 2.0732, as printed)
--e_max             fit           number    -          hold E_max here (-: free)
--draws             simulate      whole     20         noise draws
--outliers          simulate      share     0          share of runs made 0.05 nats worse
--curve             simulate      share     0          bend the law by as much (ln D/N - mean)^2
--flops             optimum plan  number    !          compute budget: training, and inference if any
--memory            optimum plan  memory    -          80GB; for optimum also parameters, 5B; for plan that of one GPU
--inference_tokens  optimum plan  from 0    0          tokens to infer within --flops
--dtype             optimum plan  dtype     bf16       of weights and cache
--vocab             optimum plan  whole     50257      tokens in the vocabulary: sizes are counted with it
--law               optimum plan  text      -          a law that fit --json wrote (-: the paper's)
--kv_tokens         optimum       from 0    0          cached tokens that --memory holds too
--switches          optimum       axis      -          where the best E changes along this budget
--rule_of_thumb     optimum       flag      -          check E times the tokens at equal memory against dense
--gpu               plan          text      !          the GPU to train on: H100, A100-80, ... (model.CARDS)
--gpus              plan          whole     1          how many
--context           plan          from 0    32768      cached tokens when deployed
--mfu               plan          number    0.35       assumed model FLOPs utilisation, a share
--d_head            plan          whole     64         width of a head; heads and blocks are d_model / d_head
--batch             plan          whole     -          tokens a step (-: the paper's ramp, 65,536 to 262,144)
--learning_rate     plan          number    -          at its peak (-: eq. 7 of the paper)
--write             plan          text      -          CONFIG.py: write a config for train.py
"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise BadInput(f"{message}; python {self.prog} --help lists what there is")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="scaling.py", description="The joint scaling law of dense and mixture-of-experts models.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, run in VERBS.items():
        verb = verbs.add_parser(name, help=run.__doc__.split("\n")[0], description=run.__doc__, allow_abbrev=False)
        if run is run_fit:
            verb.add_argument("sources", nargs="+", type=Path, help="CSVs of n_active, tokens, n_expert, loss; "
                                                                    "result.json files; folders of them")
        verb.add_argument("--json", help="write the result there as JSON too")
        for line in OPTIONS.strip().splitlines():
            flag, users, kind, default, text = re.split("  +", line)
            if name in users.split() and kind == "flag":
                verb.add_argument(flag, action="store_true", help=text)
            elif name in users.split():
                verb.add_argument(flag, **{"type" if callable(KINDS[kind]) else "choices": KINDS[kind]},
                                  default=None if default in "-!" else default, required=default == "!",
                                  action="append" if kind == "pin" else "store", help=f"{text} [{default}]")
    return parser.parse_args(argv or ["tables"])


def main(argv: list[str]) -> int:
    """The exit code of `python scaling.py *argv`."""
    global VOCABULARY
    try:
        args = parse(argv)
        require([] not in vars(args).values(), "a value is missing: --x=--")
        args.command = shlex.join(["python", "scaling.py", *argv])
        VOCABULARY = getattr(args, "vocab", VOCABULARY)            # law_size counts with it
        result = VERBS[args.verb](args)
        if args.json:
            write(args.json, json.dumps(clean(result)) + "\n")
        if not argv:
            print("python scaling.py --help lists the other commands: optimum, fit, simulate, plan")
        print(end="", flush=True)                      # a full disk speaks up here
    except (KeyboardInterrupt, BrokenPipeError):
        return 130
    except (BadInput, OSError, ArithmeticError, MemoryError) as error:        # an OSError says which file, and why
        print("error: " + " ".join(f"{error or 'out of memory'}".splitlines()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (None: the shell has closed it)
    sys.stdout.reconfigure(errors="replace")
    os._exit(main(sys.argv[1:]))     # what a closed pipe or a full disk did not take would make Python's own exit fail
