"""The strategies that are not the paper's, against slow references and recorded codes."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TESTS, random_codes, sample_section, teacher_forced, tiny_transformer, torch_model

import drr
from support import common
from tools import strategies

N, D = 16, 4
COND = torch.tensor([[1], [2], [3]])
REGION = torch.arange(N) < 7
SAMPLING = drr.Sampling(0.7, 1.8, 0, 1.0)

CASES = {
    "paper": {},
    "Top-C": {"draft_pool": 0.0},
    "growing": {"draft_growing": True, "t_draft": 5},
    "ramp": {"draft_ramp": True, "draft_guidance": 3.0},
    "growing ramp": {"draft_ramp": True, "draft_growing": True, "draft_guidance": 3.0, "t_draft": 6},
    "Sobol": {"order": "sobol"},
    "Sobol growing": {"order": "sobol", "draft_growing": True, "t_draft": 5},
    "better": {"revise_better": True, "t_revise": 3},
    "least likely half": {"revise_share": 0.5},
    "least likely third, better": {"revise_share": 0.3, "revise_better": True, "t_revise": 4, "rounds": 3},
    "all": {"order": "sobol", "draft_growing": True, "draft_ramp": True, "draft_pool": 0.5,
            "draft_guidance": 2.0, "revise_share": 0.6, "revise_better": True, "t_draft": 6, "t_revise": 3},
}


@pytest.fixture(scope="module")
def model():
    return torch_model(tiny_transformer(N, D))


def decode(model, seed=0, images=range(3), codes=None, region=None, update=drr.update, **settings):
    c = sample_section(**settings)
    noise = drr.draw_noise(seed, images, 1 + c.rounds, N, D)
    return list(strategies.decode(model, COND[list(images)], noise, c, codes, region, update))


def empty():
    return drr.State("draft", 0, torch.zeros(3, N, D, dtype=torch.int64), torch.ones(3, N, dtype=torch.bool),
                     torch.zeros(3, N))


# === Parity =================================================================================================
RECORDED = np.load(TESTS / "fixtures" / "strategies.npz")


@pytest.mark.parametrize("name", [name for name in CASES if name in RECORDED])
def test_draws_the_codes_it_drew_before_the_move(model, name):
    """Recorded with the code of commit 170e051, for seeds 0 and 1, which have no near ties: the codes are the
    same in float64 and with weights changed by 3e-6 of themselves."""
    c = sample_section(**CASES[name])
    for seed in (0, 1):
        codes = strategies.sample(model, COND, seed, range(3), c)
        assert np.array_equal(codes, RECORDED[name][seed])
        inside = strategies.sample(model, COND, seed, range(3), c, random_codes(3, N, D, seed=8), REGION)
        assert np.array_equal(inside, RECORDED[f"{name}, region"][seed])


@pytest.mark.parametrize("settings", [{}, {"t_draft": 5, "revise_guidance": 1.0}, {"rounds": 0, "top_k": 3}])
def test_without_keys_of_its_own_it_is_draft_and_revise(model, settings):
    c = sample_section(**settings)
    noise = drr.draw_noise(2, range(3), 1 + c.rounds, N, D)
    expected = list(drr.draft_and_revise(model, COND, noise, c))
    for ours, theirs in zip(strategies.decode(model, COND, noise, c), expected, strict=True):
        assert ours[:2] == theirs[:2] and all(torch.equal(a, b) for a, b in zip(ours[2:], theirs[2:]))
    assert torch.equal(drr.sample(model, COND, 2, range(3), c), expected[-1].codes)


# === Which sets =============================================================================================
@pytest.mark.parametrize("n, T", [(n, T) for n in (1, 2, 7, 16, 64) for T in (1, 2, 3, 5, 16, 64, 100)])
def test_growing_partition_covers_every_position_once_in_as_many_sets(n, T):
    order, _ = drr.draw_noise(3, range(4), 1, n, 1)
    sets = strategies.growing_partition(order[0], T)
    sizes = [s.shape[1] for s in sets]
    assert torch.equal(torch.cat(sets, 1), order[0])
    assert len(sets) == min(n, T) and min(sizes) >= 1
    left = n - torch.tensor(sizes).cumsum(0)
    for t in range(1, len(sets)):
        assert left[t - 1] == min(n - t, n - round(n * (1 - math.cos(math.pi * t / (2 * min(n, T))))))


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 7, 8, 16])
def test_sobol_order_is_a_permutation_that_starts_where_the_random_one_does(side):
    order, _ = drr.draw_noise(1, range(5), 2, side * side, 1)
    spread = strategies.sobol_order(order)
    assert spread.shape == order.shape and torch.equal(spread[..., 0], order[..., 0])
    assert torch.equal(spread.sort(-1).values, torch.arange(side * side).expand_as(order))


def test_sobol_order_spreads_every_run_evenly():
    base = strategies.sobol_order(torch.arange(64))                            # starts at 0: nothing is moved
    for size, block in ((4, 4), (16, 2)):                  # runs of 4 or 16, one in each block of cells
        for run in base.split(size):
            blocks = run // 8 // block * 8 + run % 8 // block
            assert len(blocks.unique()) == size
    moved = strategies.sobol_order(torch.cat([torch.tensor([19]), torch.arange(63)]))
    assert torch.equal(moved // 8, (base // 8 + 2) % 8) and torch.equal(moved % 8, (base % 8 + 3) % 8)


def test_revise_share_draws_the_least_likely_stacks_only(model):
    drawn = []

    def update(model, state, positions, *rest):
        drawn.append(torch.zeros(3, N, dtype=torch.bool).scatter(1, positions, True))
        return drr.update(model, state, positions, *rest)
    states = decode(model, seed=2, t_draft=4, t_revise=2, rounds=1, revise_share=0.3, update=update)
    count = math.ceil(0.3 * N)
    doubtful = torch.zeros(3, N, dtype=torch.bool).scatter(1, states[3].log_p.argsort(1)[:, :count], True)
    assert len(states) == 6 and torch.equal(drawn[4] | drawn[5], doubtful)
    assert not (drawn[4] & drawn[5]).any()


# === Which stacks stay ======================================================================================
@pytest.mark.parametrize("pool", [0.0, 0.5])
@pytest.mark.parametrize("growing", [False, True])
def test_a_smaller_pool_keeps_the_first_of_the_most_likely_of_fresh_stacks(model, pool, growing):
    order, uniforms = drr.draw_noise(4, range(3), 1, N, D)
    states = decode(model, seed=4, t_draft=5, rounds=0, draft_pool=pool, draft_growing=growing)
    partition = strategies.growing_partition if growing else drr.partition
    before = empty()
    for t, (positions, after) in enumerate(zip(partition(order[0], 5), states, strict=True)):
        count = positions.shape[1]
        hidden = [[n for n in order[0, b].tolist() if before.hidden[b, n]] for b in range(3)]
        drawn = drr.update(model, before, torch.tensor(hidden), strategies.fresh(uniforms[0], t), COND,
                           drr.Sampling(1.0, 1.0, 0, 1.0))
        for b in range(3):                                                 # a slow reference, a row at a time
            likely = sorted(hidden[b], key=lambda n: -drawn.log_p[b, n])
            among = likely[:max(count, math.ceil(pool * len(likely)))]
            chosen = sorted([n for n in hidden[b] if n in among][:count])
            assert chosen == (before.hidden[b] & ~after.hidden[b]).nonzero()[:, 0].tolist()
            assert torch.equal(after.codes[b, chosen], drawn.codes[b, chosen])
        before = after
    assert not states[-1].hidden.any()


@pytest.mark.parametrize("pool, share", [(1.0, 0.49), (0.5, 0.87), (0.0, 0.98)])
def test_the_smaller_the_pool_the_more_the_likeliest_codes_pile_up(pool, share):
    """64 codes at 64 positions that do not depend on each other, one position an update. A pool that drew a
    hidden stack twice from the same number would leave the share of the likeliest code as it is, 0.49."""
    p = torch.cat([torch.tensor([0.49]), 0.51 * 0.2 * 0.8 ** torch.arange(63.0)])
    model = SimpleNamespace(context=lambda codes, hidden, cond, positions: torch.zeros(*positions.shape, 1),
                            depth_step=lambda h, stacks, d, cache: (p.log().expand(len(h), -1), None),
                            positions=64, depth=1, null=0)
    c = sample_section(t_draft=64, rounds=0, draft_pool=pool)
    codes = strategies.sample(model, torch.zeros(20, 1, dtype=torch.int64), 0, range(20), c)
    assert (codes == 0).float().mean() == pytest.approx(share, abs=0.03)


@torch.no_grad()
def test_revise_better_keeps_the_more_likely_of_old_and_new(model):
    codes, hidden = random_codes(3, N, D), torch.zeros(3, N, dtype=torch.bool)
    state = drr.State("revise", 1, codes, hidden, torch.zeros(3, N))
    positions, (_, uniforms) = torch.arange(0, N, 2).expand(3, -1), drr.draw_noise(0, range(3), 1, N, D)
    new = drr.update(model, state, positions, uniforms[0], COND, SAMPLING)
    kept = strategies.update_better(model, state, positions, uniforms[0], COND, SAMPLING)
    old_p, new_p = (teacher_forced(model.transformer, x, hidden, positions, COND, 1.8, 0.7)
                    for x in (codes, new.codes))
    torch.testing.assert_close(strategies.log_probability(model, state, positions, COND, SAMPLING), old_p,
                               atol=1e-4, rtol=0)
    stays = torch.zeros(3, N, dtype=torch.bool).scatter(1, positions, old_p > new_p)
    assert 0 < stays.sum() < 24                                                # some of either kind
    assert torch.equal(kept.codes, torch.where(stays[..., None], codes, new.codes))
    kept_p = kept.log_p.gather(1, positions)
    torch.testing.assert_close(kept_p, torch.maximum(old_p, new_p), atol=1e-4, rtol=0)


@torch.no_grad()
def test_old_stacks_count_what_top_k_and_top_p_leave(model):
    """A stack that was just drawn has the log-probability with which it was drawn."""
    positions, (_, uniforms) = torch.arange(0, N, 2).expand(3, -1), drr.draw_noise(0, range(3), 1, N, D)
    sampling = drr.Sampling(0.7, 1.8, 5, 0.8)
    state = drr.update(model, empty(), positions, uniforms[0], COND, sampling)
    again = strategies.log_probability(model, state, positions, COND, sampling)
    torch.testing.assert_close(again, state.log_p.gather(1, positions), atol=1e-4, rtol=0)


# === All of them ============================================================================================
@pytest.mark.parametrize("name", [name for name in CASES if name != "paper"])
def test_strategies_draw_the_same_stacks_in_any_batch_and_only_within_the_region(model, name):
    known = random_codes(3, N, D, seed=8)
    states = decode(model, seed=3, codes=known, region=REGION, **CASES[name])
    assert all(torch.equal(s.codes[:, ~REGION], known[:, ~REGION]) for s in states)
    assert not states[-1].hidden.any() and (states[-1].log_p != 0).equal(REGION.expand(3, N))
    alone = decode(model, seed=3, images=[2], codes=known[2:], region=REGION, **CASES[name])
    assert torch.equal(alone[-1].codes, states[-1].codes[2:])


@pytest.mark.parametrize("settings", [{"draft_pool": 0.5}, {"draft_growing": True}, {"draft_ramp": True}])
def test_updates_that_differ_are_not_compiled(model, settings):
    with pytest.raises(drr.UserError, match="alike"):
        decode(model, update=lambda *arguments: drr.update(*arguments), **settings)


# === Values =================================================================================================
def test_values_are_the_papers_unless_they_are_given():
    config = common.load_config("smoke")
    assert strategies.DEFAULTS.items() <= vars(strategies.sampling_values(config, [], 64)).items()
    c = strategies.sampling_values(config, ["order=sobol", "rounds=1", "draft_pool=0"], 64)
    assert (c.order, c.rounds, c.draft_pool, c.draft_growing) == ("sobol", 1, 0.0, False)
    config.sample.draft_growing = True                                     # an older checkpoint carries it
    assert strategies.sampling_values(config, [], 64).draft_growing is True


@pytest.mark.parametrize("overrides", [
    "order=sideways", "draft_pool=1.5", "revise_share=0", "draft_growing=perhaps", "order=[", "sobol",
    "rounds=-1", "order=sobol order=random"])
def test_mistaken_values_are_one_sentence(overrides):
    with pytest.raises(drr.UserError, match=f"^[^\\n]*{overrides.partition('=')[0]}[^\\n]*$"):
        strategies.sampling_values(common.load_config("smoke"), overrides.split(), 64)
