"""model.py: sizes, the model against transformers, the expert layer against a double loop, causality, decoding."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import model as m
import router
from model import (
    BadInput,
    LinearCrossEntropy,
    Model,
    ModelConfig,
    count,
    from_hf,
    generate,
    to_hf,
    to_hf_tensors,
)
from train import parameter_groups

SMALL = dict(n_layer=2, d_model=64, n_head=4, n_kv_head=2, d_head=16, n_expert=8, top_k=3, d_expert=32, vocab_size=97,
             seq_len=24)


def small(**changes) -> ModelConfig:
    return ModelConfig(**(SMALL | changes))


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


# --- sizes ----------------------------------------------------------------------------------------------------------

# name: (n_layer, d_model, n_head, n_kv_head, d_head, n_expert, top_k, d_expert), then the printed millions:
# total tied, active tied, total untied
SEARCH = {
    "large-moe-1b": ((16, 1024, 16, 4, 64, 8, 2, 2048), (1003, 399, 1159)),
    "large-moe-1.3b": ((8, 2048, 32, 8, 128, 16, 8, 768), (1083, 781, 1394)),
    "large-moe-1.3b-top2": ((8, 2048, 32, 8, 128, 16, 2, 768), (1083, 555, 1394)),
    "large-deep-1.5b": ((16, 1536, 24, 6, 64, 12, 4, 1536), (1687, 781, 1920)),
    "large-wide-1.5b": ((10, 2048, 32, 8, 64, 8, 2, 2048), (1423, 668, 1734)),
}


@pytest.mark.parametrize("name", SEARCH)
def test_the_five_searched_architectures_come_out_at_their_printed_sizes(name):
    shape, printed = SEARCH[name]
    fields = "n_layer d_model n_head n_kv_head d_head n_expert top_k d_expert".split()
    sizes = count(ModelConfig(**dict(zip(fields, shape)), vocab_size=151_936))
    assert tuple(round(sizes[k] / 1e6) for k in ("total", "active", "total_untied")) == printed
    assert sizes["active_untied"] - sizes["active"] == sizes["embedding"] == 151_936 * shape[1]


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


def test_counting_agrees_with_the_allocated_model():
    for config in (small(), small(tie_embeddings=False), small(n_expert=1, top_k=1)):
        total = sum(p.numel() for p in Model(config).parameters())
        assert total == count(config)["total" if config.tie_embeddings else "total_untied"]


def test_training_flops_are_six_a_parameter_and_causal_attention():
    config = small()
    sizes = count(config)
    assert sizes["flops_per_token"] == 6 * sizes["active"] + 6 * 2 * (4 * 16) * 24


def test_a_config_has_no_text_to_write():
    with pytest.raises(BadInput, match="is a config, and text needs what it trains"):
        m.main(["configs/large_moe_1p3b.py", "--prompt", "def "])


# --- against transformers -------------------------------------------------------------------------------------------

SHAPES = [
    dict(),
    dict(tie_embeddings=False, renormalize=False),
    dict(top_k=1),
    dict(top_k=8, tie_embeddings=False),
    dict(renormalize=False, top_k=2, n_kv_head=4, d_head=24, rope_base=1e4),
    dict(n_layer=3, d_model=48, n_head=6, n_kv_head=1, d_head=8, n_expert=5, d_expert=20, tie_embeddings=False),
    dict(n_expert=1, top_k=1, d_expert=48),
]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda change: "-".join(map(str, change)) or "base")
def pair(request, tmp_path_factory):
    """(ours, transformers') with the same random weights; norms and gates away from their starting values."""
    transformers = pytest.importorskip("transformers")
    ours = Model(small(**request.param)).init_weights(1)
    with torch.no_grad():
        for i, p in enumerate(ours.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.05)
    folder = tmp_path_factory.mktemp("hf")
    to_hf(ours, folder)
    return ours, transformers.AutoModelForCausalLM.from_pretrained(folder), folder


def test_logits_match_transformers(pair):
    ours, theirs, _ = pair
    x = tokens(3, 24)
    torch.testing.assert_close(ours(x).logits, theirs(x).logits, atol=1e-5, rtol=0)


def test_loss_and_every_gradient_match_transformers(pair):
    ours, theirs, _ = pair
    x = tokens(3, 25)
    ours.zero_grad(), theirs.zero_grad()
    loss, reference = ours(x[:, :-1], x[:, 1:]).ce, theirs(x, labels=x).loss
    assert abs(loss.item() - reference.item()) < 1e-6
    loss.backward(), reference.backward()
    grads = to_hf_tensors(ours.config, {name: p.grad for name, p in ours.named_parameters()})
    expected = m.split_fused({name: p.grad for name, p in theirs.named_parameters()})
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        rounding = 1e-7                                              # renormalised top-1: the gate's gradient is 0
        assert (grad - expected[name]).norm() <= 1e-4 * expected[name].norm() + rounding, name


def test_balance_loss_is_transformers_divided_by_top_k(pair):
    ours, theirs, _ = pair
    if ours.config.n_expert == 1:
        pytest.skip("a dense model has no balance loss")
    x = tokens(3, 24)
    one = Model(small(**{**vars(ours.config), "n_layer": 1}))       # transformers pools the layers first: compare one
    one.load_state_dict({k: v for k, v in ours.state_dict().items() if "blocks.1" not in k and "blocks.2" not in k})
    theirs.model.layers = theirs.model.layers[:1]
    aux = theirs(x, output_router_logits=True).aux_loss
    assert one(x, x).balance.item() == pytest.approx(aux.item() / ours.config.top_k, rel=1e-5)


def test_export_and_import_return_the_same_weights(pair):
    ours, _, folder = pair
    again = from_hf(folder)
    assert vars(again.config) | {"seq_len": 24, "aux_coef": 0.01} == vars(ours.config)
    assert again.config.aux_coef == pytest.approx(0.01)              # in the file a K-th of it
    for (name, a), b in zip(ours.named_parameters(), again.parameters()):
        assert torch.equal(a, b), name


def test_a_folder_that_transformers_wrote_reads_back_sharded_or_not(pair, tmp_path):
    ours, _, folder = pair
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    for name in ("one", "many"):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), from_hf(tmp_path / name).parameters()))


