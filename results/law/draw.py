"""The paper's Figures 1a, 1b, 2, 3, 5 and 6, redrawn from the joint law, bands are 90%; and real runs: clark_2022.

    python results/law/draw.py                           into this folder
    python results/law/draw.py out/law --law law.json    elsewhere, from a law of scaling.py fit

Each figure's data lie beside it as JSON. A drawing function takes the panels of its figure and
`laws` (1 + S, 11): row 0 is the law, the others are its replicas. It returns the data.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
from numpy import ndarray as Array

sys.path.insert(0, str(Path(__file__).parents[2]))
import scaling
from scaling import EXPERTS, Law, law_size, many, optimum

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap

LABEL = {E: "dense" if E == 1 else f"E = {E}" for E in EXPERTS.tolist()}
COLOURS = "#e6550d", "#74c476", "#31a08a", "#2b7bba", "#4a4fa3", "#3b0f56"    # dense stands out
COLOUR = dict(zip(LABEL, COLOURS))
STYLE = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "#e8e8e8", "grid.linewidth": 0.6, "lines.linewidth": 1.6,
    "legend.frameon": False, "legend.fontsize": 8, "savefig.dpi": 200,
    "figure.constrained_layout.use": True}


def ribbon(axes, x: Array, values: Array, E: int, label: str | None = None) -> dict:
    """The line of the law and the 90% band of its replicas, values (1 + S, G); returns both."""
    low, high = np.quantile(values[1:], [0.05, 0.95], axis=0)
    axes.fill_between(x, low, high, color=COLOUR[E], alpha=0.2, linewidth=0)
    axes.plot(x, values[0], color=COLOUR[E], label=label or LABEL[E])
    return {"line": values[0], "low": low, "high": high}


def figure_1a(panels: Array, laws: Array) -> dict:
    """The best number of experts for each memory and training budget; pale where under 90% of the replicas agree."""
    memory, flops = np.geomspace(5e8, 1e11, 100), np.geomspace(1e19, 1e24, 100)
    axes = panels[0]

    def best_of(theta):
        law = Law(*theta)
        return optimum(law, EXPERTS[:, None, None], flops, memory[:, None])[2].argmin(0)
    best = best_of(laws[0])
    agree = np.mean([best_of(theta) == best for theta in laws[1:101]], axis=0)
    axes.pcolormesh(flops, memory, best, cmap=ListedColormap(COLOURS), vmin=-0.5, vmax=5.5)
    axes.contourf(flops, memory, agree, levels=[-1, 0.9], colors=["white"], alpha=0.4)
    for i, E in enumerate(EXPERTS):
        where = np.argwhere(best == i)
        y, x = np.median(where, axis=0).astype(int) if len(where) else (0, 0)
        axes.text(flops[x], memory[y], E if E > 1 else "dense", color="white", ha="center",
                  fontweight="bold")
    axes.grid(False)
    axes.set(yscale="log", xlabel="training FLOPs (pale: under 90% of the replicas agree)",
             ylabel="memory for the weights (parameters)", title="The best number of experts")
    return {"flops": flops, "memory": memory, "best_E": EXPERTS[best], "agreement": agree}


def figure_1b(panels: Array, laws: Array) -> dict:
    """Three models of 1.1B parameters in all, as the same compute is spent on each."""
    flops = np.geomspace(3e19, 3e21, 80)
    axes = panels[0]
    models = {}
    for d, E in ((1664, 1), (1408, 2), (1152, 4)):
        N, total = law_size(d, d // 64), law_size(d, d // 64, E)
        name = f"{LABEL[E]}: {N / 1e9:.2f}B active of {total / 1e9:.2f}B"
        models[name] = ribbon(axes, flops, many(laws).loss(N, flops / (6 * N), E), E, name)
    axes.axvline(7.9e19, color="#888888", linewidth=0.8, linestyle=":")
    axes.set(ylabel="loss (nats per token)",
             title="Equal memory, equal compute (dotted: the paper's runs)")
    axes.legend()
    return {"flops": flops, "models": models}


def figure_2(panels: Array, laws: Array) -> dict:
    """Loss against active parameters at the three budgets of Table 1; dots are the optima of each number of experts."""
    N = np.geomspace(1e8, 3e10, 80)
    budgets = {}
    for axes, flops in zip(panels, (1e20, 5e20, 1e21)):
        lines = {E: ribbon(axes, N, many(laws).loss(N, flops / (6 * N), E), E) for E in LABEL}
        n, tokens, loss = optimum(Law(*laws[0]), EXPERTS, flops)
        axes.plot(n, loss, "o-", color="black", markersize=3.5, linewidth=0.9)
        axes.set(xlabel="active parameters", ylim=(loss.min() - 0.02, loss.max() + 0.16),
                 title=f"{flops:.0e} training FLOPs".replace("e+", "e"))
        budgets[f"{flops:.0e}"] = {
            "lines": lines, "optimum": {"n_active": n, "tokens": tokens, "loss": loss}}
    panels[0].set_ylabel("loss (nats per token)")
    panels[2].legend(ncol=2, loc="upper right")
    return {"n_active": N, "budgets": budgets}


def figure_3(panels: Array, laws: Array) -> dict:
    """The best number of experts as compute grows, at three memories: weights; with cache; with inference paid too."""
    flops = np.geomspace(1e19, 1e24, 121)
    lines = {}
    budgets = {"a  memory holds the weights": {},
               "b  weights and 32k tokens of cache": {"kv_tokens": 32768},
               "c  weights; 100B tokens inferred": {"inference_tokens": 1e11}}
    for axes, (title, extra) in zip(panels, budgets.items()):
        for memory, shade in ((2e9, "#9ecae1"), (5e9, "#4292c6"), (10e9, "#08306b")):
            loss = optimum(many(laws, 2), EXPERTS[:, None], flops, memory, **extra)[2]
            known = np.isfinite(loss[0]).any(0)                     # loss: (1 + S, E, G)
            x = flops[known]
            best, *replicas = EXPERTS[loss.argmin(1)][:, known]
            low, high = np.quantile(replicas, [0.05, 0.95], axis=0, method="nearest")
            axes.fill_between(x, low, high, color=shade, alpha=0.25, linewidth=0, step="mid")
            axes.step(x, best, where="mid", color=shade, label=f"{memory / 1e9:g}B parameters")
            lines[f"{title}, {memory:.0e}"] = {"flops": x, "best_E": best, "low": low, "high": high}
        axes.set_yscale("log", base=2)
        axes.set_yticks(EXPERTS, ["dense", *map(str, EXPERTS[1:])])
        axes.set(xlabel="FLOPs", title=title)
    panels[0].set_ylabel("best number of experts")
    panels[0].legend(loc="upper right")
    return lines


def figure_5(panels: Array, laws: Array) -> dict:
    """A fit on its own runs, predicted against observed. The paper's losses are unpublished: these are synthetic."""
    runs = scaling.paper_runs()
    runs = runs._replace(L=Law(*laws[0]).loss(*runs[:3]))
    runs = scaling.hold_out(scaling.with_noise(runs, 0, scaling.NOISE), "loss:30")
    predicted = scaling.fit(runs).law.loss(*runs[:3])
    held = runs.weight == 0
    top, low = panels
    for axes in panels:
        axes.set_xscale("linear")
    for E in LABEL:
        for marker, some in (("o", ~held), ("x", held)):
            pick = some & (runs.E == E)
            look = {"color": COLOUR[E], "marker": marker, "linewidths": 0.9}
            top.scatter(predicted[pick], runs.L[pick], 13,
                        label=LABEL[E] if marker == "o" else None, **look)
            low.scatter(predicted[pick], 1000 * (runs.L - predicted)[pick], 9, **look)
    top.axline((3, 3), slope=1, color="#888888", linewidth=0.8, zorder=0)
    low.axhline(0, color="#888888", linewidth=0.8, zorder=0)
    fitted, unseen = (scaling.rmse((predicted - runs.L)[some]) for some in (~held, held))
    top.set(xlabel="", ylabel="observed loss (synthetic)",
            title=f"RMSE {fitted:.4f} fitted (o), {unseen:.4f} held out (x)")
    low.set(xlabel="predicted loss (nats per token)", ylabel="residual (millinats)")
    top.legend(ncol=2)
    return runs._asdict() | {"predicted": predicted}


