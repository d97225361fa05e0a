# 6.6B total, 1.0B active: as large as the largest models of "Slicing and Dicing", in a shape of ours.
# For `python train.py configs/moe_6p6b.py --dry_run --world=64 --dtype=bfloat16`: see results/distributed.md.

n_layer, d_model, n_head, n_kv_head, d_head = 21, 1536, 12, 4, 128
n_expert, d_expert, top_k = 64, 1024, 8
vocab_size = 50_304
seq_len = 2048

micro_batch = 1
batch_tokens = 512 * 2048
max_tokens, max_steps = 100e9, 10**6
learning_rate = 4e-4
