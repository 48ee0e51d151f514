"""MeanFlow in two dimensions, where the exact answer is known; an example of a fork.

    python docs/two_dimensions.py                       docs/average_velocity.png and .gif
    python docs/two_dimensions.py --runs checkerboard   appends runs to docs/two_dimensions.csv

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
import torch
from matplotlib.animation import FuncAnimation
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).parents[1]))
import meanflow
import schedules

GAUSSIANS = {"gaussian": 1, "three gaussians": 3, "gaussians": 8}
CELLS = {"checkerboard": 4, "checkerboard 8": 8}  # on each side
NAMES = ["MeanFlow", "beta", "MinSNR", "MinSNR + beta", "DTD", "DTD + beta"]  # accel, progressive
ROWS = dict(zip(NAMES, product(["none", "minsnr", "dtd"], [False, True]), strict=True))
CAPS = {"cap 0.05": 0.05, "cap inf": math.inf}  # DTD ends after this share of a run; else 0.2


def points(kind, count=2000):
    """A data set: (count, 2) float64, within about [-2, 2]."""
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
    """Mean squared errors of a network: of x by 1 and 2 steps of u, by 32 of v; and of v."""

    def __init__(self, data, count=2000):
        g = torch.Generator().manual_seed(1)
        self.e = torch.randn(count, 2, generator=g)
        self.x, self.fields = flow(self.e.double(), data)[-1], []
        for t in (0.1, 0.3, 0.5, 0.7, 0.9):
            x = data[torch.randint(len(data), (count,), generator=g)]
            z = (1 - t) * x + t * torch.randn(count, 2, generator=g)
            self.fields.append((z.float(), torch.full((count,), t), velocity(z, t, data)))

    @torch.no_grad()
    def __call__(self, net):
        errors = [meanflow.sample(net, self.e, None, n, n == 32) - self.x for n in (1, 2, 32)]
        errors.append(torch.stack([net(z, t, t, None) - v for z, t, v in self.fields]))
        return [error.square().sum(-1).mean().item() for error in errors]


class Network(nn.Module):
    """u(z, r, t): three hidden layers on z and on waves of t and t - r. An "image" is (2,) here."""

    def __init__(self, width=128):
        super().__init__()
        hidden = [layer for n in (20, width, width) for layer in (nn.Linear(n, width), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, z, r, t, y):
        times = torch.stack([t, t - r], 1)  # (B, 2)
        waves = times[:, :, None] * 2 * math.pi * 2.0 ** torch.arange(-2, 2)  # (B, 2, 4)
        inputs = [z, times, waves.cos().flatten(1), waves.sin().flatten(1)]
        return self.layers(torch.cat(inputs, 1))


def train(data, seed, steps, row, rate="constant", p=1.0, change="", num_eq=128, num_neq=384):
    """A network after `steps` steps; with a constant learning rate its EMA over a tenth of them."""
    torch.manual_seed(seed)
    net, quantile = Network(), schedules.uniform_quantile
    schedule = schedules.Schedule(steps, quantile, *ROWS[row], dtd_cap=CAPS.get(change, 0.2))
    plain = schedules.Schedule(steps, quantile, "none", schedule.progressive)
    objective = meanflow.Objective(p=p, jvp_velocity="network" if change == "network" else "target")
    optimizer = torch.optim.Adam(net.parameters())
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(max(0, 1 - 10 / steps)))
    for step in range(steps):
        batch = torch.stack(schedule.sample(num_eq, num_neq, step))  # (3, B)
        if change == "DTD of v":  # where r < t, as without DTD
            batch[:, num_eq:] = torch.stack(plain.sample(num_eq, num_neq, step))[:, num_eq:]
        t, r, weight = batch
        x = data[torch.randint(len(data), t.shape)].float()
        e = torch.randn_like(x)
        loss, errors = meanflow.loss(net, x, e, r, t, None, num_neq, weight, objective)
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps if rate == "falling" else 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update_parameters(net)
        schedule.update(errors[:num_eq].mean(), step)
    return net if rate == "falling" else ema.module


def draw_average_velocity(args):
    """The flow, one step of v, and one step of a trained u, for the same points; and as a GIF."""
    data = points("three gaussians")
    e = torch.randn(600, 2, generator=torch.Generator().manual_seed(2))
    net = train(data, 0, args.steps[0], "MinSNR + beta", "falling", p=0.0)  # p = 1 shifts means
    ends = [e - velocity(e.double(), 1.0, data), meanflow.sample(net, e, None)]
    jumps = [torch.stack([e] * 100 + [end] * 101) for end in ends]  # half-way in the GIF
    ways, dots = [flow(e.double(), data), *jumps], []
    figure, axes = plt.subplots(1, 3, figsize=(10.2, 4.1), layout="constrained")
    for axis, way, colour, title in zip(axes, ways, ["tab:blue", "tab:red", "tab:green"], [
        "the flow:\n200 steps of its velocity v",
        "one step of v(ε, t = 1):\nthe mean of the data",
        "one step of the average velocity\nu(ε, r = 0, t = 1), trained",
    ], strict=True):  # fmt: skip
        axis.set(title=title, xticks=[], yticks=[], aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
        axis.plot(*data[:600].T, ".", ms=2, color="#cccccc")
        axis.plot(*way[:, :20].permute(2, 0, 1), color=colour, lw=1)
        axis.plot(*e[:20].T, "o", ms=4, mfc="none", color="black")
        dots.append((axis.plot(*way[-1].T, ".", ms=2.5, color=colour)[0], way))
    figure.savefig(args.out / "average_velocity.png", dpi=100)
    frames = [*range(0, 201, 8), *[200] * 10]
    gif = FuncAnimation(figure, lambda i: [dot.set_data(*way[i].T) for dot, way in dots], frames)
    gif.save(args.out / "average_velocity.gif", "pillow", fps=10)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, sets = parser.add_argument, [*GAUSSIANS, "spiral", *CELLS]
    add("--runs", choices=sets, help="train on this set, and append a line a run to the table")
    add("--out", type=Path, default=Path(__file__).parent, help="for pictures; has the table")
    add("--rows", nargs="+", choices=ROWS, default=NAMES, help="as in arXiv 2511.19065v2, Tab. 3")
    add("--steps", type=int, nargs="+", default=[3000], help="lengths of the runs")
    add("--seeds", type=int, nargs=2, default=(0, 20), metavar=("FROM", "TO"), help="TO excluded")
    add("--rate", choices=("constant", "falling"), default="constant", help="learning rate")
    add("--p", type=float, default=1.0, help="power of the adaptive weight")
    add("--change", choices=["", *CAPS, "DTD of v", "network"], default="", help="of DTD or JVP")
    args = parser.parse_args(argv)
    if not args.runs:
        return draw_average_velocity(args)
    data, table, judge = points(args.runs), args.out / "two_dimensions.csv", None
    for seed, steps, row in product(range(*args.seeds), args.steps, args.rows):
        change = args.change if "DTD" in row or args.change == "network" else ""
        settings = f"{args.runs},{row},{steps},{args.rate},{args.p},{change},{seed},"
        if f"\n{settings}" not in table.read_text():
            judge = judge or Judge(data)  # half a minute
            errors = judge(train(data, seed, steps, row, args.rate, args.p, change))
            with open(table, "a") as file:
                file.write(settings + ",".join(f"{error:.5g}" for error in errors) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small
    main()
