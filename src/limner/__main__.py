"""``python -m limner``: the command line."""

from limner.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
