"""`python -m helpers.config.help` prints all options, for train.sh --help."""

from __future__ import annotations

from helpers.config.docs import help_text

if __name__ == "__main__":
    print(help_text())
