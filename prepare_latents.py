"""Turn pictures into the one dataset format that train.py reads.

    python prepare_latents.py glyphs --out data/glyphs       the built-in pictures: ten digits
    python prepare_latents.py IMAGES --out DIR --size 32     IMAGES/class/picture.png, as pixels
    torchrun --nproc_per_node=8 prepare_latents.py IMAGES --out data/imagenet --vae FILE

The last stores the latents of 256x256 images by the VAE of Stable Diffusion (arXiv 2112.10752) in
FILE. The same command again goes on where it was interrupted. A dataset is a directory with

    images.npy   (N, C, H, W) uint8, or for latents (N, 2C, H, W) float16 or float32: mean and
                 standard deviation of the posterior; memory-mapped when read
    labels.npy   (N,) int32; below 0 marks a row without a picture: its file could not be read
    meta.json    format, count N, shape (C, H, W) of the network's x, dtype, scale and shift,
                 classes (names; empty: unconditional), source, files (fingerprint of their names),
                 vae (fingerprint of its encoder, or null), mirrored (whether the second half of the
                 rows mirrors the first)
    preview.png  a look at the first pictures of up to ten classes

where x = scale * stored + shift, or for latents x = scale * (mean + std * noise). meta.json comes
last: a directory without it holds an unfinished dataset.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import socket
import sys
import time
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn

try:
    import fcntl
except ImportError:  # Windows, where nothing guards a directory against two runs
    fcntl = None

FORMAT = 1  # of the dataset; raised when a reader of the old one would misread the new
EMPTY, UNREADABLE = -1, -2  # labels of rows that hold no picture yet, or never will
LATENT_SCALE = 0.18215  # brings the latents of Stable Diffusion's VAE to unit variance
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


# ---------------------------------------------------------------------------- shared by the scripts


class InputError(ValueError):
    """Bad input: its text is one line that names the flag or the file, what is wrong, the mend."""


def fail(message, code=2, alike=False):
    """End with one line on standard error. Code 2, argparse's, is for bad input, 1 for a fault.
    alike: every rank fails in the same way, and one of each machine says so."""
    script, world = Path(sys.argv[0]).name, int(os.environ.get("WORLD_SIZE", 1))
    if not alike or os.environ.get("LOCAL_RANK", "0") == "0":
        rank = f"rank {os.environ['RANK']}: " if world > 1 and not alike else ""
        print(f"{script}: error: {rank}{message}", file=sys.stderr, flush=True)
    sys.exit(code)


def run_script(main):
    """main(), whose ranks end together. What a user can mend ends it with one line and its exit
    code: 2 for bad input, 1 for a fault of the machine, 130 for Ctrl-C. The rest are our bugs."""
    try:
        main()
        leave_ranks()
    except InputError as error:
        fail(last_line(error))
    except torch.OutOfMemoryError as error:
        fail(f"{str(error).splitlines()[0]} Take fewer pictures at once.", code=1)
    except OSError as error:  # a full disk
        fail(last_line(error), code=1)
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if not lost and "DataLoader worker (pid" not in str(error):
            raise
        what = "lost the other ranks, see what they say: " if lost else ""
        fail(what + str(error).splitlines()[0], code=1)
    except KeyboardInterrupt:
        fail("interrupted", code=130)


def damaged(what, error, mend=""):
    """InputError of a file that a library could not read: `what`, and in a line why."""
    problem = f"{what} ({type(error).__name__}: {error}"
    return InputError(" ".join(problem.split())[:300] + ")" + mend)


def last_line(error):
    """What an error says; after the traceback where a worker of a loader met it."""
    return re.sub(r"^[\w.]*Error: ", "", str(error).splitlines()[-1])


def join_ranks(backend="gloo", timeout=timedelta(days=1)):
    """(rank, world, device) of this process: alone, or one of torchrun's, each with its own GPU.

    The timeout is long: ranks that have finished their share wait for the slowest.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if world > 1:
        store = next(dist.rendezvous("env://", timeout=timeout))[0]
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun of torch 2.13 hands the store of a job that died to the one that it restarts,
            # with the addresses of the dead in it. Across machines the number of restarts differs.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        options = dict(store=store, rank=rank, world_size=world, timeout=timeout)
        dist.init_process_group(backend, **options)
    return rank, world, device


