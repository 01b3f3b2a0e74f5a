"""The autoregressive RQ-Transformer: parity with the official code, decoding, published weights, mistakes."""
import functools
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import TESTS, random_codes, sample_section, transformer_section
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
        stage.state = {key.removeprefix("state_dict."): tensor for key, tensor in numbers(source).items()
                       if key.startswith("state_dict.")}
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
def test_official_logits(official):
    given, codes, cond, _, transformer = official
    logits = transformer.logits(codes, cond)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, given["io.logits"].flatten(1, 2), atol=1e-4, rtol=0)


def test_official_losses(official):
    given, codes, cond, _, transformer = official
    mask = rq_transformer.hide_nothing(torch.rand(len(codes), 65))
    loss, _ = transformer(codes, mask, cond)
    torch.testing.assert_close(loss, given["io.loss_hard_per_depth"], atol=1e-5, rtol=0)
    if "io.soft_targets" in given:
        loss, _ = transformer(codes, mask, cond, given["io.soft_targets"].flatten(0, 2))
        torch.testing.assert_close(loss.mean(), given["io.loss_soft"], atol=1e-5, rtol=0)


def test_official_gradients(releases):
    given = numbers("rqtransformer")
    _, model = rq_transformer.load_official(releases["rqtransformer"])
    codes, mask = given["io.codes"].flatten(1, 2), torch.ones(4, 64, dtype=torch.bool)
    model.requires_grad_(True)(codes, mask, given["io.cond"][:, None])[0].mean().backward()
    d, query = model.ln.weight.numel(), "body_transformer.blocks.0.attn.query.bias"
    ours = {query: model.spatial[0].qkv.bias.grad[:d], "classifier.linear.bias": model.classifier.bias.grad,
            "head_mlp.bias": model.w_depth.bias.grad, "input_mlp.bias": 4 * model.w_in.bias.grad,
            "pos_emb_hw": model.pos.grad[None], "pos_emb_d": model.depth_pos.grad[None],
            "pos_emb_cond": model.cond_pos.grad[None]}
    theirs = {key.removeprefix("grad."): grad for key, grad in given.items() if key.startswith("grad.")}
    assert ours.keys() == theirs.keys()
    for key, grad in theirs.items():
        torch.testing.assert_close(ours[key], grad, atol=1e-4 * grad.abs().max().item(), rtol=0)


def test_official_greedy_samples(official):
    given, codes, cond, vae, transformer = official
    model = drr.TorchModel(vae, transformer, CPU, torch.float32)
    y, x = given["sample.start_loc"].tolist()
    region = torch.arange(64) >= 8 * y + x
    for key, known in ("greedy", ()), ("greedy_from", (codes, region)):
        drawn = drr.sample(model, cond, 0, range(len(cond)), sample_section(rounds=0, top_k=1), *known,
                           decode=rq_transformer.raster)
        assert torch.equal(drawn, given[f"sample.{key}"].flatten(1, 2))


# === Who sees what ==========================================================================================
@torch.no_grad()
def contexts(transformer, codes, cond):
    """`context` token by token, through the cache."""
    L, cache, found = cond.shape[1], None, []
    for t in range(L + codes.shape[1] - 1):
        h, cache = transformer.context_step(codes[:, max(0, t - L)], cond, t, cache)
        found.append(h)
    return torch.stack(found[L - 1:], 1)


def test_the_cache_changes_nothing(official):
    _, codes, cond, _, transformer = official
    h = contexts(transformer, codes, cond).flatten(0, 1)
    logits = transformer.depth_logits(h, codes.flatten(0, 1)).view(*codes.shape, -1)
    torch.testing.assert_close(logits, transformer.logits(codes, cond), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [0, 1, 30, 62, 63])
def test_a_stack_is_seen_from_the_next_position_on(official, n):
    _, codes, cond, _, transformer = official
    other = codes.clone()
    other[:, n, 2] = (other[:, n, 2] + 1) % 64
    with torch.no_grad():
        difference = transformer.context(other, None, cond) - transformer.context(codes, None, cond)
    difference = difference.abs().amax((0, 2))                     # (N,)
    assert difference[:n + 1].max() == 0 and (difference[n + 1:] > 1e-4).all()


