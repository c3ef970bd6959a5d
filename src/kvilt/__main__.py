"""`python -m kvilt` is `kvilt`."""

from kvilt.cli import main

if __name__ == "__main__":
    main()
