# Are the learning rates of widths.py right? Half and twice its rate at each of its three active sizes.
#
# Source    widths.py, whose rates follow from a slope; its own runs of seed 1 are the middle of each three.
# Run       python train.py configs/slicing/width_rates.py --parallel=2, then python results/slicing/widths.py
# Scale     716,800 tokens of Python source a run.

from pathlib import Path
from runpy import run_path

_widths = run_path(str(Path(__file__).with_name("widths.py")), {"scale": scale})
globals().update({name: value for name, value in _widths.items()
                  if name[0] != "_" and isinstance(value, (int, float)) and name != "scale"})

seed = 1
runs = [run | dict(name=f"{run['name']}-rate{factor:g}", group=f"rate {factor:g}",
                   learning_rate=factor * run["learning_rate"])
        for run in _widths["runs"] if run["name"] in ("a64-t2048-w32", "a128-t2048-w32", "a256-t2048-w32")
        for factor in (0.5, 2)]
