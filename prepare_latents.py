"""Turn pictures into the one dataset format that train.py reads.

    python prepare_latents.py glyphs --out data/glyphs       the built-in pictures: ten digits
    python prepare_latents.py IMAGES --out DIR --size 32     IMAGES/class/picture.png, as pixels

A dataset is a directory with

    images.npy   (N, C, H, W) uint8, memory-mapped when read
    labels.npy   (N,) int32
    meta.json    format, count, shape (C, H, W), dtype, scale and shift (the network's x is
                 scale * stored + shift), classes (names; empty: unconditional), source
    preview.png  a look at the first pictures of up to ten classes

meta.json is written last: a directory without it holds an unfinished dataset.
"""

import argparse
import json
import math
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from sample import is_in_file, save_grid

FORMAT = 1  # of the dataset; raised when a reader of the old one would misread the new
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


# ---------------------------------------------------------------------------- the dataset format


class Dataset(torch.utils.data.Dataset):
    """Reads a dataset directory; a list of indices gives one batch.

    dataset.__getitems__(indices) -> images (B, C, H, W) as stored, labels (B,) int64, both tensors.
    Raises ValueError, one line with the file and the mend, where there is no whole dataset.
    """

    def __init__(self, path):
        self.path = path = Path(path)
        try:
            self.meta = meta = json.loads((path / "meta.json").read_text())
            self.images = images = np.load(path / "images.npy", mmap_mode="r")
            self.labels = labels = np.load(path / "labels.npy")
            shape, num_labels = (meta["count"], *meta["shape"]), max(len(meta["classes"]), 1)
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            message = f"{path} holds no whole dataset ({error}); make one with prepare_latents.py"
            raise ValueError(message) from None
        if meta.get("format") != FORMAT:
            raise ValueError(f"{path}/meta.json: format is not {FORMAT}; prepare the dataset again")
        if images.shape != shape or images.dtype != meta["dtype"]:
            raise ValueError(
                f"{path}/images.npy is {images.dtype} {images.shape} and not {meta['dtype']} "
                f"{shape} as meta.json says; prepare the dataset again"
            )
        if labels.shape != shape[:1] or labels.min() < 0 or labels.max() >= num_labels:
            raise ValueError(
                f"{path}/labels.npy is not {shape[0]} labels from 0 to {num_labels - 1} as "
                "meta.json says; prepare the dataset again"
            )

    def __len__(self):
        return len(self.images)

    def __reduce__(self):
        return Dataset, (self.path,)  # a worker process maps the array anew and copies nothing

    def __getitems__(self, indices):
        labels = self.labels[indices].astype(np.int64)
        return torch.from_numpy(self.images[indices]), torch.from_numpy(labels)


