"""Texts as conditions: captions in data of all kinds -> tokens -> trainings, pictures, exports, scores."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

datasets = pytest.importorskip("datasets", reason="datasets is not installed (requirements-data.txt)")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (requirements-text.txt)")

import drr
import export
import sample
import train_transformer
from conftest import random_checkpoint
from processes import assert_same, finished, receives, refused, rows, train
from related import rq_transformer
from support import backends, common, data, models, text
from support.clip import Clip
from test_data import lay_out, own_cache, picture, png, tar  # noqa: F401: own_cache is a fixture
from test_rq_transformer import write_release
from tools import captions, evaluate

CAPTIONS = ["a wall", "Stripes"]
PICTURES = np.stack([picture(i, (32, 32)) for i in range(2)])                 # of noise
SMALL = SimpleNamespace(cond="text", text_length=8, text_vocab=64)
GIVEN = SimpleNamespace(tokenizer=None, resume=False, init=None, force=False)
TINY = "cond=text text_length=8 text_vocab=64 n_spatial=1 batch_size=8 lr=0.003 muon_lr=0.01".split()


@pytest.fixture
def official(tmp_path):
    """vocab.json and merges.txt of a tokenizer."""
    pieces = "[PAD] [UNK] a a</w> c t t</w> s</w> ca cat</w>".split()
    vocab = json.dumps({piece: i for i, piece in enumerate(pieces)})
    lay_out(tmp_path, {"vocab.json": vocab.encode(), "merges.txt": b"#version: 0.2\nc a\nca t</w>\n"})
    return tmp_path / "vocab.json", tmp_path / "merges.txt"


# === A model that has learned two pictures ==================================================================
def options(folder, out, *more):
    """Of a training of captions, with the RQ-VAE of `folder`, which has random weights."""
    return ("smoke", "--data", folder / "data", "--vae", folder / "class" / "vae.safetensors", "--out", out,
            "--precision", "fp32", "data.flip=false", "data.class_views=1",
            *(f"transformer.{change}" for change in TINY), *more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures with captions in `data`; a random model of classes in `class`, a trained one in `run`."""
    folder = tmp_path_factory.mktemp("text")
    random_checkpoint(folder / "class", ["n1", "n2"], ["one", "two"], "transformer.n_spatial=1")
    content = {f"{i}.png": png(i, (32, 32)) for i in range(2)}
    content |= {f"{i}.txt": CAPTIONS[i].encode() for i in range(2)}
    lay_out(folder / "data/val", content)
    lay_out(folder / "data/train", {**content, "without.png": png()})
    train_options = "transformer.steps=120", "transformer.save_every=120", "transformer.picture_every=30"
    done = train("transformer", *options(folder, folder / "run", *train_options))
    assert "skipped 1 of 3 images, whose captions" in finished(done).output
    return folder


@pytest.fixture
def draw(call, folder, tmp_path):
    """draw(text, ...) draws four pictures by sample.py: (4, S, S, 3)."""
    def draw(text, *more, checkpoint=("--checkpoint", folder / "run")):
        call(sample.main, "--text", text, "--num", 4, "--out", "x.png", "--out-dir", "single",
             "--precision", "fp32", "--device", "cpu", *checkpoint, *more)
        return np.stack([np.array(Image.open(path)) for path in sorted((tmp_path / "single").iterdir())])
    return draw


def test_two_captions_learn_two_pictures(folder, draw, tmp_path):
    vae, _ = drr.load_vae(folder / "run" / "vae.safetensors")
    images = torch.from_numpy(PICTURES).permute(0, 3, 1, 2)
    own = common.to_pixels(vae.decode(vae.encode(common.to_float(images, "cpu")))).astype(int)
    (tmp_path / "more.txt").write_text(f"\n{CAPTIONS[1]}\n")
    for i, drawn in enumerate(draw("A WALL", "--text-file", "more.txt")):      # in turn
        distances = np.abs(drawn - own).mean((1, 2, 3))
        assert distances[i % 2] < 0.5 * distances[1 - i % 2]
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


