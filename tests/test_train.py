"""train.py: every run here is a real one, two layers wide and a few steps long, in a folder of its own.

`command(...)` is `python train.py ...` inside this process, from the command line to the exit code, which saves the
import of torch. Real processes are started only where a signal has to hit one.
"""

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

import numpy as np
import pytest
import tiktoken
import torch

import model as m
import train as t
from model import BadInput, Model
from router import POLICIES

ROOT = Path(t.__file__).parent
TINY = dict(n_layer=2, d_model=32, n_head=2, n_kv_head=1, d_head=16, n_expert=4, top_k=2, d_expert=16, vocab_size=264,
            seq_len=32, dataset="corpus", micro_batch=4, max_steps=20, learning_rate=3e-3, eval_interval=10,
            eval_tokens=256, log_interval=5, checkpoint_interval=5)
WORDS = "def return self value for in range print if not else class import of the a x y = ( ) : + 1 2".split()

DRAW_FIGURES = t.draw_figures


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder with tiny.py and a corpus of 80 small documents; signal handlers come back afterwards.

    Drawing takes longer than such a run: the figures of real runs are drawn by the tests that ask for `figures`.
    """
    monkeypatch.chdir(tmp_path)
    Path("tiny.py").write_text("".join(f"{name} = {value!r}\n" for name, value in TINY.items()))
    Path("corpus").mkdir()
    for i, text in enumerate(texts(80)):
        Path(f"corpus/{i:02d}.txt").write_text(text)
    monkeypatch.setattr(t, "draw_figures", lambda out: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def figures(folder, monkeypatch):
    monkeypatch.setattr(t, "draw_figures", DRAW_FIGURES)


def texts(n: int) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=60)) + "\n" for _ in range(n)]


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `python train.py tiny.py *arguments` in this process: (exit code, standard output, standard error)."""

    def run(*arguments: str, config: str = "tiny.py") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", config, *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as leave:
            m.run_script(t.main)
        return leave.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(command):
    """The command must leave with code 2 and one line on standard error that says this, and write no run."""

    def run(says: str, *arguments: str, config: str = "tiny.py") -> None:
        code, _, err = command(*arguments, config=config)
        assert code == 2, err
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert says in err, err
        assert not Path("out").exists() and not list(Path().glob("data/*.tmp")), "something was left behind"

    return run


def lengths_of(tokenizer, vocab_size: int) -> torch.Tensor:
    texts = t.token_texts(tokenizer)
    return torch.tensor([len(text) for text in texts] + [0] * (vocab_size - len(texts)))


def tiny(**changes) -> t.Config:
    return t.read_config("tiny.py", changes)


def trained(**changes) -> dict:
    """Train in this process, without the command line, and return the checkpoint."""
    config = tiny(**changes)
    assert t.run(config) == 0
    return checkpoint(config.out_dir)


def checkpoint(out: str = "out/tiny") -> dict:
    return torch.load(f"{out}/ckpt.pt", weights_only=True)


def log(out: str = "out/tiny") -> list[dict]:
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def training(out: str = "out/tiny") -> list[dict]:
    return [line for line in log(out) if "ce" in line]


def same(a, b) -> bool:
    """Equal to the last bit, through dictionaries and lists; how many seconds a run took may differ."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# --- the configuration ----------------------------------------------------------------------------------------------


def test_a_misspelt_name_gets_the_nearest_one_in_a_file_and_on_the_command_line(refused):
    refused("did you mean n_layer?", "--n_layers=24")
    Path("bad.py").write_text("n_layers = 24\n")
    refused("did you mean n_layer?", config="bad.py")


@pytest.mark.parametrize("name, value, wanted", [
    ("n_layer", "two", "int"), ("n_layer", 1.5, "int"), ("n_layer", True, "int"), ("n_layer", None, "int"),
    ("learning_rate", "fast", "float"), ("learning_rate", math.inf, "float"), ("learning_rate", math.nan, "float"),
    ("qk_norm", 1, "bool"), ("qk_norm", "yes", "bool"), ("batch_tokens", "128k", "int or list or None"),
    ("max_tokens", [1], "int or None"),
])
def test_a_value_of_the_wrong_type_is_refused_wherever_it_stands(refused, name, value, wanted):
    refused(f"{name} = ", f"--{name}={value}")
    Path("bad.py").write_text(f"from math import inf, nan\ndel inf, nan\n{name} = {literal(value)}\n")
    refused(f"must be {wanted}", config="bad.py")


def literal(value) -> str:
    return f"float('{value}')" if isinstance(value, float) and not math.isfinite(value) else repr(value)


def test_text_fields_refuse_numbers_in_a_file(refused):
    Path("bad.py").write_text("dataset = 3\n")
    refused("dataset = 3 must be str", config="bad.py")


@pytest.mark.parametrize("arguments, says", [
    ("--top_k=5", "top_k = 5 must be 1 to n_expert = 4"),
    ("--batch_tokens=200", "multiple of micro_batch * seq_len = 128, say 256"),
    ("--batch_tokens=0", "batch_tokens = 0"),
    ("--batch_tokens=-128", "batch_tokens = -128"),
    ("--batch_tokens=[(0,128),(0,256)]", "goes up"),
    ("--batch_tokens=[(64,128)]", "starts at token 0"),
    ("--batch_tokens=[]", "pairs"),
    ("--batch_tokens=[(0,128,3)]", "pairs"),
    ("--batch_tokens=[(0,1e999)]", "batch_tokens"),
    ("--beta2=1", "beta2 = 1.0 must be in [0, 1)"),
    ("--learning_rate=-1", "learning_rate = -1.0 must be positive"),
    ("--learning_rate=0", "learning_rate = 0.0 must be positive"),
    ("--min_learning_rate=1", "must not exceed learning_rate"),
    ("--weight_decay=-0.1", "weight_decay = -0.1 must not be negative"),
    ("--warmup=-1", "warmup = -1.0 must not be negative"),
    ("--d_head=15", "d_head = 15 must be even"),
    ("--n_kv_head=3", "multiple of n_kv_head"),
    ("--max_steps=0", "max_steps = 0 must be positive"),
    ("--max_tokens=0", "max_tokens = 0 must be positive"),
    ("--eval_interval=0", "eval_interval = 0 must be positive"),
    ("--micro_batch=0", "micro_batch = 0 must be positive"),
    ("--seed=-1", "seed = -1 must not be negative"),
    ("--seed=100000000000000000000", "seed"),
    ("--schedule=linear", "must be one of cosine, constant"),
    ("--dtype=float16", "must be one of float32, bfloat16"),
    ("--device=tpu", "must be cpu, cuda, cuda:N or mps"),
    ("--device=cpu:first", "device"),
    ("--device=mps", "device"),
    ("--out_dir=" + "x" * 300, "out_dir"),
    ("--tokenizer=" + "x" * 5000, "tokenizer"),
    ("--dataset=" + "x" * 5000, "dataset"),
    ("--router=sotfmax", "did you mean softmax?"),
    ("--seq_len=64 --max_seq_len=32", "must not exceed max_seq_len"),
    ("--vocab_size=256", "vocab_size = 256 is less than the 257 of tokenizer 'bytes'"),
    ("--aux_coef=1" + "0" * 400, "aux_coef"),
    ("--max_steps={[]:1}", "max_steps"),
    ("--dataset=", "dataset"),
    ("configs/second.py", "unknown argument configs/second.py"),
])
def test_an_impossible_value_is_one_line_and_leaves_nothing_behind(refused, arguments, says):
    refused(says, *arguments.split())


@pytest.mark.parametrize("text, says", [
    ("n_layer = 1 / 0\n", "ZeroDivisionError"), ("n_layer = = 2\n", "SyntaxError"), ("import nowhere\n", "nowhere"),
    ("raise ValueError('one\\ntwo')\n", "ValueError"), ("raise SystemExit('no')\n", "bad.py"),
])
def test_a_config_file_that_does_not_run_is_one_line(refused, text, says):
    Path("bad.py").write_text(text)
    refused(says, config="bad.py")


def test_a_config_file_that_is_not_there_is_one_line(refused):
    refused("nowhere.py is no config file", config="nowhere.py")
    refused("corpus is no config file", config="corpus")


def test_help_lists_every_field_with_its_meaning_and_default(monkeypatch, capsys):
    with pytest.raises(SystemExit) as leave:
        t.main(["--help"])
    text, meanings = " ".join(capsys.readouterr().out.split()), t.field_help()
    assert leave.value.code == 0
    for f in fields(t.Config):
        meaning = " ".join(meanings[f.name].split())
        assert len(meaning) > 5 and f"{meaning} (default {f.default!r})" in text, f.name


def test_the_source_is_read_once_for_the_meanings_of_all_fields(monkeypatch):
    """Reading a class's source parses the whole file: once a field made every command wait for seconds."""
    read, getsource = [], inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda what: read.append(what) or getsource(what))
    t.parse_command_line(["tiny.py"])
    assert len(read) <= 3


