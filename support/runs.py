"""What the two training scripts share: processes, the common parts of a step, training states, logs.

torchrun starts a script once per GPU ("rank"). The batch is the configuration's, however many ranks there
are: micro-batches of it are shared out, and DistributedDataParallel averages the gradients. Everything random
is a function of (seed, step) and the place in the batch: two ranks follow the run of one. Dropout alone
depends on the rank and on the micro-batches, too.
"""
import argparse
import contextlib
import copy
import ctypes
import importlib.util
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch.distributed.checkpoint import state_dict as sharded_states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import drr
from drr import UserError, ranks, read_model, replacing
from support.common import (HERE, add_device_arguments, end_rank, from_rank_0, matrix_rate, pick_device,
                            precision_name, synchronize)

WHOLE = sharded_states.StateDictOptions(full_state_dict=True, cpu_offload=True)     # gathered, to be saved


def arguments(doc):
    """The parser of both training scripts."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", help="a preset of config.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="instead of the preset's")
    parser.add_argument("--data", metavar="DIR",
                        help="DIR/train/CLASS/*, *.tar or *.parquet, DIR/val likewise; or a folder of images")
    parser.add_argument("--out", metavar="DIR", help="for checkpoints, pictures and logs (runs/PRESET)")
    parser.add_argument("--init", metavar="FILE", help="start from the weights in this .safetensors")
    parser.add_argument("--resume", action="store_true", help="go on from the last training state in --out")
    parser.add_argument("--force", action="store_true",
                        help="resume with other settings or data, start over, or replace finished weights")
    add_device_arguments(parser)
    return parser


# === Processes: torchrun -> ranks, each with its device and its share of the batch ==========================
def keep_memory():
    """Freed memory stays with the process, up to 2 GB of it, where the C library is glibc. It would otherwise
    return every large tensor to the system: 8% of a training's time on a CPU (docs/speed.md)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)                         # M_MMAP_MAX: large blocks come from the heap, too
        mallopt(-1, 2 ** 31 - 1)               # M_TRIM_THRESHOLD: what is free at its end stays there


def join_ranks(args):
    """(device, dtype) of this process. Under torchrun it joins the process group; `common.run` ends that."""
    device, dtype = pick_device(args)
    keep_memory()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device, dtype
    missing = [v for v in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if v not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is set and {', '.join(missing)} not; start with torchrun, or unset it.")
    if device.type == "cuda":
        local, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= found:
            raise UserError(f"There are {found} GPUs for {local + 1} processes; lower --nproc_per_node.")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # The timeout is for what one rank does while the others wait: pictures, checkpoints, encoding its share.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    dtype = from_rank_0(dtype)                 # each has measured its own; they must not mix
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32           # as pick_device sets it
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")     # only rank 0 prints
    return device, dtype


def micro_batch(name, c, world):
    """How many images a device takes at a time. UserError where `world` processes cannot share the batch."""
    if c.batch_size % world:
        raise UserError(f"{name}.batch_size {c.batch_size} is no multiple of {world} processes; change it.")
    share = c.batch_size // world
    micro = min(c.micro_batch or share, share)
    if share % micro:
        raise UserError(f"{name}.micro_batch {c.micro_batch} does not divide {share}, the share of one "
                        f"process of {name}.batch_size {c.batch_size}; change one of them.")
    return micro


def micro_batches(name, c):
    """(rows, count): this rank's part of the step's batch, and in how many micro-batches."""
    rank, world = ranks()
    share = c.batch_size // world
    return np.arange(rank * share, (rank + 1) * share), share // micro_batch(name, c, world)


def parallel(module, device, sharded=False):
    """`module`, in DistributedDataParallel where there are several ranks, each with all weights."""
    if ranks()[1] == 1 or sharded:
        return module
    devices = [device] if device.type == "cuda" else None
    # The codebooks agree without a broadcast; gradients live in the buckets that are sent: no second copy.
    return DistributedDataParallel(module, devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def shard(transformer, ema, device):
    """Spreads weights, gradients and the optimizer's state over the ranks (FSDP2, ZeRO stage 3). Returns a
    function, for all ranks to call together, that gives rank 0 the whole average, on the CPU."""
    rank, world = ranks()
    if world == 1:
        raise UserError("transformer.shard needs several processes; start with torchrun, or leave it off.")
    whole = copy.deepcopy(ema) if rank == 0 else None
    mesh = init_device_mesh(device.type, (world,))             # else of the accelerator that is there
    for model in (transformer, ema):
        for block in (*model.spatial, *model.depthwise):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def gather():
        state = sharded_states.get_model_state_dict(ema, options=WHOLE)
        if rank == 0:
            whole.load_state_dict(state)
        return whole
    return gather


def total(tensor):
    """The sum of a tensor over all ranks."""
    if ranks()[1] > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def means(terms):
    """{name: scalar tensor} of each rank -> {name: float}, the mean over all ranks."""
    values = total(torch.stack(list(terms.values()))) / ranks()[1]
    return dict(zip(terms, values.tolist()))


def codebook_health(codes, codebook_size):
    """Health of the codebook by depth, for the codes (P, D) of all ranks: usage (D,), the share of codes that
    occur at all, and perplexity (D,), exp of their distribution's entropy (K if all are equally frequent)."""
    counts = total(torch.stack([torch.bincount(k, minlength=codebook_size) for k in codes.T]))     # (D, K)
    p = counts / counts.sum(1, keepdim=True)
    entropy = -torch.special.xlogy(p, p).sum(1)
    return {"usage": (counts > 0).float().mean(1), "perplexity": torch.exp(entropy)}


class StopSignal:
    """SIGTERM, by which preemptible machines announce their end: the loop saves and stops after its step."""

    def __init__(self):
        self.received = False
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "received", True))

    def leave(self, step):
        """Ends the process with the exit status of SIGTERM, all ranks together."""
        print(f"stopped by SIGTERM after step {step}, which is saved; go on with --resume")
        if ranks()[1] > 1:
            dist.barrier()                     # torchrun must see no rank end while rank 0 still writes
            end_rank(128 + signal.SIGTERM)
        sys.exit(128 + signal.SIGTERM)


