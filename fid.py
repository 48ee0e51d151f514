"""FID (arXiv 1706.08500), KID (arXiv 1801.01401) and Inception score (arXiv 1606.03498) of images.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz --inception FILE
    python fid.py IMAGES --crop 256 --inception FILE --save imagenet256.npz      statistics only
    torchrun --nproc_per_node=8 fid.py samples.npz imagenet256.npz --inception FILE

FILE holds the weights of the network that defines the FID, pt_inception-2015-12-05. Each input is
an .npz of images (arr_0, uint8, NHWC), a folder of images, a pixel dataset of prepare_latents.py,
or an .npz of statistics (mu and sigma). If it holds images too, as ADM's do, they are not used. Few
images make a FID too large. The KID has no such bias; it needs features, which --save stores.
"""

import argparse
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from scipy.linalg import eigvalsh, lapack
from torch import nn

from model import fail, load_file, load_strictly, weights_in
from prepare_latents import (
    Dataset, Progress, batches_of, default_workers, image_files, join_ranks, leave_ranks,
    read_ahead, read_image, replace_file, run_script,
)  # fmt: skip

FEATURES, CLASSES = 2048, 1008
# The Inception score is the mean over splits of 5,000 consecutive images, as in ADM's evaluation.
# differs: torch-fidelity shuffles the images and uses ten equal splits.
SPLIT = 5000
KEPT = 5000  # images, picked at random, whose features the kernel distance takes


class Conv(nn.Sequential):
    """Convolution, batch normalisation, ReLU. By default, it is padded if its stride is 1."""

    def __init__(self, inputs, outputs, kernel, stride=1, padding=None):
        super().__init__()
        padding = padding or ("same" if stride == 1 else "valid")
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)
        self.relu = nn.ReLU()


# torchvision's blocks InceptionA to InceptionE: the convolutions of each branch in sequence, as
# (outputs, kernel, stride). FORK is two convolutions of the same input, named a and b.
ROW, COLUMN, FORK = (1, 7), (7, 1), {"a": (1, 3), "b": (3, 1)}
BLOCK_A = {"1x1": [(64, 1)], "5x5": [(48, 1), (64, 5)], "3x3dbl": [(64, 1), (96, 3), (96, 3)]}
BLOCK_B = {"3x3": [(384, 3, 2)], "3x3dbl": [(64, 1), (96, 3), (96, 3, 2)]}
BLOCK_C = {w: {"1x1": [(192, 1)], "7x7": [(w, 1), (w, ROW), (192, COLUMN)],
               "7x7dbl": [(w, 1), (w, COLUMN), (w, ROW), (w, COLUMN), (192, ROW)]}
           for w in (128, 160, 192)}  # fmt: skip
BLOCK_D = {"3x3": [(192, 1), (320, 3, 2)],
           "7x7x3": [(192, 1), (192, ROW), (192, COLUMN), (192, 3, 2)]}  # fmt: skip
BLOCK_E = {"1x1": [(320, 1)], "3x3": [(384, 1), (384, FORK)],
           "3x3dbl": [(448, 1), (384, 3), (384, FORK)]}  # fmt: skip


class Mixed(nn.Module):
    """Concatenates branches of convolutions, and one of pooling and, if `pooled`, convolution."""

    def __init__(self, inputs, branches, pool, pooled=None):
        super().__init__()
        self.pool, self.branches = pool, []
        for branch, convs in branches.items():
            width, stages = inputs, []
            for i, (outputs, kernel, *stride) in enumerate(convs, start=1):
                name = f"branch{branch}_{i}" if len(convs) > 1 else f"branch{branch}"
                kernels = kernel if kernel is FORK else {"": kernel}
                stages.append([name + letter for letter in kernels])
                for letter, kernel in kernels.items():
                    self.add_module(name + letter, Conv(width, outputs, kernel, *stride))
                width = outputs
            self.branches.append(stages)
        self.branch_pool = Conv(inputs, pooled, 1) if pooled else nn.Identity()

    def forward(self, x):
        outputs = []
        for stages in self.branches:
            h = x
            for names in stages:
                h = torch.cat([getattr(self, name)(h) for name in names], dim=1)
            outputs.append(h)
        return torch.cat([*outputs, self.branch_pool(self.pool(x))], dim=1)


