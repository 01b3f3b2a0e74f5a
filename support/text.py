"""Text conditions: captions and prompts -> tokens (B, L).

A text is lowercased, split at spaces and punctuation, and written in the most frequent pieces of words (byte
pair encoding of characters, as in RQ-Transformer's code): L ids, cut or padded with [PAD] = 0; unknown
characters are [UNK] = 1. The model sees the padding, too. The tokenizer travels in the checkpoint.
"""
import collections
import hashlib
import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from drr import UserError, ranks, read_model, replacing
from support.common import from_rank_0

try:
    from tokenizers import Tokenizer
    from tokenizers.implementations import CharBPETokenizer
except ImportError:
    raise UserError("Text needs `tokenizers`: pip install -r requirements-text.txt.") from None

SPECIAL = ["[PAD]", "[UNK]"]                                 # ids 0 and 1
# DEVIATION: there is no loss on the text. The published parameter counts include a head that predicts the
# next token of the text, which a bidirectional model would only have to copy.


# === The tokenizer: texts -> ids (B, L); it travels as JSON =================================================
def train_tokenizer(captions, c):
    """A tokenizer of at most c.text_vocab entries for the captions, a list of texts: its JSON."""
    options = dict(unk_token=SPECIAL[1], lowercase=True)
    bpe = CharBPETokenizer(**options)
    counts = collections.Counter(itertools.chain(*map(bpe.normalize, captions)))
    alphabet = sorted(counts.keys() - {" "}, key=lambda letter: (-counts[letter], letter))
    # Of the library's 1,000 characters no more than leave half of the vocabulary to longer pieces: each of
    # them counts twice, within words and at their ends.
    alphabet = alphabet[:max(1, min(1000, c.text_vocab // 4))]
    # Left to itself the library takes both from a hash table, in an order that is another in each process.
    ends = [f"{letter}</w>" for letter in alphabet]
    bpe.train_from_iterator(captions, c.text_vocab, special_tokens=SPECIAL + ends, show_progress=False,
                            initial_alphabet=alphabet, limit_alphabet=len(alphabet))
    model = json.loads(bpe.to_str())["model"]
    return finished(CharBPETokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]], **options), c)


def official_tokenizer(files, c):
    """The JSON of a tokenizer that comes as two files, vocab.json and merges.txt, as the published one does.
    UserError for files of another kind, and for more entries than c.text_vocab."""
    try:
        bpe = CharBPETokenizer.from_file(*map(str, files), unk_token=SPECIAL[1], lowercase=True)
    except Exception as error:                               # the library's own, plain Exceptions
        raise UserError(f"{' and '.join(map(str, files))} are no vocab.json and merges.txt ({error}); give "
                        "two such files in this order.") from None
    return finished(bpe, c)


def finished(bpe, c):
    if [bpe.token_to_id(name) for name in SPECIAL] != [0, 1]:
        raise UserError("The tokenizer's first two entries are not [PAD] and [UNK]; give another one.")
    if bpe.get_vocab_size() > c.text_vocab:
        raise UserError(f"The tokenizer has {bpe.get_vocab_size()} entries, transformer.text_vocab is "
                        f"{c.text_vocab}; set it to at least as many.")
    bpe.enable_padding(length=c.text_length, pad_id=0, pad_token=SPECIAL[0])
    bpe.enable_truncation(c.text_length)
    return bpe.to_str()


def restored(tokenizer, c):
    """The JSON of a tokenizer that was kept somewhere, made to fit the section c. UserError for none."""
    try:
        bpe = Tokenizer.from_str(tokenizer)
    except Exception as error:                               # the library's own, plain Exceptions
        raise UserError(f"This model has no tokenizer, or a damaged one ({error}); copy it again, or convert "
                        "it again with --tokenizer VOCAB MERGES.") from None
    return finished(bpe, c)


def tokenize(tokenizer, texts):
    """Ids (B, L) int64 of B texts, by a tokenizer's JSON."""
    return torch.tensor([code.ids for code in Tokenizer.from_str(tokenizer).encode_batch(texts)])


