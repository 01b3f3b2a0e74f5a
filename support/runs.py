"""What the two training scripts share: processes, checkpoints, logs.

    torchrun --nproc_per_node=8 train_vae.py imagenet-256 --data DIR

starts a script eight times, once for each GPU ("rank"). The batch is that of the configuration however many ranks there are:
it is cut into micro-batches, rank r takes its share of them, and DistributedDataParallel averages the gradients. Everything
random is a function of (seed, step) and position in the batch, so that two ranks follow the run of one.
"""
import argparse
import contextlib
import copy
import csv
import ctypes
import importlib.util
import math
import os
import signal
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
import weakref
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import drr
from support.common import add_device_arguments, matrix_rate, pick_device, synchronize
from drr import UserError, ranks, replacing


FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)        # sharded tensors are gathered when they are saved


def arguments(doc):
    """The parser of both training scripts."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", help="a preset of config.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the preset's")
    parser.add_argument("--data", metavar="DIR",
                        help="DIR/train/<class>/* or DIR/train/*.tar, DIR/val likewise; or a folder of images")
    parser.add_argument("--out", metavar="DIR", help="where checkpoints, pictures and logs go (runs/PRESET)")
    parser.add_argument("--init", metavar="FILE", help="start from the weights in this .safetensors")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--force", action="store_true",
                        help="resume with other settings or data than before, start over, or replace finished weights")
    parser.add_argument("--tensorboard", action="store_true", help="write OUT/tensorboard, too")
    add_device_arguments(parser)
    return parser


# === Processes ======================================================================================================
def keep_memory():
    """Freed memory stays with the process, up to 2 GB of it, where the C library is glibc. It otherwise returns every large
    tensor to the system and gets fresh pages for the next, which cost 8% of a training's time on a CPU (docs/speed.md)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)                                         # M_MMAP_MAX: large blocks come from the heap, too
        mallopt(-1, 2 ** 31 - 1)                               # M_TRIM_THRESHOLD: what is free at its end stays there


def join_ranks(args):
    """(device, dtype) of this process, after it has met the others that torchrun started, if it was torchrun."""
    device, dtype = pick_device(args)
    keep_memory()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(f"WORLD_SIZE is set and {', '.join(missing)} not; start with torchrun, or unset WORLD_SIZE.")
        if device.type == "cuda":
            local, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= found:
                raise UserError(f"torchrun started process {local + 1} on a machine with {found} GPUs; lower "
                                "--nproc_per_node.")
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        # The timeout is for what one rank does while the others wait: pictures, checkpoints, its share of the token cache.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
        choice = [dtype]
        dist.broadcast_object_list(choice)                     # each has measured its own; they must not mix
        dtype = choice[0]
        torch.backends.cudnn.allow_tf32 = dtype != torch.float32       # as pick_device sets it
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")                 # one rank talks
    return device, dtype


def micro_batch(name, c, world):
    """How many images a device takes at a time: c.micro_batch, or 0 for its whole share of the step. Raises UserError where
    the batch cannot be shared by `world` processes in such pieces."""
    if c.batch_size % world:
        raise UserError(f"{name}.batch_size {c.batch_size} is no multiple of the {world} processes; change one of them.")
    share = c.batch_size // world
    micro = min(c.micro_batch or share, share)
    if share % micro:
        raise UserError(f"{name}.micro_batch {c.micro_batch} does not divide {share}, the share of one process of "
                        f"{name}.batch_size {c.batch_size}; change one of them.")
    return micro


def micro_batches(name, c):
    """(own, count): the positions of the step's batch that this rank takes, and in how many micro-batches.

    c: a section with batch_size and micro_batch. Raises UserError where they do not fit the number of ranks. Which rank
    takes a micro-batch makes no difference; its size does, to a discriminator with BatchNorm.
    """
    rank, world = ranks()
    share, micro = c.batch_size // world, micro_batch(name, c, world)
    return np.arange(rank * share, (rank + 1) * share), share // micro


