"""router.py, the policies: each by hand, noise, capacity, balance scopes, the selection bias, two processes."""

import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist
from conftest import random_logits

from router import POLICIES, Context, RouterConfig, route, update_bias


def two_experts(*p):
    """Logits of tokens that give expert 0 these probabilities and expert 1 the rest."""
    p = torch.tensor(p)
    return torch.stack([p, 1 - p], -1).log()


def close(x, expected):
    torch.testing.assert_close(x, torch.tensor(expected), rtol=1e-5, atol=1e-6)


# --- each policy by hand --------------------------------------------------------------------------------------------

QUARTERS = torch.tensor([[1.0, 2.0, 4.0, 1.0]]).log()             # probabilities 1/8, 2/8, 4/8, 1/8
SCORES = torch.tensor([[0.0, math.log(3), -math.log(4), math.log(2)]])                         # s = 1/2, 3/4, 1/5, 2/3
SHARES = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
ZEROS = torch.tensor([[0.0, -0.0, 0.0, -0.0]])
FLAT = dict(renormalize=False)

# what is shown: the logits of one token, policy, K, other fields, selection bias; then its experts and their weights
BY_HAND = {
    "softmax leaves probabilities": (QUARTERS, "softmax", 2, FLAT, None, [2, 1], [4 / 8, 2 / 8]),
    "or makes them sum to one": (QUARTERS, "softmax", 2, {}, None, [2, 1], [4 / 6, 2 / 6]),
    "a bias chooses": (QUARTERS, "softmax", 2, FLAT, [0.5, 0, 0, 0], [0, 2], [1 / 8, 4 / 8]),  # 5/8 before 4/8
    "and never weighs": (QUARTERS, "softmax", 2, {}, [0.5, 0, 0, 0], [0, 2], [1 / 5, 4 / 5]),
    "the lowest index comes first": (ZEROS, "softmax", 3, {}, None, [0, 1, 2], [1 / 3, 1 / 3, 1 / 3]),
    "probabilities that underflow are still shared out": (
        torch.tensor([[300.0, 0.0, 0.0]]), "softmax", 2, {}, [-2.0, 0, 0], [1, 2], [1 / 2, 1 / 2]),
    "switch keeps its probability": (QUARTERS, "switch", 1, FLAT, None, [2], [4 / 8]),
    "even renormalised": (QUARTERS, "switch", 1, {}, None, [2], [4 / 8]),
    "sigmoid leaves scores": (SCORES, "sigmoid", 2, FLAT, None, [1, 3], [3 / 4, 2 / 3]),
    "or divides by their sum": (SCORES, "sigmoid", 2, {}, None, [1, 3], [9 / 17, 8 / 17]),         # 9/12 and 8/12
    "its bias never weighs": (SCORES, "sigmoid", 2, {}, [0, -0.5, 0.4, 0], [3, 2], [10 / 13, 3 / 13]),
    "scores that underflow are still shared out": (
        torch.full((1, 4), -200.0), "sigmoid", 2, {}, None, [0, 1], [1 / 2, 1 / 2]),
    "top_p shares among the visited alone": (SHARES, "top_p", 3, dict(top_p=0.6), None, [0, 1, 2], [5 / 8, 3 / 8, 0.0]),
}


@pytest.mark.parametrize("what", BY_HAND)
def test_experts_and_weights_of_one_token_by_hand(what):
    logits, name, k, fields, bias, experts, weights = BY_HAND[what]
    routing = route(logits, RouterConfig(name, k, **fields), Context(bias=None if bias is None else torch.tensor(bias)))
    assert routing.experts.tolist() == [experts]
    close(routing.weights, [weights])


def test_balance_loss_sees_each_sigmoid_score_as_a_share_of_all_and_only_the_choices_that_top_p_uses():
    loss = route(SCORES, RouterConfig("sigmoid", 2)).losses["balance"]                  # shares 30, 45, 12 and 40 / 127
    assert loss.item() == pytest.approx(4 * (45 / 127 + 40 / 127) / 2)
    loss = route(SHARES, RouterConfig("top_p", 3, top_p=0.6)).losses["balance"]         # f = 1/2, 1/2, 0, 0
    assert loss.item() == pytest.approx(4 * (0.5 + 0.3) / 2)


