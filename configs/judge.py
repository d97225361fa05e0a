# Is an idea worth its compute? The ladder that `python train.py judge configs/judge.py --router=my_idea` climbs twice.
#
# Here      the baseline at three budgets, each twice the one before, six seeds each. The idea is the same 18 runs with
#           the flags given: its runs have the baseline's weights, where shapes agree, and its batches.
# Run       python train.py judge configs/judge.py --router=hash --parallel=2     (the baseline alone: without `judge`)
# Power     what it can tell apart, and its verdicts on the policies of router.py: results/judge/README.md

n_layer = 2
d_model = 64
n_head = 4
n_kv_head = 2
d_head = 16
n_expert = 16
top_k = 2
d_expert = 64
vocab_size = 264      # 256 bytes and end-of-text, padded to a multiple of 8
seq_len = 128

micro_batch = 16      # 2,048 tokens a step
learning_rate = 4e-3
warmup = 0.05
eval_interval = 400
eval_tokens = 65_536
log_interval = 20
checkpoint_interval = 400

seeds = [1, 2, 3, 4, 5, 6]
along = "max_steps"
baseline = "softmax"
runs = [dict(name=f"softmax-{steps}", group="softmax", max_steps=steps) for steps in (100, 200, 400)]