def test_the_command_line_says_the_same_as_a_file():

    def read(*words):
        return t.read_config("tiny.py", t.parse_command_line(["tiny.py", *words])[1])

    assert asdict(read("--max_tokens=1e9")) == asdict(tiny(max_tokens=1_000_000_000))
    read = read("--compile", "--qk_norm=false", "--tie_embeddings", "False", "--max_steps", "7", "--rope_base=10000",
                "--max_tokens=None", "--batch_tokens=[(0, 128), (1e3, 256)]")
    assert (read.compile, read.qk_norm, read.tie_embeddings, read.max_steps) == (True, False, False, 7)
    assert read.rope_base == 10_000.0 and isinstance(read.rope_base, float) and read.max_tokens is None
    assert t.ramp(read) == [(0, 128), (1000, 256)]
    assert t.ramp(tiny()) == [(0, 128)], "without batch_tokens a step is one micro-batch"
    assert t.ramp(tiny(batch_tokens=512)) == [(0, 512)]


def test_the_run_is_kept_under_the_config_files_name():
    assert tiny().out_dir == "out/tiny" and tiny(out_dir="elsewhere").out_dir == "elsewhere"


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_in_the_repository_is_accepted(path):
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


def test_the_default_needs_no_download_and_holds_millions_of_tokens(monkeypatch):
    config = t.Config()
    assert (config.dataset, config.tokenizer) == ("stdlib", "bytes")
    files = t.source_files("stdlib")
    names = {path.name for path in files}
    assert {"argparse.py", "gzip.py", "ast.py"} <= names and not any("site-packages" in str(p) for p in files)
    assert sum(path.stat().st_size for path in files) > 5_000_000
    monkeypatch.setattr(t, "source_files", lambda dataset: files[:150])
    train, val = prepared(dataset="stdlib")
    assert len(train) > 3 * len(val) > 0
    assert sorted(decoded(train) + decoded(val)) == sorted(path.read_bytes().decode() for path in files[:150])


def write_jsonl(path: str, documents: list[str]) -> None:
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, "wt", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(documents))


def test_a_folder_a_pattern_a_file_and_jsonl_give_the_same_documents():
    written = texts(80)
    train, val = prepared(dataset="corpus")
    assert sorted(decoded(train) + decoded(val)) == sorted(written)
    for name in ("corpus.jsonl", "corpus.jsonl.gz"):
        write_jsonl(name, written)
    for dataset in ("corpus/*.txt", "corpus.jsonl", "corpus.jsonl.gz", "corpus.jsonl*"):
        again = prepared(dataset=dataset)
        copies = 2 if dataset.endswith("jsonl*") else 1
        assert all(sorted(decoded(a)) == sorted(decoded(b) * copies) for a, b in zip(again, (train, val))), dataset


def test_a_pattern_with_two_stars_reaches_every_folder_below():
    Path("deep/er").mkdir(parents=True)
    Path("deep/er/a.txt").write_text(texts(1)[0] * 9)
    assert [str(p) for p in t.source_files("deep/**/*.txt")] == ["deep/er/a.txt"]


@pytest.mark.parametrize("start", range(40))
def test_a_single_file_gives_its_last_twentieth_to_validation_whatever_it_says(start):
    """Documents are held out by a checksum: one that hashes to validation must not leave nothing to train on."""
    text = f"{start} " + texts(1)[0] * 20
    Path("one.txt").write_text(text)
    config = tiny(dataset="one.txt")
    train, val = t.prepare(config, m.load_tokenizer("bytes"))
    assert len(t.Shards(train, 32)) > 100 and len(t.Shards(val, 32)) > 5
    whole = np.concatenate([*train, *val])
    assert decoded(whole) == [text]


def test_copies_of_a_document_stay_on_one_side_of_the_split():
    write_jsonl("copies.jsonl", texts(80) * 3)
    train, val = (decoded(tokens) for tokens in prepared(dataset="copies.jsonl"))
    assert val and not set(train) & set(val)
    assert all(side.count(text) == 3 for side in (train, val) for text in side)


def test_text_is_kept_byte_for_byte():
    """Carriage returns, a byte order mark, characters beyond the basic plane, one line of a million characters."""
    written = "\ufeffone\r\ntwo\rthree \U0001f600 grüße \u2028" + "x" * 1_000_000
    Path("odd.txt").write_bytes(written.encode())
    assert decoded(np.concatenate(prepared(dataset="odd.txt"))) == [written]


def test_names_with_spaces_and_accents_work(command):
    Path("my corpus é").mkdir()
    for path in Path("corpus").iterdir():
        path.rename(Path("my corpus é") / path.name)
    code, _, err = command("--dataset=my corpus é", "--out_dir=my runs/ü 1", "--max_steps=2")
    assert code == 0 and Path("my runs/ü 1/result.json").is_file(), err


def test_text_is_tokenised_once_and_described_by_a_manifest(capsys):
    train, val = prepared()
    (shards,) = Path("data").iterdir()
    manifest = json.loads((shards / "manifest.json").read_text())
    assert manifest["dataset"] == "corpus" and manifest["tokenizer"] == "bytes" and len(manifest["files"]) == 80
    assert manifest["tokens"] == {"train": len(train), "val": len(val)}
    assert "tokenising" in capsys.readouterr().out
    before = {p: p.stat().st_mtime_ns for p in shards.iterdir()}
    again = prepared()
    assert "tokenising" not in capsys.readouterr().out and all(map(np.array_equal, again, (train, val)))
    assert before == {p: p.stat().st_mtime_ns for p in shards.iterdir()} and len(list(Path("data").iterdir())) == 1
    Path("corpus/00.txt").write_text("something else entirely, " * 20)
    assert not np.array_equal(prepared()[0], train) and "tokenising" in capsys.readouterr().out


def test_a_leftover_of_a_killed_tokenisation_is_no_obstacle():
    """In a container the next process often has the same process id, so the same temporary name."""
    prepared()
    (shards,) = Path("data").iterdir()
    shards.rename(f"{shards}.{os.getpid()}.tmp")
    assert len(prepared()[0]) > 0 and shards.is_dir()


def test_two_runs_that_tokenise_at_once_do_not_disturb_each_other(monkeypatch):
    """The other run finishes between this one's look and its rename."""
    first = prepared()
    (shards,) = Path("data").iterdir()
    manifest = json.loads((shards / "manifest.json").read_text())
    del manifest["tokens"]
    monkeypatch.setattr(Path, "exists", lambda path: path != shards and (path.is_dir() or path.is_file()))
    t.tokenise(t.source_files("corpus"), m.load_tokenizer("bytes"), shards, manifest)
    assert all(map(np.array_equal, prepared(), first)) and len(list(Path("data").iterdir())) == 1


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


