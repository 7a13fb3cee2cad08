"""`python -m llm_snp report DIR`: make the page, the plots and the card of a finished result anew."""

from __future__ import annotations

import argparse

from ..system.files import alone
from ..system.manifest import expect_result
from .flags import expanded

HELP = "make the page, the plots and the card of a result anew from its report.json"


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("directory", metavar="DIR", type=expanded, help="the result of a run")
    p.add_argument(
        "--output",
        metavar="FILE.html",
        type=expanded,
        help="write only the page, to this new file or over an earlier page; DIR stays as it is",
    )


def check(args: argparse.Namespace) -> None:
    """Raise `CheckpointError` if DIR can be no result."""
    expect_result(args.directory)


def main(args: argparse.Namespace) -> None:
    """Write the documents, print their paths and what the run came to. Raises `SnpError` if DIR is no result."""
    from ..documents.summary import summary
    from ..documents.writing import kept, read_report, write_documents, write_page
    from ..result.own_code import has_own_code

    own_code = has_own_code(args.directory)
    if args.output is not None:
        report = read_report(args.directory)
        write_page(args.output, report)
        written = [args.output]
    else:
        with alone(args.directory):
            report = read_report(args.directory)
            written = write_documents(args.directory, report, own_code=own_code)
        for path in kept(args.directory, written):
            print(f"kept     {path}, which is not as it was written")
    for path in written:
        print(f"written  {path}")
    print()
    # A result that was moved is where it was found now.
    print(summary(report | {"output": str(args.directory)}, own_code))