def test_a_run_that_was_stopped_goes_on_the_same_with_the_same_captions_only(folder, official, tmp_path):
    shutil.copytree(folder / "data", tmp_path / "data")
    lay_out(tmp_path, {"data/train/0.txt": b"red fire\nfar smoke\na hill\n", "data/train/1.txt": b"one\ntwo"})
    short = [f"transformer.{change}" for change in ("steps=6", "log_every=1", "cond_dropout=0.5")]
    short += "--data", tmp_path / "data"

    def run(out, *more, **how):
        return train("transformer", *options(folder, tmp_path / out, *short, *more), **how)
    # What reaches the model: the null condition takes the places of all tokens of a text, or of none.
    watch = """import drr
loss = drr.masked_loss
drr.masked_loss = lambda model, codes, mask, cond, targets=None: (
    print("null", *(cond == model.null).sum(1).tolist()) or loss(model, codes, mask, cond, targets))"""
    done = finished(run("whole", before=watch))
    counts = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("null")]
    assert {count for step in counts for count in step} == {"0", "8"}
    assert run("stopped", before=receives("SIGTERM", step=3)).returncode == 128 + 15
    refused(run("stopped", "--resume", "--tokenizer", *official), "the captions", "--force")
    finished(run("stopped", "--resume"))
    assert_same(tmp_path / "whole", tmp_path / "stopped", "transformer")
    lay_out(tmp_path, {"data/train/1.txt": b"one\nthree"})
    refused(run("stopped", "--resume"), "the captions", "--force")
    refused(run("new", without=["tokenizers"]), "requirements-text.txt")


def test_init_learns_the_conditions_anew_unless_it_knows_texts_and_keeps_the_rest(folder, official, tmp_path):
    still = "transformer.lr=1e-12", "transformer.muon_lr=0", "transformer.steps=1", "transformer.warmup=0"
    for known, more in (("class", ("--tokenizer", *official)), ("run", ())):
        given = folder / known / "transformer.safetensors"
        done = train("transformer", *options(folder, tmp_path / known, "--init", given, *still, *more))
        assert ("begin anew" in finished(done).output) == (known == "class")
        before, after = (drr.read_model(path)[0] for path in (given, tmp_path / known / given.name))
        anew = {name for name in after if known == "class" and name.startswith("cond_")}
        assert all(torch.allclose(before[name], after[name], atol=1e-3) for name in after.keys() - anew)
        assert len(anew) == 2 * (known == "class") and after["cond_pos"].shape == (8, 64)
    tokenizer = drr.read_model(tmp_path / "class" / "transformer.safetensors")[1]["transformer"]["tokenizer"]
    assert tokenizer == text.official_tokenizer(official, SMALL)
    assert (tmp_path / "run/tokenizer.json").read_text() == (folder / "run/tokenizer.json").read_text()


# === Tokens =================================================================================================
def test_two_files_of_a_tokenizer_give_its_ids_padded_cut_and_unknown_or_are_refused(official, capsys):
    tokenizer = text.official_tokenizer(official, SMALL)
    theirs = tokenizers.CharBPETokenizer(*map(str, official), unk_token="[UNK]", lowercase=True)
    for string, ids in (("A cat", [3, 9]), ("cats", [8, 5, 7]), ("ca\tCa\nzt", [4, 3, 4, 3, 1, 6]), ("", [])):
        assert theirs.encode(string).ids == ids
        assert text.tokenize(tokenizer, [string]).tolist() == [ids + [0] * (8 - len(ids))]
    info = SimpleNamespace(transformer=SimpleNamespace(tokenizer=tokenizer, **vars(SMALL)))
    assert text.prompts(info, ["a cat" + " cat" * 6 + "s"]).tolist() == [[3, *6 * [9], 8]]
    assert "after 'a cat cat cat cat cat cat ca'" in capsys.readouterr().err
    for files, message in ((official[::-1], "in this order"), ((official[0], "none"), "none are no vocab"),
                           (official, "10 entries, transformer.text_vocab is 9")):
        with pytest.raises(drr.UserError, match=message):
            text.official_tokenizer(files, SimpleNamespace(cond="text", text_length=8, text_vocab=9))


