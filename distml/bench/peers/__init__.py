"""The other side of each measurement, written as its own documentation would have it written."""
