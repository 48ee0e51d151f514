"""Turn pictures into the one dataset format that train.py reads.

    python prepare_latents.py glyphs --out data/glyphs       the built-in pictures: ten digits
    python prepare_latents.py IMAGES --out DIR --size 32     IMAGES/class/picture.png, as pixels
    python prepare_latents.py cifar-10-binary.tar.gz --out data/cifar10 --unconditional
    torchrun --nproc_per_node=8 prepare_latents.py IMAGES --out data/imagenet --vae FILE

The last stores the latents of 256x256 images by the VAE of Stable Diffusion (arXiv 2112.10752) in
FILE; the same command again resumes. A folder without sub-folders is an unconditional dataset. A
dataset is a directory with

    images.npy   (N, C, H, W) uint8, or for latents (N, 2C, H, W) float16 or float32: mean and
                 standard deviation of the posterior; memory-mapped when read
    labels.npy   (N,) int32; below 0 marks a row without a picture: its file could not be read
    meta.json    format, count N, shape (C, H, W) of the network's x, dtype, scale and shift,
                 classes (names; empty: unconditional), source, files (fingerprint of their names),
                 vae (fingerprint of its encoder, or null), mirrored (whether the second half of the
                 rows mirrors the first); written last: without it, the dataset is unfinished
    preview.png  a look at the first pictures of up to ten classes

where x = scale * stored + shift, or for latents x = scale * (mean + std * noise).
"""

import argparse
import atexit
import gzip
import hashlib
import io
import json
import math
import os
import re
import sys
import tarfile
import time
import zlib
from collections import Counter, OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import nn

from model import (
    LATENT_SCALE, PIXELS, conv, fail, fingerprint, load_file, load_strictly, norm, weights_in,
)  # fmt: skip

FORMAT = 1  # of the dataset; raised when a reader of the old one would misread the new
EMPTY, UNREADABLE = -1, -2  # labels of rows not written yet, and of unreadable pictures
MADE_HERE = "MeanFlow"  # in the text of a PNG that may be replaced
DRAFT = "unfinished.json"  # becomes meta.json when every row is written
IMAGE_SUFFIXES = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
SYSTEM_NAMES = re.compile(
    r"\..*|@eaDir|#recycle|\$RECYCLE\.BIN|__MACOSX|lost\+found|System Volume Information|Thumbs\.db"
)
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # or a PNG with a long text beside its pixels is refused
CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR_CLASSES += ["dog", "frog", "horse", "ship", "truck"]
# Of the layers of attention, in older files with diffusers' names.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
digit_font = lru_cache(ImageFont.load_default)  # of a size: the outline font that Pillow carries


# ---------------------------------------------------------------------------- the dataset format


def stored_shape(meta):
    """Shape of images.npy, whose rows are pixels or a latent's mean and standard deviation."""
    channels, *size = meta["shape"]
    return (meta["count"], 2 * channels if meta["vae"] else channels, *size)


class Dataset:
    """Reads a dataset directory; a list of indices gives one batch.

    dataset[indices] -> images (B, ...) as stored, labels (B,) int64, both tensors.
    Ends the script where there is no whole dataset.
    """

    def __init__(self, path):
        path = Path(path)
        if (path / DRAFT).exists():
            fail(f"{path} is unfinished; run prepare_latents.py again, it resumes")
        try:
            self.meta = meta = json.loads((path / "meta.json").read_text())
            self.images = np.load(path / "images.npy", mmap_mode="r")
            self.labels = np.load(path / "labels.npy")
            found = meta["format"], self.images.shape, self.images.dtype, len(self.labels)
            expected = FORMAT, stored_shape(meta), meta["dtype"], meta["count"]
            if found != expected or self.labels.max() >= max(len(meta["classes"]), 1):
                raise ValueError("meta.json does not describe the arrays beside it")
        except (OSError, ValueError, LookupError, TypeError, EOFError) as error:
            fail(f"{path} holds no whole dataset ({error}); make it with prepare_latents.py")
        self.rows = np.flatnonzero(self.labels >= 0)

    def __len__(self):
        return len(self.rows)

    @property
    def epoch_length(self):
        """Pictures in an epoch: a picture and its mirror image count as one."""
        return len(self) // 2 if self.meta.get("mirrored") else len(self)

    def __getitem__(self, indices):
        rows = self.rows[indices]
        return torch.from_numpy(self.images[rows]), torch.from_numpy(self.labels[rows].astype(int))


