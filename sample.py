"""Draw pictures from a checkpoint, by default in one evaluation of its EMA network.

    python sample.py runs/tiny-dtd/last.pt --out grid.png
    python sample.py CKPT --vae FILE --classes 207 360 --num 64 --nfe 2 --out pictures/
    python sample.py CKPT --export FILE                      the EMA network alone, to publish
    torchrun --nproc_per_node=8 sample.py CKPT --vae FILE --num-samples 50000 --out samples.npz

The last writes uint8 (N, H, W, C) as arr_0, the layout of ADM's evaluation. Picture i depends on
the seed and on i alone, on any number of ranks. The same command again resumes. CKPT is a last.pt,
an exported file, or public weights of MeanFlow or SiT (`model.load`).
"""

import argparse
import json
import math
import os
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch

import meanflow
from model import exported, fail, fingerprint, load
from prepare_latents import (
    IMAGE_SUFFIXES, Background, Progress, batches_of, join_ranks, leave_ranks, load_vae, lock,
    made_here, replace_file, run_script, save_grid, save_png, to_image, to_pixels, wait_for_all,
)  # fmt: skip


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
    return meanflow.sample(net, e, torch.as_tensor(labels, device=device), nfe, velocity)


def files_of(batch, folder, kind):
    """Where the pictures of a batch of indices go: a PNG each, or one part of the file."""
    if kind:
        return [folder / f"{batch[0]:06d}.npy"]
    return [folder / f"{index:06d}.png" for index in batch]


def save_batch(paths, pixels):
    """Pixels (n, C, H, W) of a batch into its files, each written atomically."""
    if paths[0].suffix == ".npy":
        replace_file(paths[0], lambda file: np.save(file, pixels))
    else:
        for path, picture in zip(paths, pixels, strict=True):
            save_png(to_image(picture), path)


def save_npz(num, parts, settings, file):
    """Join arrays (n, C, H, W), num pictures in all, to arr_0 (num, H, W, C); one is in memory."""
    with zipfile.ZipFile(file, "w") as npz:
        with npz.open("arr_0.npy", "w", force_zip64=True) as member:
            for i, part in enumerate(parts):
                rows = part.transpose(0, 2, 3, 1)
                if i == 0:
                    header = dict(descr="|u1", fortran_order=False, shape=(num, *rows.shape[1:]))
                    np.lib.format.write_array_header_1_0(member, header)
                member.write(rows.tobytes())
        with npz.open("settings.npy", "w") as member:
            np.lib.format.write_array(member, np.array(settings))


# ---------------------------------------------------------------------------- command line


def parse_args(argv=None):
    about, style = __doc__.splitlines()[0], argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False, formatter_class=style)
    add = parser.add_argument
    add("checkpoint", help="last.pt of a run, an exported file, or public weights")
    either = parser.add_mutually_exclusive_group(required=True).add_argument
    either("--out", type=Path, help="grid.png, samples.npz, or a directory for PNGs")
    either("--export", type=Path, help="write the EMA network alone to this file, draw nothing")
    add("--vae", help="weights of the VAE that decodes latents, in diffusers' format")
    # The long name is for torchrun, which takes --num for an abbreviation of its --numa-binding.
    add("--num", "--num-samples", type=int, default=100, help="number of pictures")
    add("--classes", type=int, nargs="+", help="labels to cycle through, else all")
    add("--random-classes", action="store_true", help="draw the labels at random, not in turn")
    add("--nfe", type=int, default=1, help="evaluations of the network for a picture")
    add("--velocity", action="store_true", help="Euler on u(z, t, t), the instantaneous velocity")
    add("--omega", type=float, help="guidance, Eq. 21, within train.py's --omega-range")
    add("--seed", type=int, default=0, help="another seed draws other noise")
    add("--batch-size", type=int, default=250, help="pictures at once on a rank")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrix products")
    add("--compile", action="store_true", help="torch.compile the network and the decoder")
    args = parser.parse_args(argv)
    if min(args.num, args.nfe, args.batch_size) < 1 or args.seed < 0:
        parser.error("--num, --nfe and --batch-size must be at least 1, --seed at least 0")
    if args.export:
        if args.export.exists() or not args.export.parent.is_dir():
            parser.error(f"--export {args.export}: name a new file in a directory that exists")
        return args
    suffix = args.out.suffix.lower()
    args.kind = suffix if suffix in (".png", ".npz") else None
    if suffix in IMAGE_SUFFIXES - {".png"}:
        parser.error(f"--out {args.out}: name a .png, an .npz or a directory")
    if suffix == ".png" and args.out.exists() and not made_here(args.out):
        parser.error(f"--out {args.out} exists and is no .png of this script; name another")
    return args


