"""What only a GPU can show of model.py and train.py (kernels alone: test_kernels.py). `pytest -m gpu` runs both."""

import copy
import json
import math
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import model as m
import train as t
from model import Model, ModelConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")]
DEVICE = "cuda"
ROOT = Path(m.__file__).parent
SMALL = dict(n_layer=2, d_model=64, n_head=4, n_kv_head=2, d_head=16, n_expert=8, top_k=2, d_expert=32, vocab_size=256,
             seq_len=64)


def pair(**changes) -> tuple[Model, Model]:
    """The same model on the CPU and on the GPU."""
    cpu = Model(ModelConfig(**(SMALL | changes))).init_weights(0)
    return cpu, copy.deepcopy(cpu).to(DEVICE)


def batch(b=4, length=64) -> torch.Tensor:
    return torch.randint(0, 256, (b, length + 1), generator=torch.Generator().manual_seed(0))


def losses(model: Model, tokens: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Loss, and the gradients in one vector on the CPU."""
    o = model(tokens[:, :-1], tokens[:, 1:])
    total = o.ce + 0.01 * o.balance + 0.001 * o.z
    grads = torch.autograd.grad(total, list(model.parameters()))
    return float(total.detach()), torch.cat([g.flatten().float().cpu() for g in grads])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def optimizer_of(model: Model) -> torch.optim.AdamW:
    return torch.optim.AdamW(t.parameter_groups(model, 0.1), lr=1e-3, fused=True)


@pytest.mark.parametrize("n_expert", [8, 64])
def test_experts_in_bfloat16_equal_the_definition_in_float32_with_an_expert_that_gets_no_token(n_expert):
    torch.manual_seed(0)
    n, d, k = 512, 256, 4
    layer = m.MoE(ModelConfig(d_model=d, d_expert=128, n_expert=n_expert, top_k=k)).to(DEVICE)
    for p in layer.parameters():
        torch.nn.init.normal_(p, 0, p.shape[-1] ** -0.5)
    logits = torch.randn(n, n_expert, device=DEVICE)
    logits[:, 3] = -100.0
    routing = m.route(logits, layer.config)
    x, dy = torch.randn(n, d, device=DEVICE), torch.randn(n, d, device=DEVICE)
    found = []
    for table, kind in ((m.FAST, torch.bfloat16), (m.PLAIN, torch.float32)):
        poison = torch.full((2**26,), math.nan, device=DEVICE, dtype=torch.bfloat16)      # what freed memory may hold
        del poison
        row, weights = x.to(kind).requires_grad_(), routing.weights.detach().requires_grad_()
        y = table.experts(row, replace(routing, weights=weights), layer)
        leaves = (row, weights, *layer.w_in, *layer.w_out)
        found.append([y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
    for ours, exact in zip(*found):
        assert distance(ours.float(), exact) < 1e-2


def test_grouped_products_serve_bfloat16_on_hopper_alone():
    x, w_out = (torch.empty(64, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    hopper = torch.cuda.get_device_capability()[0] == 9
    assert m.has_grouped_mm(x, w_out.expand(8, 64, 64), 8.0) == hopper
    assert not m.has_grouped_mm(x, w_out.expand(1024, 64, 64), 8.0)
    assert not m.has_grouped_mm(x.float(), w_out.expand(8, 64, 64), 8.0)


@pytest.mark.parametrize("changes", [{}, {"router": "sigmoid", "bias_rate": 0.01}, {"router": "switch", "top_k": 1},
                                     {"d_shared": 32, "first_dense_layers": 1}, {"recompute": True},
                                     {"expert_groups": [(4, 32), (4, 64)]}], ids=str)
def test_a_model_computes_on_the_gpu_what_it_computes_on_the_cpu(changes):
    cpu, gpu = pair(**changes)
    tokens = batch()
    loss, grads = losses(cpu, tokens)
    found, found_grads = losses(gpu, tokens.to(DEVICE))
    assert found == pytest.approx(loss, abs=1e-4) and distance(found_grads, grads) < 1e-3
    with torch.autocast(DEVICE, torch.bfloat16):
        assert losses(gpu, tokens.to(DEVICE))[0] == pytest.approx(loss, abs=1e-2)


def test_the_loss_in_bfloat16_is_that_of_float64_to_its_rounding():
    torch.manual_seed(0)
    x, head = torch.randn(300, 64, device=DEVICE).bfloat16(), torch.randn(1000, 64, device=DEVICE) / 8
    targets = torch.randint(0, 1000, (300,), device=DEVICE)
    found = []
    for kind, fast in ((torch.bfloat16, m.FAST.loss), (torch.float64, m.PLAIN.loss)):
        a, b = x.to(kind).requires_grad_(), (head if kind == torch.bfloat16 else head.double()).requires_grad_()
        value = fast(a, b, targets)
        found.append([value.double(), *(g.double() for g in torch.autograd.grad(value, (a, b)))])
    for ours, exact in zip(*found):
        assert distance(ours, exact) < 1e-2


def test_compiled_text_is_the_uncompiled_one_and_a_kept_decoder_keeps_its_graph():
    _, gpu = pair()
    gpu.eval()
    step = m.Decoder()
    graphs = set()
    for prompt in (batch(2, 15)[:, :16], batch(2, 15)[:, 1:9]):
        plain, fast = (torch.stack(list(m.generate(gpu, prompt.to(DEVICE), 40, temperature=0, **kind)))
                       for kind in ({}, {"step": step}))
        assert torch.equal(plain, fast)
        graphs.add(id(step.graph))
    assert len(graphs) == 1


def test_text_is_read_and_written_without_cudnn_whose_plans_take_longer_than_the_text(monkeypatch):
    seen, attention = set(), torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        seen.add(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    _, gpu = pair()
    list(m.generate(gpu.eval(), batch(1, 8).to(DEVICE), 3))
    assert seen == {False}


def training_step(model: Model, optimizer, tokens: torch.Tensor) -> None:
    with torch.autocast(DEVICE, torch.bfloat16):
        o = model(tokens[:, :-1], tokens[:, 1:])
    (o.ce + 0.01 * o.balance + 0.001 * o.z).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.step()
    model.end_step(optimizer.found_inf)
    optimizer.zero_grad()


def test_a_training_step_never_waits_for_the_gpu():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("experts one after the other read their counts: only Hopper takes them at once")
    _, gpu = pair(bias_rate=0.01)
    optimizer, tokens = optimizer_of(gpu), batch().to(DEVICE)
    training_step(gpu, optimizer, tokens)                                   # compiles
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                 # "a prototype feature"
            torch.cuda.set_sync_debug_mode("error")
        training_step(gpu, optimizer, tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_that_is_not_finite_changes_neither_weights_nor_optimizer():
    _, gpu = pair(bias_rate=0.01)
    optimizer, tokens = optimizer_of(gpu), batch().to(DEVICE)
    training_step(gpu, optimizer, tokens)
    before = copy.deepcopy([gpu.state_dict(), optimizer.state_dict()["state"]])
    gpu.norm.weight.register_hook(lambda grad: grad * math.nan)
    training_step(gpu, optimizer, tokens)
    after = [gpu.state_dict(), optimizer.state_dict()["state"]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_run_is_trained_stopped_and_continued(tmp_path):
    command = ["train.py", str(ROOT / "configs/tiny.py"), f"--out_dir={tmp_path}/run", "--max_steps=40",
               "--eval_tokens=4096", "--log_interval=10"]
    stopped = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train; sys.argv = {command}; " \
              "train.catch_signals = lambda: ['a test']; train.run_script(train.main)"
    for words in (["-c", stopped], [str(ROOT / command[0]), *command[1:]]):
        subprocess.run([sys.executable, *words], cwd=tmp_path, check=True)
    steps = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    ce = [line["ce"] for line in steps if "ce" in line]
    assert len(ce) == 40 and ce[-1] < ce[0] - 1
    text = subprocess.run([sys.executable, ROOT / "model.py", f"{tmp_path}/run", "--tokens=20", "--compile"],
                          cwd=tmp_path, check=True, capture_output=True, text=True)
    assert len(text.stdout) > 10
