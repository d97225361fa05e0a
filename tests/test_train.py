"""train.py: every run here is a real one, two layers wide and a few steps long, in a folder of its own.

`command(...)` is `python train.py ...` inside this process, from the command line to the exit code, which saves the
import of torch. Real processes are started only where a signal has to hit one; those tests are marked slow.
"""

import base64
import copy
import gzip
import inspect
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tiktoken
import torch
from conftest import ROOT, SHARED, texts, write_config, write_corpus

import model as m
import train as t
from model import BadInput, Model
from router import POLICIES

TINY = SHARED | dict(learning_rate=3e-3, eval_interval=10, log_interval=5, checkpoint_interval=5)
DRAW_FIGURES, WRITE_TEXT = t.draw_figures, t.write_text


@pytest.fixture(autouse=True)
def tiny_and_corpus(folder, monkeypatch):
    """tiny.py and a corpus of 80 small documents in an empty folder.

    Figures and a sample of text take longer than such a run: only tests that ask for `figures` have them.
    """
    write_config("tiny.py", **TINY)
    write_corpus(80)
    monkeypatch.setattr(t, "draw_figures", lambda out: None)
    monkeypatch.setattr(t, "write_text", lambda *_, **__: [])


@pytest.fixture
def figures(folder, monkeypatch):
    monkeypatch.setattr(t, "draw_figures", DRAW_FIGURES)
    monkeypatch.setattr(t, "write_text", WRITE_TEXT)


@pytest.fixture
def command(run_train):
    """Run `python train.py tiny.py *arguments` in this process: (exit code, standard output, standard error)."""
    return lambda *arguments, config="tiny.py": run_train(config, *arguments)


@pytest.fixture
def trained(command):
    """Train by the command line to a clean end, and return the checkpoint."""

    def run(*arguments: str) -> dict:
        code, _, err = command(*arguments)
        assert code == 0 and err == "", err
        out = [word.removeprefix("--out_dir=") for word in arguments if word.startswith("--out_dir=")]
        return checkpoint(*out)

    return run


@pytest.fixture
def refused(command):
    """The command must leave with code 2 and one line on standard error that says this, and change no file."""

    def run(says: str, *arguments: str, config: str = "tiny.py") -> str:
        before = files()
        code, _, err = command(*arguments, config=config)
        assert code == 2 and re.fullmatch(r"error: .*\n", err) and says in err, err
        assert files() == before and not list(Path().glob("data/*.tmp")), "something was changed or left behind"
        return err

    return run


def files(out: str = "out") -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}


def tiny(**changes) -> t.Config:
    return t.read_config("tiny.py", changes)


def checkpoint(out: str = "out/tiny") -> dict:
    return torch.load(f"{out}/ckpt.pt", weights_only=True)


def result(out: str = "out/tiny") -> dict:
    return json.loads(Path(out, "result.json").read_text())