@pytest.mark.parametrize(("p", "k", "visited"), [(0.4, 3, 1), (0.6, 3, 2), (0.9, 4, 3), (0.9, 2, 2), (1.0, 4, 4)])
def test_top_p_visits_experts_until_their_probability_reaches_p_and_at_most_k(p, k, visited):
    routing = route(SHARES, RouterConfig("top_p", k, top_p=p, renormalize=False))
    close(routing.weights[0], [0.5, 0.3, 0.15, 0.05][:visited] + [0.0] * (k - visited))
    assert routing.experts.tolist() == [list(range(k))] and routing.demand.sum() == visited
    assert routing.stats["load"].sum().item() == pytest.approx(visited / k) and routing.stats["dropped"] == 0


def test_expert_choice_gives_each_expert_its_likeliest_tokens_even_later_ones():
    config = RouterConfig("expert_choice", 1)                                                  # C = 4 * 1 / 2
    routing = route(two_experts(0.9, 0.8, 0.6, 0.3), config)
    assert routing.experts.tolist() == [[0, 1], [0, 1], [1, 0], [1, 0]]                        # two slots, one in use
    close(routing.weights, [[0.9, 0], [0.8, 0], [0.4, 0], [0.7, 0]])                           # token 2 wanted expert 0
    assert routing.demand.tolist() == [2, 2] and routing.stats["load"].tolist() == [1 / 4, 1 / 4]
    assert routing.stats["dropped"] == 0 and routing.losses["balance"].item() == pytest.approx(1)
    changed = route(two_experts(0.9, 0.8, 0.6, 0.95), config)                                  # token 3 turns to 0
    close(changed.weights[1], [0.2, 0.0])                                                      # token 1 is left to 1
    assert not POLICIES["expert_choice"].causal


