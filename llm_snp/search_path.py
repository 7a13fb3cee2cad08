"""Where modules are looked for when llm_snp is run as a command: not in the working directory.

Python puts that first for `python -m llm_snp`, and, for `llm-snp` as well, where PYTHONPATH has an empty entry, as
`$PYTHONPATH:/x` makes one where that was not set. It may be the directory of a stranger's model, with a `numpy.py` in
it.
"""

import os
import sys

COMMAND = "llm-snp"  # as it is installed


def leave_out_working_directory() -> None:
    """Take what nobody named off `sys.path`, unless llm_snp itself lies there, as in its sources."""
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    safe = getattr(sys.flags, "safe_path", False)  # from Python 3.11 on: with it nothing was added
    # While Python looks for a module to run, and then only, "-m" is what the program is called.
    as_module = sys.argv[:1] == ["-m"]
    if not (as_module or (sys.argv and os.path.basename(sys.argv[0]) == COMMAND)):
        return
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it has been removed
        return
    if os.path.samefile(home, here):
        return
    if as_module and not safe and sys.path[:1] == [here]:
        del sys.path[0]
    given = "" if sys.flags.ignore_environment else os.environ.get("PYTHONPATH", "")
    named = given.split(os.pathsep) if given else []
    if "" in named and here not in named:
        sys.path[:] = [entry for entry in sys.path if entry not in ("", here)]


leave_out_working_directory()
