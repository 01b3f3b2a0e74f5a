"""An exported model in the place of the PyTorch networks: ONNX Runtime and TensorRT behind drr.py's loop.

    model, info = backends.load("onnx", "exported", torch.device("cpu"))
    codes = drr.sample(model, cond, seed, range(16), info.sample)
    images = model.decode(codes)

`export.py` writes what is loaded here: four parts of the model as ONNX files, and manifest.json, which says
what each takes and returns and what its bytes must be. Inputs and outputs are torch tensors on one device.
"""
import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from drr import UserError

PARTS = ("spatial", "depth", "decoder", "encoder")
MANIFEST_VERSION = 3
# onnx.TensorProto's numbers
ONNX_TYPES = {"float32": 1, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}


# === The manifest: DIR -> what the parts are, every byte checked against damage =============================
def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(values):
    """SHA-256 over a dictionary, but for what it says is its digest."""
    rest = {key: value for key, value in values.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(directory):
    """manifest.json of a folder, as a dictionary; UserError unless all of it has the recorded hashes. They
    find damage and mistakes, not forgery: who writes files can write their hashes, too."""
    path = Path(directory) / "manifest.json"
    if not path.exists():
        raise UserError(f"{directory} holds no exported model; run python export.py --out {directory}.")
    again = f"export it again with python export.py --out {directory}"
    try:
        manifest = json.loads(path.read_text())
        version = manifest.get("version")
    except (ValueError, AttributeError):                     # no JSON, or no dictionary
        version = None
    if version != MANIFEST_VERSION:
        raise UserError(f"{path} is damaged or of version {version}, not {MANIFEST_VERSION}; {again}.")
    if manifest.get("digest") != digest(manifest):
        raise UserError(f"{path} was changed after the export; {again}.")
    for part in manifest["parts"].values():
        for name, expected in part["sha256"].items():
            file = Path(directory) / name
            if not file.is_file() or sha256(file) != expected:
                raise UserError(f"{file} is missing, or was changed after the export; {again}.")
    return manifest


def load(backend, directory, device):
    """The exported model of a folder, and what `drr.load_checkpoint` calls info. backend: "onnx" (on cpu or
    cuda) or "trt" (cuda), whose engines lie in `engine_folder(directory)`. UserError where a runtime, a
    provider or an engine is missing, and from `read_manifest`."""
    # The one race that is left: an export that replaces this one removes files that are being read here. It
    # ends in a UserError about a file that is missing or cannot be loaded; the next call works.
    manifest = read_manifest(directory)
    if backend == "onnx":
        parts = {name: OnnxSession(directory, manifest["parts"][name], device) for name in PARTS}
        if device.type == "cpu":
            # Torch's threads spin while they wait, on cores that the sessions need, which have as many now.
            torch.set_num_threads(1)
    else:
        trt = import_tensorrt()
        if device.type != "cuda":
            raise UserError("TensorRT runs on a GPU only; leave --device out or give --device cuda.")
        folder = engine_folder(directory)
        plans = {name: read_plan(trt, folder, manifest, name) for name in PARTS}
        parts = {name: TensorRTEngine(trt, plans[name], name, manifest["parts"][name], device)
                 for name in PARTS}
    sections = {name: SimpleNamespace(**manifest[name]) for name in ("vae", "transformer", "sample")}
    info = SimpleNamespace(classes=manifest["classes"], titles=manifest["titles"], **sections)
    return ExportedModel(parts, manifest, device), info


# === The model: what TorchModel does, by the exported parts =================================================
class ExportedModel:
    """What drr.TorchModel's docstring lists, and `context_step` of kinds that draw one stack after the other.
    parts: {name: callable from tensors to a list of tensors}."""

    def __init__(self, parts, manifest, device):
        self.parts, self.device = parts, device
        vars(self).update(manifest["model"])                 # size, side, positions, depth, null, ...
        self.precision, self.max_batch = manifest["precision"], manifest["max_batch"]
        self.checkpoint = manifest["checkpoint"]             # fingerprints of what was exported
        self.steps = [torch.tensor([d], device=device) for d in range(self.depth)]

    def padded(self, name, *tensors):
        """Tensors (rows, ...), filled up with zeros to a power of two, so that few shapes occur: TensorRT has
        a CUDA graph for each. No row looks at another: this changes nothing but rounding."""
        rows, largest = len(tensors[0]), self.parts[name].part["max_sizes"]["rows"]
        if rows > largest:
            raise UserError(f"The exported {name} part takes at most {largest} rows and got {rows}; sample "
                            f"{self.max_batch} pictures at a time, or export with a larger --max-batch.")
        size = bucket(rows, largest)
        return [t if size == rows else F.pad(t, (0, 0) * (t.dim() - 1) + (0, size - rows)) for t in tensors]

    @torch.inference_mode()
    def context(self, codes, mask, cond, positions=None):
        if positions is None:
            positions = torch.arange(self.positions, device=codes.device).expand(len(codes), -1)
        B, n = positions.shape
        positions = F.pad(positions, (0, bucket(n, self.positions) - n))
        return self.parts["spatial"](*self.padded("spatial", codes, mask, cond, positions))[0][:B, :n]

    @torch.inference_mode()
    def context_step(self, stack, cond, t, cache):
        """As RQTransformer's."""
        rows = len(stack)
        stack, cond = self.padded("spatial", stack, cond)
        if t == 0:
            _, shape, dtype = self.parts["spatial"].part["inputs"][-1]
            shape = [len(stack) if n == "rows" else n for n in shape]
            cache = torch.zeros(shape, dtype=getattr(torch, dtype), device=stack.device)
        position = torch.tensor([t], device=stack.device)
        h, cache[..., t, :] = self.parts["spatial"](stack, cond, position, cache)
        return h[:rows].clone(), cache

    @torch.inference_mode()
    def depth_step(self, h, stacks, d, cache):
        P = len(h)
        h, stacks = self.padded("depth", h, stacks)
        if d == 0:
            cache = h.new_zeros(self.n_depth, 2, len(h), self.heads, self.depth, self.head_dim)
        logits, cache[..., d, :] = self.parts["depth"](h, stacks, self.steps[d], cache)
        return logits[:P], cache

    @torch.inference_mode()
    def decode(self, codes):
        return self.parts["decoder"](*self.padded("decoder", codes))[0][:len(codes)].clone()

    @torch.inference_mode()
    def encode(self, images):
        return self.parts["encoder"](*self.padded("encoder", images))[0][:len(images)].clone()


def bucket(n, largest):
    """The next power of two, and at most `largest`."""
    return min(2 ** math.ceil(math.log2(n)), largest)


def empty_outputs(inputs, part):
    """Tensors for what a part returns, on the inputs' device and with their dynamic sizes."""
    sizes = {}
    for x, (name, shape, dtype) in zip(inputs, part["inputs"], strict=True):
        assert x.dtype == getattr(torch, dtype), f"{name} is {x.dtype}, the exported part expects {dtype}"
        sizes.update(zip(shape, x.shape))                    # "rows": 16, and of a fixed dimension 64: 64
    device = inputs[0].device
    return [torch.empty([sizes.get(n, n) for n in shape], dtype=getattr(torch, dtype), device=device)
            for _, shape, dtype in part["outputs"]]


# === ONNX Runtime ===========================================================================================
class OnnxSession:
    """One part in an ONNX Runtime session. It reads and writes torch's own memory (IO binding)."""

    def __init__(self, directory, part, device):
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise UserError(f"--backend onnx needs onnxruntime ({error}); "
                            "pip install -r requirements-export.txt.") from None
        self.part, self.device = part, device
        types = {dtype for _, _, dtype in part["inputs"] + part["outputs"]}
        if device.type == "cpu" and "bfloat16" in types:
            raise UserError("ONNX Runtime has no bf16 on a CPU; use --device cuda, or export in fp32.")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Four sessions and torch share the cores: threads may spin within a run, and not between runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        provider = "CPUExecutionProvider"
        settings = {}
        if device.type == "cuda":
            # A stream of our own: torch's default one has the number 0, which means "none" to ONNX Runtime.
            self.stream = torch.cuda.Stream(device)
            provider = "CUDAExecutionProvider"
            settings = {"device_id": device.index or 0, "use_tf32": "0",
                        "user_compute_stream": str(self.stream.cuda_stream)}
        file = Path(directory) / part["file"]
        try:
            self.session = ort.InferenceSession(file, options, providers=[(provider, settings)])
        except Exception as error:                           # onnxruntime's exceptions share no base class
            raise UserError(f"ONNX Runtime cannot load {file}: {error}") from None
        if self.session.get_providers()[0] != provider:      # it fell back to the CPU, with a line in its log
            raise UserError("ONNX Runtime has no working CUDA provider here; install onnxruntime-gpu and its "
                            "CUDA libraries, or use --device cpu.")

    def __call__(self, *inputs):
        inputs = [x.contiguous() for x in inputs]
        outputs = empty_outputs(inputs, self.part)
        binding = self.session.io_binding()
        place = (self.device.type, self.device.index or 0)
        for x, (name, _, dtype) in zip(inputs, self.part["inputs"]):
            binding.bind_input(name, *place, ONNX_TYPES[dtype], list(x.shape), x.data_ptr())
        for x, (name, _, dtype) in zip(outputs, self.part["outputs"]):
            binding.bind_output(name, *place, ONNX_TYPES[dtype], list(x.shape), x.data_ptr())
        try:
            if self.device.type == "cuda":
                self.stream.wait_stream(torch.cuda.current_stream(self.device))
            self.session.run_with_iobinding(binding)
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).wait_stream(self.stream)
        except Exception as error:                           # most often because the memory is full
            raise UserError(f"ONNX Runtime failed in {self.part['file']} ({error}); "
                            "sample fewer pictures at a time.") from None
        return outputs


