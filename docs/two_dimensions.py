"""MeanFlow in two dimensions, where the exact answer is known; an example of a fork.

    python docs/two_dimensions.py                       docs/average_velocity.png and .gif
    python docs/two_dimensions.py --runs checkerboard   trains, appends to docs/two_dimensions.csv
    python docs/two_dimensions.py --table               prints what is in it

The data are 2,000 points x_i, and e is noise. So the marginal velocity v(z, t) = E[e - x | z] is a
closed form, its flow from noise (t = 1) to data (t = 0) an ODE, and the average velocity of the
whole way is u(e, 0, 1) = e - flow(e): the errors of a network are plain mean squares.
"""

import argparse
import csv
import math
import sys
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import meanflow  # noqa: E402
import schedules  # noqa: E402

KINDS = {"gaussian": 1, "three gaussians": 3, "gaussians": 8, "spiral": 0, "checkerboard": 4,
         "checkerboard 8": 8}  # fmt: skip
# arXiv 2511.19065v2, Tab. 3: how v is learned early; whether beta weighs u.
ROWS = {
    "MeanFlow": ("none", False), "beta": ("none", True), "MinSNR": ("minsnr", False),
    "MinSNR + beta": ("minsnr", True), "DTD": ("dtd", False), "DTD + beta": ("dtd", True),
}  # fmt: skip
SETTINGS = ["set", "row", "steps", "rate", "p", "cap", "dtd times", "seed"]
MEASURES = ["one step", "two steps", "Euler", "v"]
COLOURS = ["tab:blue", "tab:red", "tab:green"]

# ---------------------------------------------------------------------------- exact fields


def points(kind, count=2000):
    """A data set: (count, 2) float64, within [-2, 2]."""
    g, number = torch.Generator().manual_seed(0), KINDS[kind]
    if kind == "spiral":
        s = 6 * math.pi * torch.rand(count, generator=g).sqrt()
        x = 0.3 / math.pi * s[:, None] * torch.stack([s.cos(), s.sin()], 1)
    elif "checkerboard" in kind:
        x = number * torch.rand(4 * count, 2, generator=g)
        x = (x[x.floor().sum(1) % 2 == 0][:count] / number - 0.5) * 3
    else:
        s = torch.randint(number, (count,), generator=g) * 2 * math.pi / number
        x = 1.5 * torch.stack([s.cos(), s.sin()], 1) + 0.15 * torch.randn(count, 2, generator=g)
    return x.double()


def velocity(z, t, data):
    """v = (z - E[x | z]) / t at z (B, 2), time t; p(x_i | z) ~ exp(-|z - (1 - t) x_i|^2 / 2t^2)."""
    means = (1 - t) * data
    logits = (z @ means.T - means.square().sum(1) / 2) / t**2  # without |z|^2, the same for all i
    return (z - logits.softmax(1) @ data) / t


def flow(z, data, steps=200, start=1.0, end=1e-3):
    """z (B, 2) carried from t = start to end by Runge and Kutta: the path, (steps + 1, B, 2)."""
    path, roots = [z], torch.linspace(start**0.5, end**0.5, steps + 1, dtype=torch.float64)
    times = roots**2  # shorter steps near the data
    for t, h in zip(times, times.diff(), strict=False):
        k1 = velocity(z, t, data)
        k2 = velocity(z + h / 2 * k1, t + h / 2, data)
        k3 = velocity(z + h / 2 * k2, t + h / 2, data)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(z + h * k3, t + h, data))
        path.append(z)
    return torch.stack(path)


class Judge:
    """Mean squared errors of a network against the exact fields, at 2,000 points."""

    def __init__(self, data, count=2000):
        g = torch.Generator().manual_seed(1)
        self.e = torch.randn(count, 2, generator=g).double()
        self.x, self.fields = flow(self.e, data)[-1], []
        for t in (0.1, 0.3, 0.5, 0.7, 0.9):
            picks = torch.randint(len(data), (count,), generator=g)
            z = (1 - t) * data[picks] + t * torch.randn(count, 2, generator=g).double()
            self.fields.append((torch.full((count,), t), z, velocity(z, t, data)))

    @torch.no_grad()
    def __call__(self, net):
        """MEASURES: of x by one step, two steps, 32 steps of v; of v at five times."""
        found = [draw(net, self.e, *how) - self.x for how in [(1,), (2,), (32, True)]]
        fields = [
            net(z.float().view(-1, 2, 1, 1), t, t, None).view(-1, 2) - v for t, z, v in self.fields
        ]
        return [error.square().sum(-1).mean().item() for error in (*found, torch.stack(fields))]


