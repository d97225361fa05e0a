# Phase 1 of the architecture search (Thakkar 2026) in small: five shapes, three seeds, on Python's library as bytes.
# configs/search/architecture.py is the search at full size. 17 minutes on two busy CPU cores with --parallel=2.
#
# Scaled   d_model, d_expert and the context of 1,024 by 1/16, n_layer by 1/2, steps by 1/4; vocabulary 264. Kept
#          are the ratios of depth and width, of heads * d_head and d_model, four query heads to a key head (so deep has
#          4 heads of 24, not 6 of 16), experts, top-k and batch. The source's recommended rate 1e-4 became 1e-3.
# Equal    one group sees equal tokens, as the source did: then the shapes differ in FLOPs by more than a factor 2. The
#          other gets equal FLOPs: 128,000 tokens for the cheapest, fewer for the rest.

n_head = 8
n_kv_head = 2
d_model = 128
vocab_size = 264
seq_len = 64
tie_embeddings = True

micro_batch = 4
max_steps = 500
learning_rate = 1e-3
schedule = "cosine"
warmup = 0.1
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
eval_interval = 500
eval_tokens = 32_768
log_interval = 50
checkpoint_interval = 500

out_dir = "out/small_architecture"
seeds = [1, 2, 3]

_shapes = {
    "1b": dict(n_layer=8, d_model=64, n_head=4, n_kv_head=1, d_head=16, n_expert=8, top_k=2, d_expert=128),
    "1.3b": dict(n_layer=4, d_head=32, n_expert=16, top_k=8, d_expert=48),
    "1.3b-top2": dict(n_layer=4, d_head=32, n_expert=16, top_k=2, d_expert=48),
    "deep-1.5b": dict(n_layer=8, d_model=96, n_head=4, n_kv_head=1, d_head=24, n_expert=12, top_k=4, d_expert=96),
    "wide-1.5b": dict(n_layer=5, d_head=16, n_expert=8, top_k=2, d_expert=128),
}
_tokens = {"1b": 128_000, "1.3b": 66_048, "1.3b-top2": 116_224, "deep-1.5b": 58_624, "wide-1.5b": 87_296}
runs = [dict(name=name, group="equal tokens", **shape) for name, shape in _shapes.items()]
runs += [dict(name=f"{name}-flops", group="equal FLOPs", max_tokens=_tokens[name], **shape)
         for name, shape in _shapes.items()]
