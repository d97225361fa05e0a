"""
model.py: a Qwen3-style mixture-of-experts transformer, from token to loss and back to text.

Read router.py first (which experts does a token visit?); this file is everything around it. What differs from
the GPT-2 you may know from nanoGPT:
    RMSNorm without bias before each part, and over each head's queries and keys   (Qwen3)
    rotary positions (base 1,000,000) instead of learnt ones                       (Su 2021)
    grouped-query attention: several query heads share one key/value head          (Ainslie 2023)
    a SwiGLU feed-forward, (silu(gate) * up) W_out, (gate, up) = x W_in, no bias    (Shazeer 2020)
    not one feed-forward but E of them, of which each token visits K               (Shazeer 2017)

Part 1 is the lesson: the whole model in plain PyTorch. Part 2 is the same, faster. Part 3 is what a user needs
beside it: memory, Hugging Face checkpoints in and out, tokenizers, and `python model.py out/tiny --prompt "def "`.

Axes: B batch, T sequence, N = B * T tokens, D d_model, H query heads, H_kv key/value heads, E experts, K experts a
token visits (top-k), F width of one expert, R = N * K routed rows, V vocabulary, L layers.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from router import Context, RouterConfig, Routing, route, update_bias

# === Part 1: the lesson ===========================================================================================


@dataclass
class ModelConfig(RouterConfig):
    """The shape of a model: the router's fields, then these. The comment behind a field is its help text."""

    n_layer: int = 4              # transformer blocks
    d_model: int = 256            # D, width of the residual stream
    n_head: int = 8               # H, query heads
    n_kv_head: int = 4            # key/value heads, each shared by n_head / n_kv_head query heads
    d_head: int = 32              # width of a head (even: rotary positions turn pairs)
    n_expert: int = 16            # E, experts a layer; 1 is a dense feed-forward without router
    d_expert: int = 192           # F, hidden width of one expert (n_expert = 1: of the feed-forward, with top_k = 1)
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
    init_scale: float = 1.0       # weights start at std sqrt(init_scale / fan_in): table in init_std
    recompute: bool = False       # attention and expert activations made again in backward; routing kept (Part 2)

    def __post_init__(self):
        if self.expert_groups:
            self.expert_groups = [(n, width) for n, width in self.expert_groups]      # JSON has lists
            self.n_expert = sum(n for n, _ in self.expert_groups)

    @property
    def widths(self) -> list[tuple[int, int]]:
        """(experts, their hidden width), a pair a width."""
        return self.expert_groups or [(self.n_expert, self.d_expert)]

    @property
    def active_width(self) -> int:
        """Hidden units a token passes in a feed-forward: K experts of the mean width, and the shared one."""
        return self.top_k * sum(n * width for n, width in self.widths) // self.n_expert + self.d_shared


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis (Zhang 2019)."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., i), weight (o, i) -> (..., o)."""
    return F.linear(x, weight)


def attend(x: Tensor, w: "Attention", rope: tuple[Tensor, Tensor], cache: "Cache | None") -> Tensor:
    """W_out softmax(q k^T / sqrt(d_head)) v, each token over itself and those before it: x (B, T, D) -> (B, T, D)."""
    q, k, v = w.project(x, rope)                                                 # (B, H or H_kv, T, d_head)
    mask = None
    if cache is not None:
        k, v, mask = cache.append(w.layer, k, v)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and x.shape[1] > 1, enable_gqa=True)
    return OPS.linear(y.transpose(1, 2).flatten(2), w.out.weight)


def experts(x: Tensor, routing: Routing, w: "MoE") -> Tensor:
    """y[n] = sum_k weight[n, k] * W_out[e] (silu(gate) * up), (gate, up) = W_in[e] x[n], e the k-th expert of token n.
    x (N, D) -> (N, D). The rows of a token are copies of it in expert order; each expert multiplies its block."""
    blocks = x[routing.token].split(routing.counts.tolist())                     # E blocks, (R, D) together
    w_in = [matrix for group in w.w_in for matrix in group]                      # E matrices, (2F, D)
    w_out = [matrix for group in w.w_out for matrix in group]                    # E matrices, (D, F)
    rows = []
    for e in range(len(blocks)):
        gate, up = (blocks[e] @ w_in[e].T).chunk(2, -1)
        rows.append((F.silu(gate) * up) @ w_out[e].T)
    rows = torch.cat(rows)[routing.slot]                                         # back to their tokens, (N, K, D)
    return (rows * routing.weights.unsqueeze(-1).to(rows.dtype)).sum(1)


def loss(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, nats a token, of hidden states (N, D), head (V, D) and the tokens (N,) that come next."""
    return F.cross_entropy(OPS.linear(x, head).float(), targets)


class Ops(NamedTuple):
    """What a faster version may replace, each with the same arguments and the same result."""

    route: Callable[..., Routing]
    rms_norm: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    attend: Callable[..., Tensor]
    experts: Callable[..., Tensor]
    loss: Callable[..., Tensor]


PLAIN = Ops(route, rms_norm, linear, attend, experts, loss)
OPS = PLAIN                       # every call goes through this; the last line of Part 2 puts the fast ones here


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return OPS.rms_norm(x, self.weight, self.eps)


def rope_tables(start: int | Tensor, length: int, config: ModelConfig, device) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i / d_head), (T, 1, d_head / 2) float32 each, for T = length positions."""
    two_i = torch.arange(0, config.d_head, 2, device=device, dtype=torch.float32)
    position = start + torch.arange(length, device=device, dtype=torch.float32)
    angle = position[:, None, None] * config.rope_base ** (-two_i / config.d_head)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i + d_head/2}) of x (B, T, H, d_head) by its angle: q.k then sees only the distance."""
    cos, sin = rope[0].to(x.dtype), rope[1].to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Cache:
    """Keys and values of the tokens read so far, a (B, H_kv, length, d_head) tensor a layer, not to be read again."""

    def __init__(self, config: ModelConfig, batch: int, length: int, device, dtype):
        assert length <= config.max_seq_len, f"{length} positions, and max_seq_len is {config.max_seq_len}"
        shape = (batch, config.n_kv_head, length, config.d_head)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros_like(k) for k in self.k]
        self.used = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keep k and v (B, H_kv, T, d_head); returns all so far, and what the new tokens see of it (None: causal)."""
        T, end = k.shape[2], self.used + k.shape[2]
        self.k[layer][:, :, self.used:end] = k
        self.v[layer][:, :, self.used:end] = v
        mask = None
        if self.used > 0 and T > 1:                                              # all before them, and themselves
            mask = torch.ones(T, end, dtype=torch.bool, device=k.device).tril(self.used)
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end], mask


class Attention(nn.Module):
    """The weights of `attend`. H query heads share H_kv heads of keys and values, H / H_kv each."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        c = config
        self.heads = (c.n_head, c.n_kv_head, c.n_kv_head)
        self.qkv = nn.Linear(c.d_model, sum(self.heads) * c.d_head, bias=False)
        self.out = nn.Linear(c.n_head * c.d_head, c.d_model, bias=False)
        norm = RMSNorm if c.qk_norm else nn.Identity
        self.q_norm = norm(c.d_head, c.norm_eps)
        self.k_norm = norm(c.d_head, c.norm_eps)
        self.config, self.layer = c, layer

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> queries (B, H, T, d_head) and keys, turned to their positions, and values, (B, H_kv, ...)."""
        qkv = OPS.linear(x, self.qkv.weight).unflatten(-1, (-1, self.config.d_head))
        q, k, v = qkv.split(self.heads, 2)                                       # (B, T, H or H_kv, d_head)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class Dense(nn.Module):
    """The feed-forward without experts: w_out (silu(gate) * up), (gate, up) = w_in x."""

    def __init__(self, d_model: int, width: int):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(2 * width, d_model))                # gate rows, then up rows
        self.w_out = nn.Parameter(torch.empty(d_model, width))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = OPS.linear(x, self.w_in).chunk(2, -1)
        return OPS.linear(F.silu(gate) * up, self.w_out)


