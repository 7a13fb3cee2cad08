"""`python -m llm_snp push DIR user/name`: publish a result on the Hugging Face Hub."""

from __future__ import annotations

import argparse

from ..system.manifest import expect_result
from .flags import expanded

HELP = "publish a result on the Hugging Face Hub"


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("directory", metavar="DIR", type=expanded, help="the result of a run")
    p.add_argument("repo", metavar="USER/NAME", help="the repository on the Hub; it is made if there is none")
    p.add_argument("--private", action="store_true", help="make the repository a private one")
    p.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the result that the repository has, in one commit; its history keeps the earlier version",
    )
    p.add_argument("--message", metavar="TEXT", help="what the commit says")


def check(args: argparse.Namespace) -> None:
    """Raise `CheckpointError` if DIR can be no result."""
    expect_result(args.directory)


def main(args: argparse.Namespace) -> None:
    """Upload DIR, and print where it is and how to load it. Raises `SnpError`."""
    from ..documents.writing import read_report
    from ..result.publish import card_is_edited, left_here, push
    from ..system.manifest import some

    url = push(args.directory, args.repo, args.private, args.overwrite, args.message)
    report = read_report(args.directory)
    trust = ", trust_remote_code=True" if report["model"]["custom_code"] else ""
    print(f"pushed   {url}")
    if left := left_here(args.directory):
        print(f"left     {some(left)}: no run of llm_snp wrote what stays here")
    if card_is_edited(args.directory, report):
        print("edited   README.md went up as it is: somebody has changed it since it was written")
    print(f"load it  AutoModelForCausalLM.from_pretrained({args.repo!r}{trust})")