def log(out: str = "out/tiny", having: str = "step") -> list[dict]:
    """Its lines with this key. Each must be strict JSON: jq and every browser refuse NaN."""
    lines = [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
             for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [line for line in lines if having in line]


def training(out: str = "out/tiny") -> list[dict]:
    return log(out, "ce")


def steps_of(lines: list[dict]) -> list[int]:
    return [line["step"] for line in lines]


def same(a, b, but: tuple[str, ...] = ("seconds",)) -> bool:
    """Equal to the last bit, through dictionaries and lists; what these keys hold may differ."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return same([(k, a[k]) for k in sorted(a, key=str) if k not in but],
                    [(k, b[k]) for k in sorted(b, key=str) if k not in but], but)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, but) for x, y in zip(a, b))
    return a == b


def assert_same_run(out: str, reference: str) -> None:
    """Bit-identical weights and optimizer, and a log that differs only in clocks."""
    assert same(checkpoint(out), checkpoint(reference))
    clocks = ("tokens_per_s", "mfu", "memory", "seconds", "load")        # load: on the last line of each flush
    assert same(log(out), log(reference), clocks)


@pytest.fixture
def interrupted(monkeypatch, command):
    """Run the command and send it a SIGINT while it is inside this step; the same command continues it."""

    def run(step: int, *arguments: str) -> str:
        log_step = t.Run.step

        def hook(self, now, *rest):
            if now == step:
                os.kill(os.getpid(), signal.SIGINT)
            return log_step(self, now, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(t.Run, "step", hook)
            code, out, err = command(*arguments)
        assert code == 0, err
        return out

    return run


# --- the configuration ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, value, says", [
    ("n_layers", "24", "did you mean n_layer?"), ("n_layer", "'two'", "be int"), ("n_layer", "1.5", "be int"),
    ("n_layer", "True", "be int"), ("n_layer", "None", "be int"), ("learning_rate", "'fast'", "be float"),
    ("learning_rate", "1e999", "be float"), ("learning_rate", "1e999 - 1e999", "be float"), ("qk_norm", "1", "be bool"),
    ("qk_norm", "'yes'", "be bool"), ("max_tokens", "[1]", "be int or None"),
    ("batch_tokens", "'128k'", "be int or list or None"),
])
def test_a_misspelt_name_or_a_value_of_the_wrong_type_is_refused_wherever_it_stands(refused, name, value, says):
    refused(says, f"--{name}={value}")
    Path("bad.py").write_text(f"{name} = {value}\n")
    refused(says, config="bad.py")


@pytest.mark.parametrize("arguments, says", [
    ("--top_k=5", "top_k = 5 must be 1 to n_expert = 4"), ("--d_head=15", "d_head = 15 must be even"),
    ("--n_kv_head=3", "multiple of n_kv_head"), ("--router=sotfmax", "did you mean softmax?"),
    ("--seq_len=64 --max_seq_len=32", "must not exceed max_seq_len"), ("--aux_coef=1" + "0" * 400, "aux_coef"),
    ("--vocab_size=256", "vocab_size = 256 is less than the 257 of tokenizer 'bytes'"),
    ("--expert_groups=[(2,16),(2,8)] --n_expert=8", "n_expert does nothing beside expert_groups"),
    ("--batch_tokens=200", "multiple of micro_batch * seq_len = 128, say 256"),
    ("--batch_tokens=0", "batch_tokens = 0"), ("--batch_tokens=-128", "batch_tokens = -128"),
    ("--batch_tokens=[(0,128),(0,256)]", "goes up"), ("--batch_tokens=[(64,128)]", "starts at token 0"),
    ("--batch_tokens=[]", "pairs"), ("--batch_tokens=[(0,128,3)]", "pairs"), ("--batch_tokens=[(0,1e999)]", "pairs"),
    (f"--batch_tokens=[(0,{'1' * 400})]", "batch_tokens must be below 2**40"), (f"--batch_tokens={2**100}", "2**40"),
    ("--batch_tokens=[(0,128),(True,256)]", "pairs"),
    ("--learning_rate=0", "learning_rate = 0.0 must be positive"), ("--beta2=1", "beta2 = 1.0 must be in [0, 1)"),
    ("--min_learning_rate=1", "must not exceed learning_rate"), ("--warmup=-1", "warmup = -1.0 must not be negative"),
    ("--weight_decay=-0.1", "weight_decay = -0.1 must not be negative"),
    ("--max_steps=1e20", "max_steps"), ("--n_layer=1000000000", "n_layer = 1000000000 must be at most 4096"),
    ("--max_steps=0", "max_steps = 0 must be positive"), ("--max_tokens=0", "max_tokens = 0 must be positive"),
    ("--eval_interval=0", "eval_interval = 0 must be positive"), ("--max_steps={[]:1}", "max_steps"),
    ("--micro_batch=0", "micro_batch = 0 must be positive"), ("--seed=-1", "seed = -1 must not be negative"),
    ("--seed=100000000000000000000", "seed"), ("--schedule=linear", "must be one of cosine, constant"),
    ("--dtype=float16", "must be one of float32, bfloat16"), ("--device=tpu", "must be cpu, cuda, cuda:N or mps"),
    ("--device=cpu:first", "device"), ("--device=mps", "device"), ("--out_dir=" + "x" * 300, "too long: 'xx"),
    ("--tokenizer=" + "x" * 5000, "tokenizer"), ("--dataset=" + "x" * 5000, "dataset"), ("--dataset=", "dataset"),
    ("--out_dir=tiny.py", "tiny.py"), ("--out_dir=tiny.py/below", "tiny.py"),
    ("configs/second.py", "unknown argument configs/second.py"),
    ("--expert_groups=[(1,8),(3,8)] --top_k=5", "top_k = 5"), ("--expert_groups=3", "expert_groups"),
    ("--expert_groups=[]", "expert_groups"), ("--expert_groups=[(4,0)]", "expert_groups"),
    ("--expert_groups=[(4,8,8)]", "expert_groups"), ("--expert_groups=[(3.5,8)]", "expert_groups"),
    ("--d_shared=-1", "d_shared"), ("--shared_gate", "d_shared"), ("--first_dense_layers=2", "n_layer - 1"),
    ("--n_expert=1 --top_k=1 --d_shared=8", "d_expert"), ("--capacity_factor=0", "capacity_factor"),
    ("--router=switch", "top_k = 1"), ("--router=hash --bias_rate=0.1", "no bias"), ("--bias_rate=-1", "bias_rate"),
    ("--router=expert_choice --capacity_factor=1", "capacity of its own"), ("--top_p=1.5", "top_p"),
    ("--balance_scope=batch", "balance_scope"), (f"--d_model={10**9} --d_expert={10**9} --n_expert={10**6}", "smaller"),
])
def test_an_impossible_value_is_one_line_and_leaves_nothing_behind(refused, arguments, says):
    refused(says, *arguments.split())


@pytest.mark.parametrize("text, says", [
    ("n_layer = 1 / 0\n", "ZeroDivisionError"), ("n_layer = = 2\n", "SyntaxError"), ("import nowhere\n", "nowhere"),
    ("raise ValueError('one\\ntwo')\n", "ValueError"), ("raise SystemExit('no')\n", "bad.py"),
    ("dataset = 3\n", "dataset = 3 must be str"), (None, "bad.py is no config file"),
])
def test_a_config_file_that_does_not_run_or_is_none_is_one_line(refused, text, says):
    Path("bad.py").mkdir() if text is None else Path("bad.py").write_text(text)
    refused(says, config="bad.py")
    refused("nowhere.py is no config file", config="nowhere.py")


def test_help_lists_every_field_with_its_meaning_and_default_from_one_reading_of_the_source(monkeypatch, capsys):
    """Reading a class's source parses the whole file: once a field made every command wait for seconds."""
    read, getsource, meanings = [], inspect.getsource, t.field_help()
    monkeypatch.setattr(inspect, "getsource", lambda what: read.append(what) or getsource(what))
    with pytest.raises(SystemExit) as leave:
        t.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert leave.value.code == 0 and len(read) <= 3
    for f in fields(t.Config):
        meaning = " ".join(meanings[f.name].split())
        assert len(meaning) > 5 and f"{meaning} (default {f.default!r})" in text, f.name


def test_the_command_line_says_the_same_as_a_file():
    def read(*words):
        return t.read_config("tiny.py", t.parse_command_line(["tiny.py", *words])[1])

    assert asdict(read("--max_tokens=1e9")) == asdict(tiny(max_tokens=1_000_000_000))
    assert read().out_dir == "out/tiny" and read("--out_dir=elsewhere").out_dir == "elsewhere"
    read = read("--compile", "--qk_norm=false", "--tie_embeddings", "False", "--max_steps", "7", "--rope_base=10000",
                "--max_tokens=None", "--batch_tokens=[(0, 128), (1e3, 256)]")
    assert (read.compile, read.qk_norm, read.tie_embeddings, read.max_steps) == (True, False, False, 7)
    assert read.rope_base == 10_000.0 and isinstance(read.rope_base, float) and read.max_tokens is None
    assert [t.position(read, step) for step in (0, 8)] == [(0, 128), (1024, 256)]
    assert tiny(expert_groups=[[4, 8.0]]).expert_groups == [(4, 8)]


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_in_the_repository_is_accepted(path, monkeypatch):
    monkeypatch.setenv("LADDER", "all")                   # the ladder leaves out what results/joint_law/runs.csv holds
    for config in t.load_runs(str(path)):
        assert config.dataset == "stdlib" and config.tokenizer == "bytes", "it runs with no download"


# --- text to tokens on disk -----------------------------------------------------------------------------------------

def prepared(**changes) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation tokens of a dataset, each in one piece."""
    config = tiny(**changes)
    splits = t.prepare(config, m.load_tokenizer(config.tokenizer))
    return tuple(np.concatenate([np.asarray(a) for a in arrays]) for arrays in splits)


def decoded(tokens: np.ndarray) -> list[str]:
    """The documents of a token array, cut at end-of-text (256)."""
    assert tokens[-1] == 256, "the last document ends in end-of-text"
    ends = np.flatnonzero(tokens == 256)
    return [bytes(tokens[a:b].astype(np.uint8)).decode() for a, b in zip([0, *(ends + 1)], ends)]


def test_the_default_is_the_standard_library_without_what_was_installed():
    assert (t.Config().dataset, t.Config().tokenizer) == ("stdlib", "bytes")
    files = t.source_files("stdlib")
    assert {"argparse.py", "gzip.py", "ast.py"} <= {path.name for path in files}
    assert not any("site-packages" in path.parts or "test" in path.parts for path in files)
    assert sum(path.stat().st_size for path in files) > 5_000_000


def test_a_folder_a_pattern_and_jsonl_give_the_same_bytes_and_copies_stay_on_one_side_of_the_split():
    """One text has carriage returns, a byte order mark, characters beyond the basic plane, and a very long line."""
    written = [*texts(80), "\ufeffone\r\ntwo\rthree \U0001f600 grüße \u2028" + "x" * 1_000_000]
    Path("corpus/odd.txt").write_bytes(written[-1].encode())
    sides = [decoded(side) for side in prepared(dataset="corpus")]
    assert sorted(sides[0] + sides[1]) == sorted(written)
    for name, opened in (("corpus.jsonl", open), ("corpus.jsonl.gz", gzip.open)):
        with opened(name, "wt", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(written))
    shutil.copytree("corpus", "some/way/down")
    for dataset in ("corpus/*.txt", "some", "some/**/*.txt", "corpus.jsonl", "corpus.jsonl.gz", "corpus.jsonl*"):
        again = [decoded(side) for side in prepared(dataset=dataset)]
        copies = 2 if dataset.endswith("jsonl*") else 1
        assert [sorted(side) for side in again] == [sorted(side * copies) for side in sides], dataset


def test_a_single_file_gives_its_last_twentieth_to_validation_whatever_it_says():
    """Documents are held out by a checksum: one that hashes to validation must not leave nothing to train on."""
    written = [f"{start} " + texts(1)[0] * 20 for start in range(40)]
    assert {t.is_held_out(text.encode()) for text in written} == {True, False}
    for text in written:
        Path("one.txt").write_text(text)
        train, val = prepared(dataset="one.txt")
        assert len(train) > 100 * 32 and len(val) > 5 * 32
        assert decoded(np.concatenate([train, val])) == [text]


def test_text_is_tokenised_once_and_described_by_a_manifest(capsys):
    train, val = prepared()
    (shards,) = Path("data").iterdir()
    manifest = json.loads((shards / "manifest.json").read_text())
    assert manifest["dataset"] == "corpus" and manifest["tokenizer"] == "bytes" and len(manifest["files"]) == 80
    assert manifest["tokens"] == {"train": len(train), "val": len(val)}
    assert "tokenising" in capsys.readouterr().out
    assert all(map(np.array_equal, prepared(), (train, val))) and "tokenising" not in capsys.readouterr().out
    Path("corpus/00.txt").write_text("something else entirely, " * 20)
    assert not np.array_equal(prepared()[0], train) and "tokenising" in capsys.readouterr().out


def test_neither_a_leftover_nor_a_faster_run_that_tokenises_is_an_obstacle(monkeypatch):
    """In a container the next process often has the id of a killed one, so its temporary name. And another run may
    finish between this one's look and its rename."""
    first = prepared()
    (shards,) = Path("data").iterdir()
    shards.rename(f"{shards}.{os.getpid()}.tmp")
    assert all(map(np.array_equal, prepared(), first)) and shards.is_dir()
    is_file = Path.is_file
    looks = iter([False])                                                    # the first look finds no manifest
    monkeypatch.setattr(Path, "is_file", lambda p: is_file(p) and (p.name != "manifest.json" or next(looks, True)))
    assert all(map(np.array_equal, prepared(), first)) and list(Path("data").iterdir()) == [shards]


def llm_c_shard(path: str, tokens: np.ndarray) -> None:
    """llm.c's format: 256 int32 of header (magic, version, number of tokens), then the tokens."""
    header = np.zeros(256, np.int32)
    header[:3] = {2: 20240520, 4: 20240801}[tokens.itemsize], 1, len(tokens)
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_bytes(header.tobytes() + tokens.tobytes())


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_token_shards_of_llm_c_are_read_as_they_are(kind):
    written = np.arange(400, dtype=kind) % 257
    llm_c_shard("shards/a_train_000001.bin", written)
    llm_c_shard("shards/a_train_000002.bin", written[::-1].copy())
    llm_c_shard("shards/a_val_000000.bin", written[:99])
    train, val = t.prepare(tiny(dataset="shards"), m.load_tokenizer("bytes"))
    assert [a.tolist() for a in train] == [written.tolist(), written[::-1].tolist()]
    assert [a.tolist() for a in val] == [written[:99].tolist()]
    assert not Path("data").exists(), "nothing to tokenise"


def test_parquet_is_read_by_its_text_column_and_without_pyarrow_is_one_line(refused, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow, which is optional")
    from pyarrow import table
    parquet.write_table(table({"text": texts(80), "n": list(range(80))}), "corpus.parquet")
    assert all(map(np.array_equal, prepared(dataset="corpus.parquet"), prepared()))
    parquet.write_table(table({"body": texts(80)}), "other.parquet")
    parquet.write_table(table({"text": ["a", None]}), "null.parquet")
    Path("broken.parquet").write_bytes(b"PAR1 not really PAR1")
    for name in ("other.parquet", "null.parquet", "broken.parquet"):
        refused(name, f"--dataset={name}")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused("pip install pyarrow", "--dataset=corpus.parquet")


LONG = gzip.compress(b'{"text": "' + random.Random(0).randbytes(3000).hex().encode() + b'"}\n')
BAD_INPUTS = [
    ("empty.txt", b"", "holds no text"), ("tiny.txt", b"just this", "the text is 10 tokens"),
    ("binary.txt", b"\x7fELF\0\0\0", "is binary"), ("latin.txt", "grüße".encode("latin-1") * 99, "is not UTF-8"),
    ("latin.jsonl", '{"text": "grüße"}\n'.encode("latin-1"), "is not UTF-8"),
    ("line.jsonl", b'{"text": "a"}\n{"text": \n', "line.jsonl line 2"), ("list.jsonl", b"[1]\n", "list.jsonl line 1"),
    ("field.jsonl", b'{"txt": "a"}\n', "jsonl line 1"), ("null.jsonl", b'{"text": null}\n', "jsonl line 1"),
    ("nothing.jsonl", b'{"text": ""}\n' * 9, "holds no text"),
    ("surrogate.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "surrogate.jsonl line 2"),
    ("deep.jsonl", b"[" * 100_000 + b"\n", "deep.jsonl line 1"),
    ("digits.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", "digits.jsonl line 1"),
    ("cut.jsonl.gz", LONG[:900], "cut.jsonl.gz cannot be read"), ("not.jsonl.gz", b"plain", "gz cannot be read"),
    ("corrupt.jsonl.gz", LONG[:900] + bytes([LONG[900] ^ 255]) + LONG[901:], "corrupt.jsonl.gz cannot be read"),
    ("cut_train.bin", np.array([20240520, 1, 900] + [0] * 253, np.int32).tobytes() + b"\0" * 9, "is it cut off?"),
    ("header_train.bin", np.array([20240520, 1, 9], np.int32).tobytes(), "is it cut off?"),
    ("empty_train.bin", b"", "does not begin like an llm.c token shard"),
    ("other_train.bin", b"something else", "does not begin like an llm.c token shard"),
]


@pytest.mark.parametrize("name, data, says", BAD_INPUTS, ids=[name for name, *_ in BAD_INPUTS])
def test_an_input_that_cannot_be_trained_on_gets_its_one_line(refused, name, data, says):
    Path(name).write_bytes(data)
    refused(says, f"--dataset={name}")


def test_a_place_without_text_or_with_a_token_that_has_no_row_in_the_embedding_gets_its_one_line(refused):
    Path("bare").mkdir()
    Path("bare/picture.png").write_bytes(b"\x89PNG")
    refused("holds no file ending in .txt", "--dataset=bare")
    refused("neither 'stdlib' nor a file", "--dataset=nowhere")
    refused("neither 'stdlib' nor a file", "--dataset=corpus/*.md")
    refused("a pattern of files", "--dataset=corpu*")
    Path("bare/picture.png").rename("bare/loop.txt")
    os.symlink("gone.txt", "bare/broken.txt")
    refused("bare/loop.txt is not UTF-8", "--dataset=bare")
    llm_c_shard("only/train.bin", np.arange(264, dtype=np.uint16))
    refused("no .bin shards for validation", "--dataset=only")
    llm_c_shard("only/val.bin", np.arange(265, dtype=np.uint16))
    refused("token 264: set vocab_size = 264 to at least 265", "--dataset=only")


def write_ranks(path: str, n_merged: int, first: int = 0) -> None:
    """A ranks file: the 256 bytes, from `first` on, then invented tokens, longer ones first: no order is sorted."""
    invented = [b"%x" % (0xFFFFFF - i) for i in range(n_merged)]
    tokens = [bytes([(first + i) % 256]) for i in range(256)] + invented
    Path(path).write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)))


