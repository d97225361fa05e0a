"""Started by tests/test_ranks.py under torchrun: several runs in one start of the processes, each (words, stop,
poison). stop: the steps after which a signal to the last rank stops it. poison: a micro-batch whose targets have this
sum modulo 16 has a loss that is not a number. Rank 0 prints what each ended in, on each rank."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import train


def disturb(stop, poison):
    """Model.forward and Run.step with the disturbance in them, whichever process they run in."""
    forward, step = train.Model.forward, train.Run.step

    def poisoned(model, tokens, targets=None, *more, **named):
        o = forward(model, tokens, targets, *more, **named)
        if model.training and poison is not None and int(targets.sum()) % 16 == poison:
            o = o._replace(ce=o.ce * float("nan"))
        return o

    def signalled(self, number, *more):
        if number + 1 == stop and train.RANK == train.WORLD - 1:
            self.stop.append("a test")
        return step(self, number, *more)

    train.Model.forward, train.Run.step, train.draw_figures = poisoned, signalled, lambda out: None
    return forward, step


def run(words, stop=None, poison=None):
    """The exit code, or the message of a BadInput."""
    forward, step = disturb(stop, poison)
    try:
        return train.command(words) or 0
    except train.BadInput as error:
        return str(error)
    finally:
        train.Model.forward, train.Run.step = forward, step


if __name__ == "__main__":
    with train.ranks():
        for words, stop, poison in json.loads(sys.argv[1]):
            print("ended", json.dumps(train.gathered(run(words, stop, poison))), flush=True)
