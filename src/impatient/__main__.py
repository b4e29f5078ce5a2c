"""The command line, as `python -m impatient`."""

from impatient.cli import main

if __name__ == "__main__":
    main()
