"""model.py: sizes, the model against transformers, the expert layer against a double loop, causality, decoding."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import model as m
from model import (
    BadInput,
    Experts,
    LinearCrossEntropy,
    Model,
    ModelConfig,
    count,
    from_hf,
    generate,
    to_hf,
    to_hf_tensors,
)

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


def test_sizes_of_a_config_print_as_a_table_and_as_json(capsys):
    m.main(["configs/large_moe_1p3b.py"])
    table = capsys.readouterr().out
    assert "1,083.2M" in table and "781.2M" in table and "1,394.4M" in table
    m.main(["configs/large_moe_1p3b.py", "--json"])
    sizes = json.loads(capsys.readouterr().out)
    assert set(sizes) == {"total", "active", "total_untied", "active_untied", "embedding", "flops_per_token", "memory"}
    assert sizes["memory"]["total"] == sum(n for name, n in sizes["memory"].items() if name != "total")


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
    from router import place
    torch.manual_seed(0)
    inputs = [torch.randn(n, 6, dtype=torch.float64), torch.rand(n, k), torch.randn(e, 10, 6, dtype=torch.float64),
              torch.randn(e, 6, 5, dtype=torch.float64)]
    experts = torch.stack([torch.randperm(e)[:k] for _ in range(n)]).int()
    _, offsets, slot, token = place(experts, e)
    a, b = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    y = Experts.apply(*a, token, slot, offsets, keep)
    expected = experts_by_double_loop(*b, experts)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy), expected.backward(dy)
    for ours, theirs in zip(a, b):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_rope_turns_the_first_pair_by_the_position_and_keeps_lengths():
    config = small(d_head=4, rope_base=100.0)
    cos, sin = m.rope_tables(5, 1, config, "cpu")
    x = torch.tensor([1.0, 2.0, 0.0, 0.0]).view(1, 1, 1, 4)          # pairs (x0, x2) and (x1, x3)
    y = m.Rope.apply(x, cos, sin).flatten()
    expected = [math.cos(5), 2 * math.cos(0.5), math.sin(5), 2 * math.sin(0.5)]      # frequencies 1 and 100^(-1/2)
    torch.testing.assert_close(y, torch.tensor(expected))


def test_rope_makes_scores_depend_on_distance_alone():
    config = small()
    q, k = torch.randn(16), torch.randn(16)
    cos, sin = m.rope_tables(0, 4096, config, "cpu")
    turn = lambda x, i: m.Rope.apply(x.view(1, 1, 1, 16), cos[i:i + 1], sin[i:i + 1]).flatten()
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
        std /= 2 if name.endswith(("attn.out.weight", "w_out")) else 1                       # sqrt(2 * 2 layers)
        assert p.std().item() == pytest.approx(std, rel=0.03), name
        assert p.abs().max() <= 2 * std / cut + 1e-6, name


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    a, b, c = (Model(small()).init_weights(seed) for seed in (1, 1, 2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.embed.weight, c.embed.weight)


def test_norms_and_embeddings_are_not_decayed_and_the_groups_add_up():
    model = Model(small(tie_embeddings=False))
    decay, plain = (group["params"] for group in m.parameter_groups(model, 0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in plain} == {n for n in names.values() if "norm" in n or n == "embed.weight"}
    assert len(decay) + len(plain) == len(names)


def test_recomputing_changes_no_gradient_and_routes_once(monkeypatch):
    calls, original = [], m.route
    monkeypatch.setattr(m, "route", lambda *args: calls.append(1) or original(*args))
    grads = []
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
    original = m.route
    try:
        m.route = lambda logits, config: seen.append(logits.dtype) or original(logits, config)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(tokens(2, 24), tokens(2, 24))
    finally:
        m.route = original
    assert seen == [torch.float32, torch.float32]


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
    draw = lambda seed: torch.cat(list(generate(model, torch.ones(1, 1, dtype=torch.int64), 30, temperature=5.0,
                                                top_k=97, seed=seed, n_vocab=50))).tolist()
    assert draw(1) == draw(1) != draw(2)
    assert max(draw(1)) < 50


def test_positions_beyond_max_seq_len_are_refused():
    model = Model(small(max_seq_len=30)).init_weights(0)
    with pytest.raises(BadInput, match="30"):
        list(generate(model, torch.ones(1, 20, dtype=torch.int64), 11))


def test_a_quarter_million_positions_cost_no_memory_until_used():
    small_model, large = Model(small(max_seq_len=24)), Model(small(max_seq_len=262_144))
    state = lambda model: sum(t.numel() for t in [*model.parameters(), *model.buffers()])
    assert state(small_model) == state(large)


def test_text_is_written_in_whole_characters():
    class Fixed(Model):
        def forward(self, x, cache=None):
            self.step = getattr(self, "step", -1) + 1
            logits = torch.full((1, 1, 264), -9.0)
            logits[0, 0, "né\N{SNOWMAN}".encode()[self.step]] = 9
            return m.Output(logits, None, None, None, {})

    pieces = list(m.write_text(Fixed(small(vocab_size=264)), m.load_tokenizer("bytes"), "a", 6, temperature=0))
    assert pieces[0] == "a" and "".join(pieces[1:]) == "né\N{SNOWMAN}" and "\ufffd" not in "".join(pieces)
