"""MeanFlow in two dimensions, where the exact answer is known; an example of a fork.

    python docs/two_dimensions.py                       docs/average_velocity.png and .gif
    python docs/two_dimensions.py --runs checkerboard   trains, appends to docs/two_dimensions.csv
    python docs/two_dimensions.py --table               prints what is in it

The data are 2,000 points x_i, and e is noise. So the marginal velocity v(z, t) = E[e - x | z] is a
closed form, its flow from noise (t = 1) to data (t = 0) an ODE, and the average velocity of the
whole way is u(e, 0, 1) = e - flow(e): the errors of a network are plain mean squares.
"""

import argparse
import math
import sys
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import FuncAnimation
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import meanflow  # noqa: E402
import schedules  # noqa: E402

GAUSSIANS = {"gaussian": 1, "three gaussians": 3, "gaussians": 8}
CELLS = {"checkerboard": 4, "checkerboard 8": 8}  # on each side
# arXiv 2511.19065v2, Tab. 3: how v is learned early; whether beta weighs u.
ROWS = {
    "MeanFlow": ("none", False), "beta": ("none", True), "MinSNR": ("minsnr", False),
    "MinSNR + beta": ("minsnr", True), "DTD": ("dtd", False), "DTD + beta": ("dtd", True),
}  # fmt: skip
# Of what the papers leave open on DTD; and arXiv 2512.02012's direction of the JVP.
CHANGES = ["", "cap 0.05", "cap inf", "DTD of v", "network"]
MEASURES = ["one step", "two steps", "Euler", "v"]
NUM_EQ, NUM_NEQ = 128, 384  # samples of a step with r = t, and with r < t


def points(kind, count=2000):
    """A data set: (count, 2) float64, within [-2, 2]."""
    g = torch.Generator().manual_seed(0)
    if kind in CELLS:
        x = CELLS[kind] * torch.rand(4 * count, 2, generator=g)
        return (x[x.floor().sum(1) % 2 == 0][:count] / CELLS[kind] - 0.5).double() * 3
    if kind == "spiral":
        s = 6 * math.pi * torch.rand(count, generator=g).sqrt()
        return (0.3 / math.pi * s[:, None] * torch.stack([s.cos(), s.sin()], 1)).double()
    s = torch.randint(GAUSSIANS[kind], (count,), generator=g) * 2 * math.pi / GAUSSIANS[kind]
    x = 1.5 * torch.stack([s.cos(), s.sin()], 1) + 0.15 * torch.randn(count, 2, generator=g)
    return x.double()


# ---------------------------------------------------------------------------- exact fields


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
    """Mean squared errors of a network: MEASURES, of which Euler takes 32 steps of v."""

    def __init__(self, data, count=2000):
        g = torch.Generator().manual_seed(1)
        self.e = torch.randn(count, 2, generator=g).double()
        self.x, self.fields = flow(self.e, data)[-1], []
        for t in (0.1, 0.3, 0.5, 0.7, 0.9):
            picks = torch.randint(len(data), (count,), generator=g)
            z = (1 - t) * data[picks] + t * torch.randn(count, 2, generator=g).double()
            self.fields.append((torch.full((count,), t), images(z), velocity(z, t, data)))

    @torch.no_grad()
    def __call__(self, net):
        errors = [draw(net, self.e, *how) - self.x for how in [(1,), (2,), (32, True)]]
        errors += [torch.stack([net(z, t, t, None).flatten(1) - v for t, z, v in self.fields])]
        return [error.square().sum(-1).mean().item() for error in errors]


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


def images(x):
    return x.float().view(-1, 2, 1, 1)


def draw(net, e, *how):
    """meanflow.sample for noise (B, 2)."""
    return meanflow.sample(net, images(e), None, *how).flatten(1).double()


def train(data, seed, steps, row="MeanFlow", rate="constant", p=1.0, change=""):
    """A network after `steps` steps; with a constant learning rate its EMA over a tenth of them."""
    torch.manual_seed(seed)
    net, (accel, progressive) = Network(), ROWS[row]
    along = "network" if change == "network" else "target"
    objective = meanflow.Objective(p=p, jvp_velocity=along)
    quantile, cap = schedules.uniform_quantile, float(change[4:]) if "cap" in change else 0.2
    schedule = schedules.Schedule(steps, quantile, accel, progressive, dtd_cap=cap)
    without = schedules.Schedule(steps, quantile, "none", progressive)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(max(0, 1 - 10 / steps)))
    for step in range(steps):
        batch = schedule.sample(NUM_EQ, NUM_NEQ, step)
        if change == "DTD of v":  # the curriculum is for r = t alone
            pairs = zip(batch, without.sample(NUM_EQ, NUM_NEQ, step), strict=True)
            batch = [torch.cat([v[:NUM_EQ], u[NUM_EQ:]]) for v, u in pairs]
        t, r, weight = batch
        x = images(data[torch.randint(len(data), t.shape)])
        e = torch.randn_like(x)
        loss, errors = meanflow.loss(net, x, e, r, t, None, NUM_NEQ, weight, objective)
        optimizer.zero_grad()
        loss.backward()
        if rate == "falling":
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        optimizer.step()
        ema.update_parameters(net)
        schedule.update(errors[:NUM_EQ].mean(), step)
    return net if rate == "falling" else ema.module


# ---------------------------------------------------------------------------- the table


