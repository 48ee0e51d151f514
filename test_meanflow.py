"""Every number against something independent: closed forms, scipy, torch, peers' code.

python -m pytest                                             two minutes on two CPU cores
python -m pytest -m ""                                       also kills, torchrun, compile, peers
MEANFLOW_RUN=runs/tiny-dtd python -m pytest -s -k trained_run    how good a finished digit run is
"""

import argparse
import collections
import contextlib
import csv
import importlib.util
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, PngImagePlugin
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fid
import meanflow
import prepare_latents
import sample
import schedules
import train
from meanflow import Objective
from model import CONDITIONINGS, CONFIGS, UNETS, DiT, UNet, build, load, load_file, sincos_positions

torch.set_num_threads(1)  # the tensors are tiny
HERE = Path(__file__).parent
TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")  # see peer
slow = partial(pytest.param, marks=pytest.mark.slow)
LOGNORM = partial(schedules.lognorm_quantile, mu=-0.4, sigma=1.0)


def random_weights(net, std=None):
    """In float64, and each of them: at initialisation most outputs are zero."""
    for weight in net.double().parameters():
        if weight.requires_grad:
            of_size = weight[0].numel() ** -0.5 if weight.dim() > 1 else 0.3
            nn.init.normal_(weight, std=std or of_size)
    return net


def small_dit(conditioning="t,t-r"):
    torch.manual_seed(0)
    net = DiT(2, 4, 3, depth=2, width=16, heads=2, patch=2, conditioning=conditioning)
    return random_weights(net, 0.2)


def small_batch(num_eq, num_neq):
    """x, e, r, t, y, weight in the layout of meanflow.loss, for small_dit; some labels are null."""
    n, g = num_eq + num_neq, torch.Generator().manual_seed(1)
    x, e = torch.randn(2, n, 2, 4, 4, generator=g, dtype=torch.float64)
    t, r = schedules.sample_t_r(num_eq, num_neq, LOGNORM, generator=g)
    weight = 0.5 + torch.rand(n, generator=g, dtype=torch.float64)
    return x, e, r.double(), t.double(), torch.arange(n) % 4, weight  # label 3 is null


def textbook_loss(net, x, e, r, t, y, weight, goal, noise=0, num_neq=None):
    """Algorithm 1 with Eq. 21 and 22 as they stand: JVP with a graph over the whole batch. Random
    layers draw in the order of meanflow.loss, if the last num_neq samples are those with r < t:
    these run first, by themselves, and the others are guided by what training draws."""
    t4, r4 = t[:, None, None, None], r[:, None, None, None]
    z, v, n = (1 - t4) * x + t4 * e, e - x, len(x) - num_neq if num_neq else 0
    omega = y[:, 1][:, None, None, None] if y.dim() == 2 else torch.full_like(t4, goal.omega)
    null, found = y.clone(), []
    (null if y.dim() == 1 else null[:, 0]).fill_(net.num_classes)
    guides, (lo, hi) = (goal.omega, goal.kappa) != (1, 0), goal.cfg_interval
    network = goal.jvp_velocity == "network"
    u_null = net(z, t, t, null).detach() if guides else 0
    for part in [slice(n, None), slice(n)] if n else [slice(None)]:
        at, label, along = (z[part], r[part], t[part]), y[part], v[part]
        with torch.random.fork_rng(enabled=part.start is None):
            u = net(at[0], at[2], at[2], label).detach() if goal.kappa or network else 0
        if guides:
            w = omega[part]
            mix = w * along + goal.kappa * u + (1 - w - goal.kappa) * u_null[part]
            inside = (
                (at[2] >= lo) & (at[2] <= hi) & (label.view(len(w), -1)[:, 0] != net.num_classes)
            )
            along = torch.where(inside[:, None, None, None], mix, along).detach()
        tangents = u if network else along, *(torch.full_like(at[2], d) for d in goal.tangent)
        with sdpa_kernel(SDPBackend.MATH):
            u, dudt = torch.func.jvp(lambda *a, label=label: net(*a, label), at, tangents)
        found.insert(0, (u, dudt, along))
    u, dudt, v = map(torch.cat, zip(*found, strict=True))
    delta = u - (v - (t4 - r4) * dudt + noise * (r4 == t4)).detach()
    square = (delta**2).sum((1, 2, 3))
    loss = (weight * square / (square.detach() + goal.c) ** goal.p).mean()
    return loss, square.detach() / x[0].numel()


def gradients(net, loss):
    return torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad])


def torchrun(ranks, script, *flags, start=subprocess.run, launch=(), **options):
    """A script of this project as its users start it, on one thread for each rank."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *launch]
    command = [sys.executable, *(launcher if ranks > 1 else []), HERE / script, *flags]
    options |= {"check": True} if start is subprocess.run else {}
    return start(list(map(str, command)), env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def children(job):
    """Numbers of the processes that it started."""
    return map(int, Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split())


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def refusal(capsys, code, words, script, *flags):
    """A script ends with this exit code, and in one line that has these words."""
    name = f"{script.__name__}.py"
    with mock.patch.object(sys, "argv", [name]), pytest.raises(SystemExit) as stop:
        prepare_latents.run_script(script.main, script.parse_args(list(map(str, flags))))
    found, line = 1, stop.value.code  # text is what sys.exit prints, and then the code is 1
    if isinstance(line, int):  # of argparse
        found, line = line, capsys.readouterr().err.strip().splitlines()[-1]
    assert (found, words in line) == (code, True), line
    assert re.fullmatch(f"{name}: .+", line)


def peer(name):
    """A library of requirements-dev.txt to compare with; without it the test is skipped."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # beside a CPU build of torch it misses two operators
        for operator in ("nms", "qnms"):
            TORCHVISION.define(f"{operator}(Tensor dets, Tensor scores, float iou) -> Tensor")
    except ImportError:
        pass
    return pytest.importorskip(name)


def tiny(data, out, *flags):
    """Flags of train.py for steps of 8 pictures, each of them logged."""
    argv = ["--data", data, "--out", out, "--batch-size", 8, "--log-every", 1, *flags]
    return list(map(str, argv))


def call(script, *flags):
    script.main(script.parse_args(list(map(str, flags))))


def run(data, out, *flags):
    """train.main on the small glyphs; returns the checkpoint."""
    call(train, *tiny(data, out, *flags))
    return torch.load(out / "last.pt", weights_only=True)


def metrics(out):
    """The rows of a run's log, without the speed, which is never the same."""
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop("images_per_second", 1) > 0 for row in rows)  # a row of FID has none
    return rows


