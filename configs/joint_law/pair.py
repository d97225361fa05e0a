# A prediction kept: two pairs of a dense model and one with experts, of equal memory and equal training FLOPs.
#
# Source    "Joint MoE Scaling Laws" (Ludziejewski 2025), Fig. 1b, at our scale. results/joint_law/prediction.json holds
#           what the law fitted to small.py's runs said of them, and was committed before they were run.
# Here      memory: parameters in all, embeddings included, within 6%; FLOPs: 6 N D, N active. "wins": 4 experts of
#           d_model 48 against a dense 64 of 5 blocks. "loses": 16 experts of d_model 16, whose active model is too
#           small to use its tokens, against a dense 32. The recipe is small.py's; three seeds new to the ladder.
# Run       python train.py configs/joint_law/pair.py --parallel=2, then python results/joint_law/predict.py --outcome
# Scale     bytes of Python source, 33M in all.

import json
import math
from pathlib import Path

_rates = Path(__file__).parents[2] / "results" / "joint_law" / "rates.json"
_a, _b, _c = json.loads(_rates.read_text())["with_experts"]["coefficients"]

vocab_size = 264
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

seeds = [4, 5, 6]


def _active(d: int, n: int) -> int:
    return 2 * d * vocab_size + 13 * n * d**2


def _pair(name: str, dense: tuple[int, int], experts: tuple[int, int], E: int, tokens: int) -> list[dict]:
    """The dense model to so many tokens, and the one with experts to as many FLOPs; each is (d_model, blocks)."""
    flops = _active(*dense) * tokens
    return [dict(name=f"{name}-{kind}", group=name, n_expert=E, d_model=d, d_expert=3 * d, n_layer=n, n_head=d // 16,
                 n_kv_head=d // 16, max_tokens=round(flops / _active(d, n)),
                 learning_rate=math.exp(_a + _b * math.log(13 * n * d**2) + _c * math.log(E)))
            for kind, (d, n), E in (("dense", dense, 1), (f"e{E}", experts, E))]


runs = _pair("wins", (64, 5), (48, 3), 4, 1_000_000) + _pair("loses", (32, 2), (16, 1), 16, 1_600_000)
