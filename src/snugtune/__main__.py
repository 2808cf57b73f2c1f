"""`python -m snugtune` is the `snugtune` command."""

from snugtune.cli import main

main()
