"""Mistakes of users: each ends in one sentence and exit status 2, leaves no traceback and writes nothing."""
import json
import math
import os
import pickle
import re
import runpy
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO, TESTS, random_checkpoint
from PIL import Image
from processes import PHOTOS, execute, refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import drr
import sample
from support import common

RELEASE = TESTS / "fixtures" / "rqvae.safetensors"


# === A folder full of things that can be got wrong ==========================================================
class Attack:
    """What pickle would execute while loading it."""

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


CHANGES = {                          # a copy's name: the file, and what is changed in it
    "stranger": ("vae", lambda tensors, meta: tensors["quantizer.codebook"].add_(0.1)),
    "keyless": ("vae", lambda tensors, meta: meta["vae"].pop("ch")),
    "widened": ("transformer", lambda tensors, meta: meta["transformer"].update(d_model=128)),
    "classless": ("transformer", lambda tensors, meta: meta.update(classes=None)),
    "untitled": ("transformer", lambda tensors, meta: meta["titles"].pop()),
    "not_a_number": ("transformer", lambda tensors, meta: tensors["pos"].fill_(math.nan)),
    "unsampled": ("transformer", lambda tensors, meta: meta["sample"].update(batch_size=0)),
}


LOGS = ["", "step,reconstruction\n", "a,b\n1,2\n", "step,lr\n1,high\n", "step,lr\n1,2,3\n", "\xff\xfe\0"]
ARRAYS = {                           # name of an .npz: what it holds
    "other": {"x": np.zeros(3)},
    "foreign": {"mu": np.zeros(6), "sigma": np.eye(6), "network": "VGG"},
    "nan": {"mu": np.full(6, np.nan), "sigma": np.eye(6)},
    "seven": {"mu": np.zeros(7), "sigma": np.eye(7)},
    "float": {"arr_0": np.zeros((4, 32, 32, 3))},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, feature_net):
    """A checkpoint with random weights in `good`, damaged copies of it, pictures and data of all kinds."""
    folder = tmp_path_factory.mktemp("mistakes")
    good = folder / "good"
    random_checkpoint(good, ["n1", "n2", "n3", "n4"], ["beacon", "lakeside", "volcano", "daisy"])
    for name in (*CHANGES, "truncated", "pickled", "halved", "swapped"):
        shutil.copytree(good, folder / name)
    for name, (file, change) in CHANGES.items():
        rewrite(folder / name / f"{file}.safetensors", change)
    whole = (good / "transformer.safetensors").read_bytes()
    (folder / "truncated" / "transformer.safetensors").write_bytes(whole[:len(whole) // 2])
    (folder / "pickled" / "transformer.safetensors").write_bytes(pickle.dumps(Attack(folder / "executed")))
    (folder / "halved" / "transformer.safetensors").unlink()
    shutil.copy(good / "vae.safetensors", folder / "swapped" / "transformer.safetensors")

    state = {name: tensor for name, tensor in load_file(RELEASE).items() if name.startswith("state_dict.")}
    state["state_dict.quantizer.codebooks.2.weight"] += 1
    torch.save(state, folder / "unshared.pt")
    torch.save({"state_dict": Attack(folder / "executed")}, folder / "evil.pt")
    (folder / "plain.pt").write_bytes(pickle.dumps(Attack(folder / "executed"), 2))
    (folder / "short.safetensors").write_bytes(RELEASE.read_bytes()[:5000])

    for i, text in enumerate(LOGS):
        (folder / f"log{i}").mkdir()
        (folder / f"log{i}" / "vae.csv").write_bytes(text.encode("latin-1"))
    Image.new("RGB", (32, 32), "red").save(folder / "photo.png")
    Image.new("L", (31, 32), 255).save(folder / "small_mask.png")
    Image.new("L", (32, 32), 0).save(folder / "black_mask.png")
    for name in ("empty", "flat", "broken", "other", "large", "mixed", "damaged", "plotted"):
        (folder / name).mkdir()
    shutil.copy(folder / "stranger" / "vae.safetensors", folder / "other")
    for name, size in (("flat/a", 32), ("mixed/a", 32), ("mixed/b", 33), ("large/a", 40), ("damaged/a", 32)):
        Image.new("RGB", (size, size)).save(folder / f"{name}.png")
    for name in ("text.png", "broken/a.jpg", "damaged/b.png", "file", "file.pt", "file.pt2", "file.npz"):
        (folder / name).write_text("no picture")
    (folder / "plotted" / "vae.csv").write_text("step,lr\n1,0.1\n")
    for name, arrays in ARRAYS.items():
        np.savez(folder / f"{name}.npz", **arrays)
    shutil.copy(feature_net, folder / "net.pt2")
    return folder


def contents(folder):
    """All paths in it, but for caches of codes, the locks of runs and the note of what was to be drawn where,
    which may stay after a mistake."""
    may_stay = re.compile(r".*codes|runs|samples(/\w+(/settings\.json)?)?$")
    paths = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return sorted(path for path in paths if not may_stay.match(path))


@pytest.fixture
def refuse(folder, monkeypatch, capsys):
    """refuse("sample.py ...", "a|b") runs a script in this process, where a mistake costs milliseconds, and
    expects status 2, as the last line `error: ...` that has a and b in it, and nothing written."""
    def refuse(command, words):
        before = contents(folder)
        monkeypatch.chdir(folder)
        command = command.replace("PHOTOS", str(PHOTOS)).replace("RELEASE", str(RELEASE))
        script, *arguments = command.split(" ")
        monkeypatch.setattr(sys, "argv", [script, *filter(None, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            if script.endswith(".py"):
                runpy.run_path(str(REPO / script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__")
        said = capsys.readouterr().err
        error = refused(SimpleNamespace(returncode=end.value.code, output=said), *words.split("|"))
        assert said.strip().endswith(error.strip()) and contents(folder) == before
    return refuse


# === The table: how the command begins, what the sentence must name (all of a|b), how the command may end ===
SAMPLE = "sample.py --out new/x.png --checkpoint"
DRAW = f"{SAMPLE} good --class 2"
REPAINT = f"{DRAW} --num 1 --image photo.png"
VAE = "train_vae.py smoke vae.steps=1 vae.warmup=0"
TRANSFORMER = "train_transformer.py smoke transformer.steps=1 transformer.warmup=0"
VAE_DATA = f"{VAE} --data PHOTOS"
TRANSFORMER_DATA = f"{TRANSFORMER} --data PHOTOS"
GIVEN = f"{TRANSFORMER_DATA} --vae good/vae.safetensors"
OFFICIAL = "train_vae.py smoke vae.ch_mult=[1,2,2] vae.attn_resolutions=[8] --official"
EVALUATE = "tools.evaluate --features net.pt2 --reference"
MEASURE = "tools.evaluate --features net.pt2 --checkpoint good --reference"
STUDY = "tools.study --checkpoint good --data"

MISTAKES = [
    # --- sample.py: classes, numbers, sampling values
    (f"{SAMPLE} good", "--class", [""]),
    (f"{SAMPLE} good", "zebra", ["--class zebra"]),
    (f"{SAMPLE} good", "1 lakeside, 3 daisy", ["--class d"]),
    (f"{SAMPLE} good", "did you mean volcano", ["--class vulcano"]),
    (f"{SAMPLE} good", "0 to 3", ["--class 4", "--class -1"]),
    (f"{SAMPLE} good", "class", ["--class volcano,,daisy"]),
    (f"{SAMPLE} good", "no texts", ["--text lake", "--class 1 --text lake"]),
    (DRAW, "--best-of|--clip", ["--best-of 2", "--best-of 0", "--clip empty"]),
    (DRAW, "--seed", ["--seed -1", "--seed x"]),
    (DRAW, "--num", ["--num 0", "--num -3", "--num many", "--class 0,1 --num 1"]),
    (DRAW, "t_draft", ["--t-draft 0", "--t-draft 65", "--t-draft 4 t_draft=8", "--t-draft x"]),
    (DRAW, "t_revise", ["--t-revise 0", "t_revise=65", "t_revise=1.5"]),
    (DRAW, "rounds", ["--m -1", "rounds=100000", "--m 1 --m 2"]),
    (DRAW, "revise_temperature", [f"--temperature {value}" for value in ("nan", "inf", "0", "hot")]),
    (DRAW, "draft_temperature", ["--draft-temperature 0"]),
    (DRAW, "revise_guidance", ["--guidance nan", "--guidance -1", "--guidance 101"]),
    (DRAW, "draft_guidance", ["--draft-guidance -1"]),
    (DRAW, "top_p", ["--top-p 0", "--top-p 1.5", "--top-p nan"]),
    (DRAW, "top_k", ["--top-k -1", "top_k=[", "top_k=[1]"]),
    (DRAW, "key=value", ["nonsense=1", "sobol"]),
    (DRAW, "tools.evaluate", ["order=sobol", "draft_pool=0.5"]),
    # --- sample.py: pictures that come in
    (f"{REPAINT} --region", "32 x 32", ["0,0,33,8", "8,8,8,16"]),
    (f"{REPAINT} --region", "--region", ["1,2,3", "a,b,c,d", "-4,0,8,8"]),
    (f"{REPAINT} --mask", "31 x 32", ["small_mask.png"]),
    (f"{REPAINT} --mask", "repaint|128 of 255", ["black_mask.png"]),
    (REPAINT, "--region", ["", "--region 0,0,8,8 --mask small_mask.png"]),
    (DRAW, "--image", ["--region 0,0,8,8", "--paste"]),
    (f"{DRAW} --region 0,0,8,8", "text.png", ["--image text.png"]),
    (f"{DRAW} --region 0,0,8,8", "missing.png", ["--image missing.png"]),
    (f"{SAMPLE} good --reconstruct", "text.png", ["text.png"]),
    (f"{SAMPLE} good --reconstruct photo.png", "--reconstruct", ["--class 2", "--m 0", "top_k=1"]),
    # --- sample.py: checkpoints and outputs
    (f"{SAMPLE}", "vae.safetensors", ["nowhere --class 2", "empty --class 2", "keyless --class 2"]),
    (f"{SAMPLE}", "transformer.safetensors",
     [f"{name} --class 2" for name in ("halved", "truncated", "pickled", "classless", "swapped")]),
    (f"{SAMPLE}", "another RQ-VAE", ["stranger --class 2"]),
    (f"{SAMPLE}", "architecture", ["widened --class 2"]),
    (f"{SAMPLE}", "title", ["untitled --class 2"]),
    (f"{SAMPLE}", "finite", ["not_a_number --class 2"]),
    (f"{SAMPLE}", "batch_size", ["unsampled --class 2"]),
    (DRAW, "000.png", ["--out a/000.png --out-dir a"]),
    (f"{SAMPLE} good", "photo.png", ["--reconstruct photo.png --out photo.png"]),
    (f"{REPAINT} --region 0,0,8,8", "photo.png", ["--out ./photo.png"]),
    (DRAW, "file", ["--out file/x.png", "--out x.png --out-dir file"]),
    (DRAW, "empty", ["--out empty"]),
    (DRAW, "--backend", ["--exported empty"]),
    (DRAW, "--compile", ["--compile --backend onnx"]),
    (f"{DRAW} --backend onnx --exported", "export.py", ["nowhere"]),
    (DRAW, "--colour", ["--colour red"]),
    # --- overrides
    ("train_vae.py --data PHOTOS", "smoke", ["smok"]),
    (VAE_DATA, "vae.codebook_size", ["vae.codebok_size=9", "vae.codebook_size=0", "vae.codebook_size=70000"]),
    (VAE_DATA, "'vae.lr'", ["vea.lr=1"]),
    (VAE_DATA, "vae.lr", ["vae.lr", "vae.lr=[1", "lr=1"]),
    (VAE_DATA, "no key ''", ["=1"]),
    (VAE_DATA, "vae.lr", [f"vae.lr={value}" for value in (
        "fast", "", "[1]", "-1", "nan", ".nan", "inf", ".inf", "1e999", "{a:1}")]),
    (VAE_DATA, "vae.steps", [f"vae.steps={value}" for value in ("1.5", "-1", "nan", ".inf", "true", "0")]),
    (VAE_DATA, "vae.decay", ["vae.decay=2", "vae.decay=maybe"]),
    (VAE_DATA, "vae.ch_mult", [f"vae.ch_mult={value}" for value in ("3", "[]", "[1,a]", "[1.5]", "[[1]]")]),
    (VAE_DATA, "vae.betas", ["vae.betas=[nan,1]", "vae.betas=[0.5]", "vae.betas=[0.5,1]"]),
    (VAE_DATA, "vae.loss", ["vae.loss=huber", "vae.loss=[mse]"]),
    *[(VAE_DATA, f"vae.{key}", [f"vae.{key}=0"]) for key in (
        "batch_size", "depth", "log_every", "save_every", "picture_every")],
    (VAE_DATA, "vae.ema_decay", ["vae.ema_decay=1.5"]),
    (VAE_DATA, "data.views", ["data.views=0"]),
    (VAE_DATA, "data.favour_class is", ["data.favour_class=class9", "data.favour=4"]),
    (VAE_DATA, "data, vae", ["transformer.lr=1"]),
    (GIVEN, "transformer.", [f"transformer.{value}" for value in (
        "cond=image", "cond_dropout=2", "head_dim=0", "kind=recurrent")]),
    (GIVEN, "transformer.cond_dropout=0", ["transformer.kind=autoregressive"]),
    (GIVEN, "sample.", [f"sample.{value}" for value in (
        "t_draft=0", "t_revise=0", "t_drafts=9", "batch_size=0", "draft_temperature=0", "top_p=0",
        "rounds=2000")]),
    # --- train_vae.py
    (VAE, "--data", [""]),
    (f"{VAE} --data", "empty", ["empty"]),
    (f"{VAE} --data", "does not exist", ["nowhere", "file"]),
    (f"{VAE} --data broken", "read|broken", ["", "data.in_memory=false"]),
    ("train_vae.py smoke --data", "vae.steps=1 does not exist", ["vae.steps=1"]),
    (VAE_DATA, "micro_batch", ["vae.micro_batch=3"]),
    (VAE_DATA, "vae.ch", ["vae.ch=33"]),
    (f"{VAE_DATA} vae.disc_layers=6", "disc_layers", ["", "vae.disc_weight=0 vae.feature_weight=1"]),
    (VAE_DATA, "like.foo", ["like.foo=1"]),
    (VAE_DATA, "resume", ["--resume"]),
    (VAE_DATA, "nowhere.safetensors", ["--init nowhere.safetensors"]),
    (VAE_DATA, "file", ["--out file"]),
    (f"{VAE} --out flat", "holds images of --data", ["--data flat", "--data ."]),
    (VAE_DATA, "--force", ["--out good"]),
    *[(OFFICIAL, name, [name]) for name in (
        "nowhere.pt", "nowhere.safetensors", "file.pt", "evil.pt", "plain.pt", "short.safetensors")],
    (OFFICIAL, "unshared.pt has a codebook per depth", ["unshared.pt"]),
    (f"{OFFICIAL} RELEASE", "rqvae.safetensors", [
        "vae.ch=64", "vae.depth=5", "vae.codebook_size=128", "vae.ch_mult=[1,2]"]),
    (f"{VAE} --official file.pt", "--data", ["--data empty"]),
    (f"{VAE} --official file.pt", "--init", ["--init file.pt"]),
    # --- train_transformer.py
    (TRANSFORMER, "--data", [""]),
    (TRANSFORMER_DATA, "vae.safetensors", [""]),
    (TRANSFORMER_DATA, "nowhere.safetensors", ["--vae nowhere.safetensors"]),
    (TRANSFORMER_DATA, "file", ["--vae file"]),
    (f"{TRANSFORMER} --vae good/vae.safetensors", "cond=none", ["--data flat"]),
    (GIVEN, "KEY.txt", ["transformer.cond=text --out runs/text"]),
    (GIVEN, "--tokenizer is for", ["--tokenizer vocab.json merges.txt"]),
    (GIVEN, "d_model", ["transformer.d_model=40"]),
    (GIVEN, "resume", ["--resume"]),
    (GIVEN, "another RQ-VAE", ["--out other"]),
    # --- export.py and the tools
    ("export.py --checkpoint", "nowhere", ["nowhere"]),
    ("export.py --checkpoint good --out", "flat holds other things", ["flat"]),
    ("export.py --max-batch", "--max-batch", ["0"]),
    ("tools.bench", "--mode", ["--mode warp", "--mode eager:fp8"]),
    ("tools.bench", "--batch", ["--batch 0", "--batch x", "--train smoke --batch 2"]),
    ("tools.bench", "--t-draft", ["--t-draft 65", "t_draft=3"]),
    ("tools.bench", "t_draft", ["t_darft=3"]),
    ("tools.bench", "plain", ["--mode plain order=sobol"]),
    ("tools.bench", "--repeat", ["--repeat 0"]),
    ("tools.bench --preset", "contextual", ["rq-imagenet-480m"]),
    ("tools.bench --preset", "exclude", ["smoke --train smoke"]),
    ("tools.estimate smoke", "--gpus", ["--gpus 0", "--gpus 1,x"]),
    ("tools.estimate smoke", "--mfu", ["--mfu 2"]),
    ("tools.estimate smoke", "batch_size", ["--gpus 3 --tflops 9"]),
    ("tools.plots", "damaged or no training log", [f"log{i}" for i in range(len(LOGS))]),
    ("tools.plots", "neither vae.csv nor transformer.csv", ["nowhere"]),
    ("tools.train_classifier --out", ".pt2", ["net --data PHOTOS"]),
    ("tools.train_classifier --out new.pt2 --data", "100 pictures", ["PHOTOS"]),
    # --- tools.evaluate: all is said before anything is drawn
    (MEASURE, "pixels|--crop", ["mixed"]),
    (MEASURE, "b.png", ["damaged"]),
    (MEASURE, "40x40|32x32", ["large"]),
    (MEASURE, "(7,)|(6,)", ["seven.npz"]),
    (MEASURE, "/proc/r.json", ["flat --json /proc/r.json"]),
    (MEASURE, "--number", ["flat --number 0"]),
    (MEASURE, "number", ["flat --reconstructions --number 8"]),
    (MEASURE, "statistics", ["nan.npz --reconstructions"]),
    (EVALUATE, "exclude", ["flat --samples flat --reconstructions"]),
    (MEASURE, "--samples|overrides, checkpoint", ["flat --samples flat t_draft=8"]),
    (EVALUATE, "net.pt2|40, 40", ["flat --samples large"]),
    (EVALUATE, "b.npz|No such file", ["flat --samples b.npz"]),
    (EVALUATE, "large cannot be written|.json", ["flat --samples flat --json large"]),
    (EVALUATE, "float.npz would be replaced", ["float.npz --samples flat --save-reference float.npz"]),
    (EVALUATE, "float.npz|expected uint8", ["float.npz --samples flat"]),
    (EVALUATE, "file.npz|no .npz file", ["file.npz --samples flat"]),
    (EVALUATE, "other.npz|arr_0", ["other.npz --samples flat"]),
    (EVALUATE, "nan.npz|finite numbers", ["nan.npz --samples flat"]),
    (EVALUATE, "foreign.npz|VGG", ["foreign.npz --samples flat"]),
    (EVALUATE, "file.pt2|no program", ["flat --samples flat --features file.pt2"]),
    (EVALUATE, "inceptoin|expected", ["flat --samples flat --features inceptoin"]),
    # --- tools.study
    (STUDY, "--seeds", ["PHOTOS --seeds 0"]),
    (STUDY, "--images", ["PHOTOS --images 4"]),
    (STUDY, "from 1 to 10", ["PHOTOS --tables 1,11"]),
    (STUDY, "at least 4", ["PHOTOS --features net.pt2"]),
    (STUDY, "val/<class>", ["empty --infill"]),
    (STUDY, "--infill", ["PHOTOS --against good"]),
    (STUDY, "--checkpoint", ["PHOTOS --published good"]),
]


if not torch.cuda.is_available():
    MISTAKES += [(begin, "cuda", ["--device cuda"]) for begin in (DRAW, VAE_DATA)]
CASES = [(f"{begin} {end}", words) for begin, words, ends in MISTAKES for end in ends]


@pytest.mark.parametrize("command, words", CASES)
def test_a_mistake_is_refused_in_one_sentence(refuse, command, words):
    refuse(command, words)


@pytest.mark.parametrize("command, module, words", [
    (f"{VAE_DATA} vae.perceptual_weight=1", "lpips", "lpips"),
    ("tools.plots plotted", "matplotlib.backends.backend_agg", "requirements-tools.txt"),
    ("export.py --out new/x --checkpoint good", "onnxscript", "requirements-export.txt"),
    (f"{MEASURE} flat --features efficientnet", "efficientnet_lite_pytorch", "-tools.txt|classifier"),
    (f"{MEASURE} flat --features inception", "torch_fidelity", "pip install torch-fidelity|efficientnet")])
def test_a_package_that_is_not_there_is_refused(refuse, monkeypatch, command, module, words):
    monkeypatch.setitem(sys.modules, module, None)
    refuse(command, words)


def test_a_torchvision_of_another_build_is_refused(refuse, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "torch_fidelity", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torch_fidelity.py").write_text("raise RuntimeError('torchvision::nms does not exist')")
    refuse(f"{MEASURE} flat --features inception", "where torch came from")


def test_the_attacks_among_these_files_are_real(tmp_path):
    pickle.loads(pickle.dumps(Attack(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("command, word", [
    ("train_vae.py smoke", "--data"), ("sample.py --num x", "--num"),
    ("sample.py --reconstruct big.png", "make it smaller")])                   # without Pillow's warning
def test_the_shell_sees_the_same(tmp_path, command, word):
    Image.new("1", (10_500, 9_000)).save(tmp_path / "big.png")
    done = execute(*command.split(), cwd=tmp_path)
    refused(done, word)
    assert "Warning" not in done.output and [path.name for path in tmp_path.iterdir()] == ["big.png"]


# === What is no mistake of the user's =======================================================================
@pytest.mark.parametrize("length", [238, 255])
def test_a_file_may_have_any_name_that_the_system_allows(tmp_path, length):
    path = tmp_path / ("a" * (length - 4) + ".png")
    with drr.replacing(path) as temporary:
        torch.save("whole", temporary)                       # not any name will do for it
    assert torch.load(path) == "whole" and list(tmp_path.iterdir()) == [path]


def test_an_output_is_tried_under_its_very_name_without_a_trace(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    sample.check_writable(path)
    assert not path.exists()
    path.write_text("an earlier picture")
    sample.check_writable(path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["an earlier picture"]
    touch = sample.Path.touch
    monkeypatch.setattr(sample.Path, "touch", lambda path: touch(path) or path.unlink())
    sample.check_writable(tmp_path / "y.png")                # another rank has tried it and cleaned up

    def refuse(path):
        if path.name == "y.png":
            raise OSError(22, "Invalid argument")            # as some disks say of some names

    monkeypatch.setattr(sample.Path, "touch", refuse)
    with pytest.raises(OSError, match="Invalid"):
        sample.check_writable(tmp_path / "y.png")


def fill_the_memory():
    torch.empty(2 ** 60, dtype=torch.uint8)                  # torch says so with a RuntimeError


def interrupt():
    raise KeyboardInterrupt


def test_full_memory_and_an_interruption_leave_no_traceback_and_a_bug_does(capsys):
    for main, status, sentence in ((fill_the_memory, 2, "error: The memory is full"), (interrupt, 130, "")):
        with pytest.raises(SystemExit) as stopped:
            common.run(main)
        assert stopped.value.code == status and capsys.readouterr().err.startswith(sentence)
    with pytest.raises(ZeroDivisionError):
        common.run(lambda: 1 / 0)


def test_what_all_processes_of_a_run_meet_is_said_once(capsys, monkeypatch, tmp_path):
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
        with pytest.raises(SystemExit, match="2"):
            common.run(fill_the_memory)
    assert capsys.readouterr().err.count("error:") == 1
