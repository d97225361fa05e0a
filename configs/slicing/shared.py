# Does a shared expert, which every token visits, help? At the same active size: it takes the place of routed ones.
#
# Source    "Slicing and Dicing" (Li 2026), finding 3: shared experts matter little. DeepSeekMoE (Dai 2024) has them.
# Here      four active experts' worth of width, of which 0, 1 or 2 are shared, the last also with a sigmoid gate
#           (Qwen2-MoE); total size equal up to one part in sixteen. Three seeds each.
# Run       python train.py configs/slicing/shared.py --parallel=2          (--scale=8 --parallel on GPUs)
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

d_expert = 32 * scale
runs = [
    dict(name="routed-4", n_expert=32, top_k=4),
    dict(name="shared-1", n_expert=31, top_k=3, d_shared=32 * scale),
    dict(name="shared-2", n_expert=30, top_k=2, d_shared=64 * scale),
    dict(name="shared-2-gated", n_expert=30, top_k=2, d_shared=64 * scale, shared_gate=True),
]
