"""model.py: sizes, the model against transformers, fast forms against plain ones, causality, memory, decoding."""

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import model as m
import router
from model import BadInput, Model, ModelConfig, count, from_hf, generate, to_hf
from train import parameter_groups

SMALL = dict(n_layer=2, d_model=64, n_head=4, n_kv_head=2, d_head=16, n_expert=8, top_k=3, d_expert=32, vocab_size=97,
             seq_len=24)


def small(**changes) -> ModelConfig:
    return ModelConfig(**(SMALL | changes))


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


# --- sizes ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("d_model, n_expert", [(512, 1), (1024, 32), (1408, 8)])
def test_the_joint_laws_counting_rule_holds_up_to_norms_and_router(d_model, n_expert):
    """N_total = 2 d V + (4 + 9 E) n d^2 and N_act = 2 d V + 13 n d^2, with V = 50,257, n = d / 64, hidden width 3 d."""
    n, vocabulary = d_model // 64, 50_257
    config = ModelConfig(n_layer=n, d_model=d_model, n_head=n, n_kv_head=n, d_head=64, n_expert=n_expert, top_k=1,
                         d_expert=3 * d_model, vocab_size=vocabulary)
    sizes = count(config)
    left_out = n * (2 * d_model + 2 * 64) + d_model + n * n_expert * d_model * (n_expert > 1)      # norms, then routers
    assert sizes["total_untied"] == 2 * d_model * vocabulary + (4 + 9 * n_expert) * n * d_model**2 + left_out
    assert sizes["active_untied"] == 2 * d_model * vocabulary + 13 * n * d_model**2 + left_out


def test_every_axis_and_the_training_flops_are_counted_by_hand():
    plain = count(small())
    assert plain["active_untied"] - plain["active"] == plain["embedding"] == 97 * 64
    grouped = count(small(expert_groups=[(2, 48), (6, 16)]))          # 192 hidden units where 8 x 32 = 256 were
    assert plain["total"] - grouped["total"] == 2 * 3 * 64 * (256 - 192)
    assert plain["active"] - grouped["active"] == 2 * 3 * 64 * (256 - 192) * 3 // 8
    shared = count(small(d_shared=40, shared_gate=True))              # 3 matrices and the gate's row, two layers
    assert shared["total"] - plain["total"] == shared["active"] - plain["active"] == 2 * (3 * 64 * 40 + 64)
    dense = count(small(first_dense_layers=1, d_shared=40))           # first: no router, K experts and 40 wide
    assert dense["active"] == plain["active"] - 8 * 64 + 2 * 3 * 64 * 40
    assert plain["total"] - dense["total"] == 8 * 64 + 5 * 3 * 64 * 32 - 2 * 3 * 64 * 40
    assert plain["flops_per_token"] == 6 * plain["active"] + 6 * 2 * (4 * 16) * 24      # and causal attention


@pytest.mark.parametrize("tied", [True, False])
def test_the_allocated_model_has_the_counted_size_and_its_quarter_million_positions_cost_nothing(tied):
    model = Model(small(tie_embeddings=tied))
    total = sum(x.numel() for x in (*model.parameters(), *model.buffers()))
    assert total == count(model.config)["total" if tied else "total_untied"] and model.config.max_seq_len == 262_144


# --- against transformers -------------------------------------------------------------------------------------------

SHAPES = [
    dict(), dict(tie_embeddings=False, renormalize=False), dict(top_k=1), dict(top_k=8, tie_embeddings=False),
    dict(renormalize=False, top_k=2, n_kv_head=4, d_head=24, rope_base=1e4), dict(n_expert=1, top_k=1, d_expert=48),
    dict(n_layer=3, d_model=48, n_head=6, n_kv_head=1, d_head=8, n_expert=5, d_expert=20, tie_embeddings=False),
]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda change: "-".join(map(str, change)) or "base")
def pair(request, tmp_path_factory):
    """(ours, transformers', its folder) of the same random weights; norms and gates not as they start."""
    transformers = pytest.importorskip("transformers")
    ours = Model(small(**request.param)).init_weights(1)
    with torch.no_grad():
        for i, p in enumerate(ours.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.05)
    folder = tmp_path_factory.mktemp("hf")
    to_hf(ours, folder)
    return ours, transformers.AutoModelForCausalLM.from_pretrained(folder), folder


