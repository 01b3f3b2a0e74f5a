"""Residual quantizer and RQ-VAE: parity with the official code, what the equations promise, and which
transformers know its codes."""
import math
import multiprocessing
import os
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import TESTS, random_codes, sample_section, transformer_section, vae_section
from safetensors.torch import load_file

import drr
from support.official import load_official_rqvae
from support.runs import codebook_health

FIXTURE = TESTS / "fixtures" / "rqvae.safetensors"


# === Parity with the official code ==========================================================================
@pytest.fixture(scope="module")
def official():
    return load_file(FIXTURE)


@pytest.fixture(scope="module")
def vae():
    return load_official_rqvae(FIXTURE, vae_section())


def raster(t):
    """(B, h, w, ...) of the fixture -> (B, N, ...) of ours."""
    return t.flatten(1, 2)


def state_dict(official):
    return {k.removeprefix("state_dict."): v for k, v in official.items() if k.startswith("state_dict.")}


def test_official_latents_and_codes(vae, official):
    z = vae.encode_latent(official["io.images"])
    torch.testing.assert_close(z, raster(official["io.z_e"]), atol=1e-4, rtol=0)
    codes, partial_sums = vae.quantizer.quantize(z)
    assert torch.equal(codes, raster(official["io.codes"]))
    assert torch.equal(vae.encode(official["io.images"]), codes)
    torch.testing.assert_close(partial_sums[..., -1, :], raster(official["io.z_q"]), atol=1e-4, rtol=0)


def test_official_images_from_every_depth(vae, official):
    codes = raster(official["io.codes"])
    torch.testing.assert_close(vae.decode(codes), official["io.recon"], atol=1e-4, rtol=0)
    shown = drr.reconstructions(vae, official["io.images"]).unflatten(0, (4, 5))     # original, depths 1 .. 4
    assert torch.equal(shown[:, 0], official["io.images"])
    torch.testing.assert_close(shown[:, 1:].transpose(0, 1), official["io.partial_add"], atol=1e-4, rtol=0)


def test_official_soft_codes(vae, official):
    z, codes = raster(official["io.z_e"]), raster(official["io.codes"])
    torch.testing.assert_close(vae.quantizer.soft_codes(z, codes, 1.0), raster(official["io.soft_codes"]),
                               atol=1e-4, rtol=0)


