"""The workflow and the GitLab job: their own commands are run here, with the variables that CI would set."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from reports.baseline import update_baseline
from tests.reports.runs import run_of

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "evalkit-check.yml"
GITLAB = ROOT / "reports" / "ci" / "gitlab.yml"


def workflow() -> dict:  # type: ignore[type-arg]
    return yaml.load(WORKFLOW.read_text(), Loader=yaml.BaseLoader)  # type: ignore[no-any-return]  # "on" stays a word


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with baselines, margins, and two finished runs: the same again, and one that lost 8 points."""
    folder = tmp_path_factory.mktemp("a repository")
    rng = np.random.default_rng(0)
    right = rng.random(1500) < 0.7
    worse = right & (rng.random(1500) > 0.115)
    same = run_of({"t": (right.tolist(), right.tolist())}, folder=folder / "runs" / "same")
    run_of({"t": (worse.tolist(), worse.tolist())}, folder=folder / "runs" / "worse", fingerprint="w")
    few = run_of({"t": (right[:50].tolist(), right[:50].tolist())}, folder=folder / "runs" / "few")
    update_baseline(same, folder / "baselines" / "anchor.json", anchor=True)
    update_baseline(same, folder / "baselines" / "release.json", anchor=False)
    update_baseline(few, folder / "baselines" / "few.json", anchor=False)
    (folder / "baselines" / "margins.yaml").write_text("margins: {loglikelihood: 2, generation: 2}\n")
    commands = folder / "bin"
    commands.mkdir()
    (commands / "evalkit").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m evalkit "$@"\n')
    (commands / "evalkit").chmod(0o755)
    return folder


CASES = [
    ("runs/same", "baselines/anchor.json baselines/release.json", 0),
    ("runs/worse", "baselines/anchor.json baselines/release.json", 1),
    ("runs/none", "baselines/none.json", 2),
    ("runs/few", "baselines/few.json", 3),
    ("runs/few", "baselines/release.json", 3),
]


def run_script(script: str, repository: Path, shell: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": f"{repository / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        **variables,
    }
    words = {"bash": ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c"], "sh": ["sh", "-e", "-c"]}[shell]
    return subprocess.run(
        [*words, script], cwd=repository, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(("model", "baselines", "code"), CASES)
def test_the_workflow_s_command_gives_the_verdict(
    model: str, baselines: str, code: int, repository: Path, tmp_path: Path
) -> None:
    steps = workflow()["jobs"]["check"]["steps"]
    [script] = [step["run"] for step in steps if step.get("id") == "check"]
    summary, output = tmp_path / "summary.md", tmp_path / "output"
    variables = {"GITHUB_STEP_SUMMARY": str(summary), "GITHUB_OUTPUT": str(output)}
    done = run_script(
        script.replace("evalkit-check", str(tmp_path / "report")),
        repository,
        "bash",
        MODEL=model,
        BASELINES=baselines,
        MARGINS="baselines/margins.yaml",
        OPTIONS="",
        **variables,
    )
    assert done.returncode == code, done.stderr
    assert output.read_text() == f"exit-code={code}\n"
    assert summary.exists() == (code != 2)
    if code != 2:
        assert summary.read_text() == (tmp_path / "report" / "check.md").read_text()
        ElementTree.parse(tmp_path / "report" / "junit.xml")


@pytest.mark.parametrize(("model", "baselines", "code"), CASES)
def test_the_gitlab_job_s_command_gives_the_verdict(
    model: str, baselines: str, code: int, repository: Path, tmp_path: Path
) -> None:
    job = yaml.safe_load(GITLAB.read_text())["evalkit-check"]
    [script] = job["script"]
    report = tmp_path / "report"
    script = script.replace("evalkit-check", str(report))
    done = run_script(script, repository, "sh", MODEL=model, BASELINES=baselines, MARGINS="", OPTIONS="")
    assert done.returncode == code, done.stderr
    assert (report / "junit.xml").exists() == (code != 2)


def test_inputs_reach_the_shell_as_variables_only(repository: Path, tmp_path: Path) -> None:
    """A model's name is no command, whoever wrote it."""
    text = WORKFLOW.read_text()
    runs = [step["run"] for step in workflow()["jobs"]["check"]["steps"] if "run" in step]
    assert not any("${{" in script for script in runs) and "pull_request_target" not in text
    variables = workflow()["jobs"]["check"]["env"]
    assert {name for script in runs for name in variables if f"${name}" in script} == set(variables)
    done = run_script(
        runs[-1],
        repository,
        "bash",
        MODEL='x"; touch hacked; "',
        BASELINES="baselines/anchor.json",
        MARGINS="",
        OPTIONS="",
        GITHUB_STEP_SUMMARY=str(tmp_path / "s"),
        GITHUB_OUTPUT=str(tmp_path / "o"),
    )
    assert done.returncode == 2 and not (repository / "hacked").exists()


def test_what_is_kept_is_what_the_command_writes() -> None:
    [keep] = [step for step in workflow()["jobs"]["check"]["steps"] if "upload-artifact" in step.get("uses", "")]
    kept = keep["with"]["path"].split()
    assert kept == yaml.safe_load(GITLAB.read_text())["evalkit-check"]["artifacts"]["paths"]
    assert {Path(path).name for path in kept} == {"check.json", "check.md", "junit.xml"}
