"""Train a MeanFlow model (arXiv 2505.13447v1) by the improved scheme of arXiv 2511.19065v1.

    python train.py                        the tiny model on the built-in digits: minutes on a CPU
    python train.py --model S/4 --data data/cifar10 --accel minsnr
    torchrun --nproc_per_node=8 train.py --model XL/2 --accel dtd
    python train.py --model B/4 --batch-size 16 --bench         what a step costs on this machine

Whatever is not given comes from the paper's recipe for the model named. The same command again
resumes. A run's directory holds last.pt, metrics.jsonl, samples/ and, at the end, progress.png.
SIGTERM, SIGUSR1 and Ctrl-C end a run after the step in progress, saved, with 128 + their number.
"""

import argparse
import copy
import json
import math
import multiprocessing.util
import os
import signal
import sys
import time
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch._subclasses import FakeTensorMode
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

import fid
import meanflow
import schedules
from model import CONDITIONINGS, CONFIGS
from prepare_latents import (
    ArgumentParser,
    Dataset,
    InputError,
    Progress,
    fail,
    is_in_file,
    join_ranks,
    leave_ranks,
    load_vae,
    lock,
    network_input,
    replace_file,
    run_script,
    save_grid,
    to_pixels,
    wait_for_all,
    write_glyphs,
)
from sample import build_network, draw, keyed_generator, load_checkpoint, read_checkpoint

# The default datasets; what --dry-run takes them to be where they have not been made yet: the
# number of pictures, their shape (C, H, W) and the number of classes.
GLYPHS, IMAGENET = "data/glyphs", "data/imagenet"
ASSUMED = {GLYPHS: (20_000, (1, 16, 16), 10), IMAGENET: (1_281_167, (4, 32, 32), 1000)}

# arXiv 2505.13447v1, Tab. 4: what most models share, then what is a model's own. How many workers
# read the data, and how often a run logs, draws and saves, is ours.
PAPER = dict(
    epochs=240, batch_size=256, lr=1e-4, warmup=0, adam_beta2=0.95, ema_decay=0.9999,
    label_drop=0.1, omega=1.0, kappa=0.5, cfg_interval=(0.0, 1.0), r_neq_t=0.25,
    time_sampler="lognorm", time_mu=-0.4, time_sigma=1.0, conditioning="t,t-r", adaptive_p=1.0,
    tangent=(0.0, 1.0), data=IMAGENET, workers=4, log_every=100, sample_every=5000, save_every=5000,
)  # fmt: skip
RECIPES = {name: {} for name in CONFIGS} | {
    "L/2":   dict(omega=0.2, kappa=0.92, cfg_interval=(0.0, 0.8)),
    "XL/2":  dict(omega=0.2, kappa=0.92, cfg_interval=(0.0, 0.75)),
    "XL/2+": dict(epochs=1000, cfg_interval=(0.3, 0.8)),
    # differs: ours, for the built-in digits; short, so with a fast learning rate and a short EMA.
    "tiny":  dict(epochs=5, batch_size=64, lr=4e-3, warmup=100, ema_decay=0.996, data=GLYPHS,
                  workers=0, log_every=100, sample_every=200, save_every=500),
}  # fmt: skip

# Logged for every interval: the loss, the unweighted squared error per dimension of samples with
# r = t and with r < t, and the norm of the gradient.
STATS = ("loss", "v_error", "u_error", "grad_norm")

# Flags that may differ when a run is resumed. Another length is a user's own choice: beta and DTD's
# cap go by the share of the run that is done. The data is compared by its meta.json.
MAY_CHANGE = {"steps", "epochs", "compile", "workers", "log_every", "sample_every", "save_every"}
MAY_CHANGE |= {"data", "out", "dry_run", "init_from", "vae", "inception", "fid_ref", "fid_every"}
MAY_CHANGE |= {"affinity_every", "fid_num", "activation_checkpointing", "bench", "micro_batch_size"}

# Ranges of the gap t - r in which errors and affinities are given: arXiv 2511.19065v1, Sec. 4.2.
GAPS = (0.1, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 0.9)

GRID_ROWS = 10  # of the pictures in samples/

TIMEOUT = timedelta(minutes=30)  # after which a rank no longer waits for another that hangs
SIGNALS = [getattr(signal, n) for n in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, n)]


# ---------------------------------------------------------------------------- order of the data