def parallel(module, device):
    """`module`, in DistributedDataParallel where there are several ranks. The codebook, a buffer, is the quantizer's own
    business."""
    if ranks()[1] == 1:
        return module
    return DistributedDataParallel(module, [device] if device.type == "cuda" else None, broadcast_buffers=False)


def shard(transformer, ema):
    """Spreads the weights of both, the gradients and the optimizer's state over the ranks (FSDP2, ZeRO stage 3), block by
    block; give it the models on the CPU, it takes the parts to the GPUs. Returns a function, for all ranks to call together,
    that gives rank 0 the whole average, on the CPU."""
    rank, world = ranks()
    if world == 1:
        raise UserError("transformer.shard spreads the model over several processes; start with torchrun, or leave it off.")
    whole = copy.deepcopy(ema) if rank == 0 else None
    for model in (transformer, ema):
        for block in (*model.spatial, *model.depthwise):
            fully_shard(block)
        fully_shard(model)

    def gather():
        state = get_model_state_dict(ema, options=FULL)
        if rank == 0:
            whole.load_state_dict(state)
        return whole
    return gather


def synchronize_gradients(modules, on):
    """Whether the next forward and backward passes of these modules average their gradients over the ranks: at the last
    micro-batch of a step only. FSDP does it at each one; waiting would take the memory that it is there to spare."""
    for module in modules:
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = on             # what its context manager `no_sync` sets


def full(tensor):
    """A norm over sharded gradients as a plain tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def total(tensor):
    """The sum of a tensor over all ranks."""
    if ranks()[1] > 1:
        dist.all_reduce(tensor := tensor.clone())
    return tensor


def everyones(codes):
    """codes (P, D) of this rank -> (world * P, D) of all."""
    world = ranks()[1]
    if world == 1:
        return codes
    parts = [torch.empty_like(codes) for _ in range(world)]
    dist.all_gather(parts, codes.contiguous())
    return torch.cat(parts)


class Peak(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations create and takes off those that are freed; `peak` is the most
    that was held at once. What a kernel needs only while it works is not seen."""

    held = peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        storages = lambda tree: {t.untyped_storage()._cdata: t.untyped_storage()
                                 for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}
        old = storages((args, kwargs))                            # views and in-place results are no new memory
        for address, storage in storages(result).items():
            if address not in old:
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, size):
        self.held += size
        self.peak = max(self.peak, self.held)


class Cost(NamedTuple):
    flops: float        # operations of a step on this rank, those of recomputation too: products, convolutions, attention
    memory: int         # bytes that weights, gradients, optimizer, average and activations take on this device
    seconds: float      # of a step
    peak: float         # operations per second of plain matrix products on this device

    def mfu(self, steps_per_second):
        """Model FLOP utilisation: the share of the matrix-product rate that training reaches."""
        return self.flops * steps_per_second / self.peak


def measure(backward, count, parts, device, dtype):
    """The Cost of a step of `count` micro-batches, from trying one: `backward` runs it and leaves nothing but gradients."""
    counter, memory = FlopCounterMode(display=False), Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.compiler.set_stance("force_eager"), torch.autograd.set_multithreading_enabled(False), counter, memory:
        backward()
    backward()                                                 # compiles, where it is to be compiled
    synchronize(device)
    start = time.perf_counter()
    backward()
    synchronize(device)
    seconds = time.perf_counter() - start
    optimizers = [part for part in parts.values() if isinstance(part, torch.optim.Optimizer)]
    # Adam's moments come with the first step, if they have not been loaded; gradients are there now.
    peak = sum(2 * nbytes(p) for opt in optimizers if not opt.state for group in opt.param_groups for p in group["params"])
    if device.type == "cuda":
        peak += torch.cuda.max_memory_allocated(device)
    else:
        modules = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
        peak += memory.peak + sum(nbytes(t) for module in modules for t in (*module.parameters(), *module.buffers()))
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)
    return Cost(counter.get_total_flops() * count, peak, seconds * count, matrix_rate(device, dtype, 0.3))


def nbytes(tensor):
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor      # of a sharded one, this rank's part
    return tensor.numel() * tensor.element_size()


