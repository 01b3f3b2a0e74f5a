"""What the scripts share besides the method itself: configuration, class names, errors, devices, pictures."""
import atexit
import contextlib
import difflib
import errno
import math
import os
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import yaml
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch.utils.benchmark import Timer

from drr import UserError, ranks, replacing
from support import models

HERE = Path(__file__).resolve().parent.parent
BUNDLED = HERE / "checkpoints" / "tiny-imagenet-32"


# === Configuration: config.yaml + overrides -> nested namespaces ============================================
# What a key's value may be: a number in a range, or one of some words. What is not listed here is above 0.
ALLOWED = {key: allowed for allowed, keys in {
    "from 0": "workers quantize_start commitment_weight perceptual_weight disc_weight disc_start disc_ramp "
              "disc_layers feature_weight micro_batch warmup grad_clip weight_decay muon_lr restart_below",
    "from 0 to 1": "balance ema_decay weights_ema cond_dropout",
    "from 0 to below 1": "betas dropout",
    "from 0 to 4398046511104": "seed",
    "from 0 to 65536": "top_k",
    "from 0 to 1000": "rounds",
    "from 0 to 100": "draft_guidance revise_guidance",
    "from 0.01 to 100": "draft_temperature revise_temperature",
    "from 1 to 10000": "views class_views",
    "from 1 to 8": "upscale",
    "from 1 to 65536": "codebook_size text_vocab",           # both are stored as uint16
    "above 0 to 1": "top_p crop_scale",
    "one of mse, l1": "loss",
    "one of lpips, efficientnet": "perceptual",
    "one of patchgan, spectral, unshuffled": "disc",
    "one of class, none, text": "cond",
    f"one of {', '.join(['contextual', *models.OTHERS])}": "kind",
}.items() for key in keys.split()}


def load_config(preset, overrides=(), sections=None):
    """The preset's values over the base's, with `section.key=value` overrides on top, as nested namespaces.

    Raises UserError for an unknown preset, section or key (naming the nearest known one), for a value that is
    not allowed, and for an override outside of `sections`, if only those are read.
    """
    document = yaml.safe_load((HERE / "config.yaml").read_text())
    presets, base = document["presets"], flatten(document["base"])
    values = {}
    while preset is not None:
        if preset not in presets:
            raise UserError(f"There is no preset {preset!r}; config.yaml has {', '.join(presets)}.")
        layer = dict(presets[preset])
        preset = layer.pop("like", None)
        values = {**flatten(layer), **values}
    for text in overrides:
        name, equals, value = text.partition("=")
        section = name.partition(".")[0]
        if not equals:
            raise UserError(f"{text!r} is not an override; write section.key=value, for example vae.lr=1e-4.")
        if sections and section in document["base"] and section not in sections:
            raise UserError(f"{text!r} has no effect where {', '.join(sections)} are read; leave it out.")
        values[name] = parse_value(text, value)
    for name in values:
        if name not in base:
            nearest = difflib.get_close_matches(name, base, 1, cutoff=0)[0]
            raise UserError(f"config.yaml has no key {name!r}; the nearest is {nearest!r}.")
    config = {section: SimpleNamespace() for section in document["base"]}
    for name, default in base.items():
        section, key = name.split(".")
        setattr(config[section], key, check_value(name, values.get(name, default), default))
    return SimpleNamespace(**config)


def flatten(sections):
    """{"vae": {"lr": 1}} -> {"vae.lr": 1}."""
    return {f"{section}.{key}": values[key] for section, values in sections.items() for key in values}


def sampling_values(info, overrides, positions):
    """The section `sample` of a checkpoint's `info` (or a configuration), with `key=value` overrides on top.

    A key that an older checkpoint lacks has config.yaml's value. Without classes nothing can be guided: both
    guidances are 1. Raises UserError for an unknown key, one given twice, and a value that is not allowed, or
    not for this kind of transformer, which may also take top_k and top_p as lists, one value for each depth.
    """
    kind = models.kind(info.transformer)
    base = yaml.safe_load((HERE / "config.yaml").read_text())["base"]["sample"]
    given = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or key not in base:
            raise UserError(f"{text!r} is not a sampling value; write key=value, one of {', '.join(base)}; "
                            "strategies other than the paper's are for tools.evaluate and tools.study.")
        if key in given:
            raise UserError(f"{key} is given twice, as {key}=value or by its flag; give it once.")
        given[key] = parse_value(text, value)
    values, found = {}, {**base, **vars(info.sample), **given}
    for key, like in base.items():
        by_depth = kind.by_depth and key in ("top_k", "top_p") and isinstance(found[key], list)
        values[key] = check_value(key, found[key], [like] if by_depth else like)
        if by_depth and len(values[key]) != info.vae.depth:
            raise UserError(f"{key} has {len(values[key])} values; expected one for all depths, or one for "
                            f"each of the {info.vae.depth}.")
    for key, value in kind.fixed.items():
        only = positions if value is None else value
        if key in given and values[key] != only:
            raise UserError(f"{key} is {values[key]}, but {kind.why}.")
        values[key] = only
    for key in ("t_draft", "t_revise"):
        if key in given and values[key] > positions:
            raise UserError(f"{key} is {values[key]}; expected at most {positions}, the number of positions.")
        values[key] = min(values[key], positions)            # the preset may be for a larger code map
    if info.transformer.cond == "none":
        values.update(draft_guidance=1.0, revise_guidance=1.0)
    return SimpleNamespace(**values)


