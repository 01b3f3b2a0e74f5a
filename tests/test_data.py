"""Images in folders or tar shards -> batches: what is found, how it is cropped, that a batch depends on (seed, step)
alone, and that the token cache is the same however it came about."""
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TESTS, vae_section
from PIL import Image

import support.shards
from support import common, data
import drr

PHOTOS = TESTS / "photos"


def data_section(**changes):
    values = dict(views=1, class_views=1, balance=0.0, favour_class="", favour=1.0, in_memory=True, workers=2, seed=0,
                  flip=True)
    return SimpleNamespace(**{**values, **changes})


def picture(seed=0, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def write(path, seed=0, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, size).save(path)
    return path


def make_views(directory=PHOTOS, size=16, batch_size=8, load=False, **changes):
    files, labels, classes = data.find_images(directory)
    views = data.Views(files, labels, classes, size, batch_size, data_section(**changes))
    if load:
        views.load("cpu")
    return views


# === Finding ========================================================================================================
@pytest.mark.parametrize("prefix", ["train/", ""])
def test_class_folders_are_found_below_train_or_directly(tmp_path, prefix):
    names = ["b/2.png", "a/1.JPG", "b/deep/down/3.jpeg"]
    for name in names:
        write(tmp_path / (prefix + name))
    (tmp_path / prefix / "a" / "notes.txt").write_text("no image")
    files, labels, classes = data.find_images(tmp_path)
    assert [p.relative_to(tmp_path / prefix).as_posix() for p in files] == sorted(names)
    assert classes == ["a", "b"] and labels.tolist() == [0, 1, 1]


def test_hidden_folders_are_left_out_links_are_followed_and_empty_ones_are_named(tmp_path, capsys):
    write(tmp_path / "train" / "a" / "1.png"), write(tmp_path / "train" / ".ipynb_checkpoints" / "1.png")
    write(tmp_path / "elsewhere" / "2.png"), (tmp_path / "train" / "nothing").mkdir()
    (tmp_path / "train" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "a" / "round").symlink_to(tmp_path / "train")        # leads back to where it is
    files, labels, classes = data.find_images(tmp_path)
    assert classes == ["a", "b"] and [f.name for f in files] == ["1.png", "2.png"] and labels.tolist() == [0, 1]
    assert "without images: nothing" in capsys.readouterr().err


def test_pictures_without_class_folders_are_one_class_without_a_name(tmp_path):
    write(tmp_path / "1.png")
    write(tmp_path / "2.png")
    files, labels, classes = data.find_images(tmp_path)
    assert len(files) == 2 and labels.tolist() == [0, 0] and classes == [""]


def test_validation_pictures_are_not_training_pictures(tmp_path):
    write(tmp_path / "train" / "a" / "1.png")
    write(tmp_path / "val" / "a" / "2.png")
    assert [p.name for p in data.find_images(tmp_path)[0]] == ["1.png"]
    assert [p.name for p in data.find_images(tmp_path, "val")[0]] == ["2.png"]


def test_a_folder_without_pictures_or_no_folder_is_the_users_mistake(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    for directory in (tmp_path, tmp_path / "missing", tmp_path / "train" / "a" / "notes.txt"):
        with pytest.raises(drr.UserError):
            data.find_images(directory)


def test_titles_come_from_classes_tsv_or_else_from_the_folder(tmp_path):
    assert data.class_titles(tmp_path, ["n01", "n02"]) == ["n01", "n02"]
    (tmp_path / "classes.tsv").write_text("index\twnid\tname\n0\tn02\tgreat white shark\n")
    assert data.class_titles(tmp_path, ["n01", "n02"]) == ["n01", "great white shark"]
    for text in ("a\tb\nn01\tx\n", "", "wnid\tname\nn01\n", "wnid\tname\nn01\tcaf\xe9\n"):                  # the last in Latin-1
        (tmp_path / "classes.tsv").write_bytes(text.encode("latin-1"))
        with pytest.raises(drr.UserError, match="wnid"):
            data.class_titles(tmp_path, ["n01"])


def test_the_fingerprint_is_that_of_names_and_sizes(tmp_path):
    for i in range(3):
        write(tmp_path / "one" / "a" / f"{i}.png", seed=i)
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    fingerprint = lambda name: data.files_fingerprint(data.find_images(tmp_path / name)[0])
    first = fingerprint("one")
    assert fingerprint("moved") == first
    for change in (lambda d: (d / "a" / "1.png").rename(d / "a" / "9.png"), lambda d: (d / "a").rename(d / "b"),
                   lambda d: write(d / "a" / "1.png", size=(41, 31)), lambda d: (d / "a" / "2.png").unlink()):
        shutil.rmtree(tmp_path / "moved")
        shutil.copytree(tmp_path / "one", tmp_path / "moved")
        change(tmp_path / "moved")
        assert fingerprint("moved") != first


# === Tar shards =====================================================================================================
def pack(tar_path, samples):
    """Writes a shard of [(name, bytes)]."""
    tar_path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(tar_path, "w") as tar:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return tar_path


def labelled(path, label):
    return [(path.name, path.read_bytes()), (path.stem + ".cls", str(label).encode())]


@pytest.fixture
def shards(tmp_path):
    """The photos of PHOTOS/train in three shards, in the order of the folder, and the classes' names."""
    files, labels, classes = data.find_images(PHOTOS)
    samples = [labelled(path, label) for path, label in zip(files, labels)]
    samples[0][1:] = [(files[0].stem + ".json", b'{"label": 0, "filename": "x"}')]              # the other notation
    samples[1] = [("a/" + "long/" * 40 + name, content) for name, content in samples[1]]        # a name over 100 bytes
    for i in range(3):
        pack(tmp_path / "shards" / "train" / f"{i:06d}.tar", sum(samples[i * 6:i * 6 + 6], []))
    (tmp_path / "shards" / "classes.tsv").write_text("wnid\tname\n" + "".join(f"{c}\tx\n" for c in classes))
    return tmp_path / "shards"


@pytest.mark.parametrize("in_memory", [True, False])
def test_shards_deliver_the_same_pictures_as_the_folder_they_were_packed_from(shards, in_memory):
    settings = dict(views=2, balance=0.5, load=in_memory)
    folder, packed = make_views(**settings), make_views(shards, **settings)
    assert data.find_images(shards)[2] == data.find_images(PHOTOS)[2]
    for (images, labels, _), (others, other_labels, bad) in zip(folder.batches(0, 4), packed.batches(0, 4)):
        assert torch.equal(images, others) and torch.equal(labels, other_labels) and bad == 0


def test_classes_of_shards_are_numbers_where_no_table_names_them(shards):
    labels = data.find_images(shards)[1]
    (shards / "classes.tsv").write_text("wnid\tname\nn1\tx\n")
    with pytest.raises(drr.UserError, match="1 lines"):
        data.find_images(shards)
    (shards / "classes.tsv").unlink()
    assert data.find_images(shards)[2] == [str(i) for i in range(labels.max() + 1)]


def test_validation_pictures_come_from_shards_too(shards, tmp_path):
    path = write(tmp_path / "7.png")
    pack(shards / "val" / "0.tar", labelled(path, 1))
    images, labels = data.validation_images(shards, 16, 10, data.find_images(shards)[2], tmp_path / "index")
    assert labels.tolist() == [1] and torch.equal(images[0], common.crop(common.open_image(path), 16))


def test_a_damaged_picture_within_a_shard_is_replaced_and_counted(shards, tmp_path):
    good, broken = write(tmp_path / "1.png"), tmp_path / "0.png"
    broken.write_bytes(b"broken")
    pack(tmp_path / "some" / "train" / "0.tar", labelled(broken, 0) + labelled(good, 0))
    images, _, bad = make_views(tmp_path / "some", in_memory=False, flip=False)[0]
    assert all(torch.equal(image, common.crop(common.open_image(good), 16)) for image in images)
    assert bad == (make_views(tmp_path / "some").draw(0)[0] == 0).sum() > 0


def damage(content, kind):
    """A shard cut within a picture, one with a spoilt header in the middle, an empty one, one that is none."""
    spoilt = bytearray(content)
    spoilt[content.index(b"1.cls\0") + 150] ^= 255            # the checksum is at 148 .. 155 of a header
    return {"cut": content[:600], "header": bytes(spoilt), "empty": b"", "other": b"no tar" * 500}[kind]


@pytest.mark.parametrize("kind", ["cut", "header", "empty", "other"])
def test_a_damaged_shard_is_the_users_mistake(tmp_path, kind):
    samples = [labelled(write(tmp_path / f"{i}.png"), i) for i in range(2)]
    path = pack(tmp_path / "train" / "0.tar", samples[0] + samples[1])
    assert len(data.find_images(tmp_path)[0]) == 2
    path.write_bytes(damage(path.read_bytes(), kind))
    with pytest.raises(drr.UserError, match="0.tar is damaged"):
        data.find_images(tmp_path)


@pytest.mark.parametrize("label", [None, ("0.cls", b"n01440764"), ("0.cls", b"-1"), ("0.json", b'{"x": 1}'),
                                   ("0.json", b"[]"), ("0.json", b'{"label": 3.7}'), ("0.json", b'{"label": Infinity}'),
                                   ("0.cls", b"1000000000")])
def test_a_picture_without_a_class_is_the_users_mistake(tmp_path, label):
    picture_file = write(tmp_path / "0.png")
    pack(tmp_path / "train" / "0.tar", [("0.png", picture_file.read_bytes())] + ([label] if label else []))
    with pytest.raises(drr.UserError, match="names no class for 0.png"):
        data.find_images(tmp_path)


def test_shards_beside_pictures_and_shards_without_any_are_the_users_mistake(shards, tmp_path):
    pack(tmp_path / "none" / "train" / "0.tar", [("0.txt", b"no image")])
    with pytest.raises(drr.UserError, match="hold no images"):
        data.find_images(tmp_path / "none")
    write(shards / "train" / "a" / "1.png")
    with pytest.raises(drr.UserError, match="both"):
        data.find_images(shards)


def test_indices_of_shards_are_read_one_at_a_time(shards, tmp_path, monkeypatch):
    first, load, busy = data.find_images(shards, index=tmp_path / "index")[0], np.load, threading.Lock()

    @contextlib.contextmanager
    def alone(path):                                           # python/cpython issue 106905: rare, and fatal
        assert busy.acquire(blocking=False)
        time.sleep(0.02)
        with load(path) as arrays:
            yield arrays
        busy.release()

    monkeypatch.setattr(np, "load", alone)
    assert list(data.find_images(shards, index=tmp_path / "index")[0]) == list(first)


def test_a_shard_is_read_once_and_again_when_it_has_changed(shards, tmp_path, monkeypatch):
    read, original = [], support.shards.read_shard
    monkeypatch.setattr(support.shards, "read_shard", lambda path: read.append(path.name) or original(path))
    first, labels, _ = data.find_images(shards, index=tmp_path / "index")
    assert sorted(read) == ["000000.tar", "000001.tar", "000002.tar"]
    again, again_labels, _ = data.find_images(shards, index=tmp_path / "index")
    assert len(read) == 3 and list(again) == list(first) and np.array_equal(labels, again_labels)
    pack(shards / "train" / "000001.tar", labelled(write(tmp_path / "new.png"), 2))
    changed = data.find_images(shards, index=tmp_path / "index")[0]
    assert read[3:] == ["000001.tar"] and [p.name for p in changed if p.parent.name == "000001.tar"] == ["new.png"]
    assert data.files_fingerprint(changed) != data.files_fingerprint(first)
    os.utime(shards / "train" / "000002.tar", (1, 1))                          # the same size, another time
    data.find_images(shards, index=tmp_path / "index")
    assert read[4:] == ["000002.tar"]
    for kept in (tmp_path / "index").iterdir():
        kept.write_bytes(kept.read_bytes()[:40])                               # damaged
    assert list(data.find_images(shards, index=tmp_path / "index")[0]) == list(changed) and len(read) == 8


# === Cropping =======================================================================================================
def test_the_first_view_is_the_central_square():
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 10:30] = 200                                                      # the central square of 40 x 20
    assert common.crop_box(40, 20, 0, 123) == (10, 0, 20)
    seen = common.crop(Image.fromarray(image), 20)
    assert seen.shape == (3, 20, 20) and seen.dtype == torch.uint8 and torch.all(seen == 200)


@pytest.mark.parametrize("width, height", [(40, 20), (20, 40), (33, 33), (1, 5)])
def test_other_views_lie_within_the_picture_and_are_the_same_every_time(width, height):
    short, boxes = min(width, height), []
    for view in range(1, 100):
        left, top, side = box = common.crop_box(width, height, view, 7)
        assert 0.6 * short <= side <= short
        assert 0 <= left and left + side <= width + 1e-9 and 0 <= top and top + side <= height + 1e-9
        assert box == common.crop_box(width, height, view, 7) != common.crop_box(width, height, view, 8)
        boxes.append(box)
    assert len(set(boxes)) == 99
    sides = np.array([b[2] for b in boxes])
    # Uniform in 0.6 .. 1: the mean of 99 is within 6 standard deviations (false alarm 2e-9 for a fresh seed).
    assert abs(sides.mean() / short - 0.8) < 6 * 0.4 / 12 ** 0.5 / 99 ** 0.5


def test_crops_differ_between_files_and_are_the_same_in_every_run(tmp_path):
    seeds = [data.file_seed(tmp_path / name, seed) for name in ("a.png", "b.png") for seed in (0, 1)]
    assert len(set(seeds)) == 4
    assert data.file_seed(tmp_path / "elsewhere" / "a.png", 0) == seeds[0]


# === Formats ========================================================================================================
def test_transparency_becomes_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "clear-grey.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=1)
    for name in ("clear.png", "clear-grey.png", "palette.png"):
        assert np.all(np.array(common.open_image(tmp_path / name)) == 255), name


@pytest.mark.parametrize("mode, colour, suffix, expected", [
    ("L", 100, "png", (100, 100, 100)), ("1", 1, "png", (255, 255, 255)), ("P", 0, "gif", None),
    ("CMYK", (0, 0, 0, 255), "jpg", (0, 0, 0)), ("RGBA", (0, 0, 200, 255), "png", (0, 0, 200)),
    ("RGB", (10, 20, 30), "bmp", (10, 20, 30)), ("RGB", (10, 20, 30), "webp", None),
    ("RGB", (10, 20, 30), "tiff", (10, 20, 30))])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode, colour, suffix, expected):
    path = tmp_path / f"picture.{suffix}"
    Image.new(mode, (9, 7), colour).save(path)
    opened = common.open_image(path)
    assert opened.mode == "RGB" and opened.size == (9, 7)
    if expected:
        assert np.abs(np.array(opened).astype(int) - expected).max() <= 4


