"""Measures how fast decoding and training are, beside the matrix products of the same machine meanwhile.

    python -m tools.bench                                     # the bundled checkpoint, eager and compiled
    python -m tools.bench --mode eager,plain,raster           # a plain decode, and one position at a time
    python -m tools.bench --mode eager:fp32,eager:bf16,onnx   # exports first
    python -m tools.bench --preset imagenet-821m --batch 1,100 --t-draft 8,32,64 --mode eager,graphs,trt
    python -m tools.bench --train tiny-imagenet-32            # both trainers, on random pictures

Modes: eager; compiled (support/fast.py); on a GPU graphs and compiled+graphs (its CUDA graphs); onnx and trt
(support/backends.py); plain (tools/strategies.py: every position through everything, no cache); raster (one
position at a time in raster order, no revision). MODE:PRECISION gives a mode a precision of its own. Each
mode runs in a process of its own, so that its memory is its own, and all decode in turns, since a machine's
speed varies. Sampling values are the checkpoint's or the preset's; key=value changes them.
"""
import contextlib
import csv
import itertools
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import drr
import export
import train_transformer
import train_vae
from drr import UserError
from support import backends, fast, models
from support.common import (BUNDLED, PRECISIONS, add_device_arguments, bf16_pays, load_config, matrix_rate,
                            pick_device, precision_name, run, synchronize)
from tools import strategies
from tools.machine import decode_flops, decoder_flops, peak_memory, random_checkpoint, reset_peak

TORCH_MODES = ("eager", "compiled", "graphs", "compiled+graphs", "plain", "raster")
MODES = (*TORCH_MODES, "onnx", "trt")


# === Processes: each has something to do whenever it is asked ===============================================
def start(task, *arguments):
    """Starts task(connection, *arguments) in a process of its own; returns our end of the connection."""
    context = torch.multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=serve, args=(task, there, *arguments), daemon=True).start()
    there.close()
    return here


def serve(task, connection, *arguments):
    with contextlib.suppress(EOFError):                       # the parent is done
        run(lambda: task(connection, *arguments))


def ask(connection, name, *question):
    """Sends the question to a process and waits for its answer."""
    try:
        connection.send(question)
        return connection.recv()
    except (EOFError, OSError):
        raise UserError(f"Measuring {name} failed; its error stands above.") from None


# === Decoding, in the process of a mode =====================================================================
class Stopwatch:
    """A model that adds up the seconds in each of its functions. It waits for the device at each call."""

    def __init__(self, model, device):
        self.model, self.device = model, device
        self.seconds = dict.fromkeys(("context", "depth_step", "decode"), 0.0)

    def __getattr__(self, name):
        function = getattr(self.model, name)
        if name not in self.seconds:
            return function

        def measured(*arguments):
            synchronize(self.device)
            started = time.perf_counter()
            result = function(*arguments)
            synchronize(self.device)
            self.seconds[name] += time.perf_counter() - started
            return result
        return measured


def load_source(args):
    if args.preset:
        if models.kind(load_config(args.preset).transformer) is not models.CONTEXTUAL:
            raise UserError("tools.bench times Draft-and-Revise; give --preset one that is contextual.")
        return random_checkpoint(args.preset)
    vae, transformer, info = models.load_checkpoint(args.checkpoint or BUNDLED)
    if models.kind(info.transformer) is not models.CONTEXTUAL:
        raise UserError("tools.bench times Draft-and-Revise; give --checkpoint one that is contextual.")
    return vae, transformer, info


def mode_values(mode, info, overrides, positions, t_draft=None):
    """The sampling values of a mode."""
    c = strategies.sampling_values(info, overrides, positions)
    if mode == "plain" and any(getattr(c, key) != value for key, value in strategies.DEFAULTS.items()):
        raise UserError("Mode plain knows the paper's strategy only; leave it out, or these values: "
                        f"{', '.join(strategies.DEFAULTS)}.")
    c.t_draft = t_draft or c.t_draft
    if mode == "raster":
        vars(c).update(strategies.DEFAULTS, t_draft=positions, rounds=0)
    return c


