# Phase 3 of the architecture search (Thakkar 2026): 13 cells of batch size and context for large-moe-1.3b, read twice.
#
# Equal    the source gives each cell 2,000 steps, so that the largest sees 16 times the tokens of the smallest: group
#          "equal steps". Group "equal tokens" accumulates every cell to the largest one's 16,384 tokens a step, for 500
#          steps: the same tokens, steps and learning rate, only cut differently.
# Loss     each cell is evaluated at its own context, as the source does: a longer one has more to predict from.
# Source   on 40 GB five cells ran: bs1ctx2048 0.317, bs2ctx1024 0.529, bs2ctx2048 1.284, bs4ctx1024 1.335, bs1ctx1024
#          3.002; eight ran out of memory. It recommends bs1ctx2048 with accumulation 4. (A model of this size cannot
#          reach 0.3 nats on text it has not seen in 4M tokens, so take the order as a hypothesis.)

n_layer = 8
d_model = 2048
n_head = 32
n_kv_head = 8
d_head = 128
n_expert = 16
top_k = 8
d_expert = 768
vocab_size = 151_936      # Qwen3's tokenizer, padded
rope_base = 1e6
tie_embeddings = True

learning_rate = 1e-4
schedule = "cosine"
warmup = 0.1
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
eval_interval = 500
eval_tokens = 65_536
checkpoint_interval = 500

_cells = [(1, 1024), (1, 2048), (1, 4096), (1, 8192), (2, 1024), (2, 2048), (2, 4096), (2, 8192), (4, 1024), (4, 2048),
          (4, 4096), (8, 1024), (8, 2048)]
runs = [dict(name=f"bs{batch}ctx{context}", group="equal steps", micro_batch=batch, seq_len=context, max_steps=2000)
        for batch, context in _cells]
runs += [dict(name=f"bs{batch}ctx{context}-tokens", group="equal tokens", micro_batch=batch, seq_len=context,
              max_steps=500, batch_tokens=16_384) for batch, context in _cells]
