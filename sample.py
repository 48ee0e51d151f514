"""Draw pictures from a checkpoint, by default in one evaluation of its EMA network.

    python sample.py runs/tiny-dtd/last.pt --out grid.png
    python sample.py CKPT --classes 207 360 --num 64 --nfe 2 --out pictures/
    python sample.py CKPT --num 50000 --out samples.npz           uint8 (N, H, W, C) as arr_0

Picture i depends on the seed and on i alone, whatever the number and the batch size are.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image

import meanflow
from model import DiT


def load_checkpoint(path):
    """(EMA network on the CPU, the whole checkpoint). ValueError where it is none of train.py's."""
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file; a run's checkpoint is its last.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        args, meta = checkpoint["args"], checkpoint["meta"]
        net = build_network(args["model"], meta, args["conditioning"])
        net.load_state_dict(checkpoint["ema"])
    except Exception as error:  # torch.load alone raises a dozen kinds for a damaged file
        message = f"{path} is damaged or no checkpoint of train.py ({type(error).__name__})"
        raise ValueError(message) from None
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


def to_uint8(x):
    """[-1, 1] to 0 .. 255, truncated as in the papers' evaluation: (B, C, H, W) -> (B, C, H, W)."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


def to_image(pixels):
    """(C, H, W) uint8 array to Pillow. Latents (C = 4) show as their first three channels."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels[:3].transpose(1, 2, 0))


def save_grid(pixels, path, columns):
    """One PNG of (N, C, H, W) uint8 pictures in rows of `columns`; small ones are enlarged."""
    blanks = np.zeros((-len(pixels) % columns, *pixels.shape[1:]), np.uint8)
    pixels = np.concatenate([pixels, blanks])
    grid = to_image(rearrange(pixels, "(r c) k h w -> k (r h) (c w)", c=columns))
    zoom = max(1, 64 // pixels.shape[-1])
    grid.resize((grid.width * zoom, grid.height * zoom), Image.Resampling.NEAREST).save(path)


def is_in_file(path):
    """Whether no directory can be made at `path`, since it or a parent of it is a file."""
    return any(part.is_file() for part in (path, *path.parents))


def draw(net, labels, seed=0, batch_size=250, nfe=1, velocity=False, device="cpu"):
    """Yield (n, C, H, W) uint8 batches on the CPU: picture i under labels[i], from noise i."""
    for start in range(0, len(labels), batch_size):
        y = torch.as_tensor(labels[start : start + batch_size], device=device)
        indices = range(start, start + len(y))
        e = noise(indices, (net.channels, net.size, net.size), seed).to(device)
        yield to_uint8(meanflow.sample(net, e, y, nfe, velocity)).cpu()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="sample.py",
        usage="sample.py CHECKPOINT --out OUT [flags]; --help lists them all",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", help="last.pt of a run")
    add("--out", required=True, help="grid.png, samples.npz, or a directory for single PNGs")
    add("--num", type=int, default=100, help="number of pictures")
    add("--classes", type=int, nargs="+", help="labels to go through in turn (default: all)")
    add("--nfe", type=int, default=1, help="evaluations of the network for a picture")
    add("--velocity", action="store_true", help="Euler on u(z, t, t), the instantaneous velocity")
    add("--seed", type=int, default=0, help="another seed draws other noise")
    add("--batch-size", type=int, default=250, help="pictures at once")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    if min(args.num, args.nfe, args.batch_size) < 1 or args.seed < 0:
        parser.error("--num, --nfe and --batch-size must be at least 1, --seed at least 0")
    args.out = Path(args.out)
    args.kind = args.out.suffix.lower()
    args.folder = args.out.parent if args.kind in (".png", ".npz") else args.out
    other_picture = args.kind != ".png" and args.kind in Image.registered_extensions()
    if other_picture or is_in_file(args.folder):
        parser.error(f"--out {args.out}: name a .png, an .npz or a directory")
    try:
        args.net = load_checkpoint(args.checkpoint)[0].to(args.device)
    except ValueError as error:
        parser.error(str(error))
    except (RuntimeError, AssertionError) as error:  # .to() of a device that is not there
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    labels = range(max(args.net.num_classes, 1))
    if args.classes is not None and not set(args.classes) <= set(labels):
        parser.error(f"--classes: {args.checkpoint} has the labels 0 to {labels[-1]}")
    classes = args.classes or labels
    args.labels = [classes[i % len(classes)] for i in range(args.num)]
    return args


def main(args):
    net, out = args.net, args.out
    args.folder.mkdir(parents=True, exist_ok=True)
    pictures = np.empty((args.num, net.channels, net.size, net.size), np.uint8)
    begin, done = time.time(), 0
    options = (args.seed, args.batch_size, args.nfe, args.velocity, args.device)
    for pixels in draw(net, args.labels, *options):
        pictures[done : done + len(pixels)] = pixels
        done += len(pixels)
        left = (time.time() - begin) / done * (args.num - done)
        print(f"\r{done:,} of {args.num:,} pictures, {left:.0f} s left ", end="", file=sys.stderr)
    print(file=sys.stderr)
    if args.kind == ".npz":
        np.savez(out, arr_0=rearrange(pictures, "n c h w -> n h w c"))
    elif args.kind == ".png":
        columns = len(set(args.labels))
        columns = columns if columns <= 16 else math.ceil(math.sqrt(args.num))
        save_grid(pictures, out, columns)
    else:
        for i, picture in enumerate(pictures):
            to_image(picture).save(out / f"{i:06d}.png")
    print(f"{args.num:,} pictures of {args.nfe} evaluations each: {out}")


if __name__ == "__main__":
    main(parse_args())