def test_parquet_is_read_by_its_text_column(refused):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow, which is optional")
    from pyarrow import table
    parquet.write_table(table({"text": texts(80), "n": list(range(80))}), "corpus.parquet")
    assert all(map(np.array_equal, prepared(dataset="corpus.parquet"), prepared()))
    parquet.write_table(table({"body": texts(80)}), "other.parquet")
    refused("other.parquet", "--dataset=other.parquet")
    parquet.write_table(table({"text": ["a", None]}), "null.parquet")
    refused("null.parquet", "--dataset=null.parquet")
    Path("broken.parquet").write_bytes(b"PAR1 not really PAR1")
    refused("broken.parquet", "--dataset=broken.parquet")


def test_parquet_without_pyarrow_is_one_line(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    Path("a.parquet").write_bytes(b"PAR1")
    refused("pip install pyarrow", "--dataset=a.parquet")


def bad_inputs() -> dict[str, tuple[bytes, str]]:
    good = gzip.compress(b'{"text": "' + random.Random(0).randbytes(3000).hex().encode() + b'"}\n')
    return {
        "empty.txt": (b"", "holds no text"),
        "tiny.txt": (b"just this", "less than one sequence"),
        "binary.txt": (b"\x7fELF\0\0\0", "is binary"),
        "latin.txt": ("grüße".encode("latin-1") * 99, "is not UTF-8"),
        "latin.jsonl": ('{"text": "grüße"}\n'.encode("latin-1"), "is not UTF-8"),
        "line.jsonl": (b'{"text": "a"}\n{"text": \n', "line.jsonl line 2"),
        "list.jsonl": (b"[1]\n", "line.jsonl line 1".replace("line.", "list.")),
        "field.jsonl": (b'{"txt": "a"}\n', "field.jsonl line 1"),
        "null.jsonl": (b'{"text": null}\n', "null.jsonl line 1"),
        "nothing.jsonl": (b'{"text": ""}\n' * 9, "less than one sequence"),
        "surrogate.jsonl": (b'{"text": "a"}\n{"text": "\\ud800"}\n', "surrogate.jsonl line 2"),
        "deep.jsonl": (b"[" * 100_000 + b"\n", "deep.jsonl line 1"),
        "digits.jsonl": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", "digits.jsonl line 1"),
        "cut.jsonl.gz": (good[:900], "cut.jsonl.gz cannot be read"),
        "not.jsonl.gz": (b"plain", "not.jsonl.gz cannot be read"),
        "corrupt.jsonl.gz": (good[:900] + bytes([good[900] ^ 255]) + good[901:], "corrupt.jsonl.gz cannot be read"),
        "cut_train.bin": (np.array([20240520, 1, 900] + [0] * 253, np.int32).tobytes() + b"\0" * 9, "is it cut off?"),
        "header_train.bin": (np.array([20240520, 1, 9], np.int32).tobytes(), "is it cut off?"),
        "empty_train.bin": (b"", "does not begin like an llm.c token shard"),
        "other_train.bin": (b"something else", "does not begin like an llm.c token shard"),
    }


@pytest.mark.parametrize("name", bad_inputs())
def test_an_input_that_cannot_be_trained_on_gets_its_one_line(refused, name):
    data, says = bad_inputs()[name]
    Path(name).write_bytes(data)
    refused(says, f"--dataset={name}")


def test_a_place_without_text_gets_its_one_line(refused):
    Path("bare").mkdir()
    Path("bare/picture.png").write_bytes(b"\x89PNG")
    refused("holds no file ending in .txt", "--dataset=bare")
    refused("neither 'stdlib' nor an existing file", "--dataset=nowhere")
    refused("neither 'stdlib' nor an existing file", "--dataset=corpus/*.md")
    refused("cannot be read", "--dataset=corpu*")
    Path("bare/picture.png").rename("bare/loop.txt")
    os.symlink("gone.txt", "bare/broken.txt")
    refused("bare/loop.txt is not UTF-8", "--dataset=bare")
    llm_c_shard("only/train.bin", np.arange(400, dtype=np.uint16))
    refused("no .bin shards for validation", "--dataset=only")


def test_a_token_without_a_row_in_the_embedding_stops_before_training(refused):
    tokens = np.arange(400, dtype=np.uint16) % 264
    llm_c_shard("shards/train.bin", tokens)
    tokens[77] = 264
    llm_c_shard("shards/val.bin", tokens)
    refused("token 264: set vocab_size = 264 to at least 265", "--dataset=shards")


# --- tokenizers -----------------------------------------------------------------------------------------------------


def write_ranks(path: str, n_merged: int) -> None:
    """A ranks file: the 256 bytes, then n_merged invented tokens, longer ones first, so that no order is sorted."""
    import base64
    invented = [b"%x" % (0xFFFFFF - i) for i in range(n_merged)]
    tokens = [bytes([i]) for i in range(256)] + invented
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


def test_a_small_ranks_file_trains_with_end_of_text_alone(command):
    write_ranks("mine.tiktoken", 100)
    code, _, err = command("--tokenizer=mine.tiktoken", "--vocab_size=360", "--max_steps=2")
    assert code == 0, err
    assert m.load_tokenizer("mine.tiktoken").eot_token == 356


def test_every_token_counts_with_the_bytes_it_stands_for():
    """tiktoken lists its tokens in alphabetical order, not by number."""
    write_ranks("mine.tiktoken", 100)
    tokenizer = m.load_tokenizer("mine.tiktoken")
    lengths = lengths_of(tokenizer, 400)
    assert lengths[:356].tolist() == [len(tokenizer.decode_single_token_bytes(i)) for i in range(356)]
    assert lengths[356:].sum() == 0, "end-of-text and padding stand for no text"


def test_a_tokenizer_with_a_gap_in_its_numbers_counts_right():
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 257}
    gap = tiktoken.Encoding("gap", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    assert lengths_of(gap, 260)[255:].tolist() == [1, 0, 2, 0, 0]


def test_the_same_tokens_in_another_order_are_another_tokenizer():
    """Shards of one must not be read as the other's."""
    write_ranks("mine.tiktoken", 100)
    first = prepared(tokenizer="mine.tiktoken", vocab_size=400)[0]
    lines = [line.split()[0] for line in Path("mine.tiktoken").read_text().splitlines()]
    Path("mine.tiktoken").write_text("".join(f"{token} {i}\n" for i, token in enumerate([*lines[1:], lines[0]])))
    assert not np.array_equal(prepared(tokenizer="mine.tiktoken", vocab_size=400)[0], first)


def test_a_tokenizer_that_cannot_be_had_gets_its_one_line(refused, monkeypatch):
    refused("did you mean gpt2?", "--tokenizer=gpt3")
    Path("bad.tiktoken").write_text("YQ== 0\nYg== 2\n")
    refused("not a tiktoken ranks file", "--tokenizer=bad.tiktoken")

    def offline(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    refused("TIKTOKEN_CACHE_DIR", "--tokenizer=gpt2")
    refused("'bytes', which needs none", "--tokenizer=o200k_base")


# --- what step s is made of -----------------------------------------------------------------------------------------


class Given(t.Corpus):
    """Steps over these tokens, which are for training and for validation."""

    def __init__(self, config: t.Config, tokens: np.ndarray):
        self.config = config
        self.train = self.val = t.Shards([tokens], config.seq_len)
        self.token_bytes = lengths_of(m.load_tokenizer("bytes"), config.vocab_size)


def batches(n_tokens: int = 32 * 10 + 1, **changes) -> Given:
    """Steps over 0, 1, 2, ...: the first token of a row divided by seq_len is the number of its window."""
    return Given(tiny(**changes), np.arange(n_tokens, dtype=np.uint16))


def block_numbers(b: t.Data, step: int) -> list[int]:
    return [int(row[0]) // 32 for x, _ in b.micro_batches(step) for row in x]


def test_targets_are_the_inputs_one_token_later():
    for x, y in batches().micro_batches(3):
        assert x.shape == y.shape == (4, 32) and torch.equal(y, x + 1)


def test_a_batch_is_a_function_of_seed_and_step_alone():
    straight, jumping = batches(batch_tokens=384), batches(batch_tokens=384)
    in_order = [block_numbers(straight, step) for step in range(9)]
    assert [block_numbers(jumping, step) for step in (7, 0, 8, 3)] == [in_order[s] for s in (7, 0, 8, 3)]
    assert block_numbers(batches(seed=2), 0) != block_numbers(batches(seed=1), 0)


def test_each_block_comes_once_an_epoch_and_epochs_differ_in_order():
    b = batches()
    drawn = [n for step in range(10) for n in block_numbers(b, step)]          # 40 samples, 10 blocks: four epochs
    epochs = [drawn[i:i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]


def test_accumulation_does_not_change_the_batches():
    for step in (0, 1, 5):
        drawn = [block_numbers(batches(micro_batch=size, batch_tokens=256), step) for size in (1, 2, 4, 8)]
        assert len(drawn[0]) == 8 and drawn[1:] == drawn[:-1]


def test_no_block_spans_two_shards_and_every_full_block_is_there():
    shards = [np.arange(0, 100), np.arange(100, 120), np.arange(200, 265)]            # 3, 0 and 2 blocks of 32
    b = t.Shards(shards, 32)
    ends = [(int(b[i][0]), int(b[i][-1])) for i in range(len(b))]
    assert ends == [(0, 32), (32, 64), (64, 96), (200, 232), (232, 264)]


def test_a_batch_ramp_stands_where_it_should_by_hand():
    """128 tokens a step until token 300 (three steps, the last one passes it), 256 until 1000, then 512."""
    config = tiny(batch_tokens=[(0, 128), (300, 256), (1000, 512)])
    expected = [(0, 128), (128, 128), (256, 128), (384, 256), (640, 256), (896, 256), (1152, 512), (1664, 512)]
    assert [t.position(config, step) for step in range(8)] == expected
    b = batches(batch_tokens=[(0, 128), (300, 256), (1000, 512)])
    drawn = [n for step in range(8) for n in block_numbers(b, step)]
    assert drawn == [n for step in range(17) for n in block_numbers(batches(), step)], "a ramp only groups differently"


def test_a_ramp_stage_that_is_passed_in_one_step_is_left_out():
    config = tiny(batch_tokens=[(0, 512), (100, 128), (200, 256)])
    assert [t.position(config, step) for step in range(3)] == [(0, 512), (512, 256), (768, 256)]


def test_max_tokens_stops_at_the_first_step_that_reaches_it():
    steps = {1: 1, 128: 1, 129: 2, 1280: 10, 1281: 11, 10**9: 20}
    assert {n: t.total_steps(tiny(max_tokens=n)) for n in steps} == steps
    ramp = [(0, 128), (300, 256)]
    assert t.total_steps(tiny(max_tokens=640, batch_tokens=ramp)) == 4
    assert t.total_steps(tiny(max_tokens=641, batch_tokens=ramp)) == 5
    trained(max_tokens=640, batch_tokens=ramp)
    assert [line["tokens"] for line in training()] == [128, 256, 384, 640]


def rates(steps, **changes) -> list[float]:
    config = tiny(**{"learning_rate": 1.0, "max_steps": 100} | changes)
    return [rate(config, step) for step in steps]


def rate(config: t.Config, step: int) -> float:
    return t.learning_rate(config, *t.position(config, step), t.position(config, t.total_steps(config))[0])


def test_warmup_rises_in_equal_parts_and_the_first_step_is_not_lost():
    for warmup in (0.1, 10 * 128):                                  # a fraction of the run, the same in tokens
        assert rates((0, 4, 9, 10), warmup=warmup) == pytest.approx([0.1, 0.5, 1, 1])
    assert rates((0, 1), warmup=0) == pytest.approx([1, 0.5 * (1 + math.cos(math.pi / 100))])


def test_cosine_falls_to_the_smallest_rate_by_hand():
    middle, late = rates((55, 99), min_learning_rate=0.2)           # warmup ends at 10; 55 is half of the other 90
    assert middle == pytest.approx(0.6)
    assert late == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 89 / 90)))


def test_constant_stays_and_then_falls_in_a_line_by_hand():
    for decay in (0.2, 20 * 128):
        got = rates((10, 50, 80, 90, 99), schedule="constant", decay=decay, min_learning_rate=0.5)
        assert got == pytest.approx([1, 1, 1, 0.75, 0.5 + 0.5 / 20])
    assert rates((10, 99), schedule="constant", decay=0) == [1, 1]


def test_the_schedule_counts_tokens_so_a_ramp_does_not_bend_it():
    """64 steps of 128 tokens, then 32 of 256: half of the tokens are passed after step 64 of 96."""
    config = tiny(learning_rate=1.0, warmup=0, max_steps=96, batch_tokens=[(0, 128), (64 * 128, 256)])
    assert rate(config, 64) == pytest.approx(0.5)


def test_the_rates_that_are_logged_are_those_of_the_schedule():
    trained(schedule="constant", warmup=0.25, decay=0.25)
    up, down = [0.2, 0.4, 0.6, 0.8, 1], [1, 0.8, 0.6, 0.4, 0.2]
    assert [line["lr"] / 3e-3 for line in training()] == pytest.approx(up + [1] * 10 + down)


# --- the loop -------------------------------------------------------------------------------------------------------


def gradients_of_the_first_step(monkeypatch, **changes) -> tuple[dict, dict]:
    """(name -> gradient before clipping, the line that was logged) of a run of one step."""
    grads, clip = {}, torch.nn.utils.clip_grad_norm_

    def spy(parameters, limit):
        parameters = list(parameters)
        grads.update(enumerate(p.grad.clone() for p in parameters))
        return clip(parameters, limit)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
        trained(max_steps=1, overwrite=True, **changes)
    return grads, training()[0]


def test_accumulated_gradients_are_those_of_the_big_batch(monkeypatch):
    """The balance loss is not linear in the batch, so it is left out; cross-entropy and z are means over tokens."""
    losses = dict(aux_coef=0.0, z_coef=0.1, batch_tokens=256)
    big, line = gradients_of_the_first_step(monkeypatch, micro_batch=8, **losses)
    for size in (4, 1):
        small, other = gradients_of_the_first_step(monkeypatch, micro_batch=size, **losses)
        for name in ("ce", "z", "grad_norm", "bits_per_byte"):
            assert other[name] == pytest.approx(line[name], rel=1e-5), name
        for i, grad in big.items():
            assert (small[i] - grad).norm() <= 1e-5 * grad.norm() + 1e-9
    assert big


def test_balance_and_z_losses_are_added_with_their_coefficients(monkeypatch):
    plain, _ = gradients_of_the_first_step(monkeypatch, aux_coef=0.0, z_coef=0.0)
    both, _ = gradients_of_the_first_step(monkeypatch, aux_coef=0.5, z_coef=0.25)
    config = tiny(aux_coef=0.5, z_coef=0.25)
    model = Model(config).init_weights(config.seed)
    ((x, y),) = t.Corpus(config).micro_batches(0)
    o = model(x, y)
    (0.5 * o.balance + 0.25 * o.z).backward()
    for i, p in enumerate(model.parameters()):
        aux = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(both[i] - plain[i], aux, rtol=1e-3, atol=1e-5)


def test_the_gradient_is_cut_to_grad_clip(monkeypatch):
    """With AdamW's epsilon aside a clipped first step is the unclipped one, so the gradient itself is read."""
    norms, step = [], torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        norms.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    trained(max_steps=3, grad_clip=0.01)
    assert norms == pytest.approx([0.01] * 3, rel=1e-3) and training()[0]["grad_norm"] > 0.02
    norms.clear()
    trained(max_steps=3, grad_clip=0.0, overwrite=True)
    assert norms == pytest.approx([line["grad_norm"] for line in training()], rel=1e-5)


def test_twenty_steps_lose_what_they_always_lost():
    """Cross-entropy of steps 1, 10 and 20 as recorded on a CPU.

    Another number of threads, processor or torch sums in another order and moves the last digits, about 1e-6; a changed
    initialisation, batch order, schedule or gradient moves them by far more than the 1e-3 allowed here.
    """
    trained()
    lines = training()
    assert [lines[i]["ce"] for i in (0, 9, 19)] == pytest.approx([5.7791, 4.1475, 3.7899], abs=1e-3)


def test_a_dense_model_trains_too(command, figures):
    code, out, err = command("--n_expert=1", "--top_k=1", "--max_steps=4")
    assert code == 0 and "no experts" in out, err
    assert Path("out/tiny/loss.png").is_file() and not Path("out/tiny/experts.png").exists()
    assert "dead_experts" not in training()[0] and training()[0]["balance"] == 0


def test_bfloat16_matrix_products_train_too(command):
    code, _, err = command("--dtype=bfloat16", "--max_steps=4")
    assert code == 0 and checkpoint()["model"]["embed.weight"].dtype == torch.float32, err


def test_small_numbers_of_everything_are_fine(command, figures):
    """More sequences in a step than blocks in the text, less to evaluate than a sequence, intervals never met."""
    Path("one.txt").write_text(texts(1)[0])
    code, _, err = command("--dataset=one.txt", "--micro_batch=16", "--max_steps=3", "--eval_tokens=1",
                             "--log_interval=99", "--eval_interval=99", "--checkpoint_interval=99",
                             "--max_seq_len=64", "--seq_len=16")
    assert code == 0, err
    assert len(training()) == 3 and Path("out/tiny/result.json").is_file()


# --- steps that are not finite --------------------------------------------------------------------------------------


def poison(monkeypatch, steps, where: str = "gradient") -> dict[int, dict]:
    """Make these steps not finite, and return the checkpoints as they are saved, by step."""
    saved, calls = {}, []
    clip, forward, save = torch.nn.utils.clip_grad_norm_, Model.forward, t.save_checkpoint

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

    def remember(path, state):
        save(path, state)
        saved[state["step"]] = torch.load(path, weights_only=True)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", bad_gradient)
    monkeypatch.setattr(Model, "forward", bad_loss)
    monkeypatch.setattr(t, "save_checkpoint", remember)
    return saved


def same_values(a: list, b: list) -> bool:
    """Weights, and the optimizer's state in the order of the weights it belongs to."""
    return same([*a[:2], list(a[2].values())], [*b[:2], list(b[2].values())])


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_bad_step_changes_neither_weights_nor_optimizer_and_is_counted(monkeypatch, where, command, figures):
    step, unchanged = torch.optim.AdamW.step, []

    def spy(self, *args, **kwargs):
        def state():
            return copy.deepcopy([*(group["params"] for group in self.param_groups), dict(self.state)])
        before = state() if len(unchanged) else None
        step(self, *args, **kwargs)
        unchanged.append(before is not None and same_values(before, state()))

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    poison(monkeypatch, {6}, where)
    code, out, err = command("--max_steps=9")
    assert code == 0, err
    assert unchanged == [step == 6 for step in range(9)], "this step is skipped, and the next one trains on"
    assert [line["skipped"] for line in training()] == [0] * 6 + [1] * 3
    assert training()[6]["grad_norm"] is None or not math.isfinite(training()[6]["grad_norm"])
    assert "skipped 1" in out
    assert json.loads(Path("out/tiny/result.json").read_text())["skipped"] == 1


def test_every_line_of_the_log_is_strict_json(monkeypatch, command):
    """NaN is no JSON: jq and every browser refuse it."""
    poison(monkeypatch, {6}, "loss")
    assert command("--max_steps=9")[0] == 0
    for line in Path("out/tiny/log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.mark.parametrize("log_interval", [1, 5])
def test_ten_bad_steps_in_a_row_stop_the_run_and_leave_the_last_good_checkpoint(monkeypatch, command, log_interval):
    with monkeypatch.context() as patch:
        good = poison(patch, set())
        assert command("--max_steps=30", "--checkpoint_interval=1", "--out_dir=out/good")[0] == 0
    poison(monkeypatch, range(12, 99))
    code, _, err = command("--max_steps=30", f"--log_interval={log_interval}")
    assert code == t.DIVERGED and err.count("\n") == 1 and "ten steps in a row" in err
    assert len(training()) == (22 if log_interval == 1 else 25) and not Path("out/tiny/result.json").exists()
    assert same(checkpoint()["model"], good[min(12, checkpoint()["step"])]["model"])


def test_weights_that_a_finite_but_huge_step_ruined_do_not_replace_the_last_good_checkpoint(monkeypatch, command):
    """Step 7 is finite and leaves weights under which no later step is: step 10 must not be saved over step 5."""
    step, calls = torch.optim.AdamW.step, []

    def ruin(self, *args, **kwargs):
        step(self, *args, **kwargs)
        calls.append(len(calls))
        if len(calls) == 8:
            with torch.no_grad():
                [p.mul_(1e30) for group in self.param_groups for p in group["params"]]

    monkeypatch.setattr(torch.optim.AdamW, "step", ruin)
    code, _, err = command("--max_steps=40")
    assert code == t.DIVERGED and "ten steps in a row" in err
    saved = checkpoint()
    assert saved["step"] == 5 and all(p.abs().max() < 10 for p in saved["model"].values())


def test_nine_bad_steps_in_a_row_do_not_stop_it(monkeypatch, command):
    poison(monkeypatch, [*range(2, 11), *range(12, 20)])
    assert command("--log_interval=1", "--max_steps=22")[0] == 0
    assert training()[-1]["skipped"] == 17


def test_skipped_steps_are_still_counted_after_a_resume(monkeypatch, command):
    poison(monkeypatch, {3})
    interrupt_after(monkeypatch, 6)
    assert "stopped by SIGINT" in command()[1]
    assert command()[0] == 0
    assert json.loads(Path("out/tiny/result.json").read_text())["skipped"] == 1


# --- interrupted and continued --------------------------------------------------------------------------------------


def interrupt_after(monkeypatch, step: int) -> None:
    """Send this process a SIGINT while it is inside this step; once."""
    log_step, sent = t.Run.step, []

    def hook(self, now, *rest):
        if now == step and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        return log_step(self, now, *rest)

    monkeypatch.setattr(t.Run, "step", hook)


def assert_same_run(out: str, reference: str) -> None:
    """Bit-identical weights and optimizer, and a log that differs only in clocks."""
    assert same(checkpoint(out), checkpoint(reference))
    clocks = {"tokens_per_s", "mfu", "memory", "seconds", "load"}        # load: on the last line of each flush
    def strip(lines):
        return [{k: v for k, v in line.items() if k not in clocks} for line in lines]
    assert strip(log(out)) == strip(log(reference))


@pytest.mark.parametrize("step", [0, 9, 13, 18, 19])
def test_interrupted_at_any_step_and_continued_is_as_if_nothing_had_happened(monkeypatch, command, step):
    arguments = ("--batch_tokens=[(0, 128), (1000, 256)]",)
    assert command("--out_dir=out/straight", *arguments)[0] == 0
    interrupt_after(monkeypatch, step)
    code, out, _ = command(*arguments)
    assert code == 0
    if step < 19:
        assert f"stopped by SIGINT after step {step}: saved; the same command continues" in out
        assert checkpoint()["step"] == step + 1 and not Path("out/tiny/result.json").exists()
        code, out, _ = command(*arguments)
        assert code == 0 and f"continuing at step {step + 1} of 20" in out
    assert_same_run("out/tiny", "out/straight")


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


def test_a_process_that_gets_sigterm_finishes_its_step_saves_and_exits_0(command):
    long = ("--max_steps=200", "--eval_interval=60", "--log_interval=1", "--checkpoint_interval=1000")
    process = start(*long)
    wait_for(process, "step     20")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped by SIGTERM after step" in out, err
    assert 20 < checkpoint()["step"] < 200
    assert command(*long)[0] == 0 and command(*long, "--out_dir=out/straight")[0] == 0
    assert_same_run("out/tiny", "out/straight")


def test_a_process_killed_at_random_moments_continues_to_the_same_weights_bit_for_bit(command):
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
    assert command(*long)[0] == 0 and command(*long, "--out_dir=out/straight")[0] == 0
    assert_same_run("out/tiny", "out/straight")
    assert [line["step"] for line in training()] == list(range(300)), "one line a step, none lost, none doubled"
    assert [line["step"] for line in log() if "val_ce" in line] == [0, 70, 140, 210, 280, 300]


def test_a_line_cut_off_by_a_crash_is_written_again(monkeypatch, command):
    interrupt_after(monkeypatch, 12)
    command()
    with open("out/tiny/log.jsonl", "a") as file:
        file.write('{"step": 13, "tokens": 17')
    assert command()[0] == 0 and [line["step"] for line in training()] == list(range(20))


def files(out: str = "out/tiny") -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(out).iterdir()}


def test_the_same_command_on_a_finished_run_says_so_and_touches_nothing(command):
    assert command()[0] == 0
    before = files()
    code, out, _ = command()
    assert code == 0 and "out/tiny is finished after 20 steps; --overwrite starts anew" in out
    assert {name for name in before | files() if before.get(name) != files().get(name)} == set()


def test_a_run_killed_between_its_last_step_and_its_results_still_gets_them(monkeypatch, command, figures):
    with monkeypatch.context() as patch:
        patch.setattr(t.Run, "end", lambda *_: sys.exit(9))
        assert command()[0] == 9
    code, _, _ = command()
    assert code == 0 and Path("out/tiny/result.json").is_file() and Path("out/tiny/loss.png").is_file()
    assert [line["step"] for line in log() if "val_ce" in line] == [0, 10, 20]


def test_a_changed_config_is_refused_with_the_fields_that_differ(command):
    assert command("--max_steps=5")[0] == 0
    before = files()
    code, _, err = command("--max_steps=5", "--learning_rate=0.1", "--seed=2")
    assert code == 2 and err.count("\n") == 1 and "(seed 1 -> 2; learning_rate 0.003 -> 0.1)" in err
    assert "--overwrite" in err and "out_dir" in err and files() == before


def test_what_leaves_the_numbers_alone_may_change(command, monkeypatch):
    """How often to print and save, and where the folder stands: a run may be moved and continued."""
    assert command("--out_dir=out/straight")[0] == 0
    interrupt_after(monkeypatch, 12)
    assert command("--log_interval=2")[0] == 0
    Path("out/tiny").rename("out/moved")
    code, out, err = command("--log_interval=7", "--checkpoint_interval=2", "--out_dir=out/moved/")
    assert code == 0 and "continuing at step 13" in out, err
    assert_same_run("out/moved", "out/straight")


def test_overwrite_starts_anew(command, monkeypatch):
    assert command("--seed=7", "--out_dir=out/straight")[0] == 0
    interrupt_after(monkeypatch, 12)
    assert command()[0] == 0
    code, out, _ = command("--seed=7", "--overwrite")
    assert code == 0 and "continuing" not in out
    assert_same_run("out/tiny", "out/straight")


def test_overwrite_with_an_impossible_config_throws_nothing_away(command):
    assert command("--max_steps=3")[0] == 0
    before = files()
    for bad in ("--top_k=9", "--dataset=nowhere", "--vocab_size=100", "--tokenizer=gpt3"):
        assert command("--overwrite", bad)[0] == 2 and files() == before, bad


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_a_crash_while_a_checkpoint_is_written_leaves_the_old_one(monkeypatch, command, moment):
    assert command("--out_dir=out/straight")[0] == 0
    save, replace = torch.save, Path.replace

    def cut_short(state, file):
        save(state, file)
        if state["step"] == 10:
            file.truncate(file.tell() // 2)
            raise KeyboardInterrupt

    def no_rename(self, target):
        if Path("out/tiny/ckpt.pt").exists():
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*(torch, "save", cut_short) if moment == "writing" else (Path, "replace", no_rename))
        t.run(tiny())
    assert checkpoint()["step"] == 5
    assert command()[0] == 0
    assert_same_run("out/tiny", "out/straight")
    assert not list(Path("out/tiny").glob("*.tmp"))


def test_a_checkpoint_is_on_disk_before_it_takes_the_old_ones_name(monkeypatch):
    order, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: order.append("fsync") or fsync(fd))
    monkeypatch.setattr(Path, "replace", lambda self, to: order.append("rename") or replace(self, to))
    t.save_checkpoint(Path("ckpt.pt"), {"step": 1})
    assert order[:2] == ["fsync", "rename"] and torch.load("ckpt.pt", weights_only=True) == {"step": 1}


