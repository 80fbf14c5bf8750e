"""The teacher and the student that ship, five durations, and a control: SmolLM2-135M on one or two GPUs.

    python -m distill.experiments.smollm2 --data-dir DATA --out OUT [--minutes 8] [--train-teacher]

Each job trains one model (`evalkit distill`) and evaluates it (distill/experiments/score.py), two evaluations at a time
on a GPU beside the training there. The same command goes on where it was stopped;
`python -m distill.experiments.collect OUT` makes the tables. A duration is a run of its own with its own schedule; all
begin with the same 5M tokens of alignment. The teacher is the built-in smollm2-135m-sft, or trained anew.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from distill.experiments.collect import whole
from distill.experiments.score import VIEWS
from distill.student import start_folder

FULL = (
    "student.lora=null",
    "guard.tasks=[]",
    *(f"stages.{one}.train=[mixer, mlp, norms]" for one in ("distill", "instruct")),
)
CONTROL = ("student.mixer=softmax", "axes.architecture=fresh softmax attention")
ALIGN_ONLY = ("stages.distill=null", "stages.instruct=null", "ship=null")
NO_ALIGN = ("stages.align-qk=null", "stages.align-block=null")
AT_ONCE = 2
"""Models evaluated on one GPU beside a training."""
RESERVE = 0.3
"""Minutes before the end at which a training is stopped, to save."""


@dataclass(frozen=True)
class Job:
    """One model; an empty recipe: nothing is trained, the model ``name`` is scored."""

    name: str
    recipe: str = ""
    changes: tuple[str, ...] = ()
    scored: bool = True


def jobs(out: Path, base: str, built_in: bool, rehearse: bool) -> tuple[Job, Job, list[list[Job]]]:
    """The teacher, the alignment that all share, and a queue for each of two GPUs."""
    teacher = "teacher=smollm2-135m-sft" if built_in else f"teacher={out}/sft/delta"

    def few(*stages: str) -> tuple[str, ...]:
        """A rehearsal's stages: one small step each."""
        each = (f"stages.{one}.{change}" for one in stages for change in ("tokens=100", "batch=2"))
        return tuple(each) if rehearse else ()

    def duration(name: str, millions: int, *changes: str, start: str = "align") -> Job:
        parts = {"distill": 600_000, "instruct": 400_000}
        tokens = (f"stages.{stage}.tokens={millions * part}" for stage, part in parts.items())
        common = (teacher, f"student.start={out}/{start}", f"axes.duration={millions}M", *NO_ALIGN, *tokens)
        return Job(name, "smollm2-135m", (*common, *changes, *few(*parts)))

    sft = Job("sft", "smollm2-135m-sft", (f"teacher={base}", *few("sft")))
    if built_in:
        sft = Job("smollm2-135m-sft")
    align = Job("align", "smollm2-135m", (teacher, *FULL, *ALIGN_ONLY, *few("align-qk", "align-block")))
    control = (*FULL, *CONTROL, *ALIGN_ONLY, "stages.align-qk.train=[q, k]", *few("align-qk", "align-block"))
    control_align = Job("control-align", "smollm2-135m", (teacher, *control), scored=False)
    ship = ("stages.distill.train=[mixer, norms, lora]", "stages.instruct.train=[mixer, norms, lora]")
    first = [duration("ship", 40, *ship)]
    first += [duration(f"full-{n}M", n, *FULL, "ship=null") for n in (10, 5, 2)]
    second = [duration("full-40M", 40, *FULL, "ship=null"), duration("full-20M", 20, *FULL, "ship=null")]
    second += [control_align, duration("control-20M", 20, *FULL, *CONTROL, "ship=null", start="control-align")]
    return sft, align, [first, [*second, Job(base)]]