def saved(tmp_path, change=lambda tensors: None, **config):
    """A written checkpoint whose tensors, and config.json, were changed."""
    safetensors = pytest.importorskip("safetensors.torch")
    to_hf(Model(small()).init_weights(0), tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
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

    expected = Model(small()).init_weights(0)
    read = from_hf(saved(tmp_path, fuse))
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), read.parameters()))


WRONG = {
    "a tensor that is missing": (lambda t: t.pop("model.layers.1.mlp.experts.7.up_proj.weight"), {}, "7.up_proj"),
    "a tensor too many": (lambda t: t.update(extra=torch.zeros(1)), {}, "extra"),
    "a wrong shape": (lambda t: t.update({"model.norm.weight": torch.ones(63)}), {}, r"\(63,\)"),
    "another architecture": (lambda t: None, {"model_type": "llama"}, "qwen3_moe"),
    "biases in attention": (lambda t: None, {"attention_bias": True}, "attention_bias"),
    "stretched positions": (lambda t: None, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "yarn"),
    "positions turned in part": (lambda t: None, {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
                                 "partial"),
    "no rotary base": (lambda t: None, {"rope_parameters": None, "rope_theta": None}, "rope_theta missing"),
    "no width": (lambda t: None, {"hidden_size": None}, "hidden_size missing"),
    "dense layers between": (lambda t: None, {"decoder_sparse_step": 2}, "decoder_sparse_step"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_checkpoint_that_does_not_fit_is_one_clear_error(case, tmp_path):
    change, config, message = WRONG[case]
    with pytest.raises(BadInput, match=message):
        from_hf(saved(tmp_path, change, **config))


# --- the parts ------------------------------------------------------------------------------------------------------


def experts_by_double_loop(x, weights, w_in, w_out, experts):
    """The dumbest correct expert layer: for each token, for each of its choices."""
    out = []
    for n in range(len(x)):
        y = torch.zeros_like(x[n])
        for k, e in enumerate(experts[n].tolist()):
            gate, up = (w_in[e] @ x[n]).chunk(2)
            y = y + weights[n, k] * (w_out[e] @ (F.silu(gate) * up))
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("n, k, e", [(7, 3, 5), (1, 1, 2), (33, 4, 4), (6, 2, 16)])
def test_the_expert_layer_is_the_double_loop_forward_and_in_every_gradient(n, k, e, keep):
    compare_with_double_loop(n, k, e, 6, 5, torch.float64, keep)


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("n, k, e", [(64, 4, 4), (50, 3, 5), (33, 1, 2), (4, 2, 16)])
def test_the_expert_layer_in_whole_tiles_is_the_double_loop_too(n, k, e, keep, monkeypatch):
    monkeypatch.setattr(m, "has_grouped_mm", lambda *_: False)                           # which few rows would go to
    compare_with_double_loop(n, k, e, m.TILE, 2 * m.TILE, torch.float32, keep)           # oneDNN's with AVX-512


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("n, k, e", [(32, 4, 4), (50, 3, 5), (4, 2, 16)])
def test_the_expert_layer_at_once_is_the_double_loop_too(n, k, e, keep, monkeypatch):
    monkeypatch.setattr(m, "has_grouped_mm", lambda *_: True)
    compare_with_double_loop(n, k, e, 16, 8, torch.float32, keep)


def compare_with_double_loop(n, k, e, d_model, width, dtype, keep):
    from router import place
    torch.manual_seed(0)
    inputs = [torch.randn(n, d_model, dtype=dtype), torch.rand(n, k), torch.randn(e, 2 * width, d_model, dtype=dtype),
              torch.randn(e, d_model, width, dtype=dtype)]
    chosen = torch.stack([torch.randperm(e)[:k] for _ in range(n)])
    _, offsets, token, slot = place(chosen, e)
    a, b = ([t.to(t.dtype if i == 1 else kind, copy=True).requires_grad_() for i, t in enumerate(inputs)]
            for kind in (dtype, torch.float64))
    y = m.Experts.apply(*a[:2], token, slot, offsets, not keep, *a[2:])
    expected = experts_by_double_loop(*b, chosen)
    dy = torch.randn_like(y)
    y.backward(dy), expected.backward(dy.double())
    tolerance = dict(rtol=1e-4, atol=2e-4) if dtype == torch.float32 else {}
    torch.testing.assert_close(y, expected.to(dtype), **tolerance)
    for ours, theirs in zip(a, b):
        torch.testing.assert_close(ours.grad, theirs.grad.to(ours.dtype), **tolerance)


@pytest.mark.parametrize("n", [1, 16, 37, 48])
def test_linear_is_torchs_and_so_are_its_gradients_in_whole_tiles_or_not(n):
    torch.manual_seed(0)
    x, w, dy = torch.randn(2, n, 32), torch.randn(48, 32), torch.randn(2, n, 48)
    assert m.has_onednn(x[0], w) == (m.AVX512 and n % 16 == 0)
    a, b = ([x.clone().requires_grad_(), w.clone().requires_grad_()] for _ in range(2))
    ours, theirs = m.fast_linear(*a), F.linear(*b)
    torch.testing.assert_close(ours, theirs)
    ours.backward(dy), theirs.backward(dy)
    for mine, other in zip(a, b):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [512, 500])
def test_a_large_weight_gradient_is_the_product_in_whole_tiles_or_not(n):
    torch.manual_seed(0)
    dy, x, out = torch.randn(n, 384), torch.randn(n, 256), torch.empty(384, 256)
    assert m.weight_gradient(dy, x, out) is out
    for dw in (out, m.weight_gradient(dy, x)):
        torch.testing.assert_close(dw, dy.t() @ x, rtol=1e-4, atol=1e-3)


def test_rms_norm_and_its_gradients_are_torchs_whatever_the_strides():
    torch.manual_seed(0)
    norm = m.RMSNorm(8, 1e-3)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 6, 5, 8)[:, :, 1:4].requires_grad_()                # as heads lie side by side
    dy = torch.randn(2, 3, 6, 8).transpose(1, 2)
    ours = norm(x)
    assert ours.grad_fn.name() == "NormalizeBackward"
    expected = F.rms_norm(x, (8,), norm.weight, norm.eps)
    torch.testing.assert_close(ours, expected)
    with torch.autocast("cpu", torch.bfloat16):                                          # which must not reach it
        gradients = [torch.autograd.grad(y, (x, norm.weight), dy) for y in (ours, expected)]
    for mine, theirs in zip(*gradients):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_linear_has_second_derivatives():
    torch.manual_seed(0)
    inputs = [torch.randn(16, 32, requires_grad=True), torch.randn(48, 32, requires_grad=True)]

    def second(f):
        first, = torch.autograd.grad((f(*inputs) ** 2).sum(), inputs[0], create_graph=True)
        return torch.autograd.grad((first ** 2).sum(), inputs)

    for ours, theirs in zip(second(m.fast_linear), second(F.linear)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)


def test_linear_obeys_autocast():
    x, w = torch.randn(16, 32), torch.randn(48, 32)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(m.fast_linear(x, w), F.linear(x, w), rtol=0, atol=0)


def test_rope_turns_the_first_pair_by_the_position_and_keeps_lengths():
    config = small(d_head=4, rope_base=100.0)
    rope = m.rope_tables(5, 1, config, "cpu")
    x = torch.tensor([1.0, 2.0, 0.0, 0.0]).view(1, 1, 1, 4)          # pairs (x0, x2) and (x1, x3)
    y = m.rotate(x, rope).flatten()
    expected = [math.cos(5), 2 * math.cos(0.5), math.sin(5), 2 * math.sin(0.5)]      # frequencies 1 and 100^(-1/2)
    torch.testing.assert_close(y, torch.tensor(expected))


def test_rope_makes_scores_depend_on_distance_alone():
    config = small()
    q, k = torch.randn(16), torch.randn(16)
    cos, sin = m.rope_tables(0, 4096, config, "cpu")

    def turn(x, i):
        return m.rotate(x.view(1, 1, 1, 16), (cos[i:i + 1], sin[i:i + 1])).flatten()

    assert float(turn(q, 9) @ turn(k, 4)) == pytest.approx(float(turn(q, 4009) @ turn(k, 4004)), abs=1e-3)


@pytest.mark.parametrize("budget", [1, 4 * 97 * 5, 2**30])
def test_chunked_cross_entropy_is_the_plain_one_in_loss_and_gradients(budget, monkeypatch):
    monkeypatch.setattr(m, "LOGIT_BYTES", budget)
    torch.manual_seed(0)
    x, w = torch.randn(33, 16, requires_grad=True), torch.randn(97, 16, requires_grad=True)
    y = torch.randint(0, 97, (33,))
    loss = LinearCrossEntropy.apply(x, w, y, True)
    (3 * loss).backward()
    dx, dw = x.grad, w.grad
    x.grad = w.grad = None
    plain = F.cross_entropy(x @ w.t(), y)
    (3 * plain).backward()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(dx, x.grad)
    torch.testing.assert_close(dw, w.grad)


def test_chunked_cross_entropy_gives_a_frozen_head_or_a_frozen_body_no_gradient():
    for frozen in ("x", "weight"):
        torch.manual_seed(0)
        x, w, y = torch.randn(9, 16), torch.randn(97, 16), torch.randint(0, 97, (9,))
        learns = (w if frozen == "x" else x).requires_grad_()
        LinearCrossEntropy.apply(x, w, y, True).backward()
        expected = torch.autograd.grad(F.cross_entropy(x @ w.t(), y), learns)[0]
        torch.testing.assert_close(learns.grad, expected)


def test_the_loss_can_be_asked_for_in_inference_mode():
    model, x = Model(small()).init_weights(0), tokens(2, 24)
    expected = model(x, x).ce.item()
    with torch.inference_mode():
        assert model(x, x).ce.item() == pytest.approx(expected)


def test_bfloat16_autocast_writes_text_too():
    model = Model(small()).init_weights(0).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(list(generate(model, tokens(1, 4), 3, temperature=0))) == 3


def test_weights_start_at_the_tables_standard_deviations():
    config = ModelConfig(n_layer=2, d_model=256, init_scale=0.5)
    model = Model(config).init_weights(0)
    cut = 0.8796                                                     # std of a unit normal cut at two
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), name
            continue
        std = cut * math.sqrt(0.5 / p.shape[-1])
        std /= 2 if "attn.out" in name or "w_out" in name else 1                       # sqrt(2 * 2 layers)
        assert p.std().item() == pytest.approx(std, rel=0.03), name
        assert p.abs().max() <= 2 * std / cut + 1e-6, name


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    a, b, c = (Model(small()).init_weights(seed) for seed in (1, 1, 2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.embed.weight, c.embed.weight)


def test_norms_and_embeddings_are_not_decayed_and_the_groups_add_up():
    model = Model(small(tie_embeddings=False))
    decay, plain = (group["params"] for group in parameter_groups(model, 0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in plain} == {n for n in names.values() if "norm" in n or n == "embed.weight"}
    assert len(decay) + len(plain) == len(names)


def test_recomputing_changes_no_gradient_and_routes_once():
    calls, grads = [], []
    with m.using(m.FAST._replace(route=lambda *args: calls.append(1) or m.fast_route(*args))):
        for recompute in (False, True):
            model = Model(small(recompute=recompute)).init_weights(0)
            x = tokens(2, 24)
            o = model(x, x)
            (o.ce + o.balance + o.z).backward()
            grads.append([p.grad for p in model.parameters()])
    assert len(calls) == 2 * 2                                       # two layers, two models: never again in backward
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_balance_loss_reaches_the_gate_of_every_layer():
    model = Model(small()).init_weights(0)
    x = tokens(2, 24)
    model(x, x).balance.backward()
    for block in model.blocks:
        assert block.ffn.gate.grad.abs().sum() > 0


def test_the_gate_is_float32_under_bfloat16_autocast():
    model = Model(small()).init_weights(0)
    seen = []
    spy = m.FAST._replace(route=lambda logits, *rest: seen.append(logits.dtype) or m.fast_route(logits, *rest))
    with m.using(spy), torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens(2, 24), tokens(2, 24))
    assert seen == [torch.float32, torch.float32]


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


def run_model(ops: m.Ops, config: ModelConfig) -> list[torch.Tensor]:
    """Logits, losses and every gradient by this table, each routing checked against its contract on the way."""

    def checked(logits, config, context):
        routing = ops.route(logits, config, context)
        router.check(routing, *logits.shape)
        if (config.router, config.balance_scope) == ("softmax", "micro_batch"):          # E sum f P, written out
            share = routing.experts.flatten().bincount(minlength=logits.shape[1]) / routing.experts.numel()
            balance = logits.shape[1] * (share * logits.softmax(-1).mean(0)).sum()
            torch.testing.assert_close(routing.losses["balance"], balance)
        return routing

    with m.using(ops._replace(route=checked)):
        torch.manual_seed(0)
        model = Model(config).init_weights(1)
        for block in model.blocks:
            if block.moe:
                block.ffn.gate.data *= 4                                                 # a router that has favourites
        x = tokens(2, 25)
        logits = model(x[:, :-1]).logits
        o = model(x[:, :-1], x[:, 1:])
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
    for at_once in (False, True):                                       # expert by expert, and by grouped products
        monkeypatch.setattr(m, "has_grouped_mm", lambda *_, at_once=at_once: at_once)
        agree(m.FAST, m.PLAIN, config)
    agree(m.COMPILED, m.PLAIN, config)


def scaled(entry: str) -> m.Ops:
    """The fast table with one entry that gives 1.01 times what it should."""
    fast = getattr(m.FAST, entry)

    def wrong(*args):
        found = fast(*args)
        return replace(found, weights=1.01 * found.weights) if entry == "route" else 1.01 * found

    return m.FAST._replace(**{entry: wrong})


def test_a_backward_elsewhere_uses_the_table_and_the_precision_of_its_forward():
    config = small(d_model=32, d_expert=80, n_expert=4, top_k=2, recompute=True)
    expected = run_model(m.FAST, config)
    torch.manual_seed(0)
    model, x = Model(config).init_weights(1), tokens(2, 25)
    for block in model.blocks:
        block.ffn.gate.data *= 4
    o = model(x[:, :-1], x[:, 1:])
    with m.using(m.PLAIN), torch.autocast("cpu", torch.bfloat16):
        (o.ce + 0.1 * o.balance + 0.1 * o.z).backward()
    for p, grad in zip(model.parameters(), expected[4:], strict=True):
        assert (p.grad - grad).norm() <= 0.05 * grad.norm()


@pytest.mark.parametrize("entry", m.Ops._fields)
def test_a_fast_entry_that_is_a_hundredth_off_is_noticed(entry):
    with pytest.raises(AssertionError):
        agree(scaled(entry), m.PLAIN, small())


def test_experts_that_forget_their_weights_are_noticed():
    def forgetful(x, routing, w):
        return m.experts(x, replace(routing, weights=torch.ones_like(routing.weights)), w)

    with pytest.raises(AssertionError):
        agree(m.FAST, m.PLAIN._replace(experts=forgetful), small())


def test_rows_that_are_not_in_token_order_are_noticed(monkeypatch):
    def unstable(experts, n_expert, place=router.place):
        counts, offsets, token, slot = place(experts.flip(0), n_expert)
        return counts, offsets, len(experts) - 1 - token, slot.flip(0)

    agree(m.FAST, m.PLAIN, small())
    monkeypatch.setattr(router, "place", unstable)
    with pytest.raises(AssertionError, match="ties in token order"):
        agree(m.FAST, m.PLAIN, small())


def test_a_balance_loss_k_times_itself_is_noticed(monkeypatch):
    balance_loss = router.balance_loss
    monkeypatch.setattr(router, "balance_loss", lambda *args: 3 * balance_loss(*args))
    with pytest.raises(AssertionError):
        agree(m.FAST, m.PLAIN, small())


# --- the axes of the expert layer -----------------------------------------------------------------------------------


def layer_by_hand(model: Model, x: torch.Tensor) -> torch.Tensor:
    """The first expert layer token by token and expert by expert, whatever their widths, from its parameters alone."""
    ffn, config = model.blocks[0].ffn, model.config
    experts = [pair for w_in, w_out in zip(ffn.w_in, ffn.w_out) for pair in zip(w_in, w_out)]
    out = []
    for row in x:
        scores = (ffn.gate @ row).softmax(0)
        chosen = scores.argsort(descending=True)[:config.top_k]
        y = torch.zeros_like(row)
        for e in chosen.tolist():
            gate, up = (experts[e][0] @ row).chunk(2)
            y = y + scores[e] / scores[chosen].sum() * (experts[e][1] @ (F.silu(gate) * up))
        if config.d_shared:
            gate, up = (ffn.shared.w_in @ row).chunk(2)
            shared = ffn.shared.w_out @ (F.silu(gate) * up)
            y = y + (shared * torch.sigmoid(ffn.shared_gate @ row) if config.shared_gate else shared)
        out.append(y)
    return torch.stack(out)


AXES = {
    "two widths": dict(expert_groups=[(2, 48), (6, 16)], top_k=3),
    "three widths": dict(expert_groups=[(1, 8), (5, 24), (2, 40)], top_k=4),
    "shared": dict(d_shared=40),
    "shared and gated": dict(d_shared=40, shared_gate=True),
    "everything": dict(expert_groups=[(4, 16), (4, 8)], d_shared=24, shared_gate=True, recompute=True),
}


@pytest.mark.parametrize("name", AXES)
def test_widths_and_shared_experts_are_the_sum_written_out_forward_and_in_every_gradient(name):
    model = Model(small(**AXES[name])).init_weights(2).double()
    model.blocks[0].ffn.gate.data *= 4
    model = model.float()
    x = torch.randn(1, 30, 64, generator=torch.Generator().manual_seed(0))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    parameters = list(model.blocks[0].ffn.parameters())
    y, expected = model.blocks[0].ffn(a, tokens(1, 30))[0][0], layer_by_hand(model, b[0])
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, [a, *parameters], dy)
    theirs = torch.autograd.grad(expected, [b, *parameters], dy)
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3)


