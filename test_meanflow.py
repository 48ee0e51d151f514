"""Every number against something independent: finite differences, closed forms, scipy, torch.

python -m pytest                                             two minutes on two CPU cores
python -m pytest -m ""                                       also kills, torchrun, compile, peers
MEANFLOW_RUN=runs/tiny-dtd python -m pytest -s -k trained_run    how good a finished digit run is
"""

import argparse
import collections
import contextlib
import copy
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
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.ndimage
import scipy.signal
import scipy.stats
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, PngImagePlugin
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
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
from model import (
    CONDITIONINGS, CONFIGS, UNETS, DiT, UNet, build, exported, load, load_file, sincos_positions,
    sinusoids,
)  # fmt: skip

torch.set_num_threads(1)  # the tensors are tiny
HERE = Path(__file__).parent
TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")  # see peer
LOGNORM = partial(schedules.lognorm_quantile, mu=-0.4, sigma=1.0)


def small_dit(conditioning="t,t-r", seed=0):
    """A DiT in float64 whose every weight is random: at initialisation most outputs are zero."""
    torch.manual_seed(seed)
    net = DiT(2, 4, 3, depth=2, width=16, heads=2, patch=2, conditioning=conditioning).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


def small_batch(num_eq=5, num_neq=4, seed=1):
    """x, e, r, t, y, weight in the layout of meanflow.loss, for small_dit; some labels are null."""
    g = torch.Generator().manual_seed(seed)
    x, e = torch.randn(2, num_eq + num_neq, 2, 4, 4, generator=g, dtype=torch.float64)
    t, r = schedules.sample_t_r(num_eq, num_neq, LOGNORM, generator=g)
    y = torch.arange(num_eq + num_neq) % 4  # 3 is the null label
    weight = 0.5 + torch.rand(num_eq + num_neq, generator=g, dtype=torch.float64)
    return x, e, r.double(), t.double(), y, weight


def textbook_loss(net, x, e, r, t, y, weight, goal, noise=0):
    """Algorithm 1 with Eq. 21 and 22 as they stand: JVP with a graph over the whole batch."""
    t4, r4 = t[:, None, None, None], r[:, None, None, None]
    z, v = (1 - t4) * x + t4 * e, e - x
    u, u_null = (net(z, t, t, label) for label in (y, torch.full_like(y, net.num_classes)))
    mix = goal.omega * v + goal.kappa * u + (1 - goal.omega - goal.kappa) * u_null
    lo, hi = goal.cfg_interval
    guided = (t >= lo) & (t <= hi) & (y != net.num_classes)
    v = torch.where(guided[:, None, None, None], mix, v).detach()
    tangents = v, *(torch.full_like(t, d) for d in goal.tangent)
    with sdpa_kernel(SDPBackend.MATH):
        u, dudt = torch.func.jvp(lambda z, r, t: net(z, r, t, y), (z, r, t), tangents)
    delta = u - (v - (t4 - r4) * dudt + noise * (r4 == t4)).detach()
    square = (delta**2).sum((1, 2, 3))
    loss = (weight * square / (square.detach() + goal.c) ** goal.p).mean()
    return loss, square.detach() / x[0].numel()


def textbook_in_parts(net, x, e, r, t, y, num_neq, weight, goal):
    """The same for a network with random layers: in the order in which meanflow.loss draws, whose
    last samples, those with r < t, run by themselves; guided by what training drew where r = t."""
    n, (z, v), us, dudts = len(x) - num_neq, meanflow.interpolate(x, e, t), [], []
    guided = (goal.omega, goal.kappa) != (1, 0)
    with torch.no_grad():
        u_null = net(z, t, t, torch.full_like(y, net.num_classes)) if guided else None
        u_label = net(z[n:], t[n:], t[n:], y[n:]) if goal.kappa else 0
    for part in (slice(n, None), slice(n)):
        if part.stop is None and guided:
            v_neq = meanflow.guided_velocity(v[n:], u_label, u_null[n:], t[n:], y[n:], goal)
            v = torch.cat([v[:n], v_neq])
        at, along = (z[part], r[part], t[part]), (v[part], 0 * r[part], torch.ones_like(t[part]))
        with sdpa_kernel(SDPBackend.MATH):
            u, dudt = torch.func.jvp(lambda *a, y=y[part]: net(*a, y), at, along)
        us.insert(0, u)
        dudts.insert(0, dudt)
    if guided:
        v_eq = meanflow.guided_velocity(v[:n], us[0].detach(), u_null[:n], t[:n], y[:n], goal)
        v = torch.cat([v_eq, v[n:]])
    delta = torch.cat(us) - (v - (t - r)[:, None, None, None] * torch.cat(dudts)).detach()
    square = (delta**2).sum((1, 2, 3))
    return (weight * square / (square.detach() + goal.c) ** goal.p).mean()


def gradients(net, loss):
    return torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad])


def torchrun(ranks, script, *flags, start=subprocess.run, launch=(), **options):
    """A script of this project as its users start it, on one thread for each rank."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *launch]
    command = [sys.executable, *(launcher if ranks > 1 else []), HERE / script, *flags]
    options |= {"check": True} if start is subprocess.run else {}
    return start(list(map(str, command)), env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def kill_all(words):
    """Every process with these words in its command: torchrun's ranks outlive it by a while."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if words.encode() in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)


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


def run(data, out, *flags):
    """train.main on the small glyphs; returns the checkpoint."""
    train.main(train.parse_args(tiny(data, out, *flags)))
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


def test_parameter_counts_are_the_papers():
    counts = {"B/4": 131_165_248, "B/2": 131_091_472, "M/2": 308_019_216, "L/2": 459_137_040}
    for name, count in (counts | {"XL/2": 676_440_592, "XL/2+": 676_440_592}).items():
        with torch.device("meta"):
            net = build(name, dict(shape=(4, 32, 32), classes=range(1000)))
        assert sum(p.numel() for p in net.parameters() if p.requires_grad) == count, name


def test_at_initialisation_weights_have_the_scales_of_dit_and_the_output_is_zero():
    net = build("tiny", dict(shape=(3, 32, 32), classes=range(1000)))
    for name, weight in net.named_parameters():
        if name.endswith("bias") or "adaln" in name or name == "final.linear.weight":
            assert not weight.any(), name
        elif name != "pos_embed":
            xavier = (2 / sum(weight.shape)) ** 0.5
            std = 0.02 if "label_embed" in name or "time_embed" in name else xavier
            assert weight.std().item() == pytest.approx(std, rel=0.03), name
    x, c, t = torch.randn(2, 64, 128), torch.randn(2, 128), torch.rand(2)
    assert all((block(x, c) == x).all() for block in net.blocks)
    assert not net(torch.randn(2, 3, 32, 32), t / 2, t, torch.tensor([1, net.null_label])).any()


def test_embeddings_equal_numpy():
    t = np.array([0.0, 0.3, 1.0])
    args = t[:, None] / 10000 ** (np.arange(128) / 128)
    expected = np.hstack([np.cos(args), np.sin(args)])
    assert_close(sinusoids(torch.from_numpy(t), 256).numpy(), expected)
    rows, columns = np.divmod(np.arange(9)[:, None], 3)
    args = [place / 10000 ** (np.arange(4) / 4) for place in (columns, rows)]
    expected = np.hstack([f(a) for a in args for f in (np.sin, np.cos)])
    assert_close(sincos_positions(3, 16).numpy(), np.float32(expected))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_network_equals_one_built_from_torchs_own_layers(conditioning):
    net, (z, _, r, t, y, _) = small_dit(conditioning), small_batch()
    kernel = net.patch_embed.weight.view(16, 2, 2, 2)
    x = F.conv2d(z, kernel, net.patch_embed.bias, stride=2).flatten(2).mT + net.pos_embed
    c = net.label_embed.weight[y]
    for embed, name in zip(net.time_embed, conditioning.split(","), strict=True):
        h = embed.mlp[0](sinusoids({"t": t, "r": r, "t-r": t - r}[name], 256))
        c = c + embed.mlp[2](F.silu(h))

    def normal(shift, scale):
        return F.layer_norm(x, (16,), eps=1e-6) * (1 + scale) + shift

    for block in net.blocks:
        attn, peer = block.attn, nn.MultiheadAttention(16, 2, batch_first=True)
        peer.in_proj_weight, peer.in_proj_bias = attn.qkv.weight, attn.qkv.bias
        peer.out_proj = attn.proj
        modulation = block.adaln[1](F.silu(c)).view(9, 6, 1, 16)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(1)
        h = normal(shift1, scale1)
        x = x + gate1 * peer(h, h, h)[0]
        h = F.gelu(block.mlp[0](normal(shift2, scale2)), approximate="tanh")
        x = x + gate2 * block.mlp[2](h)
    x = normal(*net.final.adaln[1](F.silu(c)).view(9, 2, 1, 16).unbind(1))
    assert_close(net(z, r, t, y), F.fold(net.final.linear(x).mT, 4, 2, stride=2))


# ---------------------------------------------------------------------------- meanflow.py


def whole(net, step):
    """Of a step (loss, errors) both, and the gradients; errors are distances to the target."""
    return [step[0].detach(), step[1], *gradients(net, step[0])]


assert_same = partial(assert_close, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("omega", "kappa"), [(1, 0), (2, 0), (1, 0.5), (0.2, 0.92)])
@pytest.mark.parametrize("interval", [(0, 1), (0.3, 0.6)])
def test_the_printed_and_the_economical_step_equal_the_textbook(omega, kappa, interval):
    """Gradients too, so that nothing flows through the target; weights after Eq. 22."""
    net, (x, e, r, t, y, weight) = small_dit(), small_batch(12, 8)
    assert interval == (0, 1) or 0 < ((t >= 0.3) & (t <= 0.6)).sum() < 20
    tangent = (0.0, 1.0) if interval == (0, 1) else (0.3, 0.9)
    objective = Objective(3, omega, kappa, interval, tangent, p=0.75, c=0.01)
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


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside hold at once, also of fake tensors."""

    def __enter__(self):
        self.held, self.peak = weakref.WeakSet(), 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def storages(values):
            tensors = [a for a in tree_leaves(values) if isinstance(a, torch.Tensor)]
            return {
                storage._cdata: storage for storage in map(torch.Tensor.untyped_storage, tensors)
            }

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
        for guidance, more in [({}, 0), ({"omega": 2}, 1), ({"kappa": 0.92}, 1.25)]:
            flops, peak = cost(4, **guidance)
            print(name, guidance, flops / forward, peak / base)
            assert most - 0.1 < flops / forward - more <= most
            assert peak <= 1.05 * base
        for block in net.blocks:
            block.forward = partial(train.checkpoint_block, block.forward)
        assert cost(4, count=False)[1] < 0.85 * base


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_derivative_equals_central_finite_differences(conditioning):
    net, (x, e, r, t, y, _) = small_dit(conditioning), small_batch()
    (z, v), h = meanflow.interpolate(x, e, t), 1e-5
    ahead, behind = (net(z + s * v, r + s * 0.3, t + s * 0.9, y) for s in (h, -h))
    dudt = meanflow.derivative(net, z, r, t, y, v, (0.3, 0.9))
    assert (dudt - (ahead - behind) / (2 * h)).abs().max() < 1e-7 * dudt.abs().max()
    assert not dudt.requires_grad


class ForkedBlock(nn.Module):
    """What forks change first: rotary positions, RMSNorm of queries and keys, SwiGLU, no biases;
    and convolutions whose weight or bias depends on the sample."""

    def __init__(self):
        super().__init__()
        layers = [(16, 48), (16, 16), (16, 64), (32, 16), (16, 16)]
        self.qkv, self.proj, self.up, self.down, self.mix = (
            nn.Linear(*sizes, bias=False) for sizes in layers
        )
        self.norm1, self.norm2 = nn.RMSNorm(16), nn.RMSNorm(16)
        self.norm_q, self.norm_k = nn.RMSNorm(8), nn.RMSNorm(8)
        self.bias = nn.Parameter(torch.ones(16))

    def forward(self, x, c):
        angle = torch.arange(4)[:, None] / 100 ** (torch.arange(4) / 4)  # of 4 tokens, (N, 4)
        turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)

        def rotate(a):
            return torch.view_as_real(torch.view_as_complex(a.unflatten(-1, (4, 2))) * turn)

        q, k, v = rearrange(
            self.qkv(self.norm1(x + c[:, None])), "b n (s h d) -> s b h n d", s=3, h=2
        )
        q, k = (rotate(a).flatten(-2) for a in (self.norm_q(q), self.norm_k(k)))
        h = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(rearrange(h, "b h n d -> b n (h d)"))
        a, b = self.up(self.norm2(x)).chunk(2, -1)
        x = x + F.linear(input=self.down(F.silu(a) * b), weight=self.mix.weight, bias=None)
        weight = (self.mix.weight * c[:, None]).flatten(0, 1)[..., None, None]  # (B D, D, 1, 1)
        h = F.conv2d(x.mT.flatten(0, 1)[None, ..., None], weight, groups=len(x))
        weight, bias = self.mix.weight.repeat(len(x), 1)[..., None, None], (self.bias * c).flatten()
        h = F.conv2d(h, weight, bias, groups=len(x))
        return x + h.view(len(x), 16, -1).mT.cumsum(1)


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


def test_a_fork_trains_like_the_textbook(monkeypatch):
    """With a conditioning, blocks of its own, and torch's own attention layer."""
    monkeypatch.setitem(CONDITIONINGS, "fork", lambda r, t: (t * r, 1 - t))
    net = small_dit("fork")
    net.blocks = nn.ModuleList([ForkedBlock(), net.blocks[0], ForkedBlock()]).double()
    net.blocks[1].attn = SelfAttention(16, 2, batch_first=True).double()
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
    found = []
    for loss in (lambda *a: meanflow.loss(*a)[0], textbook_in_parts):
        torch.manual_seed(0)
        found.append([*gradients(net, loss(net, *batch, 6, weight, goal)), torch.rand(3)])
    assert_same(*found)  # and the same numbers after


