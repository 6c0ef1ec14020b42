"""The program `hflit`: one file for each of its commands."""
