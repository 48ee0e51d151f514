"""Train a MeanFlow model (arXiv 2505.13447v1) by the improved scheme of arXiv 2511.19065v2.

    python train.py                        the tiny model on the built-in digits: minutes on a CPU
    python train.py --model S/4 --data data/cifar10 --accel minsnr
    torchrun --nproc_per_node=8 train.py --model XL/2 --accel dtd
    python train.py --model B/4 --batch-size 16 --bench         what a step costs on this machine

Flags that are not given come from the paper's recipe for the model. The same command again resumes.
A run's directory holds last.pt, metrics.jsonl, samples/ and, at the end, progress.png. After
SIGTERM, SIGUSR1, Ctrl-C or a lost terminal a run finishes its step, saves, and exits with 128 + the
signal's number.
"""

import argparse
import copy
import json
import math
import os
import re
import signal
import sys
import time
import timeit
from concurrent.futures import wait
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fid
import meanflow
import schedules
from model import (
    CHECKPOINT_FORMAT, CONDITIONINGS, CONFIGS, UNETS, build, fail, load, read_checkpoint,
)  # fmt: skip
from prepare_latents import (
    Dataset, Progress, augment, join_ranks, leave_ranks, load_vae, lock, made_here, network_input,
    read_ahead, replace_file, run_script, save_grid, save_png, to_pixels, wait_for_all,
    write_glyphs,
)  # fmt: skip
from sample import draw, keyed_generator

# ---------------------------------------------------------------------------- recipes

# The default datasets, and what --dry-run and --bench assume where they do not exist.
GLYPHS, CIFAR, IMAGENET = "data/glyphs", "data/cifar10", "data/imagenet"
ASSUMED = {
    GLYPHS: dict(count=20_000, shape=(1, 16, 16), classes=range(10), vae=False),
    CIFAR: dict(count=50_000, shape=(3, 32, 32), classes=[], vae=False),
    IMAGENET: dict(count=1_281_167, shape=(4, 32, 32), classes=range(1000), vae=True),
}

# arXiv 2505.13447v1, Tab. 4: shared defaults, then each model's own. The number of workers, and how
# often a run logs, draws and saves, is ours.
PAPER = dict(
    epochs=240, batch_size=256, lr=1e-4, warmup=0, adam_beta2=0.95, ema_decay=0.9999,
    label_drop=0.1, omega=1.0, kappa=0.5, cfg_interval=(0.0, 1.0), r_neq_t=0.25,
    time_sampler="lognorm", time_mu=-0.4, time_sigma=1.0, conditioning="t,t-r", adaptive_p=1.0,
    tangent=(0.0, 1.0), jvp_velocity="target", augment=False, data=IMAGENET, workers=4,
    log_every=100, sample_every=5000, save_every=5000,
)  # fmt: skip
RECIPES = {name: {} for name in CONFIGS} | {
    "L/2":   dict(omega=0.2, kappa=0.92, cfg_interval=(0.0, 0.8)),
    "XL/2":  dict(omega=0.2, kappa=0.92, cfg_interval=(0.0, 0.75)),
    "XL/2+": dict(epochs=1000, cfg_interval=(0.3, 0.8)),
    # arXiv 2505.13447v1, App. A: unconditional CIFAR-10 in pixels, 800,000 steps. differs: r = t
    # for a fixed quarter of a micro-batch; in the authors' code, each sample's chance is 1/4.
    "unet":  dict(epochs=16384, batch_size=1024, lr=6e-4, warmup=10_000, adam_beta2=0.999,
                  ema_decay=0.99995, time_mu=-2.0, time_sigma=2.0, r_neq_t=0.75, adaptive_p=0.75,
                  kappa=0.0, augment=True, dtype="float32", data=CIFAR),
    # differs: ours, for the built-in digits; short, so with a fast learning rate and a short EMA.
    "tiny":  dict(epochs=5, batch_size=64, lr=4e-3, warmup=100, ema_decay=0.996, data=GLYPHS,
                  workers=1, log_every=100, sample_every=200, save_every=500),
}  # fmt: skip

# Ranges of the gap t - r in which u's errors are given: arXiv 2511.19065v2, Sec. 4.2.
EDGES = (0.1, 0.3, 0.5, 0.7, 0.9)
GAPS = [f"{lo}-{hi}" for lo, hi in pairwise(EDGES)]

# Flags that may differ when a run is resumed. Another length is allowed, although beta and DTD go
# by the share of the run. The data is compared by its meta.json.
MAY_CHANGE = {"steps", "epochs", "compile", "workers", "log_every", "sample_every", "save_every"}
MAY_CHANGE |= {"data", "out", "dry_run", "bench", "init_from", "vae", "tensorboard", "inception"}
MAY_CHANGE |= {"fid_ref", "fid_every", "fid_num", "activation_checkpointing", "micro_batch_size"}

GRID_ROWS = 10  # of the pictures in samples/
TIMEOUT = timedelta(minutes=30)  # after which a rank no longer waits for another that hangs

# ---------------------------------------------------------------------------- flags


def number(kind, accepts, what):
    """An argparse type: an int or a float for which `accepts` is true."""

    def parse(text):
        if not accepts(value := kind(text)):
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    parse.__name__ = kind.__name__
    return parse