def parse_value(text, value):
    """What stands in `value`, the right side of the override `text`, as strings: `check_value` converts."""
    try:
        return yaml.load(value, yaml.BaseLoader)             # to others 010 is 8, and 1:30 is 90
    except yaml.YAMLError:
        raise UserError(f"{text!r} has no plain value; write a number, a word or a list [1, 2].") from None


def check_value(name, value, like, allowed=None):
    """`value` in the type of `like`, the base's value: PyYAML reads 4e-5 as a string.

    allowed: a range or words; None: those of ALLOWED. Raises UserError for a value of another kind or range.
    """
    allowed = allowed or ALLOWED.get(name.rpartition(".")[2], "above 0")
    kind = {bool: "true or false", int: f"a whole number {allowed}", float: f"a number {allowed}",
            str: allowed, list: f"a list of numbers {allowed}"}[type(like)]
    try:
        if isinstance(like, list):
            if not isinstance(value, list) or not value or name.endswith("betas") and len(value) != 2:
                raise ValueError
            return [check_value(name, v, like[0], allowed) for v in value]
        if isinstance(like, str):
            if allowed.startswith("one of ") and value not in allowed.removeprefix("one of ").split(", "):
                raise ValueError
            return str(value)
        if isinstance(like, bool):
            return {"true": True, "false": False}[str(value).lower()]
        start, low, below, high = re.fullmatch(r"(from|above) (\S+)(?: to (below )?(\S+))?", allowed).groups()
        low, high = float(low), float(high or 1e18)
        exact = value if isinstance(value, int) else float(value)
        number = type(like)(exact)                           # 1e3 is a whole number, too
        excluded = start == "above" and number == low or below and number == high
        if isinstance(value, bool) or number != exact or not low <= number <= high or excluded:
            raise ValueError
        return number
    except (ValueError, TypeError, KeyError, OverflowError):
        raise UserError(f"{name} is {value!r}; expected {kind} (the default is {like}).") from None


# === Classes: what the user calls them -> indices ===========================================================
def find_class(text, classes, titles):
    """The index of the class that `text` names: a folder name, an index, a title, or a part of one title."""
    wanted = text.strip().lower().replace(" ", "_")
    if text.strip() in classes:                              # a folder may be called 10 and not be class 10
        return classes.index(text.strip())
    last = len(classes) - 1
    if re.fullmatch(r"-?[0-9]{1,9}", wanted):
        if not 0 <= int(wanted) <= last:
            raise UserError(f"Class {wanted} does not exist; this checkpoint has classes 0 to {last}.")
        return int(wanted)
    keys = [title.lower().replace(" ", "_") for title in titles]
    found = ([i for i, name in enumerate(classes) if wanted == name.lower()]
             or [i for i, key in enumerate(keys) if wanted == key]
             or [i for i, key in enumerate(keys) if wanted and wanted in key])
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(f"{i} {titles[i]}" for i in found[:12]) + ", ..." * (len(found) > 12)
        raise UserError(f"{text!r} fits {len(found)} classes; give the index of one: {listed}.")
    near = ", ".join(difflib.get_close_matches(wanted, keys, 3, cutoff=0.5))
    hint = f"did you mean {near}?" if near else f"give an index from 0 to {last}, a wnid or a name."
    raise UserError(f"There is no class {text!r}; {hint}")


def pick_conditions(text, texts, info, null):
    """--class or the list of --text -> conditions (C, L) int64 and their names. null: the null class's id."""
    cond = info.transformer.cond
    if texts and cond != "text":
        raise UserError("This checkpoint knows no texts; leave them out.")
    if text and cond != "class":
        raise UserError("This checkpoint knows no classes; leave --class out.")
    if cond == "none":
        return torch.tensor([[null]]), ["no class"]
    if cond == "text":
        from support.text import prompts
        return prompts(info, texts), [repr(text) for text in texts]
    if not text:
        raise UserError("Which class? Give --class an index, a wnid or a name (for example 980), or `none`.")
    names = [name.strip() for name in text.split(",")]
    if "none" in names and not models.kind(info.transformer).null:
        raise UserError("This checkpoint has no null class; give --class an index, a wnid or a name.")
    found = [null if name == "none" else find_class(name, info.classes, info.titles) for name in names]
    names = ["no class" if k == null else f"{info.titles[k]} ({k})" for k in found]
    return torch.tensor(found)[:, None], names