def test_a_ranks_file_of_qwens_size_gets_qwens_special_tokens_at_their_numbers():
    write_ranks("qwen.tiktoken", 151_643 - 256)
    tokenizer = m.load_tokenizer("qwen.tiktoken")
    special = {tokenizer.decode([i]): i for i in range(151_643, 151_669)}
    assert special["<|endoftext|>"] == tokenizer.eot_token == 151_643
    expected = {"<|im_start|>": 151_644, "<|im_end|>": 151_645, "<|vision_start|>": 151_652, "<tool_call>": 151_657,
                "</tool_call>": 151_658, "<|fim_prefix|>": 151_659, "<|file_sep|>": 151_664, "<tool_response>": 151_665,
                "</tool_response>": 151_666, "<think>": 151_667, "</think>": 151_668}
    assert expected.items() <= special.items() and tokenizer.n_vocab == 151_669 <= 151_936
    assert tokenizer.encode_ordinary("<|endoftext|>")[-1] < 151_643, "text cannot smuggle a special token in"


def test_every_token_counts_with_the_bytes_it_stands_for_and_another_order_is_another_tokenizer():
    """tiktoken lists its tokens in alphabetical order, not by number, and its numbers may have gaps."""
    write_ranks("mine.tiktoken", 100)
    tokenizer = m.load_tokenizer("mine.tiktoken")
    found = [len(text) for text in t.token_texts(tokenizer)]
    assert found == [len(tokenizer.decode_single_token_bytes(i)) for i in range(356)] + [0] and max(found) == 6
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 257}
    gap = tiktoken.Encoding("gap", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    assert [len(text) for text in t.token_texts(gap)[255:]] == [1, 0, 2]
    first = prepared(tokenizer="mine.tiktoken", vocab_size=400)[0]
    write_ranks("mine.tiktoken", 100, first=1)                       # shards of one must not be read as the other's
    assert not np.array_equal(prepared(tokenizer="mine.tiktoken", vocab_size=400)[0], first)


def test_a_tokenizer_that_cannot_be_had_gets_its_one_line(refused, monkeypatch):
    refused("did you mean gpt2?", "--tokenizer=gpt3")
    Path("bad.tiktoken").write_text("YQ== 0\nYg== 2\n")
    refused("not a tiktoken ranks file", "--tokenizer=bad.tiktoken")
    monkeypatch.setattr(tiktoken, "get_encoding", Mock(side_effect=ConnectionError("no route\nto host")))
    refused("TIKTOKEN_CACHE_DIR", "--tokenizer=gpt2")
    refused("'bytes', which needs none", "--tokenizer=o200k_base")


# --- what step s is made of -----------------------------------------------------------------------------------------

class Given(t.Corpus):
    """Steps over these tokens, which are for training and for validation."""

    def __init__(self, config: t.Config, tokens: np.ndarray):
        self.config = config
        self.train = self.val = t.Shards([tokens], config.seq_len)
        self.token_bytes = (torch.arange(config.vocab_size) < 256).long()


def windows_of(steps, **changes) -> list[int]:
    """The windows that these steps are made of, over tokens 0, 1, 2, ... in 10 windows of 32: a row's first / 32."""
    data = Given(tiny(**changes), np.arange(32 * 10 + 1, dtype=np.uint16))
    return [int(row[0]) // 32 for step in steps for x, _ in data.micro_batches(step) for row in x]


def test_a_step_is_a_function_of_seed_and_step_and_each_window_comes_once_an_epoch_in_another_order():
    in_order = windows_of(range(9), batch_tokens=256)
    for step in (7, 0, 8, 3):
        for size in (1, 2, 4, 8):                                    # however it is accumulated
            assert windows_of([step], batch_tokens=256, micro_batch=size) == in_order[8 * step:8 * step + 8]
    assert windows_of([0], seed=2) != windows_of([0], seed=1)
    epochs = [in_order[i:i + 10] for i in range(0, 70, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]


def test_no_window_spans_two_shards_and_targets_are_the_inputs_one_token_later():
    shards = t.Shards([np.arange(0, 100), np.arange(100, 120), np.arange(200, 265)], 32)     # 3, 0 and 2 windows
    x, y = shards.batch(range(len(shards)))
    assert x[:, 0].tolist() == [0, 32, 64, 200, 232] and torch.equal(x, x[:, :1] + torch.arange(32))
    assert torch.equal(y, x + 1)


def test_a_batch_ramp_stands_where_it_should_by_hand():
    """128 tokens a step until token 300 (three steps, the last one passes it), 256 until 1000, then 512; and a stage
    that is passed in one step is left out."""
    ramp = [(0, 128), (300, 256), (1000, 512)]
    expected = [(0, 128), (128, 128), (256, 128), (384, 256), (640, 256), (896, 256), (1152, 512), (1664, 512)]
    assert [t.position(tiny(batch_tokens=ramp), step) for step in range(8)] == expected
    assert windows_of(range(8), batch_tokens=ramp) == windows_of(range(17)), "a ramp only groups differently"
    config = tiny(batch_tokens=[(0, 512), (100, 128), (200, 256)])
    assert [t.position(config, step) for step in range(3)] == [(0, 512), (512, 256), (768, 256)]


def test_max_tokens_stops_at_the_first_step_that_reaches_it(trained):
    steps = {1: 1, 128: 1, 129: 2, 1280: 10, 1281: 11, 10**9: 20}
    assert {n: t.total_steps(tiny(max_tokens=n)) for n in steps} == steps
    ramp = [(0, 128), (300, 256)]
    assert [t.total_steps(tiny(max_tokens=n, batch_tokens=ramp)) for n in (640, 641)] == [4, 5]
    trained("--max_tokens=640", f"--batch_tokens={ramp}")
    assert [line["tokens"] for line in training()] == [128, 256, 384, 640]


def rates(steps, **changes) -> list[float]:
    config = tiny(**{"learning_rate": 1.0, "max_steps": 100} | changes)
    total = t.position(config, config.max_steps)[0]
    return [t.learning_rate(config, *t.position(config, step), total) for step in steps]


def test_the_learning_rate_by_hand():
    for warmup in (0.1, 10 * 128):                                  # a fraction of the run, the same in tokens
        assert rates((0, 4, 9, 10), warmup=warmup) == pytest.approx([0.1, 0.5, 1, 1])
    assert rates((0, 1), warmup=0) == pytest.approx([1, 0.5 * (1 + math.cos(math.pi / 100))])
    middle, late = rates((55, 99), min_learning_rate=0.2)           # warmup ends at 10; 55 is half of the other 90
    assert middle == pytest.approx(0.6)
    assert late == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 89 / 90)))
    for decay in (0.2, 20 * 128):
        got = rates((10, 50, 80, 90, 99), schedule="constant", decay=decay, min_learning_rate=0.5)
        assert got == pytest.approx([1, 1, 1, 0.75, 0.5 + 0.5 / 20])
    assert rates((10, 99), schedule="constant", decay=0) == [1, 1]
    ramp = [(0, 128), (64 * 128, 256)]                              # half of the tokens are passed after step 64 of 96
    assert rates([64], warmup=0, max_steps=96, batch_tokens=ramp) == pytest.approx([0.5])