def parse_args(argv=None):
    """The arguments; those not given come from the recipe of the --model given."""
    only_model = argparse.ArgumentParser(prog="train.py", add_help=False, allow_abbrev=False)
    only_model.add_argument("--model", choices=RECIPES, default="tiny", help="network and recipe")
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__.splitlines()[0], parents=[only_model],
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    finite = number(float, math.isfinite, "a finite number")
    positive = number(float, lambda a: 0 < a < math.inf, "a positive number")
    share = number(float, lambda a: 0 <= a <= 1, "in [0, 1]")
    decay = number(float, lambda a: 0 <= a < 1, "in [0, 1)")
    count = number(int, lambda n: n >= 1, "at least 1")
    natural = number(int, lambda n: n >= 0, "at least 0")
    switch = argparse.BooleanOptionalAction

    add = parser.add_argument_group("data and run").add_argument
    add("--data", help="dataset directory, made by prepare_latents.py")
    add("--out", help="directory of the run, else runs/MODEL-ACCEL")
    add("--init-from", help="weights to start from: another run's, exported or public ones")
    add("--seed", type=natural, default=0, help="of the weights, data order, times and noise")
    add("--workers", type=count, help="threads per rank that read the data")
    add("--log-every", type=count, help="steps between two lines of metrics")
    add("--sample-every", type=count, help="steps between two grids of one-step samples")
    add("--save-every", type=count, help="steps between two checkpoints")
    add("--dry-run", action="store_true", help="print the resolved run and exit")
    add("--bench", action="store_true", help="measure what a step costs, on noise, and exit")
    add("--vae", help="weights of the VAE, to show and measure pictures instead of latents")
    add("--tensorboard", action="store_true", help="show what follows in OUT/tensorboard, too")

    add = parser.add_argument_group("FID of one-step samples during training").add_argument
    add("--fid-every", type=count, help="steps between two measurements")
    add("--fid-num", type=number(int, lambda n: n >= 2, "at least 2"), default=5000, help="samples")
    add("--fid-ref", help="statistics: .npz of fid.py --save, which gives a KID, too, or of ADM")
    add("--inception", help="weights pt_inception-2015-12-05")

    add = parser.add_argument_group("MeanFlow, arXiv 2505.13447").add_argument
    add("--conditioning", choices=CONDITIONINGS, help="time variables that the network sees")
    add("--r-neq-t", type=share, help="share of samples with r < t; 0 is flow matching")
    add("--time-sampler", choices=schedules.TIME_SAMPLERS, help="distribution of t and r")
    add("--time-mu", type=finite, help="lognorm: mean of the normal")
    add("--time-sigma", type=positive, help="lognorm: its standard deviation")
    add("--omega", type=finite, help="guidance, Eq. 21; --omega 1 --kappa 0 is none")
    add("--kappa", type=finite, help="guidance, Eq. 21; effective scale omega / (1 - kappa)")
    add("--omega-range", type=finite, nargs=2, metavar=("LO", "HI"), help="of each sample's omega")
    add("--cfg-interval", type=share, nargs=2, metavar=("LO", "HI"), help="guided where t is in it")
    add("--augment", action=switch, help="random mirroring, scale, stretch, shift; unet only")
    add("--label-drop", type=share, help="probability of the null label")
    add("--adaptive-p", type=finite, help="power of the adaptive weight, Eq. 22; 0 is plain L2")
    add("--adaptive-c", type=positive, default=1e-3, help="constant of the adaptive weight")
    add("--tangent", type=finite, nargs=2, metavar=("DR", "DT"), help="of r and t in the JVP")
    add("--jvp-velocity", choices=("target", "network"), help="whose velocity z follows in the JVP")

    add = parser.add_argument_group("improved training, arXiv 2511.19065").add_argument
    add("--accel", choices=("none", *schedules.ALPHAS, "dtd"), default="dtd", help="how to learn v")
    add("--progressive", action=switch, help="weight beta on r < t; on unless --accel none")
    add("--beta-k", type=positive, default=1.0, help="exponent k of beta's s = 1 - (i / T)^k")
    add("--snr-gamma", type=positive, default=5.0, help="minsnr: clip of the SNR")
    add("--dtd-clusters", type=count, default=20, help="dtd: stages")
    add("--dtd-patience", type=count, default=200, help="dtd: steps in a stage without progress")
    add("--dtd-cap", type=share, default=0.2, help="dtd: share of the run after which it ends")
    add("--v-noise", type=share, default=0.0, help="corrupt r = t targets by noise of size k |v|")
    add("--gap", type=share, nargs=2, metavar=("LO", "HI"), help="r < t samples: range of t - r")

    group = parser.add_argument_group("optimisation")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count, help="length of the run, in place of --epochs")
    length.add_argument("--epochs", type=positive, help="length of the run in passes over the data")
    add = group.add_argument
    add("--batch-size", type=count, help="samples per step, over all ranks")
    add("--micro-batch-size", type=count, help="samples at once on a rank, else its whole share")
    add("--lr", type=positive, help="learning rate of Adam, constant")
    add("--warmup", type=natural, help="steps of linear warm-up before")
    add("--grad-clip", type=positive, help="scale the gradient down to this norm, else never")
    add("--adam-beta2", type=decay, help="of Adam; beta1 is 0.9")
    add("--ema-decay", type=decay, help="of the averaged weights, which are the ones sampled")
    add("--dtype", choices=("float32", "bfloat16"), help="of matrix products; TF32 on GPUs")
    add("--compile", action=switch, default=False, help="torch.compile the network")
    add("--activation-checkpointing", action=switch, default=False, help="less memory, more time")

    # differs: the authors' code trains in float32.
    bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # before Python 3.14 -1e-1 was a flag
    recipe = PAPER | RECIPES[only_model.parse_known_args(argv)[0].model]
    parser.set_defaults(**dict(dtype="bfloat16" if bfloat16 else "float32") | recipe)
    args = parser.parse_args(argv)

    args.out = args.out or f"runs/{args.model.replace('/', '-')}-{args.accel}"
    if args.progressive is None:
        args.progressive = args.accel != "none" and args.r_neq_t > 0
    args.cfg_interval, args.tangent = tuple(args.cfg_interval), tuple(args.tangent)
    args.gap, args.omega_range = (pair and tuple(pair) for pair in (args.gap, args.omega_range))
    guided, unet = (args.omega, args.kappa) != (1, 0), args.model in UNETS
    omegas, (lo, hi) = args.omega_range or (args.omega,), args.cfg_interval
    null_weight = max(abs(1 - omega - args.kappa) for omega in omegas)  # in the target, Eq. 21
    for wrong, message in [
        (guided and args.label_drop == 0 and null_weight > 1e-9,
         "--label-drop 0 never trains the null label, which this guidance needs"),
        (args.kappa >= 1, "--kappa must be below 1: the effective scale is omega / (1 - kappa)"),
        ((len(omegas) == 2) != ("omega" in args.conditioning),
         "--omega-range LO HI and --conditioning t,t-r,omega need each other"),
        (len(omegas) == 2 and (unet or not guided), "--omega-range needs a DiT and guidance"),
        (not omegas[0] <= args.omega <= omegas[-1], f"--omega-range lacks --omega {args.omega}"),
        (lo >= hi, "--cfg-interval LO HI needs LO < HI; --omega 1 --kappa 0 is no guidance"),
        (args.augment and not unet, "--augment is for --model unet alone"),
        (args.augment and guided, "guidance excludes --augment: pass --no-augment"),
        (args.gap and args.gap[0] >= args.gap[1], "--gap LO HI needs LO < HI"),
        (args.gap and args.accel == "dtd", "--gap excludes --accel dtd: both set the times"),
        (args.accel != "none" and args.r_neq_t == 1, "--r-neq-t 1 has no r = t: use --accel none"),
        (args.tensorboard and not find_spec("tensorboard"),
         "--tensorboard needs a package: pip install tensorboard"),
        (args.fid_every and not (args.fid_ref and args.inception),
         "--fid-every needs --fid-ref FILE and --inception FILE"),
    ]:  # fmt: skip
        if wrong:
            parser.error(message)
    # Refuse flags that would have no effect and so silently spoil an experiment.
    for names, works, why in [
        ("snr_gamma", args.accel in schedules.ALPHAS, "--accel minsnr"),
        ("dtd_clusters dtd_patience dtd_cap", args.accel == "dtd", "--accel dtd"),
        ("beta_k", args.progressive, "--progressive"),
        ("time_mu time_sigma", args.time_sampler != "uniform", "--time-sampler lognorm"),
        ("progressive gap tangent jvp_velocity bench", args.r_neq_t > 0, "--r-neq-t above 0"),
        ("v_noise", args.r_neq_t < 1, "--r-neq-t below 1"),
    ]:
        for name in names.split():
            value = getattr(args, name)
            if not works and value is not False and value != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} has no effect without {why}")
    return args


