# The joint law's own runs: 270 of 51 models by one recipe, each model's constant rate paid once.
#
# Source    "Joint MoE Scaling Laws" (Ludziejewski 2025), Appendix H: the list in results/law/runs.csv. Its text gives
#           Switch top-1, losses, initialisation, ramp, warmup, decay and eq. 7; its authors' public configs capacity 1,
#           context 512, AdamW's betas, weight decay and clip. No normalised queries and keys, a rotary base of 10,000
#           and the micro-batch are ours.
# Here      blocks = heads = d / 64, but for the eight models that the list says break it; the vocabulary is GPT-2's,
#           50,257, not padded, so that sizes are the paper's. `learning_rate = "joint_law"` is eq. 7 by the text,
#           "joint_law_code" by the authors' code; they differ 2.4-fold at d = 512.
# Run       python train.py configs/joint_law/paper.py --tokenizer=gpt2 --dataset='fineweb-edu/*.parquet' --parallel
#           Never run here: --dry_run (--json) says what it costs, with each trunk paid once and without.
# Data      as it stands it runs with no download, on bytes: to see it run. The paper's text and tokens need the flags.

import csv
from pathlib import Path

vocab_size = 50_257
seq_len = 512
router = "switch"
top_k = 1
capacity_factor = 1.0
aux_coef = 0.01
z_coef = 0.001
init_scale = 0.1
tie_embeddings = False
qk_norm = False
rope_base = 1e4

micro_batch = 16
batch_tokens = [[0, 65_536], [500_000_000, 131_072], [1_000_000_000, 262_144]]
max_steps = 1_000_000
learning_rate = "joint_law"
schedule = "constant"
warmup = 130_000_000
decay = 0.2
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.999
grad_clip = 0.1
eval_interval = 1_000_000
eval_tokens = 2_097_152
log_interval = 50
checkpoint_interval = 1000

_list = Path(__file__).parents[2] / "results" / "law" / "runs.csv"
_ends = {}
for _row in csv.DictReader(_list.read_text().splitlines()):
    _shape = tuple(int(_row[name]) for name in ("n_expert", "d_model", "n_layer", "n_head"))
    _ends.setdefault(_shape, []).append(round(float(_row["tokens"])))
runs = [dict(name=f"e{E}-d{d}-l{n}", group=f"E {E}", n_expert=E, d_model=d, d_expert=3 * d, n_layer=n, n_head=heads,
             n_kv_head=heads, d_head=d // heads, branches=sorted(ends)) for (E, d, n, heads), ends in _ends.items()]