class Inception(nn.Module):
    """The FID's Inception-v3: uint8 images (B, 3, H, W) of any size -> features (B, 2048)."""

    def __init__(self):
        super().__init__()
        # Unlike torchvision's, averages leave out the padding, and the last block uses the maximum.
        average = nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)
        maximum, halve = nn.MaxPool2d(3, 1, padding=1), nn.MaxPool2d(3, 2)
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.MaxPool_1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding="valid")
        self.MaxPool_2 = nn.MaxPool2d(3, 2)
        self.Mixed_5b = Mixed(192, BLOCK_A, average, 32)
        self.Mixed_5c = Mixed(256, BLOCK_A, average, 64)
        self.Mixed_5d = Mixed(288, BLOCK_A, average, 64)
        self.Mixed_6a = Mixed(288, BLOCK_B, halve)
        self.Mixed_6b = Mixed(768, BLOCK_C[128], average, 192)
        self.Mixed_6c = Mixed(768, BLOCK_C[160], average, 192)
        self.Mixed_6d = Mixed(768, BLOCK_C[160], average, 192)
        self.Mixed_6e = Mixed(768, BLOCK_C[192], average, 192)
        self.Mixed_7a = Mixed(768, BLOCK_D, halve)
        self.Mixed_7b = Mixed(1280, BLOCK_E, average, 192)
        self.Mixed_7c = Mixed(2048, BLOCK_E, maximum, 192)
        self.fc = nn.Linear(FEATURES, CLASSES)  # features -> logits

    def forward(self, images):
        x = (resize(images.float()) - 128) / 128  # (B, 3, 299, 299)
        for layer in list(self.children())[:-1]:  # all but fc
            x = layer(x)
        return x.mean((2, 3))


def resize(x, size=299):
    """Bilinear resize of TensorFlow 1, without antialiasing: (B, C, H, W) -> (B, C, size, size)."""
    for dim in (2, 3):
        length = x.shape[dim]
        place = torch.arange(size, device=x.device) * (length / size)  # no half-pixel offset
        low, high = place.long(), (place.long() + 1).clamp(max=length - 1)
        part = (place - low).view(-1, *(1,) * (3 - dim))
        low, high = x.index_select(dim, low), x.index_select(dim, high)
        x = low + (high - low) * part
    return x


def load_inception(path):
    """Inception with the public weights pt_inception-2015-12-05, frozen."""
    net = Inception()
    counters = {k: v for k, v in net.state_dict().items() if "num_batches" in k}  # may be missing
    weights, _ = weights_in(load_file(path), path, "Conv2d_1a_3x3.conv.weight")
    load_strictly(net, counters | weights, path)
    return net.eval().requires_grad_(False)


# ---------------------------------------------------------------------------- statistics


