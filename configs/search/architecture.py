# Phase 1 of the architecture search (Thakkar 2026): which of five shapes of 1 to 1.7B parameters learns best?
#
# Sizes    with tied embeddings total and active: 1b 1,003M and 399M, 1.3b 1,083M and 781M, 1.3b-top2 1,083M and 555M,
#          deep 1,687M and 781M, wide 1,423M and 668M. `python train.py configs/search/architecture.py --dry_run` counts
#          them, with FLOPs and memory. The source gives the totals and active counts; where it does not give the shape
#          itself, this is the shape that has both. (Its own heading "active" of another table, 386M to 640M, is a
#          third of the untied totals.)
# Source   loss after 2,000 steps: 1.3b 1.150, wide 1.683, 1.3b-top2 1.746, deep 1.935, 1b 1.950.
# Equal    tokens and steps, not FLOPs: top-8 and top-2 of 1.3b have the same total, and 781M against 555M active.
#          small/architecture.py reads it at equal FLOPs, too.
# Rate     the source does not say which learning rate phase 1 used: this is the one it recommends in the end.
# Data     on Python's library as bytes it runs with no download; see configs/large_moe_1p3b.py for the real thing.

vocab_size = 151_936      # Qwen3's tokenizer, padded
seq_len = 1024
rope_base = 1e6
tie_embeddings = True

micro_batch = 4
max_steps = 2000
learning_rate = 1e-4
schedule = "cosine"
warmup = 0.1
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
eval_interval = 500
eval_tokens = 65_536
checkpoint_interval = 500

runs = [
    dict(name="large-moe-1b", n_layer=16, d_model=1024, n_head=16, n_kv_head=4, d_head=64,
         n_expert=8, top_k=2, d_expert=2048),
    dict(name="large-moe-1.3b", n_layer=8, d_model=2048, n_head=32, n_kv_head=8, d_head=128,
         n_expert=16, top_k=8, d_expert=768),
    dict(name="large-moe-1.3b-top2", n_layer=8, d_model=2048, n_head=32, n_kv_head=8, d_head=128,
         n_expert=16, top_k=2, d_expert=768),
    dict(name="large-deep-1.5b", n_layer=16, d_model=1536, n_head=24, n_kv_head=6, d_head=64,
         n_expert=12, top_k=4, d_expert=1536),
    dict(name="large-wide-1.5b", n_layer=10, d_model=2048, n_head=32, n_kv_head=8, d_head=64,
         n_expert=8, top_k=2, d_expert=2048),
]
