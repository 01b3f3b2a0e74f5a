"""Draft-and-Revise: who is hidden when, who is drawn anew, and that the draws have the right distribution."""
import itertools
import re

import pytest
import torch
from conftest import TESTS, random_codes, sample_section, tiny_transformer, torch_model
from safetensors.torch import load_file

import drr

N, D = 16, 4


def decode(model, cond, seed=0, images=None, codes=None, region=None, positions=N, depth=D, **settings):
    c = sample_section(**settings)
    images = range(len(cond)) if images is None else images
    noise = drr.draw_noise(seed, images, 1 + c.rounds, positions, depth)
    return list(drr.draft_and_revise(model, cond, noise, c, codes, region))


# === Partition and noise ====================================================================================
@pytest.mark.parametrize("n, T", [(n, T) for n in (1, 2, 7, 16, 64) for T in (1, 2, 3, 5, 16, 64, 100)])
def test_partition_covers_every_position_once_in_sets_of_nearly_equal_size(n, T):
    order, _ = drr.draw_noise(3, range(4), 1, n, 1)
    sets = drr.partition(order[0], T)
    assert len(sets) == min(n, T)
    assert torch.equal(torch.cat(sets, 1).sort(1).values, torch.arange(n).expand(4, n))
    sizes = [s.shape[1] for s in sets]
    assert max(sizes) - min(sizes) <= 1


def test_noise_of_an_image_depends_on_seed_and_index_alone_and_more_rounds_extend_it():
    order, uniforms = drr.draw_noise(7, [0, 1, 2, 3], 3, N, D)
    for images in ([3], [2, 3], [3, 0]):
        other_order, other_uniforms = drr.draw_noise(7, images, 3, N, D)
        assert torch.equal(other_order, order[:, images])
        assert torch.equal(other_uniforms, uniforms[:, images])
    assert not torch.equal(drr.draw_noise(8, [0], 3, N, D)[1], uniforms[:, :1])
    assert len(torch.unique(uniforms[:, :, 0, 0])) == 3 * 4       # three rounds of four images
    assert not torch.equal(order[0], order[1])
    few_orders, few_uniforms = drr.draw_noise(7, [0, 1, 2, 3], 1, N, D)
    assert torch.equal(few_orders, order[:1]) and torch.equal(few_uniforms, uniforms[:1])


# === Drawing one code =======================================================================================
def test_inverse_cdf_draws_each_index_as_often_as_its_probability():
    p = torch.tensor([0.05, 0.0, 0.4, 0.15, 0.4])
    n = 10_000
    grid = (torch.arange(n) + 0.5) / n                            # a fine grid: no chance in it
    share = torch.bincount(drr.inverse_cdf(p.expand(n, -1), grid), minlength=5) / n
    assert torch.all((share - p).abs() <= 1.5 / n)


@pytest.mark.parametrize("u", [0.0, 0.25, 0.5, 1 - 2 ** -24])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_inverse_cdf_never_draws_what_has_no_probability(u, scale):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(2000, 50, generator=generator)
    p[torch.rand(2000, 50, generator=generator) < 0.7] = 0        # often at the beginning and at the end
    p[:, 25] += 0.01
    k = drr.inverse_cdf(p * scale, torch.full((2000,), u))
    assert torch.all(p.gather(1, k[:, None]) > 0)
    if u == 0:
        assert torch.equal(k, (p > 0).int().argmax(1))            # the first that has any


def how(temperature=1.0, guidance=1.0, top_k=0, top_p=1.0):
    return drr.Sampling(temperature, guidance, top_k, top_p)


def test_probabilities_agree_with_the_official_filters():
    fixture = load_file(TESTS / "fixtures" / "rqtransformer.safetensors")
    logits, names = fixture["filter.logits"], [k for k in fixture if k.startswith("filter.probs")]
    assert len(names) == 4
    for name in names:
        t, k, p = re.fullmatch(r"filter\.probs_T(.+)_k(.+)_p(.+)", name).groups()
        top_k = 0 if k == "None" else int(k)
        top_p = 1.0 if p == "None" else float(p)
        ours = drr.probabilities(logits, how(float(t), 1.0, top_k, top_p))
        ours /= ours.sum(-1, keepdim=True)
        assert torch.equal(ours > 0, fixture[name] > 0), name
        torch.testing.assert_close(ours, fixture[name], atol=1e-5, rtol=0)


