# Phase 3 of the architecture search (Thakkar 2026) in small: 13 cells of batch and context, read twice, two seeds.
# configs/search/batch_context.py is the search at full size. 25 minutes on two busy CPU cores with --parallel=2.
#
# Scaled   as in architecture.py beside this file: contexts by 1/16, batches as they are.
# Equal    the source gives each cell equal steps, so that the largest sees 16 times the tokens of the smallest. The
#          second group accumulates each to 1,024 tokens a step: equal tokens, steps and learning rate; only how they
#          are cut differs.
# Loss     each cell is evaluated at its own context, as the source does: a longer one has more to predict from.

n_layer = 4
d_model = 128
n_head = 8
n_kv_head = 2
d_head = 32
n_expert = 16
top_k = 8
d_expert = 48
vocab_size = 264
tie_embeddings = True

learning_rate = 1e-3
schedule = "cosine"
warmup = 0.1
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
eval_interval = 1000
eval_tokens = 32_768
log_interval = 50
checkpoint_interval = 1000

out_dir = "out/small_batch_context"
seeds = [1, 2]

_cells = [(1, 64), (1, 128), (1, 256), (1, 512), (2, 64), (2, 128), (2, 256), (2, 512), (4, 64), (4, 128), (4, 256),
          (8, 64), (8, 128)]
runs = [dict(name=f"bs{batch}ctx{context}", group="equal steps", micro_batch=batch, seq_len=context, max_steps=300)
        for batch, context in _cells]
runs += [dict(name=f"bs{batch}ctx{context}-tokens", group="equal tokens", micro_batch=batch, seq_len=context,
              max_steps=120, batch_tokens=1024) for batch, context in _cells]
