"""Splits the model into ONNX graphs, checks them against PyTorch, and compiles them with TensorRT.

    python export.py                            # exported/: four ONNX graphs and manifest.json
    python sample.py --class 980 --backend onnx
    python export.py --trt                      # also TensorRT engines, on a machine with an NVIDIA GPU
    python sample.py --class 980 --backend trt

    spatial   codes (B, N, D), mask (B, N), cond (B, L), positions (B, n)   -> context (B, n, d_model)
    depth     h (P, d_model), stacks (P, D), position (1,), cache           -> logits (P, K), new keys and values for the cache
    decoder   codes (B, N, D)                                               -> images (B, 3, S, S)
    encoder   images (B, 3, S, S)                                           -> codes (B, N, D)

Dynamic are B pictures or P selected positions, the rows of a graph, and the n positions selected in each picture; `depth`
is called D times for each stack. The loop of Draft-and-Revise, and
every random number, stay in Python (drr.py): one loop for all backends, and the same seed gives the same picture.
"""
import argparse
import contextlib
import copy
import ctypes
import gc
import hashlib
import io
import json
import logging
import os
import shutil
import signal
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from support import backends
import drr
from support.common import BUNDLED, HERE, peak_ram, random_checkpoint, run, sampling_values
from drr import UserError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The largest difference to PyTorch in float32 that a graph may show. DEVIATION from 1e-4 everywhere: it is absolute for
# outputs of ordinary size and 1e-5 standard deviations for large ones, since the context of a trained model may reach
# hundreds, where float32 itself is no finer than 2e-5. In lower precision it is in standard deviations. Decoder and encoder always
# are float32. The encoder's output is codes: the share that differs, as a near tie may fall either way.
BOUNDS = {"decoder": 5e-4, "encoder": 0.01, "fp32": 1e-4, "fp16": 0.05, "bf16": 0.3}


# === The graphs: PyTorch modules whose forward is what is exported ==================================================
class Spatial(nn.Module):
    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer

    def forward(self, codes, mask, cond, positions):
        return self.transformer.context(codes, mask, cond, positions)


class DepthStep(nn.Module):
    """`ContextualRQTransformer.depth_step` with `position` as a tensor, (1,), and a cache of fixed size, so that one graph
    serves all D steps: of the cache it sees what lies before its position, and what is to be written there it returns."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer
        self.register_buffer("depths", torch.arange(transformer.depth), persistent=False)

    def forward(self, h, stacks, position, cache):
        t, P = self.transformer, h.shape[0]
        v = h
        if t.depth > 1:
            earlier = (self.depths < position)[:, None].to(h.dtype)         # (D, 1): the codes chosen so far
            e = (F.embedding(stacks, t.codebook) * earlier).sum(1)
            v = torch.where(position == 0, h, t.w_depth(e))
        v = v + t.depth_pos[position]                                       # (P, d_model)
        bias = torch.where(self.depths < position, 0.0, -1e4).to(h.dtype)   # (D,): the cache from here on is not seen
        old, new = cache.flatten(0, 1).unbind(), []                         # keys and values of the first block, of the second, ...
        for block, keys, values in zip(t.depthwise, old[::2], old[1::2]):   # (P, heads, D, head_dim)
            q, key, value = block.qkv(block.ln1(v)).view(P, 3, t.heads, 1, t.head_dim).unbind(1)
            q = q * t.head_dim ** -0.5
            scores = torch.cat([q @ keys.transpose(-2, -1) + bias, (q * key).sum(-1, keepdim=True)], -1)
            p = scores.softmax(-1)                                          # (P, heads, 1, D + 1): those before, and itself
            v = v + block.proj((p[..., :-1] @ values + p[..., -1:] * value).view(P, -1))
            v = v + block.fc2(F.gelu(block.fc1(block.ln2(v))))
            new += [key, value]
        return t.classifier(t.ln(v)).float(), torch.stack(new).view(-1, 2, P, t.heads, t.head_dim)


class Decoder(nn.Module):
    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, codes):
        return self.vae.decode(codes)


class Encoder(Decoder):
    def forward(self, images):
        return self.vae.encode(images)


class Float32Norm(nn.Module):
    """A normalization that computes in float32 whatever comes in."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm.float()

    def forward(self, x):
        return self.norm(x.float()).to(x.dtype)


