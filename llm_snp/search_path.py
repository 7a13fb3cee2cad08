"""Where modules are looked for when llm_snp is run as `python -m llm_snp`: not in the working directory.

Python puts that first there, and it may be the directory of a stranger's model, with a `numpy.py` in it.
"""

import os
import sys


def leave_out_working_directory() -> None:
    """Take the entry that `python -m` has added off `sys.path`, unless llm_snp itself lies there, as in its sources."""
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    safe = getattr(sys.flags, "safe_path", False)  # from Python 3.11 on: with it nothing was added
    # While Python looks for a module to run, and then only, "-m" is what the program is called.
    if (
        sys.argv[:1] == ["-m"]
        and not safe
        and sys.path[:1] == [os.getcwd()]
        and not os.path.samefile(home, sys.path[0])
    ):
        del sys.path[0]


leave_out_working_directory()
