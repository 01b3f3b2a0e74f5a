"""Images in folders or archives -> batches: what is found, how it is cropped, that a batch depends on
(seed, step) alone, and that the token cache is the same however it came about."""
import errno
import io
import multiprocessing
import os
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import vae_section
from PIL import Image
from processes import PHOTOS

import drr
from support import common, data


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("datasets"))


def picture(seed=0, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def png(seed=0, size=(40, 30)):
    file = io.BytesIO()
    picture(seed, size).save(file, "png")
    return file.getvalue()


def tar(*samples):
    """The bytes of a shard of {name: bytes}, or several of these."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in (item for part in samples for item in part.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def lay_out(directory, files):
    """Writes {path below the directory: bytes}."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


def data_section(**changes):
    values = dict(views=1, class_views=1, flip=True, balance=0, favour_class="", favour=1, workers=2, seed=0,
                  crop_scale=0.6)
    return SimpleNamespace(**(values | changes))


def make_views(directory=PHOTOS, size=16, load=False, **changes):
    """The views of a folder, eight to a batch, with these changes to the section `data`."""
    files, labels, classes = data.find_images(directory)
    views = data.Views(files, labels, classes, size, 8, data_section(**changes))
    if load:
        views.load("cpu")
    return views


# === Finding ================================================================================================
@pytest.mark.parametrize("split, names, found, labels, classes", [
    ("train", "train/b/2.png train/a/1.JPG train/b/deep/down/3.jpeg train/a/notes.txt",
     "train/a/1.JPG train/b/2.png train/b/deep/down/3.jpeg", [0, 1, 1], ["a", "b"]),
    ("train", "b/2.png a/1.png", "a/1.png b/2.png", [0, 1], ["a", "b"]),
    ("train", "1.png 2.png", "1.png 2.png", [0, 0], [""]),
    ("train", "train/a/1.png val/a/2.png", "train/a/1.png", [0], ["a"]),
    ("val", "train/a/1.png val/a/2.png", "val/a/2.png", [0], ["a"]),
    # neither other splits nor what a training writes are classes
    *[("train", f"a/0.png b/0.png val/a/0.png test/0.png validation/0.png run/1.png run/{name} run/new/2.png",
       "a/0.png b/0.png", [0, 1], ["a", "b"]) for name in (
        "vae.csv", "transformer_state_000000002.pt", "vae.safetensors")]])
def test_images_are_found_with_their_classes(tmp_path, split, names, found, labels, classes, capsys):
    lay_out(tmp_path, dict.fromkeys(names.split(), b""))
    files, our_labels, our_classes = data.find_images(tmp_path, split)
    assert [path.relative_to(tmp_path).as_posix() for path in files] == found.split()
    assert our_labels.tolist() == labels and our_classes == classes
    assert ("/run/\n" in capsys.readouterr().err) == ("run/" in names)         # what is not used is named


def test_hidden_folders_are_left_out_links_are_followed_and_what_is_not_used_is_named(tmp_path, capsys):
    lay_out(tmp_path, {"train/a/1.jfif": b"", "train/.ipynb_checkpoints/1.png": b"", "elsewhere/2.png": b"",
                       "train/a/._1.png": b"", "train/a/e.jpg.1": b""})
    (tmp_path / "train" / "nothing").mkdir()
    (tmp_path / "train" / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "train" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "a" / "round").symlink_to(tmp_path / "train")        # leads back to where it is
    files, labels, classes = data.find_images(tmp_path)
    assert [path.name for path in files] == ["1.jfif", "2.png"]
    assert labels.tolist() == [0, 1] and classes == ["a", "b"]
    said = capsys.readouterr().err
    assert "3 files or folders" in said
    assert all(name in said for name in ("e.jpg.1", "gone.png", "nothing", "classes: a, b"))


def test_titles_come_from_classes_tsv_or_else_from_the_folder(tmp_path):
    assert data.class_titles(tmp_path, ["n01", "n02"]) == ["n01", "n02"]
    for mark in (b"", b"\xef\xbb\xbf"):                       # of the byte order, which Excel writes
        lay_out(tmp_path, {"classes.tsv": mark + b"wnid\tindex\tname\nn02\t0\tgreat white shark\n"})
        assert data.class_titles(tmp_path, ["n01", "n02"]) == ["n01", "great white shark"]


def test_the_fingerprint_is_that_of_names_sizes_contents_labels_and_classes(tmp_path):
    whole = {"a/0.ppm": b"one", "b/1.ppm": b"two"}
    changed = [{"a/0.ppm": b"one", "b/9.ppm": b"two"}, {"a/0.ppm": b"one", "c/1.ppm": b"two"},
               {"a/0.ppm": b"one"}, {"a/0.ppm": b"one", "b/1.ppm": b"four"},
               {"a/0.ppm": b"one", "b/1.ppm": b"TWO"}]       # in place, the size unchanged
    folders = [lay_out(tmp_path / str(i), files) for i, files in enumerate([whole, whole, *changed])]
    found = [data.find_images(folder) for folder in folders]
    first, moved, *others = [data.files_fingerprint(*each) for each in found]
    files, labels, classes = found[0]
    others += [data.files_fingerprint(files, labels[::-1], classes),
               data.files_fingerprint(files, labels, classes[::-1])]
    assert moved == first and first not in others


# === Mistakes ===============================================================================================
PNG = png()
GOOD = {"0.png": PNG, "0.cls": b"0", "1.png": PNG, "1.cls": b"1"}
SPOILT = bytearray(tar(GOOD))
SPOILT[SPOILT.index(b"1.cls\0") + 150] ^= 255                # the checksum is at 148 .. 155 of a header


@pytest.mark.parametrize("files, message", [
    ({"train/a/notes.txt": b""}, "holds no images"),
    ({"train/1.png": b"", "train/a/1.png": b""}, "1.png lies beside the class folders"),
    ({"train/0.tar": tar(GOOD), "train/a/1.png": b""}, "both 0.tar and images"),
    ({"train/0.tar": tar({"0.txt": b""})}, "hold no images"),
    ({"train/0.tar": tar(GOOD), "classes.tsv": b"wnid\tname\nn1\tx\n"}, "class 1 for 1.png; .* from 0 to 0"),
    ({"train/0.tar": tar({**GOOD, "2.jpg": PNG, "2.png": PNG})}, "2 has 2 pictures and not one"),
    ({"train/0.tar": tar({**GOOD, "dot 3.0.png": PNG, "dot 3.1.png": PNG})}, "dot 3 has 0 .*no dot in KEY"),
    ({"train/0.tar": tar(GOOD), "train/1.parquet": PNG}, "another form .*1.parquet: "),
    *[({"train/0.tar": tar(GOOD), "classes.tsv": text}, "not a table of classes.*wnid") for text in (
        b"a\tb\nn01\tx\n", b"", b"wnid\tname\nn01\n", b"wnid\tname\nn01\tcaf\xe9\n")],        # Latin-1
    *[({"train/0.tar": content}, "damaged or of another form .*0.tar: ") for content in (
        tar(GOOD)[:600], bytes(SPOILT), b"", b"no tar" * 500)],
    ({"train/0.tar": tar({"0.png": PNG, "0.cls": b"n01440764"})}, "of another form .*n01440764.*KEY.cls"),
    *[({"train/0.tar": tar({**GOOD, "2.png": PNG, **label})}, "has the class .* for 2.png") for label in (
        {}, {"2.cls": b"-1"}, {"2.cls": b"1000000000"}, {"2.json": b"[]"}, {"2.json": b'{"label": 3.7}'})]])
def test_what_cannot_be_found_is_said_in_a_sentence(tmp_path, files, message):
    with pytest.raises(drr.UserError, match=message):
        data.find_images(lay_out(tmp_path, files))


# === Tar shards =============================================================================================
@pytest.fixture
def packed(tmp_path):
    """The photos of PHOTOS/train in three shards, in the order of the folder, and the classes' names."""
    files, labels, classes = data.find_images(PHOTOS)
    tars = [{}, {}, {}]
    for i, (path, label) in enumerate(zip(files, labels)):
        tars[i // 6] |= {path.name: path.read_bytes(), path.stem + ".cls": b"%d" % label}
    table = "wnid\tname\n" + "".join(f"{name}\tx\n" for name in classes)
    content = {f"train/{i:06d}.tar": tar(samples) for i, samples in enumerate(tars)}
    return lay_out(tmp_path / "shards", {"classes.tsv": table.encode(), **content})


def test_folders_and_shards_memory_and_threads_give_the_same_batches(packed):
    assert data.find_images(packed)[2] == data.find_images(PHOTOS)[2]
    settings = dict(views=2, class_views=10, balance=0.5)
    expected = list(make_views(load=True, **settings).batches(3, 12))
    assert expected[0][0].shape == (8, 3, 16, 16) and expected[0][0].dtype == torch.uint8
    for place, load in ((PHOTOS, False), (packed, True), (packed, False)):
        found = make_views(place, load=load, **settings).batches(3, 12)
        for batch, other in zip(expected, found, strict=True):
            assert torch.equal(batch[0], other[0]) and np.array_equal(batch[1], other[1])
            assert not multiprocessing.active_children()     # which would share the training's signals


def test_classes_of_shards_are_numbers_where_no_table_names_them_and_need_not_be(packed, tmp_path):
    (packed / "classes.tsv").unlink()
    _, labels, classes = data.find_images(packed)
    assert classes == [str(i) for i in range(labels.max() + 1)]
    long = "long/" * 40                                                        # a name over 100 bytes
    content = {"0.jpg": PNG, "0.json": b'{"caption": null}', long + "1.PNG": PNG}
    files, labels, classes = data.find_images(lay_out(tmp_path, {"0.tar": tar(content), "._0.tar": b"Mac"}))
    assert [file.name for file in files] == ["0.jpg", "1.PNG"] and classes == [""]
    assert labels.tolist() == [0, 0]


@pytest.mark.parametrize("name, split", [("train/0.parquet", "train"), ("0.parquet", "train"), (
    "data/train-00000-of-00001.parquet", "train"), ("data/validation-00000-of-00001.parquet", "val")])
def test_parquet_files_deliver_pictures_with_named_classes(tmp_path, name, split):
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["tench", "goldfish"])}
    rows = {"image": [{"bytes": png(i), "path": f"n01_{i}.JPEG"} for i in range(3)], "label": [1, 0, 1]}
    (tmp_path / name).parent.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, datasets.Features(kinds)).to_parquet(tmp_path / name)
    files, labels, classes = data.find_images(tmp_path, split)
    assert labels.tolist() == [1, 0, 1] and classes == ["tench", "goldfish"]
    assert str(files[2]) == f"{(tmp_path / name).parent}: n01_2.JPEG"
    assert np.array_equal(common.open_image(files[2]), picture(2))
    if split == "val":
        assert data.validation_images(tmp_path, 16, 9, ["goldfish", "tench"])[1].tolist() == [0, 1, 0]


