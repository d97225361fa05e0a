# The twin of configs/tiny.py without experts: the same active parameters, data, steps and learning rate.

n_layer = 4
d_model = 128
n_head = 4
n_kv_head = 2
d_head = 32
n_expert = 1          # a dense feed-forward: no router
top_k = 1
d_expert = 256        # as wide as the two experts of 128 that a token visits in the twin
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