def pixel_meta(**entries):
    """meta.json of a dataset of pixels."""
    return dict(format=FORMAT, dtype="uint8", mirrored=False) | PIXELS | entries


def network_input(stored, meta, generator=None):
    """The network's x (B, C, H, W) from rows of images.npy: pixels scaled, latents drawn afresh."""
    if not meta["vae"]:
        return stored.float() * meta["scale"] + meta["shift"]
    mean, std = stored.float().chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    return (mean + std * noise) * meta["scale"]


def augment(x, generator):
    """EDM's geometric augmentation (arXiv 2206.00364, App. F.2) of x (B, C, S, S), on its device.

    Every picture is mirrored with probability 1/2, without a label. Returns x and the labels
    (B, 6) of a second mirroring, scale, stretch along an axis (2) and shift (2); 0 is none.
    differs: pixels are interpolated by one bicubic step, EDM's by a wavelet at twice the size.
    """
    n, size = len(x), x.shape[-1]
    options = dict(generator=generator, device=x.device)
    chance, (scale, stretch, dx, dy) = torch.rand(6, n, **options), torch.randn(4, n, **options)
    angle = 2 * math.pi * torch.rand(n, **options) - math.pi
    mirrored, flip = chance[0] < 0.5, chance[1] < 0.5
    scale, stretch = scale * (chance[2] < 0.12), stretch * (chance[3] < 0.12)
    angle, dx, dy = angle * (chance[4] < 0.5), dx * (chance[5] < 0.12), dy * (chance[5] < 0.12)
    cos, sin = angle.cos(), angle.sin()
    labels = torch.stack([flip.float(), scale, stretch * cos, stretch * sin, dx, dy], 1)

    # The linear map from places in the new picture, from its centre, to those in the old one.
    long, short = 2 ** (-0.2 * (scale + stretch)), 2 ** (-0.2 * (scale - stretch))
    skew = cos * sin * (short - long)
    rows = [cos**2 * long + sin**2 * short, skew, skew, sin**2 * long + cos**2 * short]
    matrix = torch.stack(rows, 1).view(n, 2, 2)
    line = torch.arange(size, device=x.device) - (size - 1) / 2
    places = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(1, -1, 2)
    places = places - size / 8 * torch.stack([dx, dy], 1)[:, None]
    places = (places[:, :, None] * matrix[:, None]).sum(-1)  # no matrix product, for TF32's sake
    places = places.view(n, size, size, 2) * 2 / (size - 1)
    x = torch.where((mirrored ^ flip)[:, None, None, None], x.flip(-1), x)
    how = dict(mode="bicubic", padding_mode="reflection", align_corners=True)
    moved = labels[:, 1:].ne(0).any(1)[:, None, None, None]
    return torch.where(moved, F.grid_sample(x, places, **how), x), labels


