# The largest model of "Joint MoE Scaling Laws" (2025), Appendix H: 321M active, 5.0B total, 32 experts, its recipe.
# For `python train.py configs/moe_5p0b.py --dry_run --world=64 --dtype=bfloat16`: see results/distributed.md.

n_layer, d_model, n_head, n_kv_head, d_head = 16, 1024, 16, 16, 64
n_expert, d_expert, router, top_k = 32, 3 * 1024, "switch", 1
capacity_factor, init_scale = 1.0, 0.1
vocab_size, tie_embeddings = 50_257, False
seq_len = 512

micro_batch = 1
batch_tokens = 512 * 512             # after its ramp
max_tokens, max_steps = 16e9, 10**6
schedule, warmup, decay = "constant", 130e6, 0.2
learning_rate = 8e-4                 # its formula, eq. 7, by the text
beta2, grad_clip = 0.999, 0.1