def append_runs(args):
    """Train what is not yet in the table, a line a run."""
    data, known, judge = points(args.runs), read(args.csv), None
    for seed, steps, row in product(range(*args.seeds), args.steps, args.rows):
        change = args.change if "DTD" in row or args.change == "network" else ""
        settings = args.runs, row, str(steps), args.rate, str(args.p), change, str(seed)
        if settings not in known:
            judge = judge or Judge(data)
            errors = judge(train(data, seed, steps, row, args.rate, args.p, change))
            with open(args.csv, "a") as file:
                file.write(",".join([*settings, *(f"{error:.5g}" for error in errors)]) + "\n")


def read(path):
    """{(set, row, steps, rate, p, change, seed): MEASURES}, text and floats."""
    lines = [line.split(",") for line in path.read_text().splitlines()[1:]]
    return {tuple(line[:7]): np.float64(line[7:]) for line in lines}


def table(path):
    """(settings, runs, mean, its error) of errors divided by MeanFlow's of the same seed.

    Geometric means and their standard errors, (4,) each: MEASURES. By set, rate, p, steps, row.
    """
    runs, kinds = read(path), {}
    for key, errors in runs.items():
        plain = runs.get((key[0], "MeanFlow", *key[2:5], "", key[-1]))
        if plain is not None and (key[1], key[5]) != ("MeanFlow", ""):
            kinds.setdefault(key[:-1], []).append(np.log(errors / plain))
    place = lambda key: (key[0], key[3], key[4], int(key[2]), [*ROWS].index(key[1]))  # noqa: E731
    for key in sorted(kinds, key=place):
        if len(logs := kinds[key]) > 1:
            mean = np.exp(np.mean(logs, 0))
            yield key, len(logs), mean, mean * np.std(logs, 0, ddof=1) / len(logs) ** 0.5


# ---------------------------------------------------------------------------- the picture


def draw_average_velocity(out, steps, count=20):
    """The flow, one step of v, and one step of a trained u, for the same points; and as a GIF.

    Trained without the adaptive weight: in two dimensions it shifts the mean that v is.
    """
    data, g = points("three gaussians"), torch.Generator().manual_seed(2)
    e = torch.randn(700, 2, generator=g).double()
    e = e[e.abs().amax(1) < 2.4][:600]  # what the axes show
    path, net = flow(e, data), train(data, 0, steps, "MinSNR + beta", "falling", p=0.0)
    figure, axes = plt.subplots(1, 3, figsize=(10.2, 4.1), layout="constrained")
    jumps, dots = [e - velocity(e, 1.0, data), draw(net, e)], []  # half-way in the GIF
    ways = [path, *(torch.stack([e] * 100 + [end] * 101) for end in jumps)]
    for axis, way, colour, title in zip(axes, ways, ["tab:blue", "tab:red", "tab:green"], [
        "the flow:\n200 steps of its velocity v",
        "one step of v(ε, t = 1):\nthe mean of the data",
        "one step of the average velocity\nu(ε, r = 0, t = 1), trained",
    ], strict=True):  # fmt: skip
        axis.set(xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), aspect="equal", xticks=[], yticks=[])
        axis.set_title(title)
        axis.plot(*data[:600].T, ".", ms=2, color="#cccccc")
        axis.plot(*way[:, :count].permute(2, 0, 1), color=colour, lw=1)
        axis.plot(*e[:count].T, "o", ms=4, mfc="none", color="black")
        dots += axis.plot(*way[-1].T, ".", ms=2.5, color=colour)
    figure.savefig(out / "average_velocity.png", dpi=100)

    def show(i):
        for dot, way in zip(dots, ways, strict=True):
            dot.set_data(*way[i].T)

    frames = [*range(0, 201, 8), *[200] * 10]
    FuncAnimation(figure, show, frames).save(out / "average_velocity.gif", "pillow", fps=10)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, sets = parser.add_argument, [*GAUSSIANS, "spiral", *CELLS]
    add("--runs", choices=sets, help="train on this set, and append a line a run to the table")
    add("--table", action="store_true", help="print the means of the table")
    add("--csv", type=Path, default=HERE / "two_dimensions.csv", help="the table")
    add("--out", type=Path, default=HERE, help="folder of the pictures")
    add("--rows", nargs="+", choices=ROWS, default=[*ROWS], help="of arXiv 2511.19065v2, Tab. 3")
    add("--steps", type=int, nargs="+", default=[3000], help="lengths of the runs")
    add("--seeds", type=int, nargs=2, default=(0, 20), metavar=("FROM", "TO"), help="without TO")
    add("--rate", choices=("constant", "falling"), default="constant", help="learning rate")
    add("--p", type=float, default=1.0, help="power of the adaptive weight")
    add("--change", choices=CHANGES, default="", help="of DTD; or of the JVP's direction")
    args = parser.parse_args(argv)
    if args.runs:
        append_runs(args)
    elif args.table:
        last = None
        for (kind, row, steps, rate, p, change), runs, *found in table(args.csv):
            if (title := f"{kind}, {int(steps):,} steps, {rate} rate, p = {p}") != last:
                print("\n|", " | ".join([title, "seeds", *MEASURES]), "|\n|" + " --- |" * 6)
            cells = [f"{mean:.2f} ± {error:.2f}" for mean, error in zip(*found, strict=True)]
            print("|", " | ".join([row + f", {change}" * (change > ""), str(runs), *cells]), "|")
            last = title
    else:
        draw_average_velocity(args.out, args.steps[0])


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small
    main()