def decode_worker(connection, args, mode, precision, device, exported):
    """Loads the model at the first question. Answers the others, (batch, t_draft, watch), by (seconds, peak
    bytes, the parts' shares of the time if `watch`)."""
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = precision != "fp32"     # the exported float32 does without
    connection.recv()
    before = device_use(device)
    if mode in TORCH_MODES:
        vae, transformer, info = load_source(args)
        model = drr.TorchModel(vae, transformer, device, PRECISIONS[precision])
        length = transformer.cond_length
    else:
        model, info = backends.load(mode, exported, device)
        length = model.cond_length
    own, update = device_use(device) - before, drr.update
    if mode in ("compiled", "graphs", "compiled+graphs"):
        update = fast.compiled_update(model, "compiled" in mode, "graphs" in mode)
    connection.send("loaded")

    def decode(model, cond, noise, c):
        if mode == "plain":
            codes = strategies.plain_decode(model.transformer, cond, noise, c)
        else:
            *_, last = strategies.decode(model, cond, noise, c, update=update)
            codes = last.codes
        model.decode(codes)
        synchronize(device)

    while True:
        batch, t_draft, watch = connection.recv()
        c = mode_values(mode, info, args.overrides, model.positions, t_draft)
        order, uniforms = drr.draw_noise(0, range(batch), 1 + c.rounds, model.positions, model.depth)
        if mode == "raster":
            order = torch.arange(model.positions).expand_as(order)
        cond = torch.zeros(batch, length, dtype=torch.int64, device=device)
        watched, shares = Stopwatch(model, device), None
        reset_peak(device)
        before = device_use(device)
        started = time.perf_counter()
        decode(watched if watch else model, cond, (order, uniforms), c)
        seconds = time.perf_counter() - started
        if watch:
            shares = [s / seconds for s in watched.seconds.values()]
        own += device_use(device) - before                    # all other processes are waiting meanwhile
        memory = own if device.type == "cuda" and mode not in TORCH_MODES else peak_memory(device)
        connection.send((seconds, memory, shares))


