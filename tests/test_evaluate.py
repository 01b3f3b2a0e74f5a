"""Metrics against formulas and recorded numbers of torch-fidelity; the command on real files; every mistake in one sentence."""
import importlib.util
import json
import re
import shutil
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TESTS
from PIL import Image
from processes import execute
from processes import run as run_script
from test_training import torchrun

from support import common
from tools import evaluate

NO_CLASSIFIER = importlib.util.find_spec("efficientnet_lite_pytorch") is None
PHOTOS = TESTS / "photos" / "train"
QUICK = ["t_draft=1", "rounds=0", "batch_size=8", "--precision", "fp32", "--device", "cpu"]


class Net(torch.nn.Module):
    """Six features and four logits of an image, simple ones."""

    def forward(self, images):
        features = torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)
        return features, features[:, :4] * 5


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """Net as a program of torch.export that says what it is."""
    path = tmp_path_factory.mktemp("net") / "net.pt2"
    program = torch.export.export(Net(), (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim("B")},))
    about = {"classes": ["n02814860", "n09332890", "n09472597", "n11939491"], "size": 32}
    torch.export.save(program, path, extra_files={"about.json": json.dumps(about)})
    return path


def pictures(folder, n, size=32, seed=0):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        noise = rng.integers(0, 256, (size, size, 3)) // 2 + rng.integers(0, 128, 3)
        Image.fromarray(noise.astype(np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call(...) is `python evaluate.py ...` in this process: the exit status, what it printed, the last line of its errors."""
    def call(*arguments, cwd=tmp_path):
        monkeypatch.setattr("sys.argv", ["tools.evaluate", *map(str, arguments)])
        monkeypatch.chdir(cwd)
        status = 0
        try:
            common.run(evaluate.main)
        except SystemExit as leaving:
            status = leaving.code
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=out, error=err.strip().splitlines()[-1] if status else "")
    return call


def numbers(text):
    """{name: value} of the lines that end in a number."""
    rows = [line.rsplit(None, 1) for line in text.splitlines() if re.fullmatch(r"\S.* -?\d+\.\d{4}", line)]
    return {name.strip(): float(value) for name, value in rows}


# === Arithmetic =====================================================================================================
def recorded_features():
    i, j = torch.arange(480.0).view(60, 8), torch.arange(400.0).view(50, 8)
    return (torch.sin(i * 1.3) + 0.3 * torch.cos(i * i * 0.01),
            0.8 * torch.sin(j * 0.9 + 0.5) + 0.4 * torch.cos(j * j * 0.02) + 0.2)


def test_numbers_are_those_of_torch_fidelity():
    """Recorded from torch-fidelity on these features (its fid_statistics_to_metric, prc_features_to_metric,
    isc_features_to_metric); the package needs torchvision, so it is not asked again here."""
    real, fake = recorded_features()
    assert evaluate.fid(*evaluate.statistics(real), *evaluate.statistics(fake)) == pytest.approx(2.6594208919820383, abs=1e-6)
    assert evaluate.precision_recall(real, fake) == pytest.approx((0.04, 0.13333334028720856), abs=1e-6)
    assert evaluate.inception_score(3 * fake, 1) == pytest.approx((2.324631790496568, 0), abs=1e-6)


def test_fid_of_known_gaussians():
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 16.0]).double()
    mean = torch.tensor([1.0, 2.0, 2.0]).double()
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double())[0]
    rotated = [turn @ torch.diag(v) @ turn.T for v in (a, b)]
    expected = 9 + (1 - 2) ** 2 + (2 - 1) ** 2 + (3 - 4) ** 2                    # |m|^2 + sum (s_1 - s_2)^2
    assert evaluate.fid(torch.zeros(3).double(), rotated[0], mean, rotated[1]) == pytest.approx(expected, abs=1e-9)
    assert evaluate.fid(mean, rotated[1], mean, rotated[1]) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_by_hand():
    """On a line: the third neighbours of 0, 1, 2, 3 are 3, 2, 2, 3 away, so real reaches from -3 to 6."""
    real, fake = torch.arange(4.0)[:, None], torch.tensor([-2.9, 0.5, 6.1, 100.0])[:, None]
    precision, recall = evaluate.precision_recall(real, fake)
    assert precision == 0.5                                                   # 0.5 and -2.9, which is within 3 of 0
    assert recall == 1                                                        # the balls of fake are about 100 wide


def test_precision_does_not_depend_on_the_size_of_a_block():
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(3000, 4, generator=g), torch.randn(2500, 4, generator=g) * 1.4
    distances = lambda a, b: (a[:, None] - b[None]).double().norm(dim=2)
    radius = distances(real, real).sort(1).values[:, 3]
    expected = (distances(fake, real) <= radius).any(1).double().mean().item()
    assert evaluate.precision_recall(real, fake)[0] == pytest.approx(expected, abs=1.1 / 2500)     # one tie by rounding


def test_inception_score_of_certain_and_of_clueless_logits():
    certain = torch.eye(5).repeat(20, 1) * 100
    assert evaluate.inception_score(certain, 1)[0] == pytest.approx(5, abs=1e-6)
    assert evaluate.inception_score(torch.zeros(100, 5)) == pytest.approx((1, 0), abs=1e-9)


def test_class_accuracy_counts_first_places_first_five_and_first_among_the_present():
    logits, classes = torch.zeros(3, 12), [f"c{i}" for i in range(12)]
    logits[0, [2, 3]] = torch.tensor([3.0, 2.0])                   # class 2 comes first
    logits[1, [0, 1, 3, 4, 5]] = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0])     # class 5 is fifth, the first of the present
    logits[2, [0, 1, 3, 4, 6, 2, 9]] = torch.arange(9.0, 2.0, -1)  # class 9 is seventh, and second of the present
    assert evaluate.class_accuracy(logits, ["c2", "c5", "c9"], classes) == pytest.approx((1 / 3, 2 / 3, 2 / 3))
    assert evaluate.class_accuracy(logits, ["c2", "c5", "dog"], classes) is None


# === The command ====================================================================================================
def test_a_set_against_itself_and_against_another(net, call, tmp_path):
    pictures(tmp_path / "a", 20), pictures(tmp_path / "b", 20, seed=1)
    same = call("--reference", "a", "--samples", "a", "--features", net)
    other = call("--reference", "a", "--samples", "b", "--features", net, "--json", "r.json")
    assert numbers(same.stdout)["FID-like"] == pytest.approx(0, abs=1e-4) and numbers(same.stdout)["precision-like"] == 1
    assert numbers(other.stdout)["FID-like"] > 1e-3
    held = json.loads((tmp_path / "r.json").read_text())
    assert held["results"]["FID-like"] == pytest.approx(numbers(other.stdout)["FID-like"], abs=1e-4)
    assert "net.pt2" in held["protocol"]["features"] and "20 pictures of b" in held["protocol"]["pictures"]
    for word in ("features:", "20 pictures of a (as they are)", "32x32", "commit:"):
        assert word in other.stdout


def test_torchscript_gives_the_numbers_of_the_exported_program(net, call, tmp_path):
    torch.jit.trace(Net(), torch.zeros(2, 3, 32, 32)).save(tmp_path / "net.pt")
    pictures(tmp_path / "a", 9), pictures(tmp_path / "b", 9, seed=1)
    results = [numbers(call("--reference", "a", "--samples", "b", "--features", f).stdout)
               for f in (net, "net.pt")]
    assert results[0]["FID-like"] == results[1]["FID-like"]


def test_a_saved_reference_gives_the_same_numbers(net, call, tmp_path):
    pictures(tmp_path / "a", 20), pictures(tmp_path / "b", 20, seed=1)
    first = call("--reference", "a", "--samples", "b", "--features", net, "--save-reference", "ref.npz")
    again = call("--reference", "ref.npz", "--samples", "b", "--features", net)
    assert numbers(first.stdout) == numbers(again.stdout) and "20 pictures of a" in again.stdout
    with np.load(tmp_path / "ref.npz") as arrays:
        np.savez(tmp_path / "adm.npz", mu=arrays["mu"], sigma=arrays["sigma"])          # such as others publish
    alone = call("--reference", "adm.npz", "--samples", "b", "--features", net)
    assert numbers(alone.stdout)["FID-like"] == numbers(first.stdout)["FID-like"] and "unknown origin" in alone.stdout
    assert "precision-like" not in numbers(alone.stdout)


def test_samples_are_resumed_extended_and_the_same_on_two_ranks(net, call, tmp_path):
    command = ["--reference", PHOTOS, "--crop", "--features", net, "--out", "drawn", *QUICK]
    first = call(*command, "--number", 12)
    assert "4 classes" in first.stdout and "warning" not in first.stdout                # 12 pictures, 6 features
    parts = {p.name: p.read_bytes() for p in (tmp_path / "drawn").glob("part-*")}
    assert list(sorted(parts)) == ["part-000000.npy", "part-000001.npy"]
    (tmp_path / "drawn" / "part-000000.npy").unlink()
    call(*command, "--number", 20, "--npz", "all.npz")
    again = {p.name: p.read_bytes() for p in (tmp_path / "drawn").glob("part-*")}
    assert len(again) == 3 and all(again[name] == parts[name] for name in parts)
    with np.load(tmp_path / "all.npz") as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.shape == (20, 32, 32, 3) and images.dtype == np.uint8
    assert labels.tolist() == 5 * sorted(set(labels.tolist())) and 980 in labels
    assert len(np.unique(images.reshape(20, -1), axis=0)) == 20                         # no picture twice
    flat = call("--reference", PHOTOS, "--crop", "--samples", "all.npz", "--features", net)
    both = torchrun(2, "tools.evaluate", *command, "--number", 20, "--out", "two", cwd=tmp_path)
    two = {p.name: p.read_bytes() for p in (tmp_path / "two").glob("part-*")}
    assert two == again
    assert numbers(both.output)["FID-like"] == numbers(flat.stdout)["FID-like"]
    refused = call(*command, "--number", 12, "--seed", 1)
    assert refused.returncode == 2 and "another checkpoint, seed" in refused.error


def test_reconstructions_come_closer_to_the_reference_than_samples(net, call, tmp_path):
    common = ["--reference", PHOTOS, "--crop", "--features", net, "--precision", "fp32"]
    rebuilt = call(*common, "--reconstructions")
    drawn = call(*common, "--number", 16, "t_draft=1", "rounds=0")
    assert numbers(rebuilt.stdout)["FID-like"] < numbers(drawn.stdout)["FID-like"]
    assert "reconstructions by" in rebuilt.stdout


def test_a_saved_reference_draws_the_classes_that_its_pictures_had(net, call, tmp_path):
    command = ["--features", net, "--number", 8, *QUICK]
    first = call("--reference", PHOTOS, "--crop", "--save-reference", "ref.npz", "--out", "drawn", *command)
    again = call("--reference", "ref.npz", "--out", "drawn", *command)
    assert again.returncode == 0 and numbers(again.stdout)["FID-like"] == numbers(first.stdout)["FID-like"]
    assert "4 classes" in again.stdout


def test_what_is_wrong_is_said_before_anything_is_drawn(net, call, tmp_path):
    np.savez(tmp_path / "seven.npz", mu=np.zeros(7), sigma=np.eye(7))
    done = call("--reference", "seven.npz", "--features", net, "--out", "drawn", *QUICK)
    assert done.returncode == 2 and not (tmp_path / "drawn").exists()


def test_too_few_pictures_are_named(net, call, tmp_path):
    pictures(tmp_path / "a", 20), pictures(tmp_path / "b", 5)
    done = call("--reference", "a", "--samples", "b", "--features", net)
    assert "warning: 5 pictures for 6 features" in done.stdout and "more than 6" in done.stdout


@pytest.mark.parametrize("arguments,words", [
    (["--reference", "nowhere"], ["nowhere", "does not exist"]),
    (["--reference", "empty"], ["empty", "holds no images"]),
    (["--reference", "mixed"], ["pixels", "--crop"]),
    (["--reference", "a", "--samples", "large"], ["32x32", "40x40"]),
    (["--reference", "large"], ["40x40", "32x32"]),
    (["--reference", "bad.npz", "--samples", "a"], ["bad.npz", "no .npz file"]),
    (["--reference", "array.npz", "--samples", "a"], ["array.npz", "no .npz file"]),
    (["--reference", "words.npz", "--samples", "a"], ["words.npz", "numbers"]),
    (["--reference", "a", "--samples", "a", "--json", "a"], ["a cannot be written", ".json"]),
    (["--reference", "a", "--samples", "a", "--save-reference", "reference"], ["reference", ".npz"]),
    (["--reference", "other.npz", "--samples", "a"], ["other.npz", "arr_0"]),
    (["--reference", "nan.npz", "--samples", "a"], ["nan.npz", "not finite"]),
    (["--reference", "seven.npz", "--samples", "a"], ["7 features", "another network"]),
    (["--reference", "float.npz", "--samples", "a"], ["float.npz", "expected uint8"]),
    (["--reference", "a", "--samples", "b.npz"], ["b.npz", "does not exist"]),
    (["--reference", "a", "--samples", "a", "--class", "980"], ["--samples", "--class"]),
    (["--reference", "a", "--reconstructions", "--number", "8"], ["--number"]),
    (["--reference", "a", "--reconstructions", "t_draft=8"], ["key=value"]),
    (["--reference", "a", "--samples", "mixed", "--crop"], ["33 x 33"]), (["--reference", "a", "order=["], ["order=[", "YAML"]),
    (["--reference", "a", "revise_temperature=1e-30"], ["revise_temperature", "0.01"]),
    (["--reference", "large", "--samples", "large", "--features", "fixed.pt2"], ["fixed.pt2", "40, 40"]),
    (["--reference", "a", "--samples", "a", "--reconstructions"], ["exclude"]),
    (["--reference", "a", "--samples", "a", "--checkpoint", "b"], ["--samples", "--checkpoint"]),
    (["--reference", "foreign.npz", "--samples", "a"], ["foreign.npz", "about"]),
    (["--reference", "nan.npz", "--reconstructions"], ["statistics"]),
    (["--reference", "a", "--number", "0"], ["--number"]),
    (["--reference", "a", "nonsense=1"], ["nonsense"]), (["--reference", "a", "t_draft=many"], ["t_draft"]),
    (["--reference", "a", "t_draft=65"], ["t_draft", "1 to 64"]), (["--reference", "a", "--class", "unheard of"], ["unheard"]),
    (["--reference", "a", "--samples", "a", "--features", "text.pt"], ["text.pt", "neither"]),
    (["--reference", "a", "--samples", "a", "--features", "inceptoin"], ["inceptoin", "expected"]),
    (["--reference", "large", "--samples", "large"], ["32x32", "40x40"]),
    (["--reference", "a", "--samples", "a", "--features", "nan.pt"], ["not finite"]),
    (["--reference", "a", "--samples", "a", "--features", "flat.pt"], ["two dimensions"])])
def test_mistakes_are_one_sentence(arguments, words, net, call, mistakes):
    features = [] if "--features" in arguments else ["--features", net]
    done = call(*arguments, *features, cwd=mistakes)
    assert done.returncode == 2 and done.error.startswith("error: ")
    assert all(word in done.error for word in words), done.error


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    """A folder full of them."""
    folder = tmp_path_factory.mktemp("mistakes")
    pictures(folder / "a", 8), pictures(folder / "large", 8, size=40), (folder / "empty").mkdir()
    shutil.copytree(folder / "a", folder / "mixed")
    Image.new("RGB", (33, 33)).save(folder / "mixed" / "z.png")
    (folder / "bad.npz").write_bytes(b"nothing"), (folder / "text.pt").write_text("text")
    np.savez(folder / "other.npz", x=np.zeros(3))
    np.savez(folder / "foreign.npz", mu=np.zeros(6), sigma=np.eye(6), about="a lakeside")
    np.savez(folder / "nan.npz", mu=np.full(6, np.nan), sigma=np.eye(6))
    np.savez(folder / "words.npz", mu=np.array(6 * ["mean"]), sigma=np.eye(6))
    with open(folder / "array.npz", "wb") as f:
        np.save(f, np.zeros(3))
    np.savez(folder / "seven.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez(folder / "float.npz", arr_0=np.zeros((4, 32, 32, 3)))
    torch.export.save(torch.export.export(Net(), (torch.zeros(2, 3, 32, 32),)), folder / "fixed.pt2")      # says no size
    for name, f in (("nan.pt", lambda x: x.mean((2, 3)) / 0 * 0), ("flat.pt", lambda x: x)):
        torch.jit.trace(f, torch.zeros(2, 3, 32, 32)).save(str(folder / name))
    return folder


def test_inception_without_its_package_says_what_to_install(call):
    if importlib.util.find_spec("torch_fidelity") and importlib.util.find_spec("torchvision"):
        pytest.skip("torch-fidelity is installed here")
    done = call("--reference", PHOTOS, "--crop", "--reconstructions")
    assert done.returncode == 2 and "pip install torch-fidelity" in done.error and "classifier" in done.error


def test_our_classifier_names_its_classes_and_tells_pictures_apart():
    network = evaluate.load_features("classifier", torch.device("cpu"))
    files = sorted(PHOTOS.rglob("*.JPEG"))
    images = torch.stack([common.crop(common.open_image(f), 32) for f in files])
    features, logits = evaluate.measure(network, [images], len(files), "photographs", torch.device("cpu"))
    assert features.shape == (len(files), 64) and logits.shape == (len(files), 200)
    assert len(set(network.classes)) == 200 and {"n02814860", "n09332890"} <= set(network.classes)     # beacon, lakeside
    right = [network.classes[k] == f.parent.name for k, f in zip(logits.argmax(1), files)]
    assert sum(right) >= 2                                         # of 8 photographs of its classes; chance is 0.04


def test_a_classifier_is_trained_and_used(call, tmp_path):
    """Two classes that a glance tells apart: dark and bright noise."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 110), ("val", 20)):
        for name, low in (("dark", 0), ("bright", 128)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(n):
                noise = rng.integers(low, low + 128, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(noise).save(tmp_path / "data" / split / name / f"{i}.png")
    tool, common = "tools/train_classifier.py", ["--data", "data", "--out", "net.pt2", "--precision", "fp32", "--batch-size"]
    done = execute(tool, *common, 300, cwd=tmp_path)
    assert done.returncode == 2 and "--batch-size" in done.stderr and not (tmp_path / "net.pt2").exists()
    assert "validation accuracy 100" in run_script(tool, *common, 20, "--epochs", 2, cwd=tmp_path).stdout
    with zipfile.ZipFile(tmp_path / "net.pt2") as archive:          # no path of this machine is in it
        assert not any(b"train_classifier.py" in archive.read(name) for name in archive.namelist())
    done = call("--reference", "data/val", "--samples", "data/val", "--features", "net.pt2")
    assert numbers(done.stdout)["top-1 accuracy"] == 1 and numbers(done.stdout)["FID-like"] == pytest.approx(0, abs=1e-4)


@pytest.mark.skipif(NO_CLASSIFIER, reason="needs pip install -r requirements-evaluate.txt")
def test_efficientnet_knows_real_photographs():
    """Four photographs of classes that it was trained on; at 128x128 it names at least one of them."""
    files = sorted(PHOTOS.rglob("*.JPEG"))
    images = torch.stack([common.crop(common.open_image(f), 128) for f in files])
    network = evaluate.load_features("efficientnet", torch.device("cpu"))
    features, logits = evaluate.measure(network, [images], len(images), "photographs", torch.device("cpu"))
    assert features.shape == (len(files), 1280)
    assert evaluate.class_accuracy(logits, [f.parent.name for f in files], network.classes)[1] > 0.25       # chance is 0.5%