# === A step: what both loops do in it =======================================================================
def learning_rate(step, c, decay=True):
    """Linear warm-up to c.lr, then the cosine to 0 (or constant)."""
    if step < c.warmup or not decay:
        return c.lr * min(1, (step + 1) / max(1, c.warmup))
    return c.lr * (0.5 + 0.5 * math.cos(math.pi * (step - c.warmup) / max(1, c.steps - c.warmup)))


def progress(name, start, stop):
    """The steps, with a bar on rank 0."""
    return tqdm(range(start, stop), name, stop, initial=start, unit="step", disable=ranks()[0] > 0)


def synchronize_gradients(modules, on):
    """Whether the next passes of these modules average gradients over the ranks: at the last micro-batch of a
    step only. FSDP does it at each one; waiting would take the memory that it is there to spare."""
    for module in modules:
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = on         # DDP.no_sync() as a switch: no `with` in the loop


def add_up(sums, terms, count):
    """Adds the terms {name: tensor} of one of `count` micro-batches to their means over the step."""
    for name, value in terms.items():
        sums[name] = sums.get(name, 0) + value.detach() / count


def clip(parameters, limit):
    """The norm of the gradients, which are scaled down where it exceeds `limit`; 0 is no limit."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm            # of sharded gradients


def must_stop(stop, terms, step, saved, advice):
    """Whether the StopSignal reached any rank. Raises UserError where one of the terms {name: tensor} is not
    finite on any rank: all must act alike. saved: the path of a good state (States.good), or None."""
    sums = [value.sum() for value in terms.values()]
    sums.append(torch.full_like(sums[0], float(stop.received)))
    *sums, stopping = total(torch.stack(sums)).tolist()
    bad = [name for name, value in zip(terms, sums) if not math.isfinite(value)]
    if bad:
        repair = f"start again with {advice}"
        if saved:
            repair = f"{saved} is good: go on from it with --resume, --force and {advice}"
        raise UserError(f"Step {step + 1} gave no finite number for {', '.join(bad)}; {repair}.")
    return stopping > 0


def take_step(optimizers, rate):
    """A step of each at this learning rate, after which the gradients are gone."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def update_average(average, weights, decay, step):
    """Moves the averaged tensors towards the weights: a <- decay a + (1 - decay) w."""
    decay = min(decay, (1 + step) / (10 + step))           # a short memory at first: the start is forgotten
    torch._foreach_lerp_(list(average), list(weights), 1 - decay)


