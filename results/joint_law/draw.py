"""From the tables and fit.json beside this file: fit.png, isoflop.png, rates.png, pair.png, and best.json.

    python scaling.py fit results/joint_law/runs.csv --holdout rolling --json results/joint_law/fit.json
    python results/joint_law/draw.py
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
from numpy import ndarray as Array

sys.path.insert(0, str(Path(__file__).parents[2]))
import scaling

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

HERE = Path(__file__).parent
VOCABULARY = 264
LATE = 800_000                                   # tokens from which on the runs are fitted (late.csv)
WIDTHS = np.geomspace(16, 80, 300)               # d_model, where the best models are looked for; blocks are d / 16
BUDGETS = 3e11, 1e12, 3e12                       # 6 N D
MEMORIES = 1e5, 3e5                              # parameters in all


def sizes(d: Array, E: Array) -> tuple[Array, Array]:
    """Active and total parameters of the ladder's models, as the paper counts."""
    tables, block = 2 * d * VOCABULARY, d**3 / 16
    return tables + 13 * block + 0 * E, tables + (4 + 9 * E) * block


def measured() -> dict[tuple[int, int], list[tuple[float, float]]]:
    """(E, d_model) -> (tokens, loss) of each run."""
    found = {}
    for row in csv.DictReader((HERE / "runs.csv").read_text().splitlines()):
        key = int(row["n_expert"]), int(row["d_model"])
        found.setdefault(key, []).append((float(row["tokens"]), float(row["loss"])))
    return dict(sorted(found.items()))


def draw_fit(laws: Array, runs: dict, path: Path) -> None:
    """A panel an E: the law against tokens at each size with its 90% band, and the runs; those not fitted are open."""
    experts, widths = (sorted({key[i] for key in runs}) for i in (0, 1))
    figure, panels = plt.subplots(1, len(experts), figsize=(3 * len(experts), 3.4), sharey=True, layout="constrained")
    D = np.geomspace(1.8e5, 7.5e6, 60)
    for axes, E in zip(panels, experts):
        for i, d in enumerate(widths):
            if (E, d) in runs:
                losses = scaling.many(laws).loss(sizes(d, E)[0], D, E)
                axes.fill_between(D, *np.quantile(losses[1:], [0.05, 0.95], axis=0), color=f"C{i}", alpha=0.2, lw=0)
                axes.plot(D, losses[0], color=f"C{i}", lw=1, label=f"d {d}, {sizes(d, E)[0] / 1e3:.0f}K active")
                for tokens, loss in runs[E, d]:
                    axes.plot(tokens, loss, "o", color=f"C{i}", ms=4, mfc=f"C{i}" if tokens >= LATE else "none")
        axes.set(xscale="log", xlabel="training tokens", title=f"E = {E}", ylim=(1.25, 2.8))
        axes.legend(frameon=False, fontsize=7)
    panels[0].set_ylabel("validation loss, nats a byte")
    save(figure, path)


def draw_isoflop(laws: Array, path: Path) -> None:
    """Loss against active parameters along compute budgets, by the law with its 90% band."""
    figure, panels = plt.subplots(1, len(BUDGETS), figsize=(11, 3.4), sharey=True, layout="constrained")
    for axes, flops in zip(panels, BUDGETS):
        for i, E in enumerate((1, 4, 16)):
            N = sizes(WIDTHS, E)[0]
            losses = scaling.many(laws).loss(N, flops / (6 * N), E)
            axes.fill_between(N, *np.quantile(losses[1:], [0.05, 0.95], axis=0), color=f"C{i}", alpha=0.2, lw=0)
            axes.plot(N, losses[0], color=f"C{i}", label=f"E = {E}")
        axes.set(xscale="log", xlabel="active parameters", title=f"{flops:.0e} FLOPs", ylim=(1.2, 2.3))
    panels[0].legend(frameon=False)
    panels[0].set_ylabel("loss by the law, nats a byte")
    save(figure, path)