@pytest.fixture(scope="session")
def glyphs(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "glyphs"
    prepare_latents.write_glyphs(path, count=200)
    return path


def write_pixels(path, images):
    """A dataset without classes."""
    path.mkdir()
    what = dict(count=len(images), shape=[*images.shape[1:]], classes=[], source="", files="")
    writer = prepare_latents.DatasetWriter(path, prepare_latents.pixel_meta(**what))
    writer.write(0, images, np.zeros(len(images)))
    writer.finish()
    return path


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    images = np.random.default_rng(0).integers(0, 256, (64, 3, 8, 8), np.uint8)
    return write_pixels(tmp_path_factory.mktemp("data") / "colours", images)


@pytest.fixture(autouse=True)
def signals_as_before():
    """train.main takes what would stop it for a notice; pytest needs its Ctrl-C."""
    numbers = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where nohup started pytest
    yield
    list(map(signal.signal, numbers, before))


# ---------------------------------------------------------------------------- model.py


def test_model_py_is_a_plain_network():
    networks, _ = (HERE / "model.py").read_text().split("# ----------", 1)
    assert not re.findall("tangent|dual|checkpoint", networks, re.IGNORECASE)


def test_at_initialisation_weights_have_the_scales_of_dit_and_gates_and_output_are_zero():
    net = build("tiny", dict(shape=(3, 32, 32), classes=range(1000)))
    for name, weight in net.named_parameters():
        if name.endswith("bias") or "adaln" in name or name == "final.linear.weight":
            assert not weight.any(), name
        elif name != "pos_embed":
            xavier = (2 / sum(weight.shape)) ** 0.5
            std = 0.02 if "label_embed" in name or "time_embed" in name else xavier
            assert weight.std().item() == pytest.approx(std, rel=0.03), name


def test_positions_equal_numpy():
    rows, columns = np.divmod(np.arange(9)[:, None], 3)
    args = [place / 10000 ** (np.arange(4) / 4) for place in (columns, rows)]
    expected = np.hstack([f(a) for a in args for f in (np.sin, np.cos)])
    assert_close(sincos_positions(3, 16).numpy(), np.float32(expected))


def test_conditionings_are_what_their_names_say():
    """How the network uses them, and all else in it, is compared under public weights."""
    r, t, omega = torch.rand(3, 5)
    named = {"r": r, "t": t, "t-r": t - r, "omega": omega}
    for name, times in CONDITIONINGS.items():
        assert_close(times(r, t, omega), tuple(named[k] for k in name.split(",")))


# ---------------------------------------------------------------------------- meanflow.py


def whole(net, step):
    """Of a step (loss, errors) both, and the gradients; errors are distances to the target."""
    return [step[0].detach(), step[1], *gradients(net, step[0])]


assert_same = partial(assert_close, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("omega", "kappa"), [(1, 0), (2, 0), (1, 0.5), (0.2, 0.92)])
@pytest.mark.parametrize("interval", [(0, 1), (0.3, 0.6)])
@pytest.mark.parametrize("along", ["target", "network"])
def test_the_printed_and_the_economical_step_equal_the_textbook(omega, kappa, interval, along):
    """Gradients too, so that nothing flows through the target; weights after Eq. 22."""
    net, (x, e, r, t, y, weight) = small_dit(), small_batch(12, 8)
    assert interval == (0, 1) or 0 < ((t >= 0.3) & (t <= 0.6)).sum() < 20
    tangent = (0.0, 1.0) if interval == (0, 1) else (0.3, 0.9)
    objective = Objective(3, omega, kappa, interval, tangent, along, p=0.75, c=0.01)
    textbook = net, x, e, r, t, y, weight, objective
    expected = whole(net, textbook_loss(*textbook))
    assert_same(whole(net, meanflow.textbook_loss(*textbook)), expected)
    noise = meanflow.corruption(e - x, 0.3, torch.Generator().manual_seed(0))
    size = (noise.square().mean() / (e - x).square().mean()).item()
    assert size == pytest.approx(32 * 0.3**2, rel=0.3)  # of 32 dimensions
    spoilt = whole(net, textbook_loss(*textbook, noise))
    batch = net, x, e, r, t, y, 8, weight, objective
    assert_same(whole(net, meanflow.loss(*batch)), expected)
    assert_same(whole(net, meanflow.loss(*batch, v_noise=noise)), spoilt)


def test_each_sample_may_have_an_omega_of_its_own():
    net, (x, e, r, t, y, weight) = small_dit("t,t-r,omega"), small_batch(12, 8)
    goal, omega = Objective(3, 2.0, 0.5, (0.2, 0.9)), torch.linspace(0.5, 3, 20).double()
    steps = []
    for i in range(20):
        net.omega = omega[i].item()  # of a batch whose labels have none
        batch = [a[i : i + 1] for a in (x, e, r, t, y, weight)]
        steps.append(textbook_loss(net, *batch, replace(goal, omega=net.omega)))
    losses, errors = zip(*steps, strict=True)
    expected = whole(net, (torch.stack(losses).mean(), torch.cat(errors)))
    y = torch.stack([y.double(), omega], 1)
    assert_same(whole(net, meanflow.loss(net, x, e, r, t, y, 8, weight, goal)), expected)
    assert_same(whole(net, meanflow.textbook_loss(net, x, e, r, t, y, weight, goal)), expected)


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside hold at once, also of fake tensors."""

    def __enter__(self):
        self.held, self.peak = weakref.WeakSet(), 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def storages(values):
            found = map(torch.Tensor.untyped_storage, filter(torch.is_tensor, tree_leaves(values)))
            return {storage._cdata: storage for storage in found}

        given, result = storages((args, kwargs)), function(*args, **kwargs or {})
        self.held.update(s for key, s in storages(result).items() if key not in given)  # no views
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.held))
        return result


@pytest.mark.parametrize(("name", "most"), [("B/4", 3.52), ("S/2", 3.55)])
def test_a_step_costs_no_more_than_its_parts_need(name, most, monkeypatch):
    """In forwards, of which flow matching takes 3, and in memory, of which it takes 1. That fake
    tensors can do it shows that neither loss nor curriculum waits to see a value on a GPU."""
    monkeypatch.setattr(meanflow, "random_state", lambda device: None)  # its bytes are not fake
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):  # the counter knows no other on a CPU
        net = build(name, dict(shape=(4, 32, 32), classes=range(1000)))
        x, e = torch.randn(2, 16, 4, 32, 32)
        y, dtd = torch.arange(16), schedules.DTD(steps=100)

        def cost(num_neq, count=True, **guidance):
            flops = FlopCounterMode(display=False)  # its hooks hold what checkpointing frees
            with flops if count else contextlib.nullcontext(), PeakMemory() as memory:
                t, r = schedules.sample_t_r(16 - num_neq, num_neq, LOGNORM, dtd.mass)
                batch = net, x, e, r, t, y, num_neq
                loss, errors = meanflow.loss(*batch, objective=Objective(1000, **guidance))
                loss.backward()
                dtd.update(errors.mean(), 0)
            net.zero_grad()
            return flops.get_total_flops(), memory.peak

        with FlopCounterMode(display=False) as forward, torch.no_grad():
            net(x, torch.rand(16), torch.rand(16), y)
        (flow_matching, base), forward = cost(0), forward.get_total_flops()
        assert flow_matching / forward == pytest.approx(3, abs=0.01)
        for guidance, more in [({}, 0), ({"omega": 2}, 1), ({"kappa": 0.92}, 1.25),
                               ({"jvp_velocity": "network"}, 0.25),
                               ({"kappa": 0.92, "jvp_velocity": "network"}, 1.25)]:  # fmt: skip
            flops, peak = cost(4, **guidance)
            print(name, guidance, flops / forward, peak / base)
            assert most - 0.1 < flops / forward - more <= most
            assert peak <= 1.05 * base
        for block in net.blocks:
            block.forward = partial(train.checkpoint_block, block.forward)
        assert cost(4, count=False)[1] < 0.85 * base


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_derivative_equals_central_finite_differences(conditioning):
    net, (x, e, r, t, y, _) = small_dit(conditioning), small_batch(5, 4)
    (z, v), h = meanflow.interpolate(x, e, t), 1e-5
    ahead, behind = (net(z + s * v, r + s * 0.3, t + s * 0.9, y) for s in (h, -h))
    dudt = meanflow.derivative(net, z, r, t, y, v, (0.3, 0.9))
    assert (dudt - (ahead - behind) / (2 * h)).abs().max() < 1e-7 * dudt.abs().max()
    assert not dudt.requires_grad


class ForkedBlock(nn.Module):
    """What forks change: RMSNorm, SwiGLU, no biases, keywords; and convolutions whose weight or
    bias depends on the sample."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64, bias=False), nn.Linear(32, 16, bias=False)
        self.norm, self.mix = nn.RMSNorm(16), nn.Linear(16, 16)

    def forward(self, x, c):
        a, b = self.up(self.norm(x + c[:, None])).chunk(2, -1)
        x = x + F.linear(input=self.down(F.silu(a) * b), weight=self.mix.weight, bias=None)
        weight = (self.mix.weight * c[:, None]).flatten(0, 1)[..., None, None]  # (B D, D, 1, 1)
        h = F.conv2d(x.mT.flatten(0, 1)[None, ..., None], weight, groups=len(x))
        weight, bias = self.mix.weight.repeat(len(x), 1), (self.mix.bias * c).flatten()
        h = F.conv2d(h, weight[..., None, None], bias, groups=len(x))
        return x + h.view(len(x), 16, -1).mT.cumsum(1)


def test_a_fork_trains_like_the_textbook(monkeypatch):
    """With a conditioning, blocks of its own, and torch's own attention layer."""
    monkeypatch.setitem(CONDITIONINGS, "fork", lambda r, t, _: (t * r, 1 - t))
    net, attention = small_dit("fork"), nn.MultiheadAttention(16, 2, batch_first=True)
    attention.forward = lambda x, forward=attention.forward: forward(x, x, x)[0]
    net.blocks = nn.ModuleList([ForkedBlock(), net.blocks[0], ForkedBlock()])
    net.blocks[1].attn = attention
    net.double()
    for num_neq in (0, 1, 4, 10):
        *batch, weight = small_batch(10 - num_neq, num_neq)
        goal = Objective(3, omega=0.7, kappa=0.5)
        ours = meanflow.loss(net, *batch, num_neq, weight, goal)
        assert_same(whole(net, ours), whole(net, textbook_loss(net, *batch, weight, goal)))


MASKS = {
    "dropout": lambda x: F.dropout(x, 0.3).cumsum(1),
    "dropout of features": lambda x: F.dropout1d(x, 0.3),
    "rand": lambda x: x * (torch.rand(x.shape[0], 1, 1) > 0.3),
    "drop path": lambda x: x * x.new_empty(len(x), 1, 1).bernoulli_(0.7),
    "normal": lambda x: x + torch.randn_like(x.mT).mT,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("guidance", [{}, dict(omega=0.2, kappa=0.92)])
def test_random_layers_draw_the_same_for_u_and_its_derivative(mask, guidance):
    net, (*batch, weight), goal = small_dit(), small_batch(4, 6), Objective(3, **guidance)
    for block in net.blocks:
        block.register_forward_pre_hook(lambda block, args: (MASKS[mask](args[0]), args[1]))
    torch.manual_seed(0)
    ours = [*whole(net, meanflow.loss(net, *batch, 6, weight, goal)), torch.rand(3)]
    torch.manual_seed(0)
    theirs = whole(net, textbook_loss(net, *batch, weight, goal, num_neq=6))
    assert_same(ours, [*theirs, torch.rand(3)])  # and the same numbers after


@pytest.mark.parametrize("kind", ["DiT", "U-Net"])
@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("compiled", [False, slow(True)])
def test_a_compiled_or_checkpointed_step_equals_the_textbook(kind, checkpointed, compiled):
    """Also with dropout, in the U-Net, and with guidance, in the DiT. Compiled in one graph: a
    break in it would be an error; and once. In a compiled block du/dt would be wrong."""
    net, goal = small_dit(), Objective(3, 0.2, 0.92, (0.2, 0.8))
    *batch, weight = small_batch(12, 8)
    if kind == "U-Net":
        net, goal = random_weights(UNet(3, 8, 3, depth=1, width=32)), Objective(3)
        batch[:2] = torch.randn(2, 20, 3, 8, 8, dtype=torch.float64)
        batch[4] = torch.column_stack([batch[4], torch.randn(20, 6)]).double()  # augmented
    torch.manual_seed(5)
    expected = gradients(net, textbook_loss(net, *batch, weight, goal, num_neq=8)[0])
    single = compiled and kind == "DiT"  # torch 2.11 fails to compile attention in float64
    if single:
        net, batch = net.float(), [a.float() if a.is_floating_point() else a for a in batch]
    torch.compiler.reset()
    train.faster_blocks(net, compiled, checkpointed)
    step = partial(meanflow.loss, net, *batch, 8, weight, goal)
    torch.manual_seed(5)
    found = gradients(net, step()[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        step()
    scale = (1e-5 if single else 1e-12) * max(g.abs().max() for g in expected)
    assert_close(found, expected, rtol=0, atol=scale.item(), check_dtype=False)


def rank_of_two(rank, folder):
    """Its halves of two micro-batches, through DDP."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    net, (*batch, weight) = small_dit(), small_batch(12, 8)
    model, goal = nn.parallel.DistributedDataParallel(net), Objective(3, 0.2, 0.92, (0.2, 0.8))
    for chunk in range(2):
        rows = torch.arange(2 * chunk + rank, 20, 4)  # 3 with r = t, 2 with r < t
        with model.no_sync() if chunk == 0 else contextlib.nullcontext():
            part = [a[rows] for a in batch]
            (meanflow.loss(model, *part, 2, weight[rows], goal)[0] / 2).backward()
    torch.save([p.grad for p in net.parameters() if p.requires_grad], f"{folder}/{rank}")
    prepare_latents.leave_ranks()


@pytest.mark.slow
def test_two_ranks_that_accumulate_have_the_gradient_of_the_textbook(tmp_path):
    torch.multiprocessing.spawn(rank_of_two, (tmp_path,), 2)
    net, goal = small_dit(), Objective(3, 0.2, 0.92, (0.2, 0.8))
    expected = [*gradients(net, textbook_loss(net, *small_batch(12, 8), goal)[0])]
    for rank in range(2):
        assert_same(torch.load(tmp_path / str(rank)), expected)


@pytest.mark.parametrize(("name", "least"), [("tiny", 1e-3), ("unet", 1e-4)])
def test_the_velocity_and_its_derivative_are_precise_in_bfloat16(monkeypatch, name, least):
    monkeypatch.setitem(UNETS, "unet", (1, 32))
    torch.manual_seed(0)
    net = build(name, dict(shape=(4, 16, 16), classes=[])).eval()
    net = random_weights(net, 0.05 if name == "tiny" else None)
    z, v = torch.randn(2, 16, 4, 16, 16)
    _, _, r, t, y, _ = small_batch(0, 16)

    def both(net, z, r, t, v):
        with torch.no_grad():
            return net(z, r, t, 0 * y), meanflow.derivative(net, z, r, t, 0 * y, v)

    exact = both(net, z.double(), r, t, v.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours = both(net.float(), z, r.float(), t.float(), v)
    of_u, of_dudt = ((a - b).norm() / b.norm() for a, b in zip(ours, exact, strict=True))
    print(name, of_u.item(), of_dudt.item())
    assert least < of_u < 1e-2
    assert least < of_dudt < 1e-2


def gaussian_flow(z, r, t, y=None, m=0.7, std=0.4):
    """For data N(m, std^2) the exact average velocity, or the velocity where r = t:
    z_t = (1 - t) m + s_t xi, s_t^2 = (1 - t)^2 std^2 + t^2, xi the same along a path."""
    r, t = r.view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)
    s_r, s_t = (((1 - a) ** 2 * std**2 + a**2).sqrt() for a in (r, t))
    xi = (z - (1 - t) * m) / s_t
    velocity = -m + (t - (1 - t) * std**2) / s_t * xi
    average = (z - (1 - r) * m - s_r * xi) / torch.where(r == t, 1, t - r)
    return torch.where(r == t, velocity, average)


def test_the_exact_average_velocity_is_a_fixed_point_and_sampling_arrives_at_the_data():
    _, _, r, t, y, _ = small_batch(0, 64)
    z = torch.randn(64, 1, 2, 2, dtype=torch.float64)
    v = gaussian_flow(z, t, t)
    u = gaussian_flow(z, r, t)
    dudt = meanflow.derivative(gaussian_flow, z, r, t, y, v)
    assert_close(meanflow.target(v, r, t, dudt), u, rtol=0, atol=1e-10)
    assert (v - u).abs().mean() > 0.1
    draw, exact = partial(meanflow.sample, gaussian_flow, z, y), 0.7 + 0.4 * z
    for options in (dict(), dict(nfe=5), dict(times=[1, 0.8, 0.1, 0])):
        assert_close(draw(**options), exact)
    euler = [draw(nfe=n, velocity=True) for n in (100, 200)]
    errors = [(x - exact).square().mean().sqrt().item() for x in euler]
    assert errors[0] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)  # first order


def test_labels_are_dropped_at_their_rate_and_only_to_the_null_label():
    y = torch.arange(100_000) % 10
    dropped = meanflow.drop_labels(y, 10, 0.1, torch.Generator().manual_seed(0))
    assert (dropped == 10).double().mean().item() == pytest.approx(0.1, abs=0.004)
    assert (dropped[dropped != 10] == y[dropped != 10]).all()


def test_the_affinity_is_the_cosine_of_two_gradients():
    net, (x, e, _, t, y, _) = small_dit(), small_batch(6, 2)
    goal, pairs = Objective(3, omega=0.7, kappa=0.5), [(t, 0.2 * t), (t, 0.8 * t)]

    def sample_times(num_eq, num_neq, pairs=None):
        assert (num_eq, num_neq) == ((0, 8) if pairs else (8, 0))
        return pairs or (t, t)

    ours = meanflow.affinity(net, x, e, y, sample_times, pairs, goal).tolist()
    assert all(p.grad is None for p in net.parameters())
    losses = [textbook_loss(net, x, e, r, t, y, 1, goal)[0] for t, r in [(t, t), *pairs]]
    of_v, *of_u = (np.concatenate([g.flatten() for g in gradients(net, a)]) for a in losses)
    assert_close(ours, [u @ of_v / np.sqrt((u @ u) * (of_v @ of_v)) for u in of_u])


# ---------------------------------------------------------------------------- schedules.py


def logit_normal(mu, sigma):
    """(density, distribution function) of sigmoid(N(mu, sigma^2)), by scipy."""
    normal, logit = scipy.stats.norm(mu, sigma), scipy.special.logit
    return lambda t: normal.pdf(logit(t)) / (t * (1 - t)), lambda t: normal.cdf(logit(t))


@pytest.mark.parametrize(("mu", "sigma"), [(-0.4, 1.0), (-2.0, 2.0), (-0.2, 1.2)])
def test_the_constants_of_alpha_and_beta_equal_quadrature(mu, sigma):
    """E|X - Y| = 2 times the integral of F (1 - F); the larger of two has density 2 F p."""
    pdf, cdf = logit_normal(mu, sigma)
    quantile = partial(LOGNORM, mu=mu, sigma=sigma)

    def integral(f):
        return scipy.integrate.quad(f, 0, 1, points=[0.01, 0.1, 0.5, 0.9, 0.99], limit=500)[0]

    gap = integral(lambda t: 2 * cdf(t) * (1 - cdf(t)))
    alpha = integral(lambda t: min((1 - t) ** 2, 5 * t**2) * 2 * cdf(t) * pdf(t))
    assert schedules.beta_lambda(quantile) == pytest.approx(1 / (1 - gap), rel=3e-5)
    mean = schedules.mean_over_v_samples(schedules.minsnr, quantile)
    assert mean == pytest.approx(alpha, rel=1e-5)
    if (mu, sigma) == (-0.4, 1.0):
        assert (gap, alpha) == pytest.approx((0.23342, 0.21548), abs=1e-5)


def test_a_new_alpha_is_a_choice_of_accel_and_has_mean_one(monkeypatch):
    monkeypatch.setitem(schedules.ALPHAS, "late", lambda t, gamma: gamma * t**3)
    args = train.parse_args(["--accel", "late", "--snr-gamma", "2"])
    schedule = schedules.Schedule(9, LOGNORM, args.accel, snr_gamma=args.snr_gamma)
    t, _, weight = schedule.sample(1_000_000, 0, 0)
    assert weight.mean().item() == pytest.approx(1, rel=0.01)
    assert_close(weight / weight[0], (t / t[0]) ** 3)
    with pytest.raises(ValueError, match="no accel early"):
        schedules.Schedule(9, LOGNORM, "early")


def test_gaps_lie_in_a_range_and_beta_has_mean_one_over_them_at_the_start():
    """Of uniform times, the gap g has density 2 (1 - g)."""
    uniform, g = schedules.TIME_SAMPLERS["uniform"], np.linspace(0.3, 0.5, 100_001)
    pairs = schedules.time_pairs(uniform, (0.3, 0.5))
    lam, gaps = schedules.beta_lambda(uniform, pairs), pairs[0] - pairs[1]
    assert lam == pytest.approx(1 / (1 - np.average(g, weights=1 - g)), rel=1e-3)
    assert schedules.beta(gaps, 1.0, lam).mean().item() == pytest.approx(1)
    t, r = schedules.sample_t_r(500, 500, uniform, pairs=pairs)
    gaps = (t - r)[500:]
    assert (t[:500] == r[:500]).all()
    assert 0.3 <= gaps.min() < 0.32 < 0.48 < gaps.max() < 0.5 + 1e-6
    assert 0 <= r.min() < 0.1 < 0.9 < t.max() <= 1


@pytest.mark.parametrize("mass", [1 / 20, 7 / 20, 1.0])
@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_times_follow_the_truncated_logit_normal(mass, sigma):
    """Kolmogorov-Smirnov against scipy: pairs with r < t pooled are the base distribution's upper
    end, and times with r = t the larger of two draws from it."""
    quantile, g = partial(LOGNORM, sigma=sigma), torch.Generator().manual_seed(0)
    t, r = schedules.sample_t_r(20_000, 20_000, quantile, torch.tensor(mass), generator=g)
    _, cdf = logit_normal(-0.4, sigma)

    def p(times, power):
        quantiles = (cdf(times.double().numpy()) - (1 - mass)) / mass
        return scipy.stats.kstest(quantiles**power, "uniform").pvalue

    assert p(torch.cat([t[20_000:], r[20_000:]]), 1) > 0.01
    assert p(t[:20_000], 2) > 0.01
    assert p(t[20_000:], 1) < 1e-6
    assert (t[:20_000] == r[:20_000]).all()
    assert (t[20_000:] > r[20_000:]).all()


@pytest.mark.parametrize(("losses", "stages"), [
    ([1.0] * 11 + [0.5] * 11 + [0.2] * 99, [1] * 10 + [2] * 11 + [3] * 11 + [4] * 89),
    ([1.0] * 9 + [0.0] + [1.0] * 10, [1] * 19 + [2]),  # one dip starts the count again
    ([1.0] * 5 + [0.0] + [0.5] * 30, [1] * 36),  # the smoothed loss falls, below no single one
    (range(1000, 750, -1), [1 + min(3 * step // 200, 3) for step in range(1, 251)]),  # the cap
])  # fmt: skip
def test_the_curriculum_moves_on_where_progress_ends_and_by_its_cap_at_last(losses, stages):
    """A stage's first loss is its best so far; ten more that are no better end it."""
    dtd = schedules.DTD(steps=1000, clusters=4, patience=10, cap=0.2)
    assert dtd.mass == 0.25
    for step, loss in enumerate(losses):
        dtd.update(torch.tensor(float(loss)), step)
        assert dtd.stage == stages[step]
        assert dtd.mass == stages[step] / 4


# ---------------------------------------------------------------------------- the U-Net


def drawn(w, name, like, *shape):
    """A weight of the dict w; one that it lacks is random."""
    if name not in w:
        w[name] = torch.randn(shape).to(like) / math.prod(shape[1:]) ** 0.5
    return w[name]


def linear(w, name, x, outputs):
    weight = drawn(w, f"{name}.weight", x, outputs, x.shape[-1])
    return F.linear(x, weight, drawn(w, f"{name}.bias", x, outputs))


def song_unet(w, z, r, t, augmentation=None, label=0.0, depth=4, width=128):
    """arXiv 2505.13447v1, App. A, by functions of weights w under the names in py-meanflow's files;
    those that w lacks are drawn. label: (B, 512)."""
    wide, sizes = 2 * width, [f"{z.shape[2] // n}x{z.shape[2] // n}" for n in (1, 2, 4)]

    def conv(name, x, outputs, kernel):
        weight = drawn(w, f"{name}.weight", x, outputs, x.shape[1], kernel, kernel)
        return F.conv2d(x, weight, drawn(w, f"{name}.bias", x, outputs), padding="same")

    def norm(name, x):
        affine = [drawn(w, f"{name}.{kind}", x, x.shape[1]) for kind in ("weight", "bias")]
        return F.group_norm(x, 32, *affine, eps=1e-6)

    def resample(name, x):  # along each axis by the filter 1 3 3 1
        w[f"{name}.resample_filter"], n = torch.ones(4), x.shape[2] * (2 if "_up" in name else 1)
        line = scipy.linalg.toeplitz([3, 1] + [0] * (n - 2), [3, 3, 1] + [0] * (n - 3))
        halve = torch.from_numpy(line[::2] / 8)  # (n / 2, n)
        return 4 * halve.T @ x @ halve if "_up" in name else halve @ x @ halve.T

    def block(name, x, c, attention=False):
        sized = resample if name.endswith(("up", "down")) else lambda name, x: x
        h = sized(f"{name}.conv0", F.silu(norm(f"{name}.norm0", x)))
        h = conv(f"{name}.conv0", h, wide, 3)
        h = norm(f"{name}.norm1", h + linear(w, f"{name}.affine", c, wide)[:, :, None, None])
        h = conv(f"{name}.conv1", F.silu(h), wide, 3)
        if sized is resample or x.shape[1] != wide:
            x = conv(f"{name}.skip", sized(f"{name}.skip", x), wide, 1)
        x = (h + x) / math.sqrt(2)
        if attention:
            h = conv(f"{name}.qkv", norm(f"{name}.norm2", x), 3 * wide, 1)
            q, k, v = h.flatten(2).chunk(3, 1)
            p = (q.mT @ k / wide**0.5).softmax(-1)  # (B, H W, H W)
            x = (x + conv(f"{name}.proj", (v @ p.mT).view(x.shape), wide, 1)) / math.sqrt(2)
        return x

    frequencies = torch.from_numpy(10000 ** (-np.arange(128) / 127))
    angles = torch.stack([t, t - r], 1)[..., None] * frequencies  # (B, 2, 128)
    c = torch.cat([angles.sin(), angles.cos()], -1).flatten(1) + label
    if augmentation is not None:
        c = c + augmentation @ drawn(w, "map_augment.weight", z, 512, 6).T
    for name in ("map_layer0", "map_layer1"):
        c = F.silu(linear(w, name, c, 4 * width))
    skips = [conv(f"enc.{sizes[0]}_conv", z, width, 3)]
    for level, s in enumerate(sizes):
        for name in ["down"] * (level > 0) + [f"block{i}" for i in range(depth)]:
            skips.append(block(f"enc.{s}_{name}", skips[-1], c, level == 1 and name != "down"))
    x = skips[-1]
    for level, s in reversed([*enumerate(sizes)]):
        for name in ["up"] if level < 2 else ["in0", "in1"]:
            x = block(f"dec.{s}_{name}", x, c, name == "in0")
        for i in range(depth + 1):
            x = torch.cat([x, skips.pop()], 1)
            x = block(f"dec.{s}_block{i}", x, c, level == 1 and i == depth)
    return conv(f"dec.{sizes[0]}_aux_conv", F.silu(norm(f"dec.{sizes[0]}_aux_norm", x)), 3, 3)


def test_the_unet_is_the_papers():
    """55.9 M parameters and 42.4 GFLOP a forward, of two for a product and its sum."""
    torch.manual_seed(0)
    net = build("unet", dict(shape=(3, 32, 32), classes=[]))
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 55_932_419
    with FlopCounterMode(display=False) as flops, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        u = net(torch.randn(1, 3, 32, 32), torch.tensor([0.2]), torch.tensor([0.7]), None)
    assert flops.get_total_flops() == pytest.approx(42.4e9, rel=0.001)
    assert 5e-6 < u.std() < 1.5e-5


@pytest.mark.parametrize("depth", [1, slow(4)])
def test_the_unet_is_py_meanflows_and_reads_its_files(tmp_path, monkeypatch, depth):
    """Of its three averages the one of its demo; at full depth all 417 tensors of its file."""
    monkeypatch.setitem(UNETS, "unet", (depth, 128))
    torch.manual_seed(0)
    size, w, state = 8 if depth == 1 else 32, {}, {}
    z, y = torch.randn(2, 3, size, size).double(), torch.randn(2, 7).double()
    r, t = torch.tensor([[0.1, 0.3], [0.9, 0.3]]).double()
    theirs = partial(song_unet, w, z, r, t, depth=depth)
    theirs(y[:, 1:])
    w |= {name: weight.float().double() for name, weight in w.items()}
    assert depth == 1 or len([name for name in w if "resample_filter" not in name]) == 417
    for other, front in enumerate(["net_ema1.", "net.", "net_ema.", "net_ema2."]):
        state |= {front + name: weight.float() + other for name, weight in w.items()}
    state = dict(sorted(state.items())) if depth == 1 else state  # as safetensors have them
    torch.save({"model": state, "epoch": 1, "args": argparse.Namespace(lr=1)}, tmp_path / "c.pth")
    net, found = load(tmp_path / "c.pth")
    assert re.search(r"model\.net_ema1 of (model\.net\w*(, )?){4}$", found["note"])
    pixels = dict(source="", vae=None, scale=1 / 127.5, shift=-1.0)
    assert found["meta"] == dict(shape=[3, size, size], classes=[]) | pixels
    same = partial(assert_close, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        same(net.double()(z, r, t, y), theirs(y[:, 1:]))
        same(net(z, r, t, None), theirs())
        # With classes, the label's embedding is added to the times'.
        classes = build("unet", found["meta"] | dict(classes=range(5))).double().eval()
        classes.load_state_dict(net.state_dict(), strict=False)
        y = torch.tensor([2, 5])
        same(classes(z, r, t, y), theirs(label=classes.label_embed.weight[y]))


@pytest.mark.slow
def test_a_step_of_the_unet_costs_what_its_parts_need():
    """In forwards, at the paper's share of r < t."""
    net = build("unet", dict(shape=(3, 32, 32), classes=[]))
    (x, e), y = torch.randn(2, 8, 3, 32, 32), torch.zeros(8, dtype=torch.long)
    t, r = schedules.sample_t_r(2, 6, LOGNORM)

    def cost(memory, loss, *batch):
        with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH), memory:
            loss(net, x, e, *batch)[0].backward()
        net.zero_grad()
        return 3 * flops.get_total_flops(), getattr(memory, "peak", None)

    base, of_base = cost(PeakMemory(), meanflow.loss, t, t, y, 0)
    ours, peak = cost(PeakMemory(), meanflow.loss, r, t, y, 6)
    textbook, _ = cost(contextlib.nullcontext(), meanflow.textbook_loss, r, t, y)
    ours, textbook = 3 * ours / base, 3 * textbook / base
    print("unet: forwards", ours, "textbook", textbook, "memory", peak / of_base)
    assert ours <= 4.53 < textbook
    assert peak <= 1.15 * of_base


def test_augmentation_moves_pictures_as_its_labels_say(monkeypatch):
    """On a smooth picture, against scipy's splines; whole pixels, and no transform, exactly."""
    place = torch.arange(32.0)
    wave = (0.2 * place[:, None] + 0.3).sin() * (0.15 * place[None] - 0.4).cos()
    x = torch.stack([wave, wave.T])[None].repeat(4000, 1, 1, 1)
    moved, labels = prepare_latents.augment(x, torch.Generator().manual_seed(0))
    plain = (labels[:, 1:] == 0).all(1)
    assert 0.6 < plain.float().mean() < 0.75
    for i in range(400):
        _, scale, sx, sy, dx, dy = labels[i].double().tolist()
        angle, shift = math.atan2(sy, sx), 4 * np.array([dy, dx])
        rotate = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        found = []
        for source in (x[0], x[0].flip(-1)):
            for w in (math.hypot(sx, sy), -math.hypot(sx, sy)):  # labels do not tell its sign
                matrix = rotate.T @ np.diag([2 ** (-0.2 * w), 2 ** (0.2 * w)]) @ rotate
                matrix = matrix[::-1, ::-1] / 2 ** (0.2 * scale)  # of rows, then columns
                move = partial(scipy.ndimage.affine_transform, matrix=matrix, mode="mirror")
                offset = 15.5 - matrix @ (15.5 + shift)
                expected = np.stack([move(c.double().numpy(), offset=offset) for c in source])
                found.append(np.abs(moved[i].numpy() - expected).max())
        assert min(found) < (1e-6 if plain[i] else 0.05), labels[i]
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.ones(shape))  # a shift of 4
    chance = torch.full((6, 1), 0.5)
    chance[5] = 0
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: chance if len(shape) == 2 else chance[0])
    moved, _ = prepare_latents.augment(x[:1], None)
    assert_close(moved[0, :, 4:, 4:], x[0, :, :-4, :-4], rtol=0, atol=2e-5)


def test_augmentation_has_the_shares_of_edm():
    x = torch.zeros(100_000, 1, 2, 2)
    _, labels = prepare_latents.augment(x, torch.Generator().manual_seed(0))
    straight = labels[:, 2].ne(0) & labels[:, 3].eq(0)
    shares = torch.column_stack([labels != 0, straight]).double().mean(0)
    expected = torch.tensor([0.5, 0.12, 0.12, 0.06, 0.12, 0.12, 0.06]).double()
    assert_close(shares, expected, rtol=0, atol=0.004)
    assert set(labels[:, 0].tolist()) == {0, 1}
    stretch = labels[:, 2:4].norm(dim=1) * labels[:, 2].sign()
    for column in (labels[:, 1], stretch, *labels[:, 4:].T):
        assert column[column != 0].std().item() == pytest.approx(1, abs=0.03)


def test_cifars_binary_version_becomes_a_dataset(tmp_path, capsys):
    """A byte for the label and 3,072 for the picture, by channels and rows."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    records = np.random.default_rng(0).integers(0, 256, (12, 3073), np.uint8)
    records[:, 0] = [*range(10), 9, 0]
    for part, rows in enumerate(np.array_split(records, 5), start=1):
        rows.tofile(folder / f"data_batch_{part}.bin")
    records[:1].tofile(folder / "test_batch.bin")
    tar = Path(shutil.make_archive(folder, "gztar", tmp_path, folder.name))
    for source in (folder, tar):
        data = prepare(source, tmp_path / f"labelled{source.suffix}")
        assert (data.images == records[:, 1:].reshape(12, 3, 32, 32)).all()
        assert (data.labels == records[:, 0]).all()
        assert data.meta["classes"][9] == "truck"
        plain = prepare(source, tmp_path / f"plain{source.suffix}", "--unconditional", "--flip")
        assert (plain.images[12:] == data.images[..., ::-1]).all()
        assert (plain.meta["classes"], plain.labels.max(), plain.epoch_length) == ([], 0, 12)
    (folder / "data_batch_2.bin").unlink()
    with open(tar, "r+b") as file:
        file.seek(9000)
        file.write(bytes(40))
    for source, words in [(folder, "no whole data_batch_2.bin"), (tar, "is no whole .tar.gz file")]:
        refusal(capsys, 1, words, prepare_latents, source, "--out", tmp_path / "none")


# ---------------------------------------------------------------------------- data and VAE


def prepare(source, out, *flags):
    call(prepare_latents, source, "--out", out, "--workers", 2, *flags)
    return prepare_latents.Dataset(out)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A miniature ImageNet: 200 real photographs in 10 classes, of many sizes and modes."""
    package = importlib.util.find_spec("ai_benchmark") or pytest.skip("ai-benchmark is missing")
    root = tmp_path_factory.mktemp("photographs")
    kinds = ["RGB JPEG", "L jpg", "CMYK jpeg", "P png", "RGBA webp"]
    files = sorted(Path(package.submodule_search_locations[0]).rglob("*.jpg"))
    for i, file in enumerate(files[:200]):
        image, folder = Image.open(file), root / f"class {i % 10}"
        image.thumbnail((60 + i, 260 - i))
        mode, suffix = kinds[i // 10 % 5].split()
        folder.mkdir(exist_ok=True)
        image.convert(mode).save(folder / f"{i}.{suffix}")
    return root


def test_the_built_in_pictures_are_deterministic_balanced_and_varied(glyphs, tmp_path):
    data = prepare_latents.Dataset(glyphs)
    again = prepare("glyphs", tmp_path / "again", "--count", 200)
    other = prepare("glyphs", tmp_path / "other", "--count", 200, "--seed", 1)
    assert (data.images[:] == again.images[:]).all()
    assert len(np.unique(np.concatenate([data.images[:], other.images[:]]), axis=0)) == 400
    assert (data.labels == np.arange(200) % 10).all()
    assert (data.images.min(), data.images.max() > 240) == (0, True)


@pytest.mark.parametrize("flat", [False, True])
def test_a_folder_of_images_is_stored_pixel_by_pixel(tmp_path, flat):
    folders, classes = ["cat", "dög with space/deep"], ["cat", "dög with space"]
    rows, labels = [0, 2, 1, 3], [0, 0, 1, 1]
    if flat:  # unconditional
        folders, classes, rows, labels = ["", ""], [], [0, 1, 2, 3], [0, 0, 0, 0]
    pictures = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    for i, picture in enumerate(pictures):
        folder = tmp_path / "images" / folders[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{i}.png")
    for _ in range(2):  # again: nothing is left to do
        data = prepare(tmp_path / "images", tmp_path / "set", "--size", 8)
        assert (data.meta["classes"], data.labels.tolist()) == (classes, labels)
        assert (data.images[:] == pictures[rows].transpose(0, 3, 1, 2)).all()
    Image.new("RGB", (8, 8)).save(folder / "new.png")
    with pytest.raises(SystemExit, match="differs in count, files; remove it or name another"):
        prepare(tmp_path / "images", tmp_path / "set", "--size", 8)
    assert len(prepare_latents.Dataset(tmp_path / "set")) == 4


def test_pictures_are_halved_then_resized_then_cropped_to_their_centre():
    """A line of pixels is cut before it is enlarged."""
    rng, sizes = np.random.default_rng(0), [(40, 100, 3), (24, 16, 3), (1, 20_000, 3)]
    wide, tall, line = (rng.integers(0, 256, size, dtype=np.uint8) for size in sizes)

    def bicubic(picture, *size):
        x = rearrange(torch.from_numpy(picture).float(), "h w c -> 1 c h w")
        x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 255)
        return rearrange(x, "1 c h w -> h w c").numpy()

    quarter = wide.reshape(10, 4, 25, 4, 3).mean((1, 3))  # halved twice
    middle, resize = bicubic(line[:, 9995:10005], 64, 640)[:, 288:352], Image.Image.resize
    for picture, expected, most in [  # rounded four times, and once
        (wide, quarter[:, 7:17], 2), (tall, bicubic(tall, 18, 12)[3:15], 2), (line, middle, 1),
    ]:  # fmt: skip
        with mock.patch.object(Image.Image, "resize", autospec=True, side_effect=resize) as resized:
            crop = prepare_latents.center_crop(Image.fromarray(picture), len(expected))
        assert max(math.prod(call.args[1]) for call in resized.mock_calls) < 100_000  # not 82 M
        assert np.abs(np.asarray(crop, float) - expected).max() <= most


def test_every_mode_of_picture_is_read_as_a_viewer_shows_it(tmp_path):
    """Whatever lies beside the pixels; unknown ranges are refused."""
    colours, text = np.zeros((6, 8, 3), np.uint8), PngImagePlugin.PngInfo()
    colours[:, :4], colours[:, 4:] = (200, 40, 40), (40, 40, 200)  # red beside blue
    text.add_text("long", "x" * 2**21, zip=True)
    picture = Image.fromarray(colours)
    grey = np.asarray(picture.convert("L"))[..., None]
    for name, image, options, expected in [
        ("palette.png", picture.quantize(4), {}, colours),
        ("alpha.png", picture.convert("RGBA"), {}, colours),
        ("cmyk.jpg", picture.convert("CMYK"), dict(quality=100, subsampling=0), colours),
        ("grey.png", picture.convert("L"), {}, grey),
        ("16 bits.png", Image.fromarray(grey[..., 0].astype(np.uint16) * 256), {}, grey),
        ("exif.png", picture, dict(exif=b"nonsense"), colours),
        ("text.png", picture, dict(pnginfo=text), colours),
    ]:
        image.save(tmp_path / name, **options)
        seen = prepare_latents.read_image(tmp_path / name).transpose(1, 2, 0)
        assert np.abs(seen.astype(int) - expected).max() <= (8 if "jpg" in name else 0), name
    for kind in (np.int32, np.float32):
        Image.fromarray(np.ones((8, 8), kind)).save(tmp_path / "x.tif")
        with pytest.raises(ValueError, match="no known range"):
            prepare_latents.read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_pictures_are_turned_as_a_viewer_turns_them(tmp_path, mode):
    """Pillow itself turns TIFFs alone."""
    grey = np.random.default_rng(0).integers(0, 2, (6, 8), dtype=np.uint8) * 255
    picture = Image.fromarray(grey if mode != "I;16" else grey.astype(np.uint16) * 256)
    picture = picture.convert(mode) if mode != "I;16" else picture
    turns = [lambda a: a, np.fliplr, lambda a: np.rot90(a, 2), np.flipud, np.transpose]
    turns += [lambda a: np.rot90(a, -1), lambda a: np.rot90(a, 2).T, np.rot90]
    for orientation, turn in enumerate(turns, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for name in ("x.tif", "x.png" if mode != "CMYK" else "y.tif"):
            picture.save(tmp_path / name, exif=exif)
            seen = prepare_latents.read_image(tmp_path / name)
            assert (seen == turn(grey)).all(), (name, orientation)


def names_in(folder, *names):
    """Makes a folder with these files, pictures where their names say so."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if Path(name).suffix in (".png", ".jpg", ".jfif", ".tga", ".pgm"):
            kind = dict(format="JPEG") if name.endswith("jfif") else {}
            Image.new("L", (8, 8), 50).save(folder / name, **kind)
        else:
            (folder / name).write_text("text")
    return folder


def test_what_a_folder_holds_and_what_is_left_out_is_said(tmp_path, capsys):
    names = ["a/1.jfif", "b/2.tga", "c/3.pgm", "d/notes.txt", "e/4", "f/.5.png", "@eaDir/6.png"]
    names += ["#1/9.png", "c/meta.json", "$RECYCLE.BIN/7.png", "b/.hidden/8.png"]
    root = names_in(tmp_path / "in", *names)
    (root / "empty").mkdir()
    prepare(names_in(tmp_path / "other", "1.png"), root / "old set", "--size", 8)
    capsys.readouterr()
    for datasets in "12":  # the second finds the first's dataset, and continues it
        data = prepare(root, root / "set", "--size", 8)
        assert data.meta["classes"] == ["#1", "a", "b", "c"]
        line, count = capsys.readouterr().out.splitlines()[:2]
        assert count == f"{root}: 4 pictures of 4 classes"
        left_out = {"4 hidden or system files", "1 empty folders", "1 .txt"}
        left_out |= {"1 files without a suffix", f"{datasets} datasets"}
        assert left_out <= set(line.split(": left out ")[1].split(", "))


def test_folders_that_cannot_be_walked_are_refused(tmp_path, monkeypatch, capsys):
    root = names_in(tmp_path / "in", "a/1.png")
    flags = prepare_latents, root, "--size", 8, "--out"
    for name, target, words in [
        ("a/up", "..", "a/up is a link to a folder around it"),
        ("b", "nowhere", "b is a link to what does not exist"),
    ]:
        (root / name).symlink_to(target)
        refusal(capsys, 1, words, *flags, tmp_path / "none")
        (root / name).unlink()
    (root / "twice").symlink_to("a")  # a link beside a folder is none
    assert prepare(root, tmp_path / "set", "--size", 8).meta["classes"] == ["a", "twice"]
    denied = PermissionError(13, "Permission denied", "in/a")
    monkeypatch.setattr(os, "scandir", mock.Mock(side_effect=denied))
    refusal(capsys, 1, "in/a cannot be listed: Permission denied", *flags, tmp_path / "none")


@pytest.mark.parametrize("lost", [False, True])
def test_an_unreadable_image_is_named_and_stops_the_run_or_is_skipped(tmp_path, capsys, lost):
    root, out = names_in(tmp_path / "in", "1.png", "2.png"), tmp_path / "set"
    bad = names_in(tmp_path / "in", "3.png") / "3.png"
    bad.write_text("no picture")
    flags = [root, "--out", out, "--workers", 2, "--size", 4, "--batch-size", 1]
    refusal(capsys, 1, "3.png cannot be read", prepare_latents, *flags)
    refusal(capsys, 1, "is unfinished; run", train, *tiny(out, tmp_path / "run"))
    if lost:  # as where the disk was full while they were made
        (out / "images.npy").unlink()
        (out / "labels.npy").unlink()
    call(prepare_latents, *flags, "--skip-unreadable")
    data, (said, err) = prepare_latents.Dataset(out), capsys.readouterr()
    assert lost or re.search("[12] of 3 pictures are done already", said)
    assert re.search(r"skipped: .*3\.png", err)
    assert (len(data), data.images[:2].min(), data.images[:2].max()) == (2, 50, 50)
    (root / "1.png").unlink()
    (root / "2.png").unlink()
    flags[2] = tmp_path / "none"
    refusal(capsys, 1, "in holds no readable", prepare_latents, *flags, "--skip-unreadable")


def test_a_read_that_never_ends_does_not_keep_the_script_from_ending(tmp_path):
    """One thread waits for the data of a pipe; another finds a file that is no picture."""
    names_in(tmp_path / "in", "2.png")
    os.mkfifo(tmp_path / "in/1.png")
    (tmp_path / "in/0.png").write_text("no picture")
    flags = [tmp_path / "in", "--out", tmp_path / "set", "--batch-size", 1, "--workers", 2]
    options = dict(start=subprocess.Popen, stderr=subprocess.PIPE, text=True)
    job = torchrun(1, "prepare_latents.py", *flags, **options)
    try:
        assert "0.png cannot be read" in job.communicate(timeout=60)[1]
    finally:
        job.kill()
    assert job.returncode == 1


def test_python_ends_while_threads_read():
    read = "lambda i: torch.ones(2**18).mul_(2)"
    code = f"import torch, sys, prepare_latents as p; next(p.read_ahead({read}, range(10**9), 4))"
    for _ in range(4):
        job = subprocess.run([sys.executable, "-c", f"{code}; sys.exit(3)"], cwd=HERE)
        assert job.returncode == 3  # and it is not aborted


def random_vae(path):
    """A small VAE with random weights, in a file."""
    torch.manual_seed(0)
    vae = prepare_latents.VAE((32, 32, 32, 64))
    for parameter in vae.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.0)
    torch.save(vae.state_dict(), path)
    return path


@pytest.mark.slow
def test_the_vae_equals_the_one_of_diffusers_under_old_and_new_names(tmp_path):
    torch.manual_seed(0)
    theirs = peer("diffusers").AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.3, 1.0)
    theirs.save_pretrained(tmp_path)  # diffusion_pytorch_model.safetensors
    state = theirs.state_dict()
    assert sum(weight.numel() for weight in state.values()) == 83_653_863
    torch.save(state, tmp_path / "new.bin")
    for new, old in [("q", "query"), ("k", "key"), ("v", "value"), ("out.0", "proj_attn")]:
        state = {name.replace(f".to_{new}.", f".{old}."): w for name, w in state.items()}
    torch.save(state, tmp_path / "old.pt")
    images = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        expected = posterior.mean, posterior.logvar, theirs.decode(posterior.mean).sample
    assert posterior.mean.std() > 0.1
    for name in ("new.bin", "old.pt", "diffusion_pytorch_model.safetensors"):
        ours = prepare_latents.load_vae(tmp_path / name)
        found = *ours.encode(images), ours.decode(posterior.mean)
        assert_close(found, expected, rtol=0, atol=1e-4)


def test_weights_must_fit_without_gap_or_remainder(tmp_path):
    file = random_vae(tmp_path / "vae.pt")
    state, name, prints = torch.load(file), "encoder.conv_in.bias", []
    for changed in ("decoder.conv_in.bias", "post_quant_conv.bias", "quant_conv.bias", name):
        torch.save(state | {changed: state[changed] + 1}, file)
        prints.append(prepare_latents.load_vae(file).fingerprint())
    assert (prints[0], len(set(prints))) == (prints[1], 3)  # only encoders make latents
    for wrong, words in [
        (without(state, name), f"lacks 1 weights, {name}"),
        (state | {"extra": torch.zeros(1)}, "has unknown 1 weights, extra"),
        (state | {name: torch.zeros(3)}, f"has misshapen 1 weights, {name}"),
        (state | {name: state[name].to(torch.int8)}, f"has misshapen 1 weights, {name}"),
        ({"encoder.conv_in.weight": torch.zeros(1)}, "has encoder.conv_in.weight ... but no de"),
        ({"first_stage_model.decoder.conv_in.weight": torch.zeros(1)}, "no VAE with diffusers'"),
    ]:
        torch.save(wrong, file)
        with pytest.raises(SystemExit, match=f"vae.pt .*{words}"):
            prepare_latents.load_vae(file)


def test_safetensors_are_read_as_their_own_library_wrote_them(tmp_path):
    path, save_file = tmp_path / "a.safetensors", pytest.importorskip("safetensors.torch").save_file
    tensors = {"half": torch.randn(3, 5).half(), "brain": torch.randn(7).bfloat16()}
    tensors |= {"int": torch.arange(6).view(2, 3), "one": torch.ones(())}
    others = {"none": torch.ones(0, 3), "eight": torch.ones(2).to(torch.float8_e4m3fn)}
    save_file(tensors | others | {"short": torch.ones(3).short()}, tmp_path / "B.SafeTensors")
    assert load_file(tmp_path / "B.SafeTensors").keys() == tensors.keys()  # without the others
    save_file(tensors, path, metadata={"format": "pt"})
    assert_close(load_file(path), tensors, rtol=0, atol=0)
    whole = path.read_bytes()
    for wrong in (whole[:-1], whole[:40], b"", whole[8:], whole.replace(b"[48,52]", b"[-8,-4]")):
        path.write_bytes(wrong)
        with pytest.raises(SystemExit, match=r"a\.safetensors is no whole file of weights"):
            load_file(path)


def test_another_vae_shows_by_its_spread_and_a_damaged_one_is_refused(tmp_path, capsys):
    root, vae = names_in(tmp_path / "in", "1.png", "2.png"), random_vae(tmp_path / "vae.pt")
    data = prepare(root, tmp_path / "set", "--vae", vae, "--size", 32)
    found = re.search("standard deviation of latents (\\S+); it", capsys.readouterr().out)[1]
    drawn = prepare_latents.network_input(torch.from_numpy(np.array(data.images)), data.meta)
    assert float(found) == pytest.approx(drawn.std().item(), rel=0.2)
    torch.save({name: weight * np.nan for name, weight in torch.load(vae).items()}, vae)
    with pytest.raises(SystemExit, match="latents that are no numbers: are its weights damaged"):
        prepare(root, tmp_path / "other", "--vae", vae, "--size", 32)


def test_latents_are_the_posterior_of_the_crops_and_are_drawn_afresh(photographs, tmp_path):
    vae_file, files = random_vae(tmp_path / "vae.pt"), sorted(photographs.rglob("*.*"))
    flags, kinds = ["--vae", vae_file, "--size", 32, "--flip", "--dtype"], ("float16", "float32")
    half, data = (prepare(photographs, tmp_path / kind, *flags, kind) for kind in kinds)
    assert_close(np.array(half.images), data.images.astype(np.float16), rtol=0, atol=0)  # types too
    assert (data.labels == np.tile(np.repeat(range(10), 20), 2)).all()
    assert (data.epoch_length, data.meta["scale"]) == (200, 0.18215)
    vae = prepare_latents.load_vae(vae_file)
    for row, step in [(1, 1), (130, 1), (201, -1)]:
        image = prepare_latents.center_crop(Image.open(files[row % 200]).convert("RGB"), 32)
        pixels = np.asarray(image)[:, ::step].transpose(2, 0, 1)[None] / 127.5 - 1
        mean, logvar = vae.encode(torch.tensor(pixels, dtype=torch.float32))
        expected = torch.cat([mean[0], logvar[0].exp().sqrt()]).numpy()
        assert_close(np.array(data.images[row]), expected, rtol=1e-4, atol=1e-4)
    stored = torch.tensor([2.0, 0.5]).view(1, 2, 1, 1).expand(100_000, 2, 1, 1)
    x = [prepare_latents.network_input(stored, dict(scale=0.5, vae="x")) for _ in range(2)]
    assert scipy.stats.kstest(x[0].flatten(), "norm", (1.0, 0.25)).pvalue > 0.01
    assert abs(np.corrcoef(x[0].flatten(), x[1].flatten())[0, 1]) < 0.02


# ---------------------------------------------------------------------------- sample.py


@pytest.fixture(scope="session")
def checkpoint(glyphs, tmp_path_factory):
    """last.pt of a few steps, after which the EMA still differs from the network."""
    out = tmp_path_factory.mktemp("run")
    run(glyphs, out, "--steps", 5, "--warmup", 0, "--ema-decay", 0.5)
    return out / "last.pt"


def sampled(checkpoint, out, *flags):
    """sample.main; returns the pictures of an .npz, else the path."""
    call(sample, checkpoint, "--out", out, *flags)
    return np.load(out)["arr_0"].astype(int) if out.suffix == ".npz" else out


def test_a_picture_depends_on_its_seed_and_index_alone(checkpoint, tmp_path):
    def draw(name, *flags):
        return sampled(checkpoint, tmp_path / name, "--num", 12, *flags)

    whole = draw("a.npz")
    # x = e - u(e, 0, 1, y) of the EMA network, rounded down as in the papers' evaluation.
    e, y = sample.noise(range(12), (1, 16, 16)), torch.arange(12) % 10
    assert scipy.stats.kstest(e.flatten(), "norm").pvalue > 0.01
    assert len(e.unique()) > 3000  # of 12 x 256
    net, state = load(checkpoint)
    assert_close(net.state_dict(), state["ema"], rtol=0, atol=0)
    x = (e - net(e, torch.zeros(12), torch.ones(12), y)).permute(0, 2, 3, 1).detach().numpy()
    assert np.abs(whole - np.floor(127.5 * x + 128).clip(0, 255)).max() <= 1
    assert prepare_latents.to_pixels(torch.tensor([-2, 0, 0.999, 2])).tolist() == [0, 128, 255, 255]
    assert np.abs(whole - draw("b.npz", "--batch-size", 5)).max() <= 1  # other rounding
    assert 0 < np.abs(whole - draw("c.npz", "--dtype", "bfloat16")).max() <= 8
    assert (draw("d.npz", "--seed", 1) != whole).mean() > 0.5
    four, euler = draw("e.npz", "--nfe", 4), draw("f.npz", "--nfe", 4, "--velocity")
    assert min((four != whole).mean(), (four != euler).mean(), (euler != whole).mean()) > 0
    files = sorted(draw("pictures").glob("*.png"))
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(12)]
    assert (np.stack([np.asarray(Image.open(file)) for file in files]) == whole[..., 0]).all()
    assert Image.open(draw("grid.png", "--classes", 3, 5)).size == (2 * 64, 6 * 64)
    for name in ("a.npz", "pictures"):
        with pytest.raises(SystemExit, match="holds other pictures; remove it or name another"):
            draw(name, "--nfe", 3)
    assert (draw("a.npz") == whole).all()
    keys = [(5,), (5, 0), (5, 0, 0), (0, 5)]  # train.py's are longer: other noise than here
    assert len({sample.keyed_generator(*key).initial_seed() for key in keys}) == 4


def test_interrupted_sampling_goes_on_to_the_same_file(checkpoint, tmp_path, monkeypatch):
    """And leaves what is not its own."""

    def draw(name):
        sampled(checkpoint, tmp_path / name, "--num", 20, "--batch-size", 4, "--random-classes")

    def save_some(paths, pixels):
        if len(saved) == allowed:
            raise KeyboardInterrupt
        saved.append(int(paths[0].stem))
        save(paths, pixels)

    save, saved, allowed = sample.save_batch, [], 99
    monkeypatch.setattr(sample, "save_batch", save_some)
    names_in(tmp_path, "whole.npz.parts/mine.txt")
    for name in ("whole.npz", "x.png", "x.png"):  # its own picture is replaced
        draw(name)
    for name in ("cut.npz", "cut"):
        saved, allowed = [], 2
        with pytest.raises(KeyboardInterrupt):
            draw(name)
        assert not (tmp_path / name).is_file()
        allowed = 9
        draw(name)
        draw(name)  # again: nothing is left to do
        assert saved == [0, 4, 8, 12, 16]  # none of them twice
    assert (tmp_path / "cut.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    left = [path.name for end in ("", "/*") for path in tmp_path.glob(f"*.parts{end}")]
    assert left == ["whole.npz.parts", "mine.txt"]
    (tmp_path / "cut" / "000005.png").unlink()
    draw("cut")
    assert saved[5:] == [4]


def test_pictures_without_classes_train_unguided_and_are_drawn(colours, tmp_path, monkeypatch):
    monkeypatch.setattr(meanflow, "guided_velocity", None)
    state = run(colours, tmp_path, "--steps", 2)
    assert len(state["net"]["label_embed.weight"]) == 1  # the null label's
    draw = partial(sampled, tmp_path / "last.pt")
    assert draw(tmp_path / "x.npz", "--num", 3).shape == (3, 8, 8, 3)
    assert Image.open(draw(tmp_path / "x.png", "--num", 9)).size == (3 * 64, 3 * 64)


# ---------------------------------------------------------------------------- public weights

PUBLIC = {  # the time embedders' names, and what they are told
    "t,t-r": {"t_embedder": lambda r, t: t, "h_embedder": lambda r, t: t - r},
    "t,t-r again": {"t_embedder": lambda r, t: t, "r_embedder": lambda r, t: t - r},
    "SiT": {"t_embedder": lambda r, t: 1 - t},
    "SiT without variance": {"t_embedder": lambda r, t: 1 - t},
}


def public_weights(kind, model, channels=4, size=32, classes=1000):
    """Random weights of a network of the papers, under the names and shapes of public files."""
    torch.manual_seed(0)
    z, t = torch.randn(1, channels, size, size), torch.rand(1)
    public_network(w := {}, kind, model, z, t, t, torch.tensor([0]), classes)
    w["pos_embed"] = w["pos_embed"].float().to(z)  # ours are float32
    return w


def public_network(w, kind, model, z, r, t, y, classes=1000):
    """What the files' own code computes, by torch's functions; of SiT its velocity x - e. Weights
    that w lacks are drawn."""
    (depth, width, heads, patch), (_, channels, size, _) = CONFIGS[model], z.shape

    def modulated(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    c = drawn(w, "y_embedder.embedding_table.weight", z, classes + 1, width)[y]
    for name, time_of in PUBLIC[kind].items():
        angles = time_of(r, t)[:, None] * torch.exp(-math.log(10000) / 128 * torch.arange(128))
        h = linear(w, f"{name}.mlp.0", torch.cat([angles.cos(), angles.sin()], 1), width)
        c = c + linear(w, f"{name}.mlp.2", F.silu(h), width)
    kernel = drawn(w, "x_embedder.proj.weight", z, width, channels, patch, patch)
    x = F.conv2d(z, kernel, drawn(w, "x_embedder.proj.bias", z, width), stride=patch)
    x = x.flatten(2).mT + drawn(w, "pos_embed", z, 1, (size // patch) ** 2, width)
    for block in (f"blocks.{i}" for i in range(depth)):
        m = linear(w, f"{block}.adaLN_modulation.1", F.silu(c), 6 * width)[:, None].chunk(6, -1)
        qkv = linear(w, f"{block}.attn.qkv", modulated(x, m[0], m[1]), 3 * width)
        q, k, v = rearrange(qkv, "b n (s h d) -> s b h n d", s=3, h=heads)
        h = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        h = linear(w, f"{block}.attn.proj", rearrange(h, "b h n d -> b n (h d)"), width)
        x = x + m[2] * h
        h = linear(w, f"{block}.mlp.fc1", modulated(x, m[3], m[4]), 4 * width)
        x = x + m[5] * linear(w, f"{block}.mlp.fc2", F.gelu(h, approximate="tanh"), width)
    m = linear(w, "final_layer.adaLN_modulation.1", F.silu(c), 2 * width)[:, None].chunk(2, -1)
    outputs = channels * (2 if kind == "SiT" else 1)  # its variance is learned
    x = linear(w, "final_layer.linear", modulated(x, *m), patch**2 * outputs)
    sizes = dict(h=size // patch, p=patch, q=patch)
    x = rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", **sizes)
    return x[:, :channels]


@pytest.mark.parametrize(("kind", "model", "dtype"), [
    *((kind, "tiny", torch.float64) for kind in PUBLIC),
    slow("t,t-r", "B/4", torch.float64),
    slow("SiT", "XL/2", torch.float32),
])  # fmt: skip
def test_public_weights_give_what_their_own_code_computes(tmp_path, kind, model, dtype):
    torch.set_default_dtype(dtype)
    try:
        w, path = public_weights(kind, model), tmp_path / "public.pth"
        torch.save({"ema": w, "opt": [], "args": argparse.Namespace(lr=1)}, path)
        net, found = load(path)
        z, r, t = torch.randn(2, 4, 32, 32), torch.tensor([0.2, 0.3]), torch.tensor([0.3, 0.9])
        batch = z, r, t, torch.tensor([7, 1000])  # and the null label
        with torch.no_grad():
            theirs, ours = public_network(w, kind, model, *batch), net(*batch)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found["args"] == dict(model=model, conditioning="t,t-r")
    assert found["meta"]["shape"] == [4, 32, 32]
    assert len(found["meta"]["classes"]) == 1000
    error = (ours - (-theirs if "SiT" in kind else theirs)).norm() / theirs.norm()
    assert error < (1e-12 if dtype == torch.float64 else 1e-5)


def without(state, part):
    return {name: value for name, value in state.items() if part not in name}


def under(front, state):
    return {front + name: value for name, value in state.items()}


def predicts_its_input(state):
    """DiT's names, and what is left of its output at the last step: the noise that it is given."""
    for name in without(state, "embed"):
        state[name] *= 0
    first = 30 * torch.linalg.qr(torch.randn(128, 16))[0].view(128, 1, 4, 4)
    last = torch.stack([first[:, 0], 0 * first[:, 0]], -1)  # (D, p, q, c)
    return state | {"x_embedder.proj.weight": first, "final_layer.linear.weight": last.flatten(1).T}


@pytest.mark.parametrize(("kind", "change", "words"), [
    ("SiT", lambda s: without(s, "blocks.3."), "no --model has 3 blocks of width 128"),
    ("t,t-r", lambda s: without(s, "h_embedder.mlp.2"), "lacks 2 weights, time_embed.1.mlp.2"),
    ("t,t-r", lambda s: {"a": without(s, "x_emb")}, "has a.y_embedder.embedding_table.weight, a.t"),
    ("t,t-r", lambda s: without(s, "pos_embed"), "KeyError('pos_embed')"),
    ("t,t-r", lambda s: s | {"noise_labels_embedder.b": s["pos_embed"]}, "alphaflow's"),
    ("SiT", predicts_its_input, "predicts the noise, as DiT does"),
    ("SiT", lambda s: {"a": s, "adam": {"exp_avg": s}}, "no average: a, adam.exp_avg"),
])  # fmt: skip
def test_public_weights_that_do_not_fit_are_refused(tmp_path, capsys, kind, change, words):
    torch.save(change(public_weights(kind, "tiny", 1, 16, 10)), tmp_path / "public.pt")
    refusal(capsys, 1, words, sample, tmp_path / "public.pt", "--out", tmp_path / "x.png")


NESTED = {  # of weights w and their average a: what training scripts save, and what the note says
    "plain": (lambda w, a: a, "no average found"),
    "model_ema": (lambda w, a: {"model": w, "model_ema": a}, "model_ema"),
    "ema_state_dict": (lambda w, a: {"state_dict": w, "ema_state_dict": a}, "ema_state_dict"),
    "shadow": (lambda w, a: {"net": w, "ema": {"decay": 0.99, "shadow": a}}, "ema.shadow"),
    "one dict": (lambda w, a: {"all": under("net.", w) | under("ema_net.", a)}, "all.ema_net"),
    "AveragedModel": (
        lambda w, a: {"a": w, "b": {"n_averaged": torch.tensor(3)} | under("module.", a)},
        "(average)",
    ),
    "none": (lambda w, a: {"model": a, "ema": None, "ema_decay": 0.9}, " (no average found)"),
    "Adam": (lambda w, a: {"model": a, "adam": {"exp_avg": {}}, "opt": {"ema": w}}, "model"),
    "list": (lambda w, a: {"model": a, "shadow_params": [*w.values()]}, "shadow_params cannot"),
}


@pytest.mark.parametrize("front", ["", "module.", "_orig_mod.module.", "model._orig_mod.", "in"])
@pytest.mark.parametrize("nested", NESTED)
def test_the_average_is_found_in_any_wrapping(tmp_path, front, nested):
    plain, (wrap, words) = public_weights("t,t-r", "tiny", 1, 16, 10), NESTED[nested]
    wrapped = under(front, plain)
    if front == "in":  # a compiled block
        wrapped = {name.replace("blocks.0.", "blocks.0._orig_mod."): w for name, w in plain.items()}
    torch.save(wrap({name: 0 * w for name, w in wrapped.items()}, wrapped), tmp_path / "x.pt")
    torch.save(plain, tmp_path / "plain.pt")
    (net, found), (expected, _) = load(tmp_path / "x.pt"), load(tmp_path / "plain.pt")
    assert_close(net.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert words in found["note"].split("weights: ")[1]


class Payload:
    """Runs a command where it is unpickled as pickle does."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_no_code_in_a_file_is_executed_and_its_weights_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = public_weights("t,t-r", "tiny", 1, 16, 10)
    beside = [argparse.Namespace(lr=1), np.float64(1), np.random.get_state(), Path("a")]
    beside += [Objective(c=collections.defaultdict(list, a=[1])), {np.int64(3): 1}, {Path("a")}]
    beside += [collections.defaultdict(dict, a={}), Payload(eval, "open('trace', 'w')")]
    for value in beside:
        torch.save({"ema": state, "beside": value}, "x.pt")
        assert load("x.pt")[1]["note"].endswith("weights: ema")
    run_command, tensors = Payload(os.system, "touch trace"), {"epoch": 1, "w": {}, "ema": state}
    read = "{k: torch.load('x.pt', weights_only=False)[k] for k in ['w', 'ema']}"
    for value in (run_command, collections.deque("ab")):
        torch.save(tensors | {"beside": value}, "x.pt")
        words = "more than tensors (epoch, w, ema, beside); if you trust it, read the new.pt of "
        words += f'torch.save({read}, "new.pt")'
        refusal(capsys, 1, words, sample, "x.pt", "--out", "x.png")
    exec(f"torch.save({read}, 'new.pt')")  # the advice, with the list
    assert_close(load_file("new.pt"), {"w": {}, "ema": state}, rtol=0, atol=0)
    torch.save(state, "x.pt", pickle_protocol=4)
    refusal(capsys, 1, "torch.save(dict(torch.load('x.pt', ", sample, "x.pt", "--out", "x.png")
    torch.save([run_command], "x.pt")
    refusal(capsys, 1, "is damaged, or more than tensors", sample, "x.pt", "--out", "x.png")
    assert not Path("trace").exists()
    torch.load("x.pt", weights_only=False)
    assert Path("trace").exists()  # so the payload works


def test_a_run_starts_from_weights_of_any_kind_and_exported_ones_draw(checkpoint, glyphs, tmp_path):
    path, sit = tmp_path / "net.pt", tmp_path / "sit.pt"
    call(sample, checkpoint, "--export", path)
    drawn = [sampled(net, tmp_path / f"{net.stem}.png").read_bytes() for net in (checkpoint, path)]
    assert drawn[0] == drawn[1]
    kept = torch.load(path, weights_only=True)
    assert set(kept) == {"ema", "meta", "step", "args", "format"}
    assert set(kept["args"]) == {"model", "conditioning"}  # no paths of the run
    torch.save(public_weights("SiT", "tiny", 1, 16, 10), sit)
    for given in (checkpoint, path, sit):
        flags = ["--steps", 1, "--lr", 1e-12, "--init-from", given]
        state = run(glyphs, tmp_path / f"from {given.stem}", *flags)
        assert_close(state["net"], load(given)[0].state_dict())
    assert_close(load(path)[0].state_dict(), torch.load(checkpoint)["ema"], rtol=0, atol=0)


def test_guidance_can_be_changed_in_sampling_after_training_on_a_range(glyphs, tmp_path, capsys):
    flags = ["--conditioning", "t,t-r,omega", "--omega-range", 0.5, 2, "--omega", 1.5]
    flags += ["--ema-decay", 0.1, "--warmup", 0, "--lr", 0.02]
    for steps in (9, 10):  # the second resumes
        run(glyphs, tmp_path, *flags, "--steps", steps)
    checkpoint, net = tmp_path / "last.pt", tmp_path / "net.pt"
    sample.main(sample.parse_args([str(checkpoint), "--export", str(net)]))
    drawn = sampled(net, tmp_path / "2.npz", "--num", 8, "--omega", 2)
    net, _ = load(net)
    y = torch.stack([torch.arange(8.0), torch.full((8,), 2.0)], 1)
    x = meanflow.sample(net, sample.noise(range(8), (1, 16, 16)), y)
    assert (drawn[..., 0] == prepare_latents.to_pixels(x)[:, 0]).all()
    net.omega = 1.5
    grid = prepare_latents.to_pixels(sample.draw(net, [*range(10)] * 10))
    prepare_latents.save_grid(grid, tmp_path / "grid.png", 10)
    assert (tmp_path / "samples/00000010.png").read_bytes() == (tmp_path / "grid.png").read_bytes()
    assert (x[:8] != sample.draw(net, torch.arange(8))).any()
    for omega, words in [((), "for --omega 0.5 to 2: name one"), (("--omega", 1), "holds other")]:
        flags = "--num", 8, "--out", tmp_path / "2.npz", *omega
        refusal(capsys, 1, words, sample, tmp_path / "net.pt", *flags)


class OwnNetwork(nn.Module):
    """With a weight that two layers share, a parameter without gradient, a buffer and dropout."""

    channels, size, num_classes, null_label, blocks = 1, 16, 10, 10, ()

    def __init__(self):
        super().__init__()
        self.conv, self.out = (nn.Conv2d(1, 1, 3, padding=1) for _ in range(2))
        self.out.weight = self.conv.weight
        self.unused, self.label = nn.Parameter(torch.ones(2)), nn.Embedding(11, 16)
        self.register_buffer("one", torch.ones(1), persistent=False)

    def forward(self, z, r, t, y):
        h = F.dropout(self.conv(z), 0.1, self.training) * self.one
        return self.out(h) * (1 + t - r)[:, None, None, None] + self.label(y)[:, None, :, None]


def own_networks(patch):
    """Among train.py's models: a network of one's own, and a U-Net that is thin."""
    patch.setitem(UNETS, "unet", (1, 32))
    patch.setitem(train.RECIPES, "own", {})
    own = {"own": lambda *_: OwnNetwork()}
    for script in (train, sys.modules["model"]):
        patch.setattr(script, "build", lambda name, *rest: own.get(name, build)(name, *rest))


def test_ones_own_network_trains_resumes_starts_and_draws(glyphs, tmp_path, monkeypatch, capsys):
    own_networks(monkeypatch)
    own = ["--model", "own", "--lr", 0.1, "--ema-decay", 0, "--accel", "none"]
    state = run(glyphs, tmp_path / "own", *own, "--steps", 4)
    assert state["ema"].keys() == OwnNetwork().state_dict().keys()
    run(glyphs, tmp_path / "resumed", *own, "--steps", 2)
    resumed = run(glyphs, tmp_path / "resumed", *own, "--steps", 4)
    assert_close(resumed["net"], state["net"], rtol=0, atol=0)
    given = tmp_path / "own" / "last.pt"
    own += ["--init-from", given]
    started = run(glyphs, tmp_path / "next", *own, "--steps", 2)
    for found in (state, started):
        assert_close(found["net"]["out.weight"], found["net"]["conv.weight"], rtol=0, atol=0)
    assert (started["net"]["out.weight"] != OwnNetwork().out.weight).all()
    run(glyphs, tmp_path / "next", *own, "--steps", 4)
    start = (tmp_path / name / "samples" / "00000000.png" for name in ("own", "next"))
    assert len({path.read_bytes() for path in start}) == 2
    sampled(given, tmp_path / "own.png")
    monkeypatch.undo()
    words = "model.py has no network with such weights"
    refusal(capsys, 1, words, sample, given, "--out", tmp_path / "own.png")


# ---------------------------------------------------------------------------- fid.py


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A file of random weights for Inception, scaled so that the features depend on the image."""
    torch.manual_seed(0)
    state = {k: w for k, w in fid.Inception().state_dict().items() if "num_batches" not in k}
    for name, weight in state.items():
        if weight.dim() == 4:
            nn.init.kaiming_normal_(weight)
        elif name.endswith(("bn.weight", "running_var")):
            nn.init.uniform_(weight, 0.5, 1.5)
        elif weight.dim() == 1:
            nn.init.normal_(weight, std=2 if name == "fc.bias" else 0.1)
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)  # as old as the real file
    return path


@pytest.mark.slow
def test_inception_equals_the_one_of_torch_fidelity(photographs, inception):
    peers, layers = peer("torch_fidelity.feature_extractor_inceptionv3"), ["2048", "logits"]
    theirs = peers.FeatureExtractorInceptionV3("", layers, feature_extractor_weights_path=inception)
    ours, seen = fid.load_inception(inception), []
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for file in sorted(photographs.rglob("*.*"))[::40]:
        for size in (None, 32, 299, 400):
            image = torch.from_numpy(prepare_latents.read_image(file, size).copy())[None]
            seen.append(ours(image))
            assert_close((seen[-1], ours.fc(seen[-1])), theirs(image), rtol=0, atol=1e-4)
    assert torch.cat(seen).std(0).mean() > 0.1  # the features tell the images apart


def test_statistics_equal_numpys_and_the_inception_score_its_definition(inception, monkeypatch):
    monkeypatch.setattr(fid, "SPLIT", 6)
    monkeypatch.setattr(fid, "KEPT", 5)
    net, g = fid.load_inception(inception), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (15, 3, 8, 8), dtype=torch.uint8, generator=g)
    images //= torch.arange(1, 16, dtype=torch.uint8).view(15, 1, 1, 1)
    statistics = fid.Statistics(net, 15)
    for indices in torch.randperm(15).split(4):  # in any order
        statistics.add(images[indices], indices)
    found = statistics.result()
    features = net(images).double()
    assert_close(found["mu"], features.mean(0).numpy(), rtol=1e-5, atol=1e-6)
    assert_close(found["sigma"], np.cov(features.T), rtol=1e-4, atol=1e-5)
    picks = np.argsort(np.random.default_rng(0).permutation(15))[:5]
    assert_close(found["features"], features[picks].float().numpy(), rtol=1e-4, atol=1e-5)
    p = (features @ net.fc.weight.T.double()).softmax(1).numpy()  # without the bias
    parts = p[:6], p[6:12], p[12:]
    scores = [np.exp(scipy.stats.entropy(part.T, part.mean(0)[:, None]).mean()) for part in parts]
    assert np.mean(scores) > 1.01
    assert (found["score"], found["count"]) == (pytest.approx(np.mean(scores), rel=1e-5), 15)


def test_the_distance_equals_that_by_scipys_matrix_root_and_pytorch_fids():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 300, 512)) @ rng.standard_normal((512, 512))
    y += rng.standard_normal(512)
    for a, b in [(x[:100], x[:100]), (x[:200, :64], y[:250, :64]), (x, y[:90])]:
        (mu1, s1), (mu2, s2) = ((side.mean(0), np.cov(side.T)) for side in (a, b))  # low rank
        root = np.sqrt(scipy.linalg.eigvals(s1 @ s2).astype(complex)).real.sum()
        expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * root
        ours = fid.frechet_distance(mu1, s1, mu2, s2)
        assert ours == pytest.approx(expected, rel=1e-6, abs=1e-6 * np.trace(s1))
    theirs = peer("pytorch_fid.fid_score").calculate_frechet_distance
    statistics = mu1[:64], np.cov(x[:, :64].T), mu2[:64], np.cov(y[:, :64].T)
    assert fid.frechet_distance(*statistics) == pytest.approx(theirs(*statistics), rel=1e-6)


def test_the_kernel_distance_equals_torch_fidelitys():
    x, y = torch.randn(2, 60, 2048, generator=torch.Generator().manual_seed(0)).abs().double()
    kid = peer("torch_fidelity.metric_kid").kid_features_to_metric
    for other in (x[:30], y):
        n = len(other)
        theirs = kid(x[-n:], 1.1 * other, kid_subsets=1, kid_subset_size=n, verbose=False)
        ours = fid.kernel_distance(x[-n:], 1.1 * other)
        assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    x, y = x[:4], y[:3]  # and of different numbers
    kernel = [[(float(a @ b) / 2048 + 1) ** 3 for b in (*x, *y)] for a in (*x, *y)]
    kernel = np.array(kernel) * (1 - np.eye(7))
    expected = kernel[:4, :4].sum() / 12 + kernel[4:, 4:].sum() / 6 - 2 * kernel[:4, 4:].mean()
    assert fid.kernel_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_fid_takes_every_kind_of_input(glyphs, inception, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pixels = prepare_latents.Dataset(glyphs).images[:6].transpose(0, 2, 3, 1)
    np.savez("raw.npz", arr_0=pixels)
    np.savez_compressed("packed.npz", arr_0=np.repeat(pixels, 3, axis=3))
    Path("folder").mkdir()
    for i, picture in enumerate(pixels):
        Image.fromarray(picture[..., 0]).save(f"folder/{i:02d}.png")

    def measure(*flags):
        call(fid, *flags, "--inception", inception, "--workers", 2)
        return capsys.readouterr().out.splitlines()

    prepare("glyphs", Path("set"), "--count", 12, "--seed", 1)
    lines = measure("set", "--save", "s.npz")
    assert lines[-3].startswith("set: 12 images, Inception score")
    assert "fewer than 10,000" in lines[-2]
    saved = np.load("s.npz")
    np.savez("adm.npz", ref_mu=saved["mu"], ref_sigma=saved["sigma"], arr_0=pixels[:1])
    kinds = "raw.npz s.npz, packed.npz adm.npz, folder set, s.npz s.npz, folder s.npz --crop 8"
    lines = [measure(*kind.split())[-1] for kind in kinds.split(", ")]
    assert [", KID" in line for line in lines] == [True, False, True, True, True]  # ADM's has none
    *same, none, cropped = (float(line.removeprefix("FID ").split(",")[0]) for line in lines)
    assert same == pytest.approx([same[0]] * 3, rel=1e-4)
    assert none < 1e-4 * np.trace(saved["sigma"])
    assert min(same[0], abs(cropped - same[0])) > 0.1


# ---------------------------------------------------------------------------- bad input


@pytest.fixture(scope="session")
def bad_input(tmp_path_factory, glyphs, checkpoint, inception):
    """A directory of good and bad files, to be named in commands."""
    root, bad = tmp_path_factory.mktemp("bad"), Payload(os.mkdir, "made by a pickle")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in ("good", "large", "pickle", "run"):
            shutil.copytree(glyphs, name)
        np.save("large/labels.npy", np.load("good/labels.npy") + 1)
        np.save("pickle/labels.npy", np.array([bad] * 200))
        torch.save({"ema": bad, "state_dict": bad}, "run/last.pt")
        torch.save(bad, "old.pt", _use_new_zipfile_serialization=False)
        for name in ("done", "half"):
            shutil.copytree(checkpoint.parent, name)
        os.truncate("half/last.pt", os.stat("half/last.pt").st_size - 1000)
        names_in(root, "images/a/1.png", "mixed/a/1.png", "mixed/2.png", "broken/3.png",
                 "taken/preview.png", "taken/progress.png", "project/settings.json", "text.npz",
                 "exported/readme")  # fmt: skip
        Path("broken/4.png").write_text("no picture")
        Path("last.pt").symlink_to(checkpoint)
        torch.save(torch.load(checkpoint) | {"format": 1}, "older.pt")
        before = torch.load(checkpoint)  # there was the flag
        del before["args"]["jvp_velocity"]
        Path("before").mkdir()
        torch.save(before, "before/last.pt")
        call(sample, "last.pt", "--export", "exported/last.pt")
        torch.save(public_weights("SiT", "tiny", 1, 16, 5), "five.pt")
        Path("inception.pth").symlink_to(inception)
        random_vae("vae.pt")
        prepare_latents.write_glyphs("tens", count=10, size=10)
        write_pixels(Path("wide"), np.zeros((9, 1, 16, 32), np.uint8))
        np.savez("images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
        np.savez("stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
        np.savez("pickle.npz", **dict.fromkeys(("arr_0", "mu", "sigma"), np.array([bad])))
    return root


DONE = "train --out done --warmup 0 --ema-decay 0.5"  # the flags of the checkpoint, but for --steps


@pytest.mark.parametrize(("code", "command", "words"), [
    (1, f"{DONE} --lr 0.5", "--lr 0.5: done was trained with 0.004; name another --out"),
    (1, f"{DONE} --data tens", "tens is not the dataset of done; name another --out"),
    (1, f"{DONE} --steps 4", "--steps 4: done is at step 5 already"),
    (1, "train --out half", "half/last.pt is no whole file of weights"),
    (1, "train --init-from last.pt --conditioning t,r", "last.pt has --conditioning t"),
    (1, "train --init-from last.pt --model S/4", "last.pt has --model tiny"),
    (1, "train --init-from nothing.pt", "nothing.pt: No such file"),
    (1, "train --init-from five.pt", "five.pt has the number of classes 5, and this run 10"),
    (1, "train --out exported", "exported/last.pt holds only the network: name it as --init-from"),
    (2, "sample last.pt --export last.pt", "--export last.pt: name a new file in a directory"),
    (2, "prepare_latents images --out x --size 0", "--batch-size and --workers start at 1"),
    (2, "sample last.pt --out images/a/1.png", "images/a/1.png exists and is no .png of this"),
    (1, "sample last.pt --out project", "--out project holds other pictures; remove it or name"),
    (1, "sample last.pt --out mixed", "--out mixed holds other pictures; remove it or name"),
    (2, "fid images.npz --save stats.npz", "--save stats.npz exists; name another"),
    (1, "prepare_latents images --size 8 --out taken", "taken holds a preview.png without its"),
    (1, "train --out taken", "taken/progress.png was not made here; name another --out"),
    (1, "train --out last.pt/x", "last.pt/x/samples: Not a directory"),
    (2, "prepare_latents nowhere --out x", "nowhere is no folder"),
    (2, "prepare_latents good --out x", "good is a dataset already"),
    (2, "prepare_latents glyphs --flip --out x", "are not for glyphs"),
    (2, "sample last.pt --export nowhere/x.pt", "name a new file in a directory that"),
    (1, "prepare_latents mixed --out x", "2.png among them, beside folders"),
    (1, "prepare_latents images --vae vae.pt --size 20 --out x", "--size 20 is no multiple of 8"),
    (1, "train --data images", "images holds no whole dataset"),
    (1, "train --data large", "large holds no whole dataset (meta.json does not"),
    (2, "sample last.pt --out x.jpg", "--out x.jpg"),
    (1, "sample last.pt --out text.npz", "--out text.npz holds other pictures; remove it"),
    (2, "sample last.pt", "--out"),
    (1, "sample last.pt --classes 10 --out x", "--classes"),
    (1, "sample older.pt --out x.png", "saved by another version"),
    (2, "fid stats.npz", "REFERENCE"),
    (1, "fid images.npz stats.npz", "--inception"),
    (1, "fid broken stats.npz --inception inception.pth --workers 1", "4.png cannot be read"),
    (1, "train --out run", "run/last.pt is damaged, or more than tensors"),
    (1, "train --data pickle", "pickle holds no whole dataset"),
    (2, "train --lr nan", "--lr"),
    (2, "train --kappa 1", "--kappa"),
    (2, "train --cfg-interval 0.8 0.2", "--cfg-interval"),
    (2, "train --label-drop 0", "--label-drop"),
    (2, "train --accel dtd --r-neq-t 1", "--accel none"),
    (2, "train --gap 0.1 0.3", "--gap"),
    (2, "train --fid-every 100", "--fid-ref"),
    (2, "train --beta-k 2 --no-progressive", "--beta-k has no effect without --progressive"),
    (2, "train --omega-range 1 3", "--omega-range LO HI and --conditioning t,t-r,omega need each"),
    (2, "train --omega-range 1 3 --conditioning t,t-r,omega --kappa 0", "range needs a DiT"),
    (2, "train --conditioning t,t-r,omega", "--omega-range LO HI and --conditioning t,t-r,omega"),
    (1, "sample last.pt --out x --omega 2", "last.pt was trained without --omega-range"),
    (1, "train --out before --jvp-velocity network", "before was trained with target; name"),
    (2, "train --snr-gamma 4", "--snr-gamma has no effect without --accel minsnr"),
    (2, "train --dtd-cap 0.1 --accel none", "--dtd-cap has no effect without --accel dtd"),
    (2, "train --tangent 1 1 --r-neq-t 0", "--tangent has no effect"),
    (2, "train --v-noise 0.1 --accel none --r-neq-t 1", "--v-noise has no effect"),
    (2, "train --time-sampler uniform --time-mu 0", "--time-mu has no effect"),
    (1, "train --micro-batch-size 3", "--batch-size 8 is no multiple of 1 ranks x 3"),
    (1, "train --batch-size 1", "--r-neq-t 0.25 of 1 is none or all"),
    (1, "train --accel none --gap 0.9999 1", "--gap"),
    (1, "train --model S/4 --data tens", "--model S/4: pictures of size 10 do not"),
    (1, "train --data wide", "--model tiny: pictures of 16 x 32 are not square"),
    (1, "train --vae vae.pt", "--data good holds pixels: leave out --vae"),
    (1, "prepare_latents images --vae old.pt --out x", "old.pt is damaged, or more"),
    (1, "fid pickle.npz --save x.npz --inception inception.pth", "pickle.npz"),
])  # fmt: skip
def test_bad_input_is_refused_in_one_line(bad_input, monkeypatch, capsys, code, command, words):
    def files():  # none is changed
        return {p: p.stat().st_mtime_ns for p in bad_input.rglob("*.*") if p.name != ".lock"}

    monkeypatch.chdir(bad_input)
    before, (script, *flags) = files(), command.split()
    flags = tiny("good", "out", *flags) if script == "train" else flags
    refusal(capsys, code, words, sys.modules[script], *flags)
    assert files() == before
    assert not Path("made by a pickle").exists()


def test_a_place_in_a_job_that_cannot_be_is_refused(checkpoint, tmp_path, monkeypatch, capsys):
    flags = sample, checkpoint, "--out", tmp_path / "x.png"
    for environment, words in [
        (dict(RANK="1"), "RANK 1 of WORLD_SIZE 1: no job"),
        (dict(WORLD_SIZE="2", MASTER_ADDR="x"), "RANK 0 of WORLD_SIZE 2: no job"),
        (dict(RANK="0", WORLD_SIZE="2"), "RANK 0 of WORLD_SIZE 2: no job"),
        (dict(RANK="-1"), "RANK is -1"),
        (dict(WORLD_SIZE="0"), "WORLD_SIZE is 0"),
    ]:
        with mock.patch.dict(os.environ, environment):
            refusal(capsys, 1, words, *flags)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):  # empty is unset
        monkeypatch.setenv(name, "")
    sampled(checkpoint, tmp_path / "x.png", "--num", 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    refusal(capsys, 1, "LOCAL_WORLD_SIZE is 0", prepare_latents, "x", "--out", "y")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    refusal(capsys, 1, "there are 2 GPUs on this machine", *flags)
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
    refusal(capsys, 1, "torch 2.10.1+cu128: 2.11 is needed", *flags)


def test_what_a_job_that_hung_left_behind_does_not_end_its_successor():
    """NCCL leaves this key in torchrun's store, and its ranks end where they see it."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("exception_dump", "1")
    job = os.environ | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), WORLD_SIZE="2")
    job |= dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="1")
    join = "import prepare_latents as p; p.join_ranks(); p.leave_ranks()"
    rank_of = partial(subprocess.Popen, [sys.executable, "-c", join], cwd=HERE)
    ranks = [rank_of(env=job | {"RANK": rank, "GROUP_WORLD_SIZE": "1"}) for rank in "01"]
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    assert not store.check(["exception_dump"])


def test_a_disk_that_is_full_ends_a_script_in_one_line(checkpoint, glyphs, tmp_path):
    """A file may not grow above 100 kB."""
    out, npz, data = (tmp_path / name for name in ("run", "x.npz", "set"))
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    for script, flags, made in [
        ("train.py", tiny(glyphs, out, "--steps", 2), out / "last.pt"),
        ("sample.py", [checkpoint, "--out", npz, "--num", 2000], npz),
        ("prepare_latents.py", ["glyphs", "--count", 2000, "--out", data], data / "meta.json"),
    ]:
        options = dict(start=subprocess.Popen, preexec_fn=full, stderr=subprocess.PIPE)
        job = torchrun(1, script, *flags, text=True, stdout=subprocess.DEVNULL, **options)
        error = [line for line in job.communicate()[1].splitlines() if "%, " not in line]
        assert (job.returncode, len(error)) == (1, 1), error
        assert re.search("File too large|requested", error[0])
        assert not made.exists()
    assert not [*out.rglob("*.tmp"), *tmp_path.glob("*.tmp")]  # a full disk needs the room


def test_a_run_whose_reader_goes_away_saves_and_can_be_resumed(glyphs, tmp_path):
    flags = tiny(glyphs, tmp_path / "run", "--steps", 4000, "--save-every", 10_000)
    job = torchrun(1, "train.py", *flags, start=subprocess.Popen, stdout=subprocess.PIPE, text=True)
    while not job.stdout.readline().startswith("step 1/"):
        assert job.poll() is None
    job.stdout.close()
    assert job.wait(60) == 128 + signal.SIGPIPE
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert 0 < state["step"] < 4000
    with open("/dev/full", "w") as full:  # as where a log's disk is full, or a terminal is lost
        options = dict(start=subprocess.Popen, stdout=full, stderr=subprocess.PIPE, text=True)
        job = torchrun(1, "train.py", *flags, **options)
        assert (error := job.communicate(timeout=60)[1]) == "", error
    assert job.returncode == 128 + signal.SIGPIPE
    run(glyphs, tmp_path / "run", "--steps", state["step"] + 1)


@pytest.mark.slow
def test_images_become_a_fid_on_one_rank_or_two_after_a_kill(photographs, inception, tmp_path):
    """The README's four commands, with 200 photographs and a small VAE of random weights."""
    one, two, reference = tmp_path / "one", tmp_path / "two", tmp_path / "reference.npz"
    vae, measure = ["--vae", random_vae(tmp_path / "vae.pt")], ["fid.py", "--inception", inception]
    flags = ["--size", 64, "--batch-size", 4, "--flip", *vae]
    encode = ["prepare_latents.py", photographs, "--out", two, *flags]
    job = torchrun(2, *encode, start=subprocess.Popen)
    while not (two / "labels.npy").exists() or (np.load(two / "labels.npy") >= 0).sum() < 60:
        assert job.poll() is None
        time.sleep(0.05)
    for pid in [job.pid, *children(job)]:
        os.kill(pid, signal.SIGKILL)
    job.wait()
    assert (np.load(two / "labels.npy") < 0).any()
    torchrun(2, *encode)
    prepare(photographs, one, *flags)
    for name in ("images.npy", "labels.npy", "meta.json", "preview.png"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    torchrun(1, *measure, photographs / "class 0", "--crop", 64, "--save", reference)
    steps = ["train.py", "--steps", 2, "--batch-size", 16, "--data", two, *vae, "--fid-every", 2]
    steps += ["--fid-num", 60, "--fid-ref", reference, "--inception", inception]
    torchrun(2, *steps, "--out", tmp_path / "run")
    last, flags = tmp_path / "run" / "last.pt", ["--num-samples", 60, "--batch-size", 8, *vae]
    torchrun(2, "sample.py", last, *flags, "--out", tmp_path / "2.npz")
    samples = sampled(last, tmp_path / "1.npz", *flags)
    compiled = sampled(last, tmp_path / "compiled.npz", *flags, "--compile")
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()
    assert (samples.shape, samples.std() > 1) == ((60, 64, 64, 3), True)
    assert np.abs(samples - compiled).max() <= 1
    for ranks in (1, 2):
        done = torchrun(ranks, *measure, tmp_path / "1.npz", reference, stdout=subprocess.PIPE)
        found = re.findall(rb"[FK]ID (\S+\d)", done.stdout)  # train.py drew the same:
        row = metrics(tmp_path / "run")[-1]
        assert [row["fid"], row["kid"]] == pytest.approx([*map(float, found)], rel=5e-5)


# ---------------------------------------------------------------------------- a finished run


def digits_judge(folder):
    """A function of pictures and labels: the share that a small classifier sees as labelled; the
    spread in a class, by that of unseen built-in pictures; and the Fréchet distance to the 20,000
    of data/glyphs, in the classifier's 64 last features. And the unseen pictures."""
    sets = [(9999, 9999), (2000, 2000), (20000, 0)]
    made = [("glyphs", folder / str(n), "--count", n, "--seed", seed) for n, seed in sets]
    (x, y), new, (built_in, _) = (prepare(*flags)[range(flags[3])] for flags in made)
    torch.manual_seed(0)
    features = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.ReLU(),
    )  # fmt: skip
    classifier = nn.Sequential(features, nn.Linear(64, 10))
    optimizer = torch.optim.Adam(classifier.parameters(), lr=2e-3)
    for indices in torch.cat([torch.randperm(9999) for _ in range(3)]).split(100):
        optimizer.zero_grad()
        F.cross_entropy(classifier(x[indices] / 255), y[indices]).backward()
        optimizer.step()
    classifier.requires_grad_(False)

    def moments(images):
        """Features (n, 64), their mean and their covariance."""
        found = torch.cat([features(part / 255) for part in images.split(500)])
        return found, found.double().mean(0).numpy(), found.double().T.cov().numpy()

    def spread(images, labels):
        """Mean distance between two pictures of a class, over the first 100 of each."""
        groups = (images[labels == k][:100].flatten(1).double() for k in range(10))
        return np.mean([F.pdist(group).mean().item() for group in groups])

    def judge(images, labels):
        found, *ours = moments(images)
        right = (classifier[1](found).argmax(1) == labels).double().mean().item()
        return right, spread(images, labels) / spread(*new), fid.frechet_distance(*theirs, *ours)

    theirs = moments(built_in)[1:]
    return judge, new


@pytest.mark.skipif("MEANFLOW_RUN" not in os.environ, reason="MEANFLOW_RUN names no finished run")
def test_a_trained_run_draws_the_digits_it_is_asked_for(tmp_path):
    """One step, two steps and 32 Euler steps of a finished run on the built-in digits."""
    (judge, new), run = digits_judge(tmp_path), os.environ["MEANFLOW_RUN"]
    right, _, distance = judge(*new)
    assert right > 0.99
    assert distance < 3
    net, state = load(Path(run) / "last.pt")
    for name, num, way in [
        ("1 step", 5000, dict(nfe=1)),
        ("2 steps", 5000, dict(nfe=2)),
        ("Euler", 1000, dict(nfe=32, velocity=True)),
    ]:
        labels, parts = torch.arange(num) % 10, torch.arange(num).split(500)
        x = torch.cat([sample.draw(net, labels[i], i.tolist(), 1, **way) for i in parts])
        right, variety, distance = judge(torch.from_numpy(prepare_latents.to_pixels(x)), labels)
        print(f"{run}, {name}: right {right:.1%}, variety {variety:.2f}, distance {distance:.1f}")
        assert variety > 0.5
        assert right >= 0.95 or not state["args"]["kappa"]  # fewer are right without guidance


# ---------------------------------------------------------------------------- train.py


def random_start(data, out, *flags):
    """A checkpoint of random weights to --init-from: of a new network u and du/dt are 0."""
    state, _ = run(data, out, "--steps", 1, *flags), torch.manual_seed(0)
    for weight in state["ema"].values():
        weight += 0.1 * torch.randn(weight.shape)
    torch.save(state, out / "last.pt")
    return out / "last.pt"


def nearly_equal(ours, theirs):
    """Weights of two runs: where a gradient is 0, Adam enlarges rounding errors."""
    far = torch.cat([((ours[k] - theirs[k]).abs() > 1e-5).flatten() for k in theirs])
    assert far.float().mean() < 1e-3


def test_tensorboard_shows_the_metrics_and_samples_once(glyphs, tmp_path):
    """Also of a run that was killed at step 6, after it saved step 4, and in a used directory."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = "--accel", "none", "--sample-every", 2, "--tensorboard"
    run(glyphs, tmp_path, *flags, "--steps", 3)
    (tmp_path / "last.pt").unlink()
    run(glyphs, tmp_path, *flags, "--steps", 4, "--seed", 1)
    shutil.copy(tmp_path / "last.pt", tmp_path / "4.pt")
    run(glyphs, tmp_path, *flags, "--steps", 6, "--seed", 1)
    (tmp_path / "4.pt").replace(tmp_path / "last.pt")
    run(glyphs, tmp_path, *flags, "--steps", 7, "--seed", 1)
    board = events.EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0, "images": 0})
    board.Reload()
    rows, names = metrics(tmp_path), board.Tags()["scalars"]
    assert set(names) - {"images_per_second"} == set().union(*rows) - {"step"}
    for name in set(names) - {"images_per_second"}:
        found = [(event.step, event.value) for event in board.Scalars(name)]
        assert_close(found, [(row["step"], row[name]) for row in rows if name in row])
    assert [event.step for event in board.Images("samples")] == [0, 2, 4, 6, 7]
    for event in board.Images("samples"):
        grid = Image.open(tmp_path / "samples" / f"{event.step:08d}.png")
        shown = Image.open(io.BytesIO(event.encoded_image_string))
        assert np.array_equal(np.array(shown), np.array(grid.convert("RGB")))


def test_tensorboard_is_needed_for_its_flag_alone(monkeypatch, capsys):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    train.parse_args([])
    refusal(capsys, 2, "pip install tensorboard", train, "--tensorboard")


@pytest.mark.parametrize("flags", [
    ["--accel", "none", "--r-neq-t", 0.5, "--tangent", 1, 0.5, "--adaptive-p", 0.5,
     "--conditioning", "t,r", "--workers", 1],
    ["--accel", "minsnr", "--snr-gamma", 2, "--micro-batch-size", 4, "--v-noise", 0.01,
     "--jvp-velocity", "network"],
    ["--accel", "dtd", "--dtd-clusters", 3, "--dtd-cap", 0.6, "--label-drop", 0.5,
     "--omega", 0.2, "--kappa", 0.9, "--cfg-interval", 0.5, 0.7, "--micro-batch-size", 4],
    ["--accel", "dtd", "--dtd-clusters", 3, "--dtd-cap", 0.6, "--conditioning", "t,t-r,omega",
     "--omega-range", 0.5, 2, "--micro-batch-size", 4],
    ["--accel", "none", "--progressive", "--beta-k", 2, "--gap", 0.2, 0.4, "--adaptive-c", 0.1,
     "--time-mu", 0.3, "--time-sigma", 2, "--adam-beta2", 0.5, "--warmup", 4,
     "--grad-clip", 0.9],
])  # fmt: skip
def test_train_takes_the_steps_of_the_textbook(glyphs, tmp_path, flags):
    """Three steps of train.py, accumulated and all, against the textbook's on whole batches."""
    flags = ["--steps", 3, "--seed", 5, "--lr", 1e-3, "--ema-decay", 0.7, "--warmup", 1, *flags]
    a, data = train.parse_args(list(map(str, flags))), prepare_latents.Dataset(glyphs)
    start = ["--conditioning", a.conditioning] + ["--omega-range", 0.5, 2] * bool(a.omega_range)
    given = random_start(glyphs, tmp_path / "given", *start)
    net, _ = load(given)
    ema = {name: value.clone() for name, value in net.state_dict().items()}
    state, rows = run(glyphs, tmp_path, *flags, "--init-from", given), metrics(tmp_path)
    constants = a.omega, a.kappa, a.cfg_interval, a.tangent, a.jvp_velocity
    goal = Objective(10, *constants, a.adaptive_p, a.adaptive_c)
    quantile = partial(LOGNORM, mu=a.time_mu, sigma=a.time_sigma)
    pairs = schedules.time_pairs(quantile, a.gap).float() if a.gap else None
    lam, dtd = schedules.beta_lambda(quantile, pairs), schedules.DTD(3, 3, 200, 0.6)
    larger = quantile(((torch.arange(1e5) + 0.5) / 1e5).sqrt())  # of two

    def minsnr(t):
        return torch.minimum((1 - t) ** 2, a.snr_gamma * t**2)

    adam = torch.optim.Adam(net.parameters(), betas=(0.9, a.adam_beta2))
    micro = a.micro_batch_size or 8
    num_neq = int(micro * a.r_neq_t)
    order = np.random.default_rng((5, 0)).permutation(200)[:24].reshape(3, -1, micro)
    for step, chunks in enumerate(order):
        batch, s = [], 1 - (step / 3) ** a.beta_k
        for chunk, picks in enumerate(chunks):
            g = sample.keyed_generator(5, step, chunk)
            x = torch.from_numpy(data.images[picks]) / 127.5 - 1
            e = torch.randn(x.shape, generator=g)
            y = torch.from_numpy(data.labels[picks]).long()
            y = meanflow.drop_labels(y, 10, a.label_drop, g)
            if a.omega_range:
                omega = 0.5 + 1.5 * torch.rand(len(y), generator=g)
                y = torch.stack([y.float(), omega], 1)
            mass = dtd.mass if a.accel == "dtd" else 1.0
            t, r = schedules.sample_t_r(micro - num_neq, num_neq, quantile, mass, pairs, g)
            alpha = minsnr(t) / minsnr(larger).mean() if a.accel == "minsnr" else 1.0
            beta = 1 - s + lam * s * (1 - t + r) if a.progressive else 1.0
            noise = meanflow.corruption(e - x, a.v_noise, g) if a.v_noise else 0 * x
            batch.append((x, e, r, t, y, torch.where(r == t, alpha, beta), noise))
        *batch, noise = map(torch.cat, zip(*batch, strict=True))
        loss, errors = textbook_loss(net, *batch, goal, noise)
        adam.zero_grad()
        loss.backward()
        gradient = [p.grad for p in net.parameters() if p.requires_grad]
        grad_norm = torch.stack([g.norm() for g in gradient]).norm()
        if a.grad_clip:
            assert grad_norm > a.grad_clip
            torch._foreach_mul_(gradient, a.grad_clip / grad_norm)
        lr = adam.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / a.warmup)
        adam.step()
        ema = {name: 0.7 * ema[name] + 0.3 * value for name, value in net.state_dict().items()}
        gap = batch[3] - batch[2]
        v_error, u_error = errors[gap == 0].mean(), errors[gap > 0].mean()
        dtd.update(v_error, step)
        expected = dict(step=step + 1, loss=loss.detach(), lr=lr, grad_norm=grad_norm)
        expected |= dict(v_error=v_error, u_error=u_error)
        expected |= dict(s=1 - ((step + 1) / 3) ** a.beta_k) if a.progressive else {}
        expected |= dict(stage=dtd.stage) if a.accel == "dtd" else {}
        for lo, hi in [(0.1, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 0.9)]:
            if (inside := (lo <= gap) & (gap < hi)).any():
                expected[f"u_error_{lo}-{hi}"] = errors[inside].mean()
        assert rows[step] == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-4)
    nearly_equal(state["net"], net.state_dict())
    nearly_equal(state["ema"], ema)
    if a.accel == "dtd":
        assert_close(state["dtd"], dtd.state_dict(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("share", "absent"), [(0, "u_error"), (1, "v_error")])
def test_a_row_has_no_error_of_samples_that_there_are_not(glyphs, tmp_path, share, absent):
    run(glyphs, tmp_path, "--steps", 1, "--accel", "none", "--r-neq-t", share)
    names = {"step", "loss", "v_error", "u_error", "grad_norm", "lr"} - {absent}
    assert {name for name in metrics(tmp_path)[0] if "-" not in name} == names


def test_the_data_order_visits_every_sample_once_an_epoch_in_micro_batches_of_any_size():
    orders = []
    for micro in (4, 12):
        keys = [(step, chunk) for step in range(10) for chunk in range(12 // micro)]
        order = [train.chunk_indices(*key, micro, 12, count=40, seed=3) for key in keys]
        orders.append(np.concatenate(order).reshape(3, 40))
    assert (orders[0] == orders[1]).all()
    assert (np.sort(orders[0]) == np.arange(40)).all()
    assert (orders[0][0] != orders[0][1]).any()


@pytest.mark.parametrize("flag", ["dtype=bfloat16", "activation-checkpointing"])
def test_a_faster_or_smaller_run_takes_the_same_steps(glyphs, tmp_path, flag):
    flags = ["--steps", 3, "--lr", 1e-3, "--init-from", random_start(glyphs, tmp_path / "given")]
    for out, more in [("plain", []), ("other", [f"--{flag}"])]:
        run(glyphs, tmp_path / out, "--dtype", "float32", *flags, *more)
    rows, plain = metrics(tmp_path / "other"), metrics(tmp_path / "plain")
    for ours, theirs in zip(rows, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2 if "bfloat16" in flag else 1e-4)
    assert (rows == plain) == (flag == "activation-checkpointing")


@pytest.mark.parametrize(("name", "count", "steps", "own"), [
    ("B/4", 131_165_248, 1_201_095, {}),
    ("B/2", 131_091_472, 1_201_095, {}),
    ("M/2", 308_019_216, 1_201_095, {}),
    ("L/2", 459_137_040, 1_201_095, dict(omega=0.2, kappa=0.92, cfg_interval=[0.0, 0.8])),
    ("XL/2", 676_440_592, 1_201_095, dict(omega=0.2, kappa=0.92, cfg_interval=[0.0, 0.75])),
    ("XL/2+", 676_440_592, 5_004_559, dict(epochs=1000, cfg_interval=[0.3, 0.8])),
])  # fmt: skip
def test_defaults_are_the_papers(tmp_path, monkeypatch, capsys, name, count, steps, own):
    """arXiv 2505.13447v1, Tab. 4, as --dry-run prints it for ImageNet, which need not be there."""
    monkeypatch.chdir(tmp_path)
    call(train, "--model", name, "--dry-run")
    text, flags = capsys.readouterr().out.split("{", 1)
    flags = json.loads("{" + flags)
    papers = dict(epochs=240, batch_size=256, lr=1e-4, adam_beta2=0.95, ema_decay=0.9999, warmup=0,
                  omega=1.0, kappa=0.5, cfg_interval=[0.0, 1.0], label_drop=0.1, r_neq_t=0.25,
                  time_sampler="lognorm", time_mu=-0.4, time_sigma=1.0, adaptive_p=1.0,
                  adaptive_c=1e-3, tangent=[0.0, 1.0], conditioning="t,t-r", steps=None, gap=None,
                  beta_k=1.0, snr_gamma=5.0, v_noise=0.0) | own  # fmt: skip
    assert flags | papers == flags
    shown = f"{name}: {count / 1e6:.1f} M parameters, 1,281,167 pictures (4, 32, 32) of 1000 class"
    assert shown in text
    assert f"{steps:,} steps of 256 = {flags['epochs']}.0 epochs" in text
    assert list(tmp_path.iterdir()) == []
    with torch.device("meta"):
        net = build(name, dict(shape=(4, 32, 32), classes=range(1000)))
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == count
    assert train.parse_args(["--model", name, "--kappa", "0"]).kappa == 0
    assert train.parse_args(["--model", name, "--time-mu", "-1e-1"]).time_mu == -0.1
    accels = [train.parse_args(["--accel", accel]) for accel in ("none", "minsnr", "dtd")]
    assert [args.progressive for args in accels] == [False, True, True]


@pytest.mark.parametrize("how", ["plain", "checkpointed", "without memory"])
def test_the_bench_compares_steps_and_writes_nothing(glyphs, tmp_path, monkeypatch, capsys, how):
    """It goes on where a row needs too much memory."""
    flags = ["--bench", "--data", glyphs, "--out", tmp_path / "none", "--batch-size", 8]
    if how == "without memory":
        exhausted = mock.Mock(side_effect=torch.OutOfMemoryError)
        monkeypatch.setattr(meanflow, "textbook_loss", exhausted)
    call(train, *flags, *["--activation-checkpointing"] * (how == "checkpointed"))
    out = capsys.readouterr().out
    table = [line for line in out.splitlines() if "ow" in line[:26] and ":" not in line]
    rows = {line[:26].strip(): line[26:].split() for line in table}
    ratio = {name: float(row[0]) for name, row in rows.items()}
    flops = {name: float(row[1]) / float(rows["flow matching"][1]) for name, row in rows.items()}
    assert len(rows) == (5 if how == "plain" else 3)
    assert out.count("MeanFlow, textbook: out of memory") == 2 * (how == "without memory")
    assert ratio["flow matching"] == 1 < ratio["MeanFlow"] < ratio["guided MeanFlow"]
    assert 1 < flops["MeanFlow"] < 1.2
    assert 1.4 < flops["guided MeanFlow"] < 1.6
    assert all(0 < float(row[2]) < 10 for row in rows.values())
    if how == "plain":
        assert flops["MeanFlow, textbook"] > 1.6
        assert flops["guided MeanFlow, textbook"] > 2.2
        assert ratio["guided MeanFlow"] < ratio["guided MeanFlow, textbook"]
    for what in ["sampling in one step", "the loader alone, 1 threads"]:
        assert float(re.search(rf"{what}: (\S+) pictures/s", out)[1]) > 0
    assert not (tmp_path / "none").exists()


def rank_of_a_run(rank, port, flags, out):
    """One of two, in this process; leaves its number of graphs and of breaks between graphs."""
    address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, WORLD_SIZE=2)
    os.environ |= {name: str(value) for name, value in address.items()}
    own_networks(pytest.MonkeyPatch())
    train.main(train.parse_args(flags))
    counted = torch._dynamo.utils.counters
    torch.save((counted["stats"]["unique_graphs"], counted["graph_break"]), out / f"{rank}.graphs")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "own", "unet"])
def test_two_ranks_train_as_one_and_one_goes_on(glyphs, colours, tmp_path, monkeypatch, model):
    """One rank takes the textbook's steps on whole batches, see above. Also compiled, which gives a
    graph for each way through a block, and not for each block, rank, micro-batch or step; with
    dropout, weights that are shared or not used, and augmentation."""
    own_networks(monkeypatch)
    flags = ["--model", model, "--micro-batch-size", 2, "--warmup", 0, "--lr", 1e-3]
    flags += ["--r-neq-t", 0.5, "--accel", "none"]
    data = colours if model == "unet" else glyphs
    flags += ["--init-from", random_start(data, tmp_path / "given", *flags)]
    alone = run(data, tmp_path / "one", *flags, "--steps", 4)
    two = tiny(data, tmp_path / "two", *flags, "--steps", 2)
    two += ["--compile", "--activation-checkpointing"] * (model == "tiny")
    torch.multiprocessing.spawn(rank_of_a_run, (free_port(), two, tmp_path), 2)
    for rank in range(2):
        graphs, breaks = torch.load(tmp_path / f"{rank}.graphs")
        # u of all samples and of those with r < t without gradient; u of all with it
        assert (graphs, sum(breaks.values())) == (3 * (model == "tiny"), 0)
    state = run(data, tmp_path / "two", *flags, "--steps", 4)
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    for name in ("net", "ema"):
        nearly_equal(state[name], alone[name])


class Waits(TorchDispatchMode):
    """Collects the names of operations while it is on."""

    def __init__(self):
        super().__init__()
        self.names, self.on = [], False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kinds = function.__name__.split(".")[0], (torch.bool, torch.uint8)
        if name.startswith("index") and any(getattr(i, "dtype", None) in kinds for i in args[1]):
            name = "masked index"
        self.names += [name] * self.on
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("accel", ["none", "minsnr", "dtd"])
def test_a_step_never_waits_for_the_device(glyphs, tmp_path, monkeypatch, accel):
    """Guided, accumulated, with all that is measured: no value is read by the host."""

    def switch(on, function, *args, **kwargs):
        mode.on = on
        return function(*args, **kwargs)

    # A step is from its first random number to what is asked before the next one.
    for name, on in [("keyed_generator", True), ("largest_of_ranks", False)]:
        monkeypatch.setattr(train, name, partial(switch, on, getattr(train, name)))
    flags = ["--omega", 0.5, "--kappa", 0.3, "--micro-batch-size", 4]
    flags += ["--steps", 4, "--log-every", 4, "--v-noise", 0.1, "--accel", accel]
    with Waits() as mode:
        run(glyphs, tmp_path, *flags)
    assert mode.names.count("_fused_adam_") == 4
    assert mode.names.count("_foreach_lerp_") == 4
    waits = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "masked index", "_unique2"}
    assert not waits & set(mode.names)


# ---------------------------------------------------------------------------- runs that survive


@pytest.fixture
def start(glyphs):
    """start(log, out, *flags, ranks=1): the processes of a run, each in a group of its own."""
    jobs = []

    def start(log, *flags, ranks=1, script=(HERE / "train.py",)):
        env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        env |= {"WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
        command = [sys.executable, *script, *tiny(glyphs, *flags)]
        with open(log, "a") as file:
            for rank in map(str, range(ranks)):
                options = dict(env=env | {"RANK": rank, "LOCAL_RANK": rank}, start_new_session=True)
                jobs.append(subprocess.Popen(command, stdout=file, stderr=file, **options))
        return jobs[-ranks:]

    yield start
    for job in jobs:
        job.kill()
        job.wait()


def seen(log, pattern, job, seconds=60):
    """Waits for a pattern in a log."""
    end = time.time() + seconds
    while not re.search(pattern, log.read_text()):
        assert (job.poll(), time.time() < end) == (None, True), log.read_text()
        time.sleep(0.01)


def same_run(one, two):
    """Whether two runs ended with the same bits: weights, EMA, Adam, curriculum, log, pictures."""
    ended, pictures = [], []
    for out in (one, two):
        state = torch.load(out / "last.pt", weights_only=True)
        ended.append([state[name] for name in ("step", "net", "ema", "dtd", "optimizer")])
        pictures.append({p.relative_to(out): p.read_bytes() for p in out.rglob("*.png")})
    assert_close(*ended, rtol=0, atol=0)
    assert metrics(one) == metrics(two)
    assert pictures[0] == pictures[1] != {}


@pytest.mark.parametrize("accel", ["none", "minsnr", "dtd", slow("unet")])
def test_a_stopped_run_has_the_same_bits(glyphs, colours, tmp_path, monkeypatch, capsys, accel):
    """One rank that accumulates, stopped by each signal, at the first and at the last step too."""
    own_networks(monkeypatch)
    data, flags = (glyphs, ["--accel", accel]) if accel != "unet" else (colours, ["--model", accel])
    flags += ["--steps", 6, "--micro-batch-size", 4, "--sample-every", 2]
    run(data, tmp_path / "whole", *flags)
    loss = meanflow.loss
    for number, at in [(signal.SIGTERM, 0), (signal.SIGUSR1, 2), (signal.SIGHUP, 5)]:
        out, calls = tmp_path / number.name, iter(range(99))

        def interrupted(*args, at=at, number=number, calls=calls):
            if next(calls) == 2 * at + at % 2:  # in the first or the second micro-batch
                os.kill(os.getpid(), number)
            return loss(*args)

        with mock.patch.object(meanflow, "loss", interrupted), pytest.raises(SystemExit) as stop:
            run(data, out, *flags)
        assert stop.value.code == 128 + number
        assert f"{number.name}: stopped after step {at + 1};" in capsys.readouterr().out
        assert torch.load(out / "last.pt", weights_only=True)["step"] == at + 1
        run(data, out, *flags)
        same_run(tmp_path / "whole", out)


def test_a_run_touches_only_files_of_its_own(glyphs, tmp_path):
    own, names = tmp_path / "o", ["1.png", "00000001.png", "._00000002.png", "00000002 (copy).png"]
    names_in(own / "samples", *names)
    (own / "samples" / "00000009.png").write_bytes(b"")
    (own / "metrics.jsonl").write_text('{"epoch": 3}\n\n# mine\n')
    others = {path: path.read_bytes() for path in own.rglob("*.*")}
    for steps in (2, 4):
        run(glyphs, own, "--steps", steps, "--sample-every", 1)
    for path, content in others.items():
        assert path.read_bytes().startswith(content)
    rows = (own / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows[3:]] == [1, 2, 3, 4]
    cut = '{"step": 4, "lo'
    (own / "metrics.jsonl").write_text("\n".join([*rows[:-1], cut]))
    run(glyphs, own, "--steps", 5, "--sample-every", 1)  # after a kill while a row was written
    again = (own / "metrics.jsonl").read_text().splitlines()
    assert [row[:11] for row in again[3:]] == [f'{{"step": {i},' for i in (1, 2, 3, 5)]
    assert Image.open(own / "progress.png").height == 5 * 64  # of steps 0, 2, 3, 4 and 5


SIGNALS = [("none", signal.SIGTERM, 0), ("minsnr", signal.SIGUSR1, 1), ("dtd", signal.SIGINT, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("accel", "number", "rank"), SIGNALS)
def test_two_ranks_stop_together_by_a_signal_to_one_and_go_on(start, tmp_path, accel, number, rank):
    log, whole, stopped = (tmp_path / name for name in ("log", "whole", "stopped"))
    flags = ["--accel", accel, "--micro-batch-size", 2, "--sample-every", 10, "--r-neq-t", 0.5]
    flags += ["--save-every", 1000, "--steps", 24, "--workers", 2]
    jobs = start(log, stopped, *flags, ranks=2)
    seen(log, "step 3/", jobs[0])
    os.killpg(jobs[rank].pid, number)  # as Ctrl-C does
    assert [job.wait(60) for job in jobs] == [128 + number] * 2
    assert "Traceback" not in log.read_text()
    at = int(re.search(rf"{number.name}: stopped after step (\d+);", log.read_text())[1])
    assert 3 <= at == torch.load(stopped / "last.pt", weights_only=True)["step"] < 24
    for out in (whole, stopped):
        assert [job.wait(60) for job in start(log, out, *flags, ranks=2)] == [0, 0]
    same_run(whole, stopped)


STALLS = """
import os, sys, time
import prepare_latents, train
read, calls = prepare_latents.Dataset.__getitem__, iter(range(99))
prepare_latents.Dataset.__getitem__ = lambda self, rows: (
    read(self, rows) if os.environ["RANK"] == "1" or next(calls) < 5 else time.sleep(1e6)
)
train.main(train.parse_args(sys.argv[1:]))
"""


@pytest.mark.parametrize("ranks", [1, slow(2)])
def test_a_run_whose_data_stalls_ends_by_a_signal_and_is_saved(start, tmp_path, ranks):
    """Reading stalls on rank 0, and the signal goes to the last rank."""
    log, out = tmp_path / "log", tmp_path / "run"
    jobs = start(log, out, "--steps", 9, ranks=ranks, script=["-c", STALLS])
    seen(log, "step 4/", jobs[0])
    time.sleep(2)
    jobs[-1].send_signal(signal.SIGTERM)
    assert [job.wait(30) for job in jobs] == [128 + signal.SIGTERM] * ranks
    assert "SIGTERM: stopped after step 5" in log.read_text()
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 5


@pytest.mark.slow
def test_killed_at_any_moment_a_run_goes_on_from_its_checkpoint(start, glyphs, tmp_path, capsys):
    """SIGKILL after a checkpoint was announced, at any moment, and while one is written."""
    out, rng, at, during = tmp_path / "run", np.random.default_rng(0), 0, 0
    flags = [out, "--steps", 100_000, "--save-every", 3]
    for kill in range(12):
        log = tmp_path / f"{kill}.log"
        (job,) = start(log, *flags)
        seen(log, rf"from step {at:,};", job)  # never an older one
        if kill % 3 == 0:
            seen(log, "  saved ", job)
            refusal(capsys, 1, f"{out} is in use by another run", train, *tiny(glyphs, *flags))
        while kill % 3 == 2 and not (out / "last.pt.tmp").exists():
            assert job.poll() is None
        time.sleep(rng.uniform(0, [0.3, 0.8, 0.03][kill % 3]))
        job.kill()
        assert job.wait(60) == -signal.SIGKILL
        during += (out / "last.pt.tmp").exists()
        said = re.findall(r"step ([\d,]+)/100,000  saved", log.read_text())
        announced = int(said[-1].replace(",", "")) if said else at
        at = torch.load(out / "last.pt", weights_only=True)["step"]
        assert at in (announced, announced + 3)  # renamed, and not yet announced
    assert during > 0


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """And one that cannot be written leaves the old one as it was."""
    path, temporary, done = tmp_path / "file", tmp_path / "file.tmp", []
    path.write_bytes(b"old")

    def noted(name, function, *args):
        done.append((name, path.read_bytes(), temporary.read_bytes()))
        return function(*args)

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, partial(noted, name, getattr(os, name)))
    with pytest.raises(ZeroDivisionError):
        prepare_latents.replace_file(path, lambda file: file.write(b"half") / 0)
    assert (done, path.read_bytes()) == ([], b"old")
    prepare_latents.replace_file(path, lambda file: file.write(b"new"))
    assert done == [("fsync", b"old", b"new"), ("replace", b"old", b"new")]
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_run_that_diverges_ends_unsaved(glyphs, tmp_path, monkeypatch, capsys, where):
    loss, calls = meanflow.loss, iter(range(99))

    def diverging(model, *args):
        value, errors = loss(model, *args)
        if next(calls) == 4:  # steps 3 to 5 are on their way to the next checkpoint
            zero = 0 * model.label_embed.weight[0, 0]
            value = value + (math.nan if where == "loss" else zero.sqrt())
        return value, errors

    monkeypatch.setattr(meanflow, "loss", diverging)
    flags = ["--steps", 9, "--sample-every", 5, "--save-every", 3, "--warmup", 100, "--lr", 1e-2]
    words = "not finite at step 4, learning rate 0.0005; the last checkpoint is of step 3"
    refusal(capsys, 1, words, train, *tiny(glyphs, tmp_path, *flags, "--log-every", 100))
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 3
    assert [row["step"] for row in metrics(tmp_path)] == [1, 3]
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["00000000.png"]


@pytest.mark.slow
def test_torchrun_restarts_a_job_of_which_a_rank_was_killed(glyphs, tmp_path):
    """By itself, from the last checkpoint, to the same bits as without the kill."""
    whole, killed, log = (tmp_path / name for name in ("whole", "killed", "log"))
    command = [2, "train.py", *tiny(glyphs, killed, "--steps", 60, "--save-every", 10)]
    with open(log, "w") as file:
        options = dict(start=subprocess.Popen, launch=["--max-restarts=2"])
        job = torchrun(*command, stdout=file, **options)
    seen(log, "  saved ", job)
    os.kill([*children(job)][-1], signal.SIGKILL)
    assert job.wait(180) == 0
    assert re.search("from step 0;.*from step [1-5]0;", log.read_text(), re.S)
    torchrun(*command, "--out", whole)
    same_run(whole, killed)


# ---------------------------------------------------------------------------- README.md, docs


def commands(text):
    """The words of each command in the code blocks of a text, without comments."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(\w+=\S+ )*(python|torchrun) ", line):
                yield line.split("#")[0].split()


@pytest.mark.parametrize("name", ["README.md", "docs/findings.md"])
def test_every_command_of_the_documents_parses(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    scripts = {f"{s.__name__}.py": s for s in (train, sample, prepare_latents, fid)}
    stand_ins = {"ACCEL": "dtd", "SEED": "0", "STEPS": "500", "MODEL": "B/4", "$SMALL": "--lr=1e-3"}
    text, found = (HERE / name).read_text(), 0
    for words in commands(text):
        for at in [at for at, word in enumerate(words) if word in scripts]:
            flags = [stand_ins.get(word, word) for word in words[at + 1 :]]
            inputs = {"prepare_latents.py": 1, "fid.py": 2}.get(words[at], 0)
            for path in map(Path, flags[:inputs]):  # parse_args looks for them
                path.touch() if path.suffix == ".npz" else path.mkdir(parents=True, exist_ok=True)
            scripts[words[at]].parse_args(flags)
            found += 1
    assert found > 5
    for part in re.findall(r"pytest\b[^`\n]* -k (\w+)", text):
        assert any(part in test for test in globals() if test.startswith("test_")), part


@pytest.mark.slow
def test_every_command_of_the_findings_runs(glyphs, tmp_path, monkeypatch):
    text = (HERE / "docs" / "findings.md").read_text().split("## The papers' findings")[1]
    monkeypatch.chdir(tmp_path)
    toy = f"--model tiny --data {glyphs} --steps 2 --batch-size 8 --sample-every 9"
    found = list(commands(text))
    assert len(found) > 23
    affinity = re.search(r"`affinity.py`.*?```python\n(.*?)```", text, re.S)[1]
    for _, script, *flags in found:
        if script == "affinity.py":
            monkeypatch.setattr(sys, "argv", [script, str(glyphs), *flags[1:]])
            exec(affinity, {})
        elif script == "train.py":
            flags = re.sub(r"--(model|data|epochs|batch-size) \S+", "", " ".join(flags)).split()
            call(train, *flags, *toy.split())
            assert Path(flags[flags.index("--out") + 1], "last.pt").exists()
        else:
            call(sample, *flags, "--num", 2)
            assert Path(flags[flags.index("--out") + 1]).exists()


def digit_table(runs, rows, caption, columns):
    """A Markdown table of {run: caption} and {title: (steps, way)}: the first run's mean distance,
    and mean differences to it by seed ± standard error, in bold where a t-test gives p < 0.05."""
    table = [[caption, *rows.values()]]
    for title, (steps, way) in columns.items():
        seeds = {s for _, _, s in runs if all((steps, name, s) in runs for name in rows)}
        found = [[float(runs[steps, name, s][f"distance_{way}"]) for s in seeds] for name in rows]
        table.append([f"{title}, {len(seeds)} seeds", f"{np.mean(found[0]):.1f}"])
        for difference in np.subtract(found[1:], found[0]):
            cell = f"{difference.mean():+.1f} ± {scipy.stats.sem(difference):.1f}"
            clear = scipy.stats.ttest_1samp(difference, 0).pvalue < 0.05
            table[-1].append(f"**{cell}**" if clear else cell)
    lines = [f"| {' | '.join(line)} |" for line in zip(*table, strict=True)]
    return "\n".join([lines[0], f"|{' --- |' * len(table)}", *lines[1:]])


def test_the_tables_of_digits_follow_from_the_runs():
    """`python -m pytest -s -k tables` prints them."""
    with open(HERE / "docs" / "digits.csv", newline="") as file:
        found = list(csv.DictReader(file))
    runs = {(int(run["steps"]), run["run"], int(run["seed"])): run for run in found}
    assert len(runs) == len(found)
    plain = {"none": "MeanFlow", "beta": "+ β", "minsnr": "+ MinSNR", "minsnr-beta": "+ MinSNR + β"}
    plain |= {"dtd": "+ DTD", "dtd-beta": "+ DTD + β"}
    uniform = {"uniform-none": "MeanFlow", "uniform-minsnr": "+ MinSNR"}
    uniform_u = {f"u-{name}": caption for name, caption in uniform.items()}
    dtd = {"dtd": "DTD", "dtd-v": "r = t only", "dtd-cap-0.05": "to 5 %", "dtd-cap-0.1": "to 10 %"}
    dtd |= {"dtd-patience-20": "by the loss", "none": "no DTD"}
    guided = {"guided": "MeanFlow", "guided-minsnr-beta": "+ MinSNR + β"}
    guided |= {"guided-dtd-beta": "+ DTD + β"}
    ways = {"1 step": "1", "2 steps": "2", "Euler": "euler"}
    lengths, tables = [1000, 2000, 4000], []
    for rows, steps, titles in [
        (plain, [500, *lengths], ways), (uniform, lengths, ways), (uniform_u, lengths, ["1 step"]),
    ]:  # fmt: skip
        for title in titles:
            columns = {f"{n:,} training steps": (n, ways[title]) for n in steps}
            tables.append(digit_table(runs, rows, title, columns))
    for rows, n in [(dtd, 2000), (guided, 1563)]:
        columns = {title: (n, way) for title, way in ways.items()}
        tables.append(digit_table(runs, rows, f"{n:,} training steps", columns))
    print("", *tables, sep="\n\n")
    text = (HERE / "docs" / "findings.md").read_text()
    section = text.split("## What the improved training does to the digits")[1].split("\n## ")[0]
    assert re.findall(r"(?:^\|.*\n)*^\|.*", section, re.M) == tables


def test_the_code_of_the_readme_draws_its_data_in_one_step(two_dimensions):
    code = re.search(r"^```python\n(.*?)^```", (HERE / "README.md").read_text(), re.M | re.S)[1]
    torch.manual_seed(0)
    net, data = two_dimensions.Network(), two_dimensions.points("three gaussians")
    names = dict(torch=torch, meanflow=meanflow, schedules=schedules, steps=2000, net=net)
    names |= dict(data=data.float(), optimizer=torch.optim.Adam(net.parameters()))
    exec(code, names)
    distances = torch.cdist(names["x"], data.float()) / data.std()
    assert distances.amin(1).mean() < 0.1  # samples lie on the data
    assert distances.amin(0).mean() < 0.1  # and everywhere on it


@pytest.fixture(scope="module")
def two_dimensions():
    pytest.importorskip("matplotlib").use("Agg")
    with mock.patch.object(sys, "path", [str(HERE / "docs"), *sys.path]):
        return importlib.import_module("two_dimensions")


def test_the_fields_of_two_dimensions_are_exact(two_dimensions):
    """v is the mean of e - x at z; the flow is scipy's; its u has itself as meanflow.target."""
    data, g = two_dimensions.points("checkerboard", 300), torch.Generator().manual_seed(0)
    t, z = 0.6, torch.tensor([[0.3, -0.2], [1.0, 0.4]]).double()
    e = (z[:, None] - (1 - t) * data) / t  # the noise that brings each point to z, (B, N, 2)
    likely = torch.distributions.Normal(0, 1).log_prob(e).sum(2).softmax(1)
    v = (likely[:, :, None] * (e - data)).sum(1)
    assert_close(two_dimensions.velocity(z, t, data), v, rtol=0, atol=1e-12)
    x = data[torch.randint(300, (2_000_000,), generator=g)]
    e = torch.randn(x.shape, generator=g).double()
    for place, v in zip(z, two_dimensions.velocity(z, t, data), strict=True):
        found = (e - x)[((1 - t) * x + t * e - place).norm(dim=1) < 0.05]
        assert ((found.mean(0) - v).abs() < 3 * found.std(0) / len(found) ** 0.5).all()

    def derivative(t, z):
        return two_dimensions.velocity(torch.from_numpy(z).view(-1, 2), t, data).numpy().ravel()

    noise, options = e[:5], dict(method="DOP853", rtol=1e-10, atol=1e-10)
    for times in [(1, 1e-3), (0.8, 0.3)]:
        solved = scipy.integrate.solve_ivp(derivative, times, noise.numpy().ravel(), **options)
        ours = two_dimensions.flow(noise, data, start=times[0], end=times[1])[-1]
        assert_close(ours.flatten().numpy(), solved.y[:, -1], rtol=0, atol=1e-6)

    def average(t, r=0.3):  # u on the way through the noise at t = 0.8
        z = two_dimensions.flow(noise, data, start=0.8, end=t)[-1]
        return (z - two_dimensions.flow(z, data, start=t, end=r)[-1]) / (t - r)

    dudt = (average(0.8 + 1e-4) - average(0.8 - 1e-4)) / 2e-4
    v = two_dimensions.velocity(noise, 0.8, data)
    t = torch.full((5,), 0.8).double()
    assert_close(average(0.8), meanflow.target(v, t - 0.5, t, dudt), rtol=0, atol=1e-6)
    assert (average(0.8) - v).abs().mean() > 0.1
    judge = two_dimensions.Judge(data, 20)
    *_, euler, of_v = judge(lambda z, r, t, y: two_dimensions.velocity(z.double(), r[0], data))
    assert euler < 0.1
    assert of_v < 1e-9
    assert max(judge(lambda *_: judge.e - judge.x)[:3]) < 1e-9  # u of the whole way


def ratio_tables(path, names):
    """Markdown tables of a file like docs/two_dimensions.csv: errors divided by MeanFlow's of the
    same seed, geometric mean ± standard error."""
    with open(path, newline="") as file:
        _, *lines = csv.reader(file)
    runs, ratios = {tuple(line[:7]): np.float64(line[7:]) for line in lines}, {}
    assert len(runs) == len(lines)
    for (kind, name, steps, rate, p, change, seed), errors in runs.items():
        plain = runs.get((kind, "MeanFlow", steps, rate, p, "", seed))
        if plain is not None and plain is not errors:
            rows = ratios.setdefault(f"{kind}, {int(steps):,} steps, {rate} rate, p = {p}", {})
            rows.setdefault((names.index(name), change), []).append(errors / plain)
    for title, rows in ratios.items():
        table = [[title, "seeds", "one step", "two steps", "Euler", "v"], ["---"] * 6]
        for (at, change), found in sorted(rows.items()):
            means = zip(scipy.stats.gmean(found), scipy.stats.sem(np.log(found)), strict=True)
            cells = [f"{mean:.2f} ± {mean * error:.2f}" for mean, error in means]
            table.append([names[at] + f", {change}" * (change > ""), str(len(found)), *cells])
        yield "".join(f"| {' | '.join(line)} |\n" for line in table)


def test_two_dimensions_trains_draws_and_has_its_tables(two_dimensions, tmp_path, monkeypatch):
    """`python -m pytest -s -k two_dimensions` prints them."""
    monkeypatch.setattr(two_dimensions.points, "__defaults__", (700,))
    monkeypatch.setattr(two_dimensions.Judge.__init__, "__defaults__", (20,))
    runs, kept = tmp_path / "two_dimensions.csv", HERE / "docs" / "two_dimensions.csv"
    runs.write_text(kept.read_text().splitlines()[0] + "\n")
    short = ["--steps", "12", "--out", str(tmp_path)]
    for change in ("", "", "cap 0.05", "cap inf", "DTD of v", "network"):  # the second: all done
        flags = ["--runs", "gaussian", "--seeds", "0", "2", "--change", change]
        two_dimensions.main([*short, *flags])
    lines = [line.split(",") for line in runs.read_text().splitlines()[1:]]
    names = two_dimensions.NAMES * 2
    assert [line[1] for line in lines] == names + ["DTD", "DTD + beta"] * 6 + names
    assert len({tuple(line[7:]) for line in lines}) == len(lines)  # no two runs are the same
    (toy,) = ratio_tables(runs, two_dimensions.NAMES)
    assert toy.count("\n") == 2 + 5 + 6 + 6
    with mock.patch.object(meanflow, "loss", wraps=meanflow.loss) as loss:
        two_dimensions.train(two_dimensions.points("gaussian"), 0, 1, "DTD", change="DTD of v")
    r, t = loss.call_args.args[3:5]
    assert t[:128].min() >= 0.95  # the curriculum's first stage
    assert r[128:].min() < 0.1
    tables = [*ratio_tables(kept, two_dimensions.NAMES)]
    print("", *tables, sep="\n")
    text = (HERE / "docs" / "findings.md").read_text()
    section = text.split("## Two dimensions")[1].split("\n## ")[0]
    found = re.findall(r"(?:^\|.*\n)+", section, re.M)
    assert len(found) > 7
    assert set(found) <= set(tables)
    two_dimensions.main(short)
    with Image.open(tmp_path / "average_velocity.gif") as gif:
        assert gif.n_frames > 10
    assert (HERE / "docs" / "average_velocity.gif").stat().st_size < 600_000
    assert (tmp_path / "average_velocity.png").exists()