def test_a_published_text_model_gets_its_tokenizer_and_draws(call, official, tmp_path):
    write_release(tmp_path / "release", "rqtransformer_text")                  # of 4 tokens
    call(rq_transformer.main, tmp_path / "release", "--out", "run", "--tokenizer", *official)
    call(sample.main, "--checkpoint", "run", "--text", "a cat", "--num", 1, "--out", "x.png")
    info = models.load_checkpoint(tmp_path / "run")[2]
    assert text.prompts(info, ["a cat"]).tolist() == [[3, 9, 0, 0]]
    write_release(tmp_path / "classes")
    with pytest.raises(drr.UserError, match="--tokenizer is for releases of text"):
        call(rq_transformer.main, tmp_path / "classes", "--out", "other", "--tokenizer", *official)


@pytest.mark.parametrize("kept", [None, "", "5", '{"x": 1}'])
def test_a_damaged_tokenizer_is_refused(kept):
    with pytest.raises(drr.UserError, match="has no tokenizer, or a damaged one"):
        text.restored(kept, SMALL)


# === Captions ===============================================================================================
TEXTS = [["a red fox", "a fox"], ["snow"], [], ["\xff"], [" ", ""]]             # of five pictures
LISTS = "train.tsv", "train_list.txt"


def write(folder, kind):
    """The pictures with these captions, of which one is no UTF-8, as data of this kind."""
    lines = [[line.encode("latin-1") for line in texts] for texts in TEXTS]
    content = {}
    for i in range(5):
        content |= {f"{i}.png": png(i), f"{i}.txt": b"\n".join(lines[i])}
    del content["2.txt"]
    if kind in ("folder", "shard"):
        lay_out(folder / "train", content if kind == "folder" else {"0.tar": tar(content)})
    elif kind in LISTS:
        rows = [b"%d.png\t%s" % (i, line) for i in range(5) for line in lines[i] or [b""]]
        lay_out(folder, content | {kind: b"\r\n".join([*rows, b"gone.png\tgone"])})
    else:
        column = [texts if texts and texts != ["\xff"] else None for texts in TEXTS]
        if kind == "strings":
            column = [texts and "\n".join(texts) for texts in column]
        images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(5)]
        table = datasets.Dataset.from_dict({"image": images, "caption": [*range(5)], "text": column})
        table.cast_column("image", datasets.Image()).to_parquet(folder / "0.parquet")


@pytest.mark.parametrize("kind", ["folder", "shard", *LISTS, "strings", "lists"])
def test_data_of_every_kind_give_the_same_tokens_for_the_same_captions(tmp_path, kind, capsys):
    write(tmp_path, kind)
    files, _, _ = data.find_images(tmp_path, captions=True)
    captions = text.Captions(files, tmp_path / "out", GIVEN, SMALL)
    expected = [*TEXTS[0], *TEXTS[1]]
    assert captions.count.tolist() == [2, 1, 0, 0, 0]
    assert all(np.array_equal(common.open_image(files[i]), picture(i)) for i in range(5))
    assert captions.tokenizer == text.train_tokenizer(expected, SMALL)
    assert captions.tokens.tolist() == text.tokenize(captions.tokenizer, expected).tolist()
    said = capsys.readouterr()
    assert "skipped 3 of 5 images" in said.out and ("1 others do not exist" in said.err) == (kind in LISTS)


def test_without_a_single_caption_or_listed_image_a_sentence_says_what_is_expected(tmp_path):
    lay_out(tmp_path, {"train/0.png": png(), "train/0.txt": b"\n \n", "listed/train.tsv": b"gone.png\ta",
                        "commas/train.tsv": b"\n0.png,a"})
    with pytest.raises(drr.UserError, match="None of the 1 images has a caption.*expected KEY.txt"):
        text.Captions(data.find_images(tmp_path, captions=True)[0], tmp_path / "out", GIVEN, SMALL)
    for folder, message in (("listed", "no image that exists"), ("commas", "without a TAB, b'0.png,a'")):
        with pytest.raises(drr.UserError, match=message):
            data.find_images(tmp_path / folder, captions=True)