class Rows(nn.Linear):
    """A linear layer as one product of two matrices: ONNX Runtime adds the bias of those in the same pass."""

    def forward(self, x):
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def for_export(transformer, dtype):
    """A copy of the transformer in `dtype`, its normalizations in float32 and the spatial blocks' linear layers as `Rows` (but
    for the last `qkv`, which `Block` takes apart). In float32 it shares the weights."""
    weights = {} if dtype != torch.float32 else {id(t): t for t in (*transformer.parameters(), *transformer.buffers())}
    transformer = copy.deepcopy(transformer, weights).to(dtype)
    for module in transformer.spatial.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = Rows
    for module in list(transformer.modules()) if dtype != torch.float32 else ():
        for name, child in module.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, Float32Norm(child))
    return transformer


def source_hash():
    """The code that makes the graphs: with other code a set is out of date."""
    return hashlib.sha256(b"".join((HERE / name).read_bytes() for name in ("drr.py", "export.py"))).hexdigest()


def describe(vae, transformer, info, precision, max_batch):
    """The manifest without its hashes: what the graphs are, and their inputs and outputs as [name, shape, type]. The
    dimensions with names, in a shape, are dynamic, from 1 to `most`."""
    t, (K, _) = transformer, transformer.codebook.shape
    N, D, d, S = t.positions, t.depth, t.ln.weight.numel(), vae.size
    kind = str(DTYPES[precision]).removeprefix("torch.")
    cache = [len(t.depthwise), 2, "rows", t.heads, D, t.head_dim]
    codes, images = ["codes", ["rows", N, D], "int64"], ["images", ["rows", 3, S, S], "float32"]
    pictures, guided = max_batch, 2 * max_batch                     # guidance doubles the transformer's batch
    graphs = {
        "spatial": {"opset": 20, "most": {"rows": guided, "selected": N},
                    "inputs": [codes, ["mask", ["rows", N], "bool"], ["cond", ["rows", t.cond_length], "int64"],
                               ["positions", ["rows", "selected"], "int64"]],
                    "outputs": [["context", ["rows", "selected", d], kind]]},
        "depth": {"opset": 20, "most": {"rows": guided * N},
                  "inputs": [["h", ["rows", d], kind], ["stacks", ["rows", D], "int64"], ["position", [1], "int64"],
                             ["cache", cache, kind]],
                  "outputs": [["logits", ["rows", K], "float32"], ["new", cache[:4] + cache[5:], kind]]},
        "decoder": {"opset": 22, "most": {"rows": pictures}, "inputs": [codes], "outputs": [images]},
        "encoder": {"opset": 22, "most": {"rows": pictures}, "inputs": [images], "outputs": [codes]}}
    for name, graph in graphs.items():
        graph["file"] = f"{name}.onnx"
    return {"version": backends.MANIFEST_VERSION, "source": source_hash(), "precision": precision, "max_batch": max_batch,
            "checkpoint": {"vae": drr.fingerprint(vae), "transformer": drr.fingerprint(transformer)},
            "model": {"size": S, "side": vae.side, "positions": N, "depth": D, "null": t.null, "cond_length": t.cond_length,
                      "n_depth": len(t.depthwise), "heads": t.heads, "head_dim": t.head_dim},
            "vae": vars(info.vae), "transformer": vars(info.transformer), "sample": vars(info.sample),
            "classes": info.classes, "titles": info.titles, "graphs": graphs}


