# Do experts of different widths in one layer help? At the same total and the same mean active size.
#
# Source    "Slicing and Dicing" (Li 2026), finding 3: heterogeneous widths matter little. Its example mixes 16 experts
#           of 1/4 with 32 of 1/8 of the model's width.
# Here      1,024 hidden units in a layer, four experts of 32 on average a token, mixed in three ways; three seeds each.
#           Routing is free to favour the wide ones: the active size is a mean over an even load.
# Run       python train.py configs/slicing/heterogeneous.py --parallel=2          (--scale=8 --parallel on GPUs)
# Scale     307,200 tokens of Python source a run; `scale`, 1 unless given, widens and lengthens.

n_layer = 3
d_model = 64 * scale
n_head = 4 * scale
n_kv_head = 2 * scale
d_head = 16
vocab_size = 264
seq_len = 128

micro_batch = 16 * scale    # 2,048 tokens a step
max_steps = 150 * scale
learning_rate = 4e-3 / scale
warmup = 0.05
eval_interval = 150 * scale
eval_tokens = 131_072
log_interval = 100
checkpoint_interval = 150 * scale
seeds = [1, 2, 3]

top_k = 4
runs = [
    dict(name="32x32", n_expert=32, d_expert=32 * scale),
    dict(name="16x48+16x16", expert_groups=[(16, 48 * scale), (16, 16 * scale)]),
    dict(name="8x64+8x32+16x16", expert_groups=[(8, 64 * scale), (8, 32 * scale), (16, 16 * scale)]),
    dict(name="4x144+28x16", expert_groups=[(4, 144 * scale), (28, 16 * scale)]),
]