def test_official_losses_and_gradients(vae, official):
    images = official["io.images"]
    names = [k.removeprefix("grad.") for k in official if k.startswith("grad.")]
    weights = [vae.get_parameter(name).requires_grad_(True) for name in names]
    recon, commitment, _, _ = vae(images)
    error = (recon - images).square().mean()
    torch.testing.assert_close(error, official["io.loss_recon"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(commitment, official["io.loss_latent"], atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(error + 0.25 * commitment, weights)
    vae.requires_grad_(False)
    assert len(names) == 7
    for name, ours in zip(names, gradients):
        theirs = official[f"grad.{name}"]
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), name


def test_official_codebook_update(official):
    q = drr.ResidualQuantizer(64, 32, 1, official["ema.decay"].item())
    q.codebook.copy_(official["ema.before.weight"][:-1])
    q.cluster_size.copy_(official["ema.before.cluster_size_ema"])
    q.embed_sum.copy_(official["ema.before.embed_ema"])
    vectors = official["ema.x"].flatten(0, 2)
    codes, partial_sums = q.quantize(vectors)
    assert torch.equal(codes[:, 0], official["ema.single.codes"].flatten())
    embeds = official["ema.single.embeds"].flatten(0, 2)
    torch.testing.assert_close(partial_sums[:, 0], embeds, atol=1e-5, rtol=0)
    q.update_codebook(vectors, codes[:, 0])
    after = {"cluster_size_ema": q.cluster_size, "embed_ema": q.embed_sum, "weight": q.codebook}
    for name, ours in after.items():
        theirs = official[f"ema.single.after.{name}"][:len(ours)]        # without the codebook's padding row
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_official_pt_file_gives_the_same_weights(tmp_path, vae, official):
    torch.save({"epoch": 9, "state_dict": state_dict(official)}, tmp_path / "release.pt")
    loaded = load_official_rqvae(tmp_path / "release.pt", vae_section())
    assert drr.fingerprint(loaded) == drr.fingerprint(vae)


class Attack:
    """Unpickling one of these creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_official_file_with_code_in_it_is_refused_and_not_executed(tmp_path):
    evidence = tmp_path / "executed"
    torch.save({"state_dict": Attack(evidence)}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Attack(evidence), 2))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(drr.UserError, match=name):
            load_official_rqvae(tmp_path / name, vae_section())
    assert not evidence.exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())       # the attack is real: pickle falls for it
    assert evidence.exists()


@pytest.mark.parametrize("change", [
    dict(ch=64), dict(depth=5), dict(codebook_size=128), dict(ch_mult=[1, 2])])
def test_official_weights_of_another_architecture_are_refused(change):
    with pytest.raises(drr.UserError, match="rqvae.safetensors"):
        load_official_rqvae(FIXTURE, vae_section(**change))


def test_official_file_that_is_missing_damaged_or_with_a_codebook_per_depth_is_refused(tmp_path, official):
    (tmp_path / "short.safetensors").write_bytes(FIXTURE.read_bytes()[:5000])
    state = state_dict(official)
    name = "quantizer.codebooks.2.weight"
    torch.save({"state_dict": {**state, name: state[name] + 1}}, tmp_path / "unshared.pt")
    for name in ("short.safetensors", "missing.safetensors", "missing.pt", "unshared.pt.*shared"):
        with pytest.raises(drr.UserError, match=name):
            load_official_rqvae(tmp_path / name.removesuffix(".*shared"), vae_section())


# === Quantizing: against nested loops =======================================================================
def quantizer(K=12, n_z=6, depth=4, seed=0, decay=0.9):
    q = drr.ResidualQuantizer(K, n_z, depth, decay)
    q.codebook.copy_(torch.randn(K, n_z, generator=torch.Generator().manual_seed(seed)))
    return q


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow_quantize(codebook, z, depth):
    """Codes and partial sums of one vector, code by code, in float64."""
    residual, codes, sums = z.double(), [], []
    for _ in range(depth):
        distances = [sum((residual[i] - e[i]) ** 2 for i in range(len(z))) for e in codebook.double()]
        codes.append(min(range(len(distances)), key=lambda k: distances[k]))
        residual = residual - codebook[codes[-1]].double()
        sums.append(z - residual)
    return torch.tensor(codes), torch.stack(sums).float()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_every_depth_takes_the_code_nearest_to_what_is_left(depth):
    q, z = quantizer(depth=depth), normal(2, 5, 6)
    codes, partial_sums = q.quantize(z)
    assert codes.shape == (2, 5, depth) and partial_sums.shape == (2, 5, depth, 6)
    for b in range(2):
        for n in range(5):
            k, sums = slow_quantize(q.codebook, z[b, n], depth)
            assert torch.equal(codes[b, n], k)
            torch.testing.assert_close(partial_sums[b, n], sums, atol=1e-5, rtol=0)


def test_no_other_code_leaves_a_smaller_residual_at_any_depth():
    q, z = quantizer(), normal(50, 6)
    codes, _ = q.quantize(z)
    before = q.residuals(z, codes)                                             # r_0 .. r_3
    chosen = (before - q.embed(codes)).norm(dim=-1)
    others = (before[..., None, :] - q.codebook).norm(dim=-1).amin(-1)
    assert torch.all(chosen <= others + 1e-6)


def test_residuals_are_what_the_partial_sums_leave():
    q, z = quantizer(), normal(7, 6)
    codes, partial_sums = q.quantize(z)
    residuals = q.residuals(z, codes)                        # (7, 4, 6): r_0 .. r_3
    assert torch.equal(residuals[:, 0], z)
    torch.testing.assert_close(residuals[:, 1:], z[:, None] - partial_sums[:, :-1])


def small_vae(depth, seed=0):
    torch.manual_seed(seed)
    return drr.RQVAE(vae_section(depth=depth)).requires_grad_(False).eval()


def test_decode_is_the_decoder_of_the_summed_embeddings():
    vae = small_vae(depth=4)
    codes = vae.encode(normal(2, 3, 32, 32))
    vectors = vae.quantizer.codebook[codes].sum(2)                             # (B, N, n_z)
    square = vectors.view(2, 8, 8, 32).permute(0, 3, 1, 2)
    torch.testing.assert_close(vae.decode(codes), vae.decoder(vae.post_quant_conv(square)))


def test_depth_one_is_a_vector_quantizer():
    vae, images = small_vae(depth=1), normal(2, 3, 32, 32)
    z, codes = vae.encode_latent(images), vae.encode(images)
    assert codes.shape == (2, 64, 1)
    assert torch.equal(codes[..., 0], torch.cdist(z, vae.quantizer.codebook).argmin(-1))
    recon, commitment, _, same = vae(images)
    assert torch.equal(same, codes)
    torch.testing.assert_close(recon, vae.decode(codes), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(commitment, (z - vae.quantizer.codebook[codes[..., 0]]).square().mean())


def test_commitment_counts_every_partial_sum():
    vae, images = small_vae(depth=3), normal(2, 3, 32, 32)
    _, commitment, z, codes = vae(images)
    sums = vae.quantizer.codebook[codes].cumsum(2)
    by_depth = [(z - sums[:, :, d]).square().mean() for d in range(3)]
    torch.testing.assert_close(commitment, torch.stack(by_depth).mean())
    assert abs(by_depth[0] - by_depth[2]) > 0.01 * by_depth[2]       # so that the last alone would not do


def test_gradients_pass_straight_through_the_quantizer(monkeypatch):
    vae = small_vae(depth=2)
    z = normal(1, 64, 32).requires_grad_(True)
    monkeypatch.setattr(vae, "encode_latent", lambda images: z)
    direction = normal(1, 3, 32, 32, seed=2)
    recon, _, _, codes = vae(None)
    through = torch.autograd.grad((recon * direction).sum(), z)[0]
    z_hat = vae.quantizer.embed(codes).sum(-2).requires_grad_(True)
    behind = torch.autograd.grad((vae.decode_latent(z_hat) * direction).sum(), z_hat)[0]
    assert behind.abs().max() > 0
    torch.testing.assert_close(through, behind, atol=1e-5, rtol=1e-4)


def test_commitment_pulls_the_latent_towards_every_partial_sum(monkeypatch):
    vae = small_vae(depth=2)
    z = normal(1, 64, 32).requires_grad_(True)
    monkeypatch.setattr(vae, "encode_latent", lambda images: z)
    _, commitment, _, codes = vae(None)
    gradient = torch.autograd.grad(commitment, z)[0]
    sums = vae.quantizer.embed(codes).cumsum(-2)             # constants: no gradient through them
    torch.testing.assert_close(gradient, 2 * (z.detach()[:, :, None] - sums).mean(2) / z.numel())


def test_codes_are_the_same_under_bf16_autocast():
    q, z = quantizer(K=512, n_z=32), normal(500, 32)
    plain = q.quantize(z)
    with torch.autocast("cpu", torch.bfloat16):
        cast = q.quantize(z)
        soft = q.soft_codes(z, cast[0], 1.0)
    assert torch.equal(cast[0], plain[0]) and torch.equal(cast[1], plain[1])
    assert torch.equal(soft, q.soft_codes(z, plain[0], 1.0)) and soft.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        rounded = (q.codebook.square().sum(1) - 2 * z @ q.codebook.T).argmin(-1)
    assert not torch.equal(rounded, plain[0][:, 0])                            # bfloat16 would have shown


# === Stochastic codes =======================================================================================
def test_stochastic_codes_at_a_small_temperature_are_the_nearest():
    q, z = quantizer(), normal(200, 6)
    uniforms = torch.rand(200, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(q.quantize(z, 1e-4, uniforms)[0], q.quantize(z)[0])
    assert not torch.equal(q.quantize(z, 5.0, uniforms)[0], q.quantize(z)[0])


def test_stochastic_codes_are_as_frequent_as_their_soft_codes():
    q, n = quantizer(K=5, depth=2), 20000
    z = normal(1, 6).expand(n, 6)
    uniforms = torch.rand(n, 2, generator=torch.Generator().manual_seed(4))
    codes, _ = q.quantize(z, 4.0, uniforms)
    expected = q.soft_codes(z, codes, 4.0)
    first = torch.bincount(codes[:, 0], minlength=5) / n
    # Each of the 5 + 25 frequencies is within 5 standard deviations: false alarm < 30 * 6e-7 = 2e-5.
    p = expected[0, 0]
    assert torch.all((first - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-6)
    assert p.max() < 0.95                                    # it really is a choice
    for k in range(5):
        rows = codes[:, 0] == k
        m, p = rows.sum(), expected[rows][0, 1]              # depth 2 goes on from the drawn code
        second = torch.bincount(codes[rows, 1], minlength=5) / m
        assert torch.all((second - p).abs() < 5 * (p * (1 - p) / m).sqrt() + 1e-6)


# === Codebook update ========================================================================================
def test_update_is_the_exponential_moving_average_of_counts_and_sums():
    q = quantizer(K=3, n_z=2, decay=0.75)
    vectors = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    q.cluster_size.fill_(4)
    q.embed_sum.copy_(4 * q.codebook)
    old = q.codebook.clone()
    q.update_codebook(vectors, torch.tensor([0, 0, 2]))
    counts = torch.tensor([3.5, 3.0, 3.25])                  # 0.75 * 4 + 0.25 * (2, 0, 1)
    sums = 3 * old + torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.5]])
    torch.testing.assert_close(q.cluster_size, counts)
    torch.testing.assert_close(q.embed_sum, sums)
    torch.testing.assert_close(q.codebook, sums / counts[:, None], atol=1e-4, rtol=1e-4)


def half_dead():
    """12 codes, the even ones alive; 40 vectors that chose code 0."""
    q = quantizer()
    q.cluster_size.copy_(torch.tensor([8.0, 0.5] * 6))
    q.embed_sum.copy_(q.codebook * q.cluster_size[:, None])
    return q, normal(40, 6, seed=5) + 100, torch.zeros(40, dtype=torch.int64)


def test_dead_codes_restart_from_vectors_of_the_batch_with_their_ema_state():
    q, vectors, codes = half_dead()
    before = q.codebook.clone()
    q.update_codebook(vectors, codes, torch.Generator().manual_seed(0))
    dead, alive = slice(1, None, 2), slice(2, None, 2)
    assert torch.all(q.cluster_size[dead] == 1)
    for vector in q.embed_sum[dead]:
        assert torch.any(torch.all(vectors == vector, 1))            # 40 vectors > 12 codes: no jitter
    torch.testing.assert_close(q.codebook[dead], q.embed_sum[dead], rtol=1e-3, atol=0)
    torch.testing.assert_close(q.codebook[alive], before[alive], rtol=1e-3, atol=1e-4)


def test_restart_from_a_batch_smaller_than_the_codebook_makes_no_twins():
    q = quantizer()                                                            # 12 codes, none used yet
    vectors = normal(3, 6)
    q.update_codebook(vectors, torch.zeros(3, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert len(torch.unique(q.embed_sum, dim=0)) == 12
    assert torch.cdist(q.embed_sum, vectors).amin(1).max() < 0.011   # each beside a vector of the batch


def test_without_a_generator_no_code_restarts():
    q, vectors, codes = half_dead()
    before = q.codebook.clone()
    q.update_codebook(vectors, codes)
    assert torch.all(q.cluster_size[1::2] == 0.45)
    torch.testing.assert_close(q.codebook[1::2], before[1::2], rtol=1e-3, atol=1e-4)


def test_the_generator_decides_which_vectors_restart():
    books = []
    for seed in (0, 0, 1):
        q, vectors, codes = half_dead()
        q.update_codebook(vectors, codes, torch.Generator().manual_seed(seed))
        books.append(q.codebook.clone())
    assert torch.equal(books[0], books[1]) and not torch.equal(books[0], books[2])


def updated(rows, restart):
    """The state after an update by these rows of a batch of 40."""
    q, vectors, _ = half_dead()
    codes = torch.arange(40) % 5
    q.update_codebook(vectors[rows], codes[rows], torch.Generator().manual_seed(0) if restart else None)
    return q.state_dict()


def rank_update(rank, folder, restart):
    """One of two ranks, each with its half of the batch; writes the state that it ends up with."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(updated(slice(20 * rank, 20 * rank + 20), restart), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("restart", [False, True])
def test_two_ranks_learn_one_codebook(tmp_path, restart):
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=rank_update, args=(rank, str(tmp_path), restart)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, whole in updated(slice(None), restart).items():                  # one rank with the whole batch
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], whole, atol=1e-4, rtol=1e-5)


