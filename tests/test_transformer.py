"""Contextual RQ-Transformer: who influences whom, how many parameters, what it is trained on."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import random_codes, tiny_transformer, transformer_section

import drr
from support.common import load_config

B, N, D = 3, 16, 4


@pytest.fixture(scope="module")
def model():
    return tiny_transformer(N, D)


@pytest.fixture(scope="module")
def inputs():
    """codes (B, N, D), mask (B, N) hiding the even positions, cond (B, 1)."""
    mask = torch.zeros(B, N, dtype=torch.bool)
    mask[:, ::2] = True
    return random_codes(B, N, D), mask, torch.tensor([[0], [1], [2]])


def changed(codes, *where):
    codes = codes.clone()
    codes[where] = (codes[where] + 1) % 24
    return codes


# === Spatial part: context(codes, mask, cond) =======================================================================
def test_hidden_codes_never_influence_the_context(model, inputs):
    codes, mask, cond = inputs
    other = torch.where(mask[..., None], random_codes(B, N, D, seed=1), codes)
    assert not torch.equal(other, codes)
    assert torch.equal(model.context(other, mask, cond), model.context(codes, mask, cond))


@pytest.mark.parametrize("depth", range(D))
def test_every_code_of_a_visible_stack_influences_the_context(model, inputs, depth):
    codes, mask, cond = inputs
    difference = model.context(changed(codes, 0, 5, depth), mask, cond) - model.context(codes, mask, cond)
    assert difference[0].abs().max() > 1e-3
    assert difference[1:].abs().max() == 0                                     # and that of its own picture alone


def test_attention_is_bidirectional_over_positions(model, inputs):
    codes, mask, cond = inputs
    before = model.context(codes, mask, cond)
    assert (model.context(changed(codes, 0, N - 1), mask, cond) - before)[0, 0].abs().max() > 1e-4
    assert (model.context(changed(codes, 0, 1), mask, cond) - before)[0, -1].abs().max() > 1e-4


def test_hidden_and_visible_stacks_look_different(model, inputs):
    codes, mask, cond = inputs
    more = mask.clone()
    more[0, 1] = True
    assert (model.context(codes, more, cond) - model.context(codes, mask, cond))[0].abs().max() > 1e-3


def test_position_matters(model):
    """A transformer without position embeddings would give equal contexts to equal stacks."""
    h = model.context(torch.zeros(1, N, D, dtype=torch.int64), torch.ones(1, N, dtype=torch.bool),
                      torch.zeros(1, 1).long())
    assert torch.pdist(h[0]).min() > 1e-2


def test_the_condition_changes_context_and_logits(model, inputs):
    codes, mask, cond = inputs
    for other in (cond + 1, torch.full_like(cond, model.null)):
        h, h_other = model.context(codes, mask, cond), model.context(codes, mask, other)
        assert (h - h_other).abs().amax((1, 2)).min() > 1e-3
        assert (model.depth_logits(h[:, 0], codes[:, 0]) - model.depth_logits(h_other[:, 0],
                                                                              codes[:, 0])).abs().max() > 1e-3


@pytest.mark.parametrize("cond, length, null", [("class", 1, 5), ("text", 3, 5), ("none", 1, 0)])
def test_every_kind_of_condition_stands_in_front_and_is_dropped_again(cond, length, null):
    model = tiny_transformer(N, D, classes=1 if cond == "none" else 5, cond=cond)
    assert (model.cond_length, model.null) == (length, null)
    tokens = torch.full((2, length), null)
    h = model.context(random_codes(2, N, D), torch.zeros(2, N, dtype=torch.bool), tokens)
    assert h.shape == (2, N, 32)
    if length > 1:                                                             # the order of the words counts
        a, b = torch.tensor([[0, 1, 2]]), torch.tensor([[2, 1, 0]])
        codes, mask = random_codes(1, N, D), torch.zeros(1, N, dtype=torch.bool)
        assert (model.context(codes, mask, a) - model.context(codes, mask, b)).abs().max() > 1e-3


def test_context_does_not_depend_on_the_other_pictures_of_the_batch(model, inputs):
    codes, mask, cond = inputs
    together = model.context(codes, mask, cond)
    for b in range(B):
        torch.testing.assert_close(model.context(codes[b:b + 1], mask[b:b + 1], cond[b:b + 1])[0], together[b],
                                   atol=1e-5, rtol=1e-5)


def test_context_against_the_equations(model, inputs):
    """Eq. 6-7 and pre-LayerNorm blocks, written out position by position for one picture."""
    codes, mask, cond = inputs
    rows = [model.cond_embed.weight[cond[0, 0]] + model.cond_pos[0]]
    for n in range(N):
        e = model.mask_embed if mask[0, n] else sum(model.codebook[k] for k in codes[0, n])
        rows.append(model.w_in.weight @ e + model.w_in.bias + model.pos[n])
    x = torch.stack(rows)
    for block in model.spatial:
        x = slow_block(block, x, model.head_dim, causal=False)
    torch.testing.assert_close(model.context(codes, mask, cond)[0], x[1:], atol=1e-4, rtol=1e-4)


def slow_block(block, x, head_dim, causal):
    d = x.shape[-1]
    q, k, v = (block.qkv.weight @ block.ln1(x).T + block.qkv.bias[:, None]).T.split(d, 1)
    heads = []
    for i in range(0, d, head_dim):
        scores = q[:, i:i + head_dim] @ k[:, i:i + head_dim].T / math.sqrt(head_dim)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf)
        heads.append(scores.softmax(1) @ v[:, i:i + head_dim])
    x = x + block.proj(torch.cat(heads, 1))
    return x + block.fc2(F.gelu(block.fc1(block.ln2(x))))


# === Depth part: depth_logits(h, stacks), depth_step ================================================================
@pytest.fixture(scope="module")
def contexts():
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(2)), random_codes(6, D, seed=3)


@pytest.mark.parametrize("d", range(D))
def test_logits_see_only_their_own_stacks_earlier_codes(model, contexts, d):
    h, stacks = contexts
    # (P, D)
    difference = (model.depth_logits(h, changed(stacks, 2, d)) - model.depth_logits(h, stacks)).abs().amax(-1)
    assert difference[2, :d + 1].max() == 0                                    # depths up to d: no influence
    assert torch.all(difference[2, d + 1:] > 1e-4)                             # later depths: each one
    difference[2] = 0
    assert difference.max() == 0                                               # other stacks: none


def test_logits_see_only_their_own_context(model, contexts):
    h, stacks = contexts
    moved = h.clone()
    moved[2] *= -1                                                            # (LayerNorm forgets a mere shift)
    difference = (model.depth_logits(moved, stacks) - model.depth_logits(h, stacks)).abs().amax(-1)
    assert torch.all(difference[2] > 1e-4)
    difference[2] = 0
    assert difference.max() == 0


def test_depth_logits_against_the_equations(model, contexts):
    h, stacks = contexts
    for p in range(2):
        v = [h[p]] + [model.w_depth(sum(model.codebook[k] for k in stacks[p, :d])) for d in range(1, D)]
        x = torch.stack(v) + model.depth_pos
        for block in model.depthwise:
            x = slow_block(block, x, model.head_dim, causal=True)
        expected = model.classifier(model.ln(x))
        torch.testing.assert_close(model.depth_logits(h, stacks)[p], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_depth_step_with_its_cache_equals_the_teacher_forced_logits(depth):
    model = tiny_transformer(N, depth)
    h, stacks = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)), random_codes(5, depth, seed=4)
    expected, cache = model.depth_logits(h, stacks), None
    for d in range(depth):
        seen = stacks.clone()
        seen[:, d:] = 0                                                        # what is not drawn yet is not known
        logits, cache = model.depth_step(h, seen, d, cache)
        torch.testing.assert_close(logits, expected[:, d], atol=1e-5, rtol=1e-5)


# === Sizes ==========================================================================================================
def parameters(module):
    return sum(p.numel() for p in module.parameters())


def size(preset):
    """Parameters of a preset's transformer, built on the meta device, which holds no numbers."""
    config = load_config(preset)
    c, v = config.transformer, config.vae
    conditions = c.text_vocab if c.cond == "text" else 1000
    positions = (v.resolution >> (len(v.ch_mult) - 1)) ** 2
    with torch.device("meta"):
        return parameters(drr.ContextualRQTransformer(c, conditions, positions, v.depth,
                                                      torch.empty(v.codebook_size, v.code_dim)))