class DatasetWriter:
    """Fills a dataset in place, on one process or several, and resumes where another run ended.

    images.npy and labels.npy have their full size from the start, every label EMPTY. The images of
    a batch are on the disk before their labels are written: a row with a label is complete.
    Rank 0 must be the first to construct it: it makes the files.
    """

    def __init__(self, out, meta):
        self.out, self.meta = Path(out), meta
        images, labels = self.out / "images.npy", self.out / "labels.npy"
        self.complete = (self.out / "meta.json").exists()
        record = self.out / ("meta.json" if self.complete else DRAFT)
        if record.exists():
            try:
                was = dict(json.loads(record.read_text()))
            except (ValueError, TypeError):
                was = {}  # somebody else's
            if other := [key for key in meta if key != "source" and was.get(key) != meta[key]]:
                differs = f"--out {out} holds a dataset that differs in {', '.join(other)}"
                fail(f"{differs}; remove it or name another")
        else:
            for name in ("images.npy", "labels.npy", "preview.png"):
                if (self.out / name).exists():
                    fail(f"--out {out} holds a {name} without its meta.json; name another")
            text = json.dumps(meta, indent=1) + "\n"
            replace_file(record, lambda file: file.write(text.encode()))
        if not self.complete and not labels.exists():  # the last of the files that are made
            np.lib.format.open_memmap(images, "w+", meta["dtype"], stored_shape(meta))
            empty = np.full(meta["count"], EMPTY, np.int32)
            replace_file(labels, lambda file: np.save(file, empty))
        self.images, self.labels = np.load(images, mmap_mode="r"), np.load(labels, mmap_mode="r")

    def write(self, first, images, labels):
        """Rows first, first + 1, ... of this process: images as stored, and labels.

        Written, not mapped: processes on other machines may write to the same page of the file.
        """
        for array, rows in [(self.images, images), (self.labels, labels)]:
            with open(array.filename, "r+b") as file:
                file.seek(array.offset + first * array[0].nbytes)
                file.write(np.ascontiguousarray(rows, array.dtype))
                file.flush()
                os.fsync(file.fileno())

    def finish(self, vae=None):
        """Rank 0, after all ranks have written. The VAE decodes the preview of latents."""
        labels = np.load(self.out / "labels.npy")
        found, shape = labels[labels >= 0], tuple(self.meta["shape"])
        if not len(found):
            fail(f"{self.meta['source']} holds no readable picture")
        if not self.complete:
            kinds = np.unique(found)[:10]
            each = 1 if vae else 5  # to decode a latent takes a while on a CPU
            rows = np.stack([np.resize(np.flatnonzero(labels == k), each) for k in kinds], axis=1)
            pixels = self.images[rows.ravel()]
            if vae:
                mean = torch.from_numpy(pixels).float().chunk(2, dim=1)[0]
                pixels = to_pixels(mean.to(vae.quant_conv.weight.device), vae)
            save_grid(pixels, self.out / "preview.png", columns=len(kinds))
            os.replace(self.out / DRAFT, self.out / "meta.json")
        count = f"{len(found):,} of {len(labels):,} pictures {shape}"
        print(f"{self.out}: {count} of {len(self.meta['classes'])} classes, see preview.png")


# ---------------------------------------------------------------------------- a folder of images


def read_image(path, size=None):
    """(3, H, W) uint8 of a picture file as a viewer shows it; cut to size x size where given.

    ValueError where it cannot be read. differs: ADM's code ignores the orientation in EXIF data.
    """
    try:
        # Opened here: a TIFF that Pillow opens itself may be mapped, and then it is turned wrong.
        with open(path, "rb") as file, Image.open(file) as image:
            image.load()  # which turns a TIFF by itself
            with suppress(Exception):  # the pixels may be whole where the EXIF data are not
                ImageOps.exif_transpose(image, in_place=True)  # turns before it edits the data
            if image.mode == "F" or (image.mode, image.format) == ("I", "TIFF"):
                raise ValueError("pixels of 32 bits, or with a sign, have no known range")
            if image.mode.startswith("I"):  # 16 bits, which convert would clip to 8
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGB")  # drops transparency
            image = center_crop(image, size) if size else image
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise ValueError(f"{path} cannot be read ({error!r})") from None
    return np.array(image).transpose(2, 0, 1)