def test_expert_choice_leaves_a_token_without_expert_and_drops_the_least_likely_beyond_two_k():
    probs = torch.tensor([[0.3, 0.29, 0.25, 0.16], [0.1, 0.1, 0.1, 0.7], [0.1, 0.1, 0.2, 0.6], [0.2, 0.1, 0.2, 0.5]])
    routing = route(probs.log(), RouterConfig("expert_choice", 1))   # C = 1: experts 0 to 2 take token 0, 3 takes 1
    close(routing.weights, [[0.3, 0.29], [0.7, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert routing.demand.tolist() == [1, 1, 0, 1] and routing.stats["dropped"] == 1 / 4


def murmur(x):
    """MurmurHash3's 32-bit finaliser, in Python's integers."""
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def test_hash_sends_a_token_id_to_the_same_experts_whatever_the_logits_and_the_neighbours():
    ids = torch.tensor([5, 0, 150_000, 5])
    expected = [sorted(range(8), key=lambda e: -murmur(8 * i + e))[:3] for i in ids.tolist()]
    for seed in (0, 1):
        routing = route(random_logits(4, 8, seed), RouterConfig("hash", 3), Context(ids=ids))
        assert routing.experts.tolist() == expected and (routing.weights == 1 / 3).all()
    alone = route(random_logits(1, 8), RouterConfig("hash", 3), Context(ids=ids[2:3]))
    assert alone.experts.tolist() == expected[2:3]


@pytest.mark.parametrize("name", ["hash", "random"])
def test_unlearnt_routers_use_all_experts_alike_and_have_a_constant_balance_loss(name):
    n, logits = 8000, random_logits(8000, 8) + torch.linspace(3, -3, 8)
    routing = route(logits.requires_grad_(), RouterConfig(name, 2), Context(ids=torch.arange(n)))
    expected, deviation = n * 2 / 8, math.sqrt(n * 1 / 4 * 3 / 4)                              # binomial, p = K / E
    assert (routing.counts - expected).abs().max() < 5 * deviation
    assert routing.losses["balance"].item() == pytest.approx(1) and not routing.losses["balance"].requires_grad


def test_random_draws_anew_each_time_and_again_from_the_same_seed():
    def experts(seed):
        torch.manual_seed(seed)
        return route(random_logits(), RouterConfig("random", 3)).experts.tolist()

    with torch.random.fork_rng():
        assert experts(0) == experts(0) != experts(1)


@pytest.mark.parametrize("name", ["softmax", "switch", "sigmoid", "top_p", "expert_choice"])
def test_noise_changes_the_choice_in_training_only_and_weighs_nothing(name):
    logits, k = random_logits(), 1 if name == "switch" else 2
    quiet, loud = RouterConfig(name, k, renormalize=False), RouterConfig(name, k, renormalize=False, router_noise=2.0)
    calm, written = route(logits, quiet, Context(training=True)), route(logits, loud)
    assert torch.equal(calm.experts, written.experts) and torch.equal(calm.weights, written.weights)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        trained = route(logits, loud, Context(training=True))
    assert (trained.experts != calm.experts).any()
    scores = logits.sigmoid() if name == "sigmoid" else logits.softmax(-1)
    clean = scores.gather(-1, trained.experts.long())             # of the logits without noise, where the slot is used
    torch.testing.assert_close(trained.weights, clean.where(trained.weights > 0, 0.0))


# --- capacity -------------------------------------------------------------------------------------------------------

def test_capacity_keeps_an_experts_first_tokens_and_gives_the_others_weight_0_and_no_gradient():
    logits = two_experts(0.9, 0.8, 0.7, 0.6).requires_grad_()     # all four want expert 0, which serves 4 * 1 / 2
    routing = route(logits, RouterConfig("switch", 1, capacity_factor=1.0), Context(training=True))
    close(routing.weights.detach(), [[0.9], [0.8], [0.0], [0.0]])
    assert routing.stats["dropped"] == 1 / 2 and routing.counts.tolist() == routing.demand.tolist() == [4, 0]
    routing.weights.sum().backward()
    assert (logits.grad[:2] != 0).all() and (logits.grad[2:] == 0).all()


@pytest.mark.parametrize(("factor", "kept"), [(0.1, 1), (0.5, 1), (0.51, 2), (1.5, 3), (2.0, 4), (9.0, 4), (None, 4)])
def test_an_expert_serves_the_ceiling_of_factor_times_an_even_share(factor, kept):
    logits = two_experts(0.9, 0.8, 0.7, 0.6)                      # an even share is 2
    config = RouterConfig("switch", 1, capacity_factor=factor, eval_capacity_factor=0.1)
    assert (route(logits, config, Context(training=True)).weights > 0).sum() == kept
    assert (route(logits, config).weights > 0).sum() == 1         # outside training the other factor counts


@pytest.mark.parametrize(("second", "weights"), [(QUARTERS, [0.0, 2 / 6]), (QUARTERS.flip(-1), [4 / 6, 0.0])])
def test_weights_that_stay_are_not_renormalised_when_another_is_dropped(second, weights):
    first = torch.tensor([[2.0, 1.0, 4.0, 1.0]]).log()            # visits 2 and 0; the second token 2 1, or 1 2
    routing = route(torch.cat([first, second]), RouterConfig("softmax", 2, capacity_factor=0.5), Context(training=True))
    close(routing.weights, [[4 / 6, 2 / 6], weights])             # C = 1: expert 2 is taken


def test_unused_slots_of_top_p_take_no_place_from_others():
    config = RouterConfig("top_p", 2, top_p=0.4, eval_capacity_factor=0.5, renormalize=False)                    # C = 1
    for other in ([3, 2, 1, 0], [1, 0, 2, 3]):                    # token 1 visits expert 3; 1, where token 0 idles
        routing = route(torch.cat([SHARES, SHARES[:, other]]), config)
        close(routing.weights, [[0.5, 0.0], [0.5, 0.0]])
        assert routing.stats["dropped"] == 0


def test_under_a_capacity_no_later_token_evicts_an_earlier_one():
    config = RouterConfig("softmax", 2, capacity_factor=0.5)
    logits, context = random_logits() + torch.linspace(2, -2, 7), Context(training=True)
    changed = torch.cat([logits[:32], 5 * random_logits(32, seed=1)])
    first, second = route(logits, config, context), route(changed, config, context)
    assert (first.weights[:32] == 0).any() and torch.equal(first.weights[:32], second.weights[:32])


def test_under_a_capacity_another_sequence_of_the_batch_and_its_size_do_change_a_tokens_output():
    config = RouterConfig("switch", 1, eval_capacity_factor=1.0)
    sequence, other, calm = two_experts(0.9, 0.8), two_experts(0.9, 0.9), two_experts(0.1, 0.1)

    def weights(*sequences):
        return route(torch.cat(sequences), config).weights.flatten()

    close(weights(calm, sequence)[2:], [0.9, 0.8])
    close(weights(other, sequence)[2:], [0.0, 0.0])               # the sequence before it filled expert 0
    close(weights(sequence), [0.9, 0.0])                          # alone: C = 1
    close(weights(sequence, calm)[:2], [0.9, 0.8])                # with later tokens that go elsewhere: C = 2


# --- balance: three scopes ------------------------------------------------------------------------------------------

# Two sequences of two tokens, K = 1: the first goes to expert 0 at p = 3/4, the second to expert 1 at p = 3/4.
SPLIT = two_experts(0.75, 0.75, 0.25, 0.25)


@pytest.mark.parametrize(("scope", "n", "training", "load", "loss"), [
    ("micro_batch", 4, True, [0, 4], 1),             # f = P = 1/2, 1/2
    ("sequence", 4, True, [0, 4], 1.5),              # in each f = 1, 0 and P = 3/4, 1/4: 2 * 3/4
    ("global", 4, True, [0, 4], 1),                  # f = (2 + 0, 2 + 4) / 8, but P is even: 2 * (1/4 + 3/4) / 2
    ("global", 2, True, [0, 6], 2 * (2 / 8 * 3 / 4 + 6 / 8 * 1 / 4)),               # the first sequence alone
    ("global", 2, True, None, 1.5),                  # the first micro-batch of a step
    ("global", 2, False, [0, 6], 1.5),               # outside training earlier micro-batches do not count
])
def test_the_balance_loss_of_two_sequences_that_are_skewed_against_each_other(scope, n, training, load, loss):
    context = Context(seq_len=2, training=training, load=None if load is None else torch.tensor(load))
    routing = route(SPLIT[:n], RouterConfig("switch", 1, balance_scope=scope), context)
    assert routing.losses["balance"].item() == pytest.approx(loss)


def one_rank(rank, file):
    """The global balance loss of one sequence of SPLIT, and a bias update, as one of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    routing = route(SPLIT[2 * rank:2 * rank + 2], RouterConfig("switch", 1, balance_scope="global"),
                    Context(training=True, load=torch.tensor([0, 2 * rank])))
    bias = update_bias(torch.zeros(2), routing.demand + torch.tensor([0, 2 * rank]), 0.1)
    dist.destroy_process_group()
    return routing.losses["balance"].item(), bias.tolist()


@pytest.mark.slow
def test_two_processes_balance_over_the_load_of_both(tmp_path):
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        (first, *moved), (second, *again) = pool.map(one_rank, range(2), [tmp_path / "store"] * 2)
    assert first == pytest.approx(2 * (2 / 6 * 3 / 4 + 4 / 6 * 1 / 4))                         # demand 2 2, earlier 0 2
    assert second == pytest.approx(2 * (2 / 6 * 1 / 4 + 4 / 6 * 3 / 4))
    assert moved == again == [pytest.approx([0.1, -0.1])]


# --- the selection bias ---------------------------------------------------------------------------------------------

def test_the_bias_moves_one_step_against_the_load_and_stays_centred():
    bias = torch.zeros(4)
    assert update_bias(bias, torch.tensor([6, 2, 4, 0]), 0.1) is bias                          # mean 3: - + - +
    close(bias, [-0.1, 0.1, -0.1, 0.1])
    update_bias(bias, torch.tensor([9, 1, 1, 1]), 0.1)            # - + + +, mean +0.05: -0.15 0.05 0.05 0.05
    close(bias, [-0.25, 0.15, -0.05, 0.15])
    close(update_bias(bias.clone(), torch.tensor([3, 3, 3, 3]), 0.1), bias.tolist())


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_the_bias_evens_a_skewed_load_without_any_loss(name):
    logits, bias = random_logits(512) + torch.linspace(1, -1, 7), torch.zeros(7)

    def demand():
        return route(logits, RouterConfig(name, 2), Context(bias=bias)).demand

    before = demand()
    for _ in range(200):
        update_bias(bias, demand(), 0.005)
    assert before.max() > 1.5 * before.float().mean() and demand().max() < 1.1 * demand().float().mean()
