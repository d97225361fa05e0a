"""
train.py: one command from a config file to a trained model.

    python train.py configs/tiny.py                        train; the same command again continues from its checkpoint
    python train.py configs/tiny.py --learning_rate=3e-4   any field of the config, by name (--help lists them)

One rule runs through the file: everything a step needs is a function of (config, step). Which tokens, which learning
rate, which random numbers: nothing is carried along except the weights (a router's bias among them) and the optimizer.
So a run that was interrupted and continued ends, on a CPU, in the same weights to the last bit as one that was not.

Part 1 is the lesson: config, text to windows of tokens, learning rate, evaluation, and the loop, which talks to one
object that keeps the run. Part 2 is what real runs need: every value checked, other data, exact resume, a log, figures.
Part 3 is sweeps, a file that sets `runs = [dict(name=..., field=...), ...]`: each is trained, and they are ranked; and
`judge`, a sweep's verdict on an idea.
"""

import ast
import math
import runpy
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import Model, ModelConfig, Output

# === Part 1: the lesson ===========================================================================================


@dataclass
class Config(ModelConfig):
    """Every name a config file or the command line may set: the model's fields, then these."""

    dataset: str = "stdlib"              # "stdlib" (Python's source), or files: text, .jsonl(.gz), .parquet, llm.c .bin
    tokenizer: str = "bytes"             # "bytes", a tiktoken encoding (gpt2), or a ranks file (qwen.tiktoken)
    out_dir: str = ""                    # where the run is kept; empty: out/ and the config file's name
    seed: int = 1                        # of the initial weights and the order of the data
    max_steps: int = 1000                # optimizer steps
    max_tokens: int | None = None        # stop at the first step that reaches this many tokens, if sooner
    batch_tokens: int | list | None = None  # tokens a step, or a ramp [(from token, tokens)]; None: one micro-batch
    micro_batch: int = 8                 # sequences in one forward pass; gradients accumulate up to batch_tokens
    learning_rate: float = 1e-3          # the peak
    min_learning_rate: float = 0.0       # where the decay ends
    schedule: str = "cosine"             # after warmup "cosine", or "constant" until a linear decay at the end
    warmup: float = 0.1                  # linear warmup: up to 1 a fraction of the run, above 1 tokens
    decay: float = 0.2                   # linear decay of schedule "constant": up to 1 a fraction, above 1 tokens
    weight_decay: float = 0.1            # of matrices (see parameter_groups)
    beta1: float = 0.9                   # AdamW, mean of gradients
    beta2: float = 0.95                  # AdamW, mean of squares
    grad_clip: float = 1.0               # largest norm of the gradient; 0: no limit
    eval_interval: int = 250             # steps between evaluations
    eval_tokens: int = 65_536            # validation tokens an evaluation reads, always the same ones
    log_interval: int = 10               # steps between printed lines
    checkpoint_interval: int = 250       # steps between checkpoints
    device: str = "auto"                 # "cpu", "cuda", "cuda:1", ...; auto: the GPU if there is one
    dtype: str = "auto"                  # of matrix products, "float32" or "bfloat16"; auto: bfloat16 on a GPU
    compile: bool = False                # torch.compile the model (Part 2)
    plain: bool = False                  # train by the lessons' plain operators, not by their faster versions (Part 2)
    init_from: str = ""                  # start from these weights: Hugging Face folder, or a run's out_dir (Part 2)
    overwrite: bool = False              # throw an earlier run in out_dir away (Part 2)
    data_parallel: str = "ddp"           # under torchrun: a rank holds the whole model, or "fsdp": a shard (Part 2)
    expert_parallel: int = 1             # under torchrun: groups of so many ranks share the experts out (Part 2)

    def resolve(self) -> "Config":
        """Put the device and precision of this machine in the place of "auto"."""
        self.device = self.device.replace("auto", "cuda" if torch.cuda.device_count() else "cpu")
        self.dtype = self.dtype.replace("auto", "bfloat16" if self.device.startswith("cuda") else "float32")
        return self


PART_2 = ("tokenizer", "compile", "plain", "init_from", "overwrite", "recompute", "data_parallel", "expert_parallel")


def load_config(path: str, words: list[str] = ()) -> Config:
    """A flat Python file, then words --name=value, which win. Part 2 has a way that checks types and values, too."""
    defaults = {f.name: f.default for f in fields(Config)}
    kinds = (int, float, str, list, type(None))                                  # (a file may import and compute)
    names = {k: v for k, v in runpy.run_path(path).items() if not k.startswith("_") and isinstance(v, kinds)}
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        names[name] = value if isinstance(defaults.get(name), str) else ast.literal_eval(value or "None")
    for name, value in names.items():
        if name not in defaults:
            refuse(f"{name} is no config field")
        if (name in PART_2 and value != defaults[name]) or (name == "batch_tokens" and isinstance(value, list)):
            refuse(f"{name} = {value!r} is for the whole train.py; the lesson knows {defaults[name]!r} alone")
    names["out_dir"] = names.get("out_dir") or f"out/{Path(path).stem}"
    return Config(**names).resolve()


def refuse(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# --- text to windows of tokens ---


def text_files(dataset: str) -> list[Path]:
    """In a fixed order, the files of Python's library without its tests, or the texts of a folder."""
    if dataset != "stdlib":
        return [p for p in sorted(Path(dataset).rglob("*")) if p.suffix in (".txt", ".md", ".py") and p.is_file()]
    root = Path(sysconfig.get_paths()["stdlib"])
    leave = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    return [p for p in sorted(root.rglob("*.py")) if not leave & set(p.relative_to(root).parts)]


END_OF_TEXT = 256               # behind each document; the tokens before it are the 256 bytes


def is_held_out(text: bytes) -> bool:
    """One document in 20 is for validation, by a checksum of its text: copies of a document stay on one side."""
    return zlib.crc32(text) % 20 == 0


class Windows:
    """Tokens cut into windows of seq_len + 1, since targets are the inputs one token later."""

    def __init__(self, tokens: np.ndarray, seq_len: int):
        self.tokens, self.seq_len = tokens, seq_len

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, i: int) -> np.ndarray:
        return self.tokens[i * self.seq_len:(i + 1) * self.seq_len + 1].astype(np.int64)

    def batch(self, which: list[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (len(which), T) int64."""
        rows = torch.from_numpy(np.stack([self[i] for i in which]))
        return rows[:, :-1], rows[:, 1:]


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of the n windows in an epoch, in which each comes once."""
    return np.random.default_rng([seed, epoch]).permutation(n)


class Data:
    """What the steps are made of: text as bytes. Part 2's Corpus knows other tokenizers and files, and ramps."""

    rank, world = 0, 1          # this process, and of how many that share a step out: see Part 2

    def __init__(self, config: Config):
        unit, sides = config.micro_batch * config.seq_len, ([], [])              # sides: for training, for validation
        if (config.batch_tokens or unit) % unit:
            refuse(f"batch_tokens = {config.batch_tokens} is no multiple of micro_batch * seq_len = {unit}")
        for path in text_files(config.dataset):
            text = path.read_bytes()
            sides[is_held_out(text)].append(np.array([*text, END_OF_TEXT], np.uint16))
        if not all(sum(map(len, side)) > config.seq_len for side in sides):
            refuse(f"dataset {config.dataset!r} is no folder with text enough to hold one document in 20 out")
        self.train, self.val = (Windows(np.concatenate(side), config.seq_len) for side in sides)
        self.config = config

    @property
    def steps(self) -> int:
        """max_steps, or the first number of them that reaches max_tokens if that is sooner."""
        c, batch = self.config, self.position(0)[1]
        return c.max_steps if c.max_tokens is None else min(c.max_steps, math.ceil(c.max_tokens / batch))

    def position(self, step: int) -> tuple[int, int]:
        """(tokens trained on before this step, tokens in it)."""
        batch = self.config.batch_tokens or self.config.micro_batch * self.config.seq_len
        return step * batch, batch

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets (micro_batch, T), as many as make up the step; micro_batch does not change the windows."""
        c, n = self.config, len(self.train)
        tokens, batch = self.position(step)
        first, last = tokens // c.seq_len, (tokens + batch) // c.seq_len
        for start in range(first + self.rank * c.micro_batch, last, self.world * c.micro_batch):
            which = range(start, start + c.micro_batch)
            yield self.train.batch([epoch_order(c.seed, i // n, n)[i % n] for i in which])

    def n_bytes(self, tokens: Tensor) -> int:
        """Bytes of text behind these tokens; end-of-text has none."""
        return int((tokens != END_OF_TEXT).sum())


# --- the learning rate, evaluation, the loop ---


def learning_rate(config: Config, tokens: int, batch: int, total: int) -> float:
    """Of the step of `batch` tokens after the first `tokens` of `total`: linear warmup, then a cosine to the end, or
    constant and a linear decay. By tokens, so that a step's size does not bend it."""
    c = config
    warmup = c.warmup * total if c.warmup <= 1 else c.warmup
    decay = c.decay * total if c.decay <= 1 else c.decay
    if tokens < warmup:
        return c.learning_rate * min(1.0, (tokens + batch) / warmup)             # the first step is not lost at zero
    if c.schedule == "cosine":
        share = (1 + math.cos(math.pi * (tokens - warmup) / max(total - warmup, 1))) / 2
    else:
        share = min(1.0, (total - tokens) / decay) if decay else 1.0
    return c.min_learning_rate + (c.learning_rate - c.min_learning_rate) * share


def parameter_groups(model: Model, weight_decay: float) -> list[dict]:
    """AdamW's groups: decay for matrices, none for norms (which belong near one) and the embedding, where a rare
    token's row gets a gradient once in many steps: decay would pull it to zero in between. (An untied head decays.)"""
    decay = [p for name, p in model.named_parameters() if p.dim() > 1 and name != "embed.weight"]
    plain = [p for name, p in model.named_parameters() if p.dim() == 1 or name == "embed.weight"]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def autocast(config: Config) -> torch.autocast:
    """Matrix products in config.dtype; weights, gradients and the optimizer stay float32."""
    kind = config.device.partition(":")[0]
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16")


@torch.no_grad()
def evaluate(model: Model, data: Data, config: Config) -> tuple[float, float]:
    """Cross-entropy alone, without balance and z losses, on fixed validation windows: nats a token, bits a byte."""
    n = min(len(data.val), max(1, config.eval_tokens // config.seq_len))
    which = [i * len(data.val) // n for i in range(n)]                           # evenly spread over the held-out text
    nats, n_bytes, mode = 0.0, 0, model.training
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)                                           # of a router that draws
        for start in range(0, n, config.micro_batch):
            x, y = data.val.batch(which[start:start + config.micro_batch])
            with autocast(config):
                nats += float(model(x.to(config.device), y.to(config.device)).ce) * y.numel()
            n_bytes += data.n_bytes(y)
    model.train(mode)
    return nats / (n * config.seq_len), nats / math.log(2) / max(n_bytes, 1)


class Keeper:
    """What becomes of a run: printed lines, and a checkpoint from which the same command continues. Part 2's Run keeps
    a log and figures, refuses another config, and stops cleanly when told to."""

    def __init__(self, config: Config, data: Data):
        self.config, self.data, self.losses = config, data, []
        self.path = Path(config.out_dir) / "ckpt.pt"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def begin(self, model: Model, optimizer: torch.optim.Optimizer) -> tuple[Callable[..., Output], int]:
        """(what to call for a forward pass, the step to begin with); a checkpoint's state is put in place."""
        self.model, self.optimizer = model, optimizer
        if not self.path.is_file():
            return model, 0
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return model, state["step"]

    def evaluation(self, step: int, evaluate: Callable[[], tuple[float, float]]) -> None:
        ce, bits = evaluate()
        print(f"step {step:6d} validation {ce:.4f} nats a token, {bits:.4f} bits a byte", flush=True)

    def micro_batch(self, output: Output, targets: Tensor) -> None:
        self.losses.append(output.ce.detach())

    def clip(self) -> Tensor:
        """The norm of the whole gradient, which is scaled down to grad_clip where it is longer."""
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf)

    def step(self, step: int, norm: Tensor, rate: float) -> None:
        ce, self.losses = torch.stack(self.losses).mean(), []
        if (step + 1) % self.config.log_interval == 0:
            print(f"step {step:6d} ce {ce:.4f} norm {norm:.2f} lr {rate:.2e}", flush=True)
        if (step + 1) % self.config.checkpoint_interval == 0 or step + 1 == self.data.steps:
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": step + 1}
            torch.save(state, self.path.with_suffix(".tmp"))
            self.path.with_suffix(".tmp").replace(self.path)                     # the old one or the new one, whole

    def end(self, evaluate: Callable[[], tuple[float, float]]) -> None:
        self.evaluation(self.data.steps, evaluate)


def train(config: Config, keeper: type[Keeper] = Keeper, data: type[Data] = Data) -> Model:
    """Train as the config says. Two seams: what becomes of the run, and what its steps are made of."""
    data = data(config)
    keep = keeper(config, data)
    model = Model(config).init_weights(config.seed).to(config.device)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.learning_rate,
                                  betas=(config.beta1, config.beta2), fused=True)
    forward, start = keep.begin(model, optimizer)
    total = data.position(data.steps)[0]
    for step in range(start, data.steps):
        if step % config.eval_interval == 0:
            keep.evaluation(step, lambda: evaluate(forward, data, config))       # a lambda: the keeper stops its clock
        torch.manual_seed(config.seed * 1_000_003 + step)      # whatever draws at this step draws the same again
        tokens, batch = data.position(step)
        rate = learning_rate(config, tokens, batch, total)
        for group in optimizer.param_groups:
            group["lr"] = rate
        share, loss = config.micro_batch * config.seq_len / batch, 0.0
        for x, y in data.micro_batches(step):
            with autocast(config):
                o = forward(x.to(config.device), y.to(config.device))
            part = share * (o.ce + config.aux_coef * o.balance + config.z_coef * o.z)
            part.backward()
            loss += part.detach()
            keep.micro_batch(o, y)
        norm = keep.clip() + 0 * loss                          # not finite if the loss is not
        # A fused step reads found_inf (as from a GradScaler): at 1 it leaves weights and state alone, without a wait.
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
        model.end_step(optimizer.found_inf)
        optimizer.zero_grad()
        keep.step(step, norm, rate)
    keep.end(lambda: evaluate(forward, data, config))
    return model


# === Part 2: a run of any kind, kept ==============================================================================

import argparse
import contextlib
import ctypes
import glob
import gzip
import hashlib
import inspect
import itertools
import json
import linecache
import os
import platform
import re
import shlex
import shutil
import signal
import struct
import time
import types
import typing
from bisect import bisect_left
from dataclasses import asdict, replace
from functools import partial

import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from model import (
    CARDS,
    COMPILED,
    FAST,
    PLAIN,
    Attention,
    Block,
    MoE,
    attend,
    compute_dtype,
    convert,
    count,
    experts,
    ids_of,
    is_file,
    load_checkpoint,
    load_model,
    load_run,
    load_tokenizer,
    loss,
    memory,
    optional,
    peak_rates,
    reader,
    spare,
    using,
    validate,
    write_text,
)
from router import (
    POLICIES,
    BadInput,
    Parser,
    RouterConfig,
    Routing,
    closest,
    combine,
    drop_output,
    gather,
    out_of_memory,
    place,
    require,
    require_each,
    route,
    run_script,
    sum_over_ranks,
)

# --- the configuration, checked ---


def validate_run(config: Config) -> None:
    """Raise BadInput at the first value that cannot be trained with."""
    validate(config)
    require_each(config, "max_steps max_tokens micro_batch learning_rate eval_interval eval_tokens log_interval "
                 "checkpoint_interval expert_parallel", lambda n: n > 0, "be positive")
    require_each(config, "min_learning_rate warmup decay weight_decay grad_clip seed", lambda n: n >= 0,
                 "not be negative")
    require_each(config, "seed", lambda n: n < 2**32, "be less than 2**32")
    require_each(config, "n_layer", lambda n: n <= 4096, "be at most 4096")
    require_each(config, "max_steps max_tokens", lambda n: n < 2**62, "be less than 2**62")
    require_each(config, "dataset tokenizer", lambda text: 0 < len(text) < 1000, "be a name of 1 to 1000 characters")
    require_each(config, "dataset tokenizer out_dir", lambda text: text.encode(errors="ignore").decode() == text,
                 "be text in this locale: set PYTHONUTF8=1 in the environment")
    require_each(config, "out_dir", lambda text: "\0" not in text, "hold no null character")
    require_each(config, "beta1 beta2", lambda x: 0 <= x < 1, "be in [0, 1)")
    for name, allowed in (("schedule", ("cosine", "constant")), ("dtype", ("float32", "bfloat16")),
                          ("data_parallel", ("ddp", "fsdp"))):
        require_each(config, name, allowed.__contains__, f"be one of {', '.join(allowed)}")
    require(config.min_learning_rate <= config.learning_rate,
            f"min_learning_rate = {config.min_learning_rate} must not exceed learning_rate = {config.learning_rate}")
    unit, starts = WORLD * config.micro_batch * config.seq_len, [start for start, _ in ramp(config)]
    for _, batch in ramp(config):
        require(batch < 2**40, "batch_tokens must be below 2**40")
        require(batch > 0 and batch % unit == 0, f"batch_tokens = {batch} must be a multiple of micro_batch * seq_len"
                f"{f' * {WORLD} ranks' * (WORLD > 1)} = {unit}, say {max(1, -(-batch // unit)) * unit}")
    require(starts[0] == 0 and starts == sorted(set(starts)),
            f"batch_tokens = {config.batch_tokens}: a ramp starts at token 0 and goes up")


def ramp(config: Config) -> list[tuple[int, int]]:
    """batch_tokens as [(from token, batch_tokens), ...], however it was written."""
    if isinstance(config.batch_tokens, list):
        pairs = [pair for pair in config.batch_tokens if isinstance(pair, (list, tuple)) and len(pair) == 2]
        numbers = [n for pair in pairs for n in pair if type(n) is int or (type(n) is float and n.is_integer())]
        require(len(numbers) == 2 * len(config.batch_tokens) > 0,
                f"batch_tokens = {config.batch_tokens}: a ramp is a list of (from token, tokens a step) pairs")
        return [(int(start), int(batch)) for start, batch in pairs]
    unit = config.micro_batch * config.seq_len * WORLD
    return [(0, unit if config.batch_tokens is None else config.batch_tokens)]


TYPES = typing.get_type_hints(Config)


def read_config(path: str, overrides: dict | None = None) -> Config:
    """`load_config`, checked: names, types and values alike wherever they stand; overrides win over the file."""
    names = read_file(path)
    require("runs" not in names, f"{path} is a sweep of several runs: `python train.py {path} --dry_run` lists them")
    return make_config(names | (overrides or {}), f"out/{Path(path).stem}", overrides or {})


def read_file(path: str, scale: float = 1) -> dict:
    """The names a config file sets. It may use one it does not set: `scale`, the number behind --scale."""
    found = next((p for p in (Path(path), Path(__file__).parent / path) if is_file(p)), None)      # from anywhere
    require(found is not None and path.endswith(".py"), f"{path} is no config file; configs/tiny.py is one")
    require(type(scale) in (int, float) and 0 < scale < math.inf, f"--scale={scale} must be a positive number")
    try:
        names = runpy.run_path(str(found), {"scale": scale})
    except (Exception, SystemExit) as error:
        raise BadInput(f"{path} does not run: {type(error).__name__}: {error}") from None
    require(names.pop("scale", None) is scale, f"{path} sets scale, which is the command line's: --scale=N")
    return {name: value for name, value in names.items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType) and not callable(value)}


def make_config(values: dict, out_dir: str, chosen: dict) -> Config:
    """A Config that can be trained with on this machine, or BadInput; out_dir is where it goes unless it says.

    chosen: those of the values that were set for this run alone, by the command line or in its entry of a sweep.
    """
    for name in ("n_expert", "d_expert"):
        require(not values.get("expert_groups") or name not in chosen,
                f"{name} does nothing beside expert_groups, which says how many experts of which width there are")
    for name in values:
        known = [*TYPES, "runs", "seeds", "name", "group", "along", "baseline", "branches"]
        require(name in TYPES, f"{name} is no config field{closest(name, known)}")
    if values.get("learning_rate") in PEAK_RATES:
        values = values | {"learning_rate": peak_rate(make_config(values | {"learning_rate": 1.0}, out_dir, chosen),
                                                      values["learning_rate"])}
    config = Config(**{name: convert(name, value, TYPES[name]) for name, value in values.items()}).resolve()
    config.out_dir = config.out_dir or out_dir
    if UNDER_TORCHRUN and config.batch_tokens is None:                      # kept: on another number of ranks the same
        config.batch_tokens = ramp(config)[0][1]
    if restarts():                                                          # it goes on, not anew
        config.overwrite = False
    kind, _, number = config.device.partition(":")
    require(kind in ("cpu", "cuda", "mps") and (number.isdigit() or ":" not in config.device),
            f"device = {config.device!r} must be cpu, cuda, cuda:N or mps")
    require(kind != "mps" or torch.backends.mps.is_available(), f"device = {config.device!r} is not on this machine")
    require(kind != "cuda" or int(number or 0) < torch.cuda.device_count(),
            f"device = {config.device!r}: this machine has {torch.cuda.device_count()} CUDA GPUs; use device = 'cpu'")
    validate_run(config)
    return config


def restarts() -> int:
    """How often torchrun --max-restarts has started these processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


PEAK_RATES = ("joint_law", "joint_law_code")     # what learning_rate may say in the place of a number: see peak_rates


def peak_rate(config: Config, reading: str) -> float:
    """The peak learning rate of a model of this size by one of the two readings of eq. 7."""
    sizes = count(config)
    active = sizes["active" if config.tie_embeddings else "active_untied"]
    rates = peak_rates(sizes["active"] - sizes["embedding"], active, config.n_expert)
    return rates[PEAK_RATES.index(reading)]


def field_help() -> dict[str, str]:
    """The comment behind each field of the three dataclasses: its one description."""
    source = "".join(map(inspect.getsource, (RouterConfig, ModelConfig, Config)))
    return dict(re.findall(r"^    (\w+): [^#\n]*?# (.*)$", source, re.MULTILINE))


def parse_command_line(argv: list[str]) -> tuple[argparse.Namespace, dict]:
    """(config file and options of sweeps, the fields that are given)."""
    parser = Parser(description="train a mixture-of-experts language model", allow_abbrev=False,
                    usage="python train.py CONFIG.py [--name=value ...]", epilog="other verbs: judge SWEEP.py --name="
                    "value ... (is an idea worth its compute?), draw FOLDER ..., trace FOLDER (each has --help)")
    add = parser.add_argument
    add("config", help="a flat Python file: one name = value a line (see configs/)")
    add("--scale", type=literal, default=1, help="what the name `scale` stands for in the file")
    add("--dry_run", action="store_true", help="only the sizes of each run, FLOPs, does it fit here")
    add("--json", action="store_true", help="with --dry_run: the sizes as JSON")
    add("--world", type=literal, help="with --dry_run: what each of so many processes holds and sends")
    add("--previous", action="store_true", help="go on from the checkpoint before the last one, which is thrown away")
    add = parser.add_argument_group("sweeps, files with several runs").add_argument
    add("--report", action="store_true", help="only the summary of what there is so far")
    add("--only", action="append", type=lambda text: text.split(","), help="only these runs")
    add("--parallel", nargs="?", type=literal, const=True, help="runs at once; no number: one a GPU")
    add("--seeds", type=lambda text: [*map(literal, text.split(","))], help="repeat each run for these seeds")
    meaning, known = field_help(), [action.dest for action in parser._actions]
    for f in fields(Config):
        text = f"{meaning[f.name]} (default {f.default!r})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", nargs="?", const="True", metavar=f.name.upper(), help=text)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        verb = closest(args.config, ("draw", "trace", "judge"))
        require(args.config.endswith(".py"), f"{args.config} is no config file{verb}")
        near = closest(unknown[0].lstrip("-").partition("=")[0], [*TYPES, *known])
        raise BadInput(f"unknown argument {unknown[0]}{near}")
    given = {name: value for name, value in vars(args).items() if name in TYPES and value is not None}
    return args, {name: value if TYPES[name] is str else literal(value) for name, value in given.items()}


def literal(text: str):
    """A command-line word as Python reads it, or as it stands."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {"true": True, "false": False}.get(text.lower(), text)


# --- text to tokens on disk ---


ROWS = (".jsonl", ".jsonl.gz", ".parquet")           # files of many documents
TEXT_SUFFIXES = (".txt", ".md", ".py", *ROWS, ".bin")


def source_files(dataset: str) -> list[Path]:
    """The files behind a dataset name, in a fixed order."""
    if dataset == "stdlib":
        return text_files(dataset)
    path = Path(dataset)
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and p.name.endswith(TEXT_SUFFIXES)]
        require(bool(files), f"dataset folder {dataset} holds no file ending in {' '.join(TEXT_SUFFIXES)}")
        return files
    found = [path] if path.exists() else map(Path, sorted(glob.glob(dataset, recursive=True)))
    files = [p for p in found if p.is_file()]                               # a pipe would be waited for
    require(bool(files), f"dataset {dataset!r} is neither 'stdlib' nor a file, a folder or a pattern of files")
    return files