# ---------------------------------------------------------------------------- a network of its own


class Network(nn.Module):
    """u(z, r, t): three layers on z and on waves of t and t - r. An image is (2, 1, 1) here."""

    def __init__(self, width=128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(20, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, z, r, t, y):
        times = torch.stack([t, t - r], 1)  # (B, 2)
        waves = times[:, :, None] * 2 * math.pi * 2.0 ** torch.arange(-2, 2)  # (B, 2, 4)
        inputs = [z.flatten(1), times, waves.cos().flatten(1), waves.sin().flatten(1)]
        return self.layers(torch.cat(inputs, 1)).view_as(z)


def train(data, seed, steps, row="MeanFlow", rate="constant", p=1.0, cap=0.2, dtd_times="both"):
    """A network after `steps` steps of 512 points, three quarters of them with r < t."""
    torch.manual_seed(seed)
    net, num_eq, num_neq, (accel, progressive) = Network(), 128, 384, ROWS[row]
    quantile, objective = schedules.uniform_quantile, meanflow.Objective(p=p)
    schedule = schedules.Schedule(steps, quantile, accel, progressive, dtd_cap=cap)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(steps):
        t, r, weight = schedule.sample(num_eq, num_neq, step)
        if dtd_times == "v":  # the curriculum is for r = t alone
            others = schedules.sample_t_r(num_eq, num_neq, quantile)
            t[num_eq:], r[num_eq:] = (times[num_eq:] for times in others)
            if progressive:
                gaps = (t - r)[num_eq:]
                weight[num_eq:] = schedules.beta(gaps, schedule.s(step), schedule.lam)
        x = data[torch.randint(len(data), t.shape)].float().view(-1, 2, 1, 1)
        e = torch.randn_like(x)
        loss, errors = meanflow.loss(net, x, e, r, t, None, num_neq, weight, objective)
        optimizer.zero_grad()
        loss.backward()
        if rate == "falling":
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        optimizer.step()
        schedule.update(errors[:num_eq].mean(), step)
    return net


def draw(net, e, *how):
    """meanflow.sample for noise (B, 2)."""
    return meanflow.sample(net, e.float().view(-1, 2, 1, 1), None, *how).view(-1, 2).double()


# ---------------------------------------------------------------------------- the table


def append_runs(args, judge=None):
    """Train what is not yet in the table, a line a run."""
    known = [line[: len(SETTINGS)] for line in read_csv(args.csv)]
    for seed, steps, row in product(range(*args.seeds), args.steps, args.rows):
        own = (args.cap, args.dtd_times) if "DTD" in row else ("", "")
        settings = [*map(str, (args.runs, row, steps, args.rate, args.p, *own, seed))]
        if settings not in known:
            judge = judge or Judge(points(args.runs))
            how = row, args.rate, args.p, args.cap, args.dtd_times
            errors = judge(train(points(args.runs), seed, steps, *how))
            with open(args.csv, "a") as file:
                file.write(",".join([*settings, *(f"{error:.5g}" for error in errors)]) + "\n")


def read_csv(path):
    return [*csv.reader(path.read_text().splitlines())][1:]


def ratios(path):
    """{settings without the seed: array (runs, measures)} of errors divided by MeanFlow's."""
    width, found = len(SETTINGS), {}
    errors = {tuple(line[:width]): np.float64(line[width:]) for line in read_csv(path)}
    for key, error in errors.items():
        plain = key[0], "MeanFlow", *key[2:5], "", "", key[-1]
        if plain in errors and plain != key:
            found.setdefault(key[:-1], []).append(error / errors[plain])
    return {key: np.array(value) for key, value in found.items() if len(value) > 1}


def mean_and_error(ratio):
    """Geometric mean and its standard error over the runs: (measures,) each."""
    mean, spread = np.exp(np.log(ratio).mean(0)), np.log(ratio).std(0, ddof=1)
    return mean, mean * spread / len(ratio) ** 0.5


def print_table(path):
    """Every kind of run, as Markdown."""
    print("|", " | ".join([*SETTINGS[:-1], "runs", *MEASURES]), "|\n" + "| --- " * 12 + "|")
    for key, ratio in sorted(ratios(path).items()):
        cells = [f"{m:.2f} ± {e:.2f}" for m, e in zip(*mean_and_error(ratio), strict=True)]
        print("|", " | ".join([*key, str(len(ratio)), *cells]), "|")


# ---------------------------------------------------------------------------- the picture


def draw_average_velocity(out, steps, count=20):
    """The flow, one step of v, and one step of a trained u, for the same points; and as a GIF.

    Trained without the adaptive weight: in two dimensions it shifts the mean that v is.
    """
    data, g = points("three gaussians"), torch.Generator().manual_seed(2)
    e = torch.randn(700, 2, generator=g).double()
    e = e[e.abs().amax(1) < 2.4][:600]  # what the axes show
    path, net = flow(e, data), train(data, 0, steps, "MinSNR + beta", "falling", p=0.0)
    ends = path[-1], e - velocity(e, 1.0, data), draw(net, e)
    titles = [
        "the flow:\n200 steps of its velocity v",
        "one step of v(ε, t = 1):\nthe mean of the data",
        "one step of the average velocity\nu(ε, r = 0, t = 1), trained",
    ]
    figure, axes = plt.subplots(1, 3, figsize=(10.2, 4.1), layout="constrained")
    dots, frames = [], []
    for axis, end, title, colour in zip(axes, ends, titles, COLOURS, strict=True):
        way = path if end is ends[0] else torch.stack([e] * 100 + [end] * 101)  # a jump half-way
        axis.set(xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), aspect="equal", xticks=[], yticks=[])
        axis.set_title(title)
        axis.plot(*data[:600].T, ".", ms=2, color="#cccccc")
        axis.plot(*way[:, :count].permute(2, 0, 1), color=colour, lw=1)
        axis.plot(*e[:count].T, "o", ms=4, mfc="none", color="black")
        dots.append((axis.plot(*end.T, ".", ms=2.5, color=colour)[0], way))
    figure.savefig(out / "average_velocity.png", dpi=100)
    for i in [*range(0, 201, 8), *[200] * 10]:
        for dot, way in dots:
            dot.set_data(*way[i].T)
        figure.canvas.draw()
        frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).quantize(32))
    options = dict(save_all=True, append_images=frames[1:], duration=100, loop=0)
    frames[0].save(out / "average_velocity.gif", **options)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--runs", choices=KINDS, help="train on this set, and append a line a run to the table")
    add("--table", action="store_true", help="print the means of the table")
    add("--csv", type=Path, default=HERE / "two_dimensions.csv", help="the table")
    add("--out", type=Path, default=HERE, help="folder of the pictures")
    add("--rows", nargs="+", choices=ROWS, default=[*ROWS], help="of arXiv 2511.19065v2, Tab. 3")
    add("--steps", type=int, nargs="+", default=[3000], help="lengths of the runs")
    add("--seeds", type=int, nargs=2, default=(0, 20), metavar=("FROM", "TO"), help="without TO")
    add("--rate", choices=("constant", "falling"), default="constant", help="learning rate")
    add("--p", type=float, default=1.0, help="power of the adaptive weight")
    add("--cap", type=float, default=0.2, help="of DTD; inf: by the loss alone")
    add("--dtd-times", choices=("both", "v"), default="both", help="what DTD restricts")
    args = parser.parse_args(argv)
    if args.runs:
        append_runs(args)
    elif args.table:
        print_table(args.csv)
    else:
        draw_average_velocity(args.out, args.steps[0])


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small
    main()