def announce(name, c, cost, start, count, device, dtype):
    """Says what the training will take, before it starts."""
    _, world = ranks()
    steps = max(0, c.steps - start)
    duration = tqdm.format_interval(steps * cost.seconds)
    print(f"{name}: {steps} steps of {c.batch_size} images, on {world} x {device.type} {str(dtype)[6:]} in {count} "
          f"micro-batches of {c.batch_size // world // count}; about {cost.memory / 1e9:.2f} GB each; "
          f"{cost.flops * world / 1e12:.3g} TFLOP and {cost.seconds:.3g} s a step, {duration} in all, "
          "if this speed holds")


class StopSignal:
    """SIGTERM, with which preemptible machines announce their end, makes the loop save and stop after its step."""

    def __init__(self):
        self.received = False
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "received", True))

    def leave(self, step):
        """Ends the process with the exit status of SIGTERM, all ranks together."""
        print(f"stopped by SIGTERM after step {step}, which is saved; go on with --resume")
        if ranks()[1] > 1:
            dist.barrier()                                     # nobody is to be missed while rank 0 still writes
        sys.exit(128 + signal.SIGTERM)


def on_any_rank(*flags, device):
    """Each flag: is it set on any rank? All ranks must act alike."""
    if ranks()[1] == 1:
        return flags
    dist.all_reduce(t := torch.tensor(flags, dtype=torch.int32, device=device), dist.ReduceOp.MAX)
    return tuple(bool(flag) for flag in t)


def refuse_infinity(terms, step, saved, advice):
    """Raises the UserError of a step whose loss or gradient is no finite number, naming which of the `terms` is not.
    saved: the path of the last state, or None."""
    bad = [name for name, value in terms.items() if not math.isfinite(value)]
    mend = f"{saved} is good: go on from it with --resume, --force and {advice}" if saved else f"start again with {advice}"
    raise UserError(f"At step {step + 1} {' and '.join(bad) or 'the gradient'} is not finite; {mend}.")


# === Checkpoints: OUT/STAGE_state_STEP.pt ===========================================================================
# Keys of the configuration that may well change between a run and its continuation: how long, how often, on what machine. A
# change is said. (Of `steps` depends the cosine of the learning rate, of `micro_batch` what BatchNorm sees.)
MAY_CHANGE = {"steps", "micro_batch", "log_every", "picture_every", "save_every", "keep", "compile", "recompute", "half",
              "in_memory", "workers"}


def refuse_replacing(weights, force):
    """Raises UserError where a fresh start would replace finished weights."""
    if weights.exists() and not force:
        raise UserError(f"{weights} is there already; add --force to replace it, or choose another --out.")


