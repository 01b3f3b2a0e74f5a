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


# === Spatial part: context(codes, mask, cond) ===============================================================
@pytest.mark.parametrize("cond, length, null", [("class", 1, 5), ("text", 3, 5), ("none", 1, 0)])
def test_context_against_the_equations(inputs, cond, length, null):
    """Eq. 6-7 and pre-LayerNorm blocks, written out position by position for each picture of the batch; what
    is hidden has no influence, and the tokens of the condition stand in front and are dropped again."""
    model = tiny_transformer(N, D, classes=1 if cond == "none" else 5, cond=cond)
    assert (model.cond_length, model.null) == (length, null)
    codes, mask, _ = inputs
    tokens = (torch.arange(B * length).view(B, length) + null - 1) % (null + 1)  # the null condition, too
    together = model.context(codes, mask, tokens)
    for b in range(B):
        rows = [model.cond_embed.weight[token] + pos for token, pos in zip(tokens[b], model.cond_pos)]
        for n in range(N):
            e = model.mask_embed if mask[b, n] else sum(model.codebook[k] for k in codes[b, n])
            rows.append(model.w_in.weight @ e + model.w_in.bias + model.pos[n])
        x = torch.stack(rows)
        for block in model.spatial:
            x = slow_block(block, x, model.head_dim, causal=False)
        torch.testing.assert_close(together[b], x[length:], atol=1e-4, rtol=1e-4)


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


# === Depth part: depth_logits(h, stacks), depth_step ========================================================
def test_depth_logits_against_the_equations(model):
    """Eq. 8-9, stack by stack: each depth knows the codes of its own stack's earlier depths and no others."""
    h, stacks = torch.randn(6, 32, generator=torch.Generator().manual_seed(2)), random_codes(6, D, seed=3)
    for p in range(len(h)):
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
        seen[:, d:] = 0                                         # what is not drawn yet is not known
        logits, cache = model.depth_step(h, seen, d, cache)
        torch.testing.assert_close(logits, expected[:, d], atol=1e-5, rtol=1e-5)


# === Sizes ==================================================================================================
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


@pytest.mark.parametrize("preset, official, published", [
    ("imagenet-371m", None, 371e6), ("imagenet-821m", 820_899_328, 821e6),
    ("imagenet-1.4b", 1_387_529_728, 1.4e9), ("vq-350m", None, 350e6), ("cc3m-366m", None, 366e6),
    ("cc3m-654m", None, 654e6)])
def test_size_of_the_presets(preset, official, published):
    parameters, c = size(preset), load_config(preset).transformer
    if official:                                                # the same but for e_[MASK] and the null class
        assert parameters == official + 256 + c.d_model
    if c.cond == "text":                                        # published with a text head
        parameters += 2 * c.d_model + (c.d_model + 1) * c.text_vocab  # LayerNorm and Linear
    assert abs(parameters / published - 1) < (0.02 if preset == "vq-350m" else 0.01)  # two digits


def test_size_of_the_imagenet_rqvae():
    with torch.device("meta"):
        vae = drr.RQVAE(load_config("imagenet-256").vae)
    assert parameters(vae) == 100_207_491
    assert parameters(vae) + (16384 + 1) * 256 == 104_402_051   # the official one counts its codebook


# === Training: masks and loss ===============================================================================
@pytest.mark.parametrize("n", [1, 7, 64])
def test_mask_hides_the_scheduled_number_of_positions(n):
    uniforms = torch.rand(300, 1 + n, generator=torch.Generator().manual_seed(0))
    uniforms[0, 0], uniforms[1, 0] = 0, 1 - 2 ** -24            # the ends: all hidden, one hidden
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
    # And every pair: positions are independent.
    pairs = (mask.T @ mask / rows)[~torch.eye(n, dtype=torch.bool)]
    assert torch.all((pairs - pairs.mean()).abs() < 6 * (pairs * (1 - pairs) / rows).sqrt())
    assert abs(p - (2 / math.pi + 0.5 / n)) < 0.02              # mean of ceil(cos(pi r / 2) N) / N


def test_loss_is_the_mean_cross_entropy_of_hidden_stacks_with_codes_or_with_distributions(model, inputs):
    codes, _, cond = inputs
    mask = drr.random_mask(torch.rand(B, 1 + N, generator=torch.Generator().manual_seed(5)))
    h = model.context(codes, mask, cond)
    hidden = [(h[b, n], codes[b, n]) for b, n in mask.nonzero().tolist()]
    K = len(model.codebook)
    soft = torch.rand(len(hidden), D, K, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for targets in (None, soft):
        nats, hits = torch.zeros(D), torch.zeros(D)
        for i, (context, stack) in enumerate(hidden):
            logits = model.depth_logits(context[None], stack[None])[0]                     # (D, K)
            p = F.one_hot(stack, K) if targets is None else targets[i]
            nats -= (p * logits.log_softmax(-1)).sum(-1)
            hits += logits.argmax(-1) == stack
        loss, accuracy = drr.masked_loss(model, codes, mask, cond, targets)
        torch.testing.assert_close(loss, nats / len(hidden), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(accuracy, hits / len(hidden))


def test_the_start_is_a_uniform_guess_from_which_every_parameter_learns_but_the_codebook(inputs):
    torch.manual_seed(0)
    c = transformer_section(d_model=64, head_dim=32)
    model = drr.ContextualRQTransformer(c, 5, N, D, torch.randn(64, 8))
    loss, _ = drr.masked_loss(model, *inputs)
    assert torch.all((loss - math.log(64)).abs() < 0.1)
    loss.mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert "codebook" not in dict(model.named_parameters()) and "codebook" not in model.state_dict()
