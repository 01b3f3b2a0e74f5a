"""The scripts from end to end: both stages are trained on a few photographs, and pictures drawn."""
import shutil
import struct

import numpy as np
import pytest
import torch
from conftest import TESTS, vae_section
from PIL import Image, ImageOps, PngImagePlugin
from processes import PHOTOS, rows, run

import drr
import sample
from support import common
from support.common import BUNDLED
from support.official import load_official_rqvae


def pixels(path):
    return np.array(Image.open(path).convert("RGB"))


def singles(folder):
    """The pictures that --out-dir wrote."""
    return [pixels(path) for path in sorted(folder.iterdir())]


def enlarged(picture, size=128):
    """As a grid shows it."""
    return np.array(Image.fromarray(picture).resize((size, size), Image.BICUBIC))


def alike(a, b):
    """The share of values that are equal up to rounding. (All of them on most CPUs; on some the last bit of a
    product depends on the batch, which in a near tie changes a code and what is drawn after it.)"""
    return (np.abs(a.astype(int) - b) <= 2).mean()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A checkpoint of preset `smoke`, trained on tests/photos."""
    folder = tmp_path_factory.mktemp("trained")
    for script in ("train_vae.py", "train_transformer.py"):
        run(script, "smoke", "--data", PHOTOS, "--out", "run", "--precision", "fp32", cwd=folder)
    return folder / "run"


@pytest.fixture
def draw(call, trained, tmp_path):
    """draw(...) runs sample.py on that checkpoint, in an empty folder: the path of the picture."""
    def draw(*arguments, checkpoint=trained, out="x.png"):
        call(sample.main, "--checkpoint", checkpoint, "--device", "cpu", "--out", out, *arguments)
        return tmp_path / out
    return draw


@pytest.fixture
def draw_class(draw):
    """The same for samples of a class, by a short draft in float32."""
    def draw_class(name, num, *more, **options):
        return draw("--class", name, "--num", num, "--t-draft", 8, "--precision", "fp32", *more, **options)
    return draw_class


# === Training ===============================================================================================
def test_training_writes_models_and_pictures_and_a_log_whose_losses_fall(trained):
    names = {p.name for p in trained.iterdir()}
    assert {"vae.safetensors", "vae_state_000000040.pt", "vae.csv", "vae_000020.png", "vae_000040.png",
            "transformer.safetensors", "transformer_state_000000040.pt", "transformer.csv",
            "samples_000020.png", "samples_000040.png", "codes"} <= names
    assert not any(name.startswith(".writing") for name in names)             # no temporary file is left
    vae, transformer = rows(trained, "vae"), rows(trained, "transformer")
    for log, look in ((vae, "val_psnr"), (transformer, "val_loss")):
        assert [int(row["step"]) for row in log] == list(range(5, 41, 5))
        assert all(np.isfinite(float(v)) for row in log for v in row.values() if v)
        assert [row["step"] for row in log if row[look]] == ["20", "40"]
    assert {"loss", "commitment", "lr", "usage_1", "usage_4", "perplexity_1", "perplexity_4"} <= set(vae[0])
    assert {"grad_norm", "lr", "loss_1", "loss_4", "accuracy_1", "accuracy_4"} <= set(transformer[0])
    assert [float(row["disc"]) > 0 for row in vae] == [int(row["step"]) > 20 for row in vae]     # disc_start
    # up to step 20, before the adversary comes in
    assert float(vae[3]["reconstruction"]) < 0.95 * float(vae[0]["reconstruction"])
    assert float(transformer[-1]["loss"]) < float(transformer[0]["loss"]) - 0.2


def test_unlabelled_pictures_train_an_unconditional_model(draw, tmp_path):
    (tmp_path / "flat").mkdir()
    for path in (PHOTOS / "train").rglob("*.JPEG"):
        shutil.copy(path, tmp_path / "flat")
    for section, *more in (("vae",), ("transformer", "cond=none")):
        short = [f"{section}.{value}" for value in ("steps=2", "warmup=1", "batch_size=4", *more)]
        run(f"train_{section}.py", "smoke", "--data", "flat", "--out", "run", "--precision", "fp32", *short,
            cwd=tmp_path)
    assert pixels(draw("--num", 2, "--t-draft", 2, checkpoint="run")).shape == (128, 2 * 130 - 2, 3)


def test_the_official_weights_are_converted_once_and_for_all(tmp_path):
    official = TESTS / "fixtures" / "rqvae.safetensors"
    run("train_vae.py", "smoke", "--official", official, "--out", "run", "vae.ch_mult=[1,2,2]",
        "vae.attn_resolutions=[8]", cwd=tmp_path)
    vae, c = drr.load_vae(tmp_path / "run" / "vae.safetensors")
    assert c.ch_mult == [1, 2, 2]
    assert drr.fingerprint(vae) == drr.fingerprint(load_official_rqvae(official, vae_section()))


# === Drawing ================================================================================================
def test_a_grid_and_single_pictures(draw_class, tmp_path):
    grid = pixels(draw_class("volcano", 4, "--out-dir", "single", out="new/folder/grid.png"))
    assert grid.shape == (2 * 130 - 2, 2 * 130 - 2, 3)
    assert sorted(p.name for p in (tmp_path / "single").iterdir()) == [f"{i:03d}.png" for i in range(4)]
    pictures = singles(tmp_path / "single")
    assert all(p.shape == (32, 32, 3) for p in pictures) and len({p.tobytes() for p in pictures}) == 4
    assert np.array_equal(grid[130:, 130:], enlarged(pictures[3]))


@pytest.mark.parametrize("a, b, c", [
    [(2, 2, "--seed", 3), (2, 2, "--seed", 3), (2, 2, "--seed", 4)],
    [(2, 1, "--m", 1, "--guidance", 3, "--top-k", 9), (2, 1, "rounds=1", "revise_guidance=3", "top_k=9"),
     (2, 1, "rounds=1")],
    [("none", 2, "--guidance", 1, "--draft-guidance", 1), ("none", 2, "--guidance", 5, "--draft-guidance", 5),
     ("2", 2, "--guidance", 20, "--draft-guidance", 20)]],
    ids=["a seed", "a flag is key=value", "null against null needs no guidance"])
def test_the_same_bytes_from_what_means_the_same_and_other_ones_from_what_does_not(draw_class, a, b, c):
    a, b, c = (draw_class(*arguments).read_bytes() for arguments in (a, b, c))
    assert a == b != c


def test_a_picture_is_the_same_alone_among_others_and_beside_other_classes(draw_class, tmp_path):
    for folder, kind, num in (("one", "volcano", 1), ("four", "volcano", 4), ("mixed", "volcano,daisy", 3)):
        draw_class(kind, num, "--out-dir", folder)
    one, four, mixed = (singles(tmp_path / name) for name in ("one", "four", "mixed"))
    assert min(alike(one[0], four[0]), alike(one[0], mixed[0]), alike(four[2], mixed[2])) > 0.9
    assert alike(four[0], four[2]) < 0.5


def test_a_strip_shows_six_states_of_the_draft_and_every_revision(draw_class, tmp_path):
    strip = pixels(draw_class("daisy", 2, "--m", 3, "--strip", "--out-dir", "single"))
    assert strip.shape == (2 * 130 - 2, (6 + 3) * 130 - 2, 3)
    grey = (np.abs(strip[:128, :128].astype(int) - 128) <= 1).all(-1).mean()
    assert 0.7 < grey < 0.88                                 # 7/8 hidden, less the blur at their edges
    one, two = singles(tmp_path / "single")                  # they are the last column
    assert np.array_equal(strip[:128, -128:], enlarged(one))
    assert np.array_equal(strip[130:, -128:], enlarged(two))


@pytest.fixture
def photo(tmp_path):
    """A photograph of the model's own size, so that nothing is lost by cropping it."""
    path = next((PHOTOS / "train" / "n09472597").glob("*.JPEG"))
    Image.open(path).convert("RGB").resize((32, 32)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_repainting_shows_original_hidden_part_and_results_and_can_keep_the_rest(draw_class, tmp_path, photo):
    shown = pixels(draw_class("daisy", 3, "--image", photo, "--region", "9,8,24,21", "--paste",
                              "--out-dir", "new"))
    pictures = singles(tmp_path / "new")
    assert shown.shape == (128, 5 * 130 - 2, 3) and len(pictures) == 3
    assert np.array_equal(shown[:, :128], enlarged(pixels(photo)))
    assert np.all(np.abs(shown[48:68, 130 + 48:130 + 80].astype(int) - 128) <= 1)
    inside = np.zeros((32, 32), bool)
    inside[8:21, 9:24] = True
    for picture in pictures:
        assert np.array_equal(picture[~inside], pixels(photo)[~inside])
        assert not np.array_equal(picture[inside], pixels(photo)[inside])


def test_a_mask_picture_means_the_same_as_the_region_it_shows(draw_class, tmp_path, photo):
    mask = np.zeros((32, 32), np.uint8)
    mask[4:12, 8:28] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    parts = ("--mask", "mask.png"), ("--region", "8,4,28,12"), ("--region", "8,4,28,20")
    a, b, c = (draw_class(2, 1, "--image", photo, *part).read_bytes() for part in parts)
    assert a == b != c


# A picture of 8 x 6 pixels, whose central square begins at column 1; and one of 7 x 4, whose square begins at
# 1.5: the model's two columns are pixels 2 and 3, and 4 and 5.
@pytest.mark.parametrize("shape, size, boxes, expected", [
    ((6, 8), 3, [(1, 0, 2, 1)], ["#..", "...", "..."]),     # smaller than the square: 2 x 2 pixels become one
    ((6, 8), 3, [(2, 1, 4, 2)], ["##.", "...", "..."]),     # columns 1 and 2 of the square lie in two
    ((6, 8), 3, [(6, 5, 8, 6)], ["...", "...", "..#"]),      # what lies outside the square is not seen
    ((6, 8), 6, [(3, 2, 5, 3)], ["......", "......", "..##..", "......", "......", "......"]),
    ((6, 8), 12, [(1, 0, 2, 1)], ["##.........."] * 2 + ["............"] * 10),      # larger: 2 x 2 each
    ((6, 8), 12, [(6, 4, 8, 6)], ["............"] * 8 + ["..........##"] * 4),
    ((4, 7), 2, [(2, 0, 3, 1), (5, 3, 6, 4)], ["#.", ".#"])])
def test_a_mask_hides_every_pixel_of_the_model_that_it_touches(shape, size, boxes, expected):
    mask = np.zeros(shape, bool)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    result = common.resize_mask(mask, size)
    assert ["".join(".#"[hidden] for hidden in row) for row in result.tolist()] == expected


def test_reconstruct_shows_the_picture_and_its_decode_from_every_depth(draw, trained, photo):
    shown = pixels(draw("--reconstruct", photo))
    assert shown.shape == (256, 5 * 258 - 2, 3)
    assert np.array_equal(shown[:, :256], enlarged(pixels(photo), 256))
    vae, _ = drr.load_vae(trained / "vae.safetensors")
    x = torch.from_numpy(pixels(photo)).permute(2, 0, 1)[None] / 127.5 - 1
    full = common.to_pixels(vae.decode(vae.encode(x)))[0]
    assert alike(shown[:, -256:], enlarged(full, 256)) > 0.9


# === Pictures that come in ==================================================================================
ORIENTATION = (0x112, 3, 6)                                  # a turn by 90 degrees


@pytest.mark.parametrize("tags, size", [
    ([ORIENTATION], (40, 48)),
    ([ORIENTATION, (0x11a, 10, 38)], (40, 48)),              # a resolution of -1/0, which Pillow cannot write
    ([ORIENTATION, (0x132, 5, 38)], (40, 48)),               # a fraction as a date
    ([(0x112, 2, ord("6"))], (48, 40)),                      # letters as an orientation
    ([(0x112, 3, 77)], (48, 40)),
    ([], (48, 40))])
def test_nothing_but_the_orientation_matters_in_the_metadata_of_a_photo(tmp_path, tags, size):
    entries = b"".join(struct.pack("<HHII", number, kind, 1, value) for number, kind, value in tags)
    exif = struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + struct.pack("<ii", -1, 0)
    Image.new("RGB", (48, 40)).save(tmp_path / "photo.jpg", exif=b"Exif\0\0II*\0" + exif)
    assert common.open_image(tmp_path / "photo.jpg").size == size


def test_each_orientation_turns_a_picture_as_pillow_does_and_a_long_comment_is_no_damage(tmp_path):
    comment = PngImagePlugin.PngInfo()
    comment.add_text("Comment", "x" * 2_000_000, zip=True)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        picture = Image.effect_noise((5, 4), 50).convert("RGB")
        picture.save(tmp_path / "x.png", exif=exif, pnginfo=comment)
        ours, theirs = common.open_image(tmp_path / "x.png"), Image.open(tmp_path / "x.png")
        assert np.array_equal(ours, ImageOps.exif_transpose(theirs)), orientation


WNIDS = ["n01", "n02", "n03", "n04"]
TITLES = ["great_white_shark", "tiger shark", "tiger", "Tiger cat"]
FOLDERS = ["0", "1", "10", "11", "2"]                        # whose names come before indices


@pytest.mark.parametrize("classes, titles, found", [
    (WNIDS, TITLES, {"0": 0, " 3 ": 3, "n02": 1, "N03": 2, "tiger": 2, "Tiger Shark": 1, "tiger_shark": 1,
                     "white": 0, "tiger CAT": 3, "cat": 3}),
    (FOLDERS, FOLDERS, {"2": 4, "10": 2, "1": 1, "3": 3})])
def test_a_class_is_found_by_index_wnid_title_or_part_of_one(classes, titles, found):
    assert {text: common.find_class(text, classes, titles) for text in found} == found


def test_the_bundled_checkpoint_is_small_knows_imagenets_classes_and_draws_from_any_folder(tmp_path):
    assert sum(p.stat().st_size for p in BUNDLED.rglob("*") if p.is_file()) <= 48 * 2 ** 20
    assert (BUNDLED / "README.md").exists()                  # its model card
    _, transformer, info = drr.load_checkpoint(BUNDLED)
    assert len(info.classes) == len(info.titles) == transformer.null == 1000
    assert (info.classes[980], info.titles[980]) == ("n09472597", "volcano")
    done = run("sample.py", "--class", 980, "--num", 2, "--t-draft", 8, "--out", "volcano.png",
               "--out-dir", "single", cwd=tmp_path)
    assert "volcano" in done.stdout
    one, two = singles(tmp_path / "single")
    assert one.shape == two.shape == (64, 64, 3) and min(one.std(), two.std()) > 5
    assert not np.array_equal(one, two)