class MoE(nn.Module):
    """E feed-forwards, each token visits K, and a shared one if there is one. Experts may differ in width: w_in and
    w_out hold a tensor a width, and experts are numbered through them in order."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D = config.n_expert, config.d_model
        self.gate = nn.Parameter(torch.empty(E, D))                              # the router: a row an expert
        self.w_in = nn.ParameterList(torch.empty(n, 2 * width, D) for n, width in config.widths)   # gate, then up rows
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
        flat = x.flatten(0, 1)                                                   # (N, D)
        context = Context(ids.flatten(), x.shape[1], self.training, self.bias, self.load)
        with torch.autocast(x.device.type, enabled=False):        # float32 always: rounding would turn near ties around
            routing = OPS.route(OPS.linear(flat.float(), self.gate.float()), self.config, context)
        if self.training and self.load is not None:
            self.load += routing.demand
        y = OPS.experts(flat, routing, self)
        if self.config.d_shared:
            gate = OPS.linear(flat, self.shared_gate).sigmoid() if self.config.shared_gate else 1
            y = y + gate * self.shared(flat)
        return y.view_as(x), routing

    @torch.no_grad()
    def end_step(self, skipped: Tensor) -> None:
        """Once an optimizer step: move the selection bias by the load of its whole batch, then count anew.
        skipped () is 1 where the step was not taken (a loss was not finite): its load moves nothing."""
        if self.bias is not None:
            moved = update_bias(self.bias.clone(), self.load, self.config.bias_rate)
            self.bias.copy_(torch.where(skipped > 0, self.bias, moved))
        if self.load is not None:
            self.load.zero_()


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.moe = config.n_expert > 1 and layer >= config.first_dense_layers
        self.ffn = MoE(config) if self.moe else Dense(config.d_model, config.active_width)

    def forward(self, x: Tensor, ids: Tensor, rope: tuple, cache: Cache | None) -> tuple[Tensor, Routing | None]:
        x = x + OPS.attend(self.attn_norm(x), self.attn, rope, cache)
        h = self.ffn_norm(x)
        y, routing = self.ffn(h, ids) if self.moe else (self.ffn(h), None)
        return x + y, routing


class Output(NamedTuple):
    """What one forward pass found. Without targets: logits. With: the losses, kept apart, each a float32 scalar."""

    logits: Tensor | None       # (B, T, V), or (B, 1, V) of the last token alone
    ce: Tensor | None           # cross-entropy, nats per token
    balance: Tensor | None      # balance loss, mean over layers; 0 in a dense model
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

    @property
    def head_weight(self) -> Tensor:
        return self.embed.weight if self.config.tie_embeddings else self.head.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: Cache | None = None,
                last: bool = False) -> Output:
        """tokens (B, T) int64; targets (B, T) are the tokens that come next. A cache continues where it stands."""
        length = tokens.shape[1]
        assert length <= self.config.max_seq_len, "more positions than max_seq_len"
        rope = rope_tables(cache.used if cache else 0, length, self.config, tokens.device)
        x = self.embed(tokens)                                                   # (B, T, D)
        routings = []
        for block in self.blocks:
            x, routing = block(x, tokens, rope, cache)
            routings += [routing] if routing else []
        if cache:
            cache.used += length
        x = self.norm(x)
        names = routings[0].stats if routings else ()
        stats = {name: torch.stack([r.stats[name] for r in routings]) for name in names}
        if targets is None:
            return Output(OPS.linear(x[:, -1:] if last else x, self.head_weight), None, None, None, stats)
        ce = OPS.loss(x.flatten(0, 1), self.head_weight, targets.flatten())
        none = [ce.new_zeros(())]
        balance = torch.stack([r.losses["balance"] for r in routings] or none).mean()
        z = torch.stack([r.losses["z"] for r in routings] or none).mean()
        return Output(None, ce, balance, z, stats)

    def end_step(self, skipped: Tensor) -> None:
        """What the routers learn without a gradient, once an optimizer step: see MoE.end_step."""
        for block in self.blocks:
            if block.moe:
                block.ffn.end_step(skipped)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Model":
        """Fill every parameter by init_std, in order, from one seeded generator: the same weights on every device."""
        generator = torch.Generator().manual_seed(seed)
        cut = math.erf(math.sqrt(2))                            # the share of a normal within two deviations
        for name, p in self.named_parameters():
            std = init_std(name, p, self.config)
            if std is None:
                p.fill_(1)
            else:                                               # of a uniform u, erfinv(u) sqrt(2) is a unit normal
                u = torch.empty(p.shape).uniform_(-cut, cut, generator=generator)
                p.copy_(u.erfinv_().mul_(std * math.sqrt(2)))
        return self


def init_std(name: str, p: Tensor, config: ModelConfig) -> float | None:
    """Standard deviation, before the cut, of what a parameter starts with; None: it starts at one.

    norm weights                              1
    embed, head, attn.qkv, gates, every w_in  sqrt(init_scale / D)
    attn.out, every w_out                     sqrt(init_scale / fan_in) / sqrt(2 L)
    Normal, cut at two deviations, variance a fraction of 1 / fan_in (Fedus 2021: 0.1 is steady when sparse). The two
    that write to the residual stream shrink with depth, so that its variance does not grow with it (GPT-2).
    """
    if p.dim() == 1:
        return None
    std = math.sqrt(config.init_scale / p.shape[-1])                             # fan_in is every matrix's last axis
    return std / math.sqrt(2 * config.n_layer) if "attn.out" in name or "w_out" in name else std


def count(config: ModelConfig) -> dict[str, int]:
    """Parameters and training FLOPs, read off the real modules on the meta device (no memory is touched).

    total, active     with tied embeddings (*_untied: with a head of its own); active are those one token touches
    flops_per_token   forward 2 an active parameter (a multiply-add is 2; looking a row up costs nothing, so the table
                      counts once, as the head), and 2 * 2 * H * d_head * T / 2 a layer for q k^T and its product with v
                      over T / 2 earlier tokens on average; backward twice that
    """
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in Model(config).named_parameters()}
    embedding = sizes.pop("embed.weight")
    sizes.pop("head.weight", None)
    expert = sum(n for name, n in sizes.items() if ".ffn.w_in." in name or ".ffn.w_out." in name)
    total = sum(sizes.values()) + embedding
    active = total - expert + expert * config.top_k // config.n_expert
    attention = 6 * config.n_layer * config.n_head * config.d_head * config.seq_len
    return {"total": total, "active": active, "total_untied": total + embedding, "active_untied": active + embedding,
            "embedding": embedding, "flops_per_token": 6 * active + attention}


def next_logits(model: Model, tokens: Tensor, cache: Cache) -> Tensor:
    """Logits (B, V) of the token after tokens (B, T), which come after those in the cache."""
    return model(tokens, cache=cache, last=True).logits[:, -1]


@torch.inference_mode()
def generate(model: Model, prompt: Tensor, n_token: int, temperature: float = 0.8, top_k: int = 50, seed: int = 1,
             n_vocab: int | None = None, step: Callable[..., Tensor] = next_logits) -> Iterator[Tensor]:
    """Yield n_token times the next token (B,) of each row of a prompt (B, T), drawn from the top_k likeliest.

    The model is in eval mode. Ids from n_vocab on (padding of the vocabulary) are never drawn. step may be a faster
    one: Part 2's Decoder.
    """
    weight, tokens = model.embed.weight, prompt
    cache = Cache(model.config, len(prompt), prompt.shape[1] + n_token, weight.device, weight.dtype)
    generator = torch.Generator(weight.device).manual_seed(seed)
    for _ in range(n_token):
        logits = step(model, tokens.to(weight.device), cache)[:, :n_vocab].float()
        tokens = sample(logits, temperature, top_k, generator)
        yield tokens[:, 0]


def sample(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """The next token (B, 1), drawn from the top_k likeliest of logits (B, V); temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    values, ids = logits.topk(min(top_k, logits.shape[1]))
    return ids.gather(1, torch.multinomial((values / temperature).softmax(-1), 1, generator=generator))


# === Part 2: the same, faster =====================================================================================
# The six entries once more, and a table for each way to run: FAST; COMPILED, where torch.compile fuses what FAST does
# by hand; DECODE, for a compiled step of writing text. Each is tested against the plain one, with every gradient.

