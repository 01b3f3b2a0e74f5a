"""Text conditions: captions and prompts -> tokens (B, L).

A text is lowercased, split at spaces and punctuation, and written in the most frequent pieces of words (byte
pair encoding of characters, as in RQ-Transformer's code): L ids, cut or padded with [PAD] = 0; unknown
characters are [UNK] = 1. The model sees the padding, too. The tokenizer travels in the checkpoint.
"""
# DEVIATION: no loss on the text itself. The published parameter counts include a head that predicts the next
# token of the text, which a bidirectional model would only have to copy.
import collections
import functools
import hashlib
import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from drr import UserError, explained, ranks, read_model, replacing
from support.common import from_rank_0

try:
    from tokenizers import Tokenizer
    from tokenizers.implementations import CharBPETokenizer
    from tokenizers.models import BPE
except ImportError:
    raise UserError("Text needs `tokenizers`: pip install -r requirements-text.txt.") from None

SPECIAL = ["[PAD]", "[UNK]"]                                 # ids 0 and 1


# === The tokenizer: texts -> ids (B, L); it travels as JSON =================================================
def train_tokenizer(captions, c):
    """A tokenizer of at most c.text_vocab entries for the captions, a list of texts: its JSON."""
    bpe = CharBPETokenizer(unk_token=SPECIAL[1], lowercase=True)
    counts = collections.Counter(letter for text in captions for letter in bpe.normalize(text))
    del counts[" "]
    letters = sorted(counts, key=lambda letter: (-counts[letter], letter))
    letters = letters[:max(1, min(1000, c.text_vocab // 4))]       # each is within words and at their ends
    # The library would take both from a hash table, in an order that is another in each process. Given them,
    # it trains the same tokenizer every time.
    ends = [f"{letter}</w>" for letter in letters]
    bpe.train_from_iterator(captions, c.text_vocab, special_tokens=SPECIAL + ends, show_progress=False,
                            initial_alphabet=letters, limit_alphabet=len(letters))
    model = json.loads(bpe.to_str())["model"]
    return finished(by_rules(model["vocab"], [tuple(pair) for pair in model["merges"]]), c)


def by_rules(vocab, merges):
    return CharBPETokenizer(vocab, merges, unk_token=SPECIAL[1], lowercase=True)


def official_tokenizer(files, c):
    """The JSON of a tokenizer that comes as two files, vocab.json and merges.txt, as the published one does.
    UserError for files of another kind, and for more entries than c.text_vocab."""
    try:
        bpe = by_rules(*BPE.read_file(*map(str, files)))
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
    bpe.add_special_tokens(SPECIAL)                          # `detokenize` leaves them out
    bpe.enable_padding(length=c.text_length, pad_id=0, pad_token=SPECIAL[0])
    bpe.enable_truncation(c.text_length)
    return bpe.to_str()


def tokenize(tokenizer, texts):
    """Ids (B, L) int64 of B texts, by a tokenizer's JSON."""
    return torch.tensor([code.ids for code in Tokenizer.from_str(tokenizer).encode_batch(texts)])


def detokenize(tokenizer, ids):
    """Ids (B, L) -> B texts in lower case."""
    return Tokenizer.from_str(tokenizer).decode_batch(ids.tolist())


def prompts(info, texts):
    """Conditions (B, L) of the texts that a user asks for, by the tokenizer in a checkpoint's `info`; says
    where one is cut. UserError for none, one without a known piece, and a checkpoint without tokenizer."""
    if not texts:
        raise UserError('Which text? This checkpoint is conditioned on text: give --text "a red fox".')
    if not hasattr(info.transformer, "tokenizer"):
        raise UserError("This checkpoint has no tokenizer; convert it again with --tokenizer VOCAB MERGES.")
    codes = Tokenizer.from_str(info.transformer.tokenizer).encode_batch(texts)
    for text, code in zip(texts, codes):
        known = [piece for piece in code.tokens if piece not in SPECIAL]
        if not known:
            raise UserError(f"The text {text!r} has nothing that this checkpoint knows; use other words.")
        if code.overflowing:
            seen = "".join(known).replace("</w>", " ").strip()
            print(f"{text!r} is cut after {seen!r}", file=sys.stderr)
    return torch.tensor([code.ids for code in codes])


# === Captions of a data set: images -> tokens, one caption drawn per step ===================================
class Captions:
    """The captions of a training's images as `tokens` (C, L) uint16, memory-mapped: those of image i are the
    rows first[i] .. first[i + 1] - 1. All ranks make it together: rank 0 reads the captions, trains the
    tokenizer unless there is one (of --tokenizer, of --init or, resumed, of the run), and keeps both in the
    run's folder. UserError if no image has a caption."""

    def __init__(self, files, out, args, c):
        self.files, self.path = files, out / "tokenizer.json"
        self.tokenizer = from_rank_0(self.choose_tokenizer(args, c) if ranks()[0] == 0 else None)
        some = [files.texts(i) for i in range(0, len(files), -(-len(files) // 1024))]
        content = json.dumps([self.tokenizer, files.content, some])
        self.digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        table, first = (out / f"codes/captions-{self.digest}{suffix}.npy" for suffix in ("", "-first"))
        if ranks()[0] == 0 and not (table.exists() and first.exists()):
            self.write(table, first)
        from_rank_0(None)                                    # the others wait until both files are there
        self.tokens, self.first = np.load(table, mmap_mode="r"), np.load(first)
        self.count = np.diff(self.first)                     # (F,)
        without = np.flatnonzero(self.count == 0)
        if len(without) and ranks()[0] == 0:
            print(f"skipped {len(without)} of {len(files)} images, whose captions are missing, empty or not "
                  f"UTF-8; the first: {files[without[0]]}")

    def choose_tokenizer(self, args, c):
        held = None
        if args.resume and self.path.exists():
            held = self.path.read_text()
        elif args.init:
            held = read_model(args.init)[1].get("transformer", {}).get("tokenizer")
        if args.tokenizer:
            held = official_tokenizer(args.tokenizer, c)
        with explained(args.init or self.path):
            held = finished(Tokenizer.from_str(held), c) if held else None
        held = held or train_tokenizer(list(itertools.chain(*self.texts)), c)
        if not args.resume or args.force or not self.path.exists():      # another one is refused later
            with replacing(self.path) as temporary:
                temporary.write_text(held)
        return held

    @functools.cached_property
    def texts(self):
        """The captions of each image, a list of F lists."""
        with ThreadPoolExecutor(16) as pool:                 # a network disk answers slowly
            found = pool.map(self.files.texts, range(len(self.files)))
            found = list(tqdm(found, "reading captions", len(self.files), unit="image"))
        if not any(found):
            raise UserError(f"None of the {len(found)} images has a caption, for cond=text; expected KEY.txt "
                            "beside KEY.jpg, captions in the archives, or a list train.tsv (docs/text.md).")
        return found

    def write(self, table, first):
        flat = list(itertools.chain(*self.texts))
        parts = [tokenize(self.tokenizer, flat[i:i + 4096]).numpy().astype(np.uint16)
                 for i in tqdm(range(0, len(flat), 4096), "tokenizing", unit=" x 4096 captions")]
        for path, array in (first, np.cumsum([0, *map(len, self.texts)])), (table, np.concatenate(parts)):
            with replacing(path) as temporary, open(temporary, "wb") as f:
                np.save(f, array)
        del self.texts                                       # no longer needed

    def draw(self, images, uniforms):
        """Tokens (B, L) int64 of a caption of each image (B,), by uniforms (B,) in [0, 1)."""
        row = self.first[images] + (uniforms * self.count[images]).astype(np.int64)
        return torch.from_numpy(self.tokens[row].astype(np.int64))
