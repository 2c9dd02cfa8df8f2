"""The command line ``sdkd``: from a trained teacher to a student in production.

Here are the commands and their help; what they do is in `sdkd_plugin.cli.work`, which they import
when they run.
"""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import click

from sdkd_plugin._version import __version__

_WRONG_USE = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError)
_FAILED = (RuntimeError, OSError, ImportError)


class _WrongUse(click.ClickException):
    exit_code = 2


class _Group(click.Group):
    """Errors become one line: exit code 2 for what the user can set right, 1 for what failed."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except (*_WRONG_USE, *_FAILED) as error:
            kind = _WrongUse if isinstance(error, _WRONG_USE) else click.ClickException
            raise kind(" ".join(str(error).split()) or type(error).__name__) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """A large spatiotemporal forecaster teaches a small one.

    Every command takes SETTINGS: a YAML file, the name of settings that come with the package
    (traffic, navier_stokes), or the folder of a run, which keeps its own; and changes to them as
    key=value. What a task, student or teacher can be is in "sdkd study --help".

    \b
    sdkd distill traffic teacher=null student.model=GraphAlterNet out=runs/teacher
    sdkd distill traffic teacher=runs/teacher/student out=runs/traffic
    sdkd export runs/traffic
    sdkd report runs/traffic

    Exit codes: 0 done, 1 failed, 2 wrong use. Logs have no progress bars.
    """


def _command(function: Callable[..., None]) -> click.Command:
    """A command of settings and overrides, with ``--json``; its work has the same name."""
    for decorate in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]..."),
        click.argument("settings"),
    ):
        function = decorate(function)
    return main.command()(function)


def _finish(found: Mapping[str, Any], as_json: bool) -> None:
    """Print what a command found: its text, or all of the rest as JSON."""
    text = found["text"]
    if as_json:
        rest = {name: value for name, value in found.items() if name != "text"}
        click.echo(json.dumps(rest, allow_nan=False))
    elif sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(text))
    else:
        click.echo(text)


_resume = click.option("--resume", is_flag=True, help="Go on with the run in the folder `out`.")


@_command
@_resume
def study(settings: str, overrides: tuple[str, ...], as_json: bool, resume: bool) -> None:
    """Does distillation pay on my data? Compare the student alone and distilled.

    Trains the student alone, with plain-MSE distillation and with SDKD, training.seeds times each,
    and writes table, rows, pictures and report.html into the folder `out`.

    \b
    sdkd study traffic teacher=runs/teacher/student task.data=FOLDER training.seeds=5
    sdkd study my.yaml distillation.labels=0.25 jobs=2 --resume

    The settings, with what they may hold:

    \b
    task:          {name: apebench, navier_stokes, rayleigh_benard, traffic, taxibj or
                   weatherbench; the options of sdkd_plugin.study's task; bands: [0.25], edges}
    teacher:       a model folder; {path: FILE, model: NAME, arguments: {...}} for a checkpoint
                   of neuraloperator or tsl; or a list of these
    student:       {model: NAME, arguments: {...}}: UNet, ResNet, MLPMixer, GraphMixer, ...,
                   neuralop.fno, tsl.GRUGCNModel, ...; sizes of the data are filled in
    training:      seeds, steps, lr, batch_size, weight_decay, clip, validations
    distillation:  kd_weight, weighting, latents, labels, ...: options of SDKDDistiller
    out, jobs, device
    """
    from sdkd_plugin.cli import work

    _finish(work.study_run("study", settings, overrides, resume), as_json)


@_command
@_resume
def distill(settings: str, overrides: tuple[str, ...], as_json: bool, resume: bool) -> None:
    """Train one student, by a saved teacher or alone, and keep it in `out`/student.

    \b
    sdkd distill navier_stokes teacher=runs/teacher/student out=runs/ns
    sdkd distill traffic teacher=null student.model=GraphAlterNet out=runs/teacher

    The second trains a model on labels alone: a teacher, for instance. See "sdkd study --help" for
    the settings.
    """
    from sdkd_plugin.cli import work

    _finish(work.study_run("distill", settings, overrides, resume), as_json)


@_command
def evaluate(settings: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Errors of the student, its teachers and the baselines on the test samples.

    \b
    sdkd evaluate runs/traffic
    sdkd evaluate traffic model=runs/other/student task.data=FOLDER
    """
    from sdkd_plugin.cli import work

    _finish(work.evaluate(settings, overrides), as_json)


@_command
def export(settings: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Write the student as ONNX or for torch.export, in physical units, and check the file.

    \b
    sdkd export runs/traffic
    sdkd export runs/ns export.format=pt2
    sdkd export runs/ns export.int8=true
    """
    from sdkd_plugin.cli import work

    _finish(work.export(settings, overrides), as_json)


@_command
@click.option("--teacher", metavar="FOLDER", help="Instead of the settings' teacher.")
def benchmark(
    settings: str, overrides: tuple[str, ...], as_json: bool, teacher: str | None
) -> None:
    """Time the student beside its teacher, with their errors.

    Times both, eager and as ONNX and int8 files, by batch size, and writes benchmark.md, .csv and
    .png into the folder `out`. Folders of other runs or models, given after the first, are further
    students of the same data.

    \b
    sdkd benchmark runs/traffic
    sdkd benchmark runs/width8 runs/width16 --teacher runs/teacher/student
    sdkd benchmark runs/ns benchmark.batch_sizes=[1,64] benchmark.threads=2

    \b
    benchmark:  batch_sizes; threads of the CPU; seconds for each time;
                forms: eager, compiled, onnx, int8
    """
    from sdkd_plugin.cli import work

    _finish(work.benchmark(settings, overrides, teacher), as_json)


@_command
def report(settings: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Write report.html, table and pictures of a finished run into its folder.

    \b
    sdkd report runs/traffic
    """
    from sdkd_plugin.cli import work

    _finish(work.report(settings, overrides), as_json)


@main.command()
@click.argument("name", type=click.Choice(["traffic", "navier_stokes", "rayleigh_benard"]))
@click.argument("out")
@click.argument("options", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def simulate(name: str, out: str, options: tuple[str, ...], as_json: bool) -> None:
    """Simulate data: a folder of traffic files, or an .npy file of trajectories.

    \b
    sdkd simulate traffic data/simulated n_sensors=50 days=7
    sdkd simulate navier_stokes data/ns.npy n_samples=200 viscosity=1e-3 resolution=32 duration=20
    """
    from sdkd_plugin.cli import work

    _finish(work.simulate(name, out, options), as_json)
