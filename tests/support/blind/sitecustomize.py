"""A Python that finds this file at its start can't open what lies below BLIND_TO; attempts are noted in BLIND_LOG."""

import os
import sys

HIDDEN, LOG = os.environ["BLIND_TO"], os.environ["BLIND_LOG"]


def hide(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith(HIDDEN):
        os.write(NOTES, f"{arguments[0]}\n".encode())
        raise FileNotFoundError(2, "hidden", arguments[0])


NOTES = os.open(LOG, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
sys.addaudithook(hide)
