"""
model.py: a Qwen3-style mixture-of-experts transformer, from token to loss and back to text.

Read router.py first (which experts does a token visit?); this file is everything around it, top to bottom: the
configuration, its sizes counted before anything is allocated, attention, experts, the model, its loss, Hugging Face
checkpoints in and out, the tokenizer, and text generation.

What differs from the GPT-2 you may know from nanoGPT:
    RMSNorm without bias before each part, and over each head's queries and keys     (Qwen3)
    rotary positions (base 1,000,000) instead of learnt ones                          (Su 2021)
    grouped-query attention: several query heads share one key/value head             (Ainslie 2023)
    a SwiGLU feed-forward, silu(x W_gate) * (x W_up) W_down, no bias anywhere          (Shazeer 2020)
    not one feed-forward but E of them, of which each token visits K                  (Shazeer 2017)

Axes, here and in router.py:
    B batch   T sequence   N = B * T tokens   D d_model   H heads   E experts   K experts a token visits (top-k)
    F width of one expert   R = N * K routed rows   V vocabulary

    python model.py configs/tiny.py [--json]         sizes, FLOPs and memory of a config
    python model.py out/tiny --prompt "def " [...]   text from a trained run, or from a Hugging Face folder
    python model.py out/tiny --routing "text"        a picture of which expert each token of a text, or file, visits
"""

import argparse
import base64
import codecs
import difflib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from router import (
    POLICIES,
    Context,
    Routing,
    combine,
    constexpr,
    gather,
    jit,
    route,
    tl,
    triton,
    update_bias,
    use_kernels,
)


class BadInput(Exception):
    """The user can mend this: one line saying what is wrong, what is allowed, and the fix. Scripts exit with code 2."""


def is_file(name: str) -> bool:
    """Whether this is a file; a text too long for a name is none."""
    try:
        return Path(name).is_file()
    except OSError:
        return False


