"""`tightfit`, and `python -m tightfit`: the command line, which Ctrl-C may end at any time."""

import sys


def main() -> None:
    """Run the command line of this process."""
    try:
        # The imports take a while.
        from tightfit.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