def test_logits_loss_and_every_gradient_match_transformers(pair):
    ours, theirs, _ = pair
    x = tokens(3, 25)
    torch.testing.assert_close(ours(x).logits, theirs(x).logits, atol=1e-5, rtol=0)
    loss, reference = ours(x[:, :-1], x[:, 1:]).ce, theirs(x, labels=x).loss
    assert abs(loss.item() - reference.item()) < 1e-6
    ours.zero_grad()
    theirs.zero_grad()
    loss.backward()
    reference.backward()
    grads = m.to_hf_tensors(ours.config, {name: p.grad for name, p in ours.named_parameters()})
    expected = m.split_fused({name: p.grad for name, p in theirs.named_parameters()}, ours.config)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        rounding = 1e-7                                               # renormalised top-1: the gate's gradient is 0
        assert (grad - expected[name]).norm() <= 1e-4 * expected[name].norm() + rounding, name


def test_balance_loss_is_transformers_divided_by_top_k(pair):
    ours, theirs, folder = pair
    if ours.config.n_expert == 1:
        pytest.skip("a dense model has no balance loss")
    x = tokens(3, 24)
    theirs = type(theirs).from_pretrained(folder)
    theirs.model.layers = theirs.model.layers[:1]                     # transformers pools the layers first: compare one
    one = Model(replace(ours.config, n_layer=1))
    one.load_state_dict({k: v for k, v in ours.state_dict().items() if "blocks.1" not in k and "blocks.2" not in k})
    aux = theirs(x, output_router_logits=True).aux_loss
    assert one(x, x).balance.item() == pytest.approx(aux.item() / ours.config.top_k, rel=1e-5)


def same_weights(a: Model, b: Model) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_export_and_import_return_the_same_config_and_weights_from_a_folder_of_either_side_sharded_or_not(
        pair, tmp_path):
    ours, theirs, folder = pair
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    for where in (folder, tmp_path / "one", tmp_path / "many"):
        again = from_hf(where)
        assert same_weights(again, ours)
        assert again.config.aux_coef == pytest.approx(0.01)           # in the file a K-th of it
        assert replace(again.config, seq_len=24, aux_coef=0.01) == ours.config


def saved(tmp_path, change=None, **config):
    """A written checkpoint whose tensors, and config.json, were changed."""
    safetensors = pytest.importorskip("safetensors.torch")
    to_hf(Model(small()).init_weights(0), tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    if change:
        change(tensors)
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(text | config))
    return tmp_path