def figure_6(panels: Array, laws: Array) -> dict:
    """Tokens per active parameter at the compute optimum: more experts want more tokens, until the law turns over."""
    flops = np.geomspace(1e18, 1e25, 80)
    axes = panels[0]
    lines = {}
    for E in LABEL:
        N = scaling.unconstrained(many(laws), E, flops)
        lines[E] = ribbon(axes, flops, flops / (6 * N**2), E)
    axes.axhline(1, color="#888888", linewidth=0.8)
    axes.text(1.3e18, 1.08, "as many tokens as parameters", fontsize=7.5, color="#555555")
    axes.set(yscale="log", ylabel="D / N at the optimum", title="Tokens per active parameter")
    axes.legend(ncol=2)
    return {"flops": flops, "lines": lines}


def clark_2022(panels: Array, laws: Array) -> dict:
    """Final losses of Clark et al. 2022 against E at each size (points), the joint form without its term in D fitted to
    all but the largest size (lines), and that size predicted (crosses: held out; dotted: Clark's own form)."""
    routers = {}
    for axes, (router, name) in zip(panels, CLARK.items()):
        rows = scaling.read_table(Path(__file__).parent / f"{name}.csv")
        runs = scaling.hold_out(scaling.runs_of(rows), "column:largest", rows)
        held = runs.weight == 0
        E = np.geomspace(1, 512, 60)
        data = runs._asdict()
        for form in ("joint", "clark"):
            parts, _ = scaling.fit_form(runs, form, {})
            predicted = scaling.predict(parts, runs)
            data[form] = {"law": parts[0][1].law._asdict(), "predicted": predicted,
                          "rmse_holdout": scaling.rmse((predicted - runs.L)[held])}
        joint, clark = (Law(**data[form]["law"]) for form in ("joint", "clark"))
        for N, colour in zip(np.unique(runs.N), COLOURS):
            some = runs.N == N
            axes.plot(E, joint.loss(N, runs.D[0], E), color=colour)
            axes.plot(runs.E[some], runs.L[some], "x" if held[some].any() else "o", color=colour,
                      markersize=4, label=f"{N / 1e6:,.0f}M")
        axes.plot(E, clark.loss(N, runs.D[0], E), ":", color=colour)        # of the last size, the one held out
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 8, 64, 512], ["dense", "8", "64", "512"])
        errors = [data[form]["rmse_holdout"] for form in ("joint", "clark")]
        axes.set(xlabel="experts", title="{}: held out {:.3f} nats (dotted {:.3f})".format(router, *errors))
        routers[router] = data
    panels[0].set_ylabel("validation loss (nats per token)")
    panels[0].legend(ncol=3, loc="upper right", fontsize=7)
    return routers