def center_crop(image, size):
    """ADM's crop (arXiv 2105.05233): halve while twice too large, resize the short side, cut."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    # Of one longer than 16 : 1 only the middle is enlarged: all of 1 x 65,500 would take 14 GB.
    left, top = (max(0, (side - 16 * min(image.size)) // 2) for side in image.size)
    image = image.crop((left, top, image.width - left, image.height - top))
    scale = size / min(image.size)
    resized = tuple(round(side * scale) for side in image.size)
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def image_files(folder):
    """The pictures in a folder and all its sub-folders, sorted: every suffix that Pillow can open.

    Prints what is left out. Ends the script where a folder cannot be listed.
    """

    def refuse(error):
        fail(f"{error.filename} cannot be listed: {error.strerror}")

    paths, left_out = [], Counter()
    for top, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        top = Path(top)
        if top.is_symlink() and any(top.samefile(parent) for parent in top.parents):
            fail(f"{top} is a link to a folder around it; remove it")
        if top != Path(folder) and {"images.npy", "labels.npy"} <= {*names}:
            left_out["datasets"] += 1
            folders.clear()
            continue
        left_out["empty folders"] += not folders + names
        hidden = {name for name in folders + names if SYSTEM_NAMES.fullmatch(name)}
        left_out["hidden or system files"] += len(hidden)
        folders[:] = [name for name in folders if name not in hidden]
        for path in (top / name for name in names if name not in hidden):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                paths.append(path)
            elif path.exists():
                left_out[path.suffix or "files without a suffix"] += 1
            else:
                fail(f"{path} is a link to what does not exist")
    if (said := +left_out) and not of_job("RANK"):
        print(f"{folder}: left out {', '.join(f'{n:,} {what}' for what, n in said.items())}")
    return sorted(paths)


class ImageFolder:
    """root/class/**/picture, classes by alphabet; or root/picture, without classes (label 0).

    folder[indices] is a batch: pixels (B, 3, size, size) uint8, labels (B,), and a line for each
    file that cannot be read, whose label is UNREADABLE.
    """

    def __init__(self, root, size, unconditional=False):
        paths = image_files(root)
        names = [path.relative_to(root).parts for path in paths]  # class, ..., picture
        flat = [name[0] for name in names if len(name) == 1]
        if not paths:
            fail(f"{root} holds no pictures, neither itself nor in folders of classes")
        if 0 < len(flat) < len(paths):
            fail(f"{root} holds pictures, {flat[0]} among them, beside folders of classes")
        self.size, self.paths = size, paths
        self.classes = [] if flat or unconditional else sorted({name[0] for name in names})
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels = [numbers.get(name[0], 0) for name in names]
        text = "\n".join("/".join(name) for name in names)
        self.fingerprint = hashlib.sha256(os.fsencode(text)).hexdigest()[:16]

    def __getitem__(self, indices):
        pixels = np.zeros((len(indices), 3, self.size, self.size), np.uint8)
        labels, faults = np.full(len(indices), UNREADABLE), []
        for row, index in enumerate(indices):
            try:
                pixels[row] = read_image(self.paths[index], self.size)
                labels[row] = self.labels[index]
            except ValueError as error:
                faults.append(str(error))
        return pixels, labels, faults


# ---------------------------------------------------------------------------- CIFAR-10


class Cifar:
    """CIFAR-10's training pictures in the order of their files. cifar[indices]: see ImageFolder.

    source: cifar-10-binary.tar.gz, or its folder, with data_batch_1.bin to data_batch_5.bin. A
    record is a byte for the label and 3,072 for the picture.
    """

    def __init__(self, source, unconditional=False):
        source, records = Path(source), []
        try:
            if source.is_dir():
                files = {path.name: path.read_bytes() for path in source.glob("*.bin")}
            else:  # decompressed whole, which checks its checksum
                data = io.BytesIO(gzip.decompress(source.read_bytes()))
                with tarfile.open(fileobj=data) as tar:
                    members = {Path(m.name).name: m for m in tar if m.isfile()}
                    files = {name: tar.extractfile(m).read() for name, m in members.items()}
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            fail(f"{source} is no whole .tar.gz file ({error})")
        for name in (f"data_batch_{number}.bin" for number in range(1, 6)):
            if not files.get(name) or len(files[name]) % 3073:
                fail(f"{source} holds no whole {name} of CIFAR-10's binary version")
            records.append(np.frombuffer(files[name], np.uint8).reshape(-1, 3073))
        records = np.concatenate(records)
        if records[:, 0].max() > 9:
            fail(f"{source} has labels above 9, unlike CIFAR-10")
        self.labels, self.images = records[:, 0], records[:, 1:].reshape(-1, 3, 32, 32)
        self.classes = CIFAR_CLASSES
        if unconditional:
            self.classes, self.labels = [], 0 * self.labels
        self.fingerprint = hashlib.sha256(self.images.tobytes()).hexdigest()[:16]

    def __getitem__(self, indices):
        return self.images[indices], self.labels[indices], []


# ---------------------------------------------------------------------------- built-in pictures


def draw_digit(digit, size, rng):
    """One grey picture of a digit, at random size, place, angle, shear and stroke: (size, size)."""
    large = 4 * size  # drawn large and averaged down: smooth at any angle
    canvas, middle = Image.new("L", (large, large)), (large / 2, large / 2)
    stroke = int(rng.integers(0, large // 64 + 1))
    style = dict(font=digit_font(0.8 * large), anchor="mm", stroke_width=stroke)
    ImageDraw.Draw(canvas).text(middle, str(digit), fill=255, **style)
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
    meta = pixel_meta(
        count=count, shape=[1, size, size], classes=[str(digit) for digit in range(10)],
        source=f"glyphs, seed {seed}", files=f"seed {seed}",
    )  # fmt: skip
    held = lock(out, wait=True)  # several runs may start at once where it is missing
    writer = DatasetWriter(out, meta)
    if not writer.complete:
        labels, rng = np.arange(count) % 10, np.random.default_rng(seed)
        writer.write(0, np.stack([draw_digit(k, size, rng)[None] for k in labels]), labels)
    writer.finish()
    os.close(held)


# ---------------------------------------------------------------------------- the VAE


def chain(**parts):
    """Layers applied in turn; their names are those of the weights in diffusers' files."""
    return nn.Sequential(OrderedDict(parts))