def test_every_picture_of_a_shard_is_used_or_counted_its_label_from_json_without_a_cls(tmp_path, capsys):
    more = {"2.png": b"broken", "2.cls": b"1", "3.png": PNG, "3.json": b'{"label": 2}',
            "4.png": PNG, "4.cls": b"1", "4.json": b'{"width": 64}'}
    views = make_views(lay_out(tmp_path, {"train/0.tar": tar(GOOD, GOOD, more)}), load=True, views=2)
    assert views.labels.tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 1, 1] and len(views.images) == 12
    assert "skipped 1 of 7 files" in capsys.readouterr().out


# === Cropping ===============================================================================================
def test_the_first_view_is_the_central_square_and_those_of_full_size_move_along_the_long_side():
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 10:30] = 200                                                      # the central square of 40 x 20
    assert common.crop_box(40, 20, 0, 123) == (10, 0, 20)
    seen = common.crop(Image.fromarray(image), 20)
    assert seen.shape == (3, 20, 20) and seen.dtype == torch.uint8 and torch.all(seen == 200)
    boxes = [common.crop_box(40, 20, view, 7, 1.0) for view in range(1, 50)]
    assert {(top, side) for _, top, side in boxes} == {(0, 20)}
    assert min(boxes)[0] < 2 and max(boxes)[0] > 18          # from 0 to 20


