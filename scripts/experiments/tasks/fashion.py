"""Fashion-MNIST from an image folder, then its negatives: a small vision transformer.

The raw data are the four IDX files of Fashion-MNIST, gzipped or not, as the Debian package
`dataset-fashion-mnist` has them in /usr/share/datasets/fashion-mnist.
"""

import json
from pathlib import Path

from PIL import Image

from scripts.experiments.lib.common import (
    Session,
    fresh_folder,
    grid_table,
    plot_epochs,
    results_table,
    start_session,
    sweep,
    write_report,
)
from scripts.experiments.lib.mnist_files import read_idx

CLASSES = [
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle-boot"),
]
L2 = (0.1, 1.0, 10.0)
EWC = (300.0, 1000.0, 3000.0)
PREPARATION = """\
apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb fashion
.venv/bin/python scripts/experiments/tasks/fashion.py \\
    --data-dir fashion/usr/share/datasets/fashion-mnist"""
TEXT = """
# Fashion-MNIST, then its negatives

A vision transformer of transformers, of {parameters:,} parameters, made here with random weights,
learns the ten classes from a folder of PNG files by class (task A: {train:,} images, white on
black) with `consolidate finetune --penalty none`, which also measures the exact Fisher on
{measured:,} of them. Then it learns the same classes from negatives (task B: {train:,} other
images, black on white). Accuracy on {test:,} test images of each task:

{results}

{picture}

Strengths are chosen by the mean accuracy on {validation:,} images of each task that were held out
of training. All that were tried:

{grid}

No λ of L2 that was tried kept task A, and the smallest has the best mean. A larger one would keep
it, as the start does, and was not tried.
"""


def prepare(session: Session, raw: Path, sizes: dict[str, int]) -> None:
    """Write a-train/CLASS/00000.png … b-test/CLASS/…: the two tasks share no training image."""
    for source, parts in (("train", ("train", "validation")), ("t10k", ("test",))):
        images = read_idx(raw / f"{source}-images-idx3-ubyte")
        labels = read_idx(raw / f"{source}-labels-idx1-ubyte")
        start = 0
        for task in ("a", "b"):
            for part in parts:
                folder = fresh_folder(session.folder / f"{task}-{part}")
                for name in CLASSES:
                    (folder / name).mkdir()
                for i in range(start, start + sizes[part]):
                    picture = Image.fromarray(images[i] if task == "a" else 255 - images[i])
                    picture.save(folder / CLASSES[labels[i]] / f"{i:05d}.png")
                start += sizes[part]


def make_transformer(session: Session) -> int:
    """Write a vision transformer with random weights as a checkpoint; return its size."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(session.seed)
    config = ViTConfig(
        image_size=28,
        patch_size=4,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
    )
    model = ViTForImageClassification(config)
    folder = session.folder / "random"
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.2860] * 3,
        "image_std": [0.3530] * 3,
        "size": {"height": 28, "width": 28},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Prepare, learn task A, fine-tune on task B with every penalty, report."""
    session, options = start_session(
        "fashion", __doc__.splitlines()[0], {"--data-dir": "the folder of the four IDX files"}
    )
    sizes = {"train": 6000, "validation": 1000, "test": 2000}
    epochs, measured = {"A": 10, "B": 5}, 1000
    if session.quick:
        sizes, epochs, measured = dict.fromkeys(sizes, 100), {"A": 1, "B": 1}, 20
    prepare(session, options.data_dir, sizes)
    parameters = make_transformer(session)
    training = [
        *("--learning-rate", 1e-3, "--lr-scheduler", "linear", "--warmup-steps", 20),
        *("--batch-size", 64),
    ]
    session.consolidate(
        *("finetune", "random", "--data", "a-train", "--task", "A", "--penalty", "none"),
        *("--output-dir", "start", "--overwrite", *training, "--epochs", epochs["A"]),
        *("--fisher-max-examples", measured, "--seed", session.seed),
    )
    runs = sweep(
        session,
        "start",
        "b-train",
        {
            "none": (None,),
            "l2": L2[:1] if session.quick else L2,
            "ewc": EWC[:1] if session.quick else EWC,
        },
        {"A": "a-test", "B": "b-test", "A-val": "a-validation", "B-val": "b-validation"},
        [*training, "--epochs", epochs["B"], "--fisher-max-examples", 16],
    )
    text = TEXT.format(
        parameters=parameters,
        measured=measured,
        results=results_table(runs, "accuracy"),
        picture=plot_epochs(session, runs, "accuracy", "accuracy"),
        grid=grid_table(runs, "accuracy"),
        **sizes,
    )
    packages = ["consolidate-ewc", "torch", "transformers", "pillow"]
    write_report(session, text, preparation=PREPARATION, packages=packages)


if __name__ == "__main__":
    main()
