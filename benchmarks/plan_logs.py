"""How close are plans to what public start-up logs of vLLM say?

usage: plan_logs.py --data FILE --configs DIR [--worst N] [--only ID] [--as-version 0.25.1]

FILE has one start-up a line (JSON: vllm_version, config, gpu, tp, ..., model_load_gib,
available_kv_gib, kv_tokens, max_concurrency), DIR one folder per config. Errors of GiB are in % of
the budget (utilization x device); a + means that the plan promises more. `*` marks a device that
the log does not name and that was inferred, `q` a quantization scheme that was assumed.
--as-version plans all rows as one version, to see what the others change.
"""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from log_rows import check, config_of, device_of, options_of, version_of

from tightfit.errors import TightfitError, UsageError
from tightfit.model.families import model_spec
from tightfit.planner.assemble import make_plan
from tightfit.planner.plan import Plan, RankPlan
from tightfit.planner.vllm_log.compare import LOADED, PEAK
from tightfit.units import GiB


@dataclass(frozen=True)
class Row:
    """A start-up beside its plan; GiB, None where the log has no such figure."""

    logged: Mapping[str, Any]
    plan: Plan
    inferred: bool
    assumed: bool

    @property
    def rank(self) -> RankPlan:
        """The rank with the least for its pool."""
        return min(self.plan.ranks, key=_available)

    @property
    def budget(self) -> float:
        return (self.rank.budget_bytes or 0) / GiB

    @property
    def load(self) -> tuple[float, float | None]:
        planned = max(_sum(rank, LOADED) for rank in self.plan.ranks) / GiB
        return planned, self.logged.get("model_load_gib")

    @property
    def kv(self) -> tuple[float, float | None]:
        return _available(self.rank) / GiB, self.logged.get("available_kv_gib")

    @property
    def concurrency(self) -> tuple[float | None, float | None]:
        return self.plan.kv_cache.max_concurrency, self.logged.get("max_concurrency")

    @property
    def tokens(self) -> tuple[float | None, float | None]:
        """Not compared where versions before 0.20.1 print something else for grouped layers."""
        logged, most = self.logged.get("kv_tokens"), self.logged.get("max_concurrency")
        length = self.logged.get("concurrency_tokens_per_request")
        if logged and most and length and abs(logged / (most * length) - 1) > 0.02:
            logged = None
        return self.plan.kv_cache.tokens, logged

    @property
    def load_error(self) -> float | None:
        return _percent(*self.load, self.budget)

    @property
    def kv_error(self) -> float | None:
        return _percent(*self.kv, self.budget)

    @property
    def token_error(self) -> float | None:
        return _percent(*self.tokens, self.tokens[1])

    @property
    def concurrency_error(self) -> float | None:
        return _percent(*self.concurrency, self.concurrency[1])

    @property
    def marks(self) -> str:
        return "*" * self.inferred + "q" * self.assumed


def _available(rank: RankPlan) -> int:
    """What remains, below zero as well, which vLLM prints."""
    others = [c.planned_bytes for c in rank.components if c.inside_budget and c.name != "kv_cache"]
    return (rank.budget_bytes or 0) - sum(others)


def _sum(rank: RankPlan, names: Sequence[str]) -> int:
    return sum(c.planned_bytes for c in rank.components if c.name in names)


def _percent(planned: float | None, logged: float | None, whole: float | None) -> float | None:
    if planned is None or logged is None or not whole:
        return None
    return 100 * (planned - logged) / whole


def planned(row: Mapping[str, Any], configs: Path, as_version: str | None = None) -> Row:
    """Plan one start-up.

    Raises:
        TightfitError: it cannot be planned.
    """
    check(row)
    names = [row.get("config"), row.get("model_basename")]
    paths = [configs / name / "config.json" for name in names if name]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise UsageError("no config of this model")
    version = version_of(row)
    newest = tuple(map(int, version.split("."))) > (0, 19, 1)
    utilization = row.get("gpu_memory_utilization") or (0.92 if newest else 0.9)
    device, inferred = device_of(row, utilization)
    config, assumed = config_of(row, json.loads(path.read_text(encoding="utf-8")))
    options = options_of(row, device, as_version)
    plan = make_plan(model_spec(config), options, name=str(row.get("model_basename")))
    return Row(row, plan, inferred, assumed)


def all_rows(
    data: Path, configs: Path, only: str | None = None, as_version: str | None = None
) -> tuple[list[Row], list[list[str]]]:
    """The rows that can be planned, and id, model and reason of those that cannot."""
    rows: list[Row] = []
    left_out: list[list[str]] = []
    for line in data.read_text(encoding="utf-8").splitlines():
        logged = json.loads(line)
        if only not in (None, logged["id"]):
            continue
        try:
            rows.append(planned(logged, configs, as_version))
        except TightfitError as error:
            left_out.append([logged["id"], str(logged.get("model_basename")), error.message])
        except Exception as error:
            if only:
                raise
            reason = f"BUG {type(error).__name__}: {error}"
            left_out.append([logged["id"], str(logged.get("model_basename")), reason[:150]])
    return rows, left_out