# === Errors: an exception -> one sentence and an exit status ================================================
def run(main):
    """Calls main(). A user's mistake, a full disk and the like end in one sentence and exit status 2, Ctrl-C
    in 130; anything else is a bug and keeps its traceback."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:                       # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))
        with contextlib.suppress(AttributeError):            # a class may be called Forêt, stdout be ASCII
            getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        main()
        if ranks()[1] > 1:
            dist.destroy_process_group()
            end_rank()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        with contextlib.suppress(FileExistsError):           # what all processes meet, one of them says
            if os.environ.get("TORCHELASTIC_ERROR_FILE"):    # torchrun's FOLDER/RANK/error.json
                Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parent.with_name("said").touch(exist_ok=False)
            print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)


def from_rank_0(value):
    """Rank 0's value, on every rank."""
    held = [value]
    if ranks()[1] > 1:
        dist.broadcast_object_list(held)
    return held[0]


def end_rank(status=0):
    """Ends a process of several: does what is registered for the end, prints what is still to be printed, and
    goes without taking the interpreter apart."""
    # A thread of gloo may let go of its tensors so late that the interpreter is ending: in Python up to 3.13
    # a SIGABRT, for a training that has succeeded (pytorch/pytorch#190489). destroy_process_group does not
    # wait for that thread while torch's caches for DTensor hold the group, which they do after fully_shard.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):       # its reader has gone, or it is closed
            stream.flush()
    os._exit(status)


def explain(error):
    """The sentence for an exception that is not a bug of ours; None for one that is."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return f"The operating system refused: {error.strerror or error}{where}."
    if isinstance(error, torch.OutOfMemoryError):
        return "The GPU's memory is full; lower batch_size or, in training, micro_batch, or use --device cpu."
    # On a CPU and on MPS, torch says so in a RuntimeError.
    if isinstance(error, MemoryError) or re.search("can't allocate memory|out of memory", text):
        return "The memory is full; lower batch_size or, in training, set data.in_memory=false."
    if isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return (f"torch.compile does not work here ({type(error).__name__}: it needs a C++ compiler or, on a "
                "GPU, Triton); leave --compile out or, in training, set the section's compile=false.")
    lost = re.search(r"gloo|NCCL|Dist\w*Error", repr(error))
    if lost and isinstance(error, RuntimeError) and ranks()[1] > 1:
        return f"The connection to another process broke ({text[:80]}); find its error, then add --resume."
    return None


def of_the_system(error):
    """Whether an exception met in reading a file is the system's (permission, I/O, memory) and says nothing
    about what is in the file. EINVAL does: it comes of a damaged header that points before the beginning."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) not in (None, errno.EINVAL)


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
    best = next(name for name in available if available[name])
    device = best if args.device == "auto" else args.device
    if not available[device]:
        raise UserError(f"--device {device} was asked for, but this machine has none that PyTorch sees; "
                        "use --device cpu or install a PyTorch build for it.")
    device = torch.device(device)
    dtype = PRECISIONS.get(args.precision) or (torch.bfloat16 if bf16_pays(device) else torch.float32)
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32         # else float32 convolutions have 10 bits
    return device, dtype