def closest(word: str, known) -> str:
    """', did you mean X?' when a known name is near, else ''."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f", did you mean {near[0]}?" if near else ""


# --- the configuration ----------------------------------------------------------------------------------------------


@dataclass
class ModelConfig:
    """The shape of a model. The comment behind a field is its help text."""

    n_layer: int = 4              # transformer blocks
    d_model: int = 256            # D, width of the residual stream
    n_head: int = 8               # H, query heads
    n_kv_head: int = 4            # key/value heads, each shared by n_head / n_kv_head query heads
    d_head: int = 32              # width of a head (even: rotary positions turn pairs)
    n_expert: int = 16            # E, experts a layer; 1 is a dense feed-forward without router
    top_k: int = 4                # K, experts a token visits
    d_expert: int = 192           # F, hidden width of one expert (of the feed-forward when n_expert = 1)
    expert_groups: list | None = None  # [(experts, width), ...]: widths mixed in a layer; sets n_expert
    d_shared: int = 0             # width of a shared expert that every token visits; 0: none
    shared_gate: bool = False     # the shared expert's output is scaled by a sigmoid of the token
    first_dense_layers: int = 0   # layers from the first with one feed-forward of the same active width, no router
    vocab_size: int = 264         # V, rows of the embedding; at least the tokenizer's size
    seq_len: int = 512            # T, tokens in a training sequence
    max_seq_len: int = 262_144    # positions the model accepts; costs no memory until used
    rope_base: float = 1e6        # rotary frequencies are rope_base ** (-2i / d_head)
    norm_eps: float = 1e-6        # added to the mean square inside RMSNorm
    qk_norm: bool = True          # RMSNorm over each head's queries and keys
    tie_embeddings: bool = True   # the output head is the embedding table
    router: str = "softmax"       # routing policy, a name in router.POLICIES
    renormalize: bool = True      # the K combine weights sum to 1
    top_p: float = 0.6            # router "top_p": experts are taken, likeliest first, up to this much probability
    router_noise: float = 0.0     # std of Gaussian noise on the logits the experts are chosen by, in training only
    capacity_factor: float | None = None       # in training an expert takes at most this times an even share; None: all
    eval_capacity_factor: float | None = None  # the same outside training
    balance_scope: str = "micro_batch"  # the balance loss counts a "micro_batch", each "sequence" or the "global" batch
    bias_rate: float = 0.0        # step of the selection bias that evens the load without a loss; 0: no bias
    aux_coef: float = 0.01        # weight of the load-balancing loss
    z_coef: float = 0.001         # weight of the router z-loss
    recompute: bool = False       # attention and expert activations made again in backward; routing kept
    init_scale: float = 1.0       # weights start at std sqrt(init_scale / fan_in): table in init_std

    def __post_init__(self):
        if self.expert_groups is not None:
            pairs = self.expert_groups
            whole = lambda n: isinstance(n, (int, float)) and 0 < n < 2**31 and n == int(n)
            require(isinstance(pairs, list) and len(pairs) > 0
                    and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs)
                    and all(whole(n) for pair in pairs for n in pair),
                    f"expert_groups = {pairs} must be a list of (experts, width) pairs, such as [(16, 256), (32, 128)]")
            self.expert_groups = [(int(n), int(width)) for n, width in pairs]  # JSON has lists
            self.n_expert = sum(n for n, _ in self.expert_groups)

    @property
    def widths(self) -> list[tuple[int, int]]:
        """(experts, their hidden width), a pair a width."""
        return self.expert_groups or [(self.n_expert, self.d_expert)]

    @property
    def active_width(self) -> int:
        """Hidden units a token passes in a feed-forward: K experts of the mean width, and the shared one."""
        return self.top_k * sum(n * width for n, width in self.widths) // self.n_expert + self.d_shared

    def validate(self) -> None:
        """Raise BadInput at the first value no model can have."""
        for name in ("n_layer", "d_model", "n_head", "n_kv_head", "d_head", "n_expert", "top_k", "d_expert",
                     "vocab_size", "seq_len", "max_seq_len", "rope_base", "norm_eps", "init_scale"):
            require(0 < getattr(self, name) < 2**31, f"{name} = {getattr(self, name)} must be positive, below 2**31")
        for name in ("aux_coef", "z_coef", "bias_rate", "router_noise", "d_shared", "first_dense_layers"):
            require(getattr(self, name) >= 0, f"{name} = {getattr(self, name)} must not be negative")
        require(self.top_k <= self.n_expert, f"top_k = {self.top_k} must be 1 to n_expert = {self.n_expert}")
        require(self.n_head % self.n_kv_head == 0,
                f"n_head = {self.n_head} must be a multiple of n_kv_head = {self.n_kv_head}")
        require(self.d_head % 2 == 0, f"d_head = {self.d_head} must be even, rotary positions turn pairs")
        require(self.seq_len <= self.max_seq_len,
                f"seq_len = {self.seq_len} must not exceed max_seq_len = {self.max_seq_len}")
        wide = max(n * 2 * width for n, width in self.widths)
        require(max(wide, self.vocab_size, self.n_head * self.d_head) * self.d_model < 2**60,
                "a matrix of this model has over 10^18 numbers: make it smaller")
        require(self.router in POLICIES,
                f"router = {self.router!r} is not one of {', '.join(POLICIES)}{closest(self.router, POLICIES)}")
        require(self.router != "switch" or self.top_k == 1, f"router = 'switch' visits one expert: set top_k = 1, "
                                                            f"not {self.top_k}")
        require(self.bias_rate == 0 or self.router in ("softmax", "switch", "sigmoid"),
                f"bias_rate = {self.bias_rate}: router = {self.router!r} has no bias to choose by")
        require(self.router != "expert_choice" or self.capacity_factor is self.eval_capacity_factor is None,
                "router = 'expert_choice' has a capacity of its own: leave capacity_factor and eval_capacity_factor")
        scopes = ("micro_batch", "sequence", "global")
        require(self.balance_scope in scopes,
                f"balance_scope = {self.balance_scope!r} must be one of {', '.join(scopes)}")
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} = {value} must be positive, or None for no limit")
        require(0 < self.top_p <= 1, f"top_p = {self.top_p} must be above 0, at most 1")
        require(self.first_dense_layers < self.n_layer,
                f"first_dense_layers = {self.first_dense_layers} must be 0 to n_layer - 1 = {self.n_layer - 1}")
        require(self.d_shared == 0 or self.n_expert > 1, "d_shared needs experts: with n_expert = 1 widen d_expert")
        require(self.d_shared > 0 or not self.shared_gate, "shared_gate = True needs a shared expert: set d_shared")


def require(ok: bool, message: str) -> None:
    if not ok:
        raise BadInput(message)


# --- counting, before anything is allocated -------------------------------------------------------------------------


def count(config: ModelConfig) -> dict[str, int]:
    """Parameters and training FLOPs, read off the real modules on the meta device (no memory is touched).

    total, active      with tied embeddings; active are those one token touches: K of the E experts, all else
    *_untied           the same with a separate output head
    embedding          one V x D table
    flops_per_token    forward + backward, a multiply-add is 2: see training_flops
    """
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in Model(config).named_parameters()}
    embedding = sizes.pop("embed.weight")
    sizes.pop("head.weight", None)
    expert = sum(n for name, n in sizes.items() if ".ffn.w_in." in name or ".ffn.w_out." in name)
    total = sum(sizes.values()) + embedding
    active = total - expert + expert * config.top_k // config.n_expert
    return {"total": total, "active": active, "total_untied": total + embedding, "active_untied": active + embedding,
            "embedding": embedding, "flops_per_token": training_flops(config, active)}


def training_flops(config: ModelConfig, active: int) -> int:
    """6 FLOPs a token and active parameter, plus causal attention over T / 2 earlier tokens on average.

    Forward: 2 per parameter; q k^T and its product with v are 2 * 2 * H * d_head * T / 2 a layer. Backward: twice that.
    The embedding counts once, as the output head: looking a row up costs nothing.
    """
    attention = 6 * config.n_layer * config.n_head * config.d_head * config.seq_len
    return 6 * active + attention


LOGIT_BYTES = 256 * 2**20     # the loss works through the vocabulary in pieces of this size: see LinearCrossEntropy


def memory(config: ModelConfig, micro_batch: int = 1, dtype: str = "float32") -> dict[str, int]:
    """Bytes one training step needs, item by item. Master weights, gradients and AdamW's two moments are float32.

    Activations are what autograd keeps for the backward pass, layer by layer, plus the temporaries of the one layer
    being worked on; logits are the pieces LinearCrossEntropy holds at once.
    """
    c, sizes = config, count(config)
    params = sizes["total"] if c.tie_embeddings else sizes["total_untied"]
    tokens, wide = micro_batch * c.seq_len, 2 if dtype == "bfloat16" else 4
    query, key = c.n_head * c.d_head, c.n_kv_head * c.d_head
    n_dense = c.n_layer if c.n_expert == 1 else c.first_dense_layers
    kept = c.n_layer * (2 * c.d_model * 4 + 2 * c.d_model * 4)                   # input and norm, twice a block
    kept += n_dense * 4 * c.active_width * wide                                  # gate, up, silu and their product
    kept += (c.n_layer - n_dense) * (4 * (3 * c.n_expert + 8 * c.top_k) + 4 * c.d_shared * wide)   # router; shared
    attention = (2 * (query + 2 * key) + 2 * query) * wide                       # q k v; q k with RoPE; y, twice
    slots = 2 if c.router == "expert_choice" else 1                              # it has room for 2K choices a token
    routed = 0 if c.n_expert == 1 else slots * 2 * (c.active_width - c.d_shared) * wide      # pre-activation
    working = slots * (c.top_k * 2 * c.d_model + 5 * c.active_width) * wide      # gathered rows and their gradients
    if c.recompute:
        working += attention + routed
    else:
        kept += c.n_layer * attention + (c.n_layer - n_dense) * routed
    table = c.vocab_size * c.d_model * 4
    logits = min(LOGIT_BYTES, tokens * c.vocab_size * 4) + table                 # a piece, and the table's gradient;
    logits *= 1 if wide == 4 else 2                                              # with bfloat16 also copies of both
    parts = {"weights": 4 * params, "gradients": 4 * params, "optimizer": 8 * params,
             "activations": tokens * (kept + working), "logits": logits}
    return parts | {"total": sum(parts.values())}


class Card(NamedTuple):
    memory: float       # bytes
    bandwidth: float    # bytes/s of that memory
    bfloat16: float     # FLOP/s of dense matrix products, summed in float32
    float32: float      # FLOP/s without tensor cores


CARDS = {  # the vendors' data sheets. The bfloat16 rate of the 4060 and 4070 is taken as twice their float32 rate
    "4060": Card(8e9, 272e9, 30e12, 15e12), "4070": Card(12e9, 504e9, 58e12, 29e12),
    "4080": Card(16e9, 717e9, 97e12, 49e12), "3090": Card(24e9, 936e9, 71e12, 36e12),
    "4090": Card(24e9, 1008e9, 165e12, 83e12), "L4": Card(24e9, 300e9, 121e12, 30e12),
    "A10": Card(24e9, 600e9, 125e12, 31e12), "A100-40": Card(40e9, 1555e9, 312e12, 19.5e12),
    "L40S": Card(48e9, 864e9, 362e12, 92e12), "A100-80": Card(80e9, 2039e9, 312e12, 19.5e12),
    "H100": Card(80e9, 3350e9, 989e12, 67e12), "H200": Card(141e9, 4800e9, 989e12, 67e12),
    "B200": Card(192e9, 8000e9, 2250e12, 80e12), "MI300X": Card(192e9, 5300e9, 1307e12, 163e12),
}


# --- matrix products: by which library ------------------------------------------------------------------------------


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision matrix products run in: autocast's where it is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


TILE = 16            # sizes that oneDNN is given are multiples of it
AVX512 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def has_onednn(x: Tensor, w: Tensor) -> bool:
    """Where oneDNN multiplies, not MKL (torch.mm): both are in torch, and on an AMD processor with AVX-512 oneDNN is
    twice as fast (results/product_cpu.json). It compiles a kernel for each shape, so it gets whole tiles alone."""
    whole = x.numel() > 0 and not (x.shape[0] % TILE or x.shape[1] % TILE or len(w) % TILE)
    return AVX512 and whole and compute_dtype(x) == w.dtype == torch.float32 and x.device.type == "cpu"


def onednn(x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


def keep_both(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def linear_backward(ctx, dy):
    x, w = ctx.saved_tensors
    return linear(dy, w.t()), weight_gradient(dy, x)


onednn_linear = torch.library.custom_op("moe::linear", onednn, mutates_args=())     # for autograd and torch.compile
onednn_linear.register_fake(lambda x, w: x.new_empty(len(x), len(w)))
onednn_linear.register_autograd(linear_backward, setup_context=keep_both)


def linear(x: Tensor, w: Tensor) -> Tensor:
    """F.linear, x (n, ..., i) @ w (o, i).T, by the faster library. A single row in a compiled step of writing text gets
    none: torch.compile fuses the sum with what is around it, and the call to a library would cost more."""
    if x.dim() > 2:
        return linear(x.flatten(0, -2), w).unflatten(0, x.shape[:-1])
    compiling, learns = torch.compiler.is_compiling(), torch.is_grad_enabled()
    if compiling and len(x) == 1 and not learns and compute_dtype(x) == x.dtype == w.dtype:
        return (x * w).sum(1, keepdim=True).t()
    if not has_onednn(x, w):
        return F.linear(x, w)
    return onednn_linear(x, w) if compiling or learns else onednn(x, w)


def weight_gradient(dy: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """dy (n, o).T @ x (n, i), by the faster library. oneDNN needs dy turned first: that pays in large products."""
    if dy.numel() * x.shape[1] < 2**25 or not has_onednn(dy.t(), x.t()):
        return torch.mm(dy.t(), x, out=out)
    dw = linear(dy.t().contiguous(), x.t())
    return dw if out is None else out.copy_(dw)


# --- the parts ------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis (Zhang 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        plain = x.dtype == self.weight.dtype == torch.float32 and x.device.type == "cpu"
        if plain and not torch.compiler.is_compiling():
            return Normalize.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Normalize(torch.autograd.Function):
    """RMSNorm on a CPU, where torch has no kernel for it: ten operators backward, and here seven, in two buffers.

    With n = x / rms and p = dy * n:  dweight = sum of p over rows,  dx = (dy * weight - n * mean(p * weight)) / rms.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        size = x.shape[-1]
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(size).add_(eps).rsqrt_()     # 1 / rms
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, scale = ctx.saved_tensors
        n = torch.mul(x, scale, out=torch.empty_like(x, memory_format=torch.contiguous_format))
        p = torch.mul(dy, n, out=torch.empty_like(n))
        rows = p.view(-1, len(weight))                                                 # (N, size)
        with torch.autocast("cpu", enabled=False):
            mean = (rows @ weight).div_(len(weight))
        mean, dweight = mean.view(scale.shape), rows.sum(0)
        return torch.mul(dy, weight, out=p).addcmul_(n, mean, value=-1).mul_(scale), dweight, None


def rope_tables(start: int | Tensor, length: int, config: ModelConfig, device) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i / d_head), (T, d_head / 2) float32 each, for T positions from start."""
    i = torch.arange(0, config.d_head, 2, device=device, dtype=torch.float32)
    position = start + torch.arange(length, device=device, dtype=torch.float32)
    angle = position[:, None] * config.rope_base ** (-i / config.d_head)
    return angle.cos(), angle.sin()


class Rope(torch.autograd.Function):
    """Turn each pair (x_i, x_{i + d_head/2}) of x (B, H, T, d_head) by its angle: q.k then sees only the distance.

    The gradient of a rotation is the rotation back, so nothing needs to be kept for it but the angles.
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos.to(x.dtype), sin.to(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return rotate(dy, cos.to(dy.dtype), -sin.to(dy.dtype)), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    if torch.compiler.is_compiling():                              # it fuses this and does not take halves as out=
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    y = torch.empty_like(x)
    left, right = y.chunk(2, -1)
    torch.mul(a, cos, out=left).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=right).addcmul_(a, sin)
    return y


