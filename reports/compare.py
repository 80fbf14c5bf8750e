"""Two runs -> one comparison, for the notebook, the commands and the reports."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evalkit.records import LOGLIKELIHOOD, MODES, ItemRecord, Mode, TaskEntry
from evalkit.stats.intervals import Interval
from evalkit.store import Run, write_json, write_lines, write_text
from reports.figures import held_out, model_result, notes, overall, task_result
from reports.pairing import Gaps, Paired, check_settings, discordant, formula_gaps_of, gaps_of, pair, rights_of
from reports.why import adjust

SCHEMA = "evalkit.compare/1"


class Rows(list[dict[str, Any]]):
    """A table: a list of dictionaries."""

    def to_pandas(self) -> Any:
        """The same as a pandas DataFrame (``pip install 'evalkit[report]'``)."""
        try:
            import pandas
        except ImportError as error:
            raise ValueError("to_pandas needs pandas: pip install 'evalkit[report]'") from error
        return pandas.DataFrame(list(self))


class Comparison:
    """Teacher against student on the same items; ``result`` is compare.json."""

    def __init__(self, teacher: Run, student: Run, tasks: Sequence[str] | None = None) -> None:
        """``tasks``: only these of what both runs hold. ValueError: the runs can't be compared, and why."""
        self.teacher = teacher
        self.student = student
        check_settings(teacher, student)
        names = [name for name in teacher.tasks if name in student.tasks and (tasks is None or name in tasks)]
        if not names:
            raise ValueError(
                f"the runs have no task in common: {', '.join(teacher.tasks)} against {', '.join(student.tasks)}"
            )
        self._paired = {name: pair(teacher, student, name) for name in names}
        self._gaps: dict[str, Gaps] = {name: gaps_of(paired) for name, paired in self._paired.items()}
        rules = teacher.manifest.settings.rules
        formulas = {name: formula_gaps_of(paired) for name, paired in self._paired.items()}
        results = [task_result(name, self._paired[name], self._gaps[name], formulas[name], rules) for name in names]
        adjust(results)
        only = sorted(set(teacher.tasks) ^ set(student.tasks)) if tasks is None else []
        self.result: dict[str, Any] = {
            "schema": SCHEMA,
            "teacher": model_result(teacher),
            "student": model_result(student),
            "settings": teacher.manifest.settings.model_dump(mode="json"),
            "tasks": results,
            "intervals": "95 %, of this checkpoint (over items)",
            "overall": overall(results, self._gaps, formulas),
            "held_out": None,
            "notes": notes(self._paired, only),
        }
        self.result["held_out"] = held_out(self._paired, self.result["overall"]["tasks"])

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self._paired)

    def _of(self, task: str) -> Gaps:
        if task not in self._gaps:
            raise ValueError(f"task {task!r} is not in this comparison; it has {', '.join(self.tasks)}")
        return self._gaps[task]

    def gap(self, task: str, mode: Mode) -> Interval:
        """Teacher's accuracy minus the student's in one mode (fractions, Tango's 95 % interval)."""
        gaps = self._of(task).gaps
        if mode not in gaps:
            raise ValueError(f"mode {mode!r} was not scored; these were: {', '.join(gaps)}")
        return gaps[mode]

    def hidden_gap(self, task: str) -> Interval:
        """Generation gap minus log-likelihood gap inside generation's view (fractions, t interval at 95 %).

        Where the primary views of the two modes differ this is the mode's part of the protocol gap. ValueError
        where the two modes never shared prompt bytes.
        """
        hidden = self._of(task).hidden
        if hidden is None:
            raise ValueError(f"{task}: both modes were not scored after the same prompt, so there is no hidden gap")
        return hidden

    def protocol_gap(self, task: str) -> Interval:
        """Generation gap minus log-likelihood gap, each in its primary view (fractions)."""
        protocol = self._of(task).protocol
        if protocol is None:
            raise ValueError(f"{task}: a protocol gap needs both modes, and only one was scored")
        return protocol

    @property
    def items(self) -> Rows:
        """Every common item: both models' outcomes in each mode's primary view."""
        return Rows(_item_row(name, t, s, paired) for name, paired in self._paired.items() for t, s in paired.pairs)

    def flips(self) -> Rows:
        """Per task and mode: items that the student lost and gained, volume (lost + gained) / n, and direction
        (lost - gained) / (lost + gained)."""
        rows = Rows()
        for name, paired in self._paired.items():
            for mode in self._gaps[name].gaps:
                lost, gained = discordant(rights_of(paired, mode))
                n, both = len(paired.pairs), lost + gained
                rows.append(
                    {
                        "task": name,
                        "mode": mode,
                        "n": n,
                        "lost": lost,
                        "gained": gained,
                        "volume": both / n,
                        "direction": (lost - gained) / both if both else 0.0,
                    }
                )
        return rows

    def to_markdown(self) -> str:
        from reports.markdown import compare_markdown

        return compare_markdown(self.result)

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def save(self, folder: Path) -> None:
        """Write compare.json, compare.md and items.jsonl, each whole or not at all."""
        write_json(folder / "compare.json", self.result)
        write_lines(folder / "items.jsonl", self.items)
        write_text(folder / "compare.md", self.to_markdown())


def _item_row(name: str, teacher: ItemRecord, student: ItemRecord, paired: Paired) -> dict[str, Any]:
    row = item_row(name, {"teacher": teacher, "student": student}, paired.teacher_entry)
    return {**row, "same_prompt": teacher.prompt_sha256 == student.prompt_sha256}


def item_row(name: str, records: Mapping[str, ItemRecord], entry: TaskEntry) -> dict[str, Any]:
    """One item as every model of ``records`` (who -> record) took it, in each mode's primary view."""
    first = next(iter(records.values()))
    row: dict[str, Any] = {
        "task": name,
        "item": first.item,
        "stratum": first.stratum,
        "cluster": first.cluster,
        "gold": first.gold,
        "choices": list(first.choices),
    }
    for who, record in records.items():
        for mode in MODES:
            outcome = record.outcome(mode, entry.view(mode))
            if outcome is None:
                continue
            row[f"{who}_{mode}"] = outcome.outcome
            row[f"{who}_{mode}_answer"] = outcome.answer
            if mode == LOGLIKELIHOOD:
                row[f"{who}_logprobs"] = list(outcome.logprobs)
            else:
                row[f"{who}_reply"] = outcome.reply
                row[f"{who}_span"] = list(outcome.span) if outcome.span else None
                row[f"{who}_rule"] = outcome.rule
    return row
