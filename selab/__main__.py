"""`python -m selab`."""

import sys
from pathlib import Path


def _leave_current_folder() -> None:
    """Take the current folder off the search path, where `-m` has put it: a random.py in it must not run.

    If the package itself was found there, the folder becomes the last place instead.
    """
    if sys.flags.safe_path or sys.path[:1] not in ([""], [str(Path.cwd())]):
        return
    folder = sys.path.pop(0)
    if Path(__file__).resolve().parents[1] == Path.cwd().resolve():
        sys.path.append(folder)


if __name__ == "__main__":
    _leave_current_folder()
    from selab.cli import main

    main()