class Statistics:
    """Running sums, in float64, of the features and class probabilities of `count` images."""

    def __init__(self, net, count):
        zeros = net.fc.weight.double().new_zeros  # float64, on the network's device
        splits = len(range(0, count, SPLIT))
        self.net, self.x, self.xx = net, zeros(FEATURES), zeros(FEATURES, FEATURES)
        self.n, self.p, self.p_log_p = zeros(splits), zeros(splits, CLASSES), zeros(splits)
        self.kept = zeros(min(count, KEPT), FEATURES)
        self.places = np.random.default_rng(0).permutation(count)

    @torch.no_grad()
    def add(self, images, indices):
        """images (B, C, H, W) uint8, C 1 or 3, on any rank, in any order; their indices (B,)."""
        weight = self.net.fc.weight
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # full float32
            images = images.to(weight.device, non_blocking=True).expand(-1, 3, -1, -1)
            features = self.net(images).double()
        p = (features @ weight.double().T).softmax(1)  # no bias, as in the score's original code
        split = torch.as_tensor(indices).to(weight.device) // SPLIT
        places = torch.from_numpy(self.places[indices])
        self.kept[places[places < KEPT]] = features[places < KEPT]
        self.x += features.sum(0)
        self.xx += features.T @ features
        self.n.index_add_(0, split, torch.ones_like(p[:, 0]))
        self.p.index_add_(0, split, p)
        self.p_log_p.index_add_(0, split, torch.xlogy(p, p).sum(1))

    def result(self):
        """dict of mu (2048,), sigma (2048, 2048), count, score and features over all ranks."""
        sums = [self.x, self.xx, self.n, self.p, self.p_log_p, self.kept]
        if dist.is_initialized():
            for total in sums:
                dist.all_reduce(total)
        x, xx, n, p, p_log_p, kept = (total.cpu() for total in sums)
        p = p / n[:, None]  # p(y) of each split
        divergence = p_log_p / n - torch.xlogy(p, p).sum(1)  # mean of KL(p(y|x) || p(y))
        count, score = int(n.sum()), float(divergence.exp().mean())
        mu = x / count
        sigma = (xx - count * torch.outer(mu, mu)) / (count - 1)
        features = kept.float().numpy()
        return dict(mu=mu.numpy(), sigma=sigma.numpy(), count=count, score=score, features=features)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), arXiv 1706.08500, Eq. 6. float64 arrays.

    With S1 = U' U (Cholesky, pivoted because S1 may be singular), the nonzero eigenvalues of S1 S2
    are those of the symmetric U S2 U'. The trace of the root is the sum of their square roots.
    """
    u, pivots, rank, _ = lapack.dpstrf(sigma1)  # of S1 with permuted rows and columns
    u, order = np.triu(u)[:rank], pivots - 1
    values = eigvalsh(u @ sigma2[np.ix_(order, order)] @ u.T)
    cross = np.sqrt(values.clip(min=0)).sum()  # rounding makes some zeros slightly negative
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross
    return max(float(distance), 0.0)


def kernel_distance(x, y):
    """Unbiased squared MMD of features (n, 2048), (m, 2048), arXiv 1801.01401, Sec. 4; may be < 0.

    differs: torch-fidelity takes the mean over 100 random subsets of 1,000; here all are one set.
    """
    x, y = np.float64(x), np.float64(y)
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    within = [(k.sum() - k.trace()) / (len(k) ** 2 - len(k)) for k in (kernel(x, x), kernel(y, y))]
    return sum(within) - 2 * kernel(x, y).mean()


def distances(ours, theirs):
    """{"fid": float} of two results of Statistics, and "kid" where both have features."""
    moments = ours["mu"], ours["sigma"], theirs["mu"], theirs["sigma"]
    found = {"fid": frechet_distance(*moments)}
    if "features" in ours.keys() & theirs.keys():
        found["kid"] = kernel_distance(ours["features"], theirs["features"])
    return found


# ---------------------------------------------------------------------------- inputs


@contextmanager
def open_npz(path):
    """The arrays of an .npz. Any error while they are read ends the script with one line."""
    try:
        with zipfile.ZipFile(path), np.load(path) as file:  # ZipFile has the clearer errors
            yield file
    except Exception as error:  # numpy and zipfile raise many kinds
        fail(f"{path} cannot be read as statistics or images ({error!r}); make it again")


def load_statistics(path):
    """What Statistics.result() gave; of others' files only mu and sigma. None without mu."""
    if path.is_dir():
        return None
    with open_npz(path) as file:
        prefix = "" if "mu" in file else "ref_"
        if prefix + "mu" not in file:
            return None
        found = {name: file[prefix + name].astype(np.float64) for name in ("mu", "sigma")}
        found |= {name: file[name].item() for name in ("count", "score") if name in file}
        found |= {"features": file["features"]} if {"count", "features"} <= {*file} else {}
    shapes = {"mu": (FEATURES,), "sigma": (FEATURES, FEATURES)}
    shapes["features"] = (min(found.get("count", 0), KEPT), FEATURES)
    for name in shapes.keys() & found.keys():
        if found[name].shape != shapes[name] or not np.isfinite(found[name]).all():
            fail(f"{path}: {name} must be finite numbers of shape {shapes[name]}; make it again")
    return found


def load_images(path):
    """arr_0 of an .npz, (N, H, W, C) uint8. It is memory-mapped where it is not compressed."""
    with open_npz(path) as file, file.zip.open("arr_0.npy") as member:
        np.lib.format.read_magic(member)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3):
            fail(f"{path}: arr_0 is {dtype} {shape}, but must be uint8 (N, H, W, 3)")
        entry = file.zip.getinfo("arr_0.npy")
        if entry.compress_type != zipfile.ZIP_STORED or fortran:
            return file["arr_0"]
        # In a zip, 30 bytes and two fields precede each member; bytes 26 to 29 are their lengths.
        lengths = np.fromfile(path, "<u2", 2, offset=entry.header_offset + 26)
        offset = entry.header_offset + 30 + int(lengths.sum()) + member.tell()
        return np.memmap(path, dtype, "r", offset, shape)