def write_dataset(out, batches, count, shape, classes, source):
    """Write a dataset from batches of (images (n, C, H, W) uint8, labels (n,)).

    count: an upper bound on the number of pictures; the array is cut to what came.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    images = np.lib.format.open_memmap(out / "images.npy", "w+", np.uint8, (count, *shape))
    labels = np.zeros(count, np.int32)
    done, begin, shown = 0, time.time(), 0.0
    for batch, batch_labels in batches:
        images[done : done + len(batch)] = batch
        labels[done : done + len(batch)] = batch_labels
        done += len(batch)
        if time.time() - shown > 1 or done == count:
            shown = time.time()
            left = (shown - begin) / max(done, 1) * (count - done)
            print(
                f"\r{out}: {done:,} of {count:,} pictures, {left:.0f} s left ", end="", flush=True
            )
    print()
    if not done:
        sys.exit(f"prepare_latents.py: error: {source} holds no readable picture")
    images.flush()
    if done < count:
        shrink(out / "images.npy", images, done)
        images, labels = np.load(out / "images.npy", mmap_mode="r"), labels[:done]
    np.save(out / "labels.npy", labels)
    firsts = [np.flatnonzero(labels == k)[:5] for k in np.unique(labels)[:10]]
    rows = [[images[i] for i in np.resize(first, 5)] for first in firsts]
    save_grid(np.concatenate(np.stack(rows, axis=1)), out / "preview.png", columns=len(firsts))
    meta = dict(
        format=FORMAT, count=done, shape=list(shape), dtype="uint8", scale=1 / 127.5, shift=-1.0,
        classes=classes, source=source,
    )  # fmt: skip
    (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    print(f"{out}: {done:,} pictures {tuple(shape)} of {len(classes)} classes, see preview.png")


def shrink(path, array, count):
    """Cut a .npy file to its first `count` rows in place: numpy pads its headers to allow it."""
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": (count, *array.shape[1:])}
    with open(path, "r+b") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + count * array[0].nbytes)


# ---------------------------------------------------------------------------- built-in pictures


@lru_cache
def digit_font(size):
    """The outline font that Pillow carries; OSError where Pillow was built without FreeType."""
    return ImageFont.load_default(size)


def draw_digit(digit, size, rng):
    """One grey picture of a digit, at random size, place, angle, shear and stroke: (size, size)."""
    large = 4 * size  # drawn large and averaged down: smooth at any angle
    canvas = Image.new("L", (large, large))
    ImageDraw.Draw(canvas).text(
        (large / 2, large / 2),
        str(digit),
        fill=255,
        font=digit_font(0.8 * large),
        anchor="mm",
        stroke_width=int(rng.integers(0, large // 64 + 1)),
    )
    angle, shear = rng.uniform(-0.25, 0.25), rng.uniform(-0.3, 0.3)
    zoom, shift = rng.uniform(0.75, 1.1, 2), rng.uniform(-0.06, 0.06, 2) * large
    cos, sin = math.cos(angle), math.sin(angle)
    # Pillow wants the map from the new picture's coordinates to the old one's, row by row.
    matrix = np.array([[cos, -sin], [sin, cos]]) @ [[1, shear], [0, 1]] @ np.diag(zoom)
    offset = large / 2 - matrix @ (large / 2 + shift)
    rows = np.column_stack([matrix, offset]).ravel().tolist()
    bent = canvas.transform(canvas.size, Image.Transform.AFFINE, rows, Image.Resampling.BILINEAR)
    return np.asarray(bent.resize((size, size), Image.Resampling.BOX))


def write_glyphs(out, count=20_000, size=16, seed=0):
    """The built-in dataset: digits 0 to 9 in turn, (1, size, size), the same for the same seed."""
    rng = np.random.default_rng(seed)

    def batches(length=500):
        for start in range(0, count, length):
            labels = np.arange(start, min(start + length, count)) % 10
            yield np.stack([draw_digit(digit, size, rng)[None] for digit in labels]), labels

    classes = [str(digit) for digit in range(10)]
    write_dataset(out, batches(), count, (1, size, size), classes, f"glyphs, seed {seed}")


# ---------------------------------------------------------------------------- a folder of images


class ImageFolder(torch.utils.data.Dataset):
    """root/class/**/picture: item i is (pixels (3, size, size) uint8, label, None) or, for a file
    that cannot be read, (None, label, one line that names it). Classes go by alphabet.
    """

    def __init__(self, root, size):
        self.size, self.classes, self.files = size, [], []
        for folder in sorted(Path(root).iterdir()):
            if folder.is_dir() and not folder.name.startswith("."):
                paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
                self.files += [(path, len(self.classes)) for path in paths]
                self.classes += [folder.name] if paths else []

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        path, label = self.files[index]
        try:
            with Image.open(path) as image:
                image = center_crop(to_rgb(ImageOps.exif_transpose(image)), self.size)
        except Exception as error:  # Pillow raises many kinds for a damaged file
            return None, label, f"{path} cannot be read ({type(error).__name__})"
        return np.asarray(image).transpose(2, 0, 1), label, None


def to_rgb(image):
    """Any picture as 8-bit RGB; transparency is dropped. ValueError for floating-point pixels."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16 bits, which convert would clip to 8
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def center_crop(image, size):
    """ADM's crop (arXiv 2105.05233): halve while twice too large, resize the short side, cut."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def write_folder(root, out, size, workers, skip_unreadable):
    """Images of root/class/ as pixels. A VAE would encode the loader's batches here.

    No mirrored images are added, as in the code of MeanFlow's authors.
    """
    folder = ImageFolder(root, size)
    if not len(folder):
        sys.exit(f"prepare_latents.py: error: {root} has no images in sub-folders, one for a class")
    loader = torch.utils.data.DataLoader(
        folder, batch_size=64, num_workers=workers, collate_fn=list
    )
    skipped = 0

    def batches():
        nonlocal skipped
        for items in loader:
            for message in (message for _, _, message in items if message):
                print()
                if not skip_unreadable:
                    sys.exit(
                        f"prepare_latents.py: error: {message}; mend it or pass --skip-unreadable"
                    )
                print(f"skipped: {message}")
                skipped += 1
            kept = [(pixels, label) for pixels, label, message in items if not message]
            if kept:
                yield np.stack([pixels for pixels, _ in kept]), [label for _, label in kept]

    write_dataset(out, batches(), len(folder), (3, size, size), folder.classes, str(root))
    if skipped:
        print(f"{skipped} of {len(folder)} files could not be read and were skipped")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="prepare_latents.py",
        usage="prepare_latents.py SOURCE --out DIR [flags]; --help lists them all",
        description=__doc__.splitlines()[0],
    )
    add = parser.add_argument
    add("source", help="'glyphs', or a folder with one sub-folder of images per class")
    add("--out", required=True, help="directory of the dataset to write")
    add("--size", type=int, help="height and width in pixels (default: glyphs 16, folder 32)")
    add("--count", type=int, default=20_000, help="glyphs: number of pictures")
    add("--seed", type=int, default=0, help="glyphs: another seed draws other pictures")
    add("--workers", type=int, default=2, help="folder: processes that decode images")
    add("--skip-unreadable", action="store_true", help="folder: name and leave out broken files")
    args = parser.parse_args(argv)
    if args.size is None:
        args.size = 16 if args.source == "glyphs" else 32
    if min(args.size, args.count) < 1 or min(args.workers, args.seed) < 0:
        parser.error("--size and --count must be positive, --workers and --seed not negative")
    if is_in_file(Path(args.out)):
        parser.error(f"--out {args.out} is not a directory, or lies in a file")
    if (Path(args.out) / "meta.json").exists():
        parser.error(f"--out {args.out} already holds a dataset; remove it or name another")
    if args.source != "glyphs" and not Path(args.source).is_dir():
        parser.error(f"{args.source} is no folder; give 'glyphs' or a folder of class folders")
    return args


def main(args):
    if args.source == "glyphs":
        write_glyphs(args.out, args.count, args.size, args.seed)
    else:
        write_folder(args.source, args.out, args.size, args.workers, args.skip_unreadable)


if __name__ == "__main__":
    main(parse_args())
