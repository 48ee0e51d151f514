"""Fréchet Inception distance (arXiv 1706.08500) and Inception score (arXiv 1606.03498).

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz --inception FILE
    python fid.py IMAGES --crop 256 --inception FILE --save imagenet256.npz      statistics alone
    torchrun --nproc_per_node=8 fid.py samples.npz imagenet256.npz --inception FILE

FILE holds the weights of the network that defines the distance, pt_inception-2015-12-05. Either
side may be an .npz of images (arr_0, uint8, NHWC), a folder of images, a pixel dataset of
prepare_latents.py, or statistics (mu and sigma in an .npz, as in ADM's reference batches).
"""

import math
import zipfile
from pathlib import Path

import numpy as np
import scipy.linalg
import scipy.special
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.linalg.blas import dtrmm
from torch import nn

from prepare_latents import (
    ArgumentParser,
    Dataset,
    InputError,
    Progress,
    damaged,
    default_workers,
    image_files,
    join_ranks,
    load_strictly,
    load_weights,
    read_image,
    replace_file,
    run_script,
)

FEATURES, CLASSES = 2048, 1008
# Images that one value of the Inception score is taken of, in order, as in ADM's evaluation.
# differs: torch-fidelity shuffles them and takes ten equal splits.
SPLIT = 5000

# ---------------------------------------------------------------------------- the network


class Conv(nn.Module):
    """Convolution, batch normalisation, ReLU; padded to keep the size unless it strides."""

    def __init__(self, inputs, outputs, kernel, stride=1, padding=None):
        super().__init__()
        height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        if padding is None:
            padding = (height // 2, width // 2) if stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


# How a block pools beside its convolutions. The FID network is not torchvision's: where that has a
# plain average, this one leaves the padding out of it (blocks 5b to 6e and 7b), and its last block
# takes the maximum.
POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "maximum": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "halve": lambda x: F.max_pool2d(x, 3, stride=2),
}


class Mixed(nn.Module):
    """Branches side by side, their channels concatenated; the last one begins with pooling.

    branches: name -> convolutions (outputs, kernel[, stride]) in a row; a list among them forks.
    The names of the weights are torchvision's: branch_1, branch_2, ..., forks branch_2a, branch_2b.
    """

    def __init__(self, inputs, pool, pooled=None, **branches):
        super().__init__()
        self.pool, self.rows = POOLS[pool], []
        for branch, convs in branches.items():
            width, row = inputs, []
            for i, conv in enumerate(convs, start=1):
                forks = conv if isinstance(conv, list) else [conv]
                name = f"{branch}_{i}" if len(convs) > 1 else branch
                names = [name + letter for letter in "ab"] if len(forks) > 1 else [name]
                for name, (outputs, *options) in zip(names, forks, strict=True):
                    self.add_module(name, Conv(width, outputs, *options))
                row.append(names)
                width = sum(outputs for outputs, *_ in forks)
            self.rows.append(row)
        if pooled:
            self.branch_pool = Conv(inputs, pooled, 1)

    def forward(self, x):
        outputs = []
        for row in self.rows:
            h = x
            for names in row:
                h = torch.cat([getattr(self, name)(h) for name in names], dim=1)
            outputs.append(h)
        h = self.pool(x)
        return torch.cat([*outputs, self.branch_pool(h) if hasattr(self, "branch_pool") else h], 1)


def mixed_a(inputs, pooled):
    return Mixed(
        inputs, "average", pooled, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
        branch3x3dbl=[(64, 1), (96, 3), (96, 3)],
    )  # fmt: skip


def mixed_c(width):
    row, column = (1, 7), (7, 1)
    return Mixed(
        768, "average", 192, branch1x1=[(192, 1)],
        branch7x7=[(width, 1), (width, row), (192, column)],
        branch7x7dbl=[(width, 1), (width, column), (width, row), (width, column), (192, row)],
    )  # fmt: skip


def mixed_e(inputs, pool):
    fork = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(
        inputs, pool, 192, branch1x1=[(320, 1)], branch3x3=[(384, 1), fork],
        branch3x3dbl=[(448, 1), (384, 3), fork],
    )  # fmt: skip