def leave_ranks():
    """Ends what join_ranks began, with all ranks together: gloo's thread aborts a process that ends
    while it still frees a tensor of the last exchange, and torchrun then ends the others."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def default_workers():
    """Processes that decode images for a rank: its share of the cores, at most 8."""
    return min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the default of each flag that has one."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """Of which one rank of a machine alone says what is wrong."""

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        if os.environ.get("LOCAL_RANK", "0") != "0":
            sys.exit(2)
        super().error(message)


class Progress:
    """How far long work is: a line rewritten in place, or in a log file a new one now and then."""

    def __init__(self, what, total, silent=False, of="pictures"):
        self.what, self.total, self.silent, self.of, self.done = what, total, silent, of, 0
        self.begin, self.shown = time.time(), 0.0
        self.every, self.end = (0.5, "") if sys.stderr.isatty() else (30, "\n")

    def __call__(self, more):
        self.done, now = self.done + more, time.time()
        if not self.silent and (now - self.shown > self.every or self.done == self.total):
            left = timedelta(seconds=round((now - self.begin) * (self.total / self.done - 1)))
            line = f"{self.what}: {self.done:,} of {self.total:,} {self.of}, {left} left"
            print(f"\r{line} " if not self.end else line, end=self.end, file=sys.stderr, flush=True)
            self.shown = now
            if self.done == self.total and not self.end:
                print(file=sys.stderr)


class Background:
    """Runs one call at a time beside the caller, so that a GPU need not wait for the disk.

    The next call, or wait(), first waits for the last one to end, and raises what that raised.
    """

    def __init__(self):
        self.pool, self.last = ThreadPoolExecutor(1), None

    def __call__(self, function, *args):
        self.wait()
        self.last = self.pool.submit(function, *args)

    def wait(self):
        if self.last:
            self.last.result()


def replace_file(path, write):
    """All or nothing: readers of `path` find the old file or the whole new one. write(file).

    On return the new one would survive a loss of power; where it cannot be written, the old one is
    as it was, and OSError tells why.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()  # a full disk is not to stay full
        if not isinstance(error, (OSError, RuntimeError)):  # the latter is torch.save's
            raise
        raise OSError(f"{path} could not be written: {error}") from error
    with suppress(OSError):  # not every file system can, for the new name
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


LOCKS = []  # open as long as the process lives: to close one is to give it up


def lock(folder):
    """Makes a directory this process's own until it ends, however it does. InputError where it is
    another's. No fork inherits it: workers that outlive a killed process hold nothing."""
    if fcntl is None:
        return
    file = open(Path(folder, ".lock"), "a+")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read() or "another run"
        problem = f"{folder} is in use by {owner}; wait for its end or name another"
        raise InputError(problem) from None
    except OSError as error:
        print(f"note: {folder} is on a disk without locks ({error.strerror})", file=sys.stderr)
        return
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=file, flush=True)
    LOCKS.append(file)


def is_in_file(path):
    """Whether no directory can be made at `path`, since it or a parent of it is a file."""
    return any(part.is_file() for part in (path, *path.parents))


def to_uint8(x):
    """[-1, 1] to 0 .. 255, truncated as in the papers' evaluation: (B, C, H, W) -> (B, C, H, W)."""
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)


