"""Run `latentvae verify-resume`.

The command makes a short version of the user's run twice through `accelerate launch`. One run is
not interrupted. In the other run, which has its own folder, all processes get SIGKILL at random
moments. After each kill, this run is launched again and resumes. Finally, the results of the two
runs are compared.
"""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from latentvae.config.run_config import JobConfig
from latentvae.engine.resume import write_config
from latentvae.engine.run_options import check_options
from latentvae.engine.task import Task
from latentvae.errors import UserError
from latentvae.proofs.checks import Check, check_json_file, conclude, wrapped
from latentvae.proofs.verify_resume.compare import compare, read_results
from latentvae.proofs.verify_resume.job import Job, on_cpu, shortened
from latentvae.proofs.verify_resume.kills import draw_kills
from latentvae.proofs.verify_resume.order import check_order

LEAST_UPDATES = 4
EXACT_PROCESSES = 2  # On CPUs, up to this many processes must give equal bits


def verify_resume(
    task: type[Task],
    config: JobConfig,
    *,
    updates: int = 12,
    kills: int = 3,
    processes: int = 1,
    kill_seed: int = 0,
    work_dir: Path | None = None,
    json: Path | None = None,
    launch_timeout: int = 3600,
) -> int:
    """Make an uninterrupted run and a run with kills and resumes, and compare their results.

    Print a line for each check.

    Args:
        task: class of the run's task.
        config: the options of the run. This function replaces some options, such as those for
            length, logs, checkpoints and folder. Nothing is written to the run's `output_dir`.
        updates: number of updates of each of the two runs.
        kills: how often all processes of the second run are killed by SIGKILL.
        processes: number of processes of each launch.
        kill_seed: seed of the random moments of the kills.
        work_dir: new folder for both runs, which is kept. The default is a temporary folder, which
            is kept only if a check failed.
        json: file for the results of the checks. With None, no file is written.
        launch_timeout: time limit of a launch, in seconds. A longer launch counts as hung.

    Returns:
        The exit code: 0 if all checks pass, 1 if a check fails.

    Raises:
        UserError: an option is wrong, or the run does not finish even without kills.
    """
    # options
    for name, value, least in (
        ("updates", updates, LEAST_UPDATES),
        ("kills", kills, 1),
        ("processes", processes, 1),
        ("kill_seed", kill_seed, 0),
        ("launch_timeout", launch_timeout, 1),
    ):
        if value < least:
            raise UserError(f"{name} must be at least {least} (got {value}).")
    check_json_file(json)

    # the short run
    opened = task(shortened(task, config, updates=updates, processes=processes))
    opened.check()
    check_options(opened.config.run)
    opened.open()
    opened.check_repeatable()

    # launches
    work = _new_folder(work_dir)
    write_config(opened.config, work / "config.yaml")
    job = Job(task=opened, work=work, processes=processes, seconds=launch_timeout)
    print(wrapped(_plan(job, kills=kills)), flush=True)
    checks = _checks(job, kills=kills, seed=kill_seed)
    for check in checks:
        print(check, flush=True)

    # report
    code = conclude(checks, json_file=json)
    if work_dir is None and code == 0:
        shutil.rmtree(work)
    else:
        print(f"both runs and their output are kept in {work}")
    return code


def _new_folder(work_dir: Path | None) -> Path:
    if work_dir is None:
        return Path(tempfile.mkdtemp(prefix="verify-resume-"))
    try:
        work_dir.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"work_dir '{work_dir}' cannot be made: {error.strerror}. Give a new folder."
        ) from error
    return work_dir


def _plan(job: Job, *, kills: int) -> str:
    run, device = job.config.run, "CPU" if on_cpu() else "GPU"
    return (
        f"verify-resume: {run.max_train_steps} updates of {run.gradient_accumulation_steps} "
        f"micro-steps, a checkpoint every {run.checkpointing_steps} updates, processes: "
        f"{job.processes} ({device}), once without kills and once with {kills} kills, in {job.work}"
    )


def _checks(job: Job, *, kills: int, seed: int) -> list[Check]:
    updates, options = job.config.run.max_train_steps, job.config.run
    pace = job.straight("straight", title="straight")
    print(
        f"run without kills: {pace.update:.2g} s per update, {pace.save:.2g} s per save", flush=True
    )
    drawn = draw_kills(kills, updates=updates, save_every=options.checkpointing_steps, seed=seed)
    checks = job.killed(drawn, pace)
    if not checks[1].passed:  # the run did not finish
        return checks
    order = check_order(
        job.task,
        processes=job.processes,
        starts=[start * options.gradient_accumulation_steps for start in job.starts],
    )
    return [*checks, *([] if order is None else [order]), *_compared(job)]


def _compared(job: Job) -> list[Check]:
    """Compare the two runs bit by bit.

    If the two runs are not equal, a second uninterrupted run shows which differences occur without
    kills. On GPUs, and with more than two processes, the checks allow such differences. On a CPU
    with one or two processes, the checks fail, and only their advice uses the second run.
    """
    # equal to the bit
    update = job.config.run.max_train_steps
    straight, resumed = (
        read_results(job.work / name, update=update, parts=job.task.parts)
        for name in ("straight", "killed")
    )
    exact = on_cpu() and job.processes <= EXACT_PROCESSES
    checks = compare(straight, resumed)
    if all(check.passed for check in checks):
        return checks

    # compared with a second uninterrupted run
    job.straight("again", title="straight again")
    again = read_results(job.work / "again", update=update, parts=job.task.parts)
    if not exact:
        return compare(straight, resumed, again=again)
    if all(check.passed for check in compare(straight, again)):
        return checks
    advice = (
        "Two runs that were not killed differ as well, so the resume is not the cause of the "
        "difference. On this machine, this configuration gives different results each time."
    )
    return [check if check.passed else replace(check, advice=advice) for check in checks]