@torch.no_grad()
def test_the_condition_is_seen_everywhere_and_its_tokens_are_causal(official):
    _, codes, cond, _, transformer = official
    before = transformer.context(codes, None, cond)
    for i in range(cond.shape[1]):
        other = cond.clone()
        other[:, i] = (other[:, i] + 1) % 10
        assert ((transformer.context(codes, None, other) - before).abs().amax((0, 2)) > 1e-4).all()


def test_what_is_right_or_below_changes_nothing_that_is_drawn(official):
    _, codes, cond, vae, transformer = official
    model = drr.TorchModel(vae, transformer, CPU, torch.float32)
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[2:4, 3:6] = True                                        # its last stack is number 29
    region = region.flatten()

    def draw(known):
        return drr.sample(model, cond, 0, range(len(cond)), sample_section(rounds=0), known, region,
                          decode=rq_transformer.raster)

    drawn = draw(codes)
    assert torch.equal(drawn[:, ~region], codes[:, ~region])
    assert not torch.equal(drawn[:, region], codes[:, region])
    for n, same in ((30, True), (10, False)):
        other = codes.clone()
        other[:, n] = (other[:, n] + 1) % 64
        assert torch.equal(draw(other)[:, region], drawn[:, region]) == same


def test_top_k_and_top_p_may_differ_by_depth():
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
    """Of text also the head that predicts it, which only a training uses. The paper's kind has [MASK], too."""
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


def test_a_converted_release_is_a_checkpoint(official, releases, converted, tmp_path):
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
    codes = drr.sample(model, torch.tensor([[3]]), 0, [0], sample_section(rounds=0), decode=rq_transformer.raster)
    assert codes.shape == (1, 64, 4) and codes.unique().numel() > 10


@pytest.mark.parametrize("arguments, tiles, known", [
    ("--strip top_k=[5,6,7,8] top_p=[0.9,0.8,1,1]", 6, False), ("--image photo.png --region 8,8,16,32", 3, True)])
def test_a_converted_release_draws(converted, arguments, tiles, known):
    done = finished(execute("sample.py", "--checkpoint", "run", "--class", 3, "--num", 1, "--precision", "fp32",
                            "--out", "x.png", "--out-dir", "each", *arguments.split(), cwd=converted))
    assert "1 images" in done.stdout and "64/64" in done.stderr or "12/12" in done.stderr
    assert Image.open(converted / "x.png").width == tiles * 130 - 2
    vae, transformer, info = models.load_checkpoint(converted / "run")
    model = drr.TorchModel(vae, transformer, CPU, torch.float32)
    c = SimpleNamespace(**{**vars(info.sample), "rounds": 0})
    codes = region = None
    if known:
        photo = torch.tensor(np.array(Image.open(converted / "photo.png")))
        codes = model.encode(photo.permute(2, 0, 1)[None] / 127.5 - 1)
        region = torch.zeros(8, 8, dtype=torch.bool)
        region[2:8, 2:4] = True
        region = region.flatten()
    else:
        c.top_k, c.top_p = [5, 6, 7, 8], [0.9, 0.8, 1, 1]
    drawn = drr.sample(model, torch.tensor([[3]]), 0, [0], c, codes, region, decode=rq_transformer.raster)
    picture = np.array(Image.open(converted / "each" / "000.png")).astype(int)
    assert abs(picture - to_pixels(model.decode(drawn))[0]).max() <= 1


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
    (lambda one, two: two.state.pop("body_transformer.blocks.2.ln1.bias"), ("Missing", "spatial.2.ln1.bias")),
    (lambda one, two: two.state.pop("body_transformer.blocks.1.attn.value.bias"), ("attn.value.bias",)),
    (lambda one, two: two.state.update({"tok_emb.weight": torch.ones(64, 64)}), ("stage2/model.pt", "tok_emb")),
    (lambda one, two: two.state.update({"classifier.linear.weight": torch.ones(4, 64, 64)}), ("each depth",))])
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
    word = "stage2/config.yaml" if how == "no config" else "stage2/model"
    refused(execute("related.rq_transformer", "release", "--out", "new", cwd=tmp_path), word)
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