# === Codebook usage =========================================================================================
def test_usage_and_perplexity_of_known_distributions():
    uniform, single = torch.arange(64) % 8, torch.full((64,), 3)
    skewed = torch.tensor([0, 0, 0, 1]).repeat(16)
    usage, perplexity = codebook_health(torch.stack([uniform, single, skewed], -1).view(64, 3), 16).values()
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(usage, torch.tensor([8, 1, 2]) / 16)
    torch.testing.assert_close(perplexity, torch.tensor([8.0, 1.0, math.exp(entropy)]))


# === Whose codes are whose ==================================================================================
@pytest.mark.parametrize("name, same", [
    ("encoder.conv_in.weight", False), ("quant_conv.bias", False), ("quantizer.codebook", False),
    ("decoder.conv_in.weight", True), ("post_quant_conv.bias", True), ("quantizer.cluster_size", True),
    ("quantizer.embed_sum", True)])
def test_the_code_fingerprint_changes_with_what_makes_codes_and_with_nothing_else(name, same):
    vae = small_vae(depth=4)
    codes, weights = drr.code_fingerprint(vae), drr.fingerprint(vae)
    vae.state_dict()[name].view(-1)[0] += 1
    assert (drr.code_fingerprint(vae) == codes) == same
    assert drr.fingerprint(vae) != weights


