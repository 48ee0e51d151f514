"""Draw pictures from a checkpoint, by default in one evaluation of its EMA network.

    python sample.py runs/tiny-dtd/last.pt --out grid.png
    python sample.py CKPT --vae FILE --classes 207 360 --num 64 --nfe 2 --out pictures/
    torchrun --nproc_per_node=8 sample.py CKPT --vae FILE --num-samples 50000 --out samples.npz

The last writes uint8 (N, H, W, C) as arr_0, the layout of ADM's evaluation. Picture i depends on
the seed and on i alone, on any number of ranks; the same command again goes on after an
interruption.
"""

import errno
import json
import math
import shutil
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image

import meanflow
from model import DiT
from prepare_latents import (
    ArgumentParser,
    Background,
    InputError,
    Progress,
    check_meta,
    check_stored,
    damaged,
    fingerprint,
    is_in_file,
    is_whole,
    join_ranks,
    load_vae,
    lock,
    replace_file,
    run_script,
    save_grid,
    to_image,
    to_pixels,
    wait_for_all,
)


def read_checkpoint(path):
    """What train.py saved in a file, mapped: nothing in it is executed, every byte is checked.

    InputError where it is anything else, or damaged.
    """
    if not Path(path).is_file():
        raise InputError(f"{path} is not a file; a run's checkpoint is its last.pt")
    try:
        check_stored(path)
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():  # by the checksums that torch.save writes
                raise ValueError(f"{broken} has another checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        check_meta(checkpoint["meta"], path)
        json.dumps(checkpoint["args"])  # TypeError where it holds more than plain values
        whole = is_whole(checkpoint["step"]) and type(checkpoint["args"]["model"]) is str
        for name in ("net", "ema"):
            whole = whole and all(w.dtype == torch.float32 for w in checkpoint[name].values())
        if not whole:
            raise ValueError("it lacks a part")
    except PermissionError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); mend that") from None
    except Exception as error:  # torch.load alone raises a dozen kinds for a damaged file
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # a fault of the disk: the file may be good
        raise damaged(f"{path} is damaged or no checkpoint of train.py", error) from None
    return checkpoint


def load_checkpoint(path):
    """(EMA network on the CPU, the whole checkpoint); InputError as of read_checkpoint."""
    checkpoint = read_checkpoint(path)
    args = checkpoint["args"]
    try:
        with torch.device("meta"):  # no memory before the shapes are known to be the weights'
            net = build_network(args["model"], checkpoint["meta"], args["conditioning"])
        net.load_state_dict(checkpoint["ema"], assign=True)
    except Exception as error:
        raise damaged(f"{path} is no checkpoint of this version", error) from None
    return net, checkpoint


def build_network(model, meta, conditioning):
    """The DiT for a dataset whose meta.json is `meta`."""
    channels, size, _ = meta["shape"]
    return DiT.from_config(model, channels, size, len(meta["classes"]), conditioning)


def keyed_generator(*key, device="cpu"):
    """A generator whose numbers are a function of the key alone, a few non-negative integers."""
    # The length is part of the key, since SeedSequence takes (1, 2) and (1, 2, 0) for the same.
    seed = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed))


def noise(indices, shape, seed=0):
    """N(0, I) for each index: (len(indices), *shape), each a function of (seed, index) alone."""
    return torch.stack([torch.randn(shape, generator=keyed_generator(seed, i)) for i in indices])


def draw(net, labels, indices=None, seed=0, nfe=1, velocity=False):
    """x (n, C, H, W) under labels (n), from the noises of n indices (default 0, 1, ...)."""
    device = next(net.parameters()).device
    indices = range(len(labels)) if indices is None else indices
    e = noise(indices, (net.channels, net.size, net.size), seed).to(device)
    y = torch.as_tensor(labels, device=device)
    return meanflow.sample(net, e, y, nfe, velocity)


# ---------------------------------------------------------------------------- files of pictures


def files_of(batch, args):
    """Where the pictures of a batch of indices go: a PNG each, or one piece of the one file."""
    if args.kind:
        return [args.folder / f"{batch[0]:06d}.npy"]
    return [args.folder / f"{index:06d}.png" for index in batch]


def save_batch(paths, pixels):
    """Pixels (n, C, H, W) of a batch into its files, each of them there as a whole or not."""
    if paths[0].suffix == ".npy":
        replace_file(paths[0], lambda file: np.save(file, pixels))
    else:
        for path, picture in zip(paths, pixels, strict=True):
            replace_file(path, partial(to_image(picture).save, format="PNG"))


def save_npz(path, parts, shape, settings):
    """What np.savez would write for arr_0 (N, H, W, C), without holding the array in memory."""

    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            archive.comment = json.dumps(settings).encode()
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as array:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(array, header)
                for pixels in parts:
                    array.write(rearrange(pixels, "n c h w -> n h w c").tobytes())

    replace_file(path, write)


def settings_of(args):
    """What is drawn, for JSON: kept beside unfinished pictures, and in a finished .npz."""
    names = (
        "step", "num", "classes", "random_classes", "nfe", "velocity", "seed", "batch_size",
        "dtype",
    )  # fmt: skip
    weights = [net and fingerprint(net.state_dict()) for net in (args.net, args.decoder)]
    return {name: vars(args)[name] for name in names} | {"weights": weights}


def check_settings(path, settings):
    """InputError where the pictures that `path` tells of are of other settings."""
    try:
        if path.suffix == ".json":
            text = path.read_text()
        else:
            with zipfile.ZipFile(path) as archive:
                text = archive.comment.decode()
        was = dict(json.loads(text))
    except Exception:  # zipfile raises a dozen kinds for a damaged file
        was = {}
    if other := [name for name in settings if name not in was or was[name] != settings[name]]:
        place = path.parent if path.suffix == ".json" else path
        problem = f"{place} holds other pictures" + (
            f", of another {', '.join(other)}" if was else ""
        )
        raise InputError(f"--out {problem}; remove it or name another")


