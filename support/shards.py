"""Tar shards in WebDataset's format, and Parquet files, read by Hugging Face's `datasets`: it copies them
once into its cache (~/.cache/huggingface, or HF_HOME), from where any picture can be had at any time."""
import io
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from drr import UserError, ranks
from support.common import of_the_system

os.environ["HF_HUB_OFFLINE"] = "1"           # before the import: all files are here
try:
    import datasets
    import pyarrow.compute as pc
except ImportError:
    raise UserError("Tar and Parquet files need `datasets`: pip install -r requirements-data.txt.") from None

KINDS = "jpg jpeg png webp JPG JPEG PNG WEBP".split()        # of pictures in a tar
CAPTIONS = "txt caption captions text".split()               # columns of texts, in a tar the first only
EXPECTED = ("expected in a tar KEY.jpg (.jpeg, .png, .webp; no dot in KEY) and after it KEY.cls, the number "
            'of its class, or KEY.json with a "label"; in Parquet files a column of images and a ClassLabel')


class Picture(NamedTuple):
    """A row's picture, with the parts of Path's interface that reading an image needs."""
    parent: Path                                             # the folder of the archives
    name: str
    table: datasets.Dataset                                  # of columns that hold pictures
    row: int

    def __str__(self):
        return f"{self.parent}: {self.name}"

    def open(self, mode="rb"):
        [content] = [column[0]["bytes"] for column in self.table[self.row].columns if column[0].is_valid]
        return io.BytesIO(content.as_py() or b"")


def open_archives(archives, class_names):
    """Of tar or Parquet files: a table of pictures; their names; their labels (R,); the class names, [""]
    where none has a class; and their captions (R,): each a text, a list of texts, or None. Raises UserError
    for damaged ones, and for a row without one picture or class."""
    table, root = read(archives), archives[0].parent
    kinds = table.features
    fields = [f for f, kind in kinds.items() if table.data.column(f).null_count < len(table) and
              (isinstance(kind, datasets.Image) or isinstance(kind, dict) and "bytes" in kind)]
    if not fields:
        raise UserError(f"The {len(archives)} archives of {root} hold no images; {EXPECTED}.")
    columns = [table.data.column(f) for f in fields]
    paths = pc.coalesce(*(pc.struct_field(column, "path").cast("string") for column in columns))
    keys = table["__key__"][:] if "__key__" in kinds else [f"row {i}" for i in range(len(table))]
    names = [os.path.basename(path or key) for path, key in zip(paths.to_pylist(), keys)]
    pictures = sum(column.is_valid().to_numpy().astype(int) for column in columns)         # (R,)
    for row in np.flatnonzero(pictures != 1)[:1]:
        raise UserError(f"{root}: {keys[row]} has {pictures[row]} pictures and not one; {EXPECTED}.")
    known = (f for f in kinds if f in ("cls", "label") or isinstance(kinds[f], datasets.ClassLabel))
    of_class = next(known, None)
    values = table[of_class][:] if of_class else len(table) * [None]
    if "json" in kinds and None in values:
        values = [document.get("label") if value is None and isinstance(document, dict) else value
                  for value, document in zip(values, table["json"][:])]
    inner = {f: getattr(kinds[f], "feature", kinds[f]) for f in CAPTIONS if f in kinds}       # that of a list
    of_text = next((f for f in inner if getattr(inner[f], "dtype", "").endswith(("string", "binary"))), None)
    captions = table[of_text][:] if of_text else len(table) * [None]
    table = table.select_columns(fields).with_format("arrow")
    if all(value is None for value in values):
        return table, names, np.zeros(len(table), np.int64), [""], captions
    classes = getattr(kinds.get(of_class), "names", None) or class_names
    last = len(classes or range(2 ** 20)) - 1
    labels = np.array([v if isinstance(v, int) and 0 <= v <= last else -1 for v in values], np.int64)
    if labels.min() < 0:
        row = labels.argmin()
        raise UserError(f"{root} has the class {values[row]} for {names[row]}; expected a whole number from "
                        f"0 to {last}; {EXPECTED}.")
    return table, names, labels, classes or [str(i) for i in range(labels.max() + 1)], captions


def read(archives):
    """The archives as one table, from the cache. Raises UserError for damaged ones."""
    datasets.logging.set_verbosity_error()
    if ranks()[0] > 0:
        datasets.disable_progress_bars()
    kind, features = "parquet", None
    if not archives[0].name.lower().endswith(".parquet"):
        kind = "webdataset"                                  # which would infer these from five samples only
        features = datasets.Features({**dict.fromkeys(KINDS, datasets.Image()), "json": datasets.Json(),
                                      "cls": datasets.Value("int64"), "__key__": datasets.Value("string"),
                                      "txt": datasets.Value("binary")})
    paths = [str(path.resolve()) for path in archives]
    try:
        builder = datasets.load_dataset_builder(kind, data_files={"train": paths}, features=features)
        getattr(builder, "DECODERS", {}).pop("txt", None)    # else one that is not UTF-8 would end it all
        if kind == "webdataset" and not os.path.isdir(builder.cache_dir):
            for path in paths:
                check(path)
        builder.download_and_prepare()
        return builder.as_dataset(split="train")
    except Exception as error:
        reason = error.__cause__ or error
        if of_the_system(reason):
            raise reason from None
        raise UserError(f"{archives[0].parent}: one of {len(paths)} archives is damaged or of another form "
                        f"({reason}); {EXPECTED}.") from None


def check(path):
    """Raises TarError for a damaged tar: `datasets` would take a damaged header for the end."""
    try:
        with tarfile.open(path) as tar:
            tar.getmembers()
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except (tarfile.TarError, EOFError) as error:
        raise tarfile.ReadError(f"{path}: {str(error).splitlines()[0]}") from None