def bf16_pays(device):
    """Whether bf16 products are clearly faster than float32's; a CPU that has them is measured."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = getattr(torch.cpu, "get_capabilities", dict)()
    if device.type == "mps" or not (found.get("amx_bf16") or found.get("avx512_bf16")):
        return False
    best = {torch.bfloat16: 0, torch.float32: 0}
    for dtype in 5 * list(best):                             # the best of each, as others may interrupt
        best[dtype] = max(best[dtype], matrix_rate(device, dtype, 0.01, 512))
    return best[torch.bfloat16] > 1.5 * best[torch.float32]  # every machine seen has 0.6, or 3 and more


def matrix_rate(device, dtype, seconds=2.0, n=None):
    """Operations per second of n x n matrix products (8192 on a GPU, else 2048), the median of `seconds`."""
    n = n or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * n ** 3 / timer.blocked_autorange(min_run_time=seconds).median


def synchronize(device):
    """Waits until the device has done what it was told."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def autocast(device, dtype):
    """torch.autocast, which float32 does not need."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# === Pictures: files <-> uint8 and float images =============================================================
EXTENSIONS = {*".jpg .jpeg .jpe .jfif .mpo .png .webp .avif .bmp .dib .gif .tif .tiff .tga .qoi".split(),
              *".jp2 .j2k .jpx .ppm .pgm .pbm .pnm".split()}


def open_image(path, background="white"):
    """The RGB picture of a path (or of a member of a tar shard), with `background` where it is transparent.

    Raises UserError for a file that is missing, damaged or no image; OSError where the system failed.
    """
    path = path if hasattr(path, "open") else Path(path)
    try:
        with path.open("rb") as file, Image.open(file) as picture:
            if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError           # Pillow's own begins at twice as many
            picture = upright(picture)
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
    except Image.DecompressionBombError:
        raise UserError(f"{path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller.") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image, or its first bytes are damaged.") from None
    except Exception as error:                               # Pillow raises almost anything for a damaged one
        if of_the_system(error):
            raise
        raise UserError(f"{path} cannot be read as an image ({error}).") from None


def crop_box(width, height, view, seed, smallest=0.6):
    """The square (left, top, side) of a view: 0 is central, others random, `smallest` to 1 times as wide."""
    short = min(width, height)
    if view == 0:
        return (width - short) / 2, (height - short) / 2, short
    scale, x, y = np.random.default_rng([seed, view]).random(3)
    side = short * (smallest + (1 - smallest) * scale)
    return x * (width - side), y * (height - side), side


def crop(picture, size, view=0, seed=0, smallest=0.6):
    """A view of a PIL picture, resized with antialiasing: uint8 (3, size, size)."""
    # DEVIATION: bicubic; the official code resizes with a triangle filter, which is softer.
    left, top, side = crop_box(*picture.size, view, seed, smallest)
    picture = picture.resize((size, size), Image.BICUBIC, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def resize_mask(mask, size):
    """mask (H, W) bool of a picture -> (size, size) bool, of what `crop` makes of the picture."""
    left, top, side = crop_box(*mask.shape[::-1], 0, 0)
    box = left, top, left + side, top + side
    # An average is above 0 where any pixel is hidden. Where the picture is enlarged, it is the nearest pixel.
    result = np.array(Image.fromarray(mask.astype(np.float32)).resize((size, size), Image.BOX, box)) > 0
    if not result.any():
        raise UserError("Nothing is left to repaint: the region is empty (masks repaint from 128 of 255 on) "
                        "or outside the central square of the picture, which is all that the model sees.")
    return torch.from_numpy(result)


# Metadata decide nothing but the orientation: no odd ones are warned of, and comments may be long.
warnings.filterwarnings("ignore", module=r"PIL\.")
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
# EXIF's orientation: what turns a picture upright
TURNS = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
         6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}


def upright(picture):
    """A PIL picture, turned as its orientation tag says; as it is where that is missing or unreadable."""
    # ImageOps.exif_transpose also writes all other tags anew, and fails on some that nobody needs.
    with contextlib.suppress(Exception):
        return picture.transpose(TURNS[picture.getexif()[0x112]])
    return picture


def to_float(images, device):
    """uint8 (B, 3, S, S) -> float32 in [-1, 1] on the device."""
    return images.to(device).float().div_(127.5).sub_(1)


def to_pixels(images):
    """images (B, 3, S, S) in [-1, 1] -> uint8 (B, S, S, 3)."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def reconstructions(vae, images):
    """images (B, 3, S, S) -> (B * (1 + D), 3, S, S): each original, then its decodes from depths 1 .. D."""
    _, partial_sums = vae.quantizer.quantize(vae.encode_latent(images))            # (B, N, D, n_z)
    decodes = [vae.decode_latent(z_hat) for z_hat in partial_sums.unbind(-2)]
    return torch.stack([images, *decodes], 1).flatten(0, 1)


def grid(pixels, columns, scale=1):
    """B pictures, uint8 (S, S, 3) -> one PIL picture: in rows, `scale` times enlarged, 2 pixels apart."""
    side = pixels[0].shape[0] * scale
    rows = math.ceil(len(pixels) / columns)
    canvas = Image.new("RGB", (columns * (side + 2) - 2, rows * (side + 2) - 2), "white")
    for i, image in enumerate(pixels):
        y, x = divmod(i, columns)
        enlarged = Image.fromarray(image).resize((side, side), Image.BICUBIC)
        canvas.paste(enlarged, (x * (side + 2), y * (side + 2)))
    return canvas


def save_picture(picture, path):
    """Writes a PIL picture as a PNG file, all or nothing."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def check_writable(path, suffix=".png"):
    """Raises UserError or OSError if no file can be written at `path`, whose name must end in `suffix`."""
    if path.suffix.lower() != suffix or path.is_dir():
        raise UserError(f"{path} cannot be written; expected the name of a file that ends in {suffix}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The very name, unless there is something: it may be too long, or one that this disk does not allow.
    tried = path.with_name(".writing") if path.exists() or path.is_symlink() else path
    tried.touch()
    tried.unlink(missing_ok=True)                            # another rank may have done it