def step_of(kind):
    """A network, a batch of 12 samples with r = t and 8 with r < t, weights, and an objective."""
    if kind == "DiT":
        *batch, weight = small_batch(12, 8)
        return small_dit(), batch, weight, Objective(3, 0.2, 0.92, (0.2, 0.8))
    g = torch.Generator().manual_seed(0)
    x, e = torch.randn(2, 20, 3, 8, 8, generator=g, dtype=torch.float64)
    _, _, r, t, y, weight = small_batch(12, 8)
    y = torch.cat([y[:, None], torch.randn(20, 6, generator=g)], 1).double()  # augmented
    return small_unet(classes=3, depth=1), (x, e, r, t, y), weight, Objective(3)


@pytest.mark.parametrize("kind", ["DiT", "U-Net"])
@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_or_checkpointed_step_equals_the_textbook(kind, checkpointed, compiled):
    """Also with dropout, in the U-Net, and with guidance, in the DiT. Compiled in one graph: a
    break in it would be an error; and once. In a compiled block du/dt would be wrong."""
    net, batch, weight, goal = step_of(kind)
    torch.manual_seed(5)
    expected = gradients(net, textbook_in_parts(net, *batch, 8, weight, goal))
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
    scale = max(g.abs().max() for g in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < (1e-5 if single else 1e-12) * scale


def rank_of_two(rank, folder, kind):
    """Its halves of two micro-batches, through DDP."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    net, batch, weight, goal = step_of(kind)
    model = DistributedDataParallel(net)
    for chunk in range(2):
        rows = torch.arange(2 * chunk + rank, 20, 4)  # 3 with r = t, 2 with r < t
        torch.manual_seed(2 * chunk + rank)
        with model.no_sync() if chunk == 0 else contextlib.nullcontext():
            part = [a[rows] for a in batch]
            (meanflow.loss(model, *part, 2, weight[rows], goal)[0] / 2).backward()
    torch.save([p.grad for p in net.parameters() if p.requires_grad], f"{folder}/{rank}")
    prepare_latents.leave_ranks()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DiT", "U-Net"])
def test_two_ranks_that_accumulate_have_the_gradient_of_the_textbook(tmp_path, kind):
    torch.multiprocessing.spawn(rank_of_two, (tmp_path, kind), 2)
    (net, batch, weight, goal), total = step_of(kind), 0
    for seed in range(4):
        rows = torch.arange(seed, 20, 4)
        torch.manual_seed(seed)
        total += textbook_in_parts(net, *(a[rows] for a in batch), 2, weight[rows], goal)
    expected = list(gradients(net, total / 4))
    for rank in range(2):
        assert_same(torch.load(tmp_path / str(rank)), expected)


@pytest.mark.parametrize(("name", "least"), [("tiny", 1e-3), ("unet", 1e-4)])
def test_the_derivative_in_bfloat16_is_as_precise_as_the_velocity(monkeypatch, name, least):
    monkeypatch.setitem(UNETS, "unet", (1, 32))
    torch.manual_seed(0)
    net = build(name, dict(shape=(4, 16, 16), classes=[])).double().eval()
    for parameter in net.parameters():
        of_unet = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05 if name == "tiny" else of_unet)
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
    assert least < of_u < 2e-2
    assert of_dudt < 1.5 * of_u


MEAN, STD = 0.7, 0.4


def gaussian_flow(z, r, t, y=None):
    """For data N(MEAN, STD^2) the exact average velocity, or the velocity where r = t:
    z_t = (1 - t) MEAN + s_t xi, s_t^2 = (1 - t)^2 STD^2 + t^2, xi the same along a path."""
    r, t = r.view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)
    s_r, s_t = (((1 - a) ** 2 * STD**2 + a**2).sqrt() for a in (r, t))
    xi = (z - (1 - t) * MEAN) / s_t
    velocity = -MEAN + (t - (1 - t) * STD**2) / s_t * xi
    average = (z - (1 - r) * MEAN - s_r * xi) / torch.where(r == t, 1, t - r)
    return torch.where(r == t, velocity, average)


def test_the_exact_average_velocity_is_a_fixed_point_and_sampling_arrives_at_the_data():
    _, _, r, t, y, _ = small_batch(0, 64)
    z = torch.randn(64, 1, 2, 2, dtype=torch.float64)
    v = gaussian_flow(z, t, t)
    u = gaussian_flow(z, r, t)
    dudt = meanflow.derivative(gaussian_flow, z, r, t, y, v)
    assert_close(meanflow.target(v, r, t, dudt), u, rtol=0, atol=1e-10)
    assert (v - u).abs().mean() > 0.1
    draw, exact = partial(meanflow.sample, gaussian_flow, z, y), MEAN + STD * z
    for options in (dict(), dict(nfe=5), dict(times=[1, 0.8, 0.1, 0])):
        assert_close(draw(**options), exact)
    euler = [draw(nfe=n, velocity=True) for n in (100, 200)]
    errors = [(x - exact).square().mean().sqrt().item() for x in euler]
    assert errors[0] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)  # first order


def test_a_network_trained_on_gaussian_data_learns_the_closed_form():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    optimizer, uniform = torch.optim.Adam(mlp.parameters()), schedules.uniform_quantile

    def net(z, r, t, y):
        inputs = torch.cat([z.flatten(1), t[:, None], (t - r)[:, None]], dim=1)
        return mlp(inputs)[:, :, None, None]

    for step in range(3500):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 + math.cos(math.pi * step / 3500))
        x, e = torch.randn(2, 512, 1, 1, 1)
        t, r = schedules.sample_t_r(128, 384, uniform)
        batch = net, MEAN + STD * x, e, r, t, t, 384
        loss, _ = meanflow.loss(*batch, objective=Objective(p=0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, e = torch.randn(2, 20_000, 1, 1, 1)
    t, r = schedules.sample_t_r(5_000, 15_000, uniform)
    z, _ = meanflow.interpolate(MEAN + STD * x, e, t)
    exact = gaussian_flow(z, r, t)
    assert (net(z, r, t, None) - exact).square().mean() < 0.02 * exact.var()
    x = meanflow.sample(net, e, None)
    assert (x.mean().item(), x.std().item()) == pytest.approx((MEAN, STD), abs=0.03)


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


def test_beta_has_mean_one_at_the_start_and_is_one_at_the_end():
    """Uniform times: the gap g has density 2 (1 - g), so its mean is 1 / 3."""
    uniform = schedules.uniform_quantile
    assert schedules.beta_lambda(uniform) == pytest.approx(1.5, rel=1e-5)
    mass, moment = (
        scipy.integrate.quad(lambda g, n=n: g**n * 2 * (1 - g), 0.3, 0.5)[0] for n in (0, 1)
    )
    pairs = schedules.time_pairs(uniform, (0.3, 0.5))
    lam, gaps = schedules.beta_lambda(uniform, pairs), pairs[0] - pairs[1]
    assert lam == pytest.approx(1 / (1 - moment / mass), rel=1e-3)
    assert schedules.beta(gaps, 1.0, lam).mean().item() == pytest.approx(1)
    assert_close(schedules.beta(gaps, 0.25, lam), 0.75 + 0.25 * lam * (1 - gaps))
    assert (schedules.beta(gaps, 0.0, lam) == 1).all()
    assert not schedules.time_pairs(LOGNORM, (0.999, 1.0)).numel()


def test_alpha_is_min_snr_of_the_x_loss_in_velocity_terms():
    """Errors of x and of v from the same prediction, weighed by min(SNR, 5) and by minsnr."""
    x, e, v_hat = torch.randn(3, 1000, dtype=torch.float64)
    t = torch.linspace(0.01, 0.99, 1000, dtype=torch.float64)
    x_hat = (1 - t) * x + t * e - t * v_hat
    expected = (((1 - t) / t) ** 2).clamp(max=5) * (x_hat - x) ** 2
    assert_close(schedules.minsnr(t) * (v_hat - (e - x)) ** 2, expected)


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


@pytest.mark.parametrize("quantile", schedules.TIME_SAMPLERS.values())
def test_r_equals_t_first_and_is_less_after_by_a_gap_in_the_range(quantile):
    for lo, hi, pairs in [(0, 1, None), (0.7, 0.9, schedules.time_pairs(quantile, (0.7, 0.9)))]:
        t, r = schedules.sample_t_r(500, 500, quantile, pairs=pairs)
        gaps = (t - r)[500:]
        assert (t[:500] == r[:500]).all()
        assert ((r >= 0) & (t <= 1)).all()
        assert ((gaps > lo) & (gaps < hi + 1e-6)).all()
        assert gaps.std() > 0.01


LOSSES = [  # a stage's first loss is its best so far; ten more that are no better end it
    ([1.0] * 11 + [0.5] * 11 + [0.2] * 99, [1] * 10 + [2] * 11 + [3] * 11 + [4] * 89),
    ([1.0] * 9 + [0.0] + [1.0] * 10, [1] * 19 + [2]),  # one dip starts the count again
    ([1.0] * 5 + [0.0] + [0.5] * 30, [1] * 36),  # the smoothed loss falls, below no single one
    (range(1000, 750, -1), [1 + min(3 * step // 200, 3) for step in range(1, 251)]),  # the cap
]


@pytest.mark.parametrize(("losses", "stages"), LOSSES)
def test_the_curriculum_moves_on_where_progress_ends_and_by_its_cap_at_last(losses, stages):
    dtd = schedules.DTD(steps=1000, clusters=4, patience=10, cap=0.2)
    assert dtd.mass == 0.25
    for step, loss in enumerate(losses):
        dtd.update(torch.tensor(float(loss)), step)
        assert dtd.stage == stages[step]
        assert dtd.mass == stages[step] / 4


# ---------------------------------------------------------------------------- the U-Net


def small_unet(classes=0, depth=2):
    torch.manual_seed(0)
    net = UNet(3, 8, classes, depth, width=32).double()
    for parameter in net.parameters():
        if parameter.requires_grad:
            std = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3
            nn.init.normal_(parameter, std=std)
    return net


def song_weights(size=32, depth=4, width=128, seed=0):
    """Random weights of py-meanflow's U-Net, under the names and in the order of its files."""
    g, wide, state = torch.Generator().manual_seed(seed), 2 * width, {}

    def add(name, *shape, bias=True):
        state[f"{name}.weight"] = (
            torch.randn(shape, generator=g) / max(1, math.prod(shape[1:])) ** 0.5
        )
        if bias:
            state[f"{name}.bias"] = 0.3 * torch.randn(shape[0], generator=g)

    def block(name, inputs=wide, attention=False):
        resamples = name.endswith(("up", "down"))
        add(f"{name}.norm0", inputs)
        for conv, kernel in [("conv0", 3), ("conv1", 3), ("skip", 1)]:
            if conv == "conv1":
                add(f"{name}.affine", wide, 4 * width)
                add(f"{name}.norm1", wide)
            if conv != "skip" or inputs != wide or resamples:
                add(f"{name}.{conv}", wide, wide if conv == "conv1" else inputs, kernel, kernel)
            if conv != "conv1" and resamples:
                line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
                state[f"{name}.{conv}.resample_filter"] = torch.outer(line, line)[None, None]
        if attention:
            add(f"{name}.norm2", wide)
            add(f"{name}.qkv", 3 * wide, wide, 1, 1)
            add(f"{name}.proj", wide, wide, 1, 1)

    add("map_augment", 512, 6, bias=False)
    add("map_layer0", 4 * width, 512)
    add("map_layer1", 4 * width, 4 * width)
    add(f"enc.{size}x{size}_conv", width, 3, 3, 3)
    skips, sizes = [width], [f"{n}x{n}" for n in (size, size // 2, size // 4)]
    for level, s in enumerate(sizes):
        for name in ["down"] * (level > 0) + [f"block{i}" for i in range(depth)]:
            block(f"enc.{s}_{name}", skips[-1], level == 1 and name != "down")
            skips.append(wide)
    for level, s in reversed(list(enumerate(sizes))):
        for name in ["up"] if level < 2 else ["in0", "in1"]:
            block(f"dec.{s}_{name}", attention=name == "in0")
        for i in range(depth + 1):
            block(f"dec.{s}_block{i}", wide + skips.pop(), level == 1 and i == depth)
    add(f"dec.{sizes[0]}_aux_norm", wide)
    add(f"dec.{sizes[0]}_aux_conv", 3, wide, 3, 3)
    return state


def song_unet(w, z, r, t, augmentation=None, label=0.0):
    """arXiv 2505.13447v1, App. A, by functions of py-meanflow's weights; label: (B, 512)."""

    def conv(name, x):
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding="same")

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        groups = x.unflatten(1, (32, -1))
        centred = groups - groups.mean((2, 3, 4), keepdim=True)
        x = (centred / (centred.square().mean((2, 3, 4), keepdim=True) + 1e-6).sqrt()).flatten(1, 2)
        return x * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def resample(x, up):  # the filter begins before the first value, where there are zeros
        for axis in (2, 3):
            line, n = np.array([1, 3, 3, 1]) / (4 if up else 8), x.shape[axis]
            wave = scipy.signal.upfirdn(line, x, 2 if up else 1, axis=axis)
            first, step, count = (1, 1, 2 * n) if up else (2, 2, n // 2)
            picks = np.arange(first, first + step * count, step)
            x = torch.from_numpy(np.take(wave, picks, axis))
        return x

    def block(name, x, c):
        sized = partial(resample, up="_up" in name) if "_up" in name or "_down" in name else F.silu
        h = F.silu(norm(f"{name}.norm0", x))
        h = conv(f"{name}.conv0", h if sized is F.silu else sized(h))
        h = F.silu(norm(f"{name}.norm1", h + linear(f"{name}.affine", c)[:, :, None, None]))
        x = x if sized is F.silu else sized(x)
        x = conv(f"{name}.skip", x) if f"{name}.skip.weight" in w else x
        x = (conv(f"{name}.conv1", h) + x) / math.sqrt(2)
        if f"{name}.qkv.weight" in w:
            q, k, v = conv(f"{name}.qkv", norm(f"{name}.norm2", x)).flatten(2).chunk(3, 1)
            p = (q.mT @ k / q.shape[1] ** 0.5).softmax(-1)  # (B, H W, H W)
            x = (x + conv(f"{name}.proj", (v @ p.mT).view(x.shape))) / math.sqrt(2)
        return x

    frequencies = torch.from_numpy(10000 ** (-np.arange(128) / 127))
    angles = torch.stack([t, t - r], 1)[..., None] * frequencies  # (B, 2, 128)
    c = torch.cat([angles.sin(), angles.cos()], -1).flatten(1) + label
    if augmentation is not None:
        c = c + augmentation @ w["map_augment.weight"].T
    c = F.silu(linear("map_layer1", F.silu(linear("map_layer0", c))))
    x, skips = z, []
    for name in dict.fromkeys(
        ".".join(key.split(".")[:2]) for key in w if key[:3] in ("enc", "dec")
    ):
        if "aux_norm" in name:
            x = F.silu(norm(name, x))
        elif name.endswith("_conv"):
            x = conv(name, x)
        else:
            wider = name.startswith("dec") and len(w[f"{name}.norm0.weight"]) > x.shape[1]
            x = block(name, torch.cat([x, skips.pop()], 1) if wider else x, c)
        skips += [x] * name.startswith("enc")
    assert not skips
    return x


def test_the_unet_is_the_papers():
    """55.9 M parameters and 42.4 GFLOP a forward, of two for a product and its sum."""
    torch.manual_seed(0)
    net = build("unet", dict(shape=(3, 32, 32), classes=[]))
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 55_932_419
    batch = torch.randn(1, 3, 32, 32), torch.tensor([0.2]), torch.tensor([0.7]), torch.tensor([0])
    with FlopCounterMode(display=False) as flops, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        u = net(*batch)
    assert flops.get_total_flops() == pytest.approx(42.4e9, rel=0.001)
    assert 5e-6 < u.std() < 1.5e-5


@pytest.mark.parametrize("depth", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_unet_is_py_meanflows_and_reads_its_files(tmp_path, monkeypatch, depth):
    """Of its three averages the one of its demo; at full depth all 417 tensors of its file."""
    monkeypatch.setitem(UNETS, "unet", (depth, 128))
    size, state = 8 if depth == 1 else 32, {}
    for seed, front in enumerate(("net.", "net_ema.", "net_ema1.", "net_ema2.")):
        w = song_weights(size, depth, seed=seed)
        state |= {front + name: value for name, value in w.items()}
    state = dict(sorted(state.items())) if depth == 1 else state  # as safetensors have them
    torch.save({"model": state, "epoch": 1, "args": argparse.Namespace(lr=1)}, tmp_path / "c.pth")
    w = {name: state[f"net_ema1.{name}"].double() for name in song_weights(size, depth)}
    assert depth == 1 or len([name for name in w if "resample_filter" not in name]) == 417
    net, found = load(tmp_path / "c.pth")
    assert "model.net_ema1 of model.net, model.net_ema, model.net_ema1" in found["note"]
    assert found["meta"] == dict(
        shape=[3, size, size], classes=[], source="", vae=None, scale=1 / 127.5, shift=-1.0
    )
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(2, 3, size, size, generator=g).double(), torch.randn(2, 7, generator=g)
    r, t = torch.tensor([0.1, 0.3]).double(), torch.tensor([0.9, 0.3]).double()
    net = net.double()
    with torch.no_grad():
        theirs = song_unet(w, z, r, t, y[:, 1:].double())
        assert_close(net(z, r, t, y.double()), theirs, rtol=1e-12, atol=1e-12)
        assert_close(net(z, r, t, None), song_unet(w, z, r, t), rtol=1e-12, atol=1e-12)
        # With classes, the label's embedding is added to the times'.
        classes = build("unet", found["meta"] | dict(classes=range(5))).double().eval()
        classes.load_state_dict(net.state_dict(), strict=False)
        label = classes.label_embed.weight[[2, 5]]
        theirs = song_unet(w, z, r, t, label=label)
        assert_close(classes(z, r, t, torch.tensor([2, 5])), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_step_of_the_unet_costs_what_its_parts_need():
    """In forwards, at the paper's share of r < t."""
    net = build("unet", dict(shape=(3, 32, 32), classes=[]))
    (x, e), y = torch.randn(2, 8, 3, 32, 32), torch.zeros(8, dtype=torch.long)
    t, r = schedules.sample_t_r(2, 6, LOGNORM)

    def cost(loss, memory):
        with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH), memory:
            loss()[0].backward()
        net.zero_grad()
        return flops.get_total_flops()

    memory = PeakMemory(), PeakMemory(), contextlib.nullcontext()
    base = cost(lambda: meanflow.loss(net, x, e, t, t, y, 0), memory[0])
    ours = cost(lambda: meanflow.loss(net, x, e, r, t, y, 6), memory[1])
    textbook = cost(lambda: meanflow.textbook_loss(net, x, e, r, t, y), memory[2])
    larger = memory[1].peak / memory[0].peak
    print("unet: forwards", 3 * ours / base, "textbook", 3 * textbook / base, "memory", larger)
    assert 3 * ours / base <= 4.53 < 3 * textbook / base
    assert larger <= 1.15


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
    shares = (labels != 0).double().mean(0)
    expected = torch.tensor([0.5, 0.12, 0.12, 0.06, 0.12, 0.12]).double()
    assert_close(shares, expected, rtol=0, atol=0.004)
    assert set(labels[:, 0].tolist()) == {0, 1}
    for column in (
        labels[:, 1],
        labels[:, 2:4].norm(dim=1) * labels[:, 2].sign(),
        *labels[:, 4:].T,
    ):
        drawn = column[column != 0].numpy()
        assert abs(drawn.std() - 1) < 0.03
    straight = labels[:, 2].ne(0) & labels[:, 3].eq(0)
    assert straight.double().mean() == pytest.approx(0.06, abs=0.004)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_cifars_binary_version_becomes_a_dataset(tmp_path, capsys, kind):
    """A byte for the label and 3,072 for the picture, by channels and rows."""
    rng, source = np.random.default_rng(0), tmp_path / "cifar-10-batches-bin"
    source.mkdir()
    records = rng.integers(0, 256, (12, 3073), np.uint8)
    records[:, 0] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 0]
    for part, rows in enumerate(np.array_split(records, 5), start=1):
        rows.tofile(source / f"data_batch_{part}.bin")
    records[:1].tofile(source / "test_batch.bin")
    if kind == "tar":
        shutil.make_archive(source, "gztar", tmp_path, source.name)
        source = tmp_path / "cifar-10-batches-bin.tar.gz"
    data = prepare(source, tmp_path / "labelled")
    assert_equal = np.testing.assert_array_equal
    assert_equal(data.images, records[:, 1:].reshape(12, 3, 32, 32))
    assert_equal(data.labels, records[:, 0])
    assert data.meta["classes"][9] == "truck"
    plain = prepare(source, tmp_path / "plain", "--unconditional", "--flip")
    assert_equal(plain.images[12:], data.images[..., ::-1])
    assert (plain.meta["classes"], plain.labels.max(), plain.epoch_length) == ([], 0, 12)
    if kind == "folder":
        (source / "data_batch_2.bin").unlink()
    else:
        whole = source.read_bytes()
        source.write_bytes(whole[:9000] + bytes(40) + whole[9040:])
    words = "no whole data_batch_2.bin" if kind == "folder" else "is no whole .tar.gz file"
    refusal(capsys, 1, words, prepare_latents, source, "--out", tmp_path / "none")


@pytest.mark.slow
def test_the_unet_trains_augmented_resumed_and_on_two_ranks_alike(tmp_path, monkeypatch):
    monkeypatch.setitem(UNETS, "unet", (1, 32))
    images = np.random.default_rng(0).integers(0, 256, (64, 3, 8, 8), np.uint8)
    meta = prepare_latents.pixel_meta(count=64, shape=[3, 8, 8], classes=[], source="", files="")
    (tmp_path / "data").mkdir()
    writer = prepare_latents.DatasetWriter(tmp_path / "data", meta)
    writer.write(0, images, np.zeros(64))
    writer.finish()
    flags = ["--model", "unet", "--micro-batch-size", 4, "--warmup", 0]
    run(tmp_path / "data", tmp_path / "whole", *flags, "--steps", 4)
    loss, calls = meanflow.loss, iter(range(99))

    def interrupted(*args):
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(meanflow, "loss", interrupted)
        with pytest.raises(SystemExit):
            run(tmp_path / "data", tmp_path / "stopped", *flags, "--steps", 4)
    run(tmp_path / "data", tmp_path / "stopped", *flags, "--steps", 4)
    same_run(tmp_path / "whole", tmp_path / "stopped")
    sampled(tmp_path / "whole" / "last.pt", tmp_path / "x.png", "--num", 4)
    two = tiny(tmp_path / "data", tmp_path / "two", *flags, "--steps", 4)
    torch.multiprocessing.spawn(rank_of_a_run, (free_port(), two, tmp_path), 2)
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "two"), strict=True):
        assert other == pytest.approx(one, rel=1e-4)


# ---------------------------------------------------------------------------- data and VAE


def prepare(source, out, *flags):
    argv = [source, "--out", out, "--workers", 0, *flags]
    prepare_latents.main(prepare_latents.parse_args(list(map(str, argv))))
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
    rng = np.random.default_rng(0)
    wide, tall = (rng.integers(0, 256, (*s, 3), dtype=np.uint8) for s in [(40, 100), (24, 16)])
    quarter = wide.reshape(10, 4, 25, 4, 3).mean((1, 3))  # halved twice
    x = torch.from_numpy(tall).float().permute(2, 0, 1)[None]
    x = F.interpolate(x, (18, 12), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    for picture, expected in [(wide, quarter[:, 7:17]), (tall, x[3:15].clamp(0, 255).numpy())]:
        crop = prepare_latents.center_crop(Image.fromarray(picture), len(expected))
        assert np.abs(np.asarray(crop, float) - expected).max() <= 2  # rounded four times


def test_every_mode_of_picture_is_read_as_a_viewer_shows_it(tmp_path):
    colours = np.zeros((6, 8, 3), np.uint8)
    colours[:, :4], colours[:, 4:] = (200, 40, 40), (40, 40, 200)  # red beside blue
    picture, turned, fine = Image.fromarray(colours), Image.Exif(), dict(quality=100, subsampling=0)
    turned[0x0112] = 6  # to be shown rotated by 90 degrees clockwise: red above blue
    grey = np.asarray(picture.convert("L"))[..., None]
    for name, image, options, expected in [
        ("palette.png", picture.quantize(4), {}, colours),
        ("alpha.png", picture.convert("RGBA"), {}, colours),
        ("cmyk.jpg", picture.convert("CMYK"), fine, colours),
        ("grey.png", picture.convert("L"), {}, grey),
        ("16 bits.png", Image.fromarray(grey[..., 0].astype(np.uint16) * 256), {}, grey),
        ("turned.jpg", picture, fine | dict(exif=turned), np.rot90(colours, -1)),
    ]:
        image.save(tmp_path / name, **options)
        seen = prepare_latents.read_image(tmp_path / name).transpose(1, 2, 0)
        assert np.abs(seen.astype(int) - expected).max() <= (8 if "jpg" in name else 0), name


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_tiff_is_turned_as_a_viewer_turns_it(tmp_path, mode):
    grey = np.random.default_rng(0).integers(0, 2, (6, 8), dtype=np.uint8) * 255
    picture = Image.fromarray(grey)
    picture = (
        Image.fromarray(grey.astype(np.uint16) * 256) if ";" in mode else picture.convert(mode)
    )
    turns = [lambda a: a, np.fliplr, lambda a: np.rot90(a, 2), np.flipud, np.transpose]
    turns += [lambda a: np.rot90(a, -1), lambda a: np.rot90(a, -1)[::-1], np.rot90]
    turns[6] = lambda a: np.rot90(a, 2).T
    for orientation, turn in enumerate(turns, 1):
        picture.save(tmp_path / "x.tif", tiffinfo={0x0112: orientation})
        seen = prepare_latents.read_image(tmp_path / "x.tif")
        assert (seen == turn(grey)).all(), orientation


def test_what_lies_beside_the_pixels_does_not_matter_and_unknown_ranges_are_refused(tmp_path):
    picture, text = Image.new("RGB", (8, 8), (9, 8, 7)), PngImagePlugin.PngInfo()
    text.add_text("long", "x" * 2**21, zip=True)
    picture.save(tmp_path / "exif.png", exif=b"nonsense")
    picture.save(tmp_path / "text.png", pnginfo=text)
    for name in ("exif.png", "text.png"):
        assert prepare_latents.read_image(tmp_path / name)[:, 0, 0].tolist() == [9, 8, 7]
    for kind in (np.int32, np.float32):
        Image.fromarray(np.ones((8, 8), kind)).save(tmp_path / "x.tif")
        with pytest.raises(ValueError, match="no known range"):
            prepare_latents.read_image(tmp_path / "x.tif")


def test_a_line_of_pixels_is_cut_before_it_is_enlarged():
    line = np.arange(20_000 * 3).reshape(1, 20_000, 3).astype(np.uint8)
    with mock.patch.object(Image, "MAX_IMAGE_PIXELS", 30_000):  # all of it would be 82 million
        crop = np.asarray(prepare_latents.center_crop(Image.fromarray(line), 64), int)
    middle = F.interpolate(torch.tensor(line[:, 9995:10005]).float().permute(2, 0, 1)[None],
                           (64, 640), mode="bicubic", antialias=True)  # fmt: skip
    expected = middle[0, :, :, 288:352].permute(1, 2, 0).clamp(0, 255).numpy()
    assert np.abs(crop - expected).max() <= 1


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
    names += ["#1/9.png", "c/meta.json"]
    root = names_in(tmp_path / "in", *names, "$RECYCLE.BIN/7.png", "b/.hidden/8.png")
    (root / "empty").mkdir()
    inside = prepare(names_in(tmp_path / "other", "1.png"), root / "old set", "--size", 8)
    assert len(inside) == 1
    capsys.readouterr()
    for _ in range(2):  # the second finds the first's dataset, and continues it
        data = prepare(root, root / "set", "--size", 8)
        assert data.meta["classes"] == ["#1", "a", "b", "c"]
        line, count = capsys.readouterr().out.splitlines()[:2]
        assert count == f"{root}: 4 pictures of 4 classes"
        left_out = set(line.split(": left out ")[1].split(", "))
        assert left_out >= {"4 hidden or system files", "1 empty folders", "1 .txt"}
        assert left_out >= {"1 files without a suffix"}
        assert left_out & {"1 datasets", "2 datasets"}


def test_folders_that_cannot_be_walked_are_refused(tmp_path, monkeypatch):
    root = names_in(tmp_path / "in", "a/1.png")
    for name, target, words in [
        ("a/up", "..", "a/up is a link to a folder around it"),
        ("b", "nowhere", "b is a link to what does not exist"),
    ]:
        (root / name).symlink_to(target)
        with pytest.raises(SystemExit, match=words):
            prepare(root, tmp_path / "set", "--size", 8)
        (root / name).unlink()
    (root / "twice").symlink_to("a")  # a link beside a folder is none
    assert prepare(root, tmp_path / "set", "--size", 8).meta["classes"] == ["a", "twice"]
    scan = os.scandir

    def scan_but_a(path):
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scan_but_a)
    with pytest.raises(SystemExit, match="in/a cannot be listed: Permission denied"):
        prepare(root, tmp_path / "other", "--size", 8)


@pytest.mark.parametrize("lost", [False, True])
def test_an_unreadable_image_is_named_and_stops_the_run_or_is_skipped(tmp_path, capsys, lost):
    for name in "12":
        Image.new("L", (20, 9), 77).save(tmp_path / f"{name}.png")
    (tmp_path / "3.png").write_text("no picture")
    flags = [tmp_path, tmp_path / "set", "--size", 4, "--batch-size", 1]
    with pytest.raises(SystemExit, match=r"3\.png.*--skip-unreadable"):
        prepare(*flags)
    with pytest.raises(SystemExit, match="is unfinished; run"):
        prepare_latents.Dataset(tmp_path / "set")
    if lost:  # as where the disk was full while they were made
        (tmp_path / "set" / "images.npy").unlink()
        (tmp_path / "set" / "labels.npy").unlink()
    data = prepare(*flags, "--skip-unreadable")
    out, err = capsys.readouterr()
    assert lost or re.search("[12] of 3 pictures are done already", out)
    assert re.search(r"skipped: .*3\.png", err)
    assert (len(data), data.images[:2].min(), data.images[:2].max()) == (2, 77, 77)
    (tmp_path / "bad").mkdir()
    (tmp_path / "3.png").rename(tmp_path / "bad" / "3.png")
    with pytest.raises(SystemExit, match="bad holds no readable picture"):
        prepare(tmp_path / "bad", tmp_path / "none", "--skip-unreadable")


@pytest.mark.parametrize(
    ("fate", "words"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "DataLoader worker (pid"),
        pytest.param(lambda: time.sleep(1e6), "timed out after 3 s", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_dies_or_hangs_ends_the_script(tmp_path, monkeypatch, capsys, fate, words):
    """And what the others read does not go through /dev/shm."""
    read, parent = prepare_latents.ImageFolder.__getitem__, os.getpid()

    def read_or_end(folder, batch):
        if batch[0] == 8 and os.getpid() != parent:
            fate()
        return read(folder, batch)

    monkeypatch.setattr(prepare_latents.ImageFolder, "__getitem__", read_or_end)
    monkeypatch.setattr(prepare_latents, "HANGS_AFTER", 3)
    monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", None)
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", None)
    for i in range(20):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i:02d}.png")
    flags = [tmp_path, "--out", tmp_path / "set", "--size", 8, "--batch-size", 2, "--workers", 2]
    refusal(capsys, 1, words, prepare_latents, *flags)
    monkeypatch.setattr(prepare_latents.ImageFolder, "__getitem__", read)
    prepare_latents.main(prepare_latents.parse_args(list(map(str, flags))))  # resumes
    images = prepare_latents.Dataset(tmp_path / "set").images
    assert (images[:, 0, 0, 0] == np.arange(20)).all()


def random_vae(path, widths=(32, 32, 32, 64), seed=0):
    """A small VAE with random weights, in a file."""
    torch.manual_seed(seed)
    vae = prepare_latents.VAE(widths)
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
        ({key: w for key, w in state.items() if key != name}, f"lacks 1 weights, {name}"),
        (state | {"extra": torch.zeros(1)}, "has unknown 1 weights, extra"),
        (state | {name: torch.zeros(3)}, f"has misshapen 1 weights, {name}"),
        (state | {name: state[name].to(torch.int8)}, f"has misshapen 1 weights, {name}"),
        (
            {"encoder.conv_in.weight": torch.zeros(1)},
            "has encoder.conv_in.weight ... but no decod",
        ),
        ({"first_stage_model.decoder.conv_in.weight": torch.zeros(1)}, "no VAE with diffusers'"),
    ]:
        torch.save(wrong, file)
        with pytest.raises(SystemExit, match=f"vae.pt .*{words}"):
            prepare_latents.load_vae(file)


def test_safetensors_are_read_as_their_own_library_wrote_them(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"half": torch.randn(3, 5).half(), "brain": torch.randn(7).bfloat16()}
    tensors |= {"int": torch.arange(6).view(2, 3), "one": torch.ones(())}
    others = {
        "none": torch.ones(0, 3),
        "eight": torch.ones(2).to(torch.float8_e4m3fn),
        "short": torch.ones(3).short(),
    }
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(tensors | others, tmp_path / "B.SafeTensors")
    assert load_file(tmp_path / "B.SafeTensors").keys() == tensors.keys()  # without the others
    save_file(tensors, path, metadata={"format": "pt"})
    assert_close(load_file(path), tensors, rtol=0, atol=0)
    whole = path.read_bytes()
    for wrong in (whole[:-1], whole[:40], b"", whole[8:], whole.replace(b"[48,52]", b"[-8,-4]")):
        path.write_bytes(wrong)
        with pytest.raises(SystemExit, match=r"a\.safetensors is no whole file of weights"):
            load_file(path)


def test_another_vae_shows_by_its_spread_and_a_damaged_one_is_refused(tmp_path, capsys):
    names_in(tmp_path / "in", "1.png", "2.png")
    flags, state = (
        ["--vae", tmp_path / "vae.pt", "--size", 32],
        torch.load(random_vae(tmp_path / "vae.pt")),
    )
    data = prepare(tmp_path / "in", tmp_path / "set", *flags)
    found = re.search("standard deviation of latents (\\S+); it", capsys.readouterr().out)[1]
    drawn = prepare_latents.network_input(torch.from_numpy(np.array(data.images)), data.meta)
    assert float(found) == pytest.approx(drawn.std().item(), rel=0.2)
    torch.save(
        state | {"encoder.conv_in.bias": state["encoder.conv_in.bias"] * np.nan},
        tmp_path / "vae.pt",
    )
    with pytest.raises(SystemExit, match="latents that are no numbers: are its weights damaged"):
        prepare(tmp_path / "in", tmp_path / "other", *flags)


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
    sample.main(sample.parse_args(list(map(str, (checkpoint, "--out", out, *flags)))))
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
    def draw(name):
        sampled(checkpoint, tmp_path / name, "--num", 20, "--batch-size", 4, "--random-classes")

    def save_some(paths, pixels):
        if len(saved) == allowed:
            raise KeyboardInterrupt
        saved.append(int(paths[0].stem))
        save(paths, pixels)

    save, saved, allowed = sample.save_batch, [], 5
    monkeypatch.setattr(sample, "save_batch", save_some)
    draw("whole.npz")
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
    assert not (tmp_path / "cut.npz.parts").exists()
    (tmp_path / "cut" / "000005.png").unlink()
    draw("cut")
    assert saved[5:] == [4]


def test_pictures_without_classes_train_without_guidance_and_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(meanflow, "guided_velocity", None)
    for i in range(8):
        Image.new("RGB", (16, 16), (30 * i, 0, 0)).save(tmp_path / f"{i}.png")
    prepare(tmp_path, tmp_path / "set", "--size", 16)
    state = run(tmp_path / "set", tmp_path / "run", "--steps", 2)
    assert len(state["net"]["label_embed.weight"]) == 1  # the null label's
    drawn = sampled(tmp_path / "run" / "last.pt", tmp_path / "x.npz", "--num", 3)
    assert drawn.shape == (3, 16, 16, 3)
    grid = sampled(tmp_path / "run" / "last.pt", tmp_path / "x.png", "--num", 9)
    assert Image.open(grid).size == (3 * 64, 3 * 64)


# ---------------------------------------------------------------------------- public weights

PUBLIC = {  # the time embedders' names, and what they are told
    "t,t-r": {"t_embedder": lambda r, t: t, "h_embedder": lambda r, t: t - r},
    "t,t-r again": {"t_embedder": lambda r, t: t, "r_embedder": lambda r, t: t - r},
    "SiT": {"t_embedder": lambda r, t: 1 - t},
    "SiT without variance": {"t_embedder": lambda r, t: 1 - t},
}


def public_weights(kind, model, channels=4, size=32, classes=1000):
    """Random weights of a network of the papers, under the names and shapes of public files."""
    (depth, width, _, patch), g, state = CONFIGS[model], torch.Generator().manual_seed(0), {}
    outputs = channels * patch**2 * (2 if kind == "SiT" else 1)  # its variance is learned
    shapes = {"x_embedder.proj": (width, channels, patch, patch)}
    for name in PUBLIC[kind]:
        shapes |= {f"{name}.mlp.0": (width, 256), f"{name}.mlp.2": (width, width)}
    for block in (f"blocks.{i}" for i in range(depth)):
        shapes |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
        shapes |= {f"{block}.mlp.fc1": (4 * width, width), f"{block}.mlp.fc2": (width, 4 * width)}
        shapes |= {f"{block}.adaLN_modulation.1": (6 * width, width)}
    shapes |= {"final_layer.linear": (outputs, width)}
    shapes |= {"final_layer.adaLN_modulation.1": (2 * width, width)}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape, generator=g) / math.prod(shape[1:]) ** 0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=g)
    state["y_embedder.embedding_table.weight"] = torch.randn(classes + 1, width, generator=g)
    positions = torch.randn(1, (size // patch) ** 2, width, generator=g)
    return state | {"pos_embed": positions.float().to(positions)}  # ours are float32


def public_network(state, kind, heads, z, r, t, y):
    """What the files' own code computes, by torch's functions; of SiT its velocity x - e."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def modulated(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    weight, bias = state["x_embedder.proj.weight"], state["x_embedder.proj.bias"]
    patch, (batch, channels, size, _) = weight.shape[-1], z.shape
    x = F.conv2d(z, weight, bias, stride=patch).flatten(2).mT + state["pos_embed"]
    c = state["y_embedder.embedding_table.weight"][y]
    for name, time_of in PUBLIC[kind].items():
        angles = time_of(r, t)[:, None] * torch.exp(-math.log(10000) / 128 * torch.arange(128))
        waves = torch.cat([angles.cos(), angles.sin()], 1)
        c = c + linear(f"{name}.mlp.2", F.silu(linear(f"{name}.mlp.0", waves)))
    for block in sorted({name.rsplit(".", 3)[0] for name in state if ".attn.qkv.w" in name},
                        key=lambda name: int(name[7:])):  # fmt: skip
        m = linear(f"{block}.adaLN_modulation.1", F.silu(c))[:, None].chunk(6, -1)
        qkv = linear(f"{block}.attn.qkv", modulated(x, m[0], m[1]))
        q, k, v = qkv.view(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        h = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + m[2] * linear(f"{block}.attn.proj", h.transpose(1, 2).flatten(2))
        h = F.gelu(linear(f"{block}.mlp.fc1", modulated(x, m[3], m[4])), approximate="tanh")
        x = x + m[5] * linear(f"{block}.mlp.fc2", h)
    m = linear("final_layer.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, -1)
    n = size // patch
    x = linear("final_layer.linear", modulated(x, *m)).view(batch, n, n, patch, patch, -1)
    return torch.einsum("bhwpqc->bchpwq", x).reshape(batch, -1, size, size)[:, :channels]


@pytest.mark.parametrize(
    ("kind", "model", "dtype"),
    [(kind, "tiny", torch.float64) for kind in PUBLIC]
    + [pytest.param("t,t-r", "B/4", torch.float64, marks=pytest.mark.slow)]
    + [pytest.param("SiT", "XL/2", torch.float32, marks=pytest.mark.slow)],
)
def test_public_weights_give_what_their_own_code_computes(tmp_path, kind, model, dtype):
    torch.set_default_dtype(dtype)
    try:
        state, path = public_weights(kind, model), tmp_path / "public.pth"
        torch.save({"ema": state, "opt": [], "args": argparse.Namespace(lr=1)}, path)
        net, found = load(path)
        z, r, t = torch.randn(2, 4, 32, 32), torch.tensor([0.2, 0.3]), torch.tensor([0.3, 0.9])
        y = torch.tensor([7, 1000])  # and the null label
        with torch.no_grad():
            theirs = public_network(state, kind, CONFIGS[model][2], z, r, t, y)
            ours = net(z, r, t, y)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found["args"] == dict(model=model, conditioning="t,t-r")
    assert found["meta"]["shape"] == [4, 32, 32]
    assert len(found["meta"]["classes"]) == 1000
    error = (ours - (-theirs if "SiT" in kind else theirs)).norm() / theirs.norm()
    assert error < (1e-12 if dtype == torch.float64 else 1e-5)


def test_training_from_a_flow_matching_model_starts_with_its_velocity(glyphs, tmp_path):
    data, path = prepare_latents.Dataset(glyphs), tmp_path / "sit.pt"
    state = public_weights("SiT", "tiny", 1, 16, 10)
    torch.save(state, path)
    flags = ["--init-from", path, "--accel", "none", "--steps", 2, "--label-drop", 0.5]
    run(glyphs, tmp_path / "guided", *flags)
    run(glyphs, tmp_path / "plain", *flags, "--omega", 1, "--kappa", 0)
    g = sample.keyed_generator(0, 0, 0)
    rows = np.random.default_rng((0, 0)).permutation(200)[:8]
    x = torch.from_numpy(data.images[rows]) / 127.5 - 1
    e = torch.randn(x.shape, generator=g)
    y = meanflow.drop_labels(torch.from_numpy(data.labels[rows]).long(), 10, 0.5, g)
    t, r = schedules.sample_t_r(6, 2, LOGNORM, generator=g)
    z, v = meanflow.interpolate(x, e, t)
    source = partial(public_network, state, "SiT", 4)
    error = (source(z, t, t, y) + v)[:6].square().mean().item()
    for name in ("guided", "plain"):
        first = metrics(tmp_path / name)[0]
        assert first["v_error"] == pytest.approx(error, rel=1e-4) or name == "guided"
    net, _ = load(path)
    last = [a[6:].double() for a in (z, r, t)]
    dudt = meanflow.derivative(net.double(), *last, y[6:], v[6:].double())
    state = {name: value.double() for name, value in state.items()}
    source, (z, v, t) = partial(public_network, state, "SiT", 4), (a.double() for a in (z, v, t))
    ahead, behind = (source(z + h * v, t, t + h, y)[6:] for h in (1e-5, -1e-5))
    assert (dudt + (ahead - behind) / 2e-5).norm() < 1e-5 * dudt.norm()


def without(state, part):
    return {name: value for name, value in state.items() if part not in name}


def predicts_its_input(state):
    """DiT's names, and what is left of its output at the last step: the noise that it is given."""
    for name in without(state, "embed"):
        state[name] *= 0
    first = 30 * torch.linalg.qr(torch.randn(128, 16))[0].view(128, 1, 4, 4)
    last = torch.stack([first[:, 0], 0 * first[:, 0]], -1)  # (D, p, q, c)
    return state | {"x_embedder.proj.weight": first, "final_layer.linear.weight": last.flatten(1).T}


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("SiT", lambda s: without(s, "blocks.3."), "no --model has 3 blocks of width 128"),
        ("t,t-r", lambda s: without(s, "h_embedder.mlp.2"), "lacks 2 weights, time_embed.1.mlp.2"),
        ("t,t-r", lambda s: without(s, "blocks.1.attn"), "lacks 4 weights, blocks.1.attn"),
        ("t,t-r", lambda s: {"a": without(s, "x_embedder")}, "a.t_embedder.mlp.0.weight, a.t_"),
        (
            "t,t-r",
            lambda s: without(s, "x_embedder"),
            "... but no x_embedder.proj.weight or map_layer0",
        ),
        ("t,t-r", lambda s: without(s, "pos_embed"), "KeyError('pos_embed')"),
        ("t,t-r", lambda s: s | {"q_norm": s["pos_embed"]}, "has unknown 1 weights, q_norm"),
        (
            "t,t-r",
            lambda s: s | {"noise_labels_embedder.mlp.0.bias": s["pos_embed"]},
            "alphaflow's",
        ),
        ("SiT", predicts_its_input, "predicts the noise, as DiT does"),
        (
            "SiT",
            lambda s: s | {"x_embedder.proj.weight": torch.zeros(128, 1, 2, 2)},
            "patches of 2",
        ),
        ("SiT", lambda s: {f"{n}.{k}": v for n in "ab" for k, v in s.items()}, "no average: a, b"),
        ("SiT", lambda s: {"a": s, "adam": {"exp_avg": s}}, "no average: a, adam.exp_avg"),
    ],
)
def test_public_weights_that_do_not_fit_are_refused(tmp_path, capsys, kind, change, words):
    torch.save(change(public_weights(kind, "tiny", 1, 16, 10)), tmp_path / "public.pt")
    refusal(capsys, 1, words, sample, tmp_path / "public.pt", "--out", tmp_path / "x.png")


