import sys

import pytest

import train
from router import run_script


@pytest.fixture
def run_train(monkeypatch, capsys):
    """Run `python train.py *words` in this process: (exit code, standard output, standard error)."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        capsys.readouterr()
        code = 0
        try:
            run_script(train.main)
        except SystemExit as leave:
            code = leave.code
        return code, *capsys.readouterr()

    return run