class Cache:
    """Keys and values of the tokens read so far, a (B, H_kv, length, d_head) tensor a layer: a token costs one step.

    `used` counts them. Once it is a tensor (see Decoder) every step has the same shapes: a token attends to the whole
    buffer, and a mask hides what is not written yet. Why a tensor a layer: torch.compile writes in place into a tensor
    it is given, but to write into a slice of one it copies all of it, at every step.
    """

    def __init__(self, config: ModelConfig, batch: int, length: int, device, dtype):
        shape = (batch, config.n_kv_head, length, config.d_head)
        self.k, self.v = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
                          for _ in range(2))
        self.used: int | Tensor = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keep k and v (B, H_kv, T, d_head); returns all so far, and what the new tokens see of it (None: causal)."""
        T, keys, values = k.shape[2], self.k[layer], self.v[layer]
        if isinstance(self.used, Tensor):
            keys.index_copy_(2, self.used.view(1), k), values.index_copy_(2, self.used.view(1), v)
            return keys, values, (torch.arange(keys.shape[2], device=k.device) <= self.used)[None]
        end = self.used + T
        keys[:, :, self.used:end], values[:, :, self.used:end] = k, v
        after_others = self.used > 0 and T > 1                        # new tokens see all before them and themselves
        mask = torch.ones(T, end, dtype=torch.bool, device=k.device).tril(self.used) if after_others else None
        return keys[:, :, :end], values[:, :, :end], mask


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        self.heads = (c.n_head, c.n_kv_head, c.n_kv_head)
        self.qkv = nn.Linear(c.d_model, sum(self.heads) * c.d_head, bias=False)
        self.out = nn.Linear(c.n_head * c.d_head, c.d_model, bias=False)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.d_head, c.norm_eps), RMSNorm(c.d_head, c.norm_eps)
        self.d_head, self.qk_norm = c.d_head, c.qk_norm

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, layer: int) -> Tensor:
        B, T, _ = x.shape
        q, k, v = linear(x, self.qkv.weight).view(B, T, -1, self.d_head).split(self.heads, 2)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                               # (B, H or H_kv, T, d_head)
        q, k = Rope.apply(q, cos, sin), Rope.apply(k, cos, sin)
        mask = None
        if cache is not None:
            k, v, mask = cache.append(layer, k, v)
        if torch.compiler.is_compiling() and T == 1 and mask is not None:
            y = attend_one(q, k, v, mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1, enable_gqa=True)
        return linear(y.transpose(1, 2).reshape(B, T, -1), self.out.weight)


def attend_one(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d_head)) v for one token a sequence, q (B, H, 1, d_head), over a whole buffer, k and v
    (B, H_kv, length, d_head), of which seen (1, length) is written. For torch.compile: a few loops, where a library
    would first repeat k and v for every query head."""
    query = q.unflatten(1, (k.shape[1], -1)).float()                                   # (B, H_kv, H / H_kv, 1, d_head)
    scores = (query * k.unsqueeze(2)).sum(-1) * q.shape[-1] ** -0.5                    # (B, H_kv, H / H_kv, length)
    p = scores.where(seen, -math.inf).softmax(-1)
    return (p.unsqueeze(-1) * v.unsqueeze(2)).sum(-2, keepdim=True).flatten(1, 2).to(q.dtype)


class Dense(nn.Module):
    """The feed-forward without experts: w_down (silu(w_gate x) * w_up x)."""

    def __init__(self, d_model: int, width: int):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(2 * width, d_model))                      # gate rows, then up rows
        self.w_out = nn.Parameter(torch.empty(d_model, width))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linear(x, self.w_in).chunk(2, -1)
        return linear(F.silu(gate) * up, self.w_out)


class MoE(nn.Module):
    """E feed-forwards, each token visits K: y = sum_k weight_k * expert_k(x), plus a shared one if there is one.

    Experts may differ in width: w_in and w_out hold a tensor a width, and experts are numbered through them in order.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D = config.n_expert, config.d_model
        self.gate = nn.Parameter(torch.empty(E, D))
        self.w_in = nn.ParameterList(torch.empty(n, 2 * width, D) for n, width in config.widths)  # gate, then up rows
        self.w_out = nn.ParameterList(torch.empty(n, D, width) for n, width in config.widths)
        if config.d_shared:
            self.shared = Dense(D, config.d_shared)
        if config.shared_gate:
            self.shared_gate = nn.Parameter(torch.empty(1, D))
        counted = config.bias_rate > 0 or config.balance_scope == "global"
        self.register_buffer("bias", torch.zeros(E) if config.bias_rate else None)
        self.register_buffer("load", torch.zeros(E, dtype=torch.int64) if counted else None, persistent=False)
        self.config = config

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Routing]:
        """x (B, T, D); ids (B, T) are the tokens themselves, for routers that look at them."""
        flat = x.reshape(-1, x.shape[-1])                                              # (N, D)
        context = Context(ids.flatten(), x.shape[1], self.training, self.bias, self.load)
        with torch.autocast(x.device.type, enabled=False):        # float32 always: rounding would turn near ties around
            r = route(linear(flat.float(), self.gate.float()), self.config, context)
        if self.training and self.load is not None:
            self.load += r.demand
        flat = flat.to(compute_dtype(x))
        matrices = [w for pair in zip(self.w_in, self.w_out) for w in pair]
        if torch.compiler.is_compiling() and x.shape[1] == 1 and not torch.is_grad_enabled():
            y = few_tokens(flat, r.weights, r.experts, *matrices)
        elif len(flat) == 1 and not torch.is_grad_enabled() and not x.is_cuda:
            y = one_token(flat[0], r.weights[0].tolist(), r.experts[0].tolist(), *matrices)
        else:
            y = experts(flat, r.weights, r.token, r.slot, r.offsets, not self.config.recompute, *matrices)
        if self.config.d_shared:
            shared = self.shared(flat)
            y = y + (shared * F.linear(flat, self.shared_gate).sigmoid() if self.config.shared_gate else shared)
        return y.view_as(x), r

    @torch.no_grad()
    def end_step(self, skipped: Tensor) -> None:
        """Once an optimizer step: move the selection bias by the load of its whole batch, then count anew.

        skipped () is 1 where the step was not taken (a loss was not finite): its load moves nothing.
        """
        if self.bias is not None:
            moved = update_bias(self.bias.clone(), self.load, self.config.bias_rate)
            self.bias.copy_(torch.where(skipped > 0, self.bias, moved))
        if self.load is not None:
            self.load.zero_()


def few_tokens(x: Tensor, weights: Tensor, experts: Tensor, *matrices: Tensor) -> Tensor:
    """The layer for the few tokens x (N, D) of a step of writing text, for torch.compile: no rows to sort, no loop.

    Uncompiled, w[experts] would copy K experts a token; the compiler multiplies them where they lie. An expert of
    another width counts with weight 0.
    """
    y, first = torch.zeros_like(x), 0
    for w_in, w_out in zip(matrices[::2], matrices[1::2]):
        e = (experts - first).clamp(0, len(w_in) - 1)                                  # (N, K)
        weight = weights * (e == experts - first)
        gate, up = (w_in[e].to(x.dtype) * x[:, None, None]).sum(-1).chunk(2, -1)       # (N, K, F)
        a = F.silu(gate) * up * weight.unsqueeze(-1).to(x.dtype)
        y, first = y + (w_out[e].to(x.dtype) * a[:, :, None]).sum(-1).sum(1), first + len(w_in)
    return y


def one_token(x: Tensor, weights: list[float], experts: list[int], *matrices: Tensor) -> Tensor:
    """The layer for a single token x (D,) of text being written on a CPU: K matrix-vector products, no rows to sort."""
    y = torch.zeros_like(x)
    for weight, e in zip(weights, experts):
        for w_in, w_out in zip(matrices[::2], matrices[1::2]):
            if 0 <= e < len(w_in) and weight != 0:
                gate, up = (w_in[e].to(x.dtype) @ x).chunk(2)
                y.addmv_(w_out[e].to(x.dtype), F.silu(gate).mul_(up), alpha=weight)
            e -= len(w_in)
    return y


@torch.compiler.disable           # fused by hand already, and the rows of an expert change at every step
def experts(x: Tensor, weights: Tensor, token: Tensor, slot: Tensor, offsets: Tensor, keep: bool, *matrices) -> Tensor:
    """y[n] = sum_k weight[n, k] W_out[e] (silu(g) * u), with (g, u) = W_in[e] x[n] and e the k-th expert of token n.

    x (N, D); weights, token, slot and offsets as Routing has them; matrices W_in, W_out of each width in turn. Autograd
    would keep the gathered rows, the activation and every expert's output. Written by hand, only x, the pre-activation
    h and the weights stay (without keep not even h): the rest is cheap to make again, and a combine weight's gradient
    needs no output, since <dy, W_out a> = <W_out^T dy, a>.
    """
    rows = len(token) / len(offsets)                                                   # of an expert, on average
    at_once = all(has_grouped_mm(x, w_out.shape[2], rows) for w_out in matrices[1::2])
    return (AtOnce if at_once else OneByOne).apply(x, weights, token, slot, offsets, keep, *matrices)


class OneByOne(torch.autograd.Function):
    """Expert by expert: the few rows of one stay in the processor's cache from the first product to the last."""

    @staticmethod
    def forward(ctx, x, weights, token, slot, offsets, keep, *matrices):
        weight, source = by_row(weights, x, token), token // slot.shape[1]
        y, kept = x.new_empty(len(token), x.shape[1]), []
        for n, rows, w1, w2 in each_expert(x, offsets, matrices):
            h = linear(x.index_select(0, source[rows]), w1)                            # (rows, 2F)
            y[rows][:n] = linear(swiglu(h, weight[rows]), w2)[:n]
            kept += [h] if keep else []
        ctx.save_for_backward(x, weight, token, slot, offsets, *matrices, *kept)
        ctx.n_matrix = len(matrices)
        return combine(y, slot)                                                        # (N, D)

    @staticmethod
    def backward(ctx, dy):
        x, weight, token, slot, offsets, *rest = ctx.saved_tensors
        matrices, kept, source, dy = rest[:ctx.n_matrix], rest[ctx.n_matrix:], token // slot.shape[1], dy.to(x.dtype)
        dx, dweight = x.new_empty(len(token), x.shape[1]), x.new_empty(len(token))
        dmatrices = [torch.empty_like(w, dtype=x.dtype) for w in matrices]
        dpairs = [dw for width in zip(dmatrices[::2], dmatrices[1::2]) for dw in zip(*width)]      # an expert each
        for e, (n, rows, w1, w2) in enumerate(each_expert(x, offsets, matrices)):
            x_e, dy_e = (t.index_select(0, source[rows]) for t in (x, dy))
            dy_e[n:] = 0                                           # the next experts' rows, if finite, add nothing here
            h = kept[e] if kept else linear(x_e, w1)
            dh, a, dweight[rows] = swiglu_backward(h, linear(dy_e, w2.t()), weight[rows])
            weight_gradient(dh, x_e, out=dpairs[e][0])
            weight_gradient(dy_e, a, out=dpairs[e][1])
            dx[rows][:n] = linear(dh, w1.t())[:n]
        dmatrices = [dw.to(w.dtype) for dw, w in zip(dmatrices, matrices)]
        return combine(dx, slot), dweight.float()[slot], None, None, None, None, *dmatrices


