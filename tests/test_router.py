"""router.py, the definition: every equation by hand, the contract, causality, bad rows, and a policy of one's own."""

import math
import runpy
import sys

import pytest
import torch

import router
from router import (
    POLICIES,
    BadInput,
    Choice,
    Context,
    RouterConfig,
    balance_loss,
    check,
    combine,
    gather,
    place,
    route,
    top_k,
    z_loss,
)


def config(k, name="softmax", **fields):
    return RouterConfig(name, k, **fields)


def ids(n):
    """Token ids for the policies that look at them."""
    return Context(ids=torch.arange(n) * 7 % 50)


def random_logits(n=64, e=7, seed=0):
    return torch.randn(n, e, generator=torch.Generator().manual_seed(seed))


# --- losses and weights by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_loss_is_one_at_perfect_balance_for_any_k(k):
    logits = 30 * torch.eye(4)                                   # every P_e is 1/4: each token wants another expert
    experts = (torch.arange(4)[:, None] + torch.arange(k)) % 4   # each expert gets k rows
    counts = place(experts, 4)[0]
    assert balance_loss(logits.softmax(-1), counts).item() == pytest.approx(1)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_balance_loss_is_experts_over_k_when_all_tokens_put_all_mass_on_the_same_k(k):
    logits = torch.full((6, 10), -1e4)
    logits[:, :k] = 0
    assert route(logits, config(k)).losses["balance"].item() == pytest.approx(10 / k)


def test_z_loss_is_the_mean_squared_log_of_the_summed_exponentials():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])      # logsumexp: ln 2 and ln 4
    assert z_loss(logits).item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


def test_weights_are_softmax_probabilities_and_renormalised_ones_sum_to_one():
    logits = torch.tensor([[1.0, 2.0, 4.0, 1.0]]).log()          # probabilities 1/8, 2/8, 4/8, 1/8
    plain, normal = route(logits, config(2, renormalize=False)), route(logits, config(2))
    assert plain.experts.tolist() == normal.experts.tolist() == [[2, 1]]
    torch.testing.assert_close(plain.weights, torch.tensor([[4 / 8, 2 / 8]]))
    torch.testing.assert_close(normal.weights, torch.tensor([[4 / 6, 2 / 6]]))


def test_statistics_of_a_batch_by_hand():
    logits = torch.tensor([[0.0, 0.0, -1e4], [5.0, -1e4, -1e4]])
    stats = route(logits, config(1)).stats
    assert stats["load"].tolist() == [1.0, 0.0, 0.0]
    assert stats["entropy"].item() == pytest.approx(math.log(2) / 2)
    assert stats["dropped"] == stats["nonfinite"] == 0
    assert route(logits, config(2)).stats["dropped"] == 1 / 4    # the second token's second weight underflows to 0
    assert not any(value.requires_grad for value in stats.values())


# --- order ----------------------------------------------------------------------------------------------------------


def test_equal_logits_choose_the_lowest_index_first():
    logits = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0], [0.0, -0.0, 0.0, -0.0, 0.0]])
    assert route(logits, config(4)).experts.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


@pytest.mark.parametrize(("e", "k"), [(1, 1), (7, 3), (60, 8), (60, 60)])
def test_top_k_agrees_with_a_stable_sort_of_all_experts(e, k):
    scores = random_logits(50, e).mul(2).round()                 # many ties
    assert torch.equal(top_k(scores, k).long(), scores.argsort(stable=True, descending=True)[:, :k])


def test_rows_stand_in_expert_order_and_ties_in_token_order():
    experts = torch.tensor([[2, 0], [0, 1], [2, 1]])
    counts, offsets, token, slot = place(experts, 4)
    assert counts.tolist() == [2, 2, 2, 0] and offsets.tolist() == [2, 4, 6, 6]
    assert token.tolist() == [0, 1, 1, 2, 0, 2]                  # expert 0: tokens 0, 1; 1: 1, 2; 2: 0, 2
    assert slot.tolist() == [[4, 0], [1, 2], [5, 3]]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("n", "e", "k"), [(0, 4, 2), (1, 1, 1), (1, 9, 9), (64, 7, 3), (33, 60, 8), (20, 40, 40)])
@pytest.mark.parametrize("renormalize", [True, False])
def test_every_policy_keeps_the_contract_for_any_number_of_tokens_and_experts(name, n, e, k, renormalize):
    k = 1 if name == "switch" else k
    routing = route(random_logits(n, e), config(k, name, renormalize=renormalize), ids(n))
    check(routing, n, e)
    assert routing.experts.shape == (n, min(e, 2 * k) if name == "expert_choice" else k)
    assert all(loss.isfinite() for loss in routing.losses.values())


def test_a_broken_plan_does_not_pass_the_contract_check():
    for field in ("counts", "offsets", "slot", "token", "experts", "demand"):
        routing = route(random_logits(), config(3))
        broken = getattr(routing, field).clone()
        setattr(routing, field, broken)
        broken.view(-1)[:2] = broken.view(-1)[:2].flip(0) + 1
        with pytest.raises(AssertionError):
            check(routing, 64, 7)


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["balance", "z"])
def test_the_gradient_of_each_loss_reaches_the_logits_and_a_gate_weight(loss):
    gate = random_logits(5, 7).requires_grad_()
    route(random_logits(64, 5, seed=1) @ gate, config(2)).losses[loss].backward()
    assert gate.grad.isfinite().all() and (gate.grad.abs().sum(0) > 0).all()


def test_a_step_along_the_balance_gradient_evens_the_load():
    logits = (random_logits() + torch.linspace(1, -1, 7)).requires_grad_()
    before = route(logits, config(2))
    (gradient,) = torch.autograd.grad(before.losses["balance"], logits)
    after = route((logits - 200 * gradient).detach(), config(2))
    assert after.losses["balance"] < before.losses["balance"] and after.stats["load"].std() < before.stats["load"].std()


