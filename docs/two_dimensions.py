"""MeanFlow in two dimensions, where the exact answer is known; also an example of a fork.

    python docs/two_dimensions.py                       docs/average_velocity.png and .gif
    python docs/two_dimensions.py --runs checkerboard   trains, appends to docs/two_dimensions.csv
    python docs/two_dimensions.py --table               what is in it, and docs/improved.png

The data are N points x_i. Then the marginal velocity v(z, t) = E[e - x | z] is a closed form, its
flow from noise (t = 1) to data (t = 0) an ODE, and the exact average velocity of one step is
u(e, 0, 1) = e - flow(e). So the errors of a network are plain mean squares.
"""

import argparse
import csv
import math
import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import meanflow  # noqa: E402
import schedules  # noqa: E402

TABLE, MEASURES = HERE / "two_dimensions.csv", ("one step", "two steps", "Euler", "v")
SETTINGS = ("set", "row", "steps", "learning rate", "cap", "dtd times", "seed")
KINDS = ("gaussian", "gaussians", "spiral", "checkerboard", "checkerboard 8")
# The rows of arXiv 2511.19065v2, Tab. 3: how v is learned early; whether beta weighs u.
ROWS = {
    "MeanFlow": ("none", False), "beta": ("none", True), "MinSNR": ("minsnr", False),
    "MinSNR + beta": ("minsnr", True), "DTD": ("dtd", False), "DTD + beta": ("dtd", True),
}  # fmt: skip

# ---------------------------------------------------------------------------- exact fields


def points(kind, count=2000):
    """The data set of this name: (count, 2) float64."""
    g = torch.Generator().manual_seed(0)
    if kind == "spiral":
        s = 6 * math.pi * torch.rand(count, generator=g).sqrt()
        return (0.3 / math.pi * s[:, None] * torch.stack([s.cos(), s.sin()], 1)).double()
    if kind.startswith("checkerboard"):  # of 4 x 4 or 8 x 8 cells
        cells = 8 if kind.endswith("8") else 4
        x = cells * torch.rand(4 * count, 2, generator=g)
        return ((x[x.floor().sum(1) % 2 == 0][:count] / cells - 0.5) * 3).double()
    k = torch.randint({"gaussian": 1, "gaussians": 8}[kind], (count,), generator=g) * math.pi / 4
    centres = 1.5 * torch.stack([k.cos(), k.sin()], 1)
    return (centres + 0.05 * torch.randn(count, 2, generator=g)).double()


def velocity(z, t, data):
    """The marginal velocity at z (B, 2), time t; data: (N, 2). The weights are p(x_i | z)."""
    means = (1 - t) * data  # logits: -|z - mean|^2 / (2 t^2), but for what is the same for all i
    logits = (z @ means.T - means.square().sum(1) / 2) / t**2
    return (z - logits.softmax(1) @ data) / t


def flow(z, data, steps=200, start=1.0, end=1e-3):
    """z (B, 2) carried from t = start to end by Runge and Kutta: the path, (steps + 1, B, 2)."""
    times = torch.linspace(start**0.5, end**0.5, steps + 1).double() ** 2
    path = [z]
    for t, h in zip(times, times.diff(), strict=False):
        k1 = velocity(z, t, data)
        k2 = velocity(z + h / 2 * k1, t + h / 2, data)
        k3 = velocity(z + h / 2 * k2, t + h / 2, data)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(z + h * k3, t + h, data))
        path.append(z)
    return torch.stack(path)


# ---------------------------------------------------------------------------- a network of its own


class Network(nn.Module):
    """u(z, r, t): three layers on z and on waves of t and t - r. An image is (2, 1, 1) here."""

    def __init__(self, width=128):
        super().__init__()
        sizes = [20, width, width, width, 2]
        layers = [layer for size in pairwise(sizes) for layer in (nn.Linear(*size), nn.SiLU())]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, z, r, t, y):
        times = torch.stack([t, t - r], 1)  # (B, 2)
        waves = times[:, :, None] * 2 * math.pi * 2.0 ** torch.arange(-2, 2)  # (B, 2, 4)
        inputs = [z.flatten(1), times, waves.cos().flatten(1), waves.sin().flatten(1)]
        return self.layers(torch.cat(inputs, 1)).view_as(z)


