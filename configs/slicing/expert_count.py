# Does loss fall with the number of experts, at the same active size, up to 128 times as many as a token visits?
#
# Source    "Slicing and Dicing" (Li 2026), finding 1: yes, at every active size, to total / active = 128.
# Here      top-4 of 4 ... 512 experts of a quarter of the feed-forward, 2 D wide, at two active sizes; three seeds.
#           The larger takes four of the eight numbers.
# Run       python train.py configs/slicing/expert_count.py --parallel=2          (--scale=8 --parallel on GPUs)
# Scale     819,200 tokens of Python source a run, 40,000 and 130,000 active parameters: the source's smallest has 10M.
#           What holds here is a hint. `scale`, 1 unless given, widens and lengthens.

n_layer = 3
d_model = 64 * scale
n_head = 4 * scale
n_kv_head = 2 * scale
d_head = 16
vocab_size = 264
seq_len = 128

micro_batch = 16 * scale    # 2,048 tokens a step
max_steps = 400 * scale
learning_rate = 4e-3 / scale
warmup = 0.05
eval_interval = 400 * scale
eval_tokens = 131_072
log_interval = 100
checkpoint_interval = 400 * scale
seeds = [1, 2, 3]
along = "n_expert"

top_k = 4
_ratios = {32: (1, 2, 4, 8, 16, 32, 64, 128), 64: (1, 4, 16, 128)}
runs = [dict(name=f"d{d}-ratio{ratio}", group=f"d_model {d * scale}", d_model=d * scale, n_head=d * scale // 16,
             n_kv_head=d * scale // 32, d_expert=d * scale // 2, n_expert=4 * ratio)
        for d, ratios in _ratios.items() for ratio in ratios]