def test_the_rates_that_are_logged_are_those_of_the_schedule(trained):
    trained("--schedule=constant", "--warmup=0.25", "--decay=0.25")
    up, down = [0.2, 0.4, 0.6, 0.8, 1], [1, 0.8, 0.6, 0.4, 0.2]
    assert [line["lr"] / 3e-3 for line in training()] == pytest.approx(up + [1] * 10 + down)


# --- the loop -------------------------------------------------------------------------------------------------------

@pytest.fixture
def first_gradients(monkeypatch, trained):
    """(gradients before clipping, the line that was logged) of a run of one step."""

    def run(*arguments: str) -> tuple[list, dict]:
        grads, clip = [], torch.nn.utils.clip_grad_norm_

        def spy(parameters, limit):
            parameters = list(parameters)
            grads.extend(p.grad.clone() for p in parameters)
            return clip(parameters, limit)

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
            trained("--max_steps=1", "--overwrite", *arguments)
        return grads, training()[0]

    return run


def test_accumulated_gradients_are_those_of_the_big_batch(first_gradients):
    """The balance loss is not linear in the batch, so it is left out; cross-entropy and z are means over tokens."""
    losses = ("--aux_coef=0", "--z_coef=0.1", "--batch_tokens=256")
    big, line = first_gradients("--micro_batch=8", *losses)
    for size in (4, 1):
        small, other = first_gradients(f"--micro_batch={size}", *losses)
        for name in ("ce", "z", "grad_norm", "bits_per_byte"):
            assert other[name] == pytest.approx(line[name], rel=1e-5), name
        for a, b in zip(big, small, strict=True):
            assert (a - b).norm() <= 1e-5 * a.norm() + 1e-9