def test_a_checkpoint_with_fused_experts_reads_like_one_with_single_ones(tmp_path):
    def fuse(tensors):
        for i in range(2):
            name = f"model.layers.{i}.mlp.experts."
            each = [[tensors.pop(f"{name}{e}.{p}_proj.weight") for p in ("gate", "up", "down")] for e in range(8)]
            tensors[name + "gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in each])
            tensors[name + "down_proj"] = torch.stack([down for _, _, down in each])

    assert same_weights(from_hf(saved(tmp_path, fuse)), Model(small()).init_weights(0))


@pytest.mark.parametrize("change, config, message", [
    (lambda t: t.pop("model.layers.1.mlp.experts.7.up_proj.weight"), {}, "7.up_proj"),
    (lambda t: t.update(extra=torch.zeros(1)), {}, "extra"),
    (lambda t: t.update({"model.norm.weight": torch.ones(63)}), {}, r"\(63,\)"),
    (None, {"model_type": "llama"}, "qwen3_moe"), (None, {"attention_bias": True}, "attention_bias"),
    (None, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "yarn"),
    (None, {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial"),
    (None, {"rope_parameters": None, "rope_theta": None}, "rope_theta missing"),
    (None, {"hidden_size": None}, "hidden_size missing"), (None, {"decoder_sparse_step": 2}, "decoder_sparse_step"),
])
def test_a_checkpoint_that_does_not_fit_is_one_clear_error(change, config, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        from_hf(saved(tmp_path, change, **config))


@pytest.mark.parametrize("changes", [dict(expert_groups=[(4, 8), (4, 16)]), dict(d_shared=8), dict(bias_rate=0.1),
                                     dict(first_dense_layers=1), dict(router="sigmoid")])
def test_what_transformers_cannot_hold_is_not_exported(changes, tmp_path):
    with pytest.raises(BadInput, match=f"{next(iter(changes))}.*cannot be exported"):
        to_hf(Model(small(**changes)), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


# --- the parts ------------------------------------------------------------------------------------------------------

def by_double_loop(x: torch.Tensor, ffn: m.MoE) -> torch.Tensor:
    """The dumbest correct expert layer, of tokens (N, D): for each token, for each of its choices, then the shared."""

    def swiglu(w_in, w_out):
        gate, up = (w_in @ row).chunk(2)
        return w_out @ (F.silu(gate) * up)

    config = ffn.config
    matrices = [pair for width in zip(ffn.w_in, ffn.w_out) for pair in zip(*width)]
    out = []
    for row in x:
        scores = (ffn.gate @ row).softmax(0)
        chosen = scores.argsort(descending=True)[:config.top_k]
        y = torch.zeros_like(row)
        for e in chosen.tolist():
            y = y + scores[e] / scores[chosen].sum() * swiglu(*matrices[e])
        if config.d_shared:
            shared = swiglu(ffn.shared.w_in, ffn.shared.w_out)
            y = y + (shared * torch.sigmoid(ffn.shared_gate @ row) if config.shared_gate else shared)
        out.append(y)
    return torch.stack(out)


ODD, TILES, ALIGNED = (dict(d_model=d, d_expert=width) for d, width in ((6, 5), (m.TILE, 2 * m.TILE), (16, 8)))
LAYERS = {  # by grouped products or one by one; tokens; the layer
    "odd": (False, 7, dict(n_expert=5, top_k=3, **ODD)),
    "odd, one token": (False, 1, dict(n_expert=2, top_k=1, **ODD)),
    "odd, every expert": (False, 33, dict(n_expert=4, top_k=4, **ODD)),
    "odd, most without a token": (False, 6, dict(n_expert=16, top_k=2, **ODD)),
    "whole tiles": (False, 64, dict(n_expert=4, top_k=4, **TILES)),
    "tiles and a rest": (False, 50, dict(n_expert=5, top_k=3, **TILES)),
    "tiles, top-1": (False, 33, dict(n_expert=2, top_k=1, **TILES)),
    "tiles, few rows": (False, 4, dict(n_expert=16, top_k=2, **TILES)),
    "large products": (False, 352, dict(n_expert=2, top_k=2, d_model=256, d_expert=192)),
    "at once": (True, 32, dict(n_expert=4, top_k=4, **ALIGNED)),
    "at once, unevenly": (True, 50, dict(n_expert=5, top_k=3, **ALIGNED)),
    "at once, most without a token": (True, 4, dict(n_expert=16, top_k=2, **ALIGNED)),
    "two widths": (False, 30, dict(expert_groups=[(2, 48), (6, 16)])),
    "three widths": (True, 30, dict(expert_groups=[(1, 8), (5, 24), (2, 40)], top_k=4)),
    "a width that no token visits": (False, 1, dict(expert_groups=[(3, 16), (5, 8)], top_k=1)),
    "shared": (True, 30, dict(d_shared=40)),
    "shared and gated": (False, 30, dict(d_shared=40, shared_gate=True)),
    "everything": (False, 30, dict(expert_groups=[(4, 16), (4, 8)], d_shared=24, shared_gate=True)),
}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_expert_layer_is_the_double_loop_forward_and_in_every_gradient(name, recompute, monkeypatch):
    at_once, n, changes = LAYERS[name]
    monkeypatch.setattr(m, "has_grouped_mm", lambda *_: at_once)
    torch.manual_seed(0)
    ours = Model(small(**changes, n_layer=1, recompute=recompute)).init_weights(2).blocks[0].ffn
    ours.gate.data *= 4
    theirs = copy.deepcopy(ours).double()
    x = torch.randn(n, ours.config.d_model, requires_grad=True)
    y, expected = ours(x[None], tokens(1, n))[0][0], by_double_loop(x.double(), theirs)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-4)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, *ours.parameters()], dy)
    reference = torch.autograd.grad(expected, [x, *theirs.parameters()], dy.double(), materialize_grads=True)
    for grad, other in zip(grads, reference):
        torch.testing.assert_close(grad.double(), other.double(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("n", "size", "out"), [(1, 32, 48), (16, 32, 48), (37, 32, 48), (256, 256, 384),
                                                (250, 256, 384)])
def test_linear_is_torchs_and_so_are_its_first_and_second_derivatives_in_whole_tiles_or_not(n, size, out):
    torch.manual_seed(0)
    x, w = torch.randn(2, n, size, requires_grad=True), torch.randn(out, size, requires_grad=True)
    assert m.has_onednn(x.flatten(0, 1), w) == (m.AVX512 and 2 * n % m.TILE == 0)

    def derivatives(linear):
        y = linear(x, w)
        first = torch.autograd.grad(y.square().sum(), (x, w), create_graph=True)
        return [y, *first, *torch.autograd.grad(first[0].square().sum(), (x, w))]

    for ours, theirs in zip(derivatives(m.fast_linear), derivatives(m.linear)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * theirs.abs().max().item())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(m.fast_linear(x, w), m.linear(x, w))


def test_under_autocast_a_norm_is_float32_with_its_weight_unrounded():
    x, weight = torch.randn(5, 64).bfloat16(), 1 + torch.rand(64) / 512
    with torch.autocast("cpu", torch.bfloat16):
        found = {name: getattr(m, name).rms_norm(x, weight, 1e-6) for name in ("FAST", "COMPILED", "DECODE")}
    for name, y in found.items():
        torch.testing.assert_close(y, F.rms_norm(x.float(), (64,), weight, 1e-6), msg=name)
    in_bfloat16 = m.FAST.rms_norm(x, weight.bfloat16(), 1e-6)              # a model whose weights are bfloat16
    assert in_bfloat16.dtype == torch.bfloat16


def test_combine_weights_reach_swiglu_unrounded(monkeypatch):
    seen, swiglu = [], m.swiglu
    monkeypatch.setattr(m, "swiglu", lambda h, weight: seen.append(weight.dtype) or swiglu(h, weight))
    with torch.autocast("cpu", torch.bfloat16):
        Model(small()).init_weights(0)(torch.ones(1, 8, dtype=torch.int64))
    assert seen and set(seen) == {torch.float32}


@pytest.mark.parametrize(("major", "n_expert", "dtype", "served"), [
    (8, 16, "bfloat16", False), (9, 16, "bfloat16", True), (9, 1023, "bfloat16", True), (9, 1024, "bfloat16", False),
    (10, 16, "bfloat16", False), (12, 16, "bfloat16", False), (9, 16, "float32", False)])
def test_grouped_products_serve_bfloat16_on_hopper_under_1024_experts(major, n_expert, dtype, served, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    x = SimpleNamespace(is_cuda=True, device="cuda", dtype=getattr(torch, dtype))
    assert m.has_grouped_mm(x, torch.empty(n_expert, 64, 32, device="meta"), 100) == served


def test_a_gpu_with_room_takes_larger_pieces_of_the_logits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    for free, mib in ((1, 256), (3.9, 256), (4.1, 512), (15, 1024), (70, 2048)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (int(free * 2**30), 0))
        assert m.logit_bytes(torch.device("cuda")) == mib * 2**20
    assert m.logit_bytes(torch.device("cpu")) == 256 * 2**20


@pytest.mark.slow
def test_a_kept_decoder_keeps_its_buffers_and_nine_batches_compile_in_one_process():
    model, step = Model(small(n_layer=1)).init_weights(0).eval(), m.Decoder()
    buffers = []
    for batch in (*range(1, 10), 9):
        prompts = torch.randint(0, 97, (batch, 5), generator=torch.Generator().manual_seed(batch))
        assert torch.equal(greedy(model, prompts, 6, step), greedy(model, prompts, 6))
        buffers.append(step.cache)
    assert buffers[-1] is buffers[-2] is not buffers[-3]
    texts = [generate(model, prompts[:, :n], 6, step=step) for n in (3, 4)]
    with pytest.raises(AssertionError, match="one text after the other"):
        list(zip(*texts))


@pytest.mark.filterwarnings("ignore:The .grad attribute")                 # torch.compile, where a graph ends
def test_a_compiled_step_leaves_the_routing_kernels_as_they_are(monkeypatch):
    """They are fused by hand: traced through, the definition would be compiled in their place."""
    calls = []

    @torch.compiler.disable
    def by_kernels(logits, config, context):
        calls.append(torch.compiler.is_compiling())
        return router.route(logits, config, context)

    monkeypatch.setattr(router, "use_kernels", lambda x: True)
    monkeypatch.setattr(router, "route_by_kernels", by_kernels)
    model = Model(small()).init_weights(0)
    with m.using(m.COMPILED._replace(experts=m.PLAIN.experts)):
        torch.compile(model, dynamic=False, backend="eager")(torch.ones(2, 8, dtype=torch.int64))
    assert calls == [False] * 2


def test_rms_norm_and_its_gradients_are_torchs_whatever_the_strides():
    torch.manual_seed(0)
    norm = m.RMSNorm(8, 1e-3)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 6, 5, 8)[:, :, 1:4].requires_grad_()           # as heads lie side by side
    dy = torch.randn(2, 3, 6, 8).transpose(1, 2)
    ours, expected = norm(x), F.rms_norm(x, (8,), norm.weight, norm.eps)
    assert ours.grad_fn.name() == "NormalizeBackward"
    torch.testing.assert_close(ours, expected)
    with torch.autocast("cpu", torch.bfloat16):                       # which must not reach it
        gradients = [torch.autograd.grad(y, (x, norm.weight), dy) for y in (ours, expected)]
    for mine, theirs in zip(*gradients):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_rope_turns_the_first_pair_by_the_position_and_keeps_lengths():
    rope = m.rope_tables(5, 1, small(d_head=4, rope_base=100.0), "cpu")
    x = torch.tensor([1.0, 2.0, 0.0, 0.0]).view(1, 1, 1, 4)           # pairs (x0, x2) and (x1, x3)
    expected = [math.cos(5), 2 * math.cos(0.5), math.sin(5), 2 * math.sin(0.5)]      # frequencies 1 and 100^(-1/2)
    torch.testing.assert_close(m.rotate(x, rope).flatten(), torch.tensor(expected))


@pytest.mark.parametrize("frozen", [None, 0, 1], ids=["all learns", "frozen body", "frozen head"])
@pytest.mark.parametrize("budget", [1, 4 * 97 * 5, 2**30])
def test_chunked_cross_entropy_is_the_plain_one_in_loss_and_gradients(budget, frozen, monkeypatch):
    monkeypatch.setattr(m, "LOGIT_BYTES", budget)
    torch.manual_seed(0)
    inputs, y = [torch.randn(33, 16), torch.randn(97, 16)], torch.randint(0, 97, (33,))
    learn = [x.requires_grad_() for i, x in enumerate(inputs) if i != frozen]
    loss, plain = m.fast_loss(*inputs, y), m.loss(*inputs, y)
    torch.testing.assert_close(loss, plain)
    grads = [torch.autograd.grad(3 * value, learn) for value in (loss, plain)]
    torch.testing.assert_close(*grads)
    with torch.inference_mode():
        torch.testing.assert_close(m.fast_loss(*inputs, y), plain)


def test_weights_start_at_the_tables_standard_deviations_and_are_a_function_of_the_seed():
    config = ModelConfig(n_layer=2, d_model=256, init_scale=0.5)
    model = Model(config).init_weights(0)
    cut = 0.8796                                                      # std of a unit normal cut at two
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), name
            continue
        std = cut * math.sqrt(0.5 / p.shape[-1])
        std /= 2 if "attn.out" in name or "w_out" in name else 1      # sqrt(2 * 2 layers)
        assert p.std().item() == pytest.approx(std, rel=0.03), name
        assert p.abs().max() <= 2 * std / cut + 1e-6, name
    assert same_weights(model, Model(config).init_weights(0))
    assert not torch.equal(model.embed.weight, Model(config).init_weights(1).embed.weight)


def test_norms_and_embeddings_are_not_decayed_and_the_groups_add_up():
    model = Model(small(tie_embeddings=False))
    decay, plain = (group["params"] for group in parameter_groups(model, 0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in plain} == {n for n in names.values() if "norm" in n or n == "embed.weight"}
    assert len(decay) + len(plain) == len(names)


@pytest.mark.parametrize("loss", ["balance", "z"])
def test_each_router_loss_reaches_the_gate_of_every_layer(loss):
    model, x = Model(small()).init_weights(0), tokens(2, 24)
    getattr(model(x, x), loss).backward()
    assert all(block.ffn.gate.grad.abs().sum() > 0 for block in model.blocks)


def test_each_layer_routes_once_even_if_recomputed_and_in_float32_under_bfloat16_autocast():
    model, x, seen = Model(small(recompute=True)).init_weights(0), tokens(2, 24), []
    spy = m.FAST._replace(route=lambda logits, *rest: seen.append(logits.dtype) or m.fast_route(logits, *rest))
    with m.using(spy), torch.autocast("cpu", dtype=torch.bfloat16):
        model(x, x).ce.backward()
        assert seen == [torch.float32] * 2
        assert len(list(generate(model.eval(), x[:1, :4], 3, temperature=0))) == 3      # writes text too


# --- the table of operators -----------------------------------------------------------------------------------------

FORMS = {
    "as it is": {}, "untied": dict(tie_embeddings=False), "not renormalised": dict(renormalize=False),
    "top-1": dict(top_k=1), "no norm of q and k": dict(qk_norm=False), "dense": dict(n_expert=1, top_k=1),
    "shared": dict(d_shared=16, shared_gate=True), "widths": dict(expert_groups=[(3, 16), (5, 32)]),
    "dense first": dict(first_dense_layers=1), "capacity": dict(capacity_factor=0.7, eval_capacity_factor=0.7),
    "bias": dict(bias_rate=0.1), "noise": dict(router_noise=0.5), "by sequence": dict(balance_scope="sequence"),
    "global": dict(balance_scope="global"), "switch": dict(router="switch", top_k=1),
    **{name: dict(router=name) for name in ("sigmoid", "top_p", "expert_choice", "hash", "random")},
}


def run_model(ops: m.Ops, config: ModelConfig, backward_ops: m.Ops | None = None) -> list[torch.Tensor]:
    """Logits, losses and every gradient by this table, each routing checked against its contract on the way.
    With backward_ops the backward pass runs elsewhere: under that table, and in bfloat16."""

    def checked(logits, config, context):
        routing = ops.route(logits, config, context)
        router.check(routing, *logits.shape)
        if (config.router, config.balance_scope) == ("softmax", "micro_batch"):          # E sum f P, written out
            share = routing.experts.flatten().bincount(minlength=logits.shape[1]) / routing.experts.numel()
            balance = logits.shape[1] * (share * logits.softmax(-1).mean(0)).sum()
            torch.testing.assert_close(routing.losses["balance"], balance)
        return routing

    table = ops._replace(route=checked)
    torch.manual_seed(0)
    model, x = Model(config).init_weights(1), tokens(2, 25)
    for block in model.blocks:
        if block.moe:
            block.ffn.gate.data *= 4                                  # a router that has favourites
    with m.using(table):
        logits = model(x[:, :-1]).logits
        o = model(x[:, :-1], x[:, 1:])
    with m.using(backward_ops or table), torch.autocast("cpu", torch.bfloat16, enabled=backward_ops is not None):
        (o.ce + 0.1 * o.balance + 0.1 * o.z).backward()
    return [logits, o.ce, o.balance, o.z, *(p.grad for p in model.parameters() if p.grad is not None)]


def agree(ops: m.Ops, plain: m.Ops, config: ModelConfig) -> None:
    for ours, theirs in zip(run_model(ops, config), run_model(plain, replace(config, recompute=False)), strict=True):
        assert (ours - theirs).norm() <= 2e-4 * theirs.norm() + 1e-6


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", FORMS)
def test_each_fast_entry_alone_and_all_together_are_the_plain_ones_in_logits_and_every_gradient(
        name, recompute, monkeypatch):
    config = small(**FORMS[name], recompute=recompute)
    for entry in m.Ops._fields:
        agree(m.PLAIN._replace(**{entry: getattr(m.FAST, entry)}), m.PLAIN, config)
    for at_once in (False, True):                                     # expert by expert, and by grouped products
        monkeypatch.setattr(m, "has_grouped_mm", lambda *_, at_once=at_once: at_once)
        agree(m.FAST, m.PLAIN, config)
    agree(m.COMPILED, m.PLAIN, config)


def test_a_backward_elsewhere_uses_the_table_and_the_precision_of_its_forward(monkeypatch):
    monkeypatch.setattr(m, "has_grouped_mm", lambda *_: False)        # autocast does not know grouped products
    config = small(d_model=32, d_expert=80, n_expert=4, top_k=2, recompute=True)
    here, elsewhere = run_model(m.FAST, config), run_model(m.FAST, config, m.PLAIN)
    for grad, expected in zip(elsewhere, here, strict=True):
        assert (grad - expected).norm() <= 0.05 * expected.norm()
    for grad, expected in zip(elsewhere[-3:], here[-3:]):             # of the last experts and the last norm
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("entry", m.Ops._fields)
def test_a_fast_entry_that_is_a_hundredth_off_is_noticed(entry):
    def wrong(*args):
        found = getattr(m.FAST, entry)(*args)
        return replace(found, weights=1.01 * found.weights) if entry == "route" else 1.01 * found

    with pytest.raises(AssertionError):
        agree(m.FAST._replace(**{entry: wrong}), m.PLAIN, small())


def place_in_reverse(experts, n_expert, place=router.place):
    counts, offsets, token, slot = place(experts.flip(0), n_expert)
    return counts, offsets, len(experts) - 1 - token, slot.flip(0)


@pytest.mark.parametrize(("name", "wrong", "message"), [
    ("place", place_in_reverse, "ties in token order"),
    ("balance_loss", lambda *args, balance_loss=router.balance_loss: 3 * balance_loss(*args), "not close")])
def test_a_fault_that_both_tables_share_is_noticed(name, wrong, message, monkeypatch):
    agree(m.FAST, m.PLAIN, small())
    monkeypatch.setattr(router, name, wrong)
    with pytest.raises(AssertionError, match=message):
        agree(m.FAST, m.PLAIN, small())


# --- the selection bias ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("skipped", [0.0, 1.0])
def test_the_selection_bias_moves_by_the_load_of_all_micro_batches_of_a_step_that_was_not_skipped(skipped):
    model = Model(small(router="sigmoid", bias_rate=0.01)).init_weights(0).train()
    ffn = model.blocks[0].ffn
    counts = sum(ffn(torch.randn(1, 24, 64), tokens(1, 24))[1].counts for _ in range(3))
    model.eval()(tokens(1, 24))                                       # outside training nothing is counted
    assert torch.equal(ffn.load, counts.long()) and (ffn.bias == 0).all()
    model.end_step(torch.tensor(skipped))
    step = 0.01 * torch.sign(counts.float().mean() - counts)
    torch.testing.assert_close(ffn.bias, (step - step.mean()) * (1 - skipped))
    assert (ffn.load == 0).all() and "blocks.0.ffn.bias" in model.state_dict()


# --- memory ---------------------------------------------------------------------------------------------------------

KEPT = {"as it is": {}, "top-1": dict(top_k=1), "shared": dict(d_shared=64, shared_gate=True),
        "widths": dict(expert_groups=[(3, 16), (5, 48)]), "dense": dict(n_expert=1, top_k=1, d_expert=96),
        "recomputed": dict(recompute=True), "expert choice": dict(router="expert_choice"),
        "no norm of q and k": dict(qk_norm=False), "many experts": dict(n_expert=64, d_expert=8)}


def bytes_saved(config: ModelConfig) -> int:
    """What autograd keeps of a forward pass of 4 sequences for backward, parameters aside."""
    model, kept = Model(config).init_weights(0), {}
    own = {p.data_ptr() for p in model.parameters()}

    def pack(x):
        if x.data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x                  # alive: no other gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(tokens(4, 64), tokens(4, 64, 1))
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("name", KEPT)
def test_the_activations_that_memory_counts_are_those_that_autograd_saves(name):
    """In float32, a layer, within 15%: of six layers less those of two, so that what is kept once falls out."""
    two, six = (small(**KEPT[name] | dict(n_layer=layers, seq_len=64)) for layers in (2, 6))
    counted = m.memory(six, 4)["activations"] - m.memory(two, 4)["activations"]
    assert bytes_saved(six) - bytes_saved(two) == pytest.approx(counted, rel=0.15)


# --- causality ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_output_has_no_gradient_from_a_later_token_or_another_row_and_does_not_change_with_them(training):
    model, x = Model(small(tie_embeddings=False)).init_weights(0).train(training), tokens(2, 12)
    changed = (x + 1) % 97
    changed[0, :6] = x[0, :6]
    a, b = model(x).logits, model(changed).logits
    torch.testing.assert_close(a[0, :6], b[0, :6], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(a[0, 6:], b[0, 6:])
    embedded = model.embed(x).detach().requires_grad_()
    model.embed = torch.nn.Identity()
    model(embedded).logits[0, 5].sum().backward()
    per_token = embedded.grad.abs().sum(-1)
    assert (per_token[0, :6] > 0).all() and (per_token[0, 6:] == 0).all() and (per_token[1] == 0).all()


# --- decoding -------------------------------------------------------------------------------------------------------

def greedy(model: Model, prompts: torch.Tensor, n_token: int, step=m.next_logits) -> torch.Tensor:
    """The likeliest tokens (B, n_token) behind the prompts (B, T), by the cache."""
    return torch.stack(list(generate(model, prompts, n_token, temperature=0, step=step)), 1)


@pytest.mark.parametrize("change", [dict(), dict(n_expert=1, top_k=1), dict(tie_embeddings=False, top_k=8)])
def test_greedy_decoding_of_a_batch_with_the_cache_gives_each_row_the_tokens_of_full_recomputation_alone(change):
    model, prompts = Model(small(**change)).init_weights(3).eval(), tokens(3, 4)
    written = torch.cat([prompts, greedy(model, prompts, 24)], 1)
    for row in written:
        with torch.no_grad():
            likeliest = [model(row[None, :i]).logits[0, -1].argmax() for i in range(4, 28)]
        assert row[4:].tolist() == likeliest


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_a_compiled_step_writes_the_same_tokens_whatever_the_axes(batch):
    model = Model(small(expert_groups=[(3, 16), (5, 8)], d_shared=16)).init_weights(3).eval()
    prompts = tokens(batch, 5)
    assert torch.equal(greedy(model, prompts, 20, m.Decoder()), greedy(model, prompts, 20))


def test_a_cache_can_be_filled_in_pieces():
    model, x = Model(small()).init_weights(0).eval(), tokens(2, 12)
    cache = m.Cache(model.config, 2, 12, "cpu", torch.float32)
    with torch.no_grad():
        pieces = [model(part, cache=cache).logits for part in (x[:, :5], x[:, 5:9], x[:, 9:10], x[:, 10:])]
        torch.testing.assert_close(torch.cat(pieces, 1), model(x).logits, atol=1e-5, rtol=1e-4)


def test_sampling_is_a_function_of_the_seed_and_never_draws_padding():
    model, prompt = Model(small()).init_weights(0).eval(), tokens(1, 1)

    def sampled(seed):
        return torch.cat(list(generate(model, prompt, 30, temperature=5.0, top_k=97, seed=seed, n_vocab=50))).tolist()

    assert sampled(1) == sampled(1) != sampled(2)
    assert max(sampled(1)) < 50


def test_text_is_written_in_whole_characters():
    text = iter("né\N{SNOWMAN}".encode())

    def spell(model, tokens, cache):
        return F.one_hot(torch.tensor([next(text)]), 264).float()

    model, tokenizer = Model(small(vocab_size=264)), m.load_tokenizer("bytes")
    pieces = list(m.write_text(model, tokenizer, "a", 6, temperature=0, step=spell))
    assert pieces[0] == "a" and "".join(pieces[1:]) == "né\N{SNOWMAN}" and "\ufffd" not in "".join(pieces)


def test_positions_beyond_max_seq_len_and_tokens_beyond_the_vocabulary_are_refused():
    model, tokenizer = Model(small(max_seq_len=30)).init_weights(0), m.load_tokenizer("bytes")
    with pytest.raises(AssertionError, match="30"):
        list(generate(model, tokens(1, 20), 11))
    with pytest.raises(BadInput, match="limit is 30"):
        list(m.write_text(model, tokenizer, "A" * 20, 11))
    with pytest.raises(BadInput, match="token 122"):
        list(m.write_text(model, tokenizer, "xyz", 3))


# --- folders and names on the command line --------------------------------------------------------------------------

def save_tokenizer(folder, text: str, pattern: str | None) -> object:
    """A byte-level BPE trained on the text, as transformers' folders hold it: GPT-2's split, or one written out."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, tokenizer.pre_tokenizer])
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


TEXT = "def route(logits, config):\n    return 'naïve' + \"☃ 雪\"   # 12345 tokens, it's theirs\n\n\tthe the THE\n" * 5


@pytest.mark.parametrize("pattern", [None, m.QWEN_PATTERN], ids=["GPT-2's split", "Qwen's split"])
def test_a_folders_tokenizer_json_gives_its_librarys_ids_and_reads_them_back(pattern, tmp_path):
    theirs = save_tokenizer(tmp_path / "hf", TEXT, pattern)
    ours = m.FolderTokenizer(tmp_path / "hf")
    for text in (TEXT, "unseen Ωmega\r\n  x=1;", " leading", "a"):
        ids, read = ours.encode_ordinary(text), m.reader(ours)
        assert ids == theirs.encode(text).ids and "".join(map(read, ids)) == text
    assert ours.eot_token == theirs.token_to_id("<|endoftext|>") and ours.n_vocab == theirs.get_vocab_size()
    assert ours.eot_token not in ours.encode_ordinary("<|endoftext|>"), "a text cannot smuggle a special token in"


def test_a_folder_that_transformers_wrote_in_shards_continues_a_prompt_with_its_own_greedy_tokens(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    tokenizer = save_tokenizer(tmp_path, TEXT, m.QWEN_PATTERN)
    config = transformers.Qwen3MoeConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32,
        norm_topk_prob=True)
    torch.manual_seed(0)
    theirs = transformers.Qwen3MoeForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    prompt = "return the"
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    m.main([str(tmp_path), "--prompt", prompt, "--tokens", "12", "--temperature", "0"])
    made = theirs.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)[0]
    read = m.reader(m.FolderTokenizer(tmp_path))
    assert capsys.readouterr().out == prompt + "".join(map(read, made[ids.shape[1]:].tolist())) + "\n"


def test_a_name_that_is_no_folder_and_no_tokenizer_is_one_clear_line(tmp_path):
    with pytest.raises(BadInput, match="is a config, and text needs what it trains"):
        m.main(["configs/large_moe_1p3b.py", "--prompt", "def "])
    with pytest.raises(BadInput, match="is neither 'bytes', a ranks file"):
        m.load_tokenizer("x" * 300)                                   # too long for a file's name
    with pytest.raises(BadInput, match="has no tokenizer"):
        m.FolderTokenizer(tmp_path)
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="is no tokenizer"):
        m.FolderTokenizer(tmp_path)
