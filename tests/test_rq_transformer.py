"""The autoregressive RQ-Transformer: parity with the official code, decoding, published weights, mistakes."""
import functools
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import TESTS, sample_section, transformer_section
from PIL import Image
from processes import execute, finished, refused
from safetensors.torch import load_file, save_file
from test_mistakes import Attack

import drr
from related import rq_transformer
from support import models
from support.common import load_config, to_pixels

CPU = torch.device("cpu")
NAMES = "rqtransformer", "rqtransformer_text"


@functools.cache
def numbers(name):
    return load_file(TESTS / "fixtures" / f"{name}.safetensors")


def write_release(folder, name="rqtransformer", suffix=".pt", change=None):
    """The fixture's weights in the official layout. change(stage1, stage2) may edit of each `config`, what is
    in its config.yaml, `arch`, a part of that, and `state`, the tensors."""
    config = json.loads((TESTS / "fixtures" / "config.json").read_text())
    sampling = {"temp": 0.9, "top_k": 20, "top_p": 0.8}
    one, two = SimpleNamespace(arch=config["rqvae"]), SimpleNamespace(arch=config[name])
    for stage, source in ((one, "rqvae"), (two, name)):
        stage.config = {"arch": stage.arch, "sampling": sampling}
        stage.state = {key.removeprefix("state_dict."): tensor.clone()
                       for key, tensor in numbers(source).items() if key.startswith("state_dict.")}
    for d in range(4):
        one.state[f"quantizer.codebooks.{d}.weight"] = numbers(name)["aux.codebook"].clone()
    if change:
        change(one, two)
    for number, stage in enumerate((one, two), 1):
        path = folder / f"stage{number}" / f"model{suffix}"
        path.parent.mkdir(parents=True)
        path.with_name("config.yaml").write_text(yaml.safe_dump(stage.config))
        if suffix == ".pt":
            torch.save({"state_dict": stage.state, "epoch": 3}, path)
        else:
            save_file({f"state_dict.{key}": tensor for key, tensor in stage.state.items()}, path)
    return folder


def draw(model, cond, *known, **values):
    c = sample_section(rounds=0, **values)
    return drr.sample(model, cond, 0, range(len(cond)), c, *known, decode=rq_transformer.raster)


def rectangle(rows, columns):
    """A region (N,)."""
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[rows, columns] = True
    return region.flatten()


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """{name: folder}: one release as .pt, one as .safetensors."""
    folder = tmp_path_factory.mktemp("releases")
    return {name: write_release(folder / name, name, suffix) for name, suffix in zip(NAMES, (
        ".pt", ".safetensors"))}


@pytest.fixture(scope="module", params=NAMES)
def official(request, releases):
    """What the official code computes, codes (B, N, D) and cond (B, L), and the two models."""
    given = numbers(request.param)
    vae, transformer = rq_transformer.load_official(releases[request.param])
    codes = given["io.codes"].flatten(1, 2)
    return given, codes, given["io.cond"].view(len(codes), -1), vae, transformer


# === Parity with the official code ==========================================================================
def test_official_logits_and_losses(official):
    given, codes, cond, _, transformer = official
    logits = transformer.logits(codes, cond)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, given["io.logits"].flatten(1, 2), atol=1e-4, rtol=0)
    mask = rq_transformer.hide_all(torch.rand(len(codes), 65))
    loss, _ = transformer(codes, mask, cond)
    torch.testing.assert_close(loss, given["io.loss_hard_per_depth"], atol=1e-5, rtol=0)
    if "io.soft_targets" in given:
        loss, _ = transformer(codes, mask, cond, given["io.soft_targets"].flatten(0, 2))
        torch.testing.assert_close(loss.mean(), given["io.loss_soft"], atol=1e-5, rtol=0)


def test_official_greedy_samples(official):
    given, codes, cond, vae, transformer = official
    model = drr.TorchModel(vae, transformer, CPU, torch.float32)
    y, x = given["sample.start_loc"].tolist()
    region = torch.arange(64) >= 8 * y + x
    for key, known in ("greedy", ()), ("greedy_from", (codes, region)):
        assert torch.equal(draw(model, cond, *known, top_k=1), given[f"sample.{key}"].flatten(1, 2))


