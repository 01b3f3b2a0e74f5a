"""tools/bench.py and tools/machine.py: operations as torch counts them, a row for every mode and stage."""
import re

import numpy as np
import pytest
import torch
from conftest import sample_section, tiny_transformer
from processes import execute
from torch.utils.flop_counter import FlopCounterMode

import drr
from tools import machine, strategies

N = 16
CPU = torch.device("cpu")


class Model:
    """The decoding loop's side of a TorchModel, without an RQ-VAE."""

    def __init__(self, transformer):
        self.transformer, self.null = transformer, transformer.null
        self.positions, self.depth = transformer.positions, transformer.depth
        self.context, self.depth_step = transformer.context, transformer.depth_step


@pytest.mark.parametrize("depth, settings", [
    (4, {}), (1, {"t_draft": 5, "t_revise": 3}), (4, {"draft_guidance": 2.0, "draft_growing": True}),
    (4, {"draft_pool": 0.5, "revise_guidance": 1.0}),
    (1, {"draft_ramp": True, "draft_guidance": 2.0, "rounds": 0}),
    (4, {"revise_share": 0.3, "t_revise": 4})])
def test_counts_the_operations_that_torch_counts(depth, settings):
    transformer, c = tiny_transformer(N, depth, n_spatial=3), sample_section(**settings)
    noise = drr.draw_noise(0, range(2), 1 + c.rounds, N, depth)
    with FlopCounterMode(display=False, custom_mapping=machine.CPU_ATTENTION) as counter:
        list(strategies.decode(Model(transformer), torch.tensor([[0], [1]]), noise, c))
    assert counter.get_total_flops() == 2 * machine.decode_flops(transformer, c)


def test_peak_memory_is_that_since_the_reset():
    before = machine.peak_memory(CPU)
    held = np.ones(200 * 2 ** 20, np.uint8)
    peak = machine.peak_memory(CPU)
    assert peak >= before and peak > held.nbytes
    del held
    machine.reset_peak(CPU)
    assert machine.peak_memory(CPU) < peak - 150 * 2 ** 20


def table(text):
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def number(text):
    return float(text.replace(",", "").rstrip("%"))


def test_bench_times_every_mode_of_torch(tmp_path):
    """The mode onnx is in tests/test_export.py, where there are graphs."""
    done = execute("tools.bench", *"--preset smoke --t-draft 8 --repeat 1 --precision fp32 rounds=1".split(),
                   "--mode", "eager,eager:bf16,plain,raster", "--batch", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = table(done.stdout)
    modes = [("eager", "fp32", "8"), ("eager", "bf16", "8"), ("plain", "fp32", "8"), ("raster", "fp32", "64")]
    assert [(row["mode"], row["precision"], row["T_draft"]) for row in rows] == modes
    for row in rows:
        seconds, flops = number(row["s per image"]), number(row["GFLOP per image"])
        assert number(row["GFLOP/s"]) == pytest.approx(flops / seconds, rel=0.1, abs=0.5)
        assert number(row["peak MiB"]) > 100 and number(row["first decode, s"]) > 0
        parts = row["spatial, depth, sampling, decoder"]
        if row["mode"] == "plain":
            assert parts == "-"
        else:
            assert abs(sum(map(int, re.findall(r"\d+", parts))) - 100) <= 2


def test_bench_times_training_steps(tmp_path):
    done = execute("tools.bench", "--train", "smoke", "--repeat", 1, "--precision", "fp32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = table(done.stdout)
    assert [row["stage"] for row in rows] == ["vae", "transformer"]
    assert all(number(row["images/s"]) > 0 and number(row["share of the products"]) > 0 for row in rows)
    assert all(number(row["peak MiB"]) > 100 for row in rows)


@pytest.mark.parametrize("arguments, word", [
    (["--mode", "warp"], "warp"), (["--mode", "eager:fp8"], "eager:fp8"), (["--t-draft", 65], "64"),
    (["--batch", 0], "--batch"), (["--preset", "imagnet"], "imagnet"),
    (["--preset", "smoke", "--train", "smoke"], "exclude"), (["t_darft=3"], "t_draft"),
    (["t_draft=3"], "--t-draft"), (["--train", "smoke", "--batch", 2], "--batch"),
    (["--repeat", 0], "--repeat"), (["--batch", "x"], "whole"),
    (["--mode", "plain", "order=sobol"], "plain")])
def test_mistakes_are_one_sentence(arguments, word, tmp_path):
    done = execute("tools.bench", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and word in done.stderr.splitlines()[-1]
