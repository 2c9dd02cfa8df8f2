"""Public calls with hostile arguments: the right answer, or an error that names an argument.

Each call takes arguments that work and replaces one or two of them by values of other types,
sizes, numbers or shapes. Whatever is not a ValueError or a TypeError that names one, a hang, or a
NaN that nobody asked for is a defect.
"""

import re
import signal
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_parts import VALUES, Call, table
from torch import Tensor, nn

import sdkd_plugin

SECONDS = 20
"""In which a call must end; the slowest right one takes less than one."""


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Call]]:
    """The table; a relative path is in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        yield table(tmp_path_factory.mktemp("fuzz"))


def numbers(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a result."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.device.type != "meta":
        yield value.detach()
    elif isinstance(value, list | tuple):
        for each in value:
            yield from numbers(each)


def in_a_model_of_the_caller(error: Exception) -> bool:
    """Whether an error comes out of a model that the caller made, which is that model's own."""
    trace = error.__traceback__
    while trace is not None:
        if isinstance(trace.tb_frame.f_locals.get("self"), nn.Conv2d):
            return not isinstance(error, AttributeError)
        trace = trace.tb_next
    return False


def outcome(call: Call, changed: Mapping[str, Any]) -> str | None:
    """What is wrong with how a call ends, or None."""

    def late(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            result = call.function(**{**call.works, **changed})
            result = result if call.use is None else call.use(result)
    except TimeoutError:
        return f"it takes over {SECONDS} s"
    except Exception as error:
        text = str(error)
        if in_a_model_of_the_caller(error):
            return None
        if isinstance(error, OSError) and "cannot be written" in text:
            return None
        if isinstance(error, RuntimeError) and "diverged" in text:
            return None
        if not isinstance(error, ValueError | TypeError | FileNotFoundError):
            return f"{type(error).__name__}: {text[:200]}"
        if len(text) > 3000:
            return f"a message of {len(text)} characters"
        # A file that is not there is named by its path, and a function that takes other arguments
        # by Python.
        named = isinstance(error, FileNotFoundError) or re.search(
            r"`\w+|\w\(\) (missing|takes) \d", text
        )
        paths = (str(value)[:200] for value in changed.values() if isinstance(value, Path | str))
        return None if named or any(p and p in text for p in paths) else f"names nothing: {error!r}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    given = [each for value in changed.values() for each in numbers(value)]
    finite = all(bool((each.abs() < 1e30).all()) for each in given)  # others may overflow
    if any(bool(each.isnan().any()) for each in numbers(result)) and (finite):
        return "a silent NaN"
    return None


def test_the_table_has_the_front_door(calls):
    """Everything public is called, but for what others make or what has no arguments."""
    known = {name.partition(".")[0].partition("(")[0].partition(" ")[0] for name in calls}
    others = {"CAMKDAggregation", "MeanAggregation", "DistillationTerms", "Spectrum"}
    others |= {"TeacherOutput", "SphereTransform", "__version__", "measure_teachers"}
    assert set(sdkd_plugin.__all__) <= known | others


@pytest.mark.usefixtures("as_shipped")
def test_calls_that_work_do(calls):
    for name, call in calls.items():
        if name in ("read_los_loop", "read_taxibj", "read_weatherbench"):  # no such files here
            continue
        assert outcome(call, {}) is None, name


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize("n", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_hostile_arguments_are_refused_by_name(calls, n: int):
    chance, wrong = np.random.default_rng(n), dict[str, str]()
    names, values = sorted(calls), sorted(VALUES)
    for number in range(n):
        name = names[number % len(names)]
        call = calls[name]
        given = sorted(call.works)
        chosen = chance.choice(given, min(len(given), int(chance.integers(1, 3))), replace=False)
        kinds = {str(each): values[int(chance.integers(len(values)))] for each in chosen}
        said = outcome(call, {k: VALUES[v] for k, v in kinds.items()})
        if said is not None:
            wrong[f"{name} with {kinds}"] = said
    print(f"{n} calls, {len(wrong)} defects")
    assert not wrong, "\n".join(f"{where}: {what}" for where, what in wrong.items())