@pytest.mark.parametrize("width, height", [(40, 20), (20, 40), (33, 33), (1, 5)])
def test_other_views_lie_within_the_picture_and_are_the_same_in_every_run(width, height):
    short = min(width, height)
    boxes = [common.crop_box(width, height, view, 7) for view in range(1, 100)]
    for left, top, side in boxes:
        assert 0.6 * short <= side <= short
        assert 0 <= left and left + side <= width + 1e-9 and 0 <= top and top + side <= height + 1e-9
    assert len(set(boxes)) == 99 and boxes[0] != common.crop_box(width, height, 1, 8)
    assert boxes == [common.crop_box(width, height, view, 7) for view in range(1, 100)]
    seeds = [data.file_seed(PHOTOS / name, seed) for name in ("a.png", "b.png") for seed in (0, 1)]
    assert len(set(seeds)) == 4 and data.file_seed(PHOTOS / "elsewhere" / "a.png", 0) == seeds[0]
    assert data.file_seed(Path(os.fsdecode(b"caf\xe9.png")), 0) not in seeds   # no UTF-8


# === Formats ================================================================================================
@pytest.mark.parametrize("mode, colour, suffix, expected", [
    ("L", 100, "png", (100, 100, 100)),
    ("1", 1, "png", (255, 255, 255)),
    ("P", 0, "gif", (255, 255, 255)),                        # transparent, as below
    ("P", 0, "png", (255, 255, 255)),
    ("LA", (0, 0), "png", (255, 255, 255)),
    ("RGBA", (255, 0, 0, 0), "png", (255, 255, 255)),
    ("CMYK", (0, 0, 0, 255), "jpg", (0, 0, 0)),
    ("RGBA", (0, 0, 200, 255), "png", (0, 0, 200)),
    ("RGB", (10, 20, 30), "webp", (10, 20, 30)),
    ("I;16", 100 * 257, "png", (100, 100, 100))])            # Pillow alone would clip it at 255