@pytest.mark.parametrize("damage, says", [
    ("ckpt.pt cut", "ckpt.pt"), ("config.json cut", "config.json"), ("config.json gone", "config.json"),
    ("config.json list", "out/tiny"),
])
def test_a_damaged_run_gets_its_one_line_and_is_left_as_it_is(command, monkeypatch, damage, says):
    interrupt_after(monkeypatch, 12)
    assert command()[0] == 0
    name, kind = damage.split()
    path = Path("out/tiny", name)
    path.unlink() if kind == "gone" else path.write_bytes(b"[1]" if kind == "list" else path.read_bytes()[:-100])
    before = files()
    code, _, err = command()
    assert code == 2 and err.count("\n") == 1 and says in err and files() == before


def test_a_lost_log_does_not_stop_a_run(command, monkeypatch):
    interrupt_after(monkeypatch, 12)
    assert command()[0] == 0
    Path("out/tiny/log.jsonl").unlink()
    code, _, err = command()
    assert code == 0 and [line["step"] for line in training()] == list(range(13, 20)), err


def test_an_out_dir_that_cannot_be_one_gets_its_one_line(command):
    for out in ("tiny.py", "tiny.py/below"):
        code, _, err = command(f"--out_dir={out}")
        assert code == 2 and err.count("\n") == 1 and "tiny.py" in err, err
    assert Path("tiny.py").read_text().startswith("n_layer")


