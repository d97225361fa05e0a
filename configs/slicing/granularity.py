# How wide should one expert be? Width against number, at the same active and the same total size, for three sizes.
#
# Source    "Slicing and Dicing" (Li 2026), finding 2: the best width depends on the active size, hardly on the total.
# Here      a token passes 2 D hidden units in a layer, as 1, 2, 4, 8 or 16 experts of 2 D ... D / 8, of eight times as
#           many; D = 32, 64, 96; two seeds each.
# Run       python train.py configs/slicing/granularity.py --parallel=2          (--scale=8 --parallel on GPUs)
# Scale     512,000 tokens of Python source a run; `scale`, 1 unless given, widens and lengthens.

n_layer = 3
d_model = 64 * scale
n_head = 4 * scale
n_kv_head = 2 * scale
d_head = 16
vocab_size = 264
seq_len = 128

micro_batch = 16 * scale    # 2,048 tokens a step
max_steps = 250 * scale
learning_rate = 4e-3 / scale
warmup = 0.05
eval_interval = 250 * scale
eval_tokens = 131_072
log_interval = 100
checkpoint_interval = 250 * scale
seeds = [1, 2]
along = "d_expert"

_active = {32: (1, 2, 4, 8, 16), 64: (1, 2, 4, 8, 16), 96: (1, 2, 4, 8)}
runs = [dict(name=f"d{d}-top{k}", group=f"d_model {d * scale}", d_model=d * scale, n_head=d * scale // 16,
             n_kv_head=d * scale // 32, d_expert=2 * d * scale // k, top_k=k, n_expert=8 * k)
        for d, top_ks in _active.items() for k in top_ks]
