"""Runs the command line: ``python -m dqrm``, or ``torchrun -m dqrm train ...``."""

from dqrm.cli import main

if __name__ == "__main__":
    main()