class Inception(nn.Module):
    """The Inception-v3 of the FID: uint8 images (B, 3, H, W) of any size to features (B, 2048).

    fc turns features into the logits of 1,008 classes.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.MaxPool_1 = nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        self.MaxPool_2 = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b = mixed_a(192, 32)
        self.Mixed_5c = mixed_a(256, 64)
        self.Mixed_5d = mixed_a(288, 64)
        self.Mixed_6a = Mixed(
            288, "halve", branch3x3=[(384, 3, 2)], branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)]
        )
        self.Mixed_6b = mixed_c(128)
        self.Mixed_6c = mixed_c(160)
        self.Mixed_6d = mixed_c(160)
        self.Mixed_6e = mixed_c(192)
        self.Mixed_7a = Mixed(
            768, "halve", branch3x3=[(192, 1), (320, 3, 2)],
            branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)],
        )  # fmt: skip
        self.Mixed_7b = mixed_e(1280, "average")
        self.Mixed_7c = mixed_e(2048, "maximum")
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, images):
        x = (resize(images.float()) - 128) / 128
        for layer in list(self.children())[:-1]:
            x = layer(x)
        return x.mean((2, 3))


def resize(x, size=299):
    """Bilinear like TensorFlow 1, which the network was made with: (B, C, H, W) to size x size.

    Its pixel i lies at i * H / size, not at (i + 1/2) * H / size - 1/2, and nothing is smoothed.
    """
    for dim in (2, 3):
        length = x.shape[dim]
        place = torch.arange(size, dtype=torch.float32, device=x.device) * (length / size)
        low = place.floor().long()
        high = (low + 1).clamp(max=length - 1)
        part = (place - low).view(-1, *(1,) * (3 - dim))
        low, high = x.index_select(dim, low), x.index_select(dim, high)
        x = low + (high - low) * part
    return x


def load_inception(path):
    """The network in a file of the public weights. InputError for any other file."""
    net = Inception()
    try:
        state = load_weights(path)
        for name in net.state_dict():  # a counter that some copies of the file do not carry
            if name.endswith("num_batches_tracked"):
                state.setdefault(name, torch.tensor(0))
        load_strictly(net, state, path)
    except ValueError as error:
        raise InputError(f"--inception: {error}; pt_inception-2015-12-05 is needed") from None
    return net.eval().requires_grad_(False)


# ---------------------------------------------------------------------------- statistics


class Statistics:
    """Mean and covariance of features, and the Inception score, from running float64 sums.

    The images come in batches and in any order, spread over ranks; the features are not kept.
    """

    def __init__(self, net, count):
        self.net, device = net, next(net.parameters()).device
        sums = dict(n=(), x=(FEATURES,), xx=(FEATURES, FEATURES))
        splits = math.ceil(count / SPLIT)
        sums |= dict(split_n=(splits,), p=(splits, CLASSES), p_log_p=(splits,))
        self.sums = {k: torch.zeros(v, dtype=torch.float64, device=device) for k, v in sums.items()}

    @torch.no_grad()
    def add(self, images, indices):
        """images (B, 3, H, W) uint8 on any device; indices (B,) tell the split of each."""
        sums = self.sums
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features = self.net(images.to(sums["x"].device, non_blocking=True))
        # Without the bias, as the score's reference implementation has it.
        features = features.double()
        p = F.linear(features, self.net.fc.weight.double()).softmax(1)
        split = torch.as_tensor(indices).to(p.device) // SPLIT
        sums["n"] += len(features)
        sums["x"] += features.sum(0)
        sums["xx"] += features.T @ features
        sums["split_n"].index_add_(0, split, torch.ones_like(p[:, 0]))
        sums["p"].index_add_(0, split, p)
        sums["p_log_p"].index_add_(0, split, torch.xlogy(p, p).sum(1))

    def result(self):
        """dict of mu (2048,), sigma (2048, 2048), count and score, over the images of all ranks."""
        for total in self.sums.values():
            if dist.is_initialized():
                dist.all_reduce(total)
        n, x, xx, split_n, p, p_log_p = (total.cpu().numpy() for total in self.sums.values())
        p /= split_n[:, None]
        entropy = p_log_p / split_n - scipy.special.xlogy(p, p).sum(1)  # mean KL(p(y|x) | p(y))
        mu = x / n
        sigma = (xx - n * np.outer(mu, mu)) / (n - 1)
        return dict(mu=mu, sigma=sigma, count=int(n), score=float(np.exp(entropy).mean()))


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), arXiv 1706.08500, Eq. 6, of float64 arrays.

    With S1 = U' U, the eigenvalues of S1 S2 beyond zeros are those of the symmetric U S2 U', and
    the trace of the root is the sum of their roots: no matrix root is taken. The pivoted Cholesky
    factor U has as many rows as S1 has rank, so that fewer images than features are no special
    case. Rounding may leave eigenvalues slightly below zero, where the true ones are zero.
    """
    u, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma1)  # triangular, of the permuted S1
    u[rank:] = 0
    order = np.ix_(pivots - 1, pivots - 1)
    product = dtrmm(1.0, u, dtrmm(1.0, u, sigma2[order]), side=1, trans_a=1)
    values = scipy.linalg.eigvalsh(product[:rank, :rank])
    cross = np.sqrt(values.clip(min=0)).sum()
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross
    return max(float(distance), 0.0)


