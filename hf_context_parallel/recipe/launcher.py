"""Launcher of accelerate as a command whose own tracebacks do not hide the cause of an error."""

from __future__ import annotations

import os
import subprocess
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from hf_context_parallel.compat import lookup
from hf_context_parallel.distributed.last_words import CAUSE


def main() -> None:
    """Run `accelerate launch` with the arguments of this command. A process that failed ends it with status 1."""
    launch_command, parser = (
        lookup("accelerate.commands.launch", name, "hf-context-parallel train")
        for name in ("launch_command", "launch_command_parser")
    )
    try:
        launch_command(parser().parse_args())
    except ChildFailedError as failed:
        if not os.path.exists(os.environ[CAUSE]):  # a signal leaves no time for last words
            rank, failure = failed.get_first_failure()
            print(f"rank {rank} ended with exit code {failure.exitcode}: {failure.message}", file=sys.stderr)
        sys.exit(1)
    except subprocess.CalledProcessError as failed:
        if not os.path.exists(os.environ[CAUSE]):
            print(f"the run ended with exit code {failed.returncode}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
