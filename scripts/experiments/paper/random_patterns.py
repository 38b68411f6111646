"""Random patterns (Kirkpatrick et al. 2017, figure 1 of the supplement): memory against time.

A linear network of n weights sees one pattern a step, ±1/√n in every entry, with a target of ±1,
and never sees it again. Each step is a consolidation step of the library: the pattern's Fisher is
measured (Gaussian likelihood, σ² = 1), merged into the total, and the loss of the new pattern plus
the penalty around the weights before (λ = 1) is minimised.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from consolidate.estimation.fisher_diagonal import fisher_diagonal
from consolidate.estimation.likelihoods import get_likelihood
from consolidate.ewc.fisher_merging import merge_online
from consolidate.ewc.penalty import Penalty
from scripts.experiments.lib.common import markdown
from scripts.experiments.lib.pictures import COLOURS, panels, save_picture, write_csv
from scripts.experiments.lib.records import Experiment, Figures, Findings, Record, Row, Unit, signed
from scripts.experiments.lib.sittings import main

NAME = "random-patterns"
EWC, DESCENT, HALF = "EWC", "gradient descent", "gradient descent, α = 1/2"
METHODS = (EWC, DESCENT, HALF)
FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
"""Times, in units of n, at which all memories are asked for."""
EXACT = 1e-5
"""Standard errors below this share of the value are rounding: nothing there is random."""
TEXT = """
A linear network of {synapses:,} weights learns one pattern a step: entries ±1/√n, a target of ±1,
and the pattern never comes back. {runs} runs, {steps:,} steps; they go together as the rows of one
embedding, an example a row.

**The step is the library's own.** `fisher_diagonal` measures the Fisher of the new pattern
(Gaussian likelihood, σ² = 1), `merge_online` adds it to the total, and loss and penalty
½(y − w·x)² + ½ Σ Λ (w − w₋)² (λ = 1) are minimised: one step of SGD at rate 1 and
`Penalty.proximal_step_`, which is the exact minimiser here, because ‖x‖ = 1 makes the loss's
curvature along x one. Step t uses the Fisher of the t patterns up to and with the new one,
t/n, as the paper does, not (t − 1)/n: a linear network's Fisher does not depend on the weights,
so it is known before the step. Gradient descent is the same step with Λ = 1 (`Penalty.l2`) and
λ = 1/n for ever, and with α = 1/2, EWC's rate at t = n, λ = 1.

Signal of the first pattern (mean over runs of its response times its target), noise (√(E‖w‖²/n),
the deviation of the response to a pattern never seen), their ratio, and the fraction of all
patterns so far whose SNR is above 1. Lines are theory, points the simulation:

![Signal, noise, SNR and fraction retained against time](random-patterns.png)

Theory is a recursion, step by step: the signal α₁ Π (1 − α_s/n), and
‖w_t‖² = ‖w‖² + α² + (α² − 2α) ‖w‖²/n in expectation. Nothing in them is approximate, at any t. All
three see the same patterns, so that what one has by chance the others have too.
{agreement}