def each_expert(x: Tensor, offsets: Tensor, matrices) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """(n, rows, W_in, W_out) of each expert: the first n of these rows are its own. For oneDNN, which wants few shapes,
    rows of the next experts may follow, up to 15 or a sixteenth of n: what they yield is dropped, overwritten or 0."""
    ends, start, e = offsets.tolist(), 0, 0
    on_cpu = AVX512 and x.dtype == torch.float32 and not x.is_cuda
    for w_in, w_out in zip(matrices[::2], matrices[1::2]):
        tiled = on_cpu and x.shape[1] % TILE == 0 and w_out.shape[2] % TILE == 0
        for w1, w2 in zip(w_in.to(x.dtype), w_out.to(x.dtype)):
            n = ends[e] - start
            tile = 1 << max(4, n.bit_length() - 5) if tiled and n >= 8 else 1          # 8 to 511 rows: 16
            whole = -(-n // tile) * tile
            yield n, slice(start, start + (whole if start + whole <= ends[-1] else n)), w1, w2
            start, e = ends[e], e + 1


class AtOnce(torch.autograd.Function):
    """The rows of all experts of a width in one grouped product, where that is faster (see has_grouped_mm)."""

    @staticmethod
    def forward(ctx, x, weights, token, slot, offsets, keep, *matrices):
        weight, rows_x, y, kept = by_row(weights, x, token), gather(x, slot), [], []
        for rows, offs, w1, w2 in by_width(x, offsets, matrices):
            h = F.grouped_mm(rows_x[rows], w1.transpose(1, 2), offs=offs)              # (R, 2F)
            y.append(F.grouped_mm(swiglu(h, weight[rows]), w2.transpose(1, 2), offs=offs))
            kept += [h] if keep else []
        ctx.save_for_backward(x, weight, slot, offsets, *matrices, *kept)
        ctx.n_matrix = len(matrices)
        return combine(joined(y), slot)                                                # (N, D)

    @staticmethod
    def backward(ctx, dy):
        x, weight, slot, offsets, *rest = ctx.saved_tensors
        matrices, kept = rest[:ctx.n_matrix], rest[ctx.n_matrix:]
        dx, dweight, dmatrices, rows_x, rows_dy = [], [], [], gather(x, slot), gather(dy.to(x.dtype), slot)
        for i, (rows, offs, w1, w2) in enumerate(by_width(x, offsets, matrices)):
            h = kept[i] if kept else F.grouped_mm(rows_x[rows], w1.transpose(1, 2), offs=offs)
            dh, a, dw = swiglu_backward(h, F.grouped_mm(rows_dy[rows], w2, offs=offs), weight[rows])
            dmatrices += [F.grouped_mm(dh.t(), rows_x[rows], offs=offs),                               # (E, 2F, D)
                          F.grouped_mm(rows_dy[rows].t(), a, offs=offs)]                               # (E, D, F)
            dx.append(F.grouped_mm(dh, w1, offs=offs))                                                 # (R, D)
            dweight.append(dw)
        dmatrices = [dw.to(w.dtype) for dw, w in zip(dmatrices, matrices)]
        return combine(joined(dx), slot), joined(dweight).float()[slot], None, None, None, None, *dmatrices


def by_width(x: Tensor, offsets: Tensor, matrices) -> list[tuple[slice, Tensor, Tensor, Tensor]]:
    """(its rows, the offsets of its experts within them, W_in, W_out) of each width. One width owns every row;
    several cost a wait for the GPU, since where one ends is known only there."""
    matrices = [w.to(x.dtype) for w in matrices]
    if len(matrices) == 2:
        return [(slice(None), offsets, *matrices)]
    parts, first, start = [], 0, 0
    for w1, w2 in zip(matrices[::2], matrices[1::2]):
        mine = offsets[first:first + len(w1)]
        end = int(mine[-1])
        parts.append((slice(start, end), mine - start, w1, w2))
        first, start = first + len(w1), end
    return parts


def by_row(weights: Tensor, x: Tensor, token: Tensor) -> Tensor:
    """The combine weight of each row (R, 1), in x's precision."""
    return weights.flatten()[token].unsqueeze(1).to(x.dtype)


def joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def swiglu(h: Tensor, weight: Tensor) -> Tensor:
    """h (rows, 2F) -> a (rows, F) = silu(gate) * up * weight: weighted here, F wide, combine is then a plain sum."""
    if use_kernels(h) and len(h):
        a = h.new_empty(len(h), h.shape[1] // 2)
        swiglu_fwd[(len(h),)](h, weight, a, a.shape[1], triton.next_power_of_2(a.shape[1]))
        return a
    gate, up = h.chunk(2, -1)
    return F.silu(gate).mul_(up).mul_(weight)


def swiglu_backward(h: Tensor, da: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From da, the gradient of a = swiglu(h, weight), used up: dh (rows, 2F), a again (rows, F), dweight (rows,)."""
    dh = torch.empty_like(h)
    if use_kernels(h) and len(h):
        a, dweight = torch.empty_like(da), h.new_empty(len(h), dtype=torch.float32)
        swiglu_bwd[(len(h),)](h, weight, da, dh, a, dweight, da.shape[1], triton.next_power_of_2(da.shape[1]))
        return dh, a, dweight
    gate, up = h.chunk(2, -1)
    dgate, dup = dh.chunk(2, -1)
    silu = F.silu(gate)
    a = silu * up
    dweight = (da * a).sum(-1)                                  # before a and da are weighted
    torch.mul(da.mul_(weight), silu, out=dup)
    torch.ops.aten.silu_backward.grad_input(da.mul_(up), gate, grad_input=dgate)
    return dh, a.mul_(weight), dweight


@jit
def swiglu_fwd(h, weight, a, width, BLOCK: constexpr):
    """A row a program: reads 2F numbers and writes F, where the three torch operators of swiglu move 7F."""
    row, f = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    gate = tl.load(h + row * 2 * width + f, f < width, other=0.0).to(tl.float32)
    up = tl.load(h + row * 2 * width + width + f, f < width, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up * tl.load(weight + row).to(tl.float32)
    tl.store(a + row * width + f, out.to(a.dtype.element_ty), f < width)


@jit
def swiglu_bwd(h, weight, da, dh, a, dweight, width, BLOCK: constexpr):
    """A row a program: reads 3F numbers and writes 3F, where the torch operators of swiglu_backward move 22F."""
    row, f = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    gate = tl.load(h + row * 2 * width + f, f < width, other=0.0).to(tl.float32)
    up = tl.load(h + row * 2 * width + width + f, f < width, other=0.0).to(tl.float32)
    d = tl.load(da + row * width + f, f < width, other=0.0).to(tl.float32)
    w = tl.load(weight + row).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(dweight + row, tl.sum(d * silu * up, 0))
    tl.store(a + row * width + f, (silu * up * w).to(a.dtype.element_ty), f < width)
    dgate = d * w * up * sigmoid * (1 + gate - silu)
    tl.store(dh + row * 2 * width + f, dgate.to(dh.dtype.element_ty), f < width)
    tl.store(dh + row * 2 * width + width + f, (d * w * silu).to(dh.dtype.element_ty), f < width)


def has_grouped_mm(x: Tensor, width: int, rows: float) -> bool:
    """On a GPU grouped_mm is one fast kernel for bf16 from Hopper on. On a CPU it is a loop like ours, in C++ and by
    the slower library: it wins while starting operators takes longer than the products of an expert's mean rows."""
    aligned = x.shape[1] % 8 == 0 and width % 8 == 0                   # it wants rows of whole 16 bytes
    if x.is_cuda:
        return aligned and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (9, 0)
    few = rows * x.shape[1] * width <= 2**20
    return aligned and few and x.device.type == "cpu" and x.dtype != torch.float64


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(config.d_model, config.norm_eps), Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.moe = config.n_expert > 1 and layer >= config.first_dense_layers
        self.ffn = MoE(config) if self.moe else Dense(config.d_model, config.active_width)
        self.recompute, self.layer = config.recompute, layer

    def forward(self, x: Tensor, ids: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None):
        attend = lambda x: self.attn(self.attn_norm(x), cos, sin, cache, self.layer)
        again = self.recompute and torch.is_grad_enabled()
        x = x + (checkpoint(attend, x, use_reentrant=False) if again else attend(x))
        h = self.ffn_norm(x)
        y, routing = self.ffn(h, ids) if self.moe else (self.ffn(h), None)
        return x + y, routing


# --- the model ------------------------------------------------------------------------------------------------------


class Output(NamedTuple):
    """What one forward pass found. Without targets: logits. With: the losses, kept apart, each a float32 scalar."""

    logits: Tensor | None       # (B, T, V)
    ce: Tensor | None           # cross-entropy, nats per token
    balance: Tensor | None      # Switch balance loss, mean over layers; 0 in a dense model
    z: Tensor | None            # router z-loss, mean over layers; 0 in a dense model
    stats: dict[str, Tensor]    # router statistics, a row a layer: load (L, E), entropy (L,), ...; empty if dense


class Model(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: Cache | None = None) -> Output:
        """tokens (B, T) int64; targets (B, T) are the tokens that come next. A cache continues where it stands."""
        x, routings = self.hidden(tokens, cache)
        names = routings[0].stats if routings else ()
        stats = {name: torch.stack([r.stats[name] for r in routings]) for name in names}
        if targets is None:
            return Output(F.linear(x, self.head_weight), None, None, None, stats)
        x = x.flatten(0, 1)
        ce = LinearCrossEntropy.apply(x.to(compute_dtype(x)), self.head_weight, targets.flatten(),
                                      torch.is_grad_enabled())
        found = [r.losses for r in routings if r.losses]
        balance, z = (torch.stack([losses[name] for losses in found]).mean() if found else ce.new_zeros(())
                      for name in ("balance", "z"))
        return Output(None, ce, balance, z, stats)

    def hidden(self, tokens: Tensor, cache: Cache | None) -> tuple[Tensor, list[Routing]]:
        """What the head reads, (B, T, D), and the plan of each layer that has experts."""
        x, routings = self.embed(tokens), []
        start, T = cache.used if cache is not None else 0, tokens.shape[1]
        assert isinstance(start, Tensor) or start + T <= self.config.max_seq_len, "more positions than max_seq_len"
        cos, sin = rope_tables(start, T, self.config, tokens.device)
        for block in self.blocks:
            x, routing = block(x, tokens, cos, sin, cache)
            routings += [routing] if routing else []
        if cache is not None:
            cache.used += T
        return self.norm(x), routings

    @property
    def head_weight(self) -> Tensor:
        return self.embed.weight if self.config.tie_embeddings else self.head.weight

    def end_step(self, skipped: Tensor) -> None:
        """What the routers learn without a gradient, once an optimizer step: see MoE.end_step."""
        for block in self.blocks:
            if block.moe:
                block.ffn.end_step(skipped)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Model":
        """Fill every parameter from INIT, in order, from one seeded generator: the same weights on every device."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            std = init_std(name, p, self.config)
            if std is None:
                nn.init.ones_(p)
            else:
                p.copy_(nn.init.trunc_normal_(torch.empty(p.shape), 0, std, -2 * std, 2 * std, generator=generator))
        return self


def init_std(name: str, p: Tensor, config: ModelConfig) -> float | None:
    """Standard deviation a parameter starts with; None: it starts at one.

    norm weights                              1
    embed, head, attn.qkv, gates, every w_in  sqrt(init_scale / D)
    attn.out, every w_out                     sqrt(init_scale / fan_in) / sqrt(2 L)

    Normal, cut at two standard deviations, variance a fraction of 1 / fan_in (Switch 2021: 0.1 is steady when sparse).
    The two that write to the residual stream shrink with depth, so that its variance does not grow with it (GPT-2).
    """
    if p.dim() == 1:
        return None
    std = math.sqrt(config.init_scale / p.shape[-1])  # fan_in is every matrix's last axis
    return std / math.sqrt(2 * config.n_layer) if "attn.out" in name or "w_out" in name else std


def parameter_groups(model: Model, weight_decay: float) -> list[dict]:
    """AdamW groups: decay for matrices, none for norms (their one is not zero) and embeddings.

    A rare token's embedding row gets a gradient once in many steps; decay every step would pull it to zero in between.
    A tied head is the embedding, so it goes without; an untied one sees every token's gradient and decays.
    """
    decay = [p for name, p in model.named_parameters() if p.dim() > 1 and name != "embed.weight"]
    plain = [p for name, p in model.named_parameters() if p.dim() == 1 or name == "embed.weight"]
    assert len(decay) + len(plain) == len(list(model.parameters()))
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


class LinearCrossEntropy(torch.autograd.Function):
    """mean(cross_entropy(x @ weight.T, targets)) for x (N, D), weight (V, D), targets (N,), without the N x V logits.

    With 151,936 words the logits of 2,048 tokens are 1.2 GB, their gradient as much again. Instead tokens are taken a
    few at a time, LOGIT_BYTES of logits each, and since the loss is a mean of independent tokens its gradient
    (softmax - one_hot) / N is known at once: the forward pass finishes both gradients, and backward only scales them.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, learn):
        n, w = len(x), weight.detach().to(x.dtype)
        for_x, for_weight = (learn and needed for needed in ctx.needs_input_grad[:2])
        fit = LOGIT_BYTES // (4 * len(w))
        step = fit // TILE * TILE or max(1, fit)                                  # whole tiles where there is room
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x) if for_x else None
        dweight = torch.zeros(weight.shape, device=x.device) if for_weight else None
        for start in range(0, n, step):
            rows = slice(start, start + step)
            logits = linear(x[rows], w).float()                                   # (step, V)
            target = targets[rows, None]
            top, hit = logits.amax(-1, keepdim=True), logits.gather(1, target)
            p = logits.sub_(top).exp_()                                           # in place: no second (step, V)
            mass = p.sum(-1, keepdim=True)
            total += (top + mass.log() - hit).sum()
            if for_x or for_weight:
                p.div_(mass * n).scatter_add_(1, target, torch.full_like(hit, -1 / n))           # softmax - one_hot
                p = p.to(x.dtype)
                if for_x:
                    dx[rows] = linear(p, w.t())
                if for_weight and p.dtype == dweight.dtype:
                    dweight.addmm_(p.t(), x[rows])                                # in place: no second (V, D)
                elif for_weight:
                    dweight += p.t() @ x[rows]
        ctx.grads = dx, dweight
        return total / n

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        assert ctx.grads is not None, "the loss's gradients are scaled in place: call backward once"
        grads, ctx.grads = ctx.grads, None
        return *(None if g is None else g.mul_(grad) for g in grads), None, None


# --- Hugging Face checkpoints ---------------------------------------------------------------------------------------


HF_FIELDS = {  # ours: theirs (Qwen3MoeConfig)
    "n_layer": "num_hidden_layers", "d_model": "hidden_size", "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads", "d_head": "head_dim", "n_expert": "num_experts", "top_k": "num_experts_per_tok",
    "d_expert": "moe_intermediate_size", "vocab_size": "vocab_size", "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings", "renormalize": "norm_topk_prob",
    "aux_coef": "router_aux_loss_coef",
}
HF_ONLY = {  # ours: the only value their model can be
    "qk_norm": True, "router": "softmax", "expert_groups": None, "d_shared": 0, "first_dense_layers": 0,
    "eval_capacity_factor": None, "bias_rate": 0,
}
HF_UNSUPPORTED = {  # theirs: the only value this model can be
    "attention_bias": False, "use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "hidden_act": "silu",
}


def hf_names(config: ModelConfig) -> dict[str, list]:
    """Our parameter -> their tensors: a list is concatenated by rows, a list of lists is then stacked over experts."""
    names = {"embed.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"]}
    if not config.tie_embeddings:
        names["head.weight"] = ["lm_head.weight"]
    for i in range(config.n_layer):
        ours, hf = f"blocks.{i}.", f"model.layers.{i}."
        names[ours + "attn_norm.weight"] = [hf + "input_layernorm.weight"]
        names[ours + "attn.qkv.weight"] = [f"{hf}self_attn.{x}_proj.weight" for x in "qkv"]
        names[ours + "attn.out.weight"] = [hf + "self_attn.o_proj.weight"]
        if config.qk_norm:
            names[ours + "attn.q_norm.weight"] = [hf + "self_attn.q_norm.weight"]
            names[ours + "attn.k_norm.weight"] = [hf + "self_attn.k_norm.weight"]
        names[ours + "ffn_norm.weight"] = [hf + "post_attention_layernorm.weight"]
        if config.n_expert == 1:
            names[ours + "ffn.w_in"] = [f"{hf}mlp.{x}_proj.weight" for x in ("gate", "up")]
            names[ours + "ffn.w_out"] = [hf + "mlp.down_proj.weight"]
        else:
            each = [f"{hf}mlp.experts.{e}." for e in range(config.n_expert)]
            names[ours + "ffn.gate"] = [hf + "mlp.gate.weight"]
            names[ours + "ffn.w_in.0"] = [[f"{x}gate_proj.weight", f"{x}up_proj.weight"] for x in each]
            names[ours + "ffn.w_out.0"] = [[f"{x}down_proj.weight"] for x in each]
    return names


