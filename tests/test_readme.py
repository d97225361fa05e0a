"""README.md: what it says about files, sizes, runs and messages is what the code does."""

import inspect
import json
import re

import pytest
import torch
from conftest import ROOT

import model as m
import router
import train
from model import Model, ModelConfig, validate
from router import FUSED, POLICIES, Context, RouterConfig, check, check_causal, route

README = (ROOT / "README.md").read_text()


def test_it_is_short_enough_to_be_read():
    assert len(README.splitlines()) < 300


def test_the_file_map_names_every_script_the_length_of_its_lesson_and_its_own():
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+|-) \| ([\d,]+) \|", README, re.M)
    assert {name for name, *_ in rows} == {path.name for path in ROOT.glob("*.py")}
    for name, lesson, length in rows:
        lines = (ROOT / name).read_text().splitlines()
        ends = [i for i, line in enumerate(lines) if line.startswith("# === Part 2")]
        assert int(length.replace(",", "")) == pytest.approx(len(lines), rel=0.05), name
        assert lesson == "-" if not ends else int(lesson) == pytest.approx(ends[0], rel=0.05), name


def test_the_losses_it_quotes_are_those_of_the_committed_runs():
    loss = {}
    for name in ("tiny", "tiny_dense"):
        result = json.loads((ROOT / f"results/{name}/result.json").read_text())
        loss[name] = result["loss"]
        assert (f"| `configs/{name}.py` | {result['n_total'] / 1e6:.2f}M | {result['n_active'] / 1e6:.2f}M | "
                f"{result['loss']:.4f} | {result['bits_per_byte']:.4f} | {result['seconds']:.0f} |\n") in README
    assert f"buy {loss['tiny_dense'] - loss['tiny']:.2f} nats a token" in README
    log = [json.loads(line) for line in (ROOT / "results/tiny/log.jsonl").read_text().splitlines()]
    for step, ce in re.findall(r"^step +(\d+) tokens [\d,]+ ce (\d\.\d{4})", README, re.M):
        assert any(line["step"] == int(step) and f"{line.get('ce', 0):.4f}" == ce for line in log), step


def test_the_expert_layer_it_shows_is_the_one_in_model_py():
    assert f"```python\n{inspect.getsource(m.experts)}```" in README


def test_the_lines_of_the_journey_stand_in_the_files():
    lines = re.findall(r"^(model|router)\.py:(\d+) +(\S.{30})", README, re.M)
    for file, number, source in lines:
        line = (ROOT / f"{file}.py").read_text().splitlines()[int(number) - 1]
        assert line.strip().startswith(source.rstrip()), number
    assert len(lines) > 10


def test_the_message_it_shows_for_a_misspelt_name_is_the_real_one():
    with pytest.raises(router.BadInput) as error:
        train.parse_command_line(["configs/tiny.py", "--n_layers=3"])
    assert f"error: {error.value}" in README


def test_every_script_and_config_of_its_commands_exists_and_every_flag_is_known():
    commands = re.findall(r"^python (\w+\.py) (.*?)(?:  |$)", README, re.M)
    assert len(commands) > 10
    for script, words in commands:
        source = (ROOT / script).read_text()
        assert all((ROOT / path).is_file() for path in re.findall(r"configs/\S+\.py", words) if "planned" not in path)
        for flag in re.findall(r"--(\w+)", words):
            assert (re.search(rf'"(--)?{flag}"|^--{flag} ', source, re.M)
                    or flag in (*train.TYPES, "help")), (script, flag)


def test_the_router_of_ones_own_is_under_20_lines_keeps_its_promise_and_trains():
    block = re.search(r"```python\n(@policy\(\"my_idea\".*?)```", README, re.S)[1]
    assert len(block.splitlines()) < 20
    try:
        exec(block, vars(router))                             # as if pasted below the policies
        logits = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
        check(route(logits, RouterConfig("my_idea", 2)), 64, 16)
        assert check_causal(logits, RouterConfig("my_idea", 2), Context())
        config = ModelConfig(n_layer=2, d_model=32, n_head=2, n_kv_head=1, d_head=16, n_expert=8, top_k=2, d_expert=16,
                             seq_len=16, router="my_idea")
        validate(config)
        model = Model(config).init_weights(0)
        x = torch.arange(17)[None] % 7
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        losses = []
        for _ in range(10):
            out = model(x[:, :-1], x[:, 1:])
            (out.ce + 0.01 * out.balance).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(out.ce.item())
        assert losses[-1] < losses[0] / 2
    finally:
        POLICIES.pop("my_idea", None)
        vars(router).pop("my_idea", None)


def test_the_table_of_routers_names_every_policy_and_what_it_promises():
    rows = re.findall(r"^\| `(\w+)` \| .* \| (yes|no) \| (yes|no) \|$", README, re.M)
    word = {True: "yes", False: "no"}
    assert rows == [(name, word[choose.causal], word[name in FUSED]) for name, choose in POLICIES.items()]
