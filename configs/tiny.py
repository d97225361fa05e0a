# A mixture of experts that trains in about three minutes on two CPU cores, on Python's own standard library as bytes.
# configs/tiny_dense.py is its twin: the same active parameters, data and steps, and no experts.

n_layer = 4
d_model = 128
n_head = 4
n_kv_head = 2
d_head = 32
n_expert = 16
top_k = 2
d_expert = 128        # two experts of 128: the width of the twin's one feed-forward of 256
vocab_size = 264      # 256 bytes and end-of-text, padded to a multiple of 8
seq_len = 256

micro_batch = 16      # 4,096 tokens a step
max_steps = 600
learning_rate = 3e-3
schedule = "cosine"
warmup = 0.05

eval_interval = 50
eval_tokens = 65_536
log_interval = 20
