"""Training that is interrupted, resumed, stopped by mistakes: real runs."""
import contextlib
import csv
import fcntl
import math
import os
import random
import re
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import drr
import processes
import train_transformer
import train_vae
from support import models, runs
from support.common import load_config
from drr import UserError
from processes import (PHOTOS, REPO, STAGES, another_vae, assert_same, finished, receives, refused, rows,
                       train, weights)
from test_mistakes import Attack


# === Killed, and gone on ====================================================================================
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_five_times_at_random_is_the_uninterrupted_run(whole, arguments, tmp_path, stage):
    """SIGKILL at random moments, five of them for each stage; also between two files, or within one."""
    seed = time.time_ns()
    moment = random.Random(seed)
    print("seed", seed)                                        # shown if it fails
    seconds = whole.seconds[stage]                             # of a run, but the machine's load varies
    kills = survived = resumed = 0
    while kills < 5 or not resumed:                            # not all of them before the first state
        out = tmp_path / str(survived)
        done = None
        while done is None or done.returncode == -signal.SIGKILL:
            resume = ["--resume"] if list(out.glob(f"{stage}_state_*.pt")) else []
            resumed += len(resume)
            pid = processes.start(f"train_{stage}.py", *arguments(stage, out, *resume), cwd=REPO)
            if kills < 5 or not resumed:
                time.sleep(moment.uniform(0.2, 1) * seconds)
                with contextlib.suppress(ProcessLookupError):    # it had finished
                    os.kill(pid, signal.SIGKILL)
            done = processes.wait(pid)
            kills += done.returncode == -signal.SIGKILL
            seconds *= 0.8 if done.returncode == 0 else 1.1
        finished(done)
        assert_same(whole.folder / stage, out, stage)
        assert not list(out.glob(".writing*"))                 # nothing half-written stays behind
        survived += 1


def test_sigterm_saves_first_and_says_so(whole, arguments, tmp_path):
    seldom = arguments("vae", tmp_path, "vae.save_every=100")
    done = train("vae", *seldom, before=receives("SIGTERM", step=3))
    assert done.returncode == 128 + signal.SIGTERM and "--resume" in done.output, done.output
    assert len(rows(tmp_path, "vae")) == 3
    assert [f.name for f in tmp_path.glob("vae_state_*")] == ["vae_state_000000003.pt"]
    finished(train("vae", *seldom, "--resume"))
    assert_same(whole.vae, tmp_path, "vae")


# === Checkpoints: which are kept, which are believed ========================================================
def test_a_run_leaves_its_last_two_states_and_the_second_stage_its_rqvae_beside_the_result(whole):
    for stage in STAGES:
        found = sorted(f.name for f in (whole.folder / stage).glob("*_state_*"))
        assert found == [f"{stage}_state_00000000{step}.pt" for step in (4, 6)]
    *_, info = drr.load_checkpoint(whole.transformer)          # as sample.py does
    assert info.classes
    one, two = weights(whole.transformer, "vae"), weights(whole.vae, "vae")
    assert all(torch.equal(one[k], two[k]) for k in two)


