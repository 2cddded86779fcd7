"""`python -m mhc_compile`."""

from mhc_compile.cli import main

if __name__ == "__main__":
    main()