def test_every_kind_of_picture_becomes_rgb_and_transparency_white(tmp_path, mode, colour, suffix, expected):
    path = tmp_path / f"picture.{suffix}"
    Image.new(mode, (9, 7), colour).save(path, **{"transparency": 0} if mode == "P" else {})
    opened = common.open_image(path)
    assert opened.mode == "RGB" and opened.size == (9, 7)
    assert np.abs(np.array(opened).astype(int) - expected).max() <= 4


def test_what_is_no_picture_or_of_unknown_brightness_is_the_users_mistake(tmp_path):
    lay_out(tmp_path, {"empty.png": b"", "other.png": b"no picture at all", "short.png": PNG[:300]})
    for kind in (np.int32, np.float32):
        Image.fromarray(np.ones((8, 8), kind)).save(tmp_path / f"{kind.__name__}.tiff")
    for name in ("empty.png", "other.png", "short.png", "missing.png", "int32.tiff", "float32.tiff"):
        with pytest.raises(drr.UserError, match=f"{name}.*32 bits" if "tiff" in name else name):
            common.open_image(tmp_path / name)


# === Batches ================================================================================================
def test_a_batch_depends_on_seed_and_step_alone():
    views, other = make_views(load=True), make_views(load=True, seed=1)
    whole = [images for images, _, _ in views.batches(0, 6)]
    assert torch.equal(next(views.batches(4, 6))[0], whole[4])                 # a resumed run
    assert torch.equal(make_views(load=True)[2][0], whole[2])                  # another process
    assert len({images.numpy().tobytes() for images in whole}) == 6
    assert not np.array_equal(views.draw(2)[0], other.draw(2)[0])


def test_a_batch_holds_the_views_that_were_drawn_half_of_them_mirrored():
    views = make_views(load=True, views=3)
    index, flips = views.draw(5)
    images, seen, _ = views[5]
    assert np.array_equal(seen, index)
    for image, i, flip in zip(images, index, flips):
        path = views.files[views.file_of[i]]
        expected = common.crop(common.open_image(path), 16, views.crop_of[i], data.file_seed(path, 0))
        assert torch.equal(image, expected.flip(-1) if flip else expected)
    share = np.mean([views.draw(step)[1] for step in range(500)])
    assert abs(share - 0.5) < 6 * 0.5 / 4000 ** 0.5          # false alarm 2e-9 for a fresh seed
    assert not any(make_views(flip=False).draw(step)[1].any() for step in range(50))


def counted(per_class, **changes):
    """Views of a data set that exists in name only: class c has per_class[c] files."""
    labels = np.repeat(np.arange(len(per_class)), per_class)
    files = [PHOTOS / f"{i}.png" for i in range(len(labels))]
    classes = [f"class{c}" for c in range(len(per_class))]
    return data.Views(files, labels, classes, 16, 8, data_section(**changes))


