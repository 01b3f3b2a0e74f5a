"""Real runs of the real scripts: train both stages on a few photographs, draw pictures, make every mistake."""
import csv
import importlib.util
import json
import math
import os
import pickle
import runpy
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO, TESTS
from PIL import Image
from processes import execute, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import drr
from support import common

PHOTOS = TESTS / "photos"
BUNDLED = REPO / "checkpoints" / "tiny-imagenet-32"


def pixels(path):
    return np.array(Image.open(path).convert("RGB"))


def rows(path):
    """The rows of a log, without the columns that are a matter of the machine."""
    with open(path, newline="") as f:
        return [{k: v for k, v in row.items() if k not in ("images_per_s", "tokens_per_s", "mfu")} for row in csv.DictReader(f)]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A checkpoint of preset `smoke`, trained on tests/photos."""
    folder = tmp_path_factory.mktemp("trained")
    run("train_vae.py", "smoke", "--data", PHOTOS, "--out", "run", "--precision", "fp32", cwd=folder)
    run("train_transformer.py", "smoke", "--data", PHOTOS, "--out", "run", "--precision", "fp32", cwd=folder)
    return folder / "run"


@pytest.fixture
def draw(trained, tmp_path):
    """draw(...) runs sample.py on that checkpoint in an empty folder."""
    def call(*arguments):
        return run("sample.py", "--checkpoint", trained, "--t-draft", 8, "--precision", "fp32", *arguments,
                   cwd=tmp_path)
    return call


# === Training =======================================================================================================
def test_training_writes_models_logs_and_pictures(trained):
    names = {p.name for p in trained.iterdir()}
    assert {"vae.safetensors", "vae_state_000000040.pt", "vae.csv", "vae_000020.png", "vae_000040.png", "transformer.safetensors",
            "transformer_state_000000040.pt", "transformer.csv", "samples_000020.png", "samples_000040.png", "codes"} <= names
    assert not any(name.startswith(".writing") for name in names)             # no temporary file is left


def test_training_logs_every_column_at_every_fifth_step(trained):
    vae, transformer = rows(trained / "vae.csv"), rows(trained / "transformer.csv")
    for log in (vae, transformer):
        assert [int(row["step"]) for row in log] == list(range(5, 41, 5))
        assert all(np.isfinite(float(v)) for row in log for v in row.values() if v)
    assert {"loss", "reconstruction", "commitment", "disc", "lr", "val_psnr", "usage_1", "usage_4", "perplexity_1",
            "perplexity_4"} <= set(vae[0])
    assert {"loss", "grad_norm", "lr", "val_loss", "loss_1", "loss_4", "accuracy_1",
            "accuracy_4"} <= set(transformer[0])
    assert [bool(row["val_psnr"]) for row in vae] == [row["step"] in ("20", "40") for row in vae]
    assert [bool(row["val_loss"]) for row in transformer] == [row["step"] in ("20", "40") for row in transformer]
    assert [float(row["disc"]) > 0 for row in vae] == [int(row["step"]) > 20 for row in vae]    # disc_start = 20


def test_training_lowers_the_losses(trained):
    vae, transformer = rows(trained / "vae.csv"), rows(trained / "transformer.csv")
    # up to step 20, before the adversary comes in
    assert float(vae[3]["reconstruction"]) < 0.95 * float(vae[0]["reconstruction"])
    assert float(transformer[-1]["loss"]) < float(transformer[0]["loss"]) - 0.2


def test_checkpoint_carries_its_configuration_and_classes(trained):
    _, transformer, info = drr.load_checkpoint(trained)
    assert info.titles == ["beacon", "lakeside", "volcano", "daisy"] and info.classes[2] == "n09472597"
    assert (info.vae.codebook_size, info.transformer.d_model, info.sample.t_draft) == (64, 64, 32)
    assert transformer.null == 4


def test_stage_one_is_the_same_from_memory_and_from_workers(tmp_path):
    for name, in_memory in (("a", "true"), ("b", "false")):
        run("train_vae.py", "smoke", "--data", PHOTOS, "--out", name, "--precision", "fp32",
            f"data.in_memory={in_memory}",
            "vae.steps=2", "vae.warmup=1", "vae.log_every=1", cwd=tmp_path)
    assert rows(tmp_path / "a" / "vae.csv") == rows(tmp_path / "b" / "vae.csv")


def test_unlabelled_pictures_train_an_unconditional_model(tmp_path):
    (tmp_path / "flat").mkdir()
    for path in (PHOTOS / "train").rglob("*.JPEG"):
        shutil.copy(path, tmp_path / "flat")
    short = ["warmup=1", "batch_size=4"]
    run("train_vae.py", "smoke", "--data", "flat", "--out", "run", "vae.steps=2", *[f"vae.{s}" for s in short],
        cwd=tmp_path)
    run("train_transformer.py", "smoke", "--data", "flat", "--out", "run", "transformer.steps=2",
        "transformer.cond=none",
        *[f"transformer.{s}" for s in short], cwd=tmp_path)
    run("sample.py", "--checkpoint", "run", "--num", 2, "--t-draft", 2, "--out", "x.png", cwd=tmp_path)
    assert pixels(tmp_path / "x.png").shape == (128, 2 * 130 - 2, 3)


def test_the_official_weights_are_converted_once_and_for_all(tmp_path):
    sizes = ["vae.ch_mult=[1,2,2]", "vae.attn_resolutions=[8]"]
    run("train_vae.py", "smoke", "--official", TESTS / "fixtures" / "rqvae.safetensors", "--out", "run", *sizes,
        cwd=tmp_path)
    vae, c = drr.load_vae(tmp_path / "run" / "vae.safetensors")
    fixture = load_file(TESTS / "fixtures" / "rqvae.safetensors")
    assert c.ch_mult == [1, 2, 2]
    assert torch.equal(vae.encode(fixture["io.images"]), fixture["io.codes"].flatten(1, 2))


# === Drawing ========================================================================================================
def test_a_grid_and_single_pictures(draw, tmp_path):
    draw("--class", "volcano", "--num", 4, "--out", "new/folder/grid.png", "--out-dir", "single")
    grid = pixels(tmp_path / "new" / "folder" / "grid.png")
    assert grid.shape == (2 * 130 - 2, 2 * 130 - 2, 3)
    assert sorted(p.name for p in (tmp_path / "single").iterdir()) == ["000.png", "001.png", "002.png", "003.png"]
    pictures = [pixels(tmp_path / "single" / f"{i:03d}.png") for i in range(4)]
    assert all(p.shape == (32, 32, 3) for p in pictures) and len({p.tobytes() for p in pictures}) == 4
    enlarged = Image.fromarray(pictures[3]).resize((128, 128), Image.BICUBIC)
    assert np.array_equal(grid[130:, 130:], np.array(enlarged))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(draw, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        draw("--class", "2", "--num", 2, "--seed", seed, "--out", f"{name}.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_a_picture_is_the_same_alone_among_others_and_beside_other_classes(draw, tmp_path):
    draw("--class", "volcano", "--num", 1, "--out", "x.png", "--out-dir", "one")
    draw("--class", "volcano", "--num", 4, "--out", "x.png", "--out-dir", "four")
    draw("--class", "volcano,daisy", "--num", 3, "--out", "x.png", "--out-dir", "mixed")
    alone = (tmp_path / "one" / "000.png").read_bytes()
    assert alone == (tmp_path / "four" / "000.png").read_bytes() == (tmp_path / "mixed" / "000.png").read_bytes()
    assert (tmp_path / "four" / "002.png").read_bytes() == (tmp_path / "mixed" / "002.png").read_bytes()


def test_a_strip_shows_six_states_of_the_draft_and_every_revision(draw, tmp_path):
    draw("--class", "daisy", "--num", 2, "--m", 3, "--strip", "--out", "strip.png", "--out-dir", "single")
    strip = pixels(tmp_path / "strip.png")
    assert strip.shape == (2 * 130 - 2, (6 + 3) * 130 - 2, 3)
    grey = (np.abs(strip[:128, :128].astype(int) - 128) <= 1).all(-1).mean()
    # 7/8 hidden, less the blur at their edges
    assert 0.7 < grey < 0.88
    for i in range(2):                                                         # the last column is the result
        result = Image.open(tmp_path / "single" / f"{i:03d}.png").resize((128, 128), Image.BICUBIC)
        assert np.array_equal(strip[130 * i:130 * i + 128, -128:], np.array(result))


def test_values_of_the_section_sample_are_options_too(draw, tmp_path):
    for name, arguments in (("a", ["--m", 1, "--guidance", 3]), ("b", ["rounds=1", "revise_guidance=3"]),
                            ("c", ["rounds=1", "revise_guidance=3", "order=sobol"])):
        draw("--class", 2, "--num", 1, *arguments, "--out", f"{name}.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_a_strip_of_choosy_revisions_has_the_same_columns(draw, tmp_path):
    draw("--class", 2, "--num", 1, "--m", 2, "--strip", "revise_share=0.02", "draft_growing=true", "--out", "strip.png")
    assert pixels(tmp_path / "strip.png").shape == (128, (6 + 2) * 130 - 2, 3)


@pytest.fixture
def photo(tmp_path):
    """A photograph of the model's own size, so that nothing is lost by cropping it."""
    path = next((PHOTOS / "train" / "n09472597").glob("*.JPEG"))
    Image.open(path).convert("RGB").resize((32, 32)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_paste_leaves_the_pixels_outside_the_region_untouched(draw, tmp_path, photo):
    draw("--image", photo, "--region", "9,8,24,21", "--class", "daisy", "--num", 3, "--paste", "--out", "x.png",
         "--out-dir", "new")
    inside = np.zeros((32, 32), bool)
    inside[8:21, 9:24] = True
    for i in range(3):
        picture = pixels(tmp_path / "new" / f"{i:03d}.png")
        assert np.array_equal(picture[~inside], pixels(photo)[~inside])
        assert not np.array_equal(picture[inside], pixels(photo)[inside])


def test_repainting_shows_original_hidden_part_and_results(draw, tmp_path, photo):
    draw("--image", photo, "--region", "0,0,16,32", "--class", "daisy", "--num", 2, "--out", "x.png", "--out-dir",
         "new")
    shown = pixels(tmp_path / "x.png")
    assert shown.shape == (128, 4 * 130 - 2, 3)
    assert np.array_equal(shown[:, :128], np.array(Image.open(photo).resize((128, 128), Image.BICUBIC)))
    assert np.all(np.abs(shown[:, 130:130 + 48].astype(int) - 128) <= 1)


def test_a_mask_picture_means_the_same_as_the_region_it_shows(draw, tmp_path, photo):
    mask = np.zeros((32, 32), np.uint8)
    mask[4:12, 8:28] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    draw("--image", photo, "--mask", "mask.png", "--class", "2", "--num", 1, "--out", "a.png")
    draw("--image", photo, "--region", "8,4,28,12", "--class", "2", "--num", 1, "--out", "b.png")
    draw("--image", photo, "--region", "8,4,28,20", "--class", "2", "--num", 1, "--out", "c.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_reconstruct_shows_the_picture_and_its_decode_from_every_depth(trained, tmp_path, photo):
    run("sample.py", "--checkpoint", trained, "--reconstruct", photo, "--out", "x.png", cwd=tmp_path)
    shown = pixels(tmp_path / "x.png")
    assert shown.shape == (256, 5 * 258 - 2, 3)
    assert np.array_equal(shown[:, :256], np.array(Image.open(photo).resize((256, 256), Image.BICUBIC)))
    vae, _ = drr.load_vae(trained / "vae.safetensors")
    x = torch.from_numpy(pixels(photo)).permute(2, 0, 1)[None] / 127.5 - 1
    full = vae.decode(vae.encode(x))[0].permute(1, 2, 0).add(1).mul(127.5).round().clamp(0, 255).byte().numpy()
    last = np.array(Image.fromarray(full).resize((256, 256), Image.BICUBIC)).astype(int)
    assert np.abs(shown[:, -256:] - last).max() <= 2


# === Classes by name ================================================================================================
CLASSES = ["n01", "n02", "n03", "n04"]
TITLES = ["great_white_shark", "tiger shark", "tiger", "Tiger cat"]


@pytest.mark.parametrize("text, index",
                         [("0", 0), (" 3 ", 3), ("n02", 1), ("N03", 2), ("tiger", 2), ("Tiger Shark", 1),
                          ("tiger_shark", 1),
                                         ("white", 0), ("tiger CAT", 3), ("cat", 3)])
def test_find_class_by_index_wnid_title_or_part_of_one(text, index):
    assert common.find_class(text, CLASSES, TITLES) == index


@pytest.mark.parametrize("text, named",
                         [("shark", ["0 great_white_shark", "1 tiger shark"]), ("4", ["0 to 3"]), ("-1", ["-1"]),
                                         ("n05", ["n05"]), ("tigr shark", ["tiger_shark"]), ("", [""]), ("  ", [""]),
                                         ("xyzzy", ["xyzzy"])])
def test_find_class_names_the_candidates_of_what_it_cannot_find(text, named):
    with pytest.raises(drr.UserError) as error:
        common.find_class(text, CLASSES, TITLES)
    assert all(name in str(error.value) for name in named)


def test_find_class_takes_a_folders_name_before_an_index():
    folders = ["0", "1", "10", "11", "2"]
    assert [common.find_class(text, folders, folders) for text in ("2", "10", "1", "3")] == [4, 2, 1, 3]


# === Mistakes =======================================================================================================
@pytest.fixture
def mistakes(trained, tmp_path, photo):
    """A folder full of things that can be got wrong."""
    Image.new("L", (31, 32), 255).save(tmp_path / "small_mask.png")
    Image.new("L", (32, 32), 0).save(tmp_path / "black_mask.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    copy = {}
    for name in ("truncated", "stranger", "widened", "pickled", "halved", "keyless", "classless", "untitled", "not_a_number",
                 "unsampled", "swapped"):
        copy[name] = tmp_path / name
        copy[name].mkdir()
        for file in ("vae.safetensors", "transformer.safetensors"):
            shutil.copy(trained / file, copy[name])
    whole = (trained / "transformer.safetensors").read_bytes()
    (copy["truncated"] / "transformer.safetensors").write_bytes(whole[:len(whole) // 2])
    (copy["pickled"] / "transformer.safetensors").write_bytes(pickle.dumps(Attack(tmp_path / "executed")))
    (copy["halved"] / "transformer.safetensors").unlink()
    rewrite(copy["stranger"] / "vae.safetensors", lambda tensors, meta: tensors["quantizer.codebook"].add_(0.1))
    rewrite(copy["widened"] / "transformer.safetensors", lambda tensors, meta: meta["transformer"].update(d_model=128))
    rewrite(copy["keyless"] / "vae.safetensors", lambda tensors, meta: meta["vae"].pop("ch"))
    rewrite(copy["classless"] / "transformer.safetensors", lambda tensors, meta: meta.update(classes=None))
    rewrite(copy["untitled"] / "transformer.safetensors", lambda tensors, meta: meta["titles"].pop())
    rewrite(copy["not_a_number"] / "transformer.safetensors", lambda tensors, meta: tensors["pos"].fill_(math.nan))
    rewrite(copy["unsampled"] / "transformer.safetensors", lambda tensors, meta: meta["sample"].update(batch_size=0))
    shutil.copy(trained / "vae.safetensors", copy["swapped"] / "transformer.safetensors")
    return tmp_path


class Attack:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def rewrite(path, change):
    """Changes the tensors or the configuration of a checkpoint."""
    with safe_open(path, "pt") as f:
        meta = json.loads(f.metadata()["drr"])
    tensors = load_file(path)
    change(tensors, meta)
    save_file(tensors, path, {"drr": json.dumps(meta)})


@pytest.fixture
def call(monkeypatch, capsys):
    """call(SCRIPT, ...) runs a script as `execute` does, but in this process: a mistake costs milliseconds."""
    def call(script, *arguments, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [str(REPO / script), *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(sys.argv[0], run_name="__main__")
        return SimpleNamespace(returncode=end.value.code, stderr=capsys.readouterr().err)
    return call


def assert_refused(done, folder, before, expected=""):
    """Status 2, one line `error: ...` at the end of stderr, no traceback, and nothing written."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1 and done.stderr.strip().endswith(lines[0].strip()), done.stderr
    if not done.stderr.startswith("usage:"):                                   # argparse shows its usage first
        assert lines[0].startswith("error: ") and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert expected.lower() in lines[0].lower(), lines[0]
    assert contents(folder) == before


def contents(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
NO_LPIPS = pytest.mark.skipif(importlib.util.find_spec("lpips") is not None, reason="lpips is installed here")
REPAINT = "--class 2 --num 1 --image photo.png"


@pytest.mark.parametrize("arguments, expected", [
    ("", "--class"), ("--class zebra", "zebra"), ("--class d", "lakeside"), ("--class 4", "0 to 3"),
    ("--class -1", "-1"), ("--class volcano,,daisy", "class"),
    ("--class 2 --seed -1", "--seed"), ("--class 2 --seed x", "--seed"), ("--class 2 --num 0", "--num"),
    ("--class 2 --num -3", "--num"),
    ("--class 0,1 --num 1", "--num"), ("--class 2 --t-draft 0", "--t-draft"), ("--class 2 --t-draft 65", "--t-draft"),
    ("--class 2 --t-revise 0", "--t-revise"), ("--class 2 --m -1", "--m"),
    ("--class 2 --temperature nan", "--temperature"), ("--class 2 --temperature inf", "--temperature"),
    ("--class 2 --temperature 0", "--temperature"),
    ("--class 2 --draft-temperature 0", "--draft-temperature"), ("--class 2 --guidance nan", "--guidance"),
    ("--class 2 --guidance -1", "--guidance"),
    ("--class 2 --top-p 0", "--top-p"), ("--class 2 --top-p 1.5", "--top-p"), ("--class 2 --top-p nan", "--top-p"),
    ("--class 2 --top-k -1", "--top-k"),
    ("--class 2 nonsense=1", "nonsense"), ("--class 2 order=sideways", "sideways"), ("--class 2 order=[", "YAML"),
    ("--class 2 rounds=100000", "rounds"), ("--class 2 draft_pool=1.5", "draft_pool"), ("--class 2 sobol", "sobol"),
    ("--class 2 --t-draft 4 t_draft=8", "t_draft="), ("--reconstruct photo.png order=sobol", "--reconstruct"),
    (f"{REPAINT} --region 0,0,33,8", "32 x 32"), (f"{REPAINT} --region 8,8,8,16", "--region"),
    (f"{REPAINT} --region 1,2,3", "--region"),
    (f"{REPAINT} --region a,b,c,d", "--region"), (f"{REPAINT} --region -4,0,8,8", "--region"),
    (f"{REPAINT} --mask small_mask.png", "31 x 32"),
    (f"{REPAINT} --mask black_mask.png", "repaint"), (f"{REPAINT} --mask missing.png", "missing.png"),
    (REPAINT, "--region"),
    (f"{REPAINT} --region 0,0,8,8 --mask small_mask.png", "--mask"), ("--class 2 --region 0,0,8,8", "--image"),
    ("--class 2 --paste", "--paste"),
    ("--class 2 --image text.png --region 0,0,8,8", "text.png"),
    ("--class 2 --image missing.png --region 0,0,8,8", "missing.png"),
    ("--reconstruct missing.png", "missing.png"), ("--reconstruct text.png", "text.png"),
    ("--reconstruct photo.png --class 2", "--reconstruct"), ("--reconstruct photo.png --m 0", "--reconstruct"),
    ("--class 2 --checkpoint nowhere", "nowhere"), ("--class 2 --checkpoint empty", "vae.safetensors"),
    ("--class 2 --checkpoint halved", "transformer.safetensors"),
    ("--class 2 --checkpoint truncated", "transformer.safetensors"),
    ("--class 2 --checkpoint stranger", "another RQ-VAE"),
    ("--class 2 --checkpoint widened", "architecture"), ("--class 2 --checkpoint pickled", "transformer.safetensors"),
    ("--class 2 --checkpoint keyless", "vae.safetensors"),
    ("--class 2 --checkpoint classless", "transformer.safetensors"),
    ("--class 2 --checkpoint swapped", "transformer.safetensors"), ("--class 2 --checkpoint untitled", "title"),
    ("--class 2 --checkpoint not_a_number", "finite"), ("--class 2 --checkpoint unsampled", "batch_size"),
    ("--class 2 --out a/000.png --out-dir a", "000.png"), ("--reconstruct photo.png --out photo.png", "photo.png"),
    (f"{REPAINT} --region 0,0,8,8 --out ./photo.png", "photo.png"), ("--class 2 --exported empty", "--backend"),
    ("--class 2 --out file/x.png", "file"), ("--class 2 --out x.png --out-dir file", "file"),
    ("--class 2 --out empty", "empty"), ("--class 2 --colour red", "--colour"),
    pytest.param("--class 2 --device cuda", "cuda", marks=NO_GPU)])
def test_sample_refuses(call, trained, mistakes, arguments, expected):
    before = contents(mistakes)
    arguments = arguments.split(" ") if arguments else []
    checkpoint = [] if "--checkpoint" in arguments else ["--checkpoint", trained]
    short = [] if "--t-draft" in arguments or "--reconstruct" in arguments else ["--t-draft", 1]
    out = [] if "--out" in arguments else ["--out", "new/x.png"]
    done = call("sample.py", *checkpoint, *short, *out, *arguments, cwd=mistakes)
    assert_refused(done, mistakes, before, expected)


@pytest.mark.parametrize("arguments, expected", [
    ("smok", "smoke"), ("smoke vae.codebok_size=9", "vae.codebook_size"), ("smoke vae.lr=nan", "vae.lr"),
    ("smoke vae.micro_batch=3", "micro_batch"), ("smoke vae.log_every=0", "log_every"), ("smoke vae.ch=33", "vae.ch"),
    ("smoke --data empty", "empty"), ("smoke --data nowhere", "nowhere"), ("smoke --data broken", "broken"),
    ("smoke --data", "vae.steps=1 does not exist"),
    ("smoke --resume", "resume"), ("smoke --out file", "file"), ("smoke --official nowhere.pt", "nowhere.pt"),
    ("smoke --official file.pt", "file.pt"), ("smoke --official file.pt --data empty", "--data"),
    ("smoke --official file.pt --init file.pt", "--init"),
    ("smoke vae.disc_layers=6", "disc_layers"), ("smoke like.foo=1", "like.foo"), ("smoke --out done", "--force"),
    pytest.param("smoke --device cuda", "cuda", marks=NO_GPU),
    pytest.param("smoke vae.perceptual_weight=1", "lpips", marks=NO_LPIPS)])
def test_train_vae_refuses(call, tmp_path, arguments, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "done").mkdir()
    for name in ("broken/a.jpg", "file", "file.pt", "done/vae.safetensors"):
        (tmp_path / name).write_text("no picture")
    before = contents(tmp_path)
    arguments = arguments.split()
    data = [] if "--data" in arguments or "--official" in arguments else ["--data", PHOTOS]
    done = call("train_vae.py", *arguments, *data, "vae.steps=1", "vae.warmup=0", cwd=tmp_path)
    # the progress bar may stay
    last = [line for line in done.stderr.splitlines() if "reading images" not in line]
    done.stderr = "\n".join(last)
    assert_refused(done, tmp_path, before, expected)


@pytest.mark.parametrize("arguments, expected", [
    (["train_vae.py", "smoke"], "--data"), (["train_transformer.py", "smoke"], "--data"),
    (["sample.py", "--checkpoint", "nowhere"], "nowhere"),
    (["sample.py", "--num", "many"], "--num")])
def test_a_mistake_ends_the_process_with_status_2_and_one_sentence(tmp_path, arguments, expected):
    """The same in a process of its own, as the shell sees it."""
    assert_refused(execute(*arguments, cwd=tmp_path), tmp_path, [], expected)


@pytest.mark.parametrize("arguments, expected", [
    ("smoke", "vae.safetensors"), ("smoke --vae nowhere.safetensors", "nowhere.safetensors"),
    ("smoke --vae file", "file"),
    ("smoke --vae VAE --data flat", "cond=none"), ("smoke --vae VAE transformer.cond=text", "text"),
    ("smoke --vae VAE transformer.d_model=40", "d_model"), ("smoke --vae VAE --resume", "resume"),
    ("smoke --vae VAE sample.rounds=2000", "rounds"), ("smoke --vae VAE --out other", "another RQ-VAE")])
def test_train_transformer_refuses(call, trained, tmp_path, arguments, expected):
    (tmp_path / "file").write_text("")
    (tmp_path / "flat").mkdir(), (tmp_path / "other").mkdir()
    shutil.copy(trained / "vae.safetensors", tmp_path / "other")
    rewrite(tmp_path / "other" / "vae.safetensors", lambda tensors, meta: tensors["quantizer.codebook"].add_(0.1))
    Image.new("RGB", (32, 32)).save(tmp_path / "flat" / "a.png")
    before = contents(tmp_path)
    arguments = arguments.replace("VAE", str(trained / "vae.safetensors")).split()
    data = [] if "--data" in arguments else ["--data", PHOTOS]
    done = call("train_transformer.py", *arguments, *data, "transformer.steps=1", "transformer.warmup=0", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and expected in errors[0], done.stderr
    after = [name for name in contents(tmp_path) if "codes" not in name and name not in ("runs", "runs/smoke", "runs/smoke/.lock")]
    assert after == before                                 # codes are a cache and the lock is empty: they may stay


# === The bundled checkpoint =========================================================================================
bundled = pytest.mark.skipif(not (BUNDLED / "transformer.safetensors").exists(),
                             reason=f"{BUNDLED.name} is not in this checkout")


@bundled
def test_the_bundled_checkpoint_draws_from_any_folder(tmp_path):
    done = run("sample.py", "--class", 980, "--num", 2, "--t-draft", 8, "--out", "volcano.png", "--out-dir", "single",
               cwd=tmp_path)
    assert "volcano" in done.stdout
    pictures = [pixels(tmp_path / "single" / f"{i:03d}.png") for i in range(2)]
    assert all(p.shape == (32, 32, 3) and p.std() > 5 for p in pictures) and not np.array_equal(*pictures)


@bundled
def test_the_bundled_checkpoint_knows_imagenets_classes():
    _, transformer, info = drr.load_checkpoint(BUNDLED)
    assert len(info.classes) == len(info.titles) == transformer.null == 1000
    assert (info.classes[980], info.titles[980]) == ("n09472597", "volcano")


@bundled
def test_the_bundled_checkpoint_is_small_and_has_a_model_card():
    assert sum(p.stat().st_size for p in BUNDLED.rglob("*") if p.is_file()) <= 48 * 2 ** 20
    assert len((BUNDLED / "README.md").read_text()) > 500
