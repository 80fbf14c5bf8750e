"""One model in every view, a run each: `python -m distill.experiments.score MODEL --data-dir DATA --out OUT`.

In one process, since starting one takes longer than most views. Runs that are complete are left alone, others go on.
"""

import argparse
import json
import traceback
from pathlib import Path
from typing import Any

from distill.experiments.collect import whole

CHOICES = ["arc_easy", "arc_challenge", "openbookqa", "commonsense_qa", "piqa", "social_iqa", "quick"]
VIEWS: dict[str, dict[str, Any]] = {
    "open": {
        "tasks": [*CHOICES, "truthfulqa_mc1", "boolq_closed", "arithmetic", "recall"],
        "view": "open",
        "limit": 500,
    },
    "text": {"tasks": [*CHOICES, "hellaswag", "winogrande"], "view": "text", "shots": 0, "limit": 500},
    "copy": {"tasks": ["arc_easy", "openbookqa", "commonsense_qa", "quick"], "view": "copy", "shots": 0, "limit": 300},
    "cot": {"tasks": ["word_problems", "gsm8k"], "view": "cot", "shots": 0, "limit": 500},
    "other": {"tasks": ["copy", "mmlu"], "limit": 500},
    "bigbench": {"view": "open"},
}
"""What each run is asked; bigbench: every file of DATA/bigbench."""


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=None, help="items a task, instead of each view's own")
    chosen = parser.parse_args()

    import evalkit

    failed = []
    for view, asked in VIEWS.items():
        if whole(chosen.out / view):
            continue
        options = {**asked, **({"limit": chosen.limit} if chosen.limit else {})}
        tasks = options.pop("tasks", None) or [str(one) for one in sorted((chosen.data_dir / "bigbench").glob("*.gz"))]
        try:
            run = evalkit.run(chosen.model, tasks, data_dir=chosen.data_dir, out=chosen.out / view, **options)
        except Exception:  # the other views are told apart from it
            failed.append(view)
            print(view, traceback.format_exc(), flush=True)
            continue
        profile = run.manifest.sessions[-1].get("profile", {})
        shown = ("layout", "why", "cuda_graphs", "phases")
        print(view, json.dumps({name: profile.get(name) for name in shown}), flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
