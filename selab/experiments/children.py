"""Fresh processes, one after the other: each reads one order, writes lines, and is one sample.

A process is spawned, not forked: it lays out its memory as a user's next start of the program does. Forked children of
one parent share its layout, and are all off by the same amount.
"""

import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import msgspec

from selab import units
from selab.errors import SelabError
from selab.experiments.schedule import Schedule
from selab.records.types import Frozen

# More processes that die are no accident.
_MOST_DEATHS = 3
# The folder of this package comes last: it is needed only where the package is not installed. A Ctrl-C reaches all
# processes; during imports it would end in a traceback: there it is left to the parent, which ends the process.
_START = (
    "import signal; heard = signal.signal(signal.SIGINT, signal.SIG_IGN); "
    f"import sys; sys.path.append({str(Path(__file__).resolve().parents[2])!r}); "
    "from {module} import child_main; signal.signal(signal.SIGINT, heard); child_main()"
)
_Order = TypeVar("_Order")
_Found = TypeVar("_Found")


class Turn(Frozen, frozen=True, kw_only=True):
    """What one process is to do.

    Attributes:
        number: its own, from 0; a process that died keeps its number.
        sampling_s: seconds of sampling of each of its runs.
        control: whether its runs also measure the baseline against its second instance.
    """

    number: int
    sampling_s: float
    control: bool


@dataclass(frozen=True, kw_only=True)
class Started:
    """A process starts.

    Attributes:
        where: the process in words: `process 3 of about 8`.
    """

    where: str


