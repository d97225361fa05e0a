# Phase 1 of the architecture search in small, at 2 and 4 times the size: which way do its verdicts go as models grow?
#
# Scaled   architecture.py's five shapes with widths times the root of the size (rounded to whole numbers that attention
#          can take), so that parameters are about 2 and 4 times as many; 1.4 and 2 times the steps. Depth, experts,
#          top-k, batch, context and rate stay.
# Equal    as there: one group at equal tokens, one at the FLOPs of the cheapest, for each size.
# Run      python train.py configs/search/small/sizes.py --parallel=2, then python results/search/sizes.py

from pathlib import Path
from runpy import run_path

from model import ModelConfig, count

_small = run_path(str(Path(__file__).with_name("architecture.py")))
_copied = ("n_head n_kv_head vocab_size seq_len tie_embeddings micro_batch learning_rate schedule warmup weight_decay "
           "beta1 beta2 eval_tokens log_interval max_steps").split()
globals().update({name: _small[name] for name in _copied})

eval_interval = 1_000_000
checkpoint_interval = 250
out_dir = "out/small_sizes"
seeds = [1, 2]


def _shape(name: str, size: int) -> dict:
    small = dict(d_model=_small["d_model"]) | _small["_shapes"][name]
    wide = {key: 2 * round(small[key] * size**0.5 / 2) for key in ("d_model", "d_expert", "d_head")}
    return small | wide


def _flops(shape: dict) -> int:
    """Training FLOPs a token."""
    shared = {name: _small[name] for name in ("n_head", "n_kv_head", "vocab_size", "seq_len", "tie_embeddings")}
    return count(ModelConfig(**shared | shape))["flops_per_token"]


runs = []
for _size in (2, 4):
    _shapes = {name: _shape(name, _size) for name in _small["_shapes"]}
    for _name, _own in _shapes.items():
        _share = _flops(_shapes["1b"]) / _flops(_own)
        runs.append(dict(name=f"{_name}-x{_size}", group=f"x{_size}, equal tokens", **_own))
        if _name != "1b":                     # at its own FLOPs the cheapest is the run above
            runs.append(dict(name=f"{_name}-x{_size}-flops", group=f"x{_size}, equal FLOPs",
                             max_steps=round(_share * max_steps), **_own))