def test_a_width_that_no_token_visits_gets_a_gradient_of_zero():
    model = Model(small(expert_groups=[(3, 16), (5, 8)], top_k=2)).init_weights(0)
    ffn = model.blocks[0].ffn
    ffn.gate.data.zero_()
    ffn.gate.data[:3] = 1
    y, routing = ffn(torch.ones(1, 6, 64), tokens(1, 6))
    y.sum().backward()
    assert routing.counts[3:].sum() == 0 and (ffn.w_in[1].grad == 0).all() and ffn.w_in[0].grad.abs().sum() > 0


def test_the_first_layers_can_be_dense_and_as_wide_as_what_a_token_visits_later():
    model = Model(small(first_dense_layers=1, d_shared=8))
    assert model.blocks[0].ffn.w_out.shape == (64, 3 * 32 + 8) and model.blocks[1].moe
    model.init_weights(0)
    out = model(tokens(2, 24), tokens(2, 24, 1))
    out.ce.backward()
    assert out.stats["load"].shape == (1, 8) and model.blocks[0].ffn.w_in.grad.abs().sum() > 0


def test_sizes_count_every_axis_by_hand():
    plain = count(small())
    grouped = count(small(expert_groups=[(2, 48), (6, 16)]))          # 192 hidden units where 8 x 32 = 256 were
    assert plain["total"] - grouped["total"] == 2 * 3 * 64 * (256 - 192)
    assert plain["active"] - grouped["active"] == 2 * 3 * 64 * (256 - 192) * 3 // 8
    shared = count(small(d_shared=40, shared_gate=True))              # 3 matrices and the gate's row, two layers
    assert shared["total"] - plain["total"] == shared["active"] - plain["active"] == 2 * (3 * 64 * 40 + 64)
    dense = count(small(first_dense_layers=1))                        # the first layer: no router, three experts wide
    assert dense["active"] == plain["active"] - 8 * 64
    assert plain["total"] - dense["total"] == 8 * 64 + 5 * 3 * 64 * 32


