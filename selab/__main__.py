"""`python -m selab`."""

from selab.cli import main

if __name__ == "__main__":
    main()
