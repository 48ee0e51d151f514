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


def load_checkpoint(path, device="cpu"):
    """(EMA network on the device, everything else in the checkpoint). ValueError if it is none."""
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=True)
        args, meta = checkpoint["args"], checkpoint["meta"]
        net = build_network(args["model"], meta, args["conditioning"]).to(device)
        net.load_state_dict(checkpoint["ema"])
    except Exception as error:  # torch.load alone raises a dozen kinds for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no checkpoint of train.py ({reason})") from None
    return net.eval(), checkpoint


def build_network(model, meta, conditioning):
    """The DiT for a dataset whose meta.json is `meta`."""
    channels, size, _ = meta["shape"]
    return DiT.from_config(model, channels, size, len(meta["classes"]), conditioning)


def keyed_generator(*key, device="cpu"):
    """A generator whose numbers are a function of the key alone, a few non-negative integers."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed))


def noise(indices, shape, seed=0):
    """N(0, I) for each index: (len(indices), *shape), each a function of (seed, index) alone."""
    return torch.stack([torch.randn(shape, generator=keyed_generator(seed, i)) for i in indices])


def to_uint8(x):
    """[-1, 1] to 0 .. 255, truncated as in the papers' evaluation: (B, C, H, W) -> (B, C, H, W)."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


def to_image(pixels):
    """(C, H, W) uint8 to Pillow. Latents (C = 4) are shown as their first three channels."""
    pixels = pixels.cpu().numpy()
    return Image.fromarray(
        pixels[0] if len(pixels) == 1 else rearrange(pixels[:3], "c h w -> h w c")
    )


def save_grid(pixels, path, columns):
    """One PNG of (N, C, H, W) uint8 pictures in rows of `columns`; small ones are enlarged."""
    blanks = pixels.new_zeros(-len(pixels) % columns, *pixels.shape[1:])
    pixels = torch.cat([pixels, blanks])
    grid = to_image(rearrange(pixels, "(r c) k h w -> k (r h) (c w)", c=columns))
    zoom = max(1, 64 // pixels.shape[-1])
    grid.resize((grid.width * zoom, grid.height * zoom), Image.Resampling.NEAREST).save(path)


@torch.no_grad()
def draw(net, labels, seed=0, batch_size=250, nfe=1, velocity=False, device="cpu", first=0):
    """Yield (n, C, H, W) uint8 batches of pictures first, first + 1, ..., one for each label."""
    for start in range(0, len(labels), batch_size):
        y = torch.as_tensor(labels[start : start + batch_size], device=device)
        indices = range(first + start, first + start + len(y))
        e = noise(indices, (net.channels, net.size, net.size), seed).to(device)
        yield to_uint8(meanflow.sample(net, e, y, nfe, velocity)).cpu()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
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
    add(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1"
    )
    args = parser.parse_args(argv)
    if min(args.num, args.nfe, args.batch_size) < 1 or args.seed < 0:
        parser.error("--num, --nfe and --batch-size must be at least 1, --seed at least 0")
    try:
        args.net, args.meta = load_checkpoint(args.checkpoint, args.device)
    except ValueError as error:
        parser.error(str(error))
    classes = range(max(args.net.num_classes, 1)) if args.classes is None else args.classes
    if not all(0 <= label < max(args.net.num_classes, 1) for label in classes):
        parser.error(
            f"--classes: the labels of {args.checkpoint} go from 0 to {args.net.num_classes - 1}"
        )
    args.labels = [classes[i % len(classes)] for i in range(args.num)]
    return args


def main(args):
    out = Path(args.out)
    folder = out if out.suffix not in (".png", ".npz") else out.parent
    folder.mkdir(parents=True, exist_ok=True)
    batches, begin, done = [], time.time(), 0
    options = (args.seed, args.batch_size, args.nfe, args.velocity, args.device)
    for pixels in draw(args.net, args.labels, *options):
        if folder == out:
            for i, picture in enumerate(pixels, start=done):
                to_image(picture).save(out / f"{i:06d}.png")
        else:
            batches.append(pixels)
        done += len(pixels)
        left = (time.time() - begin) / done * (args.num - done)
        print(f"\r{done:,} of {args.num:,} pictures, {left:.0f} s left ", end="", file=sys.stderr)
    print(file=sys.stderr)
    if out.suffix == ".npz":
        np.savez(out, arr_0=rearrange(torch.cat(batches), "n c h w -> n h w c").numpy())
    elif out.suffix == ".png":
        num_classes = len(set(args.labels))
        columns = num_classes if num_classes <= 16 else math.ceil(math.sqrt(args.num))
        save_grid(torch.cat(batches), out, min(columns, args.num))
    print(f"{args.num:,} pictures, {args.nfe} evaluations each: {out}")


if __name__ == "__main__":
    main(parse_args())
