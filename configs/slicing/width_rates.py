# Which learning rate do the active sizes of widths.py want? Half to eight times 4e-3 * N^-0.51, one width, one seed.
#
# Source    widths.py, whose rates are the best of these; the slope is that of results/joint_law/rates.json.
# Run       python train.py configs/slicing/width_rates.py --parallel=2, then python results/slicing/widths.py
# Scale     716,800 tokens of Python source a run.

from pathlib import Path
from runpy import run_path

_widths = run_path(str(Path(__file__).with_name("widths.py")), {"scale": scale})
globals().update({name: value for name, value in _widths.items()
                  if name[0] != "_" and isinstance(value, (int, float)) and name != "scale"})


def _rate(active: int) -> float:
    """4e-3 at 128 active hidden units, elsewhere by the parameters of a block: attention 3 D^2, experts 3 D active."""
    return 4e-3 / scale * ((64 + active) / (64 + 128)) ** -0.51


seed = 1
runs = [run | dict(name=f"a{active}-rate{factor:g}", group=f"active {active}", learning_rate=factor * _rate(active))
        for active in (64, 128, 256) for factor in (0.5, 1, 2, 4, 8)
        for run in _widths["runs"] if run["name"] == f"a{active}-t2048-w32"]
along = "learning_rate"