def test_top_k_keeps_so_many_codes_even_where_more_are_as_likely_and_top_p_at_least_one():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 0.0, 2.0]])
    less_likely = logits < logits.amax(1, keepdim=True)
    for cut, count in ((how(top_k=1), 1), (how(top_k=2), 2), (how(top_k=3), 3), (how(top_p=1e-6), 1)):
        kept = drr.probabilities(logits, cut) > 0
        assert kept.sum(1).tolist() == [count] * 2 and not (kept & less_likely).any()
    torch.testing.assert_close(drr.probabilities(logits, how(top_k=9)), logits.softmax(-1))


# === What reaches the networks: a fake model that keeps a diary =============================================
class FakeModel:
    """Records what it is asked. Its logits are random numbers but depend on condition and depth alone."""

    null, K = 9, 6

    def __init__(self):
        self.masks, self.seen, self.conds, self.depth_rows = [], [], [], []

    def logits(self, cond, d):
        return torch.randn(self.K, generator=torch.Generator().manual_seed(100 * int(cond) + d))

    def context(self, codes, mask, cond, positions):
        self.masks.append(mask.clone())
        self.seen.append(codes.clone())
        self.conds.append(cond[:, 0].clone())
        return cond[:, :, None].float().expand(-1, positions.shape[1], 3).clone()  # h is the condition

    def depth_step(self, h, stacks, d, cache):
        assert (cache is None) == (d == 0)
        self.depth_rows.append(len(h))
        return torch.stack([self.logits(c, d) for c in h[:, 0]]), "cache"


COND = torch.tensor([[1], [2], [3]])