def test_a_16_bit_picture_keeps_its_brightness(tmp_path):
    Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)).save(tmp_path / "deep.png")
    opened = np.array(common.open_image(tmp_path / "deep.png"))
    assert opened.shape == (8, 8, 3) and np.all(np.abs(opened.astype(int) - 100) <= 1)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_a_picture_of_unknown_brightness_is_the_users_mistake(tmp_path, kind):
    Image.fromarray(np.ones((8, 8), kind)).save(tmp_path / "deep.tiff")
    with pytest.raises(drr.UserError, match="32 bits"):
        common.open_image(tmp_path / "deep.tiff")


def test_the_camera_s_orientation_is_respected(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                                           # turn by 90 degrees to see it upright
    picture().save(tmp_path / "turned.jpg", exif=exif)
    assert common.open_image(tmp_path / "turned.jpg").size == (30, 40)


@pytest.mark.parametrize("content", [b"", b"no picture at all", None])
def test_what_is_no_picture_is_the_users_mistake(tmp_path, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content if content is not None else write(tmp_path / "whole.jpg").read_bytes()[:300])
    for p in (path, tmp_path / "missing.jpg"):
        with pytest.raises(drr.UserError, match=p.name):
            common.open_image(p)


# === Batches ========================================================================================================
def test_memory_and_worker_processes_give_the_same_batches():
    settings = dict(views=2, class_views=10, balance=0.5)
    memory, workers = make_views(load=True, **settings), make_views(**settings, in_memory=False)
    batches = list(zip(memory.batches(3, 7), workers.batches(3, 7)))
    assert len(batches) == 4
    for (images, labels, bad), (other_images, other_labels, other_bad) in batches:
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)
        assert images.shape == (8, 3, 16, 16) and images.dtype == torch.uint8 and bad == other_bad == 0


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
    images, labels, _ = views[5]
    for image, label, i, flip in zip(images, labels, index, flips):
        path = views.files[views.file_of[i]]
        expected = common.crop(common.open_image(path), 16, views.crop_of[i], data.file_seed(path, 0))
        assert torch.equal(image, expected.flip(-1) if flip else expected)
        assert label == views.labels[i]
    share = np.mean([views.draw(step)[1] for step in range(500)])
    assert abs(share - 0.5) < 6 * 0.5 / 4000 ** 0.5                            # false alarm 2e-9 for a fresh seed
    assert not any(make_views(flip=False).draw(step)[1].any() for step in range(50))