CLARK = {"S-Base": "clark_2022", "RL-R": "clark_2022_rl_r", "Hash": "clark_2022_hash"}
FIGURES = {                          # drawing function: rows and columns of panels, size in inches
    figure_1a: (1, 1, (5.2, 3.9)), figure_1b: (1, 1, (4.8, 3.5)), figure_2: (1, 3, (9.6, 3.3)),
    figure_3: (1, 3, (9.6, 3.2)), figure_5: (2, 1, (4.6, 4.8)), figure_6: (1, 1, (4.8, 3.5)),
    clark_2022: (1, 3, (10.8, 3.6))}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent)
    parser.add_argument("--law", metavar="FILE", help="a law that scaling.py fit --json wrote")
    args = parser.parse_args(argv)
    try:
        laws = scaling.chosen_law(args.law)[0][:201]
        with plt.rc_context(STYLE):
            for draw, (rows, columns, size) in FIGURES.items():
                figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False)
                for axes in panels.flat:
                    axes.set(xscale="log", xlabel="training FLOPs")      # what most of them show
                data = scaling.clean({"shows": draw.__doc__} | draw(panels.ravel(), laws), 6)
                path = args.folder / f"{draw.__name__}.png"
                scaling.write(path.with_suffix(".json"), json.dumps(data) + "\n")
                figure.savefig(path)
                plt.close(figure)
                print(path)
    except scaling.BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