def class_shares(views):
    p = np.diff(views.cdf, prepend=0)
    return np.array([p[views.labels == c].sum() for c in range(views.labels.max() + 1)])


def test_rare_classes_get_more_crops():
    views = counted([1, 3, 50], views=2, class_views=10)
    crops = [10, 4, 4, 4] + 50 * [2]                         # ceil(10 / 1), ceil(10 / 3), at least 2
    assert views.file_of.tolist() == [i for i, n in enumerate(crops) for _ in range(n)]
    assert views.crop_of.tolist() == [crop for n in crops for crop in range(n)]


@pytest.mark.parametrize("balance, favour", [(0.0, 1.0), (0.6, 1.0), (1.0, 1.0), (0.5, 20.0)])
def test_classes_are_as_frequent_as_balance_and_favour_say(balance, favour):
    per_class = np.array([1, 3, 50])
    views = counted(per_class, class_views=10, balance=balance, favour_class="class1", favour=favour)
    expected = per_class ** (1 - balance) * [1, favour, 1]
    np.testing.assert_allclose(class_shares(views), expected / expected.sum())
    p = np.diff(views.cdf, prepend=0)
    for c in range(3):
        np.testing.assert_allclose(p[views.labels == c], p[views.labels == c][0])      # all of a class alike


def test_draws_follow_the_cdf():
    views = counted([1, 3, 4], class_views=4, balance=0.5)
    p, n = np.diff(views.cdf, prepend=0), 8 * 2000
    drawn = np.concatenate([views.draw(step)[0] for step in range(2000)])
    share = np.bincount(drawn, minlength=len(views)) / n
    # 13 frequencies at most, within 5 standard deviations: false alarm < 1e-5 for a fresh seed.
    assert np.all(np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / n))


def test_images_that_count_the_same_come_once_an_epoch_each_time_in_another_order():
    views = counted([5, 6])                                  # batches of 8
    epochs = np.concatenate([views.draw(step)[0] for step in range(11)]).reshape(8, 11)
    assert np.array_equal(np.sort(epochs), [range(11)] * 8) and len(np.unique(epochs, axis=0)) == 8


# === Files that cannot be read ==============================================================================
@pytest.fixture
def partly_broken(tmp_path):
    files = {f"{name}/{i}.png": png(i) for name in "ab" for i in range(3)}
    files["a/2.png"] = b"broken"                             # file 2; file 3 is of another class
    return lay_out(tmp_path, files)


def test_broken_files_are_replaced_and_counted_however_the_batch_is_shared(partly_broken):
    (partly_broken / "b" / "0.png").write_bytes(b"broken")                     # two in a row, many views each
    views = make_views(partly_broken, views=120)
    found = 0
    for step, (images, seen, bad) in enumerate(list(views.batches(0, 6))):     # of threads
        index, _ = views.draw(step)
        broken = np.isin(views.file_of[index], [2, 3])
        assert np.array_equal(seen, np.where(broken, 4 * 120, index))
        assert bad == broken.sum()                           # images, not attempts
        found += bad
        parts = []
        for views.rows in np.split(np.arange(8), [3, 4]):    # as three processes share them
            parts.append(views[step])
        theirs, their_views, their_bad = zip(*parts)
        assert torch.equal(torch.cat(theirs), images) and np.array_equal(np.concatenate(their_views), seen)
        assert sum(their_bad) == bad and [len(part) for part in theirs] == [3, 1, 4]
    assert found > 0
    assert views.load("cpu") == {"views that can be read": 4 * 120}      # so a resumed run must load, too


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EMFILE])
def test_an_error_of_the_system_is_no_damaged_picture_but_stops_the_work(monkeypatch, code):
    def fail(file):
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr(common.Image, "open", fail)
    with pytest.raises(OSError, match=os.strerror(code)):
        make_views(load=True)
    with pytest.raises(OSError, match=os.strerror(code)):
        next(make_views().batches(0, 1))                     # of a thread