def device_use(device):
    """Bytes in use on a GPU, by all: what ONNX Runtime and TensorRT take there, PyTorch does not know."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


# === Decoding: the table ====================================================================================
def export_for(args, source, folder):
    """Exports the model for the modes onnx and trt, once per precision: {precision: folder}."""
    folders = {}
    for mode, precision in args.mode:
        if mode in TORCH_MODES:
            continue
        folders[precision] = Path(folder, precision).resolve()
        manifest = export.current_export(*source, folders[precision], precision, max(args.batch))
        if mode == "trt":
            engines = backends.engine_folder(folders[precision])
            export.build_engines(folders[precision], manifest, engines, args.level)
    return folders


def decode_rows(workers, args, batch, t_draft, rates, device, bar):
    """Yields for each mode its name, seconds, how much faster than the first mode, peak bytes, the parts'
    shares of the time and the seconds of the first decode. `rates` gets more measurements of the machine."""
    answers = {name: [] for name in workers}
    for trial in range(1 + args.repeat):                      # the first is the warm-up
        for precision, measured in rates.items():
            # Where a CPU has no bf16, a product of the usual size takes half a minute.
            n = 512 if precision == "bf16" and device.type == "cpu" and not bf16_pays(device) else None
            measured.append(matrix_rate(device, PRECISIONS[precision], 0.3, n))
        for name, connection in workers.items():
            bar.set_description(f"batch {batch}, T_draft {t_draft}, {name}")
            answers[name].append(ask(connection, name, batch, t_draft, False))
            bar.update()
    first_mode = [seconds for seconds, _, _ in next(iter(answers.values()))]
    for name, connection in workers.items():
        seconds, memory, _ = zip(*answers[name])
        ratio = statistics.median(a / b for a, b in zip(first_mode[1:], seconds[1:]))
        shares = None
        if name.partition(":")[0] in ("eager", "raster", "onnx", "trt"):
            shares = ask(connection, name, batch, t_draft, True)[2]
        yield name, statistics.median(seconds[1:]), ratio, max(memory), shares, seconds[0]


def decode_table(args, device):
    vae, transformer, info = source = load_source(args)
    c = mode_values("eager", info, args.overrides, transformer.positions)
    if min(*args.batch, *args.t_draft) < 1 or max(args.t_draft) > transformer.positions:
        raise UserError(f"--batch and --t-draft start at 1, and --t-draft ends at {transformer.positions}.")
    for mode, _ in args.mode:
        mode_values(mode, info, args.overrides, transformer.positions)            # refuses before the work
    rates, rows = {"fp32": [], "bf16": []}, []
    total = len(args.batch) * len(args.t_draft) * len(args.mode) * (1 + args.repeat)
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=total, unit="decode") as bar:
        folders = export_for(args, source, args.exported or temporary)
        workers = {}
        for mode, precision in args.mode:
            name, exported = f"{mode}:{precision}", folders.get(precision)
            workers[name] = start(decode_worker, args, mode, precision, device, exported)
            ask(workers[name], name)                          # one after the other
        for batch, t_draft in itertools.product(args.batch, args.t_draft):
            for row in decode_rows(workers, args, batch, t_draft, rates, device, bar):
                rows.append((batch, t_draft, *row))
    rates = {precision: statistics.median(measured) for precision, measured in rates.items()}
    name = f"{args.preset}, random weights" if args.preset else Path(args.checkpoint or BUNDLED).name
    products = ", ".join(f"{name} products {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items())
    print(f"{name}, guidance {c.draft_guidance} / {c.revise_guidance}, {c.rounds} revisions of {c.t_revise} "
          f"updates; {describe(device)}; {products}")
    columns = ["mode", "precision", "batch", "T_draft", "s per image", "images/s",
               f"as fast as {args.mode[0][0]}", "GFLOP per image", "GFLOP/s", "of fp32 / bf16 products",
               "peak MiB", "spatial, depth, sampling, decoder", "first decode, s"]
    print_row(columns)
    print_row(["---"] * len(columns))
    for batch, t_draft, name, seconds, ratio, memory, shares, first in rows:
        mode, precision = name.split(":")
        c = mode_values(mode, info, args.overrides, transformer.positions, t_draft)
        flops = decode_flops(transformer, c) + decoder_flops(vae)
        reached, split = flops * batch / seconds, "-"
        if shares:
            spatial, depth, decoder = shares
            split = ", ".join(f"{share:.0%}" for share in (spatial, depth, 1 - sum(shares), decoder))
        of_products = f"{reached / rates['fp32']:.0%} / {reached / rates['bf16']:.0%}"
        print_row([mode, precision, batch, c.t_draft, f"{seconds / batch:.4f}", f"{batch / seconds:.2f}",
                   f"{ratio:.2f}", f"{flops / 1e9:.2f}", f"{reached / 1e9:,.0f}", of_products,
                   f"{memory / 2 ** 20:,.0f}", split, f"{first:.2f}"])


def print_row(cells):
    print(f"| {' | '.join(map(str, cells))} |")


def describe(device):
    name = f"{device.type}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}"


# === Training: the trainers themselves, on random pictures ==================================================
def train_worker(connection, args, device):
    """Answers (stage, arguments of its trainer) by the peak memory of that training in bytes."""
    torch.set_num_threads(args.threads)
    while True:
        stage, arguments = connection.recv()
        sys.argv = [f"train_{stage}.py", *arguments]
        reset_peak(device)
        with contextlib.redirect_stdout(sys.stderr):          # standard output is for the table
            {"vae": train_vae, "transformer": train_transformer}[stage].main()
        connection.send(peak_memory(device))


def train_table(args, device, dtype):
    config = load_config(args.train, args.overrides, ("data", "vae", "transformer"))
    print(f"{args.train}; {describe(device)}")
    columns = ["stage", "precision", "images per step", "s per step", "images/s", "share of the products",
               "peak MiB"]
    print_row(columns)
    print_row(["---"] * len(columns))
    with tempfile.TemporaryDirectory() as folder:
        pictures = max(config.vae.batch_size, config.transformer.batch_size)
        write_noise(Path(folder, "data", "train"), config.vae.resolution, pictures)
        for stage in ("vae", "transformer"):
            never = 10 ** 9
            settings = {"steps": 1 + args.repeat, "log_every": 1, "picture_every": never, "save_every": never}
            if stage == "vae":                                # as a step is once everything has begun
                settings.update(disc_start=0, disc_ramp=0, quantize_start=0)
            overrides = [text for text in args.overrides if text.startswith((f"{stage}.", "data."))]
            overrides += [f"{stage}.{key}={value}" for key, value in settings.items()]
            arguments = [args.train, "--data", f"{folder}/data", "--out", f"{folder}/out",
                         "--device", device.type, "--precision", precision_name(dtype),
                         "data.views=1", "data.class_views=1", *overrides]
            worker = start(train_worker, args, device)
            memory = ask(worker, f"the stage {stage}", stage, arguments)
            with open(Path(folder, "out", f"{stage}.csv")) as f:
                steps = list(csv.DictReader(f))[1:]           # the first step is the warm-up
            rate = statistics.median(float(step["images_per_s"]) for step in steps)
            share = statistics.median(float(step["mfu"]) for step in steps)
            batch = getattr(config, stage).batch_size
            print_row([stage, precision_name(dtype), batch, f"{batch / rate:.3f}", f"{rate:.1f}",
                       f"{share:.0%}", f"{memory / 2 ** 20:,.0f}"])


def write_noise(folder, size, count):
    """Random pictures of two classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(size, size, 3), dtype=np.uint8)).save(path)