{past}
"""


class Runs(nn.Module):
    """A linear network for each run: f_r(x) = w_r · x, w_r a row of an embedding."""

    def __init__(self, runs: int, synapses: int):
        super().__init__()
        self.rows = nn.Embedding(runs, synapses)
        nn.init.zeros_(self.rows.weight)

    def forward(self, run: Tensor, x: Tensor) -> Tensor:
        """Return the responses, (B, 1), of these runs to a pattern each, (B, n)."""
        return (self.rows(run) * x).sum(1, keepdim=True)


def plan(records: Sequence[Record], quick: bool) -> list[Unit]:
    """List one unit for each of the three ways to learn."""
    size = {"synapses": 50, "runs": 60, "steps": 250} if quick else {}
    settings = {"synapses": 1000, "runs": 400, "steps": 5000, **size}
    return [Unit(NAME, method, 0, settings) for method in METHODS]


def seconds(unit: Unit) -> float:
    """Return about how long a unit takes: a step, and its Fisher where one is measured."""
    size = unit.settings["steps"] * unit.settings["runs"] * unit.settings["synapses"]
    return size * (1e-7 if unit.method == EWC else 5e-8)


def measure(unit: Unit) -> Figures:
    """Let all runs learn, and ask for the first pattern and now and then for all of them."""
    runs, n, steps = (unit.settings[key] for key in ("runs", "synapses", "steps"))
    generator = torch.Generator().manual_seed(unit.seed)
    model, likelihood = Runs(runs, n), get_likelihood("gaussian")
    every = torch.arange(runs)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    weights = model.rows.weight.detach()
    fixed = {EWC: None, DESCENT: 1 / n, HALF: 1.0}[unit.method]
    total: dict[str, Tensor] = {}
    signs = np.empty((steps, runs, -(-n // 8)), np.uint8)  # of the patterns times the targets
    figures: dict[str, list[float]] = {
        key: [] for key in ("time", "signal", "signal error", "power", "power error", "asked")
    }
    figures["fraction"] = []
    asked = {round(n * tau) for tau in FRACTIONS}
    for t in range(1, steps + 1):
        x = torch.randint(2, (runs, n), generator=generator).float().mul_(2).sub_(1)
        y = torch.randint(2, (runs, 1), generator=generator).float().mul_(2).sub_(1)
        signs[t - 1] = np.packbits((x * y > 0).numpy(), axis=1)
        x /= math.sqrt(n)
        if fixed is None:
            fisher = fisher_diagonal(model, [((every, x), y)], "gaussian", estimator="exact")
            # The mean over the runs' examples; each run has seen one of them.
            total = merge_online(total, fisher, weight=fisher.units)
            penalty = Penalty(model, total, ewc_lambda=1.0)
        else:
            penalty = Penalty.l2(model, ewc_lambda=fixed)
        optimizer.zero_grad()
        likelihood.negative_log_likelihood(model(every, x), y).sum().backward()
        optimizer.step()
        penalty.proximal_step_(optimizer)
        if t in _times(steps):
            first = _responses(weights, signs[:1])[0]
            power = weights.square().mean(1)  # ‖w‖²/n of each run
            figures["time"].append(t)
            for name, values in (("signal", first), ("power", power)):
                figures[name].append(float(values.double().mean()))
                figures[f"{name} error"].append(float(values.double().std()) / math.sqrt(runs))
        if t in asked:
            noise = float(weights.square().mean()) ** 0.5
            signal = np.concatenate(
                [
                    _responses(weights, signs[k : min(k + 32, t)]).mean(1).numpy()
                    for k in range(0, t, 32)
                ]
            )
            figures["asked"].append(t)
            figures["fraction"].append(float((signal > noise).mean()))
    if total:
        figures["Fisher after the last"] = [float(v) for v in total["rows.weight"].aminmax()]
    return figures


def _times(steps: int) -> set[int]:
    return {round(steps ** (i / 48)) for i in range(49)}


def _responses(weights: Tensor, signs: np.ndarray) -> Tensor:
    """Return w_r · x_kr times the target, (patterns, runs)."""
    n = weights.shape[1]
    patterns = torch.from_numpy(np.unpackbits(signs, axis=2, count=n)).float()  # (k, runs, n)
    patterns.mul_(2).sub_(1)
    return torch.einsum("krn,rn->kr", patterns, weights) / math.sqrt(n)


def theory(method: str, n: int, steps: int) -> dict[str, np.ndarray]:
    """Return what is expected after each step, from the recursions of Kirkpatrick et al. 2017.

    Args:
        method: One of METHODS.
        n: Synapses.
        steps: How many.

    Returns:
        Arrays (steps,): ``signal`` of the first pattern, ``power`` E‖w‖²/n, ``snr``, and
        ``fraction`` of the patterns so far whose SNR is above 1.
    """
    t = np.arange(1, steps + 1)
    alpha = {EWC: n / (n + t), DESCENT: np.full(steps, n / (n + 1)), HALF: np.full(steps, 0.5)}
    rate = alpha[method]
    kept = np.cumsum(np.log1p(-rate / n))  # log Π_{s ≤ t} (1 − α_s/n)
    power = np.empty(steps)
    before = 0.0
    for i, a in enumerate(rate):
        before += (a**2 + (a**2 - 2 * a) * before) / n
        power[i] = before
    noise = np.sqrt(power)
    share = np.array(
        [np.mean(rate[: i + 1] * np.exp(kept[i] - kept[: i + 1]) > noise[i]) for i in range(steps)]
    )
    signal = rate[0] * np.exp(kept - kept[0])
    return {"signal": signal, "power": power, "snr": signal / noise, "fraction": share}


def deviations(record: Record) -> dict[str, tuple[float, float]]:
    """Compare a simulation with theory.

    Args:
        record: Of one method.

    Returns:
        For signal, noise and SNR of the first pattern: the largest deviation in Monte Carlo
        standard errors, over the times at which there is any chance in it, and the largest relative
        deviation, over the times at which that error is below 1 %.
    """
    figures, settings = record.figures, record.unit.settings
    expected = theory(record.unit.method, settings["synapses"], settings["steps"])
    at = np.array(figures["time"]) - 1
    signal, power = (expected[key][at] for key in ("signal", "power"))
    errors = {
        "signal": np.array(figures["signal error"]) / signal,
        "noise": np.array(figures["power error"]) / power / 2,
    }
    found = {
        "signal": np.array(figures["signal"]) / signal - 1,
        "noise": np.sqrt(np.array(figures["power"]) / power) - 1,
    }
    ratio = (1 + found["signal"]) / (1 + found["noise"]) - 1
    errors["SNR"], found["SNR"] = np.hypot(errors["signal"], errors["noise"]), ratio
    result = {}
    for name, deviation in found.items():
        error = errors[name]
        random = error > EXACT
        result[name] = (
            float(np.max(np.abs(deviation[random]) / error[random])),
            float(np.max(np.abs(deviation[error < 0.01]), initial=0.0)),
        )
    return result


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Return the slope of the line fitted to y against x by least squares."""
    return float(np.polyfit(x, y, 1)[0])