def to_image(pixels):
    """(C, H, W) uint8 array to Pillow. Latents (C = 4) show as their first three channels."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels[:3].transpose(1, 2, 0))


def save_grid(pixels, path, columns):
    """One PNG of (N, C, H, W) uint8 pictures in rows of `columns`; small ones are enlarged."""
    blanks = np.zeros((-len(pixels) % columns, *pixels.shape[1:]), np.uint8)
    pixels = np.concatenate([pixels, blanks])
    grid = to_image(rearrange(pixels, "(r c) k h w -> k (r h) (c w)", c=columns))
    zoom = max(1, 64 // pixels.shape[-1])
    grid = grid.resize((grid.width * zoom, grid.height * zoom), Image.Resampling.NEAREST)
    replace_file(path, partial(grid.save, format="PNG"))


# ---------------------------------------------------------------------------- the dataset format


def is_whole(n, least=0):
    return type(n) is int and n >= least


def is_finite(a):
    return type(a) in (int, float) and math.isfinite(a)


# What each entry of a meta.json must be. Beyond these: source, and what later versions add.
META = {
    "format": lambda n: n == FORMAT,
    "count": lambda n: is_whole(n, 1),
    "shape": lambda s: (
        type(s) is list and len(s) == 3 and all(is_whole(n, 1) for n in s) and s[1] == s[2]
    ),
    "dtype": lambda d: d in ("uint8", "float16", "float32"),
    "scale": is_finite,
    "shift": is_finite,
    "classes": lambda c: type(c) is list and all(type(name) is str for name in c),
    "vae": lambda v: v is None or type(v) is str,
    "mirrored": lambda m: type(m) is bool,
    "files": lambda f: type(f) is str,
}


def check_meta(meta, where):
    """InputError where a meta.json, or a checkpoint's copy of one, is not as META says."""
    if type(meta) is not dict:
        raise InputError(f"{where} is no dict; prepare the dataset again")
    optional = {"vae", "mirrored", "files"}
    for key, is_right in META.items():
        if (key in meta or key not in optional) and not is_right(meta.get(key)):
            value = str(meta.get(key))[:40]
            raise InputError(f"{where}: {key} cannot be {value!r}; prepare the dataset again")


def stored_shape(meta):
    """Shape of a row of images.npy: a latent's mean and standard deviation, or pixels."""
    channels, *size = meta["shape"]
    return (2 * channels if meta.get("vae") else channels, *size)


class Dataset(torch.utils.data.Dataset):
    """Reads a dataset directory; a list of indices gives one batch.

    dataset.__getitems__(indices) -> images (B, ...) as stored, labels (B,) int64, both tensors.
    InputError where there is no whole dataset, or where a latent in it is not finite.
    """

    def __init__(self, path):
        self.path = path = Path(path)
        try:
            self.meta = meta = json.loads((path / "meta.json").read_text())
            self.images = images = np.load(path / "images.npy", mmap_mode="r")
            labels = np.load(path / "labels.npy", mmap_mode="r")  # mapped: its size may be a lie
            if images.dtype.hasobject or labels.dtype.kind != "i":
                raise ValueError("arrays of another type")
        except Exception as error:  # numpy raises a dozen kinds for a damaged file
            if (path / DatasetWriter.DRAFT).exists() and not (path / "meta.json").exists():
                raise InputError(
                    f"{path} is unfinished; run prepare_latents.py again, it goes on from there"
                ) from None
            mend = "; make one with prepare_latents.py"
            raise damaged(f"{path} holds no whole dataset", error, mend) from None
        check_meta(meta, path / "meta.json")
        shape, num_labels = (meta["count"], *stored_shape(meta)), max(len(meta["classes"]), 1)
        if images.shape != shape or images.dtype != meta["dtype"]:
            raise InputError(
                f"{path}/images.npy is {images.dtype} {images.shape} and not {meta['dtype']} "
                f"{shape} as meta.json says; prepare the dataset again"
            )
        self.labels = labels = np.array(labels)
        self.rows = np.flatnonzero(labels >= 0)
        unknown = ~np.isin(labels, [UNREADABLE, *range(num_labels)])
        if labels.shape != shape[:1] or not len(self.rows) or unknown.any():
            raise InputError(
                f"{path}/labels.npy is not {shape[0]} labels from 0 to {num_labels - 1} as "
                "meta.json says; prepare the dataset again"
            )

    def __len__(self):
        return len(self.rows)

    @property
    def epoch_length(self):
        """Pictures in an epoch: a picture and its mirror image count as one."""
        return len(self) // 2 if self.meta.get("mirrored") else len(self)

    def __reduce__(self):
        return Dataset, (self.path,)  # a worker process maps the array anew and copies nothing

    def __getitems__(self, indices):
        rows = self.rows[indices]
        images = torch.from_numpy(self.images[rows])
        if images.is_floating_point() and not (finite := images.isfinite().flatten(1).all(1)).all():
            problem = f"{self.path}/images.npy: row {rows[~finite.numpy()][0]} is not finite"
            raise InputError(f"{problem}; prepare the dataset again")
        return images, torch.from_numpy(self.labels[rows].astype(int))


