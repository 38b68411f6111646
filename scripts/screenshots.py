"""Make the pictures of the docs: learn three tasks one after the other, and report on them.

The tasks are scikit-learn's handwritten digits, as they are and with their pixels permuted twice.
Headless Chromium takes the pictures; the variable CHROMIUM names it if it is not on PATH.
"""

import argparse
import html
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.quickstart import NETWORK, SIZES, write_data

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
TASKS = f"""
output-dir = "digits"
[config]
sizes = {SIZES}
[defaults]
model = "network:mlp"
ewc-lambda = 100
optimizer = "adam"
learning-rate = 1e-3
batch-size = 32
epochs = 20
evaluate-every = 82
"""
TASKS += "".join(
    f'[[task]]\nname = "{name}"\ndata = "{name}-train.npz"\nevaluate = "{name}-test.npz"\n'
    for name in ("a", "b", "c")
)
TERMINAL = """<!doctype html><meta charset="utf-8"><style>
body{margin:0;background:#14171a;color:#e9edf0;padding:18px 22px}
pre{margin:0;font:14px/1.45 "DejaVu Sans Mono",monospace}</style><pre>"""

FRAME = """<!doctype html><body style="margin:0"><iframe src="{page}#matrix"
style="border:0;width:390px;height:1060px"></iframe>"""


def find_chromium() -> str | None:
    """Give the path of a Chromium: the variable CHROMIUM, else what is on PATH."""
    named = os.environ.get("CHROMIUM")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


def screenshot(
    page: Path, picture: Path, *, width: int, height: int, dark: bool = False, scale: float = 1
) -> list[str]:
    """Open a page in headless Chromium, without a network, and take a picture of it.

    Args:
        page: The HTML file.
        picture: The PNG file to write.
        width: Of the window, in CSS pixels.
        height: Of the window.
        dark: Whether the screen prefers dark pages.
        scale: Pixels to a CSS pixel.

    Returns:
        The lines that the page wrote to the console, errors of loading among them.
    """
    chromium = find_chromium()
    assert chromium is not None, "no Chromium is on PATH; the variable CHROMIUM can name one"
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                chromium,
                "--headless",
                "--disable-gpu",
                "--no-sandbox",  # root has none; the page is ours
                "--hide-scrollbars",
                "--proxy-server=127.0.0.1:9",
                "--enable-logging=stderr",
                f"--user-data-dir={profile}",
                f"--window-size={width},{height}",
                f"--force-device-scale-factor={scale}",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                f"--screenshot={picture}",
                page.resolve().as_uri(),
            ],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert picture.exists(), done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def shrink(picture: Path) -> None:
    """Write a picture with a palette of 256 colours, in a third of the bytes."""
    with Image.open(picture) as image:
        small = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    small.save(picture, optimize=True)


def write_tasks(folder: Path) -> None:
    """Write the digits, two permutations of them, the network and tasks.toml."""
    write_data(folder)
    order = np.random.default_rng(1).permutation(64)
    for part in ("train", "test"):
        digits = np.load(folder / f"a-{part}.npz")
        inputs = digits["inputs"][:, order]
        np.savez(folder / f"c-{part}.npz", inputs=inputs, labels=digits["labels"])
    (folder / "network.py").write_text(NETWORK)
    (folder / "tasks.toml").write_text(TASKS)


def run(folder: Path, command: str) -> str:
    """Run a command in the folder; return its stdout."""
    print(command, flush=True)
    words = [str(Path(sys.executable).with_name("consolidate")), *command.split()[1:]]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}\nexit code {done.returncode}")
    return done.stdout


def main() -> None:
    """Make the pictures, in docs/images/ or the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="?", type=Path, default=ROOT / "docs" / "images")
    images = parser.parse_args().images.resolve()
    if find_chromium() is None:
        sys.exit("no Chromium is on PATH; the variable CHROMIUM can name one")
    images.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tasks(folder)
        commands = "consolidate run tasks.toml", "consolidate verify digits/03-c"
        lines = [f"$ {command}\n{run(folder, command)}" for command in commands]
        run(folder, "consolidate report digits/03-c --output report.html")
        page = folder / "report.html"
        screenshot(page, images / "report-light.png", width=1080, height=1440)
        screenshot(page, images / "report-dark.png", width=1080, height=1440, dark=True)
        phone = folder / "phone.html"  # a window has a least width, a frame has none
        phone.write_text(FRAME.format(page=page.name), encoding="utf-8")
        screenshot(phone, images / "report-phone.png", width=390, height=1060, scale=1.5)
        terminal, text = folder / "terminal.html", html.escape("\n".join(lines).rstrip())
        terminal.write_text(f"{TERMINAL}{text}</pre>", encoding="utf-8")
        height = 40 + 20 * (text.count("\n") + 1)
        screenshot(terminal, images / "terminal.png", width=960, height=height)
        for name in ("report-light", "report-dark", "report-phone", "terminal"):
            shrink(images / f"{name}.png")


if __name__ == "__main__":
    main()
