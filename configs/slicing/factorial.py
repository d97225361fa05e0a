# Can the choices be made one at a time? Five of them, two levels each, in half of all 32 combinations.
#
# Source    "Slicing and Dicing" (Li 2026) varies one axis at a time; whether the axes act on each other is its own
#           question. The half fraction I = ABCDE tells main effects and two-way interactions apart (resolution V).
# Here      at 128 active hidden units a layer and equal tokens: A experts, 4 or 16 times as many as a token visits;
#           B their width, 32 or 16; C none shared or 32 hidden units of the 128; D balancing by the Switch loss of 0.01
#           or by a selection bias of 0.001; E a capacity of 1.25 in training, or dropless. A cell is named by the
#           choices at their second level. Validation is always dropless. The ladder is cell E at half, once and twice
#           the tokens: what equal loss costs. Three paired seeds.
# Run       python train.py configs/slicing/factorial.py --parallel=2, then python results/slicing/factorial.py
# Scale     1M tokens of Python source a run (55M in all); `scale`, 1 unless given, widens and lengthens.

from itertools import product

n_layer = 3
d_model = 64 * scale
n_head = 4 * scale
n_kv_head = 2 * scale
d_head = 16
vocab_size = 264
seq_len = 128

micro_batch = 16 * scale    # 2,048 tokens a step
max_steps = 488 * scale
learning_rate = 4e-3 / scale
warmup = 0.05
eval_interval = 1_000_000
eval_tokens = 262_144
log_interval = 100
checkpoint_interval = 244 * scale
seeds = [1, 2, 3]
baseline = "ladder"


def _cell(A: int, B: int, C: int, D: int, E: int) -> dict:
    """The fields of a cell; a level is 0 or 1."""
    top_k = 4 * (1 + B)
    shared = C * (1 + B)                           # the experts whose place the shared one takes
    return dict(n_expert=(4, 16)[A] * top_k - shared, top_k=top_k - shared, d_expert=32 * scale // (1 + B),
                d_shared=32 * scale * C, aux_coef=(0.01, 0.0)[D], bias_rate=(0.0, 0.001)[D],
                capacity_factor=(1.25, None)[E])


_levels = [(*four, (1 + sum(four)) % 2) for four in product((0, 1), repeat=4)]     # E = ABCD in signs
_names = ["".join(letter for letter, level in zip("ABCDE", levels) if level) for levels in _levels]
runs = [dict(name=name, group="ladder" if name == "E" else "cells", **_cell(*levels))
        for name, levels in zip(_names, _levels)]
runs += [dict(name=f"E-{steps * scale}", group="ladder", max_steps=steps * scale, **_cell(0, 0, 0, 0, 1))
         for steps in (244, 976)]
