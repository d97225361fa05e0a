"""router.py, what holds whatever the policy: the losses by hand, order, the contract, bad rows, causality, tools."""

import itertools
import math
import re
import runpy
import sys

import pytest
import torch
from conftest import random_logits

import router
from router import POLICIES, BadInput, Context, RouterConfig, balance_loss, check, combine, gather, place, route

QUARTERS = torch.tensor([[1.0, 2.0, 4.0, 1.0]]).log()            # probabilities 1/8, 2/8, 4/8, 1/8


def seeded(logits, config, context):
    """Route with the same random numbers every time: for the policy "random", and for noise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return route(logits, config, context)


# --- losses and statistics by hand ----------------------------------------------------------------------------------

@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_loss_is_one_at_perfect_balance_for_any_k_and_e_over_k_when_all_take_the_same(k):
    logits = 30 * torch.eye(4)                                   # every P_e is 1/4: each token wants another expert
    experts = (torch.arange(4)[:, None] + torch.arange(k)) % 4   # each expert gets k rows
    assert balance_loss(logits.softmax(-1), place(experts, 4)[0]).item() == pytest.approx(1)
    logits = torch.full((6, 10), -1e4)
    logits[:, :k] = 0
    assert route(logits, RouterConfig("softmax", k)).losses["balance"].item() == pytest.approx(10 / k)


def test_z_loss_is_the_mean_squared_log_of_the_summed_exponentials():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])      # logsumexp: ln 2 and ln 4
    assert router.z_loss(logits).item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


def test_statistics_of_a_batch_by_hand():
    logits = torch.tensor([[0.0, 0.0, -1e4], [5.0, -1e4, -1e4]]).requires_grad_()
    stats = route(logits, RouterConfig("softmax", 1)).stats
    assert stats["load"].tolist() == [1.0, 0.0, 0.0]
    assert stats["entropy"].item() == pytest.approx(math.log(2) / 2)
    assert stats["dropped"] == stats["nonfinite"] == 0
    two = route(logits, RouterConfig("softmax", 2)).stats
    assert two["dropped"] == 1 / 4                               # the second token's second weight underflows to 0
    assert not any(value.requires_grad for value in stats.values())


# --- order and the contract -----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("e", "k"), [(1, 1), (7, 3), (60, 8), (60, 60)])
def test_top_k_agrees_with_a_stable_sort_of_all_experts(e, k):
    scores = random_logits(50, e).mul(2).round()                 # many ties, and 0.0 beside -0.0
    assert torch.equal(router.top_k(scores, k).long(), scores.argsort(stable=True, descending=True)[:, :k])


def test_rows_stand_in_expert_order_and_ties_in_token_order():
    counts, offsets, token, slot = place(torch.tensor([[2, 0], [0, 1], [2, 1]]), 4)
    assert counts.tolist() == [2, 2, 2, 0] and offsets.tolist() == [2, 4, 6, 6]
    assert token.tolist() == [0, 1, 1, 2, 0, 2]                  # expert 0: tokens 0, 1; 1: 1, 2; 2: 0, 2
    assert slot.tolist() == [[4, 0], [1, 2], [5, 3]]


SIZES = [(e, k) for e in (1, 2, 7, 16) for k in sorted({1, 2, 3, e - 1, e}) if 1 <= k <= e] + [(60, 8), (40, 40)]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global"])
def test_every_policy_keeps_the_contract_for_any_size_and_any_setting(name, training, scope):
    settings = [(n, factor, renormalize) for n in (0, 1, 7) for factor in (None, 0.5, 1.25)
                for renormalize in (False, True)]
    for (e, k), (n, factor, renormalize) in itertools.product(SIZES, settings):
        if (name == "switch" and k > 1) or (name == "expert_choice" and factor):
            continue
        logits = random_logits(n, e, k).requires_grad_()
        config = RouterConfig(name, k, renormalize=renormalize, balance_scope=scope, router_noise=0.5,
                              capacity_factor=factor, eval_capacity_factor=factor)
        bias = 0.1 * random_logits(1, e)[0] if training else None
        routing = route(logits, config, Context(torch.arange(n), n, training, bias, torch.arange(e)))
        check(routing, n, e)
        assert routing.experts.shape == (n, min(e, 2 * k) if name == "expert_choice" else k)
        assert 0 <= routing.stats["dropped"] <= 1 and all(loss.isfinite() for loss in routing.losses.values())
        assert n or sum(routing.losses.values()) == routing.stats["entropy"] == routing.stats["dropped"] == 0
        (routing.weights.sum() + sum(routing.losses.values())).backward()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("field", ["counts", "offsets", "slot", "token", "experts", "demand"])
def test_a_broken_plan_does_not_pass_the_contract_check(field):
    routing = route(random_logits(), RouterConfig("softmax", 3))
    broken = getattr(routing, field).clone()
    setattr(routing, field, broken)
    broken.view(-1)[:2] = broken.view(-1)[:2].flip(0) + 1
    with pytest.raises(AssertionError):
        check(routing, 64, 7)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_with_nan_or_infinity_is_counted_and_becomes_an_undecided_one_without_gradient(name, bad):
    logits, zeroed = random_logits(), random_logits()
    logits[5, 2], logits[9] = bad, bad
    zeroed[[5, 9]] = 0
    config = RouterConfig(name, 1 if name == "switch" else 3, router_noise=0.5)
    context = Context(torch.arange(64), training=True, bias=torch.zeros(7))
    routing, expected = seeded(logits.requires_grad_(), config, context), seeded(zeroed, config, context)
    check(routing, 64, 7)
    assert routing.stats["nonfinite"] == 2 and expected.stats["nonfinite"] == 0
    assert torch.equal(routing.experts, expected.experts) and torch.equal(routing.weights, expected.weights)
    assert routing.losses == expected.losses
    (routing.weights.square().sum() + sum(routing.losses.values())).backward()
    assert logits.grad.isfinite().all() and (logits.grad[[5, 9]] == 0).all()


@pytest.mark.parametrize(("message", "fields", "context", "dtype"), [
    ("between 1 and E", dict(top_k=5), {}, torch.float32), ("float32", {}, {}, torch.bfloat16),
    ("top_k = 1", dict(router="switch", top_k=2), {}, torch.float32),
    ("pass Context", dict(router="hash"), {}, torch.float32),
    ("capacity of its own", dict(router="expert_choice", capacity_factor=1.0), {}, torch.float32),
    ("whole number of sequences", dict(balance_scope="sequence"), dict(seq_len=3), torch.float32)])
def test_what_cannot_be_routed_is_refused_with_a_reason(message, fields, context, dtype):
    with pytest.raises(AssertionError, match=message):
        route(QUARTERS.to(dtype), RouterConfig(**dict(top_k=1) | fields), Context(**context))


# --- gradients ------------------------------------------------------------------------------------------------------

def test_a_step_along_the_balance_gradient_evens_the_load():
    logits, config = (random_logits() + torch.linspace(1, -1, 7)).requires_grad_(), RouterConfig("softmax", 2)
    before = route(logits, config)
    (gradient,) = torch.autograd.grad(before.losses["balance"], logits)
    after = route((logits - 200 * gradient).detach(), config)
    assert after.losses["balance"] < before.losses["balance"] and after.stats["load"].std() < before.stats["load"].std()


@pytest.mark.parametrize("renormalize", [True, False])
def test_weight_and_loss_gradients_agree_with_finite_differences(renormalize):
    logits = random_logits(3, 6).double().requires_grad_()       # below the float32 entry check, straight to the policy

    def losses(x):
        choice = POLICIES["softmax"](x, RouterConfig("softmax", 2, renormalize=renormalize), Context())
        demand = torch.bincount(choice.experts.flatten(), minlength=6)
        return choice.weights, balance_loss(choice.probs, demand), router.z_loss(x)

    assert torch.autograd.gradcheck(losses, logits)


def test_gather_and_combine_are_each_others_gradient():
    plan = route(random_logits(10, 5), RouterConfig("softmax", 3))
    x = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    for choice, row in enumerate(plan.slot.flatten().tolist()):
        assert torch.equal(gather(x, plan.slot)[row], x[choice // 3])
    torch.testing.assert_close(combine(rows, plan.slot), rows[plan.slot.long()].sum(1))
    assert torch.autograd.gradcheck(lambda x: gather(x, plan.slot), x)
    assert torch.autograd.gradcheck(lambda rows: combine(rows, plan.slot), rows)
    assert torch.autograd.gradgradcheck(lambda x: combine(gather(x, plan.slot) ** 2, plan.slot), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [0, 1, 33])
def test_gathering_and_combining_equal_rows_multiplies_by_k(dtype, n):
    slot = route(random_logits(n, 6), RouterConfig("softmax", 4)).slot
    x = torch.randn(n, 8).to(dtype)
    y = combine(gather(x, slot), slot)
    assert y.dtype == dtype and torch.equal(y, 4 * x)


# --- causality ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [name for name, choose in POLICIES.items() if choose.causal])
@pytest.mark.parametrize("fields", [{}, dict(router_noise=1.0), dict(balance_scope="sequence")])
@pytest.mark.parametrize("training", [True, False])
def test_a_causal_policy_gives_an_early_token_nothing_from_later_ones_by_value_and_by_gradient(name, fields, training):
    logits, config = random_logits().requires_grad_(), RouterConfig(name, 1 if name == "switch" else 2, **fields)
    context = Context(torch.arange(64), 16, training, bias=torch.linspace(-0.1, 0.1, 7))
    assert router.check_causal(logits, config, context)
    weights = route(logits, config, context).weights
    if name in ("hash", "random"):
        assert not weights.requires_grad                         # nothing learnt, nothing to leak
    else:
        (gradient,) = torch.autograd.grad(weights[:32].square().sum(), logits)
        assert gradient[:32].abs().sum() > 0 and gradient[32:].abs().sum() == 0


@pytest.mark.parametrize("idea, said", [
    (lambda l, config, context: router.softmax(l + l.sum(0), config, context), "says it is causal and is not"),
    (lambda l, config, context: router.softmax(l, config, context)._replace(experts=torch.zeros(len(l), 4).long()),
     "a token visits the same expert twice"),
    (lambda l, config, context: (l, l), "'tuple' object has no attribute 'experts' (AttributeError in route")])
def test_a_new_policy_that_breaks_a_promise_is_caught_in_one_line(idea, said, monkeypatch):
    monkeypatch.setattr(router, "POLICIES", dict(POLICIES))
    router.policy("idea")(idea)
    assert router.describe("idea").startswith("idea")            # without a docstring, too
    with pytest.raises(BadInput, match=f"^policy idea: {re.escape(said)}"):
        router.main(["--policy", "idea"])


# --- the command line -----------------------------------------------------------------------------------------------

def test_the_file_checks_and_compares_every_policy_and_runs_without_triton(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)             # import triton now raises ImportError
    monkeypatch.setattr(sys, "argv", ["router.py"])
    assert runpy.run_path(router.__file__, run_name="__main__")["triton"] is None
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in POLICIES)


def test_list_names_every_policy_with_its_paper_on_a_line_and_a_misspelt_one_gets_the_nearest_name(capsys):
    router.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(POLICIES) and max(map(len, lines)) <= 140
    assert all("(" in line for line in lines if not line.startswith("random"))
    with pytest.raises(BadInput, match="did you mean softmax"):
        router.main(["--policy", "softmaks"])


@pytest.mark.parametrize("name", POLICIES)
def test_policy_shows_the_load_of_one_router(name, capsys):
    router.main(["--policy", name])
    out = capsys.readouterr().out
    load = router.try_policy(name).stats["load"]
    assert f"{load.max():.2%}" in out and out.count("#\n") == 17 and load.sum() <= 1.0001