# === Training states: OUT/STAGE_state_STEP.pt ===============================================================
# Keys that may differ between a run and its continuation: how long, how often, on what machine. A change is
# reported. (The cosine of the learning rate depends on `steps`, what BatchNorm sees on `micro_batch`.)
MAY_CHANGE = {"steps", "micro_batch", "log_every", "picture_every", "save_every", "keep", "compile",
              "recompute", "half", "in_memory", "workers"}


def settings_of(config, sections, precision, pictures):
    """A flat dictionary of these sections, the precision and the data's fingerprint."""
    flat = {f"{s}.{k}": v for s in sections for k, v in vars(getattr(config, s)).items()}
    return {**flat, "precision": precision, "the pictures in --data": pictures}


def refuse_replacing(weights, force):
    if weights.exists() and not force:         # a fresh start would lose them
        raise UserError(f"{weights} is there already; add --force to replace it, or choose another --out.")


class States:
    """The training states of one stage in a folder: saves them, keeps the newest, finds the one to resume.
    Made before the work on the data, which may take hours: raises UserError where there is nothing to resume,
    and where a fresh start would replace an earlier run."""

    def __init__(self, out, stage, args, keep):
        self.out, self.stage, self.args, self.keep = out, stage, args, keep
        self.saved = []                        # the paths of this run's states, oldest first
        earlier = self.files()
        if not args.data:
            raise UserError("Training needs --data DIR, a folder with DIR/train/CLASS/*.jpg or with images.")
        if args.resume and args.init:
            raise UserError("--init starts from given weights, --resume from its own; give one of them.")
        if args.resume and not earlier:
            raise UserError(f"There is nothing to resume: {out}/{stage}_state_*.pt does not exist; start "
                            "without --resume.")
        if earlier and not args.resume and not args.force:
            step = int(earlier[-1].stem[-9:])
            raise UserError(f"{out} holds a training up to step {step}; add --resume to go on with it or "
                            "--force to start over, or choose another --out.")
        if not args.resume:
            refuse_replacing(out / f"{stage}.safetensors", args.force)
        if args.init:
            read_model(args.init)              # refuses what is no model

    def path(self, step):
        return self.out / f"{self.stage}_state_{step:09d}.pt"

    def files(self):                           # oldest first
        return sorted(self.out.glob(f"{self.stage}_state_{9 * '[0-9]'}.pt"))

    def lock(self):
        """Keeps a second training out of the folder while this process lives, by a UserError. A new run sets
        the states of an earlier one aside, so that nothing goes on from them in its place."""
        if ranks()[0] > 0:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        self.locked = FileLock(self.out / ".lock")     # released when this process ends, however it does
        try:
            self.locked.acquire(timeout=0)
        except Timeout:
            raise UserError(f"Another training is at work in {self.out}; choose another --out.") from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, PermissionError):
                raise
            print(f"WARNING: {self.out}, on a disk without locks, is not guarded against a second training")
        for path in [] if self.args.resume else self.files():
            path.replace(f"{path}.old")
            print(f"starting over: until the first new state is saved, that of before is called {path}.old")

    def begin(self, parts, settings, sharded=None):
        """The step to begin with: 0, or that of the restored state. Raises UserError as `load` does. parts:
        {name: module, optimizer or None}, to be saved and restored. settings: all that decides the result; a
        resumed run must agree in it. sharded: whether the models went through `shard`."""
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.settings, self.sharded = settings, sharded and self.parts["transformer"]
        start = self.load() if self.args.resume else 0
        if ranks()[0] == 0:
            for half_written in [*self.out.glob(".writing-*"), *self.out.glob("codes/.writing-*")]:
                half_written.unlink(missing_ok=True)           # by a run that was killed
        return start

    def save(self, step):
        """Writes the state, on rank 0, and removes the oldest. Raises UserError when the disk is full."""
        path = self.path(step)
        states = {name: self.state(name, part) for name, part in self.parts.items()}
        before, self.saved = self.saved, [*self.saved, path][-self.keep:]
        if ranks()[0] > 0:
            return
        with replacing(path) as temporary:
            torch.save({"step": step, "settings": self.settings, **states}, temporary)
        for old in {*before, *self.out.glob(f"{self.stage}_state_*.pt.old")} - {*self.saved}:
            old.unlink(missing_ok=True)

    def good(self, step):
        """Where to go on from if the step after `step` others fails, as words: from the newest state that a
        step of this run has succeeded from. One that no step has is what led to the failure."""
        tried = [path for path in self.saved if path < self.path(step)]
        if tried and tried[-1] != self.saved[-1]:
            return f"delete {self.saved[-1].name}, which leads there: {tried[-1]}"
        return tried[-1] if tried else None

    def state(self, name, part):
        if not self.sharded:
            return part.state_dict()
        if name == "opt":
            return sharded_states.get_optimizer_state_dict(self.sharded, part, options=WHOLE)
        return sharded_states.get_model_state_dict(part, options=WHOLE)

    def load(self):
        """Restores the newest state that is whole, and returns its step. Raises UserError where none is, and
        where it belongs to another model or (unless --force) to other settings or data."""
        path = from_rank_0(self.newest_whole() if ranks()[0] == 0 else None)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        self.compare(path, state["settings"])
        for name, part in self.parts.items():
            self.restore(name, part, state, path)
        self.saved = [file for file in self.files() if file <= path]
        print(f"resuming after step {state['step']}, from {path}")
        return state["step"]

    def newest_whole(self):
        """The path of the newest state that is good. Renames damaged ones, loudly; UserError if all are."""
        for path in reversed(self.files()):
            try:
                with zipfile.ZipFile(path) as file:            # torch itself looks at no checksums
                    if broken := file.testzip():
                        raise ValueError(f"{broken} does not have its checksum")
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                if not {"step", "settings"} <= state.keys():
                    raise ValueError("it lacks its step or its settings")
                return path
            except OSError as error:                           # of the disk: the file may be good
                raise UserError(f"{path} could not be read ({error}); try again, or move it away to take the "
                                "one before.") from None
            except Exception as error:       # cut short, a flipped byte, no torch file, a pickle with code
                problem = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
                damaged = path.rename(f"{path}.damaged")
                print(f"WARNING: {path} is damaged ({problem}); it is now called {damaged.name}, and the "
                      "state before it is taken", file=sys.stderr)
        raise UserError(f"No training state in {self.out} is whole ({problem}); start without --resume.")

    def compare(self, path, before):
        """Raises UserError where the settings are others than before, other than those that may change."""
        changed = {name: f"{name} (was {before.get(name)}, is {self.settings.get(name)})"
                   for name in sorted(before.keys() | self.settings.keys())
                   if before.get(name) != self.settings.get(name)}
        serious = [text for name, text in changed.items() if name.rpartition(".")[2] not in MAY_CHANGE]
        if serious and not self.args.force:
            raise UserError(f"{path} belongs to a run with other settings: {', '.join(serious)}; go on with "
                            "the old values, add --force to take the new ones, or start without --resume.")
        if changed:
            print(f"resuming with other settings than before: {', '.join(changed.values())}")

    def restore(self, name, part, states, path):
        try:
            state = states[name]
            # An optimizer keeps today's options.
            for before, today in zip(state.get("param_groups", []), getattr(part, "param_groups", [])):
                before.update({key: value for key, value in today.items() if key != "params"})
            if self.sharded and name == "opt":
                sharded_states.set_optimizer_state_dict(self.sharded, part, state, options=WHOLE)
            elif self.sharded:
                sharded_states.set_model_state_dict(part, state, options=WHOLE)
            else:
                drr.fill(part, state, path)
        except (ValueError, KeyError) as error:                # of another model, or without this part
            raise UserError(f"{path} does not fit this model ({error}); start without --resume.") from None


