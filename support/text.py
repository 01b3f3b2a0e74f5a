"""Text conditions: captions and prompts -> tokens (B, L); and CLIP scores of pictures.

A text is lowercased, split at spaces and punctuation, and written in the most frequent pieces of words (byte
pair encoding of characters, as in RQ-Transformer's code): L ids, cut or padded with [PAD] = 0; unknown
characters are [UNK] = 1. The model sees the padding, too. The tokenizer travels in the checkpoint.
"""
# DEVIATION: no loss on the text itself. The published parameter counts include a head that predicts the next
# token of the text, which a bidirectional model would only have to copy.
import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from drr import UserError, explained, ranks, read_model, replacing
from support import data
from support.common import from_rank_0

try:
    from tokenizers import Tokenizer
    from tokenizers.implementations import CharBPETokenizer
except ImportError:
    raise UserError("Text needs `tokenizers`: pip install -r requirements-text.txt.") from None

SPECIAL = ["[PAD]", "[UNK]"]                                 # ids 0 and 1


# === The tokenizer: texts -> ids (B, L); it travels as JSON =================================================
def train_tokenizer(captions, c):
    """A tokenizer of at most c.text_vocab entries for the captions, an iterator over texts: its JSON."""
    bpe = CharBPETokenizer(unk_token=SPECIAL[1], lowercase=True)
    # Each character counts twice in the vocabulary, inside of a word and at its end.
    bpe.train_from_iterator(captions, c.text_vocab, special_tokens=SPECIAL, show_progress=False,
                            limit_alphabet=max(1, min(1000, c.text_vocab // 4)))
    return finished(bpe, c)


def official_tokenizer(files, c):
    """The JSON of a tokenizer that comes as two files, vocab.json and merges.txt, as the published one does.
    UserError for files of another kind, and for more entries than c.text_vocab."""
    for path in files:
        if not Path(path).is_file():
            raise UserError(f"The file {path} does not exist; --tokenizer takes vocab.json and merges.txt.")
    try:
        bpe = CharBPETokenizer.from_file(*map(str, files), unk_token=SPECIAL[1], lowercase=True)
    except Exception as error:                               # the library's own, plain Exceptions
        raise UserError(f"{' and '.join(map(str, files))} are no vocab.json and merges.txt ({error}); copy "
                        "them again, and give them in this order.") from None
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


def tokenize(tokenizer, texts):
    """Ids (B, L) int64 of B texts, by a tokenizer's JSON."""
    encoded = Tokenizer.from_str(tokenizer).encode_batch(list(texts))
    return torch.tensor([text.ids for text in encoded])


def prompts(info, texts):
    """Conditions (B, L) of the texts that a user asks for, by the tokenizer in a checkpoint's `info`; says
    where one is cut. UserError for none, one of which nothing is known, and a checkpoint without tokenizer."""
    if not texts:
        raise UserError('Which text? This checkpoint is conditioned on text: give --text "a red fox".')
    if not hasattr(info.transformer, "tokenizer"):
        raise UserError("This checkpoint has no tokenizer; convert it again with --tokenizer VOCAB MERGES.")
    for text, code in zip(texts, Tokenizer.from_str(info.transformer.tokenizer).encode_batch(list(texts))):
        known = [piece for piece in code.tokens if piece not in SPECIAL]
        if not any(code.attention_mask):
            raise UserError(f"The text {text!r} is empty; write what the picture shows.")
        if not known:
            raise UserError(f"Nothing of the text {text!r} is known to this checkpoint; use other words.")
        if code.overflowing:
            print(f"{text!r} is cut after {' '.join(known).replace('</w>', '')!r}", file=sys.stderr)
    return tokenize(info.transformer.tokenizer, texts)


# === Captions of a data set: images -> tokens, one caption drawn per step ===================================
class Captions:
    """The captions of a training's images as `tokens` (C, L) uint16, memory-mapped: those of image i are the
    rows first[i] .. first[i + 1] - 1. All ranks make it together: rank 0 reads the captions, trains the
    tokenizer unless there is one (of --tokenizer, of --init or, resumed, of the run), and keeps both in the
    run's folder. UserError if no image has a caption."""

    def __init__(self, files, out, args, c):
        self.texts, self.length = None, c.text_length
        path = out / "tokenizer.json"
        if ranks()[0] == 0:
            self.tokenizer = self.choose_tokenizer(files, path, args, c)
            if not path.exists() or path.read_text() != self.tokenizer:
                with replacing(path) as temporary:
                    temporary.write_text(self.tokenizer)
        self.tokenizer = from_rank_0(getattr(self, "tokenizer", None))
        some = [files.texts(i) for i in range(0, len(files), -(-len(files) // 1024))]
        content = [self.tokenizer, files.content, some]
        self.digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        table, first = (out / f"codes/captions-{self.digest}{suffix}.npy" for suffix in ("", "-first"))
        if ranks()[0] == 0 and not (table.exists() and first.exists()):
            self.write(files, table, first)
        if ranks()[1] > 1:
            dist.barrier()
        self.tokens, self.first = np.load(table, mmap_mode="r"), np.load(first)
        self.count = np.diff(self.first)                     # (F,)
        self.report(files)

    def choose_tokenizer(self, files, path, args, c):
        if args.tokenizer:
            return official_tokenizer(args.tokenizer, c)
        if args.resume:
            if not path.exists():
                raise UserError(f"{path}, the tokenizer of this run, is missing; start without --resume.")
            return path.read_text()
        if args.init:
            held = read_model(args.init)[1].get("transformer", {}).get("tokenizer")
            if held:
                with explained(args.init):
                    return finished(Tokenizer.from_str(held), c)
        return train_tokenizer((text for texts in self.read(files) for text in texts), c)

    def read(self, files):
        if self.texts is None:
            with ThreadPoolExecutor(16) as pool:             # a network disk answers slowly
                found = pool.map(files.texts, range(len(files)))
                self.texts = list(tqdm(found, "reading captions", len(files), unit="image"))
        return self.texts

    def write(self, files, table, first):
        texts = self.read(files)
        flat = [text for of_image in texts for text in of_image]
        parts = [np.zeros((0, self.length), np.uint16)]
        for i in tqdm(range(0, len(flat), 4096), "tokenizing", unit=" x 4096 captions"):
            parts.append(tokenize(self.tokenizer, flat[i:i + 4096]).numpy().astype(np.uint16))
        for path, array in (first, np.cumsum([0, *map(len, texts)])), (table, np.concatenate(parts)):
            with replacing(path) as temporary, open(temporary, "wb") as f:
                np.save(f, array)

    def report(self, files):
        self.texts = None                                    # no longer needed
        without = np.flatnonzero(self.count == 0)
        if len(without) == len(files):
            raise UserError(f"None of the {len(files)} images has a caption; expected KEY.txt beside KEY.jpg, "
                            "captions in the archives, or a list train.tsv (docs/training.md).")
        if len(without) and ranks()[0] == 0:
            print(f"skipped {len(without)} of {len(files)} images, whose captions are missing, empty or not "
                  f"UTF-8; the first: {files[without[0]]}")

    def draw(self, images, uniforms):
        """Tokens (B, L) int64 of a caption of each image (B,), by uniforms (B,) in [0, 1)."""
        row = self.first[images] + (uniforms * self.count[images]).astype(np.int64)
        return torch.from_numpy(self.tokens[row].astype(np.int64))


def read_captions(path):
    """The captions to be drawn and measured: the lines of a text file, or the first caption of each image in
    DIR/val that has one. UserError without any."""
    if Path(path).is_dir():
        files, _, _ = data.find_images(path, "val", captions=True)
        found = [texts[0] for texts in map(files.texts, range(len(files))) if texts]
    else:
        found = read_lines(path)
    if not found:
        raise UserError(f"{path} holds no captions; expected lines of text, or images with captions.")
    return found


def read_lines(path):
    """The lines of a text file, those that are empty left out. UserError for a file that is no text."""
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"The file of texts {path} does not exist.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8; save it as that, one text a line.") from None
    return [line.strip() for line in lines if line.strip()]


# === CLIP score: images, texts -> cosines ===================================================================
class Clip:
    """A CLIP model (Radford et al. 2021) in a local folder, as Hugging Face's `transformers` keeps it. The
    papers' score is the plain mean cosine of each picture and its own caption, by ViT-B/32."""

    def __init__(self, folder, device):
        try:
            from transformers import AutoTokenizer, CLIPModel
        except ImportError as error:
            raise UserError(f"CLIP needs `transformers` ({error}): pip install -r requirements-text.txt."
                            ) from None
        try:
            if not (Path(folder) / "config.json").is_file():
                raise ValueError("it holds no config.json")
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True).to(device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:                           # transformers raises nearly anything
            raise UserError(f"{folder} is no CLIP model ({type(error).__name__}: {error}); expected a folder "
                            "with config.json, model.safetensors and a tokenizer.") from None
        vision = self.model.config.vision_config
        self.size = vision.image_size
        self.name = f"CLIP {folder} (patches of {vision.patch_size}, {self.size}x{self.size}, bicubic)"

    @torch.inference_mode()
    def score(self, images, texts):
        """Cosines (B,) of square images (B, 3, S, S) in [-1, 1] and their texts."""
        device = self.model.device
        x = F.interpolate(images.to(device).float(), (self.size, self.size), mode="bicubic", antialias=True)
        x = x.clamp(-1, 1).add(1).mul(127.5).round().div(255)          # as 8-bit pictures, in [0, 1]
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], device=device).view(3, 1, 1)
        deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711], device=device).view(3, 1, 1)
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt",
                                max_length=self.model.config.text_config.max_position_embeddings).to(device)
        out = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask,
                         pixel_values=(x - mean) / deviation)
        return F.cosine_similarity(out.image_embeds, out.text_embeds).float().cpu()
