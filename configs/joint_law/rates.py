# Which peak rate does a size want, and do more experts want a lower one? A grid that sets the rates of small.py.
#
# Source    "Joint MoE Scaling Laws" (Ludziejewski 2025), eq. 7: ln lr = a + b ln N + c ln E, N active parameters
#           without embeddings. Its own 8.39, -0.81 and -0.25 are of models a thousand times as large.
# Here      six rates (a seventh where the lowest was best) for 1 and 16 experts at two sizes, and for 4 experts at a
#           size between them, which the fit does not see. The recipe is small.py's.
# Run       python train.py configs/joint_law/rates.py --parallel=2, then python results/joint_law/rates.py
# Scale     409,600 bytes of Python source a run, 12.7M in all.

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

micro_batch = 8           # 2,048 tokens a step
max_tokens = 409_600
max_steps = 1_000_000
schedule = "constant"
warmup = 65_536
decay = 0.2
beta2 = 0.999
grad_clip = 0.1
eval_interval = 1_000_000
eval_tokens = 262_144
log_interval = 50
checkpoint_interval = 1_000_000

along = "learning_rate"
runs = [dict(name=f"e{E}-d{d}-lr{rate}", group=f"E {E}, d_model {d}", n_expert=E, d_model=d, d_expert=3 * d,
             n_layer=d // 16, n_head=d // 16, n_kv_head=d // 16, learning_rate=rate)
        for E, d in ((1, 32), (16, 32), (4, 48), (1, 64), (16, 64))
        for rate in [0.000625] * (d == 64 and E == 16) + [0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04]]