# ---------------------------------------------------------------------------- inputs


def load_statistics(path):
    """dict of mu, sigma and, where the file tells, count and score; None where it has no mu.

    ADM's reference batches have both images and the statistics of many more: these count.
    """
    try:
        with zipfile.ZipFile(path) as archive, np.load(path) as file:
            prefix = next((prefix for prefix in ("", "ref_") if prefix + "mu" in file), None)
            if prefix is None:
                return None
            # The headers first: what is not statistics may be as large as it likes.
            shapes = dict(mu=(FEATURES,), sigma=(FEATURES, FEATURES))
            for name, shape in shapes.items():
                with archive.open(f"{prefix}{name}.npy") as member:
                    found, _, dtype = npy_header(member)
                    if found != shape or dtype.kind not in "fiu":
                        raise ValueError(f"{name} is {dtype} {found}, not numbers {shape}")
            mu, sigma = (file[prefix + name].astype(np.float64) for name in shapes)
            known = {}
            for name in {"count", "score"} & set(file.files):
                with archive.open(f"{name}.npy") as member:
                    found, _, dtype = npy_header(member)
                    if found != () or dtype.kind not in "fiu":
                        raise ValueError(f"{name} is no number")
                known[name] = float(file[name])
    except Exception as error:  # numpy and zipfile raise a dozen kinds for a damaged file
        mend = "; make it again or name another"
        raise damaged(f"{path} cannot be read as an .npz", error, mend) from None
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError(f"{path} holds statistics that are not finite")
    return dict(mu=mu, sigma=sigma) | known