def prompts(info, texts):
    """Conditions (B, L) of the texts that a user asks for, by the tokenizer in a checkpoint's `info`; says
    how many are cut. UserError for none, one with nothing known, and a checkpoint without tokenizer."""
    if not texts:
        raise UserError("Which text? This checkpoint is one of texts: give sample.py --text "
                        '"a red fox", or tools.evaluate --captions.')
    tokenizer = Tokenizer.from_str(restored(getattr(info.transformer, "tokenizer", None), info.transformer))
    codes = tokenizer.encode_batch([text.encode("utf-8", "replace").decode() for text in texts])
    cut = []
    for text, code in zip(texts, codes):
        known = [piece for piece in code.tokens if piece not in SPECIAL]
        if not known:
            raise UserError(f"The text {text!r} has nothing that this checkpoint knows; use other words.")
        if code.overflowing:
            cut.append(f"{text!r} after {''.join(known).replace('</w>', ' ').strip()!r}")
    if cut and ranks()[0] == 0:
        print(f"{len(cut)} of {len(texts)} texts are cut, the first, {cut[0]}", file=sys.stderr)
    return torch.tensor([code.ids for code in codes])


def text_lines(path):
    """The lines of a text file that are not empty. UserError where there are none, or not in UTF-8."""
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        lines = []
    if not any(lines):
        raise UserError(f"{path} holds no texts; expected a file in UTF-8, one text a line.")
    return list(filter(None, lines))


# === Captions of a data set: images -> tokens, one caption drawn per step ===================================
class Captions:
    """The captions of a training's images as `tokens` (C, L) uint16, memory-mapped: those of image i are the
    rows first[i] .. first[i + 1] - 1. All ranks make it together: rank 0 reads the captions, trains the
    tokenizer unless there is one (of --tokenizer, of --init or, resumed, of the run), and keeps it and the
    tokens in the run's folder. UserError if no image has a caption."""

    def __init__(self, files, out, args, c):
        made = self.prepare(files, out, args, c) if ranks()[0] == 0 else None
        self.tokenizer, self.first, self.digest, path = from_rank_0(made)
        try:
            self.tokens = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"The tokens in {path} are damaged ({error}); delete it, and they will be made "
                            "again.") from None
        self.count = np.diff(self.first)                     # (F,)

    def prepare(self, files, out, args, c):
        texts = read_texts(files)
        kept, held = out / "tokenizer.json", None
        if args.tokenizer:
            held = official_tokenizer(args.tokenizer, c)
        elif args.resume and kept.exists():
            held = restored(kept.read_bytes().decode("utf-8", "replace"), c)
        elif args.init:
            section = read_model(args.init)[1].get("transformer", {})
            held = restored(section["tokenizer"], c) if "tokenizer" in section else None
        flat = list(itertools.chain(*texts))
        tokenizer = held or train_tokenizer(flat, c)
        if not args.resume or args.force or not kept.exists():     # another one is refused later
            with replacing(kept) as temporary:
                temporary.write_text(tokenizer, "utf-8")
        digest = hashlib.sha256(json.dumps([tokenizer, files.content, texts]).encode()).hexdigest()[:16]
        path = out / f"codes/captions-{digest}.npy"
        if not path.exists():
            parts = [tokenize(tokenizer, flat[i:i + 4096]).numpy().astype(np.uint16)
                     for i in tqdm(range(0, len(flat), 4096), "tokenizing", unit=" x 4096 captions")]
            with replacing(path) as temporary, open(temporary, "wb") as f:
                np.save(f, np.concatenate(parts))
        return tokenizer, np.cumsum([0, *map(len, texts)]), digest, path

    def draw(self, images, uniforms):
        """Tokens (B, L) int64 of a caption of each image (B,), by uniforms (B,) in [0, 1)."""
        row = self.first[images] + (uniforms * self.count[images]).astype(np.int64)
        return torch.from_numpy(self.tokens[row].astype(np.int64))


def read_texts(files):
    """The captions of each image, a list of F lists; counts images without. UserError where all are."""
    def block(start):
        return [files.texts(i) for i in range(start, min(start + 1024, len(files)))]
    starts = range(0, len(files), 1024)
    with ThreadPoolExecutor(16) as pool:                     # a network disk answers slowly
        texts = list(itertools.chain(*tqdm(pool.map(block, starts), "reading captions", len(starts))))
    without = [i for i, found in enumerate(texts) if not found]
    if len(without) == len(texts):
        raise UserError(f"None of the {len(texts)} images has a caption, for cond=text; expected KEY.txt "
                        "beside KEY.jpg, captions in the archives, or a list train.tsv (docs/text.md).")
    if without:
        print(f"skipped {len(without)} of {len(texts)} images, whose captions are missing, empty or not "
              f"UTF-8; the first: {files[without[0]]}")
    return texts