@pytest.mark.parametrize("load", [True, False])
def test_several_processes_deliver_together_the_batch_of_one(load):
    views = make_views(load=load, views=2, in_memory=load)
    images, labels, _ = views[3]
    parts = []
    for views.rows in np.split(np.arange(8), [3, 4]):
        parts.append(views[3])
    assert [len(part) for part, _, _ in parts] == [3, 1, 4]
    assert torch.equal(torch.cat([part for part, _, _ in parts]), images)
    assert torch.equal(torch.cat([part for _, part, _ in parts]), labels)


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
    assert np.bincount(views.labels).tolist() == [10, 3 * 4, 50 * 2]           # ceil(10 / 1), ceil(10 / 3), at least 2
    for i in range(54):
        crops = views.crop_of[views.file_of == i]
        assert len(crops) and crops.tolist() == list(range(len(crops)))


@pytest.mark.parametrize("balance,favour", [(0.0, 1.0), (0.6, 1.0), (1.0, 1.0), (0.5, 20.0)])
def test_classes_are_as_frequent_as_balance_and_favour_say(balance, favour):
    per_class = np.array([1, 3, 50])
    views = counted(per_class, class_views=10, balance=balance, favour_class="class1", favour=favour)
    expected = per_class ** (1 - balance) * [1, favour, 1]
    np.testing.assert_allclose(class_shares(views), expected / expected.sum())
    p = np.diff(views.cdf, prepend=0)
    for c in range(3):
        np.testing.assert_allclose(p[views.labels == c], p[views.labels == c][0])   # within a class all count the same


