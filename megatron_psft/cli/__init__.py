"""The command `psft`: one module for each of its commands, flags in and text out (main chooses, output sets up logs).

May import all other rooms."""