@pytest.mark.parametrize("preset, exactly, published", [("imagenet-371m", 371_112_192, 371e6),
                                                        ("imagenet-821m", 820_901_120, 821e6),
                                                        ("imagenet-1.4b", 1_387_531_520, 1.4e9)])
def test_size_of_the_imagenet_presets(preset, exactly, published):
    assert size(preset) == exactly
    assert abs(exactly / published - 1) < 0.01


def test_size_differs_from_the_official_siblings_by_mask_and_null_class_alone():
    mask_embed, null_class = 256, 1536
    assert size("imagenet-821m") == 820_899_328 + mask_embed + null_class
    assert size("imagenet-1.4b") == 1_387_529_728 + mask_embed + null_class


@pytest.mark.parametrize("preset, published", [("cc3m-366m", 366e6), ("cc3m-654m", 654e6)])
def test_size_of_the_text_presets_with_the_published_text_head(preset, published):
    c = load_config(preset).transformer
    text_head = 2 * c.d_model + (c.d_model + 1) * c.text_vocab                 # LayerNorm and Linear
    assert abs((size(preset) + text_head) / published - 1) < 0.01


def test_size_of_the_vq_preset():
    assert abs(size("vq-350m") / 350e6 - 1) < 0.02                              # the paper gives two digits


