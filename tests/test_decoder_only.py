"""A new decoder for given codes: train_vae.py --decoder-only."""
import shutil
from types import SimpleNamespace

import pytest
import torch

import drr
from support.common import crop, open_image, to_float
from processes import PHOTOS, another_vae, assert_same, finished, refused, train

FINE_TUNE = ("vae.quantize_start=0", "vae.disc=spectral", "vae.disc_start=0", "vae.disc_ramp=4",
             "vae.loss=l1", "vae.disc_adaptive=false", "vae.disc_weight=0.02", "vae.feature_weight=1",
             "vae.weights_ema=0.9")


@pytest.fixture(scope="module")
def untrained_decoder(whole, tmp_path_factory):
    """An older checkpoint: an RQ-VAE, its decoder random, and a transformer that knows it by the fingerprint
    of all its weights."""
    folder = tmp_path_factory.mktemp("untrained")
    vae, section = drr.load_vae(whole.vae / "vae.safetensors")
    torch.manual_seed(0)                      # else the start depends on which tests ran before
    for module in vae.decoder.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    drr.save_vae(folder / "vae.safetensors", vae, SimpleNamespace(vae=section))
    tensors, meta = drr.read_model(whole.transformer / "transformer.safetensors")
    drr.save_model(folder / "transformer.safetensors", tensors, {**meta, "vae": drr.fingerprint(vae)})
    return folder


def fine_tune(source, out, *more, steps=20):
    return train("vae", "smoke", "--data", PHOTOS, "--decoder-only", source, "--out", out, "--precision",
                 "fp32", *FINE_TUNE, f"vae.steps={steps}", "vae.save_every=10", *more)


@pytest.fixture(scope="module")
def fine_tuned(untrained_decoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fine") / "tuned"
    finished(fine_tune(untrained_decoder / "vae.safetensors", folder))
    return folder


def test_a_new_decoder_leaves_codes_and_transformer_alone_and_draws_better(untrained_decoder, fine_tuned,
                                                                           tmp_path):
    folders = untrained_decoder, fine_tuned
    before, after = (drr.load_vae(folder / "vae.safetensors")[0] for folder in folders)
    changed = {name.split(".")[0] for name, value in before.state_dict().items()
               if not torch.equal(value, after.state_dict()[name])}
    assert changed == {"decoder", "post_quant_conv"}
    held_out = sorted((PHOTOS / "val").rglob("*.JPEG"))
    images = to_float(torch.stack([crop(open_image(path), 32) for path in held_out]), "cpu")
    with torch.no_grad():
        assert torch.equal(before.encode(images), after.encode(images))
        old, new = ((vae.decode(vae.encode(images)) - images).abs().mean().item() for vae in (before, after))
    assert new < 0.9 * old                                     # 0.71 when it was written
    drr.load_checkpoint(untrained_decoder)
    shutil.copy(untrained_decoder / "transformer.safetensors", tmp_path)
    shutil.copy(fine_tuned / "vae.safetensors", tmp_path)
    drr.load_checkpoint(tmp_path)
    finished(fine_tune(fine_tuned / "vae.safetensors", tmp_path, "--force", steps=1))      # and the next one
    drr.load_checkpoint(tmp_path)


def test_a_resumed_fine_tuning_is_the_uninterrupted_one(untrained_decoder, fine_tuned, tmp_path):
    """The spectral norms' estimates are part of the state."""
    shutil.copytree(fine_tuned, tmp_path / "run")
    (tmp_path / "run" / "vae_state_000000020.pt").unlink()
    finished(fine_tune(untrained_decoder / "vae.safetensors", tmp_path / "run", "--resume"))
    assert_same(fine_tuned, tmp_path / "run", "vae")


def test_decoder_only_refuses_other_codes(untrained_decoder, fine_tuned, whole, tmp_path):
    source = untrained_decoder / "vae.safetensors"
    other = another_vae(source, tmp_path / "other.safetensors")
    refused(fine_tune(tmp_path / "nowhere", tmp_path / "a"), "nowhere", "does not exist")
    refused(fine_tune(source, tmp_path / "a", "vae.num_res_blocks=2"), "num_res_blocks is 1", "2")
    refused(fine_tune(source, tmp_path / "a", "--init", source), "--init")
    refused(fine_tune(source, tmp_path / "a", "vae.quantize_start=3"), "quantize_start")
    refused(fine_tune(other, fine_tuned, "--resume"), "the codes of --decoder-only")
    refused(fine_tune(other, fine_tuned, "--resume", "--force", "vae.steps=21"), "other codes")
    refused(fine_tune(other, whole.transformer, "--force"), "transformer.safetensors", "other codes")
    refused(fine_tune(source, untrained_decoder), "is there already", "--force")
    official = train("vae", "smoke", "--official", source, "--decoder-only", source, "--out", tmp_path / "a")
    refused(official, "--official")
    assert not (tmp_path / "a").exists()