def to_hf_tensors(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under transformers' names and shapes (weights, or anything shaped like them: gradients)."""
    out = {}
    heads = [config.n_head * config.d_head, config.n_kv_head * config.d_head, config.n_kv_head * config.d_head]
    for ours, theirs in hf_names(config).items():
        parts = tensors[ours] if isinstance(theirs[0], list) else [tensors[ours]]
        for names, tensor in zip(theirs if isinstance(theirs[0], list) else [theirs], parts):
            sizes = heads if len(names) == 3 else [len(tensor) // len(names)] * len(names)
            out |= dict(zip(names, tensor.split(sizes)))
    return out


def to_hf(model: Model, folder: str | Path) -> None:
    """Write config.json and model.safetensors for transformers' Qwen3MoeForCausalLM (dense: Qwen3ForCausalLM)."""
    save_file = optional("safetensors.torch").save_file
    c, moe = model.config, model.config.n_expert > 1
    for name, only in HF_ONLY.items():
        value = getattr(c, name)
        require(value == only, f"{name} = {value!r} cannot be exported: transformers' Qwen3-MoE has only {only!r}")
    config = {theirs: getattr(c, ours) for ours, theirs in HF_FIELDS.items()} | HF_UNSUPPORTED
    config["router_aux_loss_coef"] = c.aux_coef / c.top_k              # their balance loss is K times ours
    config |= {"model_type": "qwen3_moe" if moe else "qwen3", "intermediate_size": c.d_expert, "dtype": "float32",
               "architectures": ["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"], "rope_theta": c.rope_base,
               "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base}}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = to_hf_tensors(c, {name: p.detach().cpu() for name, p in model.named_parameters()})
    tensors = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def from_hf(folder: str | Path) -> Model:
    """Read a Qwen3-MoE (or dense Qwen3) folder: one safetensors file or a sharded index, experts singly or fused."""
    folder = Path(folder)
    config = hf_config(folder)
    model, found = Model(config), split_fused(hf_tensors(folder))
    if config.tie_embeddings:
        found.pop("lm_head.weight", None)                                        # some files store the table twice
    expected = to_hf_tensors(config, dict(model.named_parameters()))
    for name, tensor in expected.items():
        require(name in found, f"tensor {name} is missing from {folder}")
        theirs, ours = tuple(found[name].shape), tuple(tensor.shape)
        require(theirs == ours, f"{name} in {folder} has shape {theirs}; its config.json makes it {ours}")
    extra = found.keys() - expected.keys()
    require(not extra, f"{folder} holds {len(extra)} tensors without a place here, one is {min(extra, default='')}")
    with torch.no_grad():
        for ours, theirs in hf_names(config).items():
            flat = [name for names in theirs for name in names] if isinstance(theirs[0], list) else theirs
            p = model.get_parameter(ours)
            p.copy_(torch.cat([found[name] for name in flat]).view(p.shape))
    return model


def hf_config(folder: Path) -> ModelConfig:
    require((folder / "config.json").is_file(), f"{folder} has no config.json: is it a checkpoint folder?")
    try:
        hf = json.loads((folder / "config.json").read_text())
    except ValueError:
        raise BadInput(f"{folder}/config.json is no JSON") from None
    kind = hf.get("model_type")
    where = f"in {folder}/config.json"
    require(kind in ("qwen3_moe", "qwen3"), f"model_type {kind!r} {where}; qwen3_moe and qwen3 are read here")
    if kind == "qwen3":
        hf = hf | {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": hf.get("intermediate_size")}
    for name, only in HF_UNSUPPORTED.items():
        value = hf.get(name, only)
        require(value == only or (not value and not only), f"{name} = {value} {where}; only {only} is read here")
    rope = {"rope_theta": hf.get("rope_theta")} | (hf.get("rope_scaling") or {}) | (hf.get("rope_parameters") or {})
    require(rope["rope_theta"] is not None, f"rope_theta missing {where}")
    require(rope.get("partial_rotary_factor", 1) == 1, f"partial_rotary_factor {where}; only 1 is read here")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    require(rope_type == "default", f"rope_type {rope_type!r} {where}; only 'default' is read here")
    hf.setdefault("num_experts", hf.get("num_local_experts"))
    if hf.get("head_dim") is None and hf.get("hidden_size") and hf.get("num_attention_heads"):
        hf["head_dim"] = hf["hidden_size"] // hf["num_attention_heads"]
    known = {ours: hf[theirs] for ours, theirs in HF_FIELDS.items() if hf.get(theirs) is not None}
    missing = [HF_FIELDS[ours] for ours in HF_FIELDS if ours.startswith(("n_", "d_", "vocab")) and ours not in known]
    require(not missing, f"{', '.join(missing)} missing {where}")
    if "aux_coef" in known:
        known["aux_coef"] *= known["top_k"]                            # see to_hf
    seq_len = min(ModelConfig.seq_len, known.get("max_seq_len", ModelConfig.seq_len))
    config = ModelConfig(**{"renormalize": False, "tie_embeddings": False} | known, seq_len=seq_len,
                         rope_base=float(rope["rope_theta"]))
    config.validate()
    return config


def hf_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder, memory-mapped, from model.safetensors or from the shards its index names."""
    load_file, broken = optional("safetensors.torch").load_file, optional("safetensors").SafetensorError
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors = {}
    for file in files:
        require((folder / file).is_file(), f"{folder} lacks {file}")
        try:
            tensors |= load_file(folder / file)
        except broken as error:
            raise BadInput(f"{folder / file} cannot be read: {error}") from None
    return tensors


def split_fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the experts one by one where a layer's are fused: gate_up_proj (E, 2F, D) and down_proj (E, D, F)."""
    out = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".experts.")
        if kind not in ("gate_up_proj", "down_proj"):
            out[name] = tensor
            continue
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
        for e, expert in enumerate(tensor):
            out |= {f"{layer}.experts.{e}.{p}.weight": t for p, t in zip(parts, expert.chunk(len(parts)))}
    return out


def optional(package: str):
    """Import a package only some uses need, or say in one line which pip command brings it."""
    import importlib
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.split(".")[0]
        raise BadInput(f"this needs the package {name}: pip install {name}") from None


# --- the tokenizer --------------------------------------------------------------------------------------------------


QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_SPECIAL = (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start "
    "vision_end vision_pad image_pad video_pad tool_call /tool_call fim_prefix fim_middle fim_suffix fim_pad repo_name "
    "file_sep tool_response /tool_response think /think").split()
PLAIN_TAGS = {"tool_call", "/tool_call", "tool_response", "/tool_response", "think", "/think"}  # <think>, no |


def load_tokenizer(name: str):
    """A tiktoken.Encoding: "bytes" (256 bytes and end-of-text, no download), a name tiktoken knows, or a ranks file.

    A ranks file (qwen.tiktoken: a base64 token and its rank a line) with Qwen's 151,643 ranks gets Qwen3's 26 special
    tokens behind them; any other gets end-of-text alone.
    """
    import tiktoken
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,32}", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|endoftext|>": 256})
    if is_file(name):
        ranks = read_ranks(Path(name))
        names = QWEN_SPECIAL if len(ranks) == 151_643 else QWEN_SPECIAL[:1]
        special = {f"<{s}>" if s in PLAIN_TAGS else f"<|{s}|>": len(ranks) + i for i, s in enumerate(names)}
        return tiktoken.Encoding(Path(name).stem, pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    known = tiktoken.list_encoding_names()
    require(name in known, f"tokenizer {name!r} is neither 'bytes', a ranks file, nor one of {', '.join(known)}"
                           + closest(name, ["bytes", *known]))
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:
        raise BadInput(f"tokenizer {name!r} could not be downloaded ({type(error).__name__}): put its file into the "
                       "folder TIKTOKEN_CACHE_DIR names, or use tokenizer = 'bytes', which needs none") from None


GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def hf_tokenizer(folder: Path):
    """The tiktoken.Encoding in a folder's tokenizer.json, if it is byte-level BPE whose ids are its merge order.

    GPT-2's, Llama 3's and Qwen's are. In that file bytes are written as printable characters; tiktoken wants bytes.
    """
    import tiktoken
    path = folder / "tokenizer.json"
    require(path.is_file(), f"{folder} has no tokenizer.json: give --tokenizer a ranks file or a name tiktoken knows")
    try:
        file = json.loads(path.read_text())
        kind, vocab, merges = (file["model"].get(name) for name in ("type", "vocab", "merges"))
        normal = (file.get("normalizer") or {"type": "NFC"})["type"]        # NFC leaves ordinary text as it is
        require(kind == "BPE" and normal == "NFC", f"{path} is {kind} with {normal}: tiktoken has only byte-level BPE")
        special = {token["content"].replace("<|end_of_text|>", "<|endoftext|>"): token["id"]            # Llama's
                   for token in file.get("added_tokens", [])}
        to_byte = {character: byte for byte, character in byte_characters().items()}
        as_bytes = lambda token: bytes(to_byte[c] for c in token)
        ranks = {as_bytes(token): i for token, i in vocab.items() if token not in special}
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        made = [ranks[as_bytes(a + b)] for a, b in pairs]
        special.setdefault("<|endoftext|>", max([*ranks.values(), *special.values()]) + 1)
        encoding = tiktoken.Encoding(folder.name, pat_str=split_pattern(file["pre_tokenizer"]), mergeable_ranks=ranks,
                                     special_tokens=special)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{path} is no byte-level BPE of the kind GPT-2 and Qwen use: tiktoken cannot read it") from None
    require(made == sorted(made) and len(ranks) == 256 + len(set(made)),
            f"{path}: its ids are not in the order of its merges, which is what tiktoken goes by")
    return encoding


def byte_characters() -> dict[int, str]:
    """The character each byte is written as in a byte-level tokenizer.json: itself if it prints, else 256 and on."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in prints]
    return {b: chr(b) for b in prints} | {b: chr(256 + i) for i, b in enumerate(others)}


def split_pattern(pre_tokenizer: dict) -> str:
    """The regular expression text is cut by before merging: written out in a Split, or GPT-2's in ByteLevel."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    patterns = [part["pattern"]["Regex"] for part in parts if part["type"] == "Split"]
    if not patterns and any(part["type"] == "ByteLevel" and part.get("use_regex", True) for part in parts):
        patterns = [GPT2_PATTERN]
    if len(patterns) != 1 or {part["type"] for part in parts} - {"Split", "ByteLevel"}:
        raise KeyError("pattern")
    return patterns[0]


def read_ranks(path: Path) -> dict[bytes, int]:
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        ranks = {}
    require(len(ranks) > 0 and sorted(ranks.values()) == list(range(len(ranks))),
            f"{path} is not a tiktoken ranks file: each line must be a base64 token and its rank, ranks 0, 1, 2 ...")
    return ranks


# --- writing text ---------------------------------------------------------------------------------------------------


class Decoder:
    """One step of writing: tokens (B, 1) after those in the cache -> logits (B, V). The floor is a read of the weights.

    A step of a small model is hundreds of small operators, and starting them costs more than their work. compiled, they
    become a few loops, on a GPU replayed as one CUDA graph: the same shapes each time, so compiled once for a length.
    """

    def __init__(self, model: Model, cache: Cache, compiled: bool):
        self.model, self.cache, self.graph = model, cache, None
        if compiled:
            cache.used = torch.tensor(cache.used, device=cache.k[0].device)
        self.step = compiled_step if compiled else one_step

    def __call__(self, tokens: Tensor) -> Tensor:
        if not (tokens.is_cuda and self.step is compiled_step):
            return self.step(self.model, tokens, self.cache)
        if self.graph is None:
            self.capture(tokens)
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits

    def capture(self, tokens: Tensor) -> None:
        """Record the kernels of a step. The two steps it takes leave no trace: the position goes back."""
        self.tokens, used, stream = tokens.clone(), self.cache.used.clone(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(self.model, self.tokens, self.cache)                             # compiles and warms up
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.step(self.model, self.tokens, self.cache)
        self.cache.used.copy_(used)


def one_step(model: Model, tokens: Tensor, cache: Cache) -> Tensor:
    return linear(model.hidden(tokens, cache)[0][:, -1], model.head_weight)            # of the last token alone


compiled_step = torch.compile(one_step, fullgraph=True, dynamic=False)


@torch.inference_mode()
def generate(model: Model, prompt: Tensor, n_token: int, temperature: float = 0.8, top_k: int = 50, seed: int = 1,
             n_vocab: int | None = None, compiled: bool = False) -> Iterator[Tensor]:
    """Yield n_token times the next token (B,) of each row of a prompt (B, T), once it is known. temperature 0: greedy.

    The cache turns each step into one token's work. Ids from n_vocab on (padding of the vocabulary) are never drawn.
    compiled: see Decoder; its cache is a multiple of 256 long, so that prompts of many lengths share one compilation.
    """
    (batch, used), limit = prompt.shape, model.config.max_seq_len
    length = used + n_token
    require(used > 0 and length <= limit, f"prompt and new tokens take {length} positions; the limit is {limit}")
    weight = model.embed.weight
    room = -(-length // 256) * 256 if compiled else length
    cache = Cache(model.config, batch, room, weight.device, weight.dtype)
    generator = torch.Generator(weight.device).manual_seed(seed)
    logits, decode = one_step(model, prompt.to(weight.device), cache), Decoder(model, cache, compiled)
    for left in reversed(range(n_token)):
        tokens = draw(logits[:, :n_vocab].float(), temperature, top_k, generator)
        yield tokens[:, 0]
        logits = decode(tokens) if left else None


def draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """The next token (B, 1), drawn from the top_k likeliest of logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    values, ids = logits.topk(min(top_k, logits.shape[-1]))
    return ids.gather(-1, torch.multinomial((values / temperature).softmax(-1), 1, generator=generator))


def check_ids(ids: list[int], model: Model) -> list[int]:
    """The ids, if each has a row in the model's embedding; else BadInput."""
    size = model.config.vocab_size
    require(max(ids) < size, f"the tokenizer makes token {max(ids)} of this text, and the model has {size}: give "
                             "--tokenizer the model's own, and a --prompt")
    return ids


def write_text(model: Model, tokenizer, prompt: str, n_token: int, **sampling) -> Iterator[str]:
    """The prompt and what follows, piece by piece; bytes that make no character yet wait for the next token."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    ids = check_ids(tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token], model)
    yield prompt
    for token in generate(model, torch.tensor([ids]), n_token, n_vocab=tokenizer.n_vocab, **sampling):
        if token == tokenizer.eot_token:
            break
        try:
            yield decoder.decode(tokenizer.decode_single_token_bytes(int(token)))
        except KeyError:                                              # an id between ranks and special tokens
            yield "\ufffd"
    yield decoder.decode(b"", final=True)


def load_run(folder: str | Path, device: str = "cpu", tokenizer: str | None = None):
    """Model and tokenizer of a run that train.py left in out/NAME, or of a folder in Hugging Face's format."""
    model, config = load_model(folder)
    name = tokenizer or config.get("tokenizer")
    return model.to(device).eval(), load_tokenizer(name) if name else hf_tokenizer(Path(folder))


def load_model(folder: str | Path) -> tuple[Model, dict]:
    """The model and what its config.json says: of a run (it then names its tokenizer), or a Hugging Face checkpoint."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else None
    except ValueError:
        raise BadInput(f"{folder}/config.json is no JSON") from None
    require(config is not None, f"{folder} has no config.json: train it first, or check the path")
    if "model_type" in config:
        return from_hf(folder), {}
    require((folder / "ckpt.pt").is_file(), f"{folder} has no ckpt.pt: train it first, or check the path")
    try:
        model = Model(ModelConfig(**{f.name: config[f.name] for f in fields(ModelConfig) if f.name in config}))
        model.load_state_dict(torch.load(folder / "ckpt.pt", "cpu", weights_only=True, mmap=True)["model"])
    except Exception as error:                                        # whatever a damaged file makes torch.load raise
        raise BadInput(f"{folder}: ckpt.pt is damaged, or does not fit its config.json ({error})") from None
    return model, config


# --- see the routing ------------------------------------------------------------------------------------------------


KINDS = {  # of token, by its first character behind the space a word may start with; the first that fits
    "line break": lambda c: c in "\r\n", "space": str.isspace, "digit": str.isdigit, "lower case": str.islower,
    "upper case": str.isupper, "bracket": lambda c: c in "()[]{}<>", "quote": lambda c: c in "\"'`",
    "other sign": lambda c: c.isascii(), "not ASCII": lambda c: True,
}


def kind_of(token: bytes) -> str:
    text = token.decode("utf-8", "replace")
    character = (text.strip(" ") or text or " ")[0]
    return next(name for name, fits in KINDS.items() if fits(character))


@torch.no_grad()
def first_experts(model: Model, ids: list[int]) -> Tensor:
    """(L, N): the expert that weighs most for each token, -1 where none does, in each layer that has experts.

    The text is read in pieces of seq_len.
    """
    plans = []
    hooks = [block.ffn.register_forward_hook(lambda module, inputs, out: plans.append(out[1]))
             for block in model.blocks if block.moe]
    device, size, layers = model.embed.weight.device, model.config.seq_len, len(hooks)
    for piece in torch.tensor(ids, device=device).split(size):
        model(piece[None])
    for hook in hooks:
        hook.remove()
    best = [(plan.weights.max(1), plan.experts) for plan in plans]
    first = [experts.gather(1, top.indices[:, None])[:, 0].where(top.values > 0, -1) for top, experts in best]
    return torch.stack([torch.cat(first[layer::layers]) for layer in range(layers)]).cpu()


def show_routing(folder: Path, model: Model, tokenizer, text: str) -> None:
    """routing.json, the expert of every token and each expert's share of each kind of token, and routing.png."""
    require(model.config.n_expert > 1, f"{folder} holds a model without experts: there is no routing to show")
    ids = tokenizer.encode_ordinary(text)
    require(len(ids) > 1, "--routing needs a text of two tokens or more, or a file that holds one")
    check_ids(ids, model)
    pieces = [tokenizer.decode_single_token_bytes(i) for i in ids]
    experts, kinds = first_experts(model, ids), [kind_of(piece) for piece in pieces]
    names = [name for name in KINDS if name in kinds]
    shares = torch.zeros(len(experts), model.config.n_expert, len(names))
    for column, name in enumerate(names):
        of_kind = experts[:, [i for i, kind in enumerate(kinds) if kind == name]]              # (L, n)
        for layer, row in enumerate(of_kind):
            shares[layer, :, column] = row[row >= 0].bincount(minlength=shares.shape[1]) / len(row)
    result = {"layers": [i for i, block in enumerate(model.blocks) if block.moe],
              "tokens": [piece.decode("utf-8", "replace") for piece in pieces], "experts": experts.tolist(),
              "kinds": names, "tokens_of_kind": [kinds.count(name) for name in names], "share": shares.tolist()}
    (folder / "routing.json").write_text(json.dumps(result))
    draw_routing(result, folder / "routing.png")
    print(f"{len(ids)} tokens: {folder}/routing.png, and the numbers behind it in routing.json")


def draw_routing(result: dict, path: Path, width: int = 64, n_line: int = 4) -> None:
    """Above, the text's first lines, a coloured row a layer; below, a heat map a layer: expert by kind of token."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    experts, share = np.array(result["experts"]), np.array(result["share"])                    # (L, N), (L, E, kinds)
    layers, n_line = len(experts), min(n_line, -(-experts.shape[1] // width))
    figure = plt.figure(figsize=(12, 0.45 * n_line * (1 + layers / 2) + 4.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[0.45 * n_line * (1 + layers / 2) + 0.5, 3.7])
    top.suptitle("the expert that weighs most for each token, a row a layer", fontsize=10)
    cmap = plt.get_cmap("tab20" if share.shape[1] <= 20 else "turbo", share.shape[1]).with_extremes(under="white")
    for line, axis in enumerate(top.subplots(n_line, 1, squeeze=False).flat):
        part = experts[:, line * width:(line + 1) * width]
        colours = axis.imshow(np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=-1), cmap=cmap,
                              vmin=-0.5, vmax=share.shape[1] - 0.5, aspect="auto", interpolation="nearest")
        for column, token in enumerate(result["tokens"][line * width:(line + 1) * width]):
            shown = token.replace("\n", "\u21b5").replace(" ", "\u00b7").replace("$", r"\$")
            axis.text(column, -0.7, shown, ha="center", va="bottom", fontsize=8, family="monospace",
                      rotation=0 if len(token) < 3 else 60)
        axis.set_yticks(range(layers), result["layers"])
        axis.set(xticks=[], ylabel="layer")
        axis.spines[:].set_visible(False)
    top.colorbar(colours, ax=top.axes, label="expert", shrink=0.8)
    bottom.suptitle("share of a kind's tokens that go first to an expert", fontsize=10)
    for layer, axis in enumerate(bottom.subplots(1, layers, sharey=True, squeeze=False).flat):
        image = axis.imshow(share[layer], aspect="auto", cmap="viridis", vmin=0, vmax=share.max())
        axis.set(title=f"layer {result['layers'][layer]}", ylabel="" if layer else "expert")
        axis.set_xticks(range(len(result["kinds"])), result["kinds"], rotation=60, ha="right", fontsize=8)
    bottom.colorbar(image, ax=bottom.axes, shrink=0.8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --- command line ---------------------------------------------------------------------------------------------------


def size_table(config: ModelConfig, sizes: dict, need: dict) -> str:
    million = lambda n: f"{n / 1e6:,.1f}M"
    rows = [("parameters", "total", "active", "active / total")]
    for label, suffix, less in (("tied, with embeddings", "", 0), ("untied, with embeddings", "_untied", 0),
                                ("without embeddings", "", sizes["embedding"])):
        total, active = sizes["total" + suffix] - less, sizes["active" + suffix] - less
        rows.append((label, million(total), million(active), f"{active / total:.1%}"))
    lines = [f"{a:26s} {b:>12s} {c:>12s} {d:>15s}" for a, b, c, d in rows]
    lines += ["", f"training FLOPs a token     {sizes['flops_per_token']:>12.4g}", "", "memory of a training step, GiB"]
    lines += [f"  {name:24s} {n / 2**30:>12.2f}" for name, n in need.items()]
    return "\n".join(lines)


def print_sizes(path: str, as_json: bool) -> None:
    from train import load_config  # every name a config file may use stands in train.py, which imports this file
    config = load_config(path)
    sizes, need = count(config), memory(config, config.micro_batch, config.dtype)
    if as_json:
        print(json.dumps(sizes | {"memory": need}))
        return
    shape = "n_layer d_model n_head n_kv_head d_head n_expert top_k d_expert vocab_size seq_len micro_batch".split()
    print(f"{path}: " + ", ".join(f"{name} {getattr(config, name)}" for name in shape), end="\n\n")
    print(size_table(config, sizes, need))


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise BadInput(f"{message}; python {self.prog} --help lists what there is")


def main(argv: list[str]) -> None:
    parser = Parser(allow_abbrev=False, description="sizes of a config, or text from a trained run")
    parser.add_argument("target", help="configs/X.py, out/NAME of a trained run, or a Hugging Face folder")
    parser.add_argument("--json", action="store_true", help="sizes as JSON")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--tokenizer", help="another than the run's or the folder's own: see load_tokenizer")
    parser.add_argument("--routing", metavar="TEXT", help="a text, or a file of it: draws the experts its tokens visit")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=50, help="draw from this many likeliest tokens")
    parser.add_argument("--seed", type=int, default=1, help="of the draws, below 2**63")
    parser.add_argument("--compile", action="store_true", help="compile the step first: pays from some thousand tokens")
    args = parser.parse_args(argv)
    if args.target.endswith(".py"):
        require(not args.prompt and args.routing is None,
                f"{args.target} is a config, and text needs what it trains: python train.py {args.target} first")
        return print_sizes(args.target, args.json)
    for name, low in (("tokens", 1), ("temperature", 0), ("top_k", 1), ("seed", 0)):
        require(low <= getattr(args, name) < 2**63, f"--{name} {getattr(args, name)} must be at least {low}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_run(args.target, device, args.tokenizer)
    if args.routing is not None:
        text = Path(args.routing).read_text(errors="replace") if is_file(args.routing) else args.routing
        return show_routing(Path(args.target), model, tokenizer, text)
    for piece in write_text(model, tokenizer, args.prompt, args.tokens, temperature=args.temperature, top_k=args.top_k,
                            seed=args.seed, compiled=args.compile):
        print(piece, end="", flush=True)
    print()


def run_script(main) -> None:
    """Run a script's main; what the user can mend is one line on stderr and exit code 2."""
    sys.stdout.reconfigure(errors="replace")             # a sample may hold what the terminal cannot show
    try:
        main(sys.argv[1:])
    except BadInput as error:
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)


if __name__ == "__main__":
    sys.modules["model"] = sys.modules["__main__"]       # train.py imports model: give it this one, not a second copy
    run_script(main)