# ---------------------------------------------------------------------------- the run


def main(args):
    # One process, or one per GPU under torchrun; gloo carries what lies in a CPU's memory.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    rank, world, device = join_ranks(backend, TIMEOUT)
    caught = []  # signals: the run then saves and ends
    say = partial(tell, caught) if rank == 0 else lambda _: None
    trains = not (args.dry_run or args.bench)

    # The data, how a batch divides, and where the run stands.
    data, meta, count, epoch = open_data(args, rank, trains)
    split = Split(args, rank, world)
    steps = args.steps or math.ceil(args.epochs * epoch / args.batch_size)
    out, last = Path(args.out), Path(args.out, "last.pt")
    if rank == 0 and trains:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        lock(out)
    saved = None if args.bench else read_last(last, args, data and meta, steps)
    start = saved["step"] if saved else 0

    # What is trained: the network, its running average, the optimiser; and the schedule.
    torch.manual_seed(args.seed % 2**64)
    schedule = build_schedule(args, steps)
    net = build_network(args, meta, saved, say)
    trained = [p for p in net.parameters() if p.requires_grad]
    say(
        f"{args.model}: {sum(p.numel() for p in trained) / 1e6:.1f} M parameters, {count:,} "
        f"pictures {tuple(meta['shape'])} of {len(meta['classes'])} classes"
        f"{'' if data else f', assumed as there is no {args.data} yet'}\n"
        f"{out}: {steps:,} steps of {args.batch_size} = {steps * args.batch_size / epoch:.1f} "
        f"epochs from step {start:,}; {world} x {device.type}, {args.dtype}; on each "
        f"{len(split.chunks)} x {split.micro} samples a step, {split.num_neq} of {split.micro} "
        "with r < t"
    )
    if (kept := args.ema_decay**steps) > 0.05:
        say(f"note: {kept:.0%} of the EMA will still be the initial weights; lower --ema-decay")
    if args.dry_run:
        say(json.dumps(vars(args), indent=1))
        return
    net.to(device), schedule.to(device)
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    update_ema = get_ema_multi_avg_fn(args.ema_decay)
    optimizer = torch.optim.Adam(trained, args.lr, (0.9, args.adam_beta2), fused=True)
    stateful = {"net": net, "ema": ema, "optimizer": optimizer, "dtd": schedule.dtd}
    if saved:
        for name, part in stateful.items():
            part.load_state_dict(copy.deepcopy(saved[name]))  # or Adam's keeps the file open
        if saved["micro"] != split.micro:
            say(f"note: micro-batches of {split.micro}, not {saved['micro']}: other noise from now")
        del saved

    objective = build_objective(args, net)
    model = distributed(net, meta["shape"]) if world > 1 else net
    faster_blocks(net, args.compile, args.activation_checkpointing)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    batches = load_batches(args, data, split, start, steps, device)

    def micro_batch(step, chunk, stored, y):
        """What meanflow.loss takes after the network; all random numbers are of (step, chunk)."""
        generator = keyed_generator(args.seed, step, chunk, device=device)
        torch.manual_seed(keyed_generator(args.seed, step, chunk, 1).initial_seed())  # dropout
        stored, y = (tensor.to(device, non_blocking=True) for tensor in (stored, y))
        x = network_input(stored, meta, generator)  # (B, C, H, W)
        x, told = augment(x, generator) if args.augment else (x, None)  # (B, C, H, W), (B, 6)
        e = torch.randn(x.shape, generator=generator, device=device)  # (B, C, H, W)
        y = meanflow.drop_labels(y, net.null_label, args.label_drop, generator)  # (B,)
        if args.omega_range:
            lo, hi = args.omega_range
            told = lo + (hi - lo) * torch.rand(len(y), 1, generator=generator, device=device)
        if told is not None:  # beside the label
            y = torch.cat([y[:, None].float(), told], dim=1)  # (B, 7) or (B, 2)
        t, r, weight = schedule.sample(split.num_eq, split.num_neq, step, generator)  # (B,) each
        v_noise = meanflow.corruption(e - x, args.v_noise, generator) if args.v_noise else None
        return x, e, r, t, y, split.num_neq, weight, objective, v_noise

    def learning_rate(step):
        return args.lr * min(1, (step + 1) / max(args.warmup, 1))

    def update(step):
        """A step of Adam and of the running average; returns the norm of the gradient."""
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        gradients = [p.grad for p in trained if p.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(gradients)
        if args.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(trained, args.grad_clip, grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=world == 1)  # DDP's gradients stay views of its buckets
        update_ema(list(ema.parameters()), list(net.parameters()), None)
        return grad_norm

    if args.bench:
        bench(args, net, objective, schedule, split, update, autocast, meta, batches, say)
        return
    report = Report(args, meta, ema, split, start, steps, say)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN):  # as by nohup
            signal.signal(number, lambda signum, _: caught.append(signum))

    for step in range(start, steps + 1):
        reading, notice, stalls = next(batches, None), 0, True
        while stalls and not notice:  # all ranks stop after the same step
            stalls = reading is not None and not wait([reading], 1).done
            notice, stalls = largest_of_ranks(max(caught, default=0), stalls)
        ended = notice > 0 or step == steps
        saves = step > start and (ended or step % args.save_every == 0)
        report.metrics(step, saves, learning_rate, schedule)  # or ends a run that diverges
        if saves:
            state = {name: part.state_dict() for name, part in stateful.items()}
            state |= dict(step=step, args=vars(args), meta=meta, micro=split.micro)
            state |= dict(format=CHECKPOINT_FORMAT, torch=str(torch.__version__))
            if rank == 0:
                replace_file(last, partial(torch.save, state))
            say(f"step {step:,}/{steps:,}  saved {last}")
        if notice:
            break
        report.pictures(step, ended)
        if ended:
            break

        for chunk, rows in zip(split.chunks, reading.result(), strict=True):
            batch = micro_batch(step, chunk, *rows)
            # DDP averages gradients over the ranks only in the last backward of a step.
            waiting = world > 1 and chunk != split.chunks[-1]
            with model.no_sync() if waiting else nullcontext():
                with autocast:
                    loss, errors = meanflow.loss(model, *batch)
                (loss / len(split.chunks)).backward()
            report.add(loss.detach(), errors, gaps=batch[3] - batch[2])
        v_error = report.step(grad_norm=update(step))
        schedule.update(v_error, step)

    leave_ranks()
    if notice:
        say(f"{signal.Signals(notice).name}: stopped after step {step:,}; the same command resumes")
        sys.exit(128 + notice)
    report.close()