def report(records: Sequence[Record], folder: Path) -> Findings:
    """Draw theory over simulation, and say how well they agree."""
    by_method = {record.unit.method: record for record in records}
    rows = [Row("random patterns: largest deviation from theory, in standard errors", "theory")]
    if not by_method:
        return Findings("", rows)
    any_record = next(iter(by_method.values()))
    n, steps = (any_record.unit.settings[key] for key in ("synapses", "steps"))
    expected = {method: theory(method, n, steps) for method in METHODS}
    _draw(by_method, expected, n, folder)
    write_csv(
        folder,
        NAME,
        ["method", "step", "quantity", "simulation", "error", "theory"],
        _lines(by_method, expected),
    )
    agreement = {method: deviations(record) for method, record in by_method.items()}
    worst = max(z for found in agreement.values() for z, _ in found.values())
    near = max(share for found in agreement.values() for _, share in found.values())
    late = np.arange(2 * n, steps)
    past = np.arange(n, steps)
    early = np.arange(9, n // 10)
    ewc, descent = expected[EWC], expected[DESCENT]
    worse = np.flatnonzero((ewc["fraction"] < descent["fraction"]) & (np.arange(steps) > n // 10))
    gone = int(worse[0]) + 1 if len(worse) else steps
    seen = _crossing(by_method, n)
    rows = [
        rows[0]._replace(
            here=f"{worst:.2f}", difference="holds" if worst <= 4 else "does not hold",
            reason="holds up to 4; signal, noise and SNR, all methods and times",
        ),
        Row(
            "random patterns: largest relative deviation where that error is below 1 %",
            "–", f"{near:.2%}", reason="Monte Carlo error",
        ),
    ]  # fmt: skip
    if EWC in by_method:
        low, high = by_method[EWC].figures["Fisher after the last"]
        rows.append(
            Row(
                f"random patterns: the Fisher after {steps:,} patterns, smallest and largest",
                f"t/n = {steps / n:g}", f"{low:.6g} to {high:.6g}",
                f"{max(abs(low - steps / n), abs(high - steps / n)):.1g}", "sums in float32",
            )
        )  # fmt: skip
        for name, times, method, against, published in (
            ("exponent of EWC's SNR, t ≪ n", early, EWC, "log", -0.5),
            ("exponent of EWC's SNR, t > 2n", late, EWC, "log", -0.5),
            ("exponent of gradient descent's SNR, t ≪ n", early, DESCENT, "log", -0.5),
            ("rate of gradient descent's decay in t/n, t > n", past, DESCENT, "linear", -1.0),
        ):
            rows.append(_slope_row(name, times, by_method.get(method), n, against, published))
        rows += [
            Row(
                "random patterns: EWC retains no fewer than gradient descent",
                "up to and near capacity, t = n", f"up to t = {seen[0]:g} n",
                "holds" if seen[0] >= 1 else "ends before n",
                f"theory: up to {gone / n:.2f} n; every pattern has the same signal n/(n + t), so "
                "all fall below the noise at once",
            ),
            Row(
                "random patterns: EWC retains fewer than gradient descent", "far past capacity",
                f"from t = {seen[1]:g} n on", "holds" if seen[1] < steps / n else "does not hold",
            ),
        ]  # fmt: skip
    text = TEXT.format(
        **any_record.unit.settings,
        agreement=_agreement(agreement),
        past=_past(by_method, n, gone, seen),
    )
    return Findings(text.strip(), rows)


def _slope_row(
    name: str, times: np.ndarray, record: Record | None, n: int, against: str, published: float
) -> Row:
    row = Row(f"random patterns: {name}", f"{published:g}".replace("-", "−"))
    if record is None or len(times) < 3:
        return row
    figures = record.figures
    at = np.array(figures["time"])
    snr = np.array(figures["signal"]) / np.sqrt(figures["power"])
    expected = theory(record.unit.method, n, int(at[-1]))
    error = np.array(figures["signal error"]) / expected["signal"][at - 1]
    # A logarithm needs a signal above its error; which ones are is not for the simulation to say.
    some = (at > times[0]) & (at <= times[-1] + 1) & (snr > 0) & (error < 1 / 3)
    if some.sum() < 3:
        return row._replace(here="too few points")
    x = np.log(at[some]) if against == "log" else at[some] / n
    found = slope(x, np.log(snr[some]))
    ideal = slope(x, np.log(expected["snr"][at[some] - 1]))
    return row._replace(
        here=f"{found:.2f}".replace("-", "−"),
        difference=signed(found - published),
        reason=f"the theory itself gives {ideal:.2f}".replace("-", "−")
        + f" from t = {at[some][0] / n:.2g} n to {at[some][-1] / n:.2g} n, "
        + f"where the signal's Monte Carlo error is up to {error[some].max():.0%}",
    )


def _agreement(agreement: dict[str, dict[str, tuple[float, float]]]) -> str:
    lines = [
        [method, *(f"{z:.2f} ({share:.2%})" for z, share in found.values())]
        for method, found in agreement.items()
    ]
    return (
        "Largest deviation over all times in Monte Carlo standard errors, and in brackets the "
        "largest relative deviation where that error is below 1 %:\n\n"
        + markdown(["", "signal", "noise", "SNR"], lines)
    )


def _crossing(by_method: dict[str, Record], n: int) -> tuple[float, float]:
    """Return until which t/n EWC retains no fewer than gradient descent, and from which it does.

    NaN where one of the two is not done, and the last time where EWC never retains fewer.
    """
    if EWC not in by_method or DESCENT not in by_method:
        return math.nan, math.nan
    asked = [t / n for t in by_method[EWC].figures["asked"]]
    ewc, descent = (by_method[kind].figures["fraction"] for kind in (EWC, DESCENT))
    fewer = [one < other for one, other in zip(ewc, descent, strict=True)]
    first = fewer.index(True) if True in fewer else len(asked)
    since = len(fewer) - next((i for i, x in enumerate(reversed(fewer)) if not x), len(fewer))
    return asked[max(first - 1, 0)], asked[min(since, len(asked) - 1)]


def _past(by_method: dict[str, Record], n: int, gone: int, seen: tuple[float, float]) -> str:
    lines = [f"| t/n | {' | '.join(by_method)} |", "| ---: |" + " ---: |" * len(by_method)]
    asked = next(iter(by_method.values())).figures["asked"]
    for i, t in enumerate(asked):
        cells = [f"{record.figures['fraction'][i]:.1%}" for record in by_method.values()]
        lines.append("| " + " | ".join([f"{t / n:g}", *cells]) + " |")
    return (
        f"EWC retains no fewer up to t = {seen[0]:g} n and **fewer** from {seen[1]:g} n on, in "
        f"theory from {gone / n:.2f} n on; capacity is n. All its memories have the same "
        "signal, n/(n + t), and go under together, where gradient "
        "descent gives up old ones for the newest. The fraction retained in the simulation, where "
        "the edge is blurred, because a memory's signal is a mean over the runs with an error of "
        "its own:\n\n" + "\n".join(lines)
    )


def _lines(
    by_method: dict[str, Record], expected: dict[str, dict[str, np.ndarray]]
) -> list[list[object]]:
    lines: list[list[object]] = []
    for method, record in by_method.items():
        figures = record.figures
        for quantity in ("signal", "power"):
            columns = (figures["time"], figures[quantity], figures[f"{quantity} error"])
            for t, value, error in zip(*columns, strict=True):
                at = f"{expected[method][quantity][t - 1]:.6g}"
                lines.append([method, t, "noise squared" if quantity == "power" else quantity,
                              value, error, at])  # fmt: skip
        for t, value in zip(figures["asked"], figures["fraction"], strict=True):
            at = f"{expected[method]['fraction'][t - 1]:.6g}"
            lines.append([method, t, "fraction retained", value, "", at])
    return lines


def _draw(
    by_method: dict[str, Record],
    expected: dict[str, dict[str, np.ndarray]],
    n: int,
    folder: Path,
) -> None:
    figure, axes = panels(4, width=3.8)
    for method, colour in zip(METHODS, COLOURS, strict=False):
        lines = expected[method]
        t = np.arange(1, len(lines["signal"]) + 1)
        drawn = (lines["signal"], np.sqrt(lines["power"]), lines["snr"], lines["fraction"])
        for axis, values in zip(axes, drawn, strict=True):
            axis.plot(t, values, color=colour, lw=1.2, label=method)
        if (record := by_method.get(method)) is None:
            continue
        figures = record.figures
        times, signal, power = (np.array(figures[k]) for k in ("time", "signal", "power"))
        signal_error = np.array(figures["signal error"])
        noise = np.sqrt(power)
        style = {"color": colour, "fmt": "o", "ms": 3, "elinewidth": 0.8}
        seen = signal > 0
        axes[0].errorbar(times[seen], signal[seen], signal_error[seen], **style)
        axes[1].errorbar(times, noise, np.array(figures["power error"]) / noise / 2, **style)
        axes[2].errorbar(times[seen], (signal / noise)[seen], (signal_error / noise)[seen], **style)
        axes[3].plot(figures["asked"], figures["fraction"], "o", color=colour, ms=3)
    for axis, title in zip(axes, ("signal", "noise", "SNR", "fraction retained"), strict=True):
        axis.set_xscale("log")
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("patterns learned")
        axis.axvline(n, color="0.6", lw=0.8, ls=":")
    for axis in axes[:3]:
        axis.set_yscale("log")
    axes[0].set_ylim(3e-3, 2)
    axes[2].set_ylim(3e-3, None)
    axes[2].axhline(1, color="0.6", lw=0.8)
    axes[0].legend(fontsize="small", loc="lower left")
    save_picture(figure, folder, NAME)


EXPERIMENT = Experiment(NAME, "Random patterns", seconds, plan, measure, report)

if __name__ == "__main__":
    main(EXPERIMENT)