def main(args):
    rank, world, device = join_ranks()
    say = print if rank == 0 else lambda _: None

    # The network, the decoder and the labels.
    net, checkpoint = load(args.checkpoint)
    say(checkpoint.get("note", f"{args.checkpoint}: step {checkpoint['step']:,}"))
    if args.export:
        if rank == 0:
            replace_file(args.export, partial(torch.save, exported(checkpoint)))
        leave_ranks()
        return
    if span := checkpoint["args"].get("omega_range"):
        if args.omega is None or not span[0] <= args.omega <= span[1]:
            fail(f"{args.checkpoint} was trained for --omega {span[0]:g} to {span[1]:g}: name one")
        net.omega = args.omega
    elif args.omega is not None:
        fail(f"--omega: {args.checkpoint} was trained without --omega-range")
    out, kind, num = args.out, args.kind, args.num
    net, meta = net.to(device), checkpoint["meta"]
    vae = load_vae(args.vae).to(device) if args.vae else None
    if bool(vae) != bool(meta["vae"]):
        draws = "pixels: leave out" if vae else "latents: name the weights of their"
        fail(f"{args.checkpoint} draws {draws} --vae")
    if vae and vae.fingerprint() != meta["vae"] != "unknown":
        say(f"note: {args.vae} is not the VAE that made the latents")
    every = range(max(net.num_classes, 1))
    classes = args.classes or every
    if not set(classes) <= set(every):
        fail(f"--classes: {args.checkpoint} has the labels 0 to {every[-1]}")
    labels = np.resize(classes, num)  # in turn. differs: the authors' code draws them at random
    if args.random_classes:
        labels = np.random.default_rng(args.seed).choice(classes, num)

    # The settings are stored with the pictures, so that two different runs are never mixed.
    names = ["num", "classes", "random_classes", "nfe", "velocity", "seed", "batch_size", "dtype"]
    names += ["omega"] * (args.omega is not None)
    weights = [part and fingerprint(part.state_dict()) for part in (net, vae)]
    settings = json.dumps({name: vars(args)[name] for name in names} | {"weights": weights})
    folder = out.with_name(out.name + ".parts") if kind else out
    record = folder / "settings.json"
    complete = kind == ".npz" and out.exists()
    if rank == 0:
        found = None
        if not complete:
            held = lock(folder)
            if not any(p == record or p.suffix in (".png", ".npy") for p in folder.iterdir()):
                replace_file(record, lambda file: file.write(settings.encode()))
        with suppress(Exception):  # without settings, or damaged
            found = str(np.load(out)["settings"]) if complete else record.read_text()
        if found != settings:
            where = out if complete else folder
            fail(f"--out {where} holds other pictures; remove it or name another")
    wait_for_all()

    # The unit of work is a batch of given indices, whichever rank it falls to: so every picture
    # comes out the same on any number of ranks.
    batches = [] if complete else batches_of(num, args.batch_size)
    files = {batch: files_of(batch, folder, kind) for batch in batches}
    todo = [batch for batch in batches[rank::world] if not all(map(Path.exists, files[batch]))]
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # the decoder's blocks have many shapes
        for part in [net, vae.decoder] if vae else [net]:
            part.compile(dynamic=False)
    progress, background = Progress(out, len(todo)), Background()
    for batch in todo:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            x = draw(net, labels[batch], batch, args.seed, args.nfe, args.velocity)
            pixels = to_pixels(x, vae, meta["scale"])
        background(save_batch, files[batch], pixels)
        progress(1)
    background.wait()
    wait_for_all()

    if kind and rank == 0 and not complete:
        parts = [path for (path,) in files.values()]
        arrays = map(np.load, parts)
        if kind == ".npz":
            replace_file(out, partial(save_npz, num, arrays, settings))
        else:
            columns = count if 1 < (count := len(set(labels))) <= 16 else math.isqrt(num)
            save_grid(np.concatenate([*arrays]), out, columns)
        os.close(held)  # NFS keeps an open file in its folder
        for path in [*parts, record, folder / ".lock"]:
            path.unlink()
        with suppress(OSError):  # somebody's files are in it
            folder.rmdir()
    say(f"{out}: {num:,} pictures, {args.nfe} evaluation{'s' * (args.nfe > 1)} each")
    leave_ranks()


if __name__ == "__main__":
    run_script(main, parse_args())