@pytest.mark.parametrize("renormalize", [True, False])
def test_weight_gradients_agree_with_finite_differences(renormalize):
    logits = random_logits(3, 6).double().requires_grad_()       # below the float32 entry check, straight to the policy

    def losses(x):
        choice = POLICIES["softmax"](x, config(2, renormalize=renormalize), Context())
        demand = torch.bincount(choice.experts.flatten(), minlength=6)
        return choice.weights, balance_loss(choice.probs, demand), z_loss(x)

    assert torch.autograd.gradcheck(losses, logits)


def test_gather_and_combine_are_each_others_gradient():
    plan = route(random_logits(10, 5), config(3))
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
    plan = route(random_logits(n, 6), config(4))
    x = torch.randn(n, 8).to(dtype)
    y = combine(gather(x, plan.slot), plan.slot)
    assert y.dtype == dtype and torch.equal(y, 4 * x)


# --- causality and bad rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, choose in POLICIES.items() if choose.causal])
@pytest.mark.parametrize("fields", [{}, dict(router_noise=1.0), dict(balance_scope="sequence")])
@pytest.mark.parametrize("training", [True, False])
def test_a_causal_policy_gives_an_early_token_nothing_from_later_ones_by_value_and_by_gradient(name, fields, training):
    logits, how = random_logits().requires_grad_(), config(1 if name == "switch" else 2, name, **fields)
    context = Context(ids(64).ids, 16, training, bias=torch.linspace(-0.1, 0.1, 7))
    assert router.check_causal(logits, how, context)
    weights = route(logits, how, context).weights
    if name in ("hash", "random"):
        assert not weights.requires_grad                         # nothing learnt, nothing to leak
    else:
        (gradient,) = torch.autograd.grad(weights[:32].square().sum(), logits)
        assert gradient[:32].abs().sum() > 0 and gradient[32:].abs().sum() == 0


def test_the_causality_check_catches_a_policy_that_looks_ahead(monkeypatch):
    def peek(logits, config, context):
        return router.softmax(logits + logits.sum(0), config, context)

    monkeypatch.setitem(POLICIES, "peek", peek)
    assert not router.check_causal(random_logits(), config(2, "peek"), Context())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_with_nan_or_infinity_is_counted_and_leaves_the_others_alone(bad):
    logits = random_logits()
    clean = route(logits, config(3))
    logits[5, 2], logits[9] = bad, bad
    logits.requires_grad_()
    routing = route(logits, config(3))
    check(routing, 64, 7)
    others = [n for n in range(64) if n not in (5, 9)]
    assert routing.stats["nonfinite"] == 2
    assert routing.experts[[5, 9]].tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(routing.weights[[5, 9]], torch.full((2, 3), 1 / 3))
    assert torch.equal(routing.weights[others], clean.weights[others])
    sum([routing.weights.square().sum(), *routing.losses.values()]).backward()
    assert logits.grad.isfinite().all() and (logits.grad[[5, 9]] == 0).all()


@pytest.mark.parametrize("name", POLICIES)
def test_no_tokens_at_all_cost_nothing(name):
    routing = route(torch.zeros(0, 4), config(1, name), ids(0))
    assert routing.losses["balance"] == routing.losses["z"] == routing.stats["entropy"] == routing.stats["dropped"] == 0


def test_logits_that_are_not_float32_and_an_impossible_k_are_refused():
    with pytest.raises(AssertionError, match="float32"):
        route(torch.zeros(2, 4, dtype=torch.bfloat16), config(1))
    with pytest.raises(AssertionError, match="between 1 and E"):
        route(torch.zeros(2, 4), config(5))


# --- a new idea -----------------------------------------------------------------------------------------------------


def test_a_policy_of_ones_own_is_one_function_and_one_decorator():
    @router.policy("own")
    def own(logits, config, context):
        scores = logits.relu() + 1e-3
        experts = top_k(scores, config.top_k)
        return Choice(experts, scores.gather(1, experts), scores / scores.sum(-1, keepdim=True))

    try:
        logits = random_logits()
        routing = route(logits, config(2, "own"))
        check(routing, 64, 7)
        assert router.check_causal(logits, config(2, "own"), Context())
        torch.testing.assert_close(routing.weights, logits.relu().topk(2).values + 1e-3)
        assert router.describe("own").startswith("own")          # without a docstring, too
    finally:
        del POLICIES["own"]


def test_running_the_file_checks_and_compares_every_policy(capsys):
    router.main([])
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in POLICIES)


def test_list_names_every_policy_with_its_paper_on_a_line_of_its_own(capsys):
    router.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(POLICIES) and max(map(len, lines)) <= 140
    assert all("(" in line for line in lines if not line.startswith("random"))


@pytest.mark.parametrize("name", POLICIES)
def test_policy_shows_the_load_of_one_router(name, capsys):
    router.main(["--policy", name])
    out = capsys.readouterr().out
    load = router.try_policy(name).stats["load"]
    assert f"{load.max():.2%}" in out and out.count("#\n") == 17 and load.sum() <= 1.0001


def test_a_misspelt_policy_gets_one_line_with_the_nearest_name():
    with pytest.raises(BadInput, match="did you mean softmax"):
        router.main(["--policy", "softmaks"])


def test_the_file_runs_without_triton(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)             # import triton now raises ImportError
    monkeypatch.setattr(sys, "argv", ["router.py"])
    runpy.run_path(router.__file__, run_name="__main__")
    assert "softmax" in capsys.readouterr().out
    assert runpy.run_path(router.__file__)["triton"] is None
