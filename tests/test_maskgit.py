"""Halton-MaskGIT: parity with the official code, its sampler, published files, mistakes."""
import functools
import pickle
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TESTS, sample_section
from PIL import Image
from processes import execute, finished, refused
from safetensors.torch import load_file, save_file
from test_mistakes import Attack

import drr
from related import maskgit
from support import models
from support.common import load_config, run, to_float, to_pixels
from tools import strategies

CPU = torch.device("cpu")
FILES = TESTS / "fixtures"
VQ = FILES / "halton_vq.pt"
HEADS = {"main": 4, "uneven": 6}


def transformer_file(name="main"):
    return FILES / f"halton_transformer_{name}.pth"


@functools.cache
def numbers():
    return load_file(FILES / "halton.safetensors")


@functools.cache
def official(name="main"):
    return maskgit.load_published(transformer_file(name), VQ, HEADS[name])


def torch_model():
    return drr.TorchModel(*official(), CPU, torch.float32)


def rewrite(path, name="main", suffix=".pth", change=lambda state: None):
    """The fixture's transformer, changed, in the published layout or as .safetensors without nesting."""
    state = torch.load(transformer_file(name), weights_only=True)["model_state_dict"]
    state = {key: tensor.clone() for key, tensor in state.items()}
    change(state)
    if suffix == ".pth":
        torch.save({"iter": 1, "model_state_dict": state, "optimizer_state_dict": None}, path / f"t{suffix}")
    else:
        save_file(state, path / f"t{suffix}")
    return path / f"t{suffix}"