def test_an_unknown_favourite_is_refused():
    with pytest.raises(drr.UserError, match="class9"):
        counted([1, 3], favour_class="class9")
    with pytest.raises(drr.UserError, match="favour_class"):
        counted([1, 3], favour=4.0)


def test_draws_follow_the_cdf():
    views = counted([1, 3, 4], class_views=4, balance=0.5)
    p, n = np.diff(views.cdf, prepend=0), 8 * 2000
    share = np.bincount(np.concatenate([views.draw(step)[0] for step in range(2000)]), minlength=len(views)) / n
    # 13 frequencies at most, within 5 standard deviations: false alarm < 1e-5 for a fresh seed.
    assert np.all(np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / n))


# === Files that cannot be read ======================================================================================
@pytest.fixture
def partly_broken(tmp_path):
    for c in "ab":
        for i in range(3):
            write(tmp_path / c / f"{i}.png", seed=i)
    (tmp_path / "a" / "2.png").write_bytes(b"broken")                          # the next file is of another class
    return tmp_path


def broken_file(views):
    return next(i for i, p in enumerate(views.files) if p.name == "2.png" and p.parent.name == "a")


def test_broken_files_are_dropped_from_memory_and_reported(partly_broken, capsys):
    views = make_views(partly_broken, load=True, views=2)
    assert "skipped 1 of 6 files" in capsys.readouterr().out
    assert len(views) == 10 == len(views.images)
    assert broken_file(views) not in views.file_of
    np.testing.assert_allclose(class_shares(views), [0.4, 0.6])                # two files against three