@pytest.mark.parametrize("d", [64, 1024])
def test_size_of_a_block(d):
    with torch.device("meta"):
        assert parameters(drr.Block(d, 64)) == 12 * d * d + 13 * d


def test_size_of_the_imagenet_rqvae():
    with torch.device("meta"):
        vae = drr.RQVAE(load_config("imagenet-256").vae)
    assert parameters(vae) == 100_207_491
    # the official one counts its padded codebook
    assert parameters(vae) + (16384 + 1) * 256 == 104_402_051


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(drr.UserError, match="head_dim"):
        drr.ContextualRQTransformer(transformer_section(d_model=40), 5, N, D, torch.zeros(4, 8))


# === Training: masks and loss =======================================================================================
@pytest.mark.parametrize("n", [1, 7, 64])
def test_mask_hides_the_scheduled_number_of_positions(n):
    uniforms = torch.rand(300, 1 + n, generator=torch.Generator().manual_seed(0))
    uniforms[0, 0], uniforms[1, 0] = 0, 1 - 2 ** -24                           # the ends: all hidden, one hidden
    count = drr.random_mask(uniforms).sum(1)
    # float32 rounds cos(pi r / 2) N; where that product is as good as whole, either neighbour is right
    exact = [math.cos(math.pi / 2 * r) * n for r in uniforms[:, 0].tolist()]
    for hidden, x in zip(count.tolist(), exact):
        assert hidden in (math.ceil(x - 1e-4), math.ceil(x + 1e-4)) and 1 <= hidden <= n
    assert count[0] == n and count[1] == 1


def test_mask_hides_every_position_equally_often():
    rows, n = 20000, 16
    mask = drr.random_mask(torch.rand(rows, 1 + n, generator=torch.Generator().manual_seed(0))).float()
    share, p = mask.mean(0), mask.mean()
    # 16 frequencies within 5 standard deviations: false alarm < 16 * 6e-7 = 1e-5 for a fresh seed.
    assert torch.all((share - p).abs() < 5 * (p * (1 - p) / rows).sqrt())
    # and every pair: positions are independent
    pairs = (mask.T @ mask / rows)[~torch.eye(n, dtype=torch.bool)]
    assert torch.all((pairs - pairs.mean()).abs() < 6 * (pairs * (1 - pairs) / rows).sqrt())
    assert abs(p - (2 / math.pi + 0.5 / n)) < 0.02                             # mean of ceil(cos(pi r / 2) N) / N


