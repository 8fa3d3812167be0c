"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Specs = Annotated[
    list[str], typer.Argument(metavar="SPEC...", help="`.tune` files; `-` reads standard input.")
]
Spec = Annotated[Path, typer.Argument(metavar="SPEC", help="A `.tune` file.")]
Stage = Annotated[str, typer.Argument(metavar="STAGE", help="A stage or one of its branches.")]
Sets = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="NAME=EXPRESSION",
        help="Override a parameter (`lr=3e-6`) or an attribute"
        " (`stage.baseline.batch=32 sequences`)."
        " Paths in it are relative to the current folder.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print data instead of text.")]
Store = Annotated[
    Path | None,
    typer.Option("--store", help="The store; else `TUNE_STORE`, else `.tune` beside the spec."),
]
Only = Annotated[
    list[str], typer.Option("--only", metavar="STAGE", help="Run these stages and no others.")
]
Until = Annotated[
    list[str], typer.Option("--until", metavar="STAGE", help="Run these stages and what they need.")
]
Force = Annotated[
    list[str],
    typer.Option("--force", metavar="STAGE", help="Run these stages again, even if they are done."),
]
On = Annotated[
    str | None,
    typer.Option(
        "--on", metavar="HARDWARE", help="Declared hardware, or a type such as `v5e:4x4`."
    ),
]
Traceback = Annotated[bool, typer.Option("--traceback", help="Print the Python traceback.")]
