# Phase 2 of the architecture search (Thakkar 2026) in small: nine learning rates on phase 1's best shape, two seeds.
# configs/search/learning_rate.py is the search at full size. 11 minutes on two busy CPU cores with --parallel=2.
#
# Scaled   as in architecture.py beside this file; the rates are those of the full size times 10, as the model is a
#          sixteenth as wide.

n_layer = 4
d_model = 128
n_head = 8
n_kv_head = 2
d_head = 32
n_expert = 16
top_k = 8
d_expert = 48
vocab_size = 264
seq_len = 64
tie_embeddings = True

micro_batch = 4
max_steps = 500
schedule = "cosine"
warmup = 0.1
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
eval_interval = 500
eval_tokens = 32_768
log_interval = 50
checkpoint_interval = 500

out_dir = "out/small_learning_rate"
seeds = [1, 2]
along = "learning_rate"
runs = [dict(name=f"lr{rate}", learning_rate=float(rate))
        for rate in "5e-5 1e-4 2e-4 3e-4 5e-4 1e-3 3e-3 5e-3 1e-2".split()]
