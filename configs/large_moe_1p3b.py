# The configuration that the architecture search recommends (Thakkar 2026: large-moe-1.3b, phase 1's best of five).
#
# Sizes    1,083M parameters, 781M of them active for a token, with tied embeddings (untied: 1,394M and 1,092M).
#          `python train.py configs/large_moe_1p3b.py --dry_run` prints them, with FLOPs and memory.
# Memory   weights, gradients and AdamW's moments are 16 bytes a parameter: 16.1 GiB; activations and the pieces of the
#          logits come on top. The source reports 35 GB for this cell on an A100; --dry_run prints our estimate.
#          On a card with room take --micro_batch=4 or more (35 GiB at 8): a micro-batch moves some 35 GB of weights and
#          gradients whatever its size, a fifth of the time that 1 x 2048 is predicted to take on an H200.
# Data     as it stands it runs with no download, on Python's standard library as bytes: right to see it run, wrong to
#          judge it, since 257 of 151,936 vocabulary rows are used. For the real thing give it Qwen's ranks file
#          (qwen.tiktoken, 151,643 lines, published beside the Qwen models) and a corpus:
#              python train.py configs/large_moe_1p3b.py --tokenizer=qwen.tiktoken --dataset='corpus/*.jsonl.gz'
# Time     2,000 steps of 8,192 tokens are 8.3e16 FLOPs: days on two CPU cores (175 GFLOP/s there in matrix products).

n_layer = 8
d_model = 2048
n_head = 32
n_kv_head = 8
d_head = 128
n_expert = 16
top_k = 8
d_expert = 768
vocab_size = 151_936      # Qwen3's tokenizer, padded
seq_len = 2048
rope_base = 1e6
tie_embeddings = True

# The source recommends batch 1, context 2048, learning rate 1e-4, accumulation 4; the rest is its training setup.
micro_batch = 1
batch_tokens = 4 * 2048
learning_rate = 1e-4
schedule = "cosine"
warmup = 0.1
max_steps = 2000
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
eval_interval = 500
eval_tokens = 65_536
log_interval = 10
checkpoint_interval = 500