def test_draft_hides_what_is_not_drawn_yet_and_revise_only_the_current_set():
    model = FakeModel()
    states = decode(model, COND, seed=5, t_draft=4, t_revise=2, rounds=2, revise_guidance=1.0)
    order, _ = drr.draw_noise(5, range(3), 3, N, D)
    draft, expected = drr.partition(order[0], 4), []
    for t in range(4):
        later = torch.cat(draft[t:], 1)                           # set t and all that come after it
        expected.append(torch.zeros(3, N, dtype=torch.bool).scatter(1, later, True))
    for round in (1, 2):
        for current in drr.partition(order[round], 2):
            expected.append(torch.zeros(3, N, dtype=torch.bool).scatter(1, current, True))
    for mask, correct in zip(model.masks, expected, strict=True):
        assert torch.equal(mask, correct)
    # The depth transformer sees the current set alone: B n_t rows at each depth.
    assert model.depth_rows == [3 * 4] * 4 * D + [3 * 8] * 2 * 2 * D
    phases = [(state.phase, state.round) for state in states]
    assert phases == [("draft", 0)] * 4 + [("revise", 1)] * 2 + [("revise", 2)] * 2
    assert [int(s.hidden[0].sum()) for s in states] == [12, 8, 4, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("draft, revise", [(1.0, 1.0), (1.0, 1.8), (1.5, 1.0), (0.0, 0.5)])
def test_guidance_doubles_the_batch_only_in_the_phase_that_has_it(draft, revise):
    model = FakeModel()
    decode(model, COND, t_draft=4, t_revise=2, rounds=1, draft_guidance=draft, revise_guidance=revise)
    rows = [len(c) for c in model.conds]
    assert rows == [6 if draft != 1 else 3] * 4 + [6 if revise != 1 else 3] * 2
    for cond in model.conds:
        assert cond.tolist() == ([1, 2, 3] if len(cond) == 3 else [1, 2, 3, 9, 9, 9])


# === In-painting ============================================================================================
@pytest.mark.parametrize("t_draft, t_revise, draft_rows, revise_rows", [
    (2, 3, [9] * 2, [6] * 3), (64, 64, [3] * 6, [3] * 6)])
def test_repainting_hides_and_draws_the_region_only(t_draft, t_revise, draft_rows, revise_rows):
    model, known = FakeModel(), random_codes(3, N, D, codebook_size=6)
    region = torch.arange(N) % 3 == 0                             # 6 positions
    *_, last = decode(model, COND, codes=known, region=region, t_draft=t_draft, t_revise=t_revise, rounds=1,
                      revise_guidance=1.0)
    assert torch.equal(model.masks[0], region.expand(3, N))
    for codes in (*model.seen, last.codes):
        assert torch.equal(codes[:, ~region], known[:, ~region])
    assert not torch.stack(model.masks)[:, :, ~region].any() and not last.hidden.any()
    assert model.depth_rows[::D] == draft_rows + revise_rows
    assert torch.equal(torch.stack(model.masks[len(draft_rows):]).sum(0), region.expand(3, N).long())
    # A stack stays as it was with a probability of 6^-4 or so: all six of a picture do not.
    assert torch.all((last.codes != known).any(-1).any(1))


# === The same picture whatever the batch ====================================================================
# In float64, whose rounding decides no draw: on every CPU and in every batch.
def test_codes_of_an_image_do_not_depend_on_its_batch():
    model = torch_model(tiny_transformer(N, D).double())
    together = decode(model, COND, seed=3)[-1].codes
    for images in ([0], [1], [2, 0], [1, 2, 0]):
        codes = decode(model, COND[images], seed=3, images=images)[-1].codes
        assert torch.equal(codes, together[images])
    assert not torch.equal(decode(model, COND, seed=4)[-1].codes, together)


def test_golden_codes():
    """Recorded once from weights that are formulas: a change of any rule of decoding shows here."""
    codebook = torch.sin(torch.arange(12 * 4.0) * 1.7).view(12, 4)
    transformer = tiny_transformer(4, 2, classes=3, codebook_size=12, code_dim=4)
    transformer.codebook.copy_(codebook)
    with torch.no_grad():
        for i, p in enumerate(transformer.parameters()):
            p.copy_(0.7 * torch.sin(torch.arange(p.numel()) * (1 + 0.1 * i) + i).view(p.shape))
    model, cond = torch_model(transformer.double()), torch.tensor([[0], [2]])
    states = decode(model, cond, seed=980, positions=4, depth=2, t_draft=2, t_revise=2, rounds=1)
    drafts = [[[4, 4], [11, 11], [4, 4], [4, 5]], [[4, 11], [3, 4], [3, 5], [4, 4]]]
    results = [[[4, 4], [11, 4], [4, 4], [5, 4]], [[4, 5], [3, 4], [11, 4], [11, 5]]]
    assert states[1].codes.tolist() == drafts and states[-1].codes.tolist() == results


# === The right distribution =================================================================================
@pytest.mark.parametrize("T", [1, 2])
def test_drawn_stacks_follow_the_product_of_the_models_own_conditionals(T):
    """N = 2, D = 2, K = 3: position 0, then position 1 given 0 (T = 2), or both given nothing (T = 1). All 81
    outcomes against their exact probabilities, the uniforms from a Sobol sequence: no chance in it."""
    transformer, B = tiny_transformer(2, 2, codebook_size=3, code_dim=4, seed=1), 2 ** 13
    model = torch_model(transformer)
    uniforms = torch.quasirandom.SobolEngine(4).draw(B).view(B, 2, 2)  # (B, N, D)
    cond = torch.zeros(B, 1, dtype=torch.int64)
    order = torch.tensor([0, 1]).expand(1, B, 2)
    *_, last = drr.draft_and_revise(model, cond, (order, uniforms[None]), sample_section(t_draft=T, rounds=0))
    index = (last.codes.flatten(1) * torch.tensor([27, 9, 3, 1])).sum(1)
    share = torch.bincount(index, minlength=81) / B

    exact = torch.ones(81)
    for i, (a, b, c, d) in enumerate(itertools.product(range(3), repeat=4)):
        codes = torch.tensor([[[a, b], [c, d]]])
        for n, mask in ((0, [[True, True]]), (1, [[T == 1, True]])):
            h = transformer.context(codes, torch.tensor(mask), cond[:1])[:, n]
            log_p = transformer.depth_logits(h, codes[:, n]).log_softmax(-1)[0]
            exact[i] *= torch.exp(log_p[0, codes[0, n, 0]] + log_p[1, codes[0, n, 1]])
    assert abs(exact.sum() - 1) < 1e-5
    assert (share - exact).abs().max() < 2e-3 and (share - exact).abs().sum() < 0.02
    # A single code drawn without regard to what was drawn before it would show:
    first, second = exact.view(3, 27).sum(1), exact.view(3, 3, 9).sum((0, 2))
    assert (first[:, None] * second - exact.view(3, 3, 9).sum(2)).abs().sum() > 0.05


# === The log-probability of a stack =========================================================================
def test_log_p_counts_what_top_k_and_top_p_leave():
    """FakeModel's logits depend on condition and depth alone, so that each code's probability is known."""
    model, n = FakeModel(), 500
    grid = ((torch.arange(n) + 0.5) / n)[:, None].expand(n, 2)
    stacks, log_p = drr.sample_stacks(model, torch.full((n, 3), 2.0), grid, how(0.8, 1.0, 5, 0.8))
    expected = torch.zeros(n)
    for d in range(2):
        p = drr.probabilities(model.logits(2, d)[None], how(0.8, 1.0, 5, 0.8))[0]
        assert (p == 0).any()
        expected += (p / p.sum())[stacks[:, d]].log()
    torch.testing.assert_close(log_p, expected)