NESTED = {  # of weights w and their average a: what training scripts save, and what the note says
    "plain": (lambda w, a: a, "no average found"),
    "ema": (lambda w, a: {"model": w, "ema": a, "opt": {"state": {0: {"exp_avg": 1}}}}, "ema"),
    "model_ema": (lambda w, a: {"model": w, "model_ema": a}, "model_ema"),
    "ema_state_dict": (lambda w, a: {"state_dict": w, "ema_state_dict": a}, "ema_state_dict"),
    "shadow": (lambda w, a: {"net": w, "ema": {"decay": 0.99, "shadow": a}}, "ema.shadow"),
    "one dict": (
        lambda w, a: {"state_dict": {"net." + k: v for k, v in w.items()}
                      | {"ema_model." + k: v for k, v in a.items()}},
        "state_dict.ema_model",
    ),
    "AveragedModel": (
        lambda w, a: {"a": w, "b": {"n_averaged": torch.tensor(3)}
                      | {"module." + k: v for k, v in a.items()}},
        "(average)",
    ),
    "none": (lambda w, a: {"model": a, "ema": None, "ema_decay": 0.9}, " (no average found)"),
    "Adam": (lambda w, a: {"model": a, "adam": {"exp_avg": {}}, "opt": {"ema": w}}, "model"),
    "list": (lambda w, a: {"model": a, "shadow_params": [*w.values()]}, "shadow_params cannot"),
}  # fmt: skip


