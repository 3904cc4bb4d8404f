"""The steps from an empty database to the present tables, run by Alembic without an ini file.

For a change of `tables.py`, write the next file in `versions` by hand and name it below.
"""

from typing import Final

REVISIONS: Final = ("0001",)
"""Every revision, oldest first, known here so that an up-to-date database opens without Alembic."""
