# The joint law's recipe in about an hour of one GPU: the ladder of small.py with larger models and more tokens.
#
# Source    "Joint MoE Scaling Laws" (Ludziejewski 2025); see paper.py, whose recipe this is, shortened a thousandfold.
# Here      1, 4 and 16 experts at four sizes, 2 and 8 at two; five token counts each as branches of one trunk. Blocks =
#           heads = d / 32. The rate is extrapolated from results/joint_law/rates.json.
# Run       python train.py configs/joint_law/gpu.py --tokenizer=gpt2 --dataset='corpus/*.parquet', then
#           python results/joint_law/collect.py out/gpu --table results/joint_law/gpu_runs.csv
#           Never run. The hour is a guess: 1.9e17 FLOPs with each trunk paid once, at 5% of an H100's bfloat16 peak.
# Data      as it stands it runs with no download, on bytes: to see it run. GPT-2 tokens of a large text need the flags.

import json
import math
from pathlib import Path

_rates = Path(__file__).parents[2] / "results" / "joint_law" / "rates.json"
_a, _b, _c = json.loads(_rates.read_text())["with_experts"]["coefficients"]

vocab_size = 50_304       # GPT-2's 50,257, padded to a multiple of 64
seq_len = 512
d_head = 32
top_k = 1
router = "switch"
capacity_factor = 1.0
aux_coef = 0.01
z_coef = 0.001
init_scale = 0.1
tie_embeddings = False
qk_norm = False
rope_base = 1e4

micro_batch = 32
batch_tokens = [[0, 16_384], [8_388_608, 32_768], [33_554_432, 65_536]]
max_steps = 1_000_000
schedule = "constant"
warmup = 1_048_576
decay = 0.2
beta2 = 0.999
grad_clip = 0.1
eval_interval = 1_000_000
eval_tokens = 1_048_576
log_interval = 50
checkpoint_interval = 500


def _run(E: int, d: int) -> dict:
    n = d // 32                                   # blocks and heads
    rate = math.exp(_a + _b * math.log(13 * n * d**2) + _c * math.log(E))
    return dict(name=f"e{E}-d{d}", group=f"E {E}", n_expert=E, d_model=d, d_expert=3 * d, n_layer=n, n_head=n,
                n_kv_head=n, learning_rate=rate, branches=[5_242_880 * 2**i for i in range(5)])


runs = [_run(E, d) for d in (128, 192, 256, 384) for E in (1, 2, 4, 8, 16) if d in (128, 256) or E in (1, 4, 16)]
