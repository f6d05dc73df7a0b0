"""Import a user's own Python files and modules; errors name the file and the line. Starts without torch."""

import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import reduce
from pathlib import Path
from types import ModuleType

from selab.errors import SelabError, SpecError, nearest, one_line

# Who is told before a user's code runs, and of which files and modules it has been told.
_listeners: list[Callable[[str], object]] = []
_known: set[str] = set()


def tell_of_code(listener: Callable[[str], object] | None) -> None:
    """Call a function with `path/to/file.py` or `package.module` before any of a user's code runs, once for each.

    Args:
        listener: replaces the one before; None for none.
    """
    _listeners[:] = [] if listener is None else [listener]
    _known.clear()


def code_is_known(place: str) -> None:
    """Note that the user has been told that code of this file or module runs."""
    _known.add(_place_key(place))


def before_code(place: str) -> None:
    """Tell that code of a file or module is about to run, unless the user knows."""
    if _place_key(place) not in _known:
        code_is_known(place)
        for listener in _listeners:
            listener(place)


def _place_key(place: str) -> str:
    return str(Path(place).resolve()) if place.endswith(".py") else place


@contextmanager
def imported(target: str) -> Iterator[object]:
    """Import `path/to/file.py:NAME` or `package.module:NAME`, and run the block of the `with` as the user's code.

    A file can import modules of its folder. A module is looked up in the current folder and among installed packages.
    A file is loaded once in a process. Prints go to standard error, and random state is not changed.

    Args:
        target: dots in NAME lead into classes.

    Raises:
        SpecError: no such file, module or name, or the code fails; the message has the error, file and line.
    """
    place, _, attribute = target.rpartition(":")
    if place.endswith(".py"):
        file = Path(place).resolve()
        if not file.is_file():
            there = f"{place} is not a regular file" if file.exists() else f"there is no file {place}"
            raise SpecError(f"{target}: {there}")
        before_code(place)
        with user_code(target, folder=file.parent, home=file.parent):
            yield _attribute(_file_module(file), attribute, where=target)
        return
    root = place.partition(".")[0]
    with user_code(target, folder=Path.cwd(), home=None):
        spec = importlib.util.find_spec(root)
        if spec is None:
            raise SpecError(f"{target}: there is no module {root!r} in this folder or among the installed packages")
    places = list(spec.submodule_search_locations or [spec.origin or ""])
    before_code(place)
    # An installed package does not import from the current folder.
    here = Path.cwd() if _lies_in(Path(places[0]).absolute(), Path.cwd()) else None
    with user_code(target, folder=here, home=Path(places[0])):
        try:
            with _random_state_kept():
                module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{place}.".startswith(f"{error.name}."):
                raise SpecError(f"{target}: there is no module {error.name!r} in {places[0]}") from None
            raise
        yield _attribute(module, attribute, where=target)


def beside(target: str, folder: Path) -> str:
    """Return a `file.py:NAME` with the file in this folder if it is there, else the target as it is."""
    found = re.fullmatch(r"(.+\.py):([\w.]+)", target)
    if found is None or not (folder / found[1]).is_file():
        return target
    return f"{folder / found[1]}:{found[2]}"


@contextmanager
def user_code(where: str, *, folder: Path | None, home: Path | None) -> Iterator[None]:
    """Run a user's code: let it import from its folder, send its prints to standard error, and explain its errors.

    Args:
        where: what was asked for, for messages.
        folder: first on the search path; None for nothing.
        home: the file or folder whose lines an error is attributed to.
    """
    if folder is not None:
        sys.path.insert(0, str(folder))
    try:
        with redirect_stdout(sys.stderr):
            yield
    except SelabError:
        raise
    except (Exception, SystemExit) as error:
        raise SpecError(f"{where}: {explained(error)}{_location(error, home)}") from error
    finally:
        if folder is not None:
            sys.path.remove(str(folder))


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Keep random state and device out of an import: it happens once, in whichever build comes first."""
    import torch

    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        yield


def _file_module(file: Path) -> ModuleType:
    """Return the module of a file, loaded once in a process."""
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise SpecError(f"{file}: not a file that Python can import")
    module = importlib.util.module_from_spec(spec)
    # Classes of the file look their module up by its name while they are made.
    sys.modules[name] = module
    try:
        with _random_state_kept():
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _attribute(module: ModuleType, attribute: str, *, where: str) -> object:
    try:
        found: object = reduce(getattr, attribute.split("."), module)
    except AttributeError:
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise SpecError(f"{where}: there is no such name in it{nearest(attribute, known)}") from None
    return found


def explained(error: BaseException) -> str:
    """Return `ValueError: its message`, in one line."""
    if isinstance(error, SystemExit):
        return "it ends the program (SystemExit); put what does so under `if __name__ == '__main__':`"
    text = one_line(SyntaxError(error.msg) if isinstance(error, SyntaxError) else error)
    return type(error).__name__ + (f": {text}" if text != type(error).__name__ else "")


def _location(error: BaseException, home: Path | None) -> str:
    """Return where in the user's code an error arose, ` (net.py, line 12)`; empty if it did not arise there."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    if home is None:
        return ""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if _lies_in(Path(frame.filename), home)]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


def _lies_in(file: Path, home: Path) -> bool:
    """Return whether a file belongs to a user's folder; an environment inside of it does not."""
    return file.is_relative_to(home) and "site-packages" not in file.relative_to(home).parts
