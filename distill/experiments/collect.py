"""Tables of an experiment's models: python -m distill.experiments.collect OUT [--teacher NAME]

Reads OUT/scores/MODEL/VIEW (runs of `evalkit run`), compares each model with the teacher by `evalkit compare` where
both runs are whole, and writes OUT/results.json and OUT/results.md: accuracy in both modes, unparsed replies, gaps,
hidden gaps and what is kept, each with its interval and n as compare.json has them; and the training's speed from
OUT/MODEL/metrics.jsonl.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from evalkit.store import write_json, write_text


def whole(run: Path) -> bool:
    """Whether the run's folder is there, finished."""
    file = run / "run.json"
    return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8"))["complete"])


def compare(teacher: Path, student: Path, out: Path) -> dict[str, Any] | None:
    """compare.json of two finished runs; None where they can't be compared, with the reason on standard error."""
    words = [sys.executable, "-m", "evalkit", "compare", str(teacher), str(student), "--out", str(out), "--json"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        print(f"{student}: {done.stderr.strip()}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    return found


def training(metrics: Path) -> dict[str, Any]:
    """Stage -> tokens, median tokens a second and MFU after the first tenth, seconds, peak memory, probe losses."""
    found: dict[str, Any] = {}
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        steps = [row for row in rows if row["stage"] == stage and "loss" in row]
        steady = steps[len(steps) // 10 :]
        if not steady:
            continue
        found[stage] = {
            "steps": len(steps),
            "tokens": steps[-1]["tokens"],
            "tokens_per_s": statistics.median(row["tokens_per_s"] for row in steady),
            "mfu": statistics.median(row["mfu"] for row in steady) if "mfu" in steady[0] else None,
            "seconds": round(sum(row["seconds"] for row in steps), 1),
            "last_loss": steps[-1]["loss"],
        }
        for row in rows:
            if row["stage"] == stage and row.get("end"):
                found[stage] |= {name: row[name] for name in ("probe", "peak_memory_gib") if name in row}
    return found


def row(task: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of one task of a compare.json."""
    kept: dict[str, Any] = {"n": task["n"], "signal": task["signal"], "hidden_gap": task.get("hidden_gap")}
    kept["recovery"] = task.get("recovery")
    for mode, found in task["modes"].items():
        one: dict[str, Any] = {"view": found["view"], "gap": found["gap"], "floor": found["floor"]}
        for side in ("teacher", "student"):
            outcomes = found[side]["outcomes"]
            lost = outcomes["unparsed"] + outcomes["truncated"] + outcomes["empty"]
            one[side] = {"accuracy": found[side]["accuracy"], "ci95": found[side]["ci95"], "unread": lost / task["n"]}
        kept[mode] = one
    return kept


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", default="smollm2-135m-sft")
    chosen = parser.parse_args()
    out: Path = chosen.out
    result: dict[str, Any] = {"teacher": chosen.teacher, "models": {}, "training": {}}
    for metrics in sorted(out.glob("*/metrics.jsonl")):
        result["training"][metrics.parent.name] = training(metrics)
    for folder in sorted((out / "scores").iterdir()):
        for view in sorted(folder.iterdir()):
            teacher = out / "scores" / chosen.teacher / view.name
            if folder.name == chosen.teacher or not whole(view) or not whole(teacher):
                continue
            found = compare(teacher, view, out / "compare" / folder.name / view.name)
            if found is not None:
                tasks = {task["name"]: row(task) for task in found["tasks"]}
                result["models"].setdefault(folder.name, {})[view.name] = tasks
    write_json(out / "results.json", result)
    write_text(out / "results.md", tables(result))
    print(f"{out / 'results.md'} and results.json are written; every comparison is in {out / 'compare'}")


def tables(result: dict[str, Any]) -> str:
    """The training of each model, then a table for each: a line a task and mode."""
    lines = [f"# Results, against {result['teacher']}"]
    for name, stages in result["training"].items():
        lines += ["", f"## Training of {name}", ""]
        lines += [
            "| stage | tokens | tokens/s | MFU | seconds | probe before, after |",
            "| :-- | --: | --: | --: | --: | :-- |",
        ]
        for stage, one in stages.items():
            mfu = "–" if one["mfu"] is None else f"{100 * one['mfu']:.1f} %"
            probe = one.get("probe", {})
            losses = f"{probe['before']:.4f}, {probe['after']:.4f}" if "after" in probe else "–"
            numbers = f"{one['tokens']:,} | {one['tokens_per_s']:,.0f} | {mfu} | {one['seconds']}"
            lines.append(f"| {stage} | {numbers} | {losses} |")
    for name, views in result["models"].items():
        lines += ["", f"## {name}", "", "Accuracy and gaps in percent and points, with 95 % intervals.", ""]
        lines += [
            "| task | n | mode, view | teacher | student | gap | unread, teacher / student | hidden gap | signal |",
            "| :-- | --: | :-- | --: | --: | --: | --: | --: | :-- |",
        ]
        for tasks in views.values():
            for task, one in tasks.items():
                for mode in ("loglikelihood", "generation"):
                    if mode in one:
                        lines.append(_line(task, mode, one))
    return "\n".join(lines) + "\n"


def _line(task: str, mode: str, one: dict[str, Any]) -> str:
    found = one[mode]
    hidden = _points(one["hidden_gap"]) if mode == "generation" else ""
    sides = " | ".join(f"{100 * found[side]['accuracy']:.1f}" for side in ("teacher", "student"))
    unread = " / ".join(f"{100 * found[side]['unread']:.1f}" for side in ("teacher", "student"))
    signal = "yes" if one["signal"][mode] else "no"
    words = f"{mode}, {found['view']} | {sides} | {_points(found['gap'])} | {unread} | {hidden} | {signal}"
    return f"| {task} | {one['n']} | {words} |"


def _points(value: dict[str, Any] | None) -> str:
    """+1.2 [-0.3, +2.7] of an interval in fractions."""
    if not value or "ci95" not in value:
        return "–"
    low, high = value["ci95"]
    return f"{100 * value['mean']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


if __name__ == "__main__":
    main()