@pytest.mark.parametrize(
    "front", ["", "module.", "_orig_mod.module.", "model._orig_mod.", "inside"]
)
@pytest.mark.parametrize("nested", NESTED)
def test_the_average_is_found_in_any_wrapping(tmp_path, front, nested):
    plain = public_weights("t,t-r", "tiny", 1, 16, 10)
    if front == "inside":  # a compiled block
        wrapped = {name.replace("blocks.0.", "blocks.0._orig_mod."): w for name, w in plain.items()}
    else:
        wrapped = {front + name: w for name, w in plain.items()}
    wrap, words = NESTED[nested]
    torch.save(wrap({name: 0 * w for name, w in wrapped.items()}, wrapped), tmp_path / "x.pt")
    net, found = load(tmp_path / "x.pt")
    torch.save(plain, tmp_path / "plain.pt")
    assert_close(net.state_dict(), load(tmp_path / "plain.pt")[0].state_dict(), rtol=0, atol=0)
    assert words in found["note"].split("weights: ")[1]


class Config:
    """What a training script may save beside its weights."""

    def __init__(self):
        self.options = collections.defaultdict(list, lr=[1e-4])


class Names(list):
    """A list of another type, which torch does not read."""


class Payload:
    """Runs a command where it is unpickled as pickle does."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_no_code_in_a_file_is_executed_and_weights_are_read_beside_it(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    state = public_weights("t,t-r", "tiny", 1, 16, 10)
    beside = [argparse.Namespace(lr=1), np.float64(1), np.random.get_state(), Path("a"), Config()]
    beside += [collections.defaultdict(dict, a={}), {np.int64(3): 1}, {Path("a")}]
    beside += [Payload(eval, "open('trace', 'w')")]
    for value in beside:
        torch.save({"ema": state, "beside": value}, "x.pt")
        assert load("x.pt")[1]["note"].endswith("weights: ema")
    run_command, tensors = Payload(os.system, "touch trace"), {"epoch": 1, "w": {}, "ema": state}
    read = "{k: torch.load('x.pt', weights_only=False)[k] for k in ['w', 'ema']}"
    for value in (run_command, Names("ab")):
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


def test_an_exported_network_draws_and_starts_like_its_checkpoint(checkpoint, glyphs, tmp_path):
    sample.main(sample.parse_args([str(checkpoint), "--export", str(tmp_path / "net.pt")]))
    one = sampled(checkpoint, tmp_path / "one.png", "--num", 20)
    two = sampled(tmp_path / "net.pt", tmp_path / "two.png", "--num", 20)
    assert one.read_bytes() == two.read_bytes()
    kept = torch.load(tmp_path / "net.pt", weights_only=True)
    assert set(kept) == {"ema", "meta", "step", "args", "format"}
    assert set(kept["args"]) == {"model", "conditioning"}  # no paths of the run
    for path, name in [(checkpoint, "one"), (tmp_path / "net.pt", "two")]:
        run(glyphs, tmp_path / name, "--steps", 2, "--init-from", path)
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")


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


def own_network(*_):
    return OwnNetwork()


def rank_of_an_own_network(rank, *args):
    train.build, train.RECIPES["own"] = own_network, {}
    rank_of_a_run(rank, *args)


def test_a_network_of_ones_own_trains_resumes_starts_and_draws(
    glyphs, tmp_path, monkeypatch, capsys
):
    for script in (train, sys.modules["model"]):
        monkeypatch.setattr(script, "build", own_network)
    monkeypatch.setitem(train.RECIPES, "own", {})
    own = ["--model", "own", "--lr", 0.1, "--ema-decay", 0, "--accel", "none"]
    state = run(glyphs, tmp_path / "own", *own, "--steps", 4)
    assert state["ema"].keys() == OwnNetwork().state_dict().keys()
    run(glyphs, tmp_path / "resumed", *own, "--steps", 2)
    resumed = run(glyphs, tmp_path / "resumed", *own, "--steps", 4)
    assert_close(resumed["net"], state["net"], rtol=0, atol=0)
    given = tmp_path / "own" / "last.pt"
    started = run(glyphs, tmp_path / "next", *own, "--steps", 2, "--init-from", given)
    for found in (state, started):
        assert_close(found["net"]["out.weight"], found["net"]["conv.weight"], rtol=0, atol=0)
    assert (started["net"]["out.weight"] != OwnNetwork().out.weight).all()
    run(glyphs, tmp_path / "next", *own, "--steps", 4, "--init-from", given)
    start = (tmp_path / name / "samples" / "00000000.png" for name in ("own", "next"))
    assert len({path.read_bytes() for path in start}) == 2
    flags = given, "--out", tmp_path / "own.png"
    sample.main(sample.parse_args(list(map(str, flags))))
    monkeypatch.undo()
    refusal(capsys, 1, "model.py has no network with such weights", sample, *flags)


@pytest.mark.slow
def test_two_ranks_train_a_network_of_ones_own_like_one(glyphs, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "build", own_network)
    monkeypatch.setitem(train.RECIPES, "own", {})
    flags = ["--model", "own", "--micro-batch-size", 4, "--steps", 4, "--accel", "none"]
    alone = run(glyphs, tmp_path / "one", *flags)
    args = free_port(), tiny(glyphs, tmp_path / "two", *flags), tmp_path
    torch.multiprocessing.spawn(rank_of_an_own_network, args, 2)
    two = torch.load(tmp_path / "two" / "last.pt", weights_only=True)
    for one, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    nearly_equal(two["net"], alone["net"])


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
    p = (features @ net.fc.weight.T.double()).softmax(1).numpy()  # without the bias
    parts = p[:6], p[6:12], p[12:]
    scores = [np.exp(scipy.stats.entropy(part.T, part.mean(0)[:, None]).mean()) for part in parts]
    assert np.mean(scores) > 1.01
    assert (found["score"], found["count"]) == (pytest.approx(np.mean(scores), rel=1e-5), 15)


def test_the_distance_equals_closed_forms_scipys_matrix_root_and_pytorch_fids():
    rng, d = np.random.default_rng(0), 2048
    mu, scale = rng.standard_normal((2, d)), rng.random((2, d))
    expected = ((mu[0] - mu[1]) ** 2).sum() + ((scale[0] - scale[1]) ** 2).sum()
    ours = fid.frechet_distance(mu[0], np.diag(scale[0] ** 2), mu[1], np.diag(scale[1] ** 2))
    assert ours == pytest.approx(expected, rel=1e-9)
    x, y = rng.standard_normal((2, 300, 512)) @ rng.standard_normal((512, 512)) + mu[:, None, :512]
    for a, b in [(x[:100], x[:100]), (x[:200, :64], y[:250, :64]), (x, y[:90])]:
        (mu1, s1), (mu2, s2) = ((side.mean(0), np.cov(side.T)) for side in (a, b))  # low rank
        root = np.sqrt(scipy.linalg.eigvals(s1 @ s2).astype(complex)).real.sum()
        expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * root
        ours = fid.frechet_distance(mu1, s1, mu2, s2)
        assert ours == pytest.approx(expected, rel=1e-6, abs=1e-6 * np.trace(s1))
    theirs = peer("pytorch_fid.fid_score").calculate_frechet_distance
    statistics = mu1[:64], np.cov(x[:, :64].T), mu2[:64], np.cov(y[:, :64].T)
    assert fid.frechet_distance(*statistics) == pytest.approx(theirs(*statistics), rel=1e-6)


def test_fid_takes_every_kind_of_input(glyphs, inception, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pixels = prepare_latents.Dataset(glyphs).images[:6].transpose(0, 2, 3, 1)
    np.savez("raw.npz", arr_0=pixels)
    np.savez_compressed("packed.npz", arr_0=np.repeat(pixels, 3, axis=3))
    Path("folder").mkdir()
    for i, picture in enumerate(pixels):
        Image.fromarray(picture[..., 0]).save(f"folder/{i:02d}.png")

    def measure(*flags):
        fid.main(fid.parse_args([*flags, "--inception", str(inception), "--workers", "0"]))
        return capsys.readouterr().out.splitlines()

    prepare("glyphs", Path("set"), "--count", 12, "--seed", 1)
    lines = measure("set", "--save", "s.npz")
    assert lines[-3].startswith("set: 12 images, Inception score")
    assert "fewer than 10,000" in lines[-2]
    saved = np.load("s.npz")
    np.savez("adm.npz", ref_mu=saved["mu"], ref_sigma=saved["sigma"], arr_0=pixels[:1])
    kinds = "raw.npz s.npz, packed.npz adm.npz, folder set, s.npz s.npz, folder s.npz --crop 8"
    lines = [measure(*kind.split())[-1] for kind in kinds.split(", ")]
    *same, none, cropped = (float(line.removeprefix("FID ")) for line in lines)
    assert same == pytest.approx([same[0]] * 3, rel=1e-4)
    assert none < 1e-4 * np.trace(saved["sigma"])
    assert min(same[0], abs(cropped - same[0])) > 0.1


# ---------------------------------------------------------------------------- bad input


@pytest.fixture(scope="session")
def bad_input(tmp_path_factory, glyphs, checkpoint, inception):
    """A directory of good and bad files, to be named in commands."""
    root = tmp_path_factory.mktemp("bad")
    bad = type("RunsCode", (), {"__reduce__": lambda _: (os.mkdir, ("made by a pickle",))})()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in ("good", "cut", "large", "pickle", "run"):
            shutil.copytree(glyphs, name)
        os.truncate("cut/images.npy", os.stat("cut/images.npy").st_size - 1)
        np.save("large/labels.npy", np.load("good/labels.npy") + 1)
        np.save("pickle/labels.npy", np.array([bad] * 200))
        torch.save({"ema": bad, "state_dict": bad}, "run/last.pt")
        torch.save(bad, "old.pt", _use_new_zipfile_serialization=False)
        for name in ("done", "half"):
            shutil.copytree(checkpoint.parent, name)
        os.truncate("half/last.pt", os.stat("half/last.pt").st_size - 1000)
        Path("last.pt").symlink_to(checkpoint)
        torch.save(torch.load(checkpoint) | {"format": 1}, "older.pt")
        Path("exported").mkdir()
        Path("project").mkdir()
        Path("project/settings.json").write_text("{}")
        torch.save(exported(torch.load(checkpoint)), "exported/last.pt")
        torch.save(public_weights("SiT", "tiny", 1, 16, 5), "five.pt")
        Path("inception.pth").symlink_to(inception)
        random_vae("vae.pt")
        for name in ("images/a/1.png", "mixed/a/1.png", "mixed/2.png", "broken/3.png",
                     "taken/preview.png", "taken/progress.png"):  # fmt: skip
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16)).save(name)
        for name in ("broken/4.png", "text.npz"):
            Path(name).write_text("no picture")
        prepare_latents.write_glyphs("tens", count=10, size=10)
        wide = dict(count=9, shape=[1, 16, 32], classes=[], source="", files="")
        Path("wide").mkdir()
        writer = prepare_latents.DatasetWriter("wide", prepare_latents.pixel_meta(**wide))
        writer.write(0, np.zeros((9, 1, 16, 32)), np.zeros(9))
        writer.finish()
        np.savez("images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
        np.savez("stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
        np.savez("pickle.npz", **dict.fromkeys(("arr_0", "mu", "sigma"), np.array([bad])))
    return root


DONE = "train --out done --warmup 0 --ema-decay 0.5"  # the flags of the checkpoint, but for --steps
BAD_INPUT = [
    (1, f"{DONE} --lr 0.5", "--lr 0.5: done was trained with 0.004; name another --out"),
    (1, f"{DONE} --no-progressive", "--progressive False: done was trained with True"),
    (1, f"{DONE} --data tens", "tens is not the dataset of done; name another --out"),
    (1, f"{DONE} --steps 4", "--steps 4: done is at step 5 already"),
    (1, "train --out half", "half/last.pt is no whole file of weights"),
    (1, "train --init-from last.pt --conditioning t,r", "last.pt has --conditioning t"),
    (1, "train --init-from last.pt --model S/4", "last.pt has --model tiny"),
    (1, "train --init-from nothing.pt", "nothing.pt: No such file"),
    (1, "train --init-from five.pt", "five.pt has the number of classes 5, and this run 10"),
    (1, "train --out exported", "exported/last.pt holds only the network: name it as --init-from"),
    (2, "sample last.pt --export last.pt", "--export last.pt exists; name another"),
    (2, "sample last.pt --export good", "--export good exists; name another"),
    (2, "sample last.pt --out images/a/1.png", "images/a/1.png exists and is no .png of this"),
    (1, "sample last.pt --out project", "--out project holds other pictures; remove it or name"),
    (2, "fid images.npz --save stats.npz", "--save stats.npz exists; name another"),
    (1, "prepare_latents images --size 8 --out taken", "taken holds a preview.png without its"),
    (1, "train --out taken", "taken/progress.png was not made here; name another --out"),
    (1, "train --out last.pt/x", "last.pt/x/samples: Not a directory"),
    (1, "sample last.pt --out last.pt/x/y.npz", "last.pt/x/y.npz.parts: Not a directory"),
    (1, "prepare_latents images --size 8 --out last.pt/x", "last.pt/x: Not a directory"),
    (2, "prepare_latents nowhere --out x", "nowhere is no folder"),
    (2, "prepare_latents good --out x", "good is a dataset already"),
    (2, "prepare_latents glyphs --flip --out x", "are not for glyphs"),
    (1, "sample last.pt --export nowhere/x.pt", "nowhere/x.pt.tmp: No such file"),
    (1, "prepare_latents mixed --out x", "2.png among them, beside folders"),
    (1, "prepare_latents images --vae vae.pt --size 20 --out x", "--size 20 is no multiple of 8"),
    (1, "train --data images", "images holds no whole dataset"),
    (1, "train --data cut", "cut holds no whole dataset"),
    (1, "train --data large", "large holds no whole dataset (meta.json does not"),
    (2, "sample last.pt --out x.jpg", "--out x.jpg"),
    (1, "sample last.pt --out text.npz", "--out text.npz holds other pictures; remove it"),
    (2, "sample last.pt", "--out"),
    (1, "sample half/last.pt --out x", "half/last.pt is no whole file of weights"),
    (1, "sample last.pt --classes 10 --out x", "--classes"),
    (1, "sample older.pt --out x.png", "saved by another version"),
    (2, "fid stats.npz", "REFERENCE"),
    (1, "fid images.npz stats.npz", "--inception"),
    (1, "fid images.npz text.npz --inception vae.pt", "text.npz"),
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
    (2, "train --snr-gamma 4", "--snr-gamma has no effect without --accel minsnr"),
    (2, "train --dtd-cap 0.1 --accel none", "--dtd-cap has no effect without --accel dtd"),
    (2, "train --tangent 1 1 --r-neq-t 0", "--tangent has no effect"),
    (2, "train --v-noise 0.1 --accel none --r-neq-t 1", "--v-noise has no effect"),
    (2, "train --time-sampler uniform --time-mu 0", "--time-mu has no effect"),
    (1, "train --data nowhere", "nowhere holds no whole dataset"),
    (1, "train --micro-batch-size 3", "--batch-size 8 is no multiple of 1 ranks x 3"),
    (1, "train --batch-size 1", "--r-neq-t 0.25 of 1 is none or all"),
    (1, "train --accel none --gap 0.9999 1", "--gap"),
    (1, "train --model S/4 --data tens", "--model S/4: pictures of size 10 do not"),
    (1, "train --data wide", "--model tiny: pictures of 16 x 32 are not square"),
    (1, "train --vae nothing.pt", "nothing.pt: No such file"),
    (1, "sample run/last.pt --out x", "run/last.pt is damaged, or more than tensors"),
    (1, "prepare_latents images --vae run/last.pt --out x", "run/last.pt is damaged, or more"),
    (1, "prepare_latents images --vae old.pt --out x", "old.pt is damaged, or more"),
    (1, "fid pickle.npz --save x.npz --inception inception.pth", "pickle.npz"),
]


@pytest.mark.parametrize(("code", "command", "words"), BAD_INPUT)
def test_bad_input_is_refused_in_one_line(bad_input, monkeypatch, capsys, code, command, words):
    def files():  # none is changed
        return {p: p.stat().st_mtime_ns for p in bad_input.rglob("*.*") if p.name != ".lock"}

    monkeypatch.chdir(bad_input)
    before, (script, *flags) = files(), command.split()
    flags = tiny("good", "out", *flags) if script == "train" else flags
    refusal(capsys, code, words, sys.modules[script], *flags)
    assert files() == before
    assert not Path("made by a pickle").exists()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (dict(RANK="1"), "RANK 1 of WORLD_SIZE 1: no job"),
        (dict(RANK="2", WORLD_SIZE="2", MASTER_ADDR="x"), "RANK 2 of WORLD_SIZE 2: no job"),
        (dict(WORLD_SIZE="2", MASTER_ADDR="x"), "RANK 0 of WORLD_SIZE 2: no job"),
        (dict(RANK="0", WORLD_SIZE="2"), "RANK 0 of WORLD_SIZE 2: no job"),
        (dict(RANK="-1"), "RANK is -1"),
        (dict(WORLD_SIZE="0"), "WORLD_SIZE is 0"),
    ],
)
def test_a_place_in_a_job_that_cannot_be_is_refused(
    checkpoint, tmp_path, monkeypatch, capsys, environment, words
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refusal(capsys, 1, words, sample, checkpoint, "--out", tmp_path / "x.png")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):  # empty is unset
        monkeypatch.setenv(name, "")
    sampled(checkpoint, tmp_path / "x.png", "--num", 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    with pytest.raises(SystemExit, match="LOCAL_WORLD_SIZE is 0"):
        prepare_latents.parse_args(["x", "--out", "y"])
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
    refusal(capsys, 1, "torch 2.10.1+cu128: 2.11 is needed", sample, checkpoint, "--out", "x.png")


STORE = """
import sys, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from prepare_latents import join_ranks, leave_ranks
join_ranks()
leave_ranks()
"""


def test_what_a_job_that_hung_left_behind_does_not_end_its_successor(tmp_path):
    """NCCL leaves this key in torchrun's store, and its ranks end where they see it."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("exception_dump", "1")
    job = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port, WORLD_SIZE=2, GROUP_WORLD_SIZE=1)
    job |= dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT=1)
    environment, ranks = os.environ | {name: str(value) for name, value in job.items()}, []
    for rank in "01":
        options = dict(env=environment | {"RANK": rank})
        ranks.append(subprocess.Popen([sys.executable, "-c", STORE, HERE], **options))
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    assert not store.check(["exception_dump"])