def test_broken_files_are_replaced_and_counted_in_worker_processes(partly_broken):
    views = make_views(partly_broken, in_memory=False)
    broken = broken_file(views)
    drawn = [int((views.draw(step)[0] == broken).sum()) for step in range(6)]
    batches = list(views.batches(0, 6))
    assert [bad for _, _, bad in batches] == drawn and sum(drawn) > 0
    for step, (images, labels, _) in enumerate(batches):
        assert len(images) == len(labels) == 8
        index = np.where(views.draw(step)[0] == broken, broken + 1, views.draw(step)[0])
        assert labels.tolist() == views.labels[index].tolist()                 # the label is that of the stand-in


def test_stand_ins_are_the_same_however_the_batch_is_shared(partly_broken):
    (partly_broken / "b" / "0.png").write_bytes(b"broken")                    # two in a row, many views each
    views = make_views(partly_broken, in_memory=False, views=120)
    broken = [2, 3]                                                            # a/2.png and b/0.png
    for step in range(6):
        views.rows = np.arange(8)
        images, labels, bad = views[step]
        assert bad == np.isin(views.file_of[views.draw(step)[0]], broken).sum()   # pictures, not attempts
        parts = []
        for views.rows in np.split(np.arange(8), [3, 4]):
            parts.append(views[step])
        assert torch.equal(torch.cat([part[0] for part in parts]), images) and sum(part[2] for part in parts) == bad
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)
    views.rows = np.arange(8)
    assert sum(views[step][2] for step in range(6)) > 0


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_folder_of_broken_files_is_the_users_mistake(tmp_path, in_memory):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(drr.UserError):
        make_views(tmp_path, load=in_memory)[0]


