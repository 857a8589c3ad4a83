"""The flags of the large commands. Standard library only: `--help` and a wrong flag are answered at once."""