class States:
    """The training states of one stage in a folder: saves, keeps the newest `keep` of them, and finds the one to go on from.

    Made before the work on the data, which may take hours: raises UserError where there is nothing to resume, and where a fresh
    start would replace an earlier run.
    """

    def __init__(self, out, stage, args, keep):
        self.out, self.stage, self.args, self.keep = Path(out), stage, args, keep
        self.last = None                                       # the path of the newest good state of this run
        self.stale = self.files()                              # those of an earlier run in this folder
        if args.resume and args.init:
            raise UserError("--init starts from given weights, --resume goes on with its own; give one of them.")
        if args.resume and not self.stale:
            raise UserError(f"There is nothing to resume: {self.out}/{stage}_state_*.pt does not exist; start without --resume.")
        if self.stale and not args.resume and not args.force:
            step = int(self.stale[-1].stem.rpartition("_")[2])
            raise UserError(f"{self.out} holds a training up to step {step}; add --resume to go on with it or --force to "
                            "start over, or choose another --out.")
        if not args.resume:
            refuse_replacing(self.out / f"{stage}.safetensors", args.force)

    def files(self):
        """The states in the folder, oldest first."""
        return sorted(self.out.glob(f"{self.stage}_state_{9 * '[0-9]'}.pt"))

    def state(self, name):
        part = self.parts[name]
        if not self.sharded:
            return part.state_dict()
        if name == "opt":
            return get_optimizer_state_dict(self.sharded, part, options=FULL)
        return get_model_state_dict(part, options=FULL)

    def save(self, step):
        """Writes the state, on rank 0, and removes the oldest. Raises UserError when the disk is full; nothing is lost."""
        path = self.out / f"{self.stage}_state_{step:09d}.pt"
        states = {name: self.state(name) for name, part in self.parts.items() if part is not None}
        if ranks()[0] > 0:
            return
        with replacing(path) as temporary:
            torch.save({"step": step, "settings": self.settings, **states}, temporary)
        for old in self.stale + [f for f in self.files() if f not in self.stale][:-self.keep]:
            if old != path:
                old.unlink(missing_ok=True)
        self.stale, self.last = [], path

    def begin(self, parts, settings, sharded=None):
        """The step to begin with: 0, or that of the restored state. Raises UserError as `load` does.

        parts      {name: module, optimizer or None}: what is saved and restored
        settings   a flat dictionary of all that decides the result (configuration, data, codes): a resumed run must agree
        sharded    the model, if it went through `shard`; all ranks must then save and load together
        """
        self.parts, self.settings, self.sharded = parts, settings, sharded
        start = self.load(self.args.force) if self.args.resume else 0
        for folder in (self.out, self.out / "codes") if ranks()[0] == 0 else ():
            for half_written in folder.glob(".writing-*"):     # by a run that was killed
                half_written.unlink(missing_ok=True)
        return start

    def lock(self):
        """Keeps a second training out of the folder for as long as this process lives: raises UserError where one is at work."""
        if ranks()[0] > 0:
            return
        with contextlib.suppress(ImportError):                 # not on Windows
            import fcntl
            self.out.mkdir(parents=True, exist_ok=True)
            self.locked = open(self.out / ".lock", "w")        # the system lets go of it when this process ends, however it does
            try:
                fcntl.lockf(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise UserError(f"Another training is at work in {self.out}; wait for its end, or choose another --out.") from None
            except OSError as error:                           # a disk without locks
                print(f"WARNING: {self.out} cannot be locked ({error.strerror}); start no second training there", file=sys.stderr)

    def load(self, force=False):
        """Restores the newest state that is whole and returns its step. A damaged one is moved aside with a warning.

        Optimizers keep the settings (learning rate, ...) that they have now. Raises UserError where no state is
        whole, or where it belongs to another model, other settings or other data (unless `force`)."""
        rank, world = ranks()
        newest = [self.newest_whole() if rank == 0 else None]
        if world > 1:
            dist.broadcast_object_list(newest)
        path, problem = newest[0]
        if path is None:
            raise UserError(f"No training state in {self.out} is whole ({problem}); start without --resume.")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        present = [name for name, part in self.parts.items() if part is not None]
        missing = [name for name in ("step", "settings", *present) if name not in state]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}, which this run needs to go on; start without --resume.")
        self.compare(path, state["settings"], force)
        for name in present:
            self.restore(name, state[name], path)
        self.stale, self.last = [], path
        return state["step"]

    def newest_whole(self):
        problem = ""
        for path in reversed(self.files()):
            try:
                # torch does not look at the checksums of its own format, a zip file
                with zipfile.ZipFile(path) as file:
                    broken = file.testzip()
                if broken:
                    raise ValueError(f"{broken} does not have its checksum")
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
                return str(path), problem
            except OSError as error:                 # of the disk or the network, not of the file: it may be good
                raise UserError(f"{path} could not be read ({error}); try again, or move it away to take the one before.") \
                    from None
            except Exception as error:               # truncated, a flipped byte, no torch file, a pickle with code in it
                problem = f"{path.name}: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
                print(f"WARNING: {path} is damaged ({problem}); it is now called {path.name}.damaged, and the state before "
                      "it is taken", file=sys.stderr)
                path.rename(path.with_name(path.name + ".damaged"))
        return None, problem

    def compare(self, path, before, force):
        names = sorted(before.keys() | self.settings.keys())
        changed = [name for name in names if before.get(name) != self.settings.get(name)]
        listed = lambda names: ", ".join(f"{n} (was {before.get(n)}, is {self.settings.get(n)})" for n in names)
        serious = [name for name in changed if name.rpartition(".")[2] not in MAY_CHANGE]
        if serious and not force:
            raise UserError(f"{path} belongs to a run with other settings: {listed(serious)}; go on with the old values, "
                            "add --force to go on with the new ones, or start without --resume.")
        if changed:
            print(f"resuming with other settings than before: {listed(changed)}")

    def restore(self, name, state, path):
        part = self.parts[name]
        now = [{k: v for k, v in group.items() if k != "params"} for group in getattr(part, "param_groups", [])]
        try:
            if self.sharded and name == "opt":
                set_optimizer_state_dict(self.sharded, part, state, options=FULL)
            elif self.sharded:
                set_model_state_dict(part, state, options=FULL)
            else:
                drr.fill(part, state, path)
            for group, values in zip(getattr(part, "param_groups", []), now):
                group.update(values)
        except (ValueError, KeyError) as error:      # an optimizer of another model
            raise UserError(f"{path} does not fit this model ({error}); start without --resume.") from None