# === Who sees what ==========================================================================================
def changed(tokens, i):
    tokens = tokens.clone()
    tokens[:, i] = (tokens[:, i] + 1) % 10
    return tokens


@torch.inference_mode()
def test_the_cache_changes_nothing(official):
    _, codes, cond, _, transformer = official
    L, cache, found = cond.shape[1], None, []
    for t in range(L + 63):
        h, cache = transformer.context_step(codes[:, max(0, t - L)], cond, t, cache)
        found.append(h)
    h = torch.stack(found[L - 1:], 1).flatten(0, 1)
    logits = transformer.depth_logits(h, codes.flatten(0, 1)).view(*codes.shape, -1)
    torch.testing.assert_close(logits, transformer.logits(codes, cond), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_stack_is_seen_from_the_next_position_on_the_condition_everywhere(official):
    _, codes, cond, _, transformer = official
    before = transformer.context(codes, None, cond)
    for n in (0, 1, 30, 62, 63):
        difference = transformer.context(changed(codes, n), None, cond) - before
        difference = difference.abs().amax((0, 2))                 # (N,)
        assert difference[:n + 1].max() == 0 and (difference[n + 1:] > 1e-4).all()
    for i in range(cond.shape[1]):
        difference = transformer.context(codes, None, changed(cond, i)) - before
        assert (difference.abs().amax((0, 2)) > 1e-4).all()


def test_what_is_right_or_below_changes_nothing_that_is_drawn(official):
    _, codes, cond, vae, transformer = official
    model = drr.TorchModel(vae, transformer, CPU, torch.float32)
    region = rectangle(slice(2, 4), slice(3, 6))                   # its last stack is number 29
    drawn = draw(model, cond, codes, region)
    assert torch.equal(drawn[:, ~region], codes[:, ~region])
    assert not torch.equal(drawn[:, region], codes[:, region])
    for n, same in ((30, True), (10, False)):
        assert torch.equal(draw(model, cond, changed(codes, n), region)[:, region], drawn[:, region]) == same


def test_top_k_and_top_p_may_differ_by_depth():
    torch.manual_seed(0)
    model = rq_transformer.RQTransformer(transformer_section(), 5, 4, 3, torch.randn(24, 8))
    h, uniforms = torch.randn(400, 32), torch.rand(400, 3)
    c = sample_section(draft_temperature=100.0, top_k=[1, 3, 0], top_p=[1.0, 1.0, 1e-6])
    with torch.inference_mode():
        stacks, log_p = rq_transformer.draw_stack(model, h, uniforms, c)
        logits = model.depth_logits(h, stacks)
    rank = (logits > logits.gather(2, stacks[..., None])).sum(2)   # (P, D), 0 for the most likely
    assert rank.amax(0).tolist() == [0, 2, 0]
    three = (logits / 100).topk(3).values.softmax(2).gather(2, rank[..., None])[..., 0].log()
    torch.testing.assert_close(log_p, three[:, 1], atol=1e-4, rtol=0)


# === Sizes ==================================================================================================
@pytest.mark.parametrize("preset, count", [
    ("ffhq-355m", 355_393_536), ("church-370m", 370_087_936), ("cat-612m", 612_061_184),
    ("bedroom-612m", 612_061_184), ("imagenet-480m", 480_921_088), ("imagenet-821m", 820_899_328),
    ("imagenet-1.4b", 1_387_529_728), ("imagenet-3.8b", 3_822_488_064), ("cc3m-654m", 654_061_568)])
def test_parameter_counts_are_the_published_ones(preset, count):
    """Of text with the head that predicts it, which we leave out. The paper's kind has [MASK] besides."""
    presets = [f"rq-{preset}"] + [preset] * ("imagenet" not in preset and "cc3m" not in preset)
    for name in presets:
        config = load_config(name)
        c, v = config.transformer, config.vae
        with torch.device("meta"):
            book = torch.empty(v.codebook_size, v.code_dim)
            model = models.build(c, drr.conditions(c, range(1000)), 64, v.depth, book)
        text_head = 2 * c.d_model + (c.d_model + 1) * c.text_vocab
        expected = count - text_head * (c.cond == "text") + v.code_dim * (c.kind == "contextual")
        assert sum(p.numel() for p in model.parameters()) == expected


# === Published weights: folder -> checkpoint -> pictures ====================================================
@pytest.fixture(scope="module")
def converted(releases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    finished(execute("related.rq_transformer", releases["rqtransformer"], "--out", "run", cwd=folder))
    Image.fromarray(np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)).save(
        folder / "photo.png")
    return folder


def test_a_converted_release_is_a_checkpoint(releases, converted, tmp_path):
    write_release(tmp_path / "again", suffix=".safetensors")
    finished(execute("related.rq_transformer", "again", "--out", "same", cwd=tmp_path))
    vae, transformer, info = models.load_checkpoint(converted / "run")
    expected = rq_transformer.load_official(releases["rqtransformer"])
    for module, same in zip((vae, transformer), expected):
        assert drr.fingerprint(module) == drr.fingerprint(same)
    assert (info.sample.draft_temperature, info.sample.top_k, info.sample.top_p) == (0.9, 20, 0.8)
    assert (info.transformer.kind, info.classes) == ("autoregressive", [str(i) for i in range(10)])
    for name in "vae", "transformer":
        file = f"{name}.safetensors"
        assert (tmp_path / "same" / file).read_bytes() == (converted / "run" / file).read_bytes()


def test_bf16_loads_and_draws(converted):
    vae, transformer, _ = models.load_checkpoint(converted / "run", torch.bfloat16)
    whole = models.load_checkpoint(converted / "run")[1].to(torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in transformer.state_dict().items())
    model = drr.TorchModel(vae, transformer, CPU, torch.bfloat16)
    codes = draw(model, torch.tensor([[3]]))
    assert codes.shape == (1, 64, 4) and codes.unique().numel() > 10


@pytest.mark.parametrize("arguments, tiles, updates", [
    ("--strip", 6, 64), ("--image photo.png --region 8,8,16,32", 3, 12)])
def test_a_converted_release_draws(converted, arguments, tiles, updates):
    given = f"--class 3 --num 1 top_k=[5,6,7,8] top_p=[0.9,0.8,1,1] --precision fp32 {arguments}".split()
    done = finished(execute("sample.py", "--checkpoint", "run", "--out", "x.png", "--out-dir", "each", *given,
                            cwd=converted))
    assert f"{updates}/{updates}" in done.stderr
    assert Image.open(converted / "x.png").width == tiles * 130 - 2
    vae, transformer, _ = models.load_checkpoint(converted / "run")
    model = drr.TorchModel(vae, transformer, CPU, torch.float32)
    known = ()
    if updates < 64:
        photo = torch.tensor(np.array(Image.open(converted / "photo.png")))
        codes = model.encode(photo.permute(2, 0, 1)[None] / 127.5 - 1)
        known = codes, rectangle(slice(2, 8), slice(2, 4))
    expected = draw(model, torch.tensor([[3]]), *known, draft_temperature=0.9, top_k=[5, 6, 7, 8],
                    top_p=[0.9, 0.8, 1, 1])
    picture = np.array(Image.open(converted / "each" / "000.png")).astype(int)
    assert abs(picture - to_pixels(model.decode(expected))[0]).max() <= 1


def test_1000_classes_are_imagenets(tmp_path):
    def change(one, two):
        two.arch.update(vocab_size_cond=1000)
        two.state["cond_emb.weight"] = torch.zeros(1000, 64)

    write_release(tmp_path / "release", change=change)
    finished(execute("related.rq_transformer", "release", "--out", "run", cwd=tmp_path))
    info = models.load_checkpoint(tmp_path / "run")[2]
    assert (info.classes[980], info.titles[980]) == ("n09472597", "volcano")


# === Mistakes ===============================================================================================
@pytest.mark.parametrize("change, words", [
    (lambda one, two: two.arch.update(vocab_size=65), ("stage2 is for codes", "65", "of one release")),
    (lambda one, two: two.arch.update(type="rq-vae"), ("stage2/config.yaml", "'rq-vae'", "'rq-transformer'")),
    (lambda one, two: two.arch.update(cumsum_depth_ctx=False), ("stage2/config.yaml", "cumsum_depth_ctx")),
    (lambda one, two: two.arch["head"]["block"].update(n_head=2), ("stage2/config.yaml", "n_head")),
    (lambda one, two: one.arch["ddconfig"].pop("ch"), ("stage1/config.yaml", "'ch'")),
    (lambda one, two: one.arch["ddconfig"].update(ch="wide"), ("stage1",)),
    (lambda one, two: two.config.update(sampling=[1, 2]), ("stage2/config.yaml",)),
    (lambda one, two: two.config["sampling"].update(temp="hot"), ("draft_temperature", "'hot'")),
    (lambda one, two: two.config["sampling"].update(top_k=[1, 2, 3]), ("top_k has 3 values",)),
    (lambda one, two: vars(two).update(state=one.state), ("stage2/model.pt", "another file")),
    (lambda one, two: two.state.update({"head_mlp.more": torch.ones(3)}), ("Unexpected", "w_depth.more")),
    (lambda one, two: two.state.pop("body_transformer.blocks.2.ln1.bias"), ("spatial.2.ln1.bias",)),
    (lambda one, two: two.state.pop("body_transformer.blocks.1.attn.value.bias"), ("attn.value.bias",)),
    (lambda one, two: two.state.update({"tok_emb.weight": torch.ones(64, 64)}), ("model.pt", "tok_emb")),
    (lambda one, two: two.state["classifier.linear.weight"].unsqueeze_(0), ("a classifier for each depth",))])
def test_a_release_that_is_none_is_refused(tmp_path, change, words):
    write_release(tmp_path / "release", change=change)
    refused(execute("related.rq_transformer", "release", "--out", "new", cwd=tmp_path), *words)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("how", ["truncated", "attack", "missing", "no config"])
def test_a_damaged_release_is_refused_and_never_executed(tmp_path, suffix, how):
    write_release(tmp_path / "release", suffix=suffix)
    path = tmp_path / "release" / "stage2" / f"model{suffix}"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:50_000])
    elif how == "attack":
        path.write_bytes(pickle.dumps({"state_dict": Attack(tmp_path / "executed")}))
    else:
        (path if how == "missing" else path.with_name("config.yaml")).unlink()
    word = {"missing": "model.pt does not exist", "no config": "config.yaml does not"}.get(how, path.name)
    refused(execute("related.rq_transformer", "release", "--out", "new", cwd=tmp_path), "stage2/", word)
    assert [file.name for file in tmp_path.iterdir()] == ["release"]


def test_a_checkpoint_that_is_there_stays(releases, converted):
    path = converted / "run" / "vae.safetensors"
    before = path.stat().st_mtime_ns
    for out in "run", "photo.png":
        done = execute("related.rq_transformer", releases["rqtransformer_text"], "--out", out, cwd=converted)
        refused(done, out)
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("arguments, word", [
    ("--guidance 2", "revise_guidance"), ("--draft-guidance 2", "draft_guidance"), ("--t-draft 8", "t_draft"),
    ("--t-revise 2", "t_revise"), ("--m 1", "rounds"), ("--temperature 0.5", "revise_temperature"),
    ("--class none", "null class"), ("--compile", "--compile"), ("top_k=[1,2]", "each of the 4"),
    ("top_p=[1,2,1,1]", "top_p"), ("top_k=[[1],2,3,4]", "top_k")])
def test_what_an_autoregressive_transformer_does_not_do_is_refused(converted, tmp_path, arguments, word):
    done = execute("sample.py", "--checkpoint", converted / "run", "--class", 3, "--out", "new/x.png",
                   *arguments.split(), cwd=tmp_path)
    refused(done, word)
    assert not list(tmp_path.iterdir())
