"""Training that is spread over processes: it follows the run of one, and ends as one."""
import re
from types import SimpleNamespace

import pytest
import torch

from support import runs
from drr import UserError
from processes import finished, receives, refused, rows, torchrun, train, weights

EACH_RANK = """
import torch
from support import runs
save = runs.States.save
def save_and_tell(self, step):
    torch.save([self.parts["vae"].state_dict(), self.parts["disc"].state_dict()], f"rank{runs.ranks()[0]}.pt")
    save(self, step)
runs.States.save = save_and_tell
"""


def assert_follows(one, two, rel):
    """The losses of two runs agree; a code nearly as near as another may fall the other way: not exactly."""
    assert len(one) == len(two) > 3
    for a, b in zip(one, two):
        for key in a:
            if re.match("loss|reconstr|commit|disc|grad_norm|lr|val_psnr|val_loss|accuracy", key) and a[key]:
                assert float(b[key]) == pytest.approx(float(a[key]), rel=rel, abs=1e-4), (a["step"], key)


def test_stage_one_on_two_ranks_follows_the_run_on_one(whole, arguments, tmp_path):
    """With the adversary, whose BatchNorm sees the same micro-batches: two of them are accumulated by one
    rank, and averaged over two. The ranks' weights are identical."""
    # Four steps, two of them with the adversary: rounding grows by Adam's first steps. After six the
    # difference was too large on an AMD EPYC.
    four = arguments("vae", tmp_path / "two", "vae.steps=4")
    finished(train("vae", *four, ranks=2, before=EACH_RANK, cwd=tmp_path))
    assert_follows(rows(whole.vae, "vae")[:4], rows(tmp_path / "two", "vae"), rel=2e-3)
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    for one, two in zip(*ranks):
        assert all(torch.equal(one[k], two[k]) for k in one)
    codebook = weights(tmp_path / "two", "vae")["quantizer.codebook"]
    assert torch.equal(ranks[1][0]["quantizer.codebook"], codebook)


@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp"])
def test_stage_two_on_two_ranks_follows_the_run_on_one_and_resumes(whole, arguments, tmp_path, shard):
    """Between the two halves comes SIGTERM. It is sent to one rank, and stops both at the same step."""
    two = arguments("transformer", tmp_path, "transformer.micro_batch=2", f"transformer.shard={shard}",
                    "transformer.save_every=50")
    done = train("transformer", *two, ranks=2, before=receives("SIGTERM", step=4, rank=1))
    assert done.returncode != 0
    assert "stopped by SIGTERM after step 4, which is saved" in done.output, done.output
    assert [f.name for f in tmp_path.glob("*_state_*")] == ["transformer_state_000000004.pt"]
    done = finished(train("transformer", *two, "--resume", ranks=2))
    assert "resuming after step 4" in done.output
    assert_follows(rows(whole.transformer, "transformer"), rows(tmp_path, "transformer"), rel=1e-3)
    one, two = (weights(folder, "transformer") for folder in (whole.transformer, tmp_path))
    assert max((one[k].float() - two[k].float()).abs().max() for k in one) < 5e-3


def test_a_rank_that_dies_ends_all_of_them(arguments, tmp_path):
    run = arguments("vae", tmp_path)
    done = torchrun(2, "train_vae.py", *run, cwd=tmp_path, before=receives("SIGKILL", step=4, rank=1))
    assert done.returncode == 1                                # not killed, as what takes too long is
    assert (tmp_path / "vae_state_000000002.pt").exists()
    done = finished(train("vae", *run, "--resume"))            # on one, which is the same training
    assert "resuming after step 2" in done.output


def test_a_batch_that_the_ranks_cannot_share_is_refused(arguments, tmp_path, monkeypatch):
    done = torchrun(2, "train_vae.py", *arguments("vae", "run", "vae.batch_size=7"), cwd=tmp_path)
    assert done.returncode != 0 and "error: vae.batch_size 7 is no multiple of 2 processes" in done.output
    assert done.output.count("error: vae") == 1 and not (tmp_path / "run").exists()
    monkeypatch.setattr(runs, "ranks", lambda: (1, 4))
    own, count = runs.micro_batches("vae", SimpleNamespace(batch_size=24, micro_batch=2))
    assert own.tolist() == list(range(6, 12)) and count == 3
    with pytest.raises(UserError, match="micro_batch 4 does not divide 6"):
        runs.micro_batches("vae", SimpleNamespace(batch_size=24, micro_batch=4))


def test_what_needs_torchrun_says_so(arguments, tmp_path, monkeypatch):
    refused(train("transformer", *arguments("transformer", tmp_path, "transformer.shard=true")), "torchrun")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for set_too in ("RANK", "LOCAL_RANK"):
        with pytest.raises(UserError, match=f"{set_too},.*MASTER_PORT not; start with torchrun"):
            runs.join_ranks(SimpleNamespace(device="cpu", precision="fp32"))
        monkeypatch.setenv(set_too, "0")
