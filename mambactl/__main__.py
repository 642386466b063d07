"""`python -m mambactl`: the command line."""

from mambactl.cli.main import main

if __name__ == "__main__":
    main()