# === Validation =============================================================================================
def test_validation_images_are_central_crops_of_known_classes():
    images, labels = data.validation_images(PHOTOS, 16, 10, ["n09332890", "n11939491"])
    assert labels.tolist() == [0, 1]
    for image, path in zip(images, sorted((PHOTOS / "val").rglob("*.JPEG"))):
        assert torch.equal(image, common.crop(common.open_image(path), 16))
    assert data.validation_images(PHOTOS, 16, 1, ["n11939491"])[1].tolist() == [0]
    images, labels = data.validation_images(PHOTOS, 16, 10, [""])              # a training without classes
    assert labels.tolist() == [0] * len(images) != []
    assert data.validation_images(PHOTOS / "train", 16, 10, ["n11939491"]) == (None, None)


def test_validation_images_that_are_left_out_are_counted_and_have_to_leave_one(tmp_path, capsys):
    lay_out(tmp_path, {"val/a/0.png": PNG, "val/a/1.png": b"", "val/b/2.png": PNG, "more/val/n1/1.png": b""})
    data.validation_images(tmp_path, 16, 10, ["a"])
    assert "1 images of classes that the training lacks and 1 that" in capsys.readouterr().out
    for directory, message in ((tmp_path, "with a, b, .*training's classes .another, "),
                               (tmp_path / "more", "val, with n1, holds no readable")):
        with pytest.raises(drr.UserError, match=message):
            data.validation_images(directory, 16, 10, ["another", "n1"])


# === Token cache ============================================================================================
def small_vae(seed=0):
    torch.manual_seed(seed)
    return drr.RQVAE(vae_section(ch_mult=[1, 1, 1])).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def vae():
    return small_vae()


@pytest.fixture
def encoded(monkeypatch):
    """How many images each call of data.encode has encoded."""
    counts, encode = [], data.encode
    monkeypatch.setattr(data, "encode", lambda vae, x, dtype: counts.append(len(x)) or encode(vae, x, dtype))
    return counts


def cached(views, vae, directory):
    return data.cached_codes(views, vae, directory, torch.device("cpu"), torch.float32)


def assert_codes_of(views, codes, vae):
    """The first half of the cache must be the codes of the views, the second those of their mirror images."""
    x = common.to_float(torch.stack([views.read(i) for i in range(len(views))]), "cpu")
    for stored, images in zip(codes, (x, x.flip(-1)), strict=True):
        assert torch.equal(torch.from_numpy(stored.astype(np.int64)), vae.encode(images))


def test_cached_codes_are_those_of_the_crops_and_of_their_mirror_images(tmp_path, vae):
    views = make_views(size=32, views=2)
    codes = cached(views, vae, tmp_path)
    assert codes.shape == (2, 30, 64, 4) and codes.dtype == np.uint16
    assert_codes_of(views, codes, vae)
    assert np.array_equal(cached(make_views(size=32, views=2, flip=False), vae, tmp_path), codes[:1])


def test_the_cache_is_reused_and_belongs_to_weights_views_and_contents(packed, tmp_path, vae, encoded):
    def work(views, vae):
        """The codes, how many images were encoded for them, and what files there are."""
        encoded.clear()
        codes = cached(views, vae, tmp_path / "codes")
        return codes, sum(encoded), {path: path.stat().st_mtime_ns for path in (tmp_path / "codes").iterdir()}
    codes, count, files = work(make_views(size=32), vae)
    again, none, the_same = work(make_views(size=32), vae)
    assert np.array_equal(codes, again) and count == 30 and none == 0 and the_same == files
    for views, model in ((make_views(size=32), small_vae(1)), (make_views(size=32, seed=1, views=2), vae),
                         (make_views(packed, size=32), vae)):                  # the same names
        _, count, more = work(views, model)
        assert count and len(more) > len(files)
        files = more
    lay_out(packed, {"train/000001.tar": tar({"new.png": PNG, "new.cls": b"2"})})      # another shard
    assert work(make_views(packed, size=32), vae)[1] == (6 + 1 + 3) * 2


@pytest.mark.parametrize("which", ["codes-*[0-9a-f].npy", "codes-*-files.npy"])
def test_a_damaged_cache_is_the_users_mistake(tmp_path, vae, which):
    cached(make_views(size=32), vae, tmp_path)
    [file] = tmp_path.glob(which)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(drr.UserError, match="delete both"):
        cached(make_views(size=32), vae, tmp_path)