# ---------------------------------------------------------------------------- what main sets up


def open_data(args, rank, trains):
    """(dataset or None, its meta.json, pictures, pictures in an epoch). Draws missing digits.

    --dry-run and --bench need no dataset: ASSUMED says what the default ones hold.
    """
    missing = args.data in ASSUMED and not Path(args.data, "meta.json").exists()
    if trains and args.data == GLYPHS:
        if missing and rank == 0:
            write_glyphs(GLYPHS)
        wait_for_all()
    if missing and not trains:
        meta = ASSUMED[args.data]
        return None, meta, meta["count"], meta["count"]
    data = Dataset(args.data)
    if args.augment and data.meta["vae"]:
        fail(f"--augment is for pixels, and {args.data} holds latents: --no-augment")
    return data, data.meta, len(data), data.epoch_length


def tell(caught, text):
    """Print; where nobody reads any more (`| head`, a lost terminal), that counts as a signal."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        caught.append(signal.SIGPIPE)


class Split:
    """How a batch divides over ranks into micro-batches, and those into r = t and r < t.

    chunks: this rank's micro-batches of a step. The last num_neq of `micro` samples have r < t.
    """

    def __init__(self, args, rank, world):
        micro = self.micro = args.micro_batch_size or args.batch_size // world
        if not micro or args.batch_size % (micro * world):
            fail(f"--batch-size {args.batch_size} is no multiple of {world} ranks x {micro}")
        self.rank, self.world = rank, world
        self.chunks = range(rank, args.batch_size // micro, world)
        self.num_neq = round(micro * args.r_neq_t)
        self.num_eq = micro - self.num_neq
        if 0 < args.r_neq_t < 1 and self.num_neq in (0, micro):
            fail(f"--r-neq-t {args.r_neq_t} of {micro} is none or all: raise --batch-size")


def read_last(path, args, meta, steps):
    """The run's last checkpoint, if any; ends the script where another command made it."""
    if not path.exists():
        return None
    saved = read_checkpoint(path)
    if "optimizer" not in saved:
        fail(f"{path} holds only the network: name it as --init-from, and another --out")
    for name, now in vars(args).items():
        was = saved["args"].get(name, PAPER.get(name))  # older runs lack newer flags
        if name not in MAY_CHANGE and now != was:
            flag = f"--{name.replace('_', '-')} {now}"
            fail(f"{flag}: {args.out} was trained with {was}; name another --out")
    if meta and saved["meta"] | {"source": meta["source"]} != meta:
        fail(f"--data {args.data} is not the dataset of {args.out}; name another --out")
    if saved["step"] > steps:
        fail(f"--steps {steps}: {args.out} is at step {saved['step']} already")
    return saved


