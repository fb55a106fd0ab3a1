"""Run the `animesion` command line as `python -m animesion`, for launchers such as torchrun that start modules."""

from animesion.cli import main

if __name__ == "__main__":  # worker processes import this module again
    main()
