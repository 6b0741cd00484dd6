"""Programs are run in processes of their own: a crash there is a verdict here."""

from __future__ import annotations

from pathlib import Path

# A child that is started in this folder with `-m` finds the rooms where this process has found them.
HOME = Path(__file__).resolve().parent.parent

# In its environment: its words are read as UTF-8, whatever streams this process has.
UTF8 = {"PYTHONIOENCODING": "utf-8"}