def test_a_step_draws_one_caption_of_each_image_by_seed_and_step_however_many_ranks_there_are():
    captions = object.__new__(text.Captions)                 # image 0 has three, image 1 none, image 2 one
    captions.first, captions.count = np.array([0, 3, 3]), np.array([3, 0, 1])
    captions.tokens = np.arange(4, dtype=np.uint16)[:, None].repeat(8, 1)
    views = SimpleNamespace(file_of=np.array([0, 2]), batch_size=6)
    source = SimpleNamespace(captions=captions, views=views)

    def drawn(seed, step, rows=range(6)):                    # images 0 2 0 2 0 2
        views.rows = np.array(rows)
        return train_transformer.conditions(source, None, views.rows % 2, seed, step)
    whole = torch.stack([drawn(0, step) for step in range(400)])                   # (400, 6, 8)
    assert torch.equal(drawn(0, 7), whole[7]) and not torch.equal(drawn(1, 7), whole[7])
    assert torch.equal(torch.cat([drawn(0, 7, range(2)), drawn(0, 7, range(2, 6))]), whole[7])
    shares = torch.bincount(whole[:, ::2, 0].flatten()) / 1200
    assert len(shares) == 3 and (shares - 1 / 3).abs().max() < 0.07                # 5 standard deviations
    assert (whole[:, 1::2] == 3).all()


# === Mistakes at sample.py ==================================================================================
@pytest.mark.parametrize("arguments, words", [
    ("", "--text"), ("--text=", "''"), ("--text=日本", "日本|knows"), ("--class 1", "no classes|--class"),
    ("--class 1 --text=wall", "no classes|--class"), ("--text-file none.txt", "none.txt"),
    ("--text-file empty.txt", "empty.txt"), ("--text-file latin.txt", "UTF-8"),
    ("--text=wall --best-of 2", "--best-of|--clip"),
    ("--text=wall --best-of 2 --clip x", "CLIP")])
def test_a_mistake_is_refused_in_one_sentence(call, capsys, folder, tmp_path, arguments, words):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SystemExit) as end:
        call(lambda: common.run(sample.main), "--checkpoint", folder / "run", "--out", "new/x.png",
             *arguments.split())
    refused(SimpleNamespace(returncode=end.value.code, output=capsys.readouterr().err), *words.split("|"))
    assert not list(tmp_path.glob("new/*"))