def grow_no_more(size=100_000):
    """For a process that is about to start: its files stay below a size, like on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_disk_that_is_full_ends_a_script_in_one_line(checkpoint, glyphs, tmp_path):
    run_, npz, data = (tmp_path / name for name in ("run", "x.npz", "set"))
    for script, flags, made in [
        ("train.py", tiny(glyphs, run_, "--steps", 2), run_ / "last.pt"),
        ("sample.py", [checkpoint, "--out", npz, "--num", 2000], npz),
        ("prepare_latents.py", ["glyphs", "--count", 2000, "--out", data], data / "meta.json"),
    ]:
        options = dict(start=subprocess.Popen, preexec_fn=grow_no_more, stderr=subprocess.PIPE)
        job = torchrun(1, script, *flags, text=True, stdout=subprocess.DEVNULL, **options)
        error = [line for line in job.communicate()[1].splitlines() if "%, " not in line]
        assert (job.returncode, len(error)) == (1, 1), error
        assert re.search("File too large|requested", error[0])
        assert not made.exists()
    assert not list(run_.rglob("*.tmp")) + list(
        tmp_path.glob("*.tmp")
    )  # a full disk needs the room


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
    job = torchrun(2, *encode, start=subprocess.Popen, start_new_session=True)
    while not (two / "labels.npy").exists() or (np.load(two / "labels.npy") >= 0).sum() < 60:
        assert job.poll() is None
        time.sleep(0.05)
    kill_all(str(two))
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
        distance = float(done.stdout.split()[-1])  # train.py drew the same:
        assert metrics(tmp_path / "run")[-1]["fid"] == pytest.approx(distance, rel=5e-5)


# ---------------------------------------------------------------------------- a finished run


class DigitsJudge:
    """A small classifier of digits, and the Fréchet distance in its 64 last features."""

    def __init__(self, folder):
        data, self.new, built_in = (
            prepare("glyphs", folder / str(n), "--count", n, "--seed", seed)[range(n)]
            for n, seed in ((9999, 9999), (2000, 2000), (20000, 0))
        )
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.ReLU(),
        )  # fmt: skip
        self.classes = nn.Linear(64, 10)
        judge = nn.Sequential(self.features, self.classes)
        optimizer = torch.optim.Adam(judge.parameters(), lr=2e-3)
        for indices in torch.cat([torch.randperm(9999) for _ in range(3)]).split(100):
            optimizer.zero_grad()
            F.cross_entropy(judge(data[0][indices] / 255), data[1][indices]).backward()
            optimizer.step()
        judge.requires_grad_(False)
        self.reference, self.spread = self.moments(built_in[0])[1:], self.spread_of(*self.new)

    def moments(self, images):
        """Features (n, 64), their mean and their covariance."""
        features = torch.cat([self.features(part / 255) for part in images.split(500)])
        return features, features.double().mean(0).numpy(), features.double().T.cov().numpy()

    def spread_of(self, images, labels):
        """Mean distance between two pictures of a class, over the first 100 of each."""
        groups = (images[labels == k][:100].flatten(1).double() for k in range(10))
        return np.mean([F.pdist(group).mean().item() for group in groups])

    def __call__(self, images, labels):
        """Share classified as labelled; spread, by that of unseen built-in pictures; and Fréchet
        distance to the 20,000 of data/glyphs."""
        features, *moments = self.moments(images)
        right = (self.classes(features).argmax(1) == labels).double().mean().item()
        distance = fid.frechet_distance(*self.reference, *moments)
        return right, self.spread_of(images, labels) / self.spread, distance


@pytest.mark.skipif("MEANFLOW_RUN" not in os.environ, reason="MEANFLOW_RUN names no finished run")
def test_a_trained_run_draws_the_digits_it_is_asked_for(tmp_path):
    """One step, two steps and 32 Euler steps of a finished run on the built-in digits."""
    judge, run = DigitsJudge(tmp_path), os.environ["MEANFLOW_RUN"]
    right, _, distance = judge(*judge.new)
    assert right > 0.99
    assert distance < 3
    net, state = load(Path(run) / "last.pt")
    ways = {"1 step": dict(nfe=1), "2 steps": dict(nfe=2), "Euler": dict(nfe=32, velocity=True)}
    found = []
    for name, way in ways.items():
        labels = torch.arange(1000 if name == "Euler" else 5000) % 10
        parts = torch.arange(len(labels)).split(500)
        x = torch.cat([sample.draw(net, labels[i], i.tolist(), 1, **way) for i in parts])
        right, variety, distance = judge(torch.from_numpy(prepare_latents.to_pixels(x)), labels)
        print(f"{run}, {name}: right {right:.1%}, variety {variety:.2f}, distance {distance:.1f}")
        found.append((right, variety))
    rights, varieties = zip(*found, strict=True)
    assert min(varieties) > 0.5
    if state["args"]["kappa"]:  # fewer are right without guidance
        assert min(rights) >= 0.95


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
    with pytest.raises(SystemExit):
        train.parse_args(["--tensorboard"])
    assert "pip install tensorboard" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--accel", "none", "--r-neq-t", 0.5, "--tangent", 1, 0.5, "--adaptive-p", 0.5,
         "--conditioning", "t,r", "--workers", 1],
        ["--accel", "minsnr", "--snr-gamma", 2, "--micro-batch-size", 4, "--v-noise", 0.01],
        ["--accel", "dtd", "--dtd-clusters", 3, "--dtd-cap", 0.6, "--label-drop", 0.5,
         "--omega", 0.2, "--kappa", 0.9, "--cfg-interval", 0.5, 0.7, "--micro-batch-size", 4],
        ["--accel", "none", "--progressive", "--beta-k", 2, "--gap", 0.2, 0.4, "--adaptive-c", 0.1,
         "--time-mu", 0.3, "--time-sigma", 2, "--adam-beta2", 0.5, "--warmup", 4],
    ],
)  # fmt: skip
def test_train_takes_the_steps_of_the_textbook(glyphs, tmp_path, flags):
    """Three steps of train.py, accumulated and all, against the textbook's on whole batches."""
    flags = ["--steps", 3, "--seed", 5, "--lr", 1e-3, "--ema-decay", 0.7, "--warmup", 1, *flags]
    a, data = vars(train.parse_args(list(map(str, flags)))), prepare_latents.Dataset(glyphs)
    given = random_start(glyphs, tmp_path / "given", "--conditioning", a["conditioning"])
    net, _ = load(given)
    ema = copy.deepcopy(net.state_dict())
    state = run(glyphs, tmp_path, *flags, "--init-from", given)
    rows = metrics(tmp_path)
    names = ["omega", "kappa", "cfg_interval", "tangent", "adaptive_p", "adaptive_c"]
    goal = Objective(10, *(a[name] for name in names))
    quantile = partial(LOGNORM, mu=a["time_mu"], sigma=a["time_sigma"])
    pairs = schedules.time_pairs(quantile, a["gap"]).float() if a["gap"] else None
    lam, dtd = schedules.beta_lambda(quantile, pairs), schedules.DTD(3, 3, 200, 0.6)
    gamma, larger = a["snr_gamma"], quantile(((torch.arange(1e5) + 0.5) / 1e5).sqrt())  # of two
    mean = torch.minimum((1 - larger) ** 2, gamma * larger**2).mean()
    adam = torch.optim.Adam(net.parameters(), betas=(0.9, a["adam_beta2"]))
    micro = a["micro_batch_size"] or 8
    num_neq = int(micro * a["r_neq_t"])
    order = np.random.default_rng((5, 0)).permutation(200)
    for step in range(3):
        batch, s = [], 1 - (step / 3) ** a["beta_k"]
        for chunk, rows_of_chunk in enumerate(order[8 * step : 8 * step + 8].reshape(-1, micro)):
            g = sample.keyed_generator(5, step, chunk)
            x = torch.from_numpy(data.images[rows_of_chunk]) / 127.5 - 1
            e = torch.randn(x.shape, generator=g)
            y = torch.from_numpy(data.labels[rows_of_chunk]).long()
            y = meanflow.drop_labels(y, 10, a["label_drop"], g)
            mass = dtd.mass if a["accel"] == "dtd" else 1.0
            t, r = schedules.sample_t_r(micro - num_neq, num_neq, quantile, mass, pairs, g)
            alpha = torch.minimum((1 - t) ** 2, gamma * t**2) / mean
            alpha = alpha if a["accel"] == "minsnr" else 1.0
            beta = 1 - s + lam * s * (1 - t + r) if a["progressive"] else 1.0
            noise = meanflow.corruption(e - x, a["v_noise"], g) if a["v_noise"] else 0 * x
            batch.append((x, e, r, t, y, torch.where(r == t, alpha, beta), noise))
        *batch, noise = map(torch.cat, zip(*batch, strict=True))
        loss, errors = textbook_loss(net, *batch, goal, noise)
        adam.zero_grad()
        loss.backward()
        gradient = [p.grad for p in net.parameters() if p.requires_grad]
        lr = adam.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / a["warmup"])
        adam.step()
        for name, value in net.state_dict().items():
            ema[name] = 0.7 * ema[name] + 0.3 * value
        gap = batch[3] - batch[2]
        equal = gap == 0
        dtd.update(errors[equal].mean(), step)
        expected = dict(step=step + 1, loss=loss.detach(), lr=lr)
        expected |= dict(v_error=errors[equal].mean(), u_error=errors[~equal].mean())
        expected |= dict(grad_norm=torch.stack([g.norm() for g in gradient]).norm())
        expected |= dict(s=1 - ((step + 1) / 3) ** a["beta_k"]) if a["progressive"] else {}
        expected |= dict(stage=dtd.stage) if a["accel"] == "dtd" else {}
        for lo, hi in [(0.1, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 0.9)]:
            if (inside := (lo <= gap) & (gap < hi)).any():
                expected[f"u_error_{lo}-{hi}"] = errors[inside].mean()
        assert rows[step] == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-4)
    nearly_equal(state["net"], net.state_dict())
    nearly_equal(state["ema"], ema)
    if a["accel"] == "dtd":
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


