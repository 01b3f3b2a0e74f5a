"""Published weights: how a release is read, and the RQ-VAE of kakaobrain/rq-vae-transformer in our names."""
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors.torch import load_file

from drr import RQVAE, UserError, explained, fill, read_model, save_vae
from support.common import BUNDLED
from support.runs import refuse_replacing


def convert(args, config, path):
    """train_vae.py --official: writes the published weights in that file to `path`, a vae.safetensors."""
    if args.init or args.resume or args.data or args.decoder_only:
        raise UserError("--official converts weights and trains nothing; leave --init, --resume, --data and "
                        "--decoder-only out.")
    refuse_replacing(path, args.force)
    save_vae(path, load_official_rqvae(args.official, config.vae), config)
    print(f"wrote {path}")


def read_state(path, kind, key="state_dict"):
    """{name: tensor}, the state dict of a release, which a .pt or .pth file holds under `key`; memory-mapped
    where the format allows it. kind: for error sentences. UserError if the file is missing, damaged or of
    another kind."""
    try:
        if Path(path).suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except FileNotFoundError:
        raise UserError(f"The file {path} does not exist; give another path.") from None
    except Exception as error:   # truncated, no torch file, or a pickle with code, which never runs
        raise UserError(f"{path} is no {kind} release that can be read ({type(error).__name__}); copy it "
                        "again or give another file.") from None
    if isinstance(state, dict):
        state = state.get(key, state)  # .safetensors has no nested dictionaries, only prefixes
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise UserError(f"{path} holds no state dict, so it is no {kind} release; give another file.")
    if any(k.startswith(f"{key}.") for k in state):
        state = {k.removeprefix(f"{key}."): v for k, v in state.items() if k.startswith(f"{key}.")}
    if not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path} holds other things than tensors, so it is no {kind} release; give another "
                        "file.")
    return state


def class_names(count):
    """Names and titles of a release's classes: ImageNet's where there are 1,000, in the order of their
    folders' names, else numbers."""
    if count != 1000:
        return [[str(i) for i in range(count)]] * 2
    meta = read_model(BUNDLED / "transformer.safetensors")[1]
    return meta["classes"], meta["titles"]


def load_official_rqvae(path, c):
    """The published RQ-VAE weights (kakaobrain/rq-vae-transformer; .pt or .safetensors) as an RQVAE, float32.

    c: the section `vae` with the release's sizes, `imagenet-256` for the ImageNet one. Only tensors are read
    from a .pt file (weights_only). Raises UserError for a file that is no such release, or of other sizes.
    """
    state = read_state(path, "RQ-VAE")
    # The shared codebook is stored once per depth; its last row is padding, never a code.
    books = {k: state.pop(k) for k in list(state) if k.startswith("quantizer.codebooks.")}
    names = {"weight": "codebook", "cluster_size_ema": "cluster_size", "embed_ema": "embed_sum"}
    for d in range(c.depth):
        for theirs, ours in names.items():
            key = f"quantizer.codebooks.{d}.{theirs}"
            if key not in books:
                raise UserError(f"{path} has no {key}; it is no RQ-VAE release of depth {c.depth}.")
            tensor = books[key][:-1] if theirs == "weight" else books[key]
            if not torch.equal(tensor, state.setdefault(f"quantizer.{ours}", tensor)):
                raise UserError(f"{path} has a codebook per depth; only a shared one is supported.")
    with explained(path):
        vae = RQVAE(c)
    fill(vae, state, path)
    return vae.requires_grad_(False).eval()