# === CLIP ===================================================================================================
@pytest.fixture(scope="module")
def clip(folder):
    """The folder of a small CLIP model with random weights."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=dict(size, vocab_size=64, max_position_embeddings=8, eos_token_id=2),
        vision_config=dict(size, image_size=32, patch_size=8), projection_dim=8))
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape)
    file = str(folder / "run" / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, pad_token="[PAD]")
    for part in (model, tokenizer):
        part.save_pretrained(folder / "clip")
    return folder / "clip"


def test_the_clip_score_is_the_cosine_of_each_picture_and_its_own_text(clip):
    ours = Clip(clip, torch.device("cpu"))
    images = torch.from_numpy(PICTURES).permute(0, 3, 1, 2)
    scores = ours.score(common.to_float(images, "cpu"), CAPTIONS)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    for score, image, caption in zip(scores, images, CAPTIONS):
        ids = torch.tensor([ours.tokenizer(caption).input_ids])
        with torch.no_grad():
            out = ours.model(input_ids=ids, pixel_values=(image[None] / 255 - mean) / deviation)
        a, b = out.image_embeds[0], out.text_embeds[0]
        assert score.item() == pytest.approx((a @ b / (a @ a * (b @ b)) ** 0.5).item(), abs=1e-4)
    assert abs(scores[0] - scores[1]) > 1e-3


def test_best_of_keeps_each_pictures_best_candidate(draw, clip, monkeypatch):
    drawn, score = [], Clip.score
    monkeypatch.setattr(Clip, "score", lambda self, images, texts: drawn.append(
        (common.to_pixels(images), score(self, images, texts))) or drawn[-1][1])
    kept = draw(CAPTIONS[0], "--draft-temperature", 9, "--m", 0, "--best-of", 3, "--clip", clip)
    candidates, scores = zip(*drawn)
    best = torch.stack(scores).argmax(0).tolist()
    assert np.shape(candidates) == (3, 4, 32, 32, 3) and len(set(best)) > 1
    assert all(np.array_equal(kept[i], candidates[attempt][i]) for i, attempt in enumerate(best))


def test_a_clip_model_that_lacks_weights_is_refused(clip, tmp_path):
    shutil.copytree(clip, tmp_path / "clip")
    tensors = load_file(clip / "model.safetensors")
    tensors.pop("text_projection.weight")
    save_file(tensors, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    with pytest.raises(drr.UserError, match="weights are missing"):
        Clip(tmp_path / "clip", torch.device("cpu"))


def test_an_evaluation_draws_and_scores_one_picture_for_each_caption(call, folder, clip, tmp_path):
    common_options = ("--captions", folder / "data", "--reference", folder / "data" / "val", "--features",
                      "classifier", "--clip", clip, "--json", "result.json", "--device", "cpu")
    call(evaluate.main, "--checkpoint", folder / "run", *common_options, "--out", "drawn", "t_draft=2")
    pixels = torch.from_numpy(np.load("drawn/part-000000.npy")).permute(0, 3, 1, 2)[:2]
    scores = Clip(clip, torch.device("cpu")).score(common.to_float(pixels, "cpu"), CAPTIONS)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["results"]["CLIP score"] == pytest.approx(scores.mean().item(), abs=1e-4)
    assert "plain mean cosine" in result["protocol"]["CLIP score"]
    assert result["protocol"]["captions"] == f"2 of {folder / 'data'}"
    lay_out(tmp_path / "one", {"0.png": png(0, (32, 32))})
    with pytest.raises(drr.UserError, match="1 pictures, and there are 2 captions"):
        call(evaluate.main, "--samples", tmp_path / "one", *common_options)


# === Captions made of classes ===============================================================================
def test_captions_are_made_of_titles_families_and_colours(call, folder, tmp_path):
    names = {"n1": "red_fox", "n2": "kit_fox", "n3": "grey_fox", "n4": "lemon"}
    table = "wnid\tname\n" + "".join(f"{wnid}\t{name}\n" for wnid, name in names.items())
    lay_out(tmp_path, {"data/classes.tsv": table.encode()})
    for i, (wnid, colour) in enumerate(zip(names, ["red", "blue", "white", "yellow"])):
        image = Image.new("RGB", (32, 32), colour)
        image.paste("lime", (0, 0, 32, 32 * (i == 3) // 2))  # the last is half green
        (tmp_path / f"data/train/{wnid}").mkdir(parents=True)
        image.save(tmp_path / f"data/train/{wnid}/0.png")
    call(captions.main, "--data", "data")
    lines = [(tmp_path / f"data/train/{wnid}/0.txt").read_text().splitlines() for wnid in names]
    assert lines[0] == ["red fox", "a photo of a red fox", "a photo of a fox",
                        "a mostly red picture of a red fox"]
    assert [found[-1].split(" picture")[0] for found in lines[1:3]] == ["a mostly blue", "a mostly white"]
    assert lines[3][:2] == ["lemon", "a photo of a lemon"] and len(lines[3]) == 3
    assert lines[3][2].split(" picture")[0] in ("a mostly green", "a mostly yellow")
    (tmp_path / "data/train/n1/0.txt").unlink()
    with pytest.raises(drr.UserError, match="is there already; add --force"):
        call(captions.main, "--data", "data")
    assert not (tmp_path / "data/train/n1/0.txt").exists()
    with pytest.raises(drr.UserError, match="--titles is ','"):
        call(captions.main, "--obeyed", folder / "run", "--titles", ",")


def test_every_sample_without_a_colour_has_one_largest_colour(call, folder):
    said = call(captions.main, "--obeyed", folder / "run", "--titles", "wall", "--number", 4, "t_draft=2",
                "rounds=0", "--device", "cpu")
    table = [line.split() for line in said.splitlines()[2:]]
    assert [row[0] for row in table] == captions.COLOURS
    assert sum(float(row[2]) for row in table) == 1 and all(0 <= float(row[1]) <= 1 for row in table)