@pytest.mark.parametrize(
    ("flag", "tolerance"),
    [
        ("--dtype=bfloat16", 1e-2),
        pytest.param("--compile", 1e-4, marks=pytest.mark.slow),
        ("--activation-checkpointing", 1e-4),
    ],
)
def test_a_faster_or_smaller_run_takes_the_same_steps(glyphs, tmp_path, flag, tolerance):
    flags = ["--steps", 3, "--lr", 1e-3, "--init-from", random_start(glyphs, tmp_path / "given")]
    for out, more in [("plain", []), ("other", [flag])]:
        run(glyphs, tmp_path / out, "--dtype", "float32", *flags, *more)
    rows, plain = metrics(tmp_path / "other"), metrics(tmp_path / "plain")
    for ours, theirs in zip(rows, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)
    assert (rows == plain) == (flag == "--activation-checkpointing")


def test_a_run_starts_from_the_weights_it_is_given(glyphs, checkpoint, tmp_path):
    start = run(glyphs, tmp_path, "--steps", 1, "--lr", 1e-12, "--init-from", checkpoint)
    assert_close(start["net"], torch.load(checkpoint)["ema"])


RECIPES = [
    ("B/4", 131.2, 1_201_095, {}),
    ("M/2", 308.0, 1_201_095, {}),
    ("L/2", 459.1, 1_201_095, dict(omega=0.2, kappa=0.92, cfg_interval=[0.0, 0.8])),
    ("XL/2", 676.4, 1_201_095, dict(omega=0.2, kappa=0.92, cfg_interval=[0.0, 0.75])),
    ("XL/2+", 676.4, 5_004_559, dict(epochs=1000, cfg_interval=[0.3, 0.8])),
]