@pytest.fixture(scope="module")
def trained():
    """An RQ-VAE, and a function that saves one beside a transformer that knows it by `known_as`."""
    vae = small_vae(depth=4)
    c = SimpleNamespace(vae=vae_section(), sample=sample_section(), transformer=transformer_section())
    c.transformer.half = False
    transformer = drr.ContextualRQTransformer(c.transformer, 2, 64, 4, vae.quantizer.codebook)

    def save(folder, vae, known_as, former=()):
        drr.save_vae(folder / "vae.safetensors", vae, c, former)
        path = folder / "transformer.safetensors"
        drr.save_transformer(path, transformer, c, ["a", "b"], ["a", "b"], vae)
        tensors, meta = drr.read_model(path)
        drr.save_model(path, tensors, {**meta, "vae": known_as})
        return folder

    return vae, save


def with_another_decoder(vae):
    other = small_vae(depth=4, seed=1)
    for part in ("encoder", "quant_conv", "quantizer"):
        getattr(other, part).load_state_dict(getattr(vae, part).state_dict())
    return other


def test_a_transformer_knows_its_codes_under_the_new_and_the_old_fingerprint(tmp_path, trained):
    vae, save = trained
    other = with_another_decoder(vae)
    for known_as in (drr.code_fingerprint(vae), drr.fingerprint(vae)):
        drr.load_checkpoint(save(tmp_path, vae, known_as))
        # After train_vae.py --decoder-only, whose file lists by what older transformers know these codes.
        former = drr.former_fingerprints(tmp_path / "vae.safetensors", vae)
        loaded, transformer, _ = drr.load_checkpoint(save(tmp_path, other, known_as, former))
        assert torch.equal(transformer.codebook, vae.quantizer.codebook)
        codes = random_codes(1, 64, 4, codebook_size=64)
        assert not torch.equal(loaded.decode(codes), vae.decode(codes))
        # And after it once more.
        former = drr.former_fingerprints(tmp_path / "vae.safetensors", loaded)
        drr.load_checkpoint(save(tmp_path, vae, known_as, former))


def test_a_transformer_of_other_codes_is_refused(tmp_path, trained):
    vae, save = trained
    stranger, other = small_vae(depth=4, seed=2), with_another_decoder(vae)
    for folder in (save(tmp_path / "a", vae, drr.code_fingerprint(stranger)),
                   save(tmp_path / "b", vae, drr.fingerprint(stranger)),
                   save(tmp_path / "c", other, drr.fingerprint(vae))):         # without the list
        with pytest.raises(drr.UserError, match="codes of another RQ-VAE"):
            drr.load_checkpoint(folder)