def network_input(stored, meta, generator=None):
    """The network's x (B, C, H, W) from rows of images.npy: pixels scaled, latents drawn afresh."""
    if not meta.get("vae"):
        return stored.float() * meta["scale"] + meta["shift"]
    mean, std = stored.float().chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    return (mean + std * noise) * meta["scale"]


class DatasetWriter:
    """Fills a dataset in place, on one process or several, and goes on where another run ended.

    images.npy and labels.npy have their full size from the start, every label EMPTY. The images of
    a batch are on the disk before their labels are written: whatever has a label is there.
    InputError where the directory holds another dataset. Rank 0 makes the files: it comes first.
    """

    DRAFT = "unfinished.json"  # becomes meta.json

    def __init__(self, out, meta):
        self.out, self.meta = Path(out), meta
        shape = (meta["count"], *stored_shape(meta))
        meta_files = [self.out / "meta.json", self.out / self.DRAFT]
        if found := [path for path in meta_files if path.exists()]:
            try:
                was = dict(json.loads(found[0].read_text()))
            except (OSError, ValueError, TypeError):
                problem = f"--out {out}: {found[0].name} is damaged"
                raise InputError(f"{problem}; remove the directory, to begin anew") from None
            if other := [key for key in meta if key != "source" and was.get(key) != meta[key]]:
                problem = f"--out {out} holds a dataset that differs in {', '.join(other)}"
                raise InputError(f"{problem}; remove it or name another")
        elif (self.out / "images.npy").exists():
            problem = f"--out {out} holds an images.npy without its meta.json"
            raise InputError(f"{problem}; remove it or name another")
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            needed = math.prod(shape) * np.dtype(meta["dtype"]).itemsize
            if (free := shutil.disk_usage(self.out).free) < needed:
                problem = f"--out {out}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB free"
                raise InputError(problem)
            np.lib.format.open_memmap(self.out / "images.npy", "w+", meta["dtype"], shape)
            np.save(self.out / "labels.npy", np.full(meta["count"], EMPTY, np.int32))
            self.write_meta(self.DRAFT)
        self.complete = (self.out / "meta.json").exists()
        try:
            self.images = np.load(self.out / "images.npy", mmap_mode="r")
            self.labels = np.load(self.out / "labels.npy", mmap_mode="r")
            whole = (self.images.shape, self.labels.shape) == (shape, shape[:1])
            if not whole or (self.images.dtype, self.labels.dtype) != (meta["dtype"], np.int32):
                raise ValueError("its arrays are not those of its meta.json")
        except Exception as error:  # numpy raises a dozen kinds for a damaged file
            raise InputError(
                f"--out {out} is damaged ({error}); remove it, to begin anew"
            ) from None

    def write_meta(self, name):
        text = json.dumps(self.meta, indent=1) + "\n"
        replace_file(self.out / name, lambda file: file.write(text.encode()))

    def write(self, first, images, labels):
        """Rows first, first + 1, ... of this process: images as stored, labels or UNREADABLE.

        Written, not mapped: processes on other machines may write to the same page of the file.
        """
        for array, rows in [(self.images, images), (self.labels, labels)]:
            rows = np.ascontiguousarray(rows, array.dtype)
            try:
                with open(array.filename, "r+b") as file:
                    file.seek(array.offset + first * array[0].nbytes)
                    file.write(rows)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise OSError(f"{array.filename} could not be written: {error}") from error

    def finish(self, show):
        """Rank 0, after all ranks have written. show: rows as stored to (n, C, H, W) uint8."""
        labels = np.load(self.out / "labels.npy")
        if (labels == EMPTY).any():
            raise InputError(f"{self.out} has rows that were not written; run the command again")
        if not (labels >= 0).any():
            raise InputError(f"{self.meta['source']} holds no readable picture")
        firsts = [np.flatnonzero(labels == k)[:5] for k in np.unique(labels[labels >= 0])[:10]]
        each = 1 if self.meta.get("vae") else 5  # to decode a latent takes a while on a CPU
        rows = np.stack([np.resize(first, each) for first in firsts], axis=1)
        save_grid(show(self.images[rows.ravel()]), self.out / "preview.png", columns=len(firsts))
        self.write_meta("meta.json")
        (self.out / self.DRAFT).unlink()