class ResnetBlock(nn.Module):
    """Two normalised convolutions and a shortcut: (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), conv(inputs, outputs)
        self.norm2, self.conv2 = norm(outputs), conv(outputs, outputs)
        self.conv_shortcut = conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + self.conv_shortcut(x)


class PixelAttention(nn.Module):
    """Self-attention of one head between all places: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width):
        super().__init__()
        self.group_norm = norm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x):
        # With a dimension for the head, since the fused kernels for GPUs take 4-D tensors only.
        h = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + rearrange(self.to_out(h), "b 1 (h w) c -> b c h w", h=x.shape[2])


class Middle(nn.Module):
    """A resnet block, attention, a resnet block: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width):
        super().__init__()
        self.attentions = nn.Sequential(PixelAttention(width))
        self.resnets = nn.Sequential(ResnetBlock(width, width), ResnetBlock(width, width))

    def forward(self, x):
        return self.resnets[1](self.attentions(self.resnets[0](x)))


def downsample(width):
    """(B, C, H, W) -> (B, C, H / 2, W / 2), padded only at the right and at the bottom."""
    return chain(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2))


def upsample(width):
    """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
    return chain(enlarge=nn.Upsample(scale_factor=2), conv=conv(width, width))


def levels(widths, blocks, name, resample):
    """For each width `blocks` resnet blocks; between two widths a layer that changes the size."""
    inputs, result = [widths[0], *widths], nn.Sequential()
    for i, width in enumerate(widths):
        resnets = [ResnetBlock(width if j else inputs[i], width) for j in range(blocks)]
        level = chain(resnets=nn.Sequential(*resnets))
        if i < len(widths) - 1:
            level.add_module(name, nn.Sequential(resample(width)))
        result.append(level)
    return result


class VAE(nn.Module):
    """Stable Diffusion's autoencoder (arXiv 2112.10752) under diffusers' names of the weights.

    encode: images (B, 3, H, W) in [-1, 1] -> mean and log-variance (B, C, H/8, W/8) of a latent.
    decode: latents (B, C, H/8, W/8), not scaled -> images (B, 3, H, W), about [-1, 1].
    """

    def __init__(self, widths=(128, 256, 512, 512), latent=4):
        super().__init__()
        first, last = widths[0], widths[-1]
        self.encoder = chain(
            conv_in=conv(3, first),
            down_blocks=levels(widths, 2, "downsamplers", downsample),
            mid_block=Middle(last),
            conv_norm_out=norm(last),
            silu=nn.SiLU(),
            conv_out=conv(last, 2 * latent),
        )
        self.decoder = chain(
            conv_in=conv(latent, last),
            mid_block=Middle(last),
            up_blocks=levels(widths[::-1], 3, "upsamplers", upsample),
            conv_norm_out=norm(first),
            silu=nn.SiLU(),
            conv_out=conv(first, 3),
        )
        self.quant_conv = conv(2 * latent, 2 * latent, 1)
        self.post_quant_conv = conv(latent, latent, 1)
        self.latent, self.factor = latent, 2 ** (len(widths) - 1)

    def encode(self, x):
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))

    def fingerprint(self):
        """Of what makes latents: the published fine-tuned VAEs differ in their decoders alone."""
        state = self.state_dict()
        return fingerprint({k: v for k, v in state.items() if k.startswith(("enc", "quant"))})


def load_vae(path):
    """The VAE in a file with diffusers' names, old or new, as float32, on the CPU."""
    state = {}
    for name, tensor in weights_in(load_file(path), path, "decoder.conv_in.weight")[0].items():
        parts = [OLD_NAMES.get(part, part) for part in name.split(".")]
        state[".".join(parts)] = tensor
    name, widths = "encoder.down_blocks.{}.resnets.0.conv1.weight", []
    while name.format(len(widths)) in state:
        widths.append(len(state[name.format(len(widths))]))
    if not widths or "post_quant_conv.weight" not in state:
        fail(f"--vae {path} holds no VAE with diffusers' names: encoder.conv_in.weight, ...")
    with torch.device("meta"):
        vae = VAE(widths, len(state["post_quant_conv.weight"]))
    load_strictly(vae, state, path)
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # faster