def build_objective(args, net):
    """The constants of the loss; guidance needs classes."""
    if args.omega_range and not net.num_classes:
        fail(f"--omega-range: guidance needs classes, and {args.data} has none")
    names = ["cfg_interval", "tangent", "jvp_velocity"] + ["omega", "kappa"] * (net.num_classes > 0)
    flags = {name: getattr(args, name) for name in names}
    return meanflow.Objective(net.null_label, p=args.adaptive_p, c=args.adaptive_c, **flags)


def build_schedule(args, steps):
    """The schedule of the flags of the same names."""
    sampler = schedules.TIME_SAMPLERS[args.time_sampler]
    names = "accel progressive gap beta_k snr_gamma dtd_clusters dtd_patience dtd_cap"
    flags = {name: getattr(args, name) for name in names.split()}
    try:
        quantile = partial(sampler, mu=args.time_mu, sigma=args.time_sigma)
        return schedules.Schedule(steps, quantile, **flags)
    except ValueError as error:
        fail(f"--gap: {error}; widen it")


def build_network(args, meta, saved, say):
    """The network of --model, or in a new run that of --init-from, if it is the same."""
    if args.init_from and not saved:
        net, given = load(args.init_from, args.conditioning)
        sizes, was = CONFIGS | UNETS, given["meta"]
        for what, theirs, ours in [
            ("--model", given["args"]["model"], args.model),  # XL/2 and XL/2+ are one network
            ("--conditioning", given["args"]["conditioning"], args.conditioning),
            ("the number of classes", len(was["classes"]), len(meta["classes"])),
            ("pictures", str(was["shape"]), str(meta["shape"])),
        ]:
            if sizes.get(theirs, theirs) != sizes.get(ours, ours):
                fail(f"--init-from {args.init_from} has {what} {theirs}, and this run {ours}")
        say(given.get("note", f"from the EMA of {args.init_from} at step {given['step']:,}"))
        return net.train()
    try:
        with torch.device("meta") if args.dry_run else nullcontext():
            return build(args.model, meta, args.conditioning)
    except ValueError as error:
        fail(f"--model {args.model}: {error}")