def texts(path: Path) -> Iterator[str]:
    """The documents of one file: a line's "text" of .jsonl(.gz), a row's of .parquet, else the whole file."""
    try:
        if path.suffix == ".parquet":
            yield from parquet_texts(path)
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    yield json_text(path, number, line)
        else:
            data = path.read_bytes()
            require(b"\0" not in data, f"{path} is binary, not text; token shards end in .bin")
            yield data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 (byte {error.start}): convert it first, say with iconv -t utf-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path} cannot be read: {error}") from None


def parquet_texts(path: Path) -> Iterator[str]:
    parquet = optional("pyarrow.parquet")
    try:
        for batch in parquet.ParquetFile(path).iter_batches(columns=["text"]):
            for text in batch.column("text").to_pylist():
                require(isinstance(text, str), f"{path}: a row's text is {text!r}, not a string")
                yield text
    except (ValueError, KeyError) as error:
        raise BadInput(f"{path} is no parquet file with a column text: {error}") from None


def json_text(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()                                                       # half a surrogate pair is no text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text = None
    require(isinstance(text, str), f'{path} line {number} is not a JSON object with a "text" string')
    return text


def prepare(config: Config, tokenizer) -> list[list[np.ndarray]]:
    """Training and validation tokens, memory-mapped unless split cuts anew; text is tokenised once, into data/."""
    files = source_files(config.dataset)
    if files[0].suffix == ".bin":
        return token_shards(files, config.dataset)
    listing = [[p.name, p.stat().st_size, 0 if config.dataset == "stdlib" else p.stat().st_mtime_ns] for p in files]
    vocabulary = repr((tokenizer.name, tokenizer.eot_token, token_texts(tokenizer)))
    manifest = {"dataset": config.dataset, "tokenizer": config.tokenizer, "files": listing,
                "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
                "dtype": "uint16" if tokenizer.n_vocab <= 2**16 else "uint32"}
    key = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()[:12]
    name = Path(config.dataset).name.replace("*", "").strip(".")[-80:] or "text"
    folder = Path("data") / f"{name}-{Path(config.tokenizer).stem}-{key}"
    if not (folder / "manifest.json").is_file():
        tokenise(files, tokenizer, folder, manifest)
    return split([read_tokens(folder, side, manifest["dtype"]) for side in ("train", "val")], config.seq_len)


def read_tokens(folder: Path, side: str, dtype: str) -> np.ndarray:
    """The tokens that tokenise wrote for a side, as many as its manifest says."""
    path = folder / f"{side}.bin"
    n = read_json(folder / "manifest.json", tokens=dict).get("tokens", {}).get(side)
    size = n * np.dtype(dtype).itemsize if isinstance(n, int) else -1
    require(path.is_file() and path.stat().st_size == size,
            f"{path} is not what {folder}/manifest.json says: delete {folder}, and it is made again")
    return np.memmap(path, dtype, "r") if n else np.zeros(0, np.uint16)


def split(sides: list[np.ndarray], seq_len: int) -> list[list[np.ndarray]]:
    """Both sides as is_held_out made them; where one has no window, the last twentieth of all is for validation."""
    if min(map(len, sides)) <= seq_len:
        whole = np.concatenate(sides)
        require(len(whole) > 2 * seq_len + 1, f"the text is {len(whole):,} tokens: training and validation take a "
                f"sequence of seq_len = {seq_len} each, so use more text or a smaller seq_len")
        cut = min(len(whole) * 19 // 20, len(whole) - seq_len - 1)
        sides = [whole[:cut], whole[cut:]]
    return [[side] for side in sides]


def tokenise(files: list[Path], tokenizer, folder: Path, manifest: dict) -> None:
    """Write train.bin, val.bin and manifest.json into a temporary folder, renamed when it is complete."""
    print(f"tokenising {len(files)} file{'s'[:len(files) - 1]} into {folder}", flush=True)
    for old in folder.parent.glob("*.tmp"):                     # of runs that were killed while they wrote it
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > 60 and (owner := hold(old / "lock")):
                owner.close()
                shutil.rmtree(old, ignore_errors=True)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)                  # of a killed run that had this process id
    partial.mkdir(parents=True)
    owner, counts, empty = hold(partial / "lock"), {"train": 0, "val": 0}, 0
    try:
        with open(partial / "train.bin", "wb") as train, open(partial / "val.bin", "wb") as val:
            for path, text in ((file, text) for file in files for text in texts(file)):
                if not text and path.name.endswith(ROWS):       # (an empty file is a document, as in the lesson)
                    empty += 1
                    continue
                ids = np.array([*tokenizer.encode_ordinary(text), tokenizer.eot_token], manifest["dtype"])
                held_out = is_held_out(text.encode())
                (val if held_out else train).write(ids.tobytes())
                counts["val" if held_out else "train"] += len(ids)
        require(sum(counts.values()) > len(files) * (not empty), f"dataset {manifest['dataset']} holds no text")
        if empty:
            print(f"{empty:,} empty documents are left out")
        owner.close()
        (partial / "lock").unlink()
        (partial / "manifest.json").write_text(json.dumps(manifest | {"tokens": counts}, indent=1))
        try:
            partial.rename(folder)
        except OSError:                                                    # another run may have been faster
            require((folder / "manifest.json").is_file(), f"{folder} is in the way: delete it")
    finally:
        owner.close()
        shutil.rmtree(partial, ignore_errors=True)


def token_shards(files: list[Path], dataset: str) -> list[list[np.ndarray]]:
    """llm.c shards: 256 int32 of header (magic, version, tokens), then uint16 or uint32; 'val' in some names."""
    sides = [[], []]                                                        # for training, for validation
    for path in files:
        with open(path, "rb") as file:
            magic, _, n = struct.unpack("<3i", file.read(12).ljust(12, b"\0"))
        kind = {20240520: np.uint16, 20240801: np.uint32}.get(magic)
        require(kind is not None, f"{path} does not begin like an llm.c token shard (magic 20240520 or 20240801)")
        size, there = 1024 + n * np.dtype(kind).itemsize, path.stat().st_size
        require(there == size and n > 0, f"{path} is {there} bytes; its header says {size}: is it cut off?")
        sides["val" in path.name].append(np.memmap(path, kind, "r", 1024))
    for side, name in zip(sides, ("training", "validation, with 'val' in their names,")):
        require(bool(side), f"dataset {dataset} has no .bin shards for {name}")
    return sides


def token_texts(tokenizer) -> list[bytes]:
    """The text of each id; special tokens, and ids that are none, have no text."""
    special = {tokenizer.encode_single_token(name) for name in tokenizer.special_tokens_set}
    texts = [b""] * tokenizer.n_vocab
    for i in set(range(tokenizer.n_vocab)) - special:
        with contextlib.suppress(KeyError):
            texts[i] = tokenizer.decode_single_token_bytes(i)
    return texts


class Shards(Windows):
    """Windows of several arrays of tokens; none spans two of them."""

    def __init__(self, arrays: list[np.ndarray], seq_len: int):
        self.arrays, self.seq_len = arrays, seq_len
        self.ends = np.cumsum([max(len(a) - 1, 0) // seq_len for a in arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> np.ndarray:
        array = int(np.searchsorted(self.ends, i, side="right"))
        start = (i - (self.ends[array - 1] if array else 0)) * self.seq_len
        return self.arrays[array][start:start + self.seq_len + 1].astype(np.int64)


def fingerprint(windows: Shards) -> int:
    """Notices another corpus, not every edit: a checksum of the shards' lengths and of where each begins."""
    lengths = repr([len(a) for a in windows.arrays]).encode()
    return zlib.crc32(b"".join([lengths, *(a[:2**20].tobytes() for a in windows.arrays)]))


def check_ids(windows: Shards, config: Config) -> None:
    """Stop before training if any token has no row in the embedding."""
    top = max(int(a[i:i + 2**24].max()) for a in windows.arrays for i in range(0, len(a), 2**24))
    require(top < config.vocab_size,
            f"the data holds token {top}: set vocab_size = {config.vocab_size} to at least {top + 1}")


def position(config: Config, step: int) -> tuple[int, int]:
    """(tokens trained on before this step, tokens in it), following the batch ramp."""
    stages, tokens = ramp(config), 0
    for (_, batch), (end, _) in itertools.pairwise(stages):
        steps = min(step, max(0, -(-(end - tokens) // batch)))              # whole steps until this stage ends
        tokens, step = tokens + steps * batch, step - steps
        if step == 0 and tokens < end:
            return tokens, batch
    return tokens + step * stages[-1][1], stages[-1][1]


def total_steps(config: Config) -> int:
    """max_steps, or the first step count that reaches max_tokens if that is sooner."""
    if config.max_tokens is None:
        return config.max_steps
    most = min(config.max_steps, config.max_tokens)                          # (a step has a token at the least)
    return bisect_left(range(most), config.max_tokens, key=lambda step: position(config, step)[0])


def trunk_steps(config: Config) -> int:
    """The step at which the decay of schedule "constant" begins: longer runs are equal up to it. 0: no such decay."""
    if config.schedule != "constant" or not config.decay:
        return 0
    last, steady = total_steps(config), replace(config, warmup=0.0, min_learning_rate=0.0)
    total = position(config, last)[0]
    return bisect_left(range(last), True, key=lambda step: learning_rate(
        steady, *position(config, step), total) < config.learning_rate)


class Corpus(Data):
    """Text and token shards of any kind, by any tokenizer, in steps that may grow by a ramp."""

    def __init__(self, config: Config):
        self.config = config
        self.tokenizer = load_tokenizer(config.tokenizer)
        n_vocab = self.tokenizer.n_vocab
        require(n_vocab <= config.vocab_size,
                f"vocab_size = {config.vocab_size} is less than the {n_vocab} of tokenizer {config.tokenizer!r}")
        self.train, self.val = (Shards(arrays, config.seq_len) for arrays in prepare(config, self.tokenizer))
        for windows, name in ((self.train, "the training text"), (self.val, "the validation text")):
            n = sum(map(len, windows.arrays))
            require(len(windows) > 0, f"{name} is {n:,} tokens, less than one sequence of seq_len = {config.seq_len}: "
                                      "use more text or a smaller seq_len")
            check_ids(windows, config)
        lengths = [len(text) for text in token_texts(self.tokenizer)]
        where = config.device if config.device.startswith("cuda") else "cpu"
        self.token_bytes = torch.tensor(lengths + [0] * (config.vocab_size - len(lengths)), device=where)

    @property
    def steps(self) -> int:
        return total_steps(self.config)

    def position(self, step: int) -> tuple[int, int]:
        return position(self.config, step)

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """On the device. A GPU copies from pinned memory while it computes, and nobody waits for it."""
        for batch in super().micro_batches(step):
            if self.token_bytes.is_cuda:
                batch = [x.pin_memory().to(self.config.device, non_blocking=True) for x in batch]
            yield tuple(batch)

    def n_bytes(self, tokens: Tensor) -> Tensor:
        return self.token_bytes[tokens.to(self.token_bytes.device)].sum(dtype=torch.float64)


# --- checkpoints ---


def save_checkpoint(path: Path, state: dict) -> None:
    """Write beside, flush to disk, rename: a crash at any moment leaves the old checkpoint or the new one, whole."""
    if RANK:
        return
    partial = path.with_suffix(".tmp")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:                      # torch.save: a RuntimeError that tells of positions
        partial.unlink(missing_ok=True)
        room = shutil.disk_usage(path.parent).free / 2**30
        raise BadInput(f"{path} cannot be written ({str(error)[:99]}; {room:.2f} GiB are free there): the checkpoint "
                       "before it is whole; make room, and the same command continues") from None
    if path.name == "ckpt.pt":
        previous = path.with_suffix(".prev.pt")
        previous.unlink(missing_ok=True)
        with contextlib.suppress(OSError):                        # (a file system without links keeps no second one)
            os.link(path, previous)
    partial.replace(path)


def fits(state: dict, config: Config) -> bool:
    """Whether a checkpoint whose weights fit is whole: its counts, and AdamW's two means of each weight with a gradient
    (gates of routers that do not look at logits have none)."""
    with torch.device("meta"):
        model = Model(config)
    groups = parameter_groups(model, config.weight_decay)
    shapes = [p.shape for group in groups for p in group["params"]]
    try:
        means = state["optimizer"]["state"]
        return (type(state["step"]) is type(state["skipped"]) is int and type(state["seconds"]) is float
                and 0 < state["step"] <= total_steps(config) and len(means) >= len(shapes) - config.n_layer
                and [len(group["params"]) for group in state["optimizer"]["param_groups"]] == [
                    len(group["params"]) for group in groups]
                and all(one["exp_avg"].shape == one["exp_avg_sq"].shape == shapes[i] and one["step"].numel() == 1
                        for i, one in means.items()))
    except (KeyError, TypeError, AttributeError, IndexError):
        return False


def all_finite(state: dict) -> bool:
    """Whether every weight and every mean of AdamW's is; a step that is finite may leave some that are not."""
    means = [x for of_weight in state["optimizer"]["state"].values() for x in of_weight.values()]
    return all(bool(x.isfinite().all()) for x in (*state["model"].values(), *means))


RUN_FILES = ("config.json", "log.jsonl", "ckpt.pt", "ckpt.prev.pt", "trunk.pt", "result.json", "loss.png",
             "experts.png")                                                      # and an empty lock
ANEW = "give another out_dir, or --overwrite to start anew"
MAY_CHANGE = {"overwrite", "out_dir", "log_interval", "checkpoint_interval",     # they leave the run's numbers alone,
              "data_parallel", "expert_parallel"}                                # these but for rounding


def open_run(config: Config, data: int, back: bool = False) -> dict | None:
    """Make out_dir, or return the checkpoint of the run in it; refuse to continue with another config or other data.
    back: the checkpoint before the last takes its place, once it is known to be whole."""
    out, now, back = Path(config.out_dir), as_json(config) | {"data": data}, back and not RANK
    path = out / ("ckpt.prev.pt" if back else "ckpt.pt")
    require(path.is_file() or not back, f"{path} is not there: {ANEW}")
    out.mkdir(parents=True, exist_ok=True)
    lock(out)
    for name in RUN_FILES if config.overwrite and not RANK else ():
        (out / name).unlink(missing_ok=True)
    there, known = path.is_file(), (out / "config.json").is_file()
    then = read_json(out / "config.json") if there or known else now
    require(bool(then), f"{out}/config.json is missing, or no JSON object: {ANEW}")
    changed = differences(then, now)
    require(not changed, f"{out} holds a run with another config ({'; '.join(changed)}): {ANEW}")
    state = load_checkpoint(path, config) if there else None
    require(state is None or fits(state, config),
            f"{path} lacks a part of a checkpoint, or has one that does not fit{spare(path)}")
    for name in ("result.json", "outcome.json") if back or not known else ():
        (out / name).unlink(missing_ok=True)                                # of a run that is finished no longer
    if back:
        path.replace(out / "ckpt.pt")
    if read_result(out):
        return state
    write_text_file(out / "config.json", json.dumps(now, indent=1))
    log = out / "log.jsonl"
    lines = read_log(out) if state and log.is_file() else []
    again = [json.dumps(line) + "\n" for line in lines if line["step"] < state["step"]]      # later lines come again
    write_text_file(log, "".join(again))
    return state


def as_json(config: Config) -> dict:
    """The config as it will be read from JSON: lists in the place of tuples."""
    return json.loads(json.dumps(asdict(config)))


def differences(then: dict, now: dict) -> list[str]:
    """What stands between two configs as JSON has them; a field that did not exist then has its default."""
    then = as_json(Config()) | then
    return [f"{k} {then.get(k)!r} -> {v!r}" for k, v in now.items() if k not in MAY_CHANGE and then.get(k) != v]


def lock(out: Path) -> None:
    """One run at a time writes to out_dir; the lock goes with the process."""
    if RANK:
        return
    if lock.file:
        lock.file.close()
    lock.file = hold(out / "lock")
    require(lock.file is not None, f"another process is training in {out}: wait for it, or give another out_dir")


def hold(path: Path) -> typing.TextIO | None:
    """The open file, locked until it is closed; None if another process holds it (Windows has nothing to lock with)."""
    file = open(path, "w")  # noqa: SIM115 (held open: that is the lock)
    with contextlib.suppress(ImportError):
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
    return file


lock.file = None


def write_text_file(path: Path, text: str) -> None:
    if RANK == 0:
        partial = path.with_suffix(".tmp")
        partial.write_text(text, encoding="utf-8", errors="replace")
        partial.replace(path)


SAME_WEIGHTS = {"seq_len", "max_seq_len", "aux_coef", "z_coef", "balance_scope", "bias_rate", "router_noise",
                "capacity_factor", "eval_capacity_factor", "recompute", "init_scale"}       # a model may change these


def initial_weights(config: Config) -> dict | None:
    """The weights of init_from, of a model with this config's shape; BadInput with what to set if it has another."""
    if not config.init_from or ((Path(config.out_dir) / "ckpt.pt").is_file() and not config.overwrite):
        return None                                                         # the run is on its way already
    model, _ = load_model(config.init_from)
    differ = [(f.name, getattr(model.config, f.name)) for f in fields(ModelConfig) if f.name not in SAME_WEIGHTS
              and getattr(model.config, f.name) != getattr(config, f.name)]
    require(not differ, f"init_from = {config.init_from!r} holds a model of another shape; to take it set "
                        + " ".join(f"--{name}={shlex.quote(str(value))}" for name, value in differ))
    return model.state_dict()


# --- the machine ---


VARIANTS = {"Ti", "SUPER", "D", "Laptop", "NVL"}     # words that make another card of the name


def peak_flops(config: Config) -> float | None:
    """Peak rate of the device in the run's precision, None if no data sheet is listed above: MFU is then n/a."""
    if not config.device.startswith("cuda") or config.dtype != "bfloat16":
        return None
    words = torch.cuda.get_device_name(config.device).replace("-", " ").split()
    if VARIANTS & set(words) or {"H100", "PCIe"} <= set(words):
        return None
    return next((card.bfloat16 for key, card in CARDS.items() if key.partition("-")[0] in words), None)


def free_memory(device: str) -> int:
    """Bytes a run may take: what the GPU has free, or what the machine and its control group leave."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(meminfo["MemAvailable"].split()[0]) * 1024
    except OSError:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.is_file() and limit.read_text().strip().isdigit():
        cache = re.search(r"inactive_file (\d+)", Path("/sys/fs/cgroup/memory.stat").read_text())
        free = min(free, int(limit.read_text()) - int(used.read_text()) + int(cache[1]))    # file cache is given back
    return free


def peak_memory(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if Path("/proc/self/status").is_file():           # getrusage would count what the parent held when it started us
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    import resource  # (Windows has none)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_freed_memory() -> None:
    """Stop glibc from giving freed memory back to the kernel, to get it again, zeroed page by page, at the next step:
    on a CPU up to a tenth of it (compare results/step_cpu.json with results/step_keep_memory_cpu.json)."""
    mallopt, trim_threshold, mmap_max = getattr(ctypes.CDLL(None), "mallopt", None), -1, -4             # see malloc.h
    if mallopt:
        mallopt(trim_threshold, -1), mallopt(mmap_max, 0)


class DoesNotFit(BadInput):
    """The run needs more memory than there is."""


def check_memory(config: Config) -> tuple[int, int]:
    """(bytes the run needs, bytes there are); DoesNotFit with the fix if that is too little."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if config.device == "cpu" else 1      # ranks beside this one

    def needs(**smaller) -> float:
        return here * on_one_rank(replace(config, batch_tokens=None, **smaller), WORLD)[0]["total"]

    need, free = needs(), free_memory(config.device)
    if need > free:
        fits = [(b, t) for t in (config.seq_len >> i for i in range(8)) for b in (config.micro_batch, 1)
                if t and needs(seq_len=t, micro_batch=b) < free]
        fix = ("--micro_batch={} --seq_len={} would fit".format(*fits[0]) if fits else
               "weights, gradients and optimizer alone are too many: use a smaller model")
        need, free = need / 2**30, free / 2**30
        raise DoesNotFit(f"this run needs about {need:.1f} GiB and {config.device} has {free:.1f} GiB free: {fix}")
    return need, free


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"


# --- the run ---


DIVERGED, OUT_OF_MEMORY = 3, 4                          # exit codes; 1 is left to errors nobody foresaw


class Ended(Exception):
    """A run ends before its last step, or has ended already; `code` is the exit code."""

    def __init__(self, code: int):
        self.code = code


class Screen:
    """Standard output for what goes on when nobody reads it any more, or its disk is full."""

    def __init__(self):
        self.stream = sys.stdout

    def write(self, text: str) -> None:
        self.attempt(self.stream.write, text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, call: Callable, *arguments: str) -> None:
        try:
            call(*arguments)
        except OSError:
            drop_output(self.stream)


def run(config: Config, back: bool = False) -> int:
    """Train, and keep the run as Run does; returns the exit code: 0 done or interrupted and saved, or DIVERGED.
    back: from the checkpoint before the last."""
    table, n = PLAIN if config.plain else COMPILED if config.compile else FAST, config.expert_parallel
    require(UNDER_TORCHRUN or (config.data_parallel == "ddp" and n == 1), "data_parallel = 'fsdp' and expert_parallel "
            "are for several processes: torchrun --standalone --nproc_per_node=2 train.py CONFIG ...")
    check_ranks(config, WORLD)
    if n > 1:
        inner = PLAIN if config.plain else FAST
        table = table._replace(experts=experts_of_ranks(inner.experts, mesh(n)["experts"].get_group()))
    try:
        with contextlib.redirect_stdout(Screen()), using(table):
            keeper, data = (keep_on_ranks, in_turn(RankCorpus)) if UNDER_TORCHRUN else (Run, Corpus)
            train(config, partial(keeper, back=back), data)
    except Ended as end:
        return end.code
    return 0


class Run(Keeper):
    """log.jsonl, printed lines, checkpoints, signals and results. Numbers stay on the device until a flush: logging
    never holds up a step."""

    def __init__(self, config: Config, data: Corpus, back: bool = False):
        self.config, self.data, self.out = config, data, Path(config.out_dir)
        need, free = check_memory(config)
        self.given = initial_weights(config)
        self.state = open_run(config, fingerprint(data.train), back)        # nothing was written to out_dir before this
        describe(config, data, need, free)
        if read_result(self.out):
            print(f"{config.out_dir} is finished after {data.steps} steps; --overwrite starts anew")
            raise Ended(0)
        if config.data_parallel == "ddp":               # (what FSDP gathers and frees is to go back to the system)
            keep_freed_memory()
        gpu = torch.device(config.device).index                             # None: the one that is current already
        if gpu is not None:
            torch.cuda.set_device(gpu)                                      # Triton launches on the current device

    def begin(self, model: Model, optimizer: torch.optim.Optimizer) -> tuple[Callable[..., Output], int]:
        self.model, self.optimizer, self.trunk = model, optimizer, trunk_steps(self.config)
        start, self.seconds, self.skipped = 0, 0.0, 0
        if self.given:
            model.load_state_dict(self.given, strict=False)                 # all but a selection bias it may not have
        if self.state:
            model.load_state_dict(self.state["model"])
            optimizer.load_state_dict(self.state["optimizer"])
            start, self.seconds, self.skipped = (self.state[name] for name in ("step", "seconds", "skipped"))
            print(f"continuing at step {start} of {self.data.steps}")
        self.state = self.given = None
        self.pending, self.parts, self.bytes_read = [], [], 0
        self.streak = self.longest_streak = 0                               # of steps that were not finite
        self.flops, self.peak = count(self.config)["flops_per_token"], peak_flops(self.config)
        self.clock, self.elapsed, self.stop = time.perf_counter(), 0.0, catch_signals()       # since the last flush
        return torch.compile(model, dynamic=False) if self.config.compile else model, start   # shapes never change

    def write(self, line: dict) -> None:
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def evaluation(self, step: int, evaluate: Callable[[], tuple[float, float]]) -> tuple[float, float]:
        """Evaluate and write it down; the time it takes is no training time."""
        self.elapsed += time.perf_counter() - self.clock
        ce, bits = map(float, evaluate())
        if not math.isfinite(ce):
            raise self.diverged(step, "the validation loss is not finite")
        self.write({"step": step, "tokens": self.data.position(step)[0], "seconds": self.seconds,
                    "val_ce": ce, "val_bits_per_byte": bits})
        print(f"step {step:6d} validation {ce:.4f} nats a token, {bits:.4f} bits a byte", flush=True)
        self.clock = time.perf_counter()
        return ce, bits

    def micro_batch(self, output: Output, targets: Tensor) -> None:
        self.parts.append((torch.stack([output.ce, output.balance, output.z]).detach(), output.stats))
        self.bytes_read += self.data.n_bytes(targets)

    def step(self, step: int, norm: Tensor, rate: float) -> None:
        losses = torch.stack([part[0] for part in self.parts]).mean(0)
        stats = {name: torch.stack([part[1][name].float() for part in self.parts]).mean(0) for name in self.parts[0][1]}
        self.pending.append((step, rate, self.bytes_read, torch.cat((losses, norm.detach().view(1))), stats))
        self.parts, self.bytes_read = [], 0
        stopping = self.stopping()                                          # looked at once a step: save all or nothing
        last, trunk = step + 1 == self.data.steps, step + 1 == self.trunk
        save = (step + 1) % self.config.checkpoint_interval == 0 or last or trunk or stopping
        if save or (step + 1) % self.config.log_interval == 0:
            self.print_line(self.flush())
        elif len(self.pending) == 10:
            self.flush()                                                    # to notice ten steps that were not finite
        if self.longest_streak >= 10:
            raise self.diverged(step, "ten steps in a row were not finite")
        if save and (self.streak == 0 or last):
            state = self.states() | {"step": step + 1, "seconds": self.seconds, "skipped": self.skipped}
            if not self.all_finite(state):
                raise self.diverged(step, "the weights, or AdamW's means, are not finite")
            for name in ["trunk.pt"] * trunk + ["ckpt.pt"]:                 # (the trunk stays when ckpt.pt moves on)
                save_checkpoint(self.out / name, state)
        if stopping and not last:
            what = "saved" if self.streak == 0 else "without its last steps, which were not finite"
            print(f"stopped by {stopping[0]} after step {step}: {what}; the same command continues")
            raise Ended(0)

    def stopping(self) -> list[str]:
        return list(self.stop)

    def states(self) -> dict[str, dict]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def all_finite(self, state: dict) -> bool:
        return all_finite(state)

    def diverged(self, step: int, what: str) -> Ended:
        """Say why the run stops, and which checkpoint there is."""
        if self.pending:
            self.flush()
        kept = "the last finite checkpoint" if (self.out / "ckpt.pt").is_file() else "no checkpoint"
        if RANK == 0:
            print(f"error: {what}, stopping at step {step}; {kept} is in {self.out}: start anew with a lower "
                  "learning_rate and --overwrite", file=sys.stderr)
        return Ended(DIVERGED)

    def flush(self) -> dict:
        """Write the pending steps and return the last's line. Reading the first number waits for the device."""
        rows = [(step, rate, int(n_bytes), numbers.tolist(), {k: v.tolist() for k, v in stats.items()})
                for step, rate, n_bytes, numbers, stats in self.pending]
        self.pending = []
        now = time.perf_counter()
        elapsed, self.elapsed, self.clock = self.elapsed + now - self.clock, 0.0, now
        self.seconds += elapsed
        speed = (sum(self.data.position(rows[-1][0])) - self.data.position(rows[0][0])[0]) / elapsed
        for step, rate, n_bytes, (ce, balance, z, norm), stats in rows:
            start, batch = self.data.position(step)
            bad = not math.isfinite(norm)
            self.skipped += bad
            self.streak = (self.streak + 1) * bad
            self.longest_streak = max(self.longest_streak, self.streak)
            line = {"step": step, "tokens": start + batch, "ce": ce,
                    "bits_per_byte": ce * batch / math.log(2) / max(n_bytes, 1), "balance": balance, "z": z,
                    "lr": rate, "grad_norm": norm, "skipped": self.skipped, "tokens_per_s": speed,
                    "mfu": self.flops * speed / self.peak if self.peak else None,
                    "memory": peak_memory(self.config.device), "seconds": self.seconds}
            if stats:
                load, layers = stats["load"], len(stats["load"])            # (L, E), and over all layers:
                line |= {"load_max_over_mean": max(max(row) / max(sum(row), 1e-9) for row in load) * len(load[0]),
                         "entropy": sum(stats["entropy"]) / layers, "dropped": sum(stats["dropped"]) / layers,
                         "dead_experts": sum(row.count(0) for row in load)}
            if stats and step == rows[-1][0]:
                line["load"] = [[round(share, 5) for share in row] for row in load]
            self.write(line)
        return line

    def print_line(self, line: dict) -> None:
        seconds = int((self.data.position(self.data.steps)[0] - line["tokens"]) / line["tokens_per_s"])
        mfu = f"{line['mfu']:.1%}" if line["mfu"] else "n/a"
        moe = (" balance {balance:.3f} load {load_max_over_mean:.2f}x dead {dead_experts}".format(**line)
               if "load" in line else "")
        skipped = f" skipped {self.skipped}" if self.skipped else ""
        print("step {step:6d} tokens {tokens:,} ce {ce:.4f} bits/byte {bits_per_byte:.3f}".format(**line)
              + moe + " lr {lr:.2e} {tokens_per_s:,.0f} tok/s".format(**line)
              + f" mfu {mfu} mem {line['memory'] / 2**30:.2f} GiB left {seconds // 60}m{seconds % 60:02d}s{skipped}",
              flush=True)

    def end(self, evaluate: Callable[[], tuple[float, float]]) -> None:
        """result.json, the figures and a sample of text: what a run leaves behind."""
        self.leave(*self.evaluation(self.data.steps, evaluate))

    def leave(self, ce: float, bits: float) -> None:
        config, out = self.config, self.out
        sizes = budget(config)
        result = {
            "name": out.name, "status": "done", "loss": ce, "bits_per_byte": bits, **sizes,
            "skipped": self.skipped, "seconds": self.seconds,
            "tokens_per_s": sizes["tokens"] / max(self.seconds, 1e-9), "peak_memory": peak_memory(config.device),
            "dataset": config.dataset, "tokenizer": config.tokenizer, "device": device_name(config.device),
            "dtype": config.dtype, "torch": torch.__version__, "python": platform.python_version(),
        }
        draw_figures(out)
        write_text_file(out / "result.json", json.dumps(result, indent=1))  # last: it says that the run is finished
        figures = "loss.png, experts.png" if config.n_expert > 1 else "loss.png"
        print(f"done: {ce:.4f} nats a token, {bits:.4f} bits a byte after {sizes['tokens']:,} tokens in "
              f"{self.seconds:.0f} s; {out}/ holds result.json, {figures}")
        self.show_sample()

    def show_sample(self) -> None:
        config = self.config
        print("--- a sample ---")
        prompt = "import " if config.dataset == "stdlib" else ""
        n_token = min(200, config.max_seq_len - len(prompt) - 1)
        if n_token > 0:
            with autocast(config):
                print("".join(write_text(self.model.eval(), self.data.tokenizer, prompt, n_token, seed=config.seed)))


def catch_signals() -> list[str]:
    """Ctrl-C and SIGTERM put their name into this list: the loop ends its step, saves, leaves. A second one kills."""
    caught: list[str] = []

    def handler(number, frame):
        if caught and not UNDER_TORCHRUN:                    # (it passes one on that may have come already)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        caught.append(signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return caught


def describe(config: Config, data: Corpus, need: int, free: int) -> None:
    """What is about to happen, before it does."""
    sizes, tied = budget(config), "tied" if config.tie_embeddings else "untied"
    total, active, tokens = sizes["n_total"], sizes["n_active"], sizes["tokens"]
    experts = f"{config.n_expert} experts, top-{config.top_k}" if config.n_expert > 1 else "no experts"
    print(f"{config.out_dir}: {total / 1e6:,.1f}M parameters, {active / 1e6:,.1f}M active, {tied} embeddings included; "
          f"{config.n_layer} layers, {experts}")
    print(f"data: {config.dataset} in {config.tokenizer}, {sum(map(len, data.train.arrays)):,} training and "
          f"{sum(map(len, data.val.arrays)):,} validation tokens")
    print(f"run: {data.steps:,} steps, {tokens:,} tokens ({tokens / (len(data.train) * config.seq_len):.2f} epochs), "
          f"{sizes['flops']:.3g} FLOPs; about {need / 2**30:.2f} GiB beside torch's own, of {free / 2**30:.1f} GiB "
          f"free on {config.device}, {config.dtype}", flush=True)


def budget(config: Config) -> dict:
    """What a run costs: parameters (embeddings counted as the config ties them), steps, tokens and FLOPs."""
    sizes, suffix, last = count(config), "" if config.tie_embeddings else "_untied", total_steps(config)
    tokens = position(config, last)[0]
    return {"n_total": sizes["total" + suffix], "n_active": sizes["active" + suffix],
            "n_active_without_embeddings": sizes["active"] - sizes["embedding"], "n_expert": config.n_expert,
            "top_k": config.top_k, "steps": last, "tokens": tokens, "flops": sizes["flops_per_token"] * tokens}


# --- more than one process: torchrun starts train.py on every rank, torch.distributed connects them ---
# Rank r of a world of W takes every W-th micro-batch of a step. "ddp": each rank holds the model, and gradients are
# averaged. "fsdp": each holds a W-th of every matrix, gathered for a block while it computes. Expert parallelism, with
# "ddp": each rank of a group of n holds E / n experts, and tokens travel. Only rank 0 prints and writes.


RANK, WORLD, UNDER_TORCHRUN = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), "RANK" in os.environ


@contextlib.contextmanager
def ranks() -> Iterator[None]:
    """Connect the processes that torchrun started: NCCL between GPUs, gloo between CPUs. Alone: nothing."""
    if not UNDER_TORCHRUN:
        yield
        return
    if torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store = next(rendezvous("env://"))[0]
    if os.environ.get("GROUP_WORLD_SIZE") == "1":           # after a restart the old addresses are still in the store
        store = dist.PrefixStore(f"{restarts()}", store)
    dist.init_process_group(store=store, rank=RANK, world_size=WORLD)
    with contextlib.redirect_stdout(open(os.devnull, "w") if RANK else sys.stdout):
        try:
            yield
        except BadInput:
            if RANK == 0:
                raise
            sys.exit(2)                                                     # rank 0 says it for all
    dist.destroy_process_group()


def gathered(thing) -> list:
    """What each rank has here, by rank."""
    things = [thing] * WORLD
    if WORLD > 1:
        dist.all_gather_object(things, thing)
    return things


def in_turn(make: Callable) -> Callable:
    """`make`, done by rank 0 first, which writes what the others read; where it ends on one, it ends on all."""

    def made(*arguments):
        result = ended = None
        for turn in (False, True):
            if (RANK > 0) == turn:
                try:
                    result = make(*arguments)
                except (BadInput, Ended, OSError) as error:
                    ended = error
            ended = next(filter(None, gathered(ended)), None)
            if ended:
                raise ended
        return result

    return made if WORLD > 1 else make


@lru_cache
def mesh(n: int) -> DeviceMesh:
    """The world as groups of n ranks: "experts" along a group, "replicas" across groups."""
    kind = "cuda" if torch.cuda.device_count() else "cpu"
    return init_device_mesh(kind, (WORLD // n, n), mesh_dim_names=("replicas", "experts"))


def check_ranks(config: Config, world: int) -> None:
    """Raise BadInput where a world of so many ranks cannot train this."""
    n = config.expert_parallel
    require(config.data_parallel == "ddp" or n == 1, f"expert_parallel = {n} goes with data_parallel = 'ddp' alone")
    if n > 1:
        require(config.n_expert > 1 and len(config.widths) == 1,
                f"expert_parallel = {n} needs experts of one width, not expert_groups and not n_expert = 1")
        require(config.n_expert % n == 0 and world % n == 0, f"expert_parallel = {n} must divide n_expert = "
                f"{config.n_expert} and the number of processes, {world}")


LINKS = {"NVLink": 450e9, "InfiniBand": 50e9}    # bytes/s a GPU sends: among the 8 of an H100 machine; between machines


def on_one_rank(config: Config, world: int) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes a rank holds in a step, and bytes it sends in one, by part: by rings, and with an even load."""
    c, n, held = config, config.expert_parallel, memory(config, config.micro_batch, config.dtype)
    layers = c.n_layer - c.first_dense_layers if c.n_expert > 1 else 0
    params = held["weights"] / 4
    del held["total"]
    split = layers * 3 * c.d_model * sum(number * width for number, width in c.widths) * (n > 1)
    root = c.vocab_size * c.d_model * (1 if c.tie_embeddings else 2)
    fsdp, n_micro = c.data_parallel == "fsdp", max(1, ramp(c)[-1][1] // (world * c.micro_batch * c.seq_len))
    mine = params / world if fsdp else params - split + split / n
    rows = layers * c.micro_batch * c.seq_len * c.top_k * c.d_model * (2 if c.dtype == "bfloat16" else 4)
    held |= {part: held[part] * mine / params for part in ("weights", "gradients", "optimizer")}
    block = (params - root) / c.n_layer
    held["gathered"] = 2 * 4 * (root + 2 * block) * fsdp                    # of embedding, a block, the next: weights,
    held["exchanged"] = 2 * rows * (n > 1)                                  # gradients; rows that came, and came back
    held["total"] = sum(held.values())
    others, other_replicas, other_owners = ((k - 1) / k for k in (world, world // n, n))
    reduced = 4 * (params - split) * others + 4 * split / n * other_replicas
    sent = {"all-reduce": 2 * reduced * (not fsdp), "all-gather": 2 * n_micro * 4 * params * others * fsdp,
            "reduce-scatter": n_micro * 4 * params * others * fsdp, "all-to-all": 4 * n_micro * rows * other_owners}
    return held, sent


def experts_of_ranks(experts: Callable, group: dist.ProcessGroup) -> Callable:
    """The table's `experts` where each rank of a group holds E / n of them: a row travels to the rank of its expert, is
    multiplied there, by the `experts` given, and travels back. The host must know how many rows: it waits for a GPU."""

    def over_ranks(x: Tensor, routing: Routing, w: MoE) -> Tensor:
        mine = routing.counts.view(group.size(), -1)                        # (n, E / n): my rows, by rank and expert
        here = torch.empty_like(mine)                                       # (n, E / n): rows for my experts, by rank
        dist.all_to_all_single(here, mine, group=group)
        sizes, sizes_here = mine.sum(1).tolist(), here.sum(1).tolist()
        rows = gather(x.to(compute_dtype(x)), routing.slot)                 # (R, D) in expert order, so by rank too
        rows = all_to_all_single_autograd(rows, sizes_here, sizes, group)
        e = torch.arange(here.shape[1], device=x.device).repeat(len(here)).repeat_interleave(here.flatten())[:, None]
        there = Routing(torch.ones_like(e, dtype=torch.float32), e, *place(e, here.shape[1]), here.sum(0), {}, {})
        rows = all_to_all_single_autograd(experts(rows, there, w), sizes, sizes_here, group)
        slot = routing.slot.flatten().long()
        weight = torch.zeros_like(routing.weights).flatten().scatter(0, slot, routing.weights.flatten())
        return combine(rows * weight[:, None].to(rows.dtype), routing.slot)

    return torch.compiler.disable(over_ranks)                               # rows that arrive are never as many again


class OnRanks(nn.Module):
    """A forward pass on all ranks: its numbers are those of all their rows together, its gradients of one's own."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> Output:
        share = 1 / WORLD
        if not self.training:                                               # one micro-batch, its rows shared out (a
            share = len(x[RANK::WORLD]) / len(x)                            # rank without one takes part all the same)
            x, y = (x[RANK::WORLD], y[RANK::WORLD]) if share else (x[:1], y[:1])
        o = self.model(x, y)
        numbers = [o.ce, o.balance, o.z, *o.stats.values()]
        means = sum_over_ranks(torch.cat([n.detach().float().flatten() for n in numbers]) * share)
        means = [part.view_as(n) for part, n in zip(means.split([n.numel() for n in numbers]), numbers)]
        # DDP and FSDP2 average gradients over ranks, and a step's gradient is a sum over its micro-batches: times W.
        losses = [WORLD * n + (mean - WORLD * n).detach() for n, mean in zip(numbers[:3], means)]
        return Output(None, *losses, dict(zip(o.stats, means[3:])))


class RankCorpus(Corpus):
    rank, world = RANK, WORLD

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        n = self.position(step)[1] // (self.config.micro_batch * self.config.seq_len * WORLD)
        torch.manual_seed(torch.initial_seed() + (RANK << 48))              # noise of its own
        for i, batch in enumerate(super().micro_batches(step), 1):
            self.synchronise(i == n)
            yield batch

    def synchronise(self, last: bool) -> None:
        """DDP's, once it is there: average gradients after the last alone. (FSDP2 would have to keep whole ones.)"""


class RankRun(Run):
    """A Run on many ranks. Its checkpoint does not know how many: gathered, it is that of a single process."""

    def begin(self, model: Model, optimizer: torch.optim.Optimizer) -> tuple[Callable[..., Output], int]:
        c, names = self.config, {p: name for name, p in model.named_parameters()}
        self.names = [names[p] for group in optimizer.param_groups for p in group["params"]]       # in its order
        self.split = split_experts(model, c.expert_parallel) if c.expert_parallel > 1 else []
        if c.data_parallel == "fsdp":
            for module in (*model.blocks, model):
                fully_shard(module, mesh=mesh(1)["replicas"])
        self.parameters = dict(model.named_parameters())                    # split or sharded
        left = iter(self.names)
        for group in optimizer.param_groups:
            group["params"] = [self.parameters[next(left)] for _ in group["params"]]
        if self.state:
            self.state |= self.each(self.cut, self.state["model"], self.state["optimizer"])
        if self.given:
            self.given = {name: self.cut(name, t) for name, t in self.given.items()}
        forward, start = super().begin(model, optimizer)
        require(len({*gathered(start)}) == 1, f"{self.out} must be a folder that every rank sees")
        if c.data_parallel == "ddp":
            alone = [name for name, p in forward.named_parameters() if any(p is one for one in self.split)]
            alone += [name for name, _ in forward.named_buffers()]          # (a rank's own counts of the load)
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(forward, alone)
            forward = DistributedDataParallel(forward, gradient_as_bucket_view=True)
            self.data.synchronise = partial(setattr, forward, "require_backward_grad_sync")
        self.peak = self.peak and WORLD * self.peak
        return OnRanks(forward), start

    def each(self, change: Callable[[str, Tensor], Tensor], model: dict, optimizer: dict) -> dict:
        """A checkpoint's two dictionaries, each tensor changed by what its parameter is called."""
        moments = {i: {key: change(self.names[i], t) for key, t in state.items()}
                   for i, state in optimizer["state"].items()}
        return {"model": {name: change(name, t) for name, t in model.items()},
                "optimizer": optimizer | {"state": moments}}

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """What this rank holds of a parameter, or of one of its moments."""
        p = self.parameters.get(name)                                       # (none: a buffer, and it has it whole)
        if isinstance(p, DTensor) and whole.dim():
            return distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
        if any(p is one for one in self.split) and whole.dim():
            return my_experts(whole, self.config.expert_parallel)
        return whole

    def whole(self, name: str, mine: Tensor) -> Tensor:
        """`cut` undone. On all ranks at once."""
        if mine.dim() and any(self.parameters.get(name) is one for one in self.split):
            mine = DTensor.from_local(mine.detach(), mesh(self.config.expert_parallel)["experts"], [Shard(0)])
        if isinstance(mine, DTensor):
            mine = mine.full_tensor()
            mine = mine.cpu() if RANK == 0 else mine[:0]                    # not all of them on every GPU at once
        return mine

    def states(self) -> dict:
        return self.each(self.whole, *super().states().values())

    def all_finite(self, state: dict) -> bool:
        return all(gathered(super().all_finite(state)))

    def clip(self) -> Tensor:
        """The norm of the whole gradient: what each rank holds alone is added up over its group."""
        n = self.config.expert_parallel
        for p in self.split:
            dist.all_reduce(p.grad, group=mesh(n)["replicas"].get_group())
            p.grad /= WORLD
        own, all_parameters = {*self.split}, [*self.parameters.values()]
        norm = torch.nn.utils.get_total_norm([p.grad for p in all_parameters if p not in own and p.grad is not None])
        if own:
            square = torch.nn.utils.get_total_norm([p.grad for p in self.split]).square()
            dist.all_reduce(square, group=mesh(n)["experts"].get_group())
            norm = (norm.square() + square).sqrt()
        torch.nn.utils.clip_grads_with_norm_(all_parameters, self.config.grad_clip or math.inf, norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def stopping(self) -> list[str]:
        """A signal to one rank stops all, after the same step."""
        told = sum_over_ranks(torch.tensor(len(self.stop)))
        return (self.stop or ["a signal to another rank"]) if told else []

    def step(self, step: int, norm: Tensor, rate: float) -> None:
        self.bytes_read = sum_over_ranks(self.bytes_read)
        super().step(step, norm, rate)

    def write(self, line: dict) -> None:
        if RANK == 0:
            super().write(line)

    def leave(self, ce: float, bits: float) -> None:
        if RANK == 0:
            super().leave(ce, bits)

    def show_sample(self) -> None:
        print(f"python model.py {self.out} writes a sample")


def keep_on_ranks(config: Config, data: RankCorpus, back: bool = False) -> RankRun:
    """A RankRun, if all ranks are about to do the same."""
    here = as_json(config) | {"data": fingerprint(data.train), "torch": torch.__version__}
    first, *others = gathered(here)
    for rank, other in enumerate(others, 1):
        differ = [f"{name} {first[name]!r} -> {other[name]!r}" for name in first if first[name] != other[name]]
        require(not differ, f"rank {rank} is about to train something else than rank 0: {'; '.join(differ)}")
    return in_turn(RankRun)(config, data, back)


def split_experts(model: Model, n: int) -> list[nn.Parameter]:
    """Leave each rank of a group of n its own experts alone; returns their parameters."""
    lists = [matrices for block in model.blocks if block.moe for matrices in (block.ffn.w_in, block.ffn.w_out)]
    for matrices in lists:
        matrices[0] = nn.Parameter(my_experts(matrices[0].detach(), n))
    return [matrices[0] for matrices in lists]


def my_experts(whole: Tensor, n: int) -> Tensor:
    return whole.chunk(n)[RANK % n].clone()


# --- the figures of a run, from its log alone ---


def draw_figures(out: Path) -> None:
    """loss.png, and experts.png for a model with experts, from out/log.jsonl."""
    draw_loss([out], out / "loss.png")
    loads = [line for line in read_log(out) if "load" in line]
    if loads:
        draw_experts(loads, out)


def read_log(out: Path) -> list[dict]:
    """The lines of out/log.jsonl; those that a crash or a bad disk has damaged are left out, and counted."""
    lines = (out / "log.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    found = [line for line in map(log_line, lines) if line]
    if len(found) < len(lines):
        print(f"{out}/log.jsonl: damaged lines are left out, {len(lines) - len(found)} of {len(lines)}")
    return found


def log_line(text: str) -> dict:
    """What Run.write wrote, or {}."""
    with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
        line = json.loads(text)
        load = np.asarray(line.get("load", [[]]), float)                    # (L, E)
        if type(line.get("step")) is int and load.ndim == 2 and all(
                isinstance(line.get(name), NUMBER) for name in ("tokens", "seconds")) and all(
                value is None or isinstance(value, NUMBER) for name, value in line.items() if name != "load"):
            return line
    return {}


def draw_loss(runs: list[Path], path: Path) -> None:
    """Cross-entropy of one run or several, by training tokens and by training seconds; the first plunge is cut off."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    tops = []
    for i, out in enumerate(runs):
        steps, evals = ([x for x in read_log(out) if x.get(name) is not None] for name in ("ce", "val_ce"))
        if steps:                                                           # (none: a log was lost, not its run)
            ce, width = np.array([x["ce"] for x in steps]), max(1, len(steps) // 50)
            tops.append(1.05 * np.quantile(ce, 0.93))
            axes[0].plot([x["tokens"] / 1e6 for x in steps[width - 1:]],
                         np.convolve(ce, np.ones(width) / width, "valid"), color=f"C{i}", alpha=0.5, linewidth=0.9)
        last = f"{as_text(out.name)}: {evals[-1]['val_ce']:.3f}"
        for axis, key, unit in zip(axes, ("tokens", "seconds"), (1e6, 1)):
            axis.plot([x[key] / unit for x in evals], [x["val_ce"] for x in evals], "o-", color=f"C{i}", ms=3.5,
                      label=last)
    axes[0].set_xlabel("training tokens, millions")
    axes[1].set_xlabel("training seconds")
    axes[0].set(ylabel="cross-entropy, nats per token", ylim=(None, max(tops, default=None)))
    axes[0].legend(frameon=False, title="validation (dots) at the end; thin: training")
    save_figure(figure, path)


def as_text(name: str) -> str:
    """A name for matplotlib, which would read what stands between dollars as mathematics."""
    return name.replace("$", r"\$")


def save_figure(figure, path: Path) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot().close(figure)


def pyplot():
    """matplotlib without a screen, imported when there is something to draw."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def draw_experts(loads: list[dict], out: Path) -> None:
    """Above, a panel a layer, a row an expert, time to the right; colour is an expert's share of tokens over an even
    share. Below, what the log sums up of it: the busiest expert, the routers' indecision, experts without a token."""
    loads = [x for x in loads if np.shape(x["load"]) == np.shape(loads[-1]["load"])]      # (others: damaged lines)
    load = np.array([x["load"] for x in loads])                             # (time, L, E)
    load = load / load.sum(-1, keepdims=True).clip(1e-9) * load.shape[2]    # a router may leave slots unused
    columns = min(4, load.shape[1])
    rows = -(-load.shape[1] // columns)
    figure = pyplot().figure(figsize=(max(7, 3 * columns + 1), 2.2 * rows + 2.8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.2 * rows + 0.4, 2.4])
    axes = top.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[load.shape[1]:]:
        axis.set_visible(False)
    for layer, axis in zip(range(load.shape[1]), axes.flat):
        image = axis.imshow(load[:, layer].T, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest",
                            origin="lower", extent=(0, loads[-1]["tokens"] / 1e6, -0.5, load.shape[2] - 0.5))
        axis.set_title(f"layer {layer}", fontsize=9)
    top.suptitle(f"{as_text(out.name)}: who does the work", fontsize=10)
    top.supylabel("expert", fontsize=9)
    top.colorbar(image, ax=axes, label="share of tokens / even share", shrink=0.8, extend="max")
    names = ("load_max_over_mean", "entropy", "dead_experts")
    lines = [x for x in read_log(out) if all(x.get(name) is not None for name in names)]
    for axis, name, label in zip(bottom.subplots(1, 3), names, (
            "busiest expert, x even share", "entropy of the scores, nats", "experts without a token, all layers")):
        axis.plot([x["tokens"] / 1e6 for x in lines], [x[name] for x in lines], linewidth=0.8)
        axis.set_title(label, fontsize=9)
        axis.set_ylim(bottom=0)
    bottom.supxlabel("training tokens, millions", fontsize=9)
    save_figure(figure, out / "experts.png")


# --- see the routing ---


KINDS = {  # of token, by its first character behind the space a word may start with; the first that fits
    "line break": lambda c: c in "\r\n", "space": str.isspace, "digit": str.isdigit, "lower case": str.islower,
    "upper case": str.isupper, "bracket": lambda c: c in "()[]{}<>", "quote": lambda c: c in "\"'`",
    "other sign": lambda c: c.isascii(), "not ASCII": lambda c: True,
}


def kind_of(token: str) -> str:
    character = (token.strip(" ") or token)[0]
    return next(name for name, fits in KINDS.items() if fits(character))


@torch.no_grad()
def first_experts(model: Model, ids: list[int]) -> Tensor:
    """(L, N): the expert that weighs most for each token, -1 where none does, in each layer that has experts."""
    found = []

    def route_and_keep(*arguments) -> Routing:
        r = FAST.route(*arguments)
        top = r.weights.max(1, keepdim=True)
        found.append(r.experts.gather(1, top.indices).where(top.values > 0, -1))
        return r

    pieces = torch.tensor(ids, device=model.embed.weight.device).split(model.config.seq_len)      # as in training
    with using(FAST._replace(route=route_and_keep)):
        for piece in pieces:
            model(piece[None])
    layers = len(found) // len(pieces)
    return torch.cat([torch.cat(found[i:i + layers], 1) for i in range(0, len(found), layers)]).T.cpu()


def show_routing(folder: Path, text: str) -> None:
    """routing.json, the expert of every token and each expert's share of each kind of token, and routing.png."""
    model, tokenizer = load_run(folder)
    require(model.config.n_expert > 1, f"{folder} holds a model without experts: there is no routing to show")
    ids = ids_of(text, tokenizer, model)
    require(len(ids) > 1, "--text needs a text of two tokens or more, or a file that holds one")
    pieces = [reader(tokenizer)(i) or "\ufffd" for i in ids]
    experts, kinds = first_experts(model, ids), np.array([kind_of(piece) for piece in pieces])
    names = [name for name in KINDS if name in kinds]
    chosen = np.arange(model.config.n_expert)[:, None] == experts.numpy()[:, None]            # (L, E, N)
    share = np.stack([chosen[:, :, kinds == name].mean(-1) for name in names], -1)
    result = {"layers": [i for i, block in enumerate(model.blocks) if block.moe], "tokens": pieces,
              "experts": experts.tolist(), "kinds": names,
              "tokens_of_kind": [int(sum(kinds == name)) for name in names], "share": share.tolist()}
    write_text_file(folder / "routing.json", json.dumps(result))
    draw_routing(result, folder / "routing.png")
    print(f"{len(ids)} tokens, {text[:20]!r} ...: {folder}/routing.png, and the numbers behind it in routing.json")


def draw_routing(result: dict, path: Path, width: int = 64) -> None:
    """Above, the text's first lines, a coloured row a layer; below, a heat map a layer: expert by kind of token."""
    experts, share = np.array(result["experts"]), np.array(result["share"])                    # (L, N), (L, E, kinds)
    (layers, n), n_expert = experts.shape, share.shape[1]
    n_line = min(4, -(-n // width))
    experts = np.pad(experts[:, :n_line * width], ((0, 0), (0, max(0, n_line * width - n))), constant_values=-1)
    height = 0.45 * n_line * (1 + layers / 2)
    figure = pyplot().figure(figsize=(12, height + 4.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[height + 0.5, 3.7])
    top.suptitle("the expert that weighs most for each token, a row a layer", fontsize=10)
    colours = pyplot().get_cmap("tab20" if n_expert <= 20 else "turbo", n_expert).with_extremes(under="white")
    for line, axis in enumerate(top.subplots(n_line, 1, squeeze=False).flat):
        here = slice(line * width, (line + 1) * width)
        image = axis.imshow(experts[:, here], cmap=colours, vmin=-0.5, vmax=n_expert - 0.5, aspect="auto")
        for column, token in enumerate(result["tokens"][here]):
            shown = as_text(token.replace("\n", "\u21b5").replace("\t", "\u2192").replace(" ", "\u00b7"))
            axis.text(column, -0.7, shown, ha="center", fontsize=8, family="monospace",
                      rotation=0 if len(token) < 3 else 60)
        axis.set_yticks(range(layers), result["layers"])
        axis.set(xticks=[], ylabel="layer")
        axis.spines[:].set_visible(False)
    top.colorbar(image, ax=top.axes, label="expert", shrink=0.8)
    bottom.suptitle("share of a kind's tokens that go first to an expert", fontsize=10)
    for layer, axis in enumerate(bottom.subplots(1, layers, sharey=True, squeeze=False).flat):
        image = axis.imshow(share[layer], aspect="auto", vmin=0, vmax=share.max())
        axis.set(title=f"layer {result['layers'][layer]}", ylabel="" if layer else "expert")
        axis.set_xticks(range(len(result["kinds"])), result["kinds"], rotation=60, ha="right", fontsize=8)
    bottom.colorbar(image, ax=bottom.axes, shrink=0.8)
    save_figure(figure, path)


# === Part 3: sweeps ===============================================================================================

import csv
import io
import statistics
import subprocess

from router import FUSED, Context, check_causal

# --- what is run ---


@dataclass
class Trial:
    """One run of a sweep, kept in out/SWEEP/NAME. The one run of a file without `runs` has no name."""

    config: Config
    name: str = ""             # MODEL, or MODEL-s1, MODEL-s2, ... where several seeds repeat it
    model: str = ""            # the name in the file: what a mean over seeds is taken of
    group: str = ""            # `group` in the file: ranked apart, and a colour or a curve of its own in the figure
    along: str | None = None   # the field that the figure draws the loss against
    baseline: str | None = None    # the group whose runs are the ladder that equal loss is read off
    broken: str = ""           # what the system said when its folder could not be used
    shorter: "Trial | None" = None     # of a branch: the next shorter one, whose trunk it takes over
    back: bool = False         # --previous: it goes on from the checkpoint before the last


def load_runs(path: str, overrides: dict | None = None) -> list[Config]:
    """The Config of every run of a sweep, or of the one run of a plain config file."""
    return [run.config for run in read_runs(path, overrides)]


def read_runs(path: str, overrides: dict | None = None, seeds: list | None = None, scale: float = 1) -> list[Trial]:
    """Every run of a file, each checked: overrides win over a run's own fields, which win over the shared ones."""
    shared, overrides = read_file(path, scale), overrides or {}
    if "runs" not in shared:
        require(not seeds, f"{path} is one run: --seeds is for sweeps, use --seed")
        return [Trial(make_config(shared | overrides, f"out/{Path(path).stem}", overrides))]
    entries, in_file, along = shared.pop("runs"), shared.pop("seeds", []), shared.pop("along", None)
    baseline = shared.pop("baseline", None)
    seeds = seeds or in_file
    require(isinstance(entries, list) and entries
            and all(isinstance(entry, dict) and all(isinstance(name, str) for name in entry) for entry in entries),
            f"{path}: runs must be a list of dict(name=..., field=...)")
    for some in (in_file, seeds):
        require(isinstance(some, list) and all(type(seed) is int for seed in some) and len({*some}) == len(some),
                f"{path}: seeds = {some!r} must be different whole numbers, such as [1, 2, 3]")
    require(not seeds or "seed" not in overrides, "--seed would make the seeds of a run all the same: use --seeds")
    folder = overrides.get("out_dir") or shared.get("out_dir") or f"out/{Path(path).stem}"
    suffix = "-s{}" if max(len(in_file), len(seeds)) > 1 else ""            # (a part of the seeds has the same names)
    runs = [run for entry in entries for seed in seeds or [None]
            for run in make_runs(entry, seed, suffix.format(seed), shared, overrides, folder)]
    for run in runs:
        run.along = along
        run.baseline = baseline
    numbers = [getattr(run.config, str(along), None) for run in runs]
    require(along is None or all(type(n) in (int, float) for n in numbers),
            f"{path}: along = {along!r} must be a field that is a number in every run, such as 'd_expert'")
    names = [run.name for run in runs]
    twice = [name for name in names if names.count(name) > 1]
    require(not twice, f"{path} has two runs named {twice and twice[0]}")
    if baseline is not None:
        require_ladder(path, runs, baseline)
    return runs


def require_ladder(path: str, runs: list[Trial], baseline: str) -> None:
    """The baseline is a group of the sweep, and its runs have three budgets or more."""
    groups = sorted({run.group for run in runs})
    require(baseline in groups, f"{path}: baseline = {baseline!r} is no group of its runs"
            f"{closest(str(baseline), groups)}")
    budgets = {budget(run.config)["flops"] for run in runs if run.group == baseline}
    require(len(budgets) > 2, f"{path}: the baseline {baseline!r} needs a ladder, runs of three budgets (FLOPs) or "
            f"more, and has {len(budgets)}")


def make_runs(entry: dict, seed: int | None, suffix: str, shared: dict, overrides: dict, folder: str) -> list[Trial]:
    """The run of an entry or, one for each of its `branches`, runs to so many tokens: NAME-1000, NAME-2000, ..."""
    if "branches" not in entry:
        return [make_run(entry, seed, suffix, shared, overrides, folder)]
    name, ends = entry.get("name", ""), entry["branches"]
    require(isinstance(ends, list) and ends and all(type(end) is int and end > 0 for end in ends)
            and ends == sorted({*ends}),
            f"run {name}: branches = {ends!r} must be rising whole numbers, the tokens to train each branch to")
    own = {key: value for key, value in entry.items() if key != "branches"}
    longest = make_run(own | {"name": f"{name}-{ends[-1]}", "max_tokens": ends[-1]}, seed, suffix, shared, overrides,
                       folder)
    require(longest.config.schedule == "constant" and longest.config.decay > 0, f"run {name}: branches need a constant "
            "rate to share and a decay of their own: schedule = 'constant', decay > 0")
    require(longest.config.max_tokens == ends[-1] <= position(longest.config, total_steps(longest.config))[0],
            f"run {name}: another max_tokens, or too few max_steps, would end its branches elsewhere")
    runs = []
    for end in ends:
        model = f"{name}-{end}"
        config = replace(longest.config, max_tokens=end, out_dir=f"{folder}/{model}{suffix}")
        require(1 < config.warmup <= position(config, trunk_steps(config))[0], f"run {model}: branches share their "
                f"warmup, so it is in tokens, above 1, and over before a decay begins; not {config.warmup:g}")
        runs.append(replace(longest, config=config, name=model + suffix, model=model, shorter=[None, *runs][-1]))
    return runs


def make_run(entry: dict, seed: int | None, suffix: str, shared: dict, overrides: dict, folder: str) -> Trial:
    model, group = entry.get("name"), entry.get("group", "")
    safe = isinstance(model, str) and re.fullmatch(r"[A-Za-z0-9][\w.+=-]{0,99}", model)
    require(bool(safe) and model != "lock" and not model.startswith("summary."),
            f"a run's name must be letters, digits and . _ + = - (it becomes a folder), not {model!r}")
    require(isinstance(group, str), f"run {model}: group = {group!r} must be a text")
    own = {name: value for name, value in entry.items() if name not in ("name", "group")}
    require("out_dir" not in own, f"run {model}: out_dir is the whole sweep's, set it beside runs")
    require(seed is None or "seed" not in own, f"run {model} sets seed, and the sweep seeds: keep one of the two")
    values = shared | own | overrides | {"out_dir": f"{folder}/{model}{suffix}"}
    try:
        config = make_config(values if seed is None else values | {"seed": seed}, "", own | overrides)
    except BadInput as error:
        raise BadInput(f"run {model}: {error}") from None
    return Trial(config, model + suffix, model, group)


def select(runs: list[Trial], only: list[list[str]] | None) -> list[Trial]:
    """The runs that --only names, by their own name or, for all their seeds, by the name in the file."""
    wanted, known = [name for names in only or [] for name in names], {n for run in runs for n in (run.name, run.model)}
    for name in wanted:
        require(name in known, f"--only={name} is no run of this sweep{closest(name, known)}")
    return [run for run in runs if not wanted or run.name in wanted or run.model in wanted]


def dry_run(runs: list[Trial], as_json: bool) -> None:
    """A row a run, and of a single one its sizes in full; nothing is allocated for it, whatever the size.

    as_json: count(), budget() and memory() of the run, of a sweep a list of them; flops_paid: without a trunk that
    another branch has paid.
    """
    costs = [(run, count(c), memory(c, c.micro_batch, c.dtype), budget(c)) for run in runs for c in [run.config]]
    paid = [paid_flops(run) for run in runs]
    if as_json:
        found = [({"name": run.name} if run.name else {}) | sizes | cost | {"flops_paid": own, "memory": need}
                 for (run, sizes, need, cost), own in zip(costs, paid)]
        print(json.dumps(found if runs[0].name else found[0]))
        return
    names = [Path(run.config.out_dir).name for run in runs]
    width = max(map(len, names))
    print(f"{'run':{width}}      total     active         tokens    FLOPs    memory  fits here")
    for name, (run, _, need, cost) in zip(names, costs):
        free = free_memory(run.config.device)
        fits = "yes" if need["total"] <= free else f"no, {run.config.device} has {free / 2**30:.1f} GiB free"
        print(f"{name:{width}} {cost['n_total'] / 1e6:9,.2f}M {cost['n_active'] / 1e6:9,.2f}M "
              f"{cost['tokens']:14,} {cost['flops']:8.2e} {need['total'] / 2**30:5.2f} GiB  {fits}", flush=True)
    total = sum(cost["flops"] for *_, cost in costs)
    saving = f", {sum(paid):.3g} with each trunk paid once" if sum(paid) < total else ""
    print(f"{len(runs)} run{'s'[:len(runs) - 1]}, {total:.3g} FLOPs{saving}; parameters include embeddings, counted as "
          "each run ties them")
    if not runs[0].name:
        print_sizes(*costs[0][1:3])


def dry_run_world(config: Config, world: int, as_json: bool) -> None:
    """What a rank of `world` holds and sends in a step, for each way to train the config on so many."""
    require(type(world) is int and world > 1, f"--world={world} must be a number of processes, 2 or more")
    unit, batch = world * config.micro_batch * config.seq_len, ramp(config)[-1][1]
    require(config.batch_tokens is None or batch % unit == 0,
            f"batch_tokens = {batch} must be a multiple of micro_batch * seq_len * {world} ranks = {unit}")
    modes = {"ddp": {}, "fsdp": {"data_parallel": "fsdp"}}
    modes |= {f"experts / {n}": {"expert_parallel": n} for n in (2, 4, 8)}
    found = {}
    for mode, changes in modes.items():
        with contextlib.suppress(BadInput):                                 # a way that does not divide
            c = replace(config, **({"data_parallel": "ddp", "expert_parallel": 1} | changes))
            check_ranks(c, world)
            held, sent = on_one_rank(c, world)
            found[mode] = {"held": held, "sent": sent, "seconds": seconds_on_h100(c, world, sent)}
    if as_json:
        return print(json.dumps(found))
    print(f"a rank of {world}, {config.dtype}, a step of {max(1, batch // unit)} micro-batches a rank, "
          f"{max(unit, batch):,} tokens in all")
    for part, unit, power in (("held", "GiB", 2**30), ("sent", "GiB a step", 2**30), ("seconds", "on H100s", 1)):
        print(f"\n{part + ', ' + unit:26s}" + "".join(f"{mode:>14s}" for mode in found))
        for name in next(iter(found.values()))[part]:
            print(f"  {name:24s}" + "".join(f"{one[part][name] / power:14.3f}" for one in found.values()))


def seconds_on_h100(config: Config, world: int, sent: dict[str, float]) -> dict[str, float]:
    """By data sheet: matrix products at the full rate, and what is sent at that of the link: floors, both."""
    link = LINKS["NVLink" if world <= 8 else "InfiniBand"]
    tokens = max(ramp(config)[-1][1] / world, config.micro_batch * config.seq_len)
    rate = CARDS["H100"].bfloat16 if config.dtype == "bfloat16" else CARDS["H100"].float32
    within = LINKS["NVLink"] if config.expert_parallel <= 8 else link       # a group of experts is in one machine
    exchange = sent["all-to-all"] / within
    return {"computing": count(config)["flops_per_token"] * tokens / rate,
            "sending": exchange + (sum(sent.values()) - sent["all-to-all"]) / link}


def paid_flops(run: Trial) -> int:
    """FLOPs of a run, of a branch without the trunk that it takes over from the next shorter one."""
    cost, shorter = budget(run.config), run.shorter and run.shorter.config
    shared = position(shorter, trunk_steps(shorter))[0] if shorter else 0
    return cost["flops"] * (cost["tokens"] - shared) // cost["tokens"]


def print_sizes(sizes: dict[str, int], need: dict[str, int]) -> None:
    """Parameters by the three ways to count them, FLOPs, and the memory of a training step, item by item."""
    print(f"\n{'parameters':26s} {'total':>12s} {'active':>12s} {'active / total':>15s}")
    for label, suffix, less in (("tied, with embeddings", "", 0), ("untied, with embeddings", "_untied", 0),
                                ("without embeddings", "", sizes["embedding"])):
        total, active = sizes["total" + suffix] - less, sizes["active" + suffix] - less
        print(f"{label:26s} {f'{total / 1e6:,.1f}M':>12s} {f'{active / 1e6:,.1f}M':>12s} {active / total:>15.1%}")
    print(f"\ntraining FLOPs a token     {sizes['flops_per_token']:>12.4g}\n\nmemory of a training step, GiB")
    for name, n in need.items():
        print(f"  {name:24s} {n / 2**30:>12.2f}")


# --- sweeps: running ---


RESULTS = ("done", "out of memory", "diverged")     # not run again, but these are: "failed", "interrupted" (running, or
#                                                     stopped before its end), "skipped" (not chosen, or not reached)


@dataclass
class Started:
    """A run in its process."""

    run: Trial
    slot: int                    # which of the runs at once: its GPU
    process: subprocess.Popen
    log: Path
    offset: int                  # where this attempt begins in the log
    kills: int | None            # oom_kills() before it
    clock: float                 # when it began


def sweep(args: argparse.Namespace, runs: list[Trial], sum_up: Callable[[Path, list[Trial]], None]) -> int:
    """Run what has no result yet, then sum up. Exit code 0 when every chosen run has a result, else 1."""
    folder, chosen = Path(runs[0].config.out_dir).parent, select(runs, args.only)
    if args.report:
        require(folder.is_dir(), f"{folder} holds no run of {args.config} yet")
        for run in runs:                                                   # they may have run on another machine
            out = Path(run.config.out_dir)
            then = read_json(out / "outcome.json", config=dict).get("config") or read_json(out / "config.json")
            run.config = replace(run.config, **{k: then[k] for k in ("device", "dtype") if k in then})
    else:
        gpus = torch.cuda.device_count() if runs[0].config.device.startswith("cuda") else 1
        parallel = 1 if args.parallel is None else gpus if args.parallel is True else args.parallel
        require(type(parallel) is int and parallel > 0, f"--parallel={parallel} must be a number of runs at once")
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
        with contextlib.redirect_stdout(Screen()):
            run_all(chosen, parallel)
    sum_up(folder, runs)
    return 0 if all(outcome(run)[0] in RESULTS for run in chosen) else 1


def run_all(chosen: list[Trial], parallel: int) -> None:
    """Keep `parallel` processes busy until all have ended. Ctrl-C and SIGTERM are passed on, once: the runs save."""
    waiting = [run for run in chosen if run.config.overwrite or run.back or outcome(run)[0] not in RESULTS]
    print(f"{len(chosen)} run{'s'[:len(chosen) - 1]}, {len(chosen) - len(waiting)} of them have a result; "
          f"{parallel} at once", flush=True)
    work = {run.name: paid_flops(run) for run in waiting}                    # the time left goes by it
    stop, told, begin, n, done = catch_signals(), False, time.monotonic(), len(waiting), 0
    slots, live = list(range(parallel)), []
    while live or (waiting and not stop):
        while slots and not stop and (run := ready(waiting, live)):
            waiting.remove(run)
            with blame(run):
                live.append(start(run, slots[0], parallel))
                slots.pop(0)
            if run.broken:
                print(f"{run.name} failed, {run.broken}", flush=True)
                work.pop(run.name)
        for one in live if stop and not told else ():
            one.process.terminate()
        told = bool(stop)
        time.sleep(0.1)
        for one in [one for one in live if one.process.poll() is not None]:
            live.remove(one)
            slots.append(one.slot)
            one.process.stdin.close()
            with blame(one.run):
                record(one, told)
            status, reason, result = outcome(one.run)
            flops, now = work.pop(one.run.name), time.monotonic()
            done += flops if result else 0
            left = f", about {math.ceil((now - begin) * sum(work.values()) / done / 60)} min left" if done else ""
            ended = f"loss {result['loss']:.4f}" if result else reason
            print(f"{n - len(work)} of {n}: {one.run.name} {status}, {ended}, {now - one.clock:.0f} s; "
                  f"{len(live)} running, {len(waiting)} waiting{left}", flush=True)
    if stop:
        print(f"stopped by {stop[0]}: the same command continues")


@contextlib.contextmanager
def blame(run: Trial) -> Iterator[None]:
    """What the system says of a run's folder is the failure of this run, not the end of the sweep."""
    try:
        yield
    except OSError as error:
        run.broken = str(error)


def ready(waiting: list[Trial], live: list[Started]) -> Trial | None:
    """The first run that waits for nothing: a branch waits until the next shorter one has ended."""
    ahead = {run.name for run in itertools.chain(waiting, (one.run for one in live))}
    return next((run for run in waiting if not (run.shorter and run.shorter.name in ahead)), None)


def take_over_trunk(run: Trial) -> None:
    """Give a branch without a checkpoint the next shorter one's, from where that one's decay began."""
    here, there = Path(run.config.out_dir), Path(run.shorter.config.out_dir)
    then, now = read_json(there / "config.json"), as_json(run.config)
    same = not differences(then, now | {"max_tokens": then.get("max_tokens")})           # it may be of an older config
    if (here / "ckpt.pt").is_file() or not (there / "trunk.pt").is_file() or not same:
        return
    try:
        load_checkpoint(there / "trunk.pt", run.config)
    except BadInput:
        return print(f"{there}/trunk.pt is damaged: {run.name} begins at its first step")
    write_text_file(here / "config.json", json.dumps(then | now, indent=1))
    shutil.copy(there / "log.jsonl", here)                                 # (its later lines are left out by open_run)
    shutil.copy(there / "trunk.pt", here / "ckpt.tmp")
    (here / "ckpt.tmp").replace(here / "ckpt.pt")


def start(run: Trial, slot: int, parallel: int) -> Started:
    """A process of its own for the run: on its GPU, or with its share of the threads. Its output goes to train.log."""
    out, environment = Path(run.config.out_dir), dict(os.environ)
    out.mkdir(parents=True, exist_ok=True)
    if run.shorter and not run.config.overwrite:
        take_over_trunk(run)
    (out / "outcome.json").unlink(missing_ok=True)
    if parallel > 1:
        (out / "alone").unlink(missing_ok=True)
    elif run.config.overwrite or not (out / "config.json").is_file():      # from its first step on
        (out / "alone").touch()
    if run.config.device == "cpu" and parallel > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // parallel)))
    if run.config.device == "cuda":                                        # ("cuda:1" stays where it wants to be)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    command = [sys.executable, "-u", "-c", WATCHED, __file__, "--run", json.dumps(asdict(run.config)),
               *["--previous"] * run.back]
    with open(out / "train.log", "wb" if run.config.overwrite else "ab") as log:
        before = log.tell(), oom_kills(), time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment,
                                   start_new_session=True)                # Ctrl-C reaches it through us alone
    return Started(run, slot, process, out / "train.log", *before)


def end_with_parent() -> None:
    """Stop, as at SIGTERM, when nobody holds the other end of standard input any more: the sweep is gone, however it
    ended. What has not saved within three seconds goes on from its checkpoint another time."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3)
    os._exit(130)


WATCHED = f"""import os, runpy, signal, sys, threading, time
{inspect.getsource(end_with_parent)}
threading.Thread(target=end_with_parent, daemon=True).start()
sys.path[0], sys.argv = os.path.dirname(sys.argv[1]), sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""                                   # what a run's process runs: it watches while its packages load, too


def train_alone(config: Config, back: bool = False) -> int:
    """What start() starts. The exit code tells how it ended; running out of memory is one of the ways."""
    try:
        return run(config, back)
    except (DoesNotFit, MemoryError, RuntimeError) as error:
        if not isinstance(error, DoesNotFit) and not out_of_memory(error):
            raise
        print(f"error: {[*str(error).splitlines(), 'out of memory'][0]}", file=sys.stderr)
        return OUT_OF_MEMORY


def record(one: Started, stopping: bool) -> None:
    """Leave outcome.json in the folder of a run that did not end well: its status, the reason, its config."""
    code = one.process.returncode
    if code == 0 or (stopping and (code < 0 or code == 130)):              # done or saved: result.json tells
        return
    lines = one.log.read_bytes()[one.offset:].decode(errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines or ["no output"]
    status, reason = {DIVERGED: "diverged", OUT_OF_MEMORY: "out of memory"}.get(code, "failed"), errors[-1][:300]
    if code < 0:
        reason, kills = f"killed by signal {-code}", oom_kills()
        if code == -signal.SIGKILL and (one.kills is None or kills is None or kills > one.kills):
            status, reason = "out of memory", "killed by the system"
    write_text_file(one.log.with_name("outcome.json"),
                    json.dumps({"status": status, "reason": reason, "config": asdict(one.run.config)}, indent=1))


def oom_kills() -> int | None:
    """Processes that the kernel has killed for want of memory, here and in our control group; None: it does not say."""
    counters = [path for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat") if Path(path).is_file()]
    found = [re.search(r"^oom_kill (\d+)", Path(path).read_text(), re.MULTILINE) for path in counters]
    return sum(int(match[1]) for match in found if match) if any(found) else None


def outcome(run: Trial) -> tuple[str, str, dict]:
    """(status, reason, result.json) of a run, from its folder alone. A loss worse than guessing counts as diverged."""
    out, now = Path(run.config.out_dir), as_json(run.config)
    ended = read_json(out / "outcome.json", status=str, reason=str, config=dict)
    then, result = read_json(out / "config.json"), read_result(out)
    finished = result and then and not differences(then, now)              # then no attempt after it counts
    if run.broken:
        return "failed", run.broken, {}
    if ended and not finished and not differences(ended["config"], now):
        return ended["status"], ended["reason"], {}
    if not then:
        return "skipped", "not started", {}
    changed = differences(then, now)
    if changed:
        return "failed", f"{out} holds a run with another config ({'; '.join(changed)})", {}
    if not result:
        return "interrupted", "running, or stopped before its end", {}
    guess = math.log(run.config.vocab_size)
    if not result["loss"] <= guess + 0.5:                                  # a model starts a little worse than that
        return "diverged", f"loss {result['loss']:.2f}, guessing has {guess:.2f}", {}
    return "done", "", result


NUMBER = (int, float)


def read_json(path: Path, **kinds) -> dict:
    """The object in the file; {} if there is no file, no object, or what stands under a key is not of its kind."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and all(isinstance(found.get(k), kind) for k, kind in kinds.items()) else {}


def read_result(out: Path) -> dict:
    """A whole result.json, or {}: the run is then not finished."""
    names = ("loss", "bits_per_byte", "seconds", "tokens_per_s", "peak_memory")
    return read_json(out / "result.json", **dict.fromkeys(names, NUMBER))


# --- sweeps: summing up ---


def summarise(folder: Path, runs: list[Trial]) -> None:
    """summary.csv (a line a run), summary.md (the ranking) and summary.png of what there is so far."""
    rows, text = [table_row(run, differing(runs)) for run in runs], io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_file(folder / "summary.csv", text.getvalue())
    ladder = [row for row in rows if runs[0].baseline and row["group"] == runs[0].baseline]
    groups: dict[str, dict[str, list[dict]]] = {}                          # group -> model -> a row a seed
    for row in rows:
        groups.setdefault(row["group"], {}).setdefault(row["model"], []).append(row)
    tables = "\n\n".join([*(ranking(group, models, ladder) for group, models in groups.items()),
                          *[EQUAL_LOSS.format(runs[0].baseline)] * bool(ladder)])
    write_text_file(folder / "summary.md", f"# {folder.name}\n\n{tables}\n")
    draw_summary(folder, groups, runs[0].along)
    failed = {row["reason"]: row["name"] for row in rows if row["status"] == "failed"}
    print(f"\n{tables}\n\n{folder}/ holds summary.csv, summary.md and summary.png",
          *(f"{name} failed: {reason}" for reason, name in failed.items()), sep="\n")


def differing(runs: list[Trial]) -> list[str]:
    """The fields in which the runs differ, apart from their seed and folder."""
    return [f.name for f in fields(Config) if f.name not in ("seed", "out_dir")
            and any(getattr(run.config, f.name) != getattr(runs[0].config, f.name) for run in runs)]


def table_row(run: Trial, names: list[str]) -> dict:
    """Sizes, tokens, steps and FLOPs are the config's; loss, seconds, speed and memory are there once a run is done."""
    (status, reason, result), sizes = outcome(run), budget(run.config)
    return {"name": run.name, "model": run.model, "group": run.group, "seed": run.config.seed, "status": status,
            "reason": reason, "loss": result.get("loss"), "bits_per_byte": result.get("bits_per_byte"),
            "total": sizes["n_total"], "active": sizes["n_active"],
            "active_ratio": round(sizes["n_active"] / sizes["n_total"], 4), "tokens": sizes["tokens"],
            "steps": sizes["steps"], "flops": sizes["flops"], "seconds": result.get("seconds"),
            "tokens_per_s": result.get("tokens_per_s"), "peak_memory": result.get("peak_memory"),
            **({"alone": (Path(run.config.out_dir) / "alone").is_file()} if run.baseline else {}),
            **{name: getattr(run.config, name) for name in names}}


def losses(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows if row["status"] == "done"]


def by_loss(models: dict[str, list[dict]]) -> list[str]:
    """The models from the lowest mean loss to the highest, those without any at the end."""
    return sorted(models, key=lambda model: statistics.fmean(losses(models[model]) or [math.inf]))


def ranking(group: str, models: dict[str, list[dict]], ladder: list[dict]) -> str:
    """A table in the order of validation cross-entropy, under one line that says what is equal in the comparison.
    With a baseline's ladder: what each model's loss costs the baseline, over what it cost the model."""
    lines = [f"## {group}\n"] * bool(group) + [comparison([row for rows in models.values() for row in rows]), ""]
    head = "| rank | model | loss, nats/token | total | active | active ratio | tokens/s | peak memory | status |"
    worth = " FLOPs to equal loss | seconds to equal loss |" if ladder else ""
    lines += [head + worth, "|-:|-|-:|-:|-:|-:|-:|-:|-|" + "-:|-:|" * bool(ladder)]
    for rank, model in enumerate(by_loss(models), 1):
        rows = models[model]
        done = [row for row in rows if row["status"] == "done"]
        loss, speed, memory = ([row[key] for row in done] for key in ("loss", "tokens_per_s", "peak_memory"))
        spread = f" ± {statistics.stdev(loss):.4f} ({len(loss)})" if len(loss) > 1 else ""
        states = [row["status"] for row in rows]
        cells = [f"{rank}" if done else "", model, f"{statistics.fmean(loss):.4f}{spread}" if done else "",
                 f"{rows[0]['total'] / 1e6:,.2f}M", f"{rows[0]['active'] / 1e6:,.2f}M",
                 f"{rows[0]['active_ratio']:.2f}", f"{statistics.fmean(speed):,.0f}" if done else "",
                 f"{statistics.fmean(memory) / 2**30:.2f} GiB" if done else "",
                 ", ".join(f"{states.count(s)} {s}" if len(rows) > 1 else s for s in dict.fromkeys(states))]
        if ladder:
            cells += [ratio_text(equal_loss(rows, ladder, cost)) for cost in ("flops", "seconds")]
        lines.append(f"| {' | '.join(cells)} |")
    if any(len(rows) > 1 for rows in models.values()):
        lines += ["", "Loss: mean ± sample standard deviation over seeds (their number)."]
    return "\n".join(lines)


def comparison(rows: list[dict]) -> str:
    """What the finished runs have in common: a ranking means little without it."""
    done, equal, unequal = [row for row in rows if row["status"] == "done"], [], []
    if len(done) < 2:
        return "Fewer than two runs are done: nothing to compare yet."
    for key, word in (("tokens", "tokens"), ("flops", "FLOPs"), ("steps", "steps")):
        low, high = min(row[key] for row in done), max(row[key] for row in done)
        within = f", within {high / low - 1:.2%}" if high > low else ""
        if high <= 1.02 * low:
            equal.append(f"equal {word} ({format(high, '.3g' if key == 'flops' else ',')}{within})")
        else:
            unequal.append(f"{word} differ by a factor {high / low:.2f}")
    said = f"Compared at {', '.join(equal)}" if equal else "Compared at neither equal tokens nor FLOPs nor steps"
    return "; ".join([said, *unequal]) + "."


def draw_summary(folder: Path, groups: dict, field: str | None) -> None:
    """A dot a run, a line through the mean over seeds: against the field the sweep goes along, or in a row a model."""
    n = sum(map(len, groups.values()))
    figure, axis = pyplot().subplots(figsize=(7, 4.5) if field else (8, 1.2 + 0.3 * n), layout="constrained")
    (draw_curves if field else draw_rows)(axis, groups, field)
    axis.set_title(as_text(folder.name), fontsize=10)
    if len(groups) > 1:
        figure.legend(frameon=False, loc="outside upper center", ncols=len(groups), fontsize=8)
    save_figure(figure, folder / "summary.png")


def without_loss(rows: list[dict]) -> str:
    """What became of the runs that ended without a loss."""
    return ", ".join(sorted({row["status"] for row in rows} & {"out of memory", "diverged", "failed"}))


def draw_curves(axis, groups: dict, field: str) -> None:
    """The loss against the field, a curve a group; above it what became of the runs without a loss."""
    rows = [row for models in groups.values() for runs in models.values() for row in runs]
    values = sorted({row[field] for row in rows})
    for i, (group, models) in enumerate(groups.items()):
        curve = sorted((runs[0][field], losses(runs)) for runs in models.values() if losses(runs))
        axis.plot([x for x, ys in curve for _ in ys], [y for _, ys in curve for y in ys], "o", color=f"C{i}", alpha=0.5)
        axis.plot([x for x, _ in curve], [statistics.fmean(ys) for _, ys in curve], color=f"C{i}", label=as_text(group))
    for x in values:
        axis.text(x, 1, without_loss([row for row in rows if row[field] == x]), color="0.4", fontsize=8, rotation=90,
                  transform=axis.get_xaxis_transform(), va="top", ha="center")
    if values[0] > 0 and values[-1] > 8 * values[0]:
        axis.set_xscale("log")
    if len(values) <= 12:
        axis.set_xticks(values, [f"{value:g}" for value in values], fontsize=8)
        axis.set_xticks([], minor=True)
    axis.set(xlabel=field, ylabel="validation cross-entropy, nats per token")


def draw_rows(axis, groups: dict, field: str | None) -> None:
    """Without a field: a row a model, the best of a group on top; at its end what became of the runs without a loss."""
    names = []
    for i, (group, models) in enumerate(groups.items()):
        for model in by_loss(models):
            ys, y = losses(models[model]), len(names)
            axis.plot(ys, [y] * len(ys), "o", color=f"C{i}", ms=5, alpha=0.5)
            axis.plot(ys and [statistics.fmean(ys)], ys and [y], "|", color=f"C{i}", ms=12, mew=2)
            axis.text(0.99, y, without_loss(models[model]), color="0.4", fontsize=8, ha="right", va="center",
                      transform=axis.get_yaxis_transform())
            names.append(model)
        axis.plot([], [], "o", color=f"C{i}", label=as_text(group))
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.grid(axis="y", alpha=0.25)
    axis.set_xlabel("validation cross-entropy, nats per token")


# --- sweeps: what an idea is worth ---
# A sweep that sets `baseline = "group"` compares with the ladder of that group: the same model at three budgets or
# more. `python train.py judge SWEEP.py --field=value ...` adds a variant of each of its runs, the idea, and judges it.


T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)     # Student's t, 95%: 1 to 10 degrees of freedom
SAME_FOR_BOTH = ("out_dir", "device", "dataset", "tokenizer", "vocab_size", "eval_tokens")     # no part of an idea
EQUAL_LOSS = """To equal loss: what the baseline {} takes to reach a loss over what the model took, above 1 a saving;
mean over seeds and 95% interval. Seconds: only of runs that had the machine to themselves, --parallel=1."""


def read_judged(path: str, given: dict, seeds: list | None, scale: float) -> list[Trial]:
    """The baseline's runs, then the idea's: the same with the fields that are given. --overwrite is for the idea alone,
    whose code may have changed behind the same flags."""
    common = {name: value for name, value in given.items() if name in SAME_FOR_BOTH}
    ladder = [run for run in read_runs(path, common, seeds, scale) if run.group == run.baseline]
    require(ladder, f"{path} sets no baseline: judge needs a sweep with one, such as configs/judge.py")
    require(len({run.config.seed for run in ladder}) > 1, f"{path}: a verdict needs two seeds or more")
    flags = [f"{name}={value}" for name, value in given.items() if name not in (*SAME_FOR_BOTH, "overwrite")]
    require(flags, f"judge needs an idea: the flags that make it out of the baseline {ladder[0].group!r}, such as "
            "--router=hash")
    ideas = [run for run in read_runs(path, given, seeds, scale) if run.group == run.baseline]
    require(any({*differing([base, idea])} - {"overwrite"} for base, idea in zip(ladder, ideas)),
            f"the idea {' '.join(flags)} equals the baseline {ladder[0].group!r}: there is nothing to judge")
    return ladder + [renamed(run, re.sub(r"[^\w.+=-]", "_", "+".join(flags))[:80]) for run in ideas]


def renamed(run: Trial, idea: str) -> Trial:
    """The run in the idea's group, in a folder of the idea's name."""
    name, model = (idea + text.removeprefix(run.group) for text in (run.name, run.model))
    out = Path(run.config.out_dir).with_name(name)
    return replace(run, config=replace(run.config, out_dir=str(out)), name=name, model=model, group=idea)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval by Student's t."""
    n = len(values)
    return statistics.fmean(values), student(n) * statistics.stdev(values) / n ** 0.5 if n > 1 else math.inf


def student(n: int) -> float:
    """The 97.5% point of Student's t of n values (beyond the table by its expansion, good to 0.01)."""
    return T_95[n - 2] if n - 2 < len(T_95) else 1.96 + 2.6 / (n - 1)


def cost_of(loss: float, ladder: list[tuple[float, float]]) -> float | None:
    """What the loss costs on a ladder of (cost, loss), cheapest first: a straight line between two rungs, in logarithms
    of both. None beyond the ladder, where only an extrapolation would answer."""
    for (cost, high), (next_cost, low) in itertools.pairwise(ladder):
        if loss > high:                                                    # worse than the cheapest rung
            return None
        if loss >= low:
            share = math.log(high / loss) / math.log(high / low) if high > low else 0.0
            return cost * (next_cost / cost) ** share
    return None


def equal_loss(rows: list[dict], ladder: list[dict], cost: str) -> list[float | None]:
    """For each finished row whose seed has the whole ladder, the cost of its loss there over its own; None beyond it.
    Of seconds none at all, []: if one of these runs did not have the machine to itself."""
    lacking = {row["seed"] for row in ladder if row["status"] != "done"}
    done = [row for row in rows if row["status"] == "done" and row["seed"] not in lacking]
    seeds = {row["seed"] for row in done}
    if cost == "seconds" and not all(row["alone"] for row in done + [row for row in ladder if row["seed"] in seeds]):
        return []
    ratios = []
    for row in done:
        reached = cost_of(row["loss"], sorted((one[cost], one["loss"]) for one in ladder if one["seed"] == row["seed"]))
        ratios.append(reached and reached / row[cost])
    return ratios


def ratio_text(ratios: list[float | None]) -> str:
    """The geometric mean of the ratios and its 95% interval."""
    if not ratios:
        return ""
    if None in ratios:
        return f"beyond the ladder in {ratios.count(None)} of {len(ratios)} seeds"
    mean, half = interval([math.log(ratio) for ratio in ratios])
    bounds = f" ({math.exp(mean - half):.2f} to {math.exp(mean + half):.2f})" if len(ratios) > 1 else ""
    return f"{math.exp(mean):.2f}x{bounds}"


def give_verdict(folder: Path, runs: list[Trial]) -> None:
    """judge.json, judge.png and one screen: the idea, whose runs are the second half, against the baseline."""
    n = len(runs) // 2
    rows = [table_row(run, []) for run in runs]
    pairs: dict[str, list[tuple[dict, dict]]] = {}                         # model -> (baseline, idea) a seed
    for base, idea in zip(rows[:n], rows[n:]):
        pairs.setdefault(base["model"], []).append((base, idea))
    rungs = sorted((rung(pairs[model], rows[:n]) for model in pairs), key=lambda one: one["flops"])
    largest = pairs[rungs[-1]["model"]]
    names = {row["name"] for pair in largest for row in pair}
    judged = {"idea": runs[n].group, "baseline": runs[0].group,
              "compared": comparison([row for pair in largest for row in pair]), "rungs": rungs,
              "routing": {group: routing_of([run for run in runs if run.group == group and run.name in names])
                          for group in (runs[0].group, runs[n].group)}}
    judged["verdict"] = sentence(judged)
    write_text_file(folder / "judge.json", json.dumps(judged, indent=1))
    draw_judged(judged, folder / "judge.png")
    print(f"\n{screen(judged)}\n\n{folder}/ holds judge.json and judge.png")


def rung(pairs: list[tuple[dict, dict]], ladder: list[dict]) -> dict:
    """One budget of the ladder: the idea's losses beside the baseline's, seed by seed, and what equal loss costs."""
    done = [(base, idea) for base, idea in pairs if base["status"] == idea["status"] == "done"]
    ideas = [idea for _, idea in done]
    base, idea = pairs[0]
    return {"model": base["model"], "steps": base["steps"], "flops": base["flops"], "idea_flops": idea["flops"],
            "seeds": [idea["seed"] for idea in ideas],
            "losses": [base["loss"] for base, _ in done], "idea_losses": [idea["loss"] for idea in ideas],
            "difference": interval([idea["loss"] - base["loss"] for base, idea in done]) if len(done) > 1 else None,
            "flops_to_equal_loss": equal_loss(ideas, ladder, "flops"),
            "seconds_to_equal_loss": equal_loss(ideas, ladder, "seconds"),
            "without_loss": [f"{row['name']} {row['status']}" for row in itertools.chain(*pairs)
                             if row["status"] != "done"]}


def routing_of(runs: list[Trial]) -> dict:
    """How the experts were used in the last tenth of these runs' steps, and what their policy promises; {} without."""
    config = runs[0].config
    done = [Path(run.config.out_dir) for run in runs if outcome(run)[0] == "done"]
    logs = [[line for line in read_log(out) if "load_max_over_mean" in line] for out in done]
    lines = [line for log in logs for line in log[-math.ceil(len(log) / 10):]]
    if not lines:
        return {}
    load, dead, entropy = (statistics.fmean(line[name] for line in lines)
                           for name in ("load_max_over_mean", "dead_experts", "entropy"))
    logits = torch.randn(64, config.n_expert, generator=torch.Generator().manual_seed(0))
    causal = POLICIES[config.router].causal and check_causal(logits, config, Context(torch.arange(64)))
    fused = config.router in FUSED and config.balance_scope != "sequence" and config.router_noise == 0
    return {"max_violation": load - 1, "dead_experts": dead, "entropy": entropy, "causal": "yes" if causal else "no",
            "kernels": "Triton's on a GPU" if fused else "none, torch alone"}


def sentence(judged: dict) -> str:
    """Better, worse or not resolved, by whether the interval at the largest budget leaves out zero."""
    last = judged["rungs"][-1]
    lacking = f" (without {', '.join(last['without_loss'])})" if last["without_loss"] else ""
    if not last["difference"]:
        return f"not judged: fewer than two seeds are done{lacking}"
    mean, half = last["difference"]
    n = len(last["seeds"])
    measured = f"at this scale: {mean:+.4f} ± {half:.4f} nats a token after {last['steps']:,} steps, {n} seeds{lacking}"
    if abs(mean) <= half:
        return f"not resolved {measured}; {more_seeds(mean, half, n)} more seeds would resolve such a difference"
    if mean > 0:
        return f"worse {measured}"
    ahead = judged["routing"][judged["idea"]].get("causal") == "no"
    return f"better {measured}" + "; but it is not causal, and its loss may come from looking ahead" * ahead


def more_seeds(mean: float, half: float, n: int) -> str:
    """How many more seeds bring the interval below the difference, if mean and spread stay."""
    deviation = half * n ** 0.5 / student(n)
    enough = (m for m in range(n + 1, n + 1001) if student(m) * deviation / m ** 0.5 < abs(mean))
    return f"{next(enough, n) - n or 'over 1,000'}"


def screen(judged: dict) -> str:
    """What judge prints."""
    lines = [f"{judged['idea']} against {judged['baseline']}: a seed has the same batches, and the same first weights",
             f"where shapes agree. Largest budget: {judged['compared']}", "",
             f"  steps  baseline     idea  {'difference, 95%':17s}  {'FLOPs to equal loss':35s}  seconds to equal loss"]
    for one in judged["rungs"]:
        if one["difference"]:
            mean, half = one["difference"]
            lines.append(f"{one['steps']:7,d} {statistics.fmean(one['losses']):9.4f} "
                         f"{statistics.fmean(one['idea_losses']):8.4f}  {mean:+.4f} ± {half:.4f}  "
                         f"{ratio_text(one['flops_to_equal_loss']):35s}  "
                         f"{ratio_text(one['seconds_to_equal_loss']) or 'left out'}")
    width = max(map(len, judged["routing"]))
    lines += ["", EQUAL_LOSS.format(judged["baseline"]), "",
              f"{'':{width}s}  MaxVio  dead experts  entropy  causal  kernels"]
    row = "{max_violation:6.2f}  {dead_experts:12.1f}  {entropy:7.3f}  {causal:6s}  {kernels}"
    lines += [f"{name:{width}s}  {row.format(**found) if found else 'no experts'}"
              for name, found in judged["routing"].items()]
    return "\n".join([*lines, "", f"{judged['idea']} is {judged['verdict']}."])


def draw_judged(judged: dict, path: Path) -> None:
    """Left, both ladders against training FLOPs; right, the difference at each rung with its interval."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
    rungs = [one for one in judged["rungs"] if one["difference"]]
    for i, (name, cost, losses) in enumerate(((judged["baseline"], "flops", "losses"),
                                              (judged["idea"], "idea_flops", "idea_losses"))):
        left.plot([one[cost] for one in rungs for _ in one["seeds"]], [y for one in rungs for y in one[losses]], "o",
                  color=f"C{i}", alpha=0.4, ms=4)
        left.plot([one[cost] for one in rungs], [statistics.fmean(one[losses]) for one in rungs], color=f"C{i}",
                  label=as_text(name))
    left.set(xscale="log", xlabel="training FLOPs", ylabel="validation cross-entropy, nats per token")
    left.legend(frameon=False, fontsize=8)
    for x, one in enumerate(rungs):
        ys = [idea - base for base, idea in zip(one["losses"], one["idea_losses"])]
        right.plot([x - 0.1] * len(ys), ys, "o", color="C1", alpha=0.4, ms=4)
        right.errorbar(x, *one["difference"], color="C1", fmt="s", capsize=4)
    right.axhline(0, color="0.5", lw=0.8)
    right.set_xticks(range(len(rungs)), [f"{one['steps']:,}" for one in rungs])
    right.set(xlabel="steps", ylabel=f"idea less {as_text(judged['baseline'])}: nats per token, 95%")
    figure.suptitle(judged["idea"], fontsize=10)
    save_figure(figure, path)


# --- one token's journey ---


def trace(argv: list[str]) -> None:
    """Run the lesson's own code on a text, and print beside each line on the way what it makes of the last token."""
    parser = Parser(allow_abbrev=False, prog="train.py trace", description="one token's way from vector to loss")
    parser.add_argument("folder", type=Path, help="a run with experts, such as out/tiny, or a Hugging Face folder")
    parser.add_argument("--text", default="import os", help="the token before its last one is followed")
    args = parser.parse_args(argv)
    model, tokenizer = load_run(args.folder)
    ids = ids_of(args.text, tokenizer, model)
    require(len(ids) > 1, "--text needs two tokens or more: the last is what the one before it should foresee")
    require(model.config.n_expert > 1, f"{args.folder} holds a model without experts: there is no routing to follow")
    read = [reader(tokenizer)(i) for i in ids]
    print(f"token {len(ids) - 2} of the text, {read[-2]!r}, and the next, {read[-1]!r}, in the first layer that has "
          "experts:\na line as it ran, the shape of what it made, and this token's first numbers in it\n")
    policy = POLICIES[model.config.router]
    follow_lines([Model.forward, Block.forward, attend, Attention.project, MoE.forward, route, policy, place, experts,
                  loss], partial(model, torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])), len(ids) - 1)
    odds = model(torch.tensor([ids[:-1]])).logits[0, -1].softmax(-1).topk(3)
    print("\nlikeliest next: " + ", ".join(f"{reader(tokenizer)(int(i)) or chr(0xfffd)!r} {p:.1%}"
                                            for p, i in zip(*odds)))


def follow_lines(functions: list[Callable], call: Callable, n_token: int) -> None:
    """Call by the plain table, and print each line of these functions that makes a tensor, once, as it has run."""
    codes = {inspect.unwrap(function).__code__ for function in functions}
    assignments = {(file, n): node for file in {code.co_filename for code in codes}
                   for node in ast.walk(ast.parse(Path(file).read_text())) if isinstance(node, ast.Assign)
                   for n in range(node.lineno, node.end_lineno + 1)}
    e_loop = {done for done in assignments.values() if ast.unparse(done.targets[0]) == "(gate, up)"}
    before, seen = {}, set()

    def enter(frame, event, arg):
        dense = frame.f_code is Block.forward.__code__ and not frame.f_locals["self"].moe
        return line if frame.f_code in codes and not dense else None

    def line(frame, event, arg):
        done, file = before.get(frame), frame.f_code.co_filename
        before[frame] = now = assignments.get((file, frame.f_lineno))
        of_token = done not in e_loop or frame.f_locals["e"] == frame.f_locals["routing"].experts[-1, 0]
        if done and done is not now and done not in seen and of_token:           # of all experts: the token's first
            seen.add(done)
            show(frame, done)
        return line

    def show(frame, done):
        names = [node.id for target in done.targets for node in ast.walk(target) if isinstance(node, ast.Name)]
        values = [f"{name} {numbers(frame.f_locals[name], n_token)}" for name in names
                  if isinstance(frame.f_locals.get(name), (Tensor, tuple))]
        if values:
            source = linecache.getline(frame.f_code.co_filename, done.lineno).partition("  # ")[0].strip()
            where = f"{Path(frame.f_code.co_filename).name}:{done.lineno}"
            print(f"{where:13s} {source[:84]:84s} {'; '.join(values)}")

    with using(PLAIN), torch.no_grad():
        sys.settrace(enter)
        try:
            call()
        finally:
            sys.settrace(None)


def numbers(value: Tensor | tuple, n_token: int) -> str:
    """The shape of a tensor, and the first of its numbers that belong to the last token; of a tuple, what it holds."""
    if not isinstance(value, Tensor):
        return f"{len(value)} of {'x'.join(map(str, value[0].shape))}"
    shape = "x".join(map(str, value.shape)) or "scalar"
    if value.dim() == 4 and value.shape[1] == value.shape[2]:
        return shape                                                 # as many heads as tokens: which axis is which?
    axis = next((i for i, size in enumerate(value.shape[:3]) if size == n_token), 0)      # of tokens, or of rows
    own = value[(0,) * axis][-1] if value.dim() > 1 else value       # (an expert's last row is of the last token)
    return f"{shape}: {' '.join(f'{x:.3g}' for x in own.flatten()[:3].tolist())}"


def main(argv: list[str]) -> None:
    with ranks():
        code = command(argv)
    if code:
        sys.exit(code)


def command(argv: list[str]) -> int | None:
    """What the words ask for; returns the exit code."""
    if argv[:1] in (["draw"], ["trace"]):
        return {"draw": draw, "trace": trace}[argv[0]](argv[1:])
    if argv[:1] == ["--run"]:
        sys.exit(train_alone(Config(**json.loads(argv[1])), argv[2:] == ["--previous"]))
    judging = argv[:1] == ["judge"]
    args, given = parse_command_line(argv[judging:])
    runs = in_turn(read_judged if judging else read_runs)(args.config, given, args.seeds, args.scale)
    require(args.dry_run or not args.json, "--json prints sizes: give it --dry_run")
    if args.dry_run and args.world is not None:
        require(not runs[0].name, "--world is for the sizes of one run, not of a sweep")
        return dry_run_world(runs[0].config, args.world, args.json)
    require(args.world is None, "--world prints sizes: give it --dry_run")
    if args.dry_run:
        return dry_run(select(runs, args.only), args.json)
    if args.previous and not restarts():
        require(not (args.report or any(one.config.overwrite for one in runs)),
                "--previous goes on from a checkpoint: neither --report nor --overwrite goes with it")
        require(not runs[0].name or args.only, "--previous is for one run: name it with --only")
        for one in select(runs, args.only):
            path = Path(one.config.out_dir) / "ckpt.prev.pt"
            require(path.is_file(), f"{path} is not there: {ANEW}")
            one.back = True
    if runs[0].name:
        require(not UNDER_TORCHRUN, f"{args.config} is a sweep, whose runs are processes of their own: "
                f"python train.py {args.config} --parallel")
        return sweep(args, runs, give_verdict if judging else summarise)
    require(not (args.report or args.only or args.parallel is not None), f"{args.config} is one run, not a sweep")
    return run(runs[0].config, runs[0].back)


def draw(argv: list[str]) -> None:
    """The figures of each run folder once more; of several, their losses in one picture beside the first."""
    parser = Parser(allow_abbrev=False, prog="train.py draw", description="the figures of runs again")
    parser.add_argument("folders", nargs="+", type=Path, help="folders of runs, such as out/tiny")
    parser.add_argument("--text", help="a text, or a file of it: the experts that its tokens visit in the first folder")
    args = parser.parse_args(argv)
    if args.text is not None:
        return show_routing(args.folders[0], Path(args.text).read_text(errors="replace") if is_file(args.text)
                            else args.text)
    for out in args.folders:
        require((out / "log.jsonl").is_file(), f"{out} has no log.jsonl: draw takes folders of runs, such as out/tiny")
        logged = {name for line in read_log(out) for name, value in line.items() if value is not None}
        require({"ce", "val_ce"} <= logged, f"the run in {out} has too little in its log to draw")
        draw_figures(out)
    print(f"drew the figures in {', '.join(map(str, args.folders))}")
    if len(args.folders) > 1:
        path = args.folders[0].parent / f"{'-'.join(out.name for out in args.folders)}.png"
        draw_loss(args.folders, path)
        print(f"and both losses in {path}")


if __name__ == "__main__":
    run_script(main)