@pytest.mark.parametrize(("name", "size", "steps", "own"), RECIPES)
def test_defaults_are_the_papers(tmp_path, monkeypatch, capsys, name, size, steps, own):
    """arXiv 2505.13447v1, Tab. 4, as --dry-run prints it for ImageNet, which need not be there."""
    monkeypatch.chdir(tmp_path)
    train.main(train.parse_args(["--model", name, "--dry-run"]))
    text, flags = capsys.readouterr().out.split("{", 1)
    flags = json.loads("{" + flags)
    papers = dict(epochs=240, batch_size=256, lr=1e-4, adam_beta2=0.95, ema_decay=0.9999, warmup=0,
                  omega=1.0, kappa=0.5, cfg_interval=[0.0, 1.0], label_drop=0.1, r_neq_t=0.25,
                  time_sampler="lognorm", time_mu=-0.4, time_sigma=1.0, adaptive_p=1.0,
                  adaptive_c=1e-3, tangent=[0.0, 1.0], conditioning="t,t-r", steps=None, gap=None,
                  beta_k=1.0, snr_gamma=5.0, v_noise=0.0) | own  # fmt: skip
    assert flags | papers == flags
    assert f"{name}: {size} M parameters, 1,281,167 pictures (4, 32, 32) of 1000 classes" in text
    assert f"{steps:,} steps of 256 = {flags['epochs']}.0 epochs" in text
    assert list(tmp_path.iterdir()) == []
    assert train.parse_args(["--model", name, "--kappa", "0"]).kappa == 0
    assert train.parse_args(["--model", name, "--time-mu", "-1e-1"]).time_mu == -0.1
    accels = [train.parse_args(["--accel", accel]) for accel in ("none", "minsnr", "dtd")]
    assert [args.progressive for args in accels] == [False, True, True]


@pytest.mark.parametrize("more", [[], ["--activation-checkpointing"]])
def test_the_bench_compares_the_steps_and_writes_nothing(glyphs, tmp_path, capsys, more):
    flags = ["--bench", "--data", glyphs, "--out", tmp_path / "none", "--batch-size", 8, *more]
    train.main(train.parse_args(list(map(str, flags))))
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:26].strip(): line[26:].split() for line in lines if "ow" in line[:26]}
    ratio = {name: float(row[0]) for name, row in rows.items()}
    flops = {name: float(row[1]) / float(rows["flow matching"][1]) for name, row in rows.items()}
    assert len(rows) == 3 + 2 * (not more)
    assert ratio["flow matching"] == 1 < ratio["MeanFlow"] < ratio["guided MeanFlow"]
    assert 1 < flops["MeanFlow"] < 1.2
    assert 1.4 < flops["guided MeanFlow"] < 1.6
    assert all(0 < float(row[2]) < 10 for row in rows.values())
    if not more:
        assert flops["MeanFlow, textbook"] > 1.6
        assert flops["guided MeanFlow, textbook"] > 2.2
        assert ratio["guided MeanFlow"] < ratio["guided MeanFlow, textbook"]
    for what in ["sampling in one step", "the loader alone, 1 threads"]:
        assert float(re.search(rf"{what}: (\S+) pictures/s", "\n".join(lines))[1]) > 0
    assert not (tmp_path / "none").exists()