def test_broken_files_are_dropped_from_the_cache_and_from_the_views(partly_broken, tmp_path, vae, capsys):
    for _ in range(2):                                       # when written, and when read again
        views = make_views(partly_broken, size=32, views=2)
        codes = cached(views, vae, tmp_path / "codes")
        assert codes.shape == (2, 10, 64, 4) and len(views) == 10
        np.testing.assert_allclose(class_shares(views), [0.4, 0.6])            # two files against three
        assert_codes_of(views, codes, vae)
        assert "skipped 1 of 6 files" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_leaves_nothing_behind_and_rank_0_knows_whether_there_is_one(
        tmp_path, vae, monkeypatch, encoded):
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(data, "allocate", full)
    with pytest.raises(drr.UserError, match="No space left"):
        cached(make_views(size=32), vae, tmp_path)
    monkeypatch.setattr(data, "from_rank_0", lambda there: True)
    with pytest.raises(drr.UserError, match="damaged .*No such file"):         # rank 0 sees one
        cached(make_views(size=32), vae, tmp_path)
    assert os.listdir(tmp_path) == [] and not encoded


# The same cache by two ranks, and after an interruption.
@pytest.fixture
def interrupted(tmp_path, vae, monkeypatch):
    """The folder of a cache whose writer ended within the second block of four files."""
    left = [data.encode] * 3                                 # a block: 8 views, then their mirror images
    monkeypatch.setattr(data.Views, "BLOCK", 4)
    with monkeypatch.context() as patched, pytest.raises(IndexError):
        patched.setattr(data, "encode", lambda *arguments: left.pop()(*arguments))
        cached(make_views(size=32, views=2), vae, tmp_path / "interrupted")
    assert sorted(path.suffix for path in (tmp_path / "interrupted").iterdir()) == [".npy", ".part"]
    return tmp_path / "interrupted"


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("lost, count", [("", 15 - 4), ("codes-*.part", 15), ("codes-*-files.npy", 15)])
def test_a_cache_goes_on_but_not_from_half_a_state(interrupted, tmp_path, vae, encoded, lost, count):
    for file in interrupted.glob(lost or "nothing"):
        file.unlink()
    cached(make_views(size=32, views=2), vae, interrupted)
    assert sum(encoded) == count * 2 * 2
    cached(make_views(size=32, views=2), vae, tmp_path / "whole")
    assert content(interrupted) == content(tmp_path / "whole")


def on_two_ranks(pictures, directory, vae, monkeypatch):
    """`cached` in two threads, each of which takes itself for a rank. Of each: how many images it encoded,
    and the files and the number of codes that it kept."""
    own, meeting, encode = threading.local(), threading.Barrier(2, timeout=300), data.encode

    def count(model, x, dtype):
        own.encoded += len(x)
        return encode(model, x, dtype)

    def work(rank):
        own.rank, own.encoded = rank, 0
        views = make_views(pictures, size=32, views=2)
        codes = cached(views, vae, directory)
        return own.encoded, views.file_of.tolist(), codes.shape[1]

    with monkeypatch.context() as patched, ThreadPoolExecutor(2) as pool:
        patched.setattr(data, "encode", count)
        patched.setattr(data, "ranks", lambda: (own.rank, 2))
        patched.setattr(data.dist, "barrier", meeting.wait)
        patched.setattr(data.dist, "broadcast_object_list", lambda answer: meeting.wait())
        return list(pool.map(work, range(2)))


def test_two_ranks_write_the_cache_of_one_and_end_what_one_began(interrupted, partly_broken, tmp_path, vae,
                                                                 monkeypatch, capsys):
    for pictures, directory, encoded in ((PHOTOS, tmp_path / "fresh", [8 * 4, 7 * 4]),
                                         (PHOTOS, interrupted, [6 * 4, 5 * 4]),
                                         (partly_broken, tmp_path / "broken", [3 * 4 - 4, 3 * 4])):
        results = on_two_ranks(pictures, directory, vae, monkeypatch)
        said, views = capsys.readouterr().out, make_views(pictures, size=32, views=2)
        cached(views, vae, tmp_path / "alone")
        assert results == [(count, views.file_of.tolist(), len(views)) for count in encoded]
        assert content(directory).items() <= content(tmp_path / "alone").items()
    assert said.count("skipped 1 of 6 files") == 1           # by rank 0