def test_validation_pictures_that_are_all_broken_are_said(tmp_path):
    (tmp_path / "val" / "n1").mkdir(parents=True)
    (tmp_path / "val" / "n1" / "1.png").write_bytes(b"broken")
    with pytest.raises(drr.UserError, match="can be read"):
        data.validation_images(tmp_path, 16, 10, ["n1"])


def test_validation_images_are_central_crops_of_known_classes():
    images, labels = data.validation_images(PHOTOS, 16, 10, ["n09332890", "n11939491"])
    assert labels.tolist() == [0, 1]
    for image, path in zip(images, sorted((PHOTOS / "val").rglob("*.JPEG"))):
        assert torch.equal(image, common.crop(common.open_image(path), 16))
    assert data.validation_images(PHOTOS, 16, 1, ["n11939491"])[1].tolist() == [0]
    images, labels = data.validation_images(PHOTOS, 16, 10, [""])                  # a training without classes
    assert len(images) == len(labels) > 0 and not labels.any()
    with pytest.raises(drr.UserError, match="none of the training's classes .another, ....* but n09332890"):
        data.validation_images(PHOTOS, 16, 10, ["another"])
    assert data.validation_images(PHOTOS / "train", 16, 10, ["n11939491"]) == (None, None)


def test_pixels_become_numbers_from_minus_one_to_one():
    x = common.to_float(torch.tensor([0, 255], dtype=torch.uint8), "cpu")
    assert x.tolist() == [-1, 1]