def test_balance_and_z_losses_are_added_with_their_coefficients(first_gradients):
    plain, _ = first_gradients("--aux_coef=0", "--z_coef=0")
    both, _ = first_gradients("--aux_coef=0.5", "--z_coef=0.25")
    config = tiny(aux_coef=0.5, z_coef=0.25)
    model = Model(config).init_weights(config.seed)
    ((x, y),) = t.Corpus(config).micro_batches(0)
    o = model(x, y)
    (0.5 * o.balance + 0.25 * o.z).backward()
    for p, a, b in zip(model.parameters(), plain, both, strict=True):
        torch.testing.assert_close(b - a, torch.zeros_like(p) if p.grad is None else p.grad, rtol=1e-3, atol=1e-5)


def test_the_gradient_is_cut_to_grad_clip(monkeypatch, trained):
    """With AdamW's epsilon aside a clipped first step is the unclipped one, so the gradient itself is read."""
    norms, step = [], torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        norms.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    trained("--max_steps=3", "--grad_clip=0.01")
    assert norms == pytest.approx([0.01] * 3, rel=1e-3) and training()[0]["grad_norm"] > 0.02
    norms.clear()
    trained("--max_steps=3", "--grad_clip=0", "--overwrite")
    assert norms == pytest.approx([line["grad_norm"] for line in training()], rel=1e-5)


def test_twenty_steps_lose_what_they_always_lost(trained):
    """Another number of threads, processor or torch moves the cross-entropy by about 1e-6; a changed initialisation,
    batch order, schedule or gradient by far more than the 1e-3 allowed here."""
    trained()
    assert [training()[i]["ce"] for i in (0, 9, 19)] == pytest.approx([5.7791, 4.1475, 3.7899], abs=1e-3)


def test_a_dense_model_trains_too(command, figures):
    code, out, err = command("--n_expert=1", "--top_k=1", "--max_steps=4")
    assert code == 0 and "no experts" in out, err
    assert Path("out/tiny/loss.png").is_file() and not Path("out/tiny/experts.png").exists()
    assert "dead_experts" not in training()[0] and training()[0]["balance"] == 0


ONE_FILE = ("--dataset=corpus/00.txt", "--micro_batch=16", "--eval_tokens=1", "--log_interval=99", "--eval_interval=99",
            "--checkpoint_interval=99", "--max_seq_len=64", "--seq_len=16")


@pytest.mark.parametrize("flags", [
    ("--dtype=bfloat16",), ("--tie_embeddings=False",), ("--dataset=my corpus é",),
    ("--tokenizer=mine.tiktoken", "--vocab_size=360"), ONE_FILE,
], ids=["bfloat16", "untied", "spaces and accents", "a ranks file of one's own", "small numbers of everything"])
def test_unusual_settings_train_too_with_float32_weights_that_are_all_counted(flags, trained):
    """The small numbers: more sequences in a step than windows in the text, less to evaluate than a sequence, intervals
    never met."""
    write_ranks("mine.tiktoken", 100)
    shutil.copytree("corpus", "my corpus é")
    weights = trained("--max_steps=2", "--out_dir=my runs/ü 1", *flags)["model"]
    assert len(training("my runs/ü 1")) == 2 and {p.dtype for p in weights.values()} == {torch.float32}
    assert result("my runs/ü 1")["n_total"] == sum(p.numel() for p in weights.values())


# --- steps that are not finite --------------------------------------------------------------------------------------

def poison(monkeypatch, steps, where: str = "gradient") -> None:
    """Make these steps not finite."""
    clip, forward, calls = torch.nn.utils.clip_grad_norm_, Model.forward, []

    def bad_gradient(parameters, limit):
        parameters, step = list(parameters), len(calls)
        calls.append(step)
        if step in steps and where == "gradient":
            parameters[3].grad.view(-1)[5] = math.nan
        return clip(parameters, limit)

    def bad_loss(self, x, y=None, *rest, **more):
        o = forward(self, x, y, *rest, **more)
        bad = self.training and y is not None and len(calls) in steps and where == "loss"
        return o._replace(ce=o.ce * math.inf) if bad else o

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", bad_gradient)
    monkeypatch.setattr(Model, "forward", bad_loss)


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_bad_step_changes_neither_weights_nor_optimizer_and_is_counted(monkeypatch, where, command, figures):
    step, unchanged = torch.optim.AdamW.step, []

    def spy(self, *args, **kwargs):
        def state():
            return copy.deepcopy([*(group["params"] for group in self.param_groups), [*self.state.values()]])
        before = state() if len(unchanged) else None
        step(self, *args, **kwargs)
        unchanged.append(before is not None and same(before, state()))

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    poison(monkeypatch, {6}, where)
    code, out, err = command("--max_steps=9")
    assert code == 0, err
    assert unchanged == [step == 6 for step in range(9)], "this step is skipped, and the next one trains on"
    assert [line["skipped"] for line in training()] == [0] * 6 + [1] * 3 and training()[6]["grad_norm"] is None
    assert "skipped 1" in out and result()["skipped"] == 1


@pytest.mark.parametrize("log_interval, lines", [(1, 22), (5, 25)])
def test_ten_bad_steps_in_a_row_stop_the_run_and_leave_the_last_good_checkpoint(
        monkeypatch, command, interrupted, log_interval, lines):
    interrupted(9, "--max_steps=30", "--out_dir=out/good")
    poison(monkeypatch, range(12, 99))
    code, _, err = command("--max_steps=30", f"--log_interval={log_interval}")
    assert code == t.DIVERGED and err.count("\n") == 1 and "ten steps in a row" in err
    assert len(training()) == lines and not Path("out/tiny/result.json").exists()
    assert same(checkpoint(), checkpoint("out/good"))


def test_weights_that_a_finite_but_huge_step_ruined_do_not_replace_the_last_good_checkpoint(monkeypatch, command):
    """Step 7 is finite and leaves weights under which no later step is: step 10 must not be saved over step 5."""
    log_step = t.Run.step

    def ruin(self, now, *rest):
        if now == 7:
            [p.detach().mul_(1e30) for p in self.model.parameters()]
        return log_step(self, now, *rest)

    monkeypatch.setattr(t.Run, "step", ruin)
    code, _, err = command("--max_steps=40")
    assert code == t.DIVERGED and "ten steps in a row" in err
    assert checkpoint()["step"] == 5 and all(p.abs().max() < 10 for p in checkpoint()["model"].values())


def test_nine_bad_steps_in_a_row_do_not_stop_a_run_and_are_still_counted_after_a_resume(
        monkeypatch, trained, interrupted):
    poison(monkeypatch, [*range(2, 11), *range(12, 20)])
    interrupted(20, "--log_interval=1", "--max_steps=22")
    trained("--log_interval=1", "--max_steps=22")
    assert training()[-1]["skipped"] == result()["skipped"] == 17


# --- interrupted and continued --------------------------------------------------------------------------------------

def test_interrupted_at_any_step_and_continued_is_as_if_nothing_had_happened(command, trained, interrupted):
    ramp = "--batch_tokens=[(0, 128), (1000, 256)]"
    trained("--out_dir=out/straight", ramp)
    for step in (0, 9, 13, 18, 19):
        out = f"out/{step}"
        said = interrupted(step, ramp, f"--out_dir={out}")
        if step < 19:
            assert f"stopped by SIGINT after step {step}: saved; the same command continues" in said
            assert checkpoint(out)["step"] == step + 1 and not Path(out, "result.json").exists()
            assert f"continuing at step {step + 1} of 20" in command(ramp, f"--out_dir={out}")[1]
        assert_same_run(out, "out/straight")


AXES = [[f"--router={name}"] for name in POLICIES if name != "switch"] + [
    ["--router=switch", "--top_k=1"], ["--router=top_p", "--top_p=0.01"],
    ["--router=sigmoid", "--bias_rate=0.01", "--aux_coef=0"], ["--router_noise=0.5"],
    ["--capacity_factor=1.0", "--eval_capacity_factor=2.0"], ["--renormalize=False"], ["--balance_scope=sequence"],
    ["--balance_scope=global", "--batch_tokens=256"], ["--bias_rate=0.01", "--batch_tokens=256"],
    ["--expert_groups=[(2, 8), (4, 16)]"], ["--d_shared=16", "--shared_gate"], ["--first_dense_layers=1"],
    ["--n_expert=64", "--top_k=1"],
]