def test_two_runs_cannot_share_an_out_dir(command):
    long = ("--max_steps=100000", "--log_interval=1")
    process = start(*long)
    try:
        wait_for(process, "step      1")
        code, _, err = command(*long)
    finally:
        process.kill()
        process.communicate()
    assert code == 2 and err.count("\n") == 1 and "out/tiny" in err


def test_the_text_behind_a_run_may_not_change_under_it(command, monkeypatch):
    interrupt_after(monkeypatch, 12)
    assert command()[0] == 0
    Path("corpus/00.txt").write_text("something else entirely, " * 20)
    code, _, err = command()
    assert code == 2 and err.count("\n") == 1 and "data" in err


def test_neither_logging_nor_evaluation_nor_checkpoints_change_the_weights(command):
    assert command("--out_dir=out/a", "--max_steps=12")[0] == 0
    assert command("--out_dir=out/b", "--max_steps=12", "--eval_interval=1", "--log_interval=1",
                   "--checkpoint_interval=1", "--eval_tokens=9999")[0] == 0
    assert same(checkpoint("out/a"), checkpoint("out/b"))


# --- evaluation -----------------------------------------------------------------------------------------------------


def evaluation(model: Model, tokens: np.ndarray, **changes) -> tuple[float, float]:
    config = tiny(**changes)
    return t.evaluate(model, Given(config, tokens), config)