@dataclass(frozen=True, kw_only=True)
class Found(Generic[_Found]):
    """What a process found.

    Attributes:
        number: of its turn.
        where: as of `Started`.
    """

    number: int
    where: str
    what: _Found


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A process ended.

    Attributes:
        number: of its turn.
        died: why nothing that it found may count; empty if it ended well.
    """

    number: int
    died: str

    @property
    def remark(self) -> str:
        """Return what a record says of a process that died."""
        return f"process {self.number + 1}: {self.died}; its samples are left out"


class _Line(Frozen, Generic[_Found], frozen=True, kw_only=True):
    """A line of a process: a finding, that its networks are ready, or why it cannot measure at all."""

    found: _Found | None = None
    ready: bool = False
    error: str = ""


def in_processes(
    schedule: Schedule, module: str, order_of: Callable[[Turn], object], finds: type[_Found]
) -> Iterator[Started | Found[_Found] | Ended]:
    """Run one process after the other until the schedule's last; yield what each finds, and its end.

    A process that dies is replaced by another one.

    Args:
        schedule: how many, and for how long.
        module: has `child_main`, the program of a process: a call of `child`.
        order_of: makes the order of a turn, which travels as JSON.
        finds: the type of what a process finds.

    Raises:
        SelabError: the networks cannot be measured at all, or too many processes died.
    """
    line_type: Any = _Line[finds]  # type: ignore[valid-type]
    number, died = 0, 0
    while schedule.left:
        turn = Turn(number=number, sampling_s=schedule.sampling_s(), control=schedule.done % 2 == 0)
        where = f"process {schedule.done + 1} of {schedule.total_words}"
        if schedule.done:
            # What the first process took corrects what was announced.
            where += f", about {schedule.expected_s():.0f} s left"
        yield Started(where=where)
        began, ready_s, why = schedule.clock(), 0.0, ""
        try:
            with closing(lines_of(module, msgspec.json.encode(order_of(turn)))) as lines:
                for text in lines:
                    line: _Line[_Found] = msgspec.json.decode(text, type=line_type)
                    if line.error:
                        raise SelabError(line.error)
                    if line.ready:
                        ready_s = ready_s or schedule.clock() - began
                    if line.found is not None:
                        yield Found(number=number, where=where, what=line.found)
        except DiedError as error:
            why, died = str(error), died + 1
        else:
            sampled_s = turn.sampling_s * (2 if turn.control and schedule.control_share else 1)
            schedule.ended(ready_s=ready_s, elapsed_s=schedule.clock() - began, sampled_s=sampled_s)
        yield Ended(number=number, died=why)
        if died > _MOST_DEATHS:
            raise SelabError(
                f"{units.counted(died, 'process', 'processes')} died: {why}; free memory, or use a smaller --batch"
            )
        number += 1


class DiedError(SelabError):
    """A process ended before its work was done."""


def lines_of(
    module: str,
    order: bytes,
    *,
    does: str = "measuring",
    environment: Mapping[str, str] | None = None,
    started: Callable[["subprocess.Popen[bytes]"], object] = lambda _: None,
) -> Generator[bytes, None, None]:
    """Start a process and yield its lines. It is asked to end when the generator is closed early.

    Args:
        module: has `child_main`, the program of the process.
        order: what the process reads.
        does: for messages.
        environment: variables that the process has besides those of this one.
        started: called with the process.

    Raises:
        DiedError: it ended badly.
    """
    # Without -P, the current folder would be the first place to import from: a random.py in it would run.
    command = [sys.executable, "-P", "-c", _START.format(module=module)]
    with ExitStack() as ended:
        with _signals_postponed():
            variables = None if environment is None else {**os.environ, **environment}
            process = ended.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables)
            )
            ended.push(lambda kind, *_: process.terminate() if kind is not None else None)
            started(process)
        assert process.stdin is not None
        assert process.stdout is not None
        _write_all(process.stdin, order)
        yield from process.stdout
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise DiedError(f"a {does} process was ended by {name}; is the memory full?")
    if process.returncode:
        raise DiedError(f"a {does} process ended with status {process.returncode}; see its message above")


@contextmanager
def _signals_postponed() -> Iterator[None]:
    """Let signals that would interrupt the program wait until the end of the block.

    An exception in the midst of a start leaves a process that nobody knows of.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    came: list[int] = []
    before: dict[int, Callable[[int, Any], object]] = {}
    for one in signal.valid_signals():
        handler = signal.getsignal(one)
        if callable(handler):
            before[one] = handler
            signal.signal(one, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _write_all(pipe: IO[bytes], order: bytes) -> None:
    """Write an order and close the pipe.

    A process that ended before it read the order is no error here: its status says how.
    """
    for step in (lambda: pipe.write(order), pipe.close):
        with suppress(BrokenPipeError):
            step()


def child(order_type: type[_Order], work: Callable[[_Order, Callable[[], object]], Iterator[object]]) -> None:
    """Run the program of a process: read one order, write a line for each finding, and end the process.

    Args:
        order_type: of the order.
        work: yields what is found; its second argument is called when the networks are ready.
    """

    def act(order: _Order, write: Callable[..., None]) -> None:
        try:
            for found in work(order, lambda: write(ready=True)):
                write(found=found)
        except SelabError as error:
            write(error=str(error))

    obey(order_type, act)


def obey(order_type: type[_Order], act: Callable[[_Order, Callable[..., None]], object]) -> None:
    """Run the program of a process: read one order, do it, and end the process.

    Args:
        order_type: of the order.
        act: does it; its second argument writes a line, an object with the keywords it is called with.
    """
    status = 1
    try:
        _act(order_type, act, sys.stdin.buffer.read(), sys.stdout.buffer)
        status = 0
    except msgspec.ValidationError:
        traceback.print_exc()
    except (KeyboardInterrupt, BrokenPipeError, msgspec.DecodeError):
        pass  # the parent was interrupted as well, and says so; or it has gone, perhaps while it wrote the order
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    # Taking torch down takes half a second, and nothing is left to be written.
    os._exit(status)


def _act(
    order_type: type[_Order],
    act: Callable[[_Order, Callable[..., None]], object],
    text: bytes,
    lines: IO[bytes],
) -> None:
    def write(**line: Any) -> None:
        lines.write(msgspec.json.encode(line) + b"\n")
        lines.flush()

    order = msgspec.json.decode(text, type=order_type)
    # A user's network may print; standard output is for the lines alone.
    with redirect_stdout(sys.stderr):
        act(order, write)
