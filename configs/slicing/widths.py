# How wide should one expert be: does the best width move with the total size, or with the active size?
#
# Source    "Slicing and Dicing" (Li 2026), finding 2: the best width depends on the active size, hardly on the total.
#           granularity.py varies both at once; here the other one is held.
# Here      hidden units of a layer, of one d_model. Active 128 of a total of 512 and of 2,048; active 64 and 256 of a
#           total of 2,048; widths of which a token visits 16, 8, 4 and 2; three seeds. Each active size has its own
#           rate, the bottom of a parabola through the best three of width_rates.py.
# Run       python train.py configs/slicing/widths.py --parallel=2, then python results/slicing/widths.py
# Scale     716,800 tokens of Python source a run (32M in all); `scale`, 1 unless given, widens and lengthens.

n_layer = 3
d_model = 64 * scale
n_head = 4 * scale
n_kv_head = 2 * scale
d_head = 16
vocab_size = 264
seq_len = 128

micro_batch = 16 * scale    # 2,048 tokens a step
max_steps = 350 * scale
warmup = 0.05
eval_interval = 1_000_000
eval_tokens = 262_144
log_interval = 100
checkpoint_interval = 175 * scale
seeds = [1, 2, 3]
along = "d_expert"

_rates = {64: 8.9e-3, 128: 1.17e-2, 256: 1.07e-2}      # by active hidden units
runs = [dict(name=f"a{active}-t{total}-w{width}", group=f"active {active}, total {total}", top_k=active // width,
             n_expert=total // width, d_expert=width * scale, learning_rate=_rates[active] / scale)
        for active, total, widths in ((128, 512, (8, 16, 32, 64)), (128, 2048, (8, 16, 32, 64)),
                                      (64, 2048, (8, 16, 32)), (256, 2048, (16, 32, 64, 128)))
        for width in widths]