@pytest.mark.parametrize("changes, message", [
    (dict(expert_groups=[(2, 8)], top_k=3), "top_k = 3"),
    (dict(d_shared=-1), "d_shared"), (dict(shared_gate=True), "d_shared"), (dict(first_dense_layers=2), "n_layer - 1"),
    (dict(n_expert=1, top_k=1, d_shared=8), "d_expert"), (dict(capacity_factor=0.0), "capacity_factor"),
    (dict(router="switch"), "top_k = 1"), (dict(router="hash", bias_rate=0.1), "no bias"),
    (dict(router="expert_choice", capacity_factor=1.0), "capacity of its own"),
    (dict(d_model=10**9, n_expert=10**6, d_expert=10**9, top_k=1), "smaller"),
    (dict(top_p=1.5), "top_p"), (dict(balance_scope="batch"), "balance_scope"), (dict(bias_rate=-1.0), "bias_rate"),
])
def test_impossible_axes_are_refused_in_one_line(changes, message):
    with pytest.raises(BadInput, match=message):
        m.validate(small(**changes))


@pytest.mark.parametrize("pairs", [[], [(2, 0)], [(2, 8, 8)], [(2.5, 8)], 3])
def test_groups_of_experts_that_are_none_are_refused_in_one_line(pairs):
    with pytest.raises(BadInput, match="expert_groups"):
        m.whole_groups(pairs)
    assert m.whole_groups([[2, 8.0]]) == [(2, 8)]