def best(laws: Array) -> list[dict]:
    """For each compute budget, without and with a limit of memory: the best of E = 1 to 16, its size, and the share of
    the replicas in which each E is the best."""
    E = np.array([1, 2, 4, 8, 16])
    N, total = sizes(WIDTHS, E[:, None])
    rows = []
    for flops in BUDGETS:
        losses = scaling.many(laws, 2).loss(N, flops / (6 * N), E[:, None])                       # (1 + S, E, d)
        for memory in (np.inf, *MEMORIES):
            least = np.where(total <= memory, losses, np.inf).min(2)                              # (1 + S, E)
            i = least[0].argmin()
            share = (least[1:].argmin(1)[:, None] == np.arange(len(E))).mean(0)
            rows.append({"flops": flops, "memory": None if memory == np.inf else memory, "best": int(E[i]),
                         "n_active": float(N[i, np.where(total[i] <= memory, losses[0, i], np.inf).argmin()]),
                         "loss": float(least[0, i]), "dense": float(least[0, 0]),
                         "share": dict(zip(map(str, E), share.round(3).tolist()))})
    return rows


def draw_rates(rates: dict, path: Path) -> None:
    """Left, the grid; right, the best rates and eq. 7 fitted to them with E and without."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    N = np.geomspace(2e4, 6e5, 20)
    a, b, c = rates["with_experts"]["coefficients"]
    for i, cell in enumerate(rates["cells"]):
        E = cell["n_expert"]
        left.plot(cell["rates"], cell["losses"], "o-", color=f"C{i}", ms=3.5,
                  label=f"E = {E}, d {cell['d_model']}" + " (check)" * (E == 4))
        right.plot(cell["n_body"], cell["best"], "s" if E == 4 else "o", color=f"C{i}")
    for E, style in ((1, "-"), (4, "--"), (16, ":")):
        right.plot(N, np.exp(a + b * np.log(N) + c * np.log(E)), "k" + style, lw=1, label=f"with E: E = {E}")
    a, b = rates["without_experts"]["coefficients"]
    right.plot(N, np.exp(a + b * np.log(N)), color="0.8", lw=5, zorder=0, label="without E (as with E = 4)")
    left.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss, nats a byte")
    right.set(xscale="log", yscale="log", xlabel="active parameters without embeddings", ylabel="best rate")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def draw_pair(laws: Array, path: Path) -> None:
    """A panel a pair of equal memory: what the law foresaw for each model against compute, and what was measured."""
    rows = list(csv.DictReader((HERE / "pair.csv").read_text().splitlines()))
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axes, pair in zip(panels, ("wins", "loses")):
        own = [row for row in rows if row["name"].startswith(pair)]
        for i, E in enumerate(sorted({int(row["n_expert"]) for row in own})):
            some = [row for row in own if int(row["n_expert"]) == E]
            N, D = float(some[0]["n_active"]), float(some[0]["tokens"]) * np.geomspace(1 / 3, 3, 40)
            losses = scaling.many(laws).loss(N, D, E)
            axes.fill_between(6 * N * D, *np.quantile(losses[1:], [0.05, 0.95], axis=0), color=f"C{i}", alpha=0.2, lw=0)
            axes.plot(6 * N * D, losses[0], color=f"C{i}", lw=1, label=f"E = {E}, {N / 1e3:.0f}K active, by the law")
            axes.plot([6 * N * float(row["tokens"]) for row in some], [float(row["loss"]) for row in some], "o",
                      color=f"C{i}", ms=4, label="measured, three seeds")
        axes.set(xscale="log", xlabel="training FLOPs, 6 N D", title=f"{float(own[0]['n_total']) / 1e3:.0f}K in all")
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("validation loss, nats a byte")
    save(figure, path)


def save(figure, path: Path) -> None:
    for axes in figure.axes:
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    laws, _ = scaling.chosen_law(HERE / "fit.json")
    draw_fit(laws, measured(), HERE / "fit.png")
    draw_isoflop(laws, HERE / "isoflop.png")
    draw_rates(json.loads((HERE / "rates.json").read_text()), HERE / "rates.png")
    draw_pair(laws, HERE / "pair.png")
    (HERE / "best.json").write_text(json.dumps(best(laws), indent=1) + "\n")