def test_the_bench_goes_on_where_a_row_needs_too_much_memory(glyphs, monkeypatch, capsys):
    def exhausted(*args, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(meanflow, "textbook_loss", exhausted)
    train.main(train.parse_args(["--bench", "--data", str(glyphs), "--batch-size", "8"]))
    out = capsys.readouterr().out
    assert "guided MeanFlow, textbook: out of memory" in out
    assert re.search(r"^guided MeanFlow +\d", out, re.MULTILINE)


def rank_of_a_run(rank, port, flags, out):
    """One of two, in this process; leaves its number of graphs and of breaks between graphs."""
    address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, WORLD_SIZE=2)
    os.environ |= {name: str(value) for name, value in address.items()}
    UNETS["unet"] = (1, 32)
    train.main(train.parse_args(flags))
    counted = torch._dynamo.utils.counters
    torch.save((counted["stats"]["unique_graphs"], counted["graph_break"]), out / f"{rank}.graphs")


@pytest.mark.slow
def test_two_ranks_train_like_one_that_accumulates_which_takes_over(glyphs, tmp_path):
    """One rank takes the textbook's steps on whole batches, see above."""
    flags = ["--micro-batch-size", 2, "--warmup", 0, "--lr", 1e-3, "--r-neq-t", 0.5]
    flags += ["--accel", "none", "--init-from", random_start(glyphs, tmp_path / "given")]
    alone = run(glyphs, tmp_path / "one", *flags, "--steps", 4)
    two = tiny(glyphs, tmp_path / "two", *flags, "--steps", 2)
    torch.multiprocessing.spawn(rank_of_a_run, (free_port(), two, tmp_path), 2)
    state = run(glyphs, tmp_path / "two", *flags, "--steps", 4)
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    for name in ("net", "ema"):
        nearly_equal(state[name], alone[name])


class Waits(TorchDispatchMode):
    """Collects the operations of a run's steps: from the first random number to the next step."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names, self.on = [], False
        for name, on in [("keyed_generator", True), ("largest_of_ranks", False)]:
            monkeypatch.setattr(train, name, partial(self.switch, on, getattr(train, name)))

    def switch(self, on, function, *args, **kwargs):
        if on != self.on:
            self.on = on
            self.__enter__() if on else self.__exit__(None, None, None)
        return function(*args, **kwargs)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        masked = name.startswith("index") and any(
            getattr(index, "dtype", None) in (torch.bool, torch.uint8) for index in args[1]
        )
        self.names.append("masked index" if masked else name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("accel", ["none", "minsnr", "dtd"])
def test_a_step_never_waits_for_the_device(glyphs, tmp_path, monkeypatch, accel):
    """Guided, accumulated, with all that is measured: no value is read by the host."""
    mode = Waits(monkeypatch)
    flags = ["--omega", 0.5, "--kappa", 0.3, "--micro-batch-size", 4]
    flags += ["--steps", 4, "--log-every", 4, "--v-noise", 0.1, "--accel", accel]
    run(glyphs, tmp_path, *flags)
    assert mode.names.count("_fused_adam_") == 4
    assert mode.names.count("_foreach_lerp_") == 4
    waits = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "masked index", "_unique2"}
    assert not waits & set(mode.names)


def test_a_rank_without_a_gpu_is_told_so_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SystemExit, match="there are 2 GPUs on this machine"):
        prepare_latents.join_ranks()


@pytest.mark.slow
def test_a_compiled_run_has_a_graph_for_each_way_through_a_block(glyphs, tmp_path):
    """And not for each block, rank, micro-batch or step; on two ranks, with checkpointing."""
    flags = ["--compile", "--steps", 5, "--batch-size", 16, "--micro-batch-size", 4]
    flags += ["--omega", 0.5, "--kappa", 0.3, "--activation-checkpointing"]
    args = free_port(), tiny(glyphs, tmp_path, *flags), tmp_path
    torch.multiprocessing.spawn(rank_of_a_run, args, 2)
    for rank in range(2):
        graphs, breaks = torch.load(tmp_path / f"{rank}.graphs")
        # u of all samples and of those with r < t without gradient; u of all with it
        assert (graphs, sum(breaks.values())) == (3, 0)


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
    kept, pictures = [], []
    for out in (one, two):
        state = torch.load(out / "last.pt", weights_only=True)
        names = "step", "net", "ema", "dtd", "optimizer"
        kept.append([state[name] for name in names])
        pictures.append({p.relative_to(out): p.read_bytes() for p in out.rglob("*.png")})
    assert_close(kept[0], kept[1], rtol=0, atol=0)
    assert metrics(one) == metrics(two)
    assert pictures[0] == pictures[1] != {}


@pytest.mark.parametrize("accel", ["none", "minsnr", "dtd"])
def test_a_stopped_run_ends_with_the_same_bits(glyphs, tmp_path, monkeypatch, capsys, accel):
    """One rank that accumulates, stopped by each signal, at the first and at the last step too."""
    flags = ["--steps", 6, "--accel", accel, "--micro-batch-size", 4, "--sample-every", 2]
    run(glyphs, tmp_path / "whole", *flags)
    loss = meanflow.loss
    for number, at in [(signal.SIGTERM, 0), (signal.SIGUSR1, 2), (signal.SIGHUP, 5)]:
        out, calls = tmp_path / number.name, iter(range(99))

        def interrupted(*args, at=at, number=number, calls=calls):
            if next(calls) == 2 * at + at % 2:  # in the first or the second micro-batch
                os.kill(os.getpid(), number)
            return loss(*args)

        with monkeypatch.context() as patch:
            patch.setattr(meanflow, "loss", interrupted)
            with pytest.raises(SystemExit) as stop:
                run(glyphs, out, *flags)
        assert stop.value.code == 128 + number
        assert f"{number.name}: stopped after step {at + 1};" in capsys.readouterr().out
        assert torch.load(out / "last.pt", weights_only=True)["step"] == at + 1
        run(glyphs, out, *flags)
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


def test_sampling_leaves_what_is_not_its_own(checkpoint, tmp_path):
    names_in(tmp_path, "x.npz.parts/mine.txt")
    assert len(sampled(checkpoint, tmp_path / "x.npz", "--num", 4)) == 4
    assert [path.name for path in (tmp_path / "x.npz.parts").iterdir()] == ["mine.txt"]
    for _ in range(2):  # its own picture is replaced
        sampled(checkpoint, tmp_path / "x.png", "--num", 4)
    assert not (tmp_path / "x.png.parts").exists()


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


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
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
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [2, "train.py", *tiny(glyphs, killed, "--steps", 60, "--save-every", 10)]
    options = dict(start=subprocess.Popen, launch=["--max-restarts=2"])
    with open(tmp_path / "log", "w") as log:
        job = torchrun(*command, stdout=log, **options)
    seen(tmp_path / "log", "  saved ", job)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert job.wait(180) == 0
    assert re.search("from step 0;.*from step [1-5]0;", (tmp_path / "log").read_text(), re.S)
    torchrun(*command, "--out", whole)
    same_run(whole, killed)


# ---------------------------------------------------------------------------- README.md


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
            train.main(train.parse_args([*flags, *toy.split()]))
            assert Path(flags[flags.index("--out") + 1], "last.pt").exists()
        else:
            sample.main(sample.parse_args([*flags, "--num", "2"]))
            assert Path(flags[flags.index("--out") + 1]).exists()


def digit_table(runs, rows, caption, columns):
    """A Markdown table from docs/digits.csv, of {run: caption} and of {title: (steps, way)}.

    The first row has the mean distance; the others have the mean difference to the first row's run
    of the same seed ± standard error, in bold where a t-test gives p < 0.05. Only seeds that have
    all rows count.
    """
    table = [[caption, *rows.values()]]
    for title, (steps, way) in columns.items():
        seeds = {s for _, _, s in runs if all((steps, name, s) in runs for name in rows)}
        first, *others = [
            np.array([float(runs[steps, name, s][f"distance_{way}"]) for s in seeds])
            for name in rows
        ]
        table.append([f"{title}, {len(seeds)} seeds", f"{first.mean():.1f}"])
        for other in others:
            difference = other - first
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

    def by_way(rows, steps):
        columns = {title: (steps, way) for title, way in ways.items()}
        return digit_table(runs, rows, f"{steps:,} training steps", columns)

    def by_length(rows, *lengths):
        for title, way in ways.items():
            columns = {f"{steps:,} training steps": (steps, way) for steps in lengths}
            yield digit_table(runs, rows, title, columns)

    tables = [*by_length(plain, 500, 1000, 2000, 4000), *by_length(uniform, 1000, 2000, 4000)]
    tables += [next(by_length(uniform_u, 1000, 2000, 4000))]
    tables += [by_way(dtd, 2000), by_way(guided, 1563)]
    print("", *tables, sep="\n\n")
    text = (HERE / "docs" / "findings.md").read_text()
    section = text.split("## What the improved training does to the digits")[1].split("\n## ")[0]
    assert re.findall(r"(?:^\|.*\n)*^\|.*", section, re.M) == tables


@pytest.mark.slow
def test_the_code_of_the_readme_draws_its_data_in_one_step(two_dimensions):
    code = re.search(r"^```python\n(.*?)^```", (HERE / "README.md").read_text(), re.M | re.S)[1]
    torch.manual_seed(0)
    net, data = two_dimensions.Network(), two_dimensions.points("three gaussians")
    names = dict(torch=torch, meanflow=meanflow, schedules=schedules, steps=3000, net=net)
    names |= dict(data=data.float().view(-1, 2, 1, 1), optimizer=torch.optim.Adam(net.parameters()))
    exec(code, names)
    distances = torch.cdist(names["x"].flatten(1), data.float()) / data.std()
    assert distances.amin(1).mean() < 0.1  # samples lie on the data
    assert distances.amin(0).mean() < 0.1  # and everywhere on it


# ---------------------------------------------------------------------------- two dimensions


@pytest.fixture(scope="module")
def two_dimensions():
    pytest.importorskip("matplotlib").use("Agg")
    path = HERE / "docs" / "two_dimensions.py"
    spec = importlib.util.spec_from_file_location("two_dimensions", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_fields_of_two_dimensions_are_exact(two_dimensions):
    """v is the mean of e - x near z; the flow is scipy's; u + (t - r) du/dt = v along it."""
    data, g = two_dimensions.points("checkerboard", 300), torch.Generator().manual_seed(0)
    t, z = 0.6, torch.tensor([[0.3, -0.2], [1.0, 0.4]]).double()
    x = data[torch.randint(300, (2_000_000,), generator=g)]
    e = torch.randn(x.shape, generator=g).double()
    for place, v in zip(z, two_dimensions.velocity(z, t, data), strict=True):
        near = (((1 - t) * x + t * e - place).norm(dim=1) < 0.03).nonzero()[:, 0]
        found = (e - x)[near]
        error = found.std(0) / len(near) ** 0.5
        assert len(near) > 200
        assert ((found.mean(0) - v).abs() < 3 * error + 0.03 * 1 / t).all()

    def derivative(t, z):
        return two_dimensions.velocity(torch.from_numpy(z).view(-1, 2), t, data).numpy().ravel()

    noise = torch.randn(5, 2, generator=g).double()
    solved = scipy.integrate.solve_ivp(derivative, (1, 1e-3), noise.numpy().ravel(), "DOP853",
                                       rtol=1e-10, atol=1e-10).y[:, -1].reshape(-1, 2)  # fmt: skip
    assert_close(two_dimensions.flow(noise, data)[-1], torch.from_numpy(solved), rtol=0, atol=1e-6)
    t, r, h = 0.8, 0.3, 2e-4
    z, flow = {t + h: noise}, partial(two_dimensions.flow, data=data, steps=400)
    z[t] = flow(z[t + h], start=t + h, end=t)[-1]
    z[t - h] = flow(z[t], start=t, end=t - h)[-1]
    end = flow(z[t - h], start=t - h, end=r)[-1]
    u = {time: (place - end) / (time - r) for time, place in z.items()}
    dudt, v = (u[t + h] - u[t - h]) / (2 * h), two_dimensions.velocity(z[t], t, data)
    assert_close(u[t] + (t - r) * dudt, v, rtol=0, atol=1e-5)


def test_two_dimensions_trains_draws_and_makes_its_table(
    two_dimensions, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(two_dimensions.points, "__defaults__", (700,))
    monkeypatch.setattr(two_dimensions.Judge.__init__, "__defaults__", (20,))
    table, kept = tmp_path / "runs.csv", HERE / "docs" / "two_dimensions.csv"
    table.write_text(kept.read_text().splitlines()[0] + "\n")
    short = ["--steps", "3", "--csv", str(table), "--out", str(tmp_path)]
    for _ in range(2):  # the second finds them all done
        two_dimensions.main(["--runs", "gaussian", *short, "--seeds", "0", "2", "--dtd-times", "v"])
    lines = [line.split(",") for line in table.read_text().splitlines()]
    assert [line[1] for line in lines[1:]] == [*two_dimensions.ROWS] * 2
    errors = {line[1]: [float(error) for error in line[8:]] for line in lines[1:7]}
    ratio = two_dimensions.ratios(table)["gaussian", "beta", "3", "constant", "1.0", "", ""]
    assert_close(ratio[0], np.divide(errors["beta"], errors["MeanFlow"]))
    mean, error = two_dimensions.mean_and_error(ratio)
    assert_close(mean, np.sqrt(ratio[0] * ratio[1]))
    assert_close(error, mean * np.abs(np.log(ratio[0] / ratio[1])) / 2)
    two_dimensions.main(["--table", "--out", str(tmp_path)])
    assert "| checkerboard | MinSNR + beta | 1000 | falling |" in capsys.readouterr().out
    two_dimensions.main(short)
    with Image.open(tmp_path / "average_velocity.gif") as gif:
        assert gif.n_frames > 10
    assert (HERE / "docs" / "average_velocity.gif").stat().st_size < 600_000
    assert (tmp_path / "average_velocity.png").exists()
