"""Texts as conditions: captions of all kinds of data -> tokens -> a training, pictures, exports, CLIP scores."""
import contextlib
import io
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

datasets = pytest.importorskip("datasets", reason="datasets is not installed (requirements-data.txt)")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (requirements-text.txt)")

import drr
import export
import sample
import train_transformer
from conftest import random_checkpoint
from processes import assert_same, finished, receives, refused, rows, train
from support import backends, common, data, models, text
from test_data import lay_out, own_cache, png, tar  # noqa: F401: own_cache is a fixture

CAPTIONS = ["a wall", "Stripes"]
PICTURES = [np.full((32, 32, 3), 90, np.uint8), np.tile(np.uint8([[[0]], [[255]]]), (16, 32, 3))]
SMALL = SimpleNamespace(text_length=8, text_vocab=64)
TINY = ["cond=text", "text_length=8", "text_vocab=64", "n_spatial=1", "batch_size=8", "lr=0.003", "muon_lr=0.01"]


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture
def official(tmp_path):
    """vocab.json and merges.txt of a tokenizer."""
    pieces = ["[PAD]", "[UNK]", "a", "a</w>", "c", "t", "t</w>", "s</w>", "ca", "cat</w>"]
    merges = b"#version: 0.2\nc a\nca t</w>\n"
    vocab = json.dumps({piece: i for i, piece in enumerate(pieces)}).encode()
    lay_out(tmp_path, {"vocab.json": vocab, "merges.txt": merges})
    return tmp_path / "vocab.json", tmp_path / "merges.txt"