def test_mask_is_where_the_numbers_are_smallest():
    uniforms = torch.tensor([[0.6, 0.3, 0.9, 0.1, 0.2]])                       # ceil(cos(0.3 pi) 4) = ceil(2.35) = 3
    assert drr.random_mask(uniforms).tolist() == [[True, False, True, True]]


def test_loss_is_the_mean_cross_entropy_of_hidden_stacks(model, inputs):
    codes, mask, cond = inputs
    mask = drr.random_mask(torch.rand(B, 1 + N, generator=torch.Generator().manual_seed(5)))
    loss, accuracy = drr.masked_loss(model, codes, mask, cond)
    h = model.context(codes, mask, cond)
    nats, hits = torch.zeros(D), torch.zeros(D)
    for b, n in mask.nonzero().tolist():
        logits = model.depth_logits(h[b, n][None], codes[b, n][None])[0]
        for d in range(D):
            nats[d] -= logits[d].log_softmax(-1)[codes[b, n, d]]
            hits[d] += logits[d].argmax() == codes[b, n, d]
    torch.testing.assert_close(loss, nats / mask.sum(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(accuracy, hits / mask.sum())


def test_loss_has_no_gradient_from_visible_positions(model, inputs):
    """A visible position is input, not target: the classifier's gradient does not know how well it is predicted."""
    codes, mask, cond = inputs
    h = model.context(codes, mask, cond).requires_grad_(True)

    class Given:
        context = staticmethod(lambda *_: h)
        depth_logits = model.depth_logits

    loss, _ = drr.masked_loss(Given, codes, mask, cond)
    gradient = torch.autograd.grad(loss.mean(), h)[0].abs().amax(-1)           # (B, N)
    assert torch.all(gradient[mask] > 0) and torch.all(gradient[~mask] == 0)


def fresh(K=64):
    torch.manual_seed(0)
    c = transformer_section(d_model=64, head_dim=32)
    return drr.ContextualRQTransformer(c, 5, N, D, torch.randn(K, 8))


def test_loss_at_the_start_is_that_of_a_uniform_guess(inputs):
    codes, mask, cond = inputs
    loss, _ = drr.masked_loss(fresh(), codes, mask, cond)
    assert torch.all((loss - math.log(64)).abs() < 0.1)


def test_soft_labels_are_the_cross_entropy_with_a_distribution(inputs):
    """One-hot targets give the loss of the codes; others give -sum_k p_k log q_k, written out."""
    codes, mask, cond = inputs
    model, stacks = fresh(), codes[mask]
    K = len(model.codebook)
    hard, _ = drr.masked_loss(model, codes, mask, cond)
    one_hot, _ = drr.masked_loss(model, codes, mask, cond, torch.nn.functional.one_hot(stacks, K).float())
    assert torch.allclose(one_hot, hard, atol=1e-6)
    targets = torch.rand(*stacks.shape, K, generator=torch.Generator().manual_seed(0)).softmax(-1)
    logits = model.depth_logits(model.context(codes, mask, cond)[mask], stacks)
    soft, _ = drr.masked_loss(model, codes, mask, cond, targets)
    assert torch.allclose(soft, -(targets * logits.log_softmax(-1)).sum(-1).mean(0), atol=1e-5)


def test_recomputed_activations_give_the_same_gradients(inputs):
    model, gradients = fresh(24).train(), []
    for model.recompute in (False, True):
        model.zero_grad()
        model(*inputs)[0].mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_one_batch_can_be_learnt_by_heart(inputs):
    codes, mask, cond = inputs
    model = fresh(24)
    opt = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss, accuracy = drr.masked_loss(model, codes, mask, cond)
        opt.zero_grad()
        loss.mean().backward()
        opt.step()
    assert loss.mean() < 0.1 and accuracy.min() > 0.95


def test_every_parameter_learns_and_the_codebook_does_not(inputs):
    codes, mask, cond = inputs
    model = fresh(24)
    drr.masked_loss(model, codes, mask, cond)[0].mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert "codebook" not in dict(model.named_parameters()) and "codebook" not in model.state_dict()