class Runner:
    """Starts commands, remembers what is done."""

    def __init__(self, out: Path, data: Path, minutes: float, gpus: int, rehearse: bool) -> None:
        self.out, self.data, self.gpus, self.rehearse = out, data, gpus, rehearse
        self.begun = time.monotonic()
        self.deadline = self.begun + 60 * minutes
        self.pools = [ThreadPoolExecutor(AT_ONCE) for _ in range(max(gpus, 1))]
        for folder in ("logs", "done", "scores"):
            (out / folder).mkdir(parents=True, exist_ok=True)

    def start(self, words: list[str], name: str, gpu: int | None) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "4", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "true"}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu % max(self.gpus, 1))
        with open(self.out / "logs" / f"{name}.log", "ab") as log:
            return subprocess.Popen([sys.executable, "-m", *words], stdout=log, stderr=log, env=environment)

    def say(self, line: str) -> None:
        print(f"{(time.monotonic() - self.begun) / 60:6.2f} min  {line}", flush=True)

    def show(self, log: str) -> None:
        """The end of a log: the machine may be gone before anyone can read the file."""
        lines = (self.out / "logs" / f"{log}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join(f"    {line}" for line in lines[-12:]), flush=True)

    def train(self, job: Job, gpu: int | None) -> bool:
        """Whether the job's model is there in the end. gpu: None, all of them by torchrun."""
        done, folder = self.out / "done" / job.name, self.out / job.name
        if not job.recipe or done.exists():
            return True
        left = (self.deadline - time.monotonic()) / 60 - RESERVE
        if left < 0.4:
            return False
        words = ["evalkit", "distill", job.recipe, "--out", str(folder), "--data-dir", str(self.data)]
        words += ["--minutes", f"{left:.2f}", *(part for change in job.changes for part in ("--set", change))]
        words += ["--resume"] if (folder / "recipe.json").is_file() else []
        if gpu is None and self.gpus > 1:
            words = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(self.gpus), "-m", *words]
        begun = time.monotonic()
        code = self.start(words, job.name, gpu).wait()
        whole = code == 0 and self._finished(job)
        self.say(f"{job.name}: exit code {code} after {time.monotonic() - begun:.0f} s{'' if whole else ', not done'}")
        if whole:
            done.touch()
        if code:
            self.show(job.name)
        return whole

    def _finished(self, job: Job) -> bool:
        lines = (self.out / job.name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ended = {row["stage"] for row in map(json.loads, lines) if row.get("end")}
        content = json.loads((self.out / job.name / "recipe.json").read_text(encoding="utf-8"))
        return {stage["name"] for stage in content["stages"]} <= ended

    def score(self, job: Job, gpu: int) -> None:
        """Start the evaluation of the job's model, in every view."""
        if not job.scored:
            return
        model = str(start_folder(str(self.out / job.name))) if job.recipe else job.name
        if (self.out / job.name / "delta" / "delta.json").is_file():
            model = str(self.out / job.name / "delta")
        self.pools[gpu % len(self.pools)].submit(self._score, job.name, model, gpu)

    def _score(self, name: str, model: str, gpu: int) -> None:
        left, out = self.deadline - time.monotonic(), self.out / "scores" / Path(name).name
        if left < 15 or all(whole(out / view) for view in VIEWS):
            return
        label = f"score-{out.name}"
        words = ["distill.experiments.score", model, "--out", str(out)]
        words += ["--data-dir", str(self.data), *(["--limit", "2"] if self.rehearse else [])]
        process = self.start(words, label, gpu)
        try:
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            process.kill()  # what is scored so far is kept
            code = process.wait()
        self.say(f"{label}: exit code {code}")
        if code:
            self.show(label)

    def queue(self, queue: list[Job], gpu: int) -> None:
        """Train one after the other on one GPU; evaluations run beside."""
        for job in queue:
            if not self.train(job, gpu):
                return
            self.score(job, gpu)

    def wait(self) -> None:
        """For the evaluations, until the time is up; what is scored so far is kept."""
        for pool in self.pools:
            pool.shutdown()


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10**6)
    parser.add_argument("--gpus", type=int, default=None)
    parser.add_argument("--base", default="smollm2-135m", help="the model that becomes the teacher")
    parser.add_argument("--train-teacher", action="store_true", help="instead of the built-in smollm2-135m-sft")
    parser.add_argument("--rehearse", action="store_true", help="one small step a stage, 2 items a task")
    chosen = parser.parse_args()
    gpus = chosen.gpus
    if gpus is None:
        import torch

        gpus = torch.cuda.device_count()
    runner = Runner(chosen.out.absolute(), chosen.data_dir.absolute(), chosen.minutes, gpus, chosen.rehearse)
    sft, align, queues = jobs(runner.out, chosen.base, not chosen.train_teacher, chosen.rehearse)
    if runner.train(sft, None):
        runner.score(sft, 1)
        if runner.train(align, 0):
            runner.score(align, 0)
            # One GPU: the queues one after the other; two: side by side.
            lanes = queues if gpus > 1 else [[job for queue in queues for job in queue]]
            threads = [threading.Thread(target=runner.queue, args=(lane, gpu)) for gpu, lane in enumerate(lanes)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    runner.wait()
    runner.say("end")


if __name__ == "__main__":
    main()