def train(data, steps, seed, row="MeanFlow", falling=False, cap=0.2, dtd_times="both", batch=512):
    """A network after `steps` steps of `batch` points, three quarters of them with r < t."""
    torch.manual_seed(seed)
    net, num_eq, (accel, progressive) = Network(), batch // 4, ROWS[row]
    quantile, num_neq = schedules.uniform_quantile, batch - num_eq
    schedule = schedules.Schedule(steps, quantile, accel, progressive, dtd_cap=cap)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(steps):
        t, r, weight = schedule.sample(num_eq, num_neq, step)
        if dtd_times == "v":  # the curriculum is for r = t alone
            u_times = schedules.sample_t_r(num_eq, num_neq, quantile)
            t[num_eq:], r[num_eq:] = (times[num_eq:] for times in u_times)
            if progressive:
                gaps = (t - r)[num_eq:]
                weight[num_eq:] = schedules.beta(gaps, schedule.s(step), schedule.lam)
        x = data[torch.randint(len(data), (batch,))].float().view(-1, 2, 1, 1)
        loss, errors = meanflow.loss(net, x, torch.randn_like(x), r, t, None, num_neq, weight)
        optimizer.zero_grad()
        loss.backward()
        if falling:
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        optimizer.step()
        schedule.update(errors[:num_eq].mean(), step)
    return net


def draw(net, e, *how):
    """meanflow.sample for points (B, 2)."""
    return meanflow.sample(net, e.float().view(-1, 2, 1, 1), None, *how).view(-1, 2).double()


class Judge:
    """Mean squared errors against the exact fields, of 2,000 points."""

    def __init__(self, data, count=2000):
        g = torch.Generator().manual_seed(1)
        self.e = torch.randn(count, 2, generator=g).double()
        self.x, self.fields = flow(self.e, data)[-1], []
        for t in (0.1, 0.3, 0.5, 0.7, 0.9):
            picks = torch.randint(len(data), (count,), generator=g)
            z = (1 - t) * data[picks] + t * torch.randn(count, 2, generator=g).double()
            self.fields.append((torch.full((count,), t), z.float(), velocity(z, t, data)))

    @torch.no_grad()
    def __call__(self, net):
        """{measure: error}: of x by one step, two steps, 32 steps of v; of v at five times."""
        found = [draw(net, self.e, *how) - self.x for how in [(1,), (2,), (32, True)]]
        v = [net(z.view(-1, 2, 1, 1), t, t, None).view(-1, 2) - v for t, z, v in self.fields]
        errors = [error.square().sum(-1).mean().item() for error in (*found, torch.stack(v))]
        return dict(zip(MEASURES, errors, strict=True))


# ---------------------------------------------------------------------------- the table


def parse_args(argv=None):
    about, style = __doc__.splitlines()[0], argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=style)
    add = parser.add_argument
    add("--runs", choices=KINDS, help="train on this set, and append a line a run to the table")
    add("--table", action="store_true", help="print the means of the table and draw them")
    add("--rows", nargs="+", choices=ROWS, default=[*ROWS], help="of arXiv 2511.19065v2, Tab. 3")
    add("--steps", type=int, nargs="+", default=[1000], help="lengths of the runs")
    add("--seeds", type=int, nargs=2, default=(0, 20), metavar=("FROM", "TO"), help="without TO")
    add("--falling", action="store_true", help="let the learning rate fall to 0")
    add("--cap", type=float, default=0.2, help="--dtd-cap; inf lets the loss alone decide")
    add("--dtd-times", choices=("both", "v"), default="both", help="what DTD restricts")
    return parser.parse_args(argv)


def append_runs(args):
    """Runs that are in the table are not repeated."""
    data, judge = points(args.runs), None
    known = [list(line.values())[: len(SETTINGS)] for line in lines()]
    todo = [
        (seed, steps, row)
        for seed in range(*args.seeds)
        for steps in args.steps
        for row in args.rows
    ]
    for seed, steps, row in todo:
        own = (args.cap, args.dtd_times) if row.startswith("DTD") else ("", "")
        settings = [args.runs, row, steps, "falling" if args.falling else "constant", *own, seed]
        if [*map(str, settings)] not in known:
            judge = judge or Judge(data)
            net = train(data, steps, seed, row, args.falling, args.cap, args.dtd_times)
            errors = [f"{error:.5g}" for error in judge(net).values()]
            with open(TABLE, "a") as file:
                file.write(",".join(map(str, [*settings, *errors])) + "\n")


def lines():
    with open(TABLE) as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small
    args = parse_args()
    if args.runs:
        append_runs(args)