# ---------------------------------------------------------------------------- command line


def parse_args(argv=None):
    parser = ArgumentParser(
        prog="sample.py",
        usage="sample.py CHECKPOINT --out OUT [flags]; --help lists them all",
        description=__doc__.splitlines()[0],
    )
    add = parser.add_argument
    add("checkpoint", help="last.pt of a run")
    add("--out", required=True, type=Path, help="grid.png, samples.npz, or a directory for PNGs")
    add("--vae", help="weights of the VAE that decodes latents, in diffusers' format")
    # The long name is for torchrun, which takes --num for an abbreviation of its --numa-binding.
    add("--num", "--num-samples", type=int, default=100, help="number of pictures")
    add("--classes", type=int, nargs="+", help="labels to go through in turn (default: all)")
    add("--random-classes", action="store_true", help="draw the labels at random, not in turn")
    add("--nfe", type=int, default=1, help="evaluations of the network for a picture")
    add("--velocity", action="store_true", help="Euler on u(z, t, t), the instantaneous velocity")
    add("--seed", type=int, default=0, help="another seed draws other noise")
    add("--batch-size", type=int, default=250, help="pictures at once on a rank")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrix products")
    add(
        "--compile",
        action="store_true",
        help="torch.compile the network and the decoder; fastest where --batch-size divides --num",
    )
    args = parser.parse_args(argv)
    if min(args.num, args.nfe, args.batch_size) < 1 or args.seed < 0:
        parser.error("--num, --nfe and --batch-size must be at least 1, --seed at least 0")
    kind, out = args.out.suffix.lower(), args.out
    args.kind = kind if kind in (".png", ".npz") else None
    args.folder = out.with_name(out.name + ".parts") if args.kind else out
    other_picture = not args.kind and kind in Image.registered_extensions()
    if other_picture or is_in_file(args.folder) or (args.kind and out.is_dir()):
        parser.error(f"--out {out}: name a .png, an .npz or a directory")
    try:
        args.net, checkpoint = load_checkpoint(args.checkpoint)
        args.decoder = load_vae(args.vae) if args.vae else None
    except InputError as error:
        parser.error(str(error))
    args.step, args.meta = checkpoint["step"], checkpoint["meta"]
    encoder = args.meta.get("vae")
    if encoder and not args.vae:
        parser.error(f"{args.checkpoint} draws latents: name the weights that decode them, --vae")
    if args.vae and not encoder:
        parser.error(f"{args.checkpoint} draws pixels: leave out --vae")
    if args.vae and args.decoder.fingerprint() != encoder:
        print(f"note: {args.vae} is not the VAE that made the latents", file=sys.stderr)
    labels = range(max(args.net.num_classes, 1))
    if args.classes is not None and not set(args.classes) <= set(labels):
        parser.error(f"--classes: {args.checkpoint} has the labels 0 to {labels[-1]}")
    classes = args.classes or labels
    picks = np.arange(args.num) % len(classes)
    if args.random_classes:
        picks = np.random.default_rng(args.seed).integers(len(classes), size=args.num)
    args.labels = [classes[i] for i in picks]
    return args


def main(args):
    rank, world, device = join_ranks()
    say = print if rank == 0 else lambda _: None
    out, folder, num = args.out, args.folder, args.num
    settings, record = settings_of(args), folder / "settings.json"
    if args.kind == ".npz" and out.exists():
        check_settings(out, settings)
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed at its very end
        say(f"{out} is complete already")
        return
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
        if any(path.suffix in (".png", ".npy") for path in folder.glob("*")):
            check_settings(record, settings)
        replace_file(record, lambda file: file.write(json.dumps(settings).encode()))
    wait_for_all()

    # The unit of work is a batch of given indices, whichever rank it falls to: so every picture
    # comes out the same on any number of ranks.
    firsts = range(0, num, args.batch_size)
    batches = [range(first, min(first + args.batch_size, num)) for first in firsts]
    todo = [b for b in batches if not all(path.exists() for path in files_of(b, args))]
    todo = todo[rank::world]
    wait_for_all()  # nobody saves before everybody has seen the same work
    net, vae = args.net.to(device), args.vae and args.decoder.to(device)
    if args.compile:
        net.compile(dynamic=False)
        if vae:
            vae.decoder.compile(dynamic=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    what = f"{out}, rank 0 of {world}" if world > 1 else out
    progress, background = Progress(what, sum(map(len, todo)), silent=rank > 0), Background()
    for batch in todo:
        labels = args.labels[batch.start : batch.stop]
        with autocast:
            x = draw(net, labels, batch, args.seed, args.nfe, args.velocity)
            pixels = to_pixels(x, vae, args.meta["scale"])
        background(save_batch, files_of(batch, args), pixels)
        progress(len(batch))
    background.wait()
    wait_for_all()

    if args.kind and rank == 0:
        parts = (np.load(*files_of(batch, args)) for batch in batches)
        if args.kind == ".png":
            columns = len(set(args.labels))
            columns = columns if columns <= 16 else math.ceil(math.sqrt(num))
            save_grid(np.concatenate(list(parts)), out, columns)
        else:
            c, h, w = np.load(*files_of(batches[0], args)).shape[1:]
            save_npz(out, parts, (num, h, w, c), settings)
        shutil.rmtree(folder)
    say(f"{out}: {num:,} pictures, {args.nfe} evaluation{'s' * (args.nfe > 1)} each")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
