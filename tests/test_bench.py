"""tools/bench.py and tools/machine.py: operations as torch counts them, a row for every mode and stage."""
import mmap
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sample_section, tiny_transformer, torch_model
from processes import execute
from torch.utils.flop_counter import FlopCounterMode

import drr
from tools import machine, strategies

N = 16
CPU = torch.device("cpu")


@pytest.mark.parametrize("depth, settings", [
    (4, {}), (1, {"t_draft": 5, "t_revise": 3}), (4, {"draft_guidance": 2.0, "draft_growing": True}),
    (4, {"draft_pool": 0.5, "revise_guidance": 1.0}),
    (1, {"draft_ramp": True, "draft_guidance": 2.0, "rounds": 0}),
    (4, {"revise_share": 0.3, "t_revise": 4})])
def test_counts_the_operations_that_torch_counts(depth, settings):
    transformer, c = tiny_transformer(N, depth, n_spatial=3), sample_section(**settings)
    noise = drr.draw_noise(0, range(2), 1 + c.rounds, N, depth)
    with FlopCounterMode(display=False, custom_mapping=machine.CPU_ATTENTION) as counter:
        list(strategies.decode(torch_model(transformer), torch.tensor([[0], [1]]), noise, c))
    assert counter.get_total_flops() == 2 * machine.decode_flops(transformer, c)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux has more than one peak")
def test_peak_memory_is_that_since_the_reset():
    """The bounds are half of what is held, as the process may take or give back memory of its own."""
    machine.reset_peak(CPU)
    before = machine.peak_memory(CPU)
    size = 200 * 2 ** 20
    held = mmap.mmap(-1, size)                                 # the allocator may have free memory in store
    np.frombuffer(held, np.uint8)[:] = 1
    peak = machine.peak_memory(CPU)
    assert peak > before + size / 2
    held.close()
    machine.reset_peak(CPU)
    assert machine.peak_memory(CPU) < peak - size / 2


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
        least = (flops - 0.006) / (seconds + 0.00006) - 0.6          # all three numbers are rounded
        most = (flops + 0.006) / max(seconds - 0.00006, 1e-9) + 0.6
        assert least <= number(row["GFLOP/s"]) <= most and flops > 0.01
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
    assert all(number(row["images/s"]) > 0 and number(row["peak MiB"]) > 100 for row in rows)
    assert all(0 <= number(row["share of the products"]) < 200 for row in rows)
