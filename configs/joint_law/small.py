# The joint law's recipe on two cores: a ladder of sizes, tokens and experts, to fit a law to.
#
# Source    "Joint MoE Scaling Laws" (Ludziejewski 2025): Switch top-1 with capacity 1 in training, dropless evaluation,
#           initialisation of scale 0.1, a batch that grows, a constant rate with branches; see paper.py.
# Here      1, 4 and 16 experts at four sizes, 2 and 8 at two; five token counts each as branches of one trunk, six at
#           the two smallest sizes; three points with two more seeds. Rates by results/joint_law/rates.json, the fit of
#           rates.py's grid.
# Run       python train.py configs/joint_law/small.py --parallel=2, then python results/joint_law/collect.py
#           A branch whose row stands in results/joint_law/runs.csv is left out; LADDER=all in the environment: none is.
# Scale     bytes of Python source, 91M in all with each trunk paid once; no run sees a byte twice.

import csv
import json
import math
import os
from pathlib import Path

_results = Path(__file__).parents[2] / "results" / "joint_law"
_a, _b, _c = json.loads((_results / "rates.json").read_text())["with_experts"]["coefficients"]
_kept = set()
if (_results / "runs.csv").is_file() and os.environ.get("LADDER") != "all":
    _kept = {row["name"] for row in csv.DictReader((_results / "runs.csv").read_text().splitlines())}

vocab_size = 264          # 256 bytes and end-of-text, padded to a multiple of 8
seq_len = 256
d_head = 16
top_k = 1
router = "switch"
capacity_factor = 1.0
aux_coef = 0.01
z_coef = 0.001
init_scale = 0.1
tie_embeddings = False
qk_norm = False
rope_base = 1e4

micro_batch = 8
batch_tokens = [[0, 2048], [524_288, 4096], [2_097_152, 8192]]
max_steps = 1_000_000
schedule = "constant"
warmup = 65_536
decay = 0.2
beta2 = 0.999
grad_clip = 0.1
eval_interval = 1_000_000
eval_tokens = 262_144
log_interval = 50
checkpoint_interval = 100


def _wanted(name: str) -> bool:
    """Is this branch still to be run, or is its trunk at hand for the next one?"""
    return name not in _kept or Path("out", "small", name, "trunk.pt").is_file()


def _run(E: int, d: int, ends: list[int], seed: int = 1) -> dict:
    n = d // 16                                   # blocks and heads
    rate = math.exp(_a + _b * math.log(13 * n * d**2) + _c * math.log(E))
    name = f"e{E}-d{d}" + (f"-s{seed}" if seed > 1 else "")
    return dict(name=name, group=f"E {E}", n_expert=E, d_model=d, d_expert=3 * d, n_layer=n, n_head=n, n_kv_head=n,
                learning_rate=rate, seed=seed, branches=[end for end in ends if _wanted(f"{name}-{end}")])


_ends = [204_800 * 2**i for i in range(6)]
_sizes = {16: (1, 4, 16), 32: (1, 2, 4, 8, 16), 48: (1, 4, 16), 64: (1, 2, 4, 8, 16)}
runs = [_run(E, d, _ends[:6 if d < 48 and E in (1, 4, 16) else 5]) for d, experts in _sizes.items() for E in experts]
runs += [_run(E, d, [819_200], seed) for E, d in ((1, 32), (4, 48), (16, 64)) for seed in (2, 3)]
runs = [run for run in runs if run["branches"]]
if not runs:
    raise SystemExit(f"every run of the ladder stands in {_results}/runs.csv; LADDER=all runs it again")