# === A model that has learned two pictures ==================================================================
def options(folder, out, *more):
    """Of a training of captions, with the RQ-VAE of `folder`, which has random weights."""
    return ("smoke", "--data", folder / "data", "--vae", folder / "class" / "vae.safetensors", "--out", out,
            "--precision", "fp32", "data.flip=false", "data.class_views=1", *(f"transformer.{change}" for change in TINY), *more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures with captions in `data`, a random model of classes in `class`, a trained one of texts in `run`."""
    folder = tmp_path_factory.mktemp("text")
    random_checkpoint(folder / "class", ["n1", "n2"], ["one", "two"], "transformer.n_spatial=1")
    for i, (picture, caption) in enumerate(zip(PICTURES, CAPTIONS)):
        for split in ("train", "val"):
            lay_out(folder / "data" / split, {f"{i}.png": encoded(picture), f"{i}.txt": caption.encode()})
    lay_out(folder / "data", {"train/without.png": png()})
    train_options = "steps=120", "save_every=120", "picture_every=30"
    done = train("transformer", *options(folder, folder / "run", *(f"transformer.{o}" for o in train_options)))
    assert "skipped 1 of 3 images, whose captions" in finished(done).output
    return folder


@pytest.fixture
def draw(call, folder, tmp_path):
    """draw(text, ...) draws four pictures by sample.py: (4, S, S, 3)."""
    def draw(text, *more, checkpoint=("--checkpoint", folder / "run"), num=4):
        shutil.rmtree(tmp_path / "single", ignore_errors=True)
        call(sample.main, "--text", text, "--num", num, "--out", "x.png", "--out-dir", "single", "--precision",
             "fp32", "--device", "cpu", *checkpoint, *more)
        return np.stack([np.array(Image.open(path)) for path in sorted((tmp_path / "single").iterdir())])
    return draw


def test_two_captions_learn_two_pictures(folder, draw):
    vae, _ = drr.load_vae(folder / "run" / "vae.safetensors")
    images = torch.from_numpy(np.stack(PICTURES)).permute(0, 3, 1, 2)
    own = common.to_pixels(vae.decode(vae.encode(common.to_float(images, "cpu")))).astype(int)
    for i, caption in enumerate(CAPTIONS):
        for picture in draw(caption.upper()):
            distances = np.abs(picture - own).mean((1, 2, 3))
            assert distances[i] < 0.5 * distances[1 - i]
    losses = [float(row["val_loss"]) for row in rows(folder / "run", "transformer") if row["val_loss"]]
    assert len(losses) == 4 and losses[-1] < 0.2 * losses[0]
    assert (folder / "run" / "samples.txt").read_text().splitlines() == [*8 * CAPTIONS[:1], *8 * CAPTIONS[1:]]


def test_a_tokenizer_travels_with_its_checkpoint_and_its_export(folder, draw, tmp_path):
    checkpoint = models.load_checkpoint(folder / "run")
    export.export(*checkpoint, tmp_path / "onnx", "fp32", 4)
    _, info = backends.load("onnx", tmp_path / "onnx", torch.device("cpu"))
    tokenizer = (folder / "run" / "tokenizer.json").read_text()
    assert tokenizer == checkpoint[2].transformer.tokenizer == info.transformer.tokenizer
    assert torch.equal(text.prompts(info, CAPTIONS), text.tokenize(tokenizer, CAPTIONS))
    one_update = "--t-draft", 1, "--m", 0                    # a near tie that falls otherwise changes no more
    graphs = "--backend", "onnx", "--exported", tmp_path / "onnx"
    ours, theirs, other = (draw(*arguments).astype(int) for arguments in (
        (CAPTIONS[0], *one_update), (CAPTIONS[0], *one_update, *graphs), (CAPTIONS[1], *one_update)))
    assert (abs(ours - theirs) <= 2).mean() > 0.95 > 0.5 > (abs(ours - other) <= 2).mean()


def test_a_run_that_was_stopped_goes_on_the_same_with_the_same_captions_only(folder, tmp_path):
    shutil.copytree(folder / "data", tmp_path / "data")
    lay_out(tmp_path, {"data/train/0.txt": b"red fire\nfar smoke\na hill\n", "data/train/1.txt": b"one\ntwo"})
    short = [f"transformer.{change}" for change in ("steps=6", "log_every=1", "cond_dropout=0.5")]

    def run(out, *more, **how):
        return train("transformer", *options(folder, tmp_path / out, *short, "--data", tmp_path / "data", *more),
                     **how)
    # what reaches the model: the null condition takes the places of all tokens of a text or of none
    watch = """
import drr
loss = drr.masked_loss
def masked_loss(model, codes, mask, cond, targets=None):
    print("null", *(cond == model.null).sum(1).tolist())
    return loss(model, codes, mask, cond, targets)
drr.masked_loss = masked_loss
"""
    done = finished(run("whole", before=watch))
    counts = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("null")]
    assert {count for step in counts for count in step} == {"0", "8"}
    assert run("stopped", before=receives("SIGTERM", step=3)).returncode == 128 + 15
    finished(run("stopped", "--resume"))
    assert_same(tmp_path / "whole", tmp_path / "stopped", "transformer")
    lay_out(tmp_path, {"data/train/1.txt": b"one\nthree"})
    refused(run("stopped", "--resume"), "the captions", "--force")
    refused(run("new", without=["tokenizers"]), "requirements-text.txt")


def test_init_learns_the_conditions_anew_unless_it_knows_texts_and_keeps_the_rest(folder, official, tmp_path):
    still = "transformer.lr=1e-12", "transformer.muon_lr=0", "transformer.steps=1", "transformer.warmup=0"
    for known, more in (("class", ("--tokenizer", *official)), ("run", ())):
        given = folder / known / "transformer.safetensors"
        done = finished(train("transformer", *options(folder, tmp_path / known, "--init", given, *still, *more)))
        assert ("learned from scratch" in done.output) == (known == "class")
        before, after = (drr.read_model(path)[0] for path in (given, tmp_path / known / given.name))
        anew = {name for name in after if known == "class" and name.startswith("cond_")}
        assert all(torch.allclose(before[name], after[name], atol=1e-3) for name in after.keys() - anew)
        assert len(anew) == 2 * (known == "class") and after["cond_pos"].shape == (8, 64)
    tokenizer = drr.read_model(tmp_path / "class" / "transformer.safetensors")[1]["transformer"]["tokenizer"]
    assert tokenizer == text.official_tokenizer(official, SMALL)
    assert (tmp_path / "run/tokenizer.json").read_text() == (folder / "run/tokenizer.json").read_text()