def _cell(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def table(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        f"{'row':<7}{'vLLM':<8}{'model':<34}{'device':<16}{'tp':>3}  {'load GiB':>15} {'%':>6}  "
        f"{'KV GiB':>15} {'%':>6}  {'tokens %':>8} {'conc. %':>8}"
    )
    for row in rows:
        assert row.plan.device is not None
        pairs = ["/".join(_cell(v) for v in pair) for pair in (row.load, row.kv)]
        yield (
            f"{row.logged['id']:<7}{row.plan.engine_version:<8}{row.plan.model.name[:32]:<34}"
            f"{row.plan.device.name + row.marks:<16}{len(row.plan.ranks):>3}  "
            f"{pairs[0]:>15} {_cell(row.load_error, '+.2f'):>6}  "
            f"{pairs[1]:>15} {_cell(row.kv_error, '+.2f'):>6}  "
            f"{_cell(row.token_error, '+.1f'):>8} {_cell(row.concurrency_error, '+.1f'):>8}"
        )


MEASURES: tuple[tuple[str, Callable[[Row], float | None]], ...] = (
    ("model load, % of budget", lambda row: row.load_error),
    ("available KV, % of budget", lambda row: row.kv_error),
    ("KV tokens, %", lambda row: row.token_error),
    ("concurrency, %", lambda row: row.concurrency_error),
)


def summary(title: str, rows: Sequence[Row]) -> Iterator[str]:
    yield f"{title}: {len(rows)} rows"
    for name, error in MEASURES:
        errors = [value for row in rows if (value := error(row)) is not None]
        if not errors:
            continue
        sizes = sorted(map(abs, errors))
        p90 = sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))]
        yield (
            f"  {name:<26} {len(sizes):>3} rows  median {statistics.median(sizes):6.2f}  "
            f"p90 {p90:6.2f}  worst {max(errors, key=abs):+7.2f}  "
            f"mean {statistics.fmean(errors):+6.2f}"
        )


def worst(rows: Sequence[Row], count: int) -> Iterator[str]:
    """The plans that are off by most, with all that they are made of."""
    ranked = sorted(rows, key=lambda row: abs(row.kv_error or 0), reverse=True)
    for row in ranked[:count]:
        options, logged = row.plan.options, row.logged
        yield ""
        yield next(line for line in list(table([row]))[1:])
        yield (
            f"  max_model_len {options.max_model_len.value}, max_num_seqs "
            f"{options.max_num_seqs.value}, max_num_batched_tokens "
            f"{options.max_num_batched_tokens.value}, utilization "
            f"{options.gpu_memory_utilization.value}, kv {options.kv_cache_dtype.value}, "
            f"quantization {logged.get('quantization')}, budget {row.budget:.2f} GiB, "
            f"left for the rest by the log {_cell(_rest(row))} GiB"
        )
        others = {
            "activations": "activation_peak_gib",
            "non_torch": "non_torch_gib",
            "cuda_graphs": "cudagraph_estimated_gib",
            "weights": "weights_gib",
        }
        for component in row.rank.components:
            beside = logged.get(others.get(component.name, ""))
            yield (
                f"  {component.name:<20}{component.planned_bytes / GiB:9.3f} GiB"
                f"{'' if component.inside_budget else ' outside':<9}"
                f"{'' if beside is None else f' (log {beside})':<14} {component.formula[:110]}"
            )
        peak = _sum(row.rank, PEAK) / GiB
        yield f"  peak of the profile run {peak:.3f} GiB, log {logged.get('activation_peak_gib')}"
        yield f"  {logged['source_url'][:140]}"


def _rest(row: Row) -> float | None:
    """What the log leaves for everything but weights and pool."""
    (_, load), (_, kv) = row.load, row.kv
    return None if load is None or kv is None else row.budget - load - kv


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--configs", type=Path, required=True)
    parser.add_argument("--worst", type=int, default=0)
    parser.add_argument("--only")
    parser.add_argument("--as-version")
    given = parser.parse_args()
    rows, left_out = all_rows(given.data, given.configs, given.only, given.as_version)
    print("\n".join(table(rows)))
    print()
    named = [row for row in rows if not row.inferred]
    print("\n".join(summary("all", rows)))
    print("\n".join(summary("device named by the log", named)))
    print("\n".join(summary("scheme not assumed", [row for row in rows if not row.assumed])))
    for version in sorted({version_of(row.logged) for row in rows}):
        mine = [row for row in rows if version_of(row.logged) == version]
        errors = [row.kv_error for row in mine if row.kv_error is not None]
        if errors:
            print(
                f"  {version:<8} {len(errors):>3} rows  median {statistics.median(errors):+.2f} %"
            )
    print("\n".join(worst(rows, given.worst)))
    print(f"\nleft out: {len(left_out)}")
    for name, model, reason in left_out:
        print(f"  {name:<7}{model[:40]:<42}{reason}")
    for reason, count in Counter(reason for _, _, reason in left_out).most_common():
        print(f"{count:>4} x {reason}")


if __name__ == "__main__":
    main()