# === TensorRT: ONNX file -> engine ("plan") -> CUDA graphs ==================================================
def import_tensorrt():
    try:
        import tensorrt
    except Exception as error:                               # not installed, or its libraries do not load
        raise UserError(f"TensorRT cannot be imported ({error}); pip install tensorrt (its libraries come "
                        "from NVIDIA's package index), or use --backend onnx.") from None
    if not torch.cuda.is_available():
        raise UserError("TensorRT needs an NVIDIA GPU that PyTorch sees; use --backend onnx.")
    if tuple(map(int, tensorrt.__version__.split(".")[:2])) < (10, 9):
        raise UserError(f"TensorRT {tensorrt.__version__} is too old; install 10.9 or newer.")
    return tensorrt


def engine_folder(directory):
    """Beside the exported folder, since engines outlive the export that they were built from."""
    return Path(f"{Path(directory).resolve()}-engines")


def profiles(name, part):
    """What an engine is optimized for, few rows and many: [min, opt, max] of each dynamic dimension."""
    largest = part["max_sizes"]
    others = {dimension: [1, max(1, n // 8), n] for dimension, n in largest.items()}
    few, many = min(64 if name == "depth" else 4, largest["rows"]), largest["rows"]
    return [{**others, "rows": [1, max(1, few // 2), few]}, {**others, "rows": [1, max(1, many // 4), many]}]


def engine_key(trt, manifest, name, level):
    """All that an engine depends on."""
    part = manifest["parts"][name]
    return {"graph": list(part["sha256"].values()), "precision": manifest["precision"],
            "profiles": profiles(name, part), "level": level, "tensorrt": trt.__version__,
            "cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name(),
            "compute_capability": list(torch.cuda.get_device_capability())}


def plan_name(name, key, plan):
    """An engine's file: its part, a hash of what it was built for, and one of its bytes."""
    return f"{name}-{digest(key)[:16]}-{hashlib.sha256(plan).hexdigest()[:16]}.plan"


def find_plan(folder, name, key):
    """The bytes of the undamaged engine that was built for `key`, or None. A plan is a program, and its name
    is no signature: what lies in the folder is run."""
    for path in Path(folder).glob(f"{name}-{digest(key)[:16]}-*.plan"):
        plan = path.read_bytes()
        if path.name == plan_name(name, key, plan):
            return plan
    return None


def read_plan(trt, folder, manifest, name):
    """The bytes of a part's engine for this machine, of the highest level built; UserError without one."""
    for level in range(5, -1, -1):
        plan = find_plan(folder, name, engine_key(trt, manifest, name, level))
        if plan is not None:
            return plan
    raise UserError(f"{folder} has no engine of the {name} part for this export, TensorRT {trt.__version__} "
                    f"and this {torch.cuda.get_device_name()}; run python export.py --trt on this machine.")


class TensorRTEngine:
    """One part as a TensorRT engine. What it returns stays valid until the next call with the same shapes,
    which have buffers, execution context and CUDA graph of their own: a captured graph is undefined once its
    context has been given other shapes. Their scratch memory they share, since no two ever run at once."""

    def __init__(self, trt, plan, name, part, device):
        self.trt, self.name, self.part, self.device = trt, name, part, device
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        self.require(self.engine is not None, "load its engine")
        self.tensors = {self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)}
        self.scratch = {}                                    # profile: memory for the largest of its shapes
        self.prepared = {}                                   # what the inputs are -> what `prepare` returns

    def require(self, succeeded, task):
        if not succeeded:
            raise UserError(f"TensorRT could not {task} (the {self.name} part); is the GPU's memory full? If "
                            "not, delete the engine and run python export.py --trt again.")

    def __call__(self, *inputs):
        kinds = tuple((x.shape, x.dtype) for x in inputs)
        if kinds not in self.prepared:
            self.prepared[kinds] = self.prepare(inputs)
        cuda_graph, static_inputs, outputs, _ = self.prepared[kinds]
        for static, x in zip(static_inputs, inputs):
            static.copy_(x)
        cuda_graph.replay()
        return outputs

    def prepare(self, inputs):
        """CUDA graph, input and output buffers (aligned by torch) for these shapes; what must stay alive."""
        ranges = profiles(self.name, self.part)
        profile = next(i for i, sizes in enumerate(ranges) if len(inputs[0]) <= sizes["rows"][2])
        user_managed = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.engine.create_execution_context(user_managed)
        self.require(context is not None, "make an execution context")
        static_inputs = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
        outputs = empty_outputs(inputs, self.part)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.require(context.set_optimization_profile_async(profile, stream.cuda_stream), "set up")
            for x, (name, _, _) in zip(static_inputs, self.part["inputs"]):
                if name in self.tensors:                     # D = 1 leaves some inputs without a use
                    self.require(context.set_input_shape(name, tuple(x.shape)), f"take {name}'s shape")
            for x, (name, _, _) in zip(static_inputs + outputs, self.part["inputs"] + self.part["outputs"]):
                if name in self.tensors:
                    self.require(context.set_tensor_address(name, x.data_ptr()), f"take {name}'s address")
            if profile not in self.scratch:
                size = self.engine.get_device_memory_size_for_profile_v2(profile)
                self.scratch[profile] = torch.empty(size, dtype=torch.uint8, device=self.device)
            context.set_device_memory(self.scratch[profile].data_ptr(), self.scratch[profile].numel())
            self.require(context.execute_async_v3(stream.cuda_stream), "run")  # once before the capture
        stream.synchronize()
        cuda_graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(cuda_graph, stream=stream):
            self.require(context.execute_async_v3(stream.cuda_stream), "run while it was captured")
        return cuda_graph, static_inputs, outputs, context
