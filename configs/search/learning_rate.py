# Phase 2 of the architecture search (Thakkar 2026): nine learning rates for its best architecture, large-moe-1.3b.
#
# Rates    the source tried nine from 5e-6 to 1e-3 and names the lowest and 1e-4, 3e-4, 5e-4, 1e-3. The four between the
#          lowest and 1e-4 (1e-5, 2e-5, 3e-5, 5e-5) are ours, about evenly spaced in the logarithm.
# Source   recommends 1e-4.
# Equal    tokens, steps and FLOPs.

n_layer = 8
d_model = 2048
n_head = 32
n_kv_head = 8
d_head = 128
n_expert = 16
top_k = 8
d_expert = 768
vocab_size = 151_936      # Qwen3's tokenizer, padded
seq_len = 1024
rope_base = 1e6
tie_embeddings = True

micro_batch = 4
max_steps = 2000
schedule = "cosine"
warmup = 0.1
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
eval_interval = 500
eval_tokens = 65_536
checkpoint_interval = 500

along = "learning_rate"
runs = [dict(name=f"lr{rate}", learning_rate=float(rate))
        for rate in "5e-6 1e-5 2e-5 3e-5 5e-5 1e-4 3e-4 5e-4 1e-3".split()]
