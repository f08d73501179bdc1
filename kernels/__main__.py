"""`python -m darts_fast.kernels` prints which backends this machine has and what each is used for."""

import os
import sys

from darts_fast.kernels.backends import available


def main() -> int:
    if len(sys.argv) > 1:
        print(f"darts_fast.kernels takes no arguments, not {sys.argv[1]!r}", file=sys.stderr)
        return 2
    try:
        print("\n".join(f"{name:<8}{reason}" for name, reason in available().items()), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python shall not try again at exit
        print(f"darts_fast.kernels: cannot write to the standard output: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