def describe(out):
    data = Dataset(out)
    shape, classes = tuple(data.meta["shape"]), len(data.meta["classes"])
    print(f"{out}: {len(data):,} pictures {shape} of {classes} classes, see preview.png")
    if missing := data.meta["count"] - len(data):
        print(f"{missing} of {data.meta['count']} pictures could not be read: left out")


# ---------------------------------------------------------------------------- the VAE


def load_weights(path):
    """The tensors of a .safetensors file, or of one that torch.save wrote, by name, on the CPU.

    InputError for a file that is neither. Nothing in the file is ever executed.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return read_safetensors(path)
        check_stored(path)
        # Without mmap, which files from before torch 1.6 do not allow: FID's Inception is that old.
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = dict(state.get("state_dict", state))
        return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    except FileNotFoundError:
        raise InputError(f"{path} is not a file") from None
    except Exception as error:  # torch.load alone raises a dozen kinds for a damaged file
        raise damaged(f"{path} is damaged or no file of weights", error) from None


def check_stored(path):
    """ValueError for a zip file with compressed entries, of which torch.save writes none: they may
    be of any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("torch.save compresses nothing")


SAFETENSORS = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16)
SAFETENSORS |= dict(I64=torch.int64, I32=torch.int32, U8=torch.uint8, BOOL=torch.bool)


def read_safetensors(path):
    """8 bytes of length, a JSON header of that length, then the raw little-endian tensors."""
    data = np.memmap(path, np.uint8, "c")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if start > min(len(data), 100_000_000):  # the limit is the format's own
        raise ValueError("its header is longer than the file, or than 100 MB")
    header, data = json.loads(data[8:start].tobytes()), data[start:]
    header.pop("__metadata__", None)
    state, left = {}, len(data)
    for name, entry in header.items():
        dtype, shape, (begin, end) = (
            SAFETENSORS[entry["dtype"]],
            *map(entry.get, ("shape", "data_offsets")),
        )
        if not 0 <= begin <= end <= len(data) or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} does not lie within the file")
        if min(shape, default=0) < 0 or (left := left - (end - begin)) < 0:
            raise ValueError(f"{name} has a negative size or overlaps another")
        # Copied, since nothing aligns a tensor to its element size.
        state[name] = torch.from_numpy(data[begin:end].copy()).view(dtype).reshape(shape)
    return state


def load_strictly(net, state, path):
    """Every weight of `net` from `state` and nothing left over; InputError otherwise."""
    ours = net.state_dict()
    lacking, unknown = ours.keys() - state.keys(), state.keys() - ours.keys()
    other = {name for name in ours.keys() - lacking if ours[name].shape != state[name].shape}
    for names, fault in [(lacking, "lacks"), (unknown, "has unknown"), (other, "has misshapen")]:
        if names:
            raise InputError(f"{path} {fault} {len(names)} weights, {min(names)} among them")
    # The tensors themselves, since `net` may be on the meta device and have no memory of its own.
    net.load_state_dict({name: state[name].to(ours[name].dtype) for name in ours}, assign=True)


def fingerprint(state):
    """Short hash of the names and values of tensors."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def norm(width):
    return nn.GroupNorm(32, width, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two normalised convolutions and a shortcut: (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.conv_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class PixelAttention(nn.Module):
    """Self-attention of one head between all places: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width):
        super().__init__()
        self.group_norm = norm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x):
        h = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + rearrange(self.to_out[0](h), "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # padded at the right and at the bottom alone


class Upsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, and the step to the next."""

    def __init__(self, inputs, outputs, blocks, downsample=False, upsample=False):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(outputs if i else inputs, outputs) for i in range(blocks)
        )
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample(outputs)])
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample(outputs)])

    def forward(self, x):
        for part in self.children():
            for layer in part:
                x = layer(x)
        return x


class Middle(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(width)])
        self.resnets = nn.ModuleList([ResnetBlock(width, width) for _ in range(2)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self, widths, latent):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        pairs = list(zip(widths[:1] + widths, widths, strict=False))
        self.down_blocks = nn.ModuleList(
            Level(*pair, 2, downsample=i < len(pairs) - 1) for i, pair in enumerate(pairs)
        )
        self.mid_block = Middle(widths[-1])
        self.conv_norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, widths, latent):
        super().__init__()
        widths = widths[::-1]
        self.conv_in = nn.Conv2d(latent, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0])
        pairs = list(zip(widths[:1] + widths, widths, strict=False))
        self.up_blocks = nn.ModuleList(
            Level(*pair, 3, upsample=i < len(pairs) - 1) for i, pair in enumerate(pairs)
        )
        self.conv_norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Stable Diffusion's autoencoder (arXiv 2112.10752) under diffusers' names of the weights.

    encode: images (B, 3, H, W) in [-1, 1] -> mean and log-variance (B, C, H/8, W/8) of a latent.
    decode: latents (B, C, H/8, W/8), not scaled -> images (B, 3, H, W), about [-1, 1].
    """

    def __init__(self, widths=(128, 256, 512, 512), latent=4):
        super().__init__()
        self.encoder, self.decoder = Encoder(list(widths), latent), Decoder(list(widths), latent)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)
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


OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_vae(path):
    """The VAE in a file of diffusers' names, old or new, as float32; its widths come from there.

    InputError, a line that begins with --vae, for any other file.
    """
    try:
        state = {}
        for name, tensor in load_weights(path).items():
            parts = [OLD_NAMES.get(part, part) for part in name.split(".")]
            state[".".join(parts)] = tensor
        levels = sum(name.endswith("samplers.0.conv.weight") for name in state) // 2 + 1
        name = "encoder.down_blocks.{}.resnets.0.conv1.weight"
        widths = [len(state[name.format(level)]) for level in range(levels)]
        with torch.device("meta"):  # no memory before the shapes are known to be the file's
            vae = VAE(widths, len(state["post_quant_conv.weight"]))
        load_strictly(vae, state, path)
    except InputError as error:
        raise InputError(f"--vae: {error}") from None
    except Exception:  # the sizes in the file may be no network's
        message = f"--vae: {path} holds no VAE under diffusers' names: encoder.conv_in.weight, ..."
        raise InputError(message) from None
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def to_pixels(x, vae=None, scale=1.0, at_once=16):
    """The network's x to uint8 pictures on the CPU; latents are decoded, a few at once."""
    if vae:
        x = torch.cat([vae.decode(part / scale) for part in x.split(at_once)])
    return to_uint8(x).cpu().numpy()


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
    meta = dict(
        format=FORMAT, count=count, shape=[1, size, size], dtype="uint8", scale=1 / 127.5,
        shift=-1.0, classes=[str(digit) for digit in range(10)], source=f"glyphs, seed {seed}",
        files=f"seed {seed}",
    )  # fmt: skip
    out = Path(out)
    if (out / "meta.json").exists() and DatasetWriter(out, meta).complete:
        print(f"{out} is complete already")
        return
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} holds other files; remove it or name another directory")
    # Made aside and renamed as a whole: several runs may start at once where it is missing.
    aside = out.absolute().with_name(f"{out.absolute().name}.{uuid.uuid4().hex[:8]}")
    try:
        writer = DatasetWriter(aside, meta)
        rng, progress = np.random.default_rng(seed), Progress(out, count)
        for start in range(0, count, 1000):
            labels = np.arange(start, min(start + 1000, count)) % 10
            writer.write(start, np.stack([draw_digit(k, size, rng)[None] for k in labels]), labels)
            progress(len(labels))
        writer.finish(show=lambda rows: rows)
        aside.rename(out)
    except OSError:
        if not (out / "meta.json").exists():  # else another process has been faster
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    describe(out)


# ---------------------------------------------------------------------------- a folder of images