@pytest.fixture
def held_out() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 257, 32 * 20 + 1)


def test_validation_is_cross_entropy_alone_on_fixed_windows_by_hand(held_out):
    """64 tokens are two windows of 32; 20 blocks give blocks 0 and 10. End-of-text costs nats and holds no byte."""
    model = Model(tiny()).init_weights(1)
    rows = torch.from_numpy(np.stack([held_out[:33], held_out[320:353]]))
    logits = model(rows[:, :-1]).logits.flatten(0, 1).double()
    nats = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum").item()
    n_bytes = int((rows[:, 1:] < 256).sum())
    ce, bits = evaluation(model, held_out, eval_tokens=64, aux_coef=9.0, z_coef=9.0)
    assert ce == pytest.approx(nats / 64, rel=1e-5) and bits == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_evaluation_is_without_noise_and_under_the_capacity_of_evaluation(held_out):
    def loss(**changes):
        return evaluation(Model(tiny(**changes)).init_weights(1), held_out, **changes)

    trained, dropping = dict(router_noise=9.0, capacity_factor=0.2), dict(eval_capacity_factor=0.5)
    assert loss(**trained) == loss() and loss(**trained, **dropping) == loss(**dropping) != loss()
    assert loss(router="random") == loss(router="random"), "a router that draws, draws the same in each evaluation"