# === Token cache ====================================================================================================
def small_vae(seed=0):
    torch.manual_seed(seed)
    return drr.RQVAE(vae_section(ch_mult=[1, 1, 1])).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def vae():
    return small_vae()


def cached(views, vae, directory):
    return data.cached_codes(views, vae, directory, torch.device("cpu"), torch.float32)


def test_cached_codes_are_those_of_the_crops_and_of_their_mirror_images(tmp_path, vae):
    views = make_views(size=32, views=2)
    codes = cached(views, vae, tmp_path)
    x = common.to_float(torch.stack([views.read(i) for i in range(len(views))]), "cpu")
    assert codes.shape == (2, 30, 64, 4) and codes.dtype == np.uint16
    for flip, images in enumerate((x, x.flip(-1))):
        assert torch.equal(torch.from_numpy(codes[flip].astype(np.int64)), vae.encode(images))
    assert np.array_equal(cached(make_views(size=32, views=2, flip=False), vae, tmp_path), codes[:1])


def test_the_cache_is_reused_and_belongs_to_weights_and_views(tmp_path, vae, monkeypatch):
    first = np.array(cached(make_views(size=32), vae, tmp_path))
    written = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    encoded = []
    original = data.encode
    monkeypatch.setattr(data, "encode", lambda *args: encoded.append(1) or original(*args))
    again = cached(make_views(size=32), vae, tmp_path)
    assert np.array_equal(first, again) and not encoded
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == written
    for views, model in ((make_views(size=32), small_vae(1)), (make_views(size=32, seed=1, views=2), vae)):
        before = len(list(tmp_path.iterdir()))
        encoded.clear()
        cached(views, model, tmp_path)
        assert encoded and len(list(tmp_path.iterdir())) > before


@pytest.mark.parametrize("views", [False, True])
def test_a_damaged_cache_is_the_users_mistake(tmp_path, vae, views):
    cached(make_views(size=32), vae, tmp_path)
    file = next(path for path in tmp_path.iterdir() if ("views" in path.name) == views)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(drr.UserError, match="delete both"):
        cached(make_views(size=32), vae, tmp_path)


def test_the_cache_notices_that_a_file_has_changed(tmp_path, vae):
    path = write(tmp_path / "pictures" / "a" / "1.png", size=(32, 32))
    first = np.array(cached(make_views(tmp_path / "pictures", size=32), vae, tmp_path / "codes"))
    write(path, seed=1, size=(33, 33))
    second = np.array(cached(make_views(tmp_path / "pictures", size=32), vae, tmp_path / "codes"))
    assert not np.array_equal(first, second)


def test_broken_files_are_dropped_from_the_cache_and_from_the_views(partly_broken, tmp_path, vae):
    for _ in range(2):                                                         # when written, and when read again
        views = make_views(partly_broken, size=32, views=2)
        codes = cached(views, vae, tmp_path / "codes")
        assert codes.shape == (2, 10, 64, 4) and len(views) == 10
        x = common.to_float(torch.stack([views.read(i) for i in range(10)]), "cpu")
        assert torch.equal(torch.from_numpy(np.array(codes[0]).astype(np.int64)), vae.encode(x))


