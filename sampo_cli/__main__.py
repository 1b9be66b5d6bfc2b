"""`python -m sampo_cli`."""

from sampo_cli.cli import main

if __name__ == "__main__":
    main()