@torch.no_grad()
def posterior(vae, pixels, dtype):
    """Rows of images.npy from pictures (B, 3, H, W) uint8: mean and deviation (B, 2C, H/8, W/8)."""
    pixels = torch.from_numpy(pixels.copy()).to(vae.quant_conv.weight.device)
    mean, logvar = vae.encode(pixels.float() / 127.5 - 1)
    rows = torch.cat([mean, (logvar / 2).exp()], dim=1).cpu().numpy().astype(dtype)
    if not np.isfinite(rows).all():
        fail("--vae gave latents that are no numbers: are its weights damaged? Try --dtype float32")
    return rows


# ---------------------------------------------------------------------------- command line


def parse_args(argv=None):
    about, style = __doc__.splitlines()[0], argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False, formatter_class=style)
    add = parser.add_argument
    add("source", help="'glyphs', cifar-10-binary.tar.gz, or a folder of images, with a sub-folder "
        "for each class if any")  # fmt: skip
    add("--out", required=True, type=Path, help="directory of the dataset to write")
    add("--vae", help="weights of the VAE that turns images into latents, in diffusers' format")
    add("--size", type=int, help="height and width in pixels; glyphs 16, pixels 32, latents 256")
    add("--unconditional", action="store_true", help="leave out the classes")
    add("--flip", action="store_true", help="store the mirror images too")
    add("--dtype", choices=("float16", "float32"), default="float16", help="of stored latents")
    add("--batch-size", type=int, default=32, help="images at once on a rank")
    add("--workers", type=int, default=default_workers(), help="threads per rank to read pictures")
    add("--skip-unreadable", action="store_true", help="folder: name and leave out broken files")
    add("--count", type=int, default=20_000, help="glyphs: number of pictures")
    add("--seed", type=int, default=0, help="glyphs: another seed draws other pictures")
    args = parser.parse_args(argv)
    glyphs = args.source == "glyphs"
    if args.size is None:
        args.size = 16 if glyphs else 256 if args.vae else 32
    if min(args.size, args.count, args.batch_size, args.workers) < 1 or args.seed < 0:
        parser.error("--size, --count, --batch-size and --workers start at 1, --seed at 0")
    if glyphs and (args.vae or args.flip or args.unconditional):
        parser.error("--vae, --flip and --unconditional are not for glyphs")
    if Path(args.source, "meta.json").exists():
        parser.error(f"{args.source} is a dataset already; give a folder of images")
    if not glyphs and not Path(args.source).exists():
        parser.error(f"{args.source} is no folder of images, no file of CIFAR-10 and not 'glyphs'")
    return args