# === Command line ===========================================================================================
def whole_numbers(text):
    return [int(v) for v in text.split(",")]


def read_modes(text, device, dtype):
    """"eager,onnx:fp16" -> [(mode, precision)]."""
    if not text:
        text = "eager,graphs,compiled+graphs" if device.type == "cuda" else "eager,compiled"
    modes = []
    for name in text.split(","):
        mode, _, precision = name.partition(":")
        if not precision:
            precision = precision_name(dtype)
            if mode == "onnx" and device.type == "cpu":       # where ONNX Runtime has no bf16
                precision = "fp32"
        on_gpus = ("graphs", "compiled+graphs", "trt")
        there = [known for known in MODES if device.type == "cuda" or known not in on_gpus]
        if mode not in there or precision not in PRECISIONS:
            raise UserError(f"--mode {name} does not exist on {device.type}; expected some of "
                            f"{', '.join(there)}, each alone or with a precision ({', '.join(PRECISIONS)}), "
                            "as in eager:fp32.")
        modes.append((mode, precision))
    return modes


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", help="a trained model (the bundled one)")
    add("--preset", help="a preset of config.yaml with random weights instead")
    add("--train", metavar="PRESET", help="training steps of a preset instead of decoding")
    add("--batch", type=whole_numbers, help="batch sizes (1,16)")
    add("--t-draft", type=whole_numbers, help="draft lengths (8,64)")
    add("--mode", help=f"some of {','.join(MODES)} (eager,compiled; on a GPU eager,graphs,compiled+graphs)")
    add("--repeat", type=int, default=3, help="decodes or steps after the first; the median counts (3)")
    add("--exported", metavar="DIR", help="keep here what onnx and trt need, and use it again")
    add("--level", type=int, default=3, choices=range(6), help="TensorRT's optimization level (3)")
    add("overrides", nargs="*", metavar="key=value", help="sampling values; with --train section.key=value")
    add_device_arguments(parser)
    args = parser.parse_intermixed_args()
    idle = []
    if args.train:
        given = {"--batch": args.batch, "--t-draft": args.t_draft, "--mode": args.mode,
                 "--exported": args.exported}
        idle = [(flag, "leave it out with --train") for flag, value in given.items() if value]
    else:
        idle = [(text, "use --t-draft and --batch") for text in args.overrides
                if text.startswith(("t_draft=", "batch_size="))]
    if idle:
        raise UserError(f"{idle[0][0]} does not apply here; {idle[0][1]}.")
    if args.repeat < 1:
        raise UserError(f"--repeat is {args.repeat}; expected a number from 1.")
    if sum(map(bool, (args.checkpoint, args.preset, args.train))) > 1:
        raise UserError("--checkpoint, --preset and --train exclude each other; give one of them.")
    device, dtype = pick_device(args)
    args.batch, args.t_draft = args.batch or [1, 16], args.t_draft or [8, 64]
    args.mode, args.threads = read_modes(args.mode, device, dtype), torch.get_num_threads()
    if args.train:
        return train_table(args, device, dtype)
    decode_table(args, device)


if __name__ == "__main__":
    run(main)
