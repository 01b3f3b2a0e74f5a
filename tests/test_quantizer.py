"""Residual quantizer and RQ-VAE: parity with the official code, what the equations promise, and which
transformers know its codes."""
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import TESTS, random_codes, sample_section, transformer_section, vae_section
from safetensors.torch import load_file

import drr
from support.common import reconstructions
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


def test_official_latents_and_codes(vae, official):
    """Codes are equal on every CPU: the nearest is 8e-4 nearer than the next, far over rounding."""
    z = vae.encode_latent(official["io.images"])
    torch.testing.assert_close(z, raster(official["io.z_e"]), atol=1e-4, rtol=0)
    codes, partial_sums = vae.quantizer.quantize(z)
    assert torch.equal(codes, raster(official["io.codes"]))
    assert torch.equal(vae.encode(official["io.images"]), codes)
    torch.testing.assert_close(partial_sums[..., -1, :], raster(official["io.z_q"]), atol=1e-4, rtol=0)


def test_official_images_from_every_depth(vae, official):
    codes = raster(official["io.codes"])
    torch.testing.assert_close(vae.decode(codes), official["io.recon"], atol=1e-4, rtol=0)
    shown = reconstructions(vae, official["io.images"]).unflatten(0, (4, 5))         # original, depths 1 .. 4
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
    state = {k.removeprefix("state_dict."): v for k, v in official.items() if k.startswith("state_dict.")}
    torch.save({"epoch": 9, "state_dict": state}, tmp_path / "release.pt")
    loaded = load_official_rqvae(tmp_path / "release.pt", vae_section())
    assert drr.fingerprint(loaded) == drr.fingerprint(vae)


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
    residuals = q.residuals(z, codes)                        # r_0 .. r_(D-1)
    assert torch.equal(residuals[..., 0, :], z)
    torch.testing.assert_close(residuals[..., 1:, :], z[..., None, :] - partial_sums[..., :-1, :])


def small_vae(depth, seed=0):
    torch.manual_seed(seed)
    return drr.RQVAE(vae_section(depth=depth)).requires_grad_(False).eval()


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
def half_dead():
    """12 codes, the even ones alive; 40 vectors that chose code 0."""
    q = quantizer()
    q.cluster_size.copy_(torch.tensor([8.0, 0.5] * 6))
    q.embed_sum.copy_(q.codebook * q.cluster_size[:, None])
    return q, normal(40, 6, seed=5) + 100, torch.zeros(40, dtype=torch.int64)


def test_dead_codes_restart_from_vectors_that_the_generator_draws():
    old, _, _ = half_dead()
    books = []
    for seed in (0, 0, 1):
        q, vectors, codes = half_dead()
        q.update_codebook(vectors, codes, torch.Generator().manual_seed(seed))
        books.append(q.codebook)
    assert torch.equal(books[0], books[1]) and not torch.equal(books[0], books[2])
    dead, alive = slice(1, None, 2), slice(2, None, 2)
    assert torch.all(q.cluster_size[dead] == 1)
    for vector in q.embed_sum[dead]:
        assert torch.any(torch.all(vectors == vector, 1))            # 40 vectors > 12 codes: no jitter
    torch.testing.assert_close(q.codebook[dead], q.embed_sum[dead], rtol=1e-3, atol=0)
    torch.testing.assert_close(q.codebook[alive], old.codebook[alive], rtol=1e-3, atol=1e-4)


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
    torch.testing.assert_close(q.codebook[1::2], before[1::2], rtol=1e-3, atol=1e-4)


def updated(rows):
    """The states after an update by these rows of a batch of 40, without restarts and with them."""
    states = {}
    for generator in (None, torch.Generator().manual_seed(0)):
        q, vectors, _ = half_dead()
        q.update_codebook(vectors[rows], torch.arange(40)[rows] % 5, generator)
        states.update({f"{name}, {generator is None}": value for name, value in q.state_dict().items()})
    return states


def test_two_ranks_learn_one_codebook(monkeypatch):
    """The ranks are threads here; tests/test_training.py has real processes."""
    rank, everyones, meet = threading.local(), {}, threading.Barrier(2, timeout=60)

    def all_reduce(tensor):
        everyones[rank.number] = tensor.clone()
        meet.wait()
        tensor.copy_(everyones[0] + everyones[1])
        meet.wait()

    def run(number):
        rank.number = number
        return updated(slice(20 * number, 20 * number + 20))

    expected = updated(slice(None))                          # one rank with the whole batch
    monkeypatch.setattr(drr, "ranks", lambda: (rank.number, 2))
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    for name, whole in expected.items():
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
    with pytest.raises(drr.UserError, match="codes of another RQ-VAE"):          # without the list
        drr.load_checkpoint(save(tmp_path, other, drr.fingerprint(vae)))
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