def test_a_cache_that_cannot_be_written_leaves_nothing_behind(tmp_path, vae, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(data, "allocate", full)
    with pytest.raises(drr.UserError, match="No space left"):
        cached(make_views(size=32), vae, tmp_path)
    assert os.listdir(tmp_path) == []


# The same cache from several processes, and from a process that was killed. A worker is this module in a process of its
# own; it writes the caches of several data sets, and says how many images it encoded and which files it kept.
def work(rank, world, store, kill_at, *jobs):
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    encoded, original, data.Views.BLOCK = [], data.encode, 4

    def encode(model, x, dtype):
        encoded.append(len(x))
        if len(encoded) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(model, x, dtype)

    data.encode, result = encode, []
    for pictures, directory in zip(jobs[::2], jobs[1::2]):
        encoded.clear()
        views = make_views(pictures, size=32, views=2)
        codes = cached(views, small_vae(), directory)
        result.append((sum(encoded), views.file_of.tolist(), codes.shape[1]))
    print("RESULT" + json.dumps(result))


def start_worker(rank, world, store, kill_at, *jobs):
    code = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import test_data
test_data.work({rank}, {world}, {str(store)!r}, {kill_at}, *{[str(job) for job in jobs]})
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def file_names(directory):
    return sorted(p.suffix for p in directory.iterdir())


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The folder of a cache whose writer was killed within the second block of four files."""
    directory = tmp_path_factory.mktemp("interrupted")
    worker = start_worker(0, 1, "", 4, PHOTOS, directory)              # a block: 8 views, then their mirror images
    worker.communicate()
    assert worker.returncode == -signal.SIGKILL and file_names(directory) == [".part", ".state"]
    return directory


def test_a_killed_cache_goes_on_where_it_was(interrupted, tmp_path, vae, monkeypatch):
    whole = cached(make_views(size=32, views=2), vae, tmp_path / "whole")
    encoded, original = [], data.encode
    monkeypatch.setattr(data, "encode", lambda vae, x, dtype: encoded.append(len(x)) or original(vae, x, dtype))
    shutil.copytree(interrupted, tmp_path / "resumed")
    resumed = cached(make_views(size=32, views=2), vae, tmp_path / "resumed")
    assert sum(encoded) == (15 - 4) * 2 * 2 and np.array_equal(resumed, whole)
    assert file_names(tmp_path / "resumed") == file_names(tmp_path / "whole") == [".npy", ".npy"]


def test_half_a_state_is_not_trusted(interrupted, tmp_path, vae):
    whole = cached(make_views(size=32, views=2), vae, tmp_path / "whole")
    for lost in (".part", ".state"):
        shutil.copytree(interrupted, tmp_path / lost)
        next((tmp_path / lost).glob("*" + lost)).unlink()
        assert np.array_equal(cached(make_views(size=32, views=2), vae, tmp_path / lost), whole)


def test_two_ranks_write_the_cache_of_one_and_end_what_one_began(interrupted, partly_broken, tmp_path, vae):
    shutil.copytree(interrupted, tmp_path / "resumed")
    pictures = partly_broken
    jobs = [PHOTOS, tmp_path / "fresh", PHOTOS, tmp_path / "resumed", pictures, tmp_path / "broken"]
    workers = [start_worker(rank, 2, tmp_path / "store", 0, *jobs) for rank in range(2)]
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs[0][1] + outputs[1][1]
    results = [json.loads(out.partition("RESULT")[2]) for out, _ in outputs]
    assert [[job[0] for job in result] for result in results] == [[8 * 4, 6 * 4, 3 * 4 - 4], [7 * 4, 5 * 4, 3 * 4]]
    for number, (source, directory) in enumerate(zip(jobs[::2], jobs[1::2])):
        views = make_views(source, size=32, views=2)
        alone = cached(views, vae, tmp_path / f"alone{number}")
        assert np.array_equal(np.load(next(p for p in directory.glob("codes-*.npy") if "views" not in p.name)), alone)
        assert all(result[number][1:] == [views.file_of.tolist(), len(alone[0])] for result in results)
    assert "skipped 1 of 6 files" in outputs[0][0] and "skipped" not in outputs[1][0]