import contextlib
import weakref

from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from router import combine, constexpr, fast_route, gather, jit, tl, triton, use_kernels


def use(ops: Ops) -> None:
    """Run the model by this table from here on."""
    global OPS
    OPS = ops


@contextlib.contextmanager
def using(ops: Ops) -> Iterator[None]:
    """Run the model by this table, until the block ends."""
    before = OPS
    use(ops)
    try:
        yield
    finally:
        use(before)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision matrix products run in: autocast's where it is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# --- a CPU in float32: RMSNorm, and products by oneDNN ---
# torch.mm is MKL there. oneDNN, which is in torch too, is up to twice as fast on an AMD processor with AVX-512 (see
# results/product_cpu.json), and level on others. It compiles a kernel for each shape, so it gets whole tiles alone.

TILE = 16            # sizes that oneDNN is given are multiples of it
AVX512 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def on_cpu(*tensors: Tensor) -> bool:
    """Whether these are float32 on a CPU, and their products will be."""
    return not torch.is_autocast_enabled("cpu") and all(t.dtype == torch.float32 and t.is_cpu for t in tensors)


def fast_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return Normalize.apply(x, weight, eps) if on_cpu(x, weight) else rms_norm_of_weight(x, weight, eps)


def rms_norm_of_weight(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in the weight's precision: under autocast float32, whatever a version of torch makes autocast do.
    Queries and keys, whose norm this is too, are then turned in float32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps)


class Normalize(torch.autograd.Function):
    """RMSNorm on a CPU, where torch has no kernel for it: ten operators backward, and here seven, in two buffers.

    With n = x / rms and p = dy * n:  dweight = sum of p over rows,  dx = (dy * weight - n * mean(p * weight)) / rms.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        size = x.shape[-1]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(size).add_(eps).rsqrt_()                     # 1 / rms
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, scale = ctx.saved_tensors
        n = torch.mul(x, scale, out=torch.empty_like(x, memory_format=torch.contiguous_format))
        p = torch.mul(dy, n, out=torch.empty_like(n))
        rows = p.view(-1, len(weight))                                           # (N, size)
        with torch.autocast("cpu", enabled=False):
            mean = (rows @ weight).div_(len(weight)).view(scale.shape)
        dweight = rows.sum(0)
        return torch.mul(dy, weight, out=p).addcmul_(n, mean, value=-1).mul_(scale), dweight, None


def has_onednn(x: Tensor, w: Tensor) -> bool:
    """Whether oneDNN multiplies x (n, i) @ w (o, i).T: in float32 on a CPU with AVX-512, whole tiles alone."""
    whole = x.dim() == 2 and len(x) > 0 and not (len(x) % TILE or x.shape[1] % TILE or len(w) % TILE)
    return AVX512 and whole and on_cpu(x, w)


def onednn(x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


def linear_backward(ctx, dy):
    x, w = ctx.saved_tensors
    return fast_linear(dy, w.t()), weight_gradient(dy, x)


onednn_linear = torch.library.custom_op("moe::linear", onednn, mutates_args=())  # for autograd and torch.compile
onednn_linear.register_fake(lambda x, w: x.new_empty(len(x), len(w)))
onednn_linear.register_autograd(linear_backward, setup_context=lambda ctx, inputs, output:
                                ctx.save_for_backward(*inputs))


def fast_linear(x: Tensor, w: Tensor) -> Tensor:
    """`linear` by the faster library."""
    if x.dim() > 2:
        return fast_linear(x.flatten(0, -2), w).unflatten(0, x.shape[:-1])
    return onednn_linear(x, w) if has_onednn(x, w) else F.linear(x, w)


def weight_gradient(dy: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """dy (n, o).T @ x (n, i), by the faster library. oneDNN needs dy turned first: that pays in large products."""
    large = dy.numel() * x.shape[1] >= 2**25 and has_onednn(dy.t(), x.t())
    if not large and (out is None or out.dtype == dy.dtype):
        return torch.mm(dy.t(), x, out=out)
    dw = fast_linear(dy.t().contiguous(), x.t()) if large else dy.t() @ x
    return dw if out is None else out.copy_(dw)


# --- attention ---


WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def fast_attend(x: Tensor, w: Attention, rope: tuple, cache: Cache | None) -> Tensor:
    """`attend`, which keeps nothing for backward but x if config.recompute asks for it."""
    if cache and x.is_cuda:                      # cuDNN, torch's first choice on Hopper, would make a plan for every
        with sdpa_kernel(WITHOUT_CUDNN):         # length, 10 to 400 ms each
            return attend(x, w, rope, cache)
    if not (w.config.recompute and torch.is_grad_enabled()):
        return attend(x, w, rope, cache)
    return checkpoint(using(OPS)(attend), x, w, rope, cache, use_reentrant=False)


# --- the expert layer ---


@torch.compiler.disable           # fused by hand already, and the rows of an expert change at every step
def fast_experts(x: Tensor, routing: Routing, w: MoE) -> Tensor:
    """`experts`, its backward written by hand, in the precision of autocast."""
    matrices = [matrix for width in zip(w.w_in, w.w_out) for matrix in width]
    r = routing
    return Experts.apply(x.to(compute_dtype(x)), r.weights, r.token, r.slot, r.offsets, w.config.recompute, *matrices)


class Experts(torch.autograd.Function):
    """Autograd would keep the copied tokens, the activations and every expert's output. Kept here: x, the combine
    weights and the pre-activations h, or with recompute not even those. The rest is cheap to make again, and a combine
    weight's gradient needs no output, since <dy, W_out a> = <W_out^T dy, a>. matrices: W_in and W_out of each width."""

    @staticmethod
    def forward(ctx, x, weights, token, slot, offsets, recompute, *matrices):
        weight = weights.new_empty(len(token), 1)                                # of each row, not rounded to x's dtype
        weight[slot.flatten()] = weights.view(-1, 1)
        y = x.new_empty(len(token), x.shape[1])
        kept = []
        for p in pieces(x, token, slot, offsets, matrices):
            h = product(p, take(p, x), p.w_in)                                   # (rows, 2F)
            y = put(p, product(p, swiglu(h, weight[p.rows]), p.w_out), y)
            kept += [] if recompute else [h]
        ctx.save_for_backward(x, weight, token, slot, offsets, *matrices, *kept)
        ctx.n_matrix = len(matrices)
        return combine(y, slot)                                                  # (N, D)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, token, slot, offsets, *rest = ctx.saved_tensors
        matrices, kept = rest[:ctx.n_matrix], rest[ctx.n_matrix:]
        dmatrices = [torch.empty_like(w) for w in matrices]
        dx = x.new_empty(len(token), x.shape[1])
        dy = dy.to(x.dtype)
        dweight = x.new_empty(len(token), dtype=torch.float32)
        with torch.autocast(x.device.type, enabled=False):           # the precision was chosen forward
            for i, p in enumerate(pieces(x, token, slot, offsets, matrices, dmatrices)):
                x_p, dy_p = take(p, x), take(p, dy)
                dy_p[p.n:] = 0                                     # rows that only fill a tile, if finite, add nothing
                h = kept[i] if kept else product(p, x_p, p.w_in)
                dh, a, dweight[p.rows] = swiglu_backward(h, product(p, dy_p, p.w_out.mT), weight[p.rows])
                outer(p, dh, x_p, p.dw_in)
                outer(p, dy_p, a, p.dw_out)
                dx = put(p, product(p, dh, p.w_in.mT), dx)
        return combine(dx, slot), dweight[slot], None, None, None, None, *dmatrices


class Piece(NamedTuple):
    """Rows that are multiplied in one go: those of one expert, or of all experts of a width."""

    rows: slice                   # in expert order
    n: int                        # the first n are the piece's own, the others fill a tile: see whole_tiles
    token: Tensor                 # (rows,) which tokens they are copies of
    slot: Tensor | None           # Routing's (N, K), where the piece is all R rows
    offs: Tensor | None           # where each expert's rows end among these, int32; None: one expert
    w_in: Tensor                  # (2F, D), or (E, 2F, D)
    w_out: Tensor                 # (D, F), or (E, D, F)
    dw_in: Tensor | None          # where their gradients go
    dw_out: Tensor | None