def main(args):
    """The digits; or CIFAR-10, or a folder of images as pixels or latents, mirrored ones by --flip.

    Work is split into batches of given pictures, so the arrays do not depend on the number of ranks
    or on interruptions. differs: latents are float16 by default; the authors' code has float32.
    """
    if args.source == "glyphs":
        write_glyphs(args.out, args.count, args.size, args.seed)
        return
    rank, world, device = join_ranks()
    if Path(args.source).is_file() or any(Path(args.source).glob("data_batch_*.bin")):
        if args.vae or args.size != 32:
            fail("--vae and --size are for a folder of images, not for CIFAR-10")
        source = Cifar(args.source, args.unconditional)
    else:
        source = ImageFolder(args.source, args.size, args.unconditional)
    count = len(source.labels)
    if rank == 0:
        print(f"{args.source}: {count:,} pictures of {len(source.classes):,} classes")
    meta = pixel_meta(
        count=count * (1 + args.flip), shape=[3, args.size, args.size], classes=source.classes,
        mirrored=args.flip, files=source.fingerprint, source=str(args.source),
    )  # fmt: skip
    vae, stored = None, np.asarray
    if args.vae:
        vae = load_vae(args.vae).to(device)
        stored = partial(posterior, vae, dtype=args.dtype)
        side, rest = divmod(args.size, vae.factor)
        if rest:
            fail(f"--size {args.size} is no multiple of {vae.factor}, as --vae needs")
        meta |= dict(shape=[vae.latent, side, side], dtype=args.dtype, vae=vae.fingerprint())
        meta |= dict(scale=LATENT_SCALE, shift=0)

    if rank == 0:
        lock(args.out)
        DatasetWriter(args.out, meta)  # makes the files
    wait_for_all()
    writer = DatasetWriter(args.out, meta)
    batches = [] if writer.complete else batches_of(count, args.batch_size)
    todo = [batch for batch in batches if (writer.labels[batch] < 0).any()]
    if rank == 0 and (done := count - sum(map(len, todo))):
        print(f"{args.out}: {done:,} of {count:,} pictures are done already")
    wait_for_all()  # no rank writes before all have listed the same work
    todo = todo[rank * len(todo) // world : (rank + 1) * len(todo) // world]
    progress, background = Progress(args.out, len(todo)), Background()
    readings = read_ahead(source.__getitem__, todo, args.workers)
    for batch, reading in zip(todo, readings, strict=True):
        pixels, labels, faults = reading.result()
        for fault in faults:
            if not args.skip_unreadable:
                fail(f"{fault}; replace it or pass --skip-unreadable")
            print(f"skipped: {fault}", file=sys.stderr)
        rows = stored(pixels)
        if vae and batch[0] == 0:
            mean, std = np.split(rows.astype(np.float64), 2, axis=1)
            spread = LATENT_SCALE * (mean.var() + np.square(std).mean()) ** 0.5
            print(f"{args.out}: standard deviation of latents {spread:.2f}; it should be 1")
        if args.flip:  # first: a label in the first half implies that both rows are written
            background(writer.write, count + batch[0], stored(pixels[..., ::-1]), labels)
        background(writer.write, batch[0], rows, labels)
        progress(1)
    background.wait()
    wait_for_all()
    if rank == 0:
        writer.finish(vae)
    leave_ranks()


# ---------------------------------------------------------------------------- shared by the scripts


def run_script(main, args):
    """main(args), but an error of the disk or the system ends the script with one line."""
    for stream in (sys.stdout, sys.stderr):  # names that ASCII does not have
        stream.reconfigure(errors="backslashreplace")
    try:
        main(args)
    except Exception as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it
        if not isinstance(cause, OSError):
            raise
        written = (vars(args).get(name) for name in ("export", "out", "save"))
        where = cause.filename or next(filter(None, written), "output")
        fail(f"{where}: {cause.strerror or cause}")


def join_ranks(backend="gloo", timeout=timedelta(days=1)):  # ranks wait for the slowest
    """(rank, world, device) of this process: alone, or one of torchrun's, each with its own GPU."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        fail(f"torch {torch.__version__}: 2.11 is needed; bfloat16 trains wrongly on older ones")
    rank, world, local = (of_job(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    untold = {"RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if rank >= world or (world > 1 and untold):
        fail(f"RANK {rank} of WORLD_SIZE {world}: no job that torchrun started; unset them")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        if device.index >= torch.cuda.device_count():
            fail(f"--nproc_per_node: there are {torch.cuda.device_count()} GPUs on this machine")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
        torch.backends.cuda.enable_cudnn_sdp(False)  # NaN in gradients: pytorch#196678
    if world > 1:
        store = next(dist.rendezvous("env://", timeout=timeout))[0]
        if rank == 0:  # what NCCL left in the store of a job that hung would end its successor
            store.delete_key("exception_dump")
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun of torch 2.13 hands the store of a job that died to the one that it restarts,
            # with the addresses of the dead in it. Across machines the number of restarts differs.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return rank, world, device


def of_job(name):
    """One of the numbers by which torchrun tells a process its place; those of a job of one."""
    text = os.environ.get(name) or ("1" if name.endswith("SIZE") else "0")
    if not text.isdecimal() or (text == "0" and name.endswith("SIZE")):
        fail(f"{name} is {text}; use torchrun, or unset it")
    return int(text)


def wait_for_all():
    if dist.is_initialized():
        try:
            dist.barrier()
        except RuntimeError:
            fail("another rank has ended; its message says why")


def leave_ranks():
    """All ranks together: gloo aborts a process that ends while another still talks to it."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def batches_of(count, size):
    return [range(count)[first : first + size] for first in range(0, count, size)]


def default_workers():
    """Threads that decode images for a rank: its share of the cores, at most 8."""
    return max(1, min(8, (os.cpu_count() or 1) // of_job("LOCAL_WORLD_SIZE")))


def read_ahead(read, items, threads):
    """Yields a Future of read(item) for each item, in order. Threads begin with the next ones.

    numpy and Pillow let other threads run while they copy and decode. What `read` raises, also by
    `fail`, result() raises again. A read that hangs does not keep Python from ending.
    """
    tasks, ahead = SimpleQueue(), deque()

    def work():
        for future, item in iter(tasks.get, None):
            try:
                future.set_result(read(item))
            except BaseException as error:
                future.set_exception(error)

    def end():
        """Python aborts where it ends while a thread computes. One that hangs is left behind."""
        with suppress(Empty):
            while True:
                tasks.get_nowait()
        for _ in workers:
            tasks.put(None)
        for worker in workers:
            worker.join(timeout=1)

    workers = [Thread(target=work, daemon=True) for _ in range(threads)]
    atexit.register(end)
    for worker in workers:
        worker.start()
    for item in items:
        ahead.append(Future())
        tasks.put((ahead[-1], item))
        if len(ahead) > 2 * threads:
            yield ahead.popleft()
    while ahead:
        yield ahead.popleft()


class Progress:
    """Prints the share of a long task that is done: progress(more). Rank 0 speaks for all."""

    def __init__(self, what, total):
        self.what, self.total, self.done = what, total, 0
        self.begin = self.shown = time.time()

    def __call__(self, more):
        self.done, now = self.done + more, time.time()
        due = self.done == self.total or now - self.shown > 10
        if due and not of_job("RANK"):
            left = timedelta(seconds=round((now - self.begin) * (self.total / self.done - 1)))
            print(f"{self.what}: {self.done / self.total:.1%}, {left} left", file=sys.stderr)
            self.shown = now


class Background:
    """Runs one call beside the caller. The next, or wait(), waits for it and raises its errors."""

    def __init__(self):
        self.pool, self.wait = ThreadPoolExecutor(1), lambda: None

    def __call__(self, function, *args):
        self.wait()
        self.wait = self.pool.submit(function, *args).result


def replace_file(path, write):
    """All or nothing: readers of `path` find the old file or the whole new one. write(file)."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk needs it
        raise
    os.replace(temporary, path)


def lock(folder, wait=False):
    """Make a directory and hold it until the process ends or closes the descriptor returned.

    If another process holds it, wait for its end or, by default, end the script.
    """
    import fcntl  # not on Windows

    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(Path(folder, ".lock"), os.O_CREAT | os.O_WRONLY)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):  # other errors: a disk without locks
        fail(f"{folder} is in use by another run; wait for its end or name another")
    except OSError:
        pass
    return descriptor


@torch.no_grad()
def to_pixels(x, vae=None, scale=1.0):
    """The network's x (B, C, H, W) to pictures, a uint8 array; latents are decoded, a few at once.

    [-1, 1] becomes 0 to 255, truncated as in the papers' evaluation.
    """
    if vae:
        x = torch.cat([vae.decode(part / scale) for part in x.split(16)])
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8).cpu().numpy()


def to_image(pixels):
    """(C, H, W) uint8 array to Pillow. Latents (C = 4) show as their first three channels."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels[:3].transpose(1, 2, 0))


def save_grid(pixels, path, columns):
    """One PNG of (N, C, H, W) uint8 pictures in rows of `columns`; small ones are enlarged."""
    blanks = np.zeros((-len(pixels) % columns, *pixels.shape[1:]), np.uint8)
    pixels = np.concatenate([pixels, blanks])
    grid = to_image(rearrange(pixels, "(r c) k h w -> k (r h) (c w)", c=columns))
    zoom = max(1, 64 // pixels.shape[-1])
    save_png(grid.resize((grid.width * zoom, grid.height * zoom), Image.Resampling.NEAREST), path)


def save_png(image, path):
    """Replace a file by a picture that says that it was made here."""
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", MADE_HERE)
    replace_file(path, partial(image.save, format="PNG", pnginfo=mark))


def made_here(path):
    """Whether save_png made this file, so that it may be replaced."""
    with suppress(Exception), Image.open(path) as image:
        return image.info.get("Software") == MADE_HERE
    return False


if __name__ == "__main__":
    run_script(main, parse_args())
