"""The rate of false alarms of the combined decision, and of a whole guard: measured, beside the beta-binomial range.

python -m benchmarks.validate_fpr --mnist mnist.npz --fashion fashion_mnist.npz [--seeds 20]
Data: MNIST, Fashion-MNIST and the 8 x 8 digits of scikit-learn. A ridge classifier on random features stands for the
user's model; an `Ensemble` of Energy, RelativeMahalanobis and NearestNeighbours is fitted on the same rows, a
`Calibration` of its joint score made on a second part, and the share of refused rows counted on a third. Of all
settings (data, seed, alpha), at least 90 % should fall inside the 95 % range of the beta-binomial law. "shifts" is the
same ensemble with its members weighed by what they see of shifted rows. Beside them, two usual ways with the same
scores and rows: refuse where any member does at alpha, and Bonferroni over the members' conformal p-values. "guard" is
what a user gets: `Guard.calibrate` with its default detectors around the same model, and a specification inferred from
the fitted rows; every refused row counts, whoever refused it. The first 100 test rows are asked once more, each alone:
none should be judged otherwise. Writes benchmarks/results/validate_fpr.json.
"""

import argparse
import statistics
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from aidefend._core.stats import combine_p_values, conformal_p_values
from aidefend.validate import (
    Calibration,
    Energy,
    Ensemble,
    Guard,
    InputSpec,
    NearestNeighbours,
    RelativeMahalanobis,
    Shifts,
)
from aidefend.validate.detector import Rows, score_columns
from benchmarks.record import write_result

FIRST_SEED = 900
ALPHAS = (0.1, 0.05, 0.01)
WIDTH = 64
MEMBERS = (Energy(), RelativeMahalanobis(), NearestNeighbours(k=10))
SIZES = {"mnist": (3000, 1000, 2000), "fashion_mnist": (3000, 1000, 2000), "digits": (697, 500, 600)}
WAYS = ("calibrated", "shifts", "any", "bonferroni")


def images(path: str) -> tuple[Tensor, Tensor]:
    """Test images as rows in (0, 1), and labels."""
    with np.load(path) as arrays:
        x, y = torch.from_numpy(arrays["test_x"]), torch.from_numpy(arrays["test_y"])
    return x.flatten(1).float() / 255, y.long()


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 8 x 8 digits as rows in (0, 1), and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.data).float() / 16, torch.from_numpy(data.target).long()