def distributed(net, shape):
    """The network in DDP, which must be told whether there are parameters without a gradient."""
    torch._dynamo.config.optimize_ddp = False  # or DDP's buckets would cut a compiled graph
    t = torch.ones(1, device=next(net.parameters()).device)
    u = net(t.new_zeros(1, *shape), t, t, torch.zeros_like(t, dtype=torch.long))
    trained = [p for p in net.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(u.sum(), trained, allow_unused=True)
    unused = any(gradient is None for gradient in gradients)
    return DistributedDataParallel(net, gradient_as_bucket_view=True, find_unused_parameters=unused)


def faster_blocks(net, compiled, checkpointed):
    """Change how the blocks of a network run, and not what they compute."""
    torch._dynamo.config.recompile_limit = 64  # the U-Net's blocks have many shapes
    torch._inductor.config.fallback_random = True  # dropout as in du/dt, which runs eagerly
    for block in net.blocks:
        if compiled:  # by block: it takes seconds, the whole network minutes
            block.forward = torch.compile(block.forward, dynamic=False)
        if checkpointed:  # around the compiled block: the other way, dropout would not repeat
            block.forward = partial(checkpoint_block, block.forward)


def checkpoint_block(block, *args):
    """Keep only the block's input, and run it again for the backward."""
    if torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def load_batches(args, data, split, start, steps, device):
    """Of each step, a Future of this rank's micro-batches, [(rows, labels), ...]."""

    def read(step):
        keys = ((step, chunk, split.micro, args.batch_size) for chunk in split.chunks)
        found = [data[chunk_indices(*key, len(data), args.seed)] for key in keys]
        cuda = device.type == "cuda"
        return [[a.pin_memory() for a in pair] for pair in found] if cuda else found

    return read_ahead(read, range(start, steps if data else start), args.workers)


@lru_cache(maxsize=2)
def shuffled(count, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(count)


def chunk_indices(step, chunk, micro, batch_size, count, seed):
    """Which samples micro-batch `chunk` of a step holds: (micro,) indices below count.

    The data is an endless stream of shuffled epochs, split into batches and then micro-batches,
    which go to the ranks in turn. differs: the authors' code drops the partial batch at the end of
    an epoch; here the next epoch fills it. So the samples of a step are a function of (seed, step),
    and a run resumes on any number of ranks without replaying the stream. Noise, times and dropped
    labels are a function of (seed, step, chunk): the same as long as a micro-batch has its size.
    """
    first = step * batch_size + chunk * micro
    epoch, offset = np.divmod(np.arange(first, first + micro), count)
    picks = [shuffled(count, seed, n)[offset[epoch == n]] for n in np.unique(epoch).tolist()]
    return np.concatenate(picks)


def largest_of_ranks(*values):
    """Exchanged by CPUs, so no GPU is waited for."""
    values = torch.tensor(values)
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


# ---------------------------------------------------------------------------- what a run reports


class Report:
    """metrics.jsonl, the pictures of samples/ and their FID, TensorBoard and progress.png.

    `add` each micro-batch, then end the `step`. The sums stay on the device, so that neither waits
    for a GPU; `metrics` does where it writes a row.
    """

    def __init__(self, args, meta, ema, split, start, steps, say):
        self.args, self.ema, self.split, self.steps, self.say = args, ema, split, steps, say
        self.out, self.scale = Path(args.out), meta["scale"]
        ema.omega = args.omega  # of the pictures and the FID
        self.start = self.saved_at = start
        device = next(ema.parameters()).device
        self.vae = load_vae(args.vae).to(device) if args.vae else None
        if bool(self.vae) != bool(meta["vae"]) and (self.vae or args.fid_every):
            holds = "latents: name" if meta["vae"] else "pixels: leave out"
            fail(f"--data {args.data} holds {holds} --vae")
        if self.vae and self.vae.fingerprint() != meta["vae"]:
            say(f"note: {args.vae} is not the VAE that made the latents of {args.data}")
        if args.fid_every:
            self.inception = fid.load_inception(args.inception).to(device)
            self.reference = fid.load_statistics(Path(args.fid_ref))
            if not self.reference:
                fail(f"--fid-ref {args.fid_ref} holds no mu and sigma")
        # Rows of up to ten classes, always from the same noise.
        self.classes = [0] * 10
        if ema.num_classes:
            self.classes = np.unique(np.linspace(0, ema.num_classes - 1, 10).astype(int)).tolist()
        self.edges = torch.tensor(EDGES, device=device)
        # Of a step: loss, v_error, u_error, norm of the gradient; by gaps, u's errors and counts.
        self.stats, self.history = torch.zeros(4 + 2 * len(GAPS), device=device), []
        if split.rank == 0:
            forget_after(self.out, start)
        self.board = None
        if split.rank == 0 and args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            after = start + (start > 0)  # what a run that was killed had shown after its checkpoint
            self.board = SummaryWriter(self.out / "tensorboard", purge_step=after)
        self.clock = time.time()

    def add(self, loss, errors, gaps):
        """Of a micro-batch the loss (0-d), and the errors and gaps t - r of its samples (B,)."""
        num_eq, num_neq, chunks = self.split.num_eq, self.split.num_neq, len(self.split.chunks)
        v_error = errors[:num_eq].sum() / max(num_eq, 1)
        u_error = errors[num_eq:].sum() / max(num_neq, 1)
        self.stats[:3] += torch.stack([loss, v_error, u_error]) / chunks
        lo, hi, gaps = self.edges[:-1, None], self.edges[1:, None], gaps[num_eq:]
        inside = ((lo <= gaps) & (gaps < hi)).float()  # (4, num_neq)
        self.stats[4:] += torch.cat([inside @ errors[num_eq:], inside.sum(1)])

    def step(self, grad_norm):
        """End a step. Returns its v_error, 0-d, the same on all ranks."""
        if self.split.world > 1:
            dist.all_reduce(self.stats)
            self.stats /= self.split.world
        self.stats[3] = grad_norm
        self.history.append(self.stats)
        self.stats = torch.zeros_like(self.stats)
        return self.history[-1][1]

    def metrics(self, step, saves, learning_rate, schedule):
        """Log the steps since the last row where a row is due; nothing bad is saved or drawn."""
        args, first = self.args, step == self.start + 1  # early, to show the speed
        periods = args.log_every, args.sample_every, args.fid_every or args.log_every
        if not (self.history and (saves or first or any(step % n == 0 for n in periods))):
            return
        rows = torch.stack(self.history).cpu()
        if len(bad := (~rows.isfinite().all(1)).nonzero()):
            at = step - len(rows) + int(bad[0])
            rate = f"not finite at step {at:,}, learning rate {learning_rate(at):g}"
            last = f"the last checkpoint is of step {self.saved_at:,}"
            fail(f"loss or gradient {rate}; {last}; try a lower --lr in another --out")
        sums, counts = rows[:, 4:].sum(0).view(2, len(GAPS))
        names = ["loss", "v_error", "u_error", "grad_norm", *(f"u_error_{gap}" for gap in GAPS)]
        means = zip(names, [*rows[:, :4].mean(0).tolist(), *(sums / counts).tolist()], strict=True)
        samples = {"v_error": self.split.num_eq, "u_error": self.split.num_neq}
        row = {"step": step}
        row |= {k: mean for k, mean in means if math.isfinite(mean) and samples.get(k, True)}
        row |= {"lr": learning_rate(step - 1)} | schedule.state(step)
        rate = row["images_per_second"] = len(rows) * args.batch_size / (time.time() - self.clock)
        left = timedelta(seconds=int((self.steps - step) * args.batch_size / rate))
        shown = [f"{k} {v:.4g}" for k, v in row.items() if k != "step" and "-" not in k]
        self.say(f"step {step:,}/{self.steps:,}  {'  '.join(shown)}  {left} left")
        self.write(row)
        self.history.clear()
        self.saved_at = step if saves else self.saved_at

    def write(self, row):
        if self.split.rank == 0:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            for name in row.keys() - {"step"} if self.board else ():
                self.board.add_scalar(name, row[name], row["step"])

    def pictures(self, step, ended):
        """Draw the grid of one-step samples and measure their FID where they are due."""
        args, split = self.args, self.split
        picture = self.out / "samples" / f"{step:08d}.png"
        draws = ended or step % args.sample_every == 0
        if split.rank == 0 and draws and not picture.exists():
            x = draw(self.ema, self.classes * GRID_ROWS)
            save_grid(to_pixels(x, self.vae, self.scale), picture, len(self.classes))
            if self.board:
                pixels = np.array(Image.open(picture).convert("RGB"))
                self.board.add_image("samples", pixels, step, dataformats="HWC")
        if args.fid_every and step > self.start and (ended or step % args.fid_every == 0):
            samples = OneStepSamples(self.ema, self.vae, self.scale, args.fid_num)
            ours = fid.measure(self.inception, samples, "FID", rank=split.rank, world=split.world)
            row = {"step": step, "inception_score": ours["score"], "fid_samples": args.fid_num}
            if split.rank == 0:
                row |= (found := fid.distances(ours, self.reference))
                shown = ", ".join(f"{name.upper()} {found[name]:.5g}" for name in found)
                self.say(f"step {step:,}/{self.steps:,}  {shown} of {args.fid_num:,} samples")
                self.write(row)
        if not self.history:
            self.clock = time.time()

    def close(self):
        if self.board:
            self.board.close()
        if self.split.rank == 0:
            save_progress(self.out / "samples", self.out / "progress.png")
            made = f"{self.out / 'last.pt'}, {self.out / 'progress.png'}"
            self.say(f"done: {made}; draw more with sample.py")


def forget_after(out, step):
    """Drop metrics and pictures after `step`, from which a run resumes."""
    if not step and (out / "progress.png").exists() and not made_here(out / "progress.png"):
        fail(f"{out / 'progress.png'} was not made here; name another --out")
    path = out / "metrics.jsonl"
    rows = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if rows and not rows[-1].endswith((b"\n", b"}")):  # cut by a kill
        rows.pop()
    steps = [re.match(rb'{"step": (\d{1,18})\b', row) for row in rows]
    kept = [row for row, at in zip(rows, steps, strict=True) if not at or int(at[1]) <= step]
    replace_file(path, lambda file: file.writelines(row.rstrip(b"\n") + b"\n" for row in kept))
    for picture in grids(out / "samples"):
        if int(picture.stem) > step or step == 0:
            picture.unlink()


def grids(samples):
    """The pictures in samples/ that a run has drawn, by their steps."""
    return sorted(path for path in samples.glob("[0-9]" * 8 + ".png") if made_here(path))


def save_progress(samples, path, rows=10):
    """One picture of training: the first row of up to `rows` grids in samples/, oldest on top."""
    if not (files := grids(samples)):
        return
    picks = np.unique(np.linspace(0, len(files) - 1, rows).round().astype(int))
    pictures = [Image.open(files[i]) for i in picks]
    margin, width, tile = 80, pictures[0].width, pictures[0].height // GRID_ROWS
    progress = Image.new("RGB", (margin + width, tile * len(pictures)))
    for i, (pick, grid) in enumerate(zip(picks, pictures, strict=True)):
        text = f"step {int(files[pick].stem)}"
        ImageDraw.Draw(progress).text((8, (i + 0.5) * tile), text, anchor="lm")
        progress.paste(grid.crop((0, 0, width, tile)), (margin, i * tile))
    save_png(progress, path)


class OneStepSamples:
    """Like fid.Pictures: samples[indices] draws those, (B, C, H, W) uint8, balanced in class."""

    def __init__(self, net, vae, scale, num):
        self.net, self.vae, self.scale, self.rows, self.files = net, vae, scale, range(num), []

    def __getitem__(self, indices):
        labels = [i % max(self.net.num_classes, 1) for i in indices]
        return to_pixels(draw(self.net, labels, indices), self.vae, self.scale)


# ---------------------------------------------------------------------------- --bench


def bench(args, net, objective, schedule, split, update, autocast, meta, batches, say):
    """Print what a step costs on this machine: loss and gradients of a micro-batch, Adam, EMA.

    All that is timed is timed in turn, so that background load affects all of it; the median of the
    rounds counts. On a CPU it is process time on one thread, which load affects least.
    """
    if dist.is_initialized():
        fail("--bench measures one device: start it without torchrun")
    device = next(net.parameters()).device
    cuda, rounds, repeat = (True, 10, 10) if device.type == "cuda" else (False, 5, 1)
    if not cuda:
        torch.set_num_threads(1)
    t, r, _ = schedule.sample(split.num_eq, split.num_neq, 0, torch.Generator(device))
    x, e = torch.randn(2, len(t), *meta["shape"], device=device)
    y = torch.arange(len(t), device=device) % max(net.num_classes, 1)
    losses = {"flow matching": partial(meanflow.loss, net, x, e, t, t, y, 0)}
    goals = {"MeanFlow": replace(objective, omega=1.0, kappa=0.0)}
    goals |= {"guided MeanFlow": objective} if objective.guided else {}
    for name, goal in goals.items():
        losses[name] = partial(meanflow.loss, net, x, e, r, t, y, split.num_neq, objective=goal)
        if not args.activation_checkpointing:  # torch 2.11 cannot, under a JVP
            textbook = partial(meanflow.textbook_loss, net, x, e, r, t, y, objective=goal)
            losses[f"{name}, textbook"] = textbook

    def step(loss_of):
        with autocast:
            loss, _ = loss_of()
        loss.backward()
        update(0)

    def clock():
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() if cuda else time.process_time()

    # What each step does, the memory it takes, and how long the GPU computes. The counter of FLOPs
    # sees neither a compiled graph nor every backend's attention.
    steps, flops, gpu = {name: partial(step, loss_of) for name, loss_of in losses.items()}, {}, {}
    for name, run in [*steps.items()]:
        try:
            for _ in range(2):  # the first compiles, and makes Adam's state
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                run()
            if cuda:
                memory = torch.cuda.max_memory_allocated() / 1e9
                with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                    run()
                kernels = [k for k in profiler.key_averages() if k.device_type == DeviceType.CUDA]
                gpu[name] = memory, sum(kernel.self_device_time_total for kernel in kernels) / 1e6
            counter = FlopCounterMode(display=False)
            with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), counter:
                run()
            flops[name] = counter.get_total_flops() / 1e12
        except torch.OutOfMemoryError:
            say(f"{name}: out of memory")
            del steps[name]
    if "flow matching" not in steps:
        fail("no memory for flow matching: lower --batch-size")

    timed = steps | {"sampling": autocast(partial(meanflow.sample, net, e, y))}
    taken, progress = {name: [] for name in timed}, Progress("bench", rounds)
    for _ in range(rounds):
        for name, run in timed.items():
            taken[name].append(timeit.timeit(run, timer=clock, number=repeat) / repeat)
        progress(1)
    median = {name: np.median(values) for name, values in taken.items()}
    how = ", process time of one thread" * (not cuda) + ", compiled" * args.compile
    how += ", checkpointed" * args.activation_checkpointing
    say(f"{len(t)} pictures a step, {args.dtype}{how}")
    columns = f"{'ratio':>7}{'TFLOP':>10}{'TFLOP/s':>10}{'pictures/s':>12}"
    say(f"{'':26}{columns}{'peak GB':>9}{'GPU busy':>10}" if cuda else f"{'':26}{columns}")
    for name in steps:
        ratio, speed = np.median(np.divide(taken[name], taken["flow matching"])), 1 / median[name]
        line = f"{name:26}{ratio:7.3f}{flops[name]:10.3g}{flops[name] * speed:10.3g}"
        line += f"{len(t) * speed:12.4g}"
        say(f"{line}{gpu[name][0]:9.3g}{gpu[name][1] * speed:10.0%}" if cuda else line)
    say(f"sampling in one step: {len(t) / median['sampling']:.4g} pictures/s")
    read, begin = 0, time.perf_counter()
    for reading in batches:
        read += sum(len(images) for images, _ in reading.result())
        if (seconds := time.perf_counter() - begin) > 5:
            break
    if read:
        say(f"the loader alone, {args.workers} threads: {read / seconds:.4g} pictures/s")


if __name__ == "__main__":
    run_script(main, parse_args())