# === Log: a line on the terminal and a row in OUT/STAGE.csv; the speed ======================================
class Log:
    """OUT/STAGE.csv, and the same on the terminal. After three steps it says what the rest will take.
    operations: of a step, per image, for the share of the device's rate that training reaches (MFU)."""

    def __init__(self, out, stage, model, c, start, count, operations, device, dtype):
        world = ranks()[1]
        parameters = sum(p.numel() for p in model.parameters())            # of all ranks together
        self.path, self.c, self.device, self.counted = out / f"{stage}.csv", c, device, 0
        self.announcement = (f"{stage}: {parameters / 1e6:.1f}M parameters, {{}} more steps of "
                             f"{c.batch_size} images on {world} x {device} {precision_name(dtype)} in "
                             f"{count} micro-batches of {c.batch_size // world // count}; {{:.3g}} s per "
                             "step, {} at this speed")
        self.fastest = world * matrix_rate(device, dtype, 0.3) / operations            # images per second
        if ranks()[0] == 0:
            self.begin_file(start)
        self.begin_row()

    def begin_file(self, start):
        """Takes over what a resumed run has logged up to its state; lines cut short are left out."""
        lines = self.path.read_text(errors="replace").splitlines() if start and self.path.exists() else []
        self.columns = lines[0].split(",") if lines and lines[0].startswith("step,") else []
        if lines and not self.columns:
            print(f"WARNING: {self.path} holds no steps; a new log begins", file=sys.stderr)
            return self.path.replace(f"{self.path}.damaged")
        if not self.columns:
            return self.path.unlink(missing_ok=True)
        rows = [line.split(",") for line in lines[1:] if line.count(",") == lines[0].count(",")]
        kept = [row for row in rows if row[0].isdecimal() and int(row[0]) <= start]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(",".join(row) + "\n" for row in [self.columns, *kept]))

    def begin_row(self):
        self.seconds = self.images = self.unreadable = 0
        self.mark = time.perf_counter()

    def count(self, done, unreadable=0):
        """To be called after each step; unreadable: how many of its files were."""
        self.counted += 1
        if self.counted <= 3:
            synchronize(self.device)
        seconds = time.perf_counter() - self.mark
        self.mark += seconds
        self.seconds += seconds
        self.images += self.c.batch_size
        self.unreadable += unreadable
        if self.counted == 3:                  # the first ones compile, and fill caches
            left = self.c.steps - done
            tqdm.write(self.announcement.format(left, seconds, tqdm.format_interval(left * seconds)))

    def write(self, step, by_depth, **terms):
        """Adds a row and prints it, called by all ranks together. terms: numbers, or None; by_depth: {name:
        (D,)}, columns NAME_1 .. NAME_D. The first row of a file decides its columns."""
        rate = self.images / self.seconds
        unreadable = total(torch.tensor(self.unreadable, device=self.device)).item()
        speed = {"images_per_s": rate, "mfu": rate / self.fastest, "unreadable": unreadable}
        row = {"step": step, **terms, **speed}
        shown = [f"{name} {value:.4g}" for name, value in {**terms, **speed}.items() if value]
        for name, values in by_depth.items():
            row |= {f"{name}_{d}": value.item() for d, value in enumerate(values, 1)}
            shown.append(f"{name}_1..{len(values)} {' '.join(f'{v:.3g}' for v in values)}")
        tqdm.write(f"step {step} {' '.join(shown)}")
        if ranks()[0] == 0:
            with open(self.path, "a") as f:
                if not self.columns:
                    self.columns = list(row)
                    print(*self.columns, sep=",", file=f)
                print(*("" if row.get(name) is None else row[name] for name in self.columns), sep=",", file=f)
        self.begin_row()

    def end_step(self, look):
        """After a `look` draws OUT/plots.png, where matplotlib is installed; if it fails, training goes on.
        What came after `count`, looking and saving, is left out of the speed."""
        if look and ranks()[0] == 0 and importlib.util.find_spec("matplotlib"):
            draw = [sys.executable, "-m", "tools.plots", self.path.parent.resolve()]
            if subprocess.run(draw, cwd=HERE, stdout=subprocess.DEVNULL).returncode:
                print("WARNING: plots.png was not drawn", file=sys.stderr)
        self.mark = time.perf_counter()