@pytest.mark.parametrize("flags", AXES, ids=" ".join)
def test_every_router_and_axis_trains_from_a_line_and_continues_to_the_last_bit(flags, trained, interrupted):
    flags = [*flags, "--max_steps=12"]
    whole, lines = trained(*flags, "--out_dir=out/whole"), training("out/whole")
    assert lines[-1]["ce"] < lines[0]["ce"] < 7
    busiest = max(len(layer) * max(layer) / sum(layer) for layer in lines[-1]["load"])
    assert lines[-1]["load_max_over_mean"] == pytest.approx(busiest, rel=1e-3), "of the choices made, not of all slots"
    interrupted(7, *flags)
    assert same(trained(*flags), whole)


def start(*arguments: str) -> subprocess.Popen:
    """A real process with as many threads as this one, so that sums come in the same order."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), "tiny.py", *arguments], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(process: subprocess.Popen, word: str) -> None:
    for line in process.stdout:
        if word in line:
            return
    pytest.fail(f"never printed {word!r}: {process.stderr.read()}")


@pytest.mark.slow
def test_a_process_has_its_out_dir_to_itself_and_at_sigterm_finishes_its_step_saves_and_exits_0(command, trained):
    long = ("--max_steps=500", "--eval_interval=60", "--log_interval=1", "--checkpoint_interval=1000")
    process = start(*long)
    wait_for(process, "step     20")
    code, _, err = command(*long)
    process.send_signal(signal.SIGTERM)
    assert code == 2 and err.count("\n") == 1 and "another process is training in out/tiny" in err
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped by SIGTERM after step" in out, err
    assert 20 < checkpoint()["step"] < 500
    trained(*long), trained(*long, "--out_dir=out/straight")
    assert_same_run("out/tiny", "out/straight")


@pytest.mark.slow
def test_a_process_killed_at_random_moments_continues_to_the_same_weights_bit_for_bit(trained):
    long = ("--max_steps=300", "--eval_interval=70", "--log_interval=3", "--checkpoint_interval=7")
    for _ in range(2):
        process = start(*long)
        wait_for(process, "step ")
        time.sleep(random.SystemRandom().uniform(0.0, 0.25))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    reached = checkpoint()["step"] if Path("out/tiny/ckpt.pt").exists() else 0
    assert reached < 300, "killed too late to show anything"
    trained(*long), trained(*long, "--out_dir=out/straight")
    assert_same_run("out/tiny", "out/straight")
    assert steps_of(training()) == list(range(300)), "one line a step, none lost, none doubled"
    assert steps_of(log(having="val_ce")) == [0, 70, 140, 210, 280, 300]


@pytest.mark.parametrize("lost", [False, True])
def test_a_log_with_a_line_cut_off_by_a_crash_or_lost_does_not_stop_a_run(lost, trained, interrupted):
    interrupted(12)
    path = Path("out/tiny/log.jsonl")
    path.unlink() if lost else path.write_text(path.read_text() + '{"step": 13, "tokens": 17')
    trained()
    assert steps_of(training()) == list(range(13 if lost else 0, 20))


def test_a_run_killed_before_its_results_still_gets_them_and_once_finished_stays(monkeypatch, command, trained):
    with monkeypatch.context() as patch:
        patch.setattr(t.Run, "end", lambda *_: sys.exit(9))
        assert command()[0] == 9
    trained()
    before = files()
    assert result()["steps"] == 20 and steps_of(log(having="val_ce")) == [0, 10, 20]
    code, out, _ = command()
    assert code == 0 and "out/tiny is finished after 20 steps; --overwrite starts anew" in out and files() == before


def test_a_run_is_not_continued_with_another_config_or_another_text(interrupted, refused):
    interrupted(12)
    err = refused("(seed 1 -> 2; learning_rate 0.003 -> 0.1)", "--learning_rate=0.1", "--seed=2")
    assert "--overwrite" in err and "out_dir" in err
    Path("corpus/00.txt").write_text("something else entirely, " * 20)
    refused("data")


def test_what_leaves_the_numbers_alone_may_change(command, trained, interrupted):
    """How often to print and save, and where the folder stands: a run may be moved and continued."""
    trained("--out_dir=out/straight")
    interrupted(12, "--log_interval=2")
    Path("out/tiny").rename("out/moved")
    code, out, err = command("--log_interval=7", "--checkpoint_interval=2", "--out_dir=out/moved/")
    assert code == 0 and "continuing at step 13" in out, err
    assert_same_run("out/moved", "out/straight")


def test_overwrite_starts_anew_but_an_impossible_config_throws_nothing_away(command, trained, interrupted, refused):
    trained("--seed=7", "--out_dir=out/straight")
    interrupted(12)
    for bad in ("--top_k=9", "--dataset=nowhere", "--vocab_size=100", "--tokenizer=gpt3"):
        refused("", "--overwrite", bad)
    code, out, _ = command("--seed=7", "--overwrite")
    assert code == 0 and "continuing" not in out
    assert_same_run("out/tiny", "out/straight")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left"), RuntimeError("unexpected pos 6")])
def test_a_checkpoint_is_on_disk_before_it_takes_the_old_ones_name_which_a_crash_or_a_full_disk_leaves(
        error, monkeypatch, command, trained):
    order, fsync, replace, save = [], os.fsync, Path.replace, torch.save

    def cut_short(state, file):
        save(state, file)
        if state["step"] == 10:
            file.truncate(file.tell() // 2)
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: order.append("on disk") or fsync(fd))
        patch.setattr(Path, "replace", lambda self, to: order.append(Path(to).name) or replace(self, to))
        trained("--out_dir=out/straight")
        patch.setattr(torch, "save", cut_short)
        code, _, err = command()
    full = (2, "the checkpoint before it is whole; make room") if isinstance(error, Exception) else (130, "")
    assert code == full[0] and full[1] in err and err.count("\n") == (code == 2)
    assert [what for what in order if what in ("on disk", "ckpt.pt")] == ["on disk", "ckpt.pt"] * 5
    assert checkpoint()["step"] == 5 and len(list(Path("out/tiny").glob("*.tmp"))) == (code == 130)
    trained()
    assert_same_run("out/tiny", "out/straight")
    assert not list(Path("out/tiny").glob("*.tmp"))


def test_a_file_that_may_not_be_read_is_one_line(monkeypatch, refused):
    monkeypatch.setattr(t, "source_files", Mock(side_effect=PermissionError(13, "Permission denied", "corpus")))
    refused("Permission denied: 'corpus'")


def flipped(data: bytes) -> bytes:
    """One bit in the middle, which is a weight: torch.load takes it as it is."""
    half = len(data) // 2
    return data[:half] + bytes([data[half] ^ 1]) + data[half + 1:]


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-2])])
def test_tokens_that_are_not_those_of_their_manifest_are_refused_with_the_folder_to_delete(damage, trained, refused):
    trained("--max_steps=1")
    (path,) = Path("data").glob("*/val.bin")
    damage(path)
    refused(f"delete {path.parent}", "--max_steps=1", "--overwrite")


@pytest.mark.parametrize("name, damage", [
    ("ckpt.pt", flipped), ("ckpt.pt", lambda data: data[:-100]), ("ckpt.pt", lambda data: b"junk"),
    ("config.json", lambda data: data[:-100]),
    ("config.json", lambda data: b"[1]"), ("config.json", lambda data: b"{}"), ("config.json", None)])
def test_a_damaged_run_is_refused_in_one_line_to_continue_and_to_start_from(interrupted, refused, name, damage):
    interrupted(12)
    path = Path("out/tiny", name)
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    refused("out/tiny")
    refused("out/tiny", "--init_from=out/tiny", "--out_dir=out/next")


def test_neither_logging_nor_evaluation_nor_checkpoints_change_the_weights(trained):
    often = ("--eval_interval=1", "--log_interval=1", "--checkpoint_interval=1", "--eval_tokens=9999")
    assert same(trained("--out_dir=out/a", "--max_steps=12"), trained("--out_dir=out/b", "--max_steps=12", *often))


@pytest.mark.parametrize("shape", ["--expert_groups=None", "--expert_groups=[(2, 16), (2, 8)]"])
def test_a_run_can_start_from_the_weights_of_another(shape, trained, refused):
    trained("--max_steps=10", shape)
    refused("--router=softmax", "--init_from=out/tiny", "--out_dir=out/next", shape, "--router=sigmoid")
    trained("--max_steps=1", "--init_from=out/tiny", "--out_dir=out/next", shape, "--bias_rate=0.01")
    assert log("out/next")[0]["val_ce"] == pytest.approx(log()[-1]["val_ce"], rel=1e-6)


def test_a_run_can_start_from_a_hugging_face_folder_and_says_what_to_set_if_the_shape_differs(trained, refused):
    pytest.importorskip("safetensors")
    m.to_hf(Model(tiny()).init_weights(7), "hf")
    refused("--d_model=32 --n_expert=4", "--init_from=hf", "--d_model=64", "--n_expert=8")
    refused("nowhere has no config.json", "--init_from=nowhere")
    still = ("--max_steps=1", "--learning_rate=1e-12")
    weights, expected = trained(*still, "--init_from=hf"), trained(*still, "--seed=7", "--out_dir=out/same")
    for name, weight in weights["model"].items():
        torch.testing.assert_close(weight, expected["model"][name], atol=1e-6, rtol=0)


def test_a_run_on_its_way_neither_goes_back_to_the_weights_it_started_from_nor_needs_them(trained, interrupted):
    trained("--max_steps=2", "--out_dir=out/first")
    whole = trained("--init_from=out/first", "--out_dir=out/whole")
    interrupted(6, "--init_from=out/first")
    shutil.rmtree("out/first")
    assert same(trained("--init_from=out/first"), whole)


# --- evaluation -----------------------------------------------------------------------------------------------------

def evaluation(model: Model, tokens: np.ndarray, **changes) -> tuple[float, float]:
    config = tiny(**changes)
    return t.evaluate(model, Given(config, tokens), config)


@pytest.fixture
def held_out() -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, 256, 32 * 20 + 1)
    tokens[::7] = 256                                                # end-of-text
    return tokens


@pytest.mark.parametrize("micro_batch", [1, 3, 50])
def test_validation_is_cross_entropy_alone_on_fixed_windows_by_hand(held_out, micro_batch):
    """160 tokens are five windows of 32, every fourth of the 20. End-of-text costs nats and holds no byte."""
    model = Model(tiny()).init_weights(1)
    rows = torch.from_numpy(np.stack([held_out[start:start + 33] for start in range(0, 640, 128)]))
    logits = model(rows[:, :-1]).logits.flatten(0, 1).double()
    nats = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum").item()
    n_bytes = int((rows[:, 1:] < 256).sum())
    assert n_bytes < 160
    ce, bits = evaluation(model, held_out, eval_tokens=160, aux_coef=9.0, z_coef=9.0, micro_batch=micro_batch)
    assert ce == pytest.approx(nats / 160, rel=1e-5) and bits == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_evaluation_is_without_noise_and_under_the_capacity_of_evaluation(held_out):
    def loss(**changes):
        return evaluation(Model(tiny(**changes)).init_weights(1), held_out, **changes)

    trained, dropping = dict(router_noise=9.0, capacity_factor=0.2), dict(eval_capacity_factor=0.5)
    assert loss(**trained) == loss() and loss(**trained, **dropping) == loss(**dropping) != loss()
    assert loss(router="random") == loss(router="random"), "a router that draws, draws the same in each evaluation"


def test_evaluation_leaves_no_state(held_out):
    """Not in the weights, not in the gradients, not in the random numbers, not in the mode; and it can be repeated."""
    model = Model(tiny()).init_weights(1)
    before, random_state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    first = evaluation(model, held_out)
    assert evaluation(model, held_out) == first
    assert same(before, dict(model.state_dict())) and torch.equal(random_state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters()) and all(part.training for part in model.modules())
    model.eval()
    evaluation(model, held_out)
    assert not any(part.training for part in model.modules()), "a model in evaluation mode stays in it"


# --- what a run leaves ----------------------------------------------------------------------------------------------

def test_a_run_prints_its_plan_its_progress_and_a_sample_and_logs_a_line_a_step(command, figures):
    code, out, err = command()
    assert code == 0 and err == ""
    for word in ("parameters", "active", "training and", "run: 20 steps, 2,560 tokens", "epochs", "FLOPs", "GiB",
                 "--- a sample ---", "done: "):
        assert word in out, word
    assert len(out.partition("--- a sample ---")[2]) > 20
    printed = [line for line in out.splitlines() if line.startswith("step") and "validation" not in line]
    assert [int(line.split()[1]) for line in printed] == [4, 9, 14, 19]
    for word in ("tokens", "ce", "bits/byte", "balance", "load", "lr", "tok/s", "mfu n/a", "mem", "left"):
        assert all(word in line for line in printed), word
    assert [(line["step"], line["tokens"]) for line in training()] == [(i, 128 * (i + 1)) for i in range(20)]
    for line in training():
        assert {"z", "lr", "grad_norm", "skipped", "tokens_per_s", "seconds", "dead_experts"} <= line.keys()
        assert line["balance"] >= 0.99 and 1 <= line["load_max_over_mean"] <= 2 and line["dropped"] == 0   # E / K = 2
        assert 0 <= line["entropy"] <= math.log(4) and line["mfu"] is None and line["memory"] > 2**20
        assert line["bits_per_byte"] >= line["ce"] / math.log(2)                   # end-of-text is no byte
    loads = np.array([line["load"] for line in training() if "load" in line])
    assert loads.shape == (4, 2, 4) and loads.sum(2) == pytest.approx(1, abs=1e-3)
    assert [line["step"] for line in log() if line.get("val_bits_per_byte", 0) > 0] == [0, 10, 20]


def test_a_sample_that_the_terminal_cannot_show_does_not_end_a_run_in_an_error(command, monkeypatch):
    """Bytes that make no character are written as U+FFFD, which an ASCII or Latin-1 terminal does not have."""
    monkeypatch.setattr(t, "write_text", lambda *_, **__: ["caf\ufffd"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert command("--max_steps=2")[0] == 0


def test_a_run_leaves_its_results_and_figures_which_can_be_drawn_again_for_one_run_and_for_several(
        trained, request, capsys):
    trained()
    sizes = m.count(tiny())
    expected = {"name": "tiny", "status": "done", "tokens": 2560, "steps": 20, "skipped": 0, "n_total": sizes["total"],
                "n_active": sizes["active"], "n_active_without_embeddings": sizes["active"] - 264 * 32, "n_expert": 4,
                "top_k": 2, "flops": sizes["flops_per_token"] * 2560, "dataset": "corpus", "tokenizer": "bytes",
                "dtype": "float32", "torch": torch.__version__}
    assert expected.items() <= result().items()
    assert {"loss", "bits_per_byte", "seconds", "tokens_per_s", "peak_memory", "device", "python"} <= result().keys()
    assert result()["loss"] == log()[-1]["val_ce"] < log()[0]["val_ce"], "it learnt something"
    assert json.loads(Path("out/tiny/config.json").read_text()).keys() >= {f.name for f in fields(t.Config)}
    request.getfixturevalue("figures")
    trained("--max_steps=2", "--out_dir=out/b")
    ours = [Path(f"out/b/{name}.png") for name in ("loss", "experts")]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in ours)
    Path("out/b/loss.png").unlink()
    t.main(["draw", "out/tiny", "out/b"])
    assert all(path.is_file() for path in (*ours, Path("out/tiny/experts.png"), Path("out/tiny-b.png")))
    Path("out/begun").mkdir()
    Path("out/begun/log.jsonl").write_text("")
    for bad in (["draw"], ["draw", "out/nowhere"], ["draw", "out/begun"]):
        with pytest.raises(BadInput, match=r"run|folders"):
            t.main(bad)


def test_the_sizes_of_a_config_print_as_a_table_and_as_json(capsys):
    path = str(ROOT / "configs/large_moe_1p3b.py")
    t.main([path, "--dry_run"])
    table = capsys.readouterr().out
    assert "1,083.2M" in table and "781.2M" in table and "1,394.4M" in table and "1 run, " in table
    t.main([path, "--dry_run", "--json"])
    sizes = json.loads(capsys.readouterr().out)
    assert set(sizes) == {"total", "active", "total_untied", "active_untied", "embedding", "flops_per_token", "memory",
                          *t.budget(t.read_config(path)), "flops_paid"}
    assert sizes["memory"]["total"] == sum(n for name, n in sizes["memory"].items() if name != "total")
    t.main([str(ROOT / "configs/slicing/shared.py"), "--dry_run", "--json", "--only=routed-4"])
    assert [run["name"] for run in json.loads(capsys.readouterr().out)] == ["routed-4-s1", "routed-4-s2", "routed-4-s3"]


def test_one_tokens_journey_is_read_off_the_running_lines(trained, capsys):
    trained("--max_steps=1")
    t.main(["trace", "out/tiny", "--text", "import os"])
    out = capsys.readouterr().out
    model, _ = m.load_run("out/tiny")
    ids = torch.tensor([list(b"import o")])
    with torch.no_grad():
        vector, found = model.embed(ids)[0, -1], []
        with m.using(m.PLAIN._replace(route=lambda *args: found.append(m.route(*args)) or found[-1])):
            logits, ce = model(ids).logits[0, -1], model(ids, torch.tensor([list(b"mport os")])).ce
    routing = found[0]
    for name, own in {"x 1x8x32": vector, "weights 8x2": routing.weights[-1], "experts 8x2": routing.experts[-1],
                      "ce scalar": ce}.items():
        assert f"{name}: {' '.join(f'{x:.3g}' for x in own.flatten()[:3].tolist())}" in out, name
    rows = int(routing.counts[routing.experts[-1, 0]])
    assert f"gate {rows}x16: " in out and f"{logits.softmax(-1).max():.1%}" in out.splitlines()[-1]
    lines = [line for line in out.splitlines() if line.startswith(("model.py:", "router.py:"))]
    for line in lines:                                               # each stands in the file as it is printed
        file, number = line.split()[0].split(":")
        assert (ROOT / file).read_text().splitlines()[int(number) - 1].strip().startswith(line[13:60].strip())
    where = [line.split()[0] for line in lines]
    assert len(where) > 25 and len(set(where)) == len(where)
    order = iter(where)
    shown = re.findall(r"^((?:router|model)\.py:\d+) ", (ROOT / "README.md").read_text(), re.M)
    assert len(shown) > 10 and all(any(one == ran for ran in order) for one in shown), "the README's, in this order"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")                # torch.compile looks at it itself
def test_a_compiled_model_learns_the_same(trained):
    trained("--max_steps=4"), trained("--max_steps=4", "--compile", "--out_dir=out/compiled")
    assert log("out/compiled")[-1]["val_ce"] == pytest.approx(log()[-1]["val_ce"], abs=1e-4)


def test_the_routing_picture_holds_each_tokens_first_expert_and_the_share_of_each_kind(trained):
    trained("--max_steps=1")
    text = 'dX "x7(+=\n  \u2603 x = 1\n' * 3                        # longer than seq_len: read in pieces
    Path("text.txt").write_text(text)
    t.main(["draw", "out/tiny", "--text", "text.txt"])
    model, _ = m.load_run("out/tiny")
    found = json.loads(Path("out/tiny/routing.json").read_text())
    ids = list(text.encode())
    assert len(found["tokens"]) == len(ids) > 32 and Path("out/tiny/routing.png").stat().st_size > 10_000
    of_kind = dict(zip(found["kinds"], found["tokens_of_kind"]))
    assert of_kind == {"lower case": 9, "upper case": 3, "space": 18, "quote": 3, "digit": 6, "bracket": 3,
                       "other sign": 9, "line break": 6, "not ASCII": 9}
    experts, share = torch.tensor(found["experts"]), torch.tensor(found["share"])
    assert experts.shape == (2, len(ids)) and share.shape == (2, 4, len(found["kinds"]))
    with torch.no_grad():
        x = model.embed(torch.tensor([ids[:32]]))
        block = model.blocks[0]
        x = x + m.attend(block.attn_norm(x), block.attn, m.rope_tables(0, 32, model.config, "cpu"), None)
        best = (block.ffn_norm(x)[0] @ block.ffn.gate.T).argmax(-1)
    assert torch.equal(experts[0, :32], best)
    spaces = [i for i, n in enumerate(ids) if n == 32]
    expected = experts[1, spaces].bincount(minlength=4) / len(spaces)
    torch.testing.assert_close(share[1, :, found["kinds"].index("space")], expected)


def test_a_token_that_no_expert_served_has_no_first_expert():
    model = Model(tiny(router="expert_choice", top_k=1)).init_weights(0).eval()
    ids, routings = list(range(32)), []
    first = t.first_experts(model, ids)
    hook = model.blocks[0].ffn.register_forward_hook(lambda module, inputs, out: routings.append(out[1]))
    model(torch.tensor([ids]))
    hook.remove()
    idle = routings[0].weights.amax(1) == 0
    assert idle.any() and (first[0, idle] == -1).all() and (first[0, ~idle] >= 0).all()


# --- the machine ----------------------------------------------------------------------------------------------------

def test_a_run_that_cannot_fit_stops_before_allocating_and_names_what_fits(refused, monkeypatch):
    monkeypatch.setattr(Model, "init_weights", lambda *_: pytest.fail("allocated"))
    need = m.memory(tiny(), 4)["total"]
    monkeypatch.setattr(t, "free_memory", lambda device: need * 2)
    fix = re.search(r"(--micro_batch=\d+) (--seq_len=\d+) would fit", refused("", "--micro_batch=4096", "--seq_len=64"))
    with pytest.raises(pytest.fail.Exception, match="allocated"):
        refused("", *fix.groups())
    refused("use a smaller model", "--d_expert=100000")
    refused("", "--d_expert=10000000000000", "--d_model=65536000")


def test_memory_that_only_caches_files_counts_as_free(monkeypatch):
    """A control group's memory.current includes the page cache, which tokenising a corpus fills; it is given back."""
    assert 2**26 < t.free_memory("cpu") < 2**50, "the real machine's can be read"
    Path("memory.max").write_text(f"{8 * 2**30}\n")
    Path("memory.current").write_text(f"{7 * 2**30}\n")
    Path("memory.stat").write_text(f"anon {2**30}\nfile {6 * 2**30}\nactive_file {2**30}\ninactive_file {5 * 2**30}\n")
    Path("meminfo").write_text("MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\n")
    monkeypatch.setattr(t, "Path", lambda name: Path(Path(name).name))
    assert t.free_memory("cpu") == 6 * 2**30


def test_peak_rates_are_known_for_gpus_alone(monkeypatch):
    assert t.peak_flops(tiny()) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert t.peak_flops(t.Config(device="cuda", dtype="bfloat16")) == 989e12
    assert t.peak_flops(t.Config(device="cuda", dtype="float32")) is None