@lru_cache(maxsize=2)
def shuffled(count, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(count)


def chunk_indices(step, chunk, micro, batch_size, count, seed):
    """Which samples micro-batch `chunk` of a step holds: (micro,) indices below count.

    The data is an endless stream of shuffled epochs, cut into batches and those into micro-batches,
    which are dealt to the ranks in turn. So the samples of a step are a function of (seed, step),
    and a run resumes on any number of ranks without replaying the stream. Noise, times and dropped
    labels are a function of (seed, step, chunk): the same as long as a micro-batch has its size.
    """
    first = step * batch_size + chunk * micro
    epoch, offset = np.divmod(np.arange(first, first + micro), count)
    parts = [shuffled(count, seed, e)[offset[epoch == e]] for e in np.unique(epoch).tolist()]
    return np.concatenate(parts)


# ---------------------------------------------------------------------------- files of a run


def forget_after(out, step):
    """Drop metrics and pictures after `step`, from which a run goes on, and rows cut off."""

    def is_kept(row):
        try:
            return json.loads(row)["step"] <= step
        except (ValueError, KeyError, TypeError):  # cut by a kill or a full disk
            return False

    path = out / "metrics.jsonl"
    if path.exists():
        rows = [row for row in path.read_text(errors="replace").splitlines() if is_kept(row)]
        text = "".join(row + "\n" for row in rows)
        replace_file(path, lambda file: file.write(text.encode()))
    for at, grid in grids(out / "samples").items():
        if at > step:
            grid.unlink()


def grids(samples):
    """The pictures in samples/ by their step, in order."""
    return {int(path.stem): path for path in sorted(samples.glob("*.png")) if path.stem.isdecimal()}


def append_row(path, row):
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def restore(parts, saved):
    """Brings the parts of a run to where a checkpoint left them. Any exception: they differ."""
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    optimizer = parts["optimizer"]
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        state = optimizer.state[p]
        if not state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape:
            raise ValueError("Adam's moments have another shape")


def save_progress(samples, path, rows=10):
    """One picture of training: the first row of up to `rows` grids in samples/, oldest on top."""
    steps = list(found := grids(samples))
    picks = np.unique(np.linspace(0, len(steps) - 1, rows).round().astype(int))
    strips = [(steps[i], Image.open(found[steps[i]])) for i in picks]
    margin, tile = 80, strips[0][1].height // GRID_ROWS
    picture = Image.new("RGB", (margin + strips[0][1].width, tile * len(strips)))
    for i, (step, grid) in enumerate(strips):
        ImageDraw.Draw(picture).text((8, (i + 0.5) * tile), f"step {step}", anchor="lm")
        picture.paste(grid.crop((0, 0, grid.width, tile)), (margin, i * tile))
    replace_file(path, partial(picture.save, format="PNG"))


def memory_plan(net, micro, num_neq, dtype):
    """(bytes of a rank that stay, bytes of activations kept for the backward, bytes of last.pt).

    Counted from the shapes of a network of fake tensors; the kernels need some on top.
    """
    checkpointing, net.checkpointing = net.checkpointing, False
    weights = sum(p.numel() for p in net.parameters() if p.requires_grad)
    own = {p.untyped_storage()._cdata for p in net.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    z, t = torch.empty(micro, net.channels, net.size, net.size), torch.empty(micro)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        u = net(z, t, t, torch.empty(micro, dtype=torch.long))
    net.checkpointing = checkpointing
    assert u.requires_grad  # holds the graph, and with it what is kept, up to here
    activations = sum(kept.values())
    if checkpointing:  # every block's input and its tangent in float32, and one block run again
        depth, inputs = len(net.blocks), (micro + num_neq) * net.pos_embed.numel() * 4
        activations = activations // depth + depth * inputs
    # In float32: weights, gradients, two moments of Adam, EMA; all but the gradients are saved.
    return weights * 4 * 5, activations, weights * 4 * 4


@torch.no_grad()
def one_step_fid(net, inception, reference, vae, meta, num, rank, world, batch_size=50):
    """FID and Inception score of `num` one-step samples, balanced over classes, by all ranks."""
    batches = [range(i, min(i + batch_size, num)) for i in range(0, num, batch_size)][rank::world]
    statistics = fid.Statistics(inception, num)
    progress = Progress("FID", sum(map(len, batches)), silent=rank > 0)
    for batch in batches:
        labels = [i % max(net.num_classes, 1) for i in batch]
        pixels = to_pixels(draw(net, labels, batch), vae, meta["scale"])
        statistics.add(torch.from_numpy(pixels).expand(-1, 3, -1, -1), batch)
        progress(len(batch))
    ours = statistics.result()
    distance = 0.0
    if rank == 0:
        distance = fid.frechet_distance(*(s[k] for s in (ours, reference) for k in ("mu", "sigma")))
    return {"fid": distance, "inception_score": ours["score"], "fid_samples": num}


def affinity(net, losses, x, e, y, quantile, gaps, generator):
    """Cosine of the gradient of the r = t loss with that of the r < t loss in each range of gaps,
    arXiv 2511.19065v1, Sec. 4.3: (len(gaps),). gaps: `schedules.time_pairs` of each.
    losses: meanflow.loss with its options. Leaves the gradients in .grad alone.

    differs: the paper does not say of which samples and weights. Here one batch serves all the
    gradients, each of whole batches with r = t or with r < t, without alpha and beta.
    """
    trained, n = [p for p in net.parameters() if p.requires_grad], len(x)

    def gradient(num_neq, pairs=None):
        t, r = schedules.sample_t_r(n - num_neq, num_neq, quantile, 1.0, pairs, generator)
        loss, _ = losses(net, x, e, r, t, y, num_neq, 1.0)
        return torch.autograd.grad(loss, trained)

    def dot(a, b):
        return torch.stack([(p * q).sum() for p, q in zip(a, b, strict=True)]).sum()

    of_v = gradient(0)
    cosines = []
    for pairs in gaps:
        of_u = gradient(n, pairs)
        cosines.append(dot(of_u, of_v) / (dot(of_u, of_u) * dot(of_v, of_v)).sqrt())
    return torch.stack(cosines)


def textbook_loss(
    net, x, e, r, t, y, num_neq, weight, bare, null_label, omega, kappa, cfg_interval, tangent, p, c
):  # fmt: skip
    """meanflow.loss by Alg. 1 and Eq. 21 of arXiv 2505.13447v1 as they stand, for --bench alone:
    the JVP, of the whole batch, gives u with its graph, and guidance costs two more forwards."""
    z, v = meanflow.interpolate(x, e, t)
    if omega != 1 or kappa != 0:
        with torch.no_grad():
            u_null = bare(z, t, t, torch.full_like(y, null_label)).to(v.dtype)
            u_label = bare(z, t, t, y).to(v.dtype) if kappa else 0
        inside = (t >= cfg_interval[0]) & (t <= cfg_interval[1]) & (y != null_label)
        v_guided = meanflow.guided_velocity(v, u_label, u_null, omega, kappa)
        v = torch.where(meanflow.expand(inside, v), v_guided, v)
    tangents = v, torch.full_like(r, tangent[0]), torch.full_like(t, tangent[1])
    with sdpa_kernel(SDPBackend.MATH):
        u, dudt = jvp(lambda z, r, t: bare.forward(z, r, t, y), (z, r, t), tangents)
    u_tgt = meanflow.target(v, r, t, dudt.detach())
    squared_error = (u - u_tgt).square().flatten(1).sum(1)  # (B,)
    losses = weight * meanflow.adaptive_weight(squared_error, p, c) * squared_error  # (B,)
    return losses.mean(), squared_error.detach() / x[0].numel()


def bench(args, backward, update, sampler, net, meta, micro, num_neq, device, loader, say):
    """Say what a step costs on this machine: loss and gradients of a micro-batch, Adam, EMA.

    The kinds of step run in turn, so that a slow moment of the machine is every kind's, and the
    median ratio of many rounds is given. On a CPU the time that counts is the process's own, on one
    thread: other processes lengthen it least.
    """
    cuda = device.type == "cuda"
    if not cuda:
        torch.set_num_threads(1)
    x, e = torch.randn(2, micro, *meta["shape"], device=device)
    y = torch.arange(micro, device=device) % max(net.num_classes, 1)
    t, r = (times.to(device) for times in sampler(0, micro))

    def step(loss_of, num_neq, omega=1.0, kappa=0.0):
        r_or_t = torch.cat([t[: micro - num_neq], r[micro - num_neq :]])
        loss, _ = backward(
            x, e, r_or_t, t, y, num_neq, 1.0, loss_of=loss_of, omega=omega, kappa=kappa
        )
        update(loss)

    clock, repeat = (time.perf_counter, 10) if cuda else (time.process_time, 1)
    finish = torch.cuda.synchronize if cuda else lambda: None

    def seconds(function):
        finish()
        begin = clock()
        for _ in range(repeat):  # so that a GPU's queue is never empty, as in training
            function()
        finish()
        return (clock() - begin) / repeat

    steps = {"flow matching": partial(step, meanflow.loss, 0)}
    for name, guidance in [("MeanFlow", ()), ("guided MeanFlow", (args.omega, args.kappa))]:
        if name == "MeanFlow" or (net.num_classes and guidance != (1, 0)):
            steps[name] = partial(step, meanflow.loss, num_neq, *guidance)
            if not args.activation_checkpointing:  # torch cannot, under a JVP with a graph
                steps[f"{name}, textbook"] = partial(step, textbook_loss, num_neq, *guidance)

    # What each step does, and the memory it takes. The counter sees neither a compiled graph nor
    # every backend's attention.
    flops, memory = {}, {}
    for name in list(steps):
        try:
            for _ in range(1 + args.compile):  # the first compiles
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                steps[name]()
            memory[name] = f"{torch.cuda.max_memory_allocated() / 1e9:.3g}" if cuda else "-"
            flops[name], uncompiled = FlopCounterMode(display=False), torch.compiler.set_stance
            with uncompiled("force_eager"), sdpa_kernel(SDPBackend.MATH), flops[name]:
                steps[name]()
        except torch.OutOfMemoryError:
            say(f"{name}: out of memory")
            del steps[name]
    if "flow matching" not in steps:
        fail(f"not even flow matching fits: lower --micro-batch-size, which is {micro}", code=1)

    # How long they take, and a large matrix product beside them, for what the machine can do.
    n = 8192 if cuda else 2048
    product = torch.randn(2, n, n, device=device, dtype=getattr(torch, args.dtype))
    timed = steps | {"product": lambda: torch.mm(*product)}
    times, rounds = {name: [] for name in timed}, 10 if cuda else 7
    progress = Progress("bench", rounds, of="rounds")
    for _ in range(rounds):
        for name, function in timed.items():
            times[name].append(seconds(function))
        progress(1)
    rate = 2 * n**3 / np.median(times.pop("product"))
    how = "" if cuda else ", process time of one thread"
    how += ", compiled but for the textbook's JVP" * args.compile
    how += ", checkpointed, which the textbook's cannot be" * args.activation_checkpointing
    say(
        f"{micro} pictures a step, {args.dtype}{how}, median of {rounds} rounds; "
        f"MFU is of the {rate / 1e12:.3g} TFLOP/s of a product of {n} x {n} matrices\n"
        f"{'':26}{'ratio':>7}{'TFLOP':>10}{'MFU':>6}{'pictures/s':>12}{'peak GB':>9}"
    )
    for name, taken in times.items():
        ratio = np.median(np.divide(taken, times["flow matching"]))
        taken, done = np.median(taken), flops[name].get_total_flops()
        say(
            f"{name:26}{ratio:7.3f}{done / 1e12:10.3g}{done / taken / rate:6.0%}"
            f"{micro / taken:12.4g}{memory[name]:>9}"
        )
    if loader is not None:
        read, begin = 0, None
        for images, _ in loader:
            now = time.perf_counter()
            begin, read = (begin, read + len(images)) if begin else (now, 0)  # workers are up
            if now > begin + 5:
                break
        if read:
            rate = read / (now - begin)
            say(f"the loader alone, {loader.num_workers} workers: {rate:.4g} pictures/s")


# ---------------------------------------------------------------------------- the end of a run


def catch_signals():
    """From now on SIGNALS end nothing, and the list returned receives their numbers. Only a third
    Ctrl-C ends a run that hangs; torchrun repeats the first."""
    caught = []

    def handler(number, _):
        caught.append(number)
        if caught.count(signal.SIGINT) == 2:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    for number in SIGNALS:
        signal.signal(number, handler)
    return caught


def outlive_signals(_):
    """For the loader's workers, whom a scheduler or Ctrl-C signals too: the step in progress needs
    its data."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """At the exit after an error, when Python would send them SIGTERM and wait for ever."""
    if hasattr(signal, "SIGCHLD"):  # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises where a worker is killed
    for worker in multiprocessing.active_children():
        worker.kill()


def largest(number):
    """The largest of all ranks' numbers; a CPU's exchange, for which no GPU is waited."""
    if not dist.is_initialized():
        return number
    number = torch.tensor(number)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def worst_of(errors, t, r):
    """(3,): a sample's largest error, inf where one is not finite, with its t and r."""
    errors = errors.nan_to_num(nan=torch.inf)
    worst = errors.argmax()
    return torch.stack([errors[worst], t[worst], r[worst]])


# ---------------------------------------------------------------------------- command line


def number(kind, accepts, what):
    """An argparse type: an int or a float of which `accepts` is true."""

    def parse(text):
        if not accepts(value := kind(text)):
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    parse.__name__ = kind.__name__
    return parse


def flag_of(name):
    return "--" + name.replace("_", "-")


def parse_args(argv=None):
    """The arguments, with what is not given taken from the recipe of the model named."""
    only_model = ArgumentParser(prog="train.py", add_help=False)
    only_model.add_argument("--model", choices=CONFIGS, default="tiny", help="network and recipe")
    model = only_model.parse_known_args(argv)[0].model

    parser = ArgumentParser(
        prog="train.py",
        usage="train.py [--model NAME] [flags]; --help lists them all",
        description=__doc__.splitlines()[0] + " Defaults are the recipe of the --model given.",
        parents=[only_model],
    )
    finite = number(float, math.isfinite, "a finite number")
    positive = number(float, lambda a: 0 < a < math.inf, "a positive number")
    share = number(float, lambda a: 0 <= a <= 1, "in [0, 1]")
    decay = number(float, lambda a: 0 <= a < 1, "in [0, 1)")
    count = number(int, lambda n: n >= 1, "at least 1")
    natural = number(int, lambda n: n >= 0, "at least 0")
    switch = argparse.BooleanOptionalAction
    bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    conditionings = " or ".join(CONDITIONINGS)

    add = parser.add_argument_group("data and run").add_argument
    add("--data", help="dataset directory, made by prepare_latents.py")
    add("--out", help="directory of the run; runs/MODEL-ACCEL where not given")
    add("--init-from", help="checkpoint of another run whose EMA weights to start from")
    seed = number(int, lambda n: 0 <= n < 2**63, "from 0 to 2^63 - 1")
    add("--seed", type=seed, default=0, help="of the weights, data order, times and noise")
    add("--workers", type=natural, help="processes per rank that read the data")
    add("--log-every", type=count, help="steps between two lines of metrics")
    add("--sample-every", type=count, help="steps between two grids of one-step samples")
    add("--save-every", type=count, help="steps between two checkpoints")
    add("--affinity-every", type=count, help="steps between two measurements of task affinity")
    add("--dry-run", action="store_true", help="print the resolved run and exit")
    add("--bench", action="store_true", help="measure what a step costs, on noise, and exit")
    add("--vae", help="weights of the VAE, to show and measure pictures instead of latents")

    add = parser.add_argument_group("FID during training, of one-step samples").add_argument
    add("--fid-every", type=count, help="steps between two measurements")
    add("--fid-num", type=number(int, lambda n: n >= 2, "at least 2"), default=5000, help="samples")
    add("--fid-ref", help="statistics to compare with, an .npz as of fid.py --save")
    add("--inception", help="weights pt_inception-2015-12-05")

    add = parser.add_argument_group("MeanFlow, arXiv 2505.13447").add_argument
    add("--conditioning", choices=CONDITIONINGS, metavar="VARIABLES", help=conditionings)
    add("--r-neq-t", type=share, help="share of samples with r < t; 0 is flow matching")
    add("--time-sampler", choices=schedules.TIME_SAMPLERS, help="distribution of t and r")
    add("--time-mu", type=finite, help="lognorm: mean of the normal")
    add("--time-sigma", type=positive, help="lognorm: its standard deviation")
    add("--omega", type=finite, help="guidance, Eq. 21; --omega 1 --kappa 0 is none")
    add("--kappa", type=finite, help="guidance, Eq. 21; effective scale omega / (1 - kappa)")
    add("--cfg-interval", type=share, nargs=2, metavar=("LO", "HI"), help="guided where t is in it")
    add("--label-drop", type=share, help="probability of the null label")
    add("--adaptive-p", type=finite, help="power of the adaptive weight, Eq. 22; 0 is plain L2")
    add("--adaptive-c", type=positive, default=1e-3, help="constant of the adaptive weight")
    add("--tangent", type=finite, nargs=2, metavar=("DR", "DT"), help="of r and t in the JVP")

    add = parser.add_argument_group("improved training, arXiv 2511.19065").add_argument
    add("--accel", choices=("none", "minsnr", "dtd"), default="dtd", help="how to form v early")
    add("--progressive", action=switch, help="weight beta on r < t; on unless --accel none")
    add("--beta-k", type=positive, default=1.0, help="its pace: s = 1 - (i / T)^k")
    add("--snr-gamma", type=positive, default=5.0, help="minsnr: clip of the SNR")
    add("--dtd-clusters", type=count, default=20, help="dtd: stages")
    add("--dtd-patience", type=count, default=200, help="dtd: steps without progress in a stage")
    add("--dtd-cap", type=share, default=0.2, help="dtd: share of the run for all stages, at most")
    add("--v-noise", type=share, default=0.0, help="corrupt r = t targets by noise of size k |v|")
    add("--gap", type=share, nargs=2, metavar=("LO", "HI"), help="r < t samples: range of t - r")

    group = parser.add_argument_group("optimisation")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count, help="length of the run, in place of --epochs")
    length.add_argument("--epochs", type=positive, help="length of the run in passes over the data")
    add = group.add_argument
    add("--batch-size", type=count, help="samples per step, over all ranks")
    add("--micro-batch-size", type=count, help="samples at once on a rank; else its whole share")
    add("--lr", type=positive, help="learning rate of Adam, constant")
    add("--warmup", type=natural, help="steps of linear warm-up before")
    add("--adam-beta2", type=decay, help="of Adam; beta1 is 0.9")
    add("--ema-decay", type=decay, help="of the averaged weights, which are the ones sampled")
    add("--dtype", choices=("float32", "bfloat16"), help="of matrix products; TF32 on GPUs")
    add("--compile", action=switch, default=False, help="torch.compile the network")
    text = "keep each block's input alone and run it again for the backward, to save memory"
    add("--activation-checkpointing", action=switch, default=False, help=text)

    parser.set_defaults(**PAPER | RECIPES[model], dtype="bfloat16" if bfloat16 else "float32")
    args = parser.parse_args(argv)
    # The flags that were given: where the namespace has a value, argparse sets no default.
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))
    given = {name for name, a in vars(parser.parse_args(argv, unset)).items() if a is not None}

    args.out = args.out or f"runs/{args.model.replace('/', '-')}-{args.accel}"
    if args.progressive is None:
        args.progressive = args.accel != "none" and args.r_neq_t > 0
    args.cfg_interval, args.tangent = tuple(args.cfg_interval), tuple(args.tangent)
    args.gap = args.gap and tuple(args.gap)
    no_eq, no_neq = args.r_neq_t == 1, args.r_neq_t == 0
    lo, hi = args.cfg_interval
    gap_lo, gap_hi = args.gap or (0, 1)
    unguided = args.omega == 1 and args.kappa == 0
    without_effect = [
        ("beta_k", not args.progressive, "no --progressive"),
        ("snr_gamma", args.accel != "minsnr", f"--accel {args.accel}"),
        ("dtd_clusters dtd_patience dtd_cap", args.accel != "dtd", f"--accel {args.accel}"),
        ("time_mu time_sigma", args.time_sampler == "uniform", "--time-sampler uniform"),
        ("adaptive_c", args.adaptive_p == 0, "--adaptive-p 0"),
        ("cfg_interval", unguided, "--omega 1 --kappa 0"),
        ("tangent", no_neq, "--r-neq-t 0"),
        ("fid_num fid_ref inception", not args.fid_every, "no --fid-every"),
    ]
    for names, idle, why in without_effect:
        if idle and (found := [flag_of(name) for name in names.split() if name in given]):
            parser.error(f"{found[0]} has no effect with {why}")
    # The null label's weight in the target, Eq. 21, is 1 - omega - kappa.
    untrained = args.label_drop == 0 and not unguided and abs(1 - args.omega - args.kappa) > 1e-9
    for wrong, message in [
        (untrained, "--label-drop 0 never trains the null label, which this guidance needs"),
        (args.kappa >= 1, "--kappa must be below 1: the effective scale is omega / (1 - kappa)"),
        (lo >= hi, "--cfg-interval LO HI needs LO below HI; --omega 1 --kappa 0 is no guidance"),
        (args.bench and args.dry_run, "--bench and --dry-run exclude each other"),
        (args.bench and no_neq, "--bench compares steps with r < t; --r-neq-t 0 leaves none"),
        (gap_lo >= gap_hi, "--gap LO HI needs LO below HI"),
        (args.gap and no_neq, "--gap is of samples with r < t; --r-neq-t 0 leaves none"),
        (
            args.gap and args.accel == "dtd",
            "--gap needs --accel none or minsnr: dtd sets the times",
        ),
        (args.accel != "none" and no_eq, "--r-neq-t 1 leaves no r = t samples: use --accel none"),
        (args.v_noise and no_eq, "--v-noise is for samples with r = t; --r-neq-t 1 leaves none"),
        (args.progressive and no_neq, "--progressive is for r < t; --r-neq-t 0 leaves none"),
        (
            args.fid_every and not (args.fid_ref and args.inception),
            "--fid-every needs --fid-ref FILE and --inception FILE",
        ),
    ]:
        if wrong:
            parser.error(message)
    return args