# === Writing: module -> DIR/NAME.onnx and NAME.onnx.data ============================================================
def example(graph, size, model, codebook_size, seed=0):
    """Inputs of a graph with `size` rows, or as many as it takes: random codes, masks, conditions and positions, normal
    numbers for the rest."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for name, shape, dtype in graph["inputs"]:
        sizes = {"rows": size, "selected": size + 2}               # unlike, so that none can pass for the other
        shape = [min(sizes[n], graph["most"][n]) if isinstance(n, str) else n for n in shape]
        if dtype == "int64":
            high = {"cond": model["null"] + 1, "position": 1, "positions": model["positions"]}.get(name, codebook_size)
            result.append(torch.randint(high, shape, generator=generator))
        elif dtype == "bool":
            result.append(torch.rand(shape, generator=generator) < 0.5)
        else:
            result.append(torch.randn(shape, generator=generator).to(getattr(torch, dtype)))
    return result


def write_graph(module, graph, inputs, directory):
    """torch.onnx.export with dynamic dimensions; weights go to a second file beside the graph."""
    dims = {name: torch.export.Dim(name, min=1, max=most) for name, most in graph["most"].items()
            if most > 1}                                                         # --max-batch 1: not dynamic
    dynamic = tuple({i: dims[n] for i, n in enumerate(shape) if n in dims} for _, shape, _ in graph["inputs"])
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, tuple(inputs), directory / graph["file"], dynamo=True, opset_version=graph["opset"],
                          input_names=[name for name, _, _ in graph["inputs"]],
                          output_names=[name for name, _, _ in graph["outputs"]],
                          dynamic_shapes=dynamic, external_data=True, verbose=False)


# === Checking: the same inputs through ONNX Runtime and through PyTorch in float32 ==================================
@torch.inference_mode()
def compare(name, run_graph, graph, vae, transformer, model, size):
    """The largest difference between a graph and PyTorch in float32, and the standard deviation of PyTorch's output."""
    K = len(transformer.codebook)
    inputs = example(graph, size, model, K)
    if name == "spatial":
        ours, theirs = run_graph(*inputs)[0], transformer.context(*inputs)
    elif name == "depth":                                          # all depths of a stack, through the cache
        h, stacks, _, cache = inputs
        cache, logits = torch.zeros_like(cache), []
        for d in range(model["depth"]):
            step, cache[..., d, :] = run_graph(h, stacks, torch.tensor([d]), cache)
            logits.append(step)
        ours, theirs = torch.stack(logits, 1), transformer.depth_logits(h.float(), stacks)
    elif name == "decoder":
        ours, theirs = run_graph(*inputs)[0], vae.decode(*inputs)
    else:                                                          # pictures, not noise: what random codes decode to
        images = vae.decode(torch.randint(K, (len(inputs[0]), model["positions"], model["depth"]),
                                          generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
        return (run_graph(images)[0] != vae.encode(images)).float().mean().item(), 1.0
    difference = (ours.float() - theirs).abs().max().item()
    if not ours.isfinite().all():
        difference = float("inf")
    return difference, theirs.std().item()


def verify(name, directory, manifest, vae, transformer, sizes=(1, 2, 5)):
    """onnx.checker in full, then `compare` at several sizes. Records the largest difference in the manifest and
    returns a line about it; raises UserError when it is over the bound."""
    import onnx

    graph, precision = manifest["graphs"][name], manifest["precision"]
    try:
        onnx.checker.check_model(directory / graph["file"], full_check=True)
    except Exception as error:                                     # onnx's own exceptions share no base class
        raise UserError(f"The exported {name} graph is no valid ONNX ({error}); nothing was written.") from None
    lowered_graph = precision != "fp32" and name in ("spatial", "depth")
    device = torch.device("cpu")
    if lowered_graph and precision == "bf16":                      # ONNX Runtime has bf16 on a GPU only
        if not torch.cuda.is_available():
            graph["max_difference"] = None
            return f"{name}: checked, but not compared with PyTorch: without a GPU, ONNX Runtime has no bf16"
        device = torch.device("cuda")
    session = backends.OrtGraph(directory, manifest, name, device)

    def run_graph(*inputs):
        return [x.cpu() for x in session(*(x.to(device) for x in inputs))]

    rows = sorted({min(n, graph["most"]["rows"]) for n in sizes})
    results = [compare(name, run_graph, graph, vae, transformer, manifest["model"], n) for n in rows]
    scale = max(s for _, s in results) if lowered_graph else max(1.0, max(s for _, s in results) / 10)
    difference, bound = max(d for d, _ in results), BOUNDS.get(name, BOUNDS[precision]) * scale
    graph["max_difference"] = difference
    what = "of all codes differ" if name == "encoder" else "largest difference to PyTorch"
    line = f"{name}: {difference:.1e} {what} (rows {', '.join(map(str, rows))}; bound {bound:.1e})"
    if not difference <= bound:
        raise UserError(f"The exported graph does not do what PyTorch does, nothing was written: {line}.")
    return line


# === All or nothing: DIR beside the old one, then one rename ========================================================
def swap_in(new, directory):
    """Puts the folder `new` in the place of `directory` in one step; what was there ends under the name `new`."""
    if not directory.exists():
        return os.rename(new, directory)
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    here, flag = -100, 2                                           # AT_FDCWD, RENAME_EXCHANGE
    if exchange is None or exchange(here, os.fsencode(new), here, os.fsencode(directory), flag):
        old = directory.with_name(f".{directory.name}.old")        # no exchange on this system: two renames
        os.rename(directory, old)
        try:
            os.rename(new, directory)
        except OSError:
            os.rename(old, directory)
            raise
        os.rename(old, new)


def clean_up(directory):
    """Mends and removes what exports into this folder left behind that were killed."""
    old = directory.with_name(f".{directory.name}.old")
    if old.exists() and not directory.exists():                    # killed between the two renames
        os.rename(old, directory)
    shutil.rmtree(old, ignore_errors=True)
    for path in directory.parent.glob(f".{directory.name}.*.partial"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and (int(pid) == os.getpid() or not is_running(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def is_running(pid):
    try:
        os.kill(pid, 0)                                            # signal 0 only asks
    except OSError as error:
        return isinstance(error, PermissionError)                  # it runs, and is another user's
    return True


def check_target(directory):
    """Nothing but an earlier export is ever replaced."""
    ours = {"manifest.json", *(f"{graph}.onnx{suffix}" for graph in backends.GRAPHS for suffix in ("", ".data"))}
    if directory.exists() and (not directory.is_dir() or {p.name for p in directory.iterdir()} - ours):
        raise UserError(f"{directory} exists and holds other things than an exported model; give --out another folder.")


def export(vae, transformer, info, directory, precision, max_batch):
    """Writes and verifies all graphs and the manifest as the folder `directory`; what was there before stays until all is
    complete. Raises UserError when a graph differs from PyTorch, or cannot be written."""
    check_target(directory)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    manifest = describe(vae, transformer, info, precision, max_batch)
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise UserError(f"Exporting needs onnx, onnxscript and onnxruntime ({error}); "
                        "pip install -r requirements-export.txt.") from None
    manifest["versions"] = {m.__name__: m.__version__ for m in (torch, onnx, onnxscript, onnxruntime)}
    for name in ("onnxscript", "torch.onnx"):                      # their warnings are about packages that nothing here uses
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        clean_up(directory)
        partial.mkdir()
        with tqdm(total=3 * len(backends.GRAPHS), desc="exporting", unit="step") as bar:
            for name, graph in manifest["graphs"].items():
                bar.set_postfix_str(f"{name}: writing")
                t = for_export(transformer, DTYPES[precision]) if name in ("spatial", "depth") else None
                module = {"spatial": lambda: Spatial(t), "depth": lambda: DepthStep(t), "decoder": lambda: Decoder(vae),
                          "encoder": lambda: Encoder(vae)}[name]()
                write_graph(module.eval(), graph, example(graph, 3, manifest["model"], len(transformer.codebook)), partial)
                del module, t
                gc.collect()
                bar.update()
                bar.set_postfix_str(f"{name}: checking")
                tqdm.write(verify(name, partial, manifest, vae, transformer))
                bar.update()
                bar.set_postfix_str(f"{name}: hashing")
                graph["sha256"] = {p.name: backends.sha256(p) for p in sorted(partial.glob(f"{name}.onnx*"))}
                bar.update()
        manifest["digest"] = backends.digest(manifest)
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        swap_in(partial, directory)
    except OSError as error:
        raise UserError(f"{directory} could not be written ({error.strerror or error}); free some space or choose another "
                        "place; an earlier export is untouched.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


# === TensorRT: ONNX graph -> engine =================================================================================
def build_engines(directory, manifest, folder, level):
    """Builds the engines that are not in `folder` yet, one for each graph; what it takes is in `backends.engine_key`."""
    trt = backends.import_tensorrt()
    folder.mkdir(parents=True, exist_ok=True)
    for name in tqdm(backends.GRAPHS, desc="building engines", unit="engine"):
        key = backends.engine_key(trt, manifest, name, level)
        path = backends.plan_path(folder, name, key)
        record = path.with_suffix(".json")
        if backends.intact(path, key) is not None:
            tqdm.write(f"{name}: {path.name} is there")
            continue
        plan = build_engine(trt, directory / manifest["graphs"][name]["file"], manifest["graphs"][name], level,
                            folder / "timing.cache")
        with drr.replacing(path) as temporary:
            temporary.write_bytes(plan)
        with drr.replacing(record) as temporary:                   # last: a plan without its record is never loaded
            temporary.write_text(json.dumps({**key, "plan": hashlib.sha256(plan).hexdigest()}))
        tqdm.write(f"{name}: built {path.name}, {len(plan) / 2 ** 20:.0f} MiB")


def build_engine(trt, onnx_file, graph, level, timing_cache):
    """The bytes of a strongly typed engine: each layer has the precision that the ONNX graph says."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_file)):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise UserError(f"TensorRT {trt.__version__} cannot parse {onnx_file}: {errors}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 4 << 30)
    config.builder_optimization_level = level
    config.clear_flag(trt.BuilderFlag.TF32)                        # on by default; what is float32 shall be float32
    known = timing_cache.read_bytes() if timing_cache.exists() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)      # of another TensorRT or GPU
    for ranges in backends.profiles(graph):
        profile = builder.create_optimization_profile()
        for name, shape, _ in graph["inputs"]:
            profile.set_shape(name, *([ranges[n][i] if n in ranges else n for n in shape] for i in range(3)))
        if config.add_optimization_profile(profile) < 0:
            raise UserError(f"TensorRT {trt.__version__} refuses the shapes {ranges} of {onnx_file}.")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(f"TensorRT {trt.__version__} could not build an engine of {onnx_file}; its messages above say why.")
    timings = config.get_timing_cache()
    with drr.replacing(timing_cache) as temporary:
        temporary.write_bytes(bytes(timings.serialize()))
    return bytes(plan)


# === --bench: seconds per image of each backend =====================================================================
def bench_worker(connection, backend, args):
    """One backend in a process of its own, so that its memory is its own: decodes whenever it is told to."""
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = backend != "torch fp32"       # the other backends do without, in float32
    if backend.startswith("torch"):
        vae, transformer, info = load_model(args)
        model = drr.TorchModel(vae, transformer, device, DTYPES[backend.split()[1]])
        length = transformer.cond_length
    else:
        model, info = backends.load(backend.split()[0], args.out, device)
        backends.leave_cores_free(device)
        length = model.cond_length
    c = sampling_values(info.sample, (), model.positions)
    while True:
        batch, t_draft = connection.recv()
        c.t_draft = min(t_draft, model.positions)
        noise = drr.draw_noise(0, range(batch), 1 + c.rounds, model.positions, model.depth)
        cond = torch.zeros(batch, length, dtype=torch.int64, device=device)
        started = time.perf_counter()
        *_, last = drr.draft_and_revise(model, cond, noise, c)
        model.decode(last.codes).cpu()                              # waits for the device
        connection.send((time.perf_counter() - started, memory_used(device)))


def memory_used(device):
    """Bytes: on a CPU the peak of this process, on a GPU what is in use on the whole device."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return total - free
    return peak_ram()


def start_worker(args, kind):
    """The backend's process, and the pipe to it."""
    context = torch.multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=run_worker, args=(there, kind, args), daemon=True).start()
    there.close()
    return here


def run_worker(*arguments):
    with contextlib.suppress(EOFError):                             # the parent is done
        run(lambda: bench_worker(*arguments))


def ask(connection, kind, *task):
    try:
        connection.send(task)
        return connection.recv()
    except (EOFError, OSError):
        raise UserError(f"The backend {kind} failed; what it said stands above.") from None


def bench(args, manifest, kinds):
    """Prints a table: each backend's median of `args.repeat` decodes, taken in turns, beside the first backend's."""
    cuda = torch.cuda.is_available()
    batches = sorted({1, min(16, manifest["max_batch"]), manifest["max_batch"] if cuda else 1})
    workers, resident = {kind: start_worker(args, kind) for kind in kinds}, 0
    memory = {}
    for kind, connection in workers.items():                        # one after the other: on a GPU each adds its own share
        used = ask(connection, kind, batches[-1], 8)[1]
        memory[kind], resident = used - resident, used if cuda else 0
    print(f"{'cuda' if cuda else 'cpu'}, {args.threads} threads, torch {torch.__version__}; memory at batch {batches[-1]}")
    print(f"backend, precision  batch  T_draft  s per image  images per s    memory  {kinds[0]} / this")
    for batch in batches:
        for t_draft in (8, 64):
            times = {kind: [] for kind in kinds}
            for trial in range(1 + args.repeat):                    # the first is the warm-up
                for kind, connection in workers.items():
                    times[kind].append(ask(connection, kind, batch, t_draft)[0])
            for kind in kinds:
                seconds = statistics.median(times[kind][1:])
                ratio = statistics.median(a / b for a, b in zip(times[kinds[0]][1:], times[kind][1:]))
                print(f"{kind:18}  {batch:5}  {t_draft:7}  {seconds / batch:11.4f}  {batch / seconds:12.2f}  "
                      f"{memory[kind] / 2 ** 20:4.0f} MiB  {ratio:10.2f}", flush=True)


# === Command line ===================================================================================================
def load_model(args):
    """The checkpoint, or with --random a preset's model with random weights and 1,000 classes."""
    if not args.random:
        return drr.load_checkpoint(args.checkpoint or BUNDLED)
    return random_checkpoint(args.random)


def fitting_export(args, vae, transformer, info):
    """The manifest in --out if it is the export that is asked for, undamaged, by this code and torch; else None."""
    try:
        manifest = backends.read_manifest(args.out)
    except UserError:
        return None
    wanted = json.loads(json.dumps(describe(vae, transformer, info, args.precision, args.max_batch)))
    same = all(manifest.get(key) == value for key, value in wanted.items() if key != "graphs")
    return manifest if same and manifest["versions"]["torch"] == torch.__version__ else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", help="what to export (the bundled checkpoint)")
    add("--random", metavar="PRESET", help="a preset of config.yaml with random weights instead, to measure its speed")
    add("--out", type=Path, metavar="DIR", default=Path("exported"), help="where the graphs go, all or nothing (exported)")
    add("--precision", choices=list(DTYPES), default="fp32", help="of the transformers; decoder and encoder stay in fp32")
    add("--max-batch", type=int, default=64, metavar="N", help="most pictures at a time (64)")
    add("--trt", action="store_true", help="build TensorRT engines too, in OUT-engines; an export that fits is used as it is")
    add("--level", type=int, default=3, choices=range(6), help="TensorRT's optimization level (3)")
    add("--bench", action="store_true", help="measure all backends; an export that fits is used as it is")
    add("--repeat", type=int, default=3, metavar="R", help="decodes per row of --bench; the median counts (3)")
    args = parser.parse_args()
    if not 1 <= args.repeat <= 1000:
        raise UserError(f"--repeat is {args.repeat}; expected a number from 1 to 1000.")
    if not 1 <= args.max_batch <= 4096:
        raise UserError(f"--max-batch is {args.max_batch}; expected a number from 1 to 4096.")
    if args.random and args.checkpoint:
        raise UserError("Give --checkpoint or --random, not both.")
    args.out, args.threads = args.out.resolve(), torch.get_num_threads()
    engines = backends.engine_folder(args.out)
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # so that a stopped export cleans up after itself
    vae, transformer, info = load_model(args)
    manifest = fitting_export(args, vae, transformer, info) if args.trt or args.bench else None
    if manifest:
        print(f"{args.out}/ is up to date")
    else:
        manifest = export(vae, transformer, info, args.out, args.precision, args.max_batch)
        size = sum(p.stat().st_size for p in args.out.iterdir())
        print(f"{', '.join(g['file'] for g in manifest['graphs'].values())}: {size / 2 ** 20:.0f} MiB -> {args.out}/")
    del vae, transformer
    if args.trt:
        build_engines(args.out, manifest, engines, args.level)
        print(f"engines -> {engines}/")
    if args.bench:
        cuda = torch.cuda.is_available()
        kinds = ["torch bf16", "torch fp32"] if cuda else ["torch fp32", "torch bf16"]
        if cuda or args.precision != "bf16":                       # ONNX Runtime has no bf16 on a CPU
            kinds.append(f"onnx {args.precision}")
        bench(args, manifest, kinds + ([f"trt {args.precision}"] if args.trt else []))


if __name__ == "__main__":
    run(main)