# === Parity with the official code ==========================================================================
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", HEADS)
def test_official_logits(tmp_path, name, suffix):
    """In `uneven` the width is no multiple of the heads, keys have prefixes, and an optimizer lies beside."""
    if suffix == ".pth":
        path = transformer_file(name)
    else:
        path = rewrite(tmp_path, name, suffix)
    _, transformer = maskgit.load_published(path, VQ, HEADS[name])
    given = {key: numbers()[f"{name}.io.{key}"] for key in ("codes", "labels", "drop", "logits")}
    codes = given["codes"].flatten(1)                                       # (B, N), 128 where hidden
    cond = given["labels"].where(~given["drop"], transformer.null)[:, None]
    logits = transformer.logits(codes.clamp(max=127)[..., None], codes == 128, cond)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, given["logits"][..., :128], atol=1e-4, rtol=0)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_official_codes_and_images(tmp_path, suffix):
    vae, _ = official()
    if suffix == ".safetensors":
        state = torch.load(VQ, weights_only=True)["model"]
        save_file({key: tensor.clone() for key, tensor in state.items()}, tmp_path / "vq.safetensors")
        vae, _ = maskgit.load_vq(tmp_path / "vq.safetensors", 8, load_config("smoke").vae)
    given = numbers()
    for size in "full", "small":                       # 128x128, 64x64: convolutions take either
        codes = vae.encode(given[f"vq.encode.{size}.image_u8"] / 127.5 - 1)
        assert torch.equal(codes[..., 0], given[f"vq.encode.{size}.codes"].flatten(1))
        images = vae.decode(given[f"vq.decode.{size}.codes"].flatten(1)[..., None])
        torch.testing.assert_close(images, given[f"vq.decode.{size}.images"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("d, blocks, side, millions", [
    (384, 6, 16, 23.0), (512, 12, 16, 69.3), (512, 12, 24, 69.5), (768, 12, 24, 142), (1024, 24, 24, 480)])
def test_parameter_counts_are_the_published_ones(d, blocks, side, millions):
    c = SimpleNamespace(d_model=d, head_dim=d // maskgit.HEADS[d], n_spatial=blocks, cond="class")
    with torch.device("meta"):
        model = maskgit.MaskGIT(c, 1000, side ** 2, 1, torch.empty(16384, 8))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.05 if millions < 100 else 0.5)


# === Decoding: the official sampler, and ours ===============================================================
@pytest.mark.parametrize("side, T", [(8, 6), (16, 32), (24, 32)])
def test_official_order_and_schedule(side, T):
    order = strategies.halton_order(torch.zeros(1, side ** 2, dtype=torch.long))
    assert torch.equal(order[0], numbers()[f"schedule.halton_order_{side}"])
    sizes = torch.tensor([positions.shape[1] for positions in strategies.halton_partition(order, T)])
    assert torch.equal(sizes.cumsum(0), numbers()[f"schedule.halton_known_{side}_{T}"])


def test_official_samples():
    """Six steps of the most likely code, guidance 1 + 0.5; the official sampler without its mask id."""
    given = {key: numbers()[f"trace.no_mask_logit.{key}"].flatten(2) for key in ("codes", "revealed")}
    model, cond = torch_model(), numbers()["trace.labels"][:, None]
    noise = drr.draw_noise(0, range(2), 1, 64, 1)
    c = sample_section(t_draft=6, rounds=0, draft_guidance=1.5, top_k=1)
    c.order = "halton"
    states = list(strategies.decode(model, cond, noise, c))
    assert len(states) == 6
    state = drr.State("draft", 0, torch.zeros_like(states[0].codes), torch.ones(2, 64, dtype=torch.bool),
                      torch.zeros(2, 64))
    for drawn, codes, revealed in zip(states, given["codes"], given["revealed"]):
        positions = revealed.nonzero()[:, 1].view(2, -1)
        state = drr.update(model, state, positions, noise[1][0], cond, drr.Sampling(1.0, 1.5, 1, 1.0))
        for result in drawn, state:
            assert torch.equal(codes.where(~result.hidden, 128), codes)
            assert torch.equal(result.codes[..., 0].where(~result.hidden, 128), codes)


def test_halton_is_one_order_for_all_images_and_for_any_region():
    region = torch.arange(64) % 8 < 3
    model, cond = torch_model(), torch.tensor([[1], [2]])
    c = sample_section(t_draft=5, rounds=1)
    c.order = "halton"
    codes = torch.zeros(2, 64, 1, dtype=torch.long)
    states = list(strategies.decode(model, cond, drr.draw_noise(0, range(2), 2, 64, 1), c, codes, region))
    assert len(states) == 5 + 2 and not states[4].hidden.any()
    for state in states:
        assert torch.equal(state.hidden[0], state.hidden[1]) and not state.codes[:, ~region].any()


# === Training ===============================================================================================
def test_independent_mask_hides_what_is_published():
    """At least one code; less than a half in 29% of the images, less than a quarter in 8%."""
    mask = maskgit.independent_mask(torch.rand(4000, 257, generator=torch.Generator().manual_seed(0)))
    share = mask.float().mean(1)
    assert mask.any(1).all() and share.mean() == pytest.approx(2 / np.pi, abs=0.02)
    assert (share < 0.5).float().mean() == pytest.approx(0.29, abs=0.03)
    assert (share < 0.25).float().mean() == pytest.approx(0.08, abs=0.02)


def test_recomputed_blocks_give_the_same_gradients():
    transformer = maskgit.load_published(transformer_file(), VQ, 4)[1].requires_grad_(True).train()
    codes, mask = torch.randint(128, (2, 64, 1)), torch.rand(2, 64) < 0.5
    gradients = []
    for transformer.recompute in False, True:
        transformer.zero_grad()
        loss, accuracy = transformer(codes, mask, torch.tensor([[1], [10]]))
        assert loss.shape == accuracy.shape == (1,)
        loss.mean().backward()
        gradients.append([p.grad.clone() for p in transformer.parameters()])
    torch.testing.assert_close(*gradients)


# === Published files -> checkpoint -> pictures ==============================================================
@pytest.fixture
def convert(monkeypatch):
    """convert(...) is `python -m related.maskgit ...` in this process."""
    def convert(*arguments):
        monkeypatch.setattr("sys.argv", ["related.maskgit", *map(str, arguments)])
        run(maskgit.main)
    return convert


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    done = finished(execute("related.maskgit", transformer_file(), VQ, "--heads", 4, "--out", "run",
                            cwd=folder))
    assert "10 classes, 128x128 -> run" in done.stdout
    photo = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    Image.fromarray(photo).resize((128, 128)).save(folder / "photo.png")
    return folder


def test_a_converted_file_is_a_checkpoint(converted):
    vae, transformer, info = models.load_checkpoint(converted / "run")
    for module, same in zip((vae, transformer), official()):
        assert drr.fingerprint(module) == drr.fingerprint(same)
    assert (info.transformer.kind, info.classes) == ("maskgit", [str(i) for i in range(10)])


def test_half_halves_the_transformers_file(converted, tmp_path, convert):
    convert(transformer_file(), VQ, "--heads", 4, "--half", "--out", tmp_path)
    small, large = ((folder / "transformer.safetensors") for folder in (tmp_path, converted / "run"))
    assert small.stat().st_size < 0.55 * large.stat().st_size
    expected = {name: tensor.half().float() for name, tensor in official()[1].state_dict().items()}
    ours = models.load_checkpoint(tmp_path)[1].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


def test_imagenets_classes_have_their_names(tmp_path, convert):
    """A transformer of a thousand classes is ImageNet's."""
    def thousand(state):
        state["cls_emb.weight"] = torch.zeros(1001, 64)
    path = rewrite(tmp_path, change=thousand)
    convert(path, VQ, "--heads", 4, "--out", tmp_path / "run")
    info = models.load_checkpoint(tmp_path / "run")[2]
    assert info.classes[980] == "n09472597" and info.titles[980] == "volcano"


@pytest.mark.parametrize("arguments, tiles", [
    ("--class 3 --strip --t-draft 4 --m 2 --guidance 3 --draft-guidance 2", 6),
    ("--class 7 --image photo.png --region 32,48,64,128", 3)])
def test_a_converted_file_draws(converted, arguments, tiles):
    done = finished(execute("sample.py", "--checkpoint", "run", "--num", 1, "--precision", "fp32", "--out",
                            "x.png", "--out-dir", "each", *arguments.split(), cwd=converted))
    assert "1 images" in done.stdout and Image.open(converted / "x.png").width == tiles * 130 - 2
    vae, transformer, info = models.load_checkpoint(converted / "run")
    model, c = drr.TorchModel(vae, transformer, CPU, torch.float32), info.sample
    known, label = (), 3
    if "--image" in arguments:
        codes = model.encode(to_float(torch.tensor(np.array(Image.open(converted / "photo.png"))).permute(
            2, 0, 1)[None], CPU))
        region = torch.zeros(8, 8, dtype=torch.bool)
        region[3:8, 2:4] = True
        known, label = (codes, region.flatten()), 7
        c.t_draft = 10                                     # as many as there are hidden codes
    else:
        vars(c).update(t_draft=4, rounds=2, revise_guidance=3.0, draft_guidance=2.0)
    drawn = drr.sample(model, torch.tensor([[label]]), 0, [0], c, *known)
    if known:
        assert torch.equal(drawn[:, ~known[1]], known[0][:, ~known[1]])
        assert not torch.equal(drawn[:, known[1]], known[0][:, known[1]])
    picture = np.array(Image.open(converted / "each" / "000.png")).astype(int)
    assert abs(picture - to_pixels(model.decode(drawn))[0]).max() <= 1


def test_a_converted_file_reconstructs(converted):
    finished(execute("sample.py", "--checkpoint", "run", "--reconstruct", "photo.png", "--out", "r.png",
                     cwd=converted))
    assert Image.open(converted / "r.png").width == 2 * 258 - 2            # the picture and its only depth


def test_graphs_of_a_converted_file_draw_pytorchs_picture(converted):
    finished(execute("export.py", "--checkpoint", "run", "--out", "exported", "--max-batch", 2,
                     cwd=converted))
    pictures = []
    for which in ("--checkpoint", "run"), ("--backend", "onnx", "--exported", "exported"):
        finished(execute("sample.py", *which, "--class", 3, "--num", 1, "--precision", "fp32", "--t-draft", 8,
                         "--out", "x.png", cwd=converted))
        pictures.append(np.array(Image.open(converted / "x.png")).astype(int))
    assert abs(pictures[0] - pictures[1]).max() <= 1                       # of 255


# === Mistakes ===============================================================================================
@pytest.fixture
def is_refused(convert, tmp_path, capsys):
    """is_refused(words, ...) expects one sentence with these words, status 2, and nothing written."""
    def is_refused(words, *arguments):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(SystemExit) as end:
            convert(*arguments, "--out", tmp_path / "new")
        refused(SimpleNamespace(returncode=end.value.code, output=capsys.readouterr().err), *words)
        assert sorted(tmp_path.iterdir()) == before
    return is_refused


def resize(state, key, *size):
    state[key] = torch.zeros(*size)


@pytest.mark.parametrize("change, heads, words", [
    (lambda state: resize(state, "tok_emb.weight", 65, 64), 4, ("knows 64 codes", "has 128", "one release")),
    (lambda state: resize(state, "in_proj.weight", 64, 64, 2, 2), 4, ("2 x 2", "not supported")),
    (lambda state: state.pop("transformer.layers.1.attn.wk.weight"), 4, ("1.attn.wk",)),
    (lambda state: state.pop("reg_tokens.weight"), 4, ("Missing", "register")),
    (lambda state: state.update(more=torch.ones(2)), 4, ("Unexpected", "more")),
    (lambda state: state.clear(), 4, ("t.pth",)),
    (lambda state: None, None, ("width 64", "--heads")),
    (lambda state: None, 5, ("5 heads", "t.pth")),
    (lambda state: None, 0, ("--heads is 0", "from 1 to 64")),
    (lambda state: None, 65, ("--heads is 65", "from 1 to 64"))])
def test_a_transformer_that_does_not_fit_is_refused(tmp_path, is_refused, change, heads, words):
    path = rewrite(tmp_path, change=change)
    given = [] if heads is None else ["--heads", heads]
    is_refused(words, path, VQ, *given)


@pytest.mark.parametrize("number, name", [(0, "t.pth"), (1, "vq.pt"), (1, "vq.safetensors")])
@pytest.mark.parametrize("how", ["truncated", "attack", "missing", "other"])
def test_a_damaged_file_is_refused_and_never_executed(tmp_path, is_refused, number, name, how):
    source = VQ if number else transformer_file()
    path = tmp_path / name
    if how == "truncated":
        shutil.copy(source, path)
        path.write_bytes(path.read_bytes()[:50_000])
    elif how == "attack":
        path.write_bytes(pickle.dumps({"model": Attack(tmp_path / "executed")}, 2))
    elif how == "other":                                   # the two files the other way round
        shutil.copy(transformer_file() if number else VQ, path)
    files = [transformer_file(), VQ]
    files[number] = path
    is_refused([name], *files, "--heads", 4)


def test_a_checkpoint_that_is_there_stays(converted):
    before = {path: path.stat().st_mtime_ns for path in (converted / "run").iterdir()}
    done = execute("related.maskgit", transformer_file("uneven"), VQ, "--heads", 6, "--out", "run",
                   cwd=converted)
    refused(done, "run/vae.safetensors is there already", "--force")
    assert before == {path: path.stat().st_mtime_ns for path in (converted / "run").iterdir()}


def test_the_hub_is_asked_for_both_files_where_it_is_installed(monkeypatch, convert, is_refused, tmp_path):
    arguments = "big.pth", "vq.pt", "--heads", 4, "--hub", "some/repository"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)              # not installed
    is_refused(["big.pth", "pip install huggingface_hub"], *arguments)
    local = {"some/repository": transformer_file(), "FoundationVision/LlamaGen": VQ}
    asked = []

    def hf_hub_download(repository, name):
        asked.append(name)
        return str(local[repository])
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=hf_hub_download))
    convert(*arguments, "--out", tmp_path / "run")
    assert asked == ["big.pth", "vq.pt"] and models.load_checkpoint(tmp_path / "run")[1].null == 10
    local.clear()                                                          # no network, or no such file
    is_refused(["some/repository", "leave --hub out"], *arguments)


@pytest.mark.parametrize("depth, cond", [(4, "class"), (1, "none")])
def test_more_codes_or_no_classes_are_refused(depth, cond):
    c = load_config("smoke-maskgit", [f"transformer.cond={cond}"]).transformer
    with pytest.raises(drr.UserError, match="classes and stacks of one code.*vae.depth=1"):
        models.build(c, 4, 64, depth, torch.zeros(64, 8))