# ---------------------------------------------------------------------------- the run


def main(args):
    # Set-up: one process, or one per GPU under torchrun; gloo carries what lies in a CPU's memory.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    rank, world, device = join_ranks(backend, TIMEOUT)
    refuse = partial(fail, alike=True)

    def say(message, file=sys.stdout):
        if rank == 0:
            with suppress(OSError):  # where the log is on a full disk, or its reader is gone
                print(message, file=file, flush=True)

    # Data, and how a global batch divides into micro-batches.
    try:
        if args.data == GLYPHS and not (args.dry_run or args.bench):
            if rank == 0 and not Path(GLYPHS, "meta.json").exists():
                write_glyphs(GLYPHS)
            wait_for_all()
        data = Dataset(args.data)
        meta, count, epoch = data.meta, len(data), data.epoch_length
    except InputError as error:
        if args.data not in ASSUMED or not (args.dry_run or args.bench):
            refuse(f"--data: {error}")
        count, shape, classes = ASSUMED[args.data]
        meta = dict(shape=shape, classes=range(classes), vae=args.data == IMAGENET)
        data, epoch = None, count
        say(f"note: there is no {args.data} yet; taken to be {count:,} pictures {shape}")
    if args.bench and world > 1:
        refuse("--bench measures one device: start it without torchrun")
    micro = args.micro_batch_size or args.batch_size // world
    if not micro or args.batch_size % (micro * world):
        parts = f"{world} ranks x --micro-batch-size {micro}"
        refuse(f"--batch-size {args.batch_size} is no multiple of {parts}")
    chunks = range(rank, args.batch_size // micro, world)  # this rank's micro-batches of a step
    num_neq = round(micro * args.r_neq_t)  # samples with r < t in a micro-batch, its last
    num_eq = micro - num_neq
    if (num_neq == 0) != (args.r_neq_t == 0) or (num_eq == 0) != (args.r_neq_t == 1):
        refuse(f"--r-neq-t {args.r_neq_t} of {micro} samples is none or all: raise --batch-size")
    steps = args.steps or math.ceil(args.epochs * epoch / args.batch_size)

    # The run's last checkpoint, which must be one of this very command.
    out, start, saved = Path(args.out), 0, None
    last = out / "last.pt"
    if is_in_file(out):
        refuse(f"--out {out} is not a directory, or lies in a file")
    if rank == 0 and not (args.bench or args.dry_run):
        try:
            (out / "samples").mkdir(parents=True, exist_ok=True)
            lock(out)
            (out / "last.pt.tmp").unlink(missing_ok=True)  # of a run that was killed as it saved
        except (InputError, OSError) as error:
            refuse(f"--out {out} cannot be used: {error}")
    wait_for_all()
    if last.exists() and not args.bench:
        try:
            saved = read_checkpoint(last)
        except InputError as error:
            refuse(f"{error}; remove it or name another --out")
        was = saved["meta"]
        if other := [key for key in was | meta if was.get(key) != meta.get(key)]:
            other = ", ".join(other)
            refuse(f"{out}: its --data had another {other}; name another --out")
        changed = [
            f"{flag_of(name)} was {was}, not {getattr(args, name)}"
            for name, was in saved["args"].items()
            if name not in MAY_CHANGE and getattr(args, name, was) != was
        ]
        if changed:
            free = " ".join(map(flag_of, sorted(MAY_CHANGE)))
            refuse(f"{out}: its {', its '.join(changed)}; name another --out (free are {free})")
        start = saved["step"]
        if start > steps:
            refuse(f"{out} is at step {start} already, beyond --steps {steps}")

    # Schedules: the constants behind beta and alpha, and the curriculum.
    sampler = schedules.TIME_SAMPLERS[args.time_sampler]
    quantile = partial(sampler, mu=args.time_mu, sigma=args.time_sigma)
    pairs = schedules.time_pairs(quantile, args.gap or (0.0, 1.0))
    if not pairs.numel():
        refuse(f"--gap {args.gap}: the time sampler gives no such gaps; widen it")
    lam = schedules.beta_lambda(pairs)
    alpha_mean = schedules.minsnr_mean(quantile, args.snr_gamma)
    gap_pairs = pairs.float().to(device) if args.gap else None
    pacer = schedules.DTD(args.dtd_clusters, args.dtd_patience, args.dtd_cap * steps).to(device)

    # The network, and what a FID needs.
    torch.manual_seed(args.seed)
    vae, inception, reference = None, None, None
    try:
        with FakeTensorMode() if args.dry_run else nullcontext():
            net = build_network(args.model, meta, args.conditioning)
            net.checkpointing = args.activation_checkpointing
            plan = memory_plan(net, micro, num_neq, args.dtype) if args.dry_run else None
        if args.init_from and not saved:
            other, was = load_checkpoint(args.init_from)
            for name in ("model", "conditioning"):
                if was["args"][name] != getattr(args, name):
                    raise ValueError(f"--init-from: its --{name} is {was['args'][name]}")
            if not args.dry_run:
                net.load_state_dict(other.state_dict())
        if args.vae:
            vae = load_vae(args.vae).to(device)
            if (meta.get("vae") or True) not in (True, vae.fingerprint()):
                say(f"note: {args.vae} is not the VAE that made the latents of {args.data}")
        if bool(vae) != bool(meta.get("vae")) and (vae or args.fid_every):
            holds, verb = ("latents", "name") if meta.get("vae") else ("pixels", "leave out")
            raise ValueError(f"--data {args.data} holds {holds}: {verb} --vae")
        if args.fid_every:
            inception = fid.load_inception(args.inception).to(device)
            reference = fid.load_statistics(Path(args.fid_ref))
            if reference is None:
                raise ValueError(f"--fid-ref {args.fid_ref} holds no mu and sigma")
    except (ValueError, RuntimeError, OSError) as error:
        refuse(" ".join(str(error).split()))
    trained = [p for p in net.parameters() if p.requires_grad]
    say(
        f"{args.model}: {sum(p.numel() for p in trained) / 1e6:.1f} M parameters, {count:,} "
        f"pictures {tuple(meta['shape'])} of {len(meta['classes'])} classes\n"
        f"{out}: {steps:,} steps of {args.batch_size} = {steps * args.batch_size / epoch:.1f} "
        f"epochs from step {start:,}; {world} x {device.type}, {args.dtype}; on each "
        f"{len(chunks)} x {micro} samples a step, {num_neq} of {micro} with r < t"
    )
    if start == steps:
        say(f"{last} is complete already")
    if (kept := args.ema_decay**steps) > 0.05:
        say(f"note: {kept:.0%} of the EMA will still be the initial weights; lower --ema-decay")
    if args.dry_run:
        stays, activations, disk = (size / 1e9 for size in plan)
        say(
            f"memory of a rank, estimated: {stays:.3g} GB for weights, gradients, Adam and EMA, "
            f"and {activations:.3g} GB for activations of {micro} samples, not compiled\n"
            f"disk: {disk:.3g} GB for {last}, twice that while the next is written"
        )
        say(json.dumps(vars(args), indent=1))
        return

    # Its running average, and the optimiser; all of them as the last checkpoint left them.
    net.to(device)
    ema = copy.deepcopy(net).requires_grad_(False)
    update_ema = get_ema_multi_avg_fn(args.ema_decay)
    optimizer = torch.optim.Adam(trained, args.lr, (0.9, args.adam_beta2), fused=True)
    parts = {"net": net, "ema": ema, "optimizer": optimizer, "pacer": pacer}
    if saved:
        try:
            restore(parts, saved)
        except Exception as error:
            refuse(f"{last} does not fit ({type(error).__name__}); remove it or name another --out")
        if (was := saved.get("micro", micro)) != micro:
            say(f"note: micro-batches of {micro}, not {was} as before: other noise from here on")
        del saved
    if rank == 0 and not args.bench:
        forget_after(out, start)

    # The forward that has a graph goes through DDP, and guidance to the network itself.
    bare = net
    if args.compile:
        bare.compile(dynamic=False)
    if world > 1:
        net = DistributedDataParallel(bare, gradient_as_bucket_view=True)
    loader = data and torch.utils.data.DataLoader(
        data,
        batch_sampler=(
            chunk_indices(step, chunk, micro, args.batch_size, count, args.seed)
            for step in range(start, steps)
            for chunk in chunks
        ),
        num_workers=min(args.workers, os.cpu_count() or 1),
        worker_init_fn=outlive_signals,
        collate_fn=tuple,  # the dataset gives whole batches
        pin_memory=device.type == "cuda",
    )
    omega, kappa = (args.omega, args.kappa) if bare.num_classes else (1.0, 0.0)
    if (omega, kappa) != (args.omega, args.kappa):
        say(f"note: {args.data} has no classes, so training is without guidance")
    options = dict(
        bare=bare, null_label=bare.null_label, omega=omega, kappa=kappa,
        cfg_interval=args.cfg_interval, tangent=args.tangent, p=args.adaptive_p, c=args.adaptive_c,
    )  # fmt: skip
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")

    def backward(*batch, loss_of=meanflow.loss, **others):
        """Adds a micro-batch's share to the gradients; its loss and errors as of meanflow.loss."""
        with autocast:
            loss, errors = loss_of(net, *batch, **options | others)
        (loss / len(chunks)).backward()
        return loss.detach(), errors

    def update(loss):
        """A step of Adam and of the running average; the norm of the gradient. Where that or the
        loss is not finite, the weights stay as they are."""
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        optimizer.found_inf = 1.0 - (grad_norm + loss).isfinite().float()  # Adam's own switch
        optimizer.step()
        optimizer.zero_grad()
        update_ema(list(ema.parameters()), list(bare.parameters()), None)
        return grad_norm

    if args.bench:
        sampler = partial(schedules.sample_t_r, quantile=quantile)
        bench(args, backward, update, sampler, bare, meta, micro, num_neq, device, loader, say)
        return

    def attempt(what, function, *args):
        """Whether rank 0 could write a file. A full or lost disk does not end a run: it is said,
        and the checkpoint is tried again with every line of the log."""
        try:
            if rank == 0:
                function(*args)
        except OSError as error:
            say(f"warning: the run goes on without {what}: {error}", file=sys.stderr)
            return False
        return True

    batches = iter(loader)
    multiprocessing.util.Finalize(None, end_workers, exitpriority=0)
    # The pictures of samples/: rows of up to ten classes, always from the same noise.
    classes = np.unique(np.linspace(0, max(bare.num_classes - 1, 0), 10).astype(int)).tolist()
    history, affinities, clock = [], [], time.time()
    saved_at, unsaved = start, False  # the step that last.pt is of; whether a later one is not
    caught = catch_signals()
    edges = torch.tensor([*(lo for lo, _ in GAPS), GAPS[-1][1]], device=device)
    gap_ranges = [schedules.time_pairs(quantile, gap).float().to(device) for gap in GAPS]

    for step in range(start, steps + 1):
        notice = largest(max(caught, default=0))  # all ranks stop after the same step
        ended = notice > 0 or step == steps
        s = schedules.training_progress(step, steps, args.beta_k)

        # The first step has a line of its own, so that a slow run shows at once how slow it is.
        told = ended or step == start + 1 or step % (args.fid_every or steps) == 0
        if history and (told or step % args.log_every == 0 or step % args.save_every == 0):
            rows = torch.stack(history).cpu()  # a GPU is waited for here, not in every step
            rows, worst = rows[:, :-3], rows[:, -3:]
            bad = (~rows.isfinite().all(1)).nonzero()
            if len(bad):
                found = [worst[bad[0].item()].tolist()] * world
                if world > 1:
                    dist.all_gather_object(found, found[rank])
                error, t, r = max(found)
                fault = step - len(rows) + bad[0].item()
                lr = args.lr * min(1, (fault + 1) / max(args.warmup, 1))
                kept = f"{last} is of step {saved_at:,}" if saved_at else "nothing was saved yet"
                refuse(
                    f"loss or gradient not finite at step {fault:,}, which was not applied; "
                    f"learning rate {lr:g}, worst sample at t {t:.5g}, r {r:.5g} "
                    f"with error {error:.4g}; {kept}; try a lower --lr in another --out",
                    code=1,
                )
            means, (sums, counts) = rows[:, :4].mean(0), rows[:, 4:].sum(0).view(2, len(GAPS))
            row = zip(STATS, means.tolist(), (1, num_eq, num_neq, 1), strict=True)
            row = {name: value for name, value, samples in row if samples}
            row["lr"] = optimizer.param_groups[0]["lr"]
            if args.progressive:
                row["s"] = s
            if args.accel == "dtd":
                row["stage"] = int(pacer.stage)
            rate = row["images_per_second"] = len(rows) * args.batch_size / (time.time() - clock)
            left = timedelta(seconds=int((steps - step) * args.batch_size / rate))
            shown = "  ".join(f"{name} {value:.4g}" for name, value in row.items())
            say(f"step {step:,}/{steps:,}  {shown}  {left} left")
            by_gap = {"u_error": (sums / counts).tolist()}
            if affinities:
                by_gap["affinity"] = torch.stack(affinities).mean(0).tolist()
            for name, values in by_gap.items():
                named = zip(GAPS, values, strict=True)
                row |= {f"{name}_{lo}-{hi}": a for (lo, hi), a in named if math.isfinite(a)}
            attempt("the metrics", append_row, out / "metrics.jsonl", {"step": step} | row)
            history.clear()
            affinities.clear()
        saves = ended or step % args.save_every == 0 or (unsaved and step % args.log_every == 0)
        if step > start and saves:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step, "args": vars(args), "meta": meta, "micro": micro}
            state["torch"] = str(torch.__version__)
            unsaved = not attempt("the checkpoint", replace_file, last, partial(torch.save, state))
            if not unsaved:
                saved_at = step
                say(f"step {step:,}/{steps:,}  saved {last}")
        if notice:
            break
        if rank == 0 and (ended or step % args.sample_every == 0):
            pixels = to_pixels(draw(ema, classes * GRID_ROWS), vae, meta["scale"])
            grid = out / "samples" / f"{step:08d}.png"
            attempt("the samples", save_grid, pixels, grid, len(classes))
        if args.fid_every and step > start and (ended or step % args.fid_every == 0):
            score = one_step_fid(ema, inception, reference, vae, meta, args.fid_num, rank, world)
            say(f"step {step:,}/{steps:,}  " + "  ".join(f"{k} {v:.5g}" for k, v in score.items()))
            attempt("the metrics", append_row, out / "metrics.jsonl", {"step": step} | score)
        if ended:
            break
        if not history:
            clock = time.time()

        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / max(args.warmup, 1))
        stats = torch.zeros(3 + 2 * len(GAPS), device=device)
        worst = torch.full((3,), -torch.inf, device=device)
        for chunk in chunks:
            generator = keyed_generator(args.seed, step, chunk, device=device)
            images, y = (tensor.to(device, non_blocking=True) for tensor in next(batches))
            x = network_input(images, meta, generator)  # (B, C, H, W)
            e = torch.randn(x.shape, generator=generator, device=device)  # (B, C, H, W)
            y = meanflow.drop_labels(y, bare.null_label, args.label_drop, generator)  # (B,)
            mass = pacer.mass if args.accel == "dtd" else 1.0
            t, r = schedules.sample_t_r(num_eq, num_neq, quantile, mass, gap_pairs, generator)
            alpha, beta = torch.ones_like(t[:num_eq]), torch.ones_like(t[num_eq:])
            if args.accel == "minsnr":
                alpha = schedules.minsnr(t[:num_eq], args.snr_gamma) / alpha_mean
            if args.progressive:
                beta = schedules.beta((t - r)[num_eq:], s, lam)
            weight = torch.cat([alpha, beta])  # (B,)
            noise = meanflow.corruption(e - x, args.v_noise, generator) if args.v_noise else None

            # DDP averages gradients over the ranks in the last backward of a step alone.
            waiting = world > 1 and chunk != chunks[-1]
            with net.no_sync() if waiting else nullcontext():
                loss, errors = backward(x, e, r, t, y, num_neq, weight, v_noise=noise)
            v_error = errors[:num_eq].sum() / max(num_eq, 1)
            u_error = errors[num_eq:].sum() / max(num_neq, 1)
            stats[:3] += torch.stack([loss, v_error, u_error]) / len(chunks)
            candidate = worst_of(errors, t, r)
            worst = torch.where(candidate[0] > worst[0], candidate, worst)
            gaps = (t - r)[num_eq:]
            inside = ((edges[:-1, None] <= gaps) & (gaps < edges[1:, None])).float()  # (4, num_neq)
            stats[3:] += torch.cat([inside @ errors[num_eq:], inside.sum(1)])

            if args.affinity_every and step % args.affinity_every == 0 and chunk == chunks[0]:
                with autocast:  # the chunk's own noise is drawn by now
                    losses = partial(meanflow.loss, **options)
                    found = affinity(bare, losses, x, e, y, quantile, gap_ranges, generator)
                if world > 1:
                    dist.all_reduce(found)
                affinities.append(found / world)

        if world > 1:
            dist.all_reduce(stats)
            stats /= world
        grad_norm = update(stats[0])
        if args.accel == "dtd":
            pacer.update(stats[1], step)
        history.append(torch.cat([stats[:3], grad_norm[None], stats[3:], worst]))

    del batches  # and with it the workers
    if largest(int(unsaved)):
        refuse(f"step {step:,} could not be saved; {last} is of step {saved_at:,}", code=1)
    if notice:
        leave_ranks()
        name = signal.Signals(notice).name
        say(f"{name}: stopped after step {step:,}; the same command goes on")
        sys.exit(128 + notice)
    if rank == 0:
        attempt("the picture", save_progress, out / "samples", out / "progress.png")
        say(f"done: {last}, {out / 'progress.png'}; draw more with sample.py")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
