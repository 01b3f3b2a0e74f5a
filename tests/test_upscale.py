"""A decoder that draws larger pictures than the encoder sees: vae.upscale."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TESTS, vae_section
from PIL import Image
from processes import run
from torch import nn

import drr
import train_vae

PHOTOS = TESTS / "photos"
SHORT = ("steps=2", "warmup=1", "batch_size=4", "disc_weight=0")


def test_the_codes_are_those_of_the_reduced_picture_and_the_pictures_twice_as_large():
    torch.manual_seed(0)
    small = drr.RQVAE(vae_section())
    large = drr.RQVAE(vae_section(upscale=2))
    large.load_state_dict(small.state_dict(), strict=False)
    assert drr.code_fingerprint(large) == drr.code_fingerprint(small)
    assert (small.size, large.size, large.side) == (32, 64, small.side)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    reduced = F.interpolate(images, size=32, mode="bicubic", antialias=True)
    with torch.no_grad():
        codes = large.encode(images)
        assert torch.equal(codes, small.encode(reduced))
        assert large.decode(codes).shape == images.shape and small.decode(codes).shape == reduced.shape
    with pytest.raises(drr.UserError, match="upscale is 3"):
        drr.RQVAE(vae_section(upscale=3))


def test_every_level_keeps_what_those_before_it_have_drawn_and_its_detail_vanishes_when_reduced():
    torch.manual_seed(0)
    small, middle, large = (drr.RQVAE(vae_section(upscale=upscale)) for upscale in (1, 2, 4))
    large.load_state_dict(small.state_dict(), strict=False)
    for level in large.decoder.enlarge:
        nn.init.normal_(level.conv_out.weight, std=0.1)
    middle.load_state_dict({name: p for name, p in large.state_dict().items() if ".enlarge.1." not in name})
    images = torch.rand(2, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        codes = large.encode(images)
        drawn = [vae.decode(codes) for vae in (small, middle, large)]
        reduced = [F.interpolate(y, scale_factor=0.5, mode="bicubic", antialias=True)
                   for y in (*drawn[1:], images)]
        plain = F.interpolate(drawn[0], scale_factor=2.0, mode="bicubic")
        assert (drawn[1] - plain).std() > 0.1                  # there is detail
        assert torch.allclose(reduced[0], drawn[0], atol=1e-5)
        assert torch.allclose(reduced[1], drawn[1], atol=1e-5)
        assert torch.equal(codes, middle.encode(reduced[2]))
        grey = torch.full((1, 3, 32, 32), 0.3)                 # up to the borders
        level = drr.Enlarge(32, 32)
        assert torch.allclose(level(torch.randn(1, 32, 32, 32), grey)[1], torch.tensor(0.3), atol=1e-5)


@pytest.fixture(scope="module")
def enlarged(tmp_path_factory):
    """A checkpoint whose decoder got its larger level after the transformer was trained."""
    folder = tmp_path_factory.mktemp("enlarged")
    common = ("--data", PHOTOS, "--precision", "fp32")
    run("train_vae.py", "smoke", *common, "--out", "small", *(f"vae.{s}" for s in SHORT), cwd=folder)
    run("train_transformer.py", "smoke", *common, "--out", "small", "transformer.steps=1",
        "transformer.batch_size=4", cwd=folder)
    run("train_vae.py", "smoke", *common, "--out", "large", *(f"vae.{s}" for s in SHORT), "vae.upscale=2",
        "--decoder-only", "small/vae.safetensors", "vae.quantize_start=0", cwd=folder)
    (folder / "small" / "transformer.safetensors").rename(folder / "large" / "transformer.safetensors")
    return folder


def test_a_decoder_gets_a_level_more_and_the_transformer_stays(enlarged):
    small, _ = drr.load_vae(enlarged / "small" / "vae.safetensors")
    large, transformer, info = drr.load_checkpoint(enlarged / "large")
    assert info.vae.upscale == 2 and large.size == 64 and transformer.positions == large.side ** 2
    assert drr.code_fingerprint(large) == drr.code_fingerprint(small)
    # The new level alone has learned, and its pictures, reduced, are those of the decoder before.
    old, new = small.decoder.state_dict(), large.decoder.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert {name.split(".")[0] for name in new.keys() - old.keys()} == {"enlarge"}
    path = enlarged / "small" / "vae.safetensors"
    untrained = train_vae.build(info.vae, path, "codes", torch.device("cpu"))["vae"]
    codes = torch.randint(info.vae.codebook_size, (2, 64, info.vae.depth))
    for vae in (untrained, large):
        reduced = F.interpolate(vae.decode(codes), size=32, mode="bicubic", antialias=True)
        assert torch.allclose(reduced, small.decode(codes), atol=1e-5)
    assert not torch.equal(large.decode(codes), untrained.decode(codes))


def test_repainting_and_reconstruction_work_at_the_larger_size(enlarged, tmp_path):
    """The right half of a photograph of 100 x 80: at 64 pixels its square's columns from 32 on."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 100, 3), np.uint8))
    photo.save(tmp_path / "photo.png")
    checkpoint = ("--checkpoint", enlarged / "large")
    run("sample.py", *checkpoint, "--class", 0, "--num", 1, "--image", "photo.png", "--region", "50,0,100,80",
        "--paste", "--precision", "fp32", "--out-dir", "out", "--out", "out/grid.png", cwd=tmp_path)
    drawn = np.array(Image.open(tmp_path / "out" / "000.png"))
    kept = np.array(photo.resize((64, 64), Image.BICUBIC, box=(10, 0, 90, 80)))
    assert drawn.shape == (64, 64, 3)
    assert np.array_equal(drawn[:, :32], kept[:, :32]) and not np.array_equal(drawn[:, 32:], kept[:, 32:])
    run("sample.py", *checkpoint, "--reconstruct", "photo.png", "--out", "depths.png", cwd=tmp_path)
    assert Image.open(tmp_path / "depths.png").size == (5 * 258 - 2, 256)