def settings_of(config, sections, precision, pictures, **others):
    """A flat dictionary {"vae.lr": ..., ...} of these sections, the precision, the data's fingerprint, and others, for
    `States`."""
    flat = {f"{s}.{k}": v for s in sections for k, v in vars(getattr(config, s)).items()}
    return {**flat, "precision": precision, "the pictures in --data": pictures, **others}


# === Logs ===========================================================================================================
class Log:
    """Appends rows to OUT/STAGE.csv, and to TensorBoard's files if asked; a resumed run drops the rows of the steps that it
    will do again."""

    def __init__(self, out, stage, start, tensorboard=False):
        self.path, self.fields, self.board = Path(out) / f"{stage}.csv", None, None
        if ranks()[0] > 0:
            return
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs a package that is not here; "
                                "pip install -r requirements-train.txt.") from None
            self.board = SummaryWriter(Path(out) / "tensorboard" / stage, purge_step=start + 1)
        if not start:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
        elif self.path.exists():
            try:
                with open(self.path, newline="") as f:
                    reader = csv.DictReader(f)
                    rows = [row for row in reader if None not in (*row, *row.values()) and int(row["step"]) <= start]
                    self.fields = list(reader.fieldnames or [])
                if not self.fields:
                    raise ValueError("it is empty")
            except (KeyError, ValueError, csv.Error) as error:
                print(f"WARNING: {self.path} is damaged ({type(error).__name__}: {error}); it is now called "
                      f"{self.path.name}.damaged, and a new log begins", file=sys.stderr)
                self.path.rename(self.path.with_name(self.path.name + ".damaged"))
                self.fields = None
                return
            with replacing(self.path) as temporary, open(temporary, "w", newline="") as f:
                writer = csv.DictWriter(f, self.fields)
                writer.writeheader()
                writer.writerows(rows)

    def write(self, row):
        """row: {column: value}; "" where there is none. The first row of a file decides its columns."""
        if ranks()[0] > 0:
            return
        new = not self.fields
        self.fields = self.fields or list(row)
        with open(self.path, "a", newline="") as f:
            writer = csv.DictWriter(f, self.fields, restval="", extrasaction="ignore")
            if new:
                writer.writeheader()
            writer.writerow(row)
        for name, value in row.items():
            if self.board and value != "" and name != "step":
                self.board.add_scalar(name, value, row["step"])
        if self.board:
            self.board.flush()

    def draw(self):
        """OUT/plots.png from the CSVs, on rank 0, where matplotlib is installed. If it fails, training goes on."""
        if ranks()[0] == 0 and importlib.util.find_spec("matplotlib"):
            try:
                from support import plots
                plots.draw(self.path.parent)
            except Exception as error:
                print(f"WARNING: plots.png was not drawn ({type(error).__name__}: {error})", file=sys.stderr)


def learning_rate(step, c, decay=True):
    """Linear warm-up to c.lr, then the cosine to 0 (or constant)."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    return c.lr * (0.5 + 0.5 * math.cos(math.pi * (step - c.warmup) / max(1, c.steps - c.warmup))) if decay else c.lr