def pieces(x: Tensor, token: Tensor, slot: Tensor, offsets: Tensor, matrices, dmatrices=None) -> Iterator[Piece]:
    """All experts of a width at once, where a grouped product is faster, or one after the other: the few rows of one
    stay in a processor's cache from the first product to the last. Several widths at once cost a wait for the GPU."""
    dmatrices = dmatrices or [None] * len(matrices)
    one_width = len(matrices) == 2
    mean_rows = len(token) / len(offsets)                                        # of an expert
    at_once = all(has_grouped_mm(x, w_out, mean_rows) for w_out in matrices[1::2])
    ends = [len(token)] * len(offsets) if at_once and one_width else offsets.tolist()
    first = start = 0
    for w_in, w_out, dw_in, dw_out in zip(matrices[::2], matrices[1::2], dmatrices[::2], dmatrices[1::2]):
        last = first + len(w_in)
        w_in, w_out = w_in.to(x.dtype), w_out.to(x.dtype)
        if at_once:
            end = ends[last - 1]
            rows = slice(start, end)
            offs = (offsets[first:last] - start).int()
            yield Piece(rows, end - start, token[rows], slot if one_width else None, offs, w_in, w_out, dw_in, dw_out)
            start = end
        else:
            grads = zip(dw_in, dw_out) if dw_in is not None else [(None, None)] * len(w_in)
            for end, *pair, grad in zip(ends[first:last], w_in, w_out, grads):
                rows = slice(start, start + whole_tiles(x, w_out.shape[2], end - start, ends[-1] - start))
                yield Piece(rows, end - start, token[rows], None, None, *pair, *grad)
                start = end
        first = last