def test_damaged_states_fall_back_loudly_to_the_one_before_them_if_there_is_one(whole, resume):
    state = (resume.out / "vae_state_000000006.pt").read_bytes()
    flipped = bytearray(state)
    flipped[len(state) // 2] ^= 1                              # in a weight: torch itself would not notice
    for step, content in ((6, state[:len(state) // 2]), (7, b""), (8, flipped)):
        (resume.out / f"vae_state_00000000{step}.pt").write_bytes(content)
    done = finished(resume("vae"))
    for step in (6, 7, 8):
        assert f"vae_state_00000000{step}.pt is damaged" in done.output and "WARNING" in done.output
        assert (resume.out / f"vae_state_00000000{step}.pt.damaged").exists()      # nothing is thrown away
    assert "resuming after step 4" in done.output
    assert_same(resume.out, whole.vae, "vae")
    for path in resume.out.glob("vae_state_*.pt"):
        path.write_bytes(state[:1000])
    refused(resume("vae"), "No training state", "without --resume")


def test_a_fresh_start_does_not_replace_an_earlier_run_but_by_force(resume, arguments):
    fresh = arguments("vae", resume.out, "vae.steps=2")
    before = {f.name: f.read_bytes() for f in resume.out.iterdir() if f.is_file()}
    refused(train("vae", *fresh), "up to step 6", "--resume", "--force")
    assert {f.name: f.read_bytes() for f in resume.out.iterdir() if f.is_file()} == before
    finished(train("vae", *fresh, "--force"))
    assert [f.name for f in resume.out.glob("vae_state_*")] == ["vae_state_000000002.pt"]


def test_other_settings_are_named_and_refused_but_taken_by_force(resume):
    others = {"vae": ["data.balance=0.3", "data.seed=1", "vae.disc_weight=0.1", "vae.lr=0.001"],
              "transformer": ["transformer.batch_size=4", "transformer.lr=0.01"]}
    for stage, changes in others.items():
        named = re.findall(r"(\S+) \(was [^ ]+, is (\S+)\)", refused(resume(stage, *changes), "--force"))
        assert ["=".join(pair) for pair in named] == changes
    done = finished(resume("vae", "vae.lr=0.001", "vae.steps=7", "--force"))
    assert "vae.lr (was 0.0005, is 0.001)" in done.output and rows(resume.out, "vae")[-1]["step"] == "7"


def test_a_second_training_in_the_same_folder_is_refused_before_it_encodes_anything(arguments, tmp_path):
    half_written = tmp_path / ".writing-1-vae_state_000000008.pt"
    half_written.write_bytes(b"of the training that is at work")
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for stage in STAGES:
            refused(train(stage, *arguments(stage, tmp_path)), "Another training")
    (tmp_path / "transformer.safetensors").write_text("finished")
    refused(train("transformer", *arguments("transformer", tmp_path)), "--force")
    assert half_written.exists() and not (tmp_path / "codes").exists()


@pytest.mark.parametrize("content, kept", [
    ("", None), ("a,b\n1,2\n", None),                          # nothing, or another file's
    ("step,loss\nx,1\n6,2\n7,3\n8", "step,loss\n6,2\n")])    # from a full disk, or as the power was lost
def test_a_damaged_log_does_not_hinder(tmp_path, content, kept):
    log = SimpleNamespace(path=tmp_path / "vae.csv")
    log.path.write_text(content)
    runs.Log.begin_file(log, 6)
    assert log.path.exists() == bool(log.columns) == bool(kept)
    if kept:
        assert log.path.read_text() == kept
    assert [path.read_text() for path in tmp_path.glob("*.damaged")] == [content] * content.startswith("a,b")


def test_a_longer_run_needs_no_force_and_leaves_a_copy_of_a_state_alone(resume, whole):
    shutil.copy(resume.out / "vae_state_000000004.pt", resume.out / "vae_state_best.pt")
    done = finished(resume("vae", "vae.steps=8", "vae.save_every=4"))
    assert "vae.steps (was 6, is 8)" in done.output and (resume.out / "vae_state_best.pt").exists()
    log = rows(resume.out, "vae")
    assert log[:6] == rows(whole.vae, "vae") and [row["step"] for row in log[6:]] == ["7", "8"]


def test_changed_data_and_another_vae_are_noticed(resume, tmp_path):
    shutil.copytree(PHOTOS, tmp_path / "photos")
    finished(resume("vae", "--data", tmp_path / "photos"))         # a copy of the data is the same data
    next((tmp_path / "photos" / "train").rglob("*.JPEG")).unlink()
    refused(resume("vae", "--data", tmp_path / "photos"), "the pictures in --data", "--force")
    other = another_vae(resume.out / "vae.safetensors", tmp_path / "other.safetensors")
    refused(resume("transformer", "--vae", other), "another RQ-VAE")
    (resume.out / "vae.safetensors").unlink()
    refused(resume("transformer", "--vae", other), "the RQ-VAE", "--force")


@pytest.mark.parametrize("state, override", [
    ("transformer", ""), ("pickled", ""), ("whole", "vae.codebook_size=32"), ("without_disc", "")])
def test_a_state_that_cannot_be_restored_whole_is_refused(resume, state, override, tmp_path):
    """Nothing may go on from random weights in silence, not even by force."""
    file = resume.out / "vae_state_000000006.pt"
    (resume.out / "vae_state_000000004.pt").unlink()
    whole = torch.load(file, weights_only=True)
    if state == "transformer":
        shutil.copy(resume.out / "transformer_state_000000006.pt", file)
    elif state == "pickled":
        torch.save({"step": 6, "vae": Attack(tmp_path / "executed")}, file)
    elif state == "without_disc":
        torch.save({k: v for k, v in whole.items() if k != "disc"}, file)
    before = (resume.out / "vae.safetensors").read_bytes()
    expected = "training state" if state == "pickled" else "vae_state"
    refused(resume("vae", "vae.steps=7", "--force", *override.split()), expected)
    assert (resume.out / "vae.safetensors").read_bytes() == before and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_leaves_the_checkpoint_before_intact(whole, arguments, tmp_path, stage):
    """The limit on the size of a file stands for the disk: the state of step 8 does not fit."""
    out = shutil.copytree(whole.folder / stage, tmp_path / "run")
    states = {f.name: f.read_bytes() for f in out.glob("*_state_*")}
    limit = min(map(len, states.values())) // 2
    assert limit > (out / f"{stage}.safetensors").stat().st_size
    full = (f"import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)")
    done = train(stage, *arguments(stage, out, "--resume", f"{stage}.steps=8"), before=full)
    refused(done, f"{stage}_state_000000008.pt", "space")
    assert {f.name: f.read_bytes() for f in out.glob("*_state_*")} == states
    assert not [p.name for p in out.iterdir() if p.name.startswith(".writing")]


# === Infinity ===============================================================================================
@pytest.mark.parametrize("stage, change", [("vae", "vae.lr=1e15"), ("transformer", "transformer.lr=1e18")])
def test_a_loss_that_is_not_finite_stops_with_step_and_term(resume, stage, change):
    before = {f.name: f.read_bytes() for f in resume.out.glob("*_state_*")}
    done = resume(stage, change, f"{stage}.steps=20", f"{stage}.save_every=20", "--force")
    error = refused(done, "no finite number")
    step, term = re.search(r"Step (\d+) gave no finite number for .*\b(loss|grad_norm)\b", error).groups()
    assert int(step) > 6
    assert {f.name: f.read_bytes() for f in resume.out.glob("*_state_*")} == before


def test_the_term_that_is_not_finite_is_named():
    stop = SimpleNamespace(received=False)
    terms = {"loss": torch.tensor(float("nan")), "reconstruction": torch.tensor(0.1),
             "perceptual": torch.tensor([0.1, float("inf")])}
    with pytest.raises(UserError, match="Step 8 gave .* for loss, perceptual; x.pt is good: .* lower vae.lr"):
        runs.must_stop(stop, terms, 7, "x.pt", "a lower vae.lr")
    with pytest.raises(UserError, match="Step 1 gave .* for loss.*; start again with a lower vae.lr"):
        runs.must_stop(stop, terms, 0, None, "a lower vae.lr")
    assert not runs.must_stop(stop, {"loss": torch.tensor(1.0)}, 0, None, "")
    stop.received = True
    assert runs.must_stop(stop, {"loss": torch.tensor(1.0)}, 0, None, "")


# === Options ================================================================================================
@pytest.mark.parametrize("option", ["soft_labels", "stochastic_codes"])
def test_options_of_the_rq_transformer_train(whole, arguments, tmp_path, option):
    changed = arguments("transformer", tmp_path, f"transformer.{option}=true", "transformer.steps=2")
    finished(train("transformer", *changed))
    assert not (tmp_path / "codes").exists()
    plain, other = (rows(folder, "transformer") for folder in (whole.transformer, tmp_path))
    assert plain[0]["loss"] != other[0]["loss"]
    assert float(other[1]["loss"]) == pytest.approx(4.2, abs=0.3)              # ln 64


def test_recomputation_changes_nothing(whole, arguments, tmp_path):
    finished(train("transformer", *arguments("transformer", tmp_path, "transformer.recompute=true")))
    assert_same(whole.transformer, tmp_path, "transformer")


def test_a_plot_that_fails_does_not_stop_a_training(resume):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (requirements-tools.txt)")
    (resume.out / "vae.csv").write_text("")
    done = finished(resume("transformer", "transformer.steps=7", without=()))
    assert "WARNING: plots.png was not drawn" in done.output
    (resume.out / "vae.csv").unlink()
    finished(resume("transformer", "transformer.steps=8", without=()))
    assert (resume.out / "plots.png").exists()


def test_init_starts_from_given_weights(arguments, whole, tmp_path):
    """A learning rate of next to nothing shows them again."""
    for stage in STAGES:
        given = whole.folder / stage / f"{stage}.safetensors"
        begin = arguments(stage, tmp_path / stage, "--init", given, f"{stage}.lr=1e-12", f"{stage}.steps=1")
        finished(train(stage, *begin))
        one, two = load_file(given), weights(tmp_path / stage, stage)
        learned = [k for k in one if "quantizer" not in k]
        assert all(torch.allclose(one[k].float(), two[k].float(), atol=1e-3) for k in learned)
    refused(train("vae", *arguments("vae", tmp_path / "x", "--init", tmp_path / "nowhere")), "nowhere")
    refused(train("vae", *arguments("vae", whole.vae, "--init", given, "--resume")), "one of")


@pytest.mark.parametrize("preset", ["smoke", "smoke-maskgit"])
def test_a_deeper_transformer_begins_as_the_shallower_one_and_all_of_it_learns(preset, tmp_path):
    common = "transformer.half=false", "transformer.weight_decay=0"
    configs = [load_config(preset, [f"transformer.n_spatial={n}", *common]) for n in (1, 2)]
    torch.manual_seed(0)
    vae = drr.RQVAE(configs[0].vae)
    N, D = vae.side ** 2, vae.quantizer.depth
    shallow = models.build(configs[0].transformer, 2, N, D, vae.quantizer.codebook)
    for p in shallow.parameters():                             # no block of it adds nothing
        torch.nn.init.normal_(p, std=0.1)
    paths = tmp_path / "shallow.safetensors", tmp_path / "deep.safetensors"

    def build(config, given):
        return train_transformer.build(config.transformer, 2, vae, given, torch.device("cpu"))
    drr.save_transformer(paths[0], shallow, configs[0], ["a", "b"], ["a", "b"], vae)
    deep, _, opt, *_ = build(configs[1], paths[0])
    codes, cond = torch.randint(64, (2, N, D)), torch.tensor([[0], [1]])
    mask = models.kind(configs[0].transformer).random_mask(torch.rand(2, 1 + N))
    assert torch.equal(deep.context(codes, mask, cond), shallow.context(codes, mask, cond))
    start = {name: p.detach().clone() for name, p in deep.spatial[1].named_parameters()}
    for _ in range(3):
        deep(codes, mask, cond)[0].mean().backward()
        opt.step()
        opt.zero_grad()
    assert not [name for name, p in deep.spatial[1].named_parameters() if torch.equal(p, start[name])]
    drr.save_transformer(paths[1], deep, configs[1], ["a", "b"], ["a", "b"], vae)
    with pytest.raises(drr.UserError, match="deep.safetensors.*spatial.1"):
        build(configs[0], paths[1])


def test_the_run_says_after_three_steps_what_the_rest_will_take(whole):
    printed = whole.printed["vae"].splitlines()
    line = next(line for line in printed if line.startswith("vae: "))
    vae, _ = drr.load_vae(whole.vae / "vae.safetensors")
    parameters = sum(p.numel() for p in vae.parameters()) / 1e6
    assert re.search(f"{parameters:.1f}M parameters, 3 more steps of 8 images on 1 x cpu fp32 in 2 "
                     r"micro-batches of 4; [\d.e-]+ s per step, [\d:]+ at this speed", line), line
    with open(whole.vae / "vae.csv", newline="") as f:
        log = list(csv.DictReader(f))
    assert len(log) == 6 and all(float(row["images_per_s"]) > 0 < float(row["mfu"]) for row in log)
    assert 0 < float(log[0]["usage_1"]) <= 1 <= float(log[0]["perplexity_4"]) <= 64
    assert f"step 4 loss {float(log[3]['loss']):.4g} " in whole.printed["vae"]


def test_a_step_has_three_times_the_operations_of_a_forward_pass():
    """Of the smallest models; the transformer's counted by hand."""
    c = load_config("smoke")
    vae = drr.RQVAE(c.vae)
    image = torch.zeros(1, 3, 32, 32)
    counts = {}
    for name, module in {"vae": vae, "encoder": vae.encoder, "first": vae.encoder.conv_in}.items():
        with FlopCounterMode(display=False) as counter:
            vae.decode_latent(vae.encode_latent(image)) if module is vae else module(image)
        counts[name] = counter.get_total_flops()
    whole = train_vae.step_operations(vae, image)
    assert whole == 3 * counts["vae"] - counts["first"]        # nobody asks for the gradient of an image
    vae.encoder.requires_grad_(False)
    assert whole - train_vae.step_operations(vae, image) > 1.9 * counts["encoder"]
    vae.requires_grad_(False)
    vae.decoder.conv_out.requires_grad_(True)                  # the last layer alone learns
    assert counts["vae"] < train_vae.step_operations(vae, image) < 1.1 * counts["vae"]
    model = drr.ContextualRQTransformer(c.transformer, 4, 64, 4, vae.quantizer.codebook)
    block, classifier = 12 * 64 ** 2 + 13 * 64, 64 * 64 + 64
    expected = 6 * 64 * (2 * block + 2 / math.pi * 4 * (block + classifier))
    assert train_transformer.step_operations(model, 2 / math.pi) == pytest.approx(expected)