def test_evaluation_does_not_depend_on_the_micro_batch(held_out):
    model = Model(tiny()).init_weights(1)
    expected = evaluation(model, held_out, micro_batch=1)
    for size in (3, 7, 50):
        assert evaluation(model, held_out, micro_batch=size) == pytest.approx(expected, rel=1e-5)


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


def test_a_run_prints_its_plan_its_progress_and_a_sample(command):
    code, out, err = command()
    assert code == 0 and err == ""
    for word in ("parameters", "active", "training and", "plan: 20 steps, 2,560 tokens", "epochs", "FLOPs", "GiB",
                 "--- a sample ---", "done: "):
        assert word in out, word
    lines = [line for line in out.splitlines() if line.startswith("step") and "validation" not in line]
    assert [int(line.split()[1]) for line in lines] == [4, 9, 14, 19] or len(lines) == 4
    for word in ("tokens", "ce", "bits/byte", "balance", "load", "lr", "tok/s", "mfu n/a", "mem", "left"):
        assert all(word in line for line in lines), word


def test_a_sample_that_the_terminal_cannot_show_does_not_end_a_run_in_an_error(command, monkeypatch):
    """Bytes that make no character are written as U+FFFD, which an ASCII or Latin-1 terminal does not have."""
    monkeypatch.setattr(t, "write_text", lambda *_, **__: ["caf\ufffd"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert command("--max_steps=2")[0] == 0


def test_the_log_has_a_line_a_step_with_everything_in_it(command):
    assert command()[0] == 0
    lines = training()
    wanted = {"step", "tokens", "ce", "bits_per_byte", "balance", "z", "lr", "grad_norm", "skipped", "tokens_per_s",
              "mfu", "memory", "seconds", "load_max_over_mean", "entropy", "dropped", "dead_experts"}
    assert [line["step"] for line in lines] == list(range(20)) and all(wanted <= line.keys() for line in lines)
    assert [line["tokens"] for line in lines] == [128 * (i + 1) for i in range(20)]
    for line in lines:
        assert line["balance"] >= 0.99 and 1 <= line["load_max_over_mean"] <= 2 and line["dropped"] == 0   # E / K = 2
        assert 0 <= line["entropy"] <= math.log(4) and line["mfu"] is None and line["memory"] > 2**20
    loads = [np.array(line["load"]) for line in lines if "load" in line]
    assert len(loads) == 4 and all(load.shape == (2, 4) for load in loads)
    assert all(load.sum(1) == pytest.approx(1, abs=1e-3) for load in loads)
    evaluations = [line for line in log() if "val_ce" in line]
    assert [line["step"] for line in evaluations] == [0, 10, 20]
    assert all(line["val_bits_per_byte"] > 0 for line in evaluations)


def test_a_run_leaves_its_results_and_figures(command, figures):
    assert command()[0] == 0
    result = json.loads(Path("out/tiny/result.json").read_text())
    sizes = m.count(tiny())
    expected = {"name": "tiny", "status": "done", "tokens": 2560, "steps": 20, "skipped": 0, "n_total": sizes["total"],
                "n_active": sizes["active"], "n_active_without_embeddings": sizes["active"] - 264 * 32, "n_expert": 4,
                "top_k": 2, "flops": sizes["flops_per_token"] * 2560, "dataset": "corpus", "tokenizer": "bytes",
                "dtype": "float32", "torch": torch.__version__}
    assert expected.items() <= result.items()
    assert {"loss", "bits_per_byte", "seconds", "tokens_per_s", "peak_memory", "device", "python"} <= result.keys()
    assert result["loss"] == log()[-1]["val_ce"] < log()[0]["val_ce"], "it learnt something"
    for figure in ("loss.png", "experts.png"):
        data = Path("out/tiny", figure).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 10_000, figure
    assert json.loads(Path("out/tiny/config.json").read_text()).keys() >= {f.name for f in fields(t.Config)}


def test_figures_can_be_drawn_again_for_one_run_and_for_several(command, figures):
    for name in ("a", "b"):
        assert command("--max_steps=2", f"--out_dir=out/{name}")[0] == 0
        Path(f"out/{name}/loss.png").unlink()
    t.main(["draw", "out/a", "out/b"])
    assert all(Path("out", name).is_file() for name in ("a/loss.png", "b/loss.png", "a/experts.png", "a-b.png"))
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
    assert set(sizes) == {"total", "active", "total_untied", "active_untied", "embedding", "flops_per_token", "memory"}
    assert sizes["memory"]["total"] == sum(n for name, n in sizes["memory"].items() if name != "total")
    t.main([str(ROOT / "configs/slicing/shared.py"), "--dry_run", "--json", "--only=routed-4"])
    assert [run["name"] for run in json.loads(capsys.readouterr().out)] == ["routed-4-s1", "routed-4-s2", "routed-4-s3"]


def test_one_tokens_journey_is_read_off_the_running_lines(command, capsys):
    assert command("--max_steps=1")[0] == 0
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
    assert len(lines) > 25 and len({line.split()[0] for line in lines}) == len(lines)


def test_untied_embeddings_are_counted_in_the_results(command):
    assert command("--tie_embeddings=False", "--max_steps=2")[0] == 0
    result, sizes = json.loads(Path("out/tiny/result.json").read_text()), m.count(tiny())
    assert result["n_total"] == sizes["total_untied"] == sum(p.numel() for p in checkpoint()["model"].values())


def test_a_trained_run_writes_text(command):
    assert command("--max_steps=2")[0] == 0
    model, tokenizer = m.load_run("out/tiny")
    assert len("".join(m.write_text(model, tokenizer, "def ", 20))) >= 4


def test_a_run_can_start_from_the_weights_of_another(command):
    assert command("--max_steps=10")[0] == 0
    assert command("--max_steps=1", "--init_from=out/tiny", "--out_dir=out/next", "--router=sigmoid")[0] == 2
    assert command("--max_steps=1", "--init_from=out/tiny", "--out_dir=out/next", "--bias_rate=0.01")[0] == 0
    assert log("out/next")[0]["val_ce"] == pytest.approx(log()[-1]["val_ce"], rel=1e-6)


def test_a_run_can_start_from_a_hugging_face_folder_and_says_what_to_set_if_the_shape_differs(command, refused):
    pytest.importorskip("safetensors")
    model = Model(tiny()).init_weights(7)
    m.to_hf(model, "hf")
    refused("--d_model=32 --n_expert=4", "--init_from=hf", "--d_model=64", "--n_expert=8")
    refused("nowhere has no config.json", "--init_from=nowhere")
    assert command("--max_steps=1", "--init_from=hf", "--learning_rate=1e-12")[0] == 0
    expected, start = trained(max_steps=1, seed=7, out_dir="out/same", learning_rate=1e-12), checkpoint()
    for name, weight in start["model"].items():
        torch.testing.assert_close(weight, expected["model"][name], atol=1e-6, rtol=0)


def test_an_interrupted_run_does_not_go_back_to_the_weights_it_started_from(monkeypatch, command):
    assert command("--max_steps=10", "--out_dir=out/first")[0] == 0
    whole = trained(max_steps=10, init_from="out/first", out_dir="out/whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        trained(max_steps=10, init_from="out/first", out_dir="out/again")
    assert checkpoint("out/again")["step"] < 10
    assert same(trained(max_steps=10, init_from="out/first", out_dir="out/again"), whole)


def test_a_run_with_mixed_widths_is_a_start_for_the_same_config(command):
    groups = "--expert_groups=[(2, 16), (2, 8)]"
    assert command("--max_steps=2", groups)[0] == 0
    assert command("--max_steps=2", groups, "--init_from=out/tiny", "--out_dir=out/next")[0] == 0


def test_a_number_of_experts_beside_their_groups_is_refused(refused):
    refused("n_expert does nothing beside expert_groups", "--expert_groups=[(2, 16), (2, 8)]", "--n_expert=8")


def test_a_started_run_continues_without_the_weights_it_began_from(command):
    assert command("--max_steps=2", "--out_dir=out/first")[0] == 0
    assert command("--max_steps=2", "--init_from=out/first")[0] == 0
    shutil.rmtree("out/first")
    assert "is finished" in command("--max_steps=2", "--init_from=out/first")[1]


@pytest.mark.parametrize("damage", [lambda out: Path(out, "ckpt.pt").write_bytes(b"junk"),
                                    lambda out: Path(out, "config.json").write_text("{}")], ids=["ckpt", "config"])
def test_a_damaged_run_to_start_from_is_one_clear_line(damage, command):
    assert command("--max_steps=2")[0] == 0
    damage("out/tiny")
    code, _, err = command("--max_steps=2", "--init_from=out/tiny", "--out_dir=out/next")
    assert code == 2 and "ckpt.pt is damaged" in err and err.count("\n") == 1


def test_the_busiest_expert_is_measured_against_the_choices_that_were_made(command):
    assert command("--router=top_p", "--top_p=0.01", "--max_steps=6")[0] == 0        # one expert a token, of two slots
    assert all(line["load_max_over_mean"] >= 1 for line in training())


AXES = [[f"--router={name}"] for name in POLICIES if name != "switch"] + [
    ["--router=switch", "--top_k=1"], ["--router=sigmoid", "--bias_rate=0.01", "--aux_coef=0"],
    ["--router_noise=0.5"], ["--capacity_factor=1.0", "--eval_capacity_factor=2.0"], ["--renormalize=False"],
    ["--balance_scope=sequence"], ["--balance_scope=global", "--batch_tokens=256"],
    ["--bias_rate=0.01", "--batch_tokens=256"], ["--expert_groups=[(2, 8), (4, 16)]"],
    ["--d_shared=16", "--shared_gate"], ["--first_dense_layers=1"], ["--n_expert=64", "--top_k=1"],
]


@pytest.mark.parametrize("flags", AXES, ids=" ".join)
def test_every_router_and_axis_trains_from_a_line_and_continues_to_the_last_bit(flags, monkeypatch, command):
    assert command(*flags, "--out_dir=out/whole")[0] == 0
    assert training("out/whole")[-1]["ce"] < training("out/whole")[0]["ce"] < 7
    with monkeypatch.context() as patch:
        interrupt_after(patch, 12)
        assert command(*flags)[0] == 0
    assert checkpoint()["step"] < 20
    assert command(*flags)[0] == 0
    assert same(checkpoint(), checkpoint("out/whole"))


@pytest.mark.filterwarnings("ignore:The .grad attribute")                # torch.compile looks at it itself
def test_a_compiled_model_learns_the_same(command):
    assert command("--max_steps=4")[0] == 0
    assert command("--max_steps=4", "--compile", "--out_dir=out/compiled")[0] == 0
    assert log("out/compiled")[-1]["val_ce"] == pytest.approx(log()[-1]["val_ce"], abs=1e-4)


# --- see the routing ------------------------------------------------------------------------------------------------


def test_every_token_has_a_kind():
    kinds = {" the": "lower case", "The": "upper case", "  ": "space", "\n": "line break", " 7": "digit",
             "(": "bracket", '"': "quote", "+=": "other sign", "\u2603": "not ASCII", "\t": "space",
             "\ufffd": "not ASCII"}
    assert {token: t.kind_of(token) for token in kinds} == kinds


def test_the_routing_picture_holds_each_tokens_first_expert_and_the_share_of_each_kind(command):
    assert command("--max_steps=1")[0] == 0
    text = "def f(x):\n    return x + 1\n" * 3                       # longer than seq_len: read in pieces
    Path("text.txt").write_text(text)
    t.main(["draw", "out/tiny", "--text", "text.txt"])
    model, _ = m.load_run("out/tiny")
    result = json.loads(Path("out/tiny/routing.json").read_text())
    assert "".join(result["tokens"]) == text and Path("out/tiny/routing.png").stat().st_size > 10_000
    experts, share = torch.tensor(result["experts"]), torch.tensor(result["share"])
    assert experts.shape == (2, len(text)) and share.shape == (2, 4, len(result["kinds"]))
    ids = torch.tensor([list(text.encode()[:32])])
    with torch.no_grad():
        x = model.embed(ids)
        block = model.blocks[0]
        x = x + m.attend(block.attn_norm(x), block.attn, m.rope_tables(0, 32, model.config, "cpu"), None)
        best = (block.ffn_norm(x)[0] @ block.ffn.gate.T).argmax(-1)
    assert torch.equal(experts[0, :32], best)
    spaces = [i for i, c in enumerate(text) if c == " "]
    expected = experts[1, spaces].bincount(minlength=4) / len(spaces)
    torch.testing.assert_close(share[1, :, result["kinds"].index("space")], expected)


def test_a_token_that_no_expert_served_has_no_first_expert():
    model = Model(tiny(router="expert_choice", top_k=1)).init_weights(0).eval()
    ids = list(range(32))
    first = t.first_experts(model, ids)
    plans = []
    hook = model.blocks[0].ffn.register_forward_hook(lambda module, inputs, out: plans.append(out[1]))
    model(torch.tensor([ids]))
    hook.remove()
    idle = plans[0].weights.amax(1) == 0
    assert idle.any() and (first[0, idle] == -1).all() and (first[0, ~idle] >= 0).all()


# --- the machine ----------------------------------------------------------------------------------------------------


def test_a_run_that_cannot_fit_stops_before_allocating_and_names_what_fits(refused, monkeypatch):
    monkeypatch.setattr(Model, "init_weights", lambda *_: pytest.fail("allocated"))
    need = m.memory(tiny(), 4)["total"]
    monkeypatch.setattr(t, "free_memory", lambda device: need * 2)
    refused("would fit", "--micro_batch=4096", "--seq_len=64")
    with pytest.raises(BadInput) as error:
        t.check_memory(tiny(micro_batch=4096, seq_len=64))
    fix = re.search(r"--micro_batch=(\d+) --seq_len=(\d+) would fit", str(error.value))
    micro_batch, seq_len = map(int, fix.groups())
    t.check_memory(tiny(micro_batch=micro_batch, seq_len=seq_len))
    refused("use a smaller model", "--d_expert=100000")


def test_a_model_no_machine_can_hold_is_refused_at_once(refused):
    refused("use a smaller model", "--d_expert=1000000000", "--d_model=65536")
    refused("", "--d_expert=10000000000000", "--d_model=65536000")


def test_the_memory_of_the_machine_can_be_read():
    assert 2**26 < t.free_memory("cpu") < 2**50 and t.peak_memory("cpu") > 2**24


def test_memory_that_only_caches_files_counts_as_free(monkeypatch):
    """A control group's memory.current includes the page cache, which tokenising a corpus fills; it is given back."""
    Path("memory.max").write_text(f"{8 * 2**30}\n")
    Path("memory.current").write_text(f"{7 * 2**30}\n")
    Path("memory.stat").write_text(f"anon {2**30}\nfile {6 * 2**30}\nactive_file {2**30}\ninactive_file {5 * 2**30}\n")
    Path("meminfo").write_text("MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\n")
    monkeypatch.setattr(t, "Path", lambda name: Path(Path(name).name))
    assert t.free_memory("cpu") == 6 * 2**30


def test_peak_rates_are_known_for_gpus_alone(monkeypatch):
    assert t.peak_flops(tiny()) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    config = tiny()
    config.device, config.dtype = "cuda", "bfloat16"
    assert t.peak_flops(config) == 989e12
    config.dtype = "float32"
    assert t.peak_flops(config) is None
