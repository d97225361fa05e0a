# How should the load be balanced, and how hard? Mechanism by strength, everything else the same.
#
# Source    "Slicing and Dicing" (Li 2026), finding 3: mechanism and strength matter little to the loss (they matter to
#           speed where experts sit on different GPUs). Its runs have balance loss 0.01 and z-loss 0.001.
# Here      no balancing; the Switch loss at two strengths; the same counted over each sequence and over the whole
#           batch of two micro-batches; a selection bias without a loss (DeepSeek-V3), and its sigmoid router alone.
#           Three seeds each.
# Run       python train.py configs/slicing/balancing.py --parallel=2          (--scale=8 --parallel on GPUs)
# Scale     307,200 tokens of Python source a run; `scale`, 1 unless given, widens and lengthens.

n_layer = 3
d_model = 64 * scale
n_head = 4 * scale
n_kv_head = 2 * scale
d_head = 16
vocab_size = 264
seq_len = 128

micro_batch = 8 * scale
batch_tokens = 2 * 8 * scale * 128     # two micro-batches, 2,048 tokens a step
max_steps = 150 * scale
learning_rate = 4e-3 / scale
warmup = 0.05
eval_interval = 150 * scale
eval_tokens = 131_072
log_interval = 100
checkpoint_interval = 150 * scale
seeds = [1, 2, 3]

n_expert = 32
top_k = 4
d_expert = 32 * scale
z_coef = 0.001
runs = [
    dict(name="none", aux_coef=0.0),
    dict(name="loss-0.01", aux_coef=0.01),
    dict(name="loss-0.1", aux_coef=0.1),
    dict(name="sequence-0.01", aux_coef=0.01, balance_scope="sequence"),
    dict(name="global-0.01", aux_coef=0.01, balance_scope="global"),
    dict(name="bias-0.001", aux_coef=0.0, router="sigmoid", bias_rate=0.001),
    dict(name="sigmoid-none", aux_coef=0.0, router="sigmoid"),
]