def read_image(path, size=None):
    """(3, H, W) uint8 of a picture file as a viewer shows it; cut to size x size where given.

    differs: ADM's code leaves pictures unturned whose EXIF data tell that the camera was turned.
    InputError, which names the file, where Pillow cannot read it.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("a pipe, which would be waited for")
        with Image.open(path) as image:
            image = to_rgb(ImageOps.exif_transpose(image))
            image = image if size is None else center_crop(image, size)
    except Exception as error:  # Pillow raises many kinds for a damaged file
        reason = error if type(error) is ValueError else type(error).__name__
        raise InputError(f"{path} cannot be read ({reason})") from None
    return np.array(image).transpose(2, 0, 1)


def image_files(folder):
    """The pictures in a folder and all its sub-folders, sorted; no link to a folder is followed.

    InputError where a folder cannot be read: its pictures are not to go missing in silence.
    """

    def fault(error):
        raise InputError(f"{error.filename} cannot be read ({error.strerror}); mend that")

    return sorted(
        Path(root, name)
        for root, _, names in os.walk(folder, onerror=fault)
        for name in names
        if Path(name).suffix.lower() in IMAGE_SUFFIXES
    )


class ImageFolder(torch.utils.data.Dataset):
    """root/class/**/picture: item i is (pixels (3, size, size) uint8, label, None) or, for a file
    that cannot be read, (zeros, UNREADABLE, one line that names it). Classes go by alphabet.
    """

    def __init__(self, root, size):
        self.root, self.size, self.classes, self.files = Path(root), size, [], []
        try:
            folders = sorted(self.root.iterdir())
        except OSError as error:
            raise InputError(f"{root} cannot be read ({error.strerror}); mend it") from None
        for folder in folders:
            if folder.is_symlink() and not folder.exists():
                raise InputError(f"{folder} is a link that leads nowhere; mend it or remove it")
            if folder.resolve() in (self.root.resolve(), *self.root.resolve().parents):
                raise InputError(f"{folder} leads back to {root}; remove it")
            if folder.is_dir() and not folder.name.startswith("."):
                paths = image_files(folder)
                self.files += [(path, len(self.classes)) for path in paths]
                self.classes += [folder.name] if paths else []

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        path, label = self.files[index]
        try:
            return read_image(path, self.size), label, None
        except ValueError as error:
            return np.zeros((3, self.size, self.size), np.uint8), UNREADABLE, str(error)

    def fingerprint(self):
        names = "\n".join(str(path.relative_to(self.root)) for path, _ in self.files)
        return hashlib.sha256(os.fsencode(names)).hexdigest()[:16]


def collate(items):
    pixels, labels, faults = zip(*items, strict=True)
    return (
        torch.from_numpy(np.stack(pixels)),
        np.array(labels),
        [fault for fault in faults if fault],
    )


def to_rgb(image):
    """Any picture as 8-bit RGB; transparency is dropped. ValueError for floating-point pixels."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # integers, which convert would clip to 255
        values = np.asarray(image)
        if image.mode != "I" or values.max() > 255:  # of mode I, only the values tell the depth
            values = values >> 8
        image = Image.fromarray(values.astype(np.uint8))
    return image.convert("RGB")


