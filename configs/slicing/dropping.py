# What does dropping tokens cost? An expert takes at most capacity_factor times an even share of rows in training.
#
# Source    "Slicing and Dicing" (Li 2026), finding 4: dropless is a consistent gain.
# Here      capacity 0.75 ... 2 in training, validation always dropless, so that the same loss is compared; three seeds.
#           Dropped rows are computed all the same here (the row count stays known): loss is studied, not time.
# Run       python train.py configs/slicing/dropping.py --parallel=2          (--scale=8 --parallel on GPUs)
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
seeds = [1, 2, 3]

n_expert = 32
top_k = 4
d_expert = 32 * scale
runs = [dict(name=f"capacity-{c}", capacity_factor=c) for c in (0.75, 1.0, 1.25, 1.5, 2.0)] + [dict(name="dropless")]