class Pictures:
    """The images of an .npz, of a pixel dataset, or of a folder and its sub-folders.

    pictures[indices] is a batch (B, 1 or 3, H, W) uint8.
    """

    def __init__(self, path, crop=None):
        self.path, self.crop, self.files = path, crop, []
        if path.suffix == ".npz":
            self.images = load_images(path).transpose(0, 3, 1, 2)
            self.rows = range(len(self.images))
        elif (path / "meta.json").exists():
            data = Dataset(path)
            if data.meta["vae"]:
                fail(f"{path} holds latents; name the folder of images it was made from")
            self.images, self.rows = data.images, data.rows
        else:
            self.rows = self.files = image_files(path)
        if len(self.rows) < 2:
            fail(f"{path} holds {len(self.rows)} images; statistics need at least 2")

    def __getitem__(self, indices):
        rows = [self.rows[i] for i in indices]
        try:
            batch = [read_image(row, self.crop) if self.files else self.images[row] for row in rows]
        except ValueError as error:
            fail(f"{self.path}: {error}")
        if len({image.shape for image in batch}) > 1:
            fail(f"{self.path}: the images have several sizes; pass --crop SIZE")
        return np.stack(batch)


def measure(net, pictures, what, workers=1, rank=0, world=1, batch_size=128):
    """Statistics.result() of pictures. Each rank processes its share of the batches."""
    mine = batches_of(len(pictures.rows), batch_size)[rank::world]
    progress, statistics = Progress(what, len(mine)), Statistics(net, len(pictures.rows))
    readings = read_ahead(pictures.__getitem__, mine, workers) if pictures.files else mine
    for indices, reading in zip(mine, readings, strict=True):
        images = reading.result() if pictures.files else pictures[indices]
        statistics.add(torch.from_numpy(images), indices)
        progress(1)
    return statistics.result()


# ---------------------------------------------------------------------------- command line


def parse_args(argv=None):
    about, style = __doc__.splitlines()[0], argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False, formatter_class=style)
    add, workers = parser.add_argument, default_workers()
    add("samples", type=Path, help=".npz of images or of statistics, dataset, folder of images")
    add("reference", type=Path, nargs="?", help="the same; may be left out with --save")
    add("--inception", help="weights pt_inception-2015-12-05; required if an input holds images")
    add("--crop", type=int, help="folders: centre-crop the images to this size, as ADM does")
    add("--save", type=Path, help=".npz to write the statistics of SAMPLES to")
    add("--batch-size", type=int, default=128, help="images per batch and rank")
    add("--workers", type=int, default=workers, help="folders: threads per rank to read images")
    args = parser.parse_args(argv)
    args.paths = [path for path in (args.samples, args.reference) if path]
    if min(args.batch_size, 1 if args.crop is None else args.crop, args.workers) < 1:
        parser.error("--batch-size, --crop and --workers must be at least 1")
    if not (args.reference or args.save):
        parser.error("name a REFERENCE, or --save FILE for the statistics of SAMPLES alone")
    if missing := [path for path in args.paths if not path.exists()]:
        parser.error(f"{missing[0]} does not exist")
    if args.save and (args.save.suffix != ".npz" or not args.save.parent.is_dir()):
        parser.error(f"--save {args.save}: name an .npz in a directory that exists")
    if args.save and args.save.exists():
        parser.error(f"--save {args.save} exists; name another")
    if args.crop and all(path.is_file() or (path / "meta.json").exists() for path in args.paths):
        parser.error("--crop is for folders of images")
    return args


def main(args):
    rank, world, device = join_ranks()
    say = print if rank == 0 else lambda _: None
    sides = [load_statistics(path) or Pictures(path, args.crop) for path in args.paths]
    net = load_inception(args.inception).to(device) if args.inception else None
    for i, (path, side) in enumerate(zip(args.paths, sides, strict=True)):
        if isinstance(side, Pictures):
            if not net:
                fail(f"{path} holds images: name the weights of Inception by --inception")
            sides[i] = side = measure(net, side, path, args.workers, rank, world, args.batch_size)
        if {"count", "score"} <= side.keys():
            say(f"{path}: {side['count']:,} images, Inception score {side['score']:.4g}")
        if side.get("count", 10_000) < 10_000:
            say(f"warning: {path} has fewer than 10,000 images, which makes a FID too large")
    if rank == 0 and args.save:
        replace_file(args.save, lambda file: np.savez(file, **sides[0]))
        say(f"{args.save}: statistics of {args.samples}")
    if rank == 0 and len(sides) == 2:
        found = distances(*sides)
        say(f"FID {found['fid']:.4f}" + (f", KID {found['kid']:.6f}" if "kid" in found else ""))
    leave_ranks()


if __name__ == "__main__":
    run_script(main, parse_args())