@pytest.mark.parametrize("changes", [dict(expert_groups=[(4, 8), (4, 16)]), dict(d_shared=8), dict(bias_rate=0.1),
                                     dict(first_dense_layers=1), dict(router="sigmoid")])
def test_what_transformers_cannot_hold_is_not_exported(changes, tmp_path):
    with pytest.raises(BadInput, match=f"{next(iter(changes))}.*cannot be exported"):
        to_hf(Model(small(**changes)), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_the_selection_bias_moves_once_a_step_by_the_load_of_all_its_micro_batches():
    model = Model(small(router="sigmoid", bias_rate=0.01)).init_weights(0).train()
    counts = sum(model.blocks[0].ffn(torch.randn(1, 24, 64), tokens(1, 24))[1].counts for _ in range(3))
    ffn = model.blocks[0].ffn
    assert torch.equal(ffn.load, counts.long()) and (ffn.bias == 0).all()
    model.end_step(torch.tensor(0.0))
    step = 0.01 * torch.sign(counts.float().mean() - counts)
    torch.testing.assert_close(ffn.bias, step - step.mean())
    assert (ffn.load == 0).all() and "blocks.0.ffn.bias" in model.state_dict()


def test_a_skipped_step_leaves_the_selection_bias_alone():
    model = Model(small(router="sigmoid", bias_rate=0.01)).init_weights(0).train()
    model.blocks[0].ffn(torch.randn(1, 24, 64), tokens(1, 24))
    model.end_step(torch.tensor(1.0))
    assert (model.blocks[0].ffn.bias == 0).all() and (model.blocks[0].ffn.load == 0).all()


def test_outside_training_nothing_is_counted():
    model = Model(small(router="sigmoid", bias_rate=0.01)).init_weights(0).eval()
    model(tokens(1, 24), tokens(1, 24))
    assert (model.blocks[0].ffn.load == 0).all()


# --- memory ---

KEPT = {"as it is": {}, "top-1": dict(top_k=1), "shared": dict(d_shared=64, shared_gate=True),
        "widths": dict(expert_groups=[(3, 16), (5, 48)]), "dense": dict(n_expert=1, top_k=1, d_expert=96),
        "recomputed": dict(recompute=True), "expert choice": dict(router="expert_choice"),
        "no norm of q and k": dict(qk_norm=False), "many experts": dict(n_expert=64, d_expert=8)}


@pytest.mark.parametrize("name", KEPT)
def test_the_activations_that_memory_counts_are_those_that_autograd_saves(name):
    """In float32, a layer, within 15%: of six layers less those of two, so that what is kept once falls out."""

    def saved(config: ModelConfig) -> int:
        model, kept = Model(config).init_weights(0), {}
        own = {p.data_ptr() for p in model.parameters()}

        def pack(x):
            if x.data_ptr() not in own:
                kept[x.untyped_storage().data_ptr()] = x                 # alive: no other gets its address
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(tokens(4, 64), tokens(4, 64, 1))
        return sum(x.untyped_storage().nbytes() for x in kept.values())

    two, six = (small(**KEPT[name] | dict(n_layer=layers, seq_len=64)) for layers in (2, 6))
    counted = m.memory(six, 4)["activations"] - m.memory(two, 4)["activations"]
    assert saved(six) - saved(two) == pytest.approx(counted, rel=0.15)


# --- causality ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_later_token_or_another_row_has_no_gradient_to_an_earlier_output(training):
    model = Model(small()).init_weights(0).train(training)
    x = model.embed(tokens(2, 12)).detach().requires_grad_()
    model.embed = torch.nn.Identity()
    model.config.tie_embeddings = False
    model.head = torch.nn.Linear(64, 97, bias=False)
    model(x).logits[0, 5].sum().backward()
    per_token = x.grad.abs().sum(-1)
    assert (per_token[0, :6] > 0).all() and (per_token[0, 6:] == 0).all() and (per_token[1] == 0).all()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_changing_later_tokens_or_other_rows_leaves_earlier_outputs_alone(training):
    model = Model(small()).init_weights(0).train(training)
    x = tokens(2, 12)
    changed = x.clone()
    changed[0, 6:], changed[1] = (changed[0, 6:] + 1) % 97, (changed[1] + 1) % 97
    a, b = model(x).logits, model(changed).logits
    torch.testing.assert_close(a[0, :6], b[0, :6], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(a[0, 6:], b[0, 6:])


# --- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [dict(), dict(n_expert=1, top_k=1), dict(tie_embeddings=False, top_k=8)])
def test_greedy_decoding_with_the_cache_gives_the_tokens_of_full_recomputation(change):
    model = Model(small(**change)).init_weights(3).eval()
    text = [5, 17, 2]
    cached = torch.cat(list(generate(model, torch.tensor([text]), 40, temperature=0))).tolist()
    with torch.no_grad():
        for _ in range(40):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    assert cached == text[3:]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_compiled_step_writes_the_same_tokens_whatever_the_axes(batch):
    model = Model(small(expert_groups=[(3, 16), (5, 8)], d_shared=16, n_layer=2)).init_weights(3).eval()

    def write(step):
        return torch.stack(list(generate(model, tokens(batch, 5), 20, temperature=0, step=step))).tolist()

    assert write(m.Decoder()) == write(m.next_logits)


def test_rows_of_a_batch_are_decoded_as_if_alone():
    model = Model(small()).init_weights(0).eval()
    prompts = tokens(3, 5)
    together = torch.stack(list(generate(model, prompts, 12, temperature=0)), 1)
    alone = [torch.cat(list(generate(model, p[None], 12, temperature=0))) for p in prompts]
    assert torch.equal(together, torch.stack(alone))


def test_a_cache_can_be_filled_in_pieces():
    model = Model(small()).init_weights(0).eval()
    x = tokens(2, 12)
    cache = m.Cache(model.config, 2, 12, "cpu", torch.float32)
    with torch.no_grad():
        pieces = [model(part, cache=cache).logits for part in (x[:, :5], x[:, 5:9], x[:, 9:10], x[:, 10:])]
        torch.testing.assert_close(torch.cat(pieces, 1), model(x).logits, atol=1e-5, rtol=1e-4)


def test_sampling_is_a_function_of_the_seed_and_never_draws_padding():
    model = Model(small()).init_weights(0).eval()
    def draw(seed):
        return torch.cat(list(generate(model, torch.ones(1, 1, dtype=torch.int64), 30, temperature=5.0,
                                                    top_k=97, seed=seed, n_vocab=50))).tolist()
    assert draw(1) == draw(1) != draw(2)
    assert max(draw(1)) < 50


def test_positions_beyond_max_seq_len_are_refused():
    model = Model(small(max_seq_len=30, vocab_size=264)).init_weights(0)
    with pytest.raises(AssertionError, match="30"):
        list(generate(model, torch.ones(1, 20, dtype=torch.int64), 11))
    with pytest.raises(BadInput, match="limit is 30"):
        list(m.write_text(model, m.load_tokenizer("bytes"), "x" * 20, 11))


def test_a_quarter_million_positions_cost_no_memory_until_used():
    small_model, large = Model(small(max_seq_len=24)), Model(small(max_seq_len=262_144))
    def state(model):
        return sum(t.numel() for t in [*model.parameters(), *model.buffers()])
    assert state(small_model) == state(large)


def test_text_is_written_in_whole_characters():
    text = iter("né\N{SNOWMAN}".encode())

    def spell(model, tokens, cache):
        return F.one_hot(torch.tensor([next(text)]), 264).float()

    model, tokenizer = Model(small(vocab_size=264)), m.load_tokenizer("bytes")
    pieces = list(m.write_text(model, tokenizer, "a", 6, temperature=0, step=spell))
    assert pieces[0] == "a" and "".join(pieces[1:]) == "né\N{SNOWMAN}" and "\ufffd" not in "".join(pieces)


# --- folders that transformers wrote --------------------------------------------------------------------------------


def save_tokenizer(folder, text: str, pattern: str | None) -> object:
    """A byte-level BPE trained on the text, as transformers' folders hold it: GPT-2's split, or one written out."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, trainers
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
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


def test_a_folder_without_a_readable_tokenizer_is_one_clear_line(tmp_path):
    with pytest.raises(BadInput, match="has no tokenizer"):
        m.FolderTokenizer(tmp_path)
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="is no tokenizer"):
        m.FolderTokenizer(tmp_path)


@pytest.mark.parametrize("shard", [None, "100KB"], ids=["one file", "sharded"])
def test_a_folder_that_transformers_wrote_continues_a_prompt_with_its_own_greedy_tokens(shard, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "hf"
    theirs_tokenizer = save_tokenizer(folder, TEXT, m.QWEN_PATTERN)
    config = transformers.Qwen3MoeConfig(
        vocab_size=theirs_tokenizer.get_vocab_size(), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32,
        norm_topk_prob=True)
    torch.manual_seed(0)
    theirs = transformers.Qwen3MoeForCausalLM(config).eval()
    theirs.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    assert len(list(folder.glob("*.safetensors"))) > 1 if shard else (folder / "model.safetensors").is_file()
    prompt = "return the"
    ids = torch.tensor([theirs_tokenizer.encode(prompt).ids])
    m.main([str(folder), "--prompt", prompt, "--tokens", "12", "--temperature", "0"])
    written = capsys.readouterr().out.removesuffix("\n")
    made = theirs.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)[0]
    read = m.reader(m.FolderTokenizer(folder))
    assert written == prompt + "".join(map(read, made[ids.shape[1]:].tolist()))


def test_a_tokenizer_with_more_tokens_than_the_model_is_one_clear_line():
    model = Model(small(vocab_size=97)).init_weights(0).eval()
    with pytest.raises(BadInput, match="token 122"):
        list(m.write_text(model, m.load_tokenizer("bytes"), "xyz", 3))


def test_a_text_too_long_for_a_file_name_is_a_text():
    assert not m.is_file("x" * 300) and m.is_file(__file__)