def whole_tiles(x: Tensor, width: int, n: int, left: int) -> int:
    """How many rows to multiply for an expert that has n; left: rows there are from its first on, later experts' too.

    oneDNN wants few shapes, so rows of the next experts may fill the last tile, up to 15 or a sixteenth of n: their
    results are dropped, overwritten or 0."""
    tiled = AVX512 and on_cpu(x) and x.shape[1] % TILE == 0 and width % TILE == 0
    tile = 1 << max(4, n.bit_length() - 5) if tiled and n >= 8 else 1            # 8 to 511 rows: 16
    whole = -(-n // tile) * tile
    return whole if whole <= left else n


def take(p: Piece, x: Tensor) -> Tensor:
    """Tokens (N, D) -> the rows of a piece."""
    return x.index_select(0, p.token) if p.slot is None else gather(x, p.slot)


def product(p: Piece, a: Tensor, w: Tensor) -> Tensor:
    """a w^T, with each expert's own rows and w."""
    if p.offs is not None:
        return F.grouped_mm(a, w.mT, offs=p.offs)
    return onednn(a, w) if has_onednn(a, w) else F.linear(a, w)


def outer(p: Piece, b: Tensor, a: Tensor, out: Tensor) -> None:
    """out = b^T a, over each expert's own rows."""
    if p.offs is None:
        weight_gradient(b, a, out)
    else:
        out.copy_(F.grouped_mm(b.t(), a, offs=p.offs))


def put(p: Piece, rows: Tensor, where: Tensor) -> Tensor:
    """All rows (R, D), with those of a piece in their place."""
    if p.slot is not None:
        return rows
    where[p.rows][:p.n] = rows[:p.n]
    return where


def swiglu(h: Tensor, weight: Tensor) -> Tensor:
    """h (rows, 2F) -> a (rows, F) = silu(gate) * up * weight: weighted here, F wide, combine is then a plain sum."""
    if use_kernels(h) and len(h):
        a = h.new_empty(len(h), h.shape[1] // 2)
        swiglu_fwd[(len(h),)](h, weight, a, a.shape[1], **row_launch(a.shape[1]))
        return a
    gate, up = h.chunk(2, -1)
    return F.silu(gate).mul_(up).mul_(weight)


def swiglu_backward(h: Tensor, da: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From da, the gradient of a = swiglu(h, weight), used up: dh (rows, 2F), a again (rows, F), dweight (rows,)."""
    dh = torch.empty_like(h)
    if use_kernels(h) and len(h):
        a = torch.empty_like(da)
        dweight = h.new_empty(len(h), dtype=torch.float32)
        swiglu_bwd[(len(h),)](h, weight, da, dh, a, dweight, da.shape[1], **row_launch(da.shape[1]))
        return dh, a, dweight
    gate, up = h.chunk(2, -1)
    dgate, dup = dh.chunk(2, -1)
    silu = F.silu(gate)
    a = silu * up
    dweight = (da * a).sum(-1)                                  # before a and da are weighted
    torch.mul(da.mul_(weight), silu, out=dup)
    torch.ops.aten.silu_backward.grad_input(da.mul_(up), gate, grad_input=dgate)
    return dh, a.mul_(weight), dweight


def row_launch(width: int) -> dict:
    """Launch shape of a row a program: 16 numbers a thread or fewer, up to 512 threads."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 512))}


@jit
def swiglu_fwd(h, weight, a, width, BLOCK: constexpr):
    """A row a program: reads 2F numbers and writes F, where the three torch operators of swiglu move 7F."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, BLOCK)
    gate = tl.load(h + row * 2 * width + f, f < width, other=0.0).to(tl.float32)
    up = tl.load(h + row * 2 * width + width + f, f < width, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up * tl.load(weight + row).to(tl.float32)
    tl.store(a + row * width + f, out.to(a.dtype.element_ty), f < width)


@jit
def swiglu_bwd(h, weight, da, dh, a, dweight, width, BLOCK: constexpr):
    """A row a program: reads 3F numbers and writes 3F, where the torch operators of swiglu_backward move 22F."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, BLOCK)
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


def has_grouped_mm(x: Tensor, w_out: Tensor, rows: float) -> bool:
    """On Hopper, 9.x, grouped_mm is one fast kernel for bf16 and under 1,024 experts. (On 10.x it leaves the gradient
    of an expert without rows unwritten, pytorch#172439; on others it is a loop that waits for the GPU.) On a CPU it is
    a loop in C++ and by MKL: faster while starting operators takes longer than the products of an expert's mean rows.
    """
    n_expert, d, width = w_out.shape
    aligned = d % 8 == 0 and width % 8 == 0                            # grouped_mm wants rows of whole 16 bytes
    if x.is_cuda:
        hopper = torch.cuda.get_device_capability(x.device)[0] == 9
        return aligned and hopper and x.dtype == torch.bfloat16 and n_expert < 1024
    few = rows * d * width <= 2**20
    return aligned and few and x.device.type == "cpu" and x.dtype != torch.float64


# --- the loss ---


LOGIT_BYTES = 256 * 2**20     # fast_loss makes the logits of so many bytes at a time, and on a GPU more


def logit_bytes(device: torch.device) -> int:
    """A GPU with room takes up to 2 GiB: every piece costs a pass over the weight's gradient, 3 GB at V = 151,936 and
    D = 2048. A power of two within an eighth of what is free, so that a step is like the one before."""
    if device.type != "cuda":
        return LOGIT_BYTES
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + cached
    return max(LOGIT_BYTES, min(8 * LOGIT_BYTES, 1 << max(0, (free // 8).bit_length() - 1)))


def fast_loss(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return LinearCrossEntropy.apply(x.to(compute_dtype(x)), head, targets, torch.is_grad_enabled())


class LinearCrossEntropy(torch.autograd.Function):
    """mean(cross_entropy(x @ weight.T, targets)) for x (N, D), weight (V, D), targets (N,), without the N x V logits.

    With 151,936 words the logits of 2,048 tokens are 1.2 GB, their gradient as much again. Instead tokens are taken a
    few at a time, logit_bytes each, and since the loss is a mean of independent tokens its gradient
    (softmax - one_hot) / N is known at once: the forward pass finishes both gradients, and backward only scales them.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, learn):
        n = len(x)
        w = weight.detach().to(x.dtype)
        for_x, for_weight = (learn and needed for needed in ctx.needs_input_grad[:2])
        fit = logit_bytes(x.device) // (4 * len(w))
        step = fit // TILE * TILE or max(1, fit)                                  # whole tiles where there is room
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x) if for_x else None
        dweight = torch.zeros(weight.shape, device=x.device) if for_weight else None
        for start in range(0, n, step):
            rows = slice(start, start + step)
            logits = fast_linear(x[rows], w).float()                                   # (step, V)
            target = targets[rows, None]
            top = logits.amax(-1, keepdim=True)
            hit = logits.gather(1, target)
            p = logits.sub_(top).exp_()                                           # in place: no second (step, V)
            mass = p.sum(-1, keepdim=True)
            total += (top + mass.log() - hit).sum()
            if for_x or for_weight:
                p.div_(mass * n).scatter_add_(1, target, torch.full_like(hit, -1 / n))           # softmax - one_hot
                p = p.to(x.dtype)
                if for_x:
                    dx[rows] = fast_linear(p, w.t())
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


# --- writing text ---


def decode_linear(x: Tensor, w: Tensor) -> Tensor:
    """`linear` of a single row as a sum: torch.compile fuses it with the operators around it, and together they cost
    less than a library's call."""
    if x.numel() == x.shape[-1]:
        return (x.flatten() * w).sum(1).view(*x.shape[:-1], -1)
    return fast_linear(x, w)


def decode_attend(x: Tensor, w: Attention, rope: tuple, cache: "StaticCache") -> Tensor:
    """`attend` for one token a sequence over a whole buffer, as a few loops, where a library would first repeat k and v
    for every query head."""
    q, k, v = w.project(x, rope)
    k, v, seen = cache.append(w.layer, k, v)                                     # (B, H_kv, length, d_head); (length,)
    query = q.unflatten(1, (k.shape[1], -1)).float()                             # (B, H_kv, H / H_kv, 1, d_head)
    scores = (query * k.unsqueeze(2)).sum(-1) * q.shape[-1] ** -0.5              # (B, H_kv, H / H_kv, length)
    p = scores.where(seen, -math.inf).softmax(-1)
    y = (p.unsqueeze(-1) * v.unsqueeze(2)).sum(-2, keepdim=True).flatten(1, 2).to(q.dtype)
    return OPS.linear(y.transpose(1, 2).flatten(2), w.out.weight)


def decode_experts(x: Tensor, routing: Routing, w: MoE) -> Tensor:
    """`experts` for the few tokens of a step: no rows to sort, no loop. Uncompiled, w[experts] would copy K experts a
    token; the compiler multiplies them where they lie. An expert of another width counts with weight 0."""
    y = torch.zeros_like(x)
    first = 0
    for w_in, w_out in zip(w.w_in, w.w_out):
        e = (routing.experts - first).clamp(0, len(w_in) - 1)                    # (N, K)
        weight = routing.weights * (e == routing.experts - first)
        gate, up = (w_in[e].to(x.dtype) * x[:, None, None]).sum(-1).chunk(2, -1)     # (N, K, F)
        a = F.silu(gate) * up * weight.unsqueeze(-1).to(x.dtype)
        y = y + (w_out[e].to(x.dtype) * a[:, :, None]).sum(-1).sum(1)
        first += len(w_in)
    return y


class StaticCache(Cache):
    """A cache that every step sees in the same shapes: `used` is a tensor, a token attends to the whole buffer, and a
    mask hides what is not written yet. Its length is a multiple of 256, so that prompts of many lengths share one
    compilation. A tensor a layer: torch.compile would copy all of one tensor to write into a slice of it."""

    def __init__(self, cache: Cache):
        pad = (0, 0, 0, -cache.k[0].shape[2] % 256)
        self.k = [F.pad(k, pad) for k in cache.k]
        self.v = [F.pad(v, pad) for v in cache.v]
        self.used = torch.tensor(cache.used, device=self.k[0].device)

    def has_room_for(self, cache: Cache) -> bool:
        mine, theirs = self.k[0], cache.k[0]
        room = theirs.shape[2] <= mine.shape[2] < theirs.shape[2] + 256
        return len(mine) == len(theirs) and room and mine.dtype == theirs.dtype and mine.device == theirs.device

    def continue_from(self, cache: Cache) -> None:
        for mine, theirs in zip((*self.k, *self.v), (*cache.k, *cache.v)):
            mine[:, :, :cache.used] = theirs[:, :, :cache.used]
        self.used.fill_(cache.used)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = self.k[layer], self.v[layer]
        keys.index_copy_(2, self.used.view(1), k)
        values.index_copy_(2, self.used.view(1), v)
        return keys, values, torch.arange(keys.shape[2], device=k.device) <= self.used


compiled_logits = torch.compile(next_logits, fullgraph=True, dynamic=False)
torch._dynamo.config.recompile_limit = 64     # each model, batch and room is a compilation: the default allows eight


class Decoder:
    """`next_logits` for generate(step=Decoder()), compiled once the prompt is read. The floor is a read of the weights.

    A step of a small model is hundreds of small operators, and starting them costs more than their work. Compiled,
    they become a few loops, on a GPU replayed as one CUDA graph. That pays from some thousand tokens on; a Decoder that
    is kept for the next text of the same batch and room keeps its graph, too.
    """

    def __init__(self):
        self.model = self.source = self.cache = self.graph = None
        self.begun = weakref.WeakSet()

    def __call__(self, model: Model, tokens: Tensor, cache: Cache) -> Tensor:
        if cache.used == 0 or tokens.shape[1] > 1:
            assert self.source is not cache, "after a first single token each step is one token"
            return next_logits(model, tokens, cache)
        if self.source is not cache:
            self.begin(model, cache)
        if not tokens.is_cuda:
            return self.step(model, tokens)
        if self.graph is None:
            self.capture(model, tokens)
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits

    def begin(self, model: Model, cache: Cache) -> None:
        """Go on from this cache: in the buffers there are, if it is another text for the same model."""
        assert cache not in self.begun, "a Decoder writes one text after the other: this one was begun, and left"
        self.begun.add(cache)
        self.source = cache
        if self.model is model and self.cache.has_room_for(cache):
            return self.cache.continue_from(cache)
        self.model, self.cache, self.graph = model, StaticCache(cache), None

    def step(self, model: Model, tokens: Tensor) -> Tensor:
        with using(DECODE):
            return compiled_logits(model, tokens, self.cache)

    def capture(self, model: Model, tokens: Tensor) -> None:
        """Record the kernels of a step. The two steps it takes leave no trace: the position goes back."""
        self.tokens = tokens.clone()
        used = self.cache.used.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(model, self.tokens)                                        # compiles and warms up
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.step(model, self.tokens)
        self.cache.used.copy_(used)


FAST = Ops(fast_route, fast_rms_norm, fast_linear, fast_attend, fast_experts, fast_loss)
COMPILED = FAST._replace(rms_norm=rms_norm_of_weight)                # torch.compile fuses it
DECODE = Ops(route, rms_norm_of_weight, decode_linear, decode_attend, decode_experts, loss)
OPS = FAST


# === Part 3: tools ================================================================================================

import base64
import codecs
import json
import typing
import zipfile
from functools import partial
from pathlib import Path

from router import POLICIES, BadInput, Parser, closest, require, require_each, require_one_of, run_script


def is_file(name: str | Path) -> bool:
    """Whether this is a file; a text too long for a name is none."""
    try:
        return Path(name).is_file()
    except OSError:
        return False


def whole_groups(pairs) -> list[tuple[int, int]]:
    """expert_groups as pairs of whole numbers (JSON has lists, a command line 1e3), or BadInput."""
    try:
        groups = [(int(n), int(width)) for n, width in pairs]
        fits = len(groups) > 0 and groups == [tuple(pair) for pair in pairs]
    except (TypeError, ValueError, OverflowError):
        fits = False
    require(fits and all(0 < n < 2**31 for group in groups for n in group),
            f"expert_groups = {pairs} must be a list of (experts, width) pairs, such as [(16, 256), (32, 128)]")
    return groups


def convert(name: str, value, kind: type):
    """value as the type a field has (1e9 is a whole number, 1 a fraction), or BadInput."""
    allowed = typing.get_args(kind) or (kind,)
    if isinstance(value, float) and float not in allowed and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and int not in allowed and float in allowed:
        value = float(value) if abs(value) < 1e300 else math.inf
    fits = type(value) in allowed and not (isinstance(value, float) and not math.isfinite(value))
    wanted = " or ".join(t.__name__ for t in allowed)
    require(fits, f"{name} = {value!r} must be {wanted.replace('NoneType', 'None')}")
    return whole_groups(value) if list in allowed and name.startswith("expert_groups") and value is not None else value


def validate(config: ModelConfig) -> None:
    """Raise BadInput at the first value no model can have."""
    require_each(config, "n_layer d_model n_head n_kv_head d_head n_expert top_k d_expert vocab_size seq_len "
                 "max_seq_len rope_base norm_eps init_scale", lambda n: 0 < n < 2**31, "be positive, below 2**31")
    require_each(config, "aux_coef z_coef bias_rate router_noise d_shared first_dense_layers", lambda n: n >= 0,
                 "not be negative")
    require_each(config, "capacity_factor eval_capacity_factor", lambda n: n > 0, "be positive, or None for no limit")
    require_each(config, "top_p", lambda p: 0 < p <= 1, "be above 0, at most 1")
    require_one_of("balance_scope", config.balance_scope, ("micro_batch", "sequence", "global"))
    require(config.top_k <= config.n_expert, f"top_k = {config.top_k} must be 1 to n_expert = {config.n_expert}")
    require(config.n_head % config.n_kv_head == 0,
            f"n_head = {config.n_head} must be a multiple of n_kv_head = {config.n_kv_head}")
    require(config.d_head % 2 == 0, f"d_head = {config.d_head} must be even, rotary positions turn pairs")
    require(config.seq_len <= config.max_seq_len,
            f"seq_len = {config.seq_len} must not exceed max_seq_len = {config.max_seq_len}")
    wide = max(n * 2 * width for n, width in config.widths)
    require(max(wide, config.vocab_size, config.n_head * config.d_head) * config.d_model < 2**60,
            "a matrix of this model has over 10^18 numbers: make it smaller")
    require_one_of("router", config.router, POLICIES)
    require(config.router != "switch" or config.top_k == 1,
            f"router = 'switch' visits one expert: set top_k = 1, not {config.top_k}")
    require(config.bias_rate == 0 or config.router in ("softmax", "switch", "sigmoid"),
            f"bias_rate = {config.bias_rate}: router = {config.router!r} has no bias to choose by")
    require(config.router != "expert_choice" or config.capacity_factor is config.eval_capacity_factor is None,
            "router = 'expert_choice' has a capacity of its own: leave capacity_factor and eval_capacity_factor")
    require(config.first_dense_layers < config.n_layer,
            f"first_dense_layers = {config.first_dense_layers} must be 0 to n_layer - 1 = {config.n_layer - 1}")
    require(config.d_shared == 0 or config.n_expert > 1, "d_shared needs experts: with n_expert = 1 widen d_expert")
    require(config.d_shared > 0 or not config.shared_gate, "shared_gate = True needs a shared expert: set d_shared")


# --- memory, before anything is allocated ---


def memory(config: ModelConfig, micro_batch: int = 1, dtype: str = "float32") -> dict[str, int]:
    """Bytes one training step needs, item by item. Master weights, gradients and AdamW's two moments are float32.

    Activations are what autograd keeps for the backward pass, layer by layer, plus the temporaries of the one layer
    being worked on; logits are the pieces LinearCrossEntropy holds at once.
    """
    c = config
    params = count(c)["total" if c.tie_embeddings else "total_untied"]
    tokens = micro_batch * c.seq_len
    wide = 2 if dtype == "bfloat16" else 4
    n_dense = c.n_layer if c.n_expert == 1 else c.first_dense_layers
    kept = c.n_layer * 2 * 2 * c.d_model * 4                                     # input and norm, twice a block
    kept += n_dense * 4 * c.active_width * wide                                  # gate, up, silu and their product
    shared = 4 * c.d_shared * wide + (2 * 2 * c.d_model * wide if c.d_shared and wide == 2 else 0)     # casts of x
    kept += (c.n_layer - n_dense) * (4 * (3 * c.n_expert + 8 * c.top_k) + shared)   # router; shared
    attention = (c.n_head + c.n_kv_head) * c.d_head * (16 if wide == 4 else 3 * 2 + 4)      # q, k, v and y, each twice;
    #                                                                              under autocast q, k once in float32
    slots = 2 if c.router == "expert_choice" else 1                              # up to 2K places a token
    routed = 0 if c.n_expert == 1 else slots * 2 * (c.active_width - c.d_shared) * wide      # pre-activation
    copies = 2 if wide == 4 else 3                                               # of all rows: what grouped_mm takes
    working = slots * (c.top_k * copies * c.d_model + 5 * c.active_width) * wide  # and gives, or one expert's at a time
    if c.recompute:
        working += attention + routed
    else:
        kept += c.n_layer * attention + (c.n_layer - n_dense) * routed
    table = c.vocab_size * c.d_model * 4
    logits = min(LOGIT_BYTES, tokens * c.vocab_size * 4) + table                 # a piece, and the table's gradient;
    logits *= 4 // wide                                                          # with bfloat16 also copies of both
    parts = {"weights": 4 * params, "gradients": 4 * params, "optimizer": 8 * params,
             "activations": tokens * (kept + working), "logits": logits}
    return parts | {"total": sum(parts.values())}


def peak_rates(body: float, active: float, n_expert: int) -> tuple[float, float]:
    """Peak learning rate exp(8.39 - 0.81 ln N - 0.25 ln E), eq. 7 of "Joint MoE Scaling Laws" (2025), in two readings.

    By the text N are the active parameters without embedding and head, `body`; the authors' public code passes all of
    them, `active`, and has more digits. At d_model = 512 the readings differ 2.45-fold.
    """
    by_text = 8.39 - 0.81 * math.log(body)
    by_code = 8.391640956 - 0.8121798245 * math.log(active)
    return math.exp(by_text) / n_expert**0.25, math.exp(by_code) / n_expert**0.25


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


# --- Hugging Face checkpoints ---


MODEL_TYPES = typing.get_type_hints(ModelConfig)
HF_FIELDS = {  # ours: theirs (Qwen3MoeConfig)
    "n_layer": "num_hidden_layers", "d_model": "hidden_size", "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads", "d_head": "head_dim", "n_expert": "num_experts", "top_k": "num_experts_per_tok",
    "d_expert": "moe_intermediate_size", "vocab_size": "vocab_size", "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings", "renormalize": "norm_topk_prob",
    "rope_base": "rope_theta", "aux_coef": "router_aux_loss_coef",
}
HF_OPTIONAL = ("d_head", "max_seq_len", "norm_eps", "aux_coef")       # these of ours a config.json may lack
HF_ONLY = {  # ours: the only value their model can be
    "qk_norm": True, "router": "softmax", "expert_groups": None, "d_shared": 0, "first_dense_layers": 0,
    "eval_capacity_factor": None, "bias_rate": 0,
}
HF_UNSUPPORTED = {  # theirs: the only value this model can be
    "attention_bias": False, "use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "hidden_act": "silu",
}


def hf_names(config: ModelConfig) -> dict[str, list[str]]:
    """Our parameter -> their tensors: it holds their rows, one tensor behind another."""
    names = {"embed.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"]}
    if not config.tie_embeddings:
        names["head.weight"] = ["lm_head.weight"]
    block = {
        "attn_norm.weight": ["input_layernorm"],
        "attn.qkv.weight": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attn.q_norm.weight": ["self_attn.q_norm"],
        "attn.k_norm.weight": ["self_attn.k_norm"],
        "attn.out.weight": ["self_attn.o_proj"],
        "ffn_norm.weight": ["post_attention_layernorm"],
    }
    if config.n_expert == 1:
        block |= {"ffn.w_in": ["mlp.gate_proj", "mlp.up_proj"], "ffn.w_out": ["mlp.down_proj"]}
    else:
        experts = [f"mlp.experts.{e}" for e in range(config.n_expert)]
        block["ffn.gate"] = ["mlp.gate"]
        block["ffn.w_in.0"] = [f"{expert}.{part}_proj" for expert in experts for part in ("gate", "up")]
        block["ffn.w_out.0"] = [f"{expert}.down_proj" for expert in experts]
    for i in range(config.n_layer):
        for ours, theirs in block.items():
            names[f"blocks.{i}.{ours}"] = [f"model.layers.{i}.{name}.weight" for name in theirs]
    return names


def to_hf_tensors(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' names and shapes as views of our tensors (weights, or anything shaped like them: gradients)."""
    out = {}
    heads = [n * config.d_head for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
    for ours, theirs in hf_names(config).items():
        rows = tensors[ours]
        if rows.dim() == 3:                                                      # experts, one behind another
            rows = rows.flatten(0, 1)
        out |= dict(zip(theirs, rows.split(heads if "qkv" in ours else len(rows) // len(theirs))))
    return out


def to_hf(model: Model, folder: str | Path) -> None:
    """Write config.json and model.safetensors for transformers' Qwen3MoeForCausalLM (dense: Qwen3ForCausalLM)."""
    save_file = optional("safetensors.torch").save_file
    c = model.config
    for name, only in HF_ONLY.items():
        value = getattr(c, name)
        require(value == only, f"{name} = {value!r} cannot be exported: transformers' Qwen3-MoE has only {only!r}")
    moe = c.n_expert > 1
    config = {theirs: getattr(c, ours) for ours, theirs in HF_FIELDS.items()} | HF_UNSUPPORTED | {
        "router_aux_loss_coef": c.aux_coef / c.top_k,                            # their balance loss is K times ours
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base}, "intermediate_size": c.d_expert,
        "model_type": "qwen3_moe" if moe else "qwen3", "dtype": "float32",
        "architectures": ["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"],
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.cpu().clone() for name, t in to_hf_tensors(c, model.state_dict()).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def from_hf(folder: str | Path) -> Model:
    """Read a Qwen3-MoE (or dense Qwen3) folder: one safetensors file or a sharded index, experts singly or fused."""
    folder = Path(folder)
    config, files = hf_config(folder), hf_files(folder)
    header = hf_header(files, config)
    with torch.device("meta"):                                  # what does not fit is refused before memory is taken
        fill(Model(config), header, folder)
    model = Model(config)
    load_file = optional("safetensors.torch").load_file         # (memory-mapped)
    fill(model, {name: tensor for file in files for name, tensor in load_file(file).items()}, folder)
    return model


def fill(model: Model, tensors: dict[str, Tensor], folder: Path) -> None:
    """Copy their tensors into the model, each of which must have a place and the right shape there."""
    config, found = model.config, split_fused(tensors, model.config)
    if config.tie_embeddings:
        found.pop("lm_head.weight", None)                                        # some files store the table twice
    for name, ours in to_hf_tensors(config, model.state_dict()).items():         # views: to fill one fills the model
        require(name in found, f"tensor {name} is missing from {folder}")
        theirs = found.pop(name)
        require(theirs.shape == ours.shape, f"{name} in {folder} has shape {tuple(theirs.shape)}; its config.json "
                                            f"makes it {tuple(ours.shape)}")
        ours.copy_(theirs)
    require(not found, f"{folder} holds {len(found)} tensors without a place here, one is {min(found, default='')}")


def read_object(path: Path) -> dict:
    """The object in a JSON file, or BadInput."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    require(isinstance(found, dict), f"{path} is no JSON object")
    return found


def read_config_json(folder: Path) -> dict:
    require(is_file(folder / "config.json"), f"{folder} has no config.json: train it first, or check the path")
    return read_object(folder / "config.json")


def hf_config(folder: Path) -> ModelConfig:
    hf = read_config_json(folder)
    where = f"in {folder}/config.json"
    kind = hf.get("model_type")
    require(kind in ("qwen3_moe", "qwen3"), f"model_type {kind!r} {where}; qwen3_moe and qwen3 are read here")
    if kind == "qwen3":
        hf |= {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": hf.get("intermediate_size")}
    for name in ("rope_scaling", "rope_parameters"):                             # older transformers, and newer
        part = hf.get(name) or {}
        require(isinstance(part, dict), f"{name} = {part!r} {where} is no object")
        hf |= part
    hf.setdefault("rope_type", hf.get("type"))
    hf.setdefault("num_experts", hf.get("num_local_experts"))
    for name, only in (HF_UNSUPPORTED | {"rope_type": "default", "partial_rotary_factor": 1}).items():
        value = hf.get(name)
        require(value in (None, only), f"{name} = {value!r} {where}; only {only!r} is read here")
    known = {"renormalize": False, "tie_embeddings": False}
    known |= {ours: convert(f"{theirs} {where}", hf[theirs], MODEL_TYPES[ours]) for ours, theirs in HF_FIELDS.items()
              if hf.get(theirs) is not None}
    missing = [theirs for ours, theirs in HF_FIELDS.items() if ours not in (*known, *HF_OPTIONAL)]
    require(not missing, f"{', '.join(missing)} missing {where}")
    if "aux_coef" in known:
        known["aux_coef"] *= known["top_k"]                                      # see to_hf
    known.setdefault("d_head", known["d_model"] // (known["n_head"] or 1))
    config = ModelConfig(**known)
    config.seq_len = min(config.seq_len, config.max_seq_len)
    validate(config)
    return config


def hf_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names: files of this folder alone."""
    index = folder / "model.safetensors.index.json"
    shards = read_object(index).get("weight_map") if is_file(index) else {"": "model.safetensors"}
    require(isinstance(shards, dict) and len(shards) > 0 and all(isinstance(file, str) for file in shards.values()),
            f"{index} has no weight_map of tensors to files")
    files = sorted(set(shards.values()))
    for file in files:
        require(Path(file).name == file and is_file(folder / file), f"{folder} lacks {file[:99]!r}")
    return [folder / file for file in files]


def hf_header(files: list[Path], config: ModelConfig) -> dict[str, Tensor]:
    """Every tensor of the files without its numbers, on the meta device; BadInput where a header cannot be this
    model's, which is read off its size before it is parsed, and off the number of tensors before one is named."""
    package, tensors = optional("safetensors"), {}
    for path in files:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
        require(size < 2**20 + 512 * config.n_layer * (9 + 3 * config.n_expert), f"{path}: a header of {size} bytes is "
                f"too long for {config.n_layer} layers of {config.n_expert} experts")
        try:
            with package.safe_open(path, "pt") as file:
                pieces = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
                kinds = {piece.get_dtype() for piece in pieces.values()} - {"F64", "F32", "F16", "BF16"}
                tensors |= {name: torch.empty(piece.get_shape(), device="meta") for name, piece in pieces.items()}
        except package.SafetensorError as error:
            raise BadInput(f"{path} cannot be read: {error}") from None
        require(not kinds, f"{path} holds numbers of type {min(kinds, default='')}; weights are F32, BF16, F16 or F64")
    singly = config.n_expert if not any(name.endswith(".experts.gate_up_proj") for name in tensors) else 1
    require(config.n_layer * singly <= len(tensors),
            f"{len(tensors)} tensors are too few for {config.n_layer} layers of {config.n_expert} experts, as "
            f"{files[0].parent}/config.json says")
    return tensors


def split_fused(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Name the experts one by one where a layer's are fused: gate_up_proj (E, 2F, D) and down_proj (E, D, F)."""
    out = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".experts.")
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind)
        if parts is None:
            out[name] = tensor
            continue
        require(tensor.dim() == 3 and len(tensor) == config.n_expert,
                f"{name} has shape {tuple(tensor.shape)}; config.json says {config.n_expert} experts")
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


# --- the tokenizer ---


QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>").split()


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
        tokens = QWEN_SPECIAL if len(ranks) == 151_643 else QWEN_SPECIAL[:1]
        special = {token: i for i, token in enumerate(tokens, len(ranks))}
        return tiktoken.Encoding(Path(name).stem, pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    known = tiktoken.list_encoding_names()
    require(name in known, f"tokenizer {name!r} is neither 'bytes', a ranks file, nor one of {', '.join(known)}"
                           + closest(name, ["bytes", *known]))
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:
        raise BadInput(f"tokenizer {name!r} could not be downloaded ({type(error).__name__}): put its file into the "
                       "folder TIKTOKEN_CACHE_DIR names, or use tokenizer = 'bytes', which needs none") from None


def read_ranks(path: Path) -> dict[bytes, int]:
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        ranks = {}
    require(len(ranks) > 0 and sorted(ranks.values()) == list(range(len(ranks))),
            f"{path} is not a tiktoken ranks file: each line must be a base64 token and its rank, ranks 0, 1, 2 ...")
    return ranks


class FolderTokenizer:
    """A folder's tokenizer.json by the package tokenizers, under the names that a tiktoken.Encoding has."""

    def __init__(self, folder: Path):
        path = folder / "tokenizer.json"
        require(path.is_file(), f"{folder} has no tokenizer.json: give --tokenizer a ranks file or a tiktoken name")
        tokenizers = optional("tokenizers")
        try:
            self.inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:                                   # the package has no class of its own for it
            raise BadInput(f"{path} is no tokenizer that the package tokenizers can read: {error}") from None
        self.inner.encode_special_tokens = True                      # a text cannot smuggle one in
        self.n_vocab = self.inner.get_vocab_size()
        ends = map(self.inner.token_to_id, ("<|endoftext|>", "<|end_of_text|>", "</s>"))
        self.eot_token = next((end for end in ends if end is not None), -1)

    def encode_ordinary(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids


def reader(tokenizer) -> Callable[[int], str]:
    """A function from the next id of a text to its characters; bytes that make none yet wait for the ids to come."""
    if isinstance(tokenizer, FolderTokenizer):
        stream = optional("tokenizers").decoders.DecodeStream(skip_special_tokens=False)
        return lambda token: stream.step(tokenizer.inner, token) or ""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(token: int) -> str:
        try:
            return decoder.decode(tokenizer.decode_single_token_bytes(token))
        except KeyError:                                              # an id between ranks and special tokens
            return "\ufffd"

    return read


# --- writing text ---


def ids_of(text: str, tokenizer, model: Model) -> list[int]:
    """The ids of a text, at least one, if each has a row in the model's embedding; else BadInput."""
    ids = tokenizer.encode_ordinary(text) or [tokenizer.eot_token]
    size = model.config.vocab_size
    require(min(ids) >= 0 and max(ids) < size, f"the tokenizer makes token {max(ids)} of this text, and the model has "
                                               f"{size}: give --tokenizer the model's own, and a --prompt")
    return ids


def finite_logits(step: Callable[..., Tensor], *arguments) -> Tensor:
    """What the step gives, or BadInput: of logits that are not finite no token can be drawn."""
    logits = step(*arguments)
    require(bool(logits.isfinite().all()), "this model's logits are not finite: its training has diverged")
    return logits


def write_text(model: Model, tokenizer, prompt: str, n_token: int, step=next_logits, **sampling) -> Iterator[str]:
    """The prompt and what follows, piece by piece."""
    ids = ids_of(prompt, tokenizer, model)
    read = reader(tokenizer)
    limit = model.config.max_seq_len
    require(len(ids) + n_token <= limit,
            f"prompt and new tokens take {len(ids) + n_token} positions; the limit is {limit}")
    yield prompt
    for token in generate(model, torch.tensor([ids]), n_token, n_vocab=tokenizer.n_vocab,
                          step=partial(finite_logits, step), **sampling):
        if token == tokenizer.eot_token:
            break
        yield read(int(token))


def load_run(folder: str | Path, device: str = "cpu", tokenizer: str | None = None):
    """Model and tokenizer of a run that train.py left in out/NAME, or of a folder in Hugging Face's format."""
    model, config = load_model(folder)
    name = tokenizer or config.get("tokenizer")
    require(isinstance(name, str | None), f"tokenizer = {name!r} in {folder}/config.json is no name")
    model.to(device, torch.bfloat16 if device.startswith("cuda") else None)      # (a GPU multiplies float32 slowly)
    return model.eval(), load_tokenizer(name) if name else FolderTokenizer(Path(folder))


def load_checkpoint(path: Path, config: ModelConfig, **options) -> dict:
    """What torch.save wrote, on the CPU, or BadInput: the file's checksums are compared, which torch.load does not do,
    and the names and shapes of its weights with those of such a model, for which no memory is taken."""
    try:
        with zipfile.ZipFile(path) as file:
            wrong = file.testzip()
        require(wrong is None, f"the checksum of {wrong} is not that of its bytes")
        state = torch.load(path, "cpu", weights_only=True, **options)
        weights = {name: x.shape for name, x in state["model"].items()}
        require(config.n_layer < len(weights), f"it holds {len(weights)} tensors for {config.n_layer} layers")
    except (OSError, MemoryError):
        raise
    except Exception as error:                                        # whatever a damaged file makes torch.load raise
        why = f"{error}" if isinstance(error, BadInput) else type(error).__name__
        raise BadInput(f"{path} is damaged ({why}){spare(path)}") from None
    with torch.device("meta"):
        fits = weights == {name: x.shape for name, x in Model(config).state_dict().items()}
    require(fits, f"{path} does not fit the config.json beside it: its weights have other names or shapes{spare(path)}")
    return state


def spare(path: Path) -> str:
    """What to do about a checkpoint that is of no use."""
    if path.name == "ckpt.prev.pt":
        return f": {path.with_name('ckpt.pt')} stays as it is"
    there = is_file(path.with_suffix(".prev.pt"))
    return ": train.py " + ("--previous goes back to the checkpoint before it" if there else "--overwrite starts anew")


def load_model(folder: str | Path) -> tuple[Model, dict]:
    """The model and what its config.json says: of a run (it then names its tokenizer), or a Hugging Face checkpoint."""
    folder, config = Path(folder), read_config_json(Path(folder))
    if "model_type" in config:
        model, config = from_hf(folder), {}
    else:
        require(is_file(folder / "ckpt.pt"), f"{folder} has no ckpt.pt: train it first, or check the path")
        shape = ModelConfig(**{name: convert(f"{name} in {folder}/config.json", config[name], kind)
                               for name, kind in MODEL_TYPES.items() if name in config})
        validate(shape)
        state = load_checkpoint(folder / "ckpt.pt", shape, mmap=True)
        model = Model(shape)
        model.load_state_dict(state["model"])
    require(all(bool(x.isfinite().all()) for x in model.state_dict().values()),
            f"{folder} holds weights that are not finite: its training has diverged")
    return model, config


# --- command line ---


def main(argv: list[str]) -> None:
    parser = Parser(allow_abbrev=False, description="text from a trained run, or from a Hugging Face folder")
    parser.add_argument("folder", help="out/NAME of a trained run, or a Hugging Face folder")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--tokenizer", help="another than the run's or the folder's own: see load_tokenizer")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=50, help="choose among this many likeliest tokens")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers, below 2**63")
    parser.add_argument("--compile", action="store_true", help="compile the step first: pays from some thousand tokens")
    args = parser.parse_args(argv)
    require(not args.folder.endswith(".py"), f"{args.folder} is a config, and text needs what it trains: run python "
                                             f"train.py {args.folder} first")
    require_each(args, "tokens top_k", lambda n: 0 < n < 2**63, "be positive, below 2**63")
    require_each(args, "temperature seed", lambda n: 0 <= n < 2**63, "not be negative, and below 2**63")
    require(args.temperature == 0 or args.temperature > 1e-6, "a temperature so low is greedy: --temperature=0")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_run(args.folder, device, args.tokenizer)
    step = Decoder() if args.compile else next_logits
    for piece in write_text(model, tokenizer, args.prompt, args.tokens, temperature=args.temperature, top_k=args.top_k,
                            seed=args.seed, step=step):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    run_script(main)