def outputs(x: Tensor, y: Tensor, fit: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Random features (N, 64) and the logits of a ridge classifier that was fitted on the rows `fit`."""
    stream = torch.Generator().manual_seed(seed)
    features = (x @ torch.randn(x.shape[1], WIDTH, generator=stream) / x.shape[1] ** 0.5).relu()
    known = features[fit]
    weight = torch.linalg.solve(known.T @ known + 0.1 * torch.eye(WIDTH), known.T @ one_hot(y[fit], 10).float())
    return features, 10 * features @ weight


def classifier(x: Tensor, y: Tensor, fit: Tensor, seed: int) -> nn.Sequential:
    """The same classifier as a module."""
    stream = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], WIDTH, bias=False), nn.ReLU(), nn.Linear(WIDTH, 10, bias=False))
    with torch.no_grad():
        model[0].weight.copy_((torch.randn(x.shape[1], WIDTH, generator=stream) / x.shape[1] ** 0.5).T)
        known = model[:2](x[fit])
        ridge = known.T @ known + 0.1 * torch.eye(WIDTH)
        model[2].weight.copy_(10 * torch.linalg.solve(ridge, known.T @ one_hot(y[fit], 10).float()).T)
    return model.eval()


def guarded(data: tuple[Tensor, Tensor], sizes: tuple[int, int, int], seed: int) -> list[dict[str, Any]]:
    """Shares of clean test rows that a guard refuses, by alpha: rows in hundreds, and the first 100 one by one."""
    x, y = data
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    fit, calibration, test = order[: sum(sizes)].split(sizes)
    model, found = classifier(x, y, fit, seed), []
    for alpha in ALPHAS:
        spec = InputSpec.infer(x[fit])
        with Guard.calibrate(model, x[calibration], spec, alpha=alpha, fit=x[fit], seed=seed) as guard:
            refused = torch.cat([~guard(part).accepted for part in x[test].split(100)])
            alone = torch.cat([~guard(x[row : row + 1]).accepted for row in test[:100].tolist()])
            by_spec = int((~spec.check(x[test]).accepted).sum())
            _, low, high = guard.calibration.law.expected_share(len(test))
        share = float(refused.double().mean())
        entry = {"alpha": alpha, "seed": seed, "low": low, "high": high, "n": guard.facts.calibration_n}
        entry |= {"share": {"guard": share}, "inside": {"guard": bool(low <= share <= high)}}
        found.append(entry | {"by_spec": by_spec, "changed_alone": int((alone != refused[:100]).sum())})
    return found


def shares(data: tuple[Tensor, Tensor], sizes: tuple[int, int, int], seed: int) -> list[dict[str, Any]]:
    """Shares of refused test rows by alpha and way, and whether each lies in its range."""
    x, y = data
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    fit, calibration, test = order[: sum(sizes)].split(sizes)
    features, logits = outputs(x, y, fit, seed)
    fitted = Ensemble(MEMBERS, seed=seed).fit(features[fit], logits[fit], y[fit])
    model = classifier(x, y, fit, seed)

    def asked(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return model[:2](z), model(z)

    learned = Ensemble(MEMBERS, seed=seed, shifts=Shifts()).fit(
        features[fit], logits[fit], y[fit], x=x[fit], outputs=asked
    )  # the same members, fitted on the same rows: only the join differs
    known, new = (score_columns(fitted.members, Rows(features[part], logits[part])) for part in (calibration, test))
    each = torch.stack([conformal_p_values(new[:, i], known[:, i]) for i in range(len(MEMBERS))], dim=1)
    found = []
    for alpha in ALPHAS:
        calibrated = Calibration.of(fitted.join(known), alpha)
        refused = {
            "calibrated": calibrated.refused(fitted.join(new)),
            "shifts": Calibration.of(learned.join(known), alpha).refused(learned.join(new)),
            "any": each.amin(dim=1) <= alpha,
            "bonferroni": combine_p_values(each) <= alpha,
        }
        _, low, high = calibrated.expected_share(len(new))
        measured = {way: float(refused[way].double().mean()) for way in WAYS}
        inside = {way: bool(low <= share <= high) for way, share in measured.items()}
        found.append({"alpha": alpha, "seed": seed, "low": low, "high": high, "share": measured, "inside": inside})
    return found


def main() -> None:
    """Print a line for each data set and alpha, then the totals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", required=True)
    parser.add_argument("--fashion", required=True)
    parser.add_argument("--seeds", type=int, default=20)
    arguments = parser.parse_args()
    data = {"mnist": images(arguments.mnist), "fashion_mnist": images(arguments.fashion), "digits": digits()}
    seeds = [FIRST_SEED + i for i in range(arguments.seeds)]
    settings = []
    for name, rows in data.items():
        settings += [{"data": name, **one} for seed in seeds for one in shares(rows, SIZES[name], seed)]
        for alpha in ALPHAS:
            here = [one for one in settings if one["data"] == name and one["alpha"] == alpha]
            line = [f"{way} {statistics.fmean(one['share'][way] for one in here):.4f}" for way in WAYS]
            print(f"{name}, alpha {alpha}: mean share {', '.join(line)}", flush=True)
    whole = [
        {"data": name, **one}
        for name, rows in data.items()
        for seed in seeds
        for one in guarded(rows, SIZES[name], seed)
    ]
    for name in data:
        for alpha in ALPHAS:
            here = [one for one in whole if one["data"] == name and one["alpha"] == alpha]
            print(
                f"{name}, alpha {alpha}: mean share guard {statistics.fmean(one['share']['guard'] for one in here):.4f}"
            )
    total = {way: statistics.fmean(one["inside"][way] for one in settings) for way in WAYS}
    print(f"inside the 95 % range, of {len(settings)} settings: {total}")
    total["guard"] = statistics.fmean(one["inside"]["guard"] for one in whole)
    changed, asked = sum(one["changed_alone"] for one in whole), 100 * len(whole)
    print(f"guard inside: {total['guard']:.3f} of {len(whole)}; {changed} of {asked} rows judged otherwise when alone")
    assert min(total["calibrated"], total["shifts"], total["guard"]) >= 0.9
    result = {"inside": total, "sizes": {name: list(sizes) for name, sizes in SIZES.items()}, "settings": settings}
    result |= {"guard_settings": whole, "rows_judged_otherwise_alone": [changed, asked]}
    write_result("validate_fpr", result, seeds=seeds, packages=["scikit-learn"])


if __name__ == "__main__":
    main()