def center_crop(image, size):
    """ADM's crop (arXiv 2105.05233): halve while twice too large, resize the short side, cut."""
    if max(image.size) > 100 * min(image.size):
        raise ValueError("a line, which would be enlarged beyond bounds")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def write_folder(args):
    """Images of root/class/ as pixels or, with a VAE, as latents; mirrored ones only by --flip.

    The unit of work is a batch of given pictures, whichever rank it falls to and whenever: so the
    arrays come out the same on any number of ranks and however often the work was interrupted.
    """
    rank, world, device = join_ranks()
    folder = ImageFolder(args.source, args.size)
    if not (count := len(folder)):
        raise InputError(f"{args.source} has no images in sub-folders, one for a class")
    meta = dict(
        format=FORMAT, count=count * (1 + args.flip), shape=[3, args.size, args.size],
        dtype="uint8", scale=1 / 127.5, shift=-1.0, classes=folder.classes, mirrored=args.flip,
        vae=None, files=folder.fingerprint(), source=str(args.source),
    )  # fmt: skip
    if args.vae:
        vae = load_vae(args.vae)
        side, rest = divmod(args.size, vae.factor)
        if rest:
            raise InputError(f"--size {args.size} is no multiple of {vae.factor}, as --vae needs")
        meta |= dict(shape=[vae.latent, side, side], dtype=args.dtype, scale=LATENT_SCALE, shift=0)
        meta |= dict(vae=vae.fingerprint())
        vae.to(device)

    @torch.no_grad()
    def encode(pixels):
        if not args.vae:
            return pixels.numpy()
        pixels = pixels.to(device, non_blocking=True)
        mean, logvar = vae.encode(pixels.float() / 127.5 - 1)
        latents = torch.cat([mean, (logvar / 2).exp()], dim=1).cpu().numpy().astype(args.dtype)
        if not np.isfinite(latents).all():
            raise InputError(f"--vae {args.vae} gives latents that {args.dtype} cannot hold")
        return latents

    def show(rows):
        if not args.vae:
            return rows
        mean = torch.from_numpy(rows).float().chunk(2, dim=1)[0]
        return to_pixels(mean.to(device), vae)

    if rank > 0:
        wait_for_all()
    else:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        lock(args.out)
    writer = DatasetWriter(args.out, meta)
    if rank == 0:
        wait_for_all()
    say = print if rank == 0 else lambda _: None
    if writer.complete:
        say(f"{args.out} is complete already")
        return
    batches = [range(i, min(i + args.batch_size, count)) for i in range(0, count, args.batch_size)]
    todo = [batch for batch in batches if (writer.labels[batch] < 0).any()]
    if done := count - sum(map(len, todo)):
        say(f"{args.out}: going on, {done:,} of {count:,} pictures are done")
    wait_for_all()  # nobody writes before everybody has seen the same work
    todo = todo[rank * len(todo) // world : (rank + 1) * len(todo) // world]
    loader = torch.utils.data.DataLoader(
        folder, batch_sampler=todo, num_workers=args.workers, collate_fn=collate,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    what = f"{args.out}, rank 0 of {world}" if world > 1 else args.out
    progress, background = Progress(what, sum(map(len, todo)), silent=rank > 0), Background()
    for batch, (pixels, labels, faults) in zip(todo, loader, strict=True):
        for fault in faults:
            if not args.skip_unreadable:
                raise InputError(f"{fault}; mend it or pass --skip-unreadable")
            print(f"\nskipped: {fault}", file=sys.stderr)
        if args.flip:  # first, so that a label among the first half vouches for both
            background(writer.write, count + batch[0], encode(pixels.flip(-1)), labels)
        background(writer.write, batch[0], encode(pixels), labels)
        progress(len(batch))
    background.wait()
    wait_for_all()
    if rank == 0:
        writer.finish(show)
        describe(args.out)


def parse_args(argv=None):
    parser = ArgumentParser(
        prog="prepare_latents.py",
        usage="prepare_latents.py SOURCE --out DIR [flags]; --help lists them all",
        description=__doc__.splitlines()[0],
    )
    add = parser.add_argument
    add("source", help="'glyphs', or a folder with one sub-folder of images per class")
    add("--out", required=True, type=Path, help="directory of the dataset to write")
    add("--vae", help="weights of the VAE that turns images into latents, in diffusers' format")
    add("--size", type=int, help="height and width in pixels (default: glyphs 16, pixels 32, "
        "latents 256)")  # fmt: skip
    add("--flip", action="store_true", help="folder: store the mirror images too")
    add("--dtype", choices=("float16", "float32"), default="float16", help="of stored latents")
    add("--batch-size", type=int, default=32, help="folder: images at once on a rank")
    add("--workers", type=int, help="folder: processes per rank that decode images (default: the "
        "cores of a rank, at most 8)")  # fmt: skip
    add("--skip-unreadable", action="store_true", help="folder: name and leave out broken files")
    add("--count", type=int, default=20_000, help="glyphs: number of pictures")
    add("--seed", type=int, default=0, help="glyphs: another seed draws other pictures")
    args = parser.parse_args(argv)
    glyphs = args.source == "glyphs"
    if args.size is None:
        args.size = 16 if glyphs else 256 if args.vae else 32
    if args.workers is None:
        args.workers = default_workers()
    if min(args.size, args.count, args.batch_size) < 1 or min(args.workers, args.seed) < 0:
        parser.error(
            "--size, --count and --batch-size must be positive, --workers and --seed not negative"
        )
    if is_in_file(args.out):
        parser.error(f"--out {args.out} is not a directory, or lies in a file")
    if not glyphs and not Path(args.source).is_dir():
        parser.error(f"{args.source} is no folder; give 'glyphs' or a folder of class folders")
    if glyphs and (args.vae or args.flip):
        parser.error("--vae and --flip are for a folder of images, not for glyphs")
    return args


def main(args):
    if args.source == "glyphs":
        write_glyphs(args.out, args.count, args.size, args.seed)
    else:
        write_folder(args)


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