def npy_header(file):
    """(shape, Fortran order, dtype) of an .npy file; leaves `file` where the values begin."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): "read_array_header_1_0", (2, 0): "read_array_header_2_0"}[version]
    return getattr(np.lib.format, read)(file)


class Pictures(torch.utils.data.Dataset):
    """The images of an .npz, of a dataset directory, or of a folder and all its sub-folders.

    Item i is (3, H, W) uint8, or a line that tells what is wrong with its file. InputError
    where there are no images of 8 bits.
    """

    def __init__(self, path, crop=None):
        self.crop, self.files = crop, []
        if path.suffix == ".npz":
            self.array = map_npz(path).transpose(0, 3, 1, 2)
            self.rows = range(len(self.array))
        elif (path / "meta.json").exists():
            data = Dataset(path)
            self.array, self.rows = data.images, data.rows
            if data.meta.get("vae"):
                raise InputError(f"{path} holds latents; the distance is between images")
        else:
            self.rows = self.files = image_files(path)
        if len(self) < 2:
            raise InputError(f"{path} holds {len(self)} images, which have no covariance")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        try:
            image = read_image(row, self.crop) if self.files else np.array(self.array[row])
        except ValueError as error:  # to be raised by the main process
            return str(error)
        return torch.from_numpy(image).expand(3, -1, -1)


def map_npz(path):
    """arr_0 (N, H, W, C) uint8 of an .npz, mapped where it is not compressed: it may be large."""
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            if "arr_0.npy" not in archive.namelist():
                raise InputError(f"{path} holds neither images (arr_0) nor statistics (mu, sigma)")
            entry = archive.getinfo("arr_0.npy")
            with archive.open(entry) as member:
                shape, fortran, dtype = npy_header(member)
                header = member.tell()
            if fortran or dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3):
                raise InputError(f"{path}: arr_0 is {dtype} {shape}, not uint8 (N, H, W, 3)")
            if header + math.prod(shape) != entry.file_size:
                raise ValueError("arr_0 has not the size that it tells of")
            if entry.file_size > 10**6 + 100 * entry.compress_size:
                raise ValueError("arr_0 is compressed more than pictures can be")
            if entry.compress_type != zipfile.ZIP_STORED:
                return np.load(path)["arr_0"]
            file.seek(entry.header_offset + 26)  # the lengths of two fields before the contents
            name, extra = np.frombuffer(file.read(4), "<u2").tolist()
            return np.memmap(path, dtype, "r", file.tell() + name + extra + header, shape)
    except InputError:
        raise
    except Exception as error:  # numpy and zipfile raise a dozen kinds for a damaged file
        mend = "; make it again or name another"
        raise damaged(f"{path} cannot be read as an .npz", error, mend) from None


def collate(images):
    """One batch, or a batch for each image where their sizes differ, or a line on a fault."""
    if faults := [image for image in images if isinstance(image, str)]:
        return faults[0]
    same = all(image.shape == images[0].shape for image in images)
    return [torch.stack(images)] if same else [image[None] for image in images]


def measure(net, pictures, what, workers=0, rank=0, world=1, batch_size=50):
    """Statistics.result() of pictures; each rank looks at its share of the batches."""
    count = len(pictures)
    batches = [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
    mine = batches[rank::world]
    loader = torch.utils.data.DataLoader(
        pictures, batch_sampler=mine, num_workers=workers if pictures.files else 0,
        collate_fn=collate, pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    statistics, stretched = Statistics(net, count), False
    share = f"{what}, rank 0 of {world}" if world > 1 else what
    progress = Progress(share, sum(map(len, mine)), silent=rank > 0)
    for batch, groups in zip(mine, loader, strict=True):
        if isinstance(groups, str):
            raise InputError(groups)
        if len(groups) > 1 and rank == 0 and not stretched:
            print(f"note: {what} has pictures of several sizes, all stretched to one: see --crop")
            stretched = True
        for indices, images in zip(np.array_split(batch, len(groups)), groups, strict=True):
            statistics.add(images, indices)
        progress(len(batch))
    return statistics.result()


# ---------------------------------------------------------------------------- command line


def parse_args(argv=None):
    parser = ArgumentParser(
        prog="fid.py",
        usage="fid.py SAMPLES [REFERENCE] --inception FILE [flags]; --help tells more",
        description=__doc__.splitlines()[0],
    )
    add = parser.add_argument
    add("samples", type=Path, help=".npz of images or of statistics, dataset, folder of images")
    add("reference", type=Path, nargs="?", help="the same; without it, for --save, no distance")
    add("--inception", help="weights pt_inception-2015-12-05, needed where there are images")
    add("--crop", type=int, help="folders: centre-crop the images to this size, as ADM does")
    add("--save", type=Path, help="file for the statistics of SAMPLES, an .npz")
    add("--batch-size", type=int, default=50, help="images at once on a rank")
    add("--workers", type=int, help="folders: processes per rank that decode images")
    args = parser.parse_args(argv)
    args.workers = default_workers() if args.workers is None else args.workers
    if min(args.batch_size, 1 if args.crop is None else args.crop) < 1 or args.workers < 0:
        parser.error("--batch-size and --crop must be at least 1, --workers at least 0")
    if not (args.reference or args.save):
        parser.error("name a REFERENCE, or --save FILE for the statistics of SAMPLES alone")
    if args.save and (args.save.suffix != ".npz" or not args.save.parent.is_dir()):
        parser.error(f"--save {args.save}: name an .npz in a directory that exists")
    paths = [path for path in (args.samples, args.reference) if path]
    if args.save and args.save.resolve() in [path.resolve() for path in paths]:
        parser.error(f"--save {args.save} would replace what is read")
    args.sides = []
    try:
        for path in paths:
            if not path.exists():
                raise InputError(f"{path} does not exist")
            if path.suffix != ".npz" and not path.is_dir():
                raise InputError(f"{path} is neither an .npz nor a folder")
            known = load_statistics(path) if path.suffix == ".npz" else None
            if not known and not args.inception:
                raise InputError(f"{path} holds images: name the weights of --inception")
            args.sides.append((path, known or Pictures(path, args.crop)))
        args.net = load_inception(args.inception) if args.inception else None
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.crop and not any(isinstance(side, Pictures) and side.files for _, side in args.sides):
        parser.error("--crop is for folders of images")
    return args


def main(args):
    rank, world, device = join_ranks()
    say = print if rank == 0 else lambda _: None
    net = args.net and args.net.to(device)
    sides = []
    for path, side in args.sides:
        if isinstance(side, Pictures):
            side = measure(net, side, path, args.workers, rank, world, args.batch_size)
        count = f"{side['count']:,} images" if "count" in side else "statistics of unknown count"
        score = f", Inception score {side['score']:.4g}" if "score" in side else ""
        say(f"{path}: {count}{score}")
        if side.get("count", math.inf) < 10_000:
            say(f"warning: {path} has fewer than 10,000 images, which makes a FID too large")
        sides.append(side)
    if rank == 0 and args.save:
        replace_file(args.save, lambda file: np.savez(file, **sides[0]))
        say(f"{args.save}: statistics of {args.samples}")
    if rank == 0 and len(sides) == 2:
        one, two = sides
        say(f"FID {frechet_distance(one['mu'], one['sigma'], two['mu'], two['sigma']):.4f}")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
